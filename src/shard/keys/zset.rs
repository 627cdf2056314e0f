//! Sorted sets: one map from member to score, and the order by score and member beside it.
//!
//! What asks by score or from either end costs the logarithm of the length and what it tells; a rank, and a range by
//! member, is counted out and costs the length.

use bytes::Bytes;
use std::cmp::Ordering;
use std::collections::BTreeSet;

use super::args::Args;
use super::generic::{Page, scan_page};
use super::hash::pairs_reply;
use super::list::index_range;
use super::number::{parse_f64, parse_wide_f64};
use super::rows::{ElementRows, Rows};
use super::set::{card_limit, no_more_than_a_count, pick_places, sample_count_with};
use super::string::NOT_A_FLOAT;
use super::{Answer, Checked, Command, Database, Fault, Map, SYNTAX, Value, WRONG_TYPE, check_name, command, owned};
use crate::resp::reply::{Reply, format_double};

pub(super) const COMMANDS: &[Command] = &[
    command("zadd", -4, |database, args| add(database, args, false)),
    command("zincrby", 4, |database, args| add(database, args, true)),
    command("zscore", 3, score),
    command("zmscore", -3, scores),
    command("zcard", 2, card),
    command("zcount", 4, |database, args| count(database, args, score_range)),
    command("zlexcount", 4, |database, args| count(database, args, lex_range)),
    command("zrank", 3, |database, args| rank(database, args, false)),
    command("zrevrank", 3, |database, args| rank(database, args, true)),
    command("zrange", -4, |database, args| range(database, args, None, None)),
    command("zrevrange", -4, |database, args| range(database, args, Some(By::Rank), Some(true))),
    command("zrangebyscore", -4, |database, args| range(database, args, Some(By::Score), Some(false))),
    command("zrevrangebyscore", -4, |database, args| range(database, args, Some(By::Score), Some(true))),
    command("zrangebylex", -4, |database, args| range(database, args, Some(By::Lex), Some(false))),
    command("zrevrangebylex", -4, |database, args| range(database, args, Some(By::Lex), Some(true))),
    command("zrangestore", -5, range_store),
    command("zrem", -3, rem),
    command("zremrangebyrank", 4, |database, args| remove_range(database, args, rank_range)),
    command("zremrangebyscore", 4, |database, args| remove_range(database, args, score_range)),
    command("zremrangebylex", 4, |database, args| remove_range(database, args, lex_range)),
    command("zpopmin", -2, |database, args| pop(database, args, false)),
    command("zpopmax", -2, |database, args| pop(database, args, true)),
    command("bzpopmin", -3, |database, args| blocking_pop(database, args, false)),
    command("bzpopmax", -3, |database, args| blocking_pop(database, args, true)),
    command("zmpop", -4, |database, args| mpop(database, args, false)),
    command("bzmpop", -5, |database, args| mpop(database, args, true)),
    command("zunion", -3, |database, args| combine(database, args, How::Union, false)),
    command("zinter", -3, |database, args| combine(database, args, How::Inter, false)),
    command("zdiff", -3, |database, args| combine(database, args, How::Diff, false)),
    command("zunionstore", -4, |database, args| combine(database, args, How::Union, true)),
    command("zinterstore", -4, |database, args| combine(database, args, How::Inter, true)),
    command("zdiffstore", -4, |database, args| combine(database, args, How::Diff, true)),
    command("zintercard", -3, inter_card),
    command("zrandmember", -2, random_member),
    command("zscan", -3, scan),
];

const NAN: &str = "ERR resulting score is not a number (NaN)";

/// A score, which is never not a number, so that all have an order.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Score(f64);

impl Eq for Score {}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Score {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.partial_cmp(&other.0).unwrap_or(Ordering::Equal)
    }
}

#[derive(Debug)]
pub(super) struct Zset {
    id: u64,
    scores: Map<f64>,
    order: BTreeSet<(Score, Bytes)>,
}

impl Zset {
    pub fn new(id: u64) -> Zset {
        Zset { id, scores: Map::default(), order: BTreeSet::new() }
    }

    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn len(&self) -> usize {
        self.scores.len()
    }

