//! `GOFLOW.LOCK` and `GOFLOW.SEM`: locks with fences, and semaphores.
//!
//! A token on the wire is twelve hexadecimal digits that any proxy takes; a text that is none holds nothing.

use bytes::Bytes;

use super::args::{Arg, Args, Kind, MS, MS_FROM_1};
use super::{Acquire, Context, Flag, Group, Plan, Route, Spec};
use crate::error::{Code, Result};
use crate::job::{Name, TOKEN_MAX};
use crate::resp::reply::Reply;
use crate::shard::{Action, Deed, Holder, Keyed, Op, Outcome};

/// Most holders of one semaphore: every operation on it costs so many steps.
const HOLDERS_MAX: i64 = 10_000;
/// Longest text of `OWNER` that is kept.
const OWNER_BYTES_MAX: usize = 512;

const NAME: Arg = Arg::new("name", Kind::Queue);
const TTL: Arg = Arg::new("ttl-ms", MS_FROM_1);
const TOKEN: Arg = Arg::new("token", Kind::Text);
const SLOT: Arg = Arg::new("slot", Kind::Text);
const LIMIT: Arg = Arg::new("limit", Kind::Integer(1, HOLDERS_MAX));
const WAIT: Arg = Arg::option("WAIT", "ms", MS);
const OWNER: Arg = Arg::option("OWNER", "text", Kind::Text);
const BIND: Arg = Arg::flag("BIND", "bind");

const LOCK: Spec = Spec { group: Group::Locks, errors: &[Code::ShardDown, Code::Overloaded], ..Spec::BASE };

pub static ROWS: &[Spec] = &[
    Spec {
        examples: "\
> GOFLOW.LOCK HELP
 1) \"GOFLOW.LOCK <subcommand> [<arg> [value] [opt] ...]. Subcommands are:\"
...",
        ..Spec::container("GOFLOW.LOCK", Group::Locks, "0.1.0", "Distributed locks with fences.")
    },
    Spec {
        name: "GOFLOW.LOCK|ACQUIRE",
        summary: "Takes a lock.",
        args: &[NAME, TTL, WAIT, OWNER, BIND],
        flags: &[Flag::Write, Flag::Blocking, Flag::Fast],
        reply: "An array of the token, by which the lock is released and renewed, and the fence; null when the lock was \
                not free in time.",
        notes: "The fence is an integer that grows with every grant of that name, over expiry and restarts: give it to \
                what the lock guards, and let that refuse a smaller one than it has seen. Those who `WAIT` through one \
                proxy are served in the order they came; one that hangs up gets nothing. With `BIND` the proxy renews the \
                lock while the connection lives and releases it when that closes. `OWNER` is a text for `INFO`.",
        examples: "\
> GOFLOW.LOCK ACQUIRE report 30000
1) \"<token>\"
2) (integer) <fence>
> GOFLOW.LOCK ACQUIRE report 30000
(nil)
> GOFLOW.LOCK RELEASE report <token>
(integer) 1",
        plan: |args, context| acquire(Keyed::Lock, args, context),
        ..LOCK
    },
    Spec {
        name: "GOFLOW.LOCK|RELEASE",
        summary: "Gives a lock back.",
        args: &[NAME, TOKEN],
        flags: &[Flag::Write, Flag::Fast],
        reply: "1, or 0 when the token holds nothing.",
        examples: "\
> GOFLOW.LOCK RELEASE report 0123456789ab
(integer) 0",
        plan: |args, _| release(Keyed::Lock, args, "token"),
        ..LOCK
    },
    Spec {
        name: "GOFLOW.LOCK|RENEW",
        summary: "Holds a lock for so long from now.",
        args: &[NAME, TOKEN, TTL],
        flags: &[Flag::Write, Flag::Fast],
        reply: "1, or 0 when the token holds nothing.",
        notes: "A lock that was taken with `BIND` is renewed by itself, each time for the span it was taken for.",
        examples: "\
> GOFLOW.LOCK ACQUIRE nightly 30000
1) \"<token>\"
2) (integer) 1
> GOFLOW.LOCK RENEW nightly <token> 60000
(integer) 1
> GOFLOW.LOCK RELEASE nightly <token>
(integer) 1",
        plan: |args, _| renew(Keyed::Lock, args, "token"),
        ..LOCK
    },
    Spec {
        name: "GOFLOW.LOCK|INFO",
        summary: "Shows who holds a lock.",
        args: &[NAME],
        flags: &[Flag::ReadOnly, Flag::Fast],
        reply: "A map of `owner`, `fence`, `ttl` in milliseconds, and `waiting`: how many wait for it through this proxy. \
                Null when the lock is free.",
        examples: "\
> GOFLOW.LOCK INFO free-lock
(nil)
> GOFLOW.LOCK ACQUIRE deploy 60000 OWNER ci-7
1) \"<token>\"
2) (integer) 1
> GOFLOW.LOCK INFO deploy
1# \"owner\" => \"ci-7\"
2# \"fence\" => (integer) 1
3# \"ttl\" => (integer) <ttl>
4# \"waiting\" => (integer) 0",
        plan: |args, _| show(Keyed::Lock, args, Box::new(lock_info)),
        ..LOCK
    },
    Spec {
        examples: "\
> GOFLOW.SEM HELP
 1) \"GOFLOW.SEM <subcommand> [<arg> [value] [opt] ...]. Subcommands are:\"
