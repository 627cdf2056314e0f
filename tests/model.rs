//! Random operations on a shard and on the pure rules at once: every outcome and every effect must be the same.
//!
//! The model is the memory shard. On the way the embedded shard is closed and reopened, the Redis shard loses its scripts
//! and is connected to anew. What differs is made short before it is shown: batches are left out as long as the rest still
//! differs. `GOFLOW_MODEL_STEPS` sets how many batches, `GOFLOW_MODEL_SEED` repeats a run.

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::fmt::Write;
use std::sync::Arc;

use goflow::clock::UnixMs;
use goflow::error::Error;
use goflow::job::{JobRef, JobState, Lease, Name, Policy};
use goflow::shard::event::{Page, Recording};
use goflow::shard::{
    Action, DeathGroup, DeathMark, Departure, LimitDeed, Op, Outcome, Party, Placed, QueueLimits, Rate, Retention,
    Rules, Shard, Start, TravelMark,
};

use crate::conformance::trial::{BEGIN, block_on, name};
use crate::conformance::{Home, Keeper};
use crate::support::servers::Flavour;

/// Short and few, so that every bound is met within a small run.
const RULES: Rules = Rules {
    retention: Retention { age_ms: 20_000, jobs: 25 },
    lapses_max: 2,
    recording: Some(Recording { age_ms: 60_000, histories: 40, journal: 3_000 }),
};

#[derive(Clone, Debug)]
enum Step {
    Batch {
        at: UnixMs,
        ops: Vec<Op>,
    },
    /// The shard is closed and opened again.
    Reopen,
    /// The server forgets the scripts.
    Forget,
}

/// Makes up what happens next, from what it has seen so far.
struct Author {
    rng: SmallRng,
    now: UnixMs,
    queues: Vec<Name>,
    leases: Vec<Lease>,
    seqs: Vec<u64>,
    retry_until: Option<UnixMs>,
    deaths: Vec<DeathMark>,
    /// The last batch that departed.
    departure: Departure,
}

impl Author {
    fn new(seed: u64) -> Author {
        Author {
            rng: SmallRng::seed_from_u64(seed),
            now: BEGIN,
            queues: vec![name("main"), name("other")],
            leases: Vec::new(),
            seqs: vec![1],
            retry_until: None,
            deaths: Vec::new(),
            departure: Departure::default(),
        }
    }

    fn step(&mut self) -> Step {
        match self.rng.random_range(0..100) {
            0 => return Step::Reopen,
            1 => return Step::Forget,
            2 => self.now -= self.rng.random_range(0..3_000),
            3..5 => self.now += self.rng.random_range(5_000..40_000),
            5..30 => self.now += self.rng.random_range(10..3_000),
            30..60 => self.now += self.rng.random_range(0..10),
            _ => {}
        }
        let ops = self.rng.random_range(1..=6);
        let ops = (0..ops).map(|_| Op { queue: self.queue(), action: self.action() }).collect();
        Step::Batch { at: self.now, ops }
    }

    fn queue(&mut self) -> Name {
        let place = usize::from(self.rng.random_bool(0.15));
        self.queues[place].clone()
    }

