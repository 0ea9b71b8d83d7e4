//! What a protection group is owed.
//!
//! A [`Policy`] is written by an operator (in the site's file, or per guest on
//! the command line), kept with the group, and read by [`crate::decide`] and
//! [`crate::retain`].

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bandwidth::{self, LinkTerms, Window};
use crate::files::{Mode, Quiesce};
use crate::load::Problem;
use crate::units::{ByteSize, Period, RateLimit};

/// What a protection group is owed, and what it may cost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// Recovery point objective: the newest sealed point is to be no older than this.
    pub rpo: Period,
    /// What is copied.
    pub mode: Mode,
    /// Longest pause of the guest in one cut that is worth no remark.
    pub max_pause: Period,
    /// Longest time in which the guest runs nowhere during a planned move.
    pub max_blackout: Period,
    /// How much of its processor time a guest may lose to throttling, in percent,
    /// so that a planned move ends when the guest writes faster than the link carries.
    pub max_throttle: u8,
    /// Whether filesystems are frozen for each cut.
    pub quiesce: Quiesce,
    /// A guest agent that has not frozen them by then is not waited for.
    pub quiesce_timeout: Period,
    /// Most bits a second that this group puts on the link, outside of windows.
    pub bandwidth: RateLimit,
    /// Times of the week with a bandwidth of their own. They must not overlap.
    pub windows: BTreeMap<String, Window>,
    /// Memory for changes that were captured and are not yet sent. When it is
    /// full the cut is given up and the RPO stretches; the guest never waits.
    /// For a guest inside of the daemon there may be three times as much for
    /// the moment of a cut.
    pub capture_buffer: ByteSize,
    /// Keep the newest point's memory ready in RAM at the peer: a faster
    /// failover for as much memory as the guest has.
    pub warm: bool,
    /// Its share of the link where several groups want more than there is: they get of it
    /// in proportion to these. 0 gets what the others leave.
    pub priority: u8,
    /// After a move or a failover: how long it can be rolled back before somebody
    /// is reminded to commit it.
    pub commit_window: Period,
    /// Commit by itself when that time is over.
    pub commit_when_over: bool,
    /// Which points are kept.
    pub retention: Retention,
}

/// Which recovery points are kept, by age.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// Every point younger than this.
    pub all: Period,
    /// Of older points, one in each span of this length...
    pub then_every: Period,
    /// ...up to this age.
    pub until: Period,
    /// So many of the newest points, however old.
    pub newest: u32,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            rpo: Period::from_secs(10),
            mode: Mode::Memory,
            max_pause: Period::from_millis(100),
            max_blackout: Period::from_millis(500),
            max_throttle: 80,
            quiesce: Quiesce::None,
            quiesce_timeout: QUIESCE_TIMEOUT,
            bandwidth: RateLimit::NONE,
            windows: BTreeMap::new(),
            capture_buffer: ByteSize::from_mib(64),
            warm: true,
            priority: 100,
            commit_window: COMMIT_WINDOW,
            commit_when_over: false,
            retention: Retention::default(),
        }
    }
}

impl Default for Retention {
    fn default() -> Retention {
        Retention {
            all: Period::from_secs(600),
            then_every: Period::from_secs(60),
            until: Period::from_secs(3600),
            newest: 3,
        }
    }
}

/// How long a move or a failover waits for its commit unless a policy says otherwise.
pub const COMMIT_WINDOW: Period = Period::from_secs(24 * 3600);
/// How long a guest agent has to freeze filesystems unless a policy says otherwise.
pub const QUIESCE_TIMEOUT: Period = Period::from_secs(2);
/// Longest that a guest agent may have for it: whoever takes the guest over by force
/// waits for that, too.
pub const LONGEST_QUIESCE_TIMEOUT: Period = Period::from_secs(10);

/// What is wrong with the time that an agent has to freeze filesystems.
pub(crate) fn freeze_problem(timeout: Period, rpo: Period) -> Option<String> {
    if timeout == Period::ZERO {
        return Some("is 0s; an agent needs time to answer, try 2s".to_owned());
    }
    if timeout >= rpo {
        return Some(format!(
            "is {timeout}, no shorter than the rpo of {rpo}: one agent that hangs breaks it"
        ));
    }
    (timeout > LONGEST_QUIESCE_TIMEOUT).then(|| {
        format!(
            "is {timeout}; at most {LONGEST_QUIESCE_TIMEOUT} can be waited for an agent: a site that takes the guest over by force waits as long until it is stopped here"
        )
    })
}
/// Shortest RPO that can be asked for.
pub const SHORTEST_RPO: Period = Period::from_secs(1);
/// Smallest capture buffer: a few groups of 64 units.
pub const SMALLEST_CAPTURE_BUFFER: ByteSize = ByteSize::from_mib(1);
/// Strongest throttle: a guest that gets less than a twentieth of its time
/// cannot keep its own timers.
pub const STRONGEST_THROTTLE: u8 = 95;

