//! The last slow commands, for `SLOWLOG` and as lines of the log (module `goflow::slow`).
//!
//! An entry says which command it was, on which queue, lock or semaphore, how long it took and who sent it. It holds no payload,
//! no key and no secret: of the other arguments it says how many there were. What a blocking command was meant to wait is not
//! slowness and does not come here.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use crate::clients::Peer;
use crate::resp::reply::Reply;

/// Entries that are kept, as many as Redis keeps.
const ENTRIES_MAX: usize = 128;
/// Entries of a `SLOWLOG GET` that does not say how many.
const SHOWN: usize = 10;

struct Entry {
    number: u64,
    at: Duration,
    took: Duration,
    command: &'static str,
    subject: Bytes,
    words: usize,
    address: String,
    name: Bytes,
}

#[derive(Default)]
struct Entries {
    /// Of all entries there have been, so that the numbers stay apart after a reset.
    count: u64,
    kept: VecDeque<Entry>,
}

#[derive(Default)]
pub struct Slowlog {
    entries: Mutex<Entries>,
}

/// A command that was slow.
pub struct Slow<'a> {
    pub command: &'static str,
    /// The queue, lock or semaphore; empty where there is none.
    pub subject: Bytes,
    /// Of the whole request.
    pub words: usize,
    pub took: Duration,
    pub peer: &'a Peer,
}

impl Slowlog {
    fn entries(&self) -> std::sync::MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn note(&self, slow: Slow<'_>) {
        let Slow { command, subject, words, took, peer } = slow;
        // A buffer of requests must not live as long as this entry does.
        let subject = Bytes::copy_from_slice(&subject);
        let (ms, queue) = (took.as_millis() as u64, String::from_utf8_lossy(&subject));
        tracing::info!(target: "goflow::slow", command, %queue, words, ms, client = peer.id, address = peer.address, "slow");
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut entries = self.entries();
        let number = entries.count;
        entries.count += 1;
        entries.kept.truncate(ENTRIES_MAX - 1);
        let (address, name) = (peer.address.clone(), peer.labels().name);
        entries.kept.push_front(Entry { number, at, took, command, subject, words, address, name });
    }

    /// The newest first, in the form of Redis: number, Unix seconds, microseconds, words, address and name of the client.
    pub fn get(&self, count: Option<usize>) -> Reply {
        let entries = self.entries();
        Reply::Array(entries.kept.iter().take(count.unwrap_or(SHOWN)).map(Entry::reply).collect())
    }

    pub fn len(&self) -> usize {
        self.entries().kept.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn reset(&self) {
        self.entries().kept.clear();
    }
}

impl Entry {
    fn reply(&self) -> Reply {
        // A subcommand is `NAME|SUB` in the table and two words on the wire.
        let mut words: Vec<Reply> = self.command.split('|').map(Reply::bulk).collect();
        if !self.subject.is_empty() {
            words.push(Reply::Bulk(self.subject.clone()));
        }
        let rest = self.words.saturating_sub(words.len());
        if rest > 0 {
            words.push(Reply::bulk(format!("... ({rest} more arguments)")));
        }
        Reply::Array(vec![
            Reply::count(self.number),
            Reply::count(self.at.as_secs()),
            Reply::count(self.took.as_micros() as u64),
            Reply::Array(words),
            Reply::bulk(self.address.clone()),
            Reply::Bulk(self.name.clone()),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clients::Clients;

    #[test]
    fn so_many_are_kept_and_the_numbers_go_on_after_a_reset() {
        let (log, clients) = (Slowlog::default(), Clients::default());
        let peer = clients.register("10.0.0.1:5".into(), String::new());
        let note = |subject: &'static str| {
            let (took, subject) = (Duration::from_micros(1_234), Bytes::from_static(subject.as_bytes()));
            log.note(Slow { command: "GOFLOW.LOCK|ACQUIRE", subject, words: 4, took, peer: &peer });
        };
        (0..ENTRIES_MAX + 10).for_each(|_| note("a"));
        assert_eq!(log.len(), ENTRIES_MAX);
        log.reset();
        assert!(log.is_empty());
        note("lamp");
        let Reply::Array(entries) = log.get(None) else { panic!() };
        let [Reply::Array(fields)] = &entries[..] else { panic!("{entries:?}") };
        assert_eq!((&fields[0], &fields[2]), (&Reply::count(ENTRIES_MAX as u64 + 10), &Reply::Integer(1_234)));
        let words = ["GOFLOW.LOCK", "ACQUIRE", "lamp", "... (1 more arguments)"].map(Reply::bulk);
        assert_eq!(fields[3..5], [Reply::Array(words.to_vec()), Reply::bulk("10.0.0.1:5")]);
    }
}
