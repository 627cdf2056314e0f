//! Alerts through real proxies, over a local server that stands in for Slack and PagerDuty and at times says no.
//!
//! The storm: jobs die in three groups through three proxies over three Redis shards, and the proxy that tells is killed in the
//! middle. Few messages, and what they say adds up, once those that were sent twice under one id are counted once.
//! `GOFLOW_STORM_DEATHS` and `GOFLOW_STORM_MS` set the size; the shards' own counts of the dead are what is compared.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ring::hmac;
use serde_json::Value as Json;

use crate::eventually;
use crate::support::fleet::Fleet;
use crate::support::goflow::Goflow;
use crate::support::recorder::{Recorded, Recorder};
use crate::support::servers::{Flavour, Server};
use crate::support::wire::{Value, Wire};
use crate::support::{patience, scratch, size};

/// A configuration file with this text, in a directory that is removed with it.
fn config(text: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = scratch();
    let path = dir.path().join("goflow.toml");
    std::fs::write(&path, text).unwrap();
    (dir, path)
}

fn start(path: &Path, args: &[&str]) -> Goflow {
    let args: Vec<&str> = ["--config", path.to_str().unwrap()].into_iter().chain(args.iter().copied()).collect();
    Goflow::start(&args)
}

/// Adds a job and makes it die of an error; `None` when the connection broke on the way.
fn die(wire: &mut Wire, queue: &str, kind: &str, error: &str) -> Option<()> {
    wire.try_call(&["GOFLOW.ENQUEUE", queue, "work", "TYPE", kind], patience()).ok()?;
    match wire.try_call(&["GOFLOW.DEQUEUE", queue], patience()).ok()? {
        Value::Null | Value::Error(_) => Some(()),
        job => {
            let receipt = job.field("receipt").text();
            wire.try_call(&["GOFLOW.FAIL", queue, &receipt, "ERROR", error, "DEAD"], patience()).ok().map(drop)
        }
    }
}

/// The same for many jobs at once; how many died.
fn die_many(wire: &mut Wire, queue: &str, kind: &str, number: usize, count: usize) -> Option<usize> {
    let count_text = count.to_string();
    let mut enqueue = vec!["GOFLOW.ENQUEUEMANY", queue, &count_text];
    enqueue.extend(std::iter::repeat_n("work", count));
    enqueue.extend(["TYPE", kind]);
    wire.try_call(&enqueue, patience()).ok()?;
    let jobs = match wire.try_call(&["GOFLOW.DEQUEUE", queue, "COUNT", &count_text], patience()).ok()? {
        Value::Array(jobs) => jobs,
        _ => return Some(0),
    };
    for (place, job) in jobs.iter().enumerate() {
        let (receipt, place) = (job.field("receipt").text(), number + place);
        let error = format!("no answer from 10.0.0.{place} within {place} ms");
        wire.try_call(&["GOFLOW.FAIL", queue, &receipt, "ERROR", &error, "DEAD"], patience()).ok()?;
    }
    Some(jobs.len())
}

