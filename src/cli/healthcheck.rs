//! `goflow healthcheck`: PING over TCP, for images that have no other program.
//!
//! A server that asks for a password is alive, and so is one that has as many clients as it may: it need not be replaced.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use crate::clock::Millis;
use crate::server::REFUSAL;

/// As much of an answer is looked at.
const ANSWER_BYTES_MAX: u64 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    pub address: SocketAddr,
    pub timeout: Duration,
}

impl Options {
    /// `listen` is where the server listens: one that listens everywhere is asked on the loopback.
    pub fn new(listen: SocketAddr, timeout_ms: Millis) -> Options {
        let mut address = listen;
        if address.ip().is_unspecified() {
            address.set_ip(match address.ip() {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
        }
        Options { address, timeout: Duration::from_millis(timeout_ms) }
    }
}

/// 0 and silence, or 1 and why on standard error.
pub fn run(options: &Options) -> ExitCode {
    match ping(*options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("goflow healthcheck: {}: {why}", options.address);
            ExitCode::FAILURE
        }
    }
}

fn ping(options: Options) -> Result<(), String> {
    let exchange = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&options.address, options.timeout)?;
        stream.set_read_timeout(Some(options.timeout))?;
        stream.set_write_timeout(Some(options.timeout))?;
        stream.write_all(b"*1\r\n$4\r\nPING\r\n")?;
        let mut line = Vec::new();
        BufReader::new(stream.take(ANSWER_BYTES_MAX)).read_until(b'\n', &mut line)?;
        Ok(String::from_utf8_lossy(&line).into_owned())
    };
    match exchange().map_err(|error| error.to_string())? {
        line if line == "+PONG\r\n" || line.starts_with("-NOAUTH ") || line == REFUSAL => Ok(()),
        line => Err(format!("answered {line:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn ask_one_that_answers(answer: &'static [u8]) -> Result<(), String> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let options = Options::new(listener.local_addr().unwrap(), 5_000);
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 14];
            stream.read_exact(&mut request).unwrap();
            stream.write_all(answer).unwrap();
        });
        let result = ping(options);
        server.join().unwrap();
        result
    }

    #[test]
    fn a_server_that_answers_is_alive_even_if_it_wants_a_password_or_is_full() {
        assert_eq!(ask_one_that_answers(b"+PONG\r\n"), Ok(()));
        assert_eq!(ask_one_that_answers(b"-NOAUTH Authentication required.\r\n"), Ok(()));
        assert_eq!(ask_one_that_answers(REFUSAL.as_bytes()), Ok(()));
        assert!(ask_one_that_answers(b"-ERR loading\r\n").is_err());
        assert!(ask_one_that_answers(b"+").is_err() && ask_one_that_answers(b"").is_err());
        assert!(ask_one_that_answers(&[b'x'; 1_000]).is_err());
    }

    #[test]
    fn a_server_that_listens_everywhere_is_asked_on_the_loopback() {
        let address = |listen: &str| Options::new(listen.parse().unwrap(), 1).address.to_string();
        assert_eq!(address("0.0.0.0:1"), "127.0.0.1:1");
        assert_eq!(address("[::]:1"), "[::1]:1");
        assert_eq!(address("10.0.0.1:1"), "10.0.0.1:1");
    }
}
