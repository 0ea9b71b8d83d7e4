//! A named policy as the daemon keeps it.

use crate::keep::Schedule;
use crate::policy::{Policy, Retention};
use crate::units::Period;

use super::{Mode, NamedPolicy, Standby};

impl NamedPolicy {
    /// What each guest of a group of so many is owed. What is the group's as a
    /// whole, its bandwidth, is divided among them: together they never take
    /// more.
    pub fn in_force(&self, guests: usize) -> Policy {
        let among = u64::try_from(guests.max(1)).unwrap_or(u64::MAX);
        let mut windows = self.windows.clone();
        for window in windows.values_mut() {
            window.bandwidth = window.bandwidth.divided(among);
        }
        Policy {
            rpo: self.rpo,
            mode: self.mode,
            max_pause: self.max_pause,
            max_blackout: self.max_blackout,
            max_throttle: self.max_throttle,
            quiesce: self.quiesce,
            quiesce_timeout: self.quiesce_timeout,
            bandwidth: self.bandwidth.divided(among),
            windows,
            capture_buffer: self.capture_buffer,
            warm: match self.standby {
                Standby::Auto => self.mode == Mode::Memory,
                Standby::Warm => true,
                Standby::Cold => false,
            },
            priority: self.priority,
            commit_window: self.commit_window,
            commit_when_over: self.commit_when_over,
            retention: self.retention.coarse(),
        }
    }
}

impl Schedule {
    /// For sites that know no schedule: never less than it keeps, in the spans
    /// of its finest step.
    pub fn coarse(&self) -> Retention {
        Retention {
            all: self.all,
            then_every: self.steps.first().map_or(Period::ZERO, |step| step.every),
            until: self.steps.last().map_or(self.all, |step| step.until),
            newest: self.newest,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::units::RateLimit;

    #[test]
    fn a_groups_bandwidth_is_its_guests_together() {
        let named = NamedPolicy {
            bandwidth: "9mbit".parse().unwrap(),
            ..NamedPolicy::default()
        };
        assert_eq!(named.in_force(3).bandwidth, "3mbit".parse().unwrap());
        assert_eq!(
            NamedPolicy::default().in_force(0).bandwidth,
            RateLimit::NONE
        );
        assert_eq!(named.in_force(3).problems(), []);
    }

    #[test]
    fn the_standby_follows_what_is_copied() {
        let warm = |mode, standby| {
            NamedPolicy {
                mode,
                standby,
                ..NamedPolicy::default()
            }
            .in_force(1)
            .warm
        };
        assert!(warm(Mode::Memory, Standby::Auto) && !warm(Mode::Memory, Standby::Cold));
        assert!(!warm(Mode::DiskOnly, Standby::Auto));
    }

    #[test]
    fn coarse_retention_keeps_no_less() {
        let schedule: Schedule = "all for 1h, hourly for 24h, daily for 7d, newest 5"
            .parse()
            .unwrap();
        let coarse = schedule.coarse();
        assert_eq!(coarse.until, Period::from_secs(7 * 86_400));
        assert_eq!(
            (coarse.then_every, coarse.newest),
            (Period::from_secs(3600), 5)
        );
    }
}
