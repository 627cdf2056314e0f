//! The ready jobs of a queue in the order in which they leave, at a fraction of a byte for each.
//!
//! A place in line is a bit. Sixty-four places that follow each other share one word, the words stand in a tree by
//! (higher priority, lower place), and the job at a place is the one whose seq is the place, unless it has moved.

use std::collections::{BTreeMap, HashMap};

const BITS: u64 = 64;

/// A set of numbers that lie close together.
#[derive(Default)]
pub struct Dense {
    words: BTreeMap<u64, u64>,
}

impl Dense {
    pub fn insert(&mut self, number: u64) {
        *self.words.entry(number / BITS).or_default() |= 1 << (number % BITS);
    }

    pub fn contains(&self, number: u64) -> bool {
        self.words.get(&(number / BITS)).is_some_and(|word| word & (1 << (number % BITS)) != 0)
    }

    /// Whether it was there.
    pub fn remove(&mut self, number: u64) -> bool {
        let Some(word) = self.words.get_mut(&(number / BITS)) else { return false };
        let was_there = *word & (1 << (number % BITS)) != 0;
        *word &= !(1 << (number % BITS));
        if *word == 0 {
            self.words.remove(&(number / BITS));
        }
        was_there
    }
}

/// The order of delivery.
#[derive(Default)]
pub struct Line {
    /// By (negated priority, place / 64).
    words: BTreeMap<(i16, u64), u64>,
    /// The seqs of the jobs whose place is not their seq.
    moved: HashMap<u64, u64, foldhash::fast::RandomState>,
    len: u64,
}

impl Line {
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn insert(&mut self, priority: i16, place: u64, seq: u64) {
        *self.words.entry((-priority, place / BITS)).or_default() |= 1 << (place % BITS);
        if place != seq {
            self.moved.insert(place, seq);
        }
        self.len += 1;
    }

    pub fn remove(&mut self, priority: i16, place: u64) {
        let key = (-priority, place / BITS);
        let Some(word) = self.words.get_mut(&key) else { return };
        *word &= !(1 << (place % BITS));
        if *word == 0 {
            self.words.remove(&key);
        }
        self.moved.remove(&place);
        self.len -= 1;
    }

    /// The job that is next.
    pub fn first(&self) -> Option<u64> {
        let ((_, chunk), word) = self.words.first_key_value()?;
        Some(self.seq_at(chunk * BITS + u64::from(word.trailing_zeros())))
    }

    /// The next job of each priority, the highest first.
    pub fn heads(&self) -> impl Iterator<Item = u64> {
        let mut from = Some((i16::MIN, 0));
        std::iter::from_fn(move || {
            let ((priority, chunk), word) = self.words.range(from?..).next()?;
            from = priority.checked_add(1).map(|next| (next, 0));
            Some(self.seq_at(chunk * BITS + u64::from(word.trailing_zeros())))
        })
    }

    /// Up to `count` jobs in order, after the first `offset`. Walks a word for each 64 that it passes over.
    pub fn page(&self, offset: u64, count: usize) -> Vec<u64> {
        let mut page = Vec::new();
        let mut to_skip = offset;
        for ((_, chunk), word) in &self.words {
            let mut rest = *word;
            if to_skip >= u64::from(rest.count_ones()) {
                to_skip -= u64::from(rest.count_ones());
                continue;
            }
            while rest != 0 && page.len() < count {
                if to_skip > 0 {
                    to_skip -= 1;
                } else {
                    page.push(self.seq_at(chunk * BITS + u64::from(rest.trailing_zeros())));
                }
                rest &= rest - 1;
            }
            if page.len() >= count {
                break;
            }
        }
        page
    }

    fn seq_at(&self, place: u64) -> u64 {
        self.moved.get(&place).copied().unwrap_or(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn the_line_is_in_the_order_of_priority_and_place(
            changes in proptest::collection::vec((0u64..300, any::<bool>()), 0..400), offset in 0u64..80,
        ) {
            let mut line = Line::default();
            let mut model = BTreeSet::new();
            for (place, is_added) in changes {
                // A place is handed out once, so it has one priority and one job.
                let (priority, seq) = ((place * 7 % 5) as i16 - 2, place + 1_000 * (place % 2));
                if is_added && model.insert((-priority, place, seq)) {
                    line.insert(priority, place, seq);
                } else if !is_added && model.remove(&(-priority, place, seq)) {
                    line.remove(priority, place);
                }
            }
            let expected: Vec<u64> = model.iter().map(|(_, _, seq)| *seq).collect();
            let from = (offset as usize).min(expected.len());
            prop_assert_eq!(line.len(), expected.len() as u64);
            prop_assert_eq!(line.first(), expected.first().copied());
            let mut heads: Vec<(i16, u64)> = model.iter().map(|(priority, _, seq)| (*priority, *seq)).collect();
            heads.dedup_by_key(|(priority, _)| *priority);
            prop_assert!(line.heads().eq(heads.into_iter().map(|(_, seq)| seq)));
            prop_assert_eq!(line.page(offset, 7), &expected[from..(from + 7).min(expected.len())]);
        }

        #[test]
        fn a_dense_set_is_a_set(changes in proptest::collection::vec((0u64..200, any::<bool>()), 0..200)) {
            let mut dense = Dense::default();
            let mut model = BTreeSet::new();
            for (number, is_added) in changes {
                if is_added {
                    dense.insert(number);
                    model.insert(number);
                } else {
                    prop_assert_eq!(dense.remove(number), model.remove(&number));
                }
            }
            prop_assert!((0..200).all(|number| dense.contains(number) == model.contains(&number)));
        }
    }
}
