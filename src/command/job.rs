//! The commands under "Jobs": producing, delivering, verdicts, and looking at jobs and queues.
//!
//! ENQUEUE, DEQUEUE and ACK are the hot ones: without options their plan functions allocate what the plan holds and
//! nothing else. The table and the plans are here; how outcomes become replies is `job/answer.rs`.

use bytes::Bytes;
use std::sync::Arc;

use super::args::{Arg, Args, Kind, MS, MS_FROM_1, integer_between, shard_name, syntax_error};
use super::{Context, Dequeue, Enqueue, Flag, Group, JobAddress, Merge, Plan, Route, Spec};
use crate::clock::{Millis, TIME_MAX};
use crate::error::{Code, Error, Result};
use crate::job::{
    JobRef, JobState, JobView, Lease, META_BYTES_MAX, META_FIELDS_MAX, Name, PRIORITY_MAX, Policy, TEXT_BYTES_MAX,
    TYPE_BYTES_MAX, check_key, parse_chosen_id, parse_id, parse_receipt,
};
use crate::resp::reply::Reply;
use crate::shard::{Action, Op, Outcome, PAGE_JOBS_MAX, Start};

mod answer;

pub use answer::{job_map, put_delivery, sum, unexpected};
use answer::{merge_pages, per_shard, render_count, render_done, render_job, render_state, render_until};

/// Most queues that one DEQUEUE names.
pub const DEQUEUE_QUEUES_MAX: usize = 128;
/// Largest CONCURRENCY of a group.
pub const GROUP_BOUND_MAX: i64 = 1_000;
/// Jobs in one page of PEEK or DLQ LIST when the request does not say.
pub const PAGE_JOBS: u64 = 100;

const QUEUE: Arg = Arg::new("queue", Kind::Queue);
const RECEIPT: Arg = Arg::new("receipt", Kind::Receipt);
const STATE: Arg = Arg::option("STATE", "state", Kind::State);
pub const OFFSET: Arg = Arg::option("OFFSET", "n", Kind::Integer(0, PAGE_JOBS_MAX as i64));
pub const COUNT: Arg = Arg::option("COUNT", "n", Kind::Integer(1, PAGE_JOBS_MAX as i64));
const TYPE: Arg = Arg::option("TYPE", "name", Kind::Text);
const PRIORITY: Arg = Arg::option("PRIORITY", "n", Kind::Integer(-(PRIORITY_MAX as i64), PRIORITY_MAX as i64));
const DELAY: Arg = Arg::option("DELAY", "ms", MS);
const AT: Arg = Arg::option("AT", "unix-ms", Kind::Time).or();
const ATTEMPTS: Arg = Arg::option("ATTEMPTS", "n", Kind::Integer(1, u32::MAX as i64));
const BACKOFF: Arg = Arg::option("BACKOFF", "ms", MS);
const BACKOFFMAX: Arg = Arg::option("BACKOFFMAX", "ms", MS);
const TTL: Arg = Arg::option("TTL", "ms", MS);
const META: Arg =
    Arg::option("META", "meta", Kind::Group(&[Arg::new("field", Kind::Text), Arg::new("value", Kind::Text)])).many();
const GROUP: Arg = Arg::option("GROUP", "key", Kind::Text);
const CONCURRENCY: Arg = Arg::option("CONCURRENCY", "n", Kind::Integer(1, GROUP_BOUND_MAX));
const SHARD: Arg = Arg::option("SHARD", "name", Kind::Shard);
const UNIQUE: Arg = Arg::option("UNIQUE", "unique", Kind::Group(&[Arg::new("key", Kind::Text), Arg::new("ms", MS)]));
const SHARDS: Arg =
    Arg::option("SHARDS", "shards", Kind::Group(&[Arg::new("n", Kind::Count), Arg::new("name", Kind::Shard).many()]));

const LEASE_LOST: &[Code] = &[Code::LeaseLost, Code::NoSuchJob, Code::ShardDown, Code::Overloaded];
const SHARD_ERRORS: &[Code] = &[Code::ShardDown, Code::Overloaded];
pub const PAGE_ERRORS: &[Code] = &[Code::ShardDown, Code::Overloaded, Code::TooBig];

