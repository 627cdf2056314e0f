//! `[[sink]]` and `[[alert]]`: where alerts go, and which there are.
//!
//! A secret is the text itself, or the file (`..._file`) or the variable (`..._env`) that holds it. What is needed for one
//! kind of sink is refused for another, so that a misplaced key is not a sink that never speaks.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use ring::hmac;
use serde::{Deserialize, Serialize};

use super::{ConfigError, Secret, read_secret, within};
use crate::alert::post::Target;
use crate::alert::sink::{Kind, Sink, Template};
use crate::alert::{Alerts, Rule};
use crate::clock::Millis;

/// Most rules and sinks; a group on a shard keeps a mark for each rule and sink together.
const RULES_MAX: usize = 32;
const SINKS_MAX: usize = 32;
const CHANNELS_MAX: usize = crate::shard::OUTBOX_CHANNELS_MAX;
const PAGERDUTY: &str = "https://events.pagerduty.com";

/// `[[sink]]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SinkConfig {
    pub name: String,
    pub kind: SinkKind,
    /// How long one delivery may take.
    #[serde(default = "ten_seconds", deserialize_with = "within::<_, _, 100, 120_000>")]
    pub timeout_ms: Millis,
    /// Where it is; of `pagerduty` the part before `/v2/enqueue`.
    #[serde(default)]
    pub url: Secret,
    #[serde(default)]
    pub url_file: PathBuf,
    #[serde(default)]
    pub url_env: String,
    /// Certificates in PEM that are trusted beside the usual ones.
    #[serde(default)]
    pub ca_file: PathBuf,
    /// `webhook`: what is sent with each message.
    #[serde(default)]
    pub headers: BTreeMap<String, Secret>,
    #[serde(default)]
    pub headers_file: BTreeMap<String, PathBuf>,
    #[serde(default)]
    pub headers_env: BTreeMap<String, String>,
    /// `webhook`: signs each body.
    #[serde(default)]
    pub secret: Secret,
    #[serde(default)]
    pub secret_file: PathBuf,
    #[serde(default)]
    pub secret_env: String,
    /// `webhook`: the body, JSON with places such as `{{summary}}`; none: all there is to say.
    #[serde(default)]
    pub template: String,
    /// `pagerduty`: the integration key of the service.
    #[serde(default)]
    pub routing_key: Secret,
    #[serde(default)]
    pub routing_key_file: PathBuf,
    #[serde(default)]
    pub routing_key_env: String,
    /// `command`: the program and its arguments.
    #[serde(default)]
    pub command: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SinkKind {
    Slack,
    Webhook,
    PagerDuty,
    Command,
    Log,
}

fn ten_seconds() -> Millis {
    10_000
}

/// `[[alert]]`
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AlertConfig {
    pub name: String,
    /// The names of sinks.
    pub sinks: Vec<String>,
    /// Patterns as `KEYS` takes them.
    #[serde(default = "everything")]
    pub queues: Vec<String>,
    #[serde(default = "everything")]
    pub types: Vec<String>,
    /// Whether deaths are told of.
    #[serde(default = "yes")]
    pub deaths: bool,
    #[serde(default = "one_minute", deserialize_with = "within::<_, _, 100, 86_400_000>")]
    pub min_interval_ms: Millis,
    #[serde(default = "ten", deserialize_with = "within::<_, _, 1, 100>")]
    pub digest_groups: usize,
    /// Conditions; each is told of when it begins and when it ends.
    pub deeper_than: Option<u64>,
    pub older_than_ms: Option<Millis>,
    pub failure_rate: Option<f64>,
    #[serde(default = "five_minutes", deserialize_with = "within::<_, _, 1_000, 3_600_000>")]
    pub window_ms: Millis,
    pub shard_down_ms: Option<Millis>,
}

fn everything() -> Vec<String> {
    vec!["*".into()]
}

fn yes() -> bool {
    true
}

fn one_minute() -> Millis {
    60_000
}

fn ten() -> usize {
    10
}

fn five_minutes() -> Millis {
    300_000
}

/// The variables of the environment by their names, for what a `..._env` names.
pub type Environment = HashMap<String, String>;

fn is_plain(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=64).contains(&name.len()) && name.bytes().all(plain)
}

