//! The nouns of a job: its queue's name, its id, its receipt, its states, and the part of it that never changes.
//!
//! A job is named inside its queue and shard by a *seq*, a number that the shard hands out. On the wire a generated id
//! is `<seq in base 36>~<shard>` and a receipt is `<seq>.<token>~<shard>`, so that any proxy routes either without
//! asking. An id that a client chose is that text; it may not have the shape of a generated one.
//!
//! [`Spec`] is what an `ENQUEUE` says and nothing ever changes: one encoded record ([`Spec::encode`]) that the embedded
//! store and Redis both keep as it is. The Redis scripts read the record's text head; whoever changes the layout
//! changes `shard/redis/*.lua` with it.

use bytes::{BufMut, Bytes, BytesMut};
use std::fmt;
use std::sync::Arc;

use crate::clock::{Millis, UnixMs};
use crate::error::{Code, Error, Result};

/// Longest name of a queue, lock or semaphore, in bytes.
pub const NAME_BYTES_MAX: usize = 128;
/// Longest id, unique key, group key or worker name that a client may choose, in bytes.
pub const KEY_BYTES_MAX: usize = 512;
/// Longest type name, in bytes.
pub const TYPE_BYTES_MAX: usize = 128;
/// Most metadata fields of one job, and the bytes that all of them may have together.
pub const META_FIELDS_MAX: usize = 64;
pub const META_BYTES_MAX: usize = 16 * 1024;
/// Longest error, trace or result text that is kept, in bytes; what is longer is cut there.
pub const TEXT_BYTES_MAX: usize = 16 * 1024;
/// Priorities go from `-PRIORITY_MAX` to `PRIORITY_MAX`.
pub const PRIORITY_MAX: i16 = 1000;
/// A place in line is below this, so that `-priority * PLACE_MAX + place` is exact in a double.
pub const PLACE_MAX: u64 = 1 << 42;

/// The name of a queue, lock or semaphore: 1 to 128 bytes of `A-Z a-z 0-9 . _ : / @ -`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Arc<str>);

impl Name {
    pub fn parse(raw: &[u8]) -> Result<Name> {
        let allowed = |b: &u8| b.is_ascii_alphanumeric() || b"._:/@-".contains(b);
        if raw.is_empty() || raw.len() > NAME_BYTES_MAX || !raw.iter().all(allowed) {
            return Err(Error::bad("invalid name: expected 1 to 128 bytes of A-Z a-z 0-9 . _ : / @ -"));
        }
        match std::str::from_utf8(raw) {
            Ok(text) => Ok(Name(text.into())),
            Err(_) => Err(Error::bad("invalid name: expected ASCII")),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a job stands. The last three are over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum JobState {
    Ready,
    Scheduled,
    Leased,
    Dead,
    Completed,
    Cancelled,
    Expired,
}

impl JobState {
    pub const ALL: [JobState; 7] = [
        JobState::Ready,
        JobState::Scheduled,
        JobState::Leased,
        JobState::Dead,
        JobState::Completed,
        JobState::Cancelled,
        JobState::Expired,
    ];

    pub fn word(self) -> &'static str {
        match self {
            JobState::Ready => "ready",
            JobState::Scheduled => "scheduled",
            JobState::Leased => "leased",
            JobState::Dead => "dead",
            JobState::Completed => "completed",
            JobState::Cancelled => "cancelled",
            JobState::Expired => "expired",
        }
    }

    pub fn parse(raw: &[u8]) -> Option<JobState> {
        Self::ALL.into_iter().find(|state| raw.eq_ignore_ascii_case(state.word().as_bytes()))
    }

    pub fn is_over(self) -> bool {
        matches!(self, JobState::Completed | JobState::Cancelled | JobState::Expired)
    }
}

/// How one shard knows a job: by its number, or by the id that its client chose.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum JobRef {
    Seq(u64),
    Chosen(Bytes),
}

/// One lease of one job. `token` is random, below 2^48, and made by the proxy that asks for the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    pub seq: u64,
    pub token: u64,
}

/// Tokens are below this: exact in a double, and too many to guess.
pub const TOKEN_MAX: u64 = 1 << 48;

