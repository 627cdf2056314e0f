//! The connection itself: handshakes, names, `CLIENT`, `COMMAND`, and what stock clients send before they work.
//!
//! What changes the connection is a [`Connection`] for the session; the rest is answered here. Texts of errors are
//! Redis's own where clients look at them.

use bytes::Bytes;

use super::args::{Arg, Args, Kind, integer_between, parse_i64, syntax_error};
use super::{Connection, Context, Flag, Group, Plan, ReplyMode, Spec, describe};
use crate::error::{Code, Error, Result};
use crate::resp::reply::{Protocol, Reply};

const CONNECTION: Spec = Spec { group: Group::Connection, flags: &[Flag::Fast], ..Spec::BASE };
const COMMAND: Spec = Spec { group: Group::Server, since: "2.8.13", ..Spec::BASE };
const NAMES: &[Arg] = &[Arg::new("command-name", Kind::Text).many().optional()];

pub static ROWS: &[Spec] = &[
    Spec {
        name: "PING",
        since: "1.0.0",
        summary: "Answers, to show that the connection lives.",
        args: &[Arg::new("message", Kind::Text).optional()],
        reply: "`PONG`, or the message as a bulk string.",
        examples: "\
> PING
PONG
> PING hello
\"hello\"",
        plan: |args, _| {
            Ok(Plan::Now(args.value("message").map_or(Reply::Simple("PONG"), |text| Reply::Bulk(text.clone()))))
        },
        ..CONNECTION
    },
    Spec {
        name: "ECHO",
        since: "1.0.0",
        summary: "Answers with the message.",
        args: &[Arg::new("message", Kind::Text)],
        reply: "The message, a bulk string.",
        examples: "\
> ECHO hello
\"hello\"",
        plan: |args, _| Ok(Plan::Now(Reply::Bulk(args.text("message")))),
        ..CONNECTION
    },
    Spec {
        name: "HELLO",
        since: "6.0.0",
        summary: "Chooses the protocol, and authenticates and names the connection on the way.",
        args: &[
            Arg::new("protover", Kind::Integer(2, 3)).optional(),
            Arg::option(
                "AUTH",
                "auth",
                Kind::Group(&[Arg::new("username", Kind::Text), Arg::new("password", Kind::Text)]),
            ),
            Arg::option("SETNAME", "clientname", Kind::Text),
        ],
        flags: &[Flag::Fast, Flag::NoAuth],
        reply: "A map about the server: `server`, `version`, `proto`, `id`, `mode`, `role`, `modules`.",
        errors: &[Code::NoProto, Code::NoAuth, Code::WrongPass],
        examples: "\
> HELLO 3
1# \"server\" => \"redis\"
2# \"version\" => \"<version>\"
3# \"proto\" => (integer) 3
...
> HELLO 9
(error) NOPROTO unsupported protocol version",
        plan: hello,
        ..CONNECTION
    },
    Spec {
        name: "AUTH",
        since: "1.0.0",
        summary: "Authenticates the connection.",
        args: &[Arg::new("username", Kind::Text).optional(), Arg::new("password", Kind::Text)],
        flags: &[Flag::Fast, Flag::NoAuth],
        reply: "`OK`.",
        notes: "Without a user name it is `default`.",
        errors: &[Code::WrongPass],
        examples: "\
> AUTH nobody secret
(error) WRONGPASS ...",
        plan: auth,
        ..CONNECTION
    },
    Spec {
        name: "SELECT",
        since: "1.0.0",
        summary: "Chooses the database: there is one, 0.",
        args: &[Arg::new("index", Kind::Integer(i64::MIN, i64::MAX))],
        reply: "`OK`.",
        examples: "\
> SELECT 0
OK
> SELECT 1
(error) ERR DB index is out of range",
        plan: select,
        ..CONNECTION
    },
    Spec {
        name: "QUIT",
        since: "1.0.0",
        summary: "Closes the connection when what was sent before is answered.",
        flags: &[Flag::Fast, Flag::NoAuth],
        reply: "`OK`.",
        examples: "\
> QUIT
OK",
        plan: |_, _| Ok(Plan::Connection(Connection::Quit)),
        ..CONNECTION
    },
    Spec {
        name: "RESET",
        since: "6.2.0",
        summary: "Makes the connection as new: RESP2, without a name, not authenticated.",
        flags: &[Flag::Fast, Flag::NoAuth],
        reply: "`RESET`.",
        examples: "\
> RESET
RESET",
        plan: |_, _| Ok(Plan::Connection(Connection::Reset)),
        ..CONNECTION
    },
    Spec {
        name: "READONLY",
        since: "3.0.0",
        summary: "Does nothing; some clients send it.",
        reply: "`OK`.",
        examples: "\
> READONLY
OK",
        plan: |_, _| Ok(Plan::Now(Reply::OK)),
        ..CONNECTION
    },
    Spec {
        name: "READWRITE",
        since: "3.0.0",
        summary: "Does nothing; some clients send it.",
        reply: "`OK`.",
        examples: "\
> READWRITE
OK",
        plan: |_, _| Ok(Plan::Now(Reply::OK)),
        ..CONNECTION
    },
    Spec::container("CLIENT", Group::Connection, "2.4.0", "The connections of this process."),
    Spec {
        name: "CLIENT|ID",
        since: "5.0.0",
        summary: "Shows the number of the connection.",
        reply: "An integer.",
        examples: "\
> CLIENT ID
(integer) <client-id>",
        plan: |_, _| Ok(Plan::Connection(Connection::Id)),
        ..CONNECTION
    },
    Spec {
        name: "CLIENT|SETNAME",
        since: "2.6.9",
        summary: "Names the connection.",
        args: &[Arg::new("connection-name", Kind::Text)],
        reply: "`OK`.",
        examples: "\
> CLIENT SETNAME worker-7
OK
> CLIENT GETNAME
\"worker-7\"",
        plan: set_name,
        ..CONNECTION
    },
    Spec {
        name: "CLIENT|GETNAME",
        since: "2.6.9",
        summary: "Shows the name of the connection.",
        reply: "A bulk string, or null.",
        examples: "\
> CLIENT GETNAME
(nil)",
        plan: |_, _| Ok(Plan::Connection(Connection::GetName)),
        ..CONNECTION
    },
    Spec {
        name: "CLIENT|SETINFO",
        since: "7.2.0",
        summary: "Says which client library this is.",
        args: &[Arg::new("attribute", Kind::Text), Arg::new("value", Kind::Text)],
        reply: "`OK`.",
        notes: "The attribute is `LIB-NAME` or `LIB-VER`.",
        examples: "\
> CLIENT SETINFO LIB-NAME redis-py
OK",
        plan: set_info,
        ..CONNECTION
    },
    Spec {
        name: "CLIENT|INFO",
        since: "6.2.0",
        summary: "Shows the line of this connection in `CLIENT LIST`.",
        reply: "A bulk string.",
        examples: "\
> CLIENT INFO
\"id=...",
        plan: |_, _| Ok(Plan::Connection(Connection::Info)),
        ..CONNECTION
    },
    Spec {
        name: "CLIENT|LIST",
        since: "2.4.0",
        summary: "Shows the connections of this process.",
        args: &[Arg::option("TYPE", "type", Kind::Text)],
        flags: &[Flag::Admin],
        reply: "A bulk string, one line for each connection.",
        notes: "Of the types only `NORMAL` is known.",
        examples: "\
> CLIENT LIST
\"id=...",
        plan: list,
        ..CONNECTION
    },
    Spec {
        name: "CLIENT|KILL",
        since: "2.4.0",
        summary: "Closes a connection of this process.",
        args: &[Arg::option("ID", "client-id", Kind::Integer(1, i64::MAX))],
        flags: &[Flag::Admin],
        reply: "How many connections were closed.",
        notes: "`ID client-id` is the only filter.",
        examples: "\
> CLIENT KILL ID 123456
(integer) 0",
        plan: kill,
        ..CONNECTION
    },
    Spec {
        name: "CLIENT|UNBLOCK",
        since: "5.0.0",
        summary: "Ends the wait of another connection.",
        args: &[Arg::new("client-id", Kind::Integer(i64::MIN, i64::MAX)), Arg::new("how", Kind::Text).optional()],
        flags: &[Flag::Admin],
        reply: "1, or 0 when it was not waiting.",
        notes: "`TIMEOUT`, the default, ends it as if its time were up, `ERROR` with an error.",
        examples: "\
> CLIENT UNBLOCK 123456
(integer) 0",
        plan: unblock,
        ..CONNECTION
    },
    Spec {
        name: "CLIENT|REPLY",
        since: "3.2.0",
        summary: "Says which requests are answered.",
        args: &[Arg::new("mode", Kind::Text)],
        reply: "`OK` after `ON`; nothing after `OFF` and `SKIP`.",
        notes: "Jobs that are delivered into a reply that the client does not want go back.",
        examples: "\
> CLIENT REPLY ON
OK",
        plan: reply,
        ..CONNECTION
    },
    Spec {
        name: "CLIENT|NO-EVICT",
        since: "7.0.0",
        summary: "Does nothing: no connection is evicted.",
        args: &[Arg::new("mode", Kind::Text)],
        reply: "`OK`.",
        examples: "\
> CLIENT NO-EVICT ON
OK",
        plan: on_or_off,
        ..CONNECTION
    },
    Spec {
        name: "CLIENT|NO-TOUCH",
        since: "7.2.0",
        summary: "Does nothing: access times are the shards' own.",
        args: &[Arg::new("mode", Kind::Text)],
        reply: "`OK`.",
        examples: "\
> CLIENT NO-TOUCH ON
OK",
        plan: on_or_off,
        ..CONNECTION
    },
    Spec {
        name: "CLIENT|GETREDIR",
        since: "6.0.0",
        summary: "Says that client side caching is off.",
        reply: "-1.",
        examples: "\
> CLIENT GETREDIR
(integer) -1",
        plan: |_, _| Ok(Plan::Now(Reply::Integer(-1))),
        ..CONNECTION
    },
    Spec {
        name: "CLIENT|TRACKINGINFO",
        since: "6.2.0",
        summary: "Says that client side caching is off.",
        reply: "A map: `flags`, `redirect`, `prefixes`.",
        examples: "\
> CLIENT TRACKINGINFO
1# \"flags\" => 1) \"off\"
2# \"redirect\" => (integer) -1
3# \"prefixes\" => (empty array)",
        plan: |_, _| Ok(Plan::Now(tracking_off())),
        ..CONNECTION
    },
    Spec::container("ACL", Group::Server, "6.0.0", "Users and permissions, which the configuration sets."),
    Spec {
        name: "ACL|WHOAMI",
        since: "6.0.0",
        summary: "Shows the user of the connection.",
        reply: "A bulk string.",
        examples: "\
> ACL WHOAMI
\"default\"",
        plan: |_, _| Ok(Plan::Now(Reply::text("default"))),
        ..CONNECTION
    },
    Spec {
        name: "ACL|CAT",
        since: "6.0.0",
        summary: "Lists the categories of commands, or the commands of one.",
        args: &[Arg::new("category", Kind::Text).optional()],
        reply: "An array of names.",
        examples: "\
> ACL CAT blocking
1) \"goflow.dequeue\"
...",
        plan: describe::categories,
        ..CONNECTION
    },
    Spec {
        name: "COMMAND",
        args: &[Arg::new("subcommand", Kind::Text).optional(), Arg::new("argument", Kind::Text).many().optional()],
        summary: "Describes all commands.",
        reply: "An array with an entry for each command, in Redis's form: name, arity, flags, first key, last key, step, \
                categories, tips, key specifications, subcommands.",
        examples: "\
> COMMAND
  1) ...
