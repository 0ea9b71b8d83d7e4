//! A TOML file -> a [`Runbook`], or all of its mistakes, each with its line.
//!
//! Unlike policies, a runbook is one file and nothing lies over it: what was
//! checked and approved is what runs, at either site.

use std::collections::BTreeMap;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::action::every;
use super::check::{self, Known, Wrong};
use super::fields::{Fields, Reading};
use super::{Action, Kind, MOST_STEPS, Method, Mode, OnError, Readiness, Runbook, Step};
use crate::load;
use crate::mistake::{LARGEST_FILE, LoadError};
use crate::units::Period;

/// What to do where nothing better can be said.
const HELP: &str = "`farhaven runbook export` prints one to begin with";
/// Keys of a runbook.
const KEYS: [&str; 5] = ["name", "description", "modes", "groups", "steps"];
/// Keys of every step.
const STEP_KEYS: [&str; 8] = [
    "name",
    "do",
    "description",
    "group",
    "guests",
    "modes",
    "timeout",
    "on-error",
];

/// Reads and checks a file. With `known`, groups and guests must be those.
///
/// # Errors
/// See [`LoadError`]; mistakes are all reported at once.
pub fn file(path: &Path, known: Option<&Known>) -> Result<Runbook, LoadError> {
    text(path, &load::read(path, HELP)?, known)
}

/// [`file`], with its text as an argument.
///
/// # Errors
/// As [`file`].
pub fn text(path: &Path, text: &str, known: Option<&Known>) -> Result<Runbook, LoadError> {
    if text.len() as u64 > LARGEST_FILE {
        return Err(LoadError::TooLarge {
            path: path.to_owned(),
            bytes: text.len() as u64,
        });
    }
    let mut reading = Reading::new(path, text);
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in &errors {
        let line = reading.line_of(error.span().map_or(0, |span| span.start));
        let what = format!("not TOML: {}", error.message());
        reading.mistake(line, "", what, None);
    }
    if !errors.is_empty() {
        return Err(LoadError::Mistakes(reading.mistakes));
    }
    let found = runbook(&mut reading, table.get_ref());
    // What seems to be wrong with what is mistaken anyway is not told twice, and
    // an order is only judged when every step is known.
    let told: Vec<String> = reading
        .mistakes
        .iter()
        .flat_map(|mistake| [Some(mistake.key.clone()), mistake.meant.clone()])
        .flatten()
        .collect();
    let follows = |key: &str| told.iter().any(|told| told == key);
    for Wrong { step, key, what } in check::values(&found.runbook, known).into_iter().chain(
        found
            .whole
            .then(|| check::order(&found.runbook))
            .into_iter()
            .flatten(),
    ) {
        let (line, full) = found.place(step, &key);
        if !follows(&full) {
            reading.mistake(line, &full, format!("'{full}' {what}"), None);
        }
    }
    let mut mistakes = reading.mistakes;
    if mistakes.is_empty() {
        return Ok(found.runbook);
    }
    mistakes.sort_by_key(|mistake| mistake.origin.rank());
    Err(LoadError::Mistakes(mistakes))
}

struct Found {
    runbook: Runbook,
    lines: BTreeMap<String, usize>,
    steps: Vec<StepLines>,
    /// No step, and nothing that an order hangs on, was left out.
    whole: bool,
}

struct StepLines {
    line: usize,
    prefix: String,
    keys: BTreeMap<String, usize>,
}

impl Found {
    /// Where to look for a key, and its full name.
    fn place(&self, step: Option<usize>, key: &str) -> (usize, String) {
        match step.and_then(|index| self.steps.get(index)) {
            Some(step) => (
                step.keys.get(key).copied().unwrap_or(step.line),
                format!("{}.{key}", step.prefix),
            ),
            None => {
                let table = key.split('.').next().unwrap_or_default();
                let line = self.lines.get(key).or_else(|| self.lines.get(table));
                (line.copied().unwrap_or(1), key.to_owned())
            }
        }
    }
}

