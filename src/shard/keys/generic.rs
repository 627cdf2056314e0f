//! The commands on keys of any kind, and `SCAN` with its likes.
//!
//! A scan walks places from the last to the first, and its cursor is how many are left. What is added meanwhile is put at
//! the end, and a removal moves the last element into the gap, so every element that is there throughout is told.

use bytes::Bytes;
use rand::Rng;

use super::args::Args;
use super::{
    Answer, Checked, Command, Database, Entry, Fault, Map, NO_SUCH_KEY, NOT_AN_INTEGER, SYNTAX, check_name, command,
};
use crate::clock::UnixMs;
use crate::resp::glob;
use crate::resp::reply::Reply;

pub(super) const COMMANDS: &[Command] = &[
    command("del", -2, del),
    command("unlink", -2, del),
    command("exists", -2, exists),
    command("touch", -2, exists),
    command("type", 2, kind),
    command("expire", -3, |database, args| expire(database, args, 1_000, false)),
    command("pexpire", -3, |database, args| expire(database, args, 1, false)),
    command("expireat", -3, |database, args| expire(database, args, 1_000, true)),
    command("pexpireat", -3, |database, args| expire(database, args, 1, true)),
    command("ttl", 2, |database, args| end(database, args, |end, now| (end.saturating_sub(now) + 500) / 1_000)),
    command("pttl", 2, |database, args| end(database, args, |end, now| end.saturating_sub(now))),
    command("expiretime", 2, |database, args| end(database, args, |end, _| (end + 500) / 1_000)),
    command("pexpiretime", 2, |database, args| end(database, args, |end, _| end)),
    command("persist", 2, persist),
    command("rename", 3, |database, args| rename(database, args, false)),
    command("renamenx", 3, |database, args| rename(database, args, true)),
    command("scan", -2, scan),
    command("keys", 2, keys),
    command("randomkey", 1, random_key),
    command("dbsize", 1, size),
];

/// How many keys `RANDOMKEY` looks at before it takes what comes first.
const RANDOM_TRIES: usize = 100;

fn del(database: &mut Database, args: Args<'_>) -> Answer {
    let removed = args.rest().iter().filter(|key| database.exists(key) && database.remove(key)).count();
    Ok(Reply::count(removed as u64))
}

fn exists(database: &mut Database, args: Args<'_>) -> Answer {
    Ok(Reply::count(args.rest().iter().filter(|key| database.exists(key)).count() as u64))
}

fn kind(database: &mut Database, mut args: Args<'_>) -> Answer {
    Ok(Reply::Simple(database.entry(args.next()?).map_or("none", |entry| entry.value.type_name())))
}

fn expire(database: &mut Database, mut args: Args<'_>, unit_ms: i64, is_absolute: bool) -> Answer {
    let key = args.next()?;
    let number_word = args.next()?;
    let (mut nx, mut xx, mut gt, mut lt) = (false, false, false, false);
    while !args.is_empty() {
        match () {
            () if args.accept("nx") => nx = true,
            () if args.accept("xx") => xx = true,
            () if args.accept("gt") => gt = true,
            () if args.accept("lt") => lt = true,
            () => return Err(format!("ERR Unsupported option {}", String::from_utf8_lossy(args.next()?)).into()),
        }
    }
    if nx && (xx || gt || lt) {
        return Err("ERR NX and XX, GT or LT options at the same time are not compatible".into());
    }
    if gt && lt {
        return Err("ERR GT and LT options at the same time are not compatible".into());
    }
    let number = super::number::parse_i64(number_word).ok_or(Fault::from(NOT_AN_INTEGER))?;
    let base = if is_absolute { 0 } else { database.now as i64 };
    let end = number.checked_mul(unit_ms).and_then(|end| end.checked_add(base));
    let end = end.ok_or(Fault::from(format!("ERR invalid expire time in '{}' command", args.name)))?;
    let now = database.now;
    let Some(entry) = database.entry(key) else { return Ok(Reply::Integer(0)) };
    let old = entry.expires.map(|end| end as i64);
    let is_refused = (nx && old.is_some())
        || (xx && old.is_none())
        // A key without an end counts as one that ends never.
        || (gt && old.is_none_or(|old| end <= old))
        || (lt && old.is_some_and(|old| end >= old));
    if is_refused {
        return Ok(Reply::Integer(0));
    }
    match u64::try_from(end) {
        Ok(end) if end > now => database.set_end(key, Some(end)),
        _ => drop(database.remove(key)),
    }
    Ok(Reply::Integer(1))
}

