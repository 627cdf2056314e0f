//! A job as the worker has it, who does it, and what may come of it.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;

use redis::{Cmd, Value};

use super::service::Service;
use super::{Worker, program};
use crate::clock::Millis;

/// One delivered job: the fields of its map.
pub struct Task {
    fields: HashMap<String, Vec<u8>>,
    /// Its metadata, in order.
    pub meta: Vec<(String, Vec<u8>)>,
}

impl Task {
    /// Reads a delivery; `None` when it has not the shape of one.
    pub fn read(value: Value) -> Option<Task> {
        let mut task = Task { fields: HashMap::new(), meta: Vec::new() };
        for (name, value) in pairs(value)? {
            let name = text(&name)?;
            if name == "meta" {
                task.meta = pairs(value)?
                    .iter()
                    .map(|(name, value)| Some((text(name)?, bytes(value)?)))
                    .collect::<Option<_>>()?;
            } else {
                task.fields.insert(name, bytes(&value)?);
            }
        }
        ["id", "receipt", "payload", "queue"].iter().all(|name| task.fields.contains_key(*name)).then_some(task)
    }

    fn field(&self, name: &str) -> &[u8] {
        self.fields.get(name).map_or(&[], Vec::as_slice)
    }

    /// Chosen by a client: a log shows it quoted, so that a line break in it makes no line of its own.
    pub fn id(&self) -> String {
        String::from_utf8_lossy(self.field("id")).into_owned()
    }

    pub fn queue(&self) -> &[u8] {
        self.field("queue")
    }

    pub fn receipt(&self) -> &[u8] {
        self.field("receipt")
    }

    pub fn payload(&self) -> &[u8] {
        self.field("payload")
    }

    pub fn attempt(&self) -> u32 {
        std::str::from_utf8(self.field("attempt")).ok().and_then(|text| text.parse().ok()).unwrap_or(1)
    }

    /// What a handler is told beside the payload, by plain lower-case names; metadata as `meta_<name>`, where what is no
    /// letter, digit or underline is one.
    pub fn labels(&self) -> Vec<(String, Vec<u8>)> {
        let plain =
            self.fields.iter().filter(|(name, _)| *name != "payload").map(|(name, value)| (name.clone(), value));
        let meta = self.meta.iter().map(|(name, value)| {
            let tame = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' };
            (format!("meta_{}", name.chars().map(tame).collect::<String>()), value)
        });
        // A NUL ends a variable and a line's end a header, so such values are left out rather than cut.
        let sound = |value: &Vec<u8>| !value.iter().any(|byte| matches!(byte, 0 | b'\r' | b'\n'));
        plain.chain(meta).filter(|(_, value)| sound(value)).map(|(name, value)| (name, value.clone())).collect()
    }
}

fn pairs(value: Value) -> Option<Vec<(Value, Value)>> {
    match value {
        Value::Map(pairs) => Some(pairs),
        Value::Array(items) if items.len() % 2 == 0 => {
            let mut items = items.into_iter();
            Some(std::iter::from_fn(|| Some((items.next()?, items.next()?))).collect())
        }
        _ => None,
    }
}

fn bytes(value: &Value) -> Option<Vec<u8>> {
    match value {
        Value::BulkString(bytes) => Some(bytes.clone()),
        Value::SimpleString(text) => Some(text.clone().into_bytes()),
        Value::Int(number) => Some(number.to_string().into_bytes()),
        Value::Nil => Some(Vec::new()),
        _ => None,
    }
}

