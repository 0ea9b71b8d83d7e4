//! What people decide: answers, approvals, pauses, aborts; and how long a step waits.

use super::*;

#[test]
fn stopped_means_that_a_person_decides() {
    for (answer, outcome, begun) in [
        (
            Answer::Repeat,
            Outcome::Succeeded,
            "ready fence fence promote networks start healthy",
        ),
        (
            Answer::TakeAsDone,
            Outcome::Succeeded,
            "ready fence promote networks start healthy",
        ),
        (Answer::Rollback, Outcome::RolledBack, "ready fence -fence"),
        (Answer::End, Outcome::Stopped, "ready fence"),
    ] {
        let mut kept = Kept::new(planned(&builtin::of_mode(Mode::Unplanned, group())));
        let first = kept.until_begun("fence");
        kept.tell(None, fault(Cause::Fault)).unwrap();
        let Next::Ask(question) = kept.next() else {
            panic!()
        };
        assert!(!question.interrupted && question.why == "broken");
        assert!(
            kept.tell(None, Event::Answered { answer })
                .unwrap_err()
                .contains("name is missing")
        );
        kept.tell(Some("ben"), Event::Answered { answer }).unwrap();
        if answer == Answer::Repeat {
            // It is known to have failed: a receiver is not to take this for the same.
            let again = kept.until_begun("fence");
            assert_eq!(
                (first.key.as_str(), again.key.as_str()),
                ("r-1/fence", "r-1/fence/2")
            );
            kept.tell(
                None,
                Event::Done {
                    note: String::new(),
                },
            )
            .unwrap();
        }
        assert_eq!(kept.finish(), outcome);
        assert_eq!(kept.begun().join(" "), begun);
    }
}

fn approval(approvals: u8, on_error: OnError) -> Runbook {
    let mut runbook = builtin::of_mode(Mode::Planned, group());
    let mut step = Step::new(
        "ask",
        Action::Approve {
            by: vec!["anna".to_owned(), "ben".to_owned()],
            approvals,
            message: String::new(),
        },
    );
    (step.timeout, step.on_error) = (Some(Period::from_secs(60)), on_error);
    runbook.steps.insert(3, step);
    runbook
}

#[test]
fn approvals_are_of_named_people_each_once_in_time() {
    let ok = || Event::Approved {
        comment: "go".to_owned(),
    };
    let mut kept = Kept::new(planned(&approval(2, OnError::Rollback)));
    kept.until_begun("ask");
    assert!(
        kept.tell(Some("carl"), ok())
            .unwrap_err()
            .contains("anna, ben may")
    );
    assert!(
        kept.tell(None, ok())
            .unwrap_err()
            .contains("name is missing")
    );
    assert!(
        kept.tell(
            None,
            Event::Done {
                note: String::new()
            }
        )
        .is_err()
    );
    assert!(kept.tell(None, fault(Cause::Clean)).is_err());
    kept.tell(Some("ben"), ok()).unwrap();
    assert!(
        kept.tell(Some("ben"), ok())
            .unwrap_err()
            .contains("another person")
    );
    assert!(matches!(
        kept.next(),
        Next::AwaitApproval { missing: 1, .. }
    ));
    // A restart does not forget who agreed, nor give more time.
    kept.tell(None, Event::Restarted).unwrap();
    kept.pass(59);
    kept.tell(Some("anna"), ok()).unwrap();
    assert_eq!(kept.state_of("ask").0, Forward::Done);
    assert_eq!(kept.finish(), Outcome::Succeeded);

    let mut kept = Kept::new(planned(&approval(1, OnError::Rollback)));
    kept.until_begun("ask");
    kept.tell(
        Some("anna"),
        Event::Refused {
            why: "not today".to_owned(),
        },
    )
    .unwrap();
    assert_eq!(kept.finish(), Outcome::RolledBack);
    assert!(
        kept.run.steps()[3]
            .said
            .contains("refused by anna: not today")
    );

    let mut kept = Kept::new(planned(&approval(1, OnError::Stop)));
    kept.until_begun("ask");
    kept.pass(60);
    assert!(
        kept.tell(Some("anna"), ok())
            .unwrap_err()
            .contains("the time for it is over")
    );
    assert_eq!(kept.next(), Next::Record(Event::TimedOut));
    kept.tell(None, Event::TimedOut).unwrap();
    // What named people must decide nobody else takes as decided.
    let Next::Ask(question) = kept.next() else {
        panic!()
    };
    assert_eq!(
        question.answers,
        [Answer::Repeat, Answer::Rollback, Answer::End]
    );
    let taken = Event::Answered {
        answer: Answer::TakeAsDone,
    };
    assert!(kept.tell(Some("carl"), taken).is_err());
}

