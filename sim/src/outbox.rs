//! The simulated outbox by itself, statement by statement, for tests that hold it against a real one.

use std::collections::BTreeMap;
use std::time::Duration;

use leasehold::machine::{DbTime, DestinationKey, Incarnation, Row};

use crate::schedule::Payload;
use crate::statement::Statement;
pub use crate::statement::{Ask, Reply};
use crate::store::{Lock, Meta, Store};

/// The simulated outbox and the statements that are under way in it. Rows are numbered from 0.
#[derive(Debug)]
pub struct Outbox {
    store: Store,
    now: u64,
    statements: BTreeMap<u32, Statement>,
    begun: u32,
}

impl Outbox {
    /// An empty outbox at a time of its own clock, with all the destinations that it will have.
    pub fn new(now: DbTime, destinations: Vec<DestinationKey>, incarnation: Incarnation) -> Self {
        let mut store = Store::new(now.as_micros(), 0, false, None);
        store.keys = destinations;
        store.incarnation = incarnation;
        Self { store, now: 0, statements: BTreeMap::new(), begun: 0 }
    }

    /// Commits a pending row for the destination of that number, with that payload.
    pub fn insert(&mut self, row: Row, destination: u16, payload: Payload) {
        self.store.pending.push(self.store.rows.len() as u32);
        self.store.rows.push(row);
        let (lock, cursed) = (Lock::Free, false);
        self.store.meta.push(Meta { destination, payload, lock, cursed, exists: true, changed: 0 });
    }

    /// The clock goes on.
    pub fn pass(&mut self, time: Duration) {
        self.now += time.as_micros() as u64;
    }

    /// The rows as committed.
    pub fn rows(&self) -> &[Row] {
        &self.store.rows
    }

    /// Whether a statement or an outside session has the row locked.
    pub fn is_locked(&self, row: u32) -> bool {
        self.store.meta[row as usize].lock != Lock::Free
    }

    /// The rows that a claim picked; once it has its locks, those that it takes.
    pub fn picked_by(&self, claim: u32) -> Vec<u32> {
        self.statements
            .get(&claim)
            .map_or(Vec::new(), |claim| claim.picked.iter().map(|(_, row)| *row).collect())
    }

    /// A statement begins. Answers its number.
    pub fn begin(&mut self, ask: Ask) -> u32 {
        let mut statement = Statement::new(0, 0, ask);
        self.store.begin(&mut statement, self.now);
        self.begun += 1;
        self.statements.insert(self.begun, statement);
        self.begun
    }

    /// A statement takes its locks. Answers `false` if it waits: the call that answers with its number lets it go on.
    pub fn lock(&mut self, id: u32) -> bool {
        self.statements.get_mut(&id).is_none_or(|statement| self.store.begin_work(id, statement, self.now))
    }

    /// A statement that has its locks commits. Answers its reply, and which statement goes on now: of two sessions, one.
    pub fn commit(&mut self, id: u32) -> Option<(Reply, Option<u32>)> {
        let statement = self.statements.remove(&id)?;
        let reply = self.store.commit(&statement, self.now, &mut Vec::new());
        Some((reply, self.store.finish(id, &statement).pop()))
    }

    /// A statement is rolled back. Answers which one goes on now.
    pub fn roll_back(&mut self, id: u32) -> Option<u32> {
        let statement = self.statements.remove(&id)?;
        self.store.stop_waiting(id);
        self.store.roll_back(id, &statement, &mut Vec::new()).pop()
    }

    /// An outside session locks a row. Answers `false` if it is locked already.
    pub fn lock_outside(&mut self, row: u32) -> bool {
        self.store.lock_outside(row)
    }

    /// And lets go of it. Answers which statement goes on now.
    pub fn unlock_outside(&mut self, row: u32) -> Option<u32> {
        self.store.unlock_outside(row).1
    }
}
