//! `farhaven guest` and what is done to guests.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use farhaven_policies::units::{ByteSize, Period};
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};

use super::{EXIT_TOO_LONG, Failure, Json, Outcome, guest_path, print_json, show, told};
use crate::client::{Client, ClientError};
use crate::guest::qemu::check::{Finding, Severity};
use crate::site::api::{AddGuest, Done, Failover, Move, Protect, StartGuest, TakeBack, Unprotect};
use crate::site::kept::PointChoice;
use crate::site::records::GuestRecord;
use crate::site::view::{FailoverReport, MoveOutlook, MoveReport, Phase, SourceView};

#[derive(Debug, Subcommand)]
pub(super) enum GuestVerb {
    /// Make a running QEMU known.
    Add {
        /// How it shall be called.
        name: String,
        /// QEMU's control socket, one that nobody else uses.
        #[arg(long, value_name = "PATH")]
        qmp: PathBuf,
        #[command(flatten)]
        json: Json,
    },
    /// Start a guest inside of the daemon that proves itself: for trying links,
    /// policies and runbooks without a hypervisor.
    Start {
        /// How it shall be called.
        name: String,
        /// kvm: real code on /dev/kvm. sim: the same discipline by a program, on any host.
        #[arg(long, value_name = "KIND")]
        kind: String,
        /// Its memory.
        #[arg(long, value_name = "SIZE", default_value = "256MiB")]
        ram: ByteSize,
        /// Its disk.
        #[arg(long, value_name = "SIZE", default_value = "64MiB")]
        disk: ByteSize,
        /// Its virtual CPUs.
        #[arg(long, value_name = "NUMBER", default_value_t = 1)]
        vcpus: u32,
        /// What it does: database, idle, files or noise:N (N MB/s that do not compress).
        #[arg(long, value_name = "NAME", default_value = "database")]
        workload: String,
        /// Its content and its work are made from this number.
        #[arg(long, value_name = "NUMBER", default_value_t = 0)]
        seed: u64,
        #[command(flatten)]
        json: Json,
    },
    /// End a guest that lives inside of the daemon.
    End {
        /// The guest.
        name: String,
    },
    /// What would stop its protection, or its run at the peer, and how to mend it.
    Check {
        /// The guest.
        name: String,
        /// The paired site that is asked; not needed when there is one only.
        #[arg(long, value_name = "SITE")]
        to: Option<String>,
        #[command(flatten)]
        json: Json,
    },
    /// List guests.
    List(Json),
    /// Its definition: how it would be launched at the peer.
    Show {
        /// The guest.
        name: String,
        #[command(flatten)]
        json: Json,
    },
    /// Forget a guest that is not protected; it runs on.
    Remove {
        /// The guest.
        name: String,
    },
}

pub(super) async fn guest(client: &Client, verb: GuestVerb) -> Outcome {
    match verb {
        GuestVerb::Add { name, qmp, json } => {
            let qmp = std::path::absolute(&qmp).map_err(told)?;
            let body = AddGuest {
                name: name.clone(),
                qmp: Some(qmp),
                start: None,
            };
            let record: GuestRecord = client.post("/v1/guests", &body).await.map_err(told)?;
            if json.json {
                return print_json(&record);
            }
            show::definition(&record);
            say!("\nNext: farhaven guest check {name}, then farhaven protect {name} --to SITE");
        }
        GuestVerb::Start {
            name,
            kind,
            ram,
            disk,
            vcpus,
            workload,
            seed,
            json,
        } => {
            let start = StartGuest {
                kind,
                ram,
                disk,
                vcpus,
                workload,
                seed,
            };
            let body = AddGuest {
                name: name.clone(),
                qmp: None,
                start: Some(start),
            };
            let record: GuestRecord = client.post("/v1/guests", &body).await.map_err(told)?;
            if json.json {
                return print_json(&record);
            }
            show::definition(&record);
            say!(
                "\nNext: farhaven protect {name} --to SITE; in the end: farhaven guest end {name}"
            );
        }
        GuestVerb::End { name } => {
            let _: Done = client
                .post(&guest_path(&name, "/end"), &Done {})
                .await
                .map_err(told)?;
            say!("'{name}' has ended.");
        }
        GuestVerb::Check { name, to, json } => {
            let query = to
                .map(|to| format!("?to={}", super::escaped(&to)))
                .unwrap_or_default();
            let findings: Vec<Finding> = client
                .get(&guest_path(&name, &format!("/check{query}")))
                .await
                .map_err(told)?;
            if json.json {
                print_json(&findings)?;
            } else {
                show::findings(&name, &findings);
            }
            let blocks = findings
                .iter()
                .filter(|f| f.severity == Severity::Blocks)
                .count();
            if blocks > 0 {
                return Err(format!("{blocks} of these stop the protection of '{name}'"));
            }
        }
        GuestVerb::List(json) => {
            let guests: Vec<SourceView> = client.get("/v1/guests").await.map_err(told)?;
            if json.json {
                return print_json(&guests);
            }
            show::guests(&guests);
        }
        GuestVerb::Show { name, json } => {
            let record: GuestRecord = client.get(&guest_path(&name, "")).await.map_err(told)?;
            if json.json {
                return print_json(&record);
            }
            show::definition(&record);
        }
        GuestVerb::Remove { name } => {
            let _: Done = client.delete(&guest_path(&name, "")).await.map_err(told)?;
            say!("'{name}' is known here no more. If it is a QEMU, that runs on.");
        }
    }
    Ok(())
}

