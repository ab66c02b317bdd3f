//! The simulated server: outside sessions, restarts, failovers that forget, and its own count of rows.

use leasehold::machine::{Incarnation, Status};
use sim_oracle::Fact;

use crate::bugs::Bug;
use crate::store::{Lock, Meta, Store};

impl Store {
    /// The server goes down. Its locks and the statements that waited for them are gone.
    pub(crate) fn go_down(&mut self, facts: &mut Vec<Fact>) {
        self.up = false;
        self.epoch += 1;
        self.waiting.clear();
        for (row, meta) in self.meta.iter_mut().enumerate() {
            if meta.lock == Lock::Outside {
                facts.push(Fact::RowUnlocked { event: row as u32 });
            }
            meta.lock = Lock::Free;
        }
        facts.push(Fact::DbDown);
    }

    /// A server is up, another incarnation: the old one, started again, or a standby, which has been up for as long as
    /// anybody knows and has forgotten what committed after `forgotten`.
    pub(crate) fn come_up(&mut self, now: u64, forgotten: Option<u64>, facts: &mut Vec<Fact>) {
        self.up = true;
        self.booted = if forgotten.is_none() { now } else { 0 };
        self.incarnation = Incarnation::new(format!("server {}", self.epoch));
        let mut touched: Vec<(u32, bool)> = Vec::new();
        let mut lost = 0;
        if let (Some(history), Some(forgotten)) = (&mut self.history, forgotten) {
            while let Some((_, row, before)) = history.pop_if(|(at, _, _)| *at > forgotten) {
                lost += 1;
                touched.retain(|(other, _)| *other != row);
                touched.push((row, before.is_some()));
                match before {
                    Some(before) => self.rows[row as usize] = before,
                    None => self.meta[row as usize].exists = false,
                }
            }
        }
        facts.push(Fact::DbUp { lost, standby: forgotten.is_some() });
        for (event, exists) in touched {
            let row = &self.rows[event as usize];
            if !exists {
                facts.push(Fact::EventVanished { event });
                continue;
            }
            facts.push(Fact::RowRestored {
                event,
                status: match row.status {
                    Status::Pending => sim_oracle::Status::Pending,
                    Status::Delivered => sim_oracle::Status::Delivered,
                    Status::Failed => sim_oracle::Status::Failed,
                },
                attempts: row.attempts,
                due: row.next_attempt_at.as_micros(),
                token: row.token.0,
                reclaims: row.reclaims,
                owner: row.lease.as_ref().and_then(|lease| lease.owner.as_str().get(1..)?.parse().ok()),
                until: row.lease.as_ref().map_or(0, |lease| lease.until.as_micros()),
            });
        }
        self.pending = (0..self.rows.len() as u32)
            .filter(|row| {
                self.meta[*row as usize].exists && self.rows[*row as usize].status == Status::Pending
            })
            .collect();
    }

    /// The store's own count.
    pub(crate) fn census(&self) -> Fact {
        let (mut pending, mut delivered, mut failed) = (0, 0, 0);
        for (row, _) in self.rows.iter().zip(&self.meta).filter(|(_, meta)| meta.exists) {
            match row.status {
                Status::Pending => pending += 1,
                Status::Delivered => delivered += 1,
                Status::Failed if self.bug == Some(Bug::RetiredFailed) => {}
                Status::Failed => failed += 1,
            }
        }
        Fact::Census { pending, delivered, failed }
    }

    /// An outside session locks a row, if nobody has it.
    pub(crate) fn lock_outside(&mut self, row: u32) -> bool {
        let Some(meta) = self.meta.get_mut(row as usize) else { return false };
        let free = meta.lock == Lock::Free;
        if free {
            meta.lock = Lock::Outside;
        }
        free
    }

    /// And lets go of it. Answers whether it still had it, and who may go on now.
    pub(crate) fn unlock_outside(&mut self, row: u32) -> (bool, Option<u32>) {
        match self.meta.get(row as usize) {
            Some(Meta { lock: Lock::Outside, .. }) => (true, self.free(row)),
            _ => (false, None),
        }
    }
}
