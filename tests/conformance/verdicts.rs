//! Ack, fail, release, extend, progress: who may, how often, and what becomes of the job.

use bytes::Bytes;

use goflow::job::{JobRef, JobState, Lease, Policy};
use goflow::shard::{Action, Outcome};

use super::trial::*;
use super::{Keeper, cases};

async fn an_ack_completes_the_job_and_keeps_its_result(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    trial.advance(40);
    assert_eq!(trial.count(Action::Ack { leases: vec![lease], result: "done\0".into() }).await, 1);
    let job = trial.job(seq).await;
    assert_eq!((job.state, &job.result[..], job.finished_at), (JobState::Completed, &b"done\0"[..], Some(BEGIN + 40)));
    assert_eq!((job.lease_until, job.started_at, job.attempt), (None, Some(BEGIN), 1));
}

async fn an_ack_counts_the_jobs_that_these_receipts_completed(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(Policy::default(), 3).await;
    let mut leases: Vec<Lease> = trial.lease(3).await.iter().map(|delivery| delivery.lease).collect();
    assert_eq!(trial.ack(leases[1]).await, 1);
    leases.push(Lease { seq: leases[0].seq, token: 1 });
    leases.push(Lease { seq: 999_999, token: 1 });
    assert_eq!(trial.count(Action::Ack { leases, result: Bytes::new() }).await, 3);
    assert_eq!(trial.len(JobState::Completed).await, 3);
}

async fn an_ack_sent_twice_is_answered_alike_and_counted_once(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue("work").await;
    let lease = trial.take().await;
    assert_eq!((trial.ack(lease).await, trial.ack(lease).await), (1, 1));
    trial.advance(60_000);
    assert_eq!(trial.ack(lease).await, 1, "also much later");
    assert_eq!(trial.stats().await.completed, 1);
}

async fn an_ack_counts_late_while_nobody_else_has_the_job(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    trial.advance(LEASE_MS);
    trial.tick().await;
    assert_eq!(trial.state(seq).await, JobState::Scheduled);
    assert_eq!(trial.ack(lease).await, 1, "while it waits for its retry");
    assert_eq!(trial.state(seq).await, JobState::Completed);
    let other = trial.enqueue_as(policy(|policy| policy.backoff = 0), "other").await;
    let lease = trial.take().await;
    trial.advance(LEASE_MS);
    trial.tick().await;
    trial.advance(1);
    trial.tick().await;
    assert_eq!(trial.state(other).await, JobState::Ready);
    assert_eq!(trial.ack(lease).await, 1, "while it is ready again");
    assert!(trial.lease(1).await.is_empty());
    assert_eq!(trial.len(JobState::Completed).await, 2);
}

async fn an_ack_counts_for_a_job_that_a_lapse_made_dead(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_attempts(1), "work").await;
    let lease = trial.take().await;
    trial.advance(LEASE_MS);
    trial.tick().await;
    assert_eq!(trial.state(seq).await, JobState::Dead);
    assert_eq!(trial.ack(lease).await, 1);
    assert_eq!((trial.state(seq).await, trial.len(JobState::Dead).await), (JobState::Completed, 0));
}

async fn an_ack_does_not_count_for_a_job_that_a_fail_made_dead(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    trial.kill(lease).await;
    assert_eq!((trial.ack(lease).await, trial.state(seq).await), (0, JobState::Dead));
}

async fn a_receipt_is_good_for_one_lease_only(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let old = trial.take().await;
    trial.release(old, 0).await;
    let new = trial.take().await;
    assert_eq!(trial.ack(old).await, 0);
    assert_eq!(trial.fail(old).await, Outcome::LeaseLost);
    assert_eq!(trial.release(old, 0).await, Outcome::LeaseLost, "not even the verdict that it gave before");
    assert_eq!(trial.extend(old, 1_000_000).await, Outcome::LeaseLost);
    assert_eq!(trial.one(Action::Progress { lease: old, percent: 9, text: "old".into() }).await, Outcome::LeaseLost);
    let job = trial.job(seq).await;
    assert_eq!((job.state, job.lease_until, job.progress), (JobState::Leased, Some(BEGIN + LEASE_MS), None));
    assert_eq!(trial.ack(new).await, 1);
    assert_eq!((trial.ack(old).await, trial.fail(old).await), (0, Outcome::LeaseLost), "nor when it is over");
}

async fn a_guessed_token_holds_nothing(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    for token in [0, 1, 1500] {
        assert_eq!(trial.fail(Lease { seq, token }).await, Outcome::LeaseLost, "it was never leased");
    }
    trial.take().await;
    assert_eq!(trial.ack(Lease { seq, token: 2 }).await, 0);
    assert_eq!(trial.release(Lease { seq, token: 2 }, 0).await, Outcome::LeaseLost);
}

