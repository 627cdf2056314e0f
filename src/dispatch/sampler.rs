//! Reads the depths of a shard's queues in the background and shows them as metrics: on one proxy at a time.
//!
//! Who samples a shard is decided on the shard itself, by a short lease on the role ([`crate::shard::Shard::lead`]): the first
//! proxy to ask has it as long as it keeps asking, and a few seconds after it is gone another has it. What was sampled is shown
//! until the lease ends and not longer, so no two proxies ever show the same shard, and sums over proxies are true.
//!
//! The one that samples a shard also moves the shares of the queues whose limits are kept there ([`limits`](super::limits)).
//!
//! A pass asks for the queues' counters in small groups, as ops like any other, and the pause after it is at least ten
//! times what it took: however many queues there are, sampling stays a small part of the shard's work.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::lane::Lane;
use crate::error::Result;
use crate::job::Name;
use crate::metrics::{Metrics, QueueSample, ShardSample};
use crate::shard::{Action, Op, Outcome, Stats};

/// The role, as the shard knows it.
const ROLE: &str = "sampler";
/// How long a proxy has the role after it last asked.
const LEAD_MS: u64 = 6_000;
const SAMPLE_EVERY: Duration = Duration::from_secs(2);
/// Queues whose counters are asked for together.
const GROUP: usize = 64;
/// The pause after a pass is so many times what the pass took.
const REST: u32 = 10;
/// Between two passes the lease is renewed, however long the pause is; so often others ask whether the role is free.
const RENEW_EVERY: Duration = Duration::from_millis(LEAD_MS / 2);

/// Samples the lane's shard until the process ends; `holder` names this process.
pub async fn run(lane: Arc<Lane>, metrics: Arc<Metrics>, holder: Arc<str>) {
    let mut sampler = Sampler { lane, metrics, holder, unheard: false };
    while !sampler.lane.is_ended() {
        let pass = Instant::now();
        let mut least = SAMPLE_EVERY;
        match sampler.pass().await {
            Ok(true) => sampler.hear(),
            Ok(false) => {
                sampler.hear();
                sampler.step_back();
                least = RENEW_EVERY;
            }
            Err(error) => {
                tracing::debug!(shard = %sampler.lane.name(), %error, "the shard was not sampled");
                sampler.step_back();
                // A proxy without traffic learns of it here alone, and its readiness should be true.
                sampler.unheard = true;
                sampler.lane.note_reach(Err(error));
            }
        }
        let rest = least.max(pass.elapsed() * REST);
        sampler.rest(rest.mul_f64(rand::random_range(0.9..1.1))).await;
    }
}

struct Sampler {
    lane: Arc<Lane>,
    metrics: Arc<Metrics>,
    holder: Arc<str>,
    /// The shard did not answer us the last time.
    unheard: bool,
}

impl Sampler {
    /// Until when the role is ours; `None` when another proxy has it.
    async fn lead(&self) -> Result<Option<Instant>> {
        // From before the question, so that we stop showing before the shard lets another lead.
        let asked_at = Instant::now();
        let leads = self.lane.shard().lead(ROLE, &self.holder, LEAD_MS).await?;
        Ok(leads.then(|| asked_at + Duration::from_millis(LEAD_MS)))
    }

    /// Samples the shard if it is ours to sample.
    async fn pass(&mut self) -> Result<bool> {
        let Some(mut until) = self.lead().await? else { return Ok(false) };
        let queues = self.lane.shard().queues().await?;
        let mut sample = ShardSample { queues: Vec::with_capacity(queues.len()) };
        for group in queues.chunks(GROUP) {
            self.read(group, &mut sample).await?;
            if until < Instant::now() + RENEW_EVERY {
                match self.lead().await? {
                    Some(renewed) => until = renewed,
                    None => return Ok(false),
                }
                self.metrics.show_until(self.lane.name(), until);
            }
        }
        self.metrics.publish(self.lane.name(), sample, until);
        Ok(true)
    }

    async fn read(&self, queues: &[Name], sample: &mut ShardSample) -> Result<()> {
        self.lane.room().await?;
        let asked: Vec<_> = queues
            .iter()
            .map(|queue| (queue, self.lane.submit(Op { queue: queue.clone(), action: Action::Stats }, 0)))
            .collect();
        for (queue, outcome) in asked {
            if let Outcome::Stats(stats) = outcome.await.unwrap_or(Ok(Outcome::Done))? {
                self.lane.note_limits(queue, stats.keeps_limits);
                sample.queues.push((queue.clone(), read_stats(&stats)));
            }
        }
        Ok(())
    }

    /// Waits, and keeps the role meanwhile.
    async fn rest(&self, rest: Duration) {
        let end = Instant::now() + rest;
        while Instant::now() < end {
            tokio::time::sleep((end - Instant::now()).min(RENEW_EVERY)).await;
            if Instant::now() < end && self.metrics.shows(self.lane.name()) {
                match self.lead().await {
                    Ok(Some(until)) => self.metrics.show_until(self.lane.name(), until),
                    Ok(None) | Err(_) => self.step_back(),
                }
            }
        }
    }

    /// The shard answers. Where it was not we who found it silent, the lane knows better when it is back.
    fn hear(&mut self) {
        if std::mem::take(&mut self.unheard) {
            self.lane.note_reach(Ok(()));
        }
    }

    fn step_back(&self) {
        self.metrics.retract(self.lane.name());
        self.lane.forget_limits();
    }
}

fn read_stats(stats: &Stats) -> QueueSample {
    QueueSample {
        ready: stats.ready,
        scheduled: stats.scheduled,
        leased: stats.leased,
        dead: stats.dead,
        oldest_ready_ms: stats.oldest_ready_at.map_or(0, |at| stats.now.saturating_sub(at)),
        died: stats.died,
        lapsed: stats.lapsed,
        expired: stats.expired,
        cancelled: stats.cancelled,
        redriven: stats.redriven,
    }
}
