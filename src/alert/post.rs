//! One POST to a service outside, over TLS where its URL says so.
//!
//! A new connection for each: alerts are few, and a service may be anywhere and restart at any time. Redirects are not
//! followed: only what the configuration names is ever called. A failure says whether the service may have taken it all
//! the same, and what was said of when to try again.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER, USER_AGENT};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::shard::Socket;

/// What is read of an answer: services say there why they refuse.
const ANSWER_BYTES_MAX: usize = 64 << 10;
const WHY_CHARS_MAX: usize = 200;
/// What a service may ask for.
const RETRY_MAX: Duration = Duration::from_secs(3_600);

/// Why nothing was delivered.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    pub why: String,
    /// It may have been taken all the same, so that only the very same may be sent again.
    pub maybe_taken: bool,
    /// How long the service wants to be left alone.
    pub retry_after: Option<Duration>,
}

impl Failure {
    pub fn refused(why: impl Into<String>) -> Failure {
        Failure { why: why.into(), maybe_taken: false, retry_after: None }
    }

    pub fn unsure(why: impl Into<String>) -> Failure {
        Failure { maybe_taken: true, ..Failure::refused(why) }
    }
}

/// Where to post. Its path may be a secret, so it is never shown.
#[derive(Clone)]
pub struct Target {
    host: String,
    port: u16,
    path: String,
    tls: Option<Arc<ClientConfig>>,
}

impl Target {
    /// Reads a URL; `authorities` are certificates in PEM that are trusted beside the usual ones. Errors do not repeat the
    /// URL: it may be a secret.
    pub fn parse(url: &str, authorities: Option<&[u8]>) -> Result<Target, String> {
        let expected = || "expected https://HOST[:PORT]/PATH or http://...".to_owned();
        let uri: Uri = url.parse().map_err(|_| expected())?;
        let host = uri.host().ok_or_else(expected)?.trim_matches(['[', ']']).to_owned();
        let (port, tls) = match uri.scheme_str() {
            Some("http") => (80, None),
            Some("https") => (443, Some(Arc::new(client_config(authorities)?))),
            _ => return Err(expected()),
        };
        if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return Err("a user in the URL is not sent: use a header".into());
        }
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        Ok(Target { host, port: uri.port_u16().unwrap_or(port), path, tls })
    }

    /// The same place with this path behind what the URL has.
    pub fn join(mut self, path: &str) -> Target {
        self.path = format!("{}{path}", self.path.trim_end_matches('/'));
        self
    }

    /// What may be shown of it.
    pub fn shown(&self) -> String {
        format!("{}://{}:{}", if self.tls.is_some() { "https" } else { "http" }, self.host, self.port)
    }

    /// Posts JSON and waits for the answer until the time is up.
    pub async fn post(&self, headers: HeaderMap, body: Bytes, timeout: Duration) -> Result<(), Failure> {
        let ends = tokio::time::Instant::now() + timeout;
        let late = || format!("{} did not answer in {} ms", self.shown(), timeout.as_millis());
        let socket = tokio::time::timeout_at(ends, self.connect()).await;
        let socket = socket.map_err(|_| Failure::refused(late()))??;
        let exchanged = tokio::time::timeout_at(ends, self.exchange(socket, headers, body)).await;
        exchanged.map_err(|_| Failure::unsure(late()))?
    }

    async fn connect(&self) -> Result<Box<dyn Socket>, Failure> {
        let told = |error: &dyn std::fmt::Display| Failure::refused(format!("{}: {error}", self.shown()));
        let socket = TcpStream::connect((&*self.host, self.port)).await.map_err(|error| told(&error))?;
        let Some(tls) = &self.tls else { return Ok(Box::new(socket)) };
        let name = ServerName::try_from(self.host.clone()).map_err(|error| told(&error))?;
        let socket = TlsConnector::from(tls.clone()).connect(name, socket).await.map_err(|error| told(&error))?;
        Ok(Box::new(socket))
    }

    async fn exchange(&self, socket: Box<dyn Socket>, headers: HeaderMap, body: Bytes) -> Result<(), Failure> {
        let told = |error: &dyn std::fmt::Display| Failure::unsure(format!("{}: {error}", self.shown()));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(socket)).await.map_err(|error| told(&error))?;
        let exchange = async {
            let answer = sender.send_request(self.request(headers, body)?).await.map_err(|error| told(&error))?;
            let (status, headers) = (answer.status(), answer.headers().clone());
            // The status decides. What else there is to say of a success may never end.
            if status.is_success() {
                return Ok(());
            }
            let said = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
            let said = said.map(|body| body.to_bytes()).unwrap_or_default();
            Err(failure(&self.shown(), status, &headers, &said))
        };
        let (mut exchange, mut connection) = (std::pin::pin!(exchange), std::pin::pin!(connection));
        let mut connected = true;
        loop {
            tokio::select! {
                answer = &mut exchange => return answer,
                _ = &mut connection, if connected => connected = false,
            }
        }
    }

    fn request(&self, headers: HeaderMap, body: Bytes) -> Result<Request<Full<Bytes>>, Failure> {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        let usual = matches!((self.port, &self.tls), (80, None) | (443, Some(_)));
        let host = if usual { host } else { format!("{host}:{}", self.port) };
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(self.path.as_str())
            .header(HOST, host)
            .header(CONTENT_TYPE, "application/json")
            .header(USER_AGENT, concat!("goflow/", env!("CARGO_PKG_VERSION")))
            .body(Full::new(body))
            .map_err(|error| Failure::refused(format!("{}: {error}", self.shown())))?;
        let mut last: Option<HeaderName> = None;
        for (name, value) in headers {
            last = name.or(last);
            if let Some(name) = &last {
                request.headers_mut().insert(name.clone(), value);
            }
        }
        Ok(request)
    }
}

