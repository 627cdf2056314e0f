//! The ordinary keys of a shard that lives in this process: what the commands of Redis 7.0 do to them, pure.
//!
//! A [`Database`] holds its keys in memory, as Redis does, and tells as [rows](rows) what a durable shard must write
//! down: one small row for each element that changed, so that a push on a long list costs one row and not the list. The
//! caller runs [`Unit`]s in order, takes the changed rows and the changed keys, commits the rows, then answers. No clock
//! and no disk here.
//!
//! Replies and errors are those of Redis 7.0.15 byte for byte; `tests/keys.rs` drives both with the same commands. What
//! differs by design stands in `protocol.md`. A new command is one row in its family's `COMMANDS` and one function; a
//! command that is not served for good has its row in [`REFUSED`].
//!
//! Nothing that a client sends is kept by reference: its bytes lie in a larger read buffer, which they would keep alive.

use bytes::Bytes;
use foldhash::fast::RandomState;
use indexmap::IndexMap;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::BuildHasher;
use std::sync::LazyLock;

use super::Unit;
use crate::clock::UnixMs;
use crate::resp::reply::{Protocol, Reply};

mod args;
mod generic;
mod hash;
mod list;
mod number;
mod rows;
mod set;
mod shared;
mod stream;
mod string;
mod zset;

pub use rows::{Loading, RowChange};
pub use shared::Shared;

use args::Args;
use hash::Hash;
use list::List;
use rows::Rows;
use set::Set;
use stream::Stream;
use zset::Zset;

/// Most keys that are removed because their time is up before a unit; those that a command meets are removed as well.
const EXPIRED_KEYS_MAX: usize = 200;
/// Most rows of removed collections that are removed after a unit; the rest follows with the next ones.
const BURIED_ROWS_MAX: usize = 1_000;
/// The longest key, field or member: each is the name of a row, which the store on disk bounds at 64 kB.
const NAME_BYTES_MAX: usize = 65_000;
/// The longest string, as in Redis.
const STRING_BYTES_MAX: usize = 512 * 1024 * 1024;
/// How many versions are kept for keys that are gone. Two such keys that share one at worst end a transaction in vain.
const GONE_VERSIONS: usize = 4_096;

/// An insertion-ordered map that finds an element by its place too, which `SCAN` and random picks need.
type Map<V> = IndexMap<Bytes, V, RandomState>;

/// Why a request was refused, in Redis's words.
#[derive(Debug)]
struct Fault(Cow<'static, str>);

impl From<&'static str> for Fault {
    fn from(text: &'static str) -> Fault {
        Fault(Cow::Borrowed(text))
    }
}

impl From<String> for Fault {
    fn from(text: String) -> Fault {
        Fault(Cow::Owned(text))
    }
}

type Checked<T> = std::result::Result<T, Fault>;
type Answer = Checked<Reply>;

const WRONG_TYPE: &str = "WRONGTYPE Operation against a key holding the wrong kind of value";
const SYNTAX: &str = "ERR syntax error";
const NOT_AN_INTEGER: &str = "ERR value is not an integer or out of range";
const NO_SUCH_KEY: &str = "ERR no such key";

/// One command that is served.
struct Command {
    /// Lower case, as Redis writes it in errors.
    name: &'static str,
    /// The words of a request, or when negative the fewest.
    arity: i8,
    run: fn(&mut Database, Args<'_>) -> Answer,
}

const fn command(name: &'static str, arity: i8, run: fn(&mut Database, Args<'_>) -> Answer) -> Command {
    Command { name, arity, run }
}

/// The commands by family, as the reference names them.
static FAMILIES: [(&str, &[Command]); 7] = [
    ("keys of any kind", generic::COMMANDS),
    ("strings", string::COMMANDS),
    ("lists", list::COMMANDS),
    ("hashes", hash::COMMANDS),
    ("sets", set::COMMANDS),
    ("sorted sets", zset::COMMANDS),
    ("streams", stream::COMMANDS),
];

static SERVED: LazyLock<HashMap<&'static str, &'static Command>> = LazyLock::new(|| {
    FAMILIES.iter().flat_map(|(_, family)| family.iter()).map(|command| (command.name, command)).collect()
});

