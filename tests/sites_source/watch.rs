//! What the tests look at besides `status`: the guest's heartbeat over a span,
//! and what is left in a QEMU.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{Console, GuestVm};

/// Watches a guest's heartbeat until it is asked.
pub struct Pulse {
    stop: Arc<AtomicBool>,
    longest_ms: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Pulse {
    pub fn of(console: &Console) -> Self {
        let (stop, longest_ms) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (ended, longest, console) = (stop.clone(), longest_ms.clone(), console.clone());
        let thread = std::thread::spawn(move || {
            let mut last = (console.last_beat().map(|b| b.number), Instant::now());
            while !ended.load(Ordering::Relaxed) {
                let beat = console.last_beat().map(|b| b.number);
                let gap = last.1.elapsed().as_millis() as u64;
                longest.fetch_max(gap, Ordering::Relaxed);
                if beat != last.0 {
                    last = (beat, Instant::now());
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        Pulse {
            stop,
            longest_ms,
            thread: Some(thread),
        }
    }

    /// The longest time without a heartbeat.
    pub fn longest_gap(mut self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        Duration::from_millis(self.longest_ms.load(Ordering::Relaxed))
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// The guest runs: it beats on.
#[track_caller]
pub fn beats_on(console: &Console) {
    let last = console.last_beat().unwrap();
    console.await_beat(last.number + 3, Duration::from_secs(10));
}

/// What of ours is in a QEMU that nobody is attached to, and its run state.
pub fn traces(guest: &GuestVm) -> (Vec<String>, String) {
    let mut qmp = guest.connect();
    let mut ours = Vec::new();
    for query in [
        "query-named-block-nodes",
        "query-jobs",
        "query-block-exports",
        "query-block",
    ] {
        let answer = qmp.execute(query, json!({})).unwrap();
        let text = answer.to_string();
        for found in text.split('"').filter(|word| word.starts_with("farhaven-")) {
            // The guest itself is called farhaven-test.
            ours.push(format!("{query}: {found}"));
        }
    }
    let status = qmp.execute("query-status", json!({})).unwrap();
    (ours, status["status"].as_str().unwrap().to_owned())
}
