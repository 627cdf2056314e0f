//! Worker sessions: leases that live as long as a proxy says so, and go back when none does any more.

use bytes::Bytes;

use goflow::clock::Millis;
use goflow::job::{JobState, Lease};
use goflow::shard::{Action, Outcome, Party, Rules, SessionView, TICK_JOBS_MAX};

use super::trial::*;
use super::{Keeper, cases};

const HERE: u64 = 7;
const THERE: u64 = 8;
const HOUR: Millis = 3_600_000;

fn party(session: &'static str, run_ms: Millis, leases: &[Lease]) -> Party {
    Party { session: Bytes::from_static(session.as_bytes()), run_ms, leases: leases.to_vec() }
}

async fn keep_all(trial: &mut Trial, keeper: u64, keep_ms: Millis, parties: Vec<Party>) -> Vec<u64> {
    match trial.one(Action::Keep { keeper, keep_ms, parties }).await {
        Outcome::Kept(counts) => counts,
        other => panic!("expected counts, got {other:?}"),
    }
}

/// Keeps one session, and hangs leases on it that may run an hour; how many it has.
async fn keep(trial: &mut Trial, keeper: u64, keep_ms: Millis, session: &'static str, leases: &[Lease]) -> u64 {
    keep_all(trial, keeper, keep_ms, vec![party(session, HOUR, leases)]).await[0]
}

async fn sessions(trial: &mut Trial) -> Vec<SessionView> {
    match trial.one(Action::Sessions { offset: 0, count: 100 }).await {
        Outcome::Sessions(now, sessions) => {
            assert_eq!(now, trial.now);
            sessions
        }
        other => panic!("expected sessions, got {other:?}"),
    }
}

async fn a_bound_lease_outlives_its_own_time_while_its_session_is_kept(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    assert_eq!(keep(&mut trial, HERE, 10_000, "a", &[lease]).await, 1);
    assert_eq!(trial.job(seq).await.lease_until, Some(BEGIN + HOUR));
    for _ in 0..20 {
        trial.advance(9_000);
        assert_eq!(keep(&mut trial, HERE, 10_000, "a", &[]).await, 1);
    }
    assert_eq!(trial.state(seq).await, JobState::Leased);
    assert_eq!(trial.ack(lease).await, 1);
    assert_eq!(keep(&mut trial, HERE, 10_000, "a", &[]).await, 0);
}

async fn a_session_that_nobody_keeps_gives_its_jobs_back_uncounted_at_their_old_place(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    for payload in ["first", "second", "third"] {
        trial.enqueue(payload).await;
    }
    let leases = [trial.take().await, trial.take().await];
    keep(&mut trial, HERE, 10_000, "a", &leases).await;
    assert_eq!(trial.effect().due_in, Some(10_000));
    trial.advance(9_999);
    trial.tick().await;
    assert_eq!(trial.len(JobState::Leased).await, 2);
    trial.advance(1);
    let again = trial.lease(9).await;
    assert_eq!(payloads(&again), ["first", "second", "third"]);
    assert!(again.iter().all(|delivery| delivery.attempt == 1));
    let stats = trial.stats().await;
    assert_eq!((stats.released, stats.lapsed), (2, 0));
    assert_eq!(sessions(&mut trial).await, []);
}

async fn a_keeper_that_leaves_ends_its_part_at_once_or_after_a_grace(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue("work").await;
    let lease = trial.take().await;
    keep(&mut trial, HERE, 10_000, "a", &[lease]).await;
    assert_eq!(keep(&mut trial, HERE, 2_000, "a", &[]).await, 1);
    assert_eq!(trial.effect().due_in, Some(2_000));
    trial.advance(1_999);
    assert_eq!(keep(&mut trial, HERE, 0, "a", &[]).await, 1);
    assert_eq!(trial.effect().due_in, Some(0));
    trial.tick().await;
    assert_eq!((trial.len(JobState::Ready).await, trial.effect().ready), (1, 1));
}

async fn a_session_lives_as_long_as_one_of_its_keepers_says_so(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue("work").await;
    let lease = trial.take().await;
    keep(&mut trial, HERE, 10_000, "a", &[lease]).await;
    assert_eq!(keep(&mut trial, THERE, 10_000, "a", &[]).await, 1);
    assert_eq!(sessions(&mut trial).await[0].keepers, 2);
    trial.advance(5_000);
    assert_eq!(keep(&mut trial, HERE, 0, "a", &[]).await, 1);
    assert_eq!(trial.effect().due_in, Some(5_000));
    assert_eq!(keep(&mut trial, THERE, 10_000, "a", &[]).await, 1);
    trial.advance(9_999);
    trial.tick().await;
    assert_eq!(trial.len(JobState::Leased).await, 1);
    trial.advance(1);
    trial.tick().await;
    assert_eq!(trial.len(JobState::Leased).await, 0);
}

