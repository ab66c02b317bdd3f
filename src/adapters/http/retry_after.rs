//! `Retry-After` (RFC 9110, section 10.2.3).

use std::time::{Duration, UNIX_EPOCH};

use hyper::header::{DATE, HeaderMap, RETRY_AFTER};

use crate::machine::{DbTime, RetryAfter};

/// What a response asks for; whether its status lets it ask is the machine's to say. Delay seconds saturate; a date
/// counts from the response's own `Date`, so that neither clock needs to be right. `None` for what doesn't parse.
pub fn retry_after(headers: &HeaderMap) -> Option<RetryAfter> {
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

    fn parsed(retry: &str, date: Option<&str>) -> Option<RetryAfter> {
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, retry.parse().unwrap());
        if let Some(date) = date {
            headers.insert(DATE, date.parse().unwrap());
        }
        retry_after(&headers)
    }

    #[test]
    fn table() {
        let delay = |secs| Some(RetryAfter::Delay(Duration::from_secs(secs)));
        let noon = "Sun, 06 Nov 1994 12:00:00 GMT";
        for (retry, date, expected) in [
            ("120", None, delay(120)),
            ("0", None, delay(0)),
            ("  7  ", None, delay(7)),
            ("007", None, delay(7)),
            ("99999999999999999999999", None, delay(u64::MAX)),
            ("-1", None, None),
            ("+1", None, None),
            ("1.5", None, None),
            ("", None, None),
            ("soon", None, None),
            ("Sun, 06 Nov 1994 12:00:30 GMT", Some(noon), delay(30)),
            ("Sunday, 06-Nov-94 12:00:30 GMT", Some(noon), delay(30)),
            ("Sun Nov  6 12:00:30 1994", Some(noon), delay(30)),
            ("Sun, 06 Nov 1994 11:00:00 GMT", Some(noon), delay(0)),
            (noon, None, Some(RetryAfter::Date(DbTime::from_micros(784_123_200_000_000)))),
            (noon, Some("yesterday"), Some(RetryAfter::Date(DbTime::from_micros(784_123_200_000_000)))),
            ("Sun, 32 Nov 1994 12:00:00 GMT", None, None),
        ] {
            assert_eq!(parsed(retry, date), expected, "{retry:?} {date:?}");
        }
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }
}
