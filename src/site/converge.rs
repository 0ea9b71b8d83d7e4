//! Before the last cut of a planned move: points while the guest runs, each
//! leaving less, until what is left fits into the blackout that the policy
//! allows. A guest that changes faster than the link carries is throttled.

use std::time::Duration;

use farhaven_policies::decide::{MoveFacts, MoveStep, expected_blackout, next_move_step};
use farhaven_policies::policy::Policy;

use super::driver::{Attached, DriveError, Driver};
use super::remote::AskError;
use super::steps::blocking;
use crate::guest::After;

/// What a last cut costs whatever is left: device state, sealing, restoring.
const HAND_OVER: Duration = Duration::from_millis(150);

/// Points while the guest runs, until the last cut keeps within the policy or
/// more of them would not help. What the policy allows of the guest's time is
/// taken before it is told that the last cut will be longer than it wants:
/// that is what comes back then, for the report.
pub(super) async fn converge(
    driver: &mut Driver,
    attached: &mut Attached,
) -> Result<String, DriveError> {
    let mut before = None;
    let mut throttled = 0;
    for rounds in 1.. {
        let sealed = driver.point(attached, After::Continue).await?;
        let link = driver.remote.peer.status();
        let rtt = link.rtt.unwrap_or_default();
        let rate = link.congestion_window_bytes.unwrap_or(0) as f64 / rtt.as_secs_f64().max(1e-4);
        let facts = MoveFacts {
            rounds,
            remaining_bytes: sealed.sent_bytes,
            remaining_before: before,
            link_bytes_per_second: rate as u64,
            fixed: HAND_OVER + rtt * 2,
            throttle: throttled,
        };
        before = Some(sealed.sent_bytes);
        let step = next_move_step(&driver.protection.policy, &facts);
        tracing::info!(guest = %driver.record.name, rounds, remaining_bytes = sealed.sent_bytes, throttled, ?step, "a round of the move");
        match step {
            MoveStep::Round => {}
            MoveStep::LastCut { within: true, .. } => return Ok(slowed(throttled)),
            MoveStep::LastCut { .. } => {
                let told = too_long(&driver.protection.policy, &facts);
                tracing::warn!(guest = %driver.record.name, "{told}");
                driver.view.send_modify(|v| v.trouble.clone_from(&told));
                return Ok(told);
            }
            MoveStep::Throttle { percent } => {
                throttle(attached, percent).await?;
                throttled = percent;
                driver.view.send_modify(|v| v.trouble = slowed(percent));
            }
            MoveStep::LinkDown => {
                return Err(AskError::Unreachable(driver.protection.to.clone()).into());
            }
        }
    }
    Ok(slowed(throttled))
}

fn slowed(percent: u8) -> String {
    match percent {
        0 => String::new(),
        _ => format!("the guest was throttled by {percent} % so that the move comes to its end"),
    }
}

/// What to tell before a last cut that takes longer than the policy wants.
fn too_long(policy: &Policy, facts: &MoveFacts) -> String {
    let throttled = match facts.throttle {
        0 => String::new(),
        percent => format!(" (throttled by {percent} %)"),
    };
    let why = match facts.fixed >= policy.max_blackout.duration() {
        true => "the hand-over alone takes long on this link".to_owned(),
        false => format!("the guest{throttled} changes faster than the link carries"),
    };
    format!(
        "{why}: it will stand still for about {:.1} s, where protect.max_blackout is {}",
        expected_blackout(facts).as_secs_f64(),
        policy.max_blackout
    )
}

/// Takes so many percent of the guest's time, if it is still here.
pub(super) async fn throttle(attached: &mut Attached, percent: u8) -> Result<(), DriveError> {
    let Some(mut guest) = attached.guest.take() else {
        return Ok(());
    };
    let (guest, throttled) = blocking(move || {
        let throttled = guest.throttle(percent);
        (guest, throttled)
    })
    .await?;
    attached.guest = Some(guest);
    Ok(throttled?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blackout_that_cannot_be_kept_is_told_with_its_reason() {
        let policy = Policy::default();
        let mut facts = MoveFacts {
            rounds: 9,
            remaining_bytes: 4_000_000,
            remaining_before: Some(4_000_000),
            link_bytes_per_second: 1_000_000,
            fixed: HAND_OVER,
            throttle: 80,
        };
        let told = too_long(&policy, &facts);
        for words in [
            "throttled by 80 %",
            "faster than the link",
            "4.2 s",
            "500ms",
        ] {
            assert!(told.contains(words), "no '{words}' in: {told}");
        }
        (facts.fixed, facts.throttle) = (Duration::from_secs(2), 0);
        let told = too_long(&policy, &facts);
        assert!(
            told.contains("alone takes long") && told.contains("6.0 s"),
            "{told}"
        );
        assert_eq!(slowed(0), "");
        assert!(slowed(40).contains("40 %"));
    }
}
