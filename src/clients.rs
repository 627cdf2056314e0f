//! The connections of this process, by their number: what `CLIENT LIST`, `KILL` and `UNBLOCK` look at and act on.
//!
//! A session registers itself here for as long as it lives. Others reach it only through its [`Peer`]: they leave a
//! signal and wake it; the session's own task does the rest.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use dashmap::DashMap;
use foldhash::fast::RandomState;
use futures_util::task::AtomicWaker;

/// What others know of one connection.
pub struct Peer {
    pub id: u64,
    pub address: String,
    pub local: String,
    connected_at: Instant,
    /// `CLIENT SETNAME`, `SETINFO lib-name`, `SETINFO lib-ver`.
    pub labels: Mutex<Labels>,
    pub resp3: AtomicBool,
    pub blocked: AtomicBool,
    /// It has asked for jobs.
    pub is_worker: AtomicBool,
    /// Seconds since `connected_at` of the last request.
    active_at: AtomicU64,
    pub commands: AtomicU64,
    last_command: Mutex<&'static str>,
    killed: AtomicBool,
    unblock: AtomicU8,
    pub waker: AtomicWaker,
}

#[derive(Clone, Debug, Default)]
pub struct Labels {
    pub name: Bytes,
    pub lib_name: Bytes,
    pub lib_version: Bytes,
}

/// How `CLIENT UNBLOCK` ends a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unblock {
    /// As if its time were up.
    Timeout,
    /// With `-UNBLOCKED`.
    Error,
}

impl Peer {
    pub fn labels(&self) -> Labels {
        self.labels.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set_labels(&self, change: impl FnOnce(&mut Labels)) {
        change(&mut self.labels.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub fn is_killed(&self) -> bool {
        self.killed.load(Ordering::Relaxed)
    }

    /// Takes the order to end a wait, if there is one.
    pub fn take_unblock(&self) -> Option<Unblock> {
        if self.unblock.load(Ordering::Relaxed) == 0 {
            return None;
        }
        match self.unblock.swap(0, Ordering::Relaxed) {
            1 => Some(Unblock::Timeout),
            2 => Some(Unblock::Error),
            _ => None,
        }
    }

    pub fn note_command(&self, name: &'static str) {
        self.commands.fetch_add(1, Ordering::Relaxed);
        self.active_at.store(self.connected_at.elapsed().as_secs(), Ordering::Relaxed);
        *self.last_command.lock().unwrap_or_else(PoisonError::into_inner) = name;
    }

    /// One line of `CLIENT LIST`, in Redis's form: with every field that libraries look for, and 0 for what is not counted.
    pub fn line(&self) -> String {
        let Labels { name, lib_name, lib_version } = self.labels();
        let age = self.connected_at.elapsed().as_secs();
        let idle = age.saturating_sub(self.active_at.load(Ordering::Relaxed));
        let mut line = String::with_capacity(200);
        let _ = write!(
            line,
            "id={} addr={} laddr={} fd=-1 name={} age={age} idle={idle} flags={} db=0 sub=0 psub=0 ssub=0 multi=-1 qbuf=0 \
             qbuf-free=0 argv-mem=0 multi-mem=0 rbs=0 rbp=0 obl=0 oll=0 omem=0 tot-mem=0 events=r cmd={} user=default \
             redir=-1 resp={} lib-name={} lib-ver={} tot-cmds={}",
            self.id,
            self.address,
            self.local,
            String::from_utf8_lossy(&name),
            if self.blocked.load(Ordering::Relaxed) { 'b' } else { 'N' },
            self.last_command.lock().unwrap_or_else(PoisonError::into_inner),
            if self.resp3.load(Ordering::Relaxed) { 3 } else { 2 },
            String::from_utf8_lossy(&lib_name),
            String::from_utf8_lossy(&lib_version),
            self.commands.load(Ordering::Relaxed),
        );
        line
    }
}

/// All connections of the process.
pub struct Clients {
    peers: DashMap<u64, Arc<Peer>, RandomState>,
    next_id: AtomicU64,
    pub accepted: AtomicU64,
}

impl Default for Clients {
    fn default() -> Self {
        Clients { peers: DashMap::default(), next_id: AtomicU64::new(1), accepted: AtomicU64::new(0) }
    }
}

impl Clients {
    pub fn register(&self, address: String, local: String) -> Arc<Peer> {
        self.accepted.fetch_add(1, Ordering::Relaxed);
        let peer = Arc::new(Peer {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            address,
            local,
            connected_at: Instant::now(),
            labels: Mutex::default(),
            resp3: AtomicBool::new(false),
            blocked: AtomicBool::new(false),
            is_worker: AtomicBool::new(false),
            active_at: AtomicU64::new(0),
            commands: AtomicU64::new(0),
            last_command: Mutex::new("NULL"),
            killed: AtomicBool::new(false),
            unblock: AtomicU8::new(0),
            waker: AtomicWaker::new(),
        });
        self.peers.insert(peer.id, peer.clone());
        peer
    }

    pub fn forget(&self, id: u64) {
        self.peers.remove(&id);
    }

    pub fn count(&self) -> usize {
        self.peers.len()
    }

    pub fn blocked(&self) -> usize {
        self.peers.iter().filter(|peer| peer.blocked.load(Ordering::Relaxed)).count()
    }

    pub fn workers(&self) -> usize {
        self.peers.iter().filter(|peer| peer.is_worker.load(Ordering::Relaxed)).count()
    }

    /// The lines of `CLIENT LIST`, by number.
    pub fn list(&self) -> String {
        let mut peers: Vec<Arc<Peer>> = self.peers.iter().map(|peer| peer.clone()).collect();
        peers.sort_by_key(|peer| peer.id);
        peers.iter().map(|peer| peer.line() + "\n").collect()
    }

    /// Closes a connection; false when there is none of that number, or it is closing already.
    pub fn kill(&self, id: u64) -> bool {
        self.signal(id, |peer| !peer.killed.swap(true, Ordering::Relaxed))
    }

    /// Ends a wait; false when the client is not blocked.
    pub fn unblock(&self, id: u64, how: Unblock) -> bool {
        self.signal(id, |peer| {
            let is_blocked = peer.blocked.load(Ordering::Relaxed);
            if is_blocked {
                peer.unblock.store(if how == Unblock::Timeout { 1 } else { 2 }, Ordering::Relaxed);
            }
            is_blocked
        })
    }

    /// Lets every session look at what has changed for all of them.
    pub fn wake_all(&self) {
        self.peers.iter().for_each(|peer| peer.waker.wake());
    }

    /// Leaves an order with a client and wakes its session, unless `leave` says that there is nothing to do.
    fn signal(&self, id: u64, leave: impl FnOnce(&Peer) -> bool) -> bool {
        let Some(peer) = self.peers.get(&id).filter(|peer| leave(peer)) else { return false };
        peer.waker.wake();
        true
    }
}
