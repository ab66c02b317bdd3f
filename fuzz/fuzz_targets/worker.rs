//! See `leasehold_fuzz::worker`.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| leasehold_fuzz::worker(data));

#[cfg(not(fuzzing))]
fn main() {}
