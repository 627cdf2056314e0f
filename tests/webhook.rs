//! Webhooks over a real socket: signed by programs that are not ours, tampered with, sent again, late, too large, half sent.
//!
//! Signatures are made by Python's hmac, so that what we check against is not what we check with.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value as Json, json};

use crate::eventually;
use crate::http::{Answer, Site};
use crate::support::scratch;
use crate::support::servers::{Flavour, Server};

const SECRET: &str = "canary-secret-4711";
const BODY: &str = r#"{"id":"evt_1","type":"invoice.paid","data":"canary-payload-4712"}"#;

/// The file with one webhook of each scheme, and the directory that it is in.
fn configuration(more: &str) -> (tempfile::TempDir, String) {
    let dir = scratch();
    let (secret, file) = (dir.path().join("secret"), dir.path().join("goflow.toml"));
    std::fs::write(&secret, format!("an-older-secret\n{SECRET}\n")).unwrap();
    let text = format!(
        "[[webhook]]\npath = '/hooks/github'\nqueue = 'github'\nscheme = 'github'\nsecret_file = '{}'\n\
         headers = ['User-Agent']\nbody_bytes_max = 1000\n\
         [[webhook]]\npath = '/hooks/stripe'\nqueue = 'stripe'\nscheme = 'stripe'\nsecret_env = 'STRIPE_SECRET'\n\
         [[webhook]]\npath = '/hooks/own'\nqueue = 'own'\nscheme = 'hmac'\nsecret = '{SECRET}'\ntolerance_ms = 60000\n\
         signature_header = 'X-Own-Signature'\ntimestamp_header = 'X-Own-Time'\nid_from = 'header:X-Own-Id'\n\
         signature_encoding = 'base64'\nsignature_prefix = 'v1,'\nsigned = '{{id}}.{{timestamp}}.{{body}}'\n{more}",
        secret.display()
    );
    std::fs::write(&file, text).unwrap();
    let path = file.to_string_lossy().into_owned();
    (dir, path)
}

fn site(args: &[&str], file: &str, env: &[(&str, &str)]) -> Site {
    let args: Vec<&str> = args.iter().copied().chain(["--config", file]).collect();
    let env: Vec<(&str, &str)> = env.iter().copied().chain([("STRIPE_SECRET", SECRET)]).collect();
    Site::start_with(&args, &env)
}

