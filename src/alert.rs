//! Tells people of deaths and of conditions: rules, sinks, and the one proxy at a time that tells.
//!
//! A death is counted on its shard in the commit that makes it ([`crate::shard::DeathGroup`]). The proxy that leads
//! ([`teller`]) reads the counts, tells each channel, a rule's way to one of its sinks, what it has not been told, and marks
//! it as told once the sink has taken it. The first death of a kind is told at once, what follows as digests. At least
//! once each; a message that is sent again has the same id; a sink that fails holds up no other and is not alerted about.
//!
//! ```text
//! shards' outboxes ── teller ── message ── note on a shard ── sink ── marks on the shards ── settled
//!      conditions ─── watch ──┘
//! ```

pub mod message;
pub mod post;
pub mod sink;
pub mod teller;
mod watch;

use std::sync::Arc;

use crate::clock::{self, Millis};
use crate::dispatch::Dispatcher;
use crate::error::{Error, Result};
use crate::job::Name;
use crate::resp::glob;
use crate::resp::reply::Reply;
use message::Message;
use sink::Sink;
use teller::ChannelNote;

/// What is told, and whom.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    pub name: String,
    /// Patterns as `KEYS` takes them; a queue that matches one of them, and a type.
    pub queues: Vec<String>,
    pub kinds: Vec<String>,
    /// By their place in [`Alerts::sinks`].
    pub sinks: Vec<usize>,
    /// Between two digests on one channel.
    pub interval_ms: Millis,
    /// Groups that a digest tells of one by one.
    pub digest_groups: usize,
    pub deaths: bool,
    /// More ready jobs in a queue than this.
    pub deeper_than: Option<u64>,
    /// A ready job that has waited longer.
    pub older_than_ms: Option<Millis>,
    /// A larger part of the deliveries fails, over the window.
    pub failure_rate: Option<f64>,
    pub window_ms: Millis,
    /// A shard does not answer for so long.
    pub shard_down_ms: Option<Millis>,
}

impl Rule {
    /// A rule for every death, without a sink.
    pub fn named(name: &str) -> Rule {
        Rule {
            name: name.into(),
            queues: vec!["*".into()],
            kinds: vec!["*".into()],
            sinks: Vec::new(),
            interval_ms: 60_000,
            digest_groups: 10,
            deaths: true,
            deeper_than: None,
            older_than_ms: None,
            failure_rate: None,
            window_ms: 300_000,
            shard_down_ms: None,
        }
    }

    fn wants_queue(&self, queue: &Name) -> bool {
        self.queues.iter().any(|pattern| glob::matches(pattern.as_bytes(), queue.as_str().as_bytes()))
    }

    /// Whether deaths of this type are told of; the rest of a queue with too many kinds may hold any type.
    fn wants_deaths(&self, queue: &Name, kind: Option<&[u8]>) -> bool {
        let matches = |kind| self.kinds.iter().any(|pattern| glob::matches(pattern.as_bytes(), kind));
        self.deaths && self.wants_queue(queue) && kind.is_none_or(matches)
    }

    fn asks_for_queues(&self) -> bool {
        self.deeper_than.is_some() || self.older_than_ms.is_some() || self.failure_rate.is_some()
    }
}

/// The rules and sinks of the configuration.
#[derive(Default)]
pub struct Alerts {
    pub rules: Vec<Rule>,
    pub sinks: Vec<Sink>,
}

/// The name under which shards know a channel.
fn channel_name(rule: &Rule, sink: &Sink) -> String {
    format!("{}/{}", rule.name, sink.name)
}

impl Alerts {
    fn sinks_of<'a>(&'a self, rule: &'a Rule) -> impl Iterator<Item = &'a Sink> {
        rule.sinks.iter().filter_map(|sink| self.sinks.get(*sink))
    }

    /// What `GOFLOW.ALERT LIST` shows: what the shards know of each rule, whoever tells.
    pub async fn list(&self, dispatcher: &Dispatcher) -> Reply {
        let lanes = dispatcher.map().lanes.clone();
        let mut notes: std::collections::HashMap<String, ChannelNote> = std::collections::HashMap::new();
        for lane in lanes.iter().filter(|lane| !lane.is_down() && !self.rules.is_empty()) {
            for (name, note) in teller::channel_notes(lane).await.unwrap_or_default() {
                let known = notes.entry(name).or_default();
                if note.updated_at >= known.updated_at {
                    *known = note;
                }
            }
        }
        let views = if self.rules.is_empty() { Vec::new() } else { teller::read_waiting(&lanes).await };
        let rows = self.rules.iter().map(|rule| {
            let text = |text: &str| Reply::bulk(text);
            let texts = |texts: &[String]| Reply::Array(texts.iter().map(Reply::bulk).collect());
            let optional = |number: Option<u64>| number.map_or(Reply::Null, Reply::count);
            let (mut pending, mut firing) = (0, std::collections::BTreeMap::new());
            let mut channels = Vec::new();
            for sink in self.sinks_of(rule) {
                let name = channel_name(rule, sink);
                pending = pending.max(teller::untold(rule, &name, &views));
                let note = notes.get(&name).cloned().unwrap_or_default();
                channels.push(note.reply(sink));
                firing.extend(note.firing);
            }
            let firing = firing.into_values().map(Reply::bulk).collect();
            Reply::Map(vec![
                (Reply::text("name"), text(&rule.name)),
                (Reply::text("queues"), texts(&rule.queues)),
                (Reply::text("types"), texts(&rule.kinds)),
                (Reply::text("deaths"), Reply::Integer(i64::from(rule.deaths))),
                (Reply::text("deeper_than"), optional(rule.deeper_than)),
                (Reply::text("older_than_ms"), optional(rule.older_than_ms)),
                (Reply::text("failure_rate"), rule.failure_rate.map_or(Reply::Null, Reply::Double)),
                (Reply::text("shard_down_ms"), optional(rule.shard_down_ms)),
                (Reply::text("min_interval_ms"), Reply::count(rule.interval_ms)),
                (Reply::text("pending"), Reply::count(pending)),
                (Reply::text("firing"), Reply::Array(firing)),
                (Reply::text("deliveries"), Reply::Array(channels)),
            ])
        });
        Reply::Array(rows.collect())
    }

    /// Sends a message through each sink of a rule, one after the other, and says what came of it.
    pub async fn test(&self, name: &str) -> Result<Reply> {
        let rule = self.rules.iter().find(|rule| rule.name == name);
        let rule = rule.ok_or_else(|| Error::bad(format!("no alert is named '{name}' in the configuration")))?;
        let message = Message::test(&rule.name, clock::now());
        let mut said = Vec::new();
        for sink in self.sinks_of(rule) {
            let answer = match sink.send(&message, rule.digest_groups).await {
                Ok(()) => "OK".to_owned(),
                Err(failure) => failure.why,
            };
            said.push((Reply::bulk(&sink.name), Reply::bulk(answer)));
        }
        Ok(Reply::Map(said))
    }
}

/// Shared by those that answer and the one that tells.
pub type SharedAlerts = Arc<Alerts>;
