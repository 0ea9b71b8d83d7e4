use super::*;
use std::io::Read;
use std::os::unix::net::UnixListener;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": []}}"#;
const SHORT: Duration = Duration::from_millis(300);

/// A server with a script, on a thread of its own.
pub(in crate::guest::qemu) struct Fake {
    dir: tempfile::TempDir,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Fake {
    fn new(serve: impl FnOnce(UnixStream) + Send + 'static) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(dir.path().join("qmp.sock")).expect("listens");
        let thread = std::thread::spawn(move || {
            if let Ok((stream, _)) = listener.accept() {
                serve(stream);
            }
        });
        Self {
            dir,
            thread: Some(thread),
        }
    }

    /// Greets, accepts the capabilities, then goes on with the script.
    fn greeted(serve: impl FnOnce(UnixStream) + Send + 'static) -> (Self, Qmp) {
        let fake = Self::new(move |mut stream| {
            say(&mut stream, GREETING);
            let asked = hear(&mut stream);
            assert_eq!(asked["execute"], "qmp_capabilities");
            say(
                &mut stream,
                &json!({"return": {}, "id": asked["id"]}).to_string(),
            );
            serve(stream);
        });
        let qmp = fake.connect().expect("connects");
        (fake, qmp)
    }

    /// Greets, and answers every command so, until its client is gone.
    pub(in crate::guest::qemu) fn answering(
        answer: impl Fn(&str) -> Value + Send + 'static,
    ) -> Self {
        Self::new(move |mut stream| {
            say(&mut stream, GREETING);
            loop {
                let asked = hear(&mut stream);
                let Some(command) = asked["execute"].as_str() else {
                    return;
                };
                let told = json!({"return": answer(command), "id": asked["id"]});
                say(&mut stream, &told.to_string());
            }
        })
    }

    pub(in crate::guest::qemu) fn socket(&self) -> PathBuf {
        self.dir.path().join("qmp.sock")
    }

    fn connect(&self) -> Result<Qmp, QmpError> {
        Qmp::connect(&self.socket(), SHORT)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(
                ended.is_ok() || std::thread::panicking(),
                "the fake server failed"
            );
        }
    }
}

fn say(stream: &mut UnixStream, line: &str) {
    let _ = stream.write_all(format!("{line}\r\n").as_bytes());
}

fn hear(stream: &mut UnixStream) -> Value {
    let mut line = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).is_ok_and(|n| n == 1) && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    serde_json::from_slice(&line).unwrap_or_default()
}

fn refused(qmp: Result<Qmp, QmpError>) -> QmpError {
    match qmp {
        Ok(_) => panic!("connected"),
        Err(error) => error,
    }
}

