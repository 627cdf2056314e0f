//! Ordinary commands on their way to the shards: each thread's links, and one request or a unit of them on one shard.
//!
//! [`Forwarding`] is the process's part, [`Ways`] a thread's: its links to every shard, so that a request meets no other
//! thread. `spread` knows what becomes of a command over several shards, `park` lets clients wait without a connection of
//! their own, `hub` is pub/sub, `conversation` what a connection is in the middle of (a transaction, subscriptions).
//!
//! Promises: what one session sends to one shard is sent in that order; bytes pass unchanged; a unit is run with nothing
//! of others between, and leaves nothing behind on the shared link (`MULTI` goes out with its `EXEC` behind it).

pub mod conversation;
pub mod hub;
pub mod park;
pub mod spread;

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use dashmap::DashMap;

use crate::command::ordinary::{Keys, Row};
use crate::dispatch::lane::Lane;
use crate::dispatch::{Dispatcher, ShardMap, router};
use crate::error::{Code, Error, Result};
use crate::resp::reply::{Protocol, Reply, put_bulk, put_header};
use crate::resp::{cut, glob};
use crate::shard::redis::link::{Backlog, Link, Replies, too_big};
use crate::shard::{BoxFuture, Dial, Keyspace, Unit};
use hub::{Hub, Kind};
use park::Park;

/// Keys that begin so are the proxy's own.
pub const OWN_KEYS: &[u8] = b"goflow:";
/// Links kept for transactions that watch keys, for each thread, shard and protocol.
const DEDICATED_KEPT: usize = 8;
/// Commands of a server that our table lacks, remembered; and the longest name that one can have.
const LEARNED_MAX: usize = 1_000;
const LEARNED_NAME_MAX: usize = 64;

/// What all threads share.
pub struct Forwarding {
    pub dispatcher: Arc<Dispatcher>,
    /// Names, upper case, of commands that are refused unless they stand here.
    pub allowed: Vec<String>,
    /// Groups of key patterns; the keys of a group live where its first pattern would.
    together: Vec<Vec<String>>,
    /// Most bytes of replies to one request, and of those that wait for one client.
    pub reply_bytes_max: usize,
    pub hub: Arc<Hub>,
    /// What was or may be taken out of shards for clients, and neither reached them nor is back.
    pub unsettled: AtomicUsize,
    /// By the number of the shard's lane.
    parks: DashMap<usize, Arc<Park>>,
    /// Where the keys of commands stand that only the servers know; `None`: not to be forwarded.
    learned: DashMap<Vec<u8>, Option<Keys>>,
}

impl Forwarding {
    pub fn new(
        dispatcher: Arc<Dispatcher>,
        allowed: Vec<String>,
        together: Vec<Vec<String>>,
        reply_bytes_max: usize,
    ) -> Arc<Forwarding> {
        let hub = Hub::new();
        let (feed, ears) = (dispatcher.feed(), hub.clone());
        feed.publish_to(Box::new(move |channel, payload| {
            ears.publish(Kind::Channel, channel, payload);
        }));
        Arc::new(Forwarding {
            dispatcher,
            allowed,
            together,
            reply_bytes_max,
            hub,
            unsettled: AtomicUsize::new(0),
            parks: DashMap::new(),
            learned: DashMap::new(),
        })
    }

    /// What of a key says where it lives.
    fn tag<'a>(&'a self, key: &'a [u8]) -> &'a [u8] {
        let is_of = |group: &&Vec<String>| group.iter().any(|pattern| glob::matches(pattern.as_bytes(), key));
        match self.together.iter().find(is_of).and_then(|group| group.first()) {
            Some(pattern) => pattern.as_bytes(),
            None => router::key_tag(key),
        }
    }

    /// Lets the links of this thread follow the shard map until the process ends, also where nobody sends a command.
    pub async fn refresh(self: Arc<Self>) {
        let mut changes = self.dispatcher.changes();
        while changes.changed().await.is_ok() {
            drop(Ways::of_thread(&self));
        }
    }

