//! Ordinary commands through GoFlow: the same bytes as from Redis itself, over one shard; their meaning, over several.
//!
//! `the_replies_are_those_of_redis_byte_for_byte` draws sequences of commands from every family, some of them broken on
//! purpose, sends each to GoFlow over one Redis shard and to another Redis beside it, and compares what comes back. It runs
//! `GOFLOW_FORWARD_SEQUENCES` sequences (500 by default); a failure names its seed, which `GOFLOW_FORWARD_SEED` repeats.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use goflow::resp::scan::{ScanState, reply_end};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::eventually;
use crate::support::fleet::Fleet;
use crate::support::goflow::Goflow;
use crate::support::patience;
use crate::support::servers::{Flavour, Server};
use crate::support::wire::{Value, Wire, encode};

/// Shards and a GoFlow over them.
struct Farm {
    shards: Vec<Server>,
    goflow: Goflow,
}

fn farm(shards: usize) -> Farm {
    let shards: Vec<Server> = (0..shards).map(|_| Server::start(Flavour::Redis7, &[])).collect();
    let urls: Vec<String> = shards.iter().enumerate().map(|(at, shard)| format!("s{at}={}", shard.url())).collect();
    let args: Vec<&str> = urls.iter().flat_map(|url| ["--shard", url]).collect();
    let mut goflow = Goflow::start(&args);
    // The test servers keep nothing, and it says so.
    goflow.expect_log("WARN");
    Farm { shards, goflow }
}

/// A connection whose replies are kept as bytes.
struct Plain {
    stream: TcpStream,
    unread: Vec<u8>,
}

impl Plain {
    fn connect(address: &str) -> Plain {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(patience())).unwrap();
        Plain { stream, unread: Vec::new() }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    fn reply(&mut self) -> Vec<u8> {
        self.try_reply().expect("a reply comes in time")
    }

    /// `None` when none comes in time.
    fn try_reply(&mut self) -> Option<Vec<u8>> {
        let mut scan = ScanState::default();
        loop {
            if let Some(end) = reply_end(&self.unread, &mut scan).unwrap() {
                return Some(self.unread.drain(..end).collect());
            }
            let mut chunk = [0; 16 << 10];
            let count = self.stream.read(&mut chunk).ok()?;
            assert!(count > 0, "closed; unread: {:?}", String::from_utf8_lossy(&self.unread));
            self.unread.extend_from_slice(&chunk[..count]);
        }
    }
}