pub static ROWS: &[Spec] = &[
    Spec {
        name: "GOFLOW.ENQUEUE",
        group: Group::Jobs,
        summary: "Adds a job to a queue.",
        args: &[
            QUEUE,
            Arg::new("payload", Kind::Text),
            Arg::option("ID", "id", Kind::Text),
            TYPE,
            PRIORITY,
            DELAY,
            AT,
            ATTEMPTS,
            BACKOFF,
            BACKOFFMAX,
            TTL,
            UNIQUE,
            GROUP,
            CONCURRENCY,
            META,
            SHARD,
            Arg::flag("NX", "nx"),
        ],
        flags: &[Flag::Write, Flag::Fast],
        reply: "The id of the job, a bulk string. When a job with the same `ID` is still known, or one that is neither \
                over nor dead holds the `UNIQUE` key, its id, and nothing is added; with `NX` the error `DUPLICATE`.",
        notes: "`DELAY` or `AT` says when the job may start; `PRIORITY` is -1000 to 1000, higher first. `ATTEMPTS` is how \
                many deliveries may end badly before the job is dead; retry n waits `BACKOFF * 2^(n-1)` ms, a tenth \
                more or less, at most `BACKOFFMAX`. `TTL` ends a job that was not started in time. `UNIQUE key ms` \
                holds the key at most so long, with 0 until the job is over or dead. `META` may be repeated: at most \
                64 fields and 16 KiB. `GROUP key` lets one job of the group be leased at a time, in order, or with \
                `CONCURRENCY` up to n at once. `SHARD` places the job there. `ID`, `UNIQUE` and `GROUP` have a shard of \
                their own, so a job has one of these four at most.",
        errors: &[Code::Duplicate, Code::QueueFull, Code::TooBig, Code::ShardDown, Code::Overloaded],
        examples: "\
> GOFLOW.ENQUEUE main hello
\"<id>\"
> GOFLOW.ENQUEUE main '{\"to\":\"ada\"}' ID mail-17 TYPE mail PRIORITY 5 META tenant acme
\"mail-17\"
> GOFLOW.ENQUEUE main again ID mail-17
\"mail-17\"
> GOFLOW.ENQUEUE main again ID mail-17 NX
(error) DUPLICATE the job mail-17 holds this key
> GOFLOW.ENQUEUE main 'order paid' GROUP customer-7
\"<paid>\"
> GOFLOW.ENQUEUE main 'order sent' GROUP customer-7
\"<sent>\"",
        plan: enqueue,
        ..Spec::BASE
    },
    Spec {
        name: "GOFLOW.ENQUEUEMANY",
        group: Group::Jobs,
        summary: "Adds many jobs to a queue at once.",
        args: &[
            QUEUE,
            Arg::new("count", Kind::Count),
            Arg::new("payload", Kind::Text).many(),
            TYPE,
            PRIORITY,
            DELAY,
            AT,
            ATTEMPTS,
            BACKOFF,
            BACKOFFMAX,
            TTL,
            GROUP,
            CONCURRENCY,
            META,
            SHARD,
        ],
        flags: &[Flag::Write],
        reply: "An array of the ids, in the order of the payloads. The jobs are spread over the shards as the strategy \
                says; each shard stores all of its part or nothing, and an id whose shard failed is an error in its \
                place.",
        notes: "The options are those of `GOFLOW.ENQUEUE` and hold for every job; `ID`, `UNIQUE` and `NX` fit one job \
                only and are not taken. With `GROUP` all of them go to the group's shard.",
        errors: &[Code::QueueFull, Code::TooBig, Code::ShardDown, Code::Overloaded],
        examples: "\
> GOFLOW.ENQUEUEMANY main 3 one two three PRIORITY 1
1) \"<id1>\"
2) \"<id2>\"
3) \"<id3>\"",
        plan: enqueue_many,
        ..Spec::BASE
    },
    Spec {
        name: "GOFLOW.DEQUEUE",
        group: Group::Jobs,
        summary: "Leases the next job or jobs of the first queue that has any.",
        args: &[
            QUEUE.many(),
            Arg::option("COUNT", "n", Kind::Integer(1, i64::MAX)),
            Arg::option("BLOCK", "ms", MS),
            Arg::option("LEASE", "ms", MS_FROM_1),
            Arg::option("WORKER", "name", Kind::Text),
            SHARDS,
            Arg::flag("BIND", "bind"),
            Arg::option("MAXRUN", "ms", MS_FROM_1),
        ],
        flags: &[Flag::Write, Flag::Blocking],
        reply: "Without `COUNT` one job, a map, or null. With `COUNT` an array of 1 to n jobs, or null; some MiB of jobs are \
                enough, however many were asked for. A job's fields \
                are, in this order: `id`, `receipt`, `payload`, `attempt`, `queue`, `type`, `attempts`, `priority`, \
                `enqueued_at`, `lease_until`, `shard`, `meta`.",
        notes: "Queues are tried in the order given; a queue that is named like an option must stand first. Without \
                `BLOCK` the command never waits; `BLOCK 0` waits as long as the server allows. `LEASE` (default 30000) is \
                how long the job is the worker's; then it comes back by itself. `SHARDS` takes from these shards only. \
                A `BLOCK` above the read timeout of the client library ends in a reply that nobody reads. With `BIND` the \
                lease belongs to the worker session: that of `WORKER name`, on any number of connections and proxies, or \
                without a name this connection. The job is on its first lease, `LEASE`, until a later command of this \
                connection shows that the delivery was read, anything from `PING` to the next `GOFLOW.DEQUEUE`; from then on \
                it is the worker's as long as the session has a connection, and at most `MAXRUN` (default 3600000) from its \
                start. A grace (2 s, 0 without a name) after the last connection closed, the job goes back, its attempt \
                uncounted. A command that came while a `GOFLOW.DEQUEUE` was waiting says that its client may have given up: \
                then only a command that names the receipt, such as `GOFLOW.PROGRESS`, shows that the delivery was read. A \
                worker that goes on through another proxy takes its session over with its first `GOFLOW.DEQUEUE ... BIND` \
                there, for the queues that this names. A job that is larger alone than a reply may be \
                (`limits.output_bytes_max`) answers `TOOBIG`, and stays where it is.",
        errors: PAGE_ERRORS,
        examples: "\
> GOFLOW.ENQUEUE main hello TYPE greeting META lang en
\"<id>\"
> GOFLOW.DEQUEUE main LEASE 60000
 1# \"id\" => \"<id>\"
 2# \"receipt\" => \"<receipt>\"
 3# \"payload\" => \"hello\"
 4# \"attempt\" => (integer) 1
 5# \"queue\" => \"main\"
 6# \"type\" => \"greeting\"
 7# \"attempts\" => (integer) 25
 8# \"priority\" => (integer) 0
 9# \"enqueued_at\" => (integer) <enqueued-at>
10# \"lease_until\" => (integer) <lease-until>
11# \"shard\" => \"<shard>\"
12# \"meta\" => 1# \"lang\" => \"en\"
> GOFLOW.DEQUEUE main BLOCK 10
(nil)",
        plan: dequeue,
        ..Spec::BASE
    },
    Spec {
        name: "GOFLOW.ACK",
        group: Group::Jobs,
        summary: "Completes leased jobs.",
        args: &[QUEUE, RECEIPT.many(), Arg::option("RESULT", "data", Kind::Text)],
        flags: &[Flag::Write, Flag::Fast],
        reply: "An integer: how many of these jobs are completed by these receipts, now or by the same receipt before. \
                A lease that was lost counts 0.",
        notes: "A late ACK counts as long as the job has no newer lease. `RESULT` is kept with the job, up to 16 KiB.",
        errors: SHARD_ERRORS,
        examples: "\
> GOFLOW.ENQUEUE main hello
\"<id>\"
> GOFLOW.DEQUEUE main
 1# \"id\" => \"<id>\"
 2# \"receipt\" => \"<receipt>\"
...
> GOFLOW.ACK main <receipt> RESULT done
(integer) 1
> GOFLOW.ACK main <receipt>
(integer) 1",
        plan: ack,
        ..Spec::BASE
    },
    Spec {
        name: "GOFLOW.FAIL",
        group: Group::Jobs,
        summary: "Ends a delivery badly: the job is retried later, or dead.",
        args: &[
            QUEUE,
            RECEIPT,
            Arg::option("ERROR", "text", Kind::Text),
            Arg::option("TRACE", "text", Kind::Text),
            Arg::option("RETRYIN", "ms", MS),
            Arg::flag("DEAD", "dead"),
        ],
        flags: &[Flag::Write, Flag::Fast],
        reply: "The job's new state, a bulk string: `scheduled`, `ready` or `dead`.",
        notes: "`RETRYIN` replaces the backoff of this retry. `DEAD` puts the job into the dead letter queue at once, \
                whatever attempts it has left. `ERROR` and `TRACE` are kept, up to 16 KiB each.",
        errors: LEASE_LOST,
        examples: "\
> GOFLOW.ENQUEUE main hello
\"<id>\"
> GOFLOW.DEQUEUE main
 1# \"id\" => \"<id>\"
 2# \"receipt\" => \"<receipt>\"
...
> GOFLOW.FAIL main <receipt> ERROR \"connection refused\" RETRYIN 5000
\"scheduled\"",
        plan: fail,
        ..Spec::BASE
    },
    Spec {
        name: "GOFLOW.RELEASE",
        group: Group::Jobs,
        summary: "Gives a leased job back, its attempt uncounted.",
        args: &[QUEUE, RECEIPT, DELAY],
        flags: &[Flag::Write, Flag::Fast],
        reply: "The job's new state, a bulk string: `ready`, at its old place in line, or with `DELAY` `scheduled`.",
        errors: LEASE_LOST,
        examples: "\
> GOFLOW.ENQUEUE main hello
\"<id>\"
> GOFLOW.DEQUEUE main
 1# \"id\" => \"<id>\"
 2# \"receipt\" => \"<receipt>\"
...
> GOFLOW.RELEASE main <receipt>
\"ready\"",
        plan: release,
        ..Spec::BASE
    },
    Spec {
        name: "GOFLOW.EXTEND",
        group: Group::Jobs,
        summary: "Moves the end of a lease.",
        args: &[QUEUE, RECEIPT, Arg::new("ms", MS_FROM_1)],
        flags: &[Flag::Write, Flag::Fast],
        reply: "The new end of the lease, an integer in Unix milliseconds: the shard's clock plus `ms`.",
        errors: LEASE_LOST,
        examples: "\
> GOFLOW.ENQUEUE main hello
\"<id>\"
> GOFLOW.DEQUEUE main
 1# \"id\" => \"<id>\"
 2# \"receipt\" => \"<receipt>\"
...
> GOFLOW.EXTEND main <receipt> 60000
(integer) <lease-until>",
        plan: extend,
        ..Spec::BASE
    },
    Spec {
        name: "GOFLOW.PROGRESS",
        group: Group::Jobs,
        summary: "Records how far a leased job is.",
        args: &[QUEUE, RECEIPT, Arg::new("percent", Kind::Integer(0, 100)), Arg::new("text", Kind::Text).optional()],
        flags: &[Flag::Write, Flag::Fast],
        reply: "`OK`.",
        notes: "`GOFLOW.JOB` shows the last percentage and text.",
        errors: LEASE_LOST,
        examples: "\
> GOFLOW.ENQUEUE main hello
\"<id>\"
> GOFLOW.DEQUEUE main
 1# \"id\" => \"<id>\"
 2# \"receipt\" => \"<receipt>\"
...
> GOFLOW.PROGRESS main <receipt> 40 \"2 of 5 files\"
OK",
        plan: progress,
        ..Spec::BASE
    },
    Spec {
        name: "GOFLOW.CANCEL",
        group: Group::Jobs,
        summary: "Ends a job that is not over, whoever holds it.",
        args: &[QUEUE, Arg::new("id", Kind::Id)],
        flags: &[Flag::Write, Flag::Fast],
        reply: "1, or 0 if the job was already over or is not known.",
        notes: "A worker that holds the job learns of it by `LEASELOST` on its next word.",
        errors: SHARD_ERRORS,
        examples: "\
> GOFLOW.ENQUEUE main hello
\"<id>\"
> GOFLOW.CANCEL main <id>
(integer) 1
> GOFLOW.CANCEL main <id>
(integer) 0",
        plan: cancel,
        ..Spec::BASE
    },
    Spec {
        name: "GOFLOW.JOB",
        group: Group::Jobs,
        summary: "Shows everything that is known of a job.",
        args: &[QUEUE, Arg::new("id", Kind::Id)],
        flags: &[Flag::ReadOnly, Flag::Fast],
        reply: "A map with the job's `state` and every other field, or null. A field that says nothing is null.",
        errors: SHARD_ERRORS,
        examples: "\
> GOFLOW.ENQUEUE main hello DELAY 60000
\"<id>\"
> GOFLOW.JOB main <id>
 1# \"id\" => \"<id>\"
 2# \"queue\" => \"main\"
 3# \"shard\" => \"<shard>\"
 4# \"state\" => \"scheduled\"
 5# \"payload\" => \"hello\"
...
> GOFLOW.JOB main no-such-job
(nil)",
        plan: show,
        ..Spec::BASE
    },
    Spec {
        name: "GOFLOW.PEEK",
        group: Group::Jobs,
        summary: "Shows jobs of a queue without taking them.",
        args: &[QUEUE, STATE, OFFSET, COUNT],
        flags: &[Flag::ReadOnly],
        reply: "An array of job maps as `GOFLOW.JOB` has them: ready ones in the order of delivery, scheduled ones by the \
                time they fall due, leased ones by the end of their lease, dead ones and those that are over newest \
                first.",
        notes: "The default state is `ready`, the default count 100; `OFFSET` and `COUNT` together reach 1000 jobs; those of \
                more than 64 MiB together answer `TOOBIG`. Each \
                shard delivers in its own order; shown together, of equal priorities the job that was enqueued first \
                comes first.",
        errors: PAGE_ERRORS,
        examples: "\
> GOFLOW.ENQUEUE main hello
\"<id>\"
> GOFLOW.PEEK main COUNT 1
1)  1# \"id\" => \"<id>\"
    2# \"queue\" => \"main\"
