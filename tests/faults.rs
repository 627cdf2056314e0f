//! A shard that is killed, hung, read-only, full, loading or somebody else's: the others go on, the error says which and
//! why, and the proxy needs no restart when it is over.

use std::time::Duration;

use crate::eventually;
use crate::support::fleet::{Fleet, per_shard};
use crate::support::goflow::Goflow;
use crate::support::servers::{Flavour, Sentinels, Server};
use crate::support::wire::{Value, Wire};

fn ok() -> Value {
    Value::Simple("OK".into())
}

/// Whether this is the refusal that names the shard.
fn is_down(reply: &Value, shard: &str) -> bool {
    matches!(reply, Value::Error(text) if text.starts_with(&format!("SHARDDOWN {shard} ")))
}

/// Two shards of which the first is about to fail, with a job on each, under a strategy that steps over what is down.
fn fleet(env: &[(&str, &str)]) -> (Fleet, Wire, String) {
    let mut fleet = Fleet::start_with(2, 1, &["--strategy", "round-robin"], env);
    fleet.expect_failures();
    let mut wire = fleet.proxies[0].wire();
    let id = wire.say("GOFLOW.ENQUEUE old first SHARD s0").text();
    wire.say("GOFLOW.ENQUEUE old second SHARD s1");
    (fleet, wire, id)
}

/// What must go to the failed shard is refused with a text that holds this; everything else goes on.
fn expect_failure(wire: &mut Wire, id: &str, why: &str) {
    eventually!(format!("the shard refuses because of {why}"), {
        let reply = wire.say("GOFLOW.ENQUEUE refused x SHARD s0");
        (is_down(&reply, "s0") && reply.text().contains(why)).then_some(())
    });
    for _ in 0..20 {
        let id = wire.say("GOFLOW.ENQUEUE work x").text();
        assert!(id.ends_with("s1"), "a new job went to {id}");
        let job = wire.say("GOFLOW.DEQUEUE work BLOCK 0");
        assert_eq!(job.field("id").text(), id);
        assert_eq!(wire.call(&["GOFLOW.ACK", "work", &job.field("receipt").text()]), Value::Integer(1));
    }
    // A worker that does not wait gets what is there, too.
    wire.say("GOFLOW.ENQUEUE work y");
    assert_eq!(wire.say("GOFLOW.DEQUEUE work").field("payload").text(), "y");
    // A write to the job on the failed shard is refused, one on the other shard is done.
    assert!(is_down(&wire.call(&["GOFLOW.CANCEL", "old", id]), "s0"));
    assert!(wire.say("GOFLOW.LEN old").is_error("SHARDDOWN") || wire.say("GOFLOW.LEN old") == Value::Integer(2));
    assert_eq!(wire.say("GOFLOW.DEQUEUE old SHARDS 1 s1").field("payload").text(), "second");
    assert_eq!(wire.say("PING"), Value::Simple("PONG".into()));
}

/// The shard is served again, with what it held, and wakes who waited all the while.
fn expect_recovery(fleet: &Fleet, wire: &mut Wire, waiter: &mut Wire) {
    let first = waiter.read();
    assert_eq!((first.field("payload").text(), first.field("attempt")), ("first".into(), &Value::Integer(1)));
    eventually!(
        "the shard takes jobs",
        matches!(wire.say("GOFLOW.ENQUEUE new x SHARD s0"), Value::Bulk(_)).then_some(())
    );
    eventually!("the shard is shown as up", (fleet.state(0, "s0") == "up").then_some(()));
    for _ in 0..10 {
        wire.say("GOFLOW.ENQUEUE spread x");
    }
    assert!(per_shard(&wire.say("GOFLOW.LEN spread PERSHARD")).iter().all(|count| *count > 0));
}

fn wait_on_s0(fleet: &Fleet) -> Wire {
    let mut waiter = fleet.proxies[0].wire();
    waiter.send(&["GOFLOW.DEQUEUE", "old", "BLOCK", "0", "SHARDS", "1", "s0"]);
    waiter
}

#[test]
fn a_killed_shard() {
    let (mut fleet, mut wire, id) = fleet(&[]);
    fleet.shards[0].kill();
    expect_failure(&mut wire, &id, "");
    assert_eq!((fleet.state(0, "s0"), fleet.state(0, "s1")), ("down".into(), "up".into()));
    let mut waiter = wait_on_s0(&fleet);
    fleet.shards[0].restart();
    expect_recovery(&fleet, &mut wire, &mut waiter);
}

