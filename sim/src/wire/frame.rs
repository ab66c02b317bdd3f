//! The store's protocol: length-prefixed frames of plain numbers and texts, little-endian.

use std::io;
use std::time::Duration;

use leasehold::machine::{
    Answer, ClaimFailure, ClaimReply, ClaimRequest, ClaimTerms, DbTime, DestinationKey, Grant, Incarnation,
    LeaseKey, OwnedReply, OwnedRequest, Place, RenewReply, RenewRequest, RowId, Settle, SettleReply,
    SettleRequest, Token, Unsendable, WorkerId,
};
use leasehold::ports::Message;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use turmoil::net::TcpStream;

use crate::statement::{Ask, Reply};

/// Something that goes over the wire. What doesn't decode is the harness's own mistake: it panics.
pub(super) trait Wire: Sized {
    fn put(&self, out: &mut Vec<u8>);
    fn get(from: &mut &[u8]) -> Self;
}

macro_rules! numbers {
    ($($number:ty),*) => {$(
        impl Wire for $number {
            fn put(&self, out: &mut Vec<u8>) {
                out.extend(self.to_le_bytes());
            }

            fn get(from: &mut &[u8]) -> Self {
                let mut bytes = [0; size_of::<$number>()];
                bytes.fill_with(|| byte(from));
                <$number>::from_le_bytes(bytes)
            }
        }
    )*};
}
numbers!(u8, u16, u32, u64, i64);

/// A struct is its fields; the conversion names them.
macro_rules! structs {
    ($($name:path { $($field:ident),* })*) => {$(
        impl Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                $(self.$field.put(out);)*
            }

            fn get(from: &mut &[u8]) -> Self {
                $(let $field = Wire::get(from);)*
                Self { $($field),* }
            }
        }
    )*};
}
structs! {
    ClaimTerms { lease, grace, retry_budget, reclaim_limit, expired, valid_until }
    ClaimRequest { owner, terms, limit, incarnation, probation, share, shares, from, leases_from, count_pending, asleep }
    RenewRequest { owner, lease, keys, wait }
    SettleRequest { owner, entries }
    OwnedRequest { owner }
    LeaseKey { row, token }
    Place { due, row }
    RenewReply { db_now, answers }
    SettleReply { db_now, answers }
    OwnedReply { db_now, keys }
    ClaimReply {
        db_now, incarnation, searched_expired, grants, failed, front, leases_front, next_due_in, any_pending
    }
}

/// Something that is written as something simpler.
macro_rules! as_other {
    ($($name:ty as $other:ty: $put:expr, $get:expr;)*) => {$(
        impl Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                let put: fn(&$name) -> $other = $put;
                put(self).put(out);
            }

            fn get(from: &mut &[u8]) -> Self {
                let get: fn($other) -> $name = $get;
                get(Wire::get(from))
            }
        }
    )*};
}
as_other! {
    bool as u8: |it| u8::from(*it), |it| it != 0;
    Duration as u64: |it| it.as_micros() as u64, Duration::from_micros;
    RowId as i64: |it| it.0, RowId;
    Token as i64: |it| it.0, Token;
    DbTime as i64: |it| it.as_micros(), DbTime::from_micros;
    String as Vec<u8>: |it| it.as_bytes().to_vec(), |it| String::from_utf8(it).unwrap_or_default();
    WorkerId as String: |it| it.as_str().to_owned(), WorkerId::new;
    DestinationKey as String: |it| it.as_str().to_owned(), DestinationKey::new;
    Incarnation as String: |it| it.as_str().to_owned(), Incarnation::new;
    Answer as u8: |it| *it as u8, |it| pick(&[Answer::Applied, Answer::Ended, Answer::Refused, Answer::Skipped], it);
    ClaimFailure as u8: |it| *it as u8, |it| pick(
        &[ClaimFailure::AttemptsSpent, ClaimFailure::ReclaimsSpent, ClaimFailure::AtBound], it
    );
}

fn pick<T: Copy>(of: &[T], at: u8) -> T {
    of[usize::from(at)]
}

fn byte(from: &mut &[u8]) -> u8 {
    let (first, rest) = from.split_first().unwrap_or((&0, &[]));
    *from = rest;
    *first
}

impl<T: Wire> Wire for Vec<T> {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u32).put(out);
        self.iter().for_each(|item| item.put(out));
    }

    fn get(from: &mut &[u8]) -> Self {
        (0..u32::get(from)).map(|_| T::get(from)).collect()
    }
}

impl<T: Wire> Wire for Option<T> {
    fn put(&self, out: &mut Vec<u8>) {
        self.is_some().put(out);
        if let Some(it) = self {
            it.put(out);
        }
    }

    fn get(from: &mut &[u8]) -> Self {
        bool::get(from).then(|| T::get(from))
    }
}

