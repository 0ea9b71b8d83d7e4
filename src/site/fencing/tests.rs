//! What runs here as this site's own beside what was taken over here.

use std::pin::pin;
use std::sync::Mutex;
use std::task::Poll;

use super::*;
use crate::guest::embedded::disk::TrackedDisk;
use crate::guest::embedded::{Bitmap, Definition, RamBlock, Vmm, VmmError};
use crate::site::surroundings::tests::Stage;

/// A monitor of which nothing is asked but to stop.
struct Monitor {
    ram: [RamBlock; 1],
    stops: bool,
    running: bool,
}

impl Monitor {
    fn new(stops: bool) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            ram: [RamBlock {
                name: "ram".to_owned(),
                bytes: 4096,
            }],
            stops,
            running: true,
        }))
    }

    fn definition() -> Definition {
        Definition {
            kind: "sim".to_owned(),
            vcpus: 1,
            ram: vec![("ram".to_owned(), 4096)],
            disks: Vec::new(),
            config: Vec::new(),
        }
    }
}

fn refuses<T>() -> Result<T, VmmError> {
    Err(VmmError::State("as the test asked".to_owned()))
}

impl Vmm for Monitor {
    fn ram(&self) -> &[RamBlock] {
        &self.ram
    }

    fn disks(&self) -> &[Arc<TrackedDisk>] {
        &[]
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        if !self.stops {
            return refuses();
        }
        self.running = false;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        refuses()
    }

    fn running(&self) -> Option<bool> {
        Some(self.running)
    }

    fn ended_because(&self) -> String {
        String::new()
    }

    fn dirty(&mut self, _block: usize) -> Result<Bitmap, VmmError> {
        refuses()
    }

    fn read_ram(&self, _block: usize, _offset: u64, _into: &mut [u8]) -> Result<(), VmmError> {
        refuses()
    }

    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        refuses()
    }

    fn throttle(&mut self, _percent: u8) -> Result<(), VmmError> {
        refuses()
    }

    fn end(&mut self) {
        self.running = false;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_taken_over_is_stopped_though_the_site_s_own_does_not_stop() {
    let stage = Stage::protected().await;
    let west = stage.west.clone();
    west.fail_over("web", None, true).await.unwrap();
    let standby = stage.standby();
    let active = standby.state.lock().await.active.clone();
    let (_, there) = active.unwrap();
    assert!(there.runs().unwrap());
    // By its record it is west's own, too: as while it turns round.
    let own = Monitor::new(false);
    west.embed_as(stage.web, "web", own.clone(), Monitor::definition())
        .unwrap();
    let newer = stage.newer();
    west.fence.adopt(newer).unwrap();
    let told = west.fenced(newer).await.unwrap_err();
    assert!(told.contains("could not be stopped here"), "{told}");
    assert!(!there.runs().unwrap());
    assert!(standby.active().is_none());
    // And that one, once it does.
    own.lock().unwrap().stops = true;
    west.fenced(newer).await.unwrap();
    assert_eq!(own.lock().unwrap().running(), Some(false));
    drop(west);
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_turns_round_while_its_copy_is_waited_for_is_stopped() {
    let stage = Stage::protected().await;
    let west = stage.west.clone();
    west.fail_over("web", None, true).await.unwrap();
    let standby = stage.standby();
    let newer = stage.newer();
    west.fence.adopt(newer).unwrap();
    let mut state = standby.state.clone().lock_owned().await;
    let mut fenced = pin!(west.fenced(newer));
    // It has found nothing of west's own, and waits for what was taken over.
    let waits = std::future::poll_fn(|context| {
        let polled = fenced.as_mut().poll(context);
        Poll::Ready(polled.is_pending())
    });
    assert!(waits.await);
    let own = Monitor::new(true);
    west.embed_as(stage.web, "web", own.clone(), Monitor::definition())
        .unwrap();
    standby.turn(true, standby.base());
    state.active = None;
    drop(state);
    fenced.await.unwrap();
    assert_eq!(own.lock().unwrap().running(), Some(false));
    stage.west.shutdown().await;
    stage.east.shutdown().await;
}
