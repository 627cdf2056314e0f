//! Replies as values and their encoding for RESP2 and RESP3.
//!
//! Commands speak in [`Reply`]; the session writes it in the protocol that its client chose with `HELLO`. A map is a
//! RESP3 map and, on RESP2, the flat array of its fields and values. The only place that writes an [`Error`] to a client.

use bytes::{BufMut, Bytes, BytesMut};

use crate::error::Error;

/// The protocol that a connection speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    #[default]
    Resp2,
    Resp3,
}

/// One reply.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// `+text`; never holds a newline.
    Simple(&'static str),
    Bulk(Bytes),
    Integer(i64),
    Double(f64),
    Boolean(bool),
    /// `$-1` on RESP2.
    Null,
    /// `*-1` on RESP2: what a blocking pop answers when its time is up.
    NullArray,
    Array(Vec<Reply>),
    /// A RESP3 set; on RESP2 a plain array.
    Set(Vec<Reply>),
    Map(Vec<(Reply, Reply)>),
    /// A RESP3 push; on RESP2 a plain array.
    Push(Vec<Reply>),
    Error(Error),
    /// An error in a backend's or Redis's own words, without the leading `-`.
    RawError(Bytes),
    /// Bytes of one or more complete replies that are passed on as they are.
    Raw(Bytes),
    /// Several replies in a row, for commands that answer more than once (`SUBSCRIBE a b`).
    Many(Vec<Reply>),
    /// No reply at all (`CLIENT REPLY SKIP`).
    Nothing,
}

impl Reply {
    pub const OK: Reply = Reply::Simple("OK");

    pub fn bulk(text: impl AsRef<[u8]>) -> Reply {
        Reply::Bulk(Bytes::copy_from_slice(text.as_ref()))
    }

    pub fn text(text: &'static str) -> Reply {
        Reply::Bulk(Bytes::from_static(text.as_bytes()))
    }

    pub fn count(number: u64) -> Reply {
        Reply::Integer(i64::try_from(number).unwrap_or(i64::MAX))
    }

    /// About how many bytes it takes on the wire, told without writing it.
    pub fn size(&self) -> usize {
        const MARK_AND_END: usize = 3;
        let inside = match self {
            Reply::Simple(text) => text.len(),
            Reply::Bulk(bytes) | Reply::RawError(bytes) | Reply::Raw(bytes) => bytes.len(),
            Reply::Error(error) => error.text.len(),
            Reply::Array(items) | Reply::Set(items) | Reply::Push(items) | Reply::Many(items) => {
                items.iter().map(Reply::size).sum()
            }
            Reply::Map(pairs) => pairs.iter().map(|(field, value)| field.size() + value.size()).sum(),
            Reply::Integer(_) | Reply::Double(_) | Reply::Boolean(_) => 1,
            Reply::Null | Reply::NullArray | Reply::Nothing => 0,
        };
        MARK_AND_END + inside
    }

    /// Appends the reply as it stands on the wire.
    pub fn encode(&self, protocol: Protocol, out: &mut BytesMut) {
        let resp3 = protocol == Protocol::Resp3;
        match self {
            Reply::Simple(text) => put_line(out, b'+', text.as_bytes()),
            Reply::Bulk(bytes) => put_bulk(out, bytes),
            Reply::Integer(number) => {
                out.put_u8(b':');
                put_i64(out, *number);
                out.put_slice(b"\r\n");
            }
            Reply::Double(number) if resp3 => put_line(out, b',', format_double(*number).as_bytes()),
            Reply::Double(number) => put_bulk(out, format_double(*number).as_bytes()),
            Reply::Boolean(yes) if resp3 => out.put_slice(if *yes { b"#t\r\n" } else { b"#f\r\n" }),
            Reply::Boolean(yes) => out.put_slice(if *yes { b":1\r\n" } else { b":0\r\n" }),
            Reply::Null | Reply::NullArray if resp3 => out.put_slice(b"_\r\n"),
            Reply::Null => out.put_slice(b"$-1\r\n"),
            Reply::NullArray => out.put_slice(b"*-1\r\n"),
            Reply::Array(items) => put_items(out, b'*', items, protocol),
            Reply::Set(items) => put_items(out, if resp3 { b'~' } else { b'*' }, items, protocol),
            Reply::Push(items) => put_items(out, if resp3 { b'>' } else { b'*' }, items, protocol),
            Reply::Map(pairs) => {
                put_map_header(out, pairs.len(), protocol);
                for (field, value) in pairs {
                    field.encode(protocol, out);
                    value.encode(protocol, out);
                }
            }
            Reply::Error(error) => put_error(out, error),
            Reply::RawError(text) => put_line(out, b'-', text),
            Reply::Raw(bytes) => out.put_slice(bytes),
            Reply::Many(replies) => replies.iter().for_each(|reply| reply.encode(protocol, out)),
            Reply::Nothing => {}
        }
    }
}

impl From<Error> for Reply {
    fn from(error: Error) -> Reply {
        Reply::Error(error)
    }
}

fn put_items(out: &mut BytesMut, mark: u8, items: &[Reply], protocol: Protocol) {
    put_header(out, mark, items.len());
    items.iter().for_each(|item| item.encode(protocol, out));
}

