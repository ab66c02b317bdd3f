//! The driver: carries the machine's actions to the ports and their results back as inputs. It decides nothing.
//!
//! One task owns the machine; every store call and every request is a task of its own. A panic in any of them ends the
//! driver with an error: a worker must not live on with half its parts.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinSet};
use tokio::time::timeout;

use crate::machine::{
    Action, AttemptResult, Ended, Input, LeaseKey, Moment, RequestId, StoreFault, Worker, WorkerId,
    WorkerSettings,
};
use crate::ports::{Attempt, Claimed, Clock, Events, Gateway, Message, Observer, Outbox};

/// A task of the worker panicked; its panic message went to standard error. The driver can't go on.
#[derive(Debug)]
pub struct Panicked(JoinError);

impl std::fmt::Display for Panicked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self(error) = self;
        write!(
            f,
            "a task of the worker panicked ({error}): the worker ends, and its leases run out by themselves"
        )
    }
}

impl std::error::Error for Panicked {}

/// One worker in the world.
pub struct Driver<O, G, C, W> {
    /// The store.
    pub outbox: Arc<O>,
    /// The way to the destinations.
    pub gateway: Arc<G>,
    /// The worker's own clock.
    pub clock: Arc<C>,
    /// Told of observations.
    pub observer: W,
}

impl<O: Outbox, G: Gateway, C: Clock, W: Observer> Driver<O, G, C, W> {
    /// Runs a worker until it has drained after `shutdown` resolved, or until the outbox is empty if the settings say
    /// so.
    ///
    /// # Errors
    /// When a task panicked.
    pub async fn run(
        self,
        id: WorkerId,
        settings: WorkerSettings,
        shutdown: impl Future<Output = ()>,
    ) -> Result<Ended, Panicked> {
        let store_timeout = settings.timing().store_timeout();
        let worker = Worker::new(id, settings, self.clock.now());
        let mut running = Running {
            driver: self,
            store_timeout,
            worker,
            events: Events::default(),
            calls: JoinSet::new(),
            attempts: JoinSet::new(),
            requests: BTreeMap::new(),
        };
        running.run(shutdown).await
    }
}

type Hint = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What a store call brought: an input, and for a claim the messages of its grants.
type Reply = (Input, Vec<(LeaseKey, Arc<Message>)>);

struct Running<O, G, C, W> {
    driver: Driver<O, G, C, W>,
    store_timeout: Duration,
    worker: Worker,
    events: Events,
    calls: JoinSet<Reply>,
    attempts: JoinSet<(LeaseKey, Option<AttemptResult>)>,
    requests: BTreeMap<LeaseKey, Request>,
}

/// A request under way.
struct Request {
    abort: oneshot::Sender<()>,
    /// The moment before which it may start, in microseconds.
    start_before: Arc<AtomicU64>,
}

impl<O: Outbox, G: Gateway, C: Clock, W: Observer> Running<O, G, C, W> {
    async fn run(&mut self, shutdown: impl Future<Output = ()>) -> Result<Ended, Panicked> {
        let mut shutdown = pin!(shutdown);
        let mut draining = false;
        let mut hint = self.next_hint();
        let mut input = Input::Wake;
        loop {
            self.handle(input);
            if let Some(ended) = self.worker.ended() {
                return Ok(ended);
            }
            let wakeup = self.worker.next_wakeup();
            let nap = wakeup.map_or(Duration::from_secs(3_600), |at| at.since(self.driver.clock.now()));
            input = tokio::select! {
                biased;
                Some(reply) = self.calls.join_next() => self.replied(reply)?,
                Some(ended) = self.attempts.join_next() => self.attempted(ended)?,
                () = &mut shutdown, if !draining => {
                    draining = true;
                    Input::Shutdown
                }
                () = &mut hint, if !draining => {
                    hint = self.next_hint();
                    Input::Hint
                }
                () = self.driver.clock.sleep(nap) => Input::Wake,
            };
        }
    }

    fn next_hint(&self) -> Hint {
        let outbox = Arc::clone(&self.driver.outbox);
        Box::pin(async move { outbox.hint().await })
    }

    fn handle(&mut self, input: Input) {
        let renewed = matches!(input, Input::Renewed { .. });
        self.worker.handle(self.driver.clock.now(), input);
        if renewed {
            self.move_fences();
        }
        while let Some(observation) = self.worker.poll_observation() {
            self.driver.observer.observe(&observation, &self.events);
        }
        self.driver.observer.look(&self.worker);
        while let Some(action) = self.worker.poll_action() {
            self.act(action);
        }
    }

