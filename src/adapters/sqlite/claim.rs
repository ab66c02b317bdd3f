//! The claim on SQLite: rules P1, P11 and P13 within one `BEGIN IMMEDIATE`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sqlx::sqlite::SqliteRow;
use sqlx::{Row as _, SqliteConnection};

use super::{INCARNATION, Sqlite, micros, text};
use crate::adapters::store::{CLAIM_BYTES, LONGEST_URL, WALK, Walk, malformed, url_too_long};
use crate::machine::{
    ClaimAnswer, ClaimReply, ClaimRequest, DbClock, DbTime, DestinationKey, Grant, Incarnation, Lease,
    LeaseKey, Row, RowId, Status, Token, Unsendable, WorkerId,
};
use crate::ports::{Claimed, Message};

const FRESH: &str = "delivery_status = 'pending' and lease_owner is null and reclaims < 3";

/// A destination key as it is stored: nothing makes sure that a text is UTF-8, and one that isn't must not fail the claim
/// of all (rule P6).
pub(super) type Key = Vec<u8>;

/// A row that a claim may take.
struct Candidate {
    id: i64,
    destination: Key,
    probation: bool,
}

/// What is still free for this claim.
struct Room {
    limit: usize,
    share: u32,
    shares: BTreeMap<Key, u32>,
    probation: u32,
    picked: Vec<i64>,
}

impl Room {
    fn left(&mut self, destination: &Key) -> &mut u32 {
        self.shares.entry(destination.clone()).or_insert(self.share)
    }

    fn pick(&mut self, candidate: Candidate) {
        let full = self.is_full_for(candidate.probation);
        let left = self.left(&candidate.destination);
        if !full && *left > 0 {
            *left -= 1;
            self.probation -= u32::from(candidate.probation);
            self.picked.push(candidate.id);
        }
    }

    fn is_full(&self) -> bool {
        self.picked.len() >= self.limit
    }

    fn is_full_for(&self, probation: bool) -> bool {
        self.is_full() || (probation && self.probation == 0)
    }
}

/// Picks in the order of time, page by page, so that rows of a destination that has its share hide no others.
/// In `of`, `?1` is now.
async fn pick_all(
    connection: &mut SqliteConnection,
    of: &str,
    probation: bool,
    now: i64,
    room: &mut Room,
) -> Result<(), sqlx::Error> {
    let sql = format!(
        "select id, destination_key, next_attempt_at from ({of})
         where (next_attempt_at, id) > (?2, ?3) order by next_attempt_at, id limit ?4"
    );
    let page = i64::try_from(room.limit).unwrap_or(i64::MAX).max(100);
    let mut seen = (i64::MIN, i64::MIN);
    while !room.is_full_for(probation) {
        let rows: Vec<(i64, Key, i64)> = sqlx::query_as(sqlx::AssertSqlSafe(sql.clone()))
            .bind(now)
            .bind(seen.0)
            .bind(seen.1)
            .bind(page)
            .fetch_all(&mut *connection)
            .await?;
        let Some((id, _, at)) = rows.last() else { break };
        seen = (*at, *id);
        for (id, destination, _) in rows {
            room.pick(Candidate { id, destination, probation });
        }
    }
    Ok(())
}

/// What is to be taken, and whether there may be more that was not come to.
async fn pick(
    connection: &mut SqliteConnection,
    request: &ClaimRequest,
    now: i64,
    search: bool,
    walk: &mut Walk<Key>,
) -> Result<(Vec<i64>, bool), sqlx::Error> {
    let limit = i64::from(request.limit);
    let mut room = Room {
        limit: request.limit as usize,
        share: request.share,
        shares: request.shares.iter().map(|(key, room)| (key.as_str().into(), *room)).collect(),
        probation: request.probation,
        picked: Vec::new(),
    };
    let grace = micros(request.terms.grace);
    // Without a search, no row that is leased.
    let expired = format!(
        "select id, destination_key, next_attempt_at from outbox_events where lease_owner is not null and {search}
         and lease_until + {grace} <= ?1 and next_attempt_at <= ?1"
    );
    if search {
        pick_all(connection, &format!("{expired} and reclaims < 2"), false, now, &mut room).await?;
    }
    let suspects = format!(
        "{expired} and reclaims >= 2 union all select id, destination_key, next_attempt_at from outbox_events
         where delivery_status = 'pending' and lease_owner is null and reclaims >= 3 and next_attempt_at <= ?1"
    );
    pick_all(connection, &suspects, true, now, &mut room).await?;
    let fresh = format!(
        "select id, destination_key from outbox_events where {FRESH} and next_attempt_at <= ?1
         order by next_attempt_at, id limit ?2"
    );
    let fresh: Vec<(i64, Key)> =
        sqlx::query_as(sqlx::AssertSqlSafe(fresh)).bind(now).bind(limit).fetch_all(&mut *connection).await?;
    let cut_off = fresh.len() as i64 == limit;
    let seen: Vec<i64> = fresh.iter().map(|(id, _)| *id).collect();
    for (id, destination) in fresh {
        room.pick(Candidate { id, destination, probation: false });
    }
    let more = if cut_off && !room.is_full() {
        reach_past(connection, now, &seen, &mut room, walk).await?
    } else {
        false
    };
    Ok((room.picked, more))
}

