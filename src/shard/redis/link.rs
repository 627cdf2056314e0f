//! A raw connection to a server, shared by all sessions of one thread: ordinary commands pass as the bytes they are.
//!
//! Requests are written in the order of their submission, all that have gathered in one write; replies are cut by
//! `resp::scan` and paired with the requests first in, first out, so that one that cannot be paired ends the connection
//! rather than go astray. Nobody waits for a lock: submitters and the driving task are on the same thread.
//!
//! Promises: never mixes replies; a connection that breaks, is out of step or makes no progress for [`SILENCE_MAX`] fails
//! everything in flight, saying whether it may have happened, and is opened anew when it is wanted, after a rest that
//! doubles; what is in flight and what is unsent are bounded, and so is one request's replies ([`Link::spawn`]) and what
//! has come for one session that has not taken it ([`Backlog`]). Leaves to its callers never to send what changes the state
//! of a connection (`SELECT`, `MULTI` without its `EXEC` behind it, a subscription) or blocks.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures_util::task::AtomicWaker;
use prometheus::Histogram;
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::sync::oneshot;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep, timeout};

use crate::error::{Code, Error, Happened, Result};
use crate::metrics;
use crate::resp::reply::Protocol;
use crate::resp::scan::{ScanState, reply_end};
use crate::shard::{Dial, Socket};

/// Most requests of one link whose replies have not come.
const IN_FLIGHT_MAX: usize = 65_536;
/// Most bytes that wait to be written; one request may be larger.
const UNSENT_BYTES_MAX: usize = 64 << 20;
/// A server that owes replies and sends nothing for so long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// How often silence is looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const DIAL_WAIT: Duration = Duration::from_secs(3);
/// After a failure requests are refused for this long, doubling to the maximum, before one opens a connection again.
const REST_MIN: Duration = Duration::from_millis(50);
const REST_MAX: Duration = Duration::from_millis(1_000);
/// Room for one read.
const READ_BYTES: usize = 64 << 10;
/// A larger push is dropped: an inbox would not hold it.
const PUSH_BYTES_MAX: usize = 64 << 20;

/// A buffer that a burst made larger is given back.
const BUFFER_KEPT: usize = 1 << 20;

/// The replies to one request, back to back as they came.
pub type Replies = oneshot::Receiver<Result<Bytes>>;

/// What a link that listens hears beside replies.
#[derive(Debug)]
pub enum Heard {
    /// A connection is open, and the server knows nothing of what was asked for on an earlier one.
    Opened,
    /// The connection broke; what came after cannot be known.
    Lost,
    /// A RESP3 push as it came.
    Push(Bytes),
}

/// Called on the link's thread; must not block. It may submit.
pub type OnHeard = Box<dyn Fn(&Link, Heard) + Send + Sync>;

/// The replies that have come for one session and that it has not taken. A session that takes none is told by its bell
/// when they are too many bytes; what comes for it after that is dropped.
pub struct Backlog {
    bytes: AtomicUsize,
    bytes_max: usize,
    over: AtomicBool,
    bell: Box<dyn Fn() + Send + Sync>,
}

