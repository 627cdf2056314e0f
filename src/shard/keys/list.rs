//! Lists, and the blocking commands on them as `MULTI` answers them: at once.
//!
//! An element has a place, a number that only has to be larger than that of the element before it. So a push or a pop at
//! either end and a removal anywhere touch one row; an insertion moves only the neighbours that stand too close.

use bytes::Bytes;
use std::collections::VecDeque;

use super::args::Args;
use super::rows::{ElementRows, Rows};
use super::{Answer, Checked, Command, Database, NO_SUCH_KEY, SYNTAX, check_name, command, owned};
use crate::resp::reply::Reply;

pub(super) const COMMANDS: &[Command] = &[
    command("lpush", -3, |database, args| push(database, args, End::Left, true)),
    command("rpush", -3, |database, args| push(database, args, End::Right, true)),
    command("lpushx", -3, |database, args| push(database, args, End::Left, false)),
    command("rpushx", -3, |database, args| push(database, args, End::Right, false)),
    command("lpop", -2, |database, args| pop(database, args, End::Left)),
    command("rpop", -2, |database, args| pop(database, args, End::Right)),
    command("llen", 2, len),
    command("lrange", 4, range),
    command("lindex", 3, index),
    command("lset", 4, set),
    command("linsert", 5, insert),
    command("lrem", 4, remove),
    command("ltrim", 4, trim),
    command("lpos", -3, position),
    command("lmove", 5, lmove),
    command("rpoplpush", 3, |database, args| rpoplpush(database, args, false)),
    command("lmpop", -4, |database, args| mpop(database, args, false)),
    command("blpop", -3, |database, args| blocking_pop(database, args, End::Left)),
    command("brpop", -3, |database, args| blocking_pop(database, args, End::Right)),
    command("blmove", 6, blmove),
    command("brpoplpush", 4, |database, args| rpoplpush(database, args, true)),
    command("blmpop", -5, |database, args| mpop(database, args, true)),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Left,
    Right,
}

#[derive(Debug)]
pub(super) struct List {
    id: u64,
    /// By place, which grows from left to right.
    items: VecDeque<(i64, Bytes)>,
}

impl List {
    pub fn new(id: u64) -> List {
        List { id, items: VecDeque::new() }
    }

    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn len(&self) -> usize {
        self.items.len()
    }

    pub fn load(&mut self, element: &[u8], row: &[u8]) -> Option<()> {
        let place = u64::from_be_bytes(element.try_into().ok()?);
        self.items.push_back(((place ^ SIGN) as i64, owned(row)));
        Some(())
    }

    /// Removes up to `rows_max` rows of a list that no key has; how many more may be removed.
    pub fn bury(&mut self, rows: &mut Rows, rows_max: usize) -> usize {
        let count = rows_max.min(self.items.len());
        self.items.drain(..count).for_each(|(place, _)| rows.remove(self.id, &place_row(place)));
        rows_max - count
    }

    fn push(&mut self, rows: &mut Rows, end: End, item: Bytes) {
        let place = match end {
            End::Left => self.items.front().map_or(0, |(place, _)| place - 1),
            End::Right => self.items.back().map_or(0, |(place, _)| place + 1),
        };
        rows.put(self.id, &place_row(place), item.clone());
        match end {
            End::Left => self.items.push_front((place, item)),
            End::Right => self.items.push_back((place, item)),
        }
    }

    fn pop(&mut self, rows: &mut Rows, end: End) -> Option<Bytes> {
        let (place, item) = match end {
            End::Left => self.items.pop_front()?,
            End::Right => self.items.pop_back()?,
        };
        rows.remove(self.id, &place_row(place));
        Some(item)
    }

    fn replace(&mut self, rows: &mut Rows, index: usize, item: Bytes) {
        if let Some((place, old)) = self.items.get_mut(index) {
            rows.put(self.id, &place_row(*place), item.clone());
            *old = item;
        }
    }

    fn remove(&mut self, rows: &mut Rows, index: usize) {
        if let Some((place, _)) = self.items.remove(index) {
            rows.remove(self.id, &place_row(place));
        }
    }

