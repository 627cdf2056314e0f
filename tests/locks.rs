//! Locks and semaphores through real proxies: never too many holders, whoever is killed; waiters in their order; bonds.
//!
//! Clients on two proxies contend for one object of a Redis shard while proxies and the shard are killed. Each writes down
//! when it surely held the object and under which fence; at the end the histories are held against each other.
//! `GOFLOW_LOCK_GRANTS` and `GOFLOW_LOCK_KILLS` set the size.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use goflow::shard::redis::Redis;
use goflow::shard::{Action, Deed, Keyed, Op, Outcome, Rules, Shard, Wake};

use crate::conformance::trial::name;
use crate::eventually;
use crate::support::goflow::Goflow;
use crate::support::patience;
use crate::support::process::{Process, Program};
use crate::support::scratch;
use crate::support::servers::{Flavour, Sentinels, Server};
use crate::support::wire::{Value, Wire};

fn size(variable: &str, small: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(small)
}

/// The token and the fence of a lock that is granted.
fn grant(reply: &Value) -> (String, i64) {
    match reply.items() {
        [token, fence] => (token.text(), fence.integer()),
        _ => panic!("not granted: {reply:?}"),
    }
}

fn waiting(wire: &mut Wire, lock: &str) -> i64 {
    wire.call(&["GOFLOW.LOCK", "INFO", lock]).field("waiting").integer()
}

/// One time in which a client surely held the object: from the answer to its claim to its release, which counted.
#[derive(Clone, Copy, Debug)]
struct Held {
    from: Instant,
    to: Instant,
    fence: i64,
}

/// Takes the object again and again through this proxy, until all clients together have held it often enough.
fn contend(address: &str, claim: &[&str], release: &str, count: &AtomicUsize, grants: usize, log: &Mutex<Vec<Held>>) {
    let mut wire = None;
    while count.load(Ordering::Relaxed) < grants {
        let Some(link) = wire.as_mut() else {
            wire = Wire::try_connect(address);
            continue;
        };
        let Some(held) = hold_once(link, claim, release) else {
            wire = None;
            continue;
        };
        if let Some(held) = held {
            log.lock().unwrap().push(held);
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// `None`: the connection broke. `Some(None)`: it was not held all the time, or nobody can say.
fn hold_once(wire: &mut Wire, claim: &[&str], release: &str) -> Option<Option<Held>> {
    let reply = wire.try_call(claim, patience()).ok()?;
    let from = Instant::now();
    let (token, fence) = match &reply {
        Value::Array(_) => grant(&reply),
        Value::Bulk(_) => (reply.text(), 0),
        _ => return Some(None),
    };
    wire.try_call(&["PING"], patience()).ok()?;
    let to = Instant::now();
    let released = wire.try_call(&[claim[0], release, "shared", &token], patience()).ok()?;
    Some((released == Value::Integer(1)).then_some(Held { from, to, fence }))
}

/// Eight clients on two proxies, with kills between; what they held.
fn contest(claim: &'static [&'static str]) -> Vec<Held> {
    let (grants, kills) = (size("GOFLOW_LOCK_GRANTS", 400), size("GOFLOW_LOCK_KILLS", 3));
    let mut shard = Server::start(Flavour::Redis7, Server::DURABLE);
    let named = format!("s1={}", shard.url());
    let mut proxies: Vec<Goflow> = (0..2).map(|_| Goflow::start(&["--shard", &named])).collect();
    proxies.iter_mut().for_each(|proxy| proxy.expect_log("shard"));
    let (count, log) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(Vec::new())));
    let clients: Vec<_> = (0..8)
        .map(|number| {
            let (count, log, address) = (count.clone(), log.clone(), proxies[number % 2].address().to_owned());
            std::thread::spawn(move || contend(&address, claim, "RELEASE", &count, grants, &log))
        })
        .collect();
    for kill in 0..kills {
        let target = grants * (kill + 1) / (kills + 2);
        eventually!("the clients go on", (count.load(Ordering::Relaxed) >= target).then_some(()));
        match kill % 2 {
            0 => proxies[kill / 2 % 2].restart(),
            _ => shard.restart(),
        }
    }
    clients.into_iter().for_each(|client| client.join().unwrap());
    let mut held = log.lock().unwrap().clone();
    assert!(held.len() >= grants, "a client stopped");
    held.sort_by_key(|held| held.from);
    held
}

/// Most that held it at once.
fn most_at_once(held: &[Held]) -> usize {
    let at = |one: &Held| held.iter().filter(|other| other.from <= one.from && one.from < other.to).count();
    held.iter().map(at).max().unwrap_or(0)
}

#[test]
fn a_lock_never_has_two_holders_when_proxies_and_its_shard_are_killed() {
    let held = contest(&["GOFLOW.LOCK", "ACQUIRE", "shared", "1000", "WAIT", "3000"]);
    assert_eq!(most_at_once(&held), 1, "two held the lock at once");
    for pair in held.windows(2) {
        assert!(pair[0].fence < pair[1].fence, "a fence went back: {pair:?}");
    }
}

