//! The rules of the state machine that `shard/mod.rs` describes: pure, without I/O, clock or `async`.
//!
//! [`State::apply`] takes a batch and the time and says what becomes of it. The state is what must be known to find a job
//! and its place quickly; payloads and texts stay in rows ([`Rows`]), and so does whatever must outlive the process:
//! [`State::load`] makes the state again from the rows alone.
//!
//! ```text
//! State   the queues by name, and the stamp                       state.rs
//!  └ Turn   one queue's part of a batch: take, transition, put     turn.rs, its actions in ops.rs
//!     ├ Queue  orders, keys and counters of a queue, in memory      queue.rs, the ready ones in line.rs
//!     ├ Job    header, detail, record                               job.rs
//!     └ Rows   what is kept                                         rows.rs
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
use crate::job::Name;
use crate::shard::{Applied, Op, Rules, Stamp};

mod job;
mod line;
mod ops;
mod queue;
pub mod rows;
mod turn;

use job::{Job, Record, broken};
use queue::{Hold, Queue};
use rows::{Key, Rows, Table};
use turn::Turn;

pub struct State<R> {
    rows: R,
    rules: Rules,
    queues: HashMap<Name, Queue, foldhash::fast::RandomState>,
    /// The number of the last queue.
    queue_number: u32,
}

impl<R: Rows> State<R> {
    /// The state of a shard that nobody has used, over rows that are empty.
    pub fn new(rows: R, rules: Rules) -> State<R> {
        State { rows, rules, queues: HashMap::default(), queue_number: 0 }
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
        rows.each(Table::Jobs, &mut |key, row| match key {
            Key::Job(number, seq) => queue_of(number, &mut |queue| {
                let job = Job::decode(&row)?;
                queue.enter(seq, &job);
                queue.jobs.insert(seq, job);
                Ok(())
            }),
            _ => Ok(()),
        })?;
        rows.each(Table::Records, &mut |key, row| match key {
            Key::Record(number, seq) => queue_of(number, &mut |queue| load_record(queue, seq, &row)),
            _ => Ok(()),
        })?;
        let queue_number = by_number.keys().copied().max().unwrap_or(0);
        let sorted = by_number.into_values().map(|mut queue| {
            queue.sort_over();
            (queue.name.clone(), queue)
        });
        Ok(State { rows, rules, queues: sorted.collect(), queue_number })
    }

    /// Applies the ops in order at one point in time. `Err`: the store failed, and the state is unfit for use.
    pub fn apply(&mut self, ops: Vec<Op>, now: UnixMs) -> Result<Applied> {
        let mut outcomes = Vec::with_capacity(ops.len());
        let mut touched: Vec<Name> = Vec::new();
        for Op { queue: name, action } in ops {
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
            effects.push(Turn { queue, rows: &mut self.rows, rules: &self.rules, now }.finish()?);
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

    pub fn rows_mut(&mut self) -> &mut R {
        &mut self.rows
    }
}

/// Takes the record of a job in; one without a row of its own is ready, and as its enqueue left it.
fn load_record(queue: &mut Queue, seq: u64, row: &Bytes) -> Result<()> {
    let record = Record::decode(row)?;
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