    /// Follows the shard map until the process ends: subscriptions move to where their channels have their homes.
    pub async fn follow(self: Arc<Self>) {
        let mut changes = self.dispatcher.changes();
        while changes.changed().await.is_ok() {
            let ways = Ways::of_thread(&self);
            self.parks.retain(|number, park| {
                let stays = ways.ways.iter().any(|way| way.number == *number);
                if !stays && let Some(link) = park.listener() {
                    link.close();
                }
                stays
            });
            if !self.hub.is_silent() {
                let listeners =
                    (0..ways.shards()).filter_map(|at| Some((ways.number(at), ways.park(at).listener()?.clone())));
                self.hub.move_homes(&listeners.collect(), |channel| ways.number(ways.home(channel)));
            }
        }
    }
}

/// One shard, as one thread reaches it.
struct Way {
    /// That of its lane.
    number: usize,
    name: Arc<str>,
    keyspace: Keyspace,
    /// One for each protocol.
    links: [OnceLock<Arc<Link>>; 2],
    /// Connections that nobody uses now, for transactions that watch keys.
    dedicated: [Mutex<Vec<Arc<Link>>>; 2],
    /// The shard is not in the thread's map any more.
    has_left: AtomicBool,
}

impl Way {
    fn open(&self, dial: &Arc<dyn Dial>, protocol: Protocol, reply_bytes_max: usize) -> Arc<Link> {
        let link = Link::spawn(self.name.clone(), dial.clone(), protocol, reply_bytes_max);
        if self.has_left.load(Ordering::Relaxed) {
            link.close();
        }
        link
    }

    fn kept(&self, protocol: Protocol) -> MutexGuard<'_, Vec<Arc<Link>>> {
        self.dedicated[protocol as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who is in the middle of something with the shard gets what is on its way, and nothing more.
    fn leave(&self) {
        self.has_left.store(true, Ordering::Relaxed);
        self.links.iter().filter_map(OnceLock::get).for_each(|link| link.close());
        for protocol in [Protocol::Resp2, Protocol::Resp3] {
            self.kept(protocol).drain(..).for_each(|link| link.close());
        }
    }
}

/// A connection that nobody else uses until this is dropped, for keys that are watched. Then it watches nothing, and
/// serves the next; or it is closed.
struct Dedicated {
    way: Arc<Way>,
    protocol: Protocol,
    link: Arc<Link>,
    /// The number of the connection that the keys are watched on: `None` before the first is, and when it was lost.
    watching: Option<u64>,
}

impl Dedicated {
    /// Runs requests as one transaction, unless what was watched may have changed unseen.
    fn transact(self, requests: &[Vec<Bytes>], backlog: Arc<Backlog>) -> Option<Forwarded> {
        let (raw, replies) = unit(requests);
        let sent = self.link.submit_on(self.watching?, &raw, replies, Some(backlog.clone()))?;
        Some(Forwarded { from: From::Link(sent, Some(backlog)), shape: Shape::Exec })
    }
}

impl Drop for Dedicated {
    fn drop(&mut self) {
        let unwatch = |connection| self.link.submit_on(connection, b"*1\r\n$7\r\nUNWATCH\r\n", 1, None);
        let is_clean = self.watching.and_then(unwatch).is_some();
        let mut kept = self.way.kept(self.protocol);
        if is_clean && kept.len() < DEDICATED_KEPT && !self.way.has_left.load(Ordering::Relaxed) {
            kept.push(self.link.clone());
        } else {
            self.link.close();
        }
    }
}

/// One thread's ways to every shard.
pub struct Ways {
    pub shared: Arc<Forwarding>,
    map: Arc<ShardMap>,
    /// In the order of the map.
    ways: Vec<Arc<Way>>,
}

thread_local! {
    static WAYS: RefCell<Option<Arc<Ways>>> = const { RefCell::new(None) };
}

impl Ways {
    /// The ways of the current thread.
    pub fn of_thread(shared: &Arc<Forwarding>) -> Arc<Ways> {
        WAYS.with_borrow_mut(|known| match &*known {
            Some(ways) if Arc::ptr_eq(&ways.shared, shared) && ways.is_current() => ways.clone(),
            before => {
                let map = shared.dispatcher.map();
                let kept = before.as_ref().map_or_else(Vec::new, |before| before.ways.clone());
                let way = |lane: &Arc<Lane>| {
                    let known = kept.iter().find(|way| way.number == lane.index());
                    known.cloned().unwrap_or_else(|| {
                        Arc::new(Way {
                            number: lane.index(),
                            name: lane.name().clone(),
                            keyspace: lane.shard().keyspace(),
                            links: Default::default(),
                            dedicated: Default::default(),
                            has_left: AtomicBool::new(false),
                        })
                    })
                };
                let ways: Vec<Arc<Way>> = map.lanes.iter().map(way).collect();
                for gone in kept.iter().filter(|way| ways.iter().all(|present| !Arc::ptr_eq(present, way))) {
                    gone.leave();
                }
                let ways = Arc::new(Ways { shared: shared.clone(), map, ways });
                *known = Some(ways.clone());
                ways
            }
        })
    }

