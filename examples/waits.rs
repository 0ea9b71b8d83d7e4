//! What it is worth to leave to the cut what changes all the time: bytes of
//! batches for each point, with and without, over a link of some rate.
//!
//! ```text
//! cargo run --profile ci --example waits -- --mbit 20 --points 4 --json
//! ```
//!
//! For each workload four sim guests run beside one another, alike but for the
//! number of looks after which a unit waits (0: none ever does). A point is two
//! rounds and a cut, as when a guest changed more than its capture buffer holds,
//! or before the last cut of a move. Each pass takes as long as the link needs
//! for its batches, which are those that would be sent: encoded with dedup,
//! differences and zstd.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use farhaven::guest::embedded::EmbeddedGuest;
use farhaven::guest::sim::{SimGuest, SimOptions};
use farhaven::guest::{After, Guest, Sink, SinkError};
use farhaven_storage_sync::codec::{Bases, Batch, DedupIndex, EncodeError, Encoder, Sequence};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::unit::{Digest, GuestId, UNIT, VolumeIndex};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const MIB: u64 = 1 << 20;
const ROUNDS: u32 = 2;
const BUFFER: usize = 64 << 20;

/// Encodes what it is given, counts it, and takes the time that the link would.
struct Link {
    encoder: Encoder,
    index: Arc<Mutex<DedupIndex>>,
    bases: Arc<Mutex<Bases>>,
    bytes_per_second: f64,
    free_at: Instant,
    bytes: u64,
    units: u64,
}

impl Link {
    fn new(bytes_per_second: f64) -> Result<Self, Failure> {
        let index = Arc::new(Mutex::new(DedupIndex::new(64 << 20)));
        let bases = Arc::new(Mutex::new(Bases::new(64 << 20)));
        let encoder = Encoder::new(
            GuestId([1; 16]),
            1,
            Arc::new(Sequence::starting_at(1)),
            index.clone(),
            3,
        );
        Ok(Self {
            encoder: encoder.with_bases(bases.clone()),
            index,
            bases,
            bytes_per_second,
            free_at: Instant::now(),
            bytes: 0,
            units: 0,
        })
    }

    fn batch(&mut self, batch: Option<Batch>) {
        let Some(batch) = batch else { return };
        let held = |e: PoisonError<_>| e.into_inner();
        let mut index = self.index.lock().unwrap_or_else(held);
        index.acknowledge(batch.seq);
        drop(index);
        let mut bases = self.bases.lock().unwrap_or_else(PoisonError::into_inner);
        bases.acknowledge(batch.seq);
        drop(bases);
        self.bytes += batch.bytes.len() as u64;
        let takes = Duration::from_secs_f64(batch.bytes.len() as f64 / self.bytes_per_second);
        let now = Instant::now();
        self.free_at = self.free_at.max(now) + takes;
        std::thread::sleep(self.free_at - now);
    }

    fn encoded(&mut self, batch: Result<Option<Batch>, EncodeError>) -> Result<(), SinkError> {
        self.batch(batch.map_err(|_| SinkError::Closed)?);
        Ok(())
    }

    /// What came since it was asked last: bytes of batches, and units.
    fn taken(&mut self) -> (u64, u64) {
        let last = self.encoder.flush();
        self.batch(last);
        (
            std::mem::take(&mut self.bytes),
            std::mem::take(&mut self.units),
        )
    }
}

impl Sink for Link {
    fn units(
        &mut self,
        volume: VolumeIndex,
        first: u64,
        bytes: &[u8],
        digests: &[Digest],
    ) -> Result<(), SinkError> {
        for (unit, (bytes, digest)) in (first..).zip(bytes.chunks_exact(UNIT).zip(digests)) {
            self.units += 1;
            let batch = self.encoder.unit(volume, unit, bytes, *digest);
            self.encoded(batch)?;
        }
        Ok(())
    }

    fn zeros(&mut self, volume: VolumeIndex, unit: u64, count: u64) -> Result<(), SinkError> {
        let batch = self.encoder.zeros(volume, unit, count);
        self.encoded(batch)
    }
}

/// What the points of a guest took, all together.
#[derive(Default, Clone, Copy)]
struct Taken {
    round_bytes: u64,
    round_units: u64,
    cut_bytes: u64,
    cut_units: u64,
    waited_units: u64,
    most_waited: u64,
}

