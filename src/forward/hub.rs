//! Pub/sub in this process: who listens to what, one subscription at a shard for each channel, and bounded inboxes.
//!
//! A message comes once from the channel's home shard (or from [`Hub::publish`], for channels that the process itself
//! feeds) and is written into the inbox of each client that listens. An inbox that is not read fast enough closes its
//! connection, as Redis does; a message is never waited for.
//!
//! Subscriptions ride on the listening link of `park`; after a new connection [`Hub::opened`] subscribes to everything
//! again. What was published in between is lost, as it is to any subscriber of Redis that reconnects.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use foldhash::fast::RandomState;
use futures_util::future::join_all;

use super::{OWN_KEYS, put_request};
use crate::dispatch::feed::{Listening, missed_json};
use crate::resp::reply::{Protocol, Reply};
use crate::resp::{cut, glob};
use crate::shard::BoxFuture;
use crate::shard::redis::link::Link;

/// Most bytes that wait for one subscriber.
const INBOX_BYTES_MAX: usize = 8 << 20;
/// While so much waits, what the process itself feeds is counted for the subscriber and not kept.
const OWN_BYTES_MAX: usize = 1 << 20;
/// Channels of which it may have missed something; a client that missed more is given up.
const MISSED_MAX: usize = 4_096;

/// What a subscription is to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Channel,
    Pattern,
    Shard,
}

impl Kind {
    pub const ALL: [Kind; 3] = [Kind::Channel, Kind::Pattern, Kind::Shard];

    pub fn subscribe(self) -> &'static str {
        ["subscribe", "psubscribe", "ssubscribe"][self as usize]
    }

    pub fn unsubscribe(self) -> &'static str {
        ["unsubscribe", "punsubscribe", "sunsubscribe"][self as usize]
    }

    fn message(self) -> &'static str {
        ["message", "pmessage", "smessage"][self as usize]
    }
}

/// What is on its way to one client.
#[derive(Default)]
struct Waiting {
    bytes: BytesMut,
    /// Messages of our own that there was no room for: by subscription and channel, how many.
    missed: BTreeMap<(usize, Bytes, Bytes), u64>,
}

/// What waits to be written to one client.
pub struct Inbox {
    pub id: u64,
    protocol: Protocol,
    waiting: Mutex<Waiting>,
    overflowed: AtomicBool,
    wake: Box<dyn Fn() + Send + Sync>,
}

impl Inbox {
    /// `wake` is called when something has come.
    pub fn new(id: u64, protocol: Protocol, wake: Box<dyn Fn() + Send + Sync>) -> Arc<Inbox> {
        Arc::new(Inbox { id, protocol, waiting: Mutex::default(), overflowed: AtomicBool::new(false), wake })
    }

    /// Moves what has come to the output; false when the client fell too far behind and must go.
    pub fn drain(&self, out: &mut BytesMut) -> bool {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if !waiting.bytes.is_empty() {
            out.extend_from_slice(&waiting.bytes);
            waiting.bytes.clear();
        }
        for ((kind, name, channel), missing) in std::mem::take(&mut waiting.missed) {
            let payload = missed_json(&channel, missing);
            out.extend_from_slice(&encode(Kind::ALL[kind], &name, &channel, &payload, self.protocol));
        }
        self.keeps_up()
    }

    pub fn keeps_up(&self) -> bool {
        !self.overflowed.load(Ordering::Relaxed)
    }

    fn put(&self, message: &[u8]) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.bytes.len() + message.len() > INBOX_BYTES_MAX {
            self.overflowed.store(true, Ordering::Relaxed);
        } else {
            waiting.bytes.extend_from_slice(message);
        }
        drop(waiting);
        (self.wake)();
    }

    /// Puts a message of our own in, or counts it for what the client is told when it has read on.
    fn offer(&self, kind: Kind, name: &Bytes, channel: &Bytes, message: &[u8]) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if !waiting.missed.is_empty() || waiting.bytes.len() + message.len() > OWN_BYTES_MAX {
            *waiting.missed.entry((kind as usize, name.clone(), channel.clone())).or_default() += 1;
            if waiting.missed.len() > MISSED_MAX {
                self.overflowed.store(true, Ordering::Relaxed);
                waiting.missed.clear();
            }
        } else {
            waiting.bytes.extend_from_slice(message);
        }
        drop(waiting);
        (self.wake)();
    }
}

/// Everything about one channel or pattern.
struct Topic {
    /// Where its messages come from; patterns are subscribed to at every shard. `None`: from this process alone.
    home: Option<usize>,
    /// Clients that listen, and those that are about to.
    interested: usize,
    inboxes: Vec<Arc<Inbox>>,
    /// What keeps a channel fed that the process itself feeds.
    fed_by: Vec<Listening>,
}

