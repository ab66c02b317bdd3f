//! Events to enqueue: from flags, or as NDJSON.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{BufRead, Read as _};

use serde::Deserialize;
use serde_json::value::RawValue;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::EnqueueArgs;
use crate::adapters::http::Destination;
use crate::adapters::store::{LONGEST_URL, MOST_ATTEMPTS};
use crate::machine::DbTime;

/// What a line may be longer than its payload: ids, a URL, keys.
const LINE_SLACK: u64 = 256 * 1024;

/// One event, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnqueueLine {
    /// The line, from 1; `None` for flags.
    pub line: Option<u64>,
    /// 1 to 255 visible ASCII characters; the store makes one up if there is none.
    pub event_id: Option<String>,
    /// 1 to 255 visible ASCII characters.
    pub event_type: String,
    /// As written; it would not fail at once.
    pub destination_url: String,
    /// JSON as written.
    pub payload: String,
    /// 1 to [`MOST_ATTEMPTS`].
    pub max_attempts: i32,
    /// When it may be sent at the earliest.
    pub next_attempt_at: Option<DbTime>,
}

/// What is not in a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EnqueueRules {
    /// `MAX_ATTEMPTS`, for lines without `max_attempts`.
    pub max_attempts: i32,
    /// `MAX_PAYLOAD` in bytes.
    pub max_payload: u32,
}

/// Why an event was refused, and where it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnqueueError {
    /// The line, from 1; `None` for flags.
    pub line: Option<u64>,
    /// What is wrong; no payload.
    pub problem: String,
}

impl fmt::Display for EnqueueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.problem),
            None => f.write_str(&self.problem),
        }
    }
}

impl std::error::Error for EnqueueError {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw<'a> {
    event_id: Option<String>,
    event_type: String,
    destination_url: String,
    #[serde(borrow)]
    payload: &'a RawValue,
    max_attempts: Option<i64>,
    next_attempt_at: Option<String>,
}

impl Raw<'_> {
    fn check(self, rules: EnqueueRules) -> Result<EnqueueLine, String> {
        if let Some(id) = &self.event_id {
            check_id("event_id", id)?;
        }
        check_id("event_type", &self.event_type)?;
        let url = self.destination_url.len();
        if url > LONGEST_URL {
            return Err(format!("destination_url has {url} bytes; allowed is {LONGEST_URL}"));
        }
        self.destination_url.parse::<Destination>().map_err(|error| error.to_string())?;
        if self.destination_url.contains('\0') {
            return Err(r"destination_url has \u0000 in it, which the database can't keep".to_owned());
        }
        let payload = self.payload.get();
        if payload.len() as u64 > u64::from(rules.max_payload) {
            let size = payload.len();
            return Err(format!("payload has {size} bytes; allowed is max_payload, {}", rules.max_payload));
        }
        if let Some(escape) = unkept_escape(payload) {
            return Err(format!("payload has {escape} in it, which the database can't keep"));
        }
        let max_attempts = match self.max_attempts {
            None => rules.max_attempts,
            Some(n) => i32::try_from(n)
                .ok()
                .filter(|n| (1..=MOST_ATTEMPTS.cast_signed()).contains(n))
                .ok_or_else(|| format!("max_attempts is {n}; allowed is 1 to {MOST_ATTEMPTS}"))?,
        };
        let next_attempt_at = self.next_attempt_at.as_deref().map(parse_time).transpose()?;
        Ok(EnqueueLine {
            line: None,
            event_id: self.event_id,
            event_type: self.event_type,
            destination_url: self.destination_url,
            payload: payload.to_owned(),
            max_attempts,
            next_attempt_at,
        })
    }
}

fn check_id(name: &str, text: &str) -> Result<(), String> {
    if (1..=255).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(())
    } else {
        Err(format!("{name} is {:?}; allowed is 1 to 255 visible ASCII characters", start_of(text)))
    }
}

fn parse_time(text: &str) -> Result<DbTime, String> {
    let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| {
        let text = start_of(text);
        format!("next_attempt_at is {text:?}; allowed is RFC 3339 such as 2030-01-31T12:00:00Z")
    })?;
    let micros = time.unix_timestamp_nanos().div_euclid(1_000);
    i64::try_from(micros)
        .map(DbTime::from_micros)
        .map_err(|_| format!("next_attempt_at is {text:?}: too far away"))
}

/// As much of a text as fits into an error.
fn start_of(text: &str) -> &str {
    text.char_indices().nth(40).map_or(text, |(end, _)| &text[..end])
}

