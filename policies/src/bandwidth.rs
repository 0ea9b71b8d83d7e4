//! How much of the link a guest or a site may take, and when.
//!
//! A limit holds all week but in windows, each with a limit of its own. [`limit_at`] says
//! which holds in a minute of the week, by a clock that the caller reads: local time with
//! its summer and winter, so an hour that is skipped never comes, and one that comes twice
//! counts twice. Where several guests want more than there is, [`LinkTerms::priority`] says
//! who gets how much.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::load::Problem;
use crate::units::RateLimit;
use crate::week::{Days, TimeOfDay, minute_of_week, overlap, spans};

/// Windows of one limit that are compared with each other.
const MOST_WINDOWS: usize = 100;

/// A time of the week with a bandwidth of its own, by the source site's clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Window {
    /// On which days it begins.
    pub days: Days,
    /// When it begins.
    pub from: TimeOfDay,
    /// When it ends; if that is not after its begin, on the next day.
    pub until: TimeOfDay,
    /// Most that the group puts on the link in it.
    pub bandwidth: RateLimit,
}

impl Default for Window {
    fn default() -> Window {
        Window {
            days: Days::DAILY,
            from: TimeOfDay::default(),
            until: TimeOfDay::END,
            bandwidth: RateLimit::NONE,
        }
    }
}

/// What one guest may take of the link.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkTerms {
    /// Most that it puts on the link, outside of windows.
    pub bandwidth: RateLimit,
    /// Times of the week with a bandwidth of their own.
    #[serde(default)]
    pub windows: BTreeMap<String, Window>,
    /// Its share where several want more than there is: of 200 and 100, the first gets
    /// two thirds. 0 gets what the others leave.
    pub priority: u8,
}

impl LinkTerms {
    /// Its limit in a minute of the week.
    pub fn limit_at(&self, minute_of_week: u32) -> RateLimit {
        limit_at(self.bandwidth, &self.windows, minute_of_week)
    }
}

/// The limit that holds in a minute of the week, which begins on Monday: that of the window
/// it is in, or the usual one.
pub fn limit_at(
    usual: RateLimit,
    windows: &BTreeMap<String, Window>,
    minute_of_week: u32,
) -> RateLimit {
    let holds = |window: &&Window| {
        spans(window.days, window.from, window.until)
            .iter()
            .any(|(from, until)| (*from..*until).contains(&minute_of_week))
    };
    let held = windows.values().find(holds);
    held.map_or(usual, |window| window.bandwidth)
}

/// Windows that overlap, keys relative to where `windows` is.
pub fn problems(windows: &BTreeMap<String, Window>) -> Vec<Problem> {
    let mut found = Vec::new();
    if windows.len() > MOST_WINDOWS {
        let what = format!(
            "are {}; at most {MOST_WINDOWS} are told apart",
            windows.len()
        );
        return vec![Problem::new("windows", what)];
    }
    let covered: Vec<_> = windows
        .iter()
        .map(|(name, window)| (name, spans(window.days, window.from, window.until)))
        .collect();
    for (index, (name, own)) in covered.iter().enumerate() {
        for (other, before) in covered.iter().take(index) {
            if let Some(minute) = overlap(before, own) {
                found.push(Problem::new(
                    format!("windows.{name}"),
                    format!(
                        "overlaps window '{other}', both hold at {}; change one's days or times",
                        minute_of_week(minute)
                    ),
                ));
            }
        }
    }
    found
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn windows() -> BTreeMap<String, Window> {
        toml::from_str(
            "office = { days = \"mon-fri\", from = \"08:00\", until = \"18:00\", bandwidth = \"20mbit\" }\n\
             night = { days = \"sun\", from = \"22:00\", until = \"04:00\", bandwidth = \"none\" }",
        )
        .unwrap()
    }

    fn at(day: u32, hour: u32, minute: u32) -> String {
        let usual = RateLimit::at("50mbit".parse().unwrap());
        limit_at(usual, &windows(), (day * 24 + hour) * 60 + minute).to_string()
    }

    #[test]
    fn a_window_holds_from_its_first_minute_to_its_last() {
        assert_eq!(at(0, 7, 59), "50mbit");
        assert_eq!(at(0, 8, 0), "20mbit");
        assert_eq!(at(4, 17, 59), "20mbit");
        assert_eq!(at(4, 18, 0), "50mbit");
        assert_eq!(at(5, 12, 0), "50mbit");
        // Sunday's night is Monday's morning.
        assert_eq!(at(6, 21, 59), "50mbit");
        assert_eq!(at(6, 22, 0), "none");
        assert_eq!(at(0, 3, 59), "none");
        assert_eq!(at(0, 4, 0), "50mbit");
    }

    #[test]
    fn windows_that_overlap_are_told() {
        assert_eq!(problems(&windows()), []);
        let mut both = windows();
        both.insert("all".into(), Window::default());
        let told = problems(&both);
        let keys: Vec<_> = told.iter().map(|problem| problem.key.as_str()).collect();
        assert_eq!(keys, ["windows.night", "windows.office"]);
    }
}
