//! See `leasehold_fuzz::settings`.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| leasehold_fuzz::settings(data));

#[cfg(not(fuzzing))]
fn main() {}
