//! Several proxies over the same Redis shards.

use super::goflow::Goflow;
use super::servers::{Flavour, Server};
use super::wire::Value;

/// Shards named `s0`, `s1` … and the proxies over them. Proxies stop before their shards do.
pub struct Fleet {
    pub proxies: Vec<Goflow>,
    pub shards: Vec<Server>,
    args: Vec<String>,
}

impl Fleet {
    /// Starts so many of each; the proxies with these arguments too.
    pub fn start(shards: usize, proxies: usize, args: &[&str]) -> Fleet {
        Fleet::start_with(shards, proxies, args, &[])
    }

    pub fn start_with(shards: usize, proxies: usize, args: &[&str], env: &[(&str, &str)]) -> Fleet {
        let shards: Vec<Server> = (0..shards).map(|_| Server::start(Flavour::Redis7, Server::DURABLE)).collect();
        Fleet::over(shards, proxies, args, env)
    }

    /// Over shards that keep their jobs in memory alone.
    pub fn start_plain(shards: usize, proxies: usize, env: &[(&str, &str)]) -> Fleet {
        Fleet::over((0..shards).map(|_| Server::start(Flavour::Redis7, &[])).collect(), proxies, &[], env)
    }

    /// Proxies over servers that stand.
    pub fn over(shards: Vec<Server>, proxies: usize, args: &[&str], env: &[(&str, &str)]) -> Fleet {
        let mut all: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        for (number, shard) in shards.iter().enumerate() {
            all.extend(["--shard".into(), format!("s{number}={}", shard.url())]);
        }
        let mut fleet = Fleet { proxies: Vec::new(), shards, args: all };
        (0..proxies).for_each(|_| fleet.add_proxy(env));
        fleet
    }

    pub fn add_proxy(&mut self, env: &[(&str, &str)]) {
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        self.proxies.push(Goflow::start_with(&args, env));
    }

    /// One shard more, for the proxies that start after.
    pub fn grow(&mut self) {
        let shard = Server::start(Flavour::Redis7, Server::DURABLE);
        self.args.extend(["--shard".into(), format!("s{}={}", self.shards.len(), shard.url())]);
        self.shards.push(shard);
    }

    /// Shards will fail, and the proxies may say so.
    pub fn expect_failures(&mut self) {
        self.proxies.iter_mut().for_each(|proxy| proxy.expect_log("shard"));
    }

    /// What `GOFLOW.SHARDS` of a proxy says of a shard.
    pub fn state(&self, proxy: usize, shard: &str) -> String {
        self.proxies[proxy].wire().say("GOFLOW.SHARDS").field(shard).field("state").text()
    }
}

/// The counts of `GOFLOW.LEN queue PERSHARD`, by the order of the shards' names.
pub fn per_shard(reply: &Value) -> Vec<i64> {
    let mut counts: Vec<(String, i64)> = match reply {
        Value::Array(items) => items.chunks_exact(2).map(|pair| (pair[0].text(), pair[1].integer())).collect(),
        Value::Map(pairs) => pairs.iter().map(|(name, count)| (name.text(), count.integer())).collect(),
        other => panic!("expected a map, got {other:?}"),
    };
    counts.sort();
    counts.into_iter().map(|(_, count)| count).collect()
}
