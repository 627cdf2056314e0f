//! Clients that wait for a job: one [`Ticket`] each, parked in every lane that may serve it.
//!
//! A lane claims a ticket by compare-and-swap before it asks its shard for a job on the ticket's behalf, so that two
//! lanes never take a job for one client. What follows is the whole protocol, and `tests::no_job_sits_unseen` searches
//! all its interleavings for one ticket over two lanes:
//!
//! ```text
//!             claim (one lane wins)              the shard had jobs
//!   waiting ───────────────────────► claimed ───────────────────────► over: the jobs go to the client
//!      ▲                                │
//!      └── the shard had none: back to the front of this lane's line, *and every other lane of the
//!          ticket is nudged*, since it may have passed the ticket over while it was claimed here
//! ```
//!
//! A shard that thinks too long loses the claim in the same way, so that a hung shard keeps nobody from a job elsewhere;
//! the jobs that it finds at last are delivered under a new claim, or go back. A client that hangs up, or whose time is
//! up, ends its ticket; jobs that a lane finds for it after that go back.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::lane::{Lane, Leased};
use super::post::{self, Reply};
use crate::clock::Millis;
use crate::job::Name;

const WAITING: u8 = 0;
const CLAIMED: u8 = 1;
const OVER: u8 = 2;

/// What a waiting client asked for, and how to answer it.
pub struct Ticket {
    state: AtomicU8,
    answer: Mutex<Option<Reply<Leased>>>,
    pub count: usize,
    pub lease_ms: Millis,
    pub worker: Bytes,
    /// Where else the ticket is parked: all its queues in all its lanes.
    queues: Vec<Name>,
    lanes: Vec<Arc<Lane>>,
}

/// The client's end of a ticket. Dropping it ends the ticket.
pub struct Waiter {
    ticket: Arc<Ticket>,
    answer: oneshot::Receiver<Leased>,
}

impl Ticket {
    /// Parks a new ticket for `queues` in `lanes`; each lane then serves it as soon as it can.
    pub fn park(queues: Vec<Name>, lanes: Vec<Arc<Lane>>, count: usize, lease_ms: Millis, worker: Bytes) -> Waiter {
        let (reply, answer) = post::reply();
        let ticket = Arc::new(Ticket {
            state: AtomicU8::new(WAITING),
            answer: Mutex::new(Some(reply)),
            count,
            lease_ms,
            worker,
            queues,
            lanes,
        });
        for lane in &ticket.lanes {
            for queue in &ticket.queues {
                lane.park(queue.clone(), ticket.clone());
            }
        }
        Waiter { ticket, answer }
    }

