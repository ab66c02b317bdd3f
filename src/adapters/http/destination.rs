//! Where requests may go: what a destination URL must look like, and the addresses that may be connected to.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use hyper::header::HeaderValue;
use hyper::http::uri::PathAndQuery;
use ipnet::IpNet;
use url::{Host, Url};

/// A destination URL, parsed. It can be sent to as far as the URL alone can tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Whether TLS is spoken.
    pub https: bool,
    /// Name or address, normalised as by the WHATWG URL standard: `0x7f.1` is the address 127.0.0.1.
    pub host: Host<String>,
    /// The port, the scheme's own if none is written.
    pub port: u16,
    /// Host, and port if it isn't the scheme's own: for the `host` header.
    pub(super) authority: HeaderValue,
    /// Scheme and authority.
    pub(super) origin: Arc<str>,
    /// The request target; no fragment.
    pub(super) target: PathAndQuery,
}

/// Why a URL can never be sent to. Shows nothing of it but its scheme.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationError {
    /// It doesn't parse.
    Syntax(url::ParseError),
    /// A scheme other than http and https.
    Scheme(String),
    /// It has user info, be it empty.
    UserInfo,
    /// There is no host in it.
    NoHost,
    /// Its path or query can't be put in a request, or is too long for one.
    Target,
}

impl fmt::Display for DestinationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Syntax(error) => write!(f, "destination_url does not parse: {error}"),
            Self::Scheme(scheme) => {
                write!(f, "destination_url has the scheme {scheme:.20}; allowed are https and http")
            }
            Self::UserInfo => f.write_str("destination_url has user info in it, which is not sent"),
            Self::NoHost => f.write_str("destination_url has no host"),
            Self::Target => f.write_str("destination_url has a path or query that fits no request"),
        }
    }
}

impl std::error::Error for DestinationError {}

impl FromStr for Destination {
    type Err = DestinationError;

    fn from_str(text: &str) -> Result<Self, DestinationError> {
        let url = Url::parse(text).map_err(|error| match error {
            url::ParseError::EmptyHost => DestinationError::NoHost,
            error => DestinationError::Syntax(error),
        })?;
        let https = match url.scheme() {
            "https" => true,
            "http" => false,
            scheme => return Err(DestinationError::Scheme(scheme.to_owned())),
        };
        // Parsed, an empty one is gone. The parser passes over tabs and line ends, and over any number of slashes.
        let rest = text.split_once(':').map_or("", |(_, rest)| rest);
        let authority =
            rest.trim_start_matches(['/', '\\', '\t', '\n', '\r']).split(['/', '\\', '?', '#']).next();
        if authority.is_some_and(|authority| authority.contains('@')) {
            return Err(DestinationError::UserInfo);
        }
        let host = url.host().ok_or(DestinationError::NoHost)?.to_owned();
        let authority = match url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_string(),
        };
        let origin = format!("{}://{authority}", url.scheme()).into();
        let authority = HeaderValue::try_from(authority).map_err(|_| DestinationError::NoHost)?;
        let target = match url.query() {
            Some(query) => format!("{}?{query}", url.path()).try_into(),
            None => url.path().try_into(),
        }
        .map_err(|_| DestinationError::Target)?;
        let port = url.port_or_known_default().ok_or(DestinationError::NoHost)?;
        Ok(Self { https, host, port, authority, origin, target })
    }
}

