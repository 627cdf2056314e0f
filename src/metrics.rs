//! What the process measures of itself: every metric declared once in [`ALL`], resolved to handles at the start.
//!
//! Who counts keeps a handle and adds to a plain atomic; nothing is looked up per request. Labels are bounded: codes,
//! commands and shards are few by nature, and of queues the first [`QUEUES_MAX`] get their own label, the rest is `other`
//! ([`Metrics::queue`], asked once for each queue of a batch). No payload, id or secret is ever a label.
//!
//! Two kinds of figures. *Own* ones say what this process did or holds; over many proxies they add up. *Shared* ones are read from
//! a shard ([`Sampled`]), and only the proxy that holds the shard's sampling lease shows them, so that they add up too. They are
//! shown until that lease ends and not longer.
//!
//! A new metric is a line in the list and its use; the dashboard, the alert rules and the tests read the list.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use prometheus::core::{Collector, Desc};
use prometheus::process_collector::ProcessCollector;
use prometheus::proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

use crate::error::Code;
use crate::job::Name;

mod text;

pub use text::Format;

/// Queues with a label of their own; what is beyond shares [`OTHER`].
pub const QUEUES_MAX: usize = 64;
/// The label of all queues beyond the bound; a queue of this name is counted with them.
pub const OTHER: &str = "other";

/// From a tenth of a millisecond: what a request takes.
const REQUEST_SECONDS: &[f64] =
    &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5, 10.0];
/// From a millisecond to hours: what a job takes and waits.
const JOB_SECONDS: &[f64] =
    &[0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3_600.0, 14_400.0];
const BATCH_OPS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Counter,
    Gauge,
    /// With the upper bounds of its buckets.
    Histogram(&'static [f64]),
}

/// One metric as the list declares it.
#[derive(Clone, Copy, Debug)]
pub struct Declared {
    pub name: &'static str,
    pub kind: Kind,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Declared {
    Declared { name, kind: Kind::Counter, labels, help }
}

const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Declared {
    Declared { name, kind: Kind::Gauge, labels, help }
}

const fn histogram(
    name: &'static str,
    labels: &'static [&'static str],
    bounds: &'static [f64],
    help: &'static str,
) -> Declared {
    Declared { name, kind: Kind::Histogram(bounds), labels, help }
}

macro_rules! declare {
    ($($constant:ident = $declared:expr;)*) => {
        $(const $constant: Declared = $declared;)*
        /// Every metric of GoFlow; those of the process itself (`process_...`) come from the crate.
        pub const ALL: &[Declared] = &[$($constant),*];
    };
}

