//! The command line: `goflow [serve]`, `check`, `worker`, `bench`, `healthcheck`.
//!
//! [`parse`] turns arguments, variables and the configuration file into one checked [`Command`]; `main` carries it out.
//! Exit codes: 0; 1, could not start or run; 64, bad usage or configuration ([`EXIT_USAGE`]).
//!
//! A new subcommand is a variant of [`Subcommand`] and of [`Command`] and a file beside this one.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use crate::config::{Config, Override};

pub mod bench;
pub mod check;
pub mod healthcheck;
pub mod serve;
pub mod worker;

/// Bad usage or configuration; `EX_USAGE` of sysexits.h.
pub const EXIT_USAGE: u8 = 64;

/// What to do.
#[derive(Debug)]
pub enum Command {
    Serve(Box<Config>),
    Check(Box<Config>),
    Worker(Box<worker::Options>),
    Bench(Box<bench::Options>),
    Healthcheck(healthcheck::Options),
}

/// The end before anything began: help, the version, or what was wrong.
#[derive(Debug)]
pub struct Exit {
    pub code: u8,
    pub text: String,
}

impl Exit {
    /// Prints the text where it belongs.
    pub fn report(self) -> ExitCode {
        // Nobody is left to tell when the terminal is gone.
        let _ = match self.code {
            0 => std::io::stdout().write_all(self.text.as_bytes()),
            _ => std::io::stderr().write_all(self.text.as_bytes()),
        };
        ExitCode::from(self.code)
    }
}

/// A job queue that any Redis client can use.
///
/// Settings of the configuration file have variables too: `[limits] payload_bytes_max` is
/// GOFLOW_LIMITS_PAYLOAD_BYTES_MAX, the shards are GOFLOW_SHARDS=name=url,name=url. Only the file has `[[list]]`,
/// `[[webhook]]`, `[[sink]]`, `[[alert]]`, and the password_file of a shard. Flags go over variables and these over the
/// file.
#[derive(Debug, Parser)]
#[command(name = "goflow", version, args_conflicts_with_subcommands = true, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    subcommand: Option<Subcommand>,
    #[command(flatten)]
    serve: ServeFlags,
}

#[derive(Debug, clap::Subcommand)]
enum Subcommand {
    /// Serve clients; what goflow does without a subcommand
    Serve(ServeFlags),
    /// Say whether this configuration would start, and what each shard answers
    Check(ServeFlags),
    /// Run a program, or call a local web service, for each job of a queue
    Worker(Box<worker::Options>),
    /// Generate load for a queue and measure it
    Bench(Box<bench::Options>),
    /// Exit with 0 if a server answers PING, else with 1
    Healthcheck(HealthcheckFlags),
}

#[derive(Clone, Debug, Default, clap::Args)]
struct ServeFlags {
    /// Configuration file, TOML
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where Redis clients connect [default: 127.0.0.1:6380]
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<String>,
    /// Where metrics and health are served [default: 127.0.0.1:8380]
    #[arg(long, value_name = "ADDR:PORT|off")]
    http: Option<String>,
    /// A shard; repeat it for many. URL is embedded:DIR, memory:, redis://, rediss://, redis+sentinel:// or
    /// redis+cluster:// [default: s1=embedded:./goflow-data]
    #[arg(long, value_name = "NAME=URL")]
    shard: Vec<String>,
    /// Which shard takes a new job: hash, round-robin or least-loaded [default: hash]
    #[arg(long, value_name = "STRATEGY")]
    strategy: Option<String>,
    /// Runtime threads [default: one for each core, at most 16]
    #[arg(long, value_name = "N")]
    threads: Option<String>,
    /// Log level: error, warn, info, debug, trace, or by module [default: info]
    #[arg(long, value_name = "LEVEL")]
    log: Option<String>,
}

#[derive(Debug, clap::Args)]
struct HealthcheckFlags {
    /// Configuration file that says where the server listens
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the server listens [default: 127.0.0.1:6380]
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<String>,
    /// How long to wait for its answer
    #[arg(long, value_name = "MS", default_value_t = 3_000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    timeout: u64,
}

