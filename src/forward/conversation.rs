//! What one connection is in the middle of: a transaction, watched keys, subscriptions; and the door for its ordinary
//! commands.
//!
//! A transaction is queued here and sent in one piece when it is executed, so it needs no connection of its own; keys that
//! are watched do, from the first `WATCH` to the `EXEC`, `DISCARD` or `UNWATCH`. All keys of a transaction live on one
//! shard: a command that names another is refused and the transaction with it.
//!
//! Promises: nothing of a client that went away stays on a connection that others use; a transaction whose watching
//! connection broke is not run.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use super::hub::{Inbox, Kind, is_own};
use super::{
    Dedicated, Forwarded, Forwarding, LEARNED_NAME_MAX, Request, Started, Ways, check_key, cross_shard, park,
    put_request, raw, spread,
};
use crate::clock;
use crate::command;
use crate::command::ordinary::{How, Row, Step, Talk};
use crate::dispatch::feed::wish_of;
use crate::error::{Code, Error, Happened, Result};
use crate::resp::reply::{Protocol, Reply};
use crate::resp::{cut, glob};
use crate::shard::redis::link::{Backlog, Link, too_big};
use crate::shard::{Keys, Keyspace, Unit};

/// Most requests, and bytes of them, that one transaction queues.
const QUEUED_MAX: usize = 65_536;
const QUEUED_BYTES_MAX: usize = 64 << 20;
/// Most channels and patterns that one connection subscribes to, and bytes of their names.
const SUBSCRIBED_MAX: usize = 65_536;
const SUBSCRIBED_BYTES_MAX: usize = 16 << 20;
/// How long a shard may take to confirm a subscription.
const SUBSCRIBE_WAIT: Duration = Duration::from_secs(5);
const PING: &[u8] = b"*1\r\n$4\r\nPING\r\n";
/// What may be said in a transaction beside ordinary commands, as any server answers it: with fewest and most words.
const QUEUEABLE: [(&str, usize, usize); 3] = [("PING", 1, usize::MAX), ("ECHO", 2, 2), ("TIME", 1, 1)];
/// What of a transaction a shard in this process knows nothing of.
const ANSWERED_HERE: [&str; 8] = ["PING", "ECHO", "TIME", "SELECT", "UNWATCH", "PUBLISH", "SPUBLISH", "PUBSUB"];

/// A transaction between `MULTI` and `EXEC`.
#[derive(Default)]
struct Queue {
    requests: Vec<Vec<Bytes>>,
    bytes: usize,
    shard: Option<usize>,
    /// A command was refused, so `EXEC` will be, too.
    spoilt: bool,
}

/// Keys that are watched.
enum Watching {
    /// On a connection of their own.
    Server(Dedicated),
    /// By their versions, in this process.
    Local(BTreeMap<Bytes, u64>),
}

/// One connection's state for ordinary commands.
pub struct Conversation {
    ways: Arc<Ways>,
    client_id: u64,
    wake: Arc<dyn Fn() + Send + Sync>,
    backlog: Arc<Backlog>,
    queue: Option<Queue>,
    watching: Arc<Mutex<Option<(usize, Watching)>>>,
    inbox: Option<Arc<Inbox>>,
    subscribed: [BTreeSet<Bytes>; 3],
    subscribed_bytes: usize,
}

impl Conversation {
    /// `wake` is called when there is something in the inbox.
    pub fn new(
        ways: Arc<Ways>,
        client_id: u64,
        wake: Arc<dyn Fn() + Send + Sync>,
        backlog: Arc<Backlog>,
    ) -> Conversation {
        Conversation {
            ways,
            client_id,
            wake,
            backlog,
            queue: None,
            watching: Arc::default(),
            inbox: None,
            subscribed: Default::default(),
            subscribed_bytes: 0,
        }
    }

    /// Messages for the client, once it has subscribed to something.
    pub fn inbox(&self) -> Option<&Arc<Inbox>> {
        self.inbox.as_ref()
    }

    /// Refuses a command that is no ordinary one where the connection has subscribed, or is in a transaction.
    pub fn refuse(&mut self, name: &str, protocol: Protocol) -> Option<Started> {
        match self.confined(name, protocol, false) {
            Some(refusal) => Some(refusal.into()),
            None => self.spoil(name),
        }
    }

