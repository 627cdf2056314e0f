//! Metrics, health, readiness and the HTTP API of the real binary, asked over a real socket.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};

use crate::eventually;
use crate::support::goflow::Goflow;
use crate::support::process::{Process, Program};
use crate::support::servers::{Flavour, Server};
use crate::support::wire::Wire;
use crate::support::{free_port, patience, scratch, size};

/// A server whose HTTP port is on.
pub struct Site {
    pub goflow: Goflow,
    address: String,
}

/// Status, headers in lower case, body.
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Site {
    pub fn start(args: &[&str]) -> Site {
        Site::start_with(args, &[])
    }

    pub fn start_with(args: &[&str], env: &[(&str, &str)]) -> Site {
        let goflow = Goflow::start_with_http(args, env);
        let mark = " http listening on ";
        let line = goflow.wait_for_log(mark);
        let address = line[line.find(mark).unwrap() + mark.len()..].trim().to_owned();
        Site { goflow, address }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn request(&self, head: &str, body: &str) -> Answer {
        let mut socket = TcpStream::connect(&self.address).unwrap();
        socket.set_read_timeout(Some(patience())).unwrap();
        let length = body.len();
        let lines = head.replace('\n', "\r\n");
        write!(socket, "{lines}\r\nHost: goflow\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}")
            .unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let body = match head.to_lowercase().contains("transfer-encoding: chunked") {
            true => panic!("a bounded answer says its length"),
            false => body.to_owned(),
        };
        Answer { status, head: head.to_lowercase(), body }
    }

    pub fn get(&self, path: &str) -> Answer {
        self.request(&format!("GET {path} HTTP/1.1"), "")
    }

    pub fn post(&self, path: &str, body: &Json) -> Answer {
        self.request(&format!("POST {path} HTTP/1.1\nContent-Type: application/json"), &body.to_string())
    }

    /// The samples of a scrape by series.
    pub fn samples(&self) -> BTreeMap<String, f64> {
        let body = self.get("/metrics").body;
        let lines = body.lines().filter(|line| !line.starts_with('#'));
        lines
            .map(|line| line.rsplit_once(' ').unwrap())
            .map(|(series, value)| (series.into(), value.parse().unwrap()))
            .collect()
    }
}

fn fields(answer: &Answer) -> Json {
    serde_json::from_str(&answer.body).unwrap_or_else(|error| panic!("{error}: {}", answer.body))
}

#[test]
fn a_jobs_way_is_counted_and_promtool_likes_the_page() {
    let site = Site::start(&["--shard", "s1=memory:"]);
    let mut wire = site.goflow.wire();
    wire.say("GOFLOW.ENQUEUE main one");
    wire.say("GOFLOW.ENQUEUE main two");
    let receipt = wire.say("GOFLOW.DEQUEUE main").field("receipt").text();
    wire.say(&format!("GOFLOW.ACK main {receipt}"));
    let receipt = wire.say("GOFLOW.DEQUEUE main").field("receipt").text();
    wire.say(&format!("GOFLOW.FAIL main {receipt} RETRYIN 60000"));
    wire.say("NONSENSE");
    let samples = site.samples();
    for (series, value) in [
        ("goflow_jobs_enqueued_total{queue=\"main\"}", 2.0),
        ("goflow_jobs_started_total{queue=\"main\"}", 2.0),
        ("goflow_jobs_completed_total{queue=\"main\"}", 1.0),
        ("goflow_jobs_failed_total{queue=\"main\"}", 1.0),
        ("goflow_jobs_retried_total{queue=\"main\"}", 1.0),
        ("goflow_job_duration_seconds_count{queue=\"main\"}", 2.0),
        ("goflow_job_wait_seconds_count{queue=\"main\"}", 2.0),
        ("goflow_workers_active", 1.0),
        ("goflow_connections", 1.0),
        ("goflow_errors_total{code=\"ERR\"}", 1.0),
        ("goflow_shard_up{shard=\"s1\"}", 1.0),
        ("goflow_command_duration_seconds_count{command=\"GOFLOW.ENQUEUE\"}", 2.0),
    ] {
        assert_eq!(samples.get(series), Some(&value), "{series}");
    }
    eventually!("the depths are sampled", {
        (site.samples().get("goflow_queue_scheduled{queue=\"main\"}") == Some(&1.0)).then_some(())
    });
    let mut promtool = Command::new("promtool").args(["check", "metrics"]).stdin(Stdio::piped()).spawn().unwrap();
    promtool.stdin.take().unwrap().write_all(site.get("/metrics").body.as_bytes()).unwrap();
    assert!(promtool.wait().unwrap().success(), "promtool check metrics");
}

#[test]
fn ordinary_commands_are_counted_and_timed_with_their_errors_and_their_round_trips() {
    let shard = Server::start(Flavour::Redis7, &[]);
    let url = format!("s1={}", shard.url());
    let site = Site::start(&["--shard", &url]);
    let mut wire = site.goflow.wire();
    for (line, answer) in [("SET a 1", "OK"), ("GET a", "1"), ("GET a", "1")] {
        assert_eq!(wire.say(line).text(), answer);
    }
    assert!(wire.say("LPUSH a x").is_error("WRONGTYPE"));
    wire.say("CLIENT SETNAME me");
    let samples = site.samples();
    for (series, value) in [
        ("goflow_command_duration_seconds_count{command=\"SET\"}", 1.0),
        ("goflow_command_duration_seconds_count{command=\"GET\"}", 2.0),
        ("goflow_command_duration_seconds_count{command=\"LPUSH\"}", 1.0),
        ("goflow_command_duration_seconds_count{command=\"CLIENT|SETNAME\"}", 1.0),
        ("goflow_errors_total{code=\"WRONGTYPE\"}", 1.0),
        // One after the other: each was a round trip of its own.
        ("goflow_link_duration_seconds_count{shard=\"s1\"}", 4.0),
    ] {
        assert_eq!(samples.get(series), Some(&value), "{series}");
    }
}

#[test]
fn openmetrics_is_for_who_asks_for_it() {
    let site = Site::start(&["--shard", "s1=memory:"]);
    let answer = site.request("GET /metrics HTTP/1.1\nAccept: application/openmetrics-text; version=1.0.0", "");
    assert!(answer.head.contains("application/openmetrics-text; version=1.0.0"));
    assert!(answer.body.ends_with("# EOF\n"));
    assert!(answer.body.contains("# TYPE goflow_received_bytes counter\n"));
    assert!(site.get("/metrics").head.contains("text/plain; version=0.0.4"));
}

#[test]
fn thousands_of_queues_do_not_grow_the_page_beyond_its_bound() {
    let site = Site::start(&["--shard", "s1=memory:"]);
    let mut wire = site.goflow.wire();
    let enqueue = |wire: &mut crate::support::wire::Wire, from: usize, to: usize| {
        (from..to).for_each(|number| wire.send(&["GOFLOW.ENQUEUE", &format!("queue-{number}"), "x"]));
        (from..to).for_each(|_| drop(wire.read().text()));
    };
    (0..200).step_by(50).for_each(|from| enqueue(&mut wire, from, from + 50));
    let depths = |samples: &BTreeMap<String, f64>| {
        let depths = samples.iter().filter(|(series, _)| series.starts_with("goflow_queue_depth{"));
        depths.map(|(_, depth)| *depth).sum::<f64>()
    };
    eventually!("200 jobs are sampled", (depths(&site.samples()) == 200.0).then_some(()));
    let few = site.samples().len();
    let queues = size("GOFLOW_SERIES_QUEUES", 2_000);
    (200..queues).step_by(200).for_each(|from| enqueue(&mut wire, from, from + 200));
    eventually!("the jobs of all queues are sampled", (depths(&site.samples()) == queues as f64).then_some(()));
    assert_eq!(site.samples().len(), few, "the number of series");
}

#[test]
fn three_proxies_show_each_job_of_a_shard_once_and_another_takes_over_from_a_killed_one() {
    let shards: Vec<Server> = (0..2).map(|_| Server::start(Flavour::Redis7, &[])).collect();
    let urls: Vec<String> = shards.iter().enumerate().map(|(n, shard)| format!("s{n}={}", shard.url())).collect();
    let args = ["--shard", &urls[0], "--shard", &urls[1], "--strategy", "round-robin"];
    let mut sites: Vec<Site> = (0..3).map(|_| Site::start(&args)).collect();
    let mut wire = sites[0].goflow.wire();
    for number in 0..100 {
        assert!(wire.say(&format!("GOFLOW.ENQUEUE main {number}")).text().contains('~'));
    }
    let sum = |sites: &[Site], series: &str| -> f64 {
        sites
            .iter()
            .map(|site| site.samples().iter().filter(|(name, _)| name.starts_with(series)).map(|(_, v)| v).sum::<f64>())
            .sum()
    };
    let depth = "goflow_queue_depth{queue=\"main\"}";
    let is_true = |sites: &[Site]| sum(sites, depth) == 100.0 && sum(sites, "goflow_shard_sampled") == 2.0;
    eventually!("the sum over three proxies is the truth, by one for each shard", is_true(&sites).then_some(()));
    let leader = sites.iter().position(|site| site.samples().contains_key(depth)).unwrap();
    let mut killed = sites.remove(leader);
    killed.goflow.kill();
    eventually!("the others have taken over", is_true(&sites).then_some(()));
}

#[test]
fn readiness_tells_starting_from_ready_from_draining() {
    let shard = Server::start(Flavour::Redis7, &[]);
    // It takes connections and answers nothing, so the start waits for it as long as it ever does.
    shard.stop();
    let (dir, http) = (scratch(), format!("127.0.0.1:{}", free_port()));
    let args = ["serve", "--listen", "127.0.0.1:0", "--http", &http, "--shard", &format!("s1={}", shard.url())];
    let program = Program {
        path: env!("CARGO_BIN_EXE_goflow").into(),
        args: args.map(Into::into).to_vec(),
        env: Vec::new(),
        dir: dir.path().to_owned(),
    };
    let process = Process::start(&program);
    let ask = |path: &str| {
        let mut socket = TcpStream::connect(&http).ok()?;
        write!(socket, "GET {path} HTTP/1.1\r\nHost: goflow\r\nConnection: close\r\n\r\n").ok()?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.split(' ').nth(1)?.parse::<u16>().ok()?, body.trim().to_owned()))
    };
    let said = eventually!("it answers before it serves", ask("/readyz"));
    assert_eq!(said, (503, "starting".into()));
    assert_eq!(ask("/healthz"), Some((200, "ok".into())), "a start that takes long is no reason to be restarted");
    shard.cont();
    eventually!("it is ready", (ask("/readyz") == Some((200, "ready".into()))).then_some(()));
    // A client that holds the drain up: its command is with a server that does not answer.
    let address = process.stderr.wait_for("listening on ");
    let mut wire = Wire::connect(address.rsplit(' ').next().unwrap());
    // Its connection is not among those that nobody has taken yet, and the proxy has one to the server.
    assert_eq!(wire.say("SET a b").text(), "OK");
    shard.stop();
    wire.send(&["SET", "a", "b"]);
    process.signal("TERM");
    eventually!("it says that it drains", (ask("/readyz") == Some((503, "draining".into()))).then_some(()));
    assert_eq!(ask("/healthz"), Some((200, "ok".into())));
    shard.cont();
    assert_eq!(wire.read().text(), "OK", "what was under way is answered");
    let mut process = process;
    assert!(process.wait().success());
}

