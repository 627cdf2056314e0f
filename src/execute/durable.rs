//! Lists that are queues: a key pattern of the configuration makes the lists that match it durable and spread.
//!
//! A push is an enqueue, placed by the sharding strategy; a pop leases an element. It is acked when the same connection's
//! next command shows that it was received, or at once where the rule says so, and goes back to its place when the
//! connection ends first. So a program that knows `LPUSH` and `BRPOP` alone loses nothing when it is killed.
//!
//! The list is first in, first out whichever ends are used. What a list in parts cannot mean is refused by name.

use std::sync::Arc;

use bytes::Bytes;

use super::{Answer, Asker, Done, execute};
use crate::clock::Millis;
use crate::command::ordinary::{Row, find_word};
use crate::command::{Dequeue, Enqueue, Limits, Plan, job};
use crate::dispatch::Dispatcher;
use crate::dispatch::lane::{Hold, Leased};
use crate::error::{Code, Error, Result};
use crate::job::{JobState, Name};
use crate::resp::glob;
use crate::resp::reply::Reply;
use crate::shard::{Action, Op, Start};

/// When an element that was popped is done with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acked {
    /// When the connection sends another command, or `QUIT`.
    Next,
    /// As soon as the reply is written: what Redis itself promises.
    Now,
}

/// The lists that match one pattern.
#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    pub pattern: String,
    pub acked: Acked,
    /// How long a connection may keep an element before it is delivered again, should its proxy die.
    pub lease_ms: Millis,
}

/// Elements that were popped and are not acked: dropped, they go back.
#[derive(Debug)]
pub struct Popped {
    pub acked: Acked,
    holds: Vec<Hold>,
}

impl Popped {
    /// The client has worked on them.
    pub fn ack(self) {
        self.holds.into_iter().for_each(Hold::ack);
    }
}

/// The rule for the keys of a request, if one of them is a durable list.
pub fn find<'a>(rules: &'a [Rule], row: &Row, words: &[Bytes]) -> Option<&'a Rule> {
    let places = row.keys.places(words);
    let keys = places.iter().filter_map(|at| words.get(*at));
    keys.flat_map(|key| rules.iter().filter(move |rule| glob::matches(rule.pattern.as_bytes(), key))).next()
}

/// Starts a request on a durable list.
pub fn start(
    rule: &Rule,
    row: &Row,
    words: &[Bytes],
    limits: &Limits,
    dispatcher: &Arc<Dispatcher>,
    asker: Asker,
) -> Answer {
    if !row.has_arity(words.len()) {
        return Answer::reply(row.wrong_arity().into());
    }
    let started = match row.name {
        "LPUSH" | "RPUSH" => push(words, limits, dispatcher, asker),
        "LLEN" => len(words, dispatcher, asker),
        "LPOP" | "RPOP" | "BLPOP" | "BRPOP" | "LMPOP" | "BLMPOP" => pop(rule, row.name, words, dispatcher, asker),
        name => Err(Error::bad(format!("{name} has no meaning on a list that is spread over shards"))),
    };
    started.unwrap_or_else(|error| Answer::reply(error.into()))
}

fn list(words: &[Bytes], at: usize) -> Result<Name> {
    Name::parse(words.get(at).map_or(&[][..], |word| word))
}

/// The reply is the length as far as it is known here: what waits and what is leased.
fn push(words: &[Bytes], limits: &Limits, dispatcher: &Arc<Dispatcher>, asker: Asker) -> Result<Answer> {
    let queue = list(words, 1)?;
    if words.iter().skip(2).any(|payload| payload.len() > limits.payload_bytes_max) {
        return Err(Error::new(Code::TooBig, format!("an element has more than {} bytes", limits.payload_bytes_max)));
    }
    let enqueue = Enqueue {
        queue: queue.clone(),
        policy: limits.policy.clone(),
        payloads: words.get(2..).unwrap_or_default().to_vec(),
        start: Start::Now,
        shard: None,
        nx: false,
        many: true,
    };
    let mut answer = execute(Plan::Enqueue(enqueue), dispatcher, asker);
    let dispatcher = dispatcher.clone();
    Ok(Answer::Later(Box::pin(async move {
        let done = std::future::poll_fn(|context| answer.poll(context)).await;
        let Done::Reply(Reply::Array(ids)) = done else { return done };
        if let Some(error) = ids.into_iter().find(|id| matches!(id, Reply::Error(_))) {
            return Done::Reply(error);
        }
        let known = dispatcher.map().lanes.iter().filter_map(|lane| lane.load(&queue)).sum();
        Done::Reply(Reply::count(known))
    })))
}

