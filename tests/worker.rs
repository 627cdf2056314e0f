//! `goflow worker` with real handlers in shell, Python and Node, and real ends: exit codes, timeouts, signals, kills.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use crate::eventually;
use crate::support::goflow::Goflow;
use crate::support::process::{Process, Program};
use crate::support::scratch;
use crate::support::servers::{Flavour, Server};
use crate::support::wire::{Value, Wire};
use tempfile::TempDir;

/// One running `goflow worker` on the queue `main`.
struct Worker {
    process: Process,
    dir: TempDir,
}

impl Worker {
    /// With these flags, and a handler in these words.
    fn start(server: &str, flags: &[&str], handler: &[&str]) -> Worker {
        let dir = scratch();
        let mut args = vec!["worker", "--queue", "main", "--server", server];
        args.extend(flags);
        if !handler.is_empty() {
            args.push("--");
            args.extend(handler);
        }
        let program = Program {
            path: PathBuf::from(env!("CARGO_BIN_EXE_goflow")),
            args: args.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            dir: dir.path().to_owned(),
        };
        Worker { process: Process::start(&program), dir }
    }

    fn terminate(&mut self) -> ExitStatus {
        self.process.signal("TERM");
        self.process.wait()
    }
}

fn enqueue(wire: &mut Wire, payload: &str, options: &str) -> String {
    let mut words = vec!["GOFLOW.ENQUEUE", "main", payload];
    words.extend(options.split_ascii_whitespace());
    wire.call(&words).text()
}

/// The job once it is in the state.
fn job_in(wire: &mut Wire, id: &str, state: &str) -> Value {
    eventually!(format!("job {id} is {state}"), {
        let job = wire.say(&format!("GOFLOW.JOB main {id}"));
        (job.field("state").text() == state).then_some(job)
    })
}

fn field(wire: &mut Wire, id: &str, state: &str, name: &str) -> String {
    job_in(wire, id, state).field(name).text()
}

fn stat(wire: &mut Wire, name: &str) -> i64 {
    wire.say("GOFLOW.STATS main").field(name).integer()
}

#[test]
fn handlers_in_shell_python_and_node_get_payload_and_labels_and_their_output_is_the_result() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let mut wire = goflow.wire();
    let shell = r#"printf '%s for %s, attempt %s, %s' "$(cat)" "$JOB_TYPE" "$JOB_ATTEMPT" "$JOB_META_TRACE""#;
    let python = "import os,sys; e=os.environ; sys.stdout.write('%s for %s, attempt %s, %s' % (sys.stdin.read(), \
                  e['JOB_TYPE'], e['JOB_ATTEMPT'], e['JOB_META_TRACE']))";
    let node = "const e=process.env; const p=require('fs').readFileSync(0,'utf8'); \
                process.stdout.write(`${p} for ${e.JOB_TYPE}, attempt ${e.JOB_ATTEMPT}, ${e.JOB_META_TRACE}`)";
    for handler in [["sh", "-c", shell], ["python3", "-c", python], ["node", "-e", node]] {
        let mut worker = Worker::start(goflow.address(), &[], &handler);
        let id = enqueue(&mut wire, "hello", "TYPE mail META trace t-7");
        assert_eq!(field(&mut wire, &id, "completed", "result"), "hello for mail, attempt 1, t-7", "{}", handler[0]);
        assert!(worker.terminate().success());
    }
}

#[test]
fn the_exit_code_decides_between_retry_and_death() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let mut wire = goflow.wire();
    let handler = "echo some noise >&2; echo why it failed >&2; exit $(cat)";
    let _worker = Worker::start(goflow.address(), &["--concurrency", "2"], &["sh", "-c", handler]);
    let retried = enqueue(&mut wire, "3", "BACKOFF 60000");
    let failed = job_in(&mut wire, &retried, "scheduled");
    assert_eq!(failed.field("error").text(), "exit code 3: why it failed");
    assert!(failed.field("trace").text().contains("some noise"));
    let dead = enqueue(&mut wire, "65", "");
    assert_eq!(field(&mut wire, &dead, "dead", "error"), "exit code 65: why it failed");
    let killed = enqueue(&mut wire, "0; kill -9 $$", "BACKOFF 60000");
    assert!(field(&mut wire, &killed, "scheduled", "error").starts_with("exit code"));
}

