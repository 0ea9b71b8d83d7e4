//! `farhaven run`, `approve` and `report`: runs of runbooks, seen and spoken to.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use farhaven_policies::runbook::run::Answer;

use self::shown::{at, print};
use super::{Failure, Json, Outcome as Done, escaped, print_json, told};
use crate::client::Client;
use crate::runbook::report::{Report, html};
use crate::site::runs::api::{Say, Start};
use crate::site::runs::view::RunView;

mod shown;

/// Who it is that says something, for the audit record.
#[derive(Debug, Args)]
pub(super) struct As {
    /// Your name, for the audit record; the name of your account if not given.
    #[arg(long = "as", value_name = "NAME")]
    name: Option<String>,
}

impl As {
    pub(super) fn name(self) -> Result<String, String> {
        self.name
            .or_else(account)
            .ok_or_else(|| "say who you are: --as NAME; it is kept in the audit record".to_owned())
    }
}

/// Who is at the keyboard: who became root by sudo is told by their own name.
pub(super) fn account() -> Option<String> {
    let set = |name: &str| std::env::var(name).ok().filter(|name| !name.is_empty());
    set("SUDO_USER")
        .or_else(|| set("USER"))
        .or_else(|| set("LOGNAME"))
}

#[derive(Debug, Subcommand)]
pub(super) enum RunVerb {
    /// All runs here, the newest first.
    List(Json),
    /// A run, step by step.
    Show {
        /// Its id.
        run: String,
        /// Until it is over.
        #[arg(long)]
        follow: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Begin no further step; what is under way ends.
    Pause {
        /// Its id.
        run: String,
        #[command(flatten)]
        by: As,
    },
    /// End a pause.
    GoOn {
        /// Its id.
        run: String,
        #[command(flatten)]
        by: As,
    },
    /// End it where it is, or undo what was done.
    Abort {
        /// Its id.
        run: String,
        /// Undo what was done, the last first.
        #[arg(long)]
        rollback: bool,
        #[command(flatten)]
        by: As,
    },
    /// Say what follows a step that failed or was interrupted.
    Decide {
        /// Its id.
        run: String,
        /// What.
        #[arg(value_enum)]
        answer: AnswerWord,
        #[command(flatten)]
        by: As,
    },
}

/// An answer, as it is typed.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum AnswerWord {
    /// Do the step again.
    Repeat,
    /// It is done, by other means: go on.
    TakeAsDone,
    /// Undo what was done.
    Rollback,
    /// Leave everything as it is.
    End,
}

/// `farhaven approve`.
#[derive(Debug, Args)]
pub(super) struct Approve {
    /// The run.
    run: String,
    /// The step that waits for it.
    step: String,
    #[command(flatten)]
    by: As,
    /// Refuse it.
    #[arg(long)]
    refuse: bool,
    /// In your words, for the record.
    #[arg(long, default_value = "")]
    why: String,
}

/// `farhaven report`.
#[derive(Debug, Args)]
pub(super) struct ReportOf {
    /// The run.
    run: String,
    /// Write a page that needs no other file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

fn path(run: &str, rest: &str) -> String {
    format!("/v1/runs/{}{rest}", escaped(run))
}

pub(super) async fn run(client: &Client, verb: RunVerb) -> Result<(), Failure> {
    let (run, say, rest) = match verb {
        RunVerb::List(Json { json }) => return Ok(list(client, json).await?),
        RunVerb::Show { run, follow, json } => return show(client, &run, follow, json).await,
        RunVerb::Pause { run, by } => (run, of(by.name()?), "/pause"),
        RunVerb::GoOn { run, by } => (run, of(by.name()?), "/go-on"),
        RunVerb::Abort { run, rollback, by } => {
            let say = Say {
                rollback,
                ..of(by.name()?)
            };
            (run, say, "/abort")
        }
        RunVerb::Decide { run, answer, by } => {
            let answer = Some(match answer {
                AnswerWord::Repeat => Answer::Repeat,
                AnswerWord::TakeAsDone => Answer::TakeAsDone,
                AnswerWord::Rollback => Answer::Rollback,
                AnswerWord::End => Answer::End,
            });
            let say = Say {
                answer,
                ..of(by.name()?)
            };
            (run, say, "/decide")
        }
    };
    let view: RunView = client.post(&path(&run, rest), &say).await.map_err(told)?;
    say!("{}: {}", view.id, view.standing);
    Ok(())
}

fn of(by: String) -> Say {
    Say {
        by,
        ..Say::default()
    }
}

pub(super) async fn approve(client: &Client, approve: Approve) -> Done {
    let say = Say {
        step: approve.step.clone(),
        refuse: approve.refuse,
        why: approve.why,
        ..of(approve.by.name()?)
    };
    let view: RunView = client
        .post(&path(&approve.run, "/approve"), &say)
        .await
        .map_err(told)?;
    let what = if approve.refuse {
        "refused"
    } else {
        "approved"
    };
    say!(
        "'{}' is {what} by {}. {}: {}",
        approve.step,
        say.by,
        view.id,
        view.standing
    );
    Ok(())
}

async fn list(client: &Client, json: bool) -> Done {
    let runs: Vec<RunView> = client.get("/v1/runs").await.map_err(told)?;
    if json {
        return print_json(&runs);
    }
    if runs.is_empty() {
        say!("no runs here yet; start one: farhaven runbook run FILE --mode test");
        return Ok(());
    }
    let mut table = super::show::table(&["run", "runbook", "mode", "by", "started", "stands"]);
    for run in &runs {
        table.add_row([
            run.id.clone(),
            run.runbook.clone(),
            run.mode.map_or("?".to_owned(), |mode| mode.to_string()),
            run.by.clone(),
            at(run.started),
            run.standing.clone(),
        ]);
    }
    say!("{table}");
    Ok(())
}

async fn show(client: &Client, run: &str, follow: bool, json: bool) -> Result<(), Failure> {
    let view: RunView = client.get(&path(run, "")).await.map_err(told)?;
    match (follow, json) {
        (true, _) => return shown::follow(client, view, json).await,
        (false, true) => print_json(&view)?,
        (false, false) => print(&view),
    }
    Ok(())
}

/// Starts a run of a file, or prints what it would be.
pub(super) async fn start(
    client: &Client,
    file: &Path,
    start: Start,
    follow: bool,
    json: bool,
) -> Result<(), Failure> {
    let view: RunView = client.post("/v1/runs", &start).await.map_err(told)?;
    if follow {
        return shown::follow(client, view, json).await;
    }
    if json {
        return Ok(print_json(&view)?);
    }
    say!(
        "{} runs in {} mode as {}.",
        file.display(),
        start.mode,
        view.id
    );
    say!("Watch it: farhaven run show {} --follow", view.id);
    Ok(())
}

pub(super) async fn report(client: &Client, wanted: ReportOf) -> Done {
    let report: Report = client
        .get(&path(&wanted.run, "/report"))
        .await
        .map_err(told)?;
    if let Some(file) = &wanted.html {
        std::fs::write(file, html::page(&report))
            .map_err(|error| format!("{} cannot be written: {error}", file.display()))?;
        if !wanted.json {
            say!("The report of {} is in {}.", report.run, file.display());
        }
    }
    if wanted.json {
        return print_json(&report);
    }
    if wanted.html.is_none() {
        put!("{}", report.text());
    }
    Ok(())
}
