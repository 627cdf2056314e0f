//! Redis's own commands: where their keys stand, and what becomes of them over several shards.
//!
//! One row for each. The arguments are the server's to judge: a request passes as it came, and what is wrong with it is
//! answered in the server's words. So a row holds only what routing needs, the arity included, because a transaction is
//! checked when it is queued. Commands that a server has and this table lacks are routed by the key positions that the
//! server's own `COMMAND` reports ([`Keys::Range`]).
//!
//! Leaves carrying out to `forward`. A row with a new [`How`] needs an arm there.

use bytes::Bytes;
use std::sync::LazyLock;

use crate::error::{Error, Result};

/// Where the keys of a request stand. Places count from the command's name, which is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    None,
    /// From the first place to the last, which counts from the end when negative, every `step` words.
    Range {
        first: usize,
        last: isize,
        step: usize,
    },
    /// How many stands at a place, and they follow; with `stored` the first word is a key as well.
    Numbered {
        at: usize,
        stored: bool,
    },
    /// The first half of what follows `STREAMS`, which ends the options.
    Streams,
    /// The first word, and what follows `STORE` or `STOREDIST`.
    Sort,
}

const ONE: Keys = Keys::Range { first: 1, last: 1, step: 1 };
const SECOND: Keys = Keys::Range { first: 2, last: 2, step: 1 };
const TWO: Keys = Keys::Range { first: 1, last: 2, step: 1 };
const ALL: Keys = Keys::Range { first: 1, last: -1, step: 1 };
const ALL_FROM_SECOND: Keys = Keys::Range { first: 2, last: -1, step: 1 };
const ALL_BUT_LAST: Keys = Keys::Range { first: 1, last: -2, step: 1 };
const PAIRS: Keys = Keys::Range { first: 1, last: -1, step: 2 };
const STORED: Keys = Keys::Numbered { at: 2, stored: true };

const fn numbered(at: usize) -> Keys {
    Keys::Numbered { at, stored: false }
}

/// Where a blocking command says how long it waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    SecondsFirst,
    SecondsLast,
    /// `BLOCK milliseconds`, without which it does not wait.
    Option,
}

impl Wait {
    /// The word of a request that says how long.
    pub fn word(self, words: &[Bytes]) -> Option<&Bytes> {
        match self {
            Wait::SecondsFirst => words.get(1),
            Wait::SecondsLast => words.last(),
            Wait::Option => words.get(StreamOptions::of(words)?.block?),
        }
    }

    /// What is wrong with that word, in Redis's words.
    fn fault(self, words: &[Bytes]) -> Option<Error> {
        let text = std::str::from_utf8(self.word(words)?).unwrap_or_default();
        let (ms, kind) = match self {
            Wait::Option => (text.parse::<i64>().ok().map(|ms| ms as f64), "an integer"),
            _ => (text.parse::<f64>().ok().map(|seconds| seconds * 1_000.0), "a float"),
        };
        match ms.filter(|ms| !ms.is_nan()) {
            None => Some(Error::bad(format!("timeout is not {kind} or out of range"))),
            // Redis says the same of what has no place in its milliseconds.
            Some(ms) if ms < 0.0 || ms >= i64::MAX as f64 => Some(Error::bad("timeout is negative")),
            Some(_) => None,
        }
    }
}

/// The commands of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Multi,
    Exec,
    Discard,
    Watch,
    Unwatch,
}

/// The commands of pub/sub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Talk {
    Subscribe,
    Unsubscribe,
    PatternSubscribe,
    PatternUnsubscribe,
    ShardSubscribe,
    ShardUnsubscribe,
    Publish,
    ShardPublish,
    Ask,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Goes whole to the shard of its keys.
    Pass,
    /// Split by shard; the counts are added up.
    Count,
    /// Split by shard; the values are put back in order.
    Mget,
    /// Split by shard; each part is one commit.
    Mset,
    /// Waits without keeping a connection to a shard.
    Block(Wait),
    /// Every shard; the numbers are added up.
    Sum,
    /// Every shard in turn.
    Scan,
    Keys,
    RandomKey,
    Script,
    Function,
    Transaction(Step),
    Channel(Talk),
    Refused,
}

