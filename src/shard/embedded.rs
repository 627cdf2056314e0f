//! The shard that keeps its jobs on this machine's disk: the rules of `state.rs` over rows in a fjall store.
//!
//! One thread, the committer, owns the state and the store. It takes a batch, applies it, writes all rows that changed as
//! one fjall batch, syncs the journal once, and only then answers; a batch that changed nothing is answered without a
//! sync. Headers of jobs are in memory and made again at start ([`State::load`]), payloads and texts stay on disk.
//!
//! ```text
//! DIR/format   the version of everything below; another one is refused
//! DIR/store    the fjall store, locked: one process at a time
//!    records   queue number, seq  → what the enqueue said           written once
//!    rows      "s" → stamp   "q" queue number → queue   "j" queue number, seq → job   "u" queue number, key → holder
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
use std::sync::mpsc;
use std::thread::JoinHandle;
use tokio::sync::oneshot;

use super::state::State;
use super::state::rows::{Key, Rows, Table, Visit};
use super::{Applied, BoxFuture, Health, OnWake, Op, Rules, Shard, Stamp};
use crate::clock::{self, UnixMs};
use crate::error::{Error, Happened, Result};
use crate::job::Name;

/// What stands in `DIR/format`.
const FORMAT: &str = "goflow embedded store 1\n";
/// Rows in memory before they go to a table on disk, for each of the two keyspaces. With its index a row takes about
/// twice its bytes here, and a full one waits beside the new one until it is written.
const MEMTABLE_BYTES_MAX: u64 = 8 << 20;
/// Blocks of tables in memory. Jobs are mostly read soon after they were written, in their order.
const CACHE_BYTES_MAX: u64 = 16 << 20;
/// Flushing and compacting; with one, a long compaction would hold up the flush that commits wait for.
const STORE_THREADS: usize = 2;
/// Rows that the table of what a batch has changed keeps room for.
const CHANGED_ROWS_KEPT: usize = 1_024;

pub struct Embedded {
    /// What the shard is called in its errors.
    name: String,
    /// Taken, and the committer awaited, when the shard is dropped: then the store is closed and can be opened again.
    orders: Option<mpsc::Sender<Order>>,
    committer: Option<JoinHandle<()>>,
}

/// What the committer does, and where the answer goes.
enum Order {
    Apply { ops: Vec<Op>, at: Option<UnixMs>, answer: oneshot::Sender<Applied> },
    Queues { answer: oneshot::Sender<Result<Vec<Name>>> },
    Claim { stamp: Stamp, answer: oneshot::Sender<Result<()>> },
    Stamp { answer: oneshot::Sender<Result<Option<Stamp>>> },
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
        let committer = Committer { name: name.clone(), state: State::load(rows, rules)?, failure: None };
        let (orders, inbox) = mpsc::channel();
        let committer = std::thread::Builder::new()
            .name("committer".into())
            .spawn(move || committer.run(&inbox))
            .map_err(|error| down(format!("got no thread: {error}")))?;
        Ok(Embedded { name, orders: Some(orders), committer: Some(committer) })
    }

    /// Gives the committer an order now, so that orders are carried out as they were given; its answer.
    fn order<T: Send + 'static>(&self, order: impl FnOnce(oneshot::Sender<T>) -> Order) -> Answer<T> {
        let (answer, answered) = oneshot::channel();
        // Where the committer is gone the order is dropped, and with it the sender of the answer.
        let _ = self.orders.as_ref().map(|orders| orders.send(order(answer)));
        let name = self.name.clone();
        Box::pin(async move { answered.await.map_err(|_| Error::shard_down(&name, "has stopped", Happened::Maybe)) })
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
        self.orders = None;
        if let Some(committer) = self.committer.take() {
            // A committer that panicked has said so on standard error.
            let _ = committer.join();
        }
    }
}

impl Shard for Embedded {
    fn apply(&self, ops: Vec<Op>, at: Option<UnixMs>) -> BoxFuture<'_, Applied> {
        let count = ops.len();
        let answer = self.order(|answer| Order::Apply { ops, at, answer });
        Box::pin(async move { answer.await.unwrap_or_else(|error| Applied::failed(count, &error)) })
    }

    fn queues(&self) -> BoxFuture<'_, Result<Vec<Name>>> {
        let answer = self.order(|answer| Order::Queues { answer });
        Box::pin(async move { answer.await? })
    }

    fn watch(&self, _: OnWake) {}

    fn probe(&self) -> BoxFuture<'_, Result<Health>> {
        // Asked of the committer, so that one that has failed or hangs does not look healthy.
        let answer = self.order(|answer| Order::Queues { answer });
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
        let answer = self.order(|answer| Order::Claim { stamp, answer });
        Box::pin(async move { answer.await? })
    }

    fn stamp(&self) -> BoxFuture<'_, Result<Option<Stamp>>> {
        let answer = self.order(|answer| Order::Stamp { answer });
        Box::pin(async move { answer.await? })
    }
}

/// Rows that are committed as one.
trait Store: Rows {
    /// Returns once everything that changed is on disk.
    fn commit(&mut self) -> fjall::Result<()>;
}

