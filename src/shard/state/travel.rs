//! Jobs on their way from one shard to another, as both ends see it: DEPART, ARRIVE, DEPARTED; and what a queue knows of
//! homes that moved.
//!
//! All of it that must outlive the process is one row per queue, [`Travel`]. Jobs on their way keep their own rows and are
//! found by id, but stand in no order, so nothing else happens to them.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::job::{Job, NUMBER_MAX, Record, broken};
use super::queue::Hold;
use super::rows::{Key, Rows};
use super::turn::Turn;
use crate::error::Result;
use crate::job::{JobState, JobView, Policy, Spec};
use crate::shard::event::{self, Event, What};
use crate::shard::{BULK_JOBS_MAX, Departure, Outcome, Placed, TRAVEL_BYTES_MAX, TRAVEL_STEP, TravelMark};

/// A batch on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    mark: TravelMark,
    route: Bytes,
    /// In the order in which they arrive.
    seqs: Vec<u64>,
    known: HashSet<u64>,
}

/// What a queue knows of journeys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Travel {
    /// The version in which homes moved last, as somebody has told; 0: nobody has.
    pub homes_since: u64,
    /// Of the last batch that departed.
    last: TravelMark,
    pub departing: Option<Batch>,
    /// By the name of a shard its last batch that came here.
    arrived: BTreeMap<Bytes, TravelMark>,
}

fn put_mark(out: &mut BytesMut, mark: TravelMark) {
    out.put_u64(mark.at);
    out.put_u64(mark.number);
}

fn read_mark(row: &mut Bytes) -> Option<TravelMark> {
    Some(TravelMark { at: row.try_get_u64().ok()?, number: row.try_get_u64().ok()? })
}

impl Travel {
    pub fn is_on_its_way(&self, seq: u64) -> bool {
        self.departing.as_ref().is_some_and(|batch| batch.known.contains(&seq))
    }

    fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        out.put_u64(self.homes_since);
        put_mark(&mut out, self.last);
        out.put_u32(self.arrived.len() as u32);
        for (source, mark) in &self.arrived {
            out.put_u16(source.len() as u16);
            out.put_slice(source);
            put_mark(&mut out, *mark);
        }
        if let Some(batch) = &self.departing {
            put_mark(&mut out, batch.mark);
            out.put_u32(batch.route.len() as u32);
            out.put_slice(&batch.route);
            batch.seqs.iter().for_each(|seq| out.put_u64(*seq));
        }
        out.freeze()
    }

    pub fn decode(row: Bytes) -> Result<Travel> {
        Travel::read(row).ok_or_else(|| broken("what a queue knows of journeys cannot be read"))
    }

    fn read(mut row: Bytes) -> Option<Travel> {
        let (homes_since, last) = (row.try_get_u64().ok()?, read_mark(&mut row)?);
        let mut travel = Travel { homes_since, last, ..Travel::default() };
        for _ in 0..row.try_get_u32().ok()? {
            let len = usize::from(row.try_get_u16().ok()?);
            let source = (row.len() >= len).then(|| row.split_to(len))?;
            travel.arrived.insert(source, read_mark(&mut row)?);
        }
        if !row.is_empty() {
            let (mark, len) = (read_mark(&mut row)?, row.try_get_u32().ok()? as usize);
            let route = (row.len() >= len).then(|| row.split_to(len))?;
            let mut seqs = Vec::with_capacity(row.len() / 8);
            while !row.is_empty() {
                seqs.push(row.try_get_u64().ok()?);
            }
            travel.departing = Some(Batch { mark, route, known: seqs.iter().copied().collect(), seqs });
        }
        Some(travel)
    }
}