/// What Redis has and a local shard does not, by what is missing.
static REFUSED: &[(&str, &[&str])] = &[
    ("scripts", &["eval", "evalsha", "eval_ro", "evalsha_ro", "script", "fcall", "fcall_ro", "function"]),
    ("consumer groups", &["xgroup", "xreadgroup", "xack", "xclaim", "xautoclaim", "xpending", "xinfo", "xsetid"]),
    (
        "geographic sets",
        &[
            "geoadd",
            "geodist",
            "geohash",
            "geopos",
            "georadius",
            "georadius_ro",
            "georadiusbymember",
            "georadiusbymember_ro",
            "geosearch",
            "geosearchstore",
        ],
    ),
    ("HyperLogLogs", &["pfadd", "pfcount", "pfmerge", "pfdebug", "pfselftest"]),
    ("bit operations", &["setbit", "getbit", "bitcount", "bitpos", "bitop", "bitfield", "bitfield_ro"]),
    ("sorting", &["sort", "sort_ro"]),
    ("serialised values", &["dump", "restore", "migrate"]),
    ("object introspection", &["object", "memory"]),
    ("copies of keys", &["copy"]),
    ("several databases", &["move", "swapdb"]),
    ("the longest common subsequence", &["lcs"]),
];

/// The tables of what is served and what is not, for `protocol.md`.
pub fn reference() -> String {
    let cell = |names: &mut dyn Iterator<Item = &str>| {
        names.map(|name| format!("`{}`", name.to_ascii_uppercase())).collect::<Vec<_>>().join(" ")
    };
    let mut text = String::from("| served | |\n| --- | --- |\n");
    for (family, commands) in FAMILIES {
        text += &format!("| {family} | {} |\n", cell(&mut commands.iter().map(|command| command.name)));
    }
    text += "\n| refused | |\n| --- | --- |\n";
    for (what, names) in REFUSED {
        text += &format!("| {what} | {} |\n", cell(&mut names.iter().copied()));
    }
    text
}

/// What one key holds.
#[derive(Debug)]
enum Value {
    String(Bytes),
    List(List),
    Hash(Hash),
    Set(Set),
    Zset(Zset),
    Stream(Stream),
}

impl Value {
    /// As `TYPE` says it.
    fn type_name(&self) -> &'static str {
        match self {
            Value::String(_) => "string",
            Value::List(_) => "list",
            Value::Hash(_) => "hash",
            Value::Set(_) => "set",
            Value::Zset(_) => "zset",
            Value::Stream(_) => "stream",
        }
    }

    /// A collection without elements is no key any more. A stream is: it remembers its last id.
    fn is_over(&self) -> bool {
        match self {
            Value::String(_) | Value::Stream(_) => false,
            Value::List(list) => list.len() == 0,
            Value::Hash(hash) => hash.len() == 0,
            Value::Set(set) => set.len() == 0,
            Value::Zset(zset) => zset.len() == 0,
        }
    }

    /// The number that its element rows stand under; a string has none.
    fn id(&self) -> u64 {
        match self {
            Value::String(_) => 0,
            Value::List(list) => list.id(),
            Value::Hash(hash) => hash.id(),
            Value::Set(set) => set.id(),
            Value::Zset(zset) => zset.id(),
            Value::Stream(stream) => stream.id(),
        }
    }
}

/// A kind of collection that commands ask for.
trait Kind: Sized {
    fn of(value: &Value) -> Option<&Self>;
    fn of_mut(value: &mut Value) -> Option<&mut Self>;
    fn empty(id: u64) -> Value;
}

macro_rules! kind {
    ($kind:ident) => {
        impl Kind for $kind {
            fn of(value: &Value) -> Option<&Self> {
                if let Value::$kind(inner) = value { Some(inner) } else { None }
            }

            fn of_mut(value: &mut Value) -> Option<&mut Self> {
                if let Value::$kind(inner) = value { Some(inner) } else { None }
            }

            fn empty(id: u64) -> Value {
                Value::$kind($kind::new(id))
            }
        }
    };
}

kind!(List);
kind!(Hash);
kind!(Set);
kind!(Zset);
kind!(Stream);

/// One key.
#[derive(Debug)]
struct Entry {
    value: Value,
    expires: Option<UnixMs>,
    /// The number of the change that it is at. Never used twice, so that a key which went and came back is told apart.
    version: u64,
}

/// The ordinary keys of one shard.
pub struct Database {
    keys: Map<Entry>,
    /// The keys with an end, by it.
    ends: BTreeSet<(UnixMs, Bytes)>,
    rows: Rows,
    /// Collections whose key is gone and whose rows are not yet.
    graves: VecDeque<Value>,
    changed: Vec<Bytes>,
    /// How many changes there have been.
    changes: u64,
    gone_versions: Vec<u64>,
    ids: u64,
    now: UnixMs,
    protocol: Protocol,
    random: SmallRng,
}

