//! The lane's worker: takes in what came, makes a batch of it, applies it, and acts on what follows.
//!
//! One task has it ([`Lane::run`]), so its state needs no lock; what others see of the lane is in `lane.rs`.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::mem::discriminant;
use std::ops::Bound;
use std::pin::{Pin, pin};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use rand::Rng;
use tokio::time::Sleep;

use super::{Answer, Hold, Lane, Leased, Parcel, QUEUES_KEPT_MAX, new_tokens, op_bytes, op_jobs, owed};
use crate::dispatch::meter::Meter;
use crate::dispatch::waiting::Ticket;
use crate::error::{Code, Error, Happened, Result};
use crate::job::Name;
use crate::metrics::Metrics;
use crate::shard::{Action, Applied, Deed, Effect, Keyed, Op, Outcome, PAGE_BYTES_MAX};

/// Most jobs in one batch; one operation larger than this goes alone.
const BATCH_JOBS_MAX: usize = 512;
/// Most payload bytes in one batch.
const BATCH_BYTES_MAX: usize = 4 << 20;
/// Tickets served on the strength of a wake-up that does not say how many jobs there are.
const CLAIMS_ON_HEARSAY: usize = 64;
/// How long a shard may think over a batch before the tickets in it are free for other shards.
const TICKETS_LENT_MAX: Duration = Duration::from_millis(100);
/// After an answer that says nothing of a queue.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// The slow poll that stands behind wake-ups and timers.
const SWEEP_EVERY: Duration = Duration::from_millis(2_500);
/// Queues looked at in one sweep: so many with waiters, and so many of all.
const SWEEP_QUEUES_MAX: usize = 64;
/// Releases that are kept for a shard that is out of reach; what is more comes back when its lease ends.
const OWED_MAX: usize = 10_000;
/// After a failure operations are refused for this long, doubling to the maximum, before the shard is asked again.
const REST_MIN: Duration = Duration::from_millis(50);
const REST_MAX: Duration = Duration::from_millis(1_000);

/// What the lane believes about one queue of its shard.
#[derive(Default)]
struct Slot {
    waiters: VecDeque<Arc<Ticket>>,
    /// Waiters after the line was last cleared of tickets that are over.
    waiters_cleared: usize,
    /// Ready jobs after the last batch; `None`: not known, because the shard was never asked or has sent a wake-up.
    ready: Option<u64>,
    due_at: Option<Instant>,
}

/// The lane's own state, touched by its task alone.
pub(super) struct Line {
    pub(super) lane: Arc<Lane>,
    meter: Meter,
    slots: HashMap<Name, Slot, RandomState>,
    /// Queues whose waiters may be served now.
    hot: BTreeSet<Name>,
    /// The queue that was served last, so that each has its turn.
    hot_after: Option<Name>,
    /// Queues with waiters for whom the batch had no bytes left: they come first in the next one.
    overtaken: BTreeSet<Name>,
    timers: BTreeSet<(Instant, Name)>,
    sweep_at: Instant,
    sweep_after: Option<Name>,
    /// The same among the queues with waiters.
    sweep_waiting_after: Option<Name>,
    /// Releases that a shard out of reach has yet to hear of.
    owed: VecDeque<Parcel>,
    /// After a failure: when the shard is asked whether it is back, and the next rest's length.
    resting_until: Option<Instant>,
    rest: Duration,
    /// Timers that last: to set up one for each batch costs a system call, to move one does not.
    lent_until: Pin<Box<Sleep>>,
    alarm: Pin<Box<Sleep>>,
}

impl Line {
    pub(super) fn new(lane: Arc<Lane>, metrics: Arc<Metrics>) -> Line {
        Line {
            meter: Meter::new(metrics, &lane.name),
            lane,
            slots: HashMap::default(),
            hot: BTreeSet::new(),
            hot_after: None,
            overtaken: BTreeSet::new(),
            timers: BTreeSet::new(),
            sweep_at: Instant::now() + SWEEP_EVERY,
            sweep_after: None,
            sweep_waiting_after: None,
            owed: VecDeque::new(),
            resting_until: None,
            rest: REST_MIN,
            lent_until: Box::pin(tokio::time::sleep(Duration::ZERO)),
            alarm: Box::pin(tokio::time::sleep(Duration::ZERO)),
        }
    }

