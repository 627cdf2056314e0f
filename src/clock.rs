//! Time as the code speaks of it: [`UnixMs`] for points and [`Millis`] for spans.
//!
//! What is stored is decided by the shard's clock alone (law 5); [`now`] is the clock of a shard that lives in this
//! process, and what a proxy uses where nothing is stored. A difference of two points never goes negative.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A span in whole milliseconds.
pub type Millis = u64;

/// A point in time: milliseconds since 1970-01-01T00:00:00Z.
pub type UnixMs = u64;

/// The latest point or longest span that is accepted from a client: the year 2286, so that a point always has at most
/// 13 decimal digits and fits a double with room to spare.
pub const TIME_MAX: UnixMs = 9_999_999_999_999;

/// The wall clock of this process.
pub fn now() -> UnixMs {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_millis() as UnixMs
}
