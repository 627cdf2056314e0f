//! What is recorded: the event of each transition in its job's history and in the journal, and how long both are kept.

use bytes::Bytes;
use goflow::clock::Millis;
use goflow::job::{JobRef, JobState, Policy};
use goflow::shard::event::{Entry, Event, Page, Recording, What};
use goflow::shard::{Action, Outcome, Placed, Retention, Rules, Start};

use super::trial::{LEASE_MS, Trial, chosen, fail, fail_in, kill, policy, with_attempts, with_id, with_ttl};
use super::{Keeper, cases};

impl Trial {
    async fn history_of(&mut self, job: JobRef) -> Vec<Entry> {
        match self.one(Action::History { job }).await {
            Outcome::History(entries) => entries,
            other => panic!("expected a history, got {other:?}"),
        }
    }

    async fn history(&mut self, seq: u64) -> Vec<Event> {
        let events = self.history_of(JobRef::Seq(seq)).await.into_iter().map(|entry| match entry {
            Entry::Event(event) => event,
            Entry::Missing(count) => panic!("{count} events are missing"),
        });
        events.collect()
    }

    async fn page(&mut self, action: Action) -> Page {
        match self.one(action).await {
            Outcome::Events(page) => page,
            other => panic!("expected events, got {other:?}"),
        }
    }

    async fn journal(&mut self) -> Vec<Event> {
        self.page(Action::EventsAfter { number: 0, count: 1_000 }).await.events
    }

    /// What the history of a job says, and that the journal says the same.
    async fn told(&mut self, seq: u64) -> Vec<What> {
        let history = self.history(seq).await;
        let journal: Vec<Event> = self.journal().await.into_iter().filter(|event| event.seq == seq).collect();
        assert_eq!(history, journal);
        history.into_iter().map(|event| event.what).collect()
    }
}

fn recording(age_ms: Millis, histories: u64, journal: u64) -> Rules {
    Rules {
        retention: Retention { age_ms: 1_000, jobs: 2 },
        recording: Some(Recording { age_ms, histories, journal }),
        ..Rules::default()
    }
}

async fn a_job_that_is_completed_leaves_three_events_with_all_that_applies(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    trial.advance(5);
    let lease = trial.take().await;
    trial.advance(70);
    trial.one(Action::Ack { leases: vec![lease], result: Bytes::from_static(b"a = result") }).await;
    let worker = Bytes::from_static(b"worker");
    let now = trial.now;
    let expected = [
        Event::new(What::Queued, seq, now - 75),
        Event { attempt: Some(1), worker: worker.clone(), ..Event::new(What::Started, seq, now - 70) },
        Event { attempt: Some(1), worker, duration_ms: Some(70), ..Event::new(What::Completed, seq, now) },
    ];
    assert_eq!(trial.history(seq).await, expected);
    assert_eq!(trial.told(seq).await, [What::Queued, What::Started, What::Completed]);
    assert_eq!(trial.job(seq).await.result, "a = result");
}

async fn each_transition_leaves_its_event(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_at(with_attempts(3), "work", Start::Delay(10)).await;
    trial.advance(10);
    let lease = trial.take().await;
    trial.one(Action::Progress { lease, percent: 40, text: Bytes::new() }).await;
    trial.advance(3);
    trial.one(fail_in(lease, 50)).await;
    trial.advance(50);
    let lease = trial.take().await;
    trial.release(lease, 0).await;
    let lease = trial.take().await;
    trial.extend(lease, LEASE_MS).await;
    trial.kill(lease).await;
    trial.retry(seq).await;
    trial.cancel(seq).await;
    let expected = [
        What::Scheduled,
        What::Queued,
        What::Started,
        What::Progress,
        What::Failed,
        What::Retried,
        What::Queued,
        What::Started,
        What::Released,
        What::Started,
        What::Failed,
        What::Dead,
        What::Redriven,
        What::Cancelled,
    ];
    assert_eq!(trial.told(seq).await, expected);
    let history = trial.history(seq).await;
    let attempts: Vec<_> = history.iter().map(|event| event.attempt).collect();
    let second = [Some(2); 5];
    assert_eq!(attempts[2..6], [Some(1); 4]);
    assert_eq!(attempts[7..12], second);
    assert_eq!((history[3].progress, history[4].duration_ms), (Some(40), Some(3)));
    assert_eq!((&history[10].error[..], &history[11].error[..]), (&b"boom"[..], &b"boom"[..]));
}

