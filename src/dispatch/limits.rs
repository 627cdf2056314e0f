//! The limits of a queue over all shards: how they are divided, and how shares move to where they are needed.
//!
//! Each shard holds a share of each limit and keeps to it alone; nothing is asked of another shard when a job is taken. The
//! ring owner of the queue's name keeps the *ledger*: the limits, and for each shard a bound that its share, and what is in use
//! there, is never above. All bounds together are at most the limit. To *settle* a queue is to give shares anew:
//!
//! ```text
//! look at all shards → divide → ledger (claims the next fence) → lower → ledger (what was confirmed) → raise
//! ```
//!
//! A share is raised only by what the ledger has confirmed as free. Every settling has a *fence*, one more than any before; the
//! ledger is replaced only where nobody else did meanwhile, and a shard takes no share of a lower fence. So any number of
//! proxies may settle at once, stop in the middle, and be killed: the sum is never above the limit, and what was lost on the
//! way is found by the next one, for whom the share is below its bound. A share below what is in use lets nothing start until
//! as much has ended; until then the bound is what is in use.
//!
//! [`run`] settles the queues whose ledger is on the lane's shard while this process samples that shard
//! ([`sampler`](super::sampler)), and finds room for new jobs that the lane's shard refuses before their clients hear of it.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use foldhash::fast::RandomState;
use futures_util::future::join_all;

use super::lane::{Lane, Refused};
use super::{Dispatcher, ShardMap};
use crate::clock::Millis;
use crate::error::{Code, Error, Result};
use crate::job::Name;
use crate::shard::{Action, LimitDeed, LimitView, Op, Outcome, QueueLimits, Rate};

/// How often the shares of a queue are looked at, and how often while some are on their way.
const PASS_EVERY: Duration = Duration::from_millis(500);
const PASS_SOON: Duration = Duration::from_millis(50);
/// How long a queue in which no room was found counts as full.
const FULL_FOR: Duration = Duration::from_millis(100);
/// Where there are fewer jobs to a limit than shards that want one, the shards take turns of so long, and of so many windows.
const TURN: Duration = Duration::from_secs(4);
const TURN_WINDOWS: u64 = 8;
/// Tries of a change that others come between.
const TRIES: usize = 20;

/// One number for each kind of limit: concurrency, rate, waiting.
type Kinds<T> = [T; 3];
const KINDS: [usize; 3] = [0, 1, 2];
const WAITING: usize = 2;

fn kinds(limits: &QueueLimits) -> Kinds<Option<u64>> {
    [limits.concurrency, limits.rate.map(|rate| rate.jobs), limits.waiting]
}

fn limits_of(kinds: Kinds<Option<u64>>, per_ms: Millis) -> QueueLimits {
    QueueLimits { concurrency: kinds[0], rate: kinds[1].map(|jobs| Rate { jobs, per_ms }), waiting: kinds[2] }
}

fn used(view: &LimitView) -> Kinds<u64> {
    [view.leased, view.started, view.waiting]
}

/// What the ring owner of the queue keeps for all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Ledger {
    fence: u64,
    limits: QueueLimits,
    /// By the name of the shard.
    bounds: BTreeMap<String, Kinds<Option<u64>>>,
    /// Not every shard has said that it knows; a ledger without limits is kept until then.
    is_open: bool,
}

impl Ledger {
    /// Two lines of a ledger never are the same, since a random number is in it: who wrote it knows it again.
    fn encode(&self) -> Bytes {
        if self.limits == QueueLimits::default() && !self.is_open {
            return Bytes::new();
        }
        let word = |number: Option<u64>| number.map_or("-".to_owned(), |number| number.to_string());
        let [concurrency, rate, waiting] = kinds(&self.limits).map(word);
        let per_ms = self.limits.rate.map_or(0, |rate| rate.per_ms);
        let mut text = format!("{} {concurrency} {rate} {per_ms} {waiting} {:016x}", self.fence, rand::random::<u64>());
        for (shard, bounds) in &self.bounds {
            let [concurrency, rate, waiting] = bounds.map(word);
            // Writing to a `String` cannot fail.
            let _ = write!(text, "\n{shard} {concurrency} {rate} {waiting}");
        }
        text.into()
    }