impl Destination {
    /// For texts.
    pub(super) fn host_and_port(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

/// Destinations by their URL, parsed: mostly the next event goes where others went. No `Debug`: URLs may hold secrets.
#[derive(Default)]
pub(super) struct Destinations(Mutex<HashMap<String, Arc<Destination>>>);

impl Destinations {
    /// At most this many are kept, and none with a URL of more bytes than that.
    const KEPT: usize = 4096;
    const LONGEST: usize = 512;

    /// The destination with this URL.
    ///
    /// # Errors
    /// The URL can't be sent to.
    pub(super) fn get(&self, url: &str) -> Result<Arc<Destination>, DestinationError> {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(destination) = lock().get(url) {
            return Ok(Arc::clone(destination));
        }
        let destination = Arc::new(url.parse::<Destination>()?);
        if url.len() <= Self::LONGEST {
            let mut kept = lock();
            if kept.len() >= Self::KEPT {
                kept.clear();
            }
            kept.insert(url.to_owned(), Arc::clone(&destination));
        }
        Ok(destination)
    }
}

/// Which addresses may be connected to: public ones, and what is allowed besides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressRules {
    nets: Vec<IpNet>,
    names: Vec<HostPattern>,
}

/// One entry of `ALLOW_DESTINATIONS`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowRule {
    /// These addresses: a CIDR or one address.
    Net(IpNet),
    /// Whatever these names resolve to.
    Name(HostPattern),
}

/// A host name, or with `*.` before it every name below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPattern {
    name: String,
    below: bool,
}

/// An entry that is neither a CIDR nor a host pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllowRuleError;

impl fmt::Display for AllowRuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "neither an address or CIDR such as 10.0.0.0/8 nor a host name such as app or *.internal.example",
        )
    }
}

impl std::error::Error for AllowRuleError {}

impl FromStr for AllowRule {
    type Err = AllowRuleError;

    fn from_str(text: &str) -> Result<Self, AllowRuleError> {
        if let Ok(net) = text.parse() {
            return Ok(Self::Net(net));
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Net(address.into()));
        }
        let (name, below) = match text.strip_prefix("*.") {
            Some(rest) => (rest, true),
            None => (text, false),
        };
        match Host::parse(name) {
            Ok(Host::Domain(name)) if !name.contains('*') => {
                let name = without_dot(&name).to_owned();
                if name.is_empty() {
                    return Err(AllowRuleError);
                }
                Ok(Self::Name(HostPattern { name, below }))
            }
            Ok(Host::Ipv4(address)) if !below => Ok(Self::Net(IpAddr::from(address).into())),
            Ok(Host::Ipv6(address)) if !below => Ok(Self::Net(IpAddr::from(address).into())),
            _ => Err(AllowRuleError),
        }
    }
}

impl FromIterator<AllowRule> for AddressRules {
    fn from_iter<I: IntoIterator<Item = AllowRule>>(rules: I) -> Self {
        let mut all = Self::default();
        for rule in rules {
            match rule {
                AllowRule::Net(net) => all.nets.push(net),
                AllowRule::Name(name) => all.names.push(name),
            }
        }
        all
    }
}

impl AddressRules {
    /// Whether every address that this name resolves to is allowed.
    pub fn allows_name(&self, name: &str) -> bool {
        let name = without_dot(name).to_ascii_lowercase();
        self.names.iter().any(|pattern| match name.strip_suffix(&pattern.name) {
            Some("") => !pattern.below,
            Some(rest) => pattern.below && rest.len() > 1 && rest.ends_with('.'),
            None => false,
        })
    }

    /// Whether this address may be connected to.
    pub fn allows(&self, address: IpAddr) -> bool {
        let inner = embedded(address);
        is_public(address)
            || self.nets.iter().any(|net| {
                net.contains(&address) || inner.is_some_and(|inner| net.contains(&IpAddr::from(inner)))
            })
    }
}

/// `example.com.` and `example.com` are one name.
pub(super) fn without_dot(name: &str) -> &str {
    name.strip_suffix('.').unwrap_or(name)
}

/// The IPv4 address that a packet to this address ends up at: IPv4-mapped (RFC 4291), NAT64 (RFC 6052), 6to4 (RFC 3056).
fn embedded(address: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(address) = address else { return None };
    let o = address.octets();
    match address.segments() {
        [0, 0, 0, 0, 0, 0xffff, ..] | [0x64, 0xff9b, 0, 0, 0, 0, ..] => {
            Some(Ipv4Addr::new(o[12], o[13], o[14], o[15]))
        }
        [0x2002, ..] => Some(Ipv4Addr::new(o[2], o[3], o[4], o[5])),
        _ => None,
    }
}

