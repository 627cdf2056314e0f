//! The checked configuration: a TOML file, `GOFLOW_...` variables over it, flags over both.
//!
//! Every setting is a field of [`Config`] or of one of its sections and has its default in that section's `Default`. From
//! there comes all else: the TOML key `[limits] payload_bytes_max` is the setting `limits.payload_bytes_max` and the
//! variable `GOFLOW_LIMITS_PAYLOAD_BYTES_MAX`. To add a setting, add the field; to add a section, add a struct that is
//! `#[serde(default, deny_unknown_fields)]` and a field for it. Lists of tables have a variable only where `LISTS` in
//! `load.rs` says so.
//!
//! What is unknown or wrong is refused with its place named: line and column of the file, the variable, or the flag.
//! [`Config::load`] checks everything that can be checked without a socket, and reads the secrets that files hold.
//!
//! Here are the shapes of the sections, their defaults and bounds; `load.rs` reads and merges, `url.rs` knows shard URLs.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize, Serializer};
use toml::{Table, Value};

use crate::alert::Alerts;
use crate::clock::Millis;
use crate::command::Limits;
use crate::dispatch::bound::Terms;
use crate::dispatch::router::Strategy;
use crate::execute::durable::{Acked, Rule};
use crate::job::{Policy, is_shard_name};
use crate::resp::request::{self, Bounds};
use crate::shard::event::Recording;
use crate::shard::{Retention, Rules};

mod alert;
mod load;
mod url;
mod webhook;

pub use alert::{AlertConfig, SinkConfig};
use load::read_secret;
pub use load::{ConfigError, Override};
pub use url::{Host, Login, ShardUrl};
pub use webhook::WebhookConfig;

/// Threads where the configuration leaves the number open: as many as cores, at most this.
const THREADS_AUTO_MAX: usize = 16;

/// Everything that can be configured.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where Redis clients connect.
    #[serde(deserialize_with = "socket_address")]
    pub listen: SocketAddr,
    /// Where metrics and health are served, or `off`.
    pub http: HttpListen,
    /// Runtime threads; 0 is one for each core, at most 16.
    #[serde(deserialize_with = "within::<_, _, 0, 256>")]
    pub threads: usize,
    #[serde(with = "strategy")]
    pub strategy: Strategy,
    /// Shards are stamped with it and serve no other deployment.
    #[serde(deserialize_with = "plain_name")]
    pub deployment: String,
    /// To be raised with every change of the shards: a proxy with an older map is refused.
    #[serde(deserialize_with = "within::<_, _, 1, 9_007_199_254_740_991>")]
    pub map_version: u64,
    pub log: LogConfig,
    pub limits: LimitsConfig,
    pub queue: QueueConfig,
    pub events: EventsConfig,
    pub timeouts: TimeoutsConfig,
    pub worker: WorkerConfig,
    pub auth: AuthConfig,
    pub forward: ForwardConfig,
    pub list: Vec<ListConfig>,
    pub webhook: Vec<WebhookConfig>,
    pub sink: Vec<SinkConfig>,
    pub alert: Vec<AlertConfig>,
    /// Never empty once loaded.
    pub shard: Vec<ShardConfig>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 6380)),
            http: HttpListen(Some(SocketAddr::from(([127, 0, 0, 1], 8380)))),
            threads: 0,
            strategy: Strategy::Hash,
            deployment: "goflow".into(),
            map_version: 1,
            log: LogConfig::default(),
            limits: LimitsConfig::default(),
            queue: QueueConfig::default(),
            events: EventsConfig::default(),
            timeouts: TimeoutsConfig::default(),
            worker: WorkerConfig::default(),
            auth: AuthConfig::default(),
            forward: ForwardConfig::default(),
            list: Vec::new(),
            webhook: Vec::new(),
            sink: Vec::new(),
            alert: Vec::new(),
            shard: Vec::new(),
        }
    }
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// `error`, `warn`, `info`, `debug`, `trace` or `off`, and by module: `info,goflow::dispatch=debug`.
    #[serde(deserialize_with = "log_level")]
    pub level: String,
    pub format: LogFormat,
    /// Commands that take longer are named in the log, waits apart; 0 is none.
    #[serde(deserialize_with = "within::<_, _, 0, 3_600_000>")]
    pub slow_ms: Millis,
}

