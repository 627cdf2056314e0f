//! `GOFLOW.DLQ`: the jobs of a queue that are dead, one dead letter queue per queue.
//!
//! Everything here is the same job seen in the state `dead`, so the ops are those of `job` and a few that name dead jobs.

use super::args::{Arg, Args, Kind};
use super::job::{COUNT, OFFSET, PAGE_ERRORS, address, job_map, on_job, page, sum, unexpected};
use super::{Context, Flag, Group, Plan, Spec};
use crate::error::{Code, Error, Result};
use crate::job::{JobState, JobView, Name};
use crate::resp::reply::Reply;
use crate::shard::{Action, Op, Outcome};

const QUEUE: Arg = Arg::new("queue", Kind::Queue);
const IDS: Arg = Arg::new("id", Kind::Id).many();
const ERRORS: &[Code] = &[Code::ShardDown, Code::Overloaded];

/// What every row here has in common.
const DEAD: Spec = Spec { group: Group::DeadLetters, errors: ERRORS, ..Spec::BASE };

pub static ROWS: &[Spec] = &[
    Spec {
        examples: "\
> GOFLOW.DLQ HELP
 1) \"GOFLOW.DLQ <subcommand> [<arg> [value] [opt] ...]. Subcommands are:\"
...",
        ..Spec::container("GOFLOW.DLQ", Group::DeadLetters, "0.1.0", "The dead letter queue of a queue.")
    },
    Spec {
        name: "GOFLOW.DLQ|LEN",
        summary: "Counts the dead jobs of a queue.",
        args: &[QUEUE],
        flags: &[Flag::ReadOnly, Flag::Fast],
        reply: "An integer, the sum over all shards.",
        examples: "\
> GOFLOW.DLQ LEN main
(integer) 0",
        plan: len,
        ..DEAD
    },
    Spec {
        name: "GOFLOW.DLQ|LIST",
        summary: "Shows the dead jobs of a queue, newest first.",
        args: &[QUEUE, OFFSET, COUNT],
        flags: &[Flag::ReadOnly],
        reply: "An array of job maps as `GOFLOW.JOB` has them, with `error`, `trace`, `worker` and, last, `failed_at`.",
        notes: "The default count is 100; `OFFSET` and `COUNT` together reach 1000 jobs. Jobs of more than 64 MiB together \
                answer `TOOBIG`; ask for fewer.",
        errors: PAGE_ERRORS,
        examples: "\
> GOFLOW.ENQUEUE main hello
\"<id>\"
> GOFLOW.DEQUEUE main
 1# \"id\" => \"<id>\"
 2# \"receipt\" => \"<receipt>\"
...
> GOFLOW.FAIL main <receipt> ERROR \"no such user\" DEAD
\"dead\"
> GOFLOW.DLQ LIST main COUNT 1
1)  1# \"id\" => \"<id>\"
...",
        plan: list,
        ..DEAD
    },
    Spec {
        name: "GOFLOW.DLQ|GET",
        summary: "Shows one dead job.",
        args: &[QUEUE, Arg::new("id", Kind::Id)],
        flags: &[Flag::ReadOnly, Flag::Fast],
        reply: "The map that `LIST` has for it, or null when no dead job has this id.",
        examples: "\
> GOFLOW.DLQ GET main no-such-job
(nil)",
        plan: get,
        ..DEAD
    },
    Spec {
        name: "GOFLOW.DLQ|RETRY",
        summary: "Puts dead jobs back into their queue.",
        args: &[QUEUE, IDS],
        flags: &[Flag::Write],
        reply: "An integer: how many were put back.",
        notes: "Their attempts start again at 0. A job whose `UNIQUE` key another job holds by now stays dead.",
        examples: "\
> GOFLOW.ENQUEUE main hello
\"<id>\"
> GOFLOW.DEQUEUE main
 1# \"id\" => \"<id>\"
 2# \"receipt\" => \"<receipt>\"
...
> GOFLOW.FAIL main <receipt> DEAD
\"dead\"
> GOFLOW.DLQ RETRY main <id>
(integer) 1
> GOFLOW.LEN main
(integer) 1",
        plan: retry,
        ..DEAD
    },
    Spec {
        name: "GOFLOW.DLQ|RETRYALL",
        summary: "Puts all dead jobs of a queue back.",
        args: &[QUEUE],
        flags: &[Flag::Write],
        reply: "An integer: how many were put back.",
        notes: "Only the jobs that were dead when the command began are put back, so it ends even when they die again \
                at once. It works in bounded steps that hold up nobody for long.",
        examples: "\
> GOFLOW.DLQ RETRYALL main
(integer) 0",
        plan: retry_all,
        ..DEAD
    },
    Spec {
        name: "GOFLOW.DLQ|DELETE",
        summary: "Removes dead jobs for good.",
        args: &[QUEUE, IDS],
        flags: &[Flag::Write],
        reply: "An integer: how many were removed.",
        examples: "\
> GOFLOW.DLQ DELETE main no-such-job
(integer) 0",
        plan: delete,
        ..DEAD
    },
    Spec {
        name: "GOFLOW.DLQ|PURGE",
        summary: "Removes all dead jobs of a queue for good.",
        args: &[QUEUE],
        flags: &[Flag::Write],
        reply: "An integer: how many were removed.",
        examples: "\
> GOFLOW.DLQ PURGE main
(integer) 0",
        plan: purge,
        ..DEAD
    },
];

