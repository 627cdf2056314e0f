//! Which queues of one shard have deaths in their outbox, as far as this process has heard.
//!
//! The effects of every batch say it, whoever asked for the batch (the sampler and the sweep look at queues by themselves),
//! and wake-ups of the shard tell of other proxies' deaths. Whoever tells people of deaths reads from here where to look.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::job::Name;

/// Queues that are kept; beyond it all queues of the shard must be looked at.
const QUEUES_MAX: usize = 10_000;

/// One for each lane. Nobody has looked at first, so everything may have been missed.
#[derive(Debug)]
pub struct Outboxes {
    queues: Mutex<BTreeSet<Name>>,
    missed: AtomicBool,
    bell: Notify,
}

impl Default for Outboxes {
    fn default() -> Outboxes {
        Outboxes { queues: Mutex::default(), missed: AtomicBool::new(true), bell: Notify::new() }
    }
}

impl Outboxes {
    fn queues(&self) -> MutexGuard<'_, BTreeSet<Name>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the effect of a batch says of a queue.
    pub fn note(&self, queue: &Name, deaths: u64) {
        let mut queues = self.queues();
        if deaths == 0 {
            queues.remove(queue);
        } else if !queues.contains(queue) {
            self.add(queues, queue.clone());
        }
    }

    /// What a wake-up says.
    pub fn woken(&self, queue: Name) {
        self.add(self.queues(), queue);
    }

    fn add(&self, mut queues: MutexGuard<'_, BTreeSet<Name>>, queue: Name) {
        if queues.len() >= QUEUES_MAX {
            self.missed.store(true, Ordering::Relaxed);
        } else {
            queues.insert(queue);
        }
        drop(queues);
        self.bell.notify_one();
    }

    /// Any queue may have deaths.
    pub fn miss(&self) {
        self.missed.store(true, Ordering::Relaxed);
        self.bell.notify_one();
    }

    /// Whether all queues must be looked at; whoever is told so does it.
    pub fn take_missed(&self) -> bool {
        self.missed.swap(false, Ordering::Relaxed)
    }

    /// The queues with deaths, sorted.
    pub fn waiting(&self) -> Vec<Name> {
        self.queues().iter().cloned().collect()
    }

    /// Resolves when something was heard since the last time.
    pub async fn rung(&self) {
        self.bell.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_the_bound_is_missed_and_not_forgotten() {
        let name = |number: usize| Name::parse(format!("q{number}").as_bytes()).unwrap();
        let outboxes = Outboxes::default();
        assert!(outboxes.take_missed() && !outboxes.take_missed());
        (0..QUEUES_MAX).for_each(|number| outboxes.note(&name(number), 1));
        assert!(!outboxes.take_missed());
        outboxes.woken(name(QUEUES_MAX));
        assert!(outboxes.take_missed());
        outboxes.note(&name(7), 0);
        assert_eq!(outboxes.waiting().len(), QUEUES_MAX - 1);
    }
}
