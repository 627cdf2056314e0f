//! What is recorded of a queue: the chunk of the batch that is being applied, the journal, and the histories of jobs that
//! are forgotten otherwise. The layouts are `shard/event.rs`; what is recorded when is `shard/mod.rs`.
//!
//! A history lies in the row of its job and gets one of its own when the job is removed. In memory are the order of these
//! and of the chunks, 16 bytes each.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::collections::{HashMap, VecDeque};

use super::job::{Job, broken};
use super::queue::Queue;
use super::rows::{Key, Rows};
use super::turn::{Cause, Turn};
use crate::clock::UnixMs;
use crate::error::Result;
use crate::job::{JobRef, JobState, flag};
use crate::shard::event::{self, Entry, Event, Page, Told, What};
use crate::shard::feed::Recorded;
use crate::shard::{BULK_JOBS_MAX, Outcome};

/// The fixed part of a history's row.
const HISTORY_HEADER_BYTES: usize = 14;

#[derive(Default)]
pub struct Journal {
    /// The number of the last event.
    pub last: u64,
    /// When the first was recorded; 0: none was.
    pub born: UnixMs,
    /// The number of the last job that was retired.
    pub retired_last: u64,
    /// What the current batch has recorded, and how many events and deaths that is.
    chunk: BytesMut,
    noted: u64,
    deaths: u64,
    /// (number of its last event, time), oldest first.
    chunks: VecDeque<(u64, UnixMs)>,
    /// (seq, time of its end) of jobs of which only the history is left, in the order in which they were removed.
    retired: VecDeque<(u64, UnixMs)>,
    /// Which of these a client knows by its own id.
    retired_ids: HashMap<Box<[u8]>, u64, foldhash::fast::RandomState>,
}

impl Journal {
    pub fn new(last: u64, born: UnixMs, retired_last: u64) -> Journal {
        Journal { last, born, retired_last, ..Journal::default() }
    }

    /// Takes in what the rows of a queue tell of its chunks and histories; each in any order.
    pub fn load(&mut self, mut chunks: Vec<(u64, UnixMs)>, mut histories: Vec<(u64, u64, Bytes)>) -> Result<()> {
        chunks.sort_unstable();
        self.chunks = chunks.into();
        histories.sort_unstable_by_key(|(number, ..)| *number);
        for (_, seq, row) in histories {
            let (_, ended_at, history) = read_history_row(&row)?;
            self.retired.push_back((seq, ended_at));
            if let Some(id) = event::chosen_in(&history) {
                self.retired_ids.insert(id[..].into(), seq);
            }
        }
        Ok(())
    }
}

/// When a chunk was recorded.
pub fn chunk_time(row: &Bytes) -> Result<UnixMs> {
    row.clone().try_get_uint(6).map_err(|_| broken("a part of a journal cannot be read"))
}

/// The number, the time of the job's end, and the history in a row.
pub fn read_history_row(row: &Bytes) -> Result<(u64, UnixMs, Bytes)> {
    let mut row = row.clone();
    if row.len() < HISTORY_HEADER_BYTES {
        return Err(broken("a history cannot be read"));
    }
    Ok((row.get_u64(), row.get_uint(6), row))
}

