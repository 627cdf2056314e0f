//! How the outcomes of the commands under "Jobs" become replies, those of several shards merged into one.
//!
//! Owns the shape of a delivered job ([`put_delivery`]) and of a job that is looked at ([`job_map`]).

use bytes::{Bytes, BytesMut};
use std::cmp::Reverse;
use std::sync::Arc;

use crate::error::Error;
use crate::job::{Delivery, JobState, JobView, KEY_BYTES_MAX, Name, Policy, format_id, format_receipt};
use crate::resp::reply::{Protocol, Reply, put_bulk, put_i64, put_map_header};
use crate::shard::Outcome;

/// Takes from the heads of the pages, so that each shard's order is kept, the job that comes first in its state.
pub fn merge_pages(pages: Vec<(Arc<str>, Vec<JobView>)>, state: JobState) -> impl Iterator<Item = (Arc<str>, JobView)> {
    let rank = move |job: &JobView| match state {
        JobState::Ready => (i64::from(-job.spec.policy.priority), Reverse(0), job.enqueued_at),
        JobState::Scheduled => (0, Reverse(0), job.due_at.unwrap_or(0)),
        JobState::Leased => (0, Reverse(0), job.lease_until.unwrap_or(0)),
        _ => (0, Reverse(job.finished_at.unwrap_or(0)), 0),
    };
    let mut pages: Vec<_> = pages.into_iter().map(|(shard, jobs)| (shard, jobs.into_iter().peekable())).collect();
    std::iter::from_fn(move || {
        let heads = pages.iter_mut().enumerate();
        let (_, first) = heads.filter_map(|(at, (_, jobs))| jobs.peek().map(|job| (rank(job), at))).min()?;
        let (shard, jobs) = &mut pages[first];
        jobs.next().map(|job| (shard.clone(), job))
    })
}

/// The counts of all shards together.
pub fn sum(outcomes: Vec<(Arc<str>, Outcome)>) -> Reply {
    let mut total = 0;
    for (_, outcome) in outcomes {
        let Outcome::Count(count) = outcome else { return unexpected() };
        total += count;
    }
    Reply::count(total)
}

pub fn per_shard(outcomes: Vec<(Arc<str>, Outcome)>) -> Reply {
    let pairs = outcomes.into_iter().map(|(shard, outcome)| (Reply::bulk(&*shard), render(outcome)));
    Reply::Map(pairs.collect())
}

/// What a shard answers to another question than it was asked; not the client's fault.
pub fn unexpected() -> Reply {
    Error::bad("the shard gave an unexpected answer").into()
}

/// An outcome that needs no name to be a reply.
fn render(outcome: Outcome) -> Reply {
    match outcome {
        Outcome::Count(number) | Outcome::Until(number) => Reply::count(number),
        Outcome::State(state) => Reply::text(state.word()),
        Outcome::Done => Reply::OK,
        _ => unexpected(),
    }
}

pub fn render_count(outcome: Outcome, _: &Name, _: &str) -> Reply {
    render(outcome)
}

pub fn render_state(outcome: Outcome, _: &Name, _: &str) -> Reply {
    render(outcome)
}

pub fn render_until(outcome: Outcome, _: &Name, _: &str) -> Reply {
    render(outcome)
}

pub fn render_done(outcome: Outcome, _: &Name, _: &str) -> Reply {
    render(outcome)
}

pub fn render_job(outcome: Outcome, queue: &Name, shard: &str) -> Reply {
    match outcome {
        Outcome::Job(job) => job.map_or(Reply::Null, |job| job_map(&job, queue, shard)),
        _ => unexpected(),
    }
}

/// The id of a job as its clients know it.
fn id_text(policy: &Policy, seq: u64, shard: &str) -> Bytes {
    policy.id.clone().unwrap_or_else(|| {
        let mut id = BytesMut::with_capacity(16 + shard.len());
        format_id(&mut id, seq, shard);
        id.freeze()
    })
}

