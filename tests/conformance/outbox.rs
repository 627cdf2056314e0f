//! The outbox: each death is counted once, told of on each channel by itself, and taken out when all of it was told; and the
//! notes that the holder of a role leaves for the next.

use bytes::Bytes;
use goflow::job::{JobRef, JobState, Lease, Policy};
use goflow::shard::{
    Action, DeathGroup, DeathMark, OTHER_DEATHS, OUTBOX_CHANNELS_MAX, OUTBOX_GROUPS_MAX, Outcome, Rules,
};

use super::trial::*;
use super::{Keeper, cases};

fn typed(kind: &'static str) -> Policy {
    policy(|policy| policy.kind = kind.into())
}

fn fatal(lease: Lease, error: &str) -> Action {
    let error = Bytes::copy_from_slice(error.as_bytes());
    Action::Fail { lease, error, trace: Bytes::new(), retry_in: None, dead: true }
}

/// Adds a job of a type and makes it die of an error; its seq.
async fn die(trial: &mut Trial, kind: &'static str, error: &str) -> u64 {
    let seq = trial.enqueue_as(typed(kind), "work").await;
    let lease = trial.take().await;
    assert_eq!(trial.one(fatal(lease, error)).await, Outcome::State(JobState::Dead));
    seq
}

async fn outbox(trial: &mut Trial) -> Vec<DeathGroup> {
    match trial.one(Action::Outbox).await {
        Outcome::Outbox { groups, now } => {
            assert_eq!(now, trial.now);
            assert_eq!(trial.effect().deaths, groups.iter().map(|group| group.count).sum::<u64>());
            groups
        }
        other => panic!("expected an outbox, got {other:?}"),
    }
}

async fn tell(trial: &mut Trial, channel: &str, marks: Vec<DeathMark>) {
    let channel = Bytes::copy_from_slice(channel.as_bytes());
    assert_eq!(trial.one(Action::OutboxTold { channel, marks }).await, Outcome::Done);
}

async fn settle(trial: &mut Trial, marks: Vec<DeathMark>) {
    assert_eq!(trial.one(Action::OutboxSettle { marks }).await, Outcome::Done);
}

fn marks(groups: &[DeathGroup]) -> Vec<DeathMark> {
    groups.iter().map(DeathGroup::mark).collect()
}

async fn a_death_is_in_the_outbox_with_the_batch_that_made_it(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    assert_eq!(outbox(&mut trial).await, []);
    let seq = trial.enqueue_as(typed("mail"), "work").await;
    let lease = trial.take().await;
    assert_eq!(trial.effect().deaths, 0);
    trial.advance(3);
    trial.one(fatal(lease, "no route to 10.1.2.3\nat line 7")).await;
    assert_eq!(trial.effect().deaths, 1);
    let groups = outbox(&mut trial).await;
    assert_eq!(groups.len(), 1);
    let group = &groups[0];
    assert_eq!(group.parts(), Some((&b"mail"[..], &b"no route to #.#.#.#"[..])));
    assert_eq!((group.count, group.born, group.first_at, group.last_at), (1, 1, BEGIN + 3, BEGIN + 3));
    assert_eq!((&group.job, &group.worker[..]), (&JobRef::Seq(seq), &b"worker"[..]));
    assert_eq!((&group.error[..], &group.told[..]), (&b"no route to 10.1.2.3\nat line 7"[..], &[][..]));
}

async fn deaths_of_one_type_and_one_kind_of_error_are_one_group(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    die(&mut trial, "mail", "timeout after 30 s").await;
    trial.advance(5);
    let last = die(&mut trial, "mail", "timeout after 31 s").await;
    die(&mut trial, "mail", "refused").await;
    die(&mut trial, "bill", "timeout after 7 s").await;
    die(&mut trial, "", "").await;
    let groups = outbox(&mut trial).await;
    let line = |group: &DeathGroup| {
        let (kind, print) = group.parts().unwrap();
        format!("{}|{}|{}", String::from_utf8_lossy(kind), String::from_utf8_lossy(print), group.count)
    };
    let lines: Vec<String> = groups.iter().map(line).collect();
    assert_eq!(lines, ["||1", "bill|timeout after # s|1", "mail|refused|1", "mail|timeout after # s|2"]);
    let group = &groups[3];
    assert_eq!((group.first_at, group.last_at, &group.job), (BEGIN, BEGIN + 5, &JobRef::Seq(last)));
    assert_eq!(group.error, "timeout after 31 s", "the sample is the last death");
}

