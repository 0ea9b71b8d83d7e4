//! Orders that go on by themselves, and are spoken to meanwhile: runs of runbooks,
//! and evacuations.

use std::sync::Arc;
use std::time::Duration;

use farhaven::site::Site;
use farhaven::site::evacuate;
use farhaven::site::runs::start::StartRun;
use farhaven_policies::runbook::Mode;
use farhaven_policies::runbook::run::{Answer, Event};
use rand::Rng;
use rand::rngs::StdRng;

/// How often it is looked how a run stands.
const LOOK: Duration = Duration::from_millis(200);

/// A runbook, and what it is run for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Book {
    Planned { agrees: bool, turns: bool },
    Unplanned { force: bool, commits: bool },
    Drill,
}

/// What a person says to what is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    Approve,
    Refuse,
    Pause,
    GoOn,
    Abort { rollback: bool },
    Answer(Answer),
}

impl Book {
    pub fn by_chance(random: &mut StdRng) -> Book {
        match random.random_range(0..10) {
            0..5 => Book::Planned {
                agrees: random.random_bool(0.5),
                turns: random.random_bool(0.3),
            },
            5..9 => Book::Unplanned {
                force: random.random_bool(0.5),
                commits: random.random_bool(0.3),
            },
            _ => Book::Drill,
        }
    }

    fn mode(self) -> Mode {
        match self {
            Book::Planned { .. } => Mode::Planned,
            Book::Unplanned { .. } => Mode::Unplanned,
            Book::Drill => Mode::Test,
        }
    }

    /// Its text, for a guest or a group.
    fn text(self, target: &str) -> String {
        let mut text = format!(
            "name = \"book\"\nmodes = [\"{}\"]\n[groups]\n{target} = []\n",
            self.mode()
        );
        let mut step = |what: &str, more: &str| {
            text.push_str(&format!(
                "[[steps]]\nname = \"{what}\"\ndo = \"{what}\"\n{more}\n"
            ));
        };
        let undone = "timeout = \"20s\"\non-error = \"rollback\"";
        match self {
            Book::Planned { agrees, turns } => {
                step("final-sync", undone);
                if agrees {
                    step(
                        "approve",
                        "by = [\"*\"]\ntimeout = \"15s\"\non-error = \"rollback\"",
                    );
                }
                step("promote", undone);
                step("start-group", undone);
                step("delay", "for = \"4s\"");
                if turns {
                    step("commit", "on-error = \"continue\"");
                    step("reprotect", "timeout = \"20s\"\non-error = \"continue\"");
                }
            }
            Book::Unplanned { commits, .. } => {
                step("fence", "timeout = \"40s\"");
                step("promote", "timeout = \"20s\"");
                step("start-group", "timeout = \"20s\"");
                step("delay", "for = \"4s\"");
                if commits {
                    step("commit", "on-error = \"continue\"");
                }
            }
            Book::Drill => {
                step("promote", "on-error = \"rollback\"");
                step("start-group", "on-error = \"rollback\"");
                step("delay", "for = \"3s\"");
                step("cleanup", "");
            }
        }
        text
    }
}

impl Word {
    pub fn by_chance(random: &mut StdRng) -> Word {
        match random.random_range(0..20) {
            0..6 => Word::Approve,
            6 => Word::Refuse,
            7 => Word::Pause,
            8..10 => Word::GoOn,
            10..13 => Word::Abort { rollback: true },
            13 => Word::Abort { rollback: false },
            14..17 => Word::Answer(Answer::Repeat),
            17..19 => Word::Answer(Answer::Rollback),
            _ => Word::Answer(Answer::End),
        }
    }

    fn event(self) -> Event {
        match self {
            Word::Approve => Event::Approved {
                comment: String::new(),
            },
            Word::Refuse => Event::Refused {
                why: "not now".to_owned(),
            },
            Word::Pause => Event::Paused,
            Word::GoOn => Event::Continued,
            Word::Abort { rollback } => Event::Aborted { rollback },
            Word::Answer(answer) => Event::Answered { answer },
        }
    }
}

/// Runs it to its end; how it ended.
pub async fn conduct(site: &Arc<Site>, target: &str, book: Book) -> Result<String, String> {
    let start = StartRun {
        text: book.text(target),
        mode: book.mode(),
        point: None,
        by: "somebody".to_owned(),
        force: matches!(book, Book::Unplanned { force: true, .. }),
    };
    let started = site.start_run(start).await.map_err(|why| why.to_string())?;
    loop {
        let view = site.run(&started.id).map_err(|why| why.to_string())?;
        if let Some(outcome) = view.outcome {
            return Ok(outcome.to_string());
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Says it to the newest run that goes on here.
pub async fn say(site: &Arc<Site>, word: Word) -> Result<String, String> {
    let runs = site.runs();
    let open = runs.iter().find(|run| run.outcome.is_none());
    let run = open.ok_or("no run goes on here")?;
    let step = match word {
        Word::Approve | Word::Refuse => run.awaits.as_ref().map(|awaits| awaits.step.as_str()),
        _ => None,
    };
    let said = site.tell_run(&run.id, "somebody", step, word.event()).await;
    said.map(|view| view.standing)
        .map_err(|why| why.to_string())
}

/// Everything off this site.
pub async fn evacuate(site: &Arc<Site>, to: &str) -> Result<String, String> {
    let order = evacuate::Order {
        to: to.to_owned(),
        accept_pause: true,
        partial: true,
        ..evacuate::Order::default()
    };
    let begun = site.begin_evacuation(&order).await;
    let number = begun.map_err(|why| why.to_string())?.id;
    loop {
        let record = site.evacuation(Some(number));
        let state = record.map_err(|why| why.to_string())?.state;
        if state.is_over() {
            return Ok(state.words().to_owned());
        }
        tokio::time::sleep(LOOK).await;
    }
}
