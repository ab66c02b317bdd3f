//! A story: workers, a database, receivers and a producer, under a seeded plan of faults.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sqlx::Connection;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::common::receiver::HANG_UP;
use crate::common::{MS, PATIENCE, Receiver, Seen, Worker};
use crate::faults::{Disturbance, Fault, Rng};
use crate::ground::Ground;
use crate::judge::{Memory, Verdict};
use crate::proxy::{Proxy, Upstream};
use crate::server::{Pooler, Server};

pub(crate) const LEASE: Duration = Duration::from_secs(3);
pub(crate) const GRACE: Duration = Duration::from_millis(300);
pub(crate) const FENCE_MARGIN: Duration = Duration::from_millis(300);
pub(crate) const STORE_TIMEOUT: Duration = Duration::from_millis(500);
pub(crate) const POLL: Duration = Duration::from_millis(250);
const RECEIVERS: usize = 4;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Database {
    Single,
    Pooled,
    /// A streaming pair; with synchronous replication or without.
    Pair {
        synchronous: bool,
    },
}

pub(crate) struct Story {
    pub(crate) seed: u64,
    pub(crate) database: Database,
    pub(crate) workers: usize,
    /// How many events are written in this time, evenly, and in the same measure until all faults are done.
    pub(crate) events: u32,
    pub(crate) span: Duration,
    /// Each is done as often as it is listed here, however long that takes, and all over again while the time lasts.
    pub(crate) faults: Vec<Fault>,
}

/// A worker's place: its way to the database, and the process that is in it now.
pub(crate) struct Slot {
    number: usize,
    generation: u32,
    pub(crate) databases: Vec<Proxy>,
    pub(crate) worker: Worker,
}

impl Slot {
    pub(crate) fn name(&self) -> String {
        name(self.number, self.generation)
    }
}

fn name(number: usize, generation: u32) -> String {
    format!("w{number}.{generation}")
}

pub(crate) struct Bed {
    ground: Ground,
    pub(crate) server: Server,
    pub(crate) standby: Option<Server>,
    pub(crate) replication: Option<Proxy>,
    pub(crate) pooler: Option<Pooler>,
    pub(crate) receivers: Vec<Receiver>,
    pub(crate) destinations: Vec<Proxy>,
    /// The first is never killed nor restarted: the heir, and the one whose memory is watched.
    pub(crate) slots: Vec<Slot>,
    pub(crate) rng: Rng,
    disturbances: Vec<Disturbance>,
}

pub(crate) fn micros_now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_micros() as i64
}

/// A number of an event's own.
fn draw(event: &str) -> u64 {
    event
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
        >> 16
}

/// Quick; mostly quick and now and then slower than the lease; flaky in all ways; middling.
fn manner(receiver: usize, seen: &Seen) -> (Duration, u16) {
    let draw = draw(&seen.event);
    let time = |least: u64, most: u64| Duration::from_millis(least + draw % (most - least));
    match receiver {
        0 => (time(1, 20), 200),
        1 if draw.is_multiple_of(20) => (LEASE + time(500, 4_500), 200),
        2 if u64::from(seen.attempt) <= draw % 3 => {
            (time(1, 100), [500, 503, 302, HANG_UP][draw as usize / 3 % 4])
        }
        _ => (time(50, 300), 204),
    }
}