/// The one that owns the state and the store.
struct Committer<S> {
    name: String,
    state: State<S>,
    /// Why nothing more is done.
    failure: Option<Error>,
}

impl<S: Store> Committer<S> {
    fn run(mut self, inbox: &mpsc::Receiver<Order>) {
        while let Ok(order) = inbox.recv() {
            // Nobody may be waiting for the answer any more.
            match order {
                Order::Apply { ops, at, answer } => {
                    let count = ops.len();
                    let applied = self.commit(|state| state.apply(ops, at.unwrap_or_else(clock::now)));
                    let _ = answer.send(applied.unwrap_or_else(|error| Applied::failed(count, &error)));
                }
                Order::Queues { answer } => drop(answer.send(self.commit(|state| Ok(state.queues())))),
                Order::Stamp { answer } => drop(answer.send(self.commit(|state| state.stamp()))),
                Order::Claim { stamp, answer } => {
                    let claimed = self.commit(|state| Ok(state.claim(&stamp)));
                    let _ = answer.send(claimed.and_then(|refused| refused));
                }
            }
        }
    }

    /// Does something with the state and commits the rows that it changed.
    fn commit<T>(&mut self, act: impl FnOnce(&mut State<S>) -> Result<T>) -> Result<T> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let done = act(&mut self.state);
        let failed = match &done {
            Ok(_) => self.state.rows_mut().commit().err().map(|error| (error.to_string(), Happened::Maybe)),
            Err(error) => Some((error.text.to_string(), Happened::No)),
        };
        let Some((why, happened)) = failed else { return done };
        tracing::error!(shard = %self.name, %why, "the embedded store failed; it is out of service until it is opened again");
        self.failure = Some(Error::shard_down(&self.name, &format!("failed before ({why})"), Happened::No));
        Err(Error::shard_down(&self.name, &format!("failed ({why})"), happened))
    }
}

/// The rows on disk, and those that the current batch has changed.
struct DiskRows {
    database: Database,
    records: Keyspace,
    rows: Keyspace,
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
        Ok(DiskRows { database, records, rows, changed: HashMap::default() })
    }

    fn keyspace(&self, key: &Key) -> &Keyspace {
        match key {
            Key::Record(..) => &self.records,
            Key::Stamp | Key::Queue(_) | Key::Job(..) | Key::Unique(..) => &self.rows,
        }
    }
}

impl Store for DiskRows {
    /// Nothing is written or synced where nothing has changed.
    fn commit(&mut self) -> fjall::Result<()> {
        if self.changed.is_empty() {
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
        batch.commit()
    }
}

/// The name of a row on disk. Seqs that follow each other lie beside each other.
fn encode_key(key: &Key) -> Slice {
    let numbered = |tag: &[u8], number: u32, rest: &[u8]| Slice::from([tag, &number.to_be_bytes(), rest].concat());
    match key {
        Key::Stamp => Slice::from(b"s".as_slice()),
        Key::Queue(number) => numbered(b"q", *number, &[]),
        Key::Record(number, seq) => numbered(b"", *number, &seq.to_be_bytes()),
        Key::Job(number, seq) => numbered(b"j", *number, &seq.to_be_bytes()),
        Key::Unique(number, key) => numbered(b"u", *number, key),
    }
}

/// The key of a row of a table; `None` when it is not one.
fn decode_key(table: Table, raw: &[u8]) -> Option<Key> {
    let numbers = if table == Table::Records { raw } else { raw.get(1..)? };
    let (number, rest) = numbers.split_first_chunk::<4>()?;
    let number = u32::from_be_bytes(*number);
    let seq = || rest.try_into().ok().map(u64::from_be_bytes);
    match table {
        Table::Queues => rest.is_empty().then_some(Key::Queue(number)),
        Table::Records => Some(Key::Record(number, seq()?)),
        Table::Jobs => Some(Key::Job(number, seq()?)),
        Table::Uniques => Some(Key::Unique(number, Bytes::copy_from_slice(rest))),
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
            Table::Jobs => self.rows.prefix(b"j"),
            Table::Uniques => self.rows.prefix(b"u"),
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
        std::fs::write(dir.path().join("format"), "goflow embedded store 2\n").unwrap();
        let error = open(dir.path()).err().unwrap();
        assert!(error.text.contains("goflow embedded store 2"), "{error}");
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
    }

    #[test]
    fn a_failed_sync_is_final() {
        let state = State::new(Unsure::default(), Rules::default());
        let mut committer = Committer { name: "embedded:x".into(), state, failure: None };
        assert!(committer.commit(|state| state.apply(vec![enqueue()], 1)).is_ok());
        committer.state.rows_mut().fails = true;
        let error = committer.commit(|state| state.apply(vec![enqueue()], 1)).unwrap_err();
        assert_eq!((error.code, error.happened), (Code::ShardDown, Happened::Maybe));
        assert!(error.text.contains("no space left"), "{error}");
        let error = committer.commit(|state| state.apply(vec![len(JobState::Ready)], 1)).unwrap_err();
        assert_eq!((error.code, error.happened), (Code::ShardDown, Happened::No));
    }
}
