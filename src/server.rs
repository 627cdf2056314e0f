//! Wires the process together and runs it: threads, listeners, lanes, signals, and the end.
//!
//! Each thread has a runtime, a listener (`SO_REUSEPORT`) and its sessions of its own; lane `i` runs on thread `i mod n`.
//! Order of the start: the map is found, shards are asked for their stamps (one that refuses ends the start, one that is down does not),
//! sockets are bound, HTTP says that we start, lanes run, sockets listen and are announced. Order of the end, on SIGTERM or SIGINT: no further
//! connection is accepted, waiting clients are answered, replies are finished and connections closed, lanes run empty, HTTP
//! answers what it was asked, and what was taken for who is gone is pushed back; what is left after the drain time is cut off. A
//! second signal ends at once.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, RwLock};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use socket2::{Domain, Protocol as SocketProtocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::alert::{Alerts, teller};
use crate::clients::Clients;
use crate::command::{self, ordinary};
use crate::dispatch::bound::{Terms, Workers};
use crate::dispatch::keeper::{Beginning, Keeper, Open};
use crate::dispatch::lane::Lane;
use crate::dispatch::layout::Layout;
use crate::dispatch::router::Strategy;
use crate::dispatch::{Dispatcher, limits, mover, post, sampler};
use crate::error::{Code, Error};
use crate::forward::Forwarding;
use crate::http;
use crate::metrics::Metrics;
use crate::process::settings::{Reread, Settings};
use crate::process::{Process, Pulse};
use crate::session;

/// Pending connections of one listener.
const BACKLOG: i32 = 4_096;
/// What a client above `limits.connections_max` is told.
pub const REFUSAL: &str = "-ERR max number of clients reached\r\n";
/// How long the start waits for shards to say whose they are.
const CLAIM_WAIT: Duration = Duration::from_secs(3);

/// Everything that a checked configuration decides.
pub struct Setup {
    pub listen: SocketAddr,
    /// Where metrics, health and the HTTP API are, if anywhere.
    pub http: Option<SocketAddr>,
    pub threads: usize,
    /// `None`: the kernel's own.
    pub keepalive: Option<Duration>,
    pub drain: Duration,
    /// How long worker sessions last.
    pub sessions: Terms,
    pub deployment: String,
    /// The shard map of the configuration.
    pub layout: Layout,
    pub open: Arc<dyn Open>,
    pub strategy: Strategy,
    pub settings: Settings,
    pub reread: Reread,
    /// Ordinary commands, upper case, that pass although they are refused otherwise.
    pub allowed: Vec<String>,
    /// Most bytes of one reply, and of those that wait for one client.
    pub output_bytes_max: usize,
    /// Groups of key patterns; the keys of a group live on one shard.
    pub together: Vec<Vec<String>>,
    /// Paths whose deliveries become jobs.
    pub webhooks: Vec<http::webhook::Hook>,
    pub alerts: Alerts,
}

