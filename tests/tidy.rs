//! What the tree promises about itself: floors, headers, no shortcuts left behind.
//!
//! Reads the sources as text. A file imports only from floors below its own; between the nouns at the bottom and the wiring
//! at the top the modules of one floor do not know each other. A new top-level module gets its floor in [`FLOORS`] and in
//! ARCHITECTURE.md.

use std::path::{Path, PathBuf};

/// The top-level modules by floor, from the bottom.
const FLOORS: [&[&str]; 8] = [
    &["error", "clock", "job", "metrics", "resp"],
    &["shard"],
    &["command", "dispatch"],
    &["forward"],
    &["execute", "alert", "clients"],
    &["process"],
    &["session", "http"],
    &["server", "config", "main", "cli"],
];

struct Source {
    /// From the root of the repository.
    path: String,
    text: String,
}

impl Source {
    /// The text without the tests at its end and without comments, line by line with the number of the line.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let end = self.text.find("\n#[cfg(test)]\nmod ").unwrap_or(self.text.len());
        let strip = |line| match line {
            line if str::trim_start(line).starts_with("//") => "",
            line => line.split(" // ").next().unwrap_or(line),
        };
        self.text[..end].lines().map(strip).enumerate().map(|(number, line)| (number + 1, line))
    }

    /// The top-level module that the file belongs to; `None` for the crate's root.
    fn module(&self) -> Option<&str> {
        let inside = self.path.strip_prefix("src/")?;
        let module = inside.split(['/', '.']).next()?;
        (module != "lib").then_some(module)
    }
}

fn sources(dirs: &[&str], endings: &[&str]) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut open: Vec<PathBuf> = dirs.iter().map(|dir| root.join(dir)).filter(|dir| dir.exists()).collect();
    let mut sources = Vec::new();
    while let Some(path) = open.pop() {
        if path.is_dir() {
            let is_ours = |path: &PathBuf| !path.ends_with("node_modules");
            open.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()).filter(is_ours));
        } else if endings.iter().any(|ending| path.to_string_lossy().ends_with(ending)) {
            let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
            sources.push(Source { path: path.strip_prefix(root).unwrap().to_string_lossy().into_owned(), text });
        }
    }
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    sources
}

fn floor(module: &str) -> Option<usize> {
    FLOORS.iter().position(|modules| modules.contains(&module))
}

/// The modules that a line names after `crate::` (or `goflow::`, from the binary), also in braces.
fn named_modules<'a>(line: &'a str, root: &str) -> Vec<&'a str> {
    let word = |text: &'a str| text.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
    let mut found = Vec::new();
    for (at, _) in line.match_indices(root) {
        let rest = &line[at + root.len()..];
        match rest.strip_prefix('{') {
            None => found.push(word(rest)),
            Some(list) => {
                let mut depth = 0;
                for part in list.split(',') {
                    if depth == 0 {
                        found.push(word(part.trim_start()));
                    }
                    depth += part.matches('{').count() as i32 - part.matches('}').count() as i32;
                }
            }
        }
    }
    found.into_iter().filter(|word| word.starts_with(|c: char| c.is_ascii_lowercase())).collect()
}

fn assert_none(complaints: Vec<String>, rule: &str) {
    assert!(complaints.is_empty(), "{rule}:\n{}", complaints.join("\n"));
}

#[test]
fn no_file_imports_from_its_own_floor_or_from_above() {
    let mut complaints = Vec::new();
    for source in sources(&["src"], &[".rs"]) {
        let Some(own) = source.module() else { continue };
        let Some(own_floor) = floor(own) else {
            complaints.push(format!("{} has no floor", source.path));
            continue;
        };
        for (number, line) in source.code() {
            for named in named_modules(line, "crate::") {
                let is_below = match floor(named) {
                    // The floor of nouns is one room, and so is the one that wires everything.
                    Some(named_floor) => {
                        named_floor < own_floor
                            || (named_floor == own_floor && [0, FLOORS.len() - 1].contains(&own_floor))
                    }
                    None => false,
                };
                if named != own && !is_below {
                    complaints.push(format!("{}:{number} names {named}", source.path));
                }
            }
        }
    }
    assert_none(complaints, "a file imports only from floors below it");
}

#[test]
fn every_file_opens_by_saying_what_it_is() {
    let is_silent =
        |source: &Source| !source.text.starts_with("//! ") || source.text.lines().next().unwrap().len() < 20;
    let silent = sources(&["src", "tests", "benches"], &[".rs"]).into_iter().filter(is_silent);
    assert_none(silent.map(|source| source.path).collect(), "a file opens with a //! header");
    let is_silent = |source: &Source| !source.text.starts_with("-- ");
    let silent = sources(&["src"], &[".lua"]).into_iter().filter(is_silent);
    assert_none(silent.map(|source| source.path).collect(), "a script opens with what it is");
}

#[test]
fn nothing_in_src_panics_for_convenience() {
    let shortcuts = [".unwrap()", ".expect(", "todo!(", "unimplemented!(", "dbg!("];
    let mut complaints = Vec::new();
    for source in sources(&["src"], &[".rs"]) {
        for (number, line) in source.code().filter(|(_, line)| shortcuts.iter().any(|shortcut| line.contains(shortcut)))
        {
            complaints.push(format!("{}:{number} {}", source.path, line.trim()));
        }
    }
    assert_none(complaints, "unwrap and expect belong to tests");
}

#[test]
fn nothing_is_left_for_later() {
    let words = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X"), concat!("HA", "CK:")];
    let endings = [".rs", ".lua", ".toml", ".md", ".py", ".js", ".mjs", ".c", ".sh", "Makefile", "/run", "/setup"];
    let mut complaints = Vec::new();
    let places = [
        "src",
        "tests",
        "benches",
        "deploy",
        ".ci",
        "Makefile",
        "Cargo.toml",
        "README.md",
        "ARCHITECTURE.md",
        "protocol.md",
    ];
    for source in sources(&places, &endings) {
        for (number, line) in source.text.lines().enumerate() {
            if let Some(word) = words.iter().find(|word| line.contains(**word)) {
                complaints.push(format!("{}:{} {word}", source.path, number + 1));
            }
        }
    }
    assert_none(complaints, "what is left to do is an issue, not a comment");
}

#[test]
fn every_silenced_lint_has_a_reason() {
    let mut complaints = Vec::new();
    for source in sources(&["src", "tests", "benches"], &[".rs"]) {
        for (number, line) in source.text.lines().enumerate() {
            let text = line.trim_start();
            let is_allow =
                ["#[allow(", "#![allow(", "#[expect(", "#![expect("].iter().any(|mark| text.starts_with(mark));
            if is_allow && !line.contains("reason = ") && line.ends_with(']') {
                complaints.push(format!("{}:{}", source.path, number + 1));
            }
        }
    }
    assert_none(complaints, "a silenced lint says why");
}

#[test]
fn an_import_is_found_however_it_is_written() {
    assert_eq!(named_modules("use crate::error::{Error, Result};", "crate::"), ["error"]);
    assert_eq!(named_modules("use crate::{error::{A, b}, shard, job::Name};", "crate::"), ["error", "shard", "job"]);
    assert_eq!(
        named_modules("let x = crate::clock::now() + crate::dispatch::lag();", "crate::"),
        ["clock", "dispatch"]
    );
}