/// An escape that Postgres' jsonb refuses: NUL, or one half of a surrogate pair. A backslash that is itself escaped begins
/// nothing.
fn unkept_escape(json: &str) -> Option<&str> {
    let unit = |at: usize| {
        let digits = json.get(at..)?.strip_prefix(r"\u")?.get(..4)?;
        u16::from_str_radix(digits, 16).ok()
    };
    let mut at = 0;
    while let Some(next) = json[at..].find('\\') {
        at += next;
        at += match (unit(at), unit(at + 6)) {
            (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => 12,
            (Some(0 | 0xd800..=0xdfff), _) => return json.get(at..at + 6),
            _ => 2,
        };
    }
    None
}

/// The one event that flags describe; `None` if they describe none, so that NDJSON is to be read.
///
/// # Errors
/// As for a line.
pub fn from_flags(args: &EnqueueArgs, rules: EnqueueRules) -> Result<Option<EnqueueLine>, EnqueueError> {
    let (Some(event_type), Some(url), Some(payload)) =
        (&args.event_type, &args.destination_url, &args.payload)
    else {
        return Ok(None);
    };
    let refused = |problem| EnqueueError { line: None, problem };
    let raw = Raw {
        event_id: args.event_id.clone(),
        event_type: event_type.clone(),
        destination_url: url.clone(),
        payload: serde_json::from_str(payload)
            .map_err(|error| refused(format!("payload is not JSON: {error}")))?,
        max_attempts: None,
        next_attempt_at: args.next_attempt_at.clone(),
    };
    raw.check(rules).map(Some).map_err(refused)
}

/// The events of NDJSON, one after the other, so that they can go into a transaction as they come. Blank lines are
/// passed over. After an error there is nothing more: roll back, since nothing of the input is to be kept.
pub fn from_ndjson(
    mut input: impl BufRead,
    rules: EnqueueRules,
) -> impl Iterator<Item = Result<EnqueueLine, EnqueueError>> {
    let longest = u64::from(rules.max_payload) + LINE_SLACK;
    let (mut line, mut buffer, mut ended) = (0, Vec::new(), false);
    let mut ids: BTreeMap<String, u64> = BTreeMap::new();
    std::iter::from_fn(move || {
        loop {
            if ended {
                return None;
            }
            line += 1;
            buffer.clear();
            // A line is bounded, or one without an end would fill the memory.
            let read = input.by_ref().take(longest + 1).read_until(b'\n', &mut buffer);
            let parsed = match read {
                Ok(0) => return None,
                Ok(read) if read as u64 > longest => Err(format!("longer than {longest} bytes")),
                Ok(_) if buffer.trim_ascii().is_empty() => continue,
                // serde would take an array for the fields in their order.
                Ok(_) if !buffer.trim_ascii_start().starts_with(b"{") => Err("not a JSON object".to_owned()),
                Ok(_) => serde_json::from_slice::<Raw<'_>>(&buffer)
                    .map_err(|error| in_line(&error))
                    .and_then(|raw| raw.check(rules)),
                Err(error) => Err(format!("can't be read: {error}")),
            };
            let parsed = parsed.and_then(|event| match &event.event_id {
                Some(id) => match ids.insert(id.clone(), line) {
                    Some(before) => Err(format!("event_id {id:?} is that of line {before}")),
                    None => Ok(event),
                },
                None => Ok(event),
            });
            ended = parsed.is_err();
            let line = Some(line);
            let parsed = parsed.map(|event| EnqueueLine { line, ..event });
            return Some(parsed.map_err(|problem| EnqueueError { line, problem }));
        }
    })
}

/// serde_json's text, whose own line number would be 1 for each line.
fn in_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rsplit_once(" at line ") {
        Some((text, _)) => format!("{text} at column {}", error.column()),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: EnqueueRules = EnqueueRules { max_attempts: 20, max_payload: 1_000 };

    fn lines(text: &[u8]) -> Result<Vec<EnqueueLine>, EnqueueError> {
        from_ndjson(text, RULES).collect()
    }

    fn line(fields: &str) -> String {
        format!(r#"{{"event_type": "a.b", "destination_url": "https://example.com/", {fields}}}"#)
    }

    #[test]
    fn whole_lines() {
        let text = format!(
            "{}\n\n{}",
            line(r#""payload": {"b" : 1.0,  "a":1e2}"#),
            line(
                r#""payload": null, "event_id": "e-1", "max_attempts": 3, "next_attempt_at": "1970-01-01T01:00:00.5+01:00""#
            )
        );
        let read = lines(text.as_bytes()).unwrap();
        let first = EnqueueLine {
            line: Some(1),
            event_id: None,
            event_type: "a.b".into(),
            destination_url: "https://example.com/".into(),
            payload: r#"{"b" : 1.0,  "a":1e2}"#.into(),
            max_attempts: 20,
            next_attempt_at: None,
        };
        let second = EnqueueLine {
            line: Some(3),
            event_id: Some("e-1".into()),
            payload: "null".into(),
            max_attempts: 3,
            next_attempt_at: Some(DbTime::from_micros(500_000)),
            ..first.clone()
        };
        assert_eq!(read, [first, second]);
        assert_eq!(lines(b""), Ok(Vec::new()));
    }

    #[test]
    fn mistakes_name_their_line() {
        let good = line(r#""payload": 1"#);
        for (bad, problem) in [
            ("{".to_owned(), "EOF"),
            ("[]".to_owned(), "not a JSON object"),
            (r#"[null, "a.b", "https://example.com/", 1, null, null]"#.to_owned(), "not a JSON object"),
            (line(r#""payload": 1, "colour": 2"#), "unknown field `colour`"),
            (line(r#""payload": 1, "payload": 2"#), "duplicate field"),
            (line(r#""event_id": "x""#), "missing field `payload`"),
            (line(r#""payload": {]"#), "column"),
            (line(r#""payload": 1, "event_id": """#), "event_id is \"\""),
            (line(r#""payload": 1, "event_id": "a b""#), "event_id is \"a b\""),
            (line(&format!(r#""payload": 1, "event_id": "{}""#, "x".repeat(256))), "255"),
            (line(r#""payload": 1, "max_attempts": 0"#), "max_attempts is 0"),
            (line(r#""payload": 1, "max_attempts": 9999999999"#), "max_attempts is 9999999999"),
            (line(r#""payload": 1, "max_attempts": 1000000001"#), "allowed is 1 to 1000000000"),
            (line(r#""payload": 1, "next_attempt_at": "tomorrow""#), "RFC 3339"),
            (line(r#""payload": "\u0000""#), "u0000"),
            (line(r#""payload": "\ud800""#), "ud800"),
            (good.replace("example.com/", r"example.com/\u0000"), "destination_url has"),
            (
                good.replace(".com/", &format!(".com/#{}", "x".repeat(65_516))),
                "65537 bytes; allowed is 65536",
            ),
            (line(&format!(r#""payload": 1, "event_id": "{}""#, "é".repeat(256))), "éééé\"; allowed"),
            (line(&format!(r#""payload": "{}""#, "x".repeat(1_000))), "1002 bytes"),
            (good.replace("https://", "ftp://"), "scheme ftp"),
            (good.replace("https://", "https://user:hunter2@"), "user info"),
            (good.replace("https://", "https://@"), "user info"),
            (good.replace("https://example.com/", "example"), "does not parse"),
            (good.replace("a.b", ""), "event_type"),
            (format!("{good} {good}"), "trailing characters"),
            ("{".repeat(300_000), "longer than"),
        ] {
            let error = lines(format!("{good}\n\n{bad}\n{good}\n").as_bytes()).unwrap_err();
            assert_eq!(error.line, Some(3), "{bad:.200}");
            assert!(error.to_string().starts_with("line 3: "), "{error}");
            assert!(error.problem.contains(problem), "{bad:.200}: {error}");
            assert!(!error.problem.contains("hunter2"));
        }
        let twice = line(r#""payload": 1, "event_id": "a""#);
        let error = lines(format!("{twice}\n{good}\n{twice}\n").as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), "line 3: event_id \"a\" is that of line 1");
        let latin = [good.as_bytes(), b"\n\"\xe9\"\n"].concat();
        assert_eq!(lines(&latin).unwrap_err().line, Some(2));
    }

    #[test]
    fn nothing_follows_an_error() {
        let text = format!("{{\n{}\n", line(r#""payload": 1"#));
        let mut read = from_ndjson(text.as_bytes(), RULES);
        assert!(read.next().unwrap().is_err());
        assert!(read.next().is_none());
    }

    #[test]
    fn escapes_that_the_database_cannot_keep() {
        for (json, found) in [
            (r#""\u0000""#, Some(r"\u0000")),
            (r#""\\u0000""#, None),
            (r#""\\\u0000""#, Some(r"\u0000")),
            (r#""\n\u0000""#, Some(r"\u0000")),
            (r#""u0000""#, None),
            (r#""\u00001""#, Some(r"\u0000")),
            (r#""\u0001é\\""#, None),
            (r#""\ud83d\ude00""#, None),
            (r#""\uD83D\uDE00\u0000""#, Some(r"\u0000")),
            (r#""\ud83d""#, Some(r"\ud83d")),
            (r#""\ud83d\\ude00""#, Some(r"\ud83d")),
            (r#""\ud83d\ud83d\ude00""#, Some(r"\ud83d")),
            (r#""\ude00\ud83d""#, Some(r"\ude00")),
        ] {
            assert_eq!(unkept_escape(json), found, "{json}");
        }
    }

    #[test]
    fn flags_describe_one_event() {
        assert_eq!(from_flags(&EnqueueArgs::default(), RULES), Ok(None));
        let args = EnqueueArgs {
            event_type: Some("a.b".into()),
            destination_url: Some("https://example.com/".into()),
            payload: Some(r#"{"a": 1}"#.into()),
            ..EnqueueArgs::default()
        };
        let event = from_flags(&args, RULES).unwrap().unwrap();
        assert_eq!((event.payload.as_str(), event.max_attempts), (r#"{"a": 1}"#, 20));
        let bad = EnqueueArgs { payload: Some("{".into()), ..args };
        let error = from_flags(&bad, RULES).unwrap_err();
        assert_eq!(error.line, None);
        assert!(error.to_string().starts_with("payload is not JSON"), "{error}");
    }
}
