//! Nothing that was acknowledged is lost, whoever is killed.
//!
//! Producers and workers in two languages, with stock clients, go through some proxies to four Redis shards (or to one
//! process with the embedded shard) while proxies and shards are killed with SIGKILL at random and started again. Each
//! client writes down what it was told; at the end the logs are held against each other:
//! every acknowledged enqueue was completed, no job was delivered after its ack was confirmed, and no two workers were
//! inside leases of one job at the same time. `GOFLOW_LOSS_JOBS`, `GOFLOW_LOSS_KILLS` and `GOFLOW_LOSS_PROXIES` set the size.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use rand::{Rng, SeedableRng};
use tempfile::TempDir;

use crate::events::Checker;
use crate::eventually;
use crate::support::goflow::Goflow;
use crate::support::process::{Process, Program, on_path, venv};
use crate::support::scratch;
use crate::support::servers::{Flavour, Server};
use crate::support::wire::{Value, Wire};

fn size(variable: &str, small: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(small)
}

/// However many jobs there are, all that is recorded of them is there at the end.
const KEEP_ALL: [(&str, &str); 2] = [("GOFLOW_EVENTS_JOURNAL", "100000000"), ("GOFLOW_EVENTS_HISTORIES", "100000000")];

/// What one client was told about a job, and when.
#[derive(Default)]
struct History {
    enqueued: bool,
    /// From the delivery to the sending of the verdict, or for ever; by receipt.
    held: Vec<(u64, u64)>,
    deliveries: Vec<u64>,
    confirmed_at: Option<u64>,
}

struct Crowd {
    dir: TempDir,
    producers: Vec<Process>,
    workers: Vec<Process>,
    /// Of each producer's log: how far it was read, and how many jobs were acknowledged up to there.
    read: Vec<(u64, usize)>,
}

impl Crowd {
    fn start(addresses: &str, jobs: usize, each: usize) -> Crowd {
        let dir = scratch();
        let start = |role: &str, number: usize, count: usize| {
            let name = format!("{role}{number}");
            let log = dir.path().join(&name);
            let (program, script) = match number % 2 {
                0 => (venv().join("bin/python"), "loss.py"),
                _ => (on_path("node").unwrap(), "loss.js"),
            };
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(script);
            let words =
                [role.to_owned(), log.display().to_string(), addresses.into(), "main".into(), count.to_string(), name];
            Process::start(&Program {
                path: program,
                args: std::iter::once(script.into_os_string()).chain(words.into_iter().map(Into::into)).collect(),
                env: vec![("NODE_PATH".into(), node_modules().into_os_string())],
                dir: dir.path().to_owned(),
            })
        };
        let workers = (0..each).map(|number| start("work", number, 0)).collect();
        let producers = (0..each).map(|number| start("produce", number, jobs / each)).collect();
        Crowd { dir, producers, workers, read: vec![(0, 0); each] }
    }

    /// How many jobs were acknowledged so far.
    fn acknowledged(&mut self) -> usize {
        for (number, (until, count)) in self.read.iter_mut().enumerate() {
            let Ok(mut log) = File::open(self.dir.path().join(format!("produce{number}"))) else { continue };
            let mut text = String::new();
            log.seek(SeekFrom::Start(*until)).unwrap();
            log.read_to_string(&mut text).unwrap();
            let whole = text.rfind('\n').map_or(0, |end| end + 1);
            *until += whole as u64;
            *count += text[..whole].lines().filter(|line| line.starts_with("E ")).count();
        }
        self.read.iter().map(|(_, count)| count).sum()
    }

    /// Waits until so many were acknowledged, or there is nothing more to come.
    fn reach(&mut self, target: usize) {
        eventually!("the work goes on", (self.acknowledged() >= target || !self.producing()).then_some(()));
    }

    fn producing(&mut self) -> bool {
        self.producers.iter_mut().any(Process::is_running)
    }

    /// What all clients wrote, by job id.
    fn histories(&self) -> HashMap<String, History> {
        let mut histories: HashMap<String, History> = HashMap::new();
        let mut open: HashMap<String, (String, u64)> = HashMap::new();
        for entry in std::fs::read_dir(self.dir.path()).unwrap() {
            let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
            // The last line may be half written.
            for line in text.rsplit_once('\n').map_or("", |(whole, _)| whole).lines() {
                let words: Vec<&str> = line.split(' ').collect();
                let (time, id) = (words[1].parse().unwrap(), words[2].to_owned());
                let history = histories.entry(id.clone()).or_default();
                match words[0] {
                    "E" => history.enqueued = true,
                    "D" => {
                        history.deliveries.push(time);
                        open.insert(words[3].into(), (id, time));
                    }
                    "S" => {
                        if let Some((_, began)) = open.remove(words[3]) {
                            history.held.push((began, time));
                        }
                    }
                    "A" if words[4] == "1" => {
                        history.confirmed_at = Some(history.confirmed_at.map_or(time, |at| at.min(time)));
                    }
                    _ => {}
                }
            }
        }
        histories
    }
}

fn node_modules() -> PathBuf {
    venv().parent().unwrap().join("clients/node_modules")
}