    /// Inserts so that the item stands at `index`. On the shorter side of it places move away until there is room.
    fn insert(&mut self, rows: &mut Rows, index: usize, item: Bytes) {
        let leftwards = index <= self.items.len() / 2;
        let place_at = |list: &List, at: Option<usize>| at.and_then(|at| list.items.get(at)).map(|(place, _)| *place);
        let place = match leftwards {
            true => place_at(self, Some(index)).map_or(0, |place| place - 1),
            false => place_at(self, index.checked_sub(1)).map_or(0, |place| place + 1),
        };
        self.items.insert(index, (place, item));
        let mut at = index;
        loop {
            let Some((place, item)) = self.items.get(at).cloned() else { return };
            rows.put(self.id, &place_row(place), item);
            let next = if leftwards { at.checked_sub(1) } else { Some(at + 1) };
            let Some((next, (neighbour, _))) = next.and_then(|next| Some((next, self.items.get_mut(next)?))) else {
                return;
            };
            if *neighbour != place {
                return;
            }
            *neighbour += if leftwards { -1 } else { 1 };
            at = next;
        }
    }

    /// The index that a number from a client means, which counts from the end when it is negative.
    fn index_of(&self, number: i64) -> Option<usize> {
        let from_start = if number < 0 { number.checked_add(self.len() as i64)? } else { number };
        usize::try_from(from_start).ok().filter(|index| *index < self.len())
    }
}

/// Turns the order of signed numbers into that of their bytes.
const SIGN: u64 = 1 << 63;

fn place_row(place: i64) -> [u8; 8] {
    (place as u64 ^ SIGN).to_be_bytes()
}

/// The indexes from `start` to `stop`, both included and both counted from the end when negative.
pub(super) fn index_range(start: i64, stop: i64, len: usize) -> std::ops::Range<usize> {
    let len_signed = len as i64;
    let from_end = |number: i64| if number < 0 { number.saturating_add(len_signed).max(-1) } else { number };
    let start = from_end(start).max(0);
    let stop = from_end(stop).min(len_signed - 1);
    if start > stop { 0..0 } else { start as usize..stop as usize + 1 }
}

fn push(database: &mut Database, mut args: Args<'_>, end: End, create: bool) -> Answer {
    let key = args.next()?;
    if !create && database.read::<List>(key)?.is_none() {
        return Ok(Reply::Integer(0));
    }
    let (list, rows) = database.write_or_create::<List>(key)?;
    args.rest().iter().for_each(|item| list.push(rows, end, owned(item)));
    let len = list.len() as u64;
    database.settle(key);
    Ok(Reply::count(len))
}

fn pop(database: &mut Database, mut args: Args<'_>, end: End) -> Answer {
    const NOT_POSITIVE: &str = "ERR value is out of range, must be positive";
    let key = args.next()?;
    if args.len() > 1 {
        return Err(super::wrong_arity(args.name));
    }
    let count = if args.is_empty() { None } else { Some(args.at_least(0, NOT_POSITIVE)? as usize) };
    let Some((list, rows)) = database.write::<List>(key)? else {
        return Ok(if count.is_some() { Reply::NullArray } else { Reply::Null });
    };
    let reply = match count {
        Some(0) => return Ok(Reply::Array(Vec::new())),
        Some(count) => Reply::Array(pop_many(list, rows, end, count)),
        None => list.pop(rows, end).map_or(Reply::Null, Reply::Bulk),
    };
    database.settle(key);
    Ok(reply)
}

fn pop_many(list: &mut List, rows: &mut Rows, end: End, count: usize) -> Vec<Reply> {
    (0..count.min(list.len())).filter_map(|_| list.pop(rows, end)).map(Reply::Bulk).collect()
}

fn len(database: &mut Database, mut args: Args<'_>) -> Answer {
    Ok(Reply::count(database.read::<List>(args.next()?)?.map_or(0, List::len) as u64))
}

fn range(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let (start, stop) = (args.integer()?, args.integer()?);
    let Some(list) = database.read::<List>(key)? else { return Ok(Reply::Array(Vec::new())) };
    let range = index_range(start, stop, list.len());
    Ok(Reply::Array(list.items.range(range).map(|(_, item)| Reply::Bulk(item.clone())).collect()))
}

