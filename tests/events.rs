//! What is recorded agrees with what happened: for the readers of one job's history, of a queue's journal, and live.
//!
//! [`Checker`] holds histories and journals against each other and against the state machine; the loss test gives it
//! everything that its clients were told. Listeners are stock clients, `tests/clients/listen.py` and `listen.js`.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use crate::eventually;
use crate::support::fleet::Fleet;
use crate::support::goflow::Goflow;
use crate::support::process::{Process, Program, on_path, venv};
use crate::support::servers::{Flavour, Server};
use crate::support::wire::{Value, Wire};
use crate::support::{scratch, size};

/// An event as a client reads it.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub what: String,
    pub id: String,
    pub at: i64,
    pub attempt: Option<i64>,
    pub error: String,
    pub shard: String,
    pub missing: Option<i64>,
}

fn optional<'a>(map: &'a [Value], name: &str) -> Option<&'a Value> {
    map.chunks_exact(2).find(|pair| pair[0].text() == name).map(|pair| &pair[1])
}

impl Event {
    fn read(map: &Value) -> Event {
        let map = map.items();
        let text = |name: &str| optional(map, name).map_or_else(String::new, Value::text);
        let number = |name: &str| optional(map, name).filter(|value| **value != Value::Null).map(Value::integer);
        Event {
            what: text("type"),
            id: text("id"),
            at: number("at").unwrap_or(0),
            attempt: number("attempt"),
            error: text("error"),
            shard: text("shard"),
            missing: number("missing"),
        }
    }
}

fn history(wire: &mut Wire, queue: &str, id: &str) -> Vec<Event> {
    wire.send(&["GOFLOW.EVENTS", "JOB", queue, id]);
    read_history(wire)
}

fn read_history(wire: &mut Wire) -> Vec<Event> {
    let reply = wire.read();
    assert!(!matches!(reply, Value::Error(_)), "{reply:?}");
    reply.items().iter().map(Event::read).collect()
}

/// Reads on from a cursor until there is no more.
pub fn read_on(wire: &mut Wire, queue: &str, cursor: &mut String) -> Vec<Event> {
    let mut events = Vec::new();
    loop {
        let reply = wire.call(&["GOFLOW.EVENTS", "READ", queue, cursor, "COUNT", "1000"]);
        assert!(!matches!(reply, Value::Error(_)), "{reply:?}");
        *cursor = reply.items()[0].text();
        let page: Vec<Event> = reply.items()[1].items().iter().map(Event::read).collect();
        if page.is_empty() {
            return events;
        }
        events.extend(page);
    }
}

/// Holds what is recorded against the state machine.
pub struct Checker;

impl Checker {
    /// Why this is not the history of a job, if it is not.
    pub fn judge(history: &[Event]) -> Result<(), String> {
        let (mut state, mut failed, mut is_lapsed, mut last) = ("nothing", 0, false, 0);
        for event in history {
            let wrong = |why: &str| Err(format!("{} {why} in {history:#?}", event.what));
            if event.at < last {
                return wrong("goes back in time");
            }
            last = event.at;
            let waits = matches!(state, "ready" | "scheduled" | "waits");
            state = match (state, event.what.as_str()) {
                ("nothing" | "scheduled" | "waits", "job.queued") => "ready",
                ("nothing", "job.scheduled") => "scheduled",
                ("ready" | "waits", "job.started") => {
                    if event.attempt != Some(failed + 1) {
                        return wrong("has another attempt");
                    }
                    is_lapsed = false;
                    "leased"
                }
                ("leased", "job.progress") => "leased",
                ("leased", "job.failed") => {
                    failed += 1;
                    is_lapsed = event.error.starts_with("lease lapsed");
                    "failed"
                }
                ("leased", "job.released") => "waits",
                ("leased", "job.completed") => "over",
                // The late ack of a lease that lapsed.
                (_, "job.completed") if (waits || state == "dead") && is_lapsed => "over",
                ("failed", "job.retried") => "waits",
                ("failed", "job.dlq") => "dead",
                ("dead", "job.redriven") => {
                    failed = 0;
                    "waits"
                }
                ("failed", "job.expired") => "over",
                (_, "job.expired") if waits => "over",
                (_, "job.cancelled") if waits || matches!(state, "leased" | "dead") => "over",
                (state, _) => return wrong(&format!("is not possible where the job is {state}")),
            };
        }
        match state {
            "failed" => Err(format!("nothing became of a failure in {history:#?}")),
            _ => Ok(()),
        }
    }

