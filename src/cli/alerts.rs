//! `farhaven alert`, `farhaven events`: what is the matter, and what happened.

use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use comfy_table::{Cell, Color};
use farhaven_policies::alert::Severity;
use farhaven_policies::units::Period;
use jiff::Timestamp;

use super::show::{millis, table};
use super::{Outcome, print_json, told};
use crate::client::Client;
use crate::site::alerts::AlertView;
use crate::site::api::{Acknowledge, Events};
use crate::site::events::Event;

#[derive(Debug, Subcommand)]
pub(super) enum AlertVerb {
    /// Alerts that stand, the worst first, and what to do about each.
    List {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Say that you care for an alert; it stands until its reason is gone.
    Ack {
        /// The alert's number.
        id: u64,
        /// Who cares for it.
        #[arg(long = "as", env = "USER", value_name = "NAME")]
        by: String,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

/// What happened, the oldest first.
#[derive(Debug, Args)]
pub(super) struct EventsOf {
    /// Go on as events happen, until Ctrl-C. With --json: one object a line.
    #[arg(long, short)]
    follow: bool,
    /// Only of so long ago, like 1h; or after the event of this number, like 4711.
    #[arg(long, value_name = "TIME|NUMBER")]
    since: Option<Since>,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// Where to begin.
#[derive(Debug, Clone, Copy)]
enum Since {
    Ago(Duration),
    After(u64),
}

impl std::str::FromStr for Since {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(number) = text.parse() {
            return Ok(Since::After(number));
        }
        let ago: Result<Period, _> = text.parse();
        ago.map(|ago| Since::Ago(ago.duration()))
            .map_err(|e| format!("{e}, or the number of an event"))
    }
}

pub(super) async fn alert(client: &Client, verb: AlertVerb) -> Outcome {
    match verb {
        AlertVerb::List { json } => {
            let alerts: Vec<AlertView> = client.get("/v1/alerts").await.map_err(told)?;
            if json {
                return print_json(&alerts);
            }
            if alerts.is_empty() {
                say!("No alert stands.");
            } else {
                tell(&alerts);
            }
            Ok(())
        }
        AlertVerb::Ack { id, by, json } => {
            let path = format!("/v1/alerts/{id}/acknowledge");
            let alert: AlertView = client
                .post(&path, &Acknowledge { by })
                .await
                .map_err(told)?;
            if json {
                return print_json(&alert);
            }
            let by = alert.acknowledged_by.unwrap_or_default();
            say!("Alert {id} is acknowledged by {by}: {}", alert.what);
            Ok(())
        }
    }
}

fn color(severity: Severity) -> Color {
    match severity {
        Severity::Critical => Color::Red,
        Severity::Warning => Color::Yellow,
        Severity::Info => Color::Green,
    }
}

/// Alerts for people.
pub(super) fn tell(alerts: &[AlertView]) {
    let mut rows = table(&[
        "Alert",
        "Severity",
        "For",
        "What, and what to do",
        "Seen by",
    ]);
    for alert in alerts {
        let since = SystemTime::from(alert.since).elapsed().unwrap_or_default();
        rows.add_row(vec![
            Cell::new(alert.id),
            Cell::new(alert.severity).fg(color(alert.severity)),
            Cell::new(millis(since.as_millis() as u64)),
            Cell::new(format!("{}\n→ {}", alert.what, alert.advice)),
            Cell::new(alert.acknowledged_by.as_deref().unwrap_or("-")),
        ]);
    }
    say!("{rows}");
}

pub(super) async fn events(client: &Client, asked: EventsOf) -> Outcome {
    let (mut after, from) = match asked.since {
        Some(Since::After(number)) => (number, Timestamp::MIN),
        Some(Since::Ago(ago)) => (0, Timestamp::now() - ago),
        None => (0, Timestamp::MIN),
    };
    let mut listed = Vec::new();
    let mut wait_s = 0;
    loop {
        let path = format!("/v1/events?after={after}&wait_s={wait_s}");
        let Events { events, next } = client.get(&path).await.map_err(told)?;
        after = next;
        let caught_up = events.is_empty();
        for event in events.into_iter().filter(|event| event.at >= from) {
            match (asked.json, asked.follow) {
                (true, false) => listed.push(event),
                (true, true) => say!("{}", serde_json::to_string(&event).map_err(told)?),
                (false, _) => line(&event),
            }
        }
        if caught_up && !asked.follow {
            break;
        }
        if caught_up {
            wait_s = 30;
        }
    }
    match asked.json {
        true => print_json(&listed),
        false => Ok(()),
    }
}

fn line(event: &Event) {
    let at = event.at.to_string();
    let at = at.get(..19).unwrap_or(&at);
    say!(
        "{:>6}  {at}Z  {:<8}  {:<18}  {}: {}",
        event.number,
        event.severity,
        event.kind,
        event.subject,
        event.what
    );
}
