-- Rules P2, P6 and P9. $1 owner, then one array each: $2 ids, $3 tokens, $4 kinds, $5 delays in microseconds, $6 errors,
-- $7 statuses.
with asked as materialized (
    select id, token, kind, delay, error, status
    from unnest($2::bigint[], $3::bigint[], $4::text[], $5::bigint[], $6::text[], $7::int[])
        as asked (id, token, kind, delay, error, status)
),
-- One probe of the index for each row: a join with what is locked would be planned for a few rows, and be quadratic.
locked as materialized (
    select asked.*, event.lease_token, event.lease_owner, event.ctid as version
    from asked join leasehold.outbox_events as event on event.id = asked.id
    for no key update of event skip locked
),
-- The late clock is read once every row is locked.
clock as materialized (
    select leasehold.late_now() as late from (select count(*) from locked) as every_row
),
-- Where it was found when it was locked: no index is asked again. What changed between this statement's beginning and
-- its lock, as by a renewal, is not to be seen there: it is skipped.
settled as (
    update leasehold.outbox_events as event set
        lease_owner = null,
        lease_until = null,
        delivery_status = case kind
            when 'delivered' then 'delivered' when 'failed' then 'failed' when 'untried' then 'failed' else 'pending'
        end,
        attempts = event.attempts + (kind in ('delivered', 'retry', 'failed'))::int,
        reclaims = case kind when 'release' then event.reclaims else 0 end,
        next_attempt_at = case
            when delay is null then event.next_attempt_at
            else (select late from clock) + delay * interval '1 microsecond'
        end,
        last_error = case kind when 'release' then event.last_error else error end,
        last_status = case kind when 'release' then event.last_status else status end,
        delivered_at = case kind when 'delivered' then (select late from clock) else event.delivered_at end,
        updated_at = (select late from clock)
    from locked
    where event.ctid = locked.version and locked.lease_token = locked.token and locked.lease_owner = $1
    returning event.id, event.lease_token
)
-- Mostly every settle is applied, and then this is one row.
select
    (extract(epoch from leasehold.late_now()) * 1000000)::bigint as db_now,
    (select count(*) from settled) as applied,
    other.id,
    other.token,
    other.answer
from (select) as always left join (
    select
        asked.id,
        asked.token,
        case
            when locked.lease_token = asked.token and locked.lease_owner = $1 then 'skipped'
            when locked.lease_token = asked.token and locked.lease_owner is null then 'ended'
            when locked.id is not null then 'refused'
            when exists (select from leasehold.outbox_events as event where event.id = asked.id) then 'skipped'
            else 'refused'
        end as answer
    from asked
    left join locked on locked.id = asked.id and locked.token = asked.token
    -- A row may be asked for under two tokens.
    left join settled on settled.id = asked.id and settled.lease_token = asked.token
    where settled.id is null and (select count(*) from settled) < cardinality($2)
) as other on true
