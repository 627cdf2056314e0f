//! What stands on the wire between a client and a running `goflow`: hostile frames, splits, order, bounds, passwords.
//!
//! The frames of [`crate::frames`] go to a real Redis and to a process, and the answers are compared; whatever one
//! connection sends, the process lives, its memory stays in bounds and another connection goes on.

use std::io::{ErrorKind, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::eventually;
use crate::frames::{Frame, answer, frames, frames_before_authentication};
use crate::support::goflow::Goflow;
use crate::support::servers::{Flavour, Server};
use crate::support::wire::{Value, Wire, encode};

/// What hostile clients may cost, in all: far below what any of them announces.
const GROWTH_MAX_KB: u64 = 48 << 10;

/// Resident memory of a process, in kB.
pub fn resident_kb(id: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

fn ok() -> Value {
    Value::Simple("OK".into())
}

fn bulk(text: &str) -> Value {
    Value::Bulk(text.into())
}

/// Sends each frame to both and compares, while a bystander is answered between them.
fn compare(redis: &Server, goflow: &Goflow, frames: &[Frame], bystander: &mut Wire) {
    let before = resident_kb(goflow.id());
    for Frame { name, bytes, differs } in frames {
        let expected = differs.map_or_else(|| answer(&redis.address(), bytes), |(ours, _)| ours.to_vec());
        let ours = answer(goflow.address(), bytes);
        assert!(
            ours == expected,
            "{name}: expected {:?}, got {:?}",
            String::from_utf8_lossy(&expected),
            String::from_utf8_lossy(&ours)
        );
        assert_eq!(bystander.say("ECHO still"), bulk("still"), "after {name}");
    }
    let grown = resident_kb(goflow.id()).saturating_sub(before);
    assert!(grown < GROWTH_MAX_KB, "the frames cost {grown} kB");
}

#[test]
fn every_hostile_frame_is_answered_as_redis_answers_it_and_nobody_else_notices() {
    let frames = frames();
    assert!(frames.len() >= 60);
    let (redis, goflow) = (Server::start(Flavour::Redis7, &[]), Goflow::start(&[]));
    compare(&redis, &goflow, &frames, &mut goflow.wire());
}

#[test]
fn before_the_password_the_bounds_are_tighter() {
    let redis = Server::start(Flavour::Redis7, &["--requirepass", "x"]);
    let goflow = Goflow::start_with(&[], &[("GOFLOW_AUTH_PASSWORD", "x")]);
    let mut bystander = goflow.wire();
    assert_eq!(bystander.say("AUTH x"), ok());
    compare(&redis, &goflow, &frames_before_authentication(), &mut bystander);
}

#[test]
fn without_the_password_nothing_but_the_handshake_is_answered() {
    let goflow = Goflow::start_with(&[], &[("GOFLOW_AUTH_PASSWORD", "x")]);
    let mut wire = goflow.wire();
    for line in
        ["PING", "GOFLOW.ENQUEUE main x", "GOFLOW.DEQUEUE main BLOCK 0", "CLIENT LIST", "NOSUCH", "COMMAND DOCS"]
    {
        assert_eq!(wire.say(line), Value::Error("NOAUTH Authentication required.".into()), "{line}");
    }
    assert!(wire.say("HELLO 3").is_error("NOAUTH"));
    assert!(wire.say("AUTH y").is_error("WRONGPASS"));
    assert!(wire.say("AUTH nobody x").is_error("WRONGPASS"));
    assert!(wire.say("HELLO 3 AUTH default y").is_error("WRONGPASS"));
    let hello = wire.say("HELLO 3 AUTH default x SETNAME me");
    assert_eq!(hello.field("proto"), &Value::Integer(3));
    assert_eq!(wire.say("CLIENT GETNAME"), bulk("me"));
    assert_eq!(wire.say("RESET"), Value::Simple("RESET".into()));
    assert!(wire.say("PING").is_error("NOAUTH"), "RESET takes the authentication back");
    // A failing AUTH in a pipeline is one reply like any other.
    wire.send_raw("AUTH y\r\nPING\r\nAUTH x\r\nPING\r\n");
    assert!(wire.read().is_error("WRONGPASS"));
    assert!(wire.read().is_error("NOAUTH"));
    assert_eq!((wire.read(), wire.read()), (ok(), Value::Simple("PONG".into())));
}

#[test]
fn ten_thousand_pipelined_commands_get_ten_thousand_replies_in_order() {
    let goflow = Goflow::start(&[]);
    let mut wire = goflow.wire();
    let mut writer = TcpStream::connect(goflow.address()).unwrap();
    let bytes: Vec<u8> = (0..10_000).flat_map(|n| encode(&["GOFLOW.ENQUEUE", "main", &n.to_string()])).collect();
    let mut reader = Wire::over(writer.try_clone().unwrap());
    let sending = std::thread::spawn(move || writer.write_all(&bytes).unwrap());
    let ids: Vec<String> = (0..10_000).map(|_| reader.read().text()).collect();
    sending.join().unwrap();
    // One connection, one queue, one shard: the jobs lie in the order in which they were sent.
    assert_eq!(wire.say("GOFLOW.LEN main"), Value::Integer(10_000));
    let jobs = wire.say("GOFLOW.DEQUEUE main COUNT 1000");
    for (number, job) in jobs.items().iter().enumerate() {
        assert_eq!((job.field("payload"), job.field("id").text()), (&bulk(&number.to_string()), ids[number].clone()));
    }
}

#[test]
fn a_command_may_come_one_byte_at_a_time() {
    let goflow = Goflow::start(&[]);
    let (mut slow, mut other) = (goflow.wire(), goflow.wire());
    for byte in encode(&["GOFLOW.ENQUEUE", "main", "slow\r\n*1", "META", "k", "v"]) {
        slow.send_raw([byte]);
        assert_eq!(other.say("PING"), Value::Simple("PONG".into()));
    }
    assert!(matches!(slow.read(), Value::Bulk(_)));
    for byte in b"GOFLOW.DEQUEUE main\r\n" {
        slow.send_raw([*byte]);
    }
    assert_eq!(slow.read().field("payload"), &bulk("slow\r\n*1"));
}

#[test]
fn half_a_frame_and_silence_cost_others_nothing_and_may_be_finished_later() {
    let goflow = Goflow::start(&[]);
    let before = resident_kb(goflow.id());
    let frame = encode(&["ECHO", "late"]);
    let mut silent: Vec<Wire> = (0..200).map(|_| goflow.wire()).collect();
    silent.iter_mut().for_each(|wire| wire.send_raw(&frame[..frame.len() / 2]));
    // What is announced is not reserved: 100 times half a gigabyte.
    let mut boasting: Vec<Wire> = (0..100).map(|_| goflow.wire()).collect();
    boasting
        .iter_mut()
        .for_each(|wire| wire.send_raw("*3\r\n$14\r\nGOFLOW.ENQUEUE\r\n$4\r\nmain\r\n$536870912\r\nabc"));
    let mut other = goflow.wire();
    assert!(matches!(other.say("GOFLOW.ENQUEUE main x"), Value::Bulk(_)));
    assert_eq!(other.say("GOFLOW.DEQUEUE main BLOCK 0").field("payload"), &bulk("x"));
    let grown = resident_kb(goflow.id()).saturating_sub(before);
    assert!(grown < GROWTH_MAX_KB, "300 silent connections cost {grown} kB");
    for wire in &mut silent {
        wire.send_raw(&frame[frame.len() / 2..]);
        assert_eq!(wire.read(), bulk("late"));
    }
}

#[test]
fn replies_keep_the_order_of_the_requests_around_blocking_commands() {
    let goflow = Goflow::start(&[]);
    let (mut wire, mut other) = (goflow.wire(), goflow.wire());
    let lines = [
        "ECHO 1",
        "GOFLOW.DEQUEUE a BLOCK 0",
        "ECHO 2",
        "GOFLOW.DEQUEUE b BLOCK 1",
        "GOFLOW.LEN a",
        "NOSUCH",
        "ECHO 3",
    ];
    lines.iter().for_each(|line| wire.send(&line.split(' ').collect::<Vec<_>>()));
    assert_eq!(wire.read(), bulk("1"));
    eventually!("it is blocked", other.say("INFO clients").text().contains("blocked_clients:1").then_some(()));
    other.say("GOFLOW.ENQUEUE a job");
    assert_eq!(wire.read().field("payload"), &bulk("job"));
    assert_eq!(wire.read(), bulk("2"));
    assert_eq!(wire.read(), Value::Null);
    assert_eq!(wire.read(), Value::Integer(0));
    assert_eq!(wire.read(), Value::Error("ERR unknown command 'NOSUCH', with args beginning with: ".into()));
    assert_eq!(wire.read(), bulk("3"));
}

#[test]
fn a_client_that_does_not_read_is_not_read_from() {
    let goflow = Goflow::start(&[]);
    let before = resident_kb(goflow.id());
    let frame = encode(&["ECHO", &"x".repeat(10_000)]);
    let mut stream = TcpStream::connect(goflow.address()).unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut other = goflow.wire();
    let (mut sent, mut taken) = (0usize, String::new());
    // Sends until the process has stopped taking anything in.
    eventually!("the process stops reading", {
        let full = loop {
            match stream.write(&frame[sent % frame.len()..]) {
                Ok(count) => sent += count,
                Err(error) => break error.kind() == ErrorKind::WouldBlock,
            }
        };
        assert!(full && sent < 256 << 20, "the process took {sent} bytes of a client that reads nothing");
        let stats = other.say("INFO stats").text();
        // The bystander's own question is 25 bytes or so; a stopped flow counts no more than that.
        let input = stats.lines().find(|line| line.starts_with("total_net_input_bytes")).unwrap().to_owned();
        let number = |text: &str| text.split(':').nth(1).map_or(0, |n| n.parse::<u64>().unwrap());
        let stopped = number(&input).saturating_sub(number(&taken)) < 100;
        taken = input;
        stopped.then_some(())
    });
    let grown = resident_kb(goflow.id()).saturating_sub(before);
    assert!(grown < GROWTH_MAX_KB, "a reader that reads nothing costs {grown} kB");
    // Once it reads, it gets every reply to what it sent whole.
    stream.set_nonblocking(false).unwrap();
    let mut reader = Wire::over(stream);
    for _ in 0..sent / frame.len() {
        assert_eq!(reader.read().text().len(), 10_000);
    }
}

#[test]
fn nothing_behind_quit_is_done() {
    let goflow = Goflow::start(&[]);
    let mut wire = goflow.wire();
    wire.send_raw("GOFLOW.ENQUEUE main a\r\nQUIT\r\nGOFLOW.ENQUEUE main b\r\n\0\0*");
    let said = String::from_utf8(wire.read_to_close()).unwrap();
    assert!(said.starts_with('$') && said.ends_with("\r\n+OK\r\n"), "{said:?}");
    assert_eq!(goflow.wire().say("GOFLOW.LEN main"), Value::Integer(1));
}

#[test]
fn a_client_that_wants_no_replies_gets_none_and_its_commands_are_done() {
    let goflow = Goflow::start(&[]);
    let mut wire = goflow.wire();
    wire.send_raw("CLIENT REPLY SKIP\r\nGOFLOW.ENQUEUE main a\r\nECHO 1\r\n");
    assert_eq!(wire.read(), bulk("1"));
    wire.send_raw("CLIENT REPLY OFF\r\nGOFLOW.ENQUEUE main b\r\nNOSUCH\r\nECHO 2\r\nCLIENT REPLY ON\r\nECHO 3\r\n");
    assert_eq!((wire.read(), wire.read()), (ok(), bulk("3")));
    assert_eq!(wire.say("GOFLOW.LEN main"), Value::Integer(2));
    // Who cannot hear of a job does not get one.
    wire.send_raw("CLIENT REPLY SKIP\r\nGOFLOW.DEQUEUE main\r\nECHO 4\r\n");
    assert_eq!(wire.read(), bulk("4"));
    eventually!("the job is back", (wire.say("GOFLOW.LEN main") == Value::Integer(2)).then_some(()));
    assert_eq!(wire.say("GOFLOW.DEQUEUE main").field("attempt"), &Value::Integer(1));
}

#[test]
fn reset_makes_a_connection_as_new() {
    let goflow = Goflow::start(&[]);
    let mut wire = goflow.wire();
    wire.say("HELLO 3 SETNAME me");
    wire.send_raw("CLIENT REPLY OFF\r\n");
    wire.send_raw("RESET\r\n");
    // RESET turns replies on again, from its own on, as in Redis.
    let reply = wire.read();
    assert_eq!(reply, Value::Simple("RESET".into()));
    assert_eq!(wire.say("CLIENT GETNAME"), Value::Null);
    assert_eq!(wire.say("HELLO").field("proto"), &Value::Integer(2));
}

/// The field of a line of `CLIENT LIST`.
fn listed(line: &str, field: &str) -> String {
    let found = line.split(' ').find_map(|word| word.strip_prefix(field)?.strip_prefix('='));
    found.unwrap_or_else(|| panic!("no {field} in {line}")).to_owned()
}

#[test]
fn clients_are_listed_unblocked_and_killed() {
    let goflow = Goflow::start(&[]);
    let (mut wire, mut admin) = (goflow.wire(), goflow.wire());
    wire.say("HELLO 3 SETNAME waiter");
    wire.say("CLIENT SETINFO LIB-NAME mine");
    let id = wire.say("CLIENT ID").integer();
    assert_eq!(admin.call(&["CLIENT", "UNBLOCK", &id.to_string()]), Value::Integer(0), "it does not wait");
    for (how, answer) in
        [("TIMEOUT", Value::Null), ("ERROR", Value::Error("UNBLOCKED client unblocked via CLIENT UNBLOCK".into()))]
    {
        wire.send(&["GOFLOW.DEQUEUE", "main", "BLOCK", "0"]);
        let line = eventually!("it is listed as blocked", {
            let list = admin.say("CLIENT LIST").text();
            list.lines()
                .find(|line| listed(line, "id") == id.to_string() && listed(line, "flags") == "b")
                .map(str::to_owned)
        });
        assert_eq!(listed(&line, "name"), "waiter");
        assert_eq!(listed(&line, "lib-name"), "mine");
        assert_eq!(listed(&line, "resp"), "3");
        assert!(listed(&line, "cmd").eq_ignore_ascii_case("goflow.dequeue"), "{line}");
        assert_eq!(admin.call(&["CLIENT", "UNBLOCK", &id.to_string(), how]), Value::Integer(1));
        assert_eq!(wire.read(), answer);
    }
    // A wait that was ended takes no job later.
    admin.say("GOFLOW.ENQUEUE main x");
    assert_eq!(admin.say("GOFLOW.DEQUEUE main").field("attempt"), &Value::Integer(1));
    wire.send(&["GOFLOW.DEQUEUE", "other", "BLOCK", "0"]);
    assert_eq!(admin.call(&["CLIENT", "KILL", "ID", &id.to_string()]), Value::Integer(1));
    assert!(wire.read_to_close().is_empty());
    assert_eq!(admin.call(&["CLIENT", "KILL", "ID", &id.to_string()]), Value::Integer(0));
    eventually!("it is listed no more", (!admin.say("CLIENT LIST").text().contains("waiter")).then_some(()));
}

#[test]
fn one_connection_too_many_is_told_so() {
    let goflow = Goflow::start_with(&[], &[("GOFLOW_LIMITS_CONNECTIONS_MAX", "3")]);
    let mut held: Vec<Wire> = (0..3).map(|_| goflow.wire()).collect();
    held.iter_mut().for_each(|wire| assert_eq!(wire.say("PING"), Value::Simple("PONG".into())));
    let mut fourth = goflow.wire();
    assert_eq!(fourth.read(), Value::Error("ERR max number of clients reached".into()));
    held.pop();
    eventually!("there is room again", {
        let reply = goflow.wire().try_call(&["PING"], Duration::from_secs(1));
        (reply == Ok(Value::Simple("PONG".into()))).then_some(())
    });
}
