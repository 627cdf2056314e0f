//! Locks and semaphores under stock clients in two languages, on three proxies, while these and the shards are killed and
//! paused at random: who held what when, held against each other.
//!
//! redis-py and ioredis (`tests/clients/contend.py`, `contend.js`) write down when each of their clients surely held an
//! object. At the end there are never more of them at once than may be, the fences of a lock grow with its grants, and every
//! client had its share. The check itself is checked with clients that release without comparing the token. Sizes:
//! `GOFLOW_CONTEST_CLIENTS`, `GOFLOW_CONTEST_GRANTS` (for each client), `GOFLOW_CONTEST_FAULTS`; `GOFLOW_LOCK_ROUNDS` for what
//! a lock costs, whose bounds are asserted only where `GOFLOW_LOCK_BOUNDS` asks for it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rand::Rng;
use tempfile::TempDir;

use crate::eventually;
use crate::support::fleet::Fleet;
use crate::support::process::{Process, Program, cpu_ms, on_path, venv};
use crate::support::{scratch, size};

const TTL_MS: u64 = 1_000;
const OBJECTS: usize = 8;

/// One time in which one client surely held one object, in microseconds.
#[derive(Clone, Debug)]
struct Held {
    asked: u64,
    from: u64,
    to: u64,
    let_go: u64,
    fence: u64,
}

/// Clients in both languages, at work.
struct Crowd {
    dir: TempDir,
    programs: Vec<Process>,
}

impl Crowd {
    /// `blind`: the clients in Python release without comparing the token, on this shard.
    fn start(addresses: &str, kind: &str, limit: usize, blind: Option<&str>) -> Crowd {
        let (clients, mut grants) = (size("GOFLOW_CONTEST_CLIENTS", 16), size("GOFLOW_CONTEST_GRANTS", 12));
        let mut objects = OBJECTS;
        if blind.is_some() {
            // They hold too long so often that more of them would take hours; few objects, so that they meet.
            (grants, objects) = (grants.min(30), 2);
        }
        let dir = scratch();
        let start = |number: usize| {
            let (program, script) = match number {
                0 => (venv().join("bin/python"), "contend.py"),
                _ => (on_path("node").unwrap(), "contend.js"),
            };
            let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(script);
            let log = dir.path().join(format!("log{number}"));
            let numbers = [limit, objects, clients / 2, grants, TTL_MS as usize].map(|number| number.to_string());
            let words = [log.display().to_string(), addresses.into(), kind.into()].into_iter().chain(numbers);
            let words = words.chain([format!("c{number}")]).chain(blind.filter(|_| number == 0).map(str::to_owned));
            Process::start(&Program {
                path: program,
                args: std::iter::once(script.into_os_string()).chain(words.map(Into::into)).collect(),
                env: vec![("NODE_PATH".into(), venv().parent().unwrap().join("clients/node_modules").into())],
                dir: dir.path().to_owned(),
            })
        };
        let programs = (0..2).map(start).collect();
        Crowd { dir, programs }
    }

    /// What was written so far, by object.
    fn histories(&self) -> BTreeMap<String, Vec<Held>> {
        let mut all: BTreeMap<String, Vec<Held>> = BTreeMap::new();
        for number in 0..2 {
            let text = std::fs::read_to_string(self.dir.path().join(format!("log{number}"))).unwrap_or_default();
            // A line that is being written is not one yet.
            for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
                let words: Vec<&str> = line.split_whitespace().collect();
                let number = |at: usize| words[at].parse().unwrap();
                let (asked, from, to, let_go, fence) = (number(0), number(1), number(2), number(3), number(4));
                all.entry(words[5].into()).or_default().push(Held { asked, from, to, let_go, fence });
            }
        }
        all.values_mut().for_each(|held| held.sort_by_key(|held| held.from));
        all
    }

    fn grants(&self) -> usize {
        self.histories().values().map(Vec::len).sum()
    }

    fn is_done(&mut self) -> bool {
        self.programs.iter_mut().all(|program| !program.is_running())
    }

    /// Waits until every client had its share, and gives what they held.
    fn finish(mut self) -> BTreeMap<String, Vec<Held>> {
        eventually!("every client has its share", self.is_done().then_some(()));
        for program in &self.programs {
            program.stdout.wait_for("done");
        }
        self.histories()
    }
}

