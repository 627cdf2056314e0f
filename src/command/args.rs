//! The arguments of a command: how a row declares them, and their one parser.
//!
//! A row lists its positional arguments first and its options (those with a token) after; a request gives them in that
//! order, the options in any. [`Args::parse`] finds where the value of each argument stands, without allocating, and
//! refuses what does not fit: Redis's arity error for too few words, its syntax error for an unknown, repeated or
//! excluded option. The typed getters check values against the kind in the row when a plan function asks for them.
//! [`syntax`] and `COMMAND DOCS` are written from the same declarations.

use bytes::Bytes;

use super::Row;
use crate::clock::{Millis, TIME_MAX};
use crate::error::{Error, Result};
use crate::job::{JobState, Name, is_shard_name};

/// Most arguments of one row; a test holds the rows to it.
pub const ARGS_MAX: usize = 24;

/// What an argument holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// An option that is its token and nothing else.
    Flag,
    /// The name of a queue, by which the request is routed.
    Queue,
    /// Any bytes.
    Text,
    Pattern,
    /// A number from the first to the second.
    Integer(i64, i64),
    /// A span in milliseconds, from the first to the second.
    Millis(Millis, Millis),
    /// A point in time, in Unix milliseconds.
    Time,
    /// How many of the next argument there are.
    Count,
    Receipt,
    Id,
    State,
    Shard,
    /// Several values in a row.
    Group(&'static [Arg]),
}

/// Any span that is accepted.
pub const MS: Kind = Kind::Millis(0, TIME_MAX);
/// Any span but none.
pub const MS_FROM_1: Kind = Kind::Millis(1, TIME_MAX);

/// One argument of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arg {
    /// As the reference shows the value, in lower case.
    pub name: &'static str,
    pub kind: Kind,
    /// The word that introduces an option.
    pub token: Option<&'static str>,
    pub optional: bool,
    /// May stand several times: a positional one in a row, an option with its token before each.
    pub many: bool,
    /// Excludes the argument before it.
    pub or: bool,
}

impl Arg {
    pub const fn new(name: &'static str, kind: Kind) -> Arg {
        Arg { name, kind, token: None, optional: false, many: false, or: false }
    }

    /// `TOKEN value`, which may be left out.
    pub const fn option(token: &'static str, name: &'static str, kind: Kind) -> Arg {
        Arg { token: Some(token), optional: true, ..Arg::new(name, kind) }
    }

    /// `TOKEN`, which may be left out.
    pub const fn flag(token: &'static str, name: &'static str) -> Arg {
        Arg::option(token, name, Kind::Flag)
    }

    pub const fn optional(self) -> Arg {
        Arg { optional: true, ..self }
    }

    pub const fn many(self) -> Arg {
        Arg { many: true, ..self }
    }

    pub const fn or(self) -> Arg {
        Arg { or: true, ..self }
    }

    /// Fewest words that it takes when it stands once.
    pub fn width_min(&self) -> usize {
        let values = match self.kind {
            Kind::Flag => 0,
            Kind::Group(args) => args.iter().map(Arg::width_min).sum(),
            _ => 1,
        };
        values + usize::from(self.token.is_some())
    }

    /// How many of these words are its values; an error when they are too few.
    fn width(&self, words: &[Bytes]) -> Result<usize> {
        let Kind::Group(args) = self.kind else { return fits(self.kind != Kind::Flag, words).map(usize::from) };
        let mut at = 0;
        for (place, arg) in args.iter().enumerate() {
            at += match counted(args, place) {
                true => count_before(words, at)?,
                false => arg.width(words.get(at..).unwrap_or_default())?,
            };
        }
        Ok(at)
    }

    /// As plan functions and errors name it.
    pub fn key(&self) -> &'static str {
        self.token.unwrap_or(self.name)
    }
}

fn fits(needed: bool, words: &[Bytes]) -> Result<bool> {
    if needed && words.is_empty() { Err(syntax_error()) } else { Ok(needed) }
}

