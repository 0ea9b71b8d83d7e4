//! Plans the evacuation of a made-up site, performs the plan on simulated guests,
//! and says how it went; exit status 1 where the planner missed what it owes.
//!
//! ```console
//! cargo run --release -p farhaven-policies --example evacuation -- --guests 10000 --seed 7
//! ```

use std::process::ExitCode;
use std::time::Instant;

use farhaven_policies::evacuate::{Plan, plan};
use serde::Serialize;

#[path = "evacuation/simulate.rs"]
mod simulate;
#[path = "evacuation/sites.rs"]
mod sites;

use simulate::{Rule, simulate as perform};

/// Longest time of planning, in seconds.
const LONGEST_PLANNING: f64 = 1.0;
/// How much later than the lower bound a plan may end.
const OVER_BOUND: f64 = 1.05;
/// Fewer guests than this leave gaps that the simple bound does not see.
const MANY: usize = 100;

/// All that was found, times in seconds.
#[derive(Debug, Serialize)]
struct Report {
    guests: usize,
    groups: usize,
    seed: u64,
    waves: usize,
    planning: f64,
    planned_finish: f64,
    simulated_finish: f64,
    deadline: f64,
    hidden_schedule: f64,
    bound_bytes: f64,
    bound_writes: f64,
    bound_chain: f64,
    bound_least: f64,
    over_bound: f64,
    gigabytes: f64,
    left: usize,
    blackouts_over_policy: usize,
    violations: Vec<String>,
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (mut guests, mut seed, mut json, mut show) = (1000, 1, false, false);
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|text| text.parse::<u64>().ok());
        match (
            argument.as_str(),
            number_wanted(&argument).then(&mut number).flatten(),
        ) {
            ("--guests", Some(count)) if (1..=100_000).contains(&count) => guests = count as usize,
            ("--seed", Some(value)) => seed = value,
            ("--json", _) => json = true,
            ("--plan", _) => show = true,
            _ => {
                eprintln!(
                    "usage: evacuation [--guests 1..100000] [--seed NUMBER] [--json] [--plan]"
                );
                return ExitCode::from(2);
            }
        }
    }
    let made = sites::make(guests, seed);
    let began = Instant::now();
    let planned = match plan(&made.facts) {
        Ok(planned) => planned,
        Err(error) => {
            eprintln!("no plan: {error}");
            return ExitCode::FAILURE;
        }
    };
    let planning = began.elapsed().as_secs_f64();
    let happened = perform(&made.facts, &made.truth, &Rule::of(&made.facts, &planned));
    let deadline = made.facts.deadline.unwrap_or_default().as_secs_f64();
    let bytes = planned.bound.writes.as_secs_f64();
    let chain = planned.bound.chain.as_secs_f64();
    let bound = if guests >= MANY {
        bytes.max(chain)
    } else {
        planned.bound.least.as_secs_f64()
    };
    let over_bound = happened.finish / bound.max(1e-9);

    let mut violations = Vec::new();
    let mut require = |holds: bool, what: String| {
        if !holds {
            violations.push(what);
        }
    };
    require(
        planning < LONGEST_PLANNING,
        format!("planning took {planning:.2} s"),
    );
    require(
        planned.left.is_empty(),
        format!("{} groups left", planned.left.len()),
    );
    require(
        happened.finish <= deadline,
        format!(
            "ended at {:.1} s, the deadline was {deadline:.1} s",
            happened.finish
        ),
    );
    require(
        over_bound <= OVER_BOUND,
        format!("ended at {over_bound:.3} times the lower bound"),
    );
    require(
        happened.out_of_order == 0,
        format!("{} starts out of order", happened.out_of_order),
    );
    let report = Report {
        guests,
        groups: made.facts.groups.len(),
        seed,
        waves: planned.waves.len(),
        planning,
        planned_finish: planned.finish.as_secs_f64(),
        simulated_finish: happened.finish,
        deadline,
        hidden_schedule: made.hidden,
        bound_bytes: planned.bound.bytes.as_secs_f64(),
        bound_writes: bytes,
        bound_chain: chain,
        bound_least: planned.bound.least.as_secs_f64(),
        over_bound,
        gigabytes: happened.bytes / 1e9,
        left: planned.left.len(),
        blackouts_over_policy: happened.blackouts_over,
        violations,
    };
    print(&report, &planned, json, show);
    if report.violations.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn number_wanted(argument: &str) -> bool {
    matches!(argument, "--guests" | "--seed")
}

fn print(report: &Report, planned: &Plan, json: bool, show: bool) {
    if json {
        match serde_json::to_string(report) {
            Ok(text) => println!("{text}"),
            Err(error) => eprintln!("{error}"),
        }
        return;
    }
    println!(
        "{} guests in {} groups, {:.0} GB: planned in {:.3} s as {} waves",
        report.guests, report.groups, report.gigabytes, report.planning, report.waves
    );
    println!(
        "done after {:.1} s (planned {:.1} s), deadline {:.1} s, hidden schedule {:.1} s",
        report.simulated_finish, report.planned_finish, report.deadline, report.hidden_schedule
    );
    println!(
        "lower bounds: bytes {:.1} s, with writes {:.1} s, chain {:.1} s, least {:.1} s: {:.3} times",
        report.bound_bytes,
        report.bound_writes,
        report.bound_chain,
        report.bound_least,
        report.over_bound
    );
    println!(
        "{} guests ran nowhere for longer than their policy says",
        report.blackouts_over_policy
    );
    for wave in planned.waves.iter().filter(|_| show) {
        println!(
            "wave {:>3}: {:>8.1} s to {:>8.1} s, {} groups",
            wave.number,
            wave.from.as_secs_f64(),
            wave.until.as_secs_f64(),
            wave.groups.len()
        );
    }
    for violation in &report.violations {
        println!("VIOLATION: {violation}");
    }
}
