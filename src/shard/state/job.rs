//! One job as the rules hold it: a header in memory, a detail that stays in its row unless the job is leased, and the
//! record that never changes.
//!
//! The row of a job is its header and its detail, big-endian, numbers of 6 bytes where they are times, places and tokens.
//! Whoever changes the layout raises the format of the embedded store.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::sync::Arc;

use super::group::Member;
use crate::clock::UnixMs;
use crate::error::{Error, Happened, Result};
use crate::job::{JobState, JobView, Spec, flag};

/// Points in time, places and tokens are below this: 6 bytes of a row.
pub const NUMBER_MAX: u64 = (1 << 48) - 1;
/// Digits of the enqueue time before the record.
const TIME_DIGITS: usize = 13;
/// Among the flags of a job with a group: it has a turn.
const TURN: u8 = 64;
/// The fixed part of a row.
const HEADER_BYTES: usize = 38;

/// What ended the last lease of a job that nothing has happened to since, and the answer to that verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    Nothing,
    Acked,
    Failed(JobState),
    Released(JobState),
    Lapsed,
}

/// What is known of a job without reading a row.
#[derive(Clone, Debug)]
pub struct Job {
    pub state: JobState,
    pub last: Last,
    /// Flags of the record: which keys the job has. And [`TURN`].
    pub flags: u8,
    /// Its group; not in the row, but in the record.
    pub member: Option<Arc<Member>>,
    /// The row holds nothing but this header.
    pub is_bare: bool,
    pub priority: i16,
    pub spent: u32,
    pub lapses: u32,
    /// The place in line; of a job that is over its place among those that are over.
    pub place: u64,
    /// The token of the lease that is, or was the last.
    pub token: u64,
    /// The due time, the end of the lease, when the job was over or died, or since when it is ready again; 0 when it was
    /// ready from the beginning, or has the place that it had.
    pub at: UnixMs,
    /// When the ttl is over; 0 is never.
    pub expires_at: UnixMs,
    /// In memory while the job is leased and while it changes; else in the row.
    pub detail: Option<Box<Detail>>,
}

/// What only those want to know who look at the job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Detail {
    /// 0: it was never leased.
    pub started_at: UnixMs,
    pub redrives: u32,
    pub progress: Option<u8>,
    pub worker: Bytes,
    pub error: Bytes,
    pub trace: Bytes,
    pub progress_text: Bytes,
    pub result: Bytes,
    /// What happened to the job, as `shard/event.rs` writes it.
    pub history: BytesMut,
}

/// What an enqueue said, and when.
pub struct Record {
    pub enqueued_at: UnixMs,
    pub spec: Spec,
}

/// The error of a row that is missing or cannot be read.
pub fn broken(what: &str) -> Error {
    Error::shard_down("the store", &format!("is damaged: {what}"), Happened::No)
}

impl Record {
    pub fn encode(enqueued_at: UnixMs, spec: &Spec) -> Bytes {
        let mut out = BytesMut::with_capacity(TIME_DIGITS + spec.encoded_len_bound());
        out.put_slice(format!("{enqueued_at:013}").as_bytes());
        spec.encode_into(&mut out);
        out.freeze()
    }

    pub fn decode(row: &Bytes) -> Result<Record> {
        let read = || {
            let digits = std::str::from_utf8(row.get(..TIME_DIGITS)?).ok()?;
            Some(Record { enqueued_at: digits.parse().ok()?, spec: Spec::decode(&row.slice(TIME_DIGITS..))? })
        };
        read().ok_or_else(|| broken("the record of a job cannot be read"))
    }

    /// The group that the job is of.
    pub fn member(&self) -> Option<Arc<Member>> {
        let (key, bound) = self.spec.policy.group.as_ref()?;
        // A copy: the key may be a part of a large request or row.
        Some(Arc::new(Member { key: Bytes::copy_from_slice(key), bound: *bound }))
    }

