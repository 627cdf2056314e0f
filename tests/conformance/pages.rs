//! Looking without touching: pages of jobs, counts, statistics.

use goflow::job::{JobState, Policy};
use goflow::shard::{Action, BULK_JOBS_MAX, PAGE_JOBS_MAX, Start, Stats};

use super::trial::*;
use super::{Keeper, cases};

async fn ready_jobs_are_shown_in_the_order_of_delivery(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    for priority in [0, 7, -7, 7] {
        trial.enqueue_as(policy(|policy| policy.priority = priority), "work").await;
    }
    let shown = trial.seqs(JobState::Ready).await;
    let leased: Vec<u64> = trial.lease(9).await.iter().map(|delivery| delivery.lease.seq).collect();
    assert_eq!((shown.len(), shown), (4, leased));
}

async fn scheduled_jobs_are_shown_by_due_time(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let mut seqs = Vec::new();
    for delay in [30, 10, 20] {
        seqs.push(trial.enqueue_at(Policy::default(), "work", Start::Delay(delay)).await);
    }
    assert_eq!(trial.seqs(JobState::Scheduled).await, [seqs[1], seqs[2], seqs[0]]);
}

async fn leased_jobs_are_shown_by_the_end_of_their_lease(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seqs = trial.enqueue_many(Policy::default(), 3).await;
    for lease_ms in [300, 100, 200] {
        trial.lease_for(1, lease_ms).await;
    }
    assert_eq!(trial.seqs(JobState::Leased).await, [seqs[1], seqs[2], seqs[0]]);
}

async fn jobs_that_are_over_are_shown_newest_first(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seqs = trial.enqueue_many(Policy::default(), 6).await;
    for (place, delivery) in trial.lease(6).await.iter().enumerate() {
        trial.advance(1);
        match place % 2 {
            0 => trial.ack(delivery.lease).await,
            _ => trial.cancel(delivery.lease.seq).await,
        };
    }
    assert_eq!(trial.seqs(JobState::Completed).await, [seqs[4], seqs[2], seqs[0]]);
    assert_eq!(trial.seqs(JobState::Cancelled).await, [seqs[5], seqs[3], seqs[1]]);
    let page: Vec<u64> = trial.peek(JobState::Completed, 1, 1).await.iter().map(|job| job.seq).collect();
    assert_eq!(page, [seqs[2]]);
}

async fn a_page_begins_at_its_offset_and_ends_at_its_count(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seqs = trial.enqueue_many(Policy::default(), 10).await;
    let page = |jobs: Vec<goflow::job::JobView>| jobs.iter().map(|job| job.seq).collect::<Vec<_>>();
    assert_eq!(page(trial.peek(JobState::Ready, 0, 3).await), seqs[..3]);
    assert_eq!(page(trial.peek(JobState::Ready, 8, 3).await), seqs[8..]);
    assert!(trial.peek(JobState::Ready, 10, 3).await.is_empty());
    assert!(trial.peek(JobState::Ready, u64::MAX, u64::MAX).await.is_empty());
    assert!(trial.peek(JobState::Ready, 0, 0).await.is_empty());
}

async fn a_page_is_bounded_whatever_it_asks(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(Policy::default(), PAGE_JOBS_MAX + 1).await;
    assert_eq!(trial.peek(JobState::Ready, 0, u64::MAX).await.len(), PAGE_JOBS_MAX);
}

async fn looking_changes_nothing(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let before = trial.job(seq).await;
    trial.peek(JobState::Ready, 0, 10).await;
    trial.len(JobState::Ready).await;
    trial.stats().await;
    assert_eq!(trial.job(seq).await, before);
}

async fn statistics_count_what_happened_and_what_is(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(policy(|policy| policy.backoff = 0), 6).await;
    trial.enqueue_at(Policy::default(), "later", Start::Delay(1_000_000)).await;
    let leases: Vec<_> = trial.lease(5).await.iter().map(|delivery| delivery.lease).collect();
    trial.ack(leases[0]).await;
    trial.fail(leases[1]).await;
    trial.release(leases[2], 0).await;
    trial.kill(leases[3]).await;
    trial.cancel(leases[4].seq).await;
    trial.advance(3);
    let expected = Stats {
        ready: 3,
        scheduled: 1,
        dead: 1,
        completed_kept: 1,
        cancelled_kept: 1,
        enqueued: 7,
        delivered: 5,
        completed: 1,
        failed: 2,
        released: 1,
        died: 1,
        cancelled: 1,
        oldest_ready_at: Some(BEGIN),
        now: BEGIN + 3,
        ..Stats::default()
    };
    assert_eq!(trial.stats().await, expected);
}

