//! The shard map is changed while everything runs: an order to one proxy holds on all of them, whoever is down meanwhile; a
//! shard that leaves loses no job and has none run twice; a key whose home moved is one key; the configuration is reread.
//!
//! `GOFLOW_MOVE_JOBS` is how many jobs wait on the shard that leaves, `GOFLOW_MOVE_RATE` how many a second come meanwhile.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use goflow::dispatch::router::Ring;

use crate::eventually;
use crate::support::fleet::{Fleet, per_shard};
use crate::support::goflow::Goflow;
use crate::support::servers::{Flavour, Server};
use crate::support::wire::{Value, Wire};

fn ok(wire: &mut Wire, order: &str) {
    assert_eq!(wire.say(order), Value::Simple("OK".into()), "{order}");
}

/// State, weight and map version of each shard, as a proxy shows them.
fn shards(proxy: &Goflow) -> Vec<(String, String, i64, i64)> {
    let shown = proxy.wire().say("GOFLOW.SHARDS");
    let mut shards: Vec<_> = match &shown {
        Value::Map(pairs) => pairs.iter().map(|(_, shard)| shard.clone()).collect::<Vec<_>>(),
        Value::Array(items) => items.chunks_exact(2).map(|pair| pair[1].clone()).collect(),
        other => panic!("{other:?}"),
    }
    .into_iter()
    .map(|shard| {
        let number = |name: &str| shard.field(name).integer();
        (shard.field("name").text(), shard.field("state").text(), number("weight"), number("map_version"))
    })
    .collect();
    shards.sort();
    shards
}

fn version(proxy: &Goflow) -> i64 {
    shards(proxy)[0].3
}

/// All proxies show the same map, of this version.
fn agree(fleet: &Fleet, at: i64) -> Vec<(String, String, i64, i64)> {
    eventually!("all proxies go by the same map", {
        let shown: Vec<_> = fleet.proxies.iter().map(shards).collect();
        (shown.iter().all(|map| *map == shown[0]) && shown[0][0].3 == at).then(|| shown[0].clone())
    })
}

#[test]
fn an_order_holds_on_every_proxy_and_on_those_that_start_later() {
    let mut fleet = Fleet::start_plain(3, 2, &[]);
    ok(&mut fleet.proxies[0].wire(), "GOFLOW.SHARD DRAIN s1");
    ok(&mut fleet.proxies[0].wire(), "GOFLOW.SHARD DRAIN s1");
    assert_eq!(agree(&fleet, 2)[1], ("s1".into(), "draining".into(), 1, 2));
    for proxy in &fleet.proxies {
        let mut wire = proxy.wire();
        (0..40).for_each(|_| assert!(matches!(wire.say("GOFLOW.ENQUEUE main x"), Value::Bulk(_))));
    }
    fleet.add_proxy(&[]);
    ok(&mut fleet.proxies[2].wire(), "GOFLOW.SHARD WEIGHT s0 3");
    assert_eq!(agree(&fleet, 3)[0], ("s0".into(), "up".into(), 3, 3));
    let placed = per_shard(&fleet.proxies[2].wire().say("GOFLOW.LEN main PERSHARD"));
    assert!(placed[1] == 0 && placed.iter().sum::<i64>() == 80, "{placed:?}");
    ok(&mut fleet.proxies[1].wire(), "GOFLOW.SHARD UNDRAIN s1");
    assert_eq!(agree(&fleet, 4)[1].1, "up");
    // The last one that takes jobs stays.
    ok(&mut fleet.proxies[1].wire(), "GOFLOW.SHARD DRAIN s0");
    ok(&mut fleet.proxies[1].wire(), "GOFLOW.SHARD DRAIN s1");
    let refusal = fleet.proxies[1].wire().say("GOFLOW.SHARD DRAIN s2").text();
    assert!(refusal.contains("last shard"), "{refusal}");
}

