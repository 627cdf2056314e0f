//! Lists that are queues: a key pattern of the configuration makes the lists that match it durable and spread.
//!
//! A push is an enqueue, placed by the sharding strategy; a pop leases an element. When it is acked is the rule's to say
//! ([`Acked`]); [`Unacked`] is what a connection has and has not acked, and goes back to its place when the connection ends
//! first. So a program that knows `LPUSH` and `BRPOP` alone loses nothing when it is killed.
//!
//! A move ([`transfer`]) leases the element, enqueues it in the other list under an id that its old place gives it, then
//! acks it: whoever dies in between, it is in one list at least, and moved again it is added once.
//!
//! The list is first in, first out whichever ends are used. What a list in parts cannot mean is refused by name.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, Sleep, sleep_until};

use super::{Answer, Asker, Done, Nothing, execute, graver, lane_gone};
use crate::clock::Millis;
use crate::command::ordinary::Row;
use crate::command::{Dequeue, Enqueue, Limits, Plan, job};
use crate::dispatch::Dispatcher;
use crate::dispatch::lane::{Hold, Leased};
use crate::error::{Code, Error, Happened, Result};
use crate::job::{Delivery, JobState, Name, Policy};
use crate::resp::glob;
use crate::resp::reply::Reply;
use crate::shard::{Action, Op, Start};

/// Most elements that one connection has and has not acked.
pub const UNACKED_MAX: usize = 10_000;
/// Where the lease time acks, the shard leases for this much longer, so that the ack comes first.
const LEASE_MARGIN_MS: Millis = 10_000;
/// Pops wait as long as they say, as on any list: a wait without an end, in practice.
const BLOCK_MS_MAX: Millis = 100 * 365 * 24 * 3_600_000;

/// When an element that was popped is done with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acked {
    /// When the connection sends another command after the reply was written, or `QUIT`.
    Next,
    /// As soon as the reply is written: what Redis itself promises.
    Now,
    /// When the connection has lived for the lease time since, whatever it sent; or with `QUIT`.
    Lease,
}

/// The lists that match one pattern.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    pub pattern: String,
    pub acked: Acked,
    /// How long a connection may keep an element before it is delivered again, should its proxy die; with
    /// [`Acked::Lease`] also after which it is acked.
    pub lease_ms: Millis,
}

impl Rule {
    fn is_for(&self, key: &[u8]) -> bool {
        glob::matches(self.pattern.as_bytes(), key)
    }
}

/// Elements that were popped and are not acked: dropped, they go back.
#[derive(Debug)]
pub struct Popped {
    acked: Acked,
    lease_ms: Millis,
    holds: Vec<Hold>,
    elements: usize,
}

impl Popped {
    /// The client has worked on them.
    pub fn ack(self) {
        self.holds.into_iter().for_each(Hold::ack);
    }
}

/// What one connection has popped and not acked. Dropped, all of it goes back.
#[derive(Default)]
pub struct Unacked {
    /// Each with how many bytes had come from the client when it was written: what begins later was sent knowing it.
    next: Vec<(u64, Popped)>,
    /// By when they are acked, and a number that tells those of one instant apart.
    timed: BTreeMap<(Instant, u64), Popped>,
    count: u64,
    elements: usize,
    /// Until the first of `timed` is acked.
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Unacked {
    /// The client has been sent these, after so many bytes had come from it.
    pub fn put(&mut self, popped: Popped, received: u64) {
        match popped.acked {
            Acked::Now => popped.ack(),
            Acked::Next => {
                self.elements += popped.elements;
                self.next.push((received, popped));
            }
            Acked::Lease => {
                self.elements += popped.elements;
                self.count += 1;
                self.timed.insert((Instant::now() + Duration::from_millis(popped.lease_ms), self.count), popped);
            }
        }
    }

    /// The client sends another command, which begins at `at` of what has come from it. One that it sent before it could
    /// read an element says nothing of that.
    pub fn next(&mut self, at: u64) {
        let known = self.next.partition_point(|(received, _)| *received <= at);
        for (_, popped) in self.next.drain(..known) {
            self.elements -= popped.elements;
            popped.ack();
        }
    }

    /// The client leaves in order.
    pub fn quit(&mut self) {
        self.next(u64::MAX);
        std::mem::take(&mut self.timed).into_values().for_each(Popped::ack);
        self.elements = 0;
    }

    /// Acks those whose time has come, and has the task woken for the others.
    pub fn poll(&mut self, context: &mut Context<'_>) {
        while let Some(first) = self.timed.first_entry() {
            let (at, _) = *first.key();
            if at <= Instant::now() {
                let popped = first.remove();
                self.elements -= popped.elements;
                popped.ack();
                continue;
            }
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(at)));
            if sleep.deadline() != at {
                sleep.as_mut().reset(at);
            }
            if sleep.as_mut().poll(context).is_pending() {
                return;
            }
        }
    }

    /// Refuses what would pop while the connection holds as much as it may.
    pub fn room(&self) -> Result<()> {
        match self.elements < UNACKED_MAX {
            true => Ok(()),
            false => {
                let text = format!(
                    "this connection has {} elements that are not acked, of at most {UNACKED_MAX}",
                    self.elements
                );
                Err(Error::new(Code::Overloaded, text))
            }
        }
    }
}