#[test]
fn a_hung_shard() {
    let (fleet, mut wire, id) = fleet(&[("GOFLOW_TIMEOUTS_ANSWER_MS", "2000")]);
    fleet.shards[0].stop();
    let reply = wire.say("GOFLOW.ENQUEUE once x SHARD s0");
    assert!(is_down(&reply, "s0") && reply.text().contains("may have happened"), "{reply:?}");
    expect_failure(&mut wire, &id, "");
    let mut waiter = wait_on_s0(&fleet);
    fleet.shards[0].cont();
    expect_recovery(&fleet, &mut wire, &mut waiter);
}

#[test]
fn a_hung_shard_that_takes_its_time_delays_nobody_who_waits_elsewhere() {
    // No test has the patience for even one answer of the hung shard.
    let (fleet, mut wire, _) = fleet(&[("GOFLOW_TIMEOUTS_ANSWER_MS", "500000")]);
    let mut waiters: Vec<Wire> = (0..3).map(|_| fleet.proxies[0].wire()).collect();
    for waiter in &mut waiters {
        waiter.send(&["GOFLOW.DEQUEUE", "fresh", "BLOCK", "0"]);
    }
    let mark = "blocked_clients:3\r\n";
    eventually!("they are blocked", wire.say("INFO clients").text().contains(mark).then_some(()));
    fleet.shards[0].stop();
    (0..3).for_each(|_| drop(wire.say("GOFLOW.ENQUEUE fresh x SHARD s1")));
    waiters.iter_mut().for_each(|waiter| assert_eq!(waiter.read().field("shard").text(), "s1"));
    fleet.shards[0].cont();
}

#[test]
fn a_read_only_shard() {
    let (fleet, mut wire, id) = fleet(&[]);
    // A replica of a master that is not there: it keeps its data and refuses writes.
    assert_eq!(fleet.shards[0].wire().say("REPLICAOF 127.0.0.1 1"), ok());
    expect_failure(&mut wire, &id, "READONLY");
    assert_eq!(fleet.shards[0].wire().say("REPLICAOF NO ONE"), ok());
    expect_recovery(&fleet, &mut wire, &mut wait_on_s0(&fleet));
}

#[test]
fn a_shard_without_its_replicas() {
    let (fleet, mut wire, id) = fleet(&[]);
    assert_eq!(fleet.shards[0].wire().say("CONFIG SET min-replicas-to-write 1"), ok());
    expect_failure(&mut wire, &id, "NOREPLICAS");
    assert_eq!(fleet.shards[0].wire().say("CONFIG SET min-replicas-to-write 0"), ok());
    expect_recovery(&fleet, &mut wire, &mut wait_on_s0(&fleet));
}

#[test]
fn a_shard_that_is_out_of_memory() {
    let (fleet, mut wire, id) = fleet(&[]);
    let mut shard = fleet.shards[0].wire();
    assert_eq!(shard.say("CONFIG SET maxmemory-policy noeviction"), ok());
    assert_eq!(shard.say("CONFIG SET maxmemory 1"), ok());
    let keys = shard.say("DBSIZE");
    let refusal = wire.say("GOFLOW.ENQUEUE main x SHARD s0");
    assert!(refusal.is_error("OVERLOADED") && refusal.text().contains("shard s0"), "{refusal:?}");
    assert_eq!(shard.say("DBSIZE"), keys, "something was written half");
    // It is not down: what it holds is shown, and the other shard takes jobs.
    assert_eq!(fleet.state(0, "s0"), "up");
    assert_eq!(wire.call(&["GOFLOW.JOB", "old", &id]).field("state").text(), "ready");
    assert!(matches!(wire.say("GOFLOW.ENQUEUE main x SHARD s1"), Value::Bulk(_)));
    assert_eq!(shard.say("CONFIG SET maxmemory 0"), ok());
    expect_recovery(&fleet, &mut wire, &mut wait_on_s0(&fleet));
}

