//! Groups: at most so many of one at a time, in order where that is one, and nobody else waits for them.

use goflow::job::{JobState, Policy};
use goflow::shard::{Action, Outcome, Start};

use super::trial::*;
use super::{Keeper, cases};

fn in_group(key: &'static str, bound: u32) -> Policy {
    policy(|policy| (policy.group, policy.backoff, policy.attempts) = (Some((key.into(), bound)), 100, 3))
}

async fn jobs_of_one_group_are_leased_one_at_a_time_in_order(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seqs = trial.enqueue_many(in_group("a", 1), 3).await;
    for seq in seqs {
        assert_eq!(trial.effect().ready, 1);
        let leases: Vec<_> = trial.lease(10).await.iter().map(|delivery| delivery.lease).collect();
        assert_eq!((leases.len(), leases[0].seq), (1, seq));
        assert_eq!(trial.effect().ready, 0, "nothing can be leased while one is");
        assert!(trial.lease(10).await.is_empty());
        trial.ack(leases[0]).await;
    }
    assert_eq!((trial.effect().ready, trial.effect().load), (0, 0));
}

async fn other_groups_and_jobs_without_one_go_on_at_their_places(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    for (payload, group) in [("a1", "a"), ("a2", "a"), ("b1", "b"), ("x", ""), ("b2", "b"), ("c1", "c")] {
        let policy = if group.is_empty() { Policy::default() } else { in_group(group, 1) };
        trial.enqueue_as(policy, payload).await;
    }
    let first = trial.lease(2).await;
    assert_eq!(payloads(&first), ["a1", "b1"]);
    trial.ack(first[1].lease).await;
    trial.ack(first[0].lease).await;
    // The next of a group has the place of its enqueue, not one behind those that came later.
    assert_eq!(payloads(&trial.lease(10).await), ["a2", "x", "b2", "c1"]);
}

async fn a_bound_of_two_lets_two_at_once(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(in_group("a", 2), 4).await;
    let first = trial.lease(10).await;
    assert_eq!(payloads(&first), ["0", "1"]);
    trial.ack(first[1].lease).await;
    assert_eq!(payloads(&trial.lease(10).await), ["2"]);
}

async fn each_job_asks_by_its_own_bound_and_none_overtakes_the_first(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    for (payload, bound) in [("two", 2), ("one", 1), ("three", 3)] {
        trial.enqueue_as(in_group("a", bound), payload).await;
    }
    let first = trial.lease(10).await;
    assert_eq!(payloads(&first), ["two"], "while another has a turn a job of bound 1 waits, and what is behind it");
    trial.ack(first[0].lease).await;
    assert_eq!(payloads(&trial.lease(10).await), ["one", "three"]);
}

async fn of_those_that_wait_the_higher_priority_is_next(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    for (payload, priority) in [("first", 0), ("low", -3), ("plain", 0), ("high", 7)] {
        trial.enqueue_as(Policy { priority, ..in_group("a", 1) }, payload).await;
    }
    for expected in ["first", "high", "plain", "low"] {
        let delivery = trial.lease(5).await.remove(0);
        assert_eq!(delivery.spec.payload, expected);
        trial.ack(delivery.lease).await;
    }
}

async fn a_job_that_is_retried_keeps_its_turn_with_a_bound_of_one(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seqs = trial.enqueue_many(in_group("a", 1), 2).await;
    let lease = trial.take().await;
    assert_eq!(trial.fail(lease).await, Outcome::State(JobState::Scheduled));
    assert!(trial.lease(1).await.is_empty(), "the group waits for the retry");
    trial.advance(100);
    let lease = trial.take().await;
    assert_eq!(lease.seq, seqs[0]);
    assert_eq!(trial.release(lease, 50).await, Outcome::State(JobState::Scheduled));
    assert!(trial.lease(1).await.is_empty());
    trial.advance(50);
    let lease = trial.take().await;
    assert_eq!(trial.release(lease, 0).await, Outcome::State(JobState::Ready));
    let lease = trial.take().await;
    assert_eq!(lease.seq, seqs[0]);
    trial.advance(LEASE_MS);
    assert!(trial.lease(1).await.is_empty(), "the lease lapsed, and the job waits for its retry or is dead");
}

async fn a_job_that_is_retried_gives_up_its_turn_with_a_larger_bound(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(in_group("a", 2), 3).await;
    let first = trial.lease(2).await;
    trial.fail(first[0].lease).await;
    assert_eq!(payloads(&trial.lease(2).await), ["2"]);
    trial.advance(100);
    assert!(trial.lease(2).await.is_empty(), "the retry waits for a turn");
    trial.ack(first[1].lease).await;
    assert_eq!(payloads(&trial.lease(2).await), ["0"]);
}

