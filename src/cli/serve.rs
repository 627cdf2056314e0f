//! `goflow serve`: a checked configuration becomes a running server.

use std::process::ExitCode;
use std::sync::Arc;

use tracing_subscriber::EnvFilter;

use crate::config::{Config, ConfigError, ListConfig, LogFormat, ShardUrl};
use crate::dispatch::{MapStamp, ShardEntry};
use crate::process::Auth;
use crate::server::{self, Setup};
use crate::shard::Shard;
use crate::shard::embedded::Embedded;
use crate::shard::memory::Memory;
use crate::shard::redis::{Redis, Timeouts};

/// Serves until a signal ends it.
pub fn run(config: Config) -> ExitCode {
    start_log(&config);
    let served = shards(&config).and_then(|shards| {
        let setup = setup(&config, shards).map_err(|error| error.to_string())?;
        server::serve(setup).map_err(|error| error.to_string())
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("goflow: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The log goes to standard error; a filter that does not parse was refused with the configuration.
fn start_log(config: &Config) {
    let filter = EnvFilter::try_new(&config.log.level).unwrap_or_else(|_| EnvFilter::new("info"));
    // Whoever reads the log may go away, and with it the pipe: that is no reason to fall over.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).log_internal_errors(false);
    match config.log.format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
}

/// Opens the shards of the configuration. Servers need not be up; directories must be ours alone.
pub fn shards(config: &Config) -> Result<Vec<ShardEntry>, String> {
    let mut entries = Vec::new();
    for shard in &config.shard {
        let mut add = |name: &str, shard_: Arc<dyn Shard>| {
            entries.push(ShardEntry { name: name.into(), weight: shard.weight, shard: shard_ });
        };
        match &shard.url {
            ShardUrl::Memory => add(&shard.name, Arc::new(Memory::new(config.rules()))),
            ShardUrl::Embedded { dir } => {
                let opened = Embedded::open(dir, config.rules());
                add(&shard.name, Arc::new(opened.map_err(|error| format!("shard {}: {error}", shard.name))?));
            }
            url => {
                let timeouts = Timeouts { connect: config.timeouts.connect(), answer: config.timeouts.answer() };
                let opened = Redis::open(&url.with_login(), &shard.name, config.rules(), timeouts);
                for part in opened.map_err(|error| format!("shard {}: {error}", shard.name))? {
                    let name = part.name().to_owned();
                    add(&name, Arc::new(part));
                }
            }
        }
    }
    Ok(entries)
}

fn setup(config: &Config, shards: Vec<ShardEntry>) -> Result<Setup, ConfigError> {
    Ok(Setup {
        listen: config.listen,
        http: config.http.0,
        threads: config.threads(),
        connections_max: config.limits.connections_max,
        keepalive: config.timeouts.keepalive(),
        drain: config.timeouts.drain(),
        sessions: config.worker.terms(),
        shards,
        map: MapStamp {
            deployment: config.deployment.clone(),
            version: config.map_version,
            line: config.shard_map_line(),
        },
        strategy: config.strategy,
        limits: config.command_limits(),
        bounds: config.bounds(),
        auth: Auth { users: config.users() },
        settings: config.shown(),
        slow: config.log.slow(),
        allowed: config.forward.allowed(),
        together: config.forward.groups(),
        output_bytes_max: config.limits.output_bytes_max,
        lists: config.list.iter().map(ListConfig::rule).collect(),
        webhooks: config.hooks()?,
        alerts: config.alerts()?,
    })
}