impl<A: Wire, B: Wire> Wire for (A, B) {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        self.1.put(out);
    }

    fn get(from: &mut &[u8]) -> Self {
        let first = A::get(from);
        (first, B::get(from))
    }
}

impl Wire for Grant {
    fn put(&self, out: &mut Vec<u8>) {
        self.key.put(out);
        self.destination.put(out);
        (self.attempts, (self.max_attempts, self.reclaims)).put(out);
        (self.reclaimed, self.unsendable.clone()).put(out);
    }

    fn get(from: &mut &[u8]) -> Self {
        let (key, destination) = Wire::get(from);
        let (attempts, (max_attempts, reclaims)) = Wire::get(from);
        let (reclaimed, unsendable) = Wire::get(from);
        Self { key, destination, attempts, max_attempts, reclaims, reclaimed, unsendable }
    }
}

impl Wire for Unsendable {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::Oversized { bytes } => tagged(0, bytes, out),
            Self::Malformed { error } => tagged(1, error, out),
        }
    }

    fn get(from: &mut &[u8]) -> Self {
        match byte(from) {
            0 => Self::Oversized { bytes: Wire::get(from) },
            _ => Self::Malformed { error: Wire::get(from) },
        }
    }
}

impl Wire for Settle {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::Delivered { status } => {
                0_u8.put(out);
                status.put(out);
            }
            Self::Retry { delay, error, status } => {
                1_u8.put(out);
                delay.put(out);
                error.put(out);
                status.put(out);
            }
            Self::Failed { error, status, tried } => {
                2_u8.put(out);
                error.put(out);
                status.put(out);
                tried.put(out);
            }
            Self::Release { delay } => {
                3_u8.put(out);
                delay.put(out);
            }
        }
    }

    fn get(from: &mut &[u8]) -> Self {
        match byte(from) {
            0 => Self::Delivered { status: Wire::get(from) },
            1 => Self::Retry { delay: Wire::get(from), error: Wire::get(from), status: Wire::get(from) },
            2 => Self::Failed { error: Wire::get(from), status: Wire::get(from), tried: Wire::get(from) },
            _ => Self::Release { delay: Wire::get(from) },
        }
    }
}

impl Wire for Message {
    fn put(&self, out: &mut Vec<u8>) {
        for text in [&self.event_id, &self.event_type, &self.destination_url] {
            text.put(out);
        }
        self.payload.to_vec().put(out);
    }

    fn get(from: &mut &[u8]) -> Self {
        Self {
            event_id: Wire::get(from),
            event_type: Wire::get(from),
            destination_url: Wire::get(from),
            payload: Vec::get(from).into(),
        }
    }
}

impl Wire for Ask {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::Claim(request) => tagged(0, request, out),
            Self::Renew(request) => tagged(1, request, out),
            Self::Settle(request) => tagged(2, request, out),
            Self::Owned(request) => tagged(3, request, out),
        }
    }

    fn get(from: &mut &[u8]) -> Self {
        match byte(from) {
            0 => Self::Claim(Wire::get(from)),
            1 => Self::Renew(Wire::get(from)),
            2 => Self::Settle(Wire::get(from)),
            _ => Self::Owned(Wire::get(from)),
        }
    }
}

impl Wire for Reply {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Self::Claim(reply) => tagged(0, reply, out),
            Self::Renew(reply) => tagged(1, reply, out),
            Self::Settle(reply) => tagged(2, reply, out),
            Self::Owned(reply) => tagged(3, reply, out),
            Self::NotApplied => 4_u8.put(out),
            Self::Permanent => 5_u8.put(out),
        }
    }

    fn get(from: &mut &[u8]) -> Self {
        match byte(from) {
            0 => Self::Claim(Wire::get(from)),
            1 => Self::Renew(Wire::get(from)),
            2 => Self::Settle(Wire::get(from)),
            3 => Self::Owned(Wire::get(from)),
            4 => Self::NotApplied,
            _ => Self::Permanent,
        }
    }
}

fn tagged(tag: u8, body: &impl Wire, out: &mut Vec<u8>) {
    tag.put(out);
    body.put(out);
}

/// Writes one frame.
pub(super) async fn send(stream: &mut TcpStream, body: &impl Wire) -> io::Result<()> {
    let mut frame = vec![0; 4];
    body.put(&mut frame);
    let length = (frame.len() - 4) as u32;
    frame[..4].copy_from_slice(&length.to_le_bytes());
    stream.write_all(&frame).await
}

/// Reads one frame.
pub(super) async fn receive<T: Wire>(stream: &mut TcpStream) -> io::Result<T> {
    let length = stream.read_u32_le().await?;
    let mut frame = vec![0; length as usize];
    stream.read_exact(&mut frame).await?;
    Ok(T::get(&mut frame.as_slice()))
}
