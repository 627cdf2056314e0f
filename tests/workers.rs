//! Worker sessions through real proxies: what `DEQUEUE ... BIND` promises to workers that live, die, reconnect, time out
//! and never answer.
//!
//! A lease of these tests lasts far longer than a test's patience where jobs must come back before it, and far shorter
//! than the test where they must not. Sizes: `GOFLOW_SESSION_JOBS` (bound jobs of a worker that is killed),
//! `GOFLOW_SESSION_HELD_MS` (how long a job is held without a heartbeat), `GOFLOW_SESSION_LEASES`, `GOFLOW_SESSION_WORKERS`
//! and `GOFLOW_SESSION_WATCH_MS` (what is kept alive while its cost is measured).

use std::time::{Duration, Instant};

use crate::eventually;
use crate::support::fleet::Fleet;
use crate::support::goflow::Goflow;
use crate::support::process::{Process, Program, cpu_ms, venv};
use crate::support::servers::{Flavour, Server};
use crate::support::wire::{Value, Wire};
use crate::support::{scratch, size};

/// Sessions that a test need not wait long for.
const QUICK: &[(&str, &str)] = &[("GOFLOW_WORKER_KEEP_MS", "8000"), ("GOFLOW_WORKER_GRACE_MS", "600")];
/// As long as a very impatient library waits for an answer.
const GIVEN_UP_AFTER: Duration = Duration::from_millis(100);

fn enqueue(wire: &mut Wire, count: usize) {
    let payloads = "x ".repeat(count);
    assert_eq!(wire.say(&format!("GOFLOW.ENQUEUEMANY main {count} {payloads}")).items().len(), count);
}

fn receipts(reply: &Value) -> Vec<String> {
    reply.items().iter().map(|job| job.field("receipt").text()).collect()
}

/// What a proxy shows of a worker: `None` where it shows no such session.
fn shown(wire: &mut Wire, worker: &str) -> Option<Value> {
    let all = wire.say("GOFLOW.WORKERS main COUNT 1000");
    let is_it = |entry: &&Value| *entry.field("worker") == Value::Bulk(worker.into());
    all.items().iter().find(is_it).cloned()
}

/// How many jobs the shards know that a worker's session holds.
fn bound(wire: &mut Wire, worker: &str) -> usize {
    shown(wire, worker).map_or(0, |entry| entry.field("leased").integer() as usize)
}

/// For how long a worker's session has held jobs without a break, on the shard where that is longest.
fn held_ms(wire: &mut Wire, worker: &str) -> i64 {
    let held = shown(wire, worker).map(|entry| entry.field("held").clone());
    held.iter().flat_map(|held| held.items()).map(|held| held.field("held_ms").integer()).max().unwrap_or(-1)
}

fn stat(wire: &mut Wire, name: &str) -> i64 {
    wire.say("GOFLOW.STATS main").field(name).integer()
}

/// A worker in Python with redis-py that takes bound jobs, shows that it has read them, and then only sits there.
fn start_sitter(address: &str, jobs: usize, options: &str) -> (Process, tempfile::TempDir) {
    let dir = scratch();
    let (host, port) = address.rsplit_once(':').unwrap();
    let script = format!(
        "import redis, time\n\
         r = redis.Redis(host='{host}', port={port})\n\
         held = 0\n\
         while held < {jobs}:\n\
        \x20   held += len(r.execute_command('GOFLOW.DEQUEUE', 'main', 'COUNT', {jobs} - held, 'LEASE', 600000, *'{options}'.split()) or [])\n\
         r.ping()\n\
         print('holds', held, flush=True)\n\
         time.sleep(3600)\n"
    );
    let process = Process::start(&Program {
        path: venv().join("bin/python"),
        args: vec!["-c".into(), script.into()],
        env: Vec::new(),
        dir: dir.path().to_owned(),
    });
    process.stdout.wait_for("holds");
    (process, dir)
}

