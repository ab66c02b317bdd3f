//! What both stores promise, one suite for both. The row machine says what a row must look like afterwards.

use std::time::Duration;

use leasehold::adapters::store::{LONGEST_URL, NewEvent, StoreError};
use leasehold::machine::{
    Answer, ClaimFailure, ClaimRequest, DestinationKey, Grant, Incarnation, LeaseKey, RenewRequest,
    Row as Model, RowId, Settle, SettleRequest, Status, StoreFault, Token, Unsendable, WorkerId,
};
use leasehold::ports::Outbox;

use crate::bed::{
    A, B, Bed, C, GRACE, LEASE, MAX_PAYLOAD, delivered, ids, key, keys, leased, on_postgres, on_sqlite,
    renewal,
};

macro_rules! on_both {
    ($($test:ident)*) => {
        mod on_postgres {
            $(#[test] fn $test() { super::on_postgres(async |bed| super::$test(bed).await); })*
        }
        mod on_sqlite {
            $(#[test] fn $test() { super::on_sqlite(async |bed| super::$test(bed).await); })*
        }
    };
}

pub(crate) use on_both;

on_both! {
    a_claim_leases_what_is_due
    a_claim_keeps_to_its_limit_and_order
    tokens_rise_by_one_or_to_the_clock
    renewing_extends_and_never_shortens
    the_guard_of_renewals
    the_guard_of_settles
    two_tokens_of_one_row_in_one_batch
    every_settle_does_what_the_row_machine_does
    an_expired_lease_that_nobody_took_is_still_renewed_and_settled
    a_reclaim_waits_for_lease_and_grace
    a_reclaim_waits_for_the_next_attempt_too
    expired_leases_are_taken_only_under_the_known_incarnation
    a_claim_keeps_to_the_shares
    a_claim_reaches_past_the_rows_of_a_full_destination
    few_seats_go_round_the_destinations
    a_long_walk_is_made_by_several_claims
    expired_leases_of_full_destinations_hide_no_others
    at_most_one_event_on_probation
    an_event_on_probation_of_a_full_destination_hides_no_other
    attempts_spent_fail_in_the_claim
    the_retry_budget_limits_attempts
    the_reclaim_limit_fails_in_the_claim
    limits_at_their_ends
    a_number_at_its_bound_harms_no_other_event
    an_oversized_payload_is_granted_but_not_sent
    a_url_that_is_too_long_harms_no_other_event
    a_claim_stops_at_eight_mebibytes
    one_row_is_granted_however_the_bytes_stand
    the_payload_is_what_the_store_prints
    next_due_in_is_the_next_unleased_event
    any_pending_says_so
    owned_lists_what_the_store_shows
    enqueue_is_all_or_nothing
    enqueue_keeps_what_it_is_given
    status_counts
    migrating_again_changes_nothing
    many_migrate_at_once
    an_empty_database_is_a_schema_error
    migrating_a_damaged_schema_says_so
    constraints_hold
    destination_keys
    errors_are_cleaned
    a_constraint_is_a_permanent_fault
}

async fn a_claim_leases_what_is_due<B: Bed>(bed: &B) {
    let due = bed.due().await;
    let later = bed.insert(A, "{}", &Model::new(20, bed.now().after(Duration::from_micros(1)))).await;
    for status in [Status::Delivered, Status::Failed] {
        bed.insert(A, "{}", &Model { status, ..Model::new(20, bed.now()) }).await;
    }
    let other = Model {
        lease: leased("other", bed.now().after(LEASE)),
        token: Token(1),
        ..Model::new(20, bed.now())
    };
    bed.insert(A, "{}", &other).await;

    let claimed = bed.claim(bed.request("w")).await;
    assert_eq!(ids(&claimed), [due]);
    assert_eq!(claimed.reply.db_now, bed.now());
    assert_eq!(claimed.reply.incarnation, bed.incarnation());
    assert!(claimed.reply.failed.is_empty());
    let grant = &claimed.reply.grants[0];
    assert_eq!((grant.attempts, grant.max_attempts, grant.reclaims, grant.reclaimed), (0, 20, 0, false));
    assert_eq!(grant.destination, DestinationKey::new("https://a.example"));
    assert_eq!(grant.unsendable, None);
    assert_eq!(claimed.messages.len(), 1);
    assert_eq!(claimed.messages[0].destination_url, A);
    assert_eq!(claimed.messages[0].event_type, "test.event");
    let row = bed.row(due).await;
    assert_eq!(row.lease, leased("w", bed.now().after(LEASE)));
    assert_eq!(row.token, grant.key.token);
    assert_eq!(row.token.0, bed.now().as_millis());
    assert_eq!(bed.row(later).await.lease, None);

    bed.pass(Duration::from_micros(1)).await;
    assert_eq!(ids(&bed.claim(bed.request("w")).await), [later], "due to the microsecond");
}

async fn a_claim_keeps_to_its_limit_and_order<B: Bed>(bed: &B) {
    let now = bed.now();
    bed.pass(Duration::from_secs(10)).await;
    let third = bed.insert(A, "{}", &Model::new(20, now.after(Duration::from_secs(2)))).await;
    let first = bed.insert(A, "{}", &Model::new(20, now)).await;
    let second = bed.insert(A, "{}", &Model::new(20, now)).await;
    let mut taken = Vec::new();
    for _ in 0..3 {
        let mut request = bed.request("w");
        request.limit = 1;
        taken.extend(ids(&bed.claim(request).await));
    }
    assert_eq!(taken, [first, second, third]);
    assert!(bed.take("w").await.is_empty());
}

async fn tokens_rise_by_one_or_to_the_clock<B: Bed>(bed: &B) {
    let ahead = Token(bed.now().as_millis() + 1_000_000);
    let row = bed.insert(A, "{}", &Model { token: ahead, ..Model::new(20, bed.now()) }).await;
    assert_eq!(bed.take("w").await, [key(row, Token(ahead.0 + 1))]);
    let fresh = bed.due().await;
    bed.pass(Duration::from_micros(1_999)).await;
    assert_eq!(bed.take("w").await, [key(fresh, Token(bed.now().as_millis()))], "milliseconds, rounded down");
}

async fn renewing_extends_and_never_shortens<B: Bed>(bed: &B) {
    bed.due().await;
    let lease = bed.take("w").await[0];
    bed.pass(Duration::from_secs(7)).await;
    let before = bed.row(lease.row.0).await;
    assert_eq!(bed.renew("w", lease).await, Answer::Applied);
    let after = bed.row(lease.row.0).await;
    assert_eq!(after, Model { lease: leased("w", bed.now().after(LEASE)), ..before });
    let shorter = RenewRequest { lease: Duration::from_secs(1), ..renewal("w", vec![lease]) };
    bed.store().renew(shorter).await.unwrap();
    assert_eq!(bed.row(lease.row.0).await, after);
}

/// Every way in which a guard can fail, with the answer that the row machine gives.
async fn guard_cases<B: Bed>(bed: &B) -> Vec<(&'static str, LeaseKey, Answer)> {
    let until = bed.now().after(LEASE);
    let fresh = Model::new(20, bed.now());
    let held = Model { lease: leased("w", until), token: Token(5), ..fresh.clone() };
    let of = |row: Model| async move { bed.insert(A, "{}", &row).await };
    let matching = of(held.clone()).await;
    let other_owner = of(Model { lease: leased("other", until), ..held.clone() }).await;
    let old_token = of(held.clone()).await;
    let ended = of(Model { token: Token(5), ..fresh.clone() }).await;
    let ended_since = of(Model { token: Token(6), ..fresh.clone() }).await;
    let done = |status| Model { status, token: Token(5), ..fresh.clone() };
    let delivered = of(done(Status::Delivered)).await;
    let failed = of(done(Status::Failed)).await;
    let never = of(fresh.clone()).await;
    vec![
        ("matching", key(matching, Token(5)), Answer::Applied),
        ("another owner", key(other_owner, Token(5)), Answer::Refused),
        ("an old token", key(old_token, Token(4)), Answer::Refused),
        ("a token to come", key(old_token, Token(6)), Answer::Refused),
        ("ended", key(ended, Token(5)), Answer::Ended),
        ("ended under a later token", key(ended_since, Token(5)), Answer::Refused),
        ("delivered under this token", key(delivered, Token(5)), Answer::Ended),
        ("delivered under another", key(delivered, Token(4)), Answer::Refused),
        ("failed under this token", key(failed, Token(5)), Answer::Ended),
        ("failed under another", key(failed, Token(6)), Answer::Refused),
        ("never claimed", key(never, Token(5)), Answer::Refused),
        ("no such row", key(never + 1_000, Token(5)), Answer::Refused),
    ]
}

async fn the_guard_of_renewals<B: Bed>(bed: &B) {
    for (what, lease, expected) in guard_cases(bed).await {
        bed.pass(Duration::from_secs(1)).await;
        let before = bed.rows().await;
        assert_eq!(bed.renew("w", lease).await, expected, "{what}");
        assert_eq!(bed.rows().await == before, expected != Answer::Applied, "{what}: changed or not");
    }
    // The same in one batch, and by a waiting statement.
    let cases = guard_cases(bed).await;
    let request = renewal("w", cases.iter().map(|case| case.1).collect());
    let mut answers = bed.store().renew(request).await.unwrap().answers;
    answers.sort();
    let mut expected: Vec<_> = cases.iter().map(|case| (case.1, case.2)).collect();
    expected.sort();
    assert_eq!(answers, expected);
    for (what, lease, expected) in cases {
        let request = RenewRequest { wait: true, ..renewal("w", vec![lease]) };
        assert_eq!(bed.store().renew(request).await.unwrap().answers, [(lease, expected)], "{what}");
    }
}

async fn the_guard_of_settles<B: Bed>(bed: &B) {
    for (what, lease, expected) in guard_cases(bed).await {
        let before = bed.rows().await;
        assert_eq!(bed.settle("w", lease, delivered()).await, expected, "{what}");
        assert_eq!(bed.rows().await == before, expected != Answer::Applied, "{what}: changed or not");
    }
    let cases = guard_cases(bed).await;
    let entries = cases.iter().map(|case| (case.1, delivered())).collect();
    let request = SettleRequest { owner: WorkerId::new("w"), entries };
    let mut answers = bed.store().settle(request).await.unwrap().answers;
    answers.sort();
    let mut expected: Vec<_> = cases.iter().map(|case| (case.1, case.2)).collect();
    expected.sort();
    assert_eq!(answers, expected);
}

/// A worker may have outcomes for one event under two of its tokens.
async fn two_tokens_of_one_row_in_one_batch<B: Bed>(bed: &B) {
    let until = bed.now().after(LEASE);
    let held = Model { lease: leased("w", until), token: Token(5), ..Model::new(20, bed.now()) };
    let row = bed.insert(A, "{}", &held).await;
    let both = [key(row, Token(4)), key(row, Token(5))];
    let expected = [(both[0], Answer::Refused), (both[1], Answer::Applied)];
    let mut answers = bed.store().renew(renewal("w", both.to_vec())).await.unwrap().answers;
    answers.sort();
    assert_eq!(answers, expected);
    let release = |delay| Settle::Release { delay: Some(Duration::from_secs(delay)) };
    let entries = vec![(both[0], release(1)), (both[1], release(2))];
    let request = SettleRequest { owner: WorkerId::new("w"), entries };
    let mut answers = bed.store().settle(request).await.unwrap().answers;
    answers.sort();
    assert_eq!(answers, expected);
    assert_eq!(bed.row(row).await.next_attempt_at, bed.now().after(Duration::from_secs(2)));
}

async fn every_settle_does_what_the_row_machine_does<B: Bed>(bed: &B) {
    let texts = || "connection refused".to_owned();
    let settles = [
        Settle::Delivered { status: 204 },
        Settle::Retry { delay: Duration::from_millis(1_500), error: texts(), status: Some(503) },
        Settle::Retry { delay: Duration::ZERO, error: texts(), status: None },
        Settle::Failed { error: texts(), status: Some(410), tried: true },
        Settle::Failed { error: texts(), status: None, tried: false },
        Settle::Release { delay: None },
        Settle::Release { delay: Some(Duration::from_micros(3)) },
    ];
    let held = Model {
        lease: leased("w", bed.now().after(LEASE)),
        token: Token(7),
        reclaims: 2,
        attempts: 4,
        last_error: Some("before".into()),
        last_status: Some(500),
        ..Model::new(20, bed.now())
    };
    let mut entries = Vec::new();
    let mut expected = Vec::new();
    bed.pass(Duration::from_secs(1)).await;
    let clock = leasehold::machine::DbClock { early: bed.now(), late: bed.now() };
    for settle in settles {
        let row = bed.insert(A, "{}", &held).await;
        let mut model = held.clone();
        assert_eq!(model.settle(clock, &WorkerId::new("w"), Token(7), &settle), Answer::Applied);
        expected.push(model);
        entries.push((key(row, Token(7)), settle));
    }
    let reply =
        bed.store().settle(SettleRequest { owner: WorkerId::new("w"), entries: entries.clone() }).await;
    assert!(reply.unwrap().answers.iter().all(|(_, answer)| *answer == Answer::Applied));
    let rows: Vec<Model> = bed.rows().await.into_iter().map(|stored| stored.row).collect();
    assert_eq!(rows, expected);
    // Repeated: everything has ended, nothing changes.
    let reply = bed.store().settle(SettleRequest { owner: WorkerId::new("w"), entries }).await;
    assert!(reply.unwrap().answers.iter().all(|(_, answer)| *answer == Answer::Ended));
    let rows: Vec<Model> = bed.rows().await.into_iter().map(|stored| stored.row).collect();
    assert_eq!(rows, expected);
}

async fn an_expired_lease_that_nobody_took_is_still_renewed_and_settled<B: Bed>(bed: &B) {
    bed.due().await;
    let lease = bed.take("w").await[0];
    bed.pass(LEASE * 100).await;
    assert_eq!(bed.renew("w", lease).await, Answer::Applied);
    assert!(bed.take("other").await.is_empty(), "renewed: nobody else's");
    bed.pass(LEASE * 100).await;
    assert_eq!(bed.settle("w", lease, delivered()).await, Answer::Applied);
    assert_eq!(bed.row(lease.row.0).await.status, Status::Delivered);
}

async fn a_reclaim_waits_for_lease_and_grace<B: Bed>(bed: &B) {
    bed.due().await;
    let first = bed.take("w").await[0];
    bed.pass(LEASE + GRACE - Duration::from_micros(1)).await;
    let claimed = bed.claim(bed.request("other")).await;
    assert!(claimed.reply.searched_expired);
    assert!(claimed.reply.grants.is_empty(), "a microsecond early");
    bed.pass(Duration::from_micros(1)).await;
    let claimed = bed.claim(bed.request("other")).await;
    let grant = &claimed.reply.grants[0];
    assert_eq!((grant.reclaimed, grant.reclaims, grant.key.row), (true, 1, first.row));
    assert!(grant.key.token > first.token);
    assert_eq!(bed.renew("w", first).await, Answer::Refused);
    assert_eq!(bed.settle("w", first, delivered()).await, Answer::Refused);
    let row = bed.row(first.row.0).await;
    assert_eq!((row.lease, row.reclaims), (leased("other", bed.now().after(LEASE)), 1));
}

async fn a_reclaim_waits_for_the_next_attempt_too<B: Bed>(bed: &B) {
    let later = bed.now().after(LEASE);
    let held = Model { lease: leased("gone", bed.now()), token: Token(1), ..Model::new(20, later) };
    bed.insert(A, "{}", &held).await;
    bed.pass(GRACE).await;
    assert!(bed.take("w").await.is_empty());
    bed.set_clock(later).await;
    assert_eq!(bed.take("w").await.len(), 1);
}

async fn expired_leases_are_taken_only_under_the_known_incarnation<B: Bed>(bed: &B) {
    bed.due().await;
    bed.take("gone").await;
    bed.pass(LEASE + GRACE).await;
    let fresh = bed.due().await;
    let other = Some(Incarnation::new("another server"));
    for (expired, incarnation) in [(false, Some(bed.incarnation())), (true, None), (true, other)] {
        let mut request = bed.request("w");
        request.terms.expired = expired;
        request.incarnation = incarnation;
        let claimed = bed.claim(request).await;
        assert!(!claimed.reply.searched_expired);
        assert_eq!(claimed.reply.incarnation, bed.incarnation());
        for lease in keys(&claimed) {
            assert_eq!(lease.row, RowId(fresh), "fresh events are always taken");
            bed.settle("w", lease, Settle::Release { delay: None }).await;
        }
    }
    assert_eq!(bed.take("w").await.len(), 2);
}

async fn a_claim_keeps_to_the_shares<B: Bed>(bed: &B) {
    for _ in 0..5 {
        for url in [A, B, C] {
            bed.insert(url, "{}", &Model::new(20, bed.now())).await;
        }
    }
    let mut request = bed.request("w");
    request.share = 2;
    request.shares =
        vec![(DestinationKey::new("https://a.example"), 0), (DestinationKey::new("https://b.example"), 3)];
    let claimed = bed.claim(request).await;
    let of = |name: &str| {
        let key = DestinationKey::new(name);
        claimed.reply.grants.iter().filter(|grant| grant.destination == key).count()
    };
    assert_eq!((of("https://a.example"), of("https://b.example"), of("https://c.example")), (0, 3, 2));
}

async fn a_claim_reaches_past_the_rows_of_a_full_destination<B: Bed>(bed: &B) {
    for _ in 0..50 {
        bed.due().await;
    }
    bed.pass(Duration::from_secs(1)).await;
    let mut others = Vec::new();
    for url in [B, C, B, C, B, C] {
        others.push(bed.insert(url, "{}", &Model::new(20, bed.now())).await);
    }
    // Not due, though at the head of its destination's name order.
    bed.insert("https://0.example/", "{}", &Model::new(20, bed.now().after(LEASE))).await;

    // Full by what is held already.
    let mut request = bed.request("w");
    request.limit = 4;
    request.share = 2;
    request.shares = vec![(DestinationKey::new("https://a.example"), 0)];
    let claimed = bed.claim(request.clone()).await;
    assert_eq!(ids(&claimed), &others[..4]);
    for lease in keys(&claimed) {
        bed.settle("w", lease, Settle::Release { delay: None }).await;
    }
    // Full by this claim itself.
    request.limit = 6;
    request.shares = Vec::new();
    let claimed = bed.claim(request).await;
    let mut urls: Vec<&str> =
        claimed.messages.iter().map(|message| message.destination_url.as_str()).collect();
    urls.sort_unstable();
    assert_eq!(urls, [A, A, B, B, C, C]);
}

/// A claim of four, to which only destinations beyond the front of the queue are left.
async fn claim_beyond<B: Bed>(bed: &B) -> (Vec<String>, Option<Duration>) {
    let mut request = bed.request("w");
    request.limit = 4;
    request.share = 2;
    request.shares = vec![(DestinationKey::new("https://full.example"), 0)];
    let reply = bed.claim(request).await.reply;
    (reply.grants.iter().map(|grant| grant.destination.as_str().to_owned()).collect(), reply.next_due_in)
}

async fn few_seats_go_round_the_destinations<B: Bed>(bed: &B) {
    for url in ["full", "a", "b", "g", "h", "z"].map(|name| format!("https://{name}.example")) {
        for _ in 0..5 {
            bed.insert(&url, "{}", &Model::new(20, bed.now())).await;
        }
    }
    for expected in [["a", "b"], ["g", "h"], ["a", "z"], ["b", "g"], ["h", "z"]] {
        let (mut found, _) = claim_beyond(bed).await;
        found.sort_unstable();
        found.dedup();
        assert_eq!(found, expected.map(|name| format!("https://{name}.example")));
    }
}

async fn a_long_walk_is_made_by_several_claims<B: Bed>(bed: &B) {
    for _ in 0..5 {
        bed.insert("https://full.example", "{}", &Model::new(20, bed.now())).await;
    }
    let later = Model::new(20, bed.now().after(LEASE));
    for number in 0..2_200 {
        bed.insert(&format!("https://later{number}.example"), "{}", &later).await;
    }
    bed.insert("https://z.example", "{}", &Model::new(20, bed.now())).await;
    let none = (Vec::new(), Some(Duration::ZERO));
    let found = (vec!["https://z.example".to_owned()], Some(LEASE));
    let over = (Vec::new(), Some(LEASE));
    let lap = [none.clone(), none.clone(), over];
    for expected in [none.clone(), none, found].iter().chain(&lap).chain(&lap) {
        assert_eq!(claim_beyond(bed).await, *expected);
    }
}

async fn expired_leases_of_full_destinations_hide_no_others<B: Bed>(bed: &B) {
    let gone = |now| Model { lease: leased("gone", now), token: Token(1), ..Model::new(20, now) };
    for _ in 0..10 {
        bed.insert(A, "{}", &gone(bed.now())).await;
    }
    bed.pass(Duration::from_secs(1)).await;
    let other = bed.insert(B, "{}", &gone(bed.now())).await;
    bed.pass(GRACE).await;
    let mut request = bed.request("w");
    request.limit = 2;
    request.shares = vec![(DestinationKey::new("https://a.example"), 0)];
    assert_eq!(ids(&bed.claim(request.clone()).await), [other]);
    // The same if this claim fills the share.
    bed.run(&format!("update {} set lease_owner = 'gone' where id = {other}", bed.table())).await.unwrap();
    bed.pass(LEASE + GRACE).await;
    request.share = 1;
    request.shares = Vec::new();
    assert!(ids(&bed.claim(request).await).contains(&other));
}

async fn at_most_one_event_on_probation<B: Bed>(bed: &B) {
    let now = bed.now();
    let suspect = |reclaims| Model { reclaims, ..Model::new(20, now) };
    let released = bed.insert(A, "{}", &suspect(3)).await;
    let gone =
        bed.insert(A, "{}", &Model { lease: leased("gone", now), token: Token(1), ..suspect(2) }).await;
    let not_yet = bed.insert(A, "{}", &suspect(2)).await;
    bed.pass(GRACE).await;

    let mut request = bed.request("w");
    request.probation = 0;
    let claimed = bed.claim(request).await;
    assert_eq!(ids(&claimed), [not_yet], "no room for probation: only what is not on it");
    assert_eq!(claimed.reply.grants[0].reclaims, 2);

    let claimed = bed.claim(bed.request("w")).await;
    assert_eq!(ids(&claimed), [released], "one of two, the older one");
    assert_eq!(claimed.reply.grants[0].reclaims, 3);
    let claimed = bed.claim(bed.request("w")).await;
    assert_eq!(ids(&claimed), [gone]);
    assert_eq!((claimed.reply.grants[0].reclaims, claimed.reply.grants[0].reclaimed), (3, true));
}

async fn an_event_on_probation_of_a_full_destination_hides_no_other<B: Bed>(bed: &B) {
    let now = bed.now();
    let suspect = |reclaims| Model { reclaims, ..Model::new(20, now) };
    let gone = |reclaims| Model { lease: leased("gone", now), token: Token(1), ..suspect(reclaims) };
    bed.insert(A, "{}", &suspect(3)).await;
    bed.insert(A, "{}", &gone(2)).await;
    let released = bed.insert(B, "{}", &suspect(3)).await;
    let ran_out = bed.insert(B, "{}", &gone(2)).await;
    bed.pass(GRACE).await;
    let mut request = bed.request("w");
    request.limit = 1;
    request.shares = vec![(DestinationKey::new("https://a.example"), 0)];
    assert_eq!(ids(&bed.claim(request.clone()).await), [released]);
    assert_eq!(ids(&bed.claim(request).await), [ran_out]);
}

async fn attempts_spent_fail_in_the_claim<B: Bed>(bed: &B) {
    let now = bed.now();
    let spent = Model { attempts: 3, token: Token(9), last_status: Some(500), ..Model::new(3, now) };
    let fresh = bed.insert(A, "{}", &spent).await;
    let gone = bed.insert(A, "{}", &Model { lease: leased("gone", now), ..spent.clone() }).await;
    bed.pass(GRACE).await;
    let claimed = bed.claim(bed.request("w")).await;
    assert!(claimed.reply.grants.is_empty() && claimed.messages.is_empty());
    let mut failed = claimed.reply.failed;
    failed.sort();
    let why = ClaimFailure::AttemptsSpent;
    assert_eq!(failed, [(RowId(fresh), why), (RowId(gone), why)]);
    let error = Some(why.last_error().to_owned());
    let failed = Model { status: Status::Failed, last_error: error, ..spent };
    assert_eq!(bed.row(fresh).await, failed, "no owner: the token stays, so a repeated settle has ended");
    assert_eq!(bed.settle("w", key(fresh, Token(9)), delivered()).await, Answer::Ended);
    let token = Token(bed.now().as_millis());
    assert_eq!(bed.row(gone).await, Model { reclaims: 1, token, ..failed }, "taken from an owner");
    assert_eq!(bed.settle("gone", key(gone, Token(9)), delivered()).await, Answer::Refused);
}

async fn the_retry_budget_limits_attempts<B: Bed>(bed: &B) {
    let tried = |attempts| Model { attempts, ..Model::new(20, bed.now()) };
    let may = bed.insert(A, "{}", &tried(2)).await;
    let may_not = bed.insert(A, "{}", &tried(3)).await;
    let mut request = bed.request("w");
    request.terms.retry_budget = 2;
    let claimed = bed.claim(request).await;
    assert_eq!(ids(&claimed), [may], "two retries are three attempts");
    assert_eq!(claimed.reply.failed, [(RowId(may_not), ClaimFailure::AttemptsSpent)]);
}

async fn the_reclaim_limit_fails_in_the_claim<B: Bed>(bed: &B) {
    let now = bed.now();
    let gone = Model { lease: leased("gone", now), token: Token(2), reclaims: 4, ..Model::new(20, now) };
    let last = bed.insert(A, "{}", &gone).await;
    bed.pass(GRACE).await;
    let mut request = bed.request("w");
    request.terms.reclaim_limit = 5;
    assert_eq!(ids(&bed.claim(request.clone()).await), [last], "the fifth is allowed");
    bed.pass(LEASE + GRACE).await;
    let claimed = bed.claim(request).await;
    assert_eq!(claimed.reply.failed, [(RowId(last), ClaimFailure::ReclaimsSpent)]);
    let row = bed.row(last).await;
    assert_eq!((row.status, row.reclaims, row.lease), (Status::Failed, 6, None));
    assert_eq!(row.last_error.as_deref(), Some(ClaimFailure::ReclaimsSpent.last_error()));
    assert_eq!(row.token, Token(bed.now().as_millis()));
}

async fn limits_at_their_ends<B: Bed>(bed: &B) {
    let row = bed.insert(A, "{}", &Model { attempts: 1, ..Model::new(1_000_000_000, bed.now()) }).await;
    let mut request = bed.request("w");
    request.terms.retry_budget = u32::MAX;
    request.terms.reclaim_limit = u32::MAX;
    request.limit = u32::MAX;
    request.share = u32::MAX;
    assert_eq!(ids(&bed.claim(request).await), [row]);
}

/// A claim would raise them past what the table takes, and fail as a whole at each try.
async fn a_number_at_its_bound_harms_no_other_event<B: Bed>(bed: &B) {
    let now = bed.now();
    let new = || Model::new(20, now);
    let at = |token| Model { token, ..new() };
    let one_left = Token(Token::BOUND.0 - 1);
    let ran_out = |row: Model| Model { lease: leased("gone", now), ..row };
    let reclaims = |reclaims| Model { reclaims, ..new() };
    // On probation, which is locked at another place in the claim.
    let suspect = |row: Model| Model { reclaims: 3, ..row };
    let bad = [
        (at(Token::BOUND), Token::BOUND, 0),
        (at(one_left), one_left, 0),
        (ran_out(at(Token::BOUND)), Token::BOUND, 1),
        (ran_out(at(one_left)), Token::BOUND, 1),
        (suspect(at(Token::BOUND)), Token::BOUND, 3),
        (suspect(ran_out(at(Token::BOUND))), Token::BOUND, 4),
        (ran_out(reclaims(1_000_000_000)), Token(now.after(GRACE).as_millis()), 1_000_000_000),
    ];
    bed.pass(GRACE).await;
    for (reclaim_limit, search) in [(0, true), (100, true), (0, false)] {
        for (row, token, reclaims) in bad.clone() {
            if row.lease.is_some() && !search {
                continue;
            }
            let id = bed.insert(A, "{}", &row).await;
            let (other, good) = (bed.insert(A, "{}", &ran_out(new())).await, bed.due().await);
            let mut request = bed.request("w");
            (request.terms.reclaim_limit, request.terms.expired) = (reclaim_limit, search);
            let claimed = bed.claim(request).await;
            let expected = if search { vec![other, good] } else { vec![good] };
            assert_eq!(ids(&claimed), expected, "beside {row:?}");
            let why = if reclaim_limit > 0 && row.reclaims > reclaim_limit {
                ClaimFailure::ReclaimsSpent
            } else {
                ClaimFailure::AtBound
            };
            assert_eq!(claimed.reply.failed, [(RowId(id), why)]);
            let last_error = Some(why.last_error().to_owned());
            let failed = Model { status: Status::Failed, lease: None, token, reclaims, last_error, ..row };
            assert_eq!(bed.row(id).await, failed);
            bed.run(&format!("delete from {}", bed.table())).await.unwrap();
        }
    }
    // The last numbers below their bounds are good.
    let last = Model { token: Token(one_left.0 - 1), ..reclaims(1_000_000_000) };
    let last = bed.insert(A, "{}", &Model { next_attempt_at: bed.now(), ..last }).await;
    assert_eq!(bed.take("w").await, [key(last, one_left)]);
}

/// Applications bring an SQLite of their own, and before 3.42, as on Debian 12, `unixepoch('subsec')` is null.
#[test]
fn the_defaults_on_sqlite_need_no_new_version() {
    let table = include_str!("../../migrations/sqlite/0001_create_outbox_events.sql");
    assert!(!table.contains("unixepoch"));
    on_sqlite(async |bed| {
        // Within one statement it is always the same time.
        bed.run(
            "insert into outbox_events (event_type, destination_url, payload, delivered_at)
             values ('t', 'https://a.example', '{}', cast(round(unixepoch('subsec') * 1000) as integer) * 1000)",
        )
        .await
        .unwrap();
        let row = &bed.rows().await[0].row;
        assert_eq!(Some(row.next_attempt_at), row.delivered_at);
    });
}

pub(crate) fn json_of(bytes: u64) -> String {
    format!("\"{}\"", "x".repeat(usize::try_from(bytes).unwrap() - 2))
}

async fn an_oversized_payload_is_granted_but_not_sent<B: Bed>(bed: &B) {
    let row = Model::new(20, bed.now());
    let fits = bed.insert(A, &json_of(MAX_PAYLOAD), &row).await;
    let over = bed.insert(A, &json_of(MAX_PAYLOAD + 1), &row).await;
    let claimed = bed.claim(bed.request("w")).await;
    assert_eq!(ids(&claimed), [fits, over]);
    for (grant, message) in claimed.reply.grants.iter().zip(&claimed.messages) {
        if grant.key.row.0 == fits {
            assert_eq!(grant.unsendable, None);
            assert_eq!(message.payload, json_of(MAX_PAYLOAD));
        } else {
            assert_eq!(grant.unsendable, Some(Unsendable::Oversized { bytes: MAX_PAYLOAD + 1 }));
            assert!(message.payload.is_empty());
        }
    }
}

async fn a_url_that_is_too_long_harms_no_other_event<B: Bed>(bed: &B) {
    let url = |bytes: usize| format!("{A}?{}", "x".repeat(bytes - A.len() - 1));
    let (fits, over) = (url(LONGEST_URL), url(LONGEST_URL + 1));
    // In bytes, not in characters.
    let letters = format!("{A}?{}", "é".repeat(LONGEST_URL / 2));
    for url in [&fits, &over, &letters] {
        bed.insert(url, "{}", &Model::new(20, bed.now())).await;
    }
    let claimed = bed.claim(bed.request("w")).await;
    let error = format!("destination_url is longer than {LONGEST_URL} bytes");
    let malformed = Some(Unsendable::Malformed { error });
    let found: Vec<_> = claimed.reply.grants.into_iter().map(|grant| grant.unsendable).collect();
    assert_eq!(found, [None, malformed.clone(), malformed]);
    let urls: Vec<_> = claimed.messages.iter().map(|message| message.destination_url.as_str()).collect();
    assert_eq!(urls, [fits.as_str(), "", ""]);
    assert!(claimed.messages.iter().all(|message| !message.event_id.is_empty()));
}

async fn a_claim_stops_at_eight_mebibytes<B: Bed>(bed: &B) {
    for _ in 0..10 {
        bed.insert(A, &json_of(MAX_PAYLOAD), &Model::new(20, bed.now())).await;
    }
    let claimed = bed.claim(bed.request("w")).await;
    assert_eq!(claimed.reply.grants.len(), 8);
    assert_eq!(claimed.reply.next_due_in, Some(Duration::ZERO), "there is more, and it is due");
    assert_eq!(bed.take("w").await.len(), 2);
}

async fn one_row_is_granted_however_the_bytes_stand<B: Bed>(bed: &B) {
    // Larger as stored than a claim may be in all, and not to be sent at all.
    let row = Model::new(20, bed.now());
    let huge = bed.insert(A, &json_of(9 * 1024 * 1024), &row).await;
    let small = bed.insert(A, "{}", &row).await;
    let mut taken = bed.take("w").await;
    assert!(taken.iter().any(|lease| lease.row.0 == huge));
    taken.extend(bed.take("w").await);
    assert!(taken.iter().any(|lease| lease.row.0 == small));
    assert_eq!(taken.len(), 2);
}

async fn the_payload_is_what_the_store_prints<B: Bed>(bed: &B) {
    let written = "{\"b\":1,  \"a\": \"é\\u00e9\\n\", \"a\":2.50}";
    bed.insert(A, written, &Model::new(20, bed.now())).await;
    let claimed = bed.claim(bed.request("w")).await;
    let printed = if B::POSTGRES { "{\"a\": 2.50, \"b\": 1}" } else { written };
    assert_eq!(claimed.messages[0].payload, printed);
}

async fn next_due_in_is_the_next_unleased_event<B: Bed>(bed: &B) {
    let due_in = async || bed.claim(bed.request("w")).await.reply.next_due_in;
    assert_eq!(due_in().await, None);
    let later = bed.now().after(Duration::from_millis(1_500));
    bed.insert(A, "{}", &Model::new(20, later.after(LEASE))).await;
    bed.insert(A, "{}", &Model::new(20, later)).await;
    bed.insert(A, "{}", &Model { status: Status::Failed, ..Model::new(20, bed.now().after(GRACE)) }).await;
    assert_eq!(due_in().await, Some(Duration::from_millis(1_500)));
    bed.due().await;
    let mut request = bed.request("w");
    request.limit = 1;
    assert_eq!(bed.claim(request).await.reply.next_due_in, None, "a full claim knows nothing of the rest");
    bed.set_clock(later).await;
    assert_eq!(due_in().await, Some(LEASE));
    assert_eq!(due_in().await, Some(LEASE), "a leased event is not counted");
}

async fn any_pending_says_so<B: Bed>(bed: &B) {
    let any = async |reclaims| {
        let mut request = bed.request("w");
        request.count_pending = true;
        request.probation = reclaims;
        bed.claim(request).await.reply.any_pending
    };
    assert_eq!(bed.claim(bed.request("w")).await.reply.any_pending, None);
    assert_eq!(any(1).await, Some(false));
    for status in [Status::Delivered, Status::Failed] {
        bed.insert(A, "{}", &Model { status, ..Model::new(20, bed.now()) }).await;
    }
    assert_eq!(any(1).await, Some(false));
    let later = bed.insert(A, "{}", &Model::new(20, bed.now().after(LEASE))).await;
    assert_eq!(any(1).await, Some(true), "one that is not due");
    bed.run(&format!("delete from {} where id = {later}", bed.table())).await.unwrap();
    let suspect = bed.insert(A, "{}", &Model { reclaims: 3, ..Model::new(20, bed.now()) }).await;
    assert_eq!(any(0).await, Some(true), "one on probation");
    bed.run(&format!("delete from {} where id = {suspect}", bed.table())).await.unwrap();
    bed.due().await;
    assert_eq!(any(1).await, Some(true), "one that this claim takes");
    assert_eq!(any(1).await, Some(true), "one that is leased");
    let lease = bed.owned("w").await[0];
    bed.settle("w", lease, delivered()).await;
    assert_eq!(any(1).await, Some(false));
    bed.insert(A, "{}", &Model { attempts: 1, ..Model::new(1, bed.now()) }).await;
    any(1).await;
    assert_eq!(any(1).await, Some(false), "once the claim has failed it");
}

async fn owned_lists_what_the_store_shows<B: Bed>(bed: &B) {
    assert!(bed.owned("w").await.is_empty());
    bed.due().await;
    bed.due().await;
    let mut taken = bed.take("w").await;
    taken.sort();
    bed.due().await;
    bed.take("other").await;
    bed.pass(LEASE * 10).await;
    assert_eq!(bed.owned("w").await, taken, "expired, but not taken by anybody");
    bed.settle("w", taken[0], delivered()).await;
    assert_eq!(bed.owned("w").await, taken[1..]);
}

fn event(id: Option<&str>) -> NewEvent {
    NewEvent {
        event_id: id.map(str::to_owned),
        event_type: "order.paid".into(),
        destination_url: A.into(),
        payload: "{}".into(),
        max_attempts: None,
        next_attempt_at: None,
    }
}

async fn enqueue_is_all_or_nothing<B: Bed>(bed: &B) {
    let bad = [
        NewEvent { event_type: "with space".into(), ..event(None) },
        NewEvent { payload: "{".into(), ..event(None) },
        NewEvent { max_attempts: Some(0), ..event(None) },
        event(Some("")),
        event(Some("é")),
        event(Some(&"x".repeat(256))),
    ];
    for bad in bad {
        let refused = bed.enqueue(&[event(Some("first")), bad]).await;
        assert!(matches!(refused, Err(StoreError::Refused { place: 1, .. })), "{refused:?}");
    }
    // In a batch that is not the first one.
    let mut many: Vec<NewEvent> = (0..1_200).map(|_| event(None)).collect();
    many[1_050] = event(Some("twice"));
    many[1_100] = event(Some("twice"));
    let refused = bed.enqueue(&many).await.expect_err("one is there twice");
    assert!(matches!(refused, StoreError::Refused { place: 1_100, .. }), "{refused:?}");
    assert!(refused.to_string().contains("in the outbox already"), "{refused}");
    assert!(bed.rows().await.is_empty());
    assert_eq!(bed.enqueue(&[]).await.unwrap(), Vec::<String>::new());
}

async fn enqueue_keeps_what_it_is_given<B: Bed>(bed: &B) {
    let at = bed.now().as_micros() + 123_457;
    let full = NewEvent {
        event_type: "a".repeat(255),
        destination_url: B.into(),
        payload: "[1]".into(),
        max_attempts: Some(3),
        next_attempt_at: Some(at),
        ..event(Some("mine"))
    };
    let ids = bed.enqueue(&[event(None), full, event(None)]).await.unwrap();
    assert_eq!(ids.len(), 3);
    assert_eq!(ids[1], "mine");
    for id in [&ids[0], &ids[2]] {
        let parts: Vec<usize> = id.split('-').map(str::len).collect();
        assert_eq!(parts, [8, 4, 4, 4, 12], "a UUID: {id}");
    }
    let rows = bed.rows().await;
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[0].row.max_attempts, 20);
    assert_eq!(rows[0].row, Model::new(20, rows[0].row.next_attempt_at));
    assert_eq!((&*rows[1].url, rows[1].row.max_attempts), (B, 3));
    assert_eq!(rows[1].row.next_attempt_at.as_micros(), at, "to the microsecond");
    let taken = bed.claim(bed.request("w")).await;
    let mut taken: Vec<_> = taken.messages.iter().map(|message| message.event_id.clone()).collect();
    taken.sort();
    let mut expected = vec![ids[0].clone(), ids[2].clone()];
    expected.sort();
    assert_eq!(taken, expected, "those without a time are due");
    // Many: more than one batch.
    let many: Vec<NewEvent> = (0..2_500).map(|number| event(Some(&format!("many-{number}")))).collect();
    let ids = bed.enqueue(&many).await.unwrap();
    assert!(ids.iter().enumerate().all(|(number, id)| *id == format!("many-{number}")), "in order");
}

async fn status_counts<B: Bed>(bed: &B) {
    let none = bed.status().await.unwrap();
    assert_eq!(none, leasehold::adapters::store::Status::default());
    let now = bed.now();
    bed.pass(Duration::from_millis(2_500)).await;
    let fresh = Model::new(20, now);
    let later = bed.now().after(LEASE);
    for row in [
        fresh.clone(),
        Model { attempts: 1, next_attempt_at: bed.now(), ..fresh.clone() },
        Model { attempts: 2, next_attempt_at: later, ..fresh.clone() },
        Model { lease: leased("w", later), ..fresh.clone() },
        Model { status: Status::Delivered, attempts: 1, ..fresh.clone() },
        Model { status: Status::Delivered, ..fresh.clone() },
        Model { status: Status::Failed, ..fresh.clone() },
    ] {
        bed.insert(A, "{}", &row).await;
    }
    let counts = bed.status().await.unwrap();
    let numbers =
        (counts.pending, counts.due, counts.retrying, counts.leased, counts.delivered, counts.failed);
    assert_eq!(numbers, (4, 2, 2, 1, 2, 1));
    assert_eq!(counts.oldest_due_age_seconds, Some(2.5));
}

async fn migrating_again_changes_nothing<B: Bed>(bed: &B) {
    bed.due().await;
    bed.migrate().await.unwrap();
    bed.check_schema().await.unwrap();
    assert_eq!(bed.rows().await.len(), 1);
}

async fn many_migrate_at_once<B: Bed>(bed: &B) {
    let _ = bed.check_schema_of_an_empty_database().await;
    let mut stores = Vec::new();
    for _ in 0..6 {
        stores.push(bed.again().await);
    }
    for result in B::migrate_all(stores).await {
        result.unwrap();
    }
    bed.again().await.owned(leasehold::machine::OwnedRequest { owner: WorkerId::new("w") }).await.unwrap();
}

async fn an_empty_database_is_a_schema_error<B: Bed>(bed: &B) {
    bed.check_schema().await.unwrap();
    let refused = bed.check_schema_of_an_empty_database().await;
    assert!(matches!(refused, Err(StoreError::Schema { .. })), "{refused:?}");
}

async fn migrating_a_damaged_schema_says_so<B: Bed>(bed: &B) {
    bed.run(&format!("drop table {}", bed.table())).await.unwrap();
    let error = bed.migrate().await.expect_err("the table is gone").to_string();
    assert!(error.contains("damaged") && error.contains(bed.table()), "{error}");
}

async fn constraints_hold<B: Bed>(bed: &B) {
    let id = bed.due().await;
    let table = bed.table();
    let far = if B::POSTGRES { "now()" } else { "1" };
    let mut refused: Vec<String> = [
        "event_id = ''",
        "event_id = 'a b'",
        "event_id = 'a\u{7f}'",
        "event_id = 'a\n'",
        "event_id = null",
        "event_type = ''",
        "event_type = 'é'",
        "event_type = null",
        "destination_url = null",
        "payload = null",
        "delivery_status = 'retry'",
        "delivery_status = null",
        "attempts = -1",
        "attempts = 1000000001",
        "max_attempts = 0",
        "max_attempts = 1000000001",
        "reclaims = -1",
        "reclaims = 1000000001",
        "lease_token = -1",
        "lease_token = 4611686018427387905",
        "lease_owner = 'w'",
        "next_attempt_at = null",
    ]
    .map(str::to_owned)
    .into();
    refused.push(format!("lease_until = {far}"));
    refused.push(format!("lease_owner = '', lease_until = {far}"));
    refused.push(format!("lease_owner = '{}', lease_until = {far}", "x".repeat(513)));
    refused.push(format!("lease_owner = 'w', lease_until = {far}, delivery_status = 'delivered'"));
    refused.push(format!("lease_owner = 'w', lease_until = {far}, delivery_status = 'failed'"));
    refused.push(format!("event_id = '{}'", "x".repeat(256)));
    refused.push(format!("event_type = '{}'", "x".repeat(256)));
    if B::POSTGRES {
        for end in ["infinity", "-infinity"] {
            refused.push(format!("next_attempt_at = '{end}'"));
            refused.push(format!("lease_owner = 'w', lease_until = '{end}'"));
            refused.push(format!("delivered_at = '{end}'"));
            refused.push(format!("created_at = '{end}'"));
            refused.push(format!("updated_at = '{end}'"));
        }
    } else {
        refused.push("payload = '{'".into());
        refused.push("next_attempt_at = 'tomorrow'".into());
        refused.push("lease_owner = 'w', lease_until = 1.5".into());
        refused.push("delivered_at = '2026-01-01'".into());
        refused.push("attempts = 2.5".into());
        refused.push("destination_url = x'ff'".into());
    }
    for set in refused {
        let result = bed.run(&format!("update {table} set {set} where id = {id}")).await;
        assert!(matches!(result, Err(sqlx::Error::Database(_))), "{set}: {result:?}");
    }
    for set in [
        format!("lease_owner = 'w', lease_until = {far}"),
        "lease_owner = null, lease_until = null, delivery_status = 'failed', next_attempt_at = null".into(),
        "attempts = 1000000000, max_attempts = 1, event_id = '!', event_type = '~'".into(),
    ] {
        bed.run(&format!("update {table} set {set} where id = {id}")).await.unwrap();
    }
}

async fn destination_keys<B: Bed>(bed: &B) {
    for (url, expected) in [
        ("HTTPS://User@A.Example:8443/Path?Q", "https://user@a.example:8443"),
        ("http://a.example?Q=/x", "http://a.example"),
        ("http://a.example#F", "http://a.example"),
        ("http://a.example", "http://a.example"),
        ("not a URL", "not a url"),
        ("", ""),
        ("://x", "://x"),
        ("http:///x", "http://"),
    ] {
        let id = bed.insert(url, "{}", &Model::new(20, bed.now())).await;
        let stored = bed.rows().await.into_iter().find(|stored| stored.id == id).unwrap();
        assert_eq!(stored.destination, expected, "{url}");
    }
    let id = bed.insert(&"é".repeat(5_000), "{}", &Model::new(20, bed.now())).await;
    let stored = bed.rows().await.into_iter().find(|stored| stored.id == id).unwrap();
    assert_eq!(stored.destination, "é".repeat(255));
    assert_eq!(bed.take("w").await.len(), 9, "no URL keeps an event from being claimed");
    if !B::POSTGRES {
        // A text that is no UTF-8; Postgres takes none.
        for _ in 0..2 {
            let id = bed.insert(A, "{}", &Model::new(20, bed.now())).await;
            let broken =
                format!("update outbox_events set destination_url = cast(x'30ff' as text) where id = {id}");
            bed.run(&broken).await.unwrap();
        }
        let sound = bed.insert(A, "{}", &Model::new(20, bed.now())).await;
        let claimed = bed.claim(ClaimRequest { limit: 2, share: 1, ..bed.request("w") }).await;
        let malformed = |grant: &Grant| matches!(grant.unsendable, Some(Unsendable::Malformed { .. }));
        let found: Vec<_> =
            claimed.reply.grants.iter().map(|grant| (malformed(grant), grant.key.row.0)).collect();
        assert_eq!(found, [(true, sound - 2), (false, sound)], "its share, and what is reached past it");
    }
}

async fn errors_are_cleaned<B: Bed>(bed: &B) {
    bed.due().await;
    let lease = bed.take("w").await[0];
    let settle = Settle::Failed { error: format!("a\0b\n{}", "x".repeat(5_000)), status: None, tried: true };
    assert_eq!(bed.settle("w", lease, settle).await, Answer::Applied);
    let error = bed.row(lease.row.0).await.last_error.unwrap();
    assert!(error.starts_with("a b x") && error.len() == 1_000, "{error}");
}

async fn a_constraint_is_a_permanent_fault<B: Bed>(bed: &B) {
    bed.due().await;
    let mut request = bed.request("w");
    request.owner = WorkerId::new("x".repeat(513));
    let fault = bed.store().claim(request).await.expect_err("an owner that is too long");
    assert!(matches!(fault, StoreFault::Permanent { .. }), "{fault:?}");
    // Waits until the server has rolled back.
    bed.run(&format!("update {} set attempts = attempts", bed.table())).await.unwrap();
    assert_eq!(bed.take("w").await.len(), 1, "the store works on");
}
