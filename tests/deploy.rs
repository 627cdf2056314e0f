//! Everything under `deploy/` is read by the program that it is meant for, or else checked against what GoFlow has: every
//! variable and flag exists, every query of the dashboard and of the alert rules names a metric that is declared.
//!
//! The programs (promtool, haproxy, systemd-analyze, Debian's python3-yaml) are installed by `.ci/setup`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use goflow::cli;
use goflow::config::Config;
use goflow::metrics;
use serde_json::Value;

use crate::support::scratch;

fn deploy(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(path)
}

fn text(path: &str) -> String {
    std::fs::read_to_string(deploy(path)).unwrap()
}

/// Runs a program in `deploy/` and fails with what it said.
fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).current_dir(deploy("")).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error} (run .ci/setup)"));
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{program} {args:?} refuses it:\n{said}");
    said
}

/// The documents of a YAML file.
fn yaml(path: &str) -> Vec<Value> {
    let script = "import json,sys,yaml; print(json.dumps(list(yaml.safe_load_all(open(sys.argv[1])))))";
    serde_json::from_str(&run("/usr/bin/python3", &["-c", script, path])).unwrap()
}

fn stack() -> Value {
    yaml("docker-stack.yml").remove(0)
}

/// A map as it is, or a list of `name`/`value` pairs as Kubernetes writes it.
fn variables(environment: &Value) -> Variables {
    match environment {
        Value::Object(map) => map.iter().map(|(name, value)| (name.clone(), value.as_str().unwrap().into())).collect(),
        Value::Array(list) => {
            let field = |entry: &Value, name: &str| entry[name].as_str().unwrap().to_owned();
            list.iter().map(|entry| (field(entry, "name"), field(entry, "value"))).collect()
        }
        _ => Vec::new(),
    }
}

fn words(value: &Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect()
}

type Variables = Vec<(String, String)>;

/// Containers of goflow in all files: where, the arguments, and the variables.
fn containers() -> Vec<(String, Vec<String>, Variables)> {
    let mut found = Vec::new();
    for file in ["docker-stack.yml", "docker-compose.yml"] {
        for (name, service) in yaml(file)[0]["services"].as_object().unwrap() {
            let image = service["image"].as_str().unwrap();
            if image.contains("goflow-worker") || image.contains("goflow:") {
                let worker = image.contains("goflow-worker").then(|| "worker".to_owned());
                let args = worker.into_iter().chain(words(&service["command"])).collect();
                found.push((format!("{file} {name}"), args, variables(&service["environment"])));
            }
        }
    }
    for file in ["kubernetes/deployment.yml", "kubernetes/sidecar.yml"] {
        let document = yaml(file).remove(0);
        let pod = &document["spec"]["template"]["spec"];
        let all = [&pod["initContainers"], &pod["containers"]].into_iter().filter_map(Value::as_array).flatten();
        for container in all.filter(|container| container["name"] == "goflow") {
            found.push((file.into(), words(&container["args"]), variables(&container["env"])));
        }
    }
    assert!(found.len() >= 6, "{found:?}");
    found
}

/// The proxies' file, with its secrets where this machine has them.
fn proxies_config() -> (Config, tempfile::TempDir) {
    let dir = scratch();
    let secret = dir.path().join("secret");
    std::fs::write(&secret, "hush\n").unwrap();
    let file = dir.path().join("goflow.toml");
    let there = text("goflow.toml").replace("/run/secrets/goflow_shard_password", &secret.to_string_lossy());
    std::fs::write(&file, there).unwrap();
    (Config::load(Some(&file), [], &[]).unwrap(), dir)
}

#[test]
fn every_variable_and_flag_of_the_deployments_exists() {
    let (_, dir) = proxies_config();
    let secret = dir.path().join("secret").to_string_lossy().into_owned();
    let file = dir.path().join("goflow.toml").to_string_lossy().into_owned();
    let worker_help = cli::parse_from(["goflow", "worker", "--help"].map(Into::into), []).unwrap_err().text;
    for (place, args, variables) in containers() {
        let there = |text: &str| match text {
            "/etc/goflow/goflow.toml" => file.clone(),
            text if text.starts_with("/run/secrets/") => secret.clone(),
            text => text.into(),
        };
        let args = ["goflow".to_owned()].into_iter().chain(args.iter().map(|arg| there(arg))).map(Into::into);
        // What the worker reads, its help names; the rest is the configuration's.
        let (workers, variables): (Vec<_>, Vec<_>) =
            variables.into_iter().partition(|(name, _)| name.starts_with("GOFLOW_WORKER_"));
        for (name, _) in workers {
            assert!(worker_help.contains(&format!("[env: {name}=")), "{place}: the worker knows no {name}");
        }
        let variables = variables.iter().map(|(name, value)| (name.clone(), there(value)));
        let parsed = cli::parse_from(args, variables);
        assert!(parsed.is_ok(), "{place}: {}", parsed.unwrap_err().text);
    }
}