/// Fewest words of these arguments together.
pub fn needed(args: &[Arg]) -> usize {
    args.iter().filter(|arg| !arg.optional).map(Arg::width_min).sum()
}

/// Whether the argument before says how many there are of this one.
fn counted(args: &[Arg], place: usize) -> bool {
    place > 0 && args[place - 1].kind == Kind::Count
}

/// The count that stands before `at`, when so many words follow.
fn count_before(words: &[Bytes], at: usize) -> Result<usize> {
    let word = at.checked_sub(1).and_then(|before| words.get(before)).map_or(&b""[..], |word| word);
    let left = words.len().saturating_sub(at);
    match parse_i64(word).and_then(|count| usize::try_from(count).ok()) {
        None | Some(0) => Err(Error::bad("value is not an integer or out of range: count expects at least 1")),
        Some(count) if count > left => {
            Err(Error::bad(format!("syntax error: the count says {count}, but only {left} values follow")))
        }
        Some(count) => Ok(count),
    }
}

pub fn syntax_error() -> Error {
    Error::bad("syntax error")
}

/// Where the values of one argument stand. No words and not given is `start` 0.
#[derive(Clone, Copy, Default)]
struct Slot {
    start: u32,
    words: u32,
}

/// The arguments of one request. Getters name an option by its token and a positional argument by its name.
pub struct Args<'a> {
    row: &'static Row,
    request: &'a [Bytes],
    slots: [Slot; ARGS_MAX],
    /// Later occurrences of options that may be repeated: which argument, and where.
    repeats: Vec<(usize, Slot)>,
    has_options: bool,
}

