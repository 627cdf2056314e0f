//! Durable lists: the commands of lists, over leases.
//!
//! A worker that knows `LPUSH` and `BRPOP` alone is killed at random; what it had comes back, and the same worker over a
//! bare Redis loses it. A move is killed half-way and loses nothing. Then what each policy promises, and what is refused.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tempfile::TempDir;

use crate::eventually;
use crate::support::fleet::Fleet;
use crate::support::goflow::Goflow;
use crate::support::process::{Process, Program, on_path, venv};
use crate::support::servers::{Flavour, Server};
use crate::support::wire::{Value, Wire, encode};
use crate::support::{scratch, size};

/// A pattern for each policy. The times are short where a test waits for them.
const LISTS: &str = r#"
[[list]]
pattern = "jobs:*"

[[list]]
pattern = "now:*"
ack = "now"

[[list]]
pattern = "timed:*"
ack = "lease"
lease_ms = 5000

[[list]]
pattern = "short:*"
lease_ms = 2000

[[list]]
pattern = "long:*"
ack = "lease"
"#;

/// A file with these settings, which must outlive the process.
fn settings(text: &str) -> (TempDir, String) {
    let dir = scratch();
    let path = dir.path().join("goflow.toml");
    std::fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (dir, path)
}

/// One proxy over so many shards.
fn over(shards: usize) -> (Fleet, TempDir) {
    let (dir, path) = settings(LISTS);
    (Fleet::start(shards, 1, &["--config", &path, "--strategy", "round-robin"]), dir)
}

/// One process with an embedded shard.
fn alone() -> (Goflow, TempDir) {
    with(LISTS)
}

fn with(text: &str) -> (Goflow, TempDir) {
    let (dir, path) = settings(text);
    (Goflow::start(&["--config", &path]), dir)
}

fn bulk(text: &str) -> Value {
    Value::Bulk(text.into())
}

fn array(items: &[&str]) -> Value {
    Value::Array(items.iter().map(|item| bulk(item)).collect())
}

/// What is in a list, taken out.
fn drain(wire: &mut Wire, list: &str) -> Vec<String> {
    std::iter::from_fn(|| match wire.call(&["LPOP", list]) {
        Value::Null => None,
        element => Some(element.text()),
    })
    .collect()
}

/// How many elements wait, run, or wait for another try; of each shard at one moment.
fn known(wire: &mut Wire, list: &str) -> i64 {
    let stats = wire.call(&["GOFLOW.STATS", list]);
    ["ready", "scheduled", "leased"].iter().map(|state| stats.field(state).integer()).sum()
}

