//! Boards and judgements, by hand and by chance.

use proptest::prelude::*;

use super::*;
use crate::files::Alerts;

fn at(seconds: u64) -> Now {
    Now {
        wall: (1_000_000 + seconds) * 1_000_000_000,
        steady: Duration::from_secs(seconds),
    }
}

fn finding(severity: Severity) -> Finding {
    let finding = Finding::new(Kind::RpoOverTarget, "web", severity, "old", "look");
    finding.clears_after(Duration::from_secs(30))
}

fn transitions(changes: &[Change]) -> Vec<Transition> {
    changes.iter().map(|change| change.transition).collect()
}

#[test]
fn what_comes_and_goes_is_one_alert() {
    let mut board = Board::default();
    let warning = || vec![finding(Severity::Warning)];
    let raised = board.observe(at(0), warning());
    assert_eq!(transitions(&raised), [Transition::Raised]);
    for second in 1..100 {
        let found = if second % 7 < 3 { warning() } else { vec![] };
        assert_eq!(board.observe(at(second), found), []);
    }
    let id = raised[0].alert.id;
    let acknowledged = board.acknowledge(at(100), id, "ada").unwrap();
    assert_eq!(acknowledged.alert.acknowledged.unwrap().by, "ada");
    assert_eq!(board.acknowledge(at(100), id + 1, "ada"), None);
    // Worse is news, and nobody has acknowledged that.
    let worse = board.observe(at(101), vec![finding(Severity::Critical)]);
    assert_eq!(transitions(&worse), [Transition::Worsened]);
    assert_eq!(
        (worse[0].alert.id, &worse[0].alert.acknowledged),
        (id, &None)
    );
    // Less bad is, too, but only when it lasts.
    assert_eq!(board.observe(at(130), warning()), []);
    assert_eq!(
        board.severity(Kind::RpoOverTarget, "web"),
        Some(Severity::Critical)
    );
    let eased = board.observe(at(131), warning());
    assert_eq!(transitions(&eased), [Transition::Eased]);
    assert_eq!(board.observe(at(160), vec![]), []);
    assert_eq!(
        transitions(&board.observe(at(161), vec![])),
        [Transition::Cleared]
    );
    assert_eq!(board.active().len(), 0);
    // The next one is another.
    assert_ne!(board.observe(at(162), warning())[0].alert.id, id);
}

#[test]
fn what_is_reported_stands_until_it_is_taken_back_also_over_a_restart() {
    let mut board = Board::default();
    let broken = || Finding::new(Kind::PolicyBroken, "a.toml", Severity::Warning, "x", "y");
    assert!(board.raise(at(0), broken()).is_some());
    assert_eq!(board.raise(at(1), broken()), None, "told once");
    board.observe(at(5), vec![finding(Severity::Warning)]);
    assert_eq!(board.observe(at(50), vec![finding(Severity::Warning)]), []);
    let kept = serde_json::to_string(&board).unwrap();
    let mut again: Board = serde_json::from_str(&kept).unwrap();
    // What is measured has its time to be found again.
    assert_eq!(again.observe(at(1), vec![]), []);
    let changes = again.observe(at(31), vec![]);
    assert_eq!(transitions(&changes), [Transition::Cleared]);
    assert_eq!(changes[0].alert.finding.kind, Kind::RpoOverTarget);
    assert_eq!(again.reported(Kind::PolicyBroken), ["a.toml"]);
    assert_eq!(again.clear(at(32), Kind::PolicyBroken, "b.toml"), None);
    let cleared = again.clear(at(32), Kind::PolicyBroken, "a.toml").unwrap();
    assert_eq!(cleared.transition, Transition::Cleared);
    assert_eq!(again.clear(at(33), Kind::PolicyBroken, "a.toml"), None);
    // Numbers are never given twice.
    assert_eq!(again.raise(at(34), broken()).unwrap().alert.id, 3);
}

