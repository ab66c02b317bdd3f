//! The row machine: after each change, what must hold of every row.

use std::time::Duration;

use leasehold::machine::{
    Answer, ClaimAnswer, ClaimTerms, DbClock, DbTime, Lease, Row, Settle, Status, Token, WorkerId,
};

use crate::script::{Step, steps};

/// Steps of a row; times are milliseconds, `o` is the owner 0 to 2, `t` how many tokens ago.
///
/// | | |
/// |---|---|
/// | `n` max, due, attempts, token | a new row |
/// | `p` | time passes |
/// | `c` o, lease, grace, search (0 no, else the reclaim limit) | claim |
/// | `r` o, t, lease | renew |
/// | `d` `y` `f` `l` o, t, delay | settle: delivered, retry, failed, release |
pub fn row(data: &[u8]) {
    let mut row = Row::new(3, DbTime::from_micros(0));
    let mut now: i64 = 1_000_000;
    let mut tokens = Vec::new();
    for step in steps(data, 400) {
        let before = row.clone();
        let clock =
            DbClock { early: DbTime::from_micros(now), late: DbTime::from_micros(now.saturating_add(5)) };
        let owner = WorkerId::new(format!("w{}", step.below(0, 3)));
        let ago = tokens.len().checked_sub(1 + step.below(1, 4)).and_then(|at| tokens.get(at));
        let token = ago.copied().unwrap_or_default();
        let delay = Duration::from_millis(step.numbers[2].unsigned_abs());
        let error = String::from("e");
        let settle = match step.letter {
            b'n' => {
                row = Row::new(step.numbers[0] as u32, DbTime::from_micros(step.numbers[1]));
                row.attempts = step.numbers[2] as u32;
                row.token = Token(step.numbers[3]);
                tokens = vec![row.token];
                continue;
            }
            b'p' => {
                now = now.saturating_add(step.numbers[0].saturating_mul(1_000));
                continue;
            }
            b'c' => {
                claim(&mut row, clock, &owner, &step);
                tokens.push(row.token);
                check(&before, &row);
                continue;
            }
            b'r' => {
                let answer = row.renew(clock, &owner, token, delay);
                guard(&before, &owner, token, answer);
                check(&before, &row);
                if answer == Answer::Applied {
                    let until = |row: &Row| row.lease.as_ref().map(|lease| lease.until);
                    assert!(until(&row) >= until(&before), "a renewal shortened a lease");
                    assert_eq!(Row { lease: before.lease.clone(), ..row.clone() }, before);
                } else {
                    assert_eq!(row, before);
                }
                continue;
            }
            b'd' => Settle::Delivered { status: 200 },
            b'y' => Settle::Retry { delay, error, status: Some(500) },
            b'f' => Settle::Failed { error, status: None, tried: step.numbers[2] % 2 == 0 },
            b'l' => Settle::Release { delay: (step.numbers[3] > 0).then_some(delay) },
            _ => continue,
        };
        let answer = row.settle(clock, &owner, token, &settle);
        guard(&before, &owner, token, answer);
        check(&before, &row);
        if answer != Answer::Applied {
            assert_eq!(row, before);
            continue;
        }
        assert_eq!(row.lease, None, "settled, and still leased");
        let terminal = matches!(settle, Settle::Delivered { .. } | Settle::Failed { .. });
        assert_eq!(row.status != Status::Pending, terminal);
        let spent = !matches!(settle, Settle::Release { .. } | Settle::Failed { tried: false, .. });
        assert_eq!(row.attempts, before.attempts.saturating_add(u32::from(spent)));
    }
}

fn claim(row: &mut Row, clock: DbClock, owner: &WorkerId, step: &Step) {
    let before = row.clone();
    let millis = |at: usize| Duration::from_millis(step.numbers[at].unsigned_abs());
    let terms = ClaimTerms {
        lease: millis(1),
        grace: millis(2),
        expired: step.numbers[3] > 0,
        reclaim_limit: step.numbers[3].unsigned_abs() as u32,
        retry_budget: 0,
        valid_until: None,
    };
    match row.claim(clock, owner, &terms) {
        ClaimAnswer::NotEligible => assert_eq!(*row, before),
        ClaimAnswer::Granted { token, reclaimed } => {
            assert!(before.eligible(clock.early, &terms) && before.attempts < before.max_attempts);
            assert_eq!(reclaimed, before.lease.is_some());
            assert_eq!(token, row.token);
            assert!(token > before.token || before.token == Token(i64::MAX), "the token did not rise");
            let lease = Lease { owner: owner.clone(), until: clock.late.after(terms.lease) };
            assert_eq!(row.lease, Some(lease));
        }
        ClaimAnswer::Failed(_) => {
            assert!(before.eligible(clock.early, &terms));
            assert_eq!((row.status, &row.lease), (Status::Failed, &None));
        }
    }
}

/// **P2**: what an answer says of the row as it was.
fn guard(before: &Row, owner: &WorkerId, token: Token, answer: Answer) {
    let holder = before.lease.as_ref().map(|lease| &lease.owner);
    let expected = match holder {
        _ if token != before.token => Answer::Refused,
        None => Answer::Ended,
        Some(holder) if holder == owner => Answer::Applied,
        Some(_) => Answer::Refused,
    };
    assert_eq!(answer, expected);
}

fn check(before: &Row, row: &Row) {
    assert!(row.token >= before.token, "the token fell");
    assert!(row.lease.is_none() || row.status == Status::Pending, "terminal, and leased");
    if before.status != Status::Pending {
        assert_eq!(row, before, "a terminal row changed");
    }
}