...",
        plan: describe::all,
        ..COMMAND
    },
    Spec {
        name: "COMMAND|COUNT",
        summary: "Counts the commands.",
        reply: "An integer.",
        examples: "\
> COMMAND COUNT
(integer) <count>",
        plan: describe::count,
        ..COMMAND
    },
    Spec {
        name: "COMMAND|INFO",
        args: NAMES,
        summary: "Describes some commands.",
        reply: "An array with the entry of each, or null for one that is not known.",
        notes: "Of Redis's own commands an entry holds what the proxy routes by: name, arity, places of the keys, and of the \
                flags `blocking`, `pubsub` and `movablekeys`.",
        examples: "\
> COMMAND INFO no-such-command
1) (nil)",
        plan: describe::info,
        ..COMMAND
    },
    Spec {
        name: "COMMAND|LIST",
        since: "7.0.0",
        args: &[Arg::option(
            "FILTERBY",
            "filter",
            Kind::Group(&[Arg::new("kind", Kind::Text), Arg::new("value", Kind::Text)]),
        )],
        summary: "Lists the names of the commands.",
        reply: "An array of names.",
        notes: "The filter is `MODULE name`, `ACLCAT category` or `PATTERN pattern`.",
        examples: "\
> COMMAND LIST FILTERBY PATTERN goflow.en*
1) \"goflow.enqueue\"
2) \"goflow.enqueuemany\"",
        plan: describe::list,
        ..COMMAND
    },
    Spec {
        name: "COMMAND|DOCS",
        since: "7.0.0",
        args: NAMES,
        summary: "Documents commands for programs.",
        reply: "A map from names to maps: `summary`, `since`, `group`, `arguments`, `subcommands`.",
        examples: "\
> COMMAND DOCS GOFLOW.LEN
1# \"goflow.len\" => 1# \"summary\" => \"Counts the jobs of a queue that are in a state.\"
...",
        plan: describe::docs,
        ..COMMAND
    },
    Spec {
        name: "COMMAND|GETKEYS",
        args: &[Arg::new("command", Kind::Text), Arg::new("argument", Kind::Text).many()],
        summary: "Shows the names of the queues, or the keys, in a request.",
        reply: "An array of names.",
        examples: "\
> COMMAND GETKEYS GOFLOW.DEQUEUE main other COUNT 2
1) \"main\"
2) \"other\"",
        plan: describe::keys,
        ..COMMAND
    },
];

