//! The words of one request behind its name, read in order; what is wrong with them in Redis's words.

use bytes::Bytes;

use super::number::{parse_f64, parse_i64, parse_wide_f64};
use super::{Checked, Fault, NOT_AN_INTEGER, SYNTAX};

/// What is left to read of a request. Copied freely: a copy reads on from the same place.
#[derive(Clone, Copy)]
pub(super) struct Args<'a> {
    /// Of the command, in lower case.
    pub name: &'static str,
    words: &'a [Bytes],
}

impl<'a> Args<'a> {
    /// The words of a request, the name of its command among them.
    pub fn new(name: &'static str, words: &'a [Bytes]) -> Args<'a> {
        Args { name, words: words.get(1..).unwrap_or_default() }
    }

    pub fn len(&self) -> usize {
        self.words.len()
    }

    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// All that is left.
    pub fn rest(&self) -> &'a [Bytes] {
        self.words
    }

    pub fn next(&mut self) -> Checked<&'a Bytes> {
        let (word, rest) = self.words.split_first().ok_or(Fault::from(SYNTAX))?;
        self.words = rest;
        Ok(word)
    }

    /// The last word.
    pub fn last(&mut self) -> Checked<&'a Bytes> {
        let (word, rest) = self.words.split_last().ok_or(Fault::from(SYNTAX))?;
        self.words = rest;
        Ok(word)
    }

    /// The next `count` words; a syntax error when there are fewer.
    pub fn take(&mut self, count: usize) -> Checked<&'a [Bytes]> {
        let (taken, rest) = self.words.split_at_checked(count).ok_or(Fault::from(SYNTAX))?;
        self.words = rest;
        Ok(taken)
    }

    pub fn integer(&mut self) -> Checked<i64> {
        self.integer_or(NOT_AN_INTEGER)
    }

    pub fn integer_or(&mut self, complaint: &'static str) -> Checked<i64> {
        parse_i64(self.next()?).ok_or(complaint.into())
    }

    /// A number from `least` on, which the complaint is about, be it no number or too small.
    pub fn at_least(&mut self, least: i64, complaint: &'static str) -> Checked<i64> {
        let number = self.integer_or(complaint)?;
        if number < least { Err(complaint.into()) } else { Ok(number) }
    }

    pub fn float_or(&mut self, complaint: &'static str) -> Checked<f64> {
        parse_f64(self.next()?).ok_or(complaint.into())
    }

    /// Takes the next word when it is this one, in any case of letters.
    pub fn accept(&mut self, keyword: &str) -> bool {
        match self.words.split_first() {
            Some((word, rest)) if word.eq_ignore_ascii_case(keyword.as_bytes()) => {
                self.words = rest;
                true
            }
            _ => false,
        }
    }

    /// Takes the next word when it is this one and something follows that it can be about.
    pub fn accept_with(&mut self, keyword: &str, operands: usize) -> bool {
        self.words.len() > operands && self.accept(keyword)
    }

    pub fn end(&self) -> Checked<()> {
        if self.is_empty() { Ok(()) } else { Err(SYNTAX.into()) }
    }

    /// How many keys follow, then the keys.
    pub fn counted_keys(&mut self, complaint: &'static str) -> Checked<&'a [Bytes]> {
        let count = self.at_least(1, complaint)?;
        self.take(usize::try_from(count).unwrap_or(usize::MAX))
    }

    /// How long a blocking command would wait. Checked here and waited for by who sent it.
    pub fn check_timeout(word: &[u8]) -> Checked<()> {
        let seconds = parse_wide_f64(word).ok_or(Fault::from("ERR timeout is not a float or out of range"))?;
        let ms = (seconds * 1_000.0).ceil();
        // Redis says the same of what has no place in its milliseconds.
        if ms < 0.0 || ms >= i64::MAX as f64 { Err("ERR timeout is negative".into()) } else { Ok(()) }
    }
}
