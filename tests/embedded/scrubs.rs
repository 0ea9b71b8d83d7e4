//! Scrubs in the living daemon, and events that go to a webhook.

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

use farhaven::site::alerts::{Alert, AlertView, Kind};
use farhaven::site::events::EventKind;
use farhaven::site::scrub::ScrubView;
use farhaven::site::webhook::Delivery;
use farhaven_policies::alert::Severity;
use farhaven_storage_sync::unit::GuestId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

/// A scrub from its begin to its end: one that runs already may have passed by what is
/// to be found.
async fn scrubbed(site: &Arc<Site>) -> ScrubView {
    until("no scrub", || {
        let view = site.scrubs().pop().unwrap();
        (!view.running).then_some(())
    })
    .await;
    let begun = site.scrub(None, None).unwrap();
    assert_eq!(begun.len(), 1);
    until("a scrub to its end", || {
        let view = site.scrubs().pop().unwrap();
        (!view.running).then_some(view)
    })
    .await
}

fn first_segment(stage: &Stage) -> PathBuf {
    first_segment_in(stage.dir.path())
}

fn first_segment_in(root: &Path) -> PathBuf {
    let stores = std::fs::read_dir(root.join("west").join("store")).unwrap();
    let of_east = stores.map(|entry| entry.unwrap().path());
    let mut of_east = of_east.filter(|path| path.join("segments").is_dir());
    let store = of_east.next().unwrap();
    store.join("segments").join("00000001.seg")
}

/// Bytes before the body of a batch.
const BATCH_HEADER: usize = 120;
/// Bytes of a segment before the first mark, and of a mark, which is before each batch.
const FRONT: usize = 240;
const MARK: usize = 16;

/// The whole batches of a segment, one of which may be on its way into it: where each
/// ends, of which guest and point it is.
fn batches(path: &Path) -> Vec<(u64, GuestId, u64)> {
    let bytes = std::fs::read(path).unwrap();
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let (mut at, mut found) = (FRONT + MARK, Vec::new());
    while bytes.len() >= at + BATCH_HEADER && bytes[at..at + 4] == *b"FHbt" {
        let guest = GuestId(bytes[at + 16..at + 32].try_into().unwrap());
        let point = u64::from_le_bytes(bytes[at + 32..at + 40].try_into().unwrap());
        at += BATCH_HEADER + number(at + 40) as usize + number(at + 52) as usize;
        if at > bytes.len() {
            break;
        }
        found.push((at as u64, guest, point));
        at += MARK;
    }
    found
}

/// Everything that is stored by now has flipped bits: so close that no frame is without,
/// as one that is spared may be all that a point needs.
fn rot(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let mut begin = FRONT + MARK;
    for (end, ..) in batches(path) {
        let body = &mut bytes[begin + BATCH_HEADER..end as usize];
        body.iter_mut().step_by(8).for_each(|byte| *byte ^= 1);
        begin = end as usize + MARK;
    }
    let mut file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all(&bytes).unwrap();
}

/// A guest with content that it never writes, protected beside the other.
const BOOKS: u64 = 200;

async fn library(stage: &Stage) -> Arc<Mutex<Counter>> {
    let (guest, definition) = Counter::start_with_library(&stage.dir.path().join("lib"), BOOKS);
    let vmm: SharedVmm = guest.clone();
    stage.east.embed("lib", vmm, definition).unwrap();
    let rpo = "1s".parse().unwrap();
    stage.east.protect("lib", "west", Some(rpo)).await.unwrap();
    until("three points of the library", || {
        (source(&stage.east, "lib").points_sealed >= 3).then_some(())
    })
    .await;
    guest
}

