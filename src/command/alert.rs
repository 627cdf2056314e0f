//! `GOFLOW.ALERT`: what is told of dead jobs and of conditions, and whether it arrives.
//!
//! Rules and sinks are the configuration's; a client can neither add one nor decide where anything is sent.

use super::args::{Arg, Args, Kind};
use super::{Ask, Context, Flag, Group, Plan, Spec};
use crate::error::{Error, Result};

const OPS: Spec = Spec { group: Group::Operations, flags: &[Flag::Admin], ..Spec::BASE };

pub static ROWS: &[Spec] = &[
    Spec {
        examples: "\
> GOFLOW.ALERT HELP
1) \"GOFLOW.ALERT <subcommand> [<arg> [value] [opt] ...]. Subcommands are:\"
...",
        ..Spec::container("GOFLOW.ALERT", Group::Operations, "0.1.0", "Telling people of dead jobs and of conditions.")
    },
    Spec {
        name: "GOFLOW.ALERT|LIST",
        summary: "Shows the alert rules, what each has still to tell, and how its deliveries went.",
        reply: "An array with a map for each rule: `name`, `queues`, `types`, `deaths`, its conditions `deeper_than`, \
                `older_than_ms`, `failure_rate` and `shard_down_ms` or null, `min_interval_ms`; `pending`, how many deaths it \
                has still to tell; `firing`, the conditions that hold; and `deliveries`, a map for each sink: `sink`, `kind`, \
                `to` (without secrets), `sent` and `failed` as counts of messages, `sent_at`, `failed_at` and `last_error`, or \
                null.",
        notes: "Any proxy answers it from the shards, whichever proxy delivers.",
        examples: "\
> GOFLOW.ALERT LIST
(empty array)",
        plan: |_, _| Ok(Plan::Ask(Ask::Alerts)),
        ..OPS
    },
    Spec {
        name: "GOFLOW.ALERT|TEST",
        summary: "Sends a test message through the sinks of an alert rule.",
        args: &[Arg::new("name", Kind::Text)],
        reply: "A map from the name of each sink to `OK`, or to why it was not delivered.",
        notes: "It is sent by the proxy that is asked and counts nowhere.",
        examples: "\
> GOFLOW.ALERT TEST no-such-alert
(error) ERR ...",
        plan: test,
        ..OPS
    },
];

fn test(args: &Args, _: &Context) -> Result<Plan> {
    let name = args.text("name");
    let name = std::str::from_utf8(&name).map_err(|_| Error::bad("invalid name: expected the name of an alert"))?;
    Ok(Plan::Ask(Ask::AlertTest { name: name.into() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::tests::{planned, refused};

    #[test]
    fn both_are_asked_of_the_process() {
        assert!(matches!(planned("GOFLOW.ALERT LIST"), Plan::Ask(Ask::Alerts)));
        assert!(matches!(planned("GOFLOW.ALERT TEST ops"), Plan::Ask(Ask::AlertTest { name }) if &*name == "ops"));
        assert!(refused("GOFLOW.ALERT TEST").contains("wrong number of arguments"));
    }
}