async fn a_job_that_is_not_known_is_told_from_a_lost_lease(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let nobody = Lease { seq: 77, token: 1 };
    assert_eq!(trial.ack(nobody).await, 0);
    assert_eq!(trial.fail(nobody).await, Outcome::NoSuchJob);
    assert_eq!(trial.release(nobody, 0).await, Outcome::NoSuchJob);
    assert_eq!(trial.extend(nobody, 1).await, Outcome::NoSuchJob);
    assert_eq!(trial.one(Action::Progress { lease: nobody, percent: 1, text: Bytes::new() }).await, Outcome::NoSuchJob);
}

async fn g4_a_failed_job_waits_for_its_backoff(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    assert_eq!(trial.fail(lease).await, Outcome::State(JobState::Scheduled));
    let job = trial.job(seq).await;
    assert_eq!((job.state, job.due_at, job.attempt), (JobState::Scheduled, Some(BEGIN + 1000), 2));
    assert_eq!((&job.error[..], &job.trace[..]), (&b"boom"[..], &b"at line 1"[..]));
    assert_eq!(trial.effect().load, 1);
    trial.advance(999);
    assert!(trial.lease(1).await.is_empty());
    trial.advance(1);
    assert_eq!(trial.lease(1).await[0].attempt, 2);
}

async fn the_nth_retry_waits_twice_as_long_up_to_the_maximum(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(policy(|policy| (policy.backoff, policy.backoff_max) = (100, 500)), "work").await;
    for wait in [100, 200, 400, 500, 500] {
        let lease = trial.take().await;
        trial.fail(lease).await;
        assert_eq!(trial.job(seq).await.due_at, Some(trial.now + wait));
        trial.advance(wait);
    }
}

async fn the_jitter_of_a_retry_comes_from_the_token(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    for (token, wait) in [(3_000, 900), (3_999, 1099), (3_750, 1050)] {
        trial.enqueue("work").await;
        let lease = Action::Lease { tokens: vec![token], lease_ms: LEASE_MS, worker: Bytes::new() };
        let Outcome::Leased(deliveries) = trial.one(lease).await else { panic!("not leased") };
        trial.fail(deliveries[0].lease).await;
        assert_eq!(trial.job(deliveries[0].lease.seq).await.due_at, Some(BEGIN + wait), "token {token}");
    }
}

async fn a_retry_time_in_the_verdict_replaces_the_backoff(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    assert_eq!(trial.one(fail_in(lease, 77)).await, Outcome::State(JobState::Scheduled));
    assert_eq!(trial.job(seq).await.due_at, Some(BEGIN + 77));
    trial.advance(77);
    let lease = trial.take().await;
    assert_eq!(trial.one(fail_in(lease, 0)).await, Outcome::State(JobState::Ready));
    assert_eq!(trial.lease(1).await[0].attempt, 3);
}

async fn without_backoff_a_failed_job_is_ready_at_once(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_as(with_attempts(5), "work").await;
    let lease = trial.take().await;
    assert_eq!(trial.fail(lease).await, Outcome::State(JobState::Ready));
    assert_eq!(trial.take().await.seq, lease.seq);
}

async fn g2_a_job_out_of_attempts_is_dead_and_not_gone(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_attempts(3), "work").await;
    for attempt in 1..=3 {
        let deliveries = trial.lease(1).await;
        assert_eq!(deliveries[0].attempt, attempt);
        let state = if attempt < 3 { JobState::Ready } else { JobState::Dead };
        assert_eq!(trial.fail(deliveries[0].lease).await, Outcome::State(state));
    }
    let job = trial.job(seq).await;
    assert_eq!((job.state, &job.error[..], job.finished_at), (JobState::Dead, &b"boom"[..], Some(BEGIN)));
    assert_eq!((trial.len(JobState::Dead).await, trial.lease(1).await.len()), (1, 0));
}

async fn g2_a_job_whose_enqueue_names_no_limit_is_not_dropped_on_its_first_failure(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    for _ in 0..24 {
        let lease = trial.take().await;
        assert_eq!(trial.one(fail_in(lease, 0)).await, Outcome::State(JobState::Ready));
    }
    let lease = trial.take().await;
    assert_eq!(trial.fail(lease).await, Outcome::State(JobState::Dead), "after 25 deliveries");
    assert_eq!(trial.state(seq).await, JobState::Dead);
}

async fn a_fatal_failure_ends_the_retries(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    trial.kill(lease).await;
    assert_eq!((trial.state(seq).await, trial.effect().load), (JobState::Dead, 0));
}

