//! The demo's proof: the guest checks itself, and the figures are put together.

use std::time::{Duration, Instant};

use super::console::is_sound;
use super::drill::Tested;
use super::ending::{After, Ending};
use super::report::{Check, Report, TestFigures};
use super::story::{First, NAME, Play, Steady};
use super::{GuestKind, Scenario, floor};
use crate::site::view::{PointView, SiteView};

/// A source whose heartbeat is silent for longer was stopped by something: more
/// than a host with too much to do, or an emulated KVM, holds it up.
const SILENCE: Duration = Duration::from_secs(5);

/// A guest whose first heartbeat at west has such a number was booted there.
const BOOTED: u64 = 5;

pub(super) async fn verify(
    play: Play,
    began: Instant,
    first: First,
    steady: Steady,
    mut ending: Ending,
) -> Result<Report, String> {
    let mut checks = match &mut ending {
        Ending::Runs(after) => {
            play.screen
                .say("The guest checks all of its memory and disks …");
            let check = after.console.full_check().await?;
            play.screen.say(&format!("  {check}"));
            checks_of_run(&check, after, play.settled.scenario)
        }
        Ending::Tested(tested) => checks_of_test(tested),
    };
    let Play {
        guest,
        mut stage,
        settled,
        screen,
    } = play;
    let path = format!("/v1/guests/{NAME}/points");
    let points: Vec<PointView> = stage
        .west
        .client
        .get(&path)
        .await
        .map_err(|e| e.to_string())?;
    stage.west.weigh();
    let resent = match stage.east.client.get::<SiteView>("/v1/status").await {
        Ok(view) => view.peers.iter().map(|p| p.resent_bytes).sum(),
        // The disaster took it.
        Err(_) => 0,
    };
    let link = stage.link.counters().forward;
    drop(guest);
    let ended_well = stage.west.terminate().await;
    checks.push(check(
        "the daemon at west ends cleanly on SIGTERM",
        ended_well,
        if ended_well { "it did" } else { "it did not" }.to_owned(),
    ));
    screen.say("The points are compared with the least that compression could send …");
    let floors = {
        let west = stage.west.directory.clone();
        tokio::task::spawn_blocking(move || floor::compute(&west))
            .await
            .map_err(|e| e.to_string())??
    };
    let scanned = settled.kind == GuestKind::Qemu;
    let mut pauses: Vec<f64> = points.iter().map(|p| p.pause_ms).collect();
    pauses.sort_by(f64::total_cmp);
    let (verified, verdict) = verdict(&checks, &ending);
    let (after, tested) = match &ending {
        Ending::Runs(after) => (Some(after), None),
        Ending::Tested(tested) => (None, Some(tested)),
    };
    Ok(Report {
        guest: settled.kind.word().to_owned(),
        scenario: settled.scenario.word().to_owned(),
        verified,
        verdict,
        checks,
        link: settled.link.to_string(),
        ram_bytes: settled.ram.bytes(),
        workload: settled.workload.clone(),
        took_s: began.elapsed().as_secs_f64(),
        first_copy_s: first.took.as_secs_f64(),
        first_copy_wan_bytes: first.wan_bytes,
        first_copy_floor_bytes: floors.first,
        first_copy_to_floor: ratio(first.wan_bytes, floors.first),
        points_sealed: points.len() as u64,
        steady_wan_bytes_per_s: steady.wan_bytes_per_s,
        steady_sent_bytes: floors.steady_sent,
        steady_floor_bytes: floors.steady,
        steady_to_floor: ratio(floors.steady_sent, floors.steady),
        ratio: steady.ratio,
        rpo_target_ms: settled.rpo.duration().as_millis() as u64,
        rpo_ms_max: steady.rpo_ms_max,
        pause_ms_median: median(&pauses),
        pause_ms_max: pauses.last().copied().unwrap_or_default(),
        pause_without_scan_ms_max: scanned.then(|| without_scan(&points)),
        ram_scan_gb_per_s: scanned.then(|| scan_speed(&points)),
        rpo_ms: after.map(|a| a.rpo_ms),
        declared_after_ms: after
            .and_then(|a| a.noticed)
            .map(|noticed| noticed.as_secs_f64() * 1e3),
        rto_ms: after.map(|a| a.rto_ms),
        blackout_ms: after.map(|a| {
            let silence = a.first.at.saturating_duration_since(a.last.at);
            silence.as_secs_f64() * 1e3
        }),
        hand_over_ms: after.and_then(|a| a.hand_over_ms),
        test: tested.map(|t| TestFigures {
            point: t.report.point,
            rto_ms: t.report.rto_ms,
            ran_ms: t.ran.as_secs_f64() * 1e3,
            points_sealed: t.points,
            source_silence_ms: t.silence.as_secs_f64() * 1e3,
            ram_bytes: t.ended.ram_bytes,
            overlay_bytes: t.ended.overlay_bytes,
        }),
        source_memory_bytes: stage.east.memory,
        target_memory_bytes: stage.west.memory,
        queue_dropped_ratio: ratio(link.overflowed, link.packets + link.lost + link.overflowed),
        resent_bytes: resent,
    })
}