    fn action(&mut self) -> Action {
        match self.rng.random_range(0..100) {
            0..25 => self.enqueue(),
            25..45 => Action::Lease {
                tokens: (0..self.rng.random_range(1..5))
                    .map(|_| self.rng.random_range(0..goflow::job::TOKEN_MAX))
                    .collect(),
                lease_ms: self.rng.random_range(1..8_000),
                worker: self.text(),
            },
            45..55 => Action::Ack {
                leases: (0..self.rng.random_range(1..4)).map(|_| self.lease()).collect(),
                result: self.text(),
            },
            55..64 => Action::Fail {
                lease: self.lease(),
                error: self.error(),
                trace: self.text(),
                retry_in: self.rng.random_bool(0.3).then(|| self.rng.random_range(0..500)),
                dead: self.rng.random_bool(0.3),
            },
            64..69 => Action::Release {
                lease: self.lease(),
                delay: self.rng.random_range(0..4_000) * self.rng.random_range(0..2),
            },
            69..72 => Action::Extend { lease: self.lease(), lease_ms: self.rng.random_range(1..9_000) },
            72..74 => {
                Action::Progress { lease: self.lease(), percent: self.rng.random_range(0..=100), text: self.text() }
            }
            74..77 => Action::Cancel { job: self.job() },
            77..79 => Action::Job { job: self.job() },
            79 => Action::History { job: self.job() },
            80..84 => Action::Peek {
                state: self.state(),
                offset: self.rng.random_range(0..4),
                count: self.rng.random_range(0..30),
            },
            84 => Action::Len { state: self.state() },
            85 => Action::Outbox,
            86 => Action::OutboxTold { channel: self.key("channel"), marks: self.marks() },
            87 => match self.rng.random_bool(0.5) {
                true => Action::OutboxSettle { marks: self.marks() },
                false => Action::EventsRecent { count: self.rng.random_range(0..200) },
            },
            88 => Action::Pause { paused: self.rng.random_bool(0.3) },
            89 => Action::Purge { state: self.state() },
            90 => Action::DeadGet { job: self.job() },
            91..94 => Action::DeadRetry { jobs: (0..self.rng.random_range(1..4)).map(|_| self.job()).collect() },
            94 if self.rng.random_bool(0.5) => self.travel(),
            94 => Action::DeadRetryAll { until: self.retry_until.filter(|_| self.rng.random_bool(0.5)) },
            95 => Action::DeadDelete { jobs: (0..self.rng.random_range(1..3)).map(|_| self.job()).collect() },
            96 => Action::Pause { paused: false },
            97 if self.rng.random_bool(0.5) => self.travel(),
            97 => Action::Limit(self.limit()),
            98 => self.keep(),
            _ => Action::Tick,
        }
    }

    fn keep(&mut self) -> Action {
        let party = |author: &mut Author| Party {
            session: author.key("session"),
            run_ms: author.rng.random_range(0..15_000),
            leases: (0..author.rng.random_range(0..4)).map(|_| author.lease()).collect(),
        };
        Action::Keep {
            keeper: self.rng.random_range(0..3),
            keep_ms: self.rng.random_range(0..5_000) * self.rng.random_range(0..3),
            parties: (0..self.rng.random_range(1..4)).map(|_| party(self)).collect(),
        }
    }

    /// A step of a journey, mostly the next one.
    fn travel(&mut self) -> Action {
        let mut mark = self.departure.mark;
        mark.number += self.rng.random_range(0..2);
        match self.rng.random_range(0..6) {
            0..2 => Action::Depart {
                state: *[JobState::Ready, JobState::Scheduled, JobState::Dead].choose(&mut self.rng).unwrap(),
                count: self.rng.random_range(0..25),
                route: self.text(),
                outdated: if self.rng.random_bool(0.2) { self.departure.mark } else { TravelMark::default() },
            },
            2..4 => {
                let source = Bytes::from_static([b"s1", b"s2"][self.rng.random_range(0..2)]);
                Action::Arrive { source, mark, jobs: Arc::new(self.departure.jobs.clone()) }
            }
            4 => Action::Departed { mark },
            _ => Action::Seek {
                id: self.rng.random_bool(0.7).then(|| self.key("id")),
                unique: self.rng.random_bool(0.7).then(|| self.key("key")),
                homes_since: self.rng.random_range(0..2),
            },
        }
    }