async fn a_fail_sent_twice_is_answered_alike_and_counted_once(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    assert_eq!(trial.fail(lease).await, trial.fail(lease).await);
    let (job, stats) = (trial.job(seq).await, trial.stats().await);
    assert_eq!((job.attempt, job.due_at, stats.failed), (2, Some(BEGIN + 1000), 1));
    trial.advance(1000);
    let lease = trial.take().await;
    trial.kill(lease).await;
    trial.kill(lease).await;
    assert_eq!((trial.stats().await.died, trial.len(JobState::Dead).await), (1, 1));
}

async fn after_a_fail_only_the_same_verdict_is_taken(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    trial.fail(lease).await;
    assert_eq!(trial.ack(lease).await, 0);
    assert_eq!(trial.release(lease, 0).await, Outcome::LeaseLost);
    assert_eq!(trial.extend(lease, 1).await, Outcome::LeaseLost);
    assert_eq!(trial.one(Action::Progress { lease, percent: 1, text: Bytes::new() }).await, Outcome::LeaseLost);
    assert_eq!(trial.state(seq).await, JobState::Scheduled);
}

async fn a_release_spends_nothing_and_keeps_the_place(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue("first").await;
    trial.enqueue("second").await;
    let lease = trial.take().await;
    assert_eq!(trial.release(lease, 0).await, Outcome::State(JobState::Ready));
    let deliveries = trial.lease(2).await;
    assert_eq!(payloads(&deliveries), ["first", "second"]);
    assert_eq!((deliveries[0].attempt, trial.stats().await.released), (1, 1));
}

async fn a_job_may_be_released_more_often_than_it_has_attempts(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_as(with_attempts(1), "work").await;
    for _ in 0..5 {
        let lease = trial.take().await;
        assert_eq!(trial.release(lease, 0).await, Outcome::State(JobState::Ready));
    }
}

async fn a_release_with_a_delay_waits_and_joins_the_end_of_the_line(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("first").await;
    let lease = trial.take().await;
    assert_eq!(trial.release(lease, 50).await, Outcome::State(JobState::Scheduled));
    assert_eq!(trial.job(seq).await.due_at, Some(BEGIN + 50));
    trial.enqueue("second").await;
    trial.advance(50);
    trial.tick().await;
    let deliveries = trial.lease(2).await;
    assert_eq!(payloads(&deliveries), ["second", "first"]);
    assert_eq!(deliveries[1].attempt, 1);
}

async fn a_release_sent_twice_is_answered_alike_and_counted_once(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue("work").await;
    let lease = trial.take().await;
    assert_eq!(trial.release(lease, 0).await, trial.release(lease, 0).await);
    assert_eq!((trial.stats().await.released, trial.len(JobState::Ready).await), (1, 1));
    assert_eq!((trial.ack(lease).await, trial.fail(lease).await), (0, Outcome::LeaseLost));
    assert_eq!(trial.extend(lease, 9).await, Outcome::LeaseLost);
}

async fn an_extended_lease_ends_when_it_says(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    trial.advance(20_000);
    assert_eq!(trial.extend(lease, 60_000).await, Outcome::Until(BEGIN + 80_000));
    assert_eq!(trial.job(seq).await.lease_until, Some(BEGIN + 80_000));
    assert_eq!(trial.effect().due_in, Some(60_000));
    trial.advance(59_999);
    trial.tick().await;
    assert_eq!(trial.state(seq).await, JobState::Leased);
    trial.advance(1);
    trial.tick().await;
    assert_eq!(trial.state(seq).await, JobState::Scheduled);
    assert_eq!(trial.extend(lease, 60_000).await, Outcome::LeaseLost, "a lapsed lease is not revived");
}

async fn a_lease_may_be_made_shorter(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    assert_eq!(trial.extend(lease, 10).await, Outcome::Until(BEGIN + 10));
    trial.advance(10);
    trial.tick().await;
    assert_eq!(trial.state(seq).await, JobState::Scheduled);
}

async fn progress_is_recorded_and_the_last_one_stands(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    for (percent, text) in [(0, "begun"), (100, "ended"), (40, "")] {
        assert_eq!(trial.one(Action::Progress { lease, percent, text: text.into() }).await, Outcome::Done);
        let job = trial.job(seq).await;
        assert_eq!((job.progress, &job.progress_text[..]), (Some(percent), text.as_bytes()));
    }
}

