//! The shard map as it is stored: which shards there are, how they stand, and where keys had their homes before.
//!
//! One line of text, kept on every shard beside its stamp ([`crate::shard::Stamp`]), under one version. Pure: the changes
//! that operators order are functions from one layout to the next; who decides between two of them is `keeper`.
//!
//! ```text
//! layout = member*  ["#" version of the homes]  ["^" version ":" homes of locks]  ("~" former homes)*  ("-" name of a shard that jobs left)*    blanks between
//! member = name ["/" partitions] "*" weight ["!" state] ["=" url, without user and password]           sorted by name
//! former = name "*" weight ("," name "*" weight)*
//! ```
//!
//! A line that has members alone is a map from the configuration that no order has changed.

use std::fmt::Write;

use crate::error::{Error, Result};
use crate::job::is_shard_name;

/// Most former homes that are remembered; a further change of homes is refused until they are forgotten.
pub const FORMER_MAX: usize = 8;
/// Names of shards that jobs left that are remembered, the latest.
const LEFT_MAX: usize = 64;

/// How a shard stands in the map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    #[default]
    Open,
    /// Takes no new jobs but those whose home it is.
    Draining,
    /// Is no job's home any more, and its jobs go to the others.
    Leaving,
    /// The same, and about to be removed: it grants no lock.
    Closing,
}

impl Standing {
    const ALL: [(Standing, &'static str); 4] = [
        (Standing::Open, "open"),
        (Standing::Draining, "draining"),
        (Standing::Leaving, "leaving"),
        (Standing::Closing, "closing"),
    ];

    /// Whether its jobs go to the others.
    pub fn leaves(self) -> bool {
        matches!(self, Standing::Leaving | Standing::Closing)
    }

    pub fn word(self) -> &'static str {
        Self::ALL[self as usize].1
    }

    fn parse(text: &str) -> Option<Standing> {
        Self::ALL.iter().find(|(_, word)| *word == text).map(|(standing, _)| *standing)
    }
}

/// One shard, or all partitions of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub name: String,
    pub partitions: u16,
    pub weight: u32,
    pub standing: Standing,
    /// Where it is, for a process whose configuration does not say; empty when only the configuration can.
    pub url: String,
}

impl Member {
    /// The names of its shards: its own, or `name/0` to `name/(n-1)`.
    pub fn shards(&self) -> impl Iterator<Item = String> {
        (0..self.partitions).map(|part| match self.partitions {
            1 => self.name.clone(),
            _ => format!("{}/{part}", self.name),
        })
    }

    fn place(&self) -> String {
        match self.partitions {
            1 => format!("{}*{}", self.name, self.weight),
            partitions => format!("{}/{partitions}*{}", self.name, self.weight),
        }
    }
}

/// Names and weights of the shards among which keys had their homes.
pub type Homes = Vec<(String, u32)>;

/// A whole map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    pub version: u64,
    /// The version in which homes moved last; 0 when they never did.
    pub homes_since: u64,
    /// Sorted by name.
    pub members: Vec<Member>,
    /// Where locks and semaphores have their homes, once that is not where jobs have them: only the removal of a shard moves
    /// them, when nobody holds one there.
    pub locks: Homes,
    /// The version in which locks moved last; 0 when they never did. Their fences begin anew above it.
    pub locks_since: u64,
    /// Where keys had their homes before, the latest last.
    pub former: Vec<Homes>,
    /// Shards whose jobs went elsewhere: removed ones and those that are or were leaving; the latest last.
    pub left: Vec<String>,
}

impl Layout {
    pub fn new(version: u64, mut members: Vec<Member>) -> Layout {
        members.sort_by(|a, b| a.name.cmp(&b.name));
        Layout { version, members, ..Layout::default() }
    }

    /// Reads a stored line.
    pub fn parse(version: u64, line: &str) -> Option<Layout> {
        let mut layout = Layout { version, ..Layout::default() };
        for word in line.split(' ').filter(|word| !word.is_empty()) {
            if let Some(since) = word.strip_prefix('#') {
                layout.homes_since = since.parse().ok()?;
            } else if let Some(word) = word.strip_prefix('^') {
                let (since, homes) = word.split_once(':')?;
                (layout.locks_since, layout.locks) = (since.parse().ok()?, parse_places(homes)?);
            } else if let Some(homes) = word.strip_prefix('~') {
                layout.former.push(parse_places(homes)?);
            } else if let Some(name) = word.strip_prefix('-') {
                layout.left.push(name.into());
            } else {
                layout.members.push(parse_member(word)?);
            }
        }
        (!layout.members.is_empty()).then_some(layout)
    }

