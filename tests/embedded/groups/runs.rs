//! Runbooks over a whole group: all guests from one cut, all terms at once.

use super::*;
use farhaven::site::runs::start::StartRun;
use farhaven_policies::runbook::Mode;
use farhaven_policies::runbook::run::{Event, Outcome};

const STEPS: &str = r#"
name = "bank"
modes = ["test", "unplanned"]
[groups]
bank = []
[[steps]]
name = "ready"
do = "check"
[[steps]]
name = "fence"
do = "fence"
[[steps]]
name = "promote"
do = "promote"
[[steps]]
name = "start"
do = "start-group"
[[steps]]
name = "agree"
do = "approve"
by = ["*"]
timeout = "10m"
[[steps]]
name = "cleanup"
do = "cleanup"
"#;

fn start(mode: Mode, text: &str) -> StartRun {
    StartRun {
        text: text.to_owned(),
        mode,
        point: None,
        by: "anna".to_owned(),
        force: true,
    }
}

async fn at(site: &Site, run: &str, step: &str) {
    finally(step, || {
        let view = site.run(run).unwrap();
        assert!(
            view.question.is_none() && view.outcome.is_none(),
            "{view:#?}"
        );
        view.awaits.filter(|awaits| awaits.step == step)
    })
    .await;
}