#[test]
fn a_handler_that_is_killed_or_takes_too_long_fails_its_job_and_leaves_nobody_behind() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let mut wire = goflow.wire();
    let handler = "echo $$ > pid; sleep 600 & echo $! > child; wait";
    let worker = Worker::start(goflow.address(), &["--timeout", "5000"], &["sh", "-c", handler]);
    let slow = enqueue(&mut wire, "", "BACKOFF 60000");
    let child = eventually!("the handler runs", read_pid(&worker.dir.path().join("child")));
    assert_eq!(field(&mut wire, &slow, "scheduled", "error"), "ran for more than 5000 ms and was stopped");
    eventually!("its child is gone, too", (!is_alive(child)).then_some(()));
    let worker = Worker::start(goflow.address(), &[], &["sh", "-c", "kill -9 $$"]);
    let killed = enqueue(&mut wire, "", "BACKOFF 60000");
    eventually!("one of the two workers failed it", {
        let job = wire.say(&format!("GOFLOW.JOB main {killed}"));
        (job.field("state").text() == "scheduled").then_some(())
    });
    drop(worker);
}

#[test]
fn an_id_with_a_line_break_makes_no_line_of_the_log() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let mut wire = goflow.wire();
    let worker = Worker::start(goflow.address(), &[], &["cat"]);
    let id = "id\n2026-01-01T00:00:00Z ERROR goflow: FORGED";
    wire.call(&["GOFLOW.ENQUEUE", "main", "x", "ID", id]).text();
    let line = worker.process.stderr.wait_for("FORGED");
    assert!(line.contains(r#"done job="id\n2026"#), "{line}");
}

fn read_pid(file: &Path) -> Option<u32> {
    std::fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// Whether a process runs; one that has ended and was not buried does not.
fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')))
}

#[test]
fn sigterm_finishes_what_runs_and_takes_nothing_more() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let mut wire = goflow.wire();
    let handler = "touch started; while [ ! -e go ]; do sleep 0.05; done; printf done";
    let mut worker = Worker::start(goflow.address(), &[], &["sh", "-c", handler]);
    let first = enqueue(&mut wire, "1", "");
    eventually!("the handler runs", worker.dir.path().join("started").exists().then_some(()));
    let second = enqueue(&mut wire, "2", "");
    worker.process.signal("TERM");
    worker.process.stderr.wait_for("finishing what runs");
    std::fs::write(worker.dir.path().join("go"), "").unwrap();
    assert!(worker.process.wait().success());
    assert_eq!(field(&mut wire, &first, "completed", "result"), "done");
    assert_eq!(field(&mut wire, &second, "ready", "state"), "ready");
    assert_eq!(stat(&mut wire, "delivered"), 1);
}

#[test]
fn a_second_signal_stops_the_handlers_and_gives_their_jobs_back_uncounted() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let mut wire = goflow.wire();
    let mut worker = Worker::start(goflow.address(), &[], &["sh", "-c", "touch started; exec sleep 600"]);
    let id = enqueue(&mut wire, "1", "");
    eventually!("the handler runs", worker.dir.path().join("started").exists().then_some(()));
    worker.process.signal("TERM");
    worker.process.stderr.wait_for("finishing what runs");
    worker.process.signal("TERM");
    assert!(worker.process.wait().success());
    let job = job_in(&mut wire, &id, "ready");
    assert_eq!(job.field("attempt").integer(), 1, "the delivery was not counted");
}

#[test]
fn a_handler_that_is_told_to_stop_has_not_done_its_job_however_well_it_ends() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let mut wire = goflow.wire();
    let handler = "trap 'exit 0' TERM; cat > /dev/null; while :; do sleep 0.05; done";
    let _worker = Worker::start(goflow.address(), &["--timeout", "300"], &["sh", "-c", handler]);
    let late = enqueue(&mut wire, "0", "BACKOFF 60000");
    assert!(field(&mut wire, &late, "scheduled", "error").starts_with("ran for more than 300 ms and was stopped"));
}

#[test]
fn a_lease_is_extended_for_as_long_as_the_handler_runs_and_a_killed_workers_job_comes_back() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let mut wire = goflow.wire();
    // It outlives its worker, but not the directory.
    let handler = "touch started; while [ -e started ] && [ ! -e go ]; do sleep 0.05; done; printf first";
    let worker = Worker::start(goflow.address(), &["--lease", "3000"], &["sh", "-c", handler]);
    let id = enqueue(&mut wire, "1", "BACKOFF 1");
    eventually!("the handler runs", worker.dir.path().join("started").exists().then_some(()));
    let began = job_in(&mut wire, &id, "leased").field("lease_until").integer();
    eventually!("the lease was extended by its whole length", {
        (job_in(&mut wire, &id, "leased").field("lease_until").integer() > began + 3_000).then_some(())
    });
    assert_eq!(stat(&mut wire, "delivered"), 1);
    let mut worker = worker;
    worker.process.kill();
    let _second = Worker::start(goflow.address(), &[], &["sh", "-c", "printf second"]);
    let job = job_in(&mut wire, &id, "completed");
    assert_eq!(job.field("result").text(), "second");
    assert_eq!(stat(&mut wire, "lapsed"), 1);
}

