//! The real binary: started, watched, stopped, killed; and its silence checked.
//!
//! A log line of level WARN or ERROR, or a panic, that the test did not announce with [`Goflow::expect_log`] fails the
//! test when the process is dropped or [`Goflow::terminate`]d.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use super::process::{Process, Program};
use super::scratch;
use super::wire::Wire;
use tempfile::TempDir;

/// One running `goflow`.
pub struct Goflow {
    process: Process,
    program: Program,
    address: String,
    expected: Vec<String>,
    dir: TempDir,
}

/// The program with these arguments, in a directory of its own, without settings from the environment of the test.
fn program(dir: &Path, args: &[&str], env: &[(&str, &str)]) -> Program {
    Program {
        path: PathBuf::from(env!("CARGO_BIN_EXE_goflow")),
        args: args.iter().map(Into::into).collect(),
        env: env.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
        dir: dir.to_owned(),
    }
}

impl Goflow {
    /// Starts `goflow serve` on a free port, with HTTP off, and these arguments after. Returns when it listens.
    pub fn start(args: &[&str]) -> Goflow {
        Goflow::start_with(args, &[])
    }

    pub fn start_with(args: &[&str], env: &[(&str, &str)]) -> Goflow {
        Goflow::start_on("off", args, env)
    }

    /// The same with HTTP on a free port, which the log names.
    pub fn start_with_http(args: &[&str], env: &[(&str, &str)]) -> Goflow {
        Goflow::start_on("127.0.0.1:0", args, env)
    }

    /// The same with HTTP on this address.
    pub fn start_on(http: &str, args: &[&str], env: &[(&str, &str)]) -> Goflow {
        let dir = scratch();
        let usual = ["serve", "--listen", "127.0.0.1:0", "--http", http];
        let args: Vec<&str> = usual.iter().chain(args).copied().collect();
        let program = program(dir.path(), &args, env);
        let process = Process::start(&program);
        let address = wait_for_address(&process);
        Goflow { process, program, address, expected: Vec::new(), dir }
    }

    /// Runs `goflow` with these arguments to its end: exit status, standard output, standard error.
    pub fn run(args: &[&str]) -> (ExitStatus, String, String) {
        Goflow::run_with(args, &[])
    }

    pub fn run_with(args: &[&str], env: &[(&str, &str)]) -> (ExitStatus, String, String) {
        let dir = scratch();
        let program = program(dir.path(), args, env);
        let mut command = std::process::Command::new(&program.path);
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("GOFLOW_")) {
            command.env_remove(name);
        }
        let output = command.args(&program.args).envs(program.env).current_dir(dir.path()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status, text(&output.stdout), text(&output.stderr))
    }

    /// Where it listens: `ADDR:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The directory that it runs in.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    pub fn wire(&self) -> Wire {
        Wire::connect(&self.address)
    }

    pub fn log(&self) -> Vec<String> {
        self.process.stderr.lines()
    }

    pub fn wait_for_log(&self, needle: &str) -> String {
        self.process.stderr.wait_for(needle)
    }

    /// Warnings and errors that hold this text are part of the test.
    pub fn expect_log(&mut self, needle: &str) {
        self.expected.push(needle.into());
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again in the same directory and on the port that it had.
    pub fn restart(&mut self) {
        self.process.kill();
        self.check_silence();
        if let Some(listen) = self.program.args.iter_mut().find(|arg| *arg == "127.0.0.1:0") {
            *listen = self.address.clone().into();
        }
        self.process = Process::start(&self.program);
        self.address = wait_for_address(&self.process);
    }

    /// SIGHUP.
    pub fn hangup(&self) {
        self.process.signal("HUP");
    }

    /// SIGTERM, and its exit status once it has drained.
    pub fn terminate(&mut self) -> ExitStatus {
        self.process.signal("TERM");
        self.wait()
    }

    pub fn signal(&self, name: &str) {
        self.process.signal(name);
    }

    /// Its exit status, once it has ended by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let status = self.process.wait();
        self.check_silence();
        status
    }

    pub fn stop(&self) {
        self.process.signal("STOP");
    }

    pub fn cont(&self) {
        self.process.signal("CONT");
    }

    fn check_silence(&self) {
        let log = self.log();
        let is_loud = |line: &&String| [" WARN ", "ERROR", "panicked at"].iter().any(|mark| line.contains(mark));
        // Servers of tests keep nothing on disk, and are told so.
        let is_unsafe = |line: &String| line.contains("the settings of a shard are unsafe");
        // On a slow machine; it goes on when they do.
        let is_slow = |line: &String| line.contains("starting without a shard that did not answer in time");
        let is_usual = |line: &String| is_unsafe(line) || is_slow(line);
        let is_expected = |line: &String| is_usual(line) || self.expected.iter().any(|needle| line.contains(needle));
        if let Some(line) = log.iter().filter(is_loud).find(|line| !is_expected(line)) {
            panic!("goflow logged what no test expected: {line}\nthe log:\n{}", log.join("\n"));
        }
    }
}

impl Drop for Goflow {
    fn drop(&mut self) {
        self.process.kill();
        if !std::thread::panicking() {
            self.check_silence();
        }
    }
}

fn wait_for_address(process: &Process) -> String {
    let mark = "listening on ";
    let line = process.stderr.wait_for(mark);
    let rest = &line[line.find(mark).map_or(0, |at| at + mark.len())..];
    rest.split(|c: char| c.is_whitespace() || c == ',' || c == '"').next().unwrap_or_default().to_owned()
}
