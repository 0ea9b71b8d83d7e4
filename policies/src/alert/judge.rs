//! Measured facts -> findings.

use std::time::Duration;

use super::{Board, Finding, Kind, Severity};
use crate::files::Alerts;
use crate::units::Period;

/// A peer that was not heard of for so long is told of.
const UNREACHABLE: Duration = Duration::from_secs(60);
/// Something that hinders a peer for less than this is not told of.
const TROUBLED: Duration = Duration::from_secs(30);
/// A guest that is taken over runs long before.
const NOWHERE: Duration = Duration::from_secs(60);
/// An RPO that is kept for so many times its target is kept again...
const CALM: u32 = 3;
/// ...within these bounds.
const CALM_BOUNDS: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(600));
/// What hangs on the link or a clock is over when it was for so long.
const SETTLED: Duration = Duration::from_secs(60);
/// A store is over its threshold until it is so many percent under it.
const STORE_BAND: u8 = 2;
/// Clocks differ until they do by less than so many percent of what is allowed.
const SKEW_BAND: u32 = 80;

/// All that is known of a site.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Facts {
    /// Guests that run here.
    pub sources: Vec<SourceFacts>,
    /// Guests of peers.
    pub standbys: Vec<StandbyFacts>,
    /// Paired sites.
    pub peers: Vec<PeerFacts>,
    /// The file system of the store.
    pub store: Option<StoreFacts>,
}

/// A guest that runs here.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SourceFacts {
    /// Its name.
    pub name: String,
    /// Where it is protected to, if it is.
    pub peer: Option<String>,
    /// Protection is paused by an operator.
    pub paused: bool,
    /// What it should lose at most.
    pub rpo: Duration,
    /// Age of its newest sealed point; `None` without any.
    pub sealed_age: Option<Duration>,
    /// How long it is known here without a sealed point, or unprotected.
    pub known_for: Duration,
    /// It is stopped for good: what its status says of that.
    pub fenced: Option<String>,
    /// It stands still: nothing of it is lost meanwhile, however old its newest point.
    pub stands: bool,
    /// It stands still for a run at its peer, or a move whose end is not known, for
    /// longer than those take: what its status says.
    pub held: Option<String>,
    /// It cannot be reached, or has ended: what its status says.
    pub lost: Option<String>,
    /// It runs elsewhere, moved there.
    pub elsewhere: bool,
    /// What hinders its protection just now; may be empty.
    pub trouble: String,
}

/// A guest of a peer, kept here.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StandbyFacts {
    /// Its name.
    pub name: String,
    /// The peer that sends it.
    pub from: String,
    /// By its term it is this site's to run, and for so long it has not run here.
    pub runs_nowhere_for: Option<Duration>,
    /// What keeps it from that, where that is known.
    pub trouble: String,
    /// It was taken over and runs here, protected to nowhere, for so long.
    pub unprotected_for: Option<Duration>,
    /// Since its last good test, or since it is known without one; `None`: it
    /// has no point to test.
    pub untested_for: Option<Duration>,
    /// Was it ever tested?
    pub tested: bool,
}

/// A paired site.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PeerFacts {
    /// Its name.
    pub site: String,
    /// It was not heard of for so long.
    pub silent_for: Option<Duration>,
    /// By how much its clock differs, and how far off that may be.
    pub skew: Option<(Duration, Duration)>,
    /// Its clock is ahead of this site's.
    pub ahead: bool,
    /// What hinders it, by its own word, and for how long.
    pub trouble: Option<(String, Duration)>,
}

/// A file system.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StoreFacts {
    /// The store's directory.
    pub path: String,
    /// Bytes that it holds at most.
    pub total: u64,
    /// Bytes that may still be written.
    pub free: u64,
    /// Below this nothing more is taken from peers.
    pub reserve: u64,
}

/// What deserves an alert. What stands (`board`) is left only with some distance
/// to its threshold.
pub fn judge(thresholds: &Alerts, facts: &Facts, board: &Board) -> Vec<Finding> {
    let mut found = Vec::new();
    for source in &facts.sources {
        found.extend(of_source(thresholds, source));
    }
    for standby in &facts.standbys {
        of_standby(thresholds, standby, &mut found);
    }
    for peer in &facts.peers {
        of_peer(thresholds, peer, board, &mut found);
    }
    found.extend(
        facts
            .store
            .as_ref()
            .and_then(|store| of_store(thresholds, store, board)),
    );
    found
}

