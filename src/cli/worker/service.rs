//! A job done by a local web service: one POST with the payload as its body and the labels as headers.
//!
//! 2xx acknowledges with the body as the result; 429 and 503 fail the job for as long as `Retry-After` says; 410 and 422 say
//! that no retry can help; anything else, and silence, fails it. The status alone decides: of the body is read what a job may
//! bear, and where it breaks off the verdict stands. A new connection for each job, so that a service may be restarted at any
//! time.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::{CONTENT_TYPE, HOST, HeaderName, HeaderValue, RETRY_AFTER};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::task::{Task, Verdict};
use super::{Worker, patience, raised};
use crate::clock::Millis;
use crate::job::TEXT_BYTES_MAX;

const CONNECT_WAIT: Duration = Duration::from_secs(5);
/// What a service may ask for.
const RETRY_MS_MAX: Millis = 24 * 3_600_000;

pub struct Service {
    uri: Uri,
    address: String,
}

struct Answer {
    status: StatusCode,
    retry_ms: Option<Millis>,
    /// What has arrived of it, as far as it is kept.
    body: Vec<u8>,
}

impl Service {
    pub fn parse(url: &str) -> Result<Service, String> {
        let bad = || format!("--http {url}: expected http://HOST[:PORT]/PATH");
        let uri: Uri = url.parse().map_err(|_| bad())?;
        let host = uri.host().ok_or_else(bad)?;
        if uri.scheme_str() != Some("http") {
            return Err(bad());
        }
        let address = format!("{host}:{}", uri.port_u16().unwrap_or(80));
        Ok(Service { uri, address })
    }

    pub async fn handle(&self, task: &Task, worker: &Worker) -> Verdict {
        let mut heard = None;
        let unheard = tokio::select! {
            posted = self.post(task, &mut heard) => Verdict::fail(posted.err().unwrap_or_default()),
            () = patience(worker.options.timeout) => Verdict::fail(format!("no answer in {} ms", worker.options.timeout)),
            () = raised(&worker.stopping) => Verdict::Release { delay_ms: 0 },
        };
        heard.map_or(unheard, verdict)
    }

    /// Fills in what is heard as it is heard, so that it holds whenever this ends.
    async fn post(&self, task: &Task, heard: &mut Option<Answer>) -> Result<(), String> {
        let told = |error: &dyn std::fmt::Display| format!("{}: {error}", self.address);
        let socket = tokio::time::timeout(CONNECT_WAIT, TcpStream::connect(&self.address)).await;
        let socket = socket.map_err(|_| told(&"does not answer"))?.map_err(|error| told(&error))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(socket)).await.map_err(|error| told(&error))?;
        let exchange = async {
            let answer = sender.send_request(self.request(task)?).await.map_err(|error| told(&error))?;
            let status = answer.status();
            let retry_ms = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
            let retry_ms = retry_ms.and_then(|value| retry_after(value, SystemTime::now()));
            let kept = &mut heard.insert(Answer { status, retry_ms, body: Vec::new() }).body;
            let mut body = answer.into_body();
            while kept.len() < TEXT_BYTES_MAX {
                let Some(Ok(frame)) = body.frame().await else { break };
                let data = frame.data_ref().map_or(&[][..], |data| &data[..]);
                kept.extend_from_slice(&data[..data.len().min(TEXT_BYTES_MAX - kept.len())]);
            }
            Ok(())
        };
        let mut exchange = std::pin::pin!(exchange);
        let mut connection = std::pin::pin!(connection);
        let mut connected = true;
        loop {
            tokio::select! {
                ended = &mut exchange => return ended,
                _ = &mut connection, if connected => connected = false,
            }
        }
    }

    fn request(&self, task: &Task) -> Result<Request<Full<Bytes>>, String> {
        let path = self.uri.path_and_query().map_or("/", |path| path.as_str());
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header(HOST, self.address.as_str())
            .header(CONTENT_TYPE, "application/octet-stream")
            .body(Full::new(Bytes::copy_from_slice(task.payload())))
            .map_err(|error| error.to_string())?;
        for (name, value) in task.labels() {
            let name = HeaderName::from_bytes(format!("job-{}", name.replace('_', "-")).as_bytes());
            if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(&value)) {
                request.headers_mut().insert(name, value);
            }
        }
        Ok(request)
    }
}

/// `Retry-After` in seconds or as a date.
fn retry_after(value: &str, now: SystemTime) -> Option<Millis> {
    let ms = match value.trim().parse::<u64>() {
        Ok(seconds) => seconds.saturating_mul(1_000),
        // A date that is past is now.
        Err(_) => {
            httpdate::parse_http_date(value.trim()).ok()?.duration_since(now).unwrap_or_default().as_millis() as Millis
        }
    };
    Some(ms.min(RETRY_MS_MAX))
}

fn verdict(answer: Answer) -> Verdict {
    let Answer { status, retry_ms, body } = answer;
    if status.is_success() {
        return Verdict::Ack { result: body };
    }
    let busy = matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
    Verdict::Fail {
        error: format!("status {}", status.as_u16()),
        trace: body,
        retry_ms: retry_ms.filter(|_| busy),
        dead: matches!(status, StatusCode::GONE | StatusCode::UNPROCESSABLE_ENTITY),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_decides() {
        let answer = |status: u16, retry_ms| Answer {
            status: StatusCode::from_u16(status).unwrap(),
            retry_ms,
            body: b"said".to_vec(),
        };
        assert_eq!(verdict(answer(201, None)), Verdict::Ack { result: b"said".to_vec() });
        for (status, retry, expected) in [
            (429, Some(7), (Some(7), false)),
            (503, None, (None, false)),
            (500, Some(7), (None, false)),
            (422, None, (None, true)),
        ] {
            let Verdict::Fail { retry_ms, dead, .. } = verdict(answer(status, retry)) else { panic!("{status}") };
            assert_eq!((retry_ms, dead), expected, "{status}");
        }
    }

    #[test]
    fn a_service_says_when_in_seconds_or_by_a_date() {
        let now = httpdate::parse_http_date("Fri, 27 Nov 2026 12:00:00 GMT").unwrap();
        for (value, expected) in [
            ("0", Some(0)),
            (" 7 ", Some(7_000)),
            ("Fri, 27 Nov 2026 12:00:05 GMT", Some(5_000)),
            ("Fri, 27 Nov 2026 11:00:00 GMT", Some(0)),
            ("Sun, 27 Dec 2026 12:00:00 GMT", Some(RETRY_MS_MAX)),
            ("99999999999999999999", None),
            ("soon", None),
            ("-1", None),
        ] {
            assert_eq!(retry_after(value, now), expected, "{value}");
        }
    }

    #[test]
    fn only_plain_http_with_a_host_is_taken() {
        assert_eq!(Service::parse("http://127.0.0.1:9/jobs?x=1").unwrap().address, "127.0.0.1:9");
        for bad in ["", "/jobs", "https://a/", "ftp://a/", "http://"] {
            assert!(Service::parse(bad).is_err(), "{bad}");
        }
    }
}
