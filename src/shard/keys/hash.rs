//! Hashes. Fields are told in the order in which they were added while the hash is small, as Redis tells them.

use bytes::Bytes;

use super::args::Args;
use super::generic::{Page, scan_page};
use super::number::{add_floats, parse_f64, parse_i64};
use super::rows::{ElementRows, Rows};
use super::set::{pick_places, sample_count_with};
use super::string::{NOT_A_FLOAT, OVERFLOW};
use super::{Answer, Command, Database, Fault, Map, check_name, command, owned};
use crate::resp::reply::Reply;

pub(super) const COMMANDS: &[Command] = &[
    command("hset", -4, |database, args| set(database, args, true)),
    command("hmset", -4, |database, args| set(database, args, false)),
    command("hsetnx", 4, setnx),
    command("hget", 3, get),
    command("hmget", -3, mget),
    command("hgetall", 2, getall),
    command("hkeys", 2, |database, args| all(database, args, |(field, _)| field)),
    command("hvals", 2, |database, args| all(database, args, |(_, value)| value)),
    command("hlen", 2, len),
    command("hstrlen", 3, strlen),
    command("hexists", 3, exists),
    command("hdel", -3, del),
    command("hincrby", 4, incrby),
    command("hincrbyfloat", 4, incrbyfloat),
    command("hrandfield", -2, randfield),
    command("hscan", -3, scan),
];

/// Up to this many fields keep their order when one is removed, which costs a move of those behind it.
const ORDERED_FIELDS_MAX: usize = 128;

#[derive(Debug)]
pub(super) struct Hash {
    id: u64,
    fields: Map<Bytes>,
}

impl Hash {
    pub fn new(id: u64) -> Hash {
        Hash { id, fields: Map::default() }
    }

    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn len(&self) -> usize {
        self.fields.len()
    }

    pub fn load(&mut self, element: &[u8], row: &[u8]) -> Option<()> {
        self.fields.insert(owned(element), owned(row));
        Some(())
    }

    /// Removes up to `rows_max` rows of a hash that no key has; how many more may be removed.
    pub fn bury(&mut self, rows: &mut Rows, rows_max: usize) -> usize {
        let mut left = rows_max;
        while left > 0 {
            let Some((field, _)) = self.fields.pop() else { break };
            rows.remove(self.id, &field);
            left -= 1;
        }
        left
    }

    /// Whether the field is new.
    fn set(&mut self, rows: &mut Rows, field: &[u8], value: Bytes) -> bool {
        rows.put(self.id, field, value.clone());
        match self.fields.get_mut(field) {
            Some(old) => {
                *old = value;
                false
            }
            None => self.fields.insert(owned(field), value).is_none(),
        }
    }

    fn remove(&mut self, rows: &mut Rows, field: &[u8]) -> bool {
        let found = match self.fields.len() {
            0..=ORDERED_FIELDS_MAX => self.fields.shift_remove(field),
            _ => self.fields.swap_remove(field),
        };
        if found.is_some() {
            rows.remove(self.id, field);
        }
        found.is_some()
    }
}

fn set(database: &mut Database, mut args: Args<'_>, counts: bool) -> Answer {
    let key = args.next()?;
    if args.len() % 2 == 1 {
        return Err(super::wrong_arity(args.name));
    }
    args.rest().chunks_exact(2).try_for_each(|pair| check_name(&pair[0]))?;
    let (hash, rows) = database.write_or_create::<Hash>(key)?;
    let added = args.rest().chunks_exact(2).filter(|pair| hash.set(rows, &pair[0], owned(&pair[1]))).count();
    database.settle(key);
    Ok(if counts { Reply::count(added as u64) } else { Reply::OK })
}

fn setnx(database: &mut Database, mut args: Args<'_>) -> Answer {
    let (key, field, value) = (args.next()?, args.next()?, args.next()?);
    check_name(field)?;
    if database.read::<Hash>(key)?.is_some_and(|hash| hash.fields.contains_key(field)) {
        return Ok(Reply::Integer(0));
    }
    let (hash, rows) = database.write_or_create::<Hash>(key)?;
    hash.set(rows, field, owned(value));
    database.settle(key);
    Ok(Reply::Integer(1))
}

fn get(database: &mut Database, mut args: Args<'_>) -> Answer {
    let (key, field) = (args.next()?, args.next()?);
    Ok(value_of(database.read::<Hash>(key)?, field))
}

fn value_of(hash: Option<&Hash>, field: &[u8]) -> Reply {
    hash.and_then(|hash| hash.fields.get(field)).cloned().map_or(Reply::Null, Reply::Bulk)
}

fn mget(database: &mut Database, mut args: Args<'_>) -> Answer {
    let hash = database.read::<Hash>(args.next()?)?;
    Ok(Reply::Array(args.rest().iter().map(|field| value_of(hash, field)).collect()))
}

fn getall(database: &mut Database, mut args: Args<'_>) -> Answer {
    let pairs = database.read::<Hash>(args.next()?)?.into_iter().flat_map(|hash| &hash.fields);
    Ok(Reply::Map(pairs.map(|(field, value)| (Reply::Bulk(field.clone()), Reply::Bulk(value.clone()))).collect()))
}