/// Kills a worker that holds bound jobs; how long it took until others had all of them.
fn kill_with_jobs(options: &str) -> Duration {
    let jobs = size("GOFLOW_SESSION_JOBS", 100);
    let fleet = Fleet::start(2, 2, &[]);
    let mut wire = fleet.proxies[1].wire();
    enqueue(&mut wire, jobs);
    let (mut worker, _dir) = start_sitter(fleet.proxies[0].address(), jobs, options);
    eventually!("the jobs are the session's", {
        let shown = wire.say("GOFLOW.WORKERS main");
        let leased: i64 = shown.items().iter().map(|entry| entry.field("leased").integer()).sum();
        (leased == jobs as i64).then_some(())
    });
    let killed_at = Instant::now();
    worker.kill();
    let mut taken = 0;
    while taken < jobs {
        let reply = wire.say(&format!("GOFLOW.DEQUEUE main COUNT {jobs} BLOCK 15000 LEASE 600000"));
        for job in reply.items() {
            assert_eq!(job.field("attempt"), &Value::Integer(1), "a worker's end cost an attempt");
            taken += 1;
        }
    }
    let took = killed_at.elapsed();
    println!("{jobs} jobs of a killed worker ({options}) were with others after {} ms", took.as_millis());
    // More may have been: what a slow shard gives to a client that another has served comes back as well.
    assert!(stat(&mut wire, "released") >= jobs as i64);
    assert_eq!((taken, stat(&mut wire, "lapsed")), (jobs, 0));
    took
}

#[test]
fn the_jobs_of_a_killed_worker_go_to_others_after_the_grace() {
    let took = kill_with_jobs("BIND WORKER w1");
    assert!(took >= Duration::from_secs(2), "the session ended before its grace: {took:?}");
}

#[test]
fn the_jobs_of_a_killed_worker_without_a_name_go_to_others_at_once() {
    kill_with_jobs("BIND");
}

#[test]
fn a_pooled_worker_needs_no_heartbeat() {
    let held_for = size("GOFLOW_SESSION_HELD_MS", 9_000) as i64;
    let goflow = Goflow::start_with(&["--shard", "s1=memory:"], QUICK);
    let (mut one, mut other, mut looker) = (goflow.wire(), goflow.wire(), goflow.wire());
    enqueue(&mut looker, 1);
    let receipt = one.say("GOFLOW.DEQUEUE main LEASE 4000 BIND WORKER pool").field("receipt").text();
    // What takes jobs waits for the next one; the job is acked on another connection of the pool.
    one.send(&["GOFLOW.DEQUEUE", "main", "BLOCK", "0", "BIND", "WORKER", "pool"]);
    eventually!("it was held for long", (held_ms(&mut looker, "pool") >= held_for).then_some(()));
    assert_eq!(other.call(&["GOFLOW.ACK", "main", &receipt]), Value::Integer(1));
    assert_eq!((stat(&mut looker, "lapsed"), stat(&mut looker, "released")), (0, 0));
    eventually!("the shard forgets the session", (bound(&mut looker, "pool") == 0).then_some(()));
}

#[test]
fn a_session_lives_as_long_as_one_of_its_connections() {
    let goflow = Goflow::start_with(&["--shard", "s1=memory:"], QUICK);
    let (mut one, mut other, mut looker) = (goflow.wire(), goflow.wire(), goflow.wire());
    assert_eq!(other.say("GOFLOW.DEQUEUE main BIND WORKER w"), Value::Null);
    enqueue(&mut looker, 2);
    let jobs = receipts(&one.say("GOFLOW.DEQUEUE main COUNT 2 LEASE 4000 BIND WORKER w"));
    assert_eq!(one.say("PING"), Value::Simple("PONG".into()));
    drop(one);
    eventually!("it outlived its grace", (held_ms(&mut looker, "w") > 5_000).then_some(()));
    assert_eq!(bound(&mut looker, "w"), 2);
    assert_eq!(other.call(&["GOFLOW.ACK", "main", &jobs[0]]), Value::Integer(1));
    drop(other);
    eventually!("the other job goes back", (stat(&mut looker, "ready") == 1).then_some(()));
    assert_eq!((stat(&mut looker, "lapsed"), stat(&mut looker, "released")), (0, 1));
}