    /// One batch, or a wait for something to do.
    pub(super) async fn turn(&mut self) {
        if !self.is_resting() && Instant::now() >= self.sweep_at {
            self.sweep().await;
        }
        self.collect();
        // Before the parcels leave the mailbox, so that a lane with work never looks idle.
        self.lane.applying.store(true, Ordering::Release);
        let batch = self.batch();
        if batch.is_empty() {
            self.lane.applying.store(false, Ordering::Release);
            self.idle().await;
        } else {
            self.apply(batch).await;
            // Sessions that are readable by now, many of them on the answers just sent, belong to the next batch.
            tokio::task::yield_now().await;
        }
    }

    /// Whether operations are refused: from a failure on, until the shard has answered a knock.
    fn is_resting(&self) -> bool {
        self.resting_until.is_some()
    }

    /// Takes in tickets, nudges, wake-ups and timers that came since the last batch.
    fn collect(&mut self) {
        let (parked, nudged, woken, all_woken) = {
            let mut mail = self.lane.mail();
            let all_woken = std::mem::take(&mut mail.all_woken);
            if mail.parked.is_empty() && mail.nudged.is_empty() && mail.woken.is_empty() && !all_woken {
                drop(mail);
                return self.collect_due();
            }
            mail.parked_cleared = 0;
            (
                std::mem::take(&mut mail.parked),
                std::mem::take(&mut mail.nudged),
                std::mem::take(&mut mail.woken),
                all_woken,
            )
        };
        if all_woken {
            self.slots.values_mut().for_each(|slot| slot.ready = None);
            self.hot
                .extend(self.slots.iter().filter(|(_, slot)| !slot.waiters.is_empty()).map(|(queue, _)| queue.clone()));
        }
        for queue in woken {
            if let Some(slot) = self.slots.get_mut(&queue) {
                slot.ready = None;
                self.hot.insert(queue);
            }
        }
        for queue in nudged {
            self.hot.insert(queue);
        }
        for (queue, ticket) in parked {
            let slot = self.slots.entry(queue.clone()).or_default();
            if slot.waiters.len() >= 2 * slot.waiters_cleared + 16 {
                slot.waiters.retain(|ticket| !ticket.is_over());
                slot.waiters_cleared = slot.waiters.len();
            }
            slot.waiters.push_back(ticket);
            if slot.ready != Some(0) {
                self.hot.insert(queue);
            }
        }
        self.collect_due();
    }

    /// Queues in which something has fallen due are looked at, waiters or not: a lapse must not wait for a client.
    fn collect_due(&mut self) {
        let now = Instant::now();
        while let Some((due_at, _)) = self.timers.first()
            && *due_at <= now
            && let Some((_, queue)) = self.timers.pop_first()
        {
            if let Some(slot) = self.slots.get_mut(&queue) {
                slot.due_at = None;
                slot.ready = None;
                self.hot.insert(queue);
            }
        }
    }

    /// The next batch: waiting parcels up to the bounds, ordered into runs, and behind them the claims for tickets.
    fn batch(&mut self) -> Vec<Parcel> {
        let mut taken = Vec::new();
        let (mut jobs, mut bytes) = (0, 0);
        {
            let mut mail = self.lane.mail();
            // A shard that is not asked has no batches: everything is refused at once.
            let rests = self.is_resting();
            while let Some(parcel) = mail.parcels.front()
                && (rests || taken.is_empty() || (jobs < BATCH_JOBS_MAX && bytes < BATCH_BYTES_MAX))
            {
                jobs += op_jobs(&parcel.op);
                bytes += op_bytes(&parcel.op);
                taken.extend(mail.parcels.pop_front());
            }
            mail.bytes = mail.bytes.saturating_sub(bytes);
        }
        if !taken.is_empty() {
            self.lane.room.notify_waiters();
        }
        if self.is_resting() {
            self.refuse(taken);
            return Vec::new();
        }
        let owed = self.owed.len().min(BATCH_JOBS_MAX);
        taken.extend(self.owed.drain(..owed));
        let mut fresh: HashMap<Name, u64, RandomState> = HashMap::default();
        for parcel in &taken {
            if let Action::Enqueue { payloads, .. } = &parcel.op.action
                && self.slots.get(&parcel.op.queue).is_some_and(|slot| !slot.waiters.is_empty())
            {
                *fresh.entry(parcel.op.queue.clone()).or_default() += payloads.len() as u64;
            }
        }
        let mut batch = Vec::new();
        for queue in std::mem::take(&mut self.overtaken) {
            self.claim(&queue, 0, &mut batch);
        }
        batch.extend(into_runs(taken));
        self.hot.extend(fresh.keys().cloned());
        // However many queues fell due together, a batch stays one that a shard answers in time.
        let most = batch.len() + BATCH_JOBS_MAX;
        while batch.len() < most
            && let Some(queue) = self.next_hot()
        {
            self.claim(&queue, fresh.get(&queue).copied().unwrap_or(0), &mut batch);
        }
        batch
    }

