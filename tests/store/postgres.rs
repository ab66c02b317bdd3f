//! What only Postgres has.