type Topics = HashMap<Bytes, Topic, RandomState>;

/// All subscriptions of the process.
pub struct Hub {
    topics: Mutex<[Topics; 3]>,
}

impl Hub {
    pub fn new() -> Arc<Hub> {
        Arc::new(Hub { topics: Mutex::default() })
    }

    fn topics(&self) -> MutexGuard<'_, [Topics; 3]> {
        self.topics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that somebody is about to listen; `subscribe` is called under the lock, so that orders to the shards go out
    /// in the order in which they are decided.
    pub fn announce(&self, kind: Kind, name: &Bytes, home: Option<usize>, subscribe: impl FnOnce()) {
        let mut topics = self.topics();
        let new = || Topic { home, interested: 0, inboxes: Vec::new(), fed_by: Vec::new() };
        topics[kind as usize].entry(name.clone()).or_insert_with(new).interested += 1;
        subscribe();
    }

    /// The same for a channel that the process itself feeds: `feed` is called for the first that listens. Resolves when the
    /// shards tell what is to come.
    pub fn announce_own(
        &self,
        kind: Kind,
        name: &Bytes,
        feed: impl FnOnce() -> Vec<Listening>,
    ) -> BoxFuture<'static, ()> {
        let mut topics = self.topics();
        let new = || Topic { home: None, interested: 0, inboxes: Vec::new(), fed_by: feed() };
        let topic = topics[kind as usize].entry(name.clone()).or_insert_with(new);
        topic.interested += 1;
        let heard: Vec<_> = topic.fed_by.iter().map(Listening::heard).collect();
        Box::pin(async move {
            join_all(heard).await;
        })
    }

    /// From here on the inbox gets the messages.
    pub fn listen(&self, kind: Kind, name: &Bytes, inbox: &Arc<Inbox>) {
        if let Some(topic) = self.topics()[kind as usize].get_mut(name) {
            topic.inboxes.push(inbox.clone());
        }
    }

    /// Takes back an announcement, and the inbox where it listens; `unsubscribe` is called with the topic's home when nobody
    /// is left.
    pub fn leave(&self, kind: Kind, name: &Bytes, inbox: u64, unsubscribe: impl FnOnce(Option<usize>)) {
        let mut topics = self.topics();
        let Some(topic) = topics[kind as usize].get_mut(name) else { return };
        topic.inboxes.retain(|known| known.id != inbox);
        topic.interested -= 1;
        if topic.interested == 0 {
            let home = topic.home;
            topics[kind as usize].remove(name);
            unsubscribe(home);
        }
    }

    /// Whether anybody listens to anything.
    pub fn is_silent(&self) -> bool {
        self.topics().iter().all(Topics::is_empty)
    }

    /// Delivers a message that the process itself publishes: to the listeners of the channel and, but for that of a shard,
    /// of matching patterns. Says to how many.
    pub fn publish(&self, kind: Kind, channel: &Bytes, payload: &[u8]) -> usize {
        let topics = self.topics();
        let mut count = deliver(&topics[kind as usize], kind, channel, channel, payload);
        if kind == Kind::Shard {
            return count;
        }
        // What the process tells of jobs is for those who ask for just that, whoever else has it fed.
        let is_meant = |pattern: &&Bytes| is_own(pattern) || !is_own(channel);
        let patterns = topics[Kind::Pattern as usize].keys().filter(is_meant);
        for pattern in patterns.filter(|pattern| glob::matches(pattern, channel)) {
            count += deliver(&topics[Kind::Pattern as usize], Kind::Pattern, pattern, channel, payload);
        }
        count
    }

    /// Of a message on the channel: how many clients of this process get it, and how many subscriptions at its home shard
    /// stand for them.
    pub fn audience(&self, kind: Kind, channel: &Bytes) -> (i64, i64) {
        let topics = self.topics();
        let own = topics[kind as usize].get(channel);
        let mut clients = own.map_or(0, |topic| topic.inboxes.len());
        let mut subscriptions = usize::from(own.is_some_and(|topic| topic.home.is_some()));
        if kind == Kind::Channel {
            for (_, topic) in
                topics[Kind::Pattern as usize].iter().filter(|(pattern, _)| glob::matches(pattern, channel))
            {
                clients += topic.inboxes.len();
                subscriptions += usize::from(topic.home.is_some());
            }
        }
        (clients as i64, subscriptions as i64)
    }

    /// How many clients of this process subscribed to the channel itself, and how many subscriptions stand for them.
    pub fn listeners(&self, kind: Kind, channel: &Bytes) -> (i64, i64) {
        let topics = self.topics();
        let topic = topics[kind as usize].get(channel);
        topic.map_or((0, 0), |topic| (topic.inboxes.len() as i64, i64::from(topic.home.is_some())))
    }

    /// What the clients of this process have subscribed to.
    pub fn names(&self, kind: Kind) -> Vec<Bytes> {
        self.topics()[kind as usize].keys().cloned().collect()
    }

    /// The shard map has changed: channels whose homes moved are subscribed to at the new ones. Patterns are subscribed to by
    /// the connection that a new shard gets.
    pub fn move_homes(&self, listeners: &HashMap<usize, Arc<Link>>, home: impl Fn(&[u8]) -> usize) {
        let mut topics = self.topics();
        for kind in [Kind::Channel, Kind::Shard] {
            let moved = topics[kind as usize].iter_mut().filter_map(|(name, topic)| {
                let (before, now) = (topic.home?, home(name));
                (before != now).then_some((name, topic, before, now))
            });
            for (name, topic, before, now) in moved {
                topic.home = Some(now);
                for (number, word) in [(now, kind.subscribe()), (before, kind.unsubscribe())] {
                    if let Some(link) = listeners.get(&number) {
                        let mut raw = BytesMut::new();
                        put_request(&mut raw, &[Bytes::from_static(word.as_bytes()), name.clone()]);
                        drop(link.submit(&raw, 0));
                    }
                }
            }
        }
    }

    /// A new connection to a shard knows nothing: everything is subscribed to again.
    pub fn opened(&self, shard: usize, link: &Link) {
        let topics = self.topics();
        for kind in Kind::ALL {
            let is_there = |topic: &Topic| match kind {
                Kind::Pattern => topic.home.is_some(),
                _ => topic.home == Some(shard),
            };
            for (name, _) in topics[kind as usize].iter().filter(|(_, topic)| is_there(topic)) {
                let mut raw = BytesMut::new();
                put_request(&mut raw, &[Bytes::from_static(kind.subscribe().as_bytes()), name.clone()]);
                drop(link.submit(&raw, 0));
            }
        }
    }

    pub fn lost(&self, shard: usize) {
        if !self.is_silent() {
            tracing::info!(shard, "subscriptions are interrupted");
        }
    }

    /// A push of a shard: a message is delivered, anything else (a confirmation) is nobody's business.
    pub fn heard(&self, shard: usize, push: &Bytes) {
        let Some(parts) = cut::items(push) else { return };
        let part = |at: usize| parts.get(at).and_then(cut::text);
        let topics = self.topics();
        match (part(0).as_deref(), part(1), part(2), part(3)) {
            (Some(b"message"), Some(channel), Some(payload), _) => {
                deliver(&topics[Kind::Channel as usize], Kind::Channel, &channel, &channel, &payload);
            }
            (Some(b"smessage"), Some(channel), Some(payload), _) => {
                deliver(&topics[Kind::Shard as usize], Kind::Shard, &channel, &channel, &payload);
            }
            // What shards tell each other is not for clients.
            (Some(b"pmessage"), _, Some(channel), _) if is_own(&channel) => {}
            (Some(b"pmessage"), Some(pattern), Some(channel), Some(payload)) => {
                deliver(&topics[Kind::Pattern as usize], Kind::Pattern, &pattern, &channel, &payload);
            }
            _ => tracing::trace!(shard, "a push that is no message"),
        }
    }
}

