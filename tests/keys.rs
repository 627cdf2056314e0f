//! The keyspace of a local shard against Redis 7: the same generated commands to both, the replies byte for byte. And what
//! a real process over an embedded shard answered is there after a SIGKILL.
//!
//! A sequence is made from a seed, which a failure names. Every few commands the database is thrown away and made again
//! from its rows, so whatever a command forgets to write down shows as a difference later. Left out is what Redis itself
//! leaves open: the order of a set, of a hash after a restart, and random picks, of which only the shape is compared; and
//! what `protocol.md` says is different, such as the sign of a score of zero.

use bytes::{Bytes, BytesMut};
use goflow::clock;
use goflow::resp::reply::{Protocol, Reply};
use goflow::shard::Unit;
use goflow::shard::keys::{Database, Loading};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::eventually;
use crate::support::goflow::Goflow;
use crate::support::servers::{Flavour, Server};
use crate::support::wire::{Value, Wire, encode};

/// One line is one command. A capital letter alone stands for what [`word`] makes of it; words in braces are one choice.
const COMMANDS: &str = "
    LPUSH K M V|LPUSH K M|RPUSH K M V M|RPUSH K M|LPUSHX K M|RPUSHX K M|LPOP K|RPOP K|LPOP K N|RPOP K N|LLEN K|LRANGE K I I
    LRANGE K 0 -1|LINDEX K I|LSET K I V|LINSERT K {BEFORE,AFTER,X} M V|LREM K I M|LREM K 0 M|LTRIM K I I|LPOS K M
    LPOS K M RANK I|LPOS K M COUNT N|LPOS K M RANK I COUNT N MAXLEN N|LMOVE K K {LEFT,RIGHT} {LEFT,RIGHT,X}|RPOPLPUSH K K
    LMPOP N K K {LEFT,RIGHT}|LMPOP 2 K K {LEFT,RIGHT,X} COUNT N|LMPOP 1 K LEFT COUNT 2
    GET K|SET K V|SET K I|SET K V {NX,XX,GET,KEEPTTL,X}|SET K V {NX,XX} GET|SET K V {EX,PX} T|SET K V EXAT U|SET K V PXAT P
    SET K V EX 100 {NX,KEEPTTL,PX}|SETNX K V|SETEX K T V|PSETEX K T V|GETSET K V|GETDEL K|GETEX K|GETEX K {EX,PX,X} T
    GETEX K PERSIST|GETRANGE K I I|SUBSTR K I I|SETRANGE K N V|SETRANGE K I V|STRLEN K|APPEND K V|INCR K|DECR K|INCRBY K I
    DECRBY K I|INCRBYFLOAT K G|MGET K K K|MSET K V K V|MSET K V K|MSETNX K V K V
    HSET K M V|HSET K M V M V|HSET K M|HMSET K M V M I|HSETNX K M V|HGET K M|HMGET K M M|HGETALL K|HKEYS K|HVALS K|HLEN K
    HSTRLEN K M|HEXISTS K M|HDEL K M|HDEL K M M|HINCRBY K M I|HINCRBYFLOAT K M G|HRANDFIELD K|HRANDFIELD K 100
    HRANDFIELD K 100 WITHVALUES|HRANDFIELD K N {WITHVALUES,X}|HSCAN K 0 COUNT 1000|HSCAN K 0 MATCH {*,m*,[0-9]*,X}|HSCAN K X
    SADD K M|SADD K M M M|SREM K M|SREM K M M|SMEMBERS K|SISMEMBER K M|SMISMEMBER K M M|SCARD K|SPOP K 100|SPOP K 0|SPOP K V
    SPOP K I X|SRANDMEMBER K I X|HRANDFIELD K I {WITHVALUES,X}|ZPOPMIN K I X|LPOP K I X
    SRANDMEMBER K|SRANDMEMBER K 100|SRANDMEMBER K -5|SMOVE K K M|SINTER K K|SUNION K K|SDIFF K K|SDIFF K K K
    SINTERSTORE K K K|SUNIONSTORE K K K|SDIFFSTORE K K K|SINTERCARD N K K|SINTERCARD 2 K K LIMIT I|SINTERCARD 2 K K X
    SSCAN K 0 COUNT 1000|SSCAN K 0 MATCH m? COUNT 100
    ZADD K F M|ZADD K F M F M|ZADD K {NX,XX,GT,LT,CH,INCR} F M|ZADD K {NX,XX,GT,LT} CH F M F M|ZADD K {NX,XX,GT,LT} INCR F M
    ZADD K {NX,XX,GT} {NX,XX,LT} F M|ZADD K F|ZADD K INCR F M F M|ZINCRBY K F M|ZSCORE K M|ZMSCORE K M M|ZCARD K|ZCOUNT K S S
    ZLEXCOUNT Z L L|ZRANK K M|ZREVRANK K M|ZRANGE K I I|ZRANGE K I I WITHSCORES|ZRANGE K 0 -1 REV WITHSCORES
    ZRANGE K S S BYSCORE|ZRANGE K S S BYSCORE REV WITHSCORES LIMIT I I|ZRANGE Z L L BYLEX LIMIT N I|ZRANGE Z L L BYLEX REV
    ZRANGE K I I LIMIT 0 N|ZRANGE Z L L BYLEX WITHSCORES|ZRANGE K I I {BYLEX,BYSCORE,X} {REV,BYLEX,X}
    ZREVRANGE K I I|ZREVRANGE K I I WITHSCORES|ZRANGEBYSCORE K S S|ZRANGEBYSCORE K S S WITHSCORES LIMIT N I
    ZREVRANGEBYSCORE K S S|ZREVRANGEBYSCORE K S S LIMIT N N WITHSCORES|ZRANGEBYLEX Z L L|ZREVRANGEBYLEX Z L L LIMIT N I
    ZRANGESTORE K K I I|ZRANGESTORE K K S S BYSCORE|ZREM K M|ZREM K M M|ZREMRANGEBYRANK K I I|ZREMRANGEBYSCORE K S S
    ZREMRANGEBYLEX Z L L|ZPOPMIN K|ZPOPMAX K|ZPOPMIN K N|ZPOPMAX K N|ZMPOP N K K {MIN,MAX}|ZMPOP 2 K K {MIN,MAX,X} COUNT N
    ZUNION 2 K K|ZUNION 2 K K WITHSCORES|ZINTER 2 K K WITHSCORES|ZDIFF 2 K K WITHSCORES|ZUNION N K K
    ZUNION 2 K K WEIGHTS W W AGGREGATE {SUM,MIN,MAX,X} WITHSCORES|ZUNIONSTORE K 2 K K|ZINTERSTORE K 2 K K WEIGHTS W W
    ZDIFFSTORE K 2 K K|ZDIFFSTORE K 2 K K WEIGHTS 1 2|ZINTERCARD 2 K K|ZINTERCARD 2 K K LIMIT I|ZINTERCARD N K K
    ZINTERCARD 2 K K X|ZRANDMEMBER K 100|ZRANDMEMBER K 100 WITHSCORES|ZRANDMEMBER K|ZSCAN K 0 COUNT 1000|ZADD Z 0 M 0 M 0 V|SADD K 1 2 3
    DEL K|DEL K K|UNLINK K K|EXISTS K K K|TOUCH K K|TYPE K|EXPIRE K T|PEXPIRE K T|EXPIREAT K U|PEXPIREAT K P
    EXPIRE K 100 {NX,XX,X}|EXPIREAT K U {NX,XX,GT,LT}|EXPIRE K 100 {NX,GT} {XX,LT}|EXPIRE K {0,-7,x,1.0}|PEXPIREAT K I|TTL K|PTTL K
    EXPIRETIME K|PEXPIRETIME K|PERSIST K|RENAME K K|RENAMENX K K|SCAN 0 COUNT 1000|SCAN 0 COUNT 1000 TYPE {list,hash,zset}
    SCAN 0 MATCH {k*,*1} COUNT 1000|SCAN {X,1.5} COUNT 1|SCAN 0 COUNT 0|SCAN 0 {TYPE,X}|KEYS {*,k?,k[12],none}|DBSIZE|GET|NOSUCH a b|SET K
    XADD K 1-1 M V|XADD K Y M V|XADD K Y M|XADD K NOMKSTREAM Y M V|XADD K MAXLEN = N Y M V|XADD K MAXLEN N Y M V|XADD K MINID Y Y M V|XLEN K
    XRANGE K - +|XRANGE K Y Y|XRANGE K (Y +|XRANGE K - + COUNT N|XREVRANGE K + -|XREVRANGE K + - COUNT N|XREVRANGE K Y (Y
    XDEL K Y|XDEL K Y Y|XTRIM K MAXLEN N|XTRIM K MAXLEN I|XTRIM K MINID Y|XTRIM K {MAXLEN,MINID} N LIMIT I
    XTRIM K MAXLEN ~ N LIMIT {x,-1}|XTRIM K {LIMIT,MAXLEN,X} N {MAXLEN,MINID} Y|XADD K {MAXLEN,MINID,LIMIT} N {MAXLEN,MINID} Y Y M V
    XADD K Y M V M|XADD K NOMKSTREAM Y M|XADD K NOMKSTREAM {LIMIT,MAXLEN} N|XREAD STREAMS K 0|XREAD COUNT N STREAMS K K 0 Y
    XREAD STREAMS K K 0|XREAD STREAMS K $|XADD K X M V
";

/// Those that wait in Redis are sent to it as it answers them inside a transaction.
const BLOCKING: &str = "
    BLPOP K {1e400,1e-400,inf,-0.0001}|BLPOP K T|BLPOP K K 0|BRPOP K F|BLMOVE K K {LEFT,RIGHT} {LEFT,RIGHT} T|BRPOPLPUSH K K 0|BLMPOP 0 2 K K LEFT COUNT 2
    BLMPOP T N K K RIGHT|BZPOPMIN K K 0|BZPOPMAX K F|BZMPOP 0 2 K K MIN|BZMPOP T 2 K K MAX COUNT N|XREAD BLOCK 0 STREAMS K 0
";

fn templates(text: &'static str) -> Vec<Vec<&'static str>> {
    text.split(['|', '\n'])
        .map(|line| line.split_ascii_whitespace().collect())
        .filter(|words: &Vec<_>| !words.is_empty())
        .collect()
}

/// A word of a template made into one that is sent.
fn word(template: &str, dice: &mut StdRng) -> Bytes {
    let one_of = |dice: &mut StdRng, choices: &[&str]| choices.choose(dice).unwrap().to_string();
    let made = match template {
        "K" => format!("k{}", dice.random_range(0..6)),
        // Holds a sorted set whose members all have the same score, so that their order is defined.
        "Z" => "z".into(),
        "M" => match dice.random_bool(0.5) {
            true => format!("m{}", dice.random_range(0..8)),
            false => dice.random_range(0..8).to_string(),
        },
        "V" => one_of(
            dice,
            &["", "v", "10", "-3", "1.5", "3.0", "a longer value than most", "\0\r\nbinary\u{1}", "07", "nan"],
        ),
        "I" => one_of(
            dice,
            &[
                "0",
                "1",
                "-1",
                "2",
                "-2",
                "3",
                "5",
                "-7",
                "100",
                "-100",
                "x",
                "9223372036854775807",
                "-9223372036854775808",
                "9223372036854775808",
                "1.0",
                "+1",
            ],
        ),
        "N" => one_of(dice, &["0", "1", "2", "2", "3", "10", "-1", "x"]),
        "F" => {
            one_of(dice, &["0", "1", "-1", "1.5", "2.25", "1e3", "inf", "-inf", "+inf", "x", "nan", "0.1", "3", "1e17"])
        }
        "W" => one_of(dice, &["0", "1", "2", "0.5", "1e3", "inf", "x"]),
        "G" => one_of(
            dice,
            &["0", "1", "-1", "1.5", "0.1", "-2.25", "x", ".5", "7", "3.0", " 1", "", "inf", "-inf", "nan"],
        ),
        "S" => one_of(
            dice,
            &[
                "-inf", "+inf", "0", "1", "(1", "(0", "2", "1.5", "(-inf", "(inf", "x", "-1", "100", "", "(", " 1",
                "( 1", " ", "1 ", "1e400", "(-1e400",
            ],
        ),
        "L" => one_of(dice, &["-", "+", "[m1", "(m1", "[m5", "(4", "[", "(", "x", "[z"]),
        "T" => one_of(dice, &["100000", "200000", "1000000", "0", "-1", "x", "9223372036854775807", "99999999999"]),
        "U" => one_of(dice, &["4102444800", "4102444801", "1", "-5", "x", "9223372036854775807"]),
        "P" => one_of(dice, &["4102444800000", "4102444800123", "1", "0", "x"]),
        "Y" => one_of(
            dice,
            &[
                "1-1",
                "1-2",
                "2",
                "2-*",
                "3-5",
                "5",
                "0-0",
                "0-1",
                "x",
                "7-*",
                "9-1",
                "18446744073709551615-1",
                "18446744073709551615-18446744073709551615",
            ],
        ),
        "(Y" => format!("({}", one_of(dice, &["1-1", "1-2", "2", "3-5", "0-0", "x"])),
        choices if choices.starts_with('{') => {
            one_of(dice, &choices.trim_matches(['{', '}']).split(',').collect::<Vec<_>>())
        }
        plain => plain.into(),
    };
    Bytes::from(made)
}

/// What is compared of a reply.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Compared {
    Bytes,
    /// Elements of the outer array (or of the page of a scan) in any order, so many words to an element.
    Elements(usize),
    /// Two numbers that differ by no more.
    Near(i64),
    /// How many bytes of reply there are lines.
    Lines,
}

fn compared(request: &[Bytes], protocol: Protocol) -> Compared {
    let name = String::from_utf8_lossy(&request[0]).to_ascii_uppercase();
    let with_two = request.iter().any(|word| word.starts_with(b"WITH"));
    match name.as_str() {
        "SMEMBERS" | "SINTER" | "SUNION" | "SDIFF" | "KEYS" | "HKEYS" | "HVALS" | "SSCAN" | "SCAN" | "SPOP" => {
            Compared::Elements(1)
        }
        "HSCAN" | "ZSCAN" | "HGETALL" => Compared::Elements(2),
        "SRANDMEMBER" | "HRANDFIELD" | "ZRANDMEMBER" if request.len() == 2 || request[2] != "100" => Compared::Lines,
        "SRANDMEMBER" | "HRANDFIELD" | "ZRANDMEMBER" if with_two && protocol == Protocol::Resp2 => {
            Compared::Elements(2)
        }
        "SRANDMEMBER" | "HRANDFIELD" | "ZRANDMEMBER" => Compared::Elements(1),
        "TTL" => Compared::Near(60),
        "PTTL" => Compared::Near(60_000),
        "EXPIRETIME" => Compared::Near(60),
        "PEXPIRETIME" => Compared::Near(60_000),
        _ => Compared::Bytes,
    }
}

/// A connection that gives replies as the bytes they are.
struct Peer {
    stream: BufReader<TcpStream>,
}

impl Peer {
    fn connect(server: &Server) -> Peer {
        let stream = TcpStream::connect(server.address()).unwrap();
        stream.set_nodelay(true).unwrap();
        Peer { stream: BufReader::new(stream) }
    }

    fn call<A: AsRef<[u8]>>(&mut self, words: &[A]) -> Vec<u8> {
        self.stream.get_mut().write_all(&encode(words)).unwrap();
        let mut reply = Vec::new();
        self.read(&mut reply);
        reply
    }

    fn read(&mut self, reply: &mut Vec<u8>) {
        let start = reply.len();
        self.stream.read_until(b'\n', reply).unwrap();
        let line = String::from_utf8_lossy(&reply[start..]).into_owned();
        let count = || line[1..].trim_end().parse::<i64>().unwrap();
        match line.as_bytes()[0] {
            b'$' if count() >= 0 => {
                let start = reply.len();
                reply.resize(start + count() as usize + 2, 0);
                self.stream.read_exact(&mut reply[start..]).unwrap();
            }
            b'*' | b'~' | b'>' => (0..count()).for_each(|_| self.read(reply)),
            b'%' => (0..count() * 2).for_each(|_| self.read(reply)),
            _ => {}
        }
    }
}

/// Splits the elements of an aggregate's bytes: the head, and the bytes of each.
fn elements(reply: &[u8]) -> Option<(Vec<u8>, Vec<Vec<u8>>)> {
    let is_many = matches!(reply.first()?, b'*' | b'~' | b'%');
    let mut at = reply.iter().position(|byte| *byte == b'\n')? + 1;
    let head = reply[..at].to_vec();
    if !is_many || head.starts_with(b"*-1") {
        return None;
    }
    let mut found = Vec::new();
    while at < reply.len() {
        let len = element_len(&reply[at..]);
        found.push(reply[at..at + len].to_vec());
        at += len;
    }
    Some((head, found))
}

fn element_len(bytes: &[u8]) -> usize {
    let line = bytes.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    let count: i64 = String::from_utf8_lossy(&bytes[1..line]).trim_end().parse().unwrap_or(0);
    match bytes[0] {
        b'$' if count >= 0 => line + count as usize + 2,
        b'*' | b'~' => (0..count).fold(line, |at, _| at + element_len(&bytes[at..])),
        _ => line,
    }
}

/// The reply with the elements, which may come in any order, sorted.
fn sorted(reply: &[u8], width: usize, is_page: bool) -> Vec<u8> {
    let Some((mut head, mut parts)) = elements(reply) else { return reply.to_vec() };
    if is_page {
        let page = parts.pop().map(|page| sorted(&page, width, false));
        return [head, parts.concat(), page.unwrap_or_default()].concat();
    }
    let mut grouped: Vec<Vec<u8>> = parts.chunks(width).map(<[_]>::concat).collect();
    grouped.sort();
    head.extend(grouped.concat());
    head
}

fn number(reply: &[u8]) -> Option<i64> {
    String::from_utf8_lossy(reply.strip_prefix(b":")?).trim_end().parse().ok()
}

fn are_alike(request: &[Bytes], protocol: Protocol, ours: &[u8], theirs: &[u8]) -> bool {
    let is_page = request[0].ends_with(b"SCAN");
    match compared(request, protocol) {
        Compared::Bytes => ours == theirs,
        Compared::Elements(width) => sorted(ours, width, is_page) == sorted(theirs, width, is_page),
        Compared::Near(within) => match (number(ours), number(theirs)) {
            (Some(ours), Some(theirs)) if ours > 0 => (ours - theirs).abs() <= within,
            _ => ours == theirs,
        },
        Compared::Lines if theirs.starts_with(b"-") => ours == theirs,
        Compared::Lines => {
            let lines = |reply: &[u8]| reply.iter().filter(|byte| **byte == b'\n').count();
            lines(ours) == lines(theirs) || ours.contains(&0)
        }
    }
}

/// The database under test, and its rows as they would be on disk.
struct Ours {
    database: Database,
    disk: BTreeMap<Bytes, Bytes>,
    protocol: Protocol,
}

impl Ours {
    fn new(protocol: Protocol) -> Ours {
        Ours { database: Loading::new().finish(), disk: BTreeMap::new(), protocol }
    }

    fn call(&mut self, words: &[Bytes]) -> Vec<u8> {
        let unit = Unit { protocol: self.protocol, requests: vec![words.to_vec()], watched: Vec::new() };
        let replies = self.database.run(&unit, clock::now()).unwrap();
        self.write_down();
        let mut out = BytesMut::new();
        Reply::Many(replies).encode(self.protocol, &mut out);
        out.to_vec()
    }

    fn write_down(&mut self) {
        for row in self.database.take_rows() {
            match row.value {
                Some(value) => drop(self.disk.insert(row.key, value)),
                None => drop(self.disk.remove(&row.key)),
            }
        }
    }

    fn reopen(&mut self) {
        let mut loading = Loading::new();
        self.disk.iter().for_each(|(key, value)| loading.row(key, value).unwrap());
        self.database = loading.finish();
        self.write_down();
    }
}

/// Runs one generated sequence on both; what differed first, in words.
fn difference(peer: &mut Peer, seed: u64, protocol: Protocol) -> Option<String> {
    const COMMANDS_EACH: usize = 60;
    let (plain, blocking) = (templates(COMMANDS), templates(BLOCKING));
    let mut dice = StdRng::seed_from_u64(seed);
    let mut ours = Ours::new(protocol);
    peer.call(&["FLUSHALL"]);
    peer.call(&["HELLO", if protocol == Protocol::Resp2 { "2" } else { "3" }]);
    let mut told = Vec::new();
    for _ in 0..COMMANDS_EACH {
        let waits = dice.random_bool(0.04);
        let template = if waits { &blocking } else { &plain }.choose(&mut dice).unwrap();
        let request: Vec<Bytes> = template.iter().map(|template| word(template, &mut dice)).collect();
        if request[0] == "LPOS" && request.iter().any(|word| *word == i64::MIN.to_string()) {
            // Redis 7.0 computes with what no 64 bits hold.
            continue;
        }
        let theirs = match waits {
            false => {
                if request[0] == "DBSIZE" {
                    // Makes it remove what has expired, which it otherwise counts for a while.
                    peer.call(&["SCAN", "0", "COUNT", "1000"]);
                }
                peer.call(&request)
            }
            true => {
                peer.call(&["MULTI"]);
                peer.call(&request);
                peer.call(&["EXEC"])[4..].to_vec()
            }
        };
        let mine = ours.call(&request);
        let text = |bytes: &[u8]| bytes.escape_ascii().to_string();
        told.push(text(&request.join(&b' ')));
        if !are_alike(&request, protocol, &mine, &theirs) {
            let history = told.join("\n");
            return Some(format!(
                "seed {seed} {protocol:?}\n{history}\nours:   {}\nRedis:  {}",
                text(&mine),
                text(&theirs)
            ));
        }
        if dice.random_bool(0.1) {
            ours.reopen();
        }
    }
    None
}

#[test]
fn generated_commands_are_answered_as_redis_answers_them() {
    let sequences: u64 = std::env::var("GOFLOW_SEQUENCES").ok().and_then(|text| text.parse().ok()).unwrap_or(600);
    let first: u64 = std::env::var("GOFLOW_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let server = Server::start(Flavour::Redis7, &[]);
    let mut peer = Peer::connect(&server);
    for seed in first..first + sequences {
        let protocol = if seed % 2 == 0 { Protocol::Resp2 } else { Protocol::Resp3 };
        if let Some(difference) = difference(&mut peer, seed, protocol) {
            panic!("{difference}");
        }
    }
}

/// Pushes numbers until the other side is gone; how many were acknowledged.
fn push_until_cut(address: &str, writer: usize, pushed: &AtomicUsize) -> usize {
    let mut stream = BufReader::new(TcpStream::connect(address).unwrap());
    for number in 0.. {
        let request = encode(&["RPUSH", "list", &format!("{writer}:{number}")]);
        let mut reply = String::new();
        let is_answered = stream.get_mut().write_all(&request).is_ok() && stream.read_line(&mut reply).is_ok();
        if !is_answered || !reply.ends_with("\r\n") {
            return number;
        }
        pushed.fetch_add(1, Ordering::Relaxed);
    }
    unreachable!("numbers do not end")
}

#[test]
fn a_push_that_was_acknowledged_survives_a_sigkill() {
    const WRITERS: usize = 8;
    let mut goflow = Goflow::start(&["--shard", "a=embedded:store"]);
    for round in 1..=3 {
        goflow.wire().say("DEL list");
        let pushed = AtomicUsize::new(0);
        let address = goflow.address().to_owned();
        let acknowledged: Vec<usize> = std::thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS)
                .map(|writer| {
                    let (address, pushed) = (&address, &pushed);
                    scope.spawn(move || push_until_cut(address, writer, pushed))
                })
                .collect();
            crate::eventually!("some are pushed", (pushed.load(Ordering::Relaxed) > 300 * round).then_some(()));
            goflow.kill();
            writers.into_iter().map(|writer| writer.join().unwrap()).collect()
        });
        goflow.restart();
        let there: Vec<String> = goflow.wire().say("LRANGE list 0 -1").items().iter().map(Value::text).collect();
        for (writer, acknowledged) in acknowledged.into_iter().enumerate() {
            let prefix = format!("{writer}:");
            let numbers: Vec<usize> =
                there.iter().filter_map(|item| item.strip_prefix(&prefix)?.parse().ok()).collect();
            // The one that was under way may be there as well; each once, and in the order in which they were sent.
            assert!([acknowledged, acknowledged + 1].contains(&numbers.len()), "{acknowledged} of {}", numbers.len());
            assert!(numbers.iter().enumerate().all(|(place, number)| place == *number));
        }
    }
}

