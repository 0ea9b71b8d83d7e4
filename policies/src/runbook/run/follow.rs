//! What follows: of an end, a failure, a person's word or a restart; and the
//! way back, on which what may have changed something is undone, the last first.

use super::super::plan::PlannedStep;
use super::super::{Action, Kind, OnError};
use super::event::cut;
use super::state::{Back, Direction, Forward, Progress, Refused, State, refused};
use super::{Answer, Moment, Outcome, Question, Run};

impl Run {
    pub(super) fn done(&mut self, at: Moment, note: &str) {
        self.close(at, note);
        self.stain(true);
        self.mark(Forward::Done, Back::Undone);
        self.advance();
    }

    /// The step at hand may have changed something. Answers whether none of its attempts did.
    fn stain(&mut self, changed: bool) -> bool {
        match self.progress.get_mut(self.cursor) {
            Some(progress) => {
                progress.stained |= changed;
                !progress.stained
            }
            None => true,
        }
    }

    /// The attempt at hand is over.
    fn close(&mut self, at: Moment, said: &str) {
        let direction = self.direction;
        if let Some(progress) = self.progress.get_mut(self.cursor) {
            progress.deadline = None;
            progress.ended = Some(at);
            let words = progress.words(direction);
            *words = said.to_owned();
            cut(words);
        }
    }

    pub(super) fn failed(&mut self, at: Moment, why: &str, clean: bool) {
        self.close(at, why);
        let clean = self.stain(!clean);
        self.mark(Forward::Failed { clean }, Back::Failed);
        let on_error = self.at_hand().map(|(planned, _)| planned.step.on_error);
        match (self.direction, on_error) {
            (Direction::Forward, Some(OnError::Continue)) => self.advance(),
            (Direction::Forward, Some(OnError::Rollback)) if self.committed().is_none() => {
                self.turn_back()
            }
            _ => self.ask(why, false),
        }
    }

    fn ask(&mut self, why: &str, interrupted: bool) {
        let undo = self.direction == Direction::Back;
        let Some((planned, _)) = self.at_hand() else {
            return;
        };
        let mut answers = vec![Answer::Repeat];
        // What named people must decide is not taken as decided by others.
        if !matches!(planned.step.action, Action::Approve { .. }) || undo {
            answers.push(Answer::TakeAsDone);
        }
        if !undo && self.committed().is_none() {
            answers.push(Answer::Rollback);
        }
        answers.push(Answer::End);
        self.question = Some(Question {
            step: planned.step.name.clone(),
            undo,
            interrupted,
            why: why.to_owned(),
            answers,
        });
    }

    pub(super) fn abort(&mut self, at: Moment, rollback: bool) -> Result<(), Refused> {
        if rollback && self.direction == Direction::Back {
            return refused("the rollback is under way already");
        }
        if let (true, Some(commit)) = (rollback, self.committed()) {
            return refused(format!(
                "'{commit}' was begun, and there is no way back from a commit; abort without a rollback"
            ));
        }
        let direction = self.direction;
        let (planned, progress) = self.hand()?;
        let by_itself = matches!(planned.step.action.kind(), Kind::Approve | Kind::Delay);
        let touched = !matches!(progress.state(direction), State::Ready);
        let interrupted = self
            .question
            .take()
            .is_some_and(|question| question.interrupted);
        if touched || interrupted {
            self.close(at, "aborted; what it did is not known");
            let clean = self.stain(!by_itself);
            self.mark(Forward::Failed { clean }, Back::Failed);
        }
        self.paused = false;
        match rollback {
            true => self.turn_back(),
            false => self.ending = Some(Outcome::Stopped),
        }
        Ok(())
    }

