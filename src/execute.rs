//! Runs a [`Plan`] against the dispatcher: the only place where plans meet shards.
//!
//! [`execute`] never waits. It submits what the plan wants at once, so that what one connection sent is in its lanes'
//! order, and returns an [`Answer`] that the session resolves in request order. An answer that takes several steps
//! ([`Answer::Later`]) also holds back the requests behind it, as a blocking command does in Redis.

pub mod durable;
pub mod events;
mod homes;

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use durable::Popped;
use tokio::sync::{Notify, oneshot, watch};

use crate::clock::Millis;
use crate::command::{Acquire, Dequeue, Enqueue, JobAddress, Merge, Plan, Render, Route, job, lock};
use crate::dispatch::bound::Binding;
use crate::dispatch::lane::{Hold, Lane, Leased, new_tokens};
use crate::dispatch::router::Candidates;
use crate::dispatch::turnstile::{self, Claim, Wanted};
use crate::dispatch::waiting::Ticket;
use crate::dispatch::{Dispatcher, ShardMap, no_shard};
use crate::error::{Code, Error, Happened, Result};
use crate::forward::park::GiveBack;
use crate::forward::{Forwarded, Started};
use crate::job::{JobRef, Lease, Name, format_id};
use crate::resp::reply::{Protocol, Reply, put_header};
use crate::shard::{Action, Deed, Keyed, Op, Outcome, Placed};

/// What execute needs to know of the client.
#[derive(Clone, Copy, Debug)]
pub struct Asker {
    /// The client's connection: its operations keep their order under this number.
    pub session: u64,
    /// The longest wait of a blocking command, in milliseconds.
    pub block_ms_max: Millis,
}

/// What is undone when it is dropped before it is settled: the client never got what it stands for.
#[derive(Debug)]
pub enum Keep {
    Jobs(Hold),
    /// Jobs of a worker session, which the connection looks after from here.
    /// Doubtful: the client may have given up waiting for them.
    Bound(Hold, Binding, bool),
    Elements(GiveBack),
    /// Elements of a durable list, which the session keeps until they are acked.
    Popped(Popped),
    /// A lock or slot, which the session keeps where it is bound.
    Grant(Claim),
}

impl Keep {
    /// The client has it.
    pub fn settle(self) {
        match self {
            Keep::Jobs(hold) | Keep::Bound(hold, ..) => hold.settle(),
            Keep::Elements(back) => back.settle(),
            Keep::Popped(popped) => popped.ack(),
            Keep::Grant(claim) => claim.settle(),
        }
    }

    /// Jobs that are the worker session's once the client has them.
    pub fn bound(self, binding: &Binding, is_doubtful: bool) -> Keep {
        match self {
            Keep::Jobs(hold) => Keep::Bound(hold, binding.clone(), is_doubtful),
            keep => keep,
        }
    }
}

/// More than a delivery has beside its payload and the texts of its policy.
const DELIVERY_BYTES: usize = 2_048;

/// A finished answer.
#[derive(Debug)]
pub enum Done {
    Reply(Reply),
    /// What a blocking command took.
    Taken(Reply, GiveBack),
    /// What a pop from a durable list leased.
    Popped(Reply, Popped),
    /// A lock or a slot of a semaphore.
    Granted(Reply, Claim),
    /// One job, written as a map.
    Delivery(Leased),
    /// Several jobs, written as an array of maps.
    Deliveries(Vec<Leased>),
}

impl Done {
    /// Of several jobs no more than fit into a reply of so many bytes, but one at least; the others go back.
    pub fn within(mut self, bytes_max: usize) -> Done {
        if let Done::Deliveries(groups) = &mut self {
            let (mut bytes, mut is_first) = (0, true);
            for leased in groups {
                let fits = leased.deliveries.iter().take_while(|delivery| {
                    bytes += delivery.spec.payload.len() + delivery.spec.policy.bytes() + DELIVERY_BYTES;
                    std::mem::take(&mut is_first) || bytes <= bytes_max
                });
                let count = fits.count();
                leased.keep(count);
            }
        }
        self
    }