/// HMAC-SHA256 in hexadecimal digits and in base64, as Python has it.
fn sign(message: &str) -> (String, String) {
    let script = "import base64,hmac,sys; tag=hmac.digest(sys.argv[1].encode(), sys.argv[2].encode(), 'sha256'); \
                  print(tag.hex(), base64.b64encode(tag).decode())";
    let output = Command::new("python3").args(["-c", script, SECRET, message]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (hex, base64) = text.trim().split_once(' ').unwrap();
    (hex.into(), base64.into())
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn github(site: &Site, id: &str, signature: &str, body: &str) -> Answer {
    let lines = format!("X-GitHub-Event: push\nX-GitHub-Delivery: {id}\nX-Hub-Signature-256: {signature}");
    site.request(&format!("POST /hooks/github HTTP/1.1\nUser-Agent: GitHub-Hookshot/1\n{lines}"), body)
}

fn stripe(site: &Site, at: u64, signed_at: u64, body: &str) -> Answer {
    let (hex, _) = sign(&format!("{signed_at}.{BODY}"));
    let value = format!("t={at},v1={},v1={hex},v0=00", "0".repeat(64));
    site.request(&format!("POST /hooks/stripe HTTP/1.1\nStripe-Signature: {value}"), body)
}

fn own(site: &Site, id: &str, signed_id: &str) -> Answer {
    let at = now();
    let (_, base64) = sign(&format!("{signed_id}.{at}.{BODY}"));
    let lines = format!("X-Own-Signature: v1,{base64}\nX-Own-Time: {at}\nX-Own-Id: {id}");
    site.request(&format!("POST /hooks/own HTTP/1.1\n{lines}"), BODY)
}

fn fields(answer: &Answer) -> Json {
    serde_json::from_str(&answer.body).unwrap_or_else(|error| panic!("{error}: {}", answer.body))
}

fn length(site: &Site, queue: &str) -> i64 {
    site.goflow.wire().say(&format!("GOFLOW.LEN {queue}")).integer()
}

#[test]
fn a_signed_delivery_is_one_job_however_often_it_is_sent() {
    let (_dir, file) = configuration("");
    let site = site(&["--shard", "s1=memory:"], &file, &[]);
    let (hex, _) = sign(BODY);
    for _ in 0..3 {
        let answer = github(&site, "72d3162e", &format!("sha256={hex}"), BODY);
        assert_eq!((answer.status, fields(&answer)), (200, json!({"id": "72d3162e"})));
        let at = now();
        let answer = stripe(&site, at, at, BODY);
        assert_eq!((answer.status, fields(&answer)), (200, json!({"id": "evt_1"})));
        assert_eq!(own(&site, "e-1", "e-1").status, 200);
    }
    assert_eq!(github(&site, "72d3162f", &format!("sha256={hex}"), BODY).status, 200, "another delivery");
    for (queue, jobs) in [("github", 2), ("stripe", 1), ("own", 1)] {
        assert_eq!(length(&site, queue), jobs, "{queue}");
    }
    let job = site.goflow.wire().say("GOFLOW.DEQUEUE github");
    assert_eq!((job.field("payload").text(), job.field("type").text()), (BODY.into(), "push".into()));
    assert_eq!(job.field("meta").field("user-agent").text(), "GitHub-Hookshot/1");
    // Worked on and done with, it is still known.
    let receipt = job.field("receipt").text();
    site.goflow.wire().say(&format!("GOFLOW.ACK github {receipt}"));
    assert_eq!(github(&site, "72d3162e", &format!("sha256={hex}"), BODY).status, 200);
    assert_eq!(length(&site, "github"), 1);
    assert_eq!(site.goflow.wire().say("GOFLOW.DEQUEUE stripe").field("type").text(), "invoice.paid");
}

#[test]
fn what_is_tampered_with_or_late_or_unsigned_adds_nothing() {
    let (_dir, file) = configuration("");
    let site = site(&["--shard", "s1=memory:"], &file, &[("GOFLOW_AUTH_PASSWORD", "hush")]);
    let (hex, _) = sign(BODY);
    let signature = format!("sha256={hex}");
    let changed = BODY.replace("4712", "4713");
    let (last, other) = (&signature[..signature.len() - 1], if signature.ends_with('0') { "1" } else { "0" });
    let bare = |path: &str| site.request(&format!("POST {path} HTTP/1.1"), BODY);
    let (now, minute) = (now(), 60);
    for (case, answer, status) in [
        ("a changed body", github(&site, "a", &signature, &changed), 401),
        ("a body that goes on", github(&site, "a", &signature, &format!("{BODY} ")), 401),
        ("no body", github(&site, "a", &signature, ""), 401),
        ("one digit changed", github(&site, "a", &format!("{last}{other}"), BODY), 401),
        ("a digit too few", github(&site, "a", last, BODY), 401),
        ("no prefix", github(&site, "a", &hex, BODY), 401),
        ("SHA-1", github(&site, "a", &format!("sha1={}", &hex[..40]), BODY), 401),
        ("a time that was not signed", stripe(&site, now, now - 1, BODY), 401),
        ("six minutes old", stripe(&site, now - 6 * minute, now - 6 * minute, BODY), 401),
        ("six minutes ahead", stripe(&site, now + 6 * minute, now + 6 * minute, BODY), 401),
        ("an id that was not signed", own(&site, "e-2", "e-1"), 401),
        ("no signature", bare("/hooks/github"), 401),
        ("no signature", bare("/hooks/stripe"), 401),
        ("no signature", bare("/hooks/own"), 401),
        (
            "the password instead",
            site.request("POST /hooks/own HTTP/1.1\nAuthorization: Basic ZGVmYXVsdDpodXNo", BODY),
            401,
        ),
        ("no id", github(&site, "", &signature, BODY), 400),
        ("an id that is one of ours", github(&site, "1~s1", &signature, BODY), 400),
        ("too large", github(&site, "a", &signature, &"x".repeat(1_001)), 413),
        ("another method", site.get("/hooks/github"), 405),
        ("another path", bare("/hooks/github/"), 404),
    ] {
        assert_eq!(answer.status, status, "{case}: {}", answer.body);
        assert!(![SECRET, "4712", "4713"].iter().any(|canary| answer.body.contains(canary)), "{case}");
    }
    let mut wire = site.goflow.wire();
    wire.say("AUTH hush");
    for queue in ["github", "stripe", "own"] {
        assert_eq!(wire.say(&format!("GOFLOW.LEN {queue}")).integer(), 0, "{queue}");
    }
    let samples = site.samples();
    for (path, result, count) in
        [("github", "unsigned", 8.0), ("github", "malformed", 4.0), ("stripe", "late", 2.0), ("own", "unsigned", 3.0)]
    {
        let series = format!("goflow_webhook_deliveries_total{{path=\"/hooks/{path}\",result=\"{result}\"}}");
        assert_eq!(samples.get(&series), Some(&count), "{series}");
    }
    // A password opens no webhook, and a webhook needs none.
    assert_eq!(github(&site, "a", &signature, BODY).status, 200);
}

#[test]
fn a_replay_within_the_tolerance_finds_the_job_and_after_it_the_door_closed() {
    let (_dir, file) = configuration(
        "[[webhook]]\npath = '/hooks/quick'\nqueue = 'quick'\nscheme = 'stripe'\nsecret = 'canary-secret-4711'\ntolerance_ms = 10000",
    );
    let site = site(&["--shard", "s1=memory:"], &file, &[]);
    let at = now();
    let (hex, _) = sign(&format!("{at}.{BODY}"));
    let replay = || {
        let head = format!("POST /hooks/quick HTTP/1.1\nStripe-Signature: t={at},v1={hex}");
        site.request(&head, BODY).status
    };
    assert_eq!((replay(), replay()), (200, 200));
    assert_eq!(length(&site, "quick"), 1);
    eventually!("the very same bytes are too late", (replay() == 401).then_some(()));
    assert_eq!(length(&site, "quick"), 1);
}

#[test]
fn a_delivery_that_breaks_off_adds_nothing_and_one_that_meets_no_shard_is_to_be_sent_again() {
    let shard = Server::start(Flavour::Redis7, &[]);
    let (_dir, file) = configuration("");
    let url = format!("s1={}", shard.url());
    let mut site = site(&["--shard", &url], &file, &[]);
    site.goflow.expect_log("shard is down");
    site.goflow.expect_log("a queue could not be registered");
    let (hex, _) = sign(BODY);
    let signature = format!("sha256={hex}");
    let mut socket = TcpStream::connect(site.address()).unwrap();
    let head = format!("X-GitHub-Delivery: a\r\nX-Hub-Signature-256: {signature}\r\nContent-Length: {}", BODY.len());
    write!(socket, "POST /hooks/github HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n{}", &BODY[..20]).unwrap();
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    let mut rest = Vec::new();
    // Answered or just closed: in either case it is over when the socket is.
    let _ = socket.read_to_end(&mut rest);
    assert!(!rest.starts_with(b"HTTP/1.1 200"));
    assert_eq!(length(&site, "github"), 0);
    drop(shard);
    let answer = github(&site, "b", &signature, BODY);
    assert_eq!((answer.status, fields(&answer)["error"]["code"].as_str()), (503, Some("SHARDDOWN")));
    assert!(answer.head.contains("\r\nretry-after: 1"), "{}", answer.head);
}

#[test]
fn each_webhook_is_described_and_no_log_holds_a_secret_or_a_payload() {
    let (_dir, file) = configuration("");
    let mut site = site(&["--shard", "s1=memory:", "--log", "trace"], &file, &[]);
    let description = fields(&site.get("/v1/openapi.json"));
    for (path, header) in [("github", "x-github-delivery"), ("stripe", "stripe-signature"), ("own", "x-own-time")] {
        let described = &description["paths"][format!("/hooks/{path}")]["post"];
        let names: Vec<&str> =
            described["parameters"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
        assert!(names.contains(&header) && described["responses"]["401"].is_object(), "{path}: {names:?}");
    }
    assert!(description.get("x-webhook").is_none());
    let (hex, _) = sign(BODY);
    assert_eq!(github(&site, "a", &format!("sha256={hex}"), BODY).status, 200);
    assert_eq!(github(&site, "a", "sha256=00", BODY).status, 401);
    let settings = format!("{:?}", site.goflow.wire().say("CONFIG GET *"));
    site.goflow.terminate();
    let log = site.goflow.log().join("\n");
    assert!(log.contains("webhook refused"), "{log}");
    for canary in [SECRET, "an-older-secret", "canary-payload", &hex] {
        assert!(!log.contains(canary) && !settings.contains(canary), "{canary}");
    }
}
