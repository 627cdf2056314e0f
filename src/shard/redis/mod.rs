//! A shard on Redis 6.2 or newer, Valkey or Dragonfly: alone, behind Sentinel, or a partition of a Redis Cluster.
//!
//! The rules are in Lua (`begin.lua`, `flow.lua`, `rules.lua`, `sessions.lua`, `finish.lua`, one script together). The ops of one queue in a
//! batch are one `EVALSHA`, all queues of a batch one write, so that a batch costs one round trip and each queue's part is
//! one commit. [`batch`] encodes ops and decodes answers, [`connect`] opens connections and says what their errors mean,
//! [`server`] asks the server about itself. [`keyed`] and `keyed.lua` are the same for locks and semaphores, one call for
//! all locks of a batch and one for all semaphores. [`dial`] and [`link`] carry ordinary commands and are apart from all that.
//!
//! Promises: no await without an end; a failure of one queue's call leaves the others' outcomes alone; after an unknown
//! outcome only what is safe to repeat is sent again, once. A change of the records' layout also needs `src/job.rs` and
//! [`batch`] changed, and a new prefix, or old queues would be misread.

mod batch;
mod connect;
pub mod dial;
mod keyed;
pub mod link;
mod server;

use std::collections::HashSet;
use std::sync::{Arc, LazyLock, Mutex as SyncMutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use foldhash::fast::RandomState;
use tokio::sync::Mutex;
use tokio::task::AbortHandle;

use self::batch::Part;
use self::connect::{Failure, Home, Live};
use super::feed::Ear;
use super::{Action, Applied, BoxFuture, Effect, Health, Keyed, Keyspace, OnWake, Op, Outcome, Rules, Shard, Stamp};
use crate::clock::{Millis, UnixMs};
use crate::error::{Code, Error, Happened, Result};
use crate::job::Name;

/// The keys of a queue, by what follows their tag; in the order of the script's `KEYS`.
const QUEUE_KEYS: [&str; 21] = [
    "meta",
    "jobs",
    "state",
    "ready",
    "ranked",
    "scheduled",
    "leased",
    "expiring",
    "dead",
    "held",
    "completed",
    "cancelled",
    "expired",
    "outbox",
    "blocked",
    "sessions",
    "bound",
    "limits",
    "moving",
    "retired",
    "journal",
];

/// The script of a queue. Locks and semaphores have their own ([`keyed`]).
const SCRIPT: &str = concat!(
    include_str!("begin.lua"),
    include_str!("flow.lua"),
    include_str!("rules.lua"),
    include_str!("sessions.lua"),
    include_str!("finish.lua")
);

/// The digest by which it is called.
static DIGEST: LazyLock<String> = LazyLock::new(|| redis::Script::new(SCRIPT).get_hash().to_owned());

/// What every connection makes sure the server knows.
const SCRIPTS: [&str; 2] = [SCRIPT, keyed::SCRIPT];

/// How long a server may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    pub connect: Duration,
    pub answer: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts { connect: Duration::from_secs(10), answer: Duration::from_secs(20) }
    }
}

/// Builds every key and channel of one shard: the one place that knows their names.
#[derive(Debug)]
struct Keys {
    /// Stands before the queue in a hash tag; only partitions of a cluster have one.
    partition: Option<Arc<str>>,
}

impl Keys {
    /// `goflow:{queue}:`, or `goflow:{name/3:queue}:` on a partition.
    fn of_queue(&self, queue: &Name) -> String {
        match &self.partition {
            None => format!("goflow:{{{queue}}}:"),
            Some(partition) => format!("goflow:{{{partition}:{queue}}}:"),
        }
    }

    /// What stands before the name of a lock or semaphore; each kind's are in one slot. No queue has a `!` in its name.
    fn of_objects(&self, kind: Keyed) -> String {
        let what = match kind {
            Keyed::Lock => "lock",
            Keyed::Semaphore => "sem",
        };
        format!("goflow:{{{}!{what}}}:", self.partition.as_deref().unwrap_or_default())
    }

