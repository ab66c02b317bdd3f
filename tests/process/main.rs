//! The real binary against a real Postgres and real sockets, really killed.

mod bed;
mod commands;
mod compatibility;
mod leases;
mod signals;
