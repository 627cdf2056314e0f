//! Carries out orders to change the shard map.
//!
//! A shard leaves the map only empty. Whether it is cannot be seen while other proxies may still use it by an older map, so
//! it stands as closing first, for longer than any proxy goes by what it knew ([`CLAIM_LASTS`]), and is counted then.

use std::time::Duration;

use bytes::Bytes;

use super::Process;
use crate::command::MapOrder;
use crate::dispatch::lane::{CLAIM_LASTS, Lane};
use crate::dispatch::layout::{Layout, Standing};
use crate::dispatch::limits;
use crate::error::{Error, Result};
use crate::job::JobState;
use crate::resp::reply::Reply;
use crate::shard::{Action, Deed, LimitDeed, Op, Outcome};

/// From the order that a shard leaves to the count of what it holds: what was under way to it has arrived.
const LEAVE_PAUSE: Duration = Duration::from_millis(3 * CLAIM_LASTS.as_millis() as u64);
/// Queues that are asked for their counters together.
const GROUP: usize = 64;

impl Process {
    pub(super) async fn change_map(&self, order: MapOrder) -> Result<Reply> {
        let keeper = &self.keeper;
        match order {
            MapOrder::Drain { shard } => {
                // One that leaves takes no new jobs either; what was begun to be removed only drains again.
                let drain = |layout: &Layout| match layout.member(&shard) {
                    Some(member) if member.standing == Standing::Leaving => Ok(None),
                    _ => layout.set_standing(&shard, Standing::Draining),
                };
                keeper.change(drain).await?;
            }
            MapOrder::Undrain { shard } => {
                keeper.change(|layout| layout.set_standing(&shard, Standing::Open)).await?;
            }
            MapOrder::Weigh { shard, weight } => {
                keeper.change(|layout| layout.set_weight(&shard, weight)).await?;
            }
            MapOrder::Add { shard, url, weight } => {
                let member = keeper.member(&shard, &url, weight)?;
                keeper.change(|layout| layout.add(member.clone())).await?;
            }
            MapOrder::Move { shard } => {
                keeper.change(|layout| layout.set_standing(&shard, Standing::Leaving)).await?;
            }
            MapOrder::Remove { shard } => self.remove(&shard).await?,
            MapOrder::Forget => {
                keeper.change(Layout::forget_former).await?;
            }
        }
        Ok(Reply::OK)
    }

    async fn remove(&self, shard: &str) -> Result<()> {
        self.must_be_empty(shard).await?;
        self.keeper.change(|layout| layout.set_standing(shard, Standing::Closing)).await?;
        tokio::time::sleep(LEAVE_PAUSE).await;
        if let Err(error) = self.must_be_empty(shard).await {
            self.keeper.change(|layout| layout.set_standing(shard, Standing::Leaving)).await?;
            return Err(error);
        }
        let remove = |layout: &Layout| match layout.member(shard) {
            Some(member) if member.standing != Standing::Closing => {
                Err(Error::bad(format!("shard {shard} was told to stay meanwhile; nothing was removed")))
            }
            _ => layout.remove(shard),
        };
        self.keeper.change(remove).await.map(drop)
    }

    /// How many locks and slots of semaphores are held on a shard.
    async fn held(&self, lane: &Lane) -> Result<usize> {
        let mut held = 0;
        for group in lane.shard().objects().await?.chunks(GROUP) {
            lane.room().await?;
            let looks = group.iter().map(|(kind, name)| {
                let action = Action::Keyed { kind: *kind, deed: Deed::Show };
                lane.submit(Op { queue: name.clone(), action }, 0)
            });
            for outcome in looks.collect::<Vec<_>>() {
                match outcome.await {
                    Ok(Ok(Outcome::Holders { holders, .. })) => held += holders.len(),
                    Ok(Err(error)) => return Err(error),
                    _ => return Err(Error::bad(format!("shard {} did not say what is held there", lane.name()))),
                }
            }
        }
        Ok(held)
    }

    /// An error says how many jobs of the shard are not over, those on their way from it included.
    async fn must_be_empty(&self, shard: &str) -> Result<()> {
        let (mut jobs, mut limited) = (0, 0);
        for name in self.keeper.shards_of(shard)? {
            let lane = self.dispatcher.lane(&name)?;
            for group in lane.shard().queues().await?.chunks(GROUP) {
                lane.room().await?;
                let looks = group.iter().flat_map(|queue| {
                    let look = Action::Depart { state: JobState::Ready, count: 0, route: Bytes::new() };
                    let limits = Action::Limit(LimitDeed::Look);
                    [Action::Stats, look, limits].map(|action| lane.submit(Op { queue: queue.clone(), action }, 0))
                });
                for outcome in looks.collect::<Vec<_>>() {
                    match outcome.await {
                        Ok(Ok(Outcome::Stats(stats))) => {
                            jobs += stats.ready + stats.scheduled + stats.leased + stats.dead;
                        }
                        Ok(Ok(Outcome::Departing(departure))) => jobs += departure.jobs.len() as u64,
                        Ok(Ok(Outcome::Limits(view))) => limited += usize::from(limits::keeps_limits(&view)),
                        Ok(Err(error)) => return Err(error),
                        _ => return Err(Error::bad(format!("shard {name} did not say what it holds"))),
                    }
                }
            }
        }
        let mut held = 0;
        for name in self.keeper.shards_of(shard)? {
            held += self.held(&*self.dispatcher.lane(&name)?).await?;
        }
        match jobs {
            0 if held > 0 => {
                Err(Error::bad(format!("shard {shard} has {held} locks or slots that are held; nothing was removed")))
            }
            0 if limited > 0 => Err(Error::bad(format!(
                "shard {shard} keeps the limits of {limited} queues: lift them with 0 and set them again when it is gone; \
                 nothing was removed"
            ))),
            0 => Ok(()),
            jobs => Err(Error::bad(format!(
                "shard {shard} holds {jobs} jobs that are not over: MOVE them first; nothing was removed"
            ))),
        }
    }
}