    fn next_hot(&mut self) -> Option<Name> {
        let after = self.hot_after.as_ref();
        let next = after.and_then(|after| self.hot.range((Bound::Excluded(after), Bound::Unbounded)).next());
        let next = next.or_else(|| self.hot.first()).cloned()?;
        self.hot.remove(&next);
        self.hot_after = Some(next.clone());
        Some(next)
    }

    /// Puts claims for the oldest tickets of a queue into the batch, as many as jobs may be there; with no ticket to
    /// serve, a tick where the queue's state is not known.
    fn claim(&mut self, queue: &Name, fresh: u64, batch: &mut Vec<Parcel>) {
        let Some(slot) = self.slots.get_mut(queue) else { return };
        if self.lane.is_down() {
            // Asked without a ticket: a ticket that is claimed here gets nothing from the other lanes meanwhile.
            return batch.push(tick(queue.clone()));
        }
        let mut room = match slot.ready {
            Some(ready) => (ready + fresh).min(BATCH_JOBS_MAX as u64) as usize,
            None => CLAIMS_ON_HEARSAY.max(fresh.min(BATCH_JOBS_MAX as u64) as usize),
        };
        let before = batch.len();
        let mut passed_over = VecDeque::new();
        while room > 0
            && let Some(ticket) = slot.waiters.pop_front()
        {
            if ticket.is_over() {
                continue;
            }
            if !ticket.claim() {
                // Another lane is asking for it; it nudges us if it finds nothing.
                passed_over.push_back(ticket);
                continue;
            }
            let count = ticket.count.clamp(1, BATCH_JOBS_MAX);
            room = room.saturating_sub(count);
            let action =
                Action::Lease { tokens: new_tokens(count), lease_ms: ticket.lease_ms, worker: ticket.worker.clone() };
            batch.push(Parcel { op: Op { queue: queue.clone(), action }, session: 0, answer: Answer::Ticket(ticket) });
        }
        while let Some(ticket) = passed_over.pop_back() {
            slot.waiters.push_front(ticket);
        }
        if batch.len() == before && slot.ready.is_none() && fresh == 0 {
            batch.push(tick(queue.clone()));
        }
    }

