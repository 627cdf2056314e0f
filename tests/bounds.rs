//! At a bound the client is told which one it met, and whatever does not need more goes on.

use crate::eventually;
use crate::support::goflow::Goflow;
use crate::support::servers::{Flavour, Server};
use crate::support::wire::{Value, Wire};

#[test]
fn a_shard_that_is_out_of_memory_takes_no_jobs_and_is_drained_all_the_same() {
    let server = Server::start(Flavour::Redis7, &[]);
    let goflow = Goflow::start(&["--shard", &format!("s1={}", server.url())]);
    let mut wire = goflow.wire();
    for _ in 0..2 {
        wire.say("GOFLOW.ENQUEUE main hello");
    }
    let receipt = wire.say("GOFLOW.DEQUEUE main").field("receipt").text();
    server.wire().say("CONFIG SET maxmemory 1");
    let refused = wire.say("GOFLOW.ENQUEUE main hello");
    assert!(refused.is_error("OVERLOADED"), "{refused:?}");
    // In one batch with an enqueue that is refused, too.
    wire.send(&["GOFLOW.ENQUEUE", "main", "hello"]);
    wire.send(&["GOFLOW.ACK", "main", &receipt]);
    assert!(wire.read().is_error("OVERLOADED"));
    assert_eq!(wire.read(), Value::Integer(1));
    let receipt = wire.say("GOFLOW.DEQUEUE main").field("receipt").text();
    assert_eq!(wire.say(&format!("GOFLOW.ACK main {receipt}")), Value::Integer(1));
    server.wire().say("CONFIG SET maxmemory 0");
    assert!(matches!(wire.say("GOFLOW.ENQUEUE main hello"), Value::Bulk(_)));
}

#[test]
fn one_client_too_many_is_told_so() {
    let goflow = Goflow::start_with(&["--shard", "s1=memory:"], &[("GOFLOW_LIMITS_CONNECTIONS_MAX", "1")]);
    let mut first = goflow.wire();
    assert_eq!(first.say("PING"), Value::Simple("PONG".into()));
    let told = String::from_utf8(goflow.wire().read_to_close()).unwrap();
    assert_eq!(told, "-ERR max number of clients reached\r\n");
    let (status, _, said) = Goflow::run(&["healthcheck", "--listen", goflow.address()]);
    assert!(status.success(), "one that is full is alive: {said}");
    assert_eq!(first.say("PING"), Value::Simple("PONG".into()));
}

/// A proxy with this bound on replies, over a Redis that holds values of these sizes under `v0`, `v1` ...
fn with_values(output_bytes_max: usize, sizes: &[usize]) -> (Server, Goflow) {
    let server = Server::start(Flavour::Redis7, &[]);
    for (number, size) in sizes.iter().enumerate() {
        server.wire().call(&["SET", &format!("v{number}"), &"x".repeat(*size)]);
    }
    let bound = [("GOFLOW_LIMITS_OUTPUT_BYTES_MAX", output_bytes_max.to_string())];
    let bound: Vec<(&str, &str)> = bound.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let mut goflow = Goflow::start_with(&["--shard", &format!("s1={}", server.url())], &bound);
    goflow.expect_log("WARN");
    (server, goflow)
}

