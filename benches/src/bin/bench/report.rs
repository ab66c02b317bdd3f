//! The table and the chart.

use std::fmt::Write as _;

use crate::measure::Figures;

/// A number with a sensible count of digits, or a dash.
fn cell(value: f64) -> String {
    match value.abs() {
        _ if value.is_nan() => "-".into(),
        0.0 => "-".into(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 1.0 => format!("{value:.1}"),
        _ => format!("{value:.4}"),
    }
}

pub(crate) fn table(rows: &[(String, Figures)], reps: u32) -> String {
    let mut out = format!(
        "Medians of {reps}. Of the idle worker, of leases held and of the ten minutes, CPU and statements are per second.\n\n"
    );
    out.push_str("| | deliveries/s | p50 ms | p99 ms | worker CPU s/1,000 | Postgres CPU s/1,000 | MiB | statements each |\n");
    out.push_str("|---|---|---|---|---|---|---|---|\n");
    for (name, figures) in rows {
        let cells = [
            figures.per_second,
            figures.p50_ms,
            figures.p99_ms,
            figures.worker_cpu,
            figures.postgres_cpu,
            figures.memory_mib,
            figures.statements,
        ];
        let cells: Vec<String> = cells.into_iter().map(cell).collect();
        let _ = writeln!(out, "| {name} | {} |", cells.join(" | "));
    }
    out
}

/// Deliveries a second and CPU as bars, in one SVG without references to anything outside.
pub(crate) fn chart(rows: &[(String, Figures)]) -> String {
    const BAR: f64 = 420.0;
    type Of = fn(&Figures) -> f64;
    let panels: [(&str, Of); 4] = [
        ("deliveries a second", |figures| figures.per_second),
        ("CPU seconds for 1,000 deliveries, worker and Postgres", |figures| {
            figures.worker_cpu + figures.postgres_cpu
        }),
        ("99th percentile of enqueue to arrival, ms", |figures| figures.p99_ms),
        ("memory of the largest worker, MiB", |figures| figures.memory_mib),
    ];
    let (mut body, mut y) = (String::new(), 20.0);
    for (title, of) in panels {
        let bars: Vec<(&str, f64)> = rows
            .iter()
            .filter(|(_, figures)| figures.per_second > 0.0 && of(figures).is_finite())
            .map(|(name, figures)| (name.as_str(), of(figures)))
            .collect();
        let most = bars.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
        let _ = writeln!(body, r#"<text x="10" y="{y}" font-weight="bold">{title}</text>"#);
        y += 8.0;
        for (name, value) in bars {
            let width = BAR * value / most;
            let _ = writeln!(
                body,
                r##"<text x="230" y="{0}" text-anchor="end">{name}</text><rect x="240" y="{y}" width="{width:.1}" height="14" fill="#3b7dd8"/><text x="{1:.1}" y="{0}">{2}</text>"##,
                y + 11.0,
                246.0 + width,
                cell(value),
            );
            y += 20.0;
        }
        y += 24.0;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"740\" height=\"{y}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"740\" height=\"{y}\" fill=\"white\"/>\n{body}</svg>\n"
    )
}
