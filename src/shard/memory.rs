//! The shard that keeps its jobs in memory only: the rules themselves, for tests, trials and what may be lost.
//!
//! It is the model that the other shards are compared with, so there is nothing in it but [`State`] and a map, and the
//! ordinary keys without their rows.

use bytes::Bytes;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use super::feed::Ear;
use super::keys::{self, Shared};
use super::state::State;
use super::state::rows::{Key, Rows, Table, Visit};
use super::{Applied, BoxFuture, Health, Keyed, Keys, OnChange, OnWake, Op, Rules, Shard, Stamp, Unit};
use crate::clock::{self, UnixMs};
use crate::error::{Error, Happened, Result};
use crate::job::Name;
use crate::resp::reply::Reply;

pub struct Memory {
    state: Mutex<State<MapRows>>,
    keys: Arc<MemoryKeys>,
    ear: OnceLock<Arc<Ear>>,
}

impl Memory {
    pub fn new(rules: Rules) -> Memory {
        let keys = Arc::new(MemoryKeys(Shared::new(keys::Database::volatile())));
        Memory { state: Mutex::new(State::new(MapRows::default(), rules)), keys, ear: OnceLock::new() }
    }

    /// A panic in the rules may have left the state half changed, so nothing more is done with it.
    fn with<T>(&self, act: impl FnOnce(&mut State<MapRows>) -> Result<T>) -> Result<T> {
        match self.state.lock() {
            Ok(mut state) => act(&mut state),
            Err(_) => Err(Error::shard_down("memory", "failed before", Happened::No)),
        }
    }
}

impl Shard for Memory {
    fn apply(&self, ops: Vec<Op>, at: Option<UnixMs>) -> BoxFuture<'_, Applied> {
        let count = ops.len();
        let applied = self.with(|state| {
            let applied = state.apply(ops, at.unwrap_or_else(clock::now));
            let recorded = state.take_recorded();
            if let Some(ear) = self.ear.get() {
                ear.tell_local(recorded);
            }
            applied
        });
        let applied = applied.unwrap_or_else(|error| Applied::failed(count, &error));
        Box::pin(std::future::ready(applied))
    }

    fn queues(&self) -> BoxFuture<'_, Result<Vec<Name>>> {
        Box::pin(std::future::ready(self.with(|state| Ok(state.queues()))))
    }

    fn objects(&self) -> BoxFuture<'_, Result<Vec<(Keyed, Name)>>> {
        Box::pin(std::future::ready(self.with(|state| Ok(state.objects()))))
    }

    fn watch(&self, _: OnWake) {}

    fn follow(&self, ear: Arc<Ear>) {
        // Only the first is told.
        let _ = self.ear.set(ear);
    }

    fn probe(&self) -> BoxFuture<'_, Result<Health>> {
        let health = Health {
            server: "memory".into(),
            durability: "none: everything is lost with the process".into(),
            warnings: Vec::new(),
        };
        Box::pin(std::future::ready(self.with(|_| Ok(health))))
    }

    fn claim(&self, stamp: Stamp) -> BoxFuture<'_, Result<()>> {
        Box::pin(std::future::ready(self.with(|state| state.claim(&stamp))))
    }

    fn stamp(&self) -> BoxFuture<'_, Result<Option<Stamp>>> {
        Box::pin(std::future::ready(self.with(|state| state.stamp())))
    }

    fn note<'a>(
        &'a self,
        role: &'static str,
        _: &'a str,
        name: &'a str,
        text: Option<Bytes>,
    ) -> BoxFuture<'a, Result<bool>> {
        let noted = self.with(|state| {
            state.note(role, name, text);
            Ok(true)
        });
        Box::pin(std::future::ready(noted))
    }

    fn notes(&self, role: &'static str) -> BoxFuture<'_, Result<Vec<(String, Bytes)>>> {
        Box::pin(std::future::ready(self.with(|state| state.notes(role))))
    }

    fn set_rules(&self, rules: Rules) {
        // A state that a panic left is used no more, by whatever rules.
        let _ = self.with(|state| {
            state.set_rules(rules);
            Ok(())
        });
    }

    fn keyspace(&self) -> super::Keyspace {
        super::Keyspace::Local(self.keys.clone())
    }
}

/// The ordinary keys. Each unit also removes a part of what has expired.
struct MemoryKeys(Shared);

impl Keys for MemoryKeys {
    fn run(&self, unit: Unit) -> BoxFuture<'static, Result<Option<Vec<Reply>>>> {
        let done = self.0.with(|keys| (keys.run(&unit, clock::now()), keys.take_changed()));
        let replies = done.map(|(replies, changed)| {
            self.0.tell(&changed);
            replies
        });
        Box::pin(std::future::ready(replies))
    }

    fn version(&self, key: &[u8]) -> u64 {
        self.0.version(key)
    }

    fn observe(&self, on_change: OnChange) {
        self.0.observe(on_change);
    }
}

/// Rows in a map.
#[derive(Clone, Default)]
pub struct MapRows(HashMap<Key, Bytes, foldhash::fast::RandomState>);

impl Rows for MapRows {
    fn get(&self, key: &Key) -> Result<Option<Bytes>> {
        Ok(self.0.get(key).cloned())
    }

    fn put(&mut self, key: Key, value: Bytes) {
        self.0.insert(key, value);
    }

    fn delete(&mut self, key: Key) {
        self.0.remove(&key);
    }

    fn each(&self, table: Table, visit: &mut Visit<'_>) -> Result<()> {
        let is_in = |key: &Key| {
            matches!(
                (table, key),
                (Table::Queues, Key::Queue(_))
                    | (Table::Records, Key::Record(..))
                    | (Table::Jobs, Key::Job(..))
                    | (Table::Uniques, Key::Unique(..))
                    | (Table::Sessions, Key::Session(..))
                    | (Table::Bound, Key::Bound(..))
                    | (Table::Limits, Key::Limits(_))
                    | (Table::Objects, Key::Object(..))
                    | (Table::Deaths, Key::Deaths(..))
                    | (Table::Notes, Key::Note(..))
                    | (Table::Travels, Key::Travel(_))
                    | (Table::Histories, Key::History(..))
                    | (Table::Chunks, Key::Chunk(..))
            )
        };
        self.0.iter().filter(|(key, _)| is_in(key)).try_for_each(|(key, row)| visit(key.clone(), row.clone()))
    }
}
