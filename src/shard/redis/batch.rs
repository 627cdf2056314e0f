//! What one batch says to the script and what the script answers: the ops of each queue as one `EVALSHA`, in runs.
//!
//! Ops of one kind that follow each other are one run with many elements, so that the script uses the many-element forms
//! of commands. The layout of arguments and answers is described in `begin.lua` and at each function of the scripts; here is
//! the other side of it. Numbers are big-endian.

use std::collections::{HashMap, HashSet};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use foldhash::fast::RandomState;
use redis::{Cmd, Value};

use super::{Keys, QUEUE_KEYS, keyed};
use crate::clock::UnixMs;
use crate::error::{Error, Result};
use crate::job::{Delivery, JobRef, JobState, JobView, Lease, Name, Spec, TEXT_BYTES_MAX};
use crate::shard::event::{self, PAGE_EVENTS_MAX, Recording};
use crate::shard::{
    Action, BULK_JOBS_MAX, DeathGroup, DeathMark, Deed, Departure, Effect, Keyed, LimitDeed, LimitView, Op, Outcome,
    PAGE_JOBS_MAX, PART_BYTES_MAX, Placed, QueueLimits, RATE_STEPS, Rate, Rules, SessionView, Start, Stats,
    TICK_JOBS_MAX, TravelMark,
};

/// Numbers of 6 bytes are below this.
const SHORT_MAX: u64 = (1 << 48) - 1;
/// No offset or count of a page is larger.
const PAGE_MAX: u64 = 1 << 40;
/// A record starts with so many digits of its enqueue time.
const STAMP_DIGITS: usize = 13;

// The script has one bound for both.
const _: () = assert!(TICK_JOBS_MAX == BULK_JOBS_MAX);
// And this one is written in `rules.lua` again.
const _: () = assert!(RATE_STEPS == 512);

/// The ops of one queue, or those on all locks, or on all semaphores: one call.
#[derive(Clone)]
pub struct Part {
    target: Target,
    /// Whether the call may make a queue that was not there.
    creates: bool,
    places: Vec<usize>,
    runs: Vec<Run>,
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Target {
    Queue(Name),
    Objects(Keyed),
}

/// Ops that the script does in one go; numbers are places in `Part::places`.
#[derive(Clone)]
enum Run {
    /// New jobs with nothing special.
    Plain(Vec<usize>),
    Special(Vec<usize>),
    Lease(Vec<usize>),
    /// Leases, with the op that each belongs to.
    Ack(Vec<(usize, Lease)>),
    One(usize),
}

/// Sorts the chosen ops by queue or kind of object, in the order in which these appear.
pub fn split(ops: &[Op], is_chosen: impl Fn(usize) -> bool) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    let mut known: HashMap<Target, usize, RandomState> = HashMap::default();
    for (place, op) in ops.iter().enumerate().filter(|(place, _)| is_chosen(*place)) {
        let target = match &op.action {
            Action::Keyed { kind, .. } => Target::Objects(*kind),
            _ => Target::Queue(op.queue.clone()),
        };
        let at = *known.entry(target).or_insert_with_key(|target| {
            parts.push(Part { target: target.clone(), creates: false, places: Vec::new(), runs: Vec::new() });
            parts.len() - 1
        });
        parts[at].push(place, &op.action);
    }
    parts
}

/// Whether an op may be sent twice: the second time changes nothing and is answered alike. An enqueue with an id is not
/// among them: the second answer would name the first's job as another's.
pub fn is_repeatable(action: &Action) -> bool {
    matches!(
        action,
        Action::Ack { .. }
            | Action::Fail { .. }
            | Action::Release { .. }
            | Action::Extend { .. }
            | Action::Job { .. }
            | Action::Peek { .. }
            | Action::Len { .. }
            | Action::Stats
            | Action::Pause { .. }
            | Action::Limit(LimitDeed::Look | LimitDeed::Share { .. })
            | Action::DeadGet { .. }
            | Action::Keep { .. }
            | Action::Sessions { .. }
            | Action::History { .. }
            | Action::EventsAfter { .. }
            | Action::EventsRecent { .. }
            | Action::Tick
            | Action::Outbox
            | Action::OutboxTold { .. }
            | Action::OutboxSettle { .. }
            | Action::Seek { .. }
            | Action::Depart { .. }
            | Action::Arrive { .. }
            | Action::Departed { .. }
            | Action::Keyed { deed: Deed::Acquire { .. } | Deed::Renew { .. } | Deed::Show, .. }
    )
}

/// Refuses what no call could do, before one is made.
pub fn check(action: &Action) -> Result<()> {
    match action {
        Action::Enqueue { policy, payloads, .. }
            if payloads.len() != 1 && (policy.id.is_some() || policy.unique.is_some()) =>
        {
            Err(Error::bad("ID and UNIQUE are for one job, not for many"))
        }
        Action::Depart { state, .. } if state.is_over() || *state == JobState::Leased => {
            Err(Error::bad("only jobs that wait or are dead go to another shard"))
        }
        _ => Ok(()),
    }
}