impl LogConfig {
    pub fn slow(&self) -> Duration {
        match self.slow_ms {
            0 => Duration::MAX,
            ms => Duration::from_millis(ms),
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

impl Default for LogConfig {
    fn default() -> Self {
        LogConfig { level: "info".into(), format: LogFormat::Text, slow_ms: 200 }
    }
}

/// `[forward]`: ordinary commands.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ForwardConfig {
    /// Commands that pass although they are refused otherwise, with blanks between; each goes to every shard.
    pub allow: String,
    /// Patterns of keys that live together on one shard, as if they had one `{tag}`: groups with commas between, patterns
    /// of a group with blanks. The same on all proxies.
    pub together: String,
}

impl ForwardConfig {
    pub fn groups(&self) -> Vec<Vec<String>> {
        let groups = self.together.split(',').map(|group| group.split_ascii_whitespace().map(str::to_owned).collect());
        groups.filter(|group: &Vec<String>| !group.is_empty()).collect()
    }

    pub fn allowed(&self) -> Vec<String> {
        self.allow.split_ascii_whitespace().map(str::to_ascii_uppercase).collect()
    }
}

/// `[[list]]`: lists that are queues.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ListConfig {
    /// A pattern as `KEYS` takes it.
    pub pattern: String,
    /// When an element that was popped is done with.
    #[serde(default)]
    pub ack: ListAck,
    /// How long an element may be worked on, should its proxy die; with `ack = "lease"` also when it is acked.
    #[serde(default = "ten_minutes", deserialize_with = "within::<_, _, 1, 604_800_000>")]
    pub lease_ms: Millis,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ListAck {
    /// With the next command of the connection.
    #[default]
    Next,
    /// When the reply is written.
    Now,
    /// When its connection has lived for `lease_ms` since.
    Lease,
}

fn ten_minutes() -> Millis {
    600_000
}

impl ListConfig {
    pub fn rule(&self) -> Rule {
        let acked = match self.ack {
            ListAck::Next => Acked::Next,
            ListAck::Now => Acked::Now,
            ListAck::Lease => Acked::Lease,
        };
        Rule { pattern: self.pattern.clone(), acked, lease_ms: self.lease_ms }
    }
}

/// `[limits]`: what a client may ask for, and what a process holds in memory.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    #[serde(deserialize_with = "within::<_, _, 1, 536_870_912>")]
    pub payload_bytes_max: usize,
    /// Most jobs in one ENQUEUEMANY, DEQUEUE COUNT or ACK.
    #[serde(deserialize_with = "within::<_, _, 1, 100_000>")]
    pub batch_jobs_max: usize,
    #[serde(deserialize_with = "within::<_, _, 1, 604_800_000>")]
    pub lease_ms_max: Millis,
    #[serde(deserialize_with = "within::<_, _, 1, 86_400_000>")]
    pub block_ms_max: Millis,
    #[serde(deserialize_with = "within::<_, _, 1, 1_000_000>")]
    pub connections_max: usize,
    /// Replies that wait for one client to read them; beyond it the client is dropped. One reply that is larger is an error.
    #[serde(deserialize_with = "within::<_, _, 65_536, 4_294_967_296>")]
    pub output_bytes_max: usize,
    #[serde(deserialize_with = "within::<_, _, 16, 1_048_576>")]
    pub request_words_max: usize,
    #[serde(deserialize_with = "within::<_, _, 16_384, 536_870_912>")]
    pub request_word_bytes_max: usize,
    #[serde(deserialize_with = "within::<_, _, 131_072, 1_073_741_824>")]
    pub request_bytes_max: usize,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        let limits = Limits::default();
        LimitsConfig {
            payload_bytes_max: limits.payload_bytes_max,
            batch_jobs_max: limits.batch_jobs_max,
            lease_ms_max: limits.lease_ms_max,
            block_ms_max: limits.block_ms_max,
            connections_max: 20_000,
            output_bytes_max: 64 << 20,
            request_words_max: request::WORDS_MAX,
            request_word_bytes_max: request::WORD_BYTES_MAX,
            request_bytes_max: request::REQUEST_BYTES_MAX,
        }
    }
}

