//! The dead letter queue: what is in it, how it is put back and removed.

use goflow::job::{JobRef, JobState, Policy};
use goflow::shard::{Action, BULK_JOBS_MAX, Outcome};

use super::trial::*;
use super::{Keeper, cases};

/// Adds one job and makes it dead, a millisecond after the last.
async fn bury(trial: &mut Trial, payload: &str) -> u64 {
    let seq = trial.enqueue(payload).await;
    let lease = trial.take().await;
    trial.advance(1);
    trial.kill(lease).await;
    seq
}

async fn bury_many(trial: &mut Trial, count: usize) -> Vec<u64> {
    let seqs = trial.enqueue_many(Policy::default(), count).await;
    let kills = trial.lease(count).await.iter().map(|delivery| kill(delivery.lease)).collect();
    trial.apply(kills).await;
    seqs
}

async fn dead_get(trial: &mut Trial, job: JobRef) -> Option<u64> {
    match trial.one(Action::DeadGet { job }).await {
        Outcome::Job(found) => found.map(|view| view.seq),
        other => panic!("expected a job, got {other:?}"),
    }
}

async fn a_dead_job_shows_why_where_and_when_it_died(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_id("mine"), "work").await;
    let lease = trial.take().await;
    trial.advance(5);
    let (error, trace) = ("boom \0".into(), "a\nb".into());
    trial.one(Action::Fail { lease, error, trace, retry_in: None, dead: true }).await;
    let Outcome::Job(Some(job)) = trial.one(Action::DeadGet { job: chosen("mine") }).await else { panic!("not dead") };
    assert_eq!((job.seq, job.state, job.finished_at), (seq, JobState::Dead, Some(BEGIN + 5)));
    assert_eq!((&job.error[..], &job.trace[..], &job.worker[..]), (&b"boom \0"[..], &b"a\nb"[..], &b"worker"[..]));
    assert_eq!((&job.spec.payload[..], job.enqueued_at), (&b"work"[..], BEGIN));
}

async fn only_a_dead_job_is_got_from_the_dead(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let ready = trial.enqueue("ready").await;
    assert_eq!(dead_get(&mut trial, JobRef::Seq(ready)).await, None);
    assert_eq!(dead_get(&mut trial, JobRef::Seq(999)).await, None);
    assert_eq!(dead_get(&mut trial, chosen("nobody")).await, None);
    let lease = trial.take().await;
    trial.kill(lease).await;
    assert_eq!(dead_get(&mut trial, JobRef::Seq(ready)).await, Some(ready));
}

async fn the_dead_are_listed_newest_first(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let mut buried = Vec::new();
    for n in 0..5 {
        buried.push(bury(&mut trial, &n.to_string()).await);
    }
    buried.reverse();
    assert_eq!(trial.seqs(JobState::Dead).await, buried);
    let page: Vec<u64> = trial.peek(JobState::Dead, 1, 2).await.iter().map(|job| job.seq).collect();
    assert_eq!(page, buried[1..3]);
}

async fn g23_no_dead_job_makes_room_for_another(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let mut first = None;
    for _ in 0..3 {
        first = first.or(bury_many(&mut trial, 1000).await.first().copied());
    }
    assert_eq!(trial.len(JobState::Dead).await, 3000);
    assert_eq!(trial.state(first.unwrap()).await, JobState::Dead);
}

async fn a_redriven_job_starts_again_at_the_end_of_the_line(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = bury(&mut trial, "buried").await;
    trial.enqueue("waiting").await;
    assert_eq!(trial.retry(seq).await, 1);
    let job = trial.job(seq).await;
    assert_eq!((job.state, job.attempt, job.lapses, job.redrives), (JobState::Ready, 1, 0, 1));
    assert_eq!((job.finished_at, job.enqueued_at), (None, BEGIN));
    let deliveries = trial.lease(2).await;
    assert_eq!(payloads(&deliveries), ["waiting", "buried"]);
    assert_eq!(deliveries[1].attempt, 1);
    let stats = trial.stats().await;
    assert_eq!((stats.redriven, stats.dead, stats.died), (1, 0, 1));
}

async fn g23_a_redrive_that_is_sent_twice_puts_the_job_back_once(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = bury(&mut trial, "work").await;
    let retry = || Action::DeadRetry { jobs: vec![JobRef::Seq(seq)] };
    assert_eq!(trial.apply(vec![retry(), retry()]).await, [Outcome::Count(1), Outcome::Count(0)]);
    assert_eq!(trial.retry(seq).await, 0);
    assert_eq!((trial.lease(5).await.len(), trial.job(seq).await.redrives), (1, 1));
}

