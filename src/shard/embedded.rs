//! The shard that keeps its jobs on this machine's disk: the rules of `state.rs` over rows in a fjall store.
//!
//! One thread, the committer, owns the state and the store. It takes what is waiting, batches of ops and units of ordinary
//! commands ([`keys`](super::keys)) alike, applies it in order, writes all rows that changed as one fjall batch, syncs the
//! journal once, and only then answers; where nothing changed nothing is synced. Headers of jobs are in memory and made again at start ([`State::load`]), payloads and texts stay on disk.
//!
//! ```text
//! DIR/format   the version of everything below; another one is refused
//! DIR/store    the fjall store, locked: one process at a time
//!    records   queue number, seq  → what the enqueue said           written once
//!    keys      what `keys/rows.rs` says                                of the ordinary keys
//!    rows      "s" → stamp   "q" queue number → queue   "j" queue number, seq → job   "u" queue number, key → holder
//!              "w" queue number, name → worker session   "b" queue number, seq → the session of a lease   "c" queue number → limits
//!              "l" name → lock   "m" name → semaphore   "d" queue number, key → deaths   "n" role, 0, name → note
//!              "t" queue number → what it knows of jobs that travel
//!              "h" queue number, seq → history   "e" queue number, number → chunk of the journal
//! ```
//!
//! Measured on a shared virtual machine of two cores, 256-byte payloads: 1,000,000 waiting jobs take 34 bytes each of
//! memory and are there 1.3 s after a start; an enqueue in batches of 100 costs 6.5 µs of CPU. Enqueue, lease and ack in
//! batches of 25 cost 28 to 52 µs a job, about half of it in the kernel: one sync costs some 110 µs whatever it holds, and
//! a job needs three in 25. The rules alone cost 2 µs of it. Larger batches are what makes this cheaper.
//!
//! A commit or a sync that fails is final: nobody knows what is on disk, and memory is ahead of it. From then on every
//! call answers `SHARDDOWN`, until the store is opened again. Whoever changes what a row holds raises [`FORMAT`].

use bytes::Bytes;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, OwnedWriteBatch, PersistMode, Slice};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, OnceLock, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::oneshot;

use super::feed::Ear;
use super::keys::{self, Loading, RowChange, Shared};
use super::state::State;
use super::state::rows::{Key, Rows, Table, Visit};
use super::{Applied, BoxFuture, Health, Keyed, Keys, OnChange, OnWake, Op, Rules, Shard, Stamp, Unit};
use crate::clock::{self, UnixMs};
use crate::error::{Error, Happened, Result};
use crate::job::Name;
use crate::resp::reply::Reply;

/// What stands in `DIR/format`.
const FORMAT: &str = "goflow embedded store 3\n";
/// Rows in memory before they go to a table on disk, for each of the three keyspaces. With its index a row takes about
/// twice its bytes here, and a full one waits beside the new one until it is written.
const MEMTABLE_BYTES_MAX: u64 = 8 << 20;
/// Blocks of tables in memory. Jobs are mostly read soon after they were written, in their order.
const CACHE_BYTES_MAX: u64 = 16 << 20;
/// Flushing and compacting; with one, a long compaction would hold up the flush that commits wait for.
const STORE_THREADS: usize = 2;
/// Rows that the table of what a batch has changed keeps room for.
const CHANGED_ROWS_KEPT: usize = 1_024;
/// Most orders that share one sync. What waits longer than that waits for a disk that is behind.
const BATCH_ORDERS_MAX: usize = 1_000;
/// How long the committer lets ordinary keys lie whose time is up, when nobody asks for them.
const SWEEP_PAUSE: Duration = Duration::from_millis(100);

pub struct Embedded {
    orders: Orders,
    keys: Arc<Shared>,
    ear: Arc<OnceLock<Arc<Ear>>>,
    /// Awaited when the shard is dropped: then the store is closed and can be opened again.
    committer: Option<JoinHandle<()>>,
}

/// Where orders are given to the committer.
#[derive(Clone)]
struct Orders {
    /// What the shard is called in its errors.
    name: Arc<str>,
    sender: mpsc::Sender<Order>,
}