#[test]
fn replies_events_and_refusals_are_told_apart() {
    let (_fake, mut qmp) = Fake::greeted(|mut stream| {
        let asked = hear(&mut stream);
        say(&mut stream, r#"{"event": "STOP", "data": {}}"#);
        say(
            &mut stream,
            &json!({"return": {"status": "paused"}, "id": asked["id"]}).to_string(),
        );
        let asked = hear(&mut stream);
        let error = json!({"class": "GenericError", "desc": "not now"});
        say(
            &mut stream,
            &json!({"error": error, "id": asked["id"]}).to_string(),
        );
        say(
            &mut stream,
            r#"{"event": "MIGRATION", "data": {"status": "active"}}"#,
        );
        say(
            &mut stream,
            r#"{"event": "MIGRATION", "data": {"status": "failed"}}"#,
        );
    });
    assert_eq!(qmp.version(), (7, 2, 22));
    let status = qmp.execute("query-status", json!({})).expect("answers");
    assert_eq!(status["status"], "paused");
    assert!(qmp.take_event("STOP").is_some());
    assert!(qmp.take_event("STOP").is_none());
    let error = qmp.execute("cont", json!({})).expect_err("refused");
    assert!(matches!(&error, QmpError::Refused { desc, .. } if desc == "not now"));
    qmp.wait_event("MIGRATION", SHORT, |d| d["status"] == "failed")
        .expect("comes");
    assert!(
        qmp.take_event("MIGRATION").is_some(),
        "the one before is kept"
    );
}

#[test]
fn a_late_reply_is_not_taken_for_the_next() {
    let (_fake, mut qmp) = Fake::greeted(|mut stream| {
        let first = hear(&mut stream);
        let second = hear(&mut stream);
        say(
            &mut stream,
            &json!({"return": "late", "id": first["id"]}).to_string(),
        );
        say(
            &mut stream,
            &json!({"return": "right", "id": second["id"]}).to_string(),
        );
    });
    let slow = qmp.execute("stop", json!({})).expect_err("no answer");
    assert!(matches!(slow, QmpError::TimedOut { .. }), "{slow}");
    assert_eq!(
        qmp.execute("query-status", json!({})).expect("answers"),
        "right"
    );
}

/// As QEMU 7.2 does it when its other clients have it send events meanwhile: 1 of 125
/// greetings came after an event, 1 of 16,000 after a reply.
#[test]
fn what_was_for_the_client_before_is_passed_over() {
    let fake = Fake::new(|mut stream| {
        say(&mut stream, r#"{"event": "RESUME", "data": {}}"#);
        say(&mut stream, r#"{"return": {"status": "running"}, "id": 2}"#);
        say(&mut stream, GREETING);
        let asked = hear(&mut stream);
        for id in [1, 2, 3, 1_u64 << 62] {
            let error = json!({"class": "GenericError", "desc": "for another"});
            say(&mut stream, &json!({"error": error, "id": id}).to_string());
        }
        say(
            &mut stream,
            &json!({"return": {}, "id": asked["id"]}).to_string(),
        );
        let asked = hear(&mut stream);
        for id in [1, 2, 3, 1_u64 << 62] {
            say(
                &mut stream,
                &json!({"return": "for another", "id": id}).to_string(),
            );
        }
        say(
            &mut stream,
            &json!({"return": "right", "id": asked["id"]}).to_string(),
        );
    });
    let mut qmp = fake.connect().expect("connects");
    let answer = qmp.execute("query-status", json!({}));
    assert_eq!(answer.expect("answers"), "right");
    assert!(qmp.take_event("RESUME").is_none());
}

#[test]
fn what_is_no_qmp_is_refused() {
    for line in [
        "SSH-2.0-OpenSSH_9.2",
        "{}",
        "[1]",
        "\u{0}\u{1}",
        r#"{"QMP": 5}"#,
    ] {
        let fake = Fake::new(move |mut stream| {
            say(&mut stream, line);
            let _ = hear(&mut stream);
        });
        let error = refused(fake.connect());
        assert!(
            matches!(error, QmpError::Protocol { .. }),
            "{line}: {error}"
        );
    }
    let (_fake, mut qmp) = Fake::greeted(|mut stream| {
        let _ = hear(&mut stream);
        say(&mut stream, r#"{"neither": 1}"#);
    });
    assert!(matches!(
        qmp.execute("cont", json!({})),
        Err(QmpError::Protocol { .. })
    ));
}

#[test]
fn an_end_at_any_byte_is_told_as_that() {
    for cut in [0, 1, 40, GREETING.len()] {
        let fake = Fake::new(move |mut stream| {
            let _ = stream.write_all(&GREETING.as_bytes()[..cut]);
        });
        let error = refused(fake.connect());
        assert!(matches!(error, QmpError::Closed { .. }), "{cut}: {error}");
    }
    let (_fake, mut qmp) = Fake::greeted(|mut stream| {
        let _ = hear(&mut stream);
    });
    let error = qmp.execute("stop", json!({})).expect_err("closed");
    assert!(
        matches!(&error, QmpError::Closed { command, .. } if command == "stop"),
        "{error}"
    );
}

#[test]
fn a_busy_an_absent_and_a_slow_qemu_differ() {
    let fake = Fake::new(|mut stream| {
        let _ = hear(&mut stream);
    });
    let begun = Instant::now();
    assert!(matches!(refused(fake.connect()), QmpError::Busy { .. }));
    assert!(begun.elapsed() < SHORT * 4);
    let absent = Qmp::connect(Path::new("/nonexistent/qmp.sock"), SHORT);
    assert!(matches!(refused(absent), QmpError::Connect { .. }));
    // A byte now and then does not prolong the wait.
    let (_fake, mut qmp) = Fake::greeted(|mut stream| {
        let _ = hear(&mut stream);
        for _ in 0..12 {
            let _ = stream.write_all(b" ");
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    let begun = Instant::now();
    let error = qmp.execute("stop", json!({})).expect_err("too slow");
    assert!(matches!(error, QmpError::TimedOut { .. }), "{error}");
    assert!(begun.elapsed() < SHORT * 3 / 2 + Duration::from_millis(200));
}

#[test]
fn an_endless_line_and_endless_events_stay_bounded() {
    let (_fake, mut qmp) = Fake::greeted(|mut stream| {
        let _ = hear(&mut stream);
        let long = json!({"event": "LONG", "data": "y".repeat(100_000)}).to_string();
        for _ in 0..40 {
            say(&mut stream, &long);
        }
        for _ in 0..3000 {
            say(&mut stream, r#"{"event": "NOISE", "data": {}}"#);
        }
        let piece = vec![b'x'; 1 << 20];
        for _ in 0..20 {
            if stream.write_all(&piece).is_err() {
                break;
            }
        }
    });
    qmp.connection().timeout = Duration::from_secs(20);
    let error = qmp.execute("stop", json!({})).expect_err("too long");
    assert!(matches!(error, QmpError::Protocol { .. }), "{error}");
    let connection = qmp.connection();
    let kept: usize = connection.events.iter().map(|kept| kept.bytes).sum();
    assert_eq!(kept, connection.event_bytes);
    assert!(connection.events.len() <= EVENTS && kept <= EVENT_BYTES);
}
