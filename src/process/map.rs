//! Carries out orders to change the shard map.
//!
//! A shard leaves the map only empty. Whether it is cannot be seen while other proxies may still use it by an older map, so
//! it stands as closing first, for longer than any proxy goes by what it knew ([`CLAIM_LASTS`]), and is counted then.

use std::time::Duration;

use super::Process;
use crate::command::MapOrder;
use crate::dispatch::census::{self, Census};
use crate::dispatch::lane::CLAIM_LASTS;
use crate::dispatch::layout::{Layout, Standing};
use crate::dispatch::mover;
use crate::error::{Error, Result};
use crate::resp::reply::Reply;

/// From the order that a shard leaves to the count of what it holds: what was under way to it has arrived.
const LEAVE_PAUSE: Duration = Duration::from_millis(3 * CLAIM_LASTS.as_millis() as u64);

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
            MapOrder::Remove { shard, lost: false } => self.remove(&shard).await?,
            MapOrder::Remove { shard, lost: true } => keeper.give_up(&shard).await?,
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

    /// An error says what would go with the shard. Nothing may be on its way to it either: the batch could go nowhere else.
    async fn must_be_empty(&self, shard: &str) -> Result<()> {
        let names = self.keeper.shards_of(shard)?;
        let mut census = Census::default();
        for name in &names {
            census += census::take(&*self.dispatcher.lane(name)?).await?;
        }
        census.none(shard)?;
        for lane in self.dispatcher.map().lanes_with_batches() {
            for (queue, route) in census::routes(lane).await? {
                if names.iter().any(|name| mover::leads_to(&route, name)) {
                    return Err(Error::bad(format!(
                        "jobs of {queue} are on their way from shard {} to {shard}; nothing was removed",
                        lane.name()
                    )));
                }
            }
        }
        Ok(())
    }
}
