//! What of the keys is written down: a row for each key and a row for each element of a collection.
//!
//! ```text
//! 1 <key>           → kind, id (8), end (8, 0: none), then of a string its bytes, of a stream its last id and counts
//! 2 <id> <element>  → list: element is the place, the row its bytes    hash: the field, its value    set: the member
//!                     zset: the member, its score                      stream: the entry's id, its fields
//! ```
//!
//! A collection has a number of its own, so removing or renaming a key is one row however long it is; the rows of a number
//! that no key has any more are removed bit by bit. Numbers are big-endian, so that rows lie in the order of what they
//! say. A new kind of value takes the next letter in [`put_key`](Rows::put_key) and an arm in [`Loading::row`].

use bytes::{BufMut, Bytes, BytesMut};
use std::collections::HashMap;

use super::hash::Hash;
use super::list::List;
use super::set::Set;
use super::stream::Stream;
use super::zset::Zset;
use super::{Database, Entry, Value};

const KEY: u8 = b'1';
const ELEMENT: u8 = b'2';

/// One row to be put, or without a value to be removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowChange {
    pub key: Bytes,
    pub value: Option<Bytes>,
}

/// The rows that differ from what is on disk. The last change of a row is the one that counts.
pub(super) struct Rows {
    changes: Option<HashMap<Bytes, Option<Bytes>>>,
}

/// Where a collection tells which of its elements changed.
pub(super) trait ElementRows {
    fn put(&mut self, id: u64, element: &[u8], value: Bytes);
    fn remove(&mut self, id: u64, element: &[u8]);
}

impl ElementRows for Rows {
    fn put(&mut self, id: u64, element: &[u8], value: Bytes) {
        if let Some(changes) = &mut self.changes {
            changes.insert(element_row(id, element), Some(value));
        }
    }

    fn remove(&mut self, id: u64, element: &[u8]) {
        if let Some(changes) = &mut self.changes {
            changes.insert(element_row(id, element), None);
        }
    }
}

impl Rows {
    /// Keeps nothing.
    pub(super) fn none() -> Rows {
        Rows { changes: None }
    }

    pub(super) fn are_kept(&self) -> bool {
        self.changes.is_some()
    }

    pub(super) fn take(&mut self) -> Vec<RowChange> {
        let changes = self.changes.as_mut().map(std::mem::take).unwrap_or_default();
        changes.into_iter().map(|(key, value)| RowChange { key, value }).collect()
    }

    pub(super) fn put_key(&mut self, key: &[u8], entry: &Entry) {
        let Some(changes) = &mut self.changes else { return };
        let mut row = BytesMut::new();
        row.put_u8(match entry.value {
            Value::String(_) => b's',
            Value::List(_) => b'l',
            Value::Hash(_) => b'h',
            Value::Set(_) => b'm',
            Value::Zset(_) => b'z',
            Value::Stream(_) => b'x',
        });
        row.put_u64(entry.value.id());
        row.put_u64(entry.expires.unwrap_or(0));
        match &entry.value {
            Value::String(text) => row.put_slice(text),
            Value::Stream(stream) => stream.put_head(&mut row),
            _ => {}
        }
        changes.insert(key_row(key), Some(row.freeze()));
    }

    pub(super) fn remove_key(&mut self, key: &[u8]) {
        if let Some(changes) = &mut self.changes {
            changes.insert(key_row(key), None);
        }
    }
}

fn key_row(key: &[u8]) -> Bytes {
    let mut row = BytesMut::with_capacity(1 + key.len());
    row.put_u8(KEY);
    row.put_slice(key);
    row.freeze()
}

fn element_row(id: u64, element: &[u8]) -> Bytes {
    let mut row = BytesMut::with_capacity(9 + element.len());
    row.put_u8(ELEMENT);
    row.put_u64(id);
    row.put_slice(element);
    row.freeze()
}

/// A database that is being read from its rows, which come in their order.
pub struct Loading {
    database: Database,
    by_id: HashMap<u64, Bytes>,
}

/// A row that does not say what rows say.
#[derive(Debug, PartialEq, Eq)]
pub struct BadRow;

impl Loading {
    pub fn new() -> Loading {
        let rows = Rows { changes: Some(HashMap::new()) };
        Loading { database: Database::new(rows), by_id: HashMap::new() }
    }

    pub fn row(&mut self, key: &[u8], value: &[u8]) -> Result<(), BadRow> {
        match key.split_first().ok_or(BadRow)? {
            (&KEY, name) => self.key(name, value),
            (&ELEMENT, rest) => {
                let (id, element) = take_u64(rest)?;
                self.element(id, element, value)
            }
            _ => Err(BadRow),
        }
    }

    fn key(&mut self, name: &[u8], row: &[u8]) -> Result<(), BadRow> {
        let (kind, rest) = row.split_first().ok_or(BadRow)?;
        let (id, rest) = take_u64(rest)?;
        let (end, rest) = take_u64(rest)?;
        let value = match kind {
            b's' => Value::String(Bytes::copy_from_slice(rest)),
            b'l' => Value::List(List::new(id)),
            b'h' => Value::Hash(Hash::new(id)),
            b'm' => Value::Set(Set::new(id)),
            b'z' => Value::Zset(Zset::new(id)),
            b'x' => Value::Stream(Stream::load_head(id, rest).ok_or(BadRow)?),
            _ => return Err(BadRow),
        };
        let name = Bytes::copy_from_slice(name);
        let expires = (end > 0).then_some(end);
        if id > 0 {
            self.by_id.insert(id, name.clone());
        }
        let database = &mut self.database;
        database.ids = database.ids.max(id);
        database.changes += 1;
        database.ends.extend(expires.map(|end| (end, name.clone())));
        database.keys.insert(name, Entry { value, expires, version: database.changes });
        Ok(())
    }

    fn element(&mut self, id: u64, element: &[u8], row: &[u8]) -> Result<(), BadRow> {
        self.database.ids = self.database.ids.max(id);
        let owner = self.by_id.get(&id).and_then(|key| self.database.keys.get_mut(key));
        let Some(entry) = owner else {
            // Its key was removed and the process ended before its rows were.
            self.database.rows.remove(id, element);
            return Ok(());
        };
        match &mut entry.value {
            Value::String(_) => None,
            Value::List(list) => list.load(element, row),
            Value::Hash(hash) => hash.load(element, row),
            Value::Set(set) => set.load(element),
            Value::Zset(zset) => zset.load(element, row),
            Value::Stream(stream) => stream.load(element, row),
        }
        .ok_or(BadRow)
    }

    /// The database. Rows that nobody owns any more leave with its first [`take_rows`](Database::take_rows).
    pub fn finish(self) -> Database {
        self.database
    }
}

impl Default for Loading {
    fn default() -> Self {
        Loading::new()
    }
}

fn take_u64(bytes: &[u8]) -> Result<(u64, &[u8]), BadRow> {
    let (head, rest) = bytes.split_first_chunk::<8>().ok_or(BadRow)?;
    Ok((u64::from_be_bytes(*head), rest))
}
