//! Policy files and protection groups: what the files say is in force, also
//! when they change, and what a broken one leaves as it was.

mod runs;

use super::*;

use farhaven::site::groups::{FailOverGroup, GroupView};
use farhaven_policies::units::Period;

pub(super) const LONG: Duration = Duration::from_secs(90);

/// Waits long: machines are busy.
pub(super) async fn finally<T>(what: &str, mut wanted: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LONG;
    loop {
        if let Some(found) = wanted() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {LONG:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

pub(super) fn files(policies: &str, groups: &str) -> String {
    format!("[sites.west]\n{policies}\n{groups}\n")
}

pub(super) const GOLD: &str = "[policies.gold]\nrpo = \"1s\"\nretention = \"all for 1h, hourly for 24h\"\nbandwidth = \"80mbit\"\n";

pub(super) const BANK: &str = "[groups.bank]\npolicy = \"gold\"\npeer = \"west\"\n[groups.bank.guests.db]\n[groups.bank.guests.web]\nafter = [\"db\"]\n[groups.bank.guests.web.health.port]\ntcp = \"10.8.0.5:443\"\n";

/// The same without any check.
pub(super) const PLAIN: &str = "[groups.bank]\npolicy = \"gold\"\npeer = \"west\"\n[groups.bank.guests.db]\n[groups.bank.guests.web]\nafter = [\"db\"]\n";

/// East with policy files, west, and two guests of a bank at east.
pub(super) struct Bank {
    pub(super) stage: Stage,
    pub(super) at_east: CounterBuilder,
    pub(super) web: Arc<Mutex<Counter>>,
    pub(super) file: std::path::PathBuf,
}

impl Bank {
    pub(super) async fn set() -> Self {
        Self::set_with(false).await
    }

    /// West may have the same files.
    pub(super) async fn set_with(files_at_west: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (at_east, at_west) = (CounterBuilder::default(), CounterBuilder::default());
        let file = dir.path().join("policies.toml");
        let mut of_east = config(dir.path(), "east");
        of_east.site.policy_files = file.clone();
        let mut of_west = config(dir.path(), "west");
        if files_at_west {
            of_west.site.policy_files = file.clone();
        }
        let east = Site::start_with(of_east, builders(&at_east)).await.unwrap();
        let west = Site::start_with(of_west, builders(&at_west)).await.unwrap();
        let stage = Stage::pair(dir, east, west, at_west, false).await;
        let (web, definition) = Counter::start(&stage.dir.path().join("second"));
        let (east, db) = (&stage.east, stage.definition.clone());
        east.embed("db", stage.vmm(), db).unwrap();
        east.embed("web", web.clone(), definition).unwrap();
        Self {
            stage,
            at_east,
            web,
            file,
        }
    }

    pub(super) fn write(&self, text: &str) {
        std::fs::write(&self.file, text).unwrap();
    }

    pub(super) fn group(&self, site: &Site) -> Option<GroupView> {
        site.view().groups.into_iter().find(|g| g.name == "bank")
    }

    pub(super) async fn protected(&self) {
        finally("both are protected", || {
            let sealed = |name| source(&self.stage.east, name).points_sealed >= 2;
            (sealed("db") && sealed("web")).then_some(())
        })
        .await;
    }
}

pub(super) fn force(force: bool) -> FailOverGroup {
    FailOverGroup {
        force,
        ..FailOverGroup::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn policy_files_govern_the_daemon_also_when_they_change() {
    let bank = Bank::set().await;
    let (east, west) = (bank.stage.east.clone(), bank.stage.west.clone());
    bank.write(&files(GOLD, BANK));
    bank.protected().await;
    let db = source(&east, "db");
    assert_eq!(
        (db.peer.as_deref(), db.group.as_deref()),
        (Some("west"), Some("bank"))
    );
    assert_eq!(db.rpo_target_ms, Some(1000));
    // The group's bandwidth is its guests' together.
    let link = east.link().guests;
    let half = "40mbit".parse().unwrap();
    assert!(
        link.iter().all(|g| g.limit == half && g.by == "policy"),
        "{link:?}"
    );
    let members = east.members_of("bank").unwrap();
    let order: Vec<_> = members.iter().map(|m| (m.name.as_str(), m.wave)).collect();
    assert_eq!(order, [("db", 0), ("web", 1)]);

    // The peer knows what a failover needs, also when it has started anew.
    let told = finally("west knows the group", || bank.group(&west)).await;
    assert_eq!(told.from.as_deref(), Some("east"));
    assert_eq!(
        (told.members[1].name.as_str(), told.members[1].checks),
        ("web", 1)
    );
    assert_eq!(west.members_of("bank").unwrap().len(), 2);

    // A changed policy is in force at once, and no session is lost for it.
    let before = source(&east, "db").points_sealed;
    bank.write(&files(&GOLD.replace("1s", "2s"), BANK));
    finally("the new RPO", || {
        (source(&east, "db").rpo_target_ms == Some(2000)).then_some(())
    })
    .await;
    finally("points go on", || {
        (source(&east, "db").points_sealed > before + 1).then_some(())
    })
    .await;
    let owed = finally("west knows the new policy", || {
        bank.group(&west)
            .filter(|g| g.owed.rpo == Period::from_secs(2))
    })
    .await;
    assert_eq!(owed.owed.retention.to_string(), "all for 1h, hourly for 1d");

    // A broken file leaves what was before, and says so.
    bank.write(&files(&GOLD.replace("1s", "1x"), BANK));
    let trouble = finally("the trouble", || {
        let trouble = east.view().policy_files.unwrap().trouble;
        (!trouble.is_empty()).then_some(trouble)
    })
    .await;
    assert!(
        trouble.contains("rpo") && trouble.contains("policies.toml"),
        "{trouble}"
    );
    assert_eq!(source(&east, "db").rpo_target_ms, Some(2000));
    assert_eq!(bank.group(&east).unwrap().members.len(), 2);
    let shown = east.group_policy("bank").unwrap();
    let rpo = shown.iter().find(|shown| shown.key.ends_with(".rpo"));
    let rpo = rpo.unwrap_or_else(|| panic!("{shown:?}"));
    assert!(
        rpo.value.contains("2s") && rpo.from.contains("policies.toml:"),
        "{rpo:?}"
    );
    let unknown = east.group_policy("bnk").unwrap_err().to_string();
    assert!(unknown.contains("did you mean 'bank'"), "{unknown}");

    // Two groups that share a guest are refused as a whole.
    let shared = BANK.replace("groups.bank", "groups.copy");
    bank.write(&files(GOLD, &format!("{BANK}{shared}")));
    finally("the refusal", || {
        let trouble = east.view().policy_files.unwrap().trouble;
        trouble.contains("a guest has one group").then_some(())
    })
    .await;

    // While the files ask for it, protection is not ended; a guest that left
    // every group keeps it until somebody ends it.
    let refused = east.unprotect("web", false).await.unwrap_err().to_string();
    assert!(refused.contains("policy files ask"), "{refused}");
    let alone = BANK.split("[groups.bank.guests.web]").next().unwrap();
    bank.write(&files(GOLD, alone));
    finally("web has left", || {
        source(&east, "web").group.is_none().then_some(())
    })
    .await;
    let web = source(&east, "web");
    assert_eq!(
        (web.peer.as_deref(), web.policy_of.as_deref()),
        (Some("west"), Some("bank"))
    );
    assert!(east.view().policy_files.unwrap().trouble.is_empty());
    finally("west was told", || {
        bank.group(&west).filter(|g| g.members.len() == 1)
    })
    .await;
    east.unprotect("web", false).await.unwrap();
    assert!(sound(&bank.web) > 0 && sound(&bank.stage.guest) > 0);
    bank.stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn groups_outlive_a_restart_and_a_lost_catalogue_of_the_peer() {
    let bank = Bank::set().await;
    let west = bank.stage.west.clone();
    bank.write(&files(GOLD, BANK));
    bank.protected().await;
    let told = finally("west knows the group", || bank.group(&west)).await;
    // What the lost site knew is not asked of it.
    bank.stage.east.shutdown().await;
    west.shutdown().await;
    let of_west = west.config.clone();
    drop(west);
    let Bank { stage, .. } = bank;
    let Stage {
        west, dir, at_west, ..
    } = stage;
    drop(west);
    let at = of_west.site.state_dir.clone();
    for lost in [false, true] {
        if lost {
            std::fs::remove_dir_all(at.join("catalogue")).unwrap();
        }
        let mut again = of_west.clone();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        again.listen.address = socket.local_addr().unwrap();
        drop(socket);
        let mut tries = 0;
        let west = loop {
            match Site::start_with(again.clone(), builders(&at_west)).await {
                Ok(west) => break west,
                // The daemon before lets go of its directory in a moment.
                Err(error) if tries > 200 => panic!("{error}"),
                Err(_) => tries += 1,
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        let group = west.view().groups.into_iter().find(|g| g.name == "bank");
        let group = group.unwrap();
        assert_eq!(group.id, told.id);
        let order: Vec<_> = group
            .members
            .iter()
            .map(|m| (m.name.as_str(), m.wave))
            .collect();
        assert_eq!(order, [("db", 0), ("web", 1)]);
        assert_eq!(
            west.members_of("bank").unwrap()[0].from.as_deref(),
            Some("east")
        );
        west.shutdown().await;
    }
    drop(dir);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_is_cut_at_one_instant_and_a_partner_that_does_not_come_keeps_nobody() {
    let bank = Bank::set().await;
    let (east, west) = (bank.stage.east.clone(), bank.stage.west.clone());
    bank.write(&files(GOLD, BANK));
    bank.protected().await;
    let newest = async |site: &Arc<Site>| {
        let points = site.group_points("bank").await.unwrap_or_default();
        points.into_iter().next_back()
    };
    let after = async |cut: u64| {
        let deadline = Instant::now() + LONG;
        loop {
            if let Some(point) = newest(&west).await.filter(|point| point.cut > cut) {
                return point;
            }
            assert!(Instant::now() < deadline, "no whole point after {cut}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let first = after(0).await;
    let guests: Vec<_> = first.points.keys().map(String::as_str).collect();
    assert_eq!(guests, ["db", "web"]);
    // A bound of the gate's; what is measured is in docs/reliability.md.
    assert!(first.skew_ms < 1000.0, "{}", first.skew_ms);
    let there = newest(&east).await.unwrap();
    assert!(there.cut >= first.cut, "the source tells the same points");
    finally("the group's RPO", || {
        bank.group(&west).and_then(|g| g.rpo_ms)
    })
    .await;
    finally("at the source, too", || {
        bank.group(&east).and_then(|g| g.rpo_ms)
    })
    .await;

    // One that does not stop in time: the cut of all is given up, all go on.
    bank.web.lock().unwrap().slow_to_stop(2);
    finally("the slow stops", || {
        (bank.web.lock().unwrap().slow_stops_left() == 0).then_some(())
    })
    .await;
    let second = after(first.cut).await;
    counts_on(&bank.web).await;
    counts_on(&bank.stage.guest).await;

    // One that is away: the other is protected on, by points that are no part
    // of a whole one.
    east.pause("web").await.unwrap();
    finally("web is paused", || {
        (source(&east, "web").phase == Phase::Paused).then_some(())
    })
    .await;
    let last = newest(&west).await.unwrap();
    assert!(last.cut >= second.cut);
    let sealed = source(&east, "db").points_sealed;
    finally("db goes on", || {
        (source(&east, "db").points_sealed > sealed + 2).then_some(())
    })
    .await;
    assert_eq!(newest(&west).await.unwrap().cut, last.cut);
    assert!(
        west.points("db")
            .await
            .unwrap()
            .last()
            .unwrap()
            .group
            .is_none()
    );
    east.resume("web").await.unwrap();
    after(last.cut).await;
    bank.stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_is_failed_over_from_one_cut_with_all_terms_at_once() {
    let bank = Bank::set().await;
    let (east, west) = (bank.stage.east.clone(), bank.stage.west.clone());
    bank.write(&files(GOLD, PLAIN));
    bank.protected().await;
    finally("a whole point", || bank.group(&west).and_then(|g| g.rpo_ms)).await;
    let refused = west
        .fail_over_group("bank", force(false))
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("is alive"), "{refused}");
    let refused = west
        .fail_over_group(
            "bank",
            FailOverGroup {
                cut: Some(7),
                ..force(true)
            },
        )
        .await
        .unwrap_err();
    assert!(
        refused.to_string().contains("no whole point 7"),
        "{refused}"
    );
    let before = west
        .fence
        .current(west.members_of("db").unwrap()[0].guest)
        .unwrap();
    assert_eq!(before.owner, east.key(), "nothing was done");

    // The source lives: it stops its guests first, all of them.
    let done = west.fail_over_group("bank", force(true)).await.unwrap();
    let order: Vec<_> = done.members.iter().map(|m| m.guest.as_str()).collect();
    assert_eq!(order, ["db", "web"]);
    for member in &done.members {
        assert!(
            member.report.is_some(),
            "{}: {}",
            member.guest,
            member.error
        );
        let guest = west.members_of(&member.guest).unwrap()[0].guest;
        assert_eq!(west.fence.current(guest).unwrap().owner, west.key());
        assert!(target(&west, &member.guest).active.is_some());
        assert_eq!(source(&east, &member.guest).phase, Phase::Fenced);
    }
    let stopped = sound(&bank.web);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(sound(&bank.web), stopped, "fenced guests stand still");
    let again = west.fail_over_group("bank", force(true)).await.unwrap_err();
    assert!(again.to_string().contains("run here already"), "{again}");
    bank.stage.end().await;
}
