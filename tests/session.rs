//! What one client may rely on while it waits, hangs up, or is drained.
//!
//! Every case runs against a process with the embedded shard and against one with two Redis shards.

use std::time::{Duration, Instant};

use crate::eventually;
use crate::support::fleet::Fleet;
use crate::support::goflow::Goflow;
use crate::support::wire::{Value, Wire, encode};

/// Runs a case on both kinds of shard.
fn on_each(case: impl Fn(&Goflow)) {
    case(&Goflow::start(&[]));
    case(&Fleet::start(2, 1, &[]).proxies[0]);
}

fn wait_until_blocked(wire: &mut Wire, count: usize) {
    let mark = format!("blocked_clients:{count}\r\n");
    eventually!(format!("{count} clients are blocked"), wire.say("INFO clients").text().contains(&mark).then_some(()));
}

fn payload(job: &Value) -> String {
    job.field("payload").text()
}

#[test]
fn a_client_that_hangs_up_while_it_waits_takes_no_job() {
    on_each(|goflow| {
        let mut other = goflow.wire();
        for round in 0..5 {
            let mut gone = goflow.wire();
            gone.send(&["GOFLOW.DEQUEUE", "main", "BLOCK", "0"]);
            wait_until_blocked(&mut other, 1);
            drop(gone);
            // No time for the process to notice: the job may well be leased for who is gone, and then it goes back.
            if round % 2 == 0 {
                wait_until_blocked(&mut other, 0);
            }
            other.say("GOFLOW.ENQUEUE main job");
            let job = other.say("GOFLOW.DEQUEUE main BLOCK 0");
            assert_eq!(job.field("attempt"), &Value::Integer(1), "round {round}");
            assert_eq!(other.call(&["GOFLOW.ACK", "main", &job.field("receipt").text()]), Value::Integer(1));
        }
        assert_eq!(other.say("GOFLOW.STATS main").field("lapsed"), &Value::Integer(0));
    });
}

#[test]
fn a_wait_ends_at_its_time_and_not_before() {
    on_each(|goflow| {
        let mut wire = goflow.wire();
        for (line, null) in [("", Value::Null), (" COUNT 3", Value::Null)] {
            let began = Instant::now();
            assert_eq!(wire.say(&format!("GOFLOW.DEQUEUE a b BLOCK 120{line}")), null);
            assert!(began.elapsed() >= Duration::from_millis(120));
        }
        wire.say("HELLO 3");
        assert_eq!(wire.say("GOFLOW.DEQUEUE a BLOCK 1"), Value::Null);
        // Without BLOCK nothing waits, and a job that comes later is not taken.
        assert_eq!(wire.say("GOFLOW.DEQUEUE a"), Value::Null);
        wire.say("GOFLOW.ENQUEUE a late");
        assert_eq!(wire.say("GOFLOW.LEN a"), Value::Integer(1));
    });
}

#[test]
fn queues_are_tried_in_the_order_given() {
    on_each(|goflow| {
        let (mut wire, mut other) = (goflow.wire(), goflow.wire());
        for line in ["GOFLOW.ENQUEUE c 1", "GOFLOW.ENQUEUE b 2", "GOFLOW.ENQUEUE a 3"] {
            wire.say(line);
        }
        for (queue, number) in [("a", "3"), ("b", "2"), ("c", "1")] {
            let job = wire.say("GOFLOW.DEQUEUE a b c BLOCK 1000");
            assert_eq!((job.field("queue").text(), payload(&job)), (queue.into(), number.into()));
        }
        // Who waits for several is woken by any of them.
        for queue in ["c", "a", "b"] {
            wire.send(&["GOFLOW.DEQUEUE", "a", "b", "c", "BLOCK", "0"]);
            wait_until_blocked(&mut other, 1);
            other.call(&["GOFLOW.ENQUEUE", queue, "woken"]);
            assert_eq!(wire.read().field("queue").text(), queue);
        }
    });
}

#[test]
fn waiters_of_one_proxy_are_served_oldest_first() {
    let goflow = Goflow::start(&[]);
    let mut other = goflow.wire();
    let mut waiters: Vec<Wire> = Vec::new();
    for number in 1..=12 {
        let mut wire = goflow.wire();
        wire.send(&["GOFLOW.DEQUEUE", "main", "BLOCK", "0"]);
        wait_until_blocked(&mut other, number);
        waiters.push(wire);
    }
    other.say("GOFLOW.ENQUEUEMANY main 4 0 1 2 3");
    for number in 4..12 {
        other.call(&["GOFLOW.ENQUEUE", "main", &number.to_string()]);
    }
    for (number, wire) in waiters.iter_mut().enumerate() {
        assert_eq!(payload(&wire.read()), number.to_string());
    }
}