/// `*<count>\r\n` and its like.
pub fn put_header(out: &mut BytesMut, mark: u8, count: usize) {
    out.put_u8(mark);
    put_i64(out, count as i64);
    out.put_slice(b"\r\n");
}

/// The header of a map with so many pairs: a map on RESP3, a flat array on RESP2.
pub fn put_map_header(out: &mut BytesMut, pairs: usize, protocol: Protocol) {
    match protocol {
        Protocol::Resp3 => put_header(out, b'%', pairs),
        Protocol::Resp2 => put_header(out, b'*', pairs * 2),
    }
}

pub fn put_bulk(out: &mut BytesMut, bytes: &[u8]) {
    put_header(out, b'$', bytes.len());
    out.put_slice(bytes);
    out.put_slice(b"\r\n");
}

/// An error line. What it quotes may come from a client, so line ends become spaces.
pub fn put_error(out: &mut BytesMut, error: &Error) {
    out.put_u8(b'-');
    out.put_slice(error.code.word().as_bytes());
    put_line(out, b' ', error.text.as_bytes());
}

fn put_line(out: &mut BytesMut, mark: u8, text: &[u8]) {
    out.put_u8(mark);
    for byte in text {
        out.put_u8(if matches!(byte, b'\r' | b'\n') { b' ' } else { *byte });
    }
    out.put_slice(b"\r\n");
}

pub fn put_i64(out: &mut impl BufMut, number: i64) {
    if number < 0 {
        out.put_u8(b'-');
    }
    let mut rest = number.unsigned_abs();
    let mut digits = [0u8; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.put_slice(&digits[at..]);
}

/// As Redis 7.0 writes a double: `inf`, `-inf`, `nan`, or what C writes for `%.17g`.
pub fn format_double(number: f64) -> String {
    const DIGITS: i32 = 17;
    if !number.is_finite() {
        return if number.is_nan() {
            "nan"
        } else if number > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .into();
    }
    let scientific = format!("{number:.*e}", (DIGITS - 1) as usize);
    let Some((mantissa, exponent)) = scientific.split_once('e') else { return scientific };
    let exponent: i32 = exponent.parse().unwrap_or_default();
    let trimmed = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    if (-4..DIGITS).contains(&exponent) {
        return trimmed(&format!("{number:.*}", (DIGITS - 1 - exponent) as usize));
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{}e{sign}{:02}", trimmed(mantissa), exponent.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;

    fn wire(reply: Reply, protocol: Protocol) -> String {
        let mut out = BytesMut::new();
        reply.encode(protocol, &mut out);
        String::from_utf8_lossy(&out).into_owned()
    }

    #[test]
    fn each_reply_is_written_as_its_protocol_has_it() {
        let map = || Reply::Map(vec![(Reply::text("a"), Reply::Integer(-7)), (Reply::text("b"), Reply::Null)]);
        assert_eq!(wire(map(), Protocol::Resp2), "*4\r\n$1\r\na\r\n:-7\r\n$1\r\nb\r\n$-1\r\n");
        assert_eq!(wire(map(), Protocol::Resp3), "%2\r\n$1\r\na\r\n:-7\r\n$1\r\nb\r\n_\r\n");
        assert_eq!(wire(Reply::NullArray, Protocol::Resp2), "*-1\r\n");
        assert_eq!(wire(Reply::Integer(i64::MIN), Protocol::Resp2), ":-9223372036854775808\r\n");
        assert_eq!(wire(Reply::Push(vec![Reply::OK]), Protocol::Resp3), ">1\r\n+OK\r\n");
        assert_eq!(wire(Reply::Double(1.5), Protocol::Resp3), ",1.5\r\n");
        assert_eq!(wire(Reply::Set(vec![Reply::OK]), Protocol::Resp3), "~1\r\n+OK\r\n");
        assert_eq!(wire(Reply::Set(vec![Reply::OK]), Protocol::Resp2), "*1\r\n+OK\r\n");
    }

    #[test]
    fn a_reply_is_not_much_larger_than_it_says() {
        let item = || Reply::Bulk(vec![b'x'; 1_000].into());
        let large = Reply::Map(vec![(Reply::OK, Reply::Array(vec![item(), item()])), (Reply::Integer(1), item())]);
        let written = wire(large.clone(), Protocol::Resp3).len();
        assert!((3_000..=written).contains(&large.size()), "{} of {written}", large.size());
    }

    #[test]
    fn a_double_is_written_as_redis_writes_it() {
        for (number, text) in [
            (0.0, "0"),
            (-0.0, "-0"),
            (0.1, "0.10000000000000001"),
            (100.0, "100"),
            (1e16, "10000000000000000"),
            (1e17, "1e+17"),
            (1.5e300, "1.5000000000000001e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1.0000000000000001e-05"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(format_double(number), text);
        }
    }

    #[test]
    fn an_error_stays_on_one_line_whatever_it_quotes() {
        let error = Error::new(Code::TooBig, "a\r\n+OK\nb");
        assert_eq!(wire(error.into(), Protocol::Resp2), "-TOOBIG a  +OK b\r\n");
    }
}
