//! What is recorded of jobs: the events, and the two forms in which every shard keeps them.
//!
//! A *history* is what happened to one job, in order; it lies in what the shard keeps of the job and grows with each
//! transition. A *chunk* is what one call did to one queue, in order; the chunks of a queue are its journal. Both hold only
//! what the other parts of them do not say already: who worked on a delivery, and how long, a history knows from its start.
//! Chunks are written by the scripts in runs (capital letters) and by `state/turn.rs` event by event, and mean the same.
//! Numbers are big-endian; whoever changes the layout changes `shard/redis/*.lua` with it.
//!
//! ```text
//! history = entry*
//!   Q W    digits (13)                      queued, or scheduled, by the enqueue
//!   i      id (2 and bytes)                 the id that the client chose; behind the first entry
//!   s      at (6) attempt (4) worker (2 and bytes)
//!   f x    at (6) error (2 and bytes)       failed; cancelled
//!   p      at (6) percent (1)
//!   q r b d v c e   at (6)                  queued, retried, released, dead, redriven, completed, expired
//!   .      count (4)                        so many entries were dropped here
//!   =      the rest                         the result of the job, which is none of its history
//! chunk = at (6) item*
//!   Q      seq (6) count (4)                queued: jobs whose seqs follow each other
//!   S      count (4) bytes (4) is_again (1) (jobs (4) lease_ms (6) worker (2 and bytes))* in so many bytes,
//!          seqs (6 each), if is_again what they had spent (4 each)
//!   C      count (4), for each: seq (6) spent (4) lapses (4) redrives (4) time (6) started (6) progress (1)
//!          worker (2 and bytes)
//!   i      seq (6) id (2 and bytes)         the id that the client of this job chose
//!   q w s p c f r b d v x e   seq (6) attempt (4, 0 none) duration (6, all bits: none) percent (1, 255 none)
//!          worker (2 and bytes) error (2 and bytes)
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::collections::HashMap;

use crate::clock::{Millis, UnixMs};

/// Most events in one page of a journal.
pub const PAGE_EVENTS_MAX: usize = 1_000;
/// Of an error so much is kept in an event, in bytes.
pub const ERROR_BYTES_MAX: usize = 512;
/// A history that grows beyond this is cut in its middle: the entries in so many bytes at its head stay, and those in so
/// many at its end.
const HISTORY_BYTES_MAX: usize = 4_096;
const HEAD_BYTES_MAX: usize = 1_024;
const END_BYTES_MAX: usize = 2_048;
const DIGITS: usize = 13;
const NO_DURATION: u64 = (1 << 48) - 1;

/// How much is recorded; the same on every shard of a deployment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recording {
    /// How long a history outlives its job, and an event its moment.
    pub age_ms: Millis,
    /// Histories of jobs that are not kept any more, per queue and shard.
    pub histories: u64,
    /// Events in the journal, per queue and shard.
    pub journal: u64,
}

impl Default for Recording {
    fn default() -> Self {
        Recording { age_ms: 24 * 3_600_000, histories: 100_000, journal: 100_000 }
    }
}

/// What happened to a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum What {
    Queued,
    Scheduled,
    Started,
    Progress,
    Completed,
    Failed,
    Retried,
    Released,
    Dead,
    Redriven,
    Cancelled,
    Expired,
}

impl What {
    pub const ALL: [What; 12] = [
        What::Queued,
        What::Scheduled,
        What::Started,
        What::Progress,
        What::Completed,
        What::Failed,
        What::Retried,
        What::Released,
        What::Dead,
        What::Redriven,
        What::Cancelled,
        What::Expired,
    ];

    /// As clients read it.
    pub fn word(self) -> &'static str {
        match self {
            What::Queued => "job.queued",
            What::Scheduled => "job.scheduled",
            What::Started => "job.started",
            What::Progress => "job.progress",
            What::Completed => "job.completed",
            What::Failed => "job.failed",
            What::Retried => "job.retried",
            What::Released => "job.released",
            What::Dead => "job.dlq",
            What::Redriven => "job.redriven",
            What::Cancelled => "job.cancelled",
            What::Expired => "job.expired",
        }
    }

    pub fn letter(self) -> u8 {
        b"qwspcfrbdvxe"[self as usize]
    }

    fn of_letter(letter: u8) -> Option<What> {
        What::ALL.into_iter().find(|what| what.letter() == letter)
    }

    /// Belongs to a delivery and says who had it.
    fn has_worker(self) -> bool {
        matches!(self, What::Started | What::Progress | What::Completed | What::Failed | What::Released | What::Dead)
    }

    fn ends_delivery(self) -> bool {
        matches!(self, What::Completed | What::Failed | What::Released)
    }
}