    /// Appends the reply; what is returned must be settled once the client has it, or dropped to undo it.
    pub fn write(self, protocol: Protocol, out: &mut BytesMut) -> Vec<Keep> {
        match self {
            Done::Reply(reply) => {
                reply.encode(protocol, out);
                Vec::new()
            }
            Done::Taken(reply, back) => {
                reply.encode(protocol, out);
                vec![Keep::Elements(back)]
            }
            Done::Popped(reply, popped) => {
                reply.encode(protocol, out);
                vec![Keep::Popped(popped)]
            }
            Done::Granted(reply, claim) => {
                reply.encode(protocol, out);
                vec![Keep::Grant(claim)]
            }
            Done::Delivery(leased) => {
                for delivery in &leased.deliveries {
                    job::put_delivery(out, delivery, &leased.queue, &leased.shard, protocol);
                }
                vec![Keep::Jobs(leased.hold)]
            }
            Done::Deliveries(groups) => {
                put_header(out, b'*', groups.iter().map(|leased| leased.deliveries.len()).sum());
                for leased in &groups {
                    for delivery in &leased.deliveries {
                        job::put_delivery(out, delivery, &leased.queue, &leased.shard, protocol);
                    }
                }
                groups.into_iter().map(|leased| Keep::Jobs(leased.hold)).collect()
            }
        }
    }
}

impl From<Result<Reply>> for Done {
    fn from(result: Result<Reply>) -> Done {
        Done::Reply(result.unwrap_or_else(Reply::Error))
    }
}

pub type Later = Pin<Box<dyn Future<Output = Done> + Send>>;

/// An answer that is there, or on its way.
pub enum Answer {
    Done(Done),
    /// One op in one lane; requests behind it go on.
    Outcome {
        outcome: oneshot::Receiver<Result<Outcome>>,
        shape: Shape,
    },
    /// A job with an id or a unique key on its way to its home; requests behind it go on.
    Keyed {
        outcome: oneshot::Receiver<Result<Outcome>>,
        keyed: homes::Keyed,
        shard: Arc<str>,
        dispatcher: Arc<Dispatcher>,
    },
    /// One lease in one lane; requests behind it go on.
    Lease {
        leased: oneshot::Receiver<Result<Leased>>,
        many: bool,
    },
    /// An ordinary command on its way; requests behind it go on.
    Forward(Forwarded),
    /// Several steps; requests behind it wait.
    Later(Later),
    /// The same, and it waits for something that may never come: it ends when the client goes away or is unblocked.
    Waiting(Later, Nothing),
}

/// How an answer that waits says that nothing came, when it is unblocked before its time.
pub enum Nothing {
    Reply(Reply),
    /// It is told, and says so itself.
    Told(Arc<Notify>),
}

/// How an outcome becomes a reply.
pub enum Shape {
    /// The id of one new job; with the flag a job that holds the key is an error.
    Placed {
        shard: Arc<str>,
        /// The id that the client chose for it.
        id: Option<Bytes>,
        nx: bool,
    },
    Count,
    Render {
        render: Render,
        queue: Name,
        shard: Arc<str>,
    },
}

impl Shape {
    fn reply(&self, outcome: Outcome) -> Result<Reply> {
        match (self, outcome) {
            (_, Outcome::Full(_)) => Err(queue_full()),
            (_, Outcome::LeaseLost) => Err(lease_lost()),
            (_, Outcome::NoSuchJob) => Err(no_such_job()),
            (_, Outcome::OnItsWay) => Err(on_its_way()),
            (Shape::Placed { shard, id, nx }, Outcome::Enqueued(placed)) => {
                placed.into_iter().next().map_or(Ok(Reply::Null), |placed| placed_id(placed, id.clone(), shard, *nx))
            }
            (Shape::Count, Outcome::Count(count)) => Ok(Reply::count(count)),
            (Shape::Render { render, queue, shard }, outcome) => Ok(render(outcome, queue, shard)),
            (_, other) => Err(unexpected(&other)),
        }
    }
}

fn lease_lost() -> Error {
    Error::new(Code::LeaseLost, "the receipt no longer holds the job")
}

fn queue_full() -> Error {
    Error::new(Code::QueueFull, "as many jobs wait in the queue as its MAXLEN allows; nothing was stored")
}

fn no_such_job() -> Error {
    Error::new(Code::NoSuchJob, "no job is known by this receipt")
}

fn on_its_way() -> Error {
    Error::new(Code::Overloaded, "the job is on its way to another shard; nothing was done")
}

fn unexpected(outcome: &Outcome) -> Error {
    tracing::error!(?outcome, "a shard answered with an outcome of another operation");
    Error { code: Code::Err, text: "the shard gave an unexpected answer".into(), happened: Happened::Maybe }
}

fn lane_gone() -> Error {
    Error {
        code: Code::ShardDown,
        text: "the shard is shutting down; the write may have happened".into(),
        happened: Happened::Maybe,
    }
}

