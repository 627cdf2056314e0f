//! Clients that wait for keys of a shard, without a connection to it for each.
//!
//! A blocking command is tried as `MULTI` lets it run, which never waits. Finds it nothing, the client stands in the line
//! of each of its keys, and the key is *armed*: read on the process's one listening link to the shard, with
//! `CLIENT TRACKING ON`, so that the next change of it is pushed to us. What comes between the first try and the arming is
//! found by a second try. A change wakes the client at the front of the key's line, and only that one; who leaves the
//! front wakes the next, so an element is never looked for by a crowd, and those behind cost nothing.
//!
//! ```text
//! try ── found ──► answer                      changed (push)
//!  └─ nothing ─► stand in line ─► arm ─► try ─ nothing ─► sleep ──┬──► try, arm, try ...
//!                                                                 └── slow poll behind it all
//! ```
//!
//! Promises: first come, first served within a process, for each key; exactly one element is taken for a client, because
//! one task does the trying; a client that goes away while it sleeps holds nothing, and an element that was taken for one
//! that went away in that very moment is pushed back at the end that it came from ([`GiveBack`]), which the end of the
//! process waits for. Who is not polled, because it does not read what was answered before, does not stand in line yet.

use std::collections::{HashMap, HashSet, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use foldhash::fast::RandomState;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout_at};

use super::hub::Hub;
use super::{Forwarded, Request, Started, Ways, check_key, put_request};
use crate::command::ordinary::{Row, StreamOptions, Wait};
use crate::error::{Code, Error, Happened, Result};
use crate::resp::cut;
use crate::resp::reply::{Protocol, Reply};
use crate::shard::redis::link::{Heard, Link};
use crate::shard::{Keys, Keyspace};

/// The slow poll behind the pushes: who is at a front looks again after so long, and as much again at random.
const POLL_EVERY: Duration = Duration::from_secs(5);
/// The same while the listening link is down.
const POLL_BLIND: Duration = Duration::from_millis(500);
/// A wait without an end, in practice.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
/// Most keys that one blocking command names: each is armed by a round trip, and looked at whenever one of them changes.
const KEYS_MAX: usize = 1_024;
/// How long, and how often, it is tried to push back what a shard does not take; less than the time to drain.
const GIVE_BACK_FOR: Duration = Duration::from_secs(20);
const GIVE_BACK_EVERY: Duration = Duration::from_millis(100);

/// The line for one key.
#[derive(Default)]
struct Spot {
    line: VecDeque<Arc<Notify>>,
    /// The next change of the key will be heard, and none was since this was set.
    armed: bool,
    /// Nothing was found there after it was armed, so nobody need look before it changes.
    settled: bool,
}

impl Spot {
    /// Something may be there: the first in line looks.
    fn stir(&mut self) {
        (self.armed, self.settled) = (false, false);
        if let Some(front) = self.line.front() {
            front.notify_one();
        }
    }
}

type Spots = HashMap<Bytes, Spot, RandomState>;

/// The clients of this process that wait for keys of one shard.
pub struct Park {
    spots: Arc<Mutex<Spots>>,
    shard: usize,
    name: Arc<str>,
    keyspace: Keyspace,
    hub: Arc<Hub>,
    /// Opened when first needed, on the thread that needs it.
    ear: OnceLock<Ear>,
}

/// How changes of keys are heard.
enum Ear {
    Link(Arc<Link>),
    Local,
    Deaf,
}

