//! `[[webhook]]`: paths of the HTTP port whose deliveries become jobs.
//!
//! A scheme's name stands for where the signature is and what is signed; with `hmac` the settings say it themselves. What is
//! wrong is refused with the webhook named by its path. Secrets come from the file, from a file of their own or from a variable
//! of their own, one a line, and any of them may have signed.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use hyper::header::HeaderName;
use serde::{Deserialize, Serialize};

use super::{Config, ConfigError, Secret, read_secret, within};
use crate::clock::Millis;
use crate::http::webhook::{Encoding, Hook, Layout, Part, Place, Scheme, key};
use crate::job::Name;

/// Secrets that may have signed one delivery.
const SECRETS_MAX: usize = 8;
/// Headers that become metadata.
const HEADERS_MAX: usize = 32;
/// What the HTTP port serves itself.
const OWN_PATHS: [&str; 4] = ["/", "/metrics", "/healthz", "/readyz"];

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WebhookConfig {
    pub path: String,
    pub queue: String,
    pub scheme: SchemeName,
    /// The secret, or where it is; several, one a line, while it is changed.
    #[serde(default)]
    pub secret: Secret,
    #[serde(default)]
    pub secret_file: PathBuf,
    /// The name of a variable, which does not begin with `GOFLOW_`.
    #[serde(default)]
    pub secret_env: String,
    /// How far a signed time may be from ours.
    #[serde(default = "five_minutes", deserialize_with = "within::<_, _, 1, 86_400_000>")]
    pub tolerance_ms: Millis,
    #[serde(default = "one_mib", deserialize_with = "within::<_, _, 1, 536_870_912>")]
    pub body_bytes_max: usize,
    /// `header:NAME`, `json:FIELD` or `none`: what becomes the job's id, so that a delivery that is sent again adds nothing.
    #[serde(default)]
    pub id_from: Option<String>,
    /// The same for the job's type.
    #[serde(default)]
    pub type_from: Option<String>,
    /// Headers that become metadata of the job.
    #[serde(default)]
    pub headers: Vec<String>,
    /// Where the signature stands, if not where the scheme has it.
    #[serde(default)]
    pub signature_header: Option<String>,
    /// The rest is for the scheme `hmac`. What stands before the signature.
    #[serde(default)]
    pub signature_prefix: Option<String>,
    #[serde(default)]
    pub signature_encoding: Option<EncodingName>,
    /// Where the time stands, in seconds since 1970.
    #[serde(default)]
    pub timestamp_header: Option<String>,
    /// What is signed: text with `{timestamp}`, `{id}` and `{body}`.
    #[serde(default)]
    pub signed: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SchemeName {
    Stripe,
    Github,
    Hmac,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EncodingName {
    Hex,
    Base64,
}

fn five_minutes() -> Millis {
    300_000
}

fn one_mib() -> usize {
    1 << 20
}

/// Fetches what files and variables hold.
pub fn read_secrets(webhooks: &mut [WebhookConfig], variables: &[(String, String)]) -> Result<(), ConfigError> {
    for webhook in webhooks {
        let wrong = |why: String| ConfigError(format!("webhook {}: {why}", webhook.path));
        let given = [!webhook.secret.is_empty(), webhook.secret_file != Path::new(""), !webhook.secret_env.is_empty()];
        if given.iter().filter(|given| **given).count() != 1 {
            return Err(wrong("expected one of secret, secret_file and secret_env".into()));
        }
        if webhook.secret_file != Path::new("") {
            let what = format!("webhook {}: secret_file", webhook.path);
            webhook.secret = read_secret(&what, &webhook.secret_file)?;
            webhook.secret_file = PathBuf::new();
        }
        if !webhook.secret_env.is_empty() {
            let name = std::mem::take(&mut webhook.secret_env);
            if name.starts_with("GOFLOW_") {
                return Err(wrong(format!("secret_env {name}: expected a name that does not begin with GOFLOW_")));
            }
            match variables.iter().find(|(variable, value)| *variable == name && !value.is_empty()) {
                Some((_, value)) => webhook.secret = Secret::new(value.as_str()),
                None => return Err(wrong(format!("secret_env {name}: there is no such variable, or it is empty"))),
            }
        }
    }
    Ok(())
}

impl Config {
    /// The webhooks, checked as a whole.
    pub fn hooks(&self) -> Result<Vec<Hook>, ConfigError> {
        let mut paths = HashSet::new();
        let hooks = self.webhook.iter().map(|webhook| {
            let wrong = |why: String| ConfigError(format!("webhook {}: {why}", webhook.path));
            if !paths.insert(&webhook.path) {
                return Err(wrong("another has the same path".into()));
            }
            if self.http.0.is_none() {
                return Err(wrong("http is off: expected an address that serves it".into()));
            }
            if webhook.body_bytes_max > self.limits.payload_bytes_max {
                let (most, limit) = (webhook.body_bytes_max, self.limits.payload_bytes_max);
                return Err(wrong(format!(
                    "body_bytes_max is {most}: expected at most limits.payload_bytes_max, which is {limit}"
                )));
            }
            webhook.hook().map_err(wrong)
        });
        hooks.collect()
    }
}

impl WebhookConfig {
    fn hook(&self) -> Result<Hook, String> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte);
        let is_path = self.path.starts_with('/') && self.path.bytes().all(plain) && self.path.len() <= 128;
        if !is_path || OWN_PATHS.contains(&self.path.as_str()) || self.path.starts_with("/v1/") {
            let own = "not /metrics, /healthz, /readyz or below /v1/";
            return Err(format!("bad path: expected / and up to 127 bytes of A-Z a-z 0-9 / - . _ ~, {own}"));
        }
        if self.headers.len() > HEADERS_MAX {
            return Err(format!("{} headers: expected at most {HEADERS_MAX}", self.headers.len()));
        }
        let secrets: Vec<&str> = self.secret.reveal().lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        if secrets.is_empty() || secrets.len() > SECRETS_MAX {
            return Err(format!("{} secrets: expected 1 to {SECRETS_MAX}, one a line", secrets.len()));
        }
        let (id, kind) = match self.scheme {
            SchemeName::Stripe => ("json:id", "json:type"),
            SchemeName::Github => ("header:X-GitHub-Delivery", "header:X-GitHub-Event"),
            SchemeName::Hmac => ("none", "none"),
        };
        let id = place("id_from", self.id_from.as_deref().unwrap_or(id))?;
        let scheme = self.scheme(&id)?;
        // GitHub signs no header at all, and its deliveries have their id nowhere else.
        let signs_id = scheme.signed.contains(&Part::Id) || self.scheme == SchemeName::Github;
        if matches!(id, Some(Place::Header(_))) && !signs_id {
            return Err(
                "id_from is a header that is not signed, so that who overhears a delivery could send it again under \
                        another id: expected {id} in signed (scheme hmac), json:FIELD or none"
                    .into(),
            );
        }
        Ok(Hook {
            path: self.path.clone(),
            queue: Name::parse(self.queue.as_bytes()).map_err(|error| format!("queue: {}", error.text))?,
            scheme,
            keys: secrets.into_iter().map(key).collect(),
            tolerance_ms: self.tolerance_ms,
            body_bytes_max: self.body_bytes_max,
            id,
            kind: place("type_from", self.type_from.as_deref().unwrap_or(kind))?,
            headers: self.headers.iter().map(|name| header("headers", name)).collect::<Result<_, _>>()?,
        })
    }

    fn scheme(&self, id: &Option<Place>) -> Result<Scheme, String> {
        if self.scheme != SchemeName::Hmac {
            let given = [
                ("signature_prefix", self.signature_prefix.is_some()),
                ("signature_encoding", self.signature_encoding.is_some()),
                ("timestamp_header", self.timestamp_header.is_some()),
                ("signed", self.signed.is_some()),
            ];
            if let Some((setting, _)) = given.iter().find(|(_, given)| *given) {
                return Err(format!("{setting}: expected only with scheme hmac"));
            }
        }
        let name = |default: &str| header("signature_header", self.signature_header.as_deref().unwrap_or(default));
        match self.scheme {
            SchemeName::Stripe => {
                let signed = vec![Part::Timestamp, Part::Text(".".into()), Part::Body];
                Ok(Scheme { header: name("Stripe-Signature")?, layout: Layout::Stripe, signed })
            }
            SchemeName::Github => {
                let layout = Layout::Plain { prefix: "sha256=".into(), encoding: Encoding::Hex, timestamp: None };
                Ok(Scheme { header: name("X-Hub-Signature-256")?, layout, signed: vec![Part::Body] })
            }
            SchemeName::Hmac => {
                let timestamp = self.timestamp_header.as_deref().map(|name| header("timestamp_header", name));
                let timestamp = timestamp.transpose()?;
                let default = if timestamp.is_some() { "{timestamp}.{body}" } else { "{body}" };
                let signed = template(self.signed.as_deref().unwrap_or(default))?;
                if signed.contains(&Part::Timestamp) != timestamp.is_some() {
                    return Err("expected both timestamp_header and {timestamp} in signed, or neither".into());
                }
                if signed.contains(&Part::Id) && !matches!(id, Some(Place::Header(_))) {
                    return Err("{id} in signed: expected id_from = \"header:NAME\" with it".into());
                }
                let encoding = match self.signature_encoding {
                    Some(EncodingName::Base64) => Encoding::Base64,
                    Some(EncodingName::Hex) | None => Encoding::Hex,
                };
                let prefix = self.signature_prefix.clone().unwrap_or_default();
                Ok(Scheme {
                    header: name("X-Signature")?,
                    layout: Layout::Plain { prefix, encoding, timestamp },
                    signed,
                })
            }
        }
    }
}