#[test]
fn fifty_jobs_run_at_once() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let mut wire = goflow.wire();
    // Each waits until all fifty have begun: they end only if they run together.
    let handler = "touch $JOB_ID; while [ $(ls | wc -l) -lt 50 ]; do sleep 0.1; done";
    let worker = Worker::start(goflow.address(), &["--concurrency", "50"], &["sh", "-c", handler]);
    for number in 0..50 {
        enqueue(&mut wire, &number.to_string(), "");
    }
    eventually!("all fifty are completed", (stat(&mut wire, "completed") == 50).then_some(()));
    assert_eq!(stat(&mut wire, "delivered"), 50);
    drop(worker);
}

#[test]
fn a_proxy_that_is_restarted_costs_no_job_its_run() {
    let shard = Server::start(Flavour::Redis7, &[]);
    let url = format!("s1={}", shard.url());
    let mut goflow = Goflow::start(&["--shard", &url]);
    let handler = "touch started; while [ ! -e go ]; do sleep 0.05; done; printf done";
    let worker = Worker::start(goflow.address(), &["--lease", "20000"], &["sh", "-c", handler]);
    let id = enqueue(&mut goflow.wire(), "1", "");
    eventually!("the handler runs", worker.dir.path().join("started").exists().then_some(()));
    goflow.kill();
    std::fs::write(worker.dir.path().join("go"), "").unwrap();
    worker.process.stderr.wait_for("trying again");
    goflow.restart();
    let mut wire = goflow.wire();
    assert_eq!(field(&mut wire, &id, "completed", "result"), "done");
    assert_eq!(stat(&mut wire, "delivered"), 1);
}

#[test]
fn a_handler_that_cannot_be_started_ends_the_worker_and_the_job_stays() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let mut wire = goflow.wire();
    let id = enqueue(&mut wire, "1", "");
    let mut worker = Worker::start(goflow.address(), &[], &["/nowhere/handler"]);
    assert_eq!(worker.process.wait().code(), Some(1));
    assert_eq!(job_in(&mut wire, &id, "ready").field("attempt").integer(), 1);
    let (status, _, error) = Goflow::run(&["worker", "--queue", "main"]);
    assert_eq!(status.code(), Some(64), "{error}");
}

/// A web service that answers each request with the next of these, and keeps what it was sent.
fn service(answers: &'static [&'static str]) -> (String, std::thread::JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/jobs", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        let mut requests = Vec::new();
        for answer in answers {
            let (mut socket, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            while !String::from_utf8_lossy(&request).ends_with("payload") {
                let mut chunk = [0; 4096];
                let len = socket.read(&mut chunk).unwrap();
                assert!(len > 0, "{request:?}");
                request.extend_from_slice(&chunk[..len]);
            }
            requests.push(String::from_utf8_lossy(&request).to_lowercase());
            write!(socket, "HTTP/1.1 {answer}").unwrap();
        }
        requests
    });
    (url, server)
}

#[test]
fn a_web_service_acknowledges_with_2xx_and_is_asked_again_when_it_says() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let mut wire = goflow.wire();
    let (url, server) = service(&[
        "503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n",
        "200 OK\r\nContent-Length: 6\r\n\r\nresult",
        "422 Unprocessable Entity\r\nContent-Length: 3\r\n\r\nbad",
        "429 Too Many Requests\r\nRetry-After: Fri, 27 Nov 1970 12:00:00 GMT\r\nContent-Length: 0\r\n\r\n",
        "204 No Content\r\n\r\n",
        "500 Internal Server Error\r\nRetry-After: 1\r\nContent-Length: 4\r\n\r\nboom",
    ]);
    let _worker = Worker::start(goflow.address(), &["--http", &url], &[]);
    // With this backoff it would not be asked again before the test has given up.
    let id = enqueue(&mut wire, "payload", "BACKOFF 3600000 BACKOFFMAX 3600000 TYPE mail");
    assert_eq!(field(&mut wire, &id, "completed", "result"), "result");
    let dead = enqueue(&mut wire, "payload", "");
    assert_eq!(field(&mut wire, &dead, "dead", "error"), "status 422");
    let limited = enqueue(&mut wire, "payload", "BACKOFF 3600000 BACKOFFMAX 3600000");
    let job = job_in(&mut wire, &limited, "completed");
    assert_eq!(job.field("attempt").integer(), 2, "a date that is past is now");
    let failed = enqueue(&mut wire, "payload", "BACKOFF 3600000 BACKOFFMAX 3600000");
    assert_eq!(field(&mut wire, &failed, "scheduled", "trace"), "boom");
    let requests = server.join().unwrap();
    assert!(requests[0].starts_with("post /jobs http/1.1\r\n"), "{}", requests[0]);
    assert!(requests[0].contains("\r\njob-type: mail\r\n") && requests[0].contains("\r\njob-attempt: 1\r\n"));
    assert!(requests[1].contains("\r\njob-attempt: 2\r\n"));
}

