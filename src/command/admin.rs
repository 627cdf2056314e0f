//! What operators ask and order: queues, statistics, shards, and Redis's own commands about the server.
//!
//! Most of it is answered by the process ([`Ask`]); statistics are added up here, for one queue and for all.

use bytes::Bytes;
use std::sync::Arc;

use super::args::{Arg, Args, Kind, MS};
use super::job::unexpected;
use super::{Ask, Context, Flag, Group, Plan, Spec};
use crate::error::{Code, Error, Result};
use crate::resp::reply::Reply;
use crate::shard::{Action, Op, Outcome, Stats};

const QUEUE: Arg = Arg::new("queue", Kind::Queue);
/// Most worker sessions in one reply.
const WORKERS_SHOWN_MAX: i64 = 1_000;
const ANYTHING: &[Arg] = &[Arg::new("argument", Kind::Text).many().optional()];
const OPS: Spec = Spec { group: Group::Operations, ..Spec::BASE };
const SERVER: Spec = Spec { group: Group::Server, since: "1.0.0", ..Spec::BASE };

/// A command of Redis that would harm a queue, or that no proxy can mean: its row says so and its plan refuses it.
const fn refused(name: &'static str, since: &'static str, summary: &'static str) -> Spec {
    Spec {
        name,
        since,
        summary,
        args: ANYTHING,
        flags: &[Flag::Admin],
        reply: "The error `NOPERM`.",
        errors: &[Code::NoPerm],
        plan: refuse,
        ..SERVER
    }
}

