-- Every lease that was granted or ended, beside the outbox: what the judge compares the receivers' records with.
create schema chaos;
create table chaos.history (
    event text not null, token bigint not null, owner text, old_owner text, old_until timestamptz, at timestamptz not null,
    destination text not null
);
create function chaos.note() returns trigger language plpgsql as $$
begin
    insert into chaos.history
    values (new.event_id, new.lease_token, new.lease_owner, old.lease_owner, old.lease_until, clock_timestamp(),
        new.destination_key);
    return null;
end $$;
create trigger note after update on leasehold.outbox_events for each row
    when (old.lease_owner is distinct from new.lease_owner or old.lease_token <> new.lease_token)
    execute function chaos.note();
