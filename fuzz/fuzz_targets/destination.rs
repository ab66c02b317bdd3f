//! See `leasehold_fuzz::destination`.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| leasehold_fuzz::destination(data));

#[cfg(not(fuzzing))]
fn main() {}
