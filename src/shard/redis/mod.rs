//! x
pub mod dial;
pub mod link;