fn hello(args: &Args, _: &Context) -> Result<Plan> {
    let protocol = args.value("protover").map(|word| protocol(word)).transpose()?;
    let name = args.value("SETNAME").map(|name| client_word(name, "Client names")).transpose()?;
    let auth = match args.words("AUTH") {
        [user, password] => Some((user.clone(), password.clone())),
        _ => None,
    };
    // Redis takes options only after a version.
    if protocol.is_none() && args.has_options() {
        return Err(Error::bad("Protocol version is not an integer or out of range"));
    }
    Ok(Plan::Connection(Connection::Hello { protocol, auth, name }))
}

fn protocol(word: &[u8]) -> Result<Protocol> {
    match parse_i64(word) {
        Some(2) => Ok(Protocol::Resp2),
        Some(3) => Ok(Protocol::Resp3),
        Some(_) => Err(Error::new(Code::NoProto, "unsupported protocol version")),
        None => Err(Error::bad("Protocol version is not an integer or out of range")),
    }
}

fn auth(args: &Args, _: &Context) -> Result<Plan> {
    let words = args.words("password");
    let password = words.first().cloned().unwrap_or_default();
    let user = args.value("username").cloned().unwrap_or(Bytes::from_static(b"default"));
    Ok(Plan::Connection(Connection::Auth { user, password }))
}

