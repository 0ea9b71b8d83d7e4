//! Seeds that peers are about to write, by their own word: the keys, and the
//! numbers that are theirs. One small private file each, synced before the
//! peer hears that it may begin.
//!
//! What is announced is used: the next batch numbers and points of that peer
//! are above it ([`Announced::last_seq`], [`Announced::next_point`]), whether
//! the seed ever arrives or not.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::SiteKey;
use serde::{Deserialize, Serialize};

use crate::replicate::message::{Message, Refusal, SeedAnnouncement};
use crate::replicate::seed::{SeedId, SeedKey};
use crate::site::answer::refused;
use crate::site::remote::Remote;
use crate::site::{Site, checked, files, hex, unix_ns};

/// Seeds that one peer may announce: one a guest.
const MOST: usize = 4096;

/// No file of one is longer.
const LONGEST: u64 = 64 << 10;

/// How long an answer waits for earlier data to reach the disk.
const SETTLE: Duration = Duration::from_secs(20);

/// A seed that was announced.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::site) struct Seed {
    /// Who announced it.
    pub(in crate::site) from: SiteKey,
    /// Of which guest, with its key, point and numbers. The key is gone once
    /// it was imported.
    pub(in crate::site) guest: GuestId,
    pub(in crate::site) name: String,
    pub(in crate::site) seed: SeedId,
    pub(in crate::site) key: Option<SeedKey>,
    pub(in crate::site) point: u64,
    pub(in crate::site) first: u64,
    pub(in crate::site) last: u64,
    /// Nanoseconds since 1970.
    pub(in crate::site) announced_at: u64,
}

/// All of them.
pub(in crate::site) struct Announced {
    directory: PathBuf,
    seeds: RwLock<BTreeMap<(SiteKey, GuestId), Seed>>,
}

impl Announced {
    /// Reads what is there. What cannot be read cannot be imported any more.
    ///
    /// Its numbers are free again then: nothing will come under them.
    ///
    /// # Errors
    /// When the directory cannot be made or read: the numbers that were promised
    /// must not be given out again.
    pub(in crate::site) fn open(directory: &Path) -> io::Result<Self> {
        let mut seeds = BTreeMap::new();
        files::private_directory(directory)?;
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.extension().is_none_or(|e| e != "seed") {
                continue;
            }
            match checked::read::<Seed>(&path, LONGEST) {
                Ok(seed) => {
                    seeds.insert((seed.from, seed.guest), seed);
                }
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "the key of a seed is lost: that seed cannot be imported; export it again");
                }
            }
        }
        Ok(Self {
            directory: directory.to_owned(),
            seeds: RwLock::new(seeds),
        })
    }

    fn all<T>(&self, take: impl Fn(&Seed) -> Option<T>) -> Vec<T> {
        let seeds = self.seeds.read().unwrap_or_else(PoisonError::into_inner);
        seeds.values().filter_map(take).collect()
    }

    /// Every seed that was announced and not imported.
    pub(in crate::site) fn awaited(&self) -> Vec<Seed> {
        self.all(|seed| seed.key.is_some().then(|| seed.clone()))
    }

    /// The seed of this number.
    pub(in crate::site) fn find(&self, seed: &SeedId) -> Option<Seed> {
        self.all(|known| (known.seed == *seed).then(|| known.clone()))
            .pop()
    }

    /// The highest batch number that a seed of this peer may have; 0 for none.
    pub(in crate::site) fn last_seq(&self, from: &SiteKey) -> u64 {
        let numbers = self.all(|seed| (seed.from == *from).then_some(seed.last));
        numbers.into_iter().max().unwrap_or(0)
    }

    /// The lowest number of a point of this guest above that of its seed.
    pub(in crate::site) fn next_point(&self, from: &SiteKey, guest: GuestId) -> u64 {
        let seeds = self.seeds.read().unwrap_or_else(PoisonError::into_inner);
        seeds.get(&(*from, guest)).map_or(1, |seed| seed.point + 1)
    }

    /// Writes one down, durably; an earlier one of the same guest is void.
    pub(in crate::site) fn keep(&self, seed: Seed) -> io::Result<()> {
        let mut seeds = self.seeds.write().unwrap_or_else(PoisonError::into_inner);
        let key = (seed.from, seed.guest);
        let of_peer = seeds.keys().filter(|(from, _)| *from == seed.from).count();
        if !seeds.contains_key(&key) && of_peer >= MOST {
            return Err(io::Error::other(format!(
                "{MOST} seeds are announced already"
            )));
        }
        checked::write(&self.path(&seed), &seed)?;
        seeds.insert(key, seed);
        Ok(())
    }

    /// It was imported: the medium is of no use to anybody any more.
    pub(in crate::site) fn imported(&self, seed: Seed) -> io::Result<()> {
        self.keep(Seed { key: None, ..seed })
    }

    fn path(&self, seed: &Seed) -> PathBuf {
        let from = hex(seed.from.as_bytes());
        self.directory.join(format!("{from}-{}.seed", seed.guest))
    }
}

/// A seed that was announced, as it is kept: a fuzz target.
#[cfg(any(test, feature = "fuzzing"))]
pub(in crate::site) fn fuzzing(bytes: &[u8]) {
    let _ = serde_json::from_slice::<Seed>(bytes);
}

