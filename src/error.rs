//! What can go wrong, as clients see it: one code word, one sentence, and whether anything may have happened.
//!
//! An [`Error`] is made where the cause is known and travels unchanged to the one place that writes it to a client
//! ([`crate::resp::reply`]). Codes live in one table, [`Code::ALL`], which also writes the section "Errors" of
//! `protocol.md`. Expected conditions (an empty queue, a receipt that counts 0) are outcomes, not errors.

use std::borrow::Cow;
use std::fmt;

/// The first word of an error reply. Clients match on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Code {
    Err,
    LeaseLost,
    NoSuchJob,
    Duplicate,
    QueueFull,
    ShardDown,
    Overloaded,
    TooBig,
    NoPerm,
    NoAuth,
    WrongPass,
    NoProto,
    CrossShard,
    ExecAbort,
    WrongType,
}

impl Code {
    /// Every code with its word, its meaning and what a client should do about it.
    pub const ALL: &'static [(Code, &'static str, &'static str, &'static str)] = &[
        (
            Code::Err,
            "ERR",
            "The request was wrong; the text says which argument and what was expected.",
            "Fix the request.",
        ),
        (
            Code::LeaseLost,
            "LEASELOST",
            "The receipt no longer holds the job.",
            "Stop working on the job; another worker has it or it is over.",
        ),
        (
            Code::NoSuchJob,
            "NOSUCHJOB",
            "No job is known by this id or receipt.",
            "Nothing to do; it is over and no longer kept.",
        ),
        (
            Code::Duplicate,
            "DUPLICATE",
            "A job with this ID or UNIQUE key exists and NX was given.",
            "Nothing to do; the text names the job that holds it.",
        ),
        (
            Code::QueueFull,
            "QUEUEFULL",
            "The queue holds as many waiting jobs as its limit allows; nothing was stored.",
            "Retry later, or raise the limit.",
        ),
        (
            Code::ShardDown,
            "SHARDDOWN",
            "The shard that must serve this is not reachable or did not answer in time; the text says whether the write may have happened.",
            "Retry; with an ID or a receipt the retry is safe.",
        ),
        (
            Code::Overloaded,
            "OVERLOADED",
            "A bound was met and nothing was done; the text names the bound.",
            "Retry with backoff.",
        ),
        (
            Code::TooBig,
            "TOOBIG",
            "A value or a reply is longer than its limit; the text names both.",
            "Send less, or ask for less.",
        ),
        (Code::NoPerm, "NOPERM", "The command is not permitted here.", "Ask the operator."),
        (Code::NoAuth, "NOAUTH", "The connection has not authenticated.", "Send AUTH or HELLO with AUTH."),
        (Code::WrongPass, "WRONGPASS", "The password or user is wrong.", "Check the credentials."),
        (Code::NoProto, "NOPROTO", "The protocol version is not 2 or 3.", "Use HELLO 2 or HELLO 3."),
        (
            Code::CrossShard,
            "CROSSSHARD",
            "The keys of one command live on different shards.",
            "Use a {tag} that keeps them together.",
        ),
        (
            Code::ExecAbort,
            "EXECABORT",
            "The transaction was discarded because one of its commands was refused.",
            "Fix the refused command.",
        ),
        (Code::WrongType, "WRONGTYPE", "The key holds a value of another kind.", "Use a command of that kind."),
    ];

    /// The code of an error reply in a server's own bytes; what we have no word for is `ERR`.
    pub fn of_reply(reply: &[u8]) -> Code {
        let word = reply.strip_prefix(b"-").and_then(|rest| rest.split(|byte| byte.is_ascii_whitespace()).next());
        let known = Self::ALL.iter().find(|(_, known, ..)| Some(known.as_bytes()) == word);
        known.map_or(Code::Err, |(code, ..)| *code)
    }

    /// The word as it stands in a reply.
    pub fn word(self) -> &'static str {
        // `ALL` lists the variants in the order of their declaration; a test holds it to that.
        Self::ALL[self as usize].1
    }
}

/// Whether the request may have changed anything although it failed. Decides what may be retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happened {
    No,
    Maybe,
}

/// One failed request: what, in words, and whether it may have happened all the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    pub code: Code,
    pub text: Cow<'static, str>,
    pub happened: Happened,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of which it is known that nothing was done.
    pub fn new(code: Code, text: impl Into<Cow<'static, str>>) -> Self {
        Error { code, text: text.into(), happened: Happened::No }
    }

    /// Bad input: which argument, and what was expected.
    pub fn bad(text: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::Err, text)
    }

    /// `name` could not be reached, or did not answer in time.
    pub fn shard_down(name: &str, why: &str, happened: Happened) -> Self {
        let fate = match happened {
            Happened::No => "nothing was done",
            Happened::Maybe => "the write may have happened",
        };
        Error { code: Code::ShardDown, text: format!("{name} {why}; {fate}").into(), happened }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.code.word(), self.text)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_of_a_servers_error_is_its_first_word_where_we_have_it() {
        assert_eq!(Code::of_reply(b"-WRONGTYPE Operation against a key\r\n"), Code::WrongType);
        assert_eq!(Code::of_reply(b"-NOPERM\r\n"), Code::NoPerm);
        assert_eq!(Code::of_reply(b"-MOVED 1 a:1\r\n"), Code::Err);
        assert_eq!(Code::of_reply(b""), Code::Err);
    }

    #[test]
    fn every_code_stands_at_its_own_place_in_the_table() {
        for (place, (code, word, meaning, advice)) in Code::ALL.iter().enumerate() {
            assert_eq!(*code as usize, place, "{word} is out of order");
            assert!(meaning.ends_with('.') && advice.ends_with('.'), "{word} is not explained in sentences");
        }
    }
}