fn is_plain(action: &Action) -> bool {
    matches!(action, Action::Enqueue { policy, start: Start::Now, .. }
        if policy.priority == 0 && policy.ttl == 0 && policy.id.is_none() && policy.unique.is_none() && policy.group.is_none())
}

impl Part {
    /// The queue that the call may make, where it was not there.
    pub fn new_queue(&self) -> Option<&Name> {
        match &self.target {
            Target::Queue(queue) if self.creates => Some(queue),
            _ => None,
        }
    }

    fn push(&mut self, place: usize, action: &Action) {
        let own = self.places.len();
        self.places.push(place);
        self.creates |= match action {
            Action::Enqueue { payloads, .. } => !payloads.is_empty(),
            Action::Pause { paused } => *paused,
            Action::Limit(deed) => *deed != LimitDeed::Look,
            Action::Seek { homes_since, .. } => *homes_since > 0,
            Action::Arrive { .. } => true,
            _ => false,
        };
        match (action, self.runs.last_mut()) {
            (Action::Enqueue { payloads, .. }, _) if payloads.is_empty() => {}
            (Action::Lease { tokens, .. }, _) if tokens.is_empty() => {}
            (Action::Enqueue { .. }, Some(Run::Plain(run))) if is_plain(action) => run.push(own),
            (Action::Enqueue { .. }, _) if is_plain(action) => self.runs.push(Run::Plain(vec![own])),
            (Action::Enqueue { .. }, Some(Run::Special(run))) => run.push(own),
            (Action::Enqueue { .. }, _) => self.runs.push(Run::Special(vec![own])),
            (Action::Lease { .. }, Some(Run::Lease(run))) => run.push(own),
            (Action::Lease { .. }, _) => self.runs.push(Run::Lease(vec![own])),
            (Action::Ack { leases, .. }, _) => self.push_leases(own, leases),
            _ => self.runs.push(Run::One(own)),
        }
    }

    /// The script reads all jobs of a run before it writes, so that a job named twice needs a second run.
    fn push_leases(&mut self, own: usize, leases: &[Lease]) {
        let mut seen: HashSet<u64, RandomState> = match self.runs.last() {
            Some(Run::Ack(run)) => run.iter().map(|(_, lease)| lease.seq).collect(),
            _ => HashSet::default(),
        };
        for lease in leases {
            let is_new = seen.insert(lease.seq);
            match self.runs.last_mut() {
                Some(Run::Ack(run)) if is_new => run.push((own, *lease)),
                _ => {
                    seen = HashSet::from_iter([lease.seq]);
                    self.runs.push(Run::Ack(vec![(own, *lease)]));
                }
            }
        }
    }

    /// The places of the part's ops in the batch.
    pub fn places(&self) -> impl Iterator<Item = usize> {
        self.places.iter().copied()
    }