/// Most that held it at once.
fn most_at_once(held: &[Held]) -> usize {
    let at = |one: &Held| held.iter().filter(|other| other.from <= one.from && one.from < other.to).count();
    held.iter().map(at).max().unwrap_or(0)
}

/// What is wrong with these histories, if anything.
fn verdict(histories: &BTreeMap<String, Vec<Held>>, limit: usize, is_lock: bool) -> Result<(), String> {
    for (object, held) in histories {
        let most = most_at_once(held);
        if most > limit {
            return Err(format!("{most} held {object} at once"));
        }
        if let Some(pair) = held.windows(2).find(|pair| is_lock && pair[0].fence >= pair[1].fence) {
            return Err(format!("a fence of {object} did not grow: {pair:?}"));
        }
    }
    Ok(())
}

/// From a holder's release to the answer of who waited for it then: the median in microseconds.
fn hand_over_us(histories: &BTreeMap<String, Vec<Held>>) -> Option<u64> {
    let pairs = histories.values().flat_map(|held| held.windows(2));
    let mut times: Vec<u64> = pairs
        .filter(|pair| pair[1].asked < pair[0].let_go && pair[0].to == pair[0].let_go)
        .map(|pair| pair[1].from.saturating_sub(pair[0].let_go))
        .collect();
    times.sort_unstable();
    times.get(times.len() / 2).copied()
}

/// Clients contend while proxies and shards are killed and paused; their histories.
fn contest(kind: &str, limit: usize) -> BTreeMap<String, Vec<Held>> {
    let faults = size("GOFLOW_CONTEST_FAULTS", 6);
    let mut fleet = Fleet::start(2, 3, &[]);
    fleet.expect_failures();
    fleet.proxies.iter_mut().for_each(|proxy| proxy.expect_log("slow"));
    let addresses: Vec<&str> = fleet.proxies.iter().map(|proxy| proxy.address()).collect();
    let mut crowd = Crowd::start(&addresses.join(","), kind, limit, None);
    let mut random = rand::rng();
    for fault in 0..faults {
        let before = crowd.grants();
        match fault % 4 {
            0 => fleet.proxies[random.random_range(0..3)].restart(),
            1 => fleet.shards[random.random_range(0..2)].restart(),
            which => {
                // As long as a ttl, more or less: holders run out, and do not know.
                let pause = Duration::from_millis(random.random_range(TTL_MS / 4..TTL_MS * 2));
                let (proxy, shard) = (random.random_range(0..3), random.random_range(0..2));
                if which == 2 {
                    fleet.proxies[proxy].stop()
                } else {
                    fleet.shards[shard].stop()
                }
                std::thread::sleep(pause);
                if which == 2 { fleet.proxies[proxy].cont() } else { fleet.shards[shard].cont() }
            }
        }
        eventually!("the clients go on", (crowd.grants() > before + OBJECTS || crowd.is_done()).then_some(()));
    }
    let histories = crowd.finish();
    let grants: usize = histories.values().map(Vec::len).sum();
    println!("{kind} {limit}: {grants} grants over {faults} faults, hand-over {:?} µs", hand_over_us(&histories));
    histories
}

#[test]
fn a_lock_has_one_holder_whoever_is_killed_or_paused() {
    verdict(&contest("LOCK", 1), 1, true).unwrap();
}

#[test]
fn a_semaphore_has_no_more_holders_than_its_limit_whoever_is_killed_or_paused() {
    for limit in [1, 5, 100] {
        verdict(&contest("SEM", limit), limit, false).unwrap();
    }
}

#[test]
fn a_release_that_does_not_compare_the_token_is_found_out() {
    let fleet = Fleet::start(1, 3, &[]);
    let addresses: Vec<&str> = fleet.proxies.iter().map(|proxy| proxy.address()).collect();
    let crowd = Crowd::start(&addresses.join(","), "LOCK", 1, Some(&fleet.shards[0].address()));
    let why = verdict(&crowd.finish(), 1, true).expect_err("the check sees nothing");
    assert!(why.contains("contended-"), "{why}");
}