fn client_config(authorities: Option<&[u8]>) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    if let Some(pem) = authorities {
        let mut count = 0;
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate.map_err(|error| format!("not PEM: {error}"))?;
            roots.add(certificate).map_err(|error| format!("no certificate of an authority: {error}"))?;
            count += 1;
        }
        if count == 0 {
            return Err("holds no certificate: expected PEM".into());
        }
    }
    Ok(ClientConfig::builder().with_root_certificates(roots).with_no_client_auth())
}

/// What an answer means that is no success.
fn failure(place: &str, status: StatusCode, headers: &HeaderMap, said: &[u8]) -> Failure {
    let said: String = String::from_utf8_lossy(said).chars().take(WHY_CHARS_MAX).collect();
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    let why = format!("{place}: status {} {said}", status.as_u16());
    // A server that failed may have done it before; any other answer is a refusal.
    let maybe_taken = status.is_server_error() && status != StatusCode::SERVICE_UNAVAILABLE;
    Failure { why: why.trim_end().to_owned(), maybe_taken, retry_after: headers.get(RETRY_AFTER).and_then(retry_after) }
}

/// Seconds, or the date until which to wait.
fn retry_after(value: &HeaderValue) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    let asked = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(SystemTime::now()).unwrap_or_default(),
    };
    Some(asked.min(RETRY_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[test]
    fn the_status_of_a_failure_says_whether_it_was_taken() {
        let judged = |status: u16, after: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, HeaderValue::from_static(after));
            failure("x", StatusCode::from_u16(status).unwrap(), &headers, b"so\nsaid")
        };
        let refused = judged(429, "7");
        assert_eq!((refused.maybe_taken, refused.retry_after), (false, Some(Duration::from_secs(7))));
        assert_eq!(refused.why, "x: status 429 so said");
        assert_eq!(judged(503, "999999").retry_after, Some(RETRY_MAX));
        assert_eq!(judged(429, "soon").retry_after, None);
        let past = judged(429, "Fri, 01 Jan 2021 00:00:00 GMT");
        assert_eq!(past.retry_after, Some(Duration::ZERO));
        for (status, maybe) in [(500, true), (502, true), (400, false), (301, false)] {
            assert_eq!(judged(status, "").maybe_taken, maybe, "{status}");
        }
    }

    #[tokio::test]
    async fn what_was_taken_is_taken_though_the_answers_body_never_ends() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = Target::parse(&format!("http://{}/", listener.local_addr().unwrap()), None).unwrap();
        let service = tokio::spawn(async move {
            let (mut socket, _) = listener.accept().await.unwrap();
            assert!(socket.read(&mut [0; 4_096]).await.unwrap() > 0);
            socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf").await.unwrap();
            std::future::pending::<()>().await;
        });
        assert_eq!(target.post(HeaderMap::new(), Bytes::new(), Duration::from_secs(4)).await, Ok(()));
        service.abort();
    }

    #[test]
    fn a_url_is_checked_and_its_path_is_not_shown() {
        let target = Target::parse("https://hooks.example.com/services/T0/hush?x=1", None).unwrap();
        assert_eq!(target.shown(), "https://hooks.example.com:443");
        assert_eq!(Target::parse("http://[::1]:81/", None).unwrap().join("/v2/enqueue").path, "/v2/enqueue");
        for bad in ["", "ftp://a/", "https://", "/path", "https://user:hush@a/"] {
            let why = Target::parse(bad, None).err().unwrap();
            assert!(!why.contains("hush"), "{why}");
        }
        assert!(Target::parse("https://a/", Some(b"no pem")).is_err());
    }
}
