//! A local HTTP server that stands in for Slack, PagerDuty and the like: it writes down what it is sent, and answers what the
//! test says.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::Value;

/// One request as it came, and the status that it was answered with.
#[derive(Clone, Debug)]
pub struct Recorded {
    pub path: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: String,
    pub status: u16,
}

impl Recorded {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

/// What a request, known by its path and how many came before it, is answered: a status and lines of a header. The status
/// 0 takes it like 200, and the answer is lost.
pub type Answer = dyn Fn(&str, usize) -> (u16, &'static str) + Send + Sync;

pub struct Recorder {
    address: String,
    recorded: Arc<Mutex<Vec<Recorded>>>,
    answer: Arc<Mutex<Arc<Answer>>>,
}

impl Recorder {
    /// Listens on a free port and answers 200.
    pub fn start() -> Recorder {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let recorded: Arc<Mutex<Vec<Recorded>>> = Arc::default();
        let answer: Arc<Mutex<Arc<Answer>>> = Arc::new(Mutex::new(Arc::new(|_, _| (200, ""))));
        let (records, answers) = (recorded.clone(), answer.clone());
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let (records, answers) = (records.clone(), answers.clone());
                std::thread::spawn(move || serve(socket, &records, &answers));
            }
        });
        Recorder { address, recorded, answer }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// From now on requests are answered so.
    pub fn answer(&self, answer: impl Fn(&str, usize) -> (u16, &'static str) + Send + Sync + 'static) {
        *self.answer.lock().unwrap() = Arc::new(answer);
    }

    /// All requests to a path, in their order.
    pub fn all(&self, path: &str) -> Vec<Recorded> {
        self.recorded.lock().unwrap().iter().filter(|recorded| recorded.path == path).cloned().collect()
    }

    /// Those that were answered 200.
    pub fn taken(&self, path: &str) -> Vec<Recorded> {
        self.all(path).into_iter().filter(|recorded| recorded.status == 200).collect()
    }
}

fn serve(mut socket: TcpStream, records: &Mutex<Vec<Recorded>>, answers: &Mutex<Arc<Answer>>) {
    let mut reader = BufReader::new(socket.try_clone().unwrap());
    let Some((path, headers)) = read_head(&mut reader) else { return };
    let length =
        headers.iter().find(|(name, _)| name == "content-length").map_or(0, |(_, value)| value.parse().unwrap());
    let mut body = vec![0; length];
    if reader.read_exact(&mut body).is_err() {
        return;
    }
    let body = String::from_utf8_lossy(&body).into_owned();
    let (status, lines) = {
        // Under the lock, so that the numbers of requests are those of the record.
        let mut records = records.lock().unwrap();
        let before = records.iter().filter(|recorded| recorded.path == path).count();
        let (status, lines) = answers.lock().unwrap()(&path, before);
        records.push(Recorded { path, headers, body, status: if status == 0 { 200 } else { status } });
        (status, lines)
    };
    if status == 0 {
        return;
    }
    let _ = write!(socket, "HTTP/1.1 {status} so\r\n{lines}content-length: 2\r\nconnection: close\r\n\r\nok");
}

fn read_head(reader: &mut impl BufRead) -> Option<(String, Vec<(String, String)>)> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let path = line.split(' ').nth(1)?.to_owned();
    let mut headers = Vec::new();
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.push((name.to_ascii_lowercase(), value.to_owned())),
            None => return Some((path, headers)),
        }
    }
}
