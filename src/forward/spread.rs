//! What becomes of a command over several shards: split and merge where its meaning is kept, every shard where it asks
//! about all, and otherwise one shard or none.
//!
//! Over one shard everything passes as it came, so that replies are the server's own.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::{Forwarded, OWN_KEYS, Request, Started, Ways, check_key, raw};
use crate::command::ordinary::{How, Keys};
use crate::error::{Code, Error, Happened, Result};
use crate::resp::cut;
use crate::resp::reply::{Protocol, Reply, put_bulk, put_header};

/// In a cursor of `SCAN` over several shards the low bits are the shard's index, the rest is the shard's own cursor.
const CURSOR_SHARD_BITS: u32 = 10;
/// How often another key is drawn where a drawn one is the proxy's own.
const RANDOM_KEY_DRAWS: usize = 16;

/// Starts a request that is not of the connection's own state.
pub fn start(ways: &Arc<Ways>, request: Request<'_>) -> Started {
    let Request { row, words, .. } = request;
    if !row.has_arity(words.len()) {
        return row.wrong_arity().into();
    }
    match row.how {
        How::Count | How::Mget | How::Mset => split(ways, request),
        How::Sum if ways.shards() == 1 => pass(ways, request),
        How::Sum => everywhere(ways, request, sum),
        How::Scan => scan(ways, request),
        How::Keys => everywhere(ways, request, |replies, protocol| Reply::Raw(key_list(&replies, protocol))),
        How::RandomKey => Started::Later(Box::pin(random_key(ways.clone(), request.protocol))),
        How::Script => script(ways, request),
        How::Function => function(ways, request),
        How::Refused => refuse(ways, request),
        How::Pass | How::Block(_) | How::Transaction(_) | How::Channel(_) => pass(ways, request),
    }
}

fn pass(ways: &Arc<Ways>, request: Request<'_>) -> Started {
    match ways.shard_of(request.row.keys, request.words) {
        Ok(shard) => Started::Forward(ways.forward(shard, request)),
        Err(error) => request.row.fault(request.words).unwrap_or(error).into(),
    }
}

/// A request of a command that only the servers know.
pub fn start_unknown(ways: &Arc<Ways>, words: Vec<Bytes>, protocol: Protocol, unknown: Error) -> Started {
    let ways = ways.clone();
    Started::Later(Box::pin(async move {
        let Some(keys) = ways.clone().learn(&words).await else { return unknown.into() };
        match ways.shard_of(keys, &words) {
            Ok(shard) => raw(ways.send(shard, protocol, words).await),
            Err(error) => error.into(),
        }
    }))
}

/// The places of the keys, by shard, in the order in which shards are first named.
fn places_by_shard(ways: &Ways, keys: Keys, words: &[Bytes]) -> Result<Vec<(usize, Vec<usize>)>> {
    let mut parts: Vec<(usize, Vec<usize>)> = Vec::new();
    keys.each(words, |at| {
        let Some(key) = words.get(at) else { return Ok(()) };
        check_key(key)?;
        let home = ways.home(key);
        match parts.iter_mut().find(|(shard, _)| *shard == home) {
            Some((_, places)) => places.push(at),
            None => parts.push((home, vec![at])),
        }
        Ok(())
    })?;
    Ok(parts)
}

fn split(ways: &Arc<Ways>, request: Request<'_>) -> Started {
    let Request { row, words, protocol, .. } = request;
    let parts = match places_by_shard(ways, row.keys, words) {
        Ok(parts) if parts.len() < 2 => return pass(ways, request),
        // A value is missing: any shard says so.
        Ok(_) if row.how == How::Mset && words.len().is_multiple_of(2) => return row.wrong_arity().into(),
        Ok(parts) => parts,
        Err(error) => return error.into(),
    };
    let width = if row.how == How::Mset { 2 } else { 1 };
    let send = |(shard, places): &(usize, Vec<usize>)| {
        let rest = places.iter().flat_map(|at| words[*at..(*at + width).min(words.len())].iter().cloned());
        ways.send(*shard, protocol, words.iter().take(1).cloned().chain(rest).collect())
    };
    let sent: Vec<Forwarded> = parts.iter().map(send).collect();
    let how = row.how;
    Started::Later(Box::pin(async move {
        let replies = match join(sent).await {
            Ok(replies) => replies,
            Err(reply) => return reply,
        };
        match how {
            How::Count => sum(replies, protocol),
            How::Mset => Reply::OK,
            _ => Reply::Raw(in_order(&parts, &replies)),
        }
    }))
}

