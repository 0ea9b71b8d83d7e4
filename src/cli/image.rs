//! `farhaven image`: base images stored at this site, for the guests of its peers.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;

use super::show::{bytes, table};
use super::{Json, Outcome, escaped, print_json, told};
use crate::client::{Client, ClientError};
use crate::site::api::AddImage;
use crate::site::images::ImageView;

#[derive(Debug, Subcommand)]
pub(super) enum ImageVerb {
    /// Store a raw disk image here; guests made from it then send their differences only.
    Add {
        /// The raw image, or a disk; the daemon reads it.
        file: PathBuf,
        /// Its name; the file's if not given.
        #[arg(long)]
        name: Option<String>,
        /// For the guests of this site only; of every paired one if not given.
        #[arg(long, value_name = "SITE")]
        peer: Option<String>,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Stored images.
    List(Json),
    /// Remove a stored image; what recovery points need of it stays.
    Remove {
        /// Its name.
        name: String,
        /// Only that for the guests of this site.
        #[arg(long, value_name = "SITE")]
        peer: Option<String>,
    },
}

pub(super) async fn run(client: &Client, verb: ImageVerb) -> Outcome {
    match verb {
        ImageVerb::Add {
            file,
            name,
            peer,
            json,
        } => add(client, file, name, peer, json).await,
        ImageVerb::List(Json { json }) => {
            let images: Vec<ImageView> = client.get("/v1/images").await.map_err(told)?;
            if json {
                return print_json(&images);
            }
            if images.is_empty() {
                say!("No image is stored here. Next: farhaven image add FILE");
                return Ok(());
            }
            let mut rows = table(&["Image", "For guests of", "Size", "Takes here"]);
            for image in images {
                let takes = match image.done_bytes {
                    Some(done) => format!("being stored, {} % read", percent(done, image.bytes)),
                    None => bytes(image.stored_bytes),
                };
                rows.add_row([image.name, image.peer, bytes(image.bytes), takes]);
            }
            say!("{rows}");
            Ok(())
        }
        ImageVerb::Remove { name, peer } => {
            let query = peer.map_or(String::new(), |peer| format!("?peer={}", escaped(&peer)));
            let path = format!("/v1/images/{}{query}", escaped(&name));
            let removed: Vec<ImageView> = client.delete(&path).await.map_err(told)?;
            for image in removed {
                say!("Image '{name}' for guests of '{}' is removed.", image.peer);
            }
            Ok(())
        }
    }
}

fn percent(done: u64, of: u64) -> u64 {
    match of {
        0 => 0,
        of => (u128::from(done) * 100 / u128::from(of)) as u64,
    }
}

async fn add(
    client: &Client,
    file: PathBuf,
    name: Option<String>,
    peer: Option<String>,
    json: bool,
) -> Outcome {
    let path = std::fs::canonicalize(&file)
        .map_err(|error| format!("{} cannot be read: {error}", file.display()))?;
    let stem = file.file_stem().map(|stem| stem.to_string_lossy());
    let name = name.or(stem.map(Into::into)).unwrap_or_default();
    let body = AddImage { path, name, peer };
    let stored = with_progress(client, &body).await.map_err(told)?;
    if json {
        return print_json(&stored);
    }
    for image in stored {
        say!(
            "Image '{}' is stored for guests of '{}': {}, {} here.",
            image.name,
            image.peer,
            bytes(image.bytes),
            bytes(image.stored_bytes)
        );
    }
    Ok(())
}

/// Asks for it, and shows meanwhile how far it is.
async fn with_progress(client: &Client, body: &AddImage) -> Result<Vec<ImageView>, ClientError> {
    let bar = indicatif::ProgressBar::no_length();
    let style = "{msg} {bar:30} {bytes} of {total_bytes}, {eta} to go";
    if let Ok(style) = indicatif::ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar.set_message(format!("storing '{}'", body.name));
    let asked = client.post("/v1/images", body);
    tokio::pin!(asked);
    let stored = loop {
        tokio::select! {
            stored = &mut asked => break stored,
            () = tokio::time::sleep(Duration::from_millis(300)) => {
                let images: Vec<ImageView> = client.get("/v1/images").await.unwrap_or_default();
                let ours = images.iter().filter(|image| image.name == body.name);
                for image in ours {
                    if let Some(done) = image.done_bytes {
                        bar.set_length(image.bytes);
                        bar.set_position(done);
                    }
                }
            }
        }
    };
    bar.finish_and_clear();
    stored
}