/// The text of the id that an enqueue answers with.
fn placed_id(placed: Placed, id: Option<Bytes>, shard: &str, nx: bool) -> Result<Reply> {
    let (seq, chosen, held) = match placed {
        Placed::Added(seq) => (seq, id, false),
        Placed::Held { seq, chosen } => (seq, chosen, true),
        Placed::Outdated => {
            return Err(Error::new(Code::Overloaded, "the shard map is changing; nothing was done"));
        }
    };
    let id = chosen.unwrap_or_else(|| {
        let mut id = BytesMut::with_capacity(16 + shard.len());
        format_id(&mut id, seq, shard);
        id.freeze()
    });
    if held && nx {
        return Err(Error::new(Code::Duplicate, format!("the job {} holds this key", String::from_utf8_lossy(&id))));
    }
    Ok(Reply::Bulk(id))
}

impl Answer {
    pub fn reply(reply: Reply) -> Answer {
        Answer::Done(Done::Reply(reply))
    }

    /// The finished answer, for those who wait for nothing else.
    async fn done(&mut self) -> Done {
        std::future::poll_fn(|context| self.poll(context)).await
    }

    /// Whether requests behind this one must wait until it is resolved.
    pub fn holds_back(&self) -> bool {
        matches!(self, Answer::Later(_) | Answer::Waiting(..))
    }

    /// Ends the wait of one that waits, as if its time were up.
    pub fn end_wait(&mut self) {
        *self = match std::mem::replace(self, Answer::reply(Reply::Nothing)) {
            Answer::Waiting(_, Nothing::Reply(nothing)) => Answer::reply(nothing),
            Answer::Waiting(later, Nothing::Told(over)) => {
                over.notify_one();
                Answer::Later(later)
            }
            other => other,
        };
    }

    pub fn poll(&mut self, context: &mut TaskContext<'_>) -> Poll<Done> {
        match self {
            Answer::Done(done) => Poll::Ready(std::mem::replace(done, Done::Reply(Reply::Nothing))),
            Answer::Keyed { outcome, keyed, shard, dispatcher } => {
                let outcome = ready!(Pin::new(outcome).poll(context)).unwrap_or_else(|_| Err(lane_gone()));
                match homes::read(outcome, keyed, shard, &dispatcher.map()) {
                    Some(reply) => Poll::Ready(reply.into()),
                    None => {
                        let mut later = homes::again(keyed.clone(), dispatcher.clone());
                        let answer = later.as_mut().poll(context);
                        *self = Answer::Later(later);
                        answer
                    }
                }
            }
            Answer::Outcome { outcome, shape } => {
                let outcome = ready!(Pin::new(outcome).poll(context)).unwrap_or_else(|_| Err(lane_gone()));
                Poll::Ready(outcome.and_then(|outcome| shape.reply(outcome)).into())
            }
            Answer::Lease { leased, many } => {
                let leased = ready!(Pin::new(leased).poll(context)).unwrap_or_else(|_| Err(lane_gone()));
                Poll::Ready(deliver(leased, *many))
            }
            Answer::Forward(forwarded) => {
                let reply = ready!(Pin::new(forwarded).poll(context));
                Poll::Ready(reply.map(Reply::Raw).into())
            }
            Answer::Later(later) | Answer::Waiting(later, _) => later.as_mut().poll(context),
        }
    }
}

impl From<Started> for Answer {
    fn from(started: Started) -> Answer {
        match started {
            Started::Reply(reply) => Answer::reply(reply),
            Started::Forward(forwarded) => Answer::Forward(forwarded),
            Started::Later(later) => Answer::Later(Box::pin(async move { Done::Reply(later.await) })),
            Started::Waiting(waiting) => {
                let later = Box::pin(async move {
                    match waiting.await {
                        (reply, Some(back)) => Done::Taken(reply, back),
                        (reply, None) => Done::Reply(reply),
                    }
                });
                Answer::Waiting(later, Nothing::Reply(Reply::NullArray))
            }
        }
    }
}

fn deliver(leased: Result<Leased>, many: bool) -> Done {
    match leased {
        Err(error) => Done::Reply(error.into()),
        Ok(leased) if leased.deliveries.is_empty() && many => Done::Reply(Reply::NullArray),
        Ok(leased) if leased.deliveries.is_empty() => Done::Reply(Reply::Null),
        Ok(leased) if many => Done::Deliveries(vec![leased]),
        Ok(leased) => Done::Delivery(leased),
    }
}

