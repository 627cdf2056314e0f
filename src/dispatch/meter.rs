//! What a lane counts: jobs by what became of them, how long they waited and took, and how the shard answers.
//!
//! Called by a lane's own task before and after each batch; the queue's handles are looked up once for each run of ops on
//! one queue, not per request. A job's duration runs from its delivery to the next verdict in the same lane: a job that is
//! delivered by one proxy and acknowledged through another is not measured.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;

use crate::error::{Code, Result};
use crate::job::{Delivery, JobState, Lease, Name};
use crate::metrics::{Metrics, QueueMetrics, ShardMetrics};
use crate::shard::{Action, Op, Outcome, Placed};

/// Deliveries whose start is remembered: so many, and as many before these.
const STARTS_MAX: usize = 50_000;

/// What an outcome will be counted as.
enum Kind {
    Enqueue,
    Lease { lease_ms: u64 },
    Ack,
    Fail,
    Release,
    Quiet,
}

/// One op of a batch that is on its way.
pub struct Noted {
    /// `None`: the op is on a lock or semaphore.
    queue: Option<Arc<QueueMetrics>>,
    kind: Kind,
}

pub struct Meter {
    metrics: Arc<Metrics>,
    shard: ShardMetrics,
    /// When each lease began, by its token; the older half is dropped when the younger is full.
    young: HashMap<u64, Instant, RandomState>,
    old: HashMap<u64, Instant, RandomState>,
}

impl Meter {
    pub fn new(metrics: Arc<Metrics>, shard: &str) -> Meter {
        Meter { shard: metrics.shard(shard), metrics, young: HashMap::default(), old: HashMap::default() }
    }

    /// Looks at a batch before it is applied.
    pub fn before(&mut self, ops: &[Op]) -> Vec<Noted> {
        let mut last: Option<(&Name, Arc<QueueMetrics>)> = None;
        let mut noted = Vec::with_capacity(ops.len());
        for op in ops {
            if matches!(op.action, Action::Keyed { .. }) {
                noted.push(Noted { queue: None, kind: Kind::Quiet });
                continue;
            }
            let queue = match &last {
                Some((name, queue)) if **name == op.queue => queue.clone(),
                _ => self.metrics.queue(&op.queue),
            };
            let kind = match &op.action {
                Action::Enqueue { .. } => Kind::Enqueue,
                Action::Lease { lease_ms, .. } => Kind::Lease { lease_ms: *lease_ms },
                Action::Ack { leases, .. } => {
                    leases.iter().for_each(|lease| self.end(&queue, lease));
                    Kind::Ack
                }
                Action::Fail { lease, .. } => {
                    self.end(&queue, lease);
                    Kind::Fail
                }
                Action::Release { .. } => Kind::Release,
                _ => Kind::Quiet,
            };
            last = Some((&op.queue, queue.clone()));
            noted.push(Noted { queue: Some(queue), kind });
        }
        noted
    }

    /// Counts what came of it.
    pub fn after(&mut self, noted: &[Noted], outcomes: &[Result<Outcome>], took: Duration) {
        self.shard.batch_ops.observe(noted.len() as f64);
        self.shard.batch_seconds.observe(took.as_secs_f64());
        if outcomes.iter().any(|outcome| matches!(outcome, Err(error) if error.code == Code::ShardDown)) {
            self.shard.errors.inc();
        }
        let now = Instant::now();
        for (Noted { queue, kind }, outcome) in noted.iter().zip(outcomes) {
            let Some(queue) = queue else { continue };
            match (kind, outcome) {
                (Kind::Enqueue, Ok(Outcome::Enqueued(placed))) => {
                    queue.enqueued.inc_by(placed.iter().filter(|one| matches!(one, Placed::Added(_))).count() as u64);
                }
                (Kind::Lease { lease_ms }, Ok(Outcome::Leased(deliveries))) => {
                    queue.started.inc_by(deliveries.len() as u64);
                    deliveries.iter().for_each(|delivery| self.begin(queue, delivery, *lease_ms, now));
                }
                (Kind::Ack, Ok(Outcome::Count(count))) => queue.completed.inc_by(*count),
                (Kind::Fail, Ok(Outcome::State(state))) => {
                    queue.failed.inc();
                    if matches!(state, JobState::Scheduled | JobState::Ready) {
                        queue.retried.inc();
                    }
                }
                (Kind::Release, Ok(Outcome::State(_))) => queue.released.inc(),
                _ => {}
            }
        }
    }

    fn begin(&mut self, queue: &QueueMetrics, delivery: &Delivery, lease_ms: u64, now: Instant) {
        if delivery.attempt == 1 {
            // Both ends by the shard's clock.
            let started_at = delivery.lease_until.saturating_sub(lease_ms);
            queue.wait.observe(started_at.saturating_sub(delivery.enqueued_at) as f64 / 1_000.0);
        }
        if self.young.len() >= STARTS_MAX {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(delivery.lease.token, now);
    }

    fn end(&mut self, queue: &QueueMetrics, lease: &Lease) {
        if let Some(began) = self.young.remove(&lease.token).or_else(|| self.old.remove(&lease.token)) {
            queue.duration.observe(began.elapsed().as_secs_f64());
        }
    }
}
