//! Jobs that are found by a key: at its home, and where it had its home before.
//!
//! Homes move with the shard map. As long as former homes are remembered, a job with an id or a unique key is first looked
//! for there ([`Action::Seek`], which also shuts out proxies that know of no newer homes), and only then given to its home:
//! a second job of the same key cannot slip in. What names a job looks at former homes first, too: jobs move from there to
//! the home, so in that order none is missed. Where homes never moved none of this happens.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use super::{
    Answer, Asker, Done, Later, ask, graver, lane_gone, no_such_job, on_its_way, partly, placed_id, queue_full,
    unexpected,
};
use crate::command::{JobAddress, Render, Route};
use crate::dispatch::lane::Lane;
use crate::dispatch::{Dispatcher, ShardMap};
use crate::error::{Error, Result};
use crate::job::{JobRef, Name, Policy, format_id};
use crate::resp::reply::Reply;
use crate::shard::{Action, Op, Outcome, Placed};

/// How long a request waits for the newer shard map that a shard knows of.
const MAP_WAIT: Duration = Duration::from_secs(2);
/// How often it waits for one.
const TRIES: usize = 3;
/// How soon a job on its way is looked for again, and how often.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const LOOKS: usize = 100;

/// An enqueue with an `ID` or `UNIQUE`.
#[derive(Clone)]
pub struct Keyed {
    pub op: Op,
    pub nx: bool,
    pub asker: Asker,
}

impl Keyed {
    fn policy(&self) -> Option<&Arc<Policy>> {
        match &self.op.action {
            Action::Enqueue { policy, .. } => Some(policy),
            _ => None,
        }
    }

    /// What decides the home.
    fn key(&self) -> Bytes {
        let policy = self.policy();
        let key = policy.and_then(|policy| policy.id.as_ref().or(policy.unique.as_ref().map(|(key, _)| key)));
        key.cloned().unwrap_or_default()
    }

    /// The op, as of this map.
    fn op_by(&self, map: &ShardMap) -> Op {
        let mut op = self.op.clone();
        if map.layout.homes_since > 0
            && let Action::Enqueue { policy, .. } = &mut op.action
        {
            *policy = Arc::new(Policy { homes_since: map.layout.homes_since, ..(**policy).clone() });
        }
        op
    }
}

pub fn enqueue(keyed: Keyed, dispatcher: &Arc<Dispatcher>) -> Answer {
    let map = dispatcher.map();
    let lane = map.home(&keyed.key()).clone();
    if !map.former_homes(&keyed.key()).is_empty() || !lane.has_room() {
        return Answer::Later(again(keyed, dispatcher.clone()));
    }
    let outcome = lane.submit(keyed.op_by(&map), keyed.asker.session);
    Answer::Keyed { outcome, keyed, shard: lane.name().clone(), dispatcher: dispatcher.clone() }
}

/// The reply to an enqueue; `None` when it was placed by an older map than the shard knows of, or than `map`, where the shard is
/// no more. It may be tried again, since its key is held once.
pub fn read(outcome: Result<Outcome>, keyed: &Keyed, shard: &str, map: &ShardMap) -> Option<Result<Reply>> {
    let placed = match outcome {
        Ok(Outcome::Enqueued(placed)) => placed.into_iter().next(),
        Ok(Outcome::Full(_)) => return Some(Err(queue_full())),
        Ok(other) => return Some(Err(unexpected(&other))),
        Err(_) if map.lane(shard).is_none() => return None,
        Err(error) => return Some(Err(error)),
    };
    let id = || keyed.policy().and_then(|policy| policy.id.clone());
    match placed {
        Some(Placed::Outdated) => None,
        Some(placed) => Some(placed_id(placed, id(), shard, keyed.nx)),
        None => Some(Ok(Reply::Null)),
    }
}

/// The same in steps: former homes, then the home; and anew when the map changes meanwhile.
pub fn again(keyed: Keyed, dispatcher: Arc<Dispatcher>) -> Later {
    Box::pin(async move {
        let mut changes = dispatcher.changes();
        for _ in 0..TRIES {
            let map = dispatcher.map();
            match in_steps(&keyed, &map, &dispatcher).await {
                Ok(Some(reply)) => return Done::Reply(reply),
                Ok(None) if !Arc::ptr_eq(&map, &dispatcher.map()) => {}
                Ok(None) => {
                    dispatcher.news.notify_one();
                    // Late or not: it is tried by the map that is there then.
                    let _ = tokio::time::timeout(MAP_WAIT, changes.changed()).await;
                }
                Err(error) => return Done::Reply(error.into()),
            }
        }
        Done::Reply(placed_id(Placed::Outdated, None, "", keyed.nx).unwrap_or_else(Reply::Error))
    })
}

async fn in_steps(keyed: &Keyed, map: &ShardMap, dispatcher: &Dispatcher) -> Result<Option<Reply>> {
    let Some(policy) = keyed.policy() else { return Ok(Some(Reply::Null)) };
    for lane in map.former_homes(&keyed.key()) {
        let (id, unique) = (policy.id.clone(), policy.unique.as_ref().map(|(key, _)| key.clone()));
        let action = Action::Seek { id, unique, homes_since: map.layout.homes_since };
        let sought = ask(&lane, Op { queue: keyed.op.queue.clone(), action }, keyed.asker).await;
        if !matches!(&sought, Ok(Outcome::Enqueued(placed)) if placed.is_empty()) {
            return read(sought, keyed, lane.name(), &dispatcher.map()).transpose();
        }
    }
    let lane = map.home(&keyed.key()).clone();
    let outcome = ask(&lane, keyed.op_by(map), keyed.asker).await;
    read(outcome, keyed, lane.name(), &dispatcher.map()).transpose()
}