#[test]
fn a_delivery_that_nobody_read_is_on_its_first_lease() {
    let goflow = Goflow::start_with(&["--shard", "s1=memory:"], QUICK);
    let (mut silent, mut looker) = (goflow.wire(), goflow.wire());
    // The session has another connection, which shows nothing of what the silent one has read.
    let mut busy = goflow.wire();
    busy.say("GOFLOW.DEQUEUE main BIND WORKER w");
    enqueue(&mut looker, 1);
    silent.send(&["GOFLOW.DEQUEUE", "main", "LEASE", "400", "BIND", "WORKER", "w"]);
    eventually!("its first lease is over", {
        busy.say("PING");
        (stat(&mut looker, "lapsed") == 1).then_some(())
    });
    assert_eq!(bound(&mut looker, "w"), 0);
}

#[test]
fn a_client_that_gave_up_waiting_holds_what_it_dropped_for_one_lease_at_most() {
    let goflow = Goflow::start_with(&["--shard", "s1=memory:"], QUICK);
    let (mut client, mut looker) = (goflow.wire(), goflow.wire());
    client.send(&["GOFLOW.DEQUEUE", "main", "BLOCK", "60000", "LEASE", "400", "BIND", "WORKER", "w"]);
    eventually!("it waits", looker.say("CLIENT LIST").text().contains("flags=b").then_some(()));
    std::thread::sleep(GIVEN_UP_AFTER);
    // Its library's time was up: it goes on with another command, and will drop the reply to the first.
    client.send(&["PING"]);
    // It comes again so late that the client waits by then.
    looker.say("GOFLOW.ENQUEUE main x BACKOFF 5000");
    let job = client.read();
    assert_eq!(client.read(), Value::Simple("PONG".into()));
    eventually!("the lease is over", {
        assert_eq!(client.say("PING"), Value::Simple("PONG".into()));
        (stat(&mut looker, "lapsed") == 1).then_some(())
    });
    // A client that did read it can say so by naming it.
    client.send(&["GOFLOW.DEQUEUE", "main", "BLOCK", "60000", "LEASE", "20000", "BIND", "WORKER", "w"]);
    eventually!("it waits", looker.say("CLIENT LIST").text().contains("flags=b").then_some(()));
    std::thread::sleep(GIVEN_UP_AFTER);
    client.send(&["PING"]);
    let again = client.read();
    assert_eq!(again.field("id"), job.field("id"));
    assert_eq!(client.read(), Value::Simple("PONG".into()));
    let receipt = again.field("receipt").text();
    assert_eq!(client.call(&["GOFLOW.PROGRESS", "main", &receipt, "1"]), Value::Simple("OK".into()));
    eventually!("it is the session's", (bound(&mut looker, "w") == 1).then_some(()));
}

#[test]
fn an_ack_that_follows_its_delivery_leaves_no_trace_of_a_session() {
    let server = Server::start(Flavour::Redis7, &[]);
    let goflow = Goflow::start(&["--shard", &format!("s1={}", server.url())]);
    let mut wire = goflow.wire();
    for number in 1..=20 {
        // Seqs come from the counter that a session would take its number from.
        assert_eq!(wire.say("GOFLOW.ENQUEUE main x SHARD s1").text(), format!("{}~s1", base36(number)));
        let receipt = wire.say("GOFLOW.DEQUEUE main BIND WORKER w").field("receipt").text();
        match number % 3 {
            0 => assert_eq!(wire.call(&["GOFLOW.FAIL", "main", &receipt, "DEAD"]).text(), "dead"),
            _ => assert_eq!(wire.call(&["GOFLOW.ACK", "main", &receipt]), Value::Integer(1)),
        }
    }
}

fn base36(number: u32) -> String {
    char::from_digit(number, 36).unwrap().to_string()
}

