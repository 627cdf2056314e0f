//! A child process with its log: started, stopped, continued and killed by signal.
//!
//! The kernel's parent-death signal belongs to the thread that forks, not to the process, so every child is started by
//! one thread that lives as long as the test binary does.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use super::patience;

/// How long the streams of a process that has ended may stay open.
const ENDS_WITHIN: Duration = Duration::from_secs(5);

/// What to start, and where.
#[derive(Clone, Debug)]
pub struct Program {
    pub path: PathBuf,
    pub args: Vec<OsString>,
    pub env: Vec<(String, OsString)>,
    pub dir: PathBuf,
}

/// A running (or dead) child. Killed on drop.
pub struct Process {
    child: Child,
    pub stdout: Arc<Log>,
    pub stderr: Arc<Log>,
}

impl Process {
    pub fn start(program: &Program) -> Process {
        let mut child = fork(program);
        let stdout = Log::follow(child.stdout.take().unwrap());
        let stderr = Log::follow(child.stderr.take().unwrap());
        Process { child, stdout, stderr }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by name: `TERM`, `STOP`, `CONT`.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").arg(format!("-{name}")).arg(self.id().to_string()).status().unwrap();
        assert!(sent.success(), "process {} did not take SIG{name}", self.id());
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for the process to end by itself, and for all that it wrote.
    pub fn wait(&mut self) -> ExitStatus {
        let status = crate::eventually!("the process ended", self.child.try_wait().unwrap());
        self.stdout.wait_for_end();
        self.stderr.wait_for_end();
        status
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A command to start, and where to send what came of it.
struct Order {
    command: Command,
    reply: mpsc::Sender<std::io::Result<Child>>,
}

fn fork(program: &Program) -> Child {
    static FORKER: LazyLock<Mutex<mpsc::Sender<Order>>> = LazyLock::new(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for mut order in inbox {
                let _ = order.reply.send(order.command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(&program.path).args(&program.args).current_dir(&program.dir);
    // The sizes of the tests are variables like the settings; a child must not take them for its own.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("GOFLOW_")) {
        command.env_remove(name);
    }
    command.envs(program.env.iter().cloned()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let (reply, forked) = mpsc::channel();
    FORKER.lock().unwrap_or_else(PoisonError::into_inner).send(Order { command, reply }).unwrap();
    forked.recv().unwrap().unwrap_or_else(|error| panic!("setpriv {}: {error}", program.path.display()))
}

/// The lines that a process wrote on one of its streams, in order.
#[derive(Default)]
pub struct Log {
    lines: Mutex<Vec<String>>,
    grew: Condvar,
    ended: AtomicBool,
}

impl Log {
    fn follow(stream: impl Read + Send + 'static) -> Arc<Log> {
        let log = Arc::new(Log::default());
        let writer = log.clone();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stream);
            let mut line = Vec::new();
            while reader.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                writer.lines.lock().unwrap_or_else(PoisonError::into_inner).push(text);
                writer.grew.notify_all();
                line.clear();
            }
            let lines = writer.lines.lock().unwrap_or_else(PoisonError::into_inner);
            writer.ended.store(true, Ordering::Relaxed);
            drop(lines);
            writer.grew.notify_all();
        });
        log
    }

    /// Waits until nobody can write any more; a child of the process may, so not for long.
    fn wait_for_end(&self) {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let goes_on = |_: &mut Vec<String>| !self.ended.load(Ordering::Relaxed);
        drop(self.grew.wait_timeout_while(lines, ENDS_WITHIN, goes_on));
    }

    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for a line that holds `needle` and returns the first one.
    pub fn wait_for(&self, needle: &str) -> String {
        let deadline = Instant::now() + patience();
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(line) = lines.iter().find(|line| line.contains(needle)) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no line holds {needle:?} in the log:\n{}", lines.join("\n"));
            lines = self.grew.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// CPU time that a process has used, in milliseconds.
pub fn cpu_ms(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    // In hundredths of a second: user and system.
    (fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()) * 10
}

/// Finds a program on the path.
pub fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// The directory where `.ci/setup` puts the Python packages that tests use.
pub fn venv() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("../venv")
}