impl Database {
    /// An empty one that keeps no rows: nothing of it outlives the process.
    pub fn volatile() -> Database {
        Database::new(Rows::none())
    }

    fn new(rows: Rows) -> Database {
        Database {
            keys: Map::default(),
            ends: BTreeSet::new(),
            rows,
            graves: VecDeque::new(),
            changed: Vec::new(),
            changes: 0,
            gone_versions: vec![0; GONE_VERSIONS],
            ids: 0,
            now: 0,
            protocol: Protocol::Resp2,
            random: SmallRng::from_os_rng(),
        }
    }

    /// Runs the requests of a unit at a point in time: one reply for each, or `None` when a watched key has changed.
    pub fn run(&mut self, unit: &Unit, now: UnixMs) -> Option<Vec<Reply>> {
        self.now = now;
        self.protocol = unit.protocol;
        self.expire(EXPIRED_KEYS_MAX);
        unit.watched.iter().for_each(|(key, _)| self.expire_key(key));
        let is_stale = unit.watched.iter().any(|(key, version)| self.version(key) != *version);
        let replies = (!is_stale).then(|| unit.requests.iter().map(|words| self.answer(words)).collect());
        self.bury(BURIED_ROWS_MAX);
        replies
    }

    /// Removes a bounded part of what is over, for times in which nothing is asked.
    pub fn sweep(&mut self, now: UnixMs) {
        self.now = now;
        self.expire(EXPIRED_KEYS_MAX);
        self.bury(BURIED_ROWS_MAX);
    }

    /// Whether there is something that a sweep will remove, now or when its time is up.
    pub fn has_more_to_sweep(&self) -> bool {
        !self.graves.is_empty() || !self.ends.is_empty()
    }

    /// A number that changes with every change of the key.
    pub fn version(&self, key: &[u8]) -> u64 {
        match self.keys.get(key) {
            Some(entry) => entry.version,
            None => self.gone_versions[self.gone_place(key)],
        }
    }

    /// The rows that have changed since this was last called. To be committed before any reply to what changed them.
    pub fn take_rows(&mut self) -> Vec<RowChange> {
        self.rows.take()
    }

    /// The keys that were written, removed or expired since this was last called, each at least once.
    pub fn take_changed(&mut self) -> Vec<Bytes> {
        std::mem::take(&mut self.changed)
    }

    fn answer(&mut self, words: &[Bytes]) -> Reply {
        let refusal = |text: Cow<'static, str>| Reply::RawError(Bytes::from(text.into_owned()));
        let Some(name) = words.first() else { return refusal(unknown(words).into()) };
        let name = String::from_utf8_lossy(name).to_ascii_lowercase();
        let Some(command) = SERVED.get(name.as_str()) else {
            let missing = REFUSED.iter().find(|(_, names)| names.contains(&name.as_str()));
            return refusal(match missing {
                Some((what, _)) => {
                    format!("ERR '{name}' is not served: this shard is embedded and has no {what}").into()
                }
                None => unknown(words).into(),
            });
        };
        let fits = match command.arity {
            exact @ 0.. => words.len() == exact as usize,
            fewest => words.len() >= fewest.unsigned_abs() as usize,
        };
        if !fits {
            return refusal(wrong_arity(command.name).0);
        }
        (command.run)(self, Args::new(command.name, words)).unwrap_or_else(|fault| refusal(fault.0))
    }

    fn is_resp3(&self) -> bool {
        self.protocol == Protocol::Resp3
    }

    /// A source of randomness for one command.
    fn dice(&mut self) -> SmallRng {
        SmallRng::from_rng(&mut self.random)
    }

    fn gone_place(&self, key: &[u8]) -> usize {
        self.keys.hasher().hash_one(key) as usize % self.gone_versions.len()
    }

    /// The key, unless there is none or its time is up.
    fn entry(&mut self, key: &[u8]) -> Option<&mut Entry> {
        self.expire_key(key);
        self.keys.get_mut(key)
    }

    fn exists(&mut self, key: &[u8]) -> bool {
        self.entry(key).is_some()
    }

    /// The collection of a key, to read.
    fn read<K: Kind>(&mut self, key: &[u8]) -> Checked<Option<&K>> {
        match self.entry(key) {
            Some(entry) => K::of(&entry.value).map(Some).ok_or(Fault::from(WRONG_TYPE)),
            None => Ok(None),
        }
    }