    pub fn line(&self) -> String {
        let mut line = String::new();
        for member in &self.members {
            let blank = if line.is_empty() { "" } else { " " };
            // Writing to a String cannot fail.
            let _ = write!(line, "{blank}{}", member.place());
            if member.standing != Standing::Open {
                let _ = write!(line, "!{}", member.standing.word());
            }
            if !member.url.is_empty() {
                let _ = write!(line, "={}", member.url.replace(' ', "%20"));
            }
        }
        let _ = write!(line, " #{}", self.homes_since);
        let places =
            |homes: &Homes| homes.iter().map(|(name, weight)| format!("{name}*{weight}")).collect::<Vec<_>>().join(",");
        if !self.locks.is_empty() {
            let _ = write!(line, " ^{}:{}", self.locks_since, places(&self.locks));
        }
        for homes in &self.former {
            let _ = write!(line, " ~{}", places(homes));
        }
        self.left.iter().for_each(|name| {
            let _ = write!(line, " -{name}");
        });
        line
    }

    /// Names and weights alone: what two configurations must agree on.
    pub fn places(&self) -> String {
        self.members.iter().map(Member::place).collect::<Vec<_>>().join(" ")
    }

    pub fn member(&self, name: &str) -> Option<&Member> {
        self.members.iter().find(|member| member.name == name)
    }

    /// Among whom keys have their homes now.
    pub fn homes(&self) -> Homes {
        let is_home = |member: &&Member| !member.standing.leaves();
        let homes = self.members.iter().filter(is_home);
        homes.flat_map(|member| member.shards().map(|name| (name, member.weight))).collect()
    }

    /// Among whom groups have their homes: where locks have theirs, but for shards that are leaving.
    pub fn homes_of_groups(&self) -> Homes {
        let mut homes = if self.locks.is_empty() { self.homes() } else { self.locks.clone() };
        let stays = self.homes();
        homes.retain(|(name, _)| stays.iter().any(|(known, _)| known == name));
        if homes.is_empty() { stays } else { homes }
    }

    /// The next version, after a change. Where homes moved, the ones before are remembered.
    fn next(&self, mut layout: Layout) -> Result<Layout> {
        layout.version = self.version + 1;
        layout.remember(self)?;
        Ok(layout)
    }

    fn remember(&mut self, before: &Layout) -> Result<()> {
        self.former = before.former.clone();
        self.homes_since = before.homes_since;
        (self.locks, self.locks_since) = (before.locks.clone(), before.locks_since);
        if self.homes() != before.homes() {
            self.former.retain(|homes| *homes != before.homes());
            self.former.push(before.homes());
            self.homes_since = self.version;
        }
        let names: Vec<String> = self.members.iter().flat_map(Member::shards).collect();
        let had: Homes = if before.locks.is_empty() { before.homes() } else { before.locks.clone() };
        let mut has = had.clone();
        has.retain(|(name, _)| names.contains(name));
        if has.is_empty() {
            has = self.homes();
        }
        if has != had {
            self.locks_since = self.version;
        }
        if has != self.homes() || self.locks_since > 0 || !self.locks.is_empty() {
            self.locks = has;
        }
        // What no member is left of is nothing to look into.
        self.former.retain(|homes| homes.iter().any(|(name, _)| names.contains(name)));
        if self.former.len() > FORMER_MAX {
            return Err(Error::bad(format!(
                "homes have moved {FORMER_MAX} times and all are remembered: GOFLOW.SHARD FORGET first, when no job with an ID or UNIQUE key is older than that"
            )));
        }
        Ok(())
    }

    /// This map, from a configuration that is newer than `stored`, as its successor. It adds shards and changes weights; only
    /// an order takes a shard out, which looks for what the shard holds.
    pub fn succeed(mut self, stored: &Layout) -> Result<Layout> {
        for member in &mut self.members {
            match stored.member(&member.name) {
                Some(known) if known.partitions != member.partitions => {
                    return Err(Error::bad(format!(
                        "cluster {} has {} partitions, and the configuration says {}: their number is for ever",
                        member.name, known.partitions, member.partitions
                    )));
                }
                Some(known) => member.standing = known.standing,
                None if stored.left.contains(&member.name) => return Err(removed_before(&member.name)),
                None => {}
            }
        }
        if let Some(gone) = stored.members.iter().find(|member| self.member(&member.name).is_none()) {
            let name = &gone.name;
            return Err(Error::bad(format!(
                "the configuration leaves out shard {name}: GOFLOW.SHARD REMOVE {name} takes it out of the map when it is empty, \
                 and with LOST when it is gone for good"
            )));
        }
        self.left = stored.left.clone();
        self.remember(stored)?;
        Ok(self)
    }

    fn note_left(&mut self, name: String) {
        self.left.retain(|left| *left != name);
        self.left.push(name);
        let excess = self.left.len().saturating_sub(LEFT_MAX);
        self.left.drain(..excess);
    }