#[test]
fn a_shard_is_added_under_way_and_serves_who_waited_before() {
    let fleet = Fleet::start_plain(2, 2, &[]);
    let mut waiting = fleet.proxies[1].wire();
    waiting.send(&["GOFLOW.DEQUEUE", "main", "BLOCK", "60000"]);
    let fresh = Server::start(Flavour::Redis7, &[]);
    ok(&mut fleet.proxies[0].wire(), &format!("GOFLOW.SHARD ADD s2 {}", fresh.url()));
    ok(&mut fleet.proxies[0].wire(), &format!("GOFLOW.SHARD ADD s2 {}", fresh.url()));
    assert_eq!(agree(&fleet, 2)[2], ("s2".into(), "up".into(), 1, 2));
    // By the proxy that did not get the order, for the client that waits at it.
    let id = fleet.proxies[1].wire().say("GOFLOW.ENQUEUE main hello SHARD s2").text();
    assert!(id.ends_with("~s2"), "{id}");
    assert_eq!(waiting.read().field("id").text(), id);
    // Ordinary commands reach it, too.
    let mut wire = fleet.proxies[1].wire();
    (0..50).for_each(|n| ok(&mut wire, &format!("SET key:{n} x")));
    assert_eq!(fleet.proxies[0].wire().say("DBSIZE").integer() - wire.say("DBSIZE").integer(), 0);
    assert!((0..50).all(|n| fleet.proxies[0].wire().say(&format!("GET key:{n}")).text() == "x"));
    let refusals = [
        (format!("GOFLOW.SHARD ADD s3 {}", fresh.url()), "has this URL already"),
        (format!("GOFLOW.SHARD ADD s3 {}", fresh.url().replace("127.0.0.1", "localhost")), "one server cannot be two"),
        ("GOFLOW.SHARD ADD s3 redis://user:hush@127.0.0.1:1".into(), "holds no passwords"),
        ("GOFLOW.SHARD ADD s3 memory:".into(), "expected the URL of a server"),
        ("GOFLOW.SHARD ADD s3 redis://127.0.0.1:1".into(), "SHARDDOWN s3"),
    ];
    for (order, why) in refusals {
        let refusal = wire.say(&order).text();
        assert!(refusal.contains(why) && !refusal.contains("hush"), "{order}: {refusal}");
    }
    assert_eq!(version(&fleet.proxies[0]), 2);
}

#[test]
fn limits_are_lifted_before_their_shard_goes_and_hold_on_those_that_stay() {
    let fleet = Fleet::start_plain(2, 1, &[]);
    let mut wire = fleet.proxies[0].wire();
    // So many that either shard keeps the ledgers of some.
    let queues: Vec<String> = (0..20).map(|number| format!("q{number}")).collect();
    let set = |wire: &mut Wire, limits: &str| {
        queues.iter().for_each(|queue| ok(wire, &format!("GOFLOW.LIMIT {queue} {limits}")));
    };
    set(&mut wire, "CONCURRENCY 4 MAXLEN 10");
    let refusal = wire.say("GOFLOW.SHARD REMOVE s0").text();
    assert!(refusal.contains("keeps the limits of"), "{refusal}");
    set(&mut wire, "CONCURRENCY 0 MAXLEN 0");
    ok(&mut wire, "GOFLOW.SHARD REMOVE s0");
    set(&mut wire, "MAXLEN 3");
    for queue in &queues {
        (0..3).for_each(|_| assert!(matches!(wire.call(&["GOFLOW.ENQUEUE", queue, "x"]), Value::Bulk(_))));
        assert!(wire.call(&["GOFLOW.ENQUEUE", queue, "x"]).is_error("QUEUEFULL"));
    }
    let refusal = wire.say(&format!("GOFLOW.SHARD ADD s0 {}", fleet.shards[0].url())).text();
    assert!(refusal.contains("was removed before"), "{refusal}");
}

#[test]
fn a_job_that_came_back_to_its_first_shard_is_found_by_its_id() {
    let fleet = Fleet::start_plain(2, 1, &[]);
    let mut wire = fleet.proxies[0].wire();
    let id = wire.say("GOFLOW.ENQUEUE main x SHARD s0").text();
    for (from, to) in [("s0", "s1"), ("s1", "s0")] {
        ok(&mut wire, &format!("GOFLOW.SHARD MOVE {from}"));
        let refusal = wire.say(&format!("GOFLOW.ENQUEUE main x SHARD {from}")).text();
        assert!(refusal.contains("takes no new jobs"), "{refusal}");
        eventually!("the job has moved", {
            let shard = wire.call(&["GOFLOW.JOB", "main", &id]);
            (shard != Value::Null && shard.field("shard").text() == to).then_some(())
        });
        ok(&mut wire, &format!("GOFLOW.SHARD UNDRAIN {from}"));
    }
    assert_eq!(wire.call(&["GOFLOW.CANCEL", "main", &id]), Value::Integer(1));
}