    /// Whether they are those of the present map.
    pub fn is_current(&self) -> bool {
        self.map.version() == self.shared.dispatcher.version()
    }

    /// The number of a shard's lane, which outlives the map.
    pub fn number(&self, shard: usize) -> usize {
        self.ways[shard].number
    }

    /// Where clients wait for keys of a shard; its connection is opened by the first that does.
    fn park(&self, shard: usize) -> Arc<Park> {
        let way = &self.ways[shard];
        let park = || Park::new(way.number, way.name.clone(), way.keyspace.clone(), self.shared.hub.clone());
        self.shared.parks.entry(way.number).or_insert_with(park).clone()
    }

    pub fn shards(&self) -> usize {
        self.ways.len()
    }

    pub fn name(&self, shard: usize) -> &Arc<str> {
        &self.ways[shard].name
    }

    /// Whether the shard keeps its ordinary keys in this process.
    fn is_local(&self, shard: usize) -> bool {
        matches!(self.ways[shard].keyspace, Keyspace::Local(_))
    }

    /// The shard that owns a key.
    pub fn home(&self, key: &[u8]) -> usize {
        if self.ways.len() == 1 { 0 } else { self.map.home_place(self.shared.tag(key)) }
    }

    /// The shard of all keys of a request, and the first where it has none.
    pub fn shard_of(&self, keys: Keys, words: &[Bytes]) -> Result<usize> {
        let mut shard = None;
        keys.each(words, |at| {
            let Some(key) = words.get(at) else { return Ok(()) };
            check_key(key)?;
            let home = self.home(key);
            if *shard.get_or_insert(home) != home {
                return Err(cross_shard());
            }
            Ok(())
        })?;
        Ok(shard.unwrap_or(0))
    }

    fn link(&self, shard: usize, protocol: Protocol) -> Option<&Arc<Link>> {
        let way = &self.ways[shard];
        let Keyspace::Server(dial) = &way.keyspace else { return None };
        let open = || way.open(dial, protocol, self.shared.reply_bytes_max);
        Some(way.links[protocol as usize].get_or_init(open))
    }

    /// A connection that nobody else uses; `None` where the shard is no server.
    fn dedicated(&self, shard: usize, protocol: Protocol) -> Option<Dedicated> {
        let way = &self.ways[shard];
        let Keyspace::Server(dial) = &way.keyspace else { return None };
        let kept = way.kept(protocol).pop();
        let link = kept.unwrap_or_else(|| way.open(dial, protocol, self.shared.reply_bytes_max));
        Some(Dedicated { way: way.clone(), protocol, link, watching: None })
    }

