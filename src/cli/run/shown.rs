//! A run on the screen, at once or until it is over.

use std::io::IsTerminal;
use std::time::Duration;

use farhaven_policies::runbook::run::{Answer, Back, Forward, Outcome, StepView};
use farhaven_policies::units::Period;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::super::{Failure, print_json, told};
use super::path;
use crate::client::{Client, ClientError};
use crate::site::runs::view::RunView;

/// How often a run is looked at that is followed.
const LOOK: Duration = Duration::from_millis(250);

/// A daemon that does not answer is waited for so many looks: a minute.
const SILENT: u32 = 240;

/// Exit status of `--follow` where the run did not do all that it was to do.
const EXIT_NOT_DONE: u8 = 4;

/// A run in full, for people.
pub(super) fn print(view: &RunView) {
    say!("{}: {}", view.id, view.standing);
    let mode = view.mode.map_or("?".to_owned(), |mode| mode.to_string());
    say!(
        "  '{}' in {mode} mode, started by {} at {}",
        view.runbook,
        view.by,
        at(view.started)
    );
    let widest = view.steps.iter().map(|step| step.name.len()).max();
    for step in &view.steps {
        say!("  {}", line(step, widest.unwrap_or(0)));
    }
    for word in waits(view) {
        say!("{word}");
    }
}

/// What a person can do about it now.
fn waits(view: &RunView) -> Vec<String> {
    let mut words = Vec::new();
    if let Some(awaits) = &view.awaits {
        if !awaits.message.is_empty() {
            words.push(awaits.message.clone());
        }
        words.push(format!(
            "{} more of {} must agree until {}: farhaven approve {} {} --as NAME",
            awaits.missing,
            awaits.by.join(", "),
            at(awaits.until),
            view.id,
            awaits.step
        ));
    }
    if let Some(question) = &view.question {
        let answers: Vec<&str> = question
            .answers
            .iter()
            .map(|answer| word(*answer))
            .collect();
        let interrupted = if question.interrupted {
            " (it was interrupted: whether it was done is not known)"
        } else {
            ""
        };
        words.push(format!("{}{interrupted}", question.why));
        words.push(format!(
            "Decide: farhaven run decide {} {}",
            view.id,
            answers.join("|")
        ));
    }
    words
}

fn word(answer: Answer) -> &'static str {
    match answer {
        Answer::Repeat => "repeat",
        Answer::TakeAsDone => "take-as-done",
        Answer::Rollback => "rollback",
        Answer::End => "end",
    }
}

fn state(step: &StepView) -> (&'static str, &'static str) {
    match (step.back, step.forward) {
        (Back::Undone, _) => ("<", "undone"),
        (Back::Running | Back::SourceAwaited, _) => ("<", "being undone"),
        (Back::Failed, _) => ("!", "not undone"),
        (Back::Standing, Forward::Ahead) => (" ", ""),
        (Back::Standing, Forward::Skipped) => ("-", "left out"),
        (Back::Standing, Forward::Running) => (">", "under way"),
        (Back::Standing, Forward::SourceAwaited) => ("~", "waits for the other site"),
        (Back::Standing, Forward::Done) => ("+", "done"),
        (Back::Standing, Forward::Failed { .. }) => ("!", "failed"),
    }
}

fn line(step: &StepView, widest: usize) -> String {
    let (mark, words) = state(step);
    let took = match (step.begun, step.ended) {
        (Some(begun), Some(ended)) => {
            Period::from_millis(ended.0.saturating_sub(begun.0)).to_string()
        }
        _ => String::new(),
    };
    let said = step.words().replace('\n', " / ");
    let name = &step.name;
    let line = format!(
        "{mark} {name:widest$}  {:15}  {words:8} {took:>8}  {said}",
        step.kind.word()
    );
    line.trim_end().to_owned()
}

pub(super) fn at(millis: u64) -> String {
    let at = i64::try_from(millis).ok();
    let at = at.and_then(|millis| jiff::Timestamp::from_millisecond(millis).ok());
    at.map_or("?".to_owned(), |at| {
        at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
    })
}

/// Shows a run until it is over: in place on a terminal, else a line for each change.
pub(super) async fn follow(client: &Client, mut view: RunView, json: bool) -> Result<(), Failure> {
    let screen = (std::io::stderr().is_terminal() && !json).then(Screen::new);
    let mut told_lines: Vec<String> = Vec::new();
    let mut silent = 0;
    loop {
        match &screen {
            Some(screen) => screen.show(&view),
            None if !json => changes(&view, &mut told_lines),
            None => {}
        }
        if view.outcome.is_some() {
            break;
        }
        tokio::time::sleep(LOOK).await;
        match client.get(&path(&view.id, "")).await {
            Ok(now) => (view, silent) = (now, 0),
            // A daemon that is started anew goes on with it.
            Err(ClientError::Connect { .. } | ClientError::Broken { .. }) if silent < SILENT => {
                silent += 1;
            }
            Err(error) => return Err(told(error).into()),
        }
    }
    drop(screen);
    match json {
        true => print_json(&view)?,
        false => print(&view),
    }
    match view.outcome {
        Some(Outcome::Succeeded) => Ok(()),
        outcome => Err(Failure {
            why: format!(
                "the run {}; see farhaven report {}",
                outcome.map_or("goes on".to_owned(), |outcome| outcome.to_string()),
                view.id
            ),
            status: EXIT_NOT_DONE,
        }),
    }
}

/// Lines that were not told yet.
fn changes(view: &RunView, before: &mut Vec<String>) {
    let widest = view.steps.iter().map(|step| step.name.len()).max();
    let steps = view
        .steps
        .iter()
        .filter(|step| step.forward != Forward::Ahead);
    let lines = steps.map(|step| line(step, widest.unwrap_or(0)));
    let lines: Vec<String> = lines.chain(waits(view)).collect();
    for line in lines.iter().filter(|line| !before.contains(line)) {
        eprintln!("{line}");
    }
    before.extend(lines);
}

/// One line for each step, in place.
struct Screen {
    all: MultiProgress,
    lines: std::cell::RefCell<Vec<ProgressBar>>,
}

impl Screen {
    fn new() -> Self {
        Self {
            all: MultiProgress::new(),
            lines: std::cell::RefCell::default(),
        }
    }

    fn show(&self, view: &RunView) {
        let widest = view.steps.iter().map(|step| step.name.len()).max();
        let steps = view.steps.iter().map(|step| {
            let turning = matches!(step.forward, Forward::Running | Forward::SourceAwaited)
                || matches!(step.back, Back::Running | Back::SourceAwaited);
            (line(step, widest.unwrap_or(0)), turning)
        });
        let words = waits(view).into_iter().map(|word| (word, false));
        let title = (format!("{}: {}", view.id, view.standing), false);
        let wanted: Vec<_> = std::iter::once(title).chain(steps).chain(words).collect();
        let mut lines = self.lines.borrow_mut();
        while lines.len() < wanted.len() {
            lines.push(self.all.add(ProgressBar::new_spinner()));
        }
        for bar in lines.drain(wanted.len()..) {
            bar.finish_and_clear();
        }
        for (bar, (text, turning)) in lines.iter().zip(wanted) {
            let template = if turning {
                "{spinner} {wide_msg} {elapsed}"
            } else {
                "  {wide_msg}"
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.set_message(text);
            bar.tick();
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        for bar in self.lines.borrow().iter() {
            bar.finish_and_clear();
        }
        let _ = self.all.clear();
    }
}
