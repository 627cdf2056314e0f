//! Locks and semaphores: one holder, or so many; fences that only grow; tokens that hold nothing do nothing; shard's time.

use bytes::Bytes;
use rand::{Rng, SeedableRng};

use goflow::job::JobState;
use goflow::shard::{Action, Deed, Holder, Keyed, Op, Outcome};

use super::trial::Trial;
use super::{Keeper, cases};

fn acquire(token: u64, limit: u32, ttl_ms: u64) -> Deed {
    Deed::Acquire {
        token,
        limit,
        ttl_ms,
        owner: Bytes::from(format!("owner {token}")),
        waits: token.is_multiple_of(2),
        moved_in: 0,
    }
}

async fn on(trial: &mut Trial, kind: Keyed, deed: Deed) -> Outcome {
    let outcome = trial.one(Action::Keyed { kind, deed }).await;
    assert!(trial.effects.is_empty(), "an object is no queue");
    outcome
}

async fn lock(trial: &mut Trial, deed: Deed) -> Outcome {
    on(trial, Keyed::Lock, deed).await
}

async fn semaphore(trial: &mut Trial, deed: Deed) -> Outcome {
    on(trial, Keyed::Semaphore, deed).await
}

async fn a_lock_has_one_holder_until_it_lets_go(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    assert_eq!(lock(&mut trial, acquire(1, 1, 1000)).await, Outcome::Granted { fence: 1 });
    trial.advance(400);
    assert_eq!(lock(&mut trial, acquire(2, 1, 1000)).await, Outcome::NotFree { free_in: 600 });
    assert_eq!(lock(&mut trial, Deed::Release { token: 1 }).await, Outcome::Count(1));
    assert_eq!(lock(&mut trial, acquire(2, 1, 1000)).await, Outcome::Granted { fence: 2 });
    assert_eq!(lock(&mut trial, Deed::Release { token: 1 }).await, Outcome::Count(0), "released twice");
}

async fn a_lock_is_free_when_its_time_is_up_by_the_shards_clock(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    lock(&mut trial, acquire(1, 1, 1000)).await;
    trial.advance(999);
    assert_eq!(lock(&mut trial, acquire(2, 1, 50)).await, Outcome::NotFree { free_in: 1 });
    trial.advance(1);
    assert_eq!(lock(&mut trial, Deed::Renew { token: 1, ttl_ms: 5 }).await, Outcome::Count(0));
    assert_eq!(lock(&mut trial, Deed::Release { token: 1 }).await, Outcome::Count(0));
    assert_eq!(lock(&mut trial, acquire(2, 1, 50)).await, Outcome::Granted { fence: 2 });
}

async fn a_wrong_token_changes_nothing(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    lock(&mut trial, acquire(1, 1, 1000)).await;
    assert_eq!(lock(&mut trial, Deed::Release { token: 9 }).await, Outcome::Count(0));
    assert_eq!(lock(&mut trial, Deed::Renew { token: 9, ttl_ms: 9_000 }).await, Outcome::Count(0));
    let holders = vec![Holder { owner: "owner 1".into(), left_ms: 1000 }];
    assert_eq!(lock(&mut trial, Deed::Show).await, Outcome::Holders { fence: 1, holders });
}

async fn a_renewed_lock_outlives_its_first_time(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    lock(&mut trial, acquire(1, 1, 1000)).await;
    trial.advance(900);
    assert_eq!(lock(&mut trial, Deed::Renew { token: 1, ttl_ms: 1000 }).await, Outcome::Count(1));
    trial.advance(900);
    assert_eq!(lock(&mut trial, acquire(2, 1, 1000)).await, Outcome::NotFree { free_in: 100 });
}

async fn a_claim_that_is_sent_twice_is_one_grant(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    assert_eq!(lock(&mut trial, acquire(1, 1, 1000)).await, Outcome::Granted { fence: 1 });
    trial.advance(10);
    assert_eq!(lock(&mut trial, acquire(1, 1, 1000)).await, Outcome::Granted { fence: 1 });
    let holders = vec![Holder { owner: "owner 1".into(), left_ms: 1000 }];
    assert_eq!(lock(&mut trial, Deed::Show).await, Outcome::Holders { fence: 1, holders });
    semaphore(&mut trial, acquire(1, 1, 1000)).await;
    assert_eq!(semaphore(&mut trial, acquire(1, 1, 1000)).await, Outcome::Granted { fence: 0 });
}

async fn fences_only_grow_through_release_expiry_and_restart(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let mut last = 0;
    for round in 1..20 {
        let Outcome::Granted { fence } = lock(&mut trial, acquire(round, 1, 50)).await else { panic!("it is free") };
        assert!(fence > last, "{fence} after {last}");
        last = fence;
        match round % 3 {
            0 => drop(lock(&mut trial, Deed::Release { token: round }).await),
            1 => trial.advance(50),
            _ if keeper.forgets() => trial.advance(500),
            _ => {
                let now = trial.now + 50;
                drop(trial);
                trial = keeper.open().await;
                trial.now = now;
            }
        }
    }
}

async fn what_is_held_is_held_over_a_restart(keeper: &Keeper) {
    if keeper.forgets() {
        return;
    }
    let mut trial = keeper.open().await;
    lock(&mut trial, acquire(1, 1, 1000)).await;
    semaphore(&mut trial, acquire(2, 2, 2000)).await;
    drop(trial);
    let mut trial = keeper.open().await;
    let held = |owner: &'static str, left_ms| vec![Holder { owner: owner.into(), left_ms }];
    assert_eq!(lock(&mut trial, Deed::Show).await, Outcome::Holders { fence: 1, holders: held("owner 1", 1000) });
    assert_eq!(semaphore(&mut trial, Deed::Show).await, Outcome::Holders { fence: 0, holders: held("owner 2", 2000) });
}

