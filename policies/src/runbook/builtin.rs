//! The runbooks in force without a file: what `move`, `failover` and `test` do.

use std::collections::BTreeMap;

use super::action::every;
use super::{ANYONE, Action, Mode, OnError, PointChoice, Runbook, Step};
use crate::units::Period;

/// How long a test runs on before it is thrown away unless somebody decides.
const TEST_LASTS: Period = Period::from_secs(8 * 3600);

/// The built-in runbook of one mode, for these groups.
pub fn of_mode(mode: Mode, groups: BTreeMap<String, Vec<String>>) -> Runbook {
    let (name, description) = match mode {
        Mode::Test => (
            "test",
            "Run the group here from its newest point, isolated, and throw it away.",
        ),
        Mode::Planned => (
            "move",
            "Move the group here from its very last instruction; nothing is lost.",
        ),
        Mode::Unplanned => (
            "failover",
            "Run the group here from its newest point; its source is lost.",
        ),
    };
    Runbook {
        name: name.to_owned(),
        description: description.to_owned(),
        modes: [mode].into(),
        groups,
        steps: steps(mode),
    }
}

/// All three in one, to begin a file of one's own with.
pub fn of_all(groups: BTreeMap<String, Vec<String>>) -> Runbook {
    // In each mode the steps come in this order.
    const ORDER: [&str; 9] = [
        "ready",
        "final-sync",
        "fence",
        "promote",
        "networks",
        "start",
        "healthy",
        "looked-at",
        "cleanup",
    ];
    let mut merged: Vec<Step> = Vec::new();
    for name in ORDER {
        let mut of_name: Vec<Step> = Vec::new();
        for mode in Mode::ALL {
            for mut step in steps(mode).into_iter().filter(|step| step.name == name) {
                step.modes = Some([mode].into());
                let alike = of_name.iter_mut().find(|other| {
                    (
                        &other.action,
                        other.on_error,
                        other.timeout,
                        &other.description,
                    ) == (&step.action, step.on_error, step.timeout, &step.description)
                });
                match alike {
                    Some(other) => other.modes.iter_mut().for_each(|modes| {
                        modes.insert(mode);
                    }),
                    None => of_name.push(step),
                }
            }
        }
        let several = of_name.len() > 1;
        for mut step in of_name {
            let modes: Vec<_> = step
                .modes
                .iter()
                .flatten()
                .map(|mode| mode.word())
                .collect();
            if several {
                step.name = format!("{name}-{}", modes.join("-"));
            }
            merged.push(step);
        }
    }
    Runbook {
        name: "group".to_owned(),
        description: "What move, failover and test do without a file.".to_owned(),
        modes: Mode::ALL.into(),
        groups,
        steps: merged,
    }
}

fn steps(mode: Mode) -> Vec<Step> {
    // Until it runs here, a move that fails gives the guests back to the source,
    // and a test leaves nothing. After a disaster there is nothing to go back
    // to: a person decides.
    let before_it_runs = match mode {
        Mode::Test | Mode::Planned => OnError::Rollback,
        Mode::Unplanned => OnError::Stop,
    };
    let step = |name: &str, action: Action, on_error: OnError| Step {
        on_error,
        ..Step::new(name, action)
    };
    let mut steps = vec![step(
        "ready",
        Action::Check { checks: Vec::new() },
        OnError::Stop,
    )];
    match mode {
        Mode::Test => {}
        Mode::Planned => steps.push(step("final-sync", Action::FinalSync, OnError::Rollback)),
        Mode::Unplanned => steps.push(step("fence", Action::Fence, OnError::Stop)),
    }
    let promote = Action::Promote {
        point: PointChoice::Newest,
    };
    let remap = Action::Remap {
        networks: BTreeMap::new(),
    };
    steps.push(step("promote", promote, before_it_runs));
    steps.push(step("networks", remap, before_it_runs));
    steps.push(step("start", Action::StartGroup, before_it_runs));
    // What is not healthy here is not given up unseen: it may have written.
    let healthy = Action::WaitHealthy {
        tcp: None,
        http: None,
        agent: None,
        script: None,
        every: every(),
    };
    let unhealthy = match mode {
        Mode::Test => OnError::Continue,
        Mode::Planned | Mode::Unplanned => OnError::Stop,
    };
    steps.push(step("healthy", healthy, unhealthy));
    if mode == Mode::Test {
        steps.push(Step {
            timeout: Some(TEST_LASTS),
            ..step(
                "looked-at",
                Action::Approve {
                    by: vec![ANYONE.to_owned()],
                    approvals: 1,
                    message: "Look at the guests. Approve if they are what they should be, refuse if not: either way the test ends and is thrown away.".to_owned(),
                },
                OnError::Rollback,
            )
        });
        steps.push(step("cleanup", Action::Cleanup, OnError::Stop));
    }
    steps
}
