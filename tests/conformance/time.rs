//! What falls due: delays, lapsed leases, time to live; and clocks that step back.

use goflow::job::{JobState, Policy};
use goflow::shard::{Action, Outcome, Rules, Start, TICK_JOBS_MAX};

use super::trial::*;
use super::{Keeper, cases};

async fn a_delayed_job_is_ready_at_its_time_and_not_before(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_at(Policy::default(), "work", Start::Delay(250)).await;
    let job = trial.job(seq).await;
    assert_eq!((job.state, job.due_at, job.enqueued_at), (JobState::Scheduled, Some(BEGIN + 250), BEGIN));
    assert_eq!((trial.len(JobState::Scheduled).await, trial.len(JobState::Ready).await), (1, 0));
    trial.advance(249);
    assert!(trial.lease(1).await.is_empty());
    trial.advance(1);
    assert_eq!(payloads(&trial.lease(1).await), ["work"]);
    assert_eq!(trial.job(seq).await.due_at, None);
}

async fn a_job_for_a_point_in_time_is_ready_at_that_point(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_at(Policy::default(), "work", Start::At(BEGIN + 5)).await;
    assert_eq!(trial.job(seq).await.due_at, Some(BEGIN + 5));
    trial.advance(5);
    assert_eq!(trial.lease(1).await.len(), 1);
}

async fn a_job_whose_time_has_come_is_ready_at_once(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    for start in [Start::Delay(0), Start::At(BEGIN), Start::At(1), Start::Now] {
        let seq = trial.enqueue_at(Policy::default(), "work", start).await;
        assert_eq!(trial.state(seq).await, JobState::Ready, "{start:?}");
    }
}

async fn due_jobs_join_the_end_of_the_line_in_the_order_of_their_times(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    for (payload, delay) in [("30", 30), ("10", 10), ("20", 20), ("10 again", 10)] {
        trial.enqueue_at(Policy::default(), payload, Start::Delay(delay)).await;
    }
    trial.advance(5);
    trial.enqueue("plain").await;
    trial.advance(50);
    trial.enqueue("after").await;
    assert_eq!(payloads(&trial.lease(9).await), ["plain", "10", "10 again", "20", "30", "after"]);
}

async fn a_due_job_has_its_priority(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_at(policy(|policy| policy.priority = 3), "urgent", Start::Delay(10)).await;
    trial.enqueue("plain").await;
    trial.advance(10);
    assert_eq!(payloads(&trial.lease(2).await), ["urgent", "plain"]);
}

async fn g16_a_delayed_job_is_delivered_once_however_often_the_shard_ticks(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_at(Policy::default(), "work", Start::Delay(10)).await;
    trial.advance(10);
    assert_eq!(
        trial.apply(vec![Action::Tick, Action::Tick, Action::Tick]).await,
        [Outcome::Done, Outcome::Done, Outcome::Done]
    );
    assert_eq!((trial.lease(5).await.len(), trial.len(JobState::Scheduled).await), (1, 0));
}

async fn g16_what_falls_due_at_once_is_moved_in_bounded_steps(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let payloads = vec!["x".into(); TICK_JOBS_MAX + 1];
    trial.one(Action::Enqueue { policy: Default::default(), payloads, start: Start::Delay(10) }).await;
    trial.advance(10);
    trial.tick().await;
    assert_eq!((trial.effect().ready, trial.effect().due_in), (TICK_JOBS_MAX as u64, Some(0)));
    trial.tick().await;
    assert_eq!((trial.effect().ready, trial.effect().due_in), (TICK_JOBS_MAX as u64 + 1, None));
}

async fn a_lapsed_lease_brings_the_job_back_with_backoff(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    trial.take().await;
    trial.advance(LEASE_MS - 1);
    trial.tick().await;
    assert_eq!(trial.state(seq).await, JobState::Leased);
    trial.advance(1);
    trial.tick().await;
    let job = trial.job(seq).await;
    assert_eq!((job.state, job.due_at), (JobState::Scheduled, Some(BEGIN + LEASE_MS + 1000)));
    assert_eq!((job.attempt, job.lapses, job.lease_until), (2, 1, None));
    assert_eq!(job.error, "lease lapsed (1 of 3)");
    assert_eq!(trial.stats().await.lapsed, 1);
}

