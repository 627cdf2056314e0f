//! The commands: one row ([`Spec`]) and one pure plan function each.
//!
//! A row says everything about a command: its name, arguments, flags, group, summary, reply, errors and example. The
//! argument parser ([`args`]), arity errors, `COMMAND` and `COMMAND DOCS`, permissions, metric labels, routing keys and
//! the reference in `protocol.md` all come from it. The plan function turns checked arguments into a [`Plan`]; it decides
//! and does nothing: no I/O, no clock, no rule that belongs to the state machine. `execute` carries plans out.
//!
//! To add a command on existing ops: the row, its plan function and a test, in the family's file. To add a family: its
//! file, and its rows in [`FAMILIES`].

pub mod admin;
pub mod alert;
pub mod args;
pub mod connection;
pub mod dead;
pub mod describe;
pub mod event;
pub mod job;
pub mod limit;
pub mod lock;
pub mod ordinary;
pub mod reference;
pub mod shards;

use bytes::Bytes;
use std::ops::Deref;
use std::sync::{Arc, LazyLock};

use crate::clock::Millis;
use crate::error::{Code, Error, Result};
use crate::job::{JobRef, Lease, Name, Policy};
use crate::resp::reply::{Protocol, Reply};
use crate::shard::{Action, Keyed, Op, Outcome, QueueLimits, Start};
use args::{Arg, Args, Kind};

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
    /// How long a bound job may run.
    pub run_ms: Millis,
    /// Most jobs in one ENQUEUEMANY, DEQUEUE COUNT or ACK.
    pub batch_jobs_max: usize,
    pub block_ms_max: Millis,
    /// What an ENQUEUE says where it says nothing. Shared, so that such an ENQUEUE copies nothing.
    pub policy: Arc<Policy>,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            payload_bytes_max: 16 << 20,
            lease_ms: 30_000,
            lease_ms_max: 24 * 3_600_000,
            run_ms: 3_600_000,
            batch_jobs_max: 10_000,
            block_ms_max: 3_600_000,
            policy: Arc::default(),
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
    /// The events of a queue from all shards.
    Read(event::Read),
    Enqueue(Enqueue),
    Dequeue(Dequeue),
    /// Leases by the name of their shard; the counts of all shards are added up.
    Ack {
        queue: Name,
        leases: Vec<(Box<str>, Lease)>,
        result: Bytes,
    },
    Acquire(Acquire),
    /// Who holds a lock or semaphore, and how many wait for it here.
    Show {
        kind: Keyed,
        name: Name,
        show: lock::Show,
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
    /// The leases are the worker session's, and may last so long.
    pub bind: Option<Millis>,
}

/// `LOCK ACQUIRE` and `SEM ACQUIRE`.
#[derive(Clone, Debug, PartialEq)]
pub struct Acquire {
    pub kind: Keyed,
    pub name: Name,
    /// Most holders, the new one included.
    pub limit: u32,
    pub ttl_ms: Millis,
    pub owner: Bytes,
    /// 0: do not wait.
    pub wait_ms: Millis,
    /// Renewed and, at the end, released by the connection.
    pub bind: bool,
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
    /// Changes the limits of a queue: what is `None` stays, 0 lifts. Without any change it shows them.
    Limit {
        queue: Name,
        change: QueueLimits,
    },
    Shards,
    /// Changes the shard map.
    Map(MapOrder),
    /// Reads the configuration anew.
    Reload,
    /// The sections asked for, lower case; empty: the default ones.
    Info {
        sections: Vec<String>,
    },
    Config {
        patterns: Vec<Bytes>,
    },
    Time,
    /// The last slow commands; `None`: as many as Redis shows unasked.
    Slow {
        count: Option<usize>,
    },
    SlowCount,
    SlowReset,
    /// The alert rules, and how their deliveries went.
    Alerts,
    /// Sends a test through the sinks of a rule.
    AlertTest {
        name: Box<str>,
    },
    /// The worker sessions of one queue, or of all.
    Workers {
        queue: Option<Name>,
        offset: u64,
        count: u64,
    },
    /// The statistics of every queue on every shard, added up by [`admin::totals`].
    Totals,
}

