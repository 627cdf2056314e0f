//! The seam between GoFlow and what keeps the jobs: one verb, [`Shard::apply`], over ordered batches of [`Op`]s.
//!
//! Three implementations keep the same rules: `memory` (the rules themselves, `state.rs`, pure), `embedded` (the same
//! rules, rows on disk) and `redis` (the same rules in Lua). `tests/conformance` holds each to every sentence here and
//! `tests/model.rs` drives the last two against the first.
//!
//! ## The state machine
//!
//! ```text
//!            ENQUEUE                       ACK (also late, until a newer lease)
//!   ┌── DELAY ──┴────────┐                ┌──────────────────────► completed
//!   ▼                    ▼     LEASE      │
//! scheduled ──due──►  ready ───────────► leased ──FAIL / lapse──► scheduled (backoff) or ready (no delay)
//!   ▲                  ▲ ▲                │   └── spent >= attempts, or lapses >= lapses_max, or DEAD ──► dead
//!   └─RELEASE DELAY────┼─┴─RELEASE────────┘                                                              │
//!                      └────────────────────────── RETRY (redrive) ─────────────────────────────────────┘
//! ready, scheduled, leased, dead ──CANCEL──► cancelled      ready, scheduled ──TTL──► expired
//! ```
//!
//! - Ready jobs leave by (higher priority, lower *place*). One counter per queue hands out seqs and places: a new job's
//!   first place is its seq; each time a job becomes ready by falling due, by a redrive or by a FAIL without delay it gets
//!   a new place at the end of the line; a release without delay keeps the place it had. A job that starts scheduled gets
//!   its place when due.
//! - *spent* = failures + lapses since enqueue or redrive. A delivery's `attempt` is spent + 1. A release spends nothing.
//! - A lapse (lease end <= now) puts the job back scheduled at now + backoff(spent) (at least 1 ms), error
//!   `lease lapsed (<lapses> of <lapses_max>)`; the `lapses_max`th makes it dead with error
//!   `lease lapsed <n> times: the worker crashed or hung`; attempts used up by a lapse makes it dead likewise.
//! - A verdict repeated with the same token gets the same answer while nothing newer happened to the job. After FAIL,
//!   RELEASE or a lapse only the same verdict again, or after a lapse an ACK, is taken; anything else is `LeaseLost`.
//!   An ACK counts for a job that a lapse made dead, too. A newer lease, or an end by something else, is `LeaseLost`;
//!   a job that is not known any more is `NoSuchJob` (an ACK just counts 0 in both cases). Falling due is nothing newer;
//!   an expiry is an end by something else, also where a lapse led to it at once.
//! - A new lease takes away the progress of the one before. Error and trace stay until the next failure or lapse (a lapse
//!   has no trace), worker and start until the next lease.
//! - A unique key is held from the enqueue until the job is over, dead, purged or deleted, or until its time is up. A
//!   redrive takes it again; where another job holds it, that job stays dead and is not counted.
//! - A job of a group has a *turn* while it stands in the line or is leased. It gets one when fewer jobs of its group than its
//!   own bound have one, and enters the line at the place that it has; until then it is ready and not in the line. Who
//!   waits longest by (higher priority, lower place) is next, and nobody overtakes it. With a bound of 1 a job that had a turn
//!   keeps it while it is scheduled or ready after a FAIL, a RELEASE or a lapse. PEEK shows those that wait for a turn
//!   behind the line, by (shorter, then smaller group, higher priority, lower place).
//! - Where the shard has a share of a limit, an enqueue is refused whole when more jobs would wait than the share says; a
//!   lease gets no more jobs than the share of leased ones leaves, nor more than the rate leaves: a start counts from its
//!   moment to the end of the rate's window, this end rounded up to a step, a [`RATE_STEPS`]th of the window. Only new jobs are
//!   refused: one that comes back always finds its place.
//! - A job's ttl counts from its enqueue; a job that would become ready or scheduled after it is expired instead (a redrive
//!   counts all the same, and takes no key). A leased job does not expire.
//! - A *session* holds leases for a worker as long as one of its keepers, the proxies, says so: each KEEP moves the end of
//!   that keeper's part to now + `keep_ms` (0 ends it at once), and the session's end is the last of these. A lease that a
//!   KEEP hangs on it has its own end moved to its start + `run_ms`, or keeps the one it has if that is later; it lapses
//!   then as any other, and EXTEND moves that end. The lease leaves the session with its job's state.
//! - A session's end (end <= now) gives its jobs back: as a RELEASE without delay would, but what may come after is what may
//!   come after a lapse. A session that a KEEP leaves without leases is forgotten; the first lease gives it a number from
//!   the counter of seqs and places.
//! - Before the ops of a queue are applied, what has fallen due in it is moved, at most [`TICK_JOBS_MAX`] jobs, in the
//!   order: ended sessions, lapsed leases, due scheduled, expired ttls; each in the order of (time, seq), sessions in that
//!   of (end, name). An ended session counts as a job, once it has given back its own.
//! - Jobs that are over are kept for [`Retention`], in the order in which they ended; before and after the ops of a queue
//!   at most [`BULK_JOBS_MAX`] go from the front: what is too many, or ended `age_ms` ago. Their chosen id answers `Held`
//!   until then.
//! - Each death is counted in the queue's *outbox*, for those who are to be told of it: deaths of one type and one
//!   fingerprint ([`fingerprint`]) are one [`DeathGroup`], at most [`OUTBOX_GROUPS_MAX`] a queue; what is more is in
//!   the group [`OTHER_DEATHS`]. A group is born with its first death and only counts up, until it is settled.
//!
//! - A job travels to another shard in three steps, each of which may be repeated: DEPART takes a batch of waiting or dead jobs
//!   out of their order (they are in no state's count or page, nothing is delivered, expires or is changed, and each is
//!   still found by its id in the state it had), ARRIVE adds them there, DEPARTED removes them here. One batch of a queue
//!   is on its way at a time, and its number is higher than those before; what arrives under a number that is not higher than
//!   the last from that shard has arrived before. Ready jobs arrive at the end of the line.
//! - A queue that has been told of the version in which homes moved takes no `ID` or `UNIQUE` from who knows only of an
//!   older one.
//!
//! ## What is recorded
//!
//! Every transition leaves events in the commit that makes it, unless recording is configured off: in the history of its
//! job, and in the journal of its queue, where they are numbered from 1. An enqueue is `job.queued`, or `job.scheduled`
//! where the job waits for its time; a lease `job.started`; an ACK `job.completed`; a RELEASE `job.released`; a PROGRESS
//! `job.progress`. A FAIL and a lapse are `job.failed`, and behind it what became of the job: `job.retried` or `job.dlq`. Falling
//! due is `job.queued`, a redrive `job.redriven`, a CANCEL `job.cancelled`, the end of a ttl `job.expired`, also where it comes
//! instead of something else: behind `job.failed`, `job.released` or `job.redriven`. A job that PURGE or DLQ DELETE removes before
//! it is over is `job.cancelled`, and its error says `purged` or `deleted`; one that has travelled to another shard says `moved`, and
//! begins there with `job.queued` or `job.scheduled`. An EXTEND, a PAUSE and the end of a retention
//! leave none.
//!
//! - A history is known as long as its job, and then, in the order in which jobs were forgotten, for [`Recording`]: before
//!   and after the ops of a queue at most [`BULK_JOBS_MAX`] go from the front, what is too many or of jobs that ended too
//!   long ago. Its middle is dropped where it grows long, and that is said. By a chosen id the history is found
//!   that its last job has.
//! - A journal holds about as many events as [`Recording`] says, and none much older: what is beyond goes in large pieces.
//!
//! Everything random (lease tokens) comes in with the op and all time is the shard's, so the same ops at the same times
//! give the same outcomes on every implementation.