    /// The member of this name, to be changed.
    fn change(&self, name: &str) -> Result<(Layout, usize)> {
        let at = self.members.iter().position(|member| member.name == name);
        let partition = || self.members.iter().find(|member| member.shards().any(|shard| shard == name));
        at.map(|at| (self.clone(), at)).ok_or_else(|| match partition() {
            Some(member) => {
                Error::bad(format!("'{name}' is a partition: expected the cluster's name, '{}'", member.name))
            }
            None => Error::bad(format!("no shard is named '{name}' here")),
        })
    }

    /// `None`: it stands so already.
    pub fn set_standing(&self, name: &str, standing: Standing) -> Result<Option<Layout>> {
        let (mut layout, at) = self.change(name)?;
        if layout.members[at].standing == standing {
            return Ok(None);
        }
        layout.members[at].standing = standing;
        if standing.leaves() {
            layout.note_left(name.to_owned());
        }
        if !layout.members.iter().any(|member| member.standing == Standing::Open) {
            return Err(Error::bad("this is the last shard that takes new jobs; undrain or add another first"));
        }
        self.next(layout).map(Some)
    }

    pub fn set_weight(&self, name: &str, weight: u32) -> Result<Option<Layout>> {
        let (mut layout, at) = self.change(name)?;
        if layout.members[at].weight == weight {
            return Ok(None);
        }
        layout.members[at].weight = weight;
        self.next(layout).map(Some)
    }

    /// `None`: it is there already, as it is to be.
    pub fn add(&self, member: Member) -> Result<Option<Layout>> {
        if let Some(known) = self.member(&member.name) {
            return match (known.url == member.url, known.weight == member.weight) {
                (true, true) => Ok(None),
                (true, false) => Err(Error::bad(format!("shard '{}' is there with another weight", member.name))),
                _ => Err(Error::bad(format!("shard '{}' is there under another URL", member.name))),
            };
        }
        if let Some(known) = self.members.iter().find(|known| known.url == member.url) {
            return Err(Error::bad(format!("shard '{}' has this URL already", known.name)));
        }
        if self.left.contains(&member.name) {
            return Err(removed_before(&member.name));
        }
        let mut layout = self.clone();
        layout.members.push(member);
        layout.members.sort_by(|a, b| a.name.cmp(&b.name));
        self.next(layout).map(Some)
    }

    pub fn remove(&self, name: &str) -> Result<Option<Layout>> {
        let (mut layout, at) = self.change(name)?;
        let member = layout.members.remove(at);
        layout.note_left(member.name);
        self.next(layout).map(Some)
    }

    /// Without what is remembered of former homes.
    pub fn forget_former(&self) -> Result<Option<Layout>> {
        let mut layout = Layout { version: self.version + 1, ..self.clone() };
        layout.former.clear();
        Ok((!self.former.is_empty()).then_some(layout))
    }
}

/// Ids, receipts and the marks of what travelled still name the one that was there.
fn removed_before(name: &str) -> Error {
    Error::bad(format!("a shard '{name}' was removed before: expected another name"))
}

fn parse_places(text: &str) -> Option<Homes> {
    text.split(',').map(parse_place).collect()
}

fn parse_place(text: &str) -> Option<(String, u32)> {
    let (name, weight) = text.rsplit_once('*')?;
    Some((name.to_owned(), weight.parse().ok().filter(|weight| *weight > 0)?))
}

