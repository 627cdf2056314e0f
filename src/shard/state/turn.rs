//! One queue's part of a batch: the jobs as they are taken, changed and written, and what falls due around the ops.
//!
//! [`Turn::transition`] makes every change of a job's state, so that whatever must happen with each (a count, a freed key,
//! a row) happens there. A job is taken out of memory with its detail, changed, and put back with its row written.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::job::{Detail, Job, Last, NUMBER_MAX, Record, broken};
use super::queue::{Hold, Queue};
use super::rows::{Key, Rows};
use crate::clock::{Millis, UnixMs};
use crate::error::Result;
use crate::job::{JobRef, JobState, JobView, Spec, backoff_delay, flag};
use crate::shard::event::{self, Event, What};
use crate::shard::feed::Recorded;
use crate::shard::{BULK_JOBS_MAX, Effect, Rules, TICK_JOBS_MAX};

/// What made a job change its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    Due,
    Lease,
    Ack,
    Fail,
    Release,
    Lapse,
    Redrive,
    Cancel,
    Ttl,
    /// The session that held the lease has ended.
    Ended,
}

/// Where a job goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    EndOfLine,
    /// The place that it had.
    OldPlace,
    Scheduled(UnixMs),
    Leased(UnixMs),
    Dead,
    Over(JobState),
}

pub struct Turn<'a, R> {
    pub queue: &'a mut Queue,
    pub rows: &'a mut R,
    pub rules: &'a Rules,
    pub now: UnixMs,
}