use bytes::Bytes;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::clock::{Millis, UnixMs};
use crate::error::{Error, Result};
use crate::job::{Delivery, JobRef, JobState, JobView, Lease, Name, Policy};
use crate::resp::reply::{Protocol, Reply};
use event::{Entry, Page, Recording};
use feed::Ear;

pub mod embedded;
pub mod event;
pub mod feed;
pub mod keys;
pub mod memory;
mod outbox;
pub mod redis;
pub mod state;

/// Most jobs that fall due in one go before a queue's ops; what is left follows with the next batch or tick.
pub const TICK_JOBS_MAX: usize = 1_000;
/// Most jobs that one PURGE, RETRYALL or other bulk op moves; `Outcome::Moved` says whether there is more.
pub const BULK_JOBS_MAX: usize = 1_000;
/// Most jobs in one page of PEEK or DLQ LIST, and most sessions in one page.
pub const PAGE_JOBS_MAX: usize = 1_000;
/// Once an operation has handed out, looked through or moved so many bytes of jobs, it stops, after the step of at most 16
/// jobs that it is in.
pub const PART_BYTES_MAX: usize = 4 << 20;
/// So many priorities are looked at for the job that has been ready longest.
pub const STATS_PRIORITIES_MAX: usize = 16;
/// Most bytes of the jobs that one PEEK or DLQ LIST shows.
pub const PAGE_BYTES_MAX: usize = 16 * PART_BYTES_MAX;
/// Leases of a session that are looked at to see which is the oldest.
pub const SESSION_LEASES_SEEN: usize = 100;

