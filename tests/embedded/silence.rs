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

#[tokio::test(flavor = "multi_thread")]
async fn a_term_taken_while_the_link_was_silent_stops_the_source() {
    let (dir, at_west) = (tempfile::tempdir().unwrap(), CounterBuilder::default());
    let east = site(dir.path(), "east", Builders::new()).await;
    let mut of_west = config(dir.path(), "west");
    let link = Between::to(of_west.listen.address).await;
    of_west.listen.advertise = vec![link.address.to_string()];
    let west = Site::start_with(of_west, builders(&at_west)).await.unwrap();
    let stage = Stage::pair(dir, east, west, at_west, false).await;
    let stage = stage.protect().await;

    link.silent.store(true, Ordering::Relaxed);
    let refused = stage.west.fail_over("web", None, false).await;
    assert!(refused.unwrap_err().to_string().contains("is alive"));
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = stage.west.fail_over("web", None, false).await {
        assert!(Instant::now() < deadline, "{error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // The source knows of nothing, and its connection stands.
    assert_eq!(stage.guest.lock().unwrap().running(), Some(true));
    link.silent.store(false, Ordering::Relaxed);
    let east = stage.east.clone();
    until("fenced", || {
        (source(&east, "web").phase == Phase::Fenced).then_some(())
    })
    .await;
    assert_eq!(stage.guest.lock().unwrap().running(), Some(false));
    counts_on(&stage.at_west.newest()).await;
    stage.end().await;
}