    fn action<'a>(&self, ops: &'a [Op], own: usize) -> &'a Action {
        &ops[self.places[own]].action
    }

    pub fn command(&self, digest: &str, keys: &Keys, rules: &Rules, ops: &[Op], at: Option<UnixMs>) -> Cmd {
        let queue = match &self.target {
            Target::Queue(queue) => queue,
            Target::Objects(kind) => return keyed::command(keys, *kind, self.deeds(ops), at),
        };
        let mut command = redis::cmd("EVALSHA");
        command.arg(digest).arg(QUEUE_KEYS.len());
        let mut key = keys.of_queue(queue);
        let prefix = key.len();
        for kind in QUEUE_KEYS {
            key.truncate(prefix);
            key.push_str(kind);
            command.arg(key.as_bytes());
        }
        let mut scratch = BytesMut::with_capacity(1024);
        put_header(&mut scratch, keys, rules, queue, at);
        command.arg(&scratch[..]);
        for run in &self.runs {
            self.put_run(&mut command, &mut scratch, run, ops);
        }
        command
    }

    /// What is done to which object.
    fn deeds<'a>(&'a self, ops: &'a [Op]) -> impl Iterator<Item = (&'a Name, &'a Deed)> {
        self.places.iter().map(|place| &ops[*place]).filter_map(|op| match &op.action {
            Action::Keyed { deed, .. } => Some((&op.queue, deed)),
            _ => None,
        })
    }

    fn put_run(&self, command: &mut Cmd, scratch: &mut BytesMut, run: &Run, ops: &[Op]) {
        match run {
            Run::Plain(run) | Run::Special(run) => {
                let is_special = !run.iter().all(|own| is_plain(self.action(ops, *own)));
                // One by one, where all are: then each stands for itself.
                let is_sized = is_special || run.iter().any(|own| jobs_of(self.action(ops, *own)) != 1);
                let jobs = run.iter().map(|own| jobs_of(self.action(ops, *own))).sum::<usize>();
                let letter = if is_special {
                    "E"
                } else if is_sized {
                    "m"
                } else {
                    "e"
                };
                command.arg(letter).arg(jobs);
                if is_sized {
                    scratch.clear();
                    run.iter().for_each(|own| scratch.put_u32(jobs_of(self.action(ops, *own)) as u32));
                    command.arg(&scratch[..]);
                }
                for own in run {
                    put_jobs(command, scratch, self.action(ops, *own), is_special);
                }
            }
            Run::Lease(run) => {
                let actions = run.iter().map(|own| self.action(ops, *own));
                put_leases(command, scratch, actions);
            }
            Run::Ack(run) => self.put_acks(command, scratch, run, ops),
            Run::One(own) => put_one(command, scratch, self.action(ops, *own)),
        }
    }

    fn put_acks(&self, command: &mut Cmd, scratch: &mut BytesMut, run: &[(usize, Lease)], ops: &[Op]) {
        scratch.clear();
        run.iter().for_each(|(_, lease)| put_lease(scratch, *lease));
        command.arg("a").arg(&scratch[..]);
        scratch.clear();
        let mut results: Vec<&[u8]> = Vec::new();
        let mut jobs = 0u32;
        for (own, _) in run {
            let result = match self.action(ops, *own) {
                Action::Ack { result, .. } => cut(result),
                _ => &[],
            };
            if results.last().is_some_and(|last| *last != result) {
                scratch.put_u32(jobs);
                jobs = 0;
            }
            if jobs == 0 {
                results.push(result);
            }
            jobs += 1;
        }
        scratch.put_u32(jobs);
        command.arg(&scratch[..]);
        results.into_iter().for_each(|result| {
            command.arg(result);
        });
    }

    /// An outcome for each op of the part in order, and a queue's effect; `None` when this is no answer of the script.
    pub fn decode(&self, answer: Value, ops: &[Op]) -> Option<(Vec<Outcome>, Option<Effect>)> {
        let Target::Queue(queue) = &self.target else {
            let read = self.deeds(ops).zip(list(answer)?).map(|((_, deed), value)| keyed::read_outcome(deed, value));
            let outcomes: Option<Vec<Outcome>> = read.collect();
            return Some((outcomes.filter(|outcomes| outcomes.len() == self.places.len())?, None));
        };
        let mut answer = list(answer)?.into_iter();
        let mut runs = list(answer.next()?)?.into_iter();
        let (ready, load, due, now) =
            (int(&answer.next()?)?, int(&answer.next()?)?, int(&answer.next()?)?, int(&answer.next()?)? as u64);
        let deaths = int(&answer.next()?)? as u64;
        let mut outcomes: Vec<Outcome> =
            (0..self.places.len()).map(|own| outcome_of_nothing(self.action(ops, own))).collect();
        for run in &self.runs {
            let value = runs.next()?;
            match run {
                Run::Plain(run) => {
                    let (mut seq, marks) = read_taken(value)?;
                    for (nth, own) in run.iter().enumerate() {
                        let jobs = jobs_of(self.action(ops, *own)) as u64;
                        if marks.as_ref().is_some_and(|marks| marks.get(nth) != Some(&b'1')) {
                            outcomes[*own] = Outcome::Full(self.op(ops, *own));
                            continue;
                        }
                        outcomes[*own] = Outcome::Enqueued((seq..seq + jobs).map(Placed::Added).collect());
                        seq += jobs;
                    }
                }
                Run::Special(run) => {
                    let mut placed = list(value)?.into_iter();
                    for own in run {
                        let jobs = jobs_of(self.action(ops, *own));
                        let placed: Vec<Value> = placed.by_ref().take(jobs).collect();
                        outcomes[*own] = match placed.first()? {
                            Value::Nil => Outcome::Full(self.op(ops, *own)),
                            _ if placed.len() < jobs => return None,
                            _ => Outcome::Enqueued(placed.into_iter().map(read_placed).collect::<Option<_>>()?),
                        };
                    }
                }
                Run::Lease(run) => self.read_deliveries(value, run, ops, now, &mut outcomes)?,
                Run::Ack(run) => {
                    let counted = text(value)?;
                    for ((own, _), mark) in run.iter().zip(counted.iter()) {
                        if let (Outcome::Count(count), b'1') = (&mut outcomes[*own], mark) {
                            *count += 1;
                        }
                    }
                }
                Run::One(own) => outcomes[*own] = read_one(self.action(ops, *own), value, now)?,
            }
        }
        let effect = Effect {
            queue: queue.clone(),
            ready: ready as u64,
            load: load as u64,
            due_in: u64::try_from(due).ok(),
            deaths,
        };
        Some((outcomes, Some(effect)))
    }

    fn op(&self, ops: &[Op], own: usize) -> Box<Op> {
        Box::new(ops[self.places[own]].clone())
    }

    fn read_deliveries(
        &self,
        value: Value,
        run: &[usize],
        ops: &[Op],
        now: UnixMs,
        outcomes: &mut [Outcome],
    ) -> Option<()> {
        let mut value = list(value)?.into_iter();
        let (mut seqs, mut spent) = (text(value.next()?)?, text(value.next()?)?);
        let mut records = list(value.next()?)?.into_iter();
        let mut bytes = 0;
        for own in run {
            let Action::Lease { tokens, lease_ms, .. } = self.action(ops, *own) else { return None };
            let mut deliveries = Vec::new();
            for token in tokens {
                let Some(record) = records.next() else { break };
                let record = text(record)?;
                bytes += record.len();
                let (enqueued_at, spec) = read_record(record)?;
                deliveries.push(Delivery {
                    lease: Lease { seq: short(&mut seqs)?, token: *token },
                    spec,
                    attempt: if spent.is_empty() { 1 } else { spent.try_get_u32().ok()?.saturating_add(1) },
                    enqueued_at,
                    lease_until: now.saturating_add(*lease_ms).min(SHORT_MAX),
                });
            }
            outcomes[*own] = match deliveries.is_empty() && bytes >= PART_BYTES_MAX {
                // The script stopped there, though there may be more.
                true => Outcome::Later(self.op(ops, *own)),
                false => Outcome::Leased(deliveries),
            };
        }
        Some(())
    }
}

