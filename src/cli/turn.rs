//! `farhaven commit`, `rollback`, `reprotect` and `evidence`: after a move or a failover.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use farhaven_policies::units::Period;

use super::guests::waiting;
use super::{Json, Outcome, escaped, group, guest_path, print_json, told};
use crate::client::Client;
use crate::site::api::{Commit, DiscardEvidence, ExportEvidence, Reprotect};
use crate::site::groups::GroupRollBack;
use crate::site::turn::view::{
    CommitReport, Discarded, EvidenceManifest, EvidenceView, ReprotectReport, RollBack,
    RollbackReport,
};
use crate::site::view::bytes;

/// A move or a failover stays.
#[derive(Debug, Args)]
pub(super) struct CommitArgs {
    /// The guest or the group.
    name: String,
    /// Have the site that it came from end its stopped copy at once. A reprotection
    /// sends all of its memory then.
    #[arg(long)]
    discard_source: bool,
    #[command(flatten)]
    json: Json,
}

/// Where to go back to.
#[derive(Debug, Args)]
pub(super) struct RollbackArgs {
    /// The guest or the group.
    name: String,
    /// Stay here, and go on from this point; of a group, from that cut's.
    #[arg(long, value_name = "NUMBER")]
    point: Option<u64>,
    /// Of a group, with --point: start guests without waiting for those before to be healthy.
    #[arg(long, requires = "point")]
    no_checks: bool,
    /// What was written here since a failover is lost, and may be.
    #[arg(long)]
    accept_loss: bool,
    #[command(flatten)]
    json: Json,
}

/// How it is protected.
#[derive(Debug, Args)]
pub(super) struct ReprotectArgs {
    /// The guest or the group.
    name: String,
    /// The most that a disaster may cost, like 10s; by the policy of the group or the
    /// site if not given.
    #[arg(long, value_name = "TIME")]
    rpo: Option<Period>,
    #[command(flatten)]
    json: Json,
}

#[derive(Debug, Subcommand)]
pub(super) enum EvidenceVerb {
    /// Copies of guests that are kept here, stopped for good.
    List(Json),
    /// Write them as plain files: definition, memory, disks, and a manifest with sums.
    Export {
        /// The guest.
        name: String,
        /// An empty place for them, on the daemon's host.
        directory: PathBuf,
        /// Only this copy, as listed.
        #[arg(long, value_name = "COPY")]
        copy: Option<String>,
        #[command(flatten)]
        json: Json,
    },
    /// End them, and remove what this site keeps of them.
    Discard {
        /// The guest.
        name: String,
        /// Only this copy, as listed.
        #[arg(long, value_name = "COPY")]
        copy: Option<String>,
        /// Even one that a rollback would return to.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        json: Json,
    },
}

pub(super) async fn commit(client: &Client, args: CommitArgs) -> Outcome {
    let name = &args.name;
    if group::is_group(client, name).await {
        return group::all::commit(client, name, args.discard_source, args.json.json).await;
    }
    let body = Commit {
        discard: args.discard_source,
    };
    let path = guest_path(name, "/commit");
    let report: CommitReport = client.post(&path, &body).await.map_err(told)?;
    if args.json.json {
        return print_json(&report);
    }
    say!("'{name}' stays here; there is no rollback any more.");
    if !report.note.is_empty() {
        say!("{}.", report.note);
    }
    say!("Next, to protect it again: farhaven reprotect {name}");
    Ok(())
}

