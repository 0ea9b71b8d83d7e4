//! What the peer holds and the source does not know: base images, content that
//! a bounded index forgot, content from before a restart of either site.

use std::os::unix::fs::FileExt;

use super::*;
use crate::counter::{BLOCKS, PAGE, PAGES};

/// Blocks of the guests' disks here: 32 MiB of which half compresses.
const DISK: u64 = 8192;
/// Roughly what that is as batches.
const WHOLE: u64 = DISK * PAGE / 2;
/// What a guest of this size sends that has hardly anything of its own.
const LITTLE: u64 = WHOLE / 10;

/// The content of a disk: the counter's own blocks are zeros.
fn content(seed: u64) -> Vec<u8> {
    let mut disk = vec![0; (DISK * PAGE) as usize];
    for block in BLOCKS..DISK {
        let mut hash = blake3::Hasher::new();
        hash.update(&seed.to_le_bytes())
            .update(&block.to_le_bytes());
        let at = (block * PAGE) as usize;
        hash.finalize_xof()
            .fill(&mut disk[at..at + PAGE as usize / 2]);
    }
    disk
}

struct Guest {
    counter: Arc<Mutex<Counter>>,
    definition: Definition,
}

/// A guest whose disk holds this when it starts.
fn guest(stage: &Stage, name: &str, disk: &[u8]) -> Guest {
    let directory = stage.dir.path().join(name);
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("disk.img"), disk).unwrap();
    let (counter, definition) = Counter::start_on(&directory, DISK);
    Guest {
        counter,
        definition,
    }
}

/// Protects it; the batch bytes of its first copy and its first points.
async fn first_copy(east: &Arc<Site>, name: &str, guest: &Guest) -> u64 {
    let embedded = east.embed(name, guest.counter.clone(), guest.definition.clone());
    embedded.unwrap();
    let rpo = "1s".parse().unwrap();
    east.protect(name, "west", Some(rpo)).await.unwrap();
    until("a point", || {
        (source(east, name).points_sealed >= 1).then_some(())
    })
    .await;
    let sent = source(east, name).wan_bytes;
    let peer = &east.view().peers[0];
    eprintln!(
        "{name}: {sent} bytes sent; {} units asked for so far, {} found",
        peer.asked_units, peer.found_units
    );
    sent
}

