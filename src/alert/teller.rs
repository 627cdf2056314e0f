//! The one that tells: reads the outboxes of all shards, makes messages, sends them, and marks what was told.
//!
//! One proxy leads, by a short lease of the role on the first shard that answers. Order of a message's life, so that a kill
//! at any point neither loses a death nor counts one twice under another id:
//!
//! ```text
//! read the outboxes → compose → note the message on the home shard → send → mark it told on the shards → remove the note
//! ```
//!
//! Whoever leads next finds the notes and goes on from there: the same message, under the same id. What a sink refused is
//! composed anew, since it was not taken; what it may have taken is sent again as it is. A shard that is down keeps its
//! marks to be paid later ([`Channel::owed`]), and nobody waits for it. Groups whose deaths all were told on every channel
//! leave the outbox when they have been quiet for the rule's interval, so that the next death of the kind is news again.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::{join_all, select_all};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::message::{Change, Entry, Message, Part, merged, new_id};
use super::post::Failure;
use super::sink::Sink;
use super::watch::{Firing, Watch};
use super::{Rule, SharedAlerts, channel_name};
use crate::clock::{self, UnixMs};
use crate::dispatch::Dispatcher;
use crate::dispatch::lane::Lane;
use crate::error::Result;
use crate::job::Name;
use crate::metrics::Metrics;
use crate::resp::reply::Reply;
use crate::shard::{Action, DeathGroup, DeathMark, Op, Outcome};

/// The role, as the shards know it.
const ROLE: &str = "alerter";
/// How long a proxy has the role after it last asked, and how often it asks.
const LEAD_MS: u64 = 6_000;
const RENEW_EVERY: Duration = Duration::from_millis(LEAD_MS / 3);
/// Between two looks at outboxes that are not empty; after what is heard of a death, a little while for others to join it.
const PASS_EVERY: Duration = Duration::from_secs(1);
const GATHER: Duration = Duration::from_millis(50);
/// The pause after a pass is so many times what the pass took, but never so long that the role is lost.
const REST: u32 = 10;
/// Queues that are asked together, and of each shard in one pass.
const GROUP: usize = 64;
const QUEUES_PASS_MAX: usize = 256;
/// Groups of one shard after which a pass reads no further queues.
const GROUPS_PASS_MAX: usize = 4_096;
/// How long a pass waits for one shard.
const SHARD_WAIT: Duration = Duration::from_secs(2);
/// Groups of queues and shards that one message stands for.
const PARTS_MAX: usize = 1_000;
/// Messages about kinds of deaths that are new, within one interval, before they wait for the digest as well.
const AT_ONCE_MAX: u32 = 3;
/// Between two messages to one sink: what Slack takes.
const SEND_EVERY: Duration = Duration::from_secs(1);
/// After a failure a sink is left alone, each time longer.
const BACKOFF_MIN: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(300);
/// Messages of one channel whose marks a shard has yet to take.
const OWED_MAX: usize = 100;
/// Most notes that wait to be removed.
const STALE_MAX: usize = 1_000;
/// How long deaths that no rule wants are kept for a proxy whose rules are newer.
const UNWANTED_MS: u64 = 600_000;
/// What is kept of a failure's text.
const WHY_CHARS_MAX: usize = 300;

/// A group as it lies in one outbox.
pub struct View {
    shard: Arc<str>,
    queue: Name,
    group: DeathGroup,
    now: UnixMs,
}

/// What is known of a channel, on a shard for whoever leads next.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ChannelNote {
    pub updated_at: UnixMs,
    sent: u64,
    sent_at: UnixMs,
    failed: u64,
    failed_at: UnixMs,
    last_error: String,
    /// The conditions that it was told of and that it was not told the end of.
    pub firing: Firing,
}

/// A message on its way, as its note.
#[derive(Clone, Serialize, Deserialize)]
struct FlightNote {
    message: Message,
    /// A sink has it; only marks are owed.
    accepted: bool,
}

