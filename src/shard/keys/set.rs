//! Sets. Their members are told in no order that anyone may rely on.

use bytes::Bytes;
use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::index::sample;

use super::args::Args;
use super::generic::{Page, scan_page};
use super::rows::{ElementRows, Rows};
use super::{Answer, Checked, Command, Database, Map, check_name, command, owned};
use crate::resp::reply::Reply;

pub(super) const COMMANDS: &[Command] = &[
    command("sadd", -3, add),
    command("srem", -3, rem),
    command("smembers", 2, members),
    command("sismember", 3, is_member),
    command("smismember", -3, are_members),
    command("scard", 2, card),
    command("spop", -2, pop),
    command("srandmember", -2, random_member),
    command("smove", 4, move_member),
    command("sinter", -2, |database, args| combine(database, args, How::Inter, false)),
    command("sunion", -2, |database, args| combine(database, args, How::Union, false)),
    command("sdiff", -2, |database, args| combine(database, args, How::Diff, false)),
    command("sinterstore", -3, |database, args| combine(database, args, How::Inter, true)),
    command("sunionstore", -3, |database, args| combine(database, args, How::Union, true)),
    command("sdiffstore", -3, |database, args| combine(database, args, How::Diff, true)),
    command("sintercard", -3, inter_card),
    command("sscan", -3, scan),
];

/// Most elements that a random pick with repetition gives.
const SAMPLE_MAX: usize = 1_000_000;

#[derive(Debug)]
pub(super) struct Set {
    id: u64,
    members: Map<()>,
}

impl Set {
    pub fn new(id: u64) -> Set {
        Set { id, members: Map::default() }
    }

    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn len(&self) -> usize {
        self.members.len()
    }

    pub fn members(&self) -> impl Iterator<Item = &Bytes> {
        self.members.keys()
    }

    pub fn load(&mut self, element: &[u8]) -> Option<()> {
        self.members.insert(owned(element), ());
        Some(())
    }

    /// Removes up to `rows_max` rows of a set that no key has; how many more may be removed.
    pub fn bury(&mut self, rows: &mut Rows, rows_max: usize) -> usize {
        let mut left = rows_max;
        while left > 0 {
            let Some((member, ())) = self.members.pop() else { break };
            rows.remove(self.id, &member);
            left -= 1;
        }
        left
    }

    fn add(&mut self, rows: &mut Rows, member: &[u8]) -> bool {
        if self.members.contains_key(member) {
            return false;
        }
        rows.put(self.id, member, Bytes::new());
        self.members.insert(owned(member), ()).is_none()
    }

    fn remove(&mut self, rows: &mut Rows, member: &[u8]) -> bool {
        let found = self.members.swap_remove(member).is_some();
        if found {
            rows.remove(self.id, member);
        }
        found
    }
}

/// Redis counts the words before it reads the number.
pub(super) fn no_more_than_a_count(args: &Args<'_>) -> Checked<()> {
    if args.len() > 1 { Err(super::SYNTAX.into()) } else { Ok(()) }
}

/// Reads how many random elements are wanted: `None` when it is not said, negative when one may come twice.
pub(super) fn sample_count(args: &mut Args<'_>) -> Checked<Option<i64>> {
    if args.is_empty() {
        return Ok(None);
    }
    let count = args.integer()?;
    if count == i64::MIN {
        let (least, most) = (-i64::MAX, i64::MAX);
        return Err(format!("ERR value is out of range, value must between {least} and {most}").into());
    }
    Ok(Some(count))
}

/// The same, and whether what belongs to each is wanted as well, which makes twice as many.
pub(super) fn sample_count_with(args: &mut Args<'_>, keyword: &str) -> Checked<(Option<i64>, bool)> {
    let count = sample_count(args)?;
    let is_with = args.accept(keyword);
    args.end()?;
    if is_with && count.is_some_and(|count| count.checked_mul(2).is_none()) {
        return Err("ERR value is out of range".into());
    }
    Ok((count, is_with))
}

