//! The plot of a demo: two sites, a guest, its first copy, a while of
//! protection; then what [`ending`](super::ending) or [`drill`](super::drill) tells.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::ending::Ending;
use super::guest::Guest;
use super::place::Place;
use super::report::Report;
use super::screen::Screen;
use super::settle::Settled;
use super::stage::{Daemon, Stage};
use super::{Demo, GuestKind, Scenario, drill, ending, qemu, verify};
use crate::cli::show::{bytes, millis};
use crate::site::api::{Done, Protect};
use crate::site::view::{Phase, SourceView};
use tokio::signal::unix::{SignalKind, signal};

/// The guest's name.
pub(super) const NAME: &str = "demo";

/// A first copy that is hindered for so long does not end.
const HINDERED: Duration = Duration::from_secs(600);

/// How often the sites are asked.
const LOOK: Duration = Duration::from_millis(50);

/// Runs the whole demo; everything is ended when it returns.
pub(super) async fn tell(demo: &Demo) -> Result<Report, String> {
    let began = Instant::now();
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| e.to_string())?;
    let mut hang_up = signal(SignalKind::hangup()).map_err(|e| e.to_string())?;
    tokio::select! {
        told = told(demo, began) => told,
        _ = tokio::signal::ctrl_c() => Err("interrupted; everything was ended".to_owned()),
        _ = terminate.recv() => Err("terminated; everything was ended".to_owned()),
        // Its terminal was closed: nothing that it started may stay behind.
        _ = hang_up.recv() => Err("hung up; everything was ended".to_owned()),
    }
}

async fn told(demo: &Demo, began: Instant) -> Result<Report, String> {
    let settled = Settled::of(demo)?;
    let screen = Screen::new();
    if let Some(note) = &settled.note {
        screen.say(note);
    }
    let place = Place::make(demo.keep.as_deref())?;
    let image = image(&settled, demo, &screen).await?;
    screen.say(&format!(
        "Two sites, east and west, over {} …",
        settled.link
    ));
    let stage = Stage::set(place.path(), settled.link).await?;
    let guest = Guest::start(&settled, &stage, place.path(), image.as_deref(), &screen).await?;
    // Dropped in this order: guest, daemons, files.
    let mut play = Play {
        guest,
        stage,
        settled,
        screen,
    };
    let first = first_copy(&mut play).await?;
    let steady = protected(&mut play).await?;
    let ending = match play.settled.scenario {
        Scenario::Disaster => Ending::Runs(ending::disaster(&mut play).await?),
        Scenario::Planned => Ending::Runs(ending::planned(&mut play).await?),
        Scenario::Test => Ending::Tested(drill::test(&mut play).await?),
    };
    verify::verify(play, began, first, steady, ending).await
}

/// Kernel, initrd and disk of a QEMU guest.
async fn image(settled: &Settled, demo: &Demo, screen: &Screen) -> Result<Option<PathBuf>, String> {
    if settled.kind != GuestKind::Qemu {
        return Ok(None);
    }
    screen.say("Preparing a Debian guest (kernel, busybox; made once) …");
    let wanted = demo.image.clone();
    tokio::task::spawn_blocking(move || qemu::image(wanted.as_deref()).map(Some))
        .await
        .map_err(|e| e.to_string())?
}

/// Everything on the stage.
pub(super) struct Play {
    pub(super) guest: Guest,
    pub(super) stage: Stage,
    pub(super) settled: Settled,
    pub(super) screen: Screen,
}

impl Play {
    /// Looks at all of it once.
    pub(super) async fn look(&mut self) -> Result<SourceView, String> {
        let view = source_view(&self.stage.east).await?;
        self.guest.console.poll();
        self.stage.east.weigh();
        self.stage.west.weigh();
        if self.guest.ended() {
            return Err("the guest ended by itself".to_owned());
        }
        Ok(view)
    }