impl<'a> Args<'a> {
    /// Finds every argument of the row in the request.
    pub fn parse(row: &'static Row, request: &'a [Bytes]) -> Result<Args<'a>> {
        if request.len() < row.words_min || row.words_max.is_some_and(|most| request.len() > most) {
            return Err(row.wrong_arity());
        }
        let mut args =
            Args { row, request, slots: [Slot::default(); ARGS_MAX], repeats: Vec::new(), has_options: false };
        let mut at = args.parse_positional(row.name_words)?;
        while at < request.len() {
            at = args.parse_option(at)?;
        }
        Ok(args)
    }

    /// Returns where the options begin.
    fn parse_positional(&mut self, mut at: usize) -> Result<usize> {
        let row = self.row;
        for (place, arg) in row.args.iter().enumerate().take_while(|(_, arg)| arg.token.is_none()) {
            let rest = self.request.get(at..).unwrap_or_default();
            let words = if counted(row.args, place) {
                count_before(self.request, at)?
            } else if arg.many {
                // The first word is a value whatever it says; a later one may be the token of an option.
                let more = rest.iter().skip(1).take_while(|word| row.option(word).is_none());
                let words = usize::from(!rest.is_empty()) + more.count();
                let width = arg.width_min();
                if words % width != 0 {
                    return Err(row.wrong_arity());
                }
                words
            } else if arg.optional && (rest.len() <= needed(&row.args[place + 1..]) || row.option(&rest[0]).is_some()) {
                0
            } else {
                arg.width(rest)?
            };
            if words > 0 {
                self.slots[place] = Slot { start: at as u32, words: words as u32 };
                at += words;
            }
        }
        Ok(at)
    }

    /// Takes the option at `at` and returns where the next begins.
    fn parse_option(&mut self, at: usize) -> Result<usize> {
        let Some((place, arg)) = self.row.option(&self.request[at]) else { return Err(syntax_error()) };
        let words = arg.width(&self.request[at + 1..])?;
        let slot = Slot { start: at as u32 + 1, words: words as u32 };
        self.has_options = true;
        if self.slots[place].start == 0 {
            self.slots[place] = slot;
        } else if arg.many {
            self.repeats.push((place, slot));
        } else {
            return Err(syntax_error());
        }
        if self.excluded(place) {
            return Err(syntax_error());
        }
        Ok(at + 1 + words)
    }

    /// Whether an argument is given that this one excludes.
    fn excluded(&self, place: usize) -> bool {
        let args = self.row.args;
        let first = (0..=place).rev().find(|at| !args[*at].or).unwrap_or(0);
        let chain = (first..args.len()).take_while(|at| *at == first || args[*at].or);
        chain.filter(|at| self.slots[*at].start != 0).count() > 1
    }

    pub fn row(&self) -> &'static Row {
        self.row
    }

    /// Whether any option was given.
    pub fn has_options(&self) -> bool {
        self.has_options
    }

    fn slot(&self, name: &str) -> (Option<&'static Arg>, Slot) {
        let place = self.row.args.iter().position(|arg| arg.key() == name);
        debug_assert!(place.is_some(), "{} has no argument {name}", self.row.name);
        place.map_or((None, Slot::default()), |place| (Some(&self.row.args[place]), self.slots[place]))
    }

    fn at(&self, slot: Slot) -> &'a [Bytes] {
        self.request.get(slot.start as usize..(slot.start + slot.words) as usize).unwrap_or_default()
    }

    pub fn has(&self, name: &str) -> bool {
        self.slot(name).1.start != 0
    }

    /// All values of a positional argument, or those of an option where it stands first.
    pub fn words(&self, name: &str) -> &'a [Bytes] {
        match self.slot(name).1 {
            Slot { start: 0, .. } => &[],
            slot => self.at(slot),
        }
    }

    /// The values of each occurrence of an option that may be repeated.
    pub fn each(&self, name: &str) -> impl Iterator<Item = &'a [Bytes]> {
        let place = self.row.args.iter().position(|arg| arg.key() == name);
        let first = (self.has(name)).then(|| self.words(name));
        let later = self.repeats.iter().filter(move |(repeated, _)| Some(*repeated) == place);
        first.into_iter().chain(later.map(|(_, slot)| self.at(*slot)))
    }

    /// The value, when it was given.
    pub fn value(&self, name: &str) -> Option<&'a Bytes> {
        self.words(name).first()
    }

    /// The value of an argument that the row requires.
    pub fn required(&self, name: &str) -> Result<&'a Bytes> {
        self.value(name).ok_or_else(|| self.row.wrong_arity())
    }

    /// The value, or no bytes.
    pub fn text(&self, name: &str) -> Bytes {
        self.value(name).cloned().unwrap_or_default()
    }

    pub fn queue(&self) -> Result<Name> {
        Name::parse(self.required("queue")?)
    }

    /// A number within the bounds of the row.
    pub fn integer(&self, name: &str) -> Result<Option<i64>> {
        self.integer_up_to(name, i64::MAX)
    }

    /// The same with an upper bound that the configuration sets.
    pub fn integer_up_to(&self, name: &str, most: i64) -> Result<Option<i64>> {
        let (Some(arg), Some(word)) = (self.slot(name).0, self.value(name)) else { return Ok(None) };
        let (from, to) = range(arg.kind);
        integer_between(word, arg.key(), from, to.min(most)).map(Some)
    }

    /// A span, a point in time or a count: what is never negative.
    pub fn number(&self, name: &str) -> Result<Option<u64>> {
        Ok(self.integer(name)?.and_then(|number| u64::try_from(number).ok()))
    }

    pub fn number_up_to(&self, name: &str, most: u64) -> Result<Option<u64>> {
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        Ok(self.integer_up_to(name, most)?.and_then(|number| u64::try_from(number).ok()))
    }

    pub fn state(&self) -> Result<Option<JobState>> {
        let words = || JobState::ALL.map(JobState::word).join(", ");
        let parse = |word: &Bytes| {
            JobState::parse(word).ok_or_else(|| Error::bad(format!("unknown state: STATE expects one of {}", words())))
        };
        self.value("STATE").map(parse).transpose()
    }

    /// The name of a shard.
    pub fn shard(&self, name: &str) -> Result<Option<Box<str>>> {
        self.value(name).map(|word| shard_name(word)).transpose()
    }

    /// The names of the queues or keys that the request is about, for `COMMAND GETKEYS`.
    pub fn keys(&self) -> Vec<Bytes> {
        let keyed =
            self.row.args.iter().zip(self.slots).filter(|(arg, slot)| arg.kind == Kind::Queue && slot.start != 0);
        keyed.flat_map(|(_, slot)| self.at(slot).iter().cloned()).collect()
    }
}