/// Splits `<text>~<shard>`; `None` when it has not the shape of a generated id or receipt.
fn split_shard(raw: &[u8]) -> Option<(&str, &str)> {
    let text = std::str::from_utf8(raw).ok()?;
    let (left, shard) = text.split_once('~')?;
    (!left.is_empty() && is_shard_name(shard)).then_some((left, shard))
}

/// Shard names: 1 to 48 bytes of `A-Z a-z 0-9 . _ / -`.
pub fn is_shard_name(text: &str) -> bool {
    !text.is_empty() && text.len() <= 48 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._/-".contains(&b))
}

fn parse_base36(text: &str, below: u64) -> Option<u64> {
    let plain = (1..=12).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_lowercase());
    if !plain || (text.len() > 1 && text.starts_with('0')) {
        return None;
    }
    u64::from_str_radix(text, 36).ok().filter(|n| *n < below)
}

fn put_base36(out: &mut impl BufMut, mut number: u64) {
    let mut digits = [0u8; 13];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b"0123456789abcdefghijklmnopqrstuvwxyz"[(number % 36) as usize];
        number /= 36;
        if number == 0 {
            break;
        }
    }
    out.put_slice(&digits[at..]);
}

/// The wire text of a generated id.
pub fn format_id(out: &mut impl BufMut, seq: u64, shard: &str) {
    put_base36(out, seq);
    out.put_u8(b'~');
    out.put_slice(shard.as_bytes());
}

/// The wire text of a receipt.
pub fn format_receipt(out: &mut impl BufMut, lease: Lease, shard: &str) {
    put_base36(out, lease.seq);
    out.put_u8(b'.');
    put_base36(out, lease.token);
    out.put_u8(b'~');
    out.put_slice(shard.as_bytes());
}

/// Reads an id from the wire: the job, and the shard that a generated id names.
pub fn parse_id(raw: &[u8]) -> Result<(JobRef, Option<&str>)> {
    if let Some((left, shard)) = split_shard(raw)
        && let Some(seq) = parse_base36(left, PLACE_MAX)
    {
        return Ok((JobRef::Seq(seq), Some(shard)));
    }
    check_key(raw, "id").map(|()| (JobRef::Chosen(Bytes::copy_from_slice(raw)), None))
}

/// The text whose ring owner all jobs of a group of a queue are placed on. No queue's name holds the byte between.
pub fn group_home(queue: &Name, group: &[u8]) -> Vec<u8> {
    [queue.as_str().as_bytes(), b"\0", group].concat()
}

/// Checks an id that a client chooses for a new job.
pub fn parse_chosen_id(raw: &[u8]) -> Result<Bytes> {
    match parse_id(raw)? {
        (JobRef::Chosen(id), _) => Ok(id),
        (JobRef::Seq(_), _) => Err(Error::bad("invalid ID: it has the shape of a generated id, <base36>~<shard>")),
    }
}

/// Reads a receipt from the wire: the lease, and the shard that it names.
pub fn parse_receipt(raw: &[u8]) -> Result<(Lease, &str)> {
    let parsed = split_shard(raw).and_then(|(left, shard)| {
        let (seq, token) = left.split_once('.')?;
        Some((Lease { seq: parse_base36(seq, PLACE_MAX)?, token: parse_base36(token, TOKEN_MAX)? }, shard))
    });
    parsed.ok_or_else(|| Error::bad("invalid receipt: expected the receipt of a delivered job, <seq>.<token>~<shard>"))
}

/// Checks the length of a chosen id, unique key, group key or worker name; `what` names it in the error.
pub fn check_key(raw: &[u8], what: &'static str) -> Result<()> {
    match raw.len() {
        0 => Err(Error::bad(format!("invalid {what}: expected at least 1 byte"))),
        1..=KEY_BYTES_MAX => Ok(()),
        n => Err(Error::new(Code::TooBig, format!("{what} has {n} bytes, the limit is {KEY_BYTES_MAX}"))),
    }
}

