//! What all sessions of the process share, and the answers that the process gives about itself.

mod map;
pub mod settings;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crate::alert::SharedAlerts;
use crate::clients::Clients;
use crate::clock;
use crate::command::Ask;
use crate::command::admin::Totals;
use crate::command::limit;
use crate::dispatch::bound::Workers;
use crate::dispatch::keeper::Keeper;
use crate::dispatch::layout::Standing;
use crate::dispatch::{Dispatcher, limits};
use crate::error::{Code, Error, Result};
use crate::execute::Answer;
use crate::forward::Forwarding;
use crate::job::Name;
use crate::metrics::Metrics;
use crate::resp::glob;
use crate::resp::reply::{Protocol, Reply};
use crate::shard::{Action, Op, Outcome, QueueLimits};

pub mod slowlog;
mod workers;

use settings::{Reread, Settings};

/// The version of Redis whose commands and replies clients may expect here.
pub const REDIS_VERSION: &str = "7.2.0";

/// Queues whose counters are asked for together.
const TOTALS_GROUP: usize = 64;

/// How long a wrong password waits for its answer.
pub const WRONG_PASS_REST: Duration = Duration::from_millis(100);

/// Who may connect.
#[derive(Clone, Debug, Default)]
pub struct Auth {
    /// User names and passwords; empty: everybody may.
    pub users: Vec<(String, String)>,
}

impl Auth {
    pub fn is_needed(&self) -> bool {
        !self.users.is_empty()
    }

    pub fn check(&self, user: &[u8], password: &[u8]) -> Result<()> {
        if !self.is_needed() {
            return match user {
                b"default" => Err(Error::bad(
                    "AUTH <password> called without any password configured for the default user. Are you sure your configuration is correct?",
                )),
                _ => Err(wrong_pass()),
            };
        }
        // Every entry is compared in full, so that the time taken says nothing about which part was wrong.
        let found = self.users.iter().fold(false, |found, (name, secret)| {
            found | (same(name.as_bytes(), user) & same(secret.as_bytes(), password))
        });
        if found { Ok(()) } else { Err(wrong_pass()) }
    }
}

fn wrong_pass() -> Error {
    Error::new(Code::WrongPass, "invalid username-password pair or user is disabled.")
}

/// Compares in a time that depends on the lengths alone.
pub fn same(a: &[u8], b: &[u8]) -> bool {
    let differences = a.iter().zip(b).fold(0u8, |all, (a, b)| all | (a ^ b));
    std::hint::black_box(differences) == 0 && a.len() == b.len()
}

/// The shared part of all sessions.
pub struct Process {
    pub dispatcher: Arc<Dispatcher>,
    pub alerts: SharedAlerts,
    pub keeper: Arc<Keeper>,
    pub forwarding: Arc<Forwarding>,
    pub settings: RwLock<Arc<Settings>>,
    pub settings_version: AtomicU64,
    pub reread: Reread,
    pub clients: Clients,
    /// The worker sessions of its connections.
    pub workers: Arc<Workers>,
    pub started_at: Instant,
    pub listen_port: u16,
    /// The process is about to end: waits are cut short and connections closed when their answers are out.
    pub draining: AtomicBool,
    /// Requests of HTTP that were begun and whose answers are not out.
    pub requests: Arc<AtomicUsize>,
    pub bytes_in: AtomicU64,
    pub bytes_out: AtomicU64,
    pub metrics: Arc<Metrics>,
    pub pulse: Pulse,
    pub slowlog: slowlog::Slowlog,
    /// Clients are served; before that the process starts.
    pub serving: AtomicBool,
    /// One scrape at a time takes over what is counted elsewhere.
    pub scraping: Mutex<()>,
}

/// How long a thread may be silent before it counts as hanging.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// Whether the runtime threads still turn: each says so once a second.
pub struct Pulse {
    since: Instant,
    /// Milliseconds after `since` of each thread's last beat.
    beats: Vec<AtomicU64>,
}

impl Pulse {
    pub fn new(threads: usize) -> Pulse {
        Pulse { since: Instant::now(), beats: (0..threads).map(|_| AtomicU64::new(0)).collect() }
    }

    fn now(&self) -> u64 {
        self.since.elapsed().as_millis() as u64
    }

    /// Beats for one thread as long as its runtime does.
    pub async fn beat(&self, thread: usize) {
        let mut second = tokio::time::interval(Duration::from_secs(1));
        while let Some(beat) = self.beats.get(thread) {
            second.tick().await;
            beat.store(self.now(), Ordering::Relaxed);
        }
    }

