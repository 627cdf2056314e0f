//! One lane per shard and process: the only caller of [`Shard::apply`].
//!
//! Takes everything that has gathered in its mailbox, orders it into runs of like operations, applies it as one batch,
//! answers the sessions, then acts on the effects; what comes in meanwhile is the next batch. No timer: idle costs no
//! latency, load makes batches larger. Waiting clients of the shard's queues stand here, beside the writer, so a wake-up
//! cannot be lost.
//!
//! Promises: the operations of one session on one queue apply in the order sent, but for a lease that got nothing because
//! those before it took all the bytes of a batch ([`Outcome::Later`]), which comes first in the next; an answered write is committed; waiters
//! of one lane are served oldest first; a full mailbox is back-pressure ([`Lane::submit`] hands the parcel back).
//! Leaves placement to `router`, and what a ticket is to `waiting`.
//!
//! Here are the handle that others hold and the mailbox; who empties it is `lane/line.rs`.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dashmap::DashMap;
use foldhash::fast::RandomState;
use futures_util::FutureExt;
use rand::Rng;
use tokio::sync::{Notify, oneshot};

use super::bound::Book;
use super::feed::Feed;
use super::outboxes::Outboxes;
use super::post::{self, Reply};
use super::turnstile::Lines;
use super::waiting::Ticket;
use crate::error::{Code, Error, Happened, Result};
use crate::job::{Delivery, Lease, Name, TOKEN_MAX};
use crate::metrics::Metrics;
use crate::shard::{Action, Op, Outcome, Shard, Stamp, Wake};

mod line;

use line::Line;

/// Most operations and payload bytes that wait in a mailbox; beyond it sessions stop reading.
const MAILBOX_OPS_MAX: usize = 65_536;
const MAILBOX_BYTES_MAX: usize = 64 << 20;
/// How long a session waits for room in a mailbox before it answers OVERLOADED.
pub const ROOM_WAIT: Duration = Duration::from_secs(5);
/// Queues whose load and timers a lane keeps; the others are found by the sweep.
const QUEUES_KEPT_MAX: usize = 100_000;
/// How long a lane goes by a stamp that it has seen: so long at most a proxy that has missed a change of the map may use a
/// shard by the old one.
pub const CLAIM_LASTS: Duration = Duration::from_secs(1);
/// How long a batch waits for the newer map that its shard knows of.
const MAP_WAIT: Duration = Duration::from_secs(3);
/// Tickets in the mailbox before those that are over are cleared out.
const PARKED_MIN: usize = 1_024;

/// Jobs leased for a client, with the promise that they go back if the client never gets them.
#[derive(Debug)]
pub struct Leased {
    pub queue: Name,
    pub shard: Arc<str>,
    pub deliveries: Vec<Delivery>,
    pub hold: Hold,
}

impl Leased {
    /// Gives back all but the first `count` jobs.
    pub fn keep(&mut self, count: usize) {
        self.deliveries.truncate(count);
        drop(self.hold.split_off(count));
    }
}

/// Gives leases back, attempt uncounted and at their old place, unless it is settled first.
pub struct Hold {
    lane: Option<Arc<Lane>>,
    queue: Name,
    leases: Vec<Lease>,
}

impl Hold {
    /// The client has the jobs; from here their leases decide.
    pub fn settle(mut self) {
        self.lane = None;
    }

    fn split_off(&mut self, at: usize) -> Hold {
        let leases = self.leases.split_off(at.min(self.leases.len()));
        Hold { lane: self.lane.clone(), queue: self.queue.clone(), leases }
    }

    /// The client has the jobs, and somebody else sees to their leases.
    pub fn into_parts(mut self) -> Option<(Arc<Lane>, Name, Vec<Lease>)> {
        let lane = self.lane.take()?;
        Some((lane, self.queue.clone(), std::mem::take(&mut self.leases)))
    }

    /// The jobs are done.
    pub fn ack(mut self) {
        if let Some(lane) = self.lane.take() {
            let action = Action::Ack { leases: std::mem::take(&mut self.leases), result: Bytes::new() };
            lane.mail().push(Op { queue: self.queue.clone(), action }, 0, Answer::Nobody);
            lane.bell.notify_one();
        }
    }
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hold({} of {})", self.leases.len(), self.queue)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(lane) = self.lane.take() {
            // Last leased first, so that each lands before the one that stood behind it.
            for lease in self.leases.drain(..).rev() {
                lane.mail().put(release(self.queue.clone(), lease));
            }
            lane.bell.notify_one();
        }
    }
}

