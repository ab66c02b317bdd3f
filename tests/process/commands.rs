//! Commands and what bad input gets.

use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt as _, BufReader};

use crate::bed::{Bed, MS, Receiver, SECRET, text, write};
use crate::common::{PATIENCE, start_worker};

#[tokio::test(flavor = "multi_thread")]
async fn settings_errors_name_key_value_and_what_is_allowed_all_at_once() {
    let bed = Bed::unmigrated().await.set(&[
        ("LEASE", "500ms"),
        ("RETRY_JITTER_BPS", "10001"),
        ("MAX_IN_FLIGHT", "none"),
        ("LAESE", "30s"),
        ("SIGNING_SECRETS", "whsec_not-base64!"),
    ]);
    write(bed.folder.path(), "leasehold.toml", "claim_batch = 0\ncliam_batch = 3\n");
    let output = bed.leasehold(&["run"], None).await;
    assert_eq!(output.status.code(), Some(2));
    let text = text(&output);
    for [key, value, allowed] in [
        ["lease", "500ms", "1s"],
        ["retry_jitter_bps", "10001", "0 to 10000"],
        ["max_in_flight", "none", "whole number"],
        ["claim_batch", "0", "1"],
    ] {
        let lower = text.to_lowercase();
        let line =
            lower.lines().find(|line| line.contains(key) && line.contains(value) && line.contains(allowed));
        assert!(line.is_some(), "no line with {key}, {value}, {allowed} in:\n{text}");
    }
    for unknown in ["LAESE", "cliam_batch"] {
        assert!(text.to_lowercase().contains(&unknown.to_lowercase()), "{unknown} is not named in:\n{text}");
    }
    assert!(!text.contains("not-base64"), "a secret's value is shown:\n{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_timing_rule_is_named_with_its_values() {
    let bed =
        Bed::unmigrated().await.set(&[("LEASE", "3s"), ("HEARTBEAT", "2s"), ("STORE_TIMEOUT", "500ms")]);
    let output = bed.leasehold(&["run"], None).await;
    assert_eq!(output.status.code(), Some(2));
    let text = text(&output);
    for part in ["heartbeat + 2 * store_timeout + fence_margin", "2s", "500ms", "300ms", "3.3s"] {
        assert!(text.contains(part), "{part} is missing in:\n{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn run_without_secrets_or_database_says_what_to_set() {
    let mut bed = Bed::unmigrated().await;
    bed.unset("SIGNING_SECRETS");
    let output = bed.leasehold(&["run"], None).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output).to_lowercase().contains("signing_secrets"), "{}", text(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_was_not_migrated_is_an_error_that_says_so() {
    let bed = Bed::unmigrated().await;
    let output = bed.leasehold(&["status"], None).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("leasehold migrate"), "{}", text(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn enqueue_takes_ndjson_and_prints_ids_and_status_counts_them() {
    let bed = Bed::new().await;
    let input = r#"{"event_id":"a-1","event_type":"t","destination_url":"https://example.com/x","payload":{"a":1}}
{"event_type":"t","destination_url":"https://example.com/x","payload":[2],"max_attempts":3,"next_attempt_at":"2999-01-01T00:00:00Z"}
"#;
    let output = bed.leasehold(&["enqueue"], Some(input)).await;
    assert!(output.status.success(), "{}", text(&output));
    let ids = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(ids.lines().count(), 2);
    assert_eq!(ids.lines().next(), Some("a-1"));
    let output = bed.leasehold(&["status", "--json"], None).await;
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    for (name, count) in
        [("pending", 2), ("due", 1), ("retrying", 0), ("leased", 0), ("delivered", 0), ("failed", 0)]
    {
        assert_eq!(status[name], count, "{name} in {status}");
    }
    assert!(status["oldest_due_age_seconds"].is_number());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_line_keeps_nothing_of_the_input() {
    let bed = Bed::new().await;
    let good = r#"{"event_type":"t","destination_url":"https://example.com/x","payload":{}}"#;
    for (bad, named) in [
        (r#"{"event_type":"t","destination_url":"https://example.com/x","payload":{},"colour":1}"#, "colour"),
        (r#"{"event_type":"t","destination_url":"ftp://example.com/x","payload":{}}"#, "ftp"),
        (r#"{"event_type":"t","payload":{}}"#, "destination_url"),
        ("{", "2"),
    ] {
        let output = bed.leasehold(&["enqueue"], Some(&format!("{good}\n{bad}\n{good}\n"))).await;
        assert_eq!(output.status.code(), Some(1), "{bad}");
        let text = text(&output);
        assert!(text.contains("line 2") && text.contains(named), "{bad} gave:\n{text}");
        assert_eq!(bed.count("true").await, 0, "{bad}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_database_refuses_is_named_by_its_line() {
    let bed = Bed::new().await;
    let line = |id: &str| {
        format!(
            r#"{{"event_id":"{id}","event_type":"t","destination_url":"https://example.com/x","payload":{{}}}}"#
        )
    };
    let output = bed.leasehold(&["enqueue"], Some(&line("a"))).await;
    assert_eq!(output.status.code(), Some(0));
    let input = ["x", "b", "a", "c"].map(line).join("\n");
    let output = bed.leasehold(&["enqueue"], Some(&input)).await;
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output);
    assert!(said.contains("line 3: an event with that id is in the outbox already"), "{said}");
    assert_eq!(bed.count("true").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payload_that_grows_in_the_database_is_refused_as_what_would_never_be_sent() {
    let bed = Bed::new().await.set(&[("MAX_PAYLOAD", "1KiB")]);
    let line = |payload: &str| {
        format!(r#"{{"event_type":"t","destination_url":"https://example.com/x","payload":{payload}}}"#)
    };
    let (good, grows) = (line("1"), format!("[1{}]", ",1".repeat(399)));
    let input = format!("{good}\n\n{}\n{good}\n", line(&grows));
    let output = bed.leasehold(&["enqueue"], Some(&input)).await;
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output);
    assert!(said.contains("line 3: payload has 1200 bytes") && said.contains("max_payload, 1024"), "{said}");
    assert_eq!(bed.count("true").await, 0);
    let flags = ["--event-type", "t", "--destination-url", "https://example.com/x", "--payload", &grows];
    let output = bed.leasehold(&[&["enqueue"], &flags[..]].concat(), None).await;
    assert!(text(&output).contains("leasehold: payload has 1200 bytes"), "{}", text(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_nobody_reads_stops_no_delivery() {
    const EVENTS: i32 = 1_000;
    for gone in [false, true] {
        let bed = Bed::new().await;
        let receiver = Receiver::start(|_| (MS, 200)).await;
        bed.insert(&receiver.url(), EVENTS).await;
        let mut command = bed.command(&["run", "--until-empty"]);
        let mut child = command
            .env("LEASEHOLD_LOG", "debug")
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let reader = child.stderr.take().filter(|_| !gone);
        let status = tokio::time::timeout(PATIENCE, child.wait()).await.expect("it ends");
        assert_eq!(status.expect("it was started").code(), Some(0), "the reader is gone: {gone}");
        assert_eq!(bed.count("delivery_status = 'delivered'").await, i64::from(EVENTS));
        drop(reader);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn check_finds_a_right_that_a_worker_lacks() {
    let bed = Bed::new().await;
    let output = bed.leasehold(&["check"], None).await;
    assert!(text(&output).contains("a worker can claim"), "{}", text(&output));
    let mut url = url::Url::parse(&bed.url).expect("a URL");
    let user = format!("reader_of_{}", url.path().trim_start_matches('/'));
    let sql = format!(
        "create role {user} login; grant usage on schema leasehold to {user};
         grant select on all tables in schema leasehold to {user}"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&bed.pool).await.expect("a role");
    url.query_pairs_mut().append_pair("options", &format!("-c role={user}"));
    let output = bed.command(&["check"]).env("DATABASE_URL", url.as_str()).output().await.expect("it ran");
    let sql = format!("drop owned by {user}; drop role {user}");
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&bed.pool).await.expect("the role goes");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("a worker could not claim: refused for good: 42501"), "{}", text(&output));
}

#[tokio::test(flavor = "multi_thread")]
async fn check_finds_a_right_that_retiring_lacks() {
    let bed = Bed::new().await;
    let mut url = url::Url::parse(&bed.url).expect("a URL");
    let user = format!("claimer_of_{}", url.path().trim_start_matches('/'));
    let sql = format!(
        "create role {user} login; grant usage on schema leasehold to {user};
         grant select, insert, update on all tables in schema leasehold to {user};
         grant delete on leasehold.sleepers to {user}"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&bed.pool).await.expect("a role");
    let own = url.clone();
    url.query_pairs_mut().append_pair("options", &format!("-c role={user}"));
    let mut outputs = Vec::new();
    for (url, retain) in
        [(&url, "keep"), (&url, "delete"), (&url, "archive"), (&own, "delete"), (&own, "archive")]
    {
        let mut command = bed.command(&["check", "--retain", retain]);
        outputs.push(command.env("DATABASE_URL", url.as_str()).output().await.expect("it ran"));
    }
    let sql = format!("drop owned by {user}; drop role {user}");
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&bed.pool).await.expect("the role goes");
    let archive = "ownership of leasehold.outbox_archive, create on schema leasehold";
    let lacks = [None, Some(""), Some(archive), None, None];
    for (output, lacks) in outputs.iter().zip(lacks) {
        let said = text(output);
        assert!(output.status.success() && said.contains("a worker can claim"), "{said}");
        assert_eq!(said.contains("the worker's role lacks"), lacks.is_some(), "{said}");
        if let Some(more) = lacks {
            let delete = "the worker's role lacks delete on leasehold.outbox_events";
            assert!(said.contains(delete) && said.contains(more), "{said}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_flags_get_wrong_is_bad_usage() {
    let bed = Bed::new().await;
    let good = ["--event-type", "t", "--destination-url", "https://example.com/x", "--payload", "1"];
    for (at, value, says) in [
        (1, "a b", "event_type"),
        (3, "https://@example.com/x", "user info"),
        (5, "{bad", "payload is not JSON"),
    ] {
        let mut flags = good;
        flags[at] = value;
        let output = bed.leasehold(&[&["enqueue"], &flags[..]].concat(), None).await;
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        assert!(text(&output).contains(says), "{}", text(&output));
    }
    let flags = [&["enqueue"], &good[..], &["--next-attempt-at", "tomorrow"]].concat();
    let output = bed.leasehold(&flags, None).await;
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert_eq!(bed.count("true").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_event_by_flags_is_delivered() {
    let bed = Bed::new().await;
    let receiver = Receiver::start(|_| (MS, 200)).await;
    let url = receiver.url();
    let arguments = [
        "enqueue",
        "--event-type",
        "t",
        "--destination-url",
        &url,
        "--payload",
        "{\"a\": 1}",
        "--event-id",
        "one",
    ];
    let output = bed.leasehold(&arguments, None).await;
    assert!(output.status.success(), "{}", text(&output));
    let mut worker = bed.worker("w", &["--until-empty"]);
    assert_eq!(worker.end().await, Some(0), "{}", worker.log());
    assert_eq!(receiver.by_event().keys().collect::<Vec<_>>(), ["one"]);
    let log = worker.log();
    assert!(log.contains("cycle") && log.contains("delivered=1"), "one line a cycle:\n{log}");
    assert!(!log.contains(&SECRET[6..]) && !log.contains("v1,"), "no secret or signature in the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_shows_what_the_settings_mean_and_no_secret() {
    let bed = Bed::new().await;
    let output = bed.leasehold(&["check"], None).await;
    let text = text(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.to_lowercase().contains("lease") && text.contains("30s"), "{text}");
    assert!(!text.contains(&SECRET[6..]), "{text}");
    assert!(!text.contains("max_in_flight_per_destination ("), "{text}");
    let output = bed.leasehold(&["check", "--max-in-flight-per-destination", "256"], None).await;
    let text = crate::bed::text(&output);
    assert!(text.contains("warning: max_in_flight_per_destination (256) is no less than"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_goes_away_ends_a_command_in_silence() {
    let bed = Bed::new().await;
    let url = ["--event-type", "t", "--destination-url", "https://example.com/x", "--payload", "1"];
    for arguments in
        [&["check"][..], &["status", "--watch"], &["migrate"], &[&["enqueue"], &url[..]].concat()]
    {
        let mut child = bed
            .command(arguments)
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("the binary starts");
        drop(child.stdout.take());
        let output = tokio::time::timeout(PATIENCE, child.wait_with_output()).await;
        let output = output.expect("the command ends").expect("it was started");
        assert_eq!((output.status.code(), text(&output)), (Some(0), String::new()), "{arguments:?}");
    }
    assert_eq!(bed.count("true").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_a_watch_by_its_own_doing() {
    let bed = Bed::new().await;
    let mut watch = start_worker(bed.command(&["status", "--watch"]), bed.folder.path(), "watch");
    watch.logs("pending 0").await;
    watch.signal(Signal::TERM);
    assert_eq!(watch.end().await, Some(143), "as the first process of a container, too");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_row_harms_no_other() {
    let bed = Bed::new().await.set(&[("MAX_PAYLOAD", "1KiB"), ("MAX_ATTEMPTS", "1")]);
    let receiver = Receiver::start(|_| (MS, 200)).await;
    bed.insert(&receiver.url(), 3).await;
    let url = receiver.url();
    let big = format!("\"{}\"", "x".repeat(2_000));
    for (url, payload) in [
        ("not a url", "{}"),
        ("ftp://example.com/", "{}"),
        ("http://user:pass@127.0.0.1/", "{}"),
        (url.as_str(), big.as_str()),
    ] {
        sqlx::query(
            "insert into leasehold.outbox_events (event_type, destination_url, payload, max_attempts)
             values ('t', $1, $2::jsonb, 1)",
        )
        .bind(url)
        .bind(payload)
        .execute(&bed.pool)
        .await
        .expect("the table takes it");
    }
    let mut worker = bed.worker("w", &["--until-empty"]);
    assert_eq!(worker.end().await, Some(0), "{}", worker.log());
    assert_eq!(bed.count("delivery_status = 'delivered'").await, 3);
    assert_eq!(bed.count("delivery_status = 'failed' and attempts = 0 and last_error is not null").await, 3);
    assert_eq!(
        bed.count("delivery_status = 'failed' and attempts = 1 and last_error like '%max_payload%'").await,
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn http_forgotten_and_allowed_later_delivers_everything() {
    let bed =
        Bed::new().await.set(&[("ALLOW_HTTP", "false"), ("RETRY_INITIAL", "100ms"), ("RETRY_MAX", "200ms")]);
    let receiver = Receiver::start(|_| (MS, 200)).await;
    bed.insert(&receiver.url(), 5).await;
    let mut worker = bed.worker("strict", &[]);
    bed.until("attempts >= 2", 5).await;
    worker.signal(rustix::process::Signal::TERM);
    worker.end().await;
    assert!(receiver.seen().is_empty());
    assert_eq!(bed.count("delivery_status = 'pending' and last_error is not null").await, 5);
    let bed = bed.set(&[("ALLOW_HTTP", "true")]);
    let mut worker = bed.worker("open", &["--until-empty"]);
    assert_eq!(worker.end().await, Some(0), "{}", worker.log());
    assert_eq!(bed.count("delivery_status = 'delivered'").await, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn delivered_events_move_to_the_archive_and_trouble_there_stops_no_worker() {
    let bed = Bed::new().await.set(&[("RETAIN", "archive")]);
    let receiver = Receiver::start(|_| (std::time::Duration::ZERO, 200)).await;
    // A day that can't be dropped, since a view reads it.
    sqlx::raw_sql(
        "create table leasehold.outbox_archive_20200101 partition of leasehold.outbox_archive
             for values from ('2020-01-01 00:00+00') to ('2020-01-02 00:00+00');
         create view public.kept as select from leasehold.outbox_archive_20200101;
         alter table leasehold.outbox_archive rename to away",
    )
    .execute(&bed.pool)
    .await
    .expect("away");
    let mut worker = bed.worker("w", &[]);
    worker.logs("delivered events could not be retired").await;
    bed.insert(&receiver.url(), 3).await;
    bed.until("delivery_status = 'delivered'", 3).await;
    sqlx::raw_sql(
        "alter table leasehold.away rename to outbox_archive;
         update leasehold.outbox_events set delivered_at = now() - interval '1 hour'",
    )
    .execute(&bed.pool)
    .await
    .expect("back");
    bed.insert(&receiver.url(), 1).await;
    bed.until("true", 1).await;
    bed.until("delivery_status = 'delivered'", 1).await;
    let archived: i64 =
        sqlx::query_scalar("select count(*) from leasehold.outbox_archive where attempts = 1")
            .fetch_one(&bed.pool)
            .await
            .expect("a count");
    assert_eq!(archived, 3);
    worker.signal(rustix::process::Signal::TERM);
    assert_eq!(worker.end().await, Some(0), "{}", worker.log());
    for trouble in ["could not be retired", "could not be dropped"] {
        assert_eq!(worker.log().matches(trouble).count(), 1, "{}", worker.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_has_no_archive_and_check_says_so() {
    let bed = Bed::unmigrated().await.set(&[("RETAIN", "archive")]);
    let output = bed.leasehold(&["check", "--database-url", "sqlite://outbox.db"], None).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output).contains("allowed is keep or delete on SQLite"), "{}", text(&output));
}

/// The demo is the README's first command; its verdict is its exit code.
#[tokio::test(flavor = "multi_thread")]
async fn the_demo_holds_its_promise() {
    let bed = Bed::unmigrated().await;
    let output = bed.leasehold(&["demo", "--plain"], None).await;
    let text = text(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("SQLite") && text.contains("THE PROMISE HELD"), "{text}");
}

/// It leaves no folder behind, nor processes, which work in it.
#[tokio::test(flavor = "multi_thread")]
async fn a_demo_that_is_told_to_end_leaves_nothing_behind() {
    let bed = Bed::unmigrated().await;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let working = || {
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let folders = processes.filter_map(|process| std::fs::read_link(process.path().join("cwd")).ok());
        folders.filter(|cwd| cwd.starts_with(folder.path())).count()
    };
    // As if a Postgres of the user's own were meant.
    for (arguments, postgres) in
        [(&["demo", "--plain"][..], false), (&["demo", "--plain", "--postgres"], true)]
    {
        let mut child = bed
            .command(arguments)
            .env("TMPDIR", folder.path())
            .envs(postgres.then_some([("PGPORT", "5433"), ("PGSSLMODE", "require")]).into_iter().flatten())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        while !lines.next_line().await.expect("a line").expect("output").contains("leased") {}
        #[cfg(target_os = "linux")]
        assert!(working() >= 3);
        let pid = rustix::process::Pid::from_raw(child.id().expect("it runs").cast_signed()).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("a signal");
        let ended =
            tokio::time::timeout(PATIENCE, child.wait()).await.expect("it ends").expect("it was started");
        assert_eq!(ended.code(), Some(143));
        let start = std::time::Instant::now();
        while working() > 0 || folder.path().read_dir().expect("the folder").next().is_some() {
            assert!(start.elapsed() < PATIENCE, "left behind: {} processes", working());
            tokio::time::sleep(20 * MS).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_misspelt_sqlite_file_is_not_made() {
    let bed = Bed::unmigrated().await;
    for command in ["status", "check", "run", "enqueue"] {
        let output = bed.leasehold(&[command, "--database-url", "sqlite://typo.db"], None).await;
        assert_eq!(output.status.code(), Some(1), "{command}");
        assert!(text(&output).contains("there is no file typo.db"), "{command}: {}", text(&output));
    }
    let output = bed.leasehold(&["migrate", "--database-url", "sqlite://right.db"], None).await;
    assert!(output.status.success(), "{}", text(&output));
    let output = bed.leasehold(&["status", "--database-url", "sqlite://right.db"], None).await;
    assert!(output.status.success(), "{}", text(&output));
}
