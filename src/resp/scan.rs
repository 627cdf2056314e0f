//! Where a backend's reply ends: for links that pass replies on as the bytes they are.
//!
//! Flat: one counter of values still to come stands for all nesting, because the end of a reply does not depend on its
//! shape. Incremental: [`ScanState`] remembers how far the reply at the head of the buffer has been read, so that a
//! large one that comes in pieces is looked at once, and the bytes of a bulk string not at all.
//!
//! Knows every type of RESP2 and RESP3, attributes and pushes included. Streamed strings and aggregates (`$?`, `*?`) are
//! refused: no server sends them. Does not judge what stands in a simple line.

/// Most values that one reply may hold, and longest bulk string: what is beyond is a connection out of step.
const VALUES_MAX: u64 = u32::MAX as u64;
const BULK_BYTES_MAX: u64 = 4 << 30;
/// Longest line.
const LINE_BYTES_MAX: usize = 1 << 20;

/// The bytes are no reply; whatever follows on this connection cannot be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed {
    pub what: &'static str,
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "malformed reply: {}", self.what)
    }
}

impl std::error::Error for Malformed {}

/// How far the reply at the head of a buffer has been read. One for each connection.
#[derive(Clone, Copy, Debug, Default)]
pub struct ScanState {
    /// Where the next value begins; beyond the buffer while a bulk string is still coming.
    at: usize,
    /// No line ends between `at` and here.
    scanned: usize,
    /// Values still to come; 0 before the reply begins.
    pending: u64,
    /// The two bytes before `at` must be CRLF.
    after_bulk: bool,
    /// The type of the reply itself, attributes before it aside.
    mark: Option<u8>,
    whole: bool,
}

impl ScanState {
    /// The last whole reply, or the one in progress, is a RESP3 push: it answers no request.
    pub fn is_push(&self) -> bool {
        self.mark == Some(b'>')
    }

    /// The reply in progress will not be kept: forgets what has been read of the `len` bytes that are there, and says how
    /// many from the front are needed no more.
    pub fn forget(&mut self, len: usize) -> usize {
        // The two before the next value may yet be looked at.
        let gone = self.at.min(len).saturating_sub(2);
        self.at -= gone;
        self.scanned = self.scanned.saturating_sub(gone);
        gone
    }

    pub fn is_error(&self) -> bool {
        matches!(self.mark, Some(b'-' | b'!'))
    }
}

/// The length of the first reply in the buffer, once it is there whole; the state then begins anew with the next call.
///
/// Until then call it again with the same bytes and more behind them.
pub fn reply_end(buffer: &[u8], state: &mut ScanState) -> Result<Option<usize>, Malformed> {
    if state.whole {
        *state = ScanState::default();
    }
    // An attribute leaves values pending, so that this is true before the first line only.
    if state.pending == 0 && state.mark.is_none() {
        state.pending = 1;
    }
    loop {
        if state.after_bulk && !bulk_is_closed(buffer, state)? {
            return Ok(None);
        }
        if state.pending == 0 {
            state.whole = true;
            return Ok(Some(state.at));
        }
        let Some(line) = take_line(buffer, state)? else {
            return Ok(None);
        };
        take_value(line, state)?;
    }
}

/// Whether the CRLF behind a bulk string has come.
fn bulk_is_closed(buffer: &[u8], state: &mut ScanState) -> Result<bool, Malformed> {
    match buffer.get(state.at - 2..state.at) {
        None => Ok(false),
        Some(b"\r\n") => {
            state.after_bulk = false;
            Ok(true)
        }
        Some(_) => Err(Malformed { what: "a bulk string is not closed by CRLF" }),
    }
}

/// The line at `at` without its end, once it is whole.
fn take_line<'a>(buffer: &'a [u8], state: &mut ScanState) -> Result<Option<&'a [u8]>, Malformed> {
    let from = state.scanned.max(state.at);
    let rest = buffer.get(from..).unwrap_or_default();
    let Some(place) = memchr::memchr(b'\n', rest) else {
        state.scanned = from + rest.len();
        return match state.scanned - state.at > LINE_BYTES_MAX {
            true => Err(Malformed { what: "a line is too long" }),
            false => Ok(None),
        };
    };
    let end = from + place;
    let line = buffer.get(state.at..end).and_then(|line| line.strip_suffix(b"\r"));
    state.at = end + 1;
    line.map(Some).ok_or(Malformed { what: "a line does not end with CRLF" })
}

fn take_value(line: &[u8], state: &mut ScanState) -> Result<(), Malformed> {
    let [mark, rest @ ..] = line else {
        return Err(Malformed { what: "an empty line" });
    };
    if state.mark.is_none() && state.pending == 1 && *mark != b'|' {
        state.mark = Some(*mark);
    }
    // An attribute stands before a value and is none itself.
    state.pending -= u64::from(*mark != b'|');
    match mark {
        b'+' | b'-' | b':' | b'_' | b'#' | b',' | b'(' => {}
        b'$' | b'*' if rest == b"-1" => {}
        b'$' | b'!' | b'=' => {
            // At most 2^32: an address has more bits wherever this runs.
            state.at += parse_length(rest, BULK_BYTES_MAX)? as usize + 2;
            state.after_bulk = true;
        }
        b'*' | b'~' | b'>' => state.pending += parse_length(rest, VALUES_MAX)?,
        b'%' | b'|' => state.pending += 2 * parse_length(rest, VALUES_MAX)?,
        _ => return Err(Malformed { what: "an unknown type" }),
    }
    match state.pending > VALUES_MAX {
        true => Err(Malformed { what: "too many values" }),
        false => Ok(()),
    }
}

