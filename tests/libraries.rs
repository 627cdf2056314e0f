//! Queue libraries that know nothing of GoFlow, unmodified: RQ, Celery, arq, BullMQ, Sidekiq; their jobs through GoFlow
//! over one shard and over four, each done once.
//!
//! Two stock workers of the library and one producer; a job writes its number down. Over four shards each library has the
//! setting that keeps what it does in one transaction together: its own prefix where it has one, GoFlow's
//! `forward.together` where it has none (`protocol.md` has the table). `GOFLOW_LIBRARY_JOBS` says how many jobs (50).
//! The programs are in `tests/clients/libraries/`.

use std::collections::HashSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::eventually;
use crate::support::fleet::Fleet;
use crate::support::goflow::Goflow;
use crate::support::process::{Process, Program, on_path, venv};
use crate::support::{scratch, size};

/// One library: its programs, and what it needs over several shards.
struct Library {
    /// The program and its arguments without the port.
    worker: Vec<OsString>,
    producer: Vec<OsString>,
    /// The library's own setting.
    prefix: Option<(&'static str, &'static str)>,
    /// GoFlow's.
    together: &'static str,
}

fn script(name: &str) -> OsString {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/libraries").join(name).into_os_string()
}

fn target() -> PathBuf {
    venv().parent().unwrap().to_owned()
}

fn found(name: &str) -> OsString {
    on_path(name).unwrap_or_else(|| panic!("{name} is not installed; run .ci/setup")).into_os_string()
}

/// A library of which one script is worker and producer.
fn scripted(
    program: OsString,
    name: &str,
    prefix: Option<(&'static str, &'static str)>,
    together: &'static str,
) -> Library {
    let role = |role: &str| vec![program.clone(), script(name), role.into()];
    Library { worker: role("work"), producer: role("produce"), prefix, together }
}

fn python(venv: &str, name: &str, prefix: Option<(&'static str, &'static str)>, together: &'static str) -> Library {
    scripted(target().join(venv).join("bin/python").into_os_string(), name, prefix, together)
}

fn rq() -> Library {
    python("venv", "rq_jobs.py", Some(("RQ_KEY_PREFIX", "{rq}")), "")
}

fn celery() -> Library {
    python("venv", "celery_jobs.py", Some(("KEYPREFIX", "{celery}")), "")
}

fn arq() -> Library {
    python("venv-arq", "arq_jobs.py", None, "arq:*")
}

fn bullmq() -> Library {
    scripted(found("node"), "bullmq_jobs.js", Some(("KEYPREFIX", "{bull}")), "")
}

fn sidekiq() -> Library {
    let (ruby, jobs) = (found("ruby"), script("sidekiq_jobs.rb"));
    Library {
        worker: vec![ruby.clone(), found("sidekiq"), "-c".into(), "4".into(), "-r".into(), jobs.clone()],
        producer: vec![ruby, jobs, "produce".into()],
        prefix: None,
        together: "stat:* processes *:*:????????????*",
    }
}

impl Library {
    fn start(&self, words: &[OsString], dir: &Path, port: &str, spread: bool) -> Process {
        let mut env: Vec<(String, OsString)> = vec![
            ("NODE_PATH".into(), target().join("clients/node_modules").into_os_string()),
            ("REDIS_URL".into(), format!("redis://127.0.0.1:{port}/0").into()),
        ];
        env.extend(self.prefix.filter(|_| spread).map(|(name, prefix)| (name.to_owned(), prefix.into())));
        let (path, args) = words.split_first().unwrap();
        Process::start(&Program { path: path.into(), args: args.to_vec(), env, dir: dir.to_owned() })
    }

    /// Runs the jobs through the proxy and holds what was written down against what was asked for.
    fn run(&self, goflow: &Goflow, spread: bool) {
        let (jobs, dir) = (size("GOFLOW_LIBRARY_JOBS", 50), scratch());
        let log = dir.path().join("done");
        std::fs::write(&log, "").unwrap();
        let port = goflow.address().rsplit(':').next().unwrap();
        let mut worker = self.worker.clone();
        // Sidekiq's own program takes where to connect from REDIS_URL.
        if worker.last().is_some_and(|word| word == "work") {
            worker.push(port.into());
        }
        let mut workers: Vec<Process> = (0..2).map(|_| self.start(&worker, dir.path(), port, spread)).collect();
        let mut words = self.producer.clone();
        words.extend([port.into(), "0".into(), jobs.to_string().into(), log.clone().into_os_string()]);
        let mut producer = self.start(&words, dir.path(), port, spread);
        let produced = producer.wait();
        assert!(produced.success(), "the producer failed:\n{}", producer.stderr.lines().join("\n"));
        let done = || -> Vec<String> { std::fs::read_to_string(&log).unwrap().lines().map(str::to_owned).collect() };
        let said = |workers: &[Process]| -> Vec<String> {
            workers.iter().flat_map(|worker| [worker.stdout.lines(), worker.stderr.lines()].concat()).collect()
        };
        eventually!("every job is done", {
            if let Some(worker) = workers.iter_mut().find_map(|worker| (!worker.is_running()).then_some(worker)) {
                panic!("a worker ended:\n{}", worker.stderr.lines().join("\n"));
            }
            (done().len() >= jobs).then_some(())
        });
        workers.iter().for_each(|worker| worker.signal("TERM"));
        workers.iter_mut().for_each(|worker| {
            worker.wait();
        });
        let all = done();
        let distinct: HashSet<&String> = all.iter().collect();
        assert_eq!((all.len(), distinct.len()), (jobs, jobs), "each job once");
        // What a library meets of the shards it may only log.
        let refused: Vec<String> = said(&workers).into_iter().filter(|line| line.contains("CROSSSHARD")).collect();
        assert!(refused.is_empty(), "{}", refused.join("\n"));
    }
}

fn over_one_and_four_shards(library: &Library) {
    for shards in [1, 4] {
        let together = [("GOFLOW_FORWARD_TOGETHER", library.together)];
        let fleet = Fleet::start_with(shards, 1, &[], if shards > 1 { &together } else { &[] });
        library.run(&fleet.proxies[0], shards > 1);
    }
}

#[test]
fn rq_does_every_job_once() {
    over_one_and_four_shards(&rq());
}

#[test]
fn rq_needs_no_redis_at_all() {
    rq().run(&Goflow::start(&[]), false);
}

#[test]
fn celery_does_every_job_once() {
    over_one_and_four_shards(&celery());
}

#[test]
fn arq_does_every_job_once() {
    over_one_and_four_shards(&arq());
}

#[test]
fn bullmq_does_every_job_once() {
    over_one_and_four_shards(&bullmq());
}

#[test]
fn sidekiq_does_every_job_once() {
    over_one_and_four_shards(&sidekiq());
}
