//! A [`Database`] that one writer at a time changes, any thread asks for versions, and one observer hears of.

use bytes::Bytes;
use std::sync::{Mutex, OnceLock, PoisonError};

use super::Database;
use crate::error::{Error, Happened, Result};
use crate::shard::OnChange;

pub struct Shared {
    database: Mutex<Database>,
    on_change: OnceLock<OnChange>,
}

impl Shared {
    pub fn new(database: Database) -> Shared {
        Shared { database: Mutex::new(database), on_change: OnceLock::new() }
    }

    /// A panic in a command may have left the database half changed, so nothing more is done with it.
    pub fn with<T>(&self, act: impl FnOnce(&mut Database) -> T) -> Result<T> {
        match self.database.lock() {
            Ok(mut database) => Ok(act(&mut database)),
            Err(_) => Err(Error::shard_down("the keyspace", "failed before", Happened::No)),
        }
    }

    pub fn version(&self, key: &[u8]) -> u64 {
        self.database.lock().unwrap_or_else(PoisonError::into_inner).version(key)
    }

    pub fn observe(&self, on_change: OnChange) {
        // A second observer is a mistake of the caller, and the first one stays.
        let _ = self.on_change.set(on_change);
    }

    /// Tells the observer of keys whose change is committed. Called without the lock, which it may want.
    pub fn tell(&self, changed: &[Bytes]) {
        if let Some(on_change) = self.on_change.get() {
            changed.iter().for_each(|key| on_change(key));
        }
    }
}
