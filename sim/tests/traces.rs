//! A seed has one trace: twice in a process, and in two processes. (In two builds: `.ci/traces`.)
#![allow(clippy::expect_used, reason = "a test")]

use std::process::Command;

use sim::Tier;
use sim::trace::{first_difference, hash_of, text_of};

fn in_another_process(tier: Tier, what: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sim"));
    let output =
        command.args(["determinism", "--tier", tier.name()]).args(what).output().expect("the simulator");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stdout).expect("text")
}

fn a_seed_has_one_trace(tier: Tier, seeds: u64) {
    let there = in_another_process(tier, &["--print", "--seeds", &seeds.to_string()]);
    let mut there = there.lines();
    for seed in 0..seeds {
        let hash = hash_of(seed, tier);
        if hash_of(seed, tier) != hash {
            let difference = first_difference(&text_of(seed, tier), &text_of(seed, tier));
            panic!("two runs of seed {seed} in one process differ in {difference}");
        }
        if there.next() != Some(&format!("{seed} {hash:016x}")) {
            let theirs = in_another_process(tier, &["--seed", &seed.to_string()]);
            let difference = first_difference(&text_of(seed, tier), &theirs);
            panic!("seed {seed} in two processes differs in {difference}");
        }
    }
}

#[test]
fn on_the_event_heap() {
    a_seed_has_one_trace(Tier::Des, 100);
}

#[test]
fn over_the_simulated_network() {
    a_seed_has_one_trace(Tier::Wire, 20);
}

#[test]
fn the_first_difference_is_told() {
    assert_eq!(first_difference("a\nb\nc\n", "a\nB\nc\n"), "line 2: b / B");
    assert_eq!(first_difference("a\n", "a\nb\n"), "line 2: it is over / b");
    assert_eq!(first_difference("a\nb\n", "a\nb\n"), "none this time");
    // The trace that is told is the one that is hashed: another seed has another.
    assert!(first_difference(&text_of(0, Tier::Des), &text_of(1, Tier::Des)).starts_with("line 1: "));
}
