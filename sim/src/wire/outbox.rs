//! The worker's side of the store's protocol.

use std::sync::{Arc, Mutex, PoisonError};

use leasehold::machine::{
    ClaimRequest, OwnedReply, OwnedRequest, RenewReply, RenewRequest, SettleReply, SettleRequest, StoreFault,
};
use leasehold::ports::{Claimed, Message, Outbox};
use sim_oracle::{Fact, Lane};
use turmoil::net::TcpStream;

use super::frame::{receive, send};
use super::hub::{Gated, Shared, effect, lock};
use super::server::PORT;
use crate::statement::{Ask, Reply};

/// The outbox as a worker process sees it: heartbeats have connections of their own.
pub(super) struct Client {
    hub: Shared,
    worker: u32,
    idle: Mutex<[Vec<TcpStream>; 2]>,
}

/// A call under way. Dropping it is giving it up.
struct Call<'a> {
    client: &'a Client,
    number: u32,
    over: bool,
}

impl Call<'_> {
    fn answered(&mut self) {
        let mut hub = lock(&self.client.hub);
        let arrived = hub.now();
        hub.emit_of(
            self.client.worker,
            Fact::CallAnswered { worker: self.client.worker, call: self.number, arrived },
        );
        self.over = true;
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        let mut hub = lock(&self.client.hub);
        let worker = self.client.worker;
        if !self.over && !hub.processes[worker as usize].dead {
            hub.emit(Fact::CallFailed { worker, call: self.number });
        }
    }
}

impl Client {
    pub(super) fn new(hub: Shared, worker: u32) -> Self {
        Self { hub, worker, idle: Mutex::default() }
    }

    fn idle(&self, pool: usize) -> Option<TcpStream> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)[pool].pop()
    }

    async fn call(&self, lane: Lane, ask: Ask) -> Result<(Reply, Vec<Message>), StoreFault> {
        effect(&self.hub, self.worker).await;
        let mut call = {
            let mut hub = lock(&self.hub);
            let number = hub.new_call();
            hub.emit_of(
                self.worker,
                Fact::CallSent { worker: self.worker, call: number, lane, renews: ask.renews() },
            );
            Call { client: self, number, over: false }
        };
        let pool = usize::from(matches!(lane, Lane::Renew | Lane::RenewAlone));
        let mut stream = match self.idle(pool) {
            Some(stream) => stream,
            None => TcpStream::connect(("store", PORT)).await.map_err(not_applied)?,
        };
        send(&mut stream, &(self.worker, (call.number, ask))).await.map_err(unknown)?;
        let (reply, messages) = receive(&mut stream).await.map_err(unknown)?;
        if let Reply::NotApplied = reply {
            return Err(not_applied("refused"));
        }
        call.answered();
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)[pool].push(stream);
        match reply {
            Reply::Permanent => Err(StoreFault::Permanent { error: "refused for good".into() }),
            reply => Ok((reply, messages)),
        }
    }

    async fn ask(&self, lane: Lane, ask: Ask) -> Result<(Reply, Vec<Message>), StoreFault> {
        Gated::new(&self.hub, self.worker, self.call(lane, ask)).await
    }
}

fn not_applied(error: impl ToString) -> StoreFault {
    StoreFault::NotApplied { error: error.to_string() }
}

fn unknown(error: impl ToString) -> StoreFault {
    StoreFault::Unknown { error: error.to_string() }
}

fn odd() -> StoreFault {
    unknown("an answer to another question")
}

impl Outbox for Client {
    async fn claim(&self, request: ClaimRequest) -> Result<Claimed, StoreFault> {
        match self.ask(Lane::Claim, Ask::Claim(request)).await? {
            (Reply::Claim(reply), messages) => {
                let (mut hub, worker) = (lock(&self.hub), self.worker);
                for (grant, end) in crate::process::unsendable(&reply) {
                    let (event, token) = (grant.key.row.0 as u32, grant.key.token.0);
                    hub.emit_of(worker, Fact::RequestEnded { worker, event, token, end });
                    hub.emit_of(worker, Fact::OutcomeKnown { worker, event, token });
                }
                Ok(Claimed { reply, messages: messages.into_iter().map(Arc::new).collect() })
            }
            _ => Err(odd()),
        }
    }

    async fn renew(&self, request: RenewRequest) -> Result<RenewReply, StoreFault> {
        let lane = if request.wait { Lane::RenewAlone } else { Lane::Renew };
        match self.ask(lane, Ask::Renew(request)).await? {
            (Reply::Renew(reply), _) => Ok(reply),
            _ => Err(odd()),
        }
    }

    async fn settle(&self, request: SettleRequest) -> Result<SettleReply, StoreFault> {
        match self.ask(Lane::Settle, Ask::Settle(request)).await? {
            (Reply::Settle(reply), _) => Ok(reply),
            _ => Err(odd()),
        }
    }

    async fn owned(&self, request: OwnedRequest) -> Result<OwnedReply, StoreFault> {
        match self.ask(Lane::Owned, Ask::Owned(request)).await? {
            (Reply::Owned(reply), _) => Ok(reply),
            _ => Err(odd()),
        }
    }

    async fn hint(&self) {
        std::future::pending().await
    }
}
