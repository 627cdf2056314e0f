//! Limits over shards and proxies: never more than they say, and no less where there is enough work.
//!
//! Workers on three proxies take jobs from four Redis shards. When a job started is read from its lease by the shard's clock;
//! when it was surely held, from the worker's. `GOFLOW_LIMIT_S` sets how long the rate is watched, and with
//! `GOFLOW_LIMIT_BOUNDS=1` the jobs started must be within 2 % of it, which a machine with other work cannot promise.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::eventually;
use crate::support::fleet::{Fleet, per_shard};
use crate::support::goflow::Goflow;
use crate::support::wire::{Value, Wire};
use crate::support::{patience, size};

/// Short: what a proxy takes with it when it is killed must come back soon.
const LEASE_MS: u64 = 3_000;

/// One delivery: when the shard started it, and from when to when the worker surely held it, in milliseconds.
#[derive(Clone, Copy, Debug)]
struct Run {
    started: u64,
    from: u64,
    to: u64,
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

struct Crowd {
    over: Arc<AtomicBool>,
    runs: Arc<Mutex<Vec<Run>>>,
    workers: Vec<std::thread::JoinHandle<()>>,
}

impl Crowd {
    /// So many workers, each with a proxy of its own as long as that lives.
    fn start(fleet: &Fleet, workers: usize) -> Crowd {
        let (over, runs) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let addresses: Vec<String> = fleet.proxies.iter().map(|proxy| proxy.address().to_owned()).collect();
        let start = |number: usize| {
            let (over, runs, addresses) = (over.clone(), runs.clone(), addresses.clone());
            std::thread::spawn(move || work(&over, &runs, &addresses, number))
        };
        let workers = (0..workers).map(start).collect();
        Crowd { over, runs, workers }
    }

    fn count(&self) -> usize {
        self.runs.lock().unwrap().len()
    }

