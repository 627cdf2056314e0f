//! Where a shard keeps its jobs, as a URL: read into its parts, and shown without user and password.

use std::fmt;
use std::path::PathBuf;

use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize, Serializer};

use super::Secret;

/// Most partitions of a Redis Cluster.
const PARTITIONS_MAX: u16 = 1_024;

/// One server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Host {
    pub host: String,
    pub port: u16,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// What a Redis URL says beside where the servers are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Login {
    pub user: Option<String>,
    pub password: Option<Secret>,
    pub tls: bool,
    pub database: u32,
}

/// Where a shard keeps its jobs.
#[derive(Clone, Debug, PartialEq)]
pub enum ShardUrl {
    /// `embedded:DIR`
    Embedded { dir: PathBuf },
    /// `memory:`
    Memory,
    /// `redis://[user[:password]@]host[:port][/database]`, `rediss://` with TLS.
    Redis { host: Host, login: Login },
    /// `redis+sentinel://[user[:password]@]host[:port],.../service[/database]`
    Sentinel { sentinels: Vec<Host>, service: String, login: Login },
    /// `redis+cluster://[user[:password]@]host[:port],...[?partitions=n]`: many shards on one cluster.
    Cluster { nodes: Vec<Host>, partitions: u16, login: Login },
}

impl ShardUrl {
    pub fn parse(text: &str) -> Result<ShardUrl, String> {
        if text == "memory:" {
            return Ok(ShardUrl::Memory);
        }
        if let Some(dir) = text.strip_prefix("embedded:") {
            return match dir {
                "" => Err("embedded: lacks its directory: expected embedded:DIR".into()),
                dir => Ok(ShardUrl::Embedded { dir: dir.into() }),
            };
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(format!("unknown shard URL: expected {EXPECTED_URLS}"));
        };
        let parts = UrlParts::split(rest)?;
        match scheme {
            "redis" | "rediss" => parts.into_redis(scheme == "rediss"),
            "redis+sentinel" | "rediss+sentinel" => parts.into_sentinel(scheme == "rediss+sentinel"),
            "redis+cluster" | "rediss+cluster" => parts.into_cluster(scheme == "rediss+cluster"),
            _ => Err(format!("unknown scheme of a shard URL: expected {EXPECTED_URLS}")),
        }
    }

    pub fn login(&self) -> Option<&Login> {
        match self {
            ShardUrl::Embedded { .. } | ShardUrl::Memory => None,
            ShardUrl::Redis { login, .. } | ShardUrl::Sentinel { login, .. } | ShardUrl::Cluster { login, .. } => {
                Some(login)
            }
        }
    }

    pub(super) fn login_mut(&mut self) -> Option<&mut Login> {
        match self {
            ShardUrl::Embedded { .. } | ShardUrl::Memory => None,
            ShardUrl::Redis { login, .. } | ShardUrl::Sentinel { login, .. } | ShardUrl::Cluster { login, .. } => {
                Some(login)
            }
        }
    }

    /// The same place, entered as at the other.
    pub fn with_login_of(mut self, other: &ShardUrl) -> ShardUrl {
        if let (Some(own), Some(login)) = (self.login_mut(), other.login()) {
            *own = login.clone();
        }
        self
    }

    /// How many shards it stands for.
    pub fn partitions(&self) -> u16 {
        match self {
            ShardUrl::Cluster { partitions, .. } => *partitions,
            _ => 1,
        }
    }
}

const EXPECTED_URLS: &str = "embedded:DIR, memory:, redis://HOST:PORT, rediss://HOST:PORT, \
     redis+sentinel://HOST:PORT,HOST:PORT/SERVICE or redis+cluster://HOST:PORT,HOST:PORT?partitions=N";

/// The URL without its password.
impl ShardUrl {
    /// The URL with its user and password, percent-encoded, for whoever connects; [`fmt::Display`] leaves them out.
    pub fn with_login(&self) -> String {
        let shown = self.to_string();
        let encode = |text: &str| -> String {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
            text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
        };
        let user = self.login().and_then(|login| login.user.as_deref()).unwrap_or_default();
        match (shown.split_once("://"), self.login().and_then(|login| login.password.as_ref())) {
            (Some((scheme, rest)), Some(password)) => {
                format!("{scheme}://{}:{}@{rest}", encode(user), encode(password.reveal()))
            }
            _ => shown,
        }
    }
}