    fn of_shard(&self, what: &str) -> String {
        match &self.partition {
            None => format!("goflow:{what}"),
            Some(partition) => format!("goflow:{{{partition}}}:{what}"),
        }
    }

    /// The notes of a role, in the slot of the role's own key.
    fn notes(&self, role: &str) -> String {
        match &self.partition {
            None => format!("goflow:{{{}}}:notes", self.of_shard(role)),
            Some(_) => self.of_shard(role) + ":notes",
        }
    }

    fn queues(&self) -> String {
        self.of_shard("queues")
    }

    /// What stands before the name of every channel but ordinary clients'.
    fn channels(&self) -> String {
        self.of_shard("")
    }

    fn wake(&self) -> String {
        self.of_shard("wake")
    }
}

/// The connection, if there is one; or when, and why, there was none to be had.
#[derive(Default)]
struct Link {
    live: Option<Live>,
    failed: Option<(Instant, String)>,
}

/// One shard on one server, or on one partition of a cluster.
pub struct Redis {
    name: Arc<str>,
    keys: Keys,
    rules: SyncMutex<Rules>,
    timeouts: Timeouts,
    home: Arc<Home>,
    live: Mutex<Link>,
    /// Queues that are in the registry, by this process's doing.
    registered: SyncMutex<HashSet<Name, RandomState>>,
    watcher: SyncMutex<Option<AbortHandle>>,
    follower: SyncMutex<Option<AbortHandle>>,
}

impl Redis {
    /// The shards of a URL, none of them connected yet: one under `name`, or `name/0` to `name/(n-1)` of a cluster.
    pub fn open(url: &str, name: &str, rules: Rules, timeouts: Timeouts) -> Result<Vec<Redis>> {
        let home = Arc::new(Home::parse(url, name, timeouts)?);
        Ok(match home.partitions() {
            None => vec![Redis::new(home, name, rules, timeouts)],
            Some(count) => {
                (0..count).map(|n| Redis::new(home.clone(), &format!("{name}/{n}"), rules, timeouts)).collect()
            }
        })
    }

    /// One shard, connected: `name` is the partition's own where the URL is a cluster's.
    pub async fn connect(url: &str, name: &str, rules: Rules) -> Result<Redis> {
        let timeouts = Timeouts::default();
        let redis = Redis::new(Arc::new(Home::parse(url, name, timeouts)?), name, rules, timeouts);
        redis.live().await?;
        Ok(redis)
    }

