//! What a job costs does not depend on how many there are.
//!
//! The CPU time that server and proxy spend on the life of a job (enqueue, dequeue, ack) is taken with few jobs in the
//! queue and with many: many ready, then many scheduled and dead besides. `GOFLOW_FLAT_DEPTH` sets how many; with
//! `GOFLOW_FLAT_BOUNDS` the costs may differ by a quarter, without it a factor of two still passes, which is far from what
//! any cost that grows with the depth would do.

use std::time::Duration;

use crate::support::fleet::Fleet;
use crate::support::goflow::Goflow;
use crate::support::size;
use crate::support::wire::{Value, Wire};

/// Lives of jobs that are measured at a time.
const JOBS: usize = 2_000;
/// Jobs in one batch while a queue is filled.
const BATCH: usize = 500;

/// So few completed jobs are kept that every measured life also trims one: with and without, the work would differ.
const KEEP_FEW: &[(&str, &str)] = &[("GOFLOW_QUEUE_RETENTION_JOBS", "1000")];

/// CPU time that all threads of a process have used, to the nanosecond.
fn cpu(id: u32) -> Duration {
    let tasks = std::fs::read_dir(format!("/proc/{id}/task")).unwrap();
    let used = tasks.filter_map(|task| {
        let stat = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        stat.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(used.sum::<u64>())
}

fn fill(wire: &mut Wire, count: usize, options: &[&str]) {
    let payload = "x".repeat(64);
    for _ in 0..count.div_ceil(BATCH) {
        let number = BATCH.to_string();
        let words = [&["GOFLOW.ENQUEUEMANY", "main", &number][..], &[payload.as_str(); BATCH], options].concat();
        assert_eq!(wire.call(&words).items().len(), BATCH);
    }
}

/// Brings so many jobs into the dead letter queue.
fn bury(wire: &mut Wire, count: usize) {
    for _ in 0..count.div_ceil(BATCH) {
        let jobs = wire.call(&["GOFLOW.DEQUEUE", "main", "COUNT", &BATCH.to_string()]);
        let receipts: Vec<String> = jobs.items().iter().map(|job| job.field("receipt").text()).collect();
        receipts.iter().for_each(|receipt| wire.send(&["GOFLOW.FAIL", "main", receipt, "ERROR", "no", "DEAD"]));
        receipts.iter().for_each(|_| assert_eq!(wire.read().text(), "dead"));
    }
}

/// Microseconds of CPU that one job's life costs these processes: the least of three runs, since chance only adds.
fn cost(wire: &mut Wire, processes: &[u32]) -> f64 {
    let run = |wire: &mut Wire| {
        let before: Duration = processes.iter().map(|id| cpu(*id)).sum();
        for _ in 0..JOBS / 10 {
            (0..10).for_each(|_| wire.send(&["GOFLOW.ENQUEUE", "main", "payload"]));
            (0..10).for_each(|_| assert!(matches!(wire.read(), Value::Bulk(_))));
            (0..10).for_each(|_| wire.send(&["GOFLOW.DEQUEUE", "main"]));
            let receipts: Vec<String> = (0..10).map(|_| wire.read().field("receipt").text()).collect();
            receipts.iter().for_each(|receipt| wire.send(&["GOFLOW.ACK", "main", receipt]));
            receipts.iter().for_each(|_| assert_eq!(wire.read(), Value::Integer(1)));
        }
        let after: Duration = processes.iter().map(|id| cpu(*id)).sum();
        (after - before).as_secs_f64() * 1e6 / JOBS as f64
    };
    (0..3).map(|_| run(wire)).fold(f64::INFINITY, f64::min)
}

fn compare(kind: &str, wire: &mut Wire, processes: &[u32]) {
    let depth = size("GOFLOW_FLAT_DEPTH", 10_000);
    let bound = if std::env::var_os("GOFLOW_FLAT_BOUNDS").is_some() { 1.25 } else { 4.0 };
    fill(wire, 1_000, &[]);
    cost(wire, processes);
    let few = cost(wire, processes);
    fill(wire, depth - 1_000, &[]);
    let many = cost(wire, processes);
    println!("{kind}: {few:.1} µs a job at a depth of 1000, {many:.1} at {depth}: {:.2}", many / few);
    fill(wire, depth, &["DELAY", "86400000"]);
    fill(wire, depth, &[]);
    bury(wire, depth);
    let crowded = cost(wire, processes);
    println!("{kind}: {crowded:.1} µs with {depth} scheduled and {depth} dead besides: {:.2}", crowded / few);
    assert_eq!(wire.say("GOFLOW.LEN main STATE scheduled").integer() as usize, depth.next_multiple_of(BATCH));
    assert_eq!(wire.say("GOFLOW.DLQ LEN main").integer() as usize, depth.next_multiple_of(BATCH));
    assert!(many / few <= bound, "a job costs {few:.1} µs at 1000 and {many:.1} at {depth}");
    assert!(crowded / few <= bound, "a job costs {few:.1} µs alone and {crowded:.1} in a crowd");
}

#[test]
fn a_job_on_a_redis_shard_costs_the_same_among_many() {
    let fleet = Fleet::start_plain(1, 1, KEEP_FEW);
    compare("Redis", &mut fleet.proxies[0].wire(), &[fleet.proxies[0].id(), fleet.shards[0].id()]);
}

#[test]
fn a_job_on_the_embedded_shard_costs_the_same_among_many() {
    let goflow = Goflow::start_with(&[], KEEP_FEW);
    compare("embedded", &mut goflow.wire(), &[goflow.id()]);
}
