//! `farhaven seed`: a first copy by parcel.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;

use super::guests::spinner;
use super::show::{bytes, millis, table};
use super::{Json, Outcome, guest_path, print_json, told};
use crate::client::Client;
use crate::site::api::{ExportSeed, ImportSeed};
use crate::site::seed::{SeedExported, SeedImported, SeedState, SeedView};

#[derive(Debug, Subcommand)]
pub(super) enum SeedVerb {
    /// Write a guest's first copy to a medium, encrypted for a paired site.
    Export {
        /// The guest; it runs on, and must not be protected yet.
        name: String,
        /// The paired site that will import it.
        #[arg(long, value_name = "SITE")]
        to: String,
        /// Where to: a file that is not there yet, or a directory.
        path: PathBuf,
        #[command(flatten)]
        json: Json,
    },
    /// Take a first copy that a paired site wrote for this one.
    Import {
        /// The file.
        file: PathBuf,
        #[command(flatten)]
        json: Json,
    },
    /// Seeds being written or imported here, and those that are awaited here.
    List(Json),
}

pub(super) async fn run(client: &Client, verb: SeedVerb) -> Outcome {
    match verb {
        SeedVerb::Export {
            name,
            to,
            path,
            json,
        } => {
            let path = std::path::absolute(path).map_err(told)?;
            let body = ExportSeed { to, path };
            let at = guest_path(&name, "/seed");
            let what = format!("writing a first copy of '{name}'");
            let work = client.post(&at, &body);
            let report: SeedExported = tokio::select! {
                done = work => done.map_err(told)?,
                never = progress(client, what, SeedState::Exporting) => match never {},
            };
            if json.json {
                return print_json(&report);
            }
            say!(
                "'{}', point {}, is in {}",
                report.guest,
                report.point,
                report.file.display()
            );
            say!(
                "  {} of guest data in {}, after {}; the guest stood for {:.1} ms",
                bytes(report.guest_bytes),
                bytes(report.file_bytes),
                millis(report.took_ms),
                report.pause_ms
            );
            say!(
                "Next: farhaven protect {} --to {} --seeded; bring the file there, and there: farhaven seed import FILE",
                report.guest,
                report.to
            );
        }
        SeedVerb::Import { file, json } => {
            let path = std::path::absolute(file).map_err(told)?;
            let body = ImportSeed { path };
            let what = "importing".to_owned();
            let work = client.post("/v1/seeds", &body);
            let report: SeedImported = tokio::select! {
                done = work => done.map_err(told)?,
                never = progress(client, what, SeedState::Importing) => match never {},
            };
            if json.json {
                return print_json(&report);
            }
            say!(
                "'{}' of '{}' is here as point {}, {} old: {} in {}.",
                report.guest,
                report.from,
                report.point,
                millis(report.age_ms),
                bytes(report.file_bytes),
                millis(report.took_ms)
            );
            say!(
                "Its key is destroyed, and the medium of no use any more. If '{0}' is not protected yet, at '{1}': farhaven protect {0} --to {2}",
                report.guest,
                report.from,
                report.to
            );
        }
        SeedVerb::List(json) => {
            let seeds: Vec<SeedView> = client.get("/v1/seeds").await.map_err(told)?;
            if json.json {
                return print_json(&seeds);
            }
            list(&seeds);
        }
    }
    Ok(())
}

fn list(seeds: &[SeedView]) {
    if seeds.is_empty() {
        say!("No seed is under way. Next: farhaven seed export NAME --to SITE PATH");
        return;
    }
    let mut rows = table(&["Guest", "Peer", "Seed", "Done", "File"]);
    for seed in seeds {
        let state = match seed.state {
            SeedState::Exporting => "being written here",
            SeedState::Importing => "being imported here",
            SeedState::Awaited => "awaited from there",
        };
        let file = match seed.file_bytes {
            0 => "-".to_owned(),
            read => bytes(read),
        };
        let state = state.to_owned();
        rows.add_row([
            seed.guest.clone(),
            seed.peer.clone(),
            state,
            share(seed),
            file,
        ]);
    }
    say!("{rows}");
}

fn share(seed: &SeedView) -> String {
    match seed.progress {
        Some((done, total)) if total > 0 => {
            format!("{:.0} %", done as f64 * 100.0 / total as f64)
        }
        _ => "-".to_owned(),
    }
}

/// Tells how far it is: in place on a terminal, else a line now and then.
async fn progress(client: &Client, what: String, state: SeedState) -> std::convert::Infallible {
    let bar = spinner(what.clone());
    let mut ticks = 0_u64;
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let seeds: Vec<SeedView> = client.get("/v1/seeds").await.unwrap_or_default();
        let Some(seed) = seeds.iter().find(|seed| seed.state == state) else {
            continue;
        };
        let line = format!(
            "{what}: {}, {} of file",
            share(seed),
            bytes(seed.file_bytes)
        );
        if bar.is_hidden() && ticks.is_multiple_of(20) {
            eprintln!("{line}");
        }
        ticks += 1;
        bar.set_message(line);
    }
}
