//! The simulator: seeded schedules of faults against the real worker and row machines, judged by an independent oracle.
//!
//! Two tiers: worker machines and the row machine driven from an event heap in simulated microseconds, with no async
//! runtime, thousands of seeds a second; and, in [`wire`], the real driver over a simulated network. A seed and a profile
//! make a [`Schedule`]; a run is a pure function of the schedule.
#![forbid(unsafe_code)]
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod bugs;
mod calls;
pub mod check;
mod faults;
mod generate;
pub mod outbox;
mod plain;
mod process;
mod requests;
mod rng;
pub mod schedule;
pub mod search;
mod server;
pub mod shrink;
mod statement;
mod store;
pub mod story;
pub mod timeline;
pub mod trace;
pub mod wire;
mod world;

pub use generate::{generate, profile_of};
pub use rng::Rng;
pub use schedule::{Profile, Schedule};
pub use search::run;
pub use world::{EPOCH, Options, Outcome, Tier, World};