    /// Refuses a command that cannot stand in a transaction, if one is being queued, and the transaction with it.
    fn spoil(&mut self, name: &str) -> Option<Started> {
        self.queue.as_mut()?.spoilt = true;
        Some(Error::bad(format!("{name} is not for transactions")).into())
    }

    /// Goes by the present shard map, but in the middle of a transaction.
    fn follow(&mut self) {
        if !self.ways.is_current() && self.queue.is_none() && lock(&self.watching).is_none() {
            self.ways = Ways::of_thread(&self.ways.shared);
        }
    }

    fn subscriptions(&self) -> usize {
        self.subscribed.iter().map(BTreeSet::len).sum()
    }

    /// Starts an ordinary command.
    pub fn start(&mut self, request: Request<'_>) -> Started {
        let Request { row, words, protocol, .. } = request;
        self.follow();
        if let Some(refusal) =
            self.confined(row.name, protocol, matches!(row.how, How::Channel(talk) if talk.is_subscription()))
        {
            return refusal.into();
        }
        match row.how {
            How::Transaction(Step::Unwatch) if self.queue.is_some() => self.enqueue(row, words),
            How::Transaction(step) => self.transaction(step, request),
            _ if self.queue.is_some() => self.enqueue(row, words),
            How::Channel(talk) => self.channel(talk, request),
            How::Block(wait) => park::start(&self.ways, wait, request),
            _ => spread::start(&self.ways, request),
        }
    }

    /// A command that is not in our tables and may be in a server's.
    pub fn start_unknown(&mut self, words: &[Bytes], protocol: Protocol, unknown: Error) -> Started {
        if let Some(queue) = &mut self.queue {
            queue.spoilt = true;
            return unknown.into();
        }
        // A subcommand that a command of ours lacks (`CLIENT TRACKING`, `ACL SETUSER`) would be about the shared link, or
        // about the whole server.
        let Some(name) = words.first().filter(|name| command::lookup(name).is_none()) else { return unknown.into() };
        if name.len() <= LEARNED_NAME_MAX
            && let Some(refusal) = self.confined(&String::from_utf8_lossy(name), protocol, false)
        {
            return refusal.into();
        }
        self.follow();
        spread::start_unknown(&self.ways, words.to_vec(), protocol, unknown)
    }

    /// What the connection's state makes of a command that is not ordinary; `None`: nothing.
    pub fn intercept(&mut self, name: &'static str, words: &[Bytes], protocol: Protocol) -> Option<Started> {
        if matches!(name, "QUIT" | "RESET") {
            return None;
        }
        if protocol == Protocol::Resp2 && self.subscriptions() > 0 && name == "PING" {
            let text = words.get(1).map_or(Reply::text(""), |word| Reply::Bulk(word.clone()));
            return Some(Started::Reply(Reply::Array(vec![Reply::text("pong"), text])));
        }
        if let Some(refusal) = self.confined(name, protocol, false) {
            return Some(refusal.into());
        }
        let queue = self.queue.as_mut()?;
        let selects_zero = name == "SELECT" && words.get(1).is_some_and(|word| word.as_ref() == b"0");
        match QUEUEABLE.iter().find(|(known, ..)| *known == name) {
            Some((_, least, most)) if (*least..=*most).contains(&words.len()) => return Some(queue.push(words)),
            None if selects_zero => return Some(queue.push(words)),
            Some(_) => {
                queue.spoilt = true;
                let lower = name.to_ascii_lowercase();
                return Some(Error::bad(format!("wrong number of arguments for '{lower}' command")).into());
            }
            None => {}
        }
        self.spoil(name)
    }

    /// In RESP2 a connection that has subscribed says nothing else.
    fn confined(&self, name: &str, protocol: Protocol, is_subscription: bool) -> Option<Error> {
        (protocol == Protocol::Resp2 && self.subscriptions() > 0 && !is_subscription).then(|| {
            Error::bad(format!(
                "Can't execute '{}': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed in this context",
                name.to_ascii_lowercase()
            ))
        })
    }