#[test]
fn the_image_runs_the_binary_as_nobody_and_asks_it_for_its_health() {
    let dockerfile = text("Dockerfile");
    let last_stage = &dockerfile[dockerfile.rfind("\nFROM scratch\n").unwrap()..];
    let line = |keyword: &str| last_stage.lines().find_map(|line| line.strip_prefix(keyword)).unwrap();
    assert_eq!(line("USER "), "65532:65532");
    assert_eq!(line("ENTRYPOINT "), r#"["goflow"]"#);
    let parse = |json: &str| {
        let words: Vec<String> = serde_json::from_str(json).unwrap();
        let words = words.into_iter().skip_while(|word| word == "goflow");
        cli::parse_from(["goflow".into()].into_iter().chain(words.map(Into::into)), []).unwrap()
    };
    let (_, health) = line("HEALTHCHECK ").split_once("CMD ").unwrap();
    assert!(matches!(parse(health), cli::Command::Healthcheck(_)));
    assert!(matches!(parse(line("CMD ")), cli::Command::Serve(_)));
    let settings = line("ENV ").split(' ').filter(|pair| pair.starts_with("GOFLOW_"));
    let settings = settings.map(|pair| pair.split_once('=').unwrap()).map(|(name, value)| (name.into(), value.into()));
    let config = Config::load(None, settings, &[]).unwrap();
    assert!(config.listen.ip().is_unspecified() && config.http.0.is_some_and(|http| http.ip().is_unspecified()));
}

#[test]
fn whoever_stops_a_proxy_waits_longer_than_it_drains_and_keepalives_outlive_the_mesh() {
    let (config, _dir) = proxies_config();
    let drain_s = config.timeouts.drain_ms.div_ceil(1_000);
    let seconds = |value: &Value| value.as_str().unwrap().trim_end_matches('s').parse::<u64>().unwrap();
    assert!(seconds(&stack()["services"]["proxy"]["stop_grace_period"]) > drain_s);
    assert!(seconds(&yaml("docker-compose.yml")[0]["services"]["goflow"]["stop_grace_period"]) > drain_s);
    for file in ["kubernetes/deployment.yml", "kubernetes/sidecar.yml"] {
        let pod = &yaml(file)[0]["spec"]["template"]["spec"];
        let pauses = pod["containers"].as_array().unwrap().iter();
        let pauses =
            pauses.map(|container| container["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64().unwrap_or(0));
        let pause_s: u64 = pauses.sum();
        assert!(pod["terminationGracePeriodSeconds"].as_u64().unwrap() > drain_s + pause_s, "{file}");
        // A sidecar is stopped after its application, which is its only client.
        assert_eq!(pause_s > 0, file.contains("deployment"), "{file}");
    }
    let unit = text("goflow.service");
    let stop = unit.lines().find_map(|line| line.strip_prefix("TimeoutStopSec=")).unwrap();
    assert!(stop.parse::<u64>().unwrap() > drain_s);
    assert!(config.timeouts.keepalive().is_some_and(|keepalive| keepalive.as_secs() < 900));
    let balancer = text("haproxy.cfg");
    for setting in ["clitcpka-idle ", "srvtcpka-idle "] {
        let idle = balancer.lines().find_map(|line| line.trim().strip_prefix(setting)).unwrap();
        assert!(idle.trim_end_matches('s').parse::<u64>().unwrap() < 900, "{setting}");
    }
}

#[test]
fn the_stack_has_what_it_promises() {
    let stack = stack();
    let services = stack["services"].as_object().unwrap();
    let shards: Vec<&String> = services.keys().filter(|name| name.starts_with('s')).collect();
    let (config, _dir) = proxies_config();
    let configured: Vec<&String> = config.shard.iter().map(|shard| &shard.name).collect();
    assert_eq!(shards, configured, "the stack's shards are those of the proxies' file");
    for shard in shards {
        let service = &services[shard];
        assert_eq!(service["volumes"][0], format!("{shard}:/data"));
        assert_eq!(service["deploy"]["update_config"]["order"], "stop-first");
        assert!(stack["volumes"].as_object().unwrap().contains_key(shard));
        assert!(service["healthcheck"].is_object() && service["deploy"]["placement"]["constraints"].is_array());
    }
    for service in ["proxy", "haproxy", "worker"] {
        assert_eq!(services[service]["deploy"]["update_config"]["order"], "start-first", "{service}");
    }
    let declared: BTreeSet<&String> =
        ["secrets", "configs", "networks"].iter().flat_map(|kind| stack[*kind].as_object().unwrap().keys()).collect();
    for (name, service) in services {
        let uses = words_of(&service["secrets"]).chain(words_of(&service["networks"])).chain(
            service["configs"].as_array().into_iter().flatten().map(|config| config["source"].as_str().unwrap().into()),
        );
        uses.for_each(|used| assert!(declared.contains(&used), "{name} uses {used}, which is not declared"));
    }
    for config in stack["configs"].as_object().unwrap().values() {
        assert!(deploy(config["file"].as_str().unwrap()).is_file(), "{config}");
    }
}

fn words_of(value: &Value) -> impl Iterator<Item = String> {
    value.as_array().into_iter().flatten().map(|word| word.as_str().unwrap().to_owned())
}

#[test]
fn haproxy_takes_its_configuration_and_asks_for_readiness() {
    run("haproxy", &["-c", "-f", "haproxy.cfg"]);
    assert!(text("haproxy.cfg").contains("GET uri /readyz"));
}

#[test]
fn redis_takes_the_shards_configuration_from_its_standard_input() {
    let dir = scratch();
    let config = text("redis.conf").replace("dir /data", &format!("dir {}", dir.path().display()));
    let file = dir.path().join("redis.conf");
    std::fs::write(&file, config + "port 0\n").unwrap();
    // With port 0 and no socket there is nobody to serve, but the configuration is read whole before that is found.
    let script = "timeout 2 redis-server - <\"$1\"; true";
    let said = run("sh", &["-c", script, "sh", &file.to_string_lossy()]);
    assert!(!said.contains("FATAL CONFIG FILE ERROR"), "{said}");
    assert!(text("redis.conf").contains("maxmemory-policy noeviction"));
}

#[test]
fn prometheus_takes_its_configuration_and_the_alerts_fire_when_they_should() {
    run("promtool", &["check", "config", "prometheus.yml"]);
    run("promtool", &["check", "rules", "alerts.yml"]);
    run("promtool", &["test", "rules", "alerts_test.yml"]);
}

/// The queries of the dashboard and of the alert rules, by where they stand.
fn queries() -> BTreeMap<String, String> {
    let mut queries = BTreeMap::new();
    let dashboard: Value = serde_json::from_str(&text("grafana/goflow.json")).unwrap();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().unwrap() {
            let place = format!("panel {} {}", panel["title"], target["refId"]);
            let before = queries.insert(place, target["expr"].as_str().unwrap().replace("$queue", ".*"));
            assert!(before.is_none(), "two panels have one title: {}", panel["title"]);
        }
    }
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        let query = variable["query"]["query"].as_str().unwrap();
        let metric = query.strip_prefix("label_values(").and_then(|rest| rest.split(',').next()).unwrap();
        queries.insert(format!("variable {}", variable["name"]), metric.into());
    }
    for rule in yaml("alerts.yml")[0]["groups"][0]["rules"].as_array().unwrap() {
        queries.insert(format!("alert {}", rule["alert"]), rule["expr"].as_str().unwrap().into());
    }
    queries
}

/// What Prometheus itself and the process collector bring.
const FOREIGN: [&str; 3] = ["up", "process_cpu_seconds_total", "process_resident_memory_bytes"];

#[test]
fn every_query_names_metrics_that_exist_and_is_one() {
    let mut rules = String::from("groups:\n- name: queries\n  rules:\n");
    for (number, (place, query)) in queries().into_iter().enumerate() {
        let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let named: Vec<&str> = words.filter(|word| word.starts_with("goflow_")).collect();
        let foreign = FOREIGN.iter().any(|name| query.contains(name));
        assert!(!named.is_empty() || foreign, "{place} names no metric: {query}");
        for word in named {
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| word.strip_suffix(suffix));
            let is_histogram = |name: &str| {
                let is_it = |declared: &&metrics::Declared| declared.name == name;
                matches!(metrics::ALL.iter().find(is_it).map(|found| found.kind), Some(metrics::Kind::Histogram(_)))
            };
            let plain = metrics::ALL.iter().any(|declared| declared.name == word) && !is_histogram(word);
            assert!(plain || family.is_some_and(is_histogram), "{place}: there is no metric {word}");
        }
        let quoted = serde_json::to_string(&query).unwrap();
        rules.push_str(&format!("  - record: query:{number}\n    expr: {quoted}\n"));
    }
    let dir = scratch();
    let file = dir.path().join("rules.yml");
    std::fs::write(&file, rules).unwrap();
    run("promtool", &["check", "rules", &file.to_string_lossy()]);
}

#[test]
fn every_metric_of_the_list_is_on_the_dashboard_or_in_an_alert() {
    let all: String = queries().into_values().collect::<Vec<_>>().join("\n");
    let unseen: Vec<&str> =
        metrics::ALL.iter().map(|declared| declared.name).filter(|name| !all.contains(name)).collect();
    assert!(unseen.is_empty(), "nobody would see {unseen:?}");
}

#[test]
fn the_example_worker_reads_its_payload_and_its_variables() {
    let script = "printf hello | JOB_ATTEMPT=1 JOB_ATTEMPTS=25 python3 worker/handler";
    assert_eq!(run("sh", &["-c", script]), "5 bytes, attempt 1 of 25\n");
}

#[test]
fn systemd_takes_the_unit() {
    let dir = scratch();
    let unit = dir.path().join("goflow.service");
    let binary = env!("CARGO_BIN_EXE_goflow");
    std::fs::write(&unit, text("goflow.service").replace("/usr/local/bin/goflow", binary)).unwrap();
    run("systemd-analyze", &["verify", "--man=no", &unit.to_string_lossy()]);
}