fn deliver(topics: &Topics, kind: Kind, name: &Bytes, channel: &Bytes, payload: &[u8]) -> usize {
    let Some(topic) = topics.get(name) else { return 0 };
    let mut encoded: [Option<Bytes>; 2] = [None, None];
    for inbox in &topic.inboxes {
        let message = encoded[inbox.protocol as usize]
            .get_or_insert_with(|| encode(kind, name, channel, payload, inbox.protocol));
        match is_own(channel) {
            true => inbox.offer(kind, name, channel, message),
            false => inbox.put(message),
        }
    }
    topic.inboxes.len()
}

fn encode(kind: Kind, name: &Bytes, channel: &Bytes, payload: &[u8], protocol: Protocol) -> Bytes {
    let mut parts = vec![Reply::text(kind.message())];
    if kind == Kind::Pattern {
        parts.push(Reply::Bulk(name.clone()));
    }
    parts.extend([Reply::Bulk(channel.clone()), Reply::bulk(payload)]);
    let mut out = BytesMut::new();
    Reply::Push(parts).encode(protocol, &mut out);
    out.freeze()
}

/// Whether messages of the channel, or of all that match the pattern, come from this process alone.
pub fn is_own(name: &[u8]) -> bool {
    name.starts_with(OWN_KEYS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subscriber_that_does_not_read_is_given_up_and_hurts_nobody() {
        let hub = Hub::new();
        let (slow, quick) =
            (Inbox::new(1, Protocol::Resp2, Box::new(|| ())), Inbox::new(2, Protocol::Resp3, Box::new(|| ())));
        let name = Bytes::from_static(b"news");
        for inbox in [&slow, &quick] {
            hub.announce(Kind::Channel, &name, None, || ());
            hub.listen(Kind::Channel, &name, inbox);
        }
        let payload = vec![b'x'; 1 << 20];
        let mut out = BytesMut::new();
        for _ in 0..9 {
            assert_eq!(hub.publish(Kind::Channel, &name, &payload), 2);
            out.clear();
            assert!(quick.drain(&mut out) && out.starts_with(b">3\r\n$7\r\nmessage\r\n"));
        }
        assert!(!slow.drain(&mut out));
        hub.leave(Kind::Channel, &name, 1, |_| panic!("somebody listens yet"));
        assert_eq!(hub.publish(Kind::Channel, &name, b"x"), 1);
    }

    #[test]
    fn channels_of_shards_are_a_world_of_their_own() {
        let hub = Hub::new();
        let name = Bytes::from_static(b"news");
        let inboxes = Kind::ALL.map(|kind| Inbox::new(kind as u64, Protocol::Resp2, Box::new(|| ())));
        for (kind, inbox) in Kind::ALL.into_iter().zip(&inboxes) {
            hub.announce(kind, &name, Some(7), || ());
            hub.listen(kind, &name, inbox);
        }
        let heard = || {
            inboxes.each_ref().map(|inbox| {
                let mut out = BytesMut::new();
                inbox.drain(&mut out);
                !out.is_empty()
            })
        };
        assert_eq!((hub.publish(Kind::Shard, &name, b"x"), heard()), (1, [false, false, true]));
        assert_eq!((hub.publish(Kind::Channel, &name, b"x"), heard()), (2, [true, true, false]));
        let mut home = None;
        hub.leave(Kind::Shard, &name, Kind::Shard as u64, |at| home = at);
        assert_eq!((home, hub.names(Kind::Shard)), (Some(7), Vec::new()));
    }

    #[test]
    fn a_pattern_for_everything_hears_nothing_of_jobs() {
        let hub = Hub::new();
        let inbox = Inbox::new(1, Protocol::Resp2, Box::new(|| ()));
        for pattern in ["*", "g*", "goflow?events:*", "goflow:events:*"].map(Bytes::from) {
            hub.announce(Kind::Pattern, &pattern, None, || ());
            hub.listen(Kind::Pattern, &pattern, &inbox);
        }
        assert_eq!(hub.publish(Kind::Channel, &Bytes::from_static(b"goflow:events:q"), b"x"), 1);
        assert_eq!(hub.publish(Kind::Channel, &Bytes::from_static(b"good"), b"x"), 2);
    }

    #[test]
    fn a_slow_subscriber_of_events_is_told_how_many_it_missed() {
        let hub = Hub::new();
        let inbox = Inbox::new(1, Protocol::Resp2, Box::new(|| ()));
        let name = Bytes::from_static(b"goflow:events:*");
        drop(hub.announce_own(Kind::Pattern, &name, Vec::new));
        hub.listen(Kind::Pattern, &name, &inbox);
        let channels = [Bytes::from_static(b"goflow:events:a"), Bytes::from_static(b"goflow:events:b")];
        let payload = vec![b'x'; OWN_BYTES_MAX / 4];
        for _ in 0..5 {
            for channel in &channels {
                hub.publish(Kind::Channel, channel, &payload);
            }
        }
        let mut out = BytesMut::new();
        assert!(inbox.drain(&mut out));
        let text = String::from_utf8_lossy(&out).into_owned();
        let told = text.matches("xxxx\r\n").count();
        let gaps: Vec<&str> = text.split("\r\n").filter(|line| line.starts_with('{')).collect();
        assert_eq!(told, 3);
        assert_eq!(gaps, [r#"{"type":"gap","queue":"a","missing":3}"#, r#"{"type":"gap","queue":"b","missing":4}"#]);
        hub.publish(Kind::Channel, &channels[0], b"again");
        out.clear();
        assert!(inbox.drain(&mut out) && out.ends_with(b"again\r\n"));
        for number in 0..MISSED_MAX + 5 {
            hub.publish(Kind::Channel, &Bytes::from(format!("goflow:events:{number}")), &payload);
        }
        assert!(!inbox.drain(&mut out), "what it missed is counted without an end");
    }
}