impl Policy {
    /// What it may take of the link.
    pub fn link_terms(&self) -> LinkTerms {
        LinkTerms {
            bandwidth: self.bandwidth,
            windows: self.windows.clone(),
            priority: self.priority,
        }
    }

    /// What is wrong with the values, keys relative to the policy.
    pub fn problems(&self) -> Vec<Problem> {
        let mut found = Vec::new();
        let mut require = |holds: bool, key: &str, what: String| {
            if !holds {
                found.push(Problem::new(key, what));
            }
        };
        require(
            self.rpo >= SHORTEST_RPO,
            "rpo",
            format!(
                "is {}; the shortest that can be kept is {SHORTEST_RPO}",
                self.rpo
            ),
        );
        require(
            self.max_pause > Period::ZERO,
            "max_pause",
            "is 0s; no cut is free, try 100ms".into(),
        );
        require(
            self.max_blackout > Period::ZERO,
            "max_blackout",
            "is 0s; no move is free, try 500ms".into(),
        );
        require(
            self.max_throttle <= STRONGEST_THROTTLE,
            "max_throttle",
            format!(
                "is {}; at most {STRONGEST_THROTTLE} percent can be taken, 0 means never throttle",
                self.max_throttle
            ),
        );
        if self.quiesce == Quiesce::Agent
            && let Some(problem) = freeze_problem(self.quiesce_timeout, self.rpo)
        {
            require(false, "quiesce_timeout", problem);
        }
        require(
            self.capture_buffer >= SMALLEST_CAPTURE_BUFFER,
            "capture_buffer",
            format!(
                "is {}; at least {SMALLEST_CAPTURE_BUFFER} is needed",
                self.capture_buffer
            ),
        );
        require(
            self.commit_window > Period::ZERO,
            "commit_window",
            "is 0s; there would be no time to see whether the guest is well, try 24h".into(),
        );
        let Retention {
            all,
            then_every,
            until,
            newest,
        } = self.retention.clone();
        require(
            newest >= 1,
            "retention.newest",
            "is 0; the newest point must be kept, try 3".into(),
        );
        require(
            until <= all || then_every > Period::ZERO,
            "retention.then_every",
            "is 0s; to keep every point set 'retention.all' as long as 'retention.until'".into(),
        );
        found.extend(bandwidth::problems(&self.windows));
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_policy_is_sound() {
        assert_eq!(Policy::default().problems(), []);
    }

    #[test]
    fn an_agent_has_a_bounded_time_to_freeze() {
        let problem = |timeout, rpo| {
            let problem = freeze_problem(Period::from_secs(timeout), Period::from_secs(rpo));
            problem.unwrap_or_default()
        };
        assert_eq!(problem(10, 60), "");
        assert!(problem(0, 60).contains("try 2s"));
        assert!(problem(5, 5).contains("no shorter than the rpo"));
        assert!(problem(11, 60).contains("at most 10s"));
    }

    #[test]
    fn every_unsound_value_is_named() {
        let bad = Policy {
            rpo: Period::ZERO,
            max_pause: Period::ZERO,
            max_blackout: Period::ZERO,
            max_throttle: 96,
            capture_buffer: ByteSize::from_bytes(4096),
            commit_window: Period::ZERO,
            quiesce: Quiesce::Agent,
            quiesce_timeout: Period::from_secs(1),
            retention: Retention {
                then_every: Period::ZERO,
                newest: 0,
                ..Retention::default()
            },
            ..Policy::default()
        };
        let keys: Vec<_> = bad
            .problems()
            .into_iter()
            .map(|problem| problem.key)
            .collect();
        let expected = [
            "rpo",
            "max_pause",
            "max_blackout",
            "max_throttle",
            "quiesce_timeout",
            "capture_buffer",
            "commit_window",
            "retention.newest",
            "retention.then_every",
        ];
        assert_eq!(keys, expected);
    }
}
