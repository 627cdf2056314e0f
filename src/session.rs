//! One client: bytes in, replies out in the order of the requests.
//!
//! The session parses what was read, plans each request and starts it; answers stand in a line and the one at its head
//! is written when it is resolved. Several requests of one connection are in flight together, but for an answer that
//! takes several steps or waits: what is behind it is not started before it is done.
//!
//! Promises: exactly one reply per request, in order; a client that hangs up while it waits is noticed then; jobs that
//! were taken for a client and not written to its socket go back uncounted; neither input, answers in flight nor output
//! grow beyond their bounds: at a bound the session stops reading; what is bound to the connection is given back at its end.
//! Which later request shows that a delivery was read is decided here; what follows from it is `dispatch/bound.rs`.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::task::{JoinHandle, unconstrained, yield_now};

use crate::clients::{Peer, Unblock};
use crate::command::ordinary;
use crate::command::{self, Acquire, Connection, Context, Dequeue, Plan, ReplyMode};
use crate::dispatch::bound::{Binding, Membership};
use crate::dispatch::turnstile::Claim;
use crate::error::{Code, Error};
use crate::execute::durable::{self, Unacked};
use crate::execute::{Answer, Asker, Done, Keep, execute};
use crate::forward::conversation::Conversation;
use crate::forward::{Request, Ways};
use crate::job::{Lease, parse_receipt};
use crate::process::settings::Settings;
use crate::process::slowlog::Slow;
use crate::process::{Process, WRONG_PASS_REST};
use crate::resp::reply::{Protocol, Reply};
use crate::resp::request::{Bounds, Parsed, Parser};
use crate::shard::redis::link::{Backlog, too_big};
use crate::shard::{Action, Deed, Op};

/// Most requests of one connection in flight; fewer where their replies are large.
const PIPELINE_MAX: usize = 1_024;
/// So many before anything is known of their size.
const PIPELINE_FIRST: usize = 64;
/// Most locks and slots that one connection holds for as long as it lives.
const BONDS_MAX: usize = 1_000;
/// While this much output is unsent, no further request is started.
const OUTPUT_PAUSE: usize = 256 << 10;
/// While a client waits, so much of what it sends behind is read, to notice when it hangs up.
const READ_AHEAD: usize = 64 << 10;
/// A client that sends more after it has waited this long for jobs may have given up; one that sends many requests
/// together does not wait so long in between.
const ABANDONED_AFTER: Duration = Duration::from_millis(50);
/// Room for one read: at first, and at most.
const READ_MIN: usize = 4 << 10;
const READ_MAX: usize = 64 << 10;
/// An output buffer that was larger is given back once it is sent.
const OUTPUT_KEPT: usize = 16 << 10;

/// Serves one connection until it ends.
pub async fn serve<S: AsyncRead + AsyncWrite + Unpin>(socket: S, peer: Arc<Peer>, process: Arc<Process>) {
    let _registered = Registered { id: peer.id, process: process.clone() };
    let mut session = Session::new(socket, peer.clone(), process);
    if let Err(error) = std::future::poll_fn(|context| session.poll(context)).await {
        tracing::debug!(client = peer.id, %error, "connection ended");
    }
}

/// A client that is counted until it is gone, however its session ends.
struct Registered {
    id: u64,
    process: Arc<Process>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.process.clients.forget(self.id);
    }
}

/// A request on its way, with the protocol it was sent under.
struct Pending {
    answer: Answer,
    protocol: Protocol,
    mute: bool,
    what: What,
    began: Instant,
    /// It has waited for something that may never come.
    has_waited: bool,
    /// What the jobs that it brings are bound to.
    binding: Option<Binding>,
}

/// What a request is, for those who count and time it.
#[derive(Clone, Default)]
struct What {
    /// The place of its command among the metrics: the table's rows, then the ordinary ones.
    command: Option<usize>,
    /// The queue, lock or semaphore.
    subject: Bytes,
    words: usize,
}

impl What {
    fn name(&self) -> &'static str {
        let Some(place) = self.command else { return "" };
        let rows = command::rows();
        let ordinary = || ordinary::ROWS.get(place.saturating_sub(rows.len())).map(|row| row.name);
        rows.get(place).map(|row| row.spec.name).or_else(ordinary).unwrap_or_default()
    }
}