struct Flight {
    message: Message,
    /// The shard with its note; `None` where there was none that answered.
    home: Option<Arc<str>>,
    is_noted_as_accepted: bool,
}

/// The way of one rule to one sink.
struct Channel {
    name: String,
    rule: usize,
    sink: usize,
    note: ChannelNote,
    /// Not yet taken by the sink; the first is sent first.
    flights: VecDeque<Flight>,
    /// Taken, and not marked everywhere.
    owed: Vec<Flight>,
    /// Sent before the interval was over, since the last digest.
    at_once: u32,
}

/// How a sink is, for all of its channels.
#[derive(Default)]
struct Pace {
    is_busy: bool,
    rest_until: Option<Instant>,
    failures: u32,
}

struct Teller {
    alerts: SharedAlerts,
    dispatcher: Arc<Dispatcher>,
    metrics: Arc<Metrics>,
    holder: Arc<str>,
    /// Where notes are kept while we lead.
    home: Option<Arc<Lane>>,
    is_leading: bool,
    /// When the role was last given or refused.
    led_at: Instant,
    down_since: HashMap<Arc<str>, Instant>,
    /// Shards whose notes were read since we lead.
    loaded: HashSet<Arc<str>>,
    /// Notes that have yet to be removed, and where.
    stale: Vec<(Arc<str>, String)>,
    channels: Vec<Channel>,
    paces: Vec<Pace>,
    watch: Watch,
    sends: JoinSet<(usize, std::result::Result<(), Failure>)>,
}

/// Tells until the process ends; `holder` names this process.
pub async fn run(alerts: SharedAlerts, dispatcher: Arc<Dispatcher>, metrics: Arc<Metrics>, holder: Arc<str>) {
    let mut teller = Teller::new(alerts, dispatcher, metrics, holder);
    loop {
        let began = Instant::now();
        if teller.lead().await {
            teller.pass().await;
        } else {
            teller.step_down();
        }
        teller.rest(began.elapsed()).await;
    }
}

/// The deaths that a channel of the rule is yet to be told of.
pub fn untold(rule: &Rule, channel: &str, views: &[View]) -> u64 {
    let wanted = views.iter().filter(|view| view.is_wanted(rule));
    wanted.map(|view| view.group.count - view.group.told_on(channel.as_bytes()).min(view.group.count)).sum()
}

/// The groups in all outboxes that this process has heard of, of the shards that answer.
pub async fn read_waiting(lanes: &[Arc<Lane>]) -> Vec<View> {
    let reads = lanes.iter().filter(|lane| !lane.is_down()).map(|lane| async move {
        let queues = lane.outboxes.waiting();
        // Another part of them each time, where there are more than one pass reads.
        let first = if queues.len() > QUEUES_PASS_MAX { rand::random_range(0..queues.len()) } else { 0 };
        let queues: Vec<&Name> = queues.iter().cycle().skip(first).take(queues.len().min(QUEUES_PASS_MAX)).collect();
        let mut views = Vec::new();
        for group in queues.chunks(GROUP) {
            match tokio::time::timeout(SHARD_WAIT, read_group(lane, group)).await {
                Ok(Ok(found)) => views.extend(found),
                Ok(Err(_)) | Err(_) => break,
            }
            if views.len() >= GROUPS_PASS_MAX {
                break;
            }
        }
        views
    });
    join_all(reads).await.into_iter().flatten().collect()
}

async fn read_group(lane: &Lane, queues: &[&Name]) -> Result<Vec<View>> {
    lane.room().await?;
    let ask = |queue: &Name| lane.submit(Op { queue: queue.clone(), action: Action::Outbox }, 0);
    let asked: Vec<_> = queues.iter().map(|queue| (*queue, ask(queue))).collect();
    let mut views = Vec::new();
    for (queue, outcome) in asked {
        if let Outcome::Outbox { groups, now } = outcome.await.unwrap_or(Ok(Outcome::Done))? {
            let view = |group| View { shard: lane.name().clone(), queue: queue.clone(), group, now };
            views.extend(groups.into_iter().map(view));
        }
    }
    Ok(views)
}

