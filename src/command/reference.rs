//! Writes the parts of `protocol.md` that come from tables: the commands and the error codes.
//!
//! `tests/reference.rs` puts them between the markers of that file, and runs every example against a real process.

use std::fmt::Write as _;

use super::args::syntax;
use super::{Flag, Group, Row, rows};
use crate::error::Code;

/// The sections of the commands, one for each group.
pub fn commands() -> String {
    let mut text = String::new();
    for group in Group::ALL {
        let _ = writeln!(text, "### {}\n\n{}\n", heading(group), introduction(group));
        for row in rows().iter().filter(|row| row.group == group && is_shown(row)) {
            put_command(&mut text, row);
        }
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

/// Containers are shown by their subcommands.
fn is_shown(row: &Row) -> bool {
    row.subcommands.is_empty() || row.name == "COMMAND"
}

fn heading(group: Group) -> String {
    let word = group.word();
    let (first, rest) = word.split_at(1);
    first.to_uppercase() + rest
}

fn introduction(group: Group) -> &'static str {
    match group {
        Group::Jobs => "Putting jobs in, taking them, saying how they went, and looking at them.",
        Group::DeadLetters => "Jobs whose attempts are used up, or that a worker declared dead.",
        Group::Locks => "Locks with fences, and semaphores, as a service of the shards.",
        Group::Events => "What happened to jobs, recorded with each transition.",
        Group::Operations => "Queues, statistics and shards.",
        Group::Connection => "What a client says about its connection. These are Redis's own commands.",
        Group::Server => "Redis's own commands about the server, as far as they mean something here.",
    }
}

fn put_command(text: &mut String, row: &Row) {
    let name = row.name.replace('|', " ");
    let _ = writeln!(text, "#### {name}\n");
    let _ = writeln!(text, "```\n{}\n```\n", format!("{name} {}", syntax(row.args)).trim_end());
    let paragraphs = [row.summary.to_owned(), row.notes.to_owned(), format!("Reply: {}", row.reply), facts(row)];
    for paragraph in paragraphs.iter().filter(|paragraph| !paragraph.is_empty()) {
        put_wrapped(text, paragraph);
    }
    if !row.examples.is_empty() {
        let _ = writeln!(text, "```\n{}\n```\n", row.examples);
    }
}

/// A paragraph in lines of at most 120 columns.
fn put_wrapped(text: &mut String, paragraph: &str) {
    let mut column = 0;
    for word in paragraph.split(' ') {
        if column > 0 && column + 1 + word.len() > 120 {
            text.push('\n');
            column = 0;
        } else if column > 0 {
            text.push(' ');
            column += 1;
        }
        text.push_str(word);
        column += word.len();
    }
    text.push_str("\n\n");
}

fn facts(row: &Row) -> String {
    let mut facts = Vec::new();
    if !row.errors.is_empty() {
        let words: Vec<String> = row.errors.iter().map(|code| format!("`{}`", code.word())).collect();
        facts.push(format!("Errors: {}.", words.join(", ")));
    }
    if row.has(Flag::Admin) {
        facts.push("For operators.".into());
    }
    if row.has(Flag::NoAuth) {
        facts.push("Allowed before the connection has authenticated.".into());
    }
    facts.join(" ")
}

/// The table of the error codes.
pub fn errors() -> String {
    let mut text = String::from("| code | meaning | what to do |\n| --- | --- | --- |\n");
    for (_, word, meaning, advice) in Code::ALL {
        let _ = writeln!(text, "| `{word}` | {meaning} | {advice} |");
    }
    text
}