fn jobs_of(action: &Action) -> usize {
    match action {
        Action::Enqueue { payloads, .. } => payloads.len(),
        _ => 1,
    }
}

/// What an op answers that names no job at all, and where counting begins.
fn outcome_of_nothing(action: &Action) -> Outcome {
    match action {
        Action::Enqueue { .. } => Outcome::Enqueued(Vec::new()),
        Action::Lease { .. } => Outcome::Leased(Vec::new()),
        _ => Outcome::Count(0),
    }
}

pub fn put_short(out: &mut BytesMut, number: u64) {
    out.put_uint(number.min(SHORT_MAX), 6);
}

fn put_lease(out: &mut BytesMut, lease: Lease) {
    put_short(out, lease.seq);
    put_short(out, lease.token);
}

pub fn put_bytes(out: &mut BytesMut, bytes: &[u8]) {
    let bytes = cut(bytes);
    out.put_u16(bytes.len() as u16);
    out.put_slice(bytes);
}

/// What is kept of a text.
fn cut(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.len().min(TEXT_BYTES_MAX)]
}

fn put_header(out: &mut BytesMut, keys: &Keys, rules: &Rules, queue: &Name, at: Option<UnixMs>) {
    out.clear();
    put_short(out, at.unwrap_or(0));
    put_short(out, rules.retention.age_ms);
    put_short(out, rules.retention.jobs);
    out.put_u32(rules.lapses_max);
    out.put_u32(BULK_JOBS_MAX as u32);
    let recording = rules.recording.unwrap_or(Recording { age_ms: 0, histories: 0, journal: 0 });
    put_short(out, recording.age_ms);
    put_short(out, recording.histories);
    put_short(out, recording.journal);
    put_bytes(out, keys.wake().as_bytes());
    put_bytes(out, queue.as_str().as_bytes());
    put_bytes(out, keys.channels().as_bytes());
}

fn put_jobs(command: &mut Cmd, scratch: &mut BytesMut, action: &Action, is_special: bool) {
    let Action::Enqueue { policy, payloads, start } = action else { return };
    for payload in payloads {
        if is_special {
            scratch.clear();
            let (mode, when) = match start {
                Start::Now => (b'n', 0),
                Start::Delay(delay) => (b'd', *delay),
                Start::At(point) => (b'a', *point),
            };
            scratch.put_u8(mode);
            put_short(scratch, when);
            put_short(scratch, policy.homes_since);
            put_bytes(scratch, policy.id.as_deref().unwrap_or_default());
            put_bytes(scratch, policy.unique.as_ref().map_or(&[][..], |(key, _)| key));
            if let Some((_, span)) = &policy.unique {
                put_short(scratch, *span);
            }
            command.arg(&scratch[..]);
        }
        scratch.clear();
        Spec { policy: policy.clone(), payload: payload.clone() }.encode_into(scratch);
        command.arg(&scratch[..]);
    }
}

fn put_leases<'a>(command: &mut Cmd, scratch: &mut BytesMut, actions: impl Iterator<Item = &'a Action>) {
    scratch.clear();
    let mut parties: Vec<(u32, u64, &[u8])> = Vec::new();
    for action in actions {
        let Action::Lease { tokens, lease_ms, worker } = action else { continue };
        tokens.iter().for_each(|token| put_short(scratch, *token));
        match parties.last_mut() {
            Some((jobs, ms, by)) if (*ms, *by) == (*lease_ms, &worker[..]) => *jobs += tokens.len() as u32,
            _ => parties.push((tokens.len() as u32, *lease_ms, worker)),
        }
    }
    command.arg("l").arg(&scratch[..]);
    scratch.clear();
    for (jobs, lease_ms, worker) in parties {
        scratch.put_u32(jobs);
        put_short(scratch, lease_ms);
        put_bytes(scratch, worker);
    }
    command.arg(&scratch[..]);
}

