//! leasehold under load: real workers, a real Postgres, a local receiver. Prints a table and writes a chart.
//!
//! An argument restricts it to the scenarios that have it in their name; those of ten minutes must be named. Settings,
//! from the environment:
//! LEASEHOLD_TEST_POSTGRES (a server on which databases may be created), EVENTS (20,000), REPS (5, of which the medians
//! count), CHART (the file to write, none by default).

mod measure;
mod receiver;
mod report;
mod scenario;

use anyhow::Context;

fn number(name: &str, default: u32) -> anyhow::Result<u32> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name} is {text:?}; allowed is a whole number")),
        Err(_) => Ok(default),
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let server =
        std::env::var("LEASEHOLD_TEST_POSTGRES").context("LEASEHOLD_TEST_POSTGRES names no server")?;
    let (events, reps) = (number("EVENTS", 20_000)?, number("REPS", 5)?.max(1));
    let receiver = receiver::start().await?;
    let mut rows = Vec::new();
    let wanted = std::env::args().nth(1).unwrap_or_default();
    let is_wanted = |scenario: &scenario::Scenario| {
        scenario.name.contains(&wanted) && !(wanted.is_empty() && scenario.is_long())
    };
    for scenario in scenario::all(events).into_iter().filter(is_wanted) {
        let mut runs = Vec::new();
        for rep in 1..=reps {
            eprintln!("{}: {rep} of {reps}", scenario.name);
            runs.push(scenario.run(&server, &receiver).await.with_context(|| scenario.name.clone())?);
        }
        rows.push((scenario.name, measure::medians(&runs)));
    }
    println!("{}", report::table(&rows, reps));
    if let Ok(path) = std::env::var("CHART") {
        std::fs::write(&path, report::chart(&rows)).with_context(|| format!("writing {path}"))?;
    }
    Ok(())
}
