//! The flaws of the first GoFlow library, and the test of each that it cannot happen here.
//!
//! [`SHOWN`] is the table; [`every_test_that_the_table_names_exists`] keeps it true. What no other test shows is shown
//! here, against running processes. Flaws of parts that do not exist here have no row: dependencies (17), limiters (18),
//! workflows (25), cron (27), webhook ingress (29); those of locks, semaphores, events and alerts (20, 21, 22) are shown
//! where these are.

use std::collections::HashSet;
use std::path::Path;
use std::time::Instant;

use crate::eventually;
use crate::support::fleet::Fleet;
use crate::support::goflow::Goflow;
use crate::support::wire::{NoReply, Value, Wire};

/// Number, flaw, and the tests (`module::name`) that show that it cannot happen.
const SHOWN: &[(u32, &str, &[&str])] = &[
    (
        1,
        "a pop removes the job before it is done, so a crash loses it",
        &[
            "conformance/delivery::g1_a_delivered_job_stays_on_the_shard_until_its_verdict",
            "conformance/delivery::g1_the_job_of_a_crashed_worker_comes_back_by_itself",
            "loss::no_acknowledged_job_is_lost_when_proxies_and_redis_shards_are_killed",
            "session::a_client_that_hangs_up_while_it_waits_takes_no_job",
        ],
    ),
    (
        2,
        "jobs out of retries vanish; no retries unless asked for",
        &[
            "conformance/verdicts::g2_a_job_out_of_attempts_is_dead_and_not_gone",
            "conformance/verdicts::g2_a_job_whose_enqueue_names_no_limit_is_not_dropped_on_its_first_failure",
        ],
    ),
    (
        3,
        "a job without a handler is dropped",
        &["conformance/delivery::g3_g8_a_job_that_no_worker_understands_is_kept"],
    ),
    (
        4,
        "a retry is immediate, unchecked and not atomic",
        &[
            "conformance/verdicts::g4_a_failed_job_waits_for_its_backoff",
            "recovery::a_redis_shard_has_what_it_answered_after_a_sigkill_of_its_server",
        ],
    ),
    (
        5,
        "a panic in a handler kills the process and every job with it",
        &["worker::a_handler_that_is_killed_or_takes_too_long_fails_its_job_and_leaves_nobody_behind"],
    ),
    (6, "partitioned workers ignore failures", &["conformance/delivery::g6_every_worker_s_failure_is_retried"]),
    (
        7,
        "the end is no drain, and a second stop panics",
        &[
            "session::sigterm_answers_who_waits_finishes_what_runs_and_keeps_every_job",
            "worker::sigterm_finishes_what_runs_and_takes_nothing_more",
            "flaws::a_second_signal_ends_the_drain_in_order",
        ],
    ),
    (
        8,
        "a payload that cannot be read is lost",
        &["conformance/delivery::g3_g8_a_job_that_no_worker_understands_is_kept"],
    ),
    (
        9,
        "equal priorities are not FIFO; a waiting worker does not see a job of priority",
        &[
            "conformance/delivery::g9_equal_priorities_are_first_in_first_out_whatever_they_hold",
            "conformance/delivery::g9_a_priority_job_is_next_although_the_queue_was_asked_before",
            "flaws::a_job_of_priority_wakes_who_waits_and_passes_the_line",
        ],
    ),
    (
        10,
        "one shard more moves nearly every id",
        &["routing::a_fifth_shard_moves_a_fifth_of_the_ids_and_only_to_itself"],
    ),
    (
        11,
        "one round-robin counter for all queues and instances",
        &[
            "routing::hash_and_round_robin_spread_jobs_evenly",
            "flaws::queues_and_proxies_do_not_disturb_each_other_s_rounds",
        ],
    ),
    (
        12,
        "least-loaded asks every shard for every job, and all producers herd to one",
        &[
            "routing::least_loaded_levels_a_shard_that_starts_ahead",
            "flaws::an_enqueue_asks_no_shard_for_its_load",
            "faults::a_killed_shard",
        ],
    ),
    (
        13,
        "a worker waits on empty shards while others have jobs; a dead shard looks empty",
        &[
            "flaws::a_job_on_any_shard_is_delivered_at_once_wherever_it_lies",
            "session::a_wait_ends_at_its_time_and_not_before",
            "faults::every_shard_down_is_said_at_once_and_ends_with_the_first_that_is_back",
        ],
    ),
    (
        14,
        "every shard must be up at the start; no health, no drain, no growth",
        &[
            "faults::a_proxy_starts_without_a_shard_that_is_down_and_takes_it_in_later",
            "routing::a_draining_shard_takes_no_new_jobs_and_keeps_delivering",
            "routing::a_fifth_shard_moves_a_fifth_of_the_ids_and_only_to_itself",
        ],
    ),
    (
        15,
        "two shards with one address are one, silently",
        &[
            "conformance/life::g15_two_names_for_one_shard_are_refused",
            "faults::a_server_is_the_shard_of_one_deployment_under_one_name",
        ],
    ),
    (
        16,
        "delayed jobs follow the client's clock, come twice from two schedulers, or never",
        &[
            "conformance/time::g16_a_delayed_job_is_delivered_once_however_often_the_shard_ticks",
            "conformance/time::g16_what_falls_due_at_once_is_moved_in_bounded_steps",
            "flaws::delayed_jobs_come_once_each_through_any_of_three_proxies",
        ],
    ),
    (
        19,
        "a batch takes jobs of others, dies with the process, and a short answer counts as success",
        &[
            "flaws::a_batch_that_dies_with_its_worker_comes_back_whole",
            "conformance/verdicts::an_ack_counts_the_jobs_that_these_receipts_completed",
        ],
    ),
    (
        23,
        "the dead letter queue drops the oldest, doubles on a concurrent retry, and can go round for ever",
        &[
            "conformance/dead::g23_no_dead_job_makes_room_for_another",
            "conformance/dead::g23_a_redrive_that_is_sent_twice_puts_the_job_back_once",
            "conformance/dead::g23_putting_all_back_is_bounded_and_leaves_those_that_die_again",
            "flaws::two_clients_that_redrive_the_same_jobs_put_each_back_once",
        ],
    ),
    (
        24,
        "progress is read, changed and written",
        &["conformance/verdicts::g24_progress_and_other_changes_do_not_undo_each_other"],
    ),
    (26, "metrics that say nothing, wrongly, nowhere", &["http::a_jobs_way_is_counted_and_promtool_likes_the_page"]),
    (
        28,
        "deployments name flags and routes that do not exist",
        &["deploy::every_variable_and_flag_of_the_deployments_exists"],
    ),
    (
        30,
        "nobody is asked for a password",
        &[
            "protocol::without_the_password_nothing_but_the_handshake_is_answered",
            "http::the_api_wants_the_password_of_the_redis_port",
        ],
    ),
];

