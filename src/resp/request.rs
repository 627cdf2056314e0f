//! Requests as clients send them: a flat, bounded, incremental parser of RESP arrays and inline commands.
//!
//! Owns what a well-formed request is. Accepts and refuses what Redis 7 does, in Redis's words ([`ProtocolError`]), and
//! differs on purpose in three things: bounds hold however the bytes were split into packets; a NUL in a line is an
//! ordinary byte (Redis waits for ever behind it); an array has at most [`WORDS_MAX`] words.
//!
//! Promises: no recursion; nothing is reserved because a client declared a length; bytes are looked at once, so a
//! request that comes byte by byte costs as much as one that comes whole; a word shares the memory it was read into.
//! [`Parser::raw`] is always a well-formed array of bulk strings, so that a shared connection can forward it: an inline
//! command, or an array whose line ends were not CRLF (Redis does not look), is written anew.
//!
//! The session calls [`Parser::next`] until it says [`Parsed::Incomplete`], then reads more bytes. After an error the
//! connection is to be answered and closed. Limits that belong to a command (payload size, arity) are not kept here.

use bytes::{Buf, Bytes, BytesMut};

use crate::resp::reply::{Reply, put_bulk, put_header};

/// Most words of one request, whatever is configured.
pub const WORDS_MAX: usize = 1 << 20;
/// Longest bulk string of one request, whatever is configured; Redis's default.
pub const WORD_BYTES_MAX: usize = 512 << 20;
/// Longest inline command and longest line that declares a length; Redis's constant.
pub const LINE_BYTES_MAX: usize = 64 << 10;
/// Most bytes of one request; Redis's default limit of a query buffer.
pub const REQUEST_BYTES_MAX: usize = 1 << 30;
/// Lines are mostly shorter than this.
const LINE_BYTES_NEAR: usize = 6;
/// Word ranges kept for the next request; a larger vector is given back.
const RANGES_KEPT: usize = 1_024;

/// What a request may have at most. Each is also held to the constant of its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub words_max: usize,
    pub word_bytes_max: usize,
    pub request_bytes_max: usize,
    /// Decides the words in which a request that is too large is refused.
    pub authenticated: bool,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds {
            words_max: WORDS_MAX,
            word_bytes_max: WORD_BYTES_MAX,
            request_bytes_max: REQUEST_BYTES_MAX,
            authenticated: true,
        }
    }
}

impl Bounds {
    /// For a connection that has yet to authenticate: room for `HELLO 3 AUTH user password SETNAME name` and its like.
    pub const UNAUTHENTICATED: Bounds =
        Bounds { words_max: 16, word_bytes_max: 16 << 10, request_bytes_max: 128 << 10, authenticated: false };
}

/// Why a connection cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    MultibulkLength,
    UnauthenticatedMultibulkLength,
    MultibulkLineTooBig,
    /// Where a bulk string was due stood this byte.
    ExpectedBulk(u8),
    BulkLength,
    UnauthenticatedBulkLength,
    BulkLineTooBig,
    InlineTooBig,
    UnbalancedQuotes,
    RequestTooBig,
}

impl ProtocolError {
    /// The error reply, in Redis's words where Redis has them.
    pub fn reply(self) -> Reply {
        let text: &'static [u8] = match self {
            ProtocolError::MultibulkLength => b"ERR Protocol error: invalid multibulk length",
            ProtocolError::UnauthenticatedMultibulkLength => b"ERR Protocol error: unauthenticated multibulk length",
            ProtocolError::MultibulkLineTooBig => b"ERR Protocol error: too big mbulk count string",
            ProtocolError::ExpectedBulk(byte) => {
                let mut text = b"ERR Protocol error: expected '$', got '?'".to_vec();
                let place = text.len() - 2;
                text[place] = byte;
                return Reply::RawError(text.into());
            }
            ProtocolError::BulkLength => b"ERR Protocol error: invalid bulk length",
            ProtocolError::UnauthenticatedBulkLength => b"ERR Protocol error: unauthenticated bulk length",
            ProtocolError::BulkLineTooBig => b"ERR Protocol error: too big bulk count string",
            ProtocolError::InlineTooBig => b"ERR Protocol error: too big inline request",
            ProtocolError::UnbalancedQuotes => b"ERR Protocol error: unbalanced quotes in request",
            ProtocolError::RequestTooBig => b"ERR Protocol error: too big request",
        };
        Reply::RawError(Bytes::from_static(text))
    }
}