/// Serves until a signal ends it. An error says why it could not start.
pub fn serve(setup: Setup) -> io::Result<()> {
    let listeners = bind_all(setup.listen, setup.threads)?;
    let address = listeners.first().map_or(Ok(setup.listen), |listener| listener.local_addr())?;
    let http_listener = setup.http.map(http::bind).transpose()?;
    let names = command::rows().iter().map(|row| row.spec.name).chain(ordinary::ROWS.iter().map(|row| row.name));
    let metrics = Arc::new(Metrics::new(names).map_err(io::Error::other)?);
    // On a runtime that is gone afterwards, and the connections with it: lanes open their own, where they run.
    let beginning = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async { Beginning::find(&setup.deployment, setup.layout, &*setup.open).await })?;
    let mut shards = Vec::new();
    for member in &beginning.layout.members {
        shards.extend(setup.open.open(member)?);
    }
    let dispatcher = Arc::new(Dispatcher::new(setup.deployment, beginning.layout, shards, setup.strategy));
    let holder: Arc<str> = format!("{:016x}", rand::random::<u64>()).into();
    let handles: Arc<OnceLock<Vec<runtime::Handle>>> = Arc::default();
    let on_lane = {
        let (handles, metrics, holder) = (handles.clone(), metrics.clone(), holder.clone());
        let dispatcher = dispatcher.clone();
        Box::new(move |lane: Arc<Lane>| {
            let handles = handles.get().map_or(&[][..], Vec::as_slice);
            if let Some(handle) = handles.get(lane.index() % handles.len().max(1)) {
                handle.spawn(tell_what_is_unsafe(lane.clone()));
                handle.spawn(sampler::run(lane.clone(), metrics.clone(), holder.clone()));
                handle.spawn(limits::run(dispatcher.clone(), lane.clone()));
                handle.spawn(lane.run(metrics.clone(), dispatcher.feed().clone()));
            }
        })
    };
    let keeper = Keeper::new(dispatcher.clone(), setup.open, beginning.proposal, on_lane);
    let process = Arc::new(Process {
        alerts: Arc::new(setup.alerts),
        workers: Arc::new(Workers::new(setup.sessions)),
        forwarding: Forwarding::new(dispatcher.clone(), setup.allowed, setup.together, setup.output_bytes_max),
        dispatcher,
        keeper,
        clients: Clients::default(),
        started_at: Instant::now(),
        listen_port: address.port(),
        settings: RwLock::new(Arc::new(setup.settings)),
        settings_version: 0.into(),
        reread: setup.reread,
        draining: false.into(),
        requests: Default::default(),
        bytes_in: 0.into(),
        bytes_out: 0.into(),
        metrics,
        pulse: Pulse::new(setup.threads),
        slowlog: Default::default(),
        serving: false.into(),
        scraping: Default::default(),
    });
    // Asked from the first moment, and told that we start.
    let http_address = match http_listener {
        Some(listener) => Some(serve_http(listener, process.clone(), setup.webhooks)?),
        None => None,
    };
    let options = SocketOptions { keepalive: setup.keepalive };
    let (stop, stopped) = watch::channel(false);
    let mut threads = Vec::new();
    let (ready, claimed) = std::sync::mpsc::channel();
    let (runtimes, running) = std::sync::mpsc::channel();
    for (number, listener) in listeners.into_iter().enumerate() {
        let (process, mut stopped, ready) = (process.clone(), stopped.clone(), ready.clone());
        let (holder, runtimes) = (holder.clone(), runtimes.clone());
        let count = setup.threads;
        let body = move || -> io::Result<()> {
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            let _ = runtimes.send((number, runtime.handle().clone()));
            drop(runtimes);
            runtime.block_on(async {
                tokio::spawn(post::open());
                let map = process.dispatcher.map();
                let own_lanes = || map.lanes.iter().filter(|lane| lane.index() % count == number);
                // All at once, so that the start waits for the slowest and not for all that are down in turn.
                let claims = own_lanes().map(|lane| tokio::time::timeout(CLAIM_WAIT, lane.claim()));
                for claim in join_all(claims).await {
                    let _ = ready.send(claim);
                }
                for lane in own_lanes().cloned() {
                    tokio::spawn(tell_what_is_unsafe(lane.clone()));
                    tokio::spawn(sampler::run(lane.clone(), process.metrics.clone(), holder.clone()));
                    tokio::spawn(limits::run(process.dispatcher.clone(), lane.clone()));
                    tokio::spawn(lane.run(process.metrics.clone(), process.dispatcher.feed().clone()));
                }
                drop(ready);
                if number == 0 {
                    tokio::spawn(process.dispatcher.feed().clone().run());
                }
                if number == 0 && !process.alerts.rules.is_empty() {
                    let (alerts, dispatcher) = (process.alerts.clone(), process.dispatcher.clone());
                    tokio::spawn(teller::run(alerts, dispatcher, process.metrics.clone(), holder.clone()));
                }
                let beating = process.clone();
                tokio::spawn(async move { beating.pulse.beat(number).await });
                let listener = TcpListener::from_std(listener)?;
                tokio::select! {
                    () = accept(listener, &process, options) => {}
                    _ = stopped.wait_for(|stopped| *stopped) => {}
                }
                // The runtime lives on for its sessions and lanes until the main thread ends the process.
                std::future::pending::<()>().await;
                Ok(())
            })
        };
        threads.push(std::thread::Builder::new().name(format!("goflow-{number}")).spawn(body)?);
    }
    drop((ready, runtimes));
    let mut runtimes: Vec<(usize, runtime::Handle)> = running.iter().collect();
    runtimes.sort_unstable_by_key(|(number, _)| *number);
    let _ = handles.set(runtimes.into_iter().map(|(_, handle)| handle).collect());
    for claim in claimed {
        match claim {
            Ok(Err(error)) if error.code != Code::ShardDown => return Err(io::Error::other(error.to_string())),
            Ok(Err(error)) => tracing::warn!(%error, "starting without a shard"),
            Ok(Ok(())) => {}
            Err(_) => tracing::warn!("starting without a shard that did not answer in time"),
        }
    }
    begin_to_follow(&process.keeper, &handles)?;
    if let Some((handle, others)) = handles.get().and_then(|handles| handles.split_first()) {
        others.iter().for_each(|handle| drop(handle.spawn(process.forwarding.clone().refresh())));
        handle.spawn(process.forwarding.clone().follow());
        handle.spawn(mover::run(process.dispatcher.clone(), holder));
    }
    // First, so that whoever is told that it listens finds it ready.
    process.serving.store(true, Ordering::Relaxed);
    eprintln!("goflow {} listening on {address}", env!("CARGO_PKG_VERSION"));
    if let Some(address) = http_address {
        eprintln!("goflow {} http listening on {address}", env!("CARGO_PKG_VERSION"));
    }
    eprintln!("try: redis-cli -h {} -p {} GOFLOW.ENQUEUE main hello", address.ip(), address.port());
    runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let reloading = handles.get().and_then(|handles| handles.first()).cloned();
        tokio::select! {
            result = wait_for_signal() => result?,
            result = reload_on_signal(&process, reloading) => result?,
        }
        tracing::info!("draining");
        let _ = stop.send(true);
        tokio::select! {
            () = drained(&process, setup.drain) => {}
            result = wait_for_signal() => result?,
        }
        tracing::info!("stopped");
        Ok(())
    })
}

