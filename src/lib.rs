//! GoFlow.
pub mod cli;
pub mod clock;
pub mod command;
pub mod config;
pub mod dispatch;
pub mod error;
pub mod forward;
pub mod job;
pub mod metrics;
pub mod resp;
pub mod shard;
