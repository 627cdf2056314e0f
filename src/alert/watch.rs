//! Which conditions of the rules hold now: a queue too deep, a job too old, too many failures, a shard down.
//!
//! A condition begins when its figure is above the limit and ends when it is below [`CALM`] of it, so that one that wavers
//! about the limit tells of it once. What cannot be seen (a shard does not answer, too little has happened) leaves the
//! condition as it was. Figures are sums over all shards, read as the sampler reads them and only where a rule asks.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;

use super::Rule;
use crate::clock::Millis;
use crate::dispatch::lane::Lane;
use crate::error::{Error, Result};
use crate::job::Name;
use crate::shard::{Action, Op, Outcome};

/// A condition ends below this part of its limit.
const CALM: f64 = 0.8;
/// Queues whose counters are asked for together.
const GROUP: usize = 64;
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long a look waits for one shard.
const LOOK_WAIT: Duration = Duration::from_secs(3);
/// The pause after a look is so many times what the look took.
const REST: u32 = 10;
/// Points in a window of failures.
const WINDOW_POINTS: u32 = 10;
/// Fewer verdicts than this in a window say nothing about a rate.
const VERDICTS_MIN: u64 = 10;
/// Conditions of one rule that may hold at once; what is beyond waits for one to end.
const FIRING_MAX: usize = 500;

/// Conditions by their keys, with what is to be said of them.
pub type Firing = BTreeMap<String, String>;

/// What all shards say of one queue.
#[derive(Clone, Copy, Debug, Default)]
struct Figures {
    ready: u64,
    oldest_ms: Millis,
    failed: u64,
    completed: u64,
}

pub struct Watch {
    /// By the number of the rule.
    pub firing: Vec<Firing>,
    next_look: Instant,
    history: HashMap<Name, VecDeque<(Instant, Figures)>, RandomState>,
    down_since: HashMap<Arc<str>, Instant>,
}

impl Watch {
    pub fn new(rules: usize) -> Watch {
        Watch {
            firing: vec![Firing::new(); rules],
            next_look: Instant::now(),
            history: HashMap::default(),
            down_since: HashMap::new(),
        }
    }

    /// Looks at what the rules ask for, where it is time to.
    pub async fn look(&mut self, rules: &[Rule], lanes: &[Arc<Lane>]) {
        self.look_at_shards(rules, lanes, Instant::now());
        let began = Instant::now();
        if began < self.next_look || !rules.iter().any(Rule::asks_for_queues) {
            return;
        }
        let mut figures: BTreeMap<Name, Figures> = BTreeMap::new();
        let mut is_whole = true;
        for lane in lanes {
            let reading = tokio::time::timeout(LOOK_WAIT, read(rules, lane, &mut figures));
            is_whole &= !lane.is_down() && matches!(reading.await, Ok(Ok(())));
        }
        let span = rules.iter().map(|rule| rule.window_ms).max().unwrap_or(0);
        self.remember(&figures, began, Duration::from_millis(span), is_whole);
        for (number, rule) in rules.iter().enumerate().filter(|(_, rule)| rule.asks_for_queues()) {
            self.judge(number, rule, &figures, began, is_whole);
        }
        self.next_look = Instant::now() + LOOK_EVERY.max(began.elapsed() * REST);
    }

    fn look_at_shards(&mut self, rules: &[Rule], lanes: &[Arc<Lane>], now: Instant) {
        self.down_since.retain(|name, _| lanes.iter().any(|lane| lane.name() == name && lane.is_down()));
        for lane in lanes.iter().filter(|lane| lane.is_down()) {
            self.down_since.entry(lane.name().clone()).or_insert(now);
        }
        for (firing, rule) in self.firing.iter_mut().zip(rules) {
            let Some(after) = rule.shard_down_ms.map(Duration::from_millis) else { continue };
            firing.retain(|key, _| {
                let shard = key.strip_prefix("shard-down ");
                shard.is_none_or(|shard| self.down_since.keys().any(|down| **down == *shard))
            });
            for (shard, since) in &self.down_since {
                if now - *since >= after {
                    let text = || format!("shard {shard} is down");
                    firing.entry(format!("shard-down {shard}")).or_insert_with(text);
                }
            }
        }
    }

    fn remember(&mut self, figures: &BTreeMap<Name, Figures>, now: Instant, span: Duration, is_whole: bool) {
        if span.is_zero() || !is_whole {
            return;
        }
        self.history.retain(|queue, _| figures.contains_key(queue));
        for (queue, figures) in figures {
            let points = self.history.entry(queue.clone()).or_default();
            if points.back().is_none_or(|(at, _)| now - *at >= span / WINDOW_POINTS) {
                points.push_back((now, *figures));
            }
            // One point that is older than the window stays: the window is measured from it.
            while points.get(1).is_some_and(|(at, _)| now - *at >= span) {
                points.pop_front();
            }
        }
    }

    /// The part of the verdicts in the window that were failures; `None` while that is not known.
    fn rate(&self, queue: &Name, figures: &Figures, now: Instant, window: Duration) -> Option<f64> {
        let (since, before) = self.history.get(queue)?.iter().rev().find(|(at, _)| now - *at >= window / 2)?;
        let failed = figures.failed.saturating_sub(before.failed);
        let all = failed + figures.completed.saturating_sub(before.completed);
        match all {
            0 => (now - *since >= window).then_some(0.0),
            all => (all >= VERDICTS_MIN).then(|| failed as f64 / all as f64),
        }
    }