    fn enqueue(&mut self) -> Action {
        let is_keyed = self.rng.random_bool(0.4);
        let policy = Policy {
            kind: self.text(),
            priority: *[0, 0, 0, 5, -1000, 1000].choose(&mut self.rng).unwrap(),
            attempts: self.rng.random_range(1..4),
            backoff: *[0, 1, 50, 700].choose(&mut self.rng).unwrap(),
            backoff_max: *[0, 100, 5_000].choose(&mut self.rng).unwrap(),
            ttl: *[0, 0, 0, 1, 500, 6_000].choose(&mut self.rng).unwrap(),
            id: (is_keyed && self.rng.random_bool(0.6)).then(|| self.key("id")),
            unique: (is_keyed && self.rng.random_bool(0.6))
                .then(|| (self.key("key"), *[0, 1, 900].choose(&mut self.rng).unwrap())),
            group: self.rng.random_bool(0.4).then(|| (self.key("group"), *[1, 1, 2, 3].choose(&mut self.rng).unwrap())),
            meta: (0..self.rng.random_range(0..3)).map(|_| (self.text(), self.text())).collect(),
            homes_since: u64::from(self.rng.random_bool(0.9)),
        };
        let count = match self.rng.random_range(0..400) {
            _ if is_keyed => 1,
            0 => 1_003,
            n => 1 + n % 3,
        };
        let payloads = (0..count).map(|_| self.text()).collect();
        let start = match self.rng.random_range(0..5) {
            0 => Start::Delay(self.rng.random_range(0..3_000)),
            1 => Start::At((self.now + self.rng.random_range(0..3_000)).saturating_sub(500)),
            _ => Start::Now,
        };
        Action::Enqueue { policy: Arc::new(policy), payloads, start }
    }

    fn limit(&mut self) -> LimitDeed {
        let mut some = |most: u64| self.rng.random_bool(0.5).then(|| self.rng.random_range(0..most));
        let (concurrency, jobs, waiting) = (some(5), some(6), some(60));
        let rate = jobs.map(|jobs| Rate { jobs, per_ms: *[1, 700, 5_000].choose(&mut self.rng).unwrap() });
        match self.rng.random_range(0..8) {
            0 => LimitDeed::Look,
            1 => LimitDeed::Note { was: self.rng.random_range(0..3), ledger: self.text() },
            2..5 => LimitDeed::Share { version: 5, limits: QueueLimits::default() },
            n => LimitDeed::Share { version: n, limits: QueueLimits { concurrency, rate, waiting } },
        }
    }

    fn text(&mut self) -> Bytes {
        let texts: [&[u8]; 6] =
            [b"", b"a", b"\0\xff\r\n\"{}", b"1e3", b"-7", b"a longer text, with | all , kinds ; of : marks"];
        Bytes::from_static(texts.choose(&mut self.rng).unwrap())
    }

    /// At times one of a kind that nothing else is like.
    fn error(&mut self) -> Bytes {
        match self.rng.random_bool(0.2) {
            true => format!("kind {}", "y".repeat(self.rng.random_range(0..120))).into(),
            false => self.text(),
        }
    }

    /// Some of the groups that were seen last, at their counts or at others.
    fn marks(&mut self) -> Vec<DeathMark> {
        let deaths = self.deaths.clone();
        let mut marks: Vec<DeathMark> =
            (0..self.rng.random_range(0..5)).filter_map(|_| deaths.choose(&mut self.rng).cloned()).collect();
        for mark in &mut marks {
            if self.rng.random_bool(0.3) {
                mark.count = self.rng.random_range(0..9);
            }
        }
        marks
    }

    fn key(&mut self, kind: &str) -> Bytes {
        format!("{kind}{}", self.rng.random_range(0..5)).into()
    }

    fn state(&mut self) -> JobState {
        *JobState::ALL.choose(&mut self.rng).unwrap()
    }

    /// Mostly one of the last leases; at times an old one, or one that nobody got.
    fn lease(&mut self) -> Lease {
        let recent = self.leases.len().saturating_sub(8);
        let range = if self.rng.random_bool(0.85) { recent..self.leases.len() } else { 0..self.leases.len() };
        let made_up = Lease { seq: self.rng.random_range(1..50), token: self.rng.random_range(0..9) };
        self.leases.get(range).and_then(|leases| leases.choose(&mut self.rng)).copied().unwrap_or(made_up)
    }