impl Bed {
    pub(crate) async fn new(story: &Story) -> Self {
        let (mut ground, server) = Ground::new().await;
        let prepared = if story.database == Database::Pooled { "false" } else { "true" };
        ground.set(&[
            ("CLAIM_BATCH", "100"),
            ("CONNECT_TIMEOUT", "2s"),
            ("REQUEST_TIMEOUT", "8s"),
            ("PREPARED_STATEMENTS", prepared),
        ]);
        server.run(include_str!("history.sql")).await;
        let mut bed = Self {
            ground,
            server,
            standby: None,
            replication: None,
            pooler: None,
            receivers: Vec::new(),
            destinations: Vec::new(),
            slots: Vec::new(),
            rng: Rng::new(story.seed),
            disturbances: Vec::new(),
        };
        match story.database {
            Database::Single => {}
            Database::Pooled => bed.pooler = Some(Pooler::start(bed.ground.folder.path(), &bed.server).await),
            Database::Pair { synchronous } => bed.pair(synchronous).await,
        }
        for number in 0..RECEIVERS {
            let receiver = Receiver::start(move |seen| manner(number, seen)).await;
            bed.destinations.push(Proxy::start(Upstream::Tcp(receiver.address)).await);
            bed.receivers.push(receiver);
        }
        for number in 0..story.workers {
            bed.add_slot(number).await;
        }
        bed
    }

    async fn pair(&mut self, synchronous: bool) {
        let replication = Proxy::start(Upstream::Unix(self.server.socket())).await;
        let standby = Server::start_standby(self.ground.folder.path(), "second", replication.address).await;
        if synchronous {
            self.server.set("alter system set synchronous_standby_names = '*'").await;
            standby.until_synchronous(&self.server).await;
        }
        (self.replication, self.standby) = (Some(replication), Some(standby));
    }

    async fn add_slot(&mut self, number: usize) {
        // The standby comes first, so that who takes the first host is wrong.
        let sockets = match (&self.pooler, &self.standby) {
            (Some(pooler), _) => vec![pooler.socket()],
            (None, Some(standby)) => vec![standby.socket(), self.server.socket()],
            (None, None) => vec![self.server.socket()],
        };
        let mut databases = Vec::new();
        for socket in sockets {
            databases.push(Proxy::start(Upstream::Unix(socket)).await);
        }
        let worker = self.start(number, 0, &databases);
        self.slots.push(Slot { number, generation: 0, databases, worker });
    }

    fn start(&self, number: usize, generation: u32, databases: &[Proxy]) -> Worker {
        let mut hosts: Vec<String> = databases.iter().map(|proxy| proxy.address.to_string()).collect();
        let mut query = "";
        if hosts.len() > 1 {
            hosts.insert(1, "nowhere.invalid:5432".to_owned());
            query = "?target_session_attrs=read-write";
        }
        let url = format!("postgres://postgres@{}/postgres{query}", hosts.join(","));
        self.ground.worker(&name(number, generation), &url)
    }

    /// A new process in a slot whose process has ended.
    pub(crate) fn replace(&mut self, slot: usize) {
        let Slot { number, generation, .. } = self.slots[slot];
        let worker = self.start(number, generation + 1, &self.slots[slot].databases);
        self.slots[slot].worker = worker;
        self.slots[slot].generation += 1;
    }

    pub(crate) fn disturbed(&mut self, disturbance: Disturbance) {
        self.disturbances.push(disturbance);
    }

    /// Writes events, now that no fault is left, until every worker has taken some. Returns how many there are then.
    async fn until_all_work(&self, mut events: u32, urls: &[String]) -> u32 {
        let mut connection = self.server.admin().await;
        let (start, since) = (Instant::now(), micros_now());
        loop {
            insert(&mut connection, urls, events, events + 20, 0.0).await.expect("an insert");
            events += 20;
            let owners: Vec<String> = sqlx::query_scalar(
                "select distinct owner from chaos.history
                 where owner is not null and at > to_timestamp($1::float8 / 1000000)",
            )
            .bind(since as f64)
            .fetch_all(&mut connection)
            .await
            .expect("the history");
            let idle = |slot: &&Slot| {
                let name = format!("{}-", slot.name());
                !owners.iter().any(|owner| owner.starts_with(&name))
            };
            let Some(idle) = self.slots.iter().find(idle) else { return events };
            let log = idle.worker.log();
            assert!(start.elapsed() < PATIENCE, "{} takes nothing any more:\n{log}", idle.name());
            sleep(50 * MS).await;
        }
    }

