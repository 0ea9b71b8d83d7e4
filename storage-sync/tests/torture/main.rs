//! Some of what `cargo run --release -p farhaven-storage-sync --example torture`
//! does in thousands.
#![allow(clippy::unwrap_used, dead_code)]

mod run;

#[test]
fn power_cuts_lose_nothing_that_was_answered() {
    for seed in 1..4 {
        run::cuts::run(seed, 8, 300).unwrap_or_else(|why| panic!("{why}"));
    }
}

#[test]
fn errors_of_the_disk_lose_nothing_and_say_where() {
    for seed in 1..4 {
        run::faults::run(seed, 6, 7).unwrap_or_else(|why| panic!("{why}"));
    }
}

#[test]
fn bits_that_flip_are_found_and_never_served() {
    let found = run::flips::run(1, 400).unwrap_or_else(|why| panic!("{why}"));
    assert!(found.at_open > 0 && found.by_scrub > 0, "{found:?}");
}

#[test]
fn prunes_leave_no_reference_dangling() {
    let mut races = run::races::Races::default();
    for seed in 0..200 {
        run::races::run(seed, &mut races).unwrap_or_else(|why| panic!("{why}"));
    }
    assert!(
        races.prunes > 0 && races.seals > 0 && races.reopened > 0,
        "{races:?}"
    );
}

#[test]
fn the_catalogue_keeps_every_row_that_was_flushed() {
    let mut rows = run::rows::Rows::default();
    for seed in 0..4 {
        run::rows::run(seed, &mut rows).unwrap_or_else(|why| panic!("{why}"));
    }
    assert!(
        rows.cuts > 0 && rows.faults > 0 && rows.told > 0,
        "{rows:?}"
    );
}