async fn a_lapse_is_a_failure_and_a_late_ack_a_completion(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue("work").await;
    let lease = trial.lease_for(1, 1_000).await.remove(0).lease;
    trial.advance(1_000);
    trial.tick().await;
    trial.ack(lease).await;
    let expected = [What::Queued, What::Started, What::Failed, What::Retried, What::Completed];
    assert_eq!(trial.told(seq).await, expected);
    let history = trial.history(seq).await;
    assert_eq!(history[2].error, "lease lapsed (1 of 3)");
    assert_eq!((history[4].attempt, history[4].duration_ms), (Some(1), Some(1_000)));
}

async fn an_expiry_is_told_where_it_comes(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let waiting = trial.enqueue_as(with_ttl(100), "waits").await;
    trial.advance(100);
    trial.tick().await;
    assert_eq!(trial.told(waiting).await, [What::Queued, What::Expired]);
    let failing = trial.enqueue_as(with_ttl(100), "fails").await;
    let lease = trial.take().await;
    trial.advance(100);
    trial.one(fail(lease)).await;
    assert_eq!(trial.told(failing).await, [What::Queued, What::Started, What::Failed, What::Expired]);
}

async fn what_changes_nothing_leaves_nothing(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = trial.enqueue_as(with_id("mine"), "work").await;
    let held = trial.place(with_id("mine"), "again", Start::Now).await;
    assert!(matches!(held, Placed::Held { .. }));
    let lease = trial.take().await;
    trial.one(kill(lease)).await;
    trial.one(kill(lease)).await;
    trial.ack(lease).await;
    trial.extend(lease, 5).await;
    assert_eq!(trial.told(seq).await, [What::Queued, What::Started, What::Failed, What::Dead]);
}

async fn a_chosen_id_stands_in_every_event_and_finds_the_history(keeper: &Keeper) {
    let mut trial = keeper.open_with(recording(50_000, 10, 1_000)).await;
    let seq = trial.enqueue_as(with_id("mine"), "work").await;
    let lease = trial.take().await;
    trial.ack(lease).await;
    assert!(trial.journal().await.iter().all(|event| event.chosen.as_deref() == Some(b"mine")));
    trial.advance(1_000);
    trial.tick().await;
    assert_eq!(trial.find(chosen("mine")).await, None, "the job is forgotten");
    let history = trial.history_of(chosen("mine")).await;
    assert_eq!(history.len(), 3);
    assert_eq!(history, trial.history_of(JobRef::Seq(seq)).await);
    // The next job of that name is the one that is meant.
    let next = trial.enqueue_as(with_id("mine"), "work").await;
    assert_eq!(trial.history_of(chosen("mine")).await.len(), 1);
    assert_eq!(trial.told(next).await, [What::Queued]);
}

async fn a_history_outlives_its_job_for_its_time(keeper: &Keeper) {
    let mut trial = keeper.open_with(recording(5_000, 10, 1_000)).await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    trial.ack(lease).await;
    trial.advance(1_000);
    trial.tick().await;
    assert_eq!(trial.find(JobRef::Seq(seq)).await, None);
    assert_eq!((trial.ack(lease).await, trial.one(fail(lease)).await), (0, Outcome::NoSuchJob));
    assert_eq!(trial.history(seq).await.len(), 3);
    trial.advance(3_999);
    trial.tick().await;
    assert_eq!(trial.history(seq).await.len(), 3);
    trial.advance(1);
    trial.tick().await;
    assert_eq!(trial.history(seq).await, []);
}

async fn of_too_many_histories_the_oldest_go(keeper: &Keeper) {
    let mut trial = keeper.open_with(recording(1_000_000, 3, 1_000)).await;
    let seqs = trial.enqueue_many(Policy::default(), 8).await;
    for delivery in trial.lease(8).await {
        trial.ack(delivery.lease).await;
    }
    // Two of the eight are kept as jobs, three as histories.
    for (place, seq) in seqs.iter().enumerate() {
        assert_eq!(trial.history(*seq).await.len(), if place < 3 { 0 } else { 3 }, "job {place}");
    }
}

async fn a_job_that_is_purged_or_deleted_says_so(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let ready = trial.enqueue("ready").await;
    trial.purge(JobState::Ready).await;
    let leased = trial.enqueue_as(policy(|policy| policy.priority = 3), "leased").await;
    trial.take().await;
    trial.purge(JobState::Leased).await;
    let dead = trial.enqueue("dead").await;
    let lease = trial.take().await;
    trial.kill(lease).await;
    trial.count(Action::DeadDelete { jobs: vec![JobRef::Seq(dead)] }).await;
    for (seq, reason) in [(ready, "purged"), (leased, "purged"), (dead, "deleted")] {
        assert_eq!(trial.find(JobRef::Seq(seq)).await, None);
        trial.told(seq).await;
        let last = trial.history(seq).await.pop().unwrap();
        assert_eq!((last.what, &last.error[..]), (What::Cancelled, reason.as_bytes()));
    }
}

