//! Empties shards that are leaving: their waiting and dead jobs go to the others, in bounded batches.
//!
//! A batch is taken out of its order on the shard that leaves, under a number and a *route* that says which shard gets which
//! job; it is added on each of these, where a repeat adds nothing; it is removed. All three steps are commits of one shard,
//! and what is to be done next stands on the shard that leaves: a mover that died is resumed by any other, by the batch's own
//! route. One proxy at a time moves the jobs of a shard ([`crate::shard::Shard::lead`]); two would only be slower.
//!
//! Jobs whose id or unique key has a home go to it; the others by weight to those that take new jobs. Leased ones stay
//! until they come back or are over. A job keeps its id: one that its old shard has made is from here on like one that a
//! client chose, so it is found on whichever shard it is.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use dashmap::DashMap;

use super::lane::Lane;
use super::layout::Standing;
use super::router::Ring;
use super::{Dispatcher, ShardMap};
use crate::error::{Error, Happened, Result};
use crate::job::{JobState, JobView, Name, Policy, Spec, format_id, group_home};
use crate::shard::{Action, Departure, Op, Outcome, TravelMark};

/// The role, as the shard knows it.
const ROLE: &str = "mover";
/// How long a proxy has the role after it last asked.
const LEAD_MS: u64 = 5_000;
/// Between two looks at a shard that is leaving: a leased job comes back, a proxy with an older map has added one.
const PAUSE: Duration = Duration::from_millis(500);
/// Most jobs in one batch.
const BATCH_JOBS_MAX: u64 = 250;
/// What goes to another shard, in this order.
const STATES: [JobState; 3] = [JobState::Ready, JobState::Scheduled, JobState::Dead];

/// How far it is, as this process knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Jobs that this process has moved.
    pub moved: u64,
    /// Jobs that were still there at the last look, leased ones included.
    pub left: u64,
}

/// By the name of the shard that is leaving.
pub type Journal = DashMap<Arc<str>, Progress>;

/// Moves what there is to move, until the process ends; `holder` names this process.
pub async fn run(dispatcher: Arc<Dispatcher>, holder: Arc<str>) {
    let mut changes = dispatcher.changes();
    loop {
        let map = dispatcher.map();
        let leaving: Vec<&Arc<Lane>> =
            map.lanes.iter().enumerate().filter(|(at, _)| map.standing(*at).leaves()).map(|(_, l)| l).collect();
        dispatcher.journal.retain(|name, _| leaving.iter().any(|lane| lane.name() == name));
        for lane in &leaving {
            if let Err(error) = empty(lane, &map, &dispatcher.journal, &holder).await {
                tracing::info!(shard = %lane.name(), %error, "moving its jobs rests");
            }
        }
        match leaving.is_empty() {
            true => drop(changes.changed().await),
            false => tokio::time::sleep(PAUSE).await,
        }
    }
}

async fn ask(lane: &Lane, queue: &Name, action: Action) -> Result<Outcome> {
    lane.room().await?;
    let asked = lane.submit(Op { queue: queue.clone(), action }, 0);
    asked.await.unwrap_or_else(|_| Err(Error::shard_down(lane.name(), "was removed", Happened::Maybe)))
}

/// One look at all queues of a shard. A queue that cannot be moved now does not keep the others.
async fn empty(lane: &Lane, map: &ShardMap, journal: &Journal, holder: &str) -> Result<()> {
    let (mut left, mut failure) = (0, None);
    for queue in lane.shard().queues().await? {
        match empty_queue(lane, map, journal, holder, &queue).await {
            Ok(true) => {}
            Ok(false) => {
                journal.remove(lane.name());
                return Ok(());
            }
            Err(error) => failure = Some(error),
        }
        if let Outcome::Stats(stats) = ask(lane, &queue, Action::Stats).await? {
            left += stats.ready + stats.scheduled + stats.leased + stats.dead;
        }
    }
    journal.entry(lane.name().clone()).or_default().left = left;
    failure.map_or(Ok(()), Err)
}

/// Moves the jobs of one queue; false when somebody else has the role.
async fn empty_queue(lane: &Lane, map: &ShardMap, journal: &Journal, holder: &str, queue: &Name) -> Result<bool> {
    for state in STATES {
        loop {
            if !lane.shard().lead(ROLE, holder, LEAD_MS).await? {
                return Ok(false);
            }
            let action = Action::Depart { state, count: BATCH_JOBS_MAX, route: route(map).into() };
            let departure = match ask(lane, queue, action).await? {
                Outcome::Departing(departure) => departure,
                other => return Err(Error::bad(format!("the shard answered a departure with {other:?}"))),
            };
            let Departure { mark, route, jobs } = departure;
            if jobs.is_empty() {
                break;
            }
            let count = jobs.len() as u64;
            deliver(lane, map, queue, mark, &route, jobs).await?;
            ask(lane, queue, Action::Departed { mark }).await?;
            journal.entry(lane.name().clone()).or_default().moved += count;
        }
    }
    Ok(true)
}

