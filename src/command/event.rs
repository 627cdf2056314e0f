//! `GOFLOW.EVENTS`: what happened to jobs. Live events are the channels `goflow:events:<queue>`, which are pub/sub's.

use bytes::Bytes;
use std::fmt::Write as _;
use std::sync::Arc;

use super::args::{Arg, Args, Kind, MS};
use super::job::{on_job, unexpected};
use super::{Context, Flag, Group, Plan, Spec};
use crate::clock::{Millis, UnixMs};
use crate::error::{Code, Error, Result};
use crate::job::{Name, format_id, is_shard_name};
use crate::resp::reply::Reply;
use crate::shard::event::{Entry, Event, PAGE_EVENTS_MAX};
use crate::shard::{Action, Op, Outcome};

/// Events in a reply where nothing is said.
const COUNT_DEFAULT: u64 = 100;
/// Most bytes of a cursor: room for a thousand shards.
const CURSOR_BYTES_MAX: usize = 96 * 1024;

const QUEUE: Arg = Arg::new("queue", Kind::Queue);
const COUNT: Arg = Arg::option("COUNT", "n", Kind::Integer(1, PAGE_EVENTS_MAX as i64));

/// What every row here has in common.
const EVENTS: Spec =
    Spec { group: Group::Events, flags: &[Flag::ReadOnly], errors: &[Code::ShardDown, Code::Overloaded], ..Spec::BASE };

pub static ROWS: &[Spec] = &[
    Spec {
        notes: "Every transition of a job is recorded in the commit that makes it. An event has `type`, `id`, `queue`, `at` and \
                `shard`, and where they apply `attempt`, `worker`, `error`, `duration_ms` and `progress`. The types are \
                `job.queued` (it is in line: enqueued, or fallen due), `job.scheduled`, `job.started`, `job.progress`, \
                `job.completed`, `job.failed` (a FAIL or a lapsed lease; what became of the job is the next event: \
                `job.retried` or `job.dlq`), `job.released`, `job.redriven`, `job.cancelled` (also, with the error \
                `purged` or `deleted`, a job that was removed before it was over) and `job.expired`. Of an error the \
                first 512 bytes are kept. Where events are not kept any more there is a map with the type `gap` and, \
                in `missing`, their number. How much is kept is configured in `[events]`. Live, the events of a queue are \
                JSON objects of these fields on the channel `goflow:events:<queue>`, and those of jobs that died on \
                `goflow:dlq:<queue>`: `SUBSCRIBE` or `PSUBSCRIBE` to them.",
        examples: "\
> GOFLOW.EVENTS HELP
1) \"GOFLOW.EVENTS <subcommand> [<arg> [value] [opt] ...]. Subcommands are:\"
...",
        ..Spec::container("GOFLOW.EVENTS", Group::Events, "0.1.0", "What happened to jobs.")
    },
    Spec {
        name: "GOFLOW.EVENTS|JOB",
        summary: "Tells the history of one job.",
        args: &[QUEUE, Arg::new("id", Kind::Id)],
        flags: &[Flag::ReadOnly, Flag::Fast],
        reply: "An array of event maps, oldest first; empty when nothing is known of the job.",
        notes: "A history outlives its job. The middle of a very long one is dropped.",
        examples: "\
> GOFLOW.ENQUEUE main hello
\"<id>\"
> GOFLOW.EVENTS JOB main <id>
1) 1# \"type\" => \"job.queued\"
   2# \"id\" => \"<id>\"
   3# \"queue\" => \"main\"
...",
        plan: job,
        ..EVENTS
    },
    Spec {
        name: "GOFLOW.EVENTS|RECENT",
        summary: "Tells the newest events of a queue.",
        args: &[QUEUE, COUNT],
        reply: "An array of event maps, newest first; of all shards together, by their time.",
        notes: "The default count is 100.",
        examples: "\
> GOFLOW.EVENTS RECENT calm COUNT 10
(empty array)",
        plan: recent,
        ..EVENTS
    },
    Spec {
        name: "GOFLOW.EVENTS|READ",
        summary: "Reads the events of a queue on from a cursor.",
        args: &[QUEUE, Arg::new("cursor", Kind::Text), COUNT, Arg::option("BLOCK", "ms", MS)],
        flags: &[Flag::ReadOnly, Flag::Blocking],
        reply: "An array of two: the cursor to go on with, and an array of event maps. Each shard's events are in their \
                order and told once; between shards they are sorted by time as far as one reply goes.",
        notes: "The cursor `0` is the oldest event that is kept, `$` is now. Any other is a text from an earlier reply: it \
                outlives clients, proxies and shards, and begins with the oldest event of a shard that was added since. With \
                `BLOCK` a reply waits until there is an event, for at most so long; 0 is as long as the configuration allows. \
                A shard that does not answer is passed over and read on when it is back.",
        examples: "\
> GOFLOW.EVENTS READ calm 0 COUNT 10
1) \"0\"
2) (empty array)",
        plan: read,
        ..EVENTS
    },
];

