//! Many workers that wait cost nearly nothing, and none of them waits while there is a job.
//!
//! Two proxies over four shards; the workers wait on both, the jobs come in through one. First nobody sends anything and
//! it is counted what the proxies send to each shard and how long they run; then the jobs come one by one, each must be
//! delivered once, and the time from its enqueue to its delivery is taken. `GOFLOW_WAITING_WORKERS`,
//! `GOFLOW_WAITING_JOBS` and `GOFLOW_WAITING_IDLE_S` set the size. CPU and delay are printed; they are held against bounds
//! only where `GOFLOW_WAITING_BOUNDS` asks for it, since a machine that does other things has others.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::eventually;
use crate::support::fleet::Fleet;
use crate::support::size;
use crate::support::wire::{Value, Wire, encode, parse};

/// A worker on a runtime, so that a thousand of them are no thousand threads.
struct Worker {
    stream: TcpStream,
    unread: Vec<u8>,
}

impl Worker {
    async fn connect(address: &str) -> Worker {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Worker { stream, unread: Vec::new() }
    }

    async fn call(&mut self, words: &[&str]) -> Value {
        self.stream.write_all(&encode(words)).await.unwrap();
        loop {
            if let Some((value, len)) = parse(&self.unread) {
                self.unread.drain(..len);
                return value;
            }
            assert!(self.stream.read_buf(&mut self.unread).await.unwrap() > 0, "the proxy hung up");
        }
    }
}

/// Takes jobs and completes them until the test ends; tells each payload with the time when it came.
async fn work(address: String, came: mpsc::UnboundedSender<(String, Instant)>) {
    let mut worker = Worker::connect(&address).await;
    loop {
        let job = worker.call(&["GOFLOW.DEQUEUE", "main", "BLOCK", "0"]).await;
        if job == Value::Null {
            continue;
        }
        if came.send((job.field("payload").text(), Instant::now())).is_err() {
            return;
        }
        let acked = worker.call(&["GOFLOW.ACK", "main", &job.field("receipt").text()]).await;
        assert_eq!(acked, Value::Integer(1));
    }
}

/// Commands that clients sent to a server while `whether` holds, without those that scripts call inside it.
fn count_commands(mut monitor: Wire, whether: Arc<AtomicBool>) -> std::thread::JoinHandle<usize> {
    assert_eq!(monitor.say("MONITOR"), Value::Simple("OK".into()));
    std::thread::spawn(move || {
        let mut count = 0;
        while whether.load(Ordering::Relaxed) {
            if let Ok(line) = monitor.try_read(Duration::from_millis(100)) {
                count += usize::from(!line.text().contains(" lua]"));
            }
        }
        count
    })
}

/// CPU time that a process has used, in all its threads.
fn cpu(id: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    // A hundred a second, on every Linux that there is.
    Duration::from_millis(ticks * 10)
}