...",
        plan: peek,
        ..Spec::BASE
    },
    Spec {
        name: "GOFLOW.LEN",
        group: Group::Jobs,
        summary: "Counts the jobs of a queue that are in a state.",
        args: &[QUEUE, STATE, Arg::flag("PERSHARD", "pershard")],
        flags: &[Flag::ReadOnly, Flag::Fast],
        reply: "An integer, the sum over all shards; with `PERSHARD` a map from the shard's name to its number.",
        notes: "The default state is `ready`.",
        errors: SHARD_ERRORS,
        examples: "\
> GOFLOW.ENQUEUEMANY main 2 one two
...
> GOFLOW.LEN main
(integer) 2
> GOFLOW.LEN main STATE leased
(integer) 0
> GOFLOW.LEN main PERSHARD
1# \"<shard>\" => (integer) 2",
        plan: len,
        ..Spec::BASE
    },
    Spec {
        name: "GOFLOW.PAUSE",
        group: Group::Jobs,
        summary: "Stops the deliveries of a queue, on every proxy.",
        args: &[QUEUE],
        flags: &[Flag::Write, Flag::Fast],
        reply: "`OK`.",
        notes: "A paused queue accepts jobs and verdicts and delivers nothing.",
        errors: SHARD_ERRORS,
        examples: "\
> GOFLOW.PAUSE main
OK
> GOFLOW.ENQUEUE main hello
\"<id>\"
> GOFLOW.DEQUEUE main
(nil)",
        plan: pause,
        ..Spec::BASE
    },
    Spec {
        name: "GOFLOW.RESUME",
        group: Group::Jobs,
        summary: "Starts the deliveries of a paused queue again.",
        args: &[QUEUE],
        flags: &[Flag::Write, Flag::Fast],
        reply: "`OK`.",
        errors: SHARD_ERRORS,
        examples: "\
> GOFLOW.PAUSE main
OK
> GOFLOW.RESUME main
OK",
        plan: resume,
        ..Spec::BASE
    },
    Spec {
        name: "GOFLOW.PURGE",
        group: Group::Jobs,
        summary: "Removes all jobs of a queue that are in a state.",
        args: &[QUEUE, STATE],
        flags: &[Flag::Write],
        reply: "An integer: how many were removed.",
        notes: "The default state is `ready`. A leased job that is removed loses its lease.",
        errors: SHARD_ERRORS,
        examples: "\
> GOFLOW.ENQUEUEMANY main 2 one two
...
> GOFLOW.PURGE main
(integer) 2",
        plan: purge,
        ..Spec::BASE
    },
];