/// Reads the secrets of the sinks and checks both lists.
pub fn check(sinks: &mut [SinkConfig], alerts: &[AlertConfig], environment: &Environment) -> Result<(), ConfigError> {
    if sinks.len() > SINKS_MAX || alerts.len() > RULES_MAX {
        return Err(ConfigError(format!("expected at most {SINKS_MAX} sinks and {RULES_MAX} alerts")));
    }
    let mut names = HashSet::new();
    for sink in sinks {
        let refuse = |why: String| ConfigError(format!("sink {}: {why}", sink.name));
        if !is_plain(&sink.name) || !names.insert(sink.name.clone()) {
            return Err(refuse("its name is another's, or none: expected 1 to 64 bytes of A-Z a-z 0-9 . _ -".into()));
        }
        sink.read_secrets(environment)?;
        sink.build()?;
    }
    let (mut rules, mut channels) = (HashSet::new(), 0);
    for alert in alerts {
        let refuse = |why: &str| Err(ConfigError(format!("alert {}: {why}", alert.name)));
        if !is_plain(&alert.name) || !rules.insert(&alert.name) {
            return refuse("its name is another's, or none: expected 1 to 64 bytes of A-Z a-z 0-9 . _ -");
        }
        let own: HashSet<&String> = alert.sinks.iter().collect();
        if alert.sinks.is_empty() || own.len() < alert.sinks.len() {
            return refuse("sinks names none, or one twice: expected names of [[sink]]");
        }
        if let Some(unknown) = alert.sinks.iter().find(|sink| !names.contains(*sink)) {
            return refuse(&format!("no sink is named '{unknown}'"));
        }
        if alert.queues.is_empty() || alert.types.is_empty() {
            return refuse("queues and types: expected at least one pattern each");
        }
        if alert.failure_rate.is_some_and(|rate| !(0.0..=1.0).contains(&rate)) {
            return refuse("failure_rate: expected 0 to 1");
        }
        channels += alert.sinks.len();
    }
    if channels > CHANNELS_MAX {
        return Err(ConfigError(format!("the alerts name sinks {channels} times: expected at most {CHANNELS_MAX}")));
    }
    Ok(())
}

/// The rules and sinks of lists that were checked.
pub fn alerts(sinks: &[SinkConfig], alerts: &[AlertConfig]) -> Result<Alerts, ConfigError> {
    let place = |name: &String| sinks.iter().position(|sink| sink.name == *name);
    let rule = |alert: &AlertConfig| Rule {
        name: alert.name.clone(),
        queues: alert.queues.clone(),
        kinds: alert.types.clone(),
        sinks: alert.sinks.iter().filter_map(place).collect(),
        interval_ms: alert.min_interval_ms,
        digest_groups: alert.digest_groups,
        deaths: alert.deaths,
        deeper_than: alert.deeper_than,
        older_than_ms: alert.older_than_ms,
        failure_rate: alert.failure_rate,
        window_ms: alert.window_ms,
        shard_down_ms: alert.shard_down_ms,
    };
    let sinks: Result<Vec<Sink>, ConfigError> = sinks.iter().map(SinkConfig::build).collect();
    Ok(Alerts { rules: alerts.iter().map(rule).collect(), sinks: sinks? })
}

/// One of the three ways to give a secret.
fn secret_of(
    what: &str,
    text: &Secret,
    file: &Path,
    variable: &str,
    environment: &Environment,
) -> Result<Secret, ConfigError> {
    let refuse = |why: String| Err(ConfigError(format!("{what}: {why}")));
    let given = [!text.is_empty(), file != Path::new(""), !variable.is_empty()];
    if given.iter().filter(|given| **given).count() > 1 {
        return refuse(format!("is given more than once: expected it, {what}_file or {what}_env"));
    }
    match given {
        [_, true, _] => read_secret(&format!("{what}_file"), file),
        [_, _, true] => match environment.get(variable).filter(|value| !value.is_empty()) {
            Some(value) => Ok(Secret::new(value.trim_end())),
            None => refuse(format!("the variable {variable} is not set")),
        },
        _ => Ok(text.clone()),
    }
}

impl SinkConfig {
    /// Takes the place of files and variables with what they hold.
    fn read_secrets(&mut self, environment: &Environment) -> Result<(), ConfigError> {
        let of = |what: &str| format!("sink {}: {what}", self.name);
        let url = secret_of(&of("url"), &self.url, &self.url_file, &self.url_env, environment)?;
        let secret = secret_of(&of("secret"), &self.secret, &self.secret_file, &self.secret_env, environment)?;
        let (key, file, variable) = (&self.routing_key, &self.routing_key_file, &self.routing_key_env);
        let routing_key = secret_of(&of("routing_key"), key, file, variable, environment)?;
        let mut headers = BTreeMap::new();
        for (name, path) in &self.headers_file {
            headers.insert(name.clone(), read_secret(&of(&format!("headers_file.{name}")), path)?);
        }
        for (name, variable) in &self.headers_env {
            let what = of(&format!("headers_env.{name}"));
            headers.insert(name.clone(), secret_of(&what, &Secret::default(), Path::new(""), variable, environment)?);
        }
        self.headers.extend(headers);
        (self.url, self.secret, self.routing_key) = (url, secret, routing_key);
        (self.url_file, self.secret_file, self.routing_key_file) = Default::default();
        (self.url_env, self.secret_env, self.routing_key_env) = Default::default();
        (self.headers_file, self.headers_env) = Default::default();
        Ok(())
    }