#[test]
fn every_test_that_the_table_names_exists() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    for (number, flaw, shown) in SHOWN {
        for name in *shown {
            let (module, test) = name.split_once("::").unwrap();
            let text = std::fs::read_to_string(tests.join(format!("{module}.rs"))).unwrap();
            assert!(text.contains(&format!("fn {test}(")), "flaw {number}, {flaw}: there is no {name}");
        }
    }
}

fn wait_until_blocked(wire: &mut Wire, count: usize) {
    let mark = format!("blocked_clients:{count}\r\n");
    eventually!(format!("{count} clients are blocked"), wire.say("INFO clients").text().contains(&mark).then_some(()));
}

fn payload(job: &Value) -> String {
    job.field("payload").text()
}

#[test]
fn a_second_signal_ends_the_drain_in_order() {
    let mut goflow = Goflow::start(&[]);
    let id = goflow.wire().say("GOFLOW.ENQUEUE main x").text();
    // A request that never ends keeps the drain going.
    let mut half = goflow.wire();
    half.send_raw("*2\r\n");
    goflow.signal("TERM");
    goflow.wait_for_log("draining");
    goflow.signal("TERM");
    assert!(goflow.wait().success());
    goflow.restart();
    assert_eq!(goflow.wire().call(&["GOFLOW.JOB", "main", &id]).field("state").text(), "ready");
}

