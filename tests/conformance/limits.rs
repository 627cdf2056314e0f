//! Limits: what a shard's share lets be leased, started and added, and the ledger that it keeps for others.

use bytes::Bytes;
use std::sync::Arc;

use goflow::job::{JobState, Policy};
use goflow::shard::{Action, LimitDeed, LimitView, Outcome, QueueLimits, Rate, Start};

use super::trial::*;
use super::{Keeper, cases};

async fn deed(trial: &mut Trial, deed: LimitDeed) -> LimitView {
    match trial.one(Action::Limit(deed)).await {
        Outcome::Limits(view) => *view,
        other => panic!("expected limits, got {other:?}"),
    }
}

async fn share(trial: &mut Trial, version: u64, limits: QueueLimits) -> LimitView {
    deed(trial, LimitDeed::Share { version, limits }).await
}

fn concurrency(jobs: u64) -> QueueLimits {
    QueueLimits { concurrency: Some(jobs), ..QueueLimits::default() }
}

fn rate(jobs: u64, per_ms: u64) -> QueueLimits {
    QueueLimits { rate: Some(Rate { jobs, per_ms }), ..QueueLimits::default() }
}

fn waiting(jobs: u64) -> QueueLimits {
    QueueLimits { waiting: Some(jobs), ..QueueLimits::default() }
}

async fn no_more_are_leased_than_the_share_says(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(Policy::default(), 6).await;
    share(&mut trial, 1, concurrency(2)).await;
    assert_eq!(trial.effect().ready, 2);
    let leases: Vec<_> = trial.lease(5).await.iter().map(|delivery| delivery.lease).collect();
    assert_eq!((leases.len(), trial.effect().ready), (2, 0));
    assert!(trial.lease(5).await.is_empty());
    trial.ack(leases[0]).await;
    assert_eq!(trial.effect().ready, 1);
    assert_eq!(trial.release(leases[1], 0).await, Outcome::State(JobState::Ready));
    assert_eq!((trial.effect().ready, trial.lease(5).await.len()), (2, 2));
    share(&mut trial, 1, QueueLimits::default()).await;
    assert_eq!(trial.lease(5).await.len(), 3, "a limit that is lifted is gone");
}

async fn a_share_below_what_is_leased_ends_nothing(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(Policy::default(), 4).await;
    let leases: Vec<_> = trial.lease(3).await.iter().map(|delivery| delivery.lease).collect();
    let view = share(&mut trial, 1, concurrency(1)).await;
    assert_eq!((view.leased, view.ready), (3, 1));
    for lease in &leases[..2] {
        assert_eq!(trial.ack(*lease).await, 1);
        assert!(trial.lease(1).await.is_empty());
    }
    assert_eq!(trial.ack(leases[2]).await, 1);
    assert_eq!(trial.lease(1).await.len(), 1);
}

async fn no_window_has_more_starts_than_the_rate(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(Policy::default(), 500).await;
    share(&mut trial, 1, rate(20, 1_000)).await;
    let mut starts = Vec::new();
    for step in 0..400 {
        let found = trial.lease(1 + step % 7).await.len();
        starts.extend(std::iter::repeat_n(trial.now, found));
        if found == 0 && trial.effect().ready == 0 {
            let opens_in = trial.effect().due_in.expect("it says when the next may start");
            assert!((1..=1_002).contains(&opens_in), "{opens_in}");
        }
        trial.advance(step as u64 % 13);
    }
    let window = |from: u64| starts.iter().filter(|at| (from..from + 1_000).contains(*at)).count();
    assert_eq!(starts.iter().map(|at| window(*at)).max(), Some(20));
    let span = trial.now - BEGIN;
    assert!(starts.len() as u64 >= 20 * (span / 1_002), "{} in {span} ms", starts.len());
}

async fn a_rate_counts_starts_whatever_becomes_of_them(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(Policy::default(), 4).await;
    share(&mut trial, 1, rate(2, 600)).await;
    let leases: Vec<_> = trial.lease(4).await.iter().map(|delivery| delivery.lease).collect();
    trial.ack(leases[0]).await;
    trial.release(leases[1], 0).await;
    assert!(trial.lease(4).await.is_empty());
    assert_eq!(deed(&mut trial, LimitDeed::Look).await.started, 2);
    trial.advance(602);
    assert_eq!(trial.effect().due_in.map(|ms| ms > 0), Some(true));
    assert_eq!(trial.lease(4).await.len(), 2);
}