#[test]
fn a_semaphore_never_has_more_than_its_limit_when_proxies_and_its_shard_are_killed() {
    let held = contest(&["GOFLOW.SEM", "ACQUIRE", "shared", "3", "1000", "WAIT", "3000"]);
    assert!(most_at_once(&held) <= 3, "{} held a semaphore of 3", most_at_once(&held));
}

#[test]
fn the_check_sees_who_held_it_with_another() {
    let began = Instant::now();
    let at = |ms| began + Duration::from_millis(ms);
    let held = |from, to| Held { from: at(from), to: at(to), fence: 0 };
    assert_eq!(most_at_once(&[held(0, 5), held(5, 9), held(9, 20)]), 1);
    assert_eq!(most_at_once(&[held(0, 5), held(4, 9), held(9, 20)]), 2);
    assert_eq!(most_at_once(&[held(0, 50), held(5, 9), held(6, 7)]), 3);
}

#[test]
fn waiters_of_one_proxy_are_served_in_the_order_they_came() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let mut first = goflow.wire();
    let (token, fence) = grant(&first.say("GOFLOW.LOCK ACQUIRE line 600000"));
    let mut waiters: Vec<Wire> = (1..=5)
        .map(|place| {
            let mut wire = goflow.wire();
            wire.send(&["GOFLOW.LOCK", "ACQUIRE", "line", "600000", "WAIT", "600000"]);
            eventually!("it stands in line", (waiting(&mut first, "line") == place).then_some(()));
            wire
        })
        .collect();
    assert_eq!(first.call(&["GOFLOW.LOCK", "RELEASE", "line", &token]), Value::Integer(1));
    for (place, waiter) in waiters.iter_mut().enumerate() {
        let (token, own) = grant(&waiter.read());
        assert_eq!(own, fence + 1 + place as i64, "somebody came before waiter {place}");
        assert_eq!(waiter.call(&["GOFLOW.LOCK", "RELEASE", "line", &token]), Value::Integer(1));
    }
}

#[test]
fn a_waiter_takes_over_when_the_holders_time_is_up_and_gives_up_when_its_own_is() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let (mut holder, mut waiter) = (goflow.wire(), goflow.wire());
    let (_, fence) = grant(&holder.say("GOFLOW.LOCK ACQUIRE short 300"));
    let (_, next) = grant(&waiter.say("GOFLOW.LOCK ACQUIRE short 600000 WAIT 600000"));
    assert_eq!(next, fence + 1);
    assert_eq!(holder.say("GOFLOW.LOCK ACQUIRE short 300 WAIT 20"), Value::Null);
    assert_eq!(waiting(&mut holder, "short"), 0);
    let slot = holder.say("GOFLOW.SEM ACQUIRE pair 1 300").text();
    assert_ne!(waiter.say("GOFLOW.SEM ACQUIRE pair 1 600000 WAIT 600000").text(), slot);
    assert_eq!(holder.say("GOFLOW.SEM AVAILABLE pair 3"), Value::Integer(2));
}

#[test]
fn a_waiter_that_hangs_up_gets_nothing_and_keeps_nothing() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let (mut holder, mut waiter) = (goflow.wire(), goflow.wire());
    let (token, fence) = grant(&holder.say("GOFLOW.LOCK ACQUIRE gone 600000"));
    waiter.send(&["GOFLOW.LOCK", "ACQUIRE", "gone", "600000", "WAIT", "600000"]);
    eventually!("it waits", (waiting(&mut holder, "gone") == 1).then_some(()));
    drop(waiter);
    eventually!("it has left the line", (waiting(&mut holder, "gone") == 0).then_some(()));
    assert_eq!(holder.call(&["GOFLOW.LOCK", "RELEASE", "gone", &token]), Value::Integer(1));
    let (_, next) = grant(&holder.say("GOFLOW.LOCK ACQUIRE gone 600000"));
    assert_eq!(next, fence + 1, "the waiter that was gone was granted the lock");
}

#[test]
fn a_bound_lock_is_renewed_while_its_client_lives_and_free_when_it_is_killed() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let (_, port) = goflow.address().rsplit_once(':').unwrap();
    let dir = scratch();
    let script = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{port}; printf 'GOFLOW.LOCK ACQUIRE bound 4500 BIND OWNER child\\r\\n' >&3; exec cat <&3"
    );
    let mut child = Process::start(&Program {
        path: PathBuf::from("/bin/bash"),
        args: vec!["-c".into(), script.into()],
        env: Vec::new(),
        dir: dir.path().to_owned(),
    });
    let mut wire = goflow.wire();
    let left = |wire: &mut Wire| match wire.say("GOFLOW.LOCK INFO bound") {
        Value::Null => None,
        info => Some(info.field("ttl").integer()),
    };
    let mut last = eventually!("the child has it", left(&mut wire));
    let mut renewals = 0;
    // Four renewals are more than its ttl.
    eventually!("it is renewed", {
        let now = left(&mut wire).expect("a bound lock ran out");
        renewals += usize::from(now > last);
        last = now;
        (renewals >= 4).then_some(())
    });
    child.kill();
    let (token, fence) = grant(&wire.say("GOFLOW.LOCK ACQUIRE bound 600000 WAIT 600000"));
    assert_eq!(fence, 2);
    assert_eq!(wire.call(&["GOFLOW.LOCK", "RELEASE", "bound", &token]), Value::Integer(1));
}

