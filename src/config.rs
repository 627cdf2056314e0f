//! The checked configuration: a TOML file, `GOFLOW_...` variables over it, flags over both.
//!
//! Every setting is a field of [`Config`] or of one of its sections and has its default in that section's `Default`. From
//! there comes all else: the TOML key `[limits] payload_bytes_max` is the setting `limits.payload_bytes_max` and the
//! variable `GOFLOW_LIMITS_PAYLOAD_BYTES_MAX`. To add a setting, add the field; to add a section, add a struct that is
//! `#[serde(default, deny_unknown_fields)]` and a field for it. Lists of tables have a variable only where [`LISTS`] says so.
//!
//! What is unknown or wrong is refused with its place named: line and column of the file, the variable, or the flag.
//! [`Config::load`] checks everything that can be checked without a socket, and reads the secrets that files hold.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize, Serializer};
use toml::{Table, Value};

use crate::alert::Alerts;
use crate::clock::Millis;
use crate::command::Limits;
use crate::dispatch::bound::Terms;
use crate::dispatch::router::Strategy;
use crate::execute::durable::{Acked, Rule};
use crate::job::{Policy, is_shard_name};
use crate::resp::request::{self, Bounds};
use crate::shard::event::Recording;
use crate::shard::{Retention, Rules};

mod alert;
mod webhook;

pub use alert::{AlertConfig, SinkConfig};
pub use webhook::WebhookConfig;

/// The variables of lists: their name and the setting that they replace as a whole.
const LISTS: [(&str, &str); 2] = [("GOFLOW_SHARDS", "shard"), ("GOFLOW_AUTH_USER_FILES", "auth.user")];
/// Names the file where no `--config` does.
const FILE_VARIABLE: &str = "GOFLOW_CONFIG";
/// Threads where the configuration leaves the number open: as many as cores, at most this.
const THREADS_AUTO_MAX: usize = 16;
/// Most partitions of a Redis Cluster.
const PARTITIONS_MAX: u16 = 1_024;

/// Everything that can be configured.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where Redis clients connect.
    #[serde(deserialize_with = "socket_address")]
    pub listen: SocketAddr,
    /// Where metrics and health are served, or `off`.
    pub http: HttpListen,
    /// Runtime threads; 0 is one for each core, at most 16.
    #[serde(deserialize_with = "within::<_, _, 0, 256>")]
    pub threads: usize,
    #[serde(with = "strategy")]
    pub strategy: Strategy,
    /// Shards are stamped with it and serve no other deployment.
    #[serde(deserialize_with = "plain_name")]
    pub deployment: String,
    /// To be raised with every change of the shards: a proxy with an older map is refused.
    #[serde(deserialize_with = "within::<_, _, 1, 9_007_199_254_740_991>")]
    pub map_version: u64,
    pub log: LogConfig,
    pub limits: LimitsConfig,
    pub queue: QueueConfig,
    pub events: EventsConfig,
    pub timeouts: TimeoutsConfig,
    pub worker: WorkerConfig,
    pub auth: AuthConfig,
    pub forward: ForwardConfig,
    pub list: Vec<ListConfig>,
    pub webhook: Vec<WebhookConfig>,
    pub sink: Vec<SinkConfig>,
    pub alert: Vec<AlertConfig>,
    /// Never empty once loaded.
    pub shard: Vec<ShardConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 6380)),
            http: HttpListen(Some(SocketAddr::from(([127, 0, 0, 1], 8380)))),
            threads: 0,
            strategy: Strategy::Hash,
            deployment: "goflow".into(),
            map_version: 1,
            log: LogConfig::default(),
            limits: LimitsConfig::default(),
            queue: QueueConfig::default(),
            events: EventsConfig::default(),
            timeouts: TimeoutsConfig::default(),
            worker: WorkerConfig::default(),
            auth: AuthConfig::default(),
            forward: ForwardConfig::default(),
            list: Vec::new(),
            webhook: Vec::new(),
            sink: Vec::new(),
            alert: Vec::new(),
            shard: Vec::new(),
        }
    }
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// `error`, `warn`, `info`, `debug`, `trace` or `off`, and by module: `info,goflow::dispatch=debug`.
    #[serde(deserialize_with = "log_level")]
    pub level: String,
    pub format: LogFormat,
    /// Commands that take longer are named in the log, waits apart; 0 is none.
    #[serde(deserialize_with = "within::<_, _, 0, 3_600_000>")]
    pub slow_ms: Millis,
}

impl LogConfig {
    pub fn slow(&self) -> Duration {
        match self.slow_ms {
            0 => Duration::MAX,
            ms => Duration::from_millis(ms),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig { level: "info".into(), format: LogFormat::Text, slow_ms: 200 }
    }
}

/// `[forward]`: ordinary commands.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ForwardConfig {
    /// Commands that pass although they are refused otherwise, with blanks between; each goes to every shard.
    pub allow: String,
    /// Patterns of keys that live together on one shard, as if they had one `{tag}`: groups with commas between, patterns
    /// of a group with blanks. The same on all proxies.
    pub together: String,
}

impl ForwardConfig {
    pub fn groups(&self) -> Vec<Vec<String>> {
        let groups = self.together.split(',').map(|group| group.split_ascii_whitespace().map(str::to_owned).collect());
        groups.filter(|group: &Vec<String>| !group.is_empty()).collect()
    }

    pub fn allowed(&self) -> Vec<String> {
        self.allow.split_ascii_whitespace().map(str::to_ascii_uppercase).collect()
    }
}

/// `[[list]]`: lists that are queues.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ListConfig {
    /// A pattern as `KEYS` takes it.
    pub pattern: String,
    /// When an element that was popped is done with.
    #[serde(default)]
    pub ack: ListAck,
    /// How long an element may be worked on, should its proxy die; with `ack = "lease"` also when it is acked.
    #[serde(default = "ten_minutes", deserialize_with = "within::<_, _, 1, 604_800_000>")]
    pub lease_ms: Millis,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ListAck {
    /// With the next command of the connection.
    #[default]
    Next,
    /// When the reply is written.
    Now,
    /// When its connection has lived for `lease_ms` since.
    Lease,
}

fn ten_minutes() -> Millis {
    600_000
}

impl ListConfig {
    pub fn rule(&self) -> Rule {
        let acked = match self.ack {
            ListAck::Next => Acked::Next,
            ListAck::Now => Acked::Now,
            ListAck::Lease => Acked::Lease,
        };
        Rule { pattern: self.pattern.clone(), acked, lease_ms: self.lease_ms }
    }
}