/// What came of a look at the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// One request was taken from the buffer.
    Request,
    /// More bytes are needed; what is known of them so far is remembered.
    Incomplete,
}

/// Where a word stands in the request's bytes.
type Range = (u32, u32);

/// The parser of one connection.
#[derive(Debug, Default)]
pub struct Parser {
    bounds: Bounds,
    progress: Progress,
    /// Words found so far of the request in progress, or those of the last whole one.
    ranges: Vec<Range>,
    /// The last whole request; empty while one is in progress, so that the read buffer can be used again.
    raw: Bytes,
}

/// How far the request at the head of the buffer has been read. Offsets count from there.
#[derive(Debug)]
struct Progress {
    /// First byte that is not part of a finished line or word.
    at: usize,
    /// No line ends between `at` and here.
    scanned: usize,
    /// Words still to come; `None` before the array's first line is whole.
    words_left: Option<usize>,
    /// The declared length of the word at `at`.
    word_bytes: Option<usize>,
    /// Every line end so far was CRLF.
    well_formed: bool,
}

impl Default for Progress {
    fn default() -> Self {
        Progress { at: 0, scanned: 0, words_left: None, word_bytes: None, well_formed: true }
    }
}

/// What stands at the head of the buffer.
enum Head {
    Partial,
    /// So many bytes that ask for nothing.
    Empty(usize),
    /// An array of so many bytes.
    Array(usize),
    /// An inline command whose line has so many bytes.
    Inline(usize, Bytes),
}

impl Parser {
    pub fn new(bounds: Bounds) -> Parser {
        let mut parser = Parser::default();
        parser.set_bounds(bounds);
        parser
    }

    /// Holds from the next length that is read: after `AUTH`, and again after `RESET`.
    pub fn set_bounds(&mut self, bounds: Bounds) {
        self.bounds = Bounds {
            words_max: bounds.words_max.min(WORDS_MAX),
            word_bytes_max: bounds.word_bytes_max.min(WORD_BYTES_MAX),
            request_bytes_max: bounds.request_bytes_max.min(REQUEST_BYTES_MAX),
            authenticated: bounds.authenticated,
        };
    }

    /// Takes the next request from the buffer and puts its words, at least one, into `out`.
    pub fn next(&mut self, buffer: &mut BytesMut, out: &mut Vec<Bytes>) -> Result<Parsed, ProtocolError> {
        out.clear();
        let parsed = self.advance(buffer)?;
        if parsed == Parsed::Request {
            out.extend(self.ranges.iter().map(|&(start, end)| self.raw.slice(start as usize..end as usize)));
        }
        Ok(parsed)
    }

    /// As [`Parser::next`], but leaves the words to [`Parser::word`]: for requests that are only looked at and forwarded.
    pub fn advance(&mut self, buffer: &mut BytesMut) -> Result<Parsed, ProtocolError> {
        if !self.raw.is_empty() {
            self.finish_last();
        }
        loop {
            let head = match buffer.first() {
                None => Head::Partial,
                Some(b'*') => self.read_array(buffer)?,
                Some(_) => self.read_inline(buffer)?,
            };
            match head {
                Head::Partial => return Ok(Parsed::Incomplete),
                Head::Empty(bytes) => {
                    buffer.advance(bytes);
                    self.progress = Progress::default();
                    continue;
                }
                Head::Array(bytes) => {
                    self.raw = buffer.split_to(bytes).freeze();
                    if !self.progress.well_formed {
                        self.raw = write_array(&self.raw, &mut self.ranges);
                    }
                }
                Head::Inline(bytes, words) => {
                    buffer.advance(bytes);
                    self.raw = write_array(&words, &mut self.ranges);
                }
            }
            self.progress = Progress::default();
            return Ok(Parsed::Request);
        }
    }

    /// The last request as one array of bulk strings; empty after [`Parsed::Incomplete`].
    pub fn raw(&self) -> &Bytes {
        &self.raw
    }

    /// How many words the last request has.
    pub fn words(&self) -> usize {
        if self.raw.is_empty() { 0 } else { self.ranges.len() }
    }

    /// One word of the last request.
    pub fn word(&self, place: usize) -> Option<&[u8]> {
        let &(start, end) = self.ranges.get(place)?;
        self.raw.get(start as usize..end as usize)
    }

