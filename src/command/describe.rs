//! What `COMMAND` and `ACL CAT` say about the rows, in the shapes of Redis 7.
//!
//! `redis-cli` builds its hints from `COMMAND DOCS`, cluster and proxy clients find keys by `COMMAND` and `COMMAND
//! GETKEYS`. Nothing here knows a command by name: all of it is read from the rows. Of Redis's own commands these hold what
//! routing needs, so their entries say neither what they do to a key nor a category, and they have no documentation.

use bytes::Bytes;

use super::args::{Arg, Args, Kind, syntax_error};
use super::{Context, Flag, Group, Plan, Row, find, help, lookup, ordinary, rows};
use crate::error::{Error, Result};
use crate::resp::glob;
use crate::resp::reply::Reply;

fn set(words: Vec<&'static str>) -> Reply {
    Reply::Set(words.into_iter().map(Reply::Simple).collect())
}

/// A map whose fields are known words.
fn map(fields: Vec<(&'static str, Reply)>) -> Reply {
    Reply::Map(fields.into_iter().map(|(name, value)| (Reply::text(name), value)).collect())
}

fn names<'a>(rows: impl Iterator<Item = &'a Row>) -> Reply {
    Reply::Array(rows.map(|row| Reply::bulk(&row.lower)).collect())
}

/// All names that the pattern matches, subcommands among them.
fn names_like(pattern: &[u8]) -> Reply {
    let ours = rows().iter().map(|row| row.lower.clone());
    let all = ours.chain(ordinary_commands().map(|row| row.name.to_ascii_lowercase()));
    Reply::Array(all.filter(|name| glob::matches(pattern, name.as_bytes())).map(Reply::bulk).collect())
}

/// The rows that are not subcommands.
fn commands() -> impl Iterator<Item = &'static Row> {
    rows().iter().filter(|row| row.name_words == 1)
}

/// Redis's own commands that have no row of ours.
fn ordinary_commands() -> impl Iterator<Item = &'static ordinary::Row> {
    ordinary::ROWS.iter().filter(|row| lookup(row.name.as_bytes()).is_none())
}

fn subcommands(row: &Row) -> impl Iterator<Item = &'static Row> {
    row.subcommands.iter().map(|index| &rows()[*index])
}

/// Where the names of queues or keys stand in a request: the first, the last (negative from the end), and whether
/// there may be others that only `COMMAND GETKEYS` finds.
struct Keys {
    first: i64,
    last: i64,
    movable: bool,
}

fn keys_of(row: &Row) -> Option<Keys> {
    let args = row.args;
    let place = args.iter().position(|arg| arg.kind == Kind::Queue)?;
    let first = (row.name_words + place) as i64;
    Some(match (args[place].many, place + 1 == args.len()) {
        (true, true) => Keys { first, last: -1, movable: false },
        (many, _) => Keys { first, last: first, movable: many },
    })
}

fn category_words(row: &Row) -> Vec<&'static str> {
    let mut words = Vec::new();
    let flagged = [
        (Flag::Write, "@write"),
        (Flag::ReadOnly, "@read"),
        (Flag::Admin, "@admin"),
        (Flag::Admin, "@dangerous"),
        (Flag::Blocking, "@blocking"),
    ];
    words.extend(flagged.iter().filter(|(flag, _)| row.has(*flag)).map(|(_, word)| *word));
    words.push(if row.has(Flag::Fast) { "@fast" } else { "@slow" });
    match row.group {
        Group::Connection => words.push("@connection"),
        Group::Jobs | Group::DeadLetters | Group::Locks | Group::Events | Group::Operations => words.push("@goflow"),
        Group::Server => {}
    }
    words
}

/// All categories, without the at sign.
const CATEGORIES: [&str; 9] =
    ["goflow", "read", "write", "admin", "fast", "slow", "blocking", "dangerous", "connection"];

fn is_in(row: &Row, category: &[u8]) -> bool {
    category_words(row).iter().any(|word| word.as_bytes()[1..].eq_ignore_ascii_case(category))
}