/// `[limits]`: what a client may ask for, and what a process holds in memory.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    #[serde(deserialize_with = "within::<_, _, 1, 536_870_912>")]
    pub payload_bytes_max: usize,
    /// Most jobs in one ENQUEUEMANY, DEQUEUE COUNT or ACK.
    #[serde(deserialize_with = "within::<_, _, 1, 100_000>")]
    pub batch_jobs_max: usize,
    #[serde(deserialize_with = "within::<_, _, 1, 604_800_000>")]
    pub lease_ms_max: Millis,
    #[serde(deserialize_with = "within::<_, _, 1, 86_400_000>")]
    pub block_ms_max: Millis,
    #[serde(deserialize_with = "within::<_, _, 1, 1_000_000>")]
    pub connections_max: usize,
    /// Replies that wait for one client to read them; beyond it the client is dropped. One reply that is larger is an error.
    #[serde(deserialize_with = "within::<_, _, 65_536, 4_294_967_296>")]
    pub output_bytes_max: usize,
    #[serde(deserialize_with = "within::<_, _, 16, 1_048_576>")]
    pub request_words_max: usize,
    #[serde(deserialize_with = "within::<_, _, 16_384, 536_870_912>")]
    pub request_word_bytes_max: usize,
    #[serde(deserialize_with = "within::<_, _, 131_072, 1_073_741_824>")]
    pub request_bytes_max: usize,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        let limits = Limits::default();
        LimitsConfig {
            payload_bytes_max: limits.payload_bytes_max,
            batch_jobs_max: limits.batch_jobs_max,
            lease_ms_max: limits.lease_ms_max,
            block_ms_max: limits.block_ms_max,
            connections_max: 20_000,
            output_bytes_max: 64 << 20,
            request_words_max: request::WORDS_MAX,
            request_word_bytes_max: request::WORD_BYTES_MAX,
            request_bytes_max: request::REQUEST_BYTES_MAX,
        }
    }
}

/// `[queue]`: what holds for a job where its ENQUEUE or DEQUEUE says nothing, and how long jobs that are over are kept.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct QueueConfig {
    #[serde(deserialize_with = "within::<_, _, 1, 604_800_000>")]
    pub lease_ms: Millis,
    #[serde(deserialize_with = "within::<_, _, 1, 1_000_000>")]
    pub attempts: u32,
    #[serde(deserialize_with = "within::<_, _, 0, 31_536_000_000>")]
    pub backoff_ms: Millis,
    #[serde(deserialize_with = "within::<_, _, 0, 31_536_000_000>")]
    pub backoff_max_ms: Millis,
    #[serde(deserialize_with = "within::<_, _, 1, 1_000_000>")]
    pub lapses_max: u32,
    #[serde(deserialize_with = "within::<_, _, 0, 31_536_000_000>")]
    pub retention_ms: Millis,
    /// Per queue and shard.
    #[serde(deserialize_with = "within::<_, _, 0, 100_000_000>")]
    pub retention_jobs: u64,
}

impl Default for QueueConfig {
    fn default() -> Self {
        let (policy, rules) = (Policy::default(), Rules::default());
        QueueConfig {
            lease_ms: Limits::default().lease_ms,
            attempts: policy.attempts,
            backoff_ms: policy.backoff,
            backoff_max_ms: policy.backoff_max,
            lapses_max: rules.lapses_max,
            retention_ms: rules.retention.age_ms,
            retention_jobs: rules.retention.jobs,
        }
    }
}

/// `[events]`: what is recorded of jobs, and for how long.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct EventsConfig {
    /// Without it GOFLOW.EVENTS and `goflow:events:*` have nothing to say.
    pub record: bool,
    /// How long a history outlives its job, and an event its moment.
    #[serde(deserialize_with = "within::<_, _, 1, 31_536_000_000>")]
    pub age_ms: Millis,
    /// Histories of jobs that are not kept any more, per queue and shard.
    #[serde(deserialize_with = "within::<_, _, 0, 100_000_000>")]
    pub histories: u64,
    /// Events in the journal that GOFLOW.EVENTS READ and RECENT tell, per queue and shard.
    #[serde(deserialize_with = "within::<_, _, 1, 100_000_000>")]
    pub journal: u64,
}

impl Default for EventsConfig {
    fn default() -> Self {
        let Recording { age_ms, histories, journal } = Recording::default();
        EventsConfig { record: true, age_ms, histories, journal }
    }
}

impl EventsConfig {
    fn recording(&self) -> Option<Recording> {
        let EventsConfig { record, age_ms, histories, journal } = *self;
        record.then_some(Recording { age_ms, histories, journal })
    }
}

/// `[timeouts]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct TimeoutsConfig {
    /// For a connection to a shard to stand.
    #[serde(deserialize_with = "within::<_, _, 1, 600_000>")]
    pub connect_ms: Millis,
    /// For a shard to answer; after it the outcome of a write is unknown.
    #[serde(deserialize_with = "within::<_, _, 1, 600_000>")]
    pub answer_ms: Millis,
    /// From SIGTERM to the end of the process.
    #[serde(deserialize_with = "within::<_, _, 0, 3_600_000>")]
    pub drain_ms: Millis,
    /// Silence after which TCP asks whether the peer is alive; 0 never. A swarm's mesh forgets a connection after 900 s.
    #[serde(deserialize_with = "within::<_, _, 0, 7_200_000>")]
    pub keepalive_ms: Millis,
}

impl Default for TimeoutsConfig {
    fn default() -> Self {
        TimeoutsConfig { connect_ms: 5_000, answer_ms: 10_000, drain_ms: 25_000, keepalive_ms: 60_000 }
    }
}

impl TimeoutsConfig {
    pub fn connect(&self) -> Duration {
        Duration::from_millis(self.connect_ms)
    }

    pub fn answer(&self) -> Duration {
        Duration::from_millis(self.answer_ms)
    }

    pub fn drain(&self) -> Duration {
        Duration::from_millis(self.drain_ms)
    }

    pub fn keepalive(&self) -> Option<Duration> {
        (self.keepalive_ms > 0).then(|| Duration::from_millis(self.keepalive_ms))
    }
}

/// `[worker]`: the sessions of workers that bind their jobs.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerConfig {
    /// How long a session outlives a proxy that dies. Its end is moved three times as often.
    #[serde(deserialize_with = "within::<_, _, 500, 600_000>")]
    pub keep_ms: Millis,
    /// How long a session with a name outlives its last connection.
    #[serde(deserialize_with = "within::<_, _, 0, 600_000>")]
    pub grace_ms: Millis,
    /// How long a bound job may run, where its DEQUEUE does not say.
    #[serde(deserialize_with = "within::<_, _, 1, 604_800_000>")]
    pub run_ms: Millis,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        let Terms { keep_ms, grace_ms } = Terms::default();
        WorkerConfig { keep_ms, grace_ms, run_ms: Limits::default().run_ms }
    }
}

impl WorkerConfig {
    pub fn terms(&self) -> Terms {
        Terms { keep_ms: self.keep_ms, grace_ms: self.grace_ms }
    }
}

/// `[auth]`: who may connect; nobody named, everybody may.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthConfig {
    /// The password of the user `default`, or the file that holds it.
    pub password: Secret,
    pub password_file: PathBuf,
    /// `[[auth.user]]`; once loaded the user `default` is among them if it has a password, and no file is left to read.
    pub user: Vec<UserConfig>,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct UserConfig {
    pub name: String,
    #[serde(default)]
    pub password: Secret,
    #[serde(default)]
    pub password_file: PathBuf,
}

