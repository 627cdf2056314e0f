//! GoFlow.
pub mod clock;
pub mod command;
pub mod dispatch;
pub mod error;
pub mod forward;
pub mod job;
pub mod resp;
pub mod shard;