impl Row {
    /// The option that this word introduces, and its place among the arguments.
    fn option(&self, word: &[u8]) -> Option<(usize, &'static Arg)> {
        let spec = self.spec;
        let introduces = |arg: &&Arg| arg.token.is_some_and(|token| token.as_bytes().eq_ignore_ascii_case(word));
        spec.args.iter().enumerate().find(|(_, arg)| introduces(arg))
    }
}

/// The numbers that a kind takes.
fn range(kind: Kind) -> (i64, i64) {
    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    match kind {
        Kind::Integer(from, to) => (from, to),
        Kind::Millis(from, to) => (signed(from), signed(to)),
        Kind::Time => (0, signed(TIME_MAX)),
        Kind::Count => (1, i64::MAX),
        _ => (i64::MIN, i64::MAX),
    }
}

/// A number within bounds; begins with Redis's words, which clients know, and says what was expected.
pub fn integer_between(word: &[u8], label: &str, from: i64, to: i64) -> Result<i64> {
    parse_i64(word).filter(|number| (from..=to).contains(number)).ok_or_else(|| {
        let wanted = match (from, to) {
            (i64::MIN, i64::MAX) => String::new(),
            (_, i64::MAX) => format!(": {label} expects at least {from}"),
            _ => format!(": {label} expects {from} to {to}"),
        };
        Error::bad(format!("value is not an integer or out of range{wanted}"))
    })
}

/// A whole number as Redis reads it: no plus, no spaces, no leading zeros.
pub fn parse_i64(word: &[u8]) -> Option<i64> {
    let digits = word.strip_prefix(b"-").unwrap_or(word);
    let plain = match digits {
        [b'0'] => digits.len() == word.len(),
        [b'1'..=b'9', rest @ ..] => rest.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    if !plain {
        return None;
    }
    std::str::from_utf8(word).ok()?.parse().ok()
}

pub fn shard_name(word: &[u8]) -> Result<Box<str>> {
    match std::str::from_utf8(word) {
        Ok(name) if is_shard_name(name) => Ok(name.into()),
        _ => Err(Error::bad("invalid shard name: expected 1 to 48 bytes of A-Z a-z 0-9 . _ / -")),
    }
}

/// The arguments as the reference and `HELP` show them: `queue payload [ID id] [DELAY ms | AT unix-ms] [META field value]...`.
pub fn syntax(args: &[Arg]) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut at = 0;
    while at < args.len() {
        let chain = 1 + args[at + 1..].iter().take_while(|arg| arg.or).count();
        let alternatives: Vec<String> = args[at..at + chain].iter().map(once).collect();
        let (one, arg) = (alternatives.join(" | "), &args[at]);
        parts.push(match (arg.optional, arg.many, arg.token.is_some()) {
            (false, false, _) => one,
            (true, false, _) => format!("[{one}]"),
            (_, true, true) => format!("[{one}]..."),
            (false, true, false) => format!("{one} [{one} ...]"),
            (true, true, false) => format!("[{one} ...]"),
        });
        at += chain;
    }
    parts.join(" ")
}

fn once(arg: &Arg) -> String {
    let values = match arg.kind {
        Kind::Flag => String::new(),
        Kind::Group(args) => syntax(args),
        _ => arg.name.to_owned(),
    };
    match (arg.token, values.is_empty()) {
        (None, _) => values,
        (Some(token), true) => token.to_owned(),
        (Some(token), false) => format!("{token} {values}"),
    }
}
