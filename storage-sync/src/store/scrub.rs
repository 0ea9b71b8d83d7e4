//! Scrub: every stored byte is read and verified while the store works on.
//!
//! Manifests first, then batches by number, then whether every point finds
//! what it needs. Nothing is changed: what is damaged is named, with the points
//! that need it. It holds no lock while it reads batches, and can stop at any
//! batch and go on there another day.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::damage::{Suspect, lacks};
use super::{Inner, Store, held};
use crate::codec::BatchView;
use crate::files::is_bad_sector;
use crate::log::LogError;
use crate::manifest::{self, ManifestError};
use crate::map::PointMap;
use crate::unit::{GuestId, Place};

/// Batches read between two looks at the clock and at who waits.
const STRIDE: usize = 16;

/// How a scrub runs.
#[derive(Debug, Clone, Copy, Default)]
pub struct ScrubOptions {
    /// Most bytes read a second; `None`: as fast as it goes.
    pub bytes_per_second: Option<NonZeroU64>,
    /// The batch to go on at: [`ScrubReport::next`] of one that was stopped.
    pub from: u64,
}

/// How far a scrub is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScrubProgress {
    /// Batches verified.
    pub batches: u64,
    /// Manifests verified.
    pub manifests: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Bytes of all segments.
    pub bytes_total: u64,
    /// Damage found.
    pub damage: u64,
    /// The batch that one which stopped now would go on at.
    pub next: u64,
}

/// What is damaged.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Damaged {
    /// A batch.
    Batch(u64),
    /// A point's manifest.
    Manifest,
    /// A point whose manifest is whole and whose batches are not all here.
    Point,
    /// The name of a kept point; the point stays kept.
    Name,
}

/// Something damaged, and what it costs.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Damage {
    /// What.
    pub what: Damaged,
    /// In which file.
    pub path: PathBuf,
    /// What is wrong.
    pub why: String,
    /// The disk would not read it: another day it may.
    pub unreadable: bool,
    /// The points that cannot be restored in full for it: guest and number.
    pub points: Vec<(GuestId, u64)>,
}

/// What a scrub found.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct ScrubReport {
    /// Batches verified.
    pub batches: u64,
    /// Manifests verified.
    pub manifests: u64,
    /// Bytes read.
    pub bytes: u64,
    /// What is damaged.
    pub damage: Vec<Damage>,
    /// The batch to go on at; `None`: it came to the end.
    pub next: Option<u64>,
}

impl Store {
    /// Reads and verifies everything, at full speed.
    pub fn check(&self) -> ScrubReport {
        self.scrub(ScrubOptions::default(), &mut |_| ControlFlow::Continue(()))
    }

    /// Reads and verifies everything that is stored. `progress` is called every
    /// few batches: it may wait, to pause, or break, to stop.
    pub fn scrub(
        &self,
        options: ScrubOptions,
        progress: &mut dyn FnMut(&ScrubProgress) -> ControlFlow<()>,
    ) -> ScrubReport {
        let mut scrub = Scrub::new(&self.0, options);
        scrub.manifests();
        scrub.names();
        scrub.batches(progress);
        scrub.points();
        scrub.report
    }
}

pub(super) struct Scrub<'a> {
    inner: &'a Inner,
    options: ScrubOptions,
    started: Instant,
    pub(super) report: ScrubReport,
}

impl<'a> Scrub<'a> {
    pub(super) fn new(inner: &'a Inner, options: ScrubOptions) -> Self {
        Scrub {
            inner,
            options,
            started: Instant::now(),
            report: ScrubReport::default(),
        }
    }

    /// Something is damaged that others are to know of, too.
    fn suspect(&mut self, suspect: Suspect, path: PathBuf, why: String, unreadable: bool) {
        self.inner.found_damaged(suspect, why.clone(), unreadable);
        let what = match suspect {
            Suspect::Batch(seq) => Damaged::Batch(seq),
            Suspect::Manifest(..) => Damaged::Manifest,
            Suspect::Point(..) => Damaged::Point,
        };
        self.damage(what, path, why, unreadable);
    }

    fn damage(&mut self, what: Damaged, path: PathBuf, why: String, unreadable: bool) {
        self.report.damage.push(Damage {
            what,
            path,
            why,
            unreadable,
            points: Vec::new(),
        });
    }

    fn numbers(&self) -> Vec<(GuestId, u64)> {
        let state = held(&self.inner.state);
        let guests = state.guests.iter();
        guests
            .flat_map(|(&guest, state)| state.points.keys().map(move |&point| (guest, point)))
            .collect()
    }

    fn manifests(&mut self) {
        for (guest, point) in self.numbers() {
            // A prune may drop it, or give it another base: not now.
            let _writing = held(&self.inner.writing);
            let Some(entry) = self.inner.entry(guest, point) else {
                continue;
            };
            let path = manifest::path_of(&self.inner.manifests, guest, point);
            self.report.manifests += 1;
            let suspect = Suspect::Manifest(guest, point);
            match manifest::read(&*self.inner.disk, &path, &mut |_| {}) {
                Ok(head) if head.header == *entry.header && head.base == entry.base => {
                    self.report.bytes += entry.bytes;
                    self.inner.found_whole(suspect);
                }
                Ok(_) => {
                    let why = "it is not the manifest that was read when the store was opened";
                    self.suspect(suspect, path, why.into(), false);
                }
                Err(error) => {
                    let unreadable = matches!(&error, ManifestError::File(error) if is_bad_sector(&error.source));
                    self.suspect(suspect, path, error.to_string(), unreadable);
                }
            }
        }
    }