    /// Applies a batch and does everything that follows from it.
    async fn apply(&mut self, batch: Vec<Parcel>) {
        let mut ops = Vec::with_capacity(batch.len());
        let mut answers = Vec::with_capacity(batch.len());
        let mut freed = Vec::new();
        for parcel in batch {
            let queue = match parcel.answer {
                Answer::Session(_) | Answer::Again(_) | Answer::Owed(..) | Answer::Nobody => None,
                Answer::Leasing(_) | Answer::Ticket(_) => Some(parcel.op.queue.clone()),
            };
            freed.extend(releases(&parcel.op).map(|(kind, name)| (answers.len(), kind, name)));
            answers.push((parcel.answer, parcel.session, queue));
            ops.push(parcel.op);
        }
        let count = ops.len();
        let noted = self.meter.before(&ops);
        let asked_at = Instant::now();
        let lane = self.lane.clone();
        let mut applied = pin!(async {
            match lane.claim().await {
                Ok(()) => lane.shard.apply(ops, None).await,
                Err(error) => Applied::failed(count, &lane.as_down(error)),
            }
        });
        let has_tickets = answers.iter().any(|(answer, ..)| matches!(answer, Answer::Ticket(_)));
        if has_tickets {
            self.lent_until.as_mut().reset((asked_at + TICKETS_LENT_MAX).into());
        }
        let in_time = tokio::select! {
            biased;
            applied = &mut applied => Some(applied),
            () = &mut self.lent_until, if has_tickets => None,
        };
        let is_late = in_time.is_none();
        let Applied { outcomes, effects } = match in_time {
            Some(applied) => applied,
            None => {
                // Who waits on a slow shard may have a job of another one meanwhile.
                for (answer, ..) in &answers {
                    if let Answer::Ticket(ticket) = answer {
                        ticket.unclaim(&lane);
                    }
                }
                applied.await
            }
        };
        let took = asked_at.elapsed();
        self.meter.after(&noted, &outcomes, took);
        self.note_vitals(count, took, &outcomes);
        // Effects first: they say whether there is more for the tickets that are answered below.
        for effect in effects {
            self.take_effect(effect);
        }
        for (place, kind, name) in freed {
            if matches!(outcomes.get(place), Some(Ok(Outcome::Count(1)))) {
                self.lane.lines.ring(kind, &name);
            }
        }
        let (mut returned, mut failed) = (Vec::new(), HashSet::<Name, RandomState>::default());
        let mut later = Vec::new();
        for ((answer, session, queue), outcome) in answers.into_iter().zip(outcomes) {
            match answer {
                Answer::Session(reply) => match outcome {
                    Ok(Outcome::Full(op)) => self.lane.note_refused(*op, reply),
                    Ok(Outcome::PageTooBig) => reply.send(Err(page_too_big())),
                    outcome => reply.send(outcome),
                },
                Answer::Again(reply) => reply.send(outcome),
                Answer::Leasing(reply) => match (outcome, queue) {
                    (Ok(Outcome::Later(op)), _) => {
                        later.push(Parcel { op: *op, session, answer: Answer::Leasing(reply) });
                    }
                    (outcome, Some(queue)) => {
                        reply.send(outcome.and_then(|outcome| self.leased(queue, outcome)));
                    }
                    _ => {}
                },
                Answer::Ticket(ticket) => {
                    if let Some(queue) = queue {
                        if matches!(outcome, Ok(Outcome::Later(_))) {
                            self.overtaken.insert(queue.clone());
                            returned.push((queue, ticket, None));
                            continue;
                        }
                        match outcome.and_then(|outcome| self.leased(queue.clone(), outcome)) {
                            // A ticket that was let go is claimed anew, or the jobs go back by their hold.
                            Ok(leased) if !leased.deliveries.is_empty() => match !is_late || ticket.claim() {
                                true => ticket.deliver(leased),
                                false => returned.push((queue, ticket, None)),
                            },
                            Err(error) if error.code == Code::ShardDown => returned.push((queue, ticket, None)),
                            Err(_) => {
                                // Whether there are jobs was not said: it is asked again, but not at once.
                                failed.insert(queue.clone());
                                returned.push((queue, ticket, Some(0)));
                            }
                            Ok(_) => returned.push((queue, ticket, Some(0))),
                        }
                    }
                }
                Answer::Owed(op) => {
                    if matches!(outcome, Err(error) if error.code == Code::ShardDown) {
                        self.owe(op);
                    }
                }
                Answer::Nobody => {}
            }
        }
        if !later.is_empty() {
            self.lane.mail().put_first(later);
        }
        self.put_back(returned, is_late);
        failed.into_iter().for_each(|queue| self.look_again(queue));
    }

    /// Asks how a queue stands a little later.
    fn look_again(&mut self, queue: Name) {
        let due_at = Instant::now() + LOOK_AGAIN;
        if self.slots.get(&queue).is_some_and(|slot| slot.due_at.is_none_or(|known| due_at < known)) {
            self.set_timer(&queue, Some(due_at));
        }
    }

    /// When a queue is looked at next; it is one of those with a slot.
    fn set_timer(&mut self, queue: &Name, due_at: Option<Instant>) {
        let Some(slot) = self.slots.get_mut(queue) else { return };
        if let Some(old) = std::mem::replace(&mut slot.due_at, due_at) {
            self.timers.remove(&(old, queue.clone()));
        }
        if let Some(new) = due_at {
            self.timers.insert((new, queue.clone()));
        }
    }

