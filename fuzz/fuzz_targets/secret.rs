//! See `leasehold_fuzz::secret`.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| leasehold_fuzz::secret(data));

#[cfg(not(fuzzing))]
fn main() {}