/// One line for each command with its arguments: `$k` a key, `$v` a value, `$i` a small integer, `$f` a field, `$s` a
/// score, `$n` a count of 1 or 2, `$x` a stream's entry.
const TEMPLATES: &str = "
LPUSH $k $v|RPUSH $k $v $v $v|LPUSHX $k $v|RPUSHX $k $v|LPOP $k|RPOP $k $n|LLEN $k|LRANGE $k $i $i|LINDEX $k $i|LSET $k $i $v
LINSERT $k BEFORE $v $v|LREM $k $i $v|LTRIM $k $i $i|LPOS $k $v RANK 1|LMOVE $k $k LEFT RIGHT|RPOPLPUSH $k $k|LMPOP 2 $k $k LEFT COUNT $n
BLPOP $k $k 0.01|BRPOP $k 0.01|BLMOVE $k $k RIGHT LEFT 0.01|BRPOPLPUSH $k $k 0.01|BLMPOP 0.01 2 $k $k RIGHT COUNT 2
BLPOP $k -1|BLPOP $k abc|BLMPOP 0.01 0 $k LEFT|BZPOPMIN $k 0.01|BZPOPMAX $k $k 0.01|BZMPOP 0.01 1 $k MIN COUNT $n
DEL $k|DEL $k $k $k|UNLINK $k $k|EXISTS $k $k|TOUCH $k $k|TYPE $k|EXPIRE $k 1000|EXPIREAT $k 4000000000|EXPIRETIME $k|PEXPIREAT $k 4000000000000 NX
PERSIST $k|DUMP $k|RENAME $k $k|RENAMENX $k $k|COPY $k $k REPLACE|SORT $k ALPHA|SORT $k LIMIT 0 2 STORE $k|OBJECT ENCODING $k|OBJECT HELP
GET $k|SET $k $v|SET $k $v XX GET|SET $k $v EX 1000|SETNX $k $v|SETEX $k 1000 $v|SETEX $k 0 $v|PSETEX $k 100000 $v|GETSET $k $v|GETDEL $k|GETEX $k PERSIST
GETRANGE $k $i $i|SETRANGE $k 2 $v|STRLEN $k|APPEND $k $v|INCR $k|DECR $k|INCRBY $k $i|DECRBY $k $i|INCRBYFLOAT $k 1.5|MGET $k $k $k|MSET $k $v $k $v
MSETNX $k $v $k $v|LCS $k $k|GETBIT $k $i|SETBIT $k 3 1|BITCOUNT $k|BITPOS $k 1|BITFIELD $k GET u8 0|BITOP AND $k $k $k|PFADD $k $v|PFCOUNT $k $k|PFMERGE $k $k
HSET $k $f $v $f $v|HSETNX $k $f $v|HMSET $k $f $v|HGET $k $f|HMGET $k $f $f|HGETALL $k|HDEL $k $f|HEXISTS $k $f|HLEN $k|HKEYS $k|HVALS $k|HSTRLEN $k $f
HINCRBY $k $f $i|HINCRBYFLOAT $k $f 0.5|HSCAN $k 0|SADD $k $i $i|SREM $k $i|SCARD $k|SMEMBERS $k|SISMEMBER $k $i|SMISMEMBER $k $i $i|SMOVE $k $k $i
SDIFF $k $k|SINTER $k $k|SUNION $k $k|SDIFFSTORE $k $k $k|SINTERSTORE $k $k $k|SUNIONSTORE $k $k $k|SINTERCARD 2 $k $k|SSCAN $k 0
ZADD $k $s $v $s $v|ZADD $k NX CH $s $v|ZREM $k $v|ZCARD $k|ZCOUNT $k -inf +inf|ZSCORE $k $v|ZMSCORE $k $v $v|ZRANK $k $v|ZREVRANK $k $v|ZINCRBY $k $s $v
ZRANGE $k 0 -1 WITHSCORES|ZRANGE $k $i $i REV|ZREVRANGE $k 0 -1|ZRANGEBYSCORE $k -inf $s|ZRANGEBYLEX $k - +|ZREMRANGEBYRANK $k 0 0|ZPOPMIN $k|ZPOPMAX $k $n
ZRANGESTORE $k $k 0 -1|ZMPOP 1 $k MIN|ZDIFF 2 $k $k|ZINTER 2 $k $k WITHSCORES|ZUNION 1 $k|ZUNIONSTORE $k 2 $k $k WEIGHTS 1 2|ZINTERSTORE $k 1 $k|ZSCAN $k 0
GEOADD $k 13.361389 38.115556 $v|GEOPOS $k $v|GEODIST $k $v $v km|GEOSEARCH $k FROMLONLAT 15 37 BYRADIUS 200 km ASC
XADD $k $x $f $v|XADD $k NOMKSTREAM $x $f $v|XLEN $k|XRANGE $k - +|XREVRANGE $k + - COUNT 1|XDEL $k $x|XTRIM $k MAXLEN 2|XREAD COUNT 2 STREAMS $k $k 0 0
XREAD BLOCK 10 STREAMS $k $|XREAD BLOCK 10 STREAMS $k 0|XGROUP CREATE $k g 0 MKSTREAM|XGROUP DESTROY $k g|XREADGROUP GROUP g c STREAMS $k >
XREADGROUP GROUP g c BLOCK 10 STREAMS $k >|XREADGROUP GROUP g c STREAMS $k 0|XACK $k g $x|XPENDING $k g|XINFO GROUPS $k|XINFO STREAM $k|XSETID $k $x
EVAL return_redis.call('get',KEYS[1]) 1 $k|EVAL return_{1,2,{3,'a'}} 0|EVAL return_redis.error_reply('MY_error') 0|EVAL nonsense( 0|EVALSHA 0123456789012345678901234567890123456789 1 $k
SCRIPT EXISTS 0123456789012345678901234567890123456789|SCRIPT LOAD return_1|FCALL nosuch 1 $k|FUNCTION LIST|EVAL return_1 -1|EVAL return_1 9 $k|KEYS $k*|KEYS nosuch
NOSUCH a b|GET|HSET $k $f|ECHO $v|PING|PING $v|PUBSUB NUMPAT|PUBLISH nobody $v|MULTI|MULTI|EXEC|EXEC|DISCARD|WATCH $k|UNWATCH|SETBIT $k -1 1|LPOP $k -1";

/// Replies whose elements come in no certain order.
const UNORDERED: [&str; 5] = ["SMEMBERS", "SDIFF", "SINTER", "SUNION", "KEYS"];

fn fill(template: &str, sequence: u64, random: &mut SmallRng) -> Vec<Vec<u8>> {
    let mut word = |word: &str| -> String {
        match word {
            "$k" => format!("s{sequence}:k{}", random.random_range(0..6)),
            "$v" => ["1", "two", "3.5", "", "a b", "\r\n", "é\u{0}x"][random.random_range(0..7)].into(),
            "$i" => random.random_range(-3..6).to_string(),
            "$f" => format!("f{}", random.random_range(0..3)),
            "$s" => ["1", "-2.5", "inf", "1e3", "nan"][random.random_range(0..5)].into(),
            "$n" => random.random_range(1..3).to_string(),
            "$x" => format!("{}-{}", random.random_range(1..9), random.random_range(0..3)),
            other => other.replace('_', " "),
        }
    };
    template.split(' ').map(|part| word(part).into_bytes()).collect()
}

/// Now and then an argument too few, too many, or of another kind.
fn damage(words: &mut Vec<Vec<u8>>, random: &mut SmallRng) {
    // An unknown subcommand in a transaction is refused by EXEC and not when it is queued: by design.
    let has_subcommands =
        ["OBJECT", "XGROUP", "XINFO", "SCRIPT", "FUNCTION", "PUBSUB"].iter().any(|name| words[0] == name.as_bytes());
    match random.random_range(0..if has_subcommands { 1_000_000 } else { 30 }) {
        4.. => {}
        0 if words.len() > 1 => drop(words.pop()),
        1 => words.push(b"more".to_vec()),
        2 if words.len() > 1 => {
            let at = random.random_range(1..words.len());
            words[at] = b"other".to_vec();
        }
        3 => words[0] = words[0].to_ascii_lowercase(),
        _ => {}
    }
}

fn sequence(number: u64, random: &mut SmallRng) -> Vec<Vec<Vec<u8>>> {
    let templates: Vec<&str> = TEMPLATES.trim().split(['|', '\n']).collect();
    let length = random.random_range(5..40);
    let pick = |random: &mut SmallRng| {
        let mut words = fill(templates[random.random_range(0..templates.len())], number, random);
        damage(&mut words, random);
        words
    };
    (0..length).map(|_| pick(random)).collect()
}

/// The reply with the elements of an unordered one sorted, and without a time that hangs on when the command came.
fn comparable(name: &[u8], reply: &[u8]) -> Vec<u8> {
    if name.to_ascii_uppercase().ends_with(b"EXPIRETIME") && reply.starts_with(b":1") {
        return b":a time".to_vec();
    }
    let is_unordered = UNORDERED.iter().any(|known| name.eq_ignore_ascii_case(known.as_bytes()));
    if name.to_ascii_uppercase().ends_with(b"SCAN") {
        // A cursor and an array: two servers keep the same set in another order, since each hashes with a seed of its own.
        let mut lines: Vec<&[u8]> = reply.split(|byte| *byte == b'\n').collect();
        lines.sort();
        return lines.join(&b'\n');
    }
    if !is_unordered || !matches!(reply.first(), Some(b'*' | b'~')) {
        return reply.to_vec();
    }
    let head = reply.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    let (mut rest, mut items) = (&reply[head..], Vec::new());
    while let Ok(Some(end)) = reply_end(rest, &mut ScanState::default()) {
        items.push(&rest[..end]);
        rest = &rest[end..];
    }
    items.sort();
    [&reply[..head], &items.concat()].concat()
}

#[test]
fn the_replies_are_those_of_redis_byte_for_byte() {
    let sequences: u64 = std::env::var("GOFLOW_FORWARD_SEQUENCES").map_or(500, |text| text.parse().unwrap());
    let seed: u64 = std::env::var("GOFLOW_FORWARD_SEED").map_or(1, |text| text.parse().unwrap());
    let beside = Server::start(Flavour::Redis7, &[]);
    let farm = farm(1);
    for number in 0..sequences {
        let mut random = SmallRng::seed_from_u64(seed.wrapping_add(number));
        let requests = sequence(number, &mut random);
        let (mut ours, mut theirs) = (Plain::connect(farm.goflow.address()), Plain::connect(&beside.address()));
        if random.random() {
            for plain in [&mut ours, &mut theirs] {
                plain.send(&encode(&["HELLO", "3"]));
                plain.reply();
            }
        }
        let at_once: bool = random.random();
        if at_once {
            let all: Vec<u8> = requests.iter().flat_map(|words| encode(words)).collect();
            ours.send(&all);
            theirs.send(&all);
        }
        let mut unordered_in_transaction = false;
        for words in &requests {
            if !at_once {
                ours.send(&encode(words));
                theirs.send(&encode(words));
            }
            let their = theirs.reply();
            let our = ours.try_reply().unwrap_or_default();
            unordered_in_transaction |= their == b"+QUEUED\r\n";
            if unordered_in_transaction && words[0].eq_ignore_ascii_case(b"EXEC") {
                // Sets in a transaction's reply have no certain order either.
                unordered_in_transaction = false;
                assert_eq!(our.len(), their.len(), "seed {}: EXEC", seed.wrapping_add(number));
                continue;
            }
            let show = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            assert_eq!(
                show(&comparable(&words[0], &our)),
                show(&comparable(&words[0], &their)),
                "seed {}: {:?}\nafter {:?}",
                seed.wrapping_add(number),
                words.iter().map(|word| show(word)).collect::<Vec<_>>(),
                requests
                    .iter()
                    .map(|words| words.iter().map(|word| show(word)).collect::<Vec<_>>().join(" "))
                    .collect::<Vec<_>>(),
            );
        }
    }
}

fn array(items: &[&str]) -> Value {
    Value::Array(items.iter().map(|item| Value::Bulk((*item).into())).collect())
}

/// A key of this prefix on another shard than `other`, over four shards.
fn elsewhere(wire: &mut Wire, other: &str) -> String {
    let key = (0..100)
        .map(|number| format!("key{number}"))
        .find(|key| wire.call(&["COPY", other, key]).is_error("CROSSSHARD"));
    key.expect("a hundred keys live on more than one shard")
}

#[test]
fn commands_on_several_shards_are_split_and_merged_or_refused() {
    let farm = farm(4);
    let mut wire = farm.goflow.wire();
    let keys: Vec<String> = (0..40).map(|number| format!("key{number}")).collect();
    let pairs: Vec<&str> = keys.iter().flat_map(|key| [key.as_str(), key.as_str()]).collect();
    assert_eq!(wire.call(&[&["MSET"], &pairs[..]].concat()).text(), "OK");
    for shard in &farm.shards {
        assert!(shard.wire().say("DBSIZE").integer() > 4, "each shard has its share");
    }
    let names: Vec<&str> = keys.iter().map(String::as_str).collect();
    let values = wire.call(&[&["MGET", "nosuch"], &names[..]].concat());
    assert_eq!(values.items()[0], Value::Null);
    assert_eq!(values.items()[1..], *array(&names).items());
    assert_eq!(wire.call(&[&["EXISTS", "nosuch"], &names[..]].concat()).integer(), 40);
    let mut all: Vec<String> = wire.say("KEYS key*").items().iter().map(Value::text).collect();
    let (mut scanned, mut cursor) = (Vec::new(), "0".to_owned());
    loop {
        let page = wire.call(&["SCAN", &cursor, "COUNT", "3", "MATCH", "key*"]);
        scanned.extend(page.items()[1].items().iter().map(Value::text));
        cursor = page.items()[0].text();
        if cursor == "0" {
            break;
        }
    }
    all.sort();
    scanned.sort();
    scanned.dedup();
    assert_eq!((all.len(), &all), (40, &scanned));
    assert!(wire.say("RANDOMKEY").text().starts_with("key"));
    let far = elsewhere(&mut wire, "key0");
    assert!(wire.call(&["RENAME", "key0", &far]).is_error("CROSSSHARD"));
    assert_eq!(wire.say("RENAME {tag}a {tag}b"), Value::Error("ERR no such key".into()));
    assert!(wire.call(&["EVAL", "return 1", "2", "key0", &far]).is_error("CROSSSHARD"));
    let digest = wire.call(&["SCRIPT", "LOAD", "return KEYS[1]"]).text();
    for key in &keys {
        assert_eq!(wire.call(&["EVALSHA", &digest, "1", key]).text(), *key);
    }
    assert_eq!(wire.call(&["SCRIPT", "EXISTS", &digest]), Value::Array(vec![Value::Integer(1)]));
    for refused in ["FLUSHALL", "SHUTDOWN", "DEBUG SLEEP 0", "REPLICAOF NO ONE", "MONITOR"] {
        assert!(wire.say(refused).is_error("NOPERM"), "{refused}");
    }
    assert!(wire.say("SET goflow:x 1").is_error("NOPERM"));
    assert_eq!(wire.call(&[&["DEL"], &names[..]].concat()).integer(), 40);
}

#[test]
fn over_several_shards_a_request_is_refused_for_what_is_wrong_with_it() {
    let shards = ["--shard", "a=memory:", "--shard", "b=memory:", "--shard", "c=memory:"];
    let goflow = Goflow::start(&shards);
    let mut wire = goflow.wire();
    let (far, off) = (elsewhere(&mut wire, "key0"), elsewhere(&mut wire, "MIN"));
    for (line, told) in [
        (format!("BLPOP key0 {far} x"), "ERR timeout is not a float or out of range"),
        (format!("BLMPOP -1 2 key0 {far} LEFT"), "ERR timeout is negative"),
        (format!("BLMOVE key0 {far} LEFT LEFT x"), "ERR timeout is not a float or out of range"),
        (format!("XREAD BLOCK x STREAMS key0 {far} 0 0"), "ERR timeout is not an integer or out of range"),
        (format!("ZMPOP 2 {off} MIN"), "ERR syntax error"),
        (format!("BZMPOP 0 2 {off} MIN"), "ERR syntax error"),
        (format!("LMOVE key0 {far} UP LEFT"), "ERR syntax error"),
        (format!("MSETNX key0 1 {far}"), "ERR wrong number of arguments for 'msetnx' command"),
    ] {
        assert_eq!(wire.say(&line), Value::Error(told.into()), "{line}");
        wire.say("MULTI");
        wire.say("GET key0");
        assert_eq!(wire.say(&line), Value::Error(told.into()), "{line} in a transaction");
        assert!(wire.say("EXEC").is_error("EXECABORT"));
    }
    assert!(wire.call(&["LMOVE", "key0", &far, "LEFT", "LEFT"]).is_error("CROSSSHARD"));
}

#[test]
fn a_command_that_only_the_servers_know_goes_where_its_keys_live() {
    let shards = (0..4).map(|_| Server::start(Flavour::Valkey9, Server::DURABLE)).collect();
    let fleet = Fleet::over(shards, 1, &[], &[]);
    let mut wire = fleet.proxies[0].wire();
    for number in 0..20 {
        let key = format!("hash{number}");
        // Valkey's own; what it stored is found by a command of the table.
        assert_eq!(wire.call(&["HSETEX", &key, "EX", "1000", "FIELDS", "1", "f", &key]), Value::Integer(1));
        assert_eq!(wire.call(&["HGET", &key, "f"]).text(), key);
        assert_eq!(wire.call(&["hgetex", &key, "PERSIST", "FIELDS", "1", "f"]), array(&[&key]));
    }
    assert!(
        fleet.shards.iter().filter(|shard| shard.wire().say("EXISTS hash0 hash1 hash2 hash3").integer() > 0).count()
            > 1
    );
    assert!(wire.say("HSETEX goflow:x FIELDS 1 f v").is_error("NOPERM"));
    assert_eq!(
        wire.say("NOSUCH a"),
        Value::Error("ERR unknown command 'NOSUCH', with args beginning with: 'a' ".into())
    );
}

#[test]
fn what_is_about_connections_or_the_server_does_not_reach_a_shard() {
    let farm = farm(1);
    let (mut wire, mut shard) = (farm.goflow.wire(), farm.shards[0].wire());
    for refused in [
        "CLIENT TRACKING ON",
        "client pause 60000",
        "CLIENT NOSUCH",
        "ACL SETUSER mallory on nopass ~* +@all",
        "ACL LIST",
        "MODULE LOAD /nosuch.so",
        "LASTSAVE",
    ] {
        let told = wire.say(refused);
        assert!(told.text().starts_with("ERR unknown "), "{refused}: {told:?}");
    }
    let long = "x".repeat(65);
    assert!(wire.call(&[&long]).text().starts_with("ERR unknown command"));
    assert_eq!(shard.say("ACL USERS"), array(&["default"]));
    assert_eq!(wire.say("SET key 1"), Value::Simple("OK".into()));
    // In a transaction it spoils it, as in Redis.
    wire.say("MULTI");
    assert!(wire.say("CLIENT TRACKING ON").text().starts_with("ERR unknown subcommand"));
    assert!(wire.say("EXEC").is_error("EXECABORT"));
}

#[test]
fn keys_of_a_group_live_together() {
    let together = [("GOFLOW_FORWARD_TOGETHER", "arq:*, stat:* processes")];
    let fleet = Fleet::start_with(4, 1, &[], &together);
    let mut wire = fleet.proxies[0].wire();
    let pairs =
        |prefix: &str| (0..20).flat_map(|number| [format!("{prefix}{number}"), "x".into()]).collect::<Vec<String>>();
    let set = |keys: Vec<String>| [vec!["MSETNX".to_owned()], keys].concat();
    assert_eq!(wire.call(&set(pairs("arq:"))), Value::Integer(1));
    assert_eq!(wire.call(&set([pairs("stat:"), vec!["processes".into(), "x".into()]].concat())), Value::Integer(1));
    assert!(wire.call(&set(pairs("other:"))).is_error("CROSSSHARD"));
    // One group is on one shard, and found by every way that leads to a key.
    assert_eq!(wire.call(&[vec!["MGET".to_owned(), "other".into()], pairs("arq:")].concat()).items().len(), 41);
    let holders = fleet.shards.iter().filter(|shard| shard.wire().say("EXISTS arq:0").integer() == 1).count();
    assert_eq!(holders, 1);
    wire.send(&["BRPOP", "arq:list", "arq:other", "0"]);
    fleet.proxies[0].wire().say("LPUSH arq:other y");
    assert_eq!(wire.read(), array(&["arq:other", "y"]));
}

#[test]
fn a_transaction_stays_on_one_shard_and_a_watched_key_ends_it() {
    let farm = farm(4);
    let (mut wire, mut other) = (farm.goflow.wire(), farm.goflow.wire());
    let far = elsewhere(&mut wire, "key0");
    assert_eq!(wire.say("MULTI").text(), "OK");
    assert_eq!(wire.say("SET key0 1").text(), "QUEUED");
    assert!(wire.call(&["GET", &far]).is_error("CROSSSHARD"));
    assert!(wire.say("EXEC").is_error("EXECABORT"));
    for changes in [false, true] {
        assert_eq!(wire.say("WATCH key0").text(), "OK");
        if changes {
            other.say("SET key0 2");
        }
        wire.say("MULTI");
        wire.say("INCR key0");
        let done = wire.say("EXEC");
        assert_eq!(done == Value::Null, changes, "{done:?}");
    }
    assert_eq!(wire.say("GET key0").text(), "2");
    // The connections of transactions are used again, and nothing of the last client is left on them.
    for _ in 0..20 {
        let mut gone = farm.goflow.wire();
        gone.say("WATCH key0");
    }
    other.say("SET key0 3");
    wire.say("WATCH key0");
    wire.say("MULTI");
    wire.say("GET key0");
    assert_eq!(wire.say("EXEC"), array(&["3"]));
}

#[test]
fn a_watch_whose_connection_was_lost_ends_the_transaction() {
    let farm = farm(1);
    let (mut wire, mut shard) = (farm.goflow.wire(), farm.shards[0].wire());
    let mut cut = || assert!(shard.say("CLIENT KILL TYPE normal SKIPME yes").integer() > 0);
    for again in [false, true] {
        assert_eq!(wire.say("WATCH key").text(), "OK");
        cut();
        // Watching more on a new connection does not bring the first watch back.
        if again {
            assert_eq!(wire.say("WATCH other").text(), "OK");
        }
        eventually!("the shared link is there again", (wire.say("SET key 1").text() == "OK").then_some(()));
        wire.say("MULTI");
        wire.say("SET key lost");
        assert_eq!(wire.say("EXEC"), Value::Null);
        assert_eq!(wire.say("GET key").text(), "1");
    }
    // A watch that was refused is none.
    let mut shard = farm.shards[0].wire();
    shard.say("CONFIG SET requirepass secret");
    shard.say("CLIENT KILL TYPE normal SKIPME yes");
    let refused = wire.say("WATCH key");
    assert!(matches!(refused, Value::Error(_)), "{refused:?}");
    shard.call(&["CONFIG", "SET", "requirepass", ""]);
    eventually!("the shared link is there again", (wire.say("SET key 1").text() == "OK").then_some(()));
    wire.say("MULTI");
    wire.say("INCR key");
    assert_eq!(wire.say("EXEC"), Value::Array(vec![Value::Integer(2)]));
}

#[test]
fn what_is_pipelined_around_a_watched_transaction_keeps_its_order() {
    let farm = farm(1);
    let mut wire = farm.goflow.wire();
    let lines = ["SET key 1", "WATCH key", "GET key", "MULTI", "INCR key", "EXEC", "GET key", "SET key 9"];
    let requests: Vec<u8> = lines.iter().flat_map(|line| encode(&line.split(' ').collect::<Vec<_>>())).collect();
    for _ in 0..200 {
        wire.send_raw(&requests);
        let replies: Vec<Value> = lines.iter().map(|_| wire.read()).collect();
        assert_eq!(replies[2].text(), "1");
        assert_eq!(replies[5], Value::Array(vec![Value::Integer(2)]));
        assert_eq!(replies[6].text(), "2");
    }
}

#[test]
fn connections_of_watching_clients_are_few_when_they_are_gone() {
    let farm = farm(1);
    let connections = || farm.shards[0].wire().say("CLIENT LIST").text().lines().count();
    let before = connections();
    let mut watching: Vec<Wire> = (0..60).map(|_| farm.goflow.wire()).collect();
    for wire in &mut watching {
        assert_eq!(wire.say("WATCH key").text(), "OK");
    }
    assert!(connections() >= before + 60);
    drop(watching);
    // Each thread keeps eight.
    let threads = std::thread::available_parallelism().unwrap().get();
    eventually!("the rest is closed", (connections() <= before + threads * (8 + 1)).then_some(()));
    // What broke is not kept.
    let mut wire = farm.goflow.wire();
    for _ in 0..30 {
        assert_eq!(wire.say("WATCH key").text(), "OK");
        farm.shards[0].wire().say("CLIENT KILL TYPE normal SKIPME yes");
        assert_eq!(wire.say("UNWATCH").text(), "OK");
    }
    eventually!("nothing is left of them", (connections() <= before + 4).then_some(()));
}

#[test]
fn a_blocked_client_is_served_from_any_shard_in_the_order_of_arrival() {
    let farm = farm(4);
    let mut wire = farm.goflow.wire();
    let far = elsewhere(&mut wire, "key0");
    let mut waiting: Vec<Wire> = (0..5).map(|_| farm.goflow.wire()).collect();
    for (place, waiter) in waiting.iter_mut().enumerate() {
        waiter.call(&["CLIENT", "SETNAME", &format!("waiter{place}")]);
        waiter.send(&["BRPOP", "key0", &far, "0"]);
        let name = format!("name=waiter{place} ");
        let is_blocked = |list: String| list.lines().any(|line| line.contains(&name) && line.contains("flags=b"));
        eventually!("the client is blocked", is_blocked(wire.say("CLIENT LIST").text()).then_some(()));
    }
    for (place, waiter) in waiting.iter_mut().enumerate() {
        let key = if place % 2 == 0 { "key0" } else { &far };
        // Pushed past GoFlow: the shard says so.
        let value = format!("value{place}");
        wire.call(&["LPUSH", key, &value]);
        assert_eq!(waiter.read(), array(&[key, &value]));
    }
    assert_eq!(wire.call(&["EXISTS", "key0", &far]).integer(), 0);
    assert_eq!(wire.say("BRPOP key0 0.05"), Value::Null);
}

#[test]
fn a_blocking_command_names_so_many_keys_and_no_more() {
    let goflow = Goflow::start(&["--shard", "a=memory:", "--shard", "b=memory:"]);
    let (mut wire, mut waiting) = (goflow.wire(), goflow.wire());
    let keys: Vec<String> = (0..512).map(|number| format!("key{number}")).collect();
    let twice: Vec<&str> = keys.iter().chain(&keys).map(String::as_str).collect();
    let refused = wire.call(&[&["BLPOP", "one more"], &twice[..], &["0"]].concat());
    assert_eq!(refused.text(), "TOOBIG BLPOP waits for at most 1024 keys, and this names 1025");
    waiting.send(&[&["BLPOP"], &twice[..], &["0"]].concat());
    wait_until_blocked(&mut wire, 1);
    wire.say("LPUSH key511 x");
    assert_eq!(waiting.read(), array(&["key511", "x"]));
    // It has left every line, also where it would have stood twice.
    wire.say("LPUSH key511 y");
    assert_eq!(wire.say("LPOP key511").text(), "y");
}

#[test]
fn a_client_that_goes_away_while_blocked_takes_nothing_with_it() {
    let farm = farm(1);
    let mut wire = farm.goflow.wire();
    let is_alone = |wire: &mut Wire| wire.say("INFO clients").text().contains("connected_clients:1\r\n").then_some(());
    for round in 0..50 {
        let mut gone = farm.goflow.wire();
        gone.send(&["BLPOP", "list", "0"]);
        eventually!("it is blocked", (wire.say("INFO clients").text().contains("blocked_clients:1")).then_some(()));
        drop(gone);
        eventually!("its end is noticed", is_alone(&mut wire));
        wire.call(&["RPUSH", "list", &round.to_string()]);
        // A pop that was still on its way may have taken it: then it comes back.
        let element = Value::Bulk(round.to_string().into());
        eventually!("the element is there", (wire.say("LPOP list") == element).then_some(()));
        // Here the pop itself is on its way when the client goes, because the shard stands still.
        wire.call(&["RPUSH", "list", "first", "second"]);
        farm.shards[0].stop();
        let mut gone = farm.goflow.wire();
        gone.send(&["BLPOP", "list", "0"]);
        eventually!("it is blocked", (wire.say("INFO clients").text().contains("blocked_clients:1")).then_some(()));
        drop(gone);
        eventually!("its end is noticed", is_alone(&mut wire));
        farm.shards[0].cont();
        eventually!("it is back", (wire.say("LLEN list") == Value::Integer(2)).then_some(()));
        assert_eq!(wire.say("LPOP list 2"), array(&["first", "second"]));
    }
}

fn wait_until_blocked(wire: &mut Wire, count: usize) {
    let mark = format!("blocked_clients:{count}\r\n");
    eventually!(format!("{count} clients are blocked"), wire.say("INFO clients").text().contains(&mark).then_some(()));
}

#[test]
fn a_pop_that_is_on_its_way_when_the_process_ends_takes_nothing() {
    let mut farm = farm(1);
    let mut direct = farm.shards[0].wire();
    direct.say("RPUSH list first second");
    let (mut wire, mut gone) = (farm.goflow.wire(), farm.goflow.wire());
    // The link is open, so that the pop waits in the shard's own socket.
    wire.say("LLEN list");
    farm.shards[0].stop();
    gone.send(&["BLPOP", "list", "0"]);
    wait_until_blocked(&mut wire, 1);
    farm.goflow.signal("TERM");
    assert_eq!(gone.read(), Value::Null);
    assert!(gone.read_to_close().is_empty() && wire.read_to_close().is_empty());
    farm.shards[0].cont();
    assert!(farm.goflow.wait().success());
    assert_eq!(direct.say("LRANGE list 0 -1"), array(&["first", "second"]));
}

#[test]
fn what_did_not_reach_its_client_goes_back_to_a_shard_that_was_down_meanwhile() {
    // More than the sockets hold between the two.
    let element = "x".repeat(40 << 20);
    let shard = Server::start(Flavour::Redis7, &[]);
    shard.wire().call(&["RPUSH", "list", &element]);
    let mut fleet = Fleet::over(vec![shard], 1, &[], &[]);
    fleet.expect_failures();
    let mut gone = fleet.proxies[0].wire();
    gone.send(&["BLPOP", "list", "0"]);
    let mut direct = fleet.shards[0].wire();
    eventually!("it is taken", (direct.say("LLEN list") == Value::Integer(0)).then_some(()));
    eventually!("some of it is sent", gone.begins(b"*2").then_some(()));
    fleet.shards[0].kill();
    drop(gone);
    let mut wire = fleet.proxies[0].wire();
    let is_alone = |wire: &mut Wire| wire.say("INFO clients").text().contains("connected_clients:1\r\n").then_some(());
    eventually!("its end is noticed", is_alone(&mut wire));
    assert!(wire.say("LLEN list").is_error("SHARDDOWN"));
    fleet.shards[0].restart();
    eventually!("it is back", (fleet.shards[0].wire().say("LLEN list") == Value::Integer(1)).then_some(()));
}

#[test]
fn a_client_that_does_not_read_keeps_nobody_waiting() {
    let farm = farm(1);
    let mut wire = farm.goflow.wire();
    // More than the sockets hold between the two.
    farm.shards[0].wire().call(&["SET", "big", &"x".repeat(40 << 20)]);
    let mut silent = farm.goflow.wire();
    silent.send_raw([encode(&["GET", "big"]), encode(&["BRPOP", "list", "0"])].concat());
    eventually!("some of it is sent", silent.begins(b"$").then_some(()));
    let mut reading = farm.goflow.wire();
    reading.send(&["BRPOP", "list", "0"]);
    wait_until_blocked(&mut wire, 1);
    wire.say("LPUSH list one");
    assert_eq!(reading.read(), array(&["list", "one"]));
    // It is served once it reads.
    assert_eq!(silent.read().text().len(), 40 << 20);
    wire.say("LPUSH list two");
    assert_eq!(silent.read(), array(&["list", "two"]));
    // Nor does one that waited before it stopped to read: it is served in its turn.
    silent.say("HELLO 3");
    silent.say("SUBSCRIBE channel");
    silent.send(&["BRPOP", "list", "0"]);
    wait_until_blocked(&mut wire, 1);
    reading.send(&["BRPOP", "list", "0"]);
    wait_until_blocked(&mut wire, 2);
    let message = "x".repeat(64 << 10);
    (0..96).for_each(|_| assert_eq!(wire.call(&["PUBLISH", "channel", &message]), Value::Integer(1)));
    wire.say("LPUSH list three");
    wire.say("LPUSH list four");
    assert_eq!(reading.read(), array(&["list", "four"]));
    eventually!("it reads its own", (silent.read() == array(&["list", "three"])).then_some(()));
}

#[test]
fn a_group_that_is_named_as_an_option_is_blocks_nobody_else() {
    let shard = Server::start(Flavour::Redis7, &[]);
    let mut fleet = Fleet::over(vec![shard], 1, &["--threads", "1"], &[]);
    fleet.proxies[0].expect_log("WARN");
    let (mut waiting, mut wire) = (fleet.proxies[0].wire(), fleet.proxies[0].wire());
    wire.say("XGROUP CREATE s streams $ MKSTREAM");
    waiting.send(&["XREADGROUP", "GROUP", "streams", "block", "BLOCK", "0", "STREAMS", "s", ">"]);
    wait_until_blocked(&mut wire, 1);
    assert_eq!(wire.try_call(&["EXISTS", "s"], patience()), Ok(Value::Integer(1)));
    wire.say("XADD s 1-1 a b");
    assert_eq!(waiting.read().items()[0].items()[0].text(), "s");
    // What the server judges wrong it says so of.
    assert!(wire.say("XREADGROUP GROUP g c BLOCK x STREAMS s >").is_error("ERR"));
    assert!(wire.say("XREAD BLOCK 0 NOSUCH STREAMS s 0").is_error("ERR"));
}

#[test]
fn a_client_that_waits_follows_its_key_to_a_shard_that_is_added() {
    let mut fleet = Fleet::start_plain(1, 1, &[]);
    fleet.proxies[0].expect_log("WARN");
    let mut wire = fleet.proxies[0].wire();
    let keys: Vec<String> = (0..20).map(|number| format!("key{number}")).collect();
    let mut waiting: Vec<Wire> = keys.iter().map(|_| fleet.proxies[0].wire()).collect();
    for (waiter, key) in waiting.iter_mut().zip(&keys) {
        waiter.send(&["BRPOP", key, "0"]);
    }
    wait_until_blocked(&mut wire, 20);
    let fresh = Server::start(Flavour::Redis7, &[]);
    assert_eq!(wire.say(&format!("GOFLOW.SHARD ADD s1 {}", fresh.url())), Value::Simple("OK".into()));
    for (waiter, key) in waiting.iter_mut().zip(&keys) {
        wire.call(&["LPUSH", key, "x"]);
        assert_eq!(waiter.read(), array(&[key, "x"]));
    }
    let moved = fresh.wire().say("INFO commandstats").text().contains("cmdstat_lpush");
    assert!(moved, "a part of the keys has its home on the new shard");
}

#[test]
fn client_unblock_ends_a_wait_in_either_way() {
    let farm = farm(1);
    let mut wire = farm.goflow.wire();
    for (how, expected) in
        [("TIMEOUT", Value::Null), ("ERROR", Value::Error("UNBLOCKED client unblocked via CLIENT UNBLOCK".into()))]
    {
        let mut blocked = farm.goflow.wire();
        let id = blocked.say("CLIENT ID").integer().to_string();
        blocked.say("CLIENT SETNAME b");
        blocked.send(&["BLPOP", "nothing", "0"]);
        eventually!(
            "it is unblocked",
            (wire.call(&["CLIENT", "UNBLOCK", &id, how]) == Value::Integer(1)).then_some(())
        );
        assert_eq!(blocked.read(), expected);
    }
}

#[test]
fn messages_reach_subscribers_on_every_proxy_once() {
    let farm = farm(4);
    let urls: Vec<String> =
        farm.shards.iter().enumerate().map(|(at, shard)| format!("s{at}={}", shard.url())).collect();
    let args: Vec<&str> = urls.iter().flat_map(|url| ["--shard", url]).collect();
    let mut second = Goflow::start(&args);
    second.expect_log("WARN");
    let (mut here, mut there) = (farm.goflow.wire(), second.wire());
    let mut pattern = second.wire();
    for channel in ["a", "b", "c", "d", "e"] {
        let confirmed = |count| {
            Value::Array(vec![Value::Bulk("subscribe".into()), Value::Bulk(channel.into()), Value::Integer(count)])
        };
        let count = i64::from(channel.as_bytes()[0] - b'a') + 1;
        assert_eq!(here.call(&["SUBSCRIBE", channel]), confirmed(count));
        assert_eq!(there.call(&["SUBSCRIBE", channel]), confirmed(count));
    }
    pattern.say("HELLO 3");
    assert_eq!(pattern.say("PSUBSCRIBE [abc]*").items()[0].text(), "psubscribe");
    let mut wire = farm.goflow.wire();
    for channel in ["a", "b", "c", "d", "e"] {
        wire.call(&["PUBLISH", channel, "hello"]);
        assert_eq!(here.read(), array(&["message", channel, "hello"]));
        assert_eq!(there.read(), array(&["message", channel, "hello"]));
        if channel < "d" {
            let message = array(&["pmessage", "[abc]*", channel, "hello"]).items().to_vec();
            assert_eq!(pattern.read(), Value::Push(message));
        }
    }
    assert!(here.say("GET key").is_error("ERR"), "RESP2 subscribers say nothing else");
    assert_eq!(here.say("PING"), array(&["pong", ""]));
    assert_eq!(wire.say("PUBSUB NUMSUB a").items()[1], Value::Integer(2));
    here.say("UNSUBSCRIBE a b c d");
    for _ in 0..3 {
        here.read();
    }
    assert_eq!(here.say("UNSUBSCRIBE").items()[2], Value::Integer(0));
    assert_eq!(here.say("GET key"), Value::Null);
}

#[test]
fn what_shards_and_proxies_tell_each_other_is_not_for_clients() {
    let farm = farm(1);
    let (mut wire, mut shard) = (farm.goflow.wire(), farm.shards[0].wire());
    let wake = Value::Bulk("goflow:wake".into());
    eventually!("the proxy listens", shard.say("PUBSUB CHANNELS").items().contains(&wake).then_some(()));
    assert_eq!(wire.say("PUBSUB CHANNELS"), array(&[]));
    assert_eq!(wire.say("PUBSUB CHANNELS goflow:*"), array(&[]));
    assert_eq!(wire.say("PUBSUB NUMSUB goflow:wake"), Value::Array(vec![wake, Value::Integer(0)]));
    // Who subscribes to it hears nothing of it, by its name or by a pattern.
    let mut listener = farm.goflow.wire();
    for (place, line) in
        ["SUBSCRIBE goflow:wake", "PSUBSCRIBE goflow:*", "PSUBSCRIBE *", "SUBSCRIBE news"].iter().enumerate()
    {
        assert_eq!(listener.say(line).items()[2], Value::Integer(place as i64 + 1));
    }
    assert!(shard.say("PUBLISH goflow:wake queue").integer() > 0);
    wire.say("PUBLISH news hello");
    assert_eq!([listener.read(), listener.read()].map(|told| told.items()[0].text()), ["message", "pmessage"]);
}

fn pushed(words: &[&str], count: i64) -> Vec<Value> {
    words.iter().map(|word| Value::Bulk((*word).into())).chain([Value::Integer(count)]).collect()
}

#[test]
fn no_message_comes_before_the_subscription_is_confirmed_on_every_shard() {
    let farm = farm(2);
    let (mut wire, mut other) = (farm.goflow.wire(), farm.goflow.wire());
    // One channel on each shard.
    let of_shard = [0, 1].map(|at| {
        let is_there = |key: &String| {
            other.call(&["SET", key, "x"]);
            farm.shards[at].wire().call(&["EXISTS", key]) == Value::Integer(1)
        };
        (0..100).map(|number| format!("key{number}")).find(is_there).unwrap()
    });
    let [quick, slow] = of_shard.each_ref().map(String::as_str);
    // The links that listen are opened.
    for word in ["SUBSCRIBE", "UNSUBSCRIBE"] {
        wire.call(&[word, quick, slow]);
        wire.read();
    }
    farm.shards[1].stop();
    wire.send(&["SUBSCRIBE", quick, slow]);
    let began = std::time::Instant::now();
    while began.elapsed() < Duration::from_millis(200) {
        other.call(&["PUBLISH", quick, "early"]);
    }
    assert!(wire.try_read(Duration::from_millis(50)).is_err());
    farm.shards[1].cont();
    assert_eq!(wire.read(), Value::Array(pushed(&["subscribe", quick], 1)));
    assert_eq!(wire.read(), Value::Array(pushed(&["subscribe", slow], 2)));
    other.call(&["PUBLISH", slow, "late"]);
    assert_eq!(wire.read(), array(&["message", slow, "late"]));
}

#[test]
fn what_a_slow_subscriber_has_not_read_comes_before_its_subscription_ends() {
    const MESSAGES: usize = 112;
    let farm = farm(1);
    let (mut wire, mut other) = (farm.goflow.wire(), farm.goflow.wire());
    wire.say("SUBSCRIBE news");
    // More than the sockets hold, so that some wait in the proxy.
    let text = "x".repeat(64 << 10);
    (0..MESSAGES).for_each(|_| assert_eq!(other.call(&["PUBLISH", "news", &text]), Value::Integer(1)));
    wire.send(&["UNSUBSCRIBE"]);
    wire.send(&["GET", "nothing"]);
    for _ in 0..MESSAGES {
        assert_eq!(wire.read().items()[0].text(), "message");
    }
    assert_eq!(wire.read(), Value::Array(pushed(&["unsubscribe", "news"], 0)));
    assert_eq!(wire.read(), Value::Null);
}

#[test]
fn a_connection_subscribes_to_so_much_and_no_more() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let mut wire = goflow.wire();
    let many: Vec<String> = (0..65_537).map(|number| number.to_string()).collect();
    let request: Vec<&str> = ["PSUBSCRIBE"].into_iter().chain(many.iter().map(String::as_str)).collect();
    assert!(wire.call(&request).text().starts_with("OVERLOADED a connection subscribes to at most 65536 "));
    let long = |number: u8| vec![number; 1 << 20];
    for number in 0..16 {
        assert_eq!(wire.call(&[b"SUBSCRIBE".to_vec(), long(number)]).items()[2], Value::Integer(i64::from(number) + 1));
    }
    let one_more = [b"SUBSCRIBE".to_vec(), long(16)];
    assert!(wire.call(&one_more).text().ends_with("nothing of this was subscribed to"));
    assert_eq!(wire.call(&[b"UNSUBSCRIBE".to_vec(), long(3)]).items()[2], Value::Integer(15));
    assert_eq!(wire.call(&one_more).items()[2], Value::Integer(16));
    wire.say("RESET");
    assert_eq!(wire.call(&one_more).items()[2], Value::Integer(1));
}