    /// The numbers of the threads that were not heard of for too long.
    pub fn silent_threads(&self) -> Vec<usize> {
        let since = self.now().saturating_sub(SILENCE_MAX.as_millis() as u64);
        let beats = self.beats.iter().enumerate();
        beats.filter(|(_, beat)| beat.load(Ordering::Relaxed) < since).map(|(thread, _)| thread).collect()
    }
}

impl Process {
    pub fn hello(&self, protocol: Protocol, client_id: u64) -> Reply {
        let version = if protocol == Protocol::Resp3 { 3 } else { 2 };
        Reply::Map(vec![
            (Reply::text("server"), Reply::text("redis")),
            (Reply::text("version"), Reply::text(REDIS_VERSION)),
            (Reply::text("proto"), Reply::Integer(version)),
            (Reply::text("id"), Reply::count(client_id)),
            (Reply::text("mode"), Reply::text("standalone")),
            (Reply::text("role"), Reply::text("master")),
            (Reply::text("modules"), Reply::Array(Vec::new())),
        ])
    }

    /// Brings the metrics up to date that nobody counts on the way.
    pub fn show_metrics(&self) {
        let metrics = &self.metrics;
        let _one_at_a_time = self.scraping.lock().unwrap_or_else(PoisonError::into_inner);
        for (shown, counted) in [
            (&metrics.connections_accepted, &self.clients.accepted),
            (&metrics.bytes_received, &self.bytes_in),
            (&metrics.bytes_sent, &self.bytes_out),
        ] {
            shown.inc_by(counted.load(Ordering::Relaxed).saturating_sub(shown.get()));
        }
        metrics.connections.set(self.clients.count() as i64);
        metrics.clients_blocked.set(self.clients.blocked() as i64);
        metrics.workers_active.set(self.clients.workers() as i64);
        metrics.draining.set(i64::from(self.draining.load(Ordering::Relaxed)));
        let map = self.dispatcher.map();
        for (at, lane) in map.lanes.iter().enumerate() {
            let shard = metrics.shard(lane.name());
            shard.up.set(i64::from(!lane.is_down()));
            shard.draining.set(i64::from(map.standing(at) != Standing::Open));
            shard.sampled.set(i64::from(metrics.shows(lane.name())));
        }
    }

    /// Answers a question to the process.
    pub fn answer(self: &Arc<Self>, ask: Ask) -> Answer {
        match ask {
            Ask::Queues => {
                let process = self.clone();
                Answer::Later(Box::pin(async move { process.queues().await.into() }))
            }
            Ask::Totals => {
                let process = self.clone();
                Answer::Later(Box::pin(async move { process.totals().await.into() }))
            }
            Ask::Workers { queue, offset, count } => {
                let process = self.clone();
                Answer::Later(Box::pin(async move { process.show_workers(queue, offset, count).await.into() }))
            }
            Ask::Limit { queue, change } => {
                let map = self.dispatcher.map();
                Answer::Later(Box::pin(async move {
                    match change == QueueLimits::default() {
                        true => limits::show(&map, &queue).await.map(|(limits, shares)| limit::shown(&limits, shares)),
                        false => limits::set(&map, &queue, &change).await.map(|()| Reply::OK),
                    }
                    .into()
                }))
            }
            Ask::Shards => Answer::reply(self.shards()),
            Ask::Map(order) => {
                let process = self.clone();
                // On its own: a client that goes away does not leave an order half done.
                let ordered = tokio::spawn(async move { process.change_map(order).await });
                Answer::Later(Box::pin(async move {
                    ordered.await.unwrap_or_else(|_| Err(Error::bad("the order was cut short"))).into()
                }))
            }
            Ask::Reload => {
                let process = self.clone();
                let ordered = tokio::spawn(async move { process.reload().await });
                Answer::Later(Box::pin(async move {
                    ordered.await.unwrap_or_else(|_| Err(Error::bad("the order was cut short"))).into()
                }))
            }
            Ask::Info { sections } => Answer::reply(Reply::bulk(self.info(&sections))),
            Ask::Config { patterns } => Answer::reply(self.config(&patterns)),
            Ask::Slow { count } => Answer::reply(self.slowlog.get(count)),
            Ask::SlowCount => Answer::reply(Reply::count(self.slowlog.len() as u64)),
            Ask::SlowReset => {
                self.slowlog.reset();
                Answer::reply(Reply::OK)
            }
            Ask::Alerts => {
                let process = self.clone();
                Answer::Later(Box::pin(async move { Ok(process.alerts.list(&process.dispatcher).await).into() }))
            }
            Ask::AlertTest { name } => {
                let process = self.clone();
                Answer::Later(Box::pin(async move { process.alerts.test(&name).await.into() }))
            }
            Ask::Time => {
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
                let part = |number: u64| Reply::bulk(number.to_string());
                Answer::reply(Reply::Array(vec![part(now.as_secs()), part(u64::from(now.subsec_micros()))]))
            }
        }
    }

