//! Several proxies over the same shards behave as one, and the strategies spread jobs as they say.
//!
//! `GOFLOW_PLACEMENT_JOBS` sets how many jobs the strategies place, and the bounds follow from it: chance alone may put
//! `hash` a little off even.

use std::collections::{HashMap, HashSet};

use crate::eventually;
use crate::support::fleet::{Fleet, per_shard};
use crate::support::size;
use crate::support::wire::{Value, Wire};

fn payload(job: &Value) -> String {
    job.field("payload").text()
}

fn wait_until_blocked(wire: &mut Wire, count: usize) {
    let mark = format!("blocked_clients:{count}\r\n");
    eventually!(format!("{count} clients are blocked"), wire.say("INFO clients").text().contains(&mark).then_some(()));
}

/// Adds so many jobs in batches.
fn enqueue(wire: &mut Wire, queue: &str, count: usize, shard: Option<&str>) {
    let mut left = count;
    while left > 0 {
        let batch = left.min(500);
        let mut words = vec!["GOFLOW.ENQUEUEMANY".to_owned(), queue.into(), batch.to_string()];
        words.extend((0..batch).map(|number| number.to_string()));
        words.extend(shard.iter().flat_map(|shard| ["SHARD".to_owned(), (*shard).to_owned()]));
        assert_eq!(wire.call(&words).items().len(), batch);
        left -= batch;
    }
}

#[test]
fn jobs_that_come_in_through_one_proxy_wake_the_workers_of_another_once_each() {
    let fleet = Fleet::start(3, 2, &[]);
    let (mut producer, mut admin) = (fleet.proxies[0].wire(), fleet.proxies[1].wire());
    let mut workers: Vec<Wire> = (0..20).map(|_| fleet.proxies[1].wire()).collect();
    for round in 0..5 {
        workers.iter_mut().for_each(|wire| wire.send(&["GOFLOW.DEQUEUE", "main", "BLOCK", "0"]));
        wait_until_blocked(&mut admin, 20);
        for number in 0..20 {
            producer.call(&["GOFLOW.ENQUEUE", "main", &format!("{round}-{number}")]);
        }
        let mut seen = HashSet::new();
        for wire in &mut workers {
            let job = wire.read();
            assert!(seen.insert(payload(&job)), "{job:?} came twice");
            // Any proxy takes a receipt.
            assert_eq!(producer.call(&["GOFLOW.ACK", "main", &job.field("receipt").text()]), Value::Integer(1));
        }
    }
}

#[test]
fn a_queue_that_is_paused_on_one_proxy_is_paused_on_all() {
    let fleet = Fleet::start(2, 2, &[]);
    let (mut here, mut there) = (fleet.proxies[0].wire(), fleet.proxies[1].wire());
    assert_eq!(here.say("GOFLOW.PAUSE main"), Value::Simple("OK".into()));
    for number in 0..8 {
        there.call(&["GOFLOW.ENQUEUE", "main", &number.to_string()]);
    }
    assert_eq!(there.say("GOFLOW.DEQUEUE main"), Value::Null);
    assert_eq!(there.say("GOFLOW.DEQUEUE main BLOCK 300 COUNT 8"), Value::Null);
    there.send(&["GOFLOW.DEQUEUE", "main", "BLOCK", "0"]);
    wait_until_blocked(&mut fleet.proxies[1].wire(), 1);
    assert_eq!(here.say("GOFLOW.RESUME main"), Value::Simple("OK".into()));
    assert!(matches!(there.read().field("payload"), Value::Bulk(_)));
    let mut rest = 0;
    // What a slow shard gave to the one that another had served comes back.
    eventually!("the others are delivered", {
        rest += here.say("GOFLOW.DEQUEUE main COUNT 20").items().len();
        (rest == 7).then_some(())
    });
}