async fn a_session_that_has_ended_is_not_kept_any_more(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue("work").await;
    let lease = trial.take().await;
    keep(&mut trial, HERE, 1_000, "a", &[lease]).await;
    trial.advance(1_000);
    assert_eq!(keep(&mut trial, HERE, 1_000, "a", &[lease]).await, 0);
    assert_eq!(keep(&mut trial, HERE, 1_000, "never", &[]).await, 0);
    assert_eq!(trial.len(JobState::Ready).await, 1);
}

async fn after_its_sessions_end_a_lease_may_still_be_acked_and_nothing_else(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    for payload in ["acked", "failed"] {
        trial.enqueue(payload).await;
    }
    let (acked, failed) = (trial.take().await, trial.take().await);
    keep(&mut trial, HERE, 0, "a", &[acked, failed]).await;
    trial.tick().await;
    assert_eq!(trial.len(JobState::Ready).await, 2);
    assert_eq!(trial.ack(acked).await, 1);
    assert_eq!(trial.fail(failed).await, Outcome::LeaseLost);
    assert_eq!(trial.release(failed, 0).await, Outcome::LeaseLost);
    let newer = trial.take().await;
    assert_eq!((trial.ack(failed).await, trial.ack(newer).await), (0, 1));
}

async fn a_bound_lease_lapses_at_the_end_of_its_longest_run(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    let bound = keep_all(&mut trial, HERE, 90_000, vec![party("a", 60_000, &[lease])]).await;
    assert_eq!(bound, [1]);
    trial.advance(60_000);
    let job = trial.job(seq).await;
    assert_eq!((job.state, job.lapses), (JobState::Scheduled, 1));
    assert_eq!(keep(&mut trial, HERE, 90_000, "a", &[]).await, 0);
}

async fn a_lease_that_ends_later_than_its_longest_run_keeps_its_end(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    keep_all(&mut trial, HERE, 90_000, vec![party("a", 0, &[lease])]).await;
    assert_eq!(trial.job(seq).await.lease_until, Some(BEGIN + LEASE_MS));
}

async fn an_extend_moves_the_end_of_a_bound_lease_and_leaves_it_in_its_session(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue("work").await;
    let lease = trial.take().await;
    keep(&mut trial, HERE, 10_000, "a", &[lease]).await;
    assert_eq!(trial.extend(lease, 50_000).await, Outcome::Until(BEGIN + 50_000));
    trial.advance(10_000);
    trial.tick().await;
    assert_eq!(trial.len(JobState::Ready).await, 1);
}

async fn only_leases_that_hold_their_jobs_hang_on_a_session(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    for _ in 0..2 {
        trial.enqueue("work").await;
    }
    let (over, held) = (trial.take().await, trial.take().await);
    trial.ack(over).await;
    let stranger = Lease { token: held.token + 1, ..held };
    let unknown = Lease { seq: 99, token: 1 };
    assert_eq!(keep(&mut trial, HERE, 10_000, "a", &[over, stranger, unknown]).await, 0);
    assert_eq!(sessions(&mut trial).await, []);
    assert_eq!(keep(&mut trial, HERE, 10_000, "a", &[over, held, held]).await, 1);
}

async fn every_verdict_takes_a_lease_out_of_its_session(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(policy(|_| ()), 5).await;
    let mut leases = Vec::new();
    for _ in 0..5 {
        leases.push(trial.take().await);
    }
    assert_eq!(keep(&mut trial, HERE, 10_000, "a", &leases).await, 5);
    trial.ack(leases[0]).await;
    trial.fail(leases[1]).await;
    trial.release(leases[2], 60_000).await;
    trial.cancel(leases[3].seq).await;
    assert_eq!(keep(&mut trial, HERE, 10_000, "a", &[]).await, 1);
    trial.purge(JobState::Leased).await;
    assert_eq!(keep(&mut trial, HERE, 10_000, "a", &[]).await, 0);
    // What is leased anew is not the session's, although the job once was.
    let again = trial.take_when_due().await;
    trial.advance(10_000);
    trial.tick().await;
    assert_eq!(trial.job(again.seq).await.state, JobState::Leased);
}