#[test]
fn a_shard_that_is_loading() {
    // Each of these keys takes some milliseconds to load, and the server answers meanwhile.
    let slow = ["--key-load-delay", "15000", "--loading-process-events-interval-bytes", "1024"];
    let shards = vec![Server::start(Flavour::Redis7, &slow), Server::start(Flavour::Redis7, &[])];
    for number in 0..1_000 {
        shards[0].wire().call(&["SET", &format!("filler:{number}"), &"x".repeat(200)]);
    }
    let mut fleet = Fleet::over(shards, 1, &["--strategy", "round-robin"], &[]);
    fleet.expect_failures();
    let mut wire = fleet.proxies[0].wire();
    let id = wire.say("GOFLOW.ENQUEUE old first SHARD s0").text();
    wire.say("GOFLOW.ENQUEUE old second SHARD s1");
    assert_eq!(fleet.shards[0].wire().say("SAVE"), ok());
    fleet.shards[0].start_again();
    let mut waiter = wait_on_s0(&fleet);
    expect_failure(&mut wire, &id, "LOADING");
    expect_recovery(&fleet, &mut wire, &mut waiter);
}

#[test]
fn every_shard_down_is_said_at_once_and_ends_with_the_first_that_is_back() {
    let (mut fleet, mut wire, _) = fleet(&[]);
    fleet.shards.iter_mut().for_each(Server::kill);
    eventually!("new jobs are refused", wire.say("GOFLOW.ENQUEUE main x").is_error("SHARDDOWN").then_some(()));
    assert!(wire.say("GOFLOW.DEQUEUE main").is_error("SHARDDOWN"));
    assert_eq!(wire.say("GOFLOW.DEQUEUE main BLOCK 50"), Value::Null);
    assert_eq!(wire.say("PING"), Value::Simple("PONG".into()));
    fleet.shards[1].restart();
    eventually!("one shard takes them", matches!(wire.say("GOFLOW.ENQUEUE main x"), Value::Bulk(_)).then_some(()));
    assert_eq!(wire.say("GOFLOW.DEQUEUE main BLOCK 0").field("payload").text(), "x");
}

/// Runs `goflow serve` over these shards; it must refuse to start, and this is why.
fn refused(shards: &[String], env: &[(&str, &str)], why: &str) {
    let mut args = vec!["serve", "--listen", "127.0.0.1:0", "--http", "off"];
    args.extend(shards.iter().flat_map(|shard| ["--shard", shard.as_str()]));
    let (status, _, complained) = Goflow::run_with(&args, env);
    assert_eq!(status.code(), Some(1), "{complained}");
    assert!(complained.contains(why), "{complained}");
}

#[test]
fn a_server_is_the_shard_of_one_deployment_under_one_name() {
    let fleet = Fleet::start(2, 1, &[]);
    let [one, two] = [fleet.shards[0].url(), fleet.shards[1].url()];
    let same = [format!("s0={one}"), format!("s1={two}")];
    refused(&same, &[("GOFLOW_DEPLOYMENT", "other")], "belongs to the deployment goflow, not to other");
    refused(
        &[format!("s1={one}"), format!("s0={two}")],
        &[("GOFLOW_MAP_VERSION", "2")],
        "already; one server cannot be two",
    );
    refused(&same[..1], &[], "raise the version");
    let fresh = Server::start(Flavour::Redis7, &[]);
    let again = fresh.url().replace("127.0.0.1", "localhost");
    refused(&[format!("a={}", fresh.url()), format!("b={again}")], &[], "one server cannot be two");
}

#[test]
fn a_newer_map_of_a_configuration_is_taken_by_all_proxies_and_an_older_one_by_none() {
    let mut fleet = Fleet::start(2, 1, &[]);
    fleet.grow();
    fleet.add_proxy(&[("GOFLOW_MAP_VERSION", "2")]);
    let old: Vec<String> =
        fleet.shards.iter().take(2).enumerate().map(|(n, shard)| format!("s{n}={}", shard.url())).collect();
    let args: Vec<&str> = old.iter().flat_map(|shard| ["--shard", shard]).collect();
    // One that starts with the older map goes by the newer one, and so does the one that ran with it.
    let late = Goflow::start(&args);
    for proxy in [&late, &fleet.proxies[0]] {
        let mut wire = proxy.wire();
        eventually!("it knows the third shard", {
            matches!(wire.say("GOFLOW.ENQUEUE main x SHARD s2"), Value::Bulk(_)).then_some(())
        });
    }
    let other = [old[0].clone(), fleet.shards[2].url()].join(",").replace(",redis", ",s2=redis");
    let other: Vec<String> = other.split(',').map(str::to_owned).collect();
    refused(&other, &[("GOFLOW_MAP_VERSION", "2")], "raise the version");
}

