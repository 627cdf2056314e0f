//! The deaths that somebody has yet to be told of: what a group of them is, and its row, the same on every shard.
//!
//! A death must neither be forgotten nor may a flood of them fill a shard, so they are counted by kind: one row for each type and
//! [`fingerprint`] of a queue. A row counts up from its birth and never down; who tells people (a *channel*) moves its own
//! mark behind the count, so that one that fails holds up no other. A row is taken out when all have told all of it.
//!
//! ```text
//! key = length of the type (1 byte), type, fingerprint; or OTHER_DEATHS
//! row = count, last, first, born (6 bytes each)  told (2 and bytes: (2 and channel, 6)*)
//!       job (2 and bytes: "s" seq (6), or "i" and the id)  error (2 and bytes)  worker (the rest)      big-endian
//! ```
//!
//! `redis/rules.lua` reads and writes the same bytes: who changes the layout, a bound or the fingerprint changes it there.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::clock::UnixMs;
use crate::job::JobRef;

/// Most groups of a queue and shard beside that of the others.
pub const OUTBOX_GROUPS_MAX: usize = 64;
/// Most channels whose marks a group keeps; for one more the first is given up, which may be told again.
pub const OUTBOX_CHANNELS_MAX: usize = 64;
/// The key of the group for all deaths beyond the bound. No other begins like this: a type has at most 128 bytes.
pub const OTHER_DEATHS: &[u8] = b"\xff";
/// What is looked at of an error, and what is left of it in a fingerprint.
const READ_BYTES_MAX: usize = 256;
const FINGERPRINT_BYTES_MAX: usize = 100;
/// What is kept of the last death's error.
const ERROR_BYTES_MAX: usize = 512;

/// Deaths of one type and fingerprint in one queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeathGroup {
    pub key: Bytes,
    /// Which death of the queue, since its beginning, was the first of the group: no two groups have the same.
    pub born: u64,
    pub count: u64,
    pub first_at: UnixMs,
    pub last_at: UnixMs,
    /// How many of them each channel has told.
    pub told: Vec<(Bytes, u64)>,
    /// The job that died last, the error and the worker that it died of.
    pub job: JobRef,
    pub error: Bytes,
    pub worker: Bytes,
}

/// A group at a count: what was told of it, or all that it is to have when it is settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeathMark {
    pub key: Bytes,
    pub born: u64,
    pub count: u64,
}

/// What is alike in errors of one kind: the first line, with every word that holds a digit, or looks like a hexadecimal
/// number, as one `#`.
pub fn fingerprint(error: &[u8]) -> Vec<u8> {
    let read = &error[..error.len().min(READ_BYTES_MAX)];
    let line = read.split(|byte| matches!(byte, b'\r' | b'\n')).next().unwrap_or_default();
    let mut out = Vec::with_capacity(line.len());
    let mut rest = line;
    while let Some(first) = rest.first() {
        let word = rest.iter().take_while(|byte| byte.is_ascii_alphanumeric()).count();
        match rest.split_at(word.max(1)) {
            (_, after) if word == 0 => {
                out.push(*first);
                rest = after;
            }
            (word, after) => {
                if is_number(word) {
                    out.push(b'#')
                } else {
                    out.extend_from_slice(word)
                }
                rest = after;
            }
        }
    }
    out.truncate(FINGERPRINT_BYTES_MAX);
    out
}

fn is_number(word: &[u8]) -> bool {
    word.iter().any(u8::is_ascii_digit) || word.len() >= 4 && word.iter().all(u8::is_ascii_hexdigit)
}

impl DeathGroup {
    /// The key of a death's group.
    pub fn key_of(kind: &[u8], error: &[u8]) -> Bytes {
        let fingerprint = fingerprint(error);
        let mut key = BytesMut::with_capacity(1 + kind.len() + fingerprint.len());
        key.put_u8(kind.len() as u8);
        key.put_slice(kind);
        key.put_slice(&fingerprint);
        key.freeze()
    }

    /// The type of the jobs and the fingerprint of the errors; `None` for the others.
    pub fn parts(&self) -> Option<(&[u8], &[u8])> {
        let (len, rest) = self.key.split_first().filter(|_| self.key != OTHER_DEATHS)?;
        rest.split_at_checked(usize::from(*len))
    }

    pub fn told_on(&self, channel: &[u8]) -> u64 {
        self.told.iter().find(|(known, _)| *known == channel).map_or(0, |(_, told)| *told)
    }

    pub fn mark(&self) -> DeathMark {
        DeathMark { key: self.key.clone(), born: self.born, count: self.count }
    }

    /// One more death.
    pub(super) fn add(&mut self, now: UnixMs, job: JobRef, error: &[u8], worker: &Bytes) {
        self.count += 1;
        self.last_at = now;
        self.job = job;
        // Copies: what is kept must not hold the request's memory.
        self.error = Bytes::copy_from_slice(&error[..error.len().min(ERROR_BYTES_MAX)]);
        self.worker = Bytes::copy_from_slice(worker);
    }

