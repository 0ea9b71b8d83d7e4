//! What happens in the demo, from the first byte to the last check.

use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Demo;
use super::guest::{Console, Heartbeat, Machine, image};
use super::report::Report;
use super::stage::{Daemon, Foreign, Stage};
use crate::cli::show::{bytes, millis};
use crate::site::api::{AddGuest, Done, Failover, Protect};
use crate::site::records::GuestRecord;
use crate::site::view::{ConsolePaths, FailoverReport, MoveReport, Phase, SiteView, SourceView};

/// The guest's name.
pub(super) const NAME: &str = "demo";

/// Boot, fill memory, first heartbeat: software emulation is slow.
const BOOT: Duration = Duration::from_secs(180);

/// Runs the whole demo; everything is ended when it returns.
pub(super) async fn tell(demo: &Demo) -> Result<Report, String> {
    tokio::select! {
        told = told(demo) => told,
        _ = tokio::signal::ctrl_c() => Err("interrupted; everything was ended".to_owned()),
    }
}

async fn told(demo: &Demo) -> Result<Report, String> {
    say("Preparing a Debian guest (kernel, busybox; made once) …");
    let wanted = demo.image.clone();
    let image = tokio::task::spawn_blocking(move || image(wanted.as_deref()))
        .await
        .map_err(|e| e.to_string())??;
    let temporary;
    let directory = match &demo.keep {
        Some(directory) => {
            std::fs::create_dir_all(directory)
                .map_err(|e| format!("{}: {e}", directory.display()))?;
            std::path::absolute(directory).map_err(|e| e.to_string())?
        }
        None => {
            temporary = tempfile::Builder::new()
                .prefix("farhaven-demo-")
                .tempdir()
                .map_err(|e| format!("no temporary directory: {e}"))?;
            temporary.path().to_owned()
        }
    };

    say(&format!("Two sites, east and west, over {} …", demo.link));
    let mut stage = Stage::set(&directory, demo.link).await?;
    say("A guest boots at east (512 MiB, software emulation) …");
    let ram = RamFile::new();
    let source = directory.join("guest");
    std::fs::create_dir_all(&source).map_err(|e| e.to_string())?;
    let mut machine = Machine::start(&image, &source, &ram.0, &demo.load)?;
    machine
        .console
        .wait("heartbeat", BOOT, |c| {
            c.last.clone().filter(|b| b.number >= 20)
        })
        .await?;

    let first = first_copy(demo, &mut stage, &mut machine).await?;
    let steady = protected(demo, &mut stage, &mut machine).await?;
    let after = if demo.planned {
        planned(&mut stage, &mut machine).await?
    } else {
        disaster(&mut stage, &mut machine).await?
    };
    super::verify::verify(demo, stage, machine, first, steady, after).await
}

/// The first copy.
pub(super) struct First {
    pub(super) took: Duration,
    pub(super) wan_bytes: u64,
}