/// How many jobs are neither over nor dead; `None` while a shard does not answer.
fn unfinished(wire: &mut Wire) -> Option<i64> {
    let count = |wire: &mut Wire, state: &str| match wire.call(&["GOFLOW.LEN", "main", "STATE", state]) {
        Value::Integer(count) => Some(count),
        _ => None,
    };
    Some(count(wire, "ready")? + count(wire, "scheduled")? + count(wire, "leased")?)
}

/// Lets the workers finish what is there, and holds the logs against each other.
fn settle(mut crowd: Crowd, proxy: &Goflow, jobs: usize) {
    eventually!("the producers are done", (!crowd.producing()).then_some(()));
    let mut wire = proxy.wire();
    eventually!("every job is over", unfinished(&mut wire).filter(|count| *count == 0));
    assert_eq!(wire.call(&["GOFLOW.LEN", "main", "STATE", "dead"]), Value::Integer(0), "jobs died of the kills");
    // A worker writes its last line after the shard has counted the ack.
    eventually!("every acknowledged job is confirmed", {
        let histories = crowd.histories();
        histories.values().all(|history| !history.enqueued || history.confirmed_at.is_some()).then_some(())
    });
    crowd.workers.iter_mut().for_each(Process::kill);
    let histories = crowd.histories();
    let enqueued = histories.values().filter(|history| history.enqueued).count();
    assert_eq!(enqueued, jobs, "a producer ended before its last job was acknowledged");
    let (mut again, mut inside, mut deliveries) = (0, 0, 0);
    for history in histories.values() {
        deliveries += history.deliveries.len();
        let confirmed_at = history.confirmed_at.unwrap_or(u64::MAX);
        again += history.deliveries.iter().filter(|at| **at > confirmed_at).count();
        let mut held = history.held.clone();
        held.sort_unstable();
        inside += held.windows(2).filter(|pair| pair[1].0 < pair[0].1).count();
    }
    // Of every job that the journal names: an enqueue that was never answered may have happened.
    let mut told = 0;
    let recorded = Checker::check(&mut wire, "main", None, |id, events| {
        let Some(history) = histories.get(id) else { return };
        let count = |what: &str| events.iter().filter(|event| event.what == what).count();
        // A delivery may have been on its way to a client that was killed.
        assert!(count("job.started") >= history.deliveries.len(), "{id} was delivered more often: {events:?}");
        assert_eq!(count("job.completed"), usize::from(history.confirmed_at.is_some()), "{id}: {events:?}");
        told += 1;
    });
    assert_eq!(told, histories.len(), "jobs of which clients know are in the journal");
    println!("{recorded} events agree");
    println!(
        "{enqueued} acknowledged, {deliveries} deliveries, lost 0, after a confirmed ack {again}, two inside one lease {inside}"
    );
    assert_eq!((again, inside), (0, 0));
}

#[test]
fn no_acknowledged_job_is_lost_when_proxies_and_redis_shards_are_killed() {
    let (jobs, kills) = (size("GOFLOW_LOSS_JOBS", 2_000), size("GOFLOW_LOSS_KILLS", 6));
    let each = if jobs > 10_000 { 20 } else { 4 };
    let mut shards: Vec<Server> = (0..4).map(|_| Server::start(Flavour::Redis7, Server::DURABLE)).collect();
    let named: Vec<String> = shards.iter().enumerate().map(|(at, shard)| format!("s{at}={}", shard.url())).collect();
    let args: Vec<&str> = named.iter().flat_map(|shard| ["--shard", shard.as_str()]).collect();
    let count = size("GOFLOW_LOSS_PROXIES", 2);
    let mut proxies: Vec<Goflow> = (0..count).map(|_| Goflow::start_with(&args, &KEEP_ALL)).collect();
    proxies.iter_mut().for_each(|proxy| proxy.expect_log("shard"));
    let addresses: Vec<&str> = proxies.iter().map(Goflow::address).collect();
    let mut crowd = Crowd::start(&addresses.join(","), jobs, each);
    let mut random = rand::rngs::SmallRng::seed_from_u64(7);
    for kill in 0..kills {
        // A kill falls after so many more jobs were acknowledged, so that all of them fall into the work.
        crowd.reach(jobs * (kill + 1) / (kills + 2));
        match random.random_bool(0.5) {
            true => proxies[random.random_range(0..count)].restart(),
            false => shards[random.random_range(0..4)].restart(),
        }
    }
    settle(crowd, &proxies[0], jobs);
}

#[test]
fn no_acknowledged_job_is_lost_when_the_process_with_the_embedded_shard_is_killed() {
    let (jobs, kills) = (size("GOFLOW_LOSS_JOBS", 2_000), size("GOFLOW_LOSS_KILLS", 6));
    let each = if jobs > 10_000 { 20 } else { 4 };
    let mut process = Goflow::start_with(&[], &KEEP_ALL);
    let mut crowd = Crowd::start(process.address(), jobs, each);
    for kill in 0..kills {
        crowd.reach(jobs * (kill + 1) / (kills + 2));
        process.restart();
    }
    settle(crowd, &process, jobs);
}
