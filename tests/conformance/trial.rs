//! What the cases speak: a [`Keeper`] that opens shards of one kind, and a [`Trial`], one shard with a clock that stands
//! still until a case moves it.

use bytes::Bytes;
use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use tempfile::TempDir;

use goflow::clock::{Millis, UnixMs};
use goflow::job::{Delivery, JobRef, JobState, JobView, Lease, Name, Policy};
use goflow::shard::embedded::Embedded;
use goflow::shard::memory::Memory;
use goflow::shard::redis::Redis;
use goflow::shard::{Action, Effect, Op, Outcome, Placed, Rules, Shard, Start, Stats};

use super::keyguard::KeyGuard;
use crate::support::scratch;
use crate::support::servers::{Cluster, Flavour, Sentinels, Server};
use crate::support::wire::Value;

/// When every trial begins.
pub const BEGIN: UnixMs = 1_700_000_000_000;
/// The lease of [`Trial::lease`].
pub const LEASE_MS: Millis = 30_000;

/// Which implementation, and on what.
#[derive(Clone)]
pub enum Home {
    Memory,
    Embedded,
    /// A server of its own for each keeper.
    Server(Flavour),
    /// One of so many partitions of a cluster, another for each keeper.
    Cluster(Arc<Cluster>, u32),
    /// The master that Sentinels name, emptied for each keeper.
    Sentinels(Arc<Sentinels>),
}

/// Opens shards of one kind. What it opened before is there again, except in memory.
pub struct Keeper {
    home: Home,
    dir: TempDir,
    server: Option<Server>,
    guards: Mutex<Vec<KeyGuard>>,
    partition: u32,
}

impl Keeper {
    pub fn new(home: Home) -> Keeper {
        static KEEPERS: AtomicU32 = AtomicU32::new(0);
        let server = match &home {
            Home::Server(flavour) => Some(Server::start(*flavour, &[])),
            _ => None,
        };
        let mut partition = 0;
        if let Home::Cluster(cluster, partitions) = &home {
            partition = KEEPERS.fetch_add(1, Ordering::Relaxed) % partitions;
            cluster.nodes.iter().for_each(flush);
        }
        if let Home::Sentinels(trio) = &home {
            flush(&trio.master);
        }
        let keeper = Keeper { home, dir: scratch(), server, guards: Mutex::default(), partition };
        let guards = keeper.servers().iter().map(|server| KeyGuard::watch(server)).collect();
        Keeper { guards: Mutex::new(guards), ..keeper }
    }

    fn servers(&self) -> Vec<&Server> {
        match &self.home {
            Home::Cluster(cluster, _) => cluster.nodes.iter().collect(),
            Home::Sentinels(trio) => vec![&trio.master],
            _ => self.server.iter().collect(),
        }
    }

    /// Whether a shard that is opened again knows nothing of what was before.
    pub fn forgets(&self) -> bool {
        matches!(self.home, Home::Memory)
    }

    pub async fn open_shard(&self, rules: Rules) -> Arc<dyn Shard> {
        match (&self.home, &self.server) {
            (Home::Embedded, _) => Arc::new(Embedded::open(self.dir.path(), rules).unwrap()),
            (Home::Server(_), Some(server)) => Arc::new(Redis::connect(&server.url(), "s1", rules).await.unwrap()),
            (Home::Cluster(cluster, partitions), _) => {
                let url = cluster.url(*partitions);
                Arc::new(Redis::connect(&url, &format!("c/{}", self.partition), rules).await.unwrap())
            }
            (Home::Sentinels(trio), _) => Arc::new(Redis::connect(&trio.url(), "s1", rules).await.unwrap()),
            _ => Arc::new(Memory::new(rules)),
        }
    }

    /// A trial with the default rules.
    pub async fn open(&self) -> Trial {
        self.open_with(Rules::default()).await
    }

    pub async fn open_with(&self, rules: Rules) -> Trial {
        Trial::new(self.open_shard(rules).await)
    }

    /// Makes a server forget the scripts that it has loaded.
    pub fn forget_scripts(&self) {
        for server in self.servers() {
            assert_eq!(server.wire().say("SCRIPT FLUSH"), Value::Simple("OK".into()));
        }
    }

    /// What must hold after a case whatever it was about: no script touched a key that it did not declare. Returns how many
    /// commands of scripts that was seen of.
    pub fn check(&self) -> usize {
        self.guards.lock().unwrap().iter_mut().map(KeyGuard::check).sum()
    }
}

fn flush(server: &Server) {
    assert_eq!(server.wire().say("FLUSHALL"), Value::Simple("OK".into()));
}

pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

pub fn name(text: &str) -> Name {
    Name::parse(text.as_bytes()).unwrap()
}

