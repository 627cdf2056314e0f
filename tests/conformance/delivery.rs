//! From enqueue to delivery: what is stored, in which order jobs leave, how they are leased.

use bytes::Bytes;
use std::collections::HashSet;
use std::sync::Arc;

use goflow::job::{JobRef, JobState, Policy};
use goflow::shard::{Action, Op, Outcome, Placed, Start};

use super::trial::*;
use super::{Keeper, cases};

async fn a_new_job_is_ready_and_shows_what_its_enqueue_said(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let policy = policy(|policy| {
        policy.kind = "mail".into();
        policy.priority = -7;
        policy.attempts = 3;
        policy.backoff = 10;
        policy.backoff_max = 20;
        policy.meta = vec![("tenant".into(), "a\0b".into()), ("tenant".into(), "".into())];
    });
    let seq = trial.enqueue_as(policy.clone(), "payload\r\n\0").await;
    let job = trial.job(seq).await;
    assert_eq!((job.seq, job.state, job.enqueued_at), (seq, JobState::Ready, BEGIN));
    assert_eq!((&*job.spec.policy, &job.spec.payload[..]), (&policy, &b"payload\r\n\0"[..]));
    assert_eq!((job.attempt, job.lapses, job.redrives), (1, 0, 0));
    assert_eq!((job.due_at, job.lease_until, job.started_at, job.finished_at), (None, None, None, None));
    assert_eq!((job.progress, job.worker, job.error, job.result), (None, "".into(), "".into(), "".into()));
}

async fn a_payload_of_every_byte_and_an_empty_one_are_delivered_as_they_are(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let every: Vec<u8> = (0..=255).collect();
    let payloads = vec![Bytes::from(every.clone()), Bytes::new()];
    trial.one(Action::Enqueue { policy: Arc::default(), payloads, start: Start::Now }).await;
    let deliveries = trial.lease(2).await;
    assert_eq!((&deliveries[0].spec.payload[..], &deliveries[1].spec.payload[..]), (&every[..], &b""[..]));
}

async fn jobs_of_one_priority_leave_first_in_first_out(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seqs = trial.enqueue_many(Policy::default(), 20).await;
    assert!(seqs.is_sorted_by(|a, b| a < b), "seqs grow: {seqs:?}");
    let leased: Vec<u64> = trial.lease(20).await.iter().map(|delivery| delivery.lease.seq).collect();
    assert_eq!(leased, seqs);
}

async fn a_higher_priority_leaves_first(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    for priority in [0, -1000, 5, 1000, -3, 5, 0] {
        trial.enqueue_as(policy(|policy| policy.priority = priority), &priority.to_string()).await;
    }
    assert_eq!(payloads(&trial.lease(10).await), ["1000", "5", "5", "0", "0", "-3", "-1000"]);
}

async fn g9_equal_priorities_are_first_in_first_out_whatever_they_hold(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    for payload in ["z", "a", "m", "{\"id\":9}", "{\"id\":1}", "b"] {
        trial.enqueue_as(policy(|policy| policy.priority = 9), payload).await;
    }
    assert_eq!(payloads(&trial.lease(10).await), ["z", "a", "m", "{\"id\":9}", "{\"id\":1}", "b"]);
}

async fn g9_a_priority_job_is_next_although_the_queue_was_asked_before(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    assert!(trial.lease(1).await.is_empty());
    trial.enqueue("plain").await;
    trial.enqueue_as(policy(|policy| policy.priority = 1), "urgent").await;
    assert_eq!(payloads(&trial.lease(2).await), ["urgent", "plain"]);
}