    fn decode(text: &[u8]) -> Option<Ledger> {
        let number = |word: &str| if word == "-" { Some(None) } else { word.parse().ok().map(Some) };
        let mut lines = std::str::from_utf8(text).ok()?.lines();
        let mut head = lines.next()?.split(' ');
        let fence = head.next()?.parse().ok()?;
        let (concurrency, rate) = (number(head.next()?)?, number(head.next()?)?);
        let per_ms = head.next()?.parse().ok()?;
        let limits = limits_of([concurrency, rate, number(head.next()?)?], per_ms);
        let mut bounds = BTreeMap::new();
        for line in lines {
            let mut words = line.split(' ');
            let shard = words.next()?.to_owned();
            let mut next = || number(words.next()?);
            bounds.insert(shard, [next()?, next()?, next()?]);
        }
        Some(Ledger { fence, limits, bounds, is_open: false })
    }
}

/// Divides a limit: first by what each shard has in use and wants, the small wants first, then equally. Where less than one
/// is left for each that wants more, they get it from the `turn`th on.
fn divide(limit: u64, wants: &[u64], turn: usize) -> Vec<u64> {
    let mut shares = vec![0; wants.len()];
    let mut left = limit;
    for wants in [wants, &vec![u64::MAX; wants.len()]] {
        let mut given = vec![0; wants.len()];
        let mut open: Vec<usize> = (0..wants.len()).filter(|at| wants[*at] > 0).collect();
        while left > 0 && !open.is_empty() {
            let each = left / open.len() as u64;
            if each == 0 {
                for nth in 0..left as usize {
                    shares[open[(turn + nth) % open.len()]] += 1;
                }
                left = 0;
            }
            open.retain(|at| {
                let more = each.min(wants[*at] - given[*at]);
                given[*at] += more;
                shares[*at] += more;
                left -= more;
                given[*at] < wants[*at]
            });
        }
    }
    shares
}

/// What `Limits` becomes by a change of it; 0 lifts.
fn changed(limits: QueueLimits, change: &QueueLimits) -> QueueLimits {
    QueueLimits {
        concurrency: change.concurrency.or(limits.concurrency).filter(|jobs| *jobs > 0),
        rate: change.rate.or(limits.rate).filter(|rate| rate.jobs > 0),
        waiting: change.waiting.or(limits.waiting).filter(|jobs| *jobs > 0),
    }
}

/// How a settling ended.
struct Settled {
    limits: QueueLimits,
    /// Some shards wait for what others have yet to finish.
    is_on_its_way: bool,
    /// A share was raised.
    has_raised: bool,
    /// A shard that did not answer; it keeps what it has.
    failure: Option<Error>,
}

async fn ask(lane: &Lane, queue: &Name, deed: LimitDeed) -> Result<LimitView> {
    lane.room().await?;
    match lane.submit(Op { queue: queue.clone(), action: Action::Limit(deed) }, 0).await {
        Ok(Ok(Outcome::Limits(view))) => Ok(*view),
        Ok(Ok(_)) => Err(Error::bad("the shard gave an unexpected answer")),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(Error::new(Code::ShardDown, "the shard is shutting down")),
    }
}

async fn look(map: &ShardMap, queue: &Name) -> Vec<Result<LimitView>> {
    join_all(map.lanes.iter().map(|lane| ask(lane, queue, LimitDeed::Look))).await
}

/// Whether the shard keeps the ledger of limits that hold.
pub fn keeps_limits(view: &LimitView) -> bool {
    Ledger::decode(&view.ledger).is_some_and(|ledger| ledger.limits != QueueLimits::default())
}

