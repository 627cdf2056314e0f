//! One queue in memory: where each job stands, in which order, who holds which key, and what was counted.
//!
//! Everything here but the counters can be made again from the rows. Nothing here reads or writes a row: that, and every
//! change of a job's state, is `turn.rs`.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use super::group::Groups;
use super::job::{Job, broken};
use super::journal::Journal;
use super::limit::Share;
use super::line::{Dense, Line};
use super::session::Sessions;
use super::travel::Travel;
use crate::clock::UnixMs;
use crate::error::Result;
use crate::job::{JobState, Name};
use crate::shard::Stats;

type Map<K, V> = HashMap<K, V, foldhash::fast::RandomState>;

/// What happened in a queue since the shard first saw it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
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
}

impl Totals {
    fn each(&mut self) -> [&mut u64; 10] {
        [
            &mut self.enqueued,
            &mut self.delivered,
            &mut self.completed,
            &mut self.failed,
            &mut self.lapsed,
            &mut self.released,
            &mut self.died,
            &mut self.redriven,
            &mut self.cancelled,
            &mut self.expired,
        ]
    }
}

/// Who holds a unique key; `until` 0 is without end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hold {
    pub seq: u64,
    pub until: UnixMs,
}

pub struct Queue {
    pub name: Name,
    pub number: u32,
    /// The last seq or place that was handed out.
    pub counter: u64,
    /// The last place among those that are over.
    pub ended: u64,
    pub is_paused: bool,
    pub totals: Totals,
    /// Jobs that are not as their enqueue left them.
    pub jobs: Map<u64, Job>,
    /// Jobs that are: ready, at the place that is their seq, and without a row of their own.
    pub pristine: Dense,
    pub line: Line,
    /// Ready jobs that are not in the line, and who keeps them from it.
    pub groups: Groups,
    /// What the shard has of the queue's limits.
    pub share: Option<Box<Share>>,
    /// By due time, lease end and time of death.
    pub scheduled: BTreeSet<(UnixMs, u64)>,
    pub leased: BTreeSet<(UnixMs, u64)>,
    pub dead: BTreeSet<(UnixMs, u64)>,
    /// Ready and scheduled jobs with a ttl, by its end.
    pub expiring: BTreeSet<(UnixMs, u64)>,
    /// (place among those that are over, seq), oldest first; completed, cancelled, expired.
    over: [VecDeque<(u64, u64)>; 3],
    pub ids: Map<Box<[u8]>, u64>,
    pub unique: Map<Bytes, Hold>,
    /// The keys of the groups in the outbox, and all the deaths that they count.
    pub outbox: HashSet<Bytes, foldhash::fast::RandomState>,
    pub deaths: u64,
    pub sessions: Sessions,
    pub travel: Travel,
    pub journal: Journal,
    /// The counters have changed since they were last written.
    pub is_dirty: bool,
    /// The batch that is being applied has touched the queue.
    pub is_open: bool,
    /// So many bytes of jobs were leased by the batch that is being applied.
    pub leased_bytes: usize,
    /// A queue that nothing was ever written of is forgotten after the batch.
    pub is_stored: bool,
}

impl Queue {
    pub fn new(name: Name, number: u32) -> Queue {
        Queue {
            name,
            number,
            counter: 0,
            ended: 0,
            is_paused: false,
            totals: Totals::default(),
            jobs: Map::default(),
            pristine: Dense::default(),
            line: Line::default(),
            groups: Groups::default(),
            share: None,
            scheduled: BTreeSet::new(),
            leased: BTreeSet::new(),
            dead: BTreeSet::new(),
            expiring: BTreeSet::new(),
            over: Default::default(),
            ids: Map::default(),
            unique: Map::default(),
            outbox: HashSet::default(),
            deaths: 0,
            sessions: Sessions::default(),
            travel: Travel::default(),
            journal: Journal::default(),
            is_dirty: false,
            is_open: false,
            leased_bytes: 0,
            is_stored: false,
        }
    }