/// `[[shard]]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ShardConfig {
    #[serde(deserialize_with = "shard_name")]
    pub name: String,
    pub url: ShardUrl,
    /// Its part of the jobs under `hash`, relative to the others'.
    #[serde(default = "one", deserialize_with = "within::<_, _, 1, 1_000>")]
    pub weight: u32,
    /// A file that holds the password, in place of one in the URL.
    #[serde(default)]
    pub password_file: PathBuf,
}

fn one() -> u32 {
    1
}

/// A text that is never shown.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    /// The text itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_empty() { "none" } else { "hidden" })
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(if self.is_empty() { "" } else { "hidden" })
    }
}

/// An address, or nothing: `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HttpListen(pub Option<SocketAddr>);

impl<'de> Deserialize<'de> for HttpListen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.eq_ignore_ascii_case("off") {
            return Ok(HttpListen(None));
        }
        let address = text.parse();
        address.map(|address| HttpListen(Some(address))).map_err(|_| {
            de::Error::custom(format!("'{text}' is no address: expected ADDR:PORT such as 127.0.0.1:8380, or off"))
        })
    }
}

impl Serialize for HttpListen {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Some(address) => serializer.collect_str(&address),
            None => serializer.serialize_str("off"),
        }
    }
}

/// One server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Host {
    pub host: String,
    pub port: u16,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// What a Redis URL says beside where the servers are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Login {
    pub user: Option<String>,
    pub password: Option<Secret>,
    pub tls: bool,
    pub database: u32,
}

/// Where a shard keeps its jobs.
#[derive(Clone, Debug, PartialEq)]
pub enum ShardUrl {
    /// `embedded:DIR`
    Embedded { dir: PathBuf },
    /// `memory:`
    Memory,
    /// `redis://[user[:password]@]host[:port][/database]`, `rediss://` with TLS.
    Redis { host: Host, login: Login },
    /// `redis+sentinel://[user[:password]@]host[:port],.../service[/database]`
    Sentinel { sentinels: Vec<Host>, service: String, login: Login },
    /// `redis+cluster://[user[:password]@]host[:port],...[?partitions=n]`: many shards on one cluster.
    Cluster { nodes: Vec<Host>, partitions: u16, login: Login },
}

impl ShardUrl {
    pub fn parse(text: &str) -> Result<ShardUrl, String> {
        if text == "memory:" {
            return Ok(ShardUrl::Memory);
        }
        if let Some(dir) = text.strip_prefix("embedded:") {
            return match dir {
                "" => Err("embedded: lacks its directory: expected embedded:DIR".into()),
                dir => Ok(ShardUrl::Embedded { dir: dir.into() }),
            };
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(format!("unknown shard URL: expected {EXPECTED_URLS}"));
        };
        let parts = UrlParts::split(rest)?;
        match scheme {
            "redis" | "rediss" => parts.into_redis(scheme == "rediss"),
            "redis+sentinel" | "rediss+sentinel" => parts.into_sentinel(scheme == "rediss+sentinel"),
            "redis+cluster" | "rediss+cluster" => parts.into_cluster(scheme == "rediss+cluster"),
            _ => Err(format!("unknown scheme of a shard URL: expected {EXPECTED_URLS}")),
        }
    }

    pub fn login(&self) -> Option<&Login> {
        match self {
            ShardUrl::Embedded { .. } | ShardUrl::Memory => None,
            ShardUrl::Redis { login, .. } | ShardUrl::Sentinel { login, .. } | ShardUrl::Cluster { login, .. } => {
                Some(login)
            }
        }
    }

    fn login_mut(&mut self) -> Option<&mut Login> {
        match self {
            ShardUrl::Embedded { .. } | ShardUrl::Memory => None,
            ShardUrl::Redis { login, .. } | ShardUrl::Sentinel { login, .. } | ShardUrl::Cluster { login, .. } => {
                Some(login)
            }
        }
    }

    /// The same place, entered as at the other.
    pub fn with_login_of(mut self, other: &ShardUrl) -> ShardUrl {
        if let (Some(own), Some(login)) = (self.login_mut(), other.login()) {
            *own = login.clone();
        }
        self
    }

    /// How many shards it stands for.
    pub fn partitions(&self) -> u16 {
        match self {
            ShardUrl::Cluster { partitions, .. } => *partitions,
            _ => 1,
        }
    }
}

const EXPECTED_URLS: &str = "embedded:DIR, memory:, redis://HOST:PORT, rediss://HOST:PORT, \
     redis+sentinel://HOST:PORT,HOST:PORT/SERVICE or redis+cluster://HOST:PORT,HOST:PORT?partitions=N";

/// The URL without its password.
impl ShardUrl {
    /// The URL with its user and password, percent-encoded, for whoever connects; [`fmt::Display`] leaves them out.
    pub fn with_login(&self) -> String {
        let shown = self.to_string();
        let encode = |text: &str| -> String {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
            text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
        };
        let user = self.login().and_then(|login| login.user.as_deref()).unwrap_or_default();
        match (shown.split_once("://"), self.login().and_then(|login| login.password.as_ref())) {
            (Some((scheme, rest)), Some(password)) => {
                format!("{scheme}://{}:{}@{rest}", encode(user), encode(password.reveal()))
            }
            _ => shown,
        }
    }
}

impl fmt::Display for ShardUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |hosts: &[Host]| hosts.iter().map(Host::to_string).collect::<Vec<_>>().join(",");
        let tls = if self.login().is_some_and(|login| login.tls) { "s" } else { "" };
        let database = match self.login() {
            Some(Login { database, .. }) if *database > 0 => format!("/{database}"),
            _ => String::new(),
        };
        match self {
            ShardUrl::Embedded { dir } => write!(f, "embedded:{}", dir.display()),
            ShardUrl::Memory => f.write_str("memory:"),
            ShardUrl::Redis { host, .. } => write!(f, "redis{tls}://{host}{database}"),
            ShardUrl::Sentinel { sentinels, service, .. } => {
                write!(f, "redis{tls}+sentinel://{}/{service}{database}", list(sentinels))
            }
            ShardUrl::Cluster { nodes, partitions, .. } => {
                write!(f, "redis{tls}+cluster://{}?partitions={partitions}", list(nodes))
            }
        }
    }
}

impl<'de> Deserialize<'de> for ShardUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        ShardUrl::parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

impl Serialize for ShardUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What follows `://`. Error texts do not repeat it: it may hold a password.
struct UrlParts<'a> {
    login: Login,
    hosts: &'a str,
    path: Vec<&'a str>,
    query: Vec<(&'a str, &'a str)>,
}

impl<'a> UrlParts<'a> {
    fn split(rest: &'a str) -> Result<UrlParts<'a>, String> {
        // A password may hold what else divides a URL, but hosts, path and options hold no '@'.
        let (user, rest) = rest.rsplit_once('@').map_or((None, rest), |(user, rest)| (Some(user), rest));
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (hosts, path) = rest.split_once('/').unwrap_or((rest, ""));
        let mut login = Login::default();
        if let Some(user) = user {
            let (user, password) = user.split_once(':').map_or((user, None), |(user, word)| (user, Some(word)));
            login.user = (!user.is_empty()).then(|| percent_decode(user)).transpose()?;
            login.password = password.map(percent_decode).transpose()?.map(Secret);
        }
        let query = query.split('&').filter(|pair| !pair.is_empty());
        Ok(UrlParts {
            login,
            hosts,
            path: path.split('/').filter(|part| !part.is_empty()).collect(),
            query: query.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).collect(),
        })
    }

