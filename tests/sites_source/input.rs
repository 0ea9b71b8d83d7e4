//! What operators may get wrong: each is one clear sentence with what to do and
//! an exit status, and the daemon serves on.

use std::fs;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::site::{Pair, TestSite, free_udp};
use crate::support::{GuestOptions, GuestVm};

/// Ends a QEMU with the test.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_operators_get_wrong_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let Some(guest) = GuestVm::start(dir.path(), &GuestOptions::default()) else {
        return;
    };
    let pair = Pair::start("100mbit,10ms,0%", "", "");
    names_that_are_not_known(&pair);
    sockets_that_are_no_guest(&pair, &guest);
    guests_that_cannot_be_protected(&pair, &guest);
    nonsense_on_the_socket(&pair.east);
    assert_eq!(pair.east.view().guests.len(), 2);
}

fn names_that_are_not_known(pair: &Pair) {
    let east = &pair.east;
    for verb in ["pause", "resume", "unprotect", "move"] {
        east.cli(&[verb, "ghost"]).bad("farhaven guest add ghost");
    }
    east.cli(&["protect", "ghost", "--to", "west"])
        .bad("farhaven guest add ghost");
    east.cli(&["take-back", "ghost", "--force"])
        .bad("farhaven guest add ghost");
    for verb in ["check", "show", "remove"] {
        east.cli(&["guest", verb, "ghost"])
            .bad("farhaven guest add ghost");
    }
    for verb in ["points", "failover"] {
        east.cli(&[verb, "ghost"]).bad("no guest 'ghost'");
    }
    east.cli(&["guest", "show", "../../etc/passwd"])
        .bad("no guest");
    east.cli(&["peer", "remove", "nowhere"]).bad("known: west");
    east.cli(&["peer", "remove", "a name/with ?#%"])
        .bad("known: west");
    east.cli(&["pair", "not an invitation"]).bad("invitation");
    let own = east.cli(&["pair", "--json"]).good();
    let own: serde_json::Value = serde_json::from_str(&own.out).unwrap();
    east.cli(&["pair", own["invitation"].as_str().unwrap()])
        .bad("own");
}

fn sockets_that_are_no_guest(pair: &Pair, guest: &GuestVm) {
    let east = &pair.east;
    let qmp = guest.qmp.to_str().unwrap();
    let absent = east.dir.join("absent.sock");
    east.cli(&["guest", "add", "web", "--qmp", absent.to_str().unwrap()])
        .bad("absent.sock");
    let file = east.dir.join("site.toml");
    east.cli(&["guest", "add", "web", "--qmp", file.to_str().unwrap()])
        .bad("site.toml");
    let console = guest.console.socket.to_str().unwrap();
    let begun = Instant::now();
    let silent = east
        .cli(&["guest", "add", "web", "--qmp", console])
        .bad("console.sock");
    println!("no QMP: {} ({:?})", silent.err.trim(), begun.elapsed());

    // Something that speaks, but not QMP.
    let path = east.dir.join("other.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let other = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(b"220 mail.example ESMTP\r\n");
        let _ = stream.read(&mut [0; 64]);
    });
    let other_told = east
        .cli(&["guest", "add", "web", "--qmp", path.to_str().unwrap()])
        .bad("other.sock");
    println!("not QMP: {}", other_told.err.trim());
    other.join().unwrap();

    let other_client = guest.connect();
    let busy = east
        .cli(&["guest", "add", "web", "--qmp", qmp])
        .bad("qmp.sock");
    println!("busy: {}", busy.err.trim());
    drop(other_client);

    for name in ["", "a/b", "-x", "über", &"n".repeat(200)] {
        east.cli(&["guest", "add", "--qmp", qmp, "--", name])
            .bad("name");
    }
    east.cli(&["guest", "add", "web", "--qmp", qmp]).good();
    east.cli(&["guest", "add", "web", "--qmp", qmp])
        .bad("known already");
    east.cli(&["guest", "add", "web2", "--qmp", qmp])
        .bad("known already");
}

fn guests_that_cannot_be_protected(pair: &Pair, guest: &GuestVm) {
    let east = &pair.east;
    east.cli(&["protect", "web", "--to", "nowhere"])
        .bad("known: west");
    for rpo in ["0s", "-1s", "soon", "", "99999999999999999999h", "1"] {
        let told = east.cli(&["protect", "web", "--to", "west", &format!("--rpo={rpo}")]);
        println!("--rpo {rpo}: {}", told.err.trim());
        assert!(!told.ok && told.err.contains("rpo"), "{told:?}");
    }
    for verb in ["pause", "resume", "unprotect", "move"] {
        east.cli(&[verb, "web"]).bad("farhaven protect web");
    }
    let other_client = guest.connect();
    let busy = east.cli(&["protect", "web", "--to", "west"]);
    println!("protect while busy: {}", busy.err.trim());
    assert!(!busy.ok && busy.err.contains("qmp.sock"));
    drop(other_client);
    // A file that the peer's QEMU would look for.
    let aside = guest.kernel.with_extension("aside");
    fs::rename(&guest.kernel, &aside).unwrap();
    let checked = east
        .cli(&["guest", "check", "web", "--to", "west"])
        .bad("protection");
    assert!(checked.out.contains("vmlinuz"), "{}", checked.out);
    let refused = east.cli(&["protect", "web", "--to", "west"]).bad("vmlinuz");
    println!("no kernel: {}", refused.err.trim());
    assert!(refused.err.contains("copy it there"));
    fs::rename(&aside, &guest.kernel).unwrap();
    assert!(east.source("web").peer.is_none());

    // RAM that nobody else can read.
    let path = east.dir.join("private.sock");
    let qemu = Command::new("qemu-system-x86_64")
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-S",
            "-m",
            "64",
        ])
        .args(["-machine", "pc-q35-7.2", "-accel", "tcg", "-qmp"])
        .arg(format!("unix:{},server=on,wait=off", path.display()))
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _qemu = Ends(qemu);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !path.exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    let added = east
        .cli(&["guest", "add", "private", "--qmp", path.to_str().unwrap()])
        .good();
    drop(added);
    let checked = east
        .cli(&["guest", "check", "private"])
        .bad("stop the protection");
    println!("{}{}", checked.out, checked.err);
    assert!(checked.out.contains("share=on"), "{}", checked.out);
    let refused = east
        .cli(&["protect", "private", "--to", "west"])
        .bad("share=on");
    println!("{}", refused.err);
}