pub use outbox::{DeathGroup, DeathMark, OTHER_DEATHS, OUTBOX_CHANNELS_MAX, OUTBOX_GROUPS_MAX, fingerprint};

/// A batch on its way to another shard takes no further jobs once it has so many bytes.
pub const TRAVEL_BYTES_MAX: usize = 4 << 20;
/// Jobs that are looked at together on the way there.
pub const TRAVEL_STEP: usize = 16;

/// How long and how many jobs that are over are kept, per queue and shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    pub age_ms: Millis,
    pub jobs: u64,
}

/// The rules that the configuration decides; the same on every shard of a deployment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    pub retention: Retention,
    /// A job whose lease lapsed so often is dead.
    pub lapses_max: u32,
    /// `None`: no events are recorded.
    pub recording: Option<Recording>,
}

impl Default for Rules {
    fn default() -> Self {
        Rules {
            retention: Retention { age_ms: 3_600_000, jobs: 10_000 },
            lapses_max: 3,
            recording: Some(Recording::default()),
        }
    }
}

/// When a new job may start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    Now,
    /// This long after the shard has it.
    Delay(Millis),
    At(UnixMs),
}

/// The kinds of keyed objects. Each kind has its own names, and none meets the queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Keyed {
    /// Held by one at a time. Each grant has a fence, one more than the grant before; a free lock keeps its count.
    Lock,
    /// Held by several. Nothing is kept of one that nobody holds.
    Semaphore,
}

/// What is done to a keyed object. Holders whose time is up are gone before.
#[derive(Clone, Debug, PartialEq)]
pub enum Deed {
    /// Makes `token` a holder for so long while there are fewer than `limit`; one that holds already keeps its fence and
    /// gets the new end. `waits`: who asks will ask again and wants to hear when another lets go. `moved_in`: the version of
    /// the shard map in which locks moved last; a new fence is above [`fence_floor`] of it. [`Outcome::Granted`] or
    /// [`Outcome::NotFree`]
    Acquire { token: u64, limit: u32, ttl_ms: Millis, owner: Bytes, waits: bool, moved_in: u64 },
    /// [`Outcome::Count`] 1, or 0 when the token holds nothing.
    Release { token: u64 },
    /// Moves the end to now + `ttl_ms`. [`Outcome::Count`] 1, or 0 when the token holds nothing.
    Renew { token: u64, ttl_ms: Millis },
    /// [`Outcome::Holders`]
    Show,
}

