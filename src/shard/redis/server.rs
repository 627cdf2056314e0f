//! What a Redis shard asks the server outside of batches: which queues there are, how it is, and whose it is.

use std::collections::HashMap;

use bytes::Bytes;
use redis::{Cmd, Value};

use super::Redis;
use super::batch::text;
use super::connect::{Failure, judge};
use super::keyed::MAP_CHANGED;
use crate::clock::Millis;
use crate::error::{Code, Error, Result};
use crate::job::Name;
use crate::shard::{Health, Keyed, Stamp};

/// Compares the stamp of the server with ours and writes ours where there is none, or one with an older map. Its own it
/// writes again: so a claim shows that the server takes writes.
///
/// KEYS: stamp. ARGV: the four fields, then ours of each, then the channel and the message for those who watch. Answers what was there before, nil where nothing was.
const CLAIM: &str = "\
local found = redis.call('HMGET', KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4])
local is_ours = found[1] == ARGV[5] and found[2] == ARGV[6]
local theirs, ours = tonumber(found[3]), tonumber(ARGV[7])
if not found[1] or is_ours and (theirs < ours or theirs == ours and found[4] == ARGV[8]) then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[5], ARGV[2], ARGV[6], ARGV[3], ARGV[7], ARGV[4], ARGV[8])
  if found[1] and theirs < ours then redis.call('PUBLISH', ARGV[9], ARGV[10]) end
end
return found";

/// Has no hash tag: it is one for all partitions of a cluster.
const STAMP_KEY: &str = "goflow:stamp";
const STAMP_FIELDS: [&str; 4] = ["deployment", "shard", "map_version", "map"];

/// Gives a role to whoever asks first, and to its holder again.
///
/// KEYS: role. ARGV: holder, milliseconds. Answers 1 when the role is the asker's.
const LEAD: &str = "\
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1";

/// Keeps a note of a role, or removes it where there is no text, if the role is the asker's.
///
/// KEYS: role, its notes. ARGV: holder, name, and the text if there is one. Answers 1 when it was done.
const NOTE: &str = "\
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[3] then redis.call('HSET', KEYS[2], ARGV[2], ARGV[3]) else redis.call('HDEL', KEYS[2], ARGV[2]) end
return 1";

impl Redis {
    async fn ask(&self, command: Cmd) -> Result<Value> {
        let live = self.live().await?;
        match live.ask(command, self.timeouts.answer).await {
            Ok(value) => Ok(value),
            Err(error) => {
                let failure = judge(&self.name, &error);
                if failure.ends_connection() {
                    self.hang_up(&live).await;
                }
                Err(failure.into_error(&self.name))
            }
        }
    }

