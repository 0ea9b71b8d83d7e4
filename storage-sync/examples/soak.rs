//! An hour of virtual days on a store: points of two guests each minute, retention, prunes,
//! a scrub a day, a restart every three days.
//! `cargo run --release -p farhaven-storage-sync --example soak --
//! [--minutes 60] [--days N] [--points-a-day 1440] [--seed S] [--dir DIR] [--json]`
//!
//! The exit status is 1 when a point read differently, or when memory, disk, files or file
//! handles grew after the ninth day, when retention is full.
#![allow(clippy::unwrap_used)]

#[path = "../tests/torture/run/mod.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod run;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use run::soak::{Sample, Soak};

fn asked() -> Option<(Soak, Option<String>, bool)> {
    let mut soak = Soak {
        seed: 1,
        days: u64::MAX,
        points_a_day: 1440,
        at_most: Duration::from_secs(3600),
    };
    let (mut dir, mut json) = (None, false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next()?.parse::<u64>().ok();
        match argument.as_str() {
            "--minutes" => soak.at_most = Duration::from_secs(60 * number()?),
            "--days" => soak.days = number()?,
            "--points-a-day" => soak.points_a_day = number()?.max(1),
            "--seed" => soak.seed = number()?,
            "--dir" => dir = Some(arguments.next()?),
            "--json" => json = true,
            _ => return None,
        }
    }
    Some((soak, dir, json))
}

fn main() -> ExitCode {
    let Some((soak, dir, json)) = asked() else {
        eprintln!(
            "usage: soak [--minutes 60] [--days N] [--points-a-day 1440] [--seed S] [--dir DIR] [--json]"
        );
        return ExitCode::from(2);
    };
    let temporary = tempfile::tempdir().unwrap();
    let dir = dir.map_or_else(|| temporary.path().to_owned(), Into::into);
    let begun = Instant::now();
    let told = &mut |sample: &Sample| {
        let Sample {
            day,
            rss_kib,
            disk_bytes,
            files,
            handles,
            points,
        } = sample;
        match json {
            true => println!(
                "{{\"day\":{day},\"rss_kib\":{rss_kib},\"disk_bytes\":{disk_bytes},\"files\":{files},\"handles\":{handles},\"points\":{points}}}"
            ),
            false => println!(
                "day {day}: {points} points kept, {} MiB of memory, {} MiB in {files} files, {handles} handles",
                rss_kib >> 10,
                disk_bytes >> 20
            ),
        }
    };
    match run::soak::run(&soak, &dir, told) {
        Ok(done) => {
            println!(
                "{} points sealed in {} virtual days and {:?}, {} dropped by {} prunes, {} scrubs, {} restarts: nothing grew",
                done.points,
                done.samples.len(),
                begun.elapsed(),
                done.dropped,
                done.prunes,
                done.scrubs,
                done.restarts
            );
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!(
                "{why}; replay: cargo run --release -p farhaven-storage-sync --example soak -- --seed {}",
                soak.seed
            );
            ExitCode::from(1)
        }
    }
}