#[test]
fn a_worker_of_some_shards_takes_from_those_alone() {
    let fleet = Fleet::start(3, 2, &[]);
    let (mut wire, mut other) = (fleet.proxies[0].wire(), fleet.proxies[1].wire());
    for (shard, count) in [("s0", 2), ("s1", 3), ("s2", 4)] {
        enqueue(&mut other, "main", count, Some(shard));
    }
    assert_eq!(per_shard(&wire.say("GOFLOW.LEN main PERSHARD")), [2, 3, 4]);
    assert_eq!(wire.say("GOFLOW.LEN main"), Value::Integer(9));
    for _ in 0..3 {
        assert_eq!(wire.say("GOFLOW.DEQUEUE main SHARDS 1 s1").field("shard").text(), "s1");
    }
    assert_eq!(wire.say("GOFLOW.DEQUEUE main SHARDS 1 s1"), Value::Null);
    let rest = wire.say("GOFLOW.DEQUEUE main COUNT 100 SHARDS 2 s0 s1");
    assert_eq!(rest.items().len(), 2);
    // Who waits for one shard is not woken by another.
    wire.send(&["GOFLOW.DEQUEUE", "main", "BLOCK", "0", "SHARDS", "2", "s0", "s1"]);
    wait_until_blocked(&mut fleet.proxies[0].wire(), 1);
    enqueue(&mut other, "main", 1, Some("s2"));
    enqueue(&mut other, "main", 1, Some("s0"));
    assert_eq!(wire.read().field("shard").text(), "s0");
    assert_eq!(per_shard(&wire.say("GOFLOW.LEN main PERSHARD")), [0, 0, 5]);
    assert!(wire.say("GOFLOW.DEQUEUE main SHARDS 1 s9").is_error("ERR"));
}

#[test]
fn a_job_goes_to_the_shard_that_its_enqueue_names_and_its_id_names_it_too() {
    let fleet = Fleet::start(3, 2, &[]);
    let (mut here, mut there) = (fleet.proxies[0].wire(), fleet.proxies[1].wire());
    for shard in ["s0", "s1", "s2"] {
        let id = here.call(&["GOFLOW.ENQUEUE", "main", "x", "SHARD", shard]).text();
        assert!(id.ends_with(shard), "{id}");
        assert_eq!(there.call(&["GOFLOW.JOB", "main", &id]).field("state").text(), "ready");
        assert_eq!(there.call(&["GOFLOW.CANCEL", "main", &id]), Value::Integer(1));
    }
    assert!(here.say("GOFLOW.ENQUEUE main x SHARD s9").is_error("ERR"));
}

#[test]
fn a_chosen_id_or_unique_key_is_one_job_whichever_proxy_is_asked() {
    for strategy in ["hash", "round-robin", "least-loaded"] {
        let fleet = Fleet::start(3, 2, &["--strategy", strategy]);
        let (mut here, mut there) = (fleet.proxies[0].wire(), fleet.proxies[1].wire());
        for number in 0..30 {
            let id = format!("job-{number}");
            let answers =
                [&mut here, &mut there].map(|wire| wire.call(&["GOFLOW.ENQUEUE", "main", "x", "ID", &id]).text());
            assert_eq!(answers, [id.clone(), id.clone()]);
            let unique = ["GOFLOW.ENQUEUE", "main", "y", "UNIQUE", &id, "60000"];
            assert_eq!(here.call(&unique), there.call(&unique));
            assert!(there.call(&["GOFLOW.ENQUEUE", "main", "x", "ID", &id, "NX"]).is_error("DUPLICATE"));
        }
        assert_eq!(here.say("GOFLOW.LEN main"), Value::Integer(60), "{strategy}");
    }
}

#[test]
fn a_draining_shard_takes_no_new_jobs_and_keeps_delivering() {
    for strategy in ["hash", "round-robin", "least-loaded"] {
        let fleet = Fleet::start(3, 1, &["--strategy", strategy]);
        let mut wire = fleet.proxies[0].wire();
        enqueue(&mut wire, "main", 5, Some("s1"));
        assert_eq!(wire.say("GOFLOW.SHARD DRAIN s1"), Value::Simple("OK".into()));
        assert_eq!(fleet.state(0, "s1"), "draining");
        enqueue(&mut wire, "main", 100, None);
        for _ in 0..20 {
            wire.say("GOFLOW.ENQUEUE main single");
        }
        assert_eq!(per_shard(&wire.say("GOFLOW.LEN main PERSHARD"))[1], 5, "{strategy}");
        assert_eq!(wire.say("GOFLOW.DEQUEUE main COUNT 100 SHARDS 1 s1").items().len(), 5);
        assert_eq!(wire.say("GOFLOW.SHARD UNDRAIN s1"), Value::Simple("OK".into()));
        enqueue(&mut wire, "main", 100, None);
        assert!(per_shard(&wire.say("GOFLOW.LEN main PERSHARD"))[1] > 0, "{strategy}");
    }
}

