//! Jobs that travel to another shard: DEPART, ARRIVE and DEPARTED, each of which may be repeated; and keys whose homes moved.

use bytes::Bytes;
use std::sync::Arc;

use goflow::job::{JobRef, JobState, JobView, Policy};
use goflow::shard::{Action, Departure, Outcome, Placed, Start, TravelMark};

use super::trial::{BEGIN, Trial, chosen, kill, payloads, policy, with_attempts, with_id, with_ttl, with_unique};
use super::{Keeper, cases};

async fn depart(trial: &mut Trial, state: JobState, count: u64) -> Departure {
    let route = Bytes::from_static(b"a*1;b*1");
    let outdated = TravelMark::default();
    match trial.one(Action::Depart { state, count, route, outdated }).await {
        Outcome::Departing(departure) => departure,
        other => panic!("expected a departure, got {other:?}"),
    }
}

async fn arrive(trial: &mut Trial, mark: TravelMark, jobs: &[JobView]) -> u64 {
    match arrive_late(trial, mark, jobs).await {
        Outcome::Count(count) => count,
        other => panic!("expected a count, got {other:?}"),
    }
}

async fn arrive_late(trial: &mut Trial, mark: TravelMark, jobs: &[JobView]) -> Outcome {
    let source = Bytes::from_static(b"s0");
    trial.one(Action::Arrive { source, mark, jobs: Arc::new(jobs.to_vec()) }).await
}

fn mark(number: u64) -> TravelMark {
    TravelMark { at: 1_000, number }
}

/// The mark of a batch after this one.
fn after(mark: TravelMark) -> TravelMark {
    TravelMark { number: mark.number + 1, ..mark }
}

fn seqs(departure: &Departure) -> Vec<u64> {
    departure.jobs.iter().map(|job| job.seq).collect()
}

async fn a_batch_on_its_way_is_not_delivered_and_still_found(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let all = trial.enqueue_many(Policy::default(), 5).await;
    let batch = depart(&mut trial, JobState::Ready, 3).await;
    assert_eq!((seqs(&batch), batch.route.as_ref()), (all[..3].to_vec(), &b"a*1;b*1"[..]));
    assert_eq!(trial.effect().ready, 2);
    assert_eq!((trial.len(JobState::Ready).await, trial.state(all[0]).await), (2, JobState::Ready));
    assert_eq!(payloads(&trial.lease(9).await), ["3", "4"]);
    assert_eq!(trial.one(Action::Cancel { job: JobRef::Seq(all[1]) }).await, Outcome::OnItsWay);
    assert_eq!(trial.purge(JobState::Ready).await, 0);
}

async fn the_same_batch_departs_until_it_has_arrived(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let all = trial.enqueue_many(Policy::default(), 4).await;
    let batch = depart(&mut trial, JobState::Ready, 2).await;
    assert_eq!(depart(&mut trial, JobState::Dead, 9).await, batch, "whatever is asked for meanwhile");
    if !keeper.forgets() {
        drop(trial);
        trial = keeper.open().await;
        assert_eq!(depart(&mut trial, JobState::Ready, 0).await, batch, "and after a restart");
    }
    assert_eq!(trial.count(Action::Departed { mark: after(batch.mark) }).await, 0, "another batch");
    assert_eq!(trial.count(Action::Departed { mark: batch.mark }).await, 2);
    assert_eq!(trial.count(Action::Departed { mark: batch.mark }).await, 0, "a repeat");
    assert_eq!(trial.find(JobRef::Seq(all[0])).await, None);
    let next = depart(&mut trial, JobState::Ready, 9).await;
    assert!(next.mark > batch.mark && seqs(&next) == all[2..]);
    trial.count(Action::Departed { mark: next.mark }).await;
    assert_eq!(depart(&mut trial, JobState::Ready, 9).await, Departure::default());
}

async fn what_has_arrived_is_not_added_again(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(Policy::default(), 3).await;
    let batch = depart(&mut trial, JobState::Ready, 9).await;
    assert_eq!(arrive(&mut trial, mark(7), &batch.jobs).await, 3);
    assert_eq!(trial.effect().ready, 3);
    assert_eq!(arrive(&mut trial, mark(7), &batch.jobs).await, 0);
    assert_eq!(arrive_late(&mut trial, mark(6), &batch.jobs[..1]).await, Outcome::Outdated);
    // Also when the jobs are long over.
    for delivery in trial.lease(9).await {
        trial.ack(delivery.lease).await;
    }
    trial.purge(JobState::Completed).await;
    assert_eq!(arrive(&mut trial, mark(7), &batch.jobs).await, 0);
    assert_eq!(arrive(&mut trial, mark(8), &batch.jobs[..1]).await, 1);
    // The source lost its last writes and counts from an older number.
    assert_eq!(arrive(&mut trial, TravelMark { at: 2_000, number: 3 }, &batch.jobs[..1]).await, 1);
    assert_eq!(arrive_late(&mut trial, mark(9), &batch.jobs[..1]).await, Outcome::Outdated, "older than that");
}

