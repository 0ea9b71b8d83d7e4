//! Which zstd level the next batches get: as strong as the link leaves time for.
//!
//! Whoever sends measures and tells: time spent compressing, time spent waiting
//! until the link took a batch. What the next stronger level costs is known
//! beforehand, about; where the wait has room for that and more, the link is not
//! kept waiting by it. An encoder that never waits and compresses all the while
//! is itself the bottleneck. Between the two lies a wide band where nothing
//! changes, wider than any one step moves things, so the level does not swing.
//! Pure: time comes in with the measurements.

use std::time::Duration;

/// The levels there are, fastest first.
pub const LEVELS: [i32; 6] = [-5, -1, 1, 3, 4, 9];
/// What each costs, in CPU time of the usual one (`zstd -b` and
/// `benches/pieces.rs` over groups of 64 units of programs). Against it 4 makes
/// 2 % less, 6 makes 4 % less at 2.8; 7 and 9 another 1 % at no more than that and
/// a fifteenth (of blocks so small); 12 costs ten times as much for nothing.
const COSTS: [f64; 6] = [0.49, 0.58, 0.6, 1.0, 1.9, 3.0];
/// The level to begin with, and what a guest at rest goes back to: the one
/// that the measured floors are told by.
pub const LEVEL: i32 = 3;
const USUAL: usize = 3;

/// Batches in a window: 8 MiB of units.
const BATCHES: u32 = 32;
/// Waiting this share of the time, the encoder could do with a third of the speed.
const BLOCKED: f64 = 0.65;
/// A stronger level must leave this share of the time to wait: costs differ by what is compressed.
const KEPT: f64 = 0.25;
/// Waiting less than this, the link is not what holds things up.
const FREE: f64 = 0.1;
/// Compressing this share of the time on every thread that does, the encoder is.
const BUSY: f64 = 0.5;
/// Levels above the usual one may take this share of a core, as expected: more
/// than that a neighbour's guest should not lose...
const SPARED: f64 = 0.5;
/// ...and are left when they take this.
const OVER: f64 = 0.75;
/// Windows that must agree before the level changes.
const AGREE: i32 = 2;
/// A window of more time than this tells of a guest at rest, not of a stream.
const REST: Duration = Duration::from_secs(10);

/// What one batch took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Measured {
    /// From the batch before up to now.
    pub elapsed: Duration,
    /// Of that, compressing; of all threads together.
    pub compressing: Duration,
    /// Of that, waiting for the link.
    pub waiting: Duration,
    /// Bytes of the batch.
    pub bytes: u64,
}

/// Chooses the level. One for all that share a link and a core.
#[derive(Debug, Clone)]
pub struct LevelControl {
    at: usize,
    /// Threads that compress.
    threads: f64,
    window: Measured,
    batches: u32,
    leaning: i32,
}

impl Default for LevelControl {
    fn default() -> LevelControl {
        LevelControl::new()
    }
}

impl LevelControl {
    /// Begins at [`LEVEL`].
    pub fn new() -> LevelControl {
        LevelControl {
            at: USUAL,
            threads: 1.0,
            window: Measured::default(),
            batches: 0,
            leaning: 0,
        }
    }

    /// So many threads compress side by side.
    pub fn with_threads(mut self, threads: usize) -> LevelControl {
        self.threads = threads.max(1) as f64;
        self
    }

    /// The level for the next batch.
    pub fn level(&self) -> i32 {
        LEVELS[self.at]
    }

    /// Takes notice of a batch that was handed over. Returns the level for the next.
    pub fn batch(&mut self, measured: Measured) -> i32 {
        self.window.elapsed += measured.elapsed;
        self.window.compressing += measured.compressing;
        self.window.waiting += measured.waiting;
        self.window.bytes += measured.bytes;
        self.batches += 1;
        if self.window.elapsed > REST {
            // Little is sent in much time. Nobody waits for anybody: back to
            // the usual level, which makes the bytes that it is judged by. On
            // a link so thin that it alone stretched the window, stay.
            if self.share(self.window.waiting) < BLOCKED {
                self.at = USUAL;
                self.leaning = 0;
                self.restart();
                return self.level();
            }
        } else if self.batches < BATCHES {
            return self.level();
        }
        let wish = self.wish();
        self.restart();
        self.leaning = match wish {
            0 => 0,
            wish if wish.signum() == self.leaning.signum() => self.leaning + wish,
            wish => wish,
        };
        if self.leaning.abs() >= AGREE {
            let to = self.at as i32 + self.leaning.signum();
            self.at = (to.max(0) as usize).min(LEVELS.len() - 1);
            self.leaning = 0;
        }
        self.level()
    }

    /// One step stronger, one step faster, or neither.
    fn wish(&self) -> i32 {
        let blocked = self.share(self.window.waiting);
        let busy = self.share(self.window.compressing);
        if self.at > USUAL && busy > OVER || blocked < FREE && busy >= BUSY * self.threads {
            return -1;
        }
        let (Some(now), Some(stronger)) = (COSTS.get(self.at), COSTS.get(self.at + 1)) else {
            return 0;
        };
        let would = busy * stronger / now;
        let fits = match self.at < USUAL {
            true => blocked >= BLOCKED,
            false => blocked - (would - busy) >= KEPT && would <= SPARED,
        };
        i32::from(fits)
    }

    fn share(&self, of: Duration) -> f64 {
        of.as_secs_f64() / self.window.elapsed.as_secs_f64().max(1e-6)
    }