fn state_char(state: JobState) -> &'static str {
    match state {
        JobState::Ready => "R",
        JobState::Scheduled => "S",
        JobState::Leased => "L",
        JobState::Dead => "D",
        JobState::Completed => "C",
        JobState::Cancelled => "X",
        JobState::Expired => "E",
    }
}

fn read_state(char: u8) -> Option<JobState> {
    Some(match char {
        b'R' | b'r' | b'B' => JobState::Ready,
        b'S' | b's' => JobState::Scheduled,
        b'L' => JobState::Leased,
        b'D' => JobState::Dead,
        b'C' => JobState::Completed,
        b'X' => JobState::Cancelled,
        b'E' => JobState::Expired,
        _ => return None,
    })
}

fn put_ref(command: &mut Cmd, scratch: &mut BytesMut, job: &JobRef) {
    scratch.clear();
    match job {
        JobRef::Seq(seq) => {
            scratch.put_u8(b's');
            put_short(scratch, *seq);
        }
        JobRef::Chosen(id) => {
            scratch.put_u8(b'i');
            scratch.put_slice(id);
        }
    }
    command.arg(&scratch[..]);
}

fn put_limit(command: &mut Cmd, scratch: &mut BytesMut, deed: &LimitDeed) {
    command.arg("h");
    match deed {
        LimitDeed::Look => command.arg("l").arg("").arg(""),
        LimitDeed::Share { version, limits } => {
            scratch.clear();
            put_short(scratch, *version);
            put_short(scratch, limits.concurrency.unwrap_or(SHORT_MAX));
            put_short(scratch, limits.rate.map_or(SHORT_MAX, |rate| rate.jobs));
            put_short(scratch, limits.rate.map_or(0, |rate| rate.per_ms));
            put_short(scratch, limits.waiting.unwrap_or(SHORT_MAX));
            command.arg("s").arg(&scratch[..]).arg("")
        }
        LimitDeed::Note { was, ledger } => command.arg("w").arg(*was).arg(&ledger[..]),
    };
}

fn put_refs(command: &mut Cmd, scratch: &mut BytesMut, op: &str, jobs: &[JobRef]) {
    command.arg(op).arg(jobs.len());
    jobs.iter().for_each(|job| put_ref(command, scratch, job));
}

fn put_marks(command: &mut Cmd, scratch: &mut BytesMut, marks: &[DeathMark]) {
    command.arg(marks.len());
    for mark in marks {
        scratch.clear();
        put_short(scratch, mark.born);
        put_short(scratch, mark.count);
        command.arg(&mark.key[..]).arg(&scratch[..]);
    }
}

