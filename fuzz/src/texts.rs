//! Texts from outside: headers, secrets, settings, URLs.

use std::collections::BTreeMap;

use http::header::{DATE, RETRY_AFTER};
use http::{HeaderMap, HeaderValue};
use leasehold::adapters::http::{Destination, Secret, Signer};
use leasehold::cli::settings::{Needs, Sources, parse};
use leasehold::machine::RetryAfter;
use standardwebhooks::Webhook;

/// The first line is a `Retry-After`, the second one, if it is there, a `Date`.
pub fn retry_after(data: &[u8]) {
    let mut headers = HeaderMap::new();
    let names = [RETRY_AFTER, DATE];
    for (name, line) in names.into_iter().zip(data.split(|byte| *byte == b'\n')) {
        if let Ok(value) = HeaderValue::from_bytes(line) {
            headers.insert(name, value);
        }
    }
    let text = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()).unwrap_or_default().trim();
    let seconds = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match leasehold::adapters::http::retry_after(&headers) {
        Some(RetryAfter::Delay(delay)) if seconds => {
            assert_eq!(delay.as_secs(), text.parse().unwrap_or(u64::MAX), "{text:?}");
        }
        Some(RetryAfter::Delay(_)) => assert!(headers.contains_key(DATE), "{text:?} is relative to nothing"),
        Some(RetryAfter::Date(_)) | None => assert!(!seconds, "{text:?} was not understood"),
    }
}

/// The first line is a secret as it is written in the settings, the rest a body. What is signed under a secret is
/// verified by the Standard Webhooks library under the same text.
pub fn secret(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == b'\n');
    let Ok(text) = std::str::from_utf8(parts.next().unwrap_or_default()) else { return };
    let body = parts.next().unwrap_or_default();
    let secret: Secret = match text.parse() {
        Ok(secret) => secret,
        Err(error) => {
            let shown = format!("{error} {error:?}");
            let rest = text.strip_prefix("whsec_").unwrap_or(text);
            assert!(rest.len() < 8 || !shown.contains(rest), "the error shows the secret");
            return;
        }
    };
    assert_eq!(format!("{secret:?}"), "Secret(redacted)");
    let Some(signer) = Signer::new(&[secret]) else { panic!("a secret that doesn't sign") };
    let signature = signer.sign("evt_1", 1_700_000_000, body);
    // That library wants whole padding and no stray bits at the end; secrets here may be copied carelessly.
    if let Ok(webhook) = Webhook::new(text) {
        let theirs = webhook.sign("evt_1", 1_700_000_000, body);
        assert!(theirs.is_ok_and(|theirs| theirs == signature), "another signature than the library's");
    }
    let hex = signer.sign_hex(1_700_000_000, body);
    assert!(hex.len() == 71 && hex.is_ascii(), "{hex}");
}

/// A settings file. Whatever is wrong with it, the answer names at least one problem and shows no secret.
pub fn settings(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let canary = "whsec_Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5Y2FuYXJ5";
    let environment = BTreeMap::from([
        ("DATABASE_URL".to_owned(), "postgres://user:canary@localhost/outbox".to_owned()),
        ("LEASEHOLD_SIGNING_SECRETS".to_owned(), canary.to_owned()),
    ]);
    let file = Some(("leasehold.toml".to_owned(), text.to_owned()));
    let sources = Sources { file, environment, host_name: "host".to_owned(), ..Sources::default() };
    // A secret that the file itself mentions somewhere is no secret of ours.
    let hidden = |shown: &str| {
        text.contains("canary") || text.contains(canary) || {
            !shown.contains("canary") && !shown.contains(canary)
        }
    };
    match parse(&sources, Needs::RUN) {
        Ok(settings) => {
            assert!(hidden(&format!("{settings:?}")), "Debug shows a secret");
            let timing = settings.worker.timing();
            let needed = timing.heartbeat() + 2 * timing.store_timeout() + timing.fence_margin();
            assert!(needed <= timing.lease(), "a renewal may come too late: {timing:?}");
        }
        Err(errors) => {
            assert!(!errors.0.is_empty() && errors.0.iter().all(|error| !error.is_empty()));
            assert!(hidden(&errors.to_string()), "an error shows a secret");
        }
    }
}

/// A destination URL. What parses is sendable, and parses to the same again.
pub fn destination(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(destination) = text.parse::<Destination>() else { return };
    let scheme = if destination.https { "https" } else { "http" };
    let again = format!("{scheme}://{}:{}/", destination.host, destination.port);
    let again = again.parse::<Destination>();
    let place = |to: &Destination| (to.https, to.host.clone(), to.port);
    assert_eq!(again.as_ref().map(place), Ok(place(&destination)), "{text:?}");
}
