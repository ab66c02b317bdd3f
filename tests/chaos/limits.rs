//! What runs out: a worker's memory, the disk, the time of a worker that is cut off inside a pooler's transaction, and
//! the patience of a server whose answer nobody takes.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use sqlx::{Executor, PgConnection};
use tokio::process::Command;
use tokio::time::sleep;

use crate::ALONE;
use crate::bed::memory;
use crate::common::{MS, PATIENCE, Receiver};
use crate::ground::Ground;
use crate::postgres_binaries::server_user;
use crate::proxy::{Proxy, Upstream, Weather};
use crate::server::{Pooler, home};

async fn insert(connection: &mut PgConnection, url: &str, count: i32, bytes: i32) {
    sqlx::query(
        "insert into leasehold.outbox_events (event_type, destination_url, payload)
         select 'test.happened', $1, jsonb_build_object('text', repeat('x', $3)) from generate_series(1, $2)",
    )
    .bind(url)
    .bind(count)
    .bind(bytes)
    .execute(connection)
    .await
    .expect("an insert");
}

async fn count(connection: &mut PgConnection, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(connection).await.expect("a count")
}

async fn until(connection: &mut PgConnection, query: &'static str, wanted: impl Fn(i64) -> bool) {
    let start = Instant::now();
    loop {
        let count = count(connection, query).await;
        if wanted(count) {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "still {count} of {query}");
        sleep(5 * MS).await;
    }
}

const DELIVERED: &str = "select count(*) from leasehold.outbox_events where delivery_status = 'delivered'";

/// One worker gets no more memory and dies of it with requests open; another finishes its work.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_out_of_memory_dies_and_another_takes_over() {
    let _alone = ALONE.lock().await;
    let (mut ground, server) = Ground::new().await;
    ground.set(&[("CLAIM_BATCH", "10"), ("MAX_LEASED", "5000"), ("MAX_IN_FLIGHT_PER_DESTINATION", "5000")]);
    // Long enough for all of them to be held at once.
    let receiver = Receiver::start(|_| (Duration::from_secs(8), 200)).await;
    let mut connection = server.admin().await;
    insert(&mut connection, &receiver.url(), 20, 10).await;
    let mut victim = ground.worker("victim", &server.url());
    receiver.until_seen(10).await;
    let pid = victim.child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
    let limit = memory(&victim, "VmSize:").map(|kib| kib * 1_024);
    prlimit(pid, Resource::As, Rlimit { current: limit, maximum: limit }).expect("an own child's limit");
    // More than all that the process has mapped, whatever it makes of that.
    let mapped = limit.expect("/proc tells") / 900_000;
    let large = i32::try_from(mapped + mapped / 5).expect("not many");
    insert(&mut connection, &receiver.url(), large, 900_000).await;
    assert_eq!(victim.end().await, None, "it ends by a signal:\n{}", victim.log());
    victim.logs("memory allocation").await;
    let _heir = ground.worker("heir", &server.url());
    until(&mut connection, DELIVERED, |count| count == 20 + i64::from(large)).await;
    for (event, seen) in receiver.by_event() {
        assert!(seen.len() <= 2, "{event}: {seen:?}");
        assert!(seen.windows(2).all(|pair| pair[0].closed.is_some_and(|closed| closed <= pair[1].opened)));
    }
}

/// A worker that is cut off between a statement and its commit, half open for the pooler, must not keep rows locked.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_left_open_behind_a_pooler_ends_by_itself() {
    let _alone = ALONE.lock().await;
    let (mut ground, server) = Ground::new().await;
    ground.set(&[("PREPARED_STATEMENTS", "false")]);
    let pooler = Pooler::start(ground.folder.path(), &server).await;
    let proxy = Proxy::start(Upstream::Unix(pooler.socket())).await;
    let url = format!("postgres://postgres@{}/postgres", proxy.address);
    let receiver = Receiver::start(|_| (MS, 200)).await;
    let mut connection = server.admin().await;
    let mut victim = ground.worker("victim", &url);
    victim.logs("worker started").await;
    let start = Instant::now();
    loop {
        insert(&mut connection, &receiver.url(), 20, 10).await;
        proxy.set(Weather::Slow(25 * MS));
        sleep(Duration::from_millis(70)).await;
        proxy.set(Weather::Cut);
        sleep(20 * MS).await;
        let left: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity
             where state = 'idle in transaction' and query like '%outbox_events%' and backend_xid is not null",
        )
        .fetch_one(&mut connection)
        .await
        .expect("a count");
        if left > 0 {
            break;
        }
        proxy.set(Weather::Fair);
        assert!(start.elapsed() < PATIENCE, "no transaction was cut off in the middle");
    }
    victim.child.kill().await.expect("SIGKILL");
    let _heir = ground.worker("heir", &server.url());
    until(
        &mut connection,
        "select count(*) from leasehold.outbox_events where delivery_status = 'pending'",
        |count| count == 0,
    )
    .await;
}

/// A file system of its own, as small as this, that goes with the value; none where nothing may be mounted.
struct SmallDisk(PathBuf);