    pub(super) fn answer(&mut self, at: Moment, answer: Answer) -> Result<(), Refused> {
        let Some(question) = self.question.as_ref() else {
            return refused("nothing is asked");
        };
        if !question.answers.contains(&answer) {
            return refused("that is no answer to what is asked");
        }
        let interrupted = question.interrupted;
        let direction = self.direction;
        let (_, progress) = self.hand()?;
        match answer {
            Answer::Repeat => {
                let round = match direction {
                    Direction::Forward => &mut progress.round,
                    Direction::Back => &mut progress.undo_round,
                };
                // Of what may have been done, the receiver must know the key again.
                *round = round.saturating_add(u32::from(!interrupted));
                progress.deadline = None;
                progress.approvals.clear();
                progress.ended = None;
                self.question = None;
                self.mark(Forward::Ahead, Back::Standing);
            }
            Answer::TakeAsDone => {
                self.question = None;
                self.done(at, "taken as done");
            }
            Answer::Rollback | Answer::End => {
                self.question = None;
                if interrupted {
                    self.close(at, "interrupted; what it did is not known");
                    self.mark(Forward::Failed { clean: false }, Back::Failed);
                }
                match answer {
                    Answer::Rollback => self.turn_back(),
                    _ => self.ending = Some(Outcome::Stopped),
                }
            }
        }
        Ok(())
    }

    /// What was under way is not any more, and nobody knows how far it came.
    pub(super) fn restarted(&mut self, at: Moment) {
        let under_way =
            |progress: &Progress| !matches!(progress.state(self.direction), State::Ready);
        let asked = self.question.is_some();
        let Some((planned, _)) = self
            .at_hand()
            .filter(|(_, progress)| !asked && under_way(progress))
        else {
            return;
        };
        let action = &planned.step.action;
        if matches!(action.kind(), Kind::Approve | Kind::Delay) {
            return;
        }
        let repeatable = action.is_repeatable();
        // The outage is not the step's: it gets its whole time again.
        self.close(at, "interrupted by a restart");
        self.stain(true);
        self.mark(Forward::Ahead, Back::Standing);
        if let Some(progress) = self.progress.get_mut(self.cursor) {
            progress.ended = None;
        }
        if !repeatable {
            self.ask(
                "it was under way when the daemon ended; find out whether it was done",
                true,
            );
        }
    }

    /// The step at hand is behind us: on to the next, or to the end.
    pub(super) fn advance(&mut self) {
        if self.direction == Direction::Back {
            return self.back_to_next();
        }
        self.cursor += 1;
        if self.cursor < self.plan.steps.len() {
            return;
        }
        let rolled_back = self
            .plan
            .steps
            .iter()
            .zip(&self.progress)
            .any(|(planned, progress)| {
                planned.step.action == Action::Rollback && progress.forward == Forward::Done
            });
        let failed = |progress: &Progress| matches!(progress.forward, Forward::Failed { .. });
        self.ending = Some(match () {
            () if rolled_back => Outcome::RolledBack,
            () if self.progress.iter().any(failed) => Outcome::SucceededInPart,
            () => Outcome::Succeeded,
        });
    }

    fn turn_back(&mut self) {
        self.direction = Direction::Back;
        self.cursor = self.plan.steps.len();
        self.back_to_next();
    }

    /// The last step before the cursor that has to be undone.
    fn back_to_next(&mut self) {
        let next = (0..self.cursor).rev().find(|index| self.stands(*index));
        match next {
            Some(index) => {
                self.cursor = index;
                if let Some(progress) = self.progress.get_mut(index) {
                    progress.deadline = None;
                }
            }
            None => self.ending = Some(Outcome::RolledBack),
        }
    }

    /// Whether a step was begun, may have changed something, and nothing has undone that yet.
    fn stands(&self, index: usize) -> bool {
        let (Some(planned), Some(progress)) =
            (self.plan.steps.get(index), self.progress.get(index))
        else {
            return false;
        };
        progress.stained
            && progress.back != Back::Undone
            && planned.step.action.undo(self.plan.mode).is_some()
            && !self.taken_back(index, planned)
    }

    /// Whether a rollback or cleanup step after it took its groups back.
    fn taken_back(&self, index: usize, planned: &PlannedStep) -> bool {
        let after = self.plan.steps.iter().zip(&self.progress).skip(index + 1);
        let mut ends = after.filter(|(later, progress)| {
            matches!(later.step.action, Action::Rollback | Action::Cleanup)
                && progress.forward == Forward::Done
        });
        !planned.acts_on.is_empty()
            && ends.any(|(later, _)| {
                planned
                    .acts_on
                    .iter()
                    .all(|group| later.acts_on.contains(group))
            })
    }
}
