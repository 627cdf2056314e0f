//! `goflow worker`: takes jobs and has a program or a local web service do them, so that a worker needs no client library.
//!
//! Each of the `--concurrency` slots has a connection of its own: it takes a job, starts the handler, extends the lease while
//! that runs, and sends the verdict, again and again until it is answered (a verdict repeated with its receipt is taken once).
//! A lost connection costs nothing but time: receipts are good on every proxy. A job whose lease was lost is somebody else's,
//! so its handler is stopped and no verdict sent.
//!
//! SIGTERM or SIGINT: no further job is taken, those that run are finished; a second signal, or the end of `--drain`, stops the
//! handlers and gives their jobs back uncounted. Which shards a partitioned worker takes from is decided in [`partition`].

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::clock::{self, Millis};
use crate::job::Name;
use link::{CallError, Link, Server};
use task::{Handler, Task, Verdict};

mod link;
mod partition;
mod program;
mod service;
mod task;

/// How long one DEQUEUE waits: as long as a drain may have to wait for its answer.
const BLOCK_MS: Millis = 2_000;
/// Between tries after a failure: at first, and at most.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// At most so often all slots together say that they cannot take jobs.
const COMPLAIN_EVERY_MS: Millis = 1_000;

/// Run a program, or call a local web service, for each job of a queue
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// A queue to take jobs from; repeat it for many, which are tried in this order
    #[arg(long, required = true, value_name = "NAME")]
    pub queue: Vec<String>,
    /// Jobs at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub concurrency: u32,
    /// A proxy, or what stands in front of them: HOST:PORT or a redis:// or rediss:// URL
    #[arg(long, value_name = "ADDRESS", env = "GOFLOW_WORKER_SERVER", default_value = "127.0.0.1:6380")]
    pub server: String,
    /// A file that holds the password
    #[arg(long, value_name = "FILE", env = "GOFLOW_WORKER_PASSWORD_FILE")]
    pub password_file: Option<PathBuf>,
    /// What the worker is called [default: the host's name and the process's number]
    #[arg(long, value_name = "NAME", env = "GOFLOW_WORKER_NAME")]
    pub name: Option<String>,
    /// How long a job is leased; extended while its handler runs
    #[arg(long, value_name = "MS", default_value_t = 30_000, value_parser = clap::value_parser!(u64).range(100..=86_400_000))]
    pub lease: u64,
    /// How long a handler may run before it is stopped and the job failed; 0 is as long as it likes
    #[arg(long, value_name = "MS", default_value_t = 0)]
    pub timeout: u64,
    /// How long running handlers may go on after SIGTERM; 0 is as long as they like
    #[arg(long, value_name = "MS", default_value_t = 0)]
    pub drain: u64,
    /// The exit code that says that no retry can help: the job is dead at once
    #[arg(long, value_name = "CODE", default_value_t = 65, value_parser = clap::value_parser!(i32).range(1..=255))]
    pub dead_exit: i32,
    /// Post each job there instead of running a program: 2xx acknowledges
    #[arg(long, value_name = "URL", conflicts_with = "handler")]
    pub http: Option<String>,
    /// Take jobs from these shards only
    #[arg(long, value_name = "NAME,NAME", value_delimiter = ',')]
    pub shards: Vec<String>,
    /// Be the i-th of n workers that divide the shards among themselves
    #[arg(long, value_name = "I/N", conflicts_with = "shards", value_parser = partition::Seat::parse)]
    pub partition: Option<partition::Seat>,
    /// Log level: error, warn, info, debug, trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log: tracing::Level,
    /// The program and its arguments: the payload on standard input, JOB_... in the environment; exit code 0 acknowledges
    /// with standard output as the result, any other fails the job with the end of standard error
    #[arg(last = true, value_name = "PROGRAM")]
    pub handler: Vec<OsString>,
}

impl Options {
    pub fn check(&self) -> Result<(), String> {
        for queue in &self.queue {
            Name::parse(queue.as_bytes()).map_err(|error| format!("--queue {queue}: {}", error.text))?;
        }
        Server::new(&self.server, self.password_file.as_deref())?;
        match (&self.http, self.handler.first()) {
            (None, None) => Err("nothing to do the jobs: expected -- PROGRAM or --http URL".into()),
            (Some(url), _) => service::Service::parse(url).map(|_| ()),
            (None, Some(_)) => Ok(()),
        }
    }