    /// The journal, job by job.
    pub fn by_job(journal: Vec<Event>) -> HashMap<String, Vec<Event>> {
        let mut jobs: HashMap<String, Vec<Event>> = HashMap::new();
        for event in journal {
            assert_ne!(event.what, "gap", "the journal is whole: {event:?}");
            jobs.entry(event.id.clone()).or_default().push(event);
        }
        jobs
    }

    /// Of each job a legal history, and the journal says the same; `ids` are all that the journal may name, if they are known.
    /// Each history also goes to `and`. How many events that were.
    pub fn check(wire: &mut Wire, queue: &str, ids: Option<&[String]>, mut and: impl FnMut(&str, &[Event])) -> usize {
        const AT_ONCE: usize = 100;
        let journal = Checker::by_job(read_on(wire, queue, &mut "0".into()));
        let named: Vec<String> = journal.keys().cloned().collect();
        let ids = ids.unwrap_or(&named);
        let mut count = 0;
        for ids in ids.chunks(AT_ONCE) {
            ids.iter().for_each(|id| wire.send(&["GOFLOW.EVENTS", "JOB", queue, id]));
            for id in ids {
                let history = read_history(wire);
                Checker::judge(&history).unwrap();
                assert_eq!(Some(&history), journal.get(id), "history and journal of {id}");
                Checker::bites(&history);
                and(id, &history);
                count += history.len();
            }
        }
        assert_eq!(ids.len(), journal.len(), "jobs in the journal");
        count
    }

    /// Shows of a history that a seeded fault is refused: a first start that is missing, an end that is there twice.
    fn bites(history: &[Event]) {
        let start = history.iter().position(|event| event.what == "job.started");
        // Without the start of a lease nothing but a cancel may follow.
        let follows = |at: usize| history.get(at + 1).is_some_and(|event| event.what != "job.cancelled");
        if let Some(at) = start.filter(|at| follows(*at)) {
            let missing = [&history[..at], &history[at + 1..]].concat();
            assert!(Checker::judge(&missing).is_err(), "the check is blind to a missing start: {missing:#?}");
        }
        if let Some(end) = history.last().filter(|event| event.what == "job.completed") {
            let doubled = [history, std::slice::from_ref(end)].concat();
            assert!(Checker::judge(&doubled).is_err(), "the check is blind to a doubled end: {doubled:#?}");
        }
    }
}

fn event(what: &str, attempt: Option<i64>) -> Event {
    Event {
        what: what.into(),
        id: String::new(),
        at: 0,
        attempt,
        error: String::new(),
        shard: String::new(),
        missing: None,
    }
}

#[test]
fn the_checker_catches_a_missing_and_an_extra_event() {
    let life = [
        event("job.queued", None),
        event("job.started", Some(1)),
        event("job.failed", Some(1)),
        event("job.retried", Some(1)),
        event("job.queued", None),
        event("job.started", Some(2)),
        event("job.completed", Some(2)),
    ];
    Checker::judge(&life).unwrap();
    for at in 0..life.len() {
        let mut less = life.to_vec();
        less.remove(at);
        // The last event, and falling due of a job that may have been retried at once, are missed by the other copy only.
        assert!(Checker::judge(&less).is_err() || matches!(at, 4 | 6), "without event {at}");
        let mut more = life.to_vec();
        more.insert(at, life[at].clone());
        assert!(Checker::judge(&more).is_err(), "with event {at} twice");
    }
}

/// Lets jobs live and die in every way that there is; returns their ids.
fn lives(wire: &mut Wire, jobs: usize) -> Vec<String> {
    let mut ids = Vec::new();
    for number in 0..jobs {
        let chosen = format!("chosen-{number}");
        let mut words = vec!["GOFLOW.ENQUEUE", "main", "work", "ATTEMPTS", "2", "BACKOFF", "0"];
        if number % 3 == 0 {
            words.extend(["ID", chosen.as_str()]);
        }
        ids.push(wire.call(&words).text());
    }
    for number in 0..jobs * 2 {
        let delivery = wire.say("GOFLOW.DEQUEUE main WORKER w1");
        if delivery == Value::Null {
            break;
        }
        let receipt = delivery.field("receipt").text();
        let words: &[&str] = match number % 4 {
            0 => &["GOFLOW.FAIL", "main", &receipt, "ERROR", "boom"],
            1 => &["GOFLOW.RELEASE", "main", &receipt],
            2 => &["GOFLOW.FAIL", "main", &receipt, "DEAD"],
            _ => &["GOFLOW.ACK", "main", &receipt, "RESULT", "done"],
        };
        assert!(!matches!(wire.call(words), Value::Error(_)));
    }
    ids
}