/// One event. What does not apply to its kind is empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub what: What,
    pub seq: u64,
    /// The id that the job's client chose.
    pub chosen: Option<Bytes>,
    pub at: UnixMs,
    pub attempt: Option<u32>,
    pub worker: Bytes,
    pub error: Bytes,
    /// From the start of the delivery that it ends.
    pub duration_ms: Option<Millis>,
    /// In percent.
    pub progress: Option<u8>,
}

impl Event {
    pub fn new(what: What, seq: u64, at: UnixMs) -> Event {
        Event {
            what,
            seq,
            chosen: None,
            at,
            attempt: None,
            worker: Bytes::new(),
            error: Bytes::new(),
            duration_ms: None,
            progress: None,
        }
    }
}

/// A line of a history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    Event(Event),
    /// So many events were here and are not kept.
    Missing(u64),
}

/// A part of a queue's journal on one shard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    /// When the journal began; another journal of the same name began at another time. 0: nothing was ever recorded.
    pub born: UnixMs,
    /// The number of the newest event; they are numbered from 1.
    pub last: u64,
    /// The number of the first event below.
    pub first: u64,
    pub events: Vec<Event>,
}

/// What one call did to one queue, as it is told to those who listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// The number of its last event.
    pub last: u64,
    /// How many jobs of the queue have died so far.
    pub died: u64,
    pub chunk: Bytes,
}

/// What the error of an event keeps.
pub fn cut_error(error: &[u8]) -> &[u8] {
    &error[..error.len().min(ERROR_BYTES_MAX)]
}

// ------------------------------------------------------------------------------------------------------- histories

/// The first entry of a history and the chosen id behind it.
pub fn begin_history(what: What, at: UnixMs, chosen: Option<&Bytes>) -> BytesMut {
    let mut out = BytesMut::with_capacity(64);
    out.put_u8(if what == What::Queued { b'Q' } else { b'W' });
    out.put_slice(format!("{at:013}").as_bytes());
    if let Some(id) = chosen {
        out.put_u8(b'i');
        put_text(&mut out, id);
    }
    out
}

/// Appends what happened to a history.
pub fn extend_history(history: &mut BytesMut, event: &Event) {
    history.put_u8(event.what.letter());
    history.put_uint(event.at, 6);
    match event.what {
        What::Started => {
            history.put_u32(event.attempt.unwrap_or(0));
            put_text(history, &event.worker);
        }
        What::Failed | What::Cancelled => put_text(history, &event.error),
        What::Progress => history.put_u8(event.progress.unwrap_or(0)),
        _ => {}
    }
    if history.len() > HISTORY_BYTES_MAX {
        *history = shorten(history);
    }
}

/// How many bytes the first entry takes; `None`: it is none.
fn entry_len(history: &[u8]) -> Option<usize> {
    let text = |at: usize| Some(at + 2 + usize::from(u16::from_be_bytes(history.get(at..at + 2)?.try_into().ok()?)));
    match history.first()? {
        b'Q' | b'W' => Some(1 + DIGITS),
        b'i' => text(1),
        b's' => text(11),
        b'f' | b'x' => text(7),
        b'p' => Some(8),
        b'.' => Some(5),
        b'=' => None,
        _ => Some(7),
    }
}