async fn a_lease_is_one_job_for_each_token_in_their_order(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seqs = trial.enqueue_many(Policy::default(), 5).await;
    let tokens = vec![1, 281_474_976_710_655, 7];
    let outcome = trial.one(Action::Lease { tokens: tokens.clone(), lease_ms: 5000, worker: "w1".into() }).await;
    let Outcome::Leased(deliveries) = outcome else { panic!("{outcome:?}") };
    for (place, delivery) in deliveries.iter().enumerate() {
        assert_eq!((delivery.lease.seq, delivery.lease.token), (seqs[place], tokens[place]));
        assert_eq!((delivery.attempt, delivery.enqueued_at, delivery.lease_until), (1, BEGIN, BEGIN + 5000));
        assert_eq!(delivery.spec.payload, place.to_string());
    }
    assert_eq!(deliveries.len(), 3);
    let job = trial.job(seqs[0]).await;
    assert_eq!((job.state, job.attempt, &job.worker[..]), (JobState::Leased, 1, &b"w1"[..]));
    assert_eq!((job.lease_until, job.started_at), (Some(BEGIN + 5000), Some(BEGIN)));
}

async fn fewer_ready_jobs_than_tokens_are_all_leased(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(Policy::default(), 2).await;
    assert_eq!(trial.lease(5).await.len(), 2);
    assert!(trial.lease(5).await.is_empty());
}

async fn a_queue_that_nobody_has_used_is_empty(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    assert!(trial.lease(3).await.is_empty());
    for state in JobState::ALL {
        assert_eq!((trial.len(state).await, trial.peek(state, 0, 10).await.len()), (0, 0), "{state:?}");
    }
    assert_eq!(trial.find(JobRef::Seq(1)).await, None);
    assert_eq!(trial.find(chosen("nobody")).await, None);
    assert_eq!(trial.stats().await.enqueued, 0);
}

async fn g1_a_delivered_job_stays_on_the_shard_until_its_verdict(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    assert!(trial.lease(1).await.is_empty(), "nobody else gets it");
    assert_eq!(trial.state(seq).await, JobState::Leased);
    assert_eq!((trial.len(JobState::Leased).await, trial.len(JobState::Ready).await), (1, 0));
    assert_eq!(trial.ack(lease).await, 1);
    assert_eq!(trial.state(seq).await, JobState::Completed);
}

async fn g1_the_job_of_a_crashed_worker_comes_back_by_itself(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_as(policy(|policy| policy.backoff = 0), "work").await;
    trial.take().await;
    trial.advance(LEASE_MS);
    trial.tick().await;
    trial.advance(1);
    assert_eq!(payloads(&trial.lease(1).await), ["work"]);
}

async fn g3_g8_a_job_that_no_worker_understands_is_kept(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(policy(|policy| policy.kind = "unheard-of".into()), "{not json").await;
    let lease = trial.take().await;
    assert_eq!(trial.release(lease, 0).await, Outcome::State(JobState::Ready));
    let job = trial.job(seq).await;
    assert_eq!((job.state, &job.spec.payload[..], job.attempt), (JobState::Ready, &b"{not json"[..], 1));
}

async fn g6_every_worker_s_failure_is_retried(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seqs = trial.enqueue_many(Policy::default(), 3).await;
    for delivery in trial.lease(3).await {
        assert_eq!(trial.fail(delivery.lease).await, Outcome::State(JobState::Scheduled));
    }
    trial.advance(1000);
    let again = trial.lease(3).await;
    assert_eq!(again.iter().map(|delivery| delivery.lease.seq).collect::<Vec<_>>(), seqs);
    assert!(again.iter().all(|delivery| delivery.attempt == 2));
}