    pub fn load(&mut self, element: &[u8], row: &[u8]) -> Option<()> {
        self.insert(owned(element), f64::from_be_bytes(row.try_into().ok()?));
        Some(())
    }

    /// Removes up to `rows_max` rows of a sorted set that no key has; how many more may be removed.
    pub fn bury(&mut self, rows: &mut Rows, rows_max: usize) -> usize {
        self.order.clear();
        let mut left = rows_max;
        while left > 0 {
            let Some((member, _)) = self.scores.pop() else { break };
            rows.remove(self.id, &member);
            left -= 1;
        }
        left
    }

    fn insert(&mut self, member: Bytes, score: f64) {
        if let Some(old) = self.scores.insert(member.clone(), score) {
            self.order.remove(&(Score(old), member.clone()));
        }
        self.order.insert((Score(score), member));
    }

    fn set(&mut self, rows: &mut Rows, member: &[u8], score: f64) {
        // Of the two zeros only one is kept.
        let score = score + 0.0;
        rows.put(self.id, member, Bytes::copy_from_slice(&score.to_be_bytes()));
        let own = self.scores.get_key_value(member).map_or_else(|| owned(member), |(own, _)| own.clone());
        self.insert(own, score);
    }

    fn remove(&mut self, rows: &mut Rows, member: &[u8]) -> bool {
        let Some((own, score)) = self.scores.swap_remove_entry(member) else { return false };
        rows.remove(self.id, member);
        self.order.remove(&(Score(score), own))
    }

    /// What lies in the range, from its start, or reversed from its end.
    fn select(&self, range: &Range, reversed: bool) -> Box<dyn Iterator<Item = (Bytes, f64)> + '_> {
        let items: Box<dyn DoubleEndedIterator<Item = &(Score, Bytes)>> = match range {
            Range::Rank(start, stop) => {
                let places = index_range(*start, *stop, self.len());
                let (skipped, taken) = (places.start, places.len());
                let told = |(score, member): &(Score, Bytes)| (member.clone(), score.0);
                return match reversed {
                    true => Box::new(self.order.iter().rev().skip(skipped).take(taken).map(told)),
                    false => Box::new(self.order.iter().skip(skipped).take(taken).map(told)),
                };
            }
            Range::Score(min, max) => match (min.start(), max.stop()) {
                (Some(start), Some(stop)) if start < stop => {
                    Box::new(self.order.range((Score(start), Bytes::new())..(Score(stop), Bytes::new())))
                }
                (Some(start), None) => Box::new(self.order.range((Score(start), Bytes::new())..)),
                _ => Box::new(std::iter::empty()),
            },
            Range::Lex(min, max) => {
                let (min, max) = (min.clone(), max.clone());
                Box::new(self.order.iter().filter(move |(_, member)| min.is_before(member) && max.is_behind(member)))
            }
        };
        let told = |(score, member): &(Score, Bytes)| (member.clone(), score.0);
        if reversed { Box::new(items.rev().map(told)) } else { Box::new(items.map(told)) }
    }

    fn pop(&mut self, rows: &mut Rows, from_max: bool, count: usize) -> Vec<(Bytes, f64)> {
        let picked: Vec<(Bytes, f64)> = self.select(&Range::Rank(0, -1), from_max).take(count).collect();
        picked.iter().for_each(|(member, _)| {
            self.remove(rows, member);
        });
        picked
    }
}

/// One end of a range of scores.
#[derive(Clone, Copy)]
struct ScoreBound {
    score: f64,
    is_excluded: bool,
}

impl ScoreBound {
    fn parse(word: &[u8]) -> Checked<ScoreBound> {
        let (text, is_excluded) = match word {
            [b'(', text @ ..] => (text, true),
            text => (text, false),
        };
        // As C's own function takes it, which skips blanks and stops at once where there is nothing.
        let score = match text {
            [] => Some(0.0),
            text => parse_wide_f64(text.trim_ascii_start()),
        };
        let score = score.ok_or(Fault::from("ERR min or max is not a float"))?;
        Ok(ScoreBound { score, is_excluded })
    }

    /// The least score that is inside, for the lower end.
    fn start(self) -> Option<f64> {
        match self.is_excluded {
            true if self.score == f64::INFINITY => None,
            true => Some(self.score.next_up()),
            false => Some(self.score),
        }
    }

