//! Which recovery points are kept, as people say it: "all for 1h, hourly for 24h,
//! daily for 7d".
//!
//! A [`Schedule`] is read from such a phrase and written back as one that reads
//! the same. [`Schedule::retain`] judges points by it, each step of it as
//! [`crate::retain`] judges one: a point stays while any step keeps it.

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use crate::policy::Retention;
use crate::retain::{Point, Reason, Verdict, retain};
use crate::units::{Period, UnitError, as_text};

/// Most steps of a phrase.
const MOST_STEPS: usize = 8;
/// Longest phrase that is read.
const LONGEST_PHRASE: usize = 1024;
/// So many of the newest points are kept unless the phrase says how many.
const NEWEST: u32 = 3;

/// Which points are kept.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Schedule {
    /// Every point younger than this.
    pub all: Period,
    /// Of older ones, by finer steps first.
    pub steps: Vec<Step>,
    /// So many of the newest, however old.
    pub newest: u32,
}

/// One point in each span of time, up to an age.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Step {
    /// The span.
    pub every: Period,
    /// The age.
    pub until: Period,
}

const PHRASE: UnitError =
    UnitError::new("a phrase like \"all for 1h, hourly for 24h, daily for 7d\"");

/// Spans that have a word of their own.
const WORDS: [(&str, u64); 4] = [
    ("minutely", 60),
    ("hourly", 3600),
    ("daily", 86_400),
    ("weekly", 7 * 86_400),
];

impl Default for Schedule {
    fn default() -> Schedule {
        Schedule {
            all: Period::from_secs(3600),
            steps: vec![
                Step {
                    every: Period::from_secs(3600),
                    until: Period::from_secs(86_400),
                },
                Step {
                    every: Period::from_secs(86_400),
                    until: Period::from_secs(7 * 86_400),
                },
            ],
            newest: NEWEST,
        }
    }
}

impl Schedule {
    /// What is wrong with it, to be read after its key.
    pub fn problem(&self) -> Option<String> {
        if self.newest == 0 {
            return Some("keeps 0 newest points; the newest must be kept, try 3".into());
        }
        let mut before = (Period::ZERO, self.all);
        for step in &self.steps {
            if step.every == Period::ZERO {
                return Some("has a step of 0s; name a span like hourly or every 10m".into());
            }
            if step.every <= before.0 {
                return Some(format!(
                    "has a step of {} after one of {}; put finer steps first",
                    step.every, before.0
                ));
            }
            if step.until <= before.1 {
                return Some(format!(
                    "has a step up to {} after one up to {}, which keeps nothing more; let ages grow",
                    step.until, before.1
                ));
            }
            if step.every > step.until {
                return Some(format!(
                    "keeps one point in {} for {}, which is shorter",
                    step.every, step.until
                ));
            }
            before = (step.every, step.until);
        }
        None
    }

    /// Judges every point, oldest first.
    pub fn retain(&self, points: &[Point], now: SystemTime) -> Vec<Verdict> {
        let alone = |step: &Step| Retention {
            all: self.all,
            then_every: step.every,
            until: step.until,
            newest: self.newest,
        };
        let none = Step {
            every: Period::ZERO,
            until: Period::ZERO,
        };
        let mut verdicts = retain(&alone(&none), points, now);
        for step in &self.steps {
            for (verdict, other) in verdicts.iter_mut().zip(retain(&alone(step), points, now)) {
                // Kept by any is kept; of two that drop, the later step's word is nearer.
                if !verdict.keep && (other.keep || other.reason == Reason::SpanHasOlder) {
                    *verdict = other;
                }
            }
        }
        verdicts
    }
}