/// What a shard knows of the channels.
pub async fn channel_notes(lane: &Lane) -> Result<Vec<(String, ChannelNote)>> {
    let notes = lane.shard().notes(ROLE).await?.into_iter();
    Ok(notes.filter_map(|(name, note)| Some((name, serde_json::from_slice(&note).ok()?))).collect())
}

/// The note of what a channel is about to send; the next message takes its place, so that what was given up cannot come
/// back. No rule or sink has this mark in its name.
fn flight_name(channel: &str) -> String {
    format!("{channel}#")
}

/// The note of a message that was taken and is not marked everywhere.
fn owed_name(channel: &str, message: &Message) -> String {
    format!("{channel}#{}", message.id)
}

impl View {
    fn is_wanted(&self, rule: &Rule) -> bool {
        rule.wants_deaths(&self.queue, self.group.parts().map(|(kind, _)| kind))
    }
}

impl ChannelNote {
    pub fn reply(&self, sink: &Sink) -> Reply {
        let point = |at: UnixMs| if at == 0 { Reply::Null } else { Reply::count(at) };
        let error = if self.last_error.is_empty() { Reply::Null } else { Reply::bulk(&self.last_error) };
        Reply::Map(vec![
            (Reply::text("sink"), Reply::bulk(&sink.name)),
            (Reply::text("kind"), Reply::text(sink.kind.word())),
            (Reply::text("to"), Reply::bulk(sink.shown())),
            (Reply::text("sent"), Reply::count(self.sent)),
            (Reply::text("sent_at"), point(self.sent_at)),
            (Reply::text("failed"), Reply::count(self.failed)),
            (Reply::text("failed_at"), point(self.failed_at)),
            (Reply::text("last_error"), error),
        ])
    }
}

impl Channel {
    /// How many deaths of the group are told, those included whose marks are owed.
    fn told(&self, view: &View) -> u64 {
        let parts = self.owed.iter().flat_map(|flight| &flight.message.parts);
        let owed = parts.filter(|part| part.is_of(&view.shard, &view.queue, &view.group)).map(|part| part.upto).max();
        view.group.told_on(self.name.as_bytes()).max(owed.unwrap_or(0))
    }

    /// Whether a message may be sent now: a digest when the interval is over, news at once, but not too often.
    fn is_due(&self, is_news: bool, rule: &Rule, now: UnixMs) -> bool {
        // A clock that was set back must not silence the channel.
        let is_over = now.saturating_sub(self.note.sent_at) >= rule.interval_ms
            || self.note.sent_at > now.saturating_add(rule.interval_ms);
        is_over || is_news && self.at_once < AT_ONCE_MAX
    }
}

impl Teller {
    fn new(alerts: SharedAlerts, dispatcher: Arc<Dispatcher>, metrics: Arc<Metrics>, holder: Arc<str>) -> Teller {
        let sinks = alerts.sinks.iter();
        sinks.for_each(|sink| metrics.alert_sink(&sink.name));
        Teller {
            paces: alerts.sinks.iter().map(|_| Pace::default()).collect(),
            watch: Watch::new(alerts.rules.len()),
            alerts,
            dispatcher,
            metrics,
            holder,
            home: None,
            is_leading: false,
            led_at: Instant::now(),
            down_since: HashMap::new(),
            loaded: HashSet::new(),
            stale: Vec::new(),
            channels: Vec::new(),
            sends: JoinSet::new(),
        }
    }