    fn hosts(&self, port: u16) -> Result<Vec<Host>, String> {
        self.hosts.split(',').map(|host| parse_host(host, port)).collect()
    }

    fn no_query(&self) -> Result<(), String> {
        match self.query.is_empty() {
            true => Ok(()),
            false => Err("unknown option in the shard URL: expected none".into()),
        }
    }

    fn into_redis(mut self, tls: bool) -> Result<ShardUrl, String> {
        self.no_query()?;
        self.login.tls = tls;
        self.login.database = parse_database(&self.path)?;
        match <[Host; 1]>::try_from(self.hosts(6379)?) {
            Ok([host]) => Ok(ShardUrl::Redis { host, login: self.login }),
            Err(_) => {
                Err("more than one host: expected redis://HOST:PORT, redis+sentinel:// or redis+cluster://".into())
            }
        }
    }

    fn into_sentinel(mut self, tls: bool) -> Result<ShardUrl, String> {
        self.no_query()?;
        let [service, database @ ..] = &self.path[..] else {
            return Err("the service is missing: expected redis+sentinel://HOST:PORT,HOST:PORT/SERVICE".into());
        };
        self.login.tls = tls;
        self.login.database = parse_database(database)?;
        Ok(ShardUrl::Sentinel { sentinels: self.hosts(26379)?, service: percent_decode(service)?, login: self.login })
    }

    fn into_cluster(mut self, tls: bool) -> Result<ShardUrl, String> {
        self.login.tls = tls;
        if !self.path.is_empty() {
            return Err("a cluster has no databases: expected redis+cluster://HOST:PORT,HOST:PORT?partitions=N".into());
        }
        let mut partitions = 16;
        for (option, value) in &self.query {
            if *option != "partitions" {
                return Err("unknown option in the shard URL: expected partitions".into());
            }
            let number = value.parse().ok().filter(|number| (1..=PARTITIONS_MAX).contains(number));
            partitions =
                number.ok_or_else(|| format!("bad partitions in the shard URL: expected 1 to {PARTITIONS_MAX}"))?;
        }
        Ok(ShardUrl::Cluster { nodes: self.hosts(6379)?, partitions, login: self.login })
    }
}

fn parse_host(text: &str, port_default: u16) -> Result<Host, String> {
    let bad = || "bad host in the shard URL: expected HOST or HOST:PORT".to_string();
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or_else(bad)?;
            (host, port.strip_prefix(':').or(port.is_empty().then_some("")).ok_or_else(bad)?)
        }
        None => text.split_once(':').unwrap_or((text, "")),
    };
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:".contains(&byte);
    if host.is_empty() || !host.bytes().all(allowed) {
        return Err(bad());
    }
    let port = match port {
        "" => port_default,
        port => port.parse().ok().filter(|port| *port > 0).ok_or_else(bad)?,
    };
    Ok(Host { host: host.into(), port })
}

fn parse_database(path: &[&str]) -> Result<u32, String> {
    match path {
        [] => Ok(0),
        [number] => number.parse().map_err(|_| "bad database in the shard URL: expected a number".into()),
        _ => Err("the path of the shard URL is too long: expected /DATABASE at its end".into()),
    }
}

fn percent_decode(text: &str) -> Result<String, String> {
    let bad = || "bad percent sign in the shard URL: expected %XX".to_string();
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        if *first != b'%' {
            bytes.push(*first);
            rest = tail;
            continue;
        }
        let digits = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok()).ok_or_else(bad)?;
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| bad())?);
        rest = &tail[2..];
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

/// Why a configuration is refused; names the place.
#[derive(Debug, PartialEq, Eq)]
pub struct ConfigError(String);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

/// One setting that a flag makes: the flag as it is written, the setting, and the value in words.
pub struct Override<'a> {
    pub flag: &'static str,
    pub setting: &'static str,
    pub value: &'a str,
}

