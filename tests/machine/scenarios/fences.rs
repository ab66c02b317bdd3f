//! Deadlines and fences (P3, P4).

use super::*;

#[test]
fn without_a_renewal_the_request_is_aborted_at_the_fence_and_given_back() {
    let (mut bed, key) = one_open();
    bed.pass(27 * SECOND);
    assert!(bed.seen.contains(&Observation::Fenced { key, open: true }));
    assert!(bed.opened().contains(&key), "open until the abort is confirmed");
    let before = bed.now;
    bed.confirm_abort(key);
    let release = bed.pending.iter().any(|action| matches!(action, Action::Settle(..)));
    assert!(release, "given back once the abort is confirmed");
    assert_eq!(bed.now, before);
}

#[test]
fn the_deadline_counts_from_the_send_not_from_the_reply() {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    bed.wake();
    let sent = bed.now;
    bed.now = bed.now.after(4 * SECOND);
    bed.answer_all();
    let start_before = sent.after(27 * SECOND);
    assert_eq!(bed.opened().len(), 1);
    bed.now = start_before;
    let actions = bed.wake();
    assert_eq!(aborts(&actions).len(), 1, "fenced 27 s after the claim was sent");
}

#[test]
fn a_claim_answered_past_its_own_fence_starts_nothing() {
    let mut bed = Bed::new(settings());
    bed.add(1, "http://a");
    bed.wake();
    let claim = bed.pending.remove(0);
    let reply = bed.apply(claim);
    bed.now = bed.now.after(27 * SECOND);
    bed.give(reply);
    assert!(bed.opened().is_empty());
}

#[test]
fn a_stopped_process_checks_its_fences_before_anything_else() {
    let (mut bed, key) = one_open();
    bed.add(2, "http://b");
    bed.now = bed.now.after(3_600 * SECOND);
    let actions = bed.give(Input::Hint);
    assert_eq!(aborts(&actions), [key]);
}

#[test]
fn an_outcome_that_crosses_its_abort_is_kept() {
    let (mut bed, key) = one_open();
    bed.pass(27 * SECOND);
    bed.pending.clear();
    bed.respond(key, 200);
    let kept = bed.pending.iter().any(|action| match action {
        Action::Settle(_, settle) => {
            matches!(settle.entries[0].1, leasehold::machine::Settle::Delivered { .. })
        }
        _ => false,
    });
    assert!(kept);
}

#[test]
fn an_outcome_that_crosses_the_abort_of_a_lost_lease_is_counted_and_settles_nothing() {
    let (mut bed, key) = one_open();
    bed.row_mut(1).token.0 += 1;
    bed.run(9 * SECOND);
    assert!(bed.seen.contains(&Observation::HeartbeatEnded { key, why: HeartbeatEnd::Lost }));
    bed.pending.clear();
    bed.respond(key, 200);
    assert!(bed.seen.contains(&Observation::SettleRefused { key, kind: SettleKind::Delivered }));
    assert!(!bed.pending.iter().any(|action| matches!(action, Action::Settle(..))));
    assert_eq!(bed.worker.leased(), 0);
}

#[test]
fn a_database_clock_that_ran_ahead_fences_everything() {
    let (mut bed, key) = one_open();
    bed.db_ahead = 4 * SECOND;
    let actions = bed.wake();
    assert!(aborts(&actions).is_empty());
    bed.pass(300 * MS);
    bed.answer_all();
    assert!(bed.seen.iter().any(|seen| matches!(seen, Observation::ClockRanAhead { .. })));
    assert!(bed.seen.contains(&Observation::Fenced { key, open: true }));
}

#[test]
fn an_answer_from_before_a_step_that_comes_late_shows_no_second_one() {
    let (mut bed, key) = one_open();
    bed.respond(key, 200);
    let settle = bed.pending.remove(0);
    let from_before = bed.apply(settle);
    bed.db_ahead = 4 * SECOND;
    bed.add(2, "http://b");
    bed.run(SECOND);
    bed.give(from_before);
    bed.run(SECOND);
    let told = bed.seen.iter().filter(|seen| matches!(seen, Observation::ClockRanAhead { .. }));
    assert_eq!(told.count(), 1);
    assert!(!bed.seen.iter().any(|seen| matches!(seen, Observation::Fenced { .. })), "{:?}", bed.seen);
    assert_eq!(bed.opened().len(), 1);
}

#[test]
fn a_clock_step_within_the_margin_changes_nothing() {
    let margin = settings().timing().fence_margin();
    for (step, kept) in [(margin, true), (margin + Duration::from_micros(1), false)] {
        let (mut bed, key) = one_open();
        bed.db_ahead = step;
        bed.run(20 * SECOND);
        let fenced = bed.seen.contains(&Observation::Fenced { key, open: true });
        assert_eq!(!fenced, kept, "a step of {step:?}");
    }
}

#[test]
fn an_own_older_lease_is_gone_before_the_new_one_starts() {
    let (mut bed, old) = one_open();
    // A failover lost the claim; the row is free again and this worker claims it once more.
    *bed.row_mut(1) = leasehold::machine::Row::new(20, bed.db().early);
    bed.now = bed.now.after(SECOND);
    bed.give(Input::Hint);
    let claim = bed.pending.remove(0);
    let actions = bed.answer(claim);
    assert_eq!(aborts(&actions), [old], "the older lease is lost");
    assert_eq!(bed.opened(), [old], "nothing new yet");
    bed.confirm_abort(old);
    let open = bed.opened();
    assert!(open.len() == 1 && open[0] != old);
}

#[test]
fn the_watch_is_never_longer_than_half_the_margin() {
    let limits = Limits { poll_interval: Duration::from_secs(3_600), ..limits() };
    let settings = WorkerSettings::parse(timing(30 * SECOND), limits, retry(), 7).expect("sound settings");
    let mut bed = Bed::new(settings);
    bed.add(1, "http://a");
    bed.run(3 * SECOND);
    assert_eq!(bed.worker.next_wakeup().map(|at| at.since(bed.now)), Some(1_500 * MS));
}