#[test]
fn reset_brings_the_last_messages_and_the_next_subscription_speaks_the_new_protocol() {
    let farm = farm(1);
    let (mut wire, mut other) = (farm.goflow.wire(), farm.goflow.wire());
    assert_eq!(wire.say("SUBSCRIBE news"), Value::Array(pushed(&["subscribe", "news"], 1)));
    // In RESP2 a subscriber says nothing else, be it unknown here.
    for refused in ["GET key", "HGETEX key FIELDS 1 f", "GOFLOW.LEN queue"] {
        assert!(wire.say(refused).text().starts_with("ERR Can't execute '"), "{refused}");
    }
    assert_eq!(other.say("PUBLISH news last"), Value::Integer(1));
    // The message may be lost by the one that leaves, but does not come after.
    wire.say("RESET");
    if let Ok(second) = wire.try_read(Duration::from_millis(50)) {
        assert_eq!(second, Value::Simple("RESET".into()));
    }
    wire.say("HELLO 3");
    assert_eq!(wire.say("SUBSCRIBE news"), Value::Push(pushed(&["subscribe", "news"], 1)));
    other.say("PUBLISH news again");
    assert_eq!(wire.read(), Value::Push(array(&["message", "news", "again"]).items().to_vec()));
    assert_eq!(wire.say("GET key"), Value::Null);
}