#[test]
fn a_worker_that_waits_gets_what_is_pushed_and_a_transaction_is_one() {
    let goflow = Goflow::start(&["--shard", "a=embedded:store"]);
    let (mut worker, mut client) = (goflow.wire(), goflow.wire());
    worker.send(&["BRPOP", "jobs", "0"]);
    assert_eq!(client.say("LPUSH jobs one"), Value::Integer(1));
    assert_eq!(worker.read(), Value::Array(vec![Value::Bulk("jobs".into()), Value::Bulk("one".into())]));
    client.say("WATCH count");
    worker.say("INCR count");
    client.say("MULTI");
    client.say("INCR count");
    assert_eq!(client.say("EXEC"), Value::Null);
    client.say("MULTI");
    client.say("INCR count");
    client.say("LPUSH count x");
    let told = client.say("EXEC");
    assert_eq!(told.items()[0], Value::Integer(2));
    assert!(told.items()[1].is_error("WRONGTYPE"));
}

fn array(items: &[&str]) -> Value {
    Value::Array(items.iter().map(|item| Value::Bulk((*item).into())).collect())
}

#[test]
fn a_transaction_may_say_what_is_no_matter_of_keys_and_publishes_after_its_commit() {
    for shard in ["a=embedded:store", "a=memory:"] {
        let goflow = Goflow::start(&["--shard", shard]);
        let (mut client, mut listener) = (goflow.wire(), goflow.wire());
        listener.say("SUBSCRIBE done");
        client.say("MULTI");
        // What Celery says of a result, and what may stand around it.
        for line in [
            "SETEX result 100 x",
            "PUBLISH done x",
            "PING",
            "PING hello",
            "PING a b",
            "ECHO word",
            "SELECT 0",
            "UNWATCH",
            "TIME",
            "PUBSUB NUMSUB done",
            "GET result",
        ] {
            assert_eq!(client.say(line).text(), "QUEUED", "{line}");
        }
        let told = client.say("EXEC");
        let told = told.items();
        assert_eq!(told[..2], [Value::Simple("OK".into()), Value::Integer(1)]);
        assert_eq!((told[2].text(), told[3].text()), ("PONG".into(), "hello".into()));
        assert!(told[4].text().starts_with("ERR wrong number of arguments for 'ping'"));
        assert_eq!((told[5].text(), told[6].text(), told[7].text()), ("word".into(), "OK".into(), "OK".into()));
        assert!(told[8].items()[0].text().parse::<u64>().unwrap() > 1_700_000_000);
        assert_eq!(told[9], Value::Array(vec![Value::Bulk("done".into()), Value::Integer(1)]));
        assert_eq!((told[10].text(), told.len()), ("x".into(), 11));
        assert_eq!(listener.read(), array(&["message", "done", "x"]));
        // What a changed key ends says nothing.
        client.say("WATCH result");
        goflow.wire().say("SET result y");
        client.say("MULTI");
        client.say("PUBLISH done lost");
        assert_eq!(client.say("EXEC"), Value::Null);
        assert_eq!(client.say("PUBLISH done kept"), Value::Integer(1));
        assert_eq!(listener.read(), array(&["message", "done", "kept"]));
        // One's own write before a WATCH is no change behind it, and a second WATCH does not renew the first.
        for line in ["SET key 1", "WATCH key", "MULTI", "INCR key", "EXEC"] {
            client.send(&line.split(' ').collect::<Vec<_>>());
        }
        (0..4).for_each(|_| drop(client.read()));
        assert_eq!(client.read(), Value::Array(vec![Value::Integer(2)]));
        client.say("WATCH key");
        goflow.wire().say("SET key 5");
        client.say("WATCH key");
        client.say("MULTI");
        client.say("INCR key");
        assert_eq!(client.say("EXEC"), Value::Null);
    }
}

