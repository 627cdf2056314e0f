//! `goflow`: a sharded job queue that any Redis client can use.

use std::process::ExitCode;

use goflow::cli::{self, Command};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match cli::parse() {
        Ok(Command::Serve(config)) => cli::serve::run(*config),
        Ok(Command::Check(config)) => cli::check::run(&config, cli::serve::shards),
        Ok(Command::Bench(options)) => cli::bench::run(&options),
        Ok(Command::Worker(options)) => cli::worker::run(&options),
        Ok(Command::Healthcheck(options)) => cli::healthcheck::run(&options),
        Err(exit) => exit.report(),
    }
}