/// A change of the shard map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MapOrder {
    Drain {
        shard: Box<str>,
    },
    Undrain {
        shard: Box<str>,
    },
    Add {
        shard: Box<str>,
        url: Box<str>,
        weight: u32,
    },
    Weigh {
        shard: Box<str>,
        weight: u32,
    },
    Move {
        shard: Box<str>,
    },
    Remove {
        shard: Box<str>,
        /// It does not answer and never will.
        lost: bool,
    },
    /// Former homes are looked into no more.
    Forget,
}

/// A plan function: checked arguments in, a plan out.
pub type PlanFn = fn(&Args, &Context) -> Result<Plan>;

/// What a row's command is about; the sections of the reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Group {
    Jobs,
    DeadLetters,
    Locks,
    Events,
    Operations,
    Connection,
    Server,
}

impl Group {
    pub const ALL: [Group; 7] = [
        Group::Jobs,
        Group::DeadLetters,
        Group::Locks,
        Group::Events,
        Group::Operations,
        Group::Connection,
        Group::Server,
    ];

    /// As `COMMAND DOCS` and the reference say it.
    pub fn word(self) -> &'static str {
        match self {
            Group::Jobs => "jobs",
            Group::DeadLetters => "dead letters",
            Group::Locks => "locks",
            Group::Events => "events",
            Group::Operations => "operations",
            Group::Connection => "connection",
            Group::Server => "server",
        }
    }
}

/// What `COMMAND INFO` says of a command beside its arguments, in Redis's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flag {
    Write,
    ReadOnly,
    /// For operators.
    Admin,
    /// May wait.
    Blocking,
    /// Its cost does not depend on how much there is.
    Fast,
    /// Allowed before the connection has authenticated.
    NoAuth,
}

impl Flag {
    pub fn word(self) -> &'static str {
        match self {
            Flag::Write => "write",
            Flag::ReadOnly => "readonly",
            Flag::Admin => "admin",
            Flag::Blocking => "blocking",
            Flag::Fast => "fast",
            Flag::NoAuth => "no_auth",
        }
    }
}

/// The arguments of a command that has only subcommands.
const SUBCOMMAND: &[Arg] = &[Arg::new("subcommand", Kind::Text), Arg::new("argument", Kind::Text).many().optional()];

/// One command, or one subcommand (`GOFLOW.DLQ|RETRY`): everything there is to say about it.
#[derive(Clone, Copy)]
pub struct Spec {
    /// Upper case; a subcommand stands behind a bar.
    pub name: &'static str,
    pub group: Group,
    /// One sentence.
    pub summary: &'static str,
    /// The version of GoFlow, or for Redis's own commands of Redis, that had it first.
    pub since: &'static str,
    pub args: &'static [Arg],
    pub flags: &'static [Flag],
    /// What it answers, in sentences.
    pub reply: &'static str,
    /// What else a user should know, in sentences; may be empty.
    pub notes: &'static str,
    /// Codes beside `ERR` that the command may answer with.
    pub errors: &'static [Code],
    /// Lines after `> ` are sent, the lines below each are what `redis-cli -3` shows. A word like `<receipt>` stands for
    /// text that is remembered and put into later lines; `...` alone for any lines, at a line's end for the rest of it.
    pub examples: &'static str,
    pub plan: PlanFn,
}

impl Spec {
    /// What most rows have in common.
    pub const BASE: Spec = Spec {
        name: "",
        group: Group::Server,
        summary: "",
        since: "0.1.0",
        args: &[],
        flags: &[],
        reply: "",
        notes: "",
        errors: &[],
        examples: "",
        plan: help,
    };