    /// The collection of a key, to change; [`Database::settle`] follows when it was.
    fn write<K: Kind>(&mut self, key: &[u8]) -> Checked<Option<(&mut K, &mut Rows)>> {
        self.expire_key(key);
        match self.keys.get_mut(key) {
            Some(entry) => match K::of_mut(&mut entry.value) {
                Some(inner) => Ok(Some((inner, &mut self.rows))),
                None => Err(WRONG_TYPE.into()),
            },
            None => Ok(None),
        }
    }

    /// The collection of a key, to change, new and empty when there was none; [`Database::settle`] follows.
    fn write_or_create<K: Kind>(&mut self, key: &[u8]) -> Checked<(&mut K, &mut Rows)> {
        check_name(key)?;
        if !self.exists(key) {
            self.ids += 1;
            let value = K::empty(self.ids);
            self.keys.insert(Bytes::copy_from_slice(key), Entry { value, expires: None, version: 0 });
            self.keep(key);
        }
        self.write(key)?.ok_or(Fault::from(WRONG_TYPE))
    }

    /// What every change of a key's value ends with: it has a new version, and goes when it holds nothing any more.
    fn settle(&mut self, key: &[u8]) {
        let Some(entry) = self.keys.get_mut(key) else { return };
        if entry.value.is_over() {
            self.remove(key);
            return;
        }
        self.changes += 1;
        entry.version = self.changes;
        // Its last id stands in the key's own row.
        let is_stream = matches!(entry.value, Value::Stream(_));
        if let Some((key, _)) = self.keys.get_key_value(key) {
            self.changed.push(key.clone());
        }
        if is_stream {
            self.keep(key);
        }
    }

    /// Writes the key's own row.
    fn keep(&mut self, key: &[u8]) {
        if let Some(entry) = self.keys.get(key) {
            self.rows.put_key(key, entry);
        }
    }

    /// Replaces whatever the key held.
    fn put(&mut self, key: &[u8], value: Value, expires: Option<UnixMs>) {
        match self.keys.get_full_mut(key) {
            Some((_, key, entry)) => {
                let key = key.clone();
                let old_end = std::mem::replace(&mut entry.expires, expires);
                let old = std::mem::replace(&mut entry.value, value);
                self.inter(old);
                self.move_end(key, old_end, expires);
            }
            None => {
                let own = Bytes::copy_from_slice(key);
                self.keys.insert(own.clone(), Entry { value, expires, version: 0 });
                self.move_end(own, None, expires);
            }
        }
        self.keep(key);
        self.settle(key);
    }

    fn put_string(&mut self, key: &[u8], text: Bytes, expires: Option<UnixMs>) -> Checked<()> {
        check_name(key)?;
        self.put(key, Value::String(text), expires);
        Ok(())
    }

    /// Sets or takes away the end of a key that exists.
    fn set_end(&mut self, key: &[u8], expires: Option<UnixMs>) {
        let Some((_, own, entry)) = self.keys.get_full_mut(key) else { return };
        let own = own.clone();
        let old_end = std::mem::replace(&mut entry.expires, expires);
        self.move_end(own, old_end, expires);
        self.keep(key);
        self.settle(key);
    }

    fn move_end(&mut self, key: Bytes, old: Option<UnixMs>, new: Option<UnixMs>) {
        if let Some(end) = old {
            self.ends.remove(&(end, key.clone()));
        }
        if let Some(end) = new {
            self.ends.insert((end, key));
        }
    }

    /// Removes a key; whether there was one.
    fn remove(&mut self, key: &[u8]) -> bool {
        let Some(value) = self.detach(key) else { return false };
        self.inter(value.0);
        true
    }

    /// Takes a key away and leaves the rows of its elements as they are, for the name that it gets.
    fn detach(&mut self, key: &[u8]) -> Option<(Value, Option<UnixMs>)> {
        let (own, entry) = self.keys.swap_remove_entry(key)?;
        self.move_end(own.clone(), entry.expires, None);
        self.rows.remove_key(key);
        self.changes += 1;
        let place = self.gone_place(key);
        self.gone_versions[place] = self.changes;
        self.changed.push(own);
        Some((entry.value, entry.expires))
    }

    /// Leaves the rows of a value that no key has any more to be removed bit by bit.
    fn inter(&mut self, value: Value) {
        if self.rows.are_kept() && value.id() > 0 {
            self.graves.push_back(value);
        }
    }