#[test]
fn what_falls_due_wakes_who_waits() {
    on_each(|goflow| {
        let (mut wire, mut other) = (goflow.wire(), goflow.wire());
        wire.send(&["GOFLOW.DEQUEUE", "main", "BLOCK", "0"]);
        wait_until_blocked(&mut other, 1);
        other.say("GOFLOW.ENQUEUE main delayed DELAY 150");
        let first = wire.read();
        assert_eq!(payload(&first), "delayed");
        // A retry after its backoff.
        wire.send(&["GOFLOW.DEQUEUE", "main", "BLOCK", "0"]);
        wait_until_blocked(&mut other, 1);
        other.call(&["GOFLOW.FAIL", "main", &first.field("receipt").text(), "RETRYIN", "50"]);
        let second = wire.read();
        assert_eq!(second.field("attempt"), &Value::Integer(2));
        // A release, its attempt uncounted.
        wire.send(&["GOFLOW.DEQUEUE", "main", "BLOCK", "0", "LEASE", "100"]);
        wait_until_blocked(&mut other, 1);
        other.call(&["GOFLOW.RELEASE", "main", &second.field("receipt").text()]);
        assert_eq!(wire.read().field("attempt"), &Value::Integer(2));
        // A lease that lapses.
        assert_eq!(payload(&wire.say("GOFLOW.DEQUEUE main BLOCK 0")), "delayed");
    });
}

#[test]
fn a_worker_that_dies_with_a_job_gives_it_back_with_backoff_and_a_poisonous_one_is_quarantined() {
    on_each(|goflow| {
        let mut other = goflow.wire();
        other.say("GOFLOW.ENQUEUE main poison BACKOFF 1");
        other.say("GOFLOW.ENQUEUE main good");
        for attempt in 1..=3 {
            let mut victim = goflow.wire();
            let job = loop {
                let job = victim.say("GOFLOW.DEQUEUE main BLOCK 0 LEASE 1000 WORKER victim");
                if payload(&job) == "poison" {
                    break job;
                }
                // A job beside it is not held up, and comes back to the head when it is released.
                victim.call(&["GOFLOW.ACK", "main", &job.field("receipt").text()]);
            };
            assert_eq!(job.field("attempt"), &Value::Integer(attempt));
        }
        let dead = eventually!("it is dead", other.say("GOFLOW.DLQ LIST main").items().first().cloned());
        assert_eq!(payload(&dead), "poison");
        assert_eq!(dead.field("worker").text(), "victim");
        assert!(dead.field("error").text().contains("3"), "{dead:?}");
    });
}

#[test]
fn jobs_of_one_connection_and_queue_are_delivered_in_the_order_sent() {
    let goflow = Goflow::start(&[]);
    let (mut wire, mut worker) = (goflow.wire(), goflow.wire());
    for number in 0..500 {
        wire.send(&["GOFLOW.ENQUEUE", "main", &number.to_string()]);
        if number % 7 == 0 {
            wire.send(&["GOFLOW.LEN", "main"]);
        }
    }
    for number in 0..500 {
        assert_eq!(payload(&worker.say("GOFLOW.DEQUEUE main BLOCK 0")), number.to_string());
    }
}

#[test]
fn sigterm_answers_who_waits_finishes_what_runs_and_keeps_every_job() {
    let mut goflow = Goflow::start(&[]);
    let mut wire = goflow.wire();
    let mut waiters: Vec<Wire> = (0..5).map(|_| goflow.wire()).collect();
    waiters.iter_mut().for_each(|wire| wire.send(&["GOFLOW.DEQUEUE", "other", "BLOCK", "0"]));
    wait_until_blocked(&mut wire, 5);
    // In one piece: many small ones would wait in the client's kernel for acknowledgements of the first.
    let requests = (0..200).map(|number| encode(&["GOFLOW.ENQUEUE", "main", &number.to_string()]));
    wire.send_raw(requests.collect::<Vec<_>>().concat());
    // Nothing of it needs to have been read by then: what had come before the signal is answered.
    assert!(goflow.terminate().success());
    waiters.iter_mut().for_each(|wire| assert_eq!(wire.read(), Value::Null));
    waiters.iter_mut().for_each(|wire| assert!(wire.read_to_close().is_empty()));
    let answered: Vec<String> = (0..200).map(|_| wire.read().text()).collect();
    assert!(wire.read_to_close().is_empty());
    assert!(Wire::try_connect(goflow.address()).is_none(), "nobody listens any more");
    goflow.restart();
    let mut wire = goflow.wire();
    for id in answered {
        assert_eq!(wire.call(&["GOFLOW.JOB", "main", &id]).field("state").text(), "ready");
    }
}