async fn first_copy(
    demo: &Demo,
    stage: &mut Stage,
    machine: &mut Machine,
) -> Result<First, String> {
    let east = stage.east.client.clone();
    let body = AddGuest {
        name: NAME.to_owned(),
        qmp: Some(machine.qmp.clone()),
        start: None,
    };
    let _: GuestRecord = east
        .post("/v1/guests", &body)
        .await
        .map_err(|e| e.to_string())?;
    let before = sent(&stage.east).await?;
    let began = Instant::now();
    let body = Protect {
        to: "west".to_owned(),
        rpo: Some(demo.rpo),
    };
    let _: Done = east
        .post(&format!("/v1/guests/{NAME}/protect"), &body)
        .await
        .map_err(|e| e.to_string())?;
    let bar = ProgressBar::new(1);
    bar.set_draw_target(ProgressDrawTarget::stderr());
    let style = "First copy  {bar:40} {percent:>3} %  {msg}";
    bar.set_style(ProgressStyle::with_template(style).map_err(|e| e.to_string())?);
    loop {
        let guest = source_view(&stage.east).await?;
        machine.console.poll();
        stage.east.weigh();
        stage.west.weigh();
        if machine.ended() {
            return Err("the guest ended during the first copy".to_owned());
        }
        if let Some((done, total)) = guest.progress {
            bar.set_length(total);
            bar.set_position(done);
        }
        bar.set_message(format!(
            "{} of guest data, {} sent, {}/s",
            bytes(guest.guest_bytes),
            bytes(guest.wan_bytes),
            bytes(guest.throughput_bytes_per_s)
        ));
        if guest.points_sealed > 0 {
            break;
        }
        if !guest.trouble.is_empty() && began.elapsed() > Duration::from_secs(600) {
            return Err(guest.trouble);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let took = began.elapsed();
    bar.finish_and_clear();
    let wan_bytes = sent(&stage.east).await? - before;
    say(&format!(
        "First copy done in {:.1} s: {} on the wire. Point 1 is sealed at west.",
        took.as_secs_f64(),
        bytes(wan_bytes)
    ));
    Ok(First { took, wan_bytes })
}

/// What was seen while the guest was protected.
pub(super) struct Steady {
    pub(super) wan_bytes_per_s: f64,
}

async fn protected(
    demo: &Demo,
    stage: &mut Stage,
    machine: &mut Machine,
) -> Result<Steady, String> {
    let before = sent(&stage.east).await?;
    let began = Instant::now();
    let mut shown = 1;
    while began.elapsed() < demo.steady.duration() {
        let guest = source_view(&stage.east).await?;
        machine.console.poll();
        stage.east.weigh();
        stage.west.weigh();
        if guest.newest_point > shown {
            shown = guest.newest_point;
            say(&format!(
                "Point {shown} sealed: pause {:.1} ms, sealed {} after the cut; RPO {}; {}",
                guest.last_pause_ms.unwrap_or_default(),
                millis(guest.last_seal_ms.unwrap_or_default()),
                millis(guest.rpo_ms.unwrap_or_default()),
                machine.console.last.as_ref().map_or("", |b| &b.line),
            ));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let wan_bytes_per_s =
        (sent(&stage.east).await? - before) as f64 / began.elapsed().as_secs_f64();
    Ok(Steady { wan_bytes_per_s })
}

/// The guest, on the other side.
pub(super) struct After {
    pub(super) console: Console,
    pub(super) last: Heartbeat,
    pub(super) process: Foreign,
    pub(super) rpo_ms: f64,
    pub(super) rto_ms: f64,
    pub(super) hand_over_ms: Option<f64>,
}

async fn disaster(stage: &mut Stage, machine: &mut Machine) -> Result<After, String> {
    machine.console.poll();
    say("DISASTER: east loses power. Its daemon and its guest are killed.");
    stage.east.kill();
    machine.kill();
    machine.console.poll();
    let last = machine
        .console
        .last
        .clone()
        .ok_or("the guest never had a heartbeat")?;
    say(&format!("  last heartbeat there: {}", last.line));
    while peer_is_alive(&stage.west).await? {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    say("West hears nothing of east any more. Failover is declared there …");
    let body = Failover {
        point: None,
        force: false,
    };
    let report: FailoverReport = stage
        .west
        .client
        .post(&format!("/v1/guests/{NAME}/failover"), &body)
        .await
        .map_err(|e| format!("{e}\n{}", stage.west.last_words()))?;
    let process = Foreign(report.pid.ok_or("west tells no process of it")?);
    let mut console = console_at(report.console)?;
    let first = console
        .wait("heartbeat at west", Duration::from_secs(20), |c| {
            c.first.clone()
        })
        .await?;
    say(&format!("  {NAME} runs at west: {}", first.line));
    Ok(After {
        console,
        last,
        process,
        rpo_ms: report.rpo_ms as f64,
        rto_ms: report.rto_ms,
        hand_over_ms: None,
    })
}

async fn planned(stage: &mut Stage, machine: &mut Machine) -> Result<After, String> {
    say("MAINTENANCE: the guest is moved to west, with nothing lost …");
    let east = stage.east.client.clone();
    let moving = tokio::spawn(async move {
        east.post::<MoveReport>(&format!("/v1/guests/{NAME}/move"), &Done {})
            .await
    });
    // The heartbeat goes on here until the last cut, and there after it.
    let mut there: Option<Console> = None;
    let report = loop {
        machine.console.poll();
        if there.is_none() {
            there = moved_console(&stage.west);
        }
        if let Some(console) = &mut there {
            console.poll();
        }
        if moving.is_finished() {
            break moving.await.map_err(|e| e.to_string())?;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    };
    let report = report.map_err(|e| format!("{e}\n{}", stage.west.last_words()))?;
    machine.console.poll();
    let last = machine
        .console
        .last
        .clone()
        .ok_or("the guest never had a heartbeat")?;
    let view: SiteView = stage
        .west
        .client
        .get("/v1/status")
        .await
        .map_err(|e| e.to_string())?;
    let active = view
        .standbys
        .into_iter()
        .find_map(|s| s.active)
        .ok_or("west does not run it")?;
    let process = Foreign(active.pid.ok_or("west tells no process of it")?);
    let mut console = match there {
        Some(console) => console,
        None => console_at(active.console)?,
    };
    let first = console
        .wait("heartbeat at west", Duration::from_secs(20), |c| {
            c.first.clone()
        })
        .await?;
    say(&format!("  last heartbeat at east:  {}", last.line));
    say(&format!("  first heartbeat at west: {}", first.line));
    Ok(After {
        console,
        last,
        process,
        rpo_ms: 0.0,
        rto_ms: report.total_ms,
        hand_over_ms: Some(report.blackout_ms),
    })
}

/// The guest's console at the peer.
fn console_at(paths: Option<ConsolePaths>) -> Result<Console, String> {
    let paths = paths.ok_or("west tells no console of it")?;
    Ok(Console::open(&paths.socket, &paths.log))
}

/// The same, while it is being made.
fn moved_console(west: &Daemon) -> Option<Console> {
    let run = west.directory.join("run");
    let directories = std::fs::read_dir(run).ok()?.flatten();
    let mut consoles = directories.filter_map(|e| ConsolePaths::beside(&e.path()));
    console_at(consoles.next()).ok()
}

async fn sent(east: &Daemon) -> Result<u64, String> {
    let view: SiteView = east
        .client
        .get("/v1/status")
        .await
        .map_err(|e| e.to_string())?;
    Ok(view.peers.iter().map(|p| p.sent_bytes).sum())
}

async fn peer_is_alive(west: &Daemon) -> Result<bool, String> {
    let view: SiteView = west
        .client
        .get("/v1/status")
        .await
        .map_err(|e| e.to_string())?;
    Ok(view.peers.iter().any(|p| p.connected))
}

async fn source_view(east: &Daemon) -> Result<SourceView, String> {
    let view: SiteView = east
        .client
        .get("/v1/status")
        .await
        .map_err(|e| e.to_string())?;
    let guest = view
        .guests
        .into_iter()
        .find(|g| g.name == NAME)
        .ok_or("east does not know the guest")?;
    if matches!(guest.phase, Phase::Lost | Phase::Fenced) {
        return Err(format!("{}\n{}", guest.trouble, east.last_words()));
    }
    Ok(guest)
}

/// The guest's RAM, in a file that goes with the demo.
struct RamFile(std::path::PathBuf);

impl RamFile {
    fn new() -> Self {
        let directory = Path::new("/dev/shm");
        let name = format!("farhaven-demo-{}.ram", std::process::id());
        if directory.is_dir() {
            Self(directory.join(name))
        } else {
            Self(std::env::temp_dir().join(name))
        }
    }
}

impl Drop for RamFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

pub(super) fn say(line: &str) {
    eprintln!("{line}");
}
