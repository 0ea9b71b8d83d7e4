//! Runbooks made up for tests: any at all, and such as have no mistake.
#![allow(dead_code, reason = "each test that includes this uses a part of it")]

use std::collections::{BTreeMap, BTreeSet};

use farhaven_policies::runbook::{
    Action, Kind, Method, Mode, OnError, PointChoice, Readiness, Runbook, Step,
};
use farhaven_policies::units::Period;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};

fn word() -> impl Strategy<Value = String> {
    "[a-z][a-z0-9-]{0,8}"
}

/// A text with whatever a file must escape.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![Just(String::new()), "[ -~\n\t\"\\\\äπ\u{1}]{0,20}"]
}

fn period() -> impl Strategy<Value = Period> {
    (1u64..10_000_000).prop_map(Period::from_millis)
}

fn modes() -> impl Strategy<Value = BTreeSet<Mode>> {
    subsequence(Mode::ALL.to_vec(), 1..=3).prop_map(|modes| modes.into_iter().collect())
}

fn any_action() -> impl Strategy<Value = Action> {
    let words = || proptest::collection::vec(text(), 0..4);
    let checks = subsequence(Readiness::ALL.to_vec(), 0..=6);
    let health = (
        proptest::option::of(text()),
        proptest::option::of(text()),
        proptest::option::of(any::<bool>()),
        proptest::option::of(words()),
        period(),
    );
    let call = (
        text(),
        select(Method::ALL.to_vec()),
        text(),
        proptest::option::of(text()),
        any::<bool>(),
    );
    prop_oneof![
        checks.prop_map(|checks| Action::Check { checks }),
        (words(), any::<u8>(), text()).prop_map(|(by, approvals, message)| Action::Approve {
            by,
            approvals,
            message
        }),
        select(vec![
            Action::Quiesce,
            Action::ShutdownSource,
            Action::FinalSync,
            Action::Fence,
            Action::StartGroup,
            Action::Commit,
            Action::Rollback,
            Action::Reprotect,
            Action::Cleanup,
        ]),
        prop_oneof![
            Just(PointChoice::Newest),
            (1u64..1 << 60).prop_map(PointChoice::Number)
        ]
        .prop_map(|point| Action::Promote { point }),
        proptest::collection::btree_map(text(), text(), 0..3)
            .prop_map(|networks| Action::Remap { networks }),
        health.prop_map(|(tcp, http, agent, script, every)| Action::WaitHealthy {
            tcp,
            http,
            agent,
            script,
            every
        }),
        (words(), words(), any::<bool>()).prop_map(|(run, undo, repeatable)| Action::Exec {
            run,
            undo,
            repeatable
        }),
        call.prop_map(|(url, method, body, undo, repeatable)| Action::Webhook {
            url,
            method,
            body,
            undo,
            repeatable
        }),
        period().prop_map(|period| Action::Delay { period }),
    ]
}

fn any_step() -> impl Strategy<Value = Step> {
    (
        text(),
        any_action(),
        text(),
        proptest::option::of(text()),
        proptest::collection::vec(text(), 0..3),
        proptest::option::of(modes()),
        proptest::option::of(period()),
        select(OnError::ALL.to_vec()),
    )
        .prop_map(
            |(name, action, description, group, guests, modes, timeout, on_error)| Step {
                name,
                action,
                description,
                group,
                guests,
                modes,
                timeout,
                on_error,
            },
        )
}

/// Whatever a runbook's types can hold.
pub(crate) fn any_runbook() -> impl Strategy<Value = Runbook> {
    let groups =
        proptest::collection::btree_map(text(), proptest::collection::vec(text(), 0..3), 1..3);
    let steps = proptest::collection::vec(any_step(), 1..8);
    (text(), text(), modes(), groups, steps).prop_map(
        |(name, description, modes, groups, steps)| Runbook {
            name,
            description,
            modes,
            groups,
            steps,
        },
    )
}

