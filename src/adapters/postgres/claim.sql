-- Rules P1, P10, P11, P13 in one statement. $1 owner, $2 L and $3 G in microseconds, $4 search for expired leases,
-- $5 the incarnation known, $6 reclaim limit, $7 retry budget, $8 limit, $9 room for events on probation, $10 share per
-- destination, $11 and $12 destinations with leases held and their room, $13 largest payload, $14 payload in all,
-- $15 and $16 errors of what it fails, $17 and $18 the due time in microseconds and the id ahead of which fresh events
-- are passed over, $19 the token below which leases are, $20 the time in microseconds after which it is too late to
-- begin, or to have its locks: this takes nothing then (rule P7). $21 the destination behind which the walk over those
-- beyond the front goes on, $22 the one at which its lap ends, $23 how many it comes to at most. $24 longest URL.
-- $25 error of what it fails for a number at its bound.
--
-- Mostly there is nothing to be claimed but the front of the queue. The statement for that is this one without what stands
-- between `--[` and `--]`, and with what stands behind `--|` in its place: should there be more, it takes nothing and says
-- so, and the whole one follows.
with recursive
server as materialized (
    select
        leasehold.early_now() as early,
        leasehold.incarnation() as incarnation,
        leasehold.late_now() - pg_postmaster_start_time() as up,
        valid_until,
        leasehold.early_now() <= valid_until as valid
    from (select coalesce('epoch'::timestamptz + $20 * interval '1 microsecond', 'infinity') as valid_until) as term
),
search as materialized (
    select $4 and incarnation = $5 and up >= $2 * interval '1 microsecond' and valid as expired,
        early - $3 * interval '1 microsecond' as ran_out
    from server
),
rooms as materialized (
    select key, room from unnest($11::text[], $12::int[]) as held (key, room)
),
--[
-- Expired leases: the search reads every lease from $19 on, so it is made seldom (rule P10), and what it compares with
-- is computed once.
run_out as materialized (
    select id, destination_key, next_attempt_at, payload_bytes as bytes, reclaims + 1 >= 3 as probation,
        row_number() over (partition by destination_key, reclaims + 1 >= 3 order by next_attempt_at, id) as nth
    from leasehold.outbox_events
    where lease_owner is not null
        and $4
        and (select expired from search)
        and lease_token >= $19
        and lease_until <= (select ran_out from search)
        and next_attempt_at <= (select early from server)
        and destination_key <> all (array(select key from rooms where room <= 0))
),
expired as materialized (
    select id, destination_key, next_attempt_at, bytes, 0 as turn, false as probation
    from run_out left join rooms on rooms.key = destination_key
    where not probation and nth <= coalesce(room, $10)
    order by next_attempt_at, id
    limit $8
),
-- Destinations that have their share with the above.
filled as materialized (
    select destination_key from expired left join rooms on rooms.key = destination_key
    group by destination_key, room
    having count(*) >= coalesce(room, $10)
),
--]
probation as materialized (
    select id, destination_key, next_attempt_at, bytes, 1 as turn, true as probation
    from (
        --[
        select id, destination_key, next_attempt_at, bytes from run_out
        where probation and destination_key <> all (array(select destination_key from filled))
        union all
        --]
        (
            select id, destination_key, next_attempt_at, payload_bytes as bytes
            from leasehold.outbox_events
            where delivery_status = 'pending' and lease_owner is null and reclaims >= 3
                and next_attempt_at <= leasehold.early_now()
                and destination_key <> all (array(select key from rooms where room <= 0))
                --[
                and destination_key <> all (array(select destination_key from filled))
                --]
                and $9 > 0 and (select valid from server)
            order by next_attempt_at, id
            limit $9
        )
    ) as suspect
    order by next_attempt_at, id
    limit $9
),
-- The front of the queue, whoever it is for, without what others have locked: claims that meet there take a part each.
-- To leave out the rows of full destinations here would be to read all of their backlog at every claim: they count
-- towards the limit, and what they displace is reached further below. To start at the beginning would be to step over all
-- that was claimed since the oldest transaction still open began: until it ends, their index entries stay.
fresh as materialized (
    select id, destination_key, next_attempt_at, payload_bytes as bytes, 2 as turn, false as probation,
        attempts, max_attempts, reclaims, lease_token, false as reclaimed, ctid as version
    from leasehold.outbox_events
    where delivery_status = 'pending' and lease_owner is null and reclaims < 3
        and next_attempt_at <= leasehold.early_now()
        and (next_attempt_at, id) >=
            (coalesce('epoch'::timestamptz + $17 * interval '1 microsecond', '-infinity'), $18)
    order by next_attempt_at, id
    limit case when (select valid from server) then $8 else 0 end
    for no key update skip locked
),
--[
found as materialized (
    -- Of what isn't locked yet, the last six are read when it is.
    select *, 0 as attempts, 0 as max_attempts, 0 as reclaims, 0::bigint as lease_token, false as reclaimed,
        null::tid as version
    from probation
    union all
    select *, 0, 0, 0, 0, false, null from expired
    union all
    select * from fresh
),
--]
-- Destinations of which more was found than there is room for. Mostly there are none, so that nothing is numbered.
crowded as materialized (
    select destination_key, coalesce(room, $10) as room
    from (
        select destination_key, count(*) as events
        --[
        from found
        --]
        --| from fresh
        group by destination_key
    ) as destination
    left join rooms on rooms.key = destination_key
    where events > coalesce(room, $10)
),
-- Whether there is more to be claimed than the front of the queue, or that is too much in bytes.
beyond as materialized (
    select exists (select from crowded) or exists (select from probation)
        or (select coalesce(sum(bytes), 0) from fresh where bytes <= $13) > $14 as front
),
--[
first_picked as (
    select id, destination_key, next_attempt_at, bytes, turn, probation, attempts, max_attempts, reclaims, lease_token,
        reclaimed, version
    from found
    where destination_key <> all (array(select destination_key from crowded))
    union all
    select id, destination_key, next_attempt_at, bytes, turn, probation, attempts, max_attempts, reclaims, lease_token,
        reclaimed, version
    from (
        select found.*, room,
            row_number() over (partition by destination_key order by turn, next_attempt_at, id) as nth
        from found join crowded using (destination_key)
    ) as numbered
    where nth <= room
    order by turn, next_attempt_at, id
    limit $8
),
-- The front of the queue was cut off, and shares left some of it out: reach past the destinations that have theirs, by
-- one index probe for each destination, going on where the last claim left off.
taken as materialized (
    select destination_key, count(*) as events from first_picked group by destination_key
),
missing as materialized (
    select case
        when exists (select from crowded) and (select count(*) from fresh) = $8
            then $8 - (select count(*) from first_picked)
        else 0
    end as events
),
-- Looked up by key, not joined: a plan that knows nothing of how many there are compares each with each.
seats as materialized (
    select (select jsonb_object_agg(key, room) from rooms) as rooms,
        (select jsonb_object_agg(destination_key, events) from taken) as taken
),
-- Behind the last destination by name comes the empty name, and with it the first one.
destinations as (
    select $21::text collate "C" as destination_key, 0 as step, $21::text collate "C" < $22 as around
    where (select events from missing) > 0
    union all
    select coalesce(next.destination_key, ''), step + 1, around or next.destination_key is null
    from destinations
    left join lateral (
        select event.destination_key
        from leasehold.outbox_events as event
        where event.delivery_status = 'pending' and event.lease_owner is null and event.reclaims < 3
            and (event.next_attempt_at, event.id) >=
                (coalesce('epoch'::timestamptz + $17 * interval '1 microsecond', '-infinity'), $18)
            and event.destination_key > destinations.destination_key
        order by event.destination_key
        limit 1
    ) as next on true
    where step < $23 and case
        when next.destination_key is null then not around
        when around then next.destination_key <= $22
        else true
    end
),
more as materialized (
    select event.*, destinations.step, destinations.destination_key
    from destinations
    cross join seats
    cross join lateral (
        select id, next_attempt_at, payload_bytes as bytes, attempts, max_attempts, reclaims, lease_token,
            ctid as version
        from leasehold.outbox_events
        where delivery_status = 'pending' and lease_owner is null and reclaims < 3
            and next_attempt_at <= leasehold.early_now()
            -- Not `=`: then the index on the due time alone would give this order too, and read the backlog of others.
            and outbox_events.destination_key between destinations.destination_key and destinations.destination_key
            and (next_attempt_at, id) >=
                (coalesce('epoch'::timestamptz + $17 * interval '1 microsecond', '-infinity'), $18)
            and id <> all (array(select first_picked.id from first_picked))
        order by outbox_events.destination_key, next_attempt_at, id
        limit greatest(
            coalesce((seats.rooms ->> destinations.destination_key)::int, $10)
                - coalesce((seats.taken ->> destinations.destination_key)::int, 0),
            0
        )
        for no key update skip locked
    ) as event
    where destinations.step > 0
    limit (select events from missing)
),
-- The last destination of the walk, unless that came to the end of its lap.
walk as materialized (
    select exists (select from more) as found, case
        when (select count(*) from more) < (select events from missing)
            then (select destination_key from destinations where step = $23)
        else (select destination_key from more order by step desc limit 1)
    end as last
),
-- Leases and events on probation had to be ranked before they could be locked. What others have locked is left out;
-- what changed since is seen as it is now.
ranked as materialized (
    select event.id, event.attempts, event.max_attempts, event.next_attempt_at, event.reclaims, event.lease_token,
        event.lease_owner is not null as reclaimed, event.payload_bytes as bytes, event.ctid as version
    from leasehold.outbox_events as event
    where event.id = any (array(select id from first_picked where turn < 2))
        and event.delivery_status = 'pending'
        and event.next_attempt_at <= leasehold.early_now()
        and (
            event.lease_owner is null
            or (select expired from search)
                and event.lease_until <= leasehold.early_now() - $3 * interval '1 microsecond'
        )
        and (
            event.reclaims + (event.lease_owner is not null)::int < 3
            or event.id = any (array(select id from first_picked where probation))
        )
    for no key update skip locked
),
-- No payload goes through the steps: only its size.
locked as (
    select id, attempts, max_attempts, next_attempt_at, reclaims, lease_token, reclaimed, bytes, version
    from first_picked
    where turn = 2
    union all
    select id, attempts, max_attempts, next_attempt_at, reclaims, lease_token, false, bytes, version from more
    union all
    select * from ranked
),
sized as materialized (
    select locked.*,
        sum(case when bytes <= $13 then bytes else 0 end) over claim_order as total,
        row_number() over claim_order as place
    from locked
    window claim_order as (order by next_attempt_at, id rows unbounded preceding)
),
--]
-- The late clock is read once every row is locked.
clock as materialized (
    select late, late + $2 * interval '1 microsecond' as until,
        (extract(epoch from date_trunc('milliseconds', late)) * 1000)::bigint as millis, rows, allowed
    from (
        select leasehold.late_now() as late, rows, allowed
        from (
            --[
            select count(*) as rows, count(*) filter (where place = 1 or total <= $14) as allowed from sized
            --]
            --| select count(*) as rows, count(*) as allowed from fresh
        ) as every_row
    ) as read
),
granted as (
    select pick.*,
        case
            when attempts >= case when $7 = 0 then max_attempts else least(max_attempts, $7::bigint + 1) end then 'attempts'
            when $6 > 0 and reclaims + reclaimed::int > $6 then 'reclaims'
            -- The table would refuse what comes next, and with it all that this claims. The last token is left for a
            -- claim that fails the event.
            when lease_token + 1 >= 4611686018427387904 or reclaims + reclaimed::int > 1000000000 then 'bound'
        end as spent
    --[
    from sized as pick
    where (place = 1 or total <= $14)
    --]
    --| from fresh as pick
    --| where not (select front from beyond)
        and (select late from clock) <= (select valid_until from server)
),
-- Where it was found when it was locked: no index is asked again. What changed between this statement's beginning and
-- its lock is not to be seen there, and is left for the next claim.
claimed as (
    update leasehold.outbox_events as event set
        lease_token = case
            when spent is not null and not reclaimed then event.lease_token
            else least(greatest(event.lease_token + 1, (select millis from clock)), 4611686018427387904)
        end,
        lease_owner = case when spent is null then $1 end,
        lease_until = case when spent is null then (select until from clock) end,
        reclaims = least(event.reclaims + reclaimed::int, 1000000000),
        delivery_status = case when spent is null then 'pending' else 'failed' end,
        last_error = case spent
            when 'attempts' then $15 when 'reclaims' then $16 when 'bound' then $25 else event.last_error
        end,
        updated_at = (select late from clock)
    from granted
    where event.ctid = granted.version
    -- In seconds, to be sorted by: as exact as its microseconds.
    returning event.id, event.lease_token, event.reclaims, spent, reclaimed,
        date_part('epoch', event.next_attempt_at) as due, event.event_id, event.event_type,
        -- Nothing else that is returned can be long: the table sees to it.
        case when octet_length(event.destination_url) <= $24 then event.destination_url end as destination_url,
        event.destination_key, event.attempts, event.max_attempts, bytes,
        case when spent is null and bytes <= $13 then event.payload::text end as body
),
-- The front of the queue as this claim leaves it, locked or not: where the next one may start.
front as materialized (
    select next_attempt_at as due, id
    from leasehold.outbox_events
    where delivery_status = 'pending' and lease_owner is null and reclaims < 3
        and next_attempt_at <= leasehold.early_now()
        and (next_attempt_at, id) >=
            (coalesce('epoch'::timestamptz + $17 * interval '1 microsecond', '-infinity'), $18)
        and id not in (select claimed.id from claimed)
    order by next_attempt_at, id
    limit 1
),
header as materialized (
    select
        (extract(epoch from leasehold.late_now()) * 1000000)::bigint as db_now,
        (extract(epoch from coalesce(front.due, server.early)) * 1000000)::bigint as front_due,
        coalesce(front.id, 9223372036854775807) as front_id,
        case when search.expired then coalesce(
            (
                select lease_token from leasehold.outbox_events
                where lease_owner is not null and lease_token >= $19
                order by lease_token
                limit 1
            ),
            9223372036854775807
        ) end as leases_front,
        server.incarnation,
        search.expired as searched,
        (select front from beyond) as beyond_front,
        --[
        walk.last as walk_last,
        walk.found as walk_found,
        --]
        case
        -- Cut off by the bytes: there is more, and it is due.
        when clock.allowed < clock.rows then 0
        --[
        -- Or by the length of the walk: there may be more.
        when clock.allowed < $8 and walk.last is not null then 0
        --]
        when clock.allowed < $8 then (
            select (extract(epoch from next_attempt_at - server.early) * 1000000)::bigint
            from leasehold.outbox_events
            where delivery_status = 'pending' and lease_owner is null and reclaims < 3
                and next_attempt_at > leasehold.early_now()
            order by next_attempt_at
            limit 1
        ) end as next_due_in
    from server cross join search cross join clock
    --[
    cross join walk
    --]
    left join front on true
)
-- One row of what is said once, and one for each event: repeated, it would be computed and sent with each of them.
select header.*, claimed.* from header full join claimed on false