#[test]
fn a_job_of_priority_wakes_who_waits_and_passes_the_line() {
    let fleet = Fleet::start(2, 1, &[]);
    let (mut wire, mut other) = (fleet.proxies[0].wire(), fleet.proxies[0].wire());
    wire.send(&["GOFLOW.DEQUEUE", "main", "BLOCK", "0"]);
    wait_until_blocked(&mut other, 1);
    other.say("GOFLOW.ENQUEUE main urgent PRIORITY 9");
    assert_eq!(payload(&wire.read()), "urgent");
    // Every shard holds plain jobs, and those are not starved for ever: they are next when nothing is urgent.
    other.say("GOFLOW.ENQUEUEMANY main 6 p p p p p p");
    other.say("GOFLOW.ENQUEUE main first PRIORITY 9 SHARD s0");
    other.say("GOFLOW.ENQUEUE main first PRIORITY 9 SHARD s1");
    let order: Vec<String> = ["s0", "s1"]
        .iter()
        .map(|shard| payload(&wire.call(&["GOFLOW.DEQUEUE", "main", "SHARDS", "1", shard])))
        .collect();
    assert_eq!(order, ["first", "first"]);
    assert_eq!(wire.say("GOFLOW.DEQUEUE main COUNT 10").items().len(), 6);
}

#[test]
fn queues_and_proxies_do_not_disturb_each_other_s_rounds() {
    let fleet = Fleet::start(3, 2, &["--strategy", "round-robin", "--threads", "1"]);
    let mut wires = [fleet.proxies[0].wire(), fleet.proxies[1].wire()];
    // Whatever happens to the other queue and on the other proxy, three jobs of a queue in a row lie on three shards.
    for round in 0..10 {
        for wire in &mut wires {
            let mut shards = HashSet::new();
            for _ in 0..3 {
                let id = wire.say("GOFLOW.ENQUEUE steady x").text();
                shards.insert(id[id.len() - 2..].to_owned());
                (0..round % 3).for_each(|_| drop(wire.say("GOFLOW.ENQUEUE noise x")));
            }
            assert_eq!(shards.len(), 3, "{shards:?}");
        }
    }
}

#[test]
fn an_enqueue_asks_no_shard_for_its_load() {
    let fleet = Fleet::start(3, 1, &["--strategy", "least-loaded"]);
    let mut wire = fleet.proxies[0].wire();
    wire.say("GOFLOW.ENQUEUE main x");
    let mut monitors: Vec<Wire> = fleet.shards.iter().map(|shard| shard.wire()).collect();
    monitors.iter_mut().for_each(|monitor| assert_eq!(monitor.say("MONITOR"), Value::Simple("OK".into())));
    let began = Instant::now();
    for _ in 0..300 {
        wire.say("GOFLOW.ENQUEUE main x");
    }
    fleet.shards.iter().for_each(|shard| drop(shard.wire().say("ECHO over")));
    let mut asked = 0;
    for monitor in &mut monitors {
        loop {
            let line = monitor.read().text();
            if line.contains("over") {
                break;
            }
            asked += usize::from(!line.contains(" lua]"));
        }
    }
    // One call for each job, and what a proxy asks in the background: some a second and shard.
    let background = 50 + 15 * began.elapsed().as_secs() as usize;
    assert!(asked < 300 + background, "300 jobs took {asked} commands");
}

#[test]
fn a_job_on_any_shard_is_delivered_at_once_wherever_it_lies() {
    let fleet = Fleet::start(4, 1, &[]);
    let (mut wire, mut other) = (fleet.proxies[0].wire(), fleet.proxies[0].wire());
    for shard in ["s0", "s1", "s2", "s3"] {
        // Found without waiting at all, although three shards have nothing.
        other.call(&["GOFLOW.ENQUEUE", "main", "x", "SHARD", shard]);
        assert_eq!(wire.say("GOFLOW.DEQUEUE main").field("shard").text(), shard);
        // And by who waits for all of them.
        wire.send(&["GOFLOW.DEQUEUE", "main", "BLOCK", "0"]);
        wait_until_blocked(&mut other, 1);
        other.call(&["GOFLOW.ENQUEUE", "main", "x", "SHARD", shard]);
        assert_eq!(wire.read().field("shard").text(), shard);
    }
    // No shard starves: with jobs on all of them all are drawn from.
    for _ in 0..100 {
        for shard in ["s0", "s1", "s2", "s3"] {
            other.send(&["GOFLOW.ENQUEUE", "main", "x", "SHARD", shard]);
        }
    }
    (0..400).for_each(|_| drop(other.read()));
    let drawn: HashSet<String> = (0..100).map(|_| wire.say("GOFLOW.DEQUEUE main").field("shard").text()).collect();
    assert_eq!(drawn.len(), 4);
}