#[test]
fn a_shard_is_removed_when_it_is_empty_and_not_before() {
    let mut fleet = Fleet::start_plain(3, 2, &[]);
    let mut wire = fleet.proxies[0].wire();
    let id = wire.say("GOFLOW.ENQUEUE main x SHARD s1").text();
    let refusal = wire.say("GOFLOW.SHARD REMOVE s1").text();
    assert!(refusal.contains("holds 1 jobs"), "{refusal}");
    assert_eq!(shards(&fleet.proxies[0])[1].1, "up", "a refusal changes nothing");
    let receipt = wire.say("GOFLOW.DEQUEUE main SHARDS 1 s1").field("receipt").text();
    assert_eq!(wire.call(&["GOFLOW.ACK", "main", &receipt]), Value::Integer(1));
    // Links of every kind: for ordinary commands, for what is watched, and to listen.
    let mut listener = fleet.proxies[0].wire();
    listener.say("PSUBSCRIBE *");
    for number in 0..20 {
        wire.say(&format!("WATCH key{number}"));
        wire.say(&format!("GET key{number}"));
        wire.say("UNWATCH");
    }
    ok(&mut wire, "GOFLOW.SHARD REMOVE s1");
    eventually!("no thread that is in use has a link to it", {
        fleet.proxies.iter().for_each(|proxy| drop(proxy.wire().say("GET key")));
        let list = fleet.shards[1].wire().say("CLIENT LIST").text();
        let is_link = |line: &&str| ["cmd=get", "cmd=unwatch", "cmd=psubscribe"].iter().any(|mark| line.contains(mark));
        list.lines().find(is_link).is_none().then_some(())
    });
    let names: Vec<String> = agree(&fleet, 3).into_iter().map(|shard| shard.0).collect();
    assert_eq!(names, ["s0", "s2"]);
    // Its jobs that were over are forgotten with it; that is no error.
    assert_eq!(wire.call(&["GOFLOW.JOB", "main", &id]), Value::Null);
    assert_eq!(wire.call(&["GOFLOW.ACK", "main", &receipt]), Value::Integer(0));
    assert!(wire.say("GOFLOW.ENQUEUE main x SHARD s1").text().contains("no shard is named"));
    for proxy in &mut fleet.proxies {
        let mut wire = proxy.wire();
        (0..20).for_each(|n| assert!(matches!(wire.say(&format!("GOFLOW.ENQUEUE main x ID j{n}")), Value::Bulk(_))));
    }
    assert_eq!(per_shard(&wire.say("GOFLOW.LEN main PERSHARD")).iter().sum::<i64>(), 20);
}

#[test]
fn two_proxies_that_change_the_map_at_once_make_one_map_of_it() {
    let fleet = Fleet::start_plain(4, 2, &[]);
    let rounds = 20;
    std::thread::scope(|scope| {
        for (number, proxy) in fleet.proxies.iter().enumerate() {
            scope.spawn(move || {
                let mut wire = proxy.wire();
                for round in 0..rounds {
                    let order = if round % 2 == 0 { "DRAIN" } else { "UNDRAIN" };
                    ok(&mut wire, &format!("GOFLOW.SHARD {order} s{number}"));
                }
            });
        }
    });
    let shown = agree(&fleet, 1 + 2 * rounds);
    assert!(shown.iter().all(|shard| shard.1 == "up"), "{shown:?}");
}

#[test]
fn a_proxy_that_was_down_during_a_change_goes_by_the_new_map() {
    let mut fleet = Fleet::start_plain(2, 2, &[]);
    fleet.proxies[1].kill();
    let fresh = Server::start(Flavour::Redis7, &[]);
    let mut wire = fleet.proxies[0].wire();
    ok(&mut wire, &format!("GOFLOW.SHARD ADD s2 {}", fresh.url()));
    ok(&mut wire, "GOFLOW.SHARD REMOVE s0");
    fleet.proxies[1].restart();
    fleet.proxies[1].wait_for_log("newer map");
    let names: Vec<String> = agree(&fleet, 4).into_iter().map(|shard| shard.0).collect();
    assert_eq!(names, ["s1", "s2"]);
    let config = format!("s0={},s1={}", fleet.shards[0].url(), fleet.shards[1].url());
    let (status, text, _) = Goflow::run_with(&["check"], &[("GOFLOW_SHARDS", &config)]);
    assert!(status.success() && text.contains("the shards bear map 4") && text.contains("shard s2"), "{text}");
}

fn size(variable: &str, small: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(small)
}

