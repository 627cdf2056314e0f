//! Worker sessions as this process keeps them: who is connected, what they may hold, and the word to the shards for them.
//!
//! A session is a worker's name, or a connection without one. A lease that was taken with `BIND` hangs on it from when a
//! later request of its connection shows that the delivery was read ([`Membership::note_request`]); until then it is on its
//! first lease, so that what nobody read is nobody's for long. On the shard the session has an end, and this process moves
//! it for all sessions of a queue in one op ([`keep`], one task for each lane that has any): what that costs does not
//! depend on how many leases hang on them.
//!
//! Promises: the end is moved at least three times before it comes; when the last connection of a session here closes, its
//! part of the session ends after the grace (without a name at once), what was not read included; a session that is known
//! to a shard is kept from when a connection of that name asks for a job of that queue. A process that is killed leaves
//! the end it last gave, one that drains leaves the sessions with names a full one. Leaves the rules to the shards.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use dashmap::DashMap;
use foldhash::fast::RandomState;
use rand::Rng;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::lane::{Hold, Lane};
use crate::clock::Millis;
use crate::error::{Error, Result};
use crate::job::{Lease, Name, TOKEN_MAX};
use crate::shard::{Action, Op, Outcome, Party};

/// Before leases are hung on their sessions: what is over by then costs nothing more.
const GATHER: Duration = Duration::from_millis(100);
/// How soon a shard that failed is told again.
const AGAIN_MS: std::ops::Range<u64> = 200..500;
/// Sessions and leases in one op.
const OP_SIZE_MAX: usize = 256;
/// Most sessions of one connection.
const NAMES_MAX: usize = 64;
/// Queues that a session is known to have asked for; beyond it they are asked for its leases again.
const QUEUES_KEPT_MAX: usize = 1_024;
/// Before the name of a worker, and before the number of a connection without one.
const NAMED: u8 = b'w';
const NAMELESS: u8 = b'c';

/// How long sessions last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// From each word to the shard, should it be the last.
    pub keep_ms: Millis,
    /// From when the last connection of a session with a name has closed.
    pub grace_ms: Millis,
}

impl Default for Terms {
    fn default() -> Self {
        Terms { keep_ms: 10_000, grace_ms: 2_000 }
    }
}

/// The sessions of which this process has connections.
pub struct Workers {
    /// The name of this process to the shards.
    keeper: u64,
    terms: Terms,
    workers: DashMap<Bytes, Arc<Worker>, RandomState>,
    draining: AtomicBool,
}

/// One session.
pub struct Worker {
    /// What the shards call it.
    key: Bytes,
    /// The numbers of its connections; changed under the lock of the map of workers.
    connections: Mutex<Vec<u64>>,
    /// When the shards of a queue were asked what the session has there.
    asked: Mutex<HashMap<Name, Instant, RandomState>>,
    /// Where it has bonds; changed under the lock of the bonds.
    places: Mutex<Places>,
}

/// What a DEQUEUE's jobs are bound to.
#[derive(Clone, Debug)]
pub struct Binding {
    worker: Arc<Worker>,
    run_ms: Millis,
}

/// What one session may have of one queue on one lane's shard.
struct Bond {
    worker: Arc<Worker>,
    /// To be hung on the session.
    fresh: Leases,
    /// The shard has yet to hear of something.
    is_new: bool,
}

/// Leases, with how long they may run.
type Leases = Vec<(Millis, Lease)>;
/// Lanes by their shards' names, and queues.
type Places = HashMap<(Arc<str>, Name), Arc<Lane>, RandomState>;
type Bonds = HashMap<(Name, Bytes), Bond, RandomState>;

/// The bonds of one lane.
#[derive(Default)]
pub struct Book {
    bonds: Mutex<Bonds>,
    bell: Notify,
    /// A task keeps them. Changed under the lock of the bonds.
    is_kept: AtomicBool,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Worker({})", String::from_utf8_lossy(&self.key))
    }
}

impl Workers {
    pub fn new(terms: Terms) -> Workers {
        Workers {
            keeper: rand::rng().random_range(0..TOKEN_MAX),
            terms,
            workers: DashMap::default(),
            draining: AtomicBool::new(false),
        }
    }

