//! What a person watches: bars on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::CAST;
use super::receivers::{Manner, State};
use crate::adapters::store::Status;
use crate::cli::commands::print;

/// The live view.
pub(super) struct View {
    bars: Option<(MultiProgress, Vec<(Manner, ProgressBar)>)>,
    last_line: Option<Instant>,
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("  {prefix:<8} {bar:32} {pos:>3}/{len:<3} delivered  {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("█▌ ")
}

impl View {
    pub(super) fn new(plain: bool) -> Self {
        let bars = (std::io::stdout().is_terminal() && !plain).then(|| {
            let multi = MultiProgress::new();
            let bars = CAST.map(|(manner, count)| {
                let bar =
                    multi.add(ProgressBar::new(count as u64).with_style(style()).with_prefix(manner.name()));
                (manner, bar)
            });
            (multi, bars.into())
        });
        Self { bars, last_line: None }
    }

    /// A line that stays.
    pub(super) fn say(&mut self, text: &str) -> anyhow::Result<()> {
        match &self.bars {
            Some((multi, _)) => Ok(multi.println(text)?),
            None => print(text),
        }
    }

    /// The state of things, now.
    pub(super) fn show(
        &mut self,
        elapsed: Duration,
        state: &State,
        status: &Status,
        events: usize,
    ) -> anyhow::Result<()> {
        let of = |manner: Manner| state.requests.values().filter(move |seen| seen[0].manner == manner);
        let delivered = |manner| {
            of(manner)
                .filter(|seen| seen.iter().any(|seen| seen.status.is_some_and(|status| status < 300)))
                .count()
        };
        let open = |manner| of(manner).flatten().filter(|seen| seen.closed.is_none()).count();
        if let Some((_, bars)) = &self.bars {
            for (manner, bar) in bars {
                bar.set_position(delivered(*manner) as u64);
                bar.set_message(format!("{} open", open(*manner)));
            }
        } else if self.last_line.is_none_or(|last| last.elapsed() >= Duration::from_secs(1)) {
            self.last_line = Some(Instant::now());
            let open: usize = CAST.iter().map(|(manner, _)| open(*manner)).sum();
            print(format_args!(
                "{:>4.0}s  delivered {:>3}/{events}  leased {:>3}  retrying {:>3}  open requests {open:>3}",
                elapsed.as_secs_f64(),
                status.delivered,
                status.leased,
                status.retrying,
            ))?;
        }
        Ok(())
    }

    pub(super) fn finish(&mut self) -> anyhow::Result<()> {
        if let Some((_, bars)) = &self.bars {
            for (_, bar) in bars {
                bar.abandon();
            }
        }
        print("")
    }
}
