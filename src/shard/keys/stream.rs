//! Streams as a log: added to, read, trimmed. Consumer groups are not served.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use std::collections::BTreeMap;
use std::fmt;

use super::args::Args;
use super::number::parse_u64;
use super::rows::{ElementRows, Rows};
use super::{Answer, Checked, Command, Database, Fault, SYNTAX, command, owned};
use crate::clock::UnixMs;
use crate::resp::reply::Reply;

pub(super) const COMMANDS: &[Command] = &[
    command("xadd", -5, add),
    command("xlen", 2, len),
    command("xrange", -4, |database, args| range(database, args, false)),
    command("xrevrange", -4, |database, args| range(database, args, true)),
    command("xdel", -3, del),
    command("xtrim", -4, trim),
    command("xread", -4, read),
];

const BAD_ID: &str = "ERR Invalid stream ID specified as stream command argument";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Id {
    ms: u64,
    seq: u64,
}

impl Id {
    const MIN: Id = Id { ms: 0, seq: 0 };
    const MAX: Id = Id { ms: u64::MAX, seq: u64::MAX };

    fn next(self) -> Option<Id> {
        match self.seq.checked_add(1) {
            Some(seq) => Some(Id { ms: self.ms, seq }),
            None => self.ms.checked_add(1).map(|ms| Id { ms, seq: 0 }),
        }
    }

    fn previous(self) -> Option<Id> {
        match self.seq.checked_sub(1) {
            Some(seq) => Some(Id { ms: self.ms, seq }),
            None => self.ms.checked_sub(1).map(|ms| Id { ms, seq: u64::MAX }),
        }
    }

    /// `ms-seq`, or `ms` alone with the seq that is given for it.
    fn parse(word: &[u8], seq: u64) -> Checked<Id> {
        let parts = match word.iter().position(|byte| *byte == b'-') {
            Some(at) => parse_u64(&word[..at]).zip(parse_u64(&word[at + 1..])),
            None => parse_u64(word).map(|ms| (ms, seq)),
        };
        parts.map(|(ms, seq)| Id { ms, seq }).ok_or(Fault::from(BAD_ID))
    }

    fn row(self) -> [u8; 16] {
        ((u128::from(self.ms) << 64) | u128::from(self.seq)).to_be_bytes()
    }

    fn reply(self) -> Reply {
        Reply::Bulk(Bytes::from(self.to_string()))
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.seq)
    }
}

#[derive(Debug)]
pub(super) struct Stream {
    id: u64,
    last: Id,
    /// Fields and values in turn.
    entries: BTreeMap<Id, Vec<Bytes>>,
}

impl Stream {
    pub fn new(id: u64) -> Stream {
        Stream { id, last: Id::MIN, entries: BTreeMap::new() }
    }

    pub fn id(&self) -> u64 {
        self.id
    }

    /// Writes what the key's own row holds of a stream.
    pub fn put_head(&self, row: &mut BytesMut) {
        row.put_slice(&self.last.row());
    }

    pub fn load_head(id: u64, head: &[u8]) -> Option<Stream> {
        Some(Stream { id, last: id_of(head)?, entries: BTreeMap::new() })
    }

    pub fn load(&mut self, element: &[u8], mut row: &[u8]) -> Option<()> {
        let mut fields = Vec::new();
        while !row.is_empty() {
            let len = row.try_get_u32().ok()? as usize;
            let (field, rest) = row.split_at_checked(len)?;
            fields.push(owned(field));
            row = rest;
        }
        self.entries.insert(id_of(element)?, fields);
        Some(())
    }

    /// Removes up to `rows_max` rows of a stream that no key has; how many more may be removed.
    pub fn bury(&mut self, rows: &mut Rows, rows_max: usize) -> usize {
        let mut left = rows_max;
        while left > 0 {
            let Some((id, _)) = self.entries.pop_first() else { break };
            rows.remove(self.id, &id.row());
            left -= 1;
        }
        left
    }

    fn add(&mut self, rows: &mut Rows, id: Id, fields: &[Bytes]) {
        let mut row = BytesMut::new();
        for field in fields {
            row.put_u32(field.len() as u32);
            row.put_slice(field);
        }
        rows.put(self.id, &id.row(), row.freeze());
        self.entries.insert(id, fields.iter().map(|field| owned(field)).collect());
        self.last = id;
    }

    fn remove(&mut self, rows: &mut Rows, id: Id) -> bool {
        let found = self.entries.remove(&id).is_some();
        if found {
            rows.remove(self.id, &id.row());
        }
        found
    }

    fn trim(&mut self, rows: &mut Rows, trim: &Trim) -> u64 {
        let mut removed = 0;
        while removed < trim.limit {
            let Some((first, _)) = self.entries.first_key_value() else { break };
            let first = *first;
            let is_over = match trim.to {
                TrimTo::Len(len) => self.entries.len() as u64 > len,
                TrimTo::Id(id) => first < id,
            };
            if !is_over {
                break;
            }
            self.remove(rows, first);
            removed += 1;
        }
        removed
    }
}