impl FromStr for Schedule {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Schedule, UnitError> {
        if text.len() > LONGEST_PHRASE {
            return Err(PHRASE);
        }
        let mut schedule = Schedule {
            all: Period::ZERO,
            steps: Vec::new(),
            newest: NEWEST,
        };
        let (mut all, mut newest) = (false, false);
        for part in text.split(',') {
            let words: Vec<&str> = part.split_whitespace().collect();
            let period = |word: &str| word.parse::<Period>().map_err(|_| PHRASE);
            match words[..] {
                ["newest", count] if !newest => {
                    newest = true;
                    schedule.newest = count.parse().map_err(|_| PHRASE)?;
                }
                ["all", "for", age] if !all => {
                    all = true;
                    schedule.all = period(age)?;
                }
                ["every", span, "for", age] => schedule.steps.push(Step {
                    every: period(span)?,
                    until: period(age)?,
                }),
                [word, "for", age] => {
                    let known = WORDS.iter().find(|(known, _)| *known == word);
                    let (_, seconds) = known.ok_or(PHRASE)?;
                    schedule.steps.push(Step {
                        every: Period::from_secs(*seconds),
                        until: period(age)?,
                    });
                }
                _ => return Err(PHRASE),
            }
            if schedule.steps.len() > MOST_STEPS {
                return Err(PHRASE);
            }
        }
        Ok(schedule)
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if self.all > Period::ZERO {
            parts.push(format!("all for {}", self.all));
        }
        for Step { every, until } in &self.steps {
            let word = WORDS
                .iter()
                .find(|(_, seconds)| Period::from_secs(*seconds) == *every);
            parts.push(match word {
                Some((word, _)) => format!("{word} for {until}"),
                None => format!("every {every} for {until}"),
            });
        }
        if self.newest != NEWEST || parts.is_empty() {
            parts.push(format!("newest {}", self.newest));
        }
        f.write_str(&parts.join(", "))
    }
}

as_text!(
    Schedule,
    PHRASE,
    "^ *(newest +[0-9]+|(all|minutely|hourly|daily|weekly|every +[0-9a-z.]+) +for +[0-9a-z.]+)( *, *(newest +[0-9]+|(all|minutely|hourly|daily|weekly|every +[0-9a-z.]+) +for +[0-9a-z.]+))* *$"
);

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn a_phrase_reads_and_prints() {
        let phrase = "all for 1h, hourly for 1d, every 12h for 3d, daily for 7d, newest 5";
        let schedule: Schedule = phrase.parse().unwrap();
        assert_eq!(schedule.to_string(), phrase);
        assert_eq!((schedule.steps.len(), schedule.problem()), (3, None));
        let usual: Schedule = "all for 1h,hourly for 24h,  daily for 7d".parse().unwrap();
        assert_eq!(usual, Schedule::default());
        for bad in [
            "",
            "all",
            "all for",
            "hourly for 1d, ,",
            "all for 1h, all for 2h",
            "yearly for 1d",
            "newest -1",
        ] {
            assert!(bad.parse::<Schedule>().is_err(), "{bad}");
        }
        for (unsound, told) in [
            ("newest 0", "keeps 0"),
            ("daily for 7d, hourly for 8d", "finer steps first"),
            ("all for 2h, hourly for 1h", "let ages grow"),
            ("daily for 1h", "shorter"),
        ] {
            let problem = unsound.parse::<Schedule>().unwrap().problem().unwrap();
            assert!(problem.contains(told), "{problem}");
        }
    }

    /// A week of cuts, judged as they come and dropped as told.
    #[test]
    fn points_thin_out_step_by_step() {
        let schedule = Schedule::default();
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(1_000_080_000 + seconds);
        let mut points = Vec::new();
        for number in 0..10 * 144 {
            let now = at(number * 600);
            points.push(Point {
                number,
                cut_at: now,
                in_use: false,
            });
            let verdicts = schedule.retain(&points, now);
            points.retain(|point| {
                verdicts
                    .iter()
                    .any(|of| of.number == point.number && of.keep)
            });
        }
        // Six of the last hour, one for each of 23 hours and for six days before.
        let now = at(10 * 86_400 - 600);
        let aged = |from: u64, until: u64| {
            let age = |point: &&Point| now.duration_since(point.cut_at).unwrap().as_secs();
            points
                .iter()
                .filter(|point| (from..until).contains(&age(point)))
                .count()
        };
        assert_eq!(aged(0, 3600), 6);
        assert!(
            (22..=24).contains(&aged(3600, 86_400)),
            "{}",
            aged(3600, 86_400)
        );
        assert!(
            (6..=7).contains(&aged(86_400, 8 * 86_400)),
            "{}",
            aged(86_400, 8 * 86_400)
        );
    }

    proptest! {
        #[test]
        fn what_prints_reads_the_same(all in 0u64..1_000_000, newest in 0u32..100,
                                      steps in proptest::collection::vec((1u64..10_000_000, 1u64..10_000_000), 0..8)) {
            let steps = steps.into_iter().map(|(every, until)| Step {
                every: Period::from_millis(every * 1000), until: Period::from_millis(until) }).collect();
            let schedule = Schedule { all: Period::from_millis(all), steps, newest };
            prop_assert_eq!(schedule.to_string().parse::<Schedule>().unwrap(), schedule);
        }
    }
}