/// Drops entries of the middle.
fn shorten(history: &[u8]) -> BytesMut {
    let mut at = 0;
    while history.get(at) != Some(&b'.')
        && let Some(len) = entry_len(&history[at..])
        && at + len <= HEAD_BYTES_MAX
    {
        at += len;
    }
    let mut out = BytesMut::from(&history[..at]);
    let mut dropped = 0u32;
    while history.len() - at > END_BYTES_MAX
        && let Some(len) = entry_len(&history[at..])
        && at + len <= history.len()
    {
        dropped += match history[at] {
            b'.' => u32::from_be_bytes(history[at + 1..at + 5].try_into().unwrap_or_default()),
            _ => 1,
        };
        at += len;
    }
    out.put_u8(b'.');
    out.put_u32(dropped);
    out.put_slice(&history[at..]);
    out
}

/// The id that a history names.
pub fn chosen_in(history: &[u8]) -> Option<Bytes> {
    let mut rest = Bytes::copy_from_slice(history.get(1 + DIGITS..)?);
    (rest.try_get_u8().ok()? == b'i').then(|| take_text(&mut rest))?
}

/// The result that stands behind a history; `None` when this is none.
pub fn result_in(history: &Bytes) -> Option<Bytes> {
    let mut at = 0;
    while at < history.len() {
        if history[at] == b'=' {
            return Some(history.slice(at + 1..));
        }
        at += entry_len(&history[at..])?;
    }
    (at == history.len()).then(Bytes::new)
}

/// Reads a history; `None` when this is none.
pub fn read_history(seq: u64, mut rest: Bytes) -> Option<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut chosen = None;
    // Of the delivery that started last; and the last error.
    let (mut started, mut failure) = (Event::new(What::Started, seq, 0), Bytes::new());
    while rest.has_remaining() {
        let letter = rest.get_u8();
        let what = match letter {
            b'=' => break,
            b'.' => {
                entries.push(Entry::Missing(u64::from(rest.try_get_u32().ok()?)));
                continue;
            }
            b'i' => {
                chosen = Some(take_text(&mut rest)?);
                continue;
            }
            b'Q' => What::Queued,
            b'W' => What::Scheduled,
            letter => What::of_letter(letter)?,
        };
        let at = match letter {
            b'Q' | b'W' => std::str::from_utf8(&take(&mut rest, DIGITS)?).ok()?.parse().ok()?,
            _ => rest.try_get_uint(6).ok()?,
        };
        let mut event = Event::new(what, seq, at);
        match what {
            What::Started => {
                event.attempt = Some(rest.try_get_u32().ok()?);
                event.worker = take_text(&mut rest)?;
                started = event.clone();
            }
            What::Failed => {
                failure = take_text(&mut rest)?;
                event.error = failure.clone();
            }
            What::Cancelled => event.error = take_text(&mut rest)?,
            What::Progress => event.progress = Some(rest.try_get_u8().ok()?),
            What::Dead => event.error = failure.clone(),
            _ => {}
        }
        if what.has_worker() {
            event.worker = started.worker.clone();
        }
        if what.has_worker() || what == What::Retried {
            event.attempt = started.attempt;
        }
        if what.ends_delivery() {
            event.duration_ms = Some(at.saturating_sub(started.at));
        }
        entries.push(Entry::Event(event));
    }
    for entry in &mut entries {
        if let Entry::Event(event) = entry {
            event.chosen = chosen.clone();
        }
    }
    Some(entries)
}

// --------------------------------------------------------------------------------------------------------- chunks

/// Begins the chunk of a call.
pub fn begin_chunk(chunk: &mut BytesMut, at: UnixMs) {
    chunk.put_uint(at, 6);
}

/// Appends an event to a chunk.
pub fn put_event(chunk: &mut BytesMut, event: &Event) {
    if let Some(id) = &event.chosen {
        chunk.put_u8(b'i');
        chunk.put_uint(event.seq, 6);
        put_text(chunk, id);
    }
    chunk.put_u8(event.what.letter());
    chunk.put_uint(event.seq, 6);
    chunk.put_u32(event.attempt.unwrap_or(0));
    chunk.put_uint(event.duration_ms.map_or(NO_DURATION, |ms| ms.min(NO_DURATION - 1)), 6);
    chunk.put_u8(event.progress.unwrap_or(u8::MAX));
    put_text(chunk, &event.worker);
    put_text(chunk, &event.error);
}

