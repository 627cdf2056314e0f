//! Live events: what the shards tell, as JSON for those who listen here.
//!
//! [`Feed::listen`] makes a wish known to all shards for as long as the [`Listening`] lives; [`Feed::run`] takes what they
//! tell, from a channel of bounded length, and publishes it: an object for each event on `goflow:events:<queue>`, and on
//! `goflow:dlq:<queue>` for each death. Nothing on a request's way waits for it.
//!
//! Promises: of one shard's events of one queue each is published once and in order; where some were missed (a connection
//! broke, or we were too slow) an object of type `gap` stands in their place and says how many. Leaves slow subscribers
//! to `forward/hub.rs`.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use bytes::{Bytes, BytesMut};
use foldhash::fast::RandomState;
use futures_util::future::join_all;
use serde::Serialize;
use tokio::sync::{Notify, mpsc};

use crate::clock::{Millis, UnixMs};
use crate::job::{Name, format_id};
use crate::shard::event::{self, Event, What};
use crate::shard::feed::{Ear, Heard, Topic, Wish, Wishes};

/// Calls whose events wait to be published; what comes on top is missed.
const HEARD_MAX: usize = 8_192;
/// Queues of shards whose marks are kept. Beyond it all are forgotten: a gap at just that time is not told.
const MARKS_MAX: usize = 100_000;

pub const EVENTS_CHANNEL: &str = "goflow:events:";
pub const DEATHS_CHANNEL: &str = "goflow:dlq:";

/// Takes a message for a channel.
pub type Publish = Box<dyn Fn(&Bytes, &[u8]) + Send + Sync>;

/// Up to where one shard's events of one queue are known.
#[derive(Clone, Copy)]
struct Mark {
    born: UnixMs,
    /// The number of the last event that was heard.
    last: u64,
    /// The same, if everything up to there was heard and not deaths alone.
    all_until: Option<u64>,
    died: u64,
}

type Marks = HashMap<(Arc<str>, Name), Mark, RandomState>;

pub struct Feed {
    wishes: Arc<Wishes>,
    sender: mpsc::Sender<Heard>,
    receiver: Mutex<Option<mpsc::Receiver<Heard>>>,
    /// Those of shards that are gone are gone.
    ears: Mutex<Vec<Weak<Ear>>>,
    /// Rung when something happened in a queue.
    bells: Mutex<HashMap<Name, (usize, Arc<Notify>), RandomState>>,
    marks: Mutex<Marks>,
    publish: OnceLock<Publish>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Feed {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(HEARD_MAX);
        Feed {
            wishes: Arc::default(),
            sender,
            receiver: Mutex::new(Some(receiver)),
            ears: Mutex::default(),
            bells: Mutex::default(),
            marks: Mutex::default(),
            publish: OnceLock::new(),
        }
    }
}

/// A wish, until it is dropped.
pub struct Listening {
    feed: Arc<Feed>,
    wish: Wish,
    version: u64,
}

impl Feed {
    /// Where a shard tells what happens on it.
    pub fn ear(&self, shard: Arc<str>) -> Arc<Ear> {
        let ear = Ear::new(shard, self.wishes.clone(), self.sender.clone());
        let mut ears = lock(&self.ears);
        ears.retain(|ear| ear.strong_count() > 0);
        ears.push(Arc::downgrade(&ear));
        drop(ears);
        ear
    }

    /// Who gets the messages. Called once.
    pub fn publish_to(&self, publish: Publish) {
        // A second one has nobody to call it.
        let _ = self.publish.set(publish);
    }

    pub fn listen(self: &Arc<Feed>, wish: Wish) -> Listening {
        if let (Topic::Events, Some(queue)) = &wish {
            lock(&self.bells).entry(queue.clone()).or_default().0 += 1;
        }
        let version = self.wishes.add(wish.clone());
        Listening { feed: self.clone(), wish, version }
    }

    /// Publishes what the shards tell, until the process ends.
    pub async fn run(self: Arc<Feed>) {
        let Some(mut receiver) = lock(&self.receiver).take() else { return };
        while let Some(heard) = receiver.recv().await {
            self.take(heard);
        }
    }

