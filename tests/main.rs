//! The integration tests: one binary, one module for each kind of promise.
#![allow(clippy::unwrap_used, reason = "a test that meets what it did not expect should stop there")]

/// People hear of dead jobs once, not never and not ten thousand times, whoever is killed.
mod alerts;
/// At a bound the client is told which, and the rest goes on.
mod bounds;
/// Stock clients, unmodified: run for real, or replayed as they connect.
mod clients;
/// Every shard keeps every sentence of the contract, on every kind of server.
mod conformance;
/// Stock clients contend for locks and semaphores while proxies and shards are killed and paused.
mod contest;
/// What is under deploy/ fits this program and the programs that read it.
mod deploy;
/// Durable lists: killed workers and killed moves, the policies, and what is refused.
mod durable;
/// What is recorded agrees with what happened, for those who ask and those who listen.
mod events;
/// A shard fails in every way a server can: the others go on, and nothing needs a restart.
mod faults;
/// What a job costs does not depend on how many there are.
mod flat;
/// The flaws of the first GoFlow library, and which test shows that each cannot happen here.
mod flaws;
/// Proxies behind HAProxy are replaced under load.
mod fleet;
/// Ordinary commands: the replies of Redis, over one shard and over several.
mod forward;
/// What hostile clients send is taken as Redis takes it; parser and scanner meet any bytes.
mod frames;
/// Never two of a group at once, and in order, whoever is killed.
mod groups;
/// Metrics, health, readiness and the HTTP API over a real socket.
mod http;
/// The keyspace of a local shard against Redis itself.
mod keys;
/// Queue libraries that know nothing of GoFlow, unmodified, over one shard and over four.
mod libraries;
/// Rates and concurrency over shards and proxies, whoever is killed; full queues.
mod limits;
/// Never too many holders, whoever is killed; waiters in their order.
mod locks;
/// Lines of the log, slow commands, and never a payload or a secret.
mod logs;
/// Nothing that was acknowledged is lost, whoever is killed.
mod loss;
/// Random operations on each shard and on the pure rules at once give the same outcomes.
mod model;
/// What stands on the wire of a running process: hostile frames, splits, order, bounds, passwords.
mod protocol;
/// What a shard answered is there after a SIGKILL.
mod recovery;
/// protocol.md is what the command table says, and its examples are true.
mod reference;
/// Several proxies behave as one, and the strategies spread jobs as they say.
mod routing;
/// What one client may rely on while it waits, hangs up, or is drained.
mod session;
/// The shard map changes under way, on all proxies at once.
mod shardmap;
/// Real processes, a raw client, and waiting without sleeping.
#[allow(dead_code, reason = "a house for all tests: not every one of them uses every room")]
mod support;
/// The tree keeps its own rules: floors, headers, nothing left for later.
mod tidy;
/// Many workers that wait cost nearly nothing, and none of them waits while there is a job.
mod waiting;
/// Signed deliveries of other services become jobs, once; all others nothing.
mod webhook;
/// `goflow worker`: handlers in three languages, and every way in which one may end.
mod worker;
/// Worker sessions: bound jobs of workers that live, die, reconnect, time out and never answer.
mod workers;
