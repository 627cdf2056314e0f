//! GoFlow: a sharded job queue that any Redis client can use.
//!
//! The floors, from the top; a file imports only from floors below it:
//!
//! ```text
//! 5 server config cli main      wiring, checked configuration, subcommands
//! 4 session process clients     one client; what all share; the connections
//!   http                        metrics, health, HTTP API
//! 3 execute forward             plans meet shards; ordinary commands meet servers
//! 2 command · dispatch          rows and plans · lanes, tickets, placement (neither knows the other)
//! 1 shard                       memory, embedded, redis behind one seam
//! 0 error clock job resp metrics
//! ```
//!
//! `ARCHITECTURE.md` tells the way of a request, and where each law is kept.

pub mod cli;
pub mod clients;
pub mod clock;
pub mod command;
pub mod config;
pub mod dispatch;
pub mod error;
pub mod execute;
pub mod forward;
pub mod http;
pub mod job;
pub mod metrics;
pub mod process;
pub mod resp;
pub mod server;
pub mod session;
pub mod shard;