#[test]
fn what_is_in_flight_when_a_shard_dies_is_answered_and_the_next_goes_through() {
    let mut farm = farm(1);
    let mut wire = farm.goflow.wire();
    wire.say("SET a 1");
    farm.shards[0].stop();
    let mut blocked = farm.goflow.wire();
    blocked.send(&["GET", "a"]);
    assert!(blocked.try_read(Duration::from_millis(50)).is_err());
    farm.shards[0].kill();
    let answer = blocked.read();
    assert!(answer.is_error("SHARDDOWN"), "{answer:?}");
    farm.shards[0].restart();
    eventually!("it goes on", (wire.say("SET a 2") == Value::Simple("OK".into())).then_some(()));
    assert_eq!(wire.say("GET a").text(), "2");
}

/// Many clients block on many lists over four shards: each shard sees few connections, the proxy idles, and every element
/// that is pushed arrives once. `GOFLOW_FORWARD_CLIENTS` says how many clients (300 by default; the soak takes 5,000). The
/// proxy's CPU while nothing happens is held against its bound where `GOFLOW_FORWARD_BOUNDS` asks for it.
#[test]
fn many_blocked_clients_cost_few_connections_and_no_element_is_lost_or_doubled() {
    let clients: usize = std::env::var("GOFLOW_FORWARD_CLIENTS").map_or(300, |text| text.parse().unwrap());
    let (lists, each) = (clients / 10, 10);
    let farm = farm(4);
    let mut wire = farm.goflow.wire();
    let address = farm.goflow.address().to_owned();
    let taken = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let takers = taken.clone();
    let work = std::thread::spawn(move || {
        runtime.block_on(async move {
            for client in 0..clients {
                let mut socket = tokio::net::TcpStream::connect(&address).await.unwrap();
                let (takers, list) = (takers.clone(), format!("list{}", client % lists));
                tokio::spawn(async move {
                    use tokio::io::{AsyncReadExt, AsyncWriteExt};
                    let request = encode(&["BRPOP", &list, "0"]);
                    let mut buffer = Vec::new();
                    loop {
                        socket.write_all(&request).await.unwrap();
                        let end = loop {
                            if let Some(end) = reply_end(&buffer, &mut ScanState::default()).unwrap() {
                                break end;
                            }
                            if !matches!(socket.read_buf(&mut buffer).await, Ok(1..)) {
                                return;
                            }
                        };
                        let reply: Vec<u8> = buffer.drain(..end).collect();
                        let value = String::from_utf8_lossy(&reply).split("\r\n").nth(4).unwrap_or_default().to_owned();
                        takers.lock().unwrap().push(value);
                    }
                });
            }
            tokio::task::spawn_blocking(move || gone.recv()).await.unwrap().unwrap_err();
        });
    });
    let blocked = format!("blocked_clients:{clients}\r\n");
    eventually!("all are blocked", wire.say("INFO clients").text().contains(&blocked).then_some(()));
    for shard in &farm.shards {
        let connections = shard.wire().say("CLIENT LIST").text().lines().count();
        assert!(connections <= 17, "{connections} connections, this one included");
    }
    let spent = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", farm.goflow.id())).unwrap();
        let fields: Vec<u64> = stat.split(' ').skip(13).take(2).map(|field| field.parse().unwrap()).collect();
        fields[0] + fields[1]
    };
    let (before, began) = (spent(), std::time::Instant::now());
    if clients >= 5_000 {
        std::thread::sleep(Duration::from_secs(10));
        let share = (spent() - before) as f64 / began.elapsed().as_secs_f64();
        println!("idle CPU {share:.2} % with {clients} blocked clients");
        let bounds = std::env::var_os("GOFLOW_FORWARD_BOUNDS").is_some();
        assert!(!bounds || share < 1.0, "{clients} blocked clients cost {share:.2} % of a core");
    }
    for round in 0..each {
        for client in 0..clients {
            wire.send(&["LPUSH", &format!("list{}", client % lists), &format!("{round}:{client}")]);
        }
        for _ in 0..clients {
            assert!(wire.read().integer() > 0);
        }
    }
    let all = clients * each;
    eventually!("every element has arrived", (taken.lock().unwrap().len() >= all).then_some(()));
    let mut values = taken.lock().unwrap().clone();
    values.sort();
    values.dedup();
    assert_eq!((values.len(), taken.lock().unwrap().len()), (all, all));
    println!("{all} elements in {:?}", began.elapsed());
    drop(go);
    work.join().unwrap();
}
