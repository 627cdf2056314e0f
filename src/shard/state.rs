//! The rules of the state machine that `shard/mod.rs` describes: pure, without I/O, clock or `async`.
//!
//! [`State::apply`] takes a batch and the time and says what becomes of it. The state is what must be known to find a job
//! and its place quickly; payloads and texts stay in rows ([`Rows`]), and so does whatever must outlive the process:
//! [`State::load`] makes the state again from the rows alone.
//!
//! ```text
//! State   the queues by name, and the stamp                       state.rs
//!  ├ Objects  the locks and semaphores by name                    keyed.rs
//!  └ Turn   one queue's part of a batch: take, transition, put     turn.rs, its actions in ops.rs
//!     ├ the outbox of the dead                                        outbox.rs
//!     ├ Queue  orders, keys and counters of a queue, in memory      queue.rs, the ready ones in line.rs and group.rs
//!     ├ Sessions  worker sessions and what hangs on them            session.rs
//!     ├ Job    header, detail, record                               job.rs
//!     ├ Journal  chunks, and histories of the removed                journal.rs
//!     └ Rows   what is kept                                         rows.rs
//! Travel   jobs on their way between shards                        travel.rs
//! ```
//!
//! A job that waits as its enqueue left it has no entry of its own, only its bits in the line (two bits each), so a million
//! of them take well under a megabyte here. Any other job takes about 100 bytes, a leased one its detail too. Every op is
//! O(log n) in the number of jobs, but for the walk to the offset of a PEEK.
//!
//! An error of the store in the middle of a batch leaves the state unfit for use: whoever owns it must not apply more.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::collections::HashMap;
use std::collections::hash_map::Entry;

use crate::clock::UnixMs;
use crate::error::{Error, Result};
use crate::job::{Name, flag};
use crate::shard::feed::Recorded;
use crate::shard::{Action, Applied, DeathGroup, Keyed, Op, Rules, Stamp};

mod group;
mod job;
mod journal;
mod keyed;
mod limit;
mod line;
mod ops;
mod outbox;
mod queue;
pub mod rows;
mod session;
mod travel;
mod turn;

use job::{Job, Record, broken};
use keyed::Objects;
use limit::Share;
use queue::{Hold, Queue};
use rows::{Key, Rows, Table};
use travel::Travel;
use turn::Turn;

pub struct State<R> {
    rows: R,
    rules: Rules,
    queues: HashMap<Name, Queue, foldhash::fast::RandomState>,
    /// The number of the last queue.
    queue_number: u32,
    objects: Objects,
    /// What was recorded since it was last asked for.
    recorded: Vec<Recorded>,
}

impl<R: Rows> State<R> {
    /// The state of a shard that nobody has used, over rows that are empty.
    pub fn new(rows: R, rules: Rules) -> State<R> {
        State {
            rows,
            rules,
            queues: HashMap::default(),
            queue_number: 0,
            objects: Objects::default(),
            recorded: Vec::new(),
        }
    }