    /// From now on connections close because the process ends, and their workers go on elsewhere.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// The sessions with connections here, by what the shards call them, and the numbers of those.
    pub fn connections(&self) -> Vec<(Bytes, Vec<u64>)> {
        self.workers.iter().map(|worker| (worker.key.clone(), lock(&worker.connections).clone())).collect()
    }

    fn enter(&self, key: Bytes, connection: u64) -> Arc<Worker> {
        let worker = self.workers.entry(key.clone()).or_insert_with(|| {
            Arc::new(Worker { key, connections: Mutex::default(), asked: Mutex::default(), places: Mutex::default() })
        });
        lock(&worker.connections).push(connection);
        worker.clone()
    }

    /// Whether the connection was the last.
    fn leave(&self, worker: &Worker, connection: u64) -> bool {
        // Decided under the lock of the map, so that nobody enters a session that is given up.
        let left = self.workers.remove_if(&worker.key, |_, worker| {
            let mut connections = lock(&worker.connections);
            connections.retain(|known| *known != connection);
            connections.is_empty()
        });
        left.is_some()
    }

    /// How long a session lasts that loses its last connection.
    fn grace_ms(&self, worker: &Worker) -> Millis {
        match (worker.key.first() == Some(&NAMED), self.draining.load(Ordering::Relaxed)) {
            (false, _) => 0,
            (true, false) => self.terms.grace_ms,
            (true, true) => self.terms.grace_ms.max(self.terms.keep_ms),
        }
    }

    fn op(&self, queue: Name, keep_ms: Millis, parties: Vec<Party>) -> Op {
        Op { queue, action: Action::Keep { keeper: self.keeper, keep_ms, parties } }
    }
}

/// The worker's name in what the shards call its session; `None`: it has none.
pub fn worker_name(key: &Bytes) -> Option<Bytes> {
    key.strip_prefix(&[NAMED]).map(|name| key.slice_ref(name))
}

impl Worker {
    /// The shards of a queue that was not asked for lately may know the session from elsewhere: from a proxy that is gone, and
    /// soon with it what it kept.
    fn ask(self: &Arc<Worker>, queues: &[Name], lanes: &[Arc<Lane>], workers: &Arc<Workers>) {
        for queue in queues {
            let is_new = {
                let mut asked = lock(&self.asked);
                if asked.len() >= QUEUES_KEPT_MAX {
                    asked.clear();
                }
                let lately = Duration::from_millis(workers.terms.keep_ms / 2);
                let is_new = asked.get(queue).is_none_or(|at| at.elapsed() >= lately);
                if is_new {
                    asked.insert(queue.clone(), Instant::now());
                }
                is_new
            };
            if is_new {
                lanes.iter().for_each(|lane| self.note(lane, queue.clone(), Vec::new(), workers));
            }
        }
    }

    /// Has the lane's shard hear of the session soon, and of leases that are its own.
    fn note(self: &Arc<Worker>, lane: &Arc<Lane>, queue: Name, leases: Leases, workers: &Arc<Workers>) {
        let book = &lane.book;
        let mut bonds = lock(&book.bonds);
        lock(&self.places).insert((lane.name().clone(), queue.clone()), lane.clone());
        let new = || Bond { worker: self.clone(), fresh: Vec::new(), is_new: true };
        let bond = bonds.entry((queue, self.key.clone())).or_insert_with(new);
        // The session was left and entered again meanwhile: from here it is this one's.
        bond.worker = self.clone();
        bond.is_new = true;
        bond.fresh.extend(leases);
        if !book.is_kept.swap(true, Ordering::Relaxed) {
            tokio::spawn(keep(lane.clone(), workers.clone()));
        }
        drop(bonds);
        book.bell.notify_one();
    }
}

/// What was written to a connection and not shown to be read.
struct Unread {
    binding: Binding,
    lane: Arc<Lane>,
    queue: Name,
    leases: Vec<Lease>,
    /// A request that begins at or after this many bytes of the connection's input was sent after the delivery was.
    /// `None`: only a request that names the lease shows anything.
    from: Option<u64>,
}