/// Says once how a shard keeps what it acknowledges. Whether it answers is told elsewhere.
async fn tell_what_is_unsafe(lane: Arc<Lane>) {
    let Ok(health) = lane.shard().probe().await else { return };
    tracing::info!(shard = %lane.name(), server = health.server, durability = health.durability, "shard");
    for warning in &health.warnings {
        tracing::warn!(shard = %lane.name(), warning, "the settings of a shard are unsafe");
    }
}

/// Lets the keeper of the map run. A newer map of the configuration is decided first; where the shard that decides is down, it
/// waits and the one that the shards bear is served.
fn begin_to_follow(keeper: &Arc<Keeper>, handles: &OnceLock<Vec<runtime::Handle>>) -> io::Result<()> {
    let Some(handle) = handles.get().and_then(|handles| handles.first()) else {
        return Err(io::Error::other("no thread has started"));
    };
    let (told, proposed) = std::sync::mpsc::channel();
    let keeper = keeper.clone();
    handle.spawn(async move {
        let _ = told.send(keeper.propose().await);
        keeper.run().await;
    });
    match proposed.recv() {
        Ok(Err(error)) if error.code != Code::ShardDown => Err(io::Error::other(error.to_string())),
        Ok(Err(error)) => {
            tracing::warn!(%error, "the newer shard map of the configuration waits");
            Ok(())
        }
        _ => Ok(()),
    }
}

/// On a thread of its own, so that neither waits for the other.
fn serve_http(
    listener: std::net::TcpListener,
    process: Arc<Process>,
    hooks: Vec<http::webhook::Hook>,
) -> io::Result<SocketAddr> {
    let address = listener.local_addr()?;
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let body = move || {
        if let Err(error) = runtime.block_on(http::serve(listener, process, hooks)) {
            tracing::error!(%error, "HTTP is not served any more");
        }
    };
    std::thread::Builder::new().name("goflow-http".into()).spawn(body)?;
    Ok(address)
}

