//! Connections of a Redis shard: from its URL, for its calls, for its wake-ups; and what their errors mean.
//!
//! Every await here ends by itself. An error is judged by whether the server may have run the call: what it refuses before
//! a script's first write has certainly not happened.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex as SyncMutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use rand::Rng;
use redis::aio::{MultiplexedConnection, PubSub};
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionInfo, IntoConnectionInfo, Pipeline, RedisError, RedisResult, TlsMode,
    Value,
};
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::Timeouts;
use super::dial::Endpoint;
use super::keyed::read_wake;
use crate::error::{Code, Error, Happened, Result};
use crate::shard::feed::{Ear, Topic, Wish};
use crate::shard::{Keyspace, OnWake, Wake};

/// Most partitions of one cluster.
const PARTITIONS_MAX: u32 = 1024;
/// Between two attempts to subscribe.
const RETRY_MS: std::ops::Range<u64> = 20..200;
/// How often a silent subscription is asked whether it is still there.
const SILENCE_MAX: Duration = Duration::from_secs(5);

/// Where the server is, or the cluster.
pub struct Home {
    timeouts: Timeouts,
    place: Place,
}

enum Place {
    Server(Client),
    Sentinel {
        client: Mutex<SentinelClient>,
        sentinels: Vec<ConnectionInfo>,
        service: String,
        login: ConnectionInfo,
    },
    Cluster {
        client: ClusterClient,
        nodes: Vec<Client>,
        partitions: u32,
        /// One connection for all partitions.
        shared: SyncMutex<Option<Live>>,
    },
}

/// A connection that is open, or was.
#[derive(Clone)]
pub struct Live {
    /// Tells a connection from the one that came after it.
    pub id: u64,
    wire: Wire,
}

#[derive(Clone)]
enum Wire {
    Server(MultiplexedConnection),
    Cluster(ClusterConnection),
}

/// The parts of `scheme://[login@]hosts[/path][?query]`.
struct Url<'a> {
    tls: bool,
    login: &'a str,
    hosts: Vec<&'a str>,
    path: &'a str,
    query: &'a str,
}

impl<'a> Url<'a> {
    fn parse(rest: &'a str, tls: bool) -> Url<'a> {
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        // A password may hold an `@` only percent-encoded, but the last one is the separator all the same.
        let (login, rest) = rest.rsplit_once('@').unwrap_or(("", rest));
        let (hosts, path) = rest.split_once('/').unwrap_or((rest, ""));
        Url { tls, login, hosts: hosts.split(',').filter(|host| !host.is_empty()).collect(), path, query }
    }

    /// The same login and scheme at one host.
    fn at(&self, host: &str, login: &str, database: &str) -> RedisResult<ConnectionInfo> {
        let scheme = if self.tls { "rediss" } else { "redis" };
        let at = if login.is_empty() { "" } else { "@" };
        format!("{scheme}://{login}{at}{host}/{database}").into_connection_info()
    }
}

impl Home {
    pub fn parse(url: &str, shard: &str, timeouts: Timeouts) -> Result<Home> {
        // An URL holds a password: the error names the shard instead.
        let wrong = |why: &dyn std::fmt::Display| Error::bad(format!("the URL of shard {shard} cannot be used: {why}"));
        let (scheme, rest) = url.split_once("://").ok_or_else(|| wrong(&"no scheme"))?;
        let parsed = Url::parse(rest, scheme.starts_with("rediss"));
        let place = match scheme {
            "redis+sentinel" | "rediss+sentinel" => Place::sentinel(&parsed),
            "redis+cluster" | "rediss+cluster" => Place::cluster(&parsed, timeouts),
            _ => Client::open(url).map(Place::Server),
        };
        Ok(Home { timeouts, place: place.map_err(|error| wrong(&error))? })
    }

    /// How many partitions the cluster has; `None` when this is no cluster.
    pub fn partitions(&self) -> Option<u32> {
        match &self.place {
            Place::Cluster { partitions, .. } => Some(*partitions),
            _ => None,
        }
    }

