//! How a configuration is read and merged: the file, the variables over it, the flags over both.
//!
//! What is refused here is named by where it came from, and never shown where it may be a secret.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};

use super::{Config, Secret, webhook};
use crate::job::is_shard_name;

/// The variables of lists: their name and the setting that they replace as a whole.
const LISTS: [(&str, &str); 2] = [("GOFLOW_SHARDS", "shard"), ("GOFLOW_AUTH_USER_FILES", "auth.user")];
/// Names the file where no `--config` does.
const FILE_VARIABLE: &str = "GOFLOW_CONFIG";

/// Why a configuration is refused; names the place.
#[derive(Debug, PartialEq, Eq)]
pub struct ConfigError(pub(super) String);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

/// One setting that a flag makes: the flag as it is written, the setting, and the value in words.
pub struct Override<'a> {
    pub flag: &'static str,
    pub setting: &'static str,
    pub value: &'a str,
}

impl Config {
    /// Loads the file (that of `GOFLOW_CONFIG` where `file` is `None`), the variables over it, the overrides over both.
    pub fn load(
        file: Option<&Path>,
        variables: impl IntoIterator<Item = (String, String)>,
        overrides: &[Override<'_>],
    ) -> Result<Config, ConfigError> {
        let (mut variables, others): (Vec<_>, Vec<_>) =
            variables.into_iter().partition(|(name, _)| name.starts_with("GOFLOW_"));
        variables.retain(|(name, _)| !is_kubernetes_link(name));
        variables.sort();
        let named = variables.iter().find(|(name, _)| name == FILE_VARIABLE).map(|(_, path)| PathBuf::from(path));
        let mut table = match file.map(Path::to_path_buf).or(named) {
            Some(path) => read_file(&path)?,
            None => Table::new(),
        };
        let settings = settings();
        for (name, value) in variables.iter().filter(|(name, _)| name != FILE_VARIABLE) {
            let setting = settings.iter().find(|setting| setting.variable == *name);
            let setting = setting.ok_or_else(|| ConfigError(format!("{name}: there is no such setting")))?;
            put(&mut table, name, setting, value)?;
        }
        // A repeated flag makes one list.
        let shards: Vec<&str> = overrides.iter().filter(|o| o.setting == "shard").map(|o| o.value).collect();
        for Override { flag, setting, value } in overrides {
            let setting = settings.iter().find(|known| known.path == *setting);
            let setting = setting.ok_or_else(|| ConfigError(format!("{flag}: there is no such setting")))?;
            match setting.path.as_str() {
                "shard" => put(&mut table, flag, setting, &shards.join(","))?,
                _ => put(&mut table, flag, setting, value)?,
            }
        }
        let mut config = Config::deserialize(table).map_err(|error| ConfigError(told(&error)))?;
        webhook::read_secrets(&mut config.webhook, &others)?;
        config.checked(&others.into_iter().collect())
    }
}

/// A setting that has a variable: its path, and its default, which says what kind of value it takes.
struct Setting {
    path: String,
    variable: String,
    default: Value,
}

/// Every setting, as the defaults of [`Config`] have them.
fn settings() -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut tables = vec![(String::new(), Table::try_from(Config::default()).unwrap_or_default())];
    while let Some((prefix, table)) = tables.pop() {
        for (key, default) in table {
            let path = format!("{prefix}{key}");
            match default {
                Value::Table(table) => tables.push((format!("{path}."), table)),
                Value::Array(_) => {
                    if let Some((variable, _)) = LISTS.iter().find(|(_, list)| *list == path) {
                        settings.push(Setting { variable: variable.to_string(), path, default });
                    }
                }
                default => {
                    let variable = format!("GOFLOW_{}", path.replace('.', "_").to_ascii_uppercase());
                    settings.push(Setting { path, variable, default });
                }
            }
        }
    }
    settings
}

