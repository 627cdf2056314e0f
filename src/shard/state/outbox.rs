//! The outbox of a queue: deaths are counted in it, and who has told of them says so.
//!
//! The rows are the groups of [`DeathGroup`]; in memory are only their keys and how many deaths they count together.

use bytes::Bytes;

use super::job::{Job, broken};
use super::rows::{Key, Rows};
use super::turn::Turn;
use crate::error::Result;
use crate::job::JobRef;
use crate::shard::{DeathGroup, DeathMark, OTHER_DEATHS, OUTBOX_GROUPS_MAX, Outcome};

impl<R: Rows> Turn<'_, R> {
    /// Counts the death of a job, which was counted among the queue's own before.
    pub fn count_death(&mut self, seq: u64, job: &Job) -> Result<()> {
        let policy = self.record(seq)?.spec.policy;
        let detail = job.detail.as_deref().cloned().unwrap_or_default();
        let mut key = DeathGroup::key_of(&policy.kind, &detail.error);
        let others = self.queue.outbox.len() - usize::from(self.queue.outbox.contains(OTHER_DEATHS));
        if !self.queue.outbox.contains(&key) && others >= OUTBOX_GROUPS_MAX {
            key = Bytes::from_static(OTHER_DEATHS);
        }
        let mut group = match self.queue.outbox.contains(&key) {
            true => self.death_group(&key)?,
            false => DeathGroup::new(key.clone(), self.queue.totals.died, self.now),
        };
        let job = policy.id.clone().map_or(JobRef::Seq(seq), |id| JobRef::Chosen(Bytes::copy_from_slice(&id)));
        group.add(self.now, job, &detail.error, &detail.worker);
        self.rows.put(Key::Deaths(self.queue.number, key.clone()), group.encode());
        self.queue.outbox.insert(key);
        self.queue.deaths += 1;
        Ok(())
    }

    fn death_group(&self, key: &Bytes) -> Result<DeathGroup> {
        let row = self.rows.get(&Key::Deaths(self.queue.number, key.clone()))?;
        row.and_then(|row| DeathGroup::decode(key.clone(), row)).ok_or_else(|| broken("a group of deaths is missing"))
    }

    pub fn outbox(&self) -> Result<Outcome> {
        let mut keys: Vec<&Bytes> = self.queue.outbox.iter().collect();
        keys.sort_unstable();
        let groups: Result<Vec<DeathGroup>> = keys.into_iter().map(|key| self.death_group(key)).collect();
        Ok(Outcome::Outbox { groups: groups?, now: self.now })
    }

    pub fn outbox_told(&mut self, channel: &Bytes, marks: &[DeathMark]) -> Result<Outcome> {
        for mark in marks.iter().filter(|mark| self.queue.outbox.contains(&mark.key)).collect::<Vec<_>>() {
            let mut group = self.death_group(&mark.key)?;
            if group.tell(channel, mark) {
                self.rows.put(Key::Deaths(self.queue.number, group.key.clone()), group.encode());
            }
        }
        Ok(Outcome::Done)
    }

    pub fn outbox_settle(&mut self, marks: &[DeathMark]) -> Result<Outcome> {
        for mark in marks {
            if self.queue.outbox.contains(&mark.key) && self.death_group(&mark.key)?.mark() == *mark {
                self.queue.outbox.remove(&mark.key);
                self.queue.deaths -= mark.count;
                self.rows.delete(Key::Deaths(self.queue.number, mark.key.clone()));
            }
        }
        Ok(Outcome::Done)
    }
}