fn lock(spots: &Mutex<Spots>) -> MutexGuard<'_, Spots> {
    spots.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Park {
    pub fn new(shard: usize, name: Arc<str>, keyspace: Keyspace, hub: Arc<Hub>) -> Arc<Park> {
        Arc::new(Park { spots: Arc::default(), shard, name, keyspace, hub, ear: OnceLock::new() })
    }

    /// The one listening link to the shard, which carries subscriptions as well; `None` where none is needed.
    pub fn listener(&self) -> Option<&Arc<Link>> {
        match self.ear() {
            Ear::Link(link) => Some(link),
            Ear::Local | Ear::Deaf => None,
        }
    }

    fn ear(&self) -> &Ear {
        self.ear.get_or_init(|| match &self.keyspace {
            Keyspace::None => Ear::Deaf,
            Keyspace::Local(keys) => {
                listen_local(&**keys, self.spots.clone());
                Ear::Local
            }
            Keyspace::Server(dial) => {
                let (spots, hub, shard) = (self.spots.clone(), self.hub.clone(), self.shard);
                let on_heard = move |link: &Link, heard: Heard| match heard {
                    Heard::Opened => {
                        // Nothing waits for the reply: where tracking is not known the poll serves.
                        drop(link.submit(b"*3\r\n$6\r\nCLIENT\r\n$8\r\nTRACKING\r\n$2\r\nON\r\n", 1));
                        hub.opened(shard, link);
                        forget_arms(&spots);
                    }
                    Heard::Lost => {
                        hub.lost(shard);
                        forget_arms(&spots);
                    }
                    Heard::Push(push) => match invalidated(&push) {
                        Some(Some(keys)) => keys.iter().for_each(|key| changed(&spots, key)),
                        Some(None) => forget_arms(&spots),
                        None => hub.heard(shard, &push),
                    },
                };
                Ear::Link(Link::listen(self.name.clone(), dial.clone(), Box::new(on_heard)))
            }
        })
    }

    /// From here on a change of the key wakes the front of its line. False when that cannot be said.
    async fn arm(&self, key: &Bytes) -> bool {
        let ear = self.ear();
        // Set first: a change that comes before the answer takes it away again.
        if let Some(spot) = lock(&self.spots).get_mut(key) {
            spot.armed = true;
        }
        let armed = match ear {
            Ear::Local => true,
            Ear::Deaf => false,
            Ear::Link(link) => {
                let mut raw = BytesMut::new();
                put_request(&mut raw, &[Bytes::from_static(b"TYPE"), key.clone()]);
                matches!(link.submit(&raw, 1).await, Ok(Ok(reply)) if !cut::is_error(&reply))
            }
        };
        if !armed && let Some(spot) = lock(&self.spots).get_mut(key) {
            spot.armed = false;
        }
        armed
    }
}

fn listen_local(keys: &dyn Keys, spots: Arc<Mutex<Spots>>) {
    keys.observe(Arc::new(move |key: &[u8]| changed(&spots, key)));
}

/// The keys of an invalidation; the inner `None` is all of them. `None`: it is another push.
fn invalidated(push: &Bytes) -> Option<Option<Vec<Bytes>>> {
    let parts = cut::items(push)?;
    if cut::text(parts.first()?)? != b"invalidate"[..] {
        return None;
    }
    Some(parts.get(1).and_then(cut::items).map(|keys| keys.iter().filter_map(cut::text).collect()))
}

fn changed(spots: &Mutex<Spots>, key: &[u8]) {
    if let Some(spot) = lock(spots).get_mut(key) {
        spot.stir();
    }
}

fn forget_arms(spots: &Mutex<Spots>) {
    lock(spots).values_mut().for_each(Spot::stir);
}

/// A client's places in the lines of its keys; leaves them when dropped.
struct Standing {
    bell: Arc<Notify>,
    places: Vec<(Arc<Park>, Bytes)>,
}

impl Standing {
    fn join(keys: Vec<(Arc<Park>, Bytes)>) -> Standing {
        let bell = Arc::new(Notify::new());
        let mut known = HashSet::with_hasher(RandomState::default());
        for (park, key) in &keys {
            // A key that is named twice has one place in line.
            if known.insert(key) {
                lock(&park.spots).entry(key.clone()).or_default().line.push_back(bell.clone());
            }
        }
        Standing { bell, places: keys }
    }

