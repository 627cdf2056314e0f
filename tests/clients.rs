//! Stock clients, unmodified: the life of jobs through those that can be had here, and what the others send on connect.
//!
//! redis-py (sync and asyncio), ioredis, node-redis, redis-rs, hiredis and redis-cli run for real, with their defaults and
//! with the other protocol where they have a choice; their programs are in `tests/clients/`. go-redis, Jedis, Lettuce,
//! StackExchange.Redis, phpredis and redis-client are replayed: [`Said`] for each thing they say while they connect,
//! with what they need to hear.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::fleet::Fleet;
use crate::support::goflow::Goflow;
use crate::support::process::venv;
use crate::support::wire::{Value, Wire};
use crate::support::{patience, scratch};

fn program(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(name)
}

/// Runs a client's program to its end; it says "done" when every answer was right.
fn expect_done(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; run .ci/setup"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (said, complained) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && said.contains("done"), "{command:?} said {said}\n{complained}");
}

fn port(goflow: &Goflow) -> String {
    goflow.address().rsplit(':').next().unwrap().to_owned()
}

#[test]
fn redis_py_lives_through_a_job() {
    let goflow = Goflow::start(&[]);
    for (number, arguments) in
        [vec!["sync"], vec!["asyncio"], vec!["sync", "2"], vec!["asyncio", "2"]].iter().enumerate()
    {
        let mut command = Command::new(venv().join("bin/python"));
        command.arg(program("cycle.py")).args([arguments[0], &port(&goflow), &format!("py-{number}")]);
        expect_done(command.args(&arguments[1..]));
    }
}

#[test]
fn ioredis_and_node_redis_live_through_a_job() {
    let goflow = Goflow::start(&[]);
    let modules = venv().parent().unwrap().join("clients/node_modules");
    for (number, arguments) in
        [vec!["ioredis"], vec!["redis"], vec!["redis", "2"], vec!["redis", "3"]].iter().enumerate()
    {
        let mut command = Command::new("node");
        command.env("NODE_PATH", &modules).arg(program("cycle.js"));
        command.args([arguments[0], &port(&goflow), &format!("node-{number}")]);
        expect_done(command.args(&arguments[1..]));
    }
}

#[test]
fn hiredis_lives_through_a_job() {
    let (goflow, dir) = (Goflow::start(&[]), scratch());
    let built = dir.path().join("cycle");
    let compiled =
        Command::new("gcc").arg(program("cycle.c")).args(["-Wall", "-o"]).arg(&built).arg("-lhiredis").output();
    let compiled = compiled.unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    expect_done(Command::new(&built).args([&port(&goflow), "c-2"]));
    expect_done(Command::new(&built).args([&port(&goflow), "c-3", "3"]));
}