/// Everything that a shard knows of a job.
pub fn job_map(job: &JobView, queue: &Name, shard: &str) -> Reply {
    let policy = &*job.spec.policy;
    let or_null = |bytes: &Bytes| if bytes.is_empty() { Reply::Null } else { Reply::Bulk(bytes.clone()) };
    let number = |number: Option<u64>| number.map_or(Reply::Null, Reply::count);
    let (unique, unique_ms) = policy
        .unique
        .as_ref()
        .map_or((Reply::Null, Reply::Null), |(key, ms)| (Reply::Bulk(key.clone()), Reply::count(*ms)));
    let (group, concurrency) = policy
        .group
        .as_ref()
        .map_or((Reply::Null, Reply::Null), |(key, bound)| (Reply::Bulk(key.clone()), Reply::count(u64::from(*bound))));
    let meta = policy.meta.iter().map(|(field, value)| (Reply::Bulk(field.clone()), Reply::Bulk(value.clone())));
    let fields = vec![
        ("id", Reply::Bulk(id_text(policy, job.seq, shard))),
        ("queue", Reply::bulk(queue.as_str())),
        ("shard", Reply::bulk(shard)),
        ("state", Reply::text(job.state.word())),
        ("payload", Reply::Bulk(job.spec.payload.clone())),
        ("type", Reply::Bulk(policy.kind.clone())),
        ("priority", Reply::Integer(i64::from(policy.priority))),
        ("attempt", Reply::count(u64::from(job.attempt))),
        ("attempts", Reply::count(u64::from(policy.attempts))),
        ("lapses", Reply::count(u64::from(job.lapses))),
        ("redrives", Reply::count(u64::from(job.redrives))),
        ("backoff", Reply::count(policy.backoff)),
        ("backoff_max", Reply::count(policy.backoff_max)),
        ("ttl", Reply::count(policy.ttl)),
        ("unique", unique),
        ("unique_ms", unique_ms),
        ("group", group),
        ("concurrency", concurrency),
        ("enqueued_at", Reply::count(job.enqueued_at)),
        ("due_at", number(job.due_at)),
        ("started_at", number(job.started_at)),
        ("lease_until", number(job.lease_until)),
        ("finished_at", number(job.finished_at)),
        ("worker", or_null(&job.worker)),
        ("error", or_null(&job.error)),
        ("trace", or_null(&job.trace)),
        ("result", or_null(&job.result)),
        ("progress", number(job.progress.map(u64::from))),
        ("progress_text", or_null(&job.progress_text)),
        ("meta", Reply::Map(meta.collect())),
    ];
    Reply::Map(fields.into_iter().map(|(name, value)| (Reply::text(name), value)).collect())
}

/// Appends a delivered job. The order of its fields is promised: on RESP2 the receipt is element 3 and the payload 5.
pub fn put_delivery(out: &mut BytesMut, delivery: &Delivery, queue: &Name, shard: &str, protocol: Protocol) {
    let Delivery { lease, spec, attempt, enqueued_at, lease_until } = delivery;
    let policy = &*spec.policy;
    let meta: usize = policy.meta.iter().map(|(field, value)| field.len() + value.len() + 32).sum();
    out.reserve(spec.payload.len() + policy.kind.len() + meta + KEY_BYTES_MAX);
    let mut text = [0u8; 96];
    put_map_header(out, 12, protocol);
    out.extend_from_slice(b"$2\r\nid\r\n");
    match &policy.id {
        Some(id) => put_bulk(out, id),
        None => put_bulk(out, written(&mut text, |out| format_id(out, lease.seq, shard))),
    }
    out.extend_from_slice(b"$7\r\nreceipt\r\n");
    put_bulk(out, written(&mut text, |out| format_receipt(out, *lease, shard)));
    out.extend_from_slice(b"$7\r\npayload\r\n");
    put_bulk(out, &spec.payload);
    put_number(out, b"$7\r\nattempt\r\n", i64::from(*attempt));
    out.extend_from_slice(b"$5\r\nqueue\r\n");
    put_bulk(out, queue.as_str().as_bytes());
    out.extend_from_slice(b"$4\r\ntype\r\n");
    put_bulk(out, &policy.kind);
    put_number(out, b"$8\r\nattempts\r\n", i64::from(policy.attempts));
    put_number(out, b"$8\r\npriority\r\n", i64::from(policy.priority));
    put_number(out, b"$11\r\nenqueued_at\r\n", i64::try_from(*enqueued_at).unwrap_or(i64::MAX));
    put_number(out, b"$11\r\nlease_until\r\n", i64::try_from(*lease_until).unwrap_or(i64::MAX));
    out.extend_from_slice(b"$5\r\nshard\r\n");
    put_bulk(out, shard.as_bytes());
    out.extend_from_slice(b"$4\r\nmeta\r\n");
    put_map_header(out, policy.meta.len(), protocol);
    for (field, value) in &policy.meta {
        put_bulk(out, field);
        put_bulk(out, value);
    }
}

