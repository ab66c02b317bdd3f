-- Rules P2 and P5. $1 owner, $2 ids, $3 tokens, $4 L in microseconds. Writes `lease_until` alone, so that it is HOT.
with asked as materialized (
    select id, token from unnest($2::bigint[], $3::bigint[]) as asked (id, token)
),
-- One probe of the index for each row: a join with what is locked would be planned for a few rows, and be quadratic.
locked as materialized (
    select event.id, event.lease_token, event.lease_owner, asked.token
    from asked join leasehold.outbox_events as event on event.id = asked.id
    order by event.id
    for no key update of event /* skip locked */
),
renewed as (
    update leasehold.outbox_events as event
    set lease_until = greatest(event.lease_until, leasehold.late_now() + $4 * interval '1 microsecond')
    from locked
    where event.id = locked.id and locked.lease_token = locked.token and locked.lease_owner = $1
    returning event.id, event.lease_token
)
-- Mostly every lease is renewed, and then this is one row.
select
    (extract(epoch from leasehold.late_now()) * 1000000)::bigint as db_now,
    (select count(*) from renewed) as applied,
    other.id,
    other.token,
    other.answer
from (select) as always left join (
    select
        asked.id,
        asked.token,
        case
            when locked.id is not null and locked.lease_token = asked.token and locked.lease_owner is null then 'ended'
            when locked.id is not null then 'refused'
            when exists (select from leasehold.outbox_events as event where event.id = asked.id) then 'skipped'
            else 'refused'
        end as answer
    from asked
    left join locked on locked.id = asked.id and locked.token = asked.token
    -- A row may be asked for under two tokens.
    left join renewed on renewed.id = asked.id and renewed.lease_token = asked.token
    where renewed.id is null
) as other on true
