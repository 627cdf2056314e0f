//! A raw client: bytes out, RESP2 or RESP3 values in, and a deadline on everything.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use super::patience;

/// One reply as it stood on the wire.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Simple(String),
    Error(String),
    Integer(i64),
    Bulk(Vec<u8>),
    Null,
    Array(Vec<Value>),
    Map(Vec<(Value, Value)>),
    Push(Vec<Value>),
    Double(f64),
    Boolean(bool),
}

impl Value {
    /// The text of a simple string, a bulk string or an error; panics for anything else.
    pub fn text(&self) -> String {
        match self {
            Value::Simple(text) | Value::Error(text) => text.clone(),
            Value::Bulk(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            other => panic!("expected a text, got {other:?}"),
        }
    }

    pub fn integer(&self) -> i64 {
        match self {
            Value::Integer(number) => *number,
            other => panic!("expected an integer, got {other:?}"),
        }
    }

    pub fn items(&self) -> &[Value] {
        match self {
            Value::Array(items) | Value::Push(items) => items,
            other => panic!("expected an array, got {other:?}"),
        }
    }

    /// The value of a field, of a RESP3 map or of a flat RESP2 list alike.
    pub fn field(&self, name: &str) -> &Value {
        let is_name = |value: &Value| *value == Value::Bulk(name.into()) || *value == Value::Simple(name.into());
        let found = match self {
            Value::Map(pairs) => pairs.iter().find(|(field, _)| is_name(field)).map(|(_, value)| value),
            Value::Array(items) => items.chunks_exact(2).find(|pair| is_name(&pair[0])).map(|pair| &pair[1]),
            _ => None,
        };
        found.unwrap_or_else(|| panic!("no field {name} in {self:?}"))
    }

    /// Whether this is an error that starts with the code.
    pub fn is_error(&self, code: &str) -> bool {
        matches!(self, Value::Error(text) if text.split(' ').next() == Some(code))
    }
}

/// One connection.
pub struct Wire {
    stream: TcpStream,
    unread: Vec<u8>,
}

/// Why no reply was read.
#[derive(Debug, PartialEq, Eq)]
pub enum NoReply {
    Closed,
    TimedOut,
}

impl Wire {
    /// Connects, for as long as it takes the other side to listen.
    pub fn connect(address: &str) -> Wire {
        let stream = crate::eventually!(format!("{address} accepts"), TcpStream::connect(address).ok());
        stream.set_nodelay(true).unwrap();
        stream.set_write_timeout(Some(patience())).unwrap();
        Wire { stream, unread: Vec::new() }
    }

    /// Speaks over a connection that stands.
    pub fn over(stream: TcpStream) -> Wire {
        stream.set_nodelay(true).unwrap();
        stream.set_write_timeout(Some(patience())).unwrap();
        Wire { stream, unread: Vec::new() }
    }

    /// Connects once.
    pub fn try_connect(address: &str) -> Option<Wire> {
        let stream = TcpStream::connect(address).ok()?;
        stream.set_nodelay(true).ok()?;
        stream.set_write_timeout(Some(patience())).ok()?;
        Some(Wire { stream, unread: Vec::new() })
    }