/// What may be said of many jobs at once: everything about a job but its payload. Shared by the jobs of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Free text that the producer gives the job (`TYPE`); empty when not given.
    pub kind: Bytes,
    pub priority: i16,
    /// Deliveries that may end badly before the job is dead; at least 1.
    pub attempts: u32,
    pub backoff: Millis,
    pub backoff_max: Millis,
    /// The job expires this long after it was enqueued unless it was started; 0 is never.
    pub ttl: Millis,
    /// The id that the client chose.
    pub id: Option<Bytes>,
    /// Only one job that is neither over nor dead holds this key; the second part is how long at most, 0 without limit.
    pub unique: Option<(Bytes, Millis)>,
    /// The job is leased only while fewer jobs of this group than so many have a turn; in order when it is 1.
    pub group: Option<(Bytes, u32)>,
    pub meta: Vec<(Bytes, Bytes)>,
    /// The version of the shard map in which the homes moved last, as whoever placed the job by its `id` or `unique` knew
    /// it. No part of what is kept.
    pub homes_since: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            kind: Bytes::new(),
            priority: 0,
            attempts: 25,
            backoff: 1_000,
            backoff_max: 3_600_000,
            ttl: 0,
            id: None,
            unique: None,
            group: None,
            meta: Vec::new(),
            homes_since: 0,
        }
    }
}

impl Policy {
    /// Bytes of its texts, and what each adds to a record.
    pub fn bytes(&self) -> usize {
        let keyed = self.id.as_ref().map_or(0, Bytes::len)
            + self.unique.as_ref().map_or(0, |(key, _)| key.len())
            + self.group.as_ref().map_or(0, |(key, _)| key.len());
        let meta: usize = self.meta.iter().map(|(field, value)| field.len() + value.len() + 4).sum();
        self.kind.len() + keyed + meta
    }
}

/// The part of a job that never changes: its policy and its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    pub policy: Arc<Policy>,
    pub payload: Bytes,
}

/// Which of the optional parts a record carries; written as one letter, `@` (0x40) plus these bits.
pub mod flag {
    pub const KIND: u8 = 1;
    pub const ID: u8 = 2;
    pub const UNIQUE: u8 = 4;
    pub const GROUP: u8 = 8;
    pub const META: u8 = 16;
    pub const TTL: u8 = 32;
}

impl Spec {
    /// The record as a shard keeps it, without the 13 digits of the enqueue time that the shard puts before it:
    ///
    /// ```text
    /// record = flags priority "," attempts "," backoff "," backoff_max "," ttl "\n" tail
    /// flags  = one byte, 0x40 + flag bits          (numbers are decimal ASCII)
    /// tail   = [ID: u16 bytes] [UNIQUE: u16 bytes u64-ms] [GROUP: u16 bytes u32] [KIND: u16 bytes]
    ///          [META: u16 (u16 bytes u16 bytes)*] payload        (big-endian lengths before bytes)
    /// ```
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(self.encoded_len_bound());
        self.encode_into(&mut out);
        out.freeze()
    }

    pub fn encoded_len_bound(&self) -> usize {
        self.payload.len() + self.policy.bytes() + 96
    }

    pub fn encode_into(&self, out: &mut BytesMut) {
        let policy = &*self.policy;
        let bit = |present: bool, bit: u8| if present { bit } else { 0 };
        let flags = bit(!policy.kind.is_empty(), flag::KIND)
            | bit(policy.id.is_some(), flag::ID)
            | bit(policy.unique.is_some(), flag::UNIQUE)
            | bit(policy.group.is_some(), flag::GROUP)
            | bit(!policy.meta.is_empty(), flag::META)
            | bit(policy.ttl > 0, flag::TTL);
        out.put_u8(0x40 + flags);
        let head = format_args!(
            "{},{},{},{},{}\n",
            policy.priority, policy.attempts, policy.backoff, policy.backoff_max, policy.ttl
        );
        // Writing to a `BytesMut` cannot fail: it grows.
        let _ = fmt::Write::write_fmt(out, head);
        if let Some(id) = &policy.id {
            put_short(out, id);
        }
        if let Some((key, ms)) = &policy.unique {
            put_short(out, key);
            out.put_u64(*ms);
        }
        if let Some((key, concurrency)) = &policy.group {
            put_short(out, key);
            out.put_u32(*concurrency);
        }
        if !policy.kind.is_empty() {
            put_short(out, &policy.kind);
        }
        if !policy.meta.is_empty() {
            out.put_u16(policy.meta.len() as u16);
            for (field, value) in &policy.meta {
                put_short(out, field);
                put_short(out, value);
            }
        }
        out.put_slice(&self.payload);
    }

    /// Reads a record back; `None` when it is not one. The parts share the record's memory.
    pub fn decode(record: &Bytes) -> Option<Spec> {
        let flags = record.first()?.checked_sub(0x40)?;
        let end = memchr::memchr(b'\n', record)?;
        let mut numbers = std::str::from_utf8(&record[1..end]).ok()?.split(',');
        let mut policy = Policy {
            priority: numbers.next()?.parse().ok()?,
            attempts: numbers.next()?.parse().ok()?,
            backoff: numbers.next()?.parse().ok()?,
            backoff_max: numbers.next()?.parse().ok()?,
            ttl: numbers.next()?.parse().ok()?,
            ..Policy::default()
        };
        let mut tail = record.slice(end + 1..);
        if flags & flag::ID != 0 {
            policy.id = Some(take_short(&mut tail)?);
        }
        if flags & flag::UNIQUE != 0 {
            let key = take_short(&mut tail)?;
            policy.unique = Some((key, u64::from_be_bytes(take(&mut tail, 8)?.as_ref().try_into().ok()?)));
        }
        if flags & flag::GROUP != 0 {
            let key = take_short(&mut tail)?;
            policy.group = Some((key, u32::from_be_bytes(take(&mut tail, 4)?.as_ref().try_into().ok()?)));
        }
        if flags & flag::KIND != 0 {
            policy.kind = take_short(&mut tail)?;
        }
        if flags & flag::META != 0 {
            let count = u16::from_be_bytes(take(&mut tail, 2)?.as_ref().try_into().ok()?);
            for _ in 0..count {
                policy.meta.push((take_short(&mut tail)?, take_short(&mut tail)?));
            }
        }
        Some(Spec { policy: Arc::new(policy), payload: tail })
    }
}

