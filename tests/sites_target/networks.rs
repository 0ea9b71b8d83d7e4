//! A group's network map: real bridges, in a network namespace of their own, and
//! a bridge that is not there, which nothing is stopped for.

use std::process::Command;

use farhaven::site::groups::GroupMove;

use super::*;

/// Set for the test that runs itself again in namespaces of its own.
const INSIDE: &str = "FARHAVEN_TEST_INSIDE";

/// A network of its own, with a bridge, and a QEMU that is allowed to join it.
const NAMESPACE: &str = r#"set -e
cp -a /etc "$1/etc"
mkdir -p "$1/etc/qemu"
echo "allow all" > "$1/etc/qemu/bridge.conf"
mount --bind "$1/etc" /etc
mount -t sysfs none /sys
ip link set lo up
for bridge in fhbr0 fhbr1; do
    ip link add $bridge type bridge
    ip link set $bridge up
done
"#;

/// Why a namespace with a bridge cannot be had here.
fn impossible(dir: &Path) -> Option<String> {
    let tried = Command::new("unshare")
        .args(["--net", "--mount", "sh", "-c", NAMESPACE, "sh"])
        .arg(dir)
        .output();
    match tried {
        Err(error) => Some(format!("no unshare: {error}")),
        Ok(tried) if !tried.status.success() => {
            Some(String::from_utf8_lossy(&tried.stderr).into_owned())
        }
        Ok(_) if !Path::new("/usr/lib/qemu/qemu-bridge-helper").exists() => {
            Some("QEMU's bridge helper is not installed".to_owned())
        }
        Ok(_) => None,
    }
}

fn policies(bridge: &str) -> String {
    let mut text = "[sites.west]\n[policies.gold]\nrpo = \"2s\"\n[groups.bank]\npolicy = \"gold\"\npeer = \"west\"\n".to_owned();
    for guest in ["db", "web"] {
        text.push_str(&format!(
            "[groups.bank.guests.{guest}.networks.west.lan]\nbridge = \"{bridge}\"\n"
        ));
    }
    text
}

/// Ports of the bridge at west; fhbr0 is that of the source.
fn ports() -> usize {
    std::fs::read_dir("/sys/class/net/fhbr1/brif").map_or(0, Iterator::count)
}

#[test]
fn a_groups_networks_are_those_of_its_map_and_a_missing_bridge_stops_nothing() {
    if std::env::var_os(INSIDE).is_some() {
        return inside();
    }
    let probe = tempfile::tempdir().unwrap();
    if let Some(why) = impossible(probe.path()) {
        eprintln!("SKIPPED: no bridge in a network namespace of its own here: {why}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let ran = Command::new("unshare")
        .args(["--net", "--mount", "sh", "-c"])
        .arg(format!("{NAMESPACE}shift; exec \"$@\""))
        .arg("sh")
        .arg(dir.path())
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "--nocapture",
            "networks::a_groups_networks_are_those_of_its_map_and_a_missing_bridge_stops_nothing",
        ])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&ran.stdout);
    let words = String::from_utf8_lossy(&ran.stderr);
    assert!(
        ran.status.success() && told.contains("1 passed"),
        "{told}\n{words}"
    );
    println!("{told}\n{words}");
}

fn inside() {
    let dir = tempfile::tempdir().unwrap();
    let mut guests = Vec::new();
    for name in ["db", "web"] {
        let options = GuestOptions {
            memory: 192,
            cmdline: "farhaven.load=database farhaven.fill=8 farhaven.pages=2048".to_owned(),
            extra: [
                "-netdev",
                "bridge,br=fhbr0,id=lan",
                "-device",
                "virtio-net-pci,netdev=lan,romfile=",
            ]
            .map(str::to_owned)
            .into(),
        };
        let at = dir.path().join(name);
        std::fs::create_dir_all(&at).unwrap();
        let Some(guest) = GuestVm::start(&at, &options) else {
            return;
        };
        guests.push((name, guest));
    }
    // Of the site's own configuration, and wrong: the group's map goes before it.
    let mut pair = Pair::start(LINK, "", "[networks]\nlan = \"bridge,br=fhnone\"");
    let files = dir.path().join("policies.toml");
    std::fs::write(&files, policies("fhgone")).unwrap();
    follows(&mut pair.east, &files);
    protected_as_one(&pair, &guests);

    // A bridge that is not here: said, with what to do, and nothing was stopped.
    let missing = "there is no bridge fhgone here: make it (ip link add fhgone type bridge)";
    for verb in [
        ["failover", "db", "--force"],
        ["failover", "bank", "--force"],
    ] {
        pair.west.cli(&verb).bad(missing);
    }
    let told = pair.east.cli(&["move", "bank", "--accept-pause"]);
    told.bad(missing);
    for (name, guest) in &guests {
        assert!(pair.west.target(name).active.is_none());
        assert!(beats(&guest.console), "{name} goes on at its source");
    }

    std::fs::write(&files, policies("fhbr1")).unwrap();
    let moved = pair
        .east
        .until("the mended map is told", PATIENCE * 2, |_| {
            let told = (pair.east).cli(&["move", "bank", "--accept-pause", "--json"]);
            told.ok.then_some(told.out)
        });
    let moved: GroupMove = serde_json::from_str(&moved).unwrap();
    assert_eq!(moved.remains, "", "{moved:?}");
    for (name, _) in &guests {
        runs_at(&pair.west, name);
        let pid = pair.west.target(name).active.unwrap().pid.unwrap();
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        assert!(line.contains("bridge,br=fhbr1,id=lan"), "{line}");
    }
    assert_eq!(ports(), 2, "both are in the bridge");

    // Back at its source; then one guest of the group alone.
    pair.west.cli(&["rollback", "bank"]).good();
    assert_eq!(ports(), 0);
    for (name, _) in &guests {
        sealed(&pair.east, name);
    }
    pair.west.cli(&["failover", "db", "--force"]).good();
    runs_at(&pair.west, "db");
    assert_eq!(ports(), 1, "as its group's map says");
}