/// How much memory a process has, in bytes.
fn resident(id: u32) -> usize {
    let pages = std::fs::read_to_string(format!("/proc/{id}/statm")).unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn a_reply_may_be_as_large_as_the_bound_and_not_a_byte_larger() {
    const MAX: usize = 100_000;
    // `$99990`, the value, and twice two bytes for the ends of the lines.
    let fits = MAX - 6 - 4;
    let (_server, goflow) = with_values(MAX, &[fits, fits + 1, 40 * MAX]);
    let mut wire = goflow.wire();
    for _ in 0..3 {
        assert_eq!(wire.say("GET v0").text().len(), fits);
        for large in ["v1", "v2"] {
            let refused = wire.call(&["GET", large]);
            assert!(refused.is_error("TOOBIG") && refused.text().contains("limits.output_bytes_max"), "{refused:?}");
        }
        // A transaction's replies count together, and a queued command's reply is none of the next client's.
        wire.say("MULTI");
        wire.say("GET v0");
        wire.say("GET v0");
        assert!(wire.say("EXEC").is_error("TOOBIG"));
        assert_eq!(goflow.wire().say("STRLEN v0").integer(), fits as i64);
    }
    // Of jobs so many are delivered as fit; the others are back at their places.
    for _ in 0..3 {
        wire.call(&["GOFLOW.ENQUEUE", "main", &"x".repeat(40_000)]);
    }
    assert_eq!(wire.say("GOFLOW.DEQUEUE main COUNT 3").items().len(), 2);
    let job = wire.say("GOFLOW.DEQUEUE main BLOCK 0");
    assert_eq!(job.field("attempt"), &Value::Integer(1));
    // One that is larger alone is refused, and goes back.
    wire.call(&["GOFLOW.ENQUEUE", "alone", &"x".repeat(MAX)]);
    let refused = wire.say("GOFLOW.DEQUEUE alone COUNT 3");
    assert!(refused.is_error("TOOBIG"), "{}", refused.text());
    eventually!("it is back", (wire.say("GOFLOW.LEN alone") == Value::Integer(1)).then_some(()));
}

#[test]
fn large_jobs_hold_nobody_up_and_reach_a_worker_that_asks_for_many() {
    const JOBS: usize = 12;
    const BYTES: usize = 15 << 20;
    let server = Server::start(Flavour::Redis7, &[]);
    for shard in [format!("s1={}", server.url()), "s1=embedded:data".into()] {
        let goflow = Goflow::start(&["--shard", &shard]);
        let mut wire = goflow.wire();
        let payload = "x".repeat(BYTES);
        (0..JOBS).for_each(|_| drop(wire.call(&["GOFLOW.ENQUEUE", "main", &payload]).text()));
        let refused = wire.say("GOFLOW.PEEK main COUNT 12");
        assert!(refused.is_error("TOOBIG") && refused.text().contains("ask for fewer with COUNT"), "{refused:?}");
        assert_eq!(wire.say("GOFLOW.PEEK main COUNT 2").items().len(), 2);
        // One worker that asks for all of them, and several that ask for one each at the same time.
        let mut others: Vec<Wire> = (0..4).map(|_| goflow.wire()).collect();
        others.iter_mut().for_each(|other| other.send(&["GOFLOW.DEQUEUE", "main", "BLOCK", "0"]));
        let mut taken = 0;
        while taken < JOBS - others.len() {
            let reply = wire.say("GOFLOW.DEQUEUE main COUNT 100 BLOCK 0");
            reply.items().iter().for_each(|job| assert_eq!(job.field("payload").text().len(), BYTES));
            taken += reply.items().len();
        }
        others.iter_mut().for_each(|other| assert_eq!(other.read().field("attempt"), &Value::Integer(1)));
        let stats = wire.say("GOFLOW.STATS main");
        assert_eq!((stats.field("leased").integer(), stats.field("lapsed").integer()), (JOBS as i64, 0));
        assert_eq!(wire.say("GOFLOW.LEN main"), Value::Integer(0));
    }
}

#[test]
fn a_client_that_reads_gets_every_large_reply_of_a_long_pipeline() {
    const MAX: usize = 1 << 20;
    let (_server, goflow) = with_values(MAX, &[64 << 10, 10]);
    let mut wire = goflow.wire();
    // The replies are two hundred times what may wait, and small ones before let many be started at once.
    let requests: Vec<&str> = (0..3_200).map(|number| if number % 100 < 90 { "v1" } else { "v0" }).collect();
    let all: Vec<u8> = requests.iter().flat_map(|key| crate::support::wire::encode(&["GET", key])).collect();
    wire.send_raw(&all);
    for key in requests {
        let expected = if key == "v0" { 64 << 10 } else { 10 };
        assert_eq!(wire.read().text().len(), expected);
    }
}

#[test]
fn a_client_that_does_not_read_costs_its_bound_and_is_dropped() {
    const MAX: usize = 4 << 20;
    let (_server, goflow) = with_values(MAX, &[1 << 20, 10]);
    let mut quick = goflow.wire();
    assert_eq!(quick.say("PING"), Value::Simple("PONG".into()));
    let before = resident(goflow.id());
    // Small replies first, so that many large ones are asked for before the first of them has come.
    let mut slow = goflow.wire();
    for _ in 0..300 {
        slow.call(&["GET", "v1"]);
    }
    let all: Vec<u8> = (0..300).flat_map(|_| crate::support::wire::encode(&["GET", "v0"])).collect();
    slow.send_raw(&all);
    goflow.wait_for_log("does not read its replies is dropped");
    let more = resident(goflow.id()).saturating_sub(before);
    assert!(more < 100 << 20, "300 MiB of replies to a client that reads none cost {} MiB", more >> 20);
    assert_eq!(quick.say("GET v1").text().len(), 10);
    // Nothing is sent but whole replies that came before the end.
    assert!(slow.read_to_close().len() < 300 << 20);
}