/// All guests of the run, from points of one cut.
async fn of_one_cut(site: &Arc<Site>, run: &str) {
    let report = site.report(run).unwrap();
    let used: Vec<_> = report
        .guests
        .iter()
        .map(|guest| (guest.guest.clone(), guest.point.unwrap()))
        .collect();
    let whole = site.group_points("bank").await.unwrap();
    let cut = whole.iter().find(|point| {
        let mut all = used.iter();
        all.all(|(guest, number)| point.points.get(guest) == Some(number))
    });
    assert!(cut.is_some(), "{used:?} of {whole:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_takes_a_whole_group_from_one_cut_and_gives_it_back() {
    let bank = Bank::set().await;
    let (east, west) = (bank.stage.east.clone(), bank.stage.west.clone());
    bank.write(&files(GOLD, BANK));
    bank.protected().await;
    finally("a whole point", || bank.group(&west).and_then(|g| g.rpo_ms)).await;
    let other_point = StartRun {
        point: Some(7),
        ..start(Mode::Unplanned, STEPS)
    };
    let refused = west.start_run(other_point).await.unwrap_err();
    assert!(
        refused.to_string().contains("no whole point 7"),
        "{refused}"
    );

    // A test of all of it, while protection goes on.
    let run = west.start_run(start(Mode::Test, STEPS)).await.unwrap().id;
    at(&west, &run, "agree").await;
    of_one_cut(&west, &run).await;
    let refused = west.fail_over_group("bank", force(true)).await.unwrap_err();
    assert!(refused.to_string().contains("run abort"), "{refused}");
    let agreed = Event::Approved {
        comment: String::new(),
    };
    west.tell_run(&run, "anna", Some("agree"), agreed)
        .await
        .unwrap();
    finally("its end", || west.run(&run).unwrap().outcome).await;
    assert_eq!(west.run(&run).unwrap().outcome, Some(Outcome::Succeeded));
    assert!(west.last_good_test("bank").is_some());
    assert!(target(&west, "db").tested_at.is_some());

    let run = west
        .start_run(start(Mode::Unplanned, STEPS))
        .await
        .unwrap()
        .id;
    at(&west, &run, "agree").await;
    of_one_cut(&west, &run).await;
    for name in ["db", "web"] {
        let guest = west.members_of(name).unwrap()[0].guest;
        assert_eq!(west.fence.current(guest).unwrap().owner, west.key());
        assert!(target(&west, name).active.is_some());
        assert_eq!(source(&east, name).phase, Phase::Fenced);
    }
    west.tell_run(&run, "anna", None, Event::Aborted { rollback: true })
        .await
        .unwrap();
    finally("its end", || west.run(&run).unwrap().outcome).await;
    assert_eq!(west.run(&run).unwrap().outcome, Some(Outcome::RolledBack));
    for name in ["db", "web"] {
        assert!(target(&west, name).active.is_none());
    }
    let before = sound(&bank.web);
    finally("it goes on at home", || {
        (sound(&bank.web) > before).then_some(())
    })
    .await;
    bank.protected().await;
    bank.stage.end().await;
}

const ROUND: &str = r#"
name = "round"
modes = ["planned"]
[groups]
bank = []
[[steps]]
name = "sync"
do = "final-sync"
[[steps]]
name = "promote"
do = "promote"
[[steps]]
name = "start"
do = "start-group"
[[steps]]
name = "stay"
do = "commit"
[[steps]]
name = "turn"
do = "reprotect"
timeout = "10m"
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_reprotects_a_whole_group_turns_the_group() {
    let bank = Bank::set().await;
    let (east, west) = (bank.stage.east.clone(), bank.stage.west.clone());
    bank.write(&files(GOLD, PLAIN));
    bank.protected().await;
    let id = bank.group(&east).unwrap().id;
    let planned = StartRun {
        force: false,
        ..start(Mode::Planned, ROUND)
    };
    let run = west.start_run(planned).await.unwrap().id;
    finally("its end", || west.run(&run).unwrap().outcome).await;
    let report = west.report(&run).unwrap();
    assert_eq!(report.outcome, Some(Outcome::Succeeded), "{report:#?}");
    // As by `reprotect bank`: west's own, by the same id and policy, cut at one instant.
    let here = bank.group(&west).unwrap();
    assert_eq!(
        (here.from, here.peer.as_str(), &here.id),
        (None, "east", &id)
    );
    for name in ["db", "web"] {
        assert_eq!(source(&west, name).rpo_target_ms, Some(1000));
    }
    crate::group_verbs::whole_after(&east, 0).await;
    bank.stage.end().await;
}

const HELD: &str = r#"
name = "held"
modes = ["planned"]
[groups]
bank = []
[[steps]]
name = "begin"
do = "approve"
by = ["*"]
timeout = "10m"
[[steps]]
name = "sync"
do = "final-sync"
[[steps]]
name = "agree"
do = "approve"
by = ["*"]
timeout = "10m"
[[steps]]
name = "promote"
do = "promote"
[[steps]]
name = "start"
do = "start-group"
"#;

impl Bank {
    /// A planned run at west that waits to begin; its id, and the file of its facts.
    async fn planned(&self) -> (String, std::path::PathBuf) {
        let west = &self.stage.west;
        self.write(&files(GOLD, PLAIN));
        self.protected().await;
        finally("a whole point", || self.group(west).and_then(|g| g.rpo_ms)).await;
        let planned = StartRun {
            force: false,
            ..start(Mode::Planned, HELD)
        };
        let run = west.start_run(planned).await.unwrap().id;
        at(west, &run, "begin").await;
        let runs = self.stage.dir.path().join("west").join("runs");
        let facts = runs.join(format!("{run}.facts"));
        assert!(facts.is_file());
        (run, facts)
    }

    async fn agrees(&self, run: &str, step: &str) {
        let agreed = Event::Approved {
            comment: String::new(),
        };
        let told = self.stage.west.tell_run(run, "anna", Some(step), agreed);
        told.await.unwrap();
    }

    async fn runs_on_at_east(&self) {
        for (name, counter) in [("db", &self.stage.guest), ("web", &self.web)] {
            finally("it is protected on", || {
                (source(&self.stage.east, name).phase == Phase::Protected).then_some(())
            })
            .await;
            let before = sound(counter);
            finally("it counts on", || {
                (sound(counter) > before + 60).then_some(())
            })
            .await;
        }
    }
}

/// Nothing can be written there any more.
fn in_the_way(facts: &Path) {
    std::fs::remove_file(facts).unwrap();
    std::fs::create_dir(facts).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn guests_go_on_at_their_source_when_it_cannot_be_written_down_that_they_are_held() {
    let bank = Bank::set().await;
    let west = bank.stage.west.clone();
    let (run, facts) = bank.planned().await;
    in_the_way(&facts);
    bank.agrees(&run, "begin").await;
    let asked = finally("the step fails", || west.run(&run).unwrap().question).await;
    assert_eq!(asked.step, "sync");
    assert!(asked.why.contains("cannot be written"), "{}", asked.why);
    // Whatever becomes of the run, which nobody has decided yet.
    bank.runs_on_at_east().await;
    assert!(facts.is_dir() && west.run(&run).unwrap().outcome.is_none());
    std::fs::remove_dir(&facts).unwrap();
    west.tell_run(&run, "anna", None, Event::Aborted { rollback: false })
        .await
        .unwrap();
    finally("its end", || west.run(&run).unwrap().outcome).await;
    bank.stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_ended_run_cannot_let_go_of_is_let_go_of_once_that_can_be_written_down() {
    let bank = Bank::set().await;
    let west = bank.stage.west.clone();
    let (run, facts) = bank.planned().await;
    bank.agrees(&run, "begin").await;
    at(&west, &run, "agree").await;
    let stand = || {
        let both = [&bank.stage.guest, &bank.web];
        both.map(|counter| counter.lock().unwrap().running())
    };
    assert_eq!(stand(), [Some(false); 2]);
    in_the_way(&facts);
    west.tell_run(&run, "anna", None, Event::Aborted { rollback: false })
        .await
        .unwrap();
    finally("its end", || west.run(&run).unwrap().outcome).await;
    // A daemon that began anew would hold them still.
    assert_eq!(stand(), [Some(false); 2]);
    std::fs::remove_dir(&facts).unwrap();
    bank.runs_on_at_east().await;
    for name in ["db", "web"] {
        assert!(target(&west, name).active.is_none());
    }
    bank.stage.end().await;
}