    /// The row of a command that has only subcommands; it answers `HELP`.
    pub const fn container(name: &'static str, group: Group, since: &'static str, summary: &'static str) -> Spec {
        Spec {
            name,
            group,
            summary,
            since,
            args: SUBCOMMAND,
            reply: "What the subcommand answers; with `HELP`, an array of lines about the subcommands.",
            ..Spec::BASE
        }
    }

    pub fn has(&self, flag: Flag) -> bool {
        self.flags.contains(&flag)
    }

    pub fn is_allowed_before_auth(&self) -> bool {
        self.has(Flag::NoAuth)
    }

    /// Whether its first argument is the name of a queue, lock or semaphore.
    pub fn names_queue_first(&self) -> bool {
        matches!(self.args.first(), Some(Arg { kind: Kind::Queue, token: None, .. }))
    }
}

/// All rows, family by family.
pub static FAMILIES: &[&[Spec]] = &[
    job::ROWS,
    dead::ROWS,
    lock::ROWS,
    event::ROWS,
    limit::ROWS,
    shards::ROWS,
    admin::ROWS,
    alert::ROWS,
    connection::ROWS,
];

/// A [`Spec`] with what is worked out from it once.
pub struct Row {
    pub spec: &'static Spec,
    /// Its place in [`rows`], for tables that are kept beside.
    pub index: usize,
    /// Fewest and most words of a request, the command's own included; `None`: without limit.
    pub words_min: usize,
    pub words_max: Option<usize>,
    /// Words that the command's own name takes: 1, or 2 for a subcommand.
    pub name_words: usize,
    /// As Redis writes it in errors and `COMMAND`: lower case, with the bar.
    pub lower: String,
    /// Indices of the rows of its subcommands.
    pub subcommands: Vec<usize>,
}

impl Deref for Row {
    type Target = Spec;

    fn deref(&self) -> &Spec {
        self.spec
    }
}

impl Row {
    fn new(spec: &'static Spec, index: usize) -> Row {
        let name_words = spec.name.split('|').count();
        let required = args::needed(spec.args);
        let open = spec.args.iter().any(|arg| arg.token.is_some() || arg.many);
        let most: usize = spec.args.iter().map(Arg::width_min).sum();
        Row {
            spec,
            index,
            words_min: name_words + required,
            words_max: (!open).then_some(name_words + most),
            name_words,
            lower: spec.name.to_ascii_lowercase(),
            subcommands: Vec::new(),
        }
    }

    /// Checks the request against the row and asks its plan function.
    pub fn plan(&'static self, request: &[Bytes], context: &Context) -> Result<Plan> {
        (self.spec.plan)(&Args::parse(self, request)?, context)
    }

    pub fn wrong_arity(&self) -> Error {
        Error::bad(format!("wrong number of arguments for '{}' command", self.lower))
    }
}

/// Every row, and a hash table over their names with open addressing.
struct Table {
    rows: Vec<Row>,
    /// `0` is free, `n` is row `n - 1`; its length is a power of two, and at most a quarter is taken.
    slots: Vec<u16>,
}

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let specs = FAMILIES.iter().flat_map(|family| family.iter());
    let mut rows: Vec<Row> = specs.enumerate().map(|(index, spec)| Row::new(spec, index)).collect();
    let mut slots = vec![0u16; (rows.len() * 4).next_power_of_two()];
    for row in &rows {
        let mut at = hash(row.name.as_bytes()) & (slots.len() - 1);
        while slots[at] != 0 {
            at = (at + 1) & (slots.len() - 1);
        }
        slots[at] = row.index as u16 + 1;
    }
    for index in 0..rows.len() {
        if let Some((container, _)) = rows[index].spec.name.split_once('|')
            && let Some(container) = rows.iter().position(|row| row.spec.name == container)
        {
            rows[container].subcommands.push(index);
        }
    }
    Table { rows, slots }
});

