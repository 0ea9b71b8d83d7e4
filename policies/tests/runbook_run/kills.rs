//! A conductor that is killed at every boundary, and one that is not, come to the
//! same end, over a world that keeps what was done to it.

use super::*;

/// What the steps did to the world: effects by their keys, each at most once.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct World {
    /// Step by step: whether it stands.
    stands: BTreeMap<String, bool>,
    /// Of what may not be repeated: how often it was done.
    paid: BTreeMap<String, u32>,
}

impl World {
    fn perform(&mut self, attempt: &Attempt) {
        self.stands.insert(attempt.step.name.clone(), !attempt.undo);
        if !attempt.step.action.is_repeatable() {
            *self.paid.entry(attempt.key.clone()).or_default() += 1;
        }
    }
}

/// Where a conductor is killed within a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Killed {
    /// After the begin is recorded, before the effect.
    Begun,
    /// After the effect, before its end is recorded.
    Done,
    /// After the end is recorded.
    Recorded,
}

/// Conducts a run; a step of `fails` fails as often as it is begun under a new key.
/// Before each record it is killed as `kill` says, and the run goes on from the log.
fn conduct(
    plan: &Plan,
    fails: &BTreeSet<(String, bool)>,
    kill: &dyn Fn(usize) -> Option<Killed>,
) -> (Run, World) {
    let mut kept = Kept::new(plan.clone());
    let (mut world, mut begun) = (World::default(), 0);
    let mut asked = 0;
    for _ in 0..2_000 {
        let restart = |kept: &mut Kept| {
            kept.run = Run::resume(&kept.log).unwrap();
            kept.tell(None, Event::Restarted).unwrap();
        };
        match kept.next() {
            Next::Over(_) => return (kept.run, world),
            Next::Begin(attempt) => {
                let killed = kill(begun);
                begun += 1;
                kept.tell(None, attempt.begun()).unwrap();
                if matches!(attempt.step.action.kind(), Kind::Approve | Kind::Delay) {
                    if killed.is_some() {
                        restart(&mut kept);
                    }
                    continue;
                }
                if killed == Some(Killed::Begun) {
                    restart(&mut kept);
                    // A person looks, and sees that it was not done.
                    if matches!(kept.next(), Next::Ask(_)) {
                        kept.tell(
                            Some("anna"),
                            Event::Answered {
                                answer: Answer::Repeat,
                            },
                        )
                        .unwrap();
                    }
                    continue;
                }
                let failing = fails.contains(&(attempt.step.name.clone(), attempt.undo));
                world.perform(&attempt);
                if killed == Some(Killed::Done) {
                    restart(&mut kept);
                    // A person looks, and sees that it was done, or that it failed.
                    if !matches!(kept.next(), Next::Ask(_)) {
                        continue;
                    }
                    if !failing {
                        kept.tell(
                            Some("anna"),
                            Event::Answered {
                                answer: Answer::TakeAsDone,
                            },
                        )
                        .unwrap();
                        continue;
                    }
                    // Told to repeat, it fails at once: the receiver knows the key.
                    kept.tell(
                        Some("anna"),
                        Event::Answered {
                            answer: Answer::Repeat,
                        },
                    )
                    .unwrap();
                    let Next::Begin(again) = kept.next() else {
                        panic!()
                    };
                    assert_eq!(again.key, attempt.key);
                    kept.tell(None, again.begun()).unwrap();
                }
                let end = if failing {
                    fault(Cause::Fault)
                } else {
                    Event::Done {
                        note: String::new(),
                    }
                };
                kept.tell(None, end).unwrap();
                if killed == Some(Killed::Recorded) {
                    restart(&mut kept);
                }
            }
            Next::Ask(question) => {
                // The same person, the same answers.
                asked += 1;
                let answer = match (asked, question.undo) {
                    (_, true) => Answer::TakeAsDone,
                    (1, _) if question.answers.contains(&Answer::Rollback) => Answer::Rollback,
                    _ => Answer::End,
                };
                kept.tell(Some("anna"), Event::Answered { answer }).unwrap();
            }
            next => kept.well(next),
        }
        kept.pass(1);
    }
    panic!("it does not end");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// The figure of the issue: a run killed at every boundary of every step, one at
    /// a time and all of them, ends as one that was not killed: every step, the
    /// outcome, and the world that it leaves.
    #[test]
    fn killed_at_every_boundary_it_ends_as_if_not(
        runbook in made::sound_runbook(),
        fails in proptest::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 0..3),
    ) {
        let plan = planned(&runbook);
        let fails: BTreeSet<(String, bool)> = fails.into_iter().map(|(index, undo)| (index.get(&runbook.steps).name.clone(), undo)).collect();
        let (whole, world) = conduct(&plan, &fails, &|_| None);
        let boundaries = 2 * runbook.steps.len() + 2;
        for how in [Killed::Begun, Killed::Done, Killed::Recorded] {
            for boundary in 0..boundaries {
                let (run, left) = conduct(&plan, &fails, &|begun| (begun == boundary).then_some(how));
                prop_assert_eq!(run.ends(), whole.ends(), "{:?} at {}", how, boundary);
                prop_assert_eq!(&left, &world, "{:?} at {}", how, boundary);
            }
        }
        // At every one, but for those that never get anywhere then.
        let (run, left) = conduct(&plan, &fails, &|begun| match begun % 3 {
            0 => Some(Killed::Recorded),
            1 => Some(Killed::Done),
            _ => None,
        });
        prop_assert_eq!(run.ends(), whole.ends());
        prop_assert_eq!(&left, &world);
    }
}