#[test]
fn histories_and_journal_of_every_shard_agree() {
    let fleet = Fleet::start_plain(2, 2, &[]);
    let ids = lives(&mut fleet.proxies[0].wire(), 60);
    let count = Checker::check(&mut fleet.proxies[1].wire(), "main", Some(&ids), |_, _| ());
    assert!(count > 200, "{count} events");
    let process = Goflow::start(&[]);
    let ids = lives(&mut process.wire(), 60);
    Checker::check(&mut process.wire(), "main", Some(&ids), |_, _| ());
}

#[test]
fn a_cursor_goes_on_after_restarts_and_over_a_new_shard() {
    let mut fleet = Fleet::start(2, 1, &[]);
    fleet.expect_failures();
    let ids = lives(&mut fleet.proxies[0].wire(), 20);
    let mut cursor = String::from("0");
    let mut told = read_on(&mut fleet.proxies[0].wire(), "main", &mut cursor);
    fleet.proxies[0].restart();
    fleet.shards[0].restart();
    let mut wire = fleet.proxies[0].wire();
    eventually!("the shard is back", (fleet.state(0, "s0") == "up").then_some(()));
    let more = lives(&mut wire, 0);
    assert!(more.is_empty());
    let again = eventually!(
        "a job is added",
        match wire.say("GOFLOW.ENQUEUE main again SHARD s0") {
            Value::Bulk(id) => Some(String::from_utf8(id).unwrap()),
            _ => None,
        }
    );
    told.extend(read_on(&mut wire, "main", &mut cursor));
    let jobs = Checker::by_job(told);
    assert!(ids.iter().chain([&again]).all(|id| jobs[id] == history(&mut wire, "main", id)));
}

#[test]
fn what_is_not_kept_any_more_is_said_with_its_number() {
    let server = Server::start(Flavour::Redis7, &[]);
    let url = format!("s0={}", server.url());
    let env = [("GOFLOW_EVENTS_JOURNAL", "100")];
    let process = Goflow::start_with(&["--shard", &url], &env);
    let mut wire = process.wire();
    wire.say("GOFLOW.ENQUEUE main first");
    let reply = wire.say("GOFLOW.EVENTS READ main 0");
    let cursor = reply.items()[0].text();
    let total: usize = 600;
    // One after the other: what comes together is recorded, and dropped, in one piece.
    for _ in 0..total {
        wire.say("GOFLOW.ENQUEUE main work");
    }
    let events = read_on(&mut wire, "main", &mut cursor.clone());
    let missing = events[0].missing.unwrap();
    assert_eq!(events[0].what, "gap");
    assert_eq!(missing as usize + events.len() - 1, total);
}

#[test]
fn a_reader_that_waits_hears_of_the_next_event_through_another_proxy() {
    let fleet = Fleet::start_plain(2, 2, &[]);
    let mut reader = fleet.proxies[1].wire();
    reader.send(&["GOFLOW.EVENTS", "READ", "main", "$", "BLOCK", "60000"]);
    eventually!("the reader waits", {
        let info = fleet.proxies[1].wire().say("INFO clients").text();
        info.contains("blocked_clients:1").then_some(())
    });
    // What comes before the shards were first asked is before `$`.
    let (mut ids, mut wire) = (Vec::new(), fleet.proxies[0].wire());
    let reply = eventually!("the reader hears of a job", {
        ids.push(wire.say("GOFLOW.ENQUEUE main work").text());
        reader.try_read(Duration::from_millis(200)).ok()
    });
    let events: Vec<Event> = reply.items()[1].items().iter().map(Event::read).collect();
    assert!(!events.is_empty());
    assert!(events.iter().all(|event| event.what == "job.queued" && ids.contains(&event.id)), "{events:?}");
}