/// A lane, and what its shard calls the job.
type Place = (Arc<Lane>, JobRef);

/// Whether what this route names may be somewhere else than it says.
pub fn may_be_elsewhere(route: &Route, map: &ShardMap) -> bool {
    match route {
        Route::Shard(name) => map.was_left(name),
        Route::Key(key) => !map.former_homes(key).is_empty(),
    }
}

/// Where a job that an op names may be, in the order in which to look; `None`: where its route says.
pub fn places_of(route: &Route, action: &Action, map: &ShardMap) -> Result<Option<Vec<Place>>> {
    let (Action::Job { job } | Action::Cancel { job } | Action::DeadGet { job }) = action else {
        return match route {
            // What was leased there could not leave it, so it is over, and forgotten.
            Route::Shard(name) if map.lane(name).is_none() && map.was_left(name) => Err(no_such_job()),
            _ => Ok(None),
        };
    };
    match may_be_elsewhere(route, map) {
        true => Ok(Some(places(route, job, map))),
        false => Ok(None),
    }
}

fn places(route: &Route, job: &JobRef, map: &ShardMap) -> Vec<Place> {
    match (route, job) {
        (Route::Key(key), _) => {
            let former = map.former_homes(key).into_iter();
            former.chain([map.home(key).clone()]).map(|lane| (lane, job.clone())).collect()
        }
        (Route::Shard(name), JobRef::Seq(seq)) => {
            let mut id = BytesMut::new();
            format_id(&mut id, *seq, name);
            let id = id.freeze();
            let own = map.lane(name).map(|lane| (lane.clone(), job.clone()));
            // One that came back to its first shard has its old id there as a chosen one.
            let travelled = map.lanes.iter().map(|lane| (lane.clone(), JobRef::Chosen(id.clone())));
            own.into_iter().chain(travelled).collect()
        }
        (Route::Shard(name), JobRef::Chosen(_)) => {
            map.lane(name).map(|lane| (lane.clone(), job.clone())).into_iter().collect()
        }
    }
}

fn named(action: &Action, job: JobRef) -> Action {
    match action {
        Action::Cancel { .. } => Action::Cancel { job },
        Action::DeadGet { .. } => Action::DeadGet { job },
        _ => Action::Job { job },
    }
}

/// Asks place after place until one knows the job.
pub fn look(places: Vec<Place>, op: Op, render: Render, asker: Asker) -> Answer {
    Answer::Later(Box::pin(async move {
        for _ in 0..LOOKS {
            match look_once(&places, &op, asker).await {
                Ok((Outcome::OnItsWay, _)) => tokio::time::sleep(LOOK_AGAIN).await,
                Ok((outcome, shard)) => return Done::Reply(render(outcome, &op.queue, &shard)),
                Err(error) => return Done::Reply(error.into()),
            }
        }
        Done::Reply(on_its_way().into())
    }))
}

async fn look_once(places: &[Place], op: &Op, asker: Asker) -> Result<(Outcome, Arc<str>)> {
    let (mut nothing, mut failure) = (None, None);
    for (lane, job) in places {
        let op = Op { queue: op.queue.clone(), action: named(&op.action, job.clone()) };
        match ask(lane, op, asker).await {
            Ok(outcome @ (Outcome::Job(None) | Outcome::Count(0))) => nothing = Some((outcome, lane.name().clone())),
            Ok(outcome) => return Ok((outcome, lane.name().clone())),
            // It may be just there.
            Err(error) => failure = Some(graver(failure, error)),
        }
    }
    failure.map_or_else(|| nothing.ok_or_else(lane_gone), Err)
}

/// Does something to each of some jobs, wherever it is, and counts for how many.
pub fn count_each(
    queue: Name,
    jobs: Vec<JobAddress>,
    action: fn(Vec<JobRef>) -> Action,
    map: Arc<ShardMap>,
    asker: Asker,
) -> Answer {
    Answer::Later(Box::pin(async move {
        let (mut total, mut failure) = (0, None);
        for address in jobs {
            let places = match may_be_elsewhere(&address.route, &map) {
                true => places(&address.route, &address.job, &map),
                false => match super::lane_in(&address.route, &map) {
                    Ok(lane) => vec![(lane, address.job)],
                    Err(error) => {
                        failure = Some(graver(failure, error));
                        continue;
                    }
                },
            };
            for (lane, job) in places {
                match ask(&lane, Op { queue: queue.clone(), action: action(vec![job]) }, asker).await {
                    Ok(Outcome::Count(0)) => {}
                    Ok(Outcome::Count(count)) => {
                        total += count;
                        break;
                    }
                    Ok(other) => failure = Some(graver(failure, unexpected(&other))),
                    Err(error) => failure = Some(graver(failure, error)),
                }
            }
        }
        Done::Reply(failure.map_or(Reply::count(total), |error: Error| partly(error, total).into()))
    }))
}
