//! The command line: what can be asked for, with which settings, and how events are read.

mod admin;
pub mod commands;
pub mod enqueue;
mod retain;
pub mod run;
pub mod settings;
pub mod store;
pub mod telemetry;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Arg, Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use settings::{Kind, Needs, SETTINGS, Settings, SettingsError};

/// Exit code: done.
pub const EXIT_DONE: u8 = 0;
/// Exit code: failed at work.
pub const EXIT_FAILED: u8 = 1;
/// Exit code: bad usage or settings.
pub const EXIT_USAGE: u8 = 2;
/// Exit code: a drain that had to abort requests or left outcomes unsettled.
pub const EXIT_DRAIN: u8 = 3;

/// The command line as clap sees it; settings are added as flags of the commands that take them.
#[derive(Debug, Parser)]
#[command(name = "leasehold", version, about = "A webhook dispatcher on a Postgres transactional outbox")]
struct Cli {
    /// Settings file, instead of leasehold.toml in the working folder
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Show it at work: receivers, crashes and recovery, with nothing set up
    Demo {
        /// Use a private Postgres from the server binaries found on this machine, instead of SQLite
        #[arg(long)]
        postgres: bool,
        /// Print lines only: no colours, nothing redrawn
        #[arg(long)]
        plain: bool,
    },
    /// Create or upgrade the outbox's tables
    Migrate,
    /// Deliver events until told to stop
    Run {
        /// End once no event is pending
        #[arg(long)]
        until_empty: bool,
    },
    /// Write one event from flags, or many from NDJSON on standard input; prints their ids
    Enqueue(EnqueueArgs),
    /// Count events by their state
    Status {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
        /// Repeat until interrupted
        #[arg(long)]
        watch: bool,
    },
    /// Check settings and database; secrets are not shown
    Check,
}

impl Command {
    /// The settings that it can't do without; `None` if it takes none at all.
    pub fn needs(&self) -> Option<Needs> {
        match self {
            Self::Demo { .. } => None,
            Self::Run { .. } | Self::Check => Some(Needs::RUN),
            Self::Migrate | Self::Enqueue(_) | Self::Status { .. } => Some(Needs::STORE),
        }
    }
}

/// One event by flags. Its attempts are the setting `--max-attempts`.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct EnqueueArgs {
    /// Type of the event, 1 to 255 visible ASCII characters
    #[arg(long, requires_all = ["destination_url", "payload"])]
    pub event_type: Option<String>,
    /// Where it goes
    #[arg(long, requires = "event_type")]
    pub destination_url: Option<String>,
    /// JSON
    #[arg(long, requires = "event_type")]
    pub payload: Option<String>,
    /// Id by which receivers deduplicate [default: a UUID]
    #[arg(long, requires = "event_type")]
    pub event_id: Option<String>,
    /// When it may be sent at the earliest, RFC 3339 [default: now]
    #[arg(long, requires = "event_type", value_name = "TIME")]
    pub next_attempt_at: Option<String>,
}

/// A parsed command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    /// What to do.
    pub command: Command,
    /// The settings file, if one was named.
    pub config: Option<PathBuf>,
    /// Settings given as flags, by the setting's name.
    pub flags: BTreeMap<String, String>,
}

impl Invocation {
    /// Parses a command line, the program's name first.
    ///
    /// # Errors
    /// Bad usage, `--help` or `--version`; [`clap::Error::exit`] prints it and ends with 2 or 0.
    pub fn parse(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<Self, clap::Error> {
        let matches = command().try_get_matches_from(args)?;
        let Cli { config, command } = Cli::from_arg_matches(&matches)?;
        if config.is_some() && command.needs().is_none() {
            let problem = "demo takes no settings, and so no --config";
            return Err(Cli::command().error(ErrorKind::ArgumentConflict, problem));
        }
        let mut flags = BTreeMap::new();
        if let Some((_, matches)) = matches.subcommand() {
            for setting in SETTINGS {
                if let Ok(Some(value)) = matches.try_get_one::<String>(setting.name) {
                    flags.insert(setting.name.to_owned(), value.clone());
                }
            }
        }
        Ok(Self { command, config, flags })
    }

    /// The settings of this command; `None` for `demo`, which takes none.
    ///
    /// # Errors
    /// Every mistake in them: print it and end with [`EXIT_USAGE`].
    pub fn settings(&self) -> Option<Result<Settings, SettingsError>> {
        let needs = self.command.needs()?;
        Some(settings::load(self.config.as_deref(), self.flags.clone(), needs))
    }
}

/// The clap command, with every setting as a flag.
pub fn command() -> clap::Command {
    Cli::command().mut_subcommands(|command| {
        if command.get_name() == "demo" {
            return command;
        }
        command.after_help("Every setting is a flag too: see --help.").args(SETTINGS.iter().map(|setting| {
            let computed = setting.default.map(|value| format!(" [default: {value}]")).unwrap_or_default();
            let arg = Arg::new(setting.name)
                .long(setting.flag())
                .value_name("VALUE")
                .help(format!("{}{computed} [env: {}]", setting.help, setting.variable()))
                .help_heading("Settings")
                .hide_short_help(true);
            if setting.kind == Kind::Bool { arg.num_args(0..=1).default_missing_value("true") } else { arg }
        }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Invocation, clap::Error> {
        Invocation::parse(std::iter::once("leasehold").chain(line.split_whitespace()))
    }

    #[test]
    fn the_definition_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn commands() {
        for (line, command) in [
            ("demo", Command::Demo { postgres: false, plain: false }),
            ("demo --postgres --plain", Command::Demo { postgres: true, plain: true }),
            ("migrate", Command::Migrate),
            ("run --until-empty", Command::Run { until_empty: true }),
            ("status --json --watch", Command::Status { json: true, watch: true }),
            ("check", Command::Check),
            ("enqueue", Command::Enqueue(EnqueueArgs::default())),
        ] {
            assert_eq!(parsed(line).unwrap().command, command, "{line}");
        }
    }

    #[test]
    fn every_setting_is_a_flag() {
        for setting in SETTINGS {
            let invocation = parsed(&format!("run --{} x", setting.flag())).unwrap();
            assert_eq!(invocation.flags, BTreeMap::from([(setting.name.to_owned(), "x".to_owned())]));
        }
        let bare = parsed("run --allow-http --until-empty").unwrap();
        assert_eq!(bare.flags["allow_http"], "true");
        assert_eq!(bare.command, Command::Run { until_empty: true });
    }

    #[test]
    fn config_goes_anywhere() {
        for line in ["--config a.toml run", "run --config a.toml"] {
            assert_eq!(parsed(line).unwrap().config, Some("a.toml".into()));
        }
    }

    #[test]
    fn bad_usage_is_exit_code_2() {
        for line in [
            "",
            "dance",
            "run --max-in-fligth 3",
            "run extra",
            "demo --lease 3s",
            "demo --config a.toml",
            "--config a.toml demo",
            "enqueue --event-type a",
            "enqueue --payload {}",
        ] {
            assert_eq!(parsed(line).unwrap_err().exit_code(), i32::from(EXIT_USAGE), "{line}");
        }
        assert_eq!(parsed("--help").unwrap_err().exit_code(), 0);
        let help = command().find_subcommand_mut("run").unwrap().render_long_help().to_string();
        for setting in SETTINGS {
            assert!(help.contains(&setting.variable()), "{}", setting.name);
        }
    }
}