#[test]
fn a_worker_takes_its_session_over_to_another_proxy_when_its_own_is_killed() {
    let mut fleet = Fleet::start_with(2, 2, &[], QUICK);
    let mut first = fleet.proxies[0].wire();
    let mut looker = fleet.proxies[1].wire();
    enqueue(&mut looker, 20);
    let mut jobs = Vec::new();
    while jobs.len() < 20 {
        jobs.extend(receipts(&first.say("GOFLOW.DEQUEUE main COUNT 20 LEASE 600000 BIND WORKER mover")));
    }
    first.say("PING");
    // A worker that does not come back: its job does, when the proxy's last word is over.
    enqueue(&mut looker, 1);
    let mut lost = fleet.proxies[0].wire();
    lost.say("GOFLOW.DEQUEUE main LEASE 600000 BIND WORKER lost").field("receipt").text();
    lost.say("PING");
    eventually!("all is bound", (bound(&mut looker, "mover") == 20 && bound(&mut looker, "lost") == 1).then_some(()));
    fleet.proxies[0].kill();
    let mut second = fleet.proxies[1].wire();
    assert!(matches!(second.say("GOFLOW.DEQUEUE main LEASE 600000 BIND WORKER mover"), Value::Null));
    eventually!("the other's job went back", (stat(&mut looker, "ready") == 1).then_some(()));
    eventually!("the session outlives its proxy", (held_ms(&mut looker, "mover") > 9_000).then_some(()));
    let acked: i64 = jobs.iter().map(|receipt| second.call(&["GOFLOW.ACK", "main", receipt]).integer()).sum();
    assert_eq!((acked, stat(&mut looker, "released"), stat(&mut looker, "lapsed")), (20, 1, 0));
}

#[test]
fn a_proxy_that_drains_leaves_named_sessions_to_others() {
    let mut fleet =
        Fleet::start_with(1, 2, &[], &[("GOFLOW_WORKER_KEEP_MS", "60000"), ("GOFLOW_WORKER_GRACE_MS", "10")]);
    let (mut named, mut nameless) = (fleet.proxies[0].wire(), fleet.proxies[0].wire());
    let mut looker = fleet.proxies[1].wire();
    enqueue(&mut looker, 3);
    let job = named.say("GOFLOW.DEQUEUE main LEASE 600000 BIND WORKER w").field("receipt").text();
    named.say("PING");
    nameless.say("GOFLOW.DEQUEUE main LEASE 600000 BIND").field("receipt").text();
    nameless.say("PING");
    // Not read before the end, as far as anybody can tell.
    let unread = named.say("GOFLOW.DEQUEUE main LEASE 600000 BIND WORKER w").field("receipt").text();
    eventually!("the first is bound", (bound(&mut looker, "w") >= 1).then_some(()));
    assert!(fleet.proxies[0].terminate().success());
    eventually!("what has no name is back", (stat(&mut looker, "ready") == 1).then_some(()));
    let mut second = fleet.proxies[1].wire();
    second.say("GOFLOW.DEQUEUE other BIND WORKER w");
    assert_eq!(bound(&mut looker, "w"), 2, "the session was left with its jobs");
    for receipt in [job, unread] {
        assert_eq!(second.call(&["GOFLOW.ACK", "main", &receipt]), Value::Integer(1));
    }
    assert_eq!(stat(&mut looker, "released"), 1);
}

