//! Log lines.

use std::io;

use tracing_subscriber::EnvFilter;

use super::settings::{LogFormat, LogSettings};

/// Sends log lines to standard error, as text or as one JSON object a line.
///
/// # Errors
/// The filter doesn't parse, or something else has taken the process's logs.
pub fn init(settings: &LogSettings) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let filter = EnvFilter::builder().parse(&settings.filter)?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match settings.format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    }
}
