#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

use proptest::prelude::*;

use super::*;
use crate::guest::qemu::options::parse;

const PATIENCE: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(300);

fn words(line: &str) -> Vec<Argument> {
    let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    parse(&words)
}

/// As [`fake_for`], one client.
fn fake(
    before: &'static [u8],
    says: impl Fn(&str, &Value) -> Option<Vec<u8>> + Send + 'static,
) -> (tempfile::TempDir, PathBuf, JoinHandle<()>) {
    fake_for(1, before, says)
}

/// Answers so many clients, one after the other: `says` gets each command with its
/// arguments; `None` is silence.
fn fake_for(
    clients: usize,
    before: &'static [u8],
    says: impl Fn(&str, &Value) -> Option<Vec<u8>> + Send + 'static,
) -> (tempfile::TempDir, PathBuf, JoinHandle<()>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let served = std::thread::spawn(move || {
        for _ in 0..clients {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(before).unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let mut line = Vec::new();
            while reader
                .read_until(b'\n', &mut line)
                .is_ok_and(|read| read > 0)
            {
                let from = line.iter().rposition(|b| *b == DELIMITER);
                let asked = &line[from.map_or(0, |at| at + 1)..];
                let asked: Value = serde_json::from_slice(asked).unwrap();
                let command = asked["execute"].as_str().unwrap();
                if let Some(said) = says(command, &asked["arguments"])
                    && stream.write_all(&said).is_err()
                {
                    break;
                }
                line.clear();
            }
        }
    });
    (dir, path, served)
}

/// What a sound agent says.
fn sound(command: &str, arguments: &Value) -> Option<Vec<u8>> {
    let said = match command {
        "guest-sync-delimited" => {
            let mut said = vec![DELIMITER];
            said.extend(json!({"return": arguments["id"]}).to_string().bytes());
            said.push(b'\n');
            return Some(said);
        }
        "guest-ping" => json!({"return": {}}),
        "guest-fsfreeze-status" => json!({"return": "frozen"}),
        "guest-fsfreeze-thaw" | "guest-fsfreeze-freeze" => json!({"return": 2}),
        other => json!({"error": {"class": "CommandNotFound", "desc": format!("no {other}")}}),
    };
    Some(format!("{said}\n").into_bytes())
}

#[test]
fn the_channel_is_found_in_a_command_line() {
    let line = "-chardev socket,id=mon,path=/run/mon,server=on -chardev socket,id=qga0,path=/run/web1.agent,server=on,wait=off \
        -device virtio-serial -device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0";
    assert_eq!(channel(&words(line)).as_deref(), Some("/run/web1.agent"));
    for other in [
        "-device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0",
        "-chardev socket,id=qga0,path=/run/a,server=on -device virtserialport,chardev=qga0,name=com.redhat.spice.0",
        "-chardev socket,id=qga0,path=/run/a,server=off -device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0",
        "-chardev pty,id=qga0 -device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0",
        "",
    ] {
        assert_eq!(channel(&words(other)), None, "{other}");
    }
}

#[test]
fn the_channel_of_a_definition_is_in_its_run_directory() {
    let (run, none) = (Path::new("/run/t1"), "");
    let of = |path: &str| {
        let line = format!(
            "-chardev socket,id=a,path={path},server=on -device virtserialport,chardev=a,name={PORT}"
        );
        channel(&words(&line)).map(|path| match path.strip_prefix("{run}/") {
            Some(name) => run.join(name),
            None => PathBuf::from(path),
        })
    };
    assert_eq!(of("{run}/web.agent"), Some("/run/t1/web.agent".into()));
    assert_eq!(of("/srv/web.agent"), Some("/srv/web.agent".into()));
    assert_eq!(channel(&words(none)), None);
}

#[test]
fn what_qemu_calls_a_listening_socket_is_told_from_others() {
    for (name, path) in [
        (
            "disconnected:unix:/run/a,b.agent,server=on",
            Some("/run/a,b.agent"),
        ),
        ("unix:a.agent,server=on", Some("a.agent")),
        ("unix:/run/a.agent", None),
        ("disconnected:unix:x,abstract=on,server=on", None),
        ("disconnected:tcp:127.0.0.1:7,server=on", None),
        ("pty:/dev/pts/3", None),
        ("", None),
    ] {
        assert_eq!(socket_of(name), path, "{name}");
    }
}