    /// Sends a client's request as it came. What comes back counts for the client's backlog until it is taken.
    pub fn forward(&self, shard: usize, request: Request<'_>) -> Forwarded {
        let Request { words, raw, protocol, backlog, .. } = request;
        match self.link(shard, protocol) {
            Some(link) => {
                let replies = link.submit_for(raw, 1, Some(backlog.clone()));
                Forwarded { from: From::Link(replies, Some(backlog.clone())), shape: Shape::Whole }
            }
            None => self.run(shard, protocol, vec![words.to_vec()], Shape::Whole),
        }
    }

    /// Sends a request as it came: `raw` is the array of its words.
    pub fn pass(&self, shard: usize, protocol: Protocol, raw: &[u8], words: &[Bytes]) -> Forwarded {
        if let Some(link) = self.link(shard, protocol) {
            return Forwarded { from: From::Link(link.submit(raw, 1), None), shape: Shape::Whole };
        }
        self.run(shard, protocol, vec![words.to_vec()], Shape::Whole)
    }

    /// Sends a request of our own making.
    pub fn send(&self, shard: usize, protocol: Protocol, words: Vec<Bytes>) -> Forwarded {
        let mut raw = BytesMut::new();
        put_request(&mut raw, &words);
        self.pass(shard, protocol, &raw, &words)
    }

    /// Runs a request that would block as `MULTI` lets it run: it does not. One that takes something is not refused for
    /// the size of its reply by a keyspace in this process, where what it took would be lost with it.
    pub fn attempt(&self, shard: usize, protocol: Protocol, words: Vec<Bytes>, takes: bool) -> Forwarded {
        self.unit(shard, protocol, vec![words], Shape::Attempt { takes }, None)
    }

    /// Runs requests as one transaction; the answer is that of `EXEC`.
    pub fn transact(
        &self,
        shard: usize,
        protocol: Protocol,
        requests: Vec<Vec<Bytes>>,
        backlog: &Arc<Backlog>,
    ) -> Forwarded {
        self.unit(shard, protocol, requests, Shape::Exec, Some(backlog.clone()))
    }

    fn unit(
        &self,
        shard: usize,
        protocol: Protocol,
        requests: Vec<Vec<Bytes>>,
        shape: Shape,
        backlog: Option<Arc<Backlog>>,
    ) -> Forwarded {
        match self.link(shard, protocol) {
            Some(link) => {
                let (raw, replies) = unit(&requests);
                let sent = link.submit_for(&raw, replies, backlog.clone());
                Forwarded { from: From::Link(sent, backlog), shape }
            }
            None => self.run(shard, protocol, requests, shape),
        }
    }

    /// Runs requests on a shard in this process; the answer is all their replies, whatever the shape.
    fn run(&self, shard: usize, protocol: Protocol, requests: Vec<Vec<Bytes>>, shape: Shape) -> Forwarded {
        let from = match &self.ways[shard].keyspace {
            Keyspace::Local(keys) => {
                let run = keys.run(Unit { protocol, requests, ..Unit::default() });
                From::Local { run, protocol, bytes_max: self.shared.reply_bytes_max }
            }
            _ => From::Failed(Error::bad(format!("shard {} takes no ordinary commands", self.ways[shard].name))),
        };
        Forwarded { from, shape }
    }

