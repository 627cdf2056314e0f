//! GoFlow: a sharded job queue that any Redis client can use.
//!
//! The floors, from the top; a file imports only from floors below it, and `tests/tidy.rs` enforces it:
//!
//! ```text
//! 7 server config cli main          wiring, checked configuration, subcommands
//! 6 session http                    one client; metrics, health, jobs over HTTP
//! 5 process                         what all sessions share
//! 4 execute clients alert           plans meet lanes; the connections; telling people of deaths
//! 3 forward                         ordinary commands meet servers
//! 2 command · dispatch              rows and plans · lanes, tickets, placement
//! 1 shard                           memory, embedded, redis behind one seam
//! 0 error clock job resp metrics    the words
//! ```
//!
//! `ARCHITECTURE.md` tells the way of a request, and where each law is kept.

pub mod alert;
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