    /// Takes the ticket for one lane; false when another has it or it is over.
    pub fn claim(&self) -> bool {
        self.state.compare_exchange(WAITING, CLAIMED, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    pub fn is_over(&self) -> bool {
        self.state.load(Ordering::Acquire) == OVER
    }

    /// Ends a claim that found jobs. Jobs for a client that is gone go back by their hold.
    pub fn deliver(&self, leased: Leased) {
        self.state.store(OVER, Ordering::Release);
        let reply = self.answer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(reply) = reply {
            // Where the client is gone it is dropped, and its hold releases the jobs.
            reply.send(leased);
        }
    }

    /// Ends a claim that found nothing; false when the client is gone meanwhile and the ticket is over.
    pub fn unclaim(&self, from: &Lane) -> bool {
        let waits = self.state.compare_exchange(CLAIMED, WAITING, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if waits {
            for lane in self.lanes.iter().filter(|lane| lane.index() != from.index()) {
                for queue in &self.queues {
                    lane.nudge(queue);
                }
            }
            // The same lane may hold jobs of the ticket's other queues.
            if self.queues.len() > 1 {
                for queue in &self.queues {
                    from.nudge(queue);
                }
            }
        }
        waits
    }
}

impl Waiter {
    /// Resolves when a lane found jobs. `None` cannot happen while a lane lives.
    pub async fn jobs(&mut self) -> Option<Leased> {
        (&mut self.answer).await.ok()
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.ticket.state.store(OVER, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    /// One ticket over two lanes as a transition system, small enough to search whole. Each lane: jobs on its shard,
    /// what it believes (must it look?), and where it is in serving the ticket.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    struct World {
        ticket: u8, // 0 waiting, 1 claimed by lane 0, 2 claimed by lane 1, 3 over
        jobs: [u8; 2],
        /// The lane will look at its line again (a wake-up, a nudge, or a known ready job it has not acted on).
        hot: [bool; 2],
        /// The lane asked its shard for the ticket and found this many; `None`: it is not asking.
        asking: [Option<bool>; 2],
        /// The lane let the ticket go while it still asks.
        late: [bool; 2],
        /// Jobs yet to be enqueued by somebody, and jobs that another worker will take.
        arrivals: [u8; 2],
        thefts: [u8; 2],
    }

    fn steps(world: World, nudge: bool) -> Vec<World> {
        let mut next = Vec::new();
        for lane in 0..2 {
            let other = 1 - lane;
            if world.arrivals[lane] > 0 {
                let mut w = world;
                w.arrivals[lane] -= 1;
                w.jobs[lane] += 1;
                w.hot[lane] = true;
                next.push(w);
            }
            if world.thefts[lane] > 0 && world.jobs[lane] > 0 {
                let mut w = world;
                w.thefts[lane] -= 1;
                w.jobs[lane] -= 1;
                next.push(w);
            }
            if world.hot[lane] && world.asking[lane].is_none() {
                let mut w = world;
                w.hot[lane] = false;
                if world.ticket == 0 {
                    w.ticket = 1 + lane as u8;
                    w.asking[lane] = Some(false);
                }
                // Else the ticket is passed over: claimed elsewhere, or over.
                next.push(w);
            }
            if let Some(false) = world.asking[lane] {
                let mut w = world;
                match (world.jobs[lane] > 0, world.late[lane], world.ticket) {
                    (false, _, _) => w.asking[lane] = Some(true),
                    (true, true, 1..) => {
                        // Claimed elsewhere or over: the job goes back, and the lane hears that there is one.
                        (w.asking[lane], w.late[lane]) = (None, false);
                        w.hot[lane] = true;
                    }
                    (true, _, _) => {
                        w.jobs[lane] -= 1;
                        w.ticket = 3;
                        (w.asking[lane], w.late[lane]) = (None, false);
                    }
                }
                next.push(w);
                if !world.late[lane] {
                    let mut w = world;
                    w.late[lane] = true;
                    w.ticket = 0;
                    w.hot[other] |= nudge;
                    next.push(w);
                }
            }
            if let Some(true) = world.asking[lane] {
                let mut w = world;
                (w.asking[lane], w.late[lane]) = (None, false);
                if !world.late[lane] {
                    w.ticket = 0;
                    w.hot[other] |= nudge;
                }
                next.push(w);
            }
        }
        next
    }

    /// Searches every reachable state; returns how many there are and how many are stuck: nothing can happen any more,
    /// a job is ready, and the ticket waits.
    fn search(nudge: bool) -> (usize, usize) {
        let mut seen = HashSet::new();
        let mut open = Vec::new();
        for (arrivals, thefts) in [([1, 1], [1, 1]), ([2, 1], [1, 1]), ([1, 2], [2, 0]), ([2, 2], [1, 2])] {
            let (ticket, jobs, hot) = (0, [0; 2], [true; 2]);
            open.push(World { ticket, jobs, hot, asking: [None; 2], late: [false; 2], arrivals, thefts });
        }
        let mut stuck = 0;
        while let Some(world) = open.pop() {
            if !seen.insert(world) {
                continue;
            }
            let next = steps(world, nudge);
            let moves_on =
                next.iter().any(|w| w.jobs == world.jobs || w.ticket != world.ticket || w.arrivals != world.arrivals);
            if !moves_on && world.ticket == 0 && world.jobs != [0, 0] {
                stuck += 1;
            }
            open.extend(next);
        }
        (seen.len(), stuck)
    }

    #[test]
    fn no_job_sits_unseen() {
        let (states, stuck) = search(true);
        assert!(states > 500, "the search covered only {states} states");
        assert_eq!(stuck, 0);
    }

    #[test]
    fn without_the_nudge_the_search_finds_stuck_jobs() {
        assert!(search(false).1 > 0);
    }
}