async fn every_way_to_die_is_counted(keeper: &Keeper) {
    let mut trial = keeper.open_with(Rules { lapses_max: 1, ..Rules::default() }).await;
    die(&mut trial, "", "asked to").await;
    trial.enqueue_as(with_attempts(1), "work").await;
    let lease = trial.take().await;
    trial.fail(lease).await;
    let all = policy(|policy| {
        (policy.id, policy.unique, policy.kind) = (Some("mine".into()), Some(("key".into(), 0)), "typed".into());
    });
    trial.enqueue_as(all, "work").await;
    trial.lease_for(1, 10).await;
    trial.advance(10);
    trial.tick().await;
    assert_eq!(trial.effect().deaths, 3);
    let groups = outbox(&mut trial).await;
    let prints: Vec<_> = groups.iter().map(|group| group.parts().unwrap()).collect();
    let crashed = &b"lease lapsed # times: the worker crashed or hung"[..];
    assert_eq!(prints, [(&b""[..], &b"asked to"[..]), (b"", b"boom"), (b"typed", crashed)]);
    assert_eq!((&groups[2].job, &groups[2].worker[..]), (&chosen("mine"), &b"worker"[..]));
}

async fn a_job_that_dies_twice_is_counted_twice(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let seq = die(&mut trial, "", "boom").await;
    trial.retry(seq).await;
    let lease = trial.take().await;
    trial.kill(lease).await;
    trial.count(Action::DeadDelete { jobs: vec![JobRef::Seq(seq)] }).await;
    let groups = outbox(&mut trial).await;
    assert_eq!((groups.len(), groups[0].count), (1, 2), "a death was told of though the job is deleted");
}

async fn one_batch_of_deaths_and_questions_sees_its_own_effects(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    trial.enqueue_many(typed("a"), 4).await;
    let leases: Vec<Lease> = trial.lease(4).await.iter().map(|delivery| delivery.lease).collect();
    let mark = |count| DeathMark { key: DeathGroup::key_of(b"a", b"boom"), born: 1, count };
    let told = |count| Action::OutboxTold { channel: "c".into(), marks: vec![mark(count)] };
    let settle = |count| Action::OutboxSettle { marks: vec![mark(count)] };
    let outcomes = trial
        .apply(vec![
            kill(leases[0]),
            kill(leases[1]),
            told(1),
            Action::Outbox,
            settle(1),
            settle(2),
            kill(leases[2]),
            Action::Outbox,
        ])
        .await;
    let seen = |outcome: &Outcome| match outcome {
        Outcome::Outbox { groups, .. } => {
            groups.iter().map(|group| (group.born, group.count, group.told_on(b"c"))).collect::<Vec<_>>()
        }
        other => panic!("expected an outbox, got {other:?}"),
    };
    assert_eq!((seen(&outcomes[3]), seen(&outcomes[7])), (vec![(1, 2, 1)], vec![(3, 1, 0)]));
    assert_eq!(trial.effect().deaths, 1);
}

async fn each_channel_has_its_own_mark_that_only_goes_up(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    die(&mut trial, "", "boom").await;
    let one = marks(&outbox(&mut trial).await);
    die(&mut trial, "", "boom").await;
    tell(&mut trial, "pager", one.clone()).await;
    let two = marks(&outbox(&mut trial).await);
    tell(&mut trial, "chat", two.clone()).await;
    tell(&mut trial, "chat", one).await;
    let ahead = DeathMark { count: 900, ..two[0].clone() };
    tell(&mut trial, "page", vec![ahead]).await;
    let groups = outbox(&mut trial).await;
    let told = |channel: &str| groups[0].told_on(channel.as_bytes());
    assert_eq!((told("pager"), told("chat"), told("page"), told("nobody")), (1, 2, 2, 0));
    die(&mut trial, "", "boom").await;
    let groups = outbox(&mut trial).await;
    assert_eq!((groups[0].count, groups[0].told_on(b"chat")), (3, 2), "a death keeps the marks");
}

async fn what_died_since_keeps_its_group_from_being_settled(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    die(&mut trial, "", "boom").await;
    let before = marks(&outbox(&mut trial).await);
    die(&mut trial, "", "boom").await;
    settle(&mut trial, before).await;
    let now = outbox(&mut trial).await;
    assert_eq!(now[0].count, 2);
    settle(&mut trial, marks(&now)).await;
    settle(&mut trial, marks(&now)).await;
    assert_eq!(outbox(&mut trial).await, []);
    die(&mut trial, "", "boom").await;
    let again = outbox(&mut trial).await;
    assert_eq!((again[0].count, again[0].born), (1, 3));
    // What is said of the group that was there before changes nothing in the one that has its name.
    tell(&mut trial, "c", before_of(&now)).await;
    settle(&mut trial, before_of(&now)).await;
    assert_eq!(outbox(&mut trial).await, again);
}

fn before_of(groups: &[DeathGroup]) -> Vec<DeathMark> {
    groups.iter().map(|group| DeathMark { count: 1, ..group.mark() }).collect()
}

