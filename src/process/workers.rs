//! `GOFLOW.WORKERS`: the worker sessions that shards know, put together by name with the connections that they have here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

use super::Process;
use crate::clock::UnixMs;
use crate::dispatch::bound::worker_name;
use crate::dispatch::lane::Lane;
use crate::error::Result;
use crate::job::Name;
use crate::resp::reply::Reply;
use crate::shard::{Action, Op, Outcome, PAGE_JOBS_MAX, SessionView};

/// Sessions of one queue and shard that are looked at.
const SESSIONS_SEEN_MAX: usize = 10_000;

/// One session, on all shards and here.
#[derive(Default)]
struct Shown {
    connections: Vec<u64>,
    leased: u64,
    held: Vec<Reply>,
}

impl Process {
    /// A page of the sessions by their names. An error only when no shard answers.
    pub(super) async fn show_workers(&self, queue: Option<Name>, offset: u64, count: u64) -> Result<Reply> {
        let mut all: BTreeMap<(bool, Bytes), Shown> = BTreeMap::new();
        let place = |key: Bytes| (worker_name(&key).is_none(), key);
        for (key, connections) in self.workers.connections() {
            all.entry(place(key)).or_default().connections = connections;
        }
        let (mut failure, mut answered) = (None, false);
        for lane in &self.dispatcher.map().lanes {
            match sessions_of(lane, queue.as_ref()).await {
                Ok(found) => {
                    answered = true;
                    for (queue, now, view) in found {
                        let shown = all.entry(place(view.session.clone())).or_default();
                        shown.leased += view.leased;
                        shown.held.push(held(&queue, lane.name(), now, &view));
                    }
                }
                Err(error) => failure = Some(error),
            }
        }
        if let Some(error) = failure.filter(|_| !answered) {
            return Err(error);
        }
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        let page = all.into_iter().skip(skip).take(usize::try_from(count).unwrap_or(usize::MAX));
        Ok(Reply::Array(page.map(|((_, key), shown)| shown.reply(&key)).collect()))
    }
}

impl Shown {
    fn reply(self, key: &Bytes) -> Reply {
        let connections = self.connections.into_iter().map(Reply::count).collect();
        Reply::Map(vec![
            (Reply::text("worker"), worker_name(key).map_or(Reply::Null, Reply::Bulk)),
            (Reply::text("connections"), Reply::Array(connections)),
            (Reply::text("leased"), Reply::count(self.leased)),
            (Reply::text("held"), Reply::Array(self.held)),
        ])
    }
}

/// The sessions that a shard knows, with their queues and the shard's clock.
async fn sessions_of(lane: &Arc<Lane>, queue: Option<&Name>) -> Result<Vec<(Name, UnixMs, SessionView)>> {
    let queues = match queue {
        Some(queue) => vec![queue.clone()],
        None => lane.shard().queues().await?,
    };
    let mut found = Vec::new();
    for queue in queues {
        // A session that is kept moves to the end of the line, perhaps between two pages: none is shown twice.
        let mut seen = BTreeSet::new();
        for offset in (0..SESSIONS_SEEN_MAX).step_by(PAGE_JOBS_MAX) {
            let action = Action::Sessions { offset: offset as u64, count: PAGE_JOBS_MAX as u64 };
            lane.room().await?;
            let outcome = lane.submit(Op { queue: queue.clone(), action }, 0).await;
            let Outcome::Sessions(now, page) = outcome.unwrap_or_else(|_| Ok(Outcome::Done))? else { break };
            let is_last = page.len() < PAGE_JOBS_MAX;
            let fresh = page.into_iter().filter(|view| seen.insert(view.session.clone()));
            found.extend(fresh.map(|view| (queue.clone(), now, view)));
            if is_last {
                break;
            }
        }
    }
    Ok(found)
}

fn held(queue: &Name, shard: &str, now: UnixMs, view: &SessionView) -> Reply {
    let ago = |at: UnixMs| Reply::count(now.saturating_sub(at));
    Reply::Map(vec![
        (Reply::text("queue"), Reply::bulk(queue.as_str())),
        (Reply::text("shard"), Reply::bulk(shard)),
        (Reply::text("leased"), Reply::count(view.leased)),
        (Reply::text("held_ms"), ago(view.since)),
        (Reply::text("oldest_ms"), view.oldest_at.map_or(Reply::Null, ago)),
        (Reply::text("proxies"), Reply::count(view.keepers)),
        (Reply::text("ends_in_ms"), Reply::count(view.until.saturating_sub(now))),
    ])
}