/// One command.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Upper case.
    pub name: &'static str,
    /// As Redis counts: the words of a request, or when negative the fewest.
    pub arity: i8,
    pub keys: Keys,
    pub how: How,
}

const fn row(name: &'static str, arity: i8, keys: Keys, how: How) -> Row {
    Row { name, arity, keys, how }
}

pub static ROWS: &[Row] = &[
    // Lists.
    row("LPUSH", -3, ONE, How::Pass),
    row("RPUSH", -3, ONE, How::Pass),
    row("LPUSHX", -3, ONE, How::Pass),
    row("RPUSHX", -3, ONE, How::Pass),
    row("LPOP", -2, ONE, How::Pass),
    row("RPOP", -2, ONE, How::Pass),
    row("LLEN", 2, ONE, How::Pass),
    row("LRANGE", 4, ONE, How::Pass),
    row("LINDEX", 3, ONE, How::Pass),
    row("LSET", 4, ONE, How::Pass),
    row("LINSERT", 5, ONE, How::Pass),
    row("LREM", 4, ONE, How::Pass),
    row("LTRIM", 4, ONE, How::Pass),
    row("LPOS", -3, ONE, How::Pass),
    row("LMOVE", 5, TWO, How::Pass),
    row("RPOPLPUSH", 3, TWO, How::Pass),
    row("LMPOP", -4, numbered(1), How::Pass),
    row("BLPOP", -3, ALL_BUT_LAST, How::Block(Wait::SecondsLast)),
    row("BRPOP", -3, ALL_BUT_LAST, How::Block(Wait::SecondsLast)),
    row("BLMOVE", 6, TWO, How::Block(Wait::SecondsLast)),
    row("BRPOPLPUSH", 4, TWO, How::Block(Wait::SecondsLast)),
    row("BLMPOP", -5, numbered(2), How::Block(Wait::SecondsFirst)),
    // Keys of any kind.
    row("DEL", -2, ALL, How::Count),
    row("UNLINK", -2, ALL, How::Count),
    row("EXISTS", -2, ALL, How::Count),
    row("TOUCH", -2, ALL, How::Count),
    row("TYPE", 2, ONE, How::Pass),
    row("EXPIRE", -3, ONE, How::Pass),
    row("PEXPIRE", -3, ONE, How::Pass),
    row("EXPIREAT", -3, ONE, How::Pass),
    row("PEXPIREAT", -3, ONE, How::Pass),
    row("TTL", 2, ONE, How::Pass),
    row("PTTL", 2, ONE, How::Pass),
    row("EXPIRETIME", 2, ONE, How::Pass),
    row("PEXPIRETIME", 2, ONE, How::Pass),
    row("PERSIST", 2, ONE, How::Pass),
    row("DUMP", 2, ONE, How::Pass),
    row("RESTORE", -4, ONE, How::Pass),
    row("RENAME", 3, TWO, How::Pass),
    row("RENAMENX", 3, TWO, How::Pass),
    row("COPY", -3, TWO, How::Pass),
    row("SORT", -2, Keys::Sort, How::Pass),
    row("SORT_RO", -2, ONE, How::Pass),
    row("OBJECT", -2, SECOND, How::Pass),
    row("MEMORY", -2, SECOND, How::Pass),
    row("SCAN", -2, Keys::None, How::Scan),
    row("KEYS", 2, Keys::None, How::Keys),
    row("DBSIZE", 1, Keys::None, How::Sum),
    row("RANDOMKEY", 1, Keys::None, How::RandomKey),
    // Strings and bits.
    row("GET", 2, ONE, How::Pass),
    row("SET", -3, ONE, How::Pass),
    row("SETNX", 3, ONE, How::Pass),
    row("SETEX", 4, ONE, How::Pass),
    row("PSETEX", 4, ONE, How::Pass),
    row("GETSET", 3, ONE, How::Pass),
    row("GETDEL", 2, ONE, How::Pass),
    row("GETEX", -2, ONE, How::Pass),
    row("GETRANGE", 4, ONE, How::Pass),
    row("SUBSTR", 4, ONE, How::Pass),
    row("SETRANGE", 4, ONE, How::Pass),
    row("STRLEN", 2, ONE, How::Pass),
    row("APPEND", 3, ONE, How::Pass),
    row("INCR", 2, ONE, How::Pass),
    row("DECR", 2, ONE, How::Pass),
    row("INCRBY", 3, ONE, How::Pass),
    row("DECRBY", 3, ONE, How::Pass),
    row("INCRBYFLOAT", 3, ONE, How::Pass),
    row("MGET", -2, ALL, How::Mget),
    row("MSET", -3, PAIRS, How::Mset),
    row("MSETNX", -3, PAIRS, How::Pass),
    row("LCS", -3, TWO, How::Pass),
    row("GETBIT", 3, ONE, How::Pass),
    row("SETBIT", 4, ONE, How::Pass),
    row("BITCOUNT", -2, ONE, How::Pass),
    row("BITPOS", -3, ONE, How::Pass),
    row("BITFIELD", -2, ONE, How::Pass),
    row("BITFIELD_RO", -2, ONE, How::Pass),
    row("BITOP", -4, ALL_FROM_SECOND, How::Pass),
    row("PFADD", -2, ONE, How::Pass),
    row("PFCOUNT", -2, ALL, How::Pass),
    row("PFMERGE", -2, ALL, How::Pass),
    // Hashes.
    row("HSET", -4, ONE, How::Pass),
    row("HSETNX", 4, ONE, How::Pass),
    row("HMSET", -4, ONE, How::Pass),
    row("HGET", 3, ONE, How::Pass),
    row("HMGET", -3, ONE, How::Pass),
    row("HGETALL", 2, ONE, How::Pass),
    row("HDEL", -3, ONE, How::Pass),
    row("HEXISTS", 3, ONE, How::Pass),
    row("HLEN", 2, ONE, How::Pass),
    row("HKEYS", 2, ONE, How::Pass),
    row("HVALS", 2, ONE, How::Pass),
    row("HSTRLEN", 3, ONE, How::Pass),
    row("HINCRBY", 4, ONE, How::Pass),
    row("HINCRBYFLOAT", 4, ONE, How::Pass),
    row("HRANDFIELD", -2, ONE, How::Pass),
    row("HSCAN", -3, ONE, How::Pass),
    // Sets.
    row("SADD", -3, ONE, How::Pass),
    row("SREM", -3, ONE, How::Pass),
    row("SCARD", 2, ONE, How::Pass),
    row("SMEMBERS", 2, ONE, How::Pass),
    row("SISMEMBER", 3, ONE, How::Pass),
    row("SMISMEMBER", -3, ONE, How::Pass),
    row("SPOP", -2, ONE, How::Pass),
    row("SRANDMEMBER", -2, ONE, How::Pass),
    row("SSCAN", -3, ONE, How::Pass),
    row("SMOVE", 4, TWO, How::Pass),
    row("SDIFF", -2, ALL, How::Pass),
    row("SINTER", -2, ALL, How::Pass),
    row("SUNION", -2, ALL, How::Pass),
    row("SDIFFSTORE", -3, ALL, How::Pass),
    row("SINTERSTORE", -3, ALL, How::Pass),
    row("SUNIONSTORE", -3, ALL, How::Pass),
    row("SINTERCARD", -3, numbered(1), How::Pass),
    // Sorted sets and places.
    row("ZADD", -4, ONE, How::Pass),
    row("ZREM", -3, ONE, How::Pass),
    row("ZCARD", 2, ONE, How::Pass),
    row("ZCOUNT", 4, ONE, How::Pass),
    row("ZLEXCOUNT", 4, ONE, How::Pass),
    row("ZSCORE", 3, ONE, How::Pass),
    row("ZMSCORE", -3, ONE, How::Pass),
    row("ZRANK", 3, ONE, How::Pass),
    row("ZREVRANK", 3, ONE, How::Pass),
    row("ZINCRBY", 4, ONE, How::Pass),
    row("ZRANGE", -4, ONE, How::Pass),
    row("ZREVRANGE", -4, ONE, How::Pass),
    row("ZRANGEBYSCORE", -4, ONE, How::Pass),
    row("ZREVRANGEBYSCORE", -4, ONE, How::Pass),
    row("ZRANGEBYLEX", -4, ONE, How::Pass),
    row("ZREVRANGEBYLEX", -4, ONE, How::Pass),
    row("ZREMRANGEBYSCORE", 4, ONE, How::Pass),
    row("ZREMRANGEBYRANK", 4, ONE, How::Pass),
    row("ZREMRANGEBYLEX", 4, ONE, How::Pass),
    row("ZPOPMIN", -2, ONE, How::Pass),
    row("ZPOPMAX", -2, ONE, How::Pass),
    row("ZRANDMEMBER", -2, ONE, How::Pass),
    row("ZSCAN", -3, ONE, How::Pass),
    row("ZRANGESTORE", -5, TWO, How::Pass),
    row("ZMPOP", -4, numbered(1), How::Pass),
    row("ZDIFF", -3, numbered(1), How::Pass),
    row("ZINTER", -3, numbered(1), How::Pass),
    row("ZUNION", -3, numbered(1), How::Pass),
    row("ZINTERCARD", -3, numbered(1), How::Pass),
    row("ZDIFFSTORE", -4, STORED, How::Pass),
    row("ZINTERSTORE", -4, STORED, How::Pass),
    row("ZUNIONSTORE", -4, STORED, How::Pass),
    row("BZPOPMIN", -3, ALL_BUT_LAST, How::Block(Wait::SecondsLast)),
    row("BZPOPMAX", -3, ALL_BUT_LAST, How::Block(Wait::SecondsLast)),
    row("BZMPOP", -5, numbered(2), How::Block(Wait::SecondsFirst)),
    row("GEOADD", -5, ONE, How::Pass),
    row("GEODIST", -4, ONE, How::Pass),
    row("GEOHASH", -2, ONE, How::Pass),
    row("GEOPOS", -2, ONE, How::Pass),
    row("GEOSEARCH", -7, ONE, How::Pass),
    row("GEOSEARCHSTORE", -8, TWO, How::Pass),
    row("GEORADIUS", -6, Keys::Sort, How::Pass),
    row("GEORADIUSBYMEMBER", -5, Keys::Sort, How::Pass),
    row("GEORADIUS_RO", -6, ONE, How::Pass),
    row("GEORADIUSBYMEMBER_RO", -5, ONE, How::Pass),
    // Streams.
    row("XADD", -5, ONE, How::Pass),
    row("XACK", -4, ONE, How::Pass),
    row("XAUTOCLAIM", -6, ONE, How::Pass),
    row("XCLAIM", -6, ONE, How::Pass),
    row("XDEL", -3, ONE, How::Pass),
    row("XLEN", 2, ONE, How::Pass),
    row("XPENDING", -3, ONE, How::Pass),
    row("XRANGE", -4, ONE, How::Pass),
    row("XREVRANGE", -4, ONE, How::Pass),
    row("XSETID", -3, ONE, How::Pass),
    row("XTRIM", -4, ONE, How::Pass),
    row("XGROUP", -2, SECOND, How::Pass),
    row("XINFO", -2, SECOND, How::Pass),
    row("XREAD", -4, Keys::Streams, How::Block(Wait::Option)),
    row("XREADGROUP", -7, Keys::Streams, How::Block(Wait::Option)),
    // Scripts.
    row("EVAL", -3, numbered(2), How::Pass),
    row("EVAL_RO", -3, numbered(2), How::Pass),
    row("EVALSHA", -3, numbered(2), How::Pass),
    row("EVALSHA_RO", -3, numbered(2), How::Pass),
    row("FCALL", -3, numbered(2), How::Pass),
    row("FCALL_RO", -3, numbered(2), How::Pass),
    row("SCRIPT", -2, Keys::None, How::Script),
    row("FUNCTION", -2, Keys::None, How::Function),
    // Transactions.
    row("MULTI", 1, Keys::None, How::Transaction(Step::Multi)),
    row("EXEC", 1, Keys::None, How::Transaction(Step::Exec)),
    row("DISCARD", 1, Keys::None, How::Transaction(Step::Discard)),
    row("WATCH", -2, ALL, How::Transaction(Step::Watch)),
    row("UNWATCH", 1, Keys::None, How::Transaction(Step::Unwatch)),
    // Pub/sub.
    row("SUBSCRIBE", -2, Keys::None, How::Channel(Talk::Subscribe)),
    row("UNSUBSCRIBE", -1, Keys::None, How::Channel(Talk::Unsubscribe)),
    row("PSUBSCRIBE", -2, Keys::None, How::Channel(Talk::PatternSubscribe)),
    row("PUNSUBSCRIBE", -1, Keys::None, How::Channel(Talk::PatternUnsubscribe)),
    row("SSUBSCRIBE", -2, Keys::None, How::Channel(Talk::ShardSubscribe)),
    row("SUNSUBSCRIBE", -1, Keys::None, How::Channel(Talk::ShardUnsubscribe)),
    row("PUBLISH", 3, Keys::None, How::Channel(Talk::Publish)),
    row("SPUBLISH", 3, Keys::None, How::Channel(Talk::ShardPublish)),
    row("PUBSUB", -2, Keys::None, How::Channel(Talk::Ask)),
    // What must not pass unless the configuration names it; then it goes to every shard.
    row("FLUSHALL", -1, Keys::None, How::Refused),
    row("FLUSHDB", -1, Keys::None, How::Refused),
    row("SWAPDB", 3, Keys::None, How::Refused),
    row("MOVE", 3, Keys::None, How::Refused),
    row("MIGRATE", -6, Keys::None, How::Refused),
    row("SAVE", 1, Keys::None, How::Refused),
    row("BGSAVE", -1, Keys::None, How::Refused),
    row("BGREWRITEAOF", 1, Keys::None, How::Refused),
    row("SHUTDOWN", -1, Keys::None, How::Refused),
    row("DEBUG", -2, Keys::None, How::Refused),
    row("REPLICAOF", 3, Keys::None, How::Refused),
    row("SLAVEOF", 3, Keys::None, How::Refused),
    row("FAILOVER", -1, Keys::None, How::Refused),
    row("SYNC", 1, Keys::None, How::Refused),
    row("PSYNC", -3, Keys::None, How::Refused),
    row("REPLCONF", -1, Keys::None, How::Refused),
    row("MONITOR", 1, Keys::None, How::Refused),
    row("RESTORE-ASKING", -4, Keys::None, How::Refused),
    row("PFDEBUG", 3, Keys::None, How::Refused),
    row("PFSELFTEST", 1, Keys::None, How::Refused),
];

