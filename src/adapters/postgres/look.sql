-- What a claim answers when nothing is due, at a fraction of its cost; no row when something is. $1 and $2 the due time in
-- microseconds and the id ahead of which fresh events are passed over.
select
    (extract(epoch from leasehold.late_now()) * 1000000)::bigint as db_now,
    leasehold.incarnation() as incarnation,
    (extract(epoch from leasehold.early_now()) * 1000000)::bigint as front_due,
    9223372036854775807 as front_id,
    null::bigint as leases_front,
    false as searched,
    (
        select (extract(epoch from next_attempt_at - leasehold.early_now()) * 1000000)::bigint
        from leasehold.outbox_events
        where delivery_status = 'pending' and lease_owner is null and reclaims < 3
            and next_attempt_at > leasehold.early_now()
        order by next_attempt_at
        limit 1
    ) as next_due_in,
    null::bigint as id
where
    -- Not `exists`, which drops the order: with that alone a plan made while the queue was empty takes the index by due time.
    (
        select id from leasehold.outbox_events
        where delivery_status = 'pending' and lease_owner is null and reclaims < 3
            and next_attempt_at <= leasehold.early_now()
            and (next_attempt_at, id) >=
                (coalesce('epoch'::timestamptz + $1 * interval '1 microsecond', '-infinity'), $2)
        order by next_attempt_at, id
        limit 1
    ) is null
    and not exists (
        select from leasehold.outbox_events
        where delivery_status = 'pending' and lease_owner is null and reclaims >= 3
            and next_attempt_at <= leasehold.early_now()
    )