    /// Makes the state that the rows tell of.
    pub fn load(rows: R, rules: Rules) -> Result<State<R>> {
        let mut by_number: HashMap<u32, Queue, foldhash::fast::RandomState> = HashMap::default();
        rows.each(Table::Queues, &mut |key, row| {
            if let Key::Queue(number) = key {
                by_number.insert(number, Queue::decode(number, row)?);
            }
            Ok(())
        })?;
        let mut queue_of = |number: u32, visit: &mut dyn FnMut(&mut Queue) -> Result<()>| {
            visit(by_number.get_mut(&number).ok_or_else(|| broken("a row names a queue that is not there"))?)
        };
        rows.each(Table::Uniques, &mut |key, row| match key {
            Key::Unique(number, key) => queue_of(number, &mut |queue| {
                queue.unique.insert(key.clone(), Hold::decode(row.clone())?);
                Ok(())
            }),
            _ => Ok(()),
        })?;
        rows.each(Table::Limits, &mut |key, row| match key {
            Key::Limits(number) => queue_of(number, &mut |queue| {
                queue.share = Some(Box::new(Share::decode(row.clone())?));
                Ok(())
            }),
            _ => Ok(()),
        })?;
        // Before the jobs: one on its way stands in no order.
        rows.each(Table::Travels, &mut |key, row| match key {
            Key::Travel(number) => queue_of(number, &mut |queue| {
                queue.travel = Travel::decode(row.clone())?;
                Ok(())
            }),
            _ => Ok(()),
        })?;
        rows.each(Table::Jobs, &mut |key, row| match key {
            Key::Job(number, seq) => queue_of(number, &mut |queue| {
                let job = Job::decode(&row)?;
                // The record alone knows the group.
                if !job.has(flag::GROUP) && !queue.travel.is_on_its_way(seq) {
                    queue.enter(seq, &job);
                }
                queue.jobs.insert(seq, job);
                Ok(())
            }),
            _ => Ok(()),
        })?;
        rows.each(Table::Records, &mut |key, row| match key {
            Key::Record(number, seq) => queue_of(number, &mut |queue| load_record(queue, seq, &row)),
            _ => Ok(()),
        })?;
        rows.each(Table::Deaths, &mut |key, row| match key {
            Key::Deaths(number, key) => queue_of(number, &mut |queue| {
                let group = DeathGroup::decode(key.clone(), row.clone());
                queue.deaths += group.ok_or_else(|| broken("a group of deaths cannot be read"))?.count;
                queue.outbox.insert(key.clone());
                Ok(())
            }),
            _ => Ok(()),
        })?;
        rows.each(Table::Sessions, &mut |key, row| match key {
            Key::Session(number, name) => queue_of(number, &mut |queue| queue.sessions.load(name.clone(), row.clone())),
            _ => Ok(()),
        })?;
        rows.each(Table::Bound, &mut |key, row| match key {
            Key::Bound(number, seq) => queue_of(number, &mut |queue| queue.sessions.load_lease(seq, row.clone())),
            _ => Ok(()),
        })?;
        load_journals(&rows, &mut by_number)?;
        let mut objects = Objects::default();
        rows.each(Table::Objects, &mut |key, row| objects.load(key, row))?;
        let queue_number = by_number.keys().copied().max().unwrap_or(0);
        let sorted = by_number.into_values().map(|mut queue| {
            queue.sort_over();
            (queue.name.clone(), queue)
        });
        Ok(State { rows, rules, queues: sorted.collect(), queue_number, objects, recorded: Vec::new() })
    }

    /// Applies the ops in order at one point in time. `Err`: the store failed, and the state is unfit for use.
    pub fn apply(&mut self, ops: Vec<Op>, now: UnixMs) -> Result<Applied> {
        let mut outcomes = Vec::with_capacity(ops.len());
        let mut touched: Vec<Name> = Vec::new();
        for Op { queue: name, action } in ops {
            if let Action::Keyed { kind, deed } = action {
                outcomes.push(Ok(self.objects.act(&mut self.rows, (kind, name), deed, now)));
                continue;
            }
            let queue = match self.queues.entry(name) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => {
                    self.queue_number += 1;
                    let queue = Queue::new(entry.key().clone(), self.queue_number);
                    entry.insert(queue)
                }
            };
            let is_first = !std::mem::replace(&mut queue.is_open, true);
            let mut turn = Turn { queue, rows: &mut self.rows, rules: &self.rules, now };
            if is_first {
                touched.push(turn.queue.name.clone());
                turn.begin()?;
            }
            outcomes.push(match ops::check(&action) {
                Ok(()) => Ok(turn.act(action)?),
                Err(refused) => Err(refused),
            });
        }
        let mut effects = Vec::with_capacity(touched.len());
        for name in touched {
            let Some(queue) = self.queues.get_mut(&name) else { continue };
            queue.is_open = false;
            let (effect, recorded) = Turn { queue, rows: &mut self.rows, rules: &self.rules, now }.finish()?;
            effects.push(effect);
            self.recorded.extend(recorded);
            if !queue.is_stored {
                self.queues.remove(&name);
            }
        }
        Ok(Applied { outcomes, effects })
    }

    /// The queues that were ever written to, sorted.
    pub fn queues(&self) -> Vec<Name> {
        let mut names: Vec<Name> = self.queues.keys().cloned().collect();
        names.sort_unstable();
        names
    }

    pub fn set_rules(&mut self, rules: Rules) {
        self.rules = rules;
    }

    /// The locks and semaphores that something is known of.
    pub fn objects(&self) -> Vec<(Keyed, Name)> {
        self.objects.names()
    }

    /// The stamp that the shard has.
    pub fn stamp(&self) -> Result<Option<Stamp>> {
        let Some(row) = self.rows.get(&Key::Stamp)? else { return Ok(None) };
        decode_stamp(row).map(Some).ok_or_else(|| broken("the stamp of the shard cannot be read"))
    }

    /// Stamps the shard, or says why it must not be used under this stamp.
    pub fn claim(&mut self, stamp: &Stamp) -> Result<()> {
        if let Some(stored) = self.stamp()? {
            check_stamp(&stored, stamp)?;
            if stored == *stamp {
                return Ok(());
            }
        }
        self.rows.put(Key::Stamp, encode_stamp(stamp));
        Ok(())
    }

    /// Keeps a note of a role, or removes it.
    pub fn note(&mut self, role: &str, name: &str, text: Option<Bytes>) {
        let key = Key::Note(role.into(), name.into());
        match text {
            Some(text) => self.rows.put(key, text),
            None => self.rows.delete(key),
        }
    }

    /// The notes of a role, by their names.
    pub fn notes(&self, role: &str) -> Result<Vec<(String, Bytes)>> {
        let mut notes = Vec::new();
        self.rows.each(Table::Notes, &mut |key, row| {
            if let Key::Note(of, name) = key
                && *of == *role
            {
                notes.push((name.into(), row));
            }
            Ok(())
        })?;
        notes.sort_unstable();
        Ok(notes)
    }

    /// What was recorded since this was last called.
    pub fn take_recorded(&mut self) -> Vec<Recorded> {
        std::mem::take(&mut self.recorded)
    }

    pub fn rows_mut(&mut self) -> &mut R {
        &mut self.rows
    }
}

