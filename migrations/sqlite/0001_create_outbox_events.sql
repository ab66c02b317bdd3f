-- The outbox on SQLite: same columns, same words; times in integer microseconds since the Unix epoch.
-- Producers insert with an SQLite of their own, so that nothing here may need more than 3.38. SQLite's clock gives
-- milliseconds: rounded to them, `julianday` is exact.
create table outbox_events (
    -- Delivered events may be deleted, and their ids must not come again.
    id integer primary key autoincrement,
    event_id text not null unique default (lower(
        hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2) || '-'
        || substr('89ab', 1 + (random() & 3), 1) || substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6))
    )),
    event_type text not null,
    destination_url text not null,
    payload text not null,
    delivery_status text not null default 'pending',
    attempts integer not null default 0,
    max_attempts integer not null default 20,
    next_attempt_at integer default (cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000),
    lease_owner text,
    lease_until integer,
    lease_token integer not null default 0,
    reclaims integer not null default 0,
    -- Scheme and authority as written, in lower case: for fairness only, never for address rules.
    destination_key text not null generated always as (
        substr(
            lower(
                case when instr(destination_url, '://') > 1 then substr(
                    destination_url,
                    1,
                    instr(destination_url, '://') + 1 + min(
                        instr(substr(destination_url, instr(destination_url, '://') + 3) || '/', '/'),
                        instr(substr(destination_url, instr(destination_url, '://') + 3) || '?', '?'),
                        instr(substr(destination_url, instr(destination_url, '://') + 3) || '#', '#')
                    )
                ) else destination_url end
            ),
            1,
            255
        )
    ) stored,
    last_error text,
    last_status integer,
    delivered_at integer,
    created_at integer not null default (cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000),
    updated_at integer not null default (cast(round((julianday('now') - 2440587.5) * 86400000) as integer) * 1000),

    constraint event_id_is_visible_ascii check (length(event_id) between 1 and 255 and event_id not glob '*[^!-~]*'),
    constraint event_type_is_visible_ascii check (
        length(event_type) between 1 and 255 and event_type not glob '*[^!-~]*'
    ),
    constraint payload_is_json check (json_valid(payload)),
    constraint delivery_status_is_known check (delivery_status in ('pending', 'delivered', 'failed')),
    constraint attempts_in_bounds check (attempts between 0 and 1000000000),
    constraint max_attempts_in_bounds check (max_attempts between 1 and 1000000000),
    constraint reclaims_in_bounds check (reclaims between 0 and 1000000000),
    constraint lease_token_in_bounds check (lease_token between 0 and 4611686018427387904),
    constraint lease_is_whole check ((lease_owner is null) = (lease_until is null)),
    constraint only_pending_is_leased check (lease_owner is null or delivery_status = 'pending'),
    constraint lease_owner_is_short check (length(lease_owner) between 1 and 512),
    constraint pending_has_a_due_time check (next_attempt_at is not null or delivery_status <> 'pending')
) strict;

create index outbox_events_due on outbox_events (next_attempt_at, id)
    where delivery_status = 'pending' and lease_owner is null and reclaims < 3;
create index outbox_events_due_by_destination on outbox_events (destination_key, next_attempt_at, id)
    where delivery_status = 'pending' and lease_owner is null and reclaims < 3;
create index outbox_events_probation on outbox_events (next_attempt_at, id)
    where delivery_status = 'pending' and lease_owner is null and reclaims >= 3;
create index outbox_events_leased on outbox_events (lease_owner, id)
    where lease_owner is not null;