    /// Its name: that of the URL's entry, with `/n` where it is a partition.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn new(home: Arc<Home>, name: &str, rules: Rules, timeouts: Timeouts) -> Redis {
        let name: Arc<str> = name.into();
        let partition = home.partitions().map(|_| name.clone());
        Redis {
            name,
            keys: Keys { partition },
            rules: SyncMutex::new(rules),
            timeouts,
            home,
            live: Mutex::default(),
            registered: SyncMutex::default(),
            watcher: SyncMutex::default(),
            follower: SyncMutex::default(),
        }
    }

    fn down(&self, why: &str, happened: Happened) -> Error {
        Error::shard_down(&self.name, why, happened)
    }

    fn registered(&self) -> std::sync::MutexGuard<'_, HashSet<Name, RandomState>> {
        self.registered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection, opened where there is none. Whatever fails here has written nothing.
    async fn live(&self) -> Result<Live> {
        let asked_at = Instant::now();
        let mut link = self.live.lock().await;
        if let Some(live) = &link.live {
            return Ok(live.clone());
        }
        // Who stood in line while another tried in vain has its answer: one after the other they would wait for hours.
        if let Some((failed_at, why)) = &link.failed
            && *failed_at >= asked_at
        {
            return Err(self.down(why, Happened::No));
        }
        match self.home.connect(&SCRIPTS).await {
            Ok(live) => {
                // A server that was restarted without its data has also lost the registry.
                self.registered().clear();
                link.failed = None;
                Ok(link.live.insert(live).clone())
            }
            Err(why) => {
                let error = self.down(&why, Happened::No);
                link.failed = Some((Instant::now(), why));
                Err(error)
            }
        }
    }

    /// Drops a connection that failed; the next call opens another.
    async fn hang_up(&self, failed: &Live) {
        let mut link = self.live.lock().await;
        if link.live.as_ref().is_some_and(|live| live.id == failed.id) {
            link.live = None;
        }
        self.home.forget(failed);
    }

    /// Sends the calls of some queues in one write. The answer of each stands alone.
    async fn call(
        &self,
        parts: &[Part],
        ops: &[Op],
        at: Option<UnixMs>,
    ) -> Vec<std::result::Result<redis::Value, Failure>> {
        let live = match self.live().await {
            Ok(live) => live,
            Err(error) => return parts.iter().map(|_| Err(Failure::Down(error.clone()))).collect(),
        };
        let mut commands = Vec::with_capacity(parts.len() + 1);
        let new_queues: Vec<Name> = {
            let registered = self.registered();
            parts.iter().filter_map(Part::new_queue).filter(|queue| !registered.contains(*queue)).cloned().collect()
        };
        if !new_queues.is_empty() {
            let mut registration = redis::cmd("SADD");
            registration.arg(self.keys.queues());
            new_queues.iter().for_each(|queue| {
                registration.arg(queue.as_str());
            });
            commands.push(registration);
        }
        let rules = *self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        commands.extend(parts.iter().map(|part| part.command(&DIGEST, &self.keys, &rules, ops, at)));
        let mut answers = live.send(commands, self.timeouts.answer).await;
        if !new_queues.is_empty() {
            match answers.remove(0) {
                Ok(_) => self.registered().extend(new_queues),
                // The calls are not taken back for it: the queue is registered with the next batch.
                Err(error) => tracing::warn!(shard = &*self.name, %error, "a queue could not be registered"),
            }
        }
        let judged: Vec<_> =
            answers.into_iter().map(|answer| answer.map_err(|e| connect::judge(&self.name, &e))).collect();
        if judged.iter().any(|answer| matches!(answer, Err(failure) if failure.ends_connection())) {
            self.hang_up(&live).await;
        }
        judged
    }

    /// Calls, and once more for the queues of which the server had forgotten the script.
    async fn call_loaded(
        &self,
        parts: &[Part],
        ops: &[Op],
        at: Option<UnixMs>,
    ) -> Vec<std::result::Result<redis::Value, Failure>> {
        let mut answers = self.call(parts, ops, at).await;
        let forgotten: Vec<usize> =
            (0..answers.len()).filter(|at| matches!(answers[*at], Err(Failure::NoScript))).collect();
        if forgotten.is_empty() {
            return answers;
        }
        let loaded = match self.live().await {
            Ok(live) => live.load(&SCRIPTS, self.timeouts.answer).await.map_err(|why| self.down(&why, Happened::No)),
            Err(error) => Err(error),
        };
        let again: Vec<Part> = forgotten.iter().map(|at| parts[*at].clone()).collect();
        let again = match loaded {
            Ok(()) => self.call(&again, ops, at).await,
            Err(error) => again.iter().map(|_| Err(Failure::Down(error.clone()))).collect(),
        };
        for (at, answer) in forgotten.into_iter().zip(again) {
            answers[at] = match answer {
                Err(Failure::NoScript) => Err(Failure::Down(self.down("does not keep its scripts", Happened::No))),
                answer => answer,
            };
        }
        answers
    }

    async fn apply_ops(&self, ops: Vec<Op>, at: Option<UnixMs>) -> Applied {
        let mut outcomes: Vec<Option<Result<Outcome>>> =
            ops.iter().map(|op| batch::check(&op.action).err().map(Err)).collect();
        let mut effects: Vec<Effect> = Vec::new();
        let mut parts = batch::split(&ops, |place| outcomes[place].is_none());
        for is_repeat in [false, true] {
            let answers = self.call_loaded(&parts, &ops, at).await;
            let mut repeated = vec![false; ops.len()];
            for (part, answer) in parts.iter().zip(answers) {
                let decoded =
                    answer.and_then(|value| part.decode(value, &ops).ok_or_else(|| Failure::unreadable(&self.name)));
                match decoded {
                    Ok((found, effect)) => {
                        part.places().zip(found).for_each(|(place, outcome)| outcomes[place] = Some(Ok(outcome)));
                        effects.extend(effect);
                    }
                    Err(failure) => {
                        let error = failure.into_error(&self.name);
                        for place in part.places() {
                            let action = &ops[place].action;
                            let again = match error.happened {
                                // Without the enqueues, a server that is out of memory takes what frees some.
                                Happened::No => {
                                    error.code == Code::Overloaded && !matches!(action, Action::Enqueue { .. })
                                }
                                // What may be repeated is sent again, once, after whatever kept the answer back.
                                Happened::Maybe => batch::is_repeatable(action),
                            };
                            if again && !is_repeat {
                                repeated[place] = true;
                            } else {
                                outcomes[place] = Some(Err(error.clone()));
                            }
                        }
                    }
                }
            }
            if !repeated.contains(&true) {
                break;
            }
            parts = batch::split(&ops, |place| repeated[place]);
        }
        let lost = || Err(self.down("gave no answer", Happened::Maybe));
        Applied { outcomes: outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(lost)).collect(), effects }
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        for task in [&self.watcher, &self.follower] {
            if let Some(task) = task.lock().unwrap_or_else(PoisonError::into_inner).take() {
                task.abort();
            }
        }
    }
}