/// The deaths that a text for people tells of.
fn deaths_in(text: &str) -> u64 {
    let at =
        text.find(" jobs died").or_else(|| text.find(" job died")).unwrap_or_else(|| panic!("no deaths in {text}"));
    text[..at].rsplit(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
}

/// The deaths that messages tell of; one that came twice counts once.
fn told(messages: &[Recorded], read: impl Fn(&Recorded) -> u64) -> u64 {
    let by_id: BTreeMap<&str, u64> =
        messages.iter().map(|message| (message.header("goflow-alert-id").unwrap(), read(message))).collect();
    by_id.values().sum()
}

fn slack_deaths(message: &Recorded) -> u64 {
    deaths_in(message.json()["text"].as_str().unwrap())
}

fn hook_deaths(message: &Recorded) -> u64 {
    message.json()["deaths"].as_u64().unwrap()
}

fn died(wire: &mut Wire, queue: &str) -> u64 {
    wire.call(&["GOFLOW.STATS", queue]).field("died").integer() as u64
}

/// Which proxy tells is written on the first shard.
fn wait_for_leader(shard: &Server) -> String {
    eventually!(
        "a proxy leads",
        match shard.wire().say("GET goflow:alerter") {
            Value::Null => None,
            holder => Some(holder.text()),
        }
    )
}

#[test]
fn a_storm_is_a_few_messages_that_add_up_though_the_proxy_that_tells_is_killed() {
    let (deaths, span) =
        (size("GOFLOW_STORM_DEATHS", 240), Duration::from_millis(size("GOFLOW_STORM_MS", 1_500) as u64));
    let recorder = Recorder::start();
    recorder.answer(|path, before| match (path, before % 7) {
        ("/slack", 2) => (429, "retry-after: 1\r\n"),
        ("/slack", 4) | ("/hook", 3) => (500, ""),
        _ => (200, ""),
    });
    let (_dir, path) = config(&format!(
        "[[sink]]\nname = 'ops'\nkind = 'slack'\nurl = '{}'\n\
         [[sink]]\nname = 'hook'\nkind = 'webhook'\nurl = '{}'\n\
         [[sink]]\nname = 'pager'\nkind = 'pagerduty'\nurl = '{}'\nrouting_key = 'hush'\n\
         [[alert]]\nname = 'dead'\nsinks = ['ops', 'hook', 'pager']\nmin_interval_ms = 3000\n",
        recorder.url("/slack"),
        recorder.url("/hook"),
        recorder.url("")
    ));
    let mut fleet = Fleet::start(3, 1, &["--config", path.to_str().unwrap()]);
    let leader = wait_for_leader(&fleet.shards[0]);
    fleet.add_proxy(&[]);
    fleet.add_proxy(&[]);
    fleet.proxies.iter_mut().for_each(|proxy| proxy.expect_log("alert was not delivered"));
    let addresses: Vec<String> = fleet.proxies.iter().map(|proxy| proxy.address().to_owned()).collect();
    let (count, began) = (AtomicUsize::new(0), Instant::now());
    std::thread::scope(|scope| {
        for first in 0..3 {
            let (addresses, count) = (&addresses, &count);
            scope.spawn(move || {
                let (mut proxy, mut wire) = (first, None);
                loop {
                    let number = count.load(Ordering::Relaxed);
                    if number >= deaths {
                        return;
                    }
                    // Spread over the time that the storm is to take.
                    let due = span.mul_f64(number as f64 / deaths as f64);
                    std::thread::sleep(due.saturating_sub(began.elapsed()));
                    let Some(link) = wire.as_mut() else {
                        wire = Wire::try_connect(&addresses[proxy % 3]);
                        proxy += 1;
                        continue;
                    };
                    let kind = ["mail", "bill", "sync"][rand::random_range(0..3)];
                    match die_many(link, "storm", kind, number, deaths.div_ceil(240)) {
                        Some(died) => drop(count.fetch_add(died, Ordering::Relaxed)),
                        None => wire = None,
                    }
                }
            });
        }
        eventually!("half of them died", (count.load(Ordering::Relaxed) >= deaths / 2).then_some(()));
        fleet.proxies[0].kill();
    });
    let mut wire = fleet.proxies[1].wire();
    // What was leased through the killed proxy and never answered is no death.
    let all = died(&mut wire, "storm");
    assert!(all as usize >= deaths, "{all}");
    eventually!("Slack has heard of all of them", {
        let sum = told(&recorder.taken("/slack"), slack_deaths);
        assert!(sum <= all, "more were told of than died: {sum} of {all}");
        (sum == all).then_some(())
    });
    eventually!("the webhook has heard of all of them", {
        let sum = told(&recorder.taken("/hook"), hook_deaths);
        assert!(sum <= all, "more were told of than died: {sum} of {all}");
        (sum == all).then_some(())
    });
    let slack = recorder.taken("/slack").len();
    println!("{all} deaths, {slack} messages to Slack, {} refused", recorder.all("/slack").len() - slack);
    assert!(slack <= 20, "{slack} messages");
    let incidents = || {
        let events = recorder.taken("/v2/enqueue");
        events.iter().map(|event| event.json()["dedup_key"].as_str().unwrap().to_owned()).collect::<BTreeSet<_>>()
    };
    eventually!("each group has its incident", (incidents().len() >= 3).then_some(()));
    assert_eq!(incidents().len(), 3);
    assert_ne!(wait_for_leader(&fleet.shards[0]), leader, "another proxy tells now");
    let pending = |wire: &mut Wire| wire.say("GOFLOW.ALERT LIST").items()[0].field("pending").integer();
    eventually!("nothing is pending", (pending(&mut wire) == 0).then_some(()));
}

#[test]
fn what_died_while_nobody_could_tell_is_told_when_a_proxy_is_back() {
    let recorder = Recorder::start();
    recorder.answer(|_, _| (503, ""));
    let shard = Server::start(Flavour::Redis7, Server::DURABLE);
    let named = format!("s1={}", shard.url());
    // One without a rule, so that nobody asked for these.
    let mut proxy = Goflow::start(&["--shard", &named]);
    for _ in 0..5 {
        die(&mut proxy.wire(), "q", "mail", "boom").unwrap();
    }
    proxy.kill();
    let (_dir, path) = config(&format!(
        "[[sink]]\nname = 'hook'\nkind = 'webhook'\nurl = '{}'\n[[alert]]\nname = 'dead'\nsinks = ['hook']\nmin_interval_ms = 200\n",
        recorder.url("/hook")
    ));
    let mut proxy = start(&path, &["--shard", &named]);
    proxy.expect_log("alert was not delivered");
    let delivery = |proxy: &Goflow, field: &str| {
        let list = proxy.wire().say("GOFLOW.ALERT LIST");
        list.items()[0].field("deliveries").items()[0].field(field).integer()
    };
    eventually!("it was tried", (delivery(&proxy, "failed") >= 1).then_some(()));
    for _ in 0..5 {
        die(&mut proxy.wire(), "q", "mail", "boom").unwrap();
    }
    proxy.kill();
    recorder.answer(|_, _| (200, ""));
    let proxy = start(&path, &["--shard", &named]);
    eventually!("all ten are told of", (told(&recorder.taken("/hook"), hook_deaths) == 10).then_some(()));
    eventually!("it is noted", (delivery(&proxy, "sent") >= 1).then_some(()));
    assert!(delivery(&proxy, "failed") >= 1, "what the proxy before noted is lost");
}

#[test]
fn what_a_service_may_have_taken_is_sent_again_under_its_id() {
    let recorder = Recorder::start();
    recorder.answer(|_, before| if before == 0 { (500, "") } else { (200, "") });
    let (_dir, path) = config(&format!(
        "[[sink]]\nname = 'hook'\nkind = 'webhook'\nurl = '{}'\n[[alert]]\nname = 'dead'\nsinks = ['hook']\nmin_interval_ms = 200\n",
        recorder.url("/hook")
    ));
    let mut proxy = start(&path, &["--shard", "s1=memory:"]);
    proxy.expect_log("alert was not delivered");
    die(&mut proxy.wire(), "q", "mail", "boom").unwrap();
    eventually!("it was tried", (!recorder.all("/hook").is_empty()).then_some(()));
    die(&mut proxy.wire(), "q", "mail", "boom").unwrap();
    eventually!("both are told of", (told(&recorder.taken("/hook"), hook_deaths) == 2).then_some(()));
    let all = recorder.all("/hook");
    assert_eq!(
        (all[0].body == all[1].body, all[0].header("goflow-alert-id")),
        (true, all[1].header("goflow-alert-id"))
    );
}

#[test]
fn a_message_whose_answer_was_lost_with_its_proxy_comes_again_under_its_id() {
    let recorder = Recorder::start();
    recorder.answer(|_, before| if before == 0 { (0, "") } else { (200, "") });
    let shard = Server::start(Flavour::Redis7, Server::DURABLE);
    let named = format!("s1={}", shard.url());
    let (_dir, path) = config(&format!(
        "[[sink]]\nname = 'hook'\nkind = 'webhook'\nurl = '{}'\n[[alert]]\nname = 'dead'\nsinks = ['hook']\nmin_interval_ms = 200\n",
        recorder.url("/hook")
    ));
    let mut first = start(&path, &["--shard", &named]);
    first.expect_log("alert was not delivered");
    die(&mut first.wire(), "q", "mail", "boom").unwrap();
    eventually!("it was taken", (recorder.taken("/hook").len() == 1).then_some(()));
    first.kill();
    let second = start(&path, &["--shard", &named]);
    (0..2).for_each(|_| die(&mut second.wire(), "q", "mail", "boom").unwrap());
    eventually!("all three are told of", {
        let sum = told(&recorder.taken("/hook"), hook_deaths);
        assert!(sum <= 3, "a death was told of twice: {sum}");
        (sum == 3).then_some(())
    });
    let taken = recorder.taken("/hook");
    assert_eq!(
        (taken[1].header("goflow-alert-id"), &taken[1].body),
        (taken[0].header("goflow-alert-id"), &taken[0].body)
    );
}

#[test]
fn a_message_of_which_an_event_was_taken_comes_again_whole_when_the_next_was_refused() {
    let recorder = Recorder::start();
    recorder.answer(|_, before| if before == 1 { (429, "retry-after: 1\r\n") } else { (200, "") });
    let shard = Server::start(Flavour::Redis7, Server::DURABLE);
    let named = format!("s1={}", shard.url());
    // One without a rule, so that both groups are in the first message.
    let mut proxy = Goflow::start(&["--shard", &named]);
    ["mail", "bill"].iter().for_each(|kind| die(&mut proxy.wire(), "q", kind, "boom").unwrap());
    proxy.kill();
    let (_dir, path) = config(&format!(
        "[[sink]]\nname = 'pager'\nkind = 'pagerduty'\nurl = '{}'\nrouting_key = 'k'\n[[alert]]\nname = 'dead'\nsinks = ['pager']\nmin_interval_ms = 200\n",
        recorder.url("")
    ));
    let mut proxy = start(&path, &["--shard", &named]);
    proxy.expect_log("alert was not delivered");
    let all = eventually!("both are told of", {
        let all = recorder.all("/v2/enqueue");
        (all.len() >= 4).then_some(all)
    });
    let said = |at: usize| (all[at].header("goflow-alert-id"), &all[at].body);
    assert_eq!((said(2), said(3)), (said(0), said(1)));
}

#[test]
fn a_sink_that_fails_holds_up_no_other_and_rules_pick_their_queues_and_types() {
    let recorder = Recorder::start();
    recorder.answer(|path, _| if path == "/bad" { (500, "") } else { (200, "") });
    let (_dir, path) = config(&format!(
        "[[sink]]\nname = 'bad'\nkind = 'slack'\nurl = '{}'\n[[sink]]\nname = 'good'\nkind = 'webhook'\nurl = '{}'\n\
         [[alert]]\nname = 'mail'\nsinks = ['bad', 'good']\nqueues = ['m*']\ntypes = ['mail-*']\nmin_interval_ms = 200\n",
        recorder.url("/bad"),
        recorder.url("/good")
    ));
    let mut proxy = start(&path, &["--shard", "s1=memory:"]);
    proxy.expect_log("alert was not delivered");
    let mut wire = proxy.wire();
    for (queue, kind) in
        [("other", "mail-a"), ("main", "bill"), ("main", "mail-a"), ("more", "mail-b"), ("main", "mail-a")]
    {
        die(&mut wire, queue, kind, "boom").unwrap();
    }
    eventually!("the three are told of", (told(&recorder.taken("/good"), hook_deaths) == 3).then_some(()));
    eventually!("the other was tried", (recorder.all("/bad").len() > 1).then_some(()));
    let groups: BTreeSet<String> = recorder
        .taken("/good")
        .iter()
        .flat_map(|message| {
            message.json()["groups"]
                .as_array()
                .unwrap()
                .iter()
                .map(|group| format!("{} {}", group["queue"], group["type"]))
                .collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(groups, BTreeSet::from(["\"main\" \"mail-a\"".into(), "\"more\" \"mail-b\"".into()]));
    let list = wire.say("GOFLOW.ALERT LIST");
    assert_eq!(list.items()[0].field("pending").integer(), 3, "one channel has yet to tell");
}

#[test]
fn a_webhook_is_signed_has_its_headers_and_its_template() {
    let recorder = Recorder::start();
    let (dir, path) = config("");
    std::fs::write(dir.path().join("secret"), "hush-secret\n").unwrap();
    let text = format!(
        "[[sink]]\nname = 'hook'\nkind = 'webhook'\nurl_env = 'MY_HOOK'\nsecret_file = '{}'\n\
         template = '{{\"said\": \"{{{{text}}}}\", \"n\": {{{{deaths}}}}}}'\n\
         headers = {{ Authorization = 'Bearer hush-token' }}\n\
         [[alert]]\nname = 'dead'\nsinks = ['hook']\n",
        dir.path().join("secret").display()
    );
    std::fs::write(&path, text).unwrap();
    let args = ["--config", path.to_str().unwrap(), "--shard", "s1=memory:", "--log", "trace"];
    let proxy = Goflow::start_with(&args, &[("MY_HOOK", &recorder.url("/hook/hush-path"))]);
    die(&mut proxy.wire(), "q", "mail", "no \"quotes\"\nhere").unwrap();
    let message = eventually!("it is told", recorder.taken("/hook/hush-path").pop());
    let json = message.json();
    assert_eq!(json["n"], 1);
    assert!(json["said"].as_str().unwrap().starts_with("q 1 job died of type mail: no \"quotes\""), "{json}");
    assert_eq!(message.header("authorization"), Some("Bearer hush-token"));
    let signed = format!("{}.{}", message.header("goflow-timestamp").unwrap(), message.body);
    let signature = message.header("goflow-signature").unwrap().strip_prefix("v1=").unwrap();
    let bytes: Vec<u8> = (0..64).step_by(2).map(|at| u8::from_str_radix(&signature[at..at + 2], 16).unwrap()).collect();
    hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, b"hush-secret"), signed.as_bytes(), &bytes).unwrap();
    // No secret is anywhere to be seen.
    let mut wire = proxy.wire();
    let shown = format!(
        "{:?} {:?} {:?} {:?}",
        wire.say("GOFLOW.ALERT LIST"),
        wire.say("GOFLOW.ALERT TEST dead"),
        wire.say("CONFIG GET *"),
        proxy.log()
    );
    assert!(!shown.contains("hush"), "a secret is shown: {shown}");
}

#[test]
fn a_program_reads_the_alert_and_the_log_has_it_too() {
    let dir = scratch();
    let (out, script) = (dir.path().join("out"), dir.path().join("notify"));
    std::fs::write(&script, format!("#!/bin/sh\ncat >> {}\n", out.display())).unwrap();
    let (_config, path) = config(&format!(
        "[[sink]]\nname = 'program'\nkind = 'command'\ncommand = ['/bin/sh', '{}']\n\
         [[sink]]\nname = 'hangs'\nkind = 'command'\ncommand = ['/bin/sleep', '600']\ntimeout_ms = 200\n\
         [[sink]]\nname = 'log'\nkind = 'log'\n\
         [[alert]]\nname = 'dead'\nsinks = ['program', 'hangs', 'log']\n",
        script.display()
    ));
    let mut proxy = start(&path, &["--shard", "s1=memory:"]);
    for line in ["alert: q 1 job died", "alert was not delivered", "alert: this is a test"] {
        proxy.expect_log(line);
    }
    die(&mut proxy.wire(), "q", "mail", "boom").unwrap();
    proxy.wait_for_log("alert: q 1 job died of type mail: boom");
    let line =
        eventually!("the program was told", std::fs::read_to_string(&out).ok().filter(|text| text.ends_with('\n')));
    assert_eq!(serde_json::from_str::<Json>(&line).unwrap()["deaths"], 1);
    assert!(proxy.wait_for_log("alert was not delivered").contains("did not end in 200 ms"));
    let mut wire = proxy.wire();
    let said = wire.say("GOFLOW.ALERT TEST dead");
    assert_eq!((said.field("program").text(), said.field("log").text()), ("OK".into(), "OK".into()));
    assert!(said.field("hangs").text().contains("did not end"));
}

#[test]
fn a_condition_is_told_of_when_it_begins_and_when_it_ends() {
    let recorder = Recorder::start();
    let (_dir, path) = config(&format!(
        "[[sink]]\nname = 'hook'\nkind = 'webhook'\nurl = '{}'\n[[sink]]\nname = 'pager'\nkind = 'pagerduty'\nurl = '{}'\nrouting_key = 'k'\n\
         [[alert]]\nname = 'health'\nsinks = ['hook', 'pager']\ndeeper_than = 10\nshard_down_ms = 100\nmin_interval_ms = 100\n",
        recorder.url("/hook"),
        recorder.url("")
    ));
    let mut fleet = Fleet::start(2, 1, &["--config", path.to_str().unwrap()]);
    fleet.expect_failures();
    wait_for_leader(&fleet.shards[0]);
    let mut wire = fleet.proxies[0].wire();
    let heard = || -> Vec<String> {
        let messages = recorder.taken("/hook");
        let changes = messages.iter().flat_map(|message| message.json()["conditions"].as_array().unwrap().clone());
        changes.map(|change| format!("{} {}", change["key"].as_str().unwrap(), change["firing"])).collect()
    };
    wire.call(&["GOFLOW.ENQUEUEMANY", "deep", "15"].into_iter().chain(["work"; 15]).collect::<Vec<_>>());
    eventually!("it is told", (heard() == ["depth deep true"]).then_some(()));
    let firing = |wire: &mut Wire| {
        let list = wire.say("GOFLOW.ALERT LIST");
        list.items()[0].field("firing").items().first().map(Value::text)
    };
    let shown = eventually!("it is shown", firing(&mut wire));
    assert!(shown.starts_with("deep has 1") && shown.ends_with(" ready jobs, more than 10"), "{shown}");
    wire.say("GOFLOW.PURGE deep");
    eventually!("its end is told", (heard() == ["depth deep true", "depth deep false"]).then_some(()));
    fleet.shards[1].kill();
    eventually!("the shard is missed", heard().contains(&"shard-down s1 true".into()).then_some(()));
    fleet.shards[1].restart();
    eventually!("and back", heard().contains(&"shard-down s1 false".into()).then_some(()));
    let events = || recorder.taken("/v2/enqueue").iter().map(Recorded::json).collect::<Vec<_>>();
    eventually!("each incident is resolved", {
        let of = |action: &str| {
            let events = events();
            let keys = events.iter().filter(|event| event["event_action"] == action);
            keys.map(|event| event["dedup_key"].as_str().unwrap().to_owned()).collect::<BTreeSet<_>>()
        };
        (of("trigger").len() == 2 && of("trigger") == of("resolve")).then_some(())
    });
    assert_eq!(heard().len(), 4, "each is told once: {:?}", heard());
}

#[test]
fn a_service_behind_tls_is_reached_if_its_certificate_is_trusted() {
    let dir = scratch();
    let file = |name: &str| dir.path().join(name).display().to_string();
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"])
        .args(["-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"])
        .args(["-keyout", &file("key"), "-out", &file("cert")])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let server = "import http.server,ssl,sys\n\
        class H(http.server.BaseHTTPRequestHandler):\n\
        \x20def do_POST(self):\n\
        \x20\x20open(sys.argv[3],'ab').write(self.rfile.read(int(self.headers['content-length']))+b'\\n')\n\
        \x20\x20self.send_response(200);self.send_header('content-length','0');self.end_headers()\n\
        \x20def log_message(self,*a):pass\n\
        s=http.server.HTTPServer(('127.0.0.1',0),H)\n\
        c=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER);c.load_cert_chain(sys.argv[1],sys.argv[2])\n\
        s.socket=c.wrap_socket(s.socket,server_side=True)\n\
        print('port',s.server_address[1],flush=True);s.serve_forever()";
    let program = crate::support::process::Program {
        path: "/usr/bin/python3".into(),
        args: ["-c", server, &file("cert"), &file("key"), &file("out")].iter().map(Into::into).collect(),
        env: Vec::new(),
        dir: dir.path().to_owned(),
    };
    let process = crate::support::process::Process::start(&program);
    let port = process.stdout.wait_for("port ").replace("port ", "");
    let sink = |name: &str, more: &str| {
        format!("[[sink]]\nname = '{name}'\nkind = 'webhook'\nurl = 'https://localhost:{}/'\n{more}", port.trim())
    };
    let trusted = sink("trusted", &format!("ca_file = '{}'\n", file("cert")));
    let (_config, path) = config(&format!(
        "{trusted}{}[[alert]]\nname = 'dead'\nsinks = ['trusted', 'stranger']\n",
        sink("stranger", "")
    ));
    let proxy = start(&path, &["--shard", "s1=memory:"]);
    let said = proxy.wire().say("GOFLOW.ALERT TEST dead");
    assert_eq!(said.field("trusted").text(), "OK");
    assert!(said.field("stranger").text().contains("certificate"), "{said:?}");
    assert_eq!(std::fs::read_to_string(file("out")).unwrap().lines().count(), 1);
}