    fn job(&mut self) -> JobRef {
        if self.rng.random_bool(0.3) {
            return JobRef::Chosen(self.key("id"));
        }
        let recent = self.seqs.len().saturating_sub(40);
        JobRef::Seq(*self.seqs[recent..].choose(&mut self.rng).unwrap())
    }

    fn learn(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Enqueued(placed) => self.seqs.extend(placed.iter().filter_map(|placed| match placed {
                Placed::Added(seq) | Placed::Held { seq, .. } => Some(*seq),
                Placed::Outdated => None,
            })),
            Outcome::Departing(departure) if !departure.jobs.is_empty() => self.departure = departure.clone(),
            Outcome::Leased(deliveries) => self.leases.extend(deliveries.iter().map(|delivery| delivery.lease)),
            Outcome::Moved { next, .. } => self.retry_until = *next,
            Outcome::Outbox { groups, .. } => self.deaths = groups.iter().map(DeathGroup::mark).collect(),
            _ => {}
        }
    }
}

/// The model and the shard under test, side by side.
struct Pair {
    model: Arc<dyn Shard>,
    shard: Option<Arc<dyn Shard>>,
    keeper: Keeper,
}

impl Pair {
    async fn open(home: &Home) -> Pair {
        let keeper = Keeper::new(home.clone());
        let model = Keeper::new(Home::Memory).open_shard(RULES).await;
        let shard = Some(keeper.open_shard(RULES).await);
        Pair { model, shard, keeper }
    }

    /// Takes one step on both; the model's outcomes, or how they differ.
    async fn take(&mut self, step: &Step) -> Result<Vec<Outcome>, String> {
        match step {
            Step::Batch { at, ops } => self.apply(*at, ops).await,
            Step::Reopen => {
                // Closed first: a store is opened by one at a time.
                self.shard = None;
                self.shard = Some(self.keeper.open_shard(RULES).await);
                Ok(Vec::new())
            }
            Step::Forget => {
                self.keeper.forget_scripts();
                Ok(Vec::new())
            }
        }
    }

    async fn apply(&self, at: UnixMs, ops: &[Op]) -> Result<Vec<Outcome>, String> {
        let shard = self.shard.as_ref().ok_or("the shard is closed")?;
        let mut expected = self.model.apply(ops.to_vec(), Some(at)).await;
        let mut actual = shard.apply(ops.to_vec(), Some(at)).await;
        for (place, op) in ops.iter().enumerate() {
            let (expected, actual) = (expected.outcomes.get(place), actual.outcomes.get(place));
            if !is_same(expected, actual) {
                return Err(format!("at {at}, {op:?}\n  the rules say {expected:?}\n  the shard says {actual:?}"));
            }
        }
        expected.effects.sort_by(|a, b| a.queue.cmp(&b.queue));
        actual.effects.sort_by(|a, b| a.queue.cmp(&b.queue));
        if expected.effects != actual.effects {
            return Err(format!(
                "effects at {at} of {ops:?}\n  the rules say {:?}\n  the shard says {:?}",
                expected.effects, actual.effects
            ));
        }
        expected.outcomes.into_iter().map(|outcome| outcome.map_err(|error| error.to_string())).collect()
    }

    /// Compares all that can be seen.
    async fn compare(&self, at: UnixMs, queues: &[Name]) -> Result<(), String> {
        for queue in queues {
            let op = |action| Op { queue: queue.clone(), action };
            let states = JobState::ALL.into_iter();
            let mut ops: Vec<Op> =
                states.clone().map(|state| op(Action::Peek { state, offset: 0, count: 1000 })).collect();
            ops.extend(states.map(|state| op(Action::Len { state })));
            ops.push(op(Action::Stats));
            ops.push(op(Action::Outbox));
            ops.push(op(Action::Sessions { offset: 0, count: 1000 }));
            ops.push(op(Action::EventsRecent { count: 1_000 }));
            ops.extend((1..400).map(|seq| op(Action::History { job: JobRef::Seq(seq) })));
            ops.extend((0..5).map(|id| op(Action::History { job: JobRef::Chosen(format!("id{id}").into()) })));
            self.apply(at, &ops).await?;
        }
        Ok(())
    }
}