    pub fn expires_at(&self) -> UnixMs {
        match self.spec.policy.ttl {
            0 => 0,
            ttl => self.enqueued_at.saturating_add(ttl).min(NUMBER_MAX),
        }
    }
}

impl Job {
    /// A job as its enqueue left it.
    pub fn new(seq: u64, record: &Record) -> Job {
        let policy = &record.spec.policy;
        let bit = |is_there: bool, bit: u8| if is_there { bit } else { 0 };
        Job {
            state: JobState::Ready,
            last: Last::Nothing,
            flags: bit(policy.id.is_some(), flag::ID)
                | bit(policy.unique.is_some(), flag::UNIQUE)
                | bit(policy.group.is_some(), flag::GROUP),
            member: record.member(),
            is_bare: true,
            priority: policy.priority,
            spent: 0,
            lapses: 0,
            place: seq,
            token: 0,
            at: 0,
            expires_at: record.expires_at(),
            detail: None,
        }
    }

    pub fn is_expired(&self, now: UnixMs) -> bool {
        self.expires_at != 0 && self.expires_at <= now
    }

    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    pub fn has_turn(&self) -> bool {
        self.has(TURN)
    }

    pub fn set_turn(&mut self, has_turn: bool) {
        self.flags = if has_turn { self.flags | TURN } else { self.flags & !TURN };
    }

    /// Ready, and not in the line because its group has no turn for it.
    pub fn is_blocked(&self) -> bool {
        self.state == JobState::Ready && self.has(flag::GROUP) && !self.has_turn()
    }

    /// The detail, which whoever takes the job has read from its row.
    pub fn detail_mut(&mut self) -> &mut Detail {
        self.detail.get_or_insert_default()
    }

    pub fn encode(&self) -> Bytes {
        let detail = self.detail.as_deref().filter(|detail| **detail != Detail::default());
        let texts = detail.map_or([&[][..]; 6], Detail::texts);
        let mut out = BytesMut::with_capacity(HEADER_BYTES + 35 + texts.iter().map(|text| text.len()).sum::<usize>());
        out.put_slice(&self.encode_header());
        if let Some(detail) = detail {
            out.put_uint(detail.started_at, 6);
            out.put_u32(detail.redrives);
            out.put_u8(detail.progress.unwrap_or(u8::MAX));
            for text in texts {
                out.put_u32(text.len() as u32);
                out.put_slice(text);
            }
        }
        out.freeze()
    }

    pub fn encode_header(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        let mut out = &mut header[..];
        let (last, answer) = match self.last {
            Last::Nothing => (0, JobState::Ready),
            Last::Acked => (1, JobState::Completed),
            Last::Failed(state) => (2, state),
            Last::Released(state) => (3, state),
            Last::Lapsed => (4, JobState::Ready),
        };
        out.put_slice(&[self.state as u8, last, answer as u8, self.flags]);
        out.put_i16(self.priority);
        out.put_u32(self.spent);
        out.put_u32(self.lapses);
        for number in [self.place, self.token, self.at, self.expires_at] {
            out.put_uint(number.min(NUMBER_MAX), 6);
        }
        header
    }

    /// Reads the header of a row; the detail stays there.
    pub fn decode(row: &Bytes) -> Result<Job> {
        Job::read(row).ok_or_else(|| broken("the state of a job cannot be read"))
    }

    fn read(row: &Bytes) -> Option<Job> {
        let mut rest = row.get(..HEADER_BYTES)?;
        let state = *JobState::ALL.get(usize::from(rest.get_u8()))?;
        let last = rest.get_u8();
        let answer = *JobState::ALL.get(usize::from(rest.get_u8()))?;
        let last = match last {
            0 => Last::Nothing,
            1 => Last::Acked,
            2 => Last::Failed(answer),
            3 => Last::Released(answer),
            4 => Last::Lapsed,
            _ => return None,
        };
        Some(Job {
            state,
            last,
            flags: rest.get_u8(),
            member: None,
            is_bare: row.len() == HEADER_BYTES,
            priority: rest.get_i16(),
            spent: rest.get_u32(),
            lapses: rest.get_u32(),
            place: rest.get_uint(6),
            token: rest.get_uint(6),
            at: rest.get_uint(6),
            expires_at: rest.get_uint(6),
            detail: None,
        })
    }

