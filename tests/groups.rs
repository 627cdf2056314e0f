//! Groups through real proxies: never two jobs of one at once, and in their order, whoever is killed.
//!
//! Producers and workers go through three proxies to Redis shards while proxies, shards and workers are killed. Each worker
//! writes down from when to when it surely held a job; at the end the histories are held against each other. The same
//! contest with a bound of 2 is a seeded violation, which the check must see. `GOFLOW_GROUPS`, `GOFLOW_GROUP_JOBS`,
//! `GOFLOW_GROUP_WORKERS` and `GOFLOW_GROUP_KILLS` set the size.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use rand::Rng;

use crate::eventually;
use crate::support::fleet::Fleet;
use crate::support::goflow::Goflow;
use crate::support::wire::{Value, Wire};
use crate::support::{patience, size};

/// One delivery: of which group and job, and in microseconds when it was surely held.
#[derive(Clone, Copy, Debug)]
struct Held {
    group: usize,
    number: usize,
    from: u64,
    to: u64,
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64
}

/// What is wrong with the histories, in words.
fn violations(held: &[Held]) -> Vec<String> {
    let mut groups: HashMap<usize, Vec<Held>> = HashMap::new();
    held.iter().for_each(|one| groups.entry(one.group).or_default().push(*one));
    let mut found = Vec::new();
    for held in groups.values_mut() {
        held.sort_by_key(|one| one.from);
        let mut last = held[0];
        for one in &held[1..] {
            if one.from < last.to {
                found.push(format!("two at once: {last:?} {one:?}"));
            }
            if one.number < last.number {
                found.push(format!("out of order: {last:?} {one:?}"));
            }
            // The one that is held for longest decides who comes too early.
            last = Held { to: last.to.max(one.to), ..*one };
        }
    }
    found
}

struct Contest {
    addresses: Vec<String>,
    over: AtomicBool,
    finished: AtomicUsize,
    held: Mutex<Vec<Held>>,
}

impl Contest {
    /// A connection to one of the proxies, as soon as there is one.
    fn connect(&self) -> Wire {
        loop {
            let at = rand::random_range(0..self.addresses.len());
            if let Some(wire) = Wire::try_connect(&self.addresses[at]) {
                return wire;
            }
            std::thread::yield_now();
        }
    }

    /// Adds the jobs of every `of`th group, the next of a group after the one before was acknowledged.
    fn produce(&self, (nth, of): (usize, usize), (groups, jobs): (usize, usize), bound: &str) {
        let mut wire = self.connect();
        for number in 0..jobs / groups {
            for group in (nth..groups).step_by(of) {
                let (payload, key) = (format!("{group} {number}"), format!("group-{group}"));
                let request =
                    ["GOFLOW.ENQUEUE", "main", &payload, "GROUP", &key, "CONCURRENCY", bound, "BACKOFF", "20"];
                while !matches!(wire.try_call(&request, patience()), Ok(Value::Bulk(_))) {
                    wire = self.connect();
                }
            }
        }
    }

    /// Takes jobs until all is over. Some workers die with a job, fail it or give it back.
    fn work(&self) {
        let mut random = rand::rng();
        let mut wire = self.connect();
        while !self.over.load(Ordering::Relaxed) {
            let request = ["GOFLOW.DEQUEUE", "main", "BLOCK", "200", "LEASE", "1000"];
            let Ok(reply) = wire.try_call(&request, patience()) else {
                wire = self.connect();
                continue;
            };
            let from = now_us();
            if !matches!(reply, Value::Array(_)) {
                continue;
            }
            let payload = reply.field("payload").text();
            let (group, number) = payload.split_once(' ').unwrap();
            let receipt = reply.field("receipt").text();
            // After the end of its lease nobody holds a job, whatever the worker thinks.
            let until = reply.field("lease_until").integer() as u64 * 1000;
            let request = match random.random_range(0..100) {
                0 => Vec::new(),
                1..4 => vec!["GOFLOW.FAIL", "main", &receipt, "RETRYIN", "10"],
                4..7 => vec!["GOFLOW.RELEASE", "main", &receipt],
                _ => vec!["GOFLOW.ACK", "main", &receipt],
            };
            std::thread::yield_now();
            let to = now_us().min(until);
            self.held.lock().unwrap().push(Held {
                group: group.parse().unwrap(),
                number: number.parse().unwrap(),
                from,
                to,
            });
            if request.is_empty() {
                wire = self.connect();
                continue;
            }
            match wire.try_call(&request, patience()) {
                Ok(Value::Integer(1)) => drop(self.finished.fetch_add(1, Ordering::Relaxed)),
                Ok(_) => {}
                Err(_) => wire = self.connect(),
            }
        }
    }
}