/// An op that the script does alone: its letter and its arguments.
fn put_one(command: &mut Cmd, scratch: &mut BytesMut, action: &Action) {
    if let Action::Fail { lease, .. }
    | Action::Release { lease, .. }
    | Action::Extend { lease, .. }
    | Action::Progress { lease, .. } = action
    {
        scratch.clear();
        put_lease(scratch, *lease);
    }
    match action {
        Action::Fail { error, trace, retry_in, dead, .. } => {
            command.arg("f").arg(&scratch[..]);
            match (dead, retry_in) {
                (true, _) => command.arg("D"),
                (false, None) => command.arg(""),
                (false, Some(delay)) => command.arg(*delay),
            };
            command.arg(cut(error)).arg(cut(trace));
        }
        Action::Release { delay, .. } => {
            command.arg("r").arg(&scratch[..]).arg(*delay);
        }
        Action::Extend { lease_ms, .. } => {
            command.arg("x").arg(&scratch[..]).arg(*lease_ms);
        }
        Action::Progress { percent, text, .. } => {
            command.arg("p").arg(&scratch[..]).arg(*percent).arg(cut(text));
        }
        Action::Cancel { job } => put_ref(command.arg("c"), scratch, job),
        Action::Job { job } => put_ref(command.arg("j"), scratch, job),
        Action::DeadGet { job } => put_ref(command.arg("g"), scratch, job),
        Action::Peek { state, offset, count } => {
            command
                .arg("k")
                .arg(state_char(*state))
                .arg(*offset.min(&PAGE_MAX))
                .arg(*count.min(&(PAGE_JOBS_MAX as u64)));
        }
        Action::Len { state } => {
            command.arg("n").arg(state_char(*state));
        }
        Action::Stats => {
            command.arg("s");
        }
        Action::Pause { paused } => {
            command.arg("P").arg(u8::from(*paused));
        }
        Action::Limit(deed) => put_limit(command, scratch, deed),
        Action::Purge { state } => {
            command.arg("u").arg(state_char(*state));
        }
        Action::History { job } => put_ref(command.arg("y"), scratch, job),
        Action::EventsAfter { number, count } => {
            command.arg("v").arg(*number.min(&SHORT_MAX)).arg(*count.min(&(PAGE_EVENTS_MAX as u64)));
        }
        Action::EventsRecent { count } => {
            command.arg("V").arg(*count.min(&(PAGE_EVENTS_MAX as u64)));
        }
        Action::DeadRetry { jobs } => put_refs(command, scratch, "R", jobs),
        Action::DeadDelete { jobs } => put_refs(command, scratch, "D", jobs),
        Action::DeadRetryAll { until } => {
            command.arg("A");
            match until {
                Some(until) => command.arg(*until.min(&SHORT_MAX)),
                None => command.arg("-1"),
            };
        }
        Action::Outbox => {
            command.arg("o");
        }
        Action::OutboxTold { channel, marks } => {
            command.arg("T").arg(cut(channel));
            put_marks(command, scratch, marks);
        }
        Action::OutboxSettle { marks } => {
            command.arg("F");
            put_marks(command, scratch, marks);
        }
        Action::Keep { keeper, keep_ms, parties } => {
            scratch.clear();
            put_short(scratch, *keeper);
            put_short(scratch, *keep_ms);
            command.arg("K").arg(&scratch[..]).arg(parties.len());
            for party in parties {
                scratch.clear();
                put_short(scratch, party.run_ms);
                party.leases.iter().for_each(|lease| put_lease(scratch, *lease));
                command.arg(&party.session[..]).arg(&scratch[..]);
            }
        }
        Action::Sessions { offset, count } => {
            command.arg("w").arg(*offset.min(&PAGE_MAX)).arg(*count.min(&(PAGE_JOBS_MAX as u64)));
        }
        Action::Seek { id, unique, homes_since } => {
            scratch.clear();
            put_short(scratch, *homes_since);
            put_bytes(scratch, id.as_deref().unwrap_or_default());
            put_bytes(scratch, unique.as_deref().unwrap_or_default());
            command.arg("q").arg(&scratch[..]);
        }
        Action::Depart { state, count, route, outdated } => {
            scratch.clear();
            put_mark(scratch, *outdated);
            command.arg("d").arg(state_char(*state)).arg(*count.min(&(BULK_JOBS_MAX as u64)));
            command.arg(&route[..]).arg(&scratch[..]);
        }
        Action::Arrive { source, mark, jobs } => {
            scratch.clear();
            put_mark(scratch, *mark);
            command.arg("W").arg(&source[..]).arg(&scratch[..]).arg(jobs.len());
            jobs.iter().for_each(|job| put_traveller(command, scratch, job));
        }
        Action::Departed { mark } => {
            scratch.clear();
            put_mark(scratch, *mark);
            command.arg("z").arg(&scratch[..]);
        }
        Action::Tick | Action::Enqueue { .. } | Action::Lease { .. } | Action::Ack { .. } | Action::Keyed { .. } => {
            command.arg("t");
        }
    }
}

fn put_mark(out: &mut BytesMut, mark: TravelMark) {
    put_short(out, mark.at);
    put_short(out, mark.number);
}

/// A job that comes from another shard: its whole record, and what has happened to it.
fn put_traveller(command: &mut Cmd, scratch: &mut BytesMut, job: &JobView) {
    scratch.clear();
    scratch.put_slice(format!("{:013}", job.enqueued_at).as_bytes());
    job.spec.encode_into(scratch);
    command.arg(&scratch[..]);
    scratch.clear();
    scratch.put_u8(if job.is_fresh() { b'F' } else { state_char(job.state).as_bytes()[0] });
    scratch.put_u32(job.attempt.saturating_sub(1));
    scratch.put_u32(job.lapses);
    scratch.put_u32(job.redrives);
    put_short(scratch, job.due_at.or(job.finished_at).unwrap_or(0));
    put_short(scratch, job.started_at.unwrap_or(0));
    scratch.put_u8(job.progress.unwrap_or(u8::MAX));
    [&job.worker, &job.error, &job.trace, &job.progress_text].iter().for_each(|text| put_bytes(scratch, text));
    command.arg(&scratch[..]);
}

pub fn list(value: Value) -> Option<Vec<Value>> {
    match value {
        Value::Array(values) => Some(values),
        _ => None,
    }
}

pub fn int(value: &Value) -> Option<i64> {
    match value {
        Value::Int(number) => Some(*number),
        // Some servers answer a float where a script returns a number that it computed as one.
        Value::Double(number) => Some(*number as i64),
        Value::BulkString(text) => std::str::from_utf8(text).ok()?.parse::<f64>().ok().map(|number| number as i64),
        _ => None,
    }
}

pub fn text(value: Value) -> Option<Bytes> {
    match value {
        Value::BulkString(text) => Some(text.into()),
        Value::SimpleString(text) => Some(text.into()),
        _ => None,
    }
}