fn enqueue(args: &Args, context: &Context) -> Result<Plan> {
    let queue = args.queue()?;
    let payload = args.required("payload")?.clone();
    check_size(&payload, "payload", context.limits.payload_bytes_max)?;
    let (policy, start, shard, nx) = match args.has_options() {
        false => (context.limits.policy.clone(), Start::Now, None, false),
        true => {
            let policy = keyed_policy(args, &context.limits.policy)?;
            let shard = ungrouped_shard(args, &policy)?;
            let keyed = policy.id.is_some() || policy.unique.is_some();
            if shard.is_some() && keyed {
                return Err(Error::bad("SHARD does not go with ID or UNIQUE, which have a shard of their own"));
            }
            if args.has("NX") && !keyed {
                return Err(Error::bad("NX goes with ID or UNIQUE only"));
            }
            (Arc::new(policy), start(args)?, shard, args.has("NX"))
        }
    };
    Ok(Plan::Enqueue(Enqueue { queue, policy, payloads: vec![payload], start, shard, nx, many: false }))
}

fn enqueue_many(args: &Args, context: &Context) -> Result<Plan> {
    let queue = args.queue()?;
    let payloads = args.words("payload");
    check_batch(payloads.len(), "count", context)?;
    for payload in payloads {
        check_size(payload, "payload", context.limits.payload_bytes_max)?;
    }
    let (policy, start, shard) = match args.has_options() {
        false => (context.limits.policy.clone(), Start::Now, None),
        true => {
            let policy = policy(args, &context.limits.policy)?;
            let shard = ungrouped_shard(args, &policy)?;
            (Arc::new(policy), start(args)?, shard)
        }
    };
    Ok(Plan::Enqueue(Enqueue { queue, policy, payloads: payloads.to_vec(), start, shard, nx: false, many: true }))
}

fn check_size(bytes: &[u8], what: &'static str, limit: usize) -> Result<()> {
    match bytes.len() {
        len if len > limit => Err(Error::new(Code::TooBig, format!("{what} has {len} bytes, the limit is {limit}"))),
        _ => Ok(()),
    }
}

fn check_batch(count: usize, what: &'static str, context: &Context) -> Result<()> {
    match context.limits.batch_jobs_max {
        limit if count > limit => {
            Err(Error::bad(format!("value is not an integer or out of range: {what} expects 1 to {limit}")))
        }
        _ => Ok(()),
    }
}

/// The options that fit many jobs.
fn policy(args: &Args, default: &Policy) -> Result<Policy> {
    let mut policy = default.clone();
    if let Some(kind) = args.value("TYPE") {
        check_size(kind, "TYPE", TYPE_BYTES_MAX)?;
        policy.kind = kind.clone();
    }
    if let Some(priority) = args.integer("PRIORITY")? {
        policy.priority = i16::try_from(priority).map_err(|_| syntax_error())?;
    }
    if let Some(attempts) = args.integer("ATTEMPTS")? {
        policy.attempts = u32::try_from(attempts).map_err(|_| syntax_error())?;
    }
    policy.backoff = args.number("BACKOFF")?.unwrap_or(policy.backoff);
    policy.backoff_max = args.number("BACKOFFMAX")?.unwrap_or(policy.backoff_max);
    policy.ttl = args.number("TTL")?.unwrap_or(policy.ttl);
    match (args.value("GROUP"), args.integer("CONCURRENCY")?) {
        (Some(key), bound) => {
            check_key(key, "GROUP key")?;
            policy.group = Some((key.clone(), u32::try_from(bound.unwrap_or(1)).map_err(|_| syntax_error())?));
        }
        (None, Some(_)) => return Err(Error::bad("CONCURRENCY goes with GROUP only")),
        (None, None) => {}
    }
    put_meta(args, &mut policy)?;
    Ok(policy)
}

/// The shard that the request names.
fn ungrouped_shard(args: &Args, policy: &Policy) -> Result<Option<Box<str>>> {
    match args.shard("SHARD")? {
        Some(_) if policy.group.is_some() => {
            Err(Error::bad("SHARD does not go with GROUP: all jobs of a group lie on the shard of their group"))
        }
        shard => Ok(shard),
    }
}