/// What the committer does, and where the answer goes.
enum Order {
    Apply {
        ops: Vec<Op>,
        at: Option<UnixMs>,
        answer: oneshot::Sender<Applied>,
    },
    Run {
        unit: Unit,
        answer: oneshot::Sender<Result<Replies>>,
    },
    Queues {
        answer: oneshot::Sender<Result<Vec<Name>>>,
    },
    Objects {
        answer: oneshot::Sender<Result<Vec<(Keyed, Name)>>>,
    },
    Claim {
        stamp: Stamp,
        answer: oneshot::Sender<Result<()>>,
    },
    Stamp {
        answer: oneshot::Sender<Result<Option<Stamp>>>,
    },
    Note {
        role: &'static str,
        name: String,
        text: Option<Bytes>,
        answer: oneshot::Sender<Result<bool>>,
    },
    Notes {
        role: &'static str,
        answer: oneshot::Sender<Result<Notes>>,
    },
    Rules(Rules),
    /// The last one: the shard is dropped.
    Stop,
}

type Notes = Vec<(String, Bytes)>;

/// What a unit of ordinary commands says; `None` when a watched key had changed.
type Replies = Option<Vec<Reply>>;

impl Orders {
    /// Gives the committer an order now, so that orders are carried out as they were given; its answer.
    fn give<T: Send + 'static>(&self, order: impl FnOnce(oneshot::Sender<T>) -> Order) -> Answer<T> {
        let (answer, answered) = oneshot::channel();
        // Where the committer is gone the order is dropped, and with it the sender of the answer.
        let happened = if self.sender.send(order(answer)).is_ok() { Happened::Maybe } else { Happened::No };
        let name = self.name.clone();
        Box::pin(async move { answered.await.map_err(|_| Error::shard_down(&name, "has stopped", happened)) })
    }
}

impl Embedded {
    /// Opens the store in a directory, which is made where there is none.
    pub fn open(dir: &Path, rules: Rules) -> Result<Embedded> {
        let name = format!("embedded:{}", dir.display());
        let down = |why: String| Error::shard_down(&name, &why, Happened::No);
        let is_new = check_format(dir).map_err(down)?;
        let database = Database::builder(dir.join("store"))
            .cache_size(CACHE_BYTES_MAX)
            .worker_threads(STORE_THREADS)
            .open()
            .map_err(|error| match error {
                fjall::Error::Locked => down("is open in another process".into()),
                error => down(format!("cannot be opened: {error}")),
            })?;
        let rows = DiskRows::open(database).map_err(|error| down(format!("cannot be opened: {error}")))?;
        if is_new {
            write_format(dir).map_err(|error| down(format!("cannot be written: {error}")))?;
        }
        let keys = Arc::new(Shared::new(rows.load_keys().map_err(|error| down(error.text.into_owned()))?));
        let state = State::load(rows, rules)?;
        let ear = Arc::new(OnceLock::new());
        let committer = Committer { name: name.clone(), state, keys: keys.clone(), ear: ear.clone(), failure: None };
        let (sender, inbox) = mpsc::channel();
        let committer = std::thread::Builder::new()
            .name("committer".into())
            .spawn(move || committer.run(&inbox))
            .map_err(|error| down(format!("got no thread: {error}")))?;
        let orders = Orders { name: name.as_str().into(), sender };
        Ok(Embedded { orders, keys, ear, committer: Some(committer) })
    }
}

type Answer<T> = BoxFuture<'static, Result<T>>;