    /// What takes ordinary commands. The nodes of a cluster would each take some only.
    pub fn keyspace(&self, shard: &Arc<str>) -> Keyspace {
        match &self.place {
            Place::Server(client) => {
                Keyspace::Server(Arc::new(Endpoint::new(shard.clone(), client.get_connection_info().clone())))
            }
            Place::Sentinel { sentinels, service, login, .. } => Keyspace::Server(Arc::new(Endpoint::sentinel(
                shard.clone(),
                sentinels.clone(),
                service.clone(),
                login.clone(),
            ))),
            Place::Cluster { .. } => Keyspace::None,
        }
    }

    /// A connection that has the scripts; the error says in words why there is none.
    pub async fn connect(&self, scripts: &[&str]) -> std::result::Result<Live, String> {
        static CONNECTIONS: AtomicU64 = AtomicU64::new(1);
        let opening = async {
            match &self.place {
                Place::Cluster { client, shared, .. } => {
                    let known = shared.lock().unwrap_or_else(PoisonError::into_inner).clone();
                    match known {
                        Some(live) => Ok(live.wire),
                        None => client.get_async_connection().await.map(Wire::Cluster),
                    }
                }
                _ => {
                    let config = AsyncConnectionConfig::new()
                        .set_connection_timeout(Some(self.timeouts.connect))
                        .set_response_timeout(Some(self.timeouts.answer));
                    let client = self.server().await?;
                    client.get_multiplexed_async_connection_with_config(&config).await.map(Wire::Server)
                }
            }
        };
        // A cluster and a Sentinel are several connections, one after the other.
        let patience = match self.place {
            Place::Server(_) => self.timeouts.connect,
            _ => self.timeouts.connect * 3,
        };
        let wire = match timeout(patience, opening).await {
            Ok(Ok(wire)) => wire,
            Ok(Err(error)) => return Err(format!("cannot be connected to: {error}")),
            Err(_) => return Err(format!("took no connection within {} ms", patience.as_millis())),
        };
        let live = Live { id: CONNECTIONS.fetch_add(1, Ordering::Relaxed), wire };
        live.load(scripts, self.timeouts.answer).await?;
        if let Place::Cluster { shared, .. } = &self.place {
            *shared.lock().unwrap_or_else(PoisonError::into_inner) = Some(live.clone());
        }
        Ok(live)
    }

    /// No partition gets this connection any more.
    pub fn forget(&self, failed: &Live) {
        if let Place::Cluster { shared, .. } = &self.place {
            let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
            if shared.as_ref().is_some_and(|live| live.id == failed.id) {
                *shared = None;
            }
        }
    }

    /// The server itself, or the master that the Sentinels name now, or any node of a cluster.
    async fn server(&self) -> RedisResult<Client> {
        match &self.place {
            Place::Server(client) => Ok(client.clone()),
            Place::Sentinel { client, .. } => client.lock().await.async_get_client().await,
            Place::Cluster { nodes, .. } => {
                let any = rand::rng().random_range(0..nodes.len().max(1));
                nodes.get(any).cloned().ok_or_else(|| invalid("no node is named"))
            }
        }
    }