    /// Puts tickets that got nothing back to the front of their lines, with what is now known of their queues. Where that
    /// is not kept, two lanes nudge each other for ever, each asking anew: a slot may have gone with its last waiter. Those of
    /// a late batch were let go before.
    fn put_back(&mut self, returned: Vec<(Name, Arc<Ticket>, Option<u64>)>, is_late: bool) {
        // Last claimed first, so that the line stands as before.
        for (queue, ticket, ready) in returned.into_iter().rev() {
            let waits = if is_late { !ticket.is_over() } else { ticket.unclaim(&self.lane) };
            if waits {
                let slot = self.slots.entry(queue).or_default();
                slot.ready = ready;
                slot.waiters.push_front(ticket);
            }
        }
    }

    /// Keeps a release for when the shard is back.
    fn owe(&mut self, op: Op) {
        if self.owed.len() < OWED_MAX {
            self.owed.push_back(owed(op, 0));
        }
    }

    fn leased(&self, queue: Name, outcome: Outcome) -> Result<Leased> {
        match outcome {
            Outcome::Leased(deliveries) => {
                let leases = deliveries.iter().map(|delivery| delivery.lease).collect();
                let hold = Hold { lane: Some(self.lane.clone()), queue: queue.clone(), leases };
                Ok(Leased { queue, shard: self.lane.name.clone(), deliveries, hold })
            }
            _ => Err(Error::bad("the shard answered a lease with something else")),
        }
    }

    fn take_effect(&mut self, effect: Effect) {
        let Effect { queue, ready, load, due_in, deaths } = effect;
        self.lane.outboxes.note(&queue, deaths);
        match self.lane.loads.get_mut(&queue) {
            Some(mut known) => *known = load,
            None if self.lane.loads.len() < QUEUES_KEPT_MAX => {
                self.lane.loads.insert(queue.clone(), load);
            }
            None => {}
        }
        if !self.slots.contains_key(&queue) {
            if due_in.is_none() || self.slots.len() >= QUEUES_KEPT_MAX {
                return;
            }
            self.slots.insert(queue.clone(), Slot::default());
        }
        let Some(slot) = self.slots.get_mut(&queue) else { return };
        slot.ready = Some(ready);
        if ready > 0 && !slot.waiters.is_empty() {
            self.hot.insert(queue.clone());
        }
        let due_at = due_in.map(|ms| Instant::now() + Duration::from_millis(ms.clamp(1, 3_600_000)));
        // Within a few milliseconds of the timer that stands, that one will do.
        let close = |a: Instant, b: Instant| a <= b && b - a < Duration::from_millis(5);
        let is_idle = due_at.is_none() && slot.waiters.is_empty();
        if !matches!((slot.due_at, due_at), (Some(old), Some(new)) if close(old, new)) {
            self.set_timer(&queue, due_at);
        }
        if is_idle {
            self.slots.remove(&queue);
        }
    }

    fn note_vitals(&mut self, ops: usize, took: Duration, outcomes: &[Result<Outcome>]) {
        let vitals = &self.lane.vitals;
        vitals.batches.fetch_add(1, Ordering::Relaxed);
        vitals.ops.fetch_add(ops as u64, Ordering::Relaxed);
        let mean = vitals.latency_us.load(Ordering::Relaxed);
        vitals.latency_us.store((mean * 7 + took.as_micros() as u64) / 8, Ordering::Relaxed);
        let down = outcomes.iter().find_map(|outcome| match outcome {
            Err(error) if error.code == Code::ShardDown => Some(error.clone()),
            _ => None,
        });
        let Some(error) = down else {
            self.lane.note_back();
            self.rest = REST_MIN;
            return;
        };
        self.rest_from(error);
    }

    /// Takes a failure down and leaves the shard alone for a while, longer each time.
    fn rest_from(&mut self, error: Error) {
        let vitals = &self.lane.vitals;
        vitals.errors.fetch_add(1, Ordering::Relaxed);
        self.lane.unclaim();
        // One that was removed is not missed.
        if !self.lane.vitals.down.swap(true, Ordering::Relaxed) && !self.lane.is_ended() {
            tracing::warn!(shard = %self.lane.name, %error, "shard is down");
        }
        *self.lane.vitals.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        self.rest();
    }