async fn ops_of_one_batch_see_each_other(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let token = trial.token();
    let enqueue = |payload: &'static str| Action::Enqueue {
        policy: Arc::default(),
        payloads: vec![payload.into()],
        start: Start::Now,
    };
    let lease = Action::Lease { tokens: vec![token], lease_ms: LEASE_MS, worker: Bytes::new() };
    let outcomes = trial
        .apply(vec![
            enqueue("a"),
            enqueue("b"),
            lease,
            Action::Len { state: JobState::Ready },
            Action::Len { state: JobState::Leased },
        ])
        .await;
    let (Outcome::Enqueued(first), Outcome::Leased(deliveries)) = (&outcomes[0], &outcomes[2]) else {
        panic!("{outcomes:?}")
    };
    assert_eq!(first, &[Placed::Added(deliveries[0].lease.seq)]);
    assert_eq!((&outcomes[3], &outcomes[4]), (&Outcome::Count(1), &Outcome::Count(1)));
    let lease = deliveries[0].lease;
    let ack = || Action::Ack { leases: vec![lease], result: Bytes::new() };
    let outcomes = trial.apply(vec![ack(), ack(), fail(lease)]).await;
    assert_eq!(outcomes, [Outcome::Count(1), Outcome::Count(1), Outcome::LeaseLost]);
}

async fn outcomes_come_in_the_order_of_the_ops_whatever_their_queues(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let (one, two) = (name("one"), name("two"));
    let enqueue = |queue: &goflow::job::Name, count: usize| Op {
        queue: queue.clone(),
        action: Action::Enqueue { policy: Arc::default(), payloads: vec!["x".into(); count], start: Start::Now },
    };
    let len = |queue: &goflow::job::Name| Op { queue: queue.clone(), action: Action::Len { state: JobState::Ready } };
    let ops = vec![enqueue(&one, 1), len(&two), enqueue(&two, 2), len(&one), len(&two), enqueue(&one, 3), len(&one)];
    let outcomes = trial.apply_ops(ops).await;
    assert_eq!(outcomes[1], Outcome::Count(0));
    assert_eq!(
        (&outcomes[3], &outcomes[4], &outcomes[6]),
        (&Outcome::Count(1), &Outcome::Count(2), &Outcome::Count(4))
    );
    let mut touched: Vec<_> =
        trial.effects.iter().map(|effect| (effect.queue.as_str(), effect.ready, effect.load)).collect();
    touched.sort_unstable();
    assert_eq!(touched, [("one", 4, 4), ("two", 2, 2)]);
}

async fn a_paused_queue_accepts_and_does_not_deliver(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue("before").await;
    let held = trial.take().await;
    assert_eq!(trial.one(Action::Pause { paused: true }).await, Outcome::Done);
    trial.enqueue("during").await;
    assert_eq!((trial.effect().ready, trial.effect().load), (0, 2));
    assert!(trial.lease(1).await.is_empty());
    assert_eq!((trial.len(JobState::Ready).await, trial.stats().await.paused), (1, true));
    assert_eq!(trial.ack(held).await, 1, "a verdict is taken while the queue is paused");
    assert_eq!(trial.one(Action::Pause { paused: false }).await, Outcome::Done);
    assert_eq!(trial.effect().ready, 1);
    assert_eq!(payloads(&trial.lease(1).await), ["during"]);
    assert!(!trial.stats().await.paused);
}

async fn a_pause_stops_one_queue_only(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.one(Action::Pause { paused: true }).await;
    trial.queue = name("other");
    trial.enqueue("x").await;
    assert_eq!(trial.lease(1).await.len(), 1);
}

async fn queues_are_named_in_order_once_they_were_seen(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    for queue in ["b", "a/x:y@z.-_", "c"] {
        trial.queue = name(queue);
        trial.enqueue("x").await;
        let lease = trial.take().await;
        trial.ack(lease).await;
    }
    let names = trial.shard.queues().await.unwrap();
    assert_eq!(names.iter().map(|name| name.as_str()).collect::<Vec<_>>(), ["a/x:y@z.-_", "b", "c"]);
}

async fn an_effect_counts_what_is_ready_and_what_is_to_do(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(Policy::default(), 3).await;
    trial.enqueue_at(Policy::default(), "later", Start::Delay(500)).await;
    assert_eq!((trial.effect().ready, trial.effect().load, trial.effect().due_in), (3, 4, Some(500)));
    let lease = trial.take().await;
    assert_eq!((trial.effect().ready, trial.effect().load), (2, 4));
    trial.ack(lease).await;
    assert_eq!((trial.effect().ready, trial.effect().load), (2, 3));
}