    fn take(&self, heard: Heard) {
        if let Some((_, bell)) = lock(&self.bells).get(&heard.queue) {
            bell.notify_waiters();
        }
        let Heard { shard, queue, born, told, topic } = heard;
        let Some(events) = event::read_chunk(told.chunk) else {
            tracing::warn!(shard = %shard, "a message about events cannot be read");
            return;
        };
        let deaths = events.iter().filter(|event| event.what == What::Dead).count() as u64;
        let first = (told.last + 1).saturating_sub(events.len() as u64);
        let (missed, missed_deaths) = {
            let mut marks = lock(&self.marks);
            let key = (shard.clone(), queue.clone());
            let before = marks.get(&key).copied().filter(|mark| mark.born == born);
            if before.is_some_and(|mark| told.last <= mark.last) {
                // Heard before, under another subscription.
                return;
            }
            let is_all = topic == Topic::Events;
            if before.is_none() && marks.len() >= MARKS_MAX {
                marks.clear();
            }
            marks.insert(key, Mark { born, last: told.last, all_until: is_all.then_some(told.last), died: told.died });
            let missed = before.and_then(|mark| mark.all_until).filter(|_| is_all);
            let missed = missed.map_or(0, |until| first.saturating_sub(until + 1));
            let missed_deaths = before.map_or(0, |mark| told.died.saturating_sub(mark.died + deaths));
            (missed, missed_deaths)
        };
        let Some(publish) = self.publish.get() else { return };
        let gap = |missing| json(&Gap { what: "gap", queue: queue.as_str(), missing, shard: Some(&shard) });
        if topic == Topic::Events && self.wishes.wants(Topic::Events, &queue) {
            let channel = Bytes::from(format!("{EVENTS_CHANNEL}{queue}"));
            if missed > 0 {
                publish(&channel, &gap(missed));
            }
            events.iter().for_each(|event| publish(&channel, &event_json(event, &queue, &shard)));
        }
        if (deaths > 0 || missed_deaths > 0) && self.wishes.wants(Topic::Deaths, &queue) {
            let channel = Bytes::from(format!("{DEATHS_CHANNEL}{queue}"));
            if missed_deaths > 0 {
                publish(&channel, &gap(missed_deaths));
            }
            let dead = events.iter().filter(|event| event.what == What::Dead);
            dead.for_each(|event| publish(&channel, &event_json(event, &queue, &shard)));
        }
    }
}

impl Listening {
    /// Resolves when every shard that can be reached tells what is wished.
    pub fn heard(&self) -> impl Future<Output = ()> + Send + use<> {
        let (ears, version) = (lock(&self.feed.ears).clone(), self.version);
        let ears: Vec<Arc<Ear>> = ears.iter().filter_map(Weak::upgrade).collect();
        async move {
            join_all(ears.iter().map(|ear| ear.heard(version))).await;
        }
    }

    /// Rings when something happens in the queue that is listened to.
    pub fn bell(&self) -> Arc<Notify> {
        let bells = lock(&self.feed.bells);
        self.wish.1.as_ref().and_then(|queue| bells.get(queue)).map_or_else(Arc::default, |(_, bell)| bell.clone())
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let (Topic::Events, Some(queue)) = &self.wish {
            let mut bells = lock(&self.feed.bells);
            if let Some((count, _)) = bells.get_mut(queue) {
                *count -= 1;
                if *count == 0 {
                    bells.remove(queue);
                }
            }
        }
        if self.feed.wishes.remove(&self.wish) {
            // What happens before somebody listens again is nobody's gap.
            let wishes = &self.feed.wishes;
            let is_wanted = |queue: &Name| wishes.wants(Topic::Events, queue) || wishes.wants(Topic::Deaths, queue);
            match &self.wish.1 {
                Some(name) if !is_wanted(name) => lock(&self.feed.marks).retain(|(_, queue), _| queue != name),
                Some(_) => {}
                None => lock(&self.feed.marks).retain(|(_, queue), _| is_wanted(queue)),
            }
        }
    }
}

/// The wish of a channel or pattern that clients subscribe to; `None`: nothing is told there.
pub fn wish_of(name: &[u8], is_pattern: bool) -> Vec<Wish> {
    let mut wishes = Vec::new();
    for (topic, channel) in [(Topic::Events, EVENTS_CHANNEL), (Topic::Deaths, DEATHS_CHANNEL)] {
        let literal = if is_pattern { name.iter().position(|byte| b"*?[\\".contains(byte)) } else { None };
        match (name.strip_prefix(channel.as_bytes()), literal) {
            (Some(queue), None) => wishes.extend(Name::parse(queue).ok().map(|queue| (topic, Some(queue)))),
            (_, Some(end)) => {
                let head = &name[..end];
                if head.starts_with(channel.as_bytes()) || channel.as_bytes().starts_with(head) {
                    wishes.push((topic, None));
                }
            }
            (None, None) => {}
        }
    }
    wishes
}

#[derive(Serialize)]
struct Line<'a> {
    #[serde(rename = "type")]
    what: &'static str,
    id: Cow<'a, str>,
    queue: &'a str,
    at: UnixMs,
    #[serde(skip_serializing_if = "Option::is_none")]
    attempt: Option<u32>,
    #[serde(skip_serializing_if = "str::is_empty")]
    worker: Cow<'a, str>,
    #[serde(skip_serializing_if = "str::is_empty")]
    error: Cow<'a, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_ms: Option<Millis>,
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<u8>,
    shard: &'a str,
}