/// Groups, jobs and workers of a small contest.
const SMALL: (usize, usize, usize) = (20, 800, 8);

/// The histories of a contest with so large a bound.
fn contest(bound: &'static str, (groups, jobs, workers): (usize, usize, usize), kills: usize) -> Vec<Held> {
    let mut fleet = Fleet::start(2, 3, &[]);
    fleet.expect_failures();
    let contest = Arc::new(Contest {
        addresses: fleet.proxies.iter().map(|proxy| proxy.address().to_owned()).collect(),
        over: false.into(),
        finished: 0.into(),
        held: Mutex::default(),
    });
    let mut producers = Vec::new();
    for nth in 0..4 {
        let contest = contest.clone();
        producers.push(std::thread::spawn(move || contest.produce((nth, 4), (groups, jobs), bound)));
    }
    let start = |_| {
        let contest = contest.clone();
        std::thread::spawn(move || contest.work())
    };
    let workers: Vec<_> = (0..workers).map(start).collect();
    for kill in 0..kills {
        let target = jobs * (kill + 1) / (kills + 2);
        eventually!("the work goes on", (contest.finished.load(Ordering::Relaxed) >= target).then_some(()));
        match kill % 2 {
            0 => fleet.proxies[kill / 2 % 3].restart(),
            _ => fleet.shards[kill / 2 % 2].restart(),
        }
    }
    producers.into_iter().for_each(|producer| producer.join().unwrap());
    let mut wire = fleet.proxies[0].wire();
    let mut left = |state: &str| match wire.call(&["GOFLOW.LEN", "main", "STATE", state]) {
        Value::Integer(count) => count,
        _ => 1,
    };
    eventually!("every job is over", {
        (left("ready") == 0 && left("scheduled") == 0 && left("leased") == 0).then_some(())
    });
    contest.over.store(true, Ordering::Relaxed);
    workers.into_iter().for_each(|worker| worker.join().unwrap());
    let held = contest.held.lock().unwrap().clone();
    println!("{} deliveries of {jobs} jobs in {groups} groups, {kills} kills", held.len());
    assert!(held.len() >= jobs, "a job was never delivered");
    held
}

#[test]
fn a_group_has_one_job_at_a_time_in_order_when_proxies_shards_and_workers_are_killed() {
    let (groups, jobs, workers) = SMALL;
    let sizes = (size("GOFLOW_GROUPS", groups), size("GOFLOW_GROUP_JOBS", jobs), size("GOFLOW_GROUP_WORKERS", workers));
    let found = violations(&contest("1", sizes, size("GOFLOW_GROUP_KILLS", 4)));
    assert!(found.is_empty(), "{} violations: {:#?}", found.len(), &found[..found.len().min(10)]);
}

#[test]
fn the_check_sees_a_contest_with_a_larger_bound() {
    // Small: among many groups the next of one is seldom there while the one before runs.
    assert!(!violations(&contest("2", SMALL, 0)).is_empty(), "two of a group were let in and nobody noticed");
}

#[test]
fn the_check_sees_two_at_once_and_what_is_out_of_order() {
    let held = |group, number, from, to| Held { group, number, from, to };
    assert_eq!(violations(&[held(1, 0, 0, 5), held(2, 0, 1, 9), held(1, 0, 5, 6), held(1, 1, 7, 9)]).len(), 0);
    assert_eq!(violations(&[held(1, 0, 0, 5), held(1, 1, 4, 9)]).len(), 1);
    assert_eq!(violations(&[held(1, 0, 0, 50), held(1, 1, 60, 61), held(1, 0, 70, 71)]).len(), 1);
    assert_eq!(violations(&[held(1, 0, 0, 50), held(1, 1, 10, 20), held(1, 2, 30, 40)]).len(), 2);
}

#[test]
fn all_jobs_of_a_group_lie_on_one_shard_and_batches_may_have_one() {
    let goflow = Goflow::start(&["--shard", "a=memory:", "--shard", "b=memory:", "--strategy", "round-robin"]);
    let mut wire = goflow.wire();
    for group in 0..8 {
        let mut shards: Vec<String> = Vec::new();
        for _ in 0..4 {
            let id = wire.say(&format!("GOFLOW.ENQUEUE main x GROUP g{group}")).text();
            let ids = wire.say(&format!("GOFLOW.ENQUEUEMANY main 2 y z GROUP g{group} CONCURRENCY 3"));
            shards.extend([id].into_iter().chain(ids.items().iter().map(Value::text)));
        }
        shards.iter_mut().for_each(|id| *id = id.rsplit_once('~').unwrap().1.to_owned());
        shards.dedup();
        assert_eq!(shards.len(), 1, "group {group} lies on several shards");
    }
    assert_eq!(wire.say("GOFLOW.LEN main").integer(), 96);
}
