//! HTTP beside the Redis port: figures, health, readiness, and jobs for those without a Redis client.
//!
//! | path | answers |
//! | --- | --- |
//! | `GET`, `HEAD` `/metrics` | every metric, as Prometheus text or OpenMetrics |
//! | `GET`, `HEAD` `/healthz` | 200 while every runtime thread is alive, else 503 |
//! | `GET`, `HEAD` `/readyz` | 200 while new clients are welcome: started, not draining, and a shard answers; else 503 and why |
//! | `/v1/...` | jobs and queues ([`api`]), described by `GET /v1/openapi.json` |
//! | a configured path | deliveries of other services ([`webhook`]), which become jobs |
//!
//! Runs on a thread of its own, so that a slow scraper costs no client anything. Bodies, headers, connections, and the time to
//! ask, to answer and to take the answer are bounded. While the process drains, everything is still answered, as the last
//! thing on its connection, and what is under way is waited for. `/v1` wants the users and passwords of the Redis port where
//! there are any; webhooks want their signatures; the rest is for whoever reaches the port, which is the loopback's unless the
//! configuration says otherwise.

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ACCEPT, CONNECTION, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::Semaphore;

use crate::metrics::Format;
use crate::process::Process;
use socket::{Answered, Socket, UnderWay};
use webhook::Hook;

mod api;
mod json;
mod socket;
pub mod webhook;

/// Connections at once; more wait in the listener's line.
const CONNECTIONS_MAX: usize = 256;
/// For a client to send its headers, and for a connection to ask again.
const HEADERS_WAIT: Duration = Duration::from_secs(15);
/// For one request to be answered; longer than a lane waits for room.
const ANSWER_WAIT: Duration = Duration::from_secs(30);
/// For a client to read what it was answered.
const READ_WAIT: Duration = Duration::from_secs(60);

type Answer = Response<Full<Bytes>>;

/// What is served.
struct Site {
    process: Arc<Process>,
    hooks: Vec<Hook>,
    /// The OpenAPI document.
    description: Bytes,
}

/// Binds the port, before anything serves.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {address} for HTTP: {error}")))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Serves until the process ends.
pub async fn serve(listener: TcpListener, process: Arc<Process>, hooks: Vec<Hook>) -> io::Result<()> {
    let site = Arc::new(Site { process, description: api::openapi(&hooks), hooks });
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return Ok(()) };
        let (socket, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept an HTTP connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let site = site.clone();
        tokio::spawn(async move {
            let answered = Answered::default();
            let socket = TokioIo::new(Socket::new(socket, answered.clone(), READ_WAIT));
            let service = hyper::service::service_fn(|request| answer(request, site.clone(), answered.clone()));
            let mut builder = hyper::server::conn::http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(HEADERS_WAIT).max_buf_size(64 << 10);
            if let Err(error) = builder.serve_connection(socket, service).await {
                tracing::debug!(%error, "HTTP connection ended");
            }
            drop(permit);
        });
    }
}

async fn answer(request: Request<Incoming>, site: Arc<Site>, answered: Answered) -> Result<Answer, Infallible> {
    let process = &site.process;
    let under_way = UnderWay::begin(&process.requests);
    let mut answer = match (request.method(), request.uri().path()) {
        // Of an answer to HEAD hyper leaves the body out.
        (&Method::GET | &Method::HEAD, "/metrics") => metrics(&request, process),
        (&Method::GET | &Method::HEAD, "/healthz") => health(process),
        (&Method::GET | &Method::HEAD, "/readyz") => readiness(process),
        (&Method::GET | &Method::HEAD, "/") => {
            text(StatusCode::OK, "goflow: /metrics /healthz /readyz /v1/openapi.json\n")
        }
        (_, path) if path.starts_with("/v1/") => in_time(api::answer(request, &site)).await,
        (_, path) => match site.hooks.iter().find(|hook| hook.path == path) {
            Some(hook) => in_time(webhook::answer(hook, request, process)).await,
            None => text(StatusCode::NOT_FOUND, "there is nothing here\n"),
        },
    };
    if process.draining.load(Ordering::Relaxed) {
        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    answered.set(Some(under_way));
    Ok(answer)
}

async fn in_time(answer: impl Future<Output = Answer>) -> Answer {
    match tokio::time::timeout(ANSWER_WAIT, answer).await {
        Ok(answer) => answer,
        Err(_) => busy(text(StatusCode::SERVICE_UNAVAILABLE, "no answer in time; it may have happened\n")),
    }
}

fn metrics(request: &Request<Incoming>, process: &Process) -> Answer {
    let asked = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let format = Format::accepted(asked);
    process.show_metrics();
    let mut answer = Response::new(Full::from(process.metrics.render(format)));
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
    answer
}

/// Alive: whoever is asked here answers, so what is left to ask is whether the threads that serve clients do.
fn health(process: &Process) -> Answer {
    match process.pulse.silent_threads() {
        silent if silent.is_empty() => text(StatusCode::OK, "ok\n"),
        silent => text(StatusCode::SERVICE_UNAVAILABLE, format!("threads that hang: {silent:?}\n")),
    }
}

fn readiness(process: &Process) -> Answer {
    if !process.serving.load(Ordering::Relaxed) {
        return text(StatusCode::SERVICE_UNAVAILABLE, "starting\n");
    }
    if process.draining.load(Ordering::Relaxed) {
        return text(StatusCode::SERVICE_UNAVAILABLE, "draining\n");
    }
    let map = process.dispatcher.map();
    let down: Vec<&str> = map.lanes.iter().filter(|lane| lane.is_down()).map(|lane| &**lane.name()).collect();
    if down.len() == map.lanes.len() {
        return text(StatusCode::SERVICE_UNAVAILABLE, "no shard answers\n");
    }
    match down.is_empty() {
        true => text(StatusCode::OK, "ready\n"),
        // The others' jobs go on, here as on any other proxy.
        false => text(StatusCode::OK, format!("ready; shards that do not answer: {}\n", down.join(", "))),
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::from(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

fn busy(mut answer: Answer) -> Answer {
    answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    answer
}