/// The ten elements of an entry of `COMMAND`.
fn entry(row: &Row) -> Reply {
    let fewest = row.words_min as i64;
    let arity = if row.words_max == Some(row.words_min) { fewest } else { -fewest };
    let keys = keys_of(row);
    let mut flags: Vec<&str> = row.flags.iter().map(|flag| flag.word()).collect();
    flags.extend(keys.as_ref().filter(|keys| keys.movable).map(|_| "movablekeys"));
    let (first, last, step) = keys.as_ref().map_or((0, 0, 0), |keys| (keys.first, keys.last, 1));
    Reply::Array(vec![
        Reply::bulk(&row.lower),
        Reply::Integer(arity),
        set(flags),
        Reply::Integer(first),
        Reply::Integer(last),
        Reply::Integer(step),
        set(category_words(row)),
        Reply::Set(Vec::new()),
        Reply::Set(keys.iter().map(|keys| key_specification(row, keys)).collect()),
        Reply::Array(subcommands(row).map(entry).collect()),
    ])
}

/// The same of one of Redis's own commands.
fn ordinary_entry(row: &ordinary::Row) -> Reply {
    let (first, last, step, movable) = match row.keys {
        ordinary::Keys::None => (0, 0, 0, false),
        ordinary::Keys::Range { first, last, step } => (first as i64, last as i64, step as i64, false),
        ordinary::Keys::Numbered { stored: true, .. } | ordinary::Keys::Sort => (1, 1, 1, true),
        ordinary::Keys::Numbered { .. } | ordinary::Keys::Streams => (0, 0, 0, true),
    };
    let mut flags = match row.how {
        ordinary::How::Block(_) => vec!["blocking"],
        ordinary::How::Channel(_) => vec!["pubsub"],
        _ => Vec::new(),
    };
    if movable {
        flags.push("movablekeys");
    }
    let mut fields = vec![Reply::bulk(row.name.to_ascii_lowercase()), Reply::Integer(row.arity.into()), set(flags)];
    fields.extend([first, last, step].map(Reply::Integer));
    fields.extend([set(Vec::new()), set(Vec::new()), set(Vec::new()), Reply::Array(Vec::new())]);
    Reply::Array(fields)
}

fn key_specification(row: &Row, keys: &Keys) -> Reply {
    let mut flags = if row.has(Flag::Write) { vec!["RW", "access", "update"] } else { vec!["RO", "access"] };
    if keys.movable {
        flags.push("incomplete");
    }
    let last = if keys.last < 0 { keys.last } else { keys.last - keys.first };
    let range = [("lastkey", last), ("keystep", 1), ("limit", 0)];
    let range = map(range.map(|(name, number)| (name, Reply::Integer(number))).to_vec());
    let begin = map(vec![("type", Reply::text("index")), ("spec", map(vec![("index", Reply::Integer(keys.first))]))]);
    let find = map(vec![("type", Reply::text("range")), ("spec", range)]);
    map(vec![("flags", set(flags)), ("begin_search", begin), ("find_keys", find)])
}

/// The documentation of one command.
fn doc(row: &Row) -> Reply {
    let mut fields = vec![
        ("summary", Reply::text(row.summary)),
        ("since", Reply::text(row.since)),
        ("group", Reply::text(row.group.word())),
    ];
    // A container's arguments are its subcommands.
    if !row.args.is_empty() && row.subcommands.is_empty() {
        fields.push(("arguments", arguments(row.args)));
    }
    if !row.subcommands.is_empty() {
        let docs = subcommands(row).map(|row| (Reply::bulk(&row.lower), doc(row)));
        fields.push(("subcommands", Reply::Map(docs.collect())));
    }
    map(fields)
}

fn arguments(args: &[Arg]) -> Reply {
    let mut described = Vec::new();
    let mut at = 0;
    while at < args.len() {
        let chain = 1 + args[at + 1..].iter().take_while(|arg| arg.or).count();
        if chain == 1 {
            described.push(argument(&args[at], args[at].optional));
        } else {
            // Alternatives are optional together, not each.
            let alternatives = args[at..at + chain].iter().map(|arg| argument(arg, false)).collect();
            described.push(map(vec![
                ("name", Reply::text(args[at].key())),
                ("type", Reply::text("oneof")),
                ("flags", set(if args[at].optional { vec!["optional"] } else { Vec::new() })),
                ("arguments", Reply::Array(alternatives)),
            ]));
        }
        at += chain;
    }
    Reply::Array(described)
}