fn parse_length(digits: &[u8], max: u64) -> Result<u64, Malformed> {
    let number = digits.iter().try_fold(0u64, |number, byte| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        Some(number * 10 + digit).filter(|number| *number <= max)
    });
    number.filter(|_| !digits.is_empty()).ok_or(Malformed { what: "a length is no number or too large" })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The end of the first reply, the same whether the bytes come at once or one by one.
    fn end(bytes: &[u8]) -> Result<Option<usize>, Malformed> {
        let mut at_once = ScanState::default();
        let whole = reply_end(bytes, &mut at_once);
        let mut one_by_one = ScanState::default();
        let mut split = Ok(None);
        for len in 0..=bytes.len() {
            split = reply_end(&bytes[..len], &mut one_by_one);
            if split != Ok(None) {
                break;
            }
        }
        assert_eq!(whole, split, "{:?}", String::from_utf8_lossy(bytes));
        assert_eq!((at_once.is_push(), at_once.is_error()), (one_by_one.is_push(), one_by_one.is_error()));
        whole
    }

    #[test]
    fn every_type_ends_where_it_ends() {
        let replies: [&[u8]; 21] = [
            b"+OK\r\n",
            b"-ERR no\r\n",
            b":-7\r\n",
            b"$3\r\n\r\n\n\r\n",
            b"$0\r\n\r\n",
            b"$-1\r\n",
            b"*-1\r\n",
            b"*0\r\n",
            b"*2\r\n*1\r\n:1\r\n$1\r\na\r\n",
            b"_\r\n",
            b"#t\r\n",
            b",1.5e3\r\n",
            b"(12345678901234567890\r\n",
            b"!5\r\nERR x\r\n",
            b"=7\r\ntxt:abc\r\n",
            b"%2\r\n+a\r\n:1\r\n+b\r\n%0\r\n",
            b"~2\r\n:1\r\n:2\r\n",
            b">2\r\n+message\r\n+a\r\n",
            b"|1\r\n+ttl\r\n:1\r\n$1\r\na\r\n",
            b"*2\r\n|1\r\n+a\r\n*2\r\n:1\r\n:2\r\n+x\r\n+y\r\n",
            b"*1\r\n*1\r\n*1\r\n*1\r\n*0\r\n",
        ];
        for reply in replies {
            assert_eq!(end(reply), Ok(Some(reply.len())));
            assert_eq!(end(&[reply, b"+next\r\n"].concat()), Ok(Some(reply.len())));
            assert_eq!(end(&reply[..reply.len() - 1]), Ok(None));
        }
    }

    #[test]
    fn replies_in_a_row_are_told_apart_by_one_state() {
        let mut rest: &[u8] = b"+OK\r\n>1\r\n-in\r\n-ERR\r\n|1\r\n+a\r\n>0\r\n!1\r\nx\r\n*1\r\n-ERR in\r\n";
        let mut state = ScanState::default();
        let mut kinds = Vec::new();
        while let Ok(Some(end)) = reply_end(rest, &mut state) {
            rest = &rest[end..];
            kinds.push((state.is_push(), state.is_error()));
        }
        assert!(rest.is_empty());
        assert_eq!(kinds, [(false, false), (true, false), (false, true), (false, true), (false, false)]);
    }

    #[test]
    fn what_is_no_reply_is_refused() {
        for bytes in [
            &b"HTTP/1.1 400\r\n"[..],
            b"\r\n",
            b"+OK\n",
            b"$\r\n",
            b"$-2\r\n",
            b"$+1\r\n",
            b"$?\r\n",
            b"*?\r\n",
            b";1\r\n",
            b".\r\n",
            b"$1\r\nabc\r\n",
            b"$99999999999999999999\r\n",
            b"*4294967296\r\n",
            b"*4294967295\r\n*4294967295\r\n",
            b"%4294967295\r\n",
        ] {
            assert!(end(bytes).is_err(), "{:?}", String::from_utf8_lossy(bytes));
        }
        assert!(end(&[&b"+"[..], &vec![b'a'; LINE_BYTES_MAX]].concat()).is_err());
    }

    #[test]
    fn nesting_costs_nothing() {
        let reply = [&b"*1\r\n".repeat(100_000)[..], b":1\r\n"].concat();
        assert_eq!(reply_end(&reply, &mut ScanState::default()), Ok(Some(reply.len())));
    }

    #[test]
    fn a_bulk_string_that_comes_in_pieces_is_not_looked_at() {
        let mut state = ScanState::default();
        assert_eq!(reply_end(b"$1000\r\nabc", &mut state), Ok(None));
        assert_eq!((state.at, state.after_bulk), (1009, true));
    }
}