fn index(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let Some(list) = database.read::<List>(key)? else { return Ok(Reply::Null) };
    let index = list.index_of(args.integer()?);
    Ok(index.and_then(|index| list.items.get(index)).map_or(Reply::Null, |(_, item)| Reply::Bulk(item.clone())))
}

fn set(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let Some((list, rows)) = database.write::<List>(key)? else { return Err(NO_SUCH_KEY.into()) };
    let number = args.integer()?;
    let Some(index) = list.index_of(number) else { return Err("ERR index out of range".into()) };
    list.replace(rows, index, owned(args.next()?));
    database.settle(key);
    Ok(Reply::OK)
}

fn insert(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let behind = match () {
        () if args.accept("after") => 1,
        () if args.accept("before") => 0,
        () => return Err(SYNTAX.into()),
    };
    let (pivot, item) = (args.next()?, args.next()?);
    let Some((list, rows)) = database.write::<List>(key)? else { return Ok(Reply::Integer(0)) };
    let Some(at) = list.items.iter().position(|(_, item)| item == pivot) else { return Ok(Reply::Integer(-1)) };
    list.insert(rows, at + behind, owned(item));
    let len = list.len() as u64;
    database.settle(key);
    Ok(Reply::count(len))
}

fn remove(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let (count, item) = (args.integer()?, args.next()?);
    let Some((list, rows)) = database.write::<List>(key)? else { return Ok(Reply::Integer(0)) };
    let limit = if count == 0 { usize::MAX } else { count.unsigned_abs() as usize };
    let found = |(index, (_, other)): (usize, &(i64, Bytes))| (other == item).then_some(index);
    let mut indexes: Vec<usize> = match count {
        0.. => list.items.iter().enumerate().filter_map(found).take(limit).collect(),
        _ => list.items.iter().enumerate().rev().filter_map(found).take(limit).collect(),
    };
    // From the right, so that the indexes which are left to do stay true.
    indexes.sort_unstable_by(|left, right| right.cmp(left));
    match indexes.len() {
        0 => return Ok(Reply::Integer(0)),
        1 => indexes.iter().for_each(|index| list.remove(rows, *index)),
        _ => {
            let mut gone = indexes.iter().rev().copied().peekable();
            let kept = std::mem::take(&mut list.items).into_iter().enumerate().filter_map(|(index, (place, item))| {
                if gone.next_if_eq(&index).is_none() {
                    return Some((place, item));
                }
                rows.remove(list.id, &place_row(place));
                None
            });
            list.items = kept.collect();
        }
    }
    database.settle(key);
    Ok(Reply::count(indexes.len() as u64))
}

fn trim(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let (start, stop) = (args.integer()?, args.integer()?);
    let Some((list, rows)) = database.write::<List>(key)? else { return Ok(Reply::OK) };
    let kept = index_range(start, stop, list.len());
    (kept.end..list.len()).for_each(|_| drop(list.pop(rows, End::Right)));
    (0..kept.start).for_each(|_| drop(list.pop(rows, End::Left)));
    database.settle(key);
    Ok(Reply::OK)
}

fn position(database: &mut Database, mut args: Args<'_>) -> Answer {
    let (key, item) = (args.next()?, args.next()?);
    let (mut rank, mut count, mut compared_max) = (1, None, 0);
    while !args.is_empty() {
        if args.accept_with("rank", 1) {
            rank = args.integer()?;
            if rank == 0 {
                return Err("ERR RANK can't be zero: use 1 to start from the first match, 2 from the second ... \
                            or use negative to start from the end of the list"
                    .into());
            }
        } else if args.accept_with("count", 1) {
            count = Some(args.at_least(0, "ERR COUNT can't be negative")? as usize);
        } else if args.accept_with("maxlen", 1) {
            compared_max = args.at_least(0, "ERR MAXLEN can't be negative")? as usize;
        } else {
            return Err(SYNTAX.into());
        }
    }
    let Some(list) = database.read::<List>(key)? else {
        return Ok(if count.is_some() { Reply::Array(Vec::new()) } else { Reply::Null });
    };
    let limit = |max: usize| if max == 0 { usize::MAX } else { max };
    let skipped = (rank.unsigned_abs() - 1) as usize;
    let is_it = |(index, (_, other)): (usize, &(i64, Bytes))| (other == item).then_some(Reply::count(index as u64));
    let wanted = count.map_or(1, limit);
    let indexed = list.items.iter().enumerate();
    let mut found: Vec<Reply> = match rank {
        1.. => indexed.take(limit(compared_max)).filter_map(is_it).skip(skipped).take(wanted).collect(),
        _ => indexed.rev().take(limit(compared_max)).filter_map(is_it).skip(skipped).take(wanted).collect(),
    };
    Ok(if count.is_some() { Reply::Array(found) } else { found.pop().unwrap_or(Reply::Null) })
}