fn ratio(a: u64, b: u64) -> f64 {
    if b == 0 { 0.0 } else { a as f64 / b as f64 }
}

fn median(sorted: &[f64]) -> f64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

fn without_scan(points: &[PointView]) -> f64 {
    let rests = points.iter().map(|p| p.pause_ms - p.ram_scan_ms);
    rests.fold(0.0, f64::max)
}

fn scan_speed(points: &[PointView]) -> f64 {
    let scanned = points.iter().filter(|p| p.ram_scan_ms > 0.0);
    let mut speeds: Vec<f64> = scanned
        .map(|p| p.ram_scanned_bytes as f64 / p.ram_scan_ms / 1e6)
        .collect();
    speeds.sort_by(f64::total_cmp);
    median(&speeds)
}

fn check(what: &str, passed: bool, seen: String) -> Check {
    Check {
        what: what.to_owned(),
        passed,
        seen,
    }
}

/// The guest runs at west: is it whole, and is it the same?
fn checks_of_run(said: &str, after: &After, scenario: Scenario) -> Vec<Check> {
    let (first, last) = (after.first.number, after.last.number);
    let beats = format!("{last} at east, then {first} at west");
    let mut checks = vec![check(
        "every page and block is what the guest last wrote",
        is_sound(said) && after.first.is_sound(),
        said.to_owned(),
    )];
    checks.push(check(
        "it went on, it was not booted",
        first >= BOOTED,
        format!("its first heartbeat at west is number {first}"),
    ));
    checks.push(match scenario {
        Scenario::Planned => check("nothing was lost", first == last + 1, beats),
        _ => check(
            "it went on from a moment before the disaster",
            first <= last + 1,
            beats,
        ),
    });
    checks
}

/// It was tested at west, and runs at east as if nothing had been.
fn checks_of_test(tested: &Tested) -> Vec<Check> {
    let (first, then) = (tested.first.number, tested.source.number);
    vec![
        check(
            "in the test, every page and block is what the guest last wrote",
            is_sound(&tested.check) && tested.first.is_sound(),
            tested.check.clone(),
        ),
        check(
            "the test went on from a sealed point, it was not booted",
            first >= BOOTED && first <= then + 1,
            format!("the source was at heartbeat {then}, the test began with {first}"),
        ),
        check(
            "protection went on meanwhile",
            tested.points > 0,
            format!("{} points were sealed", tested.points),
        ),
        check(
            "the source never stopped",
            tested.missed == 0 && tested.silence < SILENCE,
            format!(
                "its heartbeat was never silent for more than {:.0} ms",
                tested.silence.as_secs_f64() * 1e3
            ),
        ),
        check(
            "at the source, every page and block is what the guest last wrote",
            is_sound(&tested.source_check),
            tested.source_check.clone(),
        ),
        check(
            "nothing of the test is left at west",
            tested.left.is_empty(),
            match tested.left.as_slice() {
                [] => "no process, no memory file, no overlay".to_owned(),
                left => left.join(", "),
            },
        ),
    ]
}

fn verdict(checks: &[Check], ending: &Ending) -> (bool, String) {
    if let Some(failed) = checks.iter().find(|c| !c.passed) {
        return (false, format!("not so: {}: {}", failed.what, failed.seen));
    }
    let words = match ending {
        Ending::Runs(after) => format!(
            "heartbeat {} at east was followed by {} at west; {}",
            after.last.number,
            after.first.number,
            after.console.check.as_deref().unwrap_or_default()
        ),
        Ending::Tested(tested) => tested.check.clone(),
    };
    (true, words)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::demo::console::{Console, Heartbeat};

    fn beat(number: u64) -> Heartbeat {
        Heartbeat {
            number,
            at: Instant::now(),
            line: format!("HB {number} seq=1 block=1 mem=ok disk=ok"),
        }
    }

    fn after(last: u64, first: u64) -> After {
        After {
            console: Console::within(std::path::Path::new("/nowhere")),
            last: beat(last),
            first: beat(first),
            rpo_ms: 0.0,
            noticed: None,
            rto_ms: 1.0,
            hand_over_ms: None,
        }
    }

    #[test]
    fn a_damaged_booted_or_doubled_guest_is_not_verified() {
        let sound = "CHECK 41 mem=ok disk=ok pages=1 blocks=1";
        let passed = |said: &str, last, first, scenario| {
            let checks = checks_of_run(said, &after(last, first), scenario);
            verdict(&checks, &Ending::Runs(after(last, first))).0
        };
        assert!(passed(sound, 50, 41, Scenario::Disaster));
        assert!(passed(sound, 50, 51, Scenario::Planned));
        assert!(!passed(sound, 50, 52, Scenario::Planned));
        assert!(!passed(sound, 50, 50, Scenario::Planned));
        assert!(!passed(sound, 50, 60, Scenario::Disaster));
        assert!(!passed(sound, 50, 1, Scenario::Disaster));
        assert!(!passed(
            "CHECK 41 mem=BAD:page-7 disk=ok",
            50,
            41,
            Scenario::Disaster
        ));
        assert!(!passed(
            "CHECK 41 mem=ok disk=BAD:torn",
            50,
            41,
            Scenario::Disaster
        ));
    }
}
