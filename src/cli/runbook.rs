//! `farhaven runbook`: checks runbooks, says what they would do, prints those in
//! force without a file, and has them run. `plan` asks a daemon, and goes without one, too.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::{Subcommand, ValueEnum};
use farhaven_policies::files::PolicyFiles;
use farhaven_policies::load::LoadError;
use farhaven_policies::runbook::check::Known;
use farhaven_policies::runbook::plan::{Facts, GroupFacts, Plan, plan};
use farhaven_policies::runbook::{self, Mode, Runbook, builtin, read};
use serde::Serialize;

use super::policy::MistakeView;
use super::run::As;
use super::{Failure, Outcome, print_json, told};
use crate::client::Client;
use crate::site::runs::api::Start;
use crate::site::view::SiteView;

#[derive(Debug, Subcommand)]
pub(super) enum RunbookVerb {
    /// Find every mistake in a runbook.
    Check {
        /// The runbook.
        file: PathBuf,
        /// Policy files: the groups and guests that there are.
        #[arg(long, value_name = "FILE|DIR")]
        policies: Option<PathBuf>,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print what a runbook would do, with expected times; nothing is done.
    Plan {
        /// The runbook.
        file: PathBuf,
        /// What it would be run for.
        #[arg(long, value_enum)]
        mode: ModeWord,
        /// Policy files: the groups and guests that there are.
        #[arg(long, value_name = "FILE|DIR")]
        policies: Option<PathBuf>,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Run a runbook here, at the site where its guests are protected to. The
    /// file is kept with the run; it goes on by itself, whatever becomes of this command.
    Run {
        /// The runbook.
        file: PathBuf,
        /// What it is run for.
        #[arg(long, value_enum)]
        mode: ModeWord,
        /// From this point, where the runbook says newest.
        #[arg(long, value_name = "NUMBER")]
        point: Option<u64>,
        /// Unplanned even if the source is alive: its guests are stopped first.
        #[arg(long)]
        force: bool,
        /// Show it until it is over; exit status 4 if it did not succeed.
        #[arg(long)]
        follow: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        by: As,
    },
    /// Print what move, failover and test do without a runbook, as a file to begin with.
    Export {
        /// One of them; all three in one file if not given.
        #[arg(long, value_enum)]
        mode: Option<ModeWord>,
        /// The group that it shall act on.
        #[arg(long, default_value = "my-group", value_name = "GROUP")]
        group: String,
    },
    /// Print the JSON Schema of runbooks, for editors.
    Schema,
}

/// A mode, as it is typed.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum ModeWord {
    /// Isolated, from a point, while protection goes on.
    Test,
    /// Both sites live; nothing is lost.
    Planned,
    /// The source is lost.
    Unplanned,
}

impl From<ModeWord> for Mode {
    fn from(word: ModeWord) -> Mode {
        match word {
            ModeWord::Test => Mode::Test,
            ModeWord::Planned => Mode::Planned,
            ModeWord::Unplanned => Mode::Unplanned,
        }
    }
}

pub(super) async fn run(client: &Client, verb: RunbookVerb) -> Result<(), Failure> {
    if let RunbookVerb::Run {
        file,
        mode,
        point,
        force,
        follow,
        json,
        by,
    } = verb
    {
        // Its mistakes are told by the names of this file, and before a daemon is asked.
        read::file(&file, None).map_err(told)?;
        let start = Start {
            runbook: std::fs::read_to_string(&file)
                .map_err(|error| format!("{}: {error}", file.display()))?,
            mode: mode.into(),
            point,
            by: by.name()?,
            force,
        };
        return super::run::start(client, &file, start, follow, json).await;
    }
    Ok(print(client, verb).await?)
}

async fn print(client: &Client, verb: RunbookVerb) -> Outcome {
    match verb {
        // Told apart before.
        RunbookVerb::Run { .. } => Ok(()),
        RunbookVerb::Check {
            file,
            policies,
            json,
        } => check(&file, policies.as_deref(), json),
        RunbookVerb::Plan {
            file,
            mode,
            policies,
            json,
        } => {
            let known = known(policies.as_deref())?;
            let runbook = read::file(&file, known.as_ref()).map_err(told)?;
            let asked = Start {
                runbook: std::fs::read_to_string(&file).map_err(told)?,
                mode: mode.into(),
                point: None,
                by: String::new(),
                force: false,
            };
            // Where it would run, what earlier runs took is known.
            let refused = match known {
                Some(_) => None,
                None => match client.post::<Plan>("/v1/runbooks/plan", &asked).await {
                    Ok(measured) => return print_plan(&measured, json),
                    Err(error) => Some(error),
                },
            };
            let (facts, silent) = match client.get::<SiteView>("/v1/status").await {
                Ok(view) => (facts(&runbook, known.as_ref(), &view), None),
                Err(error) => (Facts::default(), Some(error)),
            };
            let mut plan = plan(&runbook, mode.into(), &facts).map_err(told)?;
            if let Some(error) = silent {
                plan.warnings = vec![format!("all times are unknown: {error}")];
            } else if let Some(why) = refused {
                let warning = format!("as it stands, it would not be run here: {why}");
                plan.warnings.push(warning);
            }
            print_plan(&plan, json)
        }
        RunbookVerb::Export { mode, group } => {
            let groups = BTreeMap::from([(group, Vec::new())]);
            let runbook = match mode {
                Some(mode) => builtin::of_mode(mode.into(), groups),
                None => builtin::of_all(groups),
            };
            put!("{}", runbook::write(&runbook));
            Ok(())
        }
        RunbookVerb::Schema => print_json(&Runbook::schema()),
    }
}

fn print_plan(plan: &Plan, json: bool) -> Outcome {
    if json {
        return print_json(plan);
    }
    put!("{}", plan.text());
    Ok(())
}

/// Groups and guests of policy files, if some are named.
fn known(policies: Option<&Path>) -> Result<Option<Known>, String> {
    policies
        .map(|path| PolicyFiles::read(path).map(|loaded| Known::of(&loaded.value)))
        .transpose()
        .map_err(told)
}

/// The result of a check, for programs.
#[derive(Debug, Serialize)]
struct Checked {
    sound: bool,
    steps: usize,
    mistakes: Vec<MistakeView>,
}

fn check(file: &Path, policies: Option<&Path>, json: bool) -> Outcome {
    let known = known(policies)?;
    let (steps, mistakes) = match read::file(file, known.as_ref()) {
        Ok(runbook) => (runbook.steps.len(), Vec::new()),
        Err(LoadError::Mistakes(mistakes)) => (0, mistakes),
        Err(other) => return Err(told(other)),
    };
    let count = mistakes.len();
    if json {
        print_json(&Checked {
            sound: count == 0,
            steps,
            mistakes: mistakes.into_iter().map(MistakeView::from).collect(),
        })?;
    } else {
        mistakes.iter().for_each(|mistake| say!("{mistake}"));
    }
    match count {
        0 if json => Ok(()),
        0 => {
            say!("no mistakes: {steps} steps");
            Ok(())
        }
        1 => Err("1 mistake; this would not be run".into()),
        count => Err(format!("{count} mistakes; this would not be run")),
    }
}

/// What the daemon measured of the runbook's groups. A group whose guests are
/// not named has those of the policy files, or is a single guest of its name.
fn facts(runbook: &Runbook, known: Option<&Known>, view: &SiteView) -> Facts {
    let mut facts = Facts::default();
    for (name, guests) in &runbook.groups {
        let members: Vec<String> = match known.and_then(|known| known.0.get(name)) {
            Some(members) => members.iter().cloned().collect(),
            None if guests.is_empty() => vec![name.clone()],
            None => guests.clone(),
        };
        let mut group = GroupFacts::default();
        for guest in &members {
            let source = view.guests.iter().find(|view| view.name == *guest);
            let target = view.standbys.iter().find(|view| view.name == *guest);
            if source.is_none() && target.is_none() {
                continue;
            }
            group.guests.insert(guest.clone());
            let point = source
                .map(|view| view.newest_point)
                .or(target.map(|view| view.newest_point));
            let rpo = source
                .and_then(|view| view.rpo_ms)
                .or(target.and_then(|view| view.rpo_ms));
            // The group has no point that one of its guests lacks; it is as old as its oldest.
            group.newest_point = match (group.newest_point, point) {
                (Some(known), Some(point)) => Some(known.min(point)),
                (known, point) => known.or(point),
            };
            group.rpo_ms = group.rpo_ms.max(rpo);
            let pause = source
                .and_then(|view| view.last_pause_ms)
                .map(|millis| millis.ceil() as u64);
            group.last_pause_ms = group.last_pause_ms.max(pause);
            group.last_seal_ms = group
                .last_seal_ms
                .max(source.and_then(|view| view.last_seal_ms));
            let rto = target
                .and_then(|view| view.active.as_ref())
                .map(|active| active.times.total.as_millis() as u64);
            group.last_rto_ms = group.last_rto_ms.max(rto);
        }
        if !group.guests.is_empty() {
            facts.groups.insert(name.clone(), group);
        }
    }
    facts
}