    /// Whether we are the one that tells. Where no shard answers, whoever was it stays it: somebody must say so.
    async fn lead(&mut self) -> bool {
        let map = self.dispatcher.map();
        self.down_since.retain(|name, _| map.lane(name).is_some_and(|lane| lane.is_down()));
        for lane in map.lanes.iter().filter(|lane| lane.is_down()) {
            self.down_since.entry(lane.name().clone()).or_insert_with(Instant::now);
        }
        for lane in &map.lanes {
            if lane.is_down() {
                // Whoever had the role there may have it until then.
                if !self.is_out(lane) {
                    self.home = None;
                    return self.is_leading;
                }
                continue;
            }
            let asked = tokio::time::timeout(SHARD_WAIT, lane.shard().lead(ROLE, &self.holder, LEAD_MS));
            if let Ok(Ok(leads)) = asked.await {
                if leads && !self.is_leading {
                    self.begin();
                }
                self.home = leads.then(|| lane.clone());
                self.led_at = Instant::now();
                return leads;
            }
            // Slow, and not down: another may have the role there, so none is asked for elsewhere.
            self.home = None;
            return self.is_leading && self.led_at.elapsed() < Duration::from_millis(LEAD_MS);
        }
        self.home = None;
        self.is_leading
    }

    fn begin(&mut self) {
        self.is_leading = true;
        self.metrics.alerts_leading.set(1);
        self.loaded.clear();
        self.stale.clear();
        self.watch = Watch::new(self.alerts.rules.len());
        let alerts = self.alerts.clone();
        let channel = |rule: usize, sink: usize| Channel {
            name: channel_name(&alerts.rules[rule], &alerts.sinks[sink]),
            rule,
            sink,
            note: ChannelNote::default(),
            flights: VecDeque::new(),
            owed: Vec::new(),
            at_once: 0,
        };
        let rules = alerts.rules.iter().enumerate();
        self.channels = rules
            .flat_map(|(number, rule)| rule.sinks.iter().map(move |sink| (number, *sink)))
            .map(|(r, s)| channel(r, s))
            .collect();
        self.dispatcher.map().lanes.iter().for_each(|lane| lane.outboxes.miss());
    }

    /// Another proxy tells; what was on its way is sent by it, under the same id.
    fn step_down(&mut self) {
        if std::mem::take(&mut self.is_leading) {
            self.metrics.alerts_leading.set(0);
            self.sends.abort_all();
            self.sends = JoinSet::new();
            self.paces.iter_mut().for_each(|pace| pace.is_busy = false);
            self.channels.clear();
        }
    }

    async fn pass(&mut self) {
        let lanes = self.dispatcher.map().lanes.clone();
        self.load(&lanes).await;
        self.land().await;
        self.pay(&lanes).await;
        find_missed(&lanes);
        // Read after the marks were made, so that nothing that was told looks untold.
        let views = read_waiting(&lanes).await;
        let alerts = self.alerts.clone();
        self.watch.look(&alerts.rules, &lanes).await;
        self.settle(&views, &lanes);
        // What those before have left must be known before anything new is told.
        let is_loaded = lanes.iter().all(|lane| self.is_out(lane) || self.loaded.contains(lane.name()));
        for channel in 0..self.channels.len() {
            self.launch(channel, is_loaded.then_some(&views[..])).await;
        }
    }

    /// Waits for the next pass, or for something to do.
    async fn rest(&mut self, took: Duration) {
        let renew = RENEW_EVERY.mul_f64(rand::random_range(0.8..1.0));
        if !self.is_leading {
            tokio::time::sleep(renew).await;
            return;
        }
        let lanes = self.dispatcher.map().lanes.clone();
        tokio::time::sleep(GATHER.max(took.min(renew))).await;
        let is_busy = lanes.iter().any(|lane| !lane.outboxes.waiting().is_empty());
        let rest = if is_busy { PASS_EVERY.max(took * REST).min(renew) } else { renew };
        let bells = select_all(lanes.iter().map(|lane| lane.outboxes.rung().boxed()));
        tokio::select! {
            () = tokio::time::sleep(rest) => {}
            _ = bells => {}
            Some(landed) = self.sends.join_next() => self.take(landed).await,
        }
    }

