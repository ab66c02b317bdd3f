//! The real binary against a real Postgres and real sockets, really killed.

mod admin;
mod bed;
mod commands;
#[path = "../common/mod.rs"]
mod common;
mod compatibility;
mod leases;
mod readme;
mod signals;