/// Starts what a plan wants done. `Plan::Connection` and `Plan::Ask` are the session's and the process's own.
pub fn execute(plan: Plan, dispatcher: &Arc<Dispatcher>, asker: Asker) -> Answer {
    let started = match plan {
        Plan::Now(reply) => Ok(Answer::reply(reply)),
        Plan::Enqueue(enqueue) => start_enqueue(enqueue, dispatcher, asker),
        Plan::Dequeue(dequeue) => start_dequeue(dequeue, dispatcher, asker),
        Plan::Ack { queue, leases, result } => start_ack(queue, leases, result, dispatcher, asker),
        Plan::Acquire(acquire) => Ok(start_acquire(acquire, dispatcher, asker)),
        Plan::Show { kind, name, show } => Ok(start_show(kind, name, show, dispatcher, asker)),
        Plan::Op { route, op, render } => start_op(route, op, render, dispatcher, asker),
        Plan::Jobs { queue, jobs, action } => Ok(start_jobs(queue, jobs, action, dispatcher, asker)),
        Plan::Each { op, merge } => Ok(start_each(op, merge, dispatcher.map(), asker)),
        Plan::Read(read) => {
            let waits = read.block_ms.is_some();
            let over = Arc::new(Notify::new());
            let later: Later = Box::pin(events::read(read, dispatcher.clone(), asker, over.clone()));
            Ok(if waits { Answer::Waiting(later, Nothing::Told(over)) } else { Answer::Later(later) })
        }
        Plan::Drain { op } => Ok(Answer::Later(Box::pin(drain(op, dispatcher.map(), asker)))),
        Plan::Connection(_) | Plan::Ask(_) => Err(Error::bad("this command is not for here")),
    };
    started.unwrap_or_else(|error| Answer::reply(error.into()))
}

/// Submits one op, or where the lane is full waits for room first.
fn submit(lane: &Arc<Lane>, op: Op, shape: Shape, asker: Asker) -> Answer {
    if lane.has_room() {
        return Answer::Outcome { outcome: lane.submit(op, asker.session), shape };
    }
    let lane = lane.clone();
    Answer::Later(Box::pin(async move { ask(&lane, op, asker).await.and_then(|outcome| shape.reply(outcome)).into() }))
}

/// One op and its outcome, with back-pressure.
async fn ask(lane: &Lane, op: Op, asker: Asker) -> Result<Outcome> {
    lane.room().await?;
    lane.submit(op, asker.session).await.unwrap_or_else(|_| Err(lane_gone()))
}

fn start_enqueue(enqueue: Enqueue, dispatcher: &Arc<Dispatcher>, asker: Asker) -> Result<Answer> {
    let Enqueue { queue, policy, payloads, start, shard, nx, many } = enqueue;
    let lane = match (&shard, &policy.id, &policy.unique) {
        _ if let Some((group, _)) = &policy.group => dispatcher.map().home_of_group(&queue, group).clone(),
        (_, Some(_), _) | (_, _, Some(_)) => {
            let op = Op { queue, action: Action::Enqueue { policy, payloads, start } };
            return Ok(homes::enqueue(homes::Keyed { op, nx, asker }, dispatcher));
        }
        (Some(name), None, None) => {
            let (lane, map) = (dispatcher.lane(name)?, dispatcher.map());
            if map.place_of(&lane).is_some_and(|at| map.is_draining(at)) {
                return Err(Error::bad(format!("shard '{name}' takes no new jobs: it is draining or leaving")));
            }
            lane
        }
        (None, None, None) if many => {
            let chunks = spread(&queue, payloads, dispatcher)?;
            let submitted = chunks.into_iter().map(|(lane, payloads)| {
                let count = payloads.len();
                let action = Action::Enqueue { policy: policy.clone(), payloads, start };
                (lane, Op { queue: queue.clone(), action }, count)
            });
            return Ok(start_enqueue_many(submitted.collect(), asker));
        }
        (None, None, None) => dispatcher.place(&queue)?,
    };
    let count = payloads.len();
    let op = Op { queue, action: Action::Enqueue { policy, payloads, start } };
    if many {
        return Ok(start_enqueue_many(vec![(lane, op, count)], asker));
    }
    let shape = Shape::Placed { shard: lane.name().clone(), id: None, nx };
    Ok(submit(&lane, op, shape, asker))
}