declare! {
    JOBS_ENQUEUED = counter("goflow_jobs_enqueued_total", &["queue"], "Jobs added through this proxy.");
    JOBS_STARTED = counter("goflow_jobs_started_total", &["queue"], "Deliveries made through this proxy.");
    JOBS_COMPLETED = counter("goflow_jobs_completed_total", &["queue"], "Acknowledgements taken through this proxy.");
    JOBS_FAILED = counter("goflow_jobs_failed_total", &["queue"], "Deliveries reported as failed through this proxy.");
    JOBS_RETRIED = counter("goflow_jobs_retried_total", &["queue"], "Failed deliveries that will be tried again.");
    JOBS_RELEASED = counter("goflow_jobs_released_total", &["queue"], "Jobs given back uncounted through this proxy.");
    JOB_DURATION = histogram("goflow_job_duration_seconds", &["queue"], JOB_SECONDS,
        "From a delivery to its verdict, where this proxy saw both.");
    JOB_WAIT = histogram("goflow_job_wait_seconds", &["queue"], JOB_SECONDS,
        "From the enqueue of a job to its first delivery, asked-for delays included.");
    QUEUE_DEPTH = gauge("goflow_queue_depth", &["queue"], "Ready jobs on the shards that this proxy samples.");
    QUEUE_SCHEDULED = gauge("goflow_queue_scheduled", &["queue"], "Jobs that wait for their time, retries included.");
    QUEUE_LEASED = gauge("goflow_queue_leased", &["queue"], "Jobs that are with a worker.");
    QUEUE_DEAD = gauge("goflow_queue_dead", &["queue"], "Jobs in the dead letter queue.");
    QUEUE_OLDEST = gauge("goflow_queue_oldest_ready_seconds", &["queue"],
        "Age of the job that is next in line, on the shard where it is oldest.");
    JOBS_DEAD = counter("goflow_jobs_dead_total", &["queue", "shard"], "Jobs that died, as the sampled shards count them.");
    JOBS_LAPSED = counter("goflow_jobs_lapsed_total", &["queue", "shard"], "Leases that ran out, as the sampled shards count them.");
    JOBS_EXPIRED = counter("goflow_jobs_expired_total", &["queue", "shard"], "Jobs that outlived their TTL, as the sampled shards count them.");
    JOBS_CANCELLED = counter("goflow_jobs_cancelled_total", &["queue", "shard"], "Jobs that were cancelled, as the sampled shards count them.");
    JOBS_REDRIVEN = counter("goflow_jobs_redriven_total", &["queue", "shard"], "Dead jobs that were put back, as the sampled shards count them.");
    QUEUES = gauge("goflow_queues", &["shard"], "Queues that a sampled shard has seen.");
    WORKERS_ACTIVE = gauge("goflow_workers_active", &[], "Connections that have asked this proxy for jobs and are still open.");
    COMMAND_DURATION = histogram("goflow_command_duration_seconds", &["command"], REQUEST_SECONDS,
        "From reading a request to writing its answer, waits included.");
    ERRORS = counter("goflow_errors_total", &["code"], "Error replies by their code.");
    WEBHOOKS = counter("goflow_webhook_deliveries_total", &["path", "result"],
        "Webhook deliveries by what became of them: accepted, unsigned, late, malformed or unavailable.");
    CONNECTIONS = gauge("goflow_connections", &[], "Open client connections.");
    CONNECTIONS_ACCEPTED = counter("goflow_connections_accepted_total", &[], "Client connections accepted.");
    CONNECTIONS_REFUSED = counter("goflow_connections_refused_total", &[], "Client connections refused at the bound.");
    CLIENTS_BLOCKED = gauge("goflow_clients_blocked", &[], "Clients that wait for something.");
    BYTES_RECEIVED = counter("goflow_received_bytes_total", &[], "Bytes read from clients.");
    BYTES_SENT = counter("goflow_sent_bytes_total", &[], "Bytes written to clients.");
    SHARD_UP = gauge("goflow_shard_up", &["shard"], "1 while the shard answers this proxy.");
    SHARD_DRAINING = gauge("goflow_shard_draining", &["shard"], "1 while the shard takes no new jobs.");
    SHARD_SAMPLED = gauge("goflow_shard_sampled", &["shard"], "1 on the proxy that shows the shard's shared figures.");
    SHARD_ERRORS = counter("goflow_shard_errors_total", &["shard"], "Batches that the shard did not answer.");
    BATCH_SIZE = histogram("goflow_batch_ops", &["shard"], BATCH_OPS, "Operations in one batch to a shard.");
    BATCH_DURATION = histogram("goflow_batch_duration_seconds", &["shard"], REQUEST_SECONDS,
        "Round trip of one batch to a shard.");
    ALERTS_SENT = counter("goflow_alerts_sent_total", &["sink"], "Alert messages that a sink has taken from this proxy.");
    ALERTS_FAILED = counter("goflow_alerts_failed_total", &["sink"], "Attempts to deliver an alert that failed; each is tried again.");
    ALERTS_LEADING = gauge("goflow_alerts_leading", &[], "1 on the proxy that delivers alerts.");
    LINK_DURATION = histogram("goflow_link_duration_seconds", &["shard"], REQUEST_SECONDS,
        "Round trip of ordinary commands to a shard, one measured at a time on each connection.");
    DRAINING = gauge("goflow_draining", &[], "1 while the process drains before its end.");
    BUILD_INFO = gauge("goflow_build_info", &["version", "profile"], "1; what was built.");
}

/// Connections to shards are opened deep in the threads, far from whoever holds the [`Metrics`]: one family for the process.
static LINKS: LazyLock<Option<HistogramVec>> = LazyLock::new(|| LINK_DURATION.histograms().ok());

/// Where the connections to a shard note their round trips.
pub fn link_seconds(shard: &str) -> Option<Histogram> {
    LINKS.as_ref().map(|links| links.with_label_values(&[shard]))
}