async fn a_lapse_is_noticed_late_and_counts_from_then(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    trial.take().await;
    trial.advance(LEASE_MS + 777);
    assert!(trial.lease(1).await.is_empty());
    assert_eq!(trial.job(seq).await.due_at, Some(BEGIN + LEASE_MS + 1777));
}

async fn a_lapsed_job_without_backoff_still_waits_a_millisecond(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_attempts(9), "poison").await;
    trial.enqueue("other").await;
    trial.take().await;
    trial.advance(LEASE_MS);
    assert_eq!(payloads(&trial.lease(2).await), ["other"], "it is not at the head of the line again");
    assert_eq!(trial.job(seq).await.due_at, Some(trial.now + 1));
}

async fn a_job_that_lapses_too_often_is_dead_and_says_so(keeper: &Keeper) {
    let mut trial = keeper.open_with(Rules { lapses_max: 2, ..Rules::default() }).await;
    let seq = trial.enqueue_as(with_attempts(25), "poison").await;
    for (state, error) in [
        (JobState::Scheduled, "lease lapsed (1 of 2)"),
        (JobState::Dead, "lease lapsed 2 times: the worker crashed or hung"),
    ] {
        trial.take().await;
        trial.advance(LEASE_MS);
        trial.tick().await;
        let job = trial.job(seq).await;
        assert_eq!((job.state, &job.error[..]), (state, error.as_bytes()));
        trial.advance(1);
    }
    let stats = trial.stats().await;
    assert_eq!((stats.lapsed, stats.died, stats.dead, stats.failed), (2, 1, 1, 0));
}

async fn a_lapse_spends_an_attempt_and_the_last_one_makes_the_job_dead(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_attempts(2), "work").await;
    let lease = trial.take().await;
    trial.fail(lease).await;
    trial.take().await;
    trial.advance(LEASE_MS);
    trial.tick().await;
    let job = trial.job(seq).await;
    assert_eq!((job.state, job.lapses), (JobState::Dead, 1));
    assert_eq!(job.error, "lease lapsed 1 times: the worker crashed or hung");
}

async fn after_a_lapse_only_an_ack_is_taken(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    trial.advance(LEASE_MS);
    assert_eq!(trial.fail(lease).await, Outcome::LeaseLost);
    assert_eq!(trial.release(lease, 0).await, Outcome::LeaseLost);
    assert_eq!(trial.extend(lease, 1).await, Outcome::LeaseLost);
    assert_eq!((trial.state(seq).await, trial.ack(lease).await), (JobState::Scheduled, 1));
}

async fn lapses_start_again_after_a_redrive_only(keeper: &Keeper) {
    let mut trial = keeper.open_with(Rules { lapses_max: 2, ..Rules::default() }).await;
    let seq = trial.enqueue_as(with_attempts(25), "work").await;
    trial.take().await;
    trial.advance(LEASE_MS);
    trial.tick().await;
    trial.advance(1);
    let lease = trial.take().await;
    trial.fail(lease).await;
    trial.take().await;
    trial.advance(LEASE_MS);
    trial.tick().await;
    assert_eq!(trial.state(seq).await, JobState::Dead, "a failure between two lapses does not excuse them");
    assert_eq!(trial.retry(seq).await, 1);
    trial.take().await;
    trial.advance(LEASE_MS);
    trial.tick().await;
    assert_eq!(trial.job(seq).await.error, "lease lapsed (1 of 2)");
}

async fn a_job_expires_when_its_ttl_is_over(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let ready = trial.enqueue_as(with_ttl(100), "ready").await;
    let scheduled = trial.enqueue_at(with_ttl(100), "later", Start::Delay(1000)).await;
    trial.advance(99);
    trial.tick().await;
    assert_eq!((trial.state(ready).await, trial.state(scheduled).await), (JobState::Ready, JobState::Scheduled));
    trial.advance(1);
    assert!(trial.lease(2).await.is_empty());
    for seq in [ready, scheduled] {
        let job = trial.job(seq).await;
        assert_eq!((job.state, job.finished_at), (JobState::Expired, Some(BEGIN + 100)));
    }
    let stats = trial.stats().await;
    assert_eq!((stats.expired, stats.expired_kept, stats.ready, stats.scheduled), (2, 2, 0, 0));
}

