//! Random interleavings of two sessions' statements and an outside session on the same rows: Postgres and the simulated
//! outbox give the same answers, the same columns and hold the same locks after each step.
//!
//! The adapter's statements run as they are. Two gates, advisory locks that the test holds, stop them: one in
//! `late_now`, which a claim first asks when it has its snapshot and no lock yet, and one in a trigger that fires at the
//! commit. What changes no row has nothing to commit, and ends without coming to the second gate.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use leasehold::adapters::postgres::Postgres;
use leasehold::machine::{
    Answer, ClaimRequest, ClaimTerms, DbTime, DestinationKey, LeaseKey, OwnedRequest, Place, RenewRequest,
    RowId, Settle, SettleRequest, StoreFault, Token, WorkerId,
};
use leasehold::ports::Outbox as _;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, RngSeed, TestCaseError, TestRunner};
use sim::outbox::{Ask, Outbox, Reply};
use sim::schedule::Payload;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row as _};
use tokio::task::JoinHandle;

use crate::bed::{A, B, Bed, Pg, TIMEOUT, on_postgres, options};
use crate::differential::{GRACE, LEASE, Of, ROWS, Seen, Start, of, settle, start, worker};

#[derive(Clone, Debug)]
enum What {
    Claim {
        owner: u8,
        limit: u32,
        probation: u32,
        share: u32,
        held: Option<(bool, u32)>,
        limits: (u32, u32),
        search: bool,
        /// From the place of that row on.
        from: Option<usize>,
        /// Leases from the token of that row on.
        leases_from: Option<usize>,
        /// Whether it begins in time.
        valid: bool,
        /// Stopped between its snapshot and its locks.
        stopped: bool,
    },
    Renew {
        owner: u8,
        of: Vec<Of>,
        millis: u64,
    },
    /// As the holder.
    RenewHeld {
        row: usize,
        millis: u64,
        wait: bool,
    },
    Settle {
        owner: u8,
        of: Vec<(Of, Settle)>,
    },
    SettleHeld {
        row: usize,
        settle: Settle,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Commit,
    /// The client is gone before the reply.
    CommitUnread,
    Cancel,
    Terminate,
}

#[derive(Clone, Debug)]
enum Step {
    Begin(usize, What),
    TakeLocks(usize),
    End(usize, End),
    Lock(u32),
    Unlock { commit: bool },
    Owned(u8),
    Pass(u64),
}

/// Mostly rows that are claimed and reclaimed again and again.
fn row() -> impl Strategy<Value = Start> {
    let healthy =
        |second| Start { max_attempts: 20, attempts: 0, reclaims: 0, token: Token(0), second, delay: 0 };
    prop_oneof![2 => any::<bool>().prop_map(healthy), 1 => start()]
}

fn what() -> impl Strategy<Value = What> {
    let owner = || 0_u8..2;
    let millis = || 1_u64..4_000;
    prop_oneof![
        6 => (
            owner(),
            prop_oneof![1 => 1_u32..3, 2 => 3_u32..8],
            0_u32..2,
            2_u32..5,
            prop::option::weighted(0.2, (any::<bool>(), 0_u32..3)),
            prop_oneof![3 => Just((0, 0)), 1 => (4_u32..6, 0_u32..4)],
            prop::bool::weighted(0.9),
            prop::option::weighted(0.2, 0..ROWS),
            prop::option::weighted(0.2, 0..ROWS),
            (prop::bool::weighted(0.95), prop::bool::weighted(0.3)),
        )
            .prop_map(|(owner, limit, probation, share, held, limits, search, from, leases_from, (valid, stopped))| {
                What::Claim {
                    owner, limit, probation, share, held, limits, search, from, leases_from, valid, stopped
                }
            }),
        1 => (owner(), prop::collection::vec(of(), 1..4), millis())
            .prop_map(|(owner, of, millis)| What::Renew { owner, of, millis }),
        10 => (0..ROWS, millis(), prop::bool::weighted(0.7))
            .prop_map(|(row, millis, wait)| What::RenewHeld { row, millis, wait }),
        1 => (owner(), prop::collection::vec((of(), settle()), 1..4))
            .prop_map(|(owner, of)| What::Settle { owner, of }),
        2 => (0..ROWS, settle()).prop_map(|(row, settle)| What::SettleHeld { row, settle }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let session = || 0_usize..2;
    let end = prop_oneof![
        6 => Just(End::Commit), 2 => Just(End::CommitUnread), 6 => Just(End::Cancel), 1 => Just(End::Terminate)
    ];
    prop_oneof![
        10 => (session(), what()).prop_map(|(session, what)| Step::Begin(session, what)),
        4 => session().prop_map(Step::TakeLocks),
        5 => (session(), end).prop_map(|(session, end)| Step::End(session, end)),
        2 => (0..ROWS as u32).prop_map(Step::Lock),
        2 => any::<bool>().prop_map(|commit| Step::Unlock { commit }),
        1 => (0_u8..2).prop_map(Step::Owned),
        4 => prop_oneof![1 => 0_u64..500_000, 3 => Just(2_200_000_u64)].prop_map(Step::Pass),
    ]
}

/// Where a session's statement is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    BeforeLocks,
    Waiting,
    BeforeCommit,
}

/// What a statement met on its way.
#[derive(Clone, Copy, Default)]
struct Met {
    /// A claim took its locks after another's commit.
    overtaken: bool,
    /// A claim found a row that it had picked changed.
    changed: bool,
    /// A renewal began while its lease was held.
    held: bool,
    /// Whom it waited for, and whether that committed.
    after: Option<(&'static str, bool)>,
}

/// A session's statement under way.
struct Running {
    id: u32,
    ask: Ask,
    at: At,
    call: JoinHandle<Result<Reply, StoreFault>>,
    /// When it began, and how many commits there had been.
    began: (DbTime, u32),
    met: Met,
}

const LOCKS: i32 = 1;
const COMMIT: i32 = 2;

/// What Postgres's sessions wait for.
#[derive(Debug)]
struct Stops {
    /// At a session's gate, the process.
    gates: BTreeMap<(usize, i32), i32>,
    /// For a row.
    rows: usize,
}

/// Postgres and its sessions.
struct Real<'a> {
    bed: &'a Pg,
    stores: [Arc<Postgres>; 2],
    control: PgConnection,
    outside: PgConnection,
}

async fn exec(session: &mut PgConnection, sql: &str) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(session).await.map(drop)
}

impl<'a> Real<'a> {
    async fn new(bed: &'a Pg) -> Self {
        bed.run(
            "create or replace function leasehold.late_now() returns timestamptz language plpgsql volatile as $$
             declare session text := current_setting('test.session', true);
             begin
                 if session is not null then
                     perform pg_advisory_lock_shared(session::int, 1);
                     perform pg_advisory_unlock_shared(session::int, 1);
                 end if;
                 return (select late from leasehold.test_clock);
             end $$;
             create function leasehold.test_gate() returns trigger language plpgsql as $$
             begin
                 perform pg_advisory_xact_lock(current_setting('test.session')::int, 2);
                 return null;
             end $$;
             create constraint trigger test_gate after update on leasehold.outbox_events
                 deferrable initially deferred for each row when (current_setting('test.session', true) is not null)
                 execute function leasehold.test_gate();
             alter table leasehold.outbox_events alter column id set minvalue 0",
        )
        .await
        .expect("the gates");
        let store = |session: usize| {
            let mut url = url::Url::parse(&bed.url).expect("the bed's URL");
            url.query_pairs_mut().append_pair("options[test.session]", &session.to_string());
            Arc::new(Postgres::new(url.as_str(), options()).expect("a store"))
        };
        let session = async || PgConnection::connect(&bed.url).await.expect("a session");
        let (control, outside) = (session().await, session().await);
        Self { bed, stores: [store(0), store(1)], control, outside }
    }