#[test]
fn thawing_goes_on_until_it_is_done_or_given_up() {
    use std::sync::atomic::{AtomicU32, Ordering};
    // Frozen at first, and the first thaw fails.
    static ASKED: AtomicU32 = AtomicU32::new(0);
    let slow = |command: &str, arguments: &Value| match command {
        "guest-fsfreeze-status" => match ASKED.fetch_add(1, Ordering::SeqCst) {
            0 => sound(command, arguments),
            _ => Some(b"{\"return\": \"thawed\"}\n".to_vec()),
        },
        _ => sound(command, arguments),
    };
    let (_dir, path, served) = fake_for(2, b"", slow);
    assert!(thaw_until_done(&path, None, || true, |_| ()));
    assert_eq!(ASKED.load(Ordering::SeqCst), 2);
    served.join().unwrap();
    let (dir, _, _) = fake_for(0, b"", sound);
    let mut told = 0;
    let nobody = dir.path().join("none");
    assert!(!thaw_until_done(&nobody, None, || false, |_| told += 1));
    assert_eq!(told, 1);
}

#[test]
fn an_agent_answers_also_after_what_another_client_left() {
    for before in [
        &b""[..],
        b"{\"return\": 7}\n",
        b"{\"retur",
        b"\xff\xff{}\n\n",
    ] {
        let (_dir, path, served) = fake(before, sound);
        let mut agent = Agent::connect(&path, PATIENCE).unwrap();
        agent.ping().unwrap();
        assert!(agent.is_frozen().unwrap());
        assert_eq!(agent.freeze().unwrap(), 2);
        assert_eq!(agent.thaw().unwrap(), 2);
        drop(agent);
        served.join().unwrap();
    }
}

#[test]
fn silence_has_an_end_and_says_what_to_do() {
    let (_dir, path, served) = fake(b"", |_, _| None);
    let began = Instant::now();
    let told = Agent::connect(&path, SHORT).unwrap_err().to_string();
    assert!(began.elapsed() >= SHORT && began.elapsed() < PATIENCE);
    assert!(told.contains("systemctl start qemu-guest-agent"), "{told}");
    served.join().unwrap();
    // One that dribbles is no better.
    let (_dir, path, served) = fake(b"", |command, arguments| match command {
        "guest-ping" => Some(b"{".to_vec()),
        _ => sound(command, arguments),
    });
    let mut agent = Agent::connect(&path, PATIENCE).unwrap();
    agent.within(SHORT);
    assert!(matches!(agent.ping(), Err(AgentError::TimedOut { .. })));
    drop(agent);
    served.join().unwrap();
}

#[test]
fn what_is_no_agent_is_told_apart() {
    let endless = |command: &str, arguments: &Value| match command {
        "guest-sync-delimited" => sound(command, arguments),
        _ => Some(vec![b'x'; LONGEST_LINE + 10]),
    };
    let (_dir, path, _served) = fake(b"", endless);
    let told = Agent::connect(&path, PATIENCE).unwrap().ping().unwrap_err();
    assert!(told.to_string().contains("does not end"), "{told}");

    let refuses = |command: &str, arguments: &Value| match command {
        "guest-sync-delimited" => sound(command, arguments),
        _ => sound("guest-exec", arguments),
    };
    let (_dir, path, served) = fake(b"", refuses);
    let mut agent = Agent::connect(&path, PATIENCE).unwrap();
    let told = agent.thaw().unwrap_err();
    assert!(matches!(&told, AgentError::Refused { why, .. } if why == "no guest-exec"));
    drop(agent);
    served.join().unwrap();

    let dir = tempfile::tempdir().unwrap();
    let nobody = Agent::connect(&dir.path().join("none"), PATIENCE).unwrap_err();
    assert!(matches!(nobody, AgentError::Connect { .. }), "{nobody}");
    // A path that no socket can have.
    let long = dir.path().join("x".repeat(300));
    assert!(Agent::connect(&long, PATIENCE).is_err());
}

proptest! {
    #[test]
    fn no_bytes_of_a_guest_make_it_fail(line in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = answer(&line);
    }

    #[test]
    fn an_answer_is_found_behind_anything(before in prop::collection::vec(any::<u8>(), 0..100), id in any::<u32>()) {
        let mut line = before;
        line.push(DELIMITER);
        line.extend(json!({"return": id}).to_string().bytes());
        prop_assert_eq!(answer(&line), Ok(Ok(Value::from(id))));
    }
}
