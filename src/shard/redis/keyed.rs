//! What one batch says to `keyed.lua` about locks or about semaphores, and what the script answers.
//!
//! Also the words of its wake-ups, which share the channel of the queues': a mark that no name holds, then the name.

use std::collections::HashMap;
use std::sync::LazyLock;

use bytes::{BufMut, BytesMut};
use foldhash::fast::RandomState;
use redis::{Cmd, Value};

use super::Keys;
use super::batch::{int, list, put_bytes, put_short, text};
use crate::clock::UnixMs;
use crate::job::Name;
use crate::shard::{Deed, Holder, Keyed, Outcome, Wake, fence_floor};

/// The script.
pub const SCRIPT: &str = include_str!("keyed.lua");

static DIGEST: LazyLock<String> = LazyLock::new(|| redis::Script::new(SCRIPT).get_hash().to_owned());

fn mark(kind: Keyed) -> char {
    match kind {
        Keyed::Lock => '!',
        Keyed::Semaphore => '?',
    }
}

/// The message that the map is another.
pub const MAP_CHANGED: &str = "#map";

/// What a message on the wake channel says.
pub fn read_wake(message: &[u8]) -> Wake {
    let freed = |kind: Keyed| {
        let name = message.strip_prefix(&[mark(kind) as u8])?;
        Some(Wake::Freed(kind, Name::parse(name).ok()?))
    };
    let deaths = || Some(Wake::Deaths(Name::parse(message.strip_prefix(b"*")?).ok()?));
    match Name::parse(message) {
        Ok(queue) => Wake::Queue(queue),
        Err(_) if message == MAP_CHANGED.as_bytes() => Wake::Map,
        Err(_) => {
            let known = deaths().or_else(|| freed(Keyed::Lock)).or_else(|| freed(Keyed::Semaphore));
            known.unwrap_or(Wake::Missed)
        }
    }
}

/// One call for deeds on some objects of one kind.
pub fn command<'a>(
    keys: &Keys,
    kind: Keyed,
    deeds: impl Iterator<Item = (&'a Name, &'a Deed)>,
    at: Option<UnixMs>,
) -> Cmd {
    let mut places: HashMap<&Name, u16, RandomState> = HashMap::default();
    let mut names = Vec::new();
    let mut scratch = BytesMut::with_capacity(1024);
    let mut ends = Vec::new();
    for (name, deed) in deeds {
        let place = *places.entry(name).or_insert_with(|| {
            names.push(name);
            names.len() as u16
        });
        put_deed(&mut scratch, place, deed);
        ends.push(scratch.len());
    }
    let mut command = redis::cmd("EVALSHA");
    command.arg(&*DIGEST).arg(names.len());
    let mut key = keys.of_objects(kind);
    let prefix = key.len();
    for name in names {
        key.truncate(prefix);
        key.push_str(name.as_str());
        command.arg(key.as_bytes());
    }
    let mut header = BytesMut::new();
    put_short(&mut header, at.unwrap_or(0));
    header.put_u8(mark(kind) as u8);
    header.put_u8(prefix as u8);
    put_bytes(&mut header, keys.wake().as_bytes());
    command.arg(&header[..]);
    let mut start = 0;
    for end in ends {
        command.arg(&scratch[start..end]);
        start = end;
    }
    command
}

fn put_deed(out: &mut BytesMut, place: u16, deed: &Deed) {
    let mut begin = |letter: u8, token: u64| {
        out.put_u8(letter);
        out.put_u16(place);
        put_short(out, token);
    };
    match deed {
        Deed::Acquire { token, limit, ttl_ms, owner, waits, moved_in } => {
            begin(b'a', *token);
            out.put_u32(*limit);
            put_short(out, *ttl_ms);
            out.put_u8(u8::from(*waits));
            out.put_u32((fence_floor(*moved_in) >> 32) as u32);
            out.put_u32(owner.len() as u32);
            out.put_slice(owner);
        }
        Deed::Release { token } => begin(b'r', *token),
        Deed::Renew { token, ttl_ms } => {
            begin(b'x', *token);
            put_short(out, *ttl_ms);
        }
        Deed::Show => begin(b's', 0),
    }
}

/// The outcome of a deed; `None` when this is no answer of the script.
pub fn read_outcome(deed: &Deed, value: Value) -> Option<Outcome> {
    Some(match deed {
        Deed::Acquire { .. } => match int(&value)? {
            left @ ..0 => Outcome::NotFree { free_in: left.unsigned_abs() },
            fence => Outcome::Granted { fence: fence.unsigned_abs() },
        },
        Deed::Release { .. } | Deed::Renew { .. } => Outcome::Count(int(&value)?.unsigned_abs()),
        Deed::Show => {
            let mut values = list(value)?.into_iter();
            let fence = int(&values.next()?)?.unsigned_abs();
            let mut holders = Vec::new();
            while let Some(owner) = values.next() {
                holders.push(Holder { owner: text(owner)?, left_ms: int(&values.next()?)?.unsigned_abs() });
            }
            Outcome::Holders { fence, holders }
        }
    })
}
