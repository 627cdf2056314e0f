//! `goflow serve`: a checked configuration becomes a running server.

use std::collections::HashMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, reload};

use super::Command;
use crate::config::{Config, ConfigError, ListConfig, LogFormat, ShardUrl};
use crate::dispatch::ShardEntry;
use crate::dispatch::keeper::Open;
use crate::dispatch::layout::{Layout, Member, Standing};
use crate::error::{Error, Result};
use crate::process::Auth;
use crate::process::settings::{Fresh, Settings};
use crate::server::{self, Setup};
use crate::shard::Shard;
use crate::shard::embedded::Embedded;
use crate::shard::memory::Memory;
use crate::shard::redis::{Redis, Timeouts};

/// Serves until a signal ends it.
pub fn run(config: Config) -> ExitCode {
    let set_log = start_log(&config);
    let served = setup(&config, set_log).map_err(|error| error.to_string());
    match served.and_then(|setup| server::serve(setup).map_err(|error| error.to_string())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("goflow: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The log goes to standard error; a filter that does not parse was refused with the configuration. Returns what sets
/// another level.
fn start_log(config: &Config) -> impl Fn(&str) -> std::result::Result<(), String> + Send + Sync + 'static {
    let filter = EnvFilter::try_new(&config.log.level).unwrap_or_else(|_| EnvFilter::new("info"));
    let (filter, handle) = reload::Layer::new(filter);
    // Whoever reads the log may go away, and with it the pipe: that is no reason to fall over.
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).log_internal_errors(false);
    let log = tracing_subscriber::registry().with(filter);
    match config.log.format {
        LogFormat::Text => log.with(lines.with_ansi(false)).init(),
        LogFormat::Json => log.with(lines.json()).init(),
    }
    move |level: &str| {
        let filter = EnvFilter::try_new(level).map_err(|error| format!("log.level: {error}"))?;
        handle.reload(filter).map_err(|error| error.to_string())
    }
}

/// Opens shards as this process reaches them: by the configuration's URL where it has one, which may hold a password, else by
/// that of the map, which has none.
pub struct Opener {
    config: Mutex<Config>,
    /// What only this process has: it is opened once, and the same when it is asked for again.
    local: Mutex<HashMap<String, Arc<dyn Shard>>>,
}

impl Opener {
    pub fn new(config: &Config) -> Opener {
        Opener { config: Mutex::new(config.clone()), local: Mutex::default() }
    }
}

impl Open for Opener {
    fn open(&self, member: &Member) -> Result<Vec<ShardEntry>> {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let name = &member.name;
        let failed = |why: &dyn std::fmt::Display| Error::bad(format!("shard {name}: {why}"));
        let url = match config.shard.iter().find(|shard| shard.name == *name) {
            // The map says how many partitions there are.
            Some(shard) if shard.url.partitions() != member.partitions && !member.url.is_empty() => {
                let url = ShardUrl::parse(&member.url).map_err(|why| failed(&why))?;
                url.with_login_of(&shard.url)
            }
            Some(shard) => shard.url.clone(),
            None if member.url.is_empty() => {
                let version = "the shard map names it, and neither the map nor this configuration says where it is";
                return Err(failed(&version));
            }
            None => ShardUrl::parse(&member.url).map_err(|why| failed(&why))?,
        };
        let mut local = self.local.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shard) = local.get(name) {
            return Ok(vec![ShardEntry { name: name.as_str().into(), shard: shard.clone() }]);
        }
        let shard: Arc<dyn Shard> = match &url {
            ShardUrl::Memory => Arc::new(Memory::new(config.rules())),
            ShardUrl::Embedded { dir } => {
                Arc::new(Embedded::open(dir, config.rules()).map_err(|error| failed(&error))?)
            }
            url => {
                let timeouts = Timeouts { connect: config.timeouts.connect(), answer: config.timeouts.answer() };
                let opened = Redis::open(&url.with_login(), name, config.rules(), timeouts);
                let entry = |part: Redis| ShardEntry { name: part.name().into(), shard: Arc::new(part) };
                return Ok(opened.map_err(|error| failed(&error))?.into_iter().map(entry).collect());
            }
        };
        local.insert(name.clone(), shard.clone());
        Ok(vec![ShardEntry { name: name.as_str().into(), shard }])
    }

    fn member(&self, name: &str, url: &str, weight: u32) -> Result<Member> {
        let url = ShardUrl::parse(url).map_err(|why| Error::bad(format!("shard {name}: {why}")))?;
        if matches!(url, ShardUrl::Embedded { .. } | ShardUrl::Memory) {
            return Err(Error::bad("a shard of one process is for its configuration: expected the URL of a server"));
        }
        if url.login().is_some_and(|login| login.user.is_some() || login.password.is_some()) {
            return Err(Error::bad(
                "the map is kept on the shards and holds no passwords: give this shard to the configuration of every proxy and raise map_version",
            ));
        }
        Ok(member(name, &url, weight))
    }
}

