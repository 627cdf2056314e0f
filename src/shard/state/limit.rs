//! This shard's share of a queue's limits, what is used of it, and the ledger of all shares where the queue is at home.
//!
//! Starts are remembered for as long as the rate's window, in at most [`STEPS`] steps: a start counts until the end of its
//! step has left the window, so that no window ever holds more than the share, and what is free is known at most a step late.

use std::collections::VecDeque;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::job::{NUMBER_MAX, broken};
use crate::clock::{Millis, UnixMs};
use crate::error::Result;
use crate::shard::{QueueLimits, RATE_STEPS, Rate};

/// What no share says.
const NONE: u64 = u64::MAX;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// By which change of the ledger the share was given.
    pub version: u64,
    pub limits: QueueLimits,
    /// Counts the changes of the ledger; 0 where there never was one.
    pub ledger_version: u64,
    pub ledger: Bytes,
    /// (last moment of a step, jobs started in it), oldest first.
    starts: VecDeque<(UnixMs, u64)>,
    pub started: u64,
    /// Something has changed since the row was last written.
    pub is_dirty: bool,
}

impl Share {
    /// Forgets the starts that have left the window.
    pub fn slide(&mut self, now: UnixMs) {
        let per_ms = self.limits.rate.map_or(0, |rate| rate.per_ms);
        while let Some((last, jobs)) = self.starts.front().copied()
            && last + per_ms <= now
        {
            self.starts.pop_front();
            self.started -= jobs;
            self.is_dirty = true;
        }
    }

    /// How many more may be leased.
    pub fn allowance(&self, leased: u64) -> u64 {
        let concurrency = self.limits.concurrency.map_or(u64::MAX, |most| most.saturating_sub(leased));
        let rate = self.limits.rate.map_or(u64::MAX, |rate| rate.jobs.saturating_sub(self.started));
        concurrency.min(rate)
    }

    pub fn start(&mut self, now: UnixMs, jobs: u64) {
        let Some(rate) = self.limits.rate.filter(|_| jobs > 0) else { return };
        let step = rate.per_ms.div_ceil(RATE_STEPS);
        let last = now - now % step + step - 1;
        match self.starts.back_mut() {
            Some((known, count)) if *known >= last => *count += jobs,
            _ => self.starts.push_back((last, jobs)),
        }
        self.started += jobs;
        self.is_dirty = true;
    }

    /// When the rate lets more start, where it is what keeps them back.
    pub fn opens_at(&self) -> Option<UnixMs> {
        let rate = self.limits.rate.filter(|rate| rate.jobs > 0 && rate.jobs <= self.started)?;
        self.starts.front().map(|(last, _)| last + rate.per_ms)
    }

    /// Takes a share unless a newer one is there.
    pub fn share(&mut self, version: u64, limits: QueueLimits) {
        if version >= self.version {
            (self.version, self.limits, self.is_dirty) = (version, limits, true);
            if limits.rate.is_none() {
                self.starts.clear();
                self.started = 0;
            }
        }
    }

    /// Takes the next ledger, unless another came first.
    pub fn note(&mut self, was: u64, ledger: &Bytes) {
        if was == self.ledger_version {
            self.ledger_version += 1;
            self.ledger = Bytes::copy_from_slice(ledger);
            self.is_dirty = true;
        }
    }

    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(64 + self.ledger.len() + 12 * self.starts.len());
        let QueueLimits { concurrency, rate, waiting } = self.limits;
        for number in [
            self.version,
            concurrency.unwrap_or(NONE),
            rate.map_or(NONE, |rate| rate.jobs),
            rate.map_or(0, |rate| rate.per_ms),
            waiting.unwrap_or(NONE),
            self.ledger_version,
            self.ledger.len() as u64,
        ] {
            out.put_u64(number);
        }
        out.put_slice(&self.ledger);
        for (last, jobs) in &self.starts {
            out.put_uint((*last).min(NUMBER_MAX), 6);
            out.put_uint((*jobs).min(NUMBER_MAX), 6);
        }
        out.freeze()
    }

    pub fn decode(row: Bytes) -> Result<Share> {
        Share::read(row).ok_or_else(|| broken("the limits of a queue cannot be read"))
    }

    fn read(mut row: Bytes) -> Option<Share> {
        let mut number = || row.try_get_u64().ok();
        let version = number()?;
        let mut share = || number().map(|number| Some(number).filter(|number| *number != NONE));
        let (concurrency, jobs) = (share()?, share()?);
        let per_ms: Millis = number()?;
        let waiting = Some(number()?).filter(|number| *number != NONE);
        let (ledger_version, len) = (number()?, number()? as usize);
        let ledger = (row.len() >= len).then(|| row.split_to(len))?;
        let mut starts = VecDeque::new();
        while row.has_remaining() {
            starts.push_back((row.try_get_uint(6).ok()?, row.try_get_uint(6).ok()?));
        }
        let started = starts.iter().map(|(_, jobs)| *jobs).sum();
        let rate = jobs.map(|jobs| Rate { jobs, per_ms });
        let limits = QueueLimits { concurrency, rate, waiting };
        Some(Share { version, limits, ledger_version, ledger, starts, started, is_dirty: false })
    }
}