#[test]
fn redis_rs_lives_through_a_job() {
    let goflow = Goflow::start(&[]);
    for (queue, url) in [("rs-2", ""), ("rs-3", "/?protocol=resp3")] {
        let client = redis::Client::open(format!("redis://{}{url}", goflow.address())).unwrap();
        let mut connection = client.get_connection().unwrap();
        redis_rs_cycle(queue, &mut |words| redis::cmd(words[0]).arg(&words[1..]).query(&mut connection));
        // Its asynchronous connection gives up an answer after 500 ms unless told otherwise.
        let patient = redis::AsyncConnectionConfig::new()
            .set_connection_timeout(Some(patience()))
            .set_response_timeout(Some(patience()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut shared = runtime.block_on(client.get_multiplexed_async_connection_with_config(&patient)).unwrap();
        redis_rs_cycle(queue, &mut |words| {
            runtime.block_on(redis::cmd(words[0]).arg(&words[1..]).query_async(&mut shared))
        });
    }
}

type RedisRsCall<'a> = &'a mut dyn FnMut(&[&str]) -> redis::RedisResult<redis::Value>;

fn redis_rs_text(call: RedisRsCall, words: &[&str]) -> String {
    redis::from_redis_value(call(words).unwrap()).unwrap()
}

/// Takes a job and gives its receipt. A null is a wait that was over before the backoff was.
fn redis_rs_take(call: RedisRsCall, queue: &str) -> String {
    loop {
        let job = call(&["GOFLOW.DEQUEUE", queue, "BLOCK", "400"]).unwrap();
        if job != redis::Value::Nil {
            let mut job: HashMap<String, redis::Value> = redis::from_redis_value(job).unwrap();
            return redis::from_redis_value(job.remove("receipt").unwrap()).unwrap();
        }
    }
}

fn redis_rs_cycle(queue: &str, call: RedisRsCall) {
    let id = redis_rs_text(call, &["GOFLOW.ENQUEUE", queue, "work", "ATTEMPTS", "2", "BACKOFF", "1"]);
    let first = redis_rs_take(call, queue);
    assert_eq!(redis_rs_text(call, &["GOFLOW.FAIL", queue, &first, "ERROR", "boom"]), "scheduled");
    assert_eq!(call(&["GOFLOW.EXTEND", queue, &first, "1000"]).unwrap_err().code(), Some("LEASELOST"));
    let second = redis_rs_take(call, queue);
    assert_eq!(redis_rs_text(call, &["GOFLOW.FAIL", queue, &second]), "dead");
    assert_eq!(call(&["GOFLOW.DLQ", "LEN", queue]).unwrap(), redis::Value::Int(1));
    assert_eq!(call(&["GOFLOW.DLQ", "RETRY", queue, &id]).unwrap(), redis::Value::Int(1));
    let third = redis_rs_take(call, queue);
    assert_eq!(call(&["GOFLOW.ACK", queue, &third]).unwrap(), redis::Value::Int(1));
    assert_eq!(call(&["GOFLOW.DEQUEUE", queue, "COUNT", "5"]).unwrap(), redis::Value::Nil);
}

/// What redis-cli prints for these arguments.
fn redis_cli(goflow: &Goflow, args: &[&str]) -> String {
    let output = Command::new("redis-cli").args(["-p", &port(goflow)]).args(args).output().unwrap();
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[test]
fn redis_cli_lives_through_a_job() {
    let goflow = Goflow::start(&[]);
    for resp in ["-2", "-3"] {
        let say = |line: &str| redis_cli(&goflow, &[&[resp], &line.split(' ').collect::<Vec<_>>()[..]].concat());
        let receipt = |job: String| {
            let mut words = job.split_ascii_whitespace().map(str::to_owned);
            words.find(|word| word == "receipt");
            words.next().unwrap()
        };
        let id = say("GOFLOW.ENQUEUE main hello ATTEMPTS 2 BACKOFF 1");
        let first = receipt(say("GOFLOW.DEQUEUE main BLOCK 60000"));
        assert_eq!(say(&format!("GOFLOW.FAIL main {first} ERROR boom")), "scheduled");
        let second = receipt(say("GOFLOW.DEQUEUE main BLOCK 60000"));
        assert_eq!(say(&format!("GOFLOW.FAIL main {second}")), "dead");
        assert!(say(&format!("GOFLOW.RELEASE main {second}")).contains("LEASELOST"));
        assert_eq!(say(&format!("GOFLOW.DLQ RETRY main {id}")), "1");
        let third = receipt(say("GOFLOW.DEQUEUE main BLOCK 60000"));
        assert_eq!(say(&format!("GOFLOW.ACK main {third}")), "1");
        assert_eq!(say("GOFLOW.DEQUEUE main"), "");
    }
}

#[test]
fn redis_cli_hints_at_our_commands_while_one_types() {
    let goflow = Goflow::start(&[]);
    expect_done(Command::new("python3").arg(program("hints.py")).arg(port(&goflow)));
}

/// What a client must hear.
enum Heard {
    Ok,
    Text(&'static str),
    /// An error that starts so; the connection stays open.
    Error(&'static str),
    /// HELLO's map with these, and an integer for an id.
    Hello(i64),
    Integer,
    /// A bulk string that holds this.
    Holding(&'static str),
    Null,
    /// A map or flat list that names this.
    Naming(&'static str),
    /// The confirmation of a subscription.
    Subscribed,
}

use Heard::{Error, Hello, Holding, Integer, Naming, Null, Ok, Subscribed, Text};

fn hears(heard: &Heard, reply: &Value) -> bool {
    match (heard, reply) {
        (Ok, Value::Simple(text)) => text == "OK",
        (Text(expected), Value::Simple(text)) => text == expected,
        (Text(expected), Value::Bulk(bytes)) => bytes == expected.as_bytes(),
        (Error(start), Value::Error(text)) => text.starts_with(start),
        (Hello(proto), hello) => {
            let is_integer = matches!(hello.field("id"), Value::Integer(_));
            let texts = [("server", "redis"), ("mode", "standalone"), ("role", "master")];
            let known = texts.iter().all(|(field, text)| hello.field(field).text() == *text);
            is_integer
                && known
                && hello.field("proto") == &Value::Integer(*proto)
                && hello.field("modules").items().is_empty()
        }
        (Integer, Value::Integer(_)) | (Null, Value::Null) => true,
        (Holding(part), Value::Bulk(bytes)) => String::from_utf8_lossy(bytes).contains(part),
        (Naming(field), map @ (Value::Map(_) | Value::Array(_))) => matches!(map.field(field), Value::Bulk(_)),
        (Subscribed, Value::Array(items) | Value::Push(items)) => {
            items.first().is_some_and(|kind| kind.text() == "subscribe")
        }
        _ => false,
    }
}

/// One pipeline: what is sent in one piece, and what must come back.
type Said = &'static [(&'static str, Heard)];

/// Sends each pipeline in one piece, then has the connection do a job's life: it is good for work.
fn replay(goflow: &Goflow, client: &str, said: &[Said]) {
    let mut wire = goflow.wire();
    for pipeline in said {
        pipeline.iter().for_each(|(line, _)| wire.send(&line.split(' ').collect::<Vec<_>>()));
        for (line, heard) in *pipeline {
            let reply = wire.read();
            assert!(hears(heard, &reply), "{client}: {line} was answered {reply:?}");
        }
    }
    work(&mut wire, client);
}

fn work(wire: &mut Wire, queue: &str) {
    wire.call(&["GOFLOW.ENQUEUE", queue, "hello"]);
    let job = wire.call(&["GOFLOW.DEQUEUE", queue, "BLOCK", "0"]);
    assert_eq!(wire.call(&["GOFLOW.ACK", queue, &job.field("receipt").text()]), Value::Integer(1));
}

const MAINT: &str = "CLIENT MAINT_NOTIFICATIONS ON moving-endpoint-type internal-ip";

#[test]
fn go_redis_connects() {
    let goflow = Goflow::start(&[]);
    let then: Said = &[
        ("SELECT 0", Ok),
        ("CLIENT SETNAME me", Ok),
        (MAINT, Error("ERR unknown subcommand 'MAINT_NOTIFICATIONS'. Try CLIENT HELP.")),
        ("CLIENT SETINFO LIB-NAME go-redis(,go1.23)", Ok),
        ("CLIENT SETINFO LIB-VER 9.7.0", Ok),
    ];
    replay(&goflow, "go-redis", &[&[("HELLO 3", Hello(3))], then]);
    replay(&goflow, "go-redis", &[&[("HELLO 2", Hello(2))], then]);
}

#[test]
fn go_redis_connects_with_a_password() {
    let goflow = Goflow::start_with(&[], &[("GOFLOW_AUTH_PASSWORD", "x")]);
    replay(&goflow, "go-redis", &[&[("HELLO 3 AUTH default x SETNAME me", Hello(3))], &[("PING", Text("PONG"))]]);
    // After any error of HELLO it falls back to AUTH.
    replay(&goflow, "go-redis", &[&[("HELLO 3", Error("NOAUTH"))], &[("AUTH x", Ok)], &[("SELECT 0", Ok)]]);
}

#[test]
fn jedis_connects() {
    let goflow = Goflow::start(&[]);
    let then: Said = &[
        ("CLIENT SETNAME me", Ok),
        ("CLIENT SETINFO LIB-NAME jedis", Ok),
        ("CLIENT SETINFO LIB-VER 6.0.0", Ok),
        ("SELECT 0", Ok),
        ("PING", Text("PONG")),
    ];
    replay(&goflow, "jedis", &[&[("HELLO 3", Hello(3))], then]);
    replay(&goflow, "jedis", &[&[("HELLO 4", Error("NOPROTO "))], &[("HELLO 2", Hello(2))], then]);
}

#[test]
fn lettuce_connects() {
    let goflow = Goflow::start(&[]);
    let then: Said = &[
        ("SELECT 0", Ok),
        ("READONLY", Ok),
        ("CLIENT SETNAME me", Ok),
        ("CLIENT SETINFO lib-name Lettuce", Ok),
        ("CLIENT SETINFO lib-ver 6.5.0.RELEASE/abc", Ok),
        ("CLIENT MAINT_NOTIFICATIONS on", Error("ERR unknown subcommand")),
    ];
    replay(&goflow, "lettuce", &[&[("HELLO 3 SETNAME me", Hello(3))], then]);
    replay(
        &goflow,
        "lettuce",
        &[&[("HELLO 9", Error("NOPROTO unsupported protocol version"))], &[("PING", Text("PONG"))], then],
    );
}

#[test]
fn stackexchange_redis_connects() {
    let fleet = Fleet::start(1, 1, &[]);
    let goflow = &fleet.proxies[0];
    let then: Said = &[
        ("CLIENT SETNAME me", Ok),
        ("CLIENT SETINFO lib-name SE.Redis", Ok),
        ("CLIENT SETINFO lib-ver 2.8.0", Ok),
        ("CLIENT ID", Integer),
        ("CONFIG GET timeout", Naming("timeout")),
        ("CONFIG GET replica-read-only", Naming("replica-read-only")),
        ("CONFIG GET slave-read-only", Naming("slave-read-only")),
        ("CONFIG GET databases", Naming("databases")),
        ("SENTINEL MASTERS", Error("ERR unknown command 'SENTINEL'")),
        ("INFO replication", Holding("role:master")),
        ("INFO server", Holding("redis_version:7")),
        ("CLUSTER NODES", Error("ERR This instance has cluster support disabled")),
        ("GET __Booksleeve_TieBreak", Null),
        ("ECHO 0123456789abcdef", Text("0123456789abcdef")),
    ];
    replay(goflow, "se-redis", &[then]);
    replay(goflow, "se-redis", &[&[("HELLO 2", Hello(2))], then]);
    replay(goflow, "se-redis", &[&[("HELLO 3", Hello(3))], then]);
    let mut listener = goflow.wire();
    assert!(hears(&Subscribed, &listener.say("SUBSCRIBE __Booksleeve_MasterChanged")));
}

#[test]
fn phpredis_connects() {
    let goflow = Goflow::start(&[]);
    replay(
        &goflow,
        "phpredis",
        &[&[("SELECT 0", Ok)], &[("ECHO phpredis_ping", Text("phpredis_ping"))], &[("PING", Text("PONG"))]],
    );
    let guarded = Goflow::start_with(&[], &[("GOFLOW_AUTH_PASSWORD", "x")]);
    replay(&guarded, "phpredis", &[&[("AUTH x", Ok)], &[("SELECT 0", Ok)]]);
    replay(&guarded, "phpredis", &[&[("AUTH default x", Ok)], &[("SELECT 0", Ok)]]);
}

#[test]
fn redis_client_for_ruby_connects() {
    let goflow = Goflow::start(&[]);
    replay(
        &goflow,
        "ruby",
        &[&[
            ("HELLO 3", Hello(3)),
            ("SELECT 0", Ok),
            ("CLIENT SETINFO LIB-NAME redis-client(redis-rb)", Ok),
            ("CLIENT SETINFO LIB-VER 0.26.0", Ok),
            ("CLIENT SETNAME me", Ok),
        ]],
    );
    let mut wire = goflow.wire();
    let role = wire.say("ROLE");
    assert_eq!(role.items()[0].text(), "master");
    let guarded = Goflow::start_with(&[], &[("GOFLOW_AUTH_PASSWORD", "x")]);
    replay(&guarded, "ruby", &[&[("HELLO 3 AUTH default x", Hello(3)), ("SELECT 0", Ok)]]);
}

#[test]
fn what_no_client_should_send_keeps_the_connection_open() {
    let goflow = Goflow::start(&[]);
    let odd: Said = &[
        ("NOSUCH a b", Error("ERR unknown command 'NOSUCH', with args beginning with: 'a' 'b' ")),
        ("CLIENT NOSUCH", Error("ERR unknown subcommand 'NOSUCH'. Try CLIENT HELP.")),
        ("ECHO", Error("ERR wrong number of arguments for 'echo' command")),
        ("SELECT 5", Error("ERR DB index is out of range")),
        ("CLIENT TRACKING ON", Error("ERR")),
        ("MONITOR", Error("NOPERM ")),
        ("SHUTDOWN", Error("NOPERM ")),
        ("FLUSHALL", Error("NOPERM ")),
        ("HELLO 3 AUTH", Error("ERR")),
        ("PING", Text("PONG")),
    ];
    replay(&goflow, "odd", &[odd]);
}