    fn name(&self) -> String {
        self.name.clone().unwrap_or_else(|| {
            let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            format!("{}-{}", host.trim(), std::process::id())
        })
    }
}

/// What all slots share.
struct Worker {
    options: Options,
    name: String,
    server: Server,
    handler: Handler,
    /// The shards to take from; `None`: all. Somewhat late after a change, which costs a partition its purity for a moment
    /// and no job anything.
    shards: watch::Receiver<Option<Vec<String>>>,
    /// Take no further job.
    draining: watch::Receiver<bool>,
    /// Stop what runs.
    stopping: watch::Receiver<bool>,
    /// The handler cannot be started at all; the worker ends with an error.
    broken: AtomicBool,
    /// When a slot last told why it cannot take jobs; all slots mostly have one reason.
    complained_at: AtomicU64,
}

impl Worker {
    fn complain(&self, error: &CallError) {
        let now = clock::now();
        let last = self.complained_at.swap(now, Ordering::Relaxed);
        match now.abs_diff(last) >= COMPLAIN_EVERY_MS {
            true => tracing::warn!(%error, "cannot take jobs; trying again"),
            false => {
                self.complained_at.store(last, Ordering::Relaxed);
                tracing::debug!(%error, "cannot take jobs; trying again");
            }
        }
    }
}

/// Works until a signal ends it: 0, or 1 if the handler cannot be started.
pub fn run(options: &Options) -> ExitCode {
    let log = tracing_subscriber::fmt().with_ansi(false).with_writer(std::io::stderr).with_max_level(options.log);
    // Whoever read the log may go away; the jobs go on.
    log.log_internal_errors(false).init();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.to_string()),
    };
    match runtime.block_on(work(options.clone())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => fail(&why),
    }
}

fn fail(why: &str) -> ExitCode {
    eprintln!("goflow worker: {why}");
    ExitCode::FAILURE
}

async fn work(options: Options) -> Result<(), String> {
    let server = Server::new(&options.server, options.password_file.as_deref())?;
    let handler = match &options.http {
        Some(url) => Handler::Service(service::Service::parse(url)?),
        None => Handler::Program(options.handler.clone()),
    };
    let mut signals = Signals::new().map_err(|error| error.to_string())?;
    let (drain, draining) = watch::channel(false);
    let (stop, stopping) = watch::channel(false);
    let named = (!options.shards.is_empty()).then(|| options.shards.clone());
    let (share, shards) = watch::channel(match options.partition {
        Some(_) => Some(Vec::new()),
        None => named,
    });
    let worker = Arc::new(Worker {
        name: options.name(),
        broken: AtomicBool::new(false),
        complained_at: AtomicU64::new(0),
        options,
        server,
        handler,
        shards,
        draining,
        stopping,
    });
    tracing::info!(worker = worker.name, queues = ?worker.options.queue, server = %worker.server, "working");
    let member = worker.options.partition.map(|seat| tokio::spawn(partition::keep(seat, worker.clone(), share)));
    let slots: Vec<_> = (0..worker.options.concurrency).map(|_| tokio::spawn(slot(worker.clone()))).collect();
    let mut all = std::pin::pin!(futures_util::future::join_all(slots));
    tokio::select! {
        _ = &mut all => {}
        () = signals.next() => {
            tracing::info!("finishing what runs");
            let _ = drain.send(true);
            tokio::select! {
                _ = &mut all => {}
                () = signals.next() => {}
                () = patience(worker.options.drain) => {}
            }
            let _ = stop.send(true);
            let _ = all.await;
        }
    }
    if let Some(member) = member {
        let _ = drain.send(true);
        let _ = member.await;
    }
    tracing::info!("stopped");
    match worker.broken.load(Ordering::Relaxed) {
        true => Err("the handler cannot be started".into()),
        false => Ok(()),
    }
}

/// So long, or for ever.
async fn patience(ms: Millis) {
    match ms {
        0 => std::future::pending().await,
        ms => tokio::time::sleep(Duration::from_millis(ms)).await,
    }
}

struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Signals> {
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Resolves when the flag is set, and never when nobody can set it any more.
async fn raised(flag: &watch::Receiver<bool>) {
    let mut flag = flag.clone();
    if flag.wait_for(|raised| *raised).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// One job after the other.
async fn slot(worker: Arc<Worker>) {
    let mut link = Link::new(worker.server.clone());
    let mut pause = PAUSE_MIN;
    let mut shards = worker.shards.clone();
    while !*worker.draining.borrow() && !worker.broken.load(Ordering::Relaxed) {
        let from = shards.borrow_and_update().clone();
        if from.as_ref().is_some_and(Vec::is_empty) {
            tokio::select! {
                changed = shards.changed() => if changed.is_err() { return },
                () = raised(&worker.draining) => {}
            }
            continue;
        }
        match take(&mut link, &worker, from.as_deref()).await {
            Ok(None) => pause = PAUSE_MIN,
            Ok(Some(task)) => {
                pause = PAUSE_MIN;
                one(&mut link, &worker, task).await;
            }
            Err(error) => {
                worker.complain(&error);
                tokio::select! {
                    () = tokio::time::sleep(jittered(pause)) => {}
                    () = raised(&worker.draining) => {}
                }
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(rand::random_range(0.75..1.25))
}

async fn take(link: &mut Link, worker: &Worker, shards: Option<&[String]>) -> Result<Option<Task>, CallError> {
    let mut command = redis::cmd("GOFLOW.DEQUEUE");
    command.arg(&worker.options.queue).arg("BLOCK").arg(BLOCK_MS).arg("LEASE").arg(worker.options.lease);
    command.arg("WORKER").arg(&worker.name);
    if let Some(shards) = shards {
        command.arg("SHARDS").arg(shards.len()).arg(shards);
    }
    match link.call(&command).await? {
        redis::Value::Nil => Ok(None),
        value => Task::read(value).map(Some).ok_or_else(|| CallError::Broken("the answer is no job".into())),
    }
}

/// Does one job and says how it ended.
async fn one(link: &mut Link, worker: &Worker, task: Task) {
    let began = std::time::Instant::now();
    let draining = *worker.draining.borrow();
    let verdict = match draining {
        // It came with the last answer; nobody began it.
        true => Verdict::Release { delay_ms: 0 },
        false => tokio::select! {
            verdict = worker.handler.handle(&task, worker) => verdict,
            // Dropping the handler's future stops the handler.
            () = keep_lease(&mut *link, worker, &task) => {
                tracing::warn!(job = ?task.id(), "the lease is lost; its handler was stopped");
                return;
            }
        },
    };
    if matches!(verdict, Verdict::Broken) {
        worker.broken.store(true, Ordering::Relaxed);
    }
    let ms = began.elapsed().as_millis() as u64;
    match say(link, worker, &task, &verdict).await {
        Ok(()) => tracing::info!(job = ?task.id(), attempt = task.attempt(), ms, verdict = %verdict, "done"),
        Err(error) => tracing::warn!(job = ?task.id(), %error, "the verdict was not taken"),
    }
}

/// Extends the lease again and again; ends when it is lost.
async fn keep_lease(link: &mut Link, worker: &Worker, task: &Task) {
    let lease = Duration::from_millis(worker.options.lease);
    let mut next = lease / 3;
    loop {
        tokio::time::sleep(next).await;
        let mut command = redis::cmd("GOFLOW.EXTEND");
        command.arg(task.queue()).arg(task.receipt()).arg(worker.options.lease);
        next = match link.call(&command).await {
            Ok(_) => lease / 3,
            Err(error) if error.is_final() => return,
            Err(error) => {
                tracing::warn!(job = ?task.id(), %error, "cannot extend the lease; trying again");
                (lease / 10).min(PAUSE_MAX)
            }
        };
    }
}

/// Sends a verdict until it is answered; for as long as anybody may still want to know.
async fn say(link: &mut Link, worker: &Worker, task: &Task, verdict: &Verdict) -> Result<(), CallError> {
    let command = verdict.command(task);
    let until = tokio::time::Instant::now() + Duration::from_millis(worker.options.lease) * 2;
    let mut pause = PAUSE_MIN;
    loop {
        match link.call(&command).await {
            // An acknowledgement that counts nothing came too late.
            Ok(redis::Value::Int(0)) => {
                return Err(CallError::Refused("LEASELOST".into(), "the lease was lost".into()));
            }
            Ok(_) => return Ok(()),
            Err(error) if error.is_final() || tokio::time::Instant::now() >= until => return Err(error),
            Err(error) => tracing::warn!(job = ?task.id(), %error, "cannot say the verdict; trying again"),
        }
        tokio::time::sleep(jittered(pause)).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}