    /// The queues of all shards that answer; an error only when none does.
    async fn queues(&self) -> Result<Reply> {
        let (mut names, mut failure, mut answered) = (BTreeSet::new(), None, false);
        for lane in &self.dispatcher.map().lanes {
            match lane.shard().queues().await {
                Ok(queues) => {
                    answered = true;
                    names.extend(queues);
                }
                Err(error) => failure = Some(error),
            }
        }
        match failure {
            Some(error) if !answered => Err(error),
            _ => Ok(Reply::Array(names.iter().map(|name| Reply::bulk(name.as_str())).collect())),
        }
    }

    /// Every queue of every shard that answers; an error only when none does.
    async fn totals(&self) -> Result<Reply> {
        let map = self.dispatcher.map();
        let mut totals = Totals::default();
        totals.shards = map.lanes.len() as u64;
        let (mut names, mut failure, mut answered) = (BTreeSet::new(), None, false);
        for lane in &map.lanes {
            let queues = match lane.shard().queues().await {
                Ok(queues) => queues,
                Err(error) => {
                    failure = Some(error);
                    continue;
                }
            };
            answered = true;
            for group in queues.chunks(TOTALS_GROUP) {
                lane.room().await?;
                let ask = |queue: &Name| lane.submit(Op { queue: queue.clone(), action: Action::Stats }, 0);
                for outcome in group.iter().map(ask).collect::<Vec<_>>() {
                    if let Ok(Ok(Outcome::Stats(stats))) = outcome.await {
                        totals.add(&stats);
                    }
                }
            }
            names.extend(queues);
        }
        if let Some(error) = failure.filter(|_| !answered) {
            return Err(error);
        }
        totals.queues = names.len() as u64;
        Ok(totals.reply(Reply::Null))
    }

    fn shards(&self) -> Reply {
        let map = self.dispatcher.map();
        let shards = map.lanes.iter().enumerate().map(|(at, lane)| {
            let state = match map.standing(at) {
                _ if lane.is_down() => "down",
                Standing::Open => "up",
                standing => standing.word(),
            };
            let vitals = &lane.vitals;
            let last_error = lane.last_error().map_or(Reply::Null, |error| Reply::bulk(error.to_string()));
            let mut fields = vec![
                (Reply::text("name"), Reply::bulk(&**lane.name())),
                (Reply::text("state"), Reply::text(state)),
                (Reply::text("weight"), Reply::Integer(i64::from(map.weight(at)))),
                (Reply::text("depth"), Reply::count(lane.depth())),
                (Reply::text("latency_us"), Reply::count(vitals.latency_us.load(Ordering::Relaxed))),
                (Reply::text("batches"), Reply::count(vitals.batches.load(Ordering::Relaxed))),
                (Reply::text("ops"), Reply::count(vitals.ops.load(Ordering::Relaxed))),
                (Reply::text("errors"), Reply::count(vitals.errors.load(Ordering::Relaxed))),
                (Reply::text("last_error"), last_error),
                (Reply::text("map_version"), Reply::count(map.version())),
            ];
            let journey = self.dispatcher.journal.get(lane.name()).map(|progress| *progress);
            let known = |number: Option<u64>| number.map_or(Reply::Null, Reply::count);
            fields.push((Reply::text("moved"), known(journey.map(|progress| progress.moved))));
            fields.push((Reply::text("to_move"), known(journey.map(|progress| progress.left))));
            (Reply::bulk(&**lane.name()), Reply::Map(fields))
        });
        Reply::Map(shards.collect())
    }