/// Divides the jobs of one request: as many neighbours to each shard as the strategy gives it of so many.
fn spread(queue: &Name, payloads: Vec<Bytes>, dispatcher: &Dispatcher) -> Result<Vec<(Arc<Lane>, Vec<Bytes>)>> {
    let mut shares: Vec<(Arc<Lane>, usize)> = Vec::new();
    for _ in 0..payloads.len() {
        let lane = dispatcher.place(queue)?;
        match shares.iter_mut().find(|(known, _)| known.index() == lane.index()) {
            Some((_, share)) => *share += 1,
            None => shares.push((lane, 1)),
        }
    }
    let mut payloads = payloads.into_iter();
    Ok(shares.into_iter().map(|(lane, share)| (lane, payloads.by_ref().take(share).collect())).collect())
}

/// All parts at once; the reply holds the ids in the order of the payloads, and an error in the place of each job of a
/// part that failed. Where all parts failed the reply is the error.
fn start_enqueue_many(parts: Vec<(Arc<Lane>, Op, usize)>, asker: Asker) -> Answer {
    let roomy = parts.iter().all(|(lane, _, _)| lane.has_room());
    let early: Vec<_> = match roomy {
        true => parts.iter().map(|(lane, op, _)| Some(lane.submit(op.clone(), asker.session))).collect(),
        false => parts.iter().map(|_| None).collect(),
    };
    Answer::Later(Box::pin(async move {
        let mut replies = Vec::new();
        let (mut added, mut failure) = (false, None);
        for ((lane, op, count), early) in parts.into_iter().zip(early) {
            let outcome = match early {
                Some(outcome) => outcome.await.unwrap_or_else(|_| Err(lane_gone())),
                None => ask(&lane, op, asker).await,
            };
            match outcome {
                Ok(Outcome::Enqueued(placed)) => {
                    added = true;
                    let ids = placed.into_iter().map(|placed| placed_id(placed, None, lane.name(), false));
                    replies.extend(ids.map(|id| id.unwrap_or_else(Reply::Error)));
                }
                outcome => {
                    let error = match outcome {
                        Ok(Outcome::Full(_)) => queue_full(),
                        Ok(other) => unexpected(&other),
                        Err(error) => error,
                    };
                    replies.extend((0..count).map(|_| Reply::Error(error.clone())));
                    failure = Some(graver(failure, error));
                }
            }
        }
        Done::Reply(match failure {
            Some(error) if !added => error.into(),
            _ => Reply::Array(replies),
        })
    }))
}

/// The lanes that a DEQUEUE may take from.
fn lanes_of(dequeue: &Dequeue, map: &ShardMap) -> Result<Vec<Arc<Lane>>> {
    if dequeue.shards.is_empty() {
        return Ok(map.lanes.clone());
    }
    let named = dequeue
        .shards
        .iter()
        .map(|name| map.lane(name).cloned().ok_or_else(|| Error::bad(format!("no shard is named '{name}' here"))));
    named.collect()
}

fn start_dequeue(dequeue: Dequeue, dispatcher: &Arc<Dispatcher>, asker: Asker) -> Result<Answer> {
    let mut lanes = lanes_of(&dequeue, &dispatcher.map())?;
    let many = dequeue.count.is_some();
    if lanes.len() == 1 && dequeue.queues.len() == 1 && dequeue.block_ms.is_none() && lanes[0].has_room() {
        let op = lease_op(&dequeue.queues[0], &dequeue, dequeue.count.unwrap_or(1));
        return Ok(Answer::Lease { leased: lanes[0].submit_lease(op, asker.session), many });
    }
    // Shards are tried from another one each time, so that none is the last for ever.
    let first = rand::random_range(0..lanes.len());
    lanes.rotate_left(first);
    // What is down is asked last, and only where the others have nothing.
    lanes.sort_by_key(|lane| lane.is_down());
    let waits = dequeue.block_ms.is_some();
    let later: Later = Box::pin(take(dequeue, lanes, dispatcher.clone(), asker));
    let nothing = Nothing::Reply(if many { Reply::NullArray } else { Reply::Null });
    Ok(if waits { Answer::Waiting(later, nothing) } else { Answer::Later(later) })
}

fn lease_op(queue: &Name, dequeue: &Dequeue, count: usize) -> Op {
    let action =
        Action::Lease { tokens: new_tokens(count), lease_ms: dequeue.lease_ms, worker: dequeue.worker.clone() };
    Op { queue: queue.clone(), action }
}

