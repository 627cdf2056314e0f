//! Locks and semaphores: who holds each, in memory and in a row of its own.
//!
//! One row per object with all its holders, so an op costs O(holders). Holders whose time is up are dropped when their
//! object is looked at; a semaphore without holders leaves no row, a free lock keeps the row with its fence. Semaphores that
//! nobody looks at any more are found by when their last holder's time is up, a few with each deed.

use std::collections::{BTreeSet, HashMap};

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::job::{NUMBER_MAX, broken};
use super::rows::{Key, Rows};
use crate::clock::UnixMs;
use crate::error::Result;
use crate::job::Name;
use crate::shard::{Deed, Holder, Keyed, Outcome, fence_floor};

#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    until: UnixMs,
    token: u64,
    owner: Bytes,
}

#[derive(Default)]
struct Object {
    fence: u64,
    holders: Vec<Held>,
}

/// Semaphores without holders that go with each deed.
const CLEARED_AT_ONCE: usize = 4;

/// All locks and semaphores of a shard of which something is known.
#[derive(Default)]
pub struct Objects {
    known: HashMap<(Keyed, Name), Object, foldhash::fast::RandomState>,
    /// Semaphores by when they have no holder any more.
    ends: BTreeSet<(UnixMs, Name)>,
}

impl Objects {
    /// Takes in what a row tells.
    pub fn load(&mut self, key: Key, row: Bytes) -> Result<()> {
        if let Key::Object(kind, name) = key {
            let object = Object::decode(row).ok_or_else(|| broken("a lock or semaphore cannot be read"))?;
            self.keep((kind, name), object);
        }
        Ok(())
    }

    pub fn names(&self) -> Vec<(Keyed, Name)> {
        self.known.keys().cloned().collect()
    }

    /// Does the deed and writes the object's row if it changed.
    pub fn act(&mut self, rows: &mut impl Rows, key: (Keyed, Name), deed: Deed, now: UnixMs) -> Outcome {
        self.clear(rows, now);
        let mut object = self.take(&key).unwrap_or_default();
        let held = object.holders.len();
        object.holders.retain(|held| held.until > now);
        let mut changed = object.holders.len() < held;
        let outcome = object.act(key.0, deed, now);
        changed |= matches!(outcome, Outcome::Granted { .. } | Outcome::Count(1));
        let is_kept = object.fence > 0 || !object.holders.is_empty();
        match (changed, is_kept) {
            (true, true) => rows.put(Key::Object(key.0, key.1.clone()), object.encode()),
            (true, false) => rows.delete(Key::Object(key.0, key.1.clone())),
            (false, _) => {}
        }
        if is_kept {
            self.keep(key, object);
        }
        outcome
    }

    fn keep(&mut self, key: (Keyed, Name), object: Object) {
        if let (Keyed::Semaphore, Some(end)) = (key.0, object.end()) {
            self.ends.insert((end, key.1.clone()));
        }
        self.known.insert(key, object);
    }

    fn take(&mut self, key: &(Keyed, Name)) -> Option<Object> {
        let object = self.known.remove(key)?;
        if let (Keyed::Semaphore, Some(end)) = (key.0, object.end()) {
            self.ends.remove(&(end, key.1.clone()));
        }
        Some(object)
    }

    /// Forgets some semaphores whose holders' time is up.
    fn clear(&mut self, rows: &mut impl Rows, now: UnixMs) {
        for _ in 0..CLEARED_AT_ONCE {
            let Some((end, _)) = self.ends.first() else { return };
            if *end > now {
                return;
            }
            if let Some((_, name)) = self.ends.pop_first() {
                self.known.remove(&(Keyed::Semaphore, name.clone()));
                rows.delete(Key::Object(Keyed::Semaphore, name));
            }
        }
    }
}

impl Object {
    /// When the time of the last holder is up.
    fn end(&self) -> Option<UnixMs> {
        self.holders.iter().map(|held| held.until).max()
    }

    fn act(&mut self, kind: Keyed, deed: Deed, now: UnixMs) -> Outcome {
        let place = |token: u64, object: &Object| object.holders.iter().position(|held| held.token == token);
        let end = |ttl_ms: u64| now.saturating_add(ttl_ms).min(NUMBER_MAX);
        match deed {
            Deed::Acquire { token, limit, ttl_ms, owner, moved_in, .. } => {
                let is_holder = place(token, self).map(|at| self.holders.remove(at)).is_some();
                if !is_holder && self.holders.len() >= limit as usize {
                    let first = self.holders.iter().map(|held| held.until).min().unwrap_or(now);
                    return Outcome::NotFree { free_in: first.saturating_sub(now) };
                }
                if kind == Keyed::Lock && !is_holder {
                    self.fence = self.fence.max(fence_floor(moved_in)) + 1;
                }
                // A copy: what is kept must not hold the request's memory.
                self.holders.push(Held { until: end(ttl_ms), token, owner: Bytes::copy_from_slice(&owner) });
                Outcome::Granted { fence: self.fence }
            }
            Deed::Release { token } => {
                let released = place(token, self).map(|at| self.holders.remove(at));
                Outcome::Count(u64::from(released.is_some()))
            }
            Deed::Renew { token, ttl_ms } => {
                let held = self.holders.iter_mut().find(|held| held.token == token);
                Outcome::Count(held.map_or(0, |held| {
                    held.until = end(ttl_ms);
                    1
                }))
            }
            Deed::Show => {
                let mut held: Vec<&Held> = self.holders.iter().collect();
                held.sort_unstable_by_key(|held| (held.until, held.token));
                let left = |held: &Held| Holder { owner: held.owner.clone(), left_ms: held.until.saturating_sub(now) };
                Outcome::Holders { fence: self.fence, holders: held.into_iter().map(left).collect() }
            }
        }
    }

    fn encode(&self) -> Bytes {
        let mut out = BytesMut::new();
        out.put_u64(self.fence);
        for held in &self.holders {
            out.put_u64(held.until);
            out.put_u64(held.token);
            out.put_u32(held.owner.len() as u32);
            out.put_slice(&held.owner);
        }
        out.freeze()
    }

    fn decode(mut row: Bytes) -> Option<Object> {
        let mut object = Object { fence: row.try_get_u64().ok()?, holders: Vec::new() };
        while !row.is_empty() {
            let (until, token) = (row.try_get_u64().ok()?, row.try_get_u64().ok()?);
            let len = row.try_get_u32().ok()? as usize;
            let owner = (row.len() >= len).then(|| row.split_to(len))?;
            object.holders.push(Held { until, token, owner });
        }
        Some(object)
    }
}