/// What stands in the place of events that were missed.
#[derive(Serialize)]
pub struct Gap<'a> {
    #[serde(rename = "type")]
    what: &'static str,
    queue: &'a str,
    missing: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    shard: Option<&'a str>,
}

fn json(line: &impl Serialize) -> Vec<u8> {
    // Numbers and texts only: this cannot fail.
    serde_json::to_vec(line).unwrap_or_default()
}

fn event_json(event: &Event, queue: &Name, shard: &str) -> Vec<u8> {
    let mut id = BytesMut::new();
    match &event.chosen {
        Some(chosen) => id.extend_from_slice(chosen),
        None => format_id(&mut id, event.seq, shard),
    }
    json(&Line {
        what: event.what.word(),
        id: String::from_utf8_lossy(&id),
        queue: queue.as_str(),
        at: event.at,
        attempt: event.attempt,
        worker: String::from_utf8_lossy(&event.worker),
        error: String::from_utf8_lossy(&event.error),
        duration_ms: event.duration_ms,
        progress: event.progress,
        shard,
    })
}

/// What a subscriber of a channel is told who was too slow for so many messages.
pub fn missed_json(channel: &[u8], missing: u64) -> Vec<u8> {
    let queue = [EVENTS_CHANNEL, DEATHS_CHANNEL].iter().find_map(|prefix| channel.strip_prefix(prefix.as_bytes()));
    let queue = String::from_utf8_lossy(queue.unwrap_or(channel));
    json(&Gap { what: "gap", queue: &queue, missing, shard: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::event::Told;
    use std::sync::mpsc as std_mpsc;

    fn told(last: u64, died: u64, whats: &[What]) -> Told {
        let mut chunk = BytesMut::new();
        event::begin_chunk(&mut chunk, 5);
        whats.iter().for_each(|what| event::put_event(&mut chunk, &Event::new(*what, 7, 5)));
        Told { last, died, chunk: chunk.freeze() }
    }

    #[test]
    fn each_event_is_told_once_and_what_was_missed_is_said() {
        let feed = Arc::new(Feed::default());
        let (sender, heard) = std_mpsc::channel();
        let publish = move |channel: &Bytes, payload: &[u8]| {
            let line: serde_json::Value = serde_json::from_slice(payload).unwrap();
            let channel = String::from_utf8_lossy(channel).into_owned();
            let missing = line["missing"].as_u64();
            sender.send((channel, line["type"].as_str().unwrap().to_owned(), missing)).unwrap();
        };
        feed.publish_to(Box::new(publish));
        let queue = Name::parse(b"q").unwrap();
        let say = |topic, told| {
            feed.take(Heard { shard: "s1".into(), queue: queue.clone(), born: 1, told, topic });
            heard.try_iter().map(|(channel, what, missing)| format!("{channel} {what} {missing:?}")).collect::<Vec<_>>()
        };
        assert!(say(Topic::Events, told(1, 0, &[What::Queued])).is_empty(), "nobody listens");
        let events = feed.listen((Topic::Events, Some(queue.clone())));
        let deaths = feed.listen((Topic::Deaths, None));
        assert_eq!(say(Topic::Events, told(2, 0, &[What::Started])), ["goflow:events:q job.started None"]);
        assert!(say(Topic::Events, told(2, 0, &[What::Started])).is_empty(), "once");
        assert_eq!(
            say(Topic::Events, told(9, 3, &[What::Failed, What::Dead])),
            [
                "goflow:events:q gap Some(5)",
                "goflow:events:q job.failed None",
                "goflow:events:q job.dlq None",
                "goflow:dlq:q gap Some(2)",
                "goflow:dlq:q job.dlq None",
            ]
        );
        drop(events);
        assert_eq!(say(Topic::Deaths, told(20, 4, &[What::Dead])), ["goflow:dlq:q job.dlq None"]);
        drop(deaths);
        assert!(lock(&feed.marks).is_empty() && lock(&feed.bells).is_empty());
    }

    #[test]
    fn a_subscription_wishes_for_what_it_can_hear() {
        let queue = |name: &str| Some(Name::parse(name.as_bytes()).unwrap());
        for (name, is_pattern, wishes) in [
            ("goflow:events:a", false, vec![(Topic::Events, queue("a"))]),
            ("goflow:dlq:a/b", false, vec![(Topic::Deaths, queue("a/b"))]),
            ("goflow:events:*", true, vec![(Topic::Events, None)]),
            ("goflow:events:a*", true, vec![(Topic::Events, None)]),
            ("goflow:events:a", true, vec![(Topic::Events, queue("a"))]),
            ("goflow:*", true, vec![(Topic::Events, None), (Topic::Deaths, None)]),
            ("goflow:events:*", false, vec![]),
            ("goflow:other", false, vec![]),
            ("goflow:x*", true, vec![]),
        ] {
            assert_eq!(wish_of(name.as_bytes(), is_pattern), wishes, "{name}");
        }
    }
}
