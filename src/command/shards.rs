//! Orders that change the shard map, on all proxies at once, and the one that rereads the configuration.
//!
//! The process carries them out ([`MapOrder`]); what each means for the map is `dispatch/layout.rs`.

use super::args::{Arg, Args, Kind};
use super::{Ask, Flag, Group, MapOrder, Plan, Spec};
use crate::error::{Code, Error, Result};

const NAME: Arg = Arg::new("name", Kind::Shard);
const WEIGHT_MAX: i64 = 1_000;
const WEIGHT: Kind = Kind::Integer(1, WEIGHT_MAX);
const ORDER: Spec = Spec {
    group: Group::Operations,
    flags: &[Flag::Admin],
    reply: "`OK`, also when it was so before.",
    errors: &[Code::ShardDown, Code::Overloaded],
    ..Spec::BASE
};

const NOBODY: &str = "\
> GOFLOW.SHARD DRAIN no-such-shard
(error) ERR no shard is named 'no-such-shard' here";

pub static ROWS: &[Spec] = &[
    Spec {
        name: "GOFLOW.RELOAD",
        summary: "Reads the configuration anew: the file, the environment and the flags that the process was started with.",
        reply: "A map: `changed`, the settings that are other ones now, and `restart`, those of them that only a restart takes; `map_waits`, where the configuration's shard map cannot be the next one yet, says why.",
        notes: "`SIGHUP` does the same. What is wrong with the configuration is the error, and then nothing is changed. Shards that are new or gone are taken as a change of the shard map, under the `map_version` of the configuration, which must be higher than the present one. It adds shards and changes weights: one that it leaves out stays until `GOFLOW.SHARD REMOVE` takes it out.",
        examples: "\
> GOFLOW.RELOAD
1# \"changed\" => (empty array)
2# \"restart\" => (empty array)",
        plan: |_, _| Ok(Plan::Ask(Ask::Reload)),
        ..ORDER
    },
    Spec {
        examples: "\
> GOFLOW.SHARD HELP
 1) \"GOFLOW.SHARD <subcommand> [<arg> [value] [opt] ...]. Subcommands are:\"
...",
        ..Spec::container(
            "GOFLOW.SHARD",
            Group::Operations,
            "0.1.0",
            "Changes the shard map, on all proxies at once and under its next version.",
        )
    },
    Spec {
        name: "GOFLOW.SHARD|DRAIN",
        summary: "Keeps new jobs away from a shard; what it holds is still delivered.",
        args: &[NAME],
        notes: "Jobs with an `ID` or `UNIQUE` and locks go on having their homes on it, until it is moved away from. An error when it is the last shard that takes new jobs.",
        examples: NOBODY,
        plan: |args, _| order(args, |shard, _| Ok(MapOrder::Drain { shard })),
        ..ORDER
    },
    Spec {
        name: "GOFLOW.SHARD|UNDRAIN",
        summary: "Lets a shard take new jobs again.",
        args: &[NAME],
        notes: "Also of a shard that `MOVE` empties: what has left it stays where it is.",
        examples: "\
> GOFLOW.SHARD UNDRAIN no-such-shard
(error) ERR ...",
        plan: |args, _| order(args, |shard, _| Ok(MapOrder::Undrain { shard })),
        ..ORDER
    },
    Spec {
        name: "GOFLOW.SHARD|ADD",
        summary: "Adds a shard to the map.",
        args: &[NAME, Arg::new("url", Kind::Text), Arg::option("WEIGHT", "weight", WEIGHT)],
        notes: "It must answer and belong to nobody else. The URL is kept in the map, on the shards, so it holds no password: a server that needs one is given to the configuration of every proxy, under a higher `map_version`. Some keys get their homes on it.",
        examples: "\
> GOFLOW.SHARD ADD new embedded:./data
(error) ERR ...",
        plan: |args, _| {
            order(args, |shard, args| {
                let url = args.value("url").and_then(|url| std::str::from_utf8(url).ok()).unwrap_or_default();
                Ok(MapOrder::Add { shard, url: url.into(), weight: weight(args, "WEIGHT")?.unwrap_or(1) })
            })
        },
        ..ORDER
    },
    Spec {
        name: "GOFLOW.SHARD|WEIGHT",
        summary: "Changes a shard's part of the jobs and keys, relative to the others'.",
        args: &[NAME, Arg::new("weight", WEIGHT)],
        notes: "Some keys get other homes.",
        examples: "\
> GOFLOW.SHARD WEIGHT no-such-shard 2
(error) ERR ...",
        plan: |args, _| {
            order(args, |shard, args| Ok(MapOrder::Weigh { shard, weight: weight(args, "weight")?.unwrap_or(1) }))
        },
        ..ORDER
    },
    Spec {
        name: "GOFLOW.SHARD|MOVE",
        summary: "Drains a shard and moves its waiting and dead jobs to the others, in the background.",
        args: &[NAME],
        notes: "In batches, by whichever proxy is there: none is lost and none runs twice for it. Jobs keep their ids and all that is known of them; leased ones stay until they come back or are over; those that are over stay. `GOFLOW.SHARDS` shows how far it is: `moved` and `to_move`, null on proxies that do not move it. Jobs with an `ID` or `UNIQUE` go to the key's new home, the others by weight.",
        examples: "\
> GOFLOW.SHARD MOVE no-such-shard
(error) ERR ...",
        plan: |args, _| order(args, |shard, _| Ok(MapOrder::Move { shard })),
        ..ORDER
    },
    Spec {
        name: "GOFLOW.SHARD|REMOVE",
        summary: "Takes an empty shard out of the map.",
        args: &[NAME, Arg::flag("LOST", "lost")],
        notes: "Refused while it holds jobs that are not over. It takes some seconds, so that no proxy can miss it. Jobs that are over are forgotten with it; ordinary keys stay on its server and are found no more. `LOST` gives up a shard that does not answer and never will, with all that it held; it is refused while the shard answers.",
        examples: "\
> GOFLOW.SHARD REMOVE no-such-shard
(error) ERR ...",
        plan: |args, _| order(args, |shard, args| Ok(MapOrder::Remove { shard, lost: args.has("LOST") })),
        ..ORDER
    },
    Spec {
        name: "GOFLOW.SHARD|FORGET",
        summary: "Forgets where keys had their homes before.",
        notes: "Until then a job with an `ID` or `UNIQUE` is looked for at its former homes, too. After it, one that is still there holds its key no more.",
        examples: "\
> GOFLOW.SHARD FORGET
OK",
        plan: |_, _| Ok(Plan::Ask(Ask::Map(MapOrder::Forget))),
        ..ORDER
    },
];

fn order(args: &Args, order: fn(Box<str>, &Args) -> Result<MapOrder>) -> Result<Plan> {
    let shard = args.shard("name")?.ok_or_else(|| Error::bad("the shard's name is missing"))?;
    Ok(Plan::Ask(Ask::Map(order(shard, args)?)))
}

fn weight(args: &Args, key: &str) -> Result<Option<u32>> {
    Ok(args.integer(key)?.and_then(|weight| u32::try_from(weight).ok()))
}