/// A field that is given again has its last value.
fn put_meta(args: &Args, policy: &mut Policy) -> Result<()> {
    for pair in args.each("META") {
        let [field, value] = pair else { return Err(syntax_error()) };
        check_key(field, "META field")?;
        match policy.meta.iter_mut().find(|(known, _)| known == field) {
            Some((_, known)) => *known = value.clone(),
            None => policy.meta.push((field.clone(), value.clone())),
        }
        // Looked at here, so that the search above stays short whatever a client sends.
        if policy.meta.len() > META_FIELDS_MAX {
            return Err(Error::new(Code::TooBig, format!("META has more than {META_FIELDS_MAX} fields")));
        }
    }
    let bytes = policy.meta.iter().map(|(field, value)| field.len() + value.len()).sum::<usize>();
    match bytes {
        0..=META_BYTES_MAX => Ok(()),
        _ => Err(Error::new(Code::TooBig, format!("META has {bytes} bytes, the limit is {META_BYTES_MAX}"))),
    }
}

/// The options of one job, which may have a key.
fn keyed_policy(args: &Args, default: &Policy) -> Result<Policy> {
    let mut policy = policy(args, default)?;
    if let Some(id) = args.value("ID") {
        policy.id = Some(parse_chosen_id(id)?);
    }
    if let [key, ms] = args.words("UNIQUE") {
        if policy.id.is_some() {
            return Err(Error::bad("UNIQUE does not go with ID: each of them decides the shard"));
        }
        check_key(key, "UNIQUE key")?;
        let ms = integer_between(ms, "UNIQUE ms", 0, TIME_MAX as i64)?;
        policy.unique = Some((key.clone(), ms.unsigned_abs()));
    }
    if policy.group.is_some() && (policy.id.is_some() || policy.unique.is_some()) {
        return Err(Error::bad("GROUP does not go with ID or UNIQUE: each of them decides the shard"));
    }
    Ok(policy)
}

fn start(args: &Args) -> Result<Start> {
    Ok(match (args.number("DELAY")?, args.number("AT")?) {
        (Some(0), _) => Start::Now,
        (Some(delay), _) => Start::Delay(delay),
        (None, Some(at)) => Start::At(at),
        (None, None) => Start::Now,
    })
}

fn dequeue(args: &Args, context: &Context) -> Result<Plan> {
    let limits = &context.limits;
    let names = args.words("queue");
    if names.len() > DEQUEUE_QUEUES_MAX {
        return Err(Error::bad(format!("too many queues: at most {DEQUEUE_QUEUES_MAX} in one request")));
    }
    let mut queues = Vec::with_capacity(names.len());
    for name in names {
        let queue = Name::parse(name)?;
        if !queues.contains(&queue) {
            queues.push(queue);
        }
    }
    let mut plan = Dequeue {
        queues,
        count: None,
        block_ms: None,
        lease_ms: limits.lease_ms,
        worker: Bytes::new(),
        shards: Vec::new(),
        bind: None,
    };
    if args.has_options() {
        plan.count = args.number_up_to("COUNT", limits.batch_jobs_max as u64)?.map(|count| count as usize);
        plan.block_ms = args.number("BLOCK")?;
        plan.lease_ms = args.number_up_to("LEASE", limits.lease_ms_max)?.unwrap_or(limits.lease_ms);
        if let Some(worker) = args.value("WORKER") {
            check_key(worker, "WORKER name")?;
            plan.worker = worker.clone();
        }
        for name in args.words("SHARDS").iter().skip(1) {
            let shard = shard_name(name)?;
            if !plan.shards.contains(&shard) {
                plan.shards.push(shard);
            }
        }
        let run_ms = args.number_up_to("MAXRUN", limits.lease_ms_max)?;
        if args.has("BIND") {
            let run_ms = run_ms.unwrap_or(limits.run_ms);
            plan.lease_ms = plan.lease_ms.min(run_ms);
            plan.bind = Some(run_ms);
        } else if run_ms.is_some() {
            return Err(Error::bad("MAXRUN is of bound jobs only: expected BIND with it"));
        }
    }
    Ok(Plan::Dequeue(plan))
}

fn ack(args: &Args, context: &Context) -> Result<Plan> {
    let queue = args.queue()?;
    let receipts = args.words("receipt");
    check_batch(receipts.len(), "the number of receipts", context)?;
    let mut leases = Vec::with_capacity(receipts.len());
    for receipt in receipts {
        let (lease, shard) = parse_receipt(receipt)?;
        leases.push((Box::from(shard), lease));
    }
    Ok(Plan::Ack { queue, leases, result: kept_text(args, "RESULT") })
}

/// An error, trace, result or progress text, cut to what is kept of it.
fn kept_text(args: &Args, name: &str) -> Bytes {
    let mut text = args.text(name);
    text.truncate(TEXT_BYTES_MAX);
    text
}

/// An op on the lease that a receipt names.
fn on_lease(args: &Args, action: impl FnOnce(Lease) -> Action, render: super::Render) -> Result<Plan> {
    let queue = args.queue()?;
    let (lease, shard) = parse_receipt(args.required("receipt")?)?;
    Ok(Plan::Op { route: Route::Shard(shard.into()), op: Op { queue, action: action(lease) }, render })
}

fn fail(args: &Args, _: &Context) -> Result<Plan> {
    let retry_in = args.number("RETRYIN")?;
    let dead = args.has("DEAD");
    if dead && retry_in.is_some() {
        return Err(Error::bad("RETRYIN does not go with DEAD"));
    }
    let (error, trace) = (kept_text(args, "ERROR"), kept_text(args, "TRACE"));
    on_lease(args, |lease| Action::Fail { lease, error, trace, retry_in, dead }, render_state)
}

fn release(args: &Args, _: &Context) -> Result<Plan> {
    let delay = args.number("DELAY")?.unwrap_or(0);
    on_lease(args, |lease| Action::Release { lease, delay }, render_state)
}

fn extend(args: &Args, context: &Context) -> Result<Plan> {
    let lease_ms: Millis = args.number_up_to("ms", context.limits.lease_ms_max)?.unwrap_or(context.limits.lease_ms);
    on_lease(args, |lease| Action::Extend { lease, lease_ms }, render_until)
}

fn progress(args: &Args, _: &Context) -> Result<Plan> {
    let percent = args.integer("percent")?.and_then(|percent| u8::try_from(percent).ok()).unwrap_or(0);
    let text = kept_text(args, "text");
    on_lease(args, |lease| Action::Progress { lease, percent, text }, render_done)
}

/// Where the job of this id is: on the shard that a generated id names, or on the home of a chosen one.
pub fn address(id: &[u8]) -> Result<JobAddress> {
    let (job, shard) = parse_id(id)?;
    let route = match (&job, shard) {
        (JobRef::Chosen(id), _) => Route::Key(id.clone()),
        (JobRef::Seq(_), shard) => Route::Shard(shard.unwrap_or_default().into()),
    };
    Ok(JobAddress { route, job })
}