    /// How many bytes it is worth to make room for before the next read: what the word in progress lacks, at most as much
    /// as already came, so that a declared length alone reserves nothing.
    pub fn room_wanted(&self, buffered: usize) -> usize {
        let lacking =
            self.progress.word_bytes.map_or(0, |bytes| (self.progress.at + bytes + 2).saturating_sub(buffered));
        lacking.min(buffered)
    }

    fn finish_last(&mut self) {
        self.raw = Bytes::new();
        self.ranges.clear();
        self.ranges.shrink_to(RANGES_KEPT);
    }

    fn read_array(&mut self, buffer: &[u8]) -> Result<Head, ProtocolError> {
        let mut words_left = match self.progress.words_left {
            Some(words) => words,
            None => match self.read_words(buffer)? {
                None => return Ok(Head::Partial),
                Some(0) => return Ok(Head::Empty(self.progress.at)),
                Some(words) => words,
            },
        };
        while words_left > 0 {
            let bytes = match self.progress.word_bytes {
                Some(bytes) => bytes,
                None => match self.read_word_bytes(buffer)? {
                    None => break,
                    Some(bytes) => bytes,
                },
            };
            let (start, end) = (self.progress.at, self.progress.at + bytes);
            let Some(line_end) = buffer.get(end..end + 2) else {
                self.progress.word_bytes = Some(bytes);
                break;
            };
            self.progress.well_formed &= line_end == b"\r\n";
            // Both fit: a request has at most REQUEST_BYTES_MAX bytes.
            self.ranges.push((start as u32, end as u32));
            self.progress.at = end + 2;
            self.progress.word_bytes = None;
            words_left -= 1;
        }
        self.progress.words_left = Some(words_left);
        Ok(if words_left == 0 { Head::Array(self.progress.at) } else { Head::Partial })
    }

    /// Reads `*<words>`; what is negative counts as 0.
    fn read_words(&mut self, buffer: &[u8]) -> Result<Option<usize>, ProtocolError> {
        let Some(line) = self.read_line(buffer, ProtocolError::MultibulkLineTooBig)? else {
            return Ok(None);
        };
        let words = line.get(1..).and_then(parse_i64).ok_or(ProtocolError::MultibulkLength)?;
        let words = usize::try_from(words).unwrap_or(0);
        if words > self.bounds.words_max {
            return Err(match self.bounds.authenticated || words > WORDS_MAX {
                true => ProtocolError::MultibulkLength,
                false => ProtocolError::UnauthenticatedMultibulkLength,
            });
        }
        Ok(Some(words))
    }

    /// Reads `$<bytes>`.
    fn read_word_bytes(&mut self, buffer: &[u8]) -> Result<Option<usize>, ProtocolError> {
        let start = self.progress.at;
        let Some(line) = self.read_line(buffer, ProtocolError::BulkLineTooBig)? else {
            return Ok(None);
        };
        let Some(digits) = line.strip_prefix(b"$") else {
            return Err(ProtocolError::ExpectedBulk(buffer.get(start).copied().unwrap_or(b'\r')));
        };
        let bytes = parse_i64(digits).and_then(|bytes| usize::try_from(bytes).ok()).ok_or(ProtocolError::BulkLength)?;
        if bytes > self.bounds.word_bytes_max {
            return Err(match self.bounds.authenticated || bytes > WORD_BYTES_MAX {
                true => ProtocolError::BulkLength,
                false => ProtocolError::UnauthenticatedBulkLength,
            });
        }
        if self.progress.at + bytes + 2 > self.bounds.request_bytes_max {
            return Err(ProtocolError::RequestTooBig);
        }
        Ok(Some(bytes))
    }

