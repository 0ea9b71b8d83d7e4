//! A point brought back: its RAM from the store to a file, and the guest run.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use farhaven::activate::machine::{BuildPlan, Builder};
use farhaven::guest::kvm::builder::KvmBuilder;
use farhaven::guest::kvm::{KvmMachine, KvmOptions, Pace, Terminal, proof};
use farhaven_storage_sync::PointStats;
use farhaven_storage_sync::codec::{Batch, Chain, DedupIndex, Encoder, Sequence};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::store::{Seal, Store, StoreOptions};
use farhaven_storage_sync::unit::{GuestId, UNIT, Volume, VolumeKind};
use rand::RngCore;
use serde::Serialize;

use crate::Failure;

/// Memory whose filling is measured.
const FILL: u64 = 512 << 20;
/// Runs from a warm copy.
const RUNS: usize = 9;

/// What bringing a point back took.
#[derive(Debug, Serialize)]
pub(crate) struct Restored {
    /// Bytes of memory that hold something.
    bytes: u64,
    /// What they take in the store.
    stored: u64,
    /// Filling the RAM file on one thread, in GB of memory per second.
    fill_gb_per_s: f64,
    /// The same per second of processor time.
    fill_gb_per_core_s: f64,
    /// Building a machine over a warm RAM file. Median of some runs, as the next.
    build_ms: f64,
    /// From a built machine until its guest has done its next change.
    restore_and_run_ms: f64,
}

impl std::fmt::Display for Restored {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "RAM from the store: {:.2} GB/s on one thread, {:.2} GB per core-second ({} MiB, {} MiB stored)",
            self.fill_gb_per_s,
            self.fill_gb_per_core_s,
            self.bytes >> 20,
            self.stored >> 20
        )?;
        write!(
            f,
            "guest from a warm copy: built in {:.1} ms, state taken and running {:.1} ms later",
            self.build_ms, self.restore_and_run_ms
        )
    }
}

/// Measures both.
pub(crate) fn measure() -> Result<Restored, Failure> {
    let (bytes, stored, wall, processor) = fill()?;
    let (build_ms, restore_and_run_ms) = run()?;
    let per_second = |time: Duration| bytes as f64 / time.as_secs_f64() / 1e9;
    Ok(Restored {
        bytes,
        stored,
        fill_gb_per_s: per_second(wall),
        fill_gb_per_core_s: per_second(processor),
        build_ms,
        restore_and_run_ms,
    })
}

fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Memory as guests have it: a third repeats a word, a third is half noise,
/// a third is lines of text that differ in their numbers.
fn content(unit: u64, into: &mut [u8]) {
    match unit % 3 {
        0 => {
            for word in into.chunks_exact_mut(8) {
                word.copy_from_slice(&(unit + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
            }
        }
        1 => {
            let (noise, zeros) = into.split_at_mut(UNIT / 2);
            rand::rng().fill_bytes(noise);
            zeros.fill(0);
        }
        _ => {
            let line =
                |number: u64| format!("{unit:08x} row {number:04} paid {:>9}\n", unit * number);
            let text: String = (0..).map(line).take(128).collect();
            let length = text.len().min(into.len());
            for (to, from) in into.iter_mut().zip(text.as_bytes().iter().take(length)) {
                *to = *from;
            }
        }
    }
}

fn fill() -> Result<(u64, u64, Duration, Duration), Failure> {
    let home = tempfile::tempdir()?;
    let (store, _) = Store::open(home.path(), StoreOptions::default())?;
    let (guest, key) = (GuestId::random(), DigestKey::random());
    let index = Arc::new(Mutex::new(DedupIndex::new(64 << 20)));
    let mut encoder = Encoder::new(guest, 1, Arc::new(Sequence::starting_at(1)), index, 3);
    let (mut chain, mut stored) = (Chain::new(), 0);
    let mut keep = |batch: Option<Batch>| -> Result<(), Failure> {
        if let Some(batch) = batch {
            chain.push(batch.seq, &batch.hash);
            stored += batch.bytes.len() as u64;
            store.append(&[batch.bytes])?;
        }
        Ok(())
    };
    let mut bytes = vec![0; UNIT];
    for unit in 0..FILL / UNIT as u64 {
        content(unit, &mut bytes);
        keep(encoder.unit(0, unit, &bytes, key.of(&bytes))?)?;
    }
    keep(encoder.flush())?;
    store.seal(Seal {
        guest,
        point: 1,
        parent: 0,
        cut_at_unix_ns: 1,
        volumes: vec![Volume {
            name: "ram".to_owned(),
            kind: VolumeKind::Ram,
            bytes: FILL,
        }],
        batches: chain.count(),
        chain: chain.finish(),
        context: Vec::new(),
        stats: PointStats::default(),
    })?;
    let replica = store.open_point(guest, 1)?;
    let file = tempfile::tempfile_in("/dev/shm")?;
    file.set_len(FILL)?;
    let written = AtomicU64::new(0);
    let (begun, before) = (Instant::now(), processor_time());
    let write = |unit: u64, bytes: &[u8]| {
        let wrote = file.write_all_at(bytes, unit * UNIT as u64);
        if wrote.is_ok() {
            written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
    };
    replica.fill_parallel(0, 1, &write)?;
    let times = (begun.elapsed(), processor_time() - before);
    if written.load(Ordering::Relaxed) != FILL {
        return Err("not all of the memory was written; is /dev/shm full?".into());
    }
    Ok((FILL, stored, times.0, times.1))
}

struct Silent;

impl Terminal for Silent {
    fn write(&self, _: &[u8]) {}

    fn typed(&self) -> Option<u8> {
        None
    }
}

fn run() -> Result<(f64, f64), Failure> {
    let home = tempfile::tempdir_in("/dev/shm")?;
    let ram = home.path().join("ram");
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&ram)?;
    let (vmm, definition) = KvmMachine::start(KvmOptions {
        vcpus: 1,
        ram: 256 << 20,
        ram_file: file,
        program: proof::program(),
        disk: None,
        terminal: Arc::new(Silent),
        pace: Pace {
            changes: 100_000,
            pages: 256,
            blocks: 0,
        },
        irqchip: false,
    })?;
    std::thread::sleep(Duration::from_secs(2));
    let state = {
        let mut vmm = vmm.lock().map_err(|_| "the guest's lock")?;
        vmm.pause()?;
        let state = vmm.save()?;
        vmm.end();
        state
    };
    drop(vmm);
    let (mut built, mut running) = (Vec::new(), Vec::new());
    for turn in 0..RUNS {
        let directory = home.path().join(turn.to_string());
        std::fs::create_dir(&directory)?;
        let warm = directory.join("ram");
        std::fs::copy(&ram, &warm)?;
        let begun = Instant::now();
        let mut machine = KvmBuilder.build(BuildPlan {
            definition: &definition,
            run: directory.clone(),
            ram: vec![warm.clone()],
            disks: Vec::new(),
            isolated: false,
        })?;
        built.push(begun.elapsed());
        let begun = Instant::now();
        machine.restore(&state)?;
        machine.run()?;
        await_work(&warm, begun + Duration::from_secs(30))?;
        running.push(begun.elapsed());
        machine.kill();
        std::fs::remove_dir_all(&directory)?;
    }
    Ok((crate::median(&mut built), crate::median(&mut running)))
}

/// Until the guest has written the number of its next change: the first word
/// of its first vCPU's control page but one.
fn await_work(ram: &Path, until: Instant) -> Result<(), Failure> {
    let ram = std::fs::File::open(ram)?;
    let number = || {
        let mut word = [0; 8];
        ram.read_exact_at(&mut word, 0x20_0008).map(|()| word)
    };
    let first = number()?;
    while number()? == first {
        if Instant::now() > until {
            return Err("the guest does not go on".into());
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}