    /// An empty table, nothing under way, and the gates before the commits shut.
    async fn reset(&mut self) {
        self.run("rollback; select pg_advisory_unlock_all()").await;
        let end = "select count(pg_terminate_backend(pid)) from pg_stat_activity where pid = any (
            select pid from pg_locks where not granted) and datname = current_database()";
        while sqlx::query_scalar::<_, i64>(end).fetch_one(&mut self.control).await.unwrap() > 0 {}
        exec(&mut self.outside, "rollback").await.unwrap();
        self.run(
            "delete from leasehold.outbox_events;
             alter table leasehold.outbox_events alter column id restart with 0;
             select pg_advisory_lock(0, 2), pg_advisory_lock(1, 2)",
        )
        .await;
    }

    async fn run(&mut self, sql: &str) {
        exec(&mut self.control, sql).await.expect("a statement of the test's");
    }

    async fn shut(&mut self, session: usize, gate: i32) {
        self.run(&format!("select pg_advisory_lock({session}, {gate})")).await;
    }

    async fn open(&mut self, session: usize, gate: i32) {
        self.run(&format!("select pg_advisory_unlock({session}, {gate})")).await;
    }

    async fn stops(&mut self) -> Stops {
        let sql = "select locktype, pid, classid::int, objid::int
            from pg_locks join pg_stat_activity using (pid)
            where datname = current_database() and not granted
                and locktype in ('advisory', 'transactionid', 'tuple')";
        let rows = sqlx::query(sql).fetch_all(&mut self.control).await.unwrap();
        let mut stops = Stops { gates: BTreeMap::new(), rows: 0 };
        for row in rows {
            if row.get::<&str, _>("locktype") == "advisory" {
                let session = usize::try_from(row.get::<i32, _>("classid")).unwrap();
                stops.gates.insert((session, row.get("objid")), row.get("pid"));
            } else {
                stops.rows += 1;
            }
        }
        stops
    }