/// Whether the directory is new; an error says why it cannot be used.
fn check_format(dir: &Path) -> std::result::Result<bool, String> {
    std::fs::create_dir_all(dir).map_err(|error| format!("cannot be made: {error}"))?;
    match std::fs::read_to_string(dir.join("format")) {
        Ok(format) if format == FORMAT => Ok(false),
        Ok(format) => {
            let (theirs, ours) = (format.trim(), FORMAT.trim());
            Err(format!("holds \"{theirs}\", which this version does not know: it knows \"{ours}\""))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(format!("cannot be read: {error}")),
    }
}

/// Called after the store was locked, so that no two write.
fn write_format(dir: &Path) -> std::io::Result<()> {
    let (path, draft) = (dir.join("format"), dir.join("format.new"));
    std::fs::write(&draft, FORMAT)?;
    std::fs::File::open(&draft)?.sync_all()?;
    std::fs::rename(&draft, &path)?;
    std::fs::File::open(dir)?.sync_all()
}

impl Drop for Embedded {
    fn drop(&mut self) {
        // Not by closing the channel: whoever holds the keyspace can send as well.
        let _ = self.orders.sender.send(Order::Stop);
        if let Some(committer) = self.committer.take() {
            // A committer that panicked has said so on standard error.
            let _ = committer.join();
        }
    }
}

impl Shard for Embedded {
    fn apply(&self, ops: Vec<Op>, at: Option<UnixMs>) -> BoxFuture<'_, Applied> {
        let count = ops.len();
        let answer = self.orders.give(|answer| Order::Apply { ops, at, answer });
        Box::pin(async move { answer.await.unwrap_or_else(|error| Applied::failed(count, &error)) })
    }

    fn queues(&self) -> BoxFuture<'_, Result<Vec<Name>>> {
        let answer = self.orders.give(|answer| Order::Queues { answer });
        Box::pin(async move { answer.await? })
    }

    fn objects(&self) -> BoxFuture<'_, Result<Vec<(Keyed, Name)>>> {
        let answer = self.orders.give(|answer| Order::Objects { answer });
        Box::pin(async move { answer.await? })
    }

    fn watch(&self, _: OnWake) {}

    fn follow(&self, ear: Arc<Ear>) {
        // Only the first is told.
        let _ = self.ear.set(ear);
    }

    fn probe(&self) -> BoxFuture<'_, Result<Health>> {
        // Asked of the committer, so that one that has failed or hangs does not look healthy.
        let answer = self.orders.give(|answer| Order::Queues { answer });
        Box::pin(async move {
            answer.await??;
            Ok(Health {
                server: "embedded".into(),
                durability: "synced to disk before each answer".into(),
                warnings: Vec::new(),
            })
        })
    }

    fn claim(&self, stamp: Stamp) -> BoxFuture<'_, Result<()>> {
        let answer = self.orders.give(|answer| Order::Claim { stamp, answer });
        Box::pin(async move { answer.await? })
    }

    fn stamp(&self) -> BoxFuture<'_, Result<Option<Stamp>>> {
        let answer = self.orders.give(|answer| Order::Stamp { answer });
        Box::pin(async move { answer.await? })
    }

    fn note<'a>(
        &'a self,
        role: &'static str,
        _: &'a str,
        name: &'a str,
        text: Option<Bytes>,
    ) -> BoxFuture<'a, Result<bool>> {
        let name = name.to_owned();
        let answer = self.orders.give(|answer| Order::Note { role, name, text, answer });
        Box::pin(async move { answer.await? })
    }

    fn notes(&self, role: &'static str) -> BoxFuture<'_, Result<Notes>> {
        let answer = self.orders.give(|answer| Order::Notes { role, answer });
        Box::pin(async move { answer.await? })
    }

    fn set_rules(&self, rules: Rules) {
        // A committer that is gone applies nothing more.
        let _ = self.orders.sender.send(Order::Rules(rules));
    }

    fn keyspace(&self) -> super::Keyspace {
        super::Keyspace::Local(Arc::new(EmbeddedKeys { orders: self.orders.clone(), keys: self.keys.clone() }))
    }
}

/// The ordinary keys, as sessions reach them.
struct EmbeddedKeys {
    orders: Orders,
    keys: Arc<Shared>,
}

impl Keys for EmbeddedKeys {
    fn run(&self, unit: Unit) -> BoxFuture<'static, Result<Replies>> {
        let answer = self.orders.give(|answer| Order::Run { unit, answer });
        Box::pin(async move { answer.await? })
    }

    fn version(&self, key: &[u8]) -> u64 {
        self.keys.version(key)
    }

    fn observe(&self, on_change: OnChange) {
        self.keys.observe(on_change);
    }
}

/// Rows that are committed as one.
trait Store: Rows {
    /// Returns once everything that changed is on disk.
    fn commit(&mut self) -> fjall::Result<()>;

    /// Changes of the rows of ordinary keys, to be committed with the others.
    fn change_keys(&mut self, rows: Vec<RowChange>);
}

/// The one that owns the state and the store.
struct Committer<S> {
    name: String,
    state: State<S>,
    /// Changed by the committer only.
    keys: Arc<Shared>,
    ear: Arc<OnceLock<Arc<Ear>>>,
    /// Why nothing more is done.
    failure: Option<Error>,
}

