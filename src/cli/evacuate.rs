//! `farhaven evacuate`, `farhaven evacuation`: plans, begins, watches.

use std::io::IsTerminal;
use std::time::Duration;

use clap::{Args, Subcommand};
use farhaven_policies::units::{Period, Rate};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::{EXIT_TOO_LONG, Failure, Json, print_json, told};
use crate::client::{Client, ClientError};
use crate::site::api::Done;
use crate::site::evacuate::{
    Evacuation, EvacuationState, Evacuee, GuestState, Order, Preview, Summary,
};
use crate::site::view::bytes;

mod show;

/// How often the daemon is asked how it goes.
const ASK: Duration = Duration::from_millis(500);
/// A daemon that does not answer may be starting anew.
const SILENCE: Duration = Duration::from_secs(60);
/// Guests with a line of their own while they move.
const MOST_LINES: usize = 8;

#[derive(Debug, Args)]
pub(super) struct Evacuate {
    /// The paired site that everything goes to.
    #[arg(long, value_name = "SITE")]
    to: String,
    /// Everything is to run there after this time, like 30m; as soon as may be if not given.
    #[arg(long, value_name = "TIME")]
    deadline: Option<Period>,
    /// Only this group; may be given again.
    #[arg(long, value_name = "GROUP")]
    group: Vec<String>,
    /// Only this guest; may be given again.
    #[arg(long, value_name = "GUEST")]
    guest: Vec<String>,
    /// Only show what would be done, and whether the deadline can be met.
    #[arg(long)]
    dry_run: bool,
    /// Even guests that stand longer than their policies allow (protect.max_blackout).
    #[arg(long)]
    accept_pause: bool,
    /// Begin even if not everything fits before the deadline: by priority, as much as may be.
    #[arg(long)]
    partial: bool,
    /// Count on a link of this rate, like 200mbit, instead of the measured one.
    #[arg(long, value_name = "RATE")]
    link_rate: Option<Rate>,
    /// Begin, and do not watch it.
    #[arg(long, conflicts_with = "dry_run")]
    detach: bool,
    /// As JSON: the plan, or how it ended.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum EvacuationVerb {
    /// How the newest one stands.
    Status {
        /// Until it is over.
        #[arg(long)]
        watch: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Begin nothing more for a while; moves under way come to their end.
    Pause,
    /// Go on after a pause.
    Resume,
    /// End it: what has not moved stays here, protected.
    Abort,
    /// List all that are kept.
    List(Json),
    /// How one went, guest by guest, against its plan; the newest if no number is given.
    Show {
        /// Its number.
        number: Option<u64>,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

pub(super) async fn evacuate(client: &Client, order: Evacuate) -> Result<(), Failure> {
    let asked = Order {
        to: order.to,
        deadline: order.deadline,
        guests: order.guest,
        groups: order.group,
        accept_pause: order.accept_pause,
        partial: order.partial,
        link_rate: order.link_rate,
    };
    if order.dry_run {
        let preview: Preview = client
            .post("/v1/evacuations/plan", &asked)
            .await
            .map_err(told)?;
        match order.json {
            true => print_json(&preview)?,
            false => show::preview(&preview),
        }
        return Ok(());
    }
    let begun: Result<Evacuation, _> = client.post("/v1/evacuations", &asked).await;
    let begun = begun.map_err(|error| Failure {
        status: match error {
            ClientError::TooLong(_) => EXIT_TOO_LONG,
            _ => 1,
        },
        why: told(error),
    })?;
    if order.detach {
        if order.json {
            return Ok(print_json(&begun)?);
        }
        say!(
            "Evacuation {} to '{}' has begun: {} guests. Watch it: farhaven evacuation status --watch; end it: farhaven evacuation abort",
            begun.id,
            begun.order.to,
            begun.guests.len()
        );
        return Ok(());
    }
    watch(client, begun.id, order.json).await
}

pub(super) async fn run(client: &Client, verb: EvacuationVerb) -> Result<(), Failure> {
    match verb {
        EvacuationVerb::Status { watch: true, json } => {
            let record = newest(client).await?;
            return watch(client, record.id, json).await;
        }
        EvacuationVerb::Status { watch: false, json } => {
            let record = newest(client).await?;
            match json {
                true => print_json(&record)?,
                false => show::status(&record),
            }
        }
        EvacuationVerb::Pause => {
            let record = say_to(client, "pause").await?;
            say!(
                "Evacuation {} is paused: what is under way comes to its end, and the time runs on. Go on: farhaven evacuation resume",
                record.id
            );
        }
        EvacuationVerb::Resume => {
            let record = say_to(client, "resume").await?;
            say!("Evacuation {} goes on.", record.id);
        }
        EvacuationVerb::Abort => {
            let record = say_to(client, "abort").await?;
            say!(
                "Evacuation {} is being aborted: what has not moved stays here, protected; a guest whose last cut has begun still moves. See: farhaven evacuation status",
                record.id
            );
        }
        EvacuationVerb::List(json) => {
            let list: Vec<Summary> = client.get("/v1/evacuations").await.map_err(told)?;
            match json.json {
                true => print_json(&list)?,
                false => show::list(&list),
            }
        }
        EvacuationVerb::Show { number, json } => {
            let record = match number {
                Some(number) => one(client, number).await.map_err(told)?,
                None => newest(client).await?,
            };
            match json {
                true => print_json(&record)?,
                false => show::report(&record),
            }
        }
    }
    Ok(())
}

async fn newest(client: &Client) -> Result<Evacuation, String> {
    client.get("/v1/evacuations/newest").await.map_err(told)
}

async fn one(client: &Client, number: u64) -> Result<Evacuation, ClientError> {
    client.get(&format!("/v1/evacuations/{number}")).await
}

async fn say_to(client: &Client, word: &str) -> Result<Evacuation, String> {
    let path = format!("/v1/evacuation/{word}");
    client.post(&path, &Done {}).await.map_err(told)
}

/// Shows how one goes until it is over, and how it went. Ctrl-C ends the showing only.
async fn watch(client: &Client, number: u64, json: bool) -> Result<(), Failure> {
    let record = tokio::select! {
        record = followed(client, number) => record?,
        _ = tokio::signal::ctrl_c() => {
            return Err(Failure {
                why: format!(
                    "not watched any more; evacuation {number} goes on. Watch it: farhaven evacuation status --watch; end it: farhaven evacuation abort"
                ),
                status: 130,
            });
        }
    };
    match json {
        true => print_json(&record)?,
        false => show::report(&record),
    }
    match record.state {
        EvacuationState::Done => Ok(()),
        _ => Err(Failure::from(format!(
            "{} of {} guests did not move; they run on where they ran",
            record.guests.len() - record.count(GuestState::Moved),
            record.guests.len()
        ))),
    }
}

async fn followed(client: &Client, number: u64) -> Result<Evacuation, String> {
    let mut screen = Screen::new();
    let mut silent = Duration::ZERO;
    loop {
        match one(client, number).await {
            Ok(record) => {
                silent = Duration::ZERO;
                screen.show(&record);
                if record.state.is_over() {
                    return Ok(record);
                }
            }
            // A restart of the daemon is no end: it goes on by itself.
            Err(ClientError::Connect { .. } | ClientError::Broken { .. }) if silent < SILENCE => {
                silent += ASK;
                screen
                    .head
                    .set_message("the daemon does not answer; waiting for it");
            }
            Err(error) => return Err(error.to_string()),
        }
        tokio::time::sleep(ASK).await;
    }
}

/// What is seen while it goes on: on a terminal a bar for all and a line for each guest
/// under way; else a line for what is new.
struct Screen {
    all: MultiProgress,
    head: ProgressBar,
    lines: Vec<ProgressBar>,
    plain: bool,
    told: Vec<(GuestState, u32)>,
    changes: usize,
}

impl Screen {
    fn new() -> Self {
        let all = MultiProgress::new();
        let head = all.add(ProgressBar::new(0));
        if let Ok(style) =
            ProgressStyle::with_template("{spinner} [{bar:30}] {pos}/{len} moved  {wide_msg}")
        {
            head.set_style(style.progress_chars("=> "));
        }
        head.enable_steady_tick(Duration::from_millis(200));
        Self {
            all,
            head,
            lines: Vec::new(),
            plain: !std::io::stderr().is_terminal(),
            told: Vec::new(),
            changes: 0,
        }
    }

    fn show(&mut self, record: &Evacuation) {
        self.head.set_length(record.guests.len() as u64);
        self.head
            .set_position(record.count(GuestState::Moved) as u64);
        self.head.set_message(show::headline(record));
        for change in record.changes.iter().skip(self.changes) {
            self.line(&show::change(change));
        }
        self.changes = record.changes.len();
        let busy: Vec<&Evacuee> = record
            .guests
            .iter()
            .filter(|guest| matches!(guest.state, GuestState::Moving | GuestState::Copying))
            .take(MOST_LINES)
            .collect();
        while self.lines.len() < busy.len() {
            let line = self.all.add(ProgressBar::new_spinner());
            if let Ok(style) = ProgressStyle::with_template("    {wide_msg}") {
                line.set_style(style);
            }
            self.lines.push(line);
        }
        for line in self.lines.drain(busy.len()..) {
            line.finish_and_clear();
            self.all.remove(&line);
        }
        for (line, guest) in self.lines.iter().zip(&busy) {
            line.set_message(show::doing(guest));
        }
        self.told
            .resize(record.guests.len(), (GuestState::Waiting, 0));
        for index in 0..record.guests.len() {
            let guest = &record.guests[index];
            let now = (guest.state, guest.tries);
            if self.told[index] != now {
                self.told[index] = now;
                self.line(&format!("  {}", show::doing(guest)));
            }
        }
        if record.state.is_over() {
            self.head.finish_and_clear();
            for line in self.lines.drain(..) {
                line.finish_and_clear();
            }
        }
    }

    fn line(&self, text: &str) {
        match self.plain {
            true => eprintln!("{text}"),
            // One that fails leaves the bar as it is.
            false => drop(self.all.println(text)),
        }
    }
}

/// Bytes and a second's worth of them, for people.
fn rate(bytes_per_s: u64) -> String {
    format!("{}/s", bytes(bytes_per_s))
}
