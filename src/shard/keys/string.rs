//! Strings, and the numbers in them.

use bytes::{Bytes, BytesMut};

use super::args::Args;
use super::list::index_range;
use super::number::{add_floats, parse_f64, parse_i64};
use super::{
    Answer, Checked, Command, Database, Fault, NOT_AN_INTEGER, STRING_BYTES_MAX, SYNTAX, Value, WRONG_TYPE, check_name,
    command, owned,
};
use crate::clock::UnixMs;
use crate::resp::reply::Reply;

pub(super) const COMMANDS: &[Command] = &[
    command("get", 2, |database, mut args| Ok(bulk(database.text(args.next()?)?))),
    command("set", -3, set),
    command("setnx", 3, setnx),
    command("setex", 4, |database, args| set_with_end(database, args, 1_000)),
    command("psetex", 4, |database, args| set_with_end(database, args, 1)),
    command("getset", 3, getset),
    command("getdel", 2, getdel),
    command("getex", -2, getex),
    command("getrange", 4, getrange),
    command("substr", 4, getrange),
    command("setrange", 4, setrange),
    command("strlen", 2, strlen),
    command("append", 3, append),
    command("incr", 2, |database, mut args| add(database, args.next()?, 1)),
    command("decr", 2, |database, mut args| add(database, args.next()?, -1)),
    command("incrby", 3, incrby),
    command("decrby", 3, decrby),
    command("incrbyfloat", 3, incrbyfloat),
    command("mget", -2, mget),
    command("mset", -3, |database, args| mset(database, args, false)),
    command("msetnx", -3, |database, args| mset(database, args, true)),
];

pub(super) const NOT_A_FLOAT: &str = "ERR value is not a valid float";
pub(super) const OVERFLOW: &str = "ERR increment or decrement would overflow";

impl Database {
    /// The string of a key.
    fn text(&mut self, key: &[u8]) -> Checked<Option<Bytes>> {
        match self.entry(key).map(|entry| &entry.value) {
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(WRONG_TYPE.into()),
            None => Ok(None),
        }
    }

    /// Replaces the string of a key and leaves its end as it is.
    fn rewrite(&mut self, key: &[u8], text: Bytes) -> Checked<()> {
        let expires = self.entry(key).and_then(|entry| entry.expires);
        self.put_string(key, text, expires)
    }
}

fn bulk(text: Option<Bytes>) -> Reply {
    text.map_or(Reply::Null, Reply::Bulk)
}

/// What `SET` and `GETEX` say about the end of a key.
enum Expiry {
    Untold,
    Keep,
    At(UnixMs),
}

/// Reads one option about the end of a key; `None` when the next word is another.
fn expiry(args: &mut Args<'_>, now: UnixMs) -> Checked<Option<Expiry>> {
    for (keyword, unit_ms, is_absolute) in
        [("ex", 1_000, false), ("px", 1, false), ("exat", 1_000, true), ("pxat", 1, true)]
    {
        if args.accept_with(keyword, 1) {
            return Ok(Some(Expiry::At(end_of(args, unit_ms, is_absolute, now)?)));
        }
    }
    Ok(None)
}

fn end_of(args: &mut Args<'_>, unit_ms: i64, is_absolute: bool, now: UnixMs) -> Checked<UnixMs> {
    let base = if is_absolute { 0 } else { now as i64 };
    let number = args.integer()?;
    let end = (number > 0).then_some(number).and_then(|number| number.checked_mul(unit_ms)?.checked_add(base));
    end.map(|end| end as UnixMs).ok_or(Fault::from(format!("ERR invalid expire time in '{}' command", args.name)))
}

fn set(database: &mut Database, mut args: Args<'_>) -> Answer {
    let (key, text) = (args.next()?, args.next()?);
    let (mut only_new, mut only_old, mut get) = (false, false, false);
    let mut end = Expiry::Untold;
    let mut options = args;
    // Redis reads all options before it judges the number in any of them.
    let mut told = None;
    while !options.is_empty() {
        let before = options;
        if !only_old && options.accept("nx") {
            only_new = true;
        } else if !only_new && options.accept("xx") {
            only_old = true;
        } else if options.accept("get") {
            get = true;
        } else if told.is_none() && options.accept("keepttl") {
            end = Expiry::Keep;
            told = Some(before);
        } else if told.is_none() && ["ex", "px", "exat", "pxat"].iter().any(|keyword| options.accept_with(keyword, 1)) {
            options.next()?;
            told = Some(before);
        } else {
            return Err(SYNTAX.into());
        }
    }
    if let Some(found) = told.map(|mut told| expiry(&mut told, database.now)).transpose()?.flatten() {
        end = found;
    }
    let old = if get { database.text(key)? } else { None };
    if (only_new || only_old) && database.exists(key) != only_old {
        return Ok(if get { bulk(old) } else { Reply::Null });
    }
    let kept = database.entry(key).and_then(|entry| entry.expires);
    let expires = match end {
        Expiry::Untold => None,
        Expiry::Keep => kept,
        Expiry::At(end) => Some(end),
    };
    database.put_string(key, owned(text), expires)?;
    Ok(if get { bulk(old) } else { Reply::OK })
}

fn setnx(database: &mut Database, mut args: Args<'_>) -> Answer {
    let (key, text) = (args.next()?, args.next()?);
    if database.exists(key) {
        return Ok(Reply::Integer(0));
    }
    database.put_string(key, owned(text), None)?;
    Ok(Reply::Integer(1))
}

fn set_with_end(database: &mut Database, mut args: Args<'_>, unit_ms: i64) -> Answer {
    let key = args.next()?;
    let end = end_of(&mut args, unit_ms, false, database.now)?;
    database.put_string(key, owned(args.next()?), Some(end))?;
    Ok(Reply::OK)
}