/// The newest ledger that any shard has: the home of a queue may have moved.
fn newest(views: &[Result<LimitView>]) -> Ledger {
    let ledgers = views.iter().flatten().filter_map(|view| Ledger::decode(&view.ledger));
    let mut ledger = ledgers.max_by_key(|ledger| ledger.fence).unwrap_or_default();
    ledger.fence = views.iter().flatten().map(|view| view.version).chain([ledger.fence]).max().unwrap_or(0);
    ledger
}

/// One shard on the way through a settling.
#[derive(Default)]
struct Part {
    /// What it answered; `None`: nothing.
    view: Option<LimitView>,
    /// What its share and what is in use there is at most, as far as anybody knows.
    bound: Kinds<Option<u64>>,
    target: Kinds<u64>,
    /// Its share now.
    share: Kinds<Option<u64>>,
}

impl Part {
    /// Whether the shard must hear of the limits before anything is raised elsewhere.
    fn must_lower(&self, limits: &QueueLimits) -> bool {
        let Some(view) = &self.view else { return false };
        let window = |limits: &QueueLimits| limits.rate.map(|rate| rate.per_ms);
        let whole = kinds(limits);
        let differs = |kind: usize| whole[kind].is_some() != self.share[kind].is_some();
        let is_less =
            |kind: usize| whole[kind].is_some() && self.bound[kind].is_some_and(|most| self.target[kind] < most);
        window(limits) != window(&view.limits) || KINDS.into_iter().any(|kind| differs(kind) || is_less(kind))
    }

    /// Whether it is kept from jobs that it could have.
    fn starves(&self, kind: usize) -> bool {
        let (Some(view), Some(share)) = (&self.view, self.share[kind]) else { return false };
        kind != WAITING && view.ready > 0 && used(view)[kind] * 10 >= share * 9 && self.target[kind] > share
    }
}