pub static ROWS: &[Spec] = &[
    Spec {
        name: "GOFLOW.QUEUES",
        summary: "Lists the queues that any shard has ever seen.",
        flags: &[Flag::ReadOnly],
        reply: "An array of names, sorted. A shard that does not answer is left out unless none does.",
        errors: &[Code::ShardDown],
        examples: "\
> GOFLOW.ENQUEUE main hello
\"<id>\"
> GOFLOW.QUEUES
1) \"main\"
...",
        plan: |_, _| Ok(Plan::Ask(Ask::Queues)),
        ..OPS
    },
    Spec {
        name: "GOFLOW.STATS",
        summary: "Shows how many jobs a queue has in each state, and what has happened to its jobs.",
        args: &[QUEUE.optional()],
        flags: &[Flag::ReadOnly],
        reply: "A map of the sums over all shards: `queue`, `queues`, `shards`, `paused` (1 when a shard has it paused), the \
                jobs that are `ready`, `scheduled`, `leased`, `dead` and kept as `completed_kept`, `cancelled_kept`, \
                `expired_kept`; since the queue was first seen, the jobs `enqueued`, `delivered`, `completed`, \
                `failed`, `lapsed`, `released`, `died`, `redriven`, `cancelled`, `expired`; and `oldest_ready_ms`, how long \
                the job has been ready that is so for longest, or null (of each of the 16 highest priorities the next is \
                looked at). Without a queue the sums over all queues, with `queue` null.",
        errors: &[Code::ShardDown, Code::Overloaded],
        examples: "\
> GOFLOW.ENQUEUE stats-example hello
\"<id>\"
> GOFLOW.STATS stats-example
 1# \"queue\" => \"stats-example\"
 2# \"queues\" => (integer) 1
 3# \"shards\" => (integer) <shards>
 4# \"paused\" => (integer) 0
 5# \"ready\" => (integer) 1
...",
        plan: stats,
        ..OPS
    },
    Spec {
        name: "GOFLOW.WORKERS",
        summary: "Shows the worker sessions, and what they hold.",
        args: &[
            QUEUE.optional(),
            Arg::option("OFFSET", "n", Kind::Integer(0, i64::MAX)),
            Arg::option("COUNT", "n", Kind::Integer(1, WORKERS_SHOWN_MAX)),
        ],
        flags: &[Flag::ReadOnly],
        reply: "An array of maps by name, those without a name last: `worker` (null for a connection without a name), \
                `connections`, the numbers that `CLIENT LIST` shows of those to this proxy; `leased`, how many jobs it holds; \
                and `held`, a map for each queue and shard where it holds any, of `queue`, `shard`, `leased`, `held_ms` (for how \
                long without a break), `oldest_ms` (for how long the oldest of its first 100 jobs), `proxies` that keep \
                it, and `ends_in_ms`, when it ends unless one of them keeps it longer.",
        notes: "A session is one of `GOFLOW.DEQUEUE ... BIND`. A shard knows those that hold something; those that hold \
                nothing are shown by the proxy that they are connected to, whatever the queue. `COUNT` (default 100, at \
                most 1000) from `OFFSET`. Of a queue and shard at most 10,000 are looked at.",
        errors: &[Code::ShardDown, Code::Overloaded],
        examples: "\
> GOFLOW.ENQUEUE workers-example hello
\"<id>\"
> GOFLOW.DEQUEUE workers-example WORKER w1 BIND
 1# \"id\" => \"<id>\"
...
> GOFLOW.WORKERS workers-example
1) 1# \"worker\" => \"w1\"
...",
        plan: workers,
        ..OPS
    },
    Spec {
        name: "GOFLOW.SHARDS",
        summary: "Shows the shards and how they are.",
        flags: &[Flag::ReadOnly],
        reply: "A map from each shard's name to a map: `name`, `state` (`up`, `down`, `draining`, `leaving` or `closing`), `weight`, `depth`, \
                latency, errors, `map_version` and more.",
        examples: "\
> GOFLOW.SHARDS
1# \"<shard>\" =>  1# \"name\" => \"<shard>\"
...",
        plan: |_, _| Ok(Plan::Ask(Ask::Shards)),
        ..OPS
    },
    Spec {
        name: "INFO",
        summary: "Shows facts and figures about the server.",
        args: &[Arg::new("section", Kind::Text).many().optional()],
        reply: "A bulk string of lines `field:value` in sections, in Redis's form, with a section `GoFlow`.",
        examples: "\
> INFO goflow
...",
        plan: info,
        ..SERVER
    },
    Spec {
        name: "TIME",
        since: "2.6.0",
        summary: "Shows the server's clock.",
        flags: &[Flag::Fast],
        reply: "An array of the Unix time in seconds and the microseconds in that second.",
        examples: "\
> TIME
1) \"<seconds>\"
2) \"<microseconds>\"",
        plan: |_, _| Ok(Plan::Ask(Ask::Time)),
        ..SERVER
    },
    Spec::container("CONFIG", Group::Server, "2.0.0", "The server's settings."),
    Spec {
        name: "CONFIG|GET",
        since: "2.0.0",
        summary: "Shows settings whose names match.",
        args: &[Arg::new("pattern", Kind::Pattern).many()],
        flags: &[Flag::Admin],
        reply: "A map from names to values: GoFlow's settings, and those of Redis's that clients look for.",
        examples: "\
> CONFIG GET maxmemory-policy
1# \"maxmemory-policy\" => \"noeviction\"",
        plan: config_get,
        ..SERVER
    },
    Spec {
        name: "CONFIG|RESETSTAT",
        since: "2.0.0",
        summary: "Does nothing: the server's counters only grow.",
        flags: &[Flag::Admin],
        reply: "`OK`.",
        examples: "\
> CONFIG RESETSTAT
OK",
        plan: |_, _| Ok(Plan::Now(Reply::OK)),
        ..SERVER
    },
    refused("CONFIG|SET", "2.0.0", "Refused: settings come from the configuration file, the environment and flags."),
    refused("CONFIG|REWRITE", "2.8.0", "Refused: the configuration file is the operator's."),
    Spec {
        name: "ROLE",
        since: "2.8.12",
        summary: "Says that this is a master without replicas.",
        flags: &[Flag::Fast],
        reply: "An array of `master`, 0 and an empty array.",
        examples: "\
> ROLE
1) \"master\"
2) (integer) 0
3) (empty array)",
        plan: |_, _| {
            Ok(Plan::Now(Reply::Array(vec![Reply::text("master"), Reply::Integer(0), Reply::Array(Vec::new())])))
        },
        ..SERVER
    },
    Spec {
        name: "WAIT",
        since: "3.0.0",
        summary: "Answers that no replica is known: how shards replicate is theirs.",
        args: &[Arg::new("numreplicas", Kind::Integer(0, i64::MAX)), Arg::new("timeout", MS)],
        reply: "0.",
        examples: "\
> WAIT 0 0
(integer) 0",
        plan: |_, _| Ok(Plan::Now(Reply::Integer(0))),
        ..SERVER
    },
    Spec {
        name: "CLUSTER",
        since: "3.0.0",
        summary: "Says that this is not a Redis Cluster: a proxy has one fixed address.",
        args: &[Arg::new("subcommand", Kind::Text), Arg::new("argument", Kind::Text).many().optional()],
        reply: "The error that a Redis without cluster support gives.",
        examples: "\
> CLUSTER NODES
(error) ERR This instance has cluster support disabled",
        plan: no_cluster,
        ..SERVER
    },
    Spec {
        name: "ASKING",
        since: "3.0.0",
        summary: "Says that this is not a Redis Cluster.",
        reply: "The error that a Redis without cluster support gives.",
        examples: "\
> ASKING
(error) ERR This instance has cluster support disabled",
        plan: no_cluster,
        ..SERVER
    },
    Spec::container("MODULE", Group::Server, "4.0.0", "Modules, of which there are none."),
    Spec {
        name: "MODULE|LIST",
        since: "4.0.0",
        summary: "Lists the loaded modules: none.",
        reply: "An empty array.",
        examples: "\
> MODULE LIST
(empty array)",
        plan: |_, _| Ok(Plan::Now(Reply::Array(Vec::new()))),
        ..SERVER
    },
    Spec::container("SLOWLOG", Group::Server, "2.2.12", "The slow commands of this proxy (`log.slow_ms`)."),
    Spec {
        name: "SLOWLOG|GET",
        since: "2.2.12",
        summary: "Lists the last slow commands of this proxy, the newest first.",
        args: &[Arg::new("count", Kind::Integer(-1, i64::MAX)).optional()],
        flags: &[Flag::Admin],
        reply: "An array, at most 10 entries unless `count` says otherwise, all of them (128 at most) with -1. Each is an array \
                of its number, the Unix time in seconds, the microseconds that it took, the words, and the client's address and \
                name. Of the words it holds the command and the queue, lock or semaphore, and how many others there were: no \
                payload, key or secret.",
        notes: "What takes longer than `log.slow_ms` (200) is slow; the wait of a blocking command does not count. The same is \
                a line of the log, module `goflow::slow`.",
        examples: "\
> SLOWLOG RESET
OK
> SLOWLOG GET
(empty array)",
        plan: |args, _| {
            let count = args.integer("count")?.map(|count| usize::try_from(count).unwrap_or(usize::MAX));
            Ok(Plan::Ask(Ask::Slow { count }))
        },
        ..SERVER
    },
    Spec {
        name: "SLOWLOG|LEN",
        since: "2.2.12",
        summary: "Counts the slow commands that are kept.",
        flags: &[Flag::Admin],
        reply: "An integer, at most 128.",
        examples: "\
> SLOWLOG RESET
OK
> SLOWLOG LEN
(integer) 0",
        plan: |_, _| Ok(Plan::Ask(Ask::SlowCount)),
        ..SERVER
    },
    Spec {
        name: "SLOWLOG|RESET",
        since: "2.2.12",
        summary: "Forgets the slow commands.",
        flags: &[Flag::Admin],
        reply: "`OK`.",
        examples: "\
> SLOWLOG RESET
OK",
        plan: |_, _| Ok(Plan::Ask(Ask::SlowReset)),
        ..SERVER
    },
    Spec::container("LATENCY", Group::Server, "2.8.13", "Latency events, of which none are kept; see the metrics."),
    Spec {
        name: "LATENCY|LATEST",
        since: "2.8.13",
        summary: "Lists the latest latency events: none.",
        flags: &[Flag::Admin],
        reply: "An empty array.",
        examples: "\
> LATENCY LATEST
(empty array)",
        plan: |_, _| Ok(Plan::Now(Reply::Array(Vec::new()))),
        ..SERVER
    },
    Spec {
        name: "LATENCY|HISTORY",
        since: "2.8.13",
        summary: "Lists the samples of a latency event: none.",
        args: &[Arg::new("event", Kind::Text)],
        flags: &[Flag::Admin],
        reply: "An empty array.",
        examples: "\
> LATENCY HISTORY command
(empty array)",
        plan: |_, _| Ok(Plan::Now(Reply::Array(Vec::new()))),
        ..SERVER
    },
    Spec {
        name: "LATENCY|RESET",
        since: "2.8.13",
        summary: "Resets latency events: none are kept.",
        args: &[Arg::new("event", Kind::Text).many().optional()],
        flags: &[Flag::Admin],
        reply: "0.",
        examples: "\
> LATENCY RESET
(integer) 0",
        plan: |_, _| Ok(Plan::Now(Reply::Integer(0))),
        ..SERVER
    },
    refused("FLUSHALL", "1.0.0", "Refused: it would remove every job of every queue."),
    refused("FLUSHDB", "1.0.0", "Refused: it would remove every job of every queue."),
    refused("SHUTDOWN", "1.0.0", "Refused: stop the process with SIGTERM."),
    refused("DEBUG", "1.0.0", "Refused."),
    refused("REPLICAOF", "5.0.0", "Refused: how shards replicate is theirs."),
    refused("SLAVEOF", "1.0.0", "Refused: how shards replicate is theirs."),
    refused("MONITOR", "1.0.0", "Refused: it would show payloads and passwords."),
    refused("SAVE", "1.0.0", "Refused: how shards persist is theirs."),
    refused("BGSAVE", "1.0.0", "Refused: how shards persist is theirs."),
    refused("BGREWRITEAOF", "1.0.0", "Refused: how shards persist is theirs."),
];

