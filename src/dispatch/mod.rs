//! From plans' words to shards: the shard map, and over it a lane per shard.
//!
//! [`Dispatcher`] is what a session's `execute` asks for: the lane of a shard by name, the home of a key, a place for a
//! new job, all lanes. It holds no truth (law 6): everything here can be rebuilt from the configuration and the shards.

pub mod bound;
pub mod census;
pub mod feed;
pub mod keeper;
pub mod lane;
pub mod layout;
pub mod limits;
pub mod meter;
pub mod mover;
pub mod outboxes;
pub mod post;
pub mod router;
pub mod sampler;
pub mod turnstile;
pub mod waiting;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::{Notify, watch};

use crate::error::{Code, Error, Result};
use crate::job::{Name, group_home};
use crate::shard::{Shard, Stamp};
use feed::Feed;
use lane::Lane;
use layout::{Layout, Standing};
use router::{Candidates, Ring, Strategy};

/// A shard that was opened, under its name.
pub struct ShardEntry {
    pub name: Arc<str>,
    pub shard: Arc<dyn Shard>,
}

/// Where keys have, or had, their homes.
struct Homes {
    ring: Ring,
    /// The lane of each shard of the ring, by its place in the map; `None`: the shard was removed.
    lanes: Vec<Option<usize>>,
}

impl Homes {
    fn new(homes: &layout::Homes, lanes: &[Arc<Lane>]) -> Homes {
        let place = |name: &str| lanes.iter().position(|lane| &**lane.name() == name);
        Homes {
            ring: Ring::new(homes.iter().map(|(name, weight)| (name.as_str(), *weight))),
            lanes: homes.iter().map(|(name, _)| place(name)).collect(),
        }
    }

    fn of(&self, key: &[u8]) -> Option<usize> {
        self.lanes.get(self.ring.home(key)).copied().flatten()
    }
}

/// The shards of a deployment sorted by name, under one version.
pub struct ShardMap {
    pub layout: Layout,
    pub lanes: Vec<Arc<Lane>>,
    weights: Vec<u32>,
    standings: Vec<Standing>,
    /// All shards: for jobs that have no home.
    ring: Ring,
    homes: Homes,
    locks: Homes,
    groups: Homes,
    /// The latest last.
    former: Vec<Homes>,
}

impl ShardMap {
    /// Over lanes that stand in the order of the layout's shards.
    fn new(layout: Layout, lanes: Vec<Arc<Lane>>) -> ShardMap {
        let of_each = layout.members.iter().flat_map(|member| member.shards().map(move |_| member));
        let (weights, standings): (Vec<u32>, Vec<Standing>) =
            of_each.map(|member| (member.weight, member.standing)).unzip();
        let ring = Ring::new(lanes.iter().zip(&weights).map(|(lane, weight)| (&**lane.name(), *weight)));
        let homes = Homes::new(&layout.homes(), &lanes);
        let locks = if layout.locks.is_empty() { layout.homes() } else { layout.locks.clone() };
        let locks = Homes::new(&locks, &lanes);
        let groups = Homes::new(&layout.homes_of_groups(), &lanes);
        let former = layout.former.iter().map(|homes| Homes::new(homes, &lanes)).collect();
        ShardMap { layout, lanes, weights, standings, ring, homes, locks, groups, former }
    }

    pub fn version(&self) -> u64 {
        self.layout.version
    }

    pub fn lane(&self, name: &str) -> Option<&Arc<Lane>> {
        self.lanes.iter().find(|lane| &**lane.name() == name)
    }

    pub fn home(&self, key: &[u8]) -> &Arc<Lane> {
        &self.lanes[self.home_place(key)]
    }

    /// The place of a key's home in the map.
    pub fn home_place(&self, key: &[u8]) -> usize {
        self.homes.of(key).unwrap_or(0)
    }