/// The rule for the keys of a request, if one of them is a durable list.
pub fn find<'a>(rules: &'a [Rule], row: &Row, words: &[Bytes]) -> Option<&'a Rule> {
    let places = row.keys.places(words);
    let keys = places.iter().filter_map(|at| words.get(*at));
    keys.flat_map(|key| rules.iter().find(|rule| rule.is_for(key))).next()
}

/// Starts a request on a durable list.
pub fn start(
    rule: &Rule,
    row: &Row,
    words: &[Bytes],
    limits: &Limits,
    dispatcher: &Arc<Dispatcher>,
    asker: Asker,
    unacked: &Unacked,
) -> Answer {
    if !row.has_arity(words.len()) {
        return Answer::reply(row.wrong_arity().into());
    }
    if row.keys.places(words).iter().filter_map(|at| words.get(*at)).any(|key| !rule.is_for(key)) {
        let text =
            format!("the keys of one request are durable lists of one pattern, here {}, or none is", rule.pattern);
        return Answer::reply(Error::bad(text).into());
    }
    let asker = Asker { block_ms_max: BLOCK_MS_MAX, ..asker };
    let started = match row.name {
        "LPUSH" | "RPUSH" => push(words, limits, dispatcher, asker),
        "LLEN" => len(words, dispatcher, asker),
        "LPOP" | "RPOP" | "BLPOP" | "BRPOP" | "LMPOP" | "BLMPOP" => {
            unacked.room().and_then(|()| pop(rule, row, words, limits, dispatcher, asker))
        }
        "LMOVE" | "RPOPLPUSH" | "BLMOVE" | "BRPOPLPUSH" => {
            shift(rule, row.name, words, limits.policy.clone(), dispatcher, asker)
        }
        "EXISTS" | "TYPE" | "DEL" | "UNLINK" => Ok(whole(row.name, words, dispatcher.clone(), asker)),
        name => Err(refusal(name, rule)),
    };
    started.unwrap_or_else(|error| Answer::reply(error.into()))
}

/// Why a command cannot be done, and what can.
fn refusal(name: &str, rule: &Rule) -> Error {
    let why = match name {
        "LINDEX" | "LSET" | "LINSERT" | "LPOS" | "LTRIM" => {
            "its parts have no common places; GOFLOW.PEEK shows what waits"
        }
        "LRANGE" => "its parts have no common order; GOFLOW.PEEK shows what waits",
        "LREM" => {
            "a popped element is kept until it is acked, so none needs to be removed; GOFLOW.CANCEL ends one by its id"
        }
        "LPUSHX" | "RPUSHX" => "no part knows whether the others are empty",
        "WATCH" => "a transaction runs on one shard",
        "EVAL" | "EVAL_RO" | "EVALSHA" | "EVALSHA_RO" | "FCALL" | "FCALL_RO" => "a script runs on one shard",
        "RENAME" | "RENAMENX" | "COPY" | "SORT" | "SORT_RO" | "DUMP" | "RESTORE" | "OBJECT" | "MEMORY" | "TOUCH" => {
            "no shard has it whole"
        }
        name if name.contains("EXPIRE") || name.contains("TTL") || name == "PERSIST" => {
            "its elements have no common end"
        }
        _ => "this command is not for lists",
    };
    Error::bad(format!(
        "{name} is not for a durable list, which lies in parts on all shards ([[list]] {}): {why}",
        rule.pattern
    ))
}

