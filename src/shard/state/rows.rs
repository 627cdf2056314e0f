//! The seam between the rules and what keeps their rows: small keyed values, read one by one, written as they change.
//!
//! [`super::State`] writes every durable change through [`Rows`] while it applies a batch and reads back what it wrote;
//! whoever implements it commits all that one batch wrote as one, or keeps it in a map. The state is rebuilt from the
//! rows alone, so a row is never removed before the rules say so.

use bytes::Bytes;

use crate::error::Result;
use crate::job::Name;
use crate::shard::Keyed;

/// What a row is about. Queues are numbered in the order in which they were first seen.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Key {
    /// Whose shard this is.
    Stamp,
    /// The name and the counters of a queue.
    Queue(u32),
    /// The share of the queue's limits, what is used of it, and the ledger.
    Limits(u32),
    /// What an enqueue said: 13 digits of its time, then the record of `Spec::encode`. Written once.
    Record(u32, u64),
    /// The part of a job that changes. A job without it is ready and as its enqueue left it.
    Job(u32, u64),
    /// Who holds a unique key, and until when.
    Unique(u32, Bytes),
    /// Until when a worker session is kept, and by whom.
    Session(u32, Bytes),
    /// The number of the session that a job's lease hangs on.
    Bound(u32, u64),
    /// Who holds a lock or semaphore, and a lock's fence.
    Object(Keyed, Name),
    /// A group of deaths in the outbox of a queue, by its key.
    Deaths(u32, Bytes),
    /// What the holder of a role keeps for the next: the role, and the name of the note.
    Note(Box<str>, Box<str>),
    /// What a queue knows of jobs that travel; not there where it knows nothing.
    Travel(u32),
    /// The history of a job that has no other row any more.
    History(u32, u64),
    /// A part of the queue's journal, by the number of its last event.
    Chunk(u32, u64),
}

/// The kinds of rows that are read as a whole when a state is rebuilt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    Queues,
    Records,
    Jobs,
    Uniques,
    Sessions,
    Bound,
    Limits,
    Objects,
    Deaths,
    Notes,
    Travels,
    Histories,
    Chunks,
}

/// Called with each row of a table.
pub type Visit<'a> = dyn FnMut(Key, Bytes) -> Result<()> + 'a;

/// Keeps rows.
pub trait Rows {
    /// Sees what was written before, committed or not. An error is final: the rules stop in the middle of a batch.
    fn get(&self, key: &Key) -> Result<Option<Bytes>>;

    fn put(&mut self, key: Key, value: Bytes);

    fn delete(&mut self, key: Key);

    /// All rows of a table, in no particular order.
    fn each(&self, table: Table, visit: &mut Visit<'_>) -> Result<()>;
}