/// A DEQUEUE over several queues or shards, or one that waits.
async fn take(dequeue: Dequeue, mut lanes: Vec<Arc<Lane>>, dispatcher: Arc<Dispatcher>, asker: Asker) -> Done {
    let many = dequeue.count.is_some();
    let waits = dequeue.block_ms.is_some();
    // One queue and a wait: the lanes' tickets ask every shard anyway. Several queues have an order to keep.
    if !waits || dequeue.queues.len() > 1 {
        match take_now(&dequeue, &lanes, asker).await {
            Ok(None) => {}
            Ok(Some(groups)) => return deliver_groups(groups, many),
            // Who waits may yet be served by a shard that answers.
            Err(error) if !waits => return Done::Reply(error.into()),
            Err(_) => {}
        }
    }
    let nothing = || Done::Reply(if many { Reply::NullArray } else { Reply::Null });
    let Some(block_ms) = dequeue.block_ms else { return nothing() };
    let block_ms = if block_ms == 0 { asker.block_ms_max } else { block_ms.min(asker.block_ms_max) };
    let count = dequeue.count.unwrap_or(1);
    let mut over = pin!(tokio::time::sleep(Duration::from_millis(block_ms)));
    let mut changes = dispatcher.changes();
    loop {
        let (queues, worker) = (dequeue.queues.clone(), dequeue.worker.clone());
        let mut waiter = Ticket::park(queues, lanes.clone(), count, dequeue.lease_ms, worker);
        lanes = tokio::select! {
            biased;
            leased = waiter.jobs() => {
                return leased.map_or_else(|| Done::Reply(lane_gone().into()), |leased| deliver_groups(vec![leased], many));
            }
            () = &mut over => return nothing(),
            changed = other_lanes(&mut changes, &dequeue, &lanes, &dispatcher) => match changed {
                Ok(lanes) => lanes,
                Err(error) => return Done::Reply(error.into()),
            },
        };
    }
}

