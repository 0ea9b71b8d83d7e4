//! (guests, links, deadline) -> waves, or why it cannot be done.
//!
//! An evacuation takes everything off a site before a deadline. [`plan`] takes
//! measured [`Facts`] and answers with a [`Plan`]: which group is copied in which
//! turn, from when it goes before all others, when it is expected to be cut and to
//! run, in waves that an operator can follow. What does not fit is named, with
//! what would have to give. There is no state: a plan for measurements that have
//! changed is the same function with new facts.
//!
//! Data passes through it so: facts are checked and become numbers (`units`);
//! a list scheduler (`schedule`) runs orders of groups over the links in
//! closed-form arithmetic (`bytes`), several orders are tried (`choose`) and
//! compared with what no plan can beat (`bound`); the best becomes waves
//! (`waves`), or what is left (`shortfall`).
//!
//! The model. A group's guests are cut at one instant, when little enough is left
//! that none runs nowhere for longer than its policy says. A guest that waits is
//! not copied, as what it writes again and again then crosses the link once. A
//! group is cut only when the guests that its own ones start after run and are
//! healthy; its bytes may cross before that.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};

mod bound;
mod bytes;
mod choose;
mod schedule;
mod shortfall;
mod units;
mod waves;

/// What is known of a site that is to be left.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// What is still here.
    pub groups: Vec<GroupFacts>,
    /// Names of guests that run at their peer by now: nothing waits for them.
    pub moved: BTreeSet<String>,
    /// Links to peers.
    pub links: Vec<LinkFacts>,
    /// Everything is to run at its peer after this time; `None`: as soon as may be.
    pub deadline: Option<Duration>,
}

/// A protection group, or a guest alone.
#[derive(Debug, Clone)]
pub struct GroupFacts {
    /// Its name.
    pub name: String,
    /// Where it goes.
    pub peer: String,
    /// The higher goes first, as long as the deadline allows.
    pub priority: u8,
    /// Most bytes a second that its policy lets it put on the link.
    pub rate_cap: Option<u64>,
    /// Most of the link that it may take, in percent.
    pub share: u8,
    /// Cut at one instant.
    pub guests: Vec<GuestFacts>,
}

/// A guest, measured. Bytes are as they cross the link: deduplicated, compressed.
#[derive(Debug, Clone)]
pub struct GuestFacts {
    /// Its name.
    pub name: String,
    /// Bytes that a cut now would have to copy.
    pub remaining: u64,
    /// Bytes a second that its writes would add if nothing were dirty.
    pub dirty_rate: u64,
    /// Most bytes that its writes can add: what it writes again and again.
    pub working_set: u64,
    /// Percent of its time that it may lose to throttling.
    pub max_throttle: u8,
    /// Longest time in which it may run nowhere.
    pub max_blackout: Duration,
    /// From its last byte at the peer until it runs.
    pub start: Duration,
    /// From then until what depends on it may start.
    pub healthy: Duration,
    /// Guests that must be healthy at the peer before it starts there.
    pub after: Vec<String>,
}

/// A link to a peer.
#[derive(Debug, Clone)]
pub struct LinkFacts {
    /// The peer.
    pub peer: String,
    /// Bytes a second that it carries, measured.
    pub rate: u64,
}

/// What is to be done, with expected times since now.
///
/// Whoever performs it serves each link by this rule: first groups that are being
/// cut; then those whose `urgent_from` has come, the earliest first; then the
/// rest by `turn`; each as far as its cap goes, then the next. A group that must
/// wait for others with little left is copied again now and then meanwhile.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Waves in order. No group depends on another of its own wave.
    pub waves: Vec<Wave>,
    /// When the last guest is expected to run and be healthy.
    pub finish: Duration,
    /// What it was to keep to.
    pub deadline: Option<Duration>,
    /// Whether that can be done.
    pub verdict: Verdict,
    /// What no plan could beat, all groups moved.
    pub bound: Bound,
    /// What does not fit, and why.
    pub left: Vec<Left>,
    /// What would make it fit; `None` if everything does.
    pub would_do: Option<WouldDo>,
    /// Where a policy's bound is expected to be broken.
    pub gives: Vec<Give>,
}

/// Whether a deadline can be met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Everything is expected to run at its peer in time.
    Fits,
    /// Everything is tried, and ends so close to the deadline that measurements
    /// are not exact enough to tell.
    Tight,
    /// Something is left.
    DoesNotFit,
}

/// Groups that go together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Wave {
    /// From 1.
    pub number: usize,
    /// When the first of its bytes cross.
    pub from: Duration,
    /// When all of it runs.
    pub until: Duration,
    /// Its groups, in order of their cuts.
    pub groups: Vec<Passage>,
}