/// Sends the answer to an order, once it is known what became of the batch it was in.
type Delivery = Box<dyn FnOnce(Result<()>)>;

fn delivery<T: 'static>(
    answer: oneshot::Sender<T>,
    done: Result<T>,
    refused: impl FnOnce(Error) -> T + 'static,
) -> Delivery {
    // Nobody may be waiting for the answer any more.
    Box::new(move |fate| drop(answer.send(fate.and(done).unwrap_or_else(refused))))
}

impl<S: Store> Committer<S> {
    fn run(mut self, inbox: &mpsc::Receiver<Order>) {
        loop {
            let first = match self.has_more_to_sweep() {
                false => inbox.recv().map_err(mpsc::RecvTimeoutError::from),
                true => inbox.recv_timeout(SWEEP_PAUSE),
            };
            let mut orders = match first {
                Ok(order) => vec![order],
                Err(mpsc::RecvTimeoutError::Timeout) => Vec::new(),
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            };
            orders.extend(inbox.try_iter().take(BATCH_ORDERS_MAX - 1));
            let stop = orders.iter().position(|order| matches!(order, Order::Stop));
            orders.truncate(stop.unwrap_or(orders.len()));
            self.carry_out(orders);
            if stop.is_some() {
                return;
            }
        }
    }

    /// Whether ordinary keys wait for their time or for their rows to be removed.
    fn has_more_to_sweep(&self) -> bool {
        self.failure.is_none() && self.keys.with(|keys| keys.has_more_to_sweep()).unwrap_or(false)
    }

    /// Does all that is ordered, commits it as one and answers.
    fn carry_out(&mut self, orders: Vec<Order>) {
        let was_down = self.failure.is_some();
        let mut failure = self.failure.clone();
        let deliveries: Vec<Delivery> = orders.into_iter().map(|order| self.act(order, &mut failure)).collect();
        let fate = match failure {
            None => self.commit(),
            Some(failure) if was_down => Err(failure),
            Some(failure) => Err(self.fail(&failure.text, Happened::No)),
        };
        let changed = match &fate {
            Ok(changed) => changed.clone(),
            Err(_) => Vec::new(),
        };
        let fate = fate.map(drop);
        deliveries.into_iter().for_each(|deliver| deliver(fate.clone()));
        self.keys.tell(&changed);
        let recorded = self.state.take_recorded();
        if fate.is_ok()
            && let Some(ear) = self.ear.get()
        {
            ear.tell_local(recorded);
        }
    }

    /// Does what is ordered, in memory. After a failure nothing more is done: the state is not whole any more.
    fn act(&mut self, order: Order, failure: &mut Option<Error>) -> Delivery {
        fn attempt<T>(failure: &mut Option<Error>, act: impl FnOnce() -> Result<T>) -> Result<T> {
            failure.clone().map_or(Ok(()), Err)?;
            act().inspect_err(|error| *failure = Some(error.clone()))
        }
        let state = &mut self.state;
        match order {
            Order::Apply { ops, at, answer } => {
                let count = ops.len();
                let done = attempt(failure, || state.apply(ops, at.unwrap_or_else(clock::now)));
                delivery(answer, done, move |error| Applied::failed(count, &error))
            }
            Order::Run { unit, answer } => {
                let done = attempt(failure, || self.keys.with(|keys| keys.run(&unit, clock::now())));
                delivery(answer, done.map(Ok), Err)
            }
            Order::Queues { answer } => delivery(answer, attempt(failure, || Ok(Ok(state.queues()))), Err),
            Order::Objects { answer } => delivery(answer, attempt(failure, || Ok(Ok(state.objects()))), Err),
            Order::Stamp { answer } => delivery(answer, attempt(failure, || state.stamp().map(Ok)), Err),
            Order::Note { role, name, text, answer } => {
                let noted = attempt(failure, || {
                    state.note(role, &name, text);
                    Ok(Ok(true))
                });
                delivery(answer, noted, Err)
            }
            Order::Notes { role, answer } => delivery(answer, attempt(failure, || state.notes(role).map(Ok)), Err),
            Order::Claim { stamp, answer } => delivery(answer, attempt(failure, || Ok(state.claim(&stamp))), Err),
            Order::Rules(rules) => {
                state.set_rules(rules);
                Box::new(|_| {})
            }
            Order::Stop => Box::new(|_| {}),
        }
    }