async fn g24_progress_and_other_changes_do_not_undo_each_other(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    let progress = |percent| Action::Progress { lease, percent, text: "half".into() };
    let outcomes = trial.apply(vec![progress(10), Action::Extend { lease, lease_ms: 99_000 }, progress(50)]).await;
    assert_eq!(outcomes, [Outcome::Done, Outcome::Until(BEGIN + 99_000), Outcome::Done]);
    let job = trial.job(seq).await;
    assert_eq!((job.state, job.progress, job.lease_until), (JobState::Leased, Some(50), Some(BEGIN + 99_000)));
    let ack = Action::Ack { leases: vec![lease], result: "r".into() };
    assert_eq!(trial.apply(vec![ack, progress(60)]).await, [Outcome::Count(1), Outcome::LeaseLost]);
    let job = trial.job(seq).await;
    assert_eq!((job.state, &job.result[..], job.progress), (JobState::Completed, &b"r"[..], Some(50)));
}

async fn a_cancelled_job_is_over_whatever_it_was(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let ready = trial.enqueue("ready").await;
    assert_eq!(trial.cancel(ready).await, 1);
    let leased = trial.enqueue("leased").await;
    let lease = trial.take().await;
    assert_eq!(trial.cancel(leased).await, 1);
    let scheduled = trial.enqueue_at(Policy::default(), "later", goflow::shard::Start::Delay(9)).await;
    assert_eq!(trial.cancel(scheduled).await, 1);
    let dead = trial.enqueue("dead").await;
    let last = trial.take().await;
    trial.kill(last).await;
    assert_eq!(trial.cancel(dead).await, 1);
    for seq in [ready, leased, scheduled, dead] {
        let job = trial.job(seq).await;
        assert_eq!((job.state, job.finished_at), (JobState::Cancelled, Some(BEGIN)));
        assert_eq!(trial.cancel(seq).await, 0, "it was already over");
    }
    assert_eq!((trial.ack(lease).await, trial.fail(lease).await), (0, Outcome::LeaseLost));
    let stats = trial.stats().await;
    assert_eq!((stats.cancelled, stats.cancelled_kept, stats.dead), (4, 4, 0));
    assert_eq!((stats.ready, stats.scheduled, stats.leased), (0, 0, 0));
}

async fn what_is_over_or_unknown_cannot_be_cancelled(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    trial.ack(lease).await;
    assert_eq!((trial.cancel(seq).await, trial.cancel(12_345).await), (0, 0));
    assert_eq!(trial.count(Action::Cancel { job: chosen("nobody") }).await, 0);
    assert_eq!(trial.state(seq).await, JobState::Completed);
}

async fn a_receipt_of_a_purged_job_is_unknown(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue("work").await;
    let lease = trial.take().await;
    assert_eq!(trial.purge(JobState::Leased).await, 1);
    assert_eq!((trial.ack(lease).await, trial.fail(lease).await), (0, Outcome::NoSuchJob));
    assert_eq!(trial.find(JobRef::Seq(lease.seq)).await, None);
}

cases![
    an_ack_completes_the_job_and_keeps_its_result,
    an_ack_counts_the_jobs_that_these_receipts_completed,
    an_ack_sent_twice_is_answered_alike_and_counted_once,
    an_ack_counts_late_while_nobody_else_has_the_job,
    an_ack_counts_for_a_job_that_a_lapse_made_dead,
    an_ack_does_not_count_for_a_job_that_a_fail_made_dead,
    a_receipt_is_good_for_one_lease_only,
    a_guessed_token_holds_nothing,
    a_job_that_is_not_known_is_told_from_a_lost_lease,
    g4_a_failed_job_waits_for_its_backoff,
    the_nth_retry_waits_twice_as_long_up_to_the_maximum,
    the_jitter_of_a_retry_comes_from_the_token,
    a_retry_time_in_the_verdict_replaces_the_backoff,
    without_backoff_a_failed_job_is_ready_at_once,
    g2_a_job_out_of_attempts_is_dead_and_not_gone,
    g2_a_job_whose_enqueue_names_no_limit_is_not_dropped_on_its_first_failure,
    a_fatal_failure_ends_the_retries,
    a_fail_sent_twice_is_answered_alike_and_counted_once,
    after_a_fail_only_the_same_verdict_is_taken,
    a_release_spends_nothing_and_keeps_the_place,
    a_job_may_be_released_more_often_than_it_has_attempts,
    a_release_with_a_delay_waits_and_joins_the_end_of_the_line,
    a_release_sent_twice_is_answered_alike_and_counted_once,
    an_extended_lease_ends_when_it_says,
    a_lease_may_be_made_shorter,
    progress_is_recorded_and_the_last_one_stands,
    g24_progress_and_other_changes_do_not_undo_each_other,
    a_cancelled_job_is_over_whatever_it_was,
    what_is_over_or_unknown_cannot_be_cancelled,
    a_receipt_of_a_purged_job_is_unknown,
];