/// Jobs of each kind on s0, which then leaves: what a client can see of each before and after, but for where it is.
#[test]
fn a_shard_that_leaves_takes_nothing_from_its_jobs() {
    let fleet = Fleet::start_plain(3, 2, &[]);
    let mut wire = fleet.proxies[0].wire();
    let mut ids = Vec::new();
    let ring = Ring::new(["s0", "s1", "s2"].iter().map(|name| (*name, 1)));
    let on_s0 =
        |prefix: &str| (0..).map(|n| format!("{prefix}-{n}")).find(|key| ring.home(key.as_bytes()) == 0).unwrap();
    let (mine, once) = (on_s0("mine"), on_s0("once"));
    for order in [
        "x SHARD s0".to_owned(),
        "prio PRIORITY 7 TYPE mail META a b SHARD s0".into(),
        "later DELAY 3600000 SHARD s0".into(),
        format!("keyed UNIQUE {once} 0"),
        format!("mine ID {mine}"),
        "expires TTL 3600000 ATTEMPTS 3 SHARD s0".into(),
    ] {
        let id = wire.say(&format!("GOFLOW.ENQUEUE main {order}")).text();
        assert!(!id.starts_with("ERR"), "{id}");
        ids.push(id);
    }
    for n in 0..2 {
        let id = wire.say(&format!("GOFLOW.ENQUEUE other fails-{n} ATTEMPTS 5 BACKOFF 3600000 SHARD s0")).text();
        let receipt = wire.say("GOFLOW.DEQUEUE other WORKER w1").field("receipt").text();
        let fate = if n == 0 { "DEAD" } else { "TRACE t" };
        wire.say(&format!("GOFLOW.FAIL other {receipt} ERROR boom {fate}"));
        ids.push(id);
    }
    let see = |wire: &mut Wire, at: usize| {
        let queue = if at < 6 { "main" } else { "other" };
        let job = wire.call(&["GOFLOW.JOB", queue, &ids[at]]);
        assert_ne!(job, Value::Null, "{}", ids[at]);
        [
            "id",
            "state",
            "payload",
            "type",
            "priority",
            "attempts",
            "attempt",
            "lapses",
            "error",
            "trace",
            "enqueued_at",
            "meta",
        ]
        .map(|field| format!("{:?}", job.field(field)))
    };
    let before: Vec<_> = (0..ids.len()).map(|at| see(&mut wire, at)).collect();
    // One is with a worker, and stays until it comes back.
    let leased = wire.say("GOFLOW.ENQUEUE third x SHARD s0").text();
    let receipt = wire.say("GOFLOW.DEQUEUE third").field("receipt").text();
    ok(&mut wire, "GOFLOW.SHARD MOVE s0");
    let mut other = fleet.proxies[1].wire();
    eventually!("only the leased one is left", {
        let left: Vec<i64> = [&mut wire, &mut other]
            .map(|wire| match wire.say("GOFLOW.SHARDS").field("s0").field("to_move") {
                Value::Integer(left) => *left,
                _ => -1,
            })
            .into();
        left.contains(&1).then_some(())
    });
    for wire in [&mut wire, &mut other] {
        (0..ids.len()).for_each(|at| assert_eq!(see(wire, at), before[at]));
        assert_eq!(wire.say(&format!("GOFLOW.ENQUEUE main again UNIQUE {once} 0")).text(), ids[3]);
        assert_eq!(wire.say(&format!("GOFLOW.ENQUEUE main again ID {mine}")).text(), mine);
    }
    assert_eq!(per_shard(&wire.say("GOFLOW.LEN main PERSHARD"))[0], 0);
    let refusal = wire.say("GOFLOW.SHARD REMOVE s0").text();
    assert!(refusal.contains("holds 1 jobs"), "{refusal}");
    assert_eq!(wire.call(&["GOFLOW.RELEASE", "third", &receipt]).text(), "ready");
    eventually!("it is moved, too", {
        (wire.say("GOFLOW.SHARD REMOVE s0") == Value::Simple("OK".into())).then_some(())
    });
    for wire in [&mut wire, &mut other] {
        (0..ids.len()).for_each(|at| assert_eq!(see(wire, at), before[at]));
        assert_eq!(wire.say(&format!("GOFLOW.ENQUEUE main again UNIQUE {once} 0")).text(), ids[3]);
    }
    assert_eq!(wire.call(&["GOFLOW.DLQ", "RETRY", "other", &ids[6]]), Value::Integer(1));
    assert_eq!(wire.call(&["GOFLOW.CANCEL", "main", &ids[0]]), Value::Integer(1));
    assert_eq!(wire.call(&["GOFLOW.CANCEL", "main", &ids[0]]), Value::Integer(0));
    assert_eq!(wire.say("GOFLOW.DEQUEUE third").field("id").text(), leased, "a moved job keeps its id");
}