/// Adds a batch where its route says.
async fn deliver(
    lane: &Lane,
    map: &ShardMap,
    queue: &Name,
    mark: TravelMark,
    route: &Bytes,
    jobs: Vec<JobView>,
) -> Result<()> {
    let route = Route::parse(route).ok_or_else(|| Error::bad("the route of a batch cannot be read"))?;
    let mut parts: Vec<(&str, Vec<JobView>)> = Vec::new();
    for job in jobs {
        let target = route.target(queue, &job);
        let job = with_id(job, lane.name());
        match parts.iter_mut().find(|(name, _)| *name == target) {
            Some((_, part)) => part.push(job),
            None => parts.push((target, vec![job])),
        }
    }
    for (target, jobs) in parts {
        let target = map.lane(target).ok_or_else(|| super::no_shard(target))?;
        let source = Bytes::copy_from_slice(lane.name().as_bytes());
        let action = Action::Arrive { source, mark, jobs: Arc::new(jobs) };
        ask(target, queue, action).await?;
    }
    Ok(())
}

/// The job under the id by which it is known.
fn with_id(mut job: JobView, shard: &str) -> JobView {
    if job.spec.policy.id.is_none() {
        let mut id = BytesMut::new();
        format_id(&mut id, job.seq, shard);
        let policy = Policy { id: Some(id.freeze()), ..(*job.spec.policy).clone() };
        job.spec = Spec { policy: Arc::new(policy), payload: job.spec.payload };
    }
    job
}

/// Names and weights of the homes, behind a semicolon of the shards that take new jobs, and behind another of the homes of
/// groups.
fn route(map: &ShardMap) -> String {
    let list = |homes: Vec<(String, u32)>| {
        homes.iter().map(|(name, weight)| format!("{name}*{weight}")).collect::<Vec<_>>().join(",")
    };
    let open = map.lanes.iter().enumerate().filter(|(at, _)| map.standing(*at) == Standing::Open);
    let open = open.map(|(at, lane)| (lane.name().to_string(), map.weight(at)));
    format!("{};{};{}", list(map.layout.homes()), list(open.collect()), list(map.layout.homes_of_groups()))
}

struct Route {
    homes: (Vec<String>, Ring),
    open: (Vec<String>, Ring),
    groups: (Vec<String>, Ring),
}

impl Route {
    fn parse(text: &[u8]) -> Option<Route> {
        let (homes, rest) = std::str::from_utf8(text).ok()?.split_once(';')?;
        let (open, groups) = rest.split_once(';')?;
        let read = |list: &str| {
            let place = |text: &str| {
                let (name, weight) = text.rsplit_once('*')?;
                Some((name.to_owned(), weight.parse().ok()?))
            };
            let places: Vec<(String, u32)> = list.split(',').map(place).collect::<Option<_>>()?;
            let ring = Ring::new(places.iter().map(|(name, weight)| (name.as_str(), *weight)));
            Some((places.into_iter().map(|(name, _)| name).collect(), ring))
        };
        Some(Route { homes: read(homes)?, open: read(open)?, groups: read(groups)? })
    }

    /// The same for the same job, whoever asks.
    fn target(&self, queue: &Name, job: &JobView) -> &str {
        let policy = &job.spec.policy;
        if let Some((group, _)) = &policy.group {
            let (names, ring) = &self.groups;
            return names.get(ring.home(&group_home(queue, group))).map_or("", String::as_str);
        }
        let own = |id: &&Bytes| crate::job::parse_chosen_id(id).is_ok();
        let key = policy.id.as_ref().filter(own).or(policy.unique.as_ref().map(|(key, _)| key));
        let ((names, ring), key) = match key {
            Some(key) => (&self.homes, key.clone()),
            None => (&self.open, Bytes::copy_from_slice(&job.seq.to_be_bytes())),
        };
        names.get(ring.home(&key)).map_or("", String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(seq: u64, id: Option<&'static str>) -> JobView {
        let policy = Policy { id: id.map(Bytes::from), ..Policy::default() };
        JobView {
            seq,
            spec: Spec { policy: Arc::new(policy), payload: Bytes::new() },
            state: JobState::Ready,
            enqueued_at: 1,
            attempt: 1,
            lapses: 0,
            redrives: 0,
            due_at: None,
            lease_until: None,
            started_at: None,
            finished_at: None,
            worker: Bytes::new(),
            error: Bytes::new(),
            trace: Bytes::new(),
            result: Bytes::new(),
            progress: None,
            progress_text: Bytes::new(),
        }
    }

    #[test]
    fn a_job_keeps_its_id_and_goes_home_or_by_weight() {
        let route = Route::parse(b"a*1,b*1;c*1,d*3;e*1").unwrap();
        assert_eq!(with_id(job(35, None), "s0").spec.policy.id, Some("z~s0".into()));
        assert_eq!(with_id(job(35, Some("mine")), "s0").spec.policy.id, Some("mine".into()));
        let queue = Name::parse(b"main").unwrap();
        let to = |job: &JobView| route.target(&queue, job).to_owned();
        assert!((0..50).all(|seq| ["c", "d"].contains(&&*to(&job(seq, None)))));
        assert!(["a", "b"].contains(&&*to(&job(1, Some("mine")))));
        // One that has come from elsewhere has an id, but no home.
        assert!(["c", "d"].contains(&&*to(&job(1, Some("3f~s9")))));
        let heavy = (0..4_000).filter(|seq| to(&job(*seq, None)) == "d").count();
        assert!((2_800..=3_200).contains(&heavy), "{heavy} of 4,000");
        assert!(Route::parse(b"a*1;b*1").is_none() && Route::parse(b"a;b*1;c*1").is_none());
    }
}