/// `[queue]`: what holds for a job where its ENQUEUE or DEQUEUE says nothing, and how long jobs that are over are kept.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct QueueConfig {
    #[serde(deserialize_with = "within::<_, _, 1, 604_800_000>")]
    pub lease_ms: Millis,
    #[serde(deserialize_with = "within::<_, _, 1, 1_000_000>")]
    pub attempts: u32,
    #[serde(deserialize_with = "within::<_, _, 0, 31_536_000_000>")]
    pub backoff_ms: Millis,
    #[serde(deserialize_with = "within::<_, _, 0, 31_536_000_000>")]
    pub backoff_max_ms: Millis,
    #[serde(deserialize_with = "within::<_, _, 1, 1_000_000>")]
    pub lapses_max: u32,
    #[serde(deserialize_with = "within::<_, _, 0, 31_536_000_000>")]
    pub retention_ms: Millis,
    /// Per queue and shard.
    #[serde(deserialize_with = "within::<_, _, 0, 100_000_000>")]
    pub retention_jobs: u64,
}

impl Default for QueueConfig {
    fn default() -> Self {
        let (policy, rules) = (Policy::default(), Rules::default());
        QueueConfig {
            lease_ms: Limits::default().lease_ms,
            attempts: policy.attempts,
            backoff_ms: policy.backoff,
            backoff_max_ms: policy.backoff_max,
            lapses_max: rules.lapses_max,
            retention_ms: rules.retention.age_ms,
            retention_jobs: rules.retention.jobs,
        }
    }
}

/// `[events]`: what is recorded of jobs, and for how long.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct EventsConfig {
    /// Without it GOFLOW.EVENTS and `goflow:events:*` have nothing to say.
    pub record: bool,
    /// How long a history outlives its job, and an event its moment.
    #[serde(deserialize_with = "within::<_, _, 1, 31_536_000_000>")]
    pub age_ms: Millis,
    /// Histories of jobs that are not kept any more, per queue and shard.
    #[serde(deserialize_with = "within::<_, _, 0, 100_000_000>")]
    pub histories: u64,
    /// Events in the journal that GOFLOW.EVENTS READ and RECENT tell, per queue and shard.
    #[serde(deserialize_with = "within::<_, _, 1, 100_000_000>")]
    pub journal: u64,
}

impl Default for EventsConfig {
    fn default() -> Self {
        let Recording { age_ms, histories, journal } = Recording::default();
        EventsConfig { record: true, age_ms, histories, journal }
    }
}

impl EventsConfig {
    fn recording(&self) -> Option<Recording> {
        let EventsConfig { record, age_ms, histories, journal } = *self;
        record.then_some(Recording { age_ms, histories, journal })
    }
}

/// `[timeouts]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct TimeoutsConfig {
    /// For a connection to a shard to stand.
    #[serde(deserialize_with = "within::<_, _, 1, 600_000>")]
    pub connect_ms: Millis,
    /// For a shard to answer; after it the outcome of a write is unknown.
    #[serde(deserialize_with = "within::<_, _, 1, 600_000>")]
    pub answer_ms: Millis,
    /// From SIGTERM to the end of the process.
    #[serde(deserialize_with = "within::<_, _, 0, 3_600_000>")]
    pub drain_ms: Millis,
    /// Silence after which TCP asks whether the peer is alive; 0 never. A swarm's mesh forgets a connection after 900 s.
    #[serde(deserialize_with = "within::<_, _, 0, 7_200_000>")]
    pub keepalive_ms: Millis,
}

impl Default for TimeoutsConfig {
    fn default() -> Self {
        TimeoutsConfig { connect_ms: 5_000, answer_ms: 10_000, drain_ms: 25_000, keepalive_ms: 60_000 }
    }
}

impl TimeoutsConfig {
    pub fn connect(&self) -> Duration {
        Duration::from_millis(self.connect_ms)
    }

    pub fn answer(&self) -> Duration {
        Duration::from_millis(self.answer_ms)
    }

    pub fn drain(&self) -> Duration {
        Duration::from_millis(self.drain_ms)
    }

    pub fn keepalive(&self) -> Option<Duration> {
        (self.keepalive_ms > 0).then(|| Duration::from_millis(self.keepalive_ms))
    }
}

/// `[worker]`: the sessions of workers that bind their jobs.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerConfig {
    /// How long a session outlives a proxy that dies. Its end is moved three times as often.
    #[serde(deserialize_with = "within::<_, _, 500, 600_000>")]
    pub keep_ms: Millis,
    /// How long a session with a name outlives its last connection.
    #[serde(deserialize_with = "within::<_, _, 0, 600_000>")]
    pub grace_ms: Millis,
    /// How long a bound job may run, where its DEQUEUE does not say.
    #[serde(deserialize_with = "within::<_, _, 1, 604_800_000>")]
    pub run_ms: Millis,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        let Terms { keep_ms, grace_ms } = Terms::default();
        WorkerConfig { keep_ms, grace_ms, run_ms: Limits::default().run_ms }
    }
}

