//! Adapters: each translates between one port and one part of the world, and decides nothing.

#[cfg(feature = "http")]
pub mod http;
