//! Chosen ids and unique keys: what holds them, and when they are free again.

use bytes::Bytes;

use goflow::job::{JobRef, JobState, Policy};
use goflow::shard::{Action, Placed, Retention, Rules, Start};

use super::trial::*;
use super::{Keeper, cases};

fn held(seq: u64, chosen: Option<&'static str>) -> Placed {
    Placed::Held { seq, chosen: chosen.map(|id| Bytes::from_static(id.as_bytes())) }
}

async fn a_job_is_found_by_the_id_that_its_client_chose(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_id("order:1"), "work").await;
    let found = trial.find(chosen("order:1")).await.unwrap();
    assert_eq!((found.seq, found.spec.policy.id.as_deref()), (seq, Some(&b"order:1"[..])));
    assert_eq!(trial.count(Action::Cancel { job: chosen("order:1") }).await, 1);
    assert_eq!(trial.state(seq).await, JobState::Cancelled);
}

async fn an_enqueue_sent_twice_with_one_id_adds_one_job(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_id("a"), "first").await;
    assert_eq!(trial.place(with_id("a"), "second", Start::Delay(5)).await, held(seq, Some("a")));
    let lease = trial.take().await;
    assert_eq!(trial.place(with_id("a"), "second", Start::Now).await, held(seq, Some("a")));
    trial.ack(lease).await;
    assert_eq!(
        trial.place(with_id("a"), "second", Start::Now).await,
        held(seq, Some("a")),
        "a finished job is not run again"
    );
    assert_eq!(trial.job(seq).await.spec.payload, "first");
    assert_eq!(trial.stats().await.enqueued, 1);
}

async fn a_chosen_id_is_free_again_when_its_job_is_no_longer_kept(keeper: &Keeper) {
    let mut trial =
        keeper.open_with(Rules { retention: Retention { age_ms: 1000, jobs: 100 }, ..Rules::default() }).await;
    let first = trial.enqueue_as(with_id("a"), "first").await;
    let lease = trial.take().await;
    trial.ack(lease).await;
    trial.advance(1001);
    trial.tick().await;
    let second = trial.enqueue_as(with_id("a"), "second").await;
    assert_ne!(first, second);
    assert_eq!(trial.find(chosen("a")).await.unwrap().seq, second);
    assert_eq!(trial.find(JobRef::Seq(first)).await, None);
}

async fn a_chosen_id_is_free_again_when_its_job_was_purged_or_deleted(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_as(with_id("a"), "first").await;
    assert_eq!(trial.purge(JobState::Ready).await, 1);
    trial.enqueue_as(with_id("a"), "second").await;
    let lease = trial.take().await;
    trial.kill(lease).await;
    assert_eq!(trial.count(Action::DeadDelete { jobs: vec![chosen("a")] }).await, 1);
    assert_eq!(trial.find(chosen("a")).await, None);
    trial.enqueue_as(with_id("a"), "third").await;
}

async fn a_dead_job_holds_its_chosen_id(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_id("a"), "work").await;
    let lease = trial.take().await;
    trial.kill(lease).await;
    assert_eq!(trial.place(with_id("a"), "twin", Start::Now).await, held(seq, Some("a")));
}

async fn ids_that_differ_in_one_byte_are_different(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    for id in ["a", "A", "a ", "a\0", "a\n", "1", "01"] {
        trial.enqueue_as(with_id(id), id).await;
    }
    assert_eq!(trial.find(chosen("a\0")).await.unwrap().spec.payload, "a\0");
    assert_eq!(trial.len(JobState::Ready).await, 7);
}

async fn only_one_waiting_or_leased_job_holds_a_unique_key(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_unique("k", 0), "work").await;
    assert_eq!(trial.place(with_unique("k", 0), "twin", Start::Now).await, held(seq, None));
    let lease = trial.take().await;
    assert_eq!(trial.place(with_unique("k", 0), "twin", Start::Now).await, held(seq, None));
    trial.fail(lease).await;
    assert_eq!(
        trial.place(with_unique("k", 0), "twin", Start::Now).await,
        held(seq, None),
        "while it waits for its retry"
    );
    trial.enqueue_as(with_unique("other", 0), "other").await;
    assert_eq!(trial.stats().await.enqueued, 2);
}

async fn who_holds_a_unique_key_is_told_by_its_chosen_id_too(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let both = policy(|policy| (policy.id, policy.unique) = (Some("mine".into()), Some(("k".into(), 0))));
    let seq = trial.enqueue_as(both, "work").await;
    assert_eq!(trial.place(with_unique("k", 0), "twin", Start::Now).await, held(seq, Some("mine")));
}