    pub(super) async fn read_queues(&self) -> Result<Vec<Name>> {
        let mut members = redis::cmd("SMEMBERS");
        members.arg(self.keys.queues());
        let mut names: Vec<Name> =
            texts(self.ask(members).await?).iter().filter_map(|raw| Name::parse(raw).ok()).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Walks the keys of the server; a cluster has no such walk.
    pub(super) async fn read_objects(&self) -> Result<Vec<(Keyed, Name)>> {
        let mut objects = Vec::new();
        let mut cursor = b"0".to_vec();
        while self.keys.partition.is_none() {
            let mut scan = redis::cmd("SCAN");
            scan.arg(&cursor[..]).arg("MATCH").arg("goflow:{!*}:*").arg("COUNT").arg(1_000);
            let Value::Array(parts) = self.ask(scan).await? else { break };
            let mut parts = parts.into_iter();
            let (next, keys) = (parts.next().map(texts), parts.next().map(texts));
            objects.extend(keys.unwrap_or_default().iter().filter_map(|key| read_object(key)));
            match next.and_then(|next| next.into_iter().next()) {
                Some(next) if next != b"0" => cursor = next,
                _ => break,
            }
        }
        objects.sort_unstable();
        objects.dedup();
        Ok(objects)
    }

    /// The name in the stamp: there is one for each server, and for each cluster one for all of its partitions.
    fn stamped_name<'a>(&self, shard: &'a str) -> &'a str {
        match self.keys.partition {
            Some(_) => shard.rsplit_once('/').map_or(shard, |(cluster, _)| cluster),
            None => shard,
        }
    }

    /// The stamp as it stands on the server.
    async fn server_stamp(&self) -> Result<Option<Stamp>> {
        let mut get = redis::cmd("HMGET");
        get.arg(STAMP_KEY).arg(&STAMP_FIELDS);
        Ok(read_stamp(self.ask(get).await?))
    }

    pub(super) async fn read_stamp(&self) -> Result<Option<Stamp>> {
        Ok(self.server_stamp().await?.map(|mut stamp| {
            // The stamp of a cluster is that of this partition too.
            if stamp.shard == self.stamped_name(&self.name) {
                stamp.shard = self.name.to_string();
            }
            stamp
        }))
    }

    pub(super) async fn claim_as(&self, stamp: Stamp) -> Result<()> {
        let own = self.stamped_name(&stamp.shard);
        let mut claim = redis::cmd("EVAL");
        claim.arg(CLAIM).arg(1).arg(STAMP_KEY).arg(&STAMP_FIELDS);
        claim.arg(&stamp.deployment).arg(own).arg(stamp.map_version).arg(&stamp.map);
        claim.arg(self.keys.wake()).arg(MAP_CHANGED);
        let found = match self.ask(claim).await {
            // Nothing can be written, but the stamp can be read: a full server that is ours must be drained.
            Err(error) if error.code == Code::Overloaded => Some(self.server_stamp().await?.ok_or(error)?),
            answer => read_stamp(answer?),
        };
        let Some(found) = found else { return Ok(()) };
        let refuse = |why: String| Err(Error::new(Code::Err, format!("shard {}: {why}", self.name)));
        if found.deployment != stamp.deployment {
            let (theirs, ours) = (found.deployment, stamp.deployment);
            return refuse(format!("the server belongs to the deployment {theirs}, not to {ours}"));
        }
        if found.shard != own {
            return refuse(format!("the server is the shard {} already; one server cannot be two", found.shard));
        }
        let (theirs, ours) = (found.map_version, stamp.map_version);
        if theirs > ours {
            return refuse(format!("the shard map here has version {ours}, the server knows version {theirs}"));
        }
        if theirs == ours && found.map != stamp.map {
            return refuse(format!(
                "two shard maps have version {ours}: here {}, on the server {}; raise the version of the new one",
                stamp.map, found.map
            ));
        }
        Ok(())
    }

    pub(super) async fn ask_for_role(&self, role: &str, holder: &str, for_ms: Millis) -> Result<bool> {
        let mut lead = redis::cmd("EVAL");
        lead.arg(LEAD).arg(1).arg(self.keys.of_shard(role)).arg(holder).arg(for_ms);
        Ok(self.ask(lead).await? == Value::Int(1))
    }

    pub(super) async fn keep_note(&self, role: &str, holder: &str, name: &str, text: Option<Bytes>) -> Result<bool> {
        let mut note = redis::cmd("EVAL");
        note.arg(NOTE).arg(2).arg(self.keys.of_shard(role)).arg(self.keys.notes(role));
        note.arg(holder).arg(name);
        if let Some(text) = text {
            note.arg(&text[..]);
        }
        Ok(self.ask(note).await? == Value::Int(1))
    }

    pub(super) async fn read_notes(&self, role: &str) -> Result<Vec<(String, Bytes)>> {
        let mut all = redis::cmd("HGETALL");
        all.arg(self.keys.notes(role));
        let fields = match self.ask(all).await? {
            Value::Map(pairs) => pairs,
            Value::Array(flat) => {
                let mut flat = flat.into_iter();
                std::iter::from_fn(|| flat.next().zip(flat.next())).collect()
            }
            _ => Vec::new(),
        };
        let mut notes: Vec<(String, Bytes)> =
            fields.into_iter().filter_map(|(name, note)| Some((note_name(name)?, text(note)?))).collect();
        notes.sort_unstable();
        Ok(notes)
    }

    pub(super) async fn read_health(&self) -> Result<Health> {
        let text = self.ask_text(redis::cmd("INFO")).await?;
        let mut settings = HashMap::new();
        for name in ["appendfsync", "save", "min-replicas-to-write"] {
            let mut get = redis::cmd("CONFIG");
            get.arg("GET").arg(name);
            // Hosted servers refuse CONFIG; what is not known is not warned of.
            if let Ok(value) = self.ask(get).await
                && let [_, value] = &texts(value)[..]
            {
                settings.insert(name, String::from_utf8_lossy(value).into_owned());
            }
        }
        Ok(judge_health(&parse_info(&text), &settings))
    }

    /// Of a cluster, the text of one of its nodes.
    async fn ask_text(&self, command: Cmd) -> Result<String> {
        let value = match self.ask(command).await? {
            Value::Map(nodes) => nodes.into_iter().next().map(|(_, text)| text),
            Value::Array(nodes) if matches!(nodes.first(), Some(Value::Array(_))) => match nodes.into_iter().next() {
                Some(Value::Array(pair)) => pair.into_iter().nth(1),
                _ => None,
            },
            value => Some(value),
        };
        match value {
            Some(Value::BulkString(text)) => Ok(String::from_utf8_lossy(&text).into_owned()),
            Some(Value::VerbatimString { text, .. }) => Ok(text),
            _ => Err(Failure::unreadable(&self.name).into_error(&self.name)),
        }
    }
}

fn note_name(value: Value) -> Option<String> {
    String::from_utf8(text(value)?.to_vec()).ok()
}

/// The lock or semaphore of a key, which begins as [`Keys::of_objects`](super::Keys::of_objects) says.
fn read_object(key: &[u8]) -> Option<(Keyed, Name)> {
    let inner = key.strip_prefix(b"goflow:{!")?;
    let (kind, name) = match (inner.strip_prefix(b"lock}:"), inner.strip_prefix(b"sem}:")) {
        (Some(name), _) => (Keyed::Lock, name),
        (_, Some(name)) => (Keyed::Semaphore, name),
        _ => return None,
    };
    Some((kind, Name::parse(name).ok()?))
}