impl WorkerConfig {
    pub fn terms(&self) -> Terms {
        Terms { keep_ms: self.keep_ms, grace_ms: self.grace_ms }
    }
}

/// `[auth]`: who may connect; nobody named, everybody may.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthConfig {
    /// The password of the user `default`, or the file that holds it.
    pub password: Secret,
    pub password_file: PathBuf,
    /// `[[auth.user]]`; once loaded the user `default` is among them if it has a password, and no file is left to read.
    pub user: Vec<UserConfig>,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct UserConfig {
    pub name: String,
    #[serde(default)]
    pub password: Secret,
    #[serde(default)]
    pub password_file: PathBuf,
}

/// `[[shard]]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ShardConfig {
    #[serde(deserialize_with = "shard_name")]
    pub name: String,
    pub url: ShardUrl,
    /// Its part of the jobs under `hash`, relative to the others'.
    #[serde(default = "one", deserialize_with = "within::<_, _, 1, 1_000>")]
    pub weight: u32,
    /// A file that holds the password, in place of one in the URL.
    #[serde(default)]
    pub password_file: PathBuf,
}

fn one() -> u32 {
    1
}

/// A text that is never shown.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    /// The text itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_empty() { "none" } else { "hidden" })
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(if self.is_empty() { "" } else { "hidden" })
    }
}

/// An address, or nothing: `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HttpListen(pub Option<SocketAddr>);

impl<'de> Deserialize<'de> for HttpListen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.eq_ignore_ascii_case("off") {
            return Ok(HttpListen(None));
        }
        let address = text.parse();
        address.map(|address| HttpListen(Some(address))).map_err(|_| {
            de::Error::custom(format!("'{text}' is no address: expected ADDR:PORT such as 127.0.0.1:8380, or off"))
        })
    }
}

impl Serialize for HttpListen {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Some(address) => serializer.collect_str(&address),
            None => serializer.serialize_str("off"),
        }
    }
}

impl Config {
    /// What can only be said of the whole; reads the files of secrets.
    fn checked(mut self, environment: &HashMap<String, String>) -> Result<Config, ConfigError> {
        if self.shard.is_empty() {
            let url = ShardUrl::Embedded { dir: "./goflow-data".into() };
            self.shard.push(ShardConfig { name: "s1".into(), url, weight: 1, password_file: PathBuf::new() });
        }
        self.check_shards()?;
        self.check_users()?;
        self.hooks()?;
        alert::check(&mut self.sink, &self.alert, environment)?;
        let (limits, queue) = (&self.limits, &self.queue);
        let pairs = [
            ("queue.lease_ms", queue.lease_ms, "limits.lease_ms_max", limits.lease_ms_max),
            ("worker.run_ms", self.worker.run_ms, "limits.lease_ms_max", limits.lease_ms_max),
            ("queue.backoff_ms", queue.backoff_ms, "queue.backoff_max_ms", queue.backoff_max_ms),
            (
                "limits.payload_bytes_max",
                limits.payload_bytes_max as u64,
                "limits.request_word_bytes_max",
                limits.request_word_bytes_max as u64,
            ),
            (
                "limits.request_word_bytes_max",
                limits.request_word_bytes_max as u64,
                "limits.request_bytes_max",
                limits.request_bytes_max as u64,
            ),
        ];
        match pairs.iter().find(|(_, less, _, more)| less > more) {
            Some((less, a, more, b)) => {
                Err(ConfigError(format!("{less} is {a}: expected at most {more}, which is {b}")))
            }
            None => Ok(self),
        }
    }

    fn check_shards(&mut self) -> Result<(), ConfigError> {
        let (mut names, mut places) = (HashSet::new(), HashSet::new());
        for shard in &mut self.shard {
            let name = &shard.name;
            if !names.insert(name.clone()) {
                return Err(ConfigError(format!("shard {name}: two shards have this name")));
            }
            // Nothing else tells two of these apart, and nothing need.
            if shard.url != ShardUrl::Memory && !places.insert(shard.url.to_string()) {
                return Err(ConfigError(format!("shard {name}: another shard has the same URL, {}", shard.url)));
            }
            let partition = format!("{name}/{}", shard.url.partitions());
            if shard.url.partitions() > 1 && !is_shard_name(&partition) {
                return Err(ConfigError(format!("shard {name}: the name of a cluster has at most 43 bytes")));
            }
            if shard.password_file != Path::new("") {
                let secret = read_secret(&format!("shard {name}: password_file"), &shard.password_file)?;
                let login = shard.url.login_mut();
                let login = login.ok_or_else(|| ConfigError(format!("shard {name}: its URL takes no password")))?;
                login.password = Some(secret);
                shard.password_file = PathBuf::new();
            }
        }
        Ok(())
    }

