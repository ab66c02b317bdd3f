//! leasehold: a webhook dispatcher on a transactional outbox whose leases hold for as long as the work does.
//!
//! [`machine`] decides, [`ports`] name what it needs of the world, [`adapters`] provide it, [`driver`] connects them.
#![cfg_attr(not(feature = "driver"), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

#[cfg(feature = "driver")]
pub mod adapters;
#[cfg(feature = "driver")]
pub mod driver;
pub mod machine;
#[cfg(feature = "driver")]
pub mod ports;