/// A policy that differs from the default in what `change` changes.
pub fn policy(change: impl FnOnce(&mut Policy)) -> Policy {
    let mut policy = Policy::default();
    change(&mut policy);
    policy
}

/// A policy with a chosen id.
pub fn with_id(id: &'static str) -> Policy {
    policy(|policy| policy.id = Some(Bytes::from_static(id.as_bytes())))
}

/// A policy with a unique key that is held at most `ms`.
pub fn with_unique(key: &'static str, ms: Millis) -> Policy {
    policy(|policy| policy.unique = Some((Bytes::from_static(key.as_bytes()), ms)))
}

/// A policy of a job that may be delivered so often, without backoff.
pub fn with_attempts(attempts: u32) -> Policy {
    policy(|policy| (policy.attempts, policy.backoff) = (attempts, 0))
}

pub fn with_ttl(ttl: Millis) -> Policy {
    policy(|policy| policy.ttl = ttl)
}

pub fn chosen(id: &'static str) -> JobRef {
    JobRef::Chosen(Bytes::from_static(id.as_bytes()))
}

pub fn payloads(deliveries: &[Delivery]) -> Vec<&str> {
    deliveries.iter().map(|delivery| std::str::from_utf8(&delivery.spec.payload).unwrap()).collect()
}

/// One shard, one queue, one clock.
pub struct Trial {
    pub shard: Arc<dyn Shard>,
    pub queue: Name,
    pub now: UnixMs,
    /// The effects of the last batch.
    pub effects: Vec<Effect>,
    tokens: u64,
}

impl Trial {
    pub fn new(shard: Arc<dyn Shard>) -> Trial {
        Trial { shard, queue: name("main"), now: BEGIN, effects: Vec::new(), tokens: 0 }
    }

    pub fn advance(&mut self, ms: Millis) {
        self.now += ms;
    }

    /// A token that nobody had, for which a backoff has no jitter.
    pub fn token(&mut self) -> u64 {
        self.tokens += 1000;
        self.tokens + 500
    }