#[test]
fn a_status_that_was_heard_stands_whatever_becomes_of_the_body() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let mut wire = goflow.wire();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/jobs", listener.local_addr().unwrap());
    let service = std::thread::spawn(move || {
        let answer = |head: &str, body: &[u8]| {
            let (mut socket, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"payload") {
                let mut chunk = [0; 4096];
                let len = socket.read(&mut chunk).unwrap();
                assert!(len > 0, "{request:?}");
                request.extend_from_slice(&chunk[..len]);
            }
            write!(socket, "HTTP/1.1 {head}\r\n\r\n").unwrap();
            // A worker that has read enough goes away.
            let _ = socket.write_all(body);
            socket
        };
        drop(answer("200 OK\r\nContent-Length: 100", b"broken off"));
        drop(answer("200 OK\r\nTransfer-Encoding: chunked", b"6\r\nbroken\r\nx"));
        drop(answer("200 OK\r\nContent-Length: 8000000", &[b'x'; 8_000_000]));
        drop(answer("422 No\r\nContent-Length: 100", b"broken off"));
        // Nothing follows until the worker has lost its patience.
        answer("200 OK\r\nContent-Length: 100", b"stuck")
    });
    let _worker = Worker::start(goflow.address(), &["--timeout", "8000", "--http", &url], &[]);
    for result in ["broken off", "broken", &"x".repeat(16 << 10)] {
        let id = enqueue(&mut wire, "payload", "BACKOFF 3600000 BACKOFFMAX 3600000");
        assert_eq!(field(&mut wire, &id, "completed", "result"), *result);
    }
    let dead = enqueue(&mut wire, "payload", "");
    assert_eq!(field(&mut wire, &dead, "dead", "trace"), "broken off");
    let stuck = enqueue(&mut wire, "payload", "BACKOFF 3600000 BACKOFFMAX 3600000");
    assert_eq!(field(&mut wire, &stuck, "completed", "result"), "stuck");
    drop(service.join().unwrap());
}

#[test]
fn three_partitions_divide_the_shards_and_the_others_take_over_from_a_killed_one() {
    let servers: Vec<Server> = (1..=4).map(|_| Server::start(Flavour::Redis7, &[])).collect();
    let shards: Vec<String> =
        servers.iter().zip(1..).map(|(server, number)| format!("s{number}={}", server.url())).collect();
    let mut args = vec!["--strategy", "round-robin"];
    shards.iter().for_each(|shard| args.extend(["--shard", shard]));
    let goflow = Goflow::start(&args);
    let mut wire = goflow.wire();
    let start = |number: usize| {
        let seat = format!("{number}/3");
        Worker::start(
            goflow.address(),
            &["--partition", &seat, "--concurrency", "2"],
            &["sh", "-c", "printf %s $JOB_SHARD"],
        )
    };
    let mut workers: Vec<Worker> = (1..=3).map(start).collect();
    let told = |worker: &Worker| {
        let lines = worker.process.stderr.lines();
        let line =
            lines.iter().rev().find(|line| line.contains("taking from these shards")).cloned().unwrap_or_default();
        (1..=4).filter(|number| line.contains(&format!("\"s{number}\""))).collect::<Vec<i32>>()
    };
    eventually!("each shard has one of the three", {
        let shares: Vec<Vec<i32>> = workers.iter().map(told).collect();
        (shares == [vec![1, 4], vec![2], vec![3]]).then_some(())
    });
    for number in 0..40 {
        enqueue(&mut wire, &number.to_string(), "");
    }
    eventually!("all are completed", (stat(&mut wire, "completed") == 40).then_some(()));
    workers[0].process.kill();
    eventually!("the two that are left have all four", {
        let mut all = [told(&workers[1]), told(&workers[2])].concat();
        all.sort();
        (all == [1, 2, 3, 4]).then_some(())
    });
    for number in 0..40 {
        enqueue(&mut wire, &number.to_string(), "");
    }
    eventually!("all are completed by two", (stat(&mut wire, "completed") == 80).then_some(()));
    workers[0] = start(1);
    eventually!("the one that came back has its part again", {
        let shares: Vec<Vec<i32>> = workers.iter().map(told).collect();
        (shares == [vec![1, 4], vec![2], vec![3]]).then_some(())
    });
    // A wait that began before the change may still bring a job of another's part; no wait that began after it does.
    eventually!("each of them works on its own part only", {
        let ids: Vec<String> = (0..20).map(|number| enqueue(&mut wire, &number.to_string(), "")).collect();
        let is_pure = |id: &String| {
            let job = job_in(&mut wire, id, "completed");
            let named = job.field("worker").text();
            let worker = workers.iter().find(|worker| named.ends_with(&format!("-{}", worker.process.id())));
            let share = told(worker.unwrap_or_else(|| panic!("nobody's: {job:?}")));
            share.contains(&job.field("result").text().trim_start_matches('s').parse::<i32>().unwrap())
        };
        ids.iter().map(is_pure).fold(true, |all, one| all & one).then_some(())
    });
}

