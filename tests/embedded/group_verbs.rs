//! What is done with a group as a whole: tested, taken over in waves, committed,
//! rolled back, protected the other way round, brought home.

use farhaven::site::groups::{GroupDone, GroupRollBack};
use farhaven::site::health::CheckOutcome;

use super::groups::{Bank, GOLD, LONG, PLAIN, files, finally, force};
use super::*;

impl Bank {
    /// Protected, with a whole point at west.
    pub(super) async fn whole(files_at_west: bool, policy: &str, group: &str) -> Self {
        let bank = Self::set_with(files_at_west).await;
        bank.write(&files(policy, group));
        bank.protected().await;
        let west = bank.stage.west.clone();
        finally("a whole point", || bank.group(&west).and_then(|g| g.rpo_ms)).await;
        bank
    }

    fn run_at_west(&self) -> usize {
        let west = &self.stage.west;
        let names = ["db", "web"].into_iter();
        names.filter(|n| target(west, n).active.is_some()).count()
    }
}

/// How many of those that were built here run.
pub(super) fn running(builder: &CounterBuilder) -> Vec<Arc<Mutex<Counter>>> {
    let built = builder.built.lock().unwrap().clone();
    let runs = |c: &Arc<Mutex<Counter>>| c.lock().unwrap().running() == Some(true);
    built.into_iter().filter(runs).collect()
}

/// Both that run at west, in the order in which they start: they are built in any.
pub(super) fn both_at_west(bank: &Bank) -> Vec<Arc<Mutex<Counter>>> {
    let there = running(&bank.stage.at_west);
    assert_eq!(there.len(), 2);
    let of = |name: &str| {
        let id = bank.stage.west.members_of(name).unwrap()[0]
            .guest
            .to_string();
        let is_it = |c: &&Arc<Mutex<Counter>>| c.lock().unwrap().is_of(&id);
        there.iter().find(is_it).unwrap().clone()
    };
    ["db", "web"].map(of).to_vec()
}

pub(super) fn done<T: std::fmt::Debug>(done: &GroupDone<T>) {
    assert!(done.remains.is_empty(), "{done:?}");
    let order: Vec<_> = done.members.iter().map(|m| m.guest.as_str()).collect();
    assert_eq!(order, ["db", "web"]);
}

pub(super) fn back() -> GroupRollBack {
    GroupRollBack::default()
}

/// Nothing of the policy files waits, and nothing is wrong with them.
async fn in_force(site: &Arc<Site>) {
    finally("policy files in force", || {
        let files = site.view().policy_files.unwrap();
        (files.trouble.is_empty() && files.waiting.is_empty()).then_some(())
    })
    .await;
}