    pub fn view(&self, seq: u64, record: Record, detail: Detail) -> JobView {
        let at_in = |is_in: bool| is_in.then_some(self.at);
        JobView {
            seq,
            spec: record.spec,
            state: self.state,
            enqueued_at: record.enqueued_at,
            attempt: self.spent.saturating_add(1),
            lapses: self.lapses,
            redrives: detail.redrives,
            due_at: at_in(self.state == JobState::Scheduled),
            lease_until: at_in(self.state == JobState::Leased),
            started_at: Some(detail.started_at).filter(|at| *at != 0),
            finished_at: at_in(self.state.is_over() || self.state == JobState::Dead),
            worker: detail.worker,
            error: detail.error,
            trace: detail.trace,
            result: detail.result,
            progress: detail.progress,
            progress_text: detail.progress_text,
        }
    }
}

impl Detail {
    fn texts(&self) -> [&[u8]; 6] {
        [&self.worker, &self.error, &self.trace, &self.progress_text, &self.result, &self.history]
    }

    /// Reads the detail of a row.
    pub fn decode(row: &Bytes) -> Result<Detail> {
        Detail::read(row).ok_or_else(|| broken("the detail of a job cannot be read"))
    }

    fn read(row: &Bytes) -> Option<Detail> {
        if row.len() == HEADER_BYTES {
            return Some(Detail::default());
        }
        let mut rest = row.get(HEADER_BYTES..).map(|tail| row.slice_ref(tail))?;
        if rest.len() < 11 {
            return None;
        }
        let started_at = rest.get_uint(6);
        let redrives = rest.get_u32();
        let progress = Some(rest.get_u8()).filter(|percent| *percent != u8::MAX);
        let mut text = || {
            let len = (rest.len() >= 4).then(|| rest.get_u32() as usize)?;
            (rest.len() >= len).then(|| rest.split_to(len))
        };
        Some(Detail {
            started_at,
            redrives,
            progress,
            worker: text()?,
            error: text()?,
            trace: text()?,
            progress_text: text()?,
            result: text()?,
            history: BytesMut::from(&text()?[..]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Job {
        let spec = Spec { policy: Default::default(), payload: Bytes::new() };
        Job::new(7, &Record { enqueued_at: 1_000, spec })
    }

    #[test]
    fn a_row_is_read_back_as_it_was() {
        let mut job = job();
        (job.state, job.last, job.token, job.at) =
            (JobState::Dead, Last::Failed(JobState::Dead), NUMBER_MAX, 9_999_999_999_999);
        let detail =
            Detail { started_at: 5, progress: Some(0), error: "e".into(), result: "r".into(), ..Detail::default() };
        job.detail = Some(Box::new(detail.clone()));
        let row = job.encode();
        let read = Job::decode(&row).unwrap();
        assert_eq!((read.state, read.last, read.token, read.at), (job.state, job.last, job.token, job.at));
        assert_eq!((read.place, read.priority, read.is_bare), (7, 0, false));
        assert_eq!(Detail::decode(&row).unwrap(), detail);
    }

    #[test]
    fn a_bare_row_is_its_header_and_a_short_one_is_refused() {
        let row = job().encode();
        assert_eq!(row.len(), HEADER_BYTES);
        assert!(Job::decode(&row).unwrap().is_bare);
        assert_eq!(Detail::decode(&row).unwrap(), Detail::default());
        assert!(Job::decode(&row.slice(1..)).is_err());
        assert!(Detail::decode(&Bytes::from_static(&[0; HEADER_BYTES + 3])).is_err());
    }
}