    /// Writes down and syncs what has changed in memory; the ordinary keys among it.
    fn commit(&mut self) -> Result<Vec<Bytes>> {
        let (rows, changed) = self.keys.with(|keys| {
            keys.sweep(clock::now());
            (keys.take_rows(), keys.take_changed())
        })?;
        let store = self.state.rows_mut();
        store.change_keys(rows);
        store.commit().map_err(|error| self.fail(&error.to_string(), Happened::Maybe))?;
        Ok(changed)
    }

    /// Takes the shard out of service, and says so to those whose orders met it.
    fn fail(&mut self, why: &str, happened: Happened) -> Error {
        tracing::error!(shard = %self.name, %why, "the embedded store failed; it is out of service until it is opened again");
        self.failure = Some(Error::shard_down(&self.name, &format!("failed before ({why})"), Happened::No));
        Error::shard_down(&self.name, &format!("failed ({why})"), happened)
    }
}

/// The rows on disk, and those that the current batch has changed.
struct DiskRows {
    database: Database,
    records: Keyspace,
    rows: Keyspace,
    keys: Keyspace,
    key_changes: Vec<RowChange>,
    /// `None`: to be removed.
    changed: HashMap<Key, Option<Bytes>, foldhash::fast::RandomState>,
}

impl DiskRows {
    fn open(database: Database) -> fjall::Result<DiskRows> {
        // What is asked for is nearly always there, so the filters of the largest level would only cost memory.
        let options =
            || KeyspaceCreateOptions::default().max_memtable_size(MEMTABLE_BYTES_MAX).expect_point_read_hits(true);
        let records = database.keyspace("records", options)?;
        let rows = database.keyspace("rows", options)?;
        let keys = database.keyspace("keys", KeyspaceCreateOptions::default)?;
        Ok(DiskRows { database, records, rows, keys, key_changes: Vec::new(), changed: HashMap::default() })
    }

    fn keyspace(&self, key: &Key) -> &Keyspace {
        match key {
            Key::Record(..) => &self.records,
            Key::Stamp
            | Key::Queue(_)
            | Key::Limits(_)
            | Key::Job(..)
            | Key::Unique(..)
            | Key::Session(..)
            | Key::Bound(..)
            | Key::Object(..)
            | Key::Deaths(..)
            | Key::Note(..)
            | Key::Travel(_)
            | Key::History(..)
            | Key::Chunk(..) => &self.rows,
        }
    }

    /// The ordinary keys that the rows tell of.
    fn load_keys(&self) -> Result<keys::Database> {
        let mut loading = Loading::new();
        for row in self.keys.iter() {
            let (key, value) = row.into_inner().map_err(store_error)?;
            loading.row(&key, &value).map_err(|_| {
                Error::shard_down("the store", "is damaged: a row of a key cannot be read", Happened::No)
            })?;
        }
        Ok(loading.finish())
    }
}

impl Store for DiskRows {
    /// Nothing is written or synced where nothing has changed.
    fn commit(&mut self) -> fjall::Result<()> {
        if self.changed.is_empty() && self.key_changes.is_empty() {
            return Ok(());
        }
        let mut batch = OwnedWriteBatch::with_capacity(self.database.clone(), self.changed.len())
            .durability(Some(PersistMode::SyncData));
        for (key, value) in &self.changed {
            let (keyspace, place) = (self.keyspace(key), encode_key(key));
            match value {
                Some(value) => batch.insert(keyspace, place, Slice::from(&value[..])),
                None => batch.remove(keyspace, place),
            }
        }
        // A large batch does not leave its table behind; the usual ones use theirs again.
        self.changed.clear();
        self.changed.shrink_to(CHANGED_ROWS_KEPT);
        for RowChange { key, value } in self.key_changes.drain(..) {
            match value {
                Some(value) => batch.insert(&self.keys, Slice::from(&key[..]), Slice::from(&value[..])),
                None => batch.remove(&self.keys, Slice::from(&key[..])),
            }
        }
        batch.commit()
    }

    fn change_keys(&mut self, rows: Vec<RowChange>) {
        self.key_changes.extend(rows);
    }
}

