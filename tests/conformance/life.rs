//! A shard over time: how long it keeps what is over, and whose shard it is.

use goflow::job::{JobRef, JobState, Policy};
use goflow::shard::{Outcome, Retention, Rules, Stamp};

use super::{Keeper, cases};

fn keeping(age_ms: u64, jobs: u64) -> Rules {
    Rules { retention: Retention { age_ms, jobs }, ..Rules::default() }
}

async fn jobs_that_are_over_are_kept_for_their_time(keeper: &Keeper) {
    let mut trial = keeper.open_with(keeping(1000, 100)).await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    trial.ack(lease).await;
    trial.advance(999);
    trial.tick().await;
    assert_eq!((trial.state(seq).await, trial.ack(lease).await), (JobState::Completed, 1));
    trial.advance(2);
    trial.tick().await;
    assert_eq!(trial.find(JobRef::Seq(seq)).await, None);
    assert_eq!((trial.ack(lease).await, trial.fail(lease).await), (0, Outcome::NoSuchJob));
    let stats = trial.stats().await;
    assert_eq!((stats.completed, stats.completed_kept), (1, 0));
}

async fn what_ended_under_a_clock_that_stepped_back_is_not_kept_longer(keeper: &Keeper) {
    let mut trial = keeper.open_with(keeping(1000, 100)).await;
    let (first, second) = (trial.enqueue("first").await, trial.enqueue("second").await);
    trial.advance(600);
    trial.cancel(first).await;
    trial.now -= 600;
    let lease = trial.take().await;
    trial.ack(lease).await;
    // The one that stood before it in the order of ends goes in another way.
    trial.purge(JobState::Cancelled).await;
    trial.advance(1000);
    trial.tick().await;
    assert_eq!(trial.find(JobRef::Seq(second)).await, None);
}

async fn of_too_many_that_are_over_the_oldest_go_first(keeper: &Keeper) {
    let mut trial = keeper.open_with(keeping(1_000_000, 3)).await;
    let seqs = trial.enqueue_many(Policy::default(), 5).await;
    for delivery in trial.lease(5).await {
        trial.advance(1);
        trial.ack(delivery.lease).await;
    }
    trial.tick().await;
    assert_eq!(trial.seqs(JobState::Completed).await, [seqs[4], seqs[3], seqs[2]]);
    assert_eq!(trial.find(JobRef::Seq(seqs[0])).await, None);
    assert_eq!(trial.stats().await.completed_kept, 3);
}

async fn retention_touches_nothing_that_is_not_over(keeper: &Keeper) {
    let mut trial = keeper.open_with(keeping(1, 1)).await;
    let ready = trial.enqueue_many(Policy::default(), 5).await;
    let lease = trial.take().await;
    trial.kill(lease).await;
    trial.take().await;
    trial.advance(10);
    trial.tick().await;
    assert_eq!(trial.state(ready[0]).await, JobState::Dead);
    assert_eq!(trial.state(ready[1]).await, JobState::Leased);
    assert_eq!(trial.len(JobState::Ready).await, 3);
}

async fn a_seq_is_never_used_twice(keeper: &Keeper) {
    let mut trial = keeper.open_with(keeping(0, 0)).await;
    let mut last = 0;
    for _ in 0..5 {
        let seq = trial.enqueue("work").await;
        assert!(seq > last, "{seq} after {last}");
        last = seq;
        trial.purge(JobState::Ready).await;
        trial.advance(1);
        trial.tick().await;
    }
}

fn stamp(shard: &str, map_version: u64, map: &str) -> Stamp {
    Stamp { deployment: "d1".into(), shard: shard.into(), map_version, map: map.into() }
}

async fn a_shard_serves_the_name_it_was_stamped_with(keeper: &Keeper) {
    let trial = keeper.open().await;
    assert!(trial.shard.claim(stamp("s1", 1, "s1,s2")).await.is_ok());
    assert!(trial.shard.claim(stamp("s1", 1, "s1,s2")).await.is_ok(), "and again, as another proxy does");
    let other = Stamp { deployment: "d2".into(), ..stamp("s1", 1, "s1,s2") };
    let error = trial.shard.claim(other).await.unwrap_err();
    assert!(error.text.contains("d1"), "the error says whose it is: {error}");
}

async fn g15_two_names_for_one_shard_are_refused(keeper: &Keeper) {
    let trial = keeper.open().await;
    trial.shard.claim(stamp("s1", 1, "s1,s2")).await.unwrap();
    let error = trial.shard.claim(stamp("s2", 1, "s1,s2")).await.unwrap_err();
    assert!(error.text.contains("s1"), "the error says which it is: {error}");
}

async fn an_older_or_another_shard_map_is_refused(keeper: &Keeper) {
    let trial = keeper.open().await;
    trial.shard.claim(stamp("s1", 2, "s1,s2")).await.unwrap();
    assert!(trial.shard.claim(stamp("s1", 2, "s1,s3")).await.is_err(), "another map under the same version");
    assert!(trial.shard.claim(stamp("s1", 1, "s1")).await.is_err(), "an older map");
    trial.shard.claim(stamp("s1", 3, "s1,s2,s3")).await.unwrap();
    assert!(trial.shard.claim(stamp("s1", 2, "s1,s2")).await.is_err(), "the older one after the newer");
}

async fn a_probe_says_what_the_shard_is(keeper: &Keeper) {
    let trial = keeper.open().await;
    let health = trial.shard.probe().await.unwrap();
    assert!(!health.server.is_empty() && !health.durability.is_empty(), "{health:?}");
}

cases![
    jobs_that_are_over_are_kept_for_their_time,
    what_ended_under_a_clock_that_stepped_back_is_not_kept_longer,
    of_too_many_that_are_over_the_oldest_go_first,
    retention_touches_nothing_that_is_not_over,
    a_seq_is_never_used_twice,
    a_shard_serves_the_name_it_was_stamped_with,
    g15_two_names_for_one_shard_are_refused,
    an_older_or_another_shard_map_is_refused,
    a_probe_says_what_the_shard_is,
];
