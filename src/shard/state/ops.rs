//! What each action does, on one queue's turn.
//!
//! An action that is refused is refused by [`check`], before anything has changed; what fails later is the store.

use bytes::Bytes;
use std::sync::Arc;

use super::job::{Job, Last};
use super::limit::Share;
use super::rows::Rows;
use super::turn::{Cause, To, Turn};
use crate::clock::{Millis, UnixMs};
use crate::error::{Error, Result};
use crate::job::{Delivery, JobRef, JobState, Lease, Policy, Spec, backoff_delay};
use crate::shard::event::What;
use crate::shard::{
    Action, BULK_JOBS_MAX, LimitDeed, LimitView, Op, Outcome, PAGE_BYTES_MAX, PAGE_JOBS_MAX, PART_BYTES_MAX, Placed,
    STATS_PRIORITIES_MAX, Start,
};

/// Whether the action can be applied at all.
pub fn check(action: &Action) -> Result<()> {
    match action {
        Action::Enqueue { policy, payloads, .. }
            if payloads.len() != 1 && (policy.id.is_some() || policy.unique.is_some()) =>
        {
            Err(Error::bad("ID and UNIQUE are for one job, not for many"))
        }
        Action::Depart { state, .. } if state.is_over() || *state == JobState::Leased => {
            Err(Error::bad("only jobs that wait or are dead go to another shard"))
        }
        _ => Ok(()),
    }
}

/// Which verdict a lease is asked to take.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Fail,
    Release,
    /// Not a verdict: the lease goes on.
    None,
}

/// What a lease says to a verdict.
enum Standing {
    /// It holds the job; the job was taken for the verdict.
    Holds(Box<Job>),
    /// It holds nothing, and this is the answer.
    Answer(Outcome),
}