/// What one connection has to do with worker sessions. Dropped, the connection has closed.
pub struct Membership {
    workers: Arc<Workers>,
    connection: u64,
    joined: Vec<Arc<Worker>>,
    unread: Vec<Unread>,
}

impl Membership {
    pub fn new(workers: Arc<Workers>, connection: u64) -> Membership {
        Membership { workers, connection, joined: Vec::new(), unread: Vec::new() }
    }

    /// The connection is one of the session of this name, or where it is empty one by itself, and asks for jobs of these
    /// queues.
    pub fn join(&mut self, name: &[u8], queues: &[Name], lanes: &[Arc<Lane>], run_ms: Millis) -> Result<Binding> {
        let key: Bytes = match name {
            [] => format!("{}{:012x}{:x}", NAMELESS as char, self.workers.keeper, self.connection).into(),
            name => [&[NAMED], name].concat().into(),
        };
        let worker = match self.joined.iter().find(|worker| worker.key == key) {
            Some(worker) => worker.clone(),
            None if self.joined.len() >= NAMES_MAX => {
                let text = format!("this connection has bound jobs to {NAMES_MAX} workers already, which is the limit");
                return Err(Error::bad(text));
            }
            None => {
                let worker = self.workers.enter(key, self.connection);
                self.joined.push(worker.clone());
                worker
            }
        };
        if !name.is_empty() {
            worker.ask(queues, lanes, &self.workers);
        }
        Ok(Binding { worker, run_ms })
    }

    /// A delivery was written: it is on its first lease until a request says more.
    pub fn note_written(&mut self, hold: Hold, binding: Binding, from: Option<u64>) {
        if let Some((lane, queue, leases)) = hold.into_parts() {
            self.unread.push(Unread { binding, lane, queue, leases, from });
        }
    }

    pub fn has_unread(&self) -> bool {
        !self.unread.is_empty()
    }

    /// A request came that begins at `at` of the connection's input. Leases that it `ends` need nothing more; those that it
    /// names otherwise were read, and so was all that was written before it was sent.
    pub fn note_request(&mut self, at: u64, named: &[Lease], ends: bool) {
        for mut unread in std::mem::take(&mut self.unread) {
            if ends {
                unread.leases.retain(|lease| !named.contains(lease));
            }
            let is_read = unread.from.is_some_and(|from| at >= from);
            let read = |lease: &Lease| is_read || named.contains(lease);
            let (read, rest): (Vec<Lease>, Vec<Lease>) = unread.leases.iter().partition(|lease| read(lease));
            let Unread { binding, lane, queue, .. } = &unread;
            if !read.is_empty() {
                let leases = read.into_iter().map(|lease| (binding.run_ms, lease)).collect();
                binding.worker.note(lane, queue.clone(), leases, &self.workers);
            }
            if !rest.is_empty() {
                self.unread.push(Unread { leases: rest, ..unread });
            }
        }
    }

