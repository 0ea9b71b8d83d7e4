//! Each seed runs in a process of its own: nothing of one run, in no library,
//! is left for the next, so a seed that is run alone does what it did among
//! thousands. And a run that hangs is ended, and told.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Broken, Counts, Options, Ran, story};

/// How a child is told what to run.
const ASKED: &str = "FARHAVEN_SIMULATE";
/// And where.
const PLACE: &str = "FARHAVEN_SIMULATE_IN";
/// Before the line with what came of it.
const ANSWER: &str = "simulated: ";
/// A run takes seconds; one that takes so long hangs.
const PATIENCE: Duration = Duration::from_secs(400);

/// In a child: runs what was asked, prints what came of it, and returns true.
pub fn is_child() -> bool {
    let (Ok(asked), Some(place)) = (std::env::var(ASKED), std::env::var_os(PLACE)) else {
        return false;
    };
    let options: Options = serde_json::from_str(&asked).expect("options");
    if options.trace {
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        let log = tracing_subscriber::fmt().with_env_filter(filter);
        log.with_writer(std::io::stderr).init();
    }
    let run = std::thread::spawn(move || story::run(&options, place.as_ref()));
    if let Ok(ran) = run.join() {
        let line = serde_json::to_string(&ran).expect("an answer");
        println!("\n{ANSWER}{line}");
    }
    true
}

/// Runs a seed in a child: this program again, with these arguments.
pub fn run(options: &Options, arguments: &[&str]) -> Ran {
    let failed = |why: String| Ran {
        seed: options.seed,
        broken: Some(Broken { promise: 6, why }),
        digest: String::new(),
        counts: Counts::default(),
    };
    let shm = std::path::Path::new("/dev/shm");
    let place = match shm.is_dir() {
        true => tempfile::tempdir_in(shm),
        false => tempfile::tempdir(),
    };
    let place = place.expect("a directory");
    let program = std::env::current_exe().expect("this program");
    let child = Command::new(program)
        .args(arguments)
        .env(ASKED, serde_json::to_string(options).expect("options"))
        .env(PLACE, place.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(if options.trace {
            Stdio::inherit()
        } else {
            Stdio::piped()
        })
        .spawn();
    let mut child = child.expect("this program again");
    let mut out = child.stdout.take().expect("its output");
    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        let _ = out.read_to_string(&mut text);
        text
    });
    let complaining = child.stderr.take().map(|mut err| {
        std::thread::spawn(move || {
            let mut text = String::new();
            let _ = err.read_to_string(&mut text);
            text
        })
    });
    let begun = Instant::now();
    let ended = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            _ if begun.elapsed() > PATIENCE => {
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
            _ => std::thread::sleep(Duration::from_millis(3)),
        }
    };
    let text = reading.join().unwrap_or_default();
    let complaint = complaining.and_then(|c| c.join().ok()).unwrap_or_default();
    let answer = text.lines().find_map(|line| line.strip_prefix(ANSWER));
    match answer.and_then(|line| serde_json::from_str(line).ok()) {
        Some(ran) => ran,
        None if ended.is_none() => failed(format!("it hangs: no end after {PATIENCE:?}")),
        None => failed(format!("it died ({ended:?}): {}", complaint.trim())),
    }
}

/// Runs so many seeds, `jobs` at a time, and tells each; until one is broken,
/// unless all are wanted.
pub fn run_all(
    first: u64,
    count: u64,
    jobs: usize,
    all: bool,
    options: impl Fn(u64) -> Options + Sync,
    arguments: &[&str],
    tell: impl Fn(&Ran) + Sync,
) -> Counts {
    let next = AtomicU64::new(first);
    let over = AtomicBool::new(false);
    let sum = Mutex::new(Counts::default());
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= first + count || over.load(Ordering::SeqCst) {
                        return;
                    }
                    let ran = run(&options(seed), arguments);
                    if ran.broken.is_some() && !all {
                        over.store(true, Ordering::SeqCst);
                    }
                    let mut sum = sum.lock().unwrap();
                    sum.add(&ran.counts);
                    tell(&ran);
                }
            });
        }
    });
    sum.into_inner().unwrap()
}