impl<R: Rows> Turn<'_, R> {
    pub fn act(&mut self, action: Action) -> Result<Outcome> {
        match action {
            Action::Enqueue { policy, payloads, start } => self.enqueue(&policy, payloads, start),
            Action::Lease { tokens, lease_ms, worker } => self.lease(&tokens, lease_ms, &worker),
            Action::Ack { leases, result } => self.ack(&leases, &result),
            Action::Fail { lease, error, trace, retry_in, dead } => self.fail(lease, error, trace, retry_in, dead),
            Action::Release { lease, delay } => self.release(lease, delay),
            Action::Extend { lease, lease_ms } => self.extend(lease, lease_ms),
            Action::Progress { lease, percent, text } => self.progress(lease, percent, &text),
            Action::Cancel { job } => self.cancel(&job),
            Action::Job { job } => self.find(&job, |_| true),
            Action::DeadGet { job } => self.find(&job, |state| state == JobState::Dead),
            Action::Peek { state, offset, count } => self.peek(state, offset, count),
            Action::Len { state } => Ok(Outcome::Count(self.queue.count(state))),
            Action::Stats => self.stats(),
            Action::History { job } => self.history(&job),
            Action::EventsAfter { number, count } => self.events_after(number, count),
            Action::EventsRecent { count } => self.events_recent(count),
            Action::Pause { paused } => Ok(self.pause(paused)),
            Action::Purge { state } => self.purge(state),
            Action::DeadRetry { jobs } => self.dead_retry(&jobs),
            Action::DeadRetryAll { until } => self.dead_retry_all(until.unwrap_or(self.now)),
            Action::DeadDelete { jobs } => self.dead_delete(&jobs),
            Action::Outbox => self.outbox(),
            Action::OutboxTold { channel, marks } => self.outbox_told(&channel, &marks),
            Action::OutboxSettle { marks } => self.outbox_settle(&marks),
            Action::Keep { keeper, keep_ms, parties } => self.keep(keeper, keep_ms, parties),
            Action::Sessions { offset, count } => self.sessions(offset, count),
            Action::Limit(deed) => Ok(self.limit(deed)),
            // An object is no part of a queue: it never comes here.
            Action::Seek { id, unique, homes_since } => self.seek(id.as_ref(), unique.as_ref(), homes_since),
            Action::Depart { state, count, route, outdated } => self.depart(state, count, &route, outdated),
            Action::Arrive { source, mark, jobs } => self.arrive(&source, mark, &jobs),
            Action::Departed { mark } => self.departed(mark),
            Action::Tick | Action::Keyed { .. } => Ok(Outcome::Done),
        }
    }

    fn enqueue(&mut self, policy: &Arc<Policy>, payloads: Vec<Bytes>, start: Start) -> Result<Outcome> {
        let is_keyed = policy.id.is_some() || policy.unique.is_some();
        if is_keyed && policy.homes_since < self.queue.travel.homes_since {
            return Ok(Outcome::Enqueued(vec![Placed::Outdated]));
        }
        let holder = match (&policy.id, &policy.unique) {
            (Some(id), _) if self.queue.ids.contains_key(&id[..]) => self.queue.ids.get(&id[..]).copied(),
            (_, Some((key, _))) => self.holder(key),
            _ => None,
        };
        if let Some(seq) = holder {
            let chosen = self.record(seq)?.spec.policy.id.clone();
            return Ok(Outcome::Enqueued(vec![Placed::Held { seq, chosen }]));
        }
        if payloads.len() as u64 > self.queue.room() {
            let action = Action::Enqueue { policy: policy.clone(), payloads, start };
            return Ok(Outcome::Full(Box::new(Op { queue: self.queue.name.clone(), action })));
        }
        let due_at = match start {
            Start::Now => None,
            Start::Delay(delay) => Some(self.after(delay)),
            Start::At(at) => Some(at.min(super::job::NUMBER_MAX)),
        };
        let due_at = due_at.filter(|at| *at > self.now);
        let add = |payload| self.add(Spec { policy: policy.clone(), payload }, due_at).map(Placed::Added);
        payloads.into_iter().map(add).collect::<Result<_>>().map(Outcome::Enqueued)
    }

    fn lease(&mut self, tokens: &[u64], lease_ms: Millis, worker: &Bytes) -> Result<Outcome> {
        let mut deliveries = Vec::new();
        // A copy, once for all: what is kept must not hold the request's memory.
        let worker = Bytes::copy_from_slice(worker);
        let lease_until = self.after(lease_ms);
        let most = usize::try_from(self.queue.leasable()).unwrap_or(usize::MAX);
        for token in tokens.iter().take(most) {
            if self.queue.leased_bytes >= PART_BYTES_MAX {
                if deliveries.is_empty() {
                    let action = Action::Lease { tokens: tokens.to_vec(), lease_ms, worker };
                    return Ok(Outcome::Later(Box::new(Op { queue: self.queue.name.clone(), action })));
                }
                break;
            }
            let Some(seq) = self.queue.line.first() else { break };
            let record = self.record(seq)?;
            let mut job = match self.queue.pristine.contains(seq) {
                true => self.fresh_of(seq, &record),
                false => self.known(seq)?,
            };
            let attempt = job.spent.saturating_add(1);
            job.token = *token;
            let now = self.now;
            let detail = job.detail_mut();
            detail.started_at = now;
            detail.worker = worker.clone();
            (detail.progress, detail.progress_text) = (None, Bytes::new());
            self.transition(seq, job, Cause::Lease, To::Leased(lease_until))?;
            let lease = Lease { seq, token: *token };
            let enqueued_at = record.enqueued_at;
            self.queue.leased_bytes += record.spec.payload.len();
            deliveries.push(Delivery { lease, spec: record.spec, attempt, enqueued_at, lease_until });
        }
        if let Some(share) = &mut self.queue.share {
            share.start(self.now, deliveries.len() as u64);
        }
        Ok(Outcome::Leased(deliveries))
    }

    fn limit(&mut self, deed: LimitDeed) -> Outcome {
        let mut share = self.queue.share.take().unwrap_or_default();
        match deed {
            LimitDeed::Look => {}
            LimitDeed::Share { version, limits } => {
                share.share(version, limits);
                share.slide(self.now);
            }
            LimitDeed::Note { was, ledger } => share.note(was, &ledger),
        }
        // A queue without a row has no number that outlives the process.
        self.queue.is_dirty |= share.is_dirty && !self.queue.is_stored;
        let view = LimitView {
            version: share.version,
            limits: share.limits,
            ledger_version: share.ledger_version,
            ledger: share.ledger.clone(),
            leased: self.queue.count(JobState::Leased),
            started: share.started,
            waiting: self.queue.count(JobState::Ready) + self.queue.count(JobState::Scheduled),
            ready: if self.queue.is_paused { 0 } else { self.queue.line.len() },
        };
        self.queue.share = Some(share).filter(|share| **share != Share::default());
        Outcome::Limits(Box::new(view))
    }

    fn ack(&mut self, leases: &[Lease], result: &Bytes) -> Result<Outcome> {
        let mut count = 0;
        for lease in leases {
            let Some(job) = self.queue.jobs.get(&lease.seq).filter(|job| job.token == lease.token) else { continue };
            // A lapse leaves the job to whoever comes first; what ended since then stays as it ended.
            let is_late =
                job.last == Last::Lapsed && !job.state.is_over() && !self.queue.travel.is_on_its_way(lease.seq);
            if job.state == JobState::Leased || is_late {
                let mut job = self.known(lease.seq)?;
                job.detail_mut().result = result.clone();
                self.transition(lease.seq, job, Cause::Ack, To::Over(JobState::Completed))?;
                count += 1;
            } else if job.last == Last::Acked {
                count += 1;
            }
        }
        Ok(Outcome::Count(count))
    }

    /// Whether the lease may give its verdict.
    fn standing(&mut self, lease: Lease, verdict: Verdict) -> Result<Standing> {
        let Some(job) = self.queue.jobs.get(&lease.seq) else {
            let is_known = self.queue.pristine.contains(lease.seq);
            return Ok(Standing::Answer(if is_known { Outcome::LeaseLost } else { Outcome::NoSuchJob }));
        };
        if job.token == lease.token && job.state == JobState::Leased {
            return Ok(Standing::Holds(Box::new(self.known(lease.seq)?)));
        }
        Ok(Standing::Answer(match (job.last, verdict) {
            (Last::Failed(state), Verdict::Fail) if job.token == lease.token => Outcome::State(state),
            (Last::Released(state), Verdict::Release) if job.token == lease.token => Outcome::State(state),
            _ => Outcome::LeaseLost,
        }))
    }

    fn fail(
        &mut self,
        lease: Lease,
        error: Bytes,
        trace: Bytes,
        retry_in: Option<Millis>,
        is_fatal: bool,
    ) -> Result<Outcome> {
        let mut job = match self.standing(lease, Verdict::Fail)? {
            Standing::Holds(job) => *job,
            Standing::Answer(outcome) => return Ok(outcome),
        };
        let policy = self.record(lease.seq)?.spec.policy;
        job.spent = job.spent.saturating_add(1);
        let delay = retry_in.unwrap_or_else(|| backoff_delay(policy.backoff, policy.backoff_max, job.spent, job.token));
        let to = match delay {
            _ if is_fatal || job.spent >= policy.attempts => To::Dead,
            0 => To::EndOfLine,
            delay => To::Scheduled(self.after(delay)),
        };
        let detail = job.detail_mut();
        (detail.error, detail.trace) = (error, trace);
        self.transition(lease.seq, job, Cause::Fail, to).map(Outcome::State)
    }

    fn release(&mut self, lease: Lease, delay: Millis) -> Result<Outcome> {
        let job = match self.standing(lease, Verdict::Release)? {
            Standing::Holds(job) => *job,
            Standing::Answer(outcome) => return Ok(outcome),
        };
        let to = if delay == 0 { To::OldPlace } else { To::Scheduled(self.after(delay)) };
        self.transition(lease.seq, job, Cause::Release, to).map(Outcome::State)
    }

    fn extend(&mut self, lease: Lease, lease_ms: Millis) -> Result<Outcome> {
        let mut job = match self.standing(lease, Verdict::None)? {
            Standing::Holds(job) => *job,
            Standing::Answer(outcome) => return Ok(outcome),
        };
        let until = self.after(lease_ms);
        self.queue.leave(lease.seq, &job);
        job.at = until;
        self.queue.enter(lease.seq, &job);
        self.put(lease.seq, job);
        Ok(Outcome::Until(until))
    }

    fn progress(&mut self, lease: Lease, percent: u8, text: &Bytes) -> Result<Outcome> {
        let mut job = match self.standing(lease, Verdict::None)? {
            Standing::Holds(job) => *job,
            Standing::Answer(outcome) => return Ok(outcome),
        };
        let detail = job.detail_mut();
        (detail.progress, detail.progress_text) = (Some(percent), Bytes::copy_from_slice(text));
        if self.rules.recording.is_some() {
            let attempt = job.spent.saturating_add(1);
            self.note(lease.seq, &mut job, What::Progress, Some(attempt))?;
        }
        self.put(lease.seq, job);
        Ok(Outcome::Done)
    }

    fn cancel(&mut self, job: &JobRef) -> Result<Outcome> {
        let Some(seq) = self.resolve(job).filter(|seq| self.state_of(*seq).is_some_and(|state| !state.is_over()))
        else {
            return Ok(Outcome::Count(0));
        };
        if self.queue.travel.is_on_its_way(seq) {
            return Ok(Outcome::OnItsWay);
        }
        let job = self.known(seq)?;
        self.transition(seq, job, Cause::Cancel, To::Over(JobState::Cancelled))?;
        Ok(Outcome::Count(1))
    }

    fn find(&self, job: &JobRef, is_wanted: fn(JobState) -> bool) -> Result<Outcome> {
        let seq = self.resolve(job).filter(|seq| self.state_of(*seq).is_some_and(is_wanted));
        let view = seq.map(|seq| self.view(seq)).transpose()?.flatten();
        Ok(Outcome::Job(view.map(Box::new)))
    }

    fn peek(&self, state: JobState, offset: u64, count: u64) -> Result<Outcome> {
        let count = usize::try_from(count).unwrap_or(usize::MAX).min(PAGE_JOBS_MAX);
        let (mut views, mut bytes) = (Vec::new(), 0);
        for seq in self.queue.page(state, offset, count) {
            let Some(view) = self.view(seq)? else { continue };
            bytes += view.spec.payload.len();
            if bytes > PAGE_BYTES_MAX {
                return Ok(Outcome::PageTooBig);
            }
            views.push(view);
        }
        Ok(Outcome::Jobs(views))
    }

    fn stats(&self) -> Result<Outcome> {
        let mut stats = self.queue.stats();
        stats.now = self.now;
        for seq in self.queue.line.heads().take(STATS_PRIORITIES_MAX) {
            let since = match self.queue.jobs.get(&seq) {
                Some(job) if job.at > 0 => job.at,
                _ => self.record(seq)?.enqueued_at,
            };
            stats.oldest_ready_at = Some(stats.oldest_ready_at.map_or(since, |oldest| oldest.min(since)));
        }
        Ok(Outcome::Stats(Box::new(stats)))
    }

    fn pause(&mut self, is_paused: bool) -> Outcome {
        self.queue.is_dirty |= self.queue.is_paused != is_paused;
        self.queue.is_paused = is_paused;
        Outcome::Done
    }

    fn purge(&mut self, state: JobState) -> Result<Outcome> {
        let seqs = self.queue.oldest(state, BULK_JOBS_MAX);
        let count = seqs.len() as u64;
        for seq in seqs {
            self.remove(seq, "purged")?;
        }
        let next = (self.queue.count(state) > 0).then_some(self.now);
        Ok(Outcome::Moved { count, next })
    }

    fn dead_retry(&mut self, jobs: &[JobRef]) -> Result<Outcome> {
        let mut count = 0;
        for job in jobs {
            if let Some(seq) = self.dead(job) {
                count += u64::from(self.redrive(seq)?);
            }
        }
        Ok(Outcome::Count(count))
    }

    /// The dead job of this name.
    fn dead(&self, job: &JobRef) -> Option<u64> {
        let is_dead = |seq: &u64| self.state_of(*seq) == Some(JobState::Dead);
        self.resolve(job).filter(|seq| is_dead(seq) && !self.queue.travel.is_on_its_way(*seq))
    }

    fn dead_retry_all(&mut self, until: UnixMs) -> Result<Outcome> {
        let (mut count, mut passed) = (0, 0);
        let mut last = None;
        loop {
            let next = match last {
                None => self.queue.dead.first(),
                Some(last) => {
                    self.queue.dead.range((std::ops::Bound::Excluded(last), std::ops::Bound::Unbounded)).next()
                }
            };
            let Some(entry) = next.copied().filter(|(died_at, _)| *died_at <= until) else {
                return Ok(Outcome::Moved { count, next: None });
            };
            // Those whose key another job holds are passed over; where they are all that is seen it is at an end.
            if count >= BULK_JOBS_MAX as u64 || passed >= 10 * BULK_JOBS_MAX {
                return Ok(Outcome::Moved { count, next: (count > 0).then_some(until) });
            }
            match self.redrive(entry.1)? {
                true => count += 1,
                false => passed += 1,
            }
            last = Some(entry);
        }
    }

    /// Puts a dead job back; whether it could be.
    fn redrive(&mut self, seq: u64) -> Result<bool> {
        let unique = self.record(seq)?.spec.policy.unique.clone();
        if let Some((key, _)) = &unique
            && self.holder(key).is_some_and(|holder| holder != seq)
        {
            return Ok(false);
        }
        let mut job = self.known(seq)?;
        (job.spent, job.lapses) = (0, 0);
        job.detail_mut().redrives += 1;
        let state = self.transition(seq, job, Cause::Redrive, To::EndOfLine)?;
        if let Some((key, span)) = unique.filter(|_| !state.is_over()) {
            self.hold_unique(&key, seq, span);
        }
        Ok(true)
    }

    fn dead_delete(&mut self, jobs: &[JobRef]) -> Result<Outcome> {
        let mut count = 0;
        for job in jobs {
            if let Some(seq) = self.dead(job) {
                self.remove(seq, "deleted")?;
                count += 1;
            }
        }
        Ok(Outcome::Count(count))
    }
}
