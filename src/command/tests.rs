//! What holds for every row, and Redis's own words for what no row fits.

use std::collections::HashSet;

use super::args::{ARGS_MAX, Arg, Kind, syntax};
use super::*;

/// A request from one line; quotes are not needed here.
pub fn request(line: &str) -> Vec<Bytes> {
    line.split(' ').map(|word| Bytes::copy_from_slice(word.as_bytes())).collect()
}

pub fn context() -> Context {
    Context { protocol: Protocol::Resp3, client_id: 7, limits: Arc::default() }
}

pub fn planned(line: &str) -> Plan {
    plan(&request(line), &context()).unwrap_or_else(|error| panic!("{line}: {error}"))
}

pub fn refused(line: &str) -> String {
    refused_words(&request(line))
}

fn refused_words(words: &[Bytes]) -> String {
    match plan(words, &context()) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("{words:?} was accepted"),
    }
}

/// A word that an argument takes.
fn plausible(arg: &Arg) -> String {
    match arg.kind {
        Kind::Flag => String::new(),
        Kind::Queue => "main".into(),
        Kind::Text => match arg.name {
            "mode" => "on".into(),
            "how" => "error".into(),
            "type" => "normal".into(),
            "kind" => "pattern".into(),
            "attribute" => "lib-name".into(),
            "category" => "fast".into(),
            "command" => "goflow.len".into(),
            "cursor" => "0".into(),
            _ => "text".into(),
        },
        Kind::Pattern => "*".into(),
        Kind::Integer(from, to) => 0.clamp(from, to).to_string(),
        Kind::Millis(from, to) => 1000.clamp(from, to).to_string(),
        Kind::Time => "1790000000000".into(),
        Kind::Count => "1".into(),
        Kind::Receipt => "2s.1k~s1".into(),
        Kind::Id => "2s~s1".into(),
        Kind::State => "dead".into(),
        Kind::Shard => "s1".into(),
        Kind::Group(args) => args.iter().map(plausible).collect::<Vec<_>>().join(" "),
    }
}

fn with_token(arg: &Arg) -> String {
    let words = [arg.token.unwrap_or_default().to_owned(), plausible(arg)];
    words.iter().filter(|word| !word.is_empty()).map(String::as_str).collect::<Vec<_>>().join(" ")
}

/// The shortest request that the row takes.
fn shortest(row: &Row) -> String {
    let required = row.args.iter().filter(|arg| !arg.optional).map(plausible);
    std::iter::once(row.name.replace('|', " ")).chain(required).collect::<Vec<_>>().join(" ")
}

/// Rows whose plan is always an error, and containers, whose arguments are their subcommands.
fn is_runnable(row: &Row) -> bool {
    row.subcommands.is_empty()
        && !row.errors.contains(&Code::NoPerm)
        && !matches!(row.name, "CLUSTER" | "ASKING" | "CLIENT|KILL")
}

fn is_sentence(text: &str) -> bool {
    let starts = text.chars().next().is_some_and(|first| first.is_uppercase() || !first.is_alphabetic());
    starts && text.ends_with('.') && !text.contains("  ")
}

#[test]
fn every_row_is_found_by_its_name_in_any_case_and_nothing_else_is() {
    let mut seen = HashSet::new();
    for (index, row) in rows().iter().enumerate() {
        assert!(seen.insert(row.name), "{} stands twice", row.name);
        assert_eq!(row.index, index);
        assert_eq!(row.name, row.name.to_ascii_uppercase());
        for name in [row.name.to_owned(), row.name.to_ascii_lowercase()] {
            assert_eq!(lookup(name.as_bytes()).map(|found| found.index), Some(index), "{name}");
        }
        assert!(lookup(format!("{}x", row.name).as_bytes()).is_none());
        assert!(lookup(&row.name.as_bytes()[1..]).is_none());
    }
    assert!(lookup(b"").is_none() && lookup(&[b'x'; 10_000]).is_none());
}