    /// Leaves everything: `RESET`, or the end of the connection. Gives the messages that came before.
    pub fn reset(&mut self) -> Reply {
        self.queue = None;
        self.unwatch();
        for kind in Kind::ALL {
            let names = std::mem::take(&mut self.subscribed[kind as usize]).into_iter().collect();
            drop(Leaving { shared: self.ways.shared.clone(), kind, names, client_id: self.client_id });
        }
        self.subscribed_bytes = 0;
        messages(self.inbox.as_ref())
    }

    fn transaction(&mut self, step: Step, request: Request<'_>) -> Started {
        let Request { row, words, protocol, .. } = request;
        if !row.has_arity(words.len()) {
            let error = row.wrong_arity();
            if step == Step::Exec {
                self.queue = None;
                self.unwatch();
                let text = format!("Transaction discarded because of: {}", error.text);
                return Error::new(Code::ExecAbort, text).into();
            }
            if let Some(queue) = &mut self.queue {
                queue.spoilt = true;
            }
            return error.into();
        }
        match (step, self.queue.take()) {
            (Step::Multi, None) => {
                self.queue = Some(Queue::default());
                Started::Reply(Reply::OK)
            }
            (Step::Exec, Some(queue)) => self.execute(queue, protocol),
            (Step::Discard, Some(_)) | (Step::Unwatch, None) => {
                self.unwatch();
                Started::Reply(Reply::OK)
            }
            (Step::Exec, None) => Error::bad("EXEC without MULTI").into(),
            (Step::Discard, None) => Error::bad("DISCARD without MULTI").into(),
            (Step::Watch, None) => self.watch(request),
            (Step::Multi, queue) => {
                self.queue = queue;
                Error::bad("MULTI calls can not be nested").into()
            }
            (Step::Watch | Step::Unwatch, queue) => {
                self.queue = queue;
                Error::bad("WATCH inside MULTI is not allowed").into()
            }
        }
    }

    fn enqueue(&mut self, row: &'static Row, words: &[Bytes]) -> Started {
        let shard = self.shard_in_transaction(row, words);
        let queue = self.queue.get_or_insert_default();
        match shard {
            Ok(None) => queue.push(words),
            Ok(Some(shard)) if *queue.shard.get_or_insert(shard) == shard => queue.push(words),
            Ok(Some(_)) => {
                queue.spoilt = true;
                cross_shard().into()
            }
            Err(error) => {
                queue.spoilt = true;
                error.into()
            }
        }
    }

    /// The shard that a command of a transaction must run on; `None`: any.
    fn shard_in_transaction(&self, row: &'static Row, words: &[Bytes]) -> Result<Option<usize>> {
        if !row.has_arity(words.len()) {
            return Err(row.wrong_arity());
        }
        let allowed = self.ways.shared.allowed.iter().any(|name| name == row.name);
        match row.how {
            How::Refused if !allowed => return Err(spread::refused(row.name)),
            How::Channel(Talk::Publish | Talk::ShardPublish) => {
                let channel = words.get(1).map_or(&[][..], |word| word);
                check_key(channel)?;
                return Ok(Some(self.ways.home(channel)));
            }
            How::Channel(Talk::Ask) if self.ways.shards() == 1 => {}
            How::Channel(_) => return Err(Error::bad(format!("{} is not for transactions", row.name))),
            How::Pass | How::Count | How::Mget | How::Mset | How::Block(_) | How::Transaction(_) => {}
            _ if self.ways.shards() == 1 => {}
            _ => return Err(Error::new(Code::CrossShard, format!("{} in a transaction asks every shard", row.name))),
        }
        let has_keys = !row.keys.places(words).is_empty();
        let shard = self.ways.shard_of(row.keys, words);
        shard.map(|shard| has_keys.then_some(shard)).map_err(|error| row.fault(words).unwrap_or(error))
    }