impl<R: Rows> Turn<'_, R> {
    /// Moves what has fallen due, and forgets what need not be kept any more.
    pub fn begin(&mut self) -> Result<()> {
        self.queue.leased_bytes = 0;
        if let Some(share) = &mut self.queue.share {
            share.slide(self.now);
        }
        let mut room = TICK_JOBS_MAX;
        self.end_sessions(&mut room)?;
        while let Some(seq) = due(self.queue.leased.first(), self.now, &mut room) {
            self.lapse(seq)?;
        }
        while let Some(seq) = due(self.queue.scheduled.first(), self.now, &mut room) {
            let job = self.known(seq)?;
            self.transition(seq, job, Cause::Due, To::EndOfLine)?;
        }
        while let Some(seq) = due(self.queue.expiring.first(), self.now, &mut room) {
            let job = self.known(seq)?;
            self.transition(seq, job, Cause::Ttl, To::Over(JobState::Expired))?;
        }
        self.trim()
    }

    /// Writes the counters; what the batch leaves for the lane, and what it recorded.
    pub fn finish(&mut self) -> Result<(Effect, Option<Recorded>)> {
        self.trim()?;
        let recorded = self.close_chunk();
        if self.queue.is_dirty {
            self.rows.put(Key::Queue(self.queue.number), self.queue.encode());
            self.queue.is_dirty = false;
            self.queue.is_stored = true;
        }
        if let Some(share) = self.queue.share.as_mut().filter(|share| share.is_dirty) {
            share.is_dirty = false;
            self.rows.put(Key::Limits(self.queue.number), share.encode());
        }
        let (ready, line) = (self.queue.leasable(), self.queue.line.len());
        let can_open = ready == 0 && line > 0 && !self.queue.is_paused;
        let opens_at = self.queue.share.as_ref().filter(|_| can_open).and_then(|share| share.opens_at());
        let due_at = self.queue.due_at().into_iter().chain(opens_at).min();
        let effect = Effect {
            queue: self.queue.name.clone(),
            ready,
            load: self.queue.count(JobState::Ready)
                + self.queue.count(JobState::Leased)
                + self.queue.count(JobState::Scheduled),
            due_in: due_at.map(|at| at.saturating_sub(self.now)),
            deaths: self.queue.deaths,
        };
        Ok((effect, recorded))
    }

    /// Forgets the oldest of those that are over: what is too many or too old, at most [`BULK_JOBS_MAX`].
    fn trim(&mut self) -> Result<()> {
        let retention = self.rules.retention;
        for _ in 0..BULK_JOBS_MAX {
            let Some(seq) = self.queue.oldest_over() else { break };
            let ended_at = self.queue.jobs.get(&seq).map_or(0, |job| job.at);
            let is_old = ended_at.saturating_add(retention.age_ms) <= self.now;
            if self.queue.kept() <= retention.jobs && !is_old {
                break;
            }
            self.remove(seq, "")?;
        }
        self.trim_histories()
    }

    fn lapse(&mut self, seq: u64) -> Result<()> {
        let mut job = self.known(seq)?;
        let policy = self.record(seq)?.spec.policy;
        let lapses_max = self.rules.lapses_max;
        job.spent = job.spent.saturating_add(1);
        job.lapses = job.lapses.saturating_add(1);
        let lapses = job.lapses;
        let is_dead = lapses >= lapses_max || job.spent >= policy.attempts;
        let delay = backoff_delay(policy.backoff, policy.backoff_max, job.spent, job.token).max(1);
        let detail = job.detail_mut();
        detail.trace = Bytes::new();
        detail.error = match is_dead {
            true => format!("lease lapsed {lapses} times: the worker crashed or hung"),
            false => format!("lease lapsed ({lapses} of {lapses_max})"),
        }
        .into();
        let to = if is_dead { To::Dead } else { To::Scheduled(self.after(delay)) };
        self.transition(seq, job, Cause::Lapse, to)?;
        Ok(())
    }

    /// Moves a job, which the caller took, to another state; the state that it came to. A job whose ttl is over expires
    /// instead of waiting.
    pub fn transition(&mut self, seq: u64, mut job: Job, cause: Cause, to: To) -> Result<JobState> {
        self.leave(seq, &job);
        let is_late = job.last == Last::Lapsed;
        let to = match to {
            To::EndOfLine | To::OldPlace | To::Scheduled(_) if job.is_expired(self.now) => To::Over(JobState::Expired),
            to => to,
        };
        (job.state, job.at) = match to {
            To::EndOfLine => {
                job.place = self.queue.next();
                (JobState::Ready, self.now)
            }
            To::OldPlace => (JobState::Ready, 0),
            To::Scheduled(due_at) => (JobState::Scheduled, due_at),
            To::Leased(until) => (JobState::Leased, until),
            To::Dead => (JobState::Dead, self.now),
            To::Over(state) => {
                self.queue.ended += 1;
                job.place = self.queue.ended;
                (state, self.now)
            }
        };
        match cause {
            Cause::Fail => job.last = Last::Failed(job.state),
            Cause::Release => job.last = Last::Released(job.state),
            Cause::Ack => job.last = Last::Acked,
            Cause::Lapse | Cause::Ended => job.last = Last::Lapsed,
            // Falling due is nothing that a verdict would have to know of, unless it ends the job.
            Cause::Due if !job.state.is_over() => {}
            Cause::Due | Cause::Lease | Cause::Redrive | Cause::Cancel | Cause::Ttl => job.last = Last::Nothing,
        }
        self.count(cause, job.state);
        if job.state == JobState::Dead {
            self.count_death(seq, &job)?;
        }
        let member = job.member.clone();
        if let Some(member) = &member {
            job.set_turn(match job.state {
                JobState::Leased => true,
                // With a bound of 1 the others stay behind it, or the order would break.
                JobState::Ready | JobState::Scheduled => job.has_turn() && member.bound == 1,
                _ => false,
            });
        }
        if job.has(flag::UNIQUE) && (job.state.is_over() || job.state == JobState::Dead) {
            self.free_unique(seq)?;
        }
        self.record_transition(seq, &mut job, cause, is_late)?;
        let state = job.state;
        self.queue.enter(seq, &job);
        self.put(seq, job);
        if let Some(member) = member.filter(|_| state != JobState::Leased) {
            self.admit(&member.key)?;
        }
        Ok(state)
    }

    /// Lets those into the line, at the places that they have, for whom their group has a turn.
    pub fn admit(&mut self, group: &Bytes) -> Result<()> {
        while let Some(seq) = self.queue.groups.next(group) {
            let mut job = self.known(seq)?;
            self.queue.leave(seq, &job);
            job.set_turn(true);
            self.queue.enter(seq, &job);
            self.put(seq, job);
        }
        Ok(())
    }

    fn count(&mut self, cause: Cause, state: JobState) {
        let totals = &mut self.queue.totals;
        match cause {
            Cause::Lease => totals.delivered += 1,
            Cause::Ack => totals.completed += 1,
            Cause::Fail => totals.failed += 1,
            Cause::Release | Cause::Ended => totals.released += 1,
            Cause::Lapse => totals.lapsed += 1,
            Cause::Redrive => totals.redriven += 1,
            Cause::Cancel => totals.cancelled += 1,
            Cause::Due | Cause::Ttl => {}
        }
        match state {
            JobState::Dead => totals.died += 1,
            JobState::Expired => totals.expired += 1,
            _ => {}
        }
    }

    /// Adds a job, ready or scheduled.
    pub fn add(&mut self, spec: Spec, due_at: Option<UnixMs>) -> Result<u64> {
        let seq = self.queue.next();
        let row = Record::encode(self.now, &spec);
        let record = Record { enqueued_at: self.now, spec };
        let mut job = Job::new(seq, &record);
        self.rows.put(Key::Record(self.queue.number, seq), row);
        if let Some(id) = &record.spec.policy.id {
            self.queue.ids.insert(id[..].into(), seq);
        }
        if let Some((key, span)) = &record.spec.policy.unique {
            self.hold_unique(key, seq, *span);
        }
        self.queue.totals.enqueued += 1;
        self.queue.is_dirty = true;
        let mut what = What::Queued;
        if let Some(due_at) = due_at {
            what = What::Scheduled;
            (job.state, job.at, job.place) = (JobState::Scheduled, due_at, 0);
        }
        if self.rules.recording.is_some() {
            let chosen = record.spec.policy.id.as_ref();
            self.tell(&Event { chosen: chosen.cloned(), ..Event::new(what, seq, self.now) });
            // Any other is without a row until something happens to it.
            if what == What::Scheduled || job.member.is_some() {
                job.detail_mut().history = event::begin_history(what, self.now, chosen);
            }
        }
        self.queue.enter(seq, &job);
        match (job.state, job.member.clone()) {
            (JobState::Ready, None) => self.queue.pristine.insert(seq),
            (JobState::Ready, Some(member)) => {
                self.put(seq, job);
                self.admit(&member.key)?;
            }
            _ => self.put(seq, job),
        }
        Ok(seq)
    }

    /// Removes a job and all trace of it but its history; where it is not over yet, that ends with `reason`.
    pub fn remove(&mut self, seq: u64, reason: &'static str) -> Result<()> {
        let has_row = self.queue.jobs.contains_key(&seq);
        let Some(job) = self.take(seq)? else { return Ok(()) };
        self.leave(seq, &job);
        self.forget(seq, job, has_row, reason)
    }

    /// The same for a job that stands in no order.
    pub fn forget(&mut self, seq: u64, job: Job, has_row: bool, reason: &'static str) -> Result<()> {
        if job.has(flag::ID)
            && let Some(id) = &self.record(seq)?.spec.policy.id
        {
            self.queue.ids.remove(&id[..]);
        }
        if job.has(flag::UNIQUE) {
            self.free_unique(seq)?;
        }
        let member = job.member.clone();
        self.retire(seq, job, reason)?;
        self.rows.delete(Key::Record(self.queue.number, seq));
        if has_row {
            self.rows.delete(Key::Job(self.queue.number, seq));
        }
        self.queue.is_dirty = true;
        member.map_or(Ok(()), |member| self.admit(&member.key))
    }

    /// Puts a job that was taken back and writes its row. Only a leased job keeps its detail in memory.
    pub fn put(&mut self, seq: u64, mut job: Job) {
        self.rows.put(Key::Job(self.queue.number, seq), job.encode());
        job.is_bare = job.detail.as_deref().is_none_or(|detail| *detail == Detail::default());
        if job.state != JobState::Leased || job.is_bare {
            job.detail = None;
        }
        self.queue.jobs.insert(seq, job);
        self.queue.is_dirty = true;
    }

    pub fn leave(&mut self, seq: u64, job: &Job) {
        self.queue.leave(seq, job);
        self.queue.pristine.remove(seq);
        if job.state == JobState::Leased {
            self.loosen(seq);
        }
    }

    /// Takes a job with its detail, to be put back; it stays in the order of its state until then.
    pub fn take(&mut self, seq: u64) -> Result<Option<Job>> {
        let Some(mut job) = self.queue.jobs.remove(&seq) else {
            return self.queue.pristine.contains(seq).then(|| self.fresh(seq)).transpose();
        };
        if job.detail.is_none() && !job.is_bare {
            job.detail = Some(Box::new(self.stored_detail(seq)?));
        }
        Ok(Some(job))
    }

    /// Takes a job that one of the orders names.
    pub fn known(&mut self, seq: u64) -> Result<Job> {
        self.take(seq)?.ok_or_else(|| broken("a job is in an order and nowhere else"))
    }

    /// A job as its enqueue left it, with the beginning of its history.
    pub fn fresh(&self, seq: u64) -> Result<Job> {
        self.record(seq).map(|record| self.fresh_of(seq, &record))
    }

    pub fn fresh_of(&self, seq: u64, record: &Record) -> Job {
        let mut job = Job::new(seq, record);
        if self.rules.recording.is_some() {
            let chosen = record.spec.policy.id.as_ref();
            job.detail_mut().history = event::begin_history(What::Queued, record.enqueued_at, chosen);
        }
        job
    }

    /// What is known of a job without its detail.
    pub fn header(&self, seq: u64) -> Result<Option<Job>> {
        match self.queue.jobs.get(&seq) {
            Some(job) => Ok(Some(Job { detail: None, ..job.clone() })),
            None if self.queue.pristine.contains(seq) => Ok(Some(Job::new(seq, &self.record(seq)?))),
            None => Ok(None),
        }
    }

    pub fn state_of(&self, seq: u64) -> Option<JobState> {
        match self.queue.jobs.get(&seq) {
            Some(job) => Some(job.state),
            None => self.queue.pristine.contains(seq).then_some(JobState::Ready),
        }
    }

    pub fn record(&self, seq: u64) -> Result<Record> {
        let row = self.rows.get(&Key::Record(self.queue.number, seq))?;
        Record::decode(&row.ok_or_else(|| broken("the record of a job is missing"))?)
    }

    /// The length of a job's record.
    pub fn record_bytes(&self, seq: u64) -> Result<usize> {
        Ok(self.rows.get(&Key::Record(self.queue.number, seq))?.map_or(0, |row| row.len()))
    }

    pub fn stored_detail(&self, seq: u64) -> Result<Detail> {
        let row = self.rows.get(&Key::Job(self.queue.number, seq))?;
        Detail::decode(&row.ok_or_else(|| broken("the state of a job is missing"))?)
    }

    pub fn resolve(&self, job: &JobRef) -> Option<u64> {
        match job {
            JobRef::Seq(seq) => Some(*seq),
            JobRef::Chosen(id) => self.queue.ids.get(&id[..]).copied(),
        }
    }

    pub fn view(&self, seq: u64) -> Result<Option<JobView>> {
        let Some(job) = self.queue.jobs.get(&seq) else {
            let Some(job) = self.header(seq)? else { return Ok(None) };
            return Ok(Some(job.view(seq, self.record(seq)?, Detail::default())));
        };
        let detail = match &job.detail {
            Some(detail) => (**detail).clone(),
            None if job.is_bare => Detail::default(),
            None => self.stored_detail(seq)?,
        };
        Ok(Some(job.view(seq, self.record(seq)?, detail)))
    }

    /// The point so long from now.
    pub fn after(&self, span: Millis) -> UnixMs {
        self.now.saturating_add(span).min(NUMBER_MAX)
    }

    /// The job that holds a unique key now.
    pub fn holder(&self, key: &Bytes) -> Option<u64> {
        let hold = self.queue.unique.get(key)?;
        (hold.until == 0 || hold.until > self.now).then_some(hold.seq)
    }

    pub fn hold_unique(&mut self, key: &Bytes, seq: u64, span: Millis) {
        // A span that ends beyond all times that are kept has no end.
        let until = if span == 0 { 0 } else { self.now.checked_add(span).filter(|at| *at <= NUMBER_MAX).unwrap_or(0) };
        // A copy: the key may be a part of a large request.
        let key = Bytes::copy_from_slice(key);
        self.put_hold(key, Hold { seq, until });
    }

    pub fn put_hold(&mut self, key: Bytes, hold: Hold) {
        self.rows.put(Key::Unique(self.queue.number, key.clone()), hold.encode());
        self.queue.unique.insert(key, hold);
    }

    fn free_unique(&mut self, seq: u64) -> Result<()> {
        if let Some((key, _)) = &self.record(seq)?.spec.policy.unique
            && self.queue.unique.get(key).is_some_and(|hold| hold.seq == seq)
        {
            self.queue.unique.remove(key);
            self.rows.delete(Key::Unique(self.queue.number, key.clone()));
        }
        Ok(())
    }
}

impl Hold {
    fn encode(self) -> Bytes {
        let mut out = BytesMut::with_capacity(16);
        out.put_u64(self.seq);
        out.put_u64(self.until);
        out.freeze()
    }

    pub fn decode(mut row: Bytes) -> Result<Hold> {
        match row.len() {
            16 => Ok(Hold { seq: row.get_u64(), until: row.get_u64() }),
            _ => Err(broken("the holder of a unique key cannot be read")),
        }
    }
}

/// The first of an order if it has fallen due and there is room for it.
fn due(first: Option<&(UnixMs, u64)>, now: UnixMs, room: &mut usize) -> Option<u64> {
    let (_, seq) = first.filter(|(at, _)| *at <= now && *room > 0)?;
    *room -= 1;
    Some(*seq)
}