pub(super) async fn protect(
    client: &Client,
    name: &str,
    to: String,
    rpo: Option<Period>,
    seeded: bool,
) -> Outcome {
    let body = Protect {
        to: to.clone(),
        rpo,
        seeded,
    };
    let _: Done = client
        .post(&guest_path(name, "/protect"), &body)
        .await
        .map_err(told)?;
    if seeded {
        say!(
            "'{name}' will be protected to '{to}' once its seed is imported there: farhaven seed import FILE"
        );
        return Ok(());
    }
    say!("'{name}' is being copied to '{to}'. Watch it: farhaven status --watch");
    Ok(())
}

pub(super) async fn pause(client: &Client, name: &str) -> Outcome {
    let _: Done = client
        .post(&guest_path(name, "/pause"), &Done {})
        .await
        .map_err(told)?;
    say!("Protection of '{name}' is paused; its RPO grows. Go on: farhaven resume {name}");
    Ok(())
}

pub(super) async fn resume(client: &Client, name: &str) -> Outcome {
    let _: Done = client
        .post(&guest_path(name, "/resume"), &Done {})
        .await
        .map_err(told)?;
    say!("Protection of '{name}' goes on.");
    Ok(())
}

pub(super) async fn unprotect(client: &Client, name: &str, discard: bool) -> Outcome {
    let body = Unprotect { discard };
    let _: Done = client
        .post(&guest_path(name, "/unprotect"), &body)
        .await
        .map_err(told)?;
    let points = if discard {
        "are dropped"
    } else {
        "stay until their time is over"
    };
    say!(
        "'{name}' is protected no more; where it runs, it runs on. Its points at the peer {points}."
    );
    Ok(())
}

/// Shows that something goes on while `work` does.
pub(super) async fn waiting<T>(what: String, work: impl Future<Output = T>) -> T {
    let bar = spinner(what);
    let done = work.await;
    bar.finish_and_clear();
    done
}

/// Something that turns, until it is dropped.
pub(super) fn spinner(what: String) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_finish(ProgressFinish::AndClear);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.set_message(what);
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

pub(super) async fn failover(
    client: &Client,
    name: &str,
    point: Option<PointChoice>,
    force: bool,
    json: bool,
) -> Outcome {
    let path = guest_path(name, "/failover");
    let body = Failover {
        point,
        force,
        by: super::run::account(),
    };
    let report: FailoverReport =
        waiting(format!("taking '{name}' over"), client.post(&path, &body))
            .await
            .map_err(told)?;
    if json {
        return print_json(&report);
    }
    show::failover(&report);
    Ok(())
}

pub(super) async fn move_guest(
    client: &Client,
    name: &str,
    accept_pause: bool,
    json: bool,
) -> Result<(), Failure> {
    let path = guest_path(name, "/move");
    let body = Move {
        accept_pause,
        by: super::run::account(),
    };
    let moving = client.post(&path, &body);
    let moved: Result<MoveReport, _> = tokio::select! {
        moved = moving => moved,
        never = rounds_told(client, name) => match never {},
    };
    let report = moved.map_err(|error| Failure {
        status: match error {
            ClientError::TooLong(_) => EXIT_TOO_LONG,
            _ => 1,
        },
        why: told(error),
    })?;
    if json {
        return Ok(print_json(&report)?);
    }
    show::moved(&report);
    Ok(())
}

/// Tells how a move under way converges: in place on a terminal, else a line a round.
async fn rounds_told(client: &Client, name: &str) -> std::convert::Infallible {
    let bar = spinner(format!("moving '{name}'"));
    let mut told = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(250)).await;
        let guests: Result<Vec<SourceView>, _> = client.get("/v1/guests").await;
        let guests = guests.unwrap_or_default();
        let guest = guests.into_iter().find(|g| g.name == name);
        let Some(guest) = guest.filter(|g| matches!(g.phase, Phase::Moving | Phase::Held)) else {
            continue;
        };
        let Some(outlook) = guest.outlook.filter(|o| o.rounds > told) else {
            continue;
        };
        told = outlook.rounds;
        let line = format!("moving '{name}': round {told}, {outlook}");
        if bar.is_hidden() {
            eprintln!("{line}");
        }
        bar.set_message(line);
    }
}

pub(super) async fn move_outlook(client: &Client, name: &str, json: bool) -> Outcome {
    let outlook: MoveOutlook = client.get(&guest_path(name, "/move")).await.map_err(told)?;
    if json {
        return print_json(&outlook);
    }
    say!("'{name}', by its newest point: {outlook}.");
    if !outlook.within {
        say!(
            "A move takes rounds first, and may throttle it by up to {} %. Should that not suffice, it stays unless you add --accept-pause.",
            outlook.max_throttle_percent
        );
    }
    Ok(())
}

pub(super) async fn take_back(client: &Client, name: &str, force: bool) -> Outcome {
    let body = TakeBack { force };
    let _: Done = client
        .post(&guest_path(name, "/take-back"), &body)
        .await
        .map_err(told)?;
    say!(
        "'{name}' runs here again, under a new term: should it run at the peer, it is stopped there."
    );
    Ok(())
}
