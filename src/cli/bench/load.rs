//! What producers and workers do: requests out, answers in, jobs and times counted.
//!
//! Lean on purpose, since it shares the machine with what it measures: a round of requests is one template in which only
//! the times are patched, one write and as few reads as the answers need; a thread runs its connections on a runtime of
//! its own; counters that threads share are touched once a round.

use std::io;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::{Buf, BytesMut};
use hdrhistogram::Histogram;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Barrier, watch};
use tokio::task::JoinSet;

use super::{Mode, Options};
use crate::resp::reply::{put_bulk, put_header};
use crate::resp::scan::{Malformed, ScanState, reply_end};

/// A payload begins with this and sixteen digits: microseconds since 1970.
const HEAD: &[u8] = b"gfb:";
const DIGITS: usize = 16;
/// How long an idle worker waits on the server, and how long before it asks again where it does not.
const BLOCK_MS: &[u8] = b"500";
const REST: Duration = Duration::from_millis(2);
/// After an error reply.
const REST_AFTER_ERROR: Duration = Duration::from_millis(10);
const READ_BYTES: usize = 32 << 10;

/// What runs at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phase {
    pub name: &'static str,
    pub producers: u32,
    pub workers: u32,
}

/// Counters of a phase that all its connections share.
pub struct Tally {
    /// Jobs that no producer has taken on yet.
    budget: AtomicI64,
    enqueued: AtomicU64,
    finished: AtomicU64,
    producers_left: AtomicUsize,
    has_workers: bool,
    /// Everybody connects first; only then the clock runs.
    connected: Barrier,
    begin: OnceLock<Instant>,
    end: Mutex<Option<Instant>>,
    stop: watch::Sender<bool>,
}

impl Tally {
    pub fn new(jobs: u64, phase: Phase, waiting: u64) -> Tally {
        Tally {
            budget: AtomicI64::new(if phase.producers > 0 { jobs as i64 } else { 0 }),
            enqueued: AtomicU64::new(waiting),
            finished: AtomicU64::new(0),
            producers_left: AtomicUsize::new(phase.producers as usize),
            has_workers: phase.workers > 0,
            connected: Barrier::new((phase.producers + phase.workers) as usize),
            begin: OnceLock::new(),
            end: Mutex::new(None),
            stop: watch::Sender::new(false),
        }
    }

    /// Jobs in the queue when the phase began, and those added since.
    pub fn enqueued(&self) -> u64 {
        self.enqueued.load(SeqCst)
    }

    /// Jobs acked, or popped from a list.
    pub fn finished(&self) -> u64 {
        self.finished.load(SeqCst)
    }

    pub fn elapsed(&self) -> Duration {
        let end = lock(&self.end);
        let begin = self.begin.get().copied().unwrap_or_else(Instant::now);
        end.unwrap_or_else(Instant::now).saturating_duration_since(begin)
    }

    /// Ends the phase, now.
    pub fn stop(&self) {
        let mut end = lock(&self.end);
        end.get_or_insert_with(Instant::now);
        self.stop.send_replace(true);
    }

    /// A connection, once all others stand too or have failed.
    async fn connect(&self, address: &str) -> io::Result<Connection> {
        let connection = Connection::open(address).await;
        self.connected.wait().await;
        self.begin.get_or_init(Instant::now);
        connection
    }

    fn take(&self, most: u64) -> u64 {
        let before = self.budget.fetch_sub(most as i64, Relaxed);
        before.clamp(0, most as i64) as u64
    }

    /// A producer is done. Ordered before the check, as `finish` is, so that one of the two sees the end.
    fn leave(&self) {
        self.producers_left.fetch_sub(1, SeqCst);
        self.check();
    }

    fn finish(&self, jobs: u64) {
        self.finished.fetch_add(jobs, SeqCst);
        self.check();
    }

    /// Ends the phase once all is done.
    pub fn check(&self) {
        if self.producers_left.load(SeqCst) == 0 && (!self.has_workers || self.finished() >= self.enqueued()) {
            self.stop();
        }
    }
}

/// What one thread saw; microseconds.
pub struct Measured {
    pub latency: Histogram<u64>,
    pub round_trip: Histogram<u64>,
    pub errors: u64,
    pub leases_lost: u64,
    pub first_error: Option<String>,
    /// Connections that ended before their time.
    pub broken: u64,
}