fn damage_alert(site: &Site) -> Option<AlertView> {
    let mut alerts = site.alerts().into_iter();
    alerts.find(|alert| alert.kind == Kind::StoreDamaged)
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

/// Damages a batch of this point that it needs: not every one is needed, as a later one
/// may have told all of it anew. Returns where the bit is, and what a scrub found.
async fn damaged(site: &Arc<Site>, segment: &Path, guest: GuestId, point: u64) -> (u64, ScrubView) {
    let stored = batches(segment);
    let of_point = stored
        .iter()
        .rev()
        .filter(|(_, of, at)| (*of, *at) == (guest, point));
    for (end, ..) in of_point {
        flip(segment, end - 1);
        let view = scrubbed(site).await;
        if view.points.iter().any(|damaged| damaged.point == point) {
            return (end - 1, view);
        }
        flip(segment, end - 1);
        assert_eq!(scrubbed(site).await.damaged, 0);
    }
    panic!("point {point} needs none of its own batches");
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
    let web = target(&west, "web").id.parse().unwrap();
    let (bit, view) = damaged(&west, &segment, web, first).await;
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
    assert!(alert.severity >= Severity::Warning);
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

    // The disk gives it whole again.
    west.shutdown().await;
    drop(west);
    flip(&segment, bit);
    let west = site_again(stage.dir.path(), "west", builders(&stage.at_west)).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_is_sent_anew_and_the_next_points_are_whole() {
    let stage = Stage::protected().await;
    let guest = library(&stage).await;
    let west = stage.west.clone();
    let old = west.points("lib").await.unwrap().pop().unwrap().point;
    rot(&first_segment(&stage));
    let view = scrubbed(&west).await;
    assert!(view.damaged > 1, "{view:?}");
    until("the newest points are whole", || {
        let view = west.scrubs().pop().unwrap();
        view.healing.is_empty().then_some(())
    })
    .await;
    // Bit for bit: it looks at all that it ever wrote, and at what it never did.
    let newest = west.points("lib").await.unwrap().pop().unwrap();
    assert!(newest.point > old && newest.damaged.is_none());
    let report = west.test("lib", None).await.unwrap();
    let there = stage.at_west.newest();
    counts_on(&there).await;
    assert!(there.lock().unwrap().library_is_whole(BOOKS));
    west.end_test("lib").await.unwrap();
    // Older ones stay as they are, are named and refused, and the alert says so.
    let refused = west.test("lib", Some(old)).await.unwrap_err().to_string();
    assert!(
        refused.contains("is damaged here") && refused.contains("--point"),
        "{refused}"
    );
    let alert = damage_alert(&west).unwrap();
    assert_eq!(alert.severity, Severity::Warning, "{alert:?}");
    let healed = west.events(0, 10_000, Duration::ZERO).await;
    let healed = healed.iter().filter(|e| e.kind == EventKind::Healed);
    assert!(healed.count() >= 1);
    // A move builds on what was healed.
    stage.east.move_guest("lib", true).await.unwrap();
    let there = stage.at_west.newest();
    counts_on(&there).await;
    assert!(there.lock().unwrap().library_is_whole(BOOKS));
    assert!(report.point >= newest.point && sound(&guest) > 0);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_restarts_sends_what_is_damaged_anew_by_itself() {
    let stage = Stage::set_paired(false).await.protect().await;
    let guest = library(&stage).await;
    let (west, root) = (stage.west.clone(), stage.dir.path());
    stage.east.shutdown().await;
    drop(stage.east);
    rot(&first_segment_in(root));
    // Its guests are the same still: it is told what west holds, and what not.
    let east = site_again(root, "east", Builders::new()).await;
    until("the link", || east.view().peers[0].connected.then_some(())).await;
    let before = west.points("lib").await.unwrap().pop().unwrap().point;
    let vmm: SharedVmm = guest.clone();
    let (_, definition) = Counter::start_with_library(&root.join("unused"), BOOKS);
    east.embed("lib", vmm, definition).unwrap();
    until("a new point", || {
        (source(&east, "lib").newest_point > before + 1).then_some(())
    })
    .await;
    scrubbed(&west).await;
    until("the newest point is whole", || {
        let view = west.scrubs().pop().unwrap();
        (!view.healing.contains(&"lib".to_owned())).then_some(())
    })
    .await;
    west.test("lib", None).await.unwrap();
    let there = stage.at_west.newest();
    counts_on(&there).await;
    assert!(there.lock().unwrap().library_is_whole(BOOKS));
    east.shutdown().await;
    west.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_source_a_damaged_point_is_refused_and_a_whole_one_named() {
    let stage = Stage::protected().await;
    let _guest = library(&stage).await;
    let west = stage.west.clone();
    let segment = first_segment(&stage);
    let id: GuestId = source(&stage.east, "lib").id.parse().unwrap();
    stage.east.shutdown().await;
    drop(stage.east);
    stage.guest.lock().unwrap().end();
    until("the link is down", || {
        (!west.view().peers[0].connected).then_some(())
    })
    .await;
    // The last batch of the newest point: no other needs it.
    let name = "lib".to_owned();
    let newest = west.points(&name).await.unwrap().pop().unwrap().point;
    let (_, view) = damaged(&west, &segment, id, newest).await;
    assert_eq!((view.damaged, view.points.len()), (1, 1), "{view:?}");
    assert_eq!(
        (&view.points[0].guest, view.points[0].point),
        (&name, newest)
    );
    assert_eq!(view.healing, std::slice::from_ref(&name));
    let alert = damage_alert(&west).unwrap();
    assert_eq!(alert.severity, Severity::Critical);
    assert!(alert.what.contains(&name), "{alert:?}");
    let points = west.points(&name).await.unwrap();
    let whole = points[points.len() - 2].point;
    assert_eq!(points[points.len() - 1].point, newest);
    let term = target(&west, &name).term;
    let refused = west.fail_over(&name, None, false).await.unwrap_err();
    let refused = refused.to_string();
    assert!(
        refused.contains(&format!("point {newest} of '{name}' is damaged here"))
            && refused.contains(&format!("--point {whole}")),
        "{refused}"
    );
    // Nothing was done.
    assert_eq!(target(&west, &name).term, term);
    assert!(target(&west, &name).active.is_none());
    let report = west.fail_over(&name, Some(whole), false).await.unwrap();
    assert_eq!(report.point, whole);
    counts_on(&stage.at_west.newest()).await;
    west.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_that_is_met_when_a_point_is_restored_is_told() {
    let stage = Stage::protected().await;
    stage.east.pause("web").await.unwrap();
    // A point that was under way would be sealed after the rot, and be whole.
    until("it is paused", || {
        (source(&stage.east, "web").phase == Phase::Paused).then_some(())
    })
    .await;
    let west = stage.west.clone();
    scrubbed(&west).await;
    assert!(damage_alert(&west).is_none());
    rot(&first_segment(&stage));
    let refused = west.test("web", None).await.unwrap_err().to_string();
    assert!(refused.contains("damaged"), "{refused}");
    let alert = until("the alert", || damage_alert(&west)).await;
    assert_eq!(alert.severity, Severity::Critical);
    let view = west.scrubs().pop().unwrap();
    assert!(view.damaged >= 1 && view.points.iter().any(|p| p.guest == "web"));
    stage.end().await;
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
            let delivery: Delivery = serde_json::from_str(&body).unwrap();
            // A disk that is nearly full is told of, too.
            if delivery.event.subject.len() == 1 {
                taken.lock().unwrap().push(delivery);
            }
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
    let alert = |subject: &str| {
        Alert::new(
            Kind::CutGivenUp,
            subject,
            Severity::Warning,
            "broken",
            "mend",
        )
    };
    site.raise(alert("a"));
    site.note(EventKind::Pruned, "west", "not bad enough");
    site.clear(Kind::CutGivenUp, "a");
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