#[test]
fn the_end_of_a_connection_gives_back_what_is_bound_to_it_and_nothing_else() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let (mut one, mut other) = (goflow.wire(), goflow.wire());
    let (token, _) = grant(&one.say("GOFLOW.LOCK ACQUIRE a 600000 BIND"));
    assert_eq!(one.call(&["GOFLOW.LOCK", "RELEASE", "a", &token]), Value::Integer(1));
    let (kept, _) = grant(&one.say("GOFLOW.LOCK ACQUIRE b 600000"));
    one.say("GOFLOW.SEM ACQUIRE c 1 600000 BIND");
    let (own, _) = grant(&other.say("GOFLOW.LOCK ACQUIRE a 600000"));
    drop(one);
    other.say("GOFLOW.SEM ACQUIRE c 1 600000 WAIT 600000").text();
    assert_eq!(other.call(&["GOFLOW.LOCK", "RENEW", "a", &own, "600000"]), Value::Integer(1));
    assert_eq!(other.call(&["GOFLOW.LOCK", "RELEASE", "b", &kept]), Value::Integer(1), "any connection may release");
}

#[test]
fn a_lock_and_its_fences_go_over_to_a_replica_that_has_them() {
    let mut trio = Sentinels::start(Flavour::Redis7, 1);
    let mut goflow = Goflow::start(&["--shard", &format!("s1={}", trio.url())]);
    goflow.expect_log("shard");
    let mut wire = goflow.wire();
    for _ in 0..5 {
        let (token, _) = grant(&wire.say("GOFLOW.LOCK ACQUIRE ha 600000"));
        assert_eq!(wire.call(&["GOFLOW.LOCK", "RELEASE", "ha", &token]), Value::Integer(1));
    }
    let (token, fence) = grant(&wire.say("GOFLOW.LOCK ACQUIRE ha 600000"));
    assert_eq!(fence, 6);
    let stored = |server: &Server| server.wire().say("GET goflow:{!lock}:ha");
    let granted = stored(&trio.master);
    eventually!("the replica has the grant", (stored(&trio.replicas[0]) == granted).then_some(()));
    trio.master.kill();
    let renewed = eventually!("the replica took over", {
        let answer = wire.call(&["GOFLOW.LOCK", "RENEW", "ha", &token, "600000"]);
        (!answer.is_error("SHARDDOWN")).then_some(answer)
    });
    assert_eq!(renewed, Value::Integer(1), "its holder still has it");
    assert_eq!(wire.say("GOFLOW.LOCK ACQUIRE ha 600000"), Value::Null);
    assert_eq!(wire.call(&["GOFLOW.LOCK", "RELEASE", "ha", &token]), Value::Integer(1));
    assert_eq!(grant(&wire.say("GOFLOW.LOCK ACQUIRE ha 600000")).1, 7);
}

#[test]
fn another_proxy_hears_when_an_awaited_object_is_freed() {
    let server = Server::start(Flavour::Redis7, &[]);
    let url = server.url();
    let (heard, wakes) = mpsc::channel();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let (one, other) = (connect(&url).await, connect(&url).await);
        other.watch(Arc::new(move |wake| drop(heard.send(wake))));
        assert_eq!(wakes.recv_timeout(patience()).unwrap(), Wake::Missed, "it listens");
        for kind in [Keyed::Lock, Keyed::Semaphore] {
            let acquire = |token, waits| Deed::Acquire {
                token,
                limit: 1,
                ttl_ms: 600_000,
                owner: Bytes::new(),
                waits,
                moved_in: 0,
            };
            assert!(matches!(apply(&one, kind, acquire(1, false)).await, Outcome::Granted { .. }));
            assert_eq!(apply(&one, kind, Deed::Release { token: 1 }).await, Outcome::Count(1));
            assert!(matches!(apply(&one, kind, acquire(2, false)).await, Outcome::Granted { .. }));
            assert!(matches!(apply(&other, kind, acquire(3, true)).await, Outcome::NotFree { .. }));
            assert_eq!(apply(&one, kind, Deed::Release { token: 2 }).await, Outcome::Count(1));
            // The first release is not announced: nobody waited then.
            assert_eq!(wakes.recv_timeout(patience()).unwrap(), Wake::Freed(kind, name("a")));
        }
        assert_eq!(wakes.recv_timeout(Duration::ZERO), Err(mpsc::RecvTimeoutError::Timeout));
    });
}

async fn connect(url: &str) -> Redis {
    Redis::connect(url, "s1", Rules::default()).await.unwrap()
}

async fn apply(shard: &Redis, kind: Keyed, deed: Deed) -> Outcome {
    let op = Op { queue: name("a"), action: Action::Keyed { kind, deed } };
    shard.apply(vec![op], None).await.outcomes.remove(0).unwrap()
}