/// Mixes eight bytes at a time, blind to the case of letters.
fn hash(name: &[u8]) -> usize {
    let mix = |hash: u64, word: u64| {
        let mixed = (hash ^ (word | 0x2020_2020_2020_2020)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        mixed ^ (mixed >> 32)
    };
    let (words, rest) = name.as_chunks::<8>();
    let hash = words.iter().fold(name.len() as u64, |hash, word| mix(hash, u64::from_le_bytes(*word)));
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    mix(hash, u64::from_le_bytes(last)) as usize
}

/// All rows, in the order of the families.
pub fn rows() -> &'static [Row] {
    &TABLE.rows
}

/// The row of this name in any case; a subcommand as `client|setname`.
pub fn lookup(name: &[u8]) -> Option<&'static Row> {
    let table = &*TABLE;
    let mut at = hash(name) & (table.slots.len() - 1);
    loop {
        let row = &table.rows[usize::from(table.slots[at]).checked_sub(1)?];
        // Nearly always the first comparison decides, and it is the cheaper one.
        if row.name.as_bytes() == name || row.name.as_bytes().eq_ignore_ascii_case(name) {
            return Some(row);
        }
        at = (at + 1) & (table.slots.len() - 1);
    }
}

/// The row that a request is for; an error in Redis's words when there is none.
pub fn find(request: &[Bytes]) -> Result<&'static Row> {
    let Some(name) = request.first() else { return Err(Error::bad("empty request")) };
    let Some(row) = lookup(name).filter(|row| row.name_words == 1) else { return Err(unknown(request)) };
    let (Some(word), false) = (request.get(1), row.subcommands.is_empty()) else { return Ok(row) };
    let subcommands = row.subcommands.iter().map(|index| &TABLE.rows[*index]);
    for subcommand in subcommands {
        if subcommand.name.as_bytes()[row.name.len() + 1..].eq_ignore_ascii_case(word) {
            return Ok(subcommand);
        }
    }
    if word.eq_ignore_ascii_case(b"HELP") {
        return Ok(row);
    }
    let (word, name) = (quotable(word, 128), row.name);
    Err(Error::bad(format!("unknown subcommand '{word}'. Try {name} HELP.")))
}

/// Finds the command of a request, checks its arguments and asks its plan function.
pub fn plan(request: &[Bytes], context: &Context) -> Result<Plan> {
    find(request)?.plan(request, context)
}

/// Redis's words, which clients look for, cut where Redis cuts them.
fn unknown(request: &[Bytes]) -> Error {
    let (name, rest) =
        request.split_first().map_or((Default::default(), request), |(name, rest)| (quotable(name, 128), rest));
    let mut args = String::new();
    for word in rest {
        let Some(room) = 128usize.checked_sub(args.len()).filter(|room| *room > 0) else { break };
        args.push('\'');
        args.push_str(&quotable(word, room));
        args.push_str("' ");
    }
    Error::bad(format!("unknown command '{name}', with args beginning with: {args}"))
}

/// What C's `%.*s` makes of a client's word: up to its first NUL and at most so many bytes.
fn quotable(word: &[u8], bytes_max: usize) -> std::borrow::Cow<'_, str> {
    let end = word.iter().take(bytes_max).position(|byte| *byte == 0).unwrap_or(word.len().min(bytes_max));
    String::from_utf8_lossy(&word[..end])
}

/// `HELP` of a command with subcommands.
fn help(args: &Args, _: &Context) -> Result<Plan> {
    let row = args.row();
    let mut lines = vec![format!("{} <subcommand> [<arg> [value] [opt] ...]. Subcommands are:", row.name)];
    for index in &row.subcommands {
        let subcommand = &TABLE.rows[*index];
        let syntax = args::syntax(subcommand.args);
        let name = &subcommand.name[row.name.len() + 1..];
        lines.push(if syntax.is_empty() { name.to_owned() } else { format!("{name} {syntax}") });
        lines.push(format!("    {}", subcommand.summary));
    }
    lines.extend(["HELP".to_owned(), "    Print this help.".to_owned()]);
    Ok(Plan::Now(Reply::Array(lines.iter().map(Reply::bulk).collect())))
}

#[cfg(test)]
mod tests;