/// The places of random elements among `len`: each at most once, or with a negative count so many of any.
pub(super) fn pick_places(dice: &mut SmallRng, len: usize, count: i64) -> Vec<usize> {
    let wanted = usize::try_from(count.unsigned_abs()).unwrap_or(usize::MAX);
    match count {
        _ if len == 0 => Vec::new(),
        0.. if wanted >= len => (0..len).collect(),
        0.. => sample(dice, len, wanted).into_vec(),
        _ => (0..wanted.min(SAMPLE_MAX)).map(|_| dice.random_range(0..len)).collect(),
    }
}

fn add(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    args.rest().iter().try_for_each(|member| check_name(member))?;
    let (set, rows) = database.write_or_create::<Set>(key)?;
    let added = args.rest().iter().filter(|member| set.add(rows, member)).count();
    if added > 0 {
        database.settle(key);
    }
    Ok(Reply::count(added as u64))
}

fn rem(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let Some((set, rows)) = database.write::<Set>(key)? else { return Ok(Reply::Integer(0)) };
    let removed = args.rest().iter().filter(|member| set.remove(rows, member)).count();
    if removed > 0 {
        database.settle(key);
    }
    Ok(Reply::count(removed as u64))
}

fn all_of(set: Option<&Set>) -> Vec<Bytes> {
    set.into_iter().flat_map(Set::members).cloned().collect()
}

fn set_reply(members: impl IntoIterator<Item = Bytes>) -> Reply {
    Reply::Set(members.into_iter().map(Reply::Bulk).collect())
}

fn members(database: &mut Database, mut args: Args<'_>) -> Answer {
    Ok(set_reply(all_of(database.read(args.next()?)?)))
}

fn holds(set: Option<&Set>, member: &[u8]) -> Reply {
    Reply::Integer(i64::from(set.is_some_and(|set| set.members.contains_key(member))))
}

fn is_member(database: &mut Database, mut args: Args<'_>) -> Answer {
    let set = database.read::<Set>(args.next()?)?;
    Ok(holds(set, args.next()?))
}

fn are_members(database: &mut Database, mut args: Args<'_>) -> Answer {
    let set = database.read::<Set>(args.next()?)?;
    Ok(Reply::Array(args.rest().iter().map(|member| holds(set, member)).collect()))
}

fn card(database: &mut Database, mut args: Args<'_>) -> Answer {
    Ok(Reply::count(database.read::<Set>(args.next()?)?.map_or(0, Set::len) as u64))
}

fn pop(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    no_more_than_a_count(&args)?;
    let count = match args.is_empty() {
        true => None,
        false => Some(args.at_least(0, "ERR value is out of range, must be positive")?),
    };
    let mut dice = database.dice();
    let Some((set, rows)) = database.write::<Set>(key)? else {
        return Ok(if count.is_some() { set_reply([]) } else { Reply::Null });
    };
    let places = pick_places(&mut dice, set.len(), count.unwrap_or(1));
    let picked: Vec<Bytes> = places
        .into_iter()
        .filter_map(|place| set.members.get_index(place))
        .map(|(member, ())| member.clone())
        .collect();
    picked.iter().for_each(|member| {
        set.remove(rows, member);
    });
    if !picked.is_empty() {
        database.settle(key);
    }
    Ok(match count {
        Some(_) => set_reply(picked),
        None => picked.into_iter().next().map_or(Reply::Null, Reply::Bulk),
    })
}

fn random_member(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    no_more_than_a_count(&args)?;
    let count = sample_count(&mut args)?;
    let mut dice = database.dice();
    let set = database.read::<Set>(key)?;
    let places = pick_places(&mut dice, set.map_or(0, Set::len), count.unwrap_or(1));
    let picked = places.into_iter().filter_map(|place| set?.members.get_index(place));
    let mut picked = picked.map(|(member, ())| Reply::Bulk(member.clone()));
    Ok(match count {
        // Redis answers an array, as the same member may come twice, and one without a key.
        Some(_) => Reply::Array(picked.collect()),
        None => picked.next().unwrap_or(Reply::Null),
    })
}