/// A source asks what is here of a guest that it wants to seed.
pub(in crate::site) async fn asked(
    site: &Arc<Site>,
    remote: &Arc<Remote>,
    guest: GuestId,
) -> Message {
    let key = remote.record.key;
    if let Some(term) = site.fence.current(guest)
        && term.owner != key
    {
        let why = format!(
            "term {} of this guest belongs to {}",
            term.number,
            site.name_of(&term.owner)
        );
        return refused(Refusal::Fenced, why);
    }
    // As for an opening: numbers that wait for the disk are used, too.
    if !remote.incoming.settled(SETTLE).await {
        return refused(
            Refusal::Unable,
            "earlier data still waits for the disk here",
        );
    }
    let store = &remote.incoming.store;
    Message::SeedMay {
        newest: store.newest(guest).map_or(0, |point| point.point),
        next_point: store
            .next_point(guest)
            .max(site.seeds.next_point(&key, guest)),
        last_seq: store.last_seq().max(site.seeds.last_seq(&key)),
    }
}

/// A source announces a seed.
pub(in crate::site) async fn announce(
    site: &Arc<Site>,
    remote: &Arc<Remote>,
    announcement: SeedAnnouncement,
) -> Message {
    const MOST_NUMBER: u64 = 1 << 56;
    let SeedAnnouncement {
        guest,
        name,
        seed,
        key,
        point,
        first,
        last,
    } = announcement;
    let sound = (1..MOST_NUMBER).contains(&point)
        && first > 0
        && (first..MOST_NUMBER).contains(&last)
        && crate::site::protect::is_guest_name(&name);
    if !sound {
        return refused(
            Refusal::OutOfStep,
            "the numbers or the name of that seed are not sound",
        );
    }
    let seed = Seed {
        from: remote.record.key,
        guest,
        name,
        seed,
        key: Some(key),
        point,
        first,
        last,
        announced_at: unix_ns(SystemTime::now()),
    };
    let site = site.clone();
    let kept = crate::work::spawn_blocking(move || site.seeds.keep(seed)).await;
    match kept {
        Ok(Ok(())) => Message::Done,
        Ok(Err(error)) => refused(
            Refusal::Unable,
            format!("the seed's key cannot be kept: {error}"),
        ),
        Err(error) => refused(Refusal::Unable, error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn key(first: char) -> SiteKey {
        format!("{first}{}", "0".repeat(51)).parse().unwrap()
    }

    fn seed(from: SiteKey, guest: u8, number: u8, last: u64) -> Seed {
        Seed {
            from,
            guest: GuestId([guest; 16]),
            name: format!("guest{guest}"),
            seed: [number; 16],
            key: Some(SeedKey::random()),
            point: u64::from(number),
            first: last - 99,
            last,
            announced_at: 1,
        }
    }

    #[test]
    fn what_was_announced_is_used_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("seeds");
        let (east, south) = (key('b'), key('c'));
        let known = Announced::open(&at).unwrap();
        assert_eq!((known.last_seq(&east), known.awaited().len()), (0, 0));
        known.keep(seed(east, 1, 10, 1_000)).unwrap();
        known.keep(seed(east, 2, 20, 5_000)).unwrap();
        known.keep(seed(south, 1, 30, 9_000)).unwrap();
        // Exported again: the older one is void.
        known.keep(seed(east, 1, 11, 3_000)).unwrap();
        let spent = known.find(&[20; 16]).unwrap();
        known.imported(spent).unwrap();

        fs::write(at.join("torn.seed"), b"{\"from\":").unwrap();
        let again = Announced::open(&at).unwrap();
        for known in [known, again] {
            assert_eq!(known.find(&[10; 16]).map(|s| s.point), None);
            assert_eq!(known.last_seq(&east), 5_000);
            assert_eq!(known.last_seq(&south), 9_000);
            assert_eq!(known.next_point(&east, GuestId([1; 16])), 12);
            assert_eq!(known.next_point(&east, GuestId([9; 16])), 1);
            assert!(known.find(&[20; 16]).unwrap().key.is_none());
            let awaited: Vec<_> = known.awaited().iter().map(|s| s.point).collect();
            assert_eq!(awaited, [11, 30]);
        }
        for entry in fs::read_dir(&at).unwrap().map(Result::unwrap) {
            let mode = entry.metadata().unwrap().permissions().mode();
            let torn = entry.file_name() == "torn.seed";
            assert!(torn || mode & 0o077 == 0, "{mode:o}");
        }
    }

    #[test]
    fn one_peer_cannot_fill_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let known = Announced::open(dir.path()).unwrap();
        let from = key('b');
        {
            let mut seeds = known.seeds.write().unwrap();
            for guest in 0..MOST as u64 {
                let mut one = seed(from, 1, 1, 1_000);
                one.guest.0[..8].copy_from_slice(&guest.to_le_bytes());
                seeds.insert((from, one.guest), one);
            }
        }
        assert!(known.keep(seed(from, 200, 1, 2_000)).is_err());
        assert!(known.keep(seed(key('c'), 200, 1, 2_000)).is_ok());
    }
}