    async fn subscribe(&self, channel: &str) -> RedisResult<PubSub> {
        let mut subscription = self.server().await?.get_async_pubsub().await?;
        subscription.subscribe(channel).await?;
        Ok(subscription)
    }
}

fn invalid(why: &'static str) -> RedisError {
    RedisError::from((redis::ErrorKind::InvalidClientConfig, why))
}

impl Place {
    fn sentinel(url: &Url) -> RedisResult<Place> {
        let (service, database) = url.path.split_once('/').unwrap_or((url.path, ""));
        if service.is_empty() || url.hosts.is_empty() {
            return Err(invalid("expected redis+sentinel://host:port,host:port/service"));
        }
        let sentinels: Vec<ConnectionInfo> =
            url.hosts.iter().map(|host| url.at(&with_port(host, 26379), "", "")).collect::<RedisResult<_>>()?;
        let login = url.at("master", url.login, database)?;
        let settings = login.redis_settings();
        let addresses = sentinels.iter().map(|sentinel| sentinel.addr().clone());
        let mut builder = SentinelClientBuilder::new(addresses, service, SentinelServerType::Master)?
            .set_client_to_redis_db(settings.db());
        if url.tls {
            builder =
                builder.set_client_to_redis_tls_mode(TlsMode::Secure).set_client_to_sentinel_tls_mode(TlsMode::Secure);
        }
        if let Some(user) = settings.username() {
            builder = builder.set_client_to_redis_username(user);
        }
        if let Some(password) = settings.password() {
            builder = builder.set_client_to_redis_password(password);
        }
        let client = Mutex::new(builder.build()?);
        Ok(Place::Sentinel { client, sentinels, service: service.to_owned(), login })
    }

    fn cluster(url: &Url, timeouts: Timeouts) -> RedisResult<Place> {
        let partitions = match url.query.strip_prefix("partitions=") {
            None if url.query.is_empty() => 16,
            None => return Err(invalid("expected no query but ?partitions=n")),
            Some(count) => match count.parse() {
                Ok(count) if (1..=PARTITIONS_MAX).contains(&count) => count,
                _ => return Err(invalid("expected 1 to 1024 partitions")),
            },
        };
        let infos: Vec<ConnectionInfo> =
            url.hosts.iter().map(|host| url.at(&with_port(host, 6379), url.login, "")).collect::<RedisResult<_>>()?;
        let nodes = infos.iter().map(|info| Client::open(info.clone())).collect::<RedisResult<_>>()?;
        let client = ClusterClient::builder(infos)
            .connection_timeout(timeouts.connect)
            .response_timeout(timeouts.answer)
            .retries(3)
            .min_retry_wait(20)
            .max_retry_wait(200)
            .build()?;
        Ok(Place::Cluster { client, nodes, partitions, shared: SyncMutex::new(None) })
    }
}

fn with_port(host: &str, port: u16) -> String {
    // The colons of an IPv6 address stand in brackets.
    match host.rsplit(']').next().unwrap_or_default().contains(':') {
        true => host.to_owned(),
        false => format!("{host}:{port}"),
    }
}

impl Live {
    /// Sends commands in one write, to a cluster at once but apart; the answer of each stands alone.
    pub async fn send(&self, commands: Vec<Cmd>, patience: Duration) -> Vec<RedisResult<Value>> {
        let count = commands.len();
        let sent = async {
            match &self.wire {
                Wire::Server(connection) => {
                    let mut pipeline = Pipeline::with_capacity(count);
                    commands.into_iter().for_each(|command| {
                        pipeline.add_command(command);
                    });
                    pipeline.ignore_errors().query_async::<Vec<RedisResult<Value>>>(&mut connection.clone()).await
                }
                Wire::Cluster(connection) => Ok(join_all(commands.iter().map(|command| {
                    let mut connection = connection.clone();
                    async move { command.query_async::<Value>(&mut connection).await }
                }))
                .await),
            }
        };
        let answers = match timeout(patience + patience / 4, sent).await {
            Ok(Ok(answers)) if answers.len() == count => return answers,
            Ok(Ok(_)) => RedisError::from((redis::ErrorKind::Parse, "not one answer for each call")),
            Ok(Err(error)) => error,
            Err(_) => std::io::Error::from(std::io::ErrorKind::TimedOut).into(),
        };
        (0..count).map(|_| Err(answers.clone())).collect()
    }

    pub async fn ask(&self, command: Cmd, patience: Duration) -> RedisResult<Value> {
        let unanswered = || Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        self.send(vec![command], patience).await.pop().unwrap_or_else(unanswered)
    }