fn put_short(out: &mut BytesMut, bytes: &[u8]) {
    out.put_u16(bytes.len() as u16);
    out.put_slice(bytes);
}

fn take(tail: &mut Bytes, len: usize) -> Option<Bytes> {
    (tail.len() >= len).then(|| tail.split_to(len))
}

fn take_short(tail: &mut Bytes) -> Option<Bytes> {
    let len = u16::from_be_bytes(take(tail, 2)?.as_ref().try_into().ok()?);
    take(tail, len as usize)
}

/// How long a job waits before its retry: `backoff * 2^(spent - 1)`, ten per cent up or down, at most `backoff_max`.
///
/// `spent` counts the deliveries that ended badly, from 1. The jitter comes from the lease's random token, so that
/// every shard computes the same delay from the same operation.
pub fn backoff_delay(backoff: Millis, backoff_max: Millis, spent: u32, token: u64) -> Millis {
    let doublings = spent.saturating_sub(1).min(40);
    let plain = backoff.saturating_mul(1 << doublings).min(backoff_max);
    let jittered = plain as i128 + plain as i128 * (token as i128 % 1000 - 500) / 5000;
    (jittered.max(0) as Millis).min(backoff_max)
}

/// Everything that a shard knows of one job, for `JOB`, `PEEK` and `DLQ`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobView {
    pub seq: u64,
    pub spec: Spec,
    pub state: JobState,
    pub enqueued_at: UnixMs,
    /// The number of the current delivery, or of the next one; from 1.
    pub attempt: u32,
    /// Deliveries that ended because the lease lapsed.
    pub lapses: u32,
    /// How often the job was put back from the dead letter queue.
    pub redrives: u32,
    /// When a scheduled job falls due.
    pub due_at: Option<UnixMs>,
    /// When the current lease ends.
    pub lease_until: Option<UnixMs>,
    /// When the current or the last delivery began.
    pub started_at: Option<UnixMs>,
    /// When the job was over or died.
    pub finished_at: Option<UnixMs>,
    pub worker: Bytes,
    pub error: Bytes,
    pub trace: Bytes,
    pub result: Bytes,
    pub progress: Option<u8>,
    pub progress_text: Bytes,
}