    fn execute(&mut self, queue: Queue, protocol: Protocol) -> Started {
        if queue.spoilt {
            self.unwatch();
            return Error::new(Code::ExecAbort, "Transaction discarded because of previous errors.").into();
        }
        let watching = lock(&self.watching).take();
        let shard = match (&watching, queue.shard) {
            (Some((watched, _)), Some(own)) if *watched != own => return cross_shard().into(),
            (Some((watched, _)), _) => *watched,
            (None, own) => own.unwrap_or(0),
        };
        if let Keyspace::Local(keys) = &self.ways.ways[shard].keyspace {
            let watched = match watching {
                Some((_, Watching::Local(watched))) => watched.into_iter().collect(),
                _ => Vec::new(),
            };
            return execute_local(self.ways.clone(), &**keys, protocol, queue.requests, watched);
        }
        match watching {
            // Begun at the head of the line, as WATCH is, and what follows waits: its connection is not the shared one.
            Some((_, Watching::Server(dedicated))) => {
                let backlog = self.backlog.clone();
                Started::Later(Box::pin(async move {
                    match dedicated.transact(&queue.requests, backlog) {
                        Some(sent) => raw(sent.await),
                        None => Reply::NullArray,
                    }
                }))
            }
            _ if queue.requests.is_empty() => Started::Reply(Reply::Array(Vec::new())),
            _ => Started::Forward(self.ways.transact(shard, protocol, queue.requests, &self.backlog)),
        }
    }

    /// Begun at the head of the line, when what was sent before is answered: on a connection of its own `WATCH` would
    /// overtake that, and take a write of the client itself for a change.
    fn watch(&mut self, request: Request<'_>) -> Started {
        let Request { row, words, protocol, .. } = request;
        let shard = match self.ways.shard_of(row.keys, words) {
            Ok(shard) => shard,
            Err(error) => return error.into(),
        };
        let mut watching = lock(&self.watching);
        let is_first = match &*watching {
            Some((known, _)) if *known != shard => return cross_shard().into(),
            known => known.is_none(),
        };
        let (state, words) = (self.watching.clone(), words.to_vec());
        if let Keyspace::Local(keys) = &self.ways.ways[shard].keyspace {
            watching.get_or_insert_with(|| (shard, Watching::Local(BTreeMap::new())));
            let keys = keys.clone();
            return Started::Later(Box::pin(async move { watch_local(&state, &*keys, &words) }));
        }
        if is_first {
            let Some(dedicated) = self.ways.dedicated(shard, protocol) else {
                return Error::bad("this shard takes no ordinary commands").into();
            };
            *watching = Some((shard, Watching::Server(dedicated)));
        }
        Started::Later(Box::pin(watch_server(state, words, is_first)))
    }

    fn unwatch(&mut self) {
        lock(&self.watching).take();
    }

    fn channel(&mut self, talk: Talk, request: Request<'_>) -> Started {
        let Request { row, words, protocol, .. } = request;
        if !row.has_arity(words.len()) {
            return row.wrong_arity().into();
        }
        match talk {
            Talk::Subscribe => self.subscribe(Kind::Channel, words, protocol),
            Talk::PatternSubscribe => self.subscribe(Kind::Pattern, words, protocol),
            Talk::ShardSubscribe => self.subscribe(Kind::Shard, words, protocol),
            Talk::Unsubscribe => self.unsubscribe(Kind::Channel, words),
            Talk::PatternUnsubscribe => self.unsubscribe(Kind::Pattern, words),
            Talk::ShardUnsubscribe => self.unsubscribe(Kind::Shard, words),
            Talk::Publish => self.publish(Kind::Channel, request),
            Talk::ShardPublish => self.publish(Kind::Shard, request),
            Talk::Ask => {
                let (ways, words) = (self.ways.clone(), words.to_vec());
                Started::Later(Box::pin(async move { ask(&ways, &words, protocol).await }))
            }
        }
    }