    /// The place of a lane in the map; its number says nothing of that.
    pub fn place_of(&self, lane: &Lane) -> Option<usize> {
        self.lanes.iter().position(|known| known.name() == lane.name())
    }

    /// The shards that leave or once were told to: no others have batches on their way to other shards.
    pub fn lanes_with_batches(&self) -> impl Iterator<Item = &Arc<Lane>> {
        let has_left = |name: &str| {
            let of_member = |member: &layout::Member| member.shards().any(|shard| shard == name);
            let member = self.layout.members.iter().find(|member| of_member(member));
            member.is_some_and(|member| self.layout.left.contains(&member.name))
        };
        self.lanes.iter().filter(move |lane| has_left(lane.name()))
    }

    fn standing_of(&self, lane: &Lane) -> Option<Standing> {
        self.place_of(lane).map(|place| self.standings[place])
    }

    /// The home of a group of jobs: like that of a lock it stays where it is when shards are added.
    pub fn home_of_group(&self, queue: &Name, group: &[u8]) -> &Arc<Lane> {
        &self.lanes[self.groups.of(&group_home(queue, group)).unwrap_or(0)]
    }

    /// The home of a lock or semaphore; an error while it must not be granted there.
    pub fn home_of_lock(&self, name: &str) -> Result<&Arc<Lane>> {
        let place = self.locks.of(name.as_bytes()).unwrap_or(0);
        match self.standings[place] {
            Standing::Closing => {
                let why = "is about to be removed; nothing was done";
                Err(Error::new(
                    Code::Overloaded,
                    format!("shard {}, the home of '{name}', {why}", self.lanes[place].name()),
                ))
            }
            _ => Ok(&self.lanes[place]),
        }
    }

    /// The same for what a holder asks, and for what else stays where it is when shards are added.
    pub fn lane_of_lock(&self, name: &str) -> &Arc<Lane> {
        &self.lanes[self.place_of_lock(name)]
    }

    pub fn place_of_lock(&self, name: &str) -> usize {
        self.locks.of(name.as_bytes()).unwrap_or(0)
    }

    /// Where else a key had its home, as far as that is remembered, the latest first.
    pub fn former_homes(&self, key: &[u8]) -> Vec<Arc<Lane>> {
        let mut places: Vec<usize> = Vec::new();
        if !self.former.is_empty() {
            let home = self.homes.of(key);
            for place in self.former.iter().rev().filter_map(|homes| homes.of(key)) {
                if Some(place) != home && !places.contains(&place) {
                    places.push(place);
                }
            }
        }
        places.into_iter().map(|place| self.lanes[place].clone()).collect()
    }

    pub fn weight(&self, shard: usize) -> u32 {
        self.weights[shard]
    }

    pub fn standing(&self, shard: usize) -> Standing {
        self.standings[shard]
    }

    /// Whether jobs that name this shard may be elsewhere, as far as that is remembered.
    pub fn was_left(&self, name: &str) -> bool {
        let is_of =
            |left: &String| name == left || name.strip_prefix(left.as_str()).is_some_and(|rest| rest.starts_with('/'));
        self.layout.left.iter().any(is_of)
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
        !self.lanes[shard].is_down() && !self.is_draining(shard)
    }
    fn is_draining(&self, shard: usize) -> bool {
        self.standings[shard] != Standing::Open
    }
    fn load(&self, shard: usize, queue: &Name) -> Option<u64> {
        self.lanes[shard].load(queue)
    }
}

/// Where plans meet shards.
pub struct Dispatcher {
    deployment: String,
    map: RwLock<Arc<ShardMap>>,
    /// The version of the map; read where a lock would cost too much.
    version: AtomicU64,
    changed: watch::Sender<u64>,
    /// Rung when a lane has met a shard with a newer map.
    pub news: Arc<Notify>,
    /// Lanes that were ever made; each has a number of its own.
    lanes_made: AtomicUsize,
    strategy: RwLock<Strategy>,
    /// What this process moves away from shards that are leaving.
    pub journal: mover::Journal,
    feed: Arc<Feed>,
}