    /// Whether the client is at the front for the key, and whether something may be there.
    fn state(&self, place: usize) -> (bool, bool) {
        let Some((park, key)) = self.places.get(place) else { return (false, false) };
        let spots = lock(&park.spots);
        let Some(spot) = spots.get(key) else { return (false, false) };
        (spot.line.front().is_some_and(|front| Arc::ptr_eq(front, &self.bell)), !spot.settled)
    }

    /// Nothing was found there: until the key changes, nobody need look. False when it has changed meanwhile.
    fn settle(&self, place: usize) -> bool {
        let Some((park, key)) = self.places.get(place) else { return true };
        lock(&park.spots).get_mut(key).is_none_or(|spot| {
            spot.settled = spot.armed;
            spot.settled
        })
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        for (park, key) in &self.places {
            let mut spots = lock(&park.spots);
            let Some(spot) = spots.get_mut(key) else { continue };
            // A key named twice is left once.
            let was_front = spot.line.front().is_some_and(|front| Arc::ptr_eq(front, &self.bell));
            spot.line.retain(|bell| !Arc::ptr_eq(bell, &self.bell));
            match spot.line.front() {
                None => {
                    spots.remove(key);
                }
                // It looks, or where nothing can be there takes over the slow poll.
                Some(next) if was_front => next.notify_one(),
                Some(_) => {}
            }
        }
    }
}

/// One client's blocking command.
struct Waiter {
    ways: Arc<Ways>,
    row: &'static Row,
    protocol: Protocol,
    words: Vec<Bytes>,
    kind: Kind,
    /// In the order of the request: the shard, the key, and where the key stands.
    keys: Vec<(usize, Bytes, usize)>,
}

/// How a request with fewer keys is made of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `BLPOP key ... timeout`.
    Popping,
    /// `BLMPOP timeout count key ... rest`.
    Numbered,
    /// `XREAD ... STREAMS key ... id ...`.
    Streams,
    /// Both keys of `BLMOVE` belong together.
    Whole,
}

/// Starts a blocking command.
pub fn start(ways: &Arc<Ways>, wait: Wait, request: Request<'_>) -> Started {
    let Request { row, words, protocol, .. } = request;
    if !row.has_arity(words.len()) {
        return row.wrong_arity().into();
    }
    if ways.shards() > 1
        && let Some(fault) = row.fault(words)
    {
        return fault.into();
    }
    let limit = match how_long(wait, words) {
        // It does not wait, or the server must say what is wrong with it.
        None => {
            // As it came goes only what surely does not wait: the link is everybody's.
            let is_plain =
                wait == Wait::Option && StreamOptions::of(words).is_some_and(|options| options.block.is_none());
            return match ways.shard_of(row.keys, words) {
                Ok(shard) if is_plain => Started::Forward(ways.forward(shard, request)),
                Ok(shard) => Started::Forward(ways.attempt(shard, protocol, words.to_vec(), false)),
                Err(error) => error.into(),
            };
        }
        Some(limit) => limit,
    };
    match Waiter::new(ways, wait, request) {
        // Without a key there is nothing to wait for: the server says what is wrong.
        Ok(waiter) if waiter.keys.is_empty() => Started::Forward(ways.attempt(0, protocol, words.to_vec(), false)),
        Ok(waiter) => Started::Waiting(Box::pin(waiter.wait(limit))),
        Err(error) => error.into(),
    }
}

/// `None`: the request does not wait, or its timeout makes no sense.
fn how_long(wait: Wait, words: &[Bytes]) -> Option<Duration> {
    let text = std::str::from_utf8(wait.word(words)?).ok()?;
    let limit = match wait {
        Wait::Option => Duration::from_millis(text.parse().ok()?),
        _ => Duration::try_from_secs_f64(text.parse().ok()?).ok()?,
    };
    Some(if limit.is_zero() { FOREVER } else { limit.min(FOREVER) })
}