/// Newest whole cut that a site tells of, after another.
pub(super) async fn whole_after(site: &Arc<Site>, cut: u64) -> u64 {
    let deadline = Instant::now() + LONG;
    loop {
        let points = site.group_points("bank").await.unwrap_or_default();
        if let Some(point) = points.last().filter(|point| point.cut > cut) {
            return point.cut;
        }
        assert!(Instant::now() < deadline, "no whole point after {cut}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_turns_round_and_comes_home_as_a_group() {
    let bank = Bank::whole(true, GOLD, PLAIN).await;
    let (east, west) = (bank.stage.east.clone(), bank.stage.west.clone());
    let id = bank.group(&west).unwrap().id;
    let refused = west.commit_group("bank", false).await.unwrap_err();
    assert!(
        refused.to_string().contains("farhaven group show"),
        "{refused}"
    );

    east.move_group("bank", true).await.unwrap();
    let refused = west.reprotect_group("bank", None).await.unwrap_err();
    assert!(
        refused.to_string().contains("farhaven commit bank"),
        "{refused}"
    );
    // One of them was committed before: all are in the end, however often asked.
    west.commit("web", false).await.unwrap();
    done(&west.commit_group("bank", false).await.unwrap());
    done(&west.commit_group("bank", false).await.unwrap());
    let refused = west.rollback_group("bank", back()).await.unwrap_err();
    assert!(refused.to_string().contains("was committed"), "{refused}");

    let turned = west.reprotect_group("bank", None).await.unwrap();
    done(&turned);
    let reports = turned.members.iter().filter_map(|m| m.report.as_ref());
    assert!(reports.clone().all(|r| r.to == "east" && r.base_bytes > 0));
    assert_eq!(reports.count(), 2);
    // The group is west's own, by the same id and policy, and east knows.
    let here = bank.group(&west).unwrap();
    assert_eq!(
        (here.from, here.peer.as_str(), &here.id),
        (None, "east", &id)
    );
    assert_eq!(source(&west, "db").rpo_target_ms, Some(1000));
    finally("east knows that it turned", || {
        bank.group(&east)
            .filter(|g| g.from.as_deref() == Some("west"))
    })
    .await;
    // Its guests are cut at one instant again, and east lists the whole points.
    whole_after(&east, 0).await;
    done(&west.reprotect_group("bank", None).await.unwrap());
    in_force(&west).await;
    assert_eq!(running(&bank.stage.at_west).len(), 2);

    // Home; the files of east are in force for it again.
    west.move_group("bank", true).await.unwrap();
    done(&east.commit_group("bank", false).await.unwrap());
    done(&east.reprotect_group("bank", None).await.unwrap());
    let home = bank.group(&east).unwrap();
    assert_eq!(
        (home.from, home.peer.as_str(), &home.id),
        (None, "west", &id)
    );
    finally("west knows that it went home", || {
        bank.group(&west)
            .filter(|g| g.from.as_deref() == Some("east"))
    })
    .await;
    whole_after(&west, 0).await;
    for counter in running(&bank.at_east) {
        counts_on(&counter).await;
    }
    in_force(&east).await;
    bank.stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_goes_back_to_its_source_as_a_whole_or_not_at_all() {
    let bank = Bank::whole(false, GOLD, PLAIN).await;
    let (east, west) = (bank.stage.east.clone(), bank.stage.west.clone());
    for guest in ["db", "web"] {
        east.move_guest(guest, true).await.unwrap();
    }
    let there = both_at_west(&bank);
    // The one that is stopped last cannot be: nobody goes, all run on, and a daemon that
    // had ended at any time meanwhile would have found them west's.
    let terms = west.fence.all();
    there[0].lock().unwrap().fail(1000, 0);
    let refused = west.rollback_group("bank", back()).await.unwrap_err();
    assert!(
        refused.to_string().contains("its guests run on here"),
        "{refused}"
    );
    assert_eq!(west.fence.all(), terms);
    there[0].lock().unwrap().fail(0, 0);
    assert_eq!(bank.run_at_west(), 2);
    for counter in &there {
        counts_on(counter).await;
    }
    assert_eq!(bank.web.lock().unwrap().running(), Some(false));

    // One copy at the source cannot go on: the other one does, and what remains is told.
    bank.web.lock().unwrap().fail(0, 1000);
    let half = west.rollback_group("bank", back()).await.unwrap();
    assert!(
        half.remains.contains("1 of 2 guests remain (web)"),
        "{half:?}"
    );
    assert!(half.remains.contains("farhaven rollback bank"), "{half:?}");
    counts_on(&bank.stage.guest).await;
    counts_on(&there[1]).await;
    assert_eq!(bank.run_at_west(), 1);
    bank.web.lock().unwrap().fail(0, 0);
    done(&west.rollback_group("bank", back()).await.unwrap());
    counts_on(&bank.web).await;
    assert_eq!(bank.run_at_west(), 0);
    // And again: it is where it is.
    done(&west.rollback_group("bank", back()).await.unwrap());
    whole_after(&west, 0).await;
    bank.stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_goes_back_to_a_whole_point() {
    let bank = Bank::whole(false, GOLD, PLAIN).await;
    let west = bank.stage.west.clone();
    let first = whole_after(&west, 0).await;
    whole_after(&west, first).await;
    west.fail_over_group("bank", force(true)).await.unwrap();
    let before = running(&bank.stage.at_west);
    let to = |cut| GroupRollBack {
        cut: Some(cut),
        ..back()
    };
    let refused = west.rollback_group("bank", to(7)).await.unwrap_err();
    assert!(
        refused.to_string().contains("no whole point 7"),
        "{refused}"
    );
    let refused = west.rollback_group("bank", back()).await.unwrap_err();
    assert!(refused.to_string().contains("--accept-loss"), "{refused}");
    for counter in &before {
        counts_on(counter).await;
    }
    let report = west.rollback_group("bank", to(first)).await.unwrap();
    done(&report);
    let of_first = west.group_points("bank").await.unwrap();
    let of_first = of_first.iter().find(|p| p.cut == first).unwrap();
    for guest in ["db", "web"] {
        let active = target(&west, guest).active.unwrap();
        assert_eq!(active.point, of_first.points[guest]);
    }
    for counter in &before {
        assert_eq!(counter.lock().unwrap().running(), None);
    }
    for counter in running(&bank.stage.at_west) {
        counts_on(&counter).await;
    }
    // A request that is sent twice does not throw away what was written since.
    let terms = |name| target(&west, name).term;
    let (db, web) = (terms("db"), terms("web"));
    let again = west.rollback_group("bank", to(first)).await.unwrap();
    done(&again);
    assert!(
        again.members.iter().all(|m| m.note.contains("already")),
        "{again:?}"
    );
    assert_eq!((terms("db"), terms("web")), (db, web));
    bank.stage.end().await;
}

/// A group whose db has a check by a program: it passes once the file is there.
fn with_program(file: &Path, policy: &str) -> String {
    let script = format!("[\"/bin/sh\", \"-c\", \"test -e {}\"]", file.display());
    let health = format!(
        "[groups.bank.guests.db.health.there]\nscript = {script}\nevery = \"50ms\"\ntimeout = \"1s\"\n[groups.bank.guests.db.health.port]\ntcp = \"127.0.0.1:9\"\nevery = \"50ms\"\ntimeout = \"500ms\"\n"
    );
    files(policy, &format!("{PLAIN}{health}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_test_of_a_group_runs_in_waves_and_leaves_nothing() {
    let bank = Bank::whole(true, GOLD, PLAIN).await;
    let (east, west) = (bank.stage.east.clone(), bank.stage.west.clone());
    let ready = bank.stage.dir.path().join("ready");
    bank.write(&with_program(&ready, GOLD));
    finally("west knows the checks", || {
        bank.group(&west).filter(|g| g.members[0].checks == 2)
    })
    .await;
    let refused = west.test_group("bank", Some(7)).await.unwrap_err();
    assert!(
        refused.to_string().contains("no whole point 7"),
        "{refused}"
    );
    // Not healthy: those after it are not started, and what runs can be looked at.
    let tested = west.test_group("bank", None).await.unwrap();
    let [db, web] = tested.members.as_slice() else {
        panic!("{tested:?}")
    };
    let outcomes: Vec<_> = db.checks.iter().map(|c| c.outcome).collect();
    assert_eq!(outcomes, [CheckOutcome::NotLookedAt, CheckOutcome::Failed]);
    assert!(db.report.is_some() && web.report.is_none(), "{tested:?}");
    assert!(web.error.contains("starts after 'db'"), "{tested:?}");
    assert!(
        tested.remains.contains("farhaven test cleanup bank"),
        "{tested:?}"
    );
    let refused = west.test_group("bank", None).await.unwrap_err();
    assert!(
        refused.to_string().contains("test cleanup bank"),
        "{refused}"
    );
    done(&west.end_group_test("bank").await.unwrap());
    assert!(running(&bank.stage.at_west).is_empty());

    // By the policy's word they are started all the same.
    let go_on = format!("{GOLD}on_error = \"continue\"\n");
    bank.write(&with_program(&ready, &go_on));
    finally("west knows the policy", || {
        let owed = bank.group(&west)?.owed;
        (owed.on_error == farhaven_policies::files::OnError::Continue).then_some(())
    })
    .await;
    let tested = west.test_group("bank", None).await.unwrap();
    assert!(
        tested.members.iter().all(|m| m.report.is_some()),
        "{tested:?}"
    );
    assert!(!tested.remains.is_empty(), "{tested:?}");
    done(&west.end_group_test("bank").await.unwrap());

    // Healthy: both, from one cut, while points go on.
    std::fs::write(&ready, "").unwrap();
    let terms = (target(&west, "db").term, target(&west, "web").term);
    let tested = west.test_group("bank", None).await.unwrap();
    assert_eq!(tested.remains, "", "{tested:?}");
    let points = west.group_points("bank").await.unwrap();
    let cut = points.iter().find(|p| p.cut == tested.cut).unwrap();
    let reports: Vec<_> = tested.members.iter().flat_map(|m| &m.report).collect();
    for report in &reports {
        assert_eq!(report.point, cut.points[&report.guest]);
    }
    // Cut at one instant, and declared at one: as old, and the later wave runs later.
    let [db, web] = reports.as_slice() else {
        panic!("{tested:?}")
    };
    let apart = db.cut_at_unix_ns.abs_diff(web.cut_at_unix_ns) as f64 / 1e6;
    assert!(apart <= cut.skew_ms + 1.0, "{apart} ms: {cut:?} {tested:?}");
    let apart = db.age_ms.abs_diff(web.age_ms) as f64;
    assert!(apart <= cut.skew_ms + 2.0, "{tested:?}");
    assert!(web.rto_ms > db.rto_ms, "{tested:?}");
    assert!(tested.rto_ms == web.rto_ms && tested.rto_ms <= tested.checked_ms);
    let there = running(&bank.stage.at_west);
    assert_eq!(there.len(), 2);
    for counter in &there {
        counts_on(counter).await;
    }
    whole_after(&west, tested.cut).await;
    counts_on(&bank.web).await;
    assert_eq!((target(&west, "db").term, target(&west, "web").term), terms);
    let ended = west.end_group_test("bank").await.unwrap();
    done(&ended);
    assert!(
        ended.members.iter().all(|m| m.report.is_some()),
        "{ended:?}"
    );
    let again = west.end_group_test("bank").await.unwrap();
    done(&again);
    assert!(
        again.members.iter().all(|m| m.report.is_none()),
        "{again:?}"
    );
    assert!(running(&bank.stage.at_west).is_empty());
    assert_eq!(source(&east, "db").trouble, "");
    bank.stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_waits_for_the_health_of_those_before_and_goes_on_later() {
    let bank = Bank::whole(false, GOLD, PLAIN).await;
    let (east, west) = (bank.stage.east.clone(), bank.stage.west.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap();
    let health = format!(
        "[groups.bank.guests.db.health.port]\ntcp = \"{port}\"\nevery = \"50ms\"\ntimeout = \"1s\"\n"
    );
    bank.write(&files(GOLD, &format!("{PLAIN}{health}")));
    finally("west knows the check", || {
        bank.group(&west).filter(|g| g.members[0].checks == 1)
    })
    .await;
    drop(listener);
    let half = west.fail_over_group("bank", force(true)).await.unwrap();
    let [db, web] = half.members.as_slice() else {
        panic!("{half:?}")
    };
    let note = &db.report.as_ref().unwrap().note;
    assert!(note.contains("not healthy"), "{half:?}");
    assert!(
        web.report.is_none() && web.error.contains("starts after 'db'"),
        "{half:?}"
    );
    assert!(web.error.contains("--no-checks"), "{half:?}");
    // Both terms are taken: neither runs at its source.
    for guest in ["db", "web"] {
        assert_eq!(source(&east, guest).phase, Phase::Fenced);
    }
    assert_eq!(running(&bank.stage.at_west).len(), 1);

    // Once it is healthy: asked again, it goes on from the same cut, without force.
    let _listener = tokio::net::TcpListener::bind(port).await.unwrap();
    let whole = west.fail_over_group("bank", force(false)).await.unwrap();
    assert_eq!(whole.cut, half.cut);
    assert!(
        whole.members.iter().all(|m| m.report.is_some()),
        "{whole:?}"
    );
    assert_eq!(whole.members[0].checks[0].outcome, CheckOutcome::Passed);
    let there = running(&bank.stage.at_west);
    assert_eq!(there.len(), 2, "the one that ran was left alone");
    for counter in &there {
        counts_on(counter).await;
    }
    let refused = west.fail_over_group("bank", force(true)).await.unwrap_err();
    assert!(
        refused.to_string().contains("run here already"),
        "{refused}"
    );
    bank.stage.end().await;
}
