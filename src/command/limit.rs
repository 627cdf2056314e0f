//! The limits of a queue: how many of its jobs are leased at once, started in a time, and wait.

use std::sync::Arc;

use super::args::{Arg, Args, Kind, MS_FROM_1};
use super::{Ask, Context, Flag, Group, Plan, Spec};
use crate::error::{Code, Error, Result};
use crate::resp::reply::Reply;
use crate::shard::{LimitView, QueueLimits, Rate};

/// Largest number of jobs in a limit.
const JOBS_MAX: i64 = 1_000_000_000;
const JOBS: Kind = Kind::Integer(0, JOBS_MAX);

pub static ROWS: &[Spec] = &[Spec {
    name: "GOFLOW.LIMIT",
    group: Group::Operations,
    summary: "Sets or shows the limits of a queue.",
    args: &[
        Arg::new("queue", Kind::Queue),
        Arg::option("CONCURRENCY", "n", JOBS),
        Arg::option("RATE", "n", JOBS),
        Arg::option("PER", "ms", MS_FROM_1),
        Arg::option("MAXLEN", "n", JOBS),
    ],
    flags: &[Flag::Write, Flag::Admin],
    reply: "`OK`, once every shard keeps to it; the error `SHARDDOWN` when one does not answer, which will as soon as it does. \
            Without options a map: `concurrency`, `rate`, `per` and `maxlen`, 0 where there is no limit; `leased`, \
            `started` (in the last window) and `waiting`, the sums over the shards; and `shares`, a map from each shard's name to \
            its part of each, null where there is no limit.",
    notes: "`CONCURRENCY` is how many jobs may be leased at once, `RATE n PER ms` how many may be started within any time of \
            that length, and `MAXLEN` how many may be ready or scheduled before `ENQUEUE` answers `QUEUEFULL`; over all \
            proxies and shards. 0 lifts a limit, and what is not named stays as it is. Nothing that runs or waits is ended by a \
            limit. The section \"Limits\" says what holds when the queue lies on several shards.",
    errors: &[Code::ShardDown, Code::Overloaded],
    examples: "\
> GOFLOW.LIMIT outgoing RATE 100 PER 1000 MAXLEN 1
OK
> GOFLOW.ENQUEUE outgoing hello
\"<id>\"
> GOFLOW.ENQUEUE outgoing again
(error) QUEUEFULL as many jobs wait in the queue as its MAXLEN allows; nothing was stored
> GOFLOW.LIMIT outgoing
1# \"concurrency\" => (integer) 0
2# \"rate\" => (integer) 100
3# \"per\" => (integer) 1000
4# \"maxlen\" => (integer) 1
5# \"leased\" => (integer) 0
6# \"started\" => (integer) 0
7# \"waiting\" => (integer) 1
8# \"shares\" => 1# \"<shard>\" => 1# \"concurrency\" => (nil)
...
> GOFLOW.LIMIT outgoing RATE 0 MAXLEN 0
OK",
    plan: limit,
    ..Spec::BASE
}];

fn limit(args: &Args, _: &Context) -> Result<Plan> {
    let rate = match (args.number("RATE")?, args.number("PER")?) {
        (None, None) => None,
        (Some(0), _) => Some(Rate { jobs: 0, per_ms: 1 }),
        (Some(jobs), Some(per_ms)) => Some(Rate { jobs, per_ms }),
        (Some(_), None) => return Err(Error::bad("RATE n wants PER ms: so many jobs within so long")),
        (None, Some(_)) => return Err(Error::bad("PER goes with RATE only")),
    };
    let change = QueueLimits { concurrency: args.number("CONCURRENCY")?, rate, waiting: args.number("MAXLEN")? };
    Ok(Plan::Ask(Ask::Limit { queue: args.queue()?, change }))
}

/// The limits of a queue, and what each shard has of them.
pub fn shown(limits: &QueueLimits, shares: Vec<(Arc<str>, LimitView)>) -> Reply {
    let count = |limit: Option<u64>| Reply::count(limit.unwrap_or(0));
    let share = |limit: Option<u64>| limit.map_or(Reply::Null, Reply::count);
    let sum = |part: fn(&LimitView) -> u64| Reply::count(shares.iter().map(|(_, view)| part(view)).sum());
    let named = |fields: Vec<(&'static str, Reply)>| {
        Reply::Map(fields.into_iter().map(|(name, value)| (Reply::text(name), value)).collect())
    };
    let parts = shares.iter().map(|(shard, view)| {
        let fields = vec![
            ("concurrency", share(view.limits.concurrency)),
            ("rate", share(view.limits.rate.map(|rate| rate.jobs))),
            ("maxlen", share(view.limits.waiting)),
            ("leased", Reply::count(view.leased)),
            ("started", Reply::count(view.started)),
            ("waiting", Reply::count(view.waiting)),
        ];
        (Reply::bulk(&**shard), named(fields))
    });
    named(vec![
        ("concurrency", count(limits.concurrency)),
        ("rate", count(limits.rate.map(|rate| rate.jobs))),
        ("per", count(limits.rate.map(|rate| rate.per_ms))),
        ("maxlen", count(limits.waiting)),
        ("leased", sum(|view| view.leased)),
        ("started", sum(|view| view.started)),
        ("waiting", sum(|view| view.waiting)),
        ("shares", Reply::Map(parts.collect())),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::tests::{planned, refused};

    fn change(line: &str) -> QueueLimits {
        match planned(line) {
            Plan::Ask(Ask::Limit { change, .. }) => change,
            _ => panic!("{line} is no limit"),
        }
    }

    #[test]
    fn a_limit_changes_what_it_names_and_shows_what_it_does_not() {
        assert_eq!(change("GOFLOW.LIMIT q"), QueueLimits::default());
        let rate = Some(Rate { jobs: 5, per_ms: 1000 });
        assert_eq!(change("GOFLOW.LIMIT q per 1000 rate 5"), QueueLimits { rate, ..QueueLimits::default() });
        let all = change("GOFLOW.LIMIT q CONCURRENCY 0 RATE 0 MAXLEN 7");
        assert_eq!((all.concurrency, all.rate.map(|rate| rate.jobs), all.waiting), (Some(0), Some(0), Some(7)));
        assert!(refused("GOFLOW.LIMIT q RATE 5").contains("RATE n wants PER ms"));
        assert!(refused("GOFLOW.LIMIT q PER 5").contains("PER goes with RATE"));
        assert!(refused("GOFLOW.LIMIT q CONCURRENCY -1").contains("CONCURRENCY expects 0 to 1000000000"));
    }
}