impl Declared {
    fn histograms(&self) -> prometheus::Result<HistogramVec> {
        let bounds = match self.kind {
            Kind::Histogram(bounds) => bounds.to_vec(),
            Kind::Counter | Kind::Gauge => Vec::new(),
        };
        HistogramVec::new(HistogramOpts::from(self.opts()).buckets(bounds), self.labels)
    }

    fn opts(&self) -> Opts {
        Opts::new(self.name, self.help)
    }
}

/// Counts of one queue, or of all queues beyond the bound.
pub struct QueueMetrics {
    pub enqueued: IntCounter,
    pub started: IntCounter,
    pub completed: IntCounter,
    pub failed: IntCounter,
    pub retried: IntCounter,
    pub released: IntCounter,
    pub duration: Histogram,
    pub wait: Histogram,
}

/// What a lane measures of its shard.
#[derive(Clone)]
pub struct ShardMetrics {
    pub up: IntGauge,
    pub draining: IntGauge,
    pub sampled: IntGauge,
    pub errors: IntCounter,
    pub batch_ops: Histogram,
    pub batch_seconds: Histogram,
}

struct QueueFamilies {
    enqueued: IntCounterVec,
    started: IntCounterVec,
    completed: IntCounterVec,
    failed: IntCounterVec,
    retried: IntCounterVec,
    released: IntCounterVec,
    duration: HistogramVec,
    wait: HistogramVec,
}

impl QueueFamilies {
    fn member(&self, queue: &str) -> Arc<QueueMetrics> {
        let label = &[queue];
        Arc::new(QueueMetrics {
            enqueued: self.enqueued.with_label_values(label),
            started: self.started.with_label_values(label),
            completed: self.completed.with_label_values(label),
            failed: self.failed.with_label_values(label),
            retried: self.retried.with_label_values(label),
            released: self.released.with_label_values(label),
            duration: self.duration.with_label_values(label),
            wait: self.wait.with_label_values(label),
        })
    }
}

struct ShardFamilies {
    up: IntGaugeVec,
    draining: IntGaugeVec,
    sampled: IntGaugeVec,
    errors: IntCounterVec,
    batch_ops: HistogramVec,
    batch_seconds: HistogramVec,
}

/// All handles of the process.
pub struct Metrics {
    registry: Registry,
    queue_families: QueueFamilies,
    queues: RwLock<HashMap<Name, Arc<QueueMetrics>, RandomState>>,
    other_queues: Arc<QueueMetrics>,
    shard_families: ShardFamilies,
    command_family: HistogramVec,
    /// By the place of the command in the table; made when it is first called, so that a scrape holds what is used.
    commands: Vec<(&'static str, OnceLock<Histogram>)>,
    errors: Vec<IntCounter>,
    webhooks: IntCounterVec,
    pub connections: IntGauge,
    pub connections_accepted: IntCounter,
    pub connections_refused: IntCounter,
    pub clients_blocked: IntGauge,
    pub workers_active: IntGauge,
    pub bytes_received: IntCounter,
    pub bytes_sent: IntCounter,
    pub draining: IntGauge,
    pub alerts_leading: IntGauge,
    alerts_sent: IntCounterVec,
    alerts_failed: IntCounterVec,
    sampled: Arc<Sampled>,
}

/// Makes and registers families; what is declared twice or wrongly is a fault of the list, which a test finds.
struct Builder {
    registry: Registry,
}

impl Builder {
    fn add<T: Collector + Clone + 'static>(&self, made: prometheus::Result<T>) -> prometheus::Result<T> {
        let made = made?;
        self.registry.register(Box::new(made.clone()))?;
        Ok(made)
    }

    fn counters(&self, declared: Declared) -> prometheus::Result<IntCounterVec> {
        self.add(IntCounterVec::new(declared.opts(), declared.labels))
    }

    fn counter(&self, declared: Declared) -> prometheus::Result<IntCounter> {
        self.add(IntCounter::with_opts(declared.opts()))
    }

    fn gauges(&self, declared: Declared) -> prometheus::Result<IntGaugeVec> {
        self.add(IntGaugeVec::new(declared.opts(), declared.labels))
    }

    fn gauge(&self, declared: Declared) -> prometheus::Result<IntGauge> {
        self.add(IntGauge::with_opts(declared.opts()))
    }