fn put_number(out: &mut BytesMut, field: &[u8], number: i64) {
    out.extend_from_slice(field);
    out.extend_from_slice(b":");
    put_i64(out, number);
    out.extend_from_slice(b"\r\n");
}

/// What `write` puts into the buffer: an id or receipt, whose longest is 12 + 1 + 12 + 1 + 48 bytes.
fn written(buffer: &mut [u8; 96], write: impl FnOnce(&mut &mut [u8])) -> &[u8] {
    let mut rest = &mut buffer[..];
    write(&mut rest);
    let used = 96 - rest.len();
    &buffer[..used]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Plan;
    use crate::command::job::tests::view;
    use crate::command::tests::{planned, refused};
    use crate::job::{Lease, Spec as Job};

    #[test]
    fn pages_of_several_shards_are_one_page_in_the_order_of_delivery() {
        let pages = |state| {
            let job = |seq, priority, at| view(seq, priority, at, state);
            vec![
                (Arc::from("a"), vec![job(1, 5, 30), job(2, 0, 10), job(3, 0, 40)]),
                (Arc::from("b"), vec![job(4, 0, 20), job(5, 0, 15)]),
            ]
        };
        let order = |state| merge_pages(pages(state), state).map(|(_, job)| job.seq).collect::<Vec<_>>();
        // Job 5 stays behind job 4: the order of a shard is its own.
        assert_eq!(order(JobState::Ready), [1, 2, 4, 5, 3]);
        assert_eq!(order(JobState::Dead), [1, 4, 5, 2, 3]);
    }

    #[test]
    fn counts_are_added_up_or_shown_for_each_shard() {
        let outcomes = || vec![(Arc::from("a"), Outcome::Count(2)), (Arc::from("b"), Outcome::Count(3))];
        let Plan::Each { merge, .. } = planned("GOFLOW.LEN q STATE LEASED") else { panic!() };
        assert_eq!(merge(outcomes()), Reply::Integer(5));
        let Plan::Each { merge, .. } = planned("GOFLOW.LEN q PERSHARD") else { panic!() };
        let pair = |name: &str, count| (Reply::bulk(name), Reply::Integer(count));
        assert_eq!(merge(outcomes()), Reply::Map(vec![pair("a", 2), pair("b", 3)]));
        assert!(refused("GOFLOW.LEN q STATE gone").starts_with("ERR unknown state: STATE expects one of ready,"));
    }

    #[test]
    fn a_delivered_job_has_its_fields_in_the_promised_order() {
        let meta = vec![("k".into(), "v".into())];
        let policy = Arc::new(Policy { kind: "mail".into(), priority: -3, meta, ..Policy::default() });
        let lease = Lease { seq: 100, token: 56 };
        let mut delivery = Delivery {
            lease,
            spec: Job { policy: policy.clone(), payload: "hi".into() },
            attempt: 2,
            enqueued_at: 17,
            lease_until: 18,
        };
        let queue = Name::parse(b"main").unwrap();
        let wire = |protocol, delivery: &Delivery| {
            let mut out = BytesMut::new();
            put_delivery(&mut out, delivery, &queue, "s1", protocol);
            String::from_utf8_lossy(&out).replace("\r\n", " ")
        };
        let fields = "$2 id $5 2s~s1 $7 receipt $8 2s.1k~s1 $7 payload $2 hi $7 attempt :2 $5 queue $4 main $4 type $4 mail \
                      $8 attempts :25 $8 priority :-3 $11 enqueued_at :17 $11 lease_until :18 $5 shard $2 s1 $4 meta ";
        assert_eq!(wire(Protocol::Resp3, &delivery), format!("%12 {fields}%1 $1 k $1 v "));
        assert_eq!(wire(Protocol::Resp2, &delivery), format!("*24 {fields}*2 $1 k $1 v "));
        delivery.spec.policy = Arc::new(Policy { id: Some("mine".into()), ..(*policy).clone() });
        assert!(wire(Protocol::Resp3, &delivery).starts_with("%12 $2 id $4 mine $7 receipt $8 2s.1k~s1 "));
        let longest = "x".repeat(48);
        delivery.lease = Lease { seq: crate::job::PLACE_MAX - 1, token: crate::job::TOKEN_MAX - 1 };
        put_delivery(&mut BytesMut::new(), &delivery, &queue, &longest, Protocol::Resp2);
    }
}
