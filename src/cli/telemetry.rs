//! Log lines.

use std::borrow::Cow;
use std::io::{self, IsTerminal as _};

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use super::settings::{LogFormat, LogSettings};

/// Lines that wait to be written at most.
const WAITING: usize = 8_192;

/// Sends log lines to standard error, as text or as one JSON object a line. A thread of its own writes them: whoever reads
/// them too slowly, or not at all, loses lines and stops no heartbeat. Dropping the guard writes what still waits.
///
/// # Errors
/// The filter doesn't parse, or something else has taken the process's logs.
pub fn init(settings: &LogSettings) -> Result<WorkerGuard, Box<dyn std::error::Error + Send + Sync>> {
    // It shows the values of a database URL's parameters that it doesn't know.
    let filter = EnvFilter::builder()
        .parse(own(&settings.filter))?
        .add_directive("sqlx_postgres::options=off".parse()?);
    let (writer, guard) =
        NonBlockingBuilder::default().lossy(true).buffered_lines_limit(WAITING).finish(io::stderr());
    // What is wrong with a line would be said on standard error too, which panics where that is broken.
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .log_internal_errors(false)
        .with_target(false);
    match settings.format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).try_init()?,
        LogFormat::Json => lines.json().flatten_event(true).try_init()?,
    }
    Ok(guard)
}

/// A bare level is meant for the lines of this program. Libraries call errors what is expected here, such as a standby
/// among the hosts or a destination's bad certificate.
fn own(filter: &str) -> Cow<'_, str> {
    match filter.parse::<LevelFilter>() {
        Ok(level) => format!("leasehold={level}").into(),
        Err(_) => filter.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::own;

    #[test]
    fn a_bare_level_is_for_own_lines() {
        assert_eq!(own("info"), "leasehold=info");
        assert_eq!(own("warn,sqlx=info"), "warn,sqlx=info");
        assert_eq!(own("sqlx=debug"), "sqlx=debug");
    }
}
