//! What a group still has to copy, as time passes: closed-form arithmetic.
//!
//! A guest writes to its working set, evenly, at its dirty rate. A write to what
//! is dirty already adds nothing, so the dirty part nears the whole working set
//! ever more slowly. What is dirty when copying begins is copied first, as the
//! cold part; what is written meanwhile comes after it, as in the engine's rounds.

/// Bytes to copy, and how they grow.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Load {
    /// Copied before the rest: nothing is added to it.
    pub(super) cold: f64,
    /// Dirty part of the working set.
    pub(super) hot: f64,
    /// The working set.
    pub(super) set: f64,
    /// Bytes a second that writes would add to a clean working set.
    pub(super) dirty: f64,
}

impl Load {
    /// Takes in a guest.
    pub(super) fn add(&mut self, remaining: u64, dirty_rate: u64, working_set: u64) {
        // Where nothing is written, nothing is hot.
        let set = if dirty_rate == 0 { 0 } else { working_set };
        let hot = remaining.min(set);
        self.cold += (remaining - hot) as f64;
        self.hot += hot as f64;
        self.set += set as f64;
        self.dirty += if set == 0 { 0.0 } else { dirty_rate as f64 };
    }

    /// Fits one curve of growth to several guests' (dirty rate, working set): a small set
    /// fills up while a large one still grows. The curve starts as steeply as
    /// theirs together and meets them again after `time`.
    pub(super) fn fit(&mut self, guests: &[(f64, f64)], time: f64) {
        if guests.len() < 2 || self.dirty * time <= 0.0 {
            return;
        }
        let grown = |dirty: f64, set: f64| {
            if set > 0.0 {
                set * (1.0 - (-dirty * time / set).exp())
            } else {
                0.0
            }
        };
        let wanted: f64 = guests.iter().map(|(dirty, set)| grown(*dirty, *set)).sum();
        let (mut low, mut high) = (0.0, self.set);
        for _ in 0..40 {
            let middle = f64::midpoint(low, high);
            if grown(self.dirty, middle) < wanted {
                low = middle;
            } else {
                high = middle;
            }
        }
        self.set = high.max(self.hot);
    }

    /// Copying begins: a first round takes all that is dirty.
    pub(super) fn begin(&mut self) {
        self.cold += self.hot;
        self.hot = 0.0;
    }

    /// All that is to be copied.
    pub(super) fn left(&self) -> f64 {
        self.cold + self.hot
    }

    /// Writes an hour or a day from now add no more than this.
    pub(super) fn most(&self) -> f64 {
        self.cold + self.set.max(self.hot)
    }

    /// How fast it grows now if nothing is copied.
    pub(super) fn growth(&self) -> f64 {
        if self.set > 0.0 {
            self.dirty * (1.0 - self.hot / self.set).max(0.0)
        } else {
            0.0
        }
    }

    /// After `time` seconds in which `rate` bytes a second were copied.
    pub(super) fn after(&self, time: f64, rate: f64) -> Load {
        let mut load = *self;
        let cold_time = if rate > 0.0 {
            (load.cold / rate).min(time)
        } else {
            time
        };
        load.cold = (load.cold - rate * cold_time).max(0.0);
        load.hot = load.hot_after(cold_time, 0.0);
        load.hot = load.hot_after(time - cold_time, rate).max(0.0);
        load
    }

    /// Seconds until no more than `tail` is left at this rate; `None` if never.
    pub(super) fn time_to(&self, tail: f64, rate: f64) -> Option<f64> {
        if self.left() <= tail {
            return Some(0.0);
        }
        if rate <= 0.0 {
            return None;
        }
        if self.dirty <= 0.0 {
            return Some((self.left() - tail) / rate);
        }
        let cold_time = self.cold / rate;
        let hot = self.hot_after(cold_time, 0.0);
        if hot <= tail {
            return Some(cold_time);
        }
        let floor = self.floor(rate);
        if floor >= tail {
            return None;
        }
        Some(cold_time + self.set / self.dirty * ((hot - floor) / (tail - floor)).ln())
    }

    /// What the dirty part nears when copied at this rate; under zero where it can be copied away.
    pub(super) fn floor(&self, rate: f64) -> f64 {
        if self.dirty > 0.0 {
            self.set * (1.0 - rate / self.dirty)
        } else {
            0.0
        }
    }

    /// The guest throttled by so many percent.
    pub(super) fn throttled(&self, percent: u8) -> Load {
        Load {
            dirty: self.dirty * f64::from(100 - percent.min(99)) / 100.0,
            ..*self
        }
    }

    fn hot_after(&self, time: f64, rate: f64) -> f64 {
        if self.dirty <= 0.0 || self.set <= 0.0 {
            return (self.hot - rate * time).max(0.0);
        }
        let floor = self.floor(rate);
        floor + (self.hot - floor) * (-self.dirty * time / self.set).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The formulas against small steps.
    #[test]
    fn growth_and_copying_are_those_of_small_steps() {
        let mut load = Load::default();
        load.add(3_000_000, 200_000, 1_000_000);
        load.add(100_000, 300_000, 2_000_000);
        let (rate, step) = (900_000.0, 1e-4);
        let mut stepped = load;
        for _ in 0..25_000 {
            let grown = stepped.growth() * step;
            if stepped.cold > 0.0 {
                stepped.cold -= rate * step;
                stepped.hot += grown;
            } else {
                stepped.hot += grown - rate * step;
            }
        }
        let closed = load.after(2.5, rate);
        assert!(
            (closed.left() - stepped.left()).abs() < 2000.0,
            "{closed:?} {stepped:?}"
        );
        let time = load.time_to(closed.left(), rate).expect("it gets there");
        assert!((time - 2.5).abs() < 1e-6, "{time}");
    }

    #[test]
    fn what_writes_faster_than_the_link_carries_never_gets_there_unless_throttled() {
        let mut load = Load::default();
        load.add(500_000_000, 100_000_000, 400_000_000);
        assert_eq!(load.time_to(1_000_000.0, 50_000_000.0), None);
        assert!(
            load.throttled(80)
                .time_to(1_000_000.0, 50_000_000.0)
                .is_some()
        );
    }
}
