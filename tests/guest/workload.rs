//! The test guest's only program. It fills memory, keeps a ledger in memory,
//! one on a raw disk and one in files, changes them at a given rate, checks
//! them all the time, and says on the serial console how it fares:
//!
//!     HB <n> seq=<memory writes> block=<disk writes> mem=ok disk=ok
//!
//! every 100 ms, and after a byte `c` on the console, when everything was looked at,
//!
//!     CHECK <n> mem=ok disk=ok pages=<n> blocks=<n> files=<n>
//!
//! `ok` becomes `BAD:<why>` at the first fault and stays so. On a host,
//! `workload generate DIR SEED BYTES` fills a directory with files for the
//! guest's filesystem and lists all that is there with checksums.

#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

mod content;
mod ledger;
mod library;

use content::{PAGE, Words, sum};
use ledger::{Blocks, Journal, Memory};
use library::{Library, direct, generate};

const O_NONBLOCK: i32 = 0o4000;
const BEAT: Duration = Duration::from_millis(100);

/// What the kernel's command line asks for.
struct Options {
    /// `farhaven.load=`: idle, database, or noise:<MB/s>.
    database: bool,
    noise: u64,
    /// `farhaven.noise=`: pages that the noise fills again and again.
    noise_pages: u64,
    /// `farhaven.fill=`: MiB of memory filled at the start.
    fill: u64,
    /// `farhaven.pages=`: pages of the memory ledger.
    pages: u64,
    /// `farhaven.rate=`: memory writes in a beat, in mode database.
    rate: u64,
    seed: u64,
}

impl Options {
    fn parse(line: &str) -> Self {
        let text = |name: &str| {
            line.split_whitespace()
                .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        };
        let number = |name, otherwise| {
            text(name)
                .and_then(|value| value.parse().ok())
                .unwrap_or(otherwise)
        };
        let load = text("farhaven.load").unwrap_or("database");
        let noise = load
            .strip_prefix("noise:")
            .and_then(|rate| rate.parse().ok())
            .unwrap_or(0);
        Options {
            database: load == "database",
            noise,
            fill: number("farhaven.fill", 8),
            noise_pages: number("farhaven.noise", 8192),
            pages: number("farhaven.pages", 2048),
            rate: number("farhaven.rate", 7),
            seed: number("farhaven.seed", 1),
        }
    }
}

/// Filled memory that nobody changes.
struct Fill {
    pages: Vec<u8>,
    sums: Vec<u64>,
}

impl Fill {
    fn new(seed: u64, bytes: usize) -> Self {
        let words = Words::new();
        let mut fill = Fill {
            pages: vec![0; bytes],
            sums: Vec::new(),
        };
        for (page, index) in fill.pages.chunks_exact_mut(PAGE).zip(0..) {
            words.fill_page(seed, index, page);
            fill.sums.push(sum(page));
        }
        fill
    }

    fn check(&self, index: u64) -> Result<(), String> {
        let page = &self.pages[index as usize * PAGE..][..PAGE];
        if sum(page) == self.sums[index as usize] {
            Ok(())
        } else {
            Err(format!("fill-{index}-differs"))
        }
    }
}

/// The first fault, kept for ever.
#[derive(Default)]
struct Verdict(Option<String>);

impl Verdict {
    fn note(&mut self, outcome: Result<(), String>) {
        if let (None, Err(why)) = (&self.0, outcome) {
            self.0 = Some(why);
        }
    }

    fn text(&self) -> String {
        self.0
            .as_ref()
            .map_or("ok".to_owned(), |why| format!("BAD:{why}"))
    }
}

struct Workload {
    options: Options,
    memory: Memory,
    noise: Option<Memory>,
    fill: Fill,
    disk: Option<Blocks>,
    table: Option<Blocks>,
    journal: Option<Journal>,
    library: Library,
    memory_verdict: Verdict,
    disk_verdict: Verdict,
    beats: u64,
    next: Instant,
    console: File,
}

impl Workload {
    fn start(options: Options, root: &Path, disk: &Path, console: File) -> io::Result<Self> {
        let seed = options.seed;
        let library = Library::open(root);
        // A server's memory holds part of its disk: the page cache.
        for (path, _, _) in library.files.iter().step_by(10) {
            drop(fs::read(path)?);
        }
        let (mut table, mut journal) = (None, None);
        if !library.files.is_empty() {
            let path = root.join("table");
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(&path)?;
            file.set_len(1024 * PAGE as u64)?;
            table = Some(Blocks::new(seed + 1, 1024, direct(&path, false)?, file));
            let path = root.join("journal");
            let file = OpenOptions::new().append(true).create(true).open(&path)?;
            file.set_len(0)?;
            journal = Some(Journal::new(seed + 2, direct(&path, false)?, file));
        }
        let disk = match disk.exists() {
            true => Some(Blocks::new(
                seed + 3,
                4096,
                direct(disk, false)?,
                direct(disk, true)?,
            )),
            false => None,
        };
        Ok(Workload {
            memory: Memory::new(seed, options.pages, false),
            noise: (options.noise > 0).then(|| Memory::new(seed + 4, options.noise_pages, true)),
            fill: Fill::new(seed + 5, (options.fill << 20) as usize),
            options,
            disk,
            table,
            journal,
            library,
            memory_verdict: Verdict::default(),
            disk_verdict: Verdict::default(),
            beats: 0,
            next: Instant::now(),
            console,
        })
    }