/// How far the end of the process has come with a session. What a client had sent by then is answered: the runtime is let look
/// at the sockets once, what it found is read (at most [`READ_AHEAD`]), and nothing that comes later is.
enum Drain {
    No,
    /// Another task of this thread was let run before and after that.
    Looking(JoinHandle<()>),
    /// Until nothing is left there, or so many bytes were received.
    LastRead(u64),
    /// The connection closes when what was read is answered; nobody waits.
    Over,
}

struct Session<S> {
    socket: S,
    peer: Arc<Peer>,
    process: Arc<Process>,
    settings: Arc<Settings>,
    settings_version: u64,
    asker: Asker,
    context: Context,
    conversation: Conversation,
    authenticated: bool,
    /// The replies of shards that this session has not taken.
    backlog: Arc<Backlog>,
    /// How large the replies were lately.
    reply_bytes: usize,
    parser: Parser,
    words: Vec<Bytes>,
    input: BytesMut,
    /// The most that was reserved for `input` since it was last given back.
    input_size: usize,
    read_size: usize,
    /// Bytes ever read.
    received: u64,
    input_ended: bool,
    /// No further request is parsed; the connection closes when its answers are out.
    closing: bool,
    drain: Drain,
    pending: VecDeque<Pending>,
    output: BytesMut,
    /// The largest that `output` was since it was last empty; its own capacity shrinks as it is sent.
    output_size: usize,
    /// Bytes ever written to the socket, and what is settled once so many are out.
    written: u64,
    holds: VecDeque<(u64, Vec<Keep>)>,
    /// Elements of durable lists that the client has and has not shown to have worked on.
    unacked: Unacked,
    /// Locks and slots that are held as long as the connection lives, by their tokens.
    bonds: HashMap<u64, Claim>,
    membership: Membership,
    reply_mode: ReplyMode,
    /// The request that is being started.
    what: What,
    /// When the socket was last looked at: the time of all requests that came then.
    now: Instant,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Session<S> {
    fn new(socket: S, peer: Arc<Peer>, process: Arc<Process>) -> Session<S> {
        let (settings_version, settings) = (process.settings_version(), process.settings());
        let authenticated = !settings.auth.is_needed();
        let bounds = if authenticated { settings.bounds } else { Bounds::UNAUTHENTICATED };
        let bell = peer.clone();
        let ways = Ways::of_thread(&process.forwarding);
        let wake = peer.clone();
        let bytes_max = process.forwarding.reply_bytes_max;
        let backlog = Backlog::new(bytes_max, Box::new(move || wake.waker.wake()));
        Session {
            socket,
            conversation: Conversation::new(ways, peer.id, Arc::new(move || bell.waker.wake()), backlog.clone()),
            backlog,
            reply_bytes: bytes_max / 2 / PIPELINE_FIRST,
            asker: Asker { session: peer.id, block_ms_max: settings.limits.block_ms_max },
            context: Context { protocol: Protocol::Resp2, client_id: peer.id, limits: settings.limits.clone() },
            membership: Membership::new(process.workers.clone(), peer.id),
            peer,
            process,
            settings,
            settings_version,
            authenticated,
            parser: Parser::new(bounds),
            words: Vec::new(),
            input: BytesMut::new(),
            input_size: 0,
            read_size: READ_MIN,
            received: 0,
            input_ended: false,
            closing: false,
            drain: Drain::No,
            pending: VecDeque::new(),
            output: BytesMut::new(),
            output_size: 0,
            written: 0,
            holds: VecDeque::new(),
            unacked: Unacked::default(),
            bonds: HashMap::new(),
            reply_mode: ReplyMode::On,
            what: What::default(),
            now: Instant::now(),
        }
    }

    /// Does what can be done now; ready when the connection has ended.
    fn poll(&mut self, context: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        self.peer.waker.register(context.waker());
        self.follow_drain(context);
        loop {
            if self.peer.is_killed() {
                return Poll::Ready(Ok(()));
            }
            if self.backlog.is_over() {
                let bytes_max = self.process.forwarding.reply_bytes_max;
                tracing::info!(client = self.peer.id, bytes_max, "a client that does not read its replies is dropped");
                return Poll::Ready(Err(io::Error::other("too many unread replies")));
            }
            self.now = Instant::now();
            self.unacked.poll(context);
            // Looked at before its answer is, so that a client that is gone is not given what it waited for.
            if matches!(self.pending.front(), Some(Pending { answer: Answer::Waiting(..), .. })) {
                if let Poll::Ready(Err(error)) = self.read(context) {
                    return Poll::Ready(Err(error));
                }
                if self.input_ended {
                    return Poll::Ready(Ok(()));
                }
            }
            self.resolve(context);
            // A request that was answered at once is written in the same round, and lets those behind it start.
            while self.start_requests() {
                self.resolve(context);
            }
            if !self.take_messages() {
                return Poll::Ready(Err(io::Error::other("a subscriber that does not read")));
            }
            let was_full = self.output.len() >= OUTPUT_PAUSE;
            match self.flush(context) {
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                // What the full output held up goes on.
                Poll::Ready(Ok(())) if was_full => continue,
                Poll::Ready(Ok(())) | Poll::Pending => {}
            }
            let is_last = self.closing || self.input_ended || self.is_drained();
            if is_last && self.pending.is_empty() && self.output.is_empty() {
                return Poll::Ready(Ok(()));
            }
            if self.input_ended && matches!(self.pending.front(), Some(Pending { answer: Answer::Waiting(..), .. })) {
                return Poll::Ready(Ok(()));
            }
            match self.read(context) {
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(())) => match self.drain {
                    Drain::LastRead(end) if self.received >= end => self.drain = Drain::Over,
                    _ => {}
                },
                Poll::Pending if matches!(self.drain, Drain::LastRead(_)) => self.drain = Drain::Over,
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn follow_drain(&mut self, context: &mut TaskContext<'_>) {
        if matches!(self.drain, Drain::No) && self.process.draining.load(Ordering::Relaxed) {
            self.drain = Drain::Looking(tokio::spawn(yield_now()));
        }
        if let Drain::Looking(turn) = &mut self.drain
            && Pin::new(turn).poll(context).is_ready()
        {
            self.drain = Drain::LastRead(self.received + READ_AHEAD as u64);
        }
    }

    fn is_drained(&self) -> bool {
        matches!(self.drain, Drain::Over)
    }

    /// Writes the answers at the head of the line that are there.
    fn resolve(&mut self, context: &mut TaskContext<'_>) {
        let nobody_waits = self.closing || self.is_drained();
        // Who waits already goes on behind a full output: it may stand in front of others.
        while (self.output.len() < OUTPUT_PAUSE || self.peer.blocked.load(Ordering::Relaxed))
            && let Some(pending) = self.pending.front_mut()
        {
            let waits = matches!(pending.answer, Answer::Waiting(..));
            let unblock = nobody_waits.then_some(Unblock::Timeout).or_else(|| self.peer.take_unblock());
            if waits && let Some(how) = unblock {
                match how {
                    Unblock::Timeout => pending.answer.end_wait(),
                    Unblock::Error => {
                        let text = "UNBLOCKED client unblocked via CLIENT UNBLOCK".into();
                        pending.answer = Answer::reply(Reply::RawError(text));
                    }
                }
            }
            pending.has_waited |= waits;
            let Poll::Ready(done) = pending.answer.poll(context) else {
                let still_waits = matches!(pending.answer, Answer::Waiting(..));
                self.peer.blocked.store(still_waits, Ordering::Relaxed);
                return;
            };
            if pending.has_waited {
                self.peer.blocked.store(false, Ordering::Relaxed);
            }
            let (protocol, mute) = (pending.protocol, pending.mute);
            let mut binding = None;
            if let Some(pending) = self.pending.pop_front() {
                self.count(&pending, &done);
                let waited = self.now.saturating_duration_since(pending.began);
                binding = pending.binding.map(|binding| (binding, waited));
            }
            let before = self.output.len();
            self.write(done, protocol, mute, binding);
            let size = self.output.len() - before;
            // Forgotten slowly: large ones among small ones are seldom alone.
            self.reply_bytes = size.max(self.reply_bytes - self.reply_bytes.div_ceil(1_024)).max(1);
        }
    }

    /// How many requests may be in flight, so that replies as large as those before fit into half of what may wait.
    fn window(&self) -> usize {
        (self.process.forwarding.reply_bytes_max / 2 / self.reply_bytes).clamp(1, PIPELINE_MAX)
    }

    /// Counts an answer that is there. Its time ends when the socket was last looked at, which is when it was asked for it.
    fn count(&self, pending: &Pending, done: &Done) {
        match done {
            Done::Reply(Reply::Error(error)) => self.process.metrics.error(error.code),
            Done::Reply(Reply::RawError(_)) => self.process.metrics.error(Code::Err),
            Done::Reply(Reply::Raw(bytes)) if bytes.first() == Some(&b'-') => {
                self.process.metrics.error(Code::of_reply(bytes));
            }
            _ => {}
        }
        let Some(place) = pending.what.command else { return };
        let took = self.now.saturating_duration_since(pending.began);
        self.process.metrics.command(place, took);
        if took >= self.settings.slow && !pending.has_waited {
            let What { subject, words, .. } = pending.what.clone();
            self.process.slowlog.note(Slow { command: pending.what.name(), subject, words, took, peer: &self.peer });
        }
    }

    fn write(&mut self, done: Done, protocol: Protocol, mute: bool, binding: Option<(Binding, Duration)>) {
        if mute {
            // The client asked not to hear the answer, so jobs in it would be lost to it: dropped, they go back.
            return;
        }
        let before = self.output.len();
        let bytes_max = self.process.forwarding.reply_bytes_max;
        let mut holds = done.within(bytes_max).write(protocol, &mut self.output);
        if self.output.len() - before > bytes_max {
            // What was taken for it goes back.
            self.output.truncate(before);
            Reply::Error(too_big(bytes_max)).encode(protocol, &mut self.output);
            return;
        }
        if let Some((binding, waited)) = binding {
            let more_came = !self.input.is_empty() || !self.pending.is_empty();
            let is_doubtful = more_came && waited >= ABANDONED_AFTER;
            holds = holds.into_iter().map(|keep| keep.bound(&binding, is_doubtful)).collect();
        }
        if !holds.is_empty() {
            self.holds.push_back((self.written + self.output.len() as u64, holds));
        }
    }

    /// Parses and starts what was read, as far as the bounds and a waiting answer allow; false when that was nothing.
    fn start_requests(&mut self) -> bool {
        let mut started = false;
        while !self.closing
            && self.pending.len() < self.window()
            && self.output.len() < OUTPUT_PAUSE
            && !self.pending.back().is_some_and(|pending| pending.answer.holds_back())
        {
            let mut words = std::mem::take(&mut self.words);
            let at = self.received.saturating_sub(self.input.len() as u64);
            match self.parser.next(&mut self.input, &mut words) {
                Ok(Parsed::Request) => {
                    if self.membership.has_unread() {
                        let (named, ends) = named_leases(&words);
                        self.membership.note_request(at, &named, ends);
                    }
                    self.unacked.next(at);
                    self.start(&words);
                    started = true;
                }
                Ok(Parsed::Incomplete) => {
                    self.words = words;
                    break;
                }
                Err(error) => {
                    self.push(Answer::reply(error.reply()));
                    self.closing = true;
                    started = true;
                }
            }
            self.words = words;
        }
        started
    }

    /// Puts the answer to the request that is being started in line.
    fn push(&mut self, answer: Answer) {
        let mute = match self.reply_mode {
            ReplyMode::On => false,
            ReplyMode::Off => true,
            ReplyMode::Skip => {
                self.reply_mode = ReplyMode::On;
                true
            }
        };
        let protocol = self.context.protocol;
        let what = std::mem::take(&mut self.what);
        self.pending.push_back(Pending {
            answer,
            protocol,
            mute,
            what,
            began: self.now,
            has_waited: false,
            binding: None,
        });
    }

    /// Moves messages of subscriptions to the output; false when the client fell too far behind.
    fn take_messages(&mut self) -> bool {
        match self.conversation.inbox() {
            Some(inbox) if self.output.len() < OUTPUT_PAUSE => inbox.drain(&mut self.output),
            _ => true,
        }
    }

    fn start(&mut self, words: &[Bytes]) {
        let protocol = self.context.protocol;
        self.what = What { words: words.len(), ..What::default() };
        if self.authenticated
            && let Some(place) = words.first().and_then(|name| ordinary::place(name))
        {
            let row = &ordinary::ROWS[place];
            self.what.command = Some(command::rows().len() + place);
            self.peer.note_command(row.name);
            if !self.settings.lists.is_empty()
                && let Some(rule) = durable::find(&self.settings.lists, row, words)
            {
                if let Some(refusal) = self.conversation.refuse(row.name, protocol) {
                    return self.push(refusal.into());
                }
                let (limits, dispatcher) = (&self.settings.limits, &self.process.dispatcher);
                let answer = durable::start(rule, row, words, limits, dispatcher, self.asker, &self.unacked);
                return self.push(answer);
            }
            let raw = self.parser.raw();
            let request = Request { row, words, raw, protocol, backlog: &self.backlog };
            let started = self.conversation.start(request);
            return self.push(started.into());
        }
        let row = match command::find(words) {
            Err(error) if self.authenticated => {
                let started = self.conversation.start_unknown(words, protocol, error);
                return self.push(started.into());
            }
            Err(_) => return self.push(Answer::reply(no_auth())),
            Ok(row) => row,
        };
        self.peer.note_command(row.name);
        self.what.command = Some(row.index);
        if row.names_queue_first() {
            self.what.subject = words.get(row.name_words).cloned().unwrap_or_default();
        }
        let intercepted = self.conversation.intercept(row.spec.name, words, protocol);
        let mut binding = None;
        let answer = match (self.authenticated || row.is_allowed_before_auth(), intercepted) {
            (false, _) => Answer::reply(no_auth()),
            (true, Some(started)) => started.into(),
            (true, None) => match row.plan(words, &self.context) {
                Err(error) => Answer::reply(error.into()),
                Ok(Plan::Connection(change)) => return self.change(change),
                Ok(Plan::Ask(ask)) => self.process.answer(ask),
                Ok(plan) => {
                    if matches!(plan, Plan::Dequeue(_)) {
                        self.peer.is_worker.store(true, Ordering::Relaxed);
                    }
                    self.loosen(&plan);
                    match self.join(&plan) {
                        Err(error) => Answer::reply(error.into()),
                        Ok(joined) => {
                            binding = joined;
                            execute(plan, &self.process.dispatcher, self.asker)
                        }
                    }
                }
            },
        };
        self.push(answer);
        if let Some(pending) = self.pending.back_mut() {
            pending.binding = binding;
        }
    }

    /// Makes the connection one of the worker session that the jobs of a DEQUEUE are to be bound to, and sees that it takes
    /// one more lock or slot to be bound to itself.
    fn join(&mut self, plan: &Plan) -> Result<Option<Binding>, Error> {
        match plan {
            Plan::Dequeue(Dequeue { queues, worker, bind: Some(run_ms), .. }) => {
                let map = self.process.dispatcher.map();
                self.membership.join(worker, queues, &map.lanes, *run_ms).map(Some)
            }
            Plan::Acquire(Acquire { bind: true, .. }) if self.bonds.len() >= BONDS_MAX => {
                // Some may have been released by another connection, or lost.
                let over = self.bonds.extract_if(|_, claim| claim.is_over());
                over.for_each(|(_, claim)| claim.settle());
                match self.bonds.len() < BONDS_MAX {
                    true => Ok(None),
                    false => Err(Error::bad(format!(
                        "{BONDS_MAX} locks and slots are bound to this connection already, which is the limit"
                    ))),
                }
            }
            _ => Ok(None),
        }
    }

    /// What the client releases itself is not bound to the connection any more.
    fn loosen(&mut self, plan: &Plan) {
        if let Plan::Op { op: Op { queue, action: Action::Keyed { kind, deed: Deed::Release { token } } }, .. } = plan
            && self.bonds.get(token).is_some_and(|claim| claim.is_of(*kind, queue))
            && let Some(claim) = self.bonds.remove(token)
        {
            claim.settle();
        }
    }

    /// What only the session can do.
    fn change(&mut self, change: Connection) {
        let reply = match change {
            Connection::Hello { protocol, auth, name } => self.hello(protocol, auth, name),
            Connection::Auth { user, password } => self.authenticate(&user, &password),
            Connection::SetName(name) => {
                self.peer.set_labels(|labels| labels.name = name);
                Reply::OK
            }
            Connection::GetName => match self.peer.labels().name {
                name if name.is_empty() => Reply::Null,
                name => Reply::Bulk(name),
            },
            Connection::SetInfo { field, value } => {
                let library_name = field.eq_ignore_ascii_case(b"lib-name");
                self.peer.set_labels(|labels| match library_name {
                    true => labels.lib_name = value,
                    false => labels.lib_version = value,
                });
                Reply::OK
            }
            Connection::Id => Reply::count(self.peer.id),
            Connection::Info => Reply::bulk(self.peer.line() + "\n"),
            Connection::List => Reply::bulk(self.process.clients.list()),
            Connection::Kill { id } if id == self.peer.id => {
                self.closing = true;
                Reply::Integer(1)
            }
            Connection::Kill { id } => Reply::Integer(i64::from(self.process.clients.kill(id))),
            Connection::Unblock { id, error } => {
                let how = if error { Unblock::Error } else { Unblock::Timeout };
                Reply::Integer(i64::from(self.process.clients.unblock(id, how)))
            }
            Connection::Reply(mode) => return self.set_reply_mode(mode),
            Connection::Reset => self.reset(),
            Connection::Quit => {
                self.unacked.quit();
                self.closing = true;
                Reply::OK
            }
        };
        if matches!(&reply, Reply::Error(error) if error.code == Code::WrongPass) {
            // Holds back what is behind it too, so that one connection cannot try passwords as fast as it can send.
            return self.push(Answer::Later(Box::pin(async move {
                tokio::time::sleep(WRONG_PASS_REST).await;
                Done::Reply(reply)
            })));
        }
        self.push(Answer::reply(reply));
    }

    fn set_reply_mode(&mut self, mode: ReplyMode) {
        // Only ON is answered; SKIP says nothing itself and silences the request after it.
        self.reply_mode = mode;
        if mode == ReplyMode::On {
            self.push(Answer::reply(Reply::OK));
        }
    }

    fn hello(&mut self, protocol: Option<Protocol>, auth: Option<(Bytes, Bytes)>, name: Option<Bytes>) -> Reply {
        if let Some((user, password)) = auth {
            let reply = self.authenticate(&user, &password);
            if reply != Reply::OK {
                return reply;
            }
        }
        if !self.authenticated {
            return Error::new(
                Code::NoAuth,
                "HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH <user> \
                 <pass> option can be used to authenticate the client and select the RESP protocol version at the same time",
            )
            .into();
        }
        if let Some(protocol) = protocol {
            self.context.protocol = protocol;
            self.peer.resp3.store(protocol == Protocol::Resp3, Ordering::Relaxed);
        }
        if let Some(name) = name {
            self.peer.set_labels(|labels| labels.name = name);
        }
        self.process.hello(self.context.protocol, self.peer.id)
    }

    /// Takes settings that were changed meanwhile. Who has authenticated stays so.
    fn follow_settings(&mut self) {
        let version = self.process.settings_version();
        if version != self.settings_version {
            (self.settings_version, self.settings) = (version, self.process.settings());
            self.context.limits = self.settings.limits.clone();
            self.asker.block_ms_max = self.settings.limits.block_ms_max;
            if self.authenticated {
                self.parser.set_bounds(self.settings.bounds);
            }
        }
    }

    fn authenticate(&mut self, user: &[u8], password: &[u8]) -> Reply {
        match self.settings.auth.check(user, password) {
            Ok(()) => {
                if !self.authenticated {
                    self.authenticated = true;
                    self.parser.set_bounds(self.settings.bounds);
                }
                Reply::OK
            }
            Err(error) => error.into(),
        }
    }

    fn reset(&mut self) -> Reply {
        let messages = self.conversation.reset();
        self.context.protocol = Protocol::Resp2;
        self.peer.resp3.store(false, Ordering::Relaxed);
        self.peer.set_labels(|labels| labels.name = Bytes::new());
        self.reply_mode = ReplyMode::On;
        self.authenticated = !self.settings.auth.is_needed();
        self.parser.set_bounds(if self.authenticated { self.settings.bounds } else { Bounds::UNAUTHENTICATED });
        Reply::Many(vec![messages, Reply::Simple("RESET")])
    }

    /// Sends what is written; pending while the socket is full.
    fn flush(&mut self, context: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        self.output_size = self.output_size.max(self.output.capacity());
        while !self.output.is_empty() {
            match Pin::new(&mut self.socket).poll_write(context, &self.output) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(count)) => {
                    self.output.advance(count);
                    self.written += count as u64;
                    self.process.bytes_out.fetch_add(count as u64, Ordering::Relaxed);
                }
            }
        }
        while let Some((end, _)) = self.holds.front()
            && *end <= self.written
            && let Some((_, holds)) = self.holds.pop_front()
        {
            for keep in holds {
                match keep {
                    Keep::Popped(popped) => self.unacked.put(popped, self.received),
                    Keep::Bound(hold, binding, is_doubtful) => {
                        let from = (!is_doubtful).then_some(self.received);
                        self.membership.note_written(hold, binding, from);
                    }
                    Keep::Grant(claim) if claim.is_bound() => drop(self.bonds.insert(claim.token(), claim)),
                    keep => keep.settle(),
                }
            }
        }
        if self.output_size > OUTPUT_KEPT && self.pending.is_empty() || self.output_size > 2 * OUTPUT_PAUSE {
            self.output = BytesMut::new();
            self.output_size = 0;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads once; ready when there is something new to look at.
    fn read(&mut self, context: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        self.follow_settings();
        let held_back = self.pending.back().is_some_and(|pending| pending.answer.holds_back());
        let full = self.pending.len() >= self.window() || self.output.len() >= OUTPUT_PAUSE;
        let enough = (held_back || full) && self.input.len() >= READ_AHEAD;
        if self.input_ended || enough || self.closing || self.is_drained() {
            return Poll::Pending;
        }
        if self.input.capacity() - self.input.len() < READ_MIN / 2 {
            self.input.reserve(self.read_size.max(self.parser.room_wanted(self.input.len())));
            self.input_size = self.input_size.max(self.input.capacity());
        }
        let room = self.input.capacity() - self.input.len();
        let mut reading = pin!(self.socket.read_buf(&mut self.input));
        let read = match self.drain {
            // However much this task has done in its turn, it is the last time that it looks.
            Drain::LastRead(_) => pin!(unconstrained(reading)).poll(context),
            _ => reading.as_mut().poll(context),
        };
        match read {
            Poll::Pending => {
                // An idle connection holds no more than a new one, whatever it has sent.
                if self.input_size > 2 * READ_MIN && self.input.is_empty() && self.pending.is_empty() {
                    self.input = BytesMut::new();
                    self.input_size = 0;
                }
                Poll::Pending
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(0)) => {
                self.input_ended = true;
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Ok(count)) => {
                if count == room {
                    self.read_size = (self.read_size * 2).min(READ_MAX);
                }
                self.received += count as u64;
                self.process.bytes_in.fetch_add(count as u64, Ordering::Relaxed);
                Poll::Ready(Ok(()))
            }
        }
    }
}

/// The leases that a request names by their receipts, and whether it ends them.
fn named_leases(words: &[Bytes]) -> (Vec<Lease>, bool) {
    let Some(name) = words.first() else { return (Vec::new(), false) };
    let is = |known: &str| name.eq_ignore_ascii_case(known.as_bytes());
    let ends = is("GOFLOW.ACK") || is("GOFLOW.FAIL") || is("GOFLOW.RELEASE");
    if !ends && !is("GOFLOW.PROGRESS") && !is("GOFLOW.EXTEND") {
        return (Vec::new(), false);
    }
    (words.iter().skip(2).filter_map(|word| parse_receipt(word).ok()).map(|(lease, _)| lease).collect(), ends)
}

fn no_auth() -> Reply {
    Error::new(Code::NoAuth, "Authentication required.").into()
}