/// What a hand-over costs, and not what a crowded interpreter does: clients without an interpreter, who hold for a while.
#[test]
fn waiters_take_over_when_nothing_fails() {
    const HOLD: Duration = Duration::from_millis(10);
    let (clients, grants) = (size("GOFLOW_CONTEST_CLIENTS", 16), size("GOFLOW_CONTEST_GRANTS", 12));
    let fleet = Fleet::start(2, 3, &[]);
    let histories: Mutex<BTreeMap<String, Vec<Held>>> = Mutex::default();
    let began = Instant::now();
    let micros = || began.elapsed().as_micros() as u64;
    std::thread::scope(|scope| {
        for client in 0..clients {
            let mut wire = fleet.proxies[client % 3].wire();
            let (histories, micros) = (&histories, &micros);
            scope.spawn(move || {
                // As many for each object, from each proxy.
                let name = format!("handed-{}", client / 3 % OBJECTS.min(clients / 3));
                for _ in 0..grants {
                    let asked = micros();
                    let granted = wire.call(&["GOFLOW.LOCK", "ACQUIRE", &name, "60000", "WAIT", "60000"]);
                    let from = micros();
                    let (token, fence) = (granted.items()[0].text(), granted.items()[1].integer() as u64);
                    std::thread::sleep(HOLD);
                    let let_go = micros();
                    assert_eq!(wire.call(&["GOFLOW.LOCK", "RELEASE", &name, &token]).integer(), 1);
                    let held = Held { asked, from, to: let_go, let_go, fence };
                    histories.lock().unwrap().entry(name.clone()).or_default().push(held);
                }
            });
        }
    });
    let mut histories = histories.into_inner().unwrap();
    histories.values_mut().for_each(|held| held.sort_by_key(|held| held.from));
    verdict(&histories, 1, true).unwrap();
    let median = hand_over_us(&histories).expect("somebody waited");
    println!("hand-over of a lock among {clients} clients: median {median} µs");
    if std::env::var_os("GOFLOW_LOCK_BOUNDS").is_some() {
        assert!(median < 1_000, "{median} µs");
    }
}

#[test]
fn fifty_connections_take_and_release_free_locks() {
    let rounds = size("GOFLOW_LOCK_ROUNDS", 40);
    let fleet = Fleet::start_plain(1, 1, &[]);
    let (proxy, shard) = (fleet.proxies[0].id(), fleet.shards[0].id());
    let mut wires: Vec<_> = (0..50).map(|_| fleet.proxies[0].wire()).collect();
    let before = (cpu_ms(proxy), cpu_ms(shard));
    std::thread::scope(|scope| {
        for (number, wire) in wires.iter_mut().enumerate() {
            scope.spawn(move || {
                let name = format!("free-{number}");
                for round in 1..=rounds {
                    let granted = wire.call(&["GOFLOW.LOCK", "ACQUIRE", &name, "60000"]);
                    assert_eq!(granted.items()[1].integer(), round as i64);
                    let token = granted.items()[0].text();
                    assert_eq!(wire.call(&["GOFLOW.LOCK", "RELEASE", &name, &token]).integer(), 1);
                }
            });
        }
    });
    let commands = (2 * 50 * rounds) as f64;
    let each = |before: u64, after: u64| (after - before) as f64 * 1_000.0 / commands;
    let (of_proxy, of_shard) = (each(before.0, cpu_ms(proxy)), each(before.1, cpu_ms(shard)));
    println!(
        "{commands} commands on 50 connections: {of_proxy:.1} µs of the proxy and {of_shard:.1} µs of Redis for each"
    );
    if std::env::var_os("GOFLOW_LOCK_BOUNDS").is_some() {
        assert!(of_proxy <= 8.0 && of_shard <= 5.0, "{of_proxy} and {of_shard} µs");
    }
}

#[test]
fn the_check_sees_overlaps_and_fences_that_do_not_grow() {
    let held = |from, to, fence| Held { asked: from, from, to, let_go: to, fence };
    let histories = |held: Vec<Held>| BTreeMap::from([("a".to_owned(), held)]);
    assert!(verdict(&histories(vec![held(0, 5, 1), held(5, 9, 2)]), 1, true).is_ok());
    assert!(verdict(&histories(vec![held(0, 5, 1), held(4, 9, 2)]), 1, true).is_err());
    assert!(verdict(&histories(vec![held(0, 5, 1), held(4, 9, 2)]), 2, false).is_ok());
    assert!(verdict(&histories(vec![held(0, 5, 2), held(6, 9, 2)]), 1, true).is_err());
}