    fn restart(&mut self) {
        self.window = Measured::default();
        self.batches = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds to compress a batch of 256 KiB by level, and what it becomes.
    const COST: [(f64, f64); 6] = [
        (0.25e-3, 150e3),
        (0.4e-3, 135e3),
        (0.6e-3, 105e3),
        (1.2e-3, 92e3),
        (2.0e-3, 90e3),
        (3.2e-3, 87e3),
    ];

    /// Sends `batches` over a link of `rate` bytes a second; the levels that were used at the end.
    fn run(control: &mut LevelControl, rate: f64, scan: f64, batches: usize) -> Vec<i32> {
        let mut levels = Vec::new();
        for _ in 0..batches {
            let at = LEVELS.iter().position(|&level| level == control.level());
            let (cost, bytes) = COST[at.unwrap_or(0)];
            let waiting = (bytes / rate - cost - scan).max(0.0);
            levels.push(control.batch(Measured {
                elapsed: Duration::from_secs_f64(cost + scan + waiting),
                compressing: Duration::from_secs_f64(cost),
                waiting: Duration::from_secs_f64(waiting),
                bytes: bytes as u64,
            }));
        }
        levels.split_off(batches - batches / 4)
    }

    #[test]
    fn each_link_gets_its_level_and_keeps_it() {
        // 256 KiB are scanned and hashed in 0.1 ms.
        let links = [
            (20.0, 9),
            (100.0, 9),
            (150.0, 4),
            (500.0, 3),
            (10_000.0, -5),
        ];
        for (mbit, level) in links {
            let mut control = LevelControl::new();
            let levels = run(&mut control, mbit * 1e6 / 8.0, 1e-4, 4000);
            assert!(
                levels.iter().all(|&at| at == level),
                "{mbit} Mbit/s: {levels:?}"
            );
        }
    }

    #[test]
    fn no_link_makes_it_swing() {
        let mut rate = 1e6;
        while rate < 2e9 {
            let levels = run(&mut LevelControl::new(), rate, 1e-4, 4000);
            let changes = levels.windows(2).filter(|pair| pair[0] != pair[1]).count();
            assert!(
                changes <= 1,
                "{changes} changes in 1000 batches at {rate} bytes/s"
            );
            rate *= 1.07;
        }
    }

    /// A stronger level is never what makes the link wait, also where it costs
    /// half as much again as it is thought to.
    #[test]
    fn threads_that_have_time_left_are_no_reason_to_compress_less() {
        let level = |busy: f64| {
            let mut control = LevelControl::new().with_threads(2);
            let batch = Measured {
                elapsed: Duration::from_millis(1),
                compressing: Duration::from_secs_f64(1e-3 * busy),
                waiting: Duration::ZERO,
                bytes: 92_000,
            };
            (0..1000).fold(0, |_, _| control.batch(batch))
        };
        assert_eq!(level(0.7), LEVEL);
        assert_eq!(level(1.4), LEVELS[0]);
    }

    #[test]
    fn no_level_above_the_usual_holds_a_link_up() {
        let mut rate = 1e6;
        while rate < 2e8 {
            for dearer in [1.0, 1.5] {
                let mut control = LevelControl::new();
                for _ in 0..3000 {
                    let at = LEVELS.iter().position(|&level| level == control.level());
                    let at = at.unwrap_or(0);
                    let (cost, bytes) = COST[at];
                    let cost = cost * if at > USUAL { dearer } else { 1.0 };
                    let waiting = bytes / rate - cost - 1e-4;
                    assert!(
                        at <= USUAL || waiting > 0.0,
                        "level {} at {rate} bytes/s, {dearer}",
                        LEVELS[at]
                    );
                    let waiting = waiting.max(0.0);
                    control.batch(Measured {
                        elapsed: Duration::from_secs_f64(cost + 1e-4 + waiting),
                        compressing: Duration::from_secs_f64(cost),
                        waiting: Duration::from_secs_f64(waiting),
                        bytes: bytes as u64,
                    });
                }
            }
            rate *= 1.07;
        }
    }

    #[test]
    fn it_follows_a_link_that_changes() {
        let mut control = LevelControl::new();
        assert_eq!(run(&mut control, 1.25e9, 1e-4, 2000).last(), Some(&-5));
        assert_eq!(run(&mut control, 12.5e6, 1e-4, 2000).last(), Some(&9));
        assert_eq!(run(&mut control, 60e6, 1e-4, 2000).last(), Some(&3));
        assert_eq!(run(&mut control, 1e6, 1e-4, 2000).last(), Some(&9));
    }

    #[test]
    fn a_guest_at_rest_goes_back_to_the_usual_level() {
        let mut control = LevelControl::new();
        run(&mut control, 1.25e9, 1e-4, 2000);
        assert_eq!(control.level(), -5);
        for _ in 0..30 {
            control.batch(Measured {
                elapsed: Duration::from_secs(1),
                compressing: Duration::from_millis(1),
                ..Measured::default()
            });
        }
        assert_eq!(control.level(), LEVEL);
        // And nothing that a scan at full speed finds changes it.
        for _ in 0..1000 {
            control.batch(Measured {
                elapsed: Duration::from_millis(4),
                compressing: Duration::from_millis(1),
                waiting: Duration::ZERO,
                bytes: 90_000,
            });
        }
        assert_eq!(control.level(), LEVEL);
    }
}