#[test]
fn pub_sub_without_redis_knows_its_channels_and_those_of_shards() {
    let goflow = Goflow::start(&["--shard", "a=memory:", "--shard", "b=memory:"]);
    let (mut client, mut plain, mut sharded) = (goflow.wire(), goflow.wire(), goflow.wire());
    plain.say("SUBSCRIBE news other");
    plain.read();
    plain.say("PSUBSCRIBE n*");
    sharded.say("SSUBSCRIBE news");
    assert_eq!(client.say("SPUBLISH news x"), Value::Integer(1));
    assert_eq!(sharded.read(), array(&["smessage", "news", "x"]));
    assert_eq!(client.say("PUBLISH news y"), Value::Integer(2));
    assert_eq!(plain.read(), array(&["message", "news", "y"]));
    assert_eq!(plain.read(), array(&["pmessage", "n*", "news", "y"]));
    assert_eq!(client.say("PUBSUB CHANNELS"), array(&["news", "other"]));
    assert_eq!(client.say("PUBSUB CHANNELS o*"), array(&["other"]));
    assert_eq!(client.say("PUBSUB SHARDCHANNELS"), array(&["news"]));
    assert_eq!(client.say("PUBSUB NUMPAT"), Value::Integer(1));
    let counts = |wanted: [(&str, i64); 2]| {
        Value::Array(
            wanted.iter().flat_map(|(name, count)| [Value::Bulk((*name).into()), Value::Integer(*count)]).collect(),
        )
    };
    assert_eq!(client.say("PUBSUB NUMSUB news nobody"), counts([("news", 1), ("nobody", 0)]));
    assert_eq!(client.say("PUBSUB SHARDNUMSUB other news"), counts([("other", 0), ("news", 1)]));
    assert!(client.say("PUBSUB NOSUCH").is_error("ERR"));
}

