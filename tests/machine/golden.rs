//! The state × change table of the row machine as a committed file: a diff to it is a design review.
//! `UPDATE_GOLDEN=1 cargo test --test machine golden` writes it anew.

use std::fmt::Write;
use std::time::Duration;

use leasehold::machine::{ClaimTerms, DbClock, DbTime, Lease, Row, Settle, Status, Token, WorkerId};

const NOW: i64 = 1_000_000_000;

fn at(seconds: i64) -> DbTime {
    DbTime::from_micros(NOW + seconds * 1_000_000)
}

fn states() -> Vec<(&'static str, Row)> {
    let base = Row { token: Token(5), attempts: 1, ..Row::new(3, at(-1)) };
    let leased = |owner: &str, until: i64| Some(Lease { owner: WorkerId::new(owner), until: at(until) });
    vec![
        ("due", base.clone()),
        ("not yet due", Row { next_attempt_at: at(1), ..base.clone() }),
        ("due, attempts spent", Row { attempts: 3, ..base.clone() }),
        ("leased by a, live", Row { lease: leased("a", 10), ..base.clone() }),
        ("leased by a, run out within G", Row { lease: leased("a", -1), ..base.clone() }),
        ("leased by a, expired", Row { lease: leased("a", -3), ..base.clone() }),
        ("leased by a, expired, attempts spent", Row { lease: leased("a", -3), attempts: 3, ..base.clone() }),
        ("leased by a, expired, reclaims spent", Row { lease: leased("a", -3), reclaims: 4, ..base.clone() }),
        (
            "leased by a, expired, one reclaim left",
            Row { lease: leased("a", -3), reclaims: 3, ..base.clone() },
        ),
        ("due, one token left", Row { token: Token(Token::BOUND.0 - 1), ..base.clone() }),
        ("due, lease_token at its bound", Row { token: Token::BOUND, ..base.clone() }),
        (
            "leased by a, expired, one token left",
            Row { lease: leased("a", -3), token: Token(Token::BOUND.0 - 1), ..base.clone() },
        ),
        (
            "leased by a, expired, lease_token at its bound",
            Row { lease: leased("a", -3), token: Token::BOUND, ..base.clone() },
        ),
        (
            "leased by a, expired, reclaims at their bound",
            Row { lease: leased("a", -3), reclaims: 1_000_000_000, ..base.clone() },
        ),
        ("leased by b, live", Row { lease: leased("b", 10), ..base.clone() }),
        ("delivered", Row { status: Status::Delivered, delivered_at: Some(at(-5)), ..base.clone() }),
        ("failed", Row { status: Status::Failed, ..base }),
    ]
}

fn show(row: &Row) -> String {
    let status = match row.status {
        Status::Pending => "pending",
        Status::Delivered => "delivered",
        Status::Failed => "failed",
    };
    let lease = row.lease.as_ref().map_or_else(String::new, |lease| {
        format!(" lease={}@{:+}s", lease.owner, (lease.until.as_micros() - NOW) / 1_000_000)
    });
    format!(
        "{status} token={} attempts={} reclaims={} due={:+}s{lease}",
        row.token.0,
        row.attempts,
        row.reclaims,
        (row.next_attempt_at.as_micros() - NOW) / 1_000_000,
    )
}

fn table() -> String {
    let now = DbClock { early: at(0), late: at(0) };
    let a = WorkerId::new("a");
    let terms = |expired| ClaimTerms {
        lease: Duration::from_secs(20),
        grace: Duration::from_secs(2),
        expired,
        reclaim_limit: 4,
        retry_budget: 0,
        valid_until: None,
    };
    let error = || "boom".to_owned();
    let settles = [
        ("delivered", Settle::Delivered { status: 200 }),
        ("retry in 7s", Settle::Retry { delay: Duration::from_secs(7), error: error(), status: Some(500) }),
        ("failed after a try", Settle::Failed { error: error(), status: Some(410), tried: true }),
        ("failed untried", Settle::Failed { error: error(), status: None, tried: false }),
        ("release", Settle::Release { delay: None }),
        ("release in 3s", Settle::Release { delay: Some(Duration::from_secs(3)) }),
    ];
    let mut out = String::new();
    for (name, row) in states() {
        writeln!(out, "## {name}: {}", show(&row)).expect("a string takes all");
        let mut line = |change: &str, answer: String, after: &Row| {
            let after = if *after == row { "unchanged".to_owned() } else { show(after) };
            writeln!(out, "  {change:<34} -> {answer:<46} {after}").expect("a string takes all");
        };
        for expired in [false, true] {
            let mut after = row.clone();
            let answer = after.claim(now, &a, &terms(expired));
            let which = if expired { "claim by a, expired too" } else { "claim by a, fresh only" };
            line(which, format!("{answer:?}").replace("Token(", "(").replace(" }", "}"), &after);
        }
        for (whose, token) in [("a#5", 5), ("a#4", 4)] {
            let mut after = row.clone();
            let answer = after.renew(now, &a, Token(token), Duration::from_secs(20));
            line(&format!("renew by {whose}"), format!("{answer:?}"), &after);
            for (what, settle) in &settles {
                let mut after = row.clone();
                let answer = after.settle(now, &a, Token(token), settle);
                line(&format!("settle {what} by {whose}"), format!("{answer:?}"), &after);
            }
        }
    }
    out
}

#[test]
fn the_row_table_is_the_committed_one() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/machine/row_table.txt");
    let table = table();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(path, &table).expect("the golden file can be written");
    }
    let golden = std::fs::read_to_string(path).expect("the golden file is committed");
    for (number, (is, was)) in table.lines().zip(golden.lines()).enumerate() {
        assert_eq!(is, was, "line {} differs: see this file's head for how to accept it", number + 1);
    }
    assert_eq!(table, golden, "the table has other lines than the golden file");
}