/// The name of a row on disk. Seqs that follow each other lie beside each other.
fn encode_key(key: &Key) -> Slice {
    let numbered = |tag: &[u8], number: u32, rest: &[u8]| Slice::from([tag, &number.to_be_bytes(), rest].concat());
    match key {
        Key::Stamp => Slice::from(b"s".as_slice()),
        Key::Queue(number) => numbered(b"q", *number, &[]),
        Key::Limits(number) => numbered(b"c", *number, &[]),
        Key::Record(number, seq) => numbered(b"", *number, &seq.to_be_bytes()),
        Key::Job(number, seq) => numbered(b"j", *number, &seq.to_be_bytes()),
        Key::Unique(number, key) => numbered(b"u", *number, key),
        Key::Deaths(number, key) => numbered(b"d", *number, key),
        Key::Session(number, name) => numbered(b"w", *number, name),
        Key::Bound(number, seq) => numbered(b"b", *number, &seq.to_be_bytes()),
        Key::Travel(number) => numbered(b"t", *number, &[]),
        Key::Note(role, name) => Slice::from([b"n", role.as_bytes(), b"\0", name.as_bytes()].concat()),
        Key::History(number, seq) => numbered(b"h", *number, &seq.to_be_bytes()),
        Key::Chunk(number, last) => numbered(b"e", *number, &last.to_be_bytes()),
        Key::Object(Keyed::Lock, name) => Slice::from([b"l", name.as_str().as_bytes()].concat()),
        Key::Object(Keyed::Semaphore, name) => Slice::from([b"m", name.as_str().as_bytes()].concat()),
    }
}

/// The key of a row of a table; `None` when it is not one.
fn decode_key(table: Table, raw: &[u8]) -> Option<Key> {
    if table == Table::Objects {
        let (mark, name) = raw.split_first()?;
        let kind = if *mark == b'l' { Keyed::Lock } else { Keyed::Semaphore };
        return Some(Key::Object(kind, Name::parse(name).ok()?));
    }
    if table == Table::Notes {
        let (role, name) = std::str::from_utf8(raw.get(1..)?).ok()?.split_once('\0')?;
        return Some(Key::Note(role.into(), name.into()));
    }
    let numbers = if table == Table::Records { raw } else { raw.get(1..)? };
    let (number, rest) = numbers.split_first_chunk::<4>()?;
    let number = u32::from_be_bytes(*number);
    let seq = || rest.try_into().ok().map(u64::from_be_bytes);
    match table {
        Table::Queues => rest.is_empty().then_some(Key::Queue(number)),
        Table::Limits => rest.is_empty().then_some(Key::Limits(number)),
        Table::Travels => rest.is_empty().then_some(Key::Travel(number)),
        Table::Records => Some(Key::Record(number, seq()?)),
        Table::Jobs => Some(Key::Job(number, seq()?)),
        Table::Histories => Some(Key::History(number, seq()?)),
        Table::Chunks => Some(Key::Chunk(number, seq()?)),
        Table::Uniques => Some(Key::Unique(number, Bytes::copy_from_slice(rest))),
        Table::Deaths => Some(Key::Deaths(number, Bytes::copy_from_slice(rest))),
        Table::Sessions => Some(Key::Session(number, Bytes::copy_from_slice(rest))),
        Table::Bound => Some(Key::Bound(number, seq()?)),
        Table::Objects | Table::Notes => None,
    }
}

fn store_error(error: fjall::Error) -> Error {
    Error::shard_down("the store", &format!("cannot be read: {error}"), Happened::No)
}