fn list(words: &[Bytes], at: usize) -> Result<Name> {
    Name::parse(words.get(at).map_or(&[][..], |word| word))
}

/// The reply is the length as far as it is known here, what waits and what is leased; at least what was pushed, although a
/// worker may have been faster.
fn push(words: &[Bytes], limits: &Limits, dispatcher: &Arc<Dispatcher>, asker: Asker) -> Result<Answer> {
    let queue = list(words, 1)?;
    let payloads = words.get(2..).unwrap_or_default();
    if payloads.len() > limits.batch_jobs_max {
        return Err(Error::new(Code::TooBig, format!("more than {} elements in one request", limits.batch_jobs_max)));
    }
    if payloads.iter().any(|payload| payload.len() > limits.payload_bytes_max) {
        return Err(Error::new(Code::TooBig, format!("an element has more than {} bytes", limits.payload_bytes_max)));
    }
    let enqueue = Enqueue {
        queue: queue.clone(),
        policy: limits.policy.clone(),
        payloads: payloads.to_vec(),
        start: Start::Now,
        shard: None,
        nx: false,
        many: true,
    };
    let mut answer = execute(Plan::Enqueue(enqueue), dispatcher, asker);
    let (dispatcher, pushed) = (dispatcher.clone(), payloads.len() as u64);
    Ok(Answer::Later(Box::pin(async move {
        let done = answer.done().await;
        let Done::Reply(Reply::Array(ids)) = done else { return done };
        let mut failure = None;
        for id in ids {
            if let Reply::Error(error) = id {
                failure = Some(graver(failure, error));
            }
        }
        if let Some(mut error) = failure {
            // Where all failed the answer was no array.
            error.text = format!("{} (other shards have done their part)", error.text).into();
            error.happened = Happened::Maybe;
            return Done::Reply(error.into());
        }
        let known: u64 = dispatcher.map().lanes.iter().filter_map(|lane| lane.load(&queue)).sum();
        Done::Reply(Reply::count(known.max(pushed)))
    })))
}

fn len(words: &[Bytes], dispatcher: &Arc<Dispatcher>, asker: Asker) -> Result<Answer> {
    let op = Op { queue: list(words, 1)?, action: Action::Len { state: JobState::Ready } };
    Ok(execute(Plan::Each { op, merge: Box::new(job::sum) }, dispatcher, asker))
}

/// Commands about whole keys: a list exists while something waits in it.
fn whole(name: &'static str, words: &[Bytes], dispatcher: Arc<Dispatcher>, asker: Asker) -> Answer {
    let words = words.to_vec();
    Answer::Later(Box::pin(async move {
        let mut there = 0;
        for at in 1..words.len() {
            let plan = match (list(&words, at), name) {
                (Err(error), _) => return Done::Reply(error.into()),
                (Ok(queue), "DEL" | "UNLINK") => {
                    Plan::Drain { op: Op { queue, action: Action::Purge { state: JobState::Ready } } }
                }
                (Ok(queue), _) => {
                    let op = Op { queue, action: Action::Len { state: JobState::Ready } };
                    Plan::Each { op, merge: Box::new(job::sum) }
                }
            };
            match execute(plan, &dispatcher, asker).done().await {
                Done::Reply(Reply::Integer(count)) => there += i64::from(count > 0),
                other => return other,
            }
        }
        Done::Reply(match (name, there) {
            ("TYPE", 0) => Reply::Simple("none"),
            ("TYPE", _) => Reply::Simple("list"),
            _ => Reply::Integer(there),
        })
    }))
}

fn text(words: &[Bytes], at: usize) -> Option<&str> {
    words.get(at).and_then(|word| std::str::from_utf8(word).ok())
}

/// A timeout in Redis's unit.
fn seconds(words: &[Bytes], at: usize) -> Result<Millis> {
    let seconds = text(words, at).and_then(|text| text.parse::<f64>().ok()).filter(|seconds| seconds.is_finite());
    let seconds = seconds.ok_or(Error::bad("timeout is not a float or out of range"))?;
    if seconds < 0.0 { Err(Error::bad("timeout is negative")) } else { Ok((seconds * 1000.0).ceil() as Millis) }
}