...",
        ..Spec::container("GOFLOW.SEM", Group::Locks, "0.1.0", "Semaphores: so many holders at once.")
    },
    Spec {
        name: "GOFLOW.SEM|ACQUIRE",
        summary: "Takes a slot of a semaphore.",
        args: &[NAME, LIMIT, TTL, WAIT, OWNER, BIND],
        flags: &[Flag::Write, Flag::Blocking],
        reply: "The slot's token; null when none was free in time.",
        notes: "It is granted only while fewer slots are held than the `limit` of this call. `WAIT`, `OWNER` and `BIND` \
                are as for `GOFLOW.LOCK ACQUIRE`.",
        examples: "\
> GOFLOW.SEM ACQUIRE gpu 1 30000
\"<slot>\"
> GOFLOW.SEM ACQUIRE gpu 1 30000
(nil)
> GOFLOW.SEM RELEASE gpu <slot>
(integer) 1",
        plan: |args, context| acquire(Keyed::Semaphore, args, context),
        ..LOCK
    },
    Spec {
        name: "GOFLOW.SEM|RELEASE",
        summary: "Gives a slot back.",
        args: &[NAME, SLOT],
        flags: &[Flag::Write],
        reply: "1, or 0 when the slot is not held.",
        examples: "\
> GOFLOW.SEM RELEASE gpu 0123456789ab
(integer) 0",
        plan: |args, _| release(Keyed::Semaphore, args, "slot"),
        ..LOCK
    },
    Spec {
        name: "GOFLOW.SEM|RENEW",
        summary: "Holds a slot for so long from now.",
        args: &[NAME, SLOT, TTL],
        flags: &[Flag::Write],
        reply: "1, or 0 when the slot is not held.",
        examples: "\
> GOFLOW.SEM ACQUIRE gpu 4 30000
\"<slot>\"
> GOFLOW.SEM RENEW gpu <slot> 60000
(integer) 1
> GOFLOW.SEM RELEASE gpu <slot>
(integer) 1",
        plan: |args, _| renew(Keyed::Semaphore, args, "slot"),
        ..LOCK
    },
    Spec {
        name: "GOFLOW.SEM|AVAILABLE",
        summary: "Counts the free slots of a semaphore.",
        args: &[NAME, LIMIT],
        flags: &[Flag::ReadOnly],
        reply: "An integer: how many more could be taken under this limit.",
        examples: "\
> GOFLOW.SEM AVAILABLE idle 5
(integer) 5",
        plan: available,
        ..LOCK
    },
    Spec {
        name: "GOFLOW.SEM|INFO",
        summary: "Shows who holds a semaphore.",
        args: &[NAME],
        flags: &[Flag::ReadOnly],
        reply: "A map of `held`, `waiting` (how many wait for it through this proxy) and `holders`, an array of maps of \
                `owner` and `ttl` in milliseconds, in the order in which their time is up.",
        examples: "\
> GOFLOW.SEM ACQUIRE printers 3 60000 OWNER desk-4
\"<slot>\"
> GOFLOW.SEM INFO printers
1# \"held\" => (integer) 1
2# \"waiting\" => (integer) 0
3# \"holders\" => 1) 1# \"owner\" => \"desk-4\"
...",
        plan: |args, _| show(Keyed::Semaphore, args, Box::new(semaphore_info)),
        ..LOCK
    },
];

/// Who holds an object, and how many wait for it here.
pub type Show = Box<dyn FnOnce(u64, Vec<Holder>, usize) -> Reply + Send>;

/// A token as it stands on the wire.
pub fn token_text(token: u64) -> Bytes {
    format!("{token:012x}").into()
}

fn parse_token(word: &[u8]) -> Option<u64> {
    let is_token = word.len() == 12 && word.iter().all(u8::is_ascii_hexdigit);
    let text = std::str::from_utf8(word).ok().filter(|_| is_token)?;
    u64::from_str_radix(text, 16).ok().filter(|token| *token < TOKEN_MAX)
}

fn name(args: &Args) -> Result<Name> {
    Name::parse(args.required("name")?)
}

