//! `farhaven demo`: two sites, a link and a guest on this machine; a disaster
//! or a planned move; and the proof, from the guest's own mouth, that it went on.
//!
//! The sites are two daemons of this very program, so that killing one is a
//! real kill; the link is [`farhaven_wan::emulate`]; the guest is a real one.
//! Nothing is shown that was not measured in this run.

mod floor;
mod guest;
mod report;
mod stage;
mod story;
mod verify;

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use farhaven_policies::units::Period;
use farhaven_wan::emulate::LinkShape;

pub use report::Report;

/// Both sites in one command.
#[derive(Debug, Clone, Args)]
pub struct Demo {
    /// What runs: a Debian guest in QEMU (software emulation; no /dev/kvm needed).
    #[arg(long, value_enum, default_value_t = GuestKind::Qemu)]
    pub guest: GuestKind,
    /// Move it with nothing lost, instead of killing its site.
    #[arg(long)]
    pub planned: bool,
    /// The link: rate, round trip, loss.
    #[arg(long, value_name = "SHAPE", default_value = "100mbit,80ms,0.1%")]
    pub link: LinkShape,
    /// The most that the disaster may cost.
    #[arg(long, value_name = "TIME", default_value = "10s")]
    pub rpo: Period,
    /// How long the guest is protected before it happens.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub steady: Period,
    /// The guest's load: idle, database, or noise:<MB/s>.
    #[arg(long, default_value = "database")]
    pub load: String,
    /// Where the guest's kernel, initrd and disk are kept; made there when missing.
    #[arg(long, value_name = "DIR")]
    pub image: Option<PathBuf>,
    /// Keep everything in this directory to look around after.
    #[arg(long, value_name = "DIR")]
    pub keep: Option<PathBuf>,
    /// Print one JSON object at the end, on stdout; the story goes to stderr.
    #[arg(long)]
    pub json: bool,
}

/// What runs in the demo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GuestKind {
    /// A Debian guest in QEMU.
    Qemu,
}

/// Runs the demo.
///
/// # Errors
/// When something is missing or goes wrong, or the guest does not verify.
pub async fn run(demo: Demo) -> Result<(), String> {
    let report = story::tell(&demo).await?;
    if demo.json {
        let text = serde_json::to_string(&report).map_err(|e| e.to_string())?;
        println!("{text}");
    } else {
        report.print();
    }
    if report.verified {
        Ok(())
    } else {
        Err(format!("the guest did not verify: {}", report.verdict))
    }
}
