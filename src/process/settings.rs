//! Settings that change while the process runs: read anew from where they came from, all or nothing.
//!
//! [`Reread`] is what only the wiring can do: find the file, the variables and the flags again and check them. What it finds
//! is compared with what is, so the answer names each setting that changed and each that waits for a restart. Sessions
//! take the new ones with what they next read.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Auth, Process};
use crate::command::Limits;
use crate::dispatch::layout::Layout;
use crate::dispatch::router::Strategy;
use crate::error::{Code, Error, Result};
use crate::execute::durable::Rule;
use crate::resp::reply::Reply;
use crate::resp::request::Bounds;
use crate::shard::Rules;

/// Settings of sessions and commands.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub limits: Arc<Limits>,
    pub bounds: Bounds,
    pub auth: Auth,
    /// Which lists are queues.
    pub lists: Vec<Rule>,
    /// A command that takes longer, waits apart, is named in the log.
    pub slow: Duration,
    pub connections_max: usize,
    /// What `CONFIG GET` shows: names and values.
    pub shown: Vec<(String, String)>,
}

/// A configuration that was read anew.
pub struct Fresh {
    pub settings: Settings,
    pub strategy: Strategy,
    pub rules: Rules,
    /// The shard map of the configuration, where it is newer than the one that is served.
    pub layout: Option<Layout>,
    /// Settings that are other ones now, and those of them that are taken with a restart only.
    pub changed: Vec<String>,
    pub waiting: Vec<String>,
}

/// Reads the configuration anew; an error says why it is not taken.
/// It is told the version of the shard map that is served.
pub type Reread = Box<dyn Fn(u64) -> std::result::Result<Fresh, String> + Send + Sync>;

impl Process {
    pub fn settings(&self) -> Arc<Settings> {
        self.settings.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Changes with each reload; read where a lock would cost too much.
    pub fn settings_version(&self) -> u64 {
        self.settings_version.load(Ordering::Acquire)
    }

    /// Reads the configuration anew and goes by it. One that is wrong changes nothing; a shard map that cannot be the next one
    /// now is proposed again and again.
    pub async fn reload(&self) -> Result<Reply> {
        let fresh = (self.reread)(self.dispatcher.version()).map_err(|why| {
            Error::new(Code::Err, format!("the configuration is not taken, and nothing was changed: {why}"))
        })?;
        let Fresh { settings, strategy, rules, layout, changed, waiting } = fresh;
        *self.settings.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Arc::new(settings);
        self.settings_version.fetch_add(1, Ordering::AcqRel);
        self.dispatcher.set_strategy(strategy);
        self.dispatcher.map().lanes.iter().for_each(|lane| lane.shard().set_rules(rules));
        tracing::info!(changed = changed.join(" "), restart = waiting.join(" "), "configuration reloaded");
        let names = |names: Vec<String>| Reply::Array(names.into_iter().map(Reply::bulk).collect());
        let mut reply = vec![(Reply::text("changed"), names(changed)), (Reply::text("restart"), names(waiting))];
        if let Some(layout) = layout {
            self.keeper.set_proposal(layout);
            if let Err(error) = self.keeper.propose().await {
                reply.push((Reply::text("map_waits"), Reply::bulk(error.to_string())));
            }
        }
        Ok(Reply::Map(reply))
    }
}