    /// A group without a death yet.
    pub(super) fn new(key: Bytes, born: u64, now: UnixMs) -> DeathGroup {
        let (error, worker) = (Bytes::new(), Bytes::new());
        let job = JobRef::Seq(0);
        DeathGroup { key, born, count: 0, first_at: now, last_at: now, told: Vec::new(), job, error, worker }
    }

    /// So many were told on a channel; whether that is news.
    pub(super) fn tell(&mut self, channel: &Bytes, mark: &DeathMark) -> bool {
        let upto = mark.count.min(self.count);
        if self.born != mark.born || upto <= self.told_on(channel) {
            return false;
        }
        match self.told.iter_mut().find(|(known, _)| known == channel) {
            Some((_, told)) => *told = upto,
            None => {
                if self.told.len() >= OUTBOX_CHANNELS_MAX {
                    self.told.remove(0);
                }
                self.told.push((Bytes::copy_from_slice(channel), upto));
            }
        }
        true
    }

    pub(super) fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(64 + self.error.len() + self.worker.len());
        [self.count, self.last_at, self.first_at, self.born].iter().for_each(|number| out.put_uint(*number, 6));
        let told: usize = self.told.iter().map(|(channel, _)| channel.len() + 8).sum();
        out.put_u16(told as u16);
        for (channel, told) in &self.told {
            put_short(&mut out, channel);
            out.put_uint(*told, 6);
        }
        match &self.job {
            JobRef::Seq(seq) => {
                out.put_u16(7);
                out.put_u8(b's');
                out.put_uint(*seq, 6);
            }
            JobRef::Chosen(id) => {
                out.put_u16(id.len() as u16 + 1);
                out.put_u8(b'i');
                out.put_slice(id);
            }
        }
        put_short(&mut out, &self.error);
        out.put_slice(&self.worker);
        out.freeze()
    }

    /// Reads a row back; `None` when it is not one.
    pub(super) fn decode(key: Bytes, mut row: Bytes) -> Option<DeathGroup> {
        let mut number = || row.try_get_uint(6).ok();
        let (count, last_at, first_at, born) = (number()?, number()?, number()?, number()?);
        let mut told_bytes = take_short(&mut row)?;
        let mut told = Vec::new();
        while !told_bytes.is_empty() {
            told.push((take_short(&mut told_bytes)?, told_bytes.try_get_uint(6).ok()?));
        }
        let mut job = take_short(&mut row)?;
        let job = match job.try_get_u8().ok()? {
            b's' => JobRef::Seq(job.try_get_uint(6).ok()?),
            b'i' => JobRef::Chosen(job),
            _ => return None,
        };
        Some(DeathGroup { key, born, count, first_at, last_at, told, job, error: take_short(&mut row)?, worker: row })
    }
}

fn put_short(out: &mut BytesMut, bytes: &[u8]) {
    out.put_u16(bytes.len() as u16);
    out.put_slice(bytes);
}

fn take_short(row: &mut Bytes) -> Option<Bytes> {
    let len = row.try_get_u16().ok()? as usize;
    (row.len() >= len).then(|| row.split_to(len))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_one_kind_have_one_fingerprint() {
        let print = |error: &str| String::from_utf8(fingerprint(error.as_bytes())).unwrap();
        assert_eq!(print("timeout after 30s"), "timeout after #");
        assert_eq!(print("10.0.0.1:5432 refused"), "#.#.#.#:# refused");
        assert_eq!(print("no job 550e8400-e29b-41d4-a716-446655440000"), "no job #-#-#-#-#");
        assert_eq!(print("at 0x7ffe, commit deadbeef\nline 2"), "at #, commit #");
        assert_eq!(print("an ace bad fee"), "an ace bad fee");
        assert_eq!(print(""), "");
        assert_eq!(print("größe 7 zu klein"), "größe # zu klein");
        assert_eq!(print(&"x ".repeat(200)).len(), FINGERPRINT_BYTES_MAX);
    }

    #[test]
    fn a_row_is_read_back_as_it_was_and_a_cut_one_is_refused() {
        let mut group = DeathGroup::new(DeathGroup::key_of(b"mail", b"boom 7"), 9, 5);
        group.add(7, JobRef::Chosen("mine".into()), b"boom 7", &"w".into());
        group.add(8, JobRef::Seq(77), &[b'x'; 900], &"worker".into());
        let mark = DeathMark { count: 1, ..group.mark() };
        assert!(group.tell(&"a/b".into(), &mark) && !group.tell(&"a/b".into(), &mark));
        let row = group.encode();
        assert_eq!(DeathGroup::decode(group.key.clone(), row.clone()), Some(group.clone()));
        assert_eq!((group.error.len(), group.parts()), (ERROR_BYTES_MAX, Some((&b"mail"[..], &b"boom #"[..]))));
        assert_eq!(DeathGroup::decode(group.key.clone(), row.slice(..40)), None);
    }
}