fn nonsense_on_the_socket(east: &TestSite) {
    let say = |bytes: &[u8], whole: bool| {
        let mut stream = UnixStream::connect(east.dir.join("api.sock")).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        stream
            .set_write_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let _ = stream.write_all(bytes);
        if !whole {
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        let mut answer = Vec::new();
        let _ = stream.take(1 << 20).read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    };
    say(&[0xff; 100_000], false);
    say(b"\0\0\0\0", false);
    let post = |path: &str, body: &[u8]| {
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: f\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        say(&[head.as_bytes(), body].concat(), true)
    };
    let huge = post("/v1/guests", &vec![b'['; 8 << 20]);
    assert!(huge.starts_with("HTTP/1.1 4") || huge.is_empty(), "{huge}");
    let deep = post("/v1/guests", &vec![b'['; 60_000]);
    let wrong = post("/v1/guests", br#"{"name": 3}"#);
    let more = post(
        "/v1/guests/web/protect",
        br#"{"to": "west", "rpo": "10s", "bananas": 1}"#,
    );
    let invite = post("/v1/invitations", br#"{"valid_s": 18446744073709551615}"#);
    let nothing = post("/v1/nothing", b"{}");
    for answer in [deep, wrong, more, nothing] {
        let first = answer.lines().next().unwrap_or_default().to_owned();
        assert!(first.starts_with("HTTP/1.1 4"), "{answer}");
        // Scripts are promised an error's form.
        let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default();
        let body: Result<serde_json::Value, _> = serde_json::from_str(body);
        assert!(body.is_ok_and(|b| b["error"].is_string()), "{answer}");
    }
    assert!(invite.starts_with("HTTP/1.1 200"), "{invite}");
    east.cli(&["status"]).good();
}

#[test]
fn a_daemon_that_cannot_start_tells_why() {
    let dir = tempfile::tempdir().unwrap();
    let mut site = TestSite::new(dir.path(), "east", free_udp(), free_udp(), "");
    let none = site.cli(&["status"]).bad("site run --config");
    println!("no daemon: {}", none.err.trim());
    let file = site.dir.join("site.toml");
    let good = fs::read_to_string(&file).unwrap();
    let ends = |site: &mut TestSite, words: &[&str]| {
        let _ = fs::remove_file(site.dir.join("daemon.log"));
        site.start_silently();
        let status = site
            .exit_status(Duration::from_secs(20))
            .expect("it ends by itself");
        let log = site.log();
        println!("{}", log.trim());
        assert!(!status.success());
        for word in words {
            assert!(log.contains(word), "no '{word}' in: {log}");
        }
    };

    let bad = |text: &str| fs::write(&file, text).unwrap();
    bad(&good.replace("advertise", "advertize"));
    ends(&mut site, &["site.toml", "advertize", "advertise", "6"]);
    bad(&format!("{good}\n[protect]\nrpo = \"soon\"\n"));
    ends(&mut site, &["site.toml", "rpo", "soon"]);
    bad(&format!("{good}\n[protect\n"));
    ends(&mut site, &["site.toml"]);
    fs::remove_file(&file).unwrap();
    ends(&mut site, &["site.toml"]);

    // A port that someone has.
    bad(&good);
    let taken = UdpSocket::bind(site.listen).unwrap();
    let listen = site.listen.to_string();
    ends(&mut site, &["listen.address", &listen, "ss -lunp"]);
    drop(taken);

    // Memory files where nobody can make a directory.
    fs::write(dir.path().join("file"), "").unwrap();
    let nowhere = dir.path().join("file/ram");
    let ram = good.lines().find(|l| l.starts_with("ram_dir")).unwrap();
    bad(&good.replace(ram, &format!("ram_dir = \"{}\"", nowhere.display())));
    ends(
        &mut site,
        &["activate.ram_dir", nowhere.to_str().unwrap(), "written"],
    );
    bad(&good);

    // A second daemon on the same directory, with its own port.
    site.start();
    let text = good.replace(&site.listen.to_string(), &free_udp().to_string());
    let second = dir.path().join("second.toml");
    fs::write(&second, text).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_farhaven"))
        .args(["site", "run", "--config"])
        .arg(&second)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    println!("second: {}", told.trim());
    assert!(!output.status.success());
    assert!(told.contains(&site.dir.display().to_string()), "{told}");
    site.cli(&["status"]).good();
    assert!(site.terminate());
    site.start();
}

#[test]
fn a_reader_that_is_gone_is_no_fault_of_the_program() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_farhaven"))
        .args(["policy", "schema"])
        .stdout(writer)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), told.as_str()), (Some(141), ""));
}
