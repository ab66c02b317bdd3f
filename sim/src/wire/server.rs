//! The store's host: statements over TCP around the simulated outbox.

use std::future::pending;
use std::time::Duration;

use leasehold::ports::Message;
use sim_oracle::Fact;
use tokio::io::AsyncReadExt as _;
use tokio::sync::oneshot;
use tokio::task::spawn_local;
use tokio::time::sleep;
use turmoil::net::{TcpListener, TcpStream};

use super::endpoint;
use super::frame::{receive, send};
use super::hub::{Hub, Shared, lock};
use crate::statement::{Ask, Reply, Statement};

/// Where the store listens.
pub(super) const PORT: u16 = 5432;

/// Serves for as long as the host lives. A restart of the server is a crash of the host.
pub(super) async fn serve(hub: Shared) -> turmoil::Result {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        spawn_local(session(hub.clone(), stream));
    }
}

/// One connection: statements one after another.
async fn session(hub: Shared, mut stream: TcpStream) {
    while let Ok((worker, (call, ask))) = receive::<(u32, (u32, Ask))>(&mut stream).await {
        let id = {
            let mut hub = lock(&hub);
            let statement = Statement::new(call, worker, ask);
            hub.statements.insert(call, statement);
            call
        };
        let mut work = std::pin::pin!(execute(&hub, id));
        let (reply, messages) = tokio::select! {
            biased;
            reply = &mut work => reply,
            // The client is gone.
            _ = stream.read_u8() => {
                if lock(&hub).draws.percent(50) {
                    return lock(&hub).cancel(id);
                }
                work.await;
                return;
            }
        };
        if send(&mut stream, &(reply, messages)).await.is_err() {
            return;
        }
    }
}

async fn nap(hub: &Shared, most: u64) {
    if most > 0 {
        let time = lock(hub).draws.below(most + 1);
        sleep(Duration::from_micros(time)).await;
    }
}

/// A message is lost: whoever waits for what it would have brought waits in vain.
async fn maybe_lost(hub: &Shared, rate: fn(&Hub) -> u32) {
    let lost = {
        let mut hub = lock(hub);
        let rate = rate(&hub);
        hub.draws.rarely(rate)
    };
    if lost {
        pending::<()>().await;
    }
}

/// From the statement's arrival to its reply, if it gets one.
async fn execute(hub: &Shared, id: u32) -> (Reply, Vec<Message>) {
    maybe_lost(hub, |hub| hub.weather.loss).await;
    let most = lock(hub).weather.delay;
    nap(hub, most).await;
    let late = {
        let mut hub = lock(hub);
        let (rate, late) = hub.weather.late_call;
        if hub.draws.rarely(rate) { late } else { 0 }
    };
    if late > 0 {
        sleep(Duration::from_micros(late)).await;
    }
    let (refused, stall) = {
        let hub = &mut *lock(hub);
        let now = hub.now();
        if let Some(statement) = hub.statements.get_mut(&id) {
            hub.store.begin(statement, now);
        }
        (!hub.store.up || hub.store.read_only, hub.weather.stall)
    };
    if refused {
        lock(hub).statements.remove(&id);
        return (Reply::NotApplied, Vec::new());
    }
    nap(hub, stall).await;
    let take_locks = || lock(hub).take_locks(id);
    while let Some(turn) = take_locks() {
        let _ = turn.await;
    }
    let delay = {
        let mut hub = lock(hub);
        let ((least, most), (rate, late)) = (hub.schedule.pace.commit, hub.weather.late_commit);
        let delay = hub.draws.within(least, most);
        let statement = hub.statements.get(&id);
        let commits = statement.is_some_and(Statement::commits);
        let delay = delay + hub.weather.weight * statement.map_or(0, Statement::heavy_rows);
        if commits && hub.draws.rarely(rate) { delay + late } else { delay }
    };
    sleep(Duration::from_micros(delay)).await;
    let reply = lock(hub).commit(id);
    maybe_lost(hub, |hub| hub.weather.lost_reply.max(hub.weather.loss)).await;
    let most = lock(hub).weather.delay;
    nap(hub, most).await;
    reply
}

impl Hub {
    /// A statement takes its locks. If it has to wait for one, answers what tells it to try again.
    fn take_locks(&mut self, id: u32) -> Option<oneshot::Receiver<()>> {
        let mut statement = self.statements.remove(&id)?;
        let now = self.now();
        let ready = self.store.begin_work(id, &mut statement, now);
        self.statements.insert(id, statement);
        if ready {
            return None;
        }
        let (turn, wait) = oneshot::channel();
        self.waiting.insert(id, turn);
        Some(wait)
    }

    /// Commits a statement, or rolls it back.
    fn commit(&mut self, id: u32) -> (Reply, Vec<Message>) {
        let Some(statement) = self.statements.remove(&id) else { return (Reply::NotApplied, Vec::new()) };
        let impossible = self.store.impossible(&statement);
        if impossible.is_some() || self.draws.rarely(self.weather.abort) {
            let next = self.with_store(|store, _, facts| store.roll_back(id, &statement, facts));
            self.wake_statements(next);
            let Some(keys) = impossible else { return (Reply::NotApplied, Vec::new()) };
            for key in keys {
                let (worker, event, token) = (statement.worker, key.row.0 as u32, key.token.0);
                self.emit(Fact::SettleImpossible { worker, event, token });
            }
            return (Reply::Permanent, Vec::new());
        }
        let reply = self.with_store(|store, now, facts| store.commit(&statement, now, facts));
        let next = self.store.finish(id, &statement);
        self.wake_statements(next);
        let messages = match &reply {
            Reply::Claim(claimed) => {
                let events = claimed.grants.iter().map(|grant| grant.key.row.0 as u32);
                events.map(|event| endpoint::message(&self.schedule, event)).collect()
            }
            _ => Vec::new(),
        };
        (reply, messages)
    }

    /// The server cancels a statement whose client has gone, if it has not committed.
    fn cancel(&mut self, id: u32) {
        let Some(statement) = self.statements.remove(&id) else { return };
        self.waiting.remove(&id);
        let next = self.with_store(|store, _, facts| store.roll_back(id, &statement, facts));
        self.store.stop_waiting(id);
        self.wake_statements(next);
    }
}