    /// Counted at once, so that what is sent behind is judged right; confirmed when the shards have.
    fn subscribe(&mut self, kind: Kind, words: &[Bytes], protocol: Protocol) -> Started {
        let new = words[1..].iter().filter(|name| !self.subscribed[kind as usize].contains(*name));
        let (count, bytes) = new.fold((0, 0), |(count, bytes), name| (count + 1, bytes + name.len()));
        if self.subscriptions() + count > SUBSCRIBED_MAX || self.subscribed_bytes + bytes > SUBSCRIBED_BYTES_MAX {
            return Error::new(
                Code::Overloaded,
                format!(
                    "a connection subscribes to at most {SUBSCRIBED_MAX} channels and patterns, their names to \
                     {SUBSCRIBED_BYTES_MAX} bytes; nothing of this was subscribed to"
                ),
            )
            .into();
        }
        if self.subscriptions() == 0 {
            // The protocol may be another than it was. One that overflowed stays, since it ends the connection.
            self.inbox.take_if(|inbox| inbox.keeps_up());
        }
        let wake = self.wake.clone();
        let inbox =
            self.inbox.get_or_insert_with(|| Inbox::new(self.client_id, protocol, Box::new(move || wake()))).clone();
        // While keys are watched the conversation may go by an older map.
        let ways = Ways::of_thread(&self.ways.shared);
        let (mut new, mut confirmations, mut replies) = (Vec::new(), Vec::new(), Vec::new());
        for name in &words[1..] {
            if self.subscribed[kind as usize].insert(name.clone()) {
                self.subscribed_bytes += name.len();
                confirmations.extend(announce(&ways, kind, name));
                new.push(name.clone());
            }
            let count = Reply::Integer(self.count(kind));
            replies.push(Reply::Push(vec![Reply::text(kind.subscribe()), Reply::Bulk(name.clone()), count]));
        }
        Started::Later(Box::pin(async move {
            for confirmation in confirmations {
                if let Err(error) = confirm(confirmation).await {
                    tracing::debug!(%error, "a subscription waits for its shard");
                }
            }
            // Only now, so that no message stands before a confirmation.
            new.iter().for_each(|name| ways.shared.hub.listen(kind, name, &inbox));
            Reply::Many(replies)
        }))
    }

    /// Counted at once; ends when what the shards sent before has come, so that a message that was published by then is told.
    fn unsubscribe(&mut self, kind: Kind, words: &[Bytes]) -> Started {
        let mut names: Vec<Bytes> = words.iter().skip(1).cloned().collect();
        if names.is_empty() {
            names = self.subscribed[kind as usize].iter().cloned().collect();
        }
        let said =
            |count: i64, name: Reply| Reply::Push(vec![Reply::text(kind.unsubscribe()), name, Reply::Integer(count)]);
        if names.is_empty() {
            return Started::Reply(said(self.count(kind), Reply::Null));
        }
        let shared = self.ways.shared.clone();
        let mut leaving = Leaving { shared, kind, names: Vec::new(), client_id: self.client_id };
        let mut replies = Vec::new();
        for name in names {
            if self.subscribed[kind as usize].remove(&name) {
                self.subscribed_bytes -= name.len();
                leaving.names.push(name.clone());
            }
            replies.push(said(self.count(kind), Reply::Bulk(name)));
        }
        let sent = everything_sent(&Ways::of_thread(&self.ways.shared), kind, &leaving.names);
        let inbox = self.inbox.clone();
        Started::Later(Box::pin(async move {
            for confirmation in sent {
                if let Err(error) = confirm(confirmation).await {
                    tracing::debug!(%error, "a subscription ends without its shard");
                }
            }
            drop(leaving);
            Reply::Many(vec![messages(inbox.as_ref()), Reply::Many(replies)])
        }))
    }

    /// Channels and patterns are counted together, channels of shards by themselves.
    fn count(&self, kind: Kind) -> i64 {
        let count = match kind {
            Kind::Shard => self.subscribed[Kind::Shard as usize].len(),
            _ => self.subscribed[Kind::Channel as usize].len() + self.subscribed[Kind::Pattern as usize].len(),
        };
        count as i64
    }

    fn publish(&mut self, kind: Kind, request: Request<'_>) -> Started {
        let Request { words, protocol, raw, .. } = request;
        let (Some(channel), Some(payload)) = (words.get(1), words.get(2)) else {
            return request.row.wrong_arity().into();
        };
        if is_own(channel) {
            return Error::new(Code::NoPerm, "channels that begin with 'goflow:' are the proxy's own").into();
        }
        let home = self.ways.home(channel);
        if let Keyspace::Local(_) = &self.ways.ways[home].keyspace {
            return Started::Reply(Reply::count(self.ways.shared.hub.publish(kind, channel, payload) as u64));
        }
        let sent = self.ways.pass(home, protocol, raw, words);
        let (clients, subscriptions) = self.ways.shared.hub.audience(kind, channel);
        if subscriptions == 0 {
            return Started::Forward(sent);
        }
        Started::Later(Box::pin(async move { with_audience(sent.await, clients - subscriptions) }))
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        self.reset();
    }
}