impl Backlog {
    pub fn new(bytes_max: usize, bell: Box<dyn Fn() + Send + Sync>) -> Arc<Backlog> {
        Arc::new(Backlog { bytes: AtomicUsize::new(0), bytes_max, over: AtomicBool::new(false), bell })
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// The session has taken so many bytes.
    pub fn take(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Whether so many bytes more may wait.
    fn put(&self, bytes: usize) -> bool {
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let fits = before + bytes <= self.bytes_max;
        if !fits {
            self.over.store(true, Ordering::Relaxed);
            (self.bell)();
        }
        fits
    }
}

/// One request whose replies are due.
struct Due {
    /// How many replies belong to it.
    replies: usize,
    answer: oneshot::Sender<Result<Bytes>>,
    backlog: Option<Arc<Backlog>>,
}

#[derive(Default)]
struct State {
    /// Not yet taken by the driver.
    unsent: BytesMut,
    unsent_requests: usize,
    due: VecDeque<Due>,
    /// Why requests are refused at once, while the link rests.
    down: Option<Arc<str>>,
    /// The number of the connection that is open.
    open: Option<u64>,
    /// Takes no more requests, and ends when nothing is due.
    closed: bool,
}

/// The submitting side; the driving task holds it, too.
pub struct Link {
    shard: Arc<str>,
    state: Mutex<State>,
    driver: AtomicWaker,
    reply_bytes_max: usize,
    on_heard: Option<OnHeard>,
    round_trips: Option<Histogram>,
}

impl Link {
    /// A link of the current thread's runtime; opens its connection when there is something to send. Replies to one
    /// request that are larger than `reply_bytes_max` are let pass by, and answered with an error.
    pub fn spawn(shard: Arc<str>, dial: Arc<dyn Dial>, protocol: Protocol, reply_bytes_max: usize) -> Arc<Link> {
        Link::start(shard, dial, protocol, reply_bytes_max, None)
    }

    /// A link in RESP3 that is kept open and hears what the server pushes.
    pub fn listen(shard: Arc<str>, dial: Arc<dyn Dial>, on_heard: OnHeard) -> Arc<Link> {
        Link::start(shard, dial, Protocol::Resp3, PUSH_BYTES_MAX, Some(on_heard))
    }

    fn start(
        shard: Arc<str>,
        dial: Arc<dyn Dial>,
        protocol: Protocol,
        reply_bytes_max: usize,
        on_heard: Option<OnHeard>,
    ) -> Arc<Link> {
        let link = Arc::new(Link {
            round_trips: metrics::link_seconds(&shard),
            shard,
            state: Mutex::default(),
            driver: AtomicWaker::new(),
            reply_bytes_max,
            on_heard,
        });
        tokio::spawn(drive(link.clone(), dial, protocol));
        link
    }

    /// The number of the open connection; no two have the same. What was said on one (`WATCH`) holds on that one alone.
    pub fn connection(&self) -> Option<u64> {
        self.state().open
    }

    /// Takes no more requests; the driver ends when nothing is due any more.
    pub fn close(&self) {
        self.state().closed = true;
        self.driver.wake();
    }

    /// Sends one request, or several in a row, as well-formed arrays; `replies` says how many replies that will be. With
    /// none (a subscription in RESP3) the answer is never given.
    pub fn submit(&self, request: &[u8], replies: usize) -> Replies {
        self.submit_for(request, replies, None)
    }

    /// The same, and what comes counts for this backlog until it is taken from there.
    pub fn submit_for(&self, request: &[u8], replies: usize, backlog: Option<Arc<Backlog>>) -> Replies {
        self.put(self.state(), request, replies, backlog)
    }

    /// The same on this connection or not at all: `None` when it is not open any more.
    pub fn submit_on(
        &self,
        connection: u64,
        request: &[u8],
        replies: usize,
        backlog: Option<Arc<Backlog>>,
    ) -> Option<Replies> {
        let state = self.state();
        (state.open == Some(connection)).then(|| self.put(state, request, replies, backlog))
    }

    fn put(
        &self,
        mut state: MutexGuard<'_, State>,
        request: &[u8],
        replies: usize,
        backlog: Option<Arc<Backlog>>,
    ) -> Replies {
        let (answer, receiver) = oneshot::channel();
        if let Some(error) = self.refusal(&state) {
            drop(state);
            let _ = answer.send(Err(error));
            return receiver;
        }
        let idle = state.unsent.is_empty();
        state.unsent.extend_from_slice(request);
        if replies > 0 {
            state.unsent_requests += 1;
            state.due.push_back(Due { replies, answer, backlog });
        }
        drop(state);
        if idle {
            self.driver.wake();
        }
        receiver
    }

    fn refusal(&self, state: &State) -> Option<Error> {
        if state.closed {
            return Some(Error::shard_down(&self.shard, "is no longer used", Happened::No));
        }
        if let Some(why) = &state.down {
            return Some(Error::shard_down(&self.shard, why, Happened::No));
        }
        let full = state.due.len() >= IN_FLIGHT_MAX || state.unsent.len() >= UNSENT_BYTES_MAX;
        full.then(|| Error::new(Code::Overloaded, format!("too much is on its way to shard {}", self.shard)))
    }

    fn hear(&self, heard: Heard) {
        if let Some(on_heard) = &self.on_heard {
            on_heard(self, heard);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails everything that is due. What was not even taken for sending has not happened.
    fn fail(&self, why: &str) {
        let mut state = self.state();
        let due = std::mem::take(&mut state.due);
        let sent = due.len() - state.unsent_requests;
        state.unsent = BytesMut::new();
        state.unsent_requests = 0;
        drop(state);
        for (place, due) in due.into_iter().enumerate() {
            let happened = if place < sent { Happened::Maybe } else { Happened::No };
            let _ = due.answer.send(Err(Error::shard_down(&self.shard, why, happened)));
        }
    }

    /// Ready when there is something to send, or nothing ever will be.
    async fn demand(&self) {
        poll_fn(|context| {
            self.driver.register(context.waker());
            let state = self.state();
            if state.unsent.is_empty() && !state.closed { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
    }

    fn is_over(&self) -> bool {
        let state = self.state();
        state.closed && state.due.is_empty()
    }
}

/// Opens connections for the link and serves them, until it is closed.
async fn drive(link: Arc<Link>, dial: Arc<dyn Dial>, protocol: Protocol) {
    let mut rest = REST_MIN;
    for connection in 0.. {
        if link.on_heard.is_none() {
            link.demand().await;
        }
        if link.is_over() {
            return;
        }
        let why = match timeout(DIAL_WAIT, dial.dial(protocol)).await {
            Ok(Ok(socket)) => {
                rest = REST_MIN;
                link.state().open = Some(connection);
                link.hear(Heard::Opened);
                let why = Connection::new(&link, socket).serve().await;
                link.state().open = None;
                link.hear(Heard::Lost);
                why
            }
            Ok(Err(error)) => error.text.into_owned(),
            Err(_) => "did not answer in time".into(),
        };
        if link.is_over() || (link.on_heard.is_none() && link.state().due.is_empty()) {
            // An idle connection was closed: nobody is hurt.
            continue;
        }
        tracing::debug!(shard = %link.shard, why, "link broke");
        link.state().down = Some(why.as_str().into());
        link.fail(&why);
        sleep(rest).await;
        rest = (rest * 2).min(REST_MAX);
        link.state().down = None;
    }
}

/// One connection of a link, while it lasts.
struct Connection<'a> {
    link: &'a Link,
    socket: Box<dyn Socket>,
    sending: BytesMut,
    buffer: BytesMut,
    scan: ScanState,
    /// Whole replies of the request at the head of the line: how many, and how many bytes.
    cut: usize,
    cut_bytes: usize,
    /// Bytes of these replies that are gone, because all of them together are too large.
    shed_bytes: usize,
    pushes: Vec<Bytes>,
    finished: Vec<(oneshot::Sender<Result<Bytes>>, Result<Bytes>)>,
    look: Interval,
    heard_at: Instant,
    trip: Option<Trip>,
}

/// The round trip that is measured, one at a time: how many replies come before its own, and when it was sent.
struct Trip {
    ahead: usize,
    began: Instant,
}

impl<'a> Connection<'a> {
    fn new(link: &'a Link, socket: Box<dyn Socket>) -> Connection<'a> {
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Connection {
            link,
            socket,
            sending: BytesMut::new(),
            buffer: BytesMut::new(),
            scan: ScanState::default(),
            cut: 0,
            cut_bytes: 0,
            shed_bytes: 0,
            pushes: Vec::new(),
            finished: Vec::new(),
            look,
            heard_at: Instant::now(),
            trip: None,
        }
    }

    /// Serves until the connection is of no use, and says why.
    async fn serve(mut self) -> String {
        poll_fn(|context| self.poll(context)).await
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<String> {
        self.link.driver.register(context.waker());
        if let Err(why) = self.write(context) {
            return Poll::Ready(why);
        }
        if let Err(why) = self.read(context) {
            return Poll::Ready(why);
        }
        if self.link.is_over() {
            return Poll::Ready("is no longer used".into());
        }
        while self.look.poll_tick(context).is_ready() {
            if self.link.state().due.is_empty() {
                self.heard_at = Instant::now();
            } else if self.heard_at.elapsed() > SILENCE_MAX {
                return Poll::Ready("did not answer in time".into());
            }
        }
        Poll::Pending
    }

    /// Writes what has gathered, as far as the socket takes it.
    fn write(&mut self, context: &mut Context<'_>) -> std::result::Result<(), String> {
        loop {
            if self.sending.is_empty() {
                let mut state = self.link.state();
                if state.unsent.is_empty() {
                    return Ok(());
                }
                if state.due.len() == state.unsent_requests {
                    self.heard_at = Instant::now();
                }
                if self.trip.is_none() && state.unsent_requests > 0 {
                    let ahead = state.due.len() - state.unsent_requests;
                    self.trip = Some(Trip { ahead, began: Instant::now() });
                }
                std::mem::swap(&mut self.sending, &mut state.unsent);
                state.unsent_requests = 0;
            }
            match Pin::new(&mut self.socket).poll_write(context, &self.sending) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Ok(0)) => return Err("closed the connection".into()),
                Poll::Ready(Ok(count)) if count == self.sending.len() => {
                    self.sending.clear();
                    if self.sending.capacity() > BUFFER_KEPT {
                        self.sending = BytesMut::new();
                    }
                }
                Poll::Ready(Ok(count)) => self.sending.advance(count),
                Poll::Ready(Err(error)) => return Err(format!("cannot be written to: {error}")),
            }
        }
    }

    /// Reads what is there and answers the requests whose replies are whole.
    fn read(&mut self, context: &mut Context<'_>) -> std::result::Result<(), String> {
        loop {
            if self.buffer.capacity() - self.buffer.len() < READ_BYTES / 4 {
                self.buffer.reserve(READ_BYTES);
            }
            match pin!(self.socket.read_buf(&mut self.buffer)).poll(context) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Ok(0)) => return Err("closed the connection".into()),
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Err(format!("cannot be read from: {error}")),
            }
            self.heard_at = Instant::now();
            let cut = self.cut_replies();
            for (answer, bytes) in self.finished.drain(..) {
                let _ = answer.send(bytes);
            }
            for push in self.pushes.drain(..) {
                self.link.hear(Heard::Push(push));
            }
            cut?;
        }
    }

    fn cut_replies(&mut self) -> std::result::Result<(), String> {
        let mut state = self.link.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let rest = self.buffer.get(self.cut_bytes..).unwrap_or_default();
            let end = match reply_end(rest, &mut self.scan) {
                Ok(Some(end)) => end,
                Ok(None) => {
                    drop(state);
                    self.shed();
                    return Ok(());
                }
                Err(malformed) => return Err(format!("sent a {malformed}")),
            };
            if self.scan.is_push() && self.cut == 0 {
                let push = self.buffer.split_to(end);
                if self.link.on_heard.is_some() && std::mem::take(&mut self.shed_bytes) == 0 {
                    self.pushes.push(push.freeze());
                }
                continue;
            }
            let Some(due) = state.due.front() else {
                return Err("sent a reply to no request".into());
            };
            self.cut += 1;
            self.cut_bytes += end;
            if self.cut == due.replies
                && let Some(due) = state.due.pop_front()
            {
                let bytes = self.buffer.split_to(self.cut_bytes);
                let bytes = match std::mem::take(&mut self.shed_bytes) + bytes.len() > self.link.reply_bytes_max {
                    true => Err(too_big(self.link.reply_bytes_max)),
                    false if due.backlog.is_some_and(|backlog| !backlog.put(bytes.len())) => {
                        Err(Error::new(Code::Overloaded, "too many replies wait for this client"))
                    }
                    false => Ok(bytes.freeze()),
                };
                self.finished.push((due.answer, bytes));
                (self.cut, self.cut_bytes) = (0, 0);
                match &mut self.trip {
                    Some(Trip { ahead: 0, began }) => {
                        if let Some(round_trips) = &self.link.round_trips {
                            round_trips.observe(self.heard_at.saturating_duration_since(*began).as_secs_f64());
                        }
                        self.trip = None;
                    }
                    Some(trip) => trip.ahead -= 1,
                    None => {}
                }
            }
        }
    }

    /// Lets go of what has come of replies that are too large; where they end is looked for all the same.
    fn shed(&mut self) {
        if self.shed_bytes + self.buffer.len() > self.link.reply_bytes_max {
            let rest = self.buffer.len() - self.cut_bytes;
            let gone = self.cut_bytes + self.scan.forget(rest);
            self.buffer.advance(gone);
            self.shed_bytes += gone;
            self.cut_bytes = 0;
        }
    }
}

/// The error in the place of a reply that is larger than a client may be sent.
pub fn too_big(bytes_max: usize) -> Error {
    let text = format!("the reply has more than {bytes_max} bytes (limits.output_bytes_max); ask for less at once");
    Error { code: Code::TooBig, text: text.into(), happened: Happened::Maybe }
}
