//! Where alerts go: one service, program or log, and in which words it is told.
//!
//! A sink is made from the checked configuration alone; nothing that a client or a job says decides where anything is sent.
//! Nothing here implements `Debug`: addresses and keys are secrets, and [`Sink::shown`] is what may be seen.

use std::pin::pin;
use std::process::Stdio;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{Either, join, select};
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use ring::hmac;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{ChildStderr, ChildStdin, Command};

use super::message::{Change, Entry, Message, hex};
use super::post::{Failure, Target};
use crate::clock;

/// Most groups that a message tells of one by one to a service that takes each by itself.
const EVENTS_MAX: usize = 50;
/// What is kept of a program's last words.
const SAID_CHARS_MAX: usize = 200;
const SAID_BYTES_MAX: usize = 4 * SAID_CHARS_MAX;
/// For them to arrive after its end: a child that it left behind may hold the pipe for ever.
const PIPE_WAIT: Duration = Duration::from_millis(200);

pub struct Sink {
    pub name: String,
    /// How long one delivery may take.
    pub timeout: Duration,
    pub kind: Kind,
}

pub enum Kind {
    /// An incoming webhook of Slack, or what takes the same.
    Slack {
        target: Target,
    },
    /// Any service that takes JSON.
    Webhook {
        target: Target,
        headers: HeaderMap,
        /// Signs each body.
        key: Option<Box<hmac::Key>>,
        template: Option<Template>,
    },
    /// PagerDuty's Events API v2, one event for each group and each condition.
    PagerDuty {
        target: Target,
        routing_key: String,
    },
    /// A program that reads the alert from its standard input.
    Command {
        program: String,
        args: Vec<String>,
    },
    Log,
}

impl Kind {
    pub fn word(&self) -> &'static str {
        match self {
            Kind::Slack { .. } => "slack",
            Kind::Webhook { .. } => "webhook",
            Kind::PagerDuty { .. } => "pagerduty",
            Kind::Command { .. } => "command",
            Kind::Log => "log",
        }
    }
}

impl Sink {
    /// Where it leads, without secrets.
    pub fn shown(&self) -> String {
        match &self.kind {
            Kind::Slack { target } | Kind::Webhook { target, .. } | Kind::PagerDuty { target, .. } => target.shown(),
            Kind::Command { program, .. } => program.clone(),
            Kind::Log => "log".into(),
        }
    }

    /// Delivers the message; `groups_max` of its groups are told one by one where they share a text.
    pub async fn send(&self, message: &Message, groups_max: usize) -> Result<(), Failure> {
        match &self.kind {
            Kind::Slack { target } => {
                let body = json!({"text": slack_text(&message.text(groups_max))});
                target.post(id_header(message), to_bytes(&body), self.timeout).await
            }
            Kind::Webhook { target, headers, key, template } => {
                let body = match template {
                    None => to_bytes(&message.json(groups_max)),
                    Some(template) => template.fill(message, groups_max).into(),
                };
                let mut headers = headers.clone();
                headers.extend(id_header(message));
                if let Some(key) = key {
                    sign(&mut headers, key, clock::now() / 1_000, &body);
                }
                target.post(headers, body, self.timeout).await
            }
            Kind::PagerDuty { target, routing_key } => {
                let mut is_begun = false;
                for event in events(message, routing_key) {
                    // A key makes one incident of an event that is sent twice. Made anew, a message could leave out what was
                    // taken of this one, whose incident nobody would resolve.
                    let told = target.post(id_header(message), to_bytes(&event), self.timeout).await;
                    told.map_err(|failure| Failure { maybe_taken: failure.maybe_taken || is_begun, ..failure })?;
                    is_begun = true;
                }
                Ok(())
            }
            Kind::Command { program, args } => self.run(program, args, &message.json(groups_max)).await,
            Kind::Log => {
                tracing::warn!(rule = %message.rule, id = %message.id, deaths = message.deaths(), "alert: {}", message.summary());
                Ok(())
            }
        }
    }

    async fn run(&self, program: &str, args: &[String], alert: &Value) -> Result<(), Failure> {
        let told = |error: std::io::Error| Failure::refused(format!("{program}: {error}"));
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        // The variables of this process may be its secrets.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("GOFLOW_")) {
            command.env_remove(name);
        }
        let mut child = command.spawn().map_err(told)?;
        let (input, errors, mut said) = (child.stdin.take(), child.stderr.take(), Vec::new());
        let work = async {
            let pipes = pin!(join(feed(input, alert), hear(errors, &mut said)));
            match select(pin!(child.wait()), pipes).await {
                Either::Left((Ok(status), _)) if status.success() => Ok(status),
                Either::Left((ended, pipes)) => {
                    let _ = tokio::time::timeout(PIPE_WAIT, pipes).await;
                    ended
                }
                Either::Right((_, ended)) => ended.await,
            }
        };
        let late = || Failure::unsure(format!("{program} did not end in {} ms", self.timeout.as_millis()));
        let status = tokio::time::timeout(self.timeout, work).await.map_err(|_| late())?.map_err(told)?;
        if status.success() {
            return Ok(());
        }
        let said: String = String::from_utf8_lossy(&said).chars().take(SAID_CHARS_MAX).collect();
        let why = format!("{program}: {status} {}", said.split_whitespace().collect::<Vec<_>>().join(" "));
        Err(Failure::unsure(why.trim_end()))
    }
}

