//! Adapters: each translates between one port and one part of the world, and decides nothing.

#[cfg(feature = "bin")]
pub mod clock;
#[cfg(feature = "http")]
pub mod http;
#[cfg(feature = "postgres")]
pub mod postgres;
#[cfg(feature = "sqlite")]
pub mod sqlite;
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub mod store;
#[cfg(feature = "bin")]
pub mod telemetry;
