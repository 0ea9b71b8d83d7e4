#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::*;

/// An agent whose filesystems freeze and thaw, and how it behaves.
#[derive(Default)]
struct Manner {
    frozen: bool,
    /// It does not answer this command.
    silent_on: &'static str,
    /// It answers no client at all.
    dead: bool,
    /// It refuses to freeze.
    refuses: bool,
    /// Commands that it got, but for those that find out.
    did: Vec<String>,
}

fn agent(dir: &Path, manner: &Arc<Mutex<Manner>>) -> PathBuf {
    let path = dir.join("agent.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let manner = manner.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            let mut line = Vec::new();
            while lines
                .read_until(b'\n', &mut line)
                .is_ok_and(|read| read > 0)
            {
                let from = line.iter().rposition(|b| *b == 0xff);
                let asked = &line[from.map_or(0, |at| at + 1)..];
                let asked: Value = serde_json::from_slice(asked).unwrap();
                line.clear();
                let mut manner = manner.lock().unwrap();
                let command = asked["execute"].as_str().unwrap().to_owned();
                let said = match command.as_str() {
                    "guest-sync-delimited" => json!({"return": asked["arguments"]["id"]}),
                    "guest-ping" => json!({"return": {}}),
                    "guest-fsfreeze-status" if manner.frozen => json!({"return": "frozen"}),
                    "guest-fsfreeze-status" => json!({"return": "thawed"}),
                    "guest-fsfreeze-freeze" if manner.refuses => {
                        manner.did.push(command.clone());
                        json!({"error": {"desc": "no such luck"}})
                    }
                    other => {
                        manner.did.push(other.to_owned());
                        manner.frozen = other == "guest-fsfreeze-freeze";
                        json!({"return": 2})
                    }
                };
                if manner.dead || manner.silent_on == command {
                    continue;
                }
                if stream.write_all(format!("{said}\n").as_bytes()).is_err() {
                    break;
                }
            }
        }
    });
    path
}

struct Try {
    dir: tempfile::TempDir,
    manner: Arc<Mutex<Manner>>,
    quiesce: Quiesce,
}

fn with(manner: Manner, within: Duration) -> Try {
    let dir = tempfile::tempdir().unwrap();
    let manner = Arc::new(Mutex::new(manner));
    let path = agent(dir.path(), &manner);
    let mut quiesce = Quiesce::new("web", dir.path(), Some(path), None);
    quiesce.within = Some(within);
    Try {
        dir,
        manner,
        quiesce,
    }
}

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(200);

impl Try {
    fn did(&self) -> Vec<String> {
        self.manner.lock().unwrap().did.clone()
    }

    /// Thawed, by its agent's word, and nothing is owed.
    fn until_thawed(&self) {
        let deadline = Instant::now() + LONG;
        while self.manner.lock().unwrap().frozen || mark(self.dir.path()).exists() {
            assert!(Instant::now() < deadline, "frozen still: {:?}", self.did());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn filesystems_are_frozen_for_a_cut_and_thawed_after_it() {
    let mut it = with(Manner::default(), LONG);
    for _ in 0..3 {
        assert_eq!(it.quiesce.freeze(), Quiesced::Frozen { filesystems: 2 });
        assert!(it.manner.lock().unwrap().frozen && mark(it.dir.path()).exists());
        it.quiesce.thaw();
        // Once is enough.
        it.quiesce.thaw();
        it.until_thawed();
    }
    assert_eq!(it.did().len(), 6);
    it.quiesce.within = None;
    assert_eq!(it.quiesce.freeze(), Quiesced::NotAsked);
    assert!(it.quiesce.ask(LONG).is_ok());
}

#[test]
fn an_agent_that_does_not_answer_holds_nobody_and_is_not_told_to_freeze() {
    let mut it = with(
        Manner {
            dead: true,
            ..Manner::default()
        },
        SHORT,
    );
    let began = Instant::now();
    let Quiesced::Failed(why) = it.quiesce.freeze() else {
        panic!("frozen");
    };
    assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
    assert!(why.contains("did not answer"), "{why}");
    assert!(it.did().is_empty() && !mark(it.dir.path()).exists());
    assert!(it.quiesce.ask(SHORT).is_err());
}

#[test]
fn a_freeze_that_comes_too_late_is_thawed_all_the_same() {
    let manner = Manner {
        silent_on: "guest-fsfreeze-freeze",
        ..Manner::default()
    };
    let mut it = with(manner, SHORT);
    let Quiesced::Failed(why) = it.quiesce.freeze() else {
        panic!("frozen");
    };
    assert!(why.contains("guest-fsfreeze-freeze"), "{why}");
    it.until_thawed();
    assert_eq!(it.did(), ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]);
}

#[test]
fn what_another_program_froze_is_left_alone_and_a_refusal_is_told() {
    let mut it = with(
        Manner {
            frozen: true,
            ..Manner::default()
        },
        LONG,
    );
    let Quiesced::Failed(why) = it.quiesce.freeze() else {
        panic!("frozen");
    };
    assert!(why.contains("another program"), "{why}");
    assert!(it.did().is_empty() && it.manner.lock().unwrap().frozen);

    let mut it = with(
        Manner {
            refuses: true,
            ..Manner::default()
        },
        LONG,
    );
    let Quiesced::Failed(why) = it.quiesce.freeze() else {
        panic!("frozen");
    };
    assert!(why.contains("no such luck"), "{why}");
    it.until_thawed();
}

#[test]
fn a_daemon_that_died_while_they_were_frozen_leaves_that_to_the_next() {
    let mut it = with(Manner::default(), LONG);
    assert_eq!(it.quiesce.freeze(), Quiesced::Frozen { filesystems: 2 });
    let channel = it.quiesce.channel.clone();
    // Held for a move: whoever resumes it thaws it.
    std::fs::write(it.dir.path().join(HELD_MARK), "").unwrap();
    let mut next = Quiesce::new("web", it.dir.path(), channel.clone(), None);
    assert!(next.owed);
    drop(std::mem::replace(
        &mut it.quiesce,
        Quiesce::new("web", it.dir.path(), channel, None),
    ));
    std::fs::remove_file(it.dir.path().join(HELD_MARK)).unwrap();
    next.thaw();
    it.until_thawed();
    assert!(!Quiesce::new("web", it.dir.path(), None, None).owed);
}

#[test]
fn a_guest_without_a_channel_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut none = Quiesce::new("web", dir.path(), None, None);
    none.within = Some(SHORT);
    let Quiesced::Failed(why) = none.freeze() else {
        panic!("frozen");
    };
    assert!(why.contains("farhaven guest check web"), "{why}");
}