fn len(args: &Args, _: &Context) -> Result<Plan> {
    let op = Op { queue: args.queue()?, action: Action::Len { state: JobState::Dead } };
    Ok(Plan::Each { op, merge: Box::new(sum) })
}

fn list(args: &Args, _: &Context) -> Result<Plan> {
    page(args, JobState::Dead, dead_map)
}

fn get(args: &Args, _: &Context) -> Result<Plan> {
    on_job(args, |job| Action::DeadGet { job }, render)
}

fn render(outcome: Outcome, queue: &Name, shard: &str) -> Reply {
    match outcome {
        Outcome::Job(job) => job.map_or(Reply::Null, |job| dead_map(&job, queue, shard)),
        _ => unexpected(),
    }
}

/// A job's map with the time of its death.
fn dead_map(job: &JobView, queue: &Name, shard: &str) -> Reply {
    let mut map = job_map(job, queue, shard);
    if let Reply::Map(fields) = &mut map {
        fields.push((Reply::text("failed_at"), job.finished_at.map_or(Reply::Null, Reply::count)));
    }
    map
}

fn retry(args: &Args, context: &Context) -> Result<Plan> {
    named(args, context, |jobs| Action::DeadRetry { jobs })
}

fn delete(args: &Args, context: &Context) -> Result<Plan> {
    named(args, context, |jobs| Action::DeadDelete { jobs })
}

fn named(args: &Args, context: &Context, action: fn(Vec<crate::job::JobRef>) -> Action) -> Result<Plan> {
    let (ids, limit) = (args.words("id"), context.limits.batch_jobs_max);
    if ids.len() > limit {
        return Err(Error::bad(format!("too many ids: at most {limit} in one request")));
    }
    let jobs = ids.iter().map(|id| address(id)).collect::<Result<Vec<_>>>()?;
    Ok(Plan::Jobs { queue: args.queue()?, jobs, action })
}

fn retry_all(args: &Args, _: &Context) -> Result<Plan> {
    Ok(Plan::Drain { op: Op { queue: args.queue()?, action: Action::DeadRetryAll { until: None } } })
}

fn purge(args: &Args, _: &Context) -> Result<Plan> {
    Ok(Plan::Drain { op: Op { queue: args.queue()?, action: Action::Purge { state: JobState::Dead } } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Route;
    use crate::command::tests::{planned, refused};
    use crate::job::JobRef;

    #[test]
    fn dead_jobs_are_named_by_generated_and_chosen_ids_alike() {
        let Plan::Jobs { jobs, action, .. } = planned("GOFLOW.DLQ RETRY q 2s~s1 mine") else { panic!() };
        let routes: Vec<_> = jobs.iter().map(|job| job.route.clone()).collect();
        assert_eq!(routes, [Route::Shard("s1".into()), Route::Key("mine".into())]);
        let jobs = vec![JobRef::Seq(100)];
        assert_eq!(action(jobs.clone()), Action::DeadRetry { jobs: jobs.clone() });
        let Plan::Jobs { action, .. } = planned("goflow.dlq delete q a") else { panic!() };
        assert_eq!(action(jobs.clone()), Action::DeadDelete { jobs });
        refused(&format!("GOFLOW.DLQ RETRY q{}", " a".repeat(10_001)));
    }

    #[test]
    fn bulk_orders_go_on_until_nothing_is_left() {
        let Plan::Drain { op } = planned("GOFLOW.DLQ RETRYALL q") else { panic!() };
        assert_eq!(op.action, Action::DeadRetryAll { until: None });
        let Plan::Drain { op } = planned("GOFLOW.DLQ PURGE q") else { panic!() };
        assert_eq!(op.action, Action::Purge { state: JobState::Dead });
    }

    #[test]
    fn a_list_is_a_page_of_the_dead() {
        let Plan::Each { op, .. } = planned("GOFLOW.DLQ LIST q COUNT 3 OFFSET 2") else { panic!() };
        assert_eq!(op.action, Action::Peek { state: JobState::Dead, offset: 0, count: 5 });
        let Plan::Each { op, merge } = planned("GOFLOW.DLQ LEN q") else { panic!() };
        assert_eq!(op.action, Action::Len { state: JobState::Dead });
        assert_eq!(merge(vec![("a".into(), Outcome::Count(4)), ("b".into(), Outcome::Count(1))]), Reply::Integer(5));
    }
}