/// Rereads the configuration with each SIGHUP.
async fn reload_on_signal(process: &Arc<Process>, handle: Option<runtime::Handle>) -> io::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    while hangup.recv().await.is_some() {
        let process = process.clone();
        let reloading = async move {
            if let Err(error) = process.reload().await {
                tracing::error!(%error, "SIGHUP");
            }
        };
        if let Some(handle) = &handle {
            handle.spawn(reloading);
        }
    }
    std::future::pending().await
}

async fn wait_for_signal() -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Ends the sessions in order, then lets the lanes run empty; gives up after `limit`.
async fn drained(process: &Process, limit: Duration) {
    process.draining.store(true, Ordering::Relaxed);
    process.workers.drain();
    process.clients.wake_all();
    let requests = || process.requests.load(Ordering::Relaxed);
    let unsettled = || process.forwarding.unsettled.load(Ordering::Relaxed);
    // What is to be pushed back is looked at last: the end of a client may leave some.
    let is_busy = || {
        process.clients.count() > 0
            || requests() > 0
            || process.dispatcher.map().lanes.iter().any(|lane| !lane.is_idle())
            || unsettled() > 0
    };
    let all = async {
        let mut look = tokio::time::interval(Duration::from_millis(5));
        while is_busy() {
            look.tick().await;
        }
    };
    if tokio::time::timeout(limit, all).await.is_err() {
        let connections = process.clients.count();
        let (requests, unsettled) = (requests(), unsettled());
        tracing::warn!(connections, requests, unsettled, "drain time is up; cutting off what is left");
    }
}

/// One listener for each thread on the same address; with port 0 the first decides the port.
fn bind_all(address: SocketAddr, threads: usize) -> io::Result<Vec<std::net::TcpListener>> {
    let mut address = address;
    let mut listeners = Vec::with_capacity(threads);
    for number in 0..threads {
        // The first binds without sharing, so that a second process on the same port is refused rather than mixed in.
        let listener = bind(address, number > 0)
            .map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))?;
        address = listener.local_addr()?;
        listeners.push(listener);
    }
    Ok(listeners)
}

fn bind(address: SocketAddr, shared: bool) -> io::Result<std::net::TcpListener> {
    if !shared {
        // Only a probe: it fails where another process listens, and is gone before the shared sockets are bound.
        drop(open_socket(address, false)?);
    }
    open_socket(address, true)
}

fn open_socket(address: SocketAddr, shared: bool) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(SocketProtocol::TCP))?;
    socket.set_reuse_address(true)?;
    if shared {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

#[derive(Clone, Copy)]
struct SocketOptions {
    keepalive: Option<Duration>,
}

async fn accept(listener: TcpListener, process: &Arc<Process>, options: SocketOptions) {
    loop {
        let (socket, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, mostly: what is open goes on, and accepting rests a little.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if process.clients.count() >= process.settings().connections_max {
            process.metrics.connections_refused.inc();
            refuse(socket);
            continue;
        }
        if let Err(error) = prepare(&socket, options) {
            tracing::debug!(%error, "connection was gone before it began");
            continue;
        }
        let local = socket.local_addr().map_or_else(|_| String::new(), |local| local.to_string());
        let peer = process.clients.register(address.to_string(), local);
        tokio::spawn(session::serve(socket, peer, process.clone()));
    }
}

/// Written past the runtime, which has yet to hear from the kernel that a new socket can be written to.
fn refuse(socket: TcpStream) {
    if let Ok(mut socket) = socket.into_std() {
        // Not told is refused all the same.
        let _ = socket.write(REFUSAL.as_bytes());
    }
}

fn prepare(socket: &TcpStream, options: SocketOptions) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let Some(after) = options.keepalive else { return Ok(()) };
    SockRef::from(socket).set_tcp_keepalive(&TcpKeepalive::new().with_time(after).with_interval(after / 3))
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        io::Error::other(error.to_string())
    }
}