#[test]
fn workers_that_wait_cost_nearly_nothing_and_get_every_job_once() {
    let (workers, jobs) = (size("GOFLOW_WAITING_WORKERS", 100), size("GOFLOW_WAITING_JOBS", 1_000));
    let window = Duration::from_secs(size("GOFLOW_WAITING_IDLE_S", 3) as u64);
    let bounds = std::env::var_os("GOFLOW_WAITING_BOUNDS").is_some();
    let fleet = Fleet::start(4, 2, &["--strategy", "round-robin"]);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (came, mut arrivals) = mpsc::unbounded_channel();
    for number in 0..workers {
        runtime.spawn(work(fleet.proxies[number % 2].address().to_owned(), came.clone()));
    }
    for (number, proxy) in fleet.proxies.iter().enumerate() {
        let mark = format!("blocked_clients:{}\r\n", (workers + 1 - number) / 2);
        let mut wire = proxy.wire();
        eventually!("all workers wait", wire.say("INFO clients").text().contains(&mark).then_some(()));
    }
    let counting = Arc::new(AtomicBool::new(true));
    let monitors: Vec<_> = fleet.shards.iter().map(|shard| count_commands(shard.wire(), counting.clone())).collect();
    let before: Vec<Duration> = fleet.proxies.iter().map(|proxy| cpu(proxy.id())).collect();
    let began = Instant::now();
    // The one thing to be awaited here is that nothing happens.
    std::thread::sleep(window);
    let seconds = began.elapsed().as_secs_f64();
    for (proxy, before) in fleet.proxies.iter().zip(before) {
        let part = (cpu(proxy.id()) - before).as_secs_f64() / seconds;
        println!("{workers} workers idle: {:.2} % of a core in a proxy", 100.0 * part);
        assert!(!bounds || part < 0.01, "an idle proxy uses {:.2} % of a core", 100.0 * part);
    }
    counting.store(false, Ordering::Relaxed);
    let seconds = began.elapsed().as_secs_f64();
    for (number, monitor) in monitors.into_iter().enumerate() {
        let rate = monitor.join().unwrap() as f64 / seconds;
        println!("{workers} workers idle: {rate:.1} commands a second on s{number}");
        assert!(!bounds || rate < 5.0, "idle proxies send {rate:.1} commands a second to s{number}");
    }
    let mut producer = runtime.block_on(Worker::connect(fleet.proxies[0].address()));
    let mut longest = Duration::ZERO;
    let mut seen = HashSet::new();
    for number in 0..jobs {
        let payload = number.to_string();
        let sent_at = Instant::now();
        runtime.block_on(async {
            assert!(matches!(producer.call(&["GOFLOW.ENQUEUE", "main", &payload]).await, Value::Bulk(_)));
            // One at a time: so a worker is free whenever a job comes.
            let (got, at) = arrivals.recv().await.unwrap();
            assert_eq!(got, payload);
            assert!(seen.insert(got));
            longest = longest.max(at - sent_at);
        });
    }
    println!("{jobs} jobs one by one: none waited longer than {:.1} ms", longest.as_secs_f64() * 1e3);
    assert!(!bounds || longest < Duration::from_millis(50), "a job waited {longest:?} while workers were free");
    flood(&fleet, &runtime, &mut arrivals, jobs, bounds);
}

/// The same jobs as fast as one connection sends them: each once, and none left behind.
fn flood(
    fleet: &Fleet,
    runtime: &tokio::runtime::Runtime,
    arrivals: &mut mpsc::UnboundedReceiver<(String, Instant)>,
    jobs: usize,
    bounds: bool,
) {
    let began = Instant::now();
    let (sender, producer) = (fleet.proxies[0].wire(), std::sync::mpsc::channel());
    let sent = std::thread::spawn(move || {
        let mut wire = sender;
        for number in 0..jobs {
            let now = Instant::now();
            assert!(matches!(wire.call(&["GOFLOW.ENQUEUE", "main", &format!("f{number}")]), Value::Bulk(_)));
            producer.0.send((format!("f{number}"), now)).unwrap();
        }
    });
    let mut came = std::collections::HashMap::new();
    runtime.block_on(async {
        while came.len() < jobs {
            let (payload, at) = arrivals.recv().await.unwrap();
            assert_eq!(came.insert(payload, at), None, "a job came twice");
        }
    });
    sent.join().unwrap();
    let longest = producer.1.try_iter().map(|(payload, at)| came[&payload].saturating_duration_since(at)).max();
    let longest = longest.unwrap_or_default();
    println!(
        "{jobs} jobs in {:.2} s through one connection: none waited longer than {:.1} ms",
        began.elapsed().as_secs_f64(),
        longest.as_secs_f64() * 1e3
    );
    assert!(!bounds || longest < Duration::from_millis(50), "a job waited {longest:?} while workers were free");
    let mut wire = fleet.proxies[1].wire();
    eventually!("no job is left", (wire.say("GOFLOW.LEN main STATE leased") == Value::Integer(0)).then_some(()));
    assert_eq!(wire.say("GOFLOW.LEN main"), Value::Integer(0));
    assert!(arrivals.try_recv().is_err(), "a job came again");
}