/// Gives shares anew where that is needed, or after a change; `need`: the shard of this index wants room for so many new
/// jobs. `None`: another settled the queue at the same time.
async fn settle(
    map: &ShardMap,
    queue: &Name,
    change: Option<&QueueLimits>,
    need: Option<(usize, u64)>,
    elapsed: Duration,
) -> Result<Option<Settled>> {
    let home = map.lane_of_lock(queue.as_str());
    let views = look(map, queue).await;
    let was = match map.place_of(home).and_then(|at| views.get(at)) {
        Some(Ok(view)) => view.ledger_version,
        Some(Err(error)) => return Err(error.clone()),
        None => return Err(super::no_shard(home.name())),
    };
    let mut ledger = newest(&views);
    if let Some(change) = change {
        ledger.limits = changed(ledger.limits, change);
    }
    let mut failure = views.iter().find_map(|view| view.as_ref().err().cloned());
    let per_ms = ledger.limits.rate.map_or(0, |rate| rate.per_ms);
    let whole = kinds(&ledger.limits);
    let mut parts: Vec<Part> = Vec::with_capacity(views.len());
    for (lane, view) in map.lanes.iter().zip(views) {
        let view = view.ok();
        let share = view.as_ref().map_or([None; 3], |view| kinds(&view.limits));
        let noted = ledger.bounds.get(&**lane.name()).copied().unwrap_or_default();
        let in_use = view.as_ref().map_or([0; 3], used);
        let bound = KINDS.map(|kind| {
            let most = noted[kind].max(share[kind]).filter(|_| whole[kind].is_some())?;
            Some(most.max(in_use[kind]))
        });
        parts.push(Part { view, bound, share, target: [0; 3] });
    }
    // One that was removed had no leases left. Others that are not in the map, or do not answer, keep what they may have.
    ledger.bounds.retain(|shard, _| map.lane(shard).is_some() || !map.was_left(shard));
    let gone: Kinds<u64> = KINDS.map(|kind| {
        let others = ledger.bounds.iter().filter(|(shard, _)| map.lane(shard).is_none());
        others.filter_map(|(_, bounds)| bounds[kind]).sum()
    });
    let silent = |parts: &[Part], kind: usize| -> u64 {
        parts.iter().filter(|part| part.view.is_none()).filter_map(|part| part.bound[kind]).sum()
    };
    for kind in KINDS {
        let Some(limit) = whole[kind] else { continue };
        let there = parts.iter().enumerate().filter_map(|(at, part)| part.view.as_ref().map(|view| (at, view)));
        let (places, uses): (Vec<usize>, Vec<(u64, u64)>) =
            there.map(|(at, view)| (at, (used(view)[kind], view.ready))).unzip();
        let left = limit.saturating_sub(gone[kind] + silent(&parts, kind));
        let free = left.saturating_sub(uses.iter().map(|(used, _)| used).sum());
        let wants: Vec<u64> = places
            .iter()
            .zip(&uses)
            .map(|(at, (used, ready))| match (kind, need) {
                (WAITING, Some((needy, jobs))) if needy == *at => used + jobs.max(free / 2),
                (WAITING, _) => *used,
                _ => used + ready,
            })
            .collect();
        let period = match kind {
            1 => TURN.max(Duration::from_millis(per_ms.saturating_mul(TURN_WINDOWS))),
            _ => TURN,
        };
        let turn = (elapsed.as_millis() / period.as_millis().max(1)) as usize;
        for (at, share) in places.into_iter().zip(divide(left, &wants, turn)) {
            parts[at].target[kind] = share;
        }
    }
    let differs = |part: &Part| {
        let named = part.view.as_ref().map(|view| kinds(&view.limits).map(|share| share.is_some()));
        named.is_some_and(|named| named != whole.map(|limit| limit.is_some()))
    };
    let is_needed = change.is_some() || need.is_some() || parts.iter().any(differs);
    if !is_needed && !parts.iter().any(|part| KINDS.into_iter().any(|kind| whole[kind].is_some() && part.starves(kind)))
    {
        return Ok(Some(Settled { limits: ledger.limits, is_on_its_way: false, has_raised: false, failure }));
    }

    // From here on only one settling goes on, and shards refuse what is left of those before it.
    ledger.fence += 1;
    ledger.is_open = true;
    let names: Vec<String> = map.lanes.iter().map(|lane| lane.name().to_string()).collect();
    let note = |ledger: &mut Ledger, parts: &[Part]| {
        for (name, part) in names.iter().zip(parts) {
            ledger.bounds.insert(name.clone(), part.bound);
        }
        ledger.bounds.values_mut().for_each(|bounds| {
            *bounds = KINDS.map(|kind| bounds[kind].filter(|_| whole[kind].is_some()));
        });
    };
    note(&mut ledger, &parts);
    if !replace(home, queue, was, &ledger).await? {
        return Ok(None);
    }
    let (fence, limits) = (ledger.fence, ledger.limits);
    let lowered = parts.iter().zip(&map.lanes).map(|(part, lane)| async move {
        if !part.must_lower(&limits) {
            return None;
        }
        let share = KINDS.map(|kind| {
            whole[kind].map(|_| part.share[kind].map_or(part.target[kind], |share| share.min(part.target[kind])))
        });
        let deed = LimitDeed::Share { version: fence, limits: limits_of(share, per_ms) };
        Some(ask(lane, queue, deed).await)
    });
    let lowered = join_all(lowered).await;
    for (part, answer) in parts.iter_mut().zip(lowered) {
        match answer {
            Some(Ok(view)) if view.version != fence => return Ok(None),
            Some(Ok(view)) => {
                part.share = kinds(&view.limits);
                part.bound = KINDS.map(|kind| part.share[kind].map(|share| share.max(used(&view)[kind])));
                part.view = Some(view);
            }
            Some(Err(error)) => {
                failure = Some(error);
                part.view = None;
            }
            None => {}
        }
    }

    let mut raised: Vec<Option<Kinds<Option<u64>>>> = vec![None; parts.len()];
    let mut is_on_its_way = false;
    for kind in KINDS {
        let Some(limit) = whole[kind] else { continue };
        let bounds: u64 = parts.iter().filter_map(|part| part.bound[kind]).sum();
        let mut free = limit.saturating_sub(gone[kind] + bounds);
        for (part, raised) in parts.iter_mut().zip(&mut raised) {
            let (Some(_), Some(share), Some(bound)) = (&part.view, part.share[kind], part.bound[kind]) else {
                continue;
            };
            let target = part.target[kind];
            let more = target.saturating_sub(bound).min(free);
            free -= more;
            is_on_its_way |= kind != WAITING && (bound + more < target || bound > target);
            let share_now = target.min(bound + more).max(share);
            if share_now > share {
                raised.get_or_insert(part.share)[kind] = Some(share_now);
            }
            part.bound[kind] = Some(bound.max(share_now));
        }
    }
    note(&mut ledger, &parts);
    ledger.is_open = failure.is_some();
    if !replace(home, queue, was + 1, &ledger).await? {
        return Ok(None);
    }
    let raises = raised.iter().zip(&map.lanes).filter_map(|(share, lane)| share.map(|share| (share, lane)));
    let raises: Vec<_> = raises
        .map(|(share, lane)| ask(lane, queue, LimitDeed::Share { version: fence, limits: limits_of(share, per_ms) }))
        .collect();
    let has_raised = !raises.is_empty();
    for answer in join_all(raises).await {
        failure = answer.err().or(failure);
    }
    Ok(Some(Settled { limits: ledger.limits, is_on_its_way, has_raised, failure }))
}