fn refuse(args: &Args, _: &Context) -> Result<Plan> {
    let why = args.row().summary;
    Err(Error::new(
        Code::NoPerm,
        why.strip_prefix("Refused: ").map_or("refused by GoFlow", |why| why.trim_end_matches('.')),
    ))
}

fn no_cluster(_: &Args, _: &Context) -> Result<Plan> {
    Err(Error::bad("This instance has cluster support disabled"))
}

fn info(args: &Args, _: &Context) -> Result<Plan> {
    let lower = |word: &Bytes| String::from_utf8_lossy(word).to_ascii_lowercase();
    Ok(Plan::Ask(Ask::Info { sections: args.words("section").iter().map(lower).collect() }))
}

fn config_get(args: &Args, _: &Context) -> Result<Plan> {
    Ok(Plan::Ask(Ask::Config { patterns: args.words("pattern").to_vec() }))
}

fn workers(args: &Args, _: &Context) -> Result<Plan> {
    let queue = if args.has("queue") { Some(args.queue()?) } else { None };
    let (offset, count) = (args.number("OFFSET")?.unwrap_or(0), args.number("COUNT")?.unwrap_or(100));
    Ok(Plan::Ask(Ask::Workers { queue, offset, count }))
}

fn stats(args: &Args, _: &Context) -> Result<Plan> {
    if !args.has("queue") {
        return Ok(Plan::Ask(Ask::Totals));
    }
    let queue = args.queue()?;
    let op = Op { queue: queue.clone(), action: Action::Stats };
    let merge = move |outcomes: Vec<(Arc<str>, Outcome)>| {
        let mut totals = Totals { shards: outcomes.len() as u64, queues: 1, ..Totals::default() };
        for (_, outcome) in outcomes {
            let Outcome::Stats(stats) = outcome else { return unexpected() };
            totals.add(&stats);
        }
        totals.reply(Reply::bulk(queue.as_str()))
    };
    Ok(Plan::Each { op, merge: Box::new(merge) })
}

