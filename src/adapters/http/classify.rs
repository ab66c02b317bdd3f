//! What happened to a request, and the one total function that maps it to an [`AttemptResult`].

use std::error::Error;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hyper::http::response::Parts;

use crate::machine::AttemptResult;

use super::retry_after::retry_after;

/// What was under way when time ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Resolving,
    Connecting,
    Handshaking,
    Waiting,
    Writing,
}

/// Why there is no status line that counts. The texts name hosts and ports, never a path, query, payload or secret.
#[derive(Debug)]
pub(super) enum Failure {
    /// Nothing can ever change it.
    Undeliverable(String),
    /// `http` while it isn't allowed.
    PlainHttp,
    /// Where it points may not be connected to.
    Forbidden { host: String, address: IpAddr },
    /// The name doesn't resolve.
    Resolve { host: String, error: io::Error },
    /// No connection came about.
    Connect { to: SocketAddr, error: io::Error },
    /// The handshake failed.
    Tls { authority: String, error: io::Error },
    /// This machine can't speak TLS: no trusted certificates were found.
    NoTls(String),
    /// A deadline passed.
    TimedOut { phase: Phase, authority: String, after: Duration },
    /// A success came before the request was written, and the connection ended.
    Unread { authority: String, status: u16 },
    /// The connection broke, or what came back isn't HTTP.
    Broken { authority: String, error: hyper::Error },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Undeliverable(why) => f.write_str(why),
            Self::PlainHttp => f.write_str("forbidden: plain http is off (ALLOW_HTTP)"),
            Self::Forbidden { host, address } if *host == address.to_string() => {
                write!(f, "forbidden: {address} is not a public address (ALLOW_DESTINATIONS)")
            }
            Self::Forbidden { host, address } => {
                write!(f, "forbidden: {host} is {address}, not a public address (ALLOW_DESTINATIONS)")
            }
            Self::Resolve { host, error } => write!(f, "dns: {host}: {error}"),
            Self::Connect { to, error } => write!(f, "connecting to {to}: {error}"),
            Self::Tls { authority, error } => write!(f, "TLS with {authority}: {error}"),
            Self::NoTls(error) => write!(f, "TLS is not available: {error}"),
            Self::TimedOut { phase, authority, after } => {
                let doing = match phase {
                    Phase::Resolving => "resolving the name of",
                    Phase::Connecting => "connecting to",
                    Phase::Handshaking => "in the TLS handshake with",
                    Phase::Waiting => "waiting for the response of",
                    Phase::Writing => "writing the rest of what was answered already to",
                };
                write!(f, "timed out after {after:?} {doing} {authority}")
            }
            Self::Unread { authority, status } => {
                write!(f, "{authority} answered {status} and closed before it had the whole request")
            }
            Self::Broken { authority, error } if error.is_parse() => {
                write!(f, "{authority} did not answer in HTTP/1: {error}")
            }
            Self::Broken { authority, error } => {
                write!(f, "the connection to {authority} broke: {error}")?;
                let mut source = error.source();
                while let Some(error) = source {
                    write!(f, ": {error}")?;
                    source = error.source();
                }
                Ok(())
            }
        }
    }
}

/// Total: the status line decides; without one it is an error, worth a retry unless nothing can ever change it.
pub(super) fn classify(outcome: Result<Parts, Failure>) -> AttemptResult {
    match outcome {
        Ok(head) => {
            let status = head.status.as_u16();
            AttemptResult::Responded { status, retry_after: retry_after(&head.headers) }
        }
        Err(Failure::Undeliverable(error)) => AttemptResult::Undeliverable { error },
        Err(failure) => AttemptResult::Errored { error: failure.to_string() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::RetryAfter;
    use hyper::Response;

    fn refused() -> io::Error {
        io::ErrorKind::ConnectionRefused.into()
    }

    #[test]
    fn every_status_is_a_response() {
        for status in 100..=999 {
            let head = Response::builder().status(status).header("retry-after", "3").body(()).unwrap();
            let retry_after = Some(RetryAfter::Delay(Duration::from_secs(3)));
            assert_eq!(classify(Ok(head.into_parts().0)), AttemptResult::Responded { status, retry_after });
        }
    }

    #[test]
    fn every_failure_names_itself() {
        let host = || "example.com".to_owned();
        let authority = || "example.com:8443".to_owned();
        let address = "10.0.0.1".parse().unwrap();
        let timed_out =
            |phase| Failure::TimedOut { phase, authority: authority(), after: Duration::from_secs(5) };
        for (failure, text) in [
            (Failure::PlainHttp, "forbidden: plain http is off (ALLOW_HTTP)"),
            (
                Failure::Forbidden { host: host(), address },
                "forbidden: example.com is 10.0.0.1, not a public address (ALLOW_DESTINATIONS)",
            ),
            (
                Failure::Forbidden { host: "10.0.0.1".into(), address },
                "forbidden: 10.0.0.1 is not a public address (ALLOW_DESTINATIONS)",
            ),
            (Failure::Resolve { host: host(), error: refused() }, "dns: example.com: connection refused"),
            (
                Failure::Connect { to: (address, 80).into(), error: refused() },
                "connecting to 10.0.0.1:80: connection refused",
            ),
            (
                Failure::Tls { authority: authority(), error: io::Error::other("bad certificate") },
                "TLS with example.com:8443: bad certificate",
            ),
            (Failure::NoTls("no roots".into()), "TLS is not available: no roots"),
            (timed_out(Phase::Resolving), "timed out after 5s resolving the name of example.com:8443"),
            (timed_out(Phase::Connecting), "timed out after 5s connecting to example.com:8443"),
            (timed_out(Phase::Handshaking), "timed out after 5s in the TLS handshake with example.com:8443"),
            (timed_out(Phase::Waiting), "timed out after 5s waiting for the response of example.com:8443"),
        ] {
            assert_eq!(classify(Err(failure)), AttemptResult::Errored { error: text.into() });
        }
        assert_eq!(
            classify(Err(Failure::Undeliverable("no".into()))),
            AttemptResult::Undeliverable { error: "no".into() }
        );
    }
}
