//! The demo's proof: the guest checks itself, and the figures are put together.

use super::guest::{Heartbeat, Machine};
use super::report::Report;
use super::stage::Stage;
use super::story::{After, First, NAME, Steady, say};
use super::{Demo, floor};
use crate::site::view::{PointView, SiteView};

pub(super) async fn verify(
    demo: &Demo,
    mut stage: Stage,
    machine: Machine,
    first: First,
    steady: Steady,
    mut after: After,
) -> Result<Report, String> {
    say("The guest checks all of its memory, its disks and its files …");
    let check = after.console.full_check().await?;
    say(&format!("  {check}"));
    let first_beat = after.console.first.clone().ok_or("no heartbeat at west")?;
    let blackout = first_beat.at.saturating_duration_since(after.last.at);
    let points: Vec<PointView> = stage
        .west
        .client
        .get(&format!("/v1/guests/{NAME}/points"))
        .await
        .map_err(|e| e.to_string())?;
    stage.west.weigh();
    let resent = match stage.east.client.get::<SiteView>("/v1/status").await {
        Ok(view) => view.peers.iter().map(|p| p.resent_bytes).sum(),
        Err(_) => 0,
    };
    let link = stage.link.counters().forward;
    drop(after.process);
    drop(machine);
    let ended_well = stage.west.terminate().await;
    let floors = {
        let west = stage.west.directory.clone();
        tokio::task::spawn_blocking(move || floor::compute(&west))
            .await
            .map_err(|e| e.to_string())??
    };

    let (verified, verdict) = verdict(demo, &check, &after.last, &first_beat, ended_well);
    let mut pauses: Vec<f64> = points.iter().map(|p| p.pause_ms).collect();
    pauses.sort_by(f64::total_cmp);
    let mut speeds: Vec<f64> = points
        .iter()
        .filter(|p| p.ram_scan_ms > 0.0)
        .map(|p| p.ram_scanned_bytes as f64 / p.ram_scan_ms / 1e6)
        .collect();
    speeds.sort_by(f64::total_cmp);
    let median = |sorted: &[f64]| sorted.get(sorted.len() / 2).copied().unwrap_or_default();
    let ratio = |a: u64, b: u64| if b == 0 { 0.0 } else { a as f64 / b as f64 };
    Ok(Report {
        guest: "qemu".to_owned(),
        scenario: if demo.planned { "planned" } else { "disaster" }.to_owned(),
        verified,
        verdict,
        link: demo.link.to_string(),
        first_copy_s: first.took.as_secs_f64(),
        first_copy_wan_bytes: first.wan_bytes,
        first_copy_floor_bytes: floors.first,
        first_copy_to_floor: ratio(first.wan_bytes, floors.first),
        points_sealed: points.len() as u64,
        steady_wan_bytes_per_s: steady.wan_bytes_per_s,
        steady_sent_bytes: floors.steady_sent,
        steady_floor_bytes: floors.steady,
        steady_to_floor: ratio(floors.steady_sent, floors.steady),
        pause_ms_median: median(&pauses),
        pause_ms_max: pauses.last().copied().unwrap_or_default(),
        pause_without_scan_ms_max: points
            .iter()
            .map(|p| p.pause_ms - p.ram_scan_ms)
            .fold(0.0, f64::max),
        ram_scan_gb_per_s: median(&speeds),
        rpo_ms: after.rpo_ms,
        rto_ms: after.rto_ms,
        blackout_ms: blackout.as_secs_f64() * 1e3,
        hand_over_ms: after.hand_over_ms,
        source_memory_bytes: stage.east.memory,
        target_memory_bytes: stage.west.memory,
        queue_dropped_ratio: ratio(link.overflowed, link.packets + link.lost + link.overflowed),
        resent_bytes: resent,
    })
}

fn verdict(
    demo: &Demo,
    check: &str,
    last: &Heartbeat,
    first: &Heartbeat,
    ended_well: bool,
) -> (bool, String) {
    let sound = check.contains(" mem=ok ") && check.contains(" disk=ok ");
    if !sound {
        return (false, format!("the guest found itself damaged: {check}"));
    }
    if first.number > last.number + 1 {
        return (
            false,
            format!(
                "heartbeats {} to {} are missing",
                last.number + 1,
                first.number - 1
            ),
        );
    }
    if demo.planned && first.number != last.number + 1 {
        return (
            false,
            format!(
                "after heartbeat {} came {}: a planned move must lose nothing",
                last.number, first.number
            ),
        );
    }
    if first.number < 20 {
        return (
            false,
            "the heartbeat began anew: the guest was booted, not restored".to_owned(),
        );
    }
    if !ended_well {
        return (
            false,
            "the target's daemon did not stop cleanly on SIGTERM".to_owned(),
        );
    }
    (
        true,
        format!(
            "heartbeat {} was followed by {}; {check}",
            last.number, first.number
        ),
    )
}