/// Writes the alert and ends the input. A program that does not read is judged by how it ends.
async fn feed(input: Option<ChildStdin>, alert: &Value) {
    if let Some(mut input) = input {
        let _ = input.write_all(format!("{alert}\n").as_bytes()).await;
    }
}

/// Reads to the end, so that a program that says much is not held up, and keeps the beginning.
async fn hear(errors: Option<ChildStderr>, said: &mut Vec<u8>) {
    let (Some(mut errors), mut chunk) = (errors, [0; 1_024]) else { return };
    while let Ok(len @ 1..) = errors.read(&mut chunk).await {
        said.extend_from_slice(&chunk[..len.min(SAID_BYTES_MAX - said.len())]);
    }
}

fn to_bytes(value: &Value) -> Bytes {
    value.to_string().into()
}

fn id_header(message: &Message) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if let Ok(id) = HeaderValue::from_str(&message.id) {
        headers.insert(HeaderName::from_static("goflow-alert-id"), id);
    }
    headers
}

/// Puts the signature on: the time in seconds, and over time, a point and the body the HMAC.
fn sign(headers: &mut HeaderMap, key: &hmac::Key, seconds: u64, body: &[u8]) {
    let mut signed = hmac::Context::with_key(key);
    signed.update(format!("{seconds}.").as_bytes());
    signed.update(body);
    let signature = format!("v1={}", hex(signed.sign().as_ref()));
    for (name, value) in [("goflow-timestamp", seconds.to_string()), ("goflow-signature", signature)] {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    }
}

