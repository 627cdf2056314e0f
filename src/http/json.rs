//! Replies as JSON: bytes that are text become a string, others an object with their base64. And what of JSON becomes words.

use bytes::Bytes;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::resp::reply::Reply;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// A reply's value; errors inside it become `{"error": ...}`.
pub fn value(reply: &Reply) -> Value {
    match reply {
        Reply::Simple(text) => Value::from(*text),
        Reply::Bulk(bytes) => bytes_value(bytes),
        Reply::Integer(number) => Value::from(*number),
        Reply::Double(number) => Value::from(*number),
        Reply::Boolean(flag) => Value::from(*flag),
        // Raw replies come from backends' own commands, which are not asked for here.
        Reply::Null | Reply::NullArray | Reply::Nothing | Reply::Raw(_) => Value::Null,
        Reply::Array(items) | Reply::Set(items) | Reply::Push(items) | Reply::Many(items) => {
            items.iter().map(value).collect()
        }
        Reply::Map(pairs) => {
            let name = |reply: &Reply| match value(reply) {
                Value::String(text) => text,
                other => other.to_string(),
            };
            Value::Object(pairs.iter().map(|(field, of)| (name(field), value(of))).collect::<Map<_, _>>())
        }
        Reply::Error(error) => Value::from(error.to_string()),
        Reply::RawError(text) => Value::from(String::from_utf8_lossy(text).into_owned()),
    }
}

/// The text of a string, or a number to the letter: read as a double, two ids could become one. `None` for anything else.
pub fn word(value: &RawValue) -> Option<Bytes> {
    let text = value.get();
    match text.as_bytes().first()? {
        b'"' => serde_json::from_str::<String>(text).ok().map(Bytes::from),
        b'-' | b'0'..=b'9' => Some(Bytes::copy_from_slice(text.as_bytes())),
        _ => None,
    }
}

fn bytes_value(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => Value::from(text),
        Err(_) => Value::Object(Map::from_iter([("base64".to_owned(), Value::from(encode(bytes)))])),
    }
}

/// Base64 with padding (RFC 4648).
pub fn encode(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().chain([&0, &0]).take(3).fold(0u32, |word, byte| word << 8 | u32::from(*byte));
        for place in 0..4 {
            out.push(match place <= chunk.len() {
                true => char::from(ALPHABET[(word >> (18 - 6 * place)) as usize & 63]),
                false => '=',
            });
        }
    }
    out
}

/// The bytes of a base64 text, padded or not; `None` where it is none.
pub fn decode(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=');
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    for chunk in text.as_bytes().chunks(4) {
        let mut word = 0u32;
        for byte in chunk {
            word = word << 6 | ALPHABET.iter().position(|letter| letter == byte)? as u32;
        }
        let bytes = (word << (6 * (4 - chunk.len()))).to_be_bytes();
        let len = chunk.len().checked_sub(1).filter(|len| *len > 0)?;
        out.extend_from_slice(&bytes[1..=len]);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn base64_is_that_of_the_standard() {
        for (plain, coded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")] {
            assert_eq!(encode(plain.as_bytes()), coded);
            assert_eq!(decode(coded).unwrap(), plain.as_bytes());
        }
        assert!(decode("Z").is_none() && decode("Zg!=").is_none());
    }

    proptest! {
        #[test]
        fn base64_is_read_back(bytes: Vec<u8>) {
            prop_assert_eq!(decode(&encode(&bytes)), Some(bytes));
        }
    }

    #[test]
    fn maps_are_objects_and_bytes_that_are_no_text_are_base64() {
        let reply = Reply::Map(vec![
            (Reply::text("id"), Reply::bulk("3~s1")),
            (Reply::text("payload"), Reply::bulk([0xff, 0xfe])),
            (Reply::text("attempt"), Reply::Integer(1)),
        ]);
        let expected = serde_json::json!({"id": "3~s1", "payload": {"base64": "//4="}, "attempt": 1});
        assert_eq!(value(&reply), expected);
    }
}