    /// Cancels or ends the process and returns once its transaction is gone.
    async fn roll_back(&mut self, pid: i32, how: &str) {
        self.run(&format!("select {how}({pid})")).await;
        let holds = "select exists (select from pg_locks where pid = $1 and locktype = 'transactionid')";
        while sqlx::query_scalar(holds).bind(pid).fetch_one(&mut self.control).await.unwrap() {}
    }

    /// Rows that are free, as an outside session finds them.
    async fn free(&mut self) -> BTreeSet<i64> {
        let mut look = self.control.begin().await.unwrap();
        let sql = "select id from leasehold.outbox_events for update skip locked";
        let free: Vec<i64> = sqlx::query_scalar(sql).fetch_all(&mut *look).await.unwrap();
        look.rollback().await.unwrap();
        free.into_iter().collect()
    }
}

/// One call as the simulated outbox would answer it.
async fn call(store: &Postgres, ask: Ask) -> Result<Reply, StoreFault> {
    Ok(match ask {
        Ask::Claim(request) => Reply::Claim(store.claim(request).await?.reply),
        Ask::Renew(request) => Reply::Renew(store.renew(request).await?),
        Ask::Settle(request) => Reply::Settle(store.settle(request).await?),
        Ask::Owned(request) => Reply::Owned(store.owned(request).await?),
    })
}

/// In an order that both have.
fn sorted(mut reply: Reply) -> Reply {
    match &mut reply {
        Reply::Claim(reply) => {
            reply.grants.sort_by_key(|grant| grant.key);
            reply.failed.sort();
        }
        Reply::Renew(reply) => reply.answers.sort(),
        Reply::Settle(reply) => reply.answers.sort(),
        Reply::Owned(reply) => reply.keys.sort(),
        Reply::NotApplied | Reply::Permanent => {}
    }
    reply
}

fn answers(reply: &Reply) -> &[(LeaseKey, Answer)] {
    match reply {
        Reply::Renew(reply) => &reply.answers,
        Reply::Settle(reply) => &reply.answers,
        _ => &[],
    }
}