impl Config {
    /// Loads the file (that of `GOFLOW_CONFIG` where `file` is `None`), the variables over it, the overrides over both.
    pub fn load(
        file: Option<&Path>,
        variables: impl IntoIterator<Item = (String, String)>,
        overrides: &[Override<'_>],
    ) -> Result<Config, ConfigError> {
        let (mut variables, others): (Vec<_>, Vec<_>) =
            variables.into_iter().partition(|(name, _)| name.starts_with("GOFLOW_"));
        variables.retain(|(name, _)| !is_kubernetes_link(name));
        variables.sort();
        let named = variables.iter().find(|(name, _)| name == FILE_VARIABLE).map(|(_, path)| PathBuf::from(path));
        let mut table = match file.map(Path::to_path_buf).or(named) {
            Some(path) => read_file(&path)?,
            None => Table::new(),
        };
        let settings = settings();
        for (name, value) in variables.iter().filter(|(name, _)| name != FILE_VARIABLE) {
            let setting = settings.iter().find(|setting| setting.variable == *name);
            let setting = setting.ok_or_else(|| ConfigError(format!("{name}: there is no such setting")))?;
            put(&mut table, name, setting, value)?;
        }
        // A repeated flag makes one list.
        let shards: Vec<&str> = overrides.iter().filter(|o| o.setting == "shard").map(|o| o.value).collect();
        for Override { flag, setting, value } in overrides {
            let setting = settings.iter().find(|known| known.path == *setting);
            let setting = setting.ok_or_else(|| ConfigError(format!("{flag}: there is no such setting")))?;
            match setting.path.as_str() {
                "shard" => put(&mut table, flag, setting, &shards.join(","))?,
                _ => put(&mut table, flag, setting, value)?,
            }
        }
        let mut config = Config::deserialize(table).map_err(|error| ConfigError(told(&error)))?;
        webhook::read_secrets(&mut config.webhook, &others)?;
        config.checked(&others.into_iter().collect())
    }

    /// What can only be said of the whole; reads the files of secrets.
    fn checked(mut self, environment: &HashMap<String, String>) -> Result<Config, ConfigError> {
        if self.shard.is_empty() {
            let url = ShardUrl::Embedded { dir: "./goflow-data".into() };
            self.shard.push(ShardConfig { name: "s1".into(), url, weight: 1, password_file: PathBuf::new() });
        }
        self.check_shards()?;
        self.check_users()?;
        self.hooks()?;
        alert::check(&mut self.sink, &self.alert, environment)?;
        let (limits, queue) = (&self.limits, &self.queue);
        let pairs = [
            ("queue.lease_ms", queue.lease_ms, "limits.lease_ms_max", limits.lease_ms_max),
            ("worker.run_ms", self.worker.run_ms, "limits.lease_ms_max", limits.lease_ms_max),
            ("queue.backoff_ms", queue.backoff_ms, "queue.backoff_max_ms", queue.backoff_max_ms),
            (
                "limits.payload_bytes_max",
                limits.payload_bytes_max as u64,
                "limits.request_word_bytes_max",
                limits.request_word_bytes_max as u64,
            ),
            (
                "limits.request_word_bytes_max",
                limits.request_word_bytes_max as u64,
                "limits.request_bytes_max",
                limits.request_bytes_max as u64,
            ),
        ];
        match pairs.iter().find(|(_, less, _, more)| less > more) {
            Some((less, a, more, b)) => {
                Err(ConfigError(format!("{less} is {a}: expected at most {more}, which is {b}")))
            }
            None => Ok(self),
        }
    }

    fn check_shards(&mut self) -> Result<(), ConfigError> {
        let (mut names, mut places) = (HashSet::new(), HashSet::new());
        for shard in &mut self.shard {
            let name = &shard.name;
            if !names.insert(name.clone()) {
                return Err(ConfigError(format!("shard {name}: two shards have this name")));
            }
            // Nothing else tells two of these apart, and nothing need.
            if shard.url != ShardUrl::Memory && !places.insert(shard.url.to_string()) {
                return Err(ConfigError(format!("shard {name}: another shard has the same URL, {}", shard.url)));
            }
            let partition = format!("{name}/{}", shard.url.partitions());
            if shard.url.partitions() > 1 && !is_shard_name(&partition) {
                return Err(ConfigError(format!("shard {name}: the name of a cluster has at most 43 bytes")));
            }
            if shard.password_file != Path::new("") {
                let secret = read_secret(&format!("shard {name}: password_file"), &shard.password_file)?;
                let login = shard.url.login_mut();
                let login = login.ok_or_else(|| ConfigError(format!("shard {name}: its URL takes no password")))?;
                login.password = Some(secret);
                shard.password_file = PathBuf::new();
            }
        }
        Ok(())
    }

    fn check_users(&mut self) -> Result<(), ConfigError> {
        let auth = &mut self.auth;
        let (password, password_file) = (std::mem::take(&mut auth.password), std::mem::take(&mut auth.password_file));
        if !password.is_empty() || password_file != Path::new("") {
            auth.user.insert(0, UserConfig { name: "default".into(), password, password_file });
        }
        let mut names = HashSet::new();
        for user in &mut auth.user {
            let name = &user.name;
            if name.is_empty() || !names.insert(name.clone()) {
                return Err(ConfigError(format!("auth: user '{name}' has no name or the name of another")));
            }
            if user.password_file != Path::new("") {
                if !user.password.is_empty() {
                    return Err(ConfigError(format!("auth: user '{name}' has both a password and a password_file")));
                }
                user.password = read_secret(&format!("auth: user '{name}': password_file"), &user.password_file)?;
                user.password_file = PathBuf::new();
            }
            if user.password.is_empty() {
                return Err(ConfigError(format!(
                    "auth: user '{name}' has no password: expected password or password_file"
                )));
            }
        }
        Ok(())
    }

    /// Runtime threads to start.
    pub fn threads(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_AUTO_MAX),
            threads => threads,
        }
    }

    /// What plan functions may know.
    pub fn command_limits(&self) -> Limits {
        Limits {
            payload_bytes_max: self.limits.payload_bytes_max,
            lease_ms: self.queue.lease_ms,
            lease_ms_max: self.limits.lease_ms_max,
            run_ms: self.worker.run_ms,
            batch_jobs_max: self.limits.batch_jobs_max,
            block_ms_max: self.limits.block_ms_max,
            policy: Arc::new(Policy {
                attempts: self.queue.attempts,
                backoff: self.queue.backoff_ms,
                backoff_max: self.queue.backoff_max_ms,
                ..Policy::default()
            }),
        }
    }

    /// Who may connect: names and passwords.
    pub fn users(&self) -> Vec<(String, String)> {
        self.auth.user.iter().map(|user| (user.name.clone(), user.password.reveal().to_owned())).collect()
    }

    /// The settings as `CONFIG GET` shows them, by their path in the file, without secrets.
    pub fn shown(&self) -> Vec<(String, String)> {
        let mut shown = Vec::new();
        let mut tables = vec![(String::new(), Table::try_from(self.clone()).unwrap_or_default())];
        while let Some((prefix, table)) = tables.pop() {
            for (key, value) in table {
                match value {
                    Value::Table(table) => tables.push((format!("{prefix}{key}."), table)),
                    // Shards have GOFLOW.SHARDS, and users are nobody's business.
                    Value::Array(_) => {}
                    Value::String(text) => shown.push((format!("{prefix}{key}"), text)),
                    value => shown.push((format!("{prefix}{key}"), value.to_string())),
                }
            }
        }
        shown.sort();
        shown
    }

    /// The alert rules and their sinks.
    pub fn alerts(&self) -> Result<Alerts, ConfigError> {
        alert::alerts(&self.sink, &self.alert)
    }

    /// What shards go by.
    pub fn rules(&self) -> Rules {
        Rules {
            retention: Retention { age_ms: self.queue.retention_ms, jobs: self.queue.retention_jobs },
            lapses_max: self.queue.lapses_max,
            recording: self.events.recording(),
        }
    }

    /// What a request may have once its client has authenticated.
    pub fn bounds(&self) -> Bounds {
        Bounds {
            words_max: self.limits.request_words_max,
            word_bytes_max: self.limits.request_word_bytes_max,
            request_bytes_max: self.limits.request_bytes_max,
            authenticated: true,
        }
    }

    /// The shard map in one line, for [`crate::shard::Stamp`]: what decides where a job goes, and not how it gets there, so
    /// that proxies may reach one shard under different addresses.
    pub fn shard_map_line(&self) -> String {
        let mut shards: Vec<String> = self
            .shard
            .iter()
            .map(|shard| match shard.url.partitions() {
                1 => format!("{}*{}", shard.name, shard.weight),
                partitions => format!("{}/{partitions}*{}", shard.name, shard.weight),
            })
            .collect();
        shards.sort();
        shards.join(" ")
    }
}

/// A setting that has a variable: its path, and its default, which says what kind of value it takes.
struct Setting {
    path: String,
    variable: String,
    default: Value,
}

/// Every setting, as the defaults of [`Config`] have them.
fn settings() -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut tables = vec![(String::new(), Table::try_from(Config::default()).unwrap_or_default())];
    while let Some((prefix, table)) = tables.pop() {
        for (key, default) in table {
            let path = format!("{prefix}{key}");
            match default {
                Value::Table(table) => tables.push((format!("{path}."), table)),
                Value::Array(_) => {
                    if let Some((variable, _)) = LISTS.iter().find(|(_, list)| *list == path) {
                        settings.push(Setting { variable: variable.to_string(), path, default });
                    }
                }
                default => {
                    let variable = format!("GOFLOW_{}", path.replace('.', "_").to_ascii_uppercase());
                    settings.push(Setting { path, variable, default });
                }
            }
        }
    }
    settings
}

