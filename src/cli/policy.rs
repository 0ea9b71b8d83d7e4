//! `farhaven policy`: checks policy files, shows what is in force, describes them
//! to editors.

use std::path::PathBuf;

use clap::Subcommand;
use farhaven_policies::files::{PolicyFiles, show};
use farhaven_policies::load::{LoadError, Mistake, Origin};
use serde::Serialize;

use super::{Outcome, escaped, print_json, told};
use crate::client::Client;

#[derive(Debug, Subcommand)]
pub(super) enum PolicyVerb {
    /// Find every mistake in a policy file, or in a directory of them.
    Check {
        /// A file, or a directory whose .toml files are laid over each other by name.
        #[arg(value_name = "FILE|DIR")]
        path: PathBuf,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show what is in force for a group, and where each value comes from.
    Show {
        /// The group.
        group: String,
        /// What a file, or a directory of them, says; else what the site's daemon goes by.
        #[arg(long, value_name = "FILE|DIR")]
        policies: Option<PathBuf>,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print the JSON Schema of policy files, for editors.
    Schema,
}

/// The result of a check, for programs.
#[derive(Debug, Serialize)]
struct Checked {
    sound: bool,
    groups: usize,
    mistakes: Vec<MistakeView>,
}

#[derive(Debug, Serialize)]
pub(super) struct MistakeView {
    file: Option<PathBuf>,
    line: Option<usize>,
    variable: Option<String>,
    key: String,
    what: String,
    meant: Option<String>,
}

impl From<Mistake> for MistakeView {
    fn from(mistake: Mistake) -> MistakeView {
        let (file, line, variable) = match mistake.origin {
            Origin::Line(file, line) => (Some(file), Some(line), None),
            Origin::Path(file) => (Some(file), None, None),
            Origin::Variable(name) => (None, None, Some(name)),
            Origin::Flag(_) | Origin::Defaults => (None, None, None),
        };
        MistakeView {
            file,
            line,
            variable,
            key: mistake.key,
            what: mistake.what,
            meant: mistake.meant,
        }
    }
}

pub(super) async fn run(client: &Client, verb: PolicyVerb) -> Outcome {
    match verb {
        PolicyVerb::Check { path, json } => check(&path, json),
        PolicyVerb::Show {
            group,
            policies,
            json,
        } => {
            let shown = match policies {
                Some(path) => {
                    let loaded = PolicyFiles::read(&path).map_err(told)?;
                    show::show(&loaded, &group).map_err(told)?
                }
                None => {
                    let path = format!("/v1/groups/{}/policy", escaped(&group));
                    client.get(&path).await.map_err(told)?
                }
            };
            if json {
                return print_json(&shown);
            }
            put!("{}", show::text(&shown));
            Ok(())
        }
        PolicyVerb::Schema => print_json(&PolicyFiles::schema()),
    }
}

fn check(path: &std::path::Path, json: bool) -> Outcome {
    let (groups, mistakes) = match PolicyFiles::read(path) {
        Ok(loaded) => (loaded.value.groups.len(), Vec::new()),
        Err(LoadError::Mistakes(mistakes)) => (0, mistakes),
        Err(other) => return Err(told(other)),
    };
    let count = mistakes.len();
    if json {
        print_json(&Checked {
            sound: count == 0,
            groups,
            mistakes: mistakes.into_iter().map(MistakeView::from).collect(),
        })?;
    } else {
        mistakes.iter().for_each(|mistake| say!("{mistake}"));
    }
    match count {
        0 if json => Ok(()),
        0 => {
            say!("no mistakes; groups: {groups}");
            Ok(())
        }
        1 => Err("1 mistake; nothing of this would be used".into()),
        count => Err(format!("{count} mistakes; nothing of this would be used")),
    }
}