impl Dispatcher {
    /// A dispatcher over the shards of a layout, each of which is among those that were opened. The lanes must be run
    /// ([`Lane::run`]) by the caller.
    pub fn new(deployment: String, layout: Layout, shards: Vec<ShardEntry>, strategy: Strategy) -> Dispatcher {
        let version = layout.version;
        let empty = ShardMap::new(Layout::default(), Vec::new());
        let dispatcher = Dispatcher {
            deployment,
            map: RwLock::new(Arc::new(empty)),
            version: AtomicU64::new(version),
            changed: watch::Sender::new(version),
            news: Arc::default(),
            lanes_made: AtomicUsize::new(0),
            strategy: RwLock::new(strategy),
            journal: mover::Journal::default(),
            feed: Arc::default(),
        };
        dispatcher.change_map(layout, shards);
        dispatcher
    }

    /// What happens on the shards, as it happens.
    pub fn feed(&self) -> &Arc<Feed> {
        &self.feed
    }

    pub fn strategy(&self) -> Strategy {
        *self.strategy.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_strategy(&self, strategy: Strategy) {
        *self.strategy.write().unwrap_or_else(PoisonError::into_inner) = strategy;
    }

    pub fn map(&self) -> Arc<ShardMap> {
        self.map.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Hears of each new map.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// What a shard of a layout is stamped with.
    pub fn stamp(&self, layout: &Layout, shard: &str) -> Stamp {
        Stamp {
            deployment: self.deployment.clone(),
            shard: shard.into(),
            map_version: layout.version,
            map: layout.line(),
        }
    }

    /// Goes by another map from here on; `opened` are the shards that have no lane yet. Returns the lanes to be run; those
    /// of shards that are in the map no more are ended.
    pub fn change_map(&self, layout: Layout, opened: Vec<ShardEntry>) -> Vec<Arc<Lane>> {
        let before = self.map();
        let mut opened: HashMap<Arc<str>, Arc<dyn Shard>> =
            opened.into_iter().map(|entry| (entry.name, entry.shard)).collect();
        let (mut lanes, mut fresh) = (Vec::new(), Vec::new());
        for name in layout.members.iter().flat_map(layout::Member::shards) {
            let stamp = self.stamp(&layout, &name);
            if let Some(lane) = before.lane(&name) {
                lane.restamp(stamp);
                lanes.push(lane.clone());
            } else if let Some(shard) = opened.remove(name.as_str()) {
                let number = self.lanes_made.fetch_add(1, Ordering::Relaxed);
                let lane = Lane::new(name.into(), number, shard, stamp, self.news.clone());
                fresh.push(lane.clone());
                lanes.push(lane);
            }
        }
        let version = layout.version;
        let map = Arc::new(ShardMap::new(layout, lanes));
        *self.map.write().unwrap_or_else(PoisonError::into_inner) = map.clone();
        self.version.store(version, Ordering::Release);
        before.lanes.iter().filter(|lane| map.lane(lane.name()).is_none()).for_each(|lane| lane.end());
        self.changed.send_replace(version);
        fresh
    }

    /// The lane of the shard that an id, a receipt or an option names.
    pub fn lane(&self, name: &str) -> Result<Arc<Lane>> {
        self.map().lane(name).cloned().ok_or_else(|| no_shard(name))
    }

    /// The lane for a new job of a queue by the strategy.
    pub fn place(&self, queue: &Name) -> Result<Arc<Lane>> {
        let map = self.map();
        match router::place(self.strategy(), &map.ring, queue, &*map) {
            Some(at) => Ok(map.lanes[at].clone()),
            None => Err(Error::new(Code::ShardDown, "every shard is down or draining; nothing was done")),
        }
    }
}

pub fn no_shard(name: &str) -> Error {
    Error::bad(format!("no shard is named '{name}' here"))
}