fn header(setting: &str, name: &str) -> Result<HeaderName, String> {
    HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("{setting} '{name}': expected the name of a header"))
}

fn place(setting: &str, text: &str) -> Result<Option<Place>, String> {
    match text.split_once(':') {
        Some(("header", name)) => Ok(Some(Place::Header(header(setting, name)?))),
        Some(("json", field)) if !field.is_empty() => Ok(Some(Place::Field(field.into()))),
        None if text == "none" => Ok(None),
        _ => Err(format!("{setting} '{text}': expected header:NAME, json:FIELD or none")),
    }
}

/// The parts of what is signed.
fn template(text: &str) -> Result<Vec<Part>, String> {
    let mut parts = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (plain, behind) = rest.split_once('{').unwrap_or((rest, ""));
        if !plain.is_empty() {
            parts.push(Part::Text(plain.into()));
        }
        if plain.len() == rest.len() {
            break;
        }
        let (word, behind) = behind.split_once('}').unwrap_or((behind, ""));
        parts.push(match word {
            "timestamp" => Part::Timestamp,
            "id" => Part::Id,
            "body" => Part::Body,
            _ => return Err(format!("signed '{text}': expected text with {{timestamp}}, {{id}} and {{body}}")),
        });
        rest = behind;
    }
    match parts.iter().filter(|part| **part == Part::Body).count() {
        1 => Ok(parts),
        _ => Err(format!("signed '{text}': expected {{body}} in it, once")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str, variables: &[(&str, &str)]) -> Result<Vec<Hook>, String> {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("goflow.toml");
        std::fs::write(&file, text).unwrap();
        let variables = variables.iter().map(|(name, value)| (name.to_string(), value.to_string()));
        let config = Config::load(Some(&file), variables, &[]).map_err(|error| error.to_string())?;
        assert!(!format!("{config:?}").contains("hush") && !toml::to_string(&config).unwrap().contains("hush"));
        Ok(config.hooks().unwrap())
    }

    fn one(rest: &str) -> Result<Hook, String> {
        load(&format!("[[webhook]]\npath = '/hooks/a'\nqueue = 'main'\n{rest}"), &[]).map(|mut hooks| hooks.remove(0))
    }

    #[test]
    fn a_schemes_name_says_where_everything_stands() {
        let github = one("scheme = 'github'\nsecret = 'hush'").unwrap();
        assert_eq!(github.scheme.header, "x-hub-signature-256");
        assert_eq!(github.id, Some(Place::Header(HeaderName::from_static("x-github-delivery"))));
        assert_eq!((github.tolerance_ms, github.body_bytes_max), (300_000, 1 << 20));
        let stripe = one("scheme = 'stripe'\nsecret = \"hush\\nhush-2\"\ntype_from = 'none'").unwrap();
        assert_eq!((stripe.keys.len(), &stripe.kind), (2, &None));
        assert_eq!(stripe.id, Some(Place::Field("id".into())));
        let own = one("scheme = 'hmac'\nsecret = 'hush'\nid_from = 'header:X-Id'\ntimestamp_header = 'X-At'\n\
                       signed = 'v0:{id}:{timestamp}:{body}'\nsignature_encoding = 'base64'\nsignature_prefix = 'v1,'");
        let expected = [
            Part::Text("v0:".into()),
            Part::Id,
            Part::Text(":".into()),
            Part::Timestamp,
            Part::Text(":".into()),
            Part::Body,
        ];
        assert_eq!(own.unwrap().scheme.signed, expected);
        assert_eq!(one("scheme = 'hmac'\nsecret = 'hush'").unwrap().scheme.signed, [Part::Body]);
        assert!(one("scheme = 'hmac'\nsecret = 'hush'\nid_from = 'json:id'").is_ok());
    }

    #[test]
    fn secrets_come_from_one_place() {
        let text = "[[webhook]]\npath = '/a'\nqueue = 'q'\nscheme = 'github'\n";
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("secret");
        std::fs::write(&file, "hush-old\nhush-new\n").unwrap();
        let hooks = load(&format!("{text}secret_file = '{}'", file.display()), &[]).unwrap();
        assert_eq!(hooks[0].keys.len(), 2);
        let from_variable = format!("{text}secret_env = 'GITHUB_SECRET'");
        assert!(load(&from_variable, &[("GITHUB_SECRET", "hush")]).is_ok());
        for (text, named) in [
            (from_variable, "GITHUB_SECRET"),
            (format!("{text}secret_env = 'GOFLOW_X'"), "begin with GOFLOW_"),
            (format!("{text}secret_file = '/nowhere'"), "/nowhere"),
            (format!("{text}secret_file = '/dev/null'"), "empty"),
            (format!("{text}secret = ' '"), "0 secrets"),
            (text.to_owned(), "expected one of secret"),
            (format!("{text}secret = 'a'\nsecret_env = 'B'"), "expected one of secret"),
        ] {
            let error = load(&text, &[]).unwrap_err();
            assert!(error.contains(named) && error.contains("/a"), "{text}: {error}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let github = "scheme = 'github'\nsecret = 'hush'\n";
        let hmac = "scheme = 'hmac'\nsecret = 'hush'\n";
        for (text, named) in [
            ("scheme = 'gitlab'".to_owned(), "gitlab"),
            (format!("{github}colour = 1"), "colour"),
            (format!("{github}signed = '{{body}}'"), "signed: expected only with scheme hmac"),
            (format!("{github}id_from = 'cookie:x'"), "id_from 'cookie:x'"),
            (format!("{github}headers = ['a b']"), "headers 'a b'"),
            (format!("{github}tolerance_ms = 0"), "expected 1 to 86400000"),
            (format!("{github}body_bytes_max = 100_000_000"), "payload_bytes_max"),
            (format!("{hmac}signed = 'x'"), "{body}"),
            (format!("{hmac}signed = '{{body}}{{body}}'"), "once"),
            (format!("{hmac}signed = '{{body}} {{'"), "expected text with"),
            (format!("{hmac}signed = '{{timestamp}}{{body}}'"), "timestamp_header"),
            (format!("{hmac}timestamp_header = 'X-At'\nsigned = '{{body}}'"), "timestamp_header"),
            (format!("{hmac}signed = '{{id}}{{body}}'\nid_from = 'json:id'"), "header:NAME"),
            (format!("{hmac}id_from = 'header:X-Id'"), "{id} in signed"),
            (format!("{hmac}id_from = 'header:X-Id'\ntimestamp_header = 'X-At'"), "{id} in signed"),
            ("scheme = 'stripe'\nsecret = 'hush'\nid_from = 'header:X-Id'".into(), "json:FIELD"),
        ] {
            let error = one(&text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
        for path in ["", "a", "/v1/a", "/metrics", "/", "/a b", "/a?b"] {
            let text = format!("[[webhook]]\npath = '{path}'\nqueue = 'q'\n{github}");
            assert!(load(&text, &[]).unwrap_err().contains("bad path"), "{path}");
        }
        let twice = format!("[[webhook]]\npath = '/a'\nqueue = 'q'\n{github}").repeat(2);
        assert!(load(&twice, &[]).unwrap_err().contains("the same path"));
        assert!(load(&twice.replacen("queue = 'q'", "queue = 'a b'", 1), &[]).unwrap_err().contains("queue"));
        let off = format!("http = 'off'\n[[webhook]]\npath = '/a'\nqueue = 'q'\n{github}");
        assert!(load(&off, &[]).unwrap_err().contains("http is off"));
    }
}
