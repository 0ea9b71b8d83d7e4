//! How the guest comes to run at west: its site dies, or it is moved.

use std::path::Path;
use std::time::{Duration, Instant};

use super::console::{Console, Heartbeat};
use super::drill::Tested;
use super::stage::Daemon;
use super::story::{NAME, Play};
use crate::cli::show::millis;
use crate::site::api::{Failover, Move};
use crate::site::view::{FailoverReport, MoveReport};

/// For the first heartbeat at west.
const REVIVE: Duration = Duration::from_secs(20);

/// How it ended.
pub(super) enum Ending {
    /// It runs at west.
    Runs(After),
    /// It runs at east, and was tested at west.
    Tested(Tested),
}

/// The guest, on the other side.
pub(super) struct After {
    pub(super) console: Console,
    /// Its last heartbeat at east.
    pub(super) last: Heartbeat,
    /// Its first at west.
    pub(super) first: Heartbeat,
    /// What was lost.
    pub(super) rpo_ms: f64,
    /// From the disaster until failover was declared.
    pub(super) noticed: Option<Duration>,
    pub(super) rto_ms: f64,
    pub(super) hand_over_ms: Option<f64>,
}

pub(super) async fn disaster(play: &mut Play) -> Result<After, String> {
    play.guest.console.poll();
    play.screen.shout(
        "DISASTER",
        "east loses power. Its daemon and its guest are killed.",
    );
    let happened = Instant::now();
    play.stage.east.kill();
    play.guest.kill();
    let last = last(play)?;
    play.screen
        .say(&format!("  last heartbeat there:  {}", last.line));
    let west = &play.stage.west;
    while west.view().await?.peers.iter().any(|p| p.connected) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    play.screen
        .say("West hears nothing of east any more. Failover is declared there …");
    let noticed = happened.elapsed();
    let path = format!("/v1/guests/{NAME}/failover");
    let report: FailoverReport = west
        .client
        .post(&path, &Failover::default())
        .await
        .map_err(|e| format!("{e}\n{}", west.last_words()))?;
    let mut console = Console::of(report.console.as_ref())?;
    let first = first(&mut console).await?;
    play.screen
        .say(&format!("  first heartbeat there: {}", first.line));
    // The site counts until the declaration; the guest lived until the disaster.
    let lost = report.rpo_ms.saturating_sub(noticed.as_millis() as u64);
    play.screen.say(&format!(
        "It runs at west, from point {}: {} after the declaration, {} lost.",
        report.point,
        millis(report.rto_ms as u64),
        millis(lost)
    ));
    Ok(After {
        console,
        last,
        first,
        rpo_ms: lost as f64,
        noticed: Some(noticed),
        rto_ms: report.rto_ms,
        hand_over_ms: None,
    })
}

pub(super) async fn planned(play: &mut Play) -> Result<After, String> {
    play.screen.shout(
        "MAINTENANCE",
        "the guest is moved to west, with nothing lost …",
    );
    let east = play.stage.east.client.clone();
    let moving = tokio::spawn(async move {
        let path = format!("/v1/guests/{NAME}/move");
        // The story goes on however slow the link is; what it stood is in the report.
        let body = Move {
            accept_pause: true,
            by: None,
        };
        east.post::<MoveReport>(&path, &body).await
    });
    // The heartbeat goes on here until the last cut, and there after it.
    let mut there: Option<Console> = None;
    while !moving.is_finished() {
        play.guest.console.poll();
        match &mut there {
            Some(console) => console.poll(),
            None => there = console_at(&play.stage.west),
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let report = moving.await.map_err(|e| e.to_string())?;
    let report = report.map_err(|e| format!("{e}\n{}", play.stage.west.last_words()))?;
    let last = last(play)?;
    let standbys = play.stage.west.view().await?.standbys;
    let active = standbys.into_iter().find_map(|s| s.active);
    let active = active.ok_or("west does not run it")?;
    let mut console = match there {
        Some(console) => console,
        None => Console::of(active.console.as_ref())?,
    };
    let first = first(&mut console).await?;
    play.screen
        .say(&format!("  last heartbeat at east:  {}", last.line));
    play.screen
        .say(&format!("  first heartbeat at west: {}", first.line));
    play.screen.say(&format!(
        "It runs at west, {:.0} ms after the command; it stood still for {:.0} ms.",
        report.total_ms, report.blackout_ms
    ));
    Ok(After {
        console,
        last,
        first,
        rpo_ms: 0.0,
        noticed: None,
        rto_ms: report.total_ms,
        hand_over_ms: Some(report.blackout_ms),
    })
}

/// The last heartbeat at east.
fn last(play: &mut Play) -> Result<Heartbeat, String> {
    play.guest.console.poll();
    let last = play.guest.console.last.clone();
    last.ok_or_else(|| "the guest never had a heartbeat".to_owned())
}

/// The first heartbeat at west.
async fn first(console: &mut Console) -> Result<Heartbeat, String> {
    console
        .wait("heartbeat at west", REVIVE, |c| c.first.clone())
        .await
}

/// The console of what west is about to run.
fn console_at(west: &Daemon) -> Option<Console> {
    let begun = |directory: &Path| directory.join("console.log").exists();
    let directory = west.activations().into_iter().find(|d| begun(d))?;
    Some(Console::within(&directory))
}
