//! `goflow check`: says whether a configuration would start, and what each shard answers.
//!
//! Changes nothing on a shard: a stamp is read and compared, not taken, so that the next configuration can be checked while
//! the present one runs. An embedded shard is the exception that it cannot be opened while a server has it open; one whose
//! directory is not there yet is not made, or it would be there under another user's name than the server's.
//! Exit code 0 if `goflow serve` would start and reach every shard, else 1; what is only unsafe is a warning.

use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use futures_util::future::join_all;
use rustix::fs::{Access, access};

use crate::config::{Config, ShardConfig, ShardUrl};
use crate::dispatch::ShardEntry;
use crate::error::{Error, Happened};
use crate::shard::{Health, Stamp};

/// What one shard said.
struct Finding {
    name: String,
    weight: u32,
    health: Result<Health, Error>,
    stamp: Result<Option<Stamp>, Error>,
}

/// Checks and prints. `open` is how `serve` opens the shards of a configuration.
pub fn run(config: &Config, open: impl FnOnce(&Config) -> Result<Vec<ShardEntry>, String>) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("goflow check: cannot start a runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let (made, unmade): (Vec<ShardConfig>, Vec<ShardConfig>) =
        config.shard.iter().cloned().partition(|shard| unmade_dir(shard).is_none());
    let there = Config { shard: made, ..config.clone() };
    let (text, problems) = runtime.block_on(async {
        match open(&there) {
            Ok(shards) => {
                let examined = join_all(shards.iter().map(|entry| examine(entry, patience(config)))).await;
                let findings: Vec<Finding> = examined.into_iter().chain(unmade.iter().filter_map(foresee)).collect();
                report(config, &findings)
            }
            Err(why) => (format!("would not start: {why}\n"), 1),
        }
    });
    print!("{text}");
    ExitCode::from(u8::from(problems > 0))
}

/// The directory of an embedded shard that has none yet.
fn unmade_dir(shard: &ShardConfig) -> Option<&Path> {
    match &shard.url {
        ShardUrl::Embedded { dir } if !dir.exists() => Some(dir),
        _ => None,
    }
}

/// What will be found of such a shard once a server has started.
fn foresee(shard: &ShardConfig) -> Option<Finding> {
    let dir = unmade_dir(shard)?;
    let above = dir.ancestors().skip(1).find(|above| above.exists()).unwrap_or(dir);
    let above = if above == Path::new("") { Path::new(".") } else { above };
    let health = match access(above, Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) if above.is_dir() => Ok(Health {
            server: "embedded".into(),
            durability: "its directory is not there yet and will be made".into(),
            warnings: Vec::new(),
        }),
        _ => {
            let why = format!("cannot be made: {} is no directory that may be written to", above.display());
            Err(Error::shard_down(&shard.name, &why, Happened::No))
        }
    };
    Some(Finding { name: shard.name.clone(), weight: shard.weight, health, stamp: Ok(None) })
}

fn patience(config: &Config) -> Duration {
    config.timeouts.connect() + config.timeouts.answer()
}

async fn examine(entry: &ShardEntry, patience: Duration) -> Finding {
    let asked = async { (entry.shard.probe().await, entry.shard.stamp().await) };
    let (health, stamp) = tokio::time::timeout(patience, asked).await.unwrap_or_else(|_| {
        let late = Error::shard_down(&entry.name, "did not answer in time", Happened::No);
        (Err(late.clone()), Err(late))
    });
    Finding { name: entry.name.to_string(), weight: entry.weight, health, stamp }
}

/// The report, and how many problems it holds.
fn report(config: &Config, findings: &[Finding]) -> (String, usize) {
    let mut text = format!(
        "deployment {}, strategy {}, {} threads, to listen at {}, http {}\n",
        config.deployment,
        config.strategy.word(),
        config.threads(),
        config.listen,
        config.http.0.map_or_else(|| "off".to_owned(), |address| format!("at {address}"))
    );
    for webhook in &config.webhook {
        let _ = writeln!(text, "  webhook {} to queue {}", webhook.path, webhook.queue);
    }
    let (mut problems, mut warnings) = (0, 0);
    for finding in findings {
        let mut line = |mark: &str, what: &str| {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "  {mark}{what}");
        };
        line("", &format!("shard {}, weight {}{}", finding.name, finding.weight, place(config, &finding.name)));
        match &finding.health {
            Ok(health) => {
                line("  ", &format!("{}; {}", health.server, health.durability));
                health.warnings.iter().for_each(|warning| line("  warning: ", warning));
                warnings += health.warnings.len();
            }
            Err(error) => {
                line("  problem: ", &error.to_string());
                problems += 1;
            }
        }
        match &finding.stamp {
            Ok(None) => line("  ", "not stamped yet"),
            Ok(Some(stamp)) => match conflict(config, &finding.name, stamp) {
                None => line("  ", &format!("stamped, shard map {}", stamp.map_version)),
                Some(why) => {
                    line("  problem: ", &why);
                    problems += 1;
                }
            },
            // The probe has said it already.
            Err(_) if finding.health.is_err() => {}
            Err(error) => {
                line("  problem: ", &error.to_string());
                problems += 1;
            }
        }
    }
    let verdict = if problems == 0 { "would start" } else { "would not start, or not serve every shard" };
    text += &format!("{verdict}: {problems} problems, {warnings} warnings\n");
    (text, problems)
}