/// The steps in which a rate's window slides: what a start used is free again at most one of so many parts of it late.
pub const RATE_STEPS: u64 = 512;

/// So many jobs may be started within any `per_ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub jobs: u64,
    pub per_ms: Millis,
}

/// The limits of a queue, or a shard's share of them; `None`: there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueLimits {
    /// Jobs that may be leased at once.
    pub concurrency: Option<u64>,
    pub rate: Option<Rate>,
    /// Ready and scheduled jobs before an enqueue is refused.
    pub waiting: Option<u64>,
}

/// What is done about the limits of a queue. Each is answered with [`Outcome::Limits`], as they are then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LimitDeed {
    Look,
    /// Gives the shard its share, unless it has one of a higher version. What is in use beyond it goes on.
    Share {
        version: u64,
        limits: QueueLimits,
    },
    /// Replaces the ledger of all shares, which means nothing to the shard, where its version still is `was`.
    Note {
        was: u64,
        ledger: Bytes,
    },
}

/// What a shard knows about the limits of a queue, and what is in use of its share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LimitView {
    pub version: u64,
    pub limits: QueueLimits,
    pub ledger_version: u64,
    pub ledger: Bytes,
    pub leased: u64,
    /// Jobs started within the window of the rate.
    pub started: u64,
    /// Ready and scheduled jobs.
    pub waiting: u64,
    /// Jobs in the line; 0 when deliveries are paused.
    pub ready: u64,
}

/// What every fence is above that is granted after locks moved in this version of the shard map: the home that a lock had
/// before has given out none so high.
pub fn fence_floor(moved_in: u64) -> u64 {
    moved_in.min(1 << 20) << 32
}

/// Who holds a keyed object, and for how much longer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub owner: Bytes,
    pub left_ms: Millis,
}

/// What a worker session is to hold: see [`Action::Keep`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Party {
    pub session: Bytes,
    /// How long after its start a lease that is named here may last.
    pub run_ms: Millis,
    /// Those of them that hold their jobs are the session's from now on.
    pub leases: Vec<Lease>,
}

/// A worker session as one queue of one shard knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionView {
    pub session: Bytes,
    /// Since when it has held something without a break.
    pub since: UnixMs,
    /// Its end, unless it is kept longer.
    pub until: UnixMs,
    /// Proxies that keep it.
    pub keepers: u64,
    pub leased: u64,
    /// The earliest start among its leases, of which the first [`SESSION_LEASES_SEEN`] in the order of their seqs are looked at.
    pub oldest_at: Option<UnixMs>,
}

/// One operation on one queue of one shard, or on a keyed object, whose name then stands for the queue's.
#[derive(Clone, Debug, PartialEq)]
pub struct Op {
    pub queue: Name,
    pub action: Action,
}

