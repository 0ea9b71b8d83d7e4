//! Terms: taken, heard, handed over together, and what crashes and full disks leave.

use super::together::TOGETHER;
use super::*;

fn keys() -> (SiteKey, SiteKey) {
    (SiteKey::from_bytes([1; 32]), SiteKey::from_bytes([2; 32]))
}

#[test]
fn terms_of_several_are_taken_at_once_whatever_a_crash_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let (own, other) = keys();
    let groups: Vec<GuestId> = (0..3).map(|_| GuestId::random()).collect();
    let fence = Fence::open(dir.path()).unwrap();
    fence.raise(groups[0], other).unwrap();
    let taken = fence.overrule_all(&groups, own).unwrap();
    let numbers: Vec<_> = taken.iter().map(|t| t.number).collect();
    assert_eq!(numbers, [1 + OVERRULES, OVERRULES, OVERRULES]);
    assert!(!dir.path().join(TOGETHER).exists());

    // As a crash leaves it that came before the files of their own.
    let next: Vec<Term> = taken
        .iter()
        .map(|t| Term {
            number: t.number + OVERRULES,
            ..*t
        })
        .collect();
    fence.write_file(&dir.path().join(TOGETHER), &next).unwrap();
    // One of them was overruled in a file of its own since.
    let newer = Term {
        number: 100,
        owner: other,
        ..next[1]
    };
    fence.write(newer).unwrap();
    drop(fence);
    let again = Fence::open(dir.path()).unwrap();
    assert_eq!(again.current(groups[0]), Some(next[0]));
    assert_eq!(again.current(groups[1]), Some(newer));
    assert_eq!(again.current(groups[2]), Some(next[2]));
    assert!(!dir.path().join(TOGETHER).exists());

    // Damaged: nothing is guessed.
    fs::write(dir.path().join(TOGETHER), "[]\nno sum\n").unwrap();
    assert!(matches!(
        Fence::open(dir.path()),
        Err(FenceError::Damaged { .. })
    ));
}

#[test]
fn a_term_that_cannot_be_written_is_heeded_and_written_later() {
    let dir = tempfile::tempdir().unwrap();
    let (own, other) = keys();
    let group = GuestId::random();
    let fence = Fence::open(dir.path()).unwrap();
    let mine = fence.raise(group, own).unwrap();
    let theirs = Term {
        number: mine.number + OVERRULES,
        owner: other,
        ..mine
    };
    // No file can be made there.
    let away = dir.path().with_extension("away");
    fs::rename(dir.path(), &away).unwrap();
    assert!(fence.adopt(theirs).is_err());
    assert!(fence.may_run(group, own).is_ok());
    assert!(fence.heed(theirs));
    assert!(fence.may_run(group, own).is_err());
    assert!(fence.adopt(theirs).is_err());
    assert!(!fence.heed(mine));
    fs::rename(&away, dir.path()).unwrap();
    assert_eq!(fence.adopt(theirs).unwrap(), theirs);
    let again = Fence::open(dir.path()).unwrap();
    assert_eq!(again.current(group), Some(theirs));
}

#[test]
fn terms_handed_over_together_are_all_taken_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let (own, other) = keys();
    let groups: Vec<GuestId> = (0..2).map(|_| GuestId::random()).collect();
    let fence = Fence::open(dir.path()).unwrap();
    for group in &groups {
        fence.raise(*group, other).unwrap();
    }
    let handed = |numbers: [u64; 2]| -> Vec<Term> {
        let both = groups.iter().zip(numbers);
        both.map(|(group, number)| Term {
            group: *group,
            number,
            owner: own,
        })
        .collect()
    };
    let before = fence.all();
    // One of them is no news; of one nobody would believe it.
    for numbers in [[2, 1], [2, MOST]] {
        assert!(fence.adopt_all(&handed(numbers)).is_err());
        assert_eq!(fence.all(), before);
    }
    let all = handed([2, 5]);
    fence.adopt_all(&all).unwrap();
    assert!(fence.adopt_all(&all).is_err(), "they are in force");
    drop(fence);
    let again = Fence::open(dir.path()).unwrap();
    for term in all {
        assert_eq!(again.current(term.group), Some(term));
    }
}

#[test]
fn a_term_that_nobody_would_believe_is_taken_for_none_of_several() {
    let dir = tempfile::tempdir().unwrap();
    let (own, other) = keys();
    let groups: Vec<GuestId> = (0..3).map(|_| GuestId::random()).collect();
    let fence = Fence::open(dir.path()).unwrap();
    let last = Term {
        group: groups[1],
        number: MOST,
        owner: other,
    };
    // No peer brings it so far in one leap.
    fence.write(last).unwrap();
    drop(fence);
    let fence = Fence::open(dir.path()).unwrap();
    let refused = fence.overrule_all(&groups, own);
    assert!(matches!(refused, Err(FenceError::Absurd(_))));
    assert!(matches!(
        fence.overrule(groups[1], own),
        Err(FenceError::Absurd(_))
    ));
    drop(fence);
    let again = Fence::open(dir.path()).unwrap();
    assert_eq!(again.all(), [last]);
}

#[test]
fn groups_that_are_taken_at_the_same_time_do_not_disturb_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let (own, other) = keys();
    let fence = Fence::open(dir.path()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let groups: Vec<GuestId> = (0..3).map(|_| GuestId::random()).collect();
                for _ in 0..10 {
                    let taken = fence.overrule_all(&groups, own).unwrap();
                    let next = |term: Term| Term {
                        number: term.number + 1,
                        owner: other,
                        ..term
                    };
                    let handed: Vec<Term> = taken.into_iter().map(next).collect();
                    fence.adopt_all(&handed).unwrap();
                }
            });
        }
    });
    assert_eq!(Fence::open(dir.path()).unwrap().all(), fence.all());
}
