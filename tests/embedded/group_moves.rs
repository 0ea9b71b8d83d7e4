//! A group is moved as one: at one instant, all of it or nothing of it, whatever
//! fails on the way.

use farhaven::site::checked;
use farhaven::site::evacuate::{EvacuationState, GuestState, Order};
use farhaven::site::groups::MemberDone;
use farhaven::site::turn::view::RollbackReport;
use farhaven_policies::runbook::Kind;
use farhaven_policies::runbook::run::{Forward, Outcome};

use super::group_verbs::{back, both_at_west, done, running, whole_after};
use super::groups::{Bank, GOLD, LONG, PLAIN, finally};
use super::*;

impl Bank {
    /// Both run at east, protected, and nothing of them at west.
    async fn goes_on_at_east(&self) {
        let (east, west) = (&self.stage.east, &self.stage.west);
        for (name, counter) in [("db", &self.stage.guest), ("web", &self.web)] {
            finally("protected again", || {
                (source(east, name).phase == Phase::Protected).then_some(())
            })
            .await;
            counts_on(counter).await;
            assert!(target(west, name).active.is_none());
        }
        let newest = west.group_points("bank").await.unwrap().last().unwrap().cut;
        whole_after(west, newest).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_is_moved_at_one_instant_and_comes_back_unchanged() {
    let bank = Bank::whole(false, GOLD, PLAIN).await;
    let (east, west) = (bank.stage.east.clone(), bank.stage.west.clone());
    let outlook = east.group_outlook("bank").unwrap();
    assert_eq!(outlook.members.len(), 2);
    // Beside what each costs alone: a later wave waits for the start of those before.
    let waits = |wave: usize| 150.0 * wave as f64;
    for member in &outlook.members {
        let alone = member.alone.expected_blackout_ms;
        assert!(
            member.expected_blackout_ms >= alone + waits(member.wave),
            "{outlook:?}"
        );
    }
    assert!(outlook.members.iter().any(|member| member.wave == 1));
    let refused = west.move_group("bank", true).await.unwrap_err();
    assert!(refused.to_string().contains("run this there"), "{refused}");

    let moved = east.move_group("bank", true).await.unwrap();
    assert_eq!(moved.remains, "", "{moved:?}");
    let order: Vec<_> = moved.members.iter().map(|m| m.guest.as_str()).collect();
    assert_eq!(order, ["db", "web"]);
    assert!(
        moved.skew_ms < 1000.0 && moved.blackout_ms > 0.0,
        "{moved:?}"
    );
    // They stood from one instant on, whoever waited for the other before that.
    let stood = |n: usize| moved.members[n].report.as_ref().unwrap().blackout_ms;
    assert!(stood(1) + moved.skew_ms + 1.0 >= stood(0), "{moved:?}");
    // One instant: the last points of both are one of the group.
    let last = west.group_points("bank").await.unwrap();
    let last = last.last().unwrap();
    let there = both_at_west(&bank);
    for member in &moved.members {
        let report = member.report.as_ref().unwrap();
        assert!(
            report.expected_blackout_ms >= waits(1 + member.wave),
            "{report:?}"
        );
        assert_eq!(last.points[&member.guest], report.point);
        assert_eq!(source(&east, &member.guest).phase, Phase::Moved);
        let guest = west.members_of(&member.guest).unwrap()[0].guest;
        assert_eq!(west.fence.current(guest).unwrap().owner, west.key());
    }
    for (counter, home) in there.iter().zip([&bank.stage.guest, &bank.web]) {
        assert_eq!(home.lock().unwrap().running(), Some(false));
        assert!(counts_on(counter).await >= sound(home));
    }
    let refused = east.move_group("bank", true).await.unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("all of its guests run on here"),
        "{refused}"
    );
    let stopped = [sound(&bank.stage.guest), sound(&bank.web)];
    // Longer than the daemon leaves a rollback alone that is in doubt: web's is not,
    // it waits for db.
    let slow = Duration::from_secs(5);
    bank.stage.guest.lock().unwrap().slow_to_go_on(slow);
    let went = west.rollback_group("bank", back()).await.unwrap();
    done(&went);
    let stood = |m: &MemberDone<RollbackReport>| m.report.as_ref().unwrap().blackout_ms;
    // Nor do two questions wait for each other's answers, until one is given up after 30 s.
    assert!(
        went.members.iter().map(stood).all(|ms| ms < 25e3),
        "{went:?}"
    );
    assert!(
        went.members
            .iter()
            .map(stood)
            .all(|ms| ms >= slow.as_secs_f64() * 1e3),
        "{went:?}"
    );
    bank.goes_on_at_east().await;
    assert!(sound(&bank.stage.guest) >= stopped[0] && sound(&bank.web) >= stopped[1]);
    bank.stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_one_cannot_be_moved_none_is() {
    let bank = Bank::whole(false, GOLD, PLAIN).await;
    let east = bank.stage.east.clone();
    // It does not stop for the instant of all.
    let moving = {
        let east = east.clone();
        tokio::spawn(async move { east.move_group("bank", true).await })
    };
    // A move is over soon: it is caught in its midst by looking often.
    while source(&east, "web").phase != Phase::Moving {
        assert!(!moving.is_finished(), "nobody saw it move");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    bank.web.lock().unwrap().fail(u32::MAX, 0);
    let refused = moving.await.unwrap().unwrap_err().to_string();
    bank.web.lock().unwrap().fail(0, 0);
    assert!(refused.contains("group 'bank' was not moved"), "{refused}");
    bank.goes_on_at_east().await;

    // One is not protected at this moment.
    east.pause("web").await.unwrap();
    finally("paused", || {
        (source(&east, "web").phase == Phase::Paused).then_some(())
    })
    .await;
    let refused = east.move_group("bank", true).await.unwrap_err();
    assert!(refused.to_string().contains("'web' is"), "{refused}");
    assert!(refused.to_string().contains("run on here"), "{refused}");
    east.resume("web").await.unwrap();
    bank.goes_on_at_east().await;

    // The other site cannot take one of them in.
    bank.web.lock().unwrap().ask_for(b"more than there is");
    let refused = east.move_group("bank", true).await.unwrap_err();
    assert!(refused.to_string().contains("teach it"), "{refused}");
    bank.web.lock().unwrap().ask_for(b"counts");
    bank.goes_on_at_east().await;

    // And then all of it goes.
    let moved = east.move_group("bank", true).await.unwrap();
    assert_eq!(moved.remains, "", "{moved:?}");
    assert_eq!(running(&bank.stage.at_west).len(), 2);
    bank.stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_handed_over_and_did_not_start_is_started_by_the_next_daemon() {
    let bank = Bank::whole(false, GOLD, PLAIN).await;
    let (east, west) = (bank.stage.east.clone(), bank.stage.west.clone());
    *bank.stage.at_west.bad_starts.lock().unwrap() = 2;
    let moved = east.move_group("bank", true).await.unwrap();
    // It was decided: both are west's, though neither runs yet, and nobody is told so.
    assert_ne!(moved.remains, "", "{moved:?}");
    for member in &moved.members {
        let (report, why) = (member.report.as_ref().unwrap(), &member.error);
        assert!(
            !report.runs && (why.contains("does not run") || why.contains("not started")),
            "{moved:?}"
        );
        assert_eq!(source(&east, &member.guest).phase, Phase::Moved);
    }
    assert!(running(&bank.stage.at_west).is_empty());
    let last = [sound(&bank.stage.guest), sound(&bank.web)];
    let written = bank.stage.dir.path().join("west").join("hand-overs");
    assert_eq!(std::fs::read_dir(&written).unwrap().count(), 1);

    let Bank { stage, web, .. } = bank;
    let Stage {
        dir,
        at_west,
        guest,
        ..
    } = stage;
    west.shutdown().await;
    drop((west, stage.west));
    // Their disks lie above the store, which is open while they are held.
    at_west.built.lock().unwrap().clear();
    let west = site_again(dir.path(), "west", builders(&at_west)).await;
    let deadline = Instant::now() + LONG;
    while running(&at_west).len() < 2 {
        assert!(Instant::now() < deadline, "they do not start");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for counter in running(&at_west) {
        assert!(counts_on(&counter).await >= last[0].min(last[1]));
    }
    finally("nothing is left to start", || {
        let note = std::fs::read_dir(&written).unwrap().next()?.unwrap();
        let note: serde_json::Value = checked::read(&note.path(), 1 << 20).unwrap();
        (note["ran"] == true).then_some(())
    })
    .await;
    assert_eq!(guest.lock().unwrap().running(), Some(false));
    assert_eq!(web.lock().unwrap().running(), Some(false));
    east.shutdown().await;
    west.shutdown().await;
}

/// As after a hand-over in which one did not start, and what an operator did since.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_was_turned_round_is_not_started_from_its_hand_over_again() {
    let bank = Bank::whole(false, GOLD, PLAIN).await;
    let (east, west) = (bank.stage.east.clone(), bank.stage.west.clone());
    east.move_group("bank", true).await.unwrap();
    done(&west.commit_group("bank", false).await.unwrap());
    done(&west.reprotect_group("bank", None).await.unwrap());
    let written = bank.stage.dir.path().join("west").join("hand-overs");
    let note = std::fs::read_dir(&written)
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let read = || checked::read::<serde_json::Value>(&note.path(), 1 << 20).unwrap();
    let mut told = read();
    assert_eq!(told["ran"], true);

    let Bank { stage, .. } = bank;
    let Stage { dir, at_west, .. } = stage;
    west.shutdown().await;
    drop((west, stage.west));
    at_west.built.lock().unwrap().clear();
    told["ran"] = false.into();
    told.as_object_mut().unwrap().remove("started");
    checked::write(&note.path(), &told).unwrap();
    let west = site_again(dir.path(), "west", builders(&at_west)).await;
    finally("nothing is left to start", || {
        (read()["ran"] == true).then_some(())
    })
    .await;
    assert!(running(&at_west).is_empty(), "west's own guest runs twice");
    east.shutdown().await;
    west.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_stood_before_the_move_of_its_group_stands_when_that_fails() {
    let bank = Bank::whole(false, GOLD, PLAIN).await;
    let east = bank.stage.east.clone();
    bank.stage.guest.lock().unwrap().pause().unwrap();
    finally("that is said", || {
        let view = source(&east, "db");
        let said = view.trouble.contains("is stopped here");
        (said && view.phase == Phase::Protected).then_some(())
    })
    .await;
    // The other one does not stop for the instant of all.
    bank.web.lock().unwrap().fail_once_moved(u32::MAX, 0);
    let refused = east.move_group("bank", true).await.unwrap_err().to_string();
    bank.web.lock().unwrap().fail(0, 0);
    assert!(refused.contains("group 'bank' was not moved"), "{refused}");
    assert_eq!(bank.stage.guest.lock().unwrap().running(), Some(false));
    counts_on(&bank.web).await;
    bank.stage.guest.lock().unwrap().resume().unwrap();
    bank.goes_on_at_east().await;
    bank.stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evacuation_does_not_count_a_guest_as_moved_that_runs_nowhere() {
    let bank = Bank::whole(false, GOLD, PLAIN).await;
    let east = bank.stage.east.clone();
    *bank.stage.at_west.bad_starts.lock().unwrap() = u32::MAX;
    let order = Order {
        to: "west".to_owned(),
        accept_pause: true,
        ..Order::default()
    };
    east.begin_evacuation(&order).await.unwrap();
    let record = finally("its end", || {
        let record = east.evacuation(None).unwrap();
        record.state.is_over().then_some(record)
    })
    .await;
    assert_eq!(record.state, EvacuationState::PartlyDone, "{record:#?}");
    assert_eq!(record.guests.len(), 2);
    for guest in &record.guests {
        assert_eq!(guest.state, GuestState::Failed, "{guest:#?}");
        let why = &guest.why;
        assert!(
            why.contains("does not run") || why.contains("not started"),
            "{why}"
        );
        let report = guest.report.as_ref().unwrap();
        assert!(!report.runs && report.to == "west", "{report:?}");
        // It is west's to run, and whoever looks here is told.
        let view = source(&east, &guest.guest);
        assert_eq!(view.phase, Phase::Moved);
        assert!(
            view.trouble.contains("does not run there"),
            "{}",
            view.trouble
        );
    }
    bank.stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_record_of_a_move_does_not_say_that_a_guest_was_started_that_runs_nowhere() {
    let bank = Bank::whole(false, GOLD, PLAIN).await;
    let east = bank.stage.east.clone();
    *bank.stage.at_west.bad_starts.lock().unwrap() = u32::MAX;
    let by = Some("anna".to_owned());
    let moved = east.move_group_recorded("bank", true, by).await.unwrap();
    assert!(
        moved
            .members
            .iter()
            .all(|m| !m.report.as_ref().unwrap().runs),
        "{moved:?}"
    );
    let run = east.runs().into_iter().next().unwrap();
    let start = run.steps.iter().find(|step| step.kind == Kind::StartGroup);
    let start = start.unwrap();
    assert!(matches!(start.forward, Forward::Failed { .. }), "{run:#?}");
    assert!(run.outcome.is_some_and(|how| how != Outcome::Succeeded));
    bank.stage.end().await;
}