    /// Whether a shard is down and not only slow for a moment: what is noted there is not waited for.
    fn is_out(&self, lane: &Lane) -> bool {
        let since = self.down_since.get(lane.name());
        lane.is_down() && since.is_some_and(|since| since.elapsed() >= Duration::from_millis(LEAD_MS))
    }

    /// Reads what those who led before have left.
    async fn load(&mut self, lanes: &[Arc<Lane>]) {
        for lane in lanes.iter().filter(|lane| !lane.is_down()) {
            if self.loaded.contains(lane.name()) {
                continue;
            }
            let Ok(Ok(notes)) = tokio::time::timeout(SHARD_WAIT, lane.shard().notes(ROLE)).await else { continue };
            self.loaded.insert(lane.name().clone());
            for (name, note) in notes {
                if !self.take_note(lane, &name, &note) {
                    self.keep_note(Some(lane.name()), &name, None).await;
                }
            }
        }
    }

    /// Whether the note still means something.
    fn take_note(&mut self, lane: &Lane, name: &str, text: &[u8]) -> bool {
        let (channel_name, is_flight) = name.split_once('#').map_or((name, false), |(channel, _)| (channel, true));
        let Some(channel) = self.channels.iter_mut().find(|channel| channel.name == channel_name) else { return false };
        if !is_flight {
            let Ok(note) = serde_json::from_slice::<ChannelNote>(text) else { return false };
            if note.updated_at >= channel.note.updated_at {
                self.watch.firing[channel.rule].extend(note.firing.clone());
                channel.note = note;
            }
            return true;
        }
        let Ok(FlightNote { message, accepted }) = serde_json::from_slice(text) else { return false };
        let is_known = |flight: &Flight| flight.message.id == message.id;
        if channel.flights.iter().any(is_known) || channel.owed.iter().any(is_known) {
            return true;
        }
        let flight = Flight { message, home: Some(lane.name().clone()), is_noted_as_accepted: accepted };
        if accepted {
            channel.owed.push(flight)
        } else {
            channel.flights.push_back(flight)
        }
        true
    }

    /// Removes a note, now or as soon as its shard can be reached: left there, whoever leads next would send it again.
    async fn remove_note(&mut self, shard: Option<&Arc<str>>, name: &str) {
        if !self.keep_note(shard, name, None).await
            && self.stale.len() < STALE_MAX
            && let Some(shard) = shard.filter(|shard| self.dispatcher.map().lane(shard).is_some())
        {
            self.stale.push((shard.clone(), name.to_owned()));
        }
    }

    /// Writes or removes a note; whether it is done.
    async fn keep_note(&self, shard: Option<&Arc<str>>, name: &str, text: Option<Bytes>) -> bool {
        let Some(lane) = shard.and_then(|shard| self.dispatcher.map().lane(shard).cloned()) else { return false };
        if lane.is_down() {
            return false;
        }
        let written = async {
            // The home's role is ours; that of another shard is asked for on the way.
            let leads = lane.shard().lead(ROLE, &self.holder, LEAD_MS).await?;
            if leads { lane.shard().note(ROLE, &self.holder, name, text).await } else { Ok(false) }
        };
        matches!(tokio::time::timeout(SHARD_WAIT, written).await, Ok(Ok(true)))
    }

    fn home_name(&self) -> Option<Arc<str>> {
        self.home.as_ref().map(|lane| lane.name().clone())
    }

    async fn keep_channel(&mut self, channel: usize) {
        let channel = &mut self.channels[channel];
        channel.note.updated_at = clock::now().max(channel.note.updated_at + 1);
        let (name, note) = (channel.name.clone(), serde_json::to_vec(&channel.note));
        if let Ok(note) = note {
            self.keep_note(self.home_name().as_ref(), &name, Some(note.into())).await;
        }
    }

    async fn land(&mut self) {
        while let Some(landed) = self.sends.try_join_next() {
            self.take(landed).await;
        }
    }

