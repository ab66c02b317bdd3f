//! The worker machine under an unkind world, and under inputs that no world would give.

use std::time::Duration;

use leasehold::machine::{
    Answer, AttemptResult, ClaimReply, DbTime, DestinationKey, Grant, Incarnation, Input, LeaseKey,
    OwnedReply, Place, RenewReply, RequestId, RetryAfter, RowId, SettleReply, StoreFault, Token,
};

use crate::script::{Step as Command, steps};
use crate::world::{Step, World};

/// Small letters are steps of the world, capitals are nonsense. The bed checks that no request starts past its fence
/// or beside another of its event, and after each input the machine checks itself.
///
/// | | |
/// |---|---|
/// | `p` `s` | milliseconds pass, with wake-ups and without |
/// | `a` `l` `k` `f` `x` | a call is answered, loses its reply, is lost, is refused for good, finds its rows locked |
/// | `r` | a destination answers: which request, which status |
/// | `c` | aborts are confirmed |
/// | `t` `b` `d` | a row is stolen, the server restarts, its clock gains milliseconds |
/// | `h` `q` | a hint, a shutdown |
pub fn worker(data: &[u8]) {
    let script = steps(data, 400);
    // Nonsense breaks what the world assumes of the rows, so that a script is one or the other.
    if script.iter().any(|command| command.letter.is_ascii_uppercase()) {
        return nonsense(&script);
    }
    let (mut calm, mut noisy) = (World::new(false), World::new(true));
    for command in script {
        let Some(step) = step(&command) else { continue };
        calm.step(&step);
        noisy.step(&step);
        assert_eq!(calm.log, noisy.log, "spurious wake-ups changed what the worker does");
    }
}

fn step(command: &Command) -> Option<Step> {
    let at = command.below(0, 8);
    Some(match command.letter {
        b'p' => Step::Pass(command.within(0, 1, 60_000)),
        b's' => Step::Stop(command.within(0, 1, 120_000)),
        b'a' => Step::Answer(at),
        b'l' => Step::LoseReply(at),
        b'k' => Step::LoseCall(at),
        b'f' => Step::RefuseCall(at),
        b'x' => Step::Lock(at),
        b'r' => Step::Respond(at, command.within(1, 100, 599) as u16),
        b'c' => Step::ConfirmAborts,
        b't' => Step::Steal(1 + command.below(0, 9) as i64),
        b'b' => Step::Restart,
        b'd' => Step::DbMoves(command.within(0, 0, 60_000)),
        b'h' => Step::Hint,
        b'q' => Step::Shutdown,
        _ => return None,
    })
}

/// Capitals name an input; its first number is the request or row, the others fill what it carries.
fn nonsense(script: &[Command]) {
    let mut world = World::new(false);
    for command in script {
        if let Some(step) = step(command) {
            if let Step::Pass(millis) = step {
                world.bed.now = world.bed.now.after(Duration::from_millis(millis));
            }
            continue;
        }
        let Some(input) = input(command) else { continue };
        let worker = &mut world.bed.worker;
        worker.handle(world.bed.now, input);
        worker.assert_invariants();
        while worker.poll_action().is_some() {}
        while worker.poll_observation().is_some() {}
    }
}

fn input(command: &Command) -> Option<Input> {
    let [first, second, third, fourth] = command.numbers;
    let request = RequestId(first.unsigned_abs() % 64);
    let key = LeaseKey { row: RowId(first % 8), token: Token(second % 8) };
    let db_now = DbTime::from_micros(fourth);
    let answer = [Answer::Applied, Answer::Ended, Answer::Refused, Answer::Skipped][command.below(3, 4)];
    let answers = vec![(LeaseKey { row: RowId(second % 8), token: Token(third % 8) }, answer)];
    let error = String::new;
    let fault = match command.below(1, 3) {
        0 => StoreFault::Unknown { error: error() },
        1 => StoreFault::NotApplied { error: error() },
        _ => StoreFault::Permanent { error: error() },
    };
    let grant = |row: i64| Grant {
        key: LeaseKey { row: RowId(row % 8), token: Token(third % 8) },
        destination: DestinationKey::new(format!("http://{}", row % 3)),
        attempts: third as u32,
        max_attempts: fourth as u32,
        reclaims: second as u32,
        reclaimed: second % 2 == 0,
        unsendable: None,
    };
    Some(match command.letter {
        b'W' => Input::Wake,
        b'H' => Input::Hint,
        b'Q' => Input::Shutdown,
        b'A' => Input::Attempted {
            key,
            result: AttemptResult::Responded {
                status: third as u16,
                retry_after: Some(if fourth % 2 == 0 {
                    RetryAfter::Delay(Duration::from_micros(fourth.unsigned_abs()))
                } else {
                    RetryAfter::Date(DbTime::from_micros(fourth))
                }),
            },
        },
        b'E' => Input::Attempted { key, result: AttemptResult::Errored { error: error() } },
        b'U' => Input::Attempted { key, result: AttemptResult::Undeliverable { error: error() } },
        b'B' => Input::Aborted { key },
        b'C' => Input::Claimed {
            request,
            reply: Ok(ClaimReply {
                db_now,
                incarnation: Incarnation::new(format!("{}", second % 2)),
                searched_expired: third % 2 == 0,
                grants: (0..second.unsigned_abs() % 5)
                    .map(|row| grant(second.wrapping_add(row as i64)))
                    .collect(),
                failed: Vec::new(),
                front: (third % 5 < 3)
                    .then_some(Place { due: DbTime::from_micros(third), row: RowId(second) }),
                leases_front: (third % 5 < 3).then_some(Token(fourth)),
                next_due_in: (third % 3 == 0).then_some(Duration::from_micros(fourth.unsigned_abs())),
                any_pending: (third % 3 == 1).then_some(second % 2 == 0),
            }),
        },
        b'R' => Input::Renewed { request, reply: Ok(RenewReply { db_now, answers }) },
        b'S' => Input::Settled { request, reply: Ok(SettleReply { db_now, answers }) },
        b'O' => Input::Owned {
            request,
            reply: Ok(OwnedReply { db_now, keys: answers.into_iter().map(|(key, _)| key).collect() }),
        },
        b'F' => match command.below(2, 4) {
            0 => Input::Claimed { request, reply: Err(fault) },
            1 => Input::Renewed { request, reply: Err(fault) },
            2 => Input::Settled { request, reply: Err(fault) },
            _ => Input::Owned { request, reply: Err(fault) },
        },
        _ => return None,
    })
}