/// Reads a chunk; `None` when this is none.
pub fn read_chunk(mut rest: Bytes) -> Option<Vec<Event>> {
    let at = rest.try_get_uint(6).ok()?;
    let mut events = Vec::new();
    let mut names: HashMap<u64, Bytes, foldhash::fast::RandomState> = HashMap::default();
    while rest.has_remaining() {
        match rest.get_u8() {
            b'Q' => {
                let (seq, count) = (rest.try_get_uint(6).ok()?, rest.try_get_u32().ok()?);
                events.extend((seq..seq + u64::from(count)).map(|seq| Event::new(What::Queued, seq, at)));
            }
            b'S' => read_starts(&mut rest, at, &mut events)?,
            b'C' => {
                for _ in 0..rest.try_get_u32().ok()? {
                    events.push(read_completion(&mut rest, at)?);
                }
            }
            b'i' => {
                let seq = rest.try_get_uint(6).ok()?;
                names.insert(seq, take_text(&mut rest)?);
            }
            letter => {
                let mut event = Event::new(What::of_letter(letter)?, rest.try_get_uint(6).ok()?, at);
                event.attempt = Some(rest.try_get_u32().ok()?).filter(|attempt| *attempt > 0);
                event.duration_ms = Some(rest.try_get_uint(6).ok()?).filter(|ms| *ms != NO_DURATION);
                event.progress = Some(rest.try_get_u8().ok()?).filter(|percent| *percent != u8::MAX);
                event.worker = take_text(&mut rest)?;
                event.error = take_text(&mut rest)?;
                events.push(event);
            }
        }
    }
    if !names.is_empty() {
        events.iter_mut().for_each(|event| event.chosen = names.get(&event.seq).cloned());
    }
    Some(events)
}

fn read_starts(rest: &mut Bytes, at: UnixMs, events: &mut Vec<Event>) -> Option<()> {
    let (count, bytes, is_again) = (rest.try_get_u32().ok()?, rest.try_get_u32().ok()?, rest.try_get_u8().ok()?);
    let count = count as usize;
    let mut parties = take(rest, bytes as usize)?;
    let mut seqs = take(rest, count * 6)?;
    let mut spent = take(rest, if is_again != 0 { count * 4 } else { 0 })?;
    let (mut left, mut worker) = (0, Bytes::new());
    for _ in 0..count {
        while left == 0 {
            left = parties.try_get_u32().ok()?;
            parties.try_get_uint(6).ok()?;
            worker = take_text(&mut parties)?;
        }
        left -= 1;
        let spent = if is_again != 0 { spent.get_u32() } else { 0 };
        events.push(Event {
            attempt: Some(spent.saturating_add(1)),
            worker: worker.clone(),
            ..Event::new(What::Started, seqs.get_uint(6), at)
        });
    }
    Some(())
}

fn read_completion(rest: &mut Bytes, at: UnixMs) -> Option<Event> {
    let (seq, spent) = (rest.try_get_uint(6).ok()?, rest.try_get_u32().ok()?);
    take(rest, 14)?;
    let started = rest.try_get_uint(6).ok()?;
    take(rest, 1)?;
    Some(Event {
        attempt: Some(spent.saturating_add(1)),
        worker: take_text(rest)?,
        duration_ms: Some(at.saturating_sub(started)),
        ..Event::new(What::Completed, seq, at)
    })
}

/// Of chunks that follow each other, each with the number of its last event: the events after a number, so many at most.
pub fn page_after(chunks: Vec<(u64, Bytes)>, after: u64, count: usize) -> Option<Vec<(u64, Event)>> {
    let mut page = Vec::new();
    for (last, chunk) in chunks {
        let events = read_chunk(chunk)?;
        let first = (last + 1).checked_sub(events.len() as u64)?;
        let numbered = (first..).zip(events).filter(|(number, _)| *number > after);
        page.extend(numbered.take(count - page.len()));
    }
    Some(page)
}

/// Makes a page of chunks: the events after a number or, without one, the newest.
pub fn page(born: UnixMs, last: u64, chunks: Vec<(u64, Bytes)>, after: Option<u64>, count: usize) -> Option<Page> {
    let numbered = match after {
        Some(after) => page_after(chunks, after, count)?,
        None => {
            let mut all = page_after(chunks, 0, usize::MAX)?;
            all.drain(..all.len().saturating_sub(count));
            all
        }
    };
    let first = numbered.first().map_or(last + 1, |(number, _)| *number);
    Some(Page { born, last, first, events: numbered.into_iter().map(|(_, event)| event).collect() })
}