/// The front of the queue belongs to destinations that have their share: looks at each destination on its own. Answers
/// whether it came to no end.
async fn reach_past(
    connection: &mut SqliteConnection,
    now: i64,
    seen: &[i64],
    room: &mut Room,
    walk: &mut Walk<Key>,
) -> Result<bool, sqlx::Error> {
    let next = format!(
        "select destination_key from outbox_events where {FRESH} and destination_key > cast(? as text)
         order by destination_key limit 1"
    );
    let of = format!(
        "select id from outbox_events where {FRESH} and destination_key = cast(? as text) and next_attempt_at <= ?
         order by next_attempt_at, id limit ?"
    );
    let picked = room.picked.len();
    let mut last = walk.last.clone();
    let mut around = last < walk.end;
    let mut steps = 0;
    let came_to = loop {
        if steps == WALK || room.is_full() {
            break Some(last);
        }
        let found: Option<Key> = sqlx::query_scalar(sqlx::AssertSqlSafe(next.clone()))
            .bind(&last)
            .fetch_optional(&mut *connection)
            .await?;
        let destination = match found {
            Some(key) if !around || key <= walk.end => key,
            // Behind the last one by name comes the empty name, and with it the first one.
            None if !around => Key::new(),
            _ => break None,
        };
        around |= destination.is_empty();
        steps += 1;
        let left = *room.left(&destination);
        if left > 0 {
            let ids: Vec<i64> = sqlx::query_scalar(sqlx::AssertSqlSafe(of.clone()))
                .bind(&destination)
                .bind(now)
                .bind(i64::from(left) + seen.len() as i64)
                .fetch_all(&mut *connection)
                .await?;
            for id in ids.into_iter().filter(|id| !seen.contains(id)) {
                room.pick(Candidate { id, destination: destination.clone(), probation: false });
            }
        }
        last = destination;
    };
    let cut_off = came_to.is_some() && !room.is_full();
    walk.went(came_to, room.picked.len() > picked);
    Ok(cut_off)
}

pub(super) async fn claim(store: &Sqlite, request: &ClaimRequest) -> Result<Claimed, sqlx::Error> {
    let mut write = store.write(false).await?;
    let now = write.now;
    let connection = &mut *write.transaction;
    let known = request.incarnation.as_ref().is_some_and(|known| known.as_str() == INCARNATION);
    let valid = request.terms.valid(now);
    let search = request.terms.expired && known && valid;
    let mut reply = ClaimReply {
        db_now: now,
        incarnation: Incarnation::new(INCARNATION),
        searched_expired: search,
        grants: Vec::new(),
        failed: Vec::new(),
        // What was claimed leaves its indexes at once.
        front: None,
        leases_front: None,
        next_due_in: None,
        any_pending: None,
    };
    let mut messages = Vec::new();
    let mut bytes = 0;
    let mut walk = store.walk.lock().await;
    let (picked, more) = if valid {
        pick(connection, request, now.as_micros(), search, &mut walk).await?
    } else {
        (Vec::new(), false)
    };
    reply.next_due_in = more.then_some(Duration::ZERO);
    for id in picked {
        let row = sqlx::query(
            "select event_id, event_type, destination_key, payload, attempts, max_attempts, next_attempt_at, reclaims,
                 lease_token, lease_until, cast(lease_owner as blob) as lease_owner,
                 iif(octet_length(destination_url) <= ?2, destination_url, null) as destination_url,
                 length(cast(payload as blob)) as bytes
             from outbox_events where id = ?1",
        )
        .bind(id)
        .bind(i64::try_from(LONGEST_URL).unwrap_or(i64::MAX))
        .fetch_one(&mut *connection)
        .await?;
        let size = u64::try_from(row.try_get::<i64, _>("bytes")?).unwrap_or(0);
        let sendable = size <= store.options.max_payload;
        if sendable && !messages.is_empty() && bytes + size > CLAIM_BYTES.unsigned_abs() {
            reply.next_due_in = Some(Duration::ZERO);
            break;
        }
        bytes += if sendable { size } else { 0 };
        let mut event = read_row(&row)?;
        match event.claim(DbClock { early: now, late: now }, &request.owner, &request.terms) {
            // Picked by the same terms.
            ClaimAnswer::NotEligible => continue,
            ClaimAnswer::Failed(failure) => reply.failed.push((RowId(id), failure)),
            ClaimAnswer::Granted { token, reclaimed } => {
                let unsendable = (!sendable).then_some(Unsendable::Oversized { bytes: size });
                let (grant, message) =
                    read_event(&row, LeaseKey { row: RowId(id), token }, &event, reclaimed, unsendable);
                reply.grants.push(grant);
                messages.push(Arc::new(message));
            }
        }
        write_claimed(connection, id, &event, now).await?;
    }
    if reply.next_due_in.is_none() && reply.grants.len() + reply.failed.len() < request.limit as usize {
        let next: Option<i64> = sqlx::query_scalar(sqlx::AssertSqlSafe(format!(
            "select next_attempt_at from outbox_events where {FRESH} and next_attempt_at > ?
             order by next_attempt_at limit 1"
        )))
        .bind(now.as_micros())
        .fetch_optional(&mut *connection)
        .await?;
        reply.next_due_in = next.map(|next| DbTime::from_micros(next).since(now));
    }
    if request.count_pending {
        // Three looks, each by an index of its own.
        let any = sqlx::query_scalar(
            "select exists (select 1 from outbox_events
                 where delivery_status = 'pending' and lease_owner is null and reclaims < 3)
             or exists (select 1 from outbox_events
                 where delivery_status = 'pending' and lease_owner is null and reclaims >= 3)
             or exists (select 1 from outbox_events where lease_owner is not null)",
        );
        reply.any_pending = Some(any.fetch_one(&mut *connection).await?);
    }
    write.transaction.commit().await?;
    Ok(Claimed { reply, messages })
}

