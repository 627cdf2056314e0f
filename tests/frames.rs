//! What hostile and sloppy clients send, and that the parser takes it as Redis 7 does, byte for byte.
//!
//! [`frames`] is the table; [`answer`] sends one frame to a server and returns all that it says until it hangs up. Here the
//! answers of a real Redis are compared with those of the parser under a toy that knows `PING` and `ECHO`; a test against a
//! GoFlow process can compare with Redis in the same way, and with [`Frame::differs`] where that is set.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};

use bytes::{Bytes, BytesMut};
use goflow::resp::reply::{Protocol, Reply};
use goflow::resp::request::{Bounds, Parsed, Parser, ProtocolError};
use goflow::resp::scan::{ScanState, reply_end};
use proptest::prelude::*;

use crate::support::patience;
use crate::support::servers::{Flavour, Server};

/// What one client sends before it closes its side.
pub struct Frame {
    pub name: &'static str,
    pub bytes: Vec<u8>,
    /// Where it is not Redis's: the answer that is ours, and why.
    pub differs: Option<(&'static [u8], &'static str)>,
}

fn frame(name: &'static str, bytes: impl AsRef<[u8]>) -> Frame {
    Frame { name, bytes: bytes.as_ref().to_vec(), differs: None }
}

fn differing(name: &'static str, bytes: impl AsRef<[u8]>, answer: &'static [u8], why: &'static str) -> Frame {
    Frame { differs: Some((answer, why)), ..frame(name, bytes) }
}

/// Frames for a connection that needs no password.
pub fn frames() -> Vec<Frame> {
    let mut frames = vec![
        frame("an array", "*1\r\n$4\r\nPING\r\n"),
        frame("two words", "*2\r\n$4\r\nECHO\r\n$3\r\nabc\r\n"),
        frame("an empty word", "*2\r\n$4\r\nECHO\r\n$0\r\n\r\n"),
        frame("a word of line ends", "*2\r\n$4\r\nECHO\r\n$4\r\n\r\n\r\n\r\n"),
        frame("a word of NULs", b"*2\r\n$4\r\nECHO\r\n$3\r\n\0\0\0\r\n"),
        frame("a word that looks like a request", "*2\r\n$4\r\nECHO\r\n$14\r\n*1\r\n$4\r\nPING\r\n\r\n"),
        frame("ten thousand in a row", "*1\r\n$4\r\nPING\r\n".repeat(10_000)),
        frame("inline and array in turns", "PING\r\n*1\r\n$4\r\nPING\r\nPING\n"),
        frame("nothing", ""),
        frame("half a count", "*1"),
        frame("half a length", "*1\r\n$"),
        frame("half a word", "*1\r\n$4\r\nPI"),
        frame("a word without its end", "*1\r\n$4\r\nPING"),
        frame("a word with half its end", "*1\r\n$4\r\nPING\r"),
        frame("a request and a half", "*1\r\n$4\r\nPING\r\n*2\r\n$4\r\nECHO\r\n$3\r\nab"),
        frame("an empty array", "*0\r\nPING\r\n"),
        frame("a null array", "*-1\r\nPING\r\n"),
        frame("a negative count", "*-5\r\nPING\r\n"),
        frame("the least count", "*-9223372036854775808\r\nPING\r\n"),
        frame("a count below the least", "*-9223372036854775809\r\nPING\r\n"),
        frame("a count with a plus", "*+1\r\n$4\r\nPING\r\n"),
        frame("a count with a zero before it", "*01\r\n$4\r\nPING\r\n"),
        frame("minus zero words", "*-0\r\nPING\r\n"),
        frame("a count with a space before it", "* 1\r\n$4\r\nPING\r\n"),
        frame("a count with a space behind it", "*1 \r\n$4\r\nPING\r\n"),
        frame("no count", "*\r\n"),
        frame("a count that is a letter", "*a\r\n"),
        frame("a fraction of a count", "*1.5\r\n"),
        frame("a count in hex", "*0x10\r\n"),
        differing(
            "a NUL in the count",
            b"*1\0\r\n$4\r\nPING\r\n",
            b"-ERR Protocol error: invalid multibulk length\r\n",
            "Redis waits for ever behind a NUL",
        ),
        frame("more words than fit 31 bits", "*2147483648\r\n"),
        frame("more words than fit 64 bits", "*99999999999999999999\r\n"),
        frame("many words announced, none sent", "*1048576\r\n"),
        differing(
            "one word too many",
            "*1048577\r\n",
            b"-ERR Protocol error: invalid multibulk length\r\n",
            "a request has at most 1,048,576 words",
        ),
        frame("a line feed alone behind the count", "*1\n$4\r\nPING\r\n"),
        frame("a carriage return alone behind the count", "*1\rx$4\r\nPING\r\n"),
        frame("a carriage return alone behind the length", "*1\r\n$4\rxPING\r\n"),
        frame("a word not closed by CRLF", "*1\r\n$4\r\nPINGxx*1\r\n$4\r\nPING\r\n"),
        frame("an array in an array", "*1\r\n*1\r\n$4\r\nPING\r\n"),
        frame("deep nesting", "*1\r\n".repeat(3_000)),
        frame("an integer for a word", "*1\r\n:4\r\n"),
        frame("a simple string for a word", "*1\r\n+PING\r\n"),
        frame("an error for a word", "*1\r\n-ERR x\r\n"),
        frame("a RESP3 map for a word", "*1\r\n%1\r\n"),
        frame("an empty line for a word", "*1\r\n\r\n"),
        frame("a byte over 127 for a word", b"*1\r\n\xff\r\n"),
        frame("a second word that is none", "*2\r\n$4\r\nECHO\r\nabc\r\n"),
        frame("a null word", "*1\r\n$-1\r\n"),
        frame("a negative length", "*1\r\n$-4\r\nPING\r\n"),
        frame("minus zero bytes", "*1\r\n$-0\r\n\r\n"),
        frame("a length with a plus", "*1\r\n$+4\r\nPING\r\n"),
        frame("a length with a zero before it", "*1\r\n$04\r\nPING\r\n"),
        frame("a length with a space before it", "*1\r\n$ 4\r\nPING\r\n"),
        frame("no length", "*1\r\n$\r\n"),
        frame("a length that is a letter", "*1\r\n$a\r\n"),
        frame("a streamed length", "*1\r\n$?\r\n"),
        frame("the longest word announced, nothing sent", "*1\r\n$536870912\r\n"),
        frame("a word one byte too long", "*1\r\n$536870913\r\n"),
        frame("a length that does not fit 64 bits", "*1\r\n$9223372036854775808\r\n"),
        frame("a length that wraps around", "*1\r\n$18446744073709551620\r\nPING\r\n"),
        frame("a word too short for its length", "*2\r\n$4\r\nECHO\r\n$9\r\nabc\r\nPING"),
        frame("the longest line of a count", [b"*".to_vec(), vec![b'1'; 65_535]].concat()),
        frame("a line of a count too long", [b"*".to_vec(), vec![b'1'; 65_536]].concat()),
        frame("a line of a length too long", [b"*1\r\n$".to_vec(), vec![b'1'; 65_536]].concat()),
    ];
    frames.extend(inline_frames());
    frames
}