impl Talk {
    fn is_subscription(self) -> bool {
        !matches!(self, Talk::Publish | Talk::ShardPublish | Talk::Ask)
    }
}

impl Queue {
    fn push(&mut self, words: &[Bytes]) -> Started {
        self.bytes += words.iter().map(Bytes::len).sum::<usize>();
        if self.requests.len() >= QUEUED_MAX || self.bytes > QUEUED_BYTES_MAX {
            self.spoilt = true;
            return Error::new(Code::Overloaded, "the transaction is too large").into();
        }
        self.requests.push(words.to_vec());
        Started::Reply(Reply::Simple("QUEUED"))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A transaction of a shard in this process. What is no matter of its keys is answered here when they are committed, so
/// that a message goes out after the write that it tells of.
fn execute_local(
    ways: Arc<Ways>,
    keys: &dyn Keys,
    protocol: Protocol,
    requests: Vec<Vec<Bytes>>,
    watched: Vec<(Bytes, u64)>,
) -> Started {
    let mut of_keys = Vec::new();
    // In their order, without those that the shard answers.
    let mut places = Vec::new();
    for words in requests {
        let name = words.first().map(|name| name.to_ascii_uppercase()).unwrap_or_default();
        match ANSWERED_HERE.iter().find(|known| known.as_bytes() == name) {
            Some(name) => places.push(Some((*name, words))),
            None => {
                of_keys.push(words);
                places.push(None);
            }
        }
    }
    let run = keys.run(Unit { protocol, requests: of_keys, watched });
    Started::Later(Box::pin(async move {
        let mut of_keys = match run.await {
            Ok(Some(replies)) => replies.into_iter(),
            Ok(None) => return Reply::NullArray,
            Err(error) => return error.into(),
        };
        let mut replies = Vec::with_capacity(places.len());
        for place in places {
            replies.push(match place {
                Some((name, words)) => answer_here(&ways, name, &words, protocol).await,
                None => of_keys.next().unwrap_or(Reply::Null),
            });
        }
        let (reply, bytes_max) = (Reply::Array(replies), ways.shared.reply_bytes_max);
        if reply.size() > bytes_max { too_big(bytes_max).into() } else { reply }
    }))
}

async fn answer_here(ways: &Ways, name: &str, words: &[Bytes], protocol: Protocol) -> Reply {
    let hub = &ways.shared.hub;
    match (name, &words[1..]) {
        ("PING", []) => Reply::Simple("PONG"),
        ("PING" | "ECHO", [text]) => Reply::Bulk(text.clone()),
        ("TIME", []) => {
            let now = clock::now();
            Reply::Array([now / 1_000, now % 1_000 * 1_000].map(|part| Reply::bulk(part.to_string())).into())
        }
        ("SELECT" | "UNWATCH", _) => Reply::OK,
        ("PUBLISH", [channel, payload]) => Reply::count(hub.publish(Kind::Channel, channel, payload) as u64),
        ("SPUBLISH", [channel, payload]) => Reply::count(hub.publish(Kind::Shard, channel, payload) as u64),
        ("PUBSUB", _) => ask(ways, words, protocol).await,
        _ => Error::bad(format!("wrong number of arguments for '{}' command", name.to_ascii_lowercase())).into(),
    }
}

fn watch_local(state: &Mutex<Option<(usize, Watching)>>, keys: &dyn Keys, words: &[Bytes]) -> Reply {
    let mut watching = lock(state);
    let Some((_, Watching::Local(watched))) = &mut *watching else { return Reply::OK };
    if watched.len() + words.len() > QUEUED_MAX {
        return Error::new(Code::Overloaded, "too many keys are watched").into();
    }
    for key in &words[1..] {
        // A key that is watched already stays at the version that it had then.
        watched.entry(Bytes::copy_from_slice(key)).or_insert_with(|| keys.version(key));
    }
    Reply::OK
}

async fn watch_server(state: Arc<Mutex<Option<(usize, Watching)>>>, words: Vec<Bytes>, is_first: bool) -> Reply {
    let sent = match &*lock(&state) {
        Some((_, Watching::Server(dedicated))) => {
            let mut request = BytesMut::new();
            put_request(&mut request, &words);
            dedicated.link.submit(&request, 1)
        }
        _ => return Reply::OK,
    };
    let reply = sent.await.unwrap_or_else(|_| Err(super::link_gone()));
    let mut watching = lock(&state);
    if is_first && reply.as_ref().map_or(true, |reply| cut::is_error(reply)) {
        *watching = None;
    } else if let Some((_, Watching::Server(dedicated))) = &mut *watching {
        let open = dedicated.link.connection();
        // Where earlier keys were watched on another connection, they may have changed unseen.
        dedicated.watching = open.filter(|_| is_first || dedicated.watching == open);
    }
    raw(reply)
}

/// The shards that a channel or pattern must be subscribed to at.
fn homes(ways: &Ways, kind: Kind, name: &Bytes) -> Vec<usize> {
    match kind {
        _ if is_own(name) => Vec::new(),
        Kind::Pattern => (0..ways.shards()).collect(),
        _ => vec![ways.home(name)],
    }
}

type Confirmation = tokio::sync::oneshot::Receiver<Result<Bytes>>;

/// Subscribes at the shards; each confirms by answering the `PING` behind the subscription.
fn announce(ways: &Ways, kind: Kind, name: &Bytes) -> Vec<Confirmation> {
    if is_own(name) {
        return announce_own(ways, kind, name);
    }
    let homes = homes(ways, kind, name);
    let mut raw = BytesMut::new();
    put_request(&mut raw, &[Bytes::from_static(kind.subscribe().as_bytes()), name.clone()]);
    raw.extend_from_slice(PING);
    let mut confirmations = Vec::new();
    let listeners: Vec<Arc<Link>> = homes.iter().filter_map(|shard| ways.park(*shard).listener().cloned()).collect();
    let home = homes.first().map(|shard| ways.number(*shard));
    ways.shared.hub.announce(kind, name, home, || {
        confirmations.extend(listeners.iter().map(|link| link.submit(&raw, 1)));
    });
    confirmations
}

/// A channel that the process feeds with what its shards tell; confirmed when they do.
fn announce_own(ways: &Ways, kind: Kind, name: &Bytes) -> Vec<Confirmation> {
    let feed = ways.shared.dispatcher.feed();
    let wishes = match kind {
        Kind::Channel => wish_of(name, false),
        Kind::Pattern => wish_of(name, true),
        Kind::Shard => Vec::new(),
    };
    let listen = || wishes.into_iter().map(|wish| feed.listen(wish)).collect();
    let heard = ways.shared.hub.announce_own(kind, name, listen);
    let (sender, confirmation) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        heard.await;
        // Nobody may be waiting for it any more.
        let _ = sender.send(Ok(Bytes::new()));
    });
    vec![confirmation]
}