#[test]
fn memory_is_bounded_whatever_is_reported() {
    let mut board = Board::default();
    for n in 0..MOST_ALERTS + 10 {
        let long = "ü".repeat(4000);
        board.raise(
            at(0),
            Finding::new(
                Kind::GuestLost,
                format!("{n}{long}"),
                Severity::Critical,
                &long,
                &long,
            ),
        );
    }
    assert_eq!(board.active().len(), MOST_ALERTS);
    let longest = |alert: &&Active| alert.finding.subject.len().max(alert.finding.what.len());
    assert!(board.active().iter().map(longest).max().unwrap() <= LONGEST_TEXT);
}

fn web(age: u64) -> SourceFacts {
    SourceFacts {
        name: "web".into(),
        peer: Some("west".into()),
        rpo: Duration::from_secs(10),
        sealed_age: Some(Duration::from_secs(age)),
        ..SourceFacts::default()
    }
}

fn judged(facts: Facts) -> Vec<(Kind, Severity)> {
    let found = judge(&Alerts::default(), &facts, &Board::default());
    found.iter().map(|f| (f.kind, f.severity)).collect()
}

#[test]
fn every_measured_alert_has_its_threshold() {
    use Severity::{Critical, Warning};
    let source = |source| Facts {
        sources: vec![source],
        ..Facts::default()
    };
    assert_eq!(judged(source(web(20))), []);
    assert_eq!(judged(source(web(21))), [(Kind::RpoOverTarget, Warning)]);
    assert_eq!(judged(source(web(31))), [(Kind::RpoOverTarget, Critical)]);
    let unsealed = |known_for| SourceFacts {
        sealed_age: None,
        known_for: Duration::from_secs(known_for),
        ..web(0)
    };
    assert_eq!(judged(source(unsealed(299))), []);
    assert_eq!(
        judged(source(unsealed(300))),
        [(Kind::Unprotected, Critical)]
    );
    let unprotected = SourceFacts {
        peer: None,
        ..unsealed(300)
    };
    assert_eq!(judged(source(unprotected)), [(Kind::Unprotected, Critical)]);
    let moved = SourceFacts {
        elsewhere: true,
        ..web(4000)
    };
    assert_eq!(judged(source(moved)), []);
    // Not yet for longer than a planned move takes: its points grow old, and nothing
    // is lost.
    let stands = SourceFacts {
        stands: true,
        ..web(4000)
    };
    assert_eq!(judged(source(stands)), []);
    for (kind, facts) in [
        (
            Kind::FenceRaised,
            SourceFacts {
                fenced: Some("fenced".into()),
                ..web(1)
            },
        ),
        (
            Kind::GuestStopped,
            SourceFacts {
                stands: true,
                held: Some("held".into()),
                ..web(1)
            },
        ),
        (
            Kind::GuestLost,
            SourceFacts {
                lost: Some("gone".into()),
                ..web(1)
            },
        ),
    ] {
        assert_eq!(judged(source(facts)), [(kind, Critical)]);
    }
    let days = |days: u64| Duration::from_secs(days * 86_400);
    let standby = |untested: u64, runs: Option<Duration>| Facts {
        standbys: vec![StandbyFacts {
            name: "web".into(),
            untested_for: Some(days(untested)),
            unprotected_for: runs,
            ..StandbyFacts::default()
        }],
        ..Facts::default()
    };
    assert_eq!(judged(standby(30, None)), []);
    assert_eq!(judged(standby(31, None)), [(Kind::TestOverdue, Warning)]);
    assert_eq!(
        judged(standby(31, Some(days(1)))),
        [(Kind::Unprotected, Critical)]
    );
    let nowhere = |seconds| {
        let mut facts = standby(0, None);
        facts.standbys[0].runs_nowhere_for = Some(Duration::from_secs(seconds));
        facts
    };
    assert_eq!(judged(nowhere(59)), []);
    assert_eq!(judged(nowhere(60)), [(Kind::GuestStopped, Critical)]);
    let peer = |peer| Facts {
        peers: vec![peer],
        ..Facts::default()
    };
    let seconds = Duration::from_secs;
    let skewed = |by, error| PeerFacts {
        skew: Some((Duration::from_millis(by), Duration::from_millis(error))),
        ..PeerFacts::default()
    };
    assert_eq!(judged(peer(skewed(1040, 40))), []);
    assert_eq!(judged(peer(skewed(1041, 40))), [(Kind::ClockSkew, Warning)]);
    let silent = PeerFacts {
        silent_for: Some(seconds(60)),
        ..PeerFacts::default()
    };
    assert_eq!(judged(peer(silent)), [(Kind::PeerUnreachable, Warning)]);
    let troubled = PeerFacts {
        trouble: Some(("full".into(), seconds(30))),
        ..PeerFacts::default()
    };
    assert_eq!(judged(peer(troubled)), [(Kind::PeerTroubled, Warning)]);
}