impl Shard for Redis {
    fn apply(&self, ops: Vec<Op>, at: Option<UnixMs>) -> BoxFuture<'_, Applied> {
        Box::pin(self.apply_ops(ops, at))
    }

    fn queues(&self) -> BoxFuture<'_, Result<Vec<Name>>> {
        Box::pin(self.read_queues())
    }

    fn objects(&self) -> BoxFuture<'_, Result<Vec<(Keyed, Name)>>> {
        Box::pin(self.read_objects())
    }

    fn watch(&self, on_wake: OnWake) {
        let task = tokio::spawn(connect::watch(self.home.clone(), self.keys.wake(), self.timeouts, on_wake));
        let before = self.watcher.lock().unwrap_or_else(PoisonError::into_inner).replace(task.abort_handle());
        if let Some(before) = before {
            before.abort();
        }
    }

    fn follow(&self, ear: Arc<Ear>) {
        let task = tokio::spawn(connect::follow(self.home.clone(), self.keys.channels(), self.timeouts, ear));
        let before = self.follower.lock().unwrap_or_else(PoisonError::into_inner).replace(task.abort_handle());
        if let Some(before) = before {
            before.abort();
        }
    }

    fn probe(&self) -> BoxFuture<'_, Result<Health>> {
        Box::pin(self.read_health())
    }

    fn claim(&self, stamp: Stamp) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.claim_as(stamp))
    }

    fn stamp(&self) -> BoxFuture<'_, Result<Option<Stamp>>> {
        Box::pin(self.read_stamp())
    }

    fn lead(&self, role: &'static str, holder: &str, for_ms: Millis) -> BoxFuture<'_, Result<bool>> {
        let holder = holder.to_owned();
        Box::pin(async move { self.ask_for_role(role, &holder, for_ms).await })
    }

    fn note<'a>(
        &'a self,
        role: &'static str,
        holder: &'a str,
        name: &'a str,
        text: Option<Bytes>,
    ) -> BoxFuture<'a, Result<bool>> {
        Box::pin(self.keep_note(role, holder, name, text))
    }

    fn notes(&self, role: &'static str) -> BoxFuture<'_, Result<Vec<(String, Bytes)>>> {
        Box::pin(self.read_notes(role))
    }

    fn set_rules(&self, rules: Rules) {
        *self.rules.lock().unwrap_or_else(PoisonError::into_inner) = rules;
    }

    fn keyspace(&self) -> Keyspace {
        self.home.keyspace(&self.name)
    }
}