/// Sets one setting from words. `origin` is the variable or flag that gave it.
fn put(table: &mut Table, origin: &str, setting: &Setting, text: &str) -> Result<(), ConfigError> {
    let wrong = |why: &dyn fmt::Display| ConfigError(format!("{origin}: {why}"));
    let number = || text.replace('_', "");
    let value = match &setting.default {
        Value::Integer(_) => {
            number().parse().map(Value::Integer).map_err(|_| wrong(&format!("'{text}': expected a whole number")))?
        }
        Value::Float(_) => {
            number().parse().map(Value::Float).map_err(|_| wrong(&format!("'{text}': expected a number")))?
        }
        Value::Boolean(_) => {
            text.parse().map(Value::Boolean).map_err(|_| wrong(&format!("'{text}': expected true or false")))?
        }
        Value::Array(_) if setting.path == "shard" => shards_of(text).map_err(|why| wrong(&why))?,
        Value::Array(_) => user_files_of(text).map_err(|why| wrong(&why))?,
        _ => Value::String(text.into()),
    };
    // Tried alone first, so that what is wrong with the value is said of this variable or flag.
    let mut alone = Table::new();
    put_at(&mut alone, &setting.path, value.clone());
    Config::deserialize(alone).map_err(|error| wrong(&told(&error)))?;
    put_at(table, &setting.path, value);
    Ok(())
}

fn put_at(table: &mut Table, path: &str, value: Value) {
    match path.split_once('.') {
        None => {
            table.insert(path.into(), value);
        }
        Some((section, rest)) => {
            let section = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(section) = section {
                put_at(section, rest, value);
            }
        }
    }
}

/// `NAME=URL,NAME*WEIGHT=URL,...`. A comma divides only where `NAME=` follows: URLs of Sentinel and Cluster hold commas.
fn shards_of(text: &str) -> Result<Value, String> {
    let mut shards: Vec<(&str, String)> = Vec::new();
    for part in text.split(',') {
        let named = part.split_once('=').filter(|(name, _)| {
            let (name, weight) = name.trim().split_once('*').unwrap_or((name.trim(), "1"));
            is_shard_name(name) && weight.bytes().all(|byte| byte.is_ascii_digit())
        });
        match (named, shards.last_mut()) {
            (Some((name, url)), _) => shards.push((name.trim(), url.trim().into())),
            (None, Some((_, url))) => {
                url.push(',');
                url.push_str(part.trim());
            }
            (None, None) => return Err("expected NAME=URL or NAME*WEIGHT=URL, NAME of A-Z a-z 0-9 . _ / -".into()),
        }
    }
    let tables = shards.into_iter().map(|(name, url)| {
        let (name, weight) = name.split_once('*').unwrap_or((name, "1"));
        let weight = weight.parse().map_err(|_| format!("weight '{weight}': expected 1 to 1000"))?;
        Ok(Value::Table(Table::from_iter([
            ("name".to_string(), Value::from(name)),
            ("url".to_string(), Value::from(url)),
            ("weight".to_string(), Value::Integer(weight)),
        ])))
    });
    tables.collect::<Result<_, String>>().map(Value::Array)
}

/// `NAME=FILE,...`
fn user_files_of(text: &str) -> Result<Value, String> {
    let users = text.split(',').map(|part| {
        let (name, file) = part.split_once('=').ok_or("expected NAME=FILE,NAME=FILE")?;
        Ok(Value::Table(Table::from_iter([
            ("name".to_string(), Value::from(name.trim())),
            ("password_file".to_string(), Value::from(file.trim())),
        ])))
    });
    users.collect::<Result<_, String>>().map(Value::Array)
}

/// Kubernetes tells every pod of the services beside it, in variables that begin with the service's name.
fn is_kubernetes_link(name: &str) -> bool {
    let linked = |mark: &str| {
        name.split_once(mark).is_some_and(|(_, rest)| {
            rest.split('_')
                .next()
                .is_some_and(|port| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()))
        })
    };
    name.ends_with("_SERVICE_HOST") || name.contains("_SERVICE_PORT") || name.ends_with("_PORT") || linked("_PORT_")
}

fn read_file(path: &Path) -> Result<Table, ConfigError> {
    let place = path.display();
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError(format!("{place}: {error}")))?;
    // The place and no more: the error's own text shows the line, which may hold a secret.
    let wrong = |error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let (line, begun) = before.split('\n').zip(1..).last().map_or((1, ""), |(begun, line)| (line, begun));
        ConfigError(format!("{place}: line {line}, column {}: {}", begun.chars().count() + 1, told(&error)))
    };
    // Read as a Config first: only that error knows line and column.
    toml::from_str::<Config>(&text).map_err(wrong)?;
    text.parse().map_err(wrong)
}

/// What is wrong in the words of serde, but of a value of the wrong type only the type: it may be a secret in the wrong place.
fn told(error: &toml::de::Error) -> String {
    let message = error.message();
    match (message.strip_prefix("invalid type: "), message.rsplit_once(", expected ")) {
        (Some(found), Some((_, expected))) => {
            let kind = found.split(['`', '"', ',']).next().unwrap_or_default().trim_end();
            format!("invalid type: {kind}, expected {expected}")
        }
        _ => message.to_owned(),
    }
}

/// A secret is the file's text without the line end that editors leave.
fn read_secret(what: &str, path: &Path) -> Result<Secret, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|error| ConfigError(format!("{what} {}: {error}", path.display())))?;
    let secret = text.trim_end_matches(['\r', '\n']);
    match secret.is_empty() {
        true => Err(ConfigError(format!("{what} {}: the file is empty", path.display()))),
        false => Ok(Secret(secret.into())),
    }
}

fn within<'de, T, D, const MIN: u64, const MAX: u64>(deserializer: D) -> Result<T, D::Error>
where
    T: TryFrom<u64>,
    D: Deserializer<'de>,
{
    let number = i64::deserialize(deserializer)?;
    let fits = u64::try_from(number).ok().filter(|number| (MIN..=MAX).contains(number));
    let fits = fits.and_then(|number| T::try_from(number).ok());
    fits.ok_or_else(|| de::Error::custom(format!("{number} is out of range: expected {MIN} to {MAX}")))
}

fn socket_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    let expected = "expected ADDR:PORT such as 127.0.0.1:6380 or [::]:6380";
    text.parse().map_err(|_| de::Error::custom(format!("'{text}' is no address: {expected}")))
}

fn checked_name<'de, D: Deserializer<'de>>(deserializer: D, what: &str) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    match is_shard_name(&text) {
        true => Ok(text),
        false => Err(de::Error::custom(format!("bad {what} '{text}': expected 1 to 48 bytes of A-Z a-z 0-9 . _ / -"))),
    }
}

fn plain_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    checked_name(deserializer, "name")
}

fn shard_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    checked_name(deserializer, "shard name")
}

fn log_level<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    match text.parse::<tracing_subscriber::filter::Targets>() {
        Ok(_) if !text.is_empty() => Ok(text),
        _ => Err(de::Error::custom(format!(
            "bad level '{text}': expected error, warn, info, debug, trace or off, or info,goflow::dispatch=debug"
        ))),
    }
}