    fn histograms(&self, declared: Declared) -> prometheus::Result<HistogramVec> {
        self.add(declared.histograms())
    }
}

impl Metrics {
    /// Handles for everything in the list; `commands` are the names of the commands in the order of their table.
    pub fn new(commands: impl IntoIterator<Item = &'static str>) -> prometheus::Result<Metrics> {
        let build = Builder { registry: Registry::new() };
        let queue_families = QueueFamilies {
            enqueued: build.counters(JOBS_ENQUEUED)?,
            started: build.counters(JOBS_STARTED)?,
            completed: build.counters(JOBS_COMPLETED)?,
            failed: build.counters(JOBS_FAILED)?,
            retried: build.counters(JOBS_RETRIED)?,
            released: build.counters(JOBS_RELEASED)?,
            duration: build.histograms(JOB_DURATION)?,
            wait: build.histograms(JOB_WAIT)?,
        };
        let shard_families = ShardFamilies {
            up: build.gauges(SHARD_UP)?,
            draining: build.gauges(SHARD_DRAINING)?,
            sampled: build.gauges(SHARD_SAMPLED)?,
            errors: build.counters(SHARD_ERRORS)?,
            batch_ops: build.histograms(BATCH_SIZE)?,
            batch_seconds: build.histograms(BATCH_DURATION)?,
        };
        let error_family = build.counters(ERRORS)?;
        let sampled = Arc::new(Sampled::new()?);
        build.registry.register(Box::new(SampledFamilies(sampled.clone())))?;
        build.registry.register(Box::new(ProcessCollector::for_self()))?;
        if let Some(links) = &*LINKS {
            build.registry.register(Box::new(links.clone()))?;
        }
        let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
        build.gauges(BUILD_INFO)?.with_label_values(&[env!("CARGO_PKG_VERSION"), profile]).set(1);
        Ok(Metrics {
            other_queues: queue_families.member(OTHER),
            queue_families,
            queues: RwLock::default(),
            shard_families,
            command_family: build.histograms(COMMAND_DURATION)?,
            commands: commands.into_iter().map(|name| (name, OnceLock::new())).collect(),
            errors: Code::ALL.iter().map(|(_, word, ..)| error_family.with_label_values(&[word])).collect(),
            webhooks: build.counters(WEBHOOKS)?,
            connections: build.gauge(CONNECTIONS)?,
            connections_accepted: build.counter(CONNECTIONS_ACCEPTED)?,
            connections_refused: build.counter(CONNECTIONS_REFUSED)?,
            clients_blocked: build.gauge(CLIENTS_BLOCKED)?,
            workers_active: build.gauge(WORKERS_ACTIVE)?,
            bytes_received: build.counter(BYTES_RECEIVED)?,
            bytes_sent: build.counter(BYTES_SENT)?,
            draining: build.gauge(DRAINING)?,
            alerts_leading: build.gauge(ALERTS_LEADING)?,
            alerts_sent: build.counters(ALERTS_SENT)?,
            alerts_failed: build.counters(ALERTS_FAILED)?,
            sampled,
            registry: build.registry,
        })
    }

    /// The handles of a queue; takes one of the labels for it while there are any left.
    pub fn queue(&self, queue: &Name) -> Arc<QueueMetrics> {
        if let Some(known) = self.queues.read().unwrap_or_else(PoisonError::into_inner).get(queue) {
            return known.clone();
        }
        let mut queues = self.queues.write().unwrap_or_else(PoisonError::into_inner);
        if queues.len() >= QUEUES_MAX && !queues.contains_key(queue) {
            return self.other_queues.clone();
        }
        queues.entry(queue.clone()).or_insert_with(|| self.queue_families.member(queue.as_str())).clone()
    }

    pub fn shard(&self, shard: &str) -> ShardMetrics {
        let (families, label) = (&self.shard_families, &[shard]);
        ShardMetrics {
            up: families.up.with_label_values(label),
            draining: families.draining.with_label_values(label),
            sampled: families.sampled.with_label_values(label),
            errors: families.errors.with_label_values(label),
            batch_ops: families.batch_ops.with_label_values(label),
            batch_seconds: families.batch_seconds.with_label_values(label),
        }
    }