fn of_source(thresholds: &Alerts, of: &SourceFacts) -> Option<Finding> {
    use Severity::{Critical, Warning};
    let name = &of.name;
    if let Some(what) = &of.fenced {
        return Some(Finding::new(
            Kind::FenceRaised,
            name,
            Critical,
            format!("'{name}' is {what}"),
            format!(
                "make sure that it runs at the other site; then protect it from there again, or forget this copy: farhaven unprotect {name}"
            ),
        ));
    }
    if let Some(what) = &of.held {
        return Some(Finding::new(
            Kind::GuestStopped,
            name,
            Critical,
            format!("'{name}' stands still: {what}"),
            format!(
                "if a run at its peer holds it, agree to it there, or abort it: farhaven run list; if not, bring the link up, and it goes on by itself; if the peer is lost for good: farhaven take-back {name} --force"
            ),
        ));
    }
    if of.stands {
        return None;
    }
    if let Some(what) = &of.lost {
        return Some(
            Finding::new(
                Kind::GuestLost,
                name,
                Critical,
                format!("'{name}' cannot be reached: {what}"),
                format!(
                    "start it again under its record, or run it at the peer from its newest point: farhaven failover {name}"
                ),
            )
            .clears_after(CALM_BOUNDS.0),
        );
    }
    if of.elsewhere {
        return None;
    }
    let peer = of.peer.as_deref().unwrap_or("PEER");
    let hindered = match of.trouble.as_str() {
        "" => String::new(),
        trouble => format!(": {trouble}"),
    };
    let (Some(age), true) = (of.sealed_age, of.peer.is_some()) else {
        if of.known_for < thresholds.unprotected_after.duration() {
            return None;
        }
        let (what, advice) = match (&of.peer, of.paused) {
            (None, _) => (
                format!("'{name}' runs here and is not protected"),
                format!("protect it: farhaven protect {name} --to {peer}"),
            ),
            (Some(_), true) => (
                format!("'{name}' has no recovery point, and its protection is paused"),
                format!("let it go on: farhaven resume {name}"),
            ),
            (Some(peer), false) => (
                format!("'{name}' has no recovery point at '{peer}' yet{hindered}"),
                format!(
                    "see how far its first copy is, and what hinders it: farhaven status; farhaven guest check {name} --to {peer}"
                ),
            ),
        };
        return Some(Finding::new(
            Kind::Unprotected,
            name,
            Critical,
            what,
            advice,
        ));
    };
    let over = |times: u8| age > of.rpo.saturating_mul(u32::from(times));
    let severity = match () {
        () if over(thresholds.rpo_critical) => Critical,
        () if over(thresholds.rpo_warning) => Warning,
        () => return None,
    };
    let times = match severity {
        Critical => thresholds.rpo_critical,
        _ => thresholds.rpo_warning,
    };
    let rpo = whole(of.rpo);
    let (why, advice) = match of.paused {
        true => (
            ": its protection is paused".to_owned(),
            format!("let it go on: farhaven resume {name}"),
        ),
        false => (
            hindered,
            format!(
                "look at the link and the load: farhaven status; give it more of the link, or a longer RPO: farhaven link show, farhaven protect {name} --to {peer} --rpo TIME"
            ),
        ),
    };
    let calm = of
        .rpo
        .saturating_mul(CALM)
        .clamp(CALM_BOUNDS.0, CALM_BOUNDS.1);
    Some(
        Finding::new(
            Kind::RpoOverTarget,
            name,
            severity,
            format!(
                "the newest point of '{name}' is {} old, over {times} times its target of {rpo}{why}",
                whole(age)
            ),
            advice,
        )
        .clears_after(calm),
    )
}