fn id_of(row: &[u8]) -> Option<Id> {
    let both = u128::from_be_bytes(row.try_into().ok()?);
    Some(Id { ms: (both >> 64) as u64, seq: both as u64 })
}

enum TrimTo {
    Len(u64),
    Id(Id),
}

struct Trim {
    to: TrimTo,
    limit: u64,
}

/// The options `MAXLEN|MINID [=|~] threshold` and `LIMIT n`, which come in any order and are judged together.
#[derive(Default)]
struct Trimming {
    to: Option<TrimTo>,
    is_approximate: bool,
    limit: Option<u64>,
}

impl Trimming {
    /// Reads one of the options; false when the next word is another.
    fn accept(&mut self, args: &mut Args<'_>) -> Checked<bool> {
        if args.accept_with("limit", 1) {
            self.limit = Some(match args.integer()? {
                limit @ 0.. => limit as u64,
                _ => return Err("ERR The LIMIT argument must be >= 0.".into()),
            });
            return Ok(true);
        }
        let by_len = args.accept_with("maxlen", 1);
        if !by_len && !args.accept_with("minid", 1) {
            return Ok(false);
        }
        if self.to.is_some() {
            return Err("ERR syntax error, MAXLEN and MINID options at the same time are not compatible".into());
        }
        self.is_approximate = args.accept_with("~", 1);
        if !self.is_approximate {
            args.accept_with("=", 1);
        }
        self.to = Some(match by_len {
            true => TrimTo::Len(match args.integer()? {
                len @ 0.. => len as u64,
                _ => return Err("ERR The MAXLEN argument must be >= 0.".into()),
            }),
            false => TrimTo::Id(Id::parse(args.next()?, 0)?),
        });
        Ok(true)
    }

    fn finish(self) -> Checked<Option<Trim>> {
        if self.to.is_none() && self.limit.is_some_and(|limit| limit > 0) {
            return Err("ERR syntax error, LIMIT cannot be used without specifying a trimming strategy".into());
        }
        if self.limit.is_some() && !self.is_approximate {
            return Err("ERR syntax error, LIMIT cannot be used without the special ~ option".into());
        }
        // Nothing is gained here by trimming roughly, so it is done exactly, up to what is allowed.
        let limit = self.limit.filter(|limit| *limit > 0).unwrap_or(u64::MAX);
        Ok(self.to.map(|to| Trim { to, limit }))
    }
}

/// The id of a new entry as it was asked for.
enum NewId {
    Auto,
    /// This millisecond, any number in it.
    Within(u64),
    Exact(Id),
}

fn new_id(word: &[u8]) -> Checked<NewId> {
    if word == b"*" {
        return Ok(NewId::Auto);
    }
    if let Some(ms) = word.strip_suffix(b"-*") {
        return parse_u64(ms).map(NewId::Within).ok_or(Fault::from(BAD_ID));
    }
    Id::parse(word, 0).map(NewId::Exact)
}

/// The id that comes after `last`, or `None` when what was asked for does not.
fn choose(id: &NewId, last: Id, now: UnixMs) -> Option<Id> {
    let after = last.next();
    match *id {
        NewId::Auto if now > last.ms => Some(Id { ms: now, seq: 0 }),
        NewId::Auto => after,
        NewId::Within(ms) if ms > last.ms => Some(Id { ms, seq: 0 }),
        NewId::Within(ms) => after.filter(|next| next.ms == ms),
        NewId::Exact(id) => Some(id).filter(|id| *id > last),
    }
}

fn add(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let (mut creates, mut trimming) = (true, Trimming::default());
    loop {
        if args.accept("nomkstream") {
            creates = false;
        } else if !trimming.accept(&mut args)? {
            break;
        }
    }
    // The last option may have been the last word.
    let id = args.next().ok().map(|word| new_id(word)).transpose()?;
    let trim = trimming.finish()?;
    let fields = args.rest();
    let Some(id) = id.filter(|_| !fields.is_empty() && fields.len().is_multiple_of(2)) else {
        return Err(super::wrong_arity(args.name));
    };
    if matches!(id, NewId::Exact(Id::MIN)) {
        return Err("ERR The ID specified in XADD must be greater than 0-0".into());
    }
    let now = database.now;
    let stream = database.read::<Stream>(key)?;
    if stream.is_none() && !creates {
        return Ok(Reply::Null);
    }
    let last = stream.map_or(Id::MIN, |stream| stream.last);
    if last == Id::MAX {
        return Err("ERR The stream has exhausted the last possible ID, unable to add more items".into());
    }
    let id = choose(&id, last, now)
        .ok_or(Fault::from("ERR The ID specified in XADD is equal or smaller than the target stream top item"))?;
    let (stream, rows) = database.write_or_create::<Stream>(key)?;
    stream.add(rows, id, fields);
    if let Some(trim) = &trim {
        stream.trim(rows, trim);
    }
    database.settle(key);
    Ok(id.reply())
}