fn short(from: &mut Bytes) -> Option<u64> {
    from.try_get_uint(6).ok()
}

fn short_text(from: &mut Bytes) -> Option<Bytes> {
    let len = from.try_get_u16().ok()? as usize;
    (from.len() >= len).then(|| from.split_to(len))
}

fn read_record(record: Bytes) -> Option<(UnixMs, Spec)> {
    let stamp = std::str::from_utf8(record.get(..STAMP_DIGITS)?).ok()?.parse().ok()?;
    Some((stamp, Spec::decode(&record.slice(STAMP_DIGITS..))?))
}

fn read_placed(value: Value) -> Option<Placed> {
    if let Some(seq) = int(&value) {
        return Some(if seq == 0 { Placed::Outdated } else { Placed::Added(seq as u64) });
    }
    let mut held = list(value)?.into_iter();
    let seq = int(&held.next()?)? as u64;
    Some(Placed::Held { seq, chosen: held.next().and_then(text) })
}

/// The first seq, and where the queue has a limit a mark for each op: `1`, its jobs were taken.
fn read_taken(value: Value) -> Option<(u64, Option<Bytes>)> {
    if let Some(first) = int(&value) {
        return Some((first as u64, None));
    }
    let mut pair = list(value)?.into_iter();
    Some((int(&pair.next()?)? as u64, Some(text(pair.next()?)?)))
}

fn read_limits(value: Value) -> Option<LimitView> {
    let mut parts = list(value)?.into_iter();
    let mut next = || parts.next();
    let limit = |value: Value| Some(u64::try_from(int(&value)?).ok());
    let version = int(&next()?)? as u64;
    let (concurrency, jobs) = (limit(next()?)?, limit(next()?)?);
    let per_ms = int(&next()?)? as u64;
    let waiting = limit(next()?)?;
    let rate = jobs.map(|jobs| Rate { jobs, per_ms });
    Some(LimitView {
        version,
        limits: QueueLimits { concurrency, rate, waiting },
        ledger_version: int(&next()?)? as u64,
        ledger: text(next()?)?,
        leased: int(&next()?)? as u64,
        started: int(&next()?)? as u64,
        waiting: int(&next()?)? as u64,
        ready: int(&next()?)? as u64,
    })
}

/// A job as `rules.lua` shows it: seq, record, state record or nothing.
fn read_view(value: Value) -> Option<JobView> {
    let mut parts = list(value)?.into_iter();
    let seq = short(&mut text(parts.next()?)?)?;
    let (enqueued_at, spec) = read_record(text(parts.next()?)?)?;
    let mut state = text(parts.next()?)?;
    let mut view = JobView {
        seq,
        spec,
        state: JobState::Ready,
        enqueued_at,
        attempt: 1,
        lapses: 0,
        redrives: 0,
        due_at: None,
        lease_until: None,
        started_at: None,
        finished_at: None,
        worker: Bytes::new(),
        error: Bytes::new(),
        trace: Bytes::new(),
        result: Bytes::new(),
        progress: None,
        progress_text: Bytes::new(),
    };
    if state.is_empty() {
        return Some(view);
    }
    view.state = read_state(state.try_get_u8().ok()?)?;
    // Token, flags, verdict, answer and place say nothing to a client.
    state = state.get(15..).map(|rest| state.slice_ref(rest))?;
    view.attempt = state.try_get_u32().ok()?.saturating_add(1);
    view.lapses = state.try_get_u32().ok()?;
    view.redrives = state.try_get_u32().ok()?;
    let (time, started) = (short(&mut state)?, short(&mut state)?);
    match view.state {
        JobState::Scheduled => view.due_at = Some(time),
        JobState::Leased => view.lease_until = Some(time),
        JobState::Ready => {}
        _ => view.finished_at = Some(time),
    }
    view.started_at = (started > 0).then_some(started);
    view.progress = Some(state.try_get_u8().ok()?).filter(|percent| *percent <= 100);
    view.worker = short_text(&mut state)?;
    view.error = short_text(&mut state)?;
    view.trace = short_text(&mut state)?;
    view.progress_text = short_text(&mut state)?;
    view.result = event::result_in(&state)?;
    Some(view)
}

fn read_session(value: Value) -> Option<SessionView> {
    let mut parts = list(value)?.into_iter();
    let session = text(parts.next()?)?;
    let mut next = || int(&parts.next()?);
    Some(SessionView {
        session,
        since: next()? as u64,
        until: next()? as u64,
        keepers: next()? as u64,
        leased: next()? as u64,
        oldest_at: next().and_then(|at| u64::try_from(at).ok()),
    })
}