fn end(args: &mut Args<'_>) -> Checked<End> {
    match () {
        () if args.accept("left") => Ok(End::Left),
        () if args.accept("right") => Ok(End::Right),
        () => Err(SYNTAX.into()),
    }
}

fn lmove(database: &mut Database, mut args: Args<'_>) -> Answer {
    let (from, to) = (args.next()?, args.next()?);
    let (from_end, to_end) = (end(&mut args)?, end(&mut args)?);
    Ok(move_one(database, from, to, from_end, to_end)?.map_or(Reply::Null, Reply::Bulk))
}

fn blmove(database: &mut Database, mut args: Args<'_>) -> Answer {
    let (from, to) = (args.next()?, args.next()?);
    let (from_end, to_end) = (end(&mut args)?, end(&mut args)?);
    Args::check_timeout(args.next()?)?;
    Ok(move_one(database, from, to, from_end, to_end)?.map_or(Reply::Null, Reply::Bulk))
}

fn rpoplpush(database: &mut Database, mut args: Args<'_>, blocks: bool) -> Answer {
    let (from, to) = (args.next()?, args.next()?);
    if blocks {
        Args::check_timeout(args.next()?)?;
    }
    Ok(move_one(database, from, to, End::Right, End::Left)?.map_or(Reply::Null, Reply::Bulk))
}

fn move_one(database: &mut Database, from: &[u8], to: &[u8], from_end: End, to_end: End) -> Checked<Option<Bytes>> {
    if database.read::<List>(from)?.is_none() {
        return Ok(None);
    }
    // Nothing is taken when there is no place to put it.
    database.read::<List>(to)?;
    check_name(to)?;
    let Some((list, rows)) = database.write::<List>(from)? else { return Ok(None) };
    let Some(item) = list.pop(rows, from_end) else { return Ok(None) };
    if from == to {
        list.push(rows, to_end, item.clone());
    } else {
        let (other, rows) = database.write_or_create::<List>(to)?;
        other.push(rows, to_end, item.clone());
        database.settle(to);
    }
    database.settle(from);
    Ok(Some(item))
}

/// `LMPOP`, and `BLMPOP`, which begins with how long it would wait.
fn mpop(database: &mut Database, mut args: Args<'_>, blocks: bool) -> Answer {
    let timeout = if blocks { Some(args.next()?) } else { None };
    let keys = args.counted_keys("ERR numkeys should be greater than 0")?;
    let from_end = end(&mut args)?;
    let mut count = None;
    while !args.is_empty() {
        if count.is_some() || !args.accept_with("count", 1) {
            return Err(SYNTAX.into());
        }
        count = Some(args.at_least(1, "ERR count should be greater than 0")?);
    }
    timeout.map_or(Ok(()), |timeout| Args::check_timeout(timeout))?;
    for key in keys {
        let Some((list, rows)) = database.write::<List>(key)? else { continue };
        let items = pop_many(list, rows, from_end, count.unwrap_or(1) as usize);
        database.settle(key);
        return Ok(Reply::Array(vec![Reply::Bulk(key.clone()), Reply::Array(items)]));
    }
    Ok(Reply::NullArray)
}

fn blocking_pop(database: &mut Database, mut args: Args<'_>, from_end: End) -> Answer {
    Args::check_timeout(args.last()?)?;
    for key in args.rest() {
        let Some((list, rows)) = database.write::<List>(key)? else { continue };
        let Some(item) = list.pop(rows, from_end) else { continue };
        database.settle(key);
        return Ok(Reply::Array(vec![Reply::Bulk(key.clone()), Reply::Bulk(item)]));
    }
    Ok(Reply::NullArray)
}
