//! Tries to break whole sites in virtual time:
//! `cargo run --release --example simulate -- [--seeds N] [--from SEED]
//! [--partitions] [--operations] [--catalogues] [--within] [--clocks]
//! [--break sync|files|terms|dirty|stop|memory] [--jobs N] [--all] [--each] [--trace] [--json]`
//!
//! Each seed is a run of two sites with guests between which the link is cut
//! and healed, whose daemons and machines die, and whose operators order moves,
//! failovers, tests and the rest at bad moments; with `--operations` runs of runbooks
//! and evacuations, too, of guests that do not always stop, and with `--catalogues` sites
//! that come back have lost their catalogue now and then; with `--within` sites die in
//! the midst of their work, too, and with `--clocks` time goes faster at one site than at
//! the other. The exit status is 1 when a promise broke; the seed is printed with the command that replays it. It ends
//! there, unless `--all` is told; `--each` prints the digest of every run: of all
//! that happened in it, the same for the same seed.
#![allow(clippy::unwrap_used)]

#[path = "../tests/simulate/run/mod.rs"]
#[allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "the tests use the rest"
)]
mod run;

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

use run::{Counts, Options, Ran, children};

struct Asked {
    seeds: u64,
    from: u64,
    jobs: usize,
    all: bool,
    each: bool,
    json: bool,
    /// Of every run, but for its seed.
    of_all: Options,
}

impl Asked {
    fn options(&self, seed: u64) -> Options {
        Options {
            seed,
            ..self.of_all
        }
    }
}

fn asked() -> Option<Asked> {
    let mut asked = Asked {
        seeds: 100,
        from: 1,
        jobs: std::thread::available_parallelism().map_or(1, usize::from),
        all: false,
        each: false,
        json: false,
        of_all: Options {
            seed: 0,
            partitions: false,
            operations: false,
            catalogues: false,
            within: false,
            clocks: false,
            fault: None,
            trace: false,
        },
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--seeds" => asked.seeds = arguments.next()?.parse().ok()?,
            "--from" => asked.from = arguments.next()?.parse().ok()?,
            "--jobs" => asked.jobs = arguments.next()?.parse().ok().filter(|jobs| *jobs > 0)?,
            "--partitions" => asked.of_all.partitions = true,
            "--operations" => asked.of_all.operations = true,
            "--catalogues" => asked.of_all.catalogues = true,
            "--within" => asked.of_all.within = true,
            "--clocks" => asked.of_all.clocks = true,
            "--break" => {
                let name = serde_json::Value::String(arguments.next()?);
                asked.of_all.fault = Some(serde_json::from_value(name).ok()?);
            }
            "--all" => asked.all = true,
            "--each" => asked.each = true,
            "--trace" => asked.of_all.trace = true,
            "--json" => asked.json = true,
            _ => return None,
        }
    }
    Some(asked)
}

fn main() -> ExitCode {
    if children::is_child() {
        return ExitCode::SUCCESS;
    }
    let Some(asked) = asked() else {
        eprintln!(
            "usage: simulate [--seeds N] [--from SEED] [--partitions] [--operations] [--catalogues] [--within] [--clocks] \
             [--break sync|files|terms|dirty|stop|memory] [--jobs N] [--all] [--each] [--trace] [--json]"
        );
        return ExitCode::from(2);
    };
    let (broken, done) = (AtomicU64::new(0), AtomicU64::new(0));
    let tell = |ran: &Ran| {
        done.fetch_add(1, Ordering::SeqCst);
        if asked.each {
            println!("{}", serde_json::to_string(ran).unwrap());
        }
        if ran.broken.is_some() {
            broken.fetch_add(1, Ordering::SeqCst);
            show(&asked, ran);
        }
    };
    let sum = children::run_all(
        asked.from,
        asked.seeds,
        asked.jobs,
        asked.all,
        |seed| asked.options(seed),
        &[],
        tell,
    );
    let (done, broken) = (done.into_inner(), broken.into_inner());
    total(&asked, done, broken, &sum);
    match broken {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::from(1),
    }
}

fn show(asked: &Asked, ran: &Ran) {
    let Some(broken) = &ran.broken else { return };
    let replay = asked.options(ran.seed).replay();
    match asked.json {
        true => println!(
            "{}",
            serde_json::json!({ "seed": ran.seed, "promise": broken.promise,
                "why": broken.why, "digest": ran.digest, "replay": replay })
        ),
        false => println!(
            "VIOLATION of promise {} with seed {}: {}\nreplay: {replay}",
            broken.promise, ran.seed, broken.why
        ),
    }
}

fn total(asked: &Asked, done: u64, broken: u64, sum: &Counts) {
    let counts = serde_json::to_value(sum).unwrap();
    if asked.json {
        println!(
            "{}",
            serde_json::json!({ "seeds": done, "from": asked.from,
                "partitions": asked.of_all.partitions, "operations": asked.of_all.operations,
                "violations": broken, "counts": counts })
        );
        return;
    }
    let counts = counts.as_object().unwrap().iter();
    let counts: Vec<_> = counts
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    println!(
        "{done} seeds from {}: {}; {broken} violations",
        asked.from,
        counts.join(", ")
    );
}