    /// Gives up this process's part of a session whose last connection this was.
    fn give_up(&mut self, worker: &Arc<Worker>) {
        let mut places = std::mem::take(&mut *lock(&worker.places));
        for unread in self.unread.iter().filter(|unread| Arc::ptr_eq(&unread.binding.worker, worker)) {
            places.insert((unread.lane.name().clone(), unread.queue.clone()), unread.lane.clone());
        }
        let keep_ms = self.workers.grace_ms(worker);
        for ((shard, queue), lane) in places {
            let mut bonds = lock(&lane.book.bonds);
            let mut fresh = Vec::new();
            match bonds.entry((queue.clone(), worker.key.clone())) {
                // Another connection of that name came meanwhile, and keeps it.
                Entry::Occupied(bond) if !Arc::ptr_eq(&bond.get().worker, worker) => continue,
                Entry::Occupied(bond) => fresh = bond.remove().fresh,
                Entry::Vacant(_) => {}
            }
            let is_here = |unread: &&Unread| {
                Arc::ptr_eq(&unread.binding.worker, worker) && *unread.lane.name() == shard && unread.queue == queue
            };
            // Not read, so no longer than their first lease, whoever takes the session over.
            fresh.extend(self.unread.iter().filter(is_here).flat_map(|unread| &unread.leases).map(|lease| (0, *lease)));
            // Submitted under the lock, as every word is, so that none of before comes after this one.
            for parties in chunks(vec![(worker.key.clone(), fresh)]) {
                drop(lane.submit(self.workers.op(queue.clone(), keep_ms, parties), 0));
            }
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        for worker in std::mem::take(&mut self.joined) {
            if self.workers.leave(&worker, self.connection) {
                self.give_up(&worker);
            }
        }
    }
}

/// Parties of a few ops, none of which is large; a session without leases is a party too.
fn chunks(sessions: Vec<(Bytes, Leases)>) -> Vec<Vec<Party>> {
    let mut ops: Vec<Vec<Party>> = Vec::new();
    let mut size = OP_SIZE_MAX;
    let mut put = |party: Party| {
        let more = 1 + party.leases.len();
        if size + more > OP_SIZE_MAX {
            ops.push(Vec::new());
            size = 0;
        }
        size += more;
        ops.last_mut().into_iter().for_each(|op| op.push(party.clone()));
    };
    for (session, mut leases) in sessions {
        leases.sort_by_key(|(run_ms, _)| *run_ms);
        let mut parties: Vec<Party> = Vec::new();
        for (run_ms, lease) in leases {
            match parties.last_mut() {
                Some(party) if party.run_ms == run_ms && party.leases.len() < OP_SIZE_MAX / 2 => {
                    party.leases.push(lease);
                }
                _ => parties.push(Party { session: session.clone(), run_ms, leases: vec![lease] }),
            }
        }
        if parties.is_empty() {
            parties.push(Party { session, run_ms: 0, leases: Vec::new() });
        }
        parties.into_iter().for_each(&mut put);
    }
    ops
}

/// A word that is on its way to the shard.
struct Word {
    queue: Name,
    parties: Vec<Party>,
    outcome: oneshot::Receiver<Result<Outcome>>,
}

/// Gives the lane's shard the word for all sessions of its book, again and again, and at once for what is new; ends when
/// there is nothing left in it.
async fn keep(lane: Arc<Lane>, workers: Arc<Workers>) {
    let third = |workers: &Workers| {
        let part = rand::rng().random_range(0.7..1.0);
        Duration::from_millis(workers.terms.keep_ms / 3).mul_f64(part)
    };
    let mut all_at = Instant::now() + third(&workers);
    loop {
        let all = tokio::select! {
            () = tokio::time::sleep_until(all_at) => true,
            () = lane.book.bell.notified() => {
                tokio::time::sleep(GATHER).await;
                false
            }
        };
        if all {
            all_at = Instant::now() + third(&workers);
        }
        let mut failed = false;
        // A session may have several parties: what was counted after the last one is what it has.
        let mut kept: HashMap<(Name, Bytes), u64, RandomState> = HashMap::default();
        for Word { queue, parties, outcome } in speak(&lane, &workers, all) {
            match outcome.await {
                Ok(Ok(Outcome::Kept(counts))) => {
                    let sessions = parties.into_iter().map(|party| (queue.clone(), party.session));
                    kept.extend(sessions.zip(counts));
                }
                _ => {
                    failed = true;
                    note_failed(&lane.book, &queue, parties);
                }
            }
        }
        note_kept(&lane, kept);
        if failed {
            all_at = all_at.min(Instant::now() + Duration::from_millis(rand::rng().random_range(AGAIN_MS)));
        }
        let bonds = lock(&lane.book.bonds);
        if bonds.is_empty() {
            lane.book.is_kept.store(false, Ordering::Relaxed);
            return;
        }
    }
}

/// Submits the words for all bonds, or for the new ones.
fn speak(lane: &Lane, workers: &Workers, all: bool) -> Vec<Word> {
    let mut bonds = lock(&lane.book.bonds);
    let mut queues: HashMap<Name, Vec<(Bytes, Leases)>, RandomState> = HashMap::default();
    for ((queue, key), bond) in bonds.iter_mut().filter(|(_, bond)| all || bond.is_new) {
        bond.is_new = false;
        queues.entry(queue.clone()).or_default().push((key.clone(), std::mem::take(&mut bond.fresh)));
    }
    let mut words = Vec::new();
    for (queue, sessions) in queues {
        for parties in chunks(sessions) {
            let outcome = lane.submit(workers.op(queue.clone(), workers.terms.keep_ms, parties.clone()), 0);
            words.push(Word { queue: queue.clone(), parties, outcome });
        }
    }
    words
}

/// A session that has nothing there, and of which nothing new is to be said, is not kept there any more.
fn note_kept(lane: &Lane, counts: HashMap<(Name, Bytes), u64, RandomState>) {
    let mut bonds = lock(&lane.book.bonds);
    for (key, _) in counts.into_iter().filter(|(_, count)| *count == 0) {
        let queue = key.0.clone();
        if let Entry::Occupied(bond) = bonds.entry(key)
            && !bond.get().is_new
        {
            let Bond { worker, .. } = bond.remove();
            lock(&worker.places).remove(&(lane.name().clone(), queue));
        }
    }
}

/// What the shard may not have heard is said again.
fn note_failed(book: &Book, queue: &Name, parties: Vec<Party>) {
    let mut bonds = lock(&book.bonds);
    for Party { session, run_ms, leases } in parties {
        if let Some(bond) = bonds.get_mut(&(queue.clone(), session)) {
            bond.is_new = true;
            bond.fresh.extend(leases.into_iter().map(|lease| (run_ms, lease)));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn words_are_divided_into_ops_that_are_not_large() {
        let lease = |seq: u64| (seq % 2, Lease { seq, token: seq });
        let mut sessions: Vec<(Bytes, Leases)> = (0..300).map(|n| (Bytes::from(format!("s{n}")), Vec::new())).collect();
        sessions.push(("many".into(), (0..1_000).map(lease).collect()));
        let ops = chunks(sessions);
        let size = |op: &Vec<Party>| op.iter().map(|party| 1 + party.leases.len()).sum::<usize>();
        assert!(ops.iter().all(|op| (1..=OP_SIZE_MAX).contains(&size(op))));
        let parties: Vec<&Party> = ops.iter().flatten().collect();
        assert_eq!(parties.iter().filter(|party| party.leases.is_empty()).count(), 300);
        let leases = parties.iter().flat_map(|party| party.leases.iter().map(|lease| (party.run_ms, lease.seq)));
        let all: HashSet<(u64, u64)> = leases.collect();
        assert_eq!(all, (0..1_000).map(|seq| (seq % 2, seq)).collect());
    }

    #[test]
    fn a_worker_is_known_by_its_name_and_a_connection_by_none() {
        let workers = Arc::new(Workers::new(Terms::default()));
        let mut one = Membership::new(workers.clone(), 1);
        let named = one.join(b"\0w", &[], &[], 1).unwrap();
        let nameless = one.join(b"", &[], &[], 1).unwrap();
        assert_eq!(worker_name(&named.worker.key), Some(Bytes::from_static(b"\0w")));
        assert_eq!(worker_name(&nameless.worker.key), None);
        let mut other = Membership::new(workers.clone(), 2);
        assert!(Arc::ptr_eq(&other.join(b"\0w", &[], &[], 1).unwrap().worker, &named.worker));
        assert!(!Arc::ptr_eq(&other.join(b"", &[], &[], 1).unwrap().worker, &nameless.worker));
        assert_eq!(workers.grace_ms(&named.worker), Terms::default().grace_ms);
        assert_eq!(workers.grace_ms(&nameless.worker), 0);
        drop(one);
        assert_eq!(workers.workers.len(), 2);
        drop(other);
        assert_eq!(workers.workers.len(), 0);
    }

    #[test]
    fn a_connection_has_only_so_many_sessions() {
        let mut membership = Membership::new(Arc::new(Workers::new(Terms::default())), 1);
        for n in 0..2 * NAMES_MAX {
            let joined = membership.join(format!("w{n}").as_bytes(), &[], &[], 1);
            assert_eq!(joined.is_ok(), n < NAMES_MAX);
        }
        assert!(membership.join(b"w0", &[], &[], 1).is_ok());
    }
}