    /// Acts on what became of a message.
    async fn take(
        &mut self,
        landed: std::result::Result<(usize, std::result::Result<(), Failure>), tokio::task::JoinError>,
    ) {
        let (number, result) = match landed {
            Ok(landed) => landed,
            Err(error) => {
                // Which one it was is not known; they are sent again, under their ids.
                tracing::error!(%error, "an alert's sending broke off");
                self.paces.iter_mut().for_each(|pace| pace.is_busy = false);
                return;
            }
        };
        let alerts = self.alerts.clone();
        let channel = &mut self.channels[number];
        let (pace, sink) = (&mut self.paces[channel.sink], &alerts.sinks[channel.sink]);
        pace.is_busy = false;
        let now = clock::now();
        match result {
            Ok(()) => {
                if pace.failures > 0 {
                    tracing::info!(sink = %sink.name, "alerts are delivered again");
                }
                (pace.failures, pace.rest_until) = (0, Some(Instant::now() + SEND_EVERY));
                self.metrics.alert_sent(&sink.name);
                channel.note.sent += 1;
                let rule = &alerts.rules[channel.rule];
                if channel.is_due(false, rule, now) {
                    channel.at_once = 0;
                } else {
                    channel.at_once += 1;
                }
                channel.note.sent_at = now;
                if let Some(flight) = channel.flights.pop_front() {
                    for change in &flight.message.changes {
                        match change.firing {
                            true => drop(channel.note.firing.insert(change.key.clone(), change.text.clone())),
                            false => drop(channel.note.firing.remove(&change.key)),
                        }
                    }
                    channel.owed.push(flight);
                }
            }
            Err(Failure { why, maybe_taken, retry_after }) => {
                pace.failures += 1;
                let backoff = BACKOFF_MIN * 2u32.saturating_pow(pace.failures.min(12) - 1);
                let backoff = backoff.min(BACKOFF_MAX).mul_f64(rand::random_range(0.8..1.2));
                pace.rest_until = Some(Instant::now() + retry_after.unwrap_or(backoff));
                self.metrics.alert_failed(&sink.name);
                let why: String = why.chars().take(WHY_CHARS_MAX).collect();
                if pace.failures == 1 {
                    tracing::warn!(sink = %sink.name, %why, "an alert was not delivered; it is tried again");
                } else {
                    tracing::debug!(sink = %sink.name, %why, "an alert was not delivered");
                }
                channel.note.failed += 1;
                channel.note.failed_at = now;
                channel.note.last_error = why;
                if !maybe_taken && let Some(flight) = channel.flights.pop_front() {
                    let name = flight_name(&channel.name);
                    self.remove_note(flight.home.as_ref(), &name).await;
                }
            }
        }
        self.keep_channel(number).await;
    }

    /// Marks what was told, and forgets messages that are marked everywhere.
    async fn pay(&mut self, lanes: &[Arc<Lane>]) {
        for (shard, name) in std::mem::take(&mut self.stale) {
            self.remove_note(Some(&shard), &name).await;
        }
        for number in 0..self.channels.len() {
            let mut owed = std::mem::take(&mut self.channels[number].owed);
            let name = self.channels[number].name.clone();
            let mut kept = Vec::new();
            for mut flight in owed.drain(..) {
                flight.message.parts = mark(&name, std::mem::take(&mut flight.message.parts), lanes).await;
                let (first, note) = (flight_name(&name), owed_name(&name, &flight.message));
                if flight.message.parts.is_empty() {
                    let note = if flight.is_noted_as_accepted { note } else { first };
                    self.remove_note(flight.home.as_ref(), &note).await;
                    continue;
                }
                if !flight.is_noted_as_accepted {
                    let text = serde_json::to_vec(&FlightNote { message: flight.message.clone(), accepted: true });
                    let text = text.ok().map(Bytes::from);
                    let (was, now) = (flight.home.clone(), self.home_name());
                    // Where its own home is gone, the present one has to do.
                    for home in [was.clone(), now] {
                        if !flight.is_noted_as_accepted && self.keep_note(home.as_ref(), &note, text.clone()).await {
                            (flight.is_noted_as_accepted, flight.home) = (true, home);
                        }
                    }
                    if flight.is_noted_as_accepted {
                        self.remove_note(was.as_ref(), &first).await;
                    }
                }
                kept.push(flight);
            }
            if kept.len() > OWED_MAX {
                // What is given up here is told again when its shard is back.
                let flight = kept.remove(0);
                self.remove_note(flight.home.as_ref(), &owed_name(&name, &flight.message)).await;
            }
            self.channels[number].owed = kept;
        }
    }