    fn check_users(&mut self) -> Result<(), ConfigError> {
        let auth = &mut self.auth;
        let (password, password_file) = (std::mem::take(&mut auth.password), std::mem::take(&mut auth.password_file));
        if !password.is_empty() || password_file != Path::new("") {
            auth.user.insert(0, UserConfig { name: "default".into(), password, password_file });
        }
        let mut names = HashSet::new();
        for user in &mut auth.user {
            let name = &user.name;
            if name.is_empty() || !names.insert(name.clone()) {
                return Err(ConfigError(format!("auth: user '{name}' has no name or the name of another")));
            }
            if user.password_file != Path::new("") {
                if !user.password.is_empty() {
                    return Err(ConfigError(format!("auth: user '{name}' has both a password and a password_file")));
                }
                user.password = read_secret(&format!("auth: user '{name}': password_file"), &user.password_file)?;
                user.password_file = PathBuf::new();
            }
            if user.password.is_empty() {
                return Err(ConfigError(format!(
                    "auth: user '{name}' has no password: expected password or password_file"
                )));
            }
        }
        Ok(())
    }

    /// Runtime threads to start.
    pub fn threads(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_AUTO_MAX),
            threads => threads,
        }
    }

    /// What plan functions may know.
    pub fn command_limits(&self) -> Limits {
        Limits {
            payload_bytes_max: self.limits.payload_bytes_max,
            lease_ms: self.queue.lease_ms,
            lease_ms_max: self.limits.lease_ms_max,
            run_ms: self.worker.run_ms,
            batch_jobs_max: self.limits.batch_jobs_max,
            block_ms_max: self.limits.block_ms_max,
            policy: Arc::new(Policy {
                attempts: self.queue.attempts,
                backoff: self.queue.backoff_ms,
                backoff_max: self.queue.backoff_max_ms,
                ..Policy::default()
            }),
        }
    }

    /// Who may connect: names and passwords.
    pub fn users(&self) -> Vec<(String, String)> {
        self.auth.user.iter().map(|user| (user.name.clone(), user.password.reveal().to_owned())).collect()
    }

    /// The settings as `CONFIG GET` shows them, by their path in the file, without secrets.
    pub fn shown(&self) -> Vec<(String, String)> {
        let mut shown = Vec::new();
        let mut tables = vec![(String::new(), Table::try_from(self.clone()).unwrap_or_default())];
        while let Some((prefix, table)) = tables.pop() {
            for (key, value) in table {
                match value {
                    Value::Table(table) => tables.push((format!("{prefix}{key}."), table)),
                    // Shards have GOFLOW.SHARDS, and users are nobody's business.
                    Value::Array(_) => {}
                    Value::String(text) => shown.push((format!("{prefix}{key}"), text)),
                    value => shown.push((format!("{prefix}{key}"), value.to_string())),
                }
            }
        }
        shown.sort();
        shown
    }

    /// The alert rules and their sinks.
    pub fn alerts(&self) -> Result<Alerts, ConfigError> {
        alert::alerts(&self.sink, &self.alert)
    }

    /// What shards go by.
    pub fn rules(&self) -> Rules {
        Rules {
            retention: Retention { age_ms: self.queue.retention_ms, jobs: self.queue.retention_jobs },
            lapses_max: self.queue.lapses_max,
            recording: self.events.recording(),
        }
    }

    /// What a request may have once its client has authenticated.
    pub fn bounds(&self) -> Bounds {
        Bounds {
            words_max: self.limits.request_words_max,
            word_bytes_max: self.limits.request_word_bytes_max,
            request_bytes_max: self.limits.request_bytes_max,
            authenticated: true,
        }
    }

    /// The shard map in one line, for [`crate::shard::Stamp`]: what decides where a job goes, and not how it gets there, so
    /// that proxies may reach one shard under different addresses.
    pub fn shard_map_line(&self) -> String {
        let mut shards: Vec<String> = self
            .shard
            .iter()
            .map(|shard| match shard.url.partitions() {
                1 => format!("{}*{}", shard.name, shard.weight),
                partitions => format!("{}/{partitions}*{}", shard.name, shard.weight),
            })
            .collect();
        shards.sort();
        shards.join(" ")
    }
}