async fn an_enqueue_that_adds_nothing_takes_no_key(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_id("a"), "work").await;
    let both = policy(|policy| (policy.id, policy.unique) = (Some("a".into()), Some(("k".into(), 0))));
    assert_eq!(trial.place(both, "twin", Start::Now).await, held(seq, Some("a")));
    trial.enqueue_as(with_unique("k", 0), "free").await;
    let crossed = policy(|policy| (policy.id, policy.unique) = (Some("b".into()), Some(("k".into(), 0))));
    assert!(matches!(trial.place(crossed, "twin", Start::Now).await, Placed::Held { .. }));
    trial.enqueue_as(with_id("b"), "free").await;
}

async fn a_unique_key_is_free_when_its_job_is_over_or_dead(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let unique = || with_unique("k", 0);
    trial.enqueue_as(unique(), "completed").await;
    let lease = trial.take().await;
    trial.ack(lease).await;
    let seq = trial.enqueue_as(unique(), "cancelled").await;
    trial.cancel(seq).await;
    trial.enqueue_as(policy(|policy| (policy.unique, policy.ttl) = (Some(("k".into(), 0)), 10)), "expired").await;
    trial.advance(10);
    trial.enqueue_as(unique(), "purged").await;
    trial.purge(JobState::Ready).await;
    trial.enqueue_as(unique(), "purged while leased").await;
    trial.take().await;
    trial.purge(JobState::Leased).await;
    trial.enqueue_as(unique(), "dead").await;
    let lease = trial.take().await;
    trial.kill(lease).await;
    trial.enqueue_as(unique(), "last").await;
    assert_eq!(payloads(&trial.lease(9).await), ["last"]);
}

async fn a_unique_key_is_free_when_its_time_is_up(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let first = trial.enqueue_as(with_unique("k", 100), "first").await;
    trial.advance(99);
    assert_eq!(trial.place(with_unique("k", 100), "twin", Start::Now).await, held(first, None));
    trial.advance(1);
    let second = trial.enqueue_as(with_unique("k", 100), "second").await;
    trial.cancel(first).await;
    assert_eq!(
        trial.place(with_unique("k", 100), "twin", Start::Now).await,
        held(second, None),
        "the end of the first does not free what the second holds"
    );
}

async fn a_redrive_takes_the_unique_key_again(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_unique("k", 0), "work").await;
    let lease = trial.take().await;
    trial.kill(lease).await;
    assert_eq!(trial.retry(seq).await, 1);
    assert_eq!(trial.place(with_unique("k", 0), "twin", Start::Now).await, held(seq, None));
}

async fn a_job_whose_unique_key_another_holds_stays_dead(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let dead = trial.enqueue_as(with_unique("k", 0), "work").await;
    let lease = trial.take().await;
    trial.kill(lease).await;
    let twin = trial.enqueue_as(with_unique("k", 0), "twin").await;
    assert_eq!(trial.retry(dead).await, 0);
    assert_eq!(trial.moved(Action::DeadRetryAll { until: None }).await, (0, None));
    assert_eq!((trial.state(dead).await, trial.stats().await.redriven), (JobState::Dead, 0));
    trial.cancel(twin).await;
    assert_eq!(trial.retry(dead).await, 1, "it can be put back once the key is free");
}

async fn keys_and_ids_of_two_queues_are_not_one(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let both = policy(|policy| (policy.id, policy.unique) = (Some("a".into()), Some(("k".into(), 0))));
    trial.enqueue_as(both.clone(), "one").await;
    trial.queue = name("other");
    trial.enqueue_as(both, "two").await;
    assert_eq!(trial.find(chosen("a")).await.unwrap().spec.payload, "two");
}

async fn an_id_and_a_unique_key_of_one_text_are_two_things(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_as(with_id("same"), "id").await;
    trial.enqueue_as(with_unique("same", 0), "unique").await;
    trial.enqueue_as(Policy::default(), "same").await;
    assert_eq!(trial.lease(9).await.len(), 3);
}

cases![
    a_job_is_found_by_the_id_that_its_client_chose,
    an_enqueue_sent_twice_with_one_id_adds_one_job,
    a_chosen_id_is_free_again_when_its_job_is_no_longer_kept,
    a_chosen_id_is_free_again_when_its_job_was_purged_or_deleted,
    a_dead_job_holds_its_chosen_id,
    ids_that_differ_in_one_byte_are_different,
    only_one_waiting_or_leased_job_holds_a_unique_key,
    who_holds_a_unique_key_is_told_by_its_chosen_id_too,
    an_enqueue_that_adds_nothing_takes_no_key,
    a_unique_key_is_free_when_its_job_is_over_or_dead,
    a_unique_key_is_free_when_its_time_is_up,
    a_redrive_takes_the_unique_key_again,
    a_job_whose_unique_key_another_holds_stays_dead,
    keys_and_ids_of_two_queues_are_not_one,
    an_id_and_a_unique_key_of_one_text_are_two_things,
];
