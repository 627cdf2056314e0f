//! What one alert says, and in which forms.
//!
//! A [`Message`] stands for deaths, merged over queues and shards into one [`Entry`] for each group, and for conditions
//! that began or ended ([`Change`]). It is written down on a shard before it is sent ([`Message`] is its own note), so that
//! whoever sends it again sends the same under the same id; its [`Part`]s say what is told once a sink has taken it.
//! Texts come from jobs: they are cut, and escaped where they stand in another language.

use std::collections::BTreeMap;
use std::fmt::Write;

use bytes::BytesMut;
use ring::digest;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::clock::UnixMs;
use crate::job::{JobRef, Name, format_id};
use crate::shard::{DeathGroup, DeathMark};

/// What is shown of an error.
const ERROR_CHARS_MAX: usize = 300;
/// Longest text of a message; Slack cuts at 40,000 characters and hides what is longer than 4,000 behind a link.
const TEXT_BYTES_MAX: usize = 3_500;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// The same however often it is sent: receivers drop what they have had.
    pub id: String,
    pub rule: String,
    pub at: UnixMs,
    /// The groups, the one with most deaths first.
    pub entries: Vec<Entry>,
    pub changes: Vec<Change>,
    pub parts: Vec<Part>,
    /// It is sent by `GOFLOW.ALERT TEST` and stands for nothing.
    #[serde(default)]
    pub test: bool,
}

/// Deaths of one type and one kind of error in one queue, on all shards.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub queue: String,
    /// The type; `None` where the groups of a queue were too many, and this is the rest.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub fingerprint: String,
    /// Deaths that no message before has told of on this channel.
    pub count: u64,
    pub first_at: UnixMs,
    pub last_at: UnixMs,
    /// The job that died last, what it died of and where.
    pub job: String,
    pub error: String,
    pub worker: String,
}

/// A condition that began or ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// Names the condition and what it is about, for example `depth main`.
    pub key: String,
    pub firing: bool,
    /// One sentence without its end.
    pub text: String,
}

/// What is told of one group of one queue and shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    pub shard: String,
    pub queue: String,
    key: Vec<u8>,
    pub born: u64,
    /// All deaths of the group up to this one.
    pub upto: u64,
}

impl Part {
    pub fn new(shard: &str, queue: &Name, group: &DeathGroup) -> Part {
        let key = group.key.to_vec();
        Part { shard: shard.into(), queue: queue.to_string(), key, born: group.born, upto: group.count }
    }

    pub fn is_of(&self, shard: &str, queue: &Name, group: &DeathGroup) -> bool {
        self.born == group.born && self.shard == shard && self.queue == queue.as_str() && self.key == group.key
    }

    pub fn mark(&self) -> DeathMark {
        DeathMark { key: self.key.clone().into(), born: self.born, count: self.upto }
    }
}

impl Entry {
    /// So many deaths of a group.
    pub fn new(shard: &str, queue: &Name, group: &DeathGroup, count: u64) -> Entry {
        let (kind, fingerprint) = match group.parts() {
            Some((kind, fingerprint)) => (Some(readable(kind, 128)), readable(fingerprint, 128)),
            None => (None, String::new()),
        };
        let job = match &group.job {
            JobRef::Chosen(id) => readable(id, 512),
            JobRef::Seq(seq) => {
                let mut id = BytesMut::new();
                format_id(&mut id, *seq, shard);
                readable(&id, 512)
            }
        };
        Entry {
            queue: queue.to_string(),
            kind,
            fingerprint,
            count,
            first_at: group.first_at,
            last_at: group.last_at,
            job,
            error: readable_lines(&group.error, ERROR_CHARS_MAX),
            worker: readable(&group.worker, 512),
        }
    }

    /// Takes in the same group of another shard.
    pub fn merge(&mut self, other: Entry) {
        let (count, first_at) = (self.count + other.count, self.first_at.min(other.first_at));
        if other.last_at > self.last_at {
            *self = other;
        }
        (self.count, self.first_at) = (count, first_at);
    }

