//! Statements: what a store call asks, and what it is answered.

use std::time::Duration;

use leasehold::machine::{
    ClaimReply, ClaimRequest, DbTime, OwnedReply, OwnedRequest, Place, RenewReply, RenewRequest, SettleReply,
    SettleRequest, Token,
};

/// What a statement asks for.
#[derive(Clone, Debug)]
pub enum Ask {
    /// See [`ClaimRequest`].
    Claim(ClaimRequest),
    /// See [`RenewRequest`].
    Renew(RenewRequest),
    /// See [`SettleRequest`].
    Settle(SettleRequest),
    /// See [`OwnedRequest`].
    Owned(OwnedRequest),
}

impl Ask {
    /// How many leases it renews.
    pub(crate) fn renews(&self) -> u32 {
        if let Self::Renew(renew) = self { renew.keys.len() as u32 } else { 0 }
    }
}

/// What a statement answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// To a claim.
    Claim(ClaimReply),
    /// To a renewal.
    Renew(RenewReply),
    /// To a settle.
    Settle(SettleReply),
    /// To a look.
    Owned(OwnedReply),
    /// Nothing was done.
    NotApplied,
    /// Nothing was done, nor ever will.
    Permanent,
}

/// One statement under way.
#[derive(Clone, Debug)]
pub(crate) struct Statement {
    /// The call that it belongs to.
    pub(crate) call: u32,
    /// Whose call.
    pub(crate) worker: u32,
    /// What it asks.
    pub(crate) ask: Ask,
    /// When it began, in true time.
    pub(crate) began: u64,
    /// How many commits it sees.
    pub(crate) snapshot: u64,
    /// When it had its locks.
    pub(crate) locked: u64,
    /// Of which run of the server it is part.
    pub(crate) epoch: u32,
    /// Rows that it has locked.
    pub(crate) rows: Vec<u32>,
    /// A claim: whether it searches for expired leases.
    pub(crate) searched: bool,
    /// A claim: all that it may take by what was committed when it began, in order: turn, due time, row.
    pub(crate) candidates: Vec<(u8, DbTime, u32)>,
    /// A claim: what it takes, each with its turn.
    pub(crate) picked: Vec<(u8, u32)>,
    /// A claim: how many that would be, whatever changed since it began.
    pub(crate) allowed: usize,
    /// A claim: the front of the queue as it leaves it.
    pub(crate) front: Option<Place>,
    /// A claim that searches: the lowest token of the leases that it looks at.
    pub(crate) leases_front: Option<Token>,
    /// A claim: when it began, how long until the next event was due.
    pub(crate) next_due_in: Option<Duration>,
    /// A claim: when it began, how many events were pending.
    pub(crate) pending: usize,
}

impl Statement {
    /// A look has nothing to commit.
    pub(crate) fn commits(&self) -> bool {
        !matches!(self.ask, Ask::Owned(_))
    }

    /// Rows that a slow store takes its time for.
    pub(crate) fn heavy_rows(&self) -> u64 {
        match self.ask {
            Ask::Claim(_) => self.picked.len() as u64,
            Ask::Settle(_) => self.rows.len() as u64,
            Ask::Renew(_) | Ask::Owned(_) => 0,
        }
    }

    /// A statement that has not begun.
    pub(crate) fn new(call: u32, worker: u32, ask: Ask) -> Self {
        Self {
            call,
            worker,
            ask,
            began: 0,
            snapshot: 0,
            locked: 0,
            // Not begun: nothing can cancel it.
            epoch: u32::MAX,
            rows: Vec::new(),
            searched: false,
            candidates: Vec::new(),
            picked: Vec::new(),
            allowed: 0,
            front: None,
            leases_front: None,
            next_due_in: None,
            pending: 0,
        }
    }

    /// Another one in its place, with the room that its lists have. What only a claim that has begun has, it sets itself.
    pub(crate) fn replace(&mut self, call: u32, worker: u32, ask: Ask) {
        (self.call, self.worker, self.ask, self.epoch) = (call, worker, ask, u32::MAX);
        self.rows.clear();
        self.candidates.clear();
        self.picked.clear();
    }
}