    /// Shows a sink of the configuration, before anything was sent there.
    pub fn alert_sink(&self, sink: &str) {
        self.alerts_sent.with_label_values(&[sink]);
        self.alerts_failed.with_label_values(&[sink]);
    }

    pub fn alert_sent(&self, sink: &str) {
        self.alerts_sent.with_label_values(&[sink]).inc();
    }

    pub fn alert_failed(&self, sink: &str) {
        self.alerts_failed.with_label_values(&[sink]).inc();
    }

    /// A shard that left the map has no figures any more.
    pub fn forget_shard(&self, shard: &str) {
        let (families, label) = (&self.shard_families, &[shard]);
        for family in [&families.up, &families.draining, &families.sampled] {
            let _ = family.remove_label_values(label);
        }
        let _ = families.errors.remove_label_values(label);
        for family in [&families.batch_ops, &families.batch_seconds].into_iter().chain(LINKS.as_ref()) {
            let _ = family.remove_label_values(label);
        }
        self.retract(shard);
    }

    /// The time that a command took, by its place in the table.
    pub fn command(&self, index: usize, took: Duration) {
        if let Some((name, histogram)) = self.commands.get(index) {
            let histogram = histogram.get_or_init(|| self.command_family.with_label_values(&[name]));
            histogram.observe(took.as_secs_f64());
        }
    }

    pub fn error(&self, code: Code) {
        if let Some(counter) = self.errors.get(code as usize) {
            counter.inc();
        }
    }

    /// A delivery to a configured path; these are few and come seldom, so nobody keeps their handles.
    pub fn webhook(&self, path: &str, result: &'static str) {
        self.webhooks.with_label_values(&[path, result]).inc();
    }

    /// Shows what one pass over a shard's queues found, until another proxy may show it.
    pub fn publish(&self, shard: &str, sample: ShardSample, until: Instant) {
        // Only a queue with something in it takes a label from the bounded ones.
        let named = |queue: &Name, sample: &QueueSample| {
            sample.is_busy() && !Arc::ptr_eq(&self.queue(queue), &self.other_queues)
        };
        let mut queues: BTreeMap<Box<str>, QueueSample> = BTreeMap::new();
        for (queue, sample) in &sample.queues {
            let known = self.queues.read().unwrap_or_else(PoisonError::into_inner).contains_key(queue);
            let label = if known || named(queue, sample) { queue.as_str() } else { OTHER };
            queues.entry(label.into()).or_default().add(sample);
        }
        let shown = Shown { until, queues_seen: sample.queues.len() as u64, queues };
        self.sampled.shards().insert(shard.into(), shown);
    }

    /// What is shown of the shard may be shown until then.
    pub fn show_until(&self, shard: &str, until: Instant) {
        if let Some(shown) = self.sampled.shards().get_mut(shard) {
            shown.until = until;
        }
    }

    /// Whether this process shows the shard's figures.
    pub fn shows(&self, shard: &str) -> bool {
        self.sampled.shards().get(shard).is_some_and(|shown| Instant::now() < shown.until)
    }

    /// Another proxy shows this shard from now on.
    pub fn retract(&self, shard: &str) {
        self.sampled.shards().remove(shard);
    }

    /// Everything, in one of the two text formats.
    pub fn render(&self, format: Format) -> String {
        text::render(&self.registry.gather(), format)
    }
}

/// What one shard says of one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueSample {
    pub ready: u64,
    pub scheduled: u64,
    pub leased: u64,
    pub dead: u64,
    pub oldest_ready_ms: u64,
    pub died: u64,
    pub lapsed: u64,
    pub expired: u64,
    pub cancelled: u64,
    pub redriven: u64,
}

impl QueueSample {
    fn is_busy(&self) -> bool {
        self.ready + self.scheduled + self.leased + self.dead > 0
    }

    fn add(&mut self, other: &QueueSample) {
        self.ready += other.ready;
        self.scheduled += other.scheduled;
        self.leased += other.leased;
        self.dead += other.dead;
        self.oldest_ready_ms = self.oldest_ready_ms.max(other.oldest_ready_ms);
        self.died += other.died;
        self.lapsed += other.lapsed;
        self.expired += other.expired;
        self.cancelled += other.cancelled;
        self.redriven += other.redriven;
    }
}