/// Waits for a shard map with other shards than these: a shard that was added serves who waited before, too.
async fn other_lanes(
    changes: &mut watch::Receiver<u64>,
    dequeue: &Dequeue,
    lanes: &[Arc<Lane>],
    dispatcher: &Dispatcher,
) -> Result<Vec<Arc<Lane>>> {
    loop {
        let now = lanes_of(dequeue, &dispatcher.map())?;
        let is_among =
            |lane: &Arc<Lane>, others: &[Arc<Lane>]| others.iter().any(|other| other.index() == lane.index());
        if now.len() != lanes.len() || !now.iter().all(|lane| is_among(lane, lanes)) {
            return Ok(now);
        }
        if changes.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

fn deliver_groups(mut groups: Vec<Leased>, many: bool) -> Done {
    match many {
        true => Done::Deliveries(groups),
        false => groups.pop().map_or(Done::Reply(Reply::Null), Done::Delivery),
    }
}

/// Asks shard after shard, queue after queue, until there is something. An error counts only when nothing was found.
async fn take_now(dequeue: &Dequeue, lanes: &[Arc<Lane>], asker: Asker) -> Result<Option<Vec<Leased>>> {
    let wanted = dequeue.count.unwrap_or(1);
    let mut found: Vec<Leased> = Vec::new();
    let mut failure = None;
    for queue in &dequeue.queues {
        for lane in lanes {
            let have: usize = found.iter().map(|leased| leased.deliveries.len()).sum();
            if have >= wanted || have > 0 && lane.is_down() {
                return Ok(Some(found));
            }
            let leased = match lane.room().await {
                Ok(()) => lane.submit_lease(lease_op(queue, dequeue, wanted - have), asker.session).await,
                Err(error) => Ok(Err(error)),
            };
            match leased.unwrap_or_else(|_| Err(lane_gone())) {
                Ok(leased) if leased.deliveries.is_empty() => {}
                Ok(leased) => found.push(leased),
                // A shard that was removed has nothing.
                Err(_) if lane.is_ended() => {}
                Err(error) => failure = Some(error),
            }
        }
        if !found.is_empty() {
            return Ok(Some(found));
        }
    }
    failure.map_or(Ok(None), Err)
}

fn start_ack(
    queue: Name,
    leases: Vec<(Box<str>, Lease)>,
    result: Bytes,
    dispatcher: &Arc<Dispatcher>,
    asker: Asker,
) -> Result<Answer> {
    let map = dispatcher.map();
    let mut groups: Vec<(Arc<Lane>, Vec<Lease>)> = Vec::new();
    for (shard, lease) in leases {
        match groups.iter_mut().find(|(lane, _)| **lane.name() == *shard) {
            Some((_, leases)) => leases.push(lease),
            None => match map.lane(&shard) {
                Some(lane) => groups.push((lane.clone(), vec![lease])),
                // Nothing that was leased there could leave it.
                None if map.was_left(&shard) => {}
                None => return Err(Error::bad(format!("no shard is named '{shard}' here"))),
            },
        }
    }
    let mut ops = groups.into_iter().map(|(lane, leases)| {
        let action = Action::Ack { leases, result: result.clone() };
        (lane, Op { queue: queue.clone(), action })
    });
    match (ops.next(), ops.next()) {
        (Some((lane, op)), None) => Ok(submit(&lane, op, Shape::Count, asker)),
        (first, second) => Ok(sum(first.into_iter().chain(second).chain(ops).collect(), asker)),
    }
}

fn start_op(route: Route, op: Op, render: Render, dispatcher: &Arc<Dispatcher>, asker: Asker) -> Result<Answer> {
    if let Some(places) = homes::places_of(&route, &op.action, &dispatcher.map())? {
        return Ok(homes::look(places, op, render, asker));
    }
    let lane = match &op.action {
        Action::Keyed { .. } => dispatcher.map().lane_of_lock(op.queue.as_str()).clone(),
        _ => lane_of(&route, dispatcher)?,
    };
    let shape = Shape::Render { render, queue: op.queue.clone(), shard: lane.name().clone() };
    Ok(submit(&lane, op, shape, asker))
}

fn start_acquire(acquire: Acquire, dispatcher: &Arc<Dispatcher>, asker: Asker) -> Answer {
    let Acquire { kind, name, limit, ttl_ms, owner, wait_ms, bind } = acquire;
    let (dispatcher, of) = (dispatcher.clone(), name.clone());
    let home: turnstile::Home = Box::new(move || {
        let map = dispatcher.map();
        Ok((map.home_of_lock(of.as_str())?.clone(), map.layout.locks_since))
    });
    let wanted = Wanted { kind, name, limit, ttl_ms, owner, wait_ms, bind, moved_in: 0 };
    let later: Later = Box::pin(async move {
        match (turnstile::acquire(home, wanted, asker.session).await, kind) {
            (Err(error), _) => Done::Reply(error.into()),
            (Ok(None), Keyed::Lock) => Done::Reply(Reply::NullArray),
            (Ok(None), Keyed::Semaphore) => Done::Reply(Reply::Null),
            (Ok(Some((fence, claim))), kind) => {
                let token = Reply::Bulk(lock::token_text(claim.token()));
                let reply = match kind {
                    Keyed::Lock => Reply::Array(vec![token, Reply::count(fence)]),
                    Keyed::Semaphore => token,
                };
                Done::Granted(reply, claim)
            }
        }
    });
    let nothing = Nothing::Reply(if kind == Keyed::Lock { Reply::NullArray } else { Reply::Null });
    if wait_ms > 0 { Answer::Waiting(later, nothing) } else { Answer::Later(later) }
}

fn start_show(kind: Keyed, name: Name, show: lock::Show, dispatcher: &Dispatcher, asker: Asker) -> Answer {
    let lane = dispatcher.map().lane_of_lock(name.as_str()).clone();
    let op = Op { queue: name.clone(), action: Action::Keyed { kind, deed: Deed::Show } };
    Answer::Later(Box::pin(async move {
        Done::Reply(match ask(&lane, op, asker).await {
            Ok(Outcome::Holders { fence, holders }) => show(fence, holders, lane.lines.waiting(kind, &name)),
            Ok(other) => unexpected(&other).into(),
            Err(error) => error.into(),
        })
    }))
}

fn lane_of(route: &Route, dispatcher: &Dispatcher) -> Result<Arc<Lane>> {
    lane_in(route, &dispatcher.map())
}

fn lane_in(route: &Route, map: &ShardMap) -> Result<Arc<Lane>> {
    match route {
        Route::Shard(name) => map.lane(name).cloned().ok_or_else(|| no_shard(name)),
        Route::Key(key) => Ok(map.home(key).clone()),
    }
}

fn start_jobs(
    queue: Name,
    jobs: Vec<JobAddress>,
    action: fn(Vec<JobRef>) -> Action,
    dispatcher: &Arc<Dispatcher>,
    asker: Asker,
) -> Answer {
    let map = dispatcher.map();
    if jobs.iter().any(|address| homes::may_be_elsewhere(&address.route, &map)) {
        return homes::count_each(queue, jobs, action, map, asker);
    }
    let mut groups: Vec<(Arc<Lane>, Vec<JobRef>)> = Vec::new();
    for address in jobs {
        match lane_of(&address.route, dispatcher) {
            Ok(lane) => match groups.iter_mut().find(|(known, _)| known.index() == lane.index()) {
                Some((_, jobs)) => jobs.push(address.job),
                None => groups.push((lane, vec![address.job])),
            },
            Err(error) => return Answer::reply(error.into()),
        }
    }
    let ops = groups.into_iter().map(|(lane, jobs)| (lane, Op { queue: queue.clone(), action: action(jobs) }));
    sum(ops.collect(), asker)
}

/// One op for each lane, submitted at once where there is room, in order otherwise.
fn scatter(ops: Vec<(Arc<Lane>, Op)>, asker: Asker) -> impl Future<Output = Vec<(Arc<str>, Result<Outcome>)>> {
    let roomy = ops.iter().all(|(lane, _)| lane.has_room());
    let started: Vec<_> = ops
        .into_iter()
        .map(|(lane, op)| match roomy {
            true => (lane.clone(), Ok(lane.submit(op, asker.session))),
            false => (lane, Err(op)),
        })
        .collect();
    async move {
        let mut outcomes = Vec::with_capacity(started.len());
        for (lane, started) in started {
            let outcome = match started {
                Ok(outcome) => outcome.await.unwrap_or_else(|_| Err(lane_gone())),
                Err(op) => ask(&lane, op, asker).await,
            };
            outcomes.push((lane.name().clone(), outcome));
        }
        outcomes
    }
}

/// The counts of all ops together. Where one fails the others stand, and the error says how many were counted.
fn sum(ops: Vec<(Arc<Lane>, Op)>, asker: Asker) -> Answer {
    let outcomes = scatter(ops, asker);
    Answer::Later(Box::pin(async move {
        let (mut total, mut failure) = (0, None);
        for (_, outcome) in outcomes.await {
            match outcome {
                Ok(Outcome::Count(count)) => total += count,
                Ok(other) => failure = Some(graver(failure, unexpected(&other))),
                Err(error) => failure = Some(graver(failure, error)),
            }
        }
        Done::Reply(failure.map_or(Reply::count(total), |error| partly(error, total).into()))
    }))
}

/// Of two failures the one to answer with: what may have happened must not be hidden behind what did not.
fn graver(before: Option<Error>, error: Error) -> Error {
    before.filter(|before| before.happened == Happened::Maybe || error.happened == Happened::No).unwrap_or(error)
}

fn partly(mut error: Error, total: u64) -> Error {
    if total > 0 {
        error.text = format!("{} ({total} were done on other shards)", error.text).into();
    }
    error
}

fn start_each(op: Op, merge: Merge, map: Arc<ShardMap>, asker: Asker) -> Answer {
    let changes = matches!(op.action, Action::Pause { .. });
    let outcomes = scatter(map.lanes.iter().map(|lane| (lane.clone(), op.clone())).collect(), asker);
    Answer::Later(Box::pin(async move {
        let (mut good, mut failure) = (Vec::new(), None);
        for (shard, outcome) in outcomes.await {
            match outcome {
                Ok(outcome) => good.push((shard, outcome)),
                Err(error) => failure = Some(graver(failure, error)),
            }
        }
        match failure {
            None => Done::Reply(merge(good)),
            Some(mut error) => {
                if changes && !good.is_empty() {
                    let done: Vec<&str> = good.iter().map(|(shard, _)| &**shard).collect();
                    error.text = format!("{} (it was done on {})", error.text, done.join(", ")).into();
                }
                Done::Reply(error.into())
            }
        }
    }))
}

/// Bulk work in bounded steps, so that it holds up nobody's batch for long. A shard that fails does not keep it from the
/// others.
async fn drain(op: Op, map: Arc<ShardMap>, asker: Asker) -> Done {
    let (mut total, mut failure) = (0, None);
    for lane in &map.lanes {
        let mut op = op.clone();
        loop {
            match ask(lane, op.clone(), asker).await {
                Ok(Outcome::Moved { count, next }) => {
                    total += count;
                    // Nothing moved although there may be more: what is left cannot be (its unique key is held).
                    let Some(next) = next.filter(|_| count > 0) else { break };
                    if let Action::DeadRetryAll { until } = &mut op.action {
                        *until = Some(next);
                    }
                }
                Ok(other) => return Done::Reply(unexpected(&other).into()),
                Err(error) => {
                    failure = Some(graver(failure, error));
                    break;
                }
            }
        }
    }
    Done::Reply(failure.map_or(Reply::count(total), |error| partly(error, total).into()))
}
