//! The SQL that the README gives to producers and operators, under roles that have the rights that it names.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use tokio::process::Command;

use crate::bed::{Bed, MS, Receiver, text};
use crate::common::start_worker;

/// The block of the README that begins with this.
fn block(begins: &str) -> &'static str {
    let blocks = include_str!("../../README.md").split("\n\n").map(str::trim);
    let found: Vec<&str> = blocks.filter(|block| block.starts_with(begins)).collect();
    let [block] = found[..] else { panic!("{} blocks of the README begin with {begins}", found.len()) };
    block
}

async fn execute(bed: &Bed, sql: String) {
    let done = sqlx::raw_sql(sqlx::AssertSqlSafe(sql.clone())).execute(&bed.pool).await;
    done.unwrap_or_else(|error| panic!("{error}: {sql}"));
}

/// A command as this role.
fn command_as(bed: &Bed, role: &str, arguments: &[&str]) -> Command {
    let mut url = url::Url::parse(&bed.url).expect("a URL");
    url.query_pairs_mut().append_pair("options", &format!("-c role={role}"));
    let mut command = bed.command(arguments);
    command.env("DATABASE_URL", url.as_str());
    command
}

async fn run_as(bed: &Bed, role: &str, arguments: &[&str]) {
    let output = command_as(bed, role, arguments).output().await.expect("it ran");
    assert!(output.status.success(), "{arguments:?} as {role}: {}", text(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rights_of_the_readme_are_enough_and_its_update_sends_failed_events_again() {
    let bed = Bed::new().await.set(&[("FAIL_STATUSES", "410")]);
    let status = Arc::new(AtomicU16::new(410));
    let answers = Arc::clone(&status);
    let receiver = Receiver::start(move |_| (MS, answers.load(Ordering::Relaxed))).await;
    let url = receiver.url();

    // Roles are the whole server's.
    let name = url::Url::parse(&bed.url).expect("a URL").path().trim_start_matches('/').to_owned();
    let roles = ["producer", "worker", "enqueuer", "reader"].map(|role| format!("{role}_of_{name}"));
    let [producer, worker, enqueuer, reader] = &roles;
    execute(&bed, roles.iter().map(|role| format!("create role {role};")).collect()).await;
    execute(&bed, block("GRANT USAGE").replace("producer", producer).replace("worker", worker)).await;
    // What the README has in words.
    let words = format!(
        "grant {producer} to {enqueuer};
         grant select (event_id, payload_bytes) on leasehold.outbox_events to {enqueuer};
         grant usage on schema leasehold to {reader};
         grant select on leasehold.outbox_events to {reader};
         grant select on leasehold.migrations to {enqueuer}, {reader}"
    );
    execute(&bed, words).await;

    let insert = block("INSERT INTO").replace("https://shop.example/hooks", &url);
    execute(&bed, format!("set role {producer}; {insert} reset role")).await;
    let enqueue = ["enqueue", "--event-type", "order.paid", "--destination-url", &url, "--payload", "{}"];
    run_as(&bed, enqueuer, &enqueue).await;
    run_as(&bed, reader, &["status"]).await;
    run_as(&bed, worker, &["check"]).await;
    run_as(&bed, worker, &["run", "--until-empty"]).await;
    let asleep = start_worker(command_as(&bed, worker, &["run"]), bed.folder.path(), "asleep");
    bed.until("exists (select from leasehold.sleepers)", 2).await;
    execute(&bed, format!("set role {producer}; {insert} reset role")).await;
    bed.until("delivery_status = 'failed' and last_status = 410", 3).await;
    drop(asleep);

    status.store(200, Ordering::Relaxed);
    let again = block("UPDATE").replace("https://shop.example", &format!("http://{}", receiver.address));
    execute(&bed, again).await;
    execute(&bed, block("ALTER TABLE").to_owned()).await;
    execute(&bed, format!("set role {producer}; {insert} reset role")).await;
    run_as(&bed, worker, &["run", "--until-empty"]).await;
    assert_eq!(bed.count("delivery_status = 'delivered' and attempts = 1").await, 4);
    let events = receiver.by_event();
    let mut requests: Vec<usize> = events.values().map(Vec::len).collect();
    requests.sort_unstable();
    assert_eq!(requests, [1, 2, 2, 2], "those that failed were sent again under their ids");
    execute(&bed, format!("drop owned by {0}; drop role {0}", roles.join(", "))).await;
}