#[test]
fn delayed_jobs_come_once_each_through_any_of_three_proxies() {
    let fleet = Fleet::start(2, 3, &[]);
    let mut producer = fleet.proxies[0].wire();
    for number in 0..150 {
        producer.send(&["GOFLOW.ENQUEUE", "main", &number.to_string(), "DELAY", "300"]);
    }
    (0..150).for_each(|_| assert!(matches!(producer.read(), Value::Bulk(_))));
    let workers: Vec<_> = (0..6)
        .map(|number| {
            let mut wire = fleet.proxies[number % 3].wire();
            std::thread::spawn(move || {
                let mut taken = Vec::new();
                loop {
                    let job = wire.say("GOFLOW.DEQUEUE main BLOCK 2000");
                    if job == Value::Null {
                        return taken;
                    }
                    assert!(job.field("attempt") == &Value::Integer(1));
                    taken.push(payload(&job));
                    wire.call(&["GOFLOW.ACK", "main", &job.field("receipt").text()]);
                }
            })
        })
        .collect();
    let taken: Vec<String> = workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect();
    assert_eq!(taken.len(), 150);
    assert_eq!(taken.into_iter().collect::<HashSet<_>>().len(), 150);
}

#[test]
fn a_batch_that_dies_with_its_worker_comes_back_whole() {
    let fleet = Fleet::start(2, 1, &[]);
    let mut wire = fleet.proxies[0].wire();
    wire.say("GOFLOW.ENQUEUEMANY main 8 1 2 3 4 5 6 7 8 TYPE mine BACKOFF 1");
    wire.say("GOFLOW.ENQUEUE other untouched");
    let mut victim = fleet.proxies[0].wire();
    assert_eq!(victim.say("GOFLOW.DEQUEUE main COUNT 8 LEASE 50").items().len(), 8);
    drop(victim);
    let mut seen = HashSet::new();
    let mut receipts = Vec::new();
    while seen.len() < 8 {
        let batch = wire.say("GOFLOW.DEQUEUE main COUNT 8 BLOCK 0");
        for job in batch.items() {
            assert!(seen.insert(payload(job)), "{job:?} came twice");
            receipts.push(job.field("receipt").text());
        }
    }
    // The answer says how many: nine receipts of which one holds nothing are eight jobs.
    let words = [vec!["GOFLOW.ACK".to_owned(), "main".into()], receipts.clone(), vec![receipts[0].clone()]].concat();
    let counted = wire.call(&words);
    assert!(counted == Value::Integer(8) || counted == Value::Integer(9), "{counted:?}");
    assert_eq!(wire.say("GOFLOW.STATS main").field("completed"), &Value::Integer(8));
    assert_eq!(wire.say("GOFLOW.LEN other"), Value::Integer(1));
}

#[test]
fn two_clients_that_redrive_the_same_jobs_put_each_back_once() {
    let fleet = Fleet::start(2, 2, &[]);
    let mut wires = [fleet.proxies[0].wire(), fleet.proxies[1].wire()];
    for number in 0..40 {
        wires[0].call(&["GOFLOW.ENQUEUE", "main", &number.to_string()]);
        let job = wires[0].say("GOFLOW.DEQUEUE main");
        assert_eq!(wires[0].call(&["GOFLOW.FAIL", "main", &job.field("receipt").text(), "DEAD"]).text(), "dead");
    }
    let dead = wires[0].say("GOFLOW.DLQ LIST main COUNT 40");
    let ids: Vec<String> = dead.items().iter().map(|job| job.field("id").text()).collect();
    assert_eq!(ids.len(), 40);
    for id in &ids {
        wires.iter_mut().for_each(|wire| wire.send(&["GOFLOW.DLQ", "RETRY", "main", id]));
    }
    let moved: i64 = (0..40).map(|_| wires.iter_mut().map(|wire| wire.read().integer()).sum::<i64>()).sum();
    assert_eq!(moved, 40);
    assert_eq!(wires[0].say("GOFLOW.LEN main"), Value::Integer(40));
    wires
        .iter_mut()
        .for_each(|wire| assert_eq!(wire.try_read(std::time::Duration::from_millis(1)), Err(NoReply::TimedOut)));
}
