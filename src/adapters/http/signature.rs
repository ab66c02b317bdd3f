//! Signatures: Standard Webhooks `v1`, and an optional hex scheme for receivers that already verify one.

use std::fmt::{self, Write as _};
use std::str::FromStr;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret as _, SecretSlice};
use sha2::Sha256;

type HmacSha256 = Hmac<Sha256>;

/// Secrets are copied by hand: padding may be missing.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A signing secret, written `whsec_<base64>`. Its `Debug` shows nothing of it.
#[derive(Clone)]
pub struct Secret(SecretSlice<u8>);

impl Secret {
    /// Fewer bytes than the 24 (192 bits) that Standard Webhooks asks for.
    pub fn is_weak(&self) -> bool {
        self.0.expose_secret().len() < 24
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(redacted)")
    }
}

/// Why a secret was refused. Never shows any of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecretError {
    /// It doesn't start with `whsec_`.
    Prefix,
    /// What follows is not base64.
    Base64,
    /// Nothing follows.
    Empty,
}

impl fmt::Display for SecretError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prefix => "a secret must be written whsec_<base64>, but the prefix whsec_ is missing",
            Self::Base64 => "a secret must be written whsec_<base64>, but what follows whsec_ is not base64",
            Self::Empty => "a secret must be written whsec_<base64>, but nothing follows whsec_",
        })
    }
}

impl std::error::Error for SecretError {}

impl FromStr for Secret {
    type Err = SecretError;

    fn from_str(text: &str) -> Result<Self, SecretError> {
        let encoded = text.strip_prefix("whsec_").ok_or(SecretError::Prefix)?;
        let bytes = LENIENT.decode(encoded).map_err(|_| SecretError::Base64)?;
        if bytes.is_empty() { Err(SecretError::Empty) } else { Ok(Self(bytes.into())) }
    }
}

/// Signs requests. Each secret is expanded once; a request clones the state.
#[derive(Clone)]
pub struct Signer {
    keys: Vec<HmacSha256>,
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signer").field("secrets", &self.keys.len()).finish()
    }
}

impl Signer {
    /// All of the secrets sign, the first one first: that is how one is rotated. `None` without a secret.
    pub fn new(secrets: &[Secret]) -> Option<Self> {
        // HMAC takes keys of every length, so that nothing is filtered out here.
        let keys: Vec<_> =
            secrets.iter().filter_map(|s| HmacSha256::new_from_slice(s.0.expose_secret()).ok()).collect();
        (!keys.is_empty()).then_some(Self { keys })
    }

    /// `webhook-signature`: `v1,<base64 HMAC-SHA256 of "id.timestamp.body">`, one for each secret, separated by
    /// spaces (Standard Webhooks). `timestamp` is in Unix seconds.
    pub fn sign(&self, id: &str, timestamp: i64, body: &[u8]) -> String {
        const LENGTH: usize = "v1,".len() + 44;
        let mut header = String::with_capacity(self.keys.len() * (LENGTH + 1));
        let timestamp = timestamp.to_string();
        for key in &self.keys {
            if !header.is_empty() {
                header.push(' ');
            }
            header.push_str("v1,");
            let mac = mac(key, &[id.as_bytes(), b".", timestamp.as_bytes(), b".", body]);
            STANDARD.encode_string(mac, &mut header);
        }
        header
    }

    /// The hex scheme: `sha256=<hex HMAC-SHA256 of "timestamp.body">`, with the first secret alone, since its
    /// receivers compare the whole value.
    pub fn sign_hex(&self, timestamp: i64, body: &[u8]) -> String {
        let mut header = String::with_capacity("sha256=".len() + 64);
        header.push_str("sha256=");
        if let Some(key) = self.keys.first() {
            for byte in mac(key, &[timestamp.to_string().as_bytes(), b".", body]) {
                let _ = write!(header, "{byte:02x}"); // a String takes every write
            }
        }
        header
    }
}

fn mac(key: &HmacSha256, parts: &[&[u8]]) -> [u8; 32] {
    let mut mac = key.clone();
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC_SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    fn signer(secrets: &[&str]) -> Signer {
        Signer::new(&secrets.iter().map(|s| s.parse().unwrap()).collect::<Vec<_>>()).unwrap()
    }

    /// The vector in the Standard Webhooks libraries' own tests.
    #[test]
    fn standard_webhooks_vector() {
        let signature = signer(&[SPEC_SECRET]).sign(
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1_614_265_330,
            br#"{"test": 2432232314}"#,
        );
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    /// Computed with `openssl dgst -sha256 -mac HMAC`.
    #[test]
    fn hex_vector() {
        let key = format!("whsec_{}", STANDARD.encode("a key of twenty-four by"));
        assert_eq!(
            signer(&[&key]).sign_hex(1_700_000_000, br#"{"a":1}"#),
            "sha256=602d622d069029dcfbe8992fd3f8f4482e08292b89e1c490239a5968d8119c10"
        );
    }

    #[test]
    fn all_secrets_sign_in_order() {
        let second = "whsec_c2Vjb25kIHNlY3JldCBvZiAyNCBieXRlcyE=";
        let both = signer(&[SPEC_SECRET, second]).sign("id", 1, b"x");
        let apart = [signer(&[SPEC_SECRET]).sign("id", 1, b"x"), signer(&[second]).sign("id", 1, b"x")];
        assert_eq!(both, apart.join(" "));
    }

    #[test]
    fn signs_bytes_that_are_not_text() {
        assert!(signer(&[SPEC_SECRET]).sign("id", -1, &[0xff, 0x00]).starts_with("v1,"));
    }

    #[test]
    fn secrets_are_parsed_and_never_shown() {
        assert_eq!("hunter2".parse::<Secret>().unwrap_err(), SecretError::Prefix);
        assert_eq!("whsec_".parse::<Secret>().unwrap_err(), SecretError::Empty);
        let error = "whsec_hunter-2".parse::<Secret>().unwrap_err();
        assert_eq!(error, SecretError::Base64);
        assert!(!format!("{error} {error:?}").contains("hunter"));
        let unpadded: Secret = "whsec_c2VjcmV0IQ".parse().unwrap();
        assert_eq!(unpadded.0.expose_secret(), b"secret!");
        assert!(unpadded.is_weak());
        assert_eq!(format!("{unpadded:?}"), "Secret(redacted)");
        assert_eq!(format!("{:?}", signer(&[SPEC_SECRET])), "Signer { secrets: 1 }");
        assert!(Signer::new(&[]).is_none());
    }
}