impl Default for Measured {
    fn default() -> Self {
        // Three digits are always valid, and the histograms grow to any value.
        let histogram = || Histogram::new(3).unwrap_or_else(|_| unreachable!("3 significant digits are valid"));
        Measured {
            latency: histogram(),
            round_trip: histogram(),
            errors: 0,
            leases_lost: 0,
            first_error: None,
            broken: 0,
        }
    }
}

impl Measured {
    pub fn add(&mut self, other: &Measured) {
        // Both grow, so that every value fits.
        let _ = self.latency.add(&other.latency);
        let _ = self.round_trip.add(&other.round_trip);
        self.errors += other.errors;
        self.leases_lost += other.leases_lost;
        self.broken += other.broken;
        self.first_error = self.first_error.take().or_else(|| other.first_error.clone());
    }

    fn error(&mut self, text: &[u8]) {
        self.errors += 1;
        self.first_error.get_or_insert_with(|| String::from_utf8_lossy(text).trim().to_string());
    }
}

/// Runs the part of a phase's connections that falls to this thread.
pub fn run(options: &Options, phase: Phase, tally: &Arc<Tally>, thread: u32, threads: u32) -> Result<Measured, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start a runtime: {error}"))?;
    let mine = |count: u32| (0..count).filter(move |number| number % threads == thread);
    let measured = Arc::new(Mutex::new(Measured::default()));
    runtime.block_on(async {
        let mut tasks = JoinSet::new();
        for number in mine(phase.producers) {
            let share = (number, phase.producers);
            tasks.spawn(produce(options.clone(), tally.clone(), share, measured.clone()));
        }
        for _ in mine(phase.workers) {
            tasks.spawn(work(options.clone(), tally.clone(), phase.producers > 0, measured.clone()));
        }
        tasks.join_all().await;
    });
    let measured = std::mem::take(&mut *lock(&measured));
    Ok(measured)
}

/// One for all connections of a thread: never contended, and the histograms of thousands of connections would be large.
type SharedMeasured = Arc<Mutex<Measured>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

async fn produce(options: Options, tally: Arc<Tally>, share: (u32, u32), measured: SharedMeasured) {
    until_stopped(&tally, &measured, Producer::run(&options, &tally, share, &measured)).await;
    tally.leave();
}

async fn work(options: Options, tally: Arc<Tally>, together: bool, measured: SharedMeasured) {
    until_stopped(&tally, &measured, Worker::run(&options, &tally, together, &measured)).await;
}

async fn until_stopped(tally: &Tally, measured: &Mutex<Measured>, task: impl Future<Output = io::Result<()>>) {
    let mut stopped = tally.stop.subscribe();
    let result = tokio::select! {
        biased;
        result = task => result,
        _ = stopped.wait_for(|stopped| *stopped) => Ok(()),
    };
    if let Err(error) = result {
        let mut measured = lock(measured);
        measured.broken += 1;
        measured.error(error.to_string().as_bytes());
    }
}

/// A connection to the server.
struct Connection {
    stream: TcpStream,
    input: BytesMut,
    state: ScanState,
    /// Bytes of `input` that the last reply took.
    taken: usize,
}

