//! `farhaven scrub`: is every stored byte what it was when it came?

use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;
use farhaven_policies::units::{ByteSize, Rate, RateLimit};

use super::show::{bytes, millis, table};
use super::{Outcome, print_json, told};
use crate::client::Client;
use crate::site::api::StartScrub;
use crate::site::scrub::ScrubView;

/// From one question how far it is to the next.
const LOOK: Duration = Duration::from_millis(500);

#[derive(Debug, Args)]
pub(super) struct Scrub {
    /// What this peer sent; what all peers sent if not given.
    #[arg(long, value_name = "SITE")]
    peer: Option<String>,
    /// Most that is read, like 50mbit, or 100MiB (a second), or none.
    #[arg(long, value_parser = rate)]
    rate: Option<RateLimit>,
    /// Begin nothing; only show how scrubs stand.
    #[arg(long, conflicts_with = "rate")]
    status: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

fn rate(text: &str) -> Result<RateLimit, String> {
    if let Ok(size) = text.parse::<ByteSize>()
        && text.ends_with(['B', 'K', 'M', 'G', 'T'])
    {
        return Ok(RateLimit::at(Rate::from_bits(
            size.bytes().saturating_mul(8),
        )));
    }
    let limit: Result<RateLimit, _> = text.parse();
    limit.map_err(|e| format!("{e}, or a size a second like 100MiB"))
}

pub(super) async fn run(client: &Client, scrub: Scrub) -> Outcome {
    let Scrub {
        peer,
        rate,
        status,
        json,
    } = scrub;
    let of = |views: Vec<ScrubView>| -> Vec<ScrubView> {
        let wanted = |view: &ScrubView| peer.as_ref().is_none_or(|peer| view.peer == *peer);
        views.into_iter().filter(wanted).collect()
    };
    let mut views = if status {
        of(client.get("/v1/scrub").await.map_err(told)?)
    } else {
        let body = StartScrub {
            peer: peer.clone(),
            rate,
        };
        of(client.post("/v1/scrub", &body).await.map_err(told)?)
    };
    let bar = bar(json || status);
    while !status && views.iter().any(|view| view.running) {
        let read: u64 = views.iter().filter(|v| v.running).map(|v| v.bytes).sum();
        let total: u64 = views
            .iter()
            .filter(|v| v.running)
            .map(|v| v.bytes_total)
            .sum();
        bar.set_length(total.max(read));
        bar.set_position(read);
        tokio::time::sleep(LOOK).await;
        views = of(client.get("/v1/scrub").await.map_err(told)?);
    }
    bar.finish_and_clear();
    if json {
        print_json(&views)?;
    } else {
        tell(&views);
    }
    let damaged: u64 = views.iter().map(|view| view.damaged).sum();
    match damaged {
        0 => Ok(()),
        _ => Err(format!(
            "{damaged} pieces of stored data are damaged; what to do: farhaven alert list"
        )),
    }
}

/// How far it is, for who watches. It goes on in the daemon without.
fn bar(silent: bool) -> indicatif::ProgressBar {
    if silent || !std::io::stderr().is_terminal() {
        return indicatif::ProgressBar::hidden();
    }
    let bar = indicatif::ProgressBar::new(0);
    let style = "reading {bar:30} {bytes} of {total_bytes} ({bytes_per_sec}); Ctrl-C: it goes on";
    if let Ok(style) = indicatif::ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar
}

fn tell(views: &[ScrubView]) {
    let mut rows = table(&[
        "Sent by",
        "State",
        "Read",
        "Stored",
        "Last whole scrub",
        "Damaged",
    ]);
    for view in views {
        let ago = view.finished_ago_ms;
        rows.add_row(vec![
            view.peer.clone(),
            if view.running { "reading" } else { "idle" }.to_owned(),
            bytes(view.bytes),
            bytes(view.bytes_total),
            ago.map_or("never".to_owned(), |ago| format!("{} ago", millis(ago))),
            view.damaged.to_string(),
        ]);
    }
    say!("{rows}");
    for view in views {
        for point in &view.points {
            say!(
                "! point {} of '{}' cannot be restored in full: {}",
                point.point,
                point.guest,
                point.why
            );
        }
        if !view.healing.is_empty() {
            say!(
                "Of these, the newest of: {}. '{}' is asked to send anew what they lack; its next points are whole",
                view.healing.join(", "),
                view.peer
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_bits_or_bytes_a_second() {
        let bits = |text| rate(text).map(|limit| limit.rate().map(Rate::bits_per_second));
        assert_eq!(bits("50mbit"), Ok(Some(50_000_000)));
        assert_eq!(bits("100MiB"), Ok(Some((8 * 100) << 20)));
        assert_eq!(bits("none"), Ok(None));
        assert!(bits("fast").is_err_and(|why| why.contains("100MiB")));
    }
}