/// How far a reader has come on one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Oldest,
    /// Behind what is there when it is asked.
    Now,
    /// Behind this event of the journal that began at `born`.
    After {
        born: UnixMs,
        number: u64,
    },
}

/// How far a reader has come on every shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor {
    places: Vec<(Box<str>, Place)>,
    /// On the shards that are not named.
    rest: Place,
}

impl Cursor {
    fn parse(word: &[u8]) -> Result<Cursor> {
        let cursor = Cursor { places: Vec::new(), rest: Place::Oldest };
        match word {
            b"0" => return Ok(cursor),
            b"$" => return Ok(Cursor { rest: Place::Now, ..cursor }),
            _ => {}
        }
        let text = std::str::from_utf8(word).ok().filter(|text| text.len() <= CURSOR_BYTES_MAX);
        let places = text.and_then(|text| text.split(',').map(parse_place).collect::<Option<Vec<_>>>());
        match places {
            Some(places) => Ok(Cursor { places, ..cursor }),
            None => Err(Error::bad("invalid cursor: expected 0, $ or the cursor of an earlier reply")),
        }
    }

    pub fn place(&self, shard: &str) -> Place {
        self.places.iter().find(|(name, _)| **name == *shard).map_or(self.rest, |(_, place)| *place)
    }

    /// Whether the shard is named with a place of its own.
    pub fn names(&self, shard: &str) -> bool {
        self.places.iter().any(|(name, _)| **name == *shard)
    }

    pub fn set(&mut self, shard: &str, place: Place) {
        match self.places.iter_mut().find(|(name, _)| **name == *shard) {
            Some((_, known)) => *known = place,
            None => self.places.push((shard.into(), place)),
        }
    }

    /// As a client keeps it; `shards` are all that there are.
    pub fn text<'a>(&self, shards: impl Iterator<Item = &'a str>) -> String {
        let mut text = String::new();
        let unnamed = shards.filter(|shard| !self.names(shard));
        let unnamed = unnamed.map(|shard| (shard, self.rest)).filter(|(_, place)| *place != Place::Oldest);
        let named = self.places.iter().map(|(shard, place)| (&**shard, *place));
        for (shard, place) in named.chain(unnamed) {
            let comma = if text.is_empty() { "" } else { "," };
            // Writing to a String cannot fail.
            let _ = match place {
                Place::Oldest => write!(text, "{comma}{shard}=0.0"),
                Place::Now => write!(text, "{comma}{shard}=$"),
                Place::After { born, number } => write!(text, "{comma}{shard}={born}.{number}"),
            };
        }
        if text.is_empty() { "0".into() } else { text }
    }
}

fn parse_place(part: &str) -> Option<(Box<str>, Place)> {
    let (shard, place) = part.split_once('=').filter(|(shard, _)| is_shard_name(shard))?;
    if place == "$" {
        return Some((shard.into(), Place::Now));
    }
    let (born, number) = place.split_once('.')?;
    let place = match (born.parse().ok()?, number.parse().ok()?) {
        (0, _) => Place::Oldest,
        (born, number) => Place::After { born, number },
    };
    Some((shard.into(), place))
}

/// An event as a map.
pub fn event_map(event: &Event, queue: &Name, shard: &str) -> Reply {
    let mut fields = vec![
        (Reply::text("type"), Reply::text(event.what.word())),
        (Reply::text("id"), Reply::Bulk(id_of(event, shard))),
        (Reply::text("queue"), Reply::bulk(queue.as_str())),
        (Reply::text("at"), Reply::count(event.at)),
    ];
    if let Some(attempt) = event.attempt {
        fields.push((Reply::text("attempt"), Reply::count(u64::from(attempt))));
    }
    for (name, text) in [("worker", &event.worker), ("error", &event.error)] {
        if !text.is_empty() {
            fields.push((Reply::text(name), Reply::Bulk(text.clone())));
        }
    }
    if let Some(duration_ms) = event.duration_ms {
        fields.push((Reply::text("duration_ms"), Reply::count(duration_ms)));
    }
    if let Some(percent) = event.progress {
        fields.push((Reply::text("progress"), Reply::count(u64::from(percent))));
    }
    fields.push((Reply::text("shard"), Reply::bulk(shard)));
    Reply::Map(fields)
}

/// What stands in the place of events that are not kept; `None`: nobody knows how many they were.
pub fn gap_map(missing: Option<u64>, queue: &Name, shard: &str) -> Reply {
    Reply::Map(vec![
        (Reply::text("type"), Reply::text("gap")),
        (Reply::text("queue"), Reply::bulk(queue.as_str())),
        (Reply::text("missing"), missing.map_or(Reply::Null, Reply::count)),
        (Reply::text("shard"), Reply::bulk(shard)),
    ])
}

