//! The shard that keeps its jobs in memory only: the rules themselves, for tests, trials and what may be lost.
//!
//! It is the model that the other shards are compared with, so there is nothing in it but [`State`] and a map.

use bytes::Bytes;
use std::collections::HashMap;
use std::sync::Mutex;

use super::state::State;
use super::state::rows::{Key, Rows, Table, Visit};
use super::{Applied, BoxFuture, Health, OnWake, Op, Rules, Shard, Stamp};
use crate::clock::{self, UnixMs};
use crate::error::{Error, Happened, Result};
use crate::job::Name;

pub struct Memory {
    state: Mutex<State<MapRows>>,
}

impl Memory {
    pub fn new(rules: Rules) -> Memory {
        Memory { state: Mutex::new(State::new(MapRows::default(), rules)) }
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
        let applied = self.with(|state| state.apply(ops, at.unwrap_or_else(clock::now)));
        let applied = applied.unwrap_or_else(|error| Applied::failed(count, &error));
        Box::pin(std::future::ready(applied))
    }

    fn queues(&self) -> BoxFuture<'_, Result<Vec<Name>>> {
        Box::pin(std::future::ready(self.with(|state| Ok(state.queues()))))
    }

    fn watch(&self, _: OnWake) {}

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
            )
        };
        self.0.iter().filter(|(key, _)| is_in(key)).try_for_each(|(key, row)| visit(key.clone(), row.clone()))
    }
}
