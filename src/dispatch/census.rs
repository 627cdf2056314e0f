//! What a shard still holds: asked before it may leave the map.

use bytes::Bytes;

use super::lane::Lane;
use super::limits;
use crate::error::{Error, Result};
use crate::job::{JobState, Name};
use crate::shard::{Action, Deed, LimitDeed, Op, Outcome, TravelMark};

/// Operations that are asked together.
const GROUP: usize = 64;

/// All that would go with a shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Jobs that are not over, those on their way to other shards included.
    pub jobs: u64,
    /// Locks and slots of semaphores that are held.
    pub held: u64,
    /// Queues whose limits are kept there.
    pub limited: u64,
}

impl Census {
    /// An error says what there is.
    pub fn none(self, shard: &str) -> Result<()> {
        match self {
            Census { jobs: 1.., .. } => Err(Error::bad(format!(
                "shard {shard} holds {} jobs that are not over: MOVE them first; nothing was removed",
                self.jobs
            ))),
            Census { held: 1.., .. } => Err(Error::bad(format!(
                "shard {shard} has {} locks or slots that are held; nothing was removed",
                self.held
            ))),
            Census { limited: 1.., .. } => Err(Error::bad(format!(
                "shard {shard} keeps the limits of {} queues: lift them with 0 and set them again when it is gone; \
                 nothing was removed",
                self.limited
            ))),
            _ => Ok(()),
        }
    }
}

impl std::ops::AddAssign for Census {
    fn add_assign(&mut self, other: Census) {
        self.jobs += other.jobs;
        self.held += other.held;
        self.limited += other.limited;
    }
}

/// Counts, in every queue and every object of the shard.
pub async fn take(lane: &Lane) -> Result<Census> {
    let mut census = Census::default();
    for queues in lane.shard().queues().await?.chunks(GROUP) {
        let looks = queues.iter().flat_map(|queue| {
            [Action::Stats, look_at_batch(), Action::Limit(LimitDeed::Look)].map(|action| op(queue, action))
        });
        for outcome in ask(lane, looks).await? {
            match outcome {
                Outcome::Stats(stats) => census.jobs += stats.ready + stats.scheduled + stats.leased + stats.dead,
                Outcome::Departing(departure) => census.jobs += departure.jobs.len() as u64,
                Outcome::Limits(view) => census.limited += u64::from(limits::keeps_limits(&view)),
                other => return Err(strange(lane, &other)),
            }
        }
    }
    for objects in lane.shard().objects().await?.chunks(GROUP) {
        let looks = objects.iter().map(|(kind, name)| op(name, Action::Keyed { kind: *kind, deed: Deed::Show }));
        for outcome in ask(lane, looks).await? {
            match outcome {
                Outcome::Holders { holders, .. } => census.held += holders.len() as u64,
                other => return Err(strange(lane, &other)),
            }
        }
    }
    Ok(census)
}

/// The routes of the batches that are on their way from the shard, by queue.
pub async fn routes(lane: &Lane) -> Result<Vec<(Name, Bytes)>> {
    let mut routes = Vec::new();
    for queues in lane.shard().queues().await?.chunks(GROUP) {
        let looks = queues.iter().map(|queue| op(queue, look_at_batch()));
        for (queue, outcome) in queues.iter().zip(ask(lane, looks).await?) {
            match outcome {
                Outcome::Departing(departure) if departure.jobs.is_empty() => {}
                Outcome::Departing(departure) => routes.push((queue.clone(), departure.route)),
                other => return Err(strange(lane, &other)),
            }
        }
    }
    Ok(routes)
}

/// Takes no job: answers the batch that is on its way.
fn look_at_batch() -> Action {
    Action::Depart { state: JobState::Ready, count: 0, route: Bytes::new(), outdated: TravelMark::default() }
}

fn op(name: &Name, action: Action) -> Op {
    Op { queue: name.clone(), action }
}

async fn ask(lane: &Lane, ops: impl Iterator<Item = Op>) -> Result<Vec<Outcome>> {
    lane.room().await?;
    let mut outcomes = Vec::new();
    for asked in ops.map(|op| lane.submit(op, 0)).collect::<Vec<_>>() {
        let gone = |_| Err(Error::bad(format!("shard {} was removed meanwhile", lane.name())));
        outcomes.push(asked.await.unwrap_or_else(gone)?);
    }
    Ok(outcomes)
}

fn strange(lane: &Lane, outcome: &Outcome) -> Error {
    Error::bad(format!("shard {} did not say what it holds, but {outcome:?}", lane.name()))
}