/// Gives each queue the order of its chunks and histories.
fn load_journals<R: Rows>(rows: &R, by_number: &mut HashMap<u32, Queue, foldhash::fast::RandomState>) -> Result<()> {
    let (mut chunks, mut histories): (HashMap<u32, Vec<_>>, HashMap<u32, Vec<_>>) = Default::default();
    rows.each(Table::Chunks, &mut |key, row| {
        if let Key::Chunk(number, last) = key {
            chunks.entry(number).or_default().push((last, journal::chunk_time(&row)?));
        }
        Ok(())
    })?;
    rows.each(Table::Histories, &mut |key, row| {
        if let Key::History(number, seq) = key {
            histories.entry(number).or_default().push((journal::read_history_row(&row)?.0, seq, row));
        }
        Ok(())
    })?;
    for (number, queue) in by_number {
        let (chunks, histories) = (chunks.remove(number), histories.remove(number));
        queue.journal.load(chunks.unwrap_or_default(), histories.unwrap_or_default())?;
    }
    Ok(())
}

/// Takes the record of a job in; one without a row of its own is ready, and as its enqueue left it.
fn load_record(queue: &mut Queue, seq: u64, row: &Bytes) -> Result<()> {
    let record = Record::decode(row)?;
    if let Some(mut job) = queue.jobs.remove(&seq) {
        if job.has(flag::GROUP) {
            job.member = record.member();
            match queue.travel.is_on_its_way(seq) {
                true => queue.keep_turn(&job),
                false => queue.enter(seq, &job),
            }
        }
        queue.jobs.insert(seq, job);
    }
    if let Some(id) = &record.spec.policy.id {
        queue.ids.insert(id[..].into(), seq);
    }
    if !queue.jobs.contains_key(&seq) {
        queue.enter(seq, &Job::new(seq, &record));
        queue.pristine.insert(seq);
    }
    Ok(())
}

fn encode_stamp(stamp: &Stamp) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u64(stamp.map_version);
    for text in [&stamp.deployment, &stamp.shard, &stamp.map] {
        out.put_u32(text.len() as u32);
        out.put_slice(text.as_bytes());
    }
    out.freeze()
}

fn decode_stamp(mut row: Bytes) -> Option<Stamp> {
    let map_version = (row.len() >= 8).then(|| row.get_u64())?;
    let mut text = || {
        let len = (row.len() >= 4).then(|| row.get_u32() as usize)?;
        let bytes = (row.len() >= len).then(|| row.split_to(len))?;
        String::from_utf8(bytes.to_vec()).ok()
    };
    Some(Stamp { deployment: text()?, shard: text()?, map_version, map: text()? })
}