    /// Names the group on all shards and for ever.
    pub fn dedup_key(&self, rule: &str) -> String {
        let parts = [rule, &self.queue, self.kind.as_deref().unwrap_or("\0"), &self.fingerprint].join("\n");
        let hash = digest::digest(&digest::SHA256, parts.as_bytes());
        format!("goflow/{}/{}", self.queue, hex(&hash.as_ref()[..12]))
    }

    fn line(&self) -> String {
        let kind = match self.kind.as_deref() {
            Some("") => String::new(),
            Some(kind) => format!(" of type {kind}"),
            None => " of other kinds".into(),
        };
        let what = if self.error.is_empty() { "no error text" } else { self.error.lines().next().unwrap_or_default() };
        let worker = if self.worker.is_empty() { String::new() } else { format!(" on {}", self.worker) };
        format!("{} {}{kind}: {what} (last: {}{worker})", self.queue, jobs(self.count), self.job)
    }
}

fn jobs(count: u64) -> String {
    if count == 1 { "1 job died".into() } else { format!("{count} jobs died") }
}

/// A new random id.
pub fn new_id() -> String {
    format!("{:016x}", rand::random::<u64>())
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Any bytes as one line of at most so many characters: it stands in lines of logs, which nobody must forge.
fn readable(bytes: &[u8], chars_max: usize) -> String {
    readable_lines(bytes, chars_max).replace('\n', " ")
}

/// The same with its line ends. Where only a line is told, it is the first ([`Entry::line`]).
fn readable_lines(bytes: &[u8], chars_max: usize) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars().take(chars_max).map(|c| if c.is_control() && c != '\n' { ' ' } else { c }).collect()
}

impl Message {
    pub fn test(rule: &str, now: UnixMs) -> Message {
        let text = format!("this is a test of the rule {rule}, asked for with GOFLOW.ALERT TEST");
        let changes = vec![Change { key: "test".into(), firing: true, text }];
        let (entries, parts) = (Vec::new(), Vec::new());
        Message { id: new_id(), rule: rule.into(), at: now, entries, changes, parts, test: true }
    }

    /// Deaths that it stands for.
    pub fn deaths(&self) -> u64 {
        self.entries.iter().map(|entry| entry.count).sum()
    }

    /// One line.
    pub fn summary(&self) -> String {
        let mut said: Vec<String> = self.changes.iter().take(3).map(Change::line).collect();
        if self.changes.len() > 3 {
            said.push(format!("{} more conditions changed", self.changes.len() - 3));
        }
        match &self.entries[..] {
            [] => {}
            [one] => said.push(one.line()),
            many => said.push(format!("{} in {} groups, most in {}", jobs(self.deaths()), many.len(), many[0].queue)),
        }
        said.join("; ")
    }

    /// A text for people, with at most so many groups told one by one.
    pub fn text(&self, groups_max: usize) -> String {
        let mut text = String::new();
        for change in &self.changes {
            let _ = writeln!(text, "{}", change.line());
        }
        if self.entries.len() > 1 {
            let _ = writeln!(text, "{} in {} groups", jobs(self.deaths()), self.entries.len());
        }
        let mut told = 0;
        for entry in self.entries.iter().take(groups_max) {
            let line = entry.line();
            if text.len() + line.len() > TEXT_BYTES_MAX {
                break;
            }
            let _ = writeln!(text, "{line}");
            told += 1;
        }
        let rest: u64 = self.entries[told..].iter().map(|entry| entry.count).sum();
        if rest > 0 {
            let _ = writeln!(text, "and {} in {} more groups", jobs(rest), self.entries.len() - told);
        }
        let _ = write!(text, "(rule {}, alert {})", self.rule, self.id);
        text
    }

    /// All of it for programs; the groups one by one up to the bound, the counts always of all.
    pub fn json(&self, groups_max: usize) -> Value {
        let told = &self.entries[..self.entries.len().min(groups_max)];
        let parts: Vec<Value> = self
            .parts
            .iter()
            .map(|part| json!({"shard": part.shard, "queue": part.queue, "group": hex(&part.key), "born": part.born, "upto": part.upto}))
            .collect();
        json!({
            "id": self.id,
            "rule": self.rule,
            "at": self.at,
            "test": self.test,
            "summary": self.summary(),
            "deaths": self.deaths(),
            "groups": told,
            "groups_left_out": self.entries.len() - told.len(),
            "conditions": self.changes,
            "parts": parts,
        })
    }
}

