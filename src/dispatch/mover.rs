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
use super::{Dispatcher, ShardMap, census};
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
    // The map under which no batch is left on shards that were told to stay.
    let mut settled = None;
    loop {
        let map = dispatcher.map();
        let (leaving, staying): (Vec<_>, Vec<_>) =
            map.lanes_with_batches().partition(|lane| map.standing_of(lane).is_some_and(Standing::leaves));
        dispatcher.journal.retain(|name, _| leaving.iter().any(|lane| lane.name() == name));
        let mover = Mover { dispatcher: &dispatcher, map: &map, holder: &holder, route: route(&map).into() };
        for lane in &leaving {
            if let Err(error) = mover.empty(lane).await {
                tracing::info!(shard = %lane.name(), %error, "moving its jobs rests");
            }
        }
        if settled != Some(map.version()) {
            let mut is_settled = true;
            for lane in staying {
                is_settled &= mover.finish(lane).await.unwrap_or_else(|error| {
                    tracing::info!(shard = %lane.name(), %error, "what was on its way from it waits");
                    false
                });
            }
            settled = is_settled.then_some(map.version());
        }
        match leaving.is_empty() && settled == Some(dispatcher.version()) {
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

/// One pass, by one map.
struct Mover<'a> {
    dispatcher: &'a Dispatcher,
    map: &'a ShardMap,
    holder: &'a str,
    route: Bytes,
}

/// What became of a look for a batch.
enum Step {
    Moved(u64),
    Nothing,
    /// Another proxy has the role, or the map is another.
    NotOurs,
}

impl Mover<'_> {
    /// One look at all queues of a shard. A queue that cannot be moved now does not keep the others.
    async fn empty(&self, lane: &Lane) -> Result<()> {
        // Before a job is taken out of its line for it.
        Route::parse(&self.route).ok_or_else(|| Error::bad("no shard takes new jobs"))?;
        let journal = &self.dispatcher.journal;
        let (mut left, mut failure) = (0, None);
        for queue in lane.shard().queues().await? {
            match self.empty_queue(lane, &queue).await {
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

    /// Moves the jobs of one queue; false when that is not for us any more.
    async fn empty_queue(&self, lane: &Lane, queue: &Name) -> Result<bool> {
        for state in STATES {
            loop {
                match self.step(lane, queue, state, BATCH_JOBS_MAX).await? {
                    Step::Moved(count) => {
                        self.dispatcher.journal.entry(lane.name().clone()).or_default().moved += count;
                    }
                    Step::Nothing => break,
                    Step::NotOurs => return Ok(false),
                }
            }
        }
        Ok(true)
    }

    /// Brings to its end what a shard began to move before it was told to stay; false when that is not for us.
    async fn finish(&self, lane: &Lane) -> Result<bool> {
        for (queue, _) in census::routes(lane).await? {
            if let Step::NotOurs = self.step(lane, &queue, JobState::Ready, 0).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Moves one batch: the one that is on its way, or else a new one of up to so many jobs.
    async fn step(&self, lane: &Lane, queue: &Name, state: JobState, most: u64) -> Result<Step> {
        let is_newest = self.dispatcher.version() == self.map.version();
        if !is_newest || !lane.shard().lead(ROLE, self.holder, LEAD_MS).await? {
            return Ok(Step::NotOurs);
        }
        let (route, outdated) = (self.route.clone(), TravelMark::default());
        let departure = match ask(lane, queue, Action::Depart { state, count: most, route, outdated }).await? {
            Outcome::Departing(departure) => departure,
            other => return Err(Error::bad(format!("the shard answered a departure with {other:?}"))),
        };
        let Departure { mark, route, jobs } = departure;
        if jobs.is_empty() {
            return Ok(Step::Nothing);
        }
        let count = jobs.len() as u64;
        self.deliver(lane, queue, mark, &route, jobs).await?;
        ask(lane, queue, Action::Departed { mark }).await?;
        Ok(Step::Moved(count))
    }

    /// Adds a batch where its route says.
    async fn deliver(
        &self,
        lane: &Lane,
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
            let lane_there = self.map.lane(target).ok_or_else(|| super::no_shard(target))?;
            if self.map.standing_of(lane_there) == Some(Standing::Closing) {
                return Err(Error::bad(format!("shard {target} is being removed")));
            }
            let source = Bytes::copy_from_slice(lane.name().as_bytes());
            let action = Action::Arrive { source, mark, jobs: Arc::new(jobs) };
            match ask(lane_there, queue, action).await? {
                Outcome::Count(_) => {}
                // The shard lost its last writes in a fail-over. Removed from here the batch would be gone, if it never
                // came there: under a new mark it comes, at the worst once more.
                Outcome::Outdated => {
                    let look = Action::Depart { state: JobState::Ready, count: 0, route: Bytes::new(), outdated: mark };
                    ask(lane, queue, look).await?;
                    let why = format!("shard {target} knows a later batch of {} than the one on its way", lane.name());
                    return Err(Error::bad(why));
                }
                other => return Err(Error::bad(format!("the shard answered an arrival with {other:?}"))),
            }
        }
        Ok(())
    }
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

/// Whether jobs of a batch with this route may go to the shard.
pub fn leads_to(route: &[u8], shard: &str) -> bool {
    Route::parse(route).is_some_and(|route| {
        [&route.homes, &route.open, &route.groups].iter().any(|(names, _)| names.iter().any(|name| name == shard))
    })
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
        assert!(leads_to(b"a*1;b*1;c*1", "b") && !leads_to(b"a*1;b*1;c*1", "d"));
        assert!(Route::parse(b"a*1;b*1").is_none() && Route::parse(b"a;b*1;c*1").is_none());
    }
}