const EVERYTHING: [&str; 21] = [
    "a claim skipped what an open claim had locked",
    "a claim skipped what an outside session had locked",
    "a claim skipped what an open renewal or settle had locked",
    "a claim took another row in the place of one that was locked",
    "a renewal skipped a locked row",
    "a settle skipped a locked row",
    "a renewal waited for a reclaim that committed: refused",
    "a renewal waited for a reclaim that was rolled back: applied",
    "a renewal waited for an outside session: applied",
    "a renewal waited for a settle that committed: ended",
    "a renewal waited for another renewal: applied",
    "a claim took its locks after another commit, by an earlier clock: granted",
    "a claim found what it had picked changed, and left it out",
    "a claim was rolled back before its locks",
    "rows of a claim that was rolled back were granted to the other",
    "a claim committed unread",
    "a renewal committed unread",
    "a settle committed unread",
    "a settle was rolled back",
    "a look while a claim was open",
    "a claim failed an event",
];

fn kind(ask: &Ask) -> &'static str {
    match ask {
        Ask::Claim(_) => "claim",
        Ask::Renew(_) => "renewal",
        Ask::Settle(_) => "settle",
        Ask::Owned(_) => "look",
    }
}

/// One run: Postgres and the simulated outbox side by side.
struct Pair<'a, 'b> {
    real: &'a mut Real<'b>,
    sim: Outbox,
    sessions: [Option<Running>; 2],
    /// Rows that the outside session has locked.
    outside: BTreeSet<u32>,
    tokens: Vec<Vec<Token>>,
    commits: u32,
    /// Rows that a claim had which was rolled back, by owner.
    dropped: BTreeMap<u32, WorkerId>,
    seen: &'a mut Seen,
}

type Checked = Result<(), TestCaseError>;

impl Pair<'_, '_> {
    fn saw(&mut self, what: &'static str) {
        *self.seen.entry(what).or_insert(0) += 1;
    }

    fn lease_key(&self, of: &Of) -> LeaseKey {
        let tokens = &self.tokens[of.row];
        let at = tokens.len().saturating_sub(1 + of.ago);
        LeaseKey { row: RowId(of.row as i64), token: tokens[at] }
    }

    /// A lease that is held, rather of a locked row if that is wanted; else any row's last.
    fn held(&self, nth: usize, locked: bool) -> (WorkerId, LeaseKey) {
        let rows = self.sim.rows();
        let leased: Vec<usize> = (0..ROWS).filter(|row| rows[*row].lease.is_some()).collect();
        let wanted = leased.iter().copied().filter(|row| self.sim.is_locked(*row as u32) == locked);
        let wanted: Vec<usize> = wanted.collect();
        let of = [wanted, leased].into_iter().find(|of| !of.is_empty()).unwrap_or_else(|| vec![nth]);
        let row = of[nth % of.len()];
        let owner = rows[row].lease.as_ref().map_or(worker(0), |lease| lease.owner.clone());
        (owner, LeaseKey { row: RowId(row as i64), token: rows[row].token })
    }

    fn ask(&self, what: &What) -> Ask {
        let millis = Duration::from_millis;
        match what {
            What::Claim {
                owner,
                limit,
                probation,
                share,
                held,
                limits,
                search,
                from,
                leases_from,
                valid,
                ..
            } => {
                let room = |(second, room): &(bool, u32)| {
                    let key = if *second { "https://b.example" } else { "https://a.example" };
                    (DestinationKey::new(key), *room)
                };
                let place = |row: usize| {
                    let due = self.sim.rows()[row].next_attempt_at;
                    Place { due, row: RowId(row as i64) }
                };
                Ask::Claim(ClaimRequest {
                    owner: worker(*owner),
                    terms: ClaimTerms {
                        lease: LEASE,
                        grace: GRACE,
                        expired: *search,
                        reclaim_limit: limits.0,
                        retry_budget: limits.1,
                        valid_until: (!valid).then(DbTime::default),
                    },
                    limit: *limit,
                    incarnation: Some(self.real.bed.incarnation()),
                    probation: *probation,
                    share: *share,
                    shares: held.iter().map(room).collect(),
                    from: from.map(place),
                    leases_from: leases_from.map(|row| self.sim.rows()[row].token),
                    count_pending: true,
                    asleep: None,
                })
            }
            What::Renew { owner, of, millis: lease } => {
                let keys: BTreeSet<LeaseKey> = of.iter().map(|of| self.lease_key(of)).collect();
                let keys = keys.into_iter().collect();
                Ask::Renew(RenewRequest { owner: worker(*owner), lease: millis(*lease), keys, wait: false })
            }
            What::RenewHeld { row, millis: lease, wait } => {
                let (owner, key) = self.held(*row, *wait);
                Ask::Renew(RenewRequest { owner, lease: millis(*lease), keys: vec![key], wait: *wait })
            }
            What::Settle { owner, of } => {
                let entries: BTreeMap<LeaseKey, Settle> =
                    of.iter().map(|(of, settle)| (self.lease_key(of), settle.clone())).collect();
                Ask::Settle(SettleRequest { owner: worker(*owner), entries: entries.into_iter().collect() })
            }
            What::SettleHeld { row, settle } => {
                let (owner, key) = self.held(*row, false);
                Ask::Settle(SettleRequest { owner, entries: vec![(key, settle.clone())] })
            }
        }
    }