/// Statistics of one or more queues on one or more shards, added up.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    pub queues: u64,
    pub shards: u64,
    sum: Stats,
    oldest_ready_ms: Option<u64>,
}

impl Totals {
    /// Adds what one shard says of one queue.
    pub fn add(&mut self, stats: &Stats) {
        let sum = &mut self.sum;
        sum.ready += stats.ready;
        sum.scheduled += stats.scheduled;
        sum.leased += stats.leased;
        sum.dead += stats.dead;
        sum.completed_kept += stats.completed_kept;
        sum.cancelled_kept += stats.cancelled_kept;
        sum.expired_kept += stats.expired_kept;
        sum.enqueued += stats.enqueued;
        sum.delivered += stats.delivered;
        sum.completed += stats.completed;
        sum.failed += stats.failed;
        sum.lapsed += stats.lapsed;
        sum.released += stats.released;
        sum.died += stats.died;
        sum.redriven += stats.redriven;
        sum.cancelled += stats.cancelled;
        sum.expired += stats.expired;
        sum.paused |= stats.paused;
        // Each shard's point in time is compared with its own clock; only the spans compare across shards.
        let waited = stats.oldest_ready_at.map(|at| stats.now.saturating_sub(at));
        self.oldest_ready_ms = self.oldest_ready_ms.max(waited);
    }