fn len(database: &mut Database, mut args: Args<'_>) -> Answer {
    Ok(Reply::count(database.read::<Stream>(args.next()?)?.map_or(0, |stream| stream.entries.len()) as u64))
}

fn entry_reply((id, fields): (&Id, &Vec<Bytes>)) -> Reply {
    Reply::Array(vec![id.reply(), Reply::Array(fields.iter().cloned().map(Reply::Bulk).collect())])
}

/// One end of a range: an id, `-`, `+`, or an id behind `(`, which is not part of it.
fn bound(word: &[u8], is_start: bool) -> Checked<Id> {
    let missing_seq = if is_start { 0 } else { u64::MAX };
    match word {
        b"-" => Ok(Id::MIN),
        b"+" => Ok(Id::MAX),
        [b'(', id @ ..] => {
            let id = Id::parse(id, missing_seq)?;
            let (inside, complaint) = match is_start {
                true => (id.next(), "ERR invalid start ID for the interval"),
                false => (id.previous(), "ERR invalid end ID for the interval"),
            };
            inside.ok_or(complaint.into())
        }
        id => Id::parse(id, missing_seq),
    }
}

fn range(database: &mut Database, mut args: Args<'_>, reversed: bool) -> Answer {
    let key = args.next()?;
    let (first, second) = (args.next()?, args.next()?);
    let (start, stop) = if reversed { (second, first) } else { (first, second) };
    let (start, stop) = (bound(start, true)?, bound(stop, false)?);
    let mut count = None;
    while !args.is_empty() {
        if !args.accept_with("count", 1) {
            return Err(SYNTAX.into());
        }
        count = Some(args.integer()?.max(0) as usize);
    }
    let Some(stream) = database.read::<Stream>(key)? else { return Ok(Reply::Array(Vec::new())) };
    if count == Some(0) {
        return Ok(Reply::NullArray);
    }
    if start > stop {
        return Ok(Reply::Array(Vec::new()));
    }
    let entries = stream.entries.range(start..=stop);
    let count = count.unwrap_or(usize::MAX);
    Ok(Reply::Array(match reversed {
        true => entries.rev().take(count).map(entry_reply).collect(),
        false => entries.take(count).map(entry_reply).collect(),
    }))
}

fn del(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let Some((stream, rows)) = database.write::<Stream>(key)? else { return Ok(Reply::Integer(0)) };
    let ids = args.rest().iter().map(|word| Id::parse(word, 0)).collect::<Checked<Vec<Id>>>()?;
    let removed = ids.into_iter().filter(|id| stream.remove(rows, *id)).count();
    if removed > 0 {
        database.settle(key);
    }
    Ok(Reply::count(removed as u64))
}

fn trim(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let mut trimming = Trimming::default();
    while !args.is_empty() {
        if !trimming.accept(&mut args)? {
            return Err(SYNTAX.into());
        }
    }
    let Some(trim) = trimming.finish()? else { return Err(SYNTAX.into()) };
    let Some((stream, rows)) = database.write::<Stream>(key)? else { return Ok(Reply::Integer(0)) };
    let removed = stream.trim(rows, &trim);
    if removed > 0 {
        database.settle(key);
    }
    Ok(Reply::count(removed))
}

fn read(database: &mut Database, mut args: Args<'_>) -> Answer {
    let mut count = usize::MAX;
    loop {
        if args.accept_with("count", 1) {
            count = match args.integer()? {
                count @ 1.. => count as usize,
                _ => usize::MAX,
            };
        } else if args.accept_with("block", 1) {
            if args.integer_or("ERR timeout is not an integer or out of range")? < 0 {
                return Err("ERR timeout is negative".into());
            }
        } else if args.accept_with("streams", 1) {
            break;
        } else {
            return Err(SYNTAX.into());
        }
    }
    if args.len() % 2 == 1 {
        return Err("ERR Unbalanced XREAD list of streams: for each stream key an ID or '$' must be specified.".into());
    }
    let (keys, ids) = args.rest().split_at(args.len() / 2);
    let mut found = Vec::new();
    let mut wanted = Vec::new();
    for (key, word) in keys.iter().zip(ids) {
        let stream = database.read::<Stream>(key)?;
        wanted.push(match &word[..] {
            b"$" => stream.map_or(Id::MIN, |stream| stream.last),
            id => Id::parse(id, 0)?,
        });
    }
    for (key, after) in keys.iter().zip(wanted) {
        let (Some(stream), Some(from)) = (database.read::<Stream>(key)?, after.next()) else { continue };
        let entries: Vec<Reply> = stream.entries.range(from..).take(count).map(entry_reply).collect();
        if !entries.is_empty() {
            found.push((Reply::Bulk(key.clone()), Reply::Array(entries)));
        }
    }
    Ok(match (found.is_empty(), database.is_resp3()) {
        (true, _) => Reply::NullArray,
        (false, true) => Reply::Map(found),
        (false, false) => {
            Reply::Array(found.into_iter().map(|(key, entries)| Reply::Array(vec![key, entries])).collect())
        }
    })
}
