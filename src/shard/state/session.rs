//! The worker sessions of one queue: who keeps each, until when, and which leases hang on it.
//!
//! What is renewed is the session's end alone, so keeping leases alive costs nothing for each of them. A job knows nothing
//! of its session: [`Turn::loosen`] takes it out when its state changes. A session that has nothing left stays until its
//! next KEEP or its end.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use foldhash::fast::RandomState;

use super::job::{Job, NUMBER_MAX, broken};
use super::rows::{Key, Rows};
use super::turn::{Cause, To, Turn};
use crate::clock::{Millis, UnixMs};
use crate::error::Result;
use crate::job::{JobState, Lease};
use crate::shard::{Outcome, PAGE_JOBS_MAX, Party, SESSION_LEASES_SEEN, SessionView};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Session {
    /// 0: it was never given one, so nothing hangs on it.
    number: u64,
    since: UnixMs,
    until: UnixMs,
    /// Who keeps it, and until when.
    keepers: Vec<(u64, UnixMs)>,
}

/// All sessions of a queue.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Sessions {
    by_name: HashMap<Bytes, Session, RandomState>,
    ends: BTreeSet<(UnixMs, Bytes)>,
    /// The number of the session that a job hangs on.
    of_job: HashMap<u64, u64, RandomState>,
    /// The same the other way round.
    jobs: HashMap<u64, BTreeSet<u64>, RandomState>,
}

impl Sessions {
    /// Takes in what a row tells of a session.
    pub fn load(&mut self, name: Bytes, row: Bytes) -> Result<()> {
        let session = Session::decode(row).ok_or_else(|| broken("a worker session cannot be read"))?;
        self.ends.insert((session.until, name.clone()));
        self.by_name.insert(name, session);
        Ok(())
    }

    /// Takes in what a row tells of a lease.
    pub fn load_lease(&mut self, seq: u64, mut row: Bytes) -> Result<()> {
        let number = row.try_get_u64().map_err(|_| broken("the session of a lease cannot be read"))?;
        self.bind(seq, number);
        Ok(())
    }

    pub fn first_end(&self) -> Option<UnixMs> {
        self.ends.first().map(|(end, _)| *end)
    }

    fn bind(&mut self, seq: u64, number: u64) {
        self.loosen(seq);
        self.of_job.insert(seq, number);
        self.jobs.entry(number).or_default().insert(seq);
    }

    fn loosen(&mut self, seq: u64) -> bool {
        let number = if self.of_job.is_empty() { None } else { self.of_job.remove(&seq) };
        let Some(Entry::Occupied(mut jobs)) = number.map(|number| self.jobs.entry(number)) else { return false };
        jobs.get_mut().remove(&seq);
        if jobs.get().is_empty() {
            jobs.remove();
        }
        true
    }

    fn jobs_of(&self, number: u64) -> impl Iterator<Item = u64> {
        self.jobs.get(&number).into_iter().flatten().copied()
    }

    fn count(&self, number: u64) -> u64 {
        self.jobs.get(&number).map_or(0, |jobs| jobs.len() as u64)
    }

    fn remove(&mut self, name: &Bytes) -> Option<Session> {
        let session = self.by_name.remove(name)?;
        self.ends.remove(&(session.until, name.clone()));
        Some(session)
    }
}

impl Session {
    /// Moves the end of one keeper's part. Who keeps nothing any more is forgotten.
    fn keep(&mut self, keeper: u64, until: UnixMs, now: UnixMs) {
        self.keepers.retain(|(known, until)| *known != keeper && *until > now);
        if until > now {
            self.keepers.push((keeper, until));
        }
        self.until = self.keepers.iter().map(|(_, until)| *until).max().unwrap_or(now);
    }

    fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(24 + 16 * self.keepers.len());
        for number in [self.number, self.since, self.until] {
            out.put_u64(number);
        }
        for (keeper, until) in &self.keepers {
            out.put_u64(*keeper);
            out.put_u64(*until);
        }
        out.freeze()
    }

    fn decode(mut row: Bytes) -> Option<Session> {
        let mut next = || row.try_get_u64().ok();
        let mut session = Session { number: next()?, since: next()?, until: next()?, keepers: Vec::new() };
        while let Some(keeper) = next() {
            session.keepers.push((keeper, next()?));
        }
        Some(session)
    }
}

