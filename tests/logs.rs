//! What the process says of itself: structured lines, levels by module, slow commands, and never a payload or a secret.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value as Json;

use crate::eventually;
use crate::http::Site;
use crate::support::goflow::Goflow;
use crate::support::scratch;
use crate::support::servers::{Flavour, Server};
use crate::support::wire::{Value, Wire};

/// Stands in every place where a client or an operator may put something that is nobody else's business.
const CANARY: &str = "canary-8f3a";

fn json_lines(log: &[String]) -> Vec<Json> {
    let lines = log.iter().filter(|line| line.starts_with('{'));
    lines.map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

fn put_canaries_everywhere(site: &Site) {
    let mut wire = site.goflow.wire();
    wire.say(&format!("AUTH wrong-{CANARY}"));
    wire.say(&format!("HELLO 3 AUTH default {CANARY}-2"));
    wire.say(&format!("HELLO 2 AUTH default {CANARY} SETNAME n-{CANARY}"));
    for line in [
        "GOFLOW.ENQUEUE main @ TYPE @ META @ @ UNIQUE @ 1000 ID @",
        "GOFLOW.ENQUEUE main @ PRIORITY @",
        "GOFLOW.ENQUEUEMANY main 2 @ @",
        "GOFLOW.DEQUEUE main WORKER @",
        "GOFLOW.JOB main @",
        "GOFLOW.ACK main @ RESULT @",
        "GOFLOW.LOCK ACQUIRE lamp 1000 OWNER @",
        "GOFLOW.NONSENSE @ @",
        "NONSENSE @ @",
        "SET @ @",
        "LPUSH @ @",
        "INCR @",
        "MSET @ @",
        "EVAL @ 0 @",
        "PUBLISH @ @",
        "CLIENT SETNAME @",
        "CONFIG SET requirepass @",
        "MIGRATE 127.0.0.1 1 @ 0 1 AUTH @",
    ] {
        wire.say(&line.replace('@', CANARY));
    }
    let job = wire.say("GOFLOW.DEQUEUE main");
    let receipt = job.field("receipt").text();
    wire.say(&format!("GOFLOW.FAIL main {receipt} ERROR {CANARY} TRACE {CANARY} DEAD"));
    wire.send_raw(format!("*1\r\n$-7 {CANARY}\r\n"));
    drop(wire.read_to_close());
    let authorization = "Authorization: Basic ZGVmYXVsdDpjYW5hcnktOGYzYQ==";
    let post = format!("POST /v1/queues/main/jobs HTTP/1.1\nContent-Type: application/json\n{authorization}");
    assert_eq!(site.request(&post, &format!("{{\"payload\":\"{CANARY}\"}}")).status, 201);
    assert_eq!(site.request(&post, &format!("{{\"{CANARY}\":\"{CANARY}\"}}")).status, 400);
}

#[test]
fn no_line_holds_a_payload_or_a_secret_at_any_level_in_any_format() {
    for format in ["text", "json"] {
        let server = Server::start(Flavour::Redis7, &["--requirepass", CANARY]);
        let url = format!("s1=redis://:{CANARY}@{}", server.address());
        let env = [("GOFLOW_AUTH_PASSWORD", CANARY), ("GOFLOW_LOG_FORMAT", format), ("GOFLOW_LOG_SLOW_MS", "1")];
        let mut site = Site::start_with(&["--shard", &url, "--log", "trace"], &env);
        put_canaries_everywhere(&site);
        let mut wire = site.goflow.wire();
        wire.say(&format!("AUTH {CANARY}"));
        let slow = slow_command(&server, &site.goflow, &mut wire);
        let told = format!("{slow:?} {:?} {:?}", wire.say("CONFIG GET *"), wire.say("GOFLOW.SHARDS"));
        assert!(!told.contains(CANARY), "{told}");
        let metrics = site.get("/metrics").body;
        assert!(!metrics.contains(CANARY));
        // What happens when the shard goes is said in many words, too.
        site.goflow.expect_log("shard is down");
        site.goflow.expect_log("a queue could not be registered");
        drop(server);
        assert!(wire.say(&format!("GOFLOW.ENQUEUE main {CANARY}")).is_error("SHARDDOWN"));
        wire.say(&format!("SET {CANARY} {CANARY}"));
        site.goflow.wait_for_log("shard is down");
        site.goflow.terminate();
        let log = site.goflow.log();
        for module in ["goflow::slow", "goflow::dispatch::lane", "goflow::shard::redis::link"] {
            assert!(log.iter().any(|line| line.contains(module)), "{module} said nothing: {}", log.join("\n"));
        }
        let leak =
            log.iter().find(|line| line.contains(CANARY) || line.contains("Y2FuYXJ5") || line.contains("jYW5hcnk"));
        assert_eq!(leak, None);
    }
}

#[test]
fn a_configuration_that_is_refused_is_named_by_line_and_column_and_not_repeated() {
    let dir = scratch();
    let file = dir.path().join("goflow.toml");
    let write = |text: &str| std::fs::write(&file, text).unwrap();
    let path = file.to_string_lossy();
    write("[log]\nlevel = 'trace'\n[[shard]]\nname = 's1'\nurl = 'memory:'");
    let mut goflow = Goflow::start(&["--config", &path]);
    goflow.expect_log("SIGHUP");
    for (text, named) in [
        (format!("[auth]\npasswrd = '{CANARY}'"), "line 2, column 1: unknown field `passwrd`"),
        (format!("[[shard]]\nname = 's1'\nurl = 'redis://:pa?{CANARY}@h?x'"), "line 3, column 7: unknown option"),
    ] {
        write(&text);
        let (status, _, said) = Goflow::run(&["check", "--config", &path]);
        assert_eq!(status.code(), Some(64), "{said}");
        assert!(said.contains(named) && !said.contains(CANARY), "{said}");
        let refusal = goflow.wire().say("GOFLOW.RELOAD").text();
        assert!(refusal.contains(named) && !refusal.contains(CANARY), "{refusal}");
        goflow.hangup();
        assert!(goflow.wait_for_log(named).contains("SIGHUP"));
    }
    goflow.terminate();
    assert!(!goflow.log().join("\n").contains(CANARY));
}

/// Makes one slow command, and answers the slow log's newest entry.
fn slow_command(server: &Server, goflow: &Goflow, wire: &mut Wire) -> Value {
    eventually!("a command was slow", {
        server.stop();
        wire.send(&["GOFLOW.ENQUEUE", "main", &format!("payload-{CANARY}"), "META", "k", CANARY]);
        // However long it takes until it is read, it waits for the server from then on.
        std::thread::sleep(Duration::from_millis(20));
        server.cont();
        drop(wire.read());
        let log = goflow.log();
        let entries = wire.say("SLOWLOG GET 1").items().to_vec();
        let said = log.iter().any(|line| line.contains("goflow::slow") && line.contains("GOFLOW.ENQUEUE"));
        entries.into_iter().next().filter(|entry| said && entry.items()[3].items()[0].text() == "GOFLOW.ENQUEUE")
    })
}

#[test]
fn a_slow_command_is_kept_and_told_of_and_a_wait_is_not_slow() {
    let server = Server::start(Flavour::Redis7, &[]);
    let url = format!("s1={}", server.url());
    let mut goflow = Goflow::start_with(&["--shard", &url], &[("GOFLOW_LOG_SLOW_MS", "5")]);
    let mut wire = goflow.wire();
    assert_eq!(wire.say("GOFLOW.DEQUEUE idle BLOCK 60"), Value::Null);
    let entry = slow_command(&server, &goflow, &mut wire);
    let fields = entry.items();
    assert_eq!(fields.len(), 6);
    assert!(fields[2].integer() >= 5_000, "microseconds: {entry:?}");
    let words: Vec<String> = fields[3].items().iter().map(Value::text).collect();
    assert_eq!(words, ["GOFLOW.ENQUEUE", "main", "... (4 more arguments)"]);
    assert!(fields[4].text().starts_with("127.0.0.1:"));
    let all = wire.say("SLOWLOG GET -1").items().to_vec();
    assert_eq!(wire.say("SLOWLOG LEN").integer() as usize, all.len());
    let slow: BTreeSet<String> = all.iter().map(|entry| entry.items()[3].items()[0].text()).collect();
    assert!(!slow.contains("GOFLOW.DEQUEUE"), "its wait was asked for: {slow:?}");
    // An ordinary command is named, and its key is not.
    eventually!("an ordinary command was slow", {
        server.stop();
        wire.send(&["SET", "key-of-somebody", "value"]);
        std::thread::sleep(Duration::from_millis(20));
        server.cont();
        drop(wire.read());
        let entry = wire.say("SLOWLOG GET 1").items()[0].items()[3].items().to_vec();
        (entry.iter().map(Value::text).collect::<Vec<_>>() == ["SET", "... (2 more arguments)"]).then_some(())
    });
    assert_eq!(wire.say("SLOWLOG RESET").text(), "OK");
    assert_eq!((wire.say("SLOWLOG LEN").integer(), wire.say("SLOWLOG GET").items().len()), (0, 0));
    goflow.terminate();
}

#[test]
fn lines_are_json_where_that_is_asked_for_and_each_module_has_its_level() {
    let env = [("GOFLOW_LOG_FORMAT", "json"), ("GOFLOW_LOG_LEVEL", "warn,goflow::server=info,goflow::session=trace")];
    let mut goflow = Goflow::start_with(&["--shard", "s1=memory:"], &env);
    goflow.wire().say("PING");
    let mut wire = goflow.wire();
    wire.send_raw("*1\r\n$x\r\n");
    drop(wire.read_to_close());
    assert!(goflow.terminate().success());
    let lines = json_lines(&goflow.log());
    let of = |target: &str| lines.iter().filter(|line| line["target"] == target).collect::<Vec<_>>();
    let drains = of("goflow::server");
    assert!(drains.iter().any(|line| line["level"] == "INFO" && line["fields"]["message"] == "draining"), "{lines:?}");
    assert!(lines.iter().all(|line| line["timestamp"].is_string()));
    let others =
        lines.iter().filter(|line| !["goflow::server", "goflow::session"].contains(&line["target"].as_str().unwrap()));
    assert!(
        others.clone().all(|line| ["WARN", "ERROR"].contains(&line["level"].as_str().unwrap())),
        "{:?}",
        others.collect::<Vec<_>>()
    );
}

#[test]
fn a_log_that_nobody_reads_any_more_stops_nobody() {
    let dir = scratch();
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", env!("CARGO_BIN_EXE_goflow"), "serve", "--listen", "127.0.0.1:0"]);
    command.args(["--http", "off", "--shard", "s1=memory:", "--log", "trace"]).current_dir(dir.path());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut reader = BufReader::new(child.stderr.take().unwrap());
    let mut read_line = || {
        let mut line = String::new();
        assert!(reader.read_line(&mut line).unwrap() > 0, "it ended");
        line
    };
    let mut lines = std::iter::repeat_with(&mut read_line);
    let announced = lines.find(|line| line.contains(" listening on ")).unwrap();
    let address = announced.trim().split_once(" listening on ").unwrap().1;
    while !read_line().starts_with("try: ") {}
    drop(reader);
    for _ in 0..20 {
        let mut wire = Wire::connect(address);
        assert!(wire.say("GOFLOW.ENQUEUE main hello").text().contains('~'));
        // Said at this level, to nobody.
        wire.send_raw("*1\r\n$x\r\n");
        drop(wire.read_to_close());
    }
    assert_eq!(Wire::connect(address).say("GOFLOW.LEN main").integer(), 20);
    let killed = Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert!(killed.success() && child.wait().unwrap().success());
}

#[test]
fn the_start_says_what_is_unsafe_about_a_shard() {
    let unsafe_one = Server::start(Flavour::Redis7, &["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"]);
    let safe_one = Server::start(Flavour::Redis7, Server::DURABLE);
    let (first, second) = (format!("loose={}", unsafe_one.url()), format!("sound={}", safe_one.url()));
    let goflow = Goflow::start(&["--shard", &first, "--shard", &second]);
    goflow.wait_for_log("allkeys-lru");
    goflow.wait_for_log("shard=sound");
    let warned = |shard: &str| {
        let log = goflow.log();
        let lines = log.iter().filter(|line| line.contains(" WARN ") && line.contains(shard)).cloned();
        lines.collect::<Vec<String>>()
    };
    assert!(warned("shard=loose").iter().any(|line| line.contains("appendonly")), "{:?}", warned("shard=loose"));
    assert_eq!(warned("shard=sound"), Vec::<String>::new());
}

#[test]
fn nothing_is_slow_where_that_is_turned_off() {
    let server = Server::start(Flavour::Redis7, &[]);
    let url = format!("s1={}", server.url());
    let goflow = Goflow::start_with(&["--shard", &url], &[("GOFLOW_LOG_SLOW_MS", "0")]);
    let mut wire = goflow.wire();
    server.stop();
    wire.send(&["GOFLOW.ENQUEUE", "main", "x"]);
    std::thread::sleep(Duration::from_millis(300));
    server.cont();
    assert!(wire.read().text().contains('~'));
    assert_eq!(wire.say("SLOWLOG LEN").integer(), 0);
}