/// Whether an address is reached over the public internet (IANA special-purpose address registries).
///
/// Written out since `IpAddr::is_global` is not stable, and since what it calls global differs in detail.
fn is_public(address: IpAddr) -> bool {
    match (address, embedded(address)) {
        (_, Some(inner)) => is_public_v4(inner),
        (IpAddr::V4(address), None) => is_public_v4(address),
        (IpAddr::V6(address), None) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    match address.octets() {
        [0 | 10 | 127 | 224..=255, ..] => false, // this network, private, loopback, multicast, reserved, broadcast
        [100, 64..=127, ..] => false,            // carrier-grade NAT
        [169, 254, ..] => false,                 // link-local: cloud metadata
        [172, 16..=31, ..] | [192, 168, ..] => false, // private
        [192, 0, 0 | 2, _] | [198, 51, 100, _] | [203, 0, 113, _] => false, // protocol assignments, documentation
        [192, 88, 99, _] => false,                                          // 6to4 relay, withdrawn
        [198, 18 | 19, ..] => false,                                        // benchmarking
        _ => true,
    }
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    match address.segments() {
        [0x2001, 0..=0x1ff, ..] => false, // protocol assignments: Teredo, benchmarking, ORCHID
        [0x2001, 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => false, // documentation
        // Only 2000::/3 is global unicast: outside of it are loopback, unspecified, IPv4-compatible, local NAT64,
        // discard-only, segment routing, unique local, link-local, site-local and multicast.
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> AddressRules {
        text.split(',').map(|rule| rule.parse::<AllowRule>().unwrap()).collect()
    }

    #[test]
    #[rustfmt::skip]
    fn forbidden_addresses() {
        for address in [
            "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.127.255.255", "127.0.0.1",
            "127.255.255.254", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.8", "192.0.2.1",
            "192.88.99.1", "192.168.0.1", "198.18.0.1", "198.19.255.255", "198.51.100.7", "203.0.113.7",
            "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "::", "::1", "::7f00:1",
            "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1",
            "100::1", "2001::1", "2001:2::1", "2001:db8::1", "2002:7f00:1::1", "2002:a00:1::", "3fff::1",
            "5f00::1", "fc00::1", "fd12::1", "fe80::1", "fec0::1", "ff02::1", "4000::1",
        ] {
            assert!(!is_public(address.parse().unwrap()), "{address}");
            assert!(!AddressRules::default().allows(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    #[rustfmt::skip]
    fn public_addresses() {
        for address in [
            "1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.0.0.1",
            "128.0.0.1", "169.253.0.1", "172.15.0.1", "172.32.0.1", "192.0.1.1", "192.167.0.1",
            "198.17.0.1", "198.20.0.1", "223.255.255.255", "::ffff:8.8.8.8", "64:ff9b::808:808",
            "2002:808:808::1", "2001:200::1", "2001:4860:4860::8888", "2606:4700::1111", "2a00::1",
            "3ffe::1",
        ] {
            assert!(is_public(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    #[rustfmt::skip]
    fn allowed_besides() {
        let rules = rules("127.0.0.0/8,fd00::/8,10.1.2.3,::1");
        for (address, allowed) in [
            ("127.0.0.1", true), ("::ffff:127.0.0.1", true), ("64:ff9b::7f00:1", true), ("fd00::1", true),
            ("10.1.2.3", true), ("10.1.2.4", false), ("::1", true), ("fc00::1", false),
            ("169.254.169.254", false),
        ] {
            assert_eq!(rules.allows(address.parse().unwrap()), allowed, "{address}");
        }
    }

    #[test]
    #[rustfmt::skip]
    fn host_patterns() {
        let rules = rules("*.internal.example,App,bücher.example");
        for (name, allowed) in [
            ("a.internal.example", true), ("a.b.INTERNAL.example.", true), ("internal.example", false),
            ("xinternal.example", false), (".internal.example", false), ("app", true), ("app.", true),
            ("x.app", false), ("app.evil.example", false), ("xn--bcher-kva.example", true),
        ] {
            assert_eq!(rules.allows_name(name), allowed, "{name}");
        }
    }

    #[test]
    fn bad_rules() {
        for rule in
            ["", "*", "*.", "a b", "10.0.0.0/33", "*.10.0.0.1", "https://x", "a*.example", "**.example", "."]
        {
            assert!(rule.parse::<AllowRule>().is_err(), "{rule:?}");
        }
    }

    #[test]
    fn urls() {
        let parsed = |text: &str| text.parse::<Destination>();
        let hook = parsed("HTTPS://Example.COM:443/a b?x={1}#frag").unwrap();
        assert_eq!((hook.https, hook.port, hook.authority.to_str().unwrap()), (true, 443, "example.com"));
        assert_eq!(hook.target.as_str(), "/a%20b?x={1}");
        assert!(parsed("https://example.com/@user?a@b#@").is_ok());
        let six = parsed("http://[::1]:8080").unwrap();
        assert_eq!((six.authority.to_str().unwrap(), six.target.as_str()), ("[::1]:8080", "/"));
        for text in ["http://2130706433/", "http://0x7f.1/", "http://0177.0.0.1/", "http://127.1/"] {
            assert_eq!(parsed(text).unwrap().host, Host::<String>::Ipv4(Ipv4Addr::LOCALHOST), "{text}");
        }
        for (text, error) in [
            ("ftp://example.com/", DestinationError::Scheme("ftp".into())),
            ("javascript:alert(1)", DestinationError::Scheme("javascript".into())),
            ("https://user@example.com/", DestinationError::UserInfo),
            ("https://user:secret@example.com/", DestinationError::UserInfo),
            ("https://:secret@example.com/", DestinationError::UserInfo),
            ("https://@example.com/", DestinationError::UserInfo),
            ("https://:@example.com", DestinationError::UserInfo),
            ("https://@@example.com?x", DestinationError::UserInfo),
            ("https:@example.com/", DestinationError::UserInfo),
            (" https:\n/\\\t/@example.com/", DestinationError::UserInfo),
            ("https://", DestinationError::NoHost),
            ("example.com/hook", DestinationError::Syntax(url::ParseError::RelativeUrlWithoutBase)),
            ("", DestinationError::Syntax(url::ParseError::RelativeUrlWithoutBase)),
            ("https://example.com:99999/", DestinationError::Syntax(url::ParseError::InvalidPort)),
        ] {
            assert_eq!(parsed(text).unwrap_err(), error, "{text}");
            assert!(!error.to_string().contains("secret"));
        }
        assert_eq!((&*hook.origin, &*six.origin), ("https://example.com", "http://[::1]:8080"));
        let long = format!("https://example.com/{}", "a".repeat(70_000));
        assert_eq!(parsed(&long).unwrap_err(), DestinationError::Target);
    }

    #[test]
    fn parsed_once_and_not_kept_without_end() {
        let destinations = Destinations::default();
        let count = || destinations.0.lock().unwrap().len();
        let of = |path: usize| destinations.get(&format!("https://example.com/{path}")).unwrap();
        let first = of(0);
        assert!(Arc::ptr_eq(&first, &of(0)));
        assert_eq!(of(1).target.as_str(), "/1");
        assert!(destinations.get("ftp://example.com/").is_err());
        let long = format!("https://example.com/{}", "a".repeat(Destinations::LONGEST));
        assert_eq!(*destinations.get(&long).unwrap(), long.parse().unwrap());
        assert_eq!(count(), 2);
        for path in 0..=Destinations::KEPT {
            of(path);
        }
        assert_eq!((count(), of(0).target.as_str()), (1, "/0"));
    }
}