fn member(name: &str, url: &ShardUrl, weight: u32) -> Member {
    let is_local = matches!(url, ShardUrl::Embedded { .. } | ShardUrl::Memory);
    Member {
        name: name.into(),
        partitions: url.partitions(),
        weight,
        standing: Standing::Open,
        url: if is_local { String::new() } else { url.to_string() },
    }
}

/// Opens the shards of the configuration. Servers need not be up; directories must be ours alone.
pub fn shards(config: &Config) -> std::result::Result<Vec<ShardEntry>, String> {
    let opener = Opener::new(config);
    let opened: Result<Vec<_>> = layout(config).members.iter().map(|member| opener.open(member)).collect();
    opened.map(|shards| shards.into_iter().flatten().collect()).map_err(|error| error.text.into_owned())
}

/// The shard map of the configuration.
pub fn layout(config: &Config) -> Layout {
    let members = config.shard.iter().map(|shard| member(&shard.name, &shard.url, shard.weight));
    Layout::new(config.map_version, members.collect())
}

fn setup(
    config: &Config,
    set_log: impl Fn(&str) -> std::result::Result<(), String> + Send + Sync + 'static,
) -> std::result::Result<Setup, ConfigError> {
    let opener = Arc::new(Opener::new(config));
    let reread = {
        let opener = opener.clone();
        Box::new(move |served: u64| {
            let fresh = match super::parse() {
                Ok(Command::Serve(config)) => *config,
                Ok(_) => return Err("the process was not started to serve".into()),
                Err(exit) => return Err(exit.text.trim().trim_start_matches("goflow: ").to_owned()),
            };
            let mut known = opener.config.lock().unwrap_or_else(PoisonError::into_inner);
            let (changed, waiting) = differences(&known, &fresh);
            let is_other = layout(&known).places() != layout(&fresh).places();
            if is_other && fresh.map_version <= served {
                return Err(format!("the shards are other ones: raise map_version above {served}"));
            }
            set_log(&fresh.log.level)?;
            let layout = (fresh.map_version > served).then(|| layout(&fresh));
            *known = fresh.clone();
            let (strategy, rules) = (fresh.strategy, fresh.rules());
            Ok(Fresh { settings: settings(&fresh), strategy, rules, layout, changed, waiting })
        })
    };
    Ok(Setup {
        listen: config.listen,
        http: config.http.0,
        threads: config.threads(),
        keepalive: config.timeouts.keepalive(),
        drain: config.timeouts.drain(),
        sessions: config.worker.terms(),
        deployment: config.deployment.clone(),
        layout: layout(config),
        open: opener,
        strategy: config.strategy,
        settings: settings(config),
        reread,
        allowed: config.forward.allowed(),
        together: config.forward.groups(),
        output_bytes_max: config.limits.output_bytes_max,
        webhooks: config.hooks()?,
        alerts: config.alerts()?,
    })
}

fn settings(config: &Config) -> Settings {
    Settings {
        limits: Arc::new(config.command_limits()),
        bounds: config.bounds(),
        auth: Auth { users: config.users() },
        lists: config.list.iter().map(ListConfig::rule).collect(),
        slow: config.log.slow(),
        connections_max: config.limits.connections_max,
        shown: config.shown(),
    }
}

/// Settings, or the sections before a dot, that only a start takes.
const AT_START: [&str; 13] = [
    "listen",
    "http",
    "threads",
    "deployment",
    "log.format",
    "timeouts.",
    "forward.",
    "worker.keep_ms",
    "worker.grace_ms",
    "limits.output_bytes_max",
    "webhook",
    "sink",
    "alert",
];

/// The names of the settings that differ, and of those among them that only a start takes.
fn differences(known: &Config, fresh: &Config) -> (Vec<String>, Vec<String>) {
    let (before, after) = (known.shown(), fresh.shown());
    let mut changed: Vec<String> =
        before.iter().zip(&after).filter(|(a, b)| a != b).map(|(a, _)| a.0.clone()).collect();
    let lists = [
        ("auth.user", known.users() != fresh.users()),
        ("list", known.list != fresh.list),
        ("webhook", known.webhook != fresh.webhook),
        ("sink", known.sink != fresh.sink),
        ("alert", known.alert != fresh.alert),
        ("shard", layout(known) != layout(fresh) || moves_a_shard(known, fresh)),
    ];
    changed.extend(lists.iter().filter(|(_, differs)| *differs).map(|(name, _)| (*name).to_owned()));
    changed.sort();
    let waits = |name: &&String| {
        AT_START.iter().any(|setting| *setting == **name || setting.ends_with('.') && name.starts_with(setting))
    };
    let mut waiting: Vec<String> = changed.iter().filter(waits).cloned().collect();
    if moves_a_shard(known, fresh) {
        waiting.push("shard".into());
    }
    (changed, waiting)
}

/// Whether a shard is to be reached at another place or under another login: its connections are made at the start.
fn moves_a_shard(known: &Config, fresh: &Config) -> bool {
    known.shard.iter().any(|shard| {
        let now = fresh.shard.iter().find(|other| other.name == shard.name);
        now.is_some_and(|now| now.url.with_login() != shard.url.with_login())
    })
}