fn argument(arg: &Arg, optional: bool) -> Reply {
    let kind = match arg.kind {
        Kind::Flag => "pure-token",
        Kind::Queue => "key",
        Kind::Integer(..) | Kind::Millis(..) | Kind::Count => "integer",
        Kind::Time => "unix-time",
        Kind::Pattern => "pattern",
        Kind::Group(_) => "block",
        Kind::Text | Kind::Receipt | Kind::Id | Kind::State | Kind::Shard => "string",
    };
    let mut fields = vec![("name", Reply::text(arg.name)), ("type", Reply::text(kind))];
    if arg.kind == Kind::Queue {
        fields.push(("key_spec_index", Reply::Integer(0)));
    }
    fields.extend(arg.token.map(|token| ("token", Reply::text(token))));
    let mut flags = Vec::new();
    if optional {
        flags.push("optional");
    }
    if arg.many {
        flags.push("multiple");
    }
    if arg.many && arg.token.is_some() {
        flags.push("multiple_token");
    }
    if !flags.is_empty() {
        fields.push(("flags", set(flags)));
    }
    if let Kind::Group(args) = arg.kind {
        fields.push(("arguments", arguments(args)));
    }
    map(fields)
}

/// `COMMAND` alone, and `COMMAND HELP`.
pub fn all(args: &Args, context: &Context) -> Result<Plan> {
    match args.has("subcommand") {
        true => help(args, context),
        false => Ok(Plan::Now(entries())),
    }
}

pub fn count(_: &Args, _: &Context) -> Result<Plan> {
    Ok(Plan::Now(Reply::count((commands().count() + ordinary_commands().count()) as u64)))
}

pub fn info(args: &Args, _: &Context) -> Result<Plan> {
    let ordinary_of = |name: &Bytes| ordinary::find(name).map_or(Reply::NullArray, ordinary_entry);
    let entry_of = |name: &Bytes| lookup(name).map_or_else(|| ordinary_of(name), entry);
    match args.words("command-name") {
        [] => Ok(Plan::Now(entries())),
        names => Ok(Plan::Now(Reply::Array(names.iter().map(entry_of).collect()))),
    }
}

fn entries() -> Reply {
    Reply::Array(commands().map(entry).chain(ordinary_commands().map(ordinary_entry)).collect())
}

pub fn docs(args: &Args, _: &Context) -> Result<Plan> {
    let pair = |row: &Row| (Reply::bulk(&row.lower), doc(row));
    let docs = match args.words("command-name") {
        [] => commands().map(pair).collect(),
        names => names.iter().filter_map(|name| lookup(name)).map(pair).collect(),
    };
    Ok(Plan::Now(Reply::Map(docs)))
}

pub fn list(args: &Args, _: &Context) -> Result<Plan> {
    let [kind, value] = args.words("FILTERBY") else { return Ok(Plan::Now(names_like(b"*"))) };
    Ok(Plan::Now(match &kind.to_ascii_uppercase()[..] {
        b"MODULE" => Reply::Array(Vec::new()),
        b"ACLCAT" => names(rows().iter().filter(|row| is_in(row, value))),
        b"PATTERN" => names_like(&value.to_ascii_lowercase()),
        _ => return Err(syntax_error()),
    }))
}

/// `COMMAND GETKEYS`, with Redis's errors.
pub fn keys(args: &Args, _: &Context) -> Result<Plan> {
    let request: Vec<Bytes> = args.words("command").iter().chain(args.words("argument")).cloned().collect();
    let no_keys = || Error::bad("The command has no key arguments");
    let wrong_arity = || Error::bad("Invalid number of arguments specified for command");
    if let Some(row) = request.first().filter(|name| lookup(name).is_none()).and_then(|name| ordinary::find(name)) {
        return match row.keys {
            ordinary::Keys::None => Err(no_keys()),
            _ if !row.has_arity(request.len()) => Err(wrong_arity()),
            keys => {
                let names = keys.places(&request).into_iter().filter_map(|at| request.get(at).cloned());
                Ok(Plan::Now(Reply::Array(names.map(Reply::Bulk).collect())))
            }
        };
    }
    let row = find(&request).map_err(|_| Error::bad("Invalid command specified"))?;
    if keys_of(row).is_none() {
        return Err(no_keys());
    }
    let args = Args::parse(row, &request).map_err(|_| wrong_arity())?;
    Ok(Plan::Now(Reply::Array(args.keys().into_iter().map(Reply::Bulk).collect())))
}

