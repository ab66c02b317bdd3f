//! Log lines.

use std::io::{self, IsTerminal as _};

use tracing_subscriber::EnvFilter;

use super::settings::{LogFormat, LogSettings};

/// Sends log lines to standard error, as text or as one JSON object a line.
///
/// # Errors
/// The filter doesn't parse, or something else has taken the process's logs.
pub fn init(settings: &LogSettings) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let filter = EnvFilter::builder().parse(&settings.filter)?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_target(false);
    match settings.format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    }
}