/// Whether two outcomes are the same. Of a journal each implementation may keep a little more than the other.
fn is_same(expected: Option<&Result<Outcome, Error>>, actual: Option<&Result<Outcome, Error>>) -> bool {
    let (Some(Ok(Outcome::Events(expected))), Some(Ok(Outcome::Events(actual)))) = (expected, actual) else {
        return expected == actual;
    };
    let first = expected.first.max(actual.first);
    let from = |page: &Page| page.events.get((first - page.first) as usize..).map(<[_]>::to_vec);
    (expected.born, expected.last) == (actual.born, actual.last) && from(expected) == from(actual)
}

/// Takes the steps from the beginning; how the shard differed from the model, if it did.
async fn replay(home: &Home, steps: &[Step], queues: &[Name]) -> Option<String> {
    let mut pair = Pair::open(home).await;
    let mut last = BEGIN;
    for step in steps {
        if let Step::Batch { at, .. } = step {
            last = *at;
        }
        if let Err(difference) = pair.take(step).await {
            return Some(difference);
        }
    }
    pair.compare(last, queues).await.err()
}

/// Leaves out steps, in ever smaller pieces, as long as the shard still differs from the model.
async fn shorten(home: &Home, mut steps: Vec<Step>, queues: &[Name]) -> Vec<Step> {
    let mut piece = steps.len() / 2;
    while piece > 0 {
        let mut at = 0;
        while at < steps.len() {
            let mut shorter = steps.clone();
            shorter.drain(at..(at + piece).min(steps.len()));
            if replay(home, &shorter, queues).await.is_some() {
                steps = shorter;
            } else {
                at += piece;
            }
        }
        piece /= 2;
    }
    steps
}

async fn explore(home: Home) {
    let read = |variable: &str| std::env::var(variable).ok().and_then(|text| text.parse::<u64>().ok());
    let seed = read("GOFLOW_MODEL_SEED").unwrap_or(1);
    let count = read("GOFLOW_MODEL_STEPS").unwrap_or(1_500);
    println!("GOFLOW_MODEL_SEED={seed} GOFLOW_MODEL_STEPS={count}");
    let mut author = Author::new(seed);
    let mut pair = Pair::open(&home).await;
    let mut steps = Vec::new();
    for number in 0..count {
        let step = author.step();
        steps.push(step.clone());
        let taken = pair.take(&step).await;
        let compared = match number % 50 {
            49 if taken.is_ok() => pair.compare(author.now, &author.queues).await,
            _ => Ok(()),
        };
        match taken.and_then(|outcomes| compared.map(|()| outcomes)) {
            Ok(outcomes) => outcomes.iter().for_each(|outcome| author.learn(outcome)),
            Err(difference) => {
                drop(pair);
                let short = shorten(&home, steps, &author.queues).await;
                let mut told = String::new();
                short.iter().for_each(|step| writeln!(told, "{step:?}").unwrap());
                let difference = replay(&home, &short, &author.queues).await.unwrap_or(difference);
                panic!("seed {seed}, step {number}; in short:\n{told}{difference}");
            }
        }
    }
    let is_watched = matches!(home, Home::Server(_));
    assert_eq!(pair.keeper.check() > 0, is_watched, "the guard watches scripts where there are any");
}

#[test]
fn the_embedded_shard_keeps_the_rules_over_random_operations_and_reopening() {
    block_on(explore(Home::Embedded));
}

#[test]
fn the_redis_shard_keeps_the_rules_over_random_operations_and_forgotten_scripts() {
    block_on(explore(Home::Server(Flavour::Redis7)));
}
