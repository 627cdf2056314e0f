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
use crate::dispatch::layout::Layout;
use crate::error::{Error, Happened};
use crate::shard::{Health, Stamp};

/// What one shard said.
struct Finding {
    name: String,
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
    Some(Finding { name: shard.name.clone(), health, stamp: Ok(None) })
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
    Finding { name: entry.name.to_string(), health, stamp }
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
        line(
            "",
            &format!(
                "shard {}, weight {}{}",
                finding.name,
                weight(config, &finding.name),
                place(config, &finding.name)
            ),
        );
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
    if let Some(layout) = newer_map(config, findings) {
        let (newer, ours) = (layout.version, config.map_version);
        text += &format!(
            "the shards bear map {newer}, newer than map_version {ours}: it is the one that would be served\n"
        );
        for member in &layout.members {
            let url = if member.url.is_empty() { String::new() } else { format!(", {}", member.url) };
            text += &format!("  shard {}, weight {}, {}{url}\n", member.name, member.weight, member.standing.word());
        }
    }
    let verdict = if problems == 0 { "would start" } else { "would not start, or not serve every shard" };
    text += &format!("{verdict}: {problems} problems, {warnings} warnings\n");
    (text, problems)
}

/// The entry of a shard; a partition of a cluster, `name/3`, has that of the cluster.
fn entry<'a>(config: &'a Config, name: &str) -> Option<&'a ShardConfig> {
    let is_of = |shard: &str| name == shard || name.strip_prefix(shard).is_some_and(|rest| rest.starts_with('/'));
    let shard = config.shard.iter().find(|shard| shard.name == name);
    shard.or_else(|| config.shard.iter().find(|shard| shard.url.partitions() > 1 && is_of(&shard.name)))
}

/// Where the shard is.
fn place(config: &Config, name: &str) -> String {
    entry(config, name).map_or_else(String::new, |shard| format!(", {}", shard.url))
}

fn weight(config: &Config, name: &str) -> u32 {
    entry(config, name).map_or(1, |shard| shard.weight)
}

/// The newest map that a shard of the deployment bears, if it is not the configuration's.
fn newer_map(config: &Config, findings: &[Finding]) -> Option<Layout> {
    let stamps = findings.iter().filter_map(|finding| finding.stamp.as_ref().ok()?.as_ref());
    let newest = stamps.filter(|stamp| stamp.deployment == config.deployment).max_by_key(|stamp| stamp.map_version)?;
    Layout::parse(newest.map_version, &newest.map).filter(|layout| layout.version > config.map_version)
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
    let line = config.shard_map_line();
    let places = Layout::parse(*map_version, map).map_or_else(|| map.clone(), |layout| layout.places());
    if *map_version == config.map_version && places != line {
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
        Finding { name: name.into(), health, stamp }
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
    fn a_newer_map_on_a_shard_is_shown() {
        let map = "a*1!draining=redis://h:6379 d*2=redis://d:1 #4".into();
        let newer = Stamp { map_version: 4, map, ..stamp() };
        let (text, problems) = report(&config(), &[finding("a", Ok(Health::default()), Ok(Some(newer)))]);
        assert_eq!(problems, 0);
        for words in
            ["map 4, newer than map_version 3", "shard a, weight 1, draining", "d, weight 2, open, redis://d:1"]
        {
            assert!(text.contains(words), "{words}: {text}");
        }
    }

    #[test]
    fn shards_that_cannot_be_opened_end_the_check() {
        assert_eq!(run(&config(), |_| Err("no".into())), ExitCode::FAILURE);
    }
}