fn move_member(database: &mut Database, mut args: Args<'_>) -> Answer {
    let (from, to, member) = (args.next()?, args.next()?, args.next()?);
    let Some(source) = database.read::<Set>(from)? else { return Ok(Reply::Integer(0)) };
    let is_there = source.members.contains_key(member);
    database.read::<Set>(to)?;
    check_name(to)?;
    if !is_there || from == to {
        return Ok(Reply::Integer(i64::from(is_there)));
    }
    if let Some((set, rows)) = database.write::<Set>(from)? {
        set.remove(rows, member);
        database.settle(from);
    }
    let (set, rows) = database.write_or_create::<Set>(to)?;
    if set.add(rows, member) {
        database.settle(to);
    }
    Ok(Reply::Integer(1))
}

#[derive(Clone, Copy)]
enum How {
    Inter,
    Union,
    Diff,
}

/// What the sets of the keys have in common, hold together, or only the first holds; up to `limit` members of it.
fn combined(database: &mut Database, keys: &[Bytes], how: How, limit: usize) -> Checked<Vec<Bytes>> {
    for key in keys {
        database.expire_key(key);
    }
    let set_of = |key: &Bytes| match database.keys.get(key) {
        Some(entry) => super::Kind::of(&entry.value).map(Some).ok_or(super::Fault::from(super::WRONG_TYPE)),
        None => Ok(None),
    };
    let sets = keys.iter().map(set_of).collect::<Checked<Vec<Option<&Set>>>>()?;
    let in_set = |set: &Option<&Set>, member: &Bytes| set.is_some_and(|set| set.members.contains_key(member));
    let members: Vec<Bytes> = match how {
        How::Union => {
            let all: Map<()> =
                sets.iter().copied().flatten().flat_map(Set::members).cloned().map(|m| (m, ())).collect();
            all.into_keys().collect()
        }
        How::Diff => {
            let (first, others) = sets.split_at(sets.len().min(1));
            let members = first.iter().copied().flatten().flat_map(Set::members);
            members.filter(|member| !others.iter().any(|set| in_set(set, member))).cloned().collect()
        }
        How::Inter => {
            let smallest = sets.iter().min_by_key(|set| set.map_or(0, Set::len)).copied().flatten();
            let members = smallest.into_iter().flat_map(Set::members);
            members.filter(|member| sets.iter().all(|set| in_set(set, member))).take(limit).cloned().collect()
        }
    };
    Ok(members)
}

fn combine(database: &mut Database, mut args: Args<'_>, how: How, stores: bool) -> Answer {
    let target = if stores { Some(args.next()?) } else { None };
    let members = combined(database, args.rest(), how, usize::MAX)?;
    let Some(target) = target else { return Ok(set_reply(members)) };
    check_name(target)?;
    database.remove(target);
    if !members.is_empty() {
        let (set, rows) = database.write_or_create::<Set>(target)?;
        members.iter().for_each(|member| {
            set.add(rows, member);
        });
        database.settle(target);
    }
    Ok(Reply::count(members.len() as u64))
}

/// Where `SINTERCARD` and `ZINTERCARD` stop counting.
pub(super) fn card_limit(args: &mut Args<'_>) -> Checked<usize> {
    let mut limit = 0;
    while !args.is_empty() {
        if !args.accept_with("limit", 1) {
            return Err(super::SYNTAX.into());
        }
        limit = args.at_least(0, "ERR LIMIT can't be negative")?;
    }
    Ok(if limit == 0 { usize::MAX } else { limit as usize })
}

fn inter_card(database: &mut Database, mut args: Args<'_>) -> Answer {
    let count = args.at_least(1, "ERR numkeys should be greater than 0")?;
    if count > args.len() as i64 {
        return Err("ERR Number of keys can't be greater than number of args".into());
    }
    let keys = args.take(count as usize)?;
    let limit = card_limit(&mut args)?;
    Ok(Reply::count(combined(database, keys, How::Inter, limit)?.len() as u64))
}

fn scan(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let page = Page::parse(&mut args, false)?;
    let empty = Map::default();
    let members = database.read::<Set>(key)?.map_or(&empty, |set| &set.members);
    Ok(scan_page(members, &page, |found, member, ()| found.push(Reply::Bulk(member.clone()))))
}
