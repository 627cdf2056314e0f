//! Replies taken apart without being read: elements of an aggregate, the bytes of a string, a number.
//!
//! For the few forwarded commands whose replies must be merged or looked into; everything else passes as it came. Each
//! function answers `None` for what is not of the kind, an error or a null included.

use bytes::Bytes;

use super::scan::{ScanState, reply_end};

/// The replies that stand one after the other.
pub fn replies(bytes: &Bytes) -> Vec<Bytes> {
    let (mut found, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        match reply_end(&bytes[at..], &mut ScanState::default()) {
            Ok(Some(end)) => {
                found.push(bytes.slice(at..at + end));
                at += end;
            }
            _ => return found,
        }
    }
    found
}

/// The elements of an array, a set, a push or a map (whose fields and values alternate).
pub fn items(reply: &Bytes) -> Option<Vec<Bytes>> {
    let (head, start) = head(reply)?;
    if !matches!(reply.first()?, b'*' | b'~' | b'>' | b'%') || head.starts_with(b"-") {
        return None;
    }
    Some(replies(&reply.slice(start..)))
}

/// The text of a bulk or simple string, a number or a double.
pub fn text(reply: &Bytes) -> Option<Bytes> {
    let (head, start) = head(reply)?;
    match reply.first()? {
        b'$' if head.starts_with(b"-") => None,
        b'$' => reply.len().checked_sub(2).filter(|end| *end >= start).map(|end| reply.slice(start..end)),
        b'+' | b':' | b',' => Some(reply.slice(1..start - 2)),
        _ => None,
    }
}

pub fn integer(reply: &Bytes) -> Option<i64> {
    std::str::from_utf8(&text(reply)?).ok()?.parse().ok()
}

pub fn is_error(reply: &[u8]) -> bool {
    matches!(reply.first(), Some(b'-' | b'!'))
}

pub fn is_null(reply: &[u8]) -> bool {
    matches!(reply, b"$-1\r\n" | b"*-1\r\n" | b"_\r\n")
}

/// The first line behind its mark, and where the next begins.
fn head(reply: &Bytes) -> Option<(&[u8], usize)> {
    let end = memchr::memchr(b'\n', reply)?;
    Some((reply.get(1..end.checked_sub(1)?)?, end + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_come_apart_at_their_joints() {
        let reply = Bytes::from_static(b"*3\r\n$1\r\na\r\n:5\r\n*1\r\n$-1\r\n");
        let parts = items(&reply).unwrap();
        assert_eq!(parts.len(), 3);
        assert_eq!((text(&parts[0]).unwrap().as_ref(), integer(&parts[1])), (&b"a"[..], Some(5)));
        assert!(is_null(&items(&parts[2]).unwrap()[0]));
        assert_eq!(text(&Bytes::from_static(b"$0\r\n\r\n")), Some(Bytes::new()));
        for other in [&b"-ERR x\r\n"[..], b"$-1\r\n", b"*-1\r\n", b"_\r\n", b"*0\r\n"] {
            assert_eq!(text(&Bytes::from_static(other)), None);
        }
        assert_eq!(items(&Bytes::from_static(b"*0\r\n")), Some(Vec::new()));
        assert!(items(&Bytes::from_static(b"*-1\r\n")).is_none() && is_error(b"-ERR x\r\n"));
    }
}
