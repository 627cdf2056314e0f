//! `goflow bench`: a load generator for queues, as redis-benchmark is for commands.
//!
//! Runs producers and workers, each a connection, on a few threads of their own; `load` is what they do and `report` what
//! is said of it. A run has one phase (producers and workers at once) or two (enqueue, then drain). It speaks
//! `GOFLOW.*`, or with `--mode list` plain `LPUSH`/`RPOP` against any Redis, to compare.
//!
//! Latency is from enqueue to delivery: a job's payload begins with the time at which it was sent (under `--rate`, was to be
//! sent, if the producer was late because it had to wait for an answer).

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use load::{Phase, Tally};
use report::{CpuTime, PhaseReport, Report};

mod load;
mod report;

/// No job moved for so long, which is longer than a lease: something is lost, or the server hangs.
const PATIENCE: Duration = Duration::from_secs(45);
const PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// Generate load for a queue and measure it
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The server
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:6380")]
    pub addr: String,
    /// The queue, or the list's key; should be empty when the run begins
    #[arg(long, default_value = "bench")]
    pub queue: String,
    /// What to speak
    #[arg(long, value_enum, default_value_t = Mode::Goflow)]
    pub mode: Mode,
    /// Connections that enqueue; with 0 the queue holds the jobs already
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=50_000))]
    pub producers: Option<u32>,
    /// Connections that dequeue and ack; with 0 the jobs stay
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=50_000))]
    pub workers: Option<u32>,
    /// Producers and workers where they are not given
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    pub connections: u32,
    /// Jobs in all
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub jobs: u64,
    /// Bytes of each payload
    #[arg(long, value_name = "BYTES", default_value_t = 256, value_parser = clap::value_parser!(u32).range(20..=16_777_216))]
    pub payload: u32,
    /// Requests that a connection sends before it reads their answers; a worker sends as many acks and dequeues
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub pipeline: u32,
    /// Jobs of one request: ENQUEUEMANY, DEQUEUE COUNT, ACK with many receipts
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub batch: u32,
    /// Jobs enqueued a second, all producers together; 0 is as fast as possible
    #[arg(long, value_name = "JOBS_PER_S", default_value_t = 0)]
    pub rate: u64,
    /// Enqueue and then drain, or both at once
    #[arg(long, value_enum, default_value_t = Phases::Apart)]
    pub phases: Phases,
    /// Threads of the generator
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub threads: u32,
    /// A process whose CPU time is reported too; may be repeated
    #[arg(long, value_name = "PID")]
    pub pid: Vec<u32>,
    /// Report as one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// GOFLOW.ENQUEUE, DEQUEUE, ACK
    Goflow,
    /// LPUSH, RPOP: no leases, no acks
    List,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Phases {
    /// Enqueue, then drain
    Apart,
    /// Producers and workers at once
    Together,
}

impl Options {
    fn producers(&self) -> u32 {
        self.producers.unwrap_or(self.connections)
    }

    fn workers(&self) -> u32 {
        self.workers.unwrap_or(self.connections)
    }

    /// What clap cannot see.
    pub fn check(&self) -> Result<(), String> {
        let round = u64::from(self.pipeline) * u64::from(self.batch) * u64::from(self.payload);
        if round > 256 << 20 {
            return Err(format!("--pipeline * --batch * --payload is {round} bytes: expected at most 256 MiB"));
        }
        if self.producers() == 0 && self.workers() == 0 {
            return Err("--producers and --workers are both 0".into());
        }
        match self.addr.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()) {
            true => Ok(()),
            false => Err(format!("--addr is '{}': expected HOST:PORT", self.addr)),
        }
    }

    fn phases(&self) -> Vec<Phase> {
        let phase = |name, producers, workers| Phase { name, producers, workers };
        match (self.producers(), self.workers(), self.phases) {
            (producers, 0, _) => vec![phase("enqueue", producers, 0)],
            (0, workers, _) => vec![phase("drain", 0, workers)],
            (producers, workers, Phases::Together) => vec![phase("both", producers, workers)],
            (producers, workers, Phases::Apart) => vec![phase("enqueue", producers, 0), phase("drain", 0, workers)],
        }
    }
}

/// Runs the phases and prints the report; 1 if a connection failed or jobs went missing.
pub fn run(options: &Options) -> ExitCode {
    let mut report = Report::new(options);
    let mut waiting = if options.producers() == 0 { options.jobs } else { 0 };
    for phase in options.phases() {
        match run_phase(options, phase, waiting) {
            Ok((phase_report, enqueued)) => {
                waiting = enqueued;
                report.phases.push(phase_report);
            }
            Err(why) => {
                eprintln!("goflow bench: {why}");
                return ExitCode::FAILURE;
            }
        }
    }
    let text = if options.json { report.json() } else { report.text() };
    // A reader that went away wants no report.
    let _ = std::io::stdout().write_all(text.as_bytes());
    match report.is_complete() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// Runs one phase over `waiting` jobs that are in the queue; returns how many are enqueued by its end.
fn run_phase(options: &Options, phase: Phase, waiting: u64) -> Result<(PhaseReport, u64), String> {
    let tally = Arc::new(Tally::new(options.jobs, phase, waiting));
    let cpu_before = CpuTime::all(&options.pid);
    // Never sent on: it closes when the last thread has ended.
    let (running, ended) = mpsc::channel();
    tally.check();
    let threads = options.threads.min(phase.producers.max(phase.workers));
    let handles: Result<Vec<_>, _> = (0..threads)
        .map(|thread| {
            let (options, tally, running) = (options.clone(), tally.clone(), running.clone());
            thread::Builder::new().name(format!("bench-{thread}")).spawn(move || {
                let result = load::run(&options, phase, &tally, thread, threads);
                drop(running);
                result
            })
        })
        .collect();
    drop(running);
    let handles = handles.map_err(|error| format!("cannot start a thread: {error}"))?;
    watch(phase, &tally, &ended);
    let mut measured = load::Measured::default();
    for handle in handles {
        let part = handle.join().map_err(|_| "a thread of the generator panicked".to_string())??;
        measured.add(&part);
    }
    let cpu = CpuTime::since(&cpu_before, &options.pid);
    Ok((PhaseReport::new(phase, options.jobs, &tally, measured, cpu), tally.enqueued()))
}

/// Waits for the end of a phase; shows how far it is on a terminal, and gives up when nothing moves any more.
fn watch(phase: Phase, tally: &Tally, ended: &mpsc::Receiver<()>) {
    let terminal = std::io::stderr().is_terminal();
    let (mut moved, mut moved_at) = (0, Instant::now());
    loop {
        if let Err(RecvTimeoutError::Disconnected) = ended.recv_timeout(PROGRESS_EVERY) {
            break;
        }
        let (enqueued, finished) = (tally.enqueued(), tally.finished());
        if terminal {
            eprint!("\r{}: {enqueued} enqueued, {finished} finished ", phase.name);
        }
        if enqueued + finished != moved {
            (moved, moved_at) = (enqueued + finished, Instant::now());
        } else if moved_at.elapsed() > PATIENCE {
            tally.stop();
        }
    }
    if terminal {
        eprint!("\r\x1b[K");
    }
}
