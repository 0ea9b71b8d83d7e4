//! `farhaven site`, `pair` and `peer`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use farhaven_policies::load;
use farhaven_policies::site::{ENV_PREFIX, LogFormat, SiteConfig};
use farhaven_policies::units::Period;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

use super::{Json, Outcome, print_json, show, told};
use crate::client::Client;
use crate::site::api::{self, Done, Invite, Invited, Pair as PairBody};
use crate::site::peers::Forgotten;
use crate::site::view::{PeerView, SiteView};
use crate::site::{Site, files};

#[derive(Debug, Subcommand)]
pub(super) enum SiteVerb {
    /// Make the configuration file and the directory of a new site.
    Init {
        /// What this data centre is called.
        name: String,
        /// Where the site keeps its keys, catalogue and store.
        #[arg(long, value_name = "DIR", default_value = "/var/lib/farhaven")]
        dir: PathBuf,
    },
    /// Run the site's daemon until SIGTERM.
    Run {
        /// The configuration, as `site init` made it.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Override a key, like link.rate_limit=100mbit.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        set: Vec<String>,
    },
    /// Show a running site: its key, its peers.
    Show(Json),
}

/// Without an invitation: make one. With one: accept it.
#[derive(Debug, Args)]
pub(super) struct Pair {
    /// The other site's invitation, as its `farhaven pair` printed it.
    invitation: Option<String>,
    /// How long a new invitation may be accepted.
    #[arg(
        long,
        value_name = "TIME",
        default_value = "15m",
        conflicts_with = "invitation"
    )]
    valid: Period,
    #[command(flatten)]
    json: Json,
}

#[derive(Debug, Subcommand)]
pub(super) enum PeerVerb {
    /// List paired sites.
    List(Json),
    /// End a pairing.
    Remove {
        /// The site.
        name: String,
    },
    /// Forget the guests and groups that a site sent here which is paired no more, so that
    /// another can have its name.
    Forget {
        /// The site.
        name: String,
    },
}

pub(super) async fn run(client: &Client, verb: SiteVerb) -> Outcome {
    match verb {
        SiteVerb::Init { name, dir } => init(&name, &dir),
        SiteVerb::Run { config, set } => serve(config, &set).await,
        SiteVerb::Show(json) => show_site(client, &json).await,
    }
}

async fn show_site(client: &Client, json: &Json) -> Outcome {
    let view: SiteView = client.get("/v1/status").await.map_err(told)?;
    if json.json {
        return print_json(&view);
    }
    say!(
        "site {}  farhaven {}\nkey  {}",
        view.site,
        view.version,
        view.key
    );
    show::peers(&view.peers);
    Ok(())
}

fn init(name: &str, dir: &std::path::Path) -> Outcome {
    let dir = std::path::absolute(dir).map_err(told)?;
    let file = dir.join("site.toml");
    if crate::site::exists(&file) {
        return Err(format!(
            "{} is there already; this directory belongs to a site. Choose another --dir",
            file.display()
        ));
    }
    let text = SiteConfig::template(name, &dir);
    let failed = |e: std::io::Error| format!("{}: {e}", dir.display());
    files::private_directory(&dir).map_err(failed)?;
    files::replace(&file, text.as_bytes()).map_err(failed)?;
    if let Err(error) = load::load::<SiteConfig>(Some(&file), ENV_PREFIX, &[]) {
        let _ = std::fs::remove_file(&file);
        return Err(error.to_string());
    }
    say!(
        "Site '{name}' is set up in {0}.\n\nNext: look through {1}, then run\n  farhaven site run --config {1}",
        dir.display(),
        file.display()
    );
    Ok(())
}