/// -2 without a key, -1 without an end, else what is made of the end.
fn end(database: &mut Database, mut args: Args<'_>, told: fn(UnixMs, UnixMs) -> u64) -> Answer {
    let now = database.now;
    Ok(match database.entry(args.next()?) {
        None => Reply::Integer(-2),
        Some(Entry { expires: None, .. }) => Reply::Integer(-1),
        Some(Entry { expires: Some(end), .. }) => Reply::count(told(*end, now)),
    })
}

fn persist(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    if database.entry(key).is_none_or(|entry| entry.expires.is_none()) {
        return Ok(Reply::Integer(0));
    }
    database.set_end(key, None);
    Ok(Reply::Integer(1))
}

fn rename(database: &mut Database, mut args: Args<'_>, only_new: bool) -> Answer {
    let (from, to) = (args.next()?, args.next()?);
    if !database.exists(from) {
        return Err(NO_SUCH_KEY.into());
    }
    let reply = |done| if only_new { Reply::Integer(i64::from(done)) } else { Reply::OK };
    if from == to {
        return Ok(reply(false));
    }
    check_name(to)?;
    if only_new && database.exists(to) {
        return Ok(reply(false));
    }
    if let Some((value, expires)) = database.detach(from) {
        database.put(to, value, expires);
    }
    Ok(reply(true))
}

fn keys(database: &mut Database, mut args: Args<'_>) -> Answer {
    let pattern = args.next()?;
    let found = database.keys.iter().filter(|(key, entry)| is_alive(database, entry) && glob::matches(pattern, key));
    Ok(Reply::Array(found.map(|(key, _)| Reply::Bulk(key.clone())).collect()))
}

fn is_alive(database: &Database, entry: &Entry) -> bool {
    entry.expires.is_none_or(|end| end > database.now)
}

fn random_key(database: &mut Database, _: Args<'_>) -> Answer {
    for _ in 0..RANDOM_TRIES {
        if database.keys.is_empty() {
            return Ok(Reply::Null);
        }
        let place = database.random.random_range(0..database.keys.len());
        match database.keys.get_index(place).map(|(key, _)| key.clone()) {
            Some(key) if database.exists(&key) => return Ok(Reply::Bulk(key)),
            _ => {}
        }
    }
    let alive = database.keys.iter().find(|(_, entry)| is_alive(database, entry));
    Ok(alive.map_or(Reply::Null, |(key, _)| Reply::Bulk(key.clone())))
}

fn size(database: &mut Database, _: Args<'_>) -> Answer {
    Ok(Reply::count(database.keys.len() as u64))
}

fn scan(database: &mut Database, mut args: Args<'_>) -> Answer {
    let page = Page::parse(&mut args, true)?;
    Ok(scan_page(&database.keys, &page, |found, key, entry| {
        let is_kind = page.kind.is_none_or(|kind| kind.eq_ignore_ascii_case(entry.value.type_name().as_bytes()));
        if is_kind && is_alive(database, entry) {
            found.push(Reply::Bulk(key.clone()));
        }
    }))
}

/// What a scan asks for.
pub(super) struct Page<'a> {
    cursor: u64,
    count: usize,
    pattern: Option<&'a Bytes>,
    kind: Option<&'a Bytes>,
}

impl<'a> Page<'a> {
    pub fn parse(args: &mut Args<'a>, of_keys: bool) -> Checked<Page<'a>> {
        let cursor = super::number::parse_u64(args.next()?).ok_or(Fault::from("ERR invalid cursor"))?;
        let mut page = Page { cursor, count: 10, pattern: None, kind: None };
        while !args.is_empty() {
            if args.accept_with("count", 1) {
                let count = args.integer()?;
                if count < 1 {
                    return Err(SYNTAX.into());
                }
                page.count = count as usize;
            } else if args.accept_with("match", 1) {
                page.pattern = Some(args.next()?);
            } else if of_keys && args.accept_with("type", 1) {
                page.kind = Some(args.next()?);
            } else {
                return Err(SYNTAX.into());
            }
        }
        Ok(page)
    }
}

/// One page of a scan: the next cursor and what `tell` made of the elements that match.
pub(super) fn scan_page<V>(all: &Map<V>, page: &Page<'_>, mut tell: impl FnMut(&mut Vec<Reply>, &Bytes, &V)) -> Reply {
    let left = match usize::try_from(page.cursor) {
        Ok(0) => all.len(),
        Ok(left) => left.min(all.len()),
        Err(_) => all.len(),
    };
    let next = left.saturating_sub(page.count);
    let mut found = Vec::new();
    for place in (next..left).rev() {
        let Some((name, value)) = all.get_index(place) else { continue };
        if page.pattern.is_none_or(|pattern| glob::matches(pattern, name)) {
            tell(&mut found, name, value);
        }
    }
    Reply::Array(vec![Reply::Bulk(Bytes::from(next.to_string())), Reply::Array(found)])
}