impl<R: Rows> Turn<'_, R> {
    /// Records what a transition was. `job` is as it came out of it; `is_late`: it was acked after a lapse.
    pub fn record_transition(&mut self, seq: u64, job: &mut Job, cause: Cause, is_late: bool) -> Result<()> {
        if self.rules.recording.is_none() {
            return Ok(());
        }
        let spent = job.spent;
        let expires = job.state == JobState::Expired;
        match cause {
            Cause::Due if !expires => self.note(seq, job, What::Queued, None)?,
            Cause::Due | Cause::Ttl => {}
            Cause::Lease => self.note(seq, job, What::Started, Some(spent.saturating_add(1)))?,
            Cause::Ack if is_late => {
                // A lapse was counted; the end of a session was not.
                let history = job.detail_mut().history.clone().freeze();
                let entries = event::read_history(seq, history).unwrap_or_default();
                let ended = entries.iter().rev().find_map(|entry| match entry {
                    Entry::Event(event) if matches!(event.what, What::Failed | What::Released) => Some(event.what),
                    _ => None,
                });
                let attempt = if ended == Some(What::Released) { spent.saturating_add(1) } else { spent };
                self.note(seq, job, What::Completed, Some(attempt))?;
            }
            Cause::Ack => self.note(seq, job, What::Completed, Some(spent.saturating_add(1)))?,
            Cause::Release | Cause::Ended => self.note(seq, job, What::Released, Some(spent.saturating_add(1)))?,
            Cause::Redrive => self.note(seq, job, What::Redriven, None)?,
            Cause::Cancel => self.note(seq, job, What::Cancelled, None)?,
            Cause::Fail | Cause::Lapse => {
                self.note(seq, job, What::Failed, Some(spent))?;
                match job.state {
                    JobState::Dead => self.note(seq, job, What::Dead, Some(spent))?,
                    _ if expires => {}
                    _ => self.note(seq, job, What::Retried, Some(spent))?,
                }
            }
        }
        if expires { self.note(seq, job, What::Expired, None) } else { Ok(()) }
    }

    /// Records one event: in the history of its job, and for the journal.
    pub fn note(&mut self, seq: u64, job: &mut Job, what: What, attempt: Option<u32>) -> Result<()> {
        let now = self.now;
        let chosen = if job.has(flag::ID) { self.chosen(seq, job)? } else { None };
        let detail = job.detail_mut();
        let mut event = Event { attempt, chosen, ..Event::new(what, seq, now) };
        match what {
            What::Started | What::Progress | What::Completed | What::Failed | What::Released | What::Dead => {
                event.worker = detail.worker.clone();
            }
            _ => {}
        }
        match what {
            What::Completed | What::Failed | What::Released => {
                event.duration_ms = Some(now.saturating_sub(detail.started_at));
            }
            What::Progress => event.progress = detail.progress,
            _ => {}
        }
        if matches!(what, What::Failed | What::Dead) {
            event.error = Bytes::copy_from_slice(event::cut_error(&detail.error));
        }
        event::extend_history(&mut detail.history, &event);
        self.tell(&event);
        Ok(())
    }

    /// Records an event for the journal alone: a job that waits as its enqueue left it has no row to write a history in.
    pub fn tell(&mut self, event: &Event) {
        let journal = &mut self.queue.journal;
        if journal.noted == 0 {
            event::begin_chunk(&mut journal.chunk, self.now);
        }
        event::put_event(&mut journal.chunk, event);
        journal.noted += 1;
        journal.deaths += u64::from(event.what == What::Dead);
    }

    fn chosen(&self, seq: u64, job: &Job) -> Result<Option<Bytes>> {
        match job.detail.as_deref().and_then(|detail| event::chosen_in(&detail.history)) {
            Some(id) => Ok(Some(id)),
            None => Ok(self.record(seq)?.spec.policy.id.clone()),
        }
    }

    /// Keeps the history of a job that is being removed; before it is over, it ends with `reason`.
    pub fn retire(&mut self, seq: u64, mut job: Job, reason: &'static str) -> Result<()> {
        if self.rules.recording.is_none() {
            return Ok(());
        }
        if !job.state.is_over() {
            job.at = self.now;
            let chosen = if job.has(flag::ID) { self.chosen(seq, &job)? } else { None };
            let event = Event { chosen, error: reason.into(), ..Event::new(What::Cancelled, seq, self.now) };
            event::extend_history(&mut job.detail_mut().history, &event);
            self.tell(&event);
        }
        let journal = &mut self.queue.journal;
        journal.retired_last += 1;
        journal.retired.push_back((seq, job.at));
        let ended_at = job.at;
        let history = &job.detail_mut().history;
        if let Some(id) = event::chosen_in(history) {
            journal.retired_ids.insert(id[..].into(), seq);
        }
        let mut row = BytesMut::with_capacity(HISTORY_HEADER_BYTES + history.len());
        row.put_u64(journal.retired_last);
        row.put_uint(ended_at, 6);
        row.put_slice(history);
        self.rows.put(Key::History(self.queue.number, seq), row.freeze());
        Ok(())
    }

    /// Forgets histories of the removed: what is too many or too old, at most [`BULK_JOBS_MAX`].
    pub fn trim_histories(&mut self) -> Result<()> {
        let (most, age_ms) = self.rules.recording.map_or((0, 0), |recording| (recording.histories, recording.age_ms));
        for _ in 0..BULK_JOBS_MAX {
            let Some((seq, ended_at)) = self.queue.journal.retired.front().copied() else { break };
            let is_old = ended_at.saturating_add(age_ms) <= self.now;
            if self.queue.journal.retired.len() as u64 <= most && !is_old {
                break;
            }
            let key = Key::History(self.queue.number, seq);
            let journal = &mut self.queue.journal;
            journal.retired.pop_front();
            if !journal.retired_ids.is_empty()
                && let Some(row) = self.rows.get(&key)?
                && let Some(id) = event::chosen_in(&read_history_row(&row)?.2)
                && journal.retired_ids.get(&id[..]) == Some(&seq)
            {
                journal.retired_ids.remove(&id[..]);
            }
            self.rows.delete(key);
            self.queue.is_dirty = true;
        }
        Ok(())
    }

    /// Writes what the batch has recorded, if anything, and drops what the journal need not keep.
    pub fn close_chunk(&mut self) -> Option<Recorded> {
        let (number, journal) = (self.queue.number, &mut self.queue.journal);
        let mut recorded = None;
        if journal.noted > 0 {
            if journal.born == 0 {
                journal.born = self.now;
            }
            journal.last += std::mem::take(&mut journal.noted);
            let chunk = journal.chunk.split().freeze();
            journal.chunks.push_back((journal.last, self.now));
            recorded = Some(Recorded {
                queue: self.queue.name.clone(),
                born: journal.born,
                told: Told { last: journal.last, died: self.queue.totals.died, chunk: chunk.clone() },
                is_death: std::mem::take(&mut journal.deaths) > 0,
            });
            self.rows.put(Key::Chunk(number, journal.last), chunk);
            self.queue.is_dirty = true;
        }
        let (most, age_ms) = self.rules.recording.map_or((0, 0), |recording| (recording.journal, recording.age_ms));
        for _ in 0..BULK_JOBS_MAX {
            let Some((last, at)) = journal.chunks.front().copied() else { break };
            if journal.last - last < most.max(1) && at.saturating_add(age_ms) > self.now {
                break;
            }
            journal.chunks.pop_front();
            self.rows.delete(Key::Chunk(number, last));
        }
        recorded
    }

    pub fn history(&self, job: &JobRef) -> Result<Outcome> {
        let seq = match job {
            JobRef::Seq(seq) => Some(*seq),
            JobRef::Chosen(id) => {
                self.queue.ids.get(&id[..]).or_else(|| self.queue.journal.retired_ids.get(&id[..])).copied()
            }
        };
        let Some(seq) = seq else { return Ok(Outcome::History(Vec::new())) };
        let history = match self.queue.jobs.get(&seq) {
            Some(job) => match &job.detail {
                Some(detail) => detail.history.clone().freeze(),
                None if job.is_bare => Bytes::new(),
                None => self.stored_detail(seq)?.history.freeze(),
            },
            None if self.queue.pristine.contains(seq) => {
                self.fresh(seq)?.detail.map_or(Bytes::new(), |detail| detail.history.freeze())
            }
            None => match self.rows.get(&Key::History(self.queue.number, seq))? {
                Some(row) => read_history_row(&row)?.2,
                None => Bytes::new(),
            },
        };
        let entries = event::read_history(seq, history).ok_or_else(|| broken("a history cannot be read"))?;
        Ok(Outcome::History(entries))
    }

    pub fn events_after(&self, number: u64, count: u64) -> Result<Outcome> {
        let count = page_size(count);
        let first = self.queue.journal.chunks.partition_point(|(last, _)| *last <= number);
        let mut chunks = Vec::new();
        for (last, _) in self.queue.journal.chunks.iter().skip(first) {
            chunks.push((*last, self.chunk(*last)?));
            if last - number >= count as u64 {
                break;
            }
        }
        self.page(chunks, Some(number), count)
    }

    pub fn events_recent(&self, count: u64) -> Result<Outcome> {
        let count = page_size(count);
        let mut chunks = Vec::new();
        for (last, _) in self.queue.journal.chunks.iter().rev() {
            if self.queue.journal.last - last >= count as u64 {
                break;
            }
            chunks.push((*last, self.chunk(*last)?));
        }
        chunks.reverse();
        self.page(chunks, None, count)
    }

    fn chunk(&self, last: u64) -> Result<Bytes> {
        let row = self.rows.get(&Key::Chunk(self.queue.number, last))?;
        row.ok_or_else(|| broken("a part of a journal is missing"))
    }

    fn page(&self, chunks: Vec<(u64, Bytes)>, after: Option<u64>, count: usize) -> Result<Outcome> {
        let Queue { journal, .. } = &*self.queue;
        let page: Option<Page> = event::page(journal.born, journal.last, chunks, after, count);
        page.map(Outcome::Events).ok_or_else(|| broken("a part of a journal cannot be read"))
    }
}

fn page_size(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX).min(event::PAGE_EVENTS_MAX)
}
