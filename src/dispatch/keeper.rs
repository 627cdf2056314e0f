//! Keeps the process's shard map the one that the shards bear, and changes it for all proxies at once.
//!
//! The truth is the newest [`Layout`] that any shard bears in its stamp. Version n+1 is decided by the first shard, in the
//! order of names, of version n: whoever stamps that one first has made it (the shard compares and writes as one), so two
//! proxies that change the map at once cannot make two maps of it; the second hears of the first and begins anew. Only then
//! are the other shards of the old and the new map stamped, each of which tells the proxies that watch it. What a proxy
//! misses it finds when it next claims a shard, within a second of using it ([`super::lane::CLAIM_LASTS`]), or by a slow
//! poll. While the deciding shard is down the map cannot be changed; everything else goes on.
//!
//! Leaves what may be changed to `layout`, and what a map means to the dispatcher.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::Mutex;

use super::layout::{Layout, Member};
use super::{Dispatcher, ShardEntry, ShardMap, no_shard};
use crate::error::{Code, Error, Happened, Result};
use crate::shard::{Shard, Stamp};

/// The slow poll that stands behind wake-ups and claims.
const POLL: Duration = Duration::from_secs(5);
/// How long a shard has to say which map it bears, or to take a new one.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often a change is begun anew because another came first.
const TRIES: usize = 16;

/// Opens shards; what only the wiring can do.
pub trait Open: Send + Sync + 'static {
    /// All shards of a member, as this process reaches them. Servers need not be up.
    fn open(&self, member: &Member) -> Result<Vec<ShardEntry>>;

    /// A member for a URL that a client gave; an error says why it cannot be one.
    fn member(&self, name: &str, url: &str, weight: u32) -> Result<Member>;
}

/// What is done with a lane that is new.
pub type OnLane = Box<dyn Fn(Arc<super::lane::Lane>) + Send + Sync>;

pub struct Keeper {
    dispatcher: Arc<Dispatcher>,
    open: Arc<dyn Open>,
    on_lane: OnLane,
    /// A newer map of the configuration that waits for the shard that decides.
    proposal: std::sync::Mutex<Option<Layout>>,
    /// One change of this process's map at a time.
    changing: Mutex<()>,
}

/// The map to begin with: the configuration's, or the one that the shards bear. With it the configuration's, where that is
/// the newer one and is yet to be decided.
pub struct Beginning {
    pub layout: Layout,
    pub proposal: Option<Layout>,
}

impl Beginning {
    /// Asks the shards of the configuration which map they bear.
    pub async fn find(deployment: &str, config: Layout, open: &dyn Open) -> Result<Beginning> {
        let mut shards = Vec::new();
        for member in &config.members {
            shards.extend(open.open(member)?);
        }
        let Some(stored) = newest(deployment, shards.iter().map(|entry| &entry.shard)).await else {
            return Ok(Beginning { layout: config, proposal: None });
        };
        let (is_same, stored) = (stored.places() == config.places(), with_urls(stored, &config));
        Ok(match stored.version.cmp(&config.version) {
            // Two maps under one version: each shard refuses it, in its own words.
            std::cmp::Ordering::Equal if !is_same => Beginning { layout: config, proposal: None },
            std::cmp::Ordering::Equal => Beginning { layout: stored, proposal: None },
            std::cmp::Ordering::Greater => {
                let (newer, configured) = (stored.version, config.version);
                tracing::info!(
                    newer,
                    configured,
                    "the shards bear a newer map than the configuration: going by theirs"
                );
                Beginning { layout: stored, proposal: None }
            }
            std::cmp::Ordering::Less => {
                // One that cannot be the next is no reason not to serve the present one.
                let proposal = match config.clone().succeed(&stored) {
                    Ok(_) => Some(config),
                    Err(error) => {
                        tracing::warn!(%error, "the newer shard map of the configuration is not taken");
                        None
                    }
                };
                Beginning { proposal, layout: stored }
            }
        })
    }
}

/// A stored map that was written before URLs were, with those of the configuration.
fn with_urls(mut stored: Layout, config: &Layout) -> Layout {
    for member in &mut stored.members {
        // The partitions of a cluster are told from a name by the URL alone.
        let known = config.members.iter().find(|known| {
            known.name == member.name
                || known.partitions > 1 && format!("{}/{}", known.name, known.partitions) == member.name
        });
        if let Some(known) = known.filter(|_| member.url.is_empty()) {
            (member.name, member.partitions, member.url) = (known.name.clone(), known.partitions, known.url.clone());
        }
    }
    stored
}

