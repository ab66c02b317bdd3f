//! Adapters: each translates between one port and one part of the world, and decides nothing.

#[cfg(feature = "bin")]
pub mod clock;
#[cfg(feature = "bin")]
pub mod telemetry;