/// Sets one setting from words. `origin` is the variable or flag that gave it.
fn put(table: &mut Table, origin: &str, setting: &Setting, text: &str) -> Result<(), ConfigError> {
    let wrong = |why: &dyn fmt::Display| ConfigError(format!("{origin}: {why}"));
    let number = || text.replace('_', "");
    let value = match &setting.default {
        Value::Integer(_) => {
            number().parse().map(Value::Integer).map_err(|_| wrong(&format!("'{text}': expected a whole number")))?
        }
        Value::Float(_) => {
            number().parse().map(Value::Float).map_err(|_| wrong(&format!("'{text}': expected a number")))?
        }
        Value::Boolean(_) => {
            text.parse().map(Value::Boolean).map_err(|_| wrong(&format!("'{text}': expected true or false")))?
        }
        Value::Array(_) if setting.path == "shard" => shards_of(text).map_err(|why| wrong(&why))?,
        Value::Array(_) => user_files_of(text).map_err(|why| wrong(&why))?,
        _ => Value::String(text.into()),
    };
    // Tried alone first, so that what is wrong with the value is said of this variable or flag.
    let mut alone = Table::new();
    put_at(&mut alone, &setting.path, value.clone());
    Config::deserialize(alone).map_err(|error| wrong(&told(&error)))?;
    put_at(table, &setting.path, value);
    Ok(())
}

fn put_at(table: &mut Table, path: &str, value: Value) {
    match path.split_once('.') {
        None => {
            table.insert(path.into(), value);
        }
        Some((section, rest)) => {
            let section = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
            if let Value::Table(section) = section {
                put_at(section, rest, value);
            }
        }
    }
}

/// `NAME=URL,NAME*WEIGHT=URL,...`. A comma divides only where `NAME=` follows: URLs of Sentinel and Cluster hold commas.
fn shards_of(text: &str) -> Result<Value, String> {
    let mut shards: Vec<(&str, String)> = Vec::new();
    for part in text.split(',') {
        let named = part.split_once('=').filter(|(name, _)| {
            let (name, weight) = name.trim().split_once('*').unwrap_or((name.trim(), "1"));
            is_shard_name(name) && weight.bytes().all(|byte| byte.is_ascii_digit())
        });
        match (named, shards.last_mut()) {
            (Some((name, url)), _) => shards.push((name.trim(), url.trim().into())),
            (None, Some((_, url))) => {
                url.push(',');
                url.push_str(part.trim());
            }
            (None, None) => return Err("expected NAME=URL or NAME*WEIGHT=URL, NAME of A-Z a-z 0-9 . _ / -".into()),
        }
    }
    let tables = shards.into_iter().map(|(name, url)| {
        let (name, weight) = name.split_once('*').unwrap_or((name, "1"));
        let weight = weight.parse().map_err(|_| format!("weight '{weight}': expected 1 to 1000"))?;
        Ok(Value::Table(Table::from_iter([
            ("name".to_string(), Value::from(name)),
            ("url".to_string(), Value::from(url)),
            ("weight".to_string(), Value::Integer(weight)),
        ])))
    });
    tables.collect::<Result<_, String>>().map(Value::Array)
}

/// `NAME=FILE,...`
fn user_files_of(text: &str) -> Result<Value, String> {
    let users = text.split(',').map(|part| {
        let (name, file) = part.split_once('=').ok_or("expected NAME=FILE,NAME=FILE")?;
        Ok(Value::Table(Table::from_iter([
            ("name".to_string(), Value::from(name.trim())),
            ("password_file".to_string(), Value::from(file.trim())),
        ])))
    });
    users.collect::<Result<_, String>>().map(Value::Array)
}