/// What decides a claim. The pending are claimed alone, and what their last attempt left is not read.
fn read_row(row: &SqliteRow) -> Result<Row, sqlx::Error> {
    let time = |name: &str| row.try_get(name).map(DbTime::from_micros);
    // What the table's checks allow fits.
    let count =
        |name: &str| row.try_get::<i64, _>(name).map(|count| u32::try_from(count).unwrap_or(u32::MAX));
    let owner: Option<Key> = row.try_get("lease_owner")?;
    let lease = match owner {
        Some(owner) => Some(Lease {
            owner: WorkerId::new(String::from_utf8_lossy(&owner).into_owned()),
            until: time("lease_until")?,
        }),
        None => None,
    };
    let event = Row::new(count("max_attempts")?, time("next_attempt_at")?);
    Ok(Row {
        attempts: count("attempts")?,
        reclaims: count("reclaims")?,
        token: Token(row.try_get("lease_token")?),
        lease,
        ..event
    })
}

/// Writes what a claim changes.
async fn write_claimed(
    connection: &mut SqliteConnection,
    id: i64,
    event: &Row,
    now: DbTime,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update outbox_events set delivery_status = iif(?2, 'failed', 'pending'), lease_token = ?3, reclaims = ?4,
             lease_owner = ?5, lease_until = ?6, last_error = coalesce(?7, last_error), updated_at = ?8
         where id = ?1",
    )
    .bind(id)
    .bind(event.status == Status::Failed)
    .bind(event.token.0)
    .bind(event.reclaims)
    .bind(event.lease.as_ref().map(|lease| lease.owner.as_str()))
    .bind(event.lease.as_ref().map(|lease| lease.until.as_micros()))
    .bind(event.last_error.as_deref())
    .bind(now.as_micros())
    .execute(connection)
    .await?;
    Ok(())
}

/// Reads what is to be sent; what doesn't decode makes this event unsendable and harms no other (rule P6).
fn read_event(
    row: &SqliteRow,
    key: LeaseKey,
    event: &Row,
    reclaimed: bool,
    unsendable: Option<Unsendable>,
) -> (Grant, Message) {
    let event_id = || row.try_get("event_id").unwrap_or_default();
    if let Ok(None) = row.try_get::<Option<&str>, _>("destination_url") {
        return malformed(key, event_id(), url_too_long());
    }
    let read = || -> Result<(Grant, Message), sqlx::Error> {
        let payload = match &unsendable {
            None => Bytes::from(row.try_get::<String, _>("payload")?),
            Some(_) => Bytes::new(),
        };
        let message = Message {
            event_id: row.try_get("event_id")?,
            event_type: row.try_get("event_type")?,
            destination_url: row.try_get("destination_url")?,
            payload,
        };
        let grant = Grant {
            key,
            destination: DestinationKey::new(row.try_get::<String, _>("destination_key")?),
            attempts: event.attempts,
            max_attempts: event.max_attempts,
            reclaims: event.reclaims,
            reclaimed,
            unsendable,
        };
        Ok((grant, message))
    };
    read().unwrap_or_else(|error| malformed(key, event_id(), text(&error)))
}