async fn confirm(confirmation: Confirmation) -> Result<()> {
    match tokio::time::timeout(SUBSCRIBE_WAIT, confirmation).await {
        Ok(Ok(Ok(_))) => Ok(()),
        Ok(Ok(Err(error))) => Err(error),
        Ok(Err(_)) | Err(_) => Err(Error::shard_down("the shard", "did not confirm a subscription", Happened::Maybe)),
    }
}

/// Resolves when the shards' messages of before have come: each answers a `PING` behind them.
fn everything_sent(ways: &Ways, kind: Kind, names: &[Bytes]) -> Vec<Confirmation> {
    let homes: BTreeSet<usize> = names.iter().flat_map(|name| homes(ways, kind, name)).collect();
    let listeners = homes.iter().filter_map(|shard| ways.park(*shard).listener().cloned());
    listeners.map(|link| link.submit(PING, 1)).collect()
}

/// What has come for a client and must be read before the reply that ends a subscription.
fn messages(inbox: Option<&Arc<Inbox>>) -> Reply {
    let mut messages = BytesMut::new();
    if let Some(inbox) = inbox {
        inbox.drain(&mut messages);
    }
    Reply::Raw(messages.freeze())
}

/// Subscriptions of a client that end with this. The last client that leaves unsubscribes where the topic has its home now,
/// which may be another than when it came.
struct Leaving {
    shared: Arc<Forwarding>,
    kind: Kind,
    names: Vec<Bytes>,
    client_id: u64,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        let Leaving { shared, kind, names, client_id } = self;
        for name in names {
            shared.hub.leave(*kind, name, *client_id, |home| {
                let Some(home) = home else { return };
                let mut raw = BytesMut::new();
                put_request(&mut raw, &[Bytes::from_static(kind.unsubscribe().as_bytes()), name.clone()]);
                for park in shared.parks.iter().filter(|park| *kind == Kind::Pattern || *park.key() == home) {
                    if let Some(link) = park.listener() {
                        drop(link.submit(&raw, 0));
                    }
                }
            });
        }
    }
}