fn end(words: &[Bytes], at: usize) -> Result<()> {
    let is_end =
        words.get(at).is_some_and(|word| [&b"LEFT"[..], b"RIGHT"].iter().any(|end| word.eq_ignore_ascii_case(end)));
    if is_end { Ok(()) } else { Err(Error::bad("syntax error")) }
}

fn pop(
    rule: &Rule,
    row: &Row,
    words: &[Bytes],
    limits: &Limits,
    dispatcher: &Arc<Dispatcher>,
    asker: Asker,
) -> Result<Answer> {
    let number = |at: usize, what: &'static str| {
        let number = text(words, at).and_then(|text| text.parse::<usize>().ok()).filter(|number| *number > 0);
        number.ok_or_else(|| Error::bad(format!("{what} should be greater than 0")))
    };
    let name = row.name;
    let many = name.ends_with("MPOP");
    let numkeys_at = if name == "BLMPOP" { 2 } else { 1 };
    let keys = match name {
        "LPOP" | "RPOP" => 1..2,
        "BLPOP" | "BRPOP" => 1..words.len() - 1,
        _ => numkeys_at + 1..numkeys_at + 1 + number(numkeys_at, "numkeys")?.min(words.len()),
    };
    if keys.len() > job::DEQUEUE_QUEUES_MAX {
        let text = format!("{name} names at most {} durable lists", job::DEQUEUE_QUEUES_MAX);
        return Err(Error::new(Code::TooBig, text));
    }
    let count_at = match many {
        false => (!name.starts_with('B')).then_some(2),
        true => {
            end(words, keys.end)?;
            match words.get(keys.end + 1) {
                None => None,
                Some(word) if word.eq_ignore_ascii_case(b"COUNT") && words.len() == keys.end + 3 => Some(keys.end + 2),
                Some(_) => return Err(Error::bad("syntax error")),
            }
        }
    };
    if count_at == Some(2) && !many && words.len() > 3 {
        return Err(row.wrong_arity());
    }
    let count = match count_at.filter(|at| *at < words.len()) {
        Some(at) if many => Some(number(at, "count")?),
        Some(at) => match text(words, at).and_then(|text| text.parse::<usize>().ok()) {
            Some(0) => return Ok(Answer::reply(Reply::NullArray)),
            Some(count) => Some(count),
            None => return Err(Error::bad("value is out of range, must be positive")),
        },
        None => many.then_some(1),
    };
    if count.is_some_and(|count| count > limits.batch_jobs_max) {
        return Err(Error::new(Code::TooBig, format!("count is more than {}", limits.batch_jobs_max)));
    }
    let block_ms = match name {
        "BLPOP" | "BRPOP" => Some(seconds(words, words.len() - 1)?),
        "BLMPOP" => Some(seconds(words, 1)?),
        _ => None,
    };
    let queues = keys.map(|at| list(words, at)).collect::<Result<_>>()?;
    let shape = match (many, block_ms.is_some(), count.is_some()) {
        (true, _, _) => Shape::ListAndElements,
        (false, true, _) => Shape::ListAndElement,
        (false, false, true) => Shape::Elements,
        (false, false, false) => Shape::Element,
    };
    let (acked, lease_ms) = (rule.acked, rule.lease_ms);
    let mut answer = lease(rule, queues, count.unwrap_or(1), block_ms, dispatcher, asker);
    let waits = matches!(answer, Answer::Waiting(..));
    let later = Box::pin(async move { shape.done(answer.done().await, acked, lease_ms) });
    let nothing = Nothing::Reply(Reply::NullArray);
    Ok(if waits { Answer::Waiting(later, nothing) } else { Answer::Later(later) })
}

/// Leases elements of the first list that has any.
fn lease(
    rule: &Rule,
    queues: Vec<Name>,
    count: usize,
    block_ms: Option<Millis>,
    dispatcher: &Arc<Dispatcher>,
    asker: Asker,
) -> Answer {
    let margin = if rule.acked == Acked::Lease { LEASE_MARGIN_MS } else { 0 };
    let dequeue = Dequeue {
        queues,
        count: Some(count),
        block_ms,
        lease_ms: rule.lease_ms + margin,
        worker: Bytes::new(),
        shards: Vec::new(),
        bind: None,
    };
    execute(Plan::Dequeue(dequeue), dispatcher, asker)
}