    fn judge(&mut self, number: usize, rule: &Rule, figures: &BTreeMap<Name, Figures>, now: Instant, is_whole: bool) {
        let was = self.firing[number].clone();
        let mut firing: Firing =
            was.iter().filter(|(key, _)| key.starts_with("shard-down ")).map(|(k, v)| (k.clone(), v.clone())).collect();
        let mut consider = |key: String, figure: Option<f64>, limit: f64, text: &dyn Fn() -> String| {
            let known = was.get(&key);
            let holds = match figure {
                Some(figure) if known.is_some() => figure > limit * CALM || !is_whole,
                Some(figure) => figure > limit,
                None => known.is_some(),
            };
            if holds && (known.is_some() || firing.len() < FIRING_MAX) {
                firing.insert(key, known.cloned().unwrap_or_else(text));
            }
        };
        for (queue, figures) in figures.iter().filter(|(queue, _)| rule.wants_queue(queue)) {
            if let Some(limit) = rule.deeper_than {
                let text = || format!("{queue} has {} ready jobs, more than {limit}", figures.ready);
                consider(format!("depth {queue}"), Some(figures.ready as f64), limit as f64, &text);
            }
            if let Some(limit) = rule.older_than_ms {
                let text = || {
                    let (age, limit) = (figures.oldest_ms / 1_000, limit as f64 / 1_000.0);
                    format!("the oldest ready job of {queue} has waited {age} s, longer than {limit} s")
                };
                consider(format!("age {queue}"), Some(figures.oldest_ms as f64), limit as f64, &text);
            }
            if let Some(limit) = rule.failure_rate {
                // Part of a sum says nothing beside a whole one of before.
                let window = Duration::from_millis(rule.window_ms);
                let rate = if is_whole { self.rate(queue, figures, now, window) } else { None };
                let text = || {
                    let (rate, limit) = (rate.unwrap_or(0.0) * 100.0, limit * 100.0);
                    format!("{rate:.0} % of the deliveries of {queue} fail, more than {limit:.0} %")
                };
                consider(format!("failures {queue}"), rate, limit, &text);
            }
        }
        if !is_whole {
            // A queue that was not seen may lie on the shard that does not answer.
            for (key, text) in was {
                firing.entry(key).or_insert(text);
            }
        }
        self.firing[number] = firing;
    }
}

/// Adds what one shard says of the queues that a rule asks for.
async fn read(rules: &[Rule], lane: &Lane, figures: &mut BTreeMap<Name, Figures>) -> Result<()> {
    let wanted = |queue: &Name| rules.iter().any(|rule| rule.asks_for_queues() && rule.wants_queue(queue));
    let queues: Vec<Name> = lane.shard().queues().await?.into_iter().filter(wanted).collect();
    for group in queues.chunks(GROUP) {
        lane.room().await?;
        let ask = |queue: &Name| lane.submit(Op { queue: queue.clone(), action: Action::Stats }, 0);
        let asked: Vec<_> = group.iter().map(|queue| (queue, ask(queue))).collect();
        for (queue, outcome) in asked {
            let outcome = outcome.await.unwrap_or_else(|_| Err(Error::bad("the lane is gone")))?;
            if let Outcome::Stats(stats) = outcome {
                let sum = figures.entry(queue.clone()).or_default();
                sum.ready += stats.ready;
                let waited = stats.oldest_ready_at.map_or(0, |at| stats.now.saturating_sub(at));
                sum.oldest_ms = sum.oldest_ms.max(waited);
                sum.failed += stats.failed + stats.lapsed;
                sum.completed += stats.completed;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule() -> Rule {
        Rule { queues: vec!["m*".into()], ..Rule::named("r") }
    }

    fn figures(ready: u64, failed: u64, completed: u64) -> BTreeMap<Name, Figures> {
        let figures = Figures { ready, failed, completed, oldest_ms: ready * 10 };
        ["main", "other"].map(|queue| (Name::parse(queue.as_bytes()).unwrap(), figures)).into()
    }

    #[test]
    fn a_condition_begins_above_its_limit_and_ends_well_below() {
        let (mut watch, now) = (Watch::new(1), Instant::now());
        let rule = Rule { deeper_than: Some(100), ..rule() };
        for (ready, fires) in [(100, 0), (101, 1), (90, 1), (81, 1), (80, 0), (95, 0), (101, 1)] {
            watch.judge(0, &rule, &figures(ready, 0, 0), now, true);
            assert_eq!(watch.firing[0].len(), fires, "{ready}");
        }
        assert_eq!(watch.firing[0]["depth main"], "main has 101 ready jobs, more than 100");
        watch.judge(0, &rule, &figures(0, 0, 0), now, false);
        assert_eq!(watch.firing[0].len(), 1, "a shard that does not answer ends nothing");
        watch.judge(0, &rule, &BTreeMap::new(), now, true);
        assert_eq!(watch.firing[0].len(), 0);
    }

    #[test]
    fn a_rate_is_measured_over_its_window() {
        let (mut watch, began) = (Watch::new(1), Instant::now());
        let rule = Rule { failure_rate: Some(0.5), window_ms: 10_000, ..rule() };
        let mut at = |seconds: u64, failed, completed| {
            let (now, figures) = (began + Duration::from_secs(seconds), figures(0, failed, completed));
            watch.remember(&figures, now, Duration::from_secs(10), true);
            watch.judge(0, &rule, &figures, now, true);
            watch.firing[0].get("failures main").cloned()
        };
        assert_eq!(at(0, 1_000, 0), None, "what was before is not known");
        assert_eq!(at(6, 1_008, 0), None, "too few to say");
        assert_eq!(at(8, 1_015, 5).unwrap(), "75 % of the deliveries of main fail, more than 50 %");
        assert!(at(14, 1_015, 12).is_some());
        assert_eq!(at(20, 1_016, 90), None);
        assert_eq!(at(40, 1_016, 90), None);
    }
}