fn len(words: &[Bytes], dispatcher: &Arc<Dispatcher>, asker: Asker) -> Result<Answer> {
    let op = Op { queue: list(words, 1)?, action: Action::Len { state: JobState::Ready } };
    Ok(execute(Plan::Each { op, merge: Box::new(job::sum) }, dispatcher, asker))
}

fn pop(rule: &Rule, name: &str, words: &[Bytes], dispatcher: &Arc<Dispatcher>, asker: Asker) -> Result<Answer> {
    let text = |at: usize| words.get(at).and_then(|word| std::str::from_utf8(word).ok());
    let seconds = |at: usize| {
        let seconds = text(at).and_then(|text| text.parse::<f64>().ok()).filter(|seconds| seconds.is_finite());
        let seconds = seconds.ok_or(Error::bad("timeout is not a float or out of range"))?;
        if seconds < 0.0 { Err(Error::bad("timeout is negative")) } else { Ok((seconds * 1000.0).ceil() as Millis) }
    };
    let number = |at: usize, what: &'static str| {
        let number = text(at).and_then(|text| text.parse::<usize>().ok()).filter(|number| *number > 0);
        number.ok_or_else(|| Error::bad(format!("{what} should be greater than 0")))
    };
    let many = name.ends_with("MPOP");
    let numkeys_at = if name == "BLMPOP" { 2 } else { 1 };
    let keys = match name {
        "LPOP" | "RPOP" => 1..2,
        "BLPOP" | "BRPOP" => 1..words.len() - 1,
        _ => numkeys_at + 1..numkeys_at + 1 + number(numkeys_at, "numkeys")?.min(words.len()),
    };
    let count_at =
        if many { find_word(words, b"COUNT").map(|at| at + 1) } else { (!name.starts_with('B')).then_some(2) };
    let count = match count_at.filter(|at| *at < words.len()) {
        Some(at) => Some(number(at, "count")?),
        None => many.then_some(1),
    };
    let block_ms = match name {
        "BLPOP" | "BRPOP" => Some(seconds(words.len() - 1)?),
        "BLMPOP" => Some(seconds(1)?),
        _ => None,
    };
    let dequeue = Dequeue {
        queues: keys.map(|at| list(words, at)).collect::<Result<_>>()?,
        count: Some(count.unwrap_or(1)),
        block_ms,
        lease_ms: rule.lease_ms,
        worker: Bytes::new(),
        shards: Vec::new(),
    };
    let shape = match (many, block_ms.is_some(), count.is_some()) {
        (true, _, _) => Shape::ListAndElements,
        (false, true, _) => Shape::ListAndElement,
        (false, false, true) => Shape::Elements,
        (false, false, false) => Shape::Element,
    };
    let acked = rule.acked;
    Ok(match execute(Plan::Dequeue(dequeue), dispatcher, asker) {
        Answer::Waiting(later) => Answer::Waiting(Box::pin(async move { shape.done(later.await, acked) })),
        mut answer => Answer::Later(Box::pin(async move {
            shape.done(std::future::poll_fn(|context| answer.poll(context)).await, acked)
        })),
    })
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
    fn done(self, done: Done, acked: Acked) -> Done {
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
        let reply = match self {
            Shape::Element => elements.pop().unwrap_or(Reply::Null),
            Shape::Elements => Reply::Array(elements),
            Shape::ListAndElement => Reply::Array(vec![queue, elements.pop().unwrap_or(Reply::Null)]),
            Shape::ListAndElements => Reply::Array(vec![queue, Reply::Array(elements)]),
        };
        Done::Popped(reply, Popped { acked, holds })
    }
}
