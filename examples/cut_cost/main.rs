//! What a cut costs, and what bringing a point back costs:
//!
//! ```text
//! cargo run --release --example cut_cost [-- --json] [-- --cuts N]
//! ```
//!
//! Guests of 256 MiB, 1 GiB and 4 GiB change the same 1,000 pages, spread over
//! their memory, before each cut; the sizes take turns, so that a noisy host
//! disturbs all alike. Then a point of one guest is sealed in a store, its RAM
//! file is filled on one thread, and the guest is run from the warm copy.

mod restore;

use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use farhaven::guest::embedded::disk::TrackedDisk;
use farhaven::guest::embedded::engine::EmbeddedGuest;
use farhaven::guest::embedded::{Bitmap, RamBlock, SharedVmm, Vmm, VmmError};
use farhaven::guest::kvm::{KvmMachine, KvmOptions, Pace, Terminal};
use farhaven::guest::{After, Guest, Sink, SinkError};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::unit::{Digest, VolumeIndex};

pub(crate) type Failure = Box<dyn Error + Send + Sync>;

const MIB: u64 = 1 << 20;
const SIZES: [u64; 3] = [256 * MIB, 1024 * MIB, 4096 * MIB];
const PAGES: u32 = 1000;

/// For each byte typed, writes [`PAGES`] pages, `stride` bytes apart, and says a dot.
#[rustfmt::skip]
fn program(stride: u32) -> Vec<u8> {
    let mut code = vec![
        0xf4,                         // wait: hlt
        0x66, 0xba, 0xfd, 0x03,       // mov dx, 0x3fd
        0xec,                         // in al, dx
        0xa8, 0x01,                   // test al, 1
        0x74, 0xf6,                   // jz wait
        0x66, 0xba, 0xf8, 0x03,       // mov dx, 0x3f8
        0xec,                         // in al, dx
        0x48, 0xff, 0xc3,             // inc rbx
        0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, 2 MiB
        0xb9, 0xe8, 0x03, 0x00, 0x00, // mov ecx, 1000
        0x48, 0x89, 0x1f,             // touch: mov [rdi], rbx
        0x48, 0x81, 0xc7,             // add rdi, stride
    ];
    code.extend(stride.to_le_bytes());
    code.extend([
        0xff, 0xc9,                   // dec ecx
        0x75, 0xf2,                   // jnz touch
        0xb0, b'.',                   // mov al, '.'
        0xee,                         // out dx, al
        0xeb, 0xd1,                   // jmp wait
    ]);
    code
}

/// A console of two counters: bytes to be typed, dots said.
#[derive(Default)]
struct Keys {
    typed: AtomicU64,
    said: AtomicU64,
}

impl Terminal for Keys {
    fn write(&self, bytes: &[u8]) {
        self.said.fetch_add(bytes.len() as u64, Ordering::Release);
    }

    fn typed(&self) -> Option<u8> {
        let less = |typed: u64| typed.checked_sub(1);
        let taken = self
            .typed
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, less);
        taken.ok().map(|_| b'x')
    }
}

