//! Events as they happen: what a process wants to hear of its shards, and how a shard tells it.
//!
//! [`Wishes`] are the process's, an [`Ear`] is one shard's. A shard in this process asks the wishes at each commit; one on a
//! server subscribes there to what is wished, and to nothing when nothing is. An ear never waits: what it has no room for
//! is missed, and who listens finds that out by the numbers.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use foldhash::fast::RandomState;
use tokio::sync::{mpsc, watch};

use super::event::Told;
use crate::clock::UnixMs;
use crate::job::Name;

/// Everything a shard will ever say has been asked for.
const ALL_HEARD: u64 = u64::MAX;

/// What is told: everything, or the calls in which jobs died.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Topic {
    Events,
    Deaths,
}

/// What somebody listens to; no queue is all of them.
pub type Wish = (Topic, Option<Name>);

#[derive(Default)]
struct Wanted {
    /// How many wish it.
    counts: HashMap<Wish, usize, RandomState>,
    version: u64,
}

/// What the process wants to hear.
pub struct Wishes {
    wanted: Mutex<Wanted>,
    changed: watch::Sender<u64>,
}

impl Default for Wishes {
    fn default() -> Self {
        Wishes { wanted: Mutex::default(), changed: watch::Sender::new(0) }
    }
}

impl Wishes {
    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The version of the wishes with this one among them.
    pub fn add(&self, wish: Wish) -> u64 {
        let mut wanted = self.wanted();
        let count = wanted.counts.entry(wish).or_default();
        *count += 1;
        if *count == 1 {
            wanted.version += 1;
            self.changed.send_replace(wanted.version);
        }
        wanted.version
    }

    /// Takes a wish back; true when nobody has it any more.
    pub fn remove(&self, wish: &Wish) -> bool {
        let mut wanted = self.wanted();
        let Some(count) = wanted.counts.get_mut(wish) else { return false };
        *count -= 1;
        let is_last = *count == 0;
        if is_last {
            wanted.counts.remove(wish);
            wanted.version += 1;
            self.changed.send_replace(wanted.version);
        }
        is_last
    }

    /// Whether somebody wants to hear this of the queue.
    pub fn wants(&self, topic: Topic, queue: &Name) -> bool {
        let wanted = self.wanted();
        if wanted.counts.is_empty() {
            return false;
        }
        wanted.counts.contains_key(&(topic, None)) || wanted.counts.contains_key(&(topic, Some(queue.clone())))
    }

    /// The fewest topics that hold everything that is wished, and the version of that.
    pub fn needed(&self) -> (BTreeSet<Wish>, u64) {
        let wanted = self.wanted();
        let has = |topic, queue: Option<&Name>| wanted.counts.contains_key(&(topic, queue.cloned()));
        let is_needed = |(topic, queue): &&Wish| match (topic, queue) {
            (Topic::Events, None) => true,
            (Topic::Events, Some(_)) => !has(Topic::Events, None),
            (Topic::Deaths, None) => !has(Topic::Events, None),
            (Topic::Deaths, queue) => {
                !has(Topic::Events, None) && !has(Topic::Events, queue.as_ref()) && !has(Topic::Deaths, None)
            }
        };
        (wanted.counts.keys().filter(is_needed).cloned().collect(), wanted.version)
    }
}

/// What a shard told.
#[derive(Debug)]
pub struct Heard {
    pub shard: Arc<str>,
    pub queue: Name,
    /// When the queue's journal began.
    pub born: UnixMs,
    pub told: Told,
    /// Under which topic it came.
    pub topic: Topic,
}

/// Where one shard tells what happens on it.
pub struct Ear {
    shard: Arc<str>,
    pub wishes: Arc<Wishes>,
    sender: mpsc::Sender<Heard>,
    /// The version of the wishes that the shard goes by.
    heard: watch::Sender<u64>,
}

impl Ear {
    pub fn new(shard: Arc<str>, wishes: Arc<Wishes>, sender: mpsc::Sender<Heard>) -> Arc<Ear> {
        Arc::new(Ear { shard, wishes, sender, heard: watch::Sender::new(ALL_HEARD) })
    }

    pub fn tell(&self, queue: Name, born: UnixMs, told: Told, topic: Topic) {
        // Without room it is missed.
        let _ = self.sender.try_send(Heard { shard: self.shard.clone(), queue, born, told, topic });
    }

    /// Told by a shard that has to be asked: it goes by this version from now on.
    pub fn listens(&self, version: u64) {
        self.heard.send_replace(version);
    }

    /// Told by a shard that cannot be reached: nobody needs to wait until it listens.
    pub fn is_deaf(&self) {
        self.heard.send_replace(ALL_HEARD);
    }

    /// Resolves when the shard goes by this version, or cannot be reached.
    pub async fn heard(&self, version: u64) {
        // The sender lives as long as we do.
        let _ = self.heard.subscribe().wait_for(|heard| *heard >= version).await;
    }

    /// Resolves when the wishes are not those of this version any more.
    pub async fn changed(&self, version: u64) {
        let _ = self.wishes.changed.subscribe().wait_for(|now| *now != version).await;
    }

    /// What a shard in this process does after each commit.
    pub fn tell_local(&self, recorded: Vec<Recorded>) {
        for Recorded { queue, born, told, is_death } in recorded {
            if self.wishes.wants(Topic::Events, &queue) {
                self.tell(queue, born, told, Topic::Events);
            } else if is_death && self.wishes.wants(Topic::Deaths, &queue) {
                self.tell(queue, born, told, Topic::Deaths);
            }
        }
    }

    /// A message of a server, as `finish.lua` makes it.
    pub fn tell_message(&self, topic: Topic, queue: &[u8], message: &[u8]) {
        let number = |at: usize| {
            let bytes = message.get(at..at + 6)?;
            Some(bytes.iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte)))
        };
        if let (Ok(queue), Some(born), Some(last), Some(died)) = (Name::parse(queue), number(0), number(6), number(12))
        {
            let chunk = Bytes::copy_from_slice(&message[18..]);
            self.tell(queue, born, Told { last, died, chunk }, topic);
        }
    }
}

/// What a batch recorded of one queue.
#[derive(Debug)]
pub struct Recorded {
    pub queue: Name,
    pub born: UnixMs,
    pub told: Told,
    /// A job died in it.
    pub is_death: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_asked_for_than_holds_what_is_wished() {
        let queue = |name: &str| Some(Name::parse(name.as_bytes()).unwrap());
        let wishes = Wishes::default();
        let needed = |wishes: &Wishes| wishes.needed().0.into_iter().collect::<Vec<_>>();
        wishes.add((Topic::Deaths, queue("a")));
        wishes.add((Topic::Deaths, queue("b")));
        let version = wishes.add((Topic::Events, queue("b")));
        assert_eq!(wishes.add((Topic::Events, queue("b"))), version);
        assert_eq!(needed(&wishes), [(Topic::Events, queue("b")), (Topic::Deaths, queue("a"))]);
        wishes.add((Topic::Events, None));
        assert_eq!(needed(&wishes), [(Topic::Events, None)]);
        assert!(wishes.remove(&(Topic::Events, None)) && !wishes.remove(&(Topic::Events, queue("b"))));
        let is_wanted = |topic, name| wishes.wants(topic, &queue(name).unwrap());
        assert!(is_wanted(Topic::Events, "b") && is_wanted(Topic::Deaths, "a"));
        assert!(!is_wanted(Topic::Events, "a") && !is_wanted(Topic::Deaths, "c"));
    }
}