/// An op on the job that the argument `id` names.
pub fn on_job(args: &Args, action: impl FnOnce(JobRef) -> Action, render: super::Render) -> Result<Plan> {
    let JobAddress { route, job } = address(args.required("id")?)?;
    Ok(Plan::Op { route, op: Op { queue: args.queue()?, action: action(job) }, render })
}

fn cancel(args: &Args, _: &Context) -> Result<Plan> {
    on_job(args, |job| Action::Cancel { job }, render_count)
}

fn show(args: &Args, _: &Context) -> Result<Plan> {
    on_job(args, |job| Action::Job { job }, render_job)
}

fn peek(args: &Args, _: &Context) -> Result<Plan> {
    page(args, args.state()?.unwrap_or(JobState::Ready), job_map)
}

/// The jobs of a state from `OFFSET` on, of all shards: each is asked for its first ones up to the page's end.
pub fn page(args: &Args, state: JobState, map: fn(&JobView, &Name, &str) -> Reply) -> Result<Plan> {
    let queue = args.queue()?;
    let offset = args.number("OFFSET")?.unwrap_or(0);
    let count = args.number("COUNT")?.unwrap_or(PAGE_JOBS.min(PAGE_JOBS_MAX as u64 - offset));
    if offset + count > PAGE_JOBS_MAX as u64 {
        return Err(Error::bad(format!("OFFSET and COUNT together reach {PAGE_JOBS_MAX} jobs at most")));
    }
    let op = Op { queue: queue.clone(), action: Action::Peek { state, offset: 0, count: offset + count } };
    let merge: Merge = Box::new(move |outcomes| {
        let mut pages = Vec::with_capacity(outcomes.len());
        for (shard, outcome) in outcomes {
            match outcome {
                Outcome::Jobs(jobs) => pages.push((shard, jobs)),
                _ => return unexpected(),
            }
        }
        let jobs = merge_pages(pages, state).skip(offset as usize).take(count as usize);
        Reply::Array(jobs.map(|(shard, job)| map(&job, &queue, &shard)).collect())
    });
    Ok(Plan::Each { op, merge })
}

fn len(args: &Args, _: &Context) -> Result<Plan> {
    let state = args.state()?.unwrap_or(JobState::Ready);
    let merge: Merge = if args.has("PERSHARD") { Box::new(per_shard) } else { Box::new(sum) };
    Ok(Plan::Each { op: Op { queue: args.queue()?, action: Action::Len { state } }, merge })
}

fn pause(args: &Args, _: &Context) -> Result<Plan> {
    set_paused(args, true)
}

fn resume(args: &Args, _: &Context) -> Result<Plan> {
    set_paused(args, false)
}

fn set_paused(args: &Args, paused: bool) -> Result<Plan> {
    let op = Op { queue: args.queue()?, action: Action::Pause { paused } };
    Ok(Plan::Each { op, merge: Box::new(|_| Reply::OK) })
}