/// A group's way to its peer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Passage {
    /// Which group.
    pub group: String,
    /// Its guests, which are cut at one instant.
    #[serde(default)]
    pub guests: Vec<String>,
    /// Where to.
    pub peer: String,
    /// Its place in the order of copying, from 0.
    pub turn: usize,
    /// From then on it goes before all that is not more urgent still.
    pub urgent_from: Duration,
    /// When its copying starts.
    pub copy_from: Duration,
    /// When its guests stop here.
    pub cut_at: Duration,
    /// When all of them run at the peer and are healthy.
    pub healthy_at: Duration,
    /// Bytes expected on the link.
    pub bytes: u64,
    /// Longest time that one of its guests is expected to run nowhere.
    pub blackout: Duration,
}

/// Times that no plan can beat.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bound {
    /// Bytes that are to be copied now, over the rate of their link: the slowest link.
    pub bytes: Duration,
    /// The same with what guests write while they wait, which must cross as well.
    pub writes: Duration,
    /// The longest chain of groups that wait for each other.
    pub chain: Duration,
    /// The greatest of all that is known.
    pub least: Duration,
}

/// A group that does not fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// Which group.
    pub group: String,
    /// Its guests.
    pub guests: Vec<String>,
    /// Why.
    pub reason: LeftReason,
}

/// Why a group does not fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "why")]
pub enum LeftReason {
    /// Nothing connects this site with its peer.
    NoLink,
    /// Alone on the link, with all that it waits for, it would need more time.
    TooLong {
        /// So much at least.
        needs: Duration,
    },
    /// It waits for a guest that is left itself.
    WaitsFor {
        /// That one's group.
        group: String,
    },
    /// The link is needed for groups that go before it.
    NoRoom,
}

/// What would move everything.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct WouldDo {
    /// This deadline, at today's rates; `None` where a link is missing.
    pub deadline: Option<Duration>,
    /// This many percent of today's rates, with today's deadline; `None`: no rate would do.
    pub rate_percent: Option<u64>,
}

/// A bound of a policy that is expected to be broken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Give {
    /// Which group.
    pub group: String,
    /// Longest time that one of its guests is expected to run nowhere...
    pub blackout: Duration,
    /// ...which was to be no longer than this.
    pub max_blackout: Duration,
    /// Percent of its time that it loses to throttling until then.
    pub throttle: u8,
}

/// Facts that no plan can be made from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Two groups, guests or links have one name.
    #[error("{what} '{name}' is given twice; each needs a name of its own")]
    Twice {
        /// Group, guest or link.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// A guest waits for one that is not known.
    #[error(
        "guest '{guest}' starts after '{after}', which is neither here nor moved; correct its start order"
    )]
    UnknownGuest {
        /// Who waits.
        guest: String,
        /// For whom.
        after: String,
    },
    /// Guests wait for each other.
    #[error("{} wait for each other; take one out of the start order", names.join(" -> "))]
    Cycle {
        /// Who, in order.
        names: Vec<String>,
    },
    /// More than can be planned at once.
    #[error(
        "{guests} guests are more than the {MOST_GUESTS} that are planned at once; plan by group"
    )]
    TooMany {
        /// So many.
        guests: usize,
    },
}

/// Most guests of one plan.
pub const MOST_GUESTS: usize = 100_000;

/// Plans an evacuation.
///
/// # Errors
/// See [`PlanError`]; a deadline that cannot be kept is no error but a plan with
/// [`Plan::left`].
pub fn plan(facts: &Facts) -> Result<Plan, PlanError> {
    let site = units::Site::new(facts)?;
    let bound = |finish: f64| bound::bound(&site, finish);
    let deadline = facts.deadline.map(|deadline| deadline.as_secs_f64());
    let chosen = shortfall::fit(&site, deadline);
    let kept = site.only(&chosen.keep);
    let verdict = match deadline {
        _ if !chosen.left.is_empty() => Verdict::DoesNotFit,
        Some(deadline) if chosen.run.finish > deadline * (1.0 - shortfall::TIGHT) => Verdict::Tight,
        _ => Verdict::Fits,
    };
    Ok(Plan {
        waves: waves::waves(&kept, &chosen.run),
        finish: units::span(chosen.run.finish),
        deadline: facts.deadline,
        verdict,
        bound: bound(chosen.everything),
        left: chosen.left,
        would_do: chosen.would_do,
        gives: waves::gives(&kept, &chosen.run),
    })
}