#[test]
fn the_other_site_is_waited_for_as_long_as_the_step_has_time() {
    let mut kept = Kept::new(planned(&builtin::of_mode(Mode::Planned, group())));
    let first = kept.until_begun("final-sync");
    kept.pass(600);
    kept.tell(None, fault(Cause::SourceLost)).unwrap();
    assert!(matches!(kept.next(), Next::AwaitSource { .. }));
    kept.pass(600);
    kept.tell(None, Event::SourceBack).unwrap();
    let again = kept.until_begun("final-sync");
    assert_eq!((again.key, again.attempt), (first.key, 2));
    kept.tell(None, fault(Cause::SourceLost)).unwrap();
    // Thirty minutes in all.
    kept.pass(599);
    assert!(matches!(kept.next(), Next::AwaitSource { .. }));
    kept.pass(1);
    assert_eq!(kept.next(), Next::Record(Event::TimedOut));
    assert_eq!(kept.finish(), Outcome::RolledBack);
    assert_eq!(
        kept.begun().join(" "),
        "ready final-sync final-sync -final-sync"
    );

    // What was tried in vain is undone even if it was about to be tried again.
    let mut kept = Kept::new(planned(&builtin::of_mode(Mode::Planned, group())));
    kept.until_begun("final-sync");
    kept.tell(None, fault(Cause::SourceLost)).unwrap();
    kept.tell(None, Event::SourceBack).unwrap();
    kept.tell(Some("anna"), Event::Aborted { rollback: true })
        .unwrap();
    assert_eq!(kept.finish(), Outcome::RolledBack);
    assert_eq!(kept.begun().join(" "), "ready final-sync -final-sync");

    // Where it is taken to be lost, nobody waits.
    let mut kept = Kept::new(planned(&builtin::of_mode(Mode::Unplanned, group())));
    kept.until_begun("fence");
    kept.tell(None, fault(Cause::SourceLost)).unwrap();
    assert!(matches!(kept.next(), Next::Ask(_)));
}

#[test]
fn what_may_not_be_repeated_is_asked_about_after_a_restart() {
    for repeatable in [false, true] {
        let mut runbook = builtin::of_mode(Mode::Planned, group());
        let run = vec!["/bin/pay".to_owned()];
        let exec = Action::Exec {
            run,
            undo: vec![],
            repeatable,
        };
        runbook.steps.insert(1, Step::new("pay", exec));
        let mut kept = Kept::new(planned(&runbook));
        let first = kept.until_begun("pay");
        kept.tell(None, Event::Restarted).unwrap();
        if repeatable {
            let again = kept.until_begun("pay");
            assert_eq!((again.key, again.attempt), (first.key, 2));
            continue;
        }
        let Next::Ask(question) = kept.next() else {
            panic!()
        };
        assert!(question.interrupted);
        // Another restart asks the same.
        kept.tell(None, Event::Restarted).unwrap();
        assert_eq!(kept.next(), Next::Ask(question));
        kept.tell(
            Some("anna"),
            Event::Answered {
                answer: Answer::Repeat,
            },
        )
        .unwrap();
        let again = kept.until_begun("pay");
        assert_eq!((again.key, again.attempt), (first.key, 2));
    }
}

#[test]
fn there_is_no_way_back_from_a_commit() {
    let mut runbook = builtin::of_mode(Mode::Planned, group());
    runbook.steps.push(Step::new("commit", Action::Commit));
    let mut kept = Kept::new(planned(&runbook));
    kept.until_begun("commit");
    let back = || Event::Aborted { rollback: true };
    assert!(
        kept.tell(Some("anna"), back())
            .unwrap_err()
            .contains("no way back")
    );
    kept.tell(None, fault(Cause::Fault)).unwrap();
    let Next::Ask(question) = kept.next() else {
        panic!()
    };
    assert!(!question.answers.contains(&Answer::Rollback));
    kept.tell(Some("anna"), Event::Aborted { rollback: false })
        .unwrap();
    assert_eq!(kept.finish(), Outcome::Stopped);
}

#[test]
fn a_pause_begins_nothing_and_an_abort_undoes() {
    let mut kept = Kept::new(planned(&builtin::of_mode(Mode::Test, group())));
    kept.until_begun("promote");
    kept.tell(Some("anna"), Event::Paused).unwrap();
    assert!(kept.tell(Some("anna"), Event::Paused).is_err());
    kept.tell(
        None,
        Event::Done {
            note: String::new(),
        },
    )
    .unwrap();
    assert_eq!(kept.next(), Next::Paused);
    kept.tell(Some("ben"), Event::Continued).unwrap();
    kept.until_begun("networks");
    kept.tell(Some("anna"), Event::Aborted { rollback: true })
        .unwrap();
    assert!(
        kept.tell(Some("anna"), Event::Aborted { rollback: true })
            .is_err()
    );
    assert_eq!(kept.finish(), Outcome::RolledBack);
    assert_eq!(
        kept.begun().join(" "),
        "ready promote networks -networks -promote"
    );
}