    /// Loads the scripts; with `SCRIPT LOAD`, because servers may evict what came with `EVAL`.
    pub async fn load(&self, scripts: &[&str], patience: Duration) -> std::result::Result<(), String> {
        for script in scripts {
            let mut load = redis::cmd("SCRIPT");
            load.arg("LOAD").arg(script);
            let loaded = self.ask(load, patience).await;
            loaded.map_err(|error| format!("does not take the script: {}", words(&error)))?;
        }
        Ok(())
    }
}

/// Why a queue's call failed.
pub enum Failure {
    /// The server does not know the script: nothing was done.
    NoScript,
    Down(Error),
    /// The server is out of memory and took none of it; what needs no memory it still does.
    Full(Error),
    /// The server answered with an error that no state of a server explains.
    Odd(String),
}

impl Failure {
    pub fn unreadable(shard: &str) -> Failure {
        Failure::Odd(format!("{shard} gave an answer that cannot be read"))
    }

    /// Whether another connection should be tried next time: after every fail-over this is another server.
    pub fn ends_connection(&self) -> bool {
        matches!(self, Failure::Down(_))
    }

    pub fn into_error(self, shard: &str) -> Error {
        match self {
            Failure::NoScript => Error::shard_down(shard, "does not know the script", Happened::No),
            Failure::Down(error) | Failure::Full(error) => error,
            Failure::Odd(text) => Error { code: Code::Err, text: text.into(), happened: Happened::Maybe },
        }
    }
}

/// An error in words that hold no payload: the server's code and what it says behind it, or the crate's own text.
fn words(error: &RedisError) -> String {
    let text = match (error.code(), error.detail()) {
        // Behind it stand the script's hash and line, which say nothing to a client.
        (Some(code), Some(detail)) => format!("{code} {}", detail.split(" script: ").next().unwrap_or_default()),
        _ => error.to_string(),
    };
    let text: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
    match error.is_timeout() {
        true => "did not answer in time".to_owned(),
        false => text,
    }
}

/// What an error says about the call: a server that refuses a call for its own state has not begun it.
pub fn judge(shard: &str, error: &RedisError) -> Failure {
    const REFUSALS: [&str; 14] = [
        "LOADING",
        "READONLY",
        "MASTERDOWN",
        "BUSY",
        "CLUSTERDOWN",
        "TRYAGAIN",
        "MOVED",
        "ASK",
        "NOREPLICAS",
        "MISCONF",
        "NOAUTH",
        "NOPERM",
        "WRONGPASS",
        "CROSSSLOT",
    ];
    let down = |happened| Failure::Down(Error::shard_down(shard, &words(error), happened));
    let Some(code) = error.code() else {
        return match error.is_connection_refusal() {
            true => down(Happened::No),
            false => down(Happened::Maybe),
        };
    };
    if code == "NOSCRIPT" {
        return Failure::NoScript;
    }
    // Redis 6.2 wraps what stopped a script into an `ERR` of its own: `... @user_script: 12: -OOM command not allowed`.
    let detail = error.detail().unwrap_or_default();
    let is_refusal = |word: &str| code == word || detail.contains(&format!("-{word} "));
    if is_refusal("OOM") {
        let text = format!("shard {shard} is out of memory (maxmemory); nothing was done");
        return Failure::Full(Error::new(Code::Overloaded, text));
    }
    match REFUSALS.iter().any(|word| is_refusal(word)) {
        true => down(Happened::No),
        false => Failure::Odd(format!("{shard} failed: {}", words(error))),
    }
}

/// Listens for wake-ups until it is aborted, on a connection of its own.
pub async fn watch(home: Arc<Home>, channel: String, timeouts: Timeouts, on_wake: OnWake) {
    loop {
        if let Ok(Ok(subscription)) = timeout(timeouts.connect + timeouts.answer, home.subscribe(&channel)).await {
            // Whatever was said while nobody listened was missed.
            on_wake(Wake::Missed);
            listen(subscription, timeouts.answer, &on_wake).await;
        }
        let rest = rand::rng().random_range(RETRY_MS);
        tokio::time::sleep(Duration::from_millis(rest)).await;
    }
}

/// Passes wake-ups on until the connection is gone.
async fn listen(subscription: PubSub, patience: Duration, on_wake: &OnWake) {
    let (mut sink, mut messages) = subscription.split();
    loop {
        match timeout(SILENCE_MAX, messages.next()).await {
            Ok(Some(message)) => on_wake(read_wake(message.get_payload_bytes())),
            Ok(None) => return,
            Err(_) => {
                let is_there = matches!(timeout(patience, sink.ping::<Value>()).await, Ok(Ok(_)));
                if !is_there {
                    return;
                }
            }
        }
    }
}

/// Tells an ear what it wishes to hear until it is aborted, on a connection that is there while something is wished.
/// `channels` stands before the name of every channel.
pub async fn follow(home: Arc<Home>, channels: String, timeouts: Timeouts, ear: Arc<Ear>) {
    loop {
        let (needed, version) = ear.wishes.needed();
        if needed.is_empty() {
            ear.listens(version);
            ear.changed(version).await;
            continue;
        }
        let opening = async { home.server().await?.get_async_pubsub().await };
        if let Ok(Ok(subscription)) = timeout(timeouts.connect + timeouts.answer, opening).await {
            hear(subscription, &channels, timeouts.answer, &ear).await;
        }
        if !ear.wishes.needed().0.is_empty() {
            ear.is_deaf();
            let rest = rand::rng().random_range(RETRY_MS);
            tokio::time::sleep(Duration::from_millis(rest)).await;
        }
    }
}

/// Subscribes to what is wished, as it changes, and passes on what comes, until the connection is gone or nothing is wished.
async fn hear(subscription: PubSub, channels: &str, patience: Duration, ear: &Ear) {
    let (mut sink, mut messages) = subscription.split();
    let name = |(topic, queue): &Wish| {
        let queue = queue.as_ref().map_or("*", |queue| queue.as_str());
        format!("{channels}{}{queue}", mark(*topic))
    };
    let mut have: BTreeSet<Wish> = BTreeSet::new();
    loop {
        let (needed, version) = ear.wishes.needed();
        let changing = async {
            // The new ones first, so that nothing is missed where one takes another's place.
            for wish in needed.difference(&have) {
                match wish.1 {
                    Some(_) => sink.subscribe(name(wish)).await?,
                    None => sink.psubscribe(name(wish)).await?,
                }
            }
            for wish in have.difference(&needed) {
                match wish.1 {
                    Some(_) => sink.unsubscribe(name(wish)).await?,
                    None => sink.punsubscribe(name(wish)).await?,
                }
            }
            RedisResult::Ok(())
        };
        if !matches!(timeout(patience, changing).await, Ok(Ok(()))) {
            return;
        }
        have = needed;
        ear.listens(version);
        if have.is_empty() {
            return;
        }
        let mut changed = pin!(ear.changed(version));
        loop {
            let message = tokio::select! {
                message = timeout(SILENCE_MAX, messages.next()) => message,
                () = &mut changed => break,
            };
            match message {
                Ok(Some(message)) => {
                    let channel = message.get_channel_name();
                    for topic in [Topic::Events, Topic::Deaths] {
                        let queue = channel.strip_prefix(channels).and_then(|rest| rest.strip_prefix(mark(topic)));
                        if let Some(queue) = queue {
                            ear.tell_message(topic, queue.as_bytes(), message.get_payload_bytes());
                        }
                    }
                }
                Ok(None) => return,
                Err(_) => {
                    let is_there = matches!(timeout(patience, sink.ping::<Value>()).await, Ok(Ok(_)));
                    if !is_there {
                        return;
                    }
                }
            }
        }
    }
}

/// What tells the channels of a topic, as `finish.lua` names them.
fn mark(topic: Topic) -> &'static str {
    match topic {
        Topic::Events => "feed:",
        Topic::Deaths => "dead:",
    }
}