    /// Memory and disk in lockstep: each write of one carries the number of the other's.
    fn load(&mut self) {
        let writes = if self.options.database {
            self.options.rate
        } else {
            u64::from(self.beats % 10 == 0)
        };
        for _ in 0..writes {
            let stamp = self.disk.as_ref().map_or(0, Blocks::seq);
            self.memory_verdict.note(self.memory.write(stamp));
        }
        if let Some(noise) = &mut self.noise {
            for _ in 0..self.options.noise * (1_000_000 / 10) / PAGE as u64 {
                self.memory_verdict.note(noise.write(0));
            }
        }
        if writes == 0 {
            return;
        }
        let stamp = self.memory.seq();
        if let Some(disk) = &mut self.disk {
            self.disk_verdict.note(disk.write(stamp));
        }
        if let (Some(table), Some(journal), 0) =
            (&mut self.table, &mut self.journal, self.beats % 3)
        {
            self.disk_verdict.note(table.write(stamp));
            self.disk_verdict.note(journal.append());
        }
    }

    /// A little of everything, so that each part's turn comes within a minute or so.
    fn check_some(&mut self) {
        let turn = self.beats;
        for step in 0..8 {
            self.memory_verdict
                .note(self.memory.check((turn * 8 + step) % self.memory.count()));
        }
        let pages = self.fill.sums.len() as u64;
        for step in 0..32.min(pages) {
            self.memory_verdict
                .note(self.fill.check((turn * 32 + step) % pages));
        }
        for blocks in [&mut self.disk, &mut self.table].into_iter().flatten() {
            self.disk_verdict.note(blocks.check(turn % blocks.count()));
        }
    }

    fn beat(&mut self) {
        self.beats += 1;
        let block = self.disk.as_ref().map_or(0, Blocks::seq);
        let (memory, disk) = (self.memory_verdict.text(), self.disk_verdict.text());
        self.say(&format!(
            "HB {} seq={} block={block} mem={memory} disk={disk}\n",
            self.beats,
            self.memory.seq()
        ));
        let now = Instant::now();
        self.next = (self.next + BEAT).max(now);
    }

    fn say(&mut self, line: &str) {
        // There is nobody to tell when the console itself fails.
        let _ = self.console.write_all(line.as_bytes());
    }

    fn beat_if_due(&mut self) {
        if Instant::now() >= self.next {
            self.beat();
        }
    }

    /// Everything, while the load rests and the heart beats on.
    fn check_all(&mut self) {
        let (mut pages, mut blocks, mut files) = (0, 0, 0);
        for item in 0..self.memory.count() {
            self.memory_verdict.note(self.memory.check(item));
            self.beat_if_due();
            pages += 1;
        }
        for item in 0..self.noise.as_ref().map_or(0, Memory::count) {
            let outcome = self
                .noise
                .as_ref()
                .map_or(Ok(()), |noise| noise.check(item));
            self.memory_verdict.note(outcome);
            self.beat_if_due();
            pages += 1;
        }
        for index in 0..self.fill.sums.len() as u64 {
            self.memory_verdict.note(self.fill.check(index));
            self.beat_if_due();
            pages += 1;
        }
        for item in 0..self.disk.as_ref().map_or(0, Blocks::count) {
            let outcome = self.disk.as_mut().map_or(Ok(()), |disk| disk.check(item));
            self.disk_verdict.note(outcome);
            self.beat_if_due();
            blocks += 1;
        }
        for item in 0..self.table.as_ref().map_or(0, Blocks::count) {
            let outcome = self
                .table
                .as_mut()
                .map_or(Ok(()), |table| table.check(item));
            self.disk_verdict.note(outcome);
            self.beat_if_due();
            files = 1;
        }
        if let Some(journal) = &mut self.journal {
            self.disk_verdict.note(journal.check());
            files += 1;
        }
        for index in 0..self.library.files.len() as u64 {
            let outcome = self.library.check(index);
            self.disk_verdict.note(outcome);
            self.beat_if_due();
            files += 1;
        }
        let (memory, disk) = (self.memory_verdict.text(), self.disk_verdict.text());
        let counts = format!("pages={pages} blocks={blocks} files={files}");
        self.say(&format!(
            "CHECK {} mem={memory} disk={disk} {counts}\n",
            self.beats
        ));
    }

    fn run(mut self, mut requests: File) -> ! {
        loop {
            self.load();
            self.check_some();
            let mut request = [0];
            if matches!(requests.read(&mut request), Ok(1)) && request == *b"c" {
                self.check_all();
            }
            std::thread::sleep(self.next.saturating_duration_since(Instant::now()));
            self.beat();
        }
    }
}

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, verb, root, seed, bytes] = arguments.as_slice() {
        if verb == "generate" {
            return generate(
                Path::new(root),
                seed.parse().unwrap_or(1),
                bytes.parse().unwrap_or(0),
            );
        }
    }
    let console = OpenOptions::new().write(true).open("/dev/ttyS0")?;
    let requests = OpenOptions::new()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open("/dev/ttyS0")?;
    let options = Options::parse(&fs::read_to_string("/proc/cmdline")?);
    Workload::start(options, Path::new("/disk"), Path::new("/dev/vdb"), console)?.run(requests)
}