/// Whether the ledger was replaced: nobody else did it before.
async fn replace(home: &Lane, queue: &Name, was: u64, ledger: &Ledger) -> Result<bool> {
    let text = ledger.encode();
    let view = ask(home, queue, LimitDeed::Note { was, ledger: text.clone() }).await?;
    Ok(view.ledger_version == was + 1 && view.ledger == text)
}

/// Changes the limits of a queue: `None` stays as it is, 0 lifts. Returns when every shard keeps to them; an error names one
/// that does not, and will as soon as it answers.
pub async fn set(map: &ShardMap, queue: &Name, change: &QueueLimits) -> Result<()> {
    for _ in 0..TRIES {
        if let Some(settled) = settle(map, queue, Some(change), None, Duration::ZERO).await? {
            map.lane_of_lock(queue.as_str()).note_limits(queue, settled.limits != QueueLimits::default());
            return settled.failure.map_or(Ok(()), Err);
        }
        tokio::time::sleep(Duration::from_millis(rand::random_range(1..20))).await;
    }
    Err(Error::new(Code::Overloaded, "the limits of the queue are changed by too many at once; try again"))
}

/// The limits of a queue, and what each shard says of its share.
pub async fn show(map: &ShardMap, queue: &Name) -> Result<(QueueLimits, Vec<(Arc<str>, LimitView)>)> {
    let views = look(map, queue).await;
    if let Err(error) = &views[map.place_of_lock(queue.as_str())] {
        return Err(error.clone());
    }
    let limits = newest(&views).limits;
    let shares = map.lanes.iter().zip(views).filter_map(|(lane, view)| Some((lane.name().clone(), view.ok()?)));
    Ok((limits, shares.collect()))
}

