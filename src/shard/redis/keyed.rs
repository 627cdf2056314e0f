//! What one batch says to `keyed.lua` about one lock or semaphore, and what the script answers.
//!
//! Also the words of its wake-ups, which share the channel of the queues': a mark that no name holds, then the name.

use std::sync::LazyLock;

use bytes::{BufMut, BytesMut};
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

/// One call for some deeds on one object.
pub fn command<'a>(
    keys: &Keys,
    kind: Keyed,
    name: &Name,
    deeds: impl Iterator<Item = &'a Deed>,
    at: Option<UnixMs>,
) -> Cmd {
    let mut command = redis::cmd("EVALSHA");
    command.arg(&*DIGEST).arg(1).arg(keys.of_object(kind, name));
    let mut scratch = BytesMut::new();
    put_short(&mut scratch, at.unwrap_or(0));
    scratch.put_u8(u8::from(kind == Keyed::Lock));
    put_bytes(&mut scratch, keys.wake().as_bytes());
    put_bytes(&mut scratch, format!("{}{name}", mark(kind)).as_bytes());
    command.arg(&scratch[..]);
    for deed in deeds {
        scratch.clear();
        let letter = put_deed(&mut scratch, deed);
        command.arg(letter).arg(&scratch[..]);
    }
    command
}

fn put_deed(out: &mut BytesMut, deed: &Deed) -> &'static str {
    match deed {
        Deed::Acquire { token, limit, ttl_ms, owner, waits, moved_in } => {
            put_short(out, *token);
            out.put_u32(*limit);
            put_short(out, *ttl_ms);
            out.put_u8(u8::from(*waits));
            out.put_u32((fence_floor(*moved_in) >> 32) as u32);
            out.put_slice(owner);
            "a"
        }
        Deed::Release { token } => {
            put_short(out, *token);
            "r"
        }
        Deed::Renew { token, ttl_ms } => {
            put_short(out, *token);
            put_short(out, *ttl_ms);
            "x"
        }
        Deed::Show => "s",
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