/// Who hears the outcome of an operation.
enum Answer {
    Session(Reply<Result<Outcome>>),
    /// A session, whose jobs were refused before: what is said now is the last word.
    Again(Reply<Result<Outcome>>),
    Leasing(Reply<Result<Leased>>),
    Ticket(Arc<Ticket>),
    /// Nobody, but it must be done, and may be done twice: a shard that is out of reach is told again when it is back.
    Owed(Op),
    Nobody,
}

/// New jobs that the shard had no room for, and who hears of it.
pub struct Refused {
    pub op: Op,
    answer: Reply<Result<Outcome>>,
}

impl Refused {
    pub fn jobs(&self) -> u64 {
        op_jobs(&self.op) as u64
    }

    /// There is no room anywhere.
    pub fn refuse(self) {
        self.answer.send(Ok(Outcome::Full(Box::new(self.op))));
    }

    /// Lets the shard decide once more.
    pub fn submit(self, lane: &Lane) {
        lane.mail().push(self.op, 0, Answer::Again(self.answer));
        lane.bell.notify_one();
    }
}

/// An operation on its way through the lane.
struct Parcel {
    op: Op,
    /// Which session sent it; 0 for the lane's own, which keep no order.
    session: u64,
    answer: Answer,
}

impl Parcel {
    /// Says that nothing was done, to whoever waits for it.
    fn refuse(self, error: &Error) {
        match self.answer {
            Answer::Session(reply) | Answer::Again(reply) => reply.send(Err(error.clone())),
            Answer::Leasing(reply) => reply.send(Err(error.clone())),
            Answer::Ticket(_) | Answer::Owed(_) | Answer::Nobody => {}
        }
    }
}

#[derive(Default)]
struct Mailbox {
    parcels: VecDeque<Parcel>,
    bytes: usize,
    parked: Vec<(Name, Arc<Ticket>)>,
    /// How many were parked after those that are over were last cleared out.
    parked_cleared: usize,
    /// Queues to look at again because another lane let go of a ticket.
    nudged: HashSet<Name, RandomState>,
    /// Queues of which the shard said that they stopped being empty; `all_woken` when it may have said more.
    woken: HashSet<Name, RandomState>,
    all_woken: bool,
    /// The shard is in the map no more: what comes is refused.
    ended: bool,
}

impl Mailbox {
    fn push(&mut self, op: Op, session: u64, answer: Answer) {
        self.put(Parcel { op, session, answer });
    }

    fn put(&mut self, parcel: Parcel) {
        if self.ended {
            return parcel.refuse(&removed());
        }
        self.bytes += op_bytes(&parcel.op);
        self.parcels.push_back(parcel);
    }

    /// Puts parcels before all others, in their order.
    fn put_first(&mut self, parcels: Vec<Parcel>) {
        if self.ended {
            return parcels.into_iter().for_each(|parcel| parcel.refuse(&removed()));
        }
        for parcel in parcels.into_iter().rev() {
            self.bytes += op_bytes(&parcel.op);
            self.parcels.push_front(parcel);
        }
    }
}

fn removed() -> Error {
    Error::new(Code::ShardDown, "the shard was removed; nothing was done")
}

fn owed(op: Op, session: u64) -> Parcel {
    Parcel { op: op.clone(), session, answer: Answer::Owed(op) }
}

/// Gives a lease back, attempt uncounted and at the job's old place.
fn release(queue: Name, lease: Lease) -> Parcel {
    let op = Op { queue, action: Action::Release { lease, delay: 0 } };
    owed(op, 0)
}

/// What a lane tells everybody about its shard.
#[derive(Debug)]
pub struct Vitals {
    down: AtomicBool,
    /// The lane itself has met a failure, and only its own next answer ends that.
    resting: AtomicBool,
    pub batches: AtomicU64,
    pub ops: AtomicU64,
    pub errors: AtomicU64,
    /// Exponentially weighted mean of a batch's round trip, in microseconds.
    pub latency_us: AtomicU64,
    last_error: Mutex<Option<Error>>,
}

