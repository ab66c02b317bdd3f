//! What the fuzz targets do with a sequence of bytes, as plain functions: `cargo fuzz` searches with them, and the
//! ordinary tests replay the committed corpus through them.
//!
//! Machines and schedules are driven by scripts ([`script`]), so that every sequence of bytes means something and a
//! corpus can be read and written by hand.
#![forbid(unsafe_code)]

#[allow(dead_code, reason = "shared with the machine's own tests")]
#[path = "../../tests/machine/bed.rs"]
mod bed;
mod row;
mod schedule;
mod script;
mod texts;
mod worker;
#[path = "../../tests/machine/world.rs"]
mod world;

pub use row::row;
pub use schedule::schedule;
pub use texts::{destination, retry_after, secret, settings};
pub use worker::worker;

/// A fuzz target by its name.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: &[Target] = &[
    ("worker", worker),
    ("row", row),
    ("schedule", schedule),
    ("retry_after", retry_after),
    ("secret", secret),
    ("settings", settings),
    ("destination", destination),
];