impl<R: Rows> Turn<'_, R> {
    pub fn keep(&mut self, keeper: u64, keep_ms: Millis, parties: Vec<Party>) -> Result<Outcome> {
        let until = self.now.saturating_add(keep_ms).min(NUMBER_MAX);
        let mut kept = Vec::with_capacity(parties.len());
        for Party { session: name, run_ms, leases } in parties {
            // A copy: what is kept must not hold the request's memory.
            let name = Bytes::copy_from_slice(&name);
            let mut session = self.queue.sessions.remove(&name).unwrap_or_default();
            session.keep(keeper, until, self.now);
            for lease in leases {
                self.hang(&mut session, lease, run_ms)?;
            }
            let count = self.queue.sessions.count(session.number);
            kept.push(count);
            match count {
                0 => self.rows.delete(Key::Session(self.queue.number, name)),
                _ => {
                    self.rows.put(Key::Session(self.queue.number, name.clone()), session.encode());
                    self.queue.sessions.ends.insert((session.until, name.clone()));
                    self.queue.sessions.by_name.insert(name, session);
                }
            }
        }
        Ok(Outcome::Kept(kept))
    }

    /// Hangs a lease on a session, if it holds its job.
    fn hang(&mut self, session: &mut Session, lease: Lease, run_ms: Millis) -> Result<()> {
        let holds = |job: &&Job| job.state == JobState::Leased && job.token == lease.token;
        if self.queue.jobs.get(&lease.seq).filter(holds).is_none() {
            return Ok(());
        }
        if session.number == 0 {
            (session.number, session.since) = (self.queue.next(), self.now);
            self.queue.is_dirty = true;
        }
        self.queue.sessions.bind(lease.seq, session.number);
        self.rows.put(Key::Bound(self.queue.number, lease.seq), Bytes::copy_from_slice(&session.number.to_be_bytes()));
        let mut job = self.known(lease.seq)?;
        let until = job.detail_mut().started_at.saturating_add(run_ms).min(NUMBER_MAX);
        self.queue.leave(lease.seq, &job);
        job.at = job.at.max(until);
        self.queue.enter(lease.seq, &job);
        self.put(lease.seq, job);
        Ok(())
    }

    /// Takes a lease that ends out of its session.
    pub fn loosen(&mut self, seq: u64) {
        if self.queue.sessions.loosen(seq) {
            self.rows.delete(Key::Bound(self.queue.number, seq));
        }
    }

    /// Gives back what ended sessions held.
    pub fn end_sessions(&mut self, room: &mut usize) -> Result<()> {
        while *room > 0
            && let Some((_, name)) = self.queue.sessions.ends.first().filter(|(end, _)| *end <= self.now).cloned()
        {
            let number = self.queue.sessions.by_name.get(&name).map_or(0, |session| session.number);
            let seqs: Vec<u64> = self.queue.sessions.jobs_of(number).take(*room).collect();
            *room -= seqs.len();
            for seq in seqs {
                let job = self.known(seq)?;
                self.transition(seq, job, Cause::Ended, To::OldPlace)?;
            }
            if *room > 0 {
                *room -= 1;
                self.queue.sessions.remove(&name);
                self.rows.delete(Key::Session(self.queue.number, name));
            }
        }
        Ok(())
    }

    pub fn sessions(&self, offset: u64, count: u64) -> Result<Outcome> {
        let sessions = &self.queue.sessions;
        let count = usize::try_from(count).unwrap_or(usize::MAX).min(PAGE_JOBS_MAX);
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut views = Vec::new();
        for (until, name) in sessions.ends.iter().skip(offset).take(count) {
            let Some(session) = sessions.by_name.get(name) else { continue };
            let mut oldest_at = None;
            for seq in sessions.jobs_of(session.number).take(SESSION_LEASES_SEEN) {
                let started_at = self.view(seq)?.and_then(|job| job.started_at);
                oldest_at = oldest_at.into_iter().chain(started_at).min();
            }
            views.push(SessionView {
                session: name.clone(),
                since: session.since,
                until: *until,
                keepers: session.keepers.iter().filter(|(_, until)| *until > self.now).count() as u64,
                leased: sessions.count(session.number),
                oldest_at,
            });
        }
        Ok(Outcome::Sessions(self.now, views))
    }
}