/// The process's one ordered line of job operations to one shard.
pub struct Lane {
    name: Arc<str>,
    index: usize,
    shard: Arc<dyn Shard>,
    stamp: Mutex<Stamp>,
    /// Rung with each new stamp.
    restamped: Notify,
    /// To be rung when the shard knows of a newer map.
    news: Arc<Notify>,
    mailbox: Mutex<Mailbox>,
    /// A batch is on its way.
    applying: AtomicBool,
    /// When the shard was last seen to bear our stamp; forgotten when it is down, since another server may stand in its
    /// place then.
    claimed_at: Mutex<Option<Instant>>,
    bell: Notify,
    room: Notify,
    /// Jobs that wait or run, per queue: as the last answer said, plus what was sent since.
    loads: DashMap<Name, u64, RandomState>,
    /// Who waits for the shard's locks and semaphores.
    pub lines: Lines,
    /// New jobs that were refused, for whoever finds room ([`limits`](super::limits)).
    refused: Mutex<Vec<Refused>>,
    refused_bell: Notify,
    /// Queues whose shares this process moves.
    limited: Mutex<BTreeSet<Name>>,
    /// The shard's queues with deaths to tell of.
    pub outboxes: Outboxes,
    /// Worker sessions that may have leases on the shard.
    pub book: Book,
    pub vitals: Vitals,
}

impl Lane {
    pub fn new(name: Arc<str>, index: usize, shard: Arc<dyn Shard>, stamp: Stamp, news: Arc<Notify>) -> Arc<Lane> {
        let vitals = Vitals {
            down: AtomicBool::new(false),
            resting: AtomicBool::new(false),
            batches: AtomicU64::new(0),
            ops: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            latency_us: AtomicU64::new(0),
            last_error: Mutex::new(None),
        };
        Arc::new(Lane {
            name,
            index,
            shard,
            stamp: Mutex::new(stamp),
            restamped: Notify::new(),
            news,
            mailbox: Mutex::default(),
            applying: AtomicBool::new(false),
            claimed_at: Mutex::default(),
            bell: Notify::new(),
            room: Notify::new(),
            loads: DashMap::with_hasher(RandomState::default()),
            lines: Lines::default(),
            refused: Mutex::default(),
            refused_bell: Notify::new(),
            limited: Mutex::default(),
            outboxes: Outboxes::default(),
            book: Book::default(),
            vitals,
        })
    }

    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub fn index(&self) -> usize {
        self.index
    }

    pub fn shard(&self) -> &Arc<dyn Shard> {
        &self.shard
    }

    pub fn is_down(&self) -> bool {
        self.vitals.down.load(Ordering::Relaxed)
    }

