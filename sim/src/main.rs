//! The simulator's command line.

fn main() {
    let from: u64 = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(0);
    let to: u64 = std::env::args().nth(2).and_then(|text| text.parse().ok()).unwrap_or(1_000);
    let start = std::time::Instant::now();
    let (mut steps, mut facts, mut bad, mut sim) = (0, 0, 0, 0);
    let mut stats = sim_oracle::Stats::default();
    for seed in from..to {
        let profile = sim::profile_of(seed);
        let schedule = sim::generate(seed, profile);
        let outcome = sim::run(&schedule, sim::Options::default());
        steps += outcome.steps;
        facts += outcome.stats.facts;
        sim += outcome.ended_at;
        stats.merge(&outcome.stats);
        if let Some(violation) = outcome.violation {
            bad += 1;
            if bad < 15 {
                println!("seed {seed} {profile}: {violation}");
            }
        }
    }
    let took = start.elapsed().as_secs_f64();
    let seeds = (to - from) as f64;
    println!("{} bad; {:.0} seeds/s, {:.0} steps/seed, {:.0} facts/seed, {:.1} simulated s/seed", bad, seeds / took, steps as f64 / seeds, facts as f64 / seeds, sim as f64 / seeds / 1e6);
    println!("{stats}\nunvisited: {:?}", stats.unvisited());
}