/// Where the shard is; a partition of a cluster, `name/3`, is where the cluster is.
fn place(config: &Config, name: &str) -> String {
    let is_of = |shard: &str| name == shard || name.strip_prefix(shard).is_some_and(|rest| rest.starts_with('/'));
    let shard = config.shard.iter().find(|shard| shard.name == name);
    let shard = shard.or_else(|| config.shard.iter().find(|shard| shard.url.partitions() > 1 && is_of(&shard.name)));
    shard.map_or_else(String::new, |shard| format!(", {}", shard.url))
}

/// Why a shard with this stamp would refuse the configuration.
fn conflict(config: &Config, name: &str, stamp: &Stamp) -> Option<String> {
    let Stamp { deployment, shard, map_version, map } = stamp;
    if *deployment != config.deployment {
        return Some(format!("it belongs to deployment {deployment}, not to {}", config.deployment));
    }
    if shard != name {
        return Some(format!("it is stamped as shard {shard}: expected that name for this URL"));
    }
    if *map_version > config.map_version {
        return Some(format!("its shard map is {map_version}, newer than map_version {}", config.map_version));
    }
    let line = config.shard_map_line();
    if *map_version == config.map_version && *map != line {
        return Some(format!("shard map {map_version} is '{map}' there and '{line}' here: raise map_version"));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let shards = ("GOFLOW_SHARDS".to_string(), "a=redis://u:hush@h,c=redis+cluster://p,q?partitions=2".to_string());
        Config::load(None, [shards, ("GOFLOW_MAP_VERSION".into(), "3".into())], &[]).unwrap()
    }

    fn stamp() -> Stamp {
        Stamp { deployment: "goflow".into(), shard: "a".into(), map_version: 3, map: config().shard_map_line() }
    }

    fn finding(name: &str, health: Result<Health, Error>, stamp: Result<Option<Stamp>, Error>) -> Finding {
        Finding { name: name.into(), weight: 1, health, stamp }
    }

    #[test]
    fn each_shard_is_shown_with_what_it_said() {
        let health = Health {
            server: "redis 7.0.15".into(),
            durability: "appendonly".into(),
            warnings: vec!["maxmemory-policy is allkeys-lru.".into()],
        };
        let findings = [finding("a", Ok(health), Ok(Some(stamp()))), finding("c/1", Ok(Health::default()), Ok(None))];
        let (text, problems) = report(&config(), &findings);
        assert_eq!(problems, 0);
        for words in ["shard a, weight 1, redis://h:6379", "redis 7.0.15; appendonly", "warning: maxmemory", "map 3"] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert!(text.contains("shard c/1, weight 1, redis+cluster://p:6379,q:6379?partitions=2"));
        assert!(text.contains("not stamped yet") && text.ends_with("would start: 0 problems, 1 warnings\n"));
        assert!(!text.contains("hush"));
    }

    #[test]
    fn a_shard_that_is_down_is_one_problem() {
        let down = || Error::shard_down("a", "refused the connection", Happened::No);
        let (text, problems) = report(&config(), &[finding("a", Err(down()), Err(down()))]);
        assert_eq!(problems, 1);
        assert!(text.contains("problem: SHARDDOWN a refused the connection"), "{text}");
    }

    #[test]
    fn a_stamp_that_the_shard_would_refuse_is_a_problem() {
        let config = config();
        let with = |change: fn(&mut Stamp)| {
            let mut stamp = stamp();
            change(&mut stamp);
            conflict(&config, "a", &stamp)
        };
        assert_eq!(with(|_| ()), None);
        assert_eq!(with(|stamp| (stamp.map_version, stamp.map) = (2, "other".into())), None);
        assert!(with(|stamp| stamp.deployment = "other".into()).unwrap().contains("deployment other"));
        assert!(with(|stamp| stamp.shard = "b".into()).unwrap().contains("shard b"));
        assert!(with(|stamp| stamp.map_version = 4).unwrap().contains("newer"));
        assert!(with(|stamp| stamp.map = "a*2".into()).unwrap().contains("raise map_version"));
    }

    #[test]
    fn an_embedded_shard_that_is_not_there_is_foreseen_and_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("new/data");
        let foreseen = |at: &Path| {
            let shards = ("GOFLOW_SHARDS".to_string(), format!("a=embedded:{}", at.display()));
            let config = Config::load(None, [shards], &[]).unwrap();
            report(&config, &config.shard.iter().filter_map(foresee).collect::<Vec<_>>())
        };
        let (text, problems) = foreseen(&inside);
        assert!(problems == 0 && text.contains("will be made"), "{text}");
        assert!(!dir.path().join("new").exists());
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let (text, problems) = foreseen(&file.join("data"));
        assert!(problems == 1 && text.contains("file is no directory that may be written to"), "{text}");
    }

    #[test]
    fn shards_that_cannot_be_opened_end_the_check() {
        assert_eq!(run(&config(), |_| Err("no".into())), ExitCode::FAILURE);
    }
}