/// A hash table over the names with open addressing; `0` is free, `n` is row `n - 1`.
static SLOTS: LazyLock<Vec<u16>> = LazyLock::new(|| {
    let mut slots = vec![0u16; (ROWS.len() * 4).next_power_of_two()];
    for (index, row) in ROWS.iter().enumerate() {
        let mut at = hash(row.name.as_bytes()) & (slots.len() - 1);
        while slots[at] != 0 {
            at = (at + 1) & (slots.len() - 1);
        }
        slots[at] = index as u16 + 1;
    }
    slots
});

/// The first and last eight bytes, blind to the case of letters; names are short.
fn hash(name: &[u8]) -> usize {
    let eight =
        |bytes: &[u8]| bytes.iter().take(8).fold(name.len() as u64, |word, byte| (word << 8) ^ u64::from(byte | 0x20));
    let word = eight(name) ^ eight(name.get(name.len().saturating_sub(8)..).unwrap_or_default()).rotate_left(29);
    (word.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as usize
}

/// The row of a command by its name in any case.
pub fn find(name: &[u8]) -> Option<&'static Row> {
    place(name).map(|at| &ROWS[at])
}

/// The same, as its place in [`ROWS`].
pub fn place(name: &[u8]) -> Option<usize> {
    let slots = &*SLOTS;
    let mut at = hash(name) & (slots.len() - 1);
    loop {
        let place = usize::from(slots[at]).checked_sub(1)?;
        if ROWS[place].name.as_bytes().eq_ignore_ascii_case(name) {
            return Some(place);
        }
        at = (at + 1) & (slots.len() - 1);
    }
}