impl Waiter {
    fn new(ways: &Arc<Ways>, wait: Wait, request: Request<'_>) -> Result<Waiter> {
        let Request { row, words, protocol, .. } = request;
        let kind = match (wait, row.name) {
            (_, "BLMOVE" | "BRPOPLPUSH") => Kind::Whole,
            (Wait::SecondsLast, _) => Kind::Popping,
            (Wait::SecondsFirst, _) => Kind::Numbered,
            (Wait::Option, _) => Kind::Streams,
        };
        let mut waiter = Waiter { ways: ways.clone(), row, protocol, words: words.to_vec(), kind, keys: Vec::new() };
        waiter.keys = waiter.homes(ways)?;
        match waiter.keys.len() {
            0..=KEYS_MAX => Ok(waiter),
            count => {
                let text = format!("{} waits for at most {KEYS_MAX} keys, and this names {count}", row.name);
                Err(Error::new(Code::TooBig, text))
            }
        }
    }

    /// The keys, where they live by a shard map.
    fn homes(&self, ways: &Ways) -> Result<Vec<(usize, Bytes, usize)>> {
        let mut keys = Vec::new();
        self.row.keys.each(&self.words, |at| {
            let key = self.words.get(at).cloned().unwrap_or_default();
            check_key(&key)?;
            keys.push((ways.home(&key), key, at));
            Ok(())
        })?;
        if self.kind == Kind::Whole {
            ways.shard_of(self.row.keys, &self.words)?;
            keys.truncate(1);
        }
        Ok(keys)
    }

    /// Goes by the present shard map; whether a key has another home there.
    fn follow(&mut self) -> Result<bool> {
        if self.ways.is_current() {
            return Ok(false);
        }
        let ways = Ways::of_thread(&self.ways.shared);
        let keys = self.homes(&ways)?;
        let mut pairs = keys.iter().zip(&self.keys);
        let has_moved = pairs.any(|(now, before)| ways.number(now.0) != self.ways.number(before.0));
        (self.ways, self.keys) = (ways, keys);
        Ok(has_moved)
    }

    /// The request with these of its keys alone.
    fn words_for(&self, keys: &[&(usize, Bytes, usize)]) -> Vec<Bytes> {
        if keys.len() == self.keys.len() {
            return self.words.clone();
        }
        let names = keys.iter().map(|(_, key, _)| key.clone());
        let count = self.keys.len();
        match self.kind {
            Kind::Whole => self.words.clone(),
            Kind::Popping => {
                self.words.iter().take(1).cloned().chain(names).chain(self.words.last().cloned()).collect()
            }
            Kind::Numbered => {
                let rest = self.words.iter().skip(3 + count).cloned();
                let number = Bytes::from(keys.len().to_string());
                self.words.iter().take(2).cloned().chain([number]).chain(names).chain(rest).collect()
            }
            Kind::Streams => {
                let first = self.keys.first().map_or(0, |(_, _, at)| *at);
                let ids = keys.iter().filter_map(|(_, _, at)| self.words.get(at + count).cloned());
                self.words.iter().take(first).cloned().chain(names).chain(ids).collect()
            }
        }
    }

    /// Tries the keys that `wanted` lets, shard by shard in the order of the request; neighbours on one shard at once.
    async fn attempt(&self, wanted: impl Fn(usize) -> bool) -> Option<(Reply, Option<GiveBack>)> {
        let wanted: Vec<&(usize, Bytes, usize)> =
            self.keys.iter().enumerate().filter(|(place, _)| wanted(*place)).map(|(_, key)| key).collect();
        for group in wanted.chunk_by(|a, b| a.0 == b.0) {
            let shard = group.first().map_or(0, |key| key.0);
            let words = self.words_for(group);
            let sent = self.ways.attempt(shard, self.protocol, words, self.kind != Kind::Streams);
            let back = Back::new(&self.ways, shard, self.words.clone());
            match Taking(Some((sent, back))).reply().await {
                Err(error) => return Some((error.into(), None)),
                Ok((reply, _)) if cut::is_null(&reply) => {}
                Ok((reply, back)) => return Some((Reply::Raw(reply.clone()), GiveBack::of(reply, back))),
            }
        }
        None
    }

