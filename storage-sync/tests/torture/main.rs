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
        run::faults::run(seed, 6, 7, false).unwrap_or_else(|why| panic!("{why}"));
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

/// `cargo run --release -p farhaven-storage-sync --example soak` is an hour of it.
#[test]
fn weeks_of_points_leave_memory_disk_and_handles_flat() {
    let dir = tempfile::tempdir().unwrap();
    let soak = run::soak::Soak {
        seed: 1,
        days: 21,
        points_a_day: 24,
        at_most: std::time::Duration::from_secs(600),
    };
    let done = run::soak::run(&soak, dir.path(), &mut |_| {}).unwrap_or_else(|why| panic!("{why}"));
    assert!(
        done.points > 1000 && done.restarts == 7 && done.dropped > 900,
        "{done:?}"
    );
}

/// A store that has lived, on a disk.
fn lived() -> (
    farhaven_storage_sync::disk::simulated::SimulatedDisk,
    run::trial::Trial,
) {
    let disk = farhaven_storage_sync::disk::simulated::SimulatedDisk::new();
    let mut trial = run::trial::Trial::new(7);
    let mut store = run::trial::open(&disk).unwrap().0;
    for _ in 0..10 {
        let done = trial.step(&mut store, &mut |trial, store| {
            run::cuts::perform(trial, store)?;
            run::cuts::answered(trial);
            Ok::<(), String>(())
        });
        done.unwrap();
    }
    drop(store);
    (disk, trial)
}

#[test]
fn a_sector_that_does_not_read_costs_what_lies_there_and_stops_prunes() {
    use farhaven_storage_sync::disk::simulated::Fault;
    use farhaven_storage_sync::prune::PruneError;
    let (disk, trial) = lived();
    let keep = farhaven_storage_sync::prune::Keep::new();
    let mut around = 0;
    for nth in 1.. {
        let disk = disk.copy();
        disk.fail(nth, Fault::Io);
        let opened = run::trial::open(&disk);
        if disk.heal().is_none() {
            break;
        }
        if let Ok((store, report)) = opened
            && !report.damaged.is_empty()
        {
            around += 1;
            let planned = store.plan_prune(&keep);
            assert!(
                matches!(planned, Err(PruneError::Unreadable { .. })),
                "call {nth}: {report:?}"
            );
        }
        let (store, _) = run::trial::open(&disk).unwrap();
        run::check::points(&store, &trial.expect).unwrap();
        store.plan_prune(&keep).unwrap();
    }
    assert!(around > 0);
}

#[test]
fn a_batch_that_is_sent_again_replaces_its_damaged_copy() {
    let (disk, mut trial) = lived();
    let store = run::trial::open(&disk).unwrap().0;
    trial.write(0);
    let point = store.next_point(trial.expect.guests[0].id);
    let batches = trial.encode(0, point);
    let bytes: Vec<bytes::Bytes> = batches.iter().map(|batch| batch.bytes.clone()).collect();
    store.append(&bytes).unwrap();
    let files = disk.files();
    let needle = &bytes[0][..];
    for (path, content) in &files {
        let found = content.windows(needle.len()).rposition(|w| w == needle);
        if let Some(at) = found {
            assert!(disk.flip(path, at + needle.len() - 1, 3));
        }
    }
    assert_eq!(store.check().damage.len(), 1);
    store.append(&bytes).unwrap();
    assert!(store.check().damage.is_empty());
    let newest = store.newest(trial.expect.guests[0].id);
    let parent = newest.map_or(0, |newest| newest.point);
    store
        .seal(trial.seal_of(0, point, parent, &batches))
        .unwrap();
    let content = trial.now[0].clone();
    run::check::point(&store, trial.expect.guests[0].id, point, &content)
        .map_err(run::check::Wrong::words)
        .unwrap();
}