/// Kubernetes tells every pod of the services beside it, in variables that begin with the service's name.
fn is_kubernetes_link(name: &str) -> bool {
    let linked = |mark: &str| {
        name.split_once(mark).is_some_and(|(_, rest)| {
            rest.split('_')
                .next()
                .is_some_and(|port| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()))
        })
    };
    name.ends_with("_SERVICE_HOST") || name.contains("_SERVICE_PORT") || name.ends_with("_PORT") || linked("_PORT_")
}

fn read_file(path: &Path) -> Result<Table, ConfigError> {
    let place = path.display();
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError(format!("{place}: {error}")))?;
    // The place and no more: the error's own text shows the line, which may hold a secret.
    let wrong = |error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let (line, begun) = before.split('\n').zip(1..).last().map_or((1, ""), |(begun, line)| (line, begun));
        ConfigError(format!("{place}: line {line}, column {}: {}", begun.chars().count() + 1, told(&error)))
    };
    // Read as a Config first: only that error knows line and column.
    toml::from_str::<Config>(&text).map_err(wrong)?;
    text.parse().map_err(wrong)
}

/// What is wrong in the words of serde, but of a value of the wrong type only the type: it may be a secret in the wrong place.
fn told(error: &toml::de::Error) -> String {
    let message = error.message();
    match (message.strip_prefix("invalid type: "), message.rsplit_once(", expected ")) {
        (Some(found), Some((_, expected))) => {
            let kind = found.split(['`', '"', ',']).next().unwrap_or_default().trim_end();
            format!("invalid type: {kind}, expected {expected}")
        }
        _ => message.to_owned(),
    }
}

