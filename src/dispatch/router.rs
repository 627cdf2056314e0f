//! Which shard: the home of a key, and the strategy that places a job that has none.
//!
//! The home of a key is found by weighted rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to
//! increase hit rates", 1998; weights after Schindelhauer and Schomaker, "Weighted distributed hash tables", 2005): every
//! shard draws a number from the key and its own name, and the highest owns the key. One shard more moves 1/(N+1) of the
//! keys and only to itself, exactly and not nearly as on a ring of virtual nodes, at some nanoseconds a shard. Health
//! changes nothing here (law 10).

use std::cell::RefCell;
use std::collections::HashMap;

use rand::Rng;

use crate::job::Name;

/// How a job without an id of its own is placed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    #[default]
    Hash,
    RoundRobin,
    LeastLoaded,
}

impl Strategy {
    pub const ALL: [(Strategy, &'static str); 3] =
        [(Strategy::Hash, "hash"), (Strategy::RoundRobin, "round-robin"), (Strategy::LeastLoaded, "least-loaded")];

    pub fn parse(text: &str) -> Option<Strategy> {
        Self::ALL.iter().find(|(_, word)| *word == text).map(|(strategy, _)| *strategy)
    }

    pub fn word(self) -> &'static str {
        Self::ALL[self as usize].1
    }
}

/// Owners of keys among named, weighted shards.
#[derive(Clone, Debug)]
pub struct Ring {
    seeds: Vec<u64>,
    weights: Vec<f64>,
    even: bool,
}

impl Ring {
    /// Weights are positive; a shard of weight 2 owns twice as many keys as one of weight 1.
    pub fn new<'a>(shards: impl Iterator<Item = (&'a str, u32)>) -> Ring {
        let (seeds, weights): (Vec<u64>, Vec<u32>) =
            shards.map(|(name, weight)| (hash_bytes(name.as_bytes()), weight.max(1))).unzip();
        let even = weights.windows(2).all(|pair| pair[0] == pair[1]);
        Ring { seeds, weights: weights.into_iter().map(f64::from).collect(), even }
    }

    /// The index of the shard that owns the key. At least one shard is there.
    pub fn home(&self, key: &[u8]) -> usize {
        self.home_of_hash(hash_bytes(key))
    }

    fn home_of_hash(&self, key: u64) -> usize {
        if self.even {
            let drawn = self.seeds.iter().map(|seed| mix(key ^ seed));
            return drawn.enumerate().max_by_key(|(_, number)| *number).map_or(0, |(at, _)| at);
        }
        let drawn = self.seeds.iter().zip(&self.weights).map(|(seed, weight)| {
            // Into (0, 1): 53 bits, never 0 or 1.
            let unit = ((mix(key ^ seed) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
            -weight / unit.ln()
        });
        drawn.enumerate().max_by(|(_, a), (_, b)| a.total_cmp(b)).map_or(0, |(at, _)| at)
    }
}

/// The part of a key that decides its home: what stands between the first `{` and the next `}`, if that is not empty.
pub fn key_tag(key: &[u8]) -> &[u8] {
    let tag = memchr::memchr(b'{', key).and_then(|open| {
        let rest = &key[open + 1..];
        memchr::memchr(b'}', rest).filter(|len| *len > 0).map(|len| &rest[..len])
    });
    tag.unwrap_or(key)
}

/// FNV-1a, 64 bits. It decides where keyed objects live, so it must never change.
fn hash_bytes(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014). It must never change either.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What the strategies look at, by the index of the shard.
pub trait Candidates {
    fn count(&self) -> usize;
    fn weight(&self, shard: usize) -> u32;
    /// Whether the shard takes new jobs now: it is up and not draining.
    fn takes_jobs(&self, shard: usize) -> bool;
    /// Whether an operator ordered that it takes no new jobs.
    fn is_draining(&self, shard: usize) -> bool;
    /// Jobs of the queue that wait or run there, as last heard and corrected by what was sent since; `None`: unknown.
    fn load(&self, shard: usize, queue: &Name) -> Option<u64>;
}

/// Round-robin positions kept by one thread for so many queues at most; the rest start afresh.
const POSITIONS_MAX: usize = 10_000;

thread_local! {
    static POSITIONS: RefCell<HashMap<Name, u64>> = RefCell::new(HashMap::new());
}

/// The shard for a new job without a home; `None` when no shard takes jobs.
pub fn place(strategy: Strategy, ring: &Ring, queue: &Name, shards: &impl Candidates) -> Option<usize> {
    if shards.count() == 1 {
        return (!shards.is_draining(0)).then_some(0);
    }
    match strategy {
        // The id does not exist before the shard hands it out, so the key is a random one. A shard that is down keeps its
        // share and answers SHARDDOWN (law 10); one that drains passes its share on.
        Strategy::Hash => {
            let mut random = rand::rng();
            let open = (0..shards.count()).any(|at| !shards.is_draining(at));
            open.then(|| {
                loop {
                    let at = ring.home_of_hash(random.random());
                    if !shards.is_draining(at) {
                        break at;
                    }
                }
            })
        }
        Strategy::RoundRobin => round_robin(queue, shards),
        Strategy::LeastLoaded => least_loaded(queue, shards),
    }
}

/// Every shard in turn, as often as its weight, from a random start; shards that take no jobs are stepped over.
fn round_robin(queue: &Name, shards: &impl Candidates) -> Option<usize> {
    let total: u64 = (0..shards.count()).map(|at| u64::from(shards.weight(at))).sum();
    POSITIONS.with_borrow_mut(|positions| {
        if positions.len() >= POSITIONS_MAX && !positions.contains_key(queue) {
            positions.clear();
        }
        let position = match positions.get_mut(queue) {
            Some(position) => position,
            None => positions.entry(queue.clone()).or_insert_with(|| rand::rng().random_range(0..total)),
        };
        for _ in 0..total {
            let at = interleaved(*position % total, total, shards);
            *position = position.wrapping_add(1);
            if shards.takes_jobs(at) {
                return Some(at);
            }
        }
        None
    })
}

/// The shard of one step of the round: the steps of a heavy shard are spread over the round, not in a row.
fn interleaved(step: u64, total: u64, shards: &impl Candidates) -> usize {
    if total == shards.count() as u64 {
        return step as usize;
    }
    // 2^32 / golden ratio steps through the round; with an odd multiplier every step comes once when the total is a power
    // of two, and nearly evenly otherwise.
    let spread = step.wrapping_mul(0x9E37_79B1) % total;
    let mut left = if gcd(0x9E37_79B1 % total, total) == 1 { spread } else { step };
    for at in 0..shards.count() {
        let weight = u64::from(shards.weight(at));
        if left < weight {
            return at;
        }
        left -= weight;
    }
    0
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The less loaded, by weight, of two shards drawn at random (Mitzenmacher, "The power of two choices", 2001). A shard
/// of unknown load counts as equal to the other, so it is neither flooded nor starved.
fn least_loaded(queue: &Name, shards: &impl Candidates) -> Option<usize> {
    let open: Vec<usize> = (0..shards.count()).filter(|at| shards.takes_jobs(*at)).collect();
    match open.len() {
        0 => None,
        1 => Some(open[0]),
        n => {
            let mut random = rand::rng();
            let first = random.random_range(0..n);
            let second = (first + random.random_range(1..n)) % n;
            let (a, b) = (open[first], open[second]);
            let scaled = |at: usize| shards.load(at, queue).map(|load| load as f64 / f64::from(shards.weight(at)));
            match (scaled(a), scaled(b)) {
                (Some(left), Some(right)) if right < left => Some(b),
                _ => Some(a),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(Vec<(u32, bool, Option<u64>)>);

    impl Candidates for Fixed {
        fn count(&self) -> usize {
            self.0.len()
        }
        fn weight(&self, shard: usize) -> u32 {
            self.0[shard].0
        }
        fn takes_jobs(&self, shard: usize) -> bool {
            self.0[shard].1
        }
        fn is_draining(&self, shard: usize) -> bool {
            !self.0[shard].1
        }
        fn load(&self, shard: usize, _queue: &Name) -> Option<u64> {
            self.0[shard].2
        }
    }

    fn ring(names: &[&str]) -> Ring {
        Ring::new(names.iter().map(|name| (*name, 1)))
    }

    fn queue() -> Name {
        Name::parse(b"main").unwrap()
    }

    fn shares(strategy: Strategy, shards: &Fixed, rounds: usize) -> Vec<usize> {
        let ring = Ring::new(
            ["a", "b", "c", "d"].iter().take(shards.count()).enumerate().map(|(at, n)| (*n, shards.weight(at))),
        );
        let mut shares = vec![0; shards.count()];
        for _ in 0..rounds {
            shares[place(strategy, &ring, &queue(), shards).unwrap()] += 1;
        }
        shares
    }

    #[test]
    fn the_home_of_a_key_never_changes() {
        // Written down once; a change here moves every keyed object of every deployment.
        let ring = ring(&["s1", "s2", "s3", "s4"]);
        let homes: Vec<usize> = (0..16).map(|n| ring.home(format!("key:{n}").as_bytes())).collect();
        assert_eq!(homes, [0, 3, 2, 2, 1, 0, 0, 0, 2, 0, 0, 2, 3, 1, 0, 0], "homes moved");
    }

    #[test]
    fn a_fifth_shard_takes_a_fifth_of_the_keys_and_nothing_else_moves() {
        let (four, five) = (ring(&["s1", "s2", "s3", "s4"]), ring(&["s1", "s2", "s3", "s4", "s5"]));
        let mut moved = 0;
        for n in 0..200_000 {
            let key = format!("job-{n}");
            let (before, after) = (four.home(key.as_bytes()), five.home(key.as_bytes()));
            if before != after {
                assert_eq!(after, 4, "a key moved between two old shards");
                moved += 1;
            }
        }
        assert!((36_000..=44_000).contains(&moved), "{moved} of 200,000 keys moved");
    }

    #[test]
    fn a_heavier_shard_owns_more_keys() {
        let ring = Ring::new([("a", 1), ("b", 3)].into_iter());
        let heavy = (0..40_000).filter(|n| ring.home(format!("k{n}").as_bytes()) == 1).count();
        assert!((29_000..=31_000).contains(&heavy), "{heavy} of 40,000 keys");
    }

    #[test]
    fn every_strategy_is_even_over_shards_that_are_alike() {
        let shards = Fixed(vec![(1, true, Some(5)); 4]);
        for (strategy, word) in Strategy::ALL {
            for share in shares(strategy, &shards, 40_000) {
                assert!((9_500..=10_500).contains(&share), "{word} gave a shard {share} of 10,000");
            }
        }
    }

    #[test]
    fn round_robin_follows_the_weights_and_steps_over_what_is_down() {
        let shards = Fixed(vec![(1, true, None), (2, true, None), (1, false, None), (5, true, None)]);
        let shares = shares(Strategy::RoundRobin, &shards, 9_000);
        assert_eq!(shares[2], 0);
        assert!(shares[3] > 2 * shares[1] && shares[1] > shares[0], "{shares:?}");
    }

    #[test]
    fn least_loaded_spares_the_loaded_and_does_not_flood_the_unknown() {
        let shards = Fixed(vec![(1, true, Some(100_000)), (1, true, Some(10)), (1, true, None), (1, true, Some(10))]);
        let shares = shares(Strategy::LeastLoaded, &shards, 12_000);
        assert!(shares[0] < 2_500, "the loaded shard got {}", shares[0]);
        assert!(shares[2] < 6_000, "the unknown shard got {}", shares[2]);
        assert!(shares[2] > 1_000, "the unknown shard got {}", shares[2]);
    }

    #[test]
    fn the_tag_of_a_key_is_what_its_first_braces_hold() {
        for (key, tag) in
            [("a{b}c", "b"), ("{}x", "{}x"), ("a{b", "a{b"), ("{a}{b}", "a"), ("a{}{b}", "a{}{b}"), ("x", "x")]
        {
            assert_eq!(key_tag(key.as_bytes()), tag.as_bytes(), "{key}");
        }
    }
}