async fn every_end_of_a_job_frees_its_turn(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let mut policy = in_group("a", 1);
    policy.ttl = 1_000;
    let seqs = trial.enqueue_many(policy, 2).await;
    trial.enqueue_many(in_group("a", 1), 7).await;
    trial.advance(1_000);
    trial.tick().await;
    assert_eq!(trial.state(seqs[0]).await, JobState::Expired);
    let take = trial.lease(1).await.remove(0);
    assert_eq!(take.spec.payload, "0");
    trial.kill(take.lease).await;
    let take = trial.lease(1).await.remove(0);
    assert_eq!(take.spec.payload, "1");
    trial.cancel(take.lease.seq).await;
    assert_eq!(trial.purge(JobState::Leased).await, 0);
    let take = trial.lease(1).await.remove(0);
    assert_eq!(take.spec.payload, "2");
    assert_eq!(trial.purge(JobState::Leased).await, 1);
    let take = trial.lease(1).await.remove(0);
    assert_eq!(take.spec.payload, "3");
    trial.advance(LEASE_MS);
    trial.tick().await;
    assert_eq!(trial.purge(JobState::Scheduled).await, 1);
    let take = trial.lease(1).await.remove(0);
    assert_eq!(take.spec.payload, "4");
    trial.advance(LEASE_MS);
    assert_eq!(trial.ack(take.lease).await, 1, "a late ack ends it too");
    let take = trial.lease(1).await.remove(0);
    assert_eq!(take.spec.payload, "5");
    assert_eq!(trial.retry(take.lease.seq).await, 0);
}

async fn a_redriven_job_waits_for_its_turn(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seqs = trial.enqueue_many(in_group("a", 1), 2).await;
    let lease = trial.take().await;
    trial.kill(lease).await;
    let next = trial.take().await;
    assert_eq!(trial.retry(seqs[0]).await, 1);
    assert_eq!((trial.effect().ready, trial.len(JobState::Ready).await), (0, 1));
    trial.ack(next).await;
    assert_eq!(trial.take().await.seq, seqs[0]);
}

async fn a_delayed_job_takes_its_place_when_it_is_due(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_at(in_group("a", 1), "late", Start::Delay(500)).await;
    trial.enqueue_many(in_group("a", 1), 2).await;
    let delivery = trial.lease(2).await.remove(0);
    assert_eq!(delivery.spec.payload, "0", "who is not due keeps nobody from it");
    trial.advance(500);
    trial.ack(delivery.lease).await;
    let delivery = trial.lease(2).await.remove(0);
    assert_eq!(delivery.spec.payload, "1");
    trial.ack(delivery.lease).await;
    assert_eq!(payloads(&trial.lease(2).await), ["late"]);
}

async fn those_that_wait_for_a_turn_are_ready_and_shown_behind_the_line(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let b = trial.enqueue_many(in_group("bb", 1), 2).await;
    let a = trial.enqueue_many(in_group("a", 1), 3).await;
    let plain = trial.enqueue("plain").await;
    assert_eq!(trial.seqs(JobState::Ready).await, [b[0], a[0], plain, a[1], a[2], b[1]]);
    let page: Vec<u64> = trial.peek(JobState::Ready, 2, 2).await.iter().map(|job| job.seq).collect();
    assert_eq!(page, [plain, a[1]]);
    assert_eq!((trial.len(JobState::Ready).await, trial.stats().await.ready), (6, 6));
    assert_eq!((trial.effect().ready, trial.effect().load), (3, 6));
    assert_eq!(trial.state(a[2]).await, JobState::Ready);
    assert_eq!(trial.cancel(a[1]).await, 1);
    assert_eq!(trial.purge(JobState::Ready).await, 5);
    assert_eq!((trial.effect().ready, trial.effect().load), (0, 0));
    trial.enqueue_as(in_group("a", 1), "again").await;
    assert_eq!(payloads(&trial.lease(5).await), ["again"], "no turn was left behind");
}

async fn a_group_outlives_a_reopening(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(in_group("a", 1), 3).await;
    let lease = trial.take().await;
    if keeper.forgets() {
        return;
    }
    drop(std::mem::replace(
        &mut trial.shard,
        std::sync::Arc::new(goflow::shard::memory::Memory::new(Default::default())),
    ));
    trial.shard = keeper.open_shard(Default::default()).await;
    assert!(trial.lease(2).await.is_empty());
    trial.ack(lease).await;
    assert_eq!(payloads(&trial.lease(2).await), ["1"]);
}

async fn keys_of_every_byte_are_kept_apart(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let keys: Vec<Vec<u8>> =
        vec![vec![0], vec![0, 0], vec![255; 256], vec![255; 255], (0..=255).collect(), b"a".to_vec()];
    for (number, key) in keys.iter().enumerate() {
        for part in 0..2 {
            let group = policy(|policy| policy.group = Some((key.clone().into(), 1)));
            trial.enqueue_as(group, &format!("{number}.{part}")).await;
        }
    }
    let first = trial.lease(20).await;
    assert_eq!(payloads(&first), ["0.0", "1.0", "2.0", "3.0", "4.0", "5.0"]);
    let leases = first.iter().map(|delivery| delivery.lease).collect();
    trial.one(Action::Ack { leases, result: Default::default() }).await;
    assert_eq!(payloads(&trial.lease(20).await), ["0.1", "1.1", "2.1", "3.1", "4.1", "5.1"]);
}

cases!(
    jobs_of_one_group_are_leased_one_at_a_time_in_order,
    other_groups_and_jobs_without_one_go_on_at_their_places,
    a_bound_of_two_lets_two_at_once,
    each_job_asks_by_its_own_bound_and_none_overtakes_the_first,
    of_those_that_wait_the_higher_priority_is_next,
    a_job_that_is_retried_keeps_its_turn_with_a_bound_of_one,
    a_job_that_is_retried_gives_up_its_turn_with_a_larger_bound,
    every_end_of_a_job_frees_its_turn,
    a_redriven_job_waits_for_its_turn,
    a_delayed_job_takes_its_place_when_it_is_due,
    those_that_wait_for_a_turn_are_ready_and_shown_behind_the_line,
    a_group_outlives_a_reopening,
    keys_of_every_byte_are_kept_apart,
);
