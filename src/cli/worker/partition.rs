//! Which shards one of n workers takes from, so that all of them together take from all shards, and each shard from one worker.
//!
//! Every worker with a seat `i/n` keeps a key alive in the servers themselves, and looks which of the other seats are taken.
//! Shard k of the sorted names belongs to seat k mod n; where that seat is empty, to one of the seats that are taken. So n workers
//! divide the shards without knowing of each other, and what one that left had is divided again when its key has run out. For that
//! moment, and while two sit on one seat, a shard has no worker or two: leases, not partitions, are what keeps a job to one.

use std::sync::Arc;
use std::time::Duration;

use redis::Value;
use tokio::sync::watch;

use super::link::{CallError, Link};
use super::{Worker, raised};

/// A seat is empty so long after its worker was last heard of.
const SEAT_MS: u64 = 4_000;
const RENEW_EVERY: Duration = Duration::from_millis(1_000);
const SEATS_MAX: usize = 1_024;

/// `i/n`, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seat {
    number: usize,
    of: usize,
}

impl Seat {
    pub fn parse(text: &str) -> Result<Seat, String> {
        let parsed = text.split_once('/').and_then(|(number, of)| Some((number.parse().ok()?, of.parse().ok()?)));
        match parsed {
            Some((number, of)) if 1 <= number && number <= of && of <= SEATS_MAX => Ok(Seat { number, of }),
            _ => Err(format!("expected I/N such as 1/3, with I from 1 to N and N at most {SEATS_MAX}")),
        }
    }
}

/// The shards of a seat among those that are taken.
fn share(seat: Seat, taken: &[bool], mut shards: Vec<String>) -> Vec<String> {
    shards.sort();
    let present: Vec<usize> = (0..seat.of).filter(|at| taken.get(*at).copied().unwrap_or(false)).collect();
    let owner = |at: usize| match present.contains(&(at % seat.of)) {
        true => at % seat.of,
        false => present.get(at % present.len().max(1)).copied().unwrap_or(seat.number - 1),
    };
    shards.into_iter().enumerate().filter(|(at, _)| owner(*at) == seat.number - 1).map(|(_, shard)| shard).collect()
}

/// Keeps the seat and tells the slots their shards, until the worker drains; then leaves the seat.
pub async fn keep(seat: Seat, worker: Arc<Worker>, tell: watch::Sender<Option<Vec<String>>>) {
    let mut link = Link::new(worker.server.clone());
    while !*worker.draining.borrow() {
        match look(&mut link, seat, &worker).await {
            Ok(shards) => {
                tell.send_if_modified(|told| {
                    let news = told.as_ref() != Some(&shards);
                    if news {
                        tracing::info!(?shards, "taking from these shards");
                        *told = Some(shards);
                    }
                    news
                });
            }
            Err(error) => tracing::warn!(%error, "cannot look after the partition; trying again"),
        }
        tokio::select! {
            () = tokio::time::sleep(RENEW_EVERY) => {}
            () = raised(&worker.draining) => {}
        }
    }
    let mut leave = redis::cmd("DEL");
    leave.arg(key(seat.number, seat.of, &worker));
    if let Err(error) = link.call(&leave).await {
        tracing::debug!(%error, "the seat is left to run out");
    }
}

/// One tag for all seats, so that one shard answers for all of them.
fn key(number: usize, of: usize, worker: &Worker) -> String {
    format!("worker-seat:{{{}}}:{number}/{of}", worker.options.queue.join(","))
}

async fn look(link: &mut Link, seat: Seat, worker: &Worker) -> Result<Vec<String>, CallError> {
    let mut sit = redis::cmd("SET");
    sit.arg(key(seat.number, seat.of, worker)).arg(&worker.name).arg("PX").arg(SEAT_MS);
    link.call(&sit).await?;
    let mut ask = redis::cmd("MGET");
    (1..=seat.of).for_each(|number| {
        ask.arg(key(number, seat.of, worker));
    });
    let unreadable = || CallError::Broken("the answer has another shape than expected".into());
    let Value::Array(seats) = link.call(&ask).await? else { return Err(unreadable()) };
    let taken: Vec<bool> = seats.iter().map(|seat| *seat != Value::Nil).collect();
    let names = match link.call(&redis::cmd("GOFLOW.SHARDS")).await? {
        Value::Map(pairs) => pairs.into_iter().map(|(name, _)| name).collect(),
        Value::Array(items) => items.into_iter().step_by(2).collect::<Vec<Value>>(),
        _ => return Err(unreadable()),
    };
    let name = |value: Value| redis::from_redis_value::<String>(value).map_err(|_| unreadable());
    Ok(share(seat, &taken, names.into_iter().map(name).collect::<Result<_, _>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shards(count: usize) -> Vec<String> {
        (1..=count).map(|number| format!("s{number:02}")).collect()
    }

    #[test]
    fn seats_divide_the_shards_whoever_is_missing() {
        for (seats, count, taken) in [
            (3, 4, [true, true, true]),
            (3, 4, [true, false, true]),
            (3, 10, [false, false, true]),
            (3, 2, [true, true, true]),
        ] {
            let mut all: Vec<String> = Vec::new();
            for number in (1..=seats).filter(|number| taken[number - 1]) {
                all.extend(share(Seat { number, of: seats }, &taken, shards(count)));
            }
            all.sort();
            assert_eq!(all, shards(count), "each shard has one worker with {taken:?}");
        }
    }

    #[test]
    fn who_stays_keeps_its_shards_when_another_leaves() {
        let whole = share(Seat { number: 1, of: 3 }, &[true, true, true], shards(12));
        let less = share(Seat { number: 1, of: 3 }, &[true, false, true], shards(12));
        assert!(whole.iter().all(|shard| less.contains(shard)) && less.len() > whole.len());
    }

    #[test]
    fn a_seat_is_a_number_of_a_number() {
        assert_eq!(Seat::parse("2/3"), Ok(Seat { number: 2, of: 3 }));
        for bad in ["", "1", "0/3", "4/3", "1/0", "a/b", "1/9999"] {
            assert!(Seat::parse(bad).is_err(), "{bad}");
        }
    }
}