/// The count that a shard answered, with our own clients in the place of our subscription.
fn with_audience(reply: Result<Bytes>, difference: i64) -> Reply {
    match reply {
        Err(error) => error.into(),
        Ok(reply) => match cut::integer(&reply) {
            Some(count) => Reply::Integer((count + difference).max(0)),
            None => Reply::Raw(reply),
        },
    }
}

/// `PUBSUB`. What is subscribed to at a shard in this process only the hub knows.
async fn ask(ways: &Ways, words: &[Bytes], protocol: Protocol) -> Reply {
    let what = words.get(1).map(|word| word.to_ascii_uppercase()).unwrap_or_default();
    let kind = if what.starts_with(b"SHARD") { Kind::Shard } else { Kind::Channel };
    match (what.as_slice(), words.len()) {
        (b"NUMSUB" | b"SHARDNUMSUB", _) => numsub(ways, kind, words, protocol).await,
        (b"CHANNELS" | b"SHARDCHANNELS", 2 | 3) => channels(ways, kind, words, protocol).await,
        _ if !ways.is_local(0) => raw(ways.send(0, protocol, words.to_vec()).await),
        (b"NUMPAT", 2) => Reply::count(ways.shared.hub.names(Kind::Pattern).len() as u64),
        _ => Error::bad(format!(
            "unknown subcommand or wrong number of arguments for '{}'",
            String::from_utf8_lossy(words.get(1).map_or(&[], |word| &word[..word.len().min(128)]))
        ))
        .into(),
    }
}

async fn channels(ways: &Ways, kind: Kind, words: &[Bytes], protocol: Protocol) -> Reply {
    let servers = (0..ways.shards()).filter(|shard| !ways.is_local(*shard));
    let sent: Vec<Forwarded> = servers.map(|shard| ways.send(shard, protocol, words.to_vec())).collect();
    let pattern = words.get(2);
    let is_asked_for = |name: &Bytes| pattern.is_none_or(|pattern| glob::matches(pattern, name));
    let mut names: BTreeSet<Bytes> = ways.shared.hub.names(kind).into_iter().filter(is_asked_for).collect();
    for reply in sent {
        match reply.await {
            Ok(reply) if cut::is_error(&reply) => return Reply::Raw(reply),
            // What shards tell each other is not for clients.
            Ok(reply) => {
                let told = cut::items(&reply).unwrap_or_default();
                names.extend(told.iter().filter_map(cut::text).filter(|name| !is_own(name)));
            }
            Err(error) => return error.into(),
        }
    }
    Reply::Array(names.into_iter().map(Reply::Bulk).collect())
}

async fn numsub(ways: &Ways, kind: Kind, words: &[Bytes], protocol: Protocol) -> Reply {
    let mut replies = Vec::new();
    for channel in words.iter().skip(2) {
        let home = ways.home(channel);
        let (clients, subscriptions) = ways.shared.hub.listeners(kind, channel);
        let count = if ways.is_local(home) || is_own(channel) {
            clients
        } else {
            let ask = vec![words[0].clone(), words[1].clone(), channel.clone()];
            let reply = match ways.send(home, protocol, ask).await {
                Ok(reply) if cut::is_error(&reply) => return Reply::Raw(reply),
                Ok(reply) => reply,
                Err(error) => return error.into(),
            };
            let counted = cut::items(&reply).and_then(|parts| cut::integer(parts.get(1)?)).unwrap_or(0);
            (counted + clients - subscriptions).max(0)
        };
        replies.extend([Reply::Bulk(channel.clone()), Reply::Integer(count)]);
    }
    Reply::Array(replies)
}