#[test]
fn a_reader_that_waits_has_its_cursor_when_it_is_unblocked_or_its_proxy_drains() {
    let mut fleet = Fleet::start_plain(1, 2, &[]);
    let mut reader = fleet.proxies[1].wire();
    let id = reader.say("CLIENT ID").integer().to_string();
    let wait = |fleet: &Fleet, reader: &mut Wire| {
        reader.send(&["GOFLOW.EVENTS", "READ", "main", "$", "BLOCK", "600000"]);
        let is_blocked = || fleet.proxies[1].wire().say("INFO clients").text().contains("blocked_clients:1");
        eventually!("the reader waits", is_blocked().then_some(()));
    };
    let read_cursor = |reader: &mut Wire| {
        let reply = reader.read();
        assert!(reply.items()[1].items().is_empty(), "{reply:?}");
        reply.items()[0].text()
    };
    wait(&fleet, &mut reader);
    assert_eq!(fleet.proxies[1].wire().call(&["CLIENT", "UNBLOCK", &id]), Value::Integer(1));
    assert!(!read_cursor(&mut reader).contains('$'));
    let info = fleet.proxies[1].wire().say("INFO clients").text();
    assert!(info.contains("blocked_clients:0\r\n"), "it waits no more: {info}");
    wait(&fleet, &mut reader);
    assert!(fleet.proxies[1].terminate().success());
    let cursor = read_cursor(&mut reader);
    // What comes after is read elsewhere.
    let mut wire = fleet.proxies[0].wire();
    wire.say("GOFLOW.ENQUEUE main work");
    assert_eq!(read_on(&mut wire, "main", &mut cursor.clone()).len(), 1);
}

#[test]
fn a_shard_that_did_not_answer_a_reader_who_began_with_now_leaves_a_gap() {
    let mut fleet = Fleet::start_with(2, 1, &[], &[("GOFLOW_TIMEOUTS_ANSWER_MS", "1000")]);
    fleet.expect_failures();
    let mut wire = fleet.proxies[0].wire();
    for shard in ["s0", "s1"] {
        wire.call(&["GOFLOW.ENQUEUE", "main", "before", "SHARD", shard]);
    }
    fleet.shards[1].stop();
    let cursor = wire.say("GOFLOW.EVENTS READ main $").items()[0].text();
    assert!(cursor.contains("s1=$"), "{cursor}");
    fleet.shards[1].cont();
    eventually!("it is back", {
        matches!(wire.say("GOFLOW.ENQUEUE main missed SHARD s1"), Value::Bulk(_)).then_some(())
    });
    let events = read_on(&mut wire, "main", &mut cursor.clone());
    assert_eq!((events[0].what.as_str(), events[0].missing), ("gap", None));
}

/// A stock client that writes down each message of some channels.
fn listener(address: &str, python: bool, dir: &Path, words: &[&str]) -> Process {
    let (program, script) = match python {
        true => (venv().join("bin/python"), "listen.py"),
        false => (on_path("node").unwrap(), "listen.js"),
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients").join(script);
    let modules = venv().parent().unwrap().join("clients/node_modules");
    let log = dir.join(if python { "python" } else { "node" });
    let args = [script.into_os_string(), log.into_os_string(), address.into()];
    Process::start(&Program {
        path: program,
        args: args.into_iter().chain(words.iter().map(Into::into)).collect(),
        env: vec![("NODE_PATH".into(), modules.into_os_string())],
        dir: dir.to_owned(),
    })
}

fn messages(dir: &Path, name: &str) -> Vec<(String, serde_json::Value)> {
    let text = std::fs::read_to_string(dir.join(name)).unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole).lines();
    whole
        .map(|line| {
            let (channel, payload) = line.split_once(' ').unwrap();
            (channel.to_owned(), serde_json::from_str(payload).unwrap())
        })
        .collect()
}