async fn a_session_gives_back_in_bounded_steps(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let count = TICK_JOBS_MAX + 5;
    trial.enqueue_many(policy(|_| ()), count).await;
    let leases: Vec<Lease> = trial.lease(count).await.iter().map(|delivery| delivery.lease).collect();
    assert_eq!(keep(&mut trial, HERE, 1_000, "a", &leases).await, count as u64);
    trial.advance(1_000);
    trial.tick().await;
    assert_eq!(trial.effect().ready, TICK_JOBS_MAX as u64);
    assert_eq!(trial.effect().due_in, Some(0));
    trial.tick().await;
    assert_eq!((trial.effect().ready, trial.effect().due_in), (count as u64, None));
}

async fn an_expired_job_of_an_ended_session_is_expired(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_ttl(5_000), "work").await;
    let lease = trial.take().await;
    keep(&mut trial, HERE, 10_000, "a", &[lease]).await;
    trial.advance(10_000);
    assert_eq!(trial.state(seq).await, JobState::Expired);
}

async fn sessions_are_shown_with_what_they_hold(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(policy(|_| ()), 3).await;
    let first = trial.take().await;
    trial.advance(100);
    let others = [trial.take().await, trial.take().await];
    keep(&mut trial, HERE, 5_000, "b", &[first]).await;
    trial.advance(50);
    keep(&mut trial, HERE, 3_000, "a", &others).await;
    keep(&mut trial, THERE, 1_000, "a", &[]).await;
    let (since, until) = (BEGIN + 150, BEGIN + 3_150);
    let a = SessionView { session: "a".into(), since, until, keepers: 2, leased: 2, oldest_at: Some(BEGIN + 100) };
    let (since, until) = (BEGIN + 100, BEGIN + 5_100);
    let b = SessionView { session: "b".into(), since, until, keepers: 1, leased: 1, oldest_at: Some(BEGIN) };
    assert_eq!(sessions(&mut trial).await, [a.clone(), b.clone()]);
    for (offset, count, expected) in [(0, 1, vec![a]), (1, 9, vec![b]), (2, 9, vec![]), (0, 0, vec![])] {
        let page = trial.one(Action::Sessions { offset, count }).await;
        assert_eq!(page, Outcome::Sessions(trial.now, expected));
    }
}

async fn sessions_are_there_when_the_shard_is_opened_again(keeper: &Keeper) {
    let rules = Rules::default();
    let mut trial = keeper.open_with(rules).await;
    trial.enqueue_many(policy(|_| ()), 2).await;
    let lease = trial.take().await;
    keep(&mut trial, HERE, 5_000, "a", &[lease]).await;
    let shown = sessions(&mut trial).await;
    if keeper.forgets() {
        return;
    }
    drop(trial);
    let mut trial = keeper.open_with(rules).await;
    assert_eq!(sessions(&mut trial).await, shown);
    trial.advance(5_000);
    trial.tick().await;
    assert_eq!((trial.effect().ready, trial.effect().due_in), (2, None));
}

impl Trial {
    /// Leases the next job, once there is one.
    async fn take_when_due(&mut self) -> Lease {
        self.advance(60_000);
        self.take().await
    }
}

cases![
    a_bound_lease_outlives_its_own_time_while_its_session_is_kept,
    a_session_that_nobody_keeps_gives_its_jobs_back_uncounted_at_their_old_place,
    a_keeper_that_leaves_ends_its_part_at_once_or_after_a_grace,
    a_session_lives_as_long_as_one_of_its_keepers_says_so,
    a_session_that_has_ended_is_not_kept_any_more,
    after_its_sessions_end_a_lease_may_still_be_acked_and_nothing_else,
    a_bound_lease_lapses_at_the_end_of_its_longest_run,
    a_lease_that_ends_later_than_its_longest_run_keeps_its_end,
    an_extend_moves_the_end_of_a_bound_lease_and_leaves_it_in_its_session,
    only_leases_that_hold_their_jobs_hang_on_a_session,
    every_verdict_takes_a_lease_out_of_its_session,
    a_session_gives_back_in_bounded_steps,
    an_expired_job_of_an_ended_session_is_expired,
    sessions_are_shown_with_what_they_hold,
    sessions_are_there_when_the_shard_is_opened_again,
];