/// All replies; or the first error in their place. Where one part failed the others may have been done, and it says so.
async fn join(sent: Vec<Forwarded>) -> std::result::Result<Vec<Bytes>, Reply> {
    let (mut replies, mut failure) = (Vec::with_capacity(sent.len()), None);
    for part in sent {
        match part.await {
            Ok(reply) if cut::is_error(&reply) => failure = failure.or(Some(Reply::Raw(reply))),
            Ok(reply) => replies.push(reply),
            Err(error) => failure = failure.or(Some(error.into())),
        }
    }
    match failure {
        Some(Reply::Error(mut error)) if !replies.is_empty() => {
            error.text = format!("{} (other shards have done their part)", error.text).into();
            error.happened = Happened::Maybe;
            Err(error.into())
        }
        Some(failure) => Err(failure),
        None => Ok(replies),
    }
}

fn sum(replies: Vec<Bytes>, _: Protocol) -> Reply {
    Reply::Integer(replies.iter().filter_map(cut::integer).sum())
}

/// The values of an `MGET`, back in the order of the keys.
fn in_order(parts: &[(usize, Vec<usize>)], replies: &[Bytes]) -> Bytes {
    let mut values: Vec<(usize, Bytes)> = Vec::new();
    for ((_, places), reply) in parts.iter().zip(replies) {
        values.extend(places.iter().copied().zip(cut::items(reply).unwrap_or_default()));
    }
    values.sort_by_key(|(place, _)| *place);
    let mut out = BytesMut::new();
    put_header(&mut out, b'*', values.len());
    values.iter().for_each(|(_, value)| out.extend_from_slice(value));
    out.freeze()
}

/// Sends the request to every shard and merges what they answer; an error of one is the answer.
fn everywhere(
    ways: &Arc<Ways>,
    request: Request<'_>,
    merge: impl FnOnce(Vec<Bytes>, Protocol) -> Reply + Send + 'static,
) -> Started {
    let Request { words, raw, protocol, .. } = request;
    let sent: Vec<Forwarded> = (0..ways.shards()).map(|shard| ways.pass(shard, protocol, raw, words)).collect();
    Started::Later(Box::pin(async move {
        match join(sent).await {
            Ok(replies) => merge(replies, protocol),
            Err(reply) => reply,
        }
    }))
}

/// The elements of all replies that are not the proxy's own keys, as one array.
fn key_list(replies: &[Bytes], _: Protocol) -> Bytes {
    let keys = replies.iter().flat_map(|reply| cut::items(reply).unwrap_or_default());
    let keys: Vec<Bytes> = keys.filter(|key| cut::text(key).is_none_or(|key| !key.starts_with(OWN_KEYS))).collect();
    let mut out = BytesMut::new();
    put_header(&mut out, b'*', keys.len());
    keys.iter().for_each(|key| out.extend_from_slice(key));
    out.freeze()
}

fn scan(ways: &Arc<Ways>, request: Request<'_>) -> Started {
    let Request { words, protocol, .. } = request;
    let shards = ways.shards();
    let cursor = words.get(1).and_then(|word| std::str::from_utf8(word).ok()?.parse::<u64>().ok());
    let (shard, inner) = match cursor {
        Some(cursor) if shards > 1 => {
            ((cursor & ((1 << CURSOR_SHARD_BITS) - 1)) as usize, Some(cursor >> CURSOR_SHARD_BITS))
        }
        _ => (0, None),
    };
    if shard >= shards {
        return Error::bad("invalid cursor").into();
    }
    let mut words = words.to_vec();
    if let (Some(inner), Some(word)) = (inner, words.get_mut(1)) {
        *word = inner.to_string().into();
    }
    let sent = ways.send(shard, protocol, words);
    Started::Later(Box::pin(async move {
        match sent.await {
            Ok(reply) => Reply::Raw(scanned(reply, shard, shards)),
            Err(error) => error.into(),
        }
    }))
}