#[test]
fn who_waits_for_what_comes_after_the_last_entry_is_not_given_the_old_ones() {
    let goflow = Goflow::start(&["--shard", "a=memory:"]);
    let (mut reader, mut client) = (goflow.wire(), goflow.wire());
    client.say("XADD stream 5-1 old entry");
    client.say("XADD stream 5-2 older entry");
    client.say("XDEL stream 5-2");
    reader.send(&["XREAD", "BLOCK", "0", "STREAMS", "nothing", "stream", "$", "$"]);
    let is_blocked = |wire: &mut Wire| wire.say("INFO clients").text().contains("blocked_clients:1\r\n").then_some(());
    eventually!("it waits", is_blocked(&mut client));
    client.say("XADD stream 5-3 new entry");
    let told = reader.read();
    let entries = told.items()[0].items()[1].items();
    assert_eq!((entries.len(), entries[0].items()[0].text()), (1, "5-3".into()));
    client.say("SET text x");
    assert!(reader.say("XREAD BLOCK 0 STREAMS text $").is_error("WRONGTYPE"));
}

#[test]
fn a_reply_that_is_too_large_is_refused_before_it_is_written() {
    let goflow = Goflow::start(&["--shard", "a=memory:"]);
    let mut wire = goflow.wire();
    let value = "x".repeat(1 << 20);
    wire.call(&["SET", "key", &value]);
    wire.call(&["HSET", "hash", "field", &value]);
    wire.call(&["SADD", "set", &"m".repeat(60_000)]);
    wire.call(&["XADD", "stream", "1-1", "field", &value]);
    let mget: Vec<&str> = ["MGET"].into_iter().chain(["key"; 1_000]).collect();
    let xread = [&["XREAD", "BLOCK", "0", "STREAMS"][..], &["stream"; 1_000], &["0"; 1_000]].concat();
    assert!(wire.call(&mget).is_error("TOOBIG"));
    assert!(wire.call(&xread).is_error("TOOBIG"));
    assert!(wire.say("HRANDFIELD hash -1000 WITHVALUES").is_error("TOOBIG"));
    assert!(wire.say("SRANDMEMBER set -20000").is_error("TOOBIG"));
    wire.say("MULTI");
    (0..100).for_each(|_| drop(wire.say("GET key")));
    assert!(wire.say("EXEC").is_error("TOOBIG"));
    assert_eq!(wire.say("GET key").text().len(), 1 << 20);
    let status = std::fs::read_to_string(format!("/proc/{}/status", goflow.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let kb: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kb < 400_000, "{kb} kB at the most");
}