    /// Stands in line for every key.
    fn stand(&self) -> Standing {
        let keys = self.keys.iter().map(|(shard, key, _)| (self.ways.park(*shard), key.clone()));
        Standing::join(keys.collect())
    }

    async fn wait(mut self, limit: Duration) -> (Reply, Option<GiveBack>) {
        let deadline = Instant::now() + limit;
        let mut changes = self.ways.shared.dispatcher.changes();
        if let Err(error) = self.follow() {
            return (error.into(), None);
        }
        if self.row.name == "XREAD"
            && let Err(reply) = self.pin_last_ids().await
        {
            return (reply, None);
        }
        loop {
            let standing = self.stand();
            if let Some(answer) = self.served(&standing, deadline, &mut changes).await {
                return answer;
            }
        }
    }

    /// Tries and sleeps until there is an answer. `None`: a key has another home, where it stands in no line.
    async fn served(
        &mut self,
        standing: &Standing,
        deadline: Instant,
        changes: &mut watch::Receiver<u64>,
    ) -> Option<(Reply, Option<GiveBack>)> {
        let places = 0..standing.places.len();
        let at_front = |place: usize| standing.state(place).0;
        let restless = |place: usize| standing.state(place) == (true, true);
        let (mut polled, mut woken) = (false, true);
        loop {
            let open: Vec<usize> = places.clone().filter(|at| restless(*at) || (polled && at_front(*at))).collect();
            let is_open = |at: usize| open.binary_search(&at).is_ok();
            if woken && let Some(found) = self.attempt(is_open).await {
                return Some(found);
            }
            let mut heard = true;
            for at in &open {
                let (park, key) = &standing.places[*at];
                heard &= park.arm(key).await;
            }
            if let Some(found) = self.attempt(is_open).await {
                return Some(found);
            }
            let still = open.iter().filter(|at| !standing.settle(**at)).count() == 0;
            woken = heard && !still;
            if woken {
                continue;
            }
            let pause = if heard { POLL_EVERY } else { POLL_BLIND };
            // Who is at no front sleeps until that changes.
            let until = match places.clone().any(at_front) {
                true => deadline.min(Instant::now() + pause.mul_f64(1.0 + rand::random::<f64>())),
                false => deadline,
            };
            let rang = tokio::select! {
                rang = timeout_at(until, standing.bell.notified()) => rang.is_ok(),
                Ok(()) = changes.changed() => match self.follow() {
                    Ok(false) => true,
                    Ok(true) => return None,
                    Err(error) => return Some((error.into(), None)),
                },
            };
            if !rang && until >= deadline {
                return Some((Reply::NullArray, None));
            }
            (polled, woken) = (!rang, rang);
        }
    }

    /// `$` means the last entry at the time of the request, not at the time of a later try.
    async fn pin_last_ids(&mut self) -> std::result::Result<(), Reply> {
        let count = self.keys.len();
        for (shard, key, at) in &self.keys {
            if self.words.get(at + count).is_none_or(|id| id.as_ref() != b"$") {
                continue;
            }
            let ask = [&b"XREVRANGE"[..], key, b"+", b"-", b"COUNT", b"1"].map(Bytes::copy_from_slice);
            let reply = self.ways.send(*shard, Protocol::Resp2, ask.to_vec()).await?;
            if cut::is_error(&reply) {
                return Err(Reply::Raw(reply));
            }
            let entry = cut::items(&reply).and_then(|entries| cut::items(entries.first()?));
            let id = entry.and_then(|entry| cut::text(entry.first()?));
            if let Some(word) = self.words.get_mut(at + count) {
                *word = id.unwrap_or(Bytes::from_static(b"0-0"));
            }
        }
        Ok(())
    }
}

/// What is needed to push back what a request took. While there is one, what it took is neither its client's nor back.
struct Back {
    ways: Arc<Ways>,
    shard: usize,
    words: Vec<Bytes>,
}