#[test]
fn a_key_whose_home_moved_is_one_key() {
    let fleet = Fleet::start_plain(2, 2, &[]);
    let mut wires: Vec<Wire> = fleet.proxies.iter().map(Goflow::wire).collect();
    for n in 0..60 {
        assert_eq!(wires[0].say(&format!("GOFLOW.ENQUEUE main x ID id-{n}")).text(), format!("id-{n}"));
        assert!(!wires[0].say(&format!("GOFLOW.ENQUEUE uniq x UNIQUE key-{n} 0")).text().starts_with("ERR"));
    }
    let fresh = Server::start(Flavour::Redis7, &[]);
    ok(&mut wires[0], &format!("GOFLOW.SHARD ADD s2 {}", fresh.url()));
    // At once, through the proxy that may not have heard of it.
    for n in 0..60 {
        for wire in wires.iter_mut().rev() {
            assert_eq!(wire.say(&format!("GOFLOW.ENQUEUE main x ID id-{n}")).text(), format!("id-{n}"));
            assert!(!wire.say(&format!("GOFLOW.ENQUEUE uniq x UNIQUE key-{n} 0")).text().starts_with("ERR"));
            assert!(wire.say(&format!("GOFLOW.ENQUEUE main x ID id-{n} NX")).text().starts_with("DUPLICATE"));
        }
    }
    // New ones are one job, whoever adds them.
    std::thread::scope(|scope| {
        for wire in &mut wires {
            scope.spawn(move || {
                for n in 60..120 {
                    assert_eq!(wire.say(&format!("GOFLOW.ENQUEUE main x ID id-{n}")).text(), format!("id-{n}"));
                }
            });
        }
    });
    assert_eq!(wires[1].say("GOFLOW.LEN main"), Value::Integer(120));
    assert_eq!(wires[1].say("GOFLOW.LEN uniq"), Value::Integer(60));
    let on_new = per_shard(&wires[1].say("GOFLOW.LEN main PERSHARD"))[2];
    assert!(on_new > 5, "{on_new} of 60 new ids live on the new shard");
    for n in 0..120 {
        assert_eq!(wires[0].say(&format!("GOFLOW.JOB main id-{n}")).field("state").text(), "ready");
        assert_eq!(wires[1].say(&format!("GOFLOW.CANCEL main id-{n}")), Value::Integer(1));
    }
    assert_eq!(wires[1].say("GOFLOW.LEN main"), Value::Integer(0));
}

#[test]
fn a_lock_moves_with_its_shard_alone_and_only_while_nobody_holds_it() {
    let fleet = Fleet::start_plain(2, 2, &[]);
    let mut wire = fleet.proxies[0].wire();
    let mut held = Vec::new();
    for n in 0..20 {
        let grant = wire.say(&format!("GOFLOW.LOCK ACQUIRE lock-{n} 600000"));
        held.push((grant.items()[0].text(), grant.items()[1].integer()));
    }
    let fresh = Server::start(Flavour::Redis7, &[]);
    ok(&mut wire, &format!("GOFLOW.SHARD ADD s2 {}", fresh.url()));
    let mut other = fleet.proxies[1].wire();
    (0..20).for_each(|n| assert_eq!(other.say(&format!("GOFLOW.LOCK ACQUIRE lock-{n} 1000")), Value::Null));
    let refusal = wire.say("GOFLOW.SHARD REMOVE s0").text();
    assert!(refusal.contains("locks or slots that are held"), "{refusal}");
    for (n, (token, _)) in held.iter().enumerate() {
        assert_eq!(other.call(&["GOFLOW.LOCK", "RELEASE", &format!("lock-{n}"), token]), Value::Integer(1));
    }
    ok(&mut wire, "GOFLOW.SHARD REMOVE s0");
    for (n, (_, fence)) in held.iter().enumerate() {
        let grant = other.say(&format!("GOFLOW.LOCK ACQUIRE lock-{n} 600000"));
        assert!(grant.items()[1].integer() > *fence, "lock-{n}: {grant:?} after {fence}");
        assert_eq!(wire.say(&format!("GOFLOW.LOCK ACQUIRE lock-{n} 1000")), Value::Null);
    }
}