#[test]
fn workers_are_shown_with_what_they_hold() {
    let goflow = Goflow::start_with(&["--shard", "s1=memory:"], QUICK);
    let (mut named, mut nameless, mut idle) = (goflow.wire(), goflow.wire(), goflow.wire());
    let mut looker = goflow.wire();
    enqueue(&mut looker, 3);
    let number = named.say("CLIENT ID");
    named.say("GOFLOW.DEQUEUE main COUNT 2 BIND WORKER b");
    named.say("PING");
    nameless.say("GOFLOW.DEQUEUE main BIND");
    nameless.say("PING");
    idle.say("GOFLOW.DEQUEUE elsewhere BIND WORKER a");
    eventually!("both are bound", {
        let all = looker.say("GOFLOW.WORKERS");
        let leased: i64 = all.items().iter().map(|entry| entry.field("leased").integer()).sum();
        (leased == 3).then_some(())
    });
    let all = looker.say("GOFLOW.WORKERS main");
    let names: Vec<&Value> = all.items().iter().map(|entry| entry.field("worker")).collect();
    assert_eq!(names, [&Value::Bulk("a".into()), &Value::Bulk("b".into()), &Value::Null]);
    let b = &all.items()[1];
    assert_eq!((b.field("leased"), b.field("connections").items()), (&Value::Integer(2), &[number][..]));
    let held = &b.field("held").items()[0];
    assert_eq!((held.field("queue").text(), held.field("shard").text()), ("main".into(), "s1".into()));
    assert_eq!((held.field("leased"), held.field("proxies")), (&Value::Integer(2), &Value::Integer(1)));
    assert!(held.field("oldest_ms").integer() >= held.field("held_ms").integer());
    assert!((1..=8_000).contains(&held.field("ends_in_ms").integer()));
    assert_eq!(looker.say("GOFLOW.WORKERS main OFFSET 1 COUNT 1").items().len(), 1);
    assert_eq!(looker.say("GOFLOW.WORKERS nothing").items().len(), 3, "who is connected is shown");
    assert!(looker.say("GOFLOW.WORKERS main COUNT 1001").is_error("ERR"));
}

/// Scripts that a server was asked to run.
fn scripts_run(server: &Server) -> u64 {
    let stats = server.wire().say("INFO commandstats").text();
    let line = stats.lines().find(|line| line.starts_with("cmdstat_evalsha:")).unwrap_or_default();
    let calls = line.split_once("calls=").map_or("0", |(_, rest)| rest.split(',').next().unwrap_or("0"));
    calls.parse().unwrap()
}

#[test]
fn what_keeps_bound_leases_alive_does_not_grow_with_their_number() {
    let (leases, workers) = (size("GOFLOW_SESSION_LEASES", 2_000), size("GOFLOW_SESSION_WORKERS", 20));
    let watch = Duration::from_millis(size("GOFLOW_SESSION_WATCH_MS", 3_000) as u64);
    let server = Server::start(Flavour::Redis7, &[]);
    let keep: &[(&str, &str)] = if watch > Duration::from_secs(20) { &[] } else { QUICK };
    let goflow = Goflow::start_with(&["--shard", &format!("s1={}", server.url())], keep);
    let mut looker = goflow.wire();
    let idle = (cpu_ms(goflow.id()), cpu_ms(server.id()));
    std::thread::sleep(watch);
    let idle = (cpu_ms(goflow.id()) - idle.0, cpu_ms(server.id()) - idle.1);
    let connections: Vec<Wire> = (0..workers)
        .map(|number| {
            let mut wire = goflow.wire();
            let count = leases / workers;
            for _ in (0..count).step_by(500) {
                enqueue(&mut looker, count.min(500));
                let asked = format!("GOFLOW.DEQUEUE main COUNT 500 LEASE 600000 BIND WORKER w{number}");
                assert_eq!(wire.say(&asked).items().len(), count.min(500));
            }
            wire.say("PING");
            wire
        })
        .collect();
    let mut all_bound = || {
        let shown = looker.say("GOFLOW.WORKERS main COUNT 1000");
        shown.items().iter().map(|entry| entry.field("leased").integer()).sum::<i64>()
    };
    eventually!("all are bound", (all_bound() as usize == leases).then_some(()));
    let before = (cpu_ms(goflow.id()), cpu_ms(server.id()), scripts_run(&server));
    std::thread::sleep(watch);
    let after = (cpu_ms(goflow.id()), cpu_ms(server.id()), scripts_run(&server));
    let scripts = after.2 - before.2;
    println!(
        "{leases} leases of {workers} workers, {} ms: proxy {} ms CPU (idle {}), Redis {} ms (idle {}), {scripts} scripts",
        watch.as_millis(),
        after.0 - before.0,
        idle.0,
        after.1 - before.1,
        idle.1
    );
    assert_eq!(all_bound() as usize, leases, "all were kept");
    // Some words a second, a few ticks, and not one for each lease.
    let rounds = watch.as_millis() as u64 / 500 + 5;
    assert!(scripts < 4 * rounds + 2 * workers as u64, "{scripts} scripts in {rounds} rounds");
    drop(connections);
}
