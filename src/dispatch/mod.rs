//! From plans' words to shards: the shard map, and over it a lane per shard.
//!
//! [`Dispatcher`] is what a session's `execute` asks for: the lane of a shard by name, the home of a key, a place for a
//! new job, all lanes. It holds no truth (law 6): everything here can be rebuilt from the configuration and the shards.

pub mod bound;
pub mod lane;
pub mod limits;
pub mod meter;
pub mod outboxes;
pub mod router;
pub mod sampler;
pub mod turnstile;
pub mod waiting;

use std::sync::{Arc, PoisonError, RwLock};

use crate::error::{Code, Error, Result};
use crate::job::Name;
use crate::shard::{Shard, Stamp};
use lane::Lane;
use router::{Candidates, Ring, Strategy};

/// One shard as the configuration names it.
pub struct ShardEntry {
    pub name: Arc<str>,
    pub weight: u32,
    pub shard: Arc<dyn Shard>,
}

/// What proxies must agree on before they share shards.
#[derive(Clone, Debug)]
pub struct MapStamp {
    pub deployment: String,
    pub version: u64,
    /// The map in one line: what decides where a job goes.
    pub line: String,
}

/// The shards of a deployment in the order of their configuration, under one version.
pub struct ShardMap {
    pub version: u64,
    pub lanes: Vec<Arc<Lane>>,
    weights: Vec<u32>,
    ring: Ring,
}

impl ShardMap {
    pub fn lane(&self, name: &str) -> Option<&Arc<Lane>> {
        self.lanes.iter().find(|lane| &**lane.name() == name)
    }

    pub fn home(&self, key: &[u8]) -> &Arc<Lane> {
        &self.lanes[self.ring.home(key)]
    }

    /// The index of the shard that owns a key.
    pub fn home_index(&self, key: &[u8]) -> usize {
        self.ring.home(key)
    }

    pub fn weight(&self, shard: usize) -> u32 {
        self.weights[shard]
    }
}

impl Candidates for ShardMap {
    fn count(&self) -> usize {
        self.lanes.len()
    }
    fn weight(&self, shard: usize) -> u32 {
        self.weights[shard]
    }
    fn takes_jobs(&self, shard: usize) -> bool {
        !self.lanes[shard].is_down() && !self.lanes[shard].is_draining()
    }
    fn is_draining(&self, shard: usize) -> bool {
        self.lanes[shard].is_draining()
    }
    fn load(&self, shard: usize, queue: &Name) -> Option<u64> {
        self.lanes[shard].load(queue)
    }
}

/// Where plans meet shards.
pub struct Dispatcher {
    map: RwLock<Arc<ShardMap>>,
    strategy: Strategy,
}

impl Dispatcher {
    /// A dispatcher over at least one shard. The lanes must be run ([`Lane::run`]) by the caller.
    pub fn new(shards: Vec<ShardEntry>, map: MapStamp, strategy: Strategy) -> Dispatcher {
        let version = map.version;
        let stamp = |name: &str| Stamp {
            deployment: map.deployment.clone(),
            shard: name.into(),
            map_version: version,
            map: map.line.clone(),
        };
        let ring = Ring::new(shards.iter().map(|entry| (&*entry.name, entry.weight)));
        let weights = shards.iter().map(|entry| entry.weight).collect();
        let lanes = shards
            .into_iter()
            .enumerate()
            .map(|(index, entry)| {
                let stamp = stamp(&entry.name);
                Lane::new(entry.name, index, entry.shard, stamp)
            })
            .collect();
        Dispatcher { map: RwLock::new(Arc::new(ShardMap { version, lanes, weights, ring })), strategy }
    }

    pub fn strategy(&self) -> Strategy {
        self.strategy
    }

    pub fn map(&self) -> Arc<ShardMap> {
        self.map.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The lane of the shard that an id, a receipt or an option names.
    pub fn lane(&self, name: &str) -> Result<Arc<Lane>> {
        self.map().lane(name).cloned().ok_or_else(|| Error::bad(format!("no shard is named '{name}' here")))
    }

    /// The lane for a new job of a queue by the strategy.
    pub fn place(&self, queue: &Name) -> Result<Arc<Lane>> {
        let map = self.map();
        match router::place(self.strategy, &map.ring, queue, &*map) {
            Some(at) => Ok(map.lanes[at].clone()),
            None => Err(Error::new(Code::ShardDown, "every shard is down or draining; nothing was done")),
        }
    }
}