fn acquire(kind: Keyed, args: &Args, context: &Context) -> Result<Plan> {
    let limit = match kind {
        Keyed::Lock => 1,
        Keyed::Semaphore => args.number("limit")?.unwrap_or(1) as u32,
    };
    let owner = args.text("OWNER");
    Ok(Plan::Acquire(Acquire {
        kind,
        name: name(args)?,
        limit,
        ttl_ms: args.number("ttl-ms")?.unwrap_or(1),
        owner: owner.slice(..owner.len().min(OWNER_BYTES_MAX)),
        wait_ms: args.number("WAIT")?.unwrap_or(0).min(context.limits.block_ms_max),
        bind: args.has("BIND"),
    }))
}

fn on_object(kind: Keyed, name: Name, deed: Deed) -> Plan {
    let route = Route::Key(Bytes::copy_from_slice(name.as_str().as_bytes()));
    let op = Op { queue: name, action: Action::Keyed { kind, deed } };
    Plan::Op { route, op, render: count }
}

fn count(outcome: Outcome, _: &Name, _: &str) -> Reply {
    match outcome {
        Outcome::Count(count) => Reply::count(count),
        _ => super::job::unexpected(),
    }
}

fn release(kind: Keyed, args: &Args, word: &str) -> Result<Plan> {
    let name = name(args)?;
    Ok(match parse_token(args.required(word)?) {
        Some(token) => on_object(kind, name, Deed::Release { token }),
        None => Plan::Now(Reply::Integer(0)),
    })
}

fn renew(kind: Keyed, args: &Args, word: &str) -> Result<Plan> {
    let (name, ttl_ms) = (name(args)?, args.number("ttl-ms")?.unwrap_or(1));
    Ok(match parse_token(args.required(word)?) {
        Some(token) => on_object(kind, name, Deed::Renew { token, ttl_ms }),
        None => Plan::Now(Reply::Integer(0)),
    })
}

fn show(kind: Keyed, args: &Args, show: Show) -> Result<Plan> {
    Ok(Plan::Show { kind, name: name(args)?, show })
}

fn available(args: &Args, _: &Context) -> Result<Plan> {
    let limit = args.number("limit")?.unwrap_or(1);
    show(
        Keyed::Semaphore,
        args,
        Box::new(move |_, holders, _| Reply::count(limit.saturating_sub(holders.len() as u64))),
    )
}

fn lock_info(fence: u64, holders: Vec<Holder>, waiting: usize) -> Reply {
    let Some(holder) = holders.into_iter().next() else { return Reply::Null };
    Reply::Map(vec![
        (Reply::text("owner"), Reply::Bulk(holder.owner)),
        (Reply::text("fence"), Reply::count(fence)),
        (Reply::text("ttl"), Reply::count(holder.left_ms)),
        (Reply::text("waiting"), Reply::count(waiting as u64)),
    ])
}

fn semaphore_info(_: u64, holders: Vec<Holder>, waiting: usize) -> Reply {
    let held = Reply::count(holders.len() as u64);
    let shown = holders.into_iter().map(|holder| {
        Reply::Map(vec![
            (Reply::text("owner"), Reply::Bulk(holder.owner)),
            (Reply::text("ttl"), Reply::count(holder.left_ms)),
        ])
    });
    Reply::Map(vec![
        (Reply::text("held"), held),
        (Reply::text("waiting"), Reply::count(waiting as u64)),
        (Reply::text("holders"), Reply::Array(shown.collect())),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::tests::{planned, refused};

    #[test]
    fn a_lock_is_asked_for_as_the_client_says() {
        let Plan::Acquire(asked) = planned("GOFLOW.LOCK ACQUIRE a 500 BIND OWNER me WAIT 7") else {
            panic!("another plan")
        };
        assert_eq!((asked.kind, asked.limit, asked.ttl_ms, asked.wait_ms), (Keyed::Lock, 1, 500, 7));
        assert!(asked.bind && asked.owner == "me");
        let Plan::Acquire(asked) = planned("GOFLOW.SEM ACQUIRE a 3 500") else { panic!("another plan") };
        assert_eq!((asked.kind, asked.limit, asked.wait_ms, asked.bind), (Keyed::Semaphore, 3, 0, false));
        assert!(refused("GOFLOW.SEM ACQUIRE a 0 500").contains("limit expects 1 to 10000"));
        assert!(refused("GOFLOW.LOCK ACQUIRE a 0").contains("ttl-ms expects 1"));
    }

    #[test]
    fn a_token_is_read_as_it_was_written_and_nothing_else_is_one() {
        for token in [0, 7, TOKEN_MAX - 1] {
            assert_eq!(parse_token(&token_text(token)), Some(token));
        }
        for text in ["", "7", "+00000000001", "00000000000g", "0000000000001"] {
            assert_eq!(parse_token(text.as_bytes()), None, "{text}");
        }
        assert!(matches!(planned("GOFLOW.LOCK RELEASE a nonsense"), Plan::Now(Reply::Integer(0))));
    }
}
