//! `farhaven point`, `farhaven prune`: which recovery points stay.

use clap::Subcommand;
use comfy_table::{Cell, Color};

use super::show::{bytes, millis, table};
use super::{Outcome, group, guest_path, print_json, told};
use crate::client::Client;
use crate::site::api::{KeepPoint, ReleasePoint};
use crate::site::kept::{KeptPoint, PointChoice};
use crate::site::retention::PruneView;

#[derive(Debug, Subcommand)]
pub(super) enum PointVerb {
    /// Give a point a name: it stays until it is released.
    Keep {
        /// The guest, or the group.
        #[arg(value_name = "GUEST|GROUP")]
        name: String,
        /// Its number (of a group: its cut's), or the name it has; the newest if not given.
        #[arg(long, value_name = "NUMBER|NAME")]
        point: Option<PointChoice>,
        /// How it shall be called, like "before upgrade".
        #[arg(long = "name", value_name = "NAME")]
        called: String,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Take a point's name from it: it stays as long as any other.
    Release {
        /// The guest, or the group.
        #[arg(value_name = "GUEST|GROUP")]
        name: String,
        /// Its name, or its number.
        #[arg(long, value_name = "NAME|NUMBER")]
        point: PointChoice,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum PruneVerb {
    /// Show which points would be dropped and kept, and why; run it where they are kept.
    Plan {
        /// The guest, or the group.
        #[arg(value_name = "GUEST|GROUP")]
        name: String,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Drop the points past their time now; the daemon does it by itself, too.
    Run {
        /// The guest, or the group.
        #[arg(value_name = "GUEST|GROUP")]
        name: String,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

pub(super) async fn point(client: &Client, verb: PointVerb) -> Outcome {
    match verb {
        PointVerb::Keep {
            name,
            point,
            called,
            json,
        } => {
            let body = KeepPoint {
                point,
                name: called,
            };
            if group::is_group(client, &name).await {
                return group::keep(client, &name, &body, json).await;
            }
            let path = guest_path(&name, "/points/keep");
            let kept: KeptPoint = client.post(&path, &body).await.map_err(told)?;
            if json {
                return print_json(&kept);
            }
            let called = kept.name.unwrap_or_default();
            say!("Point {} of '{name}' is kept as \"{called}\".", kept.point);
            say!(
                "Run it one day: farhaven failover {name} --point \"{called}\"; let it go: farhaven point release {name} --point \"{called}\""
            );
            Ok(())
        }
        PointVerb::Release { name, point, json } => {
            let body = ReleasePoint { point };
            if group::is_group(client, &name).await {
                return group::release(client, &name, &body, json).await;
            }
            let path = guest_path(&name, "/points/release");
            let kept: KeptPoint = client.post(&path, &body).await.map_err(told)?;
            if json {
                return print_json(&kept);
            }
            say!(
                "Point {} of '{name}' stays as long as any other.",
                kept.point
            );
            Ok(())
        }
    }
}

pub(super) async fn prune(client: &Client, verb: PruneVerb) -> Outcome {
    let (name, json, run) = match verb {
        PruneVerb::Plan { name, json } => (name, json, false),
        PruneVerb::Run { name, json } => (name, json, true),
    };
    let Some(members) = group::members(client, &name).await else {
        let view = prune_of(client, &name, run).await?;
        if json {
            return print_json(&view);
        }
        shown(&view, run);
        return Ok(());
    };
    // They are judged as one: a point of the group stays, or goes, with all of its parts.
    let mut views = Vec::new();
    for guest in members {
        views.push(prune_of(client, &guest, run).await?);
    }
    if json {
        return print_json(&views);
    }
    for view in &views {
        shown(view, run);
    }
    Ok(())
}

async fn prune_of(client: &Client, guest: &str, run: bool) -> Result<PruneView, String> {
    let path = guest_path(guest, "/prune");
    let asked = match run {
        true => client.post(&path, &serde_json::json!({})).await,
        false => client.get(&path).await,
    };
    asked.map_err(told)
}

fn shown(view: &PruneView, run: bool) {
    let name = &view.guest;
    say!("Points of '{name}' are kept: {}", view.retention);
    let mut rows = table(&["Point", "Age", "", "Why", "Name"]);
    for point in &view.points {
        let fate = match point.keep {
            true => Cell::new("keep").fg(Color::Green),
            false => Cell::new("drop").fg(Color::Yellow),
        };
        rows.add_row(vec![
            Cell::new(point.point),
            Cell::new(millis(point.age_ms)),
            fate,
            Cell::new(&point.reason),
            Cell::new(point.name.as_deref().unwrap_or("")),
        ]);
    }
    say!("{rows}");
    let freed = bytes(view.bytes_freed);
    match run {
        true => say!("{} points were dropped, {freed} are free.", view.dropped),
        false => say!(
            "{} points would be dropped, {freed} would be free: farhaven prune run {name}",
            view.dropped
        ),
    }
}
