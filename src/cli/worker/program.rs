//! A job done by a program: payload on standard input, labels in the environment, the verdict by its exit code.
//!
//! The program runs in a process group of its own, so that a signal from the terminal reaches only the worker, and so that
//! stopping it stops what it started, too. What it writes on standard error appears on ours. One that is told to stop has not
//! done its job, whatever its exit code: many end well without having finished.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use super::task::{Task, Verdict};
use super::{Worker, patience, raised};
use crate::job::TEXT_BYTES_MAX;

/// From SIGTERM to SIGKILL for a handler that is stopped.
const GRACE: Duration = Duration::from_secs(5);
/// For what a handler wrote to arrive after its end; a child that it left behind may hold the pipe for ever.
const PIPE_WAIT: Duration = Duration::from_secs(1);

/// Kills the whole group unless it has ended by itself.
struct Group(Option<Pid>);

impl Group {
    fn signal(&self, signal: Signal) {
        if let Some(pid) = self.0 {
            // Nobody there any more is what was wanted.
            let _ = kill_process_group(pid, signal);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

enum End {
    Exited(ExitStatus),
    TimedOut,
    Stopped,
    Unknown(std::io::Error),
}

pub async fn handle(words: &[OsString], task: &Task, worker: &Worker) -> Verdict {
    let mut child = match start(words, task) {
        Ok(child) => child,
        Err(error) => {
            let program = words.first().map(|word| word.to_string_lossy()).unwrap_or_default();
            tracing::error!(%program, %error, "cannot start the handler");
            return Verdict::Broken;
        }
    };
    let mut group = Group(child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw));
    feed(&mut child, task.payload().to_vec());
    let output = child.stdout.take().map(|pipe| tokio::spawn(keep(pipe, Keep::Head)));
    let errors = child.stderr.take().map(|pipe| tokio::spawn(keep(pipe, Keep::TailAndShow)));
    let end = tokio::select! {
        status = child.wait() => status.map_or_else(End::Unknown, End::Exited),
        () = patience(worker.options.timeout) => End::TimedOut,
        () = raised(&worker.stopping) => End::Stopped,
    };
    if matches!(end, End::TimedOut | End::Stopped) {
        group.signal(Signal::TERM);
        if tokio::time::timeout(GRACE, child.wait()).await.is_err() {
            group.signal(Signal::KILL);
            let _ = child.wait().await;
        }
    } else {
        // Its number may be another's soon.
        group.0 = None;
    }
    let (output, errors) = (collected(output).await, collected(errors).await);
    verdict(end, output, errors, worker)
}

fn start(words: &[OsString], task: &Task) -> std::io::Result<Child> {
    let (program, args) = words.split_first().ok_or(std::io::ErrorKind::InvalidInput)?;
    let labels = task.labels();
    let variables =
        labels.iter().map(|(name, value)| (format!("JOB_{}", name.to_uppercase()), OsStr::from_bytes(value)));
    Command::new(program)
        .args(args)
        .envs(variables)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

fn feed(child: &mut Child, payload: Vec<u8>) {
    if let Some(mut stdin) = child.stdin.take() {
        tokio::spawn(async move {
            // A program that does not read its payload need not.
            let _ = stdin.write_all(&payload).await;
        });
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Keep {
    Head,
    TailAndShow,
}

/// Reads to the end and keeps no more than a job may bear.
async fn keep(mut pipe: impl AsyncRead + Unpin, what: Keep) -> Vec<u8> {
    let (mut kept, mut chunk) = (Vec::new(), vec![0; 8 << 10]);
    while let Ok(len) = pipe.read(&mut chunk).await {
        if len == 0 {
            break;
        }
        match what {
            Keep::Head => kept.extend_from_slice(&chunk[..len.min(TEXT_BYTES_MAX - kept.len())]),
            Keep::TailAndShow => {
                let _ = std::io::stderr().write_all(&chunk[..len]);
                kept.extend_from_slice(&chunk[..len]);
                let surplus = kept.len().saturating_sub(TEXT_BYTES_MAX);
                kept.drain(..surplus);
            }
        }
    }
    kept
}

async fn collected(reader: Option<JoinHandle<Vec<u8>>>) -> Vec<u8> {
    let Some(mut reader) = reader else { return Vec::new() };
    match tokio::time::timeout(PIPE_WAIT, &mut reader).await {
        Ok(kept) => kept.unwrap_or_default(),
        Err(_) => {
            reader.abort();
            Vec::new()
        }
    }
}

fn verdict(end: End, output: Vec<u8>, errors: Vec<u8>, worker: &Worker) -> Verdict {
    let (what, dead) = match end {
        End::Stopped => return Verdict::Release { delay_ms: 0 },
        End::Exited(status) if status.success() => return Verdict::Ack { result: output },
        End::Exited(status) => match status.code() {
            Some(code) => (format!("exit code {code}"), code == worker.options.dead_exit),
            None => (format!("killed by signal {}", status.signal().unwrap_or_default()), false),
        },
        End::TimedOut => (format!("ran for more than {} ms and was stopped", worker.options.timeout), false),
        End::Unknown(error) => (format!("its end is not known: {error}"), false),
    };
    let said = String::from_utf8_lossy(&errors);
    let last_line = said.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    let error = match last_line {
        "" => what,
        line => format!("{what}: {}", line.chars().take(500).collect::<String>()),
    };
    Verdict::Fail { error, trace: errors, retry_ms: None, dead }
}