async fn a_queue_that_is_full_refuses_new_jobs_whole(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    share(&mut trial, 1, waiting(3)).await;
    trial.enqueue("one").await;
    let enqueue = |count: usize, start| {
        let payloads = (0..count).map(|n| Bytes::from(n.to_string())).collect();
        Action::Enqueue { policy: Arc::default(), payloads, start }
    };
    let actions = vec![
        enqueue(3, Start::Now),
        enqueue(1, Start::Now),
        enqueue(2, Start::Delay(50)),
        enqueue(1, Start::Delay(50)),
        enqueue(1, Start::Now),
    ];
    let outcomes = trial.apply(actions.clone()).await;
    let full = |outcome: &Outcome| matches!(outcome, Outcome::Full(_));
    assert_eq!(outcomes.iter().map(full).collect::<Vec<_>>(), [true, false, true, false, true], "{outcomes:?}");
    let Outcome::Full(op) = &outcomes[0] else { panic!() };
    assert_eq!((&op.queue, &op.action), (&trial.queue, &actions[0]), "what is refused is handed back");
    let lease = trial.take().await;
    assert_eq!(trial.one(enqueue(1, Start::Now)).await, Outcome::Enqueued(vec![goflow::shard::Placed::Added(4)]));
    // Who comes back always finds a place.
    trial.release(lease, 0).await;
    assert_eq!(deed(&mut trial, LimitDeed::Look).await.waiting, 4);
}

async fn a_job_that_is_there_already_is_found_in_a_full_queue(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_id("a"), "x").await;
    share(&mut trial, 1, waiting(1)).await;
    let held = goflow::shard::Placed::Held { seq, chosen: Some("a".into()) };
    assert_eq!(trial.place(with_id("a"), "y", Start::Now).await, held);
    let policy = Arc::new(with_id("b"));
    let outcome = trial.one(Action::Enqueue { policy, payloads: vec!["y".into()], start: Start::Now }).await;
    assert!(matches!(outcome, Outcome::Full(_)));
}

async fn a_share_of_an_older_version_is_not_taken(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    share(&mut trial, 5, concurrency(5)).await;
    let view = share(&mut trial, 4, concurrency(9)).await;
    assert_eq!((view.version, view.limits), (5, concurrency(5)));
    assert_eq!(share(&mut trial, 5, concurrency(6)).await.limits, concurrency(6));
}

async fn the_ledger_is_replaced_by_one_at_a_time(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    assert!(!trial.stats().await.keeps_limits);
    let view = deed(&mut trial, LimitDeed::Note { was: 0, ledger: "a\0b".into() }).await;
    assert_eq!((view.ledger_version, &view.ledger[..]), (1, &b"a\0b"[..]));
    let view = deed(&mut trial, LimitDeed::Note { was: 0, ledger: "c".into() }).await;
    assert_eq!((view.ledger_version, &view.ledger[..]), (1, &b"a\0b"[..]));
    assert!(trial.stats().await.keeps_limits);
    assert_eq!(deed(&mut trial, LimitDeed::Note { was: 1, ledger: Bytes::new() }).await.ledger_version, 2);
    assert!(!trial.stats().await.keeps_limits);
}

async fn limits_outlive_a_reopening(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(Policy::default(), 9).await;
    let limits = QueueLimits { concurrency: Some(5), waiting: Some(9), ..rate(3, 4_000) };
    share(&mut trial, 2, limits).await;
    deed(&mut trial, LimitDeed::Note { was: 0, ledger: "ledger".into() }).await;
    assert_eq!(trial.lease(2).await.len(), 2);
    let before = deed(&mut trial, LimitDeed::Look).await;
    if keeper.forgets() {
        return;
    }
    trial.shard = Arc::new(goflow::shard::memory::Memory::new(Default::default()));
    trial.shard = keeper.open_shard(Default::default()).await;
    assert_eq!(deed(&mut trial, LimitDeed::Look).await, before);
    assert_eq!(trial.lease(9).await.len(), 1);
}

cases!(
    no_more_are_leased_than_the_share_says,
    a_share_below_what_is_leased_ends_nothing,
    no_window_has_more_starts_than_the_rate,
    a_rate_counts_starts_whatever_becomes_of_them,
    a_queue_that_is_full_refuses_new_jobs_whole,
    a_job_that_is_there_already_is_found_in_a_full_queue,
    a_share_of_an_older_version_is_not_taken,
    the_ledger_is_replaced_by_one_at_a_time,
    limits_outlive_a_reopening,
);
