//! Clients that want a lock or a semaphore: the line in which those of this process wait, and what a grant is bound to.
//!
//! A waiter stands in the line of its object ([`Lines`], one for each lane). Only the first asks the shard; it asks again
//! when its lane hears that a holder let go, when the first holder's time is up, and now and then in any case. Who has
//! what it wanted, or gave up, makes room for the next, who asks at once.
//!
//! Promises: waiters are served in the order they came; a grant that does not reach its client, or whose bond ends, is
//! given back ([`Claim`]), behind the request that may have made it. Leaves the rules to the shard.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use dashmap::DashMap;
use foldhash::fast::RandomState;
use rand::Rng;
use tokio::sync::{Mutex, Notify};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::lane::Lane;
use crate::clock::Millis;
use crate::error::{Code, Error, Happened, Result};
use crate::job::{Name, TOKEN_MAX};
use crate::shard::{Action, Deed, Keyed, Op, Outcome};

/// The slow poll that stands behind wake-ups and timers.
const POLL_MS: std::ops::Range<u64> = 1_500..2_500;
/// How soon a shard that failed is asked again.
const RETRY_MS: std::ops::Range<u64> = 100..300;
/// How soon a renewal that failed is tried again.
const RENEW_AGAIN_MS: std::ops::Range<u64> = 50..150;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub kind: Keyed,
    pub name: Name,
    pub limit: u32,
    pub ttl_ms: Millis,
    pub owner: Bytes,
    /// 0: not at all.
    pub wait_ms: Millis,
    /// Held as long as the connection lives.
    pub bind: bool,
    /// The version of the shard map in which locks moved last.
    pub moved_in: u64,
}

#[derive(Default)]
struct Line {
    /// Fair: whoever came first has it first.
    turn: Mutex<()>,
    /// Rung when the object may be free; only the first in line listens.
    bell: Notify,
    waiting: AtomicUsize,
}

/// The lines of one lane's objects; there is one while somebody stands in it.
#[derive(Default)]
pub struct Lines(DashMap<(Keyed, Name), Arc<Line>, RandomState>);

impl Lines {
    /// Whoever is first in this line asks again.
    pub fn ring(&self, kind: Keyed, name: &Name) {
        if self.0.is_empty() {
            return;
        }
        if let Some(line) = self.0.get(&(kind, name.clone())) {
            line.bell.notify_one();
        }
    }

    pub fn ring_all(&self) {
        self.0.iter().for_each(|line| line.bell.notify_one());
    }

    /// How many wait, the first included.
    pub fn waiting(&self, kind: Keyed, name: &Name) -> usize {
        self.0.get(&(kind, name.clone())).map_or(0, |line| line.waiting.load(Ordering::Relaxed))
    }
}

/// A place in a line, until it is dropped.
struct Place<'a> {
    lines: &'a Lines,
    key: (Keyed, Name),
    line: Arc<Line>,
}

impl<'a> Place<'a> {
    fn take(lines: &'a Lines, kind: Keyed, name: &Name) -> Place<'a> {
        let key = (kind, name.clone());
        let entry = lines.0.entry(key.clone()).or_default();
        entry.waiting.fetch_add(1, Ordering::Relaxed);
        let line = entry.clone();
        Place { lines, key, line }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        // Decided under the lock of the map, so that nobody enters a line that is being removed.
        self.lines.0.remove_if(&self.key, |_, line| line.waiting.fetch_sub(1, Ordering::Relaxed) == 1);
    }
}

/// A token that holds an object or may hold it: dropped, it is given back, unless it is settled.
pub struct Claim {
    lane: Arc<Lane>,
    session: u64,
    kind: Keyed,
    name: Name,
    token: u64,
    bind: bool,
    /// The shard was asked for it and has not said no.
    stands: bool,
    renewal: Option<AbortHandle>,
}

impl std::fmt::Debug for Claim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Claim({:?} {})", self.kind, self.name)
    }
}

impl Claim {
    pub fn token(&self) -> u64 {
        self.token
    }

    pub fn is_of(&self, kind: Keyed, name: &Name) -> bool {
        self.kind == kind && self.name == *name
    }

    /// Whether what kept a bound one has ended: the shard said that the token holds nothing.
    pub fn is_over(&self) -> bool {
        self.renewal.as_ref().is_some_and(AbortHandle::is_finished)
    }

    /// Whether its connection keeps it.
    pub fn is_bound(&self) -> bool {
        self.bind
    }

    /// The client has it, or somebody else gives it back: from here its time decides.
    pub fn settle(mut self) {
        self.stands = false;
    }

    fn op(&self, deed: Deed) -> Op {
        Op { queue: self.name.clone(), action: Action::Keyed { kind: self.kind, deed } }
    }