    /// Leaves the shard alone for a while, each time longer.
    pub(super) fn rest(&mut self) {
        let jitter = rand::rng().random_range(0.75..1.25);
        self.resting_until = Some(Instant::now() + self.rest.mul_f64(jitter));
        self.lane.vitals.resting.store(true, Ordering::Relaxed);
        self.rest = (self.rest * 2).min(REST_MAX);
    }

    /// Answers what came while the shard rests from a failure.
    fn refuse(&mut self, parcels: Vec<Parcel>) {
        let why = self.lane.last_error().filter(|error| error.happened == Happened::No);
        let error = why.unwrap_or_else(|| Error::shard_down(&self.lane.name, "is not reachable", Happened::No));
        for parcel in parcels {
            match parcel {
                Parcel { answer: Answer::Owed(op), .. } => self.owe(op),
                parcel => parcel.refuse(&error),
            }
        }
    }

    /// Waits for mail, the next timer, the end of a rest, or the sweep.
    async fn idle(&mut self) {
        let timer = self.timers.first().map(|(due_at, _)| *due_at);
        let wake_at = match self.resting_until {
            Some(until) => until,
            None => timer.map_or(self.sweep_at, |due_at| due_at.min(self.sweep_at)),
        };
        if self.alarm.deadline() != wake_at.into() {
            self.alarm.as_mut().reset(wake_at.into());
        }
        tokio::select! {
            // The sessions that became readable together with the one that rang belong to the same batch.
            () = self.lane.bell.notified() => tokio::task::yield_now().await,
            () = &mut self.alarm => {
                if self.is_resting() {
                    self.knock().await;
                }
            }
        }
    }

    /// Asks a shard that failed whether it is there again. No job, no ticket and no client is risked on the answer, which
    /// a hung server never gives: whoever comes meanwhile is refused at once.
    async fn knock(&mut self) {
        let lane = self.lane.clone();
        let mut claim = pin!(lane.claim());
        let answer = loop {
            tokio::select! {
                answer = &mut claim => break answer,
                () = lane.bell.notified() => {
                    let parcels = {
                        let mut mail = lane.mail();
                        mail.bytes = 0;
                        std::mem::take(&mut mail.parcels)
                    };
                    lane.room.notify_waiters();
                    self.refuse(parcels.into());
                }
            }
        };
        match answer {
            // The length of rests is forgotten when a batch succeeds.
            Ok(()) => {
                self.resting_until = None;
                lane.vitals.resting.store(false, Ordering::Relaxed);
                lane.note_back();
            }
            Err(error) => self.rest_from(self.lane.as_down(error)),
        }
    }

    /// Looks at some queues of the shard although nothing said so: those with waiters, and a page of the others. It is
    /// what finds a lapsed lease or a due job that a proxy left behind when it died, and a wake-up that was lost.
    async fn sweep(&mut self) {
        let jitter = rand::rng().random_range(0.8..1.2);
        self.sweep_at = Instant::now() + SWEEP_EVERY.mul_f64(jitter);
        self.slots.retain(|_, slot| {
            slot.waiters.retain(|ticket| !ticket.is_over());
            slot.waiters_cleared = slot.waiters.len();
            !slot.waiters.is_empty() || slot.due_at.is_some()
        });
        let mut waiting: Vec<Name> =
            self.slots.iter().filter(|(_, slot)| !slot.waiters.is_empty()).map(|(queue, _)| queue.clone()).collect();
        waiting.sort_unstable();
        let mut page: BTreeSet<Name> = next_page(&waiting, &mut self.sweep_waiting_after).iter().cloned().collect();
        if let Ok(queues) = self.lane.shard.queues().await {
            page.extend(next_page(&queues, &mut self.sweep_after).iter().cloned());
        }
        // Without tickets: what a shard that hangs has claimed, no other lane can serve.
        let mut mail = self.lane.mail();
        page.into_iter().for_each(|queue| mail.put(tick(queue)));
    }
}

/// The next of some sorted names, and from the start again after the last.
fn next_page<'a>(names: &'a [Name], after: &mut Option<Name>) -> &'a [Name] {
    let start = after.take().map_or(0, |after| names.partition_point(|name| *name <= after));
    let page = &names[start..(start + SWEEP_QUEUES_MAX).min(names.len())];
    *after = page.last().filter(|_| start + page.len() < names.len()).cloned();
    page
}

