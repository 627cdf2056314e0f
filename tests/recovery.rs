//! What a shard answered is there after a SIGKILL: of the server, or of the process that holds the embedded store.
//!
//! One worker adds, leases and acks jobs as fast as it can and writes down each deed once it is answered. Whatever is
//! killed meanwhile: every job it added is there, every job it acked is completed and stays so, and none is there twice.

use bytes::Bytes;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;

use goflow::error::Result;
use goflow::job::{JobRef, JobState, Lease};
use goflow::shard::embedded::Embedded;
use goflow::shard::redis::Redis;
use goflow::shard::{Action, Op, Outcome, Placed, Rules, Shard, Start};

use crate::conformance::trial::name;
use crate::eventually;
use crate::support::process::{Process, Program};
use crate::support::scratch;
use crate::support::servers::{Flavour, Server};

/// What was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    Added(u64),
    Acked(u64),
}

fn op(action: Action) -> Op {
    Op { queue: name("main"), action }
}

async fn apply(shard: &dyn Shard, actions: Vec<Action>) -> Result<Vec<Outcome>> {
    shard.apply(actions.into_iter().map(op).collect(), None).await.outcomes.into_iter().collect()
}

/// One round of work. `Err` as soon as the shard does not answer.
async fn work(shard: &dyn Shard, mut tell: impl FnMut(Deed)) -> Result<()> {
    let enqueue = Action::Enqueue {
        policy: Arc::default(),
        payloads: (0..3).map(|_| Bytes::from(rand::random::<u64>().to_string())).collect(),
        start: Start::Now,
    };
    let lease = Action::Lease {
        tokens: (0..2).map(|_| rand::random_range(0..goflow::job::TOKEN_MAX)).collect(),
        lease_ms: 3_600_000,
        worker: Bytes::new(),
    };
    let mut leases: Vec<Lease> = Vec::new();
    for outcome in apply(shard, vec![enqueue, lease]).await? {
        match outcome {
            Outcome::Enqueued(placed) => placed.iter().for_each(|placed| match placed {
                Placed::Added(seq) => tell(Deed::Added(*seq)),
                held => panic!("a job without a key was {held:?}"),
            }),
            Outcome::Leased(deliveries) => leases = deliveries.iter().map(|delivery| delivery.lease).collect(),
            other => panic!("{other:?}"),
        }
    }
    let acked = apply(shard, vec![Action::Ack { leases: leases.clone(), result: Bytes::new() }]).await?;
    assert_eq!(acked, [Outcome::Count(leases.len() as u64)]);
    leases.iter().for_each(|lease| tell(Deed::Acked(lease.seq)));
    Ok(())
}

/// Rules that keep every completed job for the comparison.
fn rules() -> Rules {
    let mut rules = Rules::default();
    rules.retention.jobs = 1_000_000;
    rules
}

