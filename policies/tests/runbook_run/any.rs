//! Whatever happens in whatever order.

use super::*;
use proptest::sample::select;

/// One thing that may happen, if it can.
fn any_event() -> impl Strategy<Value = (u8, u64, bool)> {
    (
        any::<u8>(),
        select(vec![0u64, 1, 30, 61, 400, 2_000, 90_000]),
        any::<bool>(),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever happens in whatever order: what is refused changes nothing, what is
    /// taken in resumes as the same run after every record, what is undone was begun
    /// and is undone backwards, nothing is undone after a commit was done, and a run
    /// comes to an end when all goes well from then on.
    #[test]
    fn any_sequence_of_events(runbook in made::sound_runbook(), events in proptest::collection::vec(any_event(), 0..120)) {
        let mut kept = Kept::new(planned(&runbook));
        for (what, secs, flag) in events {
            kept.pass(secs);
            let who = if flag { "anna" } else { "ben" };
            let (by, event) = match what {
                0..=119 => { let next = kept.next(); kept.well(next); continue }
                120..=139 => (None, fault(Cause::Fault)),
                140..=149 => (None, fault(Cause::Clean)),
                150..=159 => (None, fault(Cause::SourceLost)),
                160..=169 => (None, Event::SourceBack),
                170..=189 => (None, Event::Restarted),
                190..=194 => (Some(who), Event::Refused { why: "no".to_owned() }),
                195..=199 => (Some(who), Event::Paused),
                200..=204 => (Some(who), Event::Aborted { rollback: flag }),
                205..=214 => (Some(who), Event::Answered { answer: Answer::TakeAsDone }),
                215..=219 => (Some(who), Event::Answered { answer: Answer::Rollback }),
                220..=221 => (Some(who), Event::Answered { answer: Answer::End }),
                222..=231 => (None, Event::TimedOut),
                232..=241 => (None, Event::Done { note: "x".repeat(5_000) }),
                242..=251 => (Some(who), Event::Approved { comment: String::new() }),
                _ => (None, Event::Ended { outcome: Outcome::Succeeded }),
            };
            let _ = kept.tell(by, event);
        }
        let outcome = kept.finish();
        let names: Vec<_> = runbook.steps.iter().map(|step| step.name.as_str()).collect();
        let place = |name: &str| names.iter().position(|known| *known == name).unwrap();
        let begun = kept.begun();
        let mut undone = begun.iter().filter_map(|name| name.strip_prefix('-')).map(place).collect::<Vec<_>>();
        for place in &undone {
            prop_assert!(begun.iter().any(|name| name == names[*place]));
        }
        undone.dedup();
        prop_assert!(undone.windows(2).all(|pair| pair[0] > pair[1]), "{undone:?}");
        if runbook.steps.iter().any(|step| step.action == Action::Commit) && outcome == Outcome::RolledBack {
            prop_assert!(!begun.iter().any(|name| name == "commit"));
        }
    }

    /// A log of which lines are missing, doubled or exchanged is refused or is a run; never a panic.
    #[test]
    fn damaged_logs_never_panic(runbook in made::sound_runbook(), cuts in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 1..5)) {
        let mut kept = Kept::new(planned(&runbook));
        kept.finish();
        let mut log = kept.log.clone();
        for (from, to) in cuts {
            let (from, to) = (from.index(log.len()), to.index(log.len()));
            let record = log[from].clone();
            log[to] = Record { number: log[to].number, ..record };
        }
        let _ = Run::resume(&log);
    }
}
