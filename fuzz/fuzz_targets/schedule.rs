//! See `leasehold_fuzz::schedule`.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| leasehold_fuzz::schedule(data));

#[cfg(not(fuzzing))]
fn main() {}