/// The newest map of the deployment that one of the shards bears.
async fn newest<'a>(deployment: &str, shards: impl Iterator<Item = &'a Arc<dyn Shard>>) -> Option<Layout> {
    let asked = shards.map(|shard| tokio::time::timeout(PATIENCE, shard.stamp()));
    let stamps = join_all(asked).await.into_iter().filter_map(|answer| answer.ok()?.ok()?);
    let newest = stamps.filter(|stamp| stamp.deployment == deployment).max_by_key(|stamp| stamp.map_version)?;
    let layout = Layout::parse(newest.map_version, &newest.map);
    if layout.is_none() {
        tracing::error!(version = newest.map_version, map = newest.map, "the shard map of a shard cannot be read");
    }
    layout
}

impl Keeper {
    pub fn new(
        dispatcher: Arc<Dispatcher>,
        open: Arc<dyn Open>,
        proposal: Option<Layout>,
        on_lane: OnLane,
    ) -> Arc<Keeper> {
        Arc::new(Keeper {
            dispatcher,
            open,
            on_lane,
            proposal: std::sync::Mutex::new(proposal),
            changing: Mutex::default(),
        })
    }

    /// Follows the shards until the process ends.
    pub async fn run(self: Arc<Keeper>) {
        loop {
            let rest = POLL.mul_f64(rand::random_range(0.8..1.2));
            tokio::select! {
                () = self.dispatcher.news.notified() => {}
                () = tokio::time::sleep(rest) => {}
            }
            self.follow().await;
            if let Err(error) = self.propose().await {
                tracing::warn!(%error, "the newer shard map of the configuration waits");
            }
        }
    }

    /// A map of the configuration that is to become the next one, if it is the newer then.
    pub fn set_proposal(&self, layout: Layout) {
        *self.proposal() = Some(layout);
    }

    fn proposal(&self) -> std::sync::MutexGuard<'_, Option<Layout>> {
        self.proposal.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Has the configuration's newer map decided, if there is one.
    pub async fn propose(&self) -> Result<()> {
        let Some(proposal) = self.proposal().clone() else { return Ok(()) };
        let proposed = self
            .change(|layout| match proposal.version > layout.version {
                true => proposal.clone().succeed(layout).map(Some),
                false => Ok(None),
            })
            .await;
        // A newer one may have come meanwhile.
        if proposed.is_ok() {
            self.proposal().take_if(|known| known.version == proposal.version);
        }
        proposed.map(drop)
    }

    /// Reads what the shards bear and goes by the newest.
    pub async fn follow(&self) {
        let _one_at_a_time = self.changing.lock().await;
        self.catch_up().await;
    }

    async fn catch_up(&self) {
        let map = self.dispatcher.map();
        let deployment = self.dispatcher.deployment.as_str();
        let Some(found) = newest(deployment, map.lanes.iter().map(|lane| lane.shard())).await else { return };
        if found.version > map.version()
            && let Err(error) = self.take(found)
        {
            tracing::error!(%error, "cannot go by the newer shard map");
        }
    }

    /// Goes by a map that was decided.
    fn take(&self, layout: Layout) -> Result<()> {
        let map = self.dispatcher.map();
        let mut opened = Vec::new();
        for member in &layout.members {
            if member.shards().any(|name| map.lane(&name).is_none()) {
                opened.extend(self.open.open(member)?);
            }
        }
        has_all(&map, &layout, &opened)?;
        tracing::info!(version = layout.version, map = layout.line(), "shard map changed");
        self.dispatcher.change_map(layout, opened).into_iter().for_each(|lane| (self.on_lane)(lane));
        Ok(())
    }

    /// Changes the map: `next` says what of the present one is to become, or that nothing need be done. Whether something
    /// was done.
    pub async fn change(&self, next: impl Fn(&Layout) -> Result<Option<Layout>>) -> Result<bool> {
        self.change_without(&[], next).await
    }

    /// Takes a shard out of the map that is gone for good, whatever it held.
    pub async fn give_up(&self, name: &str) -> Result<()> {
        let lost = self.shards_of(name)?;
        let map = self.dispatcher.map();
        for lane in lost.iter().filter_map(|name| map.lane(name)) {
            match within(lane.name(), lane.shard().stamp()).await {
                Err(error) if error.code == Code::ShardDown => {}
                Err(error) => return Err(error),
                Ok(_) => {
                    let why = format!("shard {} answers, so it is not lost; nothing was removed", lane.name());
                    return Err(Error::bad(why));
                }
            }
        }
        tracing::warn!(shard = name, "shard is given up with all that it held");
        self.change_without(&lost, |layout| layout.remove(name)).await.map(drop)
    }