#[test]
fn stock_subscribers_hear_each_event_once_in_its_shards_order() {
    let fleet = Fleet::start_plain(2, 2, &[]);
    let dir = scratch();
    let address = fleet.proxies[1].address();
    let python = listener(address, true, dir.path(), &["goflow:events:main", "goflow:dlq:main"]);
    let node = listener(address, false, dir.path(), &["goflow:events:*"]);
    python.stderr.wait_for("listening");
    node.stderr.wait_for("listening");
    let mut wire = fleet.proxies[0].wire();
    lives(&mut wire, size("GOFLOW_EVENTS_LIVE_JOBS", 60));
    let journal = read_on(&mut wire, "main", &mut "0".into());
    let of_shard = |shard: &str| -> Vec<(String, String)> {
        let own = journal.iter().filter(|event| event.shard == shard);
        own.map(|event| (event.what.clone(), event.id.clone())).collect()
    };
    for name in ["python", "node"] {
        let heard = eventually!("everything was heard", {
            let heard = messages(dir.path(), name);
            let events = heard.iter().filter(|(channel, _)| channel == "goflow:events:main").count();
            (events >= journal.len()).then_some(heard)
        });
        for shard in ["s0", "s1"] {
            let own = heard.iter().filter(|(channel, line)| channel == "goflow:events:main" && line["shard"] == *shard);
            let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
            let own: Vec<_> = own.map(|(_, line)| (text(&line["type"]), text(&line["id"]))).collect();
            assert_eq!(own, of_shard(shard), "{name} on {shard}");
        }
    }
    let died = journal.iter().filter(|event| event.what == "job.dlq").count();
    let heard = eventually!("the deaths were heard", {
        let heard = messages(dir.path(), "python");
        let deaths = heard.iter().filter(|(channel, _)| channel == "goflow:dlq:main").count();
        (deaths >= died).then_some(heard)
    });
    let deaths: Vec<_> = heard.iter().filter(|(channel, _)| channel == "goflow:dlq:main").collect();
    assert!(died > 0 && deaths.len() == died && deaths.iter().all(|(_, line)| line["type"] == "job.dlq"));
}

#[test]
fn a_subscriber_that_does_not_read_is_told_how_many_it_missed() {
    let process = Goflow::start(&["--shard", "s0=memory:"]);
    let mut slow = process.wire();
    slow.call(&["SUBSCRIBE", "goflow:events:main"]);
    let mut wire = process.wire();
    let (rounds, each) = (12, 10_000);
    let mut words = vec!["GOFLOW.ENQUEUEMANY".to_owned(), "main".into(), each.to_string()];
    words.extend((0..each).map(|_| "work".to_owned()));
    for _ in 0..rounds {
        assert_eq!(wire.call(&words).items().len(), each);
    }
    let (mut told, mut missed) = (0, 0);
    while told + missed < rounds * each {
        let message = slow.read();
        let line: serde_json::Value = serde_json::from_str(&message.items()[2].text()).unwrap();
        match line["type"].as_str().unwrap() {
            "gap" => missed += line["missing"].as_u64().unwrap() as usize,
            _ => told += 1,
        }
    }
    assert_eq!(told + missed, rounds * each);
    assert!(missed > 0, "{told} were told, so many fit on the way");
    let answer = wire.say("GOFLOW.LEN main").integer();
    assert_eq!(answer as usize, rounds * each, "nobody waited for it");
}

#[test]
fn the_history_of_a_job_is_found_among_many() {
    let jobs = size("GOFLOW_EVENTS_HISTORIES", 2_000);
    let server = Server::start(Flavour::Redis7, &[]);
    let url = format!("s0={}", server.url());
    let kept = jobs.to_string();
    let env = [("GOFLOW_EVENTS_HISTORIES", kept.as_str()), ("GOFLOW_QUEUE_RETENTION_JOBS", "10")];
    let process = Goflow::start_with(&["--shard", &url], &env);
    let mut wire = process.wire();
    let (mut ids, mut left) = (Vec::new(), jobs);
    while left > 0 {
        let many = left.min(1_000);
        let mut words = vec!["GOFLOW.ENQUEUEMANY".to_owned(), "main".into(), many.to_string()];
        words.extend((0..many).map(|_| "work".to_owned()));
        ids.extend(wire.call(&words).items().iter().map(Value::text));
        let deliveries = wire.call(&["GOFLOW.DEQUEUE", "main", "COUNT", &many.to_string()]);
        let mut ack = vec!["GOFLOW.ACK".to_owned(), "main".into()];
        ack.extend(deliveries.items().iter().map(|delivery| delivery.field("receipt").text()));
        assert_eq!(wire.call(&ack), Value::Integer(many as i64));
        left -= many;
    }
    let began = std::time::Instant::now();
    let asked = ids.iter().step_by((jobs / 200).max(1));
    let count = asked.clone().count();
    for id in asked {
        assert_eq!(history(&mut wire, "main", id).len(), 3, "job {id}");
    }
    println!("{jobs} histories: {:.3} ms each", began.elapsed().as_secs_f64() * 1e3 / count as f64);
}
