//! `farhaven link`: limits and shares.

use clap::Subcommand;
use comfy_table::Table;
use farhaven_policies::units::RateLimit;

use super::{Json, Outcome, print_json, told};
use crate::client::Client;
use crate::site::limits::{LinkView, SetLimit};

#[derive(Debug, Subcommand)]
pub(super) enum LinkVerb {
    /// Show what holds now, and by whose word.
    Show(Json),
    /// Set what the link carries, at once and until it is set otherwise.
    Limit {
        /// Like 20mbit; `none`; or `auto`, what the configuration says.
        limit: Option<String>,
        /// For one guest instead of all together.
        #[arg(long, value_name = "NAME")]
        guest: Option<String>,
        /// The guest's share beside others: of 200 and 100, the first gets two thirds.
        #[arg(long, value_name = "0-255", requires = "guest")]
        priority: Option<u8>,
    },
}

pub(super) async fn run(client: &Client, verb: LinkVerb) -> Outcome {
    let view = match verb {
        LinkVerb::Show(json) => {
            let view: LinkView = client.get("/v1/link").await.map_err(told)?;
            if json.json {
                return print_json(&view);
            }
            view
        }
        LinkVerb::Limit {
            limit,
            guest,
            priority,
        } => {
            let configured = limit.as_deref() == Some("auto");
            let limit: Option<RateLimit> = match limit.filter(|_| !configured) {
                Some(text) => Some(text.parse().map_err(|e| {
                    format!("{text}: {e}, or auto for what the configuration says")
                })?),
                None => None,
            };
            let change = SetLimit {
                guest,
                limit,
                priority,
                configured,
            };
            client.post("/v1/link/limit", &change).await.map_err(told)?
        }
    };
    show(&view);
    Ok(())
}

fn show(view: &LinkView) {
    say!("all together  {}  (by {})", view.limit, view.by);
    say!("windows are by {}", view.time_zone);
    if view.guests.is_empty() {
        return;
    }
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["guest", "limit", "by", "priority"]);
    for guest in &view.guests {
        table.add_row([
            guest.name.clone(),
            guest.limit.to_string(),
            guest.by.clone(),
            guest.priority.to_string(),
        ]);
    }
    say!("{table}");
}