    fn end(self) -> Vec<Run> {
        self.over.store(true, Ordering::Relaxed);
        self.workers.into_iter().for_each(|worker| worker.join().unwrap());
        let mut runs = self.runs.lock().unwrap().clone();
        runs.sort_by_key(|run| run.started);
        runs
    }
}

fn work(over: &AtomicBool, runs: &Mutex<Vec<Run>>, addresses: &[String], number: usize) {
    let (mut wire, mut turn) = (None, number);
    let lease = LEASE_MS.to_string();
    while !over.load(Ordering::Relaxed) {
        let Some(link) = wire.as_mut() else {
            turn += 1;
            wire = Wire::try_connect(&addresses[turn % addresses.len()]);
            continue;
        };
        let request = ["GOFLOW.DEQUEUE", "main", "BLOCK", "300", "LEASE", &lease];
        let Ok(reply) = link.try_call(&request, patience()) else {
            wire = None;
            continue;
        };
        if !matches!(reply, Value::Array(_)) {
            continue;
        }
        let from = now_ms();
        let started = reply.field("lease_until").integer() as u64 - LEASE_MS;
        std::thread::yield_now();
        // After the end of its lease nobody holds a job, whatever the worker thinks.
        let to = now_ms().min(started + LEASE_MS);
        runs.lock().unwrap().push(Run { started, from, to });
        if link.try_call(&["GOFLOW.ACK", "main", &reply.field("receipt").text()], patience()).is_err() {
            wire = None;
        }
    }
}

fn fill(wire: &mut Wire, jobs: usize, options: &[&str]) {
    for from in (0..jobs).step_by(500) {
        let count = (jobs - from).min(500);
        let mut request = vec!["GOFLOW.ENQUEUEMANY".to_owned(), "main".into(), count.to_string()];
        request.extend((0..count).map(|_| "x".to_owned()));
        request.extend(options.iter().map(|option| (*option).to_owned()));
        assert!(matches!(wire.call(&request), Value::Array(_)));
    }
}

/// Most starts within any window of so long.
fn most_in_a_window(runs: &[Run], per_ms: u64) -> usize {
    let within = |at: usize| runs[at..].iter().take_while(|run| run.started < runs[at].started + per_ms).count();
    (0..runs.len()).map(within).max().unwrap_or(0)
}

fn most_at_once(runs: &[Run]) -> usize {
    let mut ends: Vec<(u64, i64)> = runs.iter().flat_map(|run| [(run.from, 1), (run.to, -1)]).collect();
    // Who ends and who begins in one millisecond were not there together.
    ends.sort_unstable();
    let mut now = 0;
    let counts = ends.into_iter().map(|(_, change)| {
        now += change;
        now
    });
    counts.max().unwrap_or(0) as usize
}

#[test]
fn the_check_sees_one_too_many() {
    let run = |started, to| Run { started, from: started, to };
    assert_eq!(most_in_a_window(&[run(0, 0), run(50, 0), run(100, 0)], 100), 2);
    assert_eq!(most_in_a_window(&[run(0, 0), run(50, 0), run(99, 0)], 100), 3);
    assert_eq!(most_at_once(&[run(0, 5), run(5, 9), run(4, 6)]), 2);
}

#[test]
fn no_window_has_more_starts_than_the_rate_over_all_shards_and_proxies_and_little_less() {
    let (seconds, rate) = (size("GOFLOW_LIMIT_S", 5), 300);
    let mut fleet = Fleet::start(4, 3, &["--strategy", "round-robin"]);
    fleet.expect_failures();
    let mut wire = fleet.proxies[0].wire();
    assert_eq!(wire.say(&format!("GOFLOW.LIMIT main RATE {rate} PER 1000")).text(), "OK");
    fill(&mut wire, rate * (seconds + 10), &[]);
    let crowd = Crowd::start(&fleet, 24);
    eventually!("half of it is done", (crowd.count() > rate * seconds / 2).then_some(()));
    let is_exact = size("GOFLOW_LIMIT_BOUNDS", 0) == 1;
    if !is_exact {
        fleet.proxies[1].restart();
    }
    eventually!("all of it is done", (crowd.count() > rate * seconds).then_some(()));
    let runs = crowd.end();
    let most = most_in_a_window(&runs, 1_000);
    // The first and the last window may be cut anywhere.
    let (begin, end) = (runs[0].started + 1_000, runs[runs.len() - 1].started - 1_000);
    let inside = runs.iter().filter(|run| (begin..end).contains(&run.started)).count();
    let expected = rate as f64 * (end - begin) as f64 / 1_000.0;
    println!(
        "{inside} started in {} ms, {:.1} % of the rate; most in a window {most} of {rate}",
        end - begin,
        100.0 * inside as f64 / expected
    );
    assert!(most <= rate, "{most} in a window of {rate}");
    assert!(!is_exact || (inside as f64) > 0.98 * expected, "too few were started");
}

#[test]
fn no_more_are_leased_than_the_limit_over_all_shards_and_no_shard_starves() {
    for limit in [2, 7] {
        let jobs = size("GOFLOW_LIMIT_JOBS", 400);
        let mut fleet = Fleet::start(4, 3, &["--strategy", "round-robin"]);
        fleet.expect_failures();
        let mut wire = fleet.proxies[0].wire();
        assert_eq!(wire.say(&format!("GOFLOW.LIMIT main CONCURRENCY {limit}")).text(), "OK");
        fill(&mut wire, jobs, &[]);
        let began = per_shard(&wire.say("GOFLOW.LEN main PERSHARD"));
        assert!(began.iter().all(|count| *count > 0), "{began:?}");
        let crowd = Crowd::start(&fleet, 16);
        // With fewer than there are shards the shares go round.
        eventually!("every shard has its turn", {
            let now = per_shard(&wire.say("GOFLOW.LEN main PERSHARD"));
            now.iter().zip(&began).all(|(now, began)| now < began || *now == 0).then_some(())
        });
        if limit == 7 {
            fleet.proxies[2].restart();
        }
        eventually!(
            "all is done",
            (wire.say("GOFLOW.LEN main STATE completed") == Value::Integer(jobs as i64)).then_some(())
        );
        let runs = crowd.end();
        let most = most_at_once(&runs);
        println!("at most {most} of {limit} at once, {} deliveries of {jobs} jobs", runs.len());
        assert!(most <= limit, "{most} were leased at once, the limit is {limit}");
    }
}

#[test]
fn the_whole_limit_goes_to_the_shard_that_has_the_work() {
    let fleet = Fleet::start_plain(4, 2, &[]);
    let mut wire = fleet.proxies[0].wire();
    assert_eq!(wire.say("GOFLOW.LIMIT main CONCURRENCY 8").text(), "OK");
    fill(&mut wire, 20, &["SHARD", "s2"]);
    let mut other = fleet.proxies[1].wire();
    let mut taken = 0;
    eventually!("all of it is leased there", {
        taken += match other.say("GOFLOW.DEQUEUE main COUNT 20") {
            Value::Array(jobs) => jobs.len(),
            _ => 0,
        };
        (taken == 8).then_some(())
    });
    let shown = wire.say("GOFLOW.LIMIT main");
    assert_eq!((shown.field("concurrency").integer(), shown.field("leased").integer()), (8, 8));
    assert_eq!(wire.say("GOFLOW.DEQUEUE main COUNT 20"), Value::Null);
    assert_eq!(wire.say("GOFLOW.LIMIT main CONCURRENCY 0").text(), "OK");
    assert_eq!(wire.say("GOFLOW.DEQUEUE main COUNT 20").items().len(), 12);
}

#[test]
fn a_queue_holds_as_many_as_its_maxlen_whoever_enqueues() {
    for strategy in ["hash", "round-robin"] {
        let fleet = Fleet::over(Fleet::start_plain(4, 0, &[]).shards, 3, &["--strategy", strategy], &[]);
        let mut wire = fleet.proxies[0].wire();
        assert_eq!(wire.say("GOFLOW.LIMIT main MAXLEN 100").text(), "OK");
        let clients: Vec<_> = (0..6)
            .map(|number| {
                let mut wire = fleet.proxies[number % 3].wire();
                std::thread::spawn(move || {
                    let (mut added, mut refused) = (0, 0);
                    while refused < 3 {
                        match wire.say("GOFLOW.ENQUEUE main x") {
                            Value::Bulk(_) => added += 1,
                            reply => {
                                assert!(reply.is_error("QUEUEFULL"), "{reply:?}");
                                refused += 1;
                            }
                        }
                    }
                    added
                })
            })
            .collect();
        let added: i64 = clients.into_iter().map(|client| client.join().unwrap()).sum();
        let held = wire.say("GOFLOW.LEN main").integer();
        assert_eq!(held, added);
        assert!(held <= 100, "{held} wait, the limit is 100");
        // What others look for at the same moment may be told late; one client alone finds the last place.
        eventually!("the queue is full", {
            wire.say("GOFLOW.ENQUEUE main x");
            (wire.say("GOFLOW.LEN main").integer() == 100).then_some(())
        });
        assert!(wire.say("GOFLOW.ENQUEUE main x").is_error("QUEUEFULL"));
        assert!(wire.say("GOFLOW.ENQUEUEMANY main 2 x y").is_error("QUEUEFULL"));
        let receipt = wire.say("GOFLOW.DEQUEUE main").field("receipt").text();
        eventually!("one more finds its place", {
            matches!(wire.say("GOFLOW.ENQUEUE main x"), Value::Bulk(_)).then_some(())
        });
        assert_eq!(wire.call(&["GOFLOW.RELEASE", "main", &receipt]).text(), "ready");
        assert_eq!(wire.say("GOFLOW.LEN main").integer(), 101, "who comes back always finds a place");
    }
}

#[test]
fn a_waiting_client_is_woken_when_a_lease_ends_and_when_the_window_opens() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let (mut wire, mut waiter) = (goflow.wire(), goflow.wire());
    wire.say("GOFLOW.LIMIT main CONCURRENCY 1");
    fill(&mut wire, 4, &[]);
    let receipt = wire.say("GOFLOW.DEQUEUE main").field("receipt").text();
    waiter.send(&["GOFLOW.DEQUEUE", "main", "BLOCK", "600000"]);
    eventually!("it waits", wire.say("INFO clients").text().contains("blocked_clients:1").then_some(()));
    assert_eq!(wire.call(&["GOFLOW.ACK", "main", &receipt]), Value::Integer(1));
    waiter.read().field("receipt").text();
    wire.say("GOFLOW.LIMIT main CONCURRENCY 0 RATE 1 PER 400");
    wire.say("GOFLOW.DEQUEUE main").field("receipt").text();
    waiter.call(&["GOFLOW.DEQUEUE", "main", "BLOCK", "600000"]).field("receipt").text();
}