impl fmt::Display for ShardUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |hosts: &[Host]| hosts.iter().map(Host::to_string).collect::<Vec<_>>().join(",");
        let tls = if self.login().is_some_and(|login| login.tls) { "s" } else { "" };
        let database = match self.login() {
            Some(Login { database, .. }) if *database > 0 => format!("/{database}"),
            _ => String::new(),
        };
        match self {
            ShardUrl::Embedded { dir } => write!(f, "embedded:{}", dir.display()),
            ShardUrl::Memory => f.write_str("memory:"),
            ShardUrl::Redis { host, .. } => write!(f, "redis{tls}://{host}{database}"),
            ShardUrl::Sentinel { sentinels, service, .. } => {
                write!(f, "redis{tls}+sentinel://{}/{service}{database}", list(sentinels))
            }
            ShardUrl::Cluster { nodes, partitions, .. } => {
                write!(f, "redis{tls}+cluster://{}?partitions={partitions}", list(nodes))
            }
        }
    }
}

impl<'de> Deserialize<'de> for ShardUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        ShardUrl::parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

impl Serialize for ShardUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// What follows `://`. Error texts do not repeat it: it may hold a password.
struct UrlParts<'a> {
    login: Login,
    hosts: &'a str,
    path: Vec<&'a str>,
    query: Vec<(&'a str, &'a str)>,
}

impl<'a> UrlParts<'a> {
    fn split(rest: &'a str) -> Result<UrlParts<'a>, String> {
        // A password may hold what else divides a URL, but hosts, path and options hold no '@'.
        let (user, rest) = rest.rsplit_once('@').map_or((None, rest), |(user, rest)| (Some(user), rest));
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (hosts, path) = rest.split_once('/').unwrap_or((rest, ""));
        let mut login = Login::default();
        if let Some(user) = user {
            let (user, password) = user.split_once(':').map_or((user, None), |(user, word)| (user, Some(word)));
            login.user = (!user.is_empty()).then(|| percent_decode(user)).transpose()?;
            login.password = password.map(percent_decode).transpose()?.map(Secret);
        }
        let query = query.split('&').filter(|pair| !pair.is_empty());
        Ok(UrlParts {
            login,
            hosts,
            path: path.split('/').filter(|part| !part.is_empty()).collect(),
            query: query.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).collect(),
        })
    }

    fn hosts(&self, port: u16) -> Result<Vec<Host>, String> {
        self.hosts.split(',').map(|host| parse_host(host, port)).collect()
    }

    fn no_query(&self) -> Result<(), String> {
        match self.query.is_empty() {
            true => Ok(()),
            false => Err("unknown option in the shard URL: expected none".into()),
        }
    }

    fn into_redis(mut self, tls: bool) -> Result<ShardUrl, String> {
        self.no_query()?;
        self.login.tls = tls;
        self.login.database = parse_database(&self.path)?;
        match <[Host; 1]>::try_from(self.hosts(6379)?) {
            Ok([host]) => Ok(ShardUrl::Redis { host, login: self.login }),
            Err(_) => {
                Err("more than one host: expected redis://HOST:PORT, redis+sentinel:// or redis+cluster://".into())
            }
        }
    }

    fn into_sentinel(mut self, tls: bool) -> Result<ShardUrl, String> {
        self.no_query()?;
        let [service, database @ ..] = &self.path[..] else {
            return Err("the service is missing: expected redis+sentinel://HOST:PORT,HOST:PORT/SERVICE".into());
        };
        self.login.tls = tls;
        self.login.database = parse_database(database)?;
        Ok(ShardUrl::Sentinel { sentinels: self.hosts(26379)?, service: percent_decode(service)?, login: self.login })
    }