/// The page of one shard with the cursor that leads on: in this shard, or to the next.
fn scanned(reply: Bytes, shard: usize, shards: usize) -> Bytes {
    let has_own = memchr::memmem::find(&reply, OWN_KEYS).is_some();
    let Some(parts) = cut::items(&reply).filter(|_| shards > 1 || has_own) else { return reply };
    let (Some(cursor), Some(keys)) = (parts.first().and_then(cut::text), parts.get(1)) else { return reply };
    let cursor = std::str::from_utf8(&cursor).ok().and_then(|cursor| cursor.parse::<u64>().ok()).unwrap_or(0);
    let next = match cursor {
        cursor if shards == 1 => cursor,
        0 if shard + 1 == shards => 0,
        0 => shard as u64 + 1,
        cursor => (cursor << CURSOR_SHARD_BITS) | shard as u64,
    };
    let mut out = BytesMut::new();
    put_header(&mut out, b'*', 2);
    put_bulk(&mut out, next.to_string().as_bytes());
    out.extend_from_slice(&key_list(std::slice::from_ref(keys), Protocol::Resp2));
    out.freeze()
}

/// A key of any shard that has one, from a random shard on.
async fn random_key(ways: Arc<Ways>, protocol: Protocol) -> Reply {
    let first = rand::random_range(0..ways.shards());
    let mut last = Reply::Null;
    for step in 0..ways.shards() {
        let shard = (first + step) % ways.shards();
        for _ in 0..RANDOM_KEY_DRAWS {
            let reply = match ways.send(shard, protocol, vec![Bytes::from_static(b"RANDOMKEY")]).await {
                Ok(reply) => reply,
                Err(error) => return error.into(),
            };
            match cut::text(&reply) {
                Some(key) if key.starts_with(OWN_KEYS) => continue,
                Some(_) => return Reply::Raw(reply),
                None => last = Reply::Raw(reply),
            }
            break;
        }
    }
    last
}

fn is(words: &[Bytes], at: usize, word: &[u8]) -> bool {
    words.get(at).is_some_and(|given| given.eq_ignore_ascii_case(word))
}

fn script(ways: &Arc<Ways>, request: Request<'_>) -> Started {
    let words = request.words;
    if is(words, 1, b"DEBUG") {
        return refused("SCRIPT DEBUG").into();
    }
    if ways.shards() == 1 || is(words, 1, b"HELP") {
        return pass(ways, request);
    }
    if is(words, 1, b"EXISTS") {
        return everywhere(ways, request, |replies, _| {
            let columns: Vec<Vec<Bytes>> = replies.iter().map(|reply| cut::items(reply).unwrap_or_default()).collect();
            let scripts = columns.iter().map(Vec::len).min().unwrap_or(0);
            let is_everywhere = |at: usize| columns.iter().all(|column| cut::integer(&column[at]) == Some(1));
            Reply::Array((0..scripts).map(|at| Reply::Integer(i64::from(is_everywhere(at)))).collect())
        });
    }
    everywhere(ways, request, first)
}

fn function(ways: &Arc<Ways>, request: Request<'_>) -> Started {
    let changes: [&[u8]; 5] = [b"LOAD", b"DELETE", b"FLUSH", b"RESTORE", b"KILL"];
    match changes.iter().any(|change| is(request.words, 1, change)) && ways.shards() > 1 {
        true => everywhere(ways, request, first),
        false => pass(ways, request),
    }
}

fn first(replies: Vec<Bytes>, _: Protocol) -> Reply {
    replies.into_iter().next().map_or(Reply::Null, Reply::Raw)
}

/// A command that does not pass, unless the configuration names it: then every shard gets it.
fn refuse(ways: &Arc<Ways>, request: Request<'_>) -> Started {
    match ways.shared.allowed.iter().any(|name| name == request.row.name) {
        true => everywhere(ways, request, first),
        false => refused(request.row.name).into(),
    }
}

pub fn refused(name: &str) -> Error {
    Error::new(Code::NoPerm, format!("{name} does not pass through this proxy"))
}
