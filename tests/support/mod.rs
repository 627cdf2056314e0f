//! What the tests stand on: real processes that can be killed, a raw client, and waiting without sleeping.
//!
//! A process that a test starts dies with its test (`Drop`), and with the test binary even when that is killed
//! (`setpriv --pdeathsig`). Ports come from [`free_port`], directories from [`scratch`].

pub mod fleet;
pub mod goflow;
pub mod process;
pub mod recorder;
pub mod servers;
pub mod wire;

use std::collections::HashSet;
use std::net::TcpListener;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;
use tempfile::TempDir;

/// How long anything that must happen may take. Generous: it decides when a test gives up, not whether it passes.
/// `GOFLOW_PATIENCE_S` for runs of another size.
pub fn patience() -> Duration {
    let seconds = std::env::var("GOFLOW_PATIENCE_S").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(90))
}

/// Evaluates an expression again and again until it is `Some`, and yields what it holds; panics with the message when
/// patience ends. The one place where tests poll.
#[macro_export]
macro_rules! eventually {
    ($what:expr, $probe:expr) => {{
        let began = std::time::Instant::now();
        loop {
            if let Some(found) = $probe {
                break found;
            }
            assert!(began.elapsed() < $crate::support::patience(), "it did not come to pass that {}", $what);
            // The longer it takes, the less often it is looked at.
            std::thread::sleep(
                (began.elapsed() / 50)
                    .clamp(std::time::Duration::from_millis(2), std::time::Duration::from_millis(200)),
            );
        }
    }};
}

/// The size of a test: small by default, another one by an environment variable for long runs.
pub fn size(variable: &str, small: usize) -> usize {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(small)
}

/// A fresh directory that is removed with the value.
pub fn scratch() -> TempDir {
    tempfile::Builder::new().prefix("goflow-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A port that nobody listens on, handed out once in this process. Below the range that the kernel takes ports for
/// outgoing connections from, and free together with the port 10,000 above, which a cluster node uses as its bus.
pub fn free_port() -> u16 {
    static HANDED_OUT: LazyLock<Mutex<HashSet<u16>>> = LazyLock::new(Mutex::default);
    let mut handed_out = HANDED_OUT.lock().unwrap_or_else(PoisonError::into_inner);
    let is_free = |port: u16| TcpListener::bind(("127.0.0.1", port)).is_ok();
    loop {
        let port = rand::random_range(11_000..21_000);
        if !handed_out.contains(&port) && is_free(port) && is_free(port + 10_000) {
            handed_out.insert(port);
            return port;
        }
    }
}
