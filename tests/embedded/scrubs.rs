//! Scrubs in the living daemon, and events that go to a webhook.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

use farhaven::site::alerts::{Alert, Kind};
use farhaven::site::events::EventKind;
use farhaven::site::scrub::ScrubView;
use farhaven::site::webhook::Delivery;
use farhaven_policies::alert::Severity;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

async fn scrubbed(site: &Arc<Site>) -> ScrubView {
    let begun = site.scrub(None, None).unwrap();
    assert_eq!(begun.len(), 1);
    until("a scrub to its end", || {
        let view = site.scrubs().pop().unwrap();
        (!view.running).then_some(view)
    })
    .await
}

fn first_segment(stage: &Stage) -> PathBuf {
    let stores = std::fs::read_dir(stage.dir.path().join("west").join("store")).unwrap();
    let of_east = stores.map(|entry| entry.unwrap().path());
    let mut of_east = of_east.filter(|path| path.join("segments").is_dir());
    let store = of_east.next().unwrap();
    store.join("segments").join("00000001.seg")
}

fn flip(path: &Path, at: u64) {
    let mut file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.seek(SeekFrom::Start(at)).unwrap();
    file.read_exact(&mut byte).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(&[byte[0] ^ 1]).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_found_told_and_never_run() {
    let stage = Stage::protected().await;
    stage.east.pause("web").await.unwrap();
    let west = stage.west.clone();
    assert!(west.scrub(Some("nowhere"), None).is_err());
    let view = scrubbed(&west).await;
    assert_eq!((view.damaged, &view.points[..]), (0, &[][..]));
    assert!(view.finished_ago_ms.is_some() && view.bytes_total > 0);
    let first = west.points("web").await.unwrap()[0].point;

    let segment = first_segment(&stage);
    flip(&segment, 300);
    let view = scrubbed(&west).await;
    assert!(view.damaged >= 1, "{view:?}");
    assert!(
        view.points
            .iter()
            .any(|p| (p.guest.as_str(), p.point) == ("web", first))
    );
    let alerts = west.alerts();
    let alert = alerts
        .iter()
        .find(|alert| alert.kind == Kind::StoreDamaged)
        .unwrap();
    assert_eq!(alert.severity, Severity::Critical);
    let points = west.points("web").await.unwrap();
    assert!(points[0].damaged.is_some());
    let refused = west.test("web", Some(first)).await.unwrap_err().to_string();
    assert!(refused.contains("damaged"), "{refused}");
    assert!(target(&west, "web").test.is_none());

    // What is known of damage outlives a restart.
    west.shutdown().await;
    drop((west, stage.west));
    let west = site_again(stage.dir.path(), "west", builders(&stage.at_west)).await;
    until("it is known again", || {
        let view = west.scrubs().pop().unwrap();
        (view.damaged >= 1).then_some(())
    })
    .await;

    // The disk gives it whole again, and a scrub to the end says so.
    flip(&segment, 300);
    until("no scrub runs", || {
        (!west.scrubs().pop().unwrap().running).then_some(())
    })
    .await;
    let view = scrubbed(&west).await;
    assert_eq!((view.damaged, &view.points[..]), (0, &[][..]), "{view:?}");
    assert!(
        west.alerts()
            .iter()
            .all(|alert| alert.kind != Kind::StoreDamaged)
    );
    west.test("web", Some(first)).await.unwrap();
    counts_on(&stage.at_west.newest()).await;
    west.end_test("web").await.unwrap();
    stage.east.shutdown().await;
    west.shutdown().await;
}

/// Takes what is posted; refuses every request until told otherwise.
async fn hook(listener: TcpListener, taken: Arc<Mutex<Vec<Delivery>>>, refusals: usize) {
    let mut refuse = refusals;
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut text = Vec::new();
        let body = loop {
            let mut piece = [0; 4096];
            let read = stream.read(&mut piece).await.unwrap();
            assert!(read > 0, "cut short");
            text.extend_from_slice(&piece[..read]);
            let said = String::from_utf8_lossy(&text).into_owned();
            let Some((head, body)) = said.split_once("\r\n\r\n") else {
                continue;
            };
            let head = head.to_lowercase();
            let length = head.split("content-length: ").nth(1).unwrap();
            let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
            assert!(head.starts_with("post /farhaven?to=us http/1.1"), "{head}");
            if body.len() >= length {
                break body.to_owned();
            }
        };
        let status = match refuse {
            0 => "204 No Content",
            _ => "503 Service Unavailable",
        };
        if refuse == 0 {
            taken
                .lock()
                .unwrap()
                .push(serde_json::from_str(&body).unwrap());
        } else {
            refuse -= 1;
        }
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
        stream.write_all(answer.as_bytes()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_gets_every_event_in_turn_and_once() {
    let dir = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let taken: Arc<Mutex<Vec<Delivery>>> = Arc::default();
    let server = tokio::spawn(hook(listener, taken.clone(), 2));
    let configured = || {
        let mut config = config(dir.path(), "alone");
        config.notify.webhook = format!("http://{address}/farhaven?to=us");
        config.notify.severity = Severity::Warning;
        config
    };
    let site = Site::start_with(configured(), Builders::new())
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let alert = |subject: &str| {
        Alert::new(
            Kind::PolicyBroken,
            subject,
            Severity::Warning,
            "broken",
            "mend",
        )
    };
    site.raise(alert("a"));
    site.note(EventKind::Pruned, "west", "not bad enough");
    site.clear(Kind::PolicyBroken, "a");
    let kinds = || -> Vec<EventKind> {
        taken
            .lock()
            .unwrap()
            .iter()
            .map(|delivery| delivery.event.kind)
            .collect()
    };
    let both = vec![EventKind::AlertRaised, EventKind::AlertCleared];
    until("both", || (kinds() == both).then_some(())).await;
    // What was taken is written down by the next event at the latest.
    tokio::time::sleep(Duration::from_secs(1)).await;
    site.shutdown().await;
    drop(site);
    let deadline = Instant::now() + PATIENCE;
    let site = loop {
        match Site::start_with(configured(), Builders::new()).await {
            Ok(site) => break site,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    site.raise(alert("b"));
    until("the third", || (kinds().len() >= 3).then_some(())).await;
    let last = taken.lock().unwrap().pop().unwrap();
    assert_eq!((last.event.subject.as_str(), last.missed), ("b", 0));
    assert_eq!((last.version, last.site.as_str()), (1, "alone"));
    assert_eq!(kinds(), both);
    server.abort();
    site.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn figures_are_told_in_the_form_of_prometheus() {
    let stage = Stage::protected().await;
    let text = stage.east.metrics().unwrap();
    for line in [
        "farhaven_build_info{",
        "farhaven_guest_rpo_seconds{guest=\"web\",peer=\"west\"} ",
        "farhaven_guest_points_sealed_total{guest=\"web\",peer=\"west\"} ",
        "farhaven_guest_sent_bytes_total{guest=\"web\",peer=\"west\"} ",
        "farhaven_peer_connected{peer=\"west\"} 1.0",
        "# TYPE farhaven_guest_rpo_seconds gauge",
    ] {
        assert!(text.contains(line), "no {line} in\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
    let text = stage.west.metrics().unwrap();
    assert!(
        text.contains("farhaven_standby_points{guest=\"web\",from=\"east\"} "),
        "{text}"
    );
    assert!(
        text.contains("farhaven_store_bytes{peer=\"east\"} "),
        "{text}"
    );
    stage.end().await;
}