/// Slack's three characters, so that an error text cannot mention a channel or make a link.
fn slack_text(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The events of a message, in its order.
fn events(message: &Message, routing_key: &str) -> Vec<Value> {
    let event = |action: &str, dedup_key: String, summary: String, details: Value| {
        let mut event = json!({"routing_key": routing_key, "event_action": action, "dedup_key": dedup_key});
        if action == "trigger" {
            event["payload"] = json!({
                "summary": summary.chars().take(1_024).collect::<String>(),
                "source": "goflow",
                "severity": if message.test { "info" } else { "error" },
                "component": details["queue"],
                "group": message.rule,
                "class": details["fingerprint"],
                "custom_details": details,
            });
        }
        event
    };
    let change = |change: &Change| {
        let action = if change.firing { "trigger" } else { "resolve" };
        event(
            action,
            change.dedup_key(&message.rule),
            change.text.clone(),
            json!({"condition": change.key, "id": message.id}),
        )
    };
    let group = |entry: &Entry| {
        let mut details = json!(entry);
        details["id"] = json!(message.id);
        let queue = &entry.queue;
        let summary =
            format!("{} jobs of {queue} died: {}", entry.count, entry.error.lines().next().unwrap_or_default());
        event("trigger", entry.dedup_key(&message.rule), summary, details)
    };
    let mut events: Vec<Value> = message.changes.iter().map(change).collect();
    if message.test {
        // A test leaves no incident behind.
        events.extend(message.changes.iter().map(|test| change(&Change { firing: false, ..test.clone() })));
    }
    events.extend(message.entries.iter().take(EVENTS_MAX).map(group));
    if message.entries.len() > EVENTS_MAX {
        let rest = &message.entries[EVENTS_MAX..];
        let count: u64 = rest.iter().map(|entry| entry.count).sum();
        let summary = format!("{count} jobs died in {} more groups", rest.len());
        let details = json!({"count": count, "groups": rest.len(), "id": message.id});
        events.push(event("trigger", format!("goflow/more/{}", message.rule), summary, details));
    }
    events
}

/// A body with places for what the message says: `{{name}}`.
#[derive(Clone)]
pub struct Template {
    /// Texts and the names of places in turn, a text first.
    pieces: Vec<String>,
}

/// What a place may name. The first two are JSON as they are; the others stand inside a JSON text, or are numbers.
const PLACES: [&str; 8] = ["alert", "groups", "id", "rule", "summary", "text", "deaths", "at"];

impl Template {
    /// An error says what is wrong; a template that does not make JSON is refused.
    pub fn parse(text: &str) -> Result<Template, String> {
        let mut pieces = Vec::new();
        for (number, piece) in text.split("{{").enumerate() {
            if number == 0 {
                pieces.push(piece.to_owned());
                continue;
            }
            let (name, after) = piece.split_once("}}").ok_or("a '{{' is not closed by '}}'")?;
            let name = name.trim();
            if !PLACES.contains(&name) {
                return Err(format!("there is no {{{{{name}}}}}: expected one of {}", PLACES.join(", ")));
            }
            pieces.extend([name.to_owned(), after.to_owned()]);
        }
        let template = Template { pieces };
        let mut sample = Message::test("\"\\\n", 1);
        sample.entries.push(Entry { error: "\"}".into(), ..Entry::default() });
        let body = template.fill(&sample, 1);
        serde_json::from_str::<Value>(&body).map_err(|error| format!("does not make JSON: {error}"))?;
        Ok(template)
    }

    fn fill(&self, message: &Message, groups_max: usize) -> String {
        let all = message.json(groups_max);
        let value = |name: &str| match name {
            "alert" => all.to_string(),
            "text" => inside(&message.text(groups_max)),
            name => match &all[name] {
                Value::String(text) => inside(text),
                value => value.to_string(),
            },
        };
        let pieces = self.pieces.iter().enumerate();
        pieces.map(|(number, piece)| if number % 2 == 0 { piece.clone() } else { value(piece) }).collect()
    }
}

/// A text as it stands between the quotes of JSON.
fn inside(text: &str) -> String {
    let quoted = Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_the_hmac_of_time_and_body() {
        let mut headers = HeaderMap::new();
        sign(&mut headers, &hmac::Key::new(hmac::HMAC_SHA256, b"secret"), 1_700_000_000, b"{\"a\":1}");
        assert_eq!(headers["goflow-timestamp"], "1700000000");
        // printf '1700000000.{"a":1}' | openssl dgst -sha256 -hmac secret
        assert_eq!(headers["goflow-signature"], SIGNATURE);
    }

    const SIGNATURE: &str = "v1=49f24e537407743fa4a0242bb63b94b9a47ee99cbbe071ccd8a22550ae411686";

    #[test]
    fn a_template_makes_json_of_whatever_a_job_says() {
        let template = Template::parse("{\"text\":\"{{ summary }}\",\"n\":{{deaths}},\"all\":{{alert}}}").unwrap();
        let mut message = Message::test("rule", 5);
        message.changes[0].text = "a \"quoted\" \\ text\nof two lines {{deaths}}".into();
        let body: Value = serde_json::from_str(&template.fill(&message, 5)).unwrap();
        assert_eq!(body["text"], "a \"quoted\" \\ text\nof two lines {{deaths}}");
        assert_eq!((&body["n"], &body["all"]["rule"]), (&json!(0), &json!("rule")));
        for (bad, why) in [
            ("{\"a\": {{nothing}}}", "there is no {{nothing}}"),
            ("{\"a\": {{deaths}", "not closed"),
            ("{\"a\": {{summary}}}", "does not make JSON"),
        ] {
            assert!(Template::parse(bad).err().unwrap().contains(why), "{bad}");
        }
    }

    #[test]
    fn each_group_has_its_incident_and_a_condition_that_ends_resolves_its_own() {
        let mut message = Message::test("rule", 5);
        message.test = false;
        message.changes.push(Change { key: "depth a".into(), firing: false, text: "deep".into() });
        for queue in ["a", "b"] {
            message.entries.push(Entry { queue: queue.into(), kind: Some("k".into()), count: 3, ..Entry::default() });
        }
        let events = events(&message, "hush");
        let actions: Vec<&str> = events.iter().map(|event| event["event_action"].as_str().unwrap()).collect();
        assert_eq!(actions, ["trigger", "resolve", "trigger", "trigger"]);
        let keys: std::collections::BTreeSet<&str> =
            events.iter().map(|event| event["dedup_key"].as_str().unwrap()).collect();
        assert_eq!(keys.len(), 4);
        assert_eq!(events[2]["dedup_key"], message.entries[0].dedup_key("rule"));
        assert_eq!(
            (&events[2]["payload"]["component"], &events[2]["payload"]["custom_details"]["count"]),
            (&json!("a"), &json!(3))
        );
    }

    /// What becomes of a message that is told to this shell script.
    async fn told_to(script: &str) -> Result<(), Failure> {
        let kind = Kind::Command { program: "/bin/sh".into(), args: vec!["-c".into(), script.into()] };
        let sink = Sink { name: "program".into(), timeout: Duration::from_secs(4), kind };
        sink.send(&Message::test("rule", 5), 5).await
    }

    #[tokio::test]
    async fn a_program_is_judged_by_its_exit_whoever_it_leaves_behind_and_however_much_it_says() {
        assert_eq!(told_to("cat > /dev/null; sleep 8 & exit 0").await, Ok(()));
        let failed = told_to("echo 'so  it\nis' >&2; sleep 8 & exit 3").await.unwrap_err();
        assert!(failed.why.ends_with("exit status: 3 so it is") && failed.maybe_taken, "{}", failed.why);
        let said = told_to("head -c 10000000 /dev/zero | tr '\\0' x >&2; exit 3").await.unwrap_err().why;
        assert!(said.ends_with("xxx") && said.len() < 2 * SAID_CHARS_MAX, "{said}");
    }

    #[test]
    fn a_text_for_slack_cannot_call_a_channel() {
        assert_eq!(slack_text("<!channel> a & b"), "&lt;!channel&gt; a &amp; b");
    }
}
