//! The step `shutdown-source`: the guests of a planned run are shut down at their
//! source, those that start last first, before their last changes are taken.

use std::time::{Duration, Instant};

use farhaven_policies::runbook::Action;
use farhaven_policies::runbook::plan::Plan;

use super::perform::{AtSite, named};
use super::planned::asked;
use super::targets::Target;
use crate::replicate::message::{Message, Refusal, RunMessage};
use crate::runbook::perform::{Ended, Failure, Guests, Scope};
use crate::site::operate::OperateError;
use crate::site::remote::AskError;

/// A source answers at once whether a guest could be shut down.
const COULD: Duration = Duration::from_secs(30);

/// The source's word comes before the step's time is over, and says more.
const BEFORE_THE_END: Duration = Duration::from_secs(2);

/// No step waits longer than that for its guests.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// A source starts a guest between two of its points; it may have to attach to it.
const STARTED: Duration = Duration::from_secs(120);

/// Known before anything is begun: whether the source can shut these guests down.
pub(super) async fn may_begin(targets: &[Target], plan: &Plan) -> Result<(), OperateError> {
    for step in plan.to_do() {
        if !matches!(step.action, Action::ShutdownSource) {
            continue;
        }
        for target in targets {
            let of_group = step.group.as_ref().is_none_or(|of| *of == target.group);
            if !of_group || !(step.guests.is_empty() || step.guests.contains(&target.name)) {
                continue;
            }
            let question = RunMessage::ShutDown {
                guest: target.standby.guest,
                within_ms: None,
            };
            let why = match ask(target, question, COULD).await {
                Ok(()) => continue,
                Err(AskError::Refused {
                    code: Refusal::Unknown,
                    ..
                }) => format!(
                    "site '{}' runs a version that shuts no guests down for a runbook; update it",
                    target.standby.from()
                ),
                Err(AskError::Refused { why, .. }) => why,
                Err(error) => error.to_string(),
            };
            return Err(OperateError::Conflict(format!(
                "step '{}' has '{}' shut down at its source: {why}. Nothing was begun; else take the step out of the runbook, or out of this mode",
                step.name, target.name
            )));
        }
    }
    Ok(())
}

async fn ask(target: &Target, question: RunMessage, within: Duration) -> Result<(), AskError> {
    let remote = target.standby.remote();
    match remote.ask_within(Message::Run(question), within).await? {
        Message::Done => Ok(()),
        _ => Err(AskError::Unfitting(target.standby.from())),
    }
}

/// See the module's page. One after the other: who starts first may be needed by
/// the others until they are down.
pub(super) async fn shut_down(run: &AtSite, scope: &Scope) -> Ended<Guests> {
    let longest = scope.timeout.unwrap_or(LONGEST).min(LONGEST);
    let deadline = Instant::now() + longest.saturating_sub(BEFORE_THE_END);
    let targets = run.targets(scope)?;
    let mut down: Vec<&str> = Vec::new();
    for target in targets.iter().rev() {
        run.goes_on()?;
        // Written down before it is asked: else nobody would start it again.
        run.note(&target.name, |guest| guest.shut_down = true)
            .await?;
        let left = deadline.saturating_duration_since(Instant::now());
        let question = RunMessage::ShutDown {
            guest: target.standby.guest,
            within_ms: Some(left.as_millis() as u64),
        };
        let patience = left + BEFORE_THE_END + COULD;
        match ask(target, question, patience).await {
            Ok(()) => down.push(&target.name),
            Err(AskError::Refused { why, .. }) => {
                let so_far = match down.as_slice() {
                    [] => "none of the others was shut down".to_owned(),
                    down => format!(
                        "shut down already: {}; a rollback starts them again",
                        down.join(", ")
                    ),
                };
                return Err(Failure::fault(format!("{why} ({so_far})")));
            }
            Err(error) => return Err(asked(error)),
        }
    }
    Ok(named(&targets))
}

/// Undoes the step: what the run has shut down boots again at the source, in start order.
pub(super) async fn start_again(run: AtSite, scope: Scope) -> Ended<()> {
    for target in run.targets(&scope)? {
        run.goes_on()?;
        if !run.facts.of(&target.name).shut_down {
            continue;
        }
        let question = RunMessage::StartAgain {
            guest: target.standby.guest,
        };
        match ask(&target, question, STARTED).await {
            Ok(()) => {}
            Err(AskError::Refused { why, .. }) => {
                return Err(Failure::fault(format!(
                    "'{}' is not started again at '{}': {why}",
                    target.name,
                    target.standby.from()
                )));
            }
            Err(error) => return Err(asked(error)),
        }
        run.note(&target.name, |guest| guest.shut_down = false)
            .await?;
    }
    Ok(())
}
