-- Whether any event is pending: one probe of each index in which such events are.
select
    exists (
        select from leasehold.outbox_events
        where delivery_status = 'pending' and lease_owner is null and reclaims < 3
    )
    or exists (
        select from leasehold.outbox_events
        where delivery_status = 'pending' and lease_owner is null and reclaims >= 3
    )
    or exists (select from leasehold.outbox_events where lease_owner is not null)