impl Keys {
    /// Has the guest write its pages once.
    fn change(&self) -> Result<(), Failure> {
        let said = self.said.load(Ordering::Acquire);
        self.typed.fetch_add(1, Ordering::AcqRel);
        let begun = Instant::now();
        while self.said.load(Ordering::Acquire) == said {
            if begun.elapsed() > Duration::from_secs(30) {
                return Err("the guest does not write its pages".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// A monitor that tells how long reading its dirty log took.
struct Timed {
    inner: SharedVmm,
    ram: Vec<RamBlock>,
    disks: Vec<Arc<TrackedDisk>>,
    log: Arc<AtomicU64>,
}

impl Timed {
    fn with<T>(&self, call: impl FnOnce(&mut dyn Vmm) -> T) -> T {
        let mut inner = self.inner.lock().expect("nobody panics with it");
        call(&mut *inner)
    }
}

impl Vmm for Timed {
    fn ram(&self) -> &[RamBlock] {
        &self.ram
    }

    fn disks(&self) -> &[Arc<TrackedDisk>] {
        &self.disks
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        self.with(|vmm| vmm.pause())
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        self.with(|vmm| vmm.resume())
    }

    fn running(&self) -> Option<bool> {
        self.with(|vmm| vmm.running())
    }

    fn ended_because(&self) -> String {
        self.with(|vmm| vmm.ended_because())
    }

    fn dirty(&mut self, block: usize) -> Result<Bitmap, VmmError> {
        let begun = Instant::now();
        let pages = self.with(|vmm| vmm.dirty(block));
        let took = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.log.store(took, Ordering::Relaxed);
        pages
    }

    fn read_ram(&self, block: usize, offset: u64, into: &mut [u8]) -> Result<(), VmmError> {
        self.with(|vmm| vmm.read_ram(block, offset, into))
    }

    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        self.with(|vmm| vmm.save())
    }

    fn throttle(&mut self, percent: u8) -> Result<(), VmmError> {
        self.with(|vmm| vmm.throttle(percent))
    }

    fn end(&mut self) {
        self.with(|vmm| vmm.end());
    }
}

/// Counts what is handed over.
#[derive(Default)]
struct Counting(u64);

impl Sink for Counting {
    fn units(
        &mut self,
        _: VolumeIndex,
        _: u64,
        bytes: &[u8],
        _: &[Digest],
    ) -> Result<(), SinkError> {
        self.0 += bytes.len() as u64 / 4096;
        Ok(())
    }

    fn zeros(&mut self, _: VolumeIndex, _: u64, count: u64) -> Result<(), SinkError> {
        self.0 += count;
        Ok(())
    }
}

/// One guest, and what its cuts took.
struct Subject {
    bytes: u64,
    keys: Arc<Keys>,
    guest: EmbeddedGuest,
    log: Arc<AtomicU64>,
    point: u64,
    pauses: Vec<Duration>,
    logs: Vec<Duration>,
    others: Vec<Duration>,
    pages: u64,
}

impl Subject {
    fn start(bytes: u64) -> Result<Self, Failure> {
        let keys = Arc::new(Keys::default());
        // What lies above the hole below 4 GiB is left alone.
        let room = bytes.min(3 << 30) - 2 * MIB;
        let stride = u32::try_from((room / u64::from(PAGES)) & !4095)?;
        let (inner, _) = KvmMachine::start(KvmOptions {
            vcpus: 1,
            ram: bytes,
            ram_file: tempfile::tempfile_in("/dev/shm")?,
            program: program(stride),
            disk: None,
            terminal: keys.clone(),
            pace: Pace::default(),
            irqchip: false,
        })?;
        let (ram, disks) = {
            let vmm = inner.lock().map_err(|_| "the guest's lock")?;
            (vmm.ram().to_vec(), vmm.disks().to_vec())
        };
        let log = Arc::new(AtomicU64::new(0));
        let timed = Timed {
            inner,
            ram,
            disks,
            log: log.clone(),
        };
        let vmm: SharedVmm = Arc::new(Mutex::new(timed));
        let guest = EmbeddedGuest::attach(vmm, DigestKey::random(), 64 << 20)?;
        Ok(Self {
            bytes,
            keys,
            guest,
            log,
            point: 0,
            pauses: Vec::new(),
            logs: Vec::new(),
            others: Vec::new(),
            pages: 0,
        })
    }

    /// Changes the pages and cuts.
    fn cut(&mut self, counts: bool) -> Result<(), Failure> {
        self.keys.change()?;
        self.point += 1;
        let mut sink = Counting::default();
        let cut = self.guest.cut(self.point, After::Continue, &mut sink)?;
        let times = cut.times;
        self.guest.finish_cut(cut, true)?;
        self.guest.sealed(self.point);
        let log = Duration::from_nanos(self.log.load(Ordering::Relaxed));
        if counts {
            self.pages = sink.0;
            self.pauses.push(times.pause);
            self.others.push(times.pause.saturating_sub(log));
            self.logs.push(log);
        }
        Ok(())
    }
}

fn median(times: &mut [Duration]) -> f64 {
    times.sort();
    times
        .get(times.len() / 2)
        .map_or(0.0, Duration::as_secs_f64)
        * 1e3
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let json = arguments.iter().any(|argument| argument == "--json");
    let cuts = arguments
        .iter()
        .skip_while(|argument| *argument != "--cuts")
        .nth(1);
    let cuts: usize = cuts.map_or(Ok(31), |cuts| cuts.parse())?;

    let mut subjects = Vec::new();
    for bytes in SIZES {
        let mut subject = Subject::start(bytes)?;
        subject.guest.round(&mut Counting::default())?;
        subject.cut(false)?;
        subjects.push(subject);
    }
    for _ in 0..cuts {
        for subject in &mut subjects {
            subject.cut(true)?;
        }
    }
    let mut rows = Vec::new();
    for subject in &mut subjects {
        let worst = subject
            .pauses
            .iter()
            .max()
            .map_or(0.0, Duration::as_secs_f64)
            * 1e3;
        rows.push(serde_json::json!({
            "ram_mib": subject.bytes / MIB,
            "pages": subject.pages,
            "pause_ms": median(&mut subject.pauses),
            "worst_pause_ms": worst,
            "log_ms": median(&mut subject.logs),
            "without_log_ms": median(&mut subject.others),
        }));
    }
    drop(subjects);
    let figure = |row: &serde_json::Value, name: &str| row[name].as_f64().unwrap_or(0.0);
    let costs: Vec<f64> = rows
        .iter()
        .map(|row| figure(row, "without_log_ms"))
        .collect();
    let least = costs.iter().copied().fold(f64::INFINITY, f64::min);
    let ratio = costs.iter().copied().fold(0.0, f64::max) / least;
    let restored = restore::measure()?;
    if json {
        let all = serde_json::json!({ "cuts": rows, "ratio": ratio, "restore": restored });
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    println!(
        "memory     pages  pause (median, worst)   dirty log   the rest   [ms, {cuts} cuts each]"
    );
    for row in &rows {
        println!(
            "{:>4} MiB  {:>6}  {:>8.2} {:>12.2} {:>11.2} {:>10.2}",
            row["ram_mib"],
            row["pages"],
            figure(row, "pause_ms"),
            figure(row, "worst_pause_ms"),
            figure(row, "log_ms"),
            figure(row, "without_log_ms"),
        );
    }
    println!("the rest, dearest to cheapest size: {ratio:.2} x");
    println!("{restored}");
    Ok(())
}