/// Moves it, and compares all of its disk but for what it changes itself.
async fn reads_there(stage: &Stage, name: &str, disk: &[u8]) {
    stage.east.move_guest(name, false).await.unwrap();
    let there = stage.at_west.newest();
    counts_on(&there).await;
    let counter = there.lock().unwrap();
    let mut read = vec![0; ((DISK - BLOCKS) * PAGE) as usize];
    counter.disks()[0].read(BLOCKS * PAGE, &mut read).unwrap();
    assert!(read == disk[(BLOCKS * PAGE) as usize..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_made_from_a_stored_image_sends_its_differences() {
    let stage = Stage::set().await;
    let base = content(1);
    let file = stage.dir.path().join("base.raw");
    std::fs::write(&file, &base).unwrap();
    let added = stage.west.add_image(&file, "base", None).await.unwrap();
    assert_eq!((added.len(), added[0].bytes), (1, DISK * PAGE));
    let again = stage.west.add_image(&file, "base", None).await.unwrap_err();
    assert!(again.to_string().contains("stored already"), "{again}");
    assert_eq!(stage.west.images(), added);

    let mut disk = base.clone();
    for block in (BLOCKS..DISK).step_by(200) {
        disk[(block * PAGE) as usize] ^= 1;
    }
    let web = guest(&stage, "web", &disk);
    let sent = first_copy(&stage.east, "web", &web).await;
    assert!(sent < LITTLE, "{sent} bytes for a guest of a stored image");
    let (asked, found) = {
        let peer = &stage.east.view().peers[0];
        (peer.asked_units, peer.found_units)
    };
    assert!(
        found > (DISK - BLOCKS) * 9 / 10 && asked >= found,
        "{asked}, {found}"
    );
    // It goes, and what the guest needs of it stays.
    stage.west.remove_image("base", None).await.unwrap();
    assert!(stage.west.images().is_empty());
    let gone = stage.west.remove_image("base", None).await.unwrap_err();
    assert!(gone.to_string().contains("no image 'base'"));
    reads_there(&stage, "web", &disk).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_small_index_forgot_is_asked_for() {
    // Both tables hold less than one disk has: the peer's hints are thinned.
    let stage = Stage::set_sized(false, ByteSize::from_bytes(32 << 10), 32 << 10).await;
    let disk = content(2);
    let one = guest(&stage, "one", &disk);
    let first = first_copy(&stage.east, "one", &one).await;
    assert!(first > WHOLE * 9 / 10, "{first}");
    let two = guest(&stage, "two", &disk);
    let second = first_copy(&stage.east, "two", &two).await;
    assert!(second < WHOLE / 4, "{second} bytes sent again");
    reads_there(&stage, "two", &disk).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_source_does_not_send_what_the_peer_holds() {
    let stage = Stage::set_sized(false, ByteSize::from_mib(256), 32 << 10).await;
    let disk = content(3);
    let one = guest(&stage, "one", &disk);
    first_copy(&stage.east, "one", &one).await;
    stage.east.shutdown().await;
    let mut config = config(stage.dir.path(), "east");
    config.store.index_bytes = ByteSize::from_bytes(32 << 10);
    let Stage {
        east,
        west,
        at_west,
        dir,
        guest: spare,
        definition,
    } = stage;
    drop(east);
    let east = again(config, Builders::new()).await;
    let stage = Stage {
        east,
        west,
        at_west,
        dir,
        guest: spare,
        definition,
    };
    let east = stage.east.clone();
    until("the link", || east.view().peers[0].connected.then_some(())).await;
    let two = guest(&stage, "two", &disk);
    let sent = first_copy(&stage.east, "two", &two).await;
    assert!(sent < WHOLE / 4, "{sent} bytes sent again");
    reads_there(&stage, "two", &disk).await;
    stage.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_target_finds_what_it_holds_even_without_its_hints() {
    let stage = Stage::set_sized(true, ByteSize::from_mib(256), 32 << 10).await;
    let disk = content(4);
    let one = guest(&stage, "one", &disk);
    first_copy(&stage.east, "one", &one).await;
    stage.west.shutdown().await;
    let hints = std::fs::read_dir(stage.dir.path().join("west/store")).unwrap();
    let hints: Vec<_> = hints
        .map(|e| e.unwrap().path().join("hints"))
        .filter(|p| p.exists())
        .collect();
    assert_eq!(hints.len(), 1);
    assert!(std::fs::metadata(&hints[0]).unwrap().len() > DISK * 6);
    std::fs::File::options()
        .write(true)
        .open(&hints[0])
        .unwrap()
        .write_all_at(&[9; 40], 30)
        .unwrap();
    let config = config(stage.dir.path(), "west");
    let Stage {
        east,
        west,
        at_west,
        dir,
        guest: spare,
        definition,
    } = stage;
    drop(west);
    let west = again(config, builders(&at_west)).await;
    let stage = Stage {
        east,
        west,
        at_west,
        dir,
        guest: spare,
        definition,
    };
    let east = stage.east.clone();
    until("a point after it", || {
        (source(&east, "one").points_sealed >= 3).then_some(())
    })
    .await;
    // The hints are made anew beside everything else.
    until("its hints", || {
        let length = std::fs::metadata(&hints[0]).unwrap().len();
        (length > DISK * 6).then_some(())
    })
    .await;
    let two = guest(&stage, "two", &disk);
    let sent = first_copy(&stage.east, "two", &two).await;
    assert!(sent < WHOLE / 4, "{sent} bytes sent again");
    reads_there(&stage, "two", &disk).await;
    stage.end().await;
}

/// A site whose last parts may still be letting go of its directory.
async fn again(config: SiteConfig, builders: Builders) -> Arc<Site> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Site::start_with(config.clone(), builders.clone()).await {
            Ok(site) => return site,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

const _: () = assert!(BLOCKS < DISK / 10 && PAGES < DISK / 10);