fn purge(args: &Args, _: &Context) -> Result<Plan> {
    let state = args.state()?.unwrap_or(JobState::Ready);
    Ok(Plan::Drain { op: Op { queue: args.queue()?, action: Action::Purge { state } } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::plan;
    use crate::command::tests::{context, planned, refused, request};
    use crate::job::{KEY_BYTES_MAX, Spec as Job};

    fn enqueued(line: &str) -> Enqueue {
        match planned(line) {
            Plan::Enqueue(enqueue) => enqueue,
            _ => panic!("{line} is no enqueue"),
        }
    }

    fn op(line: &str) -> (Route, Action) {
        match planned(line) {
            Plan::Op { route, op, .. } => (route, op.action),
            _ => panic!("{line} is no op"),
        }
    }

    #[test]
    fn an_enqueue_without_options_shares_the_policy_that_the_configuration_sets() {
        let context = context();
        let Ok(Plan::Enqueue(first)) = plan(&request("goflow.enqueue main hello"), &context) else { panic!() };
        assert!(Arc::ptr_eq(&first.policy, &context.limits.policy));
        assert_eq!((first.queue.as_str(), &first.payloads[..]), ("main", &[Bytes::from("hello")][..]));
        assert!(!first.many && !first.nx && first.shard.is_none() && first.start == Start::Now);
    }

    #[test]
    fn a_group_has_a_bound_of_one_unless_it_says_otherwise_and_a_home_of_its_own() {
        let group = |line: &str| enqueued(line).policy.group.clone();
        assert_eq!(group("GOFLOW.ENQUEUE q p GROUP a"), Some(("a".into(), 1)));
        assert_eq!(group("GOFLOW.ENQUEUEMANY q 1 p CONCURRENCY 7 GROUP a"), Some(("a".into(), 7)));
        for excluded in ["ID x", "UNIQUE x 5", "SHARD s1"] {
            let told = refused(&format!("GOFLOW.ENQUEUE q p GROUP a {excluded}"));
            assert!(told.contains("does not go with"), "{told}");
        }
        assert!(refused("GOFLOW.ENQUEUEMANY q 1 p GROUP a SHARD s1").contains("SHARD does not go with GROUP"));
        assert!(refused("GOFLOW.ENQUEUE q p CONCURRENCY 2").contains("CONCURRENCY goes with GROUP only"));
        assert!(refused("GOFLOW.ENQUEUE q p GROUP a CONCURRENCY 0").contains("CONCURRENCY expects 1 to 1000"));
        assert!(refused(&format!("GOFLOW.ENQUEUE q p GROUP {}", "x".repeat(513))).contains("GROUP key has 513 bytes"));
    }

    #[test]
    fn every_option_of_an_enqueue_is_in_its_plan() {
        let enqueue = enqueued(
            "GOFLOW.ENQUEUE q p nx id a type t priority -7 at 1790000000000 attempts 3 backoff 10 backoffmax 99 ttl 5000 \
             meta k v META k2 v2 meta k v3",
        );
        let pair = |field: &'static str, value: &'static str| (Bytes::from(field), Bytes::from(value));
        let policy = Policy {
            kind: "t".into(),
            priority: -7,
            attempts: 3,
            backoff: 10,
            backoff_max: 99,
            ttl: 5000,
            id: Some("a".into()),
            unique: None,
            group: None,
            meta: vec![pair("k", "v3"), pair("k2", "v2")],
            homes_since: 0,
        };
        assert_eq!(*enqueue.policy, policy);
        assert_eq!((enqueue.start, enqueue.nx), (Start::At(1_790_000_000_000), true));
        assert_eq!(enqueued("GOFLOW.ENQUEUE q p UNIQUE k 0").policy.unique, Some(("k".into(), 0)));
        assert_eq!(enqueued("GOFLOW.ENQUEUE q p SHARD s1 DELAY 5").shard.as_deref(), Some("s1"));
        assert_eq!(enqueued("GOFLOW.ENQUEUE q p DELAY 5").start, Start::Delay(5));
    }

    #[test]
    fn many_jobs_are_as_many_as_the_count_says_whatever_they_hold() {
        let enqueue = enqueued("GOFLOW.ENQUEUEMANY q 3 TYPE PRIORITY x PRIORITY 4");
        assert_eq!(enqueue.payloads, [Bytes::from("TYPE"), Bytes::from("PRIORITY"), Bytes::from("x")]);
        assert!(enqueue.many && enqueue.policy.priority == 4);
        for (line, error) in [
            ("GOFLOW.ENQUEUEMANY q 3 a b", "ERR syntax error: the count says 3, but only 2 values follow"),
            ("GOFLOW.ENQUEUEMANY q 1 a b", "ERR syntax error"),
            ("GOFLOW.ENQUEUEMANY q 0 a", "ERR value is not an integer or out of range: count expects at least 1"),
            ("GOFLOW.ENQUEUEMANY q x a", "ERR value is not an integer or out of range: count expects at least 1"),
            ("GOFLOW.ENQUEUEMANY q 1 a ID b", "ERR syntax error"),
            ("GOFLOW.ENQUEUEMANY q 1 a UNIQUE b 1", "ERR syntax error"),
        ] {
            assert_eq!(refused(line), error, "{line}");
        }
        let many = format!("GOFLOW.ENQUEUEMANY q 10001{}", " x".repeat(10_001));
        assert_eq!(refused(&many), "ERR value is not an integer or out of range: count expects 1 to 10000");
    }

    #[test]
    fn what_an_enqueue_cannot_mean_is_refused() {
        for (options, error) in [
            ("DELAY 1 AT 2", "ERR syntax error"),
            ("AT 2 DELAY 1", "ERR syntax error"),
            ("ID a ID b", "ERR syntax error"),
            ("META a", "ERR syntax error"),
            ("BOGUS 1", "ERR syntax error"),
            ("ID a UNIQUE k 1", "ERR UNIQUE does not go with ID: each of them decides the shard"),
            ("ID a SHARD s", "ERR SHARD does not go with ID or UNIQUE, which have a shard of their own"),
            ("UNIQUE a 1 SHARD s", "ERR SHARD does not go with ID or UNIQUE, which have a shard of their own"),
            ("NX", "ERR NX goes with ID or UNIQUE only"),
            ("ID 2s~s1", "ERR invalid ID: it has the shape of a generated id, <base36>~<shard>"),
            ("PRIORITY 1001", "ERR value is not an integer or out of range: PRIORITY expects -1000 to 1000"),
            ("PRIORITY +1", "ERR value is not an integer or out of range: PRIORITY expects -1000 to 1000"),
            ("ATTEMPTS 0", "ERR value is not an integer or out of range: ATTEMPTS expects 1 to 4294967295"),
            ("DELAY -1", "ERR value is not an integer or out of range: DELAY expects 0 to 9999999999999"),
            ("AT 10000000000000", "ERR value is not an integer or out of range: AT expects 0 to 9999999999999"),
            ("TTL 1.5", "ERR value is not an integer or out of range: TTL expects 0 to 9999999999999"),
            ("UNIQUE k x", "ERR value is not an integer or out of range: UNIQUE ms expects 0 to 9999999999999"),
            ("SHARD a~b", "ERR invalid shard name: expected 1 to 48 bytes of A-Z a-z 0-9 . _ / -"),
        ] {
            assert_eq!(refused(&format!("GOFLOW.ENQUEUE q p {options}")), error, "{options}");
        }
        let invalid = "ERR invalid name: expected 1 to 128 bytes of A-Z a-z 0-9 . _ : / @ -";
        assert_eq!(refused("GOFLOW.ENQUEUE {q} p"), invalid);
        assert_eq!(refused("GOFLOW.ENQUEUE  p"), invalid);
    }

    #[test]
    fn a_value_may_be_as_long_as_its_limit_and_no_longer() {
        let long = |count: usize| "x".repeat(count);
        for (line, limit) in [
            (format!("GOFLOW.ENQUEUE q p TYPE {}", long(TYPE_BYTES_MAX)), TYPE_BYTES_MAX),
            (format!("GOFLOW.ENQUEUE q p ID {}", long(KEY_BYTES_MAX)), KEY_BYTES_MAX),
            (format!("GOFLOW.DEQUEUE q WORKER {}", long(KEY_BYTES_MAX)), KEY_BYTES_MAX),
            (format!("GOFLOW.ENQUEUE q p META k {}", long(META_BYTES_MAX - 1)), META_BYTES_MAX),
        ] {
            planned(&line);
            let error = refused(&format!("{line}x"));
            assert!(error.starts_with("TOOBIG ") && error.ends_with(&format!("the limit is {limit}")), "{error}");
        }
        let fields = |count: usize| (0..count).map(|at| format!(" META k{at} v")).collect::<String>();
        planned(&format!("GOFLOW.ENQUEUE q p{}", fields(META_FIELDS_MAX)));
        assert!(refused(&format!("GOFLOW.ENQUEUE q p{}", fields(META_FIELDS_MAX + 1))).starts_with("TOOBIG "));
        let mut small = context();
        small.limits = Arc::new(crate::command::Limits { payload_bytes_max: 5, ..Default::default() });
        assert!(plan(&request("GOFLOW.ENQUEUE q 12345"), &small).is_ok());
        let error = plan(&request("GOFLOW.ENQUEUE q 123456"), &small).err().expect("an error").to_string();
        assert_eq!(error, "TOOBIG payload has 6 bytes, the limit is 5");
        assert!(plan(&request("GOFLOW.ENQUEUEMANY q 2 12345 123456"), &small).is_err());
    }

    #[test]
    fn a_dequeue_says_where_how_many_and_how_long() {
        let Plan::Dequeue(dequeue) = planned("GOFLOW.DEQUEUE a b a COUNT 5 BLOCK 0 LEASE 1000 WORKER w SHARDS 2 s1 s2")
        else {
            panic!()
        };
        assert_eq!(dequeue.queues, [Name::parse(b"a").unwrap(), Name::parse(b"b").unwrap()]);
        assert_eq!((dequeue.count, dequeue.block_ms, dequeue.lease_ms), (Some(5), Some(0), 1000));
        assert_eq!((dequeue.worker, dequeue.shards), (Bytes::from("w"), vec!["s1".into(), "s2".into()]));
        let Plan::Dequeue(bound) = planned("GOFLOW.DEQUEUE q BIND") else { panic!() };
        assert_eq!((bound.bind, bound.lease_ms), (Some(3_600_000), 30_000));
        let Plan::Dequeue(bound) = planned("GOFLOW.DEQUEUE q MAXRUN 500 BIND") else { panic!() };
        assert_eq!((bound.bind, bound.lease_ms), (Some(500), 500));
        let Plan::Dequeue(plain) = planned("GOFLOW.DEQUEUE count") else { panic!() };
        assert_eq!(plain.bind, None);
        assert_eq!(plain.queues, [Name::parse(b"count").unwrap()]);
        assert_eq!((plain.count, plain.block_ms, plain.lease_ms), (None, None, 30_000));
        for options in [
            "COUNT 0",
            "COUNT 10001",
            "LEASE 0",
            "LEASE 86400001",
            "BLOCK -1",
            "BLOCK",
            "SHARDS 2 a",
            "SHARDS 0",
            "MAXRUN 500",
            "BIND MAXRUN 0",
        ] {
            refused(&format!("GOFLOW.DEQUEUE q {options}"));
        }
        let queues = |count: usize| (0..count).map(|at| format!(" q{at}")).collect::<String>();
        planned(&format!("GOFLOW.DEQUEUE{}", queues(DEQUEUE_QUEUES_MAX)));
        refused(&format!("GOFLOW.DEQUEUE{}", queues(DEQUEUE_QUEUES_MAX + 1)));
    }

    #[test]
    fn verdicts_go_to_the_shard_that_the_receipt_names() {
        let lease = Lease { seq: 100, token: 56 };
        let (route, action) = op("GOFLOW.FAIL q 2s.1k~s1 TRACE t ERROR e RETRYIN 7");
        let wanted = Action::Fail { lease, error: "e".into(), trace: "t".into(), retry_in: Some(7), dead: false };
        assert_eq!((route, action), (Route::Shard("s1".into()), wanted));
        assert_eq!(op("GOFLOW.RELEASE q 2s.1k~s1").1, Action::Release { lease, delay: 0 });
        assert_eq!(op("GOFLOW.EXTEND q 2s.1k~s1 500").1, Action::Extend { lease, lease_ms: 500 });
        let progress = Action::Progress { lease, percent: 100, text: "half".into() };
        assert_eq!(op("GOFLOW.PROGRESS q 2s.1k~s1 100 half").1, progress);
        let Plan::Ack { leases, result, .. } = planned("GOFLOW.ACK q 2s.1k~s1 2s.1k~s2 RESULT r") else { panic!() };
        assert_eq!(leases, [("s1".into(), lease), ("s2".into(), lease)]);
        assert_eq!(result, "r");
        assert_eq!(refused("GOFLOW.FAIL q 2s.1k~s1 DEAD RETRYIN 5"), "ERR RETRYIN does not go with DEAD");
        for line in [
            "GOFLOW.ACK q 2s~s1",
            "GOFLOW.ACK q x RESULT",
            "GOFLOW.EXTEND q 2s.1k~s1 86400001",
            "GOFLOW.PROGRESS q 2s.1k~s1 101",
        ] {
            refused(line);
        }
    }

    #[test]
    fn a_text_is_cut_to_what_is_kept_of_it() {
        let (_, action) = op(&format!("GOFLOW.FAIL q 2s.1k~s1 ERROR {}", "x".repeat(TEXT_BYTES_MAX + 1)));
        assert!(matches!(action, Action::Fail { error, .. } if error.len() == TEXT_BYTES_MAX));
    }

    #[test]
    fn a_job_is_looked_for_where_its_id_says() {
        assert_eq!(op("GOFLOW.CANCEL q 2s~s1"), (Route::Shard("s1".into()), Action::Cancel { job: JobRef::Seq(100) }));
        let chosen = JobRef::Chosen("mail-1".into());
        assert_eq!(op("GOFLOW.JOB q mail-1"), (Route::Key("mail-1".into()), Action::Job { job: chosen }));
    }

    pub fn view(seq: u64, priority: i16, at: u64, state: JobState) -> JobView {
        let policy = Arc::new(Policy { priority, ..Policy::default() });
        JobView {
            seq,
            spec: Job { policy, payload: Bytes::new() },
            state,
            enqueued_at: at,
            attempt: 1,
            lapses: 0,
            redrives: 0,
            due_at: None,
            lease_until: None,
            started_at: None,
            finished_at: Some(at),
            worker: Bytes::new(),
            error: Bytes::new(),
            trace: Bytes::new(),
            result: Bytes::new(),
            progress: None,
            progress_text: Bytes::new(),
        }
    }

    #[test]
    fn a_page_begins_at_its_offset_and_ends_at_its_count() {
        let Plan::Each { op, merge } = planned("GOFLOW.PEEK q OFFSET 1 COUNT 2") else { panic!() };
        assert_eq!(op.action, Action::Peek { state: JobState::Ready, offset: 0, count: 3 });
        let jobs = |seqs: [u64; 2]| Outcome::Jobs(seqs.map(|seq| view(seq, 0, seq, JobState::Ready)).to_vec());
        let reply = merge(vec![(Arc::from("a"), jobs([1, 3])), (Arc::from("b"), jobs([2, 4]))]);
        let Reply::Array(jobs) = reply else { panic!() };
        let ids = jobs.iter().map(|job| match job {
            Reply::Map(fields) => fields[0].1.clone(),
            _ => panic!(),
        });
        assert_eq!(ids.collect::<Vec<_>>(), [Reply::bulk("2~b"), Reply::bulk("3~a")]);
        planned("GOFLOW.PEEK q OFFSET 950");
        planned("GOFLOW.PEEK q OFFSET 900 COUNT 100 STATE dead");
        refused("GOFLOW.PEEK q OFFSET 901 COUNT 100");
    }
}
