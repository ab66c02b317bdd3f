//! The pure machines through their public interface: golden table, scenarios, properties.

mod bed;
mod golden;
mod properties;
mod retry;
mod scenarios;
mod settings;
mod world;