/// How far the fullest or emptiest of these is from their mean, as a part of it.
fn unevenness(counts: &[i64]) -> f64 {
    let mean = counts.iter().sum::<i64>() as f64 / counts.len() as f64;
    counts.iter().map(|count| (*count as f64 - mean).abs() / mean).fold(0.0, f64::max)
}

#[test]
fn hash_and_round_robin_spread_jobs_evenly() {
    let jobs = size("GOFLOW_PLACEMENT_JOBS", 8_000);
    for (strategy, bound) in [("round-robin", 0.03), ("hash", 0.03 + 4.0 * (3.0 / jobs as f64).sqrt())] {
        let fleet = Fleet::start(4, 2, &["--strategy", strategy]);
        let mut wires = [fleet.proxies[0].wire(), fleet.proxies[1].wire()];
        wires.iter_mut().for_each(|wire| enqueue(wire, "main", jobs / 2, None));
        let counts = per_shard(&wires[0].say("GOFLOW.LEN main PERSHARD"));
        println!("{strategy}: {counts:?}, {:.2} % off even", 100.0 * unevenness(&counts));
        assert!(unevenness(&counts) <= bound, "{strategy}: {counts:?}");
    }
}

#[test]
fn least_loaded_levels_a_shard_that_starts_ahead() {
    let jobs = size("GOFLOW_PLACEMENT_JOBS", 8_000);
    let fleet = Fleet::start(4, 2, &["--strategy", "least-loaded"]);
    let mut wires = [fleet.proxies[0].wire(), fleet.proxies[1].wire()];
    enqueue(&mut wires[0], "main", jobs / 10, Some("s0"));
    for _ in 0..10 {
        wires.iter_mut().for_each(|wire| enqueue(wire, "main", jobs / 20, None));
    }
    let counts = per_shard(&wires[0].say("GOFLOW.LEN main PERSHARD"));
    println!("least-loaded: {counts:?}, {:.2} % off even", 100.0 * unevenness(&counts));
    assert!(unevenness(&counts) <= 0.1, "the shards are not level: {counts:?}");
}

/// Where each job of a queue lies, by its id.
fn places(wire: &mut Wire, queue: &str) -> HashMap<String, String> {
    let mut places = HashMap::new();
    loop {
        let jobs = wire.call(&["GOFLOW.DEQUEUE", queue, "COUNT", "500", "LEASE", "600000"]);
        if jobs == Value::Null {
            return places;
        }
        places.extend(jobs.items().iter().map(|job| (job.field("id").text(), job.field("shard").text())));
    }
}

#[test]
fn a_fifth_shard_moves_a_fifth_of_the_ids_and_only_to_itself() {
    let ids = size("GOFLOW_PLACEMENT_IDS", 4_000);
    let mut fleet = Fleet::start(4, 1, &[]);
    let place = |wire: &mut Wire, queue: &str| {
        for chunk in (0..ids).collect::<Vec<_>>().chunks(500) {
            chunk.iter().for_each(|id| wire.send(&["GOFLOW.ENQUEUE", queue, "x", "ID", &format!("id-{id}")]));
            chunk.iter().for_each(|_| assert!(matches!(wire.read(), Value::Bulk(_))));
        }
        places(wire, queue)
    };
    let before = place(&mut fleet.proxies[0].wire(), "before");
    fleet.grow();
    fleet.add_proxy(&[("GOFLOW_MAP_VERSION", "2")]);
    let after = place(&mut fleet.proxies[1].wire(), "after");
    let moved: Vec<&String> = before.iter().filter(|(id, shard)| after[*id] != **shard).map(|(id, _)| id).collect();
    assert!(moved.iter().all(|id| after[*id] == "s4"), "an id moved between two old shards");
    let part = moved.len() as f64 / ids as f64;
    println!("{} of {ids} ids moved, {:.2} %", moved.len(), 100.0 * part);
    assert!((0.18..=0.22).contains(&part), "{part}");
    // What lay there before is served by the new map too.
    assert_eq!(fleet.proxies[1].wire().say("GOFLOW.LEN before STATE leased"), Value::Integer(ids as i64));
}
