//! The ports between the driver and the world: [`Outbox`] (the table), [`Gateway`] (the destinations), [`Clock`], and
//! [`Observer`] (the log).
//!
//! No logic and no third-party type but [`Bytes`]. Every request and reply is plain data, so that the simulator can
//! carry them over its own wire.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;

use crate::machine::{
    AttemptResult, ClaimReply, ClaimRequest, LeaseKey, Moment, Observation, OwnedReply, OwnedRequest,
    RenewReply, RenewRequest, SettleReply, SettleRequest, StoreFault, Worker,
};

/// What of an event goes on the wire. Immutable once claimed; its `Debug` shows no payload.
#[derive(Clone, PartialEq, Eq)]
pub struct Message {
    /// `event_id`: the receiver's deduplication key.
    pub event_id: String,
    /// `event_type`.
    pub event_type: String,
    /// `destination_url` as written.
    pub destination_url: String,
    /// The payload as the store prints it; exactly these bytes are signed and sent. Empty if it was oversized.
    pub payload: Bytes,
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Message")
            .field("event_id", &self.event_id)
            .field("event_type", &self.event_type)
            .field("payload_bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

/// A claim's reply together with the messages of its grants, in the same order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// What the machine decides on.
    pub reply: ClaimReply,
    /// One message a grant of `reply.grants`.
    pub messages: Vec<Arc<Message>>,
}

/// The store of events.
///
/// Every call is bounded by the store timeout `R`, getting a connection included; on a time-out the adapter closes
/// the connection, has the server cancel the statement where it can, and answers [`StoreFault::Unknown`].
pub trait Outbox: Send + Sync + 'static {
    /// Takes ready events (rule P1).
    fn claim(&self, request: ClaimRequest) -> impl Future<Output = Result<Claimed, StoreFault>> + Send;
    /// Extends leases (rule P5). Has connections of its own and never waits behind claims or settles.
    fn renew(&self, request: RenewRequest) -> impl Future<Output = Result<RenewReply, StoreFault>> + Send;
    /// Ends leases with their outcomes (rule P6).
    fn settle(&self, request: SettleRequest) -> impl Future<Output = Result<SettleReply, StoreFault>> + Send;
    /// Lists the leases that the store shows under an owner (rule P7).
    fn owned(&self, request: OwnedRequest) -> impl Future<Output = Result<OwnedReply, StoreFault>> + Send;
    /// Resolves when there may be new work; never resolves where the store can't tell. Cancel-safe.
    fn hint(&self) -> impl Future<Output = ()> + Send;
}

/// One request to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The lease under which it is made; its token is sent along.
    pub key: LeaseKey,
    /// 1-based number of this attempt (`webhook-attempt`).
    pub number: u32,
    /// Unix seconds for `webhook-timestamp`: the database's time carried forward.
    pub timestamp: i64,
    /// What to send.
    pub message: Arc<Message>,
}

/// The way to the destinations.
pub trait Gateway: Send + Sync + 'static {
    /// Makes one request and maps whatever happens to a result; it never fails otherwise. `may_start` is asked directly
    /// before the first byte, when resolving and connecting are over; if it says no, nothing is sent and there is no
    /// result (rule P4). Dropping the future closes the request's socket before the drop returns. As soon as the result is
    /// known it is left in `known`, though the request may still be open while the rest of the response is read: an abort
    /// then does not undo it (rule P4).
    fn send(
        &self,
        attempt: Attempt,
        may_start: impl Fn() -> bool + Send + Sync,
        known: &OnceLock<AttemptResult>,
    ) -> impl Future<Output = Option<AttemptResult>> + Send;
}

/// A worker's own continuous clock.
pub trait Clock: Send + Sync + 'static {
    /// The current moment; counts on while the machine sleeps.
    fn now(&self) -> Moment;

    /// Returns once that time is over. Tokio's timer, the default, counts in milliseconds and rounds up.
    fn sleep(&self, nap: Duration) -> impl Future<Output = ()> + Send {
        tokio::time::sleep(nap)
    }
}

/// The messages of the leases that are held, so that what is logged can name the event.
#[derive(Debug, Default)]
pub struct Events(BTreeMap<LeaseKey, Arc<Message>>);

impl Events {
    /// The event id of a held lease.
    pub fn id(&self, key: LeaseKey) -> Option<&str> {
        self.0.get(&key).map(|message| message.event_id.as_str())
    }

    pub(crate) fn message(&self, key: LeaseKey) -> Option<Arc<Message>> {
        self.0.get(&key).cloned()
    }

    pub(crate) fn insert(&mut self, messages: Vec<(LeaseKey, Arc<Message>)>) {
        self.0.extend(messages);
    }

    pub(crate) fn remove(&mut self, key: LeaseKey) {
        self.0.remove(&key);
    }
}

/// Told of everything that the machine finds worth logging or counting.
pub trait Observer: Send {
    /// Takes one observation; `events` still knows every lease that it names, orphans aside.
    fn observe(&mut self, observation: &Observation, events: &Events);

    /// Looks at the worker after each input.
    fn look(&mut self, _worker: &Worker) {}
}

impl<O: Observer> Observer for Option<O> {
    fn observe(&mut self, observation: &Observation, events: &Events) {
        if let Some(observer) = self {
            observer.observe(observation, events);
        }
    }

    fn look(&mut self, worker: &Worker) {
        if let Some(observer) = self {
            observer.look(worker);
        }
    }
}

impl<A: Observer, B: Observer> Observer for (A, B) {
    fn observe(&mut self, observation: &Observation, events: &Events) {
        self.0.observe(observation, events);
        self.1.observe(observation, events);
    }

    fn look(&mut self, worker: &Worker) {
        self.0.look(worker);
        self.1.look(worker);
    }
}