fn inline_frames() -> Vec<Frame> {
    vec![
        frame("inline", "PING\r\n"),
        frame("inline, line feed alone", "PING\n"),
        frame("inline, two carriage returns", "PING\r\r\n"),
        frame("inline without an end", "PING"),
        frame("inline, carriage return alone", "PING\r"),
        frame("inline, a carriage return between words", "ECHO a\rb\r\n"),
        frame("inline, spaces around", "  ECHO \t  a  \r\n"),
        frame("empty lines", "\r\n\n \r\n\t\r\n\r\r\nPING\r\n"),
        frame("inline, vertical tab and form feed in a word", b"ECHO a\x0bb\x0cc\r\n"),
        frame("inline, vertical tab before a word", b"ECHO \x0bb\r\n"),
        frame("inline, double quotes", "ECHO \"a b\"\r\n"),
        frame("inline, single quotes", "ECHO 'a b'\r\n"),
        frame("inline, quotes in a word", "ECHO a\"b c\"\r\n"),
        frame("inline, empty quotes", "ECHO \"\"\r\n"),
        frame("inline, empty single quotes", "ECHO ''\r\n"),
        frame("inline, escapes", "ECHO \"\\n\\r\\t\\b\\a\\q\\\\\\\"\"\r\n"),
        frame("inline, hexadecimal escapes", "ECHO \"\\x41\\xff\\xFf\\x0\\xg1\"\r\n"),
        frame("inline, an escaped single quote", "ECHO 'a\\'b\\n'\r\n"),
        frame("inline, bytes over 127", b"ECHO \xff\xfe\r\n"),
        frame("inline, quoted bytes over 127", b"ECHO \"\xff\xfe\"\r\n"),
        frame("inline, a double quote not closed", "ECHO \"a\r\n"),
        frame("inline, a single quote not closed", "ECHO 'a\r\n"),
        frame("inline, a quote not closed behind bytes over 127", b"ECHO \"\xff\xfe\r\n"),
        frame("inline, a quote that ends in a backslash", "ECHO \"a\\\r\n"),
        frame("inline, a quote closed inside a word", "ECHO \"a\"b\r\n"),
        frame("inline, a single quote closed inside a word", "ECHO 'a'b\r\n"),
        frame("inline, a quote opened inside a word", "ECHO a\"b\r\n"),
        frame("inline, a request after unbalanced quotes", "ECHO \"a\r\nPING\r\n"),
        frame("inline, too many words", "ECHO a b c\r\n"),
        frame("the longest inline command", vec![b'a'; 65_536]),
        frame("an inline command too long", vec![b'a'; 65_537]),
        differing("inline, a NUL", b"ECHO a\0b\r\n", b"$3\r\na\0b\r\n", "Redis waits for ever behind a NUL"),
    ]
}