    pub fn send_raw(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    pub fn send<A: AsRef<[u8]>>(&mut self, args: &[A]) {
        self.send_raw(encode(args));
    }

    /// Sends one command and reads its reply.
    pub fn call<A: AsRef<[u8]>>(&mut self, args: &[A]) -> Value {
        self.send(args);
        self.read()
    }

    /// Sends one command in a line of words and reads its reply.
    pub fn say(&mut self, line: &str) -> Value {
        self.call(&line.split_ascii_whitespace().collect::<Vec<_>>())
    }

    /// Sends one command and reads its reply, unless the connection breaks or nothing comes in time.
    pub fn try_call<A: AsRef<[u8]>>(&mut self, args: &[A], within: Duration) -> Result<Value, NoReply> {
        self.stream.write_all(&encode(args)).map_err(|_| NoReply::Closed)?;
        self.try_read(within)
    }

    /// Reads one reply; panics when none comes.
    pub fn read(&mut self) -> Value {
        self.try_read(patience()).unwrap_or_else(|why| panic!("no reply: {why:?}; unread: {:?}", self.unread))
    }

    pub fn try_read(&mut self, within: Duration) -> Result<Value, NoReply> {
        let deadline = Instant::now() + within;
        loop {
            if let Some((value, len)) = parse(&self.unread) {
                self.unread.drain(..len);
                return Ok(value);
            }
            self.fill(deadline)?;
        }
    }

    /// Whether what comes next begins so, as far as has come; it is left to be read.
    pub fn begins(&mut self, start: &[u8]) -> bool {
        let mut there = [0; 16];
        let count = self.stream.peek(&mut there[..start.len()]).unwrap();
        self.unread.is_empty() && count == start.len() && there.starts_with(start)
    }

    /// Reads one line as it is, without its end.
    pub fn read_line(&mut self) -> String {
        let deadline = Instant::now() + patience();
        loop {
            if let Some((line, len)) = line(&self.unread) {
                let text = String::from_utf8_lossy(line).into_owned();
                self.unread.drain(..len);
                return text;
            }
            self.fill(deadline).unwrap();
        }
    }

    /// Reads until the other side closes and returns what came before.
    pub fn read_to_close(&mut self) -> Vec<u8> {
        let deadline = Instant::now() + patience();
        loop {
            match self.fill(deadline) {
                Ok(()) => {}
                Err(NoReply::Closed) => return std::mem::take(&mut self.unread),
                Err(NoReply::TimedOut) => panic!("the connection was not closed"),
            }
        }
    }

    /// Says that nothing more will be sent.
    pub fn finish(&mut self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
    }

    fn fill(&mut self, deadline: Instant) -> Result<(), NoReply> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(NoReply::TimedOut);
        }
        self.stream.set_read_timeout(Some(left)).unwrap();
        let mut chunk = [0; 16 * 1024];
        match self.stream.read(&mut chunk) {
            Ok(0) => Err(NoReply::Closed),
            Ok(len) => {
                self.unread.extend_from_slice(&chunk[..len]);
                Ok(())
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Err(NoReply::TimedOut),
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(()),
            Err(_) => Err(NoReply::Closed),
        }
    }
}

/// A command as clients send it.
pub fn encode<A: AsRef<[u8]>>(args: &[A]) -> Vec<u8> {
    let mut out = format!("*{}\r\n", args.len()).into_bytes();
    for arg in args {
        out.extend_from_slice(format!("${}\r\n", arg.as_ref().len()).as_bytes());
        out.extend_from_slice(arg.as_ref());
        out.extend_from_slice(b"\r\n");
    }
    out
}

fn line(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let end = bytes.windows(2).position(|pair| pair == b"\r\n")?;
    Some((&bytes[..end], end + 2))
}

/// The first complete value and its length; `None` while it is not complete. Panics on what is not RESP.
pub fn parse(bytes: &[u8]) -> Option<(Value, usize)> {
    let (head, mut at) = line(bytes)?;
    let text = String::from_utf8_lossy(&head[1..]).into_owned();
    let number = || text.parse::<i64>().unwrap_or_else(|_| panic!("not RESP: {:?}", String::from_utf8_lossy(head)));
    let mut many = |count: i64| {
        let mut items = Vec::new();
        for _ in 0..count {
            let (item, len) = parse(&bytes[at..])?;
            items.push(item);
            at += len;
        }
        Some((items, at))
    };
    let (value, end) = match head[0] {
        b'+' => (Value::Simple(text), at),
        b'-' => (Value::Error(text), at),
        b':' => (Value::Integer(number()), at),
        b'_' => (Value::Null, at),
        b',' => (Value::Double(text.parse().unwrap()), at),
        b'#' => (Value::Boolean(text == "t"), at),
        b'$' | b'*' if number() < 0 => (Value::Null, at),
        b'$' | b'=' => {
            let end = at + number() as usize;
            if bytes.len() < end + 2 {
                return None;
            }
            assert_eq!(&bytes[end..end + 2], b"\r\n", "a bulk string is longer than it says");
            (Value::Bulk(bytes[at..end].to_vec()), end + 2)
        }
        b'*' | b'~' => many(number()).map(|(items, end)| (Value::Array(items), end))?,
        b'>' => many(number()).map(|(items, end)| (Value::Push(items), end))?,
        b'%' => many(number() * 2).map(|(items, end)| {
            let mut items = items.into_iter();
            let pairs = std::iter::from_fn(|| Some((items.next()?, items.next()?))).collect();
            (Value::Map(pairs), end)
        })?,
        _ => panic!("not RESP: {:?}", String::from_utf8_lossy(head)),
    };
    Some((value, end))
}
