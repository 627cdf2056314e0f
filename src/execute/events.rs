//! `GOFLOW.EVENTS READ`: the events of a queue on all shards, from one cursor.
//!
//! Each shard is asked for what came after the reader's place on it; the answers are merged by time as far as the reply
//! goes, and only what is in the reply moves the cursor. A reader that waits listens to the live events for a sign that
//! there is something, and looks by itself now and then all the same.

use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::{Asker, Done, graver, scatter, unexpected};
use crate::command::event::{Place, Read, event_map, gap_map};
use crate::dispatch::{Dispatcher, ShardMap};
use crate::error::{Error, Result};
use crate::resp::reply::Reply;
use crate::shard::event::{Event, Page};
use crate::shard::feed::Topic;
use crate::shard::{Action, Op, Outcome};

/// The slow poll behind the live events.
const POLL_EVERY: Duration = Duration::from_secs(2);

/// What one shard has for the reader.
struct Part {
    shard: Arc<str>,
    page: Page,
    /// Events that are not kept any more stood before the page; the inner `None`: nobody knows how many.
    gap: Option<Option<u64>>,
}

/// `over` ends the wait before its time.
pub async fn read(read: Read, dispatcher: Arc<Dispatcher>, asker: Asker, over: Arc<Notify>) -> Done {
    let Read { queue, mut cursor, count, block_ms } = read;
    let wait_ms = block_ms.map(|ms| if ms == 0 { asker.block_ms_max } else { ms.min(asker.block_ms_max) });
    let mut until = wait_ms.map(|ms| Instant::now() + Duration::from_millis(ms));
    let listening = until.map(|_| dispatcher.feed().listen((Topic::Events, Some(queue.clone()))));
    if let (Some(listening), Some(end)) = (&listening, until) {
        // What comes before the shards listen is found by the first look.
        tokio::select! {
            _ = tokio::time::timeout_at(end, listening.heard()) => {}
            () = over.notified() => until = Some(Instant::now()),
        }
    }
    loop {
        let rung = listening.as_ref().map(|listening| listening.bell().notified_owned());
        let map = dispatcher.map();
        let mut parts = match ask(&read_places(&queue, &cursor, count, &map), &map, asker).await {
            Ok(parts) => parts,
            Err(error) => return Done::Reply(error.into()),
        };
        // The oldest and the newest event are a place from here on.
        for Part { shard, page, gap } in &mut parts {
            match cursor.place(shard) {
                // Nothing was ever recorded there, so whatever comes is new.
                Place::Now if page.born == 0 => cursor.set(shard, Place::Oldest),
                Place::Now => {
                    // It did not answer when the reader began: what came since is missed.
                    *gap = cursor.names(shard).then_some(None);
                    cursor.set(shard, Place::After { born: page.born, number: page.last });
                }
                Place::Oldest | Place::After { .. } => {}
            }
        }
        // A shard that did not answer is named from here on, so that what it records meanwhile counts as missed.
        for lane in &map.lanes {
            if cursor.place(lane.name()) == Place::Now {
                cursor.set(lane.name(), Place::Now);
            }
        }
        let (lines, places) = merge(parts, count);
        places.into_iter().for_each(|(shard, place)| cursor.set(&shard, place));
        let is_over = until.is_none_or(|until| Instant::now() >= until);
        if let (true, false, Some(end)) = (lines.is_empty(), is_over, until) {
            let poll = Instant::now() + POLL_EVERY.mul_f64(rand::rng().random_range(0.75..1.25));
            if let Some(rung) = rung {
                tokio::select! {
                    _ = tokio::time::timeout_at(end.min(poll), rung) => {}
                    () = over.notified() => until = Some(Instant::now()),
                }
            }
            continue;
        }
        let next = cursor.text(map.lanes.iter().map(|lane| &**lane.name()));
        let lines = lines.into_iter().map(|(shard, line)| match line {
            Line::Event(event) => event_map(&event, &queue, &shard),
            Line::Gap(missing) => gap_map(missing, &queue, &shard),
        });
        return Done::Reply(Reply::Array(vec![Reply::bulk(next), Reply::Array(lines.collect())]));
    }
}

/// What each shard of the map is asked, in its order.
fn read_places(
    queue: &crate::job::Name,
    cursor: &crate::command::event::Cursor,
    count: u64,
    map: &ShardMap,
) -> Vec<(Place, Op)> {
    let places = map.lanes.iter().map(|lane| cursor.place(lane.name()));
    places
        .map(|place| {
            let number = match place {
                Place::Oldest => 0,
                Place::Now => u64::MAX,
                Place::After { number, .. } => number,
            };
            (place, Op { queue: queue.clone(), action: Action::EventsAfter { number, count } })
        })
        .collect()
}