impl Rows for DiskRows {
    fn get(&self, key: &Key) -> Result<Option<Bytes>> {
        if let Some(changed) = self.changed.get(key) {
            return Ok(changed.clone());
        }
        let found = self.keyspace(key).get(encode_key(key)).map_err(store_error)?;
        Ok(found.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn put(&mut self, key: Key, value: Bytes) {
        self.changed.insert(key, Some(value));
    }

    fn delete(&mut self, key: Key) {
        self.changed.insert(key, None);
    }

    fn each(&self, table: Table, visit: &mut Visit<'_>) -> Result<()> {
        let rows = match table {
            Table::Records => self.records.iter(),
            Table::Queues => self.rows.prefix(b"q"),
            Table::Limits => self.rows.prefix(b"c"),
            Table::Jobs => self.rows.prefix(b"j"),
            Table::Histories => self.rows.prefix(b"h"),
            Table::Chunks => self.rows.prefix(b"e"),
            Table::Uniques => self.rows.prefix(b"u"),
            Table::Deaths => self.rows.prefix(b"d"),
            Table::Notes => self.rows.prefix(b"n"),
            Table::Sessions => self.rows.prefix(b"w"),
            Table::Bound => self.rows.prefix(b"b"),
            Table::Travels => self.rows.prefix(b"t"),
            // Both marks and nothing else lie between these.
            Table::Objects => self.rows.range(b"l".as_slice()..b"n".as_slice()),
        };
        for row in rows {
            let (key, value) = row.into_inner().map_err(store_error)?;
            let key = decode_key(table, &key)
                .ok_or_else(|| Error::shard_down("the store", "is damaged: a row has no name", Happened::No))?;
            visit(key, Bytes::copy_from_slice(&value))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;
    use crate::job::JobState;
    use crate::shard::memory::MapRows;
    use crate::shard::{Action, Outcome, Start};
    use std::sync::Arc;

    fn op(action: Action) -> Op {
        Op { queue: Name::parse(b"main").unwrap(), action }
    }

    fn enqueue() -> Op {
        op(Action::Enqueue { policy: Arc::default(), payloads: vec!["x".into()], start: Start::Now })
    }

    fn len(state: JobState) -> Op {
        op(Action::Len { state })
    }

    fn apply(shard: &Embedded, ops: Vec<Op>) -> Vec<Result<Outcome>> {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(shard.apply(ops, None)).outcomes
    }

    fn open(dir: &Path) -> Result<Embedded> {
        Embedded::open(dir, Rules::default())
    }

    #[test]
    fn what_was_answered_is_there_when_the_store_is_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let token = vec![7];
        let lease = op(Action::Lease { tokens: token, lease_ms: 1_000_000, worker: "w".into() });
        assert_eq!(apply(&open(dir.path()).unwrap(), vec![enqueue(), enqueue(), lease]).len(), 3);
        let counted = apply(&open(dir.path()).unwrap(), vec![len(JobState::Ready), len(JobState::Leased)]);
        assert_eq!(counted, [Ok(Outcome::Count(1)), Ok(Outcome::Count(1))]);
    }

    #[test]
    fn a_store_is_opened_by_one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let shard = open(dir.path()).unwrap();
        let error = open(dir.path()).err().unwrap();
        assert!(error.text.contains("is open in another process"), "{error}");
        drop(shard);
        assert!(open(dir.path()).is_ok());
    }

    #[test]
    fn a_store_of_another_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(open(dir.path()).unwrap());
        std::fs::write(dir.path().join("format"), "goflow embedded store 0\n").unwrap();
        let error = open(dir.path()).err().unwrap();
        assert!(error.text.contains("goflow embedded store 0"), "{error}");
    }

    #[test]
    fn a_damaged_store_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        apply(&open(dir.path()).unwrap(), vec![enqueue()]);
        let database = Database::builder(dir.path().join("store")).open().unwrap();
        let mut rows = DiskRows::open(database).unwrap();
        rows.put(Key::Record(1, 1), "not a record".into());
        rows.commit().unwrap();
        drop(rows);
        assert!(open(dir.path()).err().unwrap().text.contains("damaged"));
    }

    /// Rows of which nobody knows whether they reached the disk.
    #[derive(Default)]
    struct Unsure {
        rows: MapRows,
        fails: bool,
    }

    impl Rows for Unsure {
        fn get(&self, key: &Key) -> Result<Option<Bytes>> {
            self.rows.get(key)
        }

        fn put(&mut self, key: Key, value: Bytes) {
            self.rows.put(key, value);
        }

        fn delete(&mut self, key: Key) {
            self.rows.delete(key);
        }

        fn each(&self, table: Table, visit: &mut Visit<'_>) -> Result<()> {
            self.rows.each(table, visit)
        }
    }

    impl Store for Unsure {
        fn commit(&mut self) -> fjall::Result<()> {
            match std::mem::take(&mut self.fails) {
                true => Err(std::io::Error::other("no space left on device").into()),
                false => Ok(()),
            }
        }

        fn change_keys(&mut self, _: Vec<RowChange>) {}
    }