#[test]
fn every_row_is_described_in_sentences() {
    for row in rows() {
        assert!(is_sentence(row.summary), "{}: {}", row.name, row.summary);
        assert!(is_sentence(row.reply) || row.reply.starts_with('`'), "{}: {}", row.name, row.reply);
        assert!(row.reply.ends_with('.'), "{}: {}", row.name, row.reply);
        assert!(row.notes.is_empty() || is_sentence(row.notes) || row.notes.starts_with('`'), "{}", row.name);
        assert!(!row.since.is_empty());
        assert!(!row.errors.contains(&Code::Err), "{}: ERR goes without saying", row.name);
    }
}

#[test]
fn every_subcommand_has_a_container_and_the_names_of_arguments_are_unique() {
    for row in rows() {
        if let Some((container, _)) = row.name.split_once('|') {
            let container = lookup(container.as_bytes());
            assert!(container.is_some_and(|container| container.subcommands.contains(&row.index)), "{}", row.name);
        }
        let keys: HashSet<_> = row.args.iter().map(Arg::key).collect();
        assert_eq!(keys.len(), row.args.len(), "{}", row.name);
        assert!(row.args.len() <= ARGS_MAX, "{}", row.name);
        let first_option = row.args.iter().position(|arg| arg.token.is_some()).unwrap_or(row.args.len());
        assert!(row.args[first_option..].iter().all(|arg| arg.token.is_some()), "{}", row.name);
    }
}

#[test]
fn every_row_takes_its_own_syntax_and_each_of_its_options() {
    for row in rows().iter().filter(|row| is_runnable(row)) {
        let shortest = shortest(row);
        planned(&shortest);
        for arg in row.args.iter().filter(|arg| arg.optional) {
            let line = format!("{shortest} {}", with_token(arg));
            match (row.name, arg.key()) {
                // These go with another option only.
                ("GOFLOW.ENQUEUE", "NX") => drop(planned(&format!("{line} ID a"))),
                ("GOFLOW.ENQUEUE" | "GOFLOW.ENQUEUEMANY", "CONCURRENCY") => drop(planned(&format!("{line} GROUP a"))),
                ("GOFLOW.LIMIT", "PER") => drop(planned(&format!("{line} RATE 5"))),
                ("GOFLOW.DEQUEUE", "MAXRUN") => drop(planned(&format!("{line} BIND"))),
                ("HELLO", token @ ("AUTH" | "SETNAME")) => drop(planned(&line.replace(token, &format!("3 {token}")))),
                _ => drop(planned(&line)),
            }
        }
    }
}

#[test]
fn every_row_refuses_a_word_too_few_or_too_many_and_an_unknown_option() {
    for row in rows().iter().filter(|row| is_runnable(row)) {
        let shortest = request(&shortest(row));
        let wrong = format!("ERR wrong number of arguments for '{}' command", row.lower);
        if shortest.len() > row.name_words {
            assert_eq!(refused_words(&shortest[..shortest.len() - 1]), wrong);
        }
        if let Some(most) = row.words_max {
            let mut words = shortest.clone();
            words.resize(most + 1, Bytes::from_static(b"1"));
            assert_eq!(refused_words(&words), wrong);
        }
        let open = row.args.iter().any(|arg| arg.token.is_none() && (arg.many || arg.optional));
        if !open && row.words_max.is_none() {
            let line = format!("{} nonsense", self::shortest(row));
            assert_eq!(refused(&line), "ERR syntax error", "{line}");
        }
    }
}

#[test]
fn every_option_is_refused_when_it_is_repeated_unless_it_may_be() {
    for row in rows().iter().filter(|row| is_runnable(row)) {
        for arg in row.args.iter().filter(|arg| arg.token.is_some() && !arg.many) {
            let line = format!("{0} {1} {1}", shortest(row), with_token(arg));
            assert_eq!(refused(&line), "ERR syntax error", "{line}");
        }
    }
}