    fn refuse<T>(&self, why: &str) -> Result<T, ConfigError> {
        Err(ConfigError(format!("sink {}: {why}", self.name)))
    }

    fn target(&self, fallback: &str) -> Result<Target, ConfigError> {
        let url = if self.url.is_empty() { fallback } else { self.url.reveal() };
        if url.is_empty() {
            return self.refuse("url is missing: expected url, url_file or url_env");
        }
        let authorities = match self.ca_file == Path::new("") {
            true => None,
            false => match std::fs::read(&self.ca_file) {
                Ok(pem) => Some(pem),
                Err(error) => return self.refuse(&format!("ca_file {}: {error}", self.ca_file.display())),
            },
        };
        Target::parse(url, authorities.as_deref()).or_else(|why| self.refuse(&format!("url: {why}")))
    }

    /// What is set that only another kind has.
    fn misplaced(&self) -> Option<&'static str> {
        let is = |kinds: &[SinkKind]| kinds.contains(&self.kind);
        let http = is(&[SinkKind::Slack, SinkKind::Webhook, SinkKind::PagerDuty]);
        let settings = [
            ("url", !self.url.is_empty(), http),
            ("ca_file", self.ca_file != Path::new(""), http),
            ("headers", !self.headers.is_empty(), is(&[SinkKind::Webhook])),
            ("secret", !self.secret.is_empty(), is(&[SinkKind::Webhook])),
            ("template", !self.template.is_empty(), is(&[SinkKind::Webhook])),
            ("routing_key", !self.routing_key.is_empty(), is(&[SinkKind::PagerDuty])),
            ("command", !self.command.is_empty(), is(&[SinkKind::Command])),
        ];
        settings.into_iter().find(|(_, is_set, fits)| *is_set && !fits).map(|(name, ..)| name)
    }

    fn build(&self) -> Result<Sink, ConfigError> {
        if let Some(misplaced) = self.misplaced() {
            return self.refuse(&format!("{misplaced} is nothing for this kind of sink"));
        }
        let kind = match self.kind {
            SinkKind::Slack => Kind::Slack { target: self.target("")? },
            SinkKind::Webhook => Kind::Webhook {
                target: self.target("")?,
                headers: self.header_map()?,
                key: (!self.secret.is_empty())
                    .then(|| Box::new(hmac::Key::new(hmac::HMAC_SHA256, self.secret.reveal().as_bytes()))),
                template: match self.template.is_empty() {
                    true => None,
                    false => {
                        let parsed = Template::parse(&self.template);
                        Some(parsed.or_else(|why| self.refuse(&format!("template: {why}")))?)
                    }
                },
            },
            SinkKind::PagerDuty if self.routing_key.is_empty() => {
                return self
                    .refuse("routing_key is missing: expected routing_key, routing_key_file or routing_key_env");
            }
            SinkKind::PagerDuty => Kind::PagerDuty {
                target: self.target(PAGERDUTY)?.join("/v2/enqueue"),
                routing_key: self.routing_key.reveal().to_owned(),
            },
            SinkKind::Command => match self.command.split_first() {
                Some((program, args)) => Kind::Command { program: program.clone(), args: args.to_vec() },
                None => return self.refuse("command is missing: expected the program and its arguments"),
            },
            SinkKind::Log => Kind::Log,
        };
        Ok(Sink { name: self.name.clone(), timeout: Duration::from_millis(self.timeout_ms), kind })
    }

    fn header_map(&self) -> Result<HeaderMap, ConfigError> {
        let mut headers = HeaderMap::new();
        for (name, value) in &self.headers {
            let parsed = HeaderName::try_from(name.as_str()).ok().zip(HeaderValue::from_str(value.reveal()).ok());
            let Some((name, mut value)) = parsed else {
                return self.refuse(&format!("headers: '{name}' is no name of a header, or its value none"));
            };
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        Ok(headers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn load(text: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("goflow.toml");
        std::fs::write(&path, text).unwrap();
        let variables = [("MY_KEY", "hush-key"), ("MY_EMPTY", "")].map(|(name, value)| (name.into(), value.into()));
        Config::load(Some(&path), variables, &[]).map_err(|error| error.to_string())
    }

    const SINK: &str = "[[sink]]\nname = 'a'\nkind = 'log'\n";

    #[test]
    fn rules_and_sinks_become_what_the_file_says() {
        let config = load(
            "[[sink]]\nname = 'chat'\nkind = 'slack'\nurl = 'https://hooks.example.com/hush-path'\n\
             [[sink]]\nname = 'pager'\nkind = 'pagerduty'\nrouting_key_env = 'MY_KEY'\n\
             [[alert]]\nname = 'mail'\nsinks = ['pager', 'chat']\nqueues = ['m*']\nolder_than_ms = 7",
        )
        .unwrap();
        let alerts = config.alerts().unwrap();
        assert_eq!((alerts.rules[0].sinks.clone(), alerts.rules[0].older_than_ms), (vec![1, 0], Some(7)));
        assert!(alerts.rules[0].deaths && alerts.rules[0].deeper_than.is_none());
        let shown: Vec<String> = alerts.sinks.iter().map(Sink::shown).collect();
        assert_eq!(shown, ["https://hooks.example.com:443", "https://events.pagerduty.com:443"]);
        assert!(matches!(&alerts.sinks[1].kind, Kind::PagerDuty { routing_key, .. } if routing_key == "hush-key"));
        let seen = format!("{config:?} {}", toml::to_string(&config).unwrap());
        assert!(!seen.contains("hush"), "{seen}");
    }

    #[test]
    fn what_is_wrong_is_refused_with_its_place() {
        let webhook = "[[sink]]\nname = 'w'\nkind = 'webhook'\nurl = 'http://h/hush'\n";
        for (text, why) in [
            ("[[sink]]\nname = 'a b'\nkind = 'log'".to_owned(), "sink a b: its name"),
            (format!("{SINK}{SINK}"), "sink a: its name is another's"),
            (format!("{SINK}url = 'http://h/'"), "sink a: url is nothing for this kind"),
            (format!("{SINK}colour = 'red'"), "unknown field"),
            ("[[sink]]\nname = 'a'\nkind = 'fax'".to_owned(), "unknown variant"),
            ("[[sink]]\nname = 's'\nkind = 'slack'".to_owned(), "sink s: url is missing"),
            ("[[sink]]\nname = 's'\nkind = 'slack'\nurl = 'ftp://hush/'".to_owned(), "sink s: url: expected https://"),
            (
                "[[sink]]\nname = 's'\nkind = 'slack'\nurl_env = 'MY_EMPTY'".to_owned(),
                "the variable MY_EMPTY is not set",
            ),
            ("[[sink]]\nname = 's'\nkind = 'slack'\nurl_file = '/nowhere'".to_owned(), "sink s: url_file /nowhere"),
            (format!("{webhook}url_env = 'MY_KEY'"), "sink w: url: is given more than once"),
            (format!("{webhook}template = '{{{{x}}}}'"), "sink w: template: there is no {{x}}"),
            (format!("{webhook}headers = {{ 'a b' = 'hush' }}"), "sink w: headers: 'a b'"),
            (format!("{webhook}ca_file = '/nowhere'"), "sink w: ca_file /nowhere"),
            (format!("{webhook}timeout_ms = 1"), "expected 100 to 120000"),
            ("[[sink]]\nname = 'p'\nkind = 'pagerduty'".to_owned(), "sink p: routing_key is missing"),
            ("[[sink]]\nname = 'c'\nkind = 'command'".to_owned(), "sink c: command is missing"),
            (format!("{SINK}[[alert]]\nname = 'x'\nsinks = []"), "alert x: sinks names none"),
            (format!("{SINK}[[alert]]\nname = 'x'\nsinks = ['b']"), "alert x: no sink is named 'b'"),
            (format!("{SINK}[[alert]]\nname = 'x'\nsinks = ['a', 'a']"), "or one twice"),
            (format!("{SINK}[[alert]]\nname = 'x'\nsinks = ['a']\nqueues = []"), "at least one pattern"),
            (format!("{SINK}[[alert]]\nname = 'x'\nsinks = ['a']\nfailure_rate = 1.5"), "expected 0 to 1"),
        ] {
            let said = load(&text).unwrap_err();
            assert!(said.contains(why), "{text}\nsays {said}\nnot {why}");
            assert!(!said.contains("hush") || text.contains("ftp"), "a secret is told: {said}");
        }
    }
}