#[test]
fn a_store_that_hovers_at_its_threshold_is_one_alert() {
    let mut board = Board::default();
    let mut look = |second: u64, free: u64| {
        let store = StoreFacts {
            path: "/store".into(),
            total: 1000,
            free,
            reserve: 10,
        };
        let facts = Facts {
            store: Some(store),
            ..Facts::default()
        };
        let found = judge(&Alerts::default(), &facts, &board);
        transitions(&board.observe(at(second * 10), found))
    };
    assert_eq!(look(0, 201), []);
    assert_eq!(look(1, 200), [Transition::Raised]);
    for second in 2..20 {
        assert_eq!(look(second, 200 + second % 2 * 19), []);
    }
    assert_eq!(look(20, 50), [Transition::Worsened]);
    assert_eq!(look(21, 60), [], "within the band of critical");
    assert_eq!(look(22, 71), [Transition::Eased]);
    assert_eq!(look(23, 221), [Transition::Cleared]);
    assert_eq!(look(24, 9), [Transition::Raised]);
}

proptest! {
    /// Whatever is found when: an alert is raised and cleared in turn, never
    /// twice the same way, never cleared before its time, and what is found at
    /// the end stands.
    #[test]
    fn raised_and_cleared_in_turn(
        looks in proptest::collection::vec((0u64..20, proptest::option::of(any::<bool>())), 1..200),
        clear_after in 0u64..60,
    ) {
        let (mut board, mut now, mut last_found) = (Board::default(), 0, None);
        let (mut stands, mut critical) = (false, false);
        for (pause, found) in looks {
            now += pause;
            let found: Vec<Finding> = found.map(|critical| {
                let severity = if critical { Severity::Critical } else { Severity::Warning };
                finding(severity).clears_after(Duration::from_secs(clear_after))
            }).into_iter().collect();
            let any = !found.is_empty();
            let changes = board.observe(at(now), found);
            prop_assert!(changes.len() <= 1);
            if any {
                last_found = Some(now);
            }
            for change in changes {
                match change.transition {
                    Transition::Raised => {
                        prop_assert!(any && !stands);
                        stands = true;
                        critical = change.alert.finding.severity == Severity::Critical;
                    }
                    Transition::Cleared => {
                        prop_assert!(!any && stands);
                        prop_assert!(last_found.is_some_and(|at| now - at >= clear_after));
                        stands = false;
                    }
                    Transition::Worsened => {
                        prop_assert!(any && stands && !critical);
                        critical = true;
                    }
                    Transition::Eased => {
                        prop_assert!(any && stands && critical);
                        critical = false;
                    }
                    Transition::Acknowledged => prop_assert!(false),
                }
            }
            prop_assert!(!any || stands);
        }
        // Left alone, everything ends.
        board.observe(at(now + 1000), vec![]);
        prop_assert_eq!(board.active().len(), 0);
    }
}