fn of_standby(thresholds: &Alerts, of: &StandbyFacts, found: &mut Vec<Finding>) {
    let name = &of.name;
    if let Some(since) = of.runs_nowhere_for
        && since >= NOWHERE
    {
        let why = match of.trouble.as_str() {
            "" => String::new(),
            trouble => format!(": {trouble}"),
        };
        found.push(Finding::new(
            Kind::GuestStopped,
            name,
            Severity::Critical,
            format!(
                "'{name}' was handed over to this site or taken over here, and runs nowhere for {}{why}",
                whole(since)
            ),
            format!("run it here from its newest point: farhaven failover {name}"),
        ));
    }
    if let Some(since) = of.unprotected_for
        && since >= thresholds.unprotected_after.duration()
    {
        found.push(Finding::new(
            Kind::Unprotected,
            name,
            Severity::Critical,
            format!(
                "'{name}' was taken over and runs here for {}, protected to nowhere",
                whole(since)
            ),
            format!("protect it the other way round: farhaven reprotect {name}"),
        ));
    }
    let overdue = thresholds.test_overdue.duration();
    if let Some(since) = of.untested_for
        && since > overdue
        && of.unprotected_for.is_none()
    {
        let what = match of.tested {
            true => format!("the last good test of '{name}' was {} ago", whole(since)),
            false => format!(
                "'{name}' is kept here for {} and was never tested",
                whole(since)
            ),
        };
        found.push(Finding::new(
            Kind::TestOverdue,
            name,
            Severity::Warning,
            format!("{what}; a test is due every {}", thresholds.test_overdue),
            format!("test it, nobody will notice: farhaven test {name}"),
        ));
    }
}

fn of_peer(thresholds: &Alerts, of: &PeerFacts, board: &Board, found: &mut Vec<Finding>) {
    let site = &of.site;
    if let Some(silence) = of.silent_for
        && silence >= UNREACHABLE
    {
        found.push(
            Finding::new(
                Kind::PeerUnreachable,
                site,
                Severity::Warning,
                format!("site '{site}' was not heard of for {}", whole(silence)),
                "look at the link and at its daemon there; replication goes on by itself when it is back. If the site is lost: farhaven failover GUEST",
            )
            .clears_after(SETTLED),
        );
    }
    if let Some((what, since)) = &of.trouble
        && *since >= TROUBLED
    {
        found.push(
            Finding::new(
                Kind::PeerTroubled,
                site,
                Severity::Warning,
                format!("site '{site}' takes no data: {what}"),
                format!("mend that at '{site}'; nothing that is sealed is lost, points get older until then"),
            )
            .clears_after(SETTLED),
        );
    }
    let Some((skew, error)) = of.skew else {
        return;
    };
    let allowed = thresholds.clock_skew.duration();
    let bound = match board.severity(Kind::ClockSkew, site) {
        Some(_) => allowed * SKEW_BAND / 100,
        None => allowed,
    };
    // Only what is sure to be more than allowed.
    if skew.saturating_sub(error) > bound {
        let way = if of.ahead { "ahead of" } else { "behind" };
        found.push(
            Finding::new(
                Kind::ClockSkew,
                site,
                Severity::Warning,
                format!(
                    "the clock of site '{site}' is {} {way} this one's (to within {}); {allowed} are allowed, written as alerts.clock_skew",
                    fine(skew),
                    fine(error),
                    allowed = thresholds.clock_skew,
                ),
                "have both hosts set their clocks by NTP: timedatectl status, chronyc tracking. Ages of points and windows of time are off by that much until then",
            )
            .clears_after(SETTLED),
        );
    }
}

fn of_store(thresholds: &Alerts, of: &StoreFacts, board: &Board) -> Option<Finding> {
    if of.total == 0 {
        return None;
    }
    let used = of.total.saturating_sub(of.free);
    let percent = u128::from(used) * 100 / u128::from(of.total);
    let stands = board.severity(Kind::StoreNearlyFull, &of.path);
    let over = |limit: u8, severity: Severity| {
        let band = if stands >= Some(severity) {
            STORE_BAND
        } else {
            0
        };
        percent >= u128::from(limit.saturating_sub(band))
    };
    let full = of.free < of.reserve;
    let severity = match () {
        () if full || over(thresholds.store_critical, Severity::Critical) => Severity::Critical,
        () if over(thresholds.store_warning, Severity::Warning) => Severity::Warning,
        () => return None,
    };
    let consequence = match full {
        true => ": under store.min_free, nothing more is taken from peers",
        false => "",
    };
    Some(
        Finding::new(
            Kind::StoreNearlyFull,
            &of.path,
            severity,
            format!(
                "{percent} % of the file system of {} are used, {} MiB are free{consequence}",
                of.path,
                of.free >> 20
            ),
            "make room there, keep fewer points (retention), or drop some now: farhaven prune plan NAME",
        )
        .clears_after(CALM_BOUNDS.0),
    )
}

/// A time for people, to the second.
fn whole(time: Duration) -> Period {
    Period::from_secs(time.as_secs())
}

/// A time for people, to the millisecond.
fn fine(time: Duration) -> Period {
    Period::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}