/// Moves an element to the end of another list, or of the same.
fn shift(
    rule: &Rule,
    name: &str,
    words: &[Bytes],
    policy: Arc<Policy>,
    dispatcher: &Arc<Dispatcher>,
    asker: Asker,
) -> Result<Answer> {
    let (from, to) = (list(words, 1)?, list(words, 2)?);
    if name.ends_with("LMOVE") {
        end(words, 3)?;
        end(words, 4)?;
    }
    let block_ms = if name.starts_with('B') { Some(seconds(words, words.len() - 1)?) } else { None };
    let mut answer = lease(rule, vec![from], 1, block_ms, dispatcher, asker);
    let waits = matches!(answer, Answer::Waiting(..));
    let dispatcher = dispatcher.clone();
    let later = Box::pin(async move {
        match answer.done().await {
            Done::Deliveries(groups) => {
                let Some(leased) = groups.into_iter().next() else { return Done::Reply(Reply::Null) };
                // Once an element is leased it is moved, whether or not the client is there to hear of it: given up
                // half-way it could be in both lists.
                let moved = tokio::spawn(transfer(leased, to, policy, dispatcher, asker));
                Done::Reply(moved.await.unwrap_or_else(|_| lane_gone().into()))
            }
            Done::Reply(Reply::NullArray) if !waits => Done::Reply(Reply::Null),
            other => other,
        }
    });
    let nothing = Nothing::Reply(Reply::NullArray);
    Ok(if waits { Answer::Waiting(later, nothing) } else { Answer::Later(later) })
}

async fn transfer(leased: Leased, to: Name, policy: Arc<Policy>, dispatcher: Arc<Dispatcher>, asker: Asker) -> Reply {
    let Leased { queue, shard, mut deliveries, hold } = leased;
    let Some(delivery) = deliveries.pop() else { return Reply::Null };
    // With the time at which it came: a shard that lost its last writes gives a number again.
    let Delivery { lease, enqueued_at, spec, .. } = delivery;
    let element = spec.payload;
    let id = Bytes::from(format!("moved:{}:{}.{enqueued_at}~{shard}", queue.as_str(), lease.seq));
    let enqueue = Enqueue {
        queue: to,
        policy: Arc::new(Policy { id: Some(id), ..(*policy).clone() }),
        payloads: vec![element.clone()],
        start: Start::Now,
        shard: None,
        nx: false,
        many: false,
    };
    match execute(Plan::Enqueue(enqueue), &dispatcher, asker).done().await {
        Done::Reply(Reply::Bulk(_)) => {}
        // It goes back to its place; where it may have been stored all the same, moving it again adds nothing.
        Done::Reply(error) => return error,
        _ => return lane_gone().into(),
    }
    hold.settle();
    let ack = Plan::Ack { queue, leases: vec![((*shard).into(), lease)], result: Bytes::new() };
    match execute(ack, &dispatcher, asker).done().await {
        Done::Reply(Reply::Integer(_)) => Reply::Bulk(element),
        Done::Reply(error) => error,
        _ => lane_gone().into(),
    }
}

/// How Redis answers a pop.
#[derive(Clone, Copy)]
enum Shape {
    Element,
    Elements,
    ListAndElement,
    ListAndElements,
}

impl Shape {
    fn done(self, done: Done, acked: Acked, lease_ms: Millis) -> Done {
        let groups = match done {
            Done::Deliveries(groups) => groups,
            Done::Reply(Reply::NullArray | Reply::Null) => {
                return Done::Reply(if matches!(self, Shape::Element) { Reply::Null } else { Reply::NullArray });
            }
            other => return other,
        };
        let queue = groups.first().map_or(Reply::Null, |group| Reply::bulk(group.queue.as_str()));
        let mut elements: Vec<Reply> = Vec::new();
        let mut holds = Vec::new();
        for Leased { deliveries, hold, .. } in groups {
            elements.extend(deliveries.into_iter().map(|delivery| Reply::Bulk(delivery.spec.payload)));
            holds.push(hold);
        }
        let count = elements.len();
        let reply = match self {
            Shape::Element => elements.pop().unwrap_or(Reply::Null),
            Shape::Elements => Reply::Array(elements),
            Shape::ListAndElement => Reply::Array(vec![queue, elements.pop().unwrap_or(Reply::Null)]),
            Shape::ListAndElements => Reply::Array(vec![queue, Reply::Array(elements)]),
        };
        Done::Popped(reply, Popped { acked, lease_ms, holds, elements: count })
    }
}