/// Asks every shard; those that do not answer are left out. An error only when none does.
async fn ask(wanted: &[(Place, Op)], map: &ShardMap, asker: Asker) -> Result<Vec<Part>> {
    let ops = map.lanes.iter().zip(wanted).map(|(lane, (_, op))| (lane.clone(), op.clone()));
    let mut failure: Option<Error> = None;
    let mut parts = Vec::new();
    for ((shard, outcome), (place, op)) in scatter(ops.collect(), asker).await.into_iter().zip(wanted) {
        let page = match outcome {
            Ok(Outcome::Events(page)) => page,
            Ok(other) => return Err(unexpected(&other)),
            Err(error) => {
                failure = Some(graver(failure, error));
                continue;
            }
        };
        let Place::After { born, number } = *place else {
            // From the oldest that is kept there is nothing to miss.
            parts.push(Part { shard, page, gap: None });
            continue;
        };
        if page.born == born && page.last >= number {
            let missing = page.first.saturating_sub(number + 1);
            parts.push(Part { shard, page, gap: (missing > 0).then_some(Some(missing)) });
            continue;
        }
        // Another journal: what came after the reader's place in the old one is lost with it.
        let Action::EventsAfter { count, .. } = op.action else { continue };
        let Some(lane) = map.lane(&shard) else { continue };
        let again = Op { queue: op.queue.clone(), action: Action::EventsAfter { number: 0, count } };
        if let Ok(Outcome::Events(page)) = super::ask(lane, again, asker).await {
            parts.push(Part { shard, page, gap: Some(None) });
        }
    }
    match failure {
        Some(error) if parts.is_empty() => Err(error),
        _ => Ok(parts),
    }
}

enum Line {
    Event(Box<Event>),
    Gap(Option<u64>),
}

/// Something, and the shard that it is of.
type OfShard<T> = (Arc<str>, T);

/// The first lines of all shards together by their time, and the places that the reader has then.
fn merge(parts: Vec<Part>, count: u64) -> (Vec<OfShard<Line>>, Vec<OfShard<Place>>) {
    let (mut lines, mut places) = (Vec::new(), Vec::new());
    let mut queues: Vec<_> = Vec::new();
    for Part { shard, page, gap } in parts {
        let Page { born, last, first, events } = page;
        if events.is_empty() {
            if let Some(missing) = gap {
                // All that the reader had not seen is gone.
                lines.push((shard.clone(), Line::Gap(missing)));
                places.push((shard, Place::After { born, number: last }));
            }
            continue;
        }
        queues.push((shard, born, first, gap, events.into_iter().peekable()));
    }
    for _ in 0..count {
        let heads = queues.iter_mut().enumerate();
        let earliest = heads.filter_map(|(at, queue)| queue.4.peek().map(|event| (event.at, at))).min();
        let Some((_, at)) = earliest else { break };
        let Some((shard, born, next, gap, events)) = queues.get_mut(at) else { break };
        if let Some(missing) = gap.take() {
            lines.push((shard.clone(), Line::Gap(missing)));
        }
        lines.extend(events.next().map(|event| (shard.clone(), Line::Event(Box::new(event)))));
        let place = Place::After { born: *born, number: *next };
        *next += 1;
        match places.iter_mut().find(|(name, _): &&mut (Arc<str>, Place)| name == shard) {
            Some((_, known)) => *known = place,
            None => places.push((shard.clone(), place)),
        }
    }
    (lines, places)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::event::What;

    fn part(shard: &str, first: u64, ats: &[u64], gap: Option<Option<u64>>) -> Part {
        let events = ats.iter().map(|at| Event::new(What::Queued, *at, *at)).collect();
        let last = first + ats.len() as u64 - 1;
        Part { shard: shard.into(), page: Page { born: 1, last, first, events }, gap }
    }

    #[test]
    fn only_what_is_told_moves_the_cursor() {
        let parts =
            vec![part("a", 5, &[10, 30], Some(Some(4))), part("b", 1, &[20, 25, 40], None), part("c", 9, &[90], None)];
        let (lines, places) = merge(parts, 3);
        let told: Vec<(String, u64)> = lines
            .iter()
            .map(|(shard, line)| match line {
                Line::Event(event) => (shard.to_string(), event.at),
                Line::Gap(missing) => (shard.to_string(), missing.unwrap()),
            })
            .collect();
        assert_eq!(told, [("a".into(), 4), ("a".into(), 10), ("b".into(), 20), ("b".into(), 25)]);
        let after = |number| Place::After { born: 1, number };
        assert_eq!(places, [("a".into(), after(5)), ("b".into(), after(2))]);
    }
}