    /// The line at `at` without its end, once it is whole. Like Redis it ends with a CR and any byte.
    fn read_line<'a>(&mut self, buffer: &'a [u8], too_big: ProtocolError) -> Result<Option<&'a [u8]>, ProtocolError> {
        let start = self.progress.at;
        let from = self.progress.scanned.max(start);
        let rest = buffer.get(from..).unwrap_or_default();
        // Nearly every line ends within a few bytes, where a plain loop finds the end sooner.
        let near = rest.iter().take(LINE_BYTES_NEAR).position(|byte| *byte == b'\r');
        let end = near.or_else(|| memchr::memchr(b'\r', rest)).map_or(buffer.len(), |place| from + place);
        if end - start > LINE_BYTES_MAX {
            return Err(too_big);
        }
        let Some(last) = buffer.get(end + 1) else {
            self.progress.scanned = end;
            return Ok(None);
        };
        self.progress.well_formed &= *last == b'\n';
        self.progress.at = end + 2;
        Ok(buffer.get(start..end))
    }

    fn read_inline(&mut self, buffer: &[u8]) -> Result<Head, ProtocolError> {
        let rest = buffer.get(self.progress.scanned..).unwrap_or_default();
        let found = memchr::memchr(b'\n', rest).map(|place| self.progress.scanned + place);
        let end = found.unwrap_or(buffer.len());
        if end > LINE_BYTES_MAX {
            return Err(ProtocolError::InlineTooBig);
        }
        if found.is_none() {
            self.progress.scanned = end;
            return Ok(Head::Partial);
        }
        let words = split_inline(&buffer[..end], &mut self.ranges).ok_or(ProtocolError::UnbalancedQuotes)?;
        Ok(match self.ranges.is_empty() {
            true => Head::Empty(end + 1),
            false => Head::Inline(end + 1, words),
        })
    }
}

/// A decimal number as Redis's `string2ll` takes it: no plus sign, no space, no leading zero, no minus zero.
fn parse_i64(digits: &[u8]) -> Option<i64> {
    let (negative, digits) = match digits {
        [b'-', rest @ ..] => (true, rest),
        _ => (false, digits),
    };
    match digits {
        [b'0'] if !negative => return Some(0),
        [b'1'..=b'9', ..] => {}
        _ => return None,
    }
    digits.iter().try_fold(0i64, |number, byte| {
        let digit = i64::from(byte.is_ascii_digit().then(|| byte - b'0')?);
        let number = number.checked_mul(10)?;
        if negative { number.checked_sub(digit) } else { number.checked_add(digit) }
    })
}

/// Writes the words that `ranges` name in `source` as one array, and makes `ranges` name them there.
fn write_array(source: &[u8], ranges: &mut [Range]) -> Bytes {
    let mut out = BytesMut::with_capacity(source.len() + 16 * ranges.len());
    put_header(&mut out, b'*', ranges.len());
    for (start, end) in ranges {
        let word = source.get(*start as usize..*end as usize).unwrap_or_default();
        put_bulk(&mut out, word);
        // An inline command is short and an array grows by its headers at most, so that this cannot overflow.
        *end = out.len() as u32 - 2;
        *start = *end - word.len() as u32;
    }
    out.freeze()
}

/// Splits an inline command by the rules of Redis's `sdssplitargs`; `None` when its quotes do not pair.
///
/// Words are split by white space. `"..."` knows `\n \r \t \b \a \xHH` and takes any other escaped byte as it is; `'...'`
/// knows `\'` only. A closing quote ends its word and must be followed by white space.
fn split_inline(line: &[u8], ranges: &mut Vec<Range>) -> Option<Bytes> {
    ranges.clear();
    let mut words = Vec::with_capacity(line.len());
    let mut rest = line;
    loop {
        while let [first, tail @ ..] = rest
            && is_space(*first)
        {
            rest = tail;
        }
        if rest.is_empty() {
            return Some(words.into());
        }
        let start = words.len() as u32;
        rest = take_word(rest, &mut words)?;
        ranges.push((start, words.len() as u32));
    }
}

fn take_word<'a>(mut rest: &'a [u8], words: &mut Vec<u8>) -> Option<&'a [u8]> {
    loop {
        rest = match rest {
            // Unlike between words, a vertical tab or form feed does not end one.
            [] | [b' ' | b'\n' | b'\r' | b'\t', ..] => return Some(rest),
            [b'"', tail @ ..] => return take_double_quoted(tail, words),
            [b'\'', tail @ ..] => return take_single_quoted(tail, words),
            [byte, tail @ ..] => {
                words.push(*byte);
                tail
            }
        }
    }
}

fn take_double_quoted<'a>(mut rest: &'a [u8], words: &mut Vec<u8>) -> Option<&'a [u8]> {
    loop {
        let (byte, tail) = match rest {
            [b'\\', b'x', high, low, tail @ ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                (hex(*high) << 4 | hex(*low), tail)
            }
            [b'\\', escaped, tail @ ..] => (unescape(*escaped), tail),
            [b'"', tail @ ..] => return ends_word(tail),
            [byte, tail @ ..] => (*byte, tail),
            [] => return None,
        };
        words.push(byte);
        rest = tail;
    }
}