/// One pass over the queues of a shard.
#[derive(Clone, Debug, Default)]
pub struct ShardSample {
    pub queues: Vec<(Name, QueueSample)>,
}

struct Shown {
    until: Instant,
    queues_seen: u64,
    queues: BTreeMap<Box<str>, QueueSample>,
}

/// How a shared figure is read out of a sample.
type Read = fn(&QueueSample) -> f64;

const SHARED: &[(Declared, Read)] = &[
    (QUEUE_DEPTH, |sample| sample.ready as f64),
    (QUEUE_SCHEDULED, |sample| sample.scheduled as f64),
    (QUEUE_LEASED, |sample| sample.leased as f64),
    (QUEUE_DEAD, |sample| sample.dead as f64),
    (QUEUE_OLDEST, |sample| sample.oldest_ready_ms as f64 / 1_000.0),
    (JOBS_DEAD, |sample| sample.died as f64),
    (JOBS_LAPSED, |sample| sample.lapsed as f64),
    (JOBS_EXPIRED, |sample| sample.expired as f64),
    (JOBS_CANCELLED, |sample| sample.cancelled as f64),
    (JOBS_REDRIVEN, |sample| sample.redriven as f64),
];

/// The shared figures of the shards that this process samples.
struct Sampled {
    shards: Mutex<HashMap<Box<str>, Shown>>,
    descriptions: Vec<Desc>,
}

impl Sampled {
    fn new() -> prometheus::Result<Sampled> {
        let declared = SHARED.iter().map(|(declared, _)| declared).chain([&QUEUES]);
        let description = |declared: &Declared| {
            let labels = declared.labels.iter().map(|label| label.to_string()).collect();
            Desc::new(declared.name.into(), declared.help.into(), labels, HashMap::new())
        };
        let descriptions = declared.map(description).collect::<prometheus::Result<Vec<Desc>>>()?;
        Ok(Sampled { shards: Mutex::default(), descriptions })
    }