pub(super) async fn rollback(client: &Client, args: RollbackArgs) -> Outcome {
    let name = &args.name;
    if group::is_group(client, name).await {
        let to = GroupRollBack {
            cut: args.point,
            accept_loss: args.accept_loss,
            no_checks: args.no_checks,
        };
        return group::all::rollback(client, name, to, args.json.json).await;
    }
    let body = RollBack {
        point: args.point,
        accept_loss: args.accept_loss,
    };
    let path = guest_path(name, "/rollback");
    let rolling = client.post(&path, &body);
    let report: RollbackReport = waiting(format!("rolling '{name}' back"), rolling)
        .await
        .map_err(told)?;
    if args.json.json {
        return print_json(&report);
    }
    if !report.note.is_empty() {
        say!(
            "'{name}' is at '{}', under term {}: {}.",
            report.at,
            report.term,
            report.note
        );
        return Ok(());
    }
    let from = match report.point {
        Some(point) => format!("from point {point}"),
        None => "as it was there".to_owned(),
    };
    say!(
        "'{name}' runs at '{}' {from}, under term {}. It ran nowhere for {:.0} ms; what it did in the {:.1} s before is lost.",
        report.at,
        report.term,
        report.blackout_ms,
        report.lost_ms as f64 / 1e3
    );
    Ok(())
}

pub(super) async fn reprotect(client: &Client, args: ReprotectArgs) -> Outcome {
    let name = &args.name;
    if group::is_group(client, name).await {
        return group::all::reprotect(client, name, args.rpo, args.json.json).await;
    }
    let body = Reprotect { rpo: args.rpo };
    let path = guest_path(name, "/reprotect");
    let turning = client.post(&path, &body);
    let report: ReprotectReport = waiting(format!("protecting '{name}' the other way"), turning)
        .await
        .map_err(told)?;
    if args.json.json {
        return print_json(&report);
    }
    say!(
        "'{name}' is protected to '{}': {} differed, {} were sent, in {:.1} s.",
        report.to,
        bytes(report.changed_bytes),
        bytes(report.sent_bytes),
        report.took_ms as f64 / 1e3
    );
    if !report.note.is_empty() {
        say!("{}.", report.note);
    }
    say!("To bring it home with nothing lost: farhaven move {name}");
    Ok(())
}

pub(super) async fn evidence(client: &Client, verb: EvidenceVerb) -> Outcome {
    match verb {
        EvidenceVerb::List(json) => {
            let listed: Vec<EvidenceView> = client.get("/v1/evidence").await.map_err(told)?;
            if json.json {
                return print_json(&listed);
            }
            if listed.is_empty() {
                say!("No copy of any guest is kept here.");
            }
            for one in &listed {
                let memory = match one.alive {
                    true => "memory and disks",
                    false => "disks only",
                };
                let needed = match one.needed {
                    true => "; a rollback returns to it",
                    false => "",
                };
                say!(
                    "{}  {}  {memory}: {}{needed}",
                    one.guest,
                    one.copy,
                    one.what
                );
                say!("    {}, {}", one.directory.display(), bytes(one.bytes));
            }
        }
        EvidenceVerb::Export {
            name,
            directory,
            copy,
            json,
        } => {
            let directory = std::path::absolute(&directory).map_err(told)?;
            let body = ExportEvidence { directory, copy };
            let path = format!("/v1/evidence/{}/export", escaped(&name));
            let exporting = client.post(&path, &body);
            let written: Vec<EvidenceManifest> =
                waiting(format!("exporting what is kept of '{name}'"), exporting)
                    .await
                    .map_err(told)?;
            if json.json {
                return print_json(&written);
            }
            for one in &written {
                let total = one.files.iter().map(|file| file.bytes).sum();
                say!(
                    "{}-{}: {} files, {}; sums in manifest.json",
                    one.guest,
                    one.copy,
                    one.files.len(),
                    bytes(total)
                );
                for missing in &one.missing {
                    say!("    missing: {missing}");
                }
            }
        }
        EvidenceVerb::Discard {
            name,
            copy,
            force,
            json,
        } => {
            let body = DiscardEvidence { copy, force };
            let path = format!("/v1/evidence/{}/discard", escaped(&name));
            let gone: Discarded = client.post(&path, &body).await.map_err(told)?;
            if json.json {
                return print_json(&gone);
            }
            for removed in &gone.removed {
                say!("Gone: {removed}");
            }
            for left in &gone.left {
                say!("Not this site's to remove: {}", left.display());
            }
        }
    }
    Ok(())
}