    /// Takes groups out of the outboxes of which all is told and nothing has happened for an interval.
    fn settle(&self, views: &[View], lanes: &[Arc<Lane>]) {
        let mut marks: BTreeMap<(Arc<str>, Name), Vec<DeathMark>> = BTreeMap::new();
        for view in views {
            let wants = |channel: &&Channel| view.is_wanted(&self.alerts.rules[channel.rule]);
            let mut quiet_ms = None;
            let mut is_told = true;
            for channel in self.channels.iter().filter(wants) {
                // The marks on the shard alone: owed ones may yet have to be made.
                is_told &= view.group.told_on(channel.name.as_bytes()) >= view.group.count;
                quiet_ms = quiet_ms.max(Some(self.alerts.rules[channel.rule].interval_ms));
            }
            let quiet_ms = quiet_ms.unwrap_or(UNWANTED_MS);
            if is_told && view.now.saturating_sub(view.group.last_at) >= quiet_ms {
                marks.entry((view.shard.clone(), view.queue.clone())).or_default().push(view.group.mark());
            }
        }
        for ((shard, queue), marks) in marks {
            if let Some(lane) = lanes.iter().find(|lane| *lane.name() == shard) {
                // Nobody waits for it: what is not done now is done in a later pass.
                drop(lane.submit(Op { queue, action: Action::OutboxSettle { marks } }, 0));
            }
        }
    }

    /// Sends what a channel has to be told, if it is time; without views only what is on its way already.
    async fn launch(&mut self, number: usize, views: Option<&[View]>) {
        let pace = &self.paces[self.channels[number].sink];
        if pace.is_busy || pace.rest_until.is_some_and(|until| Instant::now() < until) {
            return;
        }
        if self.channels[number].flights.is_empty() {
            let Some(message) = views.and_then(|views| self.compose(number, views)) else { return };
            let home = self.home_name();
            let note = FlightNote { message, accepted: false };
            let name = flight_name(&self.channels[number].name);
            let text = serde_json::to_vec(&note).ok().map(Bytes::from);
            let is_noted = self.keep_note(home.as_ref(), &name, text).await;
            if is_noted {
                // In the place of one that was to be removed.
                self.stale.retain(|(shard, stale)| home.as_ref() != Some(shard) || *stale != name);
            }
            // That a shard is down must be said even where no shard is left to write it down on.
            if !is_noted && !note.message.parts.is_empty() {
                return;
            }
            let flight = Flight { message: note.message, home, is_noted_as_accepted: false };
            self.channels[number].flights.push_back(flight);
        }
        let channel = &self.channels[number];
        let Some(flight) = channel.flights.front() else { return };
        let (alerts, message) = (self.alerts.clone(), flight.message.clone());
        let (rule, sink) = (channel.rule, channel.sink);
        self.paces[sink].is_busy = true;
        self.sends
            .spawn(async move { (number, alerts.sinks[sink].send(&message, alerts.rules[rule].digest_groups).await) });
    }