impl Change {
    fn line(&self) -> String {
        if self.firing { self.text.clone() } else { format!("resolved: {}", self.text) }
    }

    pub fn dedup_key(&self, rule: &str) -> String {
        let hash = digest::digest(&digest::SHA256, format!("{rule}\n{}", self.key).as_bytes());
        format!("goflow/condition/{}", hex(&hash.as_ref()[..12]))
    }
}

/// Merges groups of several shards; most deaths first.
pub fn merged(found: Vec<(Vec<u8>, Entry)>) -> Vec<Entry> {
    let mut by_group: BTreeMap<(String, Vec<u8>), Entry> = BTreeMap::new();
    for (key, entry) in found {
        match by_group.entry((entry.queue.clone(), key)) {
            std::collections::btree_map::Entry::Vacant(place) => drop(place.insert(entry)),
            std::collections::btree_map::Entry::Occupied(mut known) => known.get_mut().merge(entry),
        }
    }
    let mut entries: Vec<Entry> = by_group.into_values().collect();
    entries.sort_by(|one, other| other.count.cmp(&one.count).then_with(|| one.queue.cmp(&other.queue)));
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(queue: &str, count: u64, error: &str) -> Entry {
        Entry {
            queue: queue.into(),
            kind: Some("mail".into()),
            count,
            error: error.into(),
            job: "7~s1".into(),
            ..Entry::default()
        }
    }

    fn message(entries: Vec<Entry>) -> Message {
        let (changes, parts) = (Vec::new(), Vec::new());
        Message { id: "a1".into(), rule: "all".into(), at: 5, entries, changes, parts, test: false }
    }

    #[test]
    fn a_group_is_one_on_all_shards_and_what_is_not_told_is_counted() {
        let found = vec![(vec![1], entry("a", 3, "x")), (vec![1], entry("a", 4, "y")), (vec![2], entry("b", 9, "z"))];
        let entries = merged(found);
        assert_eq!(
            entries.iter().map(|entry| (&entry.queue[..], entry.count)).collect::<Vec<_>>(),
            [("b", 9), ("a", 7)]
        );
        let text = message(entries).text(1);
        assert_eq!(
            text,
            "16 jobs died in 2 groups\nb 9 jobs died of type mail: z (last: 7~s1)\nand 7 jobs died in 1 more groups\n(rule all, alert a1)"
        );
    }

    #[test]
    fn a_text_has_its_bound_and_still_says_how_many_there_are() {
        let many: Vec<Entry> = (0..500).map(|_| entry("q", 2, &"e".repeat(300))).collect();
        let text = message(many).text(1_000);
        assert!(text.len() < TEXT_BYTES_MAX + 200, "{}", text.len());
        assert!(text.starts_with("1000 jobs died in 500 groups"), "{text}");
        assert!(text.contains("more groups"));
    }

    #[test]
    fn what_a_client_calls_things_stays_on_its_line_and_an_error_may_have_many() {
        let group = DeathGroup {
            key: DeathGroup::key_of(b"ki\nnd", b"boom\tx"),
            born: 1,
            count: 1,
            first_at: 1,
            last_at: 1,
            told: Vec::new(),
            job: JobRef::Chosen("i\r\nd".into()),
            error: "boom\tx\nat y".into(),
            worker: "w\u{85}\u{1b}o".into(),
        };
        let entry = Entry::new("s1", &Name::parse(b"q").unwrap(), &group, 1);
        assert_eq!((entry.error.as_str(), entry.fingerprint.as_str()), ("boom x\nat y", "boom x"));
        assert_eq!(message(vec![entry]).summary(), "q 1 job died of type ki nd: boom x (last: i  d on w  o)");
    }

    #[test]
    fn a_message_is_read_back_from_its_note() {
        let mut message = message(vec![entry("a", 1, "boom \"x\"")]);
        message.parts.push(Part { shard: "s1".into(), queue: "a".into(), key: vec![0, 255], born: 1, upto: 1 });
        let note = serde_json::to_vec(&message).unwrap();
        assert_eq!(serde_json::from_slice::<Message>(&note).unwrap(), message);
    }
}
