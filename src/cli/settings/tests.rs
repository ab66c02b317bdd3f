use std::collections::BTreeSet;
use std::time::Duration;

use super::reader::{parse_duration, parse_size};
use super::*;
use crate::machine::{Limits, RetryPolicy};

const URL: &str = "postgres://app:hunter2@db/app";
const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

fn map(entries: &[(&str, &str)]) -> BTreeMap<String, String> {
    entries.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn sources<'a>(file: &str, environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Sources<'a> {
    let mut environment = map(environment);
    environment.entry("DATABASE_URL".into()).or_insert(URL.into());
    environment.entry("LEASEHOLD_SIGNING_SECRETS".into()).or_insert(SECRET.into());
    Sources {
        file: Some(("leasehold.toml".into(), file.into())),
        environment,
        flags: map(flags),
        host_name: "host-1".into(),
        read: None,
    }
}

fn parsed(file: &str, environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Settings {
    parse(&sources(file, environment, flags), Needs::RUN).unwrap()
}

fn problems(file: &str, environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Vec<String> {
    parse(&sources(file, environment, flags), Needs::RUN).unwrap_err().0
}

#[test]
fn defaults_are_the_designs() {
    let settings = parsed("", &[], &[]);
    let timing = settings.worker.timing();
    let secs = Duration::from_secs;
    assert_eq!(
        [
            timing.lease(),
            timing.heartbeat(),
            timing.store_timeout(),
            timing.fence_margin(),
            timing.reclaim_grace()
        ],
        [secs(30), secs(10), secs(5), secs(3), secs(3)]
    );
    let limits = Limits {
        max_in_flight: 256,
        max_in_flight_per_destination: 32,
        max_leased: 756,
        claim_batch: 500,
        poll_interval: Duration::from_millis(250),
        drain_timeout: secs(28),
        reclaim_limit: 100,
    };
    assert_eq!(settings.worker.limits(), &limits);
    let retry = RetryPolicy {
        initial: secs(5),
        max: secs(3_600),
        jitter_bps: 2_000,
        budget: 0,
        retry_after_max: secs(86_400),
        fail_statuses: BTreeSet::new(),
    };
    assert_eq!(settings.worker.retry(), &retry);
    assert_eq!(settings.http.connect_timeout, secs(5));
    assert_eq!(settings.http.request_timeout, secs(15));
    assert_eq!(settings.http.response_cap, 65_536);
    assert_eq!((settings.http.hex_prefix, settings.http.allow_http), (None, false));
    assert_eq!(settings.http.addresses, Default::default());
    assert_eq!((settings.max_attempts, settings.max_payload), (20, 1 << 20));
    assert_eq!((settings.prepared_statements, settings.admin_addr), (true, None));
    assert_eq!(settings.retain, Retain::Keep);
    assert_eq!(settings.worker_name, "host-1");
    assert_eq!(settings.log, LogSettings { filter: "info".into(), format: LogFormat::Text });
    assert_eq!(settings.database.unwrap().expose(), URL);
}

/// Each source overrides the ones before it, for every setting.
#[test]
fn sources_in_order() {
    let at = |file: Option<&str>, env: Option<&str>, flag: Option<&str>| {
        let file = file.map(|v| format!("max_in_flight = {v}")).unwrap_or_default();
        let env: Vec<_> = env.map(|v| ("LEASEHOLD_MAX_IN_FLIGHT", v)).into_iter().collect();
        let flag: Vec<_> = flag.map(|v| ("max_in_flight", v)).into_iter().collect();
        parsed(&file, &env, &flag).worker.limits().max_in_flight
    };
    assert_eq!(at(None, None, None), 256);
    assert_eq!(at(Some("1"), None, None), 1);
    assert_eq!(at(Some("1"), Some("2"), None), 2);
    assert_eq!(at(Some("1"), Some(""), None), 1);
    assert_eq!(at(Some("1"), Some("2"), Some("3")), 3);
}

#[test]
fn every_setting_has_a_good_default_and_its_names() {
    for setting in SETTINGS {
        assert_eq!(setting.name, setting.name.to_ascii_lowercase());
        assert_eq!(setting.flag().replace('-', "_"), setting.name);
        if let Some(default) = setting.default {
            parsed(&format!("{} = {default:?}", setting.name), &[], &[]);
        }
    }
}

#[test]
fn a_file_may_say_it_all() {
    let settings = parsed(
        r#"
        lease = "1m"
        heartbeat = "5s"
        store_timeout = "2s"
        max_leased = 10
        fail_statuses = [410, "404"]
        allow_destinations = ["127.0.0.0/8", "*.internal.example"]
        allow_http = true
        sign_hex = true
        hex_prefix = "X-Acme"
        prepared_statements = false
        admin_addr = "[::1]:9090"
        max_payload = "8MiB"
        response_cap = 0
        log = "leasehold=debug,warn"
        log_format = "json"
        worker_name = "w"
        "#,
        &[],
        &[],
    );
    assert_eq!(settings.worker.timing().heartbeat(), Duration::from_secs(5));
    assert_eq!(settings.worker.limits().max_leased, 10);
    assert_eq!(settings.worker.retry().fail_statuses, BTreeSet::from([404, 410]));
    assert!(settings.http.addresses.allows_name("a.internal.example"));
    assert!(settings.http.addresses.allows("127.1.2.3".parse().unwrap()));
    assert_eq!(settings.http.hex_prefix.as_deref(), Some("X-Acme"));
    assert_eq!((settings.max_payload, settings.http.response_cap), (8 << 20, 0));
    assert_eq!(settings.log.format, LogFormat::Json);
    assert_eq!(settings.admin_addr, "[::1]:9090".parse().ok());
    assert_eq!(settings.worker_name, "w");
    assert!(!settings.prepared_statements && settings.http.allow_http);
}

#[test]
fn all_mistakes_at_once() {
    let found = problems(
        "claim_bach = 3\nlease = 30\npoll_interval = 1.5\n",
        &[
            ("LEASEHOLD_MAX_IN_FLIHGT", "3"),
            ("LEASEHOLD_LOG_FORMAT", "xml"),
            ("LEASEHOLD_SIGNING_SECRETS", "whsec_hunter-2,hunter3"),
            ("DATABASE_URL", "mysql://app:hunter4@db/x"),
        ],
        &[("max_attempts", "0"), ("retry_jitter_bps", "10001"), ("reclaim_limit", "2")],
    );
    let expected = [
        "claim_bach in leasehold.toml is not a setting; did you mean claim_batch?",
        "poll_interval in leasehold.toml is a float; allowed is a duration such as 250ms, 30s, 5m or 1h",
        "LEASEHOLD_MAX_IN_FLIHGT is not a setting; did you mean LEASEHOLD_MAX_IN_FLIGHT?",
        "DATABASE_URL is not valid (its value is not shown); allowed is postgres://user@host/database or sqlite://file",
        "lease in leasehold.toml is \"30\"; allowed is a duration such as 250ms, 30s, 5m or 1h",
        "--retry-jitter-bps is \"10001\"; allowed is 0 to 10000",
        "--reclaim-limit is \"2\"; allowed is 0 (off) or more than 3",
        "LEASEHOLD_SIGNING_SECRETS, entry 1: a secret must be written whsec_<base64>, but what follows whsec_ is not \
         base64 (its value is not shown)",
        "LEASEHOLD_SIGNING_SECRETS, entry 2: a secret must be written whsec_<base64>, but the prefix whsec_ is \
         missing (its value is not shown)",
        "--max-attempts is \"0\"; allowed is 1 to 1000000000",
        "LEASEHOLD_LOG_FORMAT is \"xml\"; allowed is text or json",
    ];
    assert_eq!(found, expected);
}

/// What isn't read hides nothing of what is.
#[test]
fn no_mistake_hides_another() {
    let named = |flags: &[(&str, &str)]| -> Vec<String> {
        let found = problems("", &[], flags);
        found.iter().map(|problem| problem.split([' ', ':']).next().unwrap_or_default().to_owned()).collect()
    };
    let limits = [("max_leased", "x"), ("claim_batch", "0"), ("reclaim_limit", "2"), ("drain_timeout", "1s")];
    assert_eq!(named(&limits), ["--max-leased", "--claim-batch", "--drain-timeout", "--reclaim-limit"]);
    let timings = [("heartbeat", "50ms"), ("store_timeout", "10s"), ("fence_margin", "0s")];
    assert_eq!(named(&timings), ["--heartbeat", "--store-timeout", "--fence-margin"]);
    let timings = [("lease", "x"), ("heartbeat", "50ms"), ("reclaim_grace", "25h")];
    assert_eq!(named(&timings), ["--lease", "--heartbeat", "--reclaim-grace"]);
    let sqlite = ("database_url", "sqlite:///tmp/outbox.db");
    assert_eq!(named(&[sqlite, ("lease", "1s"), ("heartbeat", "50ms")]), ["--lease", "--heartbeat"]);
}

/// One bad value each: refused, under the key that it was given by.
#[test]
fn bad_values() {
    for (name, value, says) in [
        ("lease", "500ms", "1s to 24h"),
        ("lease", "25h", "1s to 24h"),
        ("heartbeat", "99ms", "100ms"),
        ("heartbeat", "29s", "at most lease"),
        ("store_timeout", "6s", "5s"),
        ("store_timeout", "0s", "1ms"),
        ("fence_margin", "0s", "1ms"),
        ("reclaim_grace", "31s", "lease"),
        ("max_in_flight", "0", "1 to 1000000"),
        ("max_in_flight", "-1", "whole number"),
        ("max_in_flight_per_destination", "0", "1 to 1000000"),
        ("max_leased", "0", "1 to 1000000"),
        ("claim_batch", "many", "whole number"),
        ("poll_interval", "0s", "1ms"),
        ("poll_interval", "5", "duration"),
        ("connect_timeout", "0s", "1ms"),
        ("request_timeout", "25h", "24h"),
        ("retry_initial", "2h", "retry_max"),
        ("retry_max", "99999999999999999h", "duration"),
        ("retry_budget", "x", "whole number"),
        ("max_attempts", "1000000001", "1 to 1000000000"),
        ("max_payload", "9MiB", "8MiB"),
        ("max_payload", "0", "8MiB"),
        ("response_cap", "2GiB", "1GiB"),
        ("response_cap", "1MB", "1GiB"),
        ("fail_statuses", "410,200", "300 to 599"),
        ("signing_secrets", "", "SIGNING_SECRETS is not set"),
        ("sign_hex", "yes", "true or false"),
        ("allow_destinations", "10.0.0.0/33", "CIDR"),
        ("allow_http", "1", "true or false"),
        ("drain_timeout", "10s", "2 * store_timeout"),
        ("retain", "drop", "keep, archive or delete"),
        ("retain_for", "59s", "1m to 876000h"),
        ("retain_for", "876001h", "1m to 876000h"),
        ("admin_addr", "9090", "port"),
        ("log", "a=b=c", "level"),
        ("log", "warning", "level"),
        ("log", "leasehold=debug,inof", "level"),
        ("worker_name", "a b", "visible ASCII"),
        ("prepared_statements", "off", "true or false"),
        ("database_url", "sqlite://:memory:", "sqlite://file"),
        ("database_url", "sqlite://", "sqlite://file"),
        ("database_url", "sqlite://x?mode=memory", "sqlite://file"),
        ("database_url", "sqlite://x?mode=bogus", "mode"),
        ("database_url", "postgres://app:hunter2@db:notaport/shop", "port"),
        ("database_url", "postgres://app:hunter2@db/shop?sslmode=bogus", "ssl_mode"),
    ] {
        let found = problems("", &[], &[(name, value)]);
        assert_eq!(found.len(), 1, "{name} = {value}: {found:?}");
        assert!(found[0].contains(says) && !found[0].contains("hunter2"), "{name} = {value}: {found:?}");
    }
    for sign_hex in ["false", "true"] {
        let found = problems("", &[], &[("sign_hex", sign_hex), ("hex_prefix", "a b")]);
        assert_eq!(
            found,
            ["--hex-prefix is \"a b\"; allowed is what a header name can begin with, other than webhook"]
        );
    }
}

/// A default is never blamed for what was given.
#[test]
fn defaults_follow_what_is_given() {
    let initial = |max| parsed("", &[], &[("retry_max", max)]).worker.retry().initial;
    assert_eq!((initial("1s"), initial("2h")), (Duration::from_secs(1), Duration::from_secs(5)));
    let large = [("max_in_flight", "1000000"), ("claim_batch", "1000000")];
    assert_eq!(parsed("", &[], &large).worker.limits().max_leased, 1_000_000);
    for (flags, expected) in [
        (
            [("max_in_flight", "0"), ("claim_batch", "0")],
            &[
                "--max-in-flight is \"0\"; allowed is 1 to 1000000",
                "--claim-batch is \"0\"; allowed is 1 to 1000000",
            ][..],
        ),
        (
            [("max_in_flight", "100000000"), ("claim_batch", "1")],
            &["--max-in-flight is \"100000000\"; allowed is 1 to 1000000"],
        ),
        (
            [("retry_max", "0s"), ("retry_jitter_bps", "0")],
            &["--retry-max is \"0s\"; allowed is 1ms to ten years"],
        ),
        (
            [("retry_max", "0s"), ("retry_initial", "1s")],
            &["--retry-max is \"0s\"; allowed is 1ms to ten years"],
        ),
    ] {
        assert_eq!(problems("", &[], &flags), expected);
    }
}

/// The value is shown as it was written, and a limit that another setting makes as what it is.
#[test]
fn values_are_shown_as_written() {
    for (flag, expected) in [
        (("store_timeout", "0s"), "--store-timeout is \"0s\"; allowed is 1ms to 5s"),
        (("retry_initial", "2h"), "--retry-initial is \"2h\"; allowed is 1ms to retry_max (1h)"),
        (("reclaim_grace", "7200s"), "--reclaim-grace is \"7200s\"; allowed is at most the lease (30s)"),
        (
            ("drain_timeout", "10000ms"),
            "--drain-timeout is \"10000ms\"; allowed is more than 2 * store_timeout (10s)",
        ),
        (
            ("claim_batch", "4294967296"),
            "--claim-batch is \"4294967296\"; allowed is a whole number from 1 to 1000000",
        ),
    ] {
        assert_eq!(problems("", &[], &[flag]), [expected]);
    }
    let found = problems("retry_max = \"1m\"", &[("LEASEHOLD_RETRY_INITIAL", "90s")], &[]);
    assert_eq!(found, ["LEASEHOLD_RETRY_INITIAL is \"90s\"; allowed is 1ms to retry_max (1m)"]);
    let found = problems("", &[], &[("heartbeat", "1h")]);
    assert!(found[0].contains("1h + 2 * 5s + 3s = 3613s is more than 30s"), "{found:?}");
}

#[test]
fn names_that_others_use_get_a_hint() {
    for (variable, hint) in [
        ("LEASEHOLD_DATABASE_URL", "did you mean DATABASE_URL, without a prefix?"),
        ("LEASEHOLD_LOG_LEVEL", "did you mean LEASEHOLD_LOG?"),
        ("LEASEHOLD_CONFIG", "did you mean the flag --config?"),
    ] {
        assert_eq!(problems("", &[(variable, "x")], &[]), [format!("{variable} is not a setting; {hint}")]);
    }
}

#[test]
fn sqlite_wants_a_longer_lease() {
    let url = ("database_url", "sqlite:///tmp/outbox.db");
    assert_eq!(parsed("", &[], &[url]).database.unwrap().database, Database::Sqlite);
    parsed("", &[], &[url, ("lease", "2s")]);
    let found = problems("", &[], &[url, ("lease", "1999ms")]);
    assert_eq!(found, ["--lease is \"1999ms\"; allowed is 2s or more on SQLite"]);
    parsed("", &[], &[("lease", "1s")]);
}

#[test]
fn what_becomes_of_delivered_events() {
    let retain = |kind, keep_for| parsed("", &[], &[("retain", kind), ("retain_for", keep_for)]).retain;
    let hours = |hours: u64| Duration::from_secs(hours * 3_600);
    assert_eq!(retain("keep", "1h"), Retain::Keep);
    assert_eq!(retain("archive", "1h"), Retain::Archive(hours(1)));
    assert_eq!(retain("delete", "876000h"), Retain::Delete(hours(876_000)));
    assert_eq!(parsed("", &[], &[("retain", "delete")]).retain, Retain::Delete(hours(720)));
    let url = ("database_url", "sqlite:///tmp/outbox.db");
    parsed("", &[], &[url, ("retain", "delete")]);
    let found = problems("", &[], &[url, ("retain", "archive")]);
    assert_eq!(found, ["--retain is \"archive\"; allowed is keep or delete on SQLite"]);
}

#[test]
fn what_is_missing() {
    let bare = Sources::default();
    parse(&bare, Needs::default()).unwrap();
    let found = parse(&bare, Needs::RUN).unwrap_err().0;
    assert!(found[0].starts_with("DATABASE_URL is not set"), "{found:?}");
    assert!(found[1].starts_with("LEASEHOLD_SIGNING_SECRETS is not set"), "{found:?}");
    assert_eq!(parse(&bare, Needs::STORE).unwrap_err().0.len(), 1);
}

#[test]
fn secrets_from_a_file() {
    let read = |path: &Path| match path.to_str() {
        Some("good") => Ok(format!("{SECRET}\n\n whsec_c2Vjb25k \n")),
        Some("bad") => Ok(format!("{SECRET}\nhunter2\n")),
        _ => Err(io::ErrorKind::NotFound.into()),
    };
    let by = |needs, path: &str, inline: &str| {
        let mut sources = sources("", &[("LEASEHOLD_SIGNING_SECRETS_FILE", path)], &[]);
        sources.environment.insert("LEASEHOLD_SIGNING_SECRETS".into(), inline.into());
        parse(&Sources { read: Some(&read), ..sources }, needs)
    };
    let with = |path: &str, inline: &str| by(Needs::RUN, path, inline);
    assert_eq!(with("good", "").unwrap().http.secrets.len(), 2);
    let bad = with("bad", "").unwrap_err().to_string();
    assert!(
        bad.starts_with("LEASEHOLD_SIGNING_SECRETS_FILE, entry 2: ") && !bad.contains("hunter2"),
        "{bad}"
    );
    assert!(with("none", "").unwrap_err().to_string().contains("can't be read"));
    assert!(with("good", SECRET).unwrap_err().to_string().contains("both set"));
    let layered = |file: &str, environment: &[(&str, &str)], flags: &[(&str, &str)]| {
        let mut sources = sources(file, environment, flags);
        sources.environment.retain(|_, value| !value.is_empty());
        parse(&Sources { read: Some(&read), ..sources }, Needs::RUN).unwrap()
    };
    let settings = layered("signing_secrets_file = \"none\"", &[], &[]);
    assert_eq!(settings.http.secrets.len(), 1);
    assert!(settings.shown.iter().all(|(name, ..)| *name != "signing_secrets_file"));
    assert_eq!(layered("", &[], &[("signing_secrets_file", "good")]).http.secrets.len(), 2);
    let none = ("LEASEHOLD_SIGNING_SECRETS", "");
    let over = ("LEASEHOLD_SIGNING_SECRETS_FILE", "good");
    assert_eq!(layered("signing_secrets = \"x\"", &[none, over], &[]).http.secrets.len(), 2);
    for (path, inline) in [("none", ""), ("bad", ""), ("good", SECRET), ("", "hunter2")] {
        assert!(by(Needs::STORE, path, inline).unwrap().http.secrets.is_empty(), "{path} {inline}");
    }
}

#[test]
fn kubernetes_variables_are_let_pass() {
    for variable in [
        "LEASEHOLD_SERVICE_HOST",
        "LEASEHOLD_SERVICE_PORT",
        "LEASEHOLD_SERVICE_PORT_HTTP",
        "LEASEHOLD_PORT",
        "LEASEHOLD_PORT_9090_TCP",
        "LEASEHOLD_PORT_9090_TCP_ADDR",
        "LEASEHOLD_ADMIN_SERVICE_HOST",
        "LEASEHOLD_ADMIN_PORT_80_UDP_PROTO",
    ] {
        parsed("", &[(variable, "tcp://10.0.0.1:80")], &[]);
    }
    for variable in
        ["LEASEHOLD_PORT_X", "LEASEHOLD_PORTS", "LEASEHOLD_PORT_80", "LEASEHOLD_", "LEASEHOLD_HOST"]
    {
        assert_eq!(problems("", &[(variable, "1")], &[]).len(), 1, "{variable}");
    }
    let found = problems("", &[("LEASEHOLD_DATABASE_URL", URL)], &[]);
    assert!(!found[0].contains("hunter2"), "{found:?}");
    parsed("", &[("OTHER_LEASE", "x"), ("leasehold_lease", "x")], &[]);
}

#[test]
fn a_file_that_is_not_toml_shows_no_line_of_it() {
    let found = problems("lease = \"30s\"\nsigning_secrets = \"hunter2\n", &[], &[]);
    assert_eq!(found.len(), 1);
    assert!(
        found[0].starts_with("leasehold.toml, line 2, is not TOML") && !found[0].contains("hunter2"),
        "{found:?}"
    );
}

#[test]
fn passwords_are_never_shown() {
    for (url, shown) in [
        (URL, "postgres://…@db/app"),
        ("postgres://app:p@ss@a:1,b:2/app?sslmode=require&password=hunter2", "postgres://…@a:1,b:2/app"),
        ("postgres://db/app?password=hunter2", "postgres://db/app"),
        ("postgres://app:hunter2?x@db/app", "postgres://…"),
        ("postgres:///app?host=/tmp&user=u", "postgres:///app"),
        ("sqlite:///var/outbox.db?mode=rwc", "sqlite:///var/outbox.db"),
    ] {
        let parsed = DatabaseUrl::parse(url).unwrap();
        assert_eq!(parsed.to_string(), shown);
        assert_eq!(format!("{parsed:?}"), format!("DatabaseUrl({shown})"));
    }
    let settings = parsed("", &[], &[]);
    for text in [format!("{settings:?}"), format!("{:?}", settings.shown)] {
        assert!(!text.contains("hunter2") && !text.contains("MfKQ9r8"), "{text}");
    }
}

#[test]
fn a_default_that_another_setting_makes_is_shown() {
    let settings = parsed("", &[], &[("lease", "12s"), ("heartbeat", "2500ms"), ("retry_max", "4s")]);
    let shown = |name| settings.shown.iter().find(|(shown, ..)| *shown == name).cloned();
    for (name, value, origin) in [
        ("heartbeat", "2500ms", Origin::Flag),
        ("store_timeout", "2s", Origin::Default),
        ("fence_margin", "1.2s", Origin::Default),
        ("reclaim_grace", "1.2s", Origin::Default),
        ("max_leased", "756", Origin::Default),
        ("retry_initial", "4s", Origin::Default),
        ("worker_name", &settings.worker_name, Origin::Default),
    ] {
        assert_eq!(shown(name), Some((name, value.to_owned(), origin)));
    }
    assert_eq!(shown("admin_addr"), None);
}

#[test]
fn durations_and_sizes() {
    for (text, millis) in [("0s", 0), ("250ms", 250), ("30s", 30_000), ("5m", 300_000), ("1h", 3_600_000)] {
        assert_eq!(parse_duration(text), Some(Duration::from_millis(millis)));
    }
    for text in ["", "s", "1", "1.5s", "-1s", "1 s", "1S", "1d", "99999999999999999999s", "1h30m", "٣s"] {
        assert_eq!(parse_duration(text), None, "{text}");
    }
    for (text, bytes) in
        [("0", 0), ("7", 7), ("7B", 7), ("64KiB", 65_536), ("1MiB", 1 << 20), ("2GiB", 2 << 30)]
    {
        assert_eq!(parse_size(text), Some(bytes));
    }
    for text in ["", "KiB", "1kb", "1 MiB", "-1", "18446744073709551615KiB"] {
        assert_eq!(parse_size(text), None, "{text}");
    }
}

proptest::proptest! {
    /// Whatever is written, parsing ends in settings or in mistakes, never in a panic.
    #[test]
    fn nothing_panics(file in ".{0,80}", at in 0..SETTINGS.len(), value in ".{0,20}", key in "[A-Z_0-9]{0,12}") {
        let variable = format!("LEASEHOLD_{key}");
        let flag = [(SETTINGS[at].name, value.as_str())];
        let toml = format!("{} = {value:?}", SETTINGS[at].name);
        for text in [file.as_str(), toml.as_str()] {
            match parse(&sources(text, &[(&variable, &value)], &flag), Needs::RUN) {
                Ok(_) => {}
                Err(SettingsError(problems)) => proptest::prop_assert!(!problems.is_empty()),
            }
        }
    }
}