async fn serve(config: Option<PathBuf>, set: &[String]) -> Outcome {
    let mut overrides = Vec::new();
    for pair in set {
        let (key, value) = pair.split_once('=').ok_or_else(|| {
            format!("--set {pair}: expected KEY=VALUE, like link.rate_limit=100mbit")
        })?;
        overrides.push((key.to_owned(), value.to_owned()));
    }
    let file = config;
    let config: SiteConfig = load::load(file.as_deref(), ENV_PREFIX, &overrides).map_err(told)?;
    let filter = EnvFilter::try_new(&config.log.level)
        .map_err(|e| format!("log.level '{}' is not understood: {e}", config.log.level))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let set = match config.log.format {
        LogFormat::Json => log.json().try_init(),
        LogFormat::Text => log.with_ansi(false).try_init(),
    };
    set.map_err(told)?;
    // Also what libraries and QEMU make is this user's alone.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let socket = config.api_socket();
    let site = Site::start(config).await.map_err(told)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(told)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(told)?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
    };
    let hang_up = signal(SignalKind::hangup()).map_err(told)?;
    let reloading = tokio::spawn(reload(site.clone(), hang_up, file, overrides));
    let served = api::serve(site.clone(), &socket, stop).await;
    reloading.abort();
    site.shutdown().await;
    served.map_err(|e| format!("cannot serve the API on {}: {e}", socket.display()))
}

/// At SIGHUP the configuration is read anew, as at the start.
async fn reload(
    site: std::sync::Arc<Site>,
    mut hang_up: Signal,
    file: Option<PathBuf>,
    overrides: Vec<(String, String)>,
) {
    while hang_up.recv().await.is_some() {
        let read = load::load::<SiteConfig>(file.as_deref(), ENV_PREFIX, &overrides);
        let done = read
            .map_err(told)
            .and_then(|config| site.reload(&config).map_err(told));
        match done {
            Ok(false) => tracing::info!("the configuration was read anew"),
            Ok(true) => tracing::warn!(
                "the configuration was read anew: limits, windows and priorities hold now; other keys differ, too, and wait for a restart"
            ),
            Err(error) => {
                tracing::error!(
                    error,
                    "the configuration cannot be read; all stays as it was"
                );
            }
        }
    }
}

pub(super) async fn pair(client: &Client, pair: Pair) -> Outcome {
    let Some(invitation) = pair.invitation else {
        let valid_s = pair.valid.duration().as_secs();
        let invited: Invited = client
            .post("/v1/invitations", &Invite { valid_s })
            .await
            .map_err(told)?;
        if pair.json.json {
            return print_json(&invited);
        }
        say!(
            "Run this at the other site within {}:\n\n  farhaven pair {}\n\nWhoever has this line can pair once: hand it over by a way that only its operator reads.",
            pair.valid,
            invited.invitation
        );
        return Ok(());
    };
    let peer: PeerView = client
        .post("/v1/peers", &PairBody { invitation })
        .await
        .map_err(told)?;
    if pair.json.json {
        return print_json(&peer);
    }
    say!("Paired with site '{}', key {}.", peer.site, peer.key);
    say!(
        "Next, where a guest runs: farhaven guest add NAME --qmp PATH, then farhaven protect NAME --to SITE"
    );
    Ok(())
}

pub(super) async fn peer(client: &Client, verb: PeerVerb) -> Outcome {
    match verb {
        PeerVerb::List(json) => {
            let peers: Vec<PeerView> = client.get("/v1/peers").await.map_err(told)?;
            if json.json {
                return print_json(&peers);
            }
            show::peers(&peers);
        }
        PeerVerb::Remove { name } => {
            let _: Done = client
                .delete(&format!("/v1/peers/{}", super::escaped(&name)))
                .await
                .map_err(told)?;
            say!("Site '{name}' is paired no more. Run the same at '{name}' for this site.");
        }
        PeerVerb::Forget { name } => {
            let path = format!("/v1/peers/{}/forget", super::escaped(&name));
            let forgotten: Forgotten = client.post(&path, &Done {}).await.map_err(told)?;
            say!(
                "Forgotten of site '{name}': {} guests, {} groups.",
                forgotten.guests.len(),
                forgotten.groups.len()
            );
            for store in forgotten.stores {
                say!(
                    "Its recovery points are in {} until you remove that, with the daemon stopped.",
                    store.display()
                );
            }
        }
    }
    Ok(())
}