/// Frames for a connection that has yet to give its password.
pub fn frames_before_authentication() -> Vec<Frame> {
    let noauth = b"-NOAUTH Authentication required.\r\n";
    vec![
        frame("an early PING", "PING\r\n"),
        frame("an early request of ten words", ["*10\r\n", &"$4\r\nPING\r\n".repeat(10)].concat()),
        differing(
            "an early request of sixteen words",
            ["*16\r\n", &"$4\r\nPING\r\n".repeat(16)].concat(),
            noauth,
            "HELLO with AUTH and SETNAME has room to grow",
        ),
        frame("an early request of seventeen words", "*17\r\n"),
        frame("the longest early word", ["*2\r\n$4\r\nECHO\r\n$16384\r\n", &"a".repeat(16_384), "\r\n"].concat()),
        frame("an early word too long", "*1\r\n$16385\r\n"),
    ]
}

/// All that a server says to a client that sends this and closes its side.
pub fn answer(address: &str, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(patience())).unwrap();
    // A server that refuses may hang up before it has read all.
    let _ = stream.write_all(bytes).and_then(|()| stream.shutdown(Shutdown::Write));
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        // What it left unread when it hung up resets the connection behind its answer.
        Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("{error} behind {answer:?}"),
        _ => answer,
    }
}

/// The requests that the parser finds when the bytes come in pieces of this size, and why it stopped.
fn parse_in_pieces(bounds: Bounds, bytes: &[u8], piece: usize) -> (Vec<Vec<Bytes>>, Option<ProtocolError>) {
    let (mut parser, mut buffer) = (Parser::new(bounds), BytesMut::new());
    let (mut requests, mut words) = (Vec::new(), Vec::new());
    for piece in bytes.chunks(piece) {
        buffer.extend_from_slice(piece);
        loop {
            match parser.next(&mut buffer, &mut words) {
                Ok(Parsed::Request) => requests.push(words.clone()),
                Ok(Parsed::Incomplete) => break,
                Err(error) => return (requests, Some(error)),
            }
        }
    }
    (requests, None)
}

/// What a server would say that knows two commands.
fn toy_answer(bounds: Bounds, bytes: &[u8], piece: usize) -> Vec<u8> {
    let (requests, error) = parse_in_pieces(bounds, bytes, piece);
    let mut out = BytesMut::new();
    for words in requests {
        let name = String::from_utf8_lossy(&words[0]).to_ascii_lowercase();
        let reply = match (name.as_str(), words.len()) {
            _ if !bounds.authenticated => Reply::RawError("NOAUTH Authentication required.".into()),
            ("ping", 1) => Reply::Simple("PONG"),
            ("echo", 2) => Reply::Bulk(words[1].clone()),
            ("ping" | "echo", _) => {
                Reply::RawError(format!("ERR wrong number of arguments for '{name}' command").into())
            }
            _ => panic!("no frame should hold {words:?}"),
        };
        reply.encode(Protocol::Resp2, &mut out);
    }
    if let Some(error) = error {
        error.reply().encode(Protocol::Resp2, &mut out);
    }
    out.to_vec()
}

fn compare(server: &Server, frames: &[Frame], bounds: Bounds) {
    for Frame { name, bytes, differs } in frames {
        let redis = answer(&server.address(), bytes);
        let expected = differs.map_or(&redis[..], |(ours, _)| ours);
        for piece in [bytes.len().max(1), bytes.len().div_ceil(2).max(1), 7, 1] {
            let ours = toy_answer(bounds, bytes, piece);
            assert!(
                ours == expected,
                "{name}, in pieces of {piece}: expected {:?}, got {:?}",
                String::from_utf8_lossy(expected),
                String::from_utf8_lossy(&ours)
            );
        }
        if let Some((ours, why)) = differs {
            assert!(redis != *ours, "{name} does not differ any more, although {why}");
        }
    }
}

#[test]
fn every_frame_is_taken_as_redis_takes_it_however_it_is_split() {
    let frames = frames();
    assert!(frames.len() >= 60);
    compare(&Server::start(Flavour::Redis7, &[]), &frames, Bounds::default());
    let server = Server::start(Flavour::Redis7, &["--requirepass", "x"]);
    compare(&server, &frames_before_authentication(), Bounds::UNAUTHENTICATED);
}