/// `ACL CAT`.
pub fn categories(args: &Args, _: &Context) -> Result<Plan> {
    let Some(category) = args.value("category") else {
        return Ok(Plan::Now(Reply::Array(CATEGORIES.iter().map(Reply::bulk).collect())));
    };
    match CATEGORIES.iter().any(|known| known.as_bytes().eq_ignore_ascii_case(category)) {
        true => Ok(Plan::Now(names(rows().iter().filter(|row| is_in(row, category))))),
        false => Err(Error::bad(format!("Unknown category '{}'", String::from_utf8_lossy(category)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::tests::{planned, refused};
    use crate::resp::reply::Protocol;

    fn wire(line: &str, protocol: Protocol) -> String {
        let Plan::Now(reply) = planned(line) else { panic!("{line} is not answered at once") };
        let mut out = bytes::BytesMut::new();
        reply.encode(protocol, &mut out);
        String::from_utf8_lossy(&out).replace("\r\n", " ")
    }

    #[test]
    fn an_entry_has_the_ten_elements_of_redis() {
        assert_eq!(
            wire("COMMAND INFO GOFLOW.ACK nosuch", Protocol::Resp3),
            "*2 *10 $10 goflow.ack :-3 ~2 +write +fast :1 :1 :1 ~3 +@write +@fast +@goflow ~0 ~1 %3 $5 flags ~3 +RW \
             +access +update $12 begin_search %2 $4 type $5 index $4 spec %1 $5 index :1 $9 find_keys %2 $4 type $5 \
             range $4 spec %3 $7 lastkey :0 $7 keystep :1 $5 limit :0 *0 _ "
        );
        assert!(
            wire("COMMAND INFO client|id", Protocol::Resp2).starts_with("*1 *10 $9 client|id :2 *1 +fast :0 :0 :0 ")
        );
        assert!(wire("COMMAND INFO goflow.dlq|len", Protocol::Resp2).contains(":2 :2 :1 *3 +@read"));
        assert!(wire("COMMAND INFO goflow.dequeue", Protocol::Resp2).contains("+movablekeys"));
        assert!(wire("COMMAND INFO client", Protocol::Resp2).starts_with("*1 *10 $6 client :-2 "));
    }

    #[test]
    fn redis_s_own_commands_have_entries_of_what_routing_knows() {
        let rest = "*0 *0 *0 *0 ";
        for (name, expected) in [
            ("get", "*10 $3 get :2 *0 :1 :1 :1 "),
            ("BLPOP", "*10 $5 blpop :-3 *1 +blocking :1 :-2 :1 "),
            ("mset", "*10 $4 mset :-3 *0 :1 :-1 :2 "),
            ("eval", "*10 $4 eval :-3 *1 +movablekeys :0 :0 :0 "),
            ("zunionstore", "*10 $11 zunionstore :-4 *1 +movablekeys :1 :1 :1 "),
            ("subscribe", "*10 $9 subscribe :-2 *1 +pubsub :0 :0 :0 "),
        ] {
            assert_eq!(wire(&format!("COMMAND INFO {name}"), Protocol::Resp2), format!("*1 {expected}{rest}"));
        }
        // One that has a row of ours is told by it, and once.
        assert!(wire("COMMAND INFO flushall", Protocol::Resp2).contains("+@dangerous"));
        assert_eq!(wire("COMMAND", Protocol::Resp2).matches("$8 flushall ").count(), 1);
        assert_eq!(wire("COMMAND LIST FILTERBY PATTERN LPUSH*", Protocol::Resp2), "*2 $5 lpush $6 lpushx ");
    }

    #[test]
    fn a_document_is_a_map_or_a_flat_list_and_says_the_arguments() {
        let docs = |protocol| wire("COMMAND DOCS GOFLOW.RELEASE", protocol);
        let arguments = |map: &str, set: &str, all: [u8; 3]| {
            format!(
                "$9 arguments *3 {map}{} $4 name $5 queue $4 type $3 key $14 key_spec_index :0 {map}{} $4 name $7 receipt \
                 $4 type $6 string {map}{} $4 name $2 ms $4 type $7 integer $5 token $5 DELAY $5 flags {set}1 +optional ",
                all[0], all[1], all[2]
            )
        };
        assert!(docs(Protocol::Resp3).starts_with("%1 $14 goflow.release %4 $7 summary $"));
        assert!(docs(Protocol::Resp3).ends_with(&arguments("%", "~", [3, 2, 4])), "{}", docs(Protocol::Resp3));
        assert!(docs(Protocol::Resp2).starts_with("*2 $14 goflow.release *8 $7 summary $"));
        assert!(docs(Protocol::Resp2).ends_with(&arguments("*", "*", [6, 4, 8])));
        let enqueue = wire("COMMAND DOCS goflow.enqueue", Protocol::Resp3);
        assert!(enqueue.contains("$4 type $5 oneof $5 flags ~1 +optional $9 arguments *2 "), "{enqueue}");
        assert!(enqueue.contains("$5 token $4 META $5 flags ~3 +optional +multiple +multiple_token $9 arguments *2 "));
        assert!(wire("COMMAND DOCS client", Protocol::Resp3).contains("$11 subcommands %"));
        assert_eq!(wire("COMMAND DOCS nosuch", Protocol::Resp3), "%0 ");
    }

    #[test]
    fn keys_are_the_queues_of_a_request_or_its_keys() {
        assert_eq!(wire("COMMAND GETKEYS MSET a 1", Protocol::Resp2), "*1 $1 a ");
        assert_eq!(wire("COMMAND GETKEYS zunionstore d 2 a b", Protocol::Resp2), "*3 $1 d $1 a $1 b ");
        assert_eq!(wire("COMMAND GETKEYS eval x 0", Protocol::Resp2), "*0 ");
        assert_eq!(wire("COMMAND GETKEYS goflow.dequeue a b BLOCK 5", Protocol::Resp2), "*2 $1 a $1 b ");
        assert_eq!(wire("COMMAND GETKEYS goflow.dlq retry a 5", Protocol::Resp2), "*1 $1 a ");
        for (line, error) in [
            ("COMMAND GETKEYS ping a", "The command has no key arguments"),
            ("COMMAND GETKEYS exec x", "The command has no key arguments"),
            ("COMMAND GETKEYS set a", "Invalid number of arguments specified for command"),
            ("COMMAND GETKEYS foo a", "Invalid command specified"),
            ("COMMAND GETKEYS goflow.enqueue a", "Invalid number of arguments specified for command"),
            ("COMMAND GETKEYS get", "wrong number of arguments for 'command|getkeys' command"),
            ("COMMAND LIST FILTERBY FOO a", "syntax error"),
            ("ACL CAT foo", "Unknown category 'foo'"),
        ] {
            assert_eq!(refused(line), format!("ERR {error}"), "{line}");
        }
    }

    #[test]
    fn names_are_listed_whole_by_category_and_by_pattern() {
        assert_eq!(wire("COMMAND LIST FILTERBY PATTERN GOFLOW.QUEUE?", Protocol::Resp2), "*1 $13 goflow.queues ");
        let blocking = "*4 $14 goflow.dequeue $19 goflow.lock|acquire $18 goflow.sem|acquire $18 goflow.events|read ";
        assert_eq!(wire("COMMAND LIST FILTERBY ACLCAT blocking", Protocol::Resp2), blocking);
        assert_eq!(wire("COMMAND LIST FILTERBY MODULE x", Protocol::Resp2), "*0 ");
        assert!(wire("ACL CAT", Protocol::Resp2).contains("$6 goflow "));
        let Plan::Now(Reply::Array(all)) = planned("COMMAND LIST") else { panic!() };
        assert_eq!(all.len(), rows().len() + ordinary_commands().count());
        let Plan::Now(Reply::Array(entries)) = planned("COMMAND") else { panic!() };
        assert_eq!(wire("COMMAND COUNT", Protocol::Resp2), format!(":{} ", entries.len()));
    }
}