async fn an_effect_says_when_the_next_thing_falls_due(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue("no time at all").await;
    assert_eq!(trial.effect().due_in, None);
    trial.enqueue_as(with_ttl(90_000), "ttl").await;
    assert_eq!(trial.effect().due_in, Some(90_000));
    trial.take().await;
    assert_eq!(trial.effect().due_in, Some(LEASE_MS));
    trial.advance(10_000);
    trial.enqueue_at(Policy::default(), "delay", Start::At(BEGIN + 15_000)).await;
    assert_eq!(trial.effect().due_in, Some(5_000));
}

async fn large_jobs_are_leased_in_parts_and_all_of_them(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let payload = "x".repeat(512 << 10);
    let mut seqs = HashSet::new();
    for number in 0..40 {
        // Some in front of the line.
        let policy = policy(|policy| policy.priority = (number % 4 == 0).into());
        seqs.insert(trial.enqueue_as(policy, &payload).await);
    }
    let (mut seen, mut parts, mut later) = (HashSet::new(), 0, 0);
    while seen.len() < seqs.len() {
        let tokens: Vec<u64> = (0..41).map(|_| trial.token()).collect();
        let lease = |tokens: &[u64]| Action::Lease { tokens: tokens.to_vec(), lease_ms: LEASE_MS, worker: "w".into() };
        let before = seen.len();
        for outcome in trial.apply(vec![lease(&tokens[..40]), lease(&tokens[40..])]).await {
            match outcome {
                Outcome::Leased(deliveries) => seen.extend(deliveries.iter().map(|delivery| delivery.lease.seq)),
                Outcome::Later(op) => {
                    later += 1;
                    assert_eq!(op.action, lease(&tokens[40..]), "what is to be asked again");
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(seen.len() > before, "each part has one job at least");
        assert_eq!(trial.effect().ready as usize, seqs.len() - seen.len());
        parts += 1;
    }
    assert_eq!(seen, seqs);
    assert!(parts > 2 && later > 0, "{parts} parts, {later} were told to ask again");
    // What falls due comes in parts, too, and says so.
    trial.advance(LEASE_MS);
    trial.tick().await;
    while trial.effect().due_in == Some(0) || trial.effect().due_in == Some(1) {
        trial.tick().await;
    }
    assert_eq!((trial.len(JobState::Leased).await, trial.len(JobState::Scheduled).await), (0, 40));
}

cases![
    large_jobs_are_leased_in_parts_and_all_of_them,
    a_new_job_is_ready_and_shows_what_its_enqueue_said,
    a_payload_of_every_byte_and_an_empty_one_are_delivered_as_they_are,
    jobs_of_one_priority_leave_first_in_first_out,
    a_higher_priority_leaves_first,
    g9_equal_priorities_are_first_in_first_out_whatever_they_hold,
    g9_a_priority_job_is_next_although_the_queue_was_asked_before,
    a_lease_is_one_job_for_each_token_in_their_order,
    fewer_ready_jobs_than_tokens_are_all_leased,
    a_queue_that_nobody_has_used_is_empty,
    g1_a_delivered_job_stays_on_the_shard_until_its_verdict,
    g1_the_job_of_a_crashed_worker_comes_back_by_itself,
    g3_g8_a_job_that_no_worker_understands_is_kept,
    g6_every_worker_s_failure_is_retried,
    ops_of_one_batch_see_each_other,
    outcomes_come_in_the_order_of_the_ops_whatever_their_queues,
    a_paused_queue_accepts_and_does_not_deliver,
    a_pause_stops_one_queue_only,
    queues_are_named_in_order_once_they_were_seen,
    an_effect_counts_what_is_ready_and_what_is_to_do,
    an_effect_says_when_the_next_thing_falls_due,
];