impl Connection {
    async fn open(address: &str) -> io::Result<Connection> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Connection { stream, input: BytesMut::with_capacity(READ_BYTES), state: ScanState::default(), taken: 0 })
    }

    /// The next reply.
    async fn reply(&mut self) -> io::Result<&[u8]> {
        self.input.advance(self.taken);
        self.taken = 0;
        loop {
            let found = reply_end(&self.input, &mut self.state);
            if let Some(end) = found.map_err(|malformed: Malformed| io::Error::other(malformed))? {
                self.taken = end;
                return Ok(self.input.get(..end).unwrap_or_default());
            }
            self.input.reserve(READ_BYTES);
            if self.stream.read_buf(&mut self.input).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

/// A round of enqueue requests, ready to send but for the times.
struct Round {
    bytes: BytesMut,
    times: Vec<usize>,
    /// Jobs of each request.
    requests: Vec<u64>,
}

impl Round {
    fn new(options: &Options, jobs: u64) -> Round {
        let mut round = Round { bytes: BytesMut::new(), times: Vec::new(), requests: Vec::new() };
        let mut random = SmallRng::seed_from_u64(jobs);
        let mut left = jobs;
        while left > 0 {
            let count = left.min(u64::from(options.batch));
            left -= count;
            round.requests.push(count);
            match (options.mode, options.batch) {
                (Mode::List, _) => round.head(2 + count, &[b"LPUSH", options.queue.as_bytes()]),
                (Mode::Goflow, 1) => round.head(3, &[b"GOFLOW.ENQUEUE", options.queue.as_bytes()]),
                (Mode::Goflow, _) => {
                    let digits = count.to_string();
                    round.head(3 + count, &[b"GOFLOW.ENQUEUEMANY", options.queue.as_bytes(), digits.as_bytes()]);
                }
            }
            for _ in 0..count {
                let mut payload = vec![0; options.payload as usize];
                payload.iter_mut().for_each(|byte| *byte = random.random_range(b'!'..=b'~'));
                payload[..HEAD.len()].copy_from_slice(HEAD);
                put_bulk(&mut round.bytes, &payload);
                round.times.push(round.bytes.len() - 2 - payload.len() + HEAD.len());
            }
        }
        round
    }

    fn head(&mut self, words: u64, first: &[&[u8]]) {
        put_header(&mut self.bytes, b'*', words as usize);
        first.iter().for_each(|word| put_bulk(&mut self.bytes, word));
    }

    fn stamp(&mut self, micros: u64) {
        let mut digits = [b'0'; DIGITS];
        let mut rest = micros;
        for digit in digits.iter_mut().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        for &at in &self.times {
            if let Some(place) = self.bytes.get_mut(at..at + DIGITS) {
                place.copy_from_slice(&digits);
            }
        }
    }
}

struct Producer;

impl Producer {
    /// `share`: which of how many producers it is.
    async fn run(options: &Options, tally: &Tally, share: (u32, u32), measured: &Mutex<Measured>) -> io::Result<()> {
        let mut connection = tally.connect(&options.addr).await?;
        let round_max = u64::from(options.pipeline) * u64::from(options.batch);
        let mut pace = Pace::new(options.rate, share);
        let mut round = Round::new(options, round_max);
        let mut sent = 0;
        loop {
            let (due, late_by) = pace.wait(sent, round_max).await;
            let jobs = tally.take(due);
            if jobs == 0 {
                return Ok(());
            }
            if jobs != round.times.len() as u64 {
                round = Round::new(options, jobs);
            }
            let began = Instant::now();
            round.stamp(now_micros().saturating_sub(late_by.as_micros() as u64));
            connection.stream.write_all(&round.bytes).await?;
            let mut enqueued = 0;
            for count in &round.requests {
                let reply = connection.reply().await?;
                match reply.first() {
                    Some(b'-') => lock(measured).error(reply),
                    _ => enqueued += count,
                }
            }
            record(&mut lock(measured).round_trip, began.elapsed().as_micros() as u64);
            tally.enqueued.fetch_add(enqueued, SeqCst);
            sent += jobs;
            if enqueued < jobs {
                tokio::time::sleep(REST_AFTER_ERROR).await;
            }
        }
    }
}

/// The histograms grow, so that every value fits.
fn record(histogram: &mut Histogram<u64>, micros: u64) {
    let _ = histogram.record(micros);
}

/// When the next jobs of one producer are to be sent.
struct Pace {
    begin: Instant,
    /// Between two jobs of this producer; `None` is as fast as possible.
    gap: Option<Duration>,
}

impl Pace {
    /// Of all producers together an even flow, and not a burst at a time.
    fn new(rate: u64, (number, producers): (u32, u32)) -> Pace {
        let gap = (rate > 0).then(|| Duration::from_secs_f64(f64::from(producers) / rate as f64));
        let offset = gap.unwrap_or_default().mul_f64(f64::from(number) / f64::from(producers));
        Pace { begin: Instant::now() + offset, gap }
    }

    /// How many jobs are due, 1 to `most`, and how late the first of them is because the server kept us waiting. What the
    /// timer is late does not count.
    async fn wait(&mut self, sent: u64, most: u64) -> (u64, Duration) {
        let Some(gap) = self.gap else {
            return (most, Duration::ZERO);
        };
        let due_at = gap.mul_f64(sent as f64);
        let late_by = self.begin.elapsed().saturating_sub(due_at);
        if late_by.is_zero() {
            tokio::time::sleep_until((self.begin + due_at).into()).await;
        }
        let due = self.begin.elapsed().saturating_sub(due_at).as_secs_f64() / gap.as_secs_f64();
        ((due as u64 + 1).min(most), late_by)
    }
}

/// Words of a reply that a worker needs. All else (ids, queue, times) is passed over.
#[derive(Default)]
struct Delivered {
    jobs: u64,
    receipts: Vec<u8>,
    receipt_ends: Vec<usize>,
}

impl Delivered {
    fn clear(&mut self) {
        self.jobs = 0;
        self.receipts.clear();
        self.receipt_ends.clear();
    }

    /// Takes receipts and times of sending from the bulk strings of a whole reply: a payload is told by its head, a receipt
    /// by the word before it.
    fn take(&mut self, reply: &[u8], now: u64, latency: &mut Histogram<u64>) {
        let mut rest = reply;
        let mut after_receipt = false;
        while let Some(end) = memchr::memchr(b'\n', rest) {
            let (line, tail) = rest.split_at(end + 1);
            rest = tail;
            let Some(len) = bulk_len(line) else {
                continue;
            };
            let bulk = rest.get(..len).unwrap_or_default();
            rest = rest.get(len + 2..).unwrap_or_default();
            if after_receipt {
                self.receipts.extend_from_slice(bulk);
                self.receipt_ends.push(self.receipts.len());
            } else if let Some(sent) = sent_micros(bulk) {
                self.jobs += 1;
                record(latency, now.saturating_sub(sent));
            }
            after_receipt = bulk == b"receipt";
        }
    }
}

/// The length that a line `$<len>` declares.
fn bulk_len(line: &[u8]) -> Option<usize> {
    let digits = line.strip_prefix(b"$")?.strip_suffix(b"\r\n")?;
    digits.iter().try_fold(0, |number: usize, byte| {
        Some(number.checked_mul(10)? + usize::from(byte.is_ascii_digit().then(|| byte - b'0')?))
    })
}

fn sent_micros(payload: &[u8]) -> Option<u64> {
    let digits = payload.strip_prefix(HEAD)?.get(..DIGITS)?;
    digits
        .iter()
        .try_fold(0, |number: u64, byte| Some(number * 10 + u64::from(byte.is_ascii_digit().then(|| byte - b'0')?)))
}

/// What a worker has asked for and not yet been answered.
enum Asked {
    Jobs,
    Ack(u64),
}

struct Worker<'a> {
    options: &'a Options,
    /// Producers run beside it, so that an empty queue is worth waiting for on the server.
    together: bool,
    out: BytesMut,
    asked: Vec<Asked>,
    held: Delivered,
    came: Delivered,
}

impl Worker<'_> {
    async fn run(options: &Options, tally: &Tally, together: bool, measured: &Mutex<Measured>) -> io::Result<()> {
        let mut connection = tally.connect(&options.addr).await?;
        let (held, came) = (Delivered::default(), Delivered::default());
        let mut worker = Worker { options, together, out: BytesMut::new(), asked: Vec::new(), held, came };
        loop {
            worker.write_round();
            let began = Instant::now();
            connection.stream.write_all(&worker.out).await?;
            let (mut finished, mut failed) = (0, false);
            worker.came.clear();
            for asked in &worker.asked {
                let reply = connection.reply().await?;
                match asked {
                    _ if reply.first() == Some(&b'-') => {
                        lock(measured).error(reply);
                        failed = true;
                    }
                    Asked::Jobs => worker.came.take(reply, now_micros(), &mut lock(measured).latency),
                    Asked::Ack(count) => {
                        let acked = integer(reply);
                        lock(measured).leases_lost += count.saturating_sub(acked);
                        finished += acked;
                    }
                }
            }
            record(&mut lock(measured).round_trip, began.elapsed().as_micros() as u64);
            let asked_for_jobs = worker.asked.iter().any(|asked| matches!(asked, Asked::Jobs));
            std::mem::swap(&mut worker.held, &mut worker.came);
            if options.mode == Mode::List {
                finished += worker.held.jobs;
            }
            if finished > 0 {
                tally.finish(finished);
            }
            if failed {
                tokio::time::sleep(REST_AFTER_ERROR).await;
            } else if asked_for_jobs && worker.held.jobs == 0 && !together {
                tokio::time::sleep(REST).await;
            }
        }
    }

    /// Acks of what is held, and as many requests for more. Without pipelining only one of the two.
    fn write_round(&mut self) {
        self.out.clear();
        self.asked.clear();
        let queue = self.options.queue.as_bytes();
        let mut start = 0;
        for ends in self.held.receipt_ends.chunks(self.options.batch as usize) {
            put_words(&mut self.out, 2 + ends.len(), &[b"GOFLOW.ACK", queue]);
            for &end in ends {
                put_bulk(&mut self.out, self.held.receipts.get(start..end).unwrap_or_default());
                start = end;
            }
            self.asked.push(Asked::Ack(ends.len() as u64));
        }
        if self.options.pipeline > 1 || self.asked.is_empty() {
            for place in 0..self.options.pipeline {
                // One that waits holds up those behind it, and one is enough to be woken.
                self.write_request_for_jobs(self.together && place == 0);
                self.asked.push(Asked::Jobs);
            }
        }
    }

    fn write_request_for_jobs(&mut self, block: bool) {
        let queue = self.options.queue.as_bytes();
        let digits = self.options.batch.to_string();
        let count = digits.as_bytes();
        let words: &[&[u8]] = match (self.options.mode, self.options.batch, block) {
            (Mode::Goflow, 1, false) => &[b"GOFLOW.DEQUEUE", queue],
            (Mode::Goflow, 1, true) => &[b"GOFLOW.DEQUEUE", queue, b"BLOCK", BLOCK_MS],
            (Mode::Goflow, _, false) => &[b"GOFLOW.DEQUEUE", queue, b"COUNT", count],
            (Mode::Goflow, _, true) => &[b"GOFLOW.DEQUEUE", queue, b"COUNT", count, b"BLOCK", BLOCK_MS],
            (Mode::List, 1, false) => &[b"RPOP", queue],
            (Mode::List, 1, true) => &[b"BRPOP", queue, b"1"],
            (Mode::List, _, false) => &[b"RPOP", queue, count],
            (Mode::List, _, true) => &[b"BLMPOP", b"1", b"1", queue, b"RIGHT", b"COUNT", count],
        };
        put_words(&mut self.out, words.len(), words);
    }
}