    /// The same, decided by the first shard that is not lost.
    async fn change_without(&self, lost: &[String], next: impl Fn(&Layout) -> Result<Option<Layout>>) -> Result<bool> {
        let _one_at_a_time = self.changing.lock().await;
        for _ in 0..TRIES {
            self.catch_up().await;
            let map = self.dispatcher.map();
            let Some(layout) = next(&map.layout)? else { return Ok(false) };
            let mut deciders = map.lanes.iter().filter(|lane| !lost.iter().any(|name| **name == **lane.name()));
            let decides = deciders.next().ok_or_else(|| Error::bad("there is no other shard"))?.clone();
            let fresh = self.open_fresh(&layout).await?;
            let stamp = self.dispatcher.stamp(&layout, decides.name());
            match within(decides.name(), decides.shard().claim(stamp)).await {
                Ok(()) => {}
                Err(error) if error.code == Code::ShardDown => return Err(undecided(&error)),
                // Another came first, or this is no shard of ours; the next look tells.
                Err(error) => match within(decides.name(), decides.shard().stamp()).await? {
                    Some(found) if found.map_version >= layout.version => continue,
                    _ => return Err(error),
                },
            }
            let before = map.lanes.iter().map(|lane| (lane.name().clone(), lane.shard().clone()));
            let after = fresh.iter().map(|entry| (entry.name.clone(), entry.shard.clone()));
            let told: Vec<(Arc<str>, Arc<dyn Shard>)> = before.chain(after).collect();
            let stamps: Vec<Stamp> = told.iter().map(|(name, _)| self.dispatcher.stamp(&layout, name)).collect();
            tracing::info!(version = layout.version, map = layout.line(), "shard map changed by order");
            self.dispatcher.change_map(layout, fresh).into_iter().for_each(|lane| (self.on_lane)(lane));
            let claims = told.iter().zip(stamps).map(|((name, shard), stamp)| within(name, shard.claim(stamp)));
            for (claim, (name, _)) in join_all(claims).await.into_iter().zip(&told) {
                if let Err(error) = claim {
                    // Its lanes stamp it before they use it again.
                    tracing::info!(shard = %name, %error, "a shard has yet to hear of the new map");
                }
            }
            return Ok(true);
        }
        Err(Error::new(Code::Overloaded, "the shard map is being changed by others all the time; nothing was done"))
    }

    /// The shards that a layout adds, each of which answers and is not another's.
    async fn open_fresh(&self, layout: &Layout) -> Result<Vec<ShardEntry>> {
        let map = self.dispatcher.map();
        let mut fresh = Vec::new();
        for member in &layout.members {
            if member.shards().all(|name| map.lane(&name).is_some()) {
                continue;
            }
            for entry in self.open.open(member)? {
                if let Some(found) = within(&entry.name, entry.shard.stamp()).await?
                    && (found.deployment != self.dispatcher.deployment || found.shard != *entry.name)
                {
                    return Err(Error::bad(format!(
                        "the server is the shard {} of the deployment {} already; one server cannot be two",
                        found.shard, found.deployment
                    )));
                }
                fresh.push(entry);
            }
        }
        has_all(&map, layout, &fresh)?;
        Ok(fresh)
    }

    /// A member as a client orders it.
    pub fn member(&self, name: &str, url: &str, weight: u32) -> Result<Member> {
        self.open.member(name, url, weight)
    }

    /// The names of a member's shards in the present map.
    pub fn shards_of(&self, name: &str) -> Result<Vec<String>> {
        let map = self.dispatcher.map();
        map.layout.member(name).map(|member| member.shards().collect()).ok_or_else(|| no_shard(name))
    }
}

/// Whether each shard of a layout has a lane or is opened for one.
fn has_all(map: &ShardMap, layout: &Layout, opened: &[ShardEntry]) -> Result<()> {
    let is_there = |name: &String| map.lane(name).is_some() || opened.iter().any(|entry| *entry.name == **name);
    match layout.members.iter().flat_map(Member::shards).find(|name| !is_there(name)) {
        Some(name) => Err(Error::bad(format!("this configuration opens no shard '{name}', which the map has"))),
        None => Ok(()),
    }
}

async fn within<T>(shard: &str, asked: impl Future<Output = Result<T>>) -> Result<T> {
    let late = |_| Err(Error::shard_down(shard, "did not answer in time", Happened::Maybe));
    tokio::time::timeout(PATIENCE, asked).await.unwrap_or_else(late)
}

/// The shard that decides is down.
fn undecided(error: &Error) -> Error {
    let happened = error.happened;
    Error {
        code: Code::ShardDown,
        text: format!("{}; it decides on changes of the shard map", error.text).into(),
        happened,
    }
}