fn put_text(out: &mut BytesMut, text: &[u8]) {
    let text = &text[..text.len().min(usize::from(u16::MAX))];
    out.put_u16(text.len() as u16);
    out.put_slice(text);
}

fn take(from: &mut Bytes, count: usize) -> Option<Bytes> {
    (from.len() >= count).then(|| from.split_to(count))
}

fn take_text(from: &mut Bytes) -> Option<Bytes> {
    let len = from.try_get_u16().ok()?;
    take(from, usize::from(len))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(what: What, at: UnixMs) -> Event {
        Event::new(what, 7, at)
    }

    #[test]
    fn a_history_says_again_what_it_was_told() {
        let id = Bytes::from_static(b"mine");
        let mut history = begin_history(What::Scheduled, 1_000, Some(&id));
        let worker = Bytes::from_static(b"w1");
        let told = [
            Event { attempt: Some(1), worker: worker.clone(), ..event(What::Started, 1_010) },
            Event { attempt: Some(1), worker: worker.clone(), progress: Some(40), ..event(What::Progress, 1_020) },
            Event {
                attempt: Some(1),
                worker: worker.clone(),
                error: "boom".into(),
                duration_ms: Some(20),
                ..event(What::Failed, 1_030)
            },
            Event { attempt: Some(1), worker, error: "boom".into(), ..event(What::Dead, 1_030) },
            Event { error: "deleted".into(), ..event(What::Cancelled, 1_040) },
        ];
        told.iter().for_each(|event| extend_history(&mut history, event));
        assert_eq!(chosen_in(&history), Some(id.clone()));
        history.put_slice(b"=a result");
        let read = read_history(7, history.freeze()).unwrap();
        let expected = std::iter::once(event(What::Scheduled, 1_000)).chain(told);
        let expected = expected.map(|event| Entry::Event(Event { chosen: Some(id.clone()), ..event }));
        assert_eq!(read, expected.collect::<Vec<_>>());
    }

    #[test]
    fn a_long_history_loses_its_middle_and_says_how_much() {
        let mut history = begin_history(What::Queued, 1, None);
        let count = 3_000;
        for at in 0..count {
            extend_history(&mut history, &event(What::Retried, at));
            assert!(history.len() <= HISTORY_BYTES_MAX);
        }
        let read = read_history(7, history.freeze()).unwrap();
        let kept = read.iter().filter(|entry| matches!(entry, Entry::Event(_))).count() as u64;
        let [missing] = read
            .iter()
            .filter_map(|entry| match entry {
                Entry::Missing(count) => Some(*count),
                Entry::Event(_) => None,
            })
            .collect::<Vec<_>>()[..]
        else {
            panic!("one gap")
        };
        assert_eq!(kept + missing, count + 1);
        assert!(matches!(&read[0], Entry::Event(event) if event.what == What::Queued));
        assert!(matches!(read.last(), Some(Entry::Event(event)) if event.at == count - 1));
    }

    #[test]
    fn a_chunk_says_again_what_it_was_told() {
        let told = vec![
            event(What::Queued, 5),
            Event { attempt: Some(3), worker: "w".into(), ..event(What::Started, 5) },
            Event {
                chosen: Some("mine".into()),
                error: "e".into(),
                duration_ms: Some(0),
                progress: Some(0),
                seq: 8,
                ..event(What::Failed, 5)
            },
        ];
        let mut chunk = BytesMut::new();
        begin_chunk(&mut chunk, 5);
        told.iter().for_each(|event| put_event(&mut chunk, event));
        let chunk = chunk.freeze();
        assert_eq!(read_chunk(chunk.clone()).unwrap(), told);
        assert_eq!(read_chunk(chunk.slice(..chunk.len() - 1)), None);
        let page = page(1, 20, vec![(17, chunk.clone()), (20, chunk)], Some(15), 3).unwrap();
        assert_eq!((page.first, page.events.len()), (16, 3));
        assert_eq!(page.events[..2], told[1..]);
    }
}