    /// The row of the queue: everything that no other row says.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(136 + self.name.as_str().len());
        out.put_u64(self.counter);
        out.put_u64(self.ended);
        out.put_u8(u8::from(self.is_paused));
        let mut totals = self.totals.clone();
        totals.each().into_iter().for_each(|total| out.put_u64(*total));
        for number in [self.journal.last, self.journal.born, self.journal.retired_last] {
            out.put_u64(number);
        }
        out.put_slice(self.name.as_str().as_bytes());
        out.freeze()
    }

    pub fn decode(number: u32, mut row: Bytes) -> Result<Queue> {
        let mut totals = Totals::default();
        if row.len() < 41 + 8 * totals.each().len() {
            return Err(broken("the row of a queue is too short"));
        }
        let (counter, ended, is_paused) = (row.get_u64(), row.get_u64(), row.get_u8() != 0);
        totals.each().into_iter().for_each(|total| *total = row.get_u64());
        let (last, born, retired_last) = (row.get_u64(), row.get_u64(), row.get_u64());
        let journal = Journal::new(last, born, retired_last);
        let name = Name::parse(&row).map_err(|_| broken("the name of a queue cannot be read"))?;
        Ok(Queue { counter, ended, is_paused, totals, journal, is_stored: true, ..Queue::new(name, number) })
    }

    /// Hands out a seq or a place.
    pub fn next(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    pub fn count(&self, state: JobState) -> u64 {
        match state {
            JobState::Ready => self.line.len() + self.groups.blocked(),
            JobState::Scheduled => self.scheduled.len() as u64,
            JobState::Leased => self.leased.len() as u64,
            JobState::Dead => self.dead.len() as u64,
            over => self.over[over_index(over)].len() as u64,
        }
    }

    pub fn kept(&self) -> u64 {
        self.over.iter().map(|jobs| jobs.len() as u64).sum()
    }

    /// Of all that are over, the one that has been so for longest.
    pub fn oldest_over(&self) -> Option<u64> {
        self.over.iter().filter_map(|jobs| jobs.front()).min().map(|(_, seq)| *seq)
    }

    /// Puts a job into the order of its state.
    pub fn enter(&mut self, seq: u64, job: &Job) {
        let member = job.member.as_ref();
        if let Some(member) = member.filter(|_| job.has_turn()) {
            self.groups.take_turn(member);
        }
        match (job.state, member) {
            (JobState::Ready, Some(member)) if job.is_blocked() => {
                self.groups.block(member, job.priority, job.place, seq);
            }
            (JobState::Ready, _) => self.line.insert(job.priority, job.place, seq),
            (JobState::Scheduled, _) => drop(self.scheduled.insert((job.at, seq))),
            (JobState::Leased, _) => drop(self.leased.insert((job.at, seq))),
            (JobState::Dead, _) => drop(self.dead.insert((job.at, seq))),
            (over, _) => self.over[over_index(over)].push_back((job.place, seq)),
        }
        if job.expires_at != 0 && matches!(job.state, JobState::Ready | JobState::Scheduled) {
            self.expiring.insert((job.expires_at, seq));
        }
    }

    /// Keeps the turn of a job that has left its order and is not over.
    pub fn keep_turn(&mut self, job: &Job) {
        if let Some(member) = job.member.as_ref().filter(|_| job.has_turn()) {
            self.groups.take_turn(member);
        }
    }

    /// Ends that.
    pub fn give_turn(&mut self, job: &Job) {
        if let Some(member) = job.member.as_ref().filter(|_| job.has_turn()) {
            self.groups.give_turn(member);
        }
    }

    /// Takes a job out of the order of its state.
    pub fn leave(&mut self, seq: u64, job: &Job) {
        let member = job.member.as_ref();
        if let Some(member) = member.filter(|_| job.has_turn()) {
            self.groups.give_turn(member);
        }
        match (job.state, member) {
            (JobState::Ready, Some(member)) if job.is_blocked() => {
                self.groups.unblock(member, job.priority, job.place);
            }
            (JobState::Ready, _) => self.line.remove(job.priority, job.place),
            (JobState::Scheduled, _) => drop(self.scheduled.remove(&(job.at, seq))),
            (JobState::Leased, _) => drop(self.leased.remove(&(job.at, seq))),
            (JobState::Dead, _) => drop(self.dead.remove(&(job.at, seq))),
            (over, _) => {
                let jobs = &mut self.over[over_index(over)];
                // Retention and PURGE take from the front.
                if jobs.front() == Some(&(job.place, seq)) {
                    jobs.pop_front();
                } else if let Ok(index) = jobs.binary_search(&(job.place, seq)) {
                    jobs.remove(index);
                }
            }
        }
        if job.expires_at != 0 && matches!(job.state, JobState::Ready | JobState::Scheduled) {
            self.expiring.remove(&(job.expires_at, seq));
        }
    }

    /// Puts the lists of those that are over in order, after their jobs came in the order of the rows.
    pub fn sort_over(&mut self) {
        self.over.iter_mut().for_each(|jobs| jobs.make_contiguous().sort_unstable());
    }

    /// A page in the order of PEEK. The walk to the offset is as long as the offset, at most.
    pub fn page(&self, state: JobState, offset: u64, count: usize) -> Vec<u64> {
        if offset >= self.count(state) {
            return Vec::new();
        }
        // Below the number of jobs in memory, so it fits.
        let skip = offset as usize;
        let seq = |entry: &(u64, u64)| entry.1;
        match state {
            JobState::Ready => {
                let mut page = self.line.page(offset, count);
                page.extend(self.groups.page(offset.saturating_sub(self.line.len()), count - page.len()));
                page
            }
            JobState::Scheduled => self.scheduled.iter().skip(skip).take(count).map(seq).collect(),
            JobState::Leased => self.leased.iter().skip(skip).take(count).map(seq).collect(),
            JobState::Dead => self.dead.iter().rev().skip(skip).take(count).map(seq).collect(),
            over => self.over[over_index(over)].iter().rev().skip(skip).take(count).map(seq).collect(),
        }
    }

    /// The first jobs in the order in which bulk ops take them: as PEEK shows them, but oldest first.
    pub fn oldest(&self, state: JobState, count: usize) -> Vec<u64> {
        let seq = |entry: &(u64, u64)| entry.1;
        match state {
            JobState::Dead => self.dead.iter().take(count).map(seq).collect(),
            over if over.is_over() => self.over[over_index(over)].iter().take(count).map(seq).collect(),
            waiting => self.page(waiting, 0, count),
        }
    }

    /// How many jobs can be leased.
    pub fn leasable(&self) -> u64 {
        let ready = if self.is_paused { 0 } else { self.line.len() };
        match &self.share {
            Some(share) => ready.min(share.allowance(self.leased.len() as u64)),
            None => ready,
        }
    }

    /// How many more jobs may wait.
    pub fn room(&self) -> u64 {
        let most = self.share.as_ref().and_then(|share| share.limits.waiting);
        let waiting = self.count(JobState::Ready) + self.count(JobState::Scheduled);
        most.map_or(u64::MAX, |most| most.saturating_sub(waiting))
    }

    /// When the next thing falls due.
    pub fn due_at(&self) -> Option<UnixMs> {
        let heads = [self.leased.first(), self.scheduled.first(), self.expiring.first()];
        heads.into_iter().flatten().map(|(at, _)| *at).chain(self.sessions.first_end()).min()
    }

    pub fn stats(&self) -> Stats {
        let totals = &self.totals;
        Stats {
            ready: self.count(JobState::Ready),
            scheduled: self.count(JobState::Scheduled),
            leased: self.count(JobState::Leased),
            dead: self.count(JobState::Dead),
            completed_kept: self.count(JobState::Completed),
            cancelled_kept: self.count(JobState::Cancelled),
            expired_kept: self.count(JobState::Expired),
            enqueued: totals.enqueued,
            delivered: totals.delivered,
            completed: totals.completed,
            failed: totals.failed,
            lapsed: totals.lapsed,
            released: totals.released,
            died: totals.died,
            redriven: totals.redriven,
            cancelled: totals.cancelled,
            expired: totals.expired,
            paused: self.is_paused,
            keeps_limits: self.share.as_ref().is_some_and(|share| !share.ledger.is_empty()),
            oldest_ready_at: None,
            now: 0,
        }
    }
}

fn over_index(state: JobState) -> usize {
    match state {
        JobState::Completed => 0,
        JobState::Cancelled => 1,
        _ => 2,
    }
}