    fn nobody_ended(&mut self) {
        for slot in &mut self.slots {
            let ended = slot.worker.child.try_wait().expect("an own child");
            assert!(ended.is_none(), "{} ended by itself: {ended:?}\n{}", slot.name(), slot.worker.log());
        }
    }
}

/// Writes the events of these numbers, due so many seconds apart, unless they are there.
async fn insert(
    connection: &mut sqlx::PgConnection,
    urls: &[String],
    from: u32,
    until: u32,
    apart: f64,
) -> Result<(), sqlx::Error> {
    let insert = sqlx::query(
        "insert into leasehold.outbox_events
             (event_id, event_type, destination_url, payload, max_attempts, next_attempt_at)
         select 'e' || n, 'test.happened', ($1::text[])[1 + n % cardinality($1)],
             jsonb_build_object('number', n), 10000, now() + n * $4 * interval '1 second'
         from generate_series($2::int, $3::int - 1) n
         on conflict (event_id) do nothing",
    );
    insert.bind(urls).bind(from as i32).bind(until as i32).bind(apart).execute(connection).await.map(drop)
}

/// Writes so many events a second, as an application does: again until each batch is confirmed. Returns how many.
async fn produce(mut server: watch::Receiver<String>, urls: Vec<String>, rate: f64) -> u32 {
    let start = Instant::now();
    let (mut connection, mut written, mut confirmed) = (None, 0, true);
    // Until the other side is dropped.
    while server.has_changed().is_ok() || !confirmed {
        let due = (rate * start.elapsed().as_secs_f64()) as u32;
        let until = due.min(written + 2_000);
        if until == written {
            sleep(20 * MS).await;
            continue;
        }
        let url = server.borrow_and_update().clone();
        if connection.is_none() {
            connection = sqlx::PgConnection::connect(&url).await.ok();
        }
        let Some(open) = connection.as_mut() else {
            sleep(20 * MS).await;
            continue;
        };
        let insert = tokio::time::timeout(Duration::from_secs(10), insert(open, &urls, written, until, 0.0));
        confirmed = matches!(insert.await, Ok(Ok(())));
        if confirmed {
            written = until;
        } else {
            connection = None;
        }
    }
    written
}

/// How long this process was held up, moment by moment: a machine that starves the judge starves the workers.
#[derive(Clone, Default)]
pub(crate) struct Stalls(Arc<Mutex<Vec<(i64, i64)>>>);

impl Stalls {
    fn watch() -> Self {
        let stalls = Self::default();
        let seen = stalls.clone();
        std::thread::spawn(move || {
            let mut last = micros_now();
            while Arc::strong_count(&seen.0) > 1 {
                std::thread::sleep(10 * MS);
                let now = micros_now();
                if now - last > 50_000 {
                    seen.0.lock().expect("no panic").push((now, now - last - 10_000));
                }
                last = now;
            }
        });
        stalls
    }

    /// Microseconds lost between two moments.
    pub(crate) fn between(&self, begin: i64, end: i64) -> i64 {
        let stalls = self.0.lock().expect("no panic");
        let until = end.saturating_add(1_000_000);
        stalls.iter().filter(|(at, _)| (begin..=until).contains(at)).map(|(_, lost)| lost).sum()
    }

    /// The most microseconds lost at once between two moments.
    pub(crate) fn longest(&self, begin: i64, end: i64) -> i64 {
        let stalls = self.0.lock().expect("no panic");
        let until = end.saturating_add(1_000_000);
        let within = stalls.iter().filter(|(at, _)| (begin..=until).contains(at));
        within.map(|(_, lost)| *lost).max().unwrap_or(0)
    }
}

