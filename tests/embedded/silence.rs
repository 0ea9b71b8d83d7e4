//! A link that carries nothing for a while, and then again, on one and the same
//! connection: what was decided meanwhile is told all the same.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::net::UdpSocket;

use super::*;

/// Datagrams between a site that dials here and one that listens, while it is not silent.
struct Between {
    address: SocketAddr,
    silent: Arc<AtomicBool>,
}

impl Between {
    async fn to(there: SocketAddr) -> Self {
        let front = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let back = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        back.connect(there).await.unwrap();
        let address = front.local_addr().unwrap();
        let silent = Arc::new(AtomicBool::new(false));
        let goes = silent.clone();
        tokio::spawn(async move {
            let (mut out, mut home) = (vec![0; 1 << 16], vec![0; 1 << 16]);
            let mut dials = address;
            loop {
                // What cannot be sent is lost, as on any link.
                tokio::select! {
                    Ok((bytes, from)) = front.recv_from(&mut out) => {
                        dials = from;
                        if !goes.load(Ordering::Relaxed) {
                            let _ = back.send(&out[..bytes]).await;
                        }
                    }
                    Ok(bytes) = back.recv(&mut home) => {
                        if !goes.load(Ordering::Relaxed) {
                            let _ = front.send_to(&home[..bytes], dials).await;
                        }
                    }
                }
            }
        });
        Self { address, silent }
    }
}

/// Two sites whose link can be silenced, with the guest protected from east.
async fn stage() -> (Stage, Between) {
    let (stage, link) = linked().await;
    (stage.protect().await, link)
}

fn policy_files(directory: &Path) -> std::path::PathBuf {
    directory.join("policies.toml")
}

/// Two such sites, east with policy files.
async fn linked() -> (Stage, Between) {
    let (dir, at_west) = (tempfile::tempdir().unwrap(), CounterBuilder::default());
    let mut of_east = config(dir.path(), "east");
    of_east.site.policy_files = policy_files(dir.path());
    let east = Site::start_with(of_east, Builders::new()).await.unwrap();
    let mut of_west = config(dir.path(), "west");
    let link = Between::to(of_west.listen.address).await;
    of_west.listen.advertise = vec![link.address.to_string()];
    let west = Site::start_with(of_west, builders(&at_west)).await.unwrap();
    let stage = Stage::pair(dir, east, west, at_west, false).await;
    (stage, link)
}

/// Taken over once its source is not heard any more.
async fn fail_over(west: &Arc<Site>, name: &str) {
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = west.fail_over(name, None, false).await {
        assert!(Instant::now() < deadline, "{error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn fenced(east: &Arc<Site>, name: &str) {
    until("fenced", || {
        (source(east, name).phase == Phase::Fenced).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_term_taken_while_the_link_was_silent_stops_the_source() {
    let (stage, link) = stage().await;
    link.silent.store(true, Ordering::Relaxed);
    let refused = stage.west.fail_over("web", None, false).await;
    assert!(refused.unwrap_err().to_string().contains("is alive"));
    fail_over(&stage.west, "web").await;
    // The source knows of nothing, and its connection stands.
    assert_eq!(stage.guest.lock().unwrap().running(), Some(true));
    link.silent.store(false, Ordering::Relaxed);
    fenced(&stage.east, "web").await;
    assert_eq!(stage.guest.lock().unwrap().running(), Some(false));
    counts_on(&stage.at_west.newest()).await;
    stage.end().await;
}

/// Whichever of them is told first.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_cannot_be_stopped_keeps_no_other_running() {
    let (stage, link) = stage().await;
    let mut others = Vec::new();
    for name in ["app", "mail", "dns"] {
        let (guest, definition) = Counter::start(&stage.dir.path().join(name));
        stage.east.embed(name, guest.clone(), definition).unwrap();
        let rpo = Some("1s".parse().unwrap());
        stage.east.protect(name, "west", rpo).await.unwrap();
        until("a point", || {
            (source(&stage.east, name).points_sealed >= 1).then_some(())
        })
        .await;
        others.push((name, guest));
    }
    link.silent.store(true, Ordering::Relaxed);
    for (name, _) in &others {
        fail_over(&stage.west, name).await;
    }
    fail_over(&stage.west, "web").await;
    stage.guest.lock().unwrap().fail(u32::MAX, 0);
    link.silent.store(false, Ordering::Relaxed);
    for (name, guest) in &others {
        fenced(&stage.east, name).await;
        assert_eq!(guest.lock().unwrap().running(), Some(false));
    }
    until("that is said", || {
        let said = source(&stage.east, "web").trouble;
        said.contains("COULD NOT BE STOPPED").then_some(())
    })
    .await;
    assert_eq!(stage.guest.lock().unwrap().running(), Some(true));
    stage.guest.lock().unwrap().fail(0, 0);
    until("stopped in the end", || {
        (stage.guest.lock().unwrap().running() == Some(false)).then_some(())
    })
    .await;
    stage.end().await;
}

/// Its session outlives the cut, and so nothing is opened that would tell it.
#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_changed_while_the_link_was_cut_is_told_when_it_is_back() {
    let (stage, link) = linked().await;
    let kept = |days: u32| {
        let text = format!(
            "[sites.west]\n[policies.slow]\nrpo = \"1h\"\nretention = \"daily for {days}d\"\n[groups.shop]\npolicy = \"slow\"\npeer = \"west\"\n[groups.shop.guests.web]\n"
        );
        std::fs::write(policy_files(stage.dir.path()), text).unwrap();
    };
    kept(7);
    let embedded = stage
        .east
        .embed("web", stage.vmm(), stage.definition.clone());
    embedded.unwrap();
    let (east, west) = (&stage.east, &stage.west);
    let protected = || {
        let view = source(east, "web");
        (view.points_sealed >= 1 && view.phase == Phase::Protected).then_some(())
    };
    until("a point", protected).await;
    link.silent.store(true, Ordering::Relaxed);
    until("the link is down", || {
        (!east.view().peers[0].connected).then_some(())
    })
    .await;
    kept(3);
    until("east heeds it", || {
        let groups = east.view().groups;
        let shop = groups.into_iter().find(|group| group.name == "shop")?;
        (shop.owed.retention.to_string() == "daily for 3d").then_some(())
    })
    .await;
    link.silent.store(false, Ordering::Relaxed);
    let deadline = Instant::now() + PATIENCE;
    while west.plan_prune("web").await.unwrap().retention != "daily for 3d" {
        assert!(Instant::now() < deadline, "west was not told");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    stage.end().await;
}
