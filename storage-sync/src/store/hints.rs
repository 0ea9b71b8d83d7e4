//! Which batch holds which content: what a source is answered from that asks
//! for content by digest.
//!
//! When a batch is appended, the first bytes of its literals' digests go into
//! a bounded table in memory ([`table`]) and into a file beside the segments
//! ([`file`]). Both are hints and nothing more: an answer is made from the
//! batch itself, which is read, verified and hashed again ([`super::answers`]).
//! So a damaged file, a stale hint or a collision costs a look into a batch and
//! never a wrong answer. What the file lacks is made anew from the batches, in
//! steps ([`Store::fill_hints`]) that the owner of the store runs beside its work.

mod file;
mod table;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use file::HintFile;
use table::HintTable;

use super::{Inner, Reader, Store, held};
use crate::codec::Body;
use crate::digest::DigestKey;
use crate::disk::Disk;
use crate::limits::{ANSWERS_KEPT, SEQ};
use crate::unit::Digest;

/// The first six bytes of a digest: enough to find a batch, and checked there.
pub type Prefix = [u8; 6];

/// Batches whose hints are made in one step.
const STEP: usize = 64;
/// Hints of batches that are gone may take this much of the file before it is written anew.
const GONE: u64 = 1 << 20;

/// The front of a digest.
pub(crate) fn prefix_of(digest: &Digest) -> Prefix {
    let [a, b, c, d, e, f, ..] = digest.0;
    [a, b, c, d, e, f]
}

/// Numbers of batches, as runs: mostly one.
#[derive(Default)]
struct Runs(BTreeMap<u64, u64>);

impl Runs {
    fn contains(&self, seq: u64) -> bool {
        let before = self.0.range(..=seq).next_back();
        before.is_some_and(|(_, end)| seq < *end)
    }

    fn insert(&mut self, seq: u64) {
        if self.contains(seq) {
            return;
        }
        let mut end = seq + 1;
        if let Some(after) = self.0.remove(&end) {
            end = after;
        }
        match self.0.range_mut(..seq).next_back() {
            Some((_, before)) if *before == seq => *before = end,
            _ => {
                self.0.insert(seq, end);
            }
        }
    }
}

/// Hints of one store.
pub(crate) struct Hints {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    bytes: usize,
    key: Option<DigestKey>,
    table: HintTable,
    /// `None`: not read yet, or it cannot be written.
    file: Option<HintFile>,
    read: bool,
    /// Batches that were hinted at, or cannot be read.
    covered: Runs,
    /// Where looking for others goes on.
    cursor: u64,
    /// Digests of batches that were asked for, by slot.
    pub(super) answers: HashMap<u64, Arc<[Digest]>>,
}

impl Hints {
    /// Looks whether there is a file; reads it later.
    pub(super) fn open(disk: Arc<dyn Disk>, path: PathBuf, bytes: usize) -> Hints {
        Hints {
            key: HintFile::key(&*disk, &path).map(DigestKey::new),
            disk,
            path,
            bytes,
            table: HintTable::new(bytes),
            file: None,
            read: false,
            covered: Runs::default(),
            cursor: 1,
            answers: HashMap::new(),
        }
    }

    /// The key, once hints are being kept.
    pub(super) fn key(&self) -> Option<DigestKey> {
        self.key.clone().filter(|_| self.read)
    }

    pub(super) fn is_of(&self, key: &DigestKey) -> bool {
        let known = self.key.as_ref();
        known.is_some_and(|known| known.bytes() == key.bytes())
    }

    /// Everything is under another key from now on.
    fn begin_anew(&mut self, key: &DigestKey) {
        self.key = Some(key.clone());
        self.table = HintTable::new(self.bytes);
        self.covered = Runs::default();
        self.cursor = 1;
        self.answers.clear();
        self.read = true;
        self.file = match HintFile::begin(&*self.disk, &self.path, key.bytes()) {
            Ok(file) => Some(file),
            Err(error) => {
                tracing::warn!(%error, "hints are kept in memory only");
                None
            }
        };
    }

    pub(super) fn sampling(&self) -> u8 {
        self.table.sampling()
    }