#[test]
fn a_drain_waits_for_what_was_asked_over_http_and_until_its_answer_is_read() {
    let bounds = [("GOFLOW_TIMEOUTS_DRAIN_MS", "60000")];
    let mut site = Site::start_with(&["--shard", "s1=memory:"], &bounds);
    // More than the kernel holds for somebody who does not read.
    let large = "x".repeat(15 << 20);
    assert_eq!(site.request("POST /v1/queues/main/jobs?id=large HTTP/1.1", &large).status, 201);
    let connect = || {
        let socket = TcpStream::connect(site.address()).unwrap();
        socket.set_read_timeout(Some(patience())).unwrap();
        socket
    };
    let (mut begun, mut unread, mut idle) = (connect(), connect(), connect());
    write!(begun, "POST /v1/queues/main/jobs?id=mine HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf ").unwrap();
    write!(unread, "GET /v1/queues/main/jobs/large HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    assert_eq!(unread.peek(&mut [0]).unwrap(), 1, "its answer is on the way");
    write!(idle, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = vec![0; 15];
    idle.read_exact(&mut answer).unwrap();
    assert_eq!(answer, b"HTTP/1.1 200 OK");
    site.goflow.signal("TERM");
    let draining = eventually!("it says that it drains", Some(site.get("/readyz")).filter(|said| said.status == 503));
    assert_eq!((draining.body.as_str(), draining.head.contains("connection: close")), ("draining\n", true));
    assert_eq!(site.get("/healthz").status, 200);
    write!(begun, "done.").unwrap();
    let mut answer = String::new();
    begun.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 201 ") && answer.ends_with(r#"{"id":"mine"}"#), "{answer}");
    assert!(answer.to_lowercase().contains("\r\nconnection: close\r\n"), "{answer}");
    let mut answer = Vec::new();
    unread.read_to_end(&mut answer).unwrap();
    let (head, body) = answer.split_at(answer.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4);
    let length = format!("content-length: {}\r\n", body.len());
    assert!(String::from_utf8_lossy(head).to_lowercase().contains(&length), "{} bytes", body.len());
    // Nobody asked anything on the one that is left.
    assert!(site.goflow.wait().success());
}

#[test]
fn head_is_answered_as_get_is_without_the_body() {
    let site = Site::start(&["--shard", "s1=memory:"]);
    for path in ["/healthz", "/readyz", "/metrics", "/"] {
        let answer = site.request(&format!("HEAD {path} HTTP/1.1"), "");
        assert_eq!((answer.status, answer.body.as_str()), (200, ""), "{path}");
        assert!(!answer.head.contains("content-length: 0"), "{path}: {}", answer.head);
    }
}

#[test]
fn readiness_says_when_no_shard_answers_and_health_stays_true() {
    let shard = Server::start(Flavour::Redis7, &[]);
    let url = format!("s1={}", shard.url());
    let mut site = Site::start(&["--shard", &url]);
    site.goflow.expect_log("shard is down");
    assert_eq!((site.get("/readyz").status, site.get("/healthz").status), (200, 200));
    drop(shard);
    eventually!("it is not ready", (site.get("/readyz").status == 503).then_some(()));
    assert_eq!(site.get("/healthz").status, 200);
    assert_eq!(site.samples().get("goflow_shard_up{shard=\"s1\"}"), Some(&0.0));
}

#[test]
fn one_job_or_many_are_posted_and_read_back() {
    let site = Site::start(&["--shard", "s1=memory:"]);
    let posted = site
        .post("/v1/queues/main/jobs", &json!({"payload": "hello", "id": "mine", "priority": 7, "meta": {"k": "v"}}));
    assert_eq!((posted.status, fields(&posted)), (201, json!({"id": "mine"})));
    let job = fields(&site.get("/v1/queues/main/jobs/mine"));
    assert_eq!(
        (&job["payload"], &job["priority"], &job["meta"], &job["state"]),
        (&json!("hello"), &json!(7), &json!({"k": "v"}), &json!("ready"))
    );
    let raw =
        site.request("POST /v1/queues/main/jobs?type=bytes&priority=9 HTTP/1.1\nContent-Type: text/plain", "as it is");
    assert_eq!(raw.status, 201);
    let delivered = site.goflow.wire().say("GOFLOW.DEQUEUE main");
    assert_eq!(
        (delivered.field("payload").text(), delivered.field("type").text()),
        ("as it is".into(), "bytes".into())
    );
    let many =
        site.post("/v1/queues/main/jobs", &json!([{"payload": {"a": 1}}, {"payload": "x", "id": "mine", "nx": true}]));
    assert_eq!((many.status, &fields(&many)["failed"]), (207, &json!(1)));
    assert_eq!(fields(&many)["jobs"][1]["error"]["code"], "DUPLICATE");
    // What is no text is kept to the letter.
    let kept = r#"{ "z": 0.10, "a": 12345678901234567890123 }"#;
    let post = "POST /v1/queues/kept/jobs HTTP/1.1\nContent-Type: application/json; charset=utf-8";
    assert_eq!(site.request(post, &format!(r#"{{"payload": {kept}, "id": "one"}}"#)).status, 201);
    assert_eq!(site.request(post, &format!("\n[{{\"id\":\"two\",\"payload\":{kept}}}]")).status, 201);
    for id in ["one", "two"] {
        assert_eq!(fields(&site.get(&format!("/v1/queues/kept/jobs/{id}")))["payload"], kept);
    }
    assert_eq!(fields(&site.get("/v1/queues/main"))["ready"], 2);
    assert_eq!(fields(&site.get("/v1/queues")), json!(["kept", "main"]));
    assert_eq!(site.get("/v1/openapi.json").status, 200);
}

#[test]
fn errors_are_those_of_the_commands_and_say_whether_anything_happened() {
    let site = Site::start(&["--shard", "s1=memory:"]);
    let jobs = "/v1/queues/main/jobs";
    for (answer, status, code, named) in [
        (site.post(jobs, &json!({"payload": "x", "priority": 5000})), 400, "ERR", "PRIORITY"),
        (site.post(jobs, &json!({"payload": "x", "colour": 1})), 400, "ERR", "colour"),
        (site.post(jobs, &json!([{"payload": "x"}, {}])), 400, "ERR", "job 1"),
        (site.post("/v1/queues/bad%20name/jobs", &json!({"payload": "x"})), 400, "ERR", "name"),
        (site.request(&format!("POST {jobs} HTTP/1.1\nContent-Type: application/json"), "{"), 400, "ERR", "JSON"),
        (site.get("/v1/queues/main/jobs/none"), 404, "NOSUCHJOB", "no job"),
        (site.get("/v1/nothing"), 404, "ERR", "nothing"),
        (site.get(jobs), 405, "ERR", "method"),
    ] {
        let error = fields(&answer)["error"].clone();
        assert_eq!((answer.status, error["code"].as_str().unwrap(), &error["happened"]), (status, code, &json!("no")));
        assert!(error["message"].as_str().unwrap().contains(named), "{error}");
    }
    let mut socket = TcpStream::connect(site.address()).unwrap();
    write!(socket, "POST {jobs} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nno length\r\n")
        .unwrap();
    let mut broken = String::new();
    socket.read_to_string(&mut broken).unwrap();
    assert!(broken.starts_with("HTTP/1.1 400 ") && broken.contains("did not arrive whole"), "{broken}");
    let bounds = [
        ("GOFLOW_LIMITS_PAYLOAD_BYTES_MAX", "16384"),
        ("GOFLOW_LIMITS_REQUEST_WORD_BYTES_MAX", "16384"),
        ("GOFLOW_LIMITS_REQUEST_BYTES_MAX", "131072"),
    ];
    let small = Site::start_with(&["--shard", "s1=memory:"], &bounds);
    let large = small.request(&format!("POST {jobs} HTTP/1.1"), &"x".repeat(131_073));
    assert_eq!((large.status, &fields(&large)["error"]["code"]), (413, &json!("TOOBIG")));
    assert_eq!(site.goflow.wire().say("GOFLOW.LEN main").integer(), 0, "what is refused adds nothing");
}

#[test]
fn the_api_wants_the_password_of_the_redis_port() {
    let site = Site::start_with(&["--shard", "s1=memory:"], &[("GOFLOW_AUTH_PASSWORD", "hush")]);
    assert_eq!(site.get("/v1/queues").status, 401);
    // default:hush and default:wrong
    let ask = |basic: &str| site.request(&format!("GET /v1/queues HTTP/1.1\nAuthorization: Basic {basic}"), "").status;
    assert_eq!((ask("ZGVmYXVsdDpodXNo"), ask("nonsense!")), (200, 401));
    let began = Instant::now();
    assert_eq!(ask("ZGVmYXVsdDp3cm9uZw=="), 401);
    assert!(began.elapsed() >= Duration::from_millis(100), "nobody tries passwords as fast as they can be sent");
    assert_eq!((site.get("/metrics").status, site.get("/readyz").status), (200, 200));
}