fn worker(number: usize, address: &str, list: &str, log: &Path) -> Process {
    let (program, script) = match number % 2 {
        0 => (venv().join("bin/python"), "list.py"),
        _ => (on_path("node").expect("node is installed; run .ci/setup"), "list.js"),
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(script);
    let modules = venv().parent().unwrap().join("clients/node_modules");
    Process::start(&Program {
        path: program,
        args: [script.into_os_string(), address.into(), list.into(), log.as_os_str().into()].to_vec(),
        env: vec![("NODE_PATH".into(), modules.into_os_string())],
        dir: log.parent().unwrap().to_owned(),
    })
}

/// Kills workers at random while elements come in; says how many were pushed, never worked on, and worked on twice.
fn kill_workers(address: &str, list: &str, kills: usize) -> (usize, usize, usize) {
    let dir = scratch();
    let log = |number: usize| dir.path().join(format!("worker{number}"));
    let worked = || -> Vec<String> {
        let texts = (0..4).filter_map(|number| std::fs::read_to_string(log(number)).ok());
        // The last line may be half written.
        texts
            .flat_map(|text| {
                text.rsplit_once('\n').map_or(Vec::new(), |(whole, _)| whole.lines().map(str::to_owned).collect())
            })
            .collect()
    };
    let mut workers: Vec<Process> = (0..4).map(|number| worker(number, address, list, &log(number))).collect();
    let mut random = SmallRng::seed_from_u64(11);
    let mut wire = Wire::connect(address);
    let mut pushed = 0;
    let mut push = |wire: &mut Wire, count: usize| {
        for _ in 0..count {
            assert!(wire.call(&["LPUSH", list, &pushed.to_string()]).integer() > 0);
            pushed += 1;
        }
        pushed
    };
    push(&mut wire, 40);
    for _ in 0..kills {
        // A kill falls after so much more work, so that all of them fall into it.
        let (before, more) = (worked().len(), random.random_range(1..30));
        eventually!("the work goes on", {
            let waits = wire.call(&["LLEN", list]).integer();
            if waits < 40 {
                push(&mut wire, 40);
            }
            (worked().len() >= before + more).then_some(())
        });
        let victim = random.random_range(0..4);
        workers[victim] = {
            workers[victim].kill();
            worker(victim, address, list, &log(victim))
        };
    }
    let pushed = push(&mut wire, 0);
    eventually!("nothing waits", (wire.call(&["LLEN", list]).integer() == 0).then_some(()));
    let all = |worked: Vec<String>| worked.into_iter().collect::<HashSet<String>>().len();
    // Each living worker ends what it has; a bare Redis has nothing more to give.
    let marks: Vec<String> = (0..8).map(|number| format!("end{number}")).collect();
    marks.iter().for_each(|mark| drop(wire.call(&["LPUSH", list, mark])));
    eventually!("the last elements are worked on", {
        let seen: HashSet<String> = worked().into_iter().collect();
        marks.iter().all(|mark| seen.contains(mark)).then_some(())
    });
    let total = pushed + marks.len();
    let is_whole = |seen: usize| (seen == total).then_some(());
    if Wire::connect(address).say("INFO server").text().contains("goflow") {
        eventually!("every element is worked on", is_whole(all(worked())));
    }
    let worked = worked();
    let (again, distinct) = (worked.len(), all(worked));
    (total, total - distinct, again - distinct)
}

#[test]
fn killed_workers_lose_nothing_of_a_durable_list_and_some_of_a_bare_redis() {
    let kills = size("GOFLOW_DURABLE_KILLS", 8);
    let (fleet, _settings) = over(2);
    let (pushed, lost, again) = kill_workers(fleet.proxies[0].address(), "jobs:a", kills);
    println!("durable list, {kills} kills: {pushed} pushed, {lost} lost, {again} worked on twice");
    assert_eq!(lost, 0);
    let bare = Server::start(Flavour::Redis7, &[]);
    // Few kills may all meet workers that are still starting.
    let is_shown = (0..5).any(|_| {
        let (pushed, lost, again) = kill_workers(&bare.address(), "jobs:a", kills);
        println!("bare Redis, {kills} kills: {pushed} pushed, {lost} lost, {again} worked on twice");
        lost > 0
    });
    assert!(is_shown, "kills fall into the work, or this test shows nothing");
}

#[test]
fn a_move_puts_an_element_into_the_other_list_and_leaves_nothing_behind() {
    let (fleet, _settings) = over(2);
    let mut wire = fleet.proxies[0].wire();
    for element in ["one", "two", "three", "four"] {
        // One element a call, on one shard each in turn.
        wire.call(&["RPUSH", "jobs:a", element]);
    }
    assert_eq!(wire.say("RPOPLPUSH jobs:nosuch jobs:b"), Value::Null);
    let mut moved: Vec<String> =
        ["RPOPLPUSH jobs:a jobs:b", "LMOVE jobs:a jobs:b LEFT right", "BRPOPLPUSH jobs:a jobs:b 60"]
            .iter()
            .map(|line| wire.say(line).text())
            .collect();
    // A slow shard may have given one to the move that another had served: it comes back.
    eventually!("three are moved", {
        ((wire.say("LLEN jobs:a").integer(), wire.say("LLEN jobs:b").integer()) == (1, 3)).then_some(())
    });
    moved.push(wire.say("BLMOVE jobs:a jobs:b RIGHT LEFT 60").text());
    moved.sort();
    assert_eq!(moved, ["four", "one", "three", "two"]);
    eventually!("nothing is left", (known(&mut wire, "jobs:a") == 0).then_some(()));
    let mut there = drain(&mut wire, "jobs:b");
    there.sort();
    assert_eq!(there, moved);
    wire.say("PING");
    // A list may be turned round and round.
    wire.say("RPUSH jobs:ring x");
    for _ in 0..5 {
        assert_eq!(wire.say("RPOPLPUSH jobs:ring jobs:ring").text(), "x");
    }
    assert_eq!(known(&mut wire, "jobs:ring"), 1);
    // Who waits for a move is served by a push, and one that hangs up moves nothing.
    let mut waiting = fleet.proxies[0].wire();
    waiting.say("HELLO 3");
    waiting.send(&["BLMOVE", "jobs:c", "jobs:d", "LEFT", "LEFT", "0"]);
    let is_blocked = |wire: &mut Wire, mark: &str| wire.say("INFO clients").text().contains(mark).then_some(());
    eventually!("it waits", is_blocked(&mut wire, "blocked_clients:1\r\n"));
    wire.say("LPUSH jobs:c y");
    assert_eq!(waiting.read().text(), "y");
    waiting.send(&["BRPOPLPUSH", "jobs:c", "jobs:d", "0"]);
    eventually!("it waits", is_blocked(&mut wire, "blocked_clients:1\r\n"));
    drop(waiting);
    eventually!("its end is noticed", is_blocked(&mut wire, "blocked_clients:0\r\n"));
    wire.say("LPUSH jobs:c z");
    assert_eq!((wire.say("LLEN jobs:c").integer(), wire.say("LLEN jobs:d").integer()), (1, 1));
    assert_eq!(wire.say("BLMOVE jobs:none jobs:d LEFT LEFT 0.01"), Value::Null);
}

#[test]
fn a_proxy_that_is_killed_in_the_middle_of_moves_loses_and_doubles_nothing() {
    const ELEMENTS: usize = 300;
    let (mut fleet, _settings) = over(2);
    let mut wire = fleet.proxies[0].wire();
    for element in 0..ELEMENTS {
        wire.call(&["RPUSH", "short:a", &element.to_string()]);
    }
    drop(wire);
    for round in 1..4 {
        let address = fleet.proxies[0].address().to_owned();
        let movers: Vec<_> = (0..4)
            .map(|_| {
                let address = address.clone();
                std::thread::spawn(move || {
                    let mut wire = Wire::connect(&address);
                    while wire.try_call(&["RPOPLPUSH", "short:a", "short:b"], crate::support::patience()).is_ok() {}
                })
            })
            .collect();
        let mut wire = fleet.proxies[0].wire();
        eventually!("some are moved", (wire.say("LLEN short:b").integer() >= 40 * round).then_some(()));
        drop(wire);
        fleet.proxies[0].kill();
        movers.into_iter().for_each(|mover| mover.join().unwrap());
        fleet.proxies[0].restart();
    }
    let mut wire = fleet.proxies[0].wire();
    // What was half-way comes back when its lease has ended, and is moved again.
    eventually!("all are moved", {
        while wire.say("BRPOPLPUSH short:a short:b 0.1") != Value::Null {}
        (known(&mut wire, "short:a") == 0).then_some(())
    });
    let there = drain(&mut wire, "short:b");
    let distinct: HashSet<&String> = there.iter().collect();
    assert_eq!((there.len(), distinct.len()), (ELEMENTS, ELEMENTS));
}

#[test]
fn what_moves_after_its_shard_lost_its_last_writes_is_not_taken_for_what_moved_before() {
    // It keeps nothing, so that it gives the numbers of its jobs again.
    let mut server = Server::start(Flavour::Redis7, &[]);
    let (_dir, path) = settings(LISTS);
    let url = format!("s1={}", server.url());
    let mut goflow = Goflow::start(&["--config", &path, "--shard", &url, "--shard", "s2=memory:"]);
    goflow.expect_log("shard");
    let mut wire = goflow.wire();
    for round in 0..2 {
        let elements: Vec<String> = (0..10).map(|number| format!("{round}-{number}")).collect();
        for element in &elements {
            let enqueue = ["GOFLOW.ENQUEUE", "jobs:a", element, "SHARD", "s1"];
            eventually!("it is stored", matches!(wire.call(&enqueue), Value::Bulk(_)).then_some(()));
        }
        elements.iter().for_each(|element| assert_eq!(wire.say("BRPOPLPUSH jobs:a jobs:b 60").text(), *element));
        let mut there = drain(&mut wire, "jobs:b");
        there.sort();
        assert_eq!(there, elements);
        server.kill();
        server.restart();
    }
}

/// Pops in a connection that then says `then` and is dropped.
fn pop_and_drop(goflow: &Goflow, list: &str, then: &[&str]) {
    let mut worker = goflow.wire();
    assert_eq!(worker.call(&["BRPOP", list, "5"]).items()[1], bulk("x"));
    then.iter().for_each(|line| drop(worker.say(line)));
}

#[test]
fn each_policy_acks_when_it_says() {
    let (goflow, _settings) = alone();
    let mut wire = goflow.wire();
    let leased = |wire: &mut Wire, list: &str| wire.call(&["GOFLOW.LEN", list, "STATE", "leased"]).integer();
    for list in ["jobs:p", "now:p", "timed:p", "long:p"] {
        wire.call(&["LPUSH", list, "x"]);
    }
    // By the next command: dropped before it, the element is back at once and as new.
    pop_and_drop(&goflow, "jobs:p", &[]);
    let job = wire.say("GOFLOW.DEQUEUE jobs:p BLOCK 5000");
    assert_eq!(job.field("attempt"), &Value::Integer(1));
    wire.call(&["GOFLOW.RELEASE", "jobs:p", &job.field("receipt").text()]);
    pop_and_drop(&goflow, "jobs:p", &["PING"]);
    eventually!("it is done with", (known(&mut wire, "jobs:p") == 0).then_some(()));
    // At once: nothing comes back.
    pop_and_drop(&goflow, "now:p", &[]);
    eventually!("it is done with", (known(&mut wire, "now:p") == 0).then_some(()));
    // By time: commands say nothing, the end of the connection gives back, time acks.
    pop_and_drop(&goflow, "long:p", &["PING", "BRPOP long:p 0.01"]);
    pop_and_drop(&goflow, "long:p", &["QUIT"]);
    eventually!("it is done with", (known(&mut wire, "long:p") == 0).then_some(()));
    let mut worker = goflow.wire();
    assert_eq!(worker.say("LPOP timed:p"), bulk("x"));
    worker.say("PING");
    assert_eq!(leased(&mut wire, "timed:p"), 1);
    eventually!("its time has come", (known(&mut wire, "timed:p") == 0).then_some(()));
    drop(worker);
    assert_eq!(wire.say("GOFLOW.STATS timed:p").field("completed"), &Value::Integer(1));
    assert_eq!(wire.say("GOFLOW.STATS timed:p").field("lapsed"), &Value::Integer(0));
}

#[test]
fn what_was_sent_before_a_reply_could_be_read_does_not_ack_it() {
    let (goflow, _settings) = alone();
    let mut wire = goflow.wire();
    let pop = |worker: &mut Wire| {
        worker.send_raw(encode(&["LPOP", "jobs:pipe"]).repeat(10));
        (0..10).map(|_| worker.read().text()).collect::<Vec<_>>()
    };
    let elements: Vec<String> = (0..10).map(|number| number.to_string()).collect();
    elements.iter().for_each(|element| drop(wire.call(&["RPUSH", "jobs:pipe", element])));
    for _ in 0..2 {
        let mut worker = goflow.wire();
        assert_eq!(pop(&mut worker), elements);
        drop(worker);
        eventually!("all are back", (wire.say("LLEN jobs:pipe") == Value::Integer(10)).then_some(()));
    }
    let mut worker = goflow.wire();
    assert_eq!(pop(&mut worker), elements);
    worker.say("PING");
    eventually!("all are done with", (known(&mut wire, "jobs:pipe") == 0).then_some(()));
    // The same of what stood behind a pop that waited.
    worker.send_raw([encode(&["BRPOP", "jobs:pipe", "0"]), encode(&["PING"])].concat());
    wire.say("LPUSH jobs:pipe x");
    assert_eq!((worker.read(), worker.read()), (array(&["jobs:pipe", "x"]), Value::Simple("PONG".into())));
    drop(worker);
    eventually!("it is back", (wire.say("LLEN jobs:pipe") == Value::Integer(1)).then_some(()));
}

#[test]
fn a_pop_waits_as_long_as_it_says() {
    let (goflow, _settings) = with(&format!("{LISTS}\n[limits]\nblock_ms_max = 50\n"));
    let (mut wire, mut worker) = (goflow.wire(), goflow.wire());
    for line in ["BRPOP jobs:w 0", "BLMPOP 30 1 jobs:w LEFT", "BLMOVE jobs:w jobs:v LEFT LEFT 0"] {
        worker.say("PING");
        worker.send(&line.split(' ').collect::<Vec<_>>());
        assert!(worker.try_read(Duration::from_millis(300)).is_err(), "{line}");
        wire.say("LPUSH jobs:w x");
        worker.read();
    }
    // What is GoFlow's own is bounded as ever.
    assert_eq!(wire.say("GOFLOW.DEQUEUE jobs:w BLOCK 0"), Value::Null);
}

#[test]
fn a_push_that_was_stored_in_part_says_so() {
    let (mut fleet, _settings) = over(2);
    fleet.expect_failures();
    let mut wire = fleet.proxies[0].wire();
    wire.say("RPUSH jobs:part a b");
    fleet.shards[1].stop();
    let told = wire.say("RPUSH jobs:part a b");
    assert!(told.is_error("SHARDDOWN") && told.text().contains("other shards have done their part"), "{told:?}");
    fleet.shards[1].cont();
}

#[test]
fn a_connection_holds_so_many_unacked_elements_and_no_more() {
    let (goflow, _settings) = alone();
    let mut wire = goflow.wire();
    let elements = vec!["x"; 10_000];
    wire.call(&[&["RPUSH", "long:q"], &elements[..]].concat());
    wire.say("RPUSH long:q last");
    assert_eq!(wire.say("LPOP long:q 9999").items().len(), 9_999);
    assert_eq!(wire.say("LPOP long:q"), bulk("x"));
    let refused = wire.say("LPOP long:q");
    assert!(refused.is_error("OVERLOADED") && refused.text().contains("10000"), "{refused:?}");
    assert!(wire.say("BRPOP long:q 1").is_error("OVERLOADED"));
    assert_eq!(goflow.wire().say("LPOP long:q"), bulk("last"));
    let mut wire = goflow.wire();
    assert!(wire.say("LPOP jobs:many 10001").is_error("TOOBIG"));
    let lists = vec!["jobs:many"; 129];
    let refused = wire.call(&[&["BRPOP"], &lists[..], &["1"]].concat());
    assert!(refused.is_error("TOOBIG") && refused.text().contains("128"), "{refused:?}");
    assert!(wire.call(&[&["RPUSH", "jobs:many", "one more"], &elements[..]].concat()).is_error("TOOBIG"));
}

#[test]
fn what_a_list_in_parts_cannot_mean_is_refused_by_name() {
    let (goflow, _settings) = alone();
    let mut wire = goflow.wire();
    wire.say("RPUSH jobs:r a b c");
    for (line, why) in [
        ("LINDEX jobs:r 0", "places"),
        ("LSET jobs:r 0 x", "places"),
        ("LINSERT jobs:r BEFORE a x", "places"),
        ("LPOS jobs:r a", "places"),
        ("LTRIM jobs:r 0 1", "places"),
        ("LRANGE jobs:r 0 -1", "order"),
        ("LREM jobs:r 1 a", "acked"),
        ("LPUSHX jobs:r x", "empty"),
        ("RENAME jobs:r jobs:s", "whole"),
        ("EXPIRE jobs:r 10", "end"),
        ("EVAL return_1 1 jobs:r", "script"),
        ("WATCH jobs:r", "transaction"),
        ("SET jobs:r x", "not for lists"),
        ("INCR jobs:r", "not for lists"),
        ("BRPOP jobs:r plain 0", "one pattern"),
        ("LMOVE jobs:r plain LEFT LEFT", "one pattern"),
        ("RPOPLPUSH jobs:r now:r", "one pattern"),
        ("RPOPLPUSH plain jobs:r", "one pattern"),
        ("LMOVE jobs:r jobs:s UP LEFT", "syntax"),
        ("LMPOP 1 jobs:r UP", "syntax"),
        ("LMPOP 1 jobs:r LEFT COUNT", "syntax"),
        ("BLMPOP 0 1 jobs:r", "wrong number of arguments"),
        ("BRPOP jobs:r -1", "negative"),
        ("BRPOP jobs:r x", "not a float"),
        ("LPOP jobs:r -1", "value is out of range, must be positive"),
        ("RPOP jobs:r x", "value is out of range, must be positive"),
        ("LPOP jobs:r 1 2", "wrong number of arguments for 'lpop' command"),
        ("LMPOP 1 jobs:r LEFT COUNT 0", "greater than 0"),
        ("LPUSH jobs:r", "wrong number of arguments"),
        ("LPUSH jobs:{r} x", "invalid"),
    ] {
        let refused = wire.say(line);
        assert!(refused.is_error("ERR") && refused.text().contains(why), "{line}: {refused:?}");
    }
    wire.say("MULTI");
    assert!(wire.say("RPUSH jobs:r x").is_error("ERR"));
    assert!(wire.say("EXEC").is_error("EXECABORT"));
    // Nothing of it was done; what has a meaning is.
    assert_eq!(wire.say("LLEN jobs:r"), Value::Integer(3));
    assert_eq!(wire.say("EXISTS jobs:r jobs:none jobs:r"), Value::Integer(2));
    assert_eq!((wire.say("TYPE jobs:r").text(), wire.say("TYPE jobs:none").text()), ("list".into(), "none".into()));
    assert_eq!(wire.say("LMPOP 2 jobs:none jobs:r LEFT COUNT 2").items()[1], array(&["a", "b"]));
    assert_eq!(wire.say("LPOP jobs:r 0"), Value::Null);
    assert_eq!(wire.say("DEL jobs:r jobs:none"), Value::Integer(1));
    assert_eq!(wire.say("LLEN jobs:r"), Value::Integer(0));
    assert_eq!(wire.say("LPOP jobs:r"), Value::Null);
    // Nor by a RESP2 subscriber, who says nothing else.
    wire.say("SUBSCRIBE news");
    assert!(wire.say("LPUSH jobs:r x").text().starts_with("ERR Can't execute 'lpush'"));
}