    fn config(&self, patterns: &[bytes::Bytes]) -> Reply {
        let fixed = [
            ("timeout", "0"),
            ("databases", "1"),
            ("maxmemory", "0"),
            ("maxmemory-policy", "noeviction"),
            ("save", ""),
            ("appendonly", "yes"),
            ("replica-read-only", "yes"),
            ("slave-read-only", "yes"),
        ];
        let settings = self.settings();
        let limit = settings.bounds.word_bytes_max.to_string();
        let known = fixed
            .iter()
            .copied()
            .chain([("proto-max-bulk-len", limit.as_str())])
            .chain(settings.shown.iter().map(|(name, value)| (name.as_str(), value.as_str())));
        let matching = known.filter(|(name, _)| patterns.iter().any(|pattern| names(pattern, name.as_bytes())));
        Reply::Map(matching.map(|(name, value)| (Reply::bulk(name), Reply::bulk(value))).collect())
    }

    /// `INFO` in Redis's form: what stock clients look for, and a section of our own.
    fn info(&self, sections: &[String]) -> String {
        let wants = |name: &str| {
            sections.is_empty()
                || sections
                    .iter()
                    .any(|section| matches!(section.as_str(), "all" | "everything" | "default") || section == name)
        };
        let mut text = String::new();
        let mut section = |name: &str, lines: &[(&str, String)]| {
            if !wants(&name.to_ascii_lowercase()) {
                return;
            }
            let _ = write!(text, "{}# {name}\r\n", if text.is_empty() { "" } else { "\r\n" });
            for (field, value) in lines {
                let _ = write!(text, "{field}:{value}\r\n");
            }
        };
        let uptime = self.started_at.elapsed().as_secs();
        section(
            "Server",
            &[
                ("redis_version", REDIS_VERSION.into()),
                ("redis_mode", "standalone".into()),
                ("os", std::env::consts::OS.into()),
                ("arch_bits", usize::BITS.to_string()),
                ("process_id", std::process::id().to_string()),
                ("tcp_port", self.listen_port.to_string()),
                ("server_time_usec", (clock::now() * 1000).to_string()),
                ("uptime_in_seconds", uptime.to_string()),
                ("uptime_in_days", (uptime / 86_400).to_string()),
            ],
        );
        section(
            "Clients",
            &[
                ("connected_clients", self.clients.count().to_string()),
                ("blocked_clients", self.clients.blocked().to_string()),
            ],
        );
        section("Persistence", &[("loading", "0".into()), ("async_loading", "0".into())]);
        section(
            "Stats",
            &[
                ("total_connections_received", self.clients.accepted.load(Ordering::Relaxed).to_string()),
                ("total_net_input_bytes", self.bytes_in.load(Ordering::Relaxed).to_string()),
                ("total_net_output_bytes", self.bytes_out.load(Ordering::Relaxed).to_string()),
            ],
        );
        section("Replication", &[("role", "master".into()), ("connected_slaves", "0".into())]);
        section("Cluster", &[("cluster_enabled", "0".into())]);
        let map = self.dispatcher.map();
        section(
            "GoFlow",
            &[
                ("goflow_version", env!("CARGO_PKG_VERSION").into()),
                ("strategy", self.dispatcher.strategy().word().into()),
                ("map_version", map.version().to_string()),
                ("shards", map.lanes.len().to_string()),
                ("shards_down", map.lanes.iter().filter(|lane| lane.is_down()).count().to_string()),
            ],
        );
        section("Keyspace", &[]);
        text
    }
}

/// Whether the name of a setting matches; case does not matter.
fn names(pattern: &[u8], name: &[u8]) -> bool {
    glob::matches(&pattern.to_ascii_lowercase(), &name.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_settings_match_as_in_redis() {
        for (pattern, text, matches) in [
            ("*", "", true),
            ("max*", "maxmemory", true),
            ("*policy", "maxmemory-policy", true),
            ("save", "SAVE", true),
            ("s?ve", "sve", false),
            ("a*b*c", "aXbXbc", true),
            ("", "a", false),
        ] {
            assert_eq!(names(pattern.as_bytes(), text.as_bytes()), matches, "{pattern} on {text}");
        }
    }

    #[test]
    fn only_the_right_user_and_password_pass() {
        let auth = Auth { users: vec![("default".into(), "secret".into()), ("bob".into(), "b".into())] };
        assert!(auth.check(b"default", b"secret").is_ok() && auth.check(b"bob", b"b").is_ok());
        for (user, password) in
            [(&b"bob"[..], &b"secret"[..]), (b"default", b"secre"), (b"", b""), (b"default", b"secrets")]
        {
            assert_eq!(auth.check(user, password).unwrap_err().code, Code::WrongPass);
        }
        assert!(Auth::default().check(b"default", b"x").is_err());
    }
}