impl JobView {
    /// Ready, in no group, and nothing has ever happened to it.
    pub fn is_fresh(&self) -> bool {
        self.state == JobState::Ready
            && self.spec.policy.group.is_none()
            && self.attempt <= 1
            && (self.lapses, self.redrives, self.started_at) == (0, 0, None)
            && [&self.worker, &self.error, &self.trace, &self.progress_text].iter().all(|text| text.is_empty())
            && self.progress.is_none()
    }

    /// Until when it holds its unique key, should it still; 0 is without end. `None`: it holds none any more.
    pub fn unique_until(&self, now: UnixMs) -> Option<UnixMs> {
        let (_, span) = self.spec.policy.unique.as_ref().filter(|_| self.state != JobState::Dead)?;
        // A redrive takes the key anew, at a time that nobody has kept.
        let from = if self.redrives > 0 { now } else { self.enqueued_at };
        match span {
            0 => Some(0),
            span => Some(from.saturating_add(*span)).filter(|until| *until > now),
        }
    }
}

/// One job handed to one worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    pub lease: Lease,
    pub spec: Spec,
    pub attempt: u32,
    pub enqueued_at: UnixMs,
    pub lease_until: UnixMs,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(seq: u64, shard: &str) -> Vec<u8> {
        let mut out = Vec::new();
        format_id(&mut out, seq, shard);
        out
    }

    #[test]
    fn a_generated_id_is_read_back_and_cannot_be_chosen() {
        let id = text(123_456, "s1");
        assert_eq!(parse_id(&id), Ok((JobRef::Seq(123_456), Some("s1"))));
        assert!(parse_chosen_id(&id).is_err());
        assert_eq!(parse_chosen_id(b"user:12@example.com").as_deref(), Ok(&b"user:12@example.com"[..]));
    }

    #[test]
    fn a_receipt_is_read_back_and_nothing_else_is_one() {
        let lease = Lease { seq: 99, token: TOKEN_MAX - 1 };
        let mut out = Vec::new();
        format_receipt(&mut out, lease, "c/3");
        assert_eq!(parse_receipt(&out), Ok((lease, "c/3")));
        for bad in ["", "~", "1~s", "1.2", "1.2~", ".2~s", "01.2~s", "A.2~s", "1.2~s s", "1.zzzzzzzzzzzz~s"] {
            assert!(parse_receipt(bad.as_bytes()).is_err(), "{bad} was taken for a receipt");
        }
    }

    #[test]
    fn the_backoff_doubles_within_a_tenth_and_stops_at_its_maximum() {
        for token in [0, 499, 500, 999] {
            for (spent, plain) in [(1, 1000), (2, 2000), (5, 16_000)] {
                let delay = backoff_delay(1000, 1_000_000, spent, token);
                assert!(delay >= plain * 9 / 10 && delay <= plain * 11 / 10, "{delay} after {spent}");
            }
            assert!(backoff_delay(1000, 60_000, 1000, token) <= 60_000);
        }
        assert_eq!(backoff_delay(0, 60_000, 3, 7), 0);
    }

    proptest! {
        #[test]
        fn a_record_is_read_back_as_it_was(
            kind in proptest::collection::vec(any::<u8>(), 0..20), priority in -1000i16..=1000, ttl in 0u64..5,
            id in proptest::option::of(proptest::collection::vec(any::<u8>(), 1..20)),
            unique in proptest::option::of((proptest::collection::vec(any::<u8>(), 1..20), any::<u64>())),
            group in proptest::option::of((proptest::collection::vec(any::<u8>(), 1..20), any::<u32>())),
            meta in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..9), proptest::collection::vec(any::<u8>(), 0..9)), 0..4),
            payload in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let policy = Policy {
                kind: kind.into(), priority, ttl, id: id.map(Bytes::from),
                unique: unique.map(|(key, ms)| (key.into(), ms)), group: group.map(|(key, n)| (key.into(), n)),
                meta: meta.into_iter().map(|(field, value)| (field.into(), value.into())).collect(),
                ..Policy::default()
            };
            let spec = Spec { policy: Arc::new(policy), payload: payload.into() };
            prop_assert_eq!(Spec::decode(&spec.encode()), Some(spec));
        }

        #[test]
        fn reading_a_record_never_panics(raw in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Spec::decode(&raw.into());
        }
    }
}