    fn bury(&mut self, rows_max: usize) {
        let mut left = rows_max;
        while let Some(grave) = self.graves.front_mut() {
            left = match grave {
                Value::String(_) => left,
                Value::List(list) => list.bury(&mut self.rows, left),
                Value::Hash(hash) => hash.bury(&mut self.rows, left),
                Value::Set(set) => set.bury(&mut self.rows, left),
                Value::Zset(zset) => zset.bury(&mut self.rows, left),
                Value::Stream(stream) => stream.bury(&mut self.rows, left),
            };
            if left == 0 {
                return;
            }
            self.graves.pop_front();
        }
    }

    fn expire(&mut self, keys_max: usize) {
        for _ in 0..keys_max {
            match self.ends.first() {
                Some((end, key)) if *end <= self.now => {
                    let key = key.clone();
                    self.remove(&key);
                }
                _ => return,
            }
        }
    }

    fn expire_key(&mut self, key: &[u8]) {
        let is_over = |entry: &Entry| entry.expires.is_some_and(|end| end <= self.now);
        if !self.ends.is_empty() && self.keys.get(key).is_some_and(is_over) {
            self.remove(key);
        }
    }
}

/// Refuses what is too long for the name of a row.
fn check_name(name: &[u8]) -> Checked<()> {
    if name.len() > NAME_BYTES_MAX {
        return Err(format!("TOOBIG a key, field or member has {} bytes; at most {NAME_BYTES_MAX}", name.len()).into());
    }
    Ok(())
}

fn wrong_arity(name: &str) -> Fault {
    format!("ERR wrong number of arguments for '{name}' command").into()
}

/// Redis's words for a command that it does not know: the name and the first arguments, 128 bytes of each.
fn unknown(words: &[Bytes]) -> String {
    const QUOTED_BYTES_MAX: usize = 128;
    let quote = |word: &[u8], room: usize| String::from_utf8_lossy(&word[..word.len().min(room)]).into_owned();
    let mut args = String::new();
    for word in words.iter().skip(1) {
        if args.len() >= QUOTED_BYTES_MAX {
            break;
        }
        args.push_str(&format!("'{}' ", quote(word, QUOTED_BYTES_MAX - args.len())));
    }
    let name = words.first().map(|name| quote(name, QUOTED_BYTES_MAX)).unwrap_or_default();
    format!("ERR unknown command '{name}', with args beginning with: {args}")
}

