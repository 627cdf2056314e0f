//! GoFlow.
pub mod cli;
pub mod clients;
pub mod clock;
pub mod command;
pub mod config;
pub mod dispatch;
pub mod error;
pub mod execute;
pub mod forward;
pub mod job;
pub mod metrics;
pub mod process;
pub mod resp;
pub mod server;
pub mod session;
pub mod shard;