/// What clients saw of the jobs.
#[derive(Default)]
struct Seen {
    acknowledged: Mutex<HashSet<String>>,
    runs: Mutex<HashMap<String, usize>>,
    completed: AtomicUsize,
    lost_acks: AtomicUsize,
    finished: AtomicBool,
}

/// One call on one of the proxies; whoever is down is passed over, and what was not answered is said again.
struct Client<'a> {
    addresses: &'a [String],
    at: usize,
    wire: Option<Wire>,
}

impl Client<'_> {
    fn call(&mut self, words: &[&str]) -> Value {
        loop {
            if self.wire.is_none() {
                self.at += 1;
                self.wire = Wire::try_connect(&self.addresses[self.at % self.addresses.len()]);
            }
            match self.wire.as_mut().map(|wire| wire.try_call(words, crate::support::patience())) {
                Some(Ok(value)) => return value,
                _ => {
                    self.wire = None;
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
    }
}

#[test]
fn a_shard_is_added_one_is_emptied_and_removed_under_load_with_a_proxy_killed_meanwhile() {
    let (waiting, rate) = (size("GOFLOW_MOVE_JOBS", 3_000), size("GOFLOW_MOVE_RATE", 200));
    let mut fleet = Fleet::start_plain(3, 3, &[]);
    let addresses: Vec<String> = fleet.proxies.iter().map(|proxy| proxy.address().to_owned()).collect();
    let seen = Seen::default();
    let mut wire = fleet.proxies[0].wire();
    // A backlog on s0 that nobody takes until it has left.
    ok(&mut wire, "GOFLOW.PAUSE backlog");
    for from in (0..waiting).step_by(500) {
        let batch = from..(from + 500).min(waiting);
        batch.clone().for_each(|n| {
            let delay = if n % 10 == 9 { "1" } else { "0" };
            wire.send(&["GOFLOW.ENQUEUE", "backlog", "payload", "SHARD", "s0", "DELAY", delay]);
        });
        batch.for_each(|_| assert!(seen.acknowledged.lock().unwrap().insert(wire.read().text())));
    }
    let fresh = Server::start(Flavour::Redis7, &[]);
    let began = Instant::now();
    let report = std::thread::scope(|scope| {
        for number in 0..2 {
            let (addresses, seen) = (&addresses, &seen);
            scope.spawn(move || {
                let mut client = Client { addresses, at: number, wire: None };
                for n in 0.. {
                    let due = began + Duration::from_secs(2) * n / rate as u32;
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                    if seen.finished.load(Ordering::Relaxed) {
                        return;
                    }
                    let id = format!("p{number}-{n}");
                    let added = client.call(&["GOFLOW.ENQUEUE", "main", "payload", "ID", &id]);
                    assert_eq!(added.text(), id);
                    seen.acknowledged.lock().unwrap().insert(id);
                }
            });
        }
        for number in 0..6 {
            let (addresses, seen) = (&addresses, &seen);
            scope.spawn(move || {
                let mut client = Client { addresses, at: number, wire: None };
                let mut idle = 0;
                // A lease that died with its proxy has lapsed long before: what has not come by then is lost.
                while idle < 150 {
                    let over = seen.finished.load(Ordering::Relaxed);
                    let job = client.call(&["GOFLOW.DEQUEUE", "main", "backlog", "BLOCK", "200", "LEASE", "15000"]);
                    idle = if job == Value::Null && over { idle + 1 } else { 0 };
                    if job == Value::Null {
                        match over
                            && seen.completed.load(Ordering::Relaxed) + seen.lost_acks.load(Ordering::Relaxed)
                                >= seen.acknowledged.lock().unwrap().len()
                        {
                            true => return,
                            false => continue,
                        }
                    }
                    let (id, queue) = (job.field("id").text(), job.field("queue").text());
                    *seen.runs.lock().unwrap().entry(id).or_default() += 1;
                    match client.call(&["GOFLOW.ACK", &queue, &job.field("receipt").text()]) {
                        Value::Integer(1) => seen.completed.fetch_add(1, Ordering::Relaxed),
                        _ => seen.lost_acks.fetch_add(1, Ordering::Relaxed),
                    };
                }
            });
        }
        let mut wire = fleet.proxies[0].wire();
        ok(&mut wire, &format!("GOFLOW.SHARD ADD s3 {}", fresh.url()));
        ok(&mut wire, "GOFLOW.SHARD DRAIN s0");
        ok(&mut wire, "GOFLOW.SHARD MOVE s0");
        // Whoever moves is killed in the middle, and the others go on.
        let (mover, moved) = eventually!("the move is under way", {
            (0..3).find_map(|proxy| {
                let moved = fleet.proxies[proxy].wire().say("GOFLOW.SHARDS").field("s0").field("moved").clone();
                match moved {
                    Value::Integer(moved) if moved > 0 => Some((proxy, moved)),
                    _ => None,
                }
            })
        });
        fleet.proxies[mover].kill();
        let mut wire = fleet.proxies[(mover + 1) % 3].wire();
        eventually!("nothing waits there any more", {
            let left = ["backlog", "main"].map(|queue| {
                ["ready", "scheduled"]
                    .map(|state| wire.say(&format!("GOFLOW.LEN {queue} STATE {state} PERSHARD")).field("s0").integer())
            });
            (left == [[0, 0], [0, 0]]).then_some(())
        });
        eventually!(
            "it can be removed",
            (wire.say("GOFLOW.SHARD REMOVE s0") == Value::Simple("OK".into())).then_some(())
        );
        let took = began.elapsed();
        fleet.proxies[mover].restart();
        ok(&mut fleet.proxies[mover].wire(), "GOFLOW.RESUME backlog");
        seen.finished.store(true, Ordering::Relaxed);
        format!("{moved} of {waiting} moved when its proxy was killed, removed after {took:.1?}")
    });
    let (acknowledged, runs) = (seen.acknowledged.lock().unwrap(), seen.runs.lock().unwrap());
    let lost = acknowledged.iter().filter(|id| !runs.contains_key(*id)).count();
    let twice = runs.values().filter(|runs| **runs > 1).count();
    println!("{report}; {} acknowledged, {} run, lost {lost}, twice {twice}", acknowledged.len(), runs.len());
    assert_eq!((lost, twice), (0, 0));
    assert!(acknowledged.len() > waiting);
}

#[test]
fn what_was_on_its_way_arrives_although_its_shard_is_told_to_stay() {
    let mut fleet = Fleet::start_plain(2, 1, &[]);
    fleet.expect_failures();
    let mut wire = fleet.proxies[0].wire();
    let ids: HashSet<String> = (0..40).map(|_| wire.say("GOFLOW.ENQUEUE main x SHARD s0").text()).collect();
    fleet.shards[1].stop();
    ok(&mut wire, "GOFLOW.SHARD MOVE s0");
    let mut shard = fleet.shards[0].wire();
    eventually!("a batch is on its way", (shard.say("EXISTS goflow:{main}:moving") == Value::Integer(1)).then_some(()));
    fleet.shards[1].cont();
    ok(&mut wire, "GOFLOW.SHARD UNDRAIN s0");
    eventually!("nothing is on its way", (shard.say("EXISTS goflow:{main}:moving") == Value::Integer(0)).then_some(()));
    let mut taken = HashSet::new();
    while taken.len() < ids.len() {
        let job = wire.say("GOFLOW.DEQUEUE main BLOCK 60000");
        assert!(taken.insert(job.field("id").text()), "{job:?} came twice");
    }
    assert_eq!(taken, ids);
}

#[test]
fn a_configuration_takes_no_shard_out_and_an_order_only_an_empty_or_a_lost_one() {
    let dir = crate::support::scratch();
    let mut shards: Vec<Server> = (0..3).map(|_| Server::start(Flavour::Redis7, &[])).collect();
    let path = dir.path().join("goflow.toml");
    let urls: Vec<String> = shards.iter().map(Server::url).collect();
    let write = |version: u32, named: &[usize]| {
        let shard = |at: &usize| format!("[[shard]]\nname = \"s{at}\"\nurl = \"{}\"\n", urls[*at]);
        let shards: String = named.iter().map(shard).collect();
        std::fs::write(&path, format!("map_version = {version}\n{shards}")).unwrap();
    };
    write(1, &[0, 1, 2]);
    let mut proxy = Goflow::start(&["--config", path.to_str().unwrap()]);
    ["waits", "not taken", "is down", "given up", "follow", "listen"].iter().for_each(|word| proxy.expect_log(word));
    let mut wire = proxy.wire();
    let id = wire.say("GOFLOW.ENQUEUE main x SHARD s1").text();
    write(2, &[0, 2]);
    let why = wire.say("GOFLOW.RELOAD").field("map_waits").text();
    assert!(why.contains("leaves out shard s1: GOFLOW.SHARD REMOVE s1"), "{why}");
    // A start is not refused for it.
    proxy.restart();
    let mut wire = proxy.wire();
    let refusal = wire.say("GOFLOW.SHARD REMOVE s1").text();
    assert!(refusal.contains("s1 holds 1 jobs"), "{refusal}");
    let refusal = wire.say("GOFLOW.SHARD REMOVE s1 LOST").text();
    assert!(refusal.contains("is not lost"), "{refusal}");
    assert_eq!(wire.say("GOFLOW.DEQUEUE main").field("id").text(), id, "it is served yet");
    assert_eq!(wire.call(&["GOFLOW.CANCEL", "main", &id]), Value::Integer(1));
    ok(&mut wire, "GOFLOW.SHARD REMOVE s1");
    // The first, which decides on changes as long as it is there.
    shards.remove(0).kill();
    eventually!("it is gone", wire.say("GOFLOW.SHARD REMOVE s0 LOST").text().eq("OK").then_some(()));
    assert_eq!(self::shards(&proxy).len(), 1);
    assert!(matches!(wire.say("GOFLOW.ENQUEUE main y"), Value::Bulk(_)));
    write(9, &[0, 1, 2]);
    let why = wire.say("GOFLOW.RELOAD").field("map_waits").text();
    assert!(why.contains("was removed before"), "{why}");
}

#[test]
fn the_configuration_is_reread_by_order_and_by_signal() {
    let dir = crate::support::scratch();
    let shards: Vec<Server> = (0..2).map(|_| Server::start(Flavour::Redis7, &[])).collect();
    let path = dir.path().join("goflow.toml");
    let shard = |at: usize| format!("[[shard]]\nname = \"s{at}\"\nurl = \"{}\"\n", shards[at].url());
    let write = |version: u32, more: &str, shards: &[usize]| {
        let shards: String = shards.iter().map(|at| shard(*at)).collect();
        std::fs::write(&path, format!("map_version = {version}\n{more}\n{shards}")).unwrap();
    };
    write(1, "", &[0]);
    let mut proxy = Goflow::start(&["--config", path.to_str().unwrap()]);
    let mut wire = proxy.wire();
    let names =
        |reply: &Value, field: &str| reply.field(field).items().iter().map(Value::text).collect::<Vec<_>>().join(" ");
    // What can change at once does, for connections that stand, too; what waits for a restart is named.
    write(
        1,
        "strategy = \"round-robin\"\nthreads = 3\n[limits]\npayload_bytes_max = 4\n[worker]\nkeep_ms = 9000",
        &[0],
    );
    let reply = wire.say("GOFLOW.RELOAD");
    assert_eq!(names(&reply, "changed"), "limits.payload_bytes_max strategy threads worker.keep_ms");
    assert_eq!(names(&reply, "restart"), "threads worker.keep_ms");
    assert!(wire.say("GOFLOW.ENQUEUE main hello").text().starts_with("TOOBIG"));
    assert!(wire.say("INFO goflow").text().contains("strategy:round-robin"));
    // A bad file changes nothing.
    write(1, "[limits]\npayload_bytes_max = -1", &[0]);
    let refusal = wire.say("GOFLOW.RELOAD").text();
    assert!(refusal.contains("nothing was changed") && refusal.contains("column 21: -1 is out of range"), "{refusal}");
    write(1, "", &[0, 1]);
    let refusal = wire.say("GOFLOW.RELOAD").text();
    assert!(refusal.contains("raise map_version"), "{refusal}");
    assert!(wire.say("GOFLOW.ENQUEUE main hello").text().starts_with("TOOBIG"));
    // By signal, and with another shard.
    write(2, "[[auth.user]]\nname = \"default\"\npassword = \"hush\"", &[0, 1]);
    proxy.hangup();
    proxy.wait_for_log("configuration reloaded");
    eventually!(
        "the shard is in the map",
        matches!(wire.say("GOFLOW.ENQUEUE main x SHARD s1"), Value::Bulk(_)).then_some(())
    );
    let mut stranger = proxy.wire();
    assert!(stranger.say("PING").text().starts_with("NOAUTH"));
    assert_eq!(stranger.say("AUTH hush"), Value::Simple("OK".into()));
    assert!(matches!(stranger.say("GOFLOW.ENQUEUE main hello"), Value::Bulk(_)), "the old limit is back");
    std::fs::write(&path, "listen = 7").unwrap();
    proxy.expect_log("SIGHUP");
    proxy.hangup();
    proxy.wait_for_log("SIGHUP");
    assert!(!proxy.log().iter().any(|line| line.contains("hush")));
}
