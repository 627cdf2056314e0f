//! The whole set of cases on the other servers: Redis 6.2, Valkey 9, partitions of a Redis Cluster, a master behind Sentinels.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::trial::Home;
use super::{
    Case, dead, delivery, events, groups, keys, life, limits, locks, outbox, pages, run, sessions, time, travel,
    verdicts,
};
use crate::support::servers::{Cluster, Flavour, Sentinels};

fn suite() -> impl Iterator<Item = &'static Case> {
    let files = [
        delivery::CASES,
        verdicts::CASES,
        time::CASES,
        keys::CASES,
        dead::CASES,
        outbox::CASES,
        pages::CASES,
        life::CASES,
        events::CASES,
        locks::CASES,
        groups::CASES,
        sessions::CASES,
        limits::CASES,
        travel::CASES,
    ];
    files.into_iter().flatten()
}

/// Runs every case on an empty shard of this kind and names those that failed.
fn run_suite(home: &Home) {
    let fails = |(_, case): &&Case| catch_unwind(AssertUnwindSafe(|| run(home.clone(), *case))).is_err();
    let failed: Vec<&str> = suite().filter(fails).map(|(name, _)| *name).collect();
    assert!(failed.is_empty(), "{} cases failed: {failed:#?}", failed.len());
}

#[test]
fn every_case_holds_on_redis_6_2() {
    run_suite(&Home::Server(Flavour::Redis62));
}

#[test]
fn every_case_holds_on_valkey_9() {
    run_suite(&Home::Server(Flavour::Valkey9));
}

#[test]
fn every_case_holds_on_each_partition_of_a_cluster() {
    let cluster = Arc::new(Cluster::start(Flavour::Redis7));
    // With three partitions or more, each of the three masters has been asked.
    run_suite(&Home::Cluster(cluster, 4));
}

#[test]
fn every_case_holds_behind_sentinels() {
    let trio = Sentinels::start(Flavour::Redis7, 1);
    trio.be_patient();
    run_suite(&Home::Sentinels(Arc::new(trio)));
}