async fn a_flood_of_kinds_stays_bounded_and_none_is_uncounted(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    let letters = |n: usize| format!("x{}", "y".repeat(n));
    let count = OUTBOX_GROUPS_MAX + 3;
    trial.enqueue_many(Policy::default(), count).await;
    let leases: Vec<Lease> = trial.lease(count).await.iter().map(|delivery| delivery.lease).collect();
    let (first, rest) = leases.split_at(OUTBOX_GROUPS_MAX);
    trial.apply(first.iter().enumerate().map(|(n, lease)| fatal(*lease, &letters(n))).collect()).await;
    assert_eq!(outbox(&mut trial).await.len(), OUTBOX_GROUPS_MAX);
    for (n, lease) in rest.iter().enumerate() {
        trial.one(fatal(*lease, &letters(80 + n))).await;
    }
    let groups = outbox(&mut trial).await;
    assert_eq!(groups.len(), OUTBOX_GROUPS_MAX + 1);
    let others = groups.last().unwrap();
    assert_eq!((&others.key[..], others.count, others.parts()), (OTHER_DEATHS, 3, None));
    settle(&mut trial, marks(&groups[..1])).await;
    die(&mut trial, "", "a new kind").await;
    assert_eq!(outbox(&mut trial).await.iter().filter(|group| group.error == "a new kind").count(), 1);
}

async fn channels_beyond_the_bound_push_out_the_first(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    die(&mut trial, "", "boom").await;
    let told = marks(&outbox(&mut trial).await);
    for n in 0..=OUTBOX_CHANNELS_MAX {
        tell(&mut trial, &format!("c{n}"), told.clone()).await;
    }
    let groups = outbox(&mut trial).await;
    assert_eq!((groups[0].told.len(), groups[0].told_on(b"c0")), (OUTBOX_CHANNELS_MAX, 0));
    assert_eq!(groups[0].told_on(format!("c{OUTBOX_CHANNELS_MAX}").as_bytes()), 1);
}

async fn deaths_outlive_the_process(keeper: &Keeper) {
    let mut trial = keeper.open().await;
    die(&mut trial, "mail", "boom 7").await;
    let told = marks(&outbox(&mut trial).await);
    tell(&mut trial, "c", told).await;
    let before = outbox(&mut trial).await;
    if keeper.forgets() {
        return;
    }
    drop(trial);
    let mut trial = keeper.open().await;
    assert_eq!(outbox(&mut trial).await, before);
    trial.tick().await;
    assert_eq!(trial.effect().deaths, 1);
}

async fn a_note_is_there_for_the_next_holder_of_the_role(keeper: &Keeper) {
    let trial = keeper.open().await;
    let note = |role, name, text: Option<&'static str>| trial.shard.note(role, "me", name, text.map(Bytes::from));
    assert!(trial.shard.lead("scribe", "me", 600_000).await.unwrap());
    assert!(trial.shard.lead("other", "me", 600_000).await.unwrap());
    assert_eq!(trial.shard.notes("scribe").await.unwrap(), []);
    assert!(note("scribe", "b", Some("two")).await.unwrap());
    assert!(note("scribe", "a", Some("one \0")).await.unwrap());
    assert!(note("other", "a", Some("else")).await.unwrap());
    assert!(note("scribe", "b", Some("2")).await.unwrap());
    let notes = |pairs: &[(&str, &'static str)]| -> Vec<(String, Bytes)> {
        pairs.iter().map(|(name, text)| (name.to_string(), Bytes::from(*text))).collect()
    };
    assert_eq!(trial.shard.notes("scribe").await.unwrap(), notes(&[("a", "one \0"), ("b", "2")]));
    assert!(note("scribe", "b", None).await.unwrap());
    drop(trial);
    if keeper.forgets() {
        return;
    }
    let trial = keeper.open().await;
    assert_eq!(trial.shard.notes("scribe").await.unwrap(), notes(&[("a", "one \0")]));
    // A shard that only one process can use gives the role to whoever asks.
    if !trial.shard.lead("scribe", "you", 600_000).await.unwrap() {
        assert!(!trial.shard.note("scribe", "you", "a", None).await.unwrap(), "only the holder of the role writes");
        assert_eq!(trial.shard.notes("scribe").await.unwrap().len(), 1);
    }
}

cases![
    a_death_is_in_the_outbox_with_the_batch_that_made_it,
    deaths_of_one_type_and_one_kind_of_error_are_one_group,
    every_way_to_die_is_counted,
    a_job_that_dies_twice_is_counted_twice,
    one_batch_of_deaths_and_questions_sees_its_own_effects,
    each_channel_has_its_own_mark_that_only_goes_up,
    what_died_since_keeps_its_group_from_being_settled,
    a_flood_of_kinds_stays_bounded_and_none_is_uncounted,
    channels_beyond_the_bound_push_out_the_first,
    deaths_outlive_the_process,
    a_note_is_there_for_the_next_holder_of_the_role,
];