/// Settles the queues of the lane's shard and answers what it refuses, until the process ends.
pub async fn run(dispatcher: Arc<Dispatcher>, lane: Arc<Lane>) {
    let began = Instant::now();
    let mut full: HashMap<Name, Instant, RandomState> = HashMap::default();
    let mut pass_at = Instant::now() + PASS_EVERY;
    while !lane.is_ended() {
        tokio::select! {
            () = lane.has_refused() => make_room(&dispatcher.map(), &lane, &mut full).await,
            () = tokio::time::sleep_until(pass_at.into()) => {
                let mut is_on_its_way = false;
                for queue in lane.limited() {
                    match settle(&dispatcher.map(), &queue, None, None, began.elapsed()).await {
                        Ok(Some(settled)) => is_on_its_way |= settled.is_on_its_way,
                        Ok(None) => {}
                        Err(error) => tracing::debug!(%queue, %error, "the shares of a queue were not looked at"),
                    }
                }
                let pause = if is_on_its_way { PASS_SOON } else { PASS_EVERY };
                pass_at = Instant::now() + pause.mul_f64(rand::random_range(0.8..1.2));
            }
        }
    }
}

/// Finds room for the jobs that the shard has refused, and lets it decide again.
async fn make_room(map: &ShardMap, lane: &Arc<Lane>, full: &mut HashMap<Name, Instant, RandomState>) {
    let mut queues: HashMap<Name, Vec<Refused>, RandomState> = HashMap::default();
    for refused in lane.take_refused() {
        queues.entry(refused.op.queue.clone()).or_default().push(refused);
    }
    full.retain(|_, since| since.elapsed() < FULL_FOR);
    for (queue, refused) in queues {
        let jobs: u64 = refused.iter().map(Refused::jobs).sum();
        let is_full = full.contains_key(&queue) || !find_room(map, &queue, lane, jobs).await;
        if is_full {
            full.entry(queue).or_insert_with(Instant::now);
        }
        refused.into_iter().for_each(|refused| if is_full { refused.refuse() } else { refused.submit(lane) });
    }
}

