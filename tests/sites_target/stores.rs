//! What lies at the target: full disks, lost catalogues, old points.

use std::process::Command;

use super::*;

/// A small filesystem of its own; undone when dropped.
struct Tmpfs(std::path::PathBuf);

impl Tmpfs {
    fn mount(at: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let run = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(at)
            .output()
            .unwrap();
        if !run.status.success() {
            println!(
                "skipped: no filesystem can be mounted here: {}",
                String::from_utf8_lossy(&run.stderr).trim()
            );
            return None;
        }
        Some(Self(at.to_owned()))
    }

    fn resize(&self, size: &str) {
        let run = Command::new("mount")
            .args(["-o", &format!("remount,size={size}")])
            .arg(&self.0)
            .status();
        assert!(run.unwrap().success());
    }
}

impl Tmpfs {
    fn read_only(&self, read_only: bool) {
        let how = if read_only {
            "remount,ro"
        } else {
            "remount,rw"
        };
        let run = Command::new("mount")
            .args(["-o", how])
            .arg(&self.0)
            .status();
        assert!(run.unwrap().success());
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_store_stretches_the_rpo_and_goes_on_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Tmpfs::mount(&dir.path().join("disk"), "320m") else {
        return;
    };
    let Some(mut guest) = small(&dir.path().join("g")) else {
        return;
    };
    let more = format!("[store]\ndir = \"{}\"\nmin_free = \"0B\"", disk.0.display());
    let mut pair = Pair::start(LINK, "", &more);
    guest.console.await_beat(5, PATIENCE);
    let qmp = guest.qmp.to_str().unwrap();
    pair.east.cli(&["guest", "add", "web", "--qmp", qmp]).good();
    pair.east
        .cli(&["protect", "web", "--to", "west", "--rpo", "1s"])
        .good();
    // The check found room; now something else takes it.
    std::fs::write(disk.0.join("ballast"), vec![1; 280 << 20]).unwrap();
    pair.east.until("it says why", PATIENCE, |view| {
        let trouble = format!("{} {}", view.guests[0].trouble, view.peers[0].trouble);
        (trouble.contains("space") || trouble.contains("full")).then_some(())
    });
    assert!(beats(&guest.console));
    disk.resize("2g");
    sealed(&pair.east, "web");
    sealed(&pair.east, "web");
    pair.east.until("no trouble", PATIENCE, |v| {
        v.peers[0].trouble.is_empty().then_some(())
    });
    pair.east.kill();
    guest.kill();
    pair.west.until("the link is down", PATIENCE, |v| {
        (!v.peers[0].connected).then_some(())
    });
    pair.west.cli(&["failover", "web"]).good();
    whole(&runs_at(&pair.west, "web"));
}

#[test]
fn old_points_go_and_a_lost_catalogue_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut guest) = small(&dir.path().join("g")) else {
        return;
    };
    let kept = "[protect.retention]\nall = \"4s\"\nthen_every = \"4s\"\nuntil = \"8s\"\nnewest = 2";
    let mut pair = Pair::start(LINK, kept, "");
    protect(&pair, "web", &guest);
    let pruned = |west: &TestSite| west.log().matches("old points were pruned").count();
    pair.west
        .until("points are pruned, and sealed on", PATIENCE, |view| {
            let points = view.standbys[0].points;
            assert!(points < 40, "{points} points");
            (pruned(&pair.west) >= 3).then_some(())
        });
    sealed(&pair.east, "web");
    assert_eq!(pair.east.source("web").trouble, "");

    // The database of the catalogue, at both sites: made again from its journal.
    for site in [&mut pair.east, &mut pair.west] {
        site.kill();
        std::fs::remove_dir_all(site.dir.join("catalogue/catalogue.sled")).unwrap();
        site.start();
        assert!(site.log().contains("was rebuilt"), "{}", site.log());
    }
    sealed(&pair.east, "web");

    // All of it, at the target, with the source gone for good.
    pair.east.kill();
    guest.kill();
    pair.west.kill();
    std::fs::remove_dir_all(pair.west.dir.join("catalogue")).unwrap();
    pair.west.start();
    let points = pair.west.target("web").points;
    assert!(points >= 2, "{points}");
    // A file that its command line names is gone: told, and nothing is lost by it.
    let aside = guest.kernel.with_extension("aside");
    std::fs::rename(&guest.kernel, &aside).unwrap();
    let refused = pair.west.cli(&["failover", "web"]).bad("vmlinuz");
    println!("no kernel: {}", refused.err.trim());
    std::fs::rename(&aside, &guest.kernel).unwrap();
    pair.west.cli(&["failover", "web"]).good();
    whole(&runs_at(&pair.west, "web"));
}

#[test]
fn a_store_that_cannot_be_written_is_told_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = Tmpfs::mount(&dir.path().join("disk"), "64m") else {
        return;
    };
    let store = disk.0.join("store");
    let more = format!("[store]\ndir = \"{}\"\nmin_free = \"0B\"", store.display());
    let at = support::site::free_udp();
    let mut site = TestSite::new(dir.path(), "east", at, at, &more);
    site.start();
    assert!(site.terminate());
    disk.read_only(true);
    site.start_silently();
    let ended = site.exit_status(PATIENCE).expect("it does not start");
    let log = site.log();
    println!("{}", log.lines().last().unwrap_or_default());
    assert!(!ended.success());
    for words in ["store.dir", store.to_str().unwrap(), "Read-only"] {
        assert!(log.contains(words), "no '{words}' in {log}");
    }
    disk.read_only(false);
    site.start();
}

#[test]
fn a_failover_before_the_first_point_is_refused_and_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let Some(guest) = small(&dir.path().join("g")) else {
        return;
    };
    let pair = Pair::start("4mbit,20ms", "", "");
    pair.protect("web", &guest, "5s");
    pair.west.until("the guest is known", PATIENCE, |view| {
        view.standbys.first().map(drop)
    });
    assert_eq!(pair.east.source("web").phase, Phase::FirstCopy);
    for force in [&["failover", "web"][..], &["failover", "web", "--force"]] {
        let told = pair.west.cli(force);
        println!("{}", told.err.trim());
        assert!(!told.ok);
    }
    pair.west
        .cli(&["failover", "web", "--force"])
        .bad("no recovery point of 'web'");
    assert!(pair.west.target("web").active.is_none());
    assert!(beats(&guest.console), "refusals stop nothing");
    assert_eq!(pair.east.source("web").phase, Phase::FirstCopy);
}
