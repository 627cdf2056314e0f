//! A fleet is replaced under load: HAProxy with `deploy/haproxy.cfg` in front of three proxies over four shards, producers at
//! a steady rate, twenty workers; each proxy in turn gets SIGTERM, drains, and is started anew.
//!
//! Clients reconnect and say again what was not answered, as client libraries do. No error may be heard, every acknowledged job
//! must be run, and none twice. `GOFLOW_FLEET_RATE` (jobs a second) and `GOFLOW_FLEET_JOBS` set the size.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::eventually;
use crate::support::goflow::Goflow;
use crate::support::process::{Process, Program, on_path};
use crate::support::servers::{Flavour, Server};
use crate::support::wire::{Value, Wire};
use crate::support::{free_port, patience, scratch};

const PRODUCERS: usize = 4;
const WORKERS: usize = 20;

fn size(variable: &str, small: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(small)
}

/// What all clients saw.
#[derive(Default)]
struct Seen {
    acknowledged: AtomicUsize,
    completed: AtomicUsize,
    reconnects: AtomicUsize,
    errors: Mutex<Vec<String>>,
    /// How often a worker began each job.
    runs: Mutex<HashMap<String, usize>>,
    finished: AtomicBool,
}

/// A client that reconnects and says again what was not answered.
struct Client {
    address: String,
    wire: Option<Wire>,
    seen: Arc<Seen>,
}

impl Client {
    fn new(address: &str, seen: &Arc<Seen>) -> Client {
        Client { address: address.into(), wire: None, seen: seen.clone() }
    }

    fn call(&mut self, words: &[&str]) -> Value {
        loop {
            let fresh = self.wire.is_none();
            if fresh {
                self.wire = Wire::try_connect(&self.address);
            }
            let answer = self.wire.as_mut().map(|wire| wire.try_call(words, patience()));
            match answer {
                Some(Ok(Value::Error(text))) => {
                    self.seen.errors.lock().unwrap().push(text);
                    return Value::Null;
                }
                Some(Ok(value)) => return value,
                Some(Err(_)) | None => {
                    self.wire = None;
                    self.seen.reconnects.fetch_add(1, Ordering::Relaxed);
                    if fresh {
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
            }
        }
    }
}

/// Adds its share of the jobs at its share of the rate.
fn produce(mut client: Client, number: usize, jobs: usize, every: Duration) {
    let began = Instant::now();
    for job in 0..jobs {
        let due = began + every * job as u32;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let id = format!("p{number}-{job}");
        if client.call(&["GOFLOW.ENQUEUE", "main", "payload", "ID", &id]).text() == id {
            client.seen.acknowledged.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn work(mut client: Client) {
    while !client.seen.finished.load(Ordering::Relaxed) {
        let job = client.call(&["GOFLOW.DEQUEUE", "main", "BLOCK", "500", "LEASE", "60000"]);
        if job == Value::Null {
            continue;
        }
        let (id, receipt) = (job.field("id").text(), job.field("receipt").text());
        *client.seen.runs.lock().unwrap().entry(id).or_default() += 1;
        if client.call(&["GOFLOW.ACK", "main", &receipt]) == Value::Integer(1) {
            client.seen.completed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// HAProxy as deployed, but for where it listens and where the proxies are.
fn balancer(proxies: &[(String, u16)]) -> (Process, String, tempfile::TempDir) {
    let (port, figures) = (free_port(), free_port());
    let text = include_str!("../deploy/haproxy.cfg");
    let (before, _) = text.split_once("    server-template ").unwrap();
    let after = text.split_once("tasks.proxy:6380\n").unwrap().1;
    let servers: String =
        proxies.iter().map(|(address, http)| format!("    server p{http} {address} port {http}\n")).collect();
    let config = format!("{before}{servers}{after}")
        .replace("bind :6380", &format!("bind 127.0.0.1:{port}"))
        .replace("bind :8404", &format!("bind 127.0.0.1:{figures}"))
        .replace(" init-addr none resolvers swarm resolve-prefer ipv4", "");
    let dir = scratch();
    std::fs::write(dir.path().join("haproxy.cfg"), config).unwrap();
    let program = Program {
        path: on_path("haproxy").expect("haproxy (run .ci/setup)"),
        args: ["-db", "-f", "haproxy.cfg"].map(Into::into).to_vec(),
        env: Vec::new(),
        dir: dir.path().to_owned(),
    };
    (Process::start(&program), format!("127.0.0.1:{port}"), dir)
}

#[test]
fn each_proxy_is_replaced_under_load_and_no_client_hears_an_error() {
    let (rate, jobs) = (size("GOFLOW_FLEET_RATE", 300), size("GOFLOW_FLEET_JOBS", 3_000));
    let shards: Vec<Server> = (0..4).map(|_| Server::start(Flavour::Redis7, &[])).collect();
    let named: Vec<String> = shards.iter().enumerate().map(|(at, shard)| format!("s{at}={}", shard.url())).collect();
    let args: Vec<&str> = named.iter().flat_map(|shard| ["--shard", shard.as_str()]).collect();
    let ports: Vec<u16> = (0..3).map(|_| free_port()).collect();
    let start = |http: &u16| Goflow::start_on(&format!("127.0.0.1:{http}"), &args, &[]);
    let mut proxies: Vec<Goflow> = ports.iter().map(start).collect();
    let places: Vec<(String, u16)> = proxies.iter().map(|proxy| proxy.address().to_owned()).zip(ports).collect();
    let (_balancer, address, _dir) = balancer(&places);
    drop(Wire::connect(&address));
    let seen = Arc::new(Seen::default());
    let every = Duration::from_secs(1) * PRODUCERS as u32 / rate as u32;
    let producers: Vec<_> = (0..PRODUCERS)
        .map(|number| {
            let client = Client::new(&address, &seen);
            std::thread::spawn(move || produce(client, number, jobs / PRODUCERS, every))
        })
        .collect();
    let workers: Vec<_> = (0..WORKERS)
        .map(|_| {
            let client = Client::new(&address, &seen);
            std::thread::spawn(move || work(client))
        })
        .collect();
    let (mut replaced, began) = (0, Instant::now());
    for (round, proxy) in proxies.iter_mut().enumerate() {
        let target = jobs * (round + 1) / 5;
        eventually!("the work goes on", (seen.acknowledged.load(Ordering::Relaxed) >= target).then_some(()));
        assert!(proxy.terminate().success());
        proxy.restart();
        replaced += 1;
    }
    producers.into_iter().for_each(|producer| producer.join().unwrap());
    let took = began.elapsed();
    let acknowledged = seen.acknowledged.load(Ordering::Relaxed);
    eventually!("every acknowledged job is completed", {
        (seen.completed.load(Ordering::Relaxed) >= acknowledged).then_some(())
    });
    seen.finished.store(true, Ordering::Relaxed);
    workers.into_iter().for_each(|worker| worker.join().unwrap());
    let runs = seen.runs.lock().unwrap();
    let twice = runs.values().filter(|runs| **runs > 1).count();
    let errors = seen.errors.lock().unwrap();
    println!(
        "{replaced} proxies replaced, {acknowledged} acknowledged in {took:.1?}, {} run, twice {twice}, errors {}, reconnects {}",
        runs.len(),
        errors.len(),
        seen.reconnects.load(Ordering::Relaxed)
    );
    assert_eq!((acknowledged, runs.len(), twice), (jobs, jobs, 0));
    assert!(errors.is_empty(), "{:?}", &errors[..errors.len().min(5)]);
}