fn words<T: Copy, const N: usize>(
    all: [T; N],
    word: fn(T) -> &'static str,
) -> [(&'static str, T); N] {
    all.map(|choice| (word(choice), choice))
}

fn runbook(reading: &mut Reading<'_>, table: &DeTable<'_>) -> Found {
    let mut fields = Fields::new(reading, String::new(), table);
    let modes = fields.choices(reading, "modes", &words(Mode::ALL, Mode::word));
    let mut found = Found {
        runbook: Runbook {
            name: fields.text(reading, "name").unwrap_or_default(),
            description: fields.text(reading, "description").unwrap_or_default(),
            modes: modes.map_or(Mode::ALL.into(), |modes| modes.into_iter().collect()),
            groups: fields.list_table(reading, "groups").unwrap_or_default(),
            steps: Vec::new(),
        },
        lines: BTreeMap::new(),
        steps: Vec::new(),
        whole: true,
    };
    if let Some((line, value)) = fields.raw("steps") {
        match value.get_ref() {
            DeValue::Array(items) if items.len() <= MOST_STEPS => {
                for (index, item) in items.iter().enumerate() {
                    let line = reading.line_of(item.span().start);
                    match item.get_ref() {
                        DeValue::Table(table) => step(reading, &mut found, index, line, table),
                        _ => {
                            let key = format!("steps[{}]", index + 1);
                            let what =
                                format!("'{key}' is no table; begin each step with [[steps]]");
                            reading.mistake(line, &key, what, None);
                            found.whole = false;
                        }
                    }
                }
            }
            DeValue::Array(items) => {
                let count = items.len();
                let what = format!("'steps' has {count} steps; at most {MOST_STEPS} can be run");
                reading.mistake(line, "steps", what, None);
                found.whole = false;
            }
            _ => {
                let what = "'steps' is no list of tables; begin each step with [[steps]]";
                reading.mistake(line, "steps", what.to_owned(), None);
                found.whole = false;
            }
        }
    }
    let of_steps = |key: &str| {
        STEP_KEYS
            .contains(&key)
            .then(|| format!("'{key}' belongs to a step: put it under [[steps]]"))
    };
    found.lines = fields.finish(reading, &KEYS, &of_steps);
    found
}

fn step(
    reading: &mut Reading<'_>,
    found: &mut Found,
    index: usize,
    line: usize,
    table: &DeTable<'_>,
) {
    let mut fields = Fields::new(reading, String::new(), table);
    fields.prefix = match fields.peek_text("name") {
        Some(name) if check::is_name(name) => format!("steps.{name}"),
        _ => format!("steps[{}]", index + 1),
    };
    let before = reading.mistakes.len();
    let name = fields.text(reading, "name").unwrap_or_default();
    let given_kind = fields.lines.contains_key("do");
    let kind = fields.choice(reading, "do", &words(Kind::ALL, Kind::word));
    if !given_kind {
        let full = fields.full("do");
        let all = Kind::ALL.map(Kind::word).join(", ");
        reading.mistake(
            line,
            &full,
            format!("'{full}' is missing; say what it does, one of {all}"),
            None,
        );
    }
    let modes = fields.choices(reading, "modes", &words(Mode::ALL, Mode::word));
    let group = fields.text(reading, "group");
    let guests = fields.texts(reading, "guests").unwrap_or_default();
    let on_error = fields.choice(reading, "on-error", &words(OnError::ALL, OnError::word));
    if reading.mistakes.len() > before {
        found.whole = false;
    }
    let description = fields.text(reading, "description").unwrap_or_default();
    let timeout = fields.period(reading, "timeout");
    let prefix = fields.prefix.clone();
    let Some(kind) = kind else {
        // Its keys cannot be judged without its kind.
        found.whole = false;
        return;
    };
    let action = action(reading, &mut fields, kind, line);
    let known: Vec<&str> = STEP_KEYS
        .into_iter()
        .chain(kind.keys().iter().copied())
        .collect();
    let elsewhere = |key: &str| {
        let theirs: Vec<_> = Kind::ALL
            .into_iter()
            .filter(|kind| kind.keys().contains(&key))
            .map(Kind::word)
            .collect();
        (!theirs.is_empty())
            .then(|| format!("{} has it, {} does not", theirs.join(" and "), kind.word()))
    };
    let keys = fields.finish(reading, &known, &elsewhere);
    let Some(action) = action else {
        found.whole = false;
        return;
    };
    found.steps.push(StepLines { line, prefix, keys });
    found.runbook.steps.push(Step {
        name,
        action,
        description,
        group,
        guests,
        modes: modes.map(|modes| modes.into_iter().collect()),
        timeout,
        on_error: on_error.unwrap_or_default(),
    });
}

/// The keys of its kind; None when one that it cannot be without is missing or mistaken.
fn action(
    reading: &mut Reading<'_>,
    fields: &mut Fields<'_>,
    kind: Kind,
    line: usize,
) -> Option<Action> {
    let must = |reading: &mut Reading<'_>, fields: &Fields<'_>, key: &str, like: &str| {
        if !fields.lines.contains_key(key) {
            let full = fields.full(key);
            reading.mistake(line, &full, format!("'{full}' is missing; {like}"), None);
        }
    };
    Some(match kind {
        Kind::Check => Action::Check {
            checks: fields
                .choices(reading, "checks", &words(Readiness::ALL, Readiness::word))
                .unwrap_or_default(),
        },
        Kind::Approve => {
            must(
                reading,
                fields,
                "by",
                "name who may decide, like by = [\"anna\", \"ben\"], or [\"*\"] for whoever operates the site",
            );
            let by = fields.texts(reading, "by");
            let approvals = fields.number(reading, "approvals").unwrap_or(1);
            let message = fields.text(reading, "message").unwrap_or_default();
            Action::Approve {
                by: by?,
                approvals,
                message,
            }
        }
        Kind::Quiesce => Action::Quiesce,
        Kind::ShutdownSource => Action::ShutdownSource,
        Kind::FinalSync => Action::FinalSync,
        Kind::Fence => Action::Fence,
        Kind::Promote => Action::Promote {
            point: fields.point(reading, "point").unwrap_or_default(),
        },
        Kind::Remap => Action::Remap {
            networks: fields.text_table(reading, "networks").unwrap_or_default(),
        },
        Kind::StartGroup => Action::StartGroup,
        Kind::WaitHealthy => Action::WaitHealthy {
            tcp: fields.text(reading, "tcp"),
            http: fields.text(reading, "http"),
            agent: fields.truth(reading, "agent"),
            script: fields.texts(reading, "script"),
            every: fields.period(reading, "every").unwrap_or(every()),
        },
        Kind::Exec => {
            must(
                reading,
                fields,
                "run",
                "give a program and its arguments, like run = [\"/usr/local/bin/switch-dns\", \"munich\"]",
            );
            let run = fields.texts(reading, "run");
            let undo = fields.texts(reading, "undo").unwrap_or_default();
            let repeatable = fields.truth(reading, "repeatable").unwrap_or_default();
            Action::Exec {
                run: run?,
                undo,
                repeatable,
            }
        }
        Kind::Webhook => {
            must(
                reading,
                fields,
                "url",
                "give where to call, like url = \"https://chat.example.com/hook\"",
            );
            let url = fields.text(reading, "url");
            let method = fields.choice(reading, "method", &words(Method::ALL, Method::word));
            let body = fields.text(reading, "body").unwrap_or_default();
            let undo = fields.text(reading, "undo");
            let repeatable = fields.truth(reading, "repeatable").unwrap_or_default();
            Action::Webhook {
                url: url?,
                method: method.unwrap_or_default(),
                body,
                undo,
                repeatable,
            }
        }
        Kind::Delay => {
            must(reading, fields, "for", "say how long, like for = \"30s\"");
            let period: Option<Period> = fields.period(reading, "for");
            Action::Delay { period: period? }
        }
        Kind::Commit => Action::Commit,
        Kind::Rollback => Action::Rollback,
        Kind::Reprotect => Action::Reprotect,
        Kind::Cleanup => Action::Cleanup,
    })
}
