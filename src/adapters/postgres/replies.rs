//! What the statements answer, as the machine wants it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::error::text;
use crate::adapters::store::{malformed, url_too_long};
use crate::machine::{
    Answer, ClaimFailure, ClaimReply, DbTime, DestinationKey, Grant, Incarnation, LeaseKey, OwnedReply,
    Place, RowId, Token, Unsendable,
};
use crate::ports::{Claimed, Message};

/// The statement names those that were not applied, and how many were.
pub(super) fn read_answers(
    rows: &[PgRow],
    asked: Vec<LeaseKey>,
) -> Result<(DbTime, Vec<(LeaseKey, Answer)>), sqlx::Error> {
    let header = rows.first().ok_or(sqlx::Error::RowNotFound)?;
    let db_now = DbTime::from_micros(header.try_get("db_now")?);
    let applied: i64 = header.try_get("applied")?;
    let mut others = BTreeMap::new();
    for row in rows {
        if let Some(id) = row.try_get("id")? {
            let answer = match row.try_get::<&str, _>("answer")? {
                "ended" => Answer::Ended,
                "refused" => Answer::Refused,
                _ => Answer::Skipped,
            };
            others.insert(LeaseKey { row: RowId(id), token: Token(row.try_get("token")?) }, answer);
        }
    }
    if usize::try_from(applied).ok() != asked.len().checked_sub(others.len()) {
        let error = format!("{} answers and {applied} applied of {}", others.len(), asked.len());
        return Err(sqlx::Error::Protocol(error));
    }
    let answer = |key| (key, others.get(&key).copied().unwrap_or(Answer::Applied));
    Ok((db_now, asked.into_iter().map(answer).collect()))
}

/// The leases that a look found.
pub(super) fn read_owned(rows: &[PgRow]) -> Result<OwnedReply, sqlx::Error> {
    let mut reply = OwnedReply { db_now: DbTime::default(), keys: Vec::new() };
    for row in rows {
        reply.db_now = DbTime::from_micros(row.try_get("db_now")?);
        if let (Some(id), Some(token)) = (row.try_get("id")?, row.try_get("token")?) {
            reply.keys.push(LeaseKey { row: RowId(id), token: Token(token) });
        }
    }
    Ok(reply)
}

/// The one row of a claim's reply, wherever it stands, that says what is said once. The others are an event each.
fn header(rows: &[PgRow]) -> Result<&PgRow, sqlx::Error> {
    for row in rows {
        if row.try_get::<Option<i64>, _>("db_now")?.is_some() {
            return Ok(row);
        }
    }
    Err(sqlx::Error::RowNotFound)
}

/// Whether there was more to be claimed than the front of the queue.
pub(super) fn beyond_front(rows: &[PgRow]) -> Result<bool, sqlx::Error> {
    header(rows)?.try_get("beyond_front")
}

/// Which destination a claim came to beyond the front of the queue, unless that was the end of its lap, and whether it
/// found anything there.
pub(super) fn read_walk(rows: &[PgRow]) -> Result<(Option<String>, bool), sqlx::Error> {
    let header = header(rows)?;
    Ok((header.try_get("walk_last")?, header.try_get("walk_found")?))
}

/// What a claim took, or the look in its place found.
pub(super) fn read_claim(rows: &[PgRow]) -> Result<Claimed, sqlx::Error> {
    let header = header(rows)?;
    let next_due_in: Option<i64> = header.try_get("next_due_in")?;
    let front = Place {
        due: DbTime::from_micros(header.try_get("front_due")?),
        row: RowId(header.try_get("front_id")?),
    };
    let mut reply = ClaimReply {
        db_now: DbTime::from_micros(header.try_get("db_now")?),
        incarnation: Incarnation::new(header.try_get::<String, _>("incarnation")?),
        searched_expired: header.try_get::<Option<bool>, _>("searched")?.unwrap_or(false),
        grants: Vec::new(),
        failed: Vec::new(),
        front: Some(front),
        leases_front: header.try_get::<Option<i64>, _>("leases_front")?.map(Token),
        next_due_in: next_due_in.map(|micros| Duration::from_micros(u64::try_from(micros).unwrap_or(0))),
        any_pending: None,
    };
    let mut found = Vec::with_capacity(rows.len());
    for row in rows {
        if let Some(id) = row.try_get::<Option<i64>, _>("id")? {
            found.push((row.try_get::<f64, _>("due")?, id, row));
        }
    }
    found.sort_unstable_by(|(due, id, _), (other, other_id, _)| due.total_cmp(other).then(id.cmp(other_id)));
    let mut messages = Vec::with_capacity(found.len());
    for (_, id, row) in found {
        match row.try_get::<Option<&str>, _>("spent")? {
            Some("attempts") => reply.failed.push((RowId(id), ClaimFailure::AttemptsSpent)),
            Some("reclaims") => reply.failed.push((RowId(id), ClaimFailure::ReclaimsSpent)),
            Some(_) => reply.failed.push((RowId(id), ClaimFailure::AtBound)),
            None => {
                let key = LeaseKey { row: RowId(id), token: Token(row.try_get("lease_token")?) };
                let (grant, message) = read_event(row, key);
                reply.grants.push(grant);
                messages.push(Arc::new(message));
            }
        }
    }
    Ok(Claimed { reply, messages })
}

/// Reads one event; what doesn't decode makes this event unsendable and harms no other (rule P6).
fn read_event(row: &PgRow, key: LeaseKey) -> (Grant, Message) {
    let event_id = || row.try_get("event_id").unwrap_or_default();
    if let Ok(None) = row.try_get::<Option<&str>, _>("destination_url") {
        return malformed(key, event_id(), url_too_long());
    }
    let read = || -> Result<(Grant, Message), sqlx::Error> {
        let number =
            |name: &str| row.try_get::<i32, _>(name).map(|number| u32::try_from(number).unwrap_or(0));
        let body: Option<String> = row.try_get("body")?;
        let bytes = u64::try_from(row.try_get::<i32, _>("bytes")?).unwrap_or(0);
        let grant = Grant {
            key,
            destination: DestinationKey::new(row.try_get::<String, _>("destination_key")?),
            attempts: number("attempts")?,
            max_attempts: number("max_attempts")?,
            reclaims: number("reclaims")?,
            reclaimed: row.try_get("reclaimed")?,
            unsendable: body.is_none().then_some(Unsendable::Oversized { bytes }),
        };
        let message = Message {
            event_id: row.try_get("event_id")?,
            event_type: row.try_get("event_type")?,
            destination_url: row.try_get("destination_url")?,
            payload: Bytes::from(body.unwrap_or_default()),
        };
        Ok((grant, message))
    };
    read().unwrap_or_else(|error| malformed(key, event_id(), text(&error)))
}