async fn the_journal_is_numbered_and_read_from_any_number(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    assert_eq!(trial.page(Action::EventsAfter { number: 0, count: 10 }).await, Page { first: 1, ..Page::default() });
    trial.enqueue_many(Policy::default(), 50).await;
    let born = trial.now;
    for _ in 0..50 {
        trial.advance(1);
        trial.take().await;
    }
    let all = trial.journal().await;
    assert_eq!(all.len(), 100);
    for after in [0, 1, 30, 49, 50, 51, 99] {
        let page = trial.page(Action::EventsAfter { number: after, count: 7 }).await;
        let from = after as usize;
        assert_eq!((page.born, page.last, page.first), (born, 100, after + 1));
        assert_eq!(page.events, all[from..(from + 7).min(100)]);
    }
    let page = trial.page(Action::EventsAfter { number: 100, count: 7 }).await;
    assert_eq!((page.last, page.first, page.events.len()), (100, 101, 0));
    for count in [1, 7, 50, 60, 1_000] {
        let page = trial.page(Action::EventsRecent { count }).await;
        let from = 100 - (count as usize).min(100);
        assert_eq!((page.first, &page.events[..]), (from as u64 + 1, &all[from..]));
    }
}

async fn a_journal_is_bounded_by_count_and_by_time(keeper: &Keeper) {
    let mut trial = keeper.open_with(recording(64_000, 10, 300)).await;
    for _ in 0..60 {
        trial.enqueue_many(Policy::default(), 10).await;
        for _ in 0..10 {
            trial.lease_for(1, 1_000_000).await;
        }
    }
    let page = trial.page(Action::EventsRecent { count: 1_000 }).await;
    assert_eq!(page.last, 1_200);
    assert_eq!(trial.page(Action::EventsAfter { number: 0, count: 10 }).await.first, page.first);
    assert!(page.events.len() >= 300 && page.first > 1, "{} events from {}", page.events.len(), page.first);
    assert_eq!(page.first + page.events.len() as u64, 1_201, "nothing is missing after the first");
    trial.advance(40_000);
    trial.enqueue("later").await;
    trial.advance(24_000);
    trial.tick().await;
    assert_eq!(trial.page(Action::EventsAfter { number: 0, count: 1_000 }).await.first, 1_201);
}

async fn what_was_recorded_is_there_after_a_restart(keeper: &Keeper) {
    if keeper.forgets() {
        return;
    }
    let rules = recording(1_000_000, 10, 1_000);
    let mut trial = keeper.open_with(rules).await;
    let seqs = trial.enqueue_many(Policy::default(), 6).await;
    for delivery in trial.lease(4).await {
        trial.ack(delivery.lease).await;
    }
    let mut before = Vec::new();
    for seq in &seqs {
        before.push(trial.history(*seq).await);
    }
    let page = trial.page(Action::EventsRecent { count: 1_000 }).await;
    let now = trial.now;
    drop(trial);
    let mut trial = keeper.open_with(rules).await;
    trial.now = now;
    for (seq, before) in seqs.iter().zip(before) {
        assert_eq!(trial.history(*seq).await, before);
    }
    assert_eq!(trial.page(Action::EventsRecent { count: 1_000 }).await, page);
}

async fn without_recording_nothing_is_recorded(keeper: &Keeper) {
    let mut trial = keeper.open_with(Rules { recording: None, ..Rules::default() }).await;
    let seq = trial.enqueue("work").await;
    let lease = trial.take().await;
    trial.one(Action::Ack { leases: vec![lease], result: Bytes::from_static(b"=result") }).await;
    assert_eq!(trial.history(seq).await, []);
    assert_eq!(trial.page(Action::EventsRecent { count: 10 }).await.last, 0);
    assert_eq!(trial.job(seq).await.result, "=result");
}

cases![
    a_job_that_is_completed_leaves_three_events_with_all_that_applies,
    each_transition_leaves_its_event,
    a_lapse_is_a_failure_and_a_late_ack_a_completion,
    an_expiry_is_told_where_it_comes,
    what_changes_nothing_leaves_nothing,
    a_chosen_id_stands_in_every_event_and_finds_the_history,
    a_history_outlives_its_job_for_its_time,
    of_too_many_histories_the_oldest_go,
    a_job_that_is_purged_or_deleted_says_so,
    the_journal_is_numbered_and_read_from_any_number,
    a_journal_is_bounded_by_count_and_by_time,
    what_was_recorded_is_there_after_a_restart,
    without_recording_nothing_is_recorded,
];
