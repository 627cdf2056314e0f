//! The groups of a queue in memory: how many turns each has given out, and who waits for one.
//!
//! A job of a group has a *turn* while it stands in the line or is leased. It gets one when fewer jobs of its group than
//! its own bound have one; until then it is ready but *blocked*. All blocked jobs of a queue stand in one order, by (group,
//! higher priority, lower place), so that finding who is next costs the same however many wait.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

use bytes::Bytes;

/// Longer keys come after shorter ones, so that no group lies within another.
type Rank = (usize, Bytes, i16, u64);

/// Which group a job is of, and how many of that group may have a turn beside it, itself included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub key: Bytes,
    pub bound: u32,
}

#[derive(Default)]
pub struct Groups {
    turns: HashMap<Bytes, u32, foldhash::fast::RandomState>,
    blocked: BTreeMap<Rank, (u64, u32)>,
}

impl Groups {
    pub fn blocked(&self) -> u64 {
        self.blocked.len() as u64
    }

    pub fn take_turn(&mut self, member: &Member) {
        *self.turns.entry(member.key.clone()).or_default() += 1;
    }

    pub fn give_turn(&mut self, member: &Member) {
        if let Some(turns) = self.turns.get_mut(&member.key) {
            *turns -= 1;
            if *turns == 0 {
                self.turns.remove(&member.key);
            }
        }
    }

    pub fn block(&mut self, member: &Member, priority: i16, place: u64, seq: u64) {
        self.blocked.insert(rank(member, priority, place), (seq, member.bound));
    }

    pub fn unblock(&mut self, member: &Member, priority: i16, place: u64) {
        self.blocked.remove(&rank(member, priority, place));
    }

    /// The job that may have a turn now. Nobody overtakes the first that waits.
    pub fn next(&self, key: &Bytes) -> Option<u64> {
        if self.blocked.is_empty() {
            return None;
        }
        let from = (key.len(), key.clone(), i16::MIN, 0);
        let (rank, (seq, bound)) = self.blocked.range((Bound::Included(from), Bound::Unbounded)).next()?;
        let turns = self.turns.get(key).copied().unwrap_or(0);
        (rank.1 == *key && turns < *bound).then_some(*seq)
    }

    /// A page of the blocked jobs in their order.
    pub fn page(&self, offset: u64, count: usize) -> impl Iterator<Item = u64> {
        // Beyond the number of jobs in memory there is nothing anyway.
        self.blocked.values().skip(usize::try_from(offset).unwrap_or(usize::MAX)).take(count).map(|(seq, _)| *seq)
    }
}

fn rank(member: &Member, priority: i16, place: u64) -> Rank {
    (member.key.len(), member.key.clone(), -priority, place)
}
