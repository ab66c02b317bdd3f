//! `Retry-After` (RFC 9110, section 10.2.3).

use std::time::{Duration, UNIX_EPOCH};

use hyper::header::{DATE, HeaderMap, RETRY_AFTER};

use crate::machine::{DbTime, RetryAfter};

/// What a 429 or 503 asks for. Delay seconds saturate; a date counts from the response's own `Date`, so that neither
/// clock needs to be right. `None` for every other status, and for what doesn't parse.
pub fn retry_after(status: u16, headers: &HeaderMap) -> Option<RetryAfter> {
    if !matches!(status, 429 | 503) {
        return None;
    }
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        // Digits alone fail to parse only by overflow.
        return Some(RetryAfter::Delay(Duration::from_secs(text.parse().unwrap_or(u64::MAX))));
    }
    let until = httpdate::parse_http_date(text).ok()?;
    let sent = headers.get(DATE).and_then(|d| httpdate::parse_http_date(d.to_str().ok()?).ok());
    Some(match sent {
        Some(sent) => RetryAfter::Delay(until.duration_since(sent).unwrap_or_default()),
        None => {
            let since_epoch = until.duration_since(UNIX_EPOCH).unwrap_or_default();
            RetryAfter::Date(DbTime::from_micros(since_epoch.as_micros().try_into().unwrap_or(i64::MAX)))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(status: u16, retry: &str, date: Option<&str>) -> Option<RetryAfter> {
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, retry.parse().unwrap());
        if let Some(date) = date {
            headers.insert(DATE, date.parse().unwrap());
        }
        retry_after(status, &headers)
    }

    #[test]
    fn table() {
        let delay = |secs| Some(RetryAfter::Delay(Duration::from_secs(secs)));
        let noon = "Sun, 06 Nov 1994 12:00:00 GMT";
        for (status, retry, date, expected) in [
            (429, "120", None, delay(120)),
            (503, "0", None, delay(0)),
            (503, "  7  ", None, delay(7)),
            (503, "007", None, delay(7)),
            (429, "99999999999999999999999", None, delay(u64::MAX)),
            (200, "120", None, None),
            (500, "120", None, None),
            (429, "-1", None, None),
            (429, "+1", None, None),
            (429, "1.5", None, None),
            (429, "", None, None),
            (429, "soon", None, None),
            (429, "Sun, 06 Nov 1994 12:00:30 GMT", Some(noon), delay(30)),
            (429, "Sunday, 06-Nov-94 12:00:30 GMT", Some(noon), delay(30)),
            (429, "Sun Nov  6 12:00:30 1994", Some(noon), delay(30)),
            (429, "Sun, 06 Nov 1994 11:00:00 GMT", Some(noon), delay(0)),
            (429, noon, None, Some(RetryAfter::Date(DbTime::from_micros(784_123_200_000_000)))),
            (429, noon, Some("yesterday"), Some(RetryAfter::Date(DbTime::from_micros(784_123_200_000_000)))),
            (429, "Sun, 32 Nov 1994 12:00:00 GMT", None, None),
        ] {
            assert_eq!(parsed(status, retry, date), expected, "{status} {retry:?} {date:?}");
        }
        assert_eq!(retry_after(429, &HeaderMap::new()), None);
    }
}
