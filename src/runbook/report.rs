//! The report of a run: what was done, by whom, how long it took, what was
//! achieved, and what is left. Data for programs; [`html`] makes the page of it
//! that one hands to an auditor.

use farhaven_policies::runbook::plan::Plan;
use farhaven_policies::runbook::run::{Outcome, StepView};
use serde::{Deserialize, Serialize};

pub mod html;
mod timeline;

/// All that is told of a run; times in milliseconds since 1970.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// The run's id.
    pub run: String,
    /// The site that conducted it.
    pub site: String,
    /// Farhaven's version there.
    pub version: String,
    /// What was planned.
    pub plan: Plan,
    /// Who started it.
    pub by: String,
    /// When.
    pub started: u64,
    /// When it ended; none while it goes on.
    pub ended: Option<u64>,
    /// How.
    pub outcome: Option<Outcome>,
    /// How it stands, in a few words.
    pub standing: String,
    /// The source was taken to be lost though it answered.
    pub forced: bool,
    /// The largest loss of any guest, in milliseconds.
    pub rpo_ms: Option<u64>,
    /// From the start until the last guest was healthy, or else ran.
    pub rto_ms: Option<u64>,
    /// Of that, waiting for people's decisions.
    pub people_ms: u64,
    /// By guest.
    pub guests: Vec<GuestReport>,
    /// Step by step.
    pub steps: Vec<StepView>,
    /// What checks saw.
    pub checks: Vec<CheckReport>,
    /// Who did what, line by line.
    pub events: Vec<EventReport>,
    /// The audit record's last checksum: of all of it.
    pub record: String,
}

/// What became of a guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GuestReport {
    /// Its name.
    pub guest: String,
    /// Its group in the runbook.
    pub group: String,
    /// The point used.
    pub point: Option<u64>,
    /// It holds disks alone: the guest booted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disks_only: bool,
    /// When that was cut.
    pub cut_at: Option<u64>,
    /// What was lost.
    pub rpo_ms: Option<u64>,
    /// What may be lost, by its policy.
    pub rpo_target_ms: Option<u64>,
    /// The term that it runs under.
    pub term: Option<u64>,
    /// The source said that its guest is stopped.
    pub source_stopped: bool,
    /// Bytes sent while it stood still.
    pub final_bytes: Option<u64>,
    /// Whether its agent had frozen its filesystems for its last cut, if a step asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiesced: Option<bool>,
    /// From its stop at the source until it ran here.
    pub blackout_ms: Option<u64>,
    /// When it ran here.
    pub started_at: Option<u64>,
    /// When it was found to be healthy.
    pub healthy_at: Option<u64>,
    /// By what.
    pub healthy_by: String,
    /// When it was committed.
    #[serde(default)]
    pub committed_at: Option<u64>,
    /// Handed back after it had run here for so long; what it wrote is lost.
    #[serde(default)]
    pub lost_ms: Option<u64>,
    /// Bytes sent until it was protected the other way round.
    #[serde(default)]
    pub reprotected_bytes: Option<u64>,
    /// When it showed what is in `screen` or `console`.
    pub pictured_at: Option<u64>,
    /// Its screen, a PNG in base64.
    pub screen: Option<String>,
    /// The last lines of its console.
    pub console: Option<String>,
    /// What the cleanup removed.
    pub removed: Vec<String>,
    /// What was looked at afterwards, and is not there.
    pub gone: Vec<String>,
}

/// What a check saw.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CheckReport {
    /// When.
    pub at: u64,
    /// In which step.
    pub step: String,
    /// Of which guest.
    pub guest: String,
    /// What was looked at.
    pub what: String,
    /// Was it as it should be?
    pub good: bool,
    /// What was seen.
    pub seen: String,
}

/// A line of the audit record.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct EventReport {
    /// Its number.
    pub number: u64,
    /// When.
    pub at: u64,
    /// Who, where a person did it.
    pub by: Option<String>,
    /// Which step.
    pub step: Option<String>,
    /// What, for people.
    pub what: String,
    /// An approval (`true`) or a refusal.
    #[serde(default)]
    pub approval: Option<bool>,
}

impl Report {
    /// For people, at a terminal.
    pub fn text(&self) -> String {
        use std::fmt::Write as _;
        let mut text = String::new();
        let unknown = || "unknown".to_owned();
        let _ = writeln!(
            text,
            "{}: '{}' in {} mode, started by {} at {}",
            self.run,
            self.plan.runbook,
            self.plan.mode,
            self.by,
            html::at(self.started)
        );
        let _ = writeln!(text, "  {}", self.standing);
        let _ = writeln!(
            text,
            "  RPO {}, RTO {} (of that, {} for decisions)",
            self.rpo_ms.map_or_else(unknown, html::span),
            self.rto_ms.map_or_else(unknown, html::span),
            html::span(self.people_ms)
        );
        for guest in &self.guests {
            let point = guest.point.map_or_else(unknown, |point| point.to_string());
            let target = guest.rpo_target_ms.map_or(String::new(), |target| {
                format!(" (target {})", html::span(target))
            });
            let _ = writeln!(
                text,
                "  {}: point {point}, lost {}{target}; {}",
                guest.guest,
                guest.rpo_ms.map_or_else(unknown, html::span),
                match guest.healthy_at.or(guest.started_at) {
                    Some(at) =>
                        format!("ran after {}", html::span(at.saturating_sub(self.started))),
                    None => "did not run here".to_owned(),
                }
            );
            for gone in &guest.gone {
                let _ = writeln!(text, "    {gone}");
            }
        }
        for event in &self.events {
            let by = event
                .by
                .as_ref()
                .map_or(String::new(), |by| format!(" {by}"));
            let step = event
                .step
                .as_ref()
                .map_or(String::new(), |step| format!(" {step}:"));
            let _ = writeln!(text, "  {}{by}{step} {}", html::at(event.at), event.what);
        }
        text
    }
}