/// A stamp from its four fields; `None` where they are not there.
fn read_stamp(value: Value) -> Option<Stamp> {
    let mut fields = texts(value).into_iter().map(|raw| String::from_utf8_lossy(&raw).into_owned());
    let (deployment, shard, version) = (fields.next()?, fields.next()?, fields.next()?);
    Some(Stamp { deployment, shard, map_version: version.parse().ok()?, map: fields.next()? })
}

/// The texts of a flat answer, whatever its shape.
fn texts(value: Value) -> Vec<Vec<u8>> {
    match value {
        Value::BulkString(text) => vec![text],
        Value::SimpleString(text) => vec![text.into_bytes()],
        Value::Array(values) | Value::Set(values) => values.into_iter().flat_map(texts).collect(),
        Value::Map(pairs) => match pairs.into_iter().next() {
            // Of the nodes of a cluster each answers; one stands for all.
            Some((_, inner @ (Value::Array(_) | Value::Map(_)))) => texts(inner),
            Some((name, value)) => [texts(name), texts(value)].concat(),
            None => Vec::new(),
        },
        _ => Vec::new(),
    }
}

fn parse_info(text: &str) -> HashMap<&str, &str> {
    text.lines().filter_map(|line| line.trim_end().split_once(':')).collect()
}

fn judge_health(info: &HashMap<&str, &str>, settings: &HashMap<&str, String>) -> Health {
    let field = |name: &str| info.get(name).copied().unwrap_or_default();
    let setting = |name: &str| settings.get(name).map(String::as_str);
    let server = match (field("dragonfly_version"), field("valkey_version")) {
        ("", "") => format!("redis {}", field("redis_version")),
        ("", version) => format!("valkey {version}"),
        (version, _) => format!("dragonfly {}", version.trim_start_matches("df-").trim_start_matches('v')),
    };
    let mut warnings = Vec::new();
    let durability = match (field("aof_enabled"), setting("appendfsync"), setting("save")) {
        ("1", Some("always"), _) => "appendonly, synced before every answer".to_owned(),
        ("1", Some("everysec"), _) => {
            "appendonly, synced every second: a power loss may cost the last second".to_owned()
        }
        ("1", Some("no"), _) => {
            "appendonly, synced when the system likes: a power loss may cost the last half minute".to_owned()
        }
        ("1", _, _) => "appendonly".to_owned(),
        (_, _, Some("")) => {
            warnings.push("Nothing is written to disk: a restart loses every job; set appendonly yes.".to_owned());
            "memory only".to_owned()
        }
        _ => {
            warnings.push(
                "Only snapshots are written to disk: a crash loses the jobs since the last; set appendonly yes."
                    .to_owned(),
            );
            "snapshots only".to_owned()
        }
    };
    match field("maxmemory_policy") {
        "" | "noeviction" => {}
        // Dragonfly evicts in cache mode only.
        _ if server.starts_with("dragonfly") && field("cache_mode") != "cache" => {}
        policy => warnings
            .push(format!("maxmemory-policy is {policy}: jobs are evicted when memory is short; set noeviction.")),
    }
    if field("role") == "slave" {
        warnings.push("The server is a replica: it takes no writes.".to_owned());
    }
    let replicas: u64 = field("connected_slaves").parse().unwrap_or(0);
    if replicas > 0 && setting("min-replicas-to-write") == Some("0") {
        warnings.push(
            "Replicas follow late: a fail-over may lose acknowledged jobs; set min-replicas-to-write 1.".to_owned(),
        );
    }
    Health { server, durability, warnings }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health(info: &str, settings: &[(&'static str, &str)]) -> Health {
        judge_health(&parse_info(info), &settings.iter().map(|(name, value)| (*name, (*value).to_owned())).collect())
    }

    #[test]
    fn a_safe_server_has_no_warnings() {
        let safe = health(
            "redis_version:7.0.15\r\naof_enabled:1\r\nmaxmemory_policy:noeviction\r\nrole:master\r\nconnected_slaves:0\r\n",
            &[("appendfsync", "always"), ("save", ""), ("min-replicas-to-write", "0")],
        );
        assert_eq!((safe.server.as_str(), &safe.warnings[..]), ("redis 7.0.15", &[][..]));
        assert!(safe.durability.contains("before every answer"));
    }

    #[test]
    fn what_may_lose_jobs_is_said() {
        let info = "valkey_version:9.1.2\nredis_version:7.2.4\naof_enabled:0\nmaxmemory_policy:allkeys-lru\nconnected_slaves:1";
        let unsafe_one = health(info, &[("save", ""), ("min-replicas-to-write", "0")]);
        assert_eq!((unsafe_one.server.as_str(), unsafe_one.warnings.len()), ("valkey 9.1.2", 3));
        assert!(unsafe_one.warnings.iter().all(|warning| warning.ends_with('.')));
    }

    #[test]
    fn dragonfly_is_told_from_redis() {
        assert_eq!(health("redis_version:7.4.0\ndragonfly_version:df-v1.30.0", &[]).server, "dragonfly 1.30.0");
    }
}