/// A [`Strategy`] by its word.
mod strategy {
    use super::*;

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Strategy, D::Error> {
        let text = String::deserialize(deserializer)?;
        let expected = "expected hash, round-robin or least-loaded";
        Strategy::parse(&text).ok_or_else(|| de::Error::custom(format!("unknown strategy '{text}': {expected}")))
    }

    pub fn serialize<S: Serializer>(strategy: &Strategy, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(strategy.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(file: &str, variables: &[(&str, &str)], flags: &[(&'static str, &str)]) -> Result<Config, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("goflow.toml");
        std::fs::write(&path, file).unwrap();
        let variables = variables.iter().map(|(name, value)| (name.to_string(), value.to_string()));
        let overrides: Vec<Override> =
            flags.iter().map(|(setting, value)| Override { flag: "--flag", setting, value }).collect();
        Config::load(Some(&path), variables, &overrides).map_err(|error| error.to_string())
    }

    #[track_caller]
    fn refused(result: Result<Config, String>, words: &[&str]) {
        let error = result.expect_err("this configuration is wrong");
        for word in words {
            assert!(error.contains(word), "{error:?} does not say {word:?}");
        }
    }

    #[test]
    fn nothing_configured_is_one_embedded_shard() {
        let config = Config::load(None, [], &[]).unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.1:6380");
        assert_eq!(config.shard.len(), 1);
        assert_eq!(config.shard[0].url, ShardUrl::Embedded { dir: "./goflow-data".into() });
        assert_eq!(config.shard_map_line(), "s1*1");
        assert_eq!(config.command_limits().lease_ms, 30_000);
        assert_eq!(config.rules(), Rules::default());
        assert_eq!(config.bounds(), Bounds::default());
        assert!((1..=16).contains(&config.threads()));
    }

    #[test]
    fn flags_go_over_variables_and_these_over_the_file() {
        let file = "threads = 1\nmap_version = 1\ndeployment = 'file'\n[[shard]]\nname = 'a'\nurl = 'memory:'";
        let variables = [("GOFLOW_MAP_VERSION", "2"), ("GOFLOW_DEPLOYMENT", "variable"), ("PATH", "x")];
        let flags = [("deployment", "flag"), ("shard", "b=memory:"), ("shard", "c*3=memory:")];
        let config = load(file, &variables, &flags).unwrap();
        assert_eq!((config.threads, config.map_version, config.deployment.as_str()), (1, 2, "flag"));
        assert_eq!(config.shard_map_line(), "b*1 c*3");
    }

    /// A value other than the default that the setting takes.
    fn other_value(setting: &Setting) -> String {
        match (setting.path.as_str(), &setting.default) {
            ("listen" | "http", _) => "127.0.0.1:7000".into(),
            ("strategy", _) => "least-loaded".into(),
            ("log.format", _) => "json".into(),
            ("log.level", _) => "debug".into(),
            ("shard", _) => "a=memory:".into(),
            ("auth.user", _) => "a=/dev/null".into(),
            ("threads", _) => "3".into(),
            ("queue.backoff_max_ms" | "limits.lease_ms_max", Value::Integer(number)) => (number + 1).to_string(),
            (_, Value::Integer(number)) => (number - 1).max(2).to_string(),
            (_, Value::Boolean(yes)) => (!yes).to_string(),
            (_, _) => "other".into(),
        }
    }

    #[test]
    fn every_setting_has_a_variable_that_sets_it_and_nothing_else() {
        let settings = settings();
        assert!(settings.len() > 25);
        for setting in &settings {
            let mut table = Table::new();
            put(&mut table, &setting.variable, setting, &other_value(setting)).unwrap();
            let config = Table::try_from(Config::deserialize(table).unwrap()).unwrap();
            let mut default = Table::try_from(Config::default()).unwrap();
            assert_ne!(config, default, "{} changes nothing", setting.variable);
            put_at(&mut default, &setting.path, at(&config, &setting.path));
            assert_eq!(config, default, "{} changes more than itself", setting.variable);
        }
        let names: HashSet<&str> = settings.iter().map(|setting| setting.variable.as_str()).collect();
        assert_eq!(names.len(), settings.len());
        for (variable, path) in LISTS {
            assert!(settings.iter().any(|setting| setting.variable == variable && setting.path == path));
        }
        assert!(names.contains("GOFLOW_LIMITS_PAYLOAD_BYTES_MAX") && names.contains("GOFLOW_HTTP"));
    }

    fn at(table: &Table, path: &str) -> Value {
        match path.split_once('.') {
            None => table[path].clone(),
            Some((section, rest)) => at(table[section].as_table().unwrap(), rest),
        }
    }

    #[test]
    fn a_bad_variable_is_named_with_what_was_expected() {
        for setting in settings().iter().filter(|setting| setting.default.is_integer()) {
            let bad = |value: &str| load("", &[(&setting.variable, value)], &[]);
            refused(bad("many"), &[&setting.variable, "expected a whole number"]);
            refused(bad("-1"), &[&setting.variable, "-1", "expected"]);
            refused(bad("9223372036854775807"), &[&setting.variable, "expected"]);
        }
        refused(load("", &[("GOFLOW_LISTEN", "6380")], &[]), &["GOFLOW_LISTEN", "expected ADDR:PORT"]);
        refused(load("", &[("GOFLOW_STRATEGY", "best")], &[]), &["GOFLOW_STRATEGY", "round-robin"]);
        refused(load("", &[("GOFLOW_LOG_FORMAT", "xml")], &[]), &["GOFLOW_LOG_FORMAT", "json"]);
        refused(load("", &[("GOFLOW_LOG_LEVEL", "a=b=c")], &[]), &["GOFLOW_LOG_LEVEL", "expected"]);
        refused(load("", &[("GOFLOW_LISTNE", "x")], &[]), &["GOFLOW_LISTNE", "no such setting"]);
        refused(load("", &[("GOFLOW_SHARDS", "redis://x")], &[]), &["GOFLOW_SHARDS", "NAME=URL"]);
        refused(load("", &[], &[("listen", "x")]), &["--flag", "expected ADDR:PORT"]);
    }

    #[test]
    fn what_is_wrong_in_a_file_is_shown_with_its_line() {
        refused(load("threads = 2\nlistne = 'x'", &[], &[]), &["goflow.toml", "line 2", "listne"]);
        refused(load("[limits]\n\npayload_bytes = 2", &[], &[]), &["line 3", "payload_bytes"]);
        refused(load("\nthreads = 2000", &[], &[]), &["line 2", "expected 0 to 256"]);
        refused(load("threads = 'two'", &[], &[]), &["line 1, column 11", "invalid type: string, expected i64"]);
        refused(load("[[shard]]\nname = 'a'\nurl = 'http://x'", &[], &[]), &["line 3", "redis://"]);
        refused(load("[[shard]]\nname = 'a b'\nurl = 'memory:'", &[], &[]), &["line 2", "a b"]);
        refused(load("[[shard]]\nname = 'a'", &[], &[]), &["line 1", "url"]);
        refused(load("threads =", &[], &[]), &["line 1"]);
        refused(load("# \u{e4}\nlisten = \"\u{e4}\" # \u{e4}\nlistne = 'x'", &[], &[]), &["line 2, column 10"]);
    }

    #[test]
    fn what_is_refused_is_not_repeated_where_it_may_be_a_secret() {
        let sink = "[[sink]]\nname = 'a'\nkind = 'webhook'\n";
        for (text, named) in [
            ("[auth]\npasswrd = 'hush'".to_owned(), "line 2, column 1: unknown field `passwrd`"),
            ("[auth]\npassword = 'hush".into(), "line 2"),
            ("[auth]\npassword = hush".into(), "line 2"),
            ("[auth]\npassword = 4711".into(), "line 2, column 12: invalid type: integer, expected a string"),
            ("[auth]\npassword = ['hush']".into(), "line 2"),
            ("[auth]\nuser = 'hush, expected'".into(), "invalid type: string, expected a sequence"),
            ("auth = 'hush'".into(), "line 1"),
            (format!("{sink}headers = 'hush'"), "line 4, column 11: invalid type: string, expected a map"),
            ("[[shard]]\nname = 'a'\nurl = 'redis://h?hush'".into(), "unknown option"),
            ("[[shard]]\nname = 'a'\nurl = 'redis+cluster://h?hush=hush'".into(), "unknown option"),
            ("[[shard]]\nname = 'a'\nurl = 'redis+cluster://h?partitions=hush'".into(), "partitions"),
            ("[[shard]]\nname = 'a'\nurl = 'redis://:/hush'".into(), "database"),
            ("[[shard]]\nname = 'a'\nurl = ':hush@redis://h'".into(), "unknown scheme"),
        ] {
            let error = load(&text, &[], &[]).expect_err(&text);
            assert!(error.contains(named) && !error.contains("hush") && !error.contains("4711"), "{text}: {error}");
        }
    }

    #[test]
    fn settings_that_contradict_each_other_are_refused() {
        refused(load("[queue]\nlease_ms = 90_000_000", &[], &[]), &["queue.lease_ms", "limits.lease_ms_max"]);
        let shards = |text: &str| load("", &[("GOFLOW_SHARDS", text)], &[]);
        refused(shards("a=memory:,a=memory:"), &["shard a", "this name"]);
        refused(shards("a=redis://h,b=redis://x:y@h:6379/0"), &["shard b", "redis://h:6379"]);
        refused(shards(&format!("{}=redis+cluster://h", "n".repeat(46))), &["43 bytes"]);
        assert!(shards("a=memory:,b=memory:").is_ok());
        assert!(shards("a=redis://h/0,b=redis://h/1").is_ok());
        refused(load("auth.user = [{ name = 'a' }]", &[], &[]), &["'a'", "password_file"]);
    }

    #[test]
    fn shard_urls_are_read_with_all_their_parts() {
        let host = |host: &str, port| Host { host: host.into(), port };
        let redis = ShardUrl::parse("rediss://us%40er:p%3A/w@[::1]:7000/3").unwrap();
        let login = Login { user: Some("us@er".into()), password: Some(Secret::new("p:/w")), tls: true, database: 3 };
        assert_eq!(redis, ShardUrl::Redis { host: host("::1", 7000), login });
        assert_eq!(redis.to_string(), "rediss://[::1]:7000/3");
        let Some(login) = ShardUrl::parse("redis://:pa?ss@a@h/1").unwrap().login().cloned() else { panic!() };
        assert_eq!((login.password, login.database), (Some(Secret::new("pa?ss@a")), 1));
        let text = "redis+sentinel://a:1,b/main/2";
        let login = Login { database: 2, ..Login::default() };
        let sentinels = vec![host("a", 1), host("b", 26379)];
        assert_eq!(ShardUrl::parse(text).unwrap(), ShardUrl::Sentinel { sentinels, service: "main".into(), login });
        let cluster = ShardUrl::parse("redis+cluster://:secret@a,b:1?partitions=4").unwrap();
        assert_eq!((cluster.partitions(), cluster.to_string().contains("secret")), (4, false));
        assert!(!format!("{cluster:?}").contains("secret"));
        for bad in [
            "",
            "redis:",
            "redis://",
            "redis://a,b",
            "redis://a:0",
            "redis://a:x",
            "redis://a/b",
            "redis://a/1/2",
            "redis://a?x=1",
            "redis://%zz@a",
            "redis+sentinel://a",
            "redis+cluster://a/1",
            "redis+cluster://a?partitions=0",
            "redis+cluster://a?partitions=1025",
            "redis+cluster://a?x=1",
            "embedded:",
            "memory:x",
            "http://a",
            "redis://[::1",
            "redis://a b",
        ] {
            assert!(ShardUrl::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn commas_divide_shards_only_where_a_name_follows() {
        let text = "a=redis+sentinel://x:1,y:2/svc, b*7=redis+cluster://p,q?partitions=2,c=memory:";
        let config = load("", &[("GOFLOW_SHARDS", text)], &[]).unwrap();
        let urls: Vec<String> = config.shard.iter().map(|shard| shard.url.to_string()).collect();
        assert_eq!(urls, ["redis+sentinel://x:1,y:2/svc", "redis+cluster://p:6379,q:6379?partitions=2", "memory:"]);
        assert_eq!(config.shard_map_line(), "a*1 b/2*7 c*1");
    }

    #[test]
    fn secrets_come_from_files_and_are_never_shown() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("secret");
        std::fs::write(&file, "hush\n").unwrap();
        let path = file.display();
        let text = format!(
            "[auth]\npassword_file = '{path}'\n[[auth.user]]\nname = 'bob'\npassword = 'hush'\n\
             [[shard]]\nname = 'a'\nurl = 'redis://h'\npassword_file = '{path}'"
        );
        let config = load(&text, &[], &[]).unwrap();
        let users: Vec<_> = config.auth.user.iter().map(|user| (&user.name[..], user.password.reveal())).collect();
        assert_eq!(users, [("default", "hush"), ("bob", "hush")]);
        assert_eq!(config.shard[0].url.login().unwrap().password, Some(Secret::new("hush")));
        assert!(!format!("{config:?}").contains("hush"));
        assert!(!toml::to_string(&config).unwrap().contains("hush"));
        let config = load("", &[("GOFLOW_AUTH_USER_FILES", &format!("amy={path}"))], &[]).unwrap();
        assert_eq!(config.auth.user[0].password.reveal(), "hush");
        refused(load("auth.password_file = '/nowhere'", &[], &[]), &["password_file /nowhere"]);
        refused(load("auth.password_file = '/dev/null'", &[], &[]), &["empty"]);
    }

    #[test]
    fn what_kubernetes_sets_for_a_service_named_goflow_is_no_setting() {
        let variables = [
            ("GOFLOW_SERVICE_HOST", "10.0.0.1"),
            ("GOFLOW_SERVICE_PORT_RESP", "6380"),
            ("GOFLOW_PORT", "tcp://10.0.0.1:6380"),
            ("GOFLOW_REDIS_PORT_6379_TCP_ADDR", "10.0.0.1"),
        ];
        assert!(load("", &variables, &[]).is_ok());
    }
}
