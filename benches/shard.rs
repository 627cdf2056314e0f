//! What a job costs a Redis server: CPU of `redis-server` for whole lifecycles (enqueue, lease, ack) at several batch
//! sizes, and its memory for jobs that wait. `cargo bench --bench shard`; `GOFLOW_TEST_REDIS7` names another server.
//!
//! The server runs without persistence, so that only the work itself is measured. Each batch is one call with as many ops
//! of one job as its size, as fifty clients that send one command each would make it.
#![allow(clippy::unwrap_used, reason = "a measurement that meets what it did not expect should stop there")]

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use goflow::job::{Lease, Name, Policy};
use goflow::shard::event::Recording;
use goflow::shard::redis::Redis;
use goflow::shard::{Action, Op, Outcome, Retention, Rules, Shard, Start};

const PAYLOAD_BYTES: usize = 256;
const JOBS: usize = 100_000;

struct Server {
    child: Child,
    url: String,
    // Removed with the socket in it.
    _dir: tempfile::TempDir,
}

impl Server {
    fn start() -> Server {
        let dir = tempfile::tempdir().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let program = std::env::var_os("GOFLOW_TEST_REDIS7").unwrap_or_else(|| "redis-server".into());
        let arguments = ["--save", "", "--appendonly", "no", "--bind", "127.0.0.1", "--port"];
        let mut command = Command::new(program);
        command.args(arguments).arg(port.to_string()).current_dir(dir.path()).stdout(Stdio::null());
        Server { child: command.spawn().unwrap(), url: format!("redis://127.0.0.1:{port}"), _dir: dir }
    }

    /// Processor time so far, of user and system.
    fn cpu(&self) -> Duration {
        let schedule = std::fs::read_to_string(format!("/proc/{}/schedstat", self.child.id())).unwrap();
        Duration::from_nanos(schedule.split(' ').next().unwrap().parse().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// So few are kept that whatever is recorded is also dropped while it is measured.
async fn connect(server: &Server, records: bool) -> Redis {
    let rules = Rules {
        retention: Retention { age_ms: 3_600_000, jobs: 1000 },
        recording: records.then_some(Recording { histories: 10_000, journal: 10_000, ..Recording::default() }),
        ..Rules::default()
    };
    for _ in 0..100 {
        if let Ok(redis) = Redis::connect(&server.url, "bench", rules).await {
            return redis;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the server does not answer");
}

async fn apply(shard: &Redis, queue: &Name, actions: Vec<Action>) -> Vec<Outcome> {
    let ops = actions.into_iter().map(|action| Op { queue: queue.clone(), action }).collect();
    shard.apply(ops, None).await.outcomes.into_iter().map(|outcome| outcome.unwrap()).collect()
}

fn enqueues(count: usize) -> Vec<Action> {
    let policy = Arc::new(Policy::default());
    let payload = Bytes::from(vec![b'x'; PAYLOAD_BYTES]);
    let one = || Action::Enqueue { policy: policy.clone(), payloads: vec![payload.clone()], start: Start::Now };
    (0..count).map(|_| one()).collect()
}

/// One batch of whole lives, in three calls.
async fn live(shard: &Redis, queue: &Name, batch: usize, token: &mut u64) {
    apply(shard, queue, enqueues(batch)).await;
    let leases = (0..batch).map(|_| {
        *token += 1;
        Action::Lease { tokens: vec![*token], lease_ms: 30_000, worker: Bytes::from_static(b"worker-1") }
    });
    let outcomes = apply(shard, queue, leases.collect()).await;
    let leases: Vec<Lease> = outcomes
        .into_iter()
        .flat_map(|outcome| match outcome {
            Outcome::Leased(deliveries) => deliveries,
            other => panic!("{other:?}"),
        })
        .map(|delivery| delivery.lease)
        .collect();
    assert_eq!(leases.len(), batch);
    let acks = leases.into_iter().map(|lease| Action::Ack { leases: vec![lease], result: Bytes::new() }).collect();
    assert!(apply(shard, queue, acks).await.iter().all(|outcome| *outcome == Outcome::Count(1)));
}

async fn used_memory(server: &Server) -> u64 {
    let mut connection = redis::Client::open(&*server.url).unwrap().get_multiplexed_async_connection().await.unwrap();
    let info: String = redis::cmd("INFO").arg("memory").query_async(&mut connection).await.unwrap();
    info.lines().find_map(|line| line.strip_prefix("used_memory:")).unwrap().trim().parse().unwrap()
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let server = Server::start();
    let (shard, silent) = (connect(&server, true).await, connect(&server, false).await);
    let (queue, other) = (Name::parse(b"bench").unwrap(), Name::parse(b"silent").unwrap());
    let mut token = 0;
    println!("whole lifecycles, {PAYLOAD_BYTES}-byte payload: CPU of the server per job, events recorded and not");
    for batch in [1, 10, 25, 100, 500] {
        let (jobs, began) = (JOBS.min(batch * 4000), Instant::now());
        let mut spent = [Duration::ZERO; 2];
        // In turns, so that what else the machine does weighs on both alike.
        for _ in 0..20 {
            for (at, shard, queue) in [(0, &shard, &queue), (1, &silent, &other)] {
                let cpu = server.cpu();
                for _ in 0..jobs / batch / 20 {
                    live(shard, queue, batch, &mut token).await;
                }
                spent[at] += server.cpu() - cpu;
            }
        }
        let [recorded, silent] = spent.map(|spent| spent.as_secs_f64() * 1e6 / jobs as f64);
        println!(
            "batch {batch:>4}: {recorded:>6.2} us, without events {silent:>6.2} us, ratio {:.2}  ({:.0} jobs/s here)",
            recorded / silent,
            2.0 * jobs as f64 / began.elapsed().as_secs_f64()
        );
    }
    let queue = Name::parse(b"deep").unwrap();
    let before = used_memory(&server).await;
    for _ in 0..JOBS / 500 {
        apply(&shard, &queue, enqueues(500)).await;
    }
    let bytes = (used_memory(&server).await - before) as f64 / JOBS as f64;
    println!("waiting jobs, {PAYLOAD_BYTES}-byte payload: {bytes:.0} bytes of memory per job");
}