#[test]
fn a_command_is_for_all_or_has_an_example() {
    for row in rows().iter().filter(|row| row.subcommands.is_empty() && !row.errors.contains(&Code::NoPerm)) {
        assert!(row.examples.starts_with("> "), "{} has no example", row.name);
        let own = row.name.replace('|', " ");
        let mut sent = row.examples.lines().filter_map(|line| line.strip_prefix("> "));
        assert!(sent.any(|line| line.starts_with(&own)), "{} does not stand in its example", row.name);
    }
}

#[test]
fn what_is_not_known_is_refused_in_the_words_of_redis() {
    let x = |count: usize| "x".repeat(count);
    for (line, error) in [
        ("foo".into(), "unknown command 'foo', with args beginning with: ".into()),
        ("foo a b".into(), "unknown command 'foo', with args beginning with: 'a' 'b' ".into()),
        (format!("foo {} b", x(150)), format!("unknown command 'foo', with args beginning with: '{}' ", x(128))),
        (
            format!("{} {} {} c", "y".repeat(150), x(100), "b".repeat(32)),
            format!(
                "unknown command '{}', with args beginning with: '{}' '{}' ",
                "y".repeat(128),
                x(100),
                "b".repeat(25)
            ),
        ),
        (format!("foo  {} z", x(123)), format!("unknown command 'foo', with args beginning with: '' '{}' ", x(123))),
        ("client setnam x".into(), "unknown subcommand 'setnam'. Try CLIENT HELP.".into()),
        ("GOFLOW.DLQ nope q".into(), "unknown subcommand 'nope'. Try GOFLOW.DLQ HELP.".into()),
        ("client|id".into(), "unknown command 'client|id', with args beginning with: ".into()),
        ("client".into(), "wrong number of arguments for 'client' command".into()),
        ("client setname".into(), "wrong number of arguments for 'client|setname' command".into()),
        ("goflow.enqueue q".into(), "wrong number of arguments for 'goflow.enqueue' command".into()),
        ("PING a b".into(), "wrong number of arguments for 'ping' command".into()),
        ("GOFLOW.ENQUEUE q p ID".into(), "syntax error".into()),
        ("SELECT abc".into(), "value is not an integer or out of range".into()),
    ] {
        assert_eq!(refused(&line), format!("ERR {error}"), "{line}");
    }
}

#[test]
fn a_command_that_is_not_text_is_refused_without_harm() {
    let words = [Bytes::from_static(b"\xff\0\r\n"), Bytes::from_static(b"a\0b")];
    assert_eq!(refused_words(&words), "ERR unknown command '\u{fffd}', with args beginning with: 'a' ");
}

#[test]
fn the_syntax_is_written_as_the_contract_has_it() {
    let syntax_of = |name: &str| lookup(name.as_bytes()).map_or_else(String::new, |row| syntax(row.args));
    assert_eq!(
        syntax_of("GOFLOW.ENQUEUE"),
        "queue payload [ID id] [TYPE name] [PRIORITY n] [DELAY ms | AT unix-ms] [ATTEMPTS n] [BACKOFF ms] \
         [BACKOFFMAX ms] [TTL ms] [UNIQUE key ms] [GROUP key] [CONCURRENCY n] [META field value]... [SHARD name] [NX]"
    );
    assert_eq!(
        syntax_of("GOFLOW.DEQUEUE"),
        "queue [queue ...] [COUNT n] [BLOCK ms] [LEASE ms] [WORKER name] [SHARDS n name [name ...]] [BIND] \
         [MAXRUN ms]"
    );
    assert_eq!(syntax_of("GOFLOW.ACK"), "queue receipt [receipt ...] [RESULT data]");
}

#[test]
fn help_lists_the_subcommands() {
    let Plan::Now(Reply::Array(lines)) = planned("goflow.dlq help") else { panic!("not answered at once") };
    assert!(lines.contains(&Reply::bulk("RETRY queue id [id ...]")), "{lines:?}");
    assert!(matches!(planned("COMMAND HELP"), Plan::Now(Reply::Array(lines)) if lines.len() > 3));
}