fn any_words() -> impl Strategy<Value = Vec<Vec<u8>>> {
    prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..8)
}

fn encode(words: &[Vec<u8>]) -> Vec<u8> {
    crate::support::wire::encode(words)
}

/// A word quoted for an inline command, so that any bytes can be sent.
fn quote(word: &[u8]) -> Vec<u8> {
    let escaped: String = word.iter().map(|byte| format!("\\x{byte:02x}")).collect();
    format!("\"{escaped}\"").into_bytes()
}

fn any_reply() -> impl Strategy<Value = Reply> {
    let leaf = prop_oneof![
        any::<i64>().prop_map(Reply::Integer),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(|bytes| Reply::Bulk(bytes.into())),
        any::<bool>().prop_map(Reply::Boolean),
        any::<f64>().prop_map(Reply::Double),
        Just(Reply::OK),
        Just(Reply::Null),
        Just(Reply::NullArray),
        Just(Reply::RawError("ERR no".into())),
    ];
    leaf.prop_recursive(4, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Reply::Array),
            prop::collection::vec(inner.clone(), 0..6).prop_map(Reply::Push),
            prop::collection::vec((inner.clone(), inner), 0..4).prop_map(Reply::Map),
        ]
    })
}

proptest! {
    #[test]
    fn any_split_of_a_pipeline_gives_the_same_requests(
        requests in prop::collection::vec((any_words(), any::<bool>()), 0..12),
        piece in 1usize..100,
    ) {
        let mut bytes = Vec::new();
        for (words, inline) in &requests {
            if *inline {
                bytes.extend(words.iter().map(|word| quote(word)).collect::<Vec<_>>().join(&b' '));
                bytes.extend(b"\r\n");
            } else {
                bytes.extend(encode(words));
            }
        }
        let (parsed, error) = parse_in_pieces(Bounds::default(), &bytes, piece);
        prop_assert_eq!(error, None);
        let sent: Vec<Vec<Vec<u8>>> = requests.into_iter().map(|(words, _)| words).collect();
        prop_assert_eq!(parsed, sent);
    }

    #[test]
    fn what_is_forwarded_is_what_another_parser_reads(words in any_words(), inline in any::<bool>()) {
        use redis_protocol::resp2::{decode::decode, types::OwnedFrame};
        let sent = match inline {
            true => [words.iter().map(|word| quote(word)).collect::<Vec<_>>().join(&b' '), b"\n".to_vec()].concat(),
            false => encode(&words),
        };
        let mut parser = Parser::new(Bounds::default());
        prop_assert_eq!(parser.advance(&mut BytesMut::from(&sent[..])), Ok(Parsed::Request));
        let (frame, length) = decode(parser.raw()).unwrap().unwrap();
        prop_assert_eq!(length, parser.raw().len());
        prop_assert_eq!(frame, OwnedFrame::Array(words.into_iter().map(OwnedFrame::BulkString).collect()));
    }

    #[test]
    fn no_bytes_make_the_parser_panic(
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(&b"*$-+0123456789\r\n\"'\\x "[..])], 0..200),
        piece in 1usize..50,
    ) {
        let whole = parse_in_pieces(Bounds::default(), &bytes, bytes.len().max(1));
        prop_assert_eq!(&whole, &parse_in_pieces(Bounds::default(), &bytes, piece));
        let _ = parse_in_pieces(Bounds::UNAUTHENTICATED, &bytes, piece);
    }

    #[test]
    fn replies_in_a_row_are_told_apart_however_they_are_split(
        replies in prop::collection::vec((any_reply(), any::<bool>()), 1..6),
        piece in 1usize..60,
    ) {
        let mut all = BytesMut::new();
        let mut ends = Vec::new();
        for (reply, resp3) in &replies {
            reply.encode(if *resp3 { Protocol::Resp3 } else { Protocol::Resp2 }, &mut all);
            ends.push(all.len());
        }
        let (mut state, mut begin, mut found) = (ScanState::default(), 0, Vec::new());
        for came in (0..all.len()).step_by(piece).skip(1).chain([all.len()]) {
            while let Some(length) = reply_end(&all[begin..came], &mut state).unwrap() {
                begin += length;
                found.push(begin);
            }
        }
        prop_assert_eq!(found, ends);
    }

    #[test]
    fn no_bytes_make_the_scanner_panic(
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), prop::sample::select(&b"*$-+%|>~!=_#,(0123456789\r\n"[..])], 0..200),
    ) {
        let mut state = ScanState::default();
        for came in 0..bytes.len() {
            if !matches!(reply_end(&bytes[..came], &mut state), Ok(None)) {
                break;
            }
        }
    }
}