/// What an operation does, and in brackets its outcome.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Adds one job for each payload, all or none. `policy.id` or `policy.unique` only with one payload. Where more would
    /// wait than the shard's share allows [`Outcome::Full`], and else [`Outcome::Enqueued`]
    Enqueue { policy: Arc<Policy>, payloads: Vec<Bytes>, start: Start },
    /// Leases up to `tokens.len()` jobs of the line, one for each token, and no more than the shard's share of the limits
    /// allows. Nothing from a paused queue. With fewer where they are large, [`Outcome::Leased`], or [`Outcome::Later`]
    Lease { tokens: Vec<u64>, lease_ms: Millis, worker: Bytes },
    /// Completes the leased jobs. [`Outcome::Count`]
    Ack { leases: Vec<Lease>, result: Bytes },
    /// The delivery failed. `retry_in` replaces the backoff; `dead` ends the retries. [`Outcome::State`]
    Fail { lease: Lease, error: Bytes, trace: Bytes, retry_in: Option<Millis>, dead: bool },
    /// Gives the job back, attempt uncounted: at its old place, or after `delay`. [`Outcome::State`]
    Release { lease: Lease, delay: Millis },
    /// Moves the lease's end to now + `lease_ms`. [`Outcome::Until`]
    Extend { lease: Lease, lease_ms: Millis },
    /// Records how far the job is; `percent` is 0 to 100. [`Outcome::Done`]
    Progress { lease: Lease, percent: u8, text: Bytes },
    /// Ends a job that is not over, whoever holds it. [`Outcome::Count`] 1, or 0.
    Cancel { job: JobRef },
    /// [`Outcome::Job`]
    Job { job: JobRef },
    /// A page of the jobs in a state: ready in delivery order, scheduled by due time, leased by lease end, dead and those
    /// that are over newest first. [`Outcome::Jobs`]
    Peek { state: JobState, offset: u64, count: u64 },
    /// How many jobs are in a state. [`Outcome::Count`]
    Len { state: JobState },
    /// [`Outcome::Stats`]
    Stats,
    /// Stops or resumes deliveries, until said otherwise. [`Outcome::Done`]
    Pause { paused: bool },
    /// Removes jobs of a state, at most [`BULK_JOBS_MAX`], in the order of PEEK, but dead and over ones oldest first; leased
    /// ones lose their lease. [`Outcome::Moved`]
    Purge { state: JobState },
    /// One dead job. [`Outcome::Job`]: `None` when it is not dead.
    DeadGet { job: JobRef },
    /// Puts dead jobs back: ready, at the end of the line, spent and lapses 0, redrives one more. [`Outcome::Count`]
    DeadRetry { jobs: Vec<JobRef> },
    /// The same for all that were dead when it began, oldest first: those that died up to `until` (`None`: now, and
    /// `Outcome::Moved` says the point to go on with). Those that stay dead are passed over. [`Outcome::Moved`]
    DeadRetryAll { until: Option<UnixMs> },
    /// Removes dead jobs for good. [`Outcome::Count`]
    DeadDelete { jobs: Vec<JobRef> },
    /// Keeps the sessions for `keep_ms` more, as far as `keeper` is concerned, and hangs leases on them.
    /// [`Outcome::Kept`]
    Keep { keeper: u64, keep_ms: Millis, parties: Vec<Party> },
    /// A page of the queue's sessions by (end, name). [`Outcome::Sessions`]
    Sessions { offset: u64, count: u64 },
    /// [`Outcome::Limits`]
    Limit(LimitDeed),
    /// What happened to a job, which may be forgotten by now. [`Outcome::History`]
    History { job: JobRef },
    /// The events of the journal after this number, oldest first; at most [`event::PAGE_EVENTS_MAX`]. [`Outcome::Events`]
    EventsAfter { number: u64, count: u64 },
    /// The newest events of the journal, oldest first; at most [`event::PAGE_EVENTS_MAX`]. [`Outcome::Events`]
    EventsRecent { count: u64 },
    /// Moves what has fallen due and trims what is kept; nothing else. [`Outcome::Done`]
    Tick,
    /// The groups of deaths in the outbox, by their keys. [`Outcome::Outbox`]
    Outbox,
    /// So many deaths of each group were told on a channel; what was told before, and what the group does not count, is
    /// passed over. [`Outcome::Done`]
    OutboxTold { channel: Bytes, marks: Vec<DeathMark> },
    /// Takes the groups out that have exactly these deaths; one that has more stays. [`Outcome::Done`]
    OutboxSettle { marks: Vec<DeathMark> },
    /// Which job holds one of these, if any; from now on nobody who knows of older homes gets them here.
    /// [`Outcome::Enqueued`] with one or none
    Seek { id: Option<Bytes>, unique: Option<Bytes>, homes_since: u64 },
    /// Takes up to `count` ready, scheduled or dead jobs out of their order, oldest first, for [`TRAVEL_BYTES_MAX`]; `route` is
    /// kept with them. While a batch is on its way, that one; where it has the mark `outdated`, under a new one.
    /// [`Outcome::Departing`]
    Depart { state: JobState, count: u64, route: Bytes, outdated: TravelMark },
    /// Adds a batch of another shard's jobs. [`Outcome::Count`]: 0 when it is here already; [`Outcome::Outdated`] when a later
    /// one is: whether this one was ever here is not known.
    Arrive { source: Bytes, mark: TravelMark, jobs: Arc<Vec<JobView>> },
    /// Removes a batch that has arrived. [`Outcome::Count`]
    Departed { mark: TravelMark },
    /// On a lock or semaphore instead of a queue; it has no [`Effect`].
    Keyed { kind: Keyed, deed: Deed },
}

