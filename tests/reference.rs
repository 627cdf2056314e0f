//! `protocol.md` says what the command table says, and what its examples show is what a real process answers.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use goflow::command::{Row, reference, rows};

use crate::support::goflow::Goflow;
use crate::support::wire::{Value, Wire};

const END: &str = "<!-- end -->";

/// Replaces what stands between a marker and the next end.
fn replace_section(text: &str, name: &str, section: &str) -> String {
    let marker = format!("<!-- generated: {name} -->\n");
    let (before, rest) = text.split_once(&marker).unwrap_or_else(|| panic!("protocol.md has no marker {marker}"));
    let (_, after) = rest.split_once(END).expect("an end of the section");
    format!("{before}{marker}\n{section}\n{END}{after}")
}

#[test]
fn protocol_md_holds_the_reference_of_the_command_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("protocol.md");
    let old = std::fs::read_to_string(&path).unwrap();
    let new = replace_section(&old, "commands", &reference::commands());
    let new = replace_section(&new, "errors", &reference::errors());
    let new = replace_section(&new, "embedded", &goflow::shard::keys::reference());
    if new != old {
        std::fs::write(&path, new).unwrap();
        panic!("protocol.md was rewritten; read what changed as a user would, and commit it");
    }
}

/// A reply as `redis-cli -3` prints it.
fn shown(value: &Value) -> Vec<String> {
    let numbered = |mark: &str, items: Vec<Vec<String>>| {
        let width = items.len().to_string().len();
        let mut lines = Vec::new();
        for (at, item) in items.into_iter().enumerate() {
            let head = format!("{:>width$}{mark} ", at + 1);
            let indent = " ".repeat(head.len());
            for (row, line) in item.into_iter().enumerate() {
                lines.push(if row == 0 { format!("{head}{line}") } else { format!("{indent}{line}") });
            }
        }
        lines
    };
    match value {
        Value::Simple(text) => vec![text.clone()],
        Value::Error(text) => vec![format!("(error) {text}")],
        Value::Integer(number) => vec![format!("(integer) {number}")],
        Value::Bulk(bytes) => {
            let text: String =
                bytes.iter().flat_map(|byte| std::ascii::escape_default(*byte)).map(char::from).collect();
            // What escape_default writes beyond redis-cli.
            vec![format!("\"{}\"", text.replace("\\'", "'"))]
        }
        Value::Null => vec!["(nil)".into()],
        Value::Double(number) => vec![format!("(double) {number}")],
        Value::Boolean(yes) => vec![format!("({yes})")],
        Value::Array(items) | Value::Push(items) if items.is_empty() => vec!["(empty array)".into()],
        Value::Map(pairs) if pairs.is_empty() => vec!["(empty hash)".into()],
        Value::Array(items) | Value::Push(items) => numbered(")", items.iter().map(shown).collect()),
        Value::Map(pairs) => {
            let joined = pairs.iter().map(|(field, value)| {
                let mut lines = shown(value);
                lines[0].insert_str(0, &format!("{} => ", shown(field).join("")));
                lines
            });
            numbered("#", joined.collect())
        }
    }
}

/// The words of a line as `redis-cli` reads them: blanks part them, and quotes of either kind join.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for next in line.chars() {
        match (next, quote) {
            (' ', None) => words.extend(word.take()),
            ('"' | '\'', None) => {
                quote = Some(next);
                word.get_or_insert_default();
            }
            (next, Some(open)) if next == open => quote = None,
            (next, _) => word.get_or_insert_default().push(next),
        }
    }
    words.extend(word);
    words
}

/// Whether a line is as the pattern has it; remembers what its `<word>`s stand for.
fn line_matches(pattern: &str, line: &str, known: &mut HashMap<String, String>) -> bool {
    let Some(open) = pattern.find('<') else {
        return match pattern.strip_suffix("...") {
            Some(start) => line.starts_with(start),
            None => pattern == line,
        };
    };
    let (Some(length), Some(rest)) = (pattern[open..].find('>'), line.strip_prefix(&pattern[..open])) else {
        return false;
    };
    let (name, after) = pattern[open..].split_at(length + 1);
    let stop = after.chars().next().map_or(rest.len(), |stop| rest.find(stop).unwrap_or(rest.len()));
    let (text, rest) = rest.split_at(stop);
    let same = known.entry(name.into()).or_insert_with(|| text.into()) == text;
    !text.is_empty() && same && line_matches(after, rest, known)
}

