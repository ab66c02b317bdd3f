//! Both stores against the row machine: the contract, what only Postgres has, and random sequences.
//!
//! Run with `.ci/postgres cargo nextest run -p leasehold --test store`.
#![cfg(all(feature = "bin", feature = "postgres", feature = "sqlite"))]
#![allow(missing_docs, clippy::unwrap_used)]

mod bed;
mod contract;
mod differential;
mod interleavings;
mod postgres;
mod retain;
mod storage;
mod waking;