fn run(
    workload: &str,
    looks: u8,
    points: u64,
    rate: f64,
    directory: &Path,
) -> Result<Taken, Failure> {
    let run = directory.join(format!("{}-{looks}", workload.replace(':', "-")));
    let ram = run.with_extension("ram");
    let (vmm, _) = SimGuest::start(SimOptions {
        seed: 7,
        ram_bytes: 64 * MIB,
        disks: vec![("vda".to_owned(), 64 * MIB)],
        workload: workload.parse()?,
        run,
        ram,
    })?;
    let mut guest = EmbeddedGuest::attach(vmm, DigestKey::new([5; 32]), BUFFER)?;
    guest.waits_after(looks);
    // The first copy is not what is measured.
    let mut link = Link::new(1e12)?;
    guest.round(&mut link)?;
    link.taken();
    link.bytes_per_second = rate;
    let mut taken = Taken::default();
    for point in 0..=points {
        for _ in 0..ROUNDS {
            std::thread::sleep(Duration::from_millis(500));
            guest.round(&mut link)?;
            let (bytes, units) = link.taken();
            if point > 0 {
                taken.round_bytes += bytes;
                taken.round_units += units;
                taken.waited_units += guest.waiting();
                taken.most_waited = taken.most_waited.max(guest.waiting());
            }
        }
        let mut cut = guest.cut(point + 1, After::Continue, &mut link)?;
        for disk in &mut cut.disks {
            disk.changed(&mut link)?;
        }
        guest.finish_cut(cut, true)?;
        guest.sealed(point + 1);
        let (bytes, units) = link.taken();
        // The first point finds out what is hot.
        if point > 0 {
            taken.cut_bytes += bytes;
            taken.cut_units += units;
        }
    }
    guest.let_go()?;
    Ok(taken)
}

fn main() -> Result<(), Failure> {
    let (mut mbit, mut points, mut json) = (20.0, 4, false);
    let mut workloads: Vec<String> = ["idle", "database:500", "files:8", "noise:8"]
        .map(str::to_owned)
        .to_vec();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--mbit" => mbit = value()?.parse()?,
            "--points" => points = value()?.parse()?,
            "--workload" => workloads = vec![value()?],
            "--json" => json = true,
            _ => {
                return Err(format!(
                    "unknown argument {word}; known are --mbit N, --points N, --workload W, --json"
                )
                .into());
            }
        }
    }
    let rate = f64::max(mbit, 0.1) * 125_000.0;
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let mut rows = Vec::new();
    for workload in &workloads {
        let taken = std::thread::scope(|scope| {
            let runs: Vec<_> = (0..4)
                .map(|looks| {
                    let directory = directory.path();
                    scope.spawn(move || (looks, run(workload, looks, points, rate, directory)))
                })
                .collect();
            runs.into_iter()
                .map(|run| run.join().map_err(|_| "a guest's thread panicked"))
                .collect::<Result<Vec<_>, _>>()
        })?;
        for (looks, taken) in taken {
            let taken = taken?;
            let each = |sum: u64| sum / points.max(1);
            if !json {
                println!(
                    "{workload:13} waits after {looks}: {:9} bytes a point, {:9} in rounds ({} units), {:9} in the cut ({} units); {} units waited at most",
                    each(taken.round_bytes + taken.cut_bytes),
                    each(taken.round_bytes),
                    each(taken.round_units),
                    each(taken.cut_bytes),
                    each(taken.cut_units),
                    taken.most_waited,
                );
            }
            rows.push(serde_json::json!({
                "workload": workload,
                "waits_after": looks,
                "point_bytes": each(taken.round_bytes + taken.cut_bytes),
                "round_bytes": each(taken.round_bytes),
                "round_units": each(taken.round_units),
                "cut_bytes": each(taken.cut_bytes),
                "cut_units": each(taken.cut_units),
                "waited_units": each(taken.waited_units),
                "most_waited_units": taken.most_waited,
            }));
        }
    }
    if json {
        println!(
            "{}",
            serde_json::json!({"mbit": mbit, "points": points, "rounds": ROUNDS, "runs": rows})
        );
    }
    Ok(())
}