/// The first words of a request that has `count`.
fn put_words(out: &mut BytesMut, count: usize, words: &[&[u8]]) {
    put_header(out, b'*', count);
    words.iter().for_each(|word| put_bulk(out, word));
}

/// The number of an integer reply; 0 for any other.
fn integer(reply: &[u8]) -> u64 {
    let digits = reply.strip_prefix(b":").and_then(|line| line.strip_suffix(b"\r\n"));
    digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok()).unwrap_or(0)
}

fn now_micros() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_micros() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::{Phases, run_phase};
    use crate::resp::reply::{Protocol, Reply};
    use crate::resp::request::{Bounds, Parsed, Parser};
    use bytes::Bytes;
    use clap::Parser as _;
    use std::collections::VecDeque;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(address: &str, line: &str) -> Options {
        let words = ["bench", "--addr", address].into_iter().chain(line.split_ascii_whitespace());
        Line::try_parse_from(words).unwrap().options
    }

    /// A server that keeps one queue of jobs and checks what it is sent.
    #[derive(Default)]
    struct Server {
        ready: VecDeque<Bytes>,
        leased: u64,
    }

    impl Server {
        fn answer(&mut self, words: &[Bytes]) -> Reply {
            assert_eq!(words[1], "q");
            match &words[0][..] {
                b"GOFLOW.ENQUEUE" => {
                    assert_eq!((words.len(), words[2].len()), (3, 100));
                    self.ready.push_back(words[2].clone());
                    Reply::text("1~s")
                }
                b"GOFLOW.ENQUEUEMANY" => {
                    assert_eq!(words[2], (words.len() - 3).to_string());
                    self.ready.extend(words[3..].iter().cloned());
                    Reply::Array(words[3..].iter().map(|_| Reply::text("1~s")).collect())
                }
                b"GOFLOW.DEQUEUE" => self.lease(words),
                b"GOFLOW.ACK" => {
                    let acked = words[2..].iter().filter(|receipt| *receipt == "receipt~s").count() as u64;
                    self.leased = self.leased.checked_sub(acked).unwrap();
                    Reply::count(acked)
                }
                other => panic!("{other:?}"),
            }
        }

        fn lease(&mut self, words: &[Bytes]) -> Reply {
            let many = words.get(2).is_some_and(|word| word == "COUNT");
            let count = if many { std::str::from_utf8(&words[3]).unwrap().parse().unwrap() } else { 1 };
            let jobs: Vec<Reply> = self.ready.drain(..count.min(self.ready.len())).map(delivery).collect();
            self.leased += jobs.len() as u64;
            match (jobs.is_empty(), many) {
                (true, _) => Reply::NullArray,
                (false, true) => Reply::Array(jobs),
                (false, false) => jobs.into_iter().next().unwrap(),
            }
        }
    }

    fn delivery(payload: Bytes) -> Reply {
        Reply::Map(vec![
            (Reply::text("id"), Reply::text("1~s")),
            (Reply::text("receipt"), Reply::text("receipt~s")),
            (Reply::text("payload"), Reply::Bulk(payload)),
            (Reply::text("attempt"), Reply::Integer(1)),
        ])
    }

    /// Serves until the test's runtime is dropped; returns its address.
    fn serve(runtime: &tokio::runtime::Runtime) -> (String, Arc<Mutex<Server>>) {
        let server = Arc::new(Mutex::new(Server::default()));
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shared = server.clone();
        runtime.spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                stream.set_nodelay(true).unwrap();
                let server = shared.clone();
                tokio::spawn(async move {
                    let (mut parser, mut input) = (Parser::new(Bounds::default()), BytesMut::new());
                    let (mut words, mut out) = (Vec::new(), BytesMut::new());
                    while stream.read_buf(&mut input).await.is_ok_and(|read| read > 0) {
                        while parser.next(&mut input, &mut words).unwrap() == Parsed::Request {
                            lock(&server).answer(&words).encode(Protocol::Resp2, &mut out);
                        }
                        // A generator whose phase is over hangs up without waiting for its last answers.
                        if stream.write_all(&out.split()).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        (address, server)
    }

    #[test]
    fn every_job_is_enqueued_delivered_and_acked_once_in_every_shape() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        for shape in ["", "--batch 7", "--pipeline 5", "--pipeline 3 --batch 4", "--threads 2", "--rate 20000"] {
            for phases in ["apart", "together"] {
                // One of its own: a request that a generator left behind takes no job of the next.
                let (address, server) = serve(&runtime);
                let line = format!("--queue q --jobs 203 --payload 100 --connections 2 --phases {phases} {shape}");
                let options = options(&address, &line);
                assert_eq!(options.phases == Phases::Together, phases == "together");
                let mut waiting = 0;
                for phase in options.phases() {
                    let (report, enqueued) = run_phase(&options, phase, waiting).unwrap();
                    waiting = enqueued;
                    assert!(report.is_complete(), "{line}: {report:?}");
                }
                let server = lock(&server);
                assert_eq!((waiting, server.ready.len(), server.leased), (203, 0, 0), "{line}");
            }
        }
    }

    #[test]
    fn a_server_that_is_not_there_is_reported() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let options = options(&address, "--jobs 10 --connections 2");
        let (report, enqueued) = run_phase(&options, options.phases()[0], 0).unwrap();
        assert_eq!((report.is_complete(), enqueued), (false, 0));
    }

    #[test]
    fn receipts_and_times_are_found_in_a_delivery() {
        let mut round = Round::new(&options("h:1", "--payload 40 --batch 2"), 2);
        round.stamp(1_700_000_000_000_000);
        let mut words = Vec::new();
        Parser::new(Bounds::default()).next(&mut round.bytes.clone(), &mut words).unwrap();
        let jobs = words[3..].iter().map(|payload| delivery(payload.clone())).collect();
        for protocol in [Protocol::Resp2, Protocol::Resp3] {
            let mut reply = BytesMut::new();
            Reply::encode(&Reply::Array(Vec::clone(&jobs)), protocol, &mut reply);
            let (mut delivered, mut measured) = (Delivered::default(), Measured::default());
            delivered.take(&reply, 1_700_000_000_000_500, &mut measured.latency);
            assert_eq!((delivered.jobs, &delivered.receipts[..]), (2, &b"receipt~sreceipt~s"[..]));
            assert_eq!((delivered.receipt_ends, measured.latency.max()), (vec![9, 18], 500));
        }
    }
}