    /// The least score that is outside, for the upper end; none when every score is inside.
    fn stop(self) -> Option<f64> {
        match self.is_excluded {
            true => Some(self.score),
            false if self.score == f64::INFINITY => None,
            false => Some(self.score.next_up()),
        }
    }
}

/// One end of a range of members.
#[derive(Clone)]
enum LexBound {
    Least,
    Most,
    Included(Bytes),
    Excluded(Bytes),
}

impl LexBound {
    fn parse(word: &Bytes) -> Checked<LexBound> {
        match &word[..] {
            b"-" => Ok(LexBound::Least),
            b"+" => Ok(LexBound::Most),
            [b'[', ..] => Ok(LexBound::Included(word.slice(1..))),
            [b'(', ..] => Ok(LexBound::Excluded(word.slice(1..))),
            _ => Err("ERR min or max not valid string range item".into()),
        }
    }

    fn is_before(&self, member: &Bytes) -> bool {
        match self {
            LexBound::Least => true,
            LexBound::Most => false,
            LexBound::Included(start) => member >= start,
            LexBound::Excluded(start) => member > start,
        }
    }

    fn is_behind(&self, member: &Bytes) -> bool {
        match self {
            LexBound::Least => false,
            LexBound::Most => true,
            LexBound::Included(end) => member <= end,
            LexBound::Excluded(end) => member < end,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Rank,
    Score,
    Lex,
}

enum Range {
    Rank(i64, i64),
    Score(ScoreBound, ScoreBound),
    Lex(LexBound, LexBound),
}

type ParseRange = fn(&Bytes, &Bytes) -> Checked<Range>;

fn rank_range(start: &Bytes, stop: &Bytes) -> Checked<Range> {
    let integer = |word: &[u8]| super::number::parse_i64(word).ok_or(Fault::from(super::NOT_AN_INTEGER));
    Ok(Range::Rank(integer(start)?, integer(stop)?))
}

fn score_range(min: &Bytes, max: &Bytes) -> Checked<Range> {
    Ok(Range::Score(ScoreBound::parse(min)?, ScoreBound::parse(max)?))
}

fn lex_range(min: &Bytes, max: &Bytes) -> Checked<Range> {
    Ok(Range::Lex(LexBound::parse(min)?, LexBound::parse(max)?))
}

#[derive(Default)]
struct AddOptions {
    nx: bool,
    xx: bool,
    gt: bool,
    lt: bool,
    counts_changed: bool,
    incr: bool,
}

impl AddOptions {
    fn parse(args: &mut Args<'_>) -> AddOptions {
        let mut options = AddOptions::default();
        loop {
            let flag = match () {
                () if args.accept("nx") => &mut options.nx,
                () if args.accept("xx") => &mut options.xx,
                () if args.accept("gt") => &mut options.gt,
                () if args.accept("lt") => &mut options.lt,
                () if args.accept("ch") => &mut options.counts_changed,
                () if args.accept("incr") => &mut options.incr,
                () => return options,
            };
            *flag = true;
        }
    }

    fn check(&self, args: &Args<'_>) -> Checked<()> {
        let faults = [
            (args.is_empty() || args.len() % 2 == 1, SYNTAX),
            (self.nx && self.xx, "ERR XX and NX options at the same time are not compatible"),
            (
                (self.nx && (self.gt || self.lt)) || (self.gt && self.lt),
                "ERR GT, LT, and/or NX options at the same time are not compatible",
            ),
            (self.incr && args.len() > 2, "ERR INCR option supports a single increment-element pair"),
        ];
        faults.iter().find(|(is_fault, _)| *is_fault).map_or(Ok(()), |(_, text)| Err((*text).into()))
    }

    /// The new score of a member, or `None` when it is to stay as it is.
    fn decide(&self, old: Option<f64>, given: f64) -> Checked<Option<f64>> {
        let Some(old) = old else { return Ok((!self.xx).then_some(given)) };
        if self.nx {
            return Ok(None);
        }
        let score = if self.incr { old + given } else { given };
        if score.is_nan() {
            return Err(NAN.into());
        }
        let is_refused = (self.gt && score <= old) || (self.lt && score >= old);
        Ok((!is_refused).then_some(score))
    }
}

fn add(database: &mut Database, mut args: Args<'_>, is_zincrby: bool) -> Answer {
    let key = args.next()?;
    let options = match is_zincrby {
        true => AddOptions { incr: true, ..AddOptions::default() },
        false => AddOptions::parse(&mut args),
    };
    options.check(&args)?;
    let pairs = args.rest().chunks_exact(2);
    let given = pairs.clone().map(|pair| parse_f64(&pair[0]).ok_or(Fault::from(NOT_A_FLOAT)));
    let given = given.collect::<Checked<Vec<f64>>>()?;
    pairs.clone().try_for_each(|pair| check_name(&pair[1]))?;
    let nothing = if options.incr { Reply::Null } else { Reply::Integer(0) };
    if database.read::<Zset>(key)?.is_none() && options.xx {
        return Ok(nothing);
    }
    let (zset, rows) = database.write_or_create::<Zset>(key)?;
    let (mut added, mut changed, mut last) = (0, 0, None);
    let mut fault = None;
    for (pair, given) in pairs.zip(given) {
        let member = &pair[1];
        let old = zset.scores.get(member).copied();
        let score = match options.decide(old, given) {
            Ok(Some(score)) => score,
            Ok(None) => continue,
            Err(nan) => {
                fault = Some(nan);
                break;
            }
        };
        added += u64::from(old.is_none());
        if old != Some(score) {
            changed += 1;
            zset.set(rows, member, score);
        }
        last = Some(score);
    }
    if changed > 0 || zset.len() == 0 {
        database.settle(key);
    }
    match fault {
        Some(fault) => Err(fault),
        None if options.incr => Ok(last.map_or(nothing, Reply::Double)),
        None => Ok(Reply::count(if options.counts_changed { changed } else { added })),
    }
}

fn score(database: &mut Database, mut args: Args<'_>) -> Answer {
    let zset = database.read::<Zset>(args.next()?)?;
    Ok(score_of(zset, args.next()?))
}

fn score_of(zset: Option<&Zset>, member: &[u8]) -> Reply {
    zset.and_then(|zset| zset.scores.get(member)).map_or(Reply::Null, |score| Reply::Double(*score))
}

fn scores(database: &mut Database, mut args: Args<'_>) -> Answer {
    let zset = database.read::<Zset>(args.next()?)?;
    Ok(Reply::Array(args.rest().iter().map(|member| score_of(zset, member)).collect()))
}

fn card(database: &mut Database, mut args: Args<'_>) -> Answer {
    Ok(Reply::count(database.read::<Zset>(args.next()?)?.map_or(0, Zset::len) as u64))
}

fn count(database: &mut Database, mut args: Args<'_>, parse: ParseRange) -> Answer {
    let key = args.next()?;
    let range = parse(args.next()?, args.next()?)?;
    Ok(Reply::count(database.read::<Zset>(key)?.map_or(0, |zset| zset.select(&range, false).count()) as u64))
}

fn rank(database: &mut Database, mut args: Args<'_>, reversed: bool) -> Answer {
    let zset = database.read::<Zset>(args.next()?)?;
    let member = args.next()?;
    let Some((zset, score)) = zset.and_then(|zset| Some((zset, *zset.scores.get(member)?))) else {
        return Ok(Reply::Null);
    };
    let place = (Score(score), member.clone());
    Ok(Reply::count(match reversed {
        false => zset.order.range(..&place).count(),
        true => zset.order.range(&place..).count() - 1,
    } as u64))
}

/// Members, alone or each with its score.
fn members_reply(members: impl IntoIterator<Item = (Bytes, f64)>, with_scores: bool, nests: bool) -> Reply {
    let members = members.into_iter();
    match with_scores {
        true => pairs_reply(members.map(|(member, score)| (member, Reply::Double(score))), nests),
        false => Reply::Array(members.map(|(member, _)| Reply::Bulk(member)).collect()),
    }
}

/// What `ZRANGE` and its likes ask for.
struct RangeRequest {
    range: Range,
    reversed: bool,
    with_scores: bool,
    skipped: i64,
    taken: i64,
}

impl RangeRequest {
    /// `by` and `reversed` are given where the command's name says them.
    fn parse(args: &mut Args<'_>, by: Option<By>, reversed: Option<bool>, stores: bool) -> Checked<RangeRequest> {
        let (first, second) = (args.next()?, args.next()?);
        let mut found_by = by;
        let mut found_reversed = reversed.unwrap_or(false);
        let (mut with_scores, mut skipped, mut taken) = (false, 0, -1);
        while !args.is_empty() {
            match () {
                () if !stores && args.accept("withscores") => with_scores = true,
                () if args.accept_with("limit", 2) => {
                    skipped = args.integer()?;
                    taken = args.integer()?;
                }
                () if reversed.is_none() && args.accept("rev") => found_reversed = true,
                () if found_by.is_none() && args.accept("bylex") => found_by = Some(By::Lex),
                () if found_by.is_none() && args.accept("byscore") => found_by = Some(By::Score),
                () => return Err(SYNTAX.into()),
            }
        }
        let by = found_by.unwrap_or(By::Rank);
        if taken != -1 && by == By::Rank {
            return Err("ERR syntax error, LIMIT is only supported in combination with either BYSCORE or BYLEX".into());
        }
        if with_scores && by == By::Lex {
            return Err("ERR syntax error, WITHSCORES not supported in combination with BYLEX".into());
        }
        let (low, high) = if found_reversed && by != By::Rank { (second, first) } else { (first, second) };
        let range = match by {
            By::Rank => rank_range(low, high),
            By::Score => score_range(low, high),
            By::Lex => lex_range(low, high),
        }?;
        Ok(RangeRequest { range, reversed: found_reversed, with_scores, skipped, taken })
    }

    fn answer(&self, zset: Option<&Zset>) -> Vec<(Bytes, f64)> {
        let (Some(zset), Ok(skipped)) = (zset, usize::try_from(self.skipped)) else { return Vec::new() };
        let taken = usize::try_from(self.taken).unwrap_or(usize::MAX);
        zset.select(&self.range, self.reversed).skip(skipped).take(taken).collect()
    }
}

fn range(database: &mut Database, mut args: Args<'_>, by: Option<By>, reversed: Option<bool>) -> Answer {
    let key = args.next()?;
    let request = RangeRequest::parse(&mut args, by, reversed, false)?;
    let nests = database.is_resp3();
    Ok(members_reply(request.answer(database.read(key)?), request.with_scores, nests))
}

fn range_store(database: &mut Database, mut args: Args<'_>) -> Answer {
    let (target, key) = (args.next()?, args.next()?);
    let request = RangeRequest::parse(&mut args, None, None, true)?;
    let members = request.answer(database.read(key)?);
    store(database, target, members)
}

/// Replaces whatever the target held; without members it is gone.
fn store(database: &mut Database, target: &[u8], members: Vec<(Bytes, f64)>) -> Answer {
    check_name(target)?;
    database.remove(target);
    if !members.is_empty() {
        let (zset, rows) = database.write_or_create::<Zset>(target)?;
        members.iter().for_each(|(member, score)| zset.set(rows, member, *score));
        database.settle(target);
    }
    Ok(Reply::count(members.len() as u64))
}

fn rem(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let Some((zset, rows)) = database.write::<Zset>(key)? else { return Ok(Reply::Integer(0)) };
    let removed = args.rest().iter().filter(|member| zset.remove(rows, member)).count();
    if removed > 0 {
        database.settle(key);
    }
    Ok(Reply::count(removed as u64))
}

fn remove_range(database: &mut Database, mut args: Args<'_>, parse: ParseRange) -> Answer {
    let key = args.next()?;
    let range = parse(args.next()?, args.next()?)?;
    let Some((zset, rows)) = database.write::<Zset>(key)? else { return Ok(Reply::Integer(0)) };
    let members: Vec<(Bytes, f64)> = zset.select(&range, false).collect();
    members.iter().for_each(|(member, _)| {
        zset.remove(rows, member);
    });
    if !members.is_empty() {
        database.settle(key);
    }
    Ok(Reply::count(members.len() as u64))
}

fn pop(database: &mut Database, mut args: Args<'_>, from_max: bool) -> Answer {
    let key = args.next()?;
    no_more_than_a_count(&args)?;
    let count = match args.is_empty() {
        true => None,
        false => Some(args.at_least(0, "ERR value is out of range, must be positive")? as usize),
    };
    let nests = database.is_resp3() && count.is_some();
    let Some((zset, rows)) = database.write::<Zset>(key)? else { return Ok(Reply::Array(Vec::new())) };
    let popped = zset.pop(rows, from_max, count.unwrap_or(1));
    if !popped.is_empty() {
        database.settle(key);
    }
    Ok(members_reply(popped, true, nests))
}

fn blocking_pop(database: &mut Database, mut args: Args<'_>, from_max: bool) -> Answer {
    Args::check_timeout(args.last()?)?;
    for key in args.rest() {
        let Some((zset, rows)) = database.write::<Zset>(key)? else { continue };
        let popped = zset.pop(rows, from_max, 1);
        database.settle(key);
        let told = popped.into_iter().flat_map(|(member, score)| [Reply::Bulk(member), Reply::Double(score)]);
        return Ok(Reply::Array(std::iter::once(Reply::Bulk(key.clone())).chain(told).collect()));
    }
    Ok(Reply::NullArray)
}

/// `ZMPOP`, and `BZMPOP`, which begins with how long it would wait.
fn mpop(database: &mut Database, mut args: Args<'_>, blocks: bool) -> Answer {
    let timeout = if blocks { Some(args.next()?) } else { None };
    let keys = args.counted_keys("ERR numkeys should be greater than 0")?;
    let from_max = match () {
        () if args.accept("min") => false,
        () if args.accept("max") => true,
        () => return Err(SYNTAX.into()),
    };
    let mut count = None;
    while !args.is_empty() {
        if count.is_some() || !args.accept_with("count", 1) {
            return Err(SYNTAX.into());
        }
        count = Some(args.at_least(1, "ERR count should be greater than 0")?);
    }
    timeout.map_or(Ok(()), |timeout| Args::check_timeout(timeout))?;
    for key in keys {
        let Some((zset, rows)) = database.write::<Zset>(key)? else { continue };
        let popped = zset.pop(rows, from_max, count.unwrap_or(1) as usize);
        database.settle(key);
        return Ok(Reply::Array(vec![Reply::Bulk(key.clone()), members_reply(popped, true, true)]));
    }
    Ok(Reply::NullArray)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Union,
    Inter,
    Diff,
}

#[derive(Clone, Copy)]
enum Aggregate {
    Sum,
    Min,
    Max,
}

impl Aggregate {
    fn of(self, left: f64, right: f64) -> f64 {
        match self {
            Aggregate::Sum => finite_or_zero(left + right),
            Aggregate::Min => left.min(right),
            Aggregate::Max => left.max(right),
        }
    }
}

/// Redis takes the sum of the two infinities, and nothing times infinity, for 0.
fn finite_or_zero(score: f64) -> f64 {
    if score.is_nan() { 0.0 } else { score + 0.0 }
}

/// The members of a set or a sorted set with their scores; those of a set count 1.
fn members_of(database: &mut Database, key: &[u8]) -> Checked<Map<f64>> {
    match database.entry(key).map(|entry| &entry.value) {
        Some(Value::Zset(zset)) => Ok(zset.scores.clone()),
        Some(Value::Set(set)) => Ok(set.members().map(|member| (member.clone(), 1.0)).collect()),
        Some(_) => Err(WRONG_TYPE.into()),
        None => Ok(Map::default()),
    }
}

/// The number of keys and what they hold. Redis looks at that before it reads on.
fn sources(database: &mut Database, args: &mut Args<'_>) -> Checked<Vec<Map<f64>>> {
    let count = args.integer()?;
    if count < 1 {
        return Err(format!("ERR at least 1 input key is needed for '{}' command", args.name).into());
    }
    let keys = args.take(usize::try_from(count).unwrap_or(usize::MAX))?;
    keys.iter().map(|key| members_of(database, key)).collect()
}

fn combine(database: &mut Database, mut args: Args<'_>, how: How, stores: bool) -> Answer {
    let target = if stores { Some(args.next()?) } else { None };
    let sets = sources(database, &mut args)?;
    let (mut weights, mut aggregate, mut with_scores) = (vec![1.0; sets.len()], Aggregate::Sum, false);
    while !args.is_empty() {
        if how != How::Diff && args.accept_with("weights", sets.len()) {
            for weight in &mut weights {
                *weight = args.float_or("ERR weight value is not a float")?;
            }
        } else if how != How::Diff && args.accept_with("aggregate", 1) {
            aggregate = match () {
                () if args.accept("sum") => Aggregate::Sum,
                () if args.accept("min") => Aggregate::Min,
                () if args.accept("max") => Aggregate::Max,
                () => return Err(SYNTAX.into()),
            };
        } else if !stores && args.accept("withscores") {
            with_scores = true;
        } else {
            return Err(SYNTAX.into());
        }
    }
    let combined = combined(sets, &weights, aggregate, how);
    let mut members: Vec<(Bytes, f64)> = combined.into_iter().collect();
    members.sort_by(|left, right| (Score(left.1), &left.0).cmp(&(Score(right.1), &right.0)));
    match target {
        Some(target) => store(database, target, members),
        None => Ok(members_reply(members, with_scores, database.is_resp3())),
    }
}

fn combined(sets: Vec<Map<f64>>, weights: &[f64], aggregate: Aggregate, how: How) -> Map<f64> {
    let mut sets: Vec<(Map<f64>, &f64)> = sets.into_iter().zip(weights).collect();
    if how != How::Diff {
        // As Redis does: what infinities add up to hangs on the order.
        sets.sort_by_key(|(set, _)| set.len());
    }
    let mut sets = sets.into_iter();
    let Some((mut result, weight)) = sets.next() else { return Map::default() };
    result.values_mut().for_each(|score| *score = finite_or_zero(*score * weight));
    for (set, weight) in sets {
        match how {
            How::Diff => result.retain(|member, _| !set.contains_key(member)),
            How::Inter => result.retain(|member, score| match set.get(member) {
                Some(other) => {
                    *score = aggregate.of(*score, other * weight);
                    true
                }
                None => false,
            }),
            How::Union => {
                for (member, other) in set {
                    let other = finite_or_zero(other * weight);
                    result.entry(member).and_modify(|score| *score = aggregate.of(*score, other)).or_insert(other);
                }
            }
        }
    }
    result
}

fn inter_card(database: &mut Database, mut args: Args<'_>) -> Answer {
    let sets = sources(database, &mut args)?;
    let limit = card_limit(&mut args)?;
    let weights = vec![1.0; sets.len()];
    let common = combined(sets, &weights, Aggregate::Sum, How::Inter);
    Ok(Reply::count(common.len().min(limit) as u64))
}

fn random_member(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let (count, with_scores) = sample_count_with(&mut args, "withscores")?;
    let (nests, mut dice) = (database.is_resp3(), database.dice());
    let zset = database.read::<Zset>(key)?;
    let places = pick_places(&mut dice, zset.map_or(0, Zset::len), count.unwrap_or(1));
    let picked = places.into_iter().filter_map(|place| zset?.scores.get_index(place));
    let mut picked = picked.map(|(member, score)| (member.clone(), *score));
    Ok(match count {
        Some(_) => members_reply(picked, with_scores, nests),
        None => picked.next().map_or(Reply::Null, |(member, _)| Reply::Bulk(member)),
    })
}

/// As the pages of a scan have it: an integer is written out.
fn format_page_score(score: f64) -> String {
    const WRITTEN_OUT_MAX: f64 = (i64::MAX / 2) as f64;
    let is_integer = score.trunc() == score && score.abs() <= WRITTEN_OUT_MAX;
    if is_integer { (score as i64).to_string() } else { format_double(score) }
}

fn scan(database: &mut Database, mut args: Args<'_>) -> Answer {
    let key = args.next()?;
    let page = Page::parse(&mut args, false)?;
    let empty = Map::default();
    let scores = database.read::<Zset>(key)?.map_or(&empty, |zset| &zset.scores);
    Ok(scan_page(scores, &page, |found, member, score| {
        found.extend([Reply::Bulk(member.clone()), Reply::Bulk(Bytes::from(format_page_score(*score)))]);
    }))
}