    /// Shows how protection stands.
    pub(super) fn show(&mut self, guest: &SourceView, news: bool) {
        let mut words = format!(
            "RPO {} of {}, point {}, pause {:.1} ms, sealed in {}",
            guest.rpo_ms.map_or("-".to_owned(), millis),
            self.settled.rpo,
            guest.newest_point,
            guest.last_pause_ms.unwrap_or_default(),
            millis(guest.last_seal_ms.unwrap_or_default()),
        );
        if let Some(ratio) = guest.ratio {
            words.push_str(&format!(", {ratio:.1}:1"));
        }
        words.push_str(&format!(", {}/s", bytes(guest.throughput_bytes_per_s)));
        if let Some(beat) = &self.guest.console.last {
            let health = if beat.is_sound() { "ok" } else { "BAD" };
            words.push_str(&format!(", heartbeat {} {health}", beat.number));
        }
        self.screen.live(words, news);
    }
}

/// The first copy.
pub(super) struct First {
    pub(super) took: Duration,
    pub(super) wan_bytes: u64,
}

async fn first_copy(play: &mut Play) -> Result<First, String> {
    let before = sent(&play.stage.east).await?;
    let began = Instant::now();
    let body = Protect {
        to: "west".to_owned(),
        rpo: Some(play.settled.rpo),
        seeded: false,
    };
    let path = format!("/v1/guests/{NAME}/protect");
    let asked = play.stage.east.client.post::<Done>(&path, &body);
    asked.await.map_err(|e| e.to_string())?;
    play.screen.begin_copy();
    loop {
        let guest = play.look().await?;
        let words = format!(
            "{} of guest data, {} sent, {}/s",
            bytes(guest.guest_bytes),
            bytes(guest.wan_bytes),
            bytes(guest.throughput_bytes_per_s)
        );
        play.screen.copy(guest.progress, words);
        if guest.points_sealed > 0 {
            break;
        }
        if !guest.trouble.is_empty() && began.elapsed() > HINDERED {
            return Err(guest.trouble);
        }
        tokio::time::sleep(LOOK).await;
    }
    let took = began.elapsed();
    play.screen.end();
    let wan_bytes = sent(&play.stage.east).await? - before;
    play.screen.say(&format!(
        "First copy done in {:.1} s, {} on the wire. Point 1 is sealed at west.",
        took.as_secs_f64(),
        bytes(wan_bytes)
    ));
    Ok(First { took, wan_bytes })
}

/// What was seen while the guest was protected.
pub(super) struct Steady {
    pub(super) wan_bytes_per_s: f64,
    /// The oldest that the newest sealed point ever was.
    pub(super) rpo_ms_max: u64,
    /// The daemons' word on bytes of guest data over bytes of batches.
    pub(super) ratio: Option<f64>,
}

async fn protected(play: &mut Play) -> Result<Steady, String> {
    let before = sent(&play.stage.east).await?;
    let began = Instant::now();
    let mut steady = Steady {
        wan_bytes_per_s: 0.0,
        rpo_ms_max: 0,
        ratio: None,
    };
    let mut shown = 0;
    let length = play.settled.steady.duration();
    play.screen.say(&format!(
        "Protected for {}: a point every few seconds, RPO {} …",
        play.settled.steady, play.settled.rpo
    ));
    play.screen.begin_live();
    while began.elapsed() < length {
        let guest = play.look().await?;
        steady.rpo_ms_max = steady.rpo_ms_max.max(guest.rpo_ms.unwrap_or_default());
        steady.ratio = guest.ratio;
        let news = guest.newest_point > shown;
        shown = guest.newest_point;
        play.show(&guest, news);
        tokio::time::sleep(LOOK).await;
    }
    play.screen.end();
    let wan = sent(&play.stage.east).await? - before;
    steady.wan_bytes_per_s = wan as f64 / began.elapsed().as_secs_f64();
    Ok(steady)
}

/// UDP bytes that a site has sent.
async fn sent(site: &Daemon) -> Result<u64, String> {
    Ok(site.view().await?.peers.iter().map(|p| p.sent_bytes).sum())
}

/// The guest, as its own site sees it.
pub(super) async fn source_view(east: &Daemon) -> Result<SourceView, String> {
    let guests = east.view().await?.guests;
    let guest = guests.into_iter().find(|g| g.name == NAME);
    let guest = guest.ok_or("east does not know the guest")?;
    if matches!(guest.phase, Phase::Lost | Phase::Fenced) {
        return Err(format!("{}\n{}", guest.trouble, east.last_words()));
    }
    Ok(guest)
}