fn take_single_quoted<'a>(mut rest: &'a [u8], words: &mut Vec<u8>) -> Option<&'a [u8]> {
    loop {
        let (byte, tail) = match rest {
            [b'\\', b'\'', tail @ ..] => (b'\'', tail),
            [b'\'', tail @ ..] => return ends_word(tail),
            [byte, tail @ ..] => (*byte, tail),
            [] => return None,
        };
        words.push(byte);
        rest = tail;
    }
}

fn ends_word(tail: &[u8]) -> Option<&[u8]> {
    tail.first().is_none_or(|byte| is_space(*byte)).then_some(tail)
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t'..=b'\r')
}

fn unescape(byte: u8) -> u8 {
    match byte {
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        b'b' => 8,
        b'a' => 7,
        other => other,
    }
}

fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        b'a'..=b'f' => digit - b'a' + 10,
        _ => digit.wrapping_sub(b'A').wrapping_add(10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_all(parser: &mut Parser, buffer: &mut BytesMut) -> Result<Vec<Vec<Bytes>>, ProtocolError> {
        let (mut all, mut words) = (Vec::new(), Vec::new());
        while parser.next(buffer, &mut words)? == Parsed::Request {
            all.push(words.clone());
        }
        Ok(all)
    }

    fn parse(input: &[u8]) -> Result<Vec<Vec<Bytes>>, ProtocolError> {
        parse_all(&mut Parser::new(Bounds::default()), &mut BytesMut::from(input))
    }

    #[test]
    fn words_share_the_memory_that_they_were_read_into() {
        let mut buffer = BytesMut::from(&b"*2\r\n$4\r\nECHO\r\n$3\r\nabc\r\n*1"[..]);
        let memory = buffer.as_ptr() as usize;
        let (mut parser, mut words) = (Parser::new(Bounds::default()), Vec::new());
        assert_eq!(parser.next(&mut buffer, &mut words), Ok(Parsed::Request));
        assert_eq!(words, ["ECHO", "abc"]);
        assert_eq!(words[1].as_ptr() as usize, memory + 18);
        assert_eq!(parser.raw(), &b"*2\r\n$4\r\nECHO\r\n$3\r\nabc\r\n"[..]);
        assert_eq!((parser.words(), parser.word(1), parser.word(2)), (2, Some(&b"abc"[..]), None));
        assert_eq!(parser.next(&mut buffer, &mut words), Ok(Parsed::Incomplete));
        assert_eq!((parser.raw().len(), parser.words(), words.len(), &buffer[..]), (0, 0, 0, &b"*1"[..]));
    }

    #[test]
    fn what_is_forwarded_is_well_formed_whatever_came() {
        for came in [&b"SET  k \"v w\"\n"[..], b"*3\rx$3\r\nSETxx$1\r\nk\r\n$3\r\nv w??"] {
            let (mut parser, mut words) = (Parser::new(Bounds::default()), Vec::new());
            assert_eq!(parser.next(&mut BytesMut::from(came), &mut words), Ok(Parsed::Request));
            assert_eq!(words, ["SET", "k", "v w"]);
            assert_eq!(parser.raw(), &b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$3\r\nv w\r\n"[..]);
        }
    }

    #[test]
    fn what_asks_for_nothing_is_skipped() {
        let requests = parse(b"*0\r\n\r\n*-1\r\n \t \n*-7\r\nPING\r\n*1\r\n$4\r\nQUIT\r\n\r\n").unwrap();
        assert_eq!(requests, [["PING"], ["QUIT"]]);
    }

    #[test]
    fn inline_commands_are_quoted_as_in_redis() {
        let one = |input: &[u8]| parse(&[input, b"\r\n"].concat()).map(|mut requests| requests.remove(0));
        assert_eq!(one(br#"a "b\x41\n\q\"" 'c\'\n' d"e""#).unwrap(), ["a", "bA\nq\"", "c'\\n", "de"]);
        assert_eq!(one(b"\"\" ''").unwrap(), ["", ""]);
        assert_eq!(one(b"\x0ba\x0bb\x0c").unwrap(), ["a\x0bb\x0c"]);
        assert_eq!(one(b"\"\xff\\xfF\\xg1\"").unwrap(), [&b"\xff\xffxg1"[..]]);
        assert_eq!(one(b"a\0b").unwrap(), ["a\0b"]);
        for unbalanced in [&b"\"a"[..], b"'a", b"'a'b", b"\"a\"b", b"a\"b\"c", b"\"a\\", b"'a\\'"] {
            assert_eq!(one(unbalanced), Err(ProtocolError::UnbalancedQuotes));
        }
    }

    #[test]
    fn each_bound_holds_at_its_edge_and_not_beyond() {
        let bounds = Bounds { words_max: 2, word_bytes_max: 10, request_bytes_max: 34, authenticated: true };
        let try_in = |bounds: Bounds, input: &[u8]| {
            parse_all(&mut Parser::new(bounds), &mut BytesMut::from(input)).map(|requests| requests.len())
        };
        assert_eq!(try_in(bounds, b"*2\r\n$8\r\n12345678\r\n$10\r\n1234567890\r\n"), Err(ProtocolError::RequestTooBig));
        assert_eq!(try_in(bounds, b"*2\r\n$7\r\n1234567\r\n$10\r\n1234567890\r\n"), Ok(1));
        assert_eq!(try_in(bounds, b"*3\r\n"), Err(ProtocolError::MultibulkLength));
        assert_eq!(try_in(bounds, b"*1\r\n$11\r\n"), Err(ProtocolError::BulkLength));
        let early = Bounds::UNAUTHENTICATED;
        assert_eq!(try_in(early, b"*16\r\n$16384\r\n"), Ok(0));
        assert_eq!(try_in(early, b"*17\r\n"), Err(ProtocolError::UnauthenticatedMultibulkLength));
        assert_eq!(try_in(early, b"*1\r\n$16385\r\n"), Err(ProtocolError::UnauthenticatedBulkLength));
        assert_eq!(try_in(early, b"*1048577\r\n"), Err(ProtocolError::MultibulkLength));
        for (mark, error) in [("a", ProtocolError::InlineTooBig), ("*", ProtocolError::MultibulkLineTooBig)] {
            let line = |bytes: usize| [mark.as_bytes(), &vec![b'1'; bytes - 1]].concat();
            assert_eq!(try_in(Bounds::default(), &line(LINE_BYTES_MAX)), Ok(0));
            assert_eq!(try_in(Bounds::default(), &line(LINE_BYTES_MAX + 1)), Err(error));
        }
        let line = [&b"*1\r\n$"[..], &[b'1'; LINE_BYTES_MAX]].concat();
        assert_eq!(try_in(Bounds::default(), &line), Err(ProtocolError::BulkLineTooBig));
    }

    #[test]
    fn a_declared_length_reserves_nothing() {
        let mut parser = Parser::new(Bounds::default());
        let mut buffer = BytesMut::from(&b"*1048576\r\n$536870912\r\nabc"[..]);
        assert_eq!(parser.advance(&mut buffer), Ok(Parsed::Incomplete));
        assert!(parser.ranges.capacity() <= RANGES_KEPT);
        assert_eq!(parser.room_wanted(buffer.len()), buffer.len());
    }

    #[test]
    fn bytes_that_come_one_by_one_are_each_looked_at_once() {
        let mut parser = Parser::new(Bounds::default());
        let mut buffer = BytesMut::new();
        let mut words = Vec::new();
        for byte in b"*2\r\n$4\r\nECHO\r\n$60000\r\n" {
            buffer.extend_from_slice(&[*byte]);
            assert_eq!(parser.next(&mut buffer, &mut words), Ok(Parsed::Incomplete));
            let awaited = parser.progress.word_bytes.map_or(0, |bytes| bytes + 2);
            assert!(parser.progress.at.max(parser.progress.scanned) + awaited + 1 >= buffer.len());
        }
        assert_eq!((parser.progress.at, parser.progress.word_bytes), (buffer.len(), Some(60_000)));
        let mut parser = Parser::new(Bounds::default());
        let mut buffer = BytesMut::new();
        for _ in 0..LINE_BYTES_MAX {
            buffer.extend_from_slice(b"a");
            assert_eq!(parser.next(&mut buffer, &mut words), Ok(Parsed::Incomplete));
            assert_eq!(parser.progress.scanned, buffer.len());
        }
    }

    #[test]
    fn numbers_are_those_of_string2ll() {
        for (text, number) in [("0", 0), ("-1", -1), ("12", 12), ("-9223372036854775808", i64::MIN)] {
            assert_eq!(parse_i64(text.as_bytes()), Some(number));
        }
        for text in ["", "-", "-0", "+1", "01", " 1", "1 ", "1a", "9223372036854775808", "-9223372036854775809"] {
            assert_eq!(parse_i64(text.as_bytes()), None, "{text:?}");
        }
    }
}