#[test]
fn a_proxy_starts_without_a_shard_that_is_down_and_takes_it_in_later() {
    let mut shards: Vec<Server> = (0..2).map(|_| Server::start(Flavour::Redis7, &[])).collect();
    shards[0].kill();
    let mut fleet = Fleet::over(shards, 1, &["--strategy", "round-robin"], &[]);
    fleet.expect_failures();
    let mut wire = fleet.proxies[0].wire();
    assert!(is_down(&wire.say("GOFLOW.ENQUEUE main x SHARD s0"), "s0"));
    assert!(wire.say("GOFLOW.ENQUEUE main x").text().ends_with("s1"));
    fleet.shards[0].restart();
    eventually!("it takes jobs", matches!(wire.say("GOFLOW.ENQUEUE main x SHARD s0"), Value::Bulk(_)).then_some(()));
    assert_eq!(wire.say("GOFLOW.DEQUEUE main SHARDS 1 s0").field("payload").text(), "x");
}

#[test]
fn an_answer_that_was_lost_is_safe_to_ask_for_again() {
    let (fleet, mut wire, _) = fleet(&[("GOFLOW_TIMEOUTS_ANSWER_MS", "2000")]);
    // An id whose home is the shard that hangs.
    let id = (0..).map(|n| format!("id-{n}")).find(|id| {
        wire.call(&["GOFLOW.ENQUEUE", "probe", "x", "ID", id]);
        wire.call(&["GOFLOW.DEQUEUE", "probe"]).field("shard").text() == "s0"
    });
    let words = ["GOFLOW.ENQUEUE", "main", "x", "ID", &id.unwrap()];
    fleet.shards[0].stop();
    assert!(is_down(&wire.call(&words), "s0"));
    fleet.shards[0].cont();
    eventually!("the shard is back", (wire.call(&words).text() == words[4]).then_some(()));
    assert_eq!(wire.say("GOFLOW.LEN main"), Value::Integer(1));
    // And a verdict: sent into a hang, and once more.
    let receipt = wire.say("GOFLOW.DEQUEUE main BLOCK 0").field("receipt").text();
    fleet.shards[0].stop();
    assert!(is_down(&wire.call(&["GOFLOW.ACK", "main", &receipt]), "s0"));
    fleet.shards[0].cont();
    let again = eventually!("the shard is back", {
        let reply = wire.call(&["GOFLOW.ACK", "main", &receipt]);
        matches!(reply, Value::Integer(_)).then_some(reply)
    });
    assert_eq!(again, Value::Integer(1));
    assert_eq!(wire.try_read(Duration::from_millis(1)), Err(crate::support::wire::NoReply::TimedOut));
}

#[test]
fn a_master_that_is_replaced_by_its_replica() {
    let mut trio = Sentinels::start(Flavour::Redis7, 1);
    let mut goflow = Goflow::start(&["--shard", &format!("s0={}", trio.url())]);
    goflow.expect_log("shard");
    let mut wire = goflow.wire();
    let fence = wire.say("GOFLOW.LOCK ACQUIRE only 600000").items()[1].integer();
    let mut ids: Vec<String> = (0..100).map(|n| wire.say(&format!("GOFLOW.ENQUEUE main job{n}")).text()).collect();
    let held = wire.say("GOFLOW.DEQUEUE main LEASE 600000");
    // Replication is asynchronous: the promise is for what the replica has.
    assert_eq!(trio.master.wire().say("WAIT 1 0"), Value::Integer(1));
    let mut waiter = goflow.wire();
    waiter.send(&["GOFLOW.DEQUEUE", "later", "BLOCK", "0"]);
    trio.master.kill();
    let receipt = held.field("receipt").text();
    eventually!(
        "the lease is acked on the new master",
        (wire.call(&["GOFLOW.ACK", "main", &receipt]) == Value::Integer(1)).then_some(())
    );
    ids.retain(|id| *id != held.field("id").text());
    let mut delivered: Vec<String> = (0..99)
        .map(|_| {
            let job = wire.say("GOFLOW.DEQUEUE main");
            assert_eq!(wire.call(&["GOFLOW.ACK", "main", &job.field("receipt").text()]), Value::Integer(1));
            job.field("id").text()
        })
        .collect();
    delivered.sort();
    ids.sort();
    assert_eq!(delivered, ids);
    assert!(matches!(wire.say("GOFLOW.ENQUEUE later x"), Value::Bulk(_)));
    assert_eq!(waiter.read().field("payload").text(), "x");
    assert_eq!(wire.say("GOFLOW.LOCK ACQUIRE only 1000"), Value::Null, "the lock is still held");
    let info = wire.say("GOFLOW.LOCK INFO only");
    assert_eq!(info.field("fence").integer(), fence);
}