fn all(database: &mut Database, mut args: Args<'_>, which: for<'a> fn((&'a Bytes, &'a Bytes)) -> &'a Bytes) -> Answer {
    let hash = database.read::<Hash>(args.next()?)?;
    let pairs = hash.into_iter().flat_map(|hash| &hash.fields);
    Ok(Reply::Array(pairs.map(|pair| Reply::Bulk(which(pair).clone())).collect()))
}

fn len(database: &mut Database, mut args: Args<'_>) -> Answer {
    Ok(Reply::count(database.read::<Hash>(args.next()?)?.map_or(0, Hash::len) as u64))
}

fn strlen(database: &mut Database, mut args: Args<'_>) -> Answer {
    let hash = database.read::<Hash>(args.next()?)?;
    let field = args.next()?;
    Ok(Reply::count(hash.and_then(|hash| hash.fields.get(field)).map_or(0, |value| value.len()) as u64))
}

fn exists(database: &mut Database, mut args: Args<'_>) -> Answer {
    let hash = database.read::<Hash>(args.next()?)?;
    let field = args.next()?;
    Ok(Reply::Integer(i64::from(hash.is_some_and(|hash| hash.fields.contains_key(field)))))
}

fn del(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let Some((hash, rows)) = database.write::<Hash>(key)? else { return Ok(Reply::Integer(0)) };
    let removed = args.rest().iter().filter(|field| hash.remove(rows, field)).count();
    if removed > 0 {
        database.settle(key);
    }
    Ok(Reply::count(removed as u64))
}

fn incrby(database: &mut Database, mut args: Args<'_>) -> Answer {
    let (key, field) = (args.next()?, args.next()?);
    check_name(field)?;
    let by = args.integer()?;
    let old = match database.read::<Hash>(key)?.and_then(|hash| hash.fields.get(field)) {
        Some(text) => parse_i64(text).ok_or(Fault::from("ERR hash value is not an integer"))?,
        None => 0,
    };
    let sum = old.checked_add(by).ok_or(Fault::from(OVERFLOW))?;
    let (hash, rows) = database.write_or_create::<Hash>(key)?;
    hash.set(rows, field, Bytes::from(sum.to_string()));
    database.settle(key);
    Ok(Reply::Integer(sum))
}

fn incrbyfloat(database: &mut Database, mut args: Args<'_>) -> Answer {
    let (key, field, by) = (args.next()?, args.next()?, args.next()?);
    check_name(field)?;
    match parse_f64(by) {
        None => return Err(NOT_A_FLOAT.into()),
        Some(by) if by.is_infinite() => return Err("ERR value is NaN or Infinity".into()),
        Some(_) => {}
    }
    let old = database.read::<Hash>(key)?.and_then(|hash| hash.fields.get(field)).cloned();
    let old = old.unwrap_or(Bytes::from_static(b"0"));
    if parse_f64(&old).is_none() {
        return Err("ERR hash value is not a float".into());
    }
    let sum = add_floats(&old, by).ok_or(Fault::from("ERR increment would produce NaN or Infinity"))?;
    let sum = Bytes::from(sum);
    let (hash, rows) = database.write_or_create::<Hash>(key)?;
    hash.set(rows, field, sum.clone());
    database.settle(key);
    Ok(Reply::Bulk(sum))
}

fn randfield(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let (count, with_values) = sample_count_with(&mut args, "withvalues")?;
    let (is_resp3, mut dice) = (database.is_resp3(), database.dice());
    let picked: Option<Vec<(Bytes, Bytes)>> = database.read::<Hash>(key)?.map(|hash| {
        let places = pick_places(&mut dice, hash.len(), count.unwrap_or(1));
        let pairs = places.into_iter().filter_map(|place| hash.fields.get_index(place));
        pairs.map(|(field, value)| (field.clone(), value.clone())).collect()
    });
    let bulk = Reply::Bulk;
    Ok(match (picked, count) {
        (None, None) => Reply::Null,
        (None, Some(_)) => Reply::Array(Vec::new()),
        (Some(pairs), None) => pairs.into_iter().next().map_or(Reply::Null, |(field, _)| bulk(field)),
        (Some(pairs), _) if !with_values => Reply::Array(pairs.into_iter().map(|(field, _)| bulk(field)).collect()),
        (Some(pairs), _) => pairs_reply(pairs.into_iter().map(|(field, value)| (field, bulk(value))), is_resp3),
    })
}

/// Elements with what belongs to each: arrays of two in RESP3, one flat array in RESP2.
pub(super) fn pairs_reply(pairs: impl Iterator<Item = (Bytes, Reply)>, is_resp3: bool) -> Reply {
    let flat = |(name, value)| [Reply::Bulk(name), value];
    match is_resp3 {
        true => Reply::Array(pairs.map(|pair| Reply::Array(flat(pair).to_vec())).collect()),
        false => Reply::Array(pairs.flat_map(flat).collect()),
    }
}

fn scan(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let page = Page::parse(&mut args, false)?;
    let empty = Map::default();
    let fields = database.read::<Hash>(key)?.map_or(&empty, |hash| &hash.fields);
    Ok(scan_page(fields, &page, |found, field, value| {
        found.extend([Reply::Bulk(field.clone()), Reply::Bulk(value.clone())]);
    }))
}