/// What became of one new job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placed {
    /// It was added under this seq.
    Added(u64),
    /// Nothing was added: this job holds the `ID` or the `UNIQUE` key.
    Held { seq: u64, chosen: Option<Bytes> },
    /// Nothing was added: homes have moved since, and this may be the wrong shard for it.
    Outdated,
}

/// Which batch of a queue's jobs left a shard. A later one is larger, also where the clock was set back, since it is never
/// below the last one's, and from a shard that lost its last writes in a fail-over, since its clock went on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct TravelMark {
    pub at: UnixMs,
    pub number: u64,
}

/// A batch of jobs on their way to other shards. No jobs: there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Departure {
    pub mark: TravelMark,
    pub route: Bytes,
    pub jobs: Vec<JobView>,
}

/// The counters of a queue on one shard, since the shard first saw the queue, and how many jobs are in each state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    pub ready: u64,
    pub scheduled: u64,
    pub leased: u64,
    pub dead: u64,
    /// Kept ones of the states that are over.
    pub completed_kept: u64,
    pub cancelled_kept: u64,
    pub expired_kept: u64,
    pub enqueued: u64,
    pub delivered: u64,
    pub completed: u64,
    pub failed: u64,
    pub lapsed: u64,
    pub released: u64,
    pub died: u64,
    pub redriven: u64,
    pub cancelled: u64,
    pub expired: u64,
    pub paused: bool,
    /// The ledger of the queue's limits is kept here, and there are some.
    pub keeps_limits: bool,
    /// Since when the job has been ready that is so for longest, of the next one of each of the [`STATS_PRIORITIES_MAX`]
    /// highest priorities.
    pub oldest_ready_at: Option<UnixMs>,
    /// The shard's clock when this was read.
    pub now: UnixMs,
}

/// The answer to one [`Op`].
#[derive(Debug, PartialEq)]
pub enum Outcome {
    Enqueued(Vec<Placed>),
    /// Nothing was added of this op.
    Full(Box<Op>),
    /// Nothing was leased for this op, since those before it took [`PART_BYTES_MAX`]: it is to be asked again.
    Later(Box<Op>),
    /// The jobs of a page have more than [`PAGE_BYTES_MAX`].
    PageTooBig,
    Limits(Box<LimitView>),
    Leased(Vec<Delivery>),
    Count(u64),
    State(JobState),
    Until(UnixMs),
    Done,
    Job(Option<Box<JobView>>),
    Jobs(Vec<JobView>),
    Stats(Box<Stats>),
    /// The groups, and the shard's clock.
    Outbox {
        groups: Vec<DeathGroup>,
        now: UnixMs,
    },
    /// How many leases each session has now.
    Kept(Vec<u64>),
    /// With the shard's clock.
    Sessions(UnixMs, Vec<SessionView>),
    /// Oldest first; empty when nothing is known.
    History(Vec<Entry>),
    Events(Page),
    /// `count` were moved; `next` is set while there may be more: the `until` to go on with (a PURGE ignores it).
    Moved {
        count: u64,
        next: Option<UnixMs>,
    },
    /// `fence` is 0 for a semaphore.
    Granted {
        fence: u64,
    },
    /// Until the first holder's time is up, unless it is renewed.
    NotFree {
        free_in: Millis,
    },
    /// In the order in which their time is up; the fence of the last grant.
    Holders {
        fence: u64,
        holders: Vec<Holder>,
    },
    Departing(Departure),
    /// The job is on its way to another shard; nothing was done.
    OnItsWay,
    /// A later batch of that shard has arrived.
    Outdated,
    LeaseLost,
    NoSuchJob,
}