impl ServeFlags {
    fn load(&self, variables: impl IntoIterator<Item = (String, String)>) -> Result<Config, Exit> {
        let single = [
            ("--listen", "listen", &self.listen),
            ("--http", "http", &self.http),
            ("--strategy", "strategy", &self.strategy),
            ("--threads", "threads", &self.threads),
            ("--log", "log.level", &self.log),
        ];
        let single = single.into_iter().filter_map(|(flag, setting, value)| Some((flag, setting, value.as_deref()?)));
        let shards = self.shard.iter().map(|shard| ("--shard", "shard", shard.as_str()));
        let overrides: Vec<Override> =
            single.chain(shards).map(|(flag, setting, value)| Override { flag, setting, value }).collect();
        Config::load(self.config.as_deref(), variables, &overrides)
            .map_err(|error| Exit { code: EXIT_USAGE, text: format!("goflow: {error}\n") })
    }
}

/// What this process was called to do.
pub fn parse() -> Result<Command, Exit> {
    // A variable that is no UTF-8 is none of ours.
    let variables =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    parse_from(std::env::args_os(), variables)
}

/// The same for given arguments, the first of which is the program's name, and variables.
pub fn parse_from(
    arguments: impl IntoIterator<Item = OsString>,
    variables: impl IntoIterator<Item = (String, String)>,
) -> Result<Command, Exit> {
    let arguments = Arguments::try_parse_from(arguments).map_err(|error| Exit {
        code: if error.use_stderr() { EXIT_USAGE } else { 0 },
        text: error.render().to_string(),
    })?;
    match arguments.subcommand {
        None => Ok(Command::Serve(Box::new(arguments.serve.load(variables)?))),
        Some(Subcommand::Serve(flags)) => Ok(Command::Serve(Box::new(flags.load(variables)?))),
        Some(Subcommand::Check(flags)) => Ok(Command::Check(Box::new(flags.load(variables)?))),
        Some(Subcommand::Worker(options)) => match options.check() {
            Ok(()) => Ok(Command::Worker(options)),
            Err(why) => Err(Exit { code: EXIT_USAGE, text: format!("goflow worker: {why}\n") }),
        },
        Some(Subcommand::Bench(options)) => match options.check() {
            Ok(()) => Ok(Command::Bench(options)),
            Err(why) => Err(Exit { code: EXIT_USAGE, text: format!("goflow bench: {why}\n") }),
        },
        Some(Subcommand::Healthcheck(flags)) => {
            let serve = ServeFlags { config: flags.config, listen: flags.listen, ..ServeFlags::default() };
            let listen = serve.load(variables)?.listen;
            Ok(Command::Healthcheck(healthcheck::Options::new(listen, flags.timeout)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<Command, Exit> {
        parse_from(line.split(' ').map(OsString::from), [("GOFLOW_THREADS".into(), "5".into())])
    }

    #[test]
    fn serve_is_what_goflow_does_without_a_subcommand() {
        for line in ["goflow --listen 0.0.0.0:1 --shard a=memory: --shard b=memory:", "goflow serve --listen 0.0.0.0:1"]
        {
            let Ok(Command::Serve(config)) = run(line) else { panic!("{line}") };
            assert_eq!((config.listen.port(), config.threads), (1, 5));
        }
        let Ok(Command::Check(config)) = run("goflow check --log debug --http off --threads 2") else { panic!() };
        assert_eq!((config.log.level.as_str(), config.http.0, config.threads), ("debug", None, 2));
    }

    #[test]
    fn bad_usage_and_bad_configuration_exit_with_64() {
        for (line, word) in [
            ("goflow --lisen x", "--lisen"),
            ("goflow --listen x", "--listen: 'x'"),
            ("goflow --shard x", "--shard"),
            ("goflow check --strategy best", "--strategy"),
            ("goflow serve --config /nowhere.toml", "/nowhere.toml"),
            ("goflow frobnicate", "frobnicate"),
            ("goflow bench --jobs 0", "--jobs"),
        ] {
            let exit = run(line).expect_err(line);
            assert_eq!(exit.code, EXIT_USAGE, "{line}");
            assert!(exit.text.contains(word), "{line}: {}", exit.text);
        }
    }

    #[test]
    fn help_and_version_are_no_failure() {
        for line in ["goflow --help", "goflow bench --help", "goflow --version"] {
            assert_eq!(run(line).expect_err(line).code, 0);
        }
    }
}