fn matches(patterns: &[&str], lines: &[String], known: &mut HashMap<String, String>) -> bool {
    match (patterns, lines) {
        ([], []) => true,
        (["..."], _) => true,
        ([pattern, patterns @ ..], [line, lines @ ..]) => {
            line_matches(pattern, line, known) && matches(patterns, lines, known)
        }
        _ => false,
    }
}

/// Sends the lines of one example and compares what comes back.
fn run_example(row: &Row, wire: &mut Wire) -> Result<(), String> {
    let mut known = HashMap::new();
    let mut lines = row.examples.lines().peekable();
    while let Some(line) = lines.next() {
        let sent = line.strip_prefix("> ").ok_or_else(|| format!("{}: {line}", row.name))?;
        let put_in =
            |word: String| known.iter().fold(word, |word, (name, text): (&String, &String)| word.replace(name, text));
        let sent: Vec<String> = words(sent).into_iter().map(put_in).collect();
        let mut patterns = Vec::new();
        while let Some(pattern) = lines.next_if(|line| !line.starts_with("> ")) {
            patterns.push(pattern);
        }
        let reply = shown(&wire.call(&sent));
        if !matches(&patterns, &reply, &mut known) {
            return Err(format!("{line}\nshould answer\n{}\nbut answered\n{}", patterns.join("\n"), reply.join("\n")));
        }
    }
    Ok(())
}

/// Every example begins with its queue empty and running.
#[test]
fn every_example_is_answered_as_it_says() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let mut failures = Vec::new();
    for row in rows().iter().filter(|row| !row.examples.is_empty()) {
        let mut wire = goflow.wire();
        wire.call(&["HELLO", "3"]);
        for state in ["ready", "scheduled", "leased", "dead", "completed", "cancelled", "expired"] {
            wire.call(&["GOFLOW.PURGE", "main", "STATE", state]);
        }
        wire.call(&["GOFLOW.RESUME", "main"]);
        failures.extend(run_example(row, &mut wire).err());
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

/// What `redis-cli` shows while typing is made of the same parts as its help, which needs no terminal.
#[test]
fn redis_cli_knows_the_arguments_of_our_commands() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let (_, port) = goflow.address().rsplit_once(':').unwrap();
    for protocol in ["-2", "-3"] {
        let mut command = Command::new("redis-cli");
        command.args([protocol, "-p", port]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"help GOFLOW.RELEASE\nhelp goflow.dlq retry\n").unwrap();
        let help = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        assert!(help.contains("queue receipt [DELAY ms]"), "{help}");
        assert!(help.contains("queue id [id ...]") && help.contains("Puts dead jobs back"), "{help}");
    }
}

#[test]
fn the_matcher_tells_what_fits_from_what_does_not() {
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let fits =
        |pattern: &str, text: &str| matches(&pattern.lines().collect::<Vec<_>>(), &lines(text), &mut HashMap::new());
    assert!(fits("\"<id>\"", "\"2s~s1\"") && fits("(integer) <n>", "(integer) 7") && fits("a\n...", "a\nb\nc"));
    assert!(fits("1) \"<a>\"\n2) \"<a>\"", "1) \"x\"\n2) \"x\"") && fits("\"id=...", "\"id=7 name=\""));
    assert!(!fits("\"<id>\"", "\"\"") && !fits("1) \"<a>\"\n2) \"<a>\"", "1) \"x\"\n2) \"y\"") && !fits("a", "a\nb"));
    assert!(!fits("a\nb", "a") && !fits("(integer) 1", "(integer) 12"));
    assert_eq!(words(r#"A "b c" '{"d": 1}' """#), ["A", "b c", r#"{"d": 1}"#, ""]);
}
