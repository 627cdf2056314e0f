//! At a bound the client is told which one it met, and whatever does not need more goes on.

use crate::support::goflow::Goflow;
use crate::support::servers::{Flavour, Server};
use crate::support::wire::Value;

#[test]
fn a_shard_that_is_out_of_memory_takes_no_jobs_and_is_drained_all_the_same() {
    let server = Server::start(Flavour::Redis7, &[]);
    let goflow = Goflow::start(&["--shard", &format!("s1={}", server.url())]);
    let mut wire = goflow.wire();
    for _ in 0..2 {
        wire.say("GOFLOW.ENQUEUE main hello");
    }
    let receipt = wire.say("GOFLOW.DEQUEUE main").field("receipt").text();
    server.wire().say("CONFIG SET maxmemory 1");
    let refused = wire.say("GOFLOW.ENQUEUE main hello");
    assert!(refused.is_error("OVERLOADED"), "{refused:?}");
    // In one batch with an enqueue that is refused, too.
    wire.send(&["GOFLOW.ENQUEUE", "main", "hello"]);
    wire.send(&["GOFLOW.ACK", "main", &receipt]);
    assert!(wire.read().is_error("OVERLOADED"));
    assert_eq!(wire.read(), Value::Integer(1));
    let receipt = wire.say("GOFLOW.DEQUEUE main").field("receipt").text();
    assert_eq!(wire.say(&format!("GOFLOW.ACK main {receipt}")), Value::Integer(1));
    server.wire().say("CONFIG SET maxmemory 0");
    assert!(matches!(wire.say("GOFLOW.ENQUEUE main hello"), Value::Bulk(_)));
}

#[test]
fn one_client_too_many_is_told_so() {
    let goflow = Goflow::start_with(&["--shard", "s1=memory:"], &[("GOFLOW_LIMITS_CONNECTIONS_MAX", "1")]);
    let mut first = goflow.wire();
    assert_eq!(first.say("PING"), Value::Simple("PONG".into()));
    let told = String::from_utf8(goflow.wire().read_to_close()).unwrap();
    assert_eq!(told, "-ERR max number of clients reached\r\n");
    assert_eq!(first.say("PING"), Value::Simple("PONG".into()));
}