/// Chunks as `rules.lua` shows them, in either order.
fn read_events(value: Value, after: Option<u64>, count: u64) -> Option<Outcome> {
    let mut values = list(value)?.into_iter();
    let (born, last) = (int(&values.next()?)? as u64, int(&values.next()?)? as u64);
    let mut chunks = Vec::new();
    while let Some(number) = values.next() {
        chunks.push((int(&number)? as u64, text(values.next()?)?));
    }
    chunks.sort_unstable_by_key(|(number, _)| *number);
    event::page(born, last, chunks, after, (count as usize).min(PAGE_EVENTS_MAX)).map(Outcome::Events)
}

fn read_stats(value: Value, now: UnixMs) -> Option<Stats> {
    let numbers: Option<Vec<i64>> = list(value)?.iter().map(int).collect();
    let mut numbers = numbers?.into_iter();
    let mut next = || numbers.next().map(|number| number as u64);
    Some(Stats {
        ready: next()?,
        scheduled: next()?,
        leased: next()?,
        dead: next()?,
        completed_kept: next()?,
        cancelled_kept: next()?,
        expired_kept: next()?,
        enqueued: next()?,
        delivered: next()?,
        completed: next()?,
        failed: next()?,
        lapsed: next()?,
        released: next()?,
        died: next()?,
        redriven: next()?,
        cancelled: next()?,
        expired: next()?,
        paused: next()? != 0,
        oldest_ready_at: numbers.next().and_then(|at| u64::try_from(at).ok()),
        keeps_limits: numbers.next()? != 0,
        now,
    })
}

fn read_one(action: &Action, value: Value, now: UnixMs) -> Option<Outcome> {
    Some(match (action, value) {
        (Action::Job { .. } | Action::DeadGet { .. }, Value::Nil) => Outcome::Job(None),
        (Action::Job { .. } | Action::DeadGet { .. }, value) => Outcome::Job(Some(Box::new(read_view(value)?))),
        (Action::Peek { .. }, Value::BulkString(_)) => Outcome::PageTooBig,
        (Action::Peek { .. }, value) => Outcome::Jobs(list(value)?.into_iter().map(read_view).collect::<Option<_>>()?),
        (Action::Outbox, value) => {
            let mut rows = list(value)?.into_iter();
            let mut groups = Vec::new();
            while let Some(key) = rows.next() {
                groups.push(DeathGroup::decode(text(key)?, text(rows.next()?)?)?);
            }
            // A hash has no order.
            groups.sort_unstable_by(|one, other| one.key.cmp(&other.key));
            Outcome::Outbox { groups, now }
        }
        (Action::Limit(_), value) => Outcome::Limits(Box::new(read_limits(value)?)),
        (Action::History { .. }, Value::Nil) => Outcome::History(Vec::new()),
        (Action::History { .. }, value) => {
            let mut parts = list(value)?.into_iter();
            let seq = short(&mut text(parts.next()?)?)?;
            Outcome::History(event::read_history(seq, text(parts.next()?)?)?)
        }
        (Action::EventsAfter { number, count }, value) => read_events(value, Some(*number), *count)?,
        (Action::EventsRecent { count }, value) => read_events(value, None, *count)?,
        (Action::Stats, value) => Outcome::Stats(Box::new(read_stats(value, now)?)),
        (Action::Keep { .. }, value) => {
            let counts: Option<Vec<i64>> = list(value)?.iter().map(int).collect();
            Outcome::Kept(counts?.into_iter().map(|count| count as u64).collect())
        }
        (Action::Sessions { .. }, value) => {
            Outcome::Sessions(now, list(value)?.into_iter().map(read_session).collect::<Option<_>>()?)
        }
        (Action::Purge { .. } | Action::DeadRetryAll { .. }, value) => {
            let moved = list(value)?;
            Outcome::Moved { count: int(moved.first()?)? as u64, next: u64::try_from(int(moved.get(1)?)?).ok() }
        }
        (Action::Seek { .. }, value) => {
            Outcome::Enqueued(list(value)?.into_iter().map(read_placed).collect::<Option<_>>()?)
        }
        (Action::Depart { .. }, value) => {
            let mut parts = list(value)?.into_iter();
            let Some(mark) = parts.next() else { return Some(Outcome::Departing(Departure::default())) };
            let (mut mark, route) = (text(mark)?, text(parts.next()?)?);
            let mark = TravelMark { at: short(&mut mark)?, number: short(&mut mark)? };
            let jobs = list(parts.next()?)?.into_iter().map(read_view).collect::<Option<_>>()?;
            Outcome::Departing(Departure { mark, route, jobs })
        }
        (_, Value::BulkString(word)) => match word.first()? {
            b'O' => Outcome::Done,
            b'N' => Outcome::NoSuchJob,
            b'!' => Outcome::LeaseLost,
            b'W' => Outcome::OnItsWay,
            b'<' => Outcome::Outdated,
            state => Outcome::State(read_state(*state)?),
        },
        (Action::Extend { .. }, value) => Outcome::Until(int(&value)? as u64),
        (_, value) => Outcome::Count(int(&value)? as u64),
    })
}
