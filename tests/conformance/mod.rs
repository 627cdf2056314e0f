//! One set of cases for every shard: each sentence of `src/shard/mod.rs`, "The state machine" and the actions, and of the
//! sections "Jobs" and "Dead letter queue" of the wire contract that a shard alone must keep.
//!
//! A case is an async function of a [`Keeper`], from which it opens an empty shard; time is what the case says it is. The
//! list at the end of each file ([`cases!`]) makes of each case a test on the memory, the embedded and the Redis 7 shard.
//! The other servers run the whole set in one test each (`servers.rs`). A case that is not listed does not compile
//! without a warning. A name that begins with `g` and a number is a flaw of the first GoFlow library that must not return.

mod dead;
mod delivery;
mod events;
mod groups;
pub mod keyguard;
mod keys;
mod life;
mod limits;
mod locks;
mod outbox;
mod pages;
mod servers;
mod sessions;
mod time;
mod travel;
pub mod trial;
mod verdicts;

pub use trial::{Home, Keeper};

use goflow::shard::BoxFuture;

/// One case by its name.
pub type Case = (&'static str, for<'a> fn(&'a Keeper) -> BoxFuture<'a, ()>);

/// Runs one case on an empty shard of this kind.
pub fn run(home: Home, case: for<'a> fn(&'a Keeper) -> BoxFuture<'a, ()>) {
    let keeper = Keeper::new(home);
    trial::block_on(case(&keeper));
    keeper.check();
}

/// Lists the cases of a file and makes a test of each for each kind of shard.
macro_rules! cases {
    ($($case:ident),+ $(,)?) => {
        pub const CASES: &[$crate::conformance::Case] = &[$((stringify!($case), |keeper| Box::pin($case(keeper)))),+];

        mod memory {
            $(#[test] fn $case() { $crate::conformance::run($crate::conformance::Home::Memory, |keeper| Box::pin(super::$case(keeper))); })+
        }

        mod embedded {
            $(#[test] fn $case() { $crate::conformance::run($crate::conformance::Home::Embedded, |keeper| Box::pin(super::$case(keeper))); })+
        }

        mod redis7 {
            $(#[test] fn $case() {
                let home = $crate::conformance::Home::Server($crate::support::servers::Flavour::Redis7);
                $crate::conformance::run(home, |keeper| Box::pin(super::$case(keeper)));
            })+
        }
    };
}
pub(crate) use cases;