fn id_of(event: &Event, shard: &str) -> Bytes {
    event.chosen.clone().unwrap_or_else(|| {
        let mut id = bytes::BytesMut::with_capacity(16 + shard.len());
        format_id(&mut id, event.seq, shard);
        id.freeze()
    })
}

/// `EVENTS READ`.
#[derive(Clone, Debug, PartialEq)]
pub struct Read {
    pub queue: Name,
    pub cursor: Cursor,
    pub count: u64,
    /// `None`: do not wait. `Some(0)` waits as long as the limits allow.
    pub block_ms: Option<Millis>,
}

fn job(args: &Args, _: &Context) -> Result<Plan> {
    on_job(args, |job| Action::History { job }, render)
}

fn render(outcome: Outcome, queue: &Name, shard: &str) -> Reply {
    let Outcome::History(entries) = outcome else { return unexpected() };
    let maps = entries.iter().map(|entry| match entry {
        Entry::Event(event) => event_map(event, queue, shard),
        Entry::Missing(count) => gap_map(Some(*count), queue, shard),
    });
    Reply::Array(maps.collect())
}

fn count(args: &Args) -> Result<u64> {
    Ok(args.number("COUNT")?.unwrap_or(COUNT_DEFAULT))
}

fn recent(args: &Args, _: &Context) -> Result<Plan> {
    let (queue, count) = (args.queue()?, count(args)?);
    let op = Op { queue: queue.clone(), action: Action::EventsRecent { count } };
    let merge = move |outcomes: Vec<(Arc<str>, Outcome)>| {
        let mut all: Vec<(Arc<str>, Event)> = Vec::new();
        for (shard, outcome) in outcomes {
            let Outcome::Events(page) = outcome else { return unexpected() };
            all.extend(page.events.into_iter().rev().map(|event| (shard.clone(), event)));
        }
        // Stable: the events of one shard stay in their order.
        all.sort_by_key(|(_, event)| std::cmp::Reverse(event.at));
        let newest = all.iter().take(usize::try_from(count).unwrap_or(usize::MAX));
        Reply::Array(newest.map(|(shard, event)| event_map(event, &queue, shard)).collect())
    };
    Ok(Plan::Each { op, merge: Box::new(merge) })
}

fn read(args: &Args, _: &Context) -> Result<Plan> {
    Ok(Plan::Read(Read {
        queue: args.queue()?,
        cursor: Cursor::parse(args.required("cursor")?)?,
        count: count(args)?,
        block_ms: args.number("BLOCK")?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::tests::{planned, refused};
    use crate::shard::event::{Page, What};

    #[test]
    fn a_cursor_is_read_back_as_it_was_told() {
        let mut cursor = Cursor::parse(b"$").unwrap();
        assert_eq!((cursor.place("s1"), cursor.text(["s1", "s2"].into_iter())), (Place::Now, "s1=$,s2=$".into()));
        let after = Place::After { born: 5, number: 7 };
        cursor.set("s1", after);
        let text = cursor.text(["s1", "s2"].into_iter());
        let again = Cursor::parse(text.as_bytes()).unwrap();
        assert_eq!([again.place("s1"), again.place("s2"), again.place("s3")], [after, Place::Now, Place::Oldest]);
        for word in ["", "1", "s1", "s1=", "s1=5", "s1=5.x", "s1=5.7,", "=5.7", "s 1=5.7"] {
            assert!(Cursor::parse(word.as_bytes()).is_err(), "{word}");
        }
    }

    #[test]
    fn events_are_asked_for_as_the_words_say() {
        let Plan::Op { op, .. } = planned("GOFLOW.EVENTS JOB q 2s~s1") else { panic!() };
        assert_eq!(op.action, Action::History { job: crate::job::JobRef::Seq(100) });
        let Plan::Read(read) = planned("GOFLOW.EVENTS READ q 0 BLOCK 5 COUNT 3") else { panic!() };
        assert_eq!((read.count, read.block_ms), (3, Some(5)));
        refused("GOFLOW.EVENTS READ q 0 COUNT 1001");
        refused("GOFLOW.EVENTS READ q nonsense");
    }

    #[test]
    fn the_newest_events_of_all_shards_come_first() {
        let Plan::Each { merge, .. } = planned("GOFLOW.EVENTS RECENT q COUNT 3") else { panic!() };
        let page = |ats: &[u64]| {
            let events = ats.iter().map(|at| Event::new(What::Queued, *at, *at)).collect();
            Outcome::Events(Page { events, ..Page::default() })
        };
        let Reply::Array(maps) = merge(vec![("a".into(), page(&[1, 4])), ("b".into(), page(&[2, 3]))]) else {
            panic!()
        };
        let ats = maps.iter().map(|map| match map {
            Reply::Map(fields) => fields[3].1.clone(),
            _ => panic!(),
        });
        assert_eq!(ats.collect::<Vec<_>>(), [Reply::Integer(4), Reply::Integer(3), Reply::Integer(2)]);
    }
}
