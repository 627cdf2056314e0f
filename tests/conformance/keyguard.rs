//! A guard over scripts: what they touch must be declared and in one hash slot (law 8).
//!
//! `MONITOR` shows each script call with its `KEYS` and, after it, each command that the script ran. So the scripts are
//! watched as they are, on every server that can monitor, without a word of their text changed.

use std::collections::{BTreeSet, HashMap};

use crate::support::servers::Server;
use crate::support::wire::{Value, Wire};

/// Watches one server from its making on.
pub struct KeyGuard {
    monitor: Wire,
    asker: Wire,
    /// First, last and step of the keys of each command, as the server says; `None`: it must be asked for each call.
    places: HashMap<String, Option<(i64, i64, i64)>>,
}

impl KeyGuard {
    pub fn watch(server: &Server) -> KeyGuard {
        let mut monitor = server.wire();
        assert_eq!(monitor.say("MONITOR"), Value::Simple("OK".into()));
        KeyGuard { monitor, asker: server.wire(), places: HashMap::new() }
    }

    /// Panics if a script touched a key that it did not declare, or declared keys of two slots. Returns how many commands
    /// of scripts it has seen since the last time.
    pub fn check(&mut self) -> usize {
        self.asker.say("ECHO the-guard-has-read-so-far");
        let (mut declared, mut seen) = (BTreeSet::new(), 0);
        loop {
            let line = self.monitor.read_line();
            let args = words(&line);
            let name = args.first().map(|name| String::from_utf8_lossy(name).to_lowercase()).unwrap_or_default();
            if line.contains(" lua] ") {
                seen += 1;
                for key in self.keys(&name, &args) {
                    assert!(
                        declared.contains(&key),
                        "a script touched an undeclared key: {line}\ndeclared: {declared:?}"
                    );
                }
            } else if matches!(name.as_str(), "eval" | "evalsha" | "eval_ro" | "evalsha_ro") {
                let count: usize = String::from_utf8_lossy(&args[2]).parse().unwrap();
                declared = args[3..3 + count].iter().map(|key| String::from_utf8_lossy(key).into_owned()).collect();
                let tags: BTreeSet<_> = declared.iter().map(|key| tag(key)).collect();
                assert!(tags.len() <= 1, "a script declares keys of several slots: {declared:?}");
            } else if name == "echo" && args[1] == b"the-guard-has-read-so-far" {
                return seen;
            }
        }
    }

    fn keys(&mut self, name: &str, args: &[Vec<u8>]) -> Vec<String> {
        let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
        let Some((first, last, step)) = self.places(name) else {
            let ask: Vec<Vec<u8>> =
                [b"COMMAND".to_vec(), b"GETKEYS".to_vec()].into_iter().chain(args.iter().cloned()).collect();
            return self.asker.call(&ask).items().iter().map(Value::text).collect();
        };
        if first == 0 {
            return Vec::new();
        }
        let last = if last < 0 { args.len() as i64 + last } else { last };
        (first..=last).step_by(step.max(1) as usize).map(|place| text(&args[place as usize])).collect()
    }

    fn places(&mut self, name: &str) -> Option<(i64, i64, i64)> {
        let asker = &mut self.asker;
        *self.places.entry(name.to_owned()).or_insert_with(|| {
            let info = asker.say(&format!("COMMAND INFO {name}"));
            let row = info.items()[0].items();
            let is_movable = row[2].items().iter().any(|flag| flag.text() == "movablekeys");
            (!is_movable).then(|| (row[3].integer(), row[4].integer(), row[5].integer()))
        })
    }
}

/// What decides the slot of a key: the part in the first braces, or all of it.
fn tag(key: &str) -> &str {
    let inside = key.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(tag, _)| tag);
    inside.filter(|tag| !tag.is_empty()).unwrap_or(key)
}

/// The quoted words of a line of MONITOR, with their escapes undone.
fn words(line: &str) -> Vec<Vec<u8>> {
    let mut words = Vec::new();
    let mut rest = line.bytes().skip_while(|byte| *byte != b']').peekable();
    while rest.by_ref().any(|byte| byte == b'"') {
        let mut word = Vec::new();
        while let Some(byte) = rest.next().filter(|byte| *byte != b'"') {
            word.push(if byte == b'\\' { unescape(&mut rest) } else { byte });
        }
        words.push(word);
    }
    words
}

fn unescape(rest: &mut impl Iterator<Item = u8>) -> u8 {
    match rest.next() {
        Some(b'x') => {
            let digits: String = rest.take(2).map(char::from).collect();
            u8::from_str_radix(&digits, 16).unwrap()
        }
        Some(b'n') => b'\n',
        Some(b'r') => b'\r',
        Some(b't') => b'\t',
        Some(b'a') => 7,
        Some(b'b') => 8,
        Some(byte) => byte,
        None => panic!("an escape without an end"),
    }
}

/// The guard itself: it must bite.
mod bites {
    use super::*;
    use crate::support::servers::Flavour;

    fn caught(script: &[&str]) -> bool {
        let server = Server::start(Flavour::Redis7, &[]);
        let mut guard = KeyGuard::watch(&server);
        let reply = server.wire().call(script);
        assert!(!matches!(reply, Value::Error(_)), "{reply:?}");
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| assert_eq!(guard.check(), 1))).is_err()
    }

    #[test]
    fn a_script_that_touches_what_it_declares_passes() {
        assert!(!caught(&["EVAL", "return redis.call('set', KEYS[1], 'a\"\\\\\\n\\1]')", "1", "{q}:a"]));
        assert!(!caught(&["EVAL", "return redis.call('del', KEYS[2], KEYS[1])", "2", "{q}:a", "{q}:b"]));
        assert!(!caught(&["EVAL", "return redis.call('publish', 'channel', 'x')", "0"]));
    }

    #[test]
    fn a_script_that_touches_another_key_is_caught() {
        assert!(caught(&["EVAL", "return redis.call('set', '{q}:other', 1)", "1", "{q}:a"]));
        assert!(caught(&["EVAL", "return redis.call('del', KEYS[1], '{q}:b')", "1", "{q}:a"]));
        assert!(caught(&["EVAL", "return redis.call('zunionstore', KEYS[1], 1, '{q}:b')", "1", "{q}:a"]));
    }

    #[test]
    fn a_script_with_keys_of_two_slots_is_caught() {
        assert!(caught(&["EVAL", "return redis.call('del', KEYS[1])", "2", "{q}:a", "{r}:a"]));
    }
}