    /// The simulated statement takes its locks or begins to wait for one.
    fn lock(&mut self, session: usize) {
        let Some(mut running) = self.sessions[session].take() else { return };
        let picked = self.sim.picked_by(running.id);
        let (skipped, locked): (Vec<u32>, Vec<u32>) =
            picked.into_iter().partition(|row| self.sim.is_locked(*row));
        let other = self.sessions[1 - session].as_ref().map_or("", |other| kind(&other.ask));
        for row in skipped {
            self.saw(match (self.outside.contains(&row), other) {
                (true, _) => "a claim skipped what an outside session had locked",
                (false, "claim") => "a claim skipped what an open claim had locked",
                _ => "a claim skipped what an open renewal or settle had locked",
            });
        }
        let ready = self.sim.lock(running.id);
        running.at = if ready { At::BeforeCommit } else { At::Waiting };
        let (began, commits) = running.began;
        running.met.overtaken = commits < self.commits && began < self.real.bed.now();
        let taken = self.sim.picked_by(running.id);
        running.met.changed = locked.iter().any(|row| !taken.contains(row));
        let instead = taken.iter().any(|row| !locked.contains(row));
        self.sessions[session] = Some(running);
        if instead {
            self.saw("a claim took another row in the place of one that was locked");
        }
    }

