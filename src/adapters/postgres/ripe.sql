-- Locks the delivered events of a page that are old enough. One without a time of delivery, as from a table of another
-- kind, is as old as its last change. $1 the id before the page, $2 its rows, $3 the age in microseconds.
with page as materialized (
    select id, delivery_status, coalesce(delivered_at, updated_at) as delivered_at, created_at
    from leasehold.outbox_events
    where id > $1
    order by id
    limit $2
),
ripe as materialized (
    select event.id, coalesce(event.delivered_at, event.updated_at) as delivered_at
    from leasehold.outbox_events as event
    where event.id = any (array(
        select id from page
        where delivery_status = 'delivered'
            and delivered_at <= leasehold.early_now() - $3 * interval '1 microsecond'
    ))
        -- Again, since it is looked at anew once it is locked: it may have been set back to pending.
        and event.delivery_status = 'delivered'
        and coalesce(event.delivered_at, event.updated_at) <= leasehold.early_now() - $3 * interval '1 microsecond'
    order by event.id
    for update skip locked
)
select
    array(select id from ripe) as ids,
    array(select distinct to_char(delivered_at at time zone 'UTC', 'YYYYMMDD') from ripe) as days,
    case
        -- Ids rise with time: behind a page that is too young as a whole there is nothing to be found.
        when count(*) = $2 and min(created_at) <= leasehold.early_now() - $3 * interval '1 microsecond' then max(id)
        else 0
    end as next
from page