    fn shards(&self) -> std::sync::MutexGuard<'_, HashMap<Box<str>, Shown>> {
        self.shards.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct SampledFamilies(Arc<Sampled>);

impl Collector for SampledFamilies {
    fn desc(&self) -> Vec<&Desc> {
        self.0.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut shards = self.0.shards();
        shards.retain(|_, shown| Instant::now() < shown.until);
        let mut queues: BTreeMap<&str, QueueSample> = BTreeMap::new();
        for (label, sample) in shards.values().flat_map(|shown| &shown.queues) {
            queues.entry(label).or_default().add(sample);
        }
        let families = SHARED.iter().map(|(declared, read)| match declared.kind {
            // Apart by shard: when another proxy takes a shard over, a sum of several would jump there and look like news.
            Kind::Counter => family(
                declared,
                shards.iter().flat_map(|(shard, shown)| {
                    shown.queues.iter().map(|(label, sample)| (vec![&**label, &**shard], read(sample)))
                }),
            ),
            _ => family(declared, queues.iter().map(|(label, sample)| (vec![*label], read(sample)))),
        });
        let seen = shards.iter().map(|(shard, shown)| (vec![&**shard], shown.queues_seen as f64));
        families.chain([family(&QUEUES, seen)]).collect()
    }
}

fn family<'a>(declared: &Declared, members: impl Iterator<Item = (Vec<&'a str>, f64)>) -> MetricFamily {
    let members = members.map(|(values, value)| {
        let labels = declared.labels.iter().zip(values).map(|(name, value)| {
            let mut label = LabelPair::default();
            label.set_name((*name).into());
            label.set_value(value.into());
            label
        });
        let mut metric = Metric::from_label(labels.collect());
        if declared.kind == Kind::Counter {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        metric
    });
    let mut family = MetricFamily::default();
    family.set_name(declared.name.into());
    family.set_help(declared.help.into());
    family.set_field_type(match declared.kind {
        Kind::Counter => MetricType::COUNTER,
        Kind::Gauge | Kind::Histogram(_) => MetricType::GAUGE,
    });
    family.set_metric(members.collect());
    family
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text.as_bytes()).unwrap()
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn metrics() -> Metrics {
        Metrics::new(["PING", "GOFLOW.ENQUEUE"]).unwrap()
    }

    #[test]
    fn every_declared_metric_is_shown_and_nothing_else() {
        let metrics = metrics();
        metrics.command(1, Duration::from_millis(1));
        metrics.shard("s1");
        link_seconds("s1");
        metrics.webhook("/hooks/x", "accepted");
        metrics.alert_sink("ops");
        metrics.publish(
            "s1",
            ShardSample { queues: vec![(name("q"), QueueSample { ready: 1, ..QueueSample::default() })] },
            soon(),
        );
        let shown = metrics.render(Format::Prometheus);
        for declared in ALL {
            assert!(shown.contains(&format!("# TYPE {} ", declared.name)), "{} is not shown", declared.name);
            assert!(declared.help.ends_with('.'), "{}: its help is no sentence", declared.name);
            let counts = declared.name.ends_with("_total");
            assert_eq!(counts, declared.kind == Kind::Counter, "{}: a counter ends in _total", declared.name);
        }
        for line in shown.lines().filter(|line| line.starts_with("# TYPE goflow_")) {
            let name = line.split(' ').nth(2).unwrap();
            assert!(ALL.iter().any(|declared| declared.name == name), "{name} is not declared");
        }
    }

    #[test]
    fn no_two_metrics_have_one_name_in_openmetrics() {
        // There a counter's name is without its _total, and what a family's samples end in belongs to it.
        let family = |declared: &Declared| declared.name.strip_suffix("_total").unwrap_or(declared.name);
        let names = |declared: &Declared| -> Vec<String> {
            let endings: &[&str] = match declared.kind {
                Kind::Counter => &["", "_total", "_created"],
                Kind::Gauge => &[""],
                Kind::Histogram(_) => &["", "_bucket", "_count", "_sum", "_created"],
            };
            endings.iter().map(|ending| format!("{}{ending}", family(declared))).collect()
        };
        let mut taken: HashMap<String, &str> = HashMap::new();
        for declared in ALL {
            for name in names(declared) {
                assert_eq!(taken.insert(name, declared.name), None, "{} clashes", declared.name);
            }
        }
    }

    #[test]
    fn ten_thousand_queues_make_no_more_series_than_the_bound() {
        let metrics = metrics();
        let mut sample = ShardSample::default();
        for number in 0..10_000 {
            let queue = name(&format!("q{number}"));
            metrics.queue(&queue).enqueued.inc();
            sample.queues.push((queue, QueueSample { ready: 1, ..QueueSample::default() }));
        }
        metrics.publish("s1", sample, soon());
        let shown = metrics.render(Format::Prometheus);
        let series = |family: &str| shown.lines().filter(|line| line.starts_with(&format!("{family}{{"))).count();
        assert_eq!(series("goflow_jobs_enqueued_total"), QUEUES_MAX + 1);
        assert_eq!(series("goflow_queue_depth"), QUEUES_MAX + 1);
        let values = shown.lines().filter(|line| line.starts_with("goflow_queue_depth{"));
        let total: f64 = values.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum();
        assert_eq!(total, 10_000.0, "what is beyond the bound is counted under {OTHER}");
    }

    #[test]
    fn a_queue_that_is_empty_takes_no_label() {
        let metrics = metrics();
        let idle = (0..10_000).map(|number| (name(&format!("idle{number}")), QueueSample::default()));
        metrics.publish("s1", ShardSample { queues: idle.collect() }, soon());
        metrics.queue(&name("busy")).enqueued.inc();
        assert!(metrics.render(Format::Prometheus).contains("goflow_jobs_enqueued_total{queue=\"busy\"} 1"));
    }

    #[test]
    fn what_another_proxy_samples_is_not_shown_here() {
        let metrics = metrics();
        metrics.publish(
            "s1",
            ShardSample { queues: vec![(name("q"), QueueSample { ready: 7, ..QueueSample::default() })] },
            soon(),
        );
        assert!(metrics.render(Format::Prometheus).contains("goflow_queue_depth{queue=\"q\"} 7"));
        metrics.retract("s1");
        assert!(!metrics.render(Format::Prometheus).contains("goflow_queue_depth{queue"));
        metrics.publish("s1", ShardSample { queues: vec![(name("q"), QueueSample::default())] }, Instant::now());
        assert!(!metrics.render(Format::Prometheus).contains("goflow_queue_depth{queue"), "its time is over");
    }
}
