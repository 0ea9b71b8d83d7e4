//! `farhaven demo`: two sites, a link and a guest on this machine; a disaster,
//! a planned move or a test failover; and the proof, from the guest's own
//! mouth, that it went on.
//!
//! The sites are two daemons of this very program, so that killing one is a
//! real kill; the link is [`farhaven_wan::emulate`]; the guest is a real one:
//! hosted by the daemon over KVM, or a simulated one where there is no KVM, or
//! Debian in a QEMU of its own. [`settle`] makes sure of what was asked before
//! anything is started; [`stage`] starts the sites and ends them, whatever
//! happens; [`story`] is the plot; [`verify`] puts the figures together.
//! Nothing is shown that was not measured in this run.

mod closing;
mod console;
mod drill;
mod ending;
mod floor;
mod guest;
mod place;
mod qemu;
mod report;
mod screen;
mod settle;
mod stage;
mod story;
mod verify;

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use farhaven_policies::units::{ByteSize, Period};
use farhaven_wan::emulate::LinkShape;

pub use report::{Check, Report, TestFigures};

/// Both sites in one command.
#[derive(Debug, Clone, Args)]
pub struct Demo {
    /// What runs. Without it: kvm where /dev/kvm works, else sim.
    #[arg(long, value_enum)]
    pub guest: Option<GuestKind>,
    /// Move it with nothing lost, instead of killing its site.
    #[arg(long, conflicts_with = "test_failover")]
    pub planned: bool,
    /// Run it at the other site as a test, isolated, while protection goes on;
    /// then throw the test away. Nothing is killed.
    #[arg(long)]
    pub test_failover: bool,
    /// The link: rate, round trip, loss.
    #[arg(long, value_name = "SHAPE", default_value = "100mbit,80ms,0.1%")]
    pub link: LinkShape,
    /// The guest's memory [default: 256MiB; 512MiB for qemu].
    #[arg(long, value_name = "SIZE")]
    pub ram: Option<ByteSize>,
    /// What the guest does: idle, database, noise:<MB/s>; files too for sim and kvm.
    #[arg(
        long,
        visible_alias = "load",
        value_name = "NAME",
        default_value = "database"
    )]
    pub workload: String,
    /// The most that the disaster may cost [default: 3s; 10s for qemu].
    #[arg(long, value_name = "TIME")]
    pub rpo: Option<Period>,
    /// How long the guest is protected before it happens [default: 15s; 30s for qemu].
    #[arg(long, value_name = "TIME")]
    pub steady: Option<Period>,
    /// Where the QEMU guest's kernel, initrd and disk are kept; made there when missing.
    #[arg(long, value_name = "DIR")]
    pub image: Option<PathBuf>,
    /// Keep everything in this directory, a new or empty one, to look around after.
    #[arg(long, value_name = "DIR")]
    pub keep: Option<PathBuf>,
    /// Print one JSON object at the end, on stdout; the story goes to stderr.
    #[arg(long)]
    pub json: bool,
}

/// What runs in the demo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GuestKind {
    /// A guest over KVM inside of the daemon, that proves itself.
    Kvm,
    /// A simulated guest inside of the daemon, that proves itself.
    Sim,
    /// A Debian guest in QEMU (software emulation).
    Qemu,
}

impl GuestKind {
    /// As it is typed.
    fn word(self) -> &'static str {
        match self {
            GuestKind::Kvm => "kvm",
            GuestKind::Sim => "sim",
            GuestKind::Qemu => "qemu",
        }
    }
}

/// What happens after the guest was protected for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scenario {
    Disaster,
    Planned,
    Test,
}

impl Scenario {
    fn word(self) -> &'static str {
        match self {
            Scenario::Disaster => "disaster",
            Scenario::Planned => "planned",
            Scenario::Test => "test_failover",
        }
    }
}

/// Runs the demo.
///
/// # Errors
/// When something is missing or goes wrong, or the guest does not verify.
pub async fn run(demo: Demo) -> Result<(), String> {
    let report = story::tell(&demo).await?;
    let text = if demo.json {
        serde_json::to_string(&report).map_err(|e| e.to_string())?
    } else {
        closing::text(&report)
    };
    // Whether anybody reads on or not, the verdict is the exit status.
    let _ = writeln!(std::io::stdout(), "{text}");
    if let Some(directory) = &demo.keep {
        place::tour(directory);
    }
    if report.verified {
        Ok(())
    } else {
        Err(format!("the guest did not verify: {}", report.verdict))
    }
}