/// The bytes for keeping.
fn owned(word: &[u8]) -> Bytes {
    Bytes::copy_from_slice(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<Bytes> {
        line.split(' ').map(|word| Bytes::copy_from_slice(word.as_bytes())).collect()
    }

    fn say_at(database: &mut Database, line: &str, now: UnixMs) -> Reply {
        let unit = Unit { requests: vec![words(line)], ..Unit::default() };
        database.run(&unit, now).unwrap().remove(0)
    }

    fn say(database: &mut Database, line: &str) -> Reply {
        say_at(database, line, 1_000)
    }

    fn durable() -> Database {
        Loading::new().finish()
    }

    #[test]
    fn a_push_on_a_long_list_writes_one_row() {
        let mut database = durable();
        for number in 0..1_000 {
            say(&mut database, &format!("RPUSH list {number}"));
        }
        database.take_rows();
        say(&mut database, "LPUSH list x");
        assert_eq!(database.take_rows().len(), 1);
        say(&mut database, "LREM list 1 500");
        assert_eq!(database.take_rows().len(), 1);
        say(&mut database, "RENAME list other");
        assert_eq!(database.take_rows().len(), 2);
    }

    #[test]
    fn the_rows_of_a_removed_collection_leave_bit_by_bit() {
        let mut database = durable();
        let members: Vec<String> = (0..2_500).map(|number| number.to_string()).collect();
        say(&mut database, &format!("SADD set {}", members.join(" ")));
        database.take_rows();
        say(&mut database, "DEL set");
        let mut removed = database.take_rows().len();
        assert_eq!(removed, BURIED_ROWS_MAX + 1);
        while database.has_more_to_sweep() {
            database.sweep(1_000);
            removed += database.take_rows().len();
        }
        assert_eq!(removed, 2_501);
    }

    #[test]
    fn rows_that_a_crash_left_without_a_key_are_removed_at_the_next_start() {
        let mut database = durable();
        say(&mut database, "HSET hash a 1 b 2");
        let mut loading = Loading::new();
        for row in database.take_rows().into_iter().filter(|row| row.key[0] == b'2') {
            loading.row(&row.key, &row.value.unwrap()).unwrap();
        }
        let mut database = loading.finish();
        let left = database.take_rows();
        assert_eq!((left.len(), left.iter().all(|row| row.value.is_none())), (2, true));
        assert_eq!(say(&mut database, "DBSIZE"), Reply::Integer(0));
    }

    #[test]
    fn a_key_ends_at_its_time_and_is_told_as_changed() {
        let mut database = durable();
        say_at(&mut database, "SET key value PX 500", 1_000);
        database.take_changed();
        assert_eq!(say_at(&mut database, "GET key", 1_499), Reply::text("value"));
        assert!(database.has_more_to_sweep());
        assert_eq!(say_at(&mut database, "GET key", 1_500), Reply::Null);
        assert_eq!(database.take_changed(), [Bytes::from("key")]);
    }

    #[test]
    fn a_bounded_number_of_keys_expires_at_once_and_none_is_seen_after_its_end() {
        let mut database = Database::volatile();
        for number in 0..EXPIRED_KEYS_MAX * 2 {
            say_at(&mut database, &format!("SET {number} value PX 1"), 1_000);
        }
        assert_eq!(say_at(&mut database, "KEYS *", 2_000), Reply::Array(Vec::new()));
        assert_eq!(say_at(&mut database, "DBSIZE", 0), Reply::count(EXPIRED_KEYS_MAX as u64));
        database.sweep(2_000);
        assert!(!database.has_more_to_sweep());
        assert_eq!(say_at(&mut database, "DBSIZE", 0), Reply::Integer(0));
    }

    #[test]
    fn a_unit_with_a_watched_key_that_changed_does_nothing() {
        let mut database = durable();
        let unit = |version| Unit {
            requests: vec![words("SET other value"), words("GET other")],
            watched: vec![(Bytes::from("key"), version)],
            ..Unit::default()
        };
        let absent = database.version(b"key");
        say(&mut database, "SET key 1");
        assert_eq!(database.run(&unit(absent), 1_000), None);
        let present = database.version(b"key");
        assert_eq!(database.run(&unit(present), 1_000), Some(vec![Reply::OK, Reply::text("value")]));
        say(&mut database, "DEL key");
        assert_eq!(database.run(&unit(present), 1_000), None);
        assert_eq!(database.run(&unit(absent), 1_000), None, "it came and went");
    }

    #[test]
    fn a_watched_key_that_expires_is_one_that_changed() {
        let mut database = durable();
        say_at(&mut database, "SET key 1 PX 10", 1_000);
        let watched = vec![(Bytes::from("key"), database.version(b"key"))];
        let unit = Unit { requests: vec![words("PING")], watched, ..Unit::default() };
        assert_eq!(database.run(&unit, 1_010), None);
    }

    #[test]
    fn every_element_that_is_there_throughout_a_scan_is_told() {
        let mut database = Database::volatile();
        for number in 0..500 {
            say(&mut database, &format!("SADD set {number}"));
        }
        let (mut cursor, mut told) = (String::from("0"), std::collections::HashSet::new());
        for round in 0.. {
            let Reply::Array(page) = say(&mut database, &format!("SSCAN set {cursor} COUNT 7")) else { panic!() };
            let [Reply::Bulk(next), Reply::Array(members)] = &page[..] else { panic!() };
            told.extend(members.iter().map(|member| format!("{member:?}")));
            cursor = String::from_utf8_lossy(next).into_owned();
            if cursor == "0" {
                break;
            }
            say(&mut database, &format!("SREM set {} {}", 400 + round, 499 - round));
            say(&mut database, &format!("SADD set new{round}"));
        }
        for number in 0..400 {
            assert!(told.contains(&format!("{:?}", Reply::text("x")).replace('x', &number.to_string())), "{number}");
        }
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        let mut database = Database::volatile();
        let Reply::RawError(text) = say(&mut database, "EVAL return 0") else { panic!() };
        assert_eq!(text, "ERR 'eval' is not served: this shard is embedded and has no scripts");
        let refused: Vec<&str> = REFUSED.iter().flat_map(|(_, names)| names.iter().copied()).collect();
        assert!(refused.iter().all(|name| !SERVED.contains_key(name)));
        assert_eq!(
            SERVED.len(),
            FAMILIES.iter().map(|(_, family)| family.len()).sum::<usize>(),
            "a command is named twice"
        );
    }
}