async fn a_job_whose_delay_is_its_ttl_expires(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_at(with_ttl(100), "work", Start::Delay(100)).await;
    trial.advance(100);
    assert!(trial.lease(1).await.is_empty());
    assert_eq!(trial.state(seq).await, JobState::Expired);
}

async fn a_leased_job_does_not_expire(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_ttl(100), "work").await;
    let lease = trial.take().await;
    trial.advance(10_000);
    trial.tick().await;
    assert_eq!((trial.state(seq).await, trial.ack(lease).await), (JobState::Leased, 1));
}

async fn a_job_that_would_wait_again_after_its_ttl_is_expired_instead(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seqs = trial.enqueue_many(with_ttl(100), 3).await;
    let leases = trial.lease(3).await;
    trial.advance(200);
    assert_eq!(trial.fail(leases[0].lease).await, Outcome::State(JobState::Expired));
    assert_eq!(trial.release(leases[1].lease, 0).await, Outcome::State(JobState::Expired));
    trial.advance(LEASE_MS);
    trial.tick().await;
    for seq in seqs {
        assert_eq!(trial.state(seq).await, JobState::Expired);
    }
    assert_eq!(trial.stats().await.expired, 3);
}

async fn a_job_that_was_released_expires_at_its_old_time(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_ttl(100), "work").await;
    let lease = trial.take().await;
    trial.advance(50);
    trial.release(lease, 0).await;
    assert_eq!(trial.effect().due_in, Some(50));
    trial.advance(50);
    trial.tick().await;
    assert_eq!(trial.state(seq).await, JobState::Expired);
}

async fn a_dead_job_does_not_expire(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_ttl(100), "work").await;
    let lease = trial.take().await;
    trial.kill(lease).await;
    trial.advance(1_000_000_000);
    trial.tick().await;
    assert_eq!(trial.state(seq).await, JobState::Dead);
}

async fn a_clock_that_steps_back_loses_nothing_and_is_never_negative(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue("work").await;
    let lease = trial.take().await;
    trial.now -= 50_000;
    trial.tick().await;
    assert_eq!(trial.effect().due_in, Some(LEASE_MS + 50_000), "a lease may get longer");
    let seq = trial.enqueue("behind").await;
    assert_eq!(trial.fail(lease).await, Outcome::State(JobState::Scheduled));
    assert_eq!(trial.job(lease.seq).await.due_at, Some(trial.now + 1000));
    assert_eq!(payloads(&trial.lease(1).await), ["behind"]);
    trial.advance(50_000);
    trial.tick().await;
    assert_eq!(trial.state(seq).await, JobState::Scheduled, "its lease lapsed by the clock that stands now");
    assert_eq!(trial.lease(5).await.len(), 1);
}

cases![
    a_delayed_job_is_ready_at_its_time_and_not_before,
    a_job_for_a_point_in_time_is_ready_at_that_point,
    a_job_whose_time_has_come_is_ready_at_once,
    due_jobs_join_the_end_of_the_line_in_the_order_of_their_times,
    a_due_job_has_its_priority,
    g16_a_delayed_job_is_delivered_once_however_often_the_shard_ticks,
    g16_what_falls_due_at_once_is_moved_in_bounded_steps,
    a_lapsed_lease_brings_the_job_back_with_backoff,
    a_lapse_is_noticed_late_and_counts_from_then,
    a_lapsed_job_without_backoff_still_waits_a_millisecond,
    a_job_that_lapses_too_often_is_dead_and_says_so,
    a_lapse_spends_an_attempt_and_the_last_one_makes_the_job_dead,
    after_a_lapse_only_an_ack_is_taken,
    lapses_start_again_after_a_redrive_only,
    a_job_expires_when_its_ttl_is_over,
    a_job_whose_delay_is_its_ttl_expires,
    a_leased_job_does_not_expire,
    a_job_that_would_wait_again_after_its_ttl_is_expired_instead,
    a_job_that_was_released_expires_at_its_old_time,
    a_dead_job_does_not_expire,
    a_clock_that_steps_back_loses_nothing_and_is_never_negative,
];