impl Row {
    pub fn has_arity(&self, words: usize) -> bool {
        let wanted = usize::from(self.arity.unsigned_abs());
        if self.arity < 0 { words >= wanted } else { words == wanted }
    }

    /// In Redis's words.
    pub fn wrong_arity(&self) -> Error {
        Error::bad(format!("wrong number of arguments for '{}' command", self.name.to_ascii_lowercase()))
    }

    /// What is wrong with a request beside its arity, as far as it is cheap to see, in Redis's words. For several shards:
    /// where a word is missing another is taken for a key, and that the keys do not live together is then no news.
    pub fn fault(&self, words: &[Bytes]) -> Option<Error> {
        let is_one_of = |at: usize, ends: [&str; 2]| {
            words.get(at).is_some_and(|word| ends.iter().any(|end| word.eq_ignore_ascii_case(end.as_bytes())))
        };
        const ENDS: [&str; 2] = ["LEFT", "RIGHT"];
        let is_understood = match self.name {
            "MSETNX" if words.len().is_multiple_of(2) => return Some(self.wrong_arity()),
            "LMOVE" | "BLMOVE" => is_one_of(3, ENDS) && is_one_of(4, ENDS),
            "LMPOP" | "BLMPOP" | "ZMPOP" | "BZMPOP" => {
                let ends = if self.name.contains('Z') { ["MIN", "MAX"] } else { ENDS };
                self.keys.places(words).last().is_none_or(|last| is_one_of(last + 1, ends))
            }
            _ => true,
        };
        if !is_understood {
            return Some(Error::bad("syntax error"));
        }
        match self.how {
            How::Block(wait) => wait.fault(words),
            _ => None,
        }
    }
}