fn parse_member(word: &str) -> Option<Member> {
    let (word, url) = word.split_once('=').unwrap_or((word, ""));
    let (place, standing) = match word.split_once('!') {
        Some((place, standing)) => (place, Standing::parse(standing)?),
        None => (word, Standing::Open),
    };
    let (name, weight) = parse_place(place)?;
    // A cluster's name has its partitions behind it; only its URL tells it from a name with a number at its end.
    let split = name.rsplit_once('/').and_then(|(cluster, count)| Some((cluster.to_owned(), count.parse().ok()?)));
    let (name, partitions) = match split {
        Some((cluster, partitions)) if url.contains("+cluster://") && partitions > 1 => (cluster, partitions),
        _ => (name, 1),
    };
    is_shard_name(&name).then(|| Member { name, partitions, weight, standing, url: url.replace("%20", " ") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, url: &str) -> Member {
        Member { name: name.into(), partitions: 1, weight: 1, standing: Standing::Open, url: url.into() }
    }

    fn layout() -> Layout {
        Layout::new(3, vec![member("s1", "redis://b"), member("s0", "redis://a")])
    }

    #[test]
    fn a_layout_is_read_back_as_it_was() {
        let mut layout = layout().add(member("s2", "redis://c")).unwrap().unwrap();
        layout = layout.set_standing("s0", Standing::Leaving).unwrap().unwrap().remove("s1").unwrap().unwrap();
        let cluster = "redis+cluster://p,q?partitions=2";
        layout.members.push(Member { partitions: 2, weight: 7, ..member("t/c", cluster) });
        assert_eq!(Layout::parse(layout.version, &layout.line()), Some(layout.clone()));
        assert_eq!(
            layout.line(),
            format!(
                "s0*1!leaving=redis://a s2*1=redis://c t/c/2*7={cluster} #6 ^6:s0*1 ~s0*1,s1*1 ~s0*1,s1*1,s2*1 ~s1*1,s2*1 -s0 -s1"
            )
        );
        for broken in ["", "#1", "s0", "s0*0", "s0*1!up", "s0*1 ~s1", "s0*1 ^s0*1", "s~*1"] {
            assert_eq!(Layout::parse(1, broken), None, "{broken}");
        }
    }

    #[test]
    fn homes_that_moved_are_remembered_and_others_are_not() {
        let drained = layout().set_standing("s0", Standing::Draining).unwrap().unwrap();
        assert_eq!((drained.version, drained.homes_since, drained.former.len()), (4, 0, 0));
        let weighed = drained.set_weight("s1", 5).unwrap().unwrap();
        assert_eq!((weighed.homes_since, weighed.former[0].clone()), (5, layout().homes()));
        assert_eq!(weighed.set_weight("s1", 5), Ok(None));
        assert_eq!(weighed.forget_former().unwrap().unwrap().former, Vec::<Homes>::new());
    }

    #[test]
    fn locks_move_with_the_removal_of_their_shard_alone() {
        let grown = layout().add(member("s2", "redis://c")).unwrap().unwrap();
        assert_eq!((&grown.locks, grown.locks_since), (&layout().homes(), 0));
        let weighed = grown.set_weight("s0", 9).unwrap().unwrap().forget_former().unwrap().unwrap();
        assert_eq!((&weighed.locks, weighed.locks_since), (&layout().homes(), 0));
        let closing = weighed.set_standing("s0", Standing::Closing).unwrap().unwrap();
        assert_eq!((&closing.locks, closing.locks_since), (&layout().homes(), 0));
        let one = closing.remove("s0").unwrap().unwrap();
        assert_eq!((one.locks.clone(), one.locks_since), (vec![("s1".into(), 1)], one.version));
        let none = one.set_standing("s1", Standing::Closing).unwrap().unwrap().remove("s1").unwrap().unwrap();
        assert_eq!((none.locks.clone(), none.locks_since), (vec![("s2".into(), 1)], none.version));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let layout = layout();
        let refusals = [
            (layout.set_standing("s9", Standing::Draining), "no shard is named"),
            (layout.add(member("s0", "redis://x")), "another URL"),
            (layout.add(member("s9", "redis://a")), "has this URL already"),
            (
                layout.set_standing("s0", Standing::Draining).unwrap().unwrap().set_standing("s1", Standing::Leaving),
                "last shard",
            ),
        ];
        for (refusal, why) in refusals {
            assert!(refusal.unwrap_err().text.contains(why), "{why}");
        }
        assert_eq!(layout.add(member("s0", "redis://a")), Ok(None));
        let mut changed = layout;
        let refusal = (2..).find_map(|weight| match changed.set_weight("s0", weight) {
            Ok(next) => {
                changed = next.unwrap();
                None
            }
            Err(error) => Some((weight, error)),
        });
        let (weight, error) = refusal.unwrap();
        assert!(weight as usize == FORMER_MAX + 2 && error.text.contains("FORGET"), "{weight} {error}");
    }

    #[test]
    fn a_newer_configuration_adds_to_what_was_ordered_and_takes_nothing_out() {
        let stored = layout().set_standing("s0", Standing::Draining).unwrap().unwrap();
        let (s0, s1, s2) = (member("s0", "redis://a"), member("s1", "redis://b"), member("s2", "redis://c"));
        let next = Layout::new(9, vec![s0.clone(), s1.clone(), s2.clone()]).succeed(&stored).unwrap();
        assert_eq!((next.version, next.homes_since, next.members.len()), (9, 9, 3));
        assert_eq!((next.members[0].standing, next.former.len()), (Standing::Draining, 1));
        let refusal = Layout::new(9, vec![s0.clone(), s2]).succeed(&stored).unwrap_err();
        assert!(refusal.text.contains("leaves out shard s1"), "{refusal}");
        let removed = stored.remove("s1").unwrap().unwrap();
        let refusal = Layout::new(9, vec![s0.clone(), s1]).succeed(&removed).unwrap_err();
        assert!(refusal.text.contains("was removed before"), "{refusal}");
        let refusal = Layout::new(9, vec![Member { partitions: 2, ..s0 }]).succeed(&removed).unwrap_err();
        assert!(refusal.text.contains("partitions"), "{refusal}");
    }
}