fn text(value: &Value) -> Option<String> {
    bytes(value).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// What does the jobs.
pub enum Handler {
    Program(Vec<OsString>),
    Service(Service),
}

impl Handler {
    pub async fn handle(&self, task: &Task, worker: &Worker) -> Verdict {
        match self {
            Handler::Program(words) => program::handle(words, task, worker).await,
            Handler::Service(service) => service.handle(task, worker).await,
        }
    }
}

/// How a delivery ended.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    Ack {
        result: Vec<u8>,
    },
    Fail {
        error: String,
        trace: Vec<u8>,
        retry_ms: Option<Millis>,
        dead: bool,
    },
    Release {
        delay_ms: Millis,
    },
    /// The handler cannot be started: the job goes back, and the worker ends.
    Broken,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Ack { .. } => f.write_str("ack"),
            Verdict::Fail { error, dead, .. } => write!(f, "{}: {error}", if *dead { "dead" } else { "fail" }),
            Verdict::Release { .. } | Verdict::Broken => f.write_str("release"),
        }
    }
}

impl Verdict {
    pub fn fail(error: impl Into<String>) -> Verdict {
        Verdict::Fail { error: error.into(), trace: Vec::new(), retry_ms: None, dead: false }
    }

    pub fn command(&self, task: &Task) -> Cmd {
        let mut command = Cmd::new();
        let mut begin = |name: &str| {
            command.arg(name).arg(task.queue()).arg(task.receipt());
        };
        match self {
            Verdict::Ack { result } => {
                begin("GOFLOW.ACK");
                if !result.is_empty() {
                    command.arg("RESULT").arg(result);
                }
            }
            Verdict::Fail { error, trace, retry_ms, dead } => {
                begin("GOFLOW.FAIL");
                command.arg("ERROR").arg(error);
                if !trace.is_empty() {
                    command.arg("TRACE").arg(trace);
                }
                if let Some(ms) = retry_ms {
                    command.arg("RETRYIN").arg(*ms);
                }
                if *dead {
                    command.arg("DEAD");
                }
            }
            Verdict::Release { delay_ms: 0 } | Verdict::Broken => begin("GOFLOW.RELEASE"),
            Verdict::Release { delay_ms } => {
                begin("GOFLOW.RELEASE");
                command.arg("DELAY").arg(*delay_ms);
            }
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.into())
    }

    fn task() -> Task {
        let meta = Value::Array(vec![bulk("trace-id"), bulk("7"), bulk("bad"), bulk("a\0b")]);
        let fields = ["id", "3~s1", "receipt", "3.9~s1", "payload", "p", "queue", "q"].map(bulk);
        let rest = [bulk("attempt"), Value::Int(2), bulk("meta"), meta];
        Task::read(Value::Array(fields.into_iter().chain(rest).collect())).unwrap()
    }

    #[test]
    fn a_delivery_is_read_and_its_labels_are_safe_to_pass_on() {
        let task = task();
        assert_eq!((task.id().as_str(), task.attempt(), task.payload()), ("3~s1", 2, &b"p"[..]));
        let labels: HashMap<String, Vec<u8>> = task.labels().into_iter().collect();
        assert_eq!(labels.get("meta_trace_id"), Some(&b"7".to_vec()));
        assert!(!labels.contains_key("payload") && !labels.contains_key("meta_bad"));
        assert!(Task::read(Value::Array(vec![bulk("id"), bulk("1")])).is_none());
        assert!(Task::read(Value::Okay).is_none());
    }

    #[test]
    fn verdicts_are_the_commands_of_the_protocol() {
        let words = |verdict: Verdict| -> Vec<String> {
            let command = verdict.command(&task());
            let word = |arg| match arg {
                redis::Arg::Simple(bytes) => String::from_utf8_lossy(bytes).into_owned(),
                _ => String::new(),
            };
            command.args_iter().map(word).collect()
        };
        assert_eq!(words(Verdict::Ack { result: Vec::new() }), ["GOFLOW.ACK", "q", "3.9~s1"]);
        let dead = Verdict::Fail { error: "e".into(), trace: b"t".to_vec(), retry_ms: Some(5), dead: true };
        let expected = ["GOFLOW.FAIL", "q", "3.9~s1", "ERROR", "e", "TRACE", "t", "RETRYIN", "5", "DEAD"];
        assert_eq!(words(dead), expected);
        assert_eq!(words(Verdict::Release { delay_ms: 9 })[3..], ["DELAY", "9"]);
    }
}
