//! When things hold: days, times of day, windows of the week.
//!
//! A window is read from words (`mon-fri`, `08:00`), may pass midnight, and is
//! compared with others by the minutes of the week that it covers. Times are those
//! of the source site's clock.

use std::fmt;
use std::str::FromStr;

use crate::units::{UnitError, as_text};

const MINUTES_OF_DAY: u32 = 24 * 60;
/// Minutes of a week, which begins on Monday.
pub const MINUTES_OF_WEEK: u32 = 7 * MINUTES_OF_DAY;

/// Days of the week: `daily`, `mon-fri`, `sat,sun`, `fri-mon`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Days(u8);

/// A time of day, to the minute: `08:00`, `24:00`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct TimeOfDay(u16);

const DAYS: UnitError = UnitError::new("days like mon-fri, sat,sun or daily");
const TIME: UnitError = UnitError::new("a time of day like 08:00");
const NAMES: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

impl Days {
    /// All seven.
    pub const DAILY: Days = Days(0x7f);

    /// Whether this day is among them; 0 is Monday.
    pub fn contains(self, day: u32) -> bool {
        day < 7 && self.0 & (1 << day) != 0
    }
}

impl TimeOfDay {
    /// Minutes since midnight, up to 1440.
    pub fn minutes(self) -> u32 {
        u32::from(self.0)
    }

    /// The end of the day.
    pub const END: TimeOfDay = TimeOfDay(1440);
}

impl FromStr for Days {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Days, UnitError> {
        if text.len() > 64 {
            return Err(DAYS);
        }
        let text = text.trim().to_ascii_lowercase();
        if text == "daily" {
            return Ok(Days::DAILY);
        }
        let day = |name: &str| NAMES.iter().position(|known| *known == name.trim());
        let mut days = 0u8;
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (day(first).ok_or(DAYS)?, day(last).ok_or(DAYS)?);
            let count = (last + 7 - first) % 7;
            (0..=count).for_each(|step| days |= 1 << ((first + step) % 7));
        }
        Ok(Days(days))
    }
}

impl fmt::Display for Days {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Days::DAILY {
            return f.write_str("daily");
        }
        let (mut day, mut first) = (0, true);
        while day < 7 {
            let run = (day..7)
                .take_while(|next| self.contains(*next as u32))
                .count();
            if run > 0 {
                if !std::mem::take(&mut first) {
                    f.write_str(",")?;
                }
                f.write_str(NAMES[day])?;
                if run > 1 {
                    write!(f, "-{}", NAMES[day + run - 1])?;
                }
            }
            day += run.max(1);
        }
        Ok(())
    }
}

impl FromStr for TimeOfDay {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<TimeOfDay, UnitError> {
        let (hours, minutes) = text.trim().split_once(':').ok_or(TIME)?;
        let number = |digits: &str, longest| {
            let plain = (1..=longest).contains(&digits.len())
                && digits.bytes().all(|byte| byte.is_ascii_digit());
            plain.then(|| digits.parse::<u16>().ok()).flatten()
        };
        let (hours, minutes) = (
            number(hours, 2).ok_or(TIME)?,
            number(minutes, 2)
                .filter(|_| minutes.len() == 2)
                .ok_or(TIME)?,
        );
        let time = hours * 60 + minutes;
        if minutes > 59 || time > 1440 {
            return Err(TIME);
        }
        Ok(TimeOfDay(time))
    }
}

impl fmt::Display for TimeOfDay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}:{:02}", self.0 / 60, self.0 % 60)
    }
}

as_text!(
    Days,
    DAYS,
    "^(daily|(mon|tue|wed|thu|fri|sat|sun)([,-](mon|tue|wed|thu|fri|sat|sun))*)$"
);
as_text!(TimeOfDay, TIME, "^([01]?[0-9]|2[0-4]):[0-5][0-9]$");

/// The minutes of the week, `from..until`, that a window on these days covers; one
/// whose end is not after its begin goes on into the next day.
pub fn spans(days: Days, from: TimeOfDay, until: TimeOfDay) -> Vec<(u32, u32)> {
    let length = if until > from {
        until.minutes() - from.minutes()
    } else {
        until.minutes() + MINUTES_OF_DAY - from.minutes()
    };
    let mut spans = Vec::new();
    for day in (0..7).filter(|day| days.contains(*day)) {
        let begin = day * MINUTES_OF_DAY + from.minutes();
        let end = begin + length;
        if begin < MINUTES_OF_WEEK {
            spans.push((begin, end.min(MINUTES_OF_WEEK)));
        }
        // Sunday's night is Monday's morning.
        if end > MINUTES_OF_WEEK {
            spans.push((begin.saturating_sub(MINUTES_OF_WEEK), end - MINUTES_OF_WEEK));
        }
    }
    spans
}

/// The first minute of the week that both cover.
pub fn overlap(one: &[(u32, u32)], other: &[(u32, u32)]) -> Option<u32> {
    let pairs = one.iter().flat_map(|a| other.iter().map(move |b| (a, b)));
    pairs
        .filter_map(|(a, b)| {
            let begin = a.0.max(b.0);
            (begin < a.1.min(b.1)).then_some(begin)
        })
        .min()
}

/// A minute of the week in words: `mon 08:00`.
pub fn minute_of_week(minute: u32) -> String {
    let day = NAMES[(minute / MINUTES_OF_DAY % 7) as usize];
    let time = minute % MINUTES_OF_DAY;
    format!("{day} {:02}:{:02}", time / 60, time % 60)
}