/// A runbook of one mode without a mistake: the backbone of that mode, with
/// whatever may stand between.
pub(crate) fn sound_runbook() -> impl Strategy<Value = Runbook> {
    (
        select(Mode::ALL.to_vec()),
        proptest::collection::vec(
            (
                0usize..9,
                0usize..64,
                any::<bool>(),
                select(OnError::ALL.to_vec()),
            ),
            0..8,
        ),
        any::<bool>(),
        any::<u16>(),
    )
        .prop_map(|(mode, extras, ends, errors)| sound(mode, &extras, ends, errors))
}

fn sound(mode: Mode, extras: &[(usize, usize, bool, OnError)], ends: bool, errors: u16) -> Runbook {
    let mut spine: Vec<Action> = match mode {
        Mode::Test => vec![],
        Mode::Planned => vec![Action::Quiesce, Action::FinalSync],
        Mode::Unplanned => vec![Action::Fence],
    };
    spine.push(Action::Promote {
        point: PointChoice::Newest,
    });
    spine.push(Action::Remap {
        networks: BTreeMap::new(),
    });
    spine.push(Action::StartGroup);
    spine.push(health());
    match (mode, ends) {
        (Mode::Test, _) => spine.push(Action::Cleanup),
        (_, true) => spine.extend([Action::Commit, Action::Reprotect]),
        (_, false) => spine.push(Action::Rollback),
    }
    let mut steps: Vec<Step> = spine
        .into_iter()
        .enumerate()
        .map(|(index, action)| {
            let mut step = Step::new(action.kind().word(), action);
            let may_roll = !matches!(
                step.action.kind(),
                Kind::Commit | Kind::Reprotect | Kind::Rollback
            );
            if errors >> index & 1 == 1 && may_roll {
                step.on_error = OnError::Rollback;
            }
            step
        })
        .collect();
    for (index, (what, place, flag, on_error)) in extras.iter().enumerate() {
        let place = place % (steps.len() + 1);
        let after_commit = steps[..place]
            .iter()
            .any(|step| step.action == Action::Commit);
        let action = match what {
            0..=2 => Action::Exec {
                run: vec!["/bin/true".to_owned()],
                undo: if *flag {
                    vec!["/bin/false".to_owned()]
                } else {
                    Vec::new()
                },
                repeatable: what % 2 == 0,
            },
            3..=4 => Action::Webhook {
                url: "http://a.example/".to_owned(),
                method: Method::Post,
                body: String::new(),
                undo: flag.then(|| "http://a.example/undo".to_owned()),
                repeatable: what % 2 == 0,
            },
            5..=6 => Action::Approve {
                by: vec!["anna".to_owned(), "ben".to_owned()],
                approvals: 1 + u8::from(*flag),
                message: String::new(),
            },
            7 => Action::Check { checks: Vec::new() },
            _ => Action::Delay {
                period: Period::from_secs(5),
            },
        };
        let mut step = Step::new(format!("extra-{index}"), action);
        step.modes = Some([mode].into());
        step.on_error = match (step.action.kind(), on_error) {
            (Kind::Approve, OnError::Continue) => OnError::Stop,
            (_, OnError::Rollback) if after_commit => OnError::Continue,
            (_, on_error) => *on_error,
        };
        if step.on_error == OnError::Continue && step.action.kind() == Kind::Approve {
            step.on_error = OnError::Stop;
        }
        if step.action.kind() == Kind::Approve {
            step.timeout = Some(Period::from_secs(60));
        }
        steps.insert(place, step);
    }
    Runbook {
        name: "made-up".to_owned(),
        description: String::new(),
        modes: [mode].into(),
        groups: [("bank".to_owned(), vec!["db".to_owned()])].into(),
        steps,
    }
}

fn health() -> Action {
    Action::WaitHealthy {
        tcp: None,
        http: None,
        agent: None,
        script: None,
        every: Period::from_secs(2),
    }
}