    /// Where the keys of a command stand that our table lacks, as the first shard says; `None`: it is not forwarded.
    pub async fn learn(self: Arc<Self>, words: &[Bytes]) -> Option<Keys> {
        let name = words.first().filter(|name| name.len() <= LEARNED_NAME_MAX)?.to_ascii_lowercase();
        if let Some(known) = self.shared.learned.get(&name) {
            return *known;
        }
        if !matches!(self.ways[0].keyspace, Keyspace::Server(_)) {
            return None;
        }
        let ask = [Bytes::from_static(b"COMMAND"), Bytes::from_static(b"INFO"), name.clone().into()];
        let reply = self.send(0, Protocol::Resp2, ask.to_vec()).await.ok()?;
        let keys = keys_reported(&reply);
        if self.shared.learned.len() < LEARNED_MAX {
            self.shared.learned.insert(name, keys);
        }
        keys
    }
}

/// Reads one entry of `COMMAND INFO`; what waits, talks, changes the connection or is for operators is not to be forwarded.
/// Nor is what has subcommands: its entry says nothing of what they do.
fn keys_reported(reply: &Bytes) -> Option<Keys> {
    const BARRED: [&[u8]; 8] = [
        b"blocking",
        b"pubsub",
        b"admin",
        b"noscript",
        b"no_multi",
        b"movablekeys",
        // Categories, which newer servers report beside the flags.
        b"@connection",
        b"@dangerous",
    ];
    let fields = cut::items(cut::items(reply)?.first()?)?;
    let list = |at: usize| fields.get(at).and_then(cut::items).unwrap_or_default();
    let (flags, categories, subcommands) = (cut::items(fields.get(2)?)?, list(6), list(9));
    let is_barred = flags.iter().chain(&categories).filter_map(cut::text).any(|word| BARRED.contains(&word.as_ref()));
    if is_barred || !subcommands.is_empty() {
        return None;
    }
    let number = |at: usize| fields.get(at).and_then(cut::integer);
    match usize::try_from(number(3)?).ok()? {
        0 => Some(Keys::None),
        first => Some(Keys::Range { first, last: number(4)? as isize, step: usize::try_from(number(5)?).ok()? }),
    }
}

pub fn check_key(key: &[u8]) -> Result<()> {
    match key.starts_with(OWN_KEYS) {
        true => Err(Error::new(Code::NoPerm, "keys that begin with 'goflow:' are the proxy's own")),
        false => Ok(()),
    }
}

fn cross_shard() -> Error {
    Error::new(Code::CrossShard, "the keys of this request live on different shards; a {tag} keeps keys together")
}

pub fn put_request(out: &mut BytesMut, words: &[Bytes]) {
    put_header(out, b'*', words.len());
    words.iter().for_each(|word| put_bulk(out, word));
}

/// `MULTI`, the requests and `EXEC`, in one piece, and how many replies that will be.
fn unit(requests: &[Vec<Bytes>]) -> (BytesMut, usize) {
    let mut raw = BytesMut::from(&b"*1\r\n$5\r\nMULTI\r\n"[..]);
    requests.iter().for_each(|words| put_request(&mut raw, words));
    raw.extend_from_slice(b"*1\r\n$4\r\nEXEC\r\n");
    (raw, requests.len() + 2)
}

enum From {
    Link(Replies, Option<Arc<Backlog>>),
    Local { run: BoxFuture<'static, Result<Option<Vec<Reply>>>>, protocol: Protocol, bytes_max: usize },
    Failed(Error),
}

/// Which part of what the shard answers is the reply.
#[derive(Clone, Copy, Debug)]
enum Shape {
    Whole,
    /// The reply of `EXEC`.
    Exec,
    /// The reply to the one request of a unit.
    Attempt {
        takes: bool,
    },
}

/// A request on its way; resolves to its reply as it stands on the wire.
pub struct Forwarded {
    from: From,
    shape: Shape,
}

impl Future for Forwarded {
    type Output = Result<Bytes>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<Bytes>> {
        let shape = self.shape;
        match &mut self.from {
            From::Link(replies, backlog) => {
                let bytes = ready!(Pin::new(replies).poll(context)).unwrap_or_else(|_| Err(link_gone()));
                if let (Some(backlog), Ok(bytes)) = (backlog, &bytes) {
                    backlog.take(bytes.len());
                }
                Poll::Ready(bytes.map(|bytes| shape.take(bytes)))
            }
            From::Local { run, protocol, bytes_max } => {
                let (protocol, bytes_max) = (*protocol, *bytes_max);
                let replies = ready!(run.as_mut().poll(context));
                Poll::Ready(replies.and_then(|replies| shape.encode(&replies.unwrap_or_default(), protocol, bytes_max)))
            }
            From::Failed(error) => Poll::Ready(Err(error.clone())),
        }
    }
}

fn link_gone() -> Error {
    Error::new(Code::ShardDown, "the link to the shard ended; the write may have happened")
}

impl Shape {
    fn take(self, bytes: Bytes) -> Bytes {
        let (Shape::Exec | Shape::Attempt { .. }) = self else { return bytes };
        let mut replies = cut::replies(&bytes);
        let exec = replies.pop().unwrap_or_default();
        if let Shape::Exec = self {
            return exec;
        }
        match replies.get(1) {
            Some(queued) if cut::is_error(queued) => queued.clone(),
            _ if exec.starts_with(b"*1\r\n") => exec.slice(4..),
            _ => exec,
        }
    }