fn within<'de, T, D, const MIN: u64, const MAX: u64>(deserializer: D) -> Result<T, D::Error>
where
    T: TryFrom<u64>,
    D: Deserializer<'de>,
{
    let number = i64::deserialize(deserializer)?;
    let fits = u64::try_from(number).ok().filter(|number| (MIN..=MAX).contains(number));
    let fits = fits.and_then(|number| T::try_from(number).ok());
    fits.ok_or_else(|| de::Error::custom(format!("{number} is out of range: expected {MIN} to {MAX}")))
}

fn socket_address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    let expected = "expected ADDR:PORT such as 127.0.0.1:6380 or [::]:6380";
    text.parse().map_err(|_| de::Error::custom(format!("'{text}' is no address: {expected}")))
}

fn checked_name<'de, D: Deserializer<'de>>(deserializer: D, what: &str) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    match is_shard_name(&text) {
        true => Ok(text),
        false => Err(de::Error::custom(format!("bad {what} '{text}': expected 1 to 48 bytes of A-Z a-z 0-9 . _ / -"))),
    }
}

fn plain_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    checked_name(deserializer, "name")
}

fn shard_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    checked_name(deserializer, "shard name")
}

fn log_level<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    match text.parse::<tracing_subscriber::filter::Targets>() {
        Ok(_) if !text.is_empty() => Ok(text),
        _ => Err(de::Error::custom(format!(
            "bad level '{text}': expected error, warn, info, debug, trace or off, or info,goflow::dispatch=debug"
        ))),
    }
}

/// A [`Strategy`] by its word.
mod strategy {
    use super::*;

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Strategy, D::Error> {
        let text = String::deserialize(deserializer)?;
        let expected = "expected hash, round-robin or least-loaded";
        Strategy::parse(&text).ok_or_else(|| de::Error::custom(format!("unknown strategy '{text}': {expected}")))
    }

    pub fn serialize<S: Serializer>(strategy: &Strategy, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(strategy.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn load(file: &str, variables: &[(&str, &str)], flags: &[(&'static str, &str)]) -> Result<Config, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("goflow.toml");
        std::fs::write(&path, file).unwrap();
        let variables = variables.iter().map(|(name, value)| (name.to_string(), value.to_string()));
        let overrides: Vec<Override> =
            flags.iter().map(|(setting, value)| Override { flag: "--flag", setting, value }).collect();
        Config::load(Some(&path), variables, &overrides).map_err(|error| error.to_string())
    }

    #[track_caller]
    pub fn refused(result: Result<Config, String>, words: &[&str]) {
        let error = result.expect_err("this configuration is wrong");
        for word in words {
            assert!(error.contains(word), "{error:?} does not say {word:?}");
        }
    }

    #[test]
    fn nothing_configured_is_one_embedded_shard() {
        let config = Config::load(None, [], &[]).unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.1:6380");
        assert_eq!(config.shard.len(), 1);
        assert_eq!(config.shard[0].url, ShardUrl::Embedded { dir: "./goflow-data".into() });
        assert_eq!(config.shard_map_line(), "s1*1");
        assert_eq!(config.command_limits().lease_ms, 30_000);
        assert_eq!(config.rules(), Rules::default());
        assert_eq!(config.bounds(), Bounds::default());
        assert!((1..=16).contains(&config.threads()));
    }

    #[test]
    fn settings_that_contradict_each_other_are_refused() {
        refused(load("[queue]\nlease_ms = 90_000_000", &[], &[]), &["queue.lease_ms", "limits.lease_ms_max"]);
        let shards = |text: &str| load("", &[("GOFLOW_SHARDS", text)], &[]);
        refused(shards("a=memory:,a=memory:"), &["shard a", "this name"]);
        refused(shards("a=redis://h,b=redis://x:y@h:6379/0"), &["shard b", "redis://h:6379"]);
        refused(shards(&format!("{}=redis+cluster://h", "n".repeat(46))), &["43 bytes"]);
        assert!(shards("a=memory:,b=memory:").is_ok());
        assert!(shards("a=redis://h/0,b=redis://h/1").is_ok());
        refused(load("auth.user = [{ name = 'a' }]", &[], &[]), &["'a'", "password_file"]);
    }
}