fn check_stamp(stored: &Stamp, stamp: &Stamp) -> Result<()> {
    let (version, map) = (stored.map_version, &stored.map);
    if stored.deployment != stamp.deployment {
        return Err(Error::bad(format!(
            "the shard belongs to the deployment \"{}\", this is \"{}\"",
            stored.deployment, stamp.deployment
        )));
    }
    if stored.shard != stamp.shard {
        return Err(Error::bad(format!("the shard is \"{}\" and is configured as \"{}\"", stored.shard, stamp.shard)));
    }
    if version > stamp.map_version {
        let own = stamp.map_version;
        return Err(Error::bad(format!("the shard map has version {version}, this process has the older {own}")));
    }
    if version == stamp.map_version && *map != stamp.map {
        return Err(Error::bad(format!("the shard map of version {version} is \"{map}\", this process has another")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{JobRef, JobState, Lease, Policy};
    use crate::shard::Deed;
    use crate::shard::event::Recording;
    use crate::shard::memory::MapRows;
    use crate::shard::{Action, Outcome, Party, Retention, Start, TravelMark};
    use proptest::prelude::*;
    use std::sync::Arc;

    const RULES: Rules = Rules {
        retention: Retention { age_ms: 500, jobs: 6 },
        lapses_max: 2,
        recording: Some(Recording { age_ms: 400, histories: 5, journal: 20 }),
    };

    /// An action made of three numbers, on jobs and with tokens that are few enough to meet each other.
    fn action((kind, a, b): (u8, u64, u64)) -> Action {
        let lease = Lease { seq: a % 12 + 1, token: b % 3 };
        let key = |prefix: &str, number: u64| Bytes::from(format!("{prefix}{number}"));
        match kind {
            0..=4 => {
                let policy = Policy {
                    priority: (a % 3) as i16 - 1,
                    attempts: 1 + (b % 3) as u32,
                    backoff: b % 2 * 40,
                    ttl: [0, 0, 90][(a / 3 % 3) as usize],
                    id: (kind == 1).then(|| key("id", b % 4)),
                    unique: (kind <= 1).then(|| (key("key", a % 3), b % 2 * 60)),
                    group: (kind >= 2 && a % 4 > 0).then(|| (key("group", a % 3), 1 + (b % 5 / 3) as u32)),
                    ..Policy::default()
                };
                let start = if kind == 4 { Start::Delay(b % 50) } else { Start::Now };
                Action::Enqueue { policy: Arc::new(policy), payloads: vec![key("payload", a)], start }
            }
            5..=7 => {
                Action::Lease { tokens: vec![b % 3; 1 + (a % 2) as usize], lease_ms: 1 + a % 80, worker: key("w", a) }
            }
            8 => Action::Ack { leases: vec![lease], result: key("r", b) },
            9 => Action::Fail { lease, error: key("e", a), trace: key("t", b), retry_in: None, dead: b % 5 == 0 },
            10 => Action::Release { lease, delay: a % 2 * 30 },
            11 => Action::Extend { lease, lease_ms: 1 + b % 90 },
            12 => Action::Progress { lease, percent: (b % 101) as u8, text: key("p", a) },
            13 => Action::Cancel { job: JobRef::Seq(lease.seq) },
            14 => Action::DeadRetryAll { until: None },
            15 => Action::DeadRetry { jobs: vec![JobRef::Chosen(key("id", b % 4))] },
            16 => Action::Purge { state: JobState::ALL[(a % 7) as usize] },
            17 => Action::Pause { paused: a % 3 == 0 },
            18 => {
                let party = Party { session: key("s", a % 2), run_ms: b % 200, leases: vec![lease] };
                Action::Keep { keeper: b % 2, keep_ms: a % 3 * 40, parties: vec![party] }
            }
            19 => {
                let state = JobState::ALL[[0, 1, 3][(a % 3) as usize]];
                let outdated = TravelMark { at: a % 3, number: b % 40 };
                Action::Depart { state, count: b % 4, route: key("r", b), outdated }
            }
            20 => Action::Departed { mark: TravelMark { at: a % 3, number: a % 40 } },
            21 => Action::Seek { id: Some(key("id", b % 4)), unique: None, homes_since: a % 3 },
            _ => Action::Tick,
        }
    }

    /// All that can be seen of a queue, and what decides whether a key is free.
    fn all_seen(state: &mut State<MapRows>, queue: &Name, now: UnixMs) -> Vec<Outcome> {
        let states = JobState::ALL.into_iter();
        let mut actions: Vec<Action> = states.map(|state| Action::Peek { state, offset: 0, count: 1_000 }).collect();
        actions.extend((0..4).map(|id| Action::Job { job: JobRef::Chosen(format!("id{id}").into()) }));
        actions.push(Action::Stats);
        actions.extend((1..13).map(|seq| Action::History { job: JobRef::Seq(seq) }));
        actions.extend((0..4).map(|id| Action::History { job: JobRef::Chosen(format!("id{id}").into()) }));
        actions.push(Action::EventsAfter { number: 0, count: 1_000 });
        let ops = actions.into_iter().map(|action| Op { queue: queue.clone(), action }).collect();
        state.apply(ops, now).unwrap().outcomes.into_iter().map(|outcome| outcome.unwrap()).collect()
    }

    fn assert_same(one: &mut State<MapRows>, other: &mut State<MapRows>, queue: &Name, now: UnixMs) {
        assert_eq!(all_seen(one, queue, now), all_seen(other, queue, now));
        let (one, other) = (one.queues.get(queue), other.queues.get(queue));
        let (Some(one), Some(other)) = (one, other) else {
            assert!(one.is_none() && other.is_none());
            return;
        };
        assert_eq!(
            (one.counter, one.ended, &one.unique, &one.ids, &one.travel),
            (other.counter, other.ended, &other.unique, &other.ids, &other.travel)
        );
        assert_eq!((&one.expiring, one.due_at()), (&other.expiring, other.due_at()));
        assert_eq!(one.sessions, other.sessions);
        assert_eq!(one.jobs.len(), other.jobs.len());
        for (seq, job) in &one.jobs {
            assert_eq!(job.encode_header(), other.jobs[seq].encode_header(), "job {seq}");
        }
    }

    proptest! {
        #[test]
        fn a_state_that_is_loaded_is_the_one_that_was_left(
            steps in proptest::collection::vec((0u64..60, proptest::collection::vec((0u8..23, any::<u64>(), any::<u64>()), 1..5)), 1..40),
        ) {
            let queue = Name::parse(b"main").unwrap();
            let mut state = State::new(MapRows::default(), RULES);
            let mut now = 1_000_000;
            for (span, actions) in steps {
                now += span;
                let ops = actions.into_iter().map(|parts| Op { queue: queue.clone(), action: action(parts) }).collect();
                state.apply(ops, now).unwrap();
                let mut loaded = State::load(state.rows_mut().clone(), RULES).unwrap();
                assert_same(&mut state, &mut loaded, &queue, now);
            }
        }
    }

    #[test]
    fn a_queue_that_was_only_asked_is_not_kept() {
        let queue = Name::parse(b"main").unwrap();
        let mut state = State::new(MapRows::default(), RULES);
        all_seen(&mut state, &queue, 5);
        assert_eq!(state.queues(), []);
        state.apply(vec![Op { queue: queue.clone(), action: action((17, 0, 0)) }], 5).unwrap();
        assert_eq!(state.queues(), [queue]);
    }

    #[test]
    fn semaphores_that_nobody_holds_any_more_are_forgotten_and_locks_keep_their_fence() {
        let mut state = State::new(MapRows::default(), RULES);
        let acquire = |number: u64, kind| {
            let owner = Bytes::from_static(b"owner");
            let deed = Deed::Acquire { token: 1, limit: 5, ttl_ms: number, owner, waits: false, moved_in: 0 };
            Op { queue: Name::parse(format!("{number}").as_bytes()).unwrap(), action: Action::Keyed { kind, deed } }
        };
        for number in 1..=100 {
            state.apply(vec![acquire(number, Keyed::Semaphore), acquire(number, Keyed::Lock)], 0).unwrap();
        }
        let mut state = State::load(state.rows_mut().clone(), RULES).unwrap();
        assert_eq!(state.objects().len(), 200);
        // A few go with each deed, of those whose time is up.
        for _ in 0..30 {
            state.apply(vec![acquire(5_000, Keyed::Semaphore)], 60).unwrap();
        }
        for state in [&State::load(state.rows_mut().clone(), RULES).unwrap(), &state] {
            let left = state.objects();
            let semaphores = left.iter().filter(|(kind, _)| *kind == Keyed::Semaphore);
            assert_eq!((semaphores.count(), left.len()), (41, 141));
        }
    }

    #[test]
    fn jobs_with_a_key_are_enqueued_one_by_one() {
        let queue = Name::parse(b"main").unwrap();
        let mut state = State::new(MapRows::default(), RULES);
        let policy = Arc::new(Policy { id: Some("a".into()), ..Policy::default() });
        let action = Action::Enqueue { policy, payloads: vec!["x".into(), "y".into()], start: Start::Now };
        let applied = state.apply(vec![Op { queue, action }], 5).unwrap();
        assert!(applied.outcomes[0].is_err());
        assert_eq!(applied.effects[0].ready, 0);
    }
}