    /// All replies of a keyspace in this process. They share what is stored; only written they would take its size, each time
    /// that they name it.
    fn encode(self, replies: &[Reply], protocol: Protocol, bytes_max: usize) -> Result<Bytes> {
        let bytes: usize = replies.iter().map(Reply::size).sum();
        if bytes > bytes_max && !matches!(self, Shape::Attempt { takes: true }) {
            return Err(too_big(bytes_max));
        }
        let mut out = BytesMut::new();
        replies.iter().for_each(|reply| reply.encode(protocol, &mut out));
        Ok(out.freeze())
    }
}

/// Something that a session is to answer, in the order of the requests.
pub enum Started {
    Reply(Reply),
    /// On its way; the requests behind it may go on.
    Forward(Forwarded),
    /// Several steps; the requests behind it wait.
    Later(BoxFuture<'static, Reply>),
    /// The same, and it waits for something that may never come.
    Waiting(BoxFuture<'static, (Reply, Option<park::GiveBack>)>),
}

impl std::convert::From<Error> for Started {
    fn from(error: Error) -> Started {
        Started::Reply(error.into())
    }
}

fn raw(result: Result<Bytes>) -> Reply {
    result.map_or_else(Reply::Error, Reply::Raw)
}

/// A request: its row, its words, and the bytes that it came in.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    pub row: &'static Row,
    pub words: &'a [Bytes],
    pub raw: &'a Bytes,
    pub protocol: Protocol,
    /// Of the client that sent it.
    pub backlog: &'a Arc<Backlog>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry of `COMMAND INFO`, as Redis 7 writes it, with these flags, categories and subcommands.
    fn entry(first: i64, flags: &[&'static str], categories: &[&'static str], subcommands: &[&'static str]) -> Bytes {
        let list = |words: &[&'static str]| Reply::Array(words.iter().map(|word| Reply::Simple(word)).collect());
        let numbers = [first, first, 1].map(Reply::Integer);
        let head = [Reply::text("name"), Reply::Integer(-2), list(flags)];
        let tail = [list(categories), list(&[]), list(&[]), list(subcommands)];
        let mut out = BytesMut::new();
        let fields = head.into_iter().chain(numbers).chain(tail).collect();
        Reply::Array(vec![Reply::Array(fields)]).encode(Protocol::Resp2, &mut out);
        out.freeze()
    }

    #[test]
    fn only_what_works_on_keys_is_learned_from_a_server() {
        let one = Some(Keys::Range { first: 1, last: 1, step: 1 });
        assert_eq!(keys_reported(&entry(1, &["write", "fast"], &["@write", "@hash"], &[])), one);
        assert_eq!(keys_reported(&entry(0, &["readonly"], &["@read"], &[])), Some(Keys::None));
        assert_eq!(keys_reported(&entry(0, &[], &["@slow"], &["client|tracking"])), None);
        assert_eq!(keys_reported(&entry(0, &["fast"], &["@fast", "@connection"], &[])), None);
        assert_eq!(keys_reported(&entry(0, &["admin"], &[], &[])), None);
        assert_eq!(keys_reported(&Bytes::from_static(b"*1\r\n*-1\r\n")), None);
    }
}