    fn compose(&self, number: usize, views: &[View]) -> Option<Message> {
        let channel = &self.channels[number];
        let rule = &self.alerts.rules[channel.rule];
        // Its note would take the place of one that is still needed.
        if channel.owed.iter().any(|flight| !flight.is_noted_as_accepted) {
            return None;
        }
        let changes = changes(&self.watch.firing[channel.rule], &channel.note.firing);
        let mut is_news = !changes.is_empty();
        let (mut found, mut parts) = (Vec::new(), Vec::new());
        for view in views.iter().filter(|view| view.is_wanted(rule)) {
            let told = channel.told(view);
            if told < view.group.count && parts.len() < PARTS_MAX {
                is_news |= told == 0;
                let entry = Entry::new(&view.shard, &view.queue, &view.group, view.group.count - told);
                found.push((view.group.key.to_vec(), entry));
                parts.push(Part::new(&view.shard, &view.queue, &view.group));
            }
        }
        let now = clock::now();
        if changes.is_empty() && parts.is_empty() || !channel.is_due(is_news, rule, now) {
            return None;
        }
        let entries = merged(found);
        Some(Message { id: new_id(), rule: rule.name.clone(), at: now, entries, changes, parts, test: false })
    }
}

/// What a channel has not been told of the conditions.
fn changes(now: &Firing, told: &Firing) -> Vec<Change> {
    let change =
        |firing: bool| move |(key, text): (&String, &String)| Change { key: key.clone(), firing, text: text.clone() };
    let begun = now.iter().filter(|(key, _)| !told.contains_key(*key)).map(change(true));
    begun.chain(told.iter().filter(|(key, _)| !now.contains_key(*key)).map(change(false))).collect()
}

/// Looks, beside all else, at all queues of the shards where something may have been missed; what it finds the lanes note.
fn find_missed(lanes: &[Arc<Lane>]) {
    for lane in lanes.iter().filter(|lane| !lane.is_down() && lane.outboxes.take_missed()) {
        let lane = lane.clone();
        tokio::spawn(async move {
            if tick_all(&lane).await.is_err() {
                lane.outboxes.miss();
            }
        });
    }
}

async fn tick_all(lane: &Lane) -> Result<()> {
    for group in lane.shard().queues().await?.chunks(GROUP) {
        let began = Instant::now();
        lane.room().await?;
        let tick = |queue: &Name| lane.submit(Op { queue: queue.clone(), action: Action::Tick }, 0);
        for outcome in group.iter().map(tick).collect::<Vec<_>>() {
            outcome.await.unwrap_or(Ok(Outcome::Done))?;
        }
        if group.len() == GROUP {
            tokio::time::sleep(began.elapsed()).await;
        }
    }
    Ok(())
}

/// Marks the parts as told; those that could not be.
async fn mark(channel: &str, parts: Vec<Part>, lanes: &[Arc<Lane>]) -> Vec<Part> {
    let mut groups: BTreeMap<(String, String), Vec<Part>> = BTreeMap::new();
    for part in parts {
        groups.entry((part.shard.clone(), part.queue.clone())).or_default().push(part);
    }
    let mut left = Vec::new();
    let mut asked = Vec::new();
    for ((shard, queue), parts) in groups {
        // A shard that left the map has nothing more to be told.
        let Some(lane) = lanes.iter().find(|lane| **lane.name() == *shard) else { continue };
        let Ok(queue) = Name::parse(queue.as_bytes()) else { continue };
        if lane.is_down() || !lane.has_room() {
            left.extend(parts);
            continue;
        }
        let marks = parts.iter().map(Part::mark).collect();
        let action = Action::OutboxTold { channel: Bytes::copy_from_slice(channel.as_bytes()), marks };
        asked.push((lane.submit(Op { queue, action }, 0), parts));
    }
    let ends = tokio::time::Instant::now() + SHARD_WAIT;
    for (outcome, parts) in asked {
        if !matches!(tokio::time::timeout_at(ends, outcome).await, Ok(Ok(Ok(Outcome::Done)))) {
            left.extend(parts);
        }
    }
    left
}