/// Holds the shard to the deeds.
async fn check(shard: &dyn Shard, deeds: &[Deed]) {
    let mut expected: HashMap<u64, bool> = HashMap::new();
    for deed in deeds {
        match deed {
            Deed::Added(seq) => assert_eq!(expected.insert(*seq, false), None, "seq {seq} was given twice"),
            Deed::Acked(seq) => drop(expected.insert(*seq, true)),
        }
    }
    for (seq, is_acked) in expected {
        let found = apply(shard, vec![Action::Job { job: JobRef::Seq(seq) }]).await.unwrap().remove(0);
        let Outcome::Job(Some(job)) = found else { panic!("job {seq} was answered and is lost: {found:?}") };
        assert!(!is_acked || job.state == JobState::Completed, "job {seq} was acked and is {:?}", job.state);
    }
    let mut seqs = BTreeSet::new();
    loop {
        let tokens = (0..1_000).collect();
        let left =
            apply(shard, vec![Action::Lease { tokens, lease_ms: 3_600_000, worker: Bytes::new() }]).await.unwrap();
        let Outcome::Leased(deliveries) = &left[0] else { panic!("{left:?}") };
        for delivery in deliveries {
            assert!(seqs.insert(delivery.lease.seq), "job {} was delivered to two", delivery.lease.seq);
        }
        if deliveries.is_empty() {
            break;
        }
    }
    let acked: Vec<&Deed> =
        deeds.iter().filter(|deed| matches!(deed, Deed::Acked(seq) if seqs.contains(seq))).collect();
    assert!(acked.is_empty(), "delivered again after their ack: {acked:?}");
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Writes deeds down, one a line, so that they outlive the process.
struct Diary(File);

impl Diary {
    fn tell(&mut self, deed: Deed) {
        let line = match deed {
            Deed::Added(seq) => format!("+{seq}\n"),
            Deed::Acked(seq) => format!("={seq}\n"),
        };
        self.0.write_all(line.as_bytes()).unwrap();
    }

    /// What stands in a diary, without a line that was cut off.
    fn read(path: &Path) -> Vec<Deed> {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let parse = |line: &str| match line.split_at(1) {
            ("+", seq) => Deed::Added(seq.parse().unwrap()),
            (_, seq) => Deed::Acked(seq.parse().unwrap()),
        };
        whole.lines().map(parse).collect()
    }
}

/// The part that is killed: a process of its own, which [`the_embedded_store_has_what_it_answered_after_a_sigkill`] starts
/// with a store and a diary in its environment. Without them there is nothing to do.
#[test]
fn a_child_works_on_the_embedded_store_until_it_is_killed() {
    let (Ok(store), Ok(diary)) = (std::env::var("GOFLOW_TEST_STORE"), std::env::var("GOFLOW_TEST_DIARY")) else {
        return;
    };
    let mut diary = Diary(File::options().create(true).append(true).open(diary).unwrap());
    runtime().block_on(async {
        let shard = Embedded::open(Path::new(&store), rules()).unwrap();
        loop {
            work(&shard, |deed| diary.tell(deed)).await.unwrap();
        }
    });
}

#[test]
fn the_embedded_store_has_what_it_answered_after_a_sigkill() {
    let dir = scratch();
    let (store, diary) = (dir.path().join("store"), dir.path().join("diary"));
    let env = [("GOFLOW_TEST_STORE", &store), ("GOFLOW_TEST_DIARY", &diary)];
    let args = ["--exact", "recovery::a_child_works_on_the_embedded_store_until_it_is_killed"];
    let program = Program {
        path: std::env::current_exe().unwrap(),
        args: args.map(Into::into).to_vec(),
        env: env.map(|(name, path)| (name.into(), path.into())).to_vec(),
        dir: dir.path().to_owned(),
    };
    for _ in 0..5 {
        let before = Diary::read(&diary).len();
        let mut child = Process::start(&program);
        eventually!("the child works", (Diary::read(&diary).len() > before + 200).then_some(()));
        child.kill();
    }
    let shard = Embedded::open(&store, rules()).unwrap();
    runtime().block_on(check(&shard, &Diary::read(&diary)));
}

#[test]
fn a_redis_shard_has_what_it_answered_after_a_sigkill_of_its_server() {
    let mut server = Server::start(Flavour::Redis7, Server::DURABLE);
    let url = server.url();
    let (order, orders) = mpsc::channel::<()>();
    let (report, reports) = mpsc::channel::<()>();
    let killer = std::thread::spawn(move || {
        for () in orders {
            server.kill();
            server.restart();
            report.send(()).unwrap();
        }
        server
    });
    let server = runtime().block_on(async {
        let shard = Redis::connect(&url, "s1", rules()).await.unwrap();
        let mut deeds = Vec::new();
        for _ in 0..5 {
            let enough = deeds.len() + 200;
            let mut is_ordered = false;
            while !is_ordered || reports.try_recv().is_err() {
                if work(&shard, |deed| deeds.push(deed)).await.is_err() {
                    eventually!("the shard answers again", shard.probe().await.ok());
                }
                if !is_ordered && deeds.len() > enough {
                    order.send(()).unwrap();
                    is_ordered = true;
                }
            }
        }
        eventually!("the shard answers at last", shard.probe().await.ok());
        check(&shard, &deeds).await;
        drop(order);
        killer.join().unwrap()
    });
    assert!(server.wire().say("INFO persistence").text().contains("aof_enabled:1"));
}