impl<R: Rows> Turn<'_, R> {
    fn put_travel(&mut self) {
        self.rows.put(Key::Travel(self.queue.number), self.queue.travel.encode());
        self.queue.is_dirty = true;
    }

    pub fn seek(&mut self, id: Option<&Bytes>, unique: Option<&Bytes>, homes_since: u64) -> Result<Outcome> {
        if homes_since > self.queue.travel.homes_since {
            self.queue.travel.homes_since = homes_since;
            self.put_travel();
        }
        let by_id = id.and_then(|id| self.queue.ids.get(&id[..]).copied());
        let Some(seq) = by_id.or_else(|| self.holder(unique?)) else { return Ok(Outcome::Enqueued(Vec::new())) };
        let chosen = self.record(seq)?.spec.policy.id.clone();
        Ok(Outcome::Enqueued(vec![Placed::Held { seq, chosen }]))
    }

    pub fn depart(&mut self, state: JobState, count: u64, route: &Bytes, outdated: TravelMark) -> Result<Outcome> {
        if self.queue.travel.departing.is_none() {
            let count = usize::try_from(count).unwrap_or(usize::MAX).min(BULK_JOBS_MAX);
            let (mut seqs, mut bytes) = (Vec::new(), 0);
            while seqs.len() < count && bytes < TRAVEL_BYTES_MAX {
                let step = self.queue.oldest(state, TRAVEL_STEP.min(count - seqs.len()));
                if step.is_empty() {
                    break;
                }
                for seq in step {
                    let job = self.known(seq)?;
                    bytes += self.record_bytes(seq)?;
                    self.leave(seq, &job);
                    // The turn of its group stays its own until it is gone.
                    self.queue.keep_turn(&job);
                    self.put(seq, job);
                    seqs.push(seq);
                }
            }
            if !seqs.is_empty() {
                let mark = self.next_mark();
                let known = seqs.iter().copied().collect();
                // A copy: what is kept must not hold the request's memory.
                let route = Bytes::copy_from_slice(route);
                self.queue.travel.departing = Some(Batch { mark, route, seqs, known });
                self.put_travel();
            }
        } else if self.queue.travel.departing.as_ref().is_some_and(|batch| batch.mark == outdated) {
            let mark = self.next_mark();
            self.queue.travel.departing.iter_mut().for_each(|batch| batch.mark = mark);
            self.put_travel();
        }
        let Some(batch) = self.queue.travel.departing.clone() else {
            return Ok(Outcome::Departing(Departure::default()));
        };
        let jobs: Result<Vec<Option<JobView>>> = batch.seqs.iter().map(|seq| self.view(*seq)).collect();
        let jobs = jobs?.into_iter().flatten().collect();
        Ok(Outcome::Departing(Departure { mark: batch.mark, route: batch.route, jobs }))
    }

    fn next_mark(&mut self) -> TravelMark {
        let at = self.now.max(self.queue.travel.last.at);
        self.queue.travel.last = TravelMark { at, number: self.queue.next() };
        self.queue.travel.last
    }

    pub fn arrive(&mut self, source: &Bytes, mark: TravelMark, jobs: &[JobView]) -> Result<Outcome> {
        match self.queue.travel.arrived.get(source).map(|last| mark.cmp(last)) {
            Some(std::cmp::Ordering::Less) => return Ok(Outcome::Outdated),
            Some(std::cmp::Ordering::Equal) => return Ok(Outcome::Count(0)),
            _ => {}
        }
        self.queue.travel.arrived.insert(Bytes::copy_from_slice(source), mark);
        self.put_travel();
        for view in jobs {
            self.add_arrived(view)?;
        }
        Ok(Outcome::Count(jobs.len() as u64))
    }

    fn add_arrived(&mut self, view: &JobView) -> Result<()> {
        let seq = self.queue.next();
        let mut spec = view.spec.clone();
        if spec.policy.id.as_ref().is_some_and(|id| self.queue.ids.contains_key(&id[..])) {
            spec = Spec { policy: Arc::new(Policy { id: None, ..(*spec.policy).clone() }), ..spec };
        }
        self.rows.put(Key::Record(self.queue.number, seq), Record::encode(view.enqueued_at, &spec));
        let record = Record { enqueued_at: view.enqueued_at, spec };
        let mut job = Job::new(seq, &record);
        let policy = &record.spec.policy;
        if let Some(id) = &policy.id {
            self.queue.ids.insert(id[..].into(), seq);
        }
        if let (Some((key, _)), Some(until)) = (&policy.unique, view.unique_until(self.now))
            && self.holder(key).is_none()
        {
            let hold = Hold { seq, until: if until > NUMBER_MAX { 0 } else { until } };
            let key = Bytes::copy_from_slice(key);
            self.put_hold(key, hold);
        }
        self.queue.is_dirty = true;
        let what = if view.state == JobState::Scheduled { What::Scheduled } else { What::Queued };
        if self.rules.recording.is_some() {
            self.tell(&Event { chosen: policy.id.clone(), ..Event::new(what, seq, self.now) });
        }
        if view.is_fresh() {
            self.queue.enter(seq, &job);
            self.queue.pristine.insert(seq);
            return Ok(());
        }
        (job.spent, job.lapses, job.state) = (view.attempt.saturating_sub(1), view.lapses, view.state);
        match view.state {
            JobState::Scheduled => (job.at, job.place) = (view.due_at.unwrap_or(self.now), 0),
            JobState::Dead => (job.at, job.place) = (view.finished_at.unwrap_or(self.now), 0),
            _ => job.place = self.queue.next(),
        }
        let history =
            self.rules.recording.map(|_| event::begin_history(what, self.now, record.spec.policy.id.as_ref()));
        let detail = job.detail_mut();
        detail.history = history.unwrap_or_default();
        let copy = |text: &Bytes| Bytes::copy_from_slice(text);
        detail.started_at = view.started_at.unwrap_or(0);
        (detail.redrives, detail.progress) = (view.redrives, view.progress);
        (detail.worker, detail.error, detail.trace) = (copy(&view.worker), copy(&view.error), copy(&view.trace));
        detail.progress_text = copy(&view.progress_text);
        let member = job.member.clone();
        self.queue.enter(seq, &job);
        self.put(seq, job);
        member.map_or(Ok(()), |member| self.admit(&member.key))
    }

    pub fn departed(&mut self, mark: TravelMark) -> Result<Outcome> {
        match self.queue.travel.departing.take_if(|batch| batch.mark == mark) {
            None => Ok(Outcome::Count(0)),
            Some(batch) => {
                for seq in &batch.seqs {
                    let has_row = self.queue.jobs.contains_key(seq);
                    let Some(job) = self.take(*seq)? else { continue };
                    self.queue.give_turn(&job);
                    self.forget(*seq, job, has_row, "moved")?;
                }
                self.put_travel();
                Ok(Outcome::Count(batch.seqs.len() as u64))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_read_back_as_it_was() {
        let last = TravelMark { at: 5, number: 4 };
        let mut travel = Travel { homes_since: 7, last, ..Travel::default() };
        travel.arrived.insert("s0".into(), TravelMark { at: 7, number: 99 });
        assert_eq!(Travel::decode(travel.encode()).unwrap(), travel);
        let seqs = vec![3, 1, 2];
        let known = seqs.iter().copied().collect();
        travel.departing = Some(Batch { mark: last, route: "a*1".into(), seqs, known });
        let row = travel.encode();
        assert_eq!(Travel::decode(row.clone()).unwrap(), travel);
        assert!(Travel::decode(row.slice(..row.len() - 3)).is_err());
    }
}
