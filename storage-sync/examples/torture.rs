//! Tries to break a store on a simulated disk:
//! `cargo run --release -p farhaven-storage-sync --example torture --
//! [--cuts N] [--faults N] [--flips N] [--prunes N] [--rows N]
//! [--seed S] [--json]`
//!
//! Power cuts at every change of the disk, errors at every call, flipped bits,
//! prunes against sessions in flight, all of the first three on the catalogue; 10,000 of each unless told otherwise, none
//! of the others when some are told. The exit status is 1 when a promise broke;
//! the seed is printed with the command that replays it.
#![allow(clippy::unwrap_used)]

#[path = "../tests/torture/run/mod.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod run;

use std::process::ExitCode;

const USUAL: u64 = 10_000;

struct Asked {
    cuts: u64,
    faults: u64,
    flips: u64,
    prunes: u64,
    rows: u64,
    seed: u64,
    json: bool,
}

fn asked() -> Option<Asked> {
    let mut told: [Option<u64>; 6] = [None; 6];
    let names = [
        "--cuts", "--faults", "--flips", "--prunes", "--rows", "--seed",
    ];
    let mut json = false;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if argument == "--json" {
            json = true;
            continue;
        }
        let at = names.iter().position(|name| *name == argument)?;
        told[at] = Some(arguments.next()?.parse().ok()?);
    }
    let usual = match told[..5].iter().all(Option::is_none) {
        true => USUAL,
        false => 0,
    };
    let [cuts, faults, flips, prunes, rows, seed] = told;
    Some(Asked {
        cuts: cuts.unwrap_or(usual),
        faults: faults.unwrap_or(usual),
        flips: flips.unwrap_or(usual),
        prunes: prunes.unwrap_or(usual),
        rows: rows.unwrap_or(usual),
        seed: seed.unwrap_or(1),
        json,
    })
}

fn main() -> ExitCode {
    let Some(asked) = asked() else {
        eprintln!(
            "usage: torture [--cuts N] [--faults N] [--flips N] [--prunes N] [--rows N] \
             [--seed S] [--json]"
        );
        return ExitCode::from(2);
    };
    let outcomes = [
        ("power_cuts", "--cuts", asked.cuts, cuts(&asked)),
        ("faults", "--faults", asked.faults, faults(&asked)),
        ("flips", "--flips", asked.flips, flips(&asked)),
        ("prunes", "--prunes", asked.prunes, prunes(&asked)),
        ("catalogue", "--rows", asked.rows, rows(&asked)),
    ];
    let mut broken = false;
    for (name, flag, count, outcome) in outcomes {
        if count == 0 {
            continue;
        }
        match outcome {
            Ok(words) if asked.json => println!("{{\"{name}\":{{{words}}},\"violations\":0}}"),
            Ok(words) => println!("{name}: {words}, 0 violations"),
            Err((seed, why)) => {
                broken = true;
                let replay = format!(
                    "cargo run --release -p farhaven-storage-sync --example torture -- \
                     {flag} {count} --seed {seed}"
                );
                match asked.json {
                    true => println!(
                        "{}",
                        serde_json::json!({ name: { "seed": seed, "why": why, "replay": replay },
                            "violations": 1 })
                    ),
                    false => {
                        println!("{name}: VIOLATION with seed {seed}: {why}\nreplay: {replay}")
                    }
                }
            }
        }
    }
    match broken {
        true => ExitCode::from(1),
        false => ExitCode::SUCCESS,
    }
}

type Outcome = Result<String, (u64, String)>;

fn words(pairs: &[(&str, u64)]) -> String {
    let pair = |(name, value): &(&str, u64)| format!("\"{name}\":{value}");
    pairs.iter().map(pair).collect::<Vec<_>>().join(",")
}

fn cuts(asked: &Asked) -> Outcome {
    let mut all = run::cuts::Cuts::default();
    for seed in asked.seed.. {
        if all.power_cuts >= asked.cuts {
            break;
        }
        let most = asked.cuts - all.power_cuts;
        let one = run::cuts::run(seed, 14, most).map_err(|why| (seed, why))?;
        all.power_cuts += one.power_cuts;
        all.kills += one.kills;
        all.in_recovery += one.in_recovery;
        all.appends += one.appends;
        all.seals += one.seals;
        all.prunes += one.prunes;
        all.opens += one.opens;
    }
    Ok(words(&[
        ("cuts", all.power_cuts),
        ("kills_before_a_cut", all.kills),
        ("cuts_in_recovery", all.in_recovery),
        ("appends", all.appends),
        ("seals", all.seals),
        ("prunes", all.prunes),
        ("opens", all.opens),
    ]))
}

fn faults(asked: &Asked) -> Outcome {
    let mut all = run::faults::Faults::default();
    for seed in asked.seed.. {
        if all.faults >= asked.faults {
            break;
        }
        let one = run::faults::run(seed, 6, 1, true).map_err(|why| (seed, why))?;
        all.faults += one.faults;
        all.told += one.told;
        all.went_on += one.went_on;
        all.reached.add(&one.reached);
        all.failed.add(&one.failed);
    }
    if let Some(site) = all.reached.without(&all.failed).first() {
        return Err((asked.seed, format!("no call failed from {site}")));
    }
    Ok(words(&[
        ("faults", all.faults),
        ("told", all.told),
        ("went_on", all.went_on),
        ("call_sites", all.failed.count()),
    ]))
}

fn flips(asked: &Asked) -> Outcome {
    if asked.flips == 0 {
        return Ok(String::new());
    }
    let found = run::flips::run(asked.seed, asked.flips).map_err(|why| (asked.seed, why))?;
    let mut pairs = vec![
        ("flips", found.flips),
        ("found_at_open", found.at_open),
        ("found_by_scrub", found.by_scrub),
        ("harmless", found.harmless),
        ("points_refused", found.points_refused),
    ];
    pairs.extend(found.kinds.iter().map(|(kind, &count)| (&kind[..], count)));
    Ok(words(&pairs))
}

fn prunes(asked: &Asked) -> Outcome {
    let mut races = run::races::Races::default();
    for seed in asked.seed..asked.seed + asked.prunes {
        run::races::run(seed, &mut races).map_err(|why| (seed, why))?;
    }
    Ok(words(&[
        ("interleavings", races.interleavings),
        ("seals", races.seals),
        ("dangling_seals_refused", races.dangling),
        ("prunes", races.prunes),
        ("revived", races.revived),
        ("reopened", races.reopened),
    ]))
}

fn rows(asked: &Asked) -> Outcome {
    let mut all = run::rows::Rows::default();
    for seed in asked.seed.. {
        if all.cuts + all.faults + all.flips >= asked.rows {
            break;
        }
        run::rows::run(seed, &mut all).map_err(|why| (seed, why))?;
    }
    Ok(words(&[
        ("power_cuts", all.cuts),
        ("faults", all.faults),
        ("flips", all.flips),
        ("flips_told", all.told),
    ]))
}