impl SmallDisk {
    async fn mount(folder: &Path) -> Option<Self> {
        let place = home(folder, "small");
        let (user, group) = server_user().unwrap_or_default();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o"]).arg(format!("size=24m,uid={user},gid={group}")).arg("none");
        mount.arg(&place).stderr(Stdio::null());
        mount.status().await.is_ok_and(|status| status.success()).then_some(Self(place))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// The disk of the table is full when the answers come: no outcome can be written, until there is room again.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_stops_work_and_loses_nothing() {
    const EVENTS: i64 = 400;
    let _alone = ALONE.lock().await;
    let (mut ground, mut server) = Ground::new().await;
    let Some(disk) = SmallDisk::mount(ground.folder.path()).await else {
        println!("nothing may be mounted on this machine: no disk is filled");
        return;
    };
    // No heartbeat while the disk is filled: what it leaves behind on each page would be room for outcomes.
    ground.set(&[("MAX_IN_FLIGHT", "1000"), ("MAX_IN_FLIGHT_PER_DESTINATION", "1000"), ("LEASE", "30s")]);
    let receiver = Receiver::start(|_| (MS, 200)).await;
    let destination = Proxy::start(Upstream::Tcp(receiver.address)).await;
    destination.set(Weather::NoAnswers);
    let url = format!("http://{}/hook", destination.address);
    let mut connection = server.admin().await;
    let place = format!("create tablespace small location '{}'", disk.0.display());
    connection.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(place))).await.expect("a tablespace");
    connection
        .execute(
            "alter table leasehold.outbox_events set (autovacuum_enabled = off);
             alter table leasehold.outbox_events set tablespace small;
             create table filler (text text) tablespace small",
        )
        .await
        .expect("a table on the small disk");
    insert(&mut connection, &url, EVENTS as i32, 10).await;
    // What a claim leaves behind on each page would be room for an outcome: somebody still sees it.
    let mut reader = server.admin().await;
    reader
        .execute("begin isolation level repeatable read; select count(*) from leasehold.outbox_events")
        .await
        .expect("a snapshot");
    let mut worker = ground.worker("worker", &server.url());
    receiver.until_seen(EVENTS as usize).await;
    // By ever smaller pieces, to the last page.
    for bytes in [1_000_000, 100_000, 7_000] {
        let fill = "insert into filler select string_agg(gen_random_uuid()::text, '') from generate_series(1, $1 / 36)";
        let error = loop {
            if let Err(error) = sqlx::query(fill).bind(bytes).execute(&mut connection).await {
                break error;
            }
        };
        let code = error.as_database_error().and_then(|error| error.code());
        assert_eq!(code.as_deref(), Some("53100"), "{error}");
    }
    destination.set(Weather::Fair);
    worker.logs("53100").await;
    // For a while, in which nothing may be given up.
    sleep(Duration::from_secs(3)).await;
    let settled = count(&mut connection, DELIVERED).await;
    assert!(settled < EVENTS, "all of it was settled on a full disk");
    connection.execute("drop table filler").await.expect("room");
    until(&mut connection, DELIVERED, |count| count == EVENTS).await;
    assert!(worker.child.try_wait().expect("an own child").is_none(), "it ended:\n{}", worker.log());
    assert_eq!(receiver.seen().len(), EVENTS as usize, "an event was sent again");
    worker.signal(Signal::TERM);
    assert_eq!(worker.end().await, Some(0), "{}", worker.log());
    ground.assert_logs_are_clean();
    drop((connection, reader));
    server.crash().await;
}

/// A worker's machine is gone while the server sends it what it claimed: the server can't end the statement, which keeps
/// the rows locked, before it is told for how long to wait.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_worker_that_is_gone_had_claimed_is_unlocked() {
    const FREE: &str = "select count(*) from (
        select from leasehold.outbox_events where delivery_status = 'pending' and lease_owner is null
        for update skip locked) as free";
    // Looking for locks would take some, and the claim what is left: less than the kernel keeps.
    const UNREAD: &str = "select count(*) from pg_stat_activity where wait_event = 'ClientWrite'";
    let _alone = ALONE.lock().await;
    let (mut ground, mut server) = Ground::new().await;
    // A socket of the file system has no such limit.
    server.address = "127.88.54.32";
    server.crash().await;
    server.start().await;
    ground.set(&[("LEASE", "30s"), ("STORE_TIMEOUT", "5s")]);
    let network = Proxy::start(Upstream::Tcp((Ipv4Addr::new(127, 88, 54, 32), 5432).into())).await;
    let mut worker = ground.worker("worker", &format!("postgres://postgres@{}/postgres", network.address));
    let receiver = Receiver::start(|_| (MS, 200)).await;
    let mut connection = server.admin().await;
    insert(&mut connection, &receiver.url(), 1, 10).await;
    until(&mut connection, DELIVERED, |count| count == 1).await;
    network.set(Weather::NoLongAnswers);
    // More than what the kernel keeps of an answer that is not read.
    insert(&mut connection, &receiver.url(), 8, 1_000_000).await;
    until(&mut connection, UNREAD, |answers| answers == 1).await;
    assert_eq!(count(&mut connection, FREE).await, 0, "the claim has locked them all");
    network.set(Weather::Cut);
    worker.child.kill().await.expect("it runs");
    until(&mut connection, FREE, |free| free == 8).await;
    drop(connection);
    server.crash().await;
}