    fn into_cluster(mut self, tls: bool) -> Result<ShardUrl, String> {
        self.login.tls = tls;
        if !self.path.is_empty() {
            return Err("a cluster has no databases: expected redis+cluster://HOST:PORT,HOST:PORT?partitions=N".into());
        }
        let mut partitions = 16;
        for (option, value) in &self.query {
            if *option != "partitions" {
                return Err("unknown option in the shard URL: expected partitions".into());
            }
            let number = value.parse().ok().filter(|number| (1..=PARTITIONS_MAX).contains(number));
            partitions =
                number.ok_or_else(|| format!("bad partitions in the shard URL: expected 1 to {PARTITIONS_MAX}"))?;
        }
        Ok(ShardUrl::Cluster { nodes: self.hosts(6379)?, partitions, login: self.login })
    }
}

fn parse_host(text: &str, port_default: u16) -> Result<Host, String> {
    let bad = || "bad host in the shard URL: expected HOST or HOST:PORT".to_string();
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or_else(bad)?;
            (host, port.strip_prefix(':').or(port.is_empty().then_some("")).ok_or_else(bad)?)
        }
        None => text.split_once(':').unwrap_or((text, "")),
    };
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:".contains(&byte);
    if host.is_empty() || !host.bytes().all(allowed) {
        return Err(bad());
    }
    let port = match port {
        "" => port_default,
        port => port.parse().ok().filter(|port| *port > 0).ok_or_else(bad)?,
    };
    Ok(Host { host: host.into(), port })
}

fn parse_database(path: &[&str]) -> Result<u32, String> {
    match path {
        [] => Ok(0),
        [number] => number.parse().map_err(|_| "bad database in the shard URL: expected a number".into()),
        _ => Err("the path of the shard URL is too long: expected /DATABASE at its end".into()),
    }
}

fn percent_decode(text: &str) -> Result<String, String> {
    let bad = || "bad percent sign in the shard URL: expected %XX".to_string();
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        if *first != b'%' {
            bytes.push(*first);
            rest = tail;
            continue;
        }
        let digits = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok()).ok_or_else(bad)?;
        bytes.push(u8::from_str_radix(digits, 16).map_err(|_| bad())?);
        rest = &tail[2..];
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shard_urls_are_read_with_all_their_parts() {
        let host = |host: &str, port| Host { host: host.into(), port };
        let redis = ShardUrl::parse("rediss://us%40er:p%3A/w@[::1]:7000/3").unwrap();
        let login = Login { user: Some("us@er".into()), password: Some(Secret::new("p:/w")), tls: true, database: 3 };
        assert_eq!(redis, ShardUrl::Redis { host: host("::1", 7000), login });
        assert_eq!(redis.to_string(), "rediss://[::1]:7000/3");
        let Some(login) = ShardUrl::parse("redis://:pa?ss@a@h/1").unwrap().login().cloned() else { panic!() };
        assert_eq!((login.password, login.database), (Some(Secret::new("pa?ss@a")), 1));
        let text = "redis+sentinel://a:1,b/main/2";
        let login = Login { database: 2, ..Login::default() };
        let sentinels = vec![host("a", 1), host("b", 26379)];
        assert_eq!(ShardUrl::parse(text).unwrap(), ShardUrl::Sentinel { sentinels, service: "main".into(), login });
        let cluster = ShardUrl::parse("redis+cluster://:secret@a,b:1?partitions=4").unwrap();
        assert_eq!((cluster.partitions(), cluster.to_string().contains("secret")), (4, false));
        assert!(!format!("{cluster:?}").contains("secret"));
        for bad in [
            "",
            "redis:",
            "redis://",
            "redis://a,b",
            "redis://a:0",
            "redis://a:x",
            "redis://a/b",
            "redis://a/1/2",
            "redis://a?x=1",
            "redis://%zz@a",
            "redis+sentinel://a",
            "redis+cluster://a/1",
            "redis+cluster://a?partitions=0",
            "redis+cluster://a?partitions=1025",
            "redis+cluster://a?x=1",
            "embedded:",
            "memory:x",
            "http://a",
            "redis://[::1",
            "redis://a b",
        ] {
            assert!(ShardUrl::parse(bad).is_err(), "{bad:?}");
        }
    }
}