impl Back {
    fn new(ways: &Arc<Ways>, shard: usize, words: Vec<Bytes>) -> Back {
        ways.shared.unsettled.fetch_add(1, Ordering::Relaxed);
        Back { ways: ways.clone(), shard, words }
    }
}

impl Drop for Back {
    fn drop(&mut self) {
        self.ways.shared.unsettled.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A try on its way. Dropped before its reply came, what it takes is pushed back.
struct Taking(Option<(Forwarded, Back)>);

impl Taking {
    async fn reply(mut self) -> Result<(Bytes, Back)> {
        let gone = || Error::bad("asked twice");
        let reply = std::future::poll_fn(|context| match &mut self.0 {
            Some((sent, _)) => Pin::new(sent).poll(context),
            None => Poll::Ready(Err(gone())),
        });
        let reply = reply.await;
        let (_, back) = self.0.take().ok_or_else(gone)?;
        Ok((reply?, back))
    }
}

impl Drop for Taking {
    fn drop(&mut self) {
        let Some((sent, back)) = self.0.take() else { return };
        tokio::spawn(async move {
            if let Ok(reply) = sent.await {
                drop(GiveBack::of(reply, back));
            }
        });
    }
}

/// Pushes what was taken for a client back at the end that it came from, unless it is settled first.
pub struct GiveBack {
    back: Option<Back>,
    /// The request that undoes it.
    undo: Vec<Bytes>,
}

impl std::fmt::Debug for GiveBack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GiveBack({} words)", self.undo.len())
    }
}

impl GiveBack {
    /// `None` where nothing was taken out of the shard: a move, a stream, an error.
    fn of(reply: Bytes, back: Back) -> Option<GiveBack> {
        let undo = undo(&reply, &back.words)?;
        Some(GiveBack { back: Some(back), undo })
    }

    /// The client has it.
    pub fn settle(mut self) {
        self.back = None;
    }
}

impl Drop for GiveBack {
    fn drop(&mut self) {
        if let Some(back) = self.back.take() {
            tokio::spawn(push_back(back, std::mem::take(&mut self.undo)));
        }
    }
}

/// Sends the request that undoes it until it is done, or may have been.
async fn push_back(back: Back, undo: Vec<Bytes>) {
    let until = Instant::now() + GIVE_BACK_FOR;
    loop {
        let error = match back.ways.send(back.shard, Protocol::Resp2, undo.clone()).await {
            Ok(reply) if !cut::is_error(&reply) => return,
            // What a server refuses it has not done.
            Ok(reply) => Error::bad(String::from_utf8_lossy(&reply).trim_end().to_owned()),
            Err(error) => error,
        };
        if error.happened == Happened::Maybe || Instant::now() >= until {
            let (shard, key) =
                (back.ways.name(back.shard), String::from_utf8_lossy(undo.get(1).map_or(&[][..], |key| key)));
            tracing::error!(%shard, %key, %error, "what was taken for a client that is gone could not be pushed back");
            return;
        }
        sleep(GIVE_BACK_EVERY).await;
    }
}

