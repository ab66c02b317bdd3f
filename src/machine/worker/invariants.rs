//! What holds after every input.

use super::super::row::PROBATION_RECLAIMS;
use super::{Heartbeat, Held, Phase, Worker};

impl Worker {
    /// Panics if a whole-state invariant is broken. Costs O(n): for tests, fuzzing and simulation.
    pub fn assert_invariants(&self) {
        let count =
            |wanted: fn(&Held) -> bool| self.leases.values().filter(|held| wanted(held)).count() as u32;
        let requests = count(|held| matches!(held.phase, Phase::Open | Phase::Aborting(_)));
        assert_eq!(self.open, requests, "open requests are counted");
        assert_eq!(
            self.queued,
            count(|held| matches!(held.phase, Phase::Queued { .. })),
            "queued leases are counted"
        );
        assert_eq!(self.probation, count(|held| held.reclaims >= PROBATION_RECLAIMS));
        let limits = self.settings.limits();
        assert!(self.open <= limits.max_in_flight, "S9: {} requests are open", self.open);
        for (key, held) in &self.leases {
            let batched = held.heartbeat == Heartbeat::Batched;
            assert_eq!(self.heartbeats.contains(&(held.confirmed, *key)), batched, "heartbeat of {key}");
            if let Heartbeat::Locked { skipped } = held.heartbeat {
                assert!(self.locked.contains(&(skipped, *key)), "heartbeat of {key}, which is locked");
            }
            if self.ended.is_some() {
                // What a drain's end leaves runs out.
                assert!(held.heartbeat == Heartbeat::Off, "P8: {key} is renewed after the end");
                assert!(held.phase != Phase::Open, "P8: {key} is sent after the end");
            }
            let fenceable = self.ended.is_none() && held.can_be_fenced();
            assert_eq!(self.fences.contains(&(held.confirmed, *key)), fenceable, "fence of {key}");
            if fenceable {
                assert!(self.fence_at(held.confirmed) > self.now, "S3: {key} is past its fence");
                assert!(held.heartbeat != Heartbeat::Off, "P5: {key} has no heartbeat");
            }
            if let Phase::Outcome(_) = held.phase {
                assert!(self.settles.knows(*key), "P6: the outcome of {key} waits for nothing");
            }
        }
        assert_eq!(
            self.heartbeats.len() + self.locked.len(),
            count(|held| held.heartbeat != Heartbeat::Off) as usize
        );
        for (name, destination) in &self.destinations {
            let of = |held: &&Held| held.destination.as_ref() == Some(name);
            let held = self.leases.values().filter(of).count() as u32;
            let open = self.leases.values().filter(of);
            let open =
                open.filter(|held| matches!(held.phase, Phase::Open | Phase::Aborting(_))).count() as u32;
            assert_eq!((destination.held, destination.open), (held, open), "destination counts");
            assert!(open <= limits.max_in_flight_per_destination, "S9: the destination's cap");
            assert_eq!(
                self.ring.iter().filter(|other| *other == name).count(),
                usize::from(destination.in_ring)
            );
        }
        for (request, cycle) in &self.cycles {
            let outstanding = self.leases.values().filter(|held| held.cycle == Some(*request)).count() as u32;
            assert_eq!(cycle.outstanding, outstanding, "cycle counts");
        }
    }
}