/// Whether the shard got a larger share for so many new jobs.
async fn find_room(map: &ShardMap, queue: &Name, lane: &Lane, jobs: u64) -> bool {
    let Some(place) = map.place_of(lane) else { return false };
    for _ in 0..TRIES {
        match settle(map, queue, None, Some((place, jobs)), Duration::ZERO).await {
            Ok(Some(settled)) => return settled.has_raised,
            Ok(None) => tokio::time::sleep(Duration::from_millis(rand::random_range(1..20))).await,
            Err(error) => {
                tracing::debug!(%queue, %error, "no room was looked for");
                return false;
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_limit_is_divided_by_wants_and_the_rest_equally() {
        assert_eq!(divide(12, &[0, 0, 0, 0], 0), [3, 3, 3, 3]);
        assert_eq!(divide(10, &[100, 1, 0, 100], 0), [5, 1, 0, 4]);
        assert_eq!(divide(10, &[2, 0], 0), [6, 4]);
        assert_eq!(divide(1, &[5, 5, 5], 1), [0, 1, 0]);
        assert_eq!(divide(0, &[5, 5], 0), [0, 0]);
    }

    use crate::dispatch::ShardEntry;
    use crate::dispatch::layout::{Layout, Member, Standing};
    use crate::dispatch::router::Strategy;
    use crate::job::Lease;
    use crate::metrics::Metrics;
    use crate::shard::memory::Memory;
    use crate::shard::{Rules, Start};
    use rand::Rng;

    /// What the shards have and use, once what is on its way has arrived.
    async fn sum(map: &ShardMap, queue: &Name) -> u64 {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        let views = look(map, queue).await;
        views.iter().flatten().map(|view| view.limits.concurrency.unwrap_or(u64::MAX / 8).max(view.leased)).sum()
    }

    #[tokio::test]
    async fn shares_never_add_up_to_more_than_the_limit_whoever_settles_and_is_stopped() {
        let metrics = Arc::new(Metrics::new(std::iter::empty::<&'static str>()).unwrap());
        let entry = |n| ShardEntry { name: format!("s{n}").into(), shard: Arc::new(Memory::new(Rules::default())) };
        let member = |n| Member {
            name: format!("s{n}"),
            partitions: 1,
            weight: 1,
            standing: Standing::Open,
            url: String::new(),
        };
        let layout = Layout::new(1, (0..3).map(member).collect());
        let map = Dispatcher::new("d".into(), layout, (0..3).map(entry).collect(), Strategy::RoundRobin).map();
        for lane in &map.lanes {
            tokio::spawn(lane.clone().run(metrics.clone(), Arc::default()));
        }
        let queue = Name::parse(b"main").unwrap();
        let change = |jobs| QueueLimits { concurrency: Some(jobs), ..QueueLimits::default() };
        set(&map, &queue, &change(5)).await.unwrap();
        let mut random = rand::rng();
        let mut leases: Vec<(usize, Lease)> = Vec::new();
        let (mut raised, mut stopped) = (0, 0);
        for _ in 0..400 {
            let shard = random.random_range(0..3);
            let action = match random.random_range(0..5) {
                0 => Action::Enqueue { policy: Arc::default(), payloads: vec!["x".into(); 4], start: Start::Now },
                1..3 => Action::Lease { tokens: vec![1; 3], lease_ms: 1_000_000, worker: Bytes::new() },
                _ => match leases.iter().position(|(at, _)| *at == shard) {
                    Some(place) => Action::Ack { leases: vec![leases.swap_remove(place).1], result: Bytes::new() },
                    None => Action::Tick,
                },
            };
            let outcome = map.lanes[shard].submit(Op { queue: queue.clone(), action }, 1).await.unwrap().unwrap();
            if let Outcome::Leased(deliveries) = outcome {
                leases.extend(deliveries.into_iter().map(|delivery| (shard, delivery.lease)));
            }
            let mut settlers = Vec::new();
            for _ in 0..random.random_range(0..3) {
                let (map, queue, elapsed) =
                    (map.clone(), queue.clone(), Duration::from_secs(random.random_range(0..60)));
                settlers.push(tokio::spawn(async move { settle(&map, &queue, None, None, elapsed).await }));
            }
            for settler in settlers {
                if random.random_bool(0.5) {
                    for _ in 0..random.random_range(0..30) {
                        tokio::task::yield_now().await;
                    }
                    settler.abort();
                }
                match settler.await {
                    Ok(settled) => raised += usize::from(settled.unwrap().is_some_and(|settled| settled.has_raised)),
                    Err(_) => stopped += 1,
                }
            }
            let sum = sum(&map, &queue).await;
            assert!(sum <= 5, "the shares and what is in use are {sum} of 5");
        }
        assert!(raised > 0 && stopped > 0, "{raised} were raised, {stopped} were stopped");
    }

    proptest! {
        #[test]
        fn all_of_a_limit_is_divided(limit in 0u64..1_000, wants in proptest::collection::vec(0u64..400, 1..7), turn in 0usize..9) {
            let shares = divide(limit, &wants, turn);
            prop_assert_eq!(shares.iter().sum::<u64>(), limit);
            if wants.iter().sum::<u64>() <= limit {
                prop_assert!(shares.iter().zip(&wants).all(|(share, wants)| share >= wants));
            }
        }

        #[test]
        fn a_ledger_is_read_back(fence in 0u64..9, jobs in 1u64..9, per_ms in 1u64..9, bound in proptest::option::of(0u64..9)) {
            let limits = QueueLimits { concurrency: None, rate: Some(Rate { jobs, per_ms }), waiting: Some(jobs) };
            let bounds = BTreeMap::from([("s1".to_owned(), [None, bound, Some(3)]), ("c/0".to_owned(), [bound; 3])]);
            let ledger = Ledger { fence, limits, bounds, is_open: false };
            prop_assert_eq!(Ledger::decode(&ledger.encode()), Some(ledger));
        }
    }
}