fn select(args: &Args, _: &Context) -> Result<Plan> {
    match args.integer("index")? {
        Some(0) => Ok(Plan::Now(Reply::OK)),
        _ => Err(Error::bad("DB index is out of range")),
    }
}

/// A name without spaces, newlines and the like, so that `CLIENT LIST` can show it.
fn client_word(word: &Bytes, what: &str) -> Result<Bytes> {
    match word.iter().all(u8::is_ascii_graphic) {
        true => Ok(word.clone()),
        false => Err(Error::bad(format!("{what} cannot contain spaces, newlines or special characters."))),
    }
}

fn set_name(args: &Args, _: &Context) -> Result<Plan> {
    let name = client_word(args.required("connection-name")?, "Client names")?;
    Ok(Plan::Connection(Connection::SetName(name)))
}

fn set_info(args: &Args, _: &Context) -> Result<Plan> {
    let field = args.text("attribute").to_ascii_lowercase();
    let value = args.required("value")?;
    match &field[..] {
        b"lib-name" | b"lib-ver" => {
            let value = client_word(value, &String::from_utf8_lossy(&field))?;
            Ok(Plan::Connection(Connection::SetInfo { field: field.into(), value }))
        }
        _ => Err(Error::bad(format!("Unrecognized option '{}'", String::from_utf8_lossy(&args.text("attribute"))))),
    }
}

fn list(args: &Args, _: &Context) -> Result<Plan> {
    match args.value("TYPE") {
        Some(kind) if !kind.eq_ignore_ascii_case(b"normal") => {
            Err(Error::bad(format!("Unknown client type '{}'", String::from_utf8_lossy(kind))))
        }
        _ => Ok(Plan::Connection(Connection::List)),
    }
}

fn kill(args: &Args, _: &Context) -> Result<Plan> {
    match args.number("ID")? {
        Some(id) => Ok(Plan::Connection(Connection::Kill { id })),
        None => Err(syntax_error()),
    }
}

fn unblock(args: &Args, _: &Context) -> Result<Plan> {
    let id = integer_between(args.required("client-id")?, "client-id", i64::MIN, i64::MAX)?;
    let error = match args.value("how") {
        None => false,
        Some(how) if how.eq_ignore_ascii_case(b"TIMEOUT") => false,
        Some(how) if how.eq_ignore_ascii_case(b"ERROR") => true,
        Some(_) => return Err(Error::bad("CLIENT UNBLOCK reason should be TIMEOUT or ERROR")),
    };
    Ok(match u64::try_from(id) {
        Ok(id) => Plan::Connection(Connection::Unblock { id, error }),
        Err(_) => Plan::Now(Reply::Integer(0)),
    })
}