    pub fn reply(&self, queue: Reply) -> Reply {
        let sum = &self.sum;
        let mut fields = vec![(Reply::text("queue"), queue)];
        let numbers = [
            ("queues", self.queues),
            ("shards", self.shards),
            ("paused", u64::from(sum.paused)),
            ("ready", sum.ready),
            ("scheduled", sum.scheduled),
            ("leased", sum.leased),
            ("dead", sum.dead),
            ("completed_kept", sum.completed_kept),
            ("cancelled_kept", sum.cancelled_kept),
            ("expired_kept", sum.expired_kept),
            ("enqueued", sum.enqueued),
            ("delivered", sum.delivered),
            ("completed", sum.completed),
            ("failed", sum.failed),
            ("lapsed", sum.lapsed),
            ("released", sum.released),
            ("died", sum.died),
            ("redriven", sum.redriven),
            ("cancelled", sum.cancelled),
            ("expired", sum.expired),
        ];
        fields.extend(numbers.map(|(name, number)| (Reply::text(name), Reply::count(number))));
        fields.push((Reply::text("oldest_ready_ms"), self.oldest_ready_ms.map_or(Reply::Null, Reply::count)));
        Reply::Map(fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::tests::{planned, refused};

    #[test]
    fn statistics_are_the_sums_over_the_shards() {
        let Plan::Each { op, merge } = planned("GOFLOW.STATS main") else { panic!() };
        assert_eq!(op.action, Action::Stats);
        let stats = |ready, oldest_ready_at, now| {
            Outcome::Stats(Box::new(Stats { ready, oldest_ready_at, now, paused: ready == 2, ..Stats::default() }))
        };
        let reply = merge(vec![("a".into(), stats(1, None, 500)), ("b".into(), stats(2, Some(70), 100))]);
        let Reply::Map(fields) = reply else { panic!() };
        let field = |name: &'static str| {
            fields.iter().find(|(field, _)| *field == Reply::text(name)).map(|(_, value)| value.clone())
        };
        assert_eq!(field("queue"), Some(Reply::bulk("main")));
        for (name, number) in [("shards", 2), ("queues", 1), ("paused", 1), ("ready", 3), ("oldest_ready_ms", 30)] {
            assert_eq!(field(name), Some(Reply::Integer(number)), "{name}");
        }
        assert!(matches!(planned("goflow.stats"), Plan::Ask(Ask::Totals)));
    }

    #[test]
    fn questions_to_the_process_hold_what_was_asked() {
        let asked = |line: &str| match planned(line) {
            Plan::Ask(ask) => ask,
            _ => panic!("{line} is no question"),
        };
        assert_eq!(asked("GOFLOW.SHARD DRAIN s1"), Ask::Map(crate::command::MapOrder::Drain { shard: "s1".into() }));
        assert_eq!(asked("info Server CLIENTS"), Ask::Info { sections: vec!["server".into(), "clients".into()] });
        assert_eq!(asked("CONFIG GET a* b"), Ask::Config { patterns: vec!["a*".into(), "b".into()] });
    }

    #[test]
    fn what_would_harm_a_queue_is_refused_by_name() {
        assert_eq!(refused("FLUSHALL ASYNC"), "NOPERM it would remove every job of every queue");
        assert_eq!(
            refused("config set a b"),
            "NOPERM settings come from the configuration file, the environment and flags"
        );
        assert_eq!(refused("DEBUG SLEEP 1"), "NOPERM refused by GoFlow");
        assert_eq!(refused("cluster nodes"), "ERR This instance has cluster support disabled");
    }
}