    /// Connecting may take longer than a lease, which is renewed meanwhile.
    fn move_fences(&self) {
        for (key, request) in &self.requests {
            if let Some(fence) = self.worker.start_before(*key) {
                request.start_before.store(fence.as_micros(), Ordering::Relaxed);
            }
        }
    }

    fn act(&mut self, action: Action) {
        let outbox = Arc::clone(&self.driver.outbox);
        match action {
            Action::Claim(request, claim) => {
                self.call(request, async move { outbox.claim(claim).await }, claimed)
            }
            Action::Renew(request, renew) => {
                let input = |request, reply| (Input::Renewed { request, reply }, Vec::new());
                self.call(request, async move { outbox.renew(renew).await }, input);
            }
            Action::Settle(request, settle) => {
                let input = |request, reply| (Input::Settled { request, reply }, Vec::new());
                self.call(request, async move { outbox.settle(settle).await }, input);
            }
            Action::Owned(request, owned) => {
                let input = |request, reply| (Input::Owned { request, reply }, Vec::new());
                self.call(request, async move { outbox.owned(owned).await }, input);
            }
            Action::Send { key, number, timestamp, start_before } => {
                self.send(key, number, timestamp, start_before);
            }
            Action::Abort { key } => {
                // Its task may have ended already; then its outcome is on the way. Or it may not have begun.
                if let Some(request) = self.requests.remove(&key) {
                    request.start_before.store(0, Ordering::Relaxed);
                    let _ = request.abort.send(());
                }
            }
            Action::Forget { key } => {
                self.events.remove(key);
            }
        }
    }

    /// Makes a store call in a task of its own. Dropping the call's future closes its connection, so that the bound on
    /// it holds whatever the adapter waits for.
    fn call<T: Send + 'static>(
        &mut self,
        request: RequestId,
        call: impl Future<Output = Result<T, StoreFault>> + Send + 'static,
        input: impl FnOnce(RequestId, Result<T, StoreFault>) -> Reply + Send + 'static,
    ) {
        let bound = self.store_timeout;
        self.calls.spawn(async move {
            let reply = timeout(bound, call).await;
            input(
                request,
                reply.unwrap_or_else(|_| {
                    Err(StoreFault::Unknown { error: format!("no answer within store_timeout ({bound:?})") })
                }),
            )
        });
    }

    fn send(&mut self, key: LeaseKey, number: u32, timestamp: i64, start_before: Moment) {
        let (abort, aborted) = oneshot::channel();
        let start_before = Arc::new(AtomicU64::new(start_before.as_micros()));
        self.requests.insert(key, Request { abort, start_before: Arc::clone(&start_before) });
        let message = self.events.message(key);
        let (gateway, clock) = (Arc::clone(&self.driver.gateway), Arc::clone(&self.driver.clock));
        self.attempts.spawn(async move {
            let Some(message) = message else { return (key, None) };
            // The world may have stopped since the machine decided, and connecting takes its time (rule P4).
            let may_start = || clock.now().as_micros() < start_before.load(Ordering::Relaxed);
            let known = OnceLock::new();
            let result = tokio::select! {
                biased;
                result = gateway.send(Attempt { key, number, timestamp, message }, may_start, &known) => result,
                _ = aborted => None,
            };
            // The request is closed by now; what it brought before the abort stands.
            (key, result.or_else(|| known.into_inner()))
        });
    }

    fn replied(&mut self, reply: Result<Reply, JoinError>) -> Result<Input, Panicked> {
        let (input, messages) = reply.map_err(Panicked)?;
        self.events.insert(messages);
        Ok(input)
    }

    fn attempted(
        &mut self,
        ended: Result<(LeaseKey, Option<AttemptResult>), JoinError>,
    ) -> Result<Input, Panicked> {
        let (key, result) = ended.map_err(Panicked)?;
        self.requests.remove(&key);
        Ok(match result {
            Some(result) => Input::Attempted { key, result },
            None => Input::Aborted { key },
        })
    }
}

fn claimed(request: RequestId, reply: Result<Claimed, StoreFault>) -> Reply {
    match reply {
        Ok(Claimed { reply, messages }) => {
            let keys = reply.grants.iter().map(|grant| grant.key);
            let messages = keys.zip(messages).collect();
            (Input::Claimed { request, reply: Ok(reply) }, messages)
        }
        Err(fault) => (Input::Claimed { request, reply: Err(fault) }, Vec::new()),
    }
}