    pub async fn apply_ops(&mut self, ops: Vec<Op>) -> Vec<Outcome> {
        let applied = self.shard.apply(ops, Some(self.now)).await;
        self.effects = applied.effects;
        applied.outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|error| panic!("{error}"))).collect()
    }

    /// Applies actions on the trial's queue in one batch.
    pub async fn apply(&mut self, actions: Vec<Action>) -> Vec<Outcome> {
        let queue = self.queue.clone();
        self.apply_ops(actions.into_iter().map(|action| Op { queue: queue.clone(), action }).collect()).await
    }

    pub async fn one(&mut self, action: Action) -> Outcome {
        let mut outcomes = self.apply(vec![action]).await;
        assert_eq!(outcomes.len(), 1, "an outcome for each op");
        outcomes.remove(0)
    }

    /// The effect of the last batch on the trial's queue.
    pub fn effect(&self) -> &Effect {
        let found: Vec<_> = self.effects.iter().filter(|effect| effect.queue == self.queue).collect();
        assert_eq!(found.len(), 1, "one effect for each queue: {:?}", self.effects);
        found[0]
    }

    pub async fn place(&mut self, policy: Policy, payload: &str, start: Start) -> Placed {
        let payloads = vec![Bytes::copy_from_slice(payload.as_bytes())];
        match self.one(Action::Enqueue { policy: Arc::new(policy), payloads, start }).await {
            Outcome::Enqueued(mut placed) if placed.len() == 1 => placed.remove(0),
            other => panic!("expected one placed job, got {other:?}"),
        }
    }

    /// Adds one job that may start now, and returns its seq.
    pub async fn enqueue(&mut self, payload: &str) -> u64 {
        self.enqueue_as(Policy::default(), payload).await
    }

    pub async fn enqueue_as(&mut self, policy: Policy, payload: &str) -> u64 {
        self.enqueue_at(policy, payload, Start::Now).await
    }

    pub async fn enqueue_at(&mut self, policy: Policy, payload: &str, start: Start) -> u64 {
        match self.place(policy, payload, start).await {
            Placed::Added(seq) => seq,
            held => panic!("expected a new job, got {held:?}"),
        }
    }

    /// Adds so many jobs, payloads `0`, `1` …, in one op.
    pub async fn enqueue_many(&mut self, policy: Policy, count: usize) -> Vec<u64> {
        let payloads = (0..count).map(|n| Bytes::from(n.to_string())).collect();
        match self.one(Action::Enqueue { policy: Arc::new(policy), payloads, start: Start::Now }).await {
            Outcome::Enqueued(placed) => placed
                .into_iter()
                .map(|placed| match placed {
                    Placed::Added(seq) => seq,
                    held => panic!("expected a new job, got {held:?}"),
                })
                .collect(),
            other => panic!("expected placed jobs, got {other:?}"),
        }
    }

    pub async fn lease(&mut self, count: usize) -> Vec<Delivery> {
        self.lease_for(count, LEASE_MS).await
    }

    pub async fn lease_for(&mut self, count: usize, lease_ms: Millis) -> Vec<Delivery> {
        let tokens = (0..count).map(|_| self.token()).collect();
        match self.one(Action::Lease { tokens, lease_ms, worker: Bytes::from_static(b"worker") }).await {
            Outcome::Leased(deliveries) => deliveries,
            other => panic!("expected deliveries, got {other:?}"),
        }
    }

    /// The lease of the next job in line; panics when none is ready.
    pub async fn take(&mut self) -> Lease {
        let mut deliveries = self.lease(1).await;
        assert_eq!(deliveries.len(), 1, "a job is ready");
        deliveries.remove(0).lease
    }

    pub async fn count(&mut self, action: Action) -> u64 {
        match self.one(action).await {
            Outcome::Count(count) => count,
            other => panic!("expected a count, got {other:?}"),
        }
    }

    pub async fn ack(&mut self, lease: Lease) -> u64 {
        self.count(Action::Ack { leases: vec![lease], result: Bytes::new() }).await
    }

    pub async fn fail(&mut self, lease: Lease) -> Outcome {
        self.one(fail(lease)).await
    }

    /// Fails a delivery so that the job is dead at once.
    pub async fn kill(&mut self, lease: Lease) {
        assert_eq!(self.one(kill(lease)).await, Outcome::State(JobState::Dead));
    }

    pub async fn release(&mut self, lease: Lease, delay: Millis) -> Outcome {
        self.one(Action::Release { lease, delay }).await
    }

    pub async fn extend(&mut self, lease: Lease, lease_ms: Millis) -> Outcome {
        self.one(Action::Extend { lease, lease_ms }).await
    }

    pub async fn cancel(&mut self, seq: u64) -> u64 {
        self.count(Action::Cancel { job: JobRef::Seq(seq) }).await
    }

    pub async fn find(&mut self, job: JobRef) -> Option<Box<JobView>> {
        match self.one(Action::Job { job }).await {
            Outcome::Job(found) => found,
            other => panic!("expected a job, got {other:?}"),
        }
    }

    /// What the shard knows of a job that must be there.
    pub async fn job(&mut self, seq: u64) -> JobView {
        *self.find(JobRef::Seq(seq)).await.unwrap_or_else(|| panic!("job {seq} is not known"))
    }

    pub async fn state(&mut self, seq: u64) -> JobState {
        self.job(seq).await.state
    }

    pub async fn len(&mut self, state: JobState) -> u64 {
        self.count(Action::Len { state }).await
    }

    pub async fn peek(&mut self, state: JobState, offset: u64, count: u64) -> Vec<JobView> {
        match self.one(Action::Peek { state, offset, count }).await {
            Outcome::Jobs(jobs) => jobs,
            other => panic!("expected jobs, got {other:?}"),
        }
    }

    /// The seqs of all jobs in a state, in the order of its page.
    pub async fn seqs(&mut self, state: JobState) -> Vec<u64> {
        self.peek(state, 0, 1000).await.iter().map(|job| job.seq).collect()
    }

    pub async fn stats(&mut self) -> Stats {
        match self.one(Action::Stats).await {
            Outcome::Stats(stats) => *stats,
            other => panic!("expected stats, got {other:?}"),
        }
    }

    pub async fn moved(&mut self, action: Action) -> (u64, Option<UnixMs>) {
        match self.one(action).await {
            Outcome::Moved { count, next } => (count, next),
            other => panic!("expected what was moved, got {other:?}"),
        }
    }

    pub async fn purge(&mut self, state: JobState) -> u64 {
        self.moved(Action::Purge { state }).await.0
    }

    pub async fn retry(&mut self, seq: u64) -> u64 {
        self.count(Action::DeadRetry { jobs: vec![JobRef::Seq(seq)] }).await
    }

    pub async fn tick(&mut self) {
        assert_eq!(self.one(Action::Tick).await, Outcome::Done);
    }
}

pub fn fail(lease: Lease) -> Action {
    Action::Fail {
        lease,
        error: Bytes::from_static(b"boom"),
        trace: Bytes::from_static(b"at line 1"),
        retry_in: None,
        dead: false,
    }
}

pub fn kill(lease: Lease) -> Action {
    Action::Fail { lease, error: Bytes::from_static(b"boom"), trace: Bytes::new(), retry_in: None, dead: true }
}

pub fn fail_in(lease: Lease, retry_in: Millis) -> Action {
    Action::Fail { lease, error: Bytes::new(), trace: Bytes::new(), retry_in: Some(retry_in), dead: false }
}