/// What a batch leaves for the lane to act on. One for each queue that the batch touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effect {
    pub queue: Name,
    /// Jobs that can be leased after the batch; 0 when deliveries are paused.
    pub ready: u64,
    /// Ready, leased and scheduled jobs after the batch: the load that placement looks at.
    pub load: u64,
    /// Until something in this queue falls due (an end of a lease or session, a due time, a ttl, a rate that lets more
    /// start), from now; `None`: nothing will.
    pub due_in: Option<Millis>,
    /// Deaths that the groups in the outbox count after the batch.
    pub deaths: u64,
}

/// The answer to one batch: an outcome for each op in the same order, and the effects. An op that fails alone fails in
/// its outcome; where the whole call failed every outcome carries the error and there are no effects.
#[derive(Debug)]
pub struct Applied {
    pub outcomes: Vec<Result<Outcome>>,
    pub effects: Vec<Effect>,
}

impl Applied {
    pub fn failed(ops: usize, error: &Error) -> Applied {
        Applied { outcomes: (0..ops).map(|_| Err(error.clone())).collect(), effects: Vec::new() }
    }
}

/// What a shard says of itself when asked: for `goflow check`, `GOFLOW.SHARDS` and the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// For example `redis 7.0.15` or `embedded`.
    pub server: String,
    /// How it keeps what it acknowledged, in words.
    pub durability: String,
    /// What is unsafe about its settings, one sentence each; empty when nothing is.
    pub warnings: Vec<String>,
}

/// What a shard says of itself unasked, whoever did it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The queue stopped being empty.
    Queue(Name),
    /// The queue's outbox stopped being empty.
    Deaths(Name),
    /// A holder let go of an object for which somebody waited.
    Freed(Keyed, Name),
    /// The shard was stamped with a newer map.
    Map,
    /// Wake-ups may have been missed: every queue counts as not empty and every object as free.
    Missed,
}

pub type OnWake = Arc<dyn Fn(Wake) + Send + Sync>;

pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One backend that holds a part of every queue.
pub trait Shard: Send + Sync + 'static {
    /// Applies the ops in order and commits, then answers. `at` replaces the shard's clock in tests; in production it is
    /// `None`. Ops of one queue see each other's effects; each queue's part is one commit. Never called twice at once.
    fn apply(&self, ops: Vec<Op>, at: Option<UnixMs>) -> BoxFuture<'_, Applied>;

    /// The names of the queues that the shard has ever seen, sorted.
    fn queues(&self) -> BoxFuture<'_, Result<Vec<Name>>>;

    /// The locks and semaphores that something is known of; a shard that cannot tell names none.
    fn objects(&self) -> BoxFuture<'_, Result<Vec<(Keyed, Name)>>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    /// From now on calls `on_wake` for each queue that becomes non-empty and each awaited object that is freed. An implementation whose only writer is this
    /// process need not call it: the effects of its batches say the same.
    fn watch(&self, on_wake: OnWake);

    /// From now on tells the ear what the process wishes to hear of what happens on the shard, whoever did it. Called once.
    fn follow(&self, ear: Arc<Ear>);

    /// Asks the backend who and how it is. Also reconnects where that is needed.
    fn probe(&self) -> BoxFuture<'_, Result<Health>>;

    /// Stamps the shard on first use with the deployment's and its own name and stores the shard map and its version; an error
    /// says why the shard must not be used: another stamp, another shard's name, or a map that is newer or not the same.
    /// Compares and writes as one, so that of two maps under one version the first that a shard bears is its only one.
    /// Those who watch hear of a newer map by [`Wake::Map`].
    fn claim(&self, stamp: Stamp) -> BoxFuture<'_, Result<()>>;

    /// The stamp that the shard bears, if any; changes nothing. For `goflow check`.
    fn stamp(&self) -> BoxFuture<'_, Result<Option<Stamp>>>;

    /// Asks for a role that one process at a time has, for the next `for_ms`: true when `holder` has it now. Who has it and
    /// asks again in time keeps it. A shard that only one process can use gives it to whoever asks.
    fn lead(&self, role: &'static str, holder: &str, for_ms: Millis) -> BoxFuture<'_, Result<bool>> {
        let _ = (role, holder, for_ms);
        Box::pin(async { Ok(true) })
    }

    /// Keeps a note of a role for whoever has it next, or removes it; false, and nothing is done, when `holder` has not the
    /// role now. Notes are as durable as jobs are.
    fn note<'a>(
        &'a self,
        role: &'static str,
        holder: &'a str,
        name: &'a str,
        text: Option<Bytes>,
    ) -> BoxFuture<'a, Result<bool>>;

    /// The notes of a role, by their names.
    fn notes(&self, role: &'static str) -> BoxFuture<'_, Result<Vec<(String, Bytes)>>>;

    /// Goes by other rules from the next batch on.
    fn set_rules(&self, rules: Rules);

    /// What takes the shard's ordinary commands.
    fn keyspace(&self) -> Keyspace {
        Keyspace::None
    }
}

/// What [`Shard::claim`] writes on a shard and compares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    pub deployment: String,
    pub shard: String,
    /// The version of the shard map, and the map in one line, so that two maps under one version are told apart.
    pub map_version: u64,
    pub map: String,
}

/// What takes the ordinary commands (`LPUSH`, `GET` ...) of a shard: the second seam.
#[derive(Clone)]
pub enum Keyspace {
    /// Nothing does; they are refused.
    None,
    /// A server that speaks RESP itself: requests and replies pass as the bytes they are.
    Server(Arc<dyn Dial>),
    /// This process.
    Local(Arc<dyn Keys>),
}

/// A connection to a server.
pub trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Socket for T {}

/// A server that raw connections can be opened to.
pub trait Dial: Send + Sync + 'static {
    /// Opens a connection that has authenticated, selected its database and speaks the protocol.
    fn dial(&self, protocol: Protocol) -> BoxFuture<'_, Result<Box<dyn Socket>>>;
}

/// Ordinary requests, words and all, that are run in a row with nothing of others between them.
#[derive(Clone, Debug, Default)]
pub struct Unit {
    /// Some replies have another shape in RESP3 than the encoding alone gives them.
    pub protocol: Protocol,
    /// With none it is only asked whether what is watched has changed. What blocks in Redis does not wait here: it answers
    /// as it does inside `MULTI`.
    pub requests: Vec<Vec<Bytes>>,
    /// `WATCH`: run nothing, and answer `None`, when one of these keys has another version by now.
    pub watched: Vec<(Bytes, u64)>,
}

/// Called with each key that was written, removed or expired, after the commit. Must not block.
pub type OnChange = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// A keyspace in this process. The requests name commands of Redis with their arguments; what is not known or has the
/// wrong arguments is answered in Redis's words.
pub trait Keys: Send + Sync + 'static {
    /// Runs the unit, commits, then answers: one reply for each request. Takes its place in the line of commits when it
    /// is called, not when it is first polled, so that what one caller sends in a row is applied in a row.
    fn run(&self, unit: Unit) -> BoxFuture<'static, Result<Option<Vec<Reply>>>>;

    /// A number that changes with every change of the key.
    fn version(&self, key: &[u8]) -> u64;

    /// From now on calls `on_change`. Called once.
    fn observe(&self, on_change: OnChange);
}
