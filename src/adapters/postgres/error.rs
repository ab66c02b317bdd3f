//! What a failed call means, for the machine: one total function; and what a command says of it.

use crate::adapters::store::StoreError;
use crate::machine::StoreFault;

/// What became of a statement that the server refused with this SQLSTATE.
fn by_sqlstate(code: &str, error: String) -> StoreFault {
    match code {
        // The session was ended, be it by `transaction_timeout`, or the server is going down: the commit may have happened
        // before.
        "57P01" | "57P02" | "57P03" | "57P04" | "57P05" | "25P04" => StoreFault::Unknown { error },
        // Surely rolled back, and worth repeating: cancelled, idle for too long in a transaction, read-only, not a primary
        // (any more), lock not available. Or on a new connection: a prepared statement that is gone, or of a table that was
        // altered since.
        "57014" | "25P03" | "25006" | "55000" | "55006" | "55P03" | "0A000" | "26000" => {
            StoreFault::NotApplied { error }
        }
        _ => match code.get(..2) {
            // Connection failures.
            Some("08") => StoreFault::Unknown { error },
            // Transaction rollback (serialization, deadlock), insufficient resources, I/O and internal errors.
            Some("40" | "53" | "58" | "XX") => StoreFault::NotApplied { error },
            _ => StoreFault::Permanent { error },
        },
    }
}

/// What the server says, with what to do where a pooler says it.
fn said(code: &str, message: &str) -> String {
    // `options` carries what bounds the statements: to have the pooler ignore it would be to lose that.
    let hint = if code == "08P01" && message.starts_with("unsupported startup parameter") {
        ": this is a pooler; set LEASEHOLD_PREPARED_STATEMENTS=false (prepared_statements in leasehold.toml)"
    } else {
        ""
    };
    format!("{code} {message}{hint}")
}

/// The text of an error without anything of a row: of what the server says, code and message, never the detail.
pub(super) fn text(error: &sqlx::Error) -> String {
    match error {
        sqlx::Error::Database(error) => said(error.code().as_deref().unwrap_or("-----"), error.message()),
        sqlx::Error::Io(error) => format!("connection: {error}"),
        sqlx::Error::PoolTimedOut => "no connection within store_timeout".into(),
        sqlx::Error::Tls(error) => format!("TLS: {error}"),
        sqlx::Error::ColumnDecode { index, .. } => format!("column {index} can't be decoded"),
        other => other.to_string(),
    }
}

/// A call that never got a connection: surely not applied.
pub(super) fn not_connected(error: &sqlx::Error) -> StoreFault {
    StoreFault::NotApplied { error: text(error) }
}

/// A call that failed after it was sent.
pub(super) fn after_send(error: &sqlx::Error) -> StoreFault {
    let text = text(error);
    match error {
        sqlx::Error::Database(database) => by_sqlstate(database.code().as_deref().unwrap_or(""), text),
        // It was never sent.
        sqlx::Error::Encode(_) => StoreFault::Permanent { error: text },
        // A reply that can't be decoded included.
        _ => StoreFault::Unknown { error: text },
    }
}

/// Whether the database refuses what a row contains: a value, a constraint, a limit, or what a trigger says.
pub(super) fn is_of_an_event(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
    code.is_some_and(|code| matches!(code.get(..2), Some("22" | "23" | "54" | "P0")))
}

/// Whether the database refuses to let a row go for what it is: a trigger may say so in whatever code it likes. Not where
/// the next try may end otherwise, or where nothing more can be done on this connection: it is gone, or its transaction
/// is, or may not write; a rollback; too few resources; what is locked or in use; what is cancelled, or a server that goes
/// down; I/O and internal errors.
pub(super) fn is_of_a_row(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
    code.is_some_and(|code| {
        !matches!(code.get(..2), Some("08" | "25" | "40" | "53" | "55" | "57" | "58" | "XX"))
    })
}

/// What a command says of an error, with what to do about a schema that is missing.
pub(super) fn database(doing: &'static str, error: &sqlx::Error) -> StoreError {
    match error {
        sqlx::Error::Database(refused) if matches!(refused.code().as_deref(), Some("42P01" | "3F000")) => {
            StoreError::Schema { missing: text(error) }
        }
        _ => StoreError::Database { doing, error: text(error) },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_class_means_what_it_must() {
        let kind = |code| match by_sqlstate(code, String::new()) {
            StoreFault::Unknown { .. } => "unknown",
            StoreFault::NotApplied { .. } => "not applied",
            StoreFault::Permanent { .. } => "permanent",
        };
        for (code, meaning) in [
            ("57P01", "unknown"),     // admin_shutdown
            ("57P02", "unknown"),     // crash_shutdown
            ("57P03", "unknown"),     // cannot_connect_now
            ("08006", "unknown"),     // connection_failure
            ("57014", "not applied"), // query_canceled, statement_timeout included
            ("25P04", "unknown"),     // transaction_timeout
            ("57P04", "unknown"),     // database dropped
            ("25P03", "not applied"), // idle_in_transaction_session_timeout
            ("40001", "not applied"), // serialization_failure
            ("40P01", "not applied"), // deadlock_detected
            ("25006", "not applied"), // read_only_sql_transaction
            ("55000", "not applied"), // recovery is in progress
            ("55P03", "not applied"), // lock_not_available
            ("53100", "not applied"), // disk_full
            ("0A000", "not applied"), // cached plan must not change result type
            ("26000", "not applied"), // invalid_sql_statement_name
            ("53300", "not applied"), // too_many_connections
            ("58030", "not applied"), // io_error
            ("23514", "permanent"),   // check_violation
            ("22003", "permanent"),   // numeric_value_out_of_range
            ("42P01", "permanent"),   // undefined_table
            ("42501", "permanent"),   // insufficient_privilege
            ("", "permanent"),
        ] {
            assert_eq!(kind(code), meaning, "{code}");
        }
    }

    #[test]
    fn what_a_pooler_refuses_comes_with_what_to_do() {
        // Of pgbouncer up to 1.19 and from 1.20 on.
        for refusal in
            ["unsupported startup parameter: options", "unsupported startup parameter in options: jit"]
        {
            let text = said("08P01", refusal);
            assert!(text.contains(refusal) && text.contains("LEASEHOLD_PREPARED_STATEMENTS=false"), "{text}");
        }
        assert_eq!(said("08P01", "no such database"), "08P01 no such database");
    }

    #[test]
    fn a_lost_connection_is_unknown_after_the_send_and_not_applied_before() {
        let broken = sqlx::Error::Io(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
        assert!(matches!(after_send(&broken), StoreFault::Unknown { .. }));
        assert!(matches!(not_connected(&broken), StoreFault::NotApplied { .. }));
        assert!(matches!(not_connected(&sqlx::Error::PoolTimedOut), StoreFault::NotApplied { .. }));
    }
}