    #[test]
    fn a_failed_sync_is_final() {
        let state = State::new(Unsure::default(), Rules::default());
        let keys = Arc::new(Shared::new(keys::Database::volatile()));
        let mut committer = Committer { name: "embedded:x".into(), state, keys, ear: Arc::default(), failure: None };
        let apply = |committer: &mut Committer<Unsure>, op: Op| {
            let (answer, mut answered) = oneshot::channel();
            committer.carry_out(vec![Order::Apply { ops: vec![op], at: Some(1), answer }]);
            answered.try_recv().unwrap().outcomes.remove(0)
        };
        assert!(apply(&mut committer, enqueue()).is_ok());
        committer.state.rows_mut().fails = true;
        let error = apply(&mut committer, enqueue()).unwrap_err();
        assert_eq!((error.code, error.happened), (Code::ShardDown, Happened::Maybe));
        assert!(error.text.contains("no space left"), "{error}");
        let error = apply(&mut committer, len(JobState::Ready)).unwrap_err();
        assert_eq!((error.code, error.happened), (Code::ShardDown, Happened::No));
    }

    fn run(shard: &Embedded, lines: &[&str]) -> Option<Vec<Reply>> {
        let crate::shard::Keyspace::Local(keys) = shard.keyspace() else { panic!("no keyspace") };
        let words = |line: &&str| line.split(' ').map(|word| Bytes::copy_from_slice(word.as_bytes())).collect();
        let unit = Unit { requests: lines.iter().map(words).collect(), ..Unit::default() };
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(keys.run(unit)).unwrap()
    }

    #[test]
    fn ordinary_keys_are_there_when_the_store_is_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let shard = open(dir.path()).unwrap();
        run(
            &shard,
            &["RPUSH list a b c", "LPOP list", "SET key value", "EXPIRE key 1000", "ZADD zset 1.5 m", "DEL key"],
        );
        drop(shard);
        let shard = open(dir.path()).unwrap();
        let told = run(&shard, &["LRANGE list 0 -1", "EXISTS key", "ZSCORE zset m", "DBSIZE"]).unwrap();
        let items = Reply::Array(vec![Reply::text("b"), Reply::text("c")]);
        assert_eq!(told, [items, Reply::Integer(0), Reply::Double(1.5), Reply::Integer(2)]);
    }

    #[test]
    fn a_key_that_is_too_long_for_a_row_is_refused_and_the_shard_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let shard = open(dir.path()).unwrap();
        let long = "x".repeat(70_000);
        for line in [format!("SET {long} v"), format!("SADD set {long}"), format!("HSET hash {long} v")] {
            let told = run(&shard, &[&line]).unwrap();
            assert!(matches!(&told[..], [Reply::RawError(text)] if text.starts_with(b"TOOBIG")), "{told:?}");
        }
        let longest = "x".repeat(65_000);
        run(&shard, &[&format!("ZADD {longest} 1 {longest}")]);
        drop(shard);
        assert_eq!(run(&open(dir.path()).unwrap(), &["DBSIZE"]), Some(vec![Reply::Integer(1)]));
    }

    #[test]
    fn an_observer_hears_of_a_key_after_it_was_committed() {
        let dir = tempfile::tempdir().unwrap();
        let shard = open(dir.path()).unwrap();
        let (sender, heard) = mpsc::channel();
        let crate::shard::Keyspace::Local(keys) = shard.keyspace() else { panic!("no keyspace") };
        keys.observe(Arc::new(move |key: &[u8]| drop(sender.send(key.to_vec()))));
        run(&shard, &["GET other", "LPUSH list a"]);
        assert_eq!(heard.recv().unwrap(), b"list");
    }

    #[test]
    fn keys_whose_time_is_up_leave_without_being_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let shard = open(dir.path()).unwrap();
        let (sender, heard) = mpsc::channel();
        let crate::shard::Keyspace::Local(keys) = shard.keyspace() else { panic!("no keyspace") };
        keys.observe(Arc::new(move |key: &[u8]| drop(sender.send(key.to_vec()))));
        run(&shard, &["SET key value PX 50"]);
        // That it came, and that it went.
        assert_eq!((heard.recv().unwrap(), heard.recv().unwrap()), (b"key".to_vec(), b"key".to_vec()));
    }
}
