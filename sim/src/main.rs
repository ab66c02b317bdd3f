//! The simulator's command line.

fn main() {
    let from: u64 = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(0);
    let to: u64 = std::env::args().nth(2).and_then(|text| text.parse().ok()).unwrap_or(1_000);
    if to == from {
        let schedule = sim::generate(from, sim::profile_of(from));
        println!("{:#?}", schedule);
        let outcome = sim::run(&schedule, sim::Options { keep: true, ..Default::default() });
        for (at, fact) in outcome.facts.iter().take(200000) {
            println!("{:>12.6} {fact:?}", *at as f64 / 1e6);
        }
        println!("{:?}", outcome.violation);
        return;
    }
    let start = std::time::Instant::now();
    let (mut steps, mut facts, mut bad, mut sim) = (0, 0, 0, 0);
    let mut per = std::collections::BTreeMap::new();
    let mut stats = sim_oracle::Stats::default();
    for seed in from..to {
        let profile = sim::profile_of(seed);
        let schedule = sim::generate(seed, profile);
        let outcome = sim::run(&schedule, sim::Options::default());
        steps += outcome.steps;
        facts += outcome.stats.facts;
        sim += outcome.ended_at;
        stats.merge(&outcome.stats);
        per.entry(profile).or_insert_with(Vec::new).push((outcome.steps, seed));
        if let Some(violation) = outcome.violation {
            bad += 1;
            if bad < 15 {
                println!("seed {seed} {profile}: {violation}");
            }
        }
    }
    for (profile, mut list) in per { list.sort(); list.reverse(); println!("{profile}: mean {} top {:?} median {:?}", list.iter().map(|x| x.0).sum::<u64>() / list.len() as u64, &list[..3], list[list.len()/2]); }
    let took = start.elapsed().as_secs_f64();
    let seeds = (to - from) as f64;
    println!("{} bad; {:.0} seeds/s, {:.0} steps/seed, {:.0} facts/seed, {:.1} simulated s/seed", bad, seeds / took, steps as f64 / seeds, facts as f64 / seeds, sim as f64 / seeds / 1e6);
    println!("{stats}\nunvisited: {:?}", stats.unvisited());
}