    fn go_on(&mut self, next: Option<u32>, after: (&'static str, bool)) {
        let waits = |session: &usize| {
            let running = self.sessions[*session].as_ref();
            running.is_some_and(|running| Some(running.id) == next)
        };
        if let Some(session) = (0..2).find(waits) {
            if let Some(running) = &mut self.sessions[session] {
                running.met.after = Some(after);
            }
            self.lock(session);
        }
    }

    /// Returns once each session of Postgres is where the simulated one is. What has ended has committed: first the one
    /// that had its locks, then the one that waited for it.
    async fn come_to_rest(&mut self) -> Checked {
        let since = Instant::now();
        loop {
            let ended = |running: &Running| running.at == At::BeforeCommit && running.call.is_finished();
            if let Some(session) = (0..2).find(|session| self.sessions[*session].as_ref().is_some_and(ended))
            {
                self.commit(session, true).await?;
                continue;
            }
            let stops = self.real.stops().await;
            let there = |(session, running): (usize, &Option<Running>)| {
                running.as_ref().is_none_or(|running| match running.at {
                    At::BeforeLocks => stops.gates.contains_key(&(session, LOCKS)),
                    At::Waiting => !running.call.is_finished(),
                    At::BeforeCommit => stops.gates.contains_key(&(session, COMMIT)),
                })
            };
            let waiting = self.sessions.iter().flatten().filter(|running| running.at == At::Waiting).count();
            if stops.rows == waiting && self.sessions.iter().enumerate().all(there) {
                return Ok(());
            }
            if since.elapsed() > TIMEOUT / 2 {
                let at = self.sessions.each_ref().map(|running| running.as_ref().map(|running| running.at));
                let fail = format!("the sessions should be {at:?}; Postgres's stop at {stops:?}");
                return Err(TestCaseError::fail(fail));
            }
            tokio::task::yield_now().await;
        }
    }

    async fn begin(&mut self, session: usize, what: &What) -> Checked {
        let stopped = matches!(what, What::Claim { stopped: true, .. });
        if stopped {
            self.real.shut(session, LOCKS).await;
        }
        let ask = self.ask(what);
        let id = self.sim.begin(ask.clone());
        let (store, asked) = (Arc::clone(&self.real.stores[session]), ask.clone());
        let call = tokio::spawn(async move { call(&store, asked).await });
        let began = (self.real.bed.now(), self.commits);
        let holds = |owner: &WorkerId, key: &LeaseKey| {
            let row = &self.sim.rows()[key.row.0 as usize];
            row.token == key.token && row.lease.as_ref().is_some_and(|lease| lease.owner == *owner)
        };
        let held = matches!(&ask, Ask::Renew(renew) if renew.keys.iter().all(|key| holds(&renew.owner, key)));
        let (at, met) = (At::BeforeLocks, Met { held, ..Met::default() });
        self.sessions[session] = Some(Running { id, ask, at, call, began, met });
        if !stopped {
            self.lock(session);
        }
        self.come_to_rest().await
    }

    async fn take_locks(&mut self, session: usize) -> Checked {
        self.real.open(session, LOCKS).await;
        self.lock(session);
        self.come_to_rest().await
    }

    async fn commit(&mut self, session: usize, read: bool) -> Checked {
        let Some(running) = self.sessions[session].take() else { return Ok(()) };
        let open = matches!(&running.ask, Ask::Claim(_)).then(|| self.sim.picked_by(running.id));
        let Some((expected, next)) = self.sim.commit(running.id) else { return Ok(()) };
        let told = if running.call.is_finished() {
            running.call.await
        } else {
            if !read {
                running.call.abort();
                // Comes back when the connection is closed.
                while !running.call.is_finished() {
                    tokio::task::yield_now().await;
                }
            }
            self.real.open(session, COMMIT).await;
            let told = running.call.await;
            // Comes back when the transaction is over.
            self.real.shut(session, COMMIT).await;
            told
        };
        self.commits += 1;
        for (tokens, row) in self.tokens.iter_mut().zip(self.sim.rows()) {
            if tokens.last() != Some(&row.token) {
                tokens.push(row.token);
            }
        }
        for row in open.into_iter().flatten() {
            let Ask::Claim(request) = &running.ask else { continue };
            if self.dropped.remove(&row).is_some_and(|owner| owner != request.owner) {
                self.saw("rows of a claim that was rolled back were granted to the other");
            }
        }
        self.note(&running.ask, &expected, running.met, read);
        if read {
            let told = told.map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert_eq!(told.map(sorted), Ok(sorted(expected)), "the answer to {:?}", running.ask);
        }
        self.go_on(next, (kind(&running.ask), true));
        Ok(())
    }

    fn note(&mut self, ask: &Ask, reply: &Reply, met: Met, read: bool) {
        let asked = kind(ask);
        if !read {
            self.saw(match asked {
                "claim" => "a claim committed unread",
                "renewal" => "a renewal committed unread",
                _ => "a settle committed unread",
            });
        }
        if let Reply::Claim(reply) = reply {
            if met.overtaken && !reply.grants.is_empty() {
                self.saw("a claim took its locks after another commit, by an earlier clock: granted");
            }
            if met.changed {
                self.saw("a claim found what it had picked changed, and left it out");
            }
            if !reply.failed.is_empty() {
                self.saw("a claim failed an event");
            }
        }
        for (_, answer) in answers(reply) {
            match (asked, answer, met.after) {
                ("renewal", Answer::Skipped, _) => self.saw("a renewal skipped a locked row"),
                ("settle", Answer::Skipped, _) => self.saw("a settle skipped a locked row"),
                (_, Answer::Refused, Some(("claim", true))) if met.held => {
                    self.saw("a renewal waited for a reclaim that committed: refused");
                }
                (_, Answer::Applied, Some(("claim", false))) => {
                    self.saw("a renewal waited for a reclaim that was rolled back: applied");
                }
                (_, Answer::Applied, Some(("outside", _))) => {
                    self.saw("a renewal waited for an outside session: applied");
                }
                (_, Answer::Ended, Some(("settle", true))) => {
                    self.saw("a renewal waited for a settle that committed: ended");
                }
                (_, Answer::Applied, Some(("renewal", true))) => {
                    self.saw("a renewal waited for another renewal: applied");
                }
                _ => {}
            }
        }
    }

    async fn roll_back(&mut self, session: usize, end: End) -> Checked {
        let Some(running) = self.sessions[session].take() else { return Ok(()) };
        let before_locks = running.at == At::BeforeLocks;
        let gate = if before_locks { LOCKS } else { COMMIT };
        let stops = self.real.stops().await;
        let Some(pid) = stops.gates.get(&(session, gate)) else {
            return Err(TestCaseError::fail(format!("session {session} isn't at gate {gate}: {stops:?}")));
        };
        let how = if end == End::Cancel { "pg_cancel_backend" } else { "pg_terminate_backend" };
        self.real.roll_back(*pid, how).await;
        if before_locks {
            self.real.open(session, LOCKS).await;
        }
        let told = running.call.await.map_err(|error| TestCaseError::fail(error.to_string()))?;
        match (end, &told) {
            (End::Cancel, Err(StoreFault::NotApplied { .. })) => {}
            (End::Terminate, Err(StoreFault::Unknown { .. })) => {}
            _ => return Err(TestCaseError::fail(format!("{end:?} was answered {told:?}"))),
        }
        match &running.ask {
            Ask::Claim(_) if before_locks => self.saw("a claim was rolled back before its locks"),
            Ask::Claim(request) => {
                let rows = self.sim.picked_by(running.id).into_iter();
                self.dropped.extend(rows.map(|row| (row, request.owner.clone())));
            }
            Ask::Settle(_) => self.saw("a settle was rolled back"),
            Ask::Renew(_) | Ask::Owned(_) => {}
        }
        let next = self.sim.roll_back(running.id);
        self.go_on(next, (kind(&running.ask), false));
        Ok(())
    }

    async fn end(&mut self, session: usize, end: End) -> Checked {
        match end {
            End::Commit => self.commit(session, true).await?,
            End::CommitUnread => self.commit(session, false).await?,
            End::Cancel | End::Terminate => self.roll_back(session, end).await?,
        }
        self.come_to_rest().await
    }

    async fn unlock(&mut self, commit: bool) -> Checked {
        exec(&mut self.real.outside, if commit { "commit" } else { "rollback" }).await.unwrap();
        for row in std::mem::take(&mut self.outside) {
            let next = self.sim.unlock_outside(row);
            self.go_on(next, ("outside", commit));
        }
        self.come_to_rest().await
    }

    fn possible(&self, step: &Step) -> bool {
        let at = |session: &usize| self.sessions[*session].as_ref().map(|running| running.at);
        match step {
            Step::Begin(session, _) => at(session).is_none(),
            Step::TakeLocks(session) => at(session) == Some(At::BeforeLocks),
            Step::End(session, End::Commit | End::CommitUnread) => at(session) == Some(At::BeforeCommit),
            Step::End(session, End::Cancel | End::Terminate) => {
                matches!(at(session), Some(At::BeforeCommit | At::BeforeLocks))
            }
            Step::Lock(row) => !self.sim.is_locked(*row),
            Step::Unlock { .. } => !self.outside.is_empty(),
            Step::Owned(_) | Step::Pass(_) => true,
        }
    }

    async fn play(&mut self, step: &Step) -> Checked {
        if !self.possible(step) {
            return Ok(());
        }
        match step {
            Step::Begin(session, what) => self.begin(*session, what).await?,
            Step::TakeLocks(session) => self.take_locks(*session).await?,
            Step::End(session, end) => self.end(*session, *end).await?,
            Step::Lock(row) => {
                let begin = if self.outside.is_empty() { "begin;" } else { "" };
                let lock =
                    format!("{begin} select from leasehold.outbox_events where id = {row} for update nowait");
                let locked = exec(&mut self.real.outside, &lock).await;
                locked.map_err(|error| TestCaseError::fail(error.to_string()))?;
                self.sim.lock_outside(*row);
                self.outside.insert(*row);
            }
            Step::Unlock { commit } => self.unlock(*commit).await?,
            Step::Owned(owner) => {
                let ask = Ask::Owned(OwnedRequest { owner: worker(*owner) });
                let look = self.sim.begin(ask.clone());
                self.sim.lock(look);
                let expected = self.sim.commit(look).map(|(reply, _)| sorted(reply));
                let told = call(self.real.bed.store(), ask).await;
                prop_assert_eq!(told.ok().map(sorted), expected);
                let open =
                    |running: &Running| running.at == At::BeforeCommit && kind(&running.ask) == "claim";
                if self.sessions.iter().flatten().any(open) {
                    self.saw("a look while a claim was open");
                }
            }
            Step::Pass(micros) => {
                let time = Duration::from_micros(*micros);
                self.real.bed.pass(time).await;
                self.sim.pass(time);
            }
        }
        let rows = self.real.bed.rows().await;
        let rows: Vec<_> = rows.into_iter().map(|stored| stored.row).collect();
        prop_assert_eq!(&rows[..], self.sim.rows(), "the rows");
        let free: BTreeSet<i64> =
            (0..ROWS as u32).filter(|row| !self.sim.is_locked(*row)).map(i64::from).collect();
        prop_assert_eq!(self.real.free().await, free, "the rows that nobody has locked");
        Ok(())
    }

    /// Lets everything go.
    async fn finish(&mut self) -> Checked {
        self.unlock(false).await?;
        while self.sessions.iter().any(Option::is_some) {
            for session in 0..2 {
                self.play(&Step::TakeLocks(session)).await?;
                self.play(&Step::End(session, End::Commit)).await?;
            }
        }
        Ok(())
    }
}

async fn play(real: &mut Real<'_>, starts: &[Start], steps: &[Step], seen: &mut Seen) -> Checked {
    real.reset().await;
    let bed = real.bed;
    let keys = ["https://a.example", "https://b.example"].map(DestinationKey::new);
    let mut sim = Outbox::new(bed.now(), keys.to_vec(), bed.incarnation());
    for start in starts {
        let row = start.row(bed.now());
        bed.insert(if start.second { B } else { A }, "{}", &row).await;
        sim.insert(row, u16::from(start.second), Payload::Small);
    }
    let tokens = starts.iter().map(|start| vec![start.token]).collect();
    let (sessions, outside, dropped) = ([None, None], BTreeSet::new(), BTreeMap::new());
    let mut pair = Pair { real, sim, sessions, outside, tokens, commits: 0, dropped, seen };
    for (number, step) in steps.iter().enumerate() {
        let at = |error| match error {
            TestCaseError::Fail(why) => TestCaseError::fail(format!("step {number}, {step:?}: {why}")),
            error => error,
        };
        pair.play(step).await.map_err(at)?;
    }
    pair.finish().await
}

const CASES: u32 = 180;
const STEPS: usize = 100;

/// Plays fixed random interleavings; a failing one is shrunk.
#[test]
fn interleaved_sessions_of_postgres_do_what_the_simulated_outbox_does() {
    on_postgres(async |bed: &Pg| {
        let config = Config {
            cases: CASES,
            failure_persistence: None,
            rng_algorithm: RngAlgorithm::ChaCha,
            rng_seed: RngSeed::Fixed(1),
            max_shrink_iters: 200,
            max_shrink_time: 60_000,
            ..Config::default()
        };
        let strategy = (prop::collection::vec(row(), ROWS), prop::collection::vec(step(), 1..=STEPS));
        let both = std::cell::RefCell::new((Real::new(bed).await, Seen::new()));
        let result = TestRunner::new(config).run(&strategy, |(starts, steps)| {
            let (real, seen) = &mut *both.borrow_mut();
            let run = play(real, &starts, &steps, seen);
            tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(run))
        });
        if let Err(error) = result {
            panic!("Postgres and the simulated outbox disagree: {error}");
        }
        let seen = both.into_inner().1;
        let missing: Vec<_> = EVERYTHING.iter().filter(|what| !seen.contains_key(**what)).collect();
        println!("{seen:?}");
        assert!(missing.is_empty(), "never seen: {missing:?}; seen: {seen:?}");
    });
}