async fn a_batch_that_its_target_calls_outdated_goes_under_a_new_mark(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(Policy::default(), 3).await;
    let batch = depart(&mut trial, JobState::Ready, 2).await;
    let again = |outdated| Action::Depart { state: JobState::Ready, count: 9, route: Bytes::new(), outdated };
    let Outcome::Departing(same) = trial.one(again(after(batch.mark))).await else { panic!("no departure") };
    assert_eq!(same, batch, "it was another that is outdated");
    let Outcome::Departing(renewed) = trial.one(again(batch.mark)).await else { panic!("no departure") };
    assert!(renewed.mark > batch.mark);
    assert_eq!((renewed.route, renewed.jobs), (batch.route, batch.jobs));
    assert_eq!(trial.count(Action::Departed { mark: batch.mark }).await, 0);
    assert_eq!(trial.count(Action::Departed { mark: renewed.mark }).await, 2);
}

async fn a_clock_that_is_set_back_makes_no_earlier_batch(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(Policy::default(), 2).await;
    trial.now = BEGIN + 60_000;
    let first = depart(&mut trial, JobState::Ready, 1).await;
    trial.count(Action::Departed { mark: first.mark }).await;
    trial.now = BEGIN;
    let second = depart(&mut trial, JobState::Ready, 1).await;
    assert!(second.mark > first.mark, "{:?} after {:?}", second.mark, first.mark);
}

async fn a_job_arrives_as_it_departed(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let lease = {
        trial.enqueue_as(Policy { backoff: 500, ..with_attempts(5) }, "retried").await;
        trial.take().await
    };
    trial.fail(lease).await;
    trial.enqueue_as(policy(|policy| policy.priority = 5), "dies").await;
    let lease = trial.take().await;
    trial.kill(lease).await;
    trial.enqueue_at(with_ttl(60_000), "later", Start::Delay(9_000)).await;
    trial
        .enqueue_as(Policy { meta: vec![("a".into(), "b".into())], kind: "t".into(), ..with_ttl(90_000) }, "fresh")
        .await;
    trial.advance(100);
    let mut last = TravelMark::default();
    for state in [JobState::Ready, JobState::Scheduled, JobState::Dead] {
        let batch = depart(&mut trial, state, 9).await;
        last = after(last);
        trial.count(Action::Departed { mark: batch.mark }).await;
        trial.advance(10);
        assert_eq!(arrive(&mut trial, last, &batch.jobs).await, batch.jobs.len() as u64);
        let mut there = trial.peek(state, 0, 9).await;
        assert_eq!(there.len(), batch.jobs.len());
        there.sort_by_key(|job| job.seq);
        for (before, mut after) in batch.jobs.into_iter().zip(there) {
            after.seq = before.seq;
            assert_eq!(after, before);
        }
    }
    assert_eq!(trial.effect().due_in, Some(370), "the retry falls due when it would have");
    trial.advance(60_000);
    trial.tick().await;
    assert_eq!(payloads(&trial.lease(9).await), ["fresh", "retried"]);
    assert_eq!(trial.len(JobState::Expired).await, 1, "a ttl counts from the enqueue");
}

async fn ready_jobs_arrive_behind_those_that_are_there_but_before_lower_ones(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_as(policy(|policy| policy.priority = 3), "high").await;
    trial.enqueue("a").await;
    let lease = {
        trial.enqueue_as(policy(|policy| policy.priority = 9), "released").await;
        trial.take().await
    };
    trial.release(lease, 0).await;
    let batch = depart(&mut trial, JobState::Ready, 9).await;
    trial.count(Action::Departed { mark: batch.mark }).await;
    trial.enqueue("b").await;
    trial.enqueue_as(policy(|policy| policy.priority = -1), "low").await;
    arrive(&mut trial, mark(1), &batch.jobs).await;
    let order = ["released", "high", "b", "a", "low"];
    assert_eq!(payloads(&trial.lease(9).await), order);
}

async fn keys_travel_with_their_jobs(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let first = trial.enqueue_as(with_id("mine"), "x").await;
    trial.enqueue_as(with_unique("once", 1_000), "y").await;
    let batch = depart(&mut trial, JobState::Ready, 9).await;
    let held = trial.place(with_id("mine"), "z", Start::Now).await;
    assert_eq!(held, Placed::Held { seq: first, chosen: Some("mine".into()) }, "held while it is on its way");
    trial.count(Action::Departed { mark: batch.mark }).await;
    assert_eq!(trial.find(chosen("mine")).await, None);
    arrive(&mut trial, mark(1), &batch.jobs).await;
    assert_eq!(trial.find(chosen("mine")).await.map(|job| job.spec.payload), Some("x".into()));
    assert!(matches!(trial.place(with_unique("once", 0), "z", Start::Now).await, Placed::Held { .. }));
    trial.advance(1_000);
    assert!(
        matches!(trial.place(with_unique("once", 0), "z", Start::Now).await, Placed::Added(_)),
        "no longer than it was"
    );
}