async fn the_oldest_ready_time_is_that_of_the_job_that_waits_longest(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    assert_eq!(trial.stats().await.oldest_ready_at, None);
    let delayed = trial.enqueue_at(Policy::default(), "delayed", Start::Delay(50)).await;
    let passed_over = trial.enqueue_as(policy(|policy| policy.priority = -1), "passed over").await;
    trial.advance(10);
    trial.enqueue_as(policy(|policy| policy.priority = 1), "urgent").await;
    trial.enqueue("usual").await;
    assert_eq!(trial.stats().await.oldest_ready_at, Some(BEGIN));
    trial.cancel(passed_over).await;
    assert_eq!(trial.stats().await.oldest_ready_at, Some(BEGIN + 10));
    // A job waits since it may start, not since it was enqueued.
    trial.advance(50);
    let (urgent, usual) = (trial.take().await, trial.take().await);
    assert_eq!(trial.stats().await.oldest_ready_at, Some(BEGIN + 60));
    assert_eq!(trial.take().await.seq, delayed);
    assert_eq!(trial.stats().await.oldest_ready_at, None);
    trial.advance(5);
    trial.enqueue("behind").await;
    assert_eq!(trial.stats().await.oldest_ready_at, Some(BEGIN + 65));
    // One that is given back has waited all the while.
    trial.release(usual, 0).await;
    assert_eq!(trial.stats().await.oldest_ready_at, Some(BEGIN + 10));
    trial.cancel(usual.seq).await;
    trial.release(urgent, 0).await;
    assert_eq!(trial.stats().await.oldest_ready_at, Some(BEGIN + 10));
}

async fn a_purge_removes_the_jobs_of_one_state_and_all_trace(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(Policy::default(), 3).await;
    trial.enqueue_at(Policy::default(), "later", Start::Delay(5)).await;
    let lease = trial.take().await;
    assert_eq!(trial.purge(JobState::Ready).await, 2);
    assert_eq!(trial.purge(JobState::Ready).await, 0);
    assert_eq!(trial.purge(JobState::Scheduled).await, 1);
    assert_eq!((trial.len(JobState::Leased).await, trial.ack(lease).await), (1, 1));
    assert_eq!(trial.purge(JobState::Completed).await, 1);
    let stats = trial.stats().await;
    assert_eq!((stats.ready, stats.scheduled, stats.leased, stats.completed_kept), (0, 0, 0, 0));
    assert_eq!((stats.enqueued, stats.completed), (4, 1), "what happened is still counted");
    assert_eq!((trial.effect().load, trial.effect().due_in), (0, None));
}

async fn a_purge_goes_in_bounded_steps_oldest_first(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seqs = trial.enqueue_many(Policy::default(), BULK_JOBS_MAX + 2).await;
    let (count, next) = trial.moved(Action::Purge { state: JobState::Ready }).await;
    assert_eq!((count, next.is_some()), (BULK_JOBS_MAX as u64, true));
    assert_eq!(trial.seqs(JobState::Ready).await, seqs[BULK_JOBS_MAX..]);
    let (count, next) = trial.moved(Action::Purge { state: JobState::Ready }).await;
    assert_eq!((count, next), (2, None));
}

cases![
    ready_jobs_are_shown_in_the_order_of_delivery,
    scheduled_jobs_are_shown_by_due_time,
    leased_jobs_are_shown_by_the_end_of_their_lease,
    jobs_that_are_over_are_shown_newest_first,
    a_page_begins_at_its_offset_and_ends_at_its_count,
    a_page_is_bounded_whatever_it_asks,
    looking_changes_nothing,
    statistics_count_what_happened_and_what_is,
    the_oldest_ready_time_is_that_of_the_job_that_waits_longest,
    a_purge_removes_the_jobs_of_one_state_and_all_trace,
    a_purge_goes_in_bounded_steps_oldest_first,
];