fn reply(args: &Args, _: &Context) -> Result<Plan> {
    let modes = [("ON", ReplyMode::On), ("OFF", ReplyMode::Off), ("SKIP", ReplyMode::Skip)];
    let word = args.required("mode")?;
    let mode = modes.into_iter().find(|(name, _)| name.as_bytes().eq_ignore_ascii_case(word));
    mode.map(|(_, mode)| Plan::Connection(Connection::Reply(mode))).ok_or_else(syntax_error)
}

fn on_or_off(args: &Args, _: &Context) -> Result<Plan> {
    let word = args.required("mode")?;
    match word.eq_ignore_ascii_case(b"ON") || word.eq_ignore_ascii_case(b"OFF") {
        true => Ok(Plan::Now(Reply::OK)),
        false => Err(syntax_error()),
    }
}

fn tracking_off() -> Reply {
    Reply::Map(vec![
        (Reply::text("flags"), Reply::Array(vec![Reply::text("off")])),
        (Reply::text("redirect"), Reply::Integer(-1)),
        (Reply::text("prefixes"), Reply::Array(Vec::new())),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::tests::{planned, refused};

    fn change(line: &str) -> Connection {
        match planned(line) {
            Plan::Connection(change) => change,
            _ => panic!("{line} does not change the connection"),
        }
    }

    #[test]
    fn the_handshakes_of_stock_clients_are_understood() {
        let auth = Some((Bytes::from("u"), Bytes::from("p")));
        for (line, wanted) in [
            ("HELLO", Connection::Hello { protocol: None, auth: None, name: None }),
            ("HELLO 3", Connection::Hello { protocol: Some(Protocol::Resp3), auth: None, name: None }),
            ("hello 2 auth u p", Connection::Hello { protocol: Some(Protocol::Resp2), auth: auth.clone(), name: None }),
            (
                "HELLO 3 SETNAME n AUTH u p",
                Connection::Hello { protocol: Some(Protocol::Resp3), auth, name: Some("n".into()) },
            ),
            ("AUTH p", Connection::Auth { user: "default".into(), password: "p".into() }),
            ("AUTH u p", Connection::Auth { user: "u".into(), password: "p".into() }),
            ("CLIENT SETINFO LIB-VER 5.2.1", Connection::SetInfo { field: "lib-ver".into(), value: "5.2.1".into() }),
            ("client setname a", Connection::SetName("a".into())),
            ("CLIENT UNBLOCK 7 ERROR", Connection::Unblock { id: 7, error: true }),
            ("CLIENT KILL ID 7", Connection::Kill { id: 7 }),
            ("CLIENT REPLY skip", Connection::Reply(ReplyMode::Skip)),
            ("CLIENT LIST TYPE normal", Connection::List),
        ] {
            assert_eq!(change(line), wanted, "{line}");
        }
        assert!(matches!(planned("SELECT 0"), Plan::Now(Reply::OK)));
        assert!(matches!(planned("READONLY"), Plan::Now(Reply::OK)));
    }

    #[test]
    fn refusals_are_in_the_words_that_clients_look_for() {
        for (line, error) in [
            ("HELLO 9", "NOPROTO unsupported protocol version"),
            ("HELLO x", "ERR Protocol version is not an integer or out of range"),
            ("SELECT 99", "ERR DB index is out of range"),
            ("CLIENT SETINFO LIB-FOO x", "ERR Unrecognized option 'LIB-FOO'"),
            ("CLIENT UNBLOCK x", "ERR value is not an integer or out of range"),
            ("CLIENT UNBLOCK 1 FOO", "ERR CLIENT UNBLOCK reason should be TIMEOUT or ERROR"),
            ("CLIENT REPLY x", "ERR syntax error"),
            ("CLIENT NO-EVICT x", "ERR syntax error"),
            ("CLIENT LIST TYPE foo", "ERR Unknown client type 'foo'"),
            ("CLIENT TRACKING ON", "ERR unknown subcommand 'TRACKING'. Try CLIENT HELP."),
            ("CLIENT MAINT_NOTIFICATIONS ON", "ERR unknown subcommand 'MAINT_NOTIFICATIONS'. Try CLIENT HELP."),
            ("CLIENT SETNAME a\nb", "ERR Client names cannot contain spaces, newlines or special characters."),
        ] {
            assert_eq!(refused(line), error, "{line}");
        }
    }
}
