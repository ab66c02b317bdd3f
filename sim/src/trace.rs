//! The trace: a rolling hash of every fact, and the facts themselves if somebody wants to read them.

use std::fmt::Write as _;
use std::hash::{Hash, Hasher};

use sim_oracle::Fact;

use crate::world::{Options, Tier};
use crate::{generate, profile_of, run};

/// The hash of a seed's trace.
pub fn hash_of(seed: u64, tier: Tier) -> u64 {
    run(&generate(seed, profile_of(seed)), Options { tier, ..Options::default() }).hash
}

/// All of a seed's trace, a line a fact.
pub fn text_of(seed: u64, tier: Tier) -> String {
    let options = Options { tier, keep: true, ..Options::default() };
    let mut text = String::new();
    for (at, fact) in run(&generate(seed, profile_of(seed)), options).facts {
        let _ = writeln!(text, "{at} {fact:?}");
    }
    text
}

/// The first line in which two traces of a seed differ, in words.
pub fn first_difference(one: &str, other: &str) -> String {
    let (mut ones, mut others) = (one.lines(), other.lines());
    for number in 1.. {
        match (ones.next(), others.next()) {
            (None, None) => break,
            (one, other) if one == other => {}
            (one, other) => {
                let say = |line: Option<&str>| line.unwrap_or("it is over").to_owned();
                return format!("line {number}: {} / {}", say(one), say(other));
            }
        }
    }
    "none this time".to_owned()
}

/// A hash that is the same in every process and build.
#[derive(Clone, Copy, Debug)]
struct Rolling(u64);

impl Hasher for Rolling {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn write_u8(&mut self, word: u8) {
        self.write_u64(u64::from(word));
    }

    fn write_u16(&mut self, word: u16) {
        self.write_u64(u64::from(word));
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }

    fn write_i64(&mut self, word: i64) {
        self.write_u64(word as u64);
    }

    fn write_i32(&mut self, word: i32) {
        self.write_u64(word as u64);
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }

    fn write_isize(&mut self, word: isize) {
        self.write_u64(word as u64);
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Trace {
    hash: Rolling,
    facts: Option<Vec<(u64, Fact)>>,
}

impl Trace {
    /// An empty trace; `keep` keeps the facts.
    pub(crate) fn new(keep: bool) -> Self {
        Self { hash: Rolling(0x1ea5_e401d), facts: keep.then(Vec::new) }
    }

    /// Adds a fact.
    pub(crate) fn push(&mut self, at: u64, fact: &Fact) {
        self.hash.write_u64(at);
        fact.hash(&mut self.hash);
        if let Some(facts) = &mut self.facts {
            facts.push((at, *fact));
        }
    }

    /// The hash of everything so far.
    pub(crate) fn hash(&self) -> u64 {
        self.hash.0
    }

    /// The facts, if they were kept.
    pub(crate) fn into_facts(self) -> Vec<(u64, Fact)> {
        self.facts.unwrap_or_default()
    }
}