/// A secret is the file's text without the line end that editors leave.
pub fn read_secret(what: &str, path: &Path) -> Result<Secret, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|error| ConfigError(format!("{what} {}: {error}", path.display())))?;
    let secret = text.trim_end_matches(['\r', '\n']);
    match secret.is_empty() {
        true => Err(ConfigError(format!("{what} {}: the file is empty", path.display()))),
        false => Ok(Secret(secret.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::config::tests::{load, refused};

    #[test]
    fn flags_go_over_variables_and_these_over_the_file() {
        let file = "threads = 1\nmap_version = 1\ndeployment = 'file'\n[[shard]]\nname = 'a'\nurl = 'memory:'";
        let variables = [("GOFLOW_MAP_VERSION", "2"), ("GOFLOW_DEPLOYMENT", "variable"), ("PATH", "x")];
        let flags = [("deployment", "flag"), ("shard", "b=memory:"), ("shard", "c*3=memory:")];
        let config = load(file, &variables, &flags).unwrap();
        assert_eq!((config.threads, config.map_version, config.deployment.as_str()), (1, 2, "flag"));
        assert_eq!(config.shard_map_line(), "b*1 c*3");
    }

    /// A value other than the default that the setting takes.
    fn other_value(setting: &Setting) -> String {
        match (setting.path.as_str(), &setting.default) {
            ("listen" | "http", _) => "127.0.0.1:7000".into(),
            ("strategy", _) => "least-loaded".into(),
            ("log.format", _) => "json".into(),
            ("log.level", _) => "debug".into(),
            ("shard", _) => "a=memory:".into(),
            ("auth.user", _) => "a=/dev/null".into(),
            ("threads", _) => "3".into(),
            ("queue.backoff_max_ms" | "limits.lease_ms_max", Value::Integer(number)) => (number + 1).to_string(),
            (_, Value::Integer(number)) => (number - 1).max(2).to_string(),
            (_, Value::Boolean(yes)) => (!yes).to_string(),
            (_, _) => "other".into(),
        }
    }

    #[test]
    fn every_setting_has_a_variable_that_sets_it_and_nothing_else() {
        let settings = settings();
        assert!(settings.len() > 25);
        for setting in &settings {
            let mut table = Table::new();
            put(&mut table, &setting.variable, setting, &other_value(setting)).unwrap();
            let config = Table::try_from(Config::deserialize(table).unwrap()).unwrap();
            let mut default = Table::try_from(Config::default()).unwrap();
            assert_ne!(config, default, "{} changes nothing", setting.variable);
            put_at(&mut default, &setting.path, at(&config, &setting.path));
            assert_eq!(config, default, "{} changes more than itself", setting.variable);
        }
        let names: HashSet<&str> = settings.iter().map(|setting| setting.variable.as_str()).collect();
        assert_eq!(names.len(), settings.len());
        for (variable, path) in LISTS {
            assert!(settings.iter().any(|setting| setting.variable == variable && setting.path == path));
        }
        assert!(names.contains("GOFLOW_LIMITS_PAYLOAD_BYTES_MAX") && names.contains("GOFLOW_HTTP"));
    }

    fn at(table: &Table, path: &str) -> Value {
        match path.split_once('.') {
            None => table[path].clone(),
            Some((section, rest)) => at(table[section].as_table().unwrap(), rest),
        }
    }

    #[test]
    fn a_bad_variable_is_named_with_what_was_expected() {
        for setting in settings().iter().filter(|setting| setting.default.is_integer()) {
            let bad = |value: &str| load("", &[(&setting.variable, value)], &[]);
            refused(bad("many"), &[&setting.variable, "expected a whole number"]);
            refused(bad("-1"), &[&setting.variable, "-1", "expected"]);
            refused(bad("9223372036854775807"), &[&setting.variable, "expected"]);
        }
        refused(load("", &[("GOFLOW_LISTEN", "6380")], &[]), &["GOFLOW_LISTEN", "expected ADDR:PORT"]);
        refused(load("", &[("GOFLOW_STRATEGY", "best")], &[]), &["GOFLOW_STRATEGY", "round-robin"]);
        refused(load("", &[("GOFLOW_LOG_FORMAT", "xml")], &[]), &["GOFLOW_LOG_FORMAT", "json"]);
        refused(load("", &[("GOFLOW_LOG_LEVEL", "a=b=c")], &[]), &["GOFLOW_LOG_LEVEL", "expected"]);
        refused(load("", &[("GOFLOW_LISTNE", "x")], &[]), &["GOFLOW_LISTNE", "no such setting"]);
        refused(load("", &[("GOFLOW_SHARDS", "redis://x")], &[]), &["GOFLOW_SHARDS", "NAME=URL"]);
        refused(load("", &[], &[("listen", "x")]), &["--flag", "expected ADDR:PORT"]);
    }

    #[test]
    fn what_is_wrong_in_a_file_is_shown_with_its_line() {
        refused(load("threads = 2\nlistne = 'x'", &[], &[]), &["goflow.toml", "line 2", "listne"]);
        refused(load("[limits]\n\npayload_bytes = 2", &[], &[]), &["line 3", "payload_bytes"]);
        refused(load("\nthreads = 2000", &[], &[]), &["line 2", "expected 0 to 256"]);
        refused(load("threads = 'two'", &[], &[]), &["line 1, column 11", "invalid type: string, expected i64"]);
        refused(load("[[shard]]\nname = 'a'\nurl = 'http://x'", &[], &[]), &["line 3", "redis://"]);
        refused(load("[[shard]]\nname = 'a b'\nurl = 'memory:'", &[], &[]), &["line 2", "a b"]);
        refused(load("[[shard]]\nname = 'a'", &[], &[]), &["line 1", "url"]);
        refused(load("threads =", &[], &[]), &["line 1"]);
        refused(load("# \u{e4}\nlisten = \"\u{e4}\" # \u{e4}\nlistne = 'x'", &[], &[]), &["line 2, column 10"]);
    }

    #[test]
    fn what_is_refused_is_not_repeated_where_it_may_be_a_secret() {
        let sink = "[[sink]]\nname = 'a'\nkind = 'webhook'\n";
        for (text, named) in [
            ("[auth]\npasswrd = 'hush'".to_owned(), "line 2, column 1: unknown field `passwrd`"),
            ("[auth]\npassword = 'hush".into(), "line 2"),
            ("[auth]\npassword = hush".into(), "line 2"),
            ("[auth]\npassword = 4711".into(), "line 2, column 12: invalid type: integer, expected a string"),
            ("[auth]\npassword = ['hush']".into(), "line 2"),
            ("[auth]\nuser = 'hush, expected'".into(), "invalid type: string, expected a sequence"),
            ("auth = 'hush'".into(), "line 1"),
            (format!("{sink}headers = 'hush'"), "line 4, column 11: invalid type: string, expected a map"),
            ("[[shard]]\nname = 'a'\nurl = 'redis://h?hush'".into(), "unknown option"),
            ("[[shard]]\nname = 'a'\nurl = 'redis+cluster://h?hush=hush'".into(), "unknown option"),
            ("[[shard]]\nname = 'a'\nurl = 'redis+cluster://h?partitions=hush'".into(), "partitions"),
            ("[[shard]]\nname = 'a'\nurl = 'redis://:/hush'".into(), "database"),
            ("[[shard]]\nname = 'a'\nurl = ':hush@redis://h'".into(), "unknown scheme"),
        ] {
            let error = load(&text, &[], &[]).expect_err(&text);
            assert!(error.contains(named) && !error.contains("hush") && !error.contains("4711"), "{text}: {error}");
        }
    }

    #[test]
    fn commas_divide_shards_only_where_a_name_follows() {
        let text = "a=redis+sentinel://x:1,y:2/svc, b*7=redis+cluster://p,q?partitions=2,c=memory:";
        let config = load("", &[("GOFLOW_SHARDS", text)], &[]).unwrap();
        let urls: Vec<String> = config.shard.iter().map(|shard| shard.url.to_string()).collect();
        assert_eq!(urls, ["redis+sentinel://x:1,y:2/svc", "redis+cluster://p:6379,q:6379?partitions=2", "memory:"]);
        assert_eq!(config.shard_map_line(), "a*1 b/2*7 c*1");
    }

    #[test]
    fn secrets_come_from_files_and_are_never_shown() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("secret");
        std::fs::write(&file, "hush\n").unwrap();
        let path = file.display();
        let text = format!(
            "[auth]\npassword_file = '{path}'\n[[auth.user]]\nname = 'bob'\npassword = 'hush'\n\
             [[shard]]\nname = 'a'\nurl = 'redis://h'\npassword_file = '{path}'"
        );
        let config = load(&text, &[], &[]).unwrap();
        let users: Vec<_> = config.auth.user.iter().map(|user| (&user.name[..], user.password.reveal())).collect();
        assert_eq!(users, [("default", "hush"), ("bob", "hush")]);
        assert_eq!(config.shard[0].url.login().unwrap().password, Some(Secret::new("hush")));
        assert!(!format!("{config:?}").contains("hush"));
        assert!(!toml::to_string(&config).unwrap().contains("hush"));
        let config = load("", &[("GOFLOW_AUTH_USER_FILES", &format!("amy={path}"))], &[]).unwrap();
        assert_eq!(config.auth.user[0].password.reveal(), "hush");
        refused(load("auth.password_file = '/nowhere'", &[], &[]), &["password_file /nowhere"]);
        refused(load("auth.password_file = '/dev/null'", &[], &[]), &["empty"]);
    }

    #[test]
    fn what_kubernetes_sets_for_a_service_named_goflow_is_no_setting() {
        let variables = [
            ("GOFLOW_SERVICE_HOST", "10.0.0.1"),
            ("GOFLOW_SERVICE_PORT_RESP", "6380"),
            ("GOFLOW_PORT", "tcp://10.0.0.1:6380"),
            ("GOFLOW_REDIS_PORT_6379_TCP_ADDR", "10.0.0.1"),
        ];
        assert!(load("", &variables, &[]).is_ok());
    }
}