async fn a_redrive_counts_the_dead_among_the_jobs_it_names(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let (one, two) = (bury(&mut trial, "one").await, bury(&mut trial, "two").await);
    let alive = trial.enqueue("alive").await;
    let jobs = [two, 999, alive, one].map(JobRef::Seq).to_vec();
    assert_eq!(trial.count(Action::DeadRetry { jobs }).await, 2);
    assert_eq!(payloads(&trial.lease(5).await), ["alive", "two", "one"]);
}

async fn the_verdict_of_before_a_redrive_is_lost(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    trial.kill(lease).await;
    trial.retry(seq).await;
    assert_eq!((trial.ack(lease).await, trial.fail(lease).await), (0, Outcome::LeaseLost));
    assert_eq!(trial.state(seq).await, JobState::Ready);
}

async fn a_redriven_job_has_all_its_attempts(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_attempts(2), "work").await;
    for redrives in 1..=2 {
        for state in [JobState::Ready, JobState::Dead] {
            let lease = trial.take().await;
            assert_eq!(trial.fail(lease).await, Outcome::State(state));
        }
        trial.retry(seq).await;
        assert_eq!(trial.job(seq).await.redrives, redrives);
    }
}

async fn all_the_dead_are_put_back_oldest_first(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    for payload in ["a", "b", "c"] {
        bury(&mut trial, payload).await;
    }
    assert_eq!(trial.moved(Action::DeadRetryAll { until: None }).await, (3, None));
    assert_eq!(payloads(&trial.lease(5).await), ["a", "b", "c"]);
    assert_eq!(trial.moved(Action::DeadRetryAll { until: None }).await, (0, None));
}

async fn g23_putting_all_back_is_bounded_and_leaves_those_that_die_again(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    bury_many(&mut trial, BULK_JOBS_MAX).await;
    bury_many(&mut trial, 5).await;
    trial.advance(10);
    let (count, next) = trial.moved(Action::DeadRetryAll { until: None }).await;
    assert_eq!((count, next), (BULK_JOBS_MAX as u64, Some(trial.now)));
    trial.advance(10);
    let lease = trial.take().await;
    trial.kill(lease).await;
    assert_eq!(trial.moved(Action::DeadRetryAll { until: next }).await, (5, None));
    assert_eq!(trial.seqs(JobState::Dead).await, [lease.seq], "what died after the beginning stays");
}

async fn what_is_deleted_from_the_dead_is_gone_for_good(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let (one, two) = (bury(&mut trial, "one").await, bury(&mut trial, "two").await);
    let alive = trial.enqueue("alive").await;
    let jobs = [one, alive, 999].map(JobRef::Seq).to_vec();
    assert_eq!(trial.count(Action::DeadDelete { jobs: jobs.clone() }).await, 1);
    assert_eq!(trial.count(Action::DeadDelete { jobs }).await, 0);
    assert_eq!(trial.find(JobRef::Seq(one)).await, None);
    assert_eq!((trial.state(two).await, trial.state(alive).await), (JobState::Dead, JobState::Ready));
    assert_eq!(trial.stats().await.dead, 1);
}

async fn the_dead_are_purged_in_bounded_steps(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    bury_many(&mut trial, BULK_JOBS_MAX).await;
    bury_many(&mut trial, 1).await;
    let (count, next) = trial.moved(Action::Purge { state: JobState::Dead }).await;
    assert_eq!((count, next.is_some()), (BULK_JOBS_MAX as u64, true));
    let (count, next) = trial.moved(Action::Purge { state: JobState::Dead }).await;
    assert_eq!((count, next.is_some()), (1, false));
    assert_eq!(trial.len(JobState::Dead).await, 0);
}

cases![
    a_dead_job_shows_why_where_and_when_it_died,
    only_a_dead_job_is_got_from_the_dead,
    the_dead_are_listed_newest_first,
    g23_no_dead_job_makes_room_for_another,
    a_redriven_job_starts_again_at_the_end_of_the_line,
    g23_a_redrive_that_is_sent_twice_puts_the_job_back_once,
    a_redrive_counts_the_dead_among_the_jobs_it_names,
    the_verdict_of_before_a_redrive_is_lost,
    a_redriven_job_has_all_its_attempts,
    all_the_dead_are_put_back_oldest_first,
    g23_putting_all_back_is_bounded_and_leaves_those_that_die_again,
    what_is_deleted_from_the_dead_is_gone_for_good,
    the_dead_are_purged_in_bounded_steps,
];