/// The lock or semaphore that the op may free.
fn releases(op: &Op) -> Option<(Keyed, Name)> {
    match &op.action {
        Action::Keyed { kind, deed: Deed::Release { .. } } => Some((*kind, op.queue.clone())),
        _ => None,
    }
}

fn page_too_big() -> Error {
    let most = PAGE_BYTES_MAX >> 20;
    Error::new(Code::TooBig, format!("these jobs have more than {most} MiB together; ask for fewer with COUNT"))
}

/// Moves what has fallen due in a queue, and asks how it stands.
fn tick(queue: Name) -> Parcel {
    Parcel { op: Op { queue, action: Action::Tick }, session: 0, answer: Answer::Nobody }
}

/// Orders parcels into runs of like operations per queue, so that a shard can use its many-element commands. Each goes
/// into the earliest run of its kind that is not before the last run of its own session and queue, so what one session
/// sent for one queue keeps its order; operations of different sessions had none.
fn into_runs(parcels: Vec<Parcel>) -> Vec<Parcel> {
    if parcels.len() < 3 {
        return parcels;
    }
    let mut runs: Vec<Vec<Parcel>> = Vec::new();
    // Per queue: its runs in order. Per session and queue: the place of its last run in that order.
    let mut queues: HashMap<Name, Vec<usize>, RandomState> = HashMap::default();
    let mut last: HashMap<(u64, Name), usize, RandomState> = HashMap::default();
    for parcel in parcels {
        let kind = discriminant(&parcel.op.action);
        let order = queues.entry(parcel.op.queue.clone()).or_default();
        let key = (parcel.session, parcel.op.queue.clone());
        let from = last.get(&key).copied().unwrap_or(0);
        let found = (from..order.len()).find(|at| discriminant(&runs[order[*at]][0].op.action) == kind);
        let at = found.unwrap_or_else(|| {
            order.push(runs.len());
            runs.push(Vec::new());
            order.len() - 1
        });
        runs[order[at]].push(parcel);
        if key.0 != 0 {
            last.insert(key, at);
        }
    }
    let mut places: Vec<usize> = Vec::with_capacity(runs.len());
    queues.into_values().for_each(|order| places.extend(order));
    let mut runs: Vec<Option<Vec<Parcel>>> = runs.into_iter().map(Some).collect();
    places.into_iter().filter_map(|place| runs[place].take()).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Lease;
    use crate::shard::Stamp;
    use bytes::Bytes;
    use futures_util::FutureExt;

    fn parcel(session: u64, queue: &str, number: u64, verdict: bool) -> Parcel {
        let lease = Lease { seq: number, token: 0 };
        let action = match verdict {
            true => Action::Ack { leases: vec![lease], result: Bytes::new() },
            false => Action::Release { lease, delay: 0 },
        };
        Parcel { op: Op { queue: Name::parse(queue.as_bytes()).unwrap(), action }, session, answer: Answer::Nobody }
    }

    fn number(parcel: &Parcel) -> u64 {
        match &parcel.op.action {
            Action::Ack { leases, .. } => leases[0].seq,
            Action::Release { lease, .. } => lease.seq,
            _ => unreachable!("only these two are made here"),
        }
    }

    #[test]
    fn runs_keep_the_order_of_each_session_and_queue() {
        let mut random = rand::rng();
        for _ in 0..200 {
            let parcels: Vec<Parcel> = (0..60)
                .map(|n| parcel(random.random_range(1..6), ["a", "b"][random.random_range(0..2)], n, random.random()))
                .collect();
            let runs = into_runs(parcels);
            assert_eq!(runs.len(), 60);
            let mut last: HashMap<(u64, Name), u64> = HashMap::new();
            for parcel in &runs {
                let before = last.insert((parcel.session, parcel.op.queue.clone()), number(parcel));
                assert!(before.is_none_or(|before| before < number(parcel)), "a session was overtaken by itself");
            }
        }
    }

    fn lines(count: usize) -> Vec<Line> {
        let metrics = Arc::new(Metrics::new(std::iter::empty::<&'static str>()).unwrap());
        let make = |index| {
            let name: Arc<str> = format!("s{index}").into();
            let stamp = Stamp { deployment: "d".into(), shard: name.to_string(), map_version: 1, map: String::new() };
            let shard = Arc::new(crate::shard::memory::Memory::new(crate::shard::Rules::default()));
            Line::new(Lane::new(name, index, shard, stamp, Arc::default()), metrics.clone())
        };
        (0..count).map(make).collect()
    }

    /// Lets the lanes work off what there is to do; false when it does not end.
    async fn settles(lines: &mut [Line]) -> bool {
        for _ in 0..10 {
            let mut worked = false;
            for line in lines.iter_mut() {
                line.collect();
                let batch = line.batch();
                worked |= !batch.is_empty();
                line.apply(batch).await;
            }
            if !worked {
                return true;
            }
        }
        false
    }

    #[tokio::test]
    async fn a_client_that_waits_alone_costs_nothing_and_is_served() {
        let mut lines = lines(2);
        let lanes: Vec<Arc<Lane>> = lines.iter().map(|line| line.lane.clone()).collect();
        let queue = Name::parse(b"main").unwrap();
        let mut waiter = Ticket::park(vec![queue.clone()], lanes.clone(), 1, 1_000, Bytes::new());
        assert!(settles(&mut lines).await, "the lanes go on asking for a job that is not there");
        let action =
            Action::Enqueue { policy: Arc::default(), payloads: vec!["x".into()], start: crate::shard::Start::Now };
        let enqueued = lanes[1].submit(Op { queue, action }, 1);
        assert!(settles(&mut lines).await);
        assert!(enqueued.await.unwrap().is_ok());
        assert_eq!(waiter.jobs().await.unwrap().deliveries.len(), 1);
    }

    fn lease() -> Action {
        Action::Lease { tokens: new_tokens(1), lease_ms: 60_000, worker: Bytes::new() }
    }

    #[tokio::test]
    async fn who_waits_for_a_large_job_is_not_passed_over_by_those_who_poll() {
        let mut line = lines(1).remove(0);
        let (lane, queue) = (line.lane.clone(), Name::parse(b"main").unwrap());
        let submit = |action, session| lane.submit(Op { queue: queue.clone(), action }, session);
        let payloads = vec![Bytes::from(vec![0; 2 << 20]); 30];
        let start = crate::shard::Start::Now;
        let enqueued = submit(Action::Enqueue { policy: Arc::default(), payloads, start }, 1);
        line.collect();
        let batch = line.batch();
        line.apply(batch).await;
        assert!(enqueued.await.unwrap().is_ok());
        let mut waiter = Ticket::park(vec![queue.clone()], vec![lane.clone()], 1, 60_000, Bytes::new());
        let mut polls = Vec::new();
        for round in 0.. {
            assert!(round < 3, "others are served, and it is not");
            // Each batch has bytes for two of them.
            let op = || Op { queue: queue.clone(), action: lease() };
            polls.extend((0..4).map(|session| lane.submit_lease(op(), 10 + session)));
            line.collect();
            let batch = line.batch();
            line.apply(batch).await;
            if waiter.jobs().now_or_never().is_some() {
                break;
            }
        }
        // They are asked again until each has its own.
        assert!(settles(std::slice::from_mut(&mut line)).await);
        for poll in polls {
            assert_eq!(poll.await.unwrap().unwrap().deliveries.len(), 1);
        }
    }

    #[tokio::test]
    async fn a_lane_that_has_ended_says_that_nothing_was_done() {
        let line = lines(1).remove(0);
        let submit = || line.lane.submit(Op { queue: Name::parse(b"main").unwrap(), action: lease() }, 1);
        let before = submit();
        line.lane.end();
        for outcome in [before, submit()] {
            let error = outcome.await.unwrap().unwrap_err();
            assert_eq!((error.code, error.happened), (Code::ShardDown, Happened::No));
        }
    }

    #[test]
    fn operations_of_many_sessions_become_few_runs() {
        let parcels = (0..50).map(|n| parcel(n + 1, "main", n, n % 2 == 0)).collect();
        let runs = into_runs(parcels);
        let changes =
            runs.windows(2).filter(|pair| discriminant(&pair[0].op.action) != discriminant(&pair[1].op.action));
        assert_eq!(changes.count(), 1);
    }
}
