//! The commands: one row ([`Spec`]) and one pure plan function each.
//!
//! A row says everything about a command: its name, arguments, flags, group, summary, reply, errors and example. The
//! argument parser ([`args`]), arity errors, `COMMAND` and `COMMAND DOCS`, permissions, metric labels, routing keys and
//! the reference in `protocol.md` all come from it. The plan function turns checked arguments into a [`Plan`]; it decides
//! and does nothing: no I/O, no clock, no rule that belongs to the state machine. `execute` carries plans out.
//!
//! To add a command on existing ops: the row, its plan function and a test, in the family's file.

pub mod args;
pub mod ordinary;

use bytes::Bytes;
use std::sync::Arc;

use crate::clock::Millis;
use crate::error::Result;
use crate::job::{JobRef, Lease, Name, Policy};
use crate::resp::reply::{Protocol, Reply};
use crate::shard::{Action, Op, Outcome, Start};

/// One client's request: the command's name and its arguments, sharing the memory they were read into.
pub type Request = Vec<Bytes>;

/// What a plan function may know beside the arguments.
#[derive(Clone, Debug)]
pub struct Context {
    pub protocol: Protocol,
    pub client_id: u64,
    /// The defaults and bounds that the configuration sets.
    pub limits: Arc<Limits>,
}

/// What the configuration says about requests.
#[derive(Clone, Debug)]
pub struct Limits {
    pub payload_bytes_max: usize,
    pub lease_ms: Millis,
    pub lease_ms_max: Millis,
    /// Most jobs in one ENQUEUEMANY, DEQUEUE COUNT or ACK.
    pub batch_jobs_max: usize,
    pub block_ms_max: Millis,
    /// What an ENQUEUE says where it says nothing.
    pub policy: Policy,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            payload_bytes_max: 16 << 20,
            lease_ms: 30_000,
            lease_ms_max: 24 * 3_600_000,
            batch_jobs_max: 10_000,
            block_ms_max: 3_600_000,
            policy: Policy::default(),
        }
    }
}

/// Which shard an op goes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// The shard of this name, as a generated id or a receipt says.
    Shard(Box<str>),
    /// The ring owner of this key.
    Key(Bytes),
}

/// A job as a client names it: where it is, and what its shard calls it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobAddress {
    pub route: Route,
    pub job: JobRef,
}

/// Turns the outcome of one op into its reply; gets the queue and the name of the shard that answered.
pub type Render = fn(Outcome, &Name, &str) -> Reply;

/// Turns the outcomes of all shards, in the order of their configuration, into one reply.
pub type Merge = Box<dyn FnOnce(Vec<(Arc<str>, Outcome)>) -> Reply + Send>;

/// What a command wants done.
pub enum Plan {
    /// Answered without a shard.
    Now(Reply),
    /// Changes or asks about the connection itself.
    Connection(Connection),
    /// Asks the process or changes the shard map.
    Ask(Ask),
    Enqueue(Enqueue),
    Dequeue(Dequeue),
    /// Leases by the name of their shard; the counts of all shards are added up.
    Ack {
        queue: Name,
        leases: Vec<(Box<str>, Lease)>,
        result: Bytes,
    },
    /// One op on one shard.
    Op {
        route: Route,
        op: Op,
        render: Render,
    },
    /// Jobs by address; one op for each shard that is named, the counts added up.
    Jobs {
        queue: Name,
        jobs: Vec<JobAddress>,
        action: fn(Vec<JobRef>) -> Action,
    },
    /// The same op on every shard.
    Each {
        op: Op,
        merge: Merge,
    },
    /// The same bulk op on every shard, again and again until nothing is left; the counts added up.
    Drain {
        op: Op,
    },
}

/// `ENQUEUE` and `ENQUEUEMANY`.
#[derive(Clone, Debug, PartialEq)]
pub struct Enqueue {
    pub queue: Name,
    pub policy: Arc<Policy>,
    pub payloads: Vec<Bytes>,
    pub start: Start,
    /// `SHARD name`: not by the strategy but there.
    pub shard: Option<Box<str>>,
    /// A job that holds the ID or UNIQUE key is an error, not an answer.
    pub nx: bool,
    /// The reply is an array.
    pub many: bool,
}

/// `DEQUEUE`.
#[derive(Clone, Debug, PartialEq)]
pub struct Dequeue {
    /// In the order in which they are tried.
    pub queues: Vec<Name>,
    /// `None`: one job, and the reply is a map.
    pub count: Option<usize>,
    /// `None`: do not wait. `Some(0)` waits as long as the limits allow.
    pub block_ms: Option<Millis>,
    pub lease_ms: Millis,
    pub worker: Bytes,
    /// Only these shards; empty: all.
    pub shards: Vec<Box<str>>,
}

/// What only the session can do: it owns the connection's state.
#[derive(Clone, Debug, PartialEq)]
pub enum Connection {
    Hello { protocol: Option<Protocol>, auth: Option<(Bytes, Bytes)>, name: Option<Bytes> },
    Auth { user: Bytes, password: Bytes },
    SetName(Bytes),
    GetName,
    SetInfo { field: Bytes, value: Bytes },
    Id,
    Info,
    List,
    Kill { id: u64 },
    Unblock { id: u64, error: bool },
    Reply(ReplyMode),
    Reset,
    Quit,
}

/// `CLIENT REPLY`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyMode {
    On,
    Off,
    Skip,
}

/// Questions to the process, and orders to its shard map.
#[derive(Clone, Debug, PartialEq)]
pub enum Ask {
    /// Names of the queues on all shards, sorted.
    Queues,
    Shards,
    Drain {
        shard: Box<str>,
        draining: bool,
    },
    /// The sections asked for, lower case; empty: the default ones.
    Info {
        sections: Vec<String>,
    },
    Config {
        patterns: Vec<Bytes>,
    },
    Time,
}

/// A plan function: checked arguments in, a plan out.
pub type PlanFn = fn(&args::Args, &Context) -> Result<Plan>;