impl Keys {
    /// Calls `take` with the place of each key that is there, until it fails. A request whose arguments make no sense
    /// has no keys; the server will say what is wrong with it.
    pub fn each(self, words: &[Bytes], mut take: impl FnMut(usize) -> Result<()>) -> Result<()> {
        match self {
            Keys::None => Ok(()),
            Keys::Range { first, last, step } => {
                let end = match usize::try_from(last) {
                    Ok(last) => (last + 1).min(words.len()),
                    Err(_) => (words.len() + 1).saturating_sub(last.unsigned_abs()),
                };
                (first..end).step_by(step.max(1)).try_for_each(take)
            }
            Keys::Numbered { at, stored } => {
                let count = words.get(at).and_then(|word| std::str::from_utf8(word).ok()?.parse::<usize>().ok());
                let end = at.saturating_add(1).saturating_add(count.unwrap_or(0));
                if stored {
                    take(1)?;
                }
                if end > words.len() { Ok(()) } else { (at + 1..end).try_for_each(take) }
            }
            Keys::Streams => {
                let Some(StreamOptions { start, .. }) = StreamOptions::of(words) else { return Ok(()) };
                let rest = words.len() - start;
                if rest.is_multiple_of(2) { (start..start + rest / 2).try_for_each(take) } else { Ok(()) }
            }
            Keys::Sort => {
                if words.len() > 1 {
                    take(1)?;
                }
                let is_store =
                    |word: &Bytes| word.eq_ignore_ascii_case(b"STORE") || word.eq_ignore_ascii_case(b"STOREDIST");
                (2..words.len().saturating_sub(1)).filter(|at| is_store(&words[*at])).try_for_each(|at| take(at + 1))
            }
        }
    }