    pub(super) fn find(&self, prefix: Prefix) -> impl Iterator<Item = u64> + '_ {
        self.table.find(prefix)
    }

    pub(super) fn keep_answer(&mut self, seq: u64, digests: Arc<[Digest]>) {
        if self.answers.len() >= ANSWERS_KEPT {
            self.answers.clear();
        }
        self.answers.insert(seq, digests);
    }

    fn add(&mut self, hints: &[(u64, Vec<Prefix>)], live: &dyn Fn(u64) -> bool) {
        let mut records = Vec::new();
        for (seq, prefixes) in hints {
            if self.covered.contains(*seq) {
                continue;
            }
            self.covered.insert(*seq);
            for prefix in prefixes {
                self.table.insert(*prefix, *seq, live);
            }
            file::put(&mut records, *seq, prefixes);
        }
        if let Some(file) = &mut self.file
            && let Err(error) = file.append(&records)
        {
            tracing::warn!(%error, "hints are kept in memory only; they are made anew after a restart");
            self.file = None;
        }
    }

    /// Reads what an earlier process kept; what it lacks is made later.
    fn read(&mut self, live: &dyn Fn(u64) -> bool) {
        self.read = true;
        let Some(key) = self.key.clone() else {
            return;
        };
        let mut gone = 0;
        let (table, covered) = (&mut self.table, &mut self.covered);
        let read = HintFile::load(&*self.disk, &self.path, &mut |seq, prefixes| {
            if !live(seq) {
                gone += 6 * prefixes.len() as u64;
                return;
            }
            covered.insert(seq);
            for prefix in prefixes {
                table.insert(*prefix, seq, live);
            }
        });
        match read {
            Ok(file) if gone > GONE && gone > file.bytes() / 2 => self.begin_anew(&key),
            Ok(file) => self.file = Some(file),
            Err(error) => {
                tracing::warn!(%error, "hints cannot be read, and are made anew");
                self.begin_anew(&key);
            }
        }
    }
}

/// Prefixes of the digests of a batch's literals.
pub(super) fn hints_of(key: &DigestKey, body: &Body, digests: &mut Vec<Digest>) -> Vec<Prefix> {
    digests.clear();
    key.digests(body.literals(), digests);
    digests.iter().map(prefix_of).collect()
}

impl Inner {
    /// Notes hints of batches that are in the log now.
    pub(super) fn add_hints(&self, hints: &[(u64, Vec<Prefix>)]) {
        if !hints.is_empty() {
            let live = |seq| self.log.locate(seq).is_some();
            held(&self.hints).add(hints, &live);
        }
    }
}

impl Store {
    /// Keeps hints under this key from now on. Under another key than before
    /// they begin anew; [`Store::fill_hints`] makes them for what is there.
    pub fn hint_with(&self, key: &DigestKey) {
        let mut hints = held(&self.0.hints);
        if !hints.is_of(key) {
            hints.begin_anew(key);
        }
    }

    /// One step of making the hints that are missing: reads what an earlier
    /// process kept, then up to 64 batches. Returns whether there is more to do.
    pub fn fill_hints(&self) -> bool {
        let inner = &self.0;
        let (key, seqs) = {
            let mut hints = held(&inner.hints);
            if hints.key.is_none() {
                return false;
            }
            if !hints.read {
                let live = |seq| inner.log.locate(seq).is_some();
                hints.read(&live);
                return true;
            }
            let mut seqs = Vec::new();
            while seqs.is_empty() {
                let next = inner.log.seqs_in(hints.cursor..SEQ, 4096);
                let Some(last) = next.last() else {
                    return false;
                };
                hints.cursor = last + 1;
                seqs.extend(next.into_iter().filter(|seq| !hints.covered.contains(*seq)));
            }
            if let Some(beyond) = seqs.get(STEP) {
                hints.cursor = *beyond;
                seqs.truncate(STEP);
            }
            match hints.key() {
                Some(key) => (key, seqs),
                None => return false,
            }
        };
        let (mut reader, mut body, mut digests) = (Reader::default(), Body::new(), Vec::new());
        let mut found = Vec::with_capacity(seqs.len());
        for seq in seqs {
            let prefixes = match inner.expand(seq, &mut reader, &mut body) {
                Ok(()) => hints_of(&key, &body, &mut digests),
                Err(error) => {
                    tracing::warn!(seq, %error, "a batch is not offered for dedup");
                    Vec::new()
                }
            };
            found.push((seq, prefixes));
        }
        // Another key may have come meanwhile: then these are of no use.
        if held(&inner.hints).is_of(&key) {
            inner.add_hints(&found);
        }
        true
    }

    /// Bytes that the hints take in memory.
    pub fn hint_bytes(&self) -> usize {
        held(&self.0.hints).table.bytes()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_hold_what_was_put_in(numbers in prop::collection::vec(0..200u64, 0..150)) {
            let mut runs = Runs::default();
            let mut set = BTreeSet::new();
            for number in numbers {
                runs.insert(number);
                set.insert(number);
            }
            for number in 0..202 {
                prop_assert_eq!(runs.contains(number), set.contains(&number));
            }
            let starts = set.iter().filter(|n| **n == 0 || !set.contains(&(**n - 1))).count();
            prop_assert_eq!(runs.0.len(), starts);
        }
    }
}