/// A field of a process's memory in KiB: `VmRSS:` what is resident, `VmSize:` its address space.
pub(crate) fn memory(worker: &Worker, field: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", worker.child.id()?)).ok()?;
    let line = status.lines().find(|line| line.starts_with(field))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Plays a story to its end and judges it.
pub(crate) async fn play(story: Story) -> Verdict {
    let (anchor, stalls) = ((Instant::now(), micros_now()), Stalls::watch());
    let mut bed = Bed::new(&story).await;
    let urls: Vec<String> =
        bed.destinations.iter().map(|proxy| format!("http://{}/hook", proxy.address)).collect();
    let (primary, following) = watch::channel(bed.server.url());
    let pair = matches!(story.database, Database::Pair { .. });
    let span = story.span.as_secs_f64();
    let rate = if pair { 0.0 } else { f64::from(story.events) / span };
    let producer = tokio::spawn(produce(following, urls.clone(), rate));
    if pair {
        // What is lost of an asynchronous pair must not be events: they are there before, and due one after the other.
        let apart = span / f64::from(story.events);
        let mut connection = bed.server.admin().await;
        insert(&mut connection, &urls, 0, story.events, apart).await.expect("an insert");
        bed.standby.as_ref().expect("a pair").until_it_has(story.events).await;
        // The workers have found the primary behind a standby and a name without an address.
        bed.receivers[0].until_seen(20).await;
    }
    let start = Instant::now();
    let mut samples = Memory::default();
    let (mut plan, mut all_done) = (story.faults.clone(), false);
    // There is one standby to be promoted.
    while !all_done || (start.elapsed() < story.span && !pair) {
        if plan.is_empty() {
            plan = story.faults.clone();
        }
        let pause = bed.rng.between(200, 1_200);
        sleep(pause).await;
        let next = bed.rng.below(plan.len() as u64) as usize;
        bed.inflict(plan.swap_remove(next)).await;
        primary.send_replace(bed.server.url());
        bed.nobody_ended();
        samples.0.extend(memory(&bed.slots[0].worker, "VmRSS:"));
        all_done |= plan.is_empty();
    }
    let produced = micros_now();
    drop(primary);
    let written = tokio::time::timeout(PATIENCE, producer).await.expect("all is written").expect("no panic");
    let written = if pair { story.events } else { written };
    let events = bed.until_all_work(written, &urls).await;
    until_done(&bed).await;
    bed.nobody_ended();
    for slot in &bed.slots {
        slot.worker.signal(rustix::process::Signal::TERM);
    }
    for slot in &mut bed.slots {
        assert_eq!(slot.worker.end().await, Some(0), "{} drains:\n{}", slot.name(), slot.worker.log());
    }
    bed.ground.assert_logs_are_clean();
    let requests = bed.receivers.iter().enumerate();
    let requests =
        requests.flat_map(|(number, receiver)| receiver.seen().into_iter().map(move |seen| (number, seen)));
    let requests = requests.collect();
    let lossy = story.database == Database::Pair { synchronous: false };
    let disturbances = std::mem::take(&mut bed.disturbances);
    let mut connection = bed.server.admin().await;
    let verdict = crate::judge::judge(crate::judge::Evidence {
        events,
        requests,
        disturbances,
        lossy,
        anchor,
        produced,
        stalls,
        memory: samples,
        connection: &mut connection,
    })
    .await;
    bed.server.crash().await;
    verdict
}

/// Waits until every event is terminal, as long as it goes on.
async fn until_done(bed: &Bed) {
    let mut connection = bed.server.admin().await;
    let (mut least, mut since) = (i64::MAX, Instant::now());
    while least > 0 {
        let pending: i64 = sqlx::query_scalar(
            "select count(*) from leasehold.outbox_events where delivery_status = 'pending'",
        )
        .fetch_one(&mut connection)
        .await
        .expect("a count");
        if pending < least {
            (least, since) = (pending, Instant::now());
        }
        assert!(since.elapsed() < PATIENCE, "{pending} events are still pending");
        sleep(50 * MS).await;
    }
}