    fn names(&mut self) {
        for (guest, point) in self.numbers() {
            // It may be released, or get another name: not now.
            let _writing = held(&self.inner.writing);
            if let Some(Err((path, why))) = self.inner.look_at_name(guest, point) {
                tracing::error!(path = %path.display(), why, "found damaged");
                self.damage(Damaged::Name, path, why, false);
            }
        }
    }

    fn batches(&mut self, progress: &mut dyn FnMut(&ScrubProgress) -> ControlFlow<()>) {
        let mut from = self.options.from;
        let mut bytes = Vec::new();
        loop {
            let seqs = self.inner.log.seqs_in(from..u64::MAX, STRIDE);
            let Some(&last) = seqs.last() else {
                return;
            };
            for seq in seqs {
                self.batch(seq, &mut bytes);
            }
            from = last + 1;
            self.keep_pace();
            let so_far = ScrubProgress {
                batches: self.report.batches,
                manifests: self.report.manifests,
                bytes: self.report.bytes,
                bytes_total: self.inner.log.bytes(),
                damage: self.report.damage.len() as u64,
                next: from,
            };
            if progress(&so_far).is_break() {
                self.report.next = Some(from);
                return;
            }
        }
    }

    fn batch(&mut self, seq: u64, bytes: &mut Vec<u8>) {
        let Some(location) = self.inner.log.locate(seq) else {
            return; // Pruned meanwhile.
        };
        let (why, unreadable) = match self.inner.log.read(seq, bytes) {
            Ok(()) => match BatchView::parse(bytes) {
                Ok(view) if view.header().seq == seq => {
                    self.report.batches += 1;
                    self.report.bytes += bytes.len() as u64;
                    self.inner.found_whole(Suspect::Batch(seq));
                    return;
                }
                Ok(_) => ("another batch lies in its place".to_string(), false),
                Err(error) => (error.to_string(), false),
            },
            Err(LogError::Missing { .. }) => return,
            Err(LogError::File(error)) => (error.to_string(), is_bad_sector(&error.source)),
            Err(error) => (error.to_string(), false),
        };
        let path = self.inner.log.path_of(location.segment);
        self.suspect(Suspect::Batch(seq), path, why, unreadable);
    }

    fn keep_pace(&self) {
        let Some(rate) = self.options.bytes_per_second else {
            return;
        };
        let due = Duration::from_secs_f64(self.report.bytes as f64 / rate.get() as f64);
        // An hour at most: a rate of one byte a second is a mistake, not a plan.
        let wait = due.saturating_sub(self.started.elapsed());
        std::thread::sleep(wait.min(Duration::from_secs(3600)));
    }

    /// Which points need what is damaged, and which find less than they need.
    pub(super) fn points(&mut self) {
        let inner = self.inner;
        let lost: BTreeMap<u64, usize> = (0..)
            .zip(&self.report.damage)
            .filter_map(|(at, damage)| match damage.what {
                Damaged::Batch(seq) => Some((seq, at)),
                _ => None,
            })
            .collect();
        let unsound = inner.unsound(&lost);
        let mut before: Option<(GuestId, u64, PointMap)> = None;
        for (guest, point) in self.numbers() {
            let _writing = held(&inner.writing);
            let Some(entry) = inner.entry(guest, point) else {
                continue;
            };
            let path = manifest::path_of(&inner.manifests, guest, point);
            let built = match before.take() {
                Some((of, base, mut map)) if of == guest && base == entry.base => {
                    inner.apply(&path, &mut map).map(|_| map)
                }
                _ => inner.load_map(guest, point),
            };
            let map = match built {
                Ok(map) => map,
                Err(ManifestError::Damaged { path, .. } | ManifestError::Newer { path, .. }) => {
                    self.needs(&path, guest, point);
                    continue;
                }
                Err(ManifestError::File(error)) => {
                    self.needs(&error.path, guest, point);
                    continue;
                }
            };
            let mut needed: BTreeSet<usize> = BTreeSet::new();
            for run in map.all_runs() {
                needed.extend(run.seqs().filter_map(|seq| lost.get(&seq)));
                for seq in run.seqs().filter(|seq| unsound.contains_key(seq)) {
                    let places = (run.place.0..run.place.0 + run.count).map(Place);
                    let places = places.filter(|place| place.seq() == seq);
                    let bases = places.filter_map(|place| unsound.get(&seq)?.get(&place.index()));
                    needed.extend(bases);
                }
            }
            let known = !needed.is_empty();
            for at in needed {
                if let Some(damage) = self.report.damage.get_mut(at) {
                    damage.points.push((guest, point));
                }
            }
            let wrong = match inner.dangling(&map) {
                // It is told of already.
                _ if known => None,
                Ok(None) => None,
                Ok(Some(place)) => Some((path.clone(), lacks(place), false)),
                Err(LogError::File(error)) => {
                    let unreadable = is_bad_sector(&error.source);
                    Some((error.path.clone(), error.to_string(), unreadable))
                }
                Err(error) => Some((path.clone(), error.to_string(), false)),
            };
            let suspect = Suspect::Point(guest, point);
            match wrong {
                Some((path, why, unreadable)) => {
                    self.suspect(suspect, path.clone(), why, unreadable);
                    self.needs(&path, guest, point);
                }
                None => inner.found_whole(suspect),
            }
            before = Some((guest, point, map));
        }
    }

    fn needs(&mut self, path: &std::path::Path, guest: GuestId, point: u64) {
        let damage = self.report.damage.iter_mut().rev();
        if let Some(damage) = damage
            .filter(|damage| !matches!(damage.what, Damaged::Batch(_)))
            .find(|damage| damage.path == path)
        {
            damage.points.push((guest, point));
        }
    }
}