    fn stamp(&self) -> Stamp {
        self.stamp.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Goes by another map from here on.
    pub fn restamp(&self, stamp: Stamp) {
        *self.stamp.lock().unwrap_or_else(PoisonError::into_inner) = stamp;
        self.unclaim();
        self.restamped.notify_waiters();
    }

    fn unclaim(&self) {
        *self.claimed_at.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The shard is in the map no more: what is still in line is refused, and the lane ends.
    pub fn end(&self) {
        tracing::info!(shard = %self.name, "shard was removed");
        let parcels = {
            let mut mail = self.mail();
            mail.ended = true;
            mail.bytes = 0;
            mail.parked.clear();
            std::mem::take(&mut mail.parcels)
        };
        parcels.into_iter().for_each(|parcel| parcel.refuse(&removed()));
        self.lines.ring_all();
        self.bell.notify_one();
        self.room.notify_waiters();
        self.restamped.notify_waiters();
    }

    pub fn is_ended(&self) -> bool {
        self.mail().ended
    }

    pub fn last_error(&self) -> Option<Error> {
        self.vitals.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn load(&self, queue: &Name) -> Option<u64> {
        self.loads.get(queue).map(|load| *load)
    }

    /// All jobs that wait or run on the shard, as far as this process has heard.
    pub fn depth(&self) -> u64 {
        self.loads.iter().map(|load| *load).sum()
    }

    fn mail(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the mailbox takes another operation. A session that finds it full waits for [`Lane::room`].
    pub fn has_room(&self) -> bool {
        let mail = self.mail();
        mail.parcels.len() < MAILBOX_OPS_MAX && mail.bytes < MAILBOX_BYTES_MAX
    }

    /// Resolves when the mailbox has room; OVERLOADED after [`ROOM_WAIT`].
    pub async fn room(&self) -> Result<()> {
        let roomy = async {
            loop {
                let freed = self.room.notified();
                if self.has_room() {
                    return;
                }
                freed.await;
            }
        };
        tokio::time::timeout(ROOM_WAIT, roomy).await.map_err(|_| {
            let bound = format!("{MAILBOX_OPS_MAX} operations or {MAILBOX_BYTES_MAX} bytes");
            Error::new(Code::Overloaded, format!("{bound} wait for shard {} already; nothing was done", self.name))
        })
    }

    /// What somebody else has heard of the shard, for a lane that has nothing to ask it.
    pub fn note_reach(&self, reach: Result<()>) {
        match reach {
            Ok(()) if !self.vitals.resting.load(Ordering::Relaxed) => self.note_back(),
            Err(error) if error.code == Code::ShardDown => {
                self.unclaim();
                if !self.vitals.down.swap(true, Ordering::Relaxed) {
                    tracing::warn!(shard = %self.name, %error, "shard is down");
                }
                *self.vitals.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
            _ => {}
        }
    }

    /// The shard answers. Whatever was believed before may have changed meanwhile.
    fn note_back(&self) {
        if self.vitals.down.swap(false, Ordering::Relaxed) {
            tracing::info!(shard = %self.name, "shard is back");
            self.woken(Wake::Missed);
        }
    }

    /// Puts an operation in line; the receiver gets its outcome. The operations of one session keep their order.
    pub fn submit(&self, op: Op, session: u64) -> oneshot::Receiver<Result<Outcome>> {
        let (reply, receiver) = post::reply();
        if let Action::Enqueue { payloads, .. } = &op.action
            && let Some(mut load) = self.loads.get_mut(&op.queue)
        {
            *load += payloads.len() as u64;
        }
        self.mail().push(op, session, Answer::Session(reply));
        self.bell.notify_one();
        receiver
    }

    /// Puts a release in line that must be done, as soon as the shard can be reached.
    pub fn give_back(&self, op: Op, session: u64) {
        self.mail().put(owed(op, session));
        self.bell.notify_one();
    }

    /// Puts a lease in line for a client that does not wait.
    pub fn submit_lease(&self, op: Op, session: u64) -> oneshot::Receiver<Result<Leased>> {
        let (reply, receiver) = post::reply();
        self.mail().push(op, session, Answer::Leasing(reply));
        self.bell.notify_one();
        receiver
    }

    /// Resolves when new jobs were refused.
    pub async fn has_refused(&self) {
        self.refused_bell.notified().await;
    }

    pub fn take_refused(&self) -> Vec<Refused> {
        std::mem::take(&mut *self.refused.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn note_refused(&self, op: Op, answer: Reply<Result<Outcome>>) {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).push(Refused { op, answer });
        self.refused_bell.notify_one();
    }

    /// The queues whose shares this process moves.
    pub fn limited(&self) -> Vec<Name> {
        self.limited.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Whether the shard keeps limits of a queue, as far as anybody says.
    pub fn note_limits(&self, queue: &Name, keeps_limits: bool) {
        let mut limited = self.limited.lock().unwrap_or_else(PoisonError::into_inner);
        match keeps_limits {
            true if !limited.contains(queue) => drop(limited.insert(queue.clone())),
            true => {}
            false => drop(limited.remove(queue)),
        }
    }

    /// Another process moves the shares.
    pub fn forget_limits(&self) {
        self.limited.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Puts a ticket in the line of a queue.
    pub fn park(&self, queue: Name, ticket: Arc<Ticket>) {
        let mut mail = self.mail();
        // A lane whose shard hangs takes no tickets in, and clients that ask again and again must not pile up here.
        if mail.parked.len() >= 2 * mail.parked_cleared + PARKED_MIN {
            mail.parked.retain(|(_, ticket)| !ticket.is_over());
            mail.parked_cleared = mail.parked.len();
        }
        mail.parked.push((queue, ticket));
        drop(mail);
        self.bell.notify_one();
    }

    /// Looks at a queue again, because a ticket that was passed over is free.
    pub fn nudge(&self, queue: &Name) {
        self.mail().nudged.insert(queue.clone());
        self.bell.notify_one();
    }

    fn woken(&self, wake: Wake) {
        match &wake {
            Wake::Queue(_) => {}
            Wake::Freed(kind, name) => return self.lines.ring(*kind, name),
            Wake::Deaths(queue) => return self.outboxes.woken(queue.clone()),
            Wake::Map => return self.news.notify_one(),
            Wake::Missed => {
                self.lines.ring_all();
                self.outboxes.miss();
            }
        }
        let mut mail = self.mail();
        match wake {
            Wake::Queue(queue) if mail.woken.len() < QUEUES_KEPT_MAX => {
                mail.woken.insert(queue);
            }
            _ => mail.all_woken = true,
        }
        drop(mail);
        self.bell.notify_one();
    }

    /// Makes sure that the shard is ours, under our map, before anything is written to it. A newer map that the shard knows
    /// of is waited for.
    pub async fn claim(&self) -> Result<()> {
        let refused_at = Instant::now();
        loop {
            let claimed_at = *self.claimed_at.lock().unwrap_or_else(PoisonError::into_inner);
            if claimed_at.is_some_and(|at| at.elapsed() < CLAIM_LASTS) {
                return Ok(());
            }
            if self.is_ended() {
                return Err(Error::shard_down(&self.name, "was removed", Happened::No));
            }
            let (asked_at, stamp, restamped) = (Instant::now(), self.stamp(), self.restamped.notified());
            match self.shard.claim(stamp.clone()).await {
                Ok(()) => {
                    let mut claimed_at = self.claimed_at.lock().unwrap_or_else(PoisonError::into_inner);
                    // Under a stamp that was replaced meanwhile it is no claim.
                    if self.stamp().map_version == stamp.map_version {
                        *claimed_at = Some(asked_at);
                        return Ok(());
                    }
                }
                Err(error) if error.code == Code::ShardDown => return Err(error),
                Err(error) => {
                    let is_newer = |found: &Stamp| {
                        found.deployment == stamp.deployment
                            && found.shard == stamp.shard
                            && found.map_version > stamp.map_version
                    };
                    let found = self.shard.stamp().await?;
                    if !found.as_ref().is_some_and(is_newer) || refused_at.elapsed() >= MAP_WAIT {
                        return Err(error);
                    }
                    self.news.notify_one();
                    // Without a new stamp it is asked anew after the while, and then given up.
                    let _ = tokio::time::timeout(MAP_WAIT, restamped).await;
                }
            }
        }
    }

    /// What an error of a claim means for an operation: a shard that is not ours is as good as down.
    fn as_down(&self, error: Error) -> Error {
        match error.code {
            Code::ShardDown => error,
            _ => Error::shard_down(&self.name, &format!("is not used: {}", error.text), Happened::No),
        }
    }

    /// Whether nothing waits and nothing is on its way.
    pub fn is_idle(&self) -> bool {
        self.mail().parcels.is_empty() && !self.applying.load(Ordering::Acquire)
    }

    /// Serves the lane until the process ends.
    pub async fn run(self: Arc<Lane>, metrics: Arc<Metrics>, feed: Arc<Feed>) {
        self.shard.follow(feed.ear(self.name.clone()));
        let lane = self.clone();
        self.shard.watch(Arc::new(move |wake| lane.woken(wake)));
        let mut line = Line::new(self, metrics);
        while !line.lane.is_ended() {
            // A lane that stopped would leave its sessions without an answer for ever. Whoever was in the batch that
            // panicked is told that it may have happened.
            if AssertUnwindSafe(line.turn()).catch_unwind().await.is_err() {
                tracing::error!(shard = %line.lane.name, "a batch panicked; the lane goes on");
                line.rest();
            }
        }
    }
}

/// Payload bytes of an operation, for the bounds.
fn op_bytes(op: &Op) -> usize {
    match &op.action {
        Action::Enqueue { policy, payloads, .. } => {
            policy.bytes() + payloads.iter().map(|payload| payload.len() + 64).sum::<usize>()
        }
        Action::Lease { tokens, worker, .. } => tokens.len() * 8 + worker.len() + 64,
        Action::Progress { text, .. } => text.len() + 64,
        Action::Ack { leases, result } => leases.len() * 16 + result.len(),
        Action::Fail { error, trace, .. } => error.len() + trace.len() + 64,
        _ => 64,
    }
}

/// Jobs of an operation, for the bounds.
fn op_jobs(op: &Op) -> usize {
    match &op.action {
        Action::Enqueue { payloads, .. } => payloads.len(),
        Action::Lease { tokens, .. } => tokens.len(),
        Action::Ack { leases, .. } => leases.len(),
        Action::Keep { parties, .. } => parties.iter().map(|party| 1 + party.leases.len()).sum(),
        Action::DeadRetry { jobs } | Action::DeadDelete { jobs } => jobs.len(),
        _ => 1,
    }
}

/// Random lease tokens.
pub fn new_tokens(count: usize) -> Vec<u64> {
    let mut random = rand::rng();
    (0..count).map(|_| random.random_range(0..TOKEN_MAX)).collect()
}