#[test]
fn a_worker_of_some_shards_takes_from_these_alone() {
    let shards = ["--shard", "s1=memory:", "--shard", "s2=memory:", "--strategy", "round-robin"];
    let goflow = Goflow::start(&shards);
    let mut wire = goflow.wire();
    let here: Vec<String> = (0..6).map(|_| enqueue(&mut wire, "x", "SHARD s2")).collect();
    let there: Vec<String> = (0..6).map(|_| enqueue(&mut wire, "x", "SHARD s1")).collect();
    let mut worker = Worker::start(goflow.address(), &["--shards", "s2", "--concurrency", "2"], &["cat"]);
    here.iter().for_each(|id| drop(job_in(&mut wire, id, "completed")));
    assert!(worker.terminate().success());
    there.iter().for_each(|id| drop(job_in(&mut wire, id, "ready")));
    assert_eq!(stat(&mut wire, "delivered"), 6);
}

#[test]
fn the_jobs_of_a_killed_worker_all_come_back_and_each_is_done_once() {
    let goflow = Goflow::start(&["--shard", "s1=memory:"]);
    let mut wire = goflow.wire();
    // They outlive their worker, but not the directory.
    let handler = "touch $JOB_ID; while [ -e $JOB_ID ]; do sleep 1; done";
    let mut worker =
        Worker::start(goflow.address(), &["--concurrency", "20", "--lease", "10000"], &["sh", "-c", handler]);
    let ids: Vec<String> = (0..20).map(|number| enqueue(&mut wire, &number.to_string(), "BACKOFF 1")).collect();
    eventually!("all twenty run", (stat(&mut wire, "leased") == 20).then_some(()));
    worker.process.kill();
    let _second = Worker::start(goflow.address(), &["--concurrency", "10"], &["cat"]);
    for (number, id) in ids.iter().enumerate() {
        assert_eq!(field(&mut wire, id, "completed", "result"), number.to_string());
    }
    assert_eq!((stat(&mut wire, "lapsed"), stat(&mut wire, "completed")), (20, 20));
}

#[test]
fn what_cannot_work_is_refused_before_a_job_is_taken() {
    for (args, named) in [
        (&["--queue", "bad name", "--", "cat"][..], "--queue bad name"),
        (&["--queue", "main"], "-- PROGRAM or --http"),
        (&["--queue", "main", "--http", "https://there/"], "http://HOST"),
        (&["--queue", "main", "--password-file", "/nowhere", "--", "cat"], "/nowhere"),
        (&["--queue", "main", "--server", "ftp://there", "--", "cat"], "--server"),
        (&["--queue", "main", "--partition", "4/3", "--", "cat"], "1/3"),
        (&["--queue", "main", "--dead-exit", "0", "--", "cat"], "--dead-exit"),
        (&["--queue", "main", "--http", "http://a/", "--", "cat"], "--http"),
    ] {
        let args: Vec<&str> = ["worker"].iter().chain(args).copied().collect();
        let (status, _, said) = Goflow::run(&args);
        assert_eq!(status.code(), Some(64), "{args:?}: {said}");
        assert!(said.contains(named), "{args:?}: {said}");
    }
}