fn getset(database: &mut Database, mut args: Args<'_>) -> Answer {
    let (key, text) = (args.next()?, args.next()?);
    let old = database.text(key)?;
    database.put_string(key, owned(text), None)?;
    Ok(bulk(old))
}

fn getdel(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let old = database.text(key)?;
    database.remove(key);
    Ok(bulk(old))
}

fn getex(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let mut options = args;
    let mut end = Expiry::Untold;
    let mut persist = false;
    if options.accept("persist") {
        persist = true;
    } else if ["ex", "px", "exat", "pxat"].iter().any(|keyword| options.accept_with(keyword, 1)) {
        options.next()?;
    }
    options.end()?;
    let Some(text) = database.text(key)? else { return Ok(Reply::Null) };
    if let Some(found) = expiry(&mut args, database.now)? {
        end = found;
    }
    match end {
        Expiry::At(end) if end <= database.now => drop(database.remove(key)),
        Expiry::At(end) => database.set_end(key, Some(end)),
        _ if persist && database.entry(key).is_some_and(|entry| entry.expires.is_some()) => database.set_end(key, None),
        _ => {}
    }
    Ok(Reply::Bulk(text))
}

fn getrange(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let (start, stop) = (args.integer()?, args.integer()?);
    let text = database.text(key)?.unwrap_or_default();
    // Two negative ends in the wrong order are nothing, before they are cut to the length of the string.
    if start < 0 && stop < 0 && start > stop {
        return Ok(Reply::Bulk(Bytes::new()));
    }
    let stop = if stop < 0 { stop.saturating_add(text.len() as i64).max(0) } else { stop };
    Ok(Reply::Bulk(text.slice(index_range(start, stop, text.len()))))
}

fn setrange(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let offset = args.integer()?;
    if offset < 0 {
        return Err("ERR offset is out of range".into());
    }
    let part = args.next()?;
    let old = database.text(key)?.unwrap_or_default();
    if part.is_empty() {
        return Ok(Reply::count(old.len() as u64));
    }
    let offset = offset as usize;
    check_len(offset, part.len())?;
    let mut text = BytesMut::from(&old[..]);
    text.resize(text.len().max(offset + part.len()), 0);
    text[offset..offset + part.len()].copy_from_slice(part);
    let len = text.len() as u64;
    database.rewrite(key, text.freeze())?;
    Ok(Reply::count(len))
}

fn check_len(len: usize, more: usize) -> Checked<()> {
    match len.checked_add(more) {
        Some(sum) if sum <= STRING_BYTES_MAX => Ok(()),
        _ => Err("ERR string exceeds maximum allowed size (proto-max-bulk-len)".into()),
    }
}

fn strlen(database: &mut Database, mut args: Args<'_>) -> Answer {
    Ok(Reply::count(database.text(args.next()?)?.map_or(0, |text| text.len()) as u64))
}

fn append(database: &mut Database, mut args: Args<'_>) -> Answer {
    let (key, part) = (args.next()?, args.next()?);
    let old = database.text(key)?.unwrap_or_default();
    check_len(old.len(), part.len())?;
    let mut text = BytesMut::with_capacity(old.len() + part.len());
    text.extend_from_slice(&old);
    text.extend_from_slice(part);
    let len = text.len() as u64;
    database.rewrite(key, text.freeze())?;
    Ok(Reply::count(len))
}

fn incrby(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let by = args.integer()?;
    add(database, key, by)
}

fn decrby(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let by = args.integer()?.checked_neg().ok_or(Fault::from("ERR decrement would overflow"))?;
    add(database, key, by)
}

fn add(database: &mut Database, key: &[u8], by: i64) -> Answer {
    let old = match database.text(key)? {
        Some(text) => parse_i64(&text).ok_or(Fault::from(NOT_AN_INTEGER))?,
        None => 0,
    };
    let sum = old.checked_add(by).ok_or(Fault::from(OVERFLOW))?;
    database.rewrite(key, Bytes::from(sum.to_string()))?;
    Ok(Reply::Integer(sum))
}

fn incrbyfloat(database: &mut Database, mut args: Args<'_>) -> Answer {
    let (key, by) = (args.next()?, args.next()?);
    let old = database.text(key)?.unwrap_or(Bytes::from_static(b"0"));
    if parse_f64(&old).is_none() || parse_f64(by).is_none() {
        return Err(NOT_A_FLOAT.into());
    }
    let sum = add_floats(&old, by).ok_or(Fault::from("ERR increment would produce NaN or Infinity"))?;
    let sum = Bytes::from(sum);
    database.rewrite(key, sum.clone())?;
    Ok(Reply::Bulk(sum))
}

fn mget(database: &mut Database, args: Args<'_>) -> Answer {
    // What holds no string is null here and no error.
    Ok(Reply::Array(args.rest().iter().map(|key| bulk(database.text(key).unwrap_or(None))).collect()))
}

fn mset(database: &mut Database, args: Args<'_>, only_new: bool) -> Answer {
    if args.len() % 2 == 1 {
        return Err(super::wrong_arity(args.name));
    }
    let pairs = args.rest().chunks_exact(2);
    if only_new && pairs.clone().any(|pair| database.exists(&pair[0])) {
        return Ok(Reply::Integer(0));
    }
    // All or none.
    pairs.clone().try_for_each(|pair| check_name(&pair[0]))?;
    for pair in pairs {
        database.put_string(&pair[0], owned(&pair[1]), None)?;
    }
    Ok(if only_new { Reply::Integer(1) } else { Reply::OK })
}
