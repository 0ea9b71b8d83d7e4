//! A test failover while the guest is protected: west runs it isolated, it
//! checks itself there, and is thrown away; the source never notices.

use std::time::{Duration, Instant};

use super::console::{Console, Heartbeat};
use super::story::{NAME, Play};
use crate::cli::show::{bytes, millis};
use crate::site::api::TestFailover;
use crate::site::view::{TestEnded, TestReport};

/// For the first heartbeat of the test.
const REVIVE: Duration = Duration::from_secs(20);

/// The guest's test runs at least for so many heartbeats.
const BEATS: u64 = 10;

/// Points that are waited for while the test runs.
const POINTS: u64 = 2;

/// What was seen.
pub(super) struct Tested {
    pub(super) report: TestReport,
    pub(super) ended: TestEnded,
    /// The test's first heartbeat.
    pub(super) first: Heartbeat,
    /// The source's when the test was asked for.
    pub(super) source: Heartbeat,
    /// The guest's own check, in the test.
    pub(super) check: String,
    /// And at the source, when the test was over.
    pub(super) source_check: String,
    /// Points sealed while the test ran.
    pub(super) points: u64,
    /// How many beats of the source did not come, or came anew.
    pub(super) missed: u64,
    /// The longest that the source's heartbeat was silent meanwhile.
    pub(super) silence: Duration,
    pub(super) ran: Duration,
    /// What was found at west after the clean-up; empty as it must be.
    pub(super) left: Vec<String>,
}

/// The source's heartbeat, watched.
struct Watch {
    newest: Heartbeat,
    silence: Duration,
    missed: u64,
}

impl Watch {
    fn see(&mut self, console: &Console) {
        let Some(beat) = &console.last else { return };
        if beat.number == self.newest.number {
            return;
        }
        // Some may have been read at once: they count by their numbers.
        if beat.number < self.newest.number {
            self.missed += 1;
        }
        self.silence = self.silence.max(beat.at.duration_since(self.newest.at));
        self.newest = beat.clone();
    }
}

pub(super) async fn test(play: &mut Play) -> Result<Tested, String> {
    play.guest.console.poll();
    let source = play.guest.console.last.clone();
    let source = source.ok_or("the guest never had a heartbeat")?;
    let before = play.look().await?.points_sealed;
    play.screen.shout(
        "TEST",
        "west runs the guest from its newest point, isolated; protection goes on …",
    );
    let mut watch = Watch {
        newest: source.clone(),
        silence: Duration::ZERO,
        missed: 0,
    };
    let began = Instant::now();
    let west = play.stage.west.client.clone();
    let asked = tokio::spawn(async move {
        let path = format!("/v1/guests/{NAME}/test");
        west.post::<TestReport>(&path, &TestFailover::default())
            .await
    });
    while !asked.is_finished() {
        watched(play, &mut watch).await?;
    }
    let report = asked.await.map_err(|e| e.to_string())?;
    let report = report.map_err(|e| format!("{e}\n{}", play.stage.west.last_words()))?;
    let mut console = Console::of(report.console.as_ref())?;
    let first = loop {
        watched(play, &mut watch).await?;
        console.poll();
        match &console.first {
            Some(first) => break first.clone(),
            None if began.elapsed() < REVIVE => {}
            None => return Err(format!("the test has no heartbeat within {REVIVE:?}")),
        }
    };
    play.screen.say(&format!(
        "It runs there, from point {}, {} after the command.",
        report.point,
        millis(report.rto_ms as u64)
    ));
    play.screen
        .say(&format!("  at east: {}", watch.newest.line));
    play.screen.say(&format!("  at west: {}", first.line));
    play.screen.begin_live();
    let patience = 3 * play.settled.rpo.duration() + Duration::from_secs(10);
    let mut points = 0;
    while console.number() < first.number + BEATS || points < POINTS {
        let guest = watched(play, &mut watch).await?;
        console.poll();
        points = guest.saturating_sub(before);
        if began.elapsed() > patience + REVIVE {
            break;
        }
    }
    play.screen.end();
    play.screen
        .say("The test checks all of its memory and disks …");
    let checked = tokio::spawn(async move { console.full_check().await });
    while !checked.is_finished() {
        watched(play, &mut watch).await?;
    }
    let check = checked.await.map_err(|e| e.to_string())??;
    play.screen.say(&format!("  {check}"));
    points = play.look().await?.points_sealed.saturating_sub(before);
    let ran = began.elapsed();
    let path = format!("/v1/guests/{NAME}/test");
    let west = play.stage.west.client.clone();
    let ending = tokio::spawn(async move { west.delete::<TestEnded>(&path).await });
    while !ending.is_finished() {
        watched(play, &mut watch).await?;
    }
    let ended = ending.await.map_err(|e| e.to_string())?;
    let ended = ended.map_err(|e| format!("{e}\n{}", play.stage.west.last_words()))?;
    play.screen.say(&format!(
        "The test is thrown away: {} of memory, {} of what it wrote to its disks. {points} points were sealed meanwhile.",
        bytes(ended.ram_bytes),
        bytes(ended.overlay_bytes),
    ));
    play.screen
        .say("The guest at east checks all of its memory and disks …");
    let source_check = play.guest.console.full_check().await?;
    play.screen.say(&format!("  {source_check}"));
    Ok(Tested {
        left: left(play).await?,
        report,
        ended,
        first,
        source,
        check,
        source_check,
        points,
        missed: watch.missed,
        silence: watch.silence,
        ran,
    })
}

/// Looks at the source once; how many points it has sealed.
async fn watched(play: &mut Play, watch: &mut Watch) -> Result<u64, String> {
    let guest = play.look().await?;
    watch.see(&play.guest.console);
    if watch.newest.at.elapsed() > watch.silence {
        watch.silence = watch.newest.at.elapsed();
    }
    play.show(&guest, false);
    tokio::time::sleep(Duration::from_millis(10)).await;
    Ok(guest.points_sealed)
}

/// What is at west that was not there before the test.
async fn left(play: &Play) -> Result<Vec<String>, String> {
    let west = &play.stage.west;
    let mut left: Vec<String> = west
        .activations()
        .into_iter()
        .filter(|directory| directory.file_name().is_some_and(|name| name == "test"))
        .map(|directory| directory.display().to_string())
        .collect();
    let rams = std::fs::read_dir(west.ram())
        .into_iter()
        .flatten()
        .flatten();
    let tests = rams.filter(|e| e.file_name().to_string_lossy().ends_with("-test"));
    left.extend(tests.map(|e| e.path().display().to_string()));
    let standbys = west.view().await?.standbys;
    if standbys.iter().any(|s| s.test.is_some()) {
        left.push("a test in west's status".to_owned());
    }
    if standbys.iter().any(|s| s.active.is_some()) {
        left.push("a running guest at west".to_owned());
    }
    Ok(left)
}