    /// The places of all keys.
    pub fn places(self, words: &[Bytes]) -> Vec<usize> {
        let mut places = Vec::new();
        // Nothing in it fails.
        let _ = self.each(words, |at| {
            places.push(at);
            Ok(())
        });
        places
    }
}

/// What stands before the keys of `XREAD` and `XREADGROUP`. A group or a consumer may be named as an option is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamOptions {
    /// The place of the first key.
    pub start: usize,
    /// The place of the milliseconds of `BLOCK`.
    pub block: Option<usize>,
}

impl StreamOptions {
    /// Walks the options as Redis does; `None`: they make no sense to it.
    pub fn of(words: &[Bytes]) -> Option<StreamOptions> {
        let (mut at, mut block) = (1, None);
        loop {
            let word = words.get(at)?;
            let is = |name: &[u8]| word.eq_ignore_ascii_case(name);
            if is(b"STREAMS") {
                return Some(StreamOptions { start: at + 1, block });
            }
            if is(b"BLOCK") {
                block = Some(at + 1);
            }
            at += match () {
                () if is(b"BLOCK") || is(b"COUNT") => 2,
                () if is(b"GROUP") => 3,
                () if is(b"NOACK") => 1,
                () => return None,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(line: &str) -> Vec<String> {
        let words: Vec<Bytes> = line.split(' ').map(|word| Bytes::copy_from_slice(word.as_bytes())).collect();
        let row = find(&words[0]).unwrap();
        row.keys.places(&words).into_iter().map(|at| String::from_utf8_lossy(&words[at]).into_owned()).collect()
    }

    #[test]
    fn every_row_is_found_by_its_name_in_any_case() {
        for row in ROWS {
            assert_eq!(find(row.name.to_ascii_lowercase().as_bytes()).unwrap().name, row.name);
        }
        assert!(find(b"nosuch").is_none() && find(b"").is_none());
    }

    #[test]
    fn what_is_wrong_with_a_request_is_said_in_redis_words() {
        for (line, expected) in [
            ("blpop a 0.05 x", "timeout is not a float or out of range"),
            ("blpop a b nan", "timeout is not a float or out of range"),
            ("bzpopmin a b -1", "timeout is negative"),
            ("brpop a b 1e400", "timeout is negative"),
            ("brpop a b 1.5", ""),
            ("zmpop 2 a MIN", "syntax error"),
            ("zmpop 2 a b LEFT", "syntax error"),
            ("zmpop 2 a b max COUNT 2", ""),
            ("zmpop x a b MIN", ""),
            ("blmpop x 2 a LEFT", "syntax error"),
            ("blmpop x 2 a b LEFT", "timeout is not a float or out of range"),
            ("lmove a b UP LEFT", "syntax error"),
            ("blmove a b LEFT right x", "timeout is not a float or out of range"),
            ("msetnx a 1 b", "wrong number of arguments for 'msetnx' command"),
            ("msetnx a 1 b 2", ""),
            ("xread BLOCK x STREAMS a b 0 0", "timeout is not an integer or out of range"),
            ("xread BLOCK -1 STREAMS a b 0 0", "timeout is negative"),
            ("xread STREAMS a b 0 0", ""),
        ] {
            let words: Vec<Bytes> = line.split(' ').map(|word| Bytes::copy_from_slice(word.as_bytes())).collect();
            let fault = find(&words[0]).unwrap().fault(&words);
            assert_eq!(fault.map_or_else(String::new, |fault| fault.text.into_owned()), expected, "{line}");
        }
    }

    #[test]
    fn keys_are_found_where_redis_has_them() {
        for (line, expected) in [
            ("get a", "a"),
            ("mset a 1 b 2", "a b"),
            ("brpop a b 0", "a b"),
            ("brpop a", ""),
            ("lmpop 2 a b LEFT", "a b"),
            ("lmpop 9 a b LEFT", ""),
            ("lmpop -1 a b LEFT", ""),
            ("blmpop 0 1 a LEFT", "a"),
            ("zunionstore d 2 a b WEIGHTS 1 2", "d a b"),
            ("xread COUNT 1 STREAMS a b 0 0", "a b"),
            ("xread STREAMS a b 0", ""),
            ("xreadgroup GROUP streams block NOACK STREAMS a >", "a"),
            ("xreadgroup GROUP streams STREAMS a >", ""),
            ("xread BLOCK streams STREAMS streams 0", "streams"),
            ("xread COUNT STREAMS a 0", ""),
            ("sort a BY x STORE d", "a d"),
            ("eval script 2 a b c", "a b"),
            ("bitop AND d a b", "d a b"),
            ("xinfo STREAM a", "a"),
            ("dbsize", ""),
        ] {
            assert_eq!(keys(line).join(" "), expected, "{line}");
        }
    }
}