async fn an_id_that_another_job_has_there_is_left_behind(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_as(policy(|policy| (policy.id, policy.kind) = (Some("mine".into()), "t".into())), "x").await;
    let batch = depart(&mut trial, JobState::Ready, 9).await;
    trial.count(Action::Departed { mark: batch.mark }).await;
    trial.enqueue_as(with_id("mine"), "other").await;
    arrive(&mut trial, mark(1), &batch.jobs).await;
    let jobs = trial.peek(JobState::Ready, 0, 9).await;
    let ids: Vec<Option<Bytes>> = jobs.iter().map(|job| job.spec.policy.id.clone()).collect();
    assert_eq!((ids, jobs[1].spec.payload.as_ref()), (vec![Some("mine".into()), None], &b"x"[..]));
    assert_eq!(jobs[1].spec.policy.kind.as_ref(), b"t");
}

async fn a_dead_job_on_its_way_is_not_redriven(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("x").await;
    let lease = trial.take().await;
    trial.kill(lease).await;
    let batch = depart(&mut trial, JobState::Dead, 9).await;
    assert_eq!(seqs(&batch), [seq]);
    assert_eq!(trial.retry(seq).await, 0);
    assert_eq!(trial.count(Action::DeadDelete { jobs: vec![JobRef::Seq(seq)] }).await, 0);
    assert_eq!(trial.moved(Action::DeadRetryAll { until: None }).await.0, 0);
    assert_eq!(trial.state(seq).await, JobState::Dead);
}

async fn a_late_ack_of_a_job_on_its_way_counts_nothing(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("x").await;
    let lease = trial.lease_for(1, 10).await[0].lease;
    trial.advance(10);
    trial.tick().await;
    let batch = depart(&mut trial, JobState::Scheduled, 9).await;
    assert_eq!(seqs(&batch), [seq]);
    assert_eq!(trial.ack(lease).await, 0);
    assert_eq!(trial.fail(lease).await, Outcome::LeaseLost);
    assert_eq!(trial.one(kill(lease)).await, Outcome::LeaseLost);
    assert_eq!(trial.state(seq).await, JobState::Scheduled);
}

async fn only_what_waits_or_is_dead_departs(keeper: &Keeper) {
    let trial = keeper.open().await;
    for state in [JobState::Leased, JobState::Completed, JobState::Cancelled, JobState::Expired] {
        let action = Action::Depart { state, count: 1, route: Bytes::new(), outdated: TravelMark::default() };
        let op = goflow::shard::Op { queue: trial.queue.clone(), action };
        let applied = trial.shard.apply(vec![op], Some(BEGIN)).await;
        assert!(applied.outcomes[0].is_err(), "{state:?}");
    }
}

async fn who_knows_of_older_homes_gets_no_key(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seek = |id: &'static str, unique: &'static str, homes_since| Action::Seek {
        id: Some(id.into()),
        unique: Some(unique.into()),
        homes_since,
    };
    assert_eq!(trial.one(seek("mine", "once", 3)).await, Outcome::Enqueued(Vec::new()));
    for old in [0, 2] {
        let with = |policy: Policy| Policy { homes_since: old, ..policy };
        assert_eq!(trial.place(with(with_id("mine")), "x", Start::Now).await, Placed::Outdated);
        assert_eq!(trial.place(with(with_unique("once", 0)), "x", Start::Now).await, Placed::Outdated);
    }
    trial.enqueue("jobs without a key are taken").await;
    let seq = trial.enqueue_as(Policy { homes_since: 3, ..with_id("mine") }, "x").await;
    let held = vec![Placed::Held { seq, chosen: Some("mine".into()) }];
    assert_eq!(trial.one(seek("mine", "once", 1)).await, Outcome::Enqueued(held), "an older one may ask");
    if !keeper.forgets() {
        drop(trial);
        trial = keeper.open().await;
        assert_eq!(trial.place(with_id("other"), "x", Start::Now).await, Placed::Outdated, "and after a restart");
    }
}

async fn a_large_batch_departs_in_parts(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let payload = "x".repeat(1 << 19);
    for _ in 0..20 {
        trial.enqueue(&payload).await;
    }
    assert_eq!(depart(&mut trial, JobState::Ready, 100).await.jobs.len(), 16);
}

cases![
    a_batch_on_its_way_is_not_delivered_and_still_found,
    the_same_batch_departs_until_it_has_arrived,
    what_has_arrived_is_not_added_again,
    a_clock_that_is_set_back_makes_no_earlier_batch,
    a_batch_that_its_target_calls_outdated_goes_under_a_new_mark,
    a_job_arrives_as_it_departed,
    ready_jobs_arrive_behind_those_that_are_there_but_before_lower_ones,
    keys_travel_with_their_jobs,
    an_id_that_another_job_has_there_is_left_behind,
    a_dead_job_on_its_way_is_not_redriven,
    a_late_ack_of_a_job_on_its_way_counts_nothing,
    only_what_waits_or_is_dead_departs,
    who_knows_of_older_homes_gets_no_key,
    a_large_batch_departs_in_parts,
];