    async fn ask(&mut self, wanted: &Wanted, waits: bool) -> Result<Outcome> {
        self.lane.room().await?;
        let Wanted { limit, ttl_ms, owner, moved_in, .. } = wanted.clone();
        let deed = Deed::Acquire { token: self.token, limit, ttl_ms, owner, waits, moved_in };
        let asked = self.lane.submit(self.op(deed), self.session);
        let may_stand = std::mem::replace(&mut self.stands, true);
        let outcome = asked.await.unwrap_or_else(|_| Err(lane_gone()));
        match &outcome {
            Ok(Outcome::NotFree { .. }) => self.stands = false,
            Err(error) if error.happened == Happened::No => self.stands = may_stand,
            _ => {}
        }
        outcome
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(renewal) = self.renewal.take() {
            renewal.abort();
        }
        if self.stands {
            // Under the same session, so that it stands behind the request that it undoes.
            self.lane.give_back(self.op(Deed::Release { token: self.token }), self.session);
        }
    }
}

/// Where the object has its home now, and the version of the shard map in which locks moved last; an error while it must not
/// be granted there.
pub type Home = Box<dyn Fn() -> Result<(Arc<Lane>, u64)> + Send + Sync>;

/// Asks for an object and waits for it as long as the client does, also over a change of its home; its fence and the claim to
/// it.
pub async fn acquire(home: Home, mut wanted: Wanted, session: u64) -> Result<Option<(u64, Claim)>> {
    let ends = Instant::now() + Duration::from_millis(wanted.wait_ms);
    let mut failure = None;
    loop {
        let lane;
        (lane, wanted.moved_in) = home()?;
        let mut claim = Claim {
            session,
            kind: wanted.kind,
            name: wanted.name.clone(),
            token: rand::rng().random_range(0..TOKEN_MAX),
            bind: wanted.bind,
            stands: false,
            renewal: None,
            lane,
        };
        let fence = match wanted.wait_ms {
            0 => match claim.ask(&wanted, false).await? {
                Outcome::Granted { fence } => fence,
                _ => return Ok(None),
            },
            _ => match tokio::time::timeout_at(ends, wait(&mut claim, &wanted, &home, &mut failure)).await {
                Ok(Ok(Some(fence))) => fence,
                Ok(Ok(None)) => continue,
                Ok(Err(error)) => return Err(error),
                Err(_) => return failure.map_or(Ok(None), Err),
            },
        };
        if claim.bind {
            let renewing = renew(claim.lane.clone(), wanted, claim.token);
            claim.renewal = Some(tokio::spawn(renewing).abort_handle());
        }
        return Ok(Some((fence, claim)));
    }
}

/// Stands in line until the object is granted; `None` when its home is another meanwhile. A shard that does not answer is asked
/// again; why it did not is noted.
async fn wait(claim: &mut Claim, wanted: &Wanted, home: &Home, failure: &mut Option<Error>) -> Result<Option<u64>> {
    let lane = claim.lane.clone();
    let place = Place::take(&lane.lines, wanted.kind, &wanted.name);
    let _turn = place.line.turn.lock().await;
    loop {
        let asked = match home() {
            Ok((now, _)) if !Arc::ptr_eq(&now, &lane) => return Ok(None),
            Ok(_) => claim.ask(wanted, true).await,
            Err(error) => Err(error),
        };
        let rest_ms = match asked {
            Ok(Outcome::Granted { fence }) => return Ok(Some(fence)),
            Ok(Outcome::NotFree { free_in }) => {
                *failure = None;
                (free_in + 1).min(random_ms(POLL_MS))
            }
            Ok(_) => return Err(Error::bad("the shard answered a claim with something else")),
            Err(error) if matches!(error.code, Code::ShardDown | Code::Overloaded) => {
                *failure = Some(error);
                random_ms(RETRY_MS)
            }
            Err(error) => return Err(error),
        };
        tokio::select! {
            () = place.line.bell.notified() => {}
            () = tokio::time::sleep(Duration::from_millis(rest_ms)) => {}
        }
    }
}

/// Keeps what is bound from running out, until it is aborted or the shard says that the token holds nothing.
async fn renew(lane: Arc<Lane>, wanted: Wanted, token: u64) {
    let Wanted { kind, name, ttl_ms, .. } = wanted;
    let mut rest_ms = ttl_ms / 3;
    loop {
        tokio::time::sleep(Duration::from_millis(rest_ms.max(1))).await;
        let op = Op { queue: name.clone(), action: Action::Keyed { kind, deed: Deed::Renew { token, ttl_ms } } };
        rest_ms = match lane.submit(op, 0).await {
            Ok(Ok(Outcome::Count(0))) | Err(_) => return,
            Ok(Ok(_)) => ttl_ms / 3,
            Ok(Err(_)) => random_ms(RENEW_AGAIN_MS),
        };
    }
}

fn random_ms(range: std::ops::Range<u64>) -> u64 {
    rand::rng().random_range(range)
}

fn lane_gone() -> Error {
    Error {
        code: Code::ShardDown,
        text: "the shard is shutting down; the write may have happened".into(),
        happened: Happened::Maybe,
    }
}