async fn a_semaphore_never_has_more_holders_than_the_limit(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let mut random = rand::rngs::SmallRng::seed_from_u64(11);
    let mut model: Vec<(u64, u64)> = Vec::new();
    for _ in 0..400 {
        trial.advance(random.random_range(0..20));
        let now = trial.now;
        model.retain(|(_, until)| *until > now);
        let (token, ttl_ms, limit) =
            (random.random_range(0..12), random.random_range(1..200), random.random_range(1..6));
        let held = model.iter().position(|(held, _)| *held == token);
        match random.random_range(0..4) {
            0 | 1 => {
                let outcome = semaphore(&mut trial, acquire(token, limit, ttl_ms)).await;
                let is_free = held.is_some() || model.len() < limit as usize;
                assert_eq!(matches!(outcome, Outcome::Granted { fence: 0 }), is_free, "{outcome:?}, {model:?}");
                if is_free {
                    model.retain(|(held, _)| *held != token);
                    model.push((token, now + ttl_ms));
                }
            }
            2 => {
                let released = held.map(|at| model.remove(at)).is_some();
                let outcome = semaphore(&mut trial, Deed::Release { token }).await;
                assert_eq!(outcome, Outcome::Count(u64::from(released)));
            }
            _ => {
                let outcome = semaphore(&mut trial, Deed::Renew { token, ttl_ms }).await;
                assert_eq!(outcome, Outcome::Count(u64::from(held.is_some())));
                held.into_iter().for_each(|at| model[at].1 = now + ttl_ms);
            }
        }
        model.sort_unstable_by_key(|(token, until)| (*until, *token));
        let holder =
            |(token, until): &(u64, u64)| Holder { owner: format!("owner {token}").into(), left_ms: until - now };
        let holders = model.iter().map(holder).collect();
        assert_eq!(semaphore(&mut trial, Deed::Show).await, Outcome::Holders { fence: 0, holders });
    }
}

async fn the_deeds_of_one_batch_apply_in_order(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let deeds = [
        acquire(1, 1, 1000),
        acquire(2, 1, 1000),
        Deed::Release { token: 1 },
        acquire(2, 1, 700),
        Deed::Renew { token: 2, ttl_ms: 800 },
    ];
    let actions = deeds.into_iter().map(|deed| Action::Keyed { kind: Keyed::Lock, deed }).collect();
    let expected = [
        Outcome::Granted { fence: 1 },
        Outcome::NotFree { free_in: 1000 },
        Outcome::Count(1),
        Outcome::Granted { fence: 2 },
        Outcome::Count(1),
    ];
    assert_eq!(trial.apply(actions).await, expected);
}

async fn a_lock_a_semaphore_and_a_queue_of_one_name_do_not_meet(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue("work").await;
    let queue = trial.queue.clone();
    let op = |kind| Op { queue: queue.clone(), action: Action::Keyed { kind, deed: acquire(1, 1, 1000) } };
    let len = Op { queue: queue.clone(), action: Action::Len { state: JobState::Ready } };
    let outcomes = trial.apply_ops(vec![op(Keyed::Lock), len, op(Keyed::Semaphore)]).await;
    assert_eq!(outcomes, [Outcome::Granted { fence: 1 }, Outcome::Count(1), Outcome::Granted { fence: 0 }]);
    assert_eq!(trial.effects.len(), 1);
    assert_eq!(lock(&mut trial, Deed::Release { token: 1 }).await, Outcome::Count(1));
    assert_eq!(semaphore(&mut trial, Deed::Release { token: 1 }).await, Outcome::Count(1));
    assert_eq!(trial.shard.queues().await.unwrap(), [trial.queue.clone()]);
}

async fn a_lock_works_on_after_the_scripts_are_forgotten(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    lock(&mut trial, acquire(1, 1, 1000)).await;
    keeper.forget_scripts();
    assert_eq!(lock(&mut trial, Deed::Release { token: 1 }).await, Outcome::Count(1));
}

async fn a_fence_is_above_those_of_the_home_before(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let moved = |token, moved_in| Action::Keyed {
        kind: Keyed::Lock,
        deed: Deed::Acquire { token, limit: 1, ttl_ms: 10, owner: Bytes::new(), waits: false, moved_in },
    };
    let fence = |moved_in: u64, nth: u64| Outcome::Granted { fence: (moved_in << 32) + nth };
    assert_eq!(trial.one(moved(1, 0)).await, fence(0, 1));
    trial.advance(10);
    assert_eq!(trial.one(moved(2, 7)).await, fence(7, 1));
    trial.advance(10);
    assert_eq!(trial.one(moved(3, 7)).await, fence(7, 2));
    trial.advance(10);
    assert_eq!(trial.one(moved(4, 2)).await, fence(7, 3), "who knows of less does not lower it");
    let named = trial.shard.objects().await.unwrap();
    assert!(named.is_empty() || named == [(Keyed::Lock, trial.queue.clone())], "a cluster cannot tell");
}

cases![
    a_fence_is_above_those_of_the_home_before,
    a_lock_has_one_holder_until_it_lets_go,
    a_lock_is_free_when_its_time_is_up_by_the_shards_clock,
    a_wrong_token_changes_nothing,
    a_renewed_lock_outlives_its_first_time,
    a_claim_that_is_sent_twice_is_one_grant,
    fences_only_grow_through_release_expiry_and_restart,
    what_is_held_is_held_over_a_restart,
    a_semaphore_never_has_more_holders_than_the_limit,
    the_deeds_of_one_batch_apply_in_order,
    a_lock_a_semaphore_and_a_queue_of_one_name_do_not_meet,
    a_lock_works_on_after_the_scripts_are_forgotten,
];
