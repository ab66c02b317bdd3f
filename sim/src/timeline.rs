//! A timeline as one self-contained SVG: lanes for workers, database and destinations.

use std::fmt::Write as _;

use sim_oracle::{Answer, Fact, Violation};

use crate::schedule::Schedule;

const WIDTH: f64 = 1_400.0;
const LEFT: f64 = 90.0;
const ROW: f64 = 14.0;

struct Bar {
    lane: usize,
    from: u64,
    to: u64,
    class: &'static str,
    text: String,
}

#[derive(Default)]
struct Lanes {
    names: Vec<String>,
    bars: Vec<Bar>,
    ticks: Vec<(usize, u64, &'static str, String)>,
}

/// An open stretch: (worker, event, token, since).
type Stretch = (u32, u32, i64, u64);

fn take(open: &mut Vec<Stretch>, wanted: impl Fn(&Stretch) -> bool) -> Vec<Stretch> {
    let (done, rest) = open.drain(..).partition(wanted);
    *open = rest;
    done
}

fn collect(schedule: &Schedule, facts: &[(u64, Fact)], end: u64) -> Lanes {
    let workers = facts.iter().filter(|(_, fact)| matches!(fact, Fact::WorkerUp { .. })).count();
    let mut lanes = Lanes::default();
    lanes.names.extend((0..workers).map(|worker| format!("worker {worker}")));
    lanes.names.push("database".into());
    lanes.names.extend((0..schedule.destinations.len()).map(|at| format!("dest. d{at}")));
    let database = workers;
    let destination = |event: u32| workers + 1 + usize::from(schedule.events[event as usize].destination);
    let (mut leases, mut requests): (Vec<Stretch>, Vec<Stretch>) = (Vec::new(), Vec::new());
    let (mut up, mut stopped): (Vec<Option<u64>>, Vec<Option<u64>>) =
        (vec![None; workers], vec![None; workers]);
    let mut down = None;
    let mut bars = Vec::new();
    for &(at, fact) in facts {
        let mut bar = |lane, from, class, text| bars.push(Bar { lane, from, to: at, class, text });
        match fact {
            Fact::WorkerUp { worker, .. } => up[worker as usize] = Some(at),
            Fact::WorkerStopped { worker } => stopped[worker as usize] = Some(at),
            Fact::WorkerContinued { worker } => {
                if let Some(from) = stopped[worker as usize].take() {
                    bar(worker as usize, from, "stop", "stopped".into());
                }
            }
            Fact::WorkerDown { worker, how } => {
                if let Some(from) = up[worker as usize].take() {
                    bar(worker as usize, from, "up", format!("up, then {how:?}"));
                }
                for (_, event, token, from) in take(&mut requests, |open| open.0 == worker) {
                    bar(destination(event), from, "request", format!("{event}#{token} by worker {worker}"));
                }
            }
            Fact::Claimed { event, token, worker, .. } => {
                for (holder, _, token, from) in take(&mut leases, |open| open.1 == event) {
                    bar(holder as usize, from, "lease", format!("lease {event}#{token}, run out"));
                }
                leases.push((worker, event, token, at));
            }
            Fact::Renewed { worker, event, answer, .. } => {
                let class = if answer == Answer::Applied { "beat" } else { "refused" };
                lanes.ticks.push((worker as usize, at, class, format!("renew {event}: {answer:?}")));
            }
            Fact::Settled { event, answer: Answer::Applied, settle, .. } => {
                for (holder, _, token, from) in take(&mut leases, |open| open.1 == event) {
                    bar(holder as usize, from, "lease", format!("lease {event}#{token}, {settle:?}"));
                }
            }
            Fact::RequestOpened { worker, event, token, .. } => requests.push((worker, event, token, at)),
            Fact::RequestEnded { worker, event, token, end } => {
                for (_, _, _, from) in
                    take(&mut requests, |open| (open.0, open.1, open.2) == (worker, event, token))
                {
                    bar(
                        destination(event),
                        from,
                        "request",
                        format!("{event}#{token} by worker {worker}: {end:?}"),
                    );
                }
            }
            Fact::DbDown => down = Some(at),
            Fact::DbUp { lost, .. } => {
                if let Some(from) = down.take() {
                    bar(database, from, "stop", format!("down, {lost} commits lost"));
                }
            }
            Fact::DbStepped { by } => {
                lanes.ticks.push((database, at, "refused", format!("clock stepped by {by} us")))
            }
            Fact::CallFailed { worker, call } => {
                lanes.ticks.push((worker as usize, at, "failed", format!("call {call} failed")));
            }
            _ => {}
        }
    }
    let mut last = |lane, from, class, text| bars.push(Bar { lane, from, to: end, class, text });
    for (holder, event, token, from) in leases {
        last(holder as usize, from, "lease", format!("lease {event}#{token}"));
    }
    for (_, event, token, from) in requests {
        last(destination(event), from, "request", format!("{event}#{token}"));
    }
    for (worker, from) in up.into_iter().enumerate() {
        if let Some(from) = from {
            last(worker, from, "up", "up".into());
        }
    }
    bars.sort_by_key(|bar| (bar.lane, bar.from));
    lanes.bars = bars;
    lanes
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Draws the timeline.
pub fn timeline(schedule: &Schedule, facts: &[(u64, Fact)], violation: Option<&Violation>) -> String {
    let end = facts.last().map_or(1, |(at, _)| *at).max(1);
    let lanes = collect(schedule, facts, end);
    let x = |time: u64| LEFT + (WIDTH - LEFT - 10.0) * time.min(end) as f64 / end as f64;
    // Bars of one lane that overlap are drawn below each other.
    let mut rows: Vec<Vec<u64>> = vec![Vec::new(); lanes.names.len()];
    let places: Vec<usize> = lanes
        .bars
        .iter()
        .map(|bar| {
            if matches!(bar.class, "up" | "stop") {
                return 0;
            }
            let free = rows[bar.lane].iter().position(|until| *until <= bar.from);
            let row = free.unwrap_or(rows[bar.lane].len());
            if row == rows[bar.lane].len() {
                rows[bar.lane].push(0);
            }
            rows[bar.lane][row] = bar.to;
            row
        })
        .collect();
    let mut tops = Vec::new();
    let mut y = 40.0;
    for row in &rows {
        tops.push(y);
        y += ROW * (row.len().max(1) as f64) + 16.0;
    }
    let height = y + 10.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"11\"><style>.up{{fill:#eef3f8}}.stop{{fill:#c9c9c9}}.lease{{fill:#7fb2e5}}.request{{fill:#8fce9a}}\
         .fault{{fill:#f6b26b;opacity:.25}}.beat{{stroke:#1c4f87}}.refused{{stroke:#c00}}.failed{{stroke:#b60}}</style>\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/><text x=\"4\" y=\"16\">seed {} profile {}{}</text>\n",
        schedule.seed,
        schedule.profile,
        violation.map(|violation| format!(" · {}", escape(&violation.to_string()))).unwrap_or_default()
    );
    for timed in &schedule.faults {
        let until = timed.at.saturating_add(timed.lasts);
        let _ = writeln!(
            svg,
            "<rect class=\"fault\" x=\"{:.1}\" y=\"24\" width=\"{:.1}\" height=\"{}\"><title>{}</title></rect>",
            x(timed.at),
            (x(until) - x(timed.at)).max(1.0),
            height - 30.0,
            escape(&format!("{:?}", timed.fault))
        );
    }
    for (name, top) in lanes.names.iter().zip(&tops) {
        let _ = writeln!(svg, "<text x=\"4\" y=\"{:.1}\">{name}</text>", top + 11.0);
    }
    for (bar, place) in lanes.bars.iter().zip(places) {
        let height = if bar.class == "up" { ROW * rows[bar.lane].len().max(1) as f64 } else { ROW - 3.0 };
        let _ = writeln!(
            svg,
            "<rect class=\"{}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\"><title>{}</title></rect>",
            bar.class,
            x(bar.from),
            tops[bar.lane] + ROW * place as f64,
            (x(bar.to) - x(bar.from)).max(1.0),
            escape(&bar.text)
        );
    }
    for (lane, at, class, text) in &lanes.ticks {
        let (top, bottom) = (tops[*lane] - 3.0, tops[*lane] + ROW * rows[*lane].len().max(1) as f64);
        let x = x(*at);
        let _ = writeln!(
            svg,
            "<line class=\"{class}\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top:.1}\" y2=\"{bottom:.1}\"><title>{}</title></line>",
            escape(text)
        );
    }
    if let Some(violation) = violation {
        let x = x(violation.at);
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"20\" y2=\"{height}\" stroke=\"red\" stroke-width=\"2\"/>"
        );
    }
    svg.push_str("</svg>\n");
    svg
}