/// The request that puts back what the reply took out.
fn undo(reply: &Bytes, words: &[Bytes]) -> Option<Vec<Bytes>> {
    let parts = cut::items(reply)?;
    let key = cut::text(parts.first()?)?;
    let name = words.first()?.to_ascii_uppercase();
    let word = |word: &'static [u8]| Bytes::from_static(word);
    // Behind the keys, which may be named as an end is.
    let from_left = || {
        let keys = std::str::from_utf8(words.get(2)?).ok()?.parse::<usize>().ok()?;
        Some(words.get(keys.checked_add(3)?)?.eq_ignore_ascii_case(b"LEFT"))
    };
    match name.as_slice() {
        b"BLPOP" => Some(vec![word(b"LPUSH"), key, cut::text(parts.get(1)?)?]),
        b"BRPOP" => Some(vec![word(b"RPUSH"), key, cut::text(parts.get(1)?)?]),
        b"BLMPOP" => {
            let push = if from_left()? { word(b"LPUSH") } else { word(b"RPUSH") };
            let elements = cut::items(parts.get(1)?)?;
            Some([push, key].into_iter().chain(elements.iter().rev().filter_map(cut::text)).collect())
        }
        b"BZPOPMIN" | b"BZPOPMAX" => {
            Some(vec![word(b"ZADD"), key, cut::text(parts.get(2)?)?, cut::text(parts.get(1)?)?])
        }
        b"BZMPOP" => {
            let mut undo = vec![word(b"ZADD"), key];
            for pair in cut::items(parts.get(1)?)? {
                let pair = cut::items(&pair)?;
                undo.extend([cut::text(pair.get(1)?)?, cut::text(pair.first()?)?]);
            }
            Some(undo)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_taken_goes_back_at_its_end() {
        for (request, reply, expected) in [
            ("BLPOP a 0", "*2\r\n$1\r\na\r\n$1\r\nx\r\n", Some("LPUSH a x")),
            ("brpop b a 0", "*2\r\n$1\r\na\r\n$1\r\nx\r\n", Some("RPUSH a x")),
            ("BLMPOP 0 1 a LEFT", "*2\r\n$1\r\na\r\n*2\r\n$1\r\nx\r\n$1\r\ny\r\n", Some("LPUSH a y x")),
            ("BLMPOP 0 2 left a RIGHT", "*2\r\n$1\r\na\r\n*1\r\n$1\r\nx\r\n", Some("RPUSH a x")),
            ("BZPOPMIN a 0", "*3\r\n$1\r\na\r\n$1\r\nx\r\n,1.5\r\n", Some("ZADD a 1.5 x")),
            ("BZMPOP 0 1 a MIN", "*2\r\n$1\r\na\r\n*1\r\n*2\r\n$1\r\nx\r\n$1\r\n2\r\n", Some("ZADD a 2 x")),
            ("BLMOVE a b LEFT LEFT 0", "$1\r\nx\r\n", None),
            ("BLPOP a 0", "-WRONGTYPE no\r\n", None),
        ] {
            let words: Vec<Bytes> = request.split(' ').map(|word| Bytes::copy_from_slice(word.as_bytes())).collect();
            let undone = undo(&Bytes::copy_from_slice(reply.as_bytes()), &words);
            let line = undone.map(|words| {
                words.iter().map(|word| String::from_utf8_lossy(word).into_owned()).collect::<Vec<_>>().join(" ")
            });
            assert_eq!(line.as_deref(), expected, "{request}");
        }
    }

    #[test]
    fn timeouts_are_read_in_redis_units() {
        let limit = |wait, line: &str| {
            let words: Vec<Bytes> = line.split(' ').map(|word| Bytes::copy_from_slice(word.as_bytes())).collect();
            how_long(wait, &words)
        };
        assert_eq!(limit(Wait::SecondsLast, "BLPOP a 0.5"), Some(Duration::from_millis(500)));
        assert_eq!(limit(Wait::SecondsLast, "BLPOP a 0"), Some(FOREVER));
        assert_eq!(limit(Wait::SecondsLast, "BLPOP a -1"), None);
        assert_eq!(limit(Wait::SecondsFirst, "BLMPOP 2 1 a LEFT"), Some(Duration::from_secs(2)));
        assert_eq!(limit(Wait::Option, "XREAD BLOCK 20 STREAMS a 0"), Some(Duration::from_millis(20)));
        assert_eq!(limit(Wait::Option, "XREAD STREAMS BLOCK 0"), None);
        assert_eq!(limit(Wait::Option, "XREAD BLOCK -1 STREAMS a 0"), None);
        assert_eq!(limit(Wait::Option, "XREADGROUP GROUP g block BLOCK 0 STREAMS a >"), Some(FOREVER));
        assert_eq!(limit(Wait::Option, "XREADGROUP GROUP BLOCK 5 STREAMS a >"), None);
    }
}
