//! The hints of every batch, kept beside the segments, so that a restart need
//! not read all of them again.
//!
//! Nothing here is synced, and nothing is believed: a record that was lost is
//! made anew from its batch, and a wrong one costs a look into a batch.
//! `FORMAT.md` draws the bytes.

use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use super::Prefix;
use crate::disk::{Access, Disk, OpenFile};
use crate::files::{FileError, open_private};
use crate::unit::GROUP;

const MAGIC: [u8; 6] = *b"FHhn\x01\x00";
const HEADER: usize = 64;
const CHECK: usize = 4;
/// Bytes of a record before its prefixes: number and count.
const FRONT: usize = 9;

/// The file, open at its end.
pub(super) struct HintFile {
    path: PathBuf,
    file: OpenFile,
    end: u64,
}

/// A file, read from its beginning on.
struct FromStart<'a> {
    file: &'a OpenFile,
    at: u64,
}

impl Read for FromStart<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(out, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

fn check_of(bytes: &[u8]) -> [u8; CHECK] {
    let hash = blake3::hash(bytes);
    let mut check = [0; CHECK];
    check.copy_from_slice(&hash.as_bytes()[..CHECK]);
    check
}

fn header(key: &[u8; 32]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..6].copy_from_slice(&MAGIC);
    header[8..40].copy_from_slice(key);
    let check = *blake3::hash(&header[..40]).as_bytes();
    header[40..].copy_from_slice(&check[..HEADER - 40]);
    header
}

/// Lays out one record.
pub(super) fn put(out: &mut Vec<u8>, seq: u64, prefixes: &[Prefix]) {
    let start = out.len();
    let prefixes = &prefixes[..prefixes.len().min(GROUP)];
    out.extend_from_slice(&seq.to_le_bytes());
    out.push(prefixes.len() as u8);
    prefixes
        .iter()
        .for_each(|prefix| out.extend_from_slice(prefix));
    let check = check_of(&out[start..]);
    out.extend_from_slice(&check);
}

/// Reads one record; `None` at the end and where none is.
fn take(from: &mut impl Read, prefixes: &mut Vec<Prefix>) -> Option<(u64, u64)> {
    let mut record = [0; FRONT + 6 * GROUP + CHECK];
    let (front, rest) = record.split_first_chunk_mut::<FRONT>()?;
    from.read_exact(front).ok()?;
    let [seq @ .., count] = *front;
    let count = usize::from(count);
    if count > GROUP {
        return None;
    }
    from.read_exact(rest.get_mut(..6 * count + CHECK)?).ok()?;
    let length = FRONT + 6 * count;
    let (told, check) = record.get(..length + CHECK)?.split_at(length);
    if check_of(told) != check {
        return None;
    }
    prefixes.clear();
    prefixes.extend_from_slice(told.get(FRONT..)?.as_chunks::<6>().0);
    Some((u64::from_le_bytes(seq), (length + CHECK) as u64))
}

impl HintFile {
    /// The key under which the file's digests were made, if there is a sound one.
    pub(super) fn key(disk: &dyn Disk, path: &Path) -> Option<[u8; 32]> {
        let mut found = [0; HEADER];
        let file = disk.open(path, Access::Read).ok()?;
        file.read_exact_at(&mut found, 0).ok()?;
        let key = *found[8..].first_chunk::<32>()?;
        (header(&key) == found).then_some(key)
    }

    /// An empty file for digests of this key.
    pub(super) fn begin(
        disk: &dyn Disk,
        path: &Path,
        key: &[u8; 32],
    ) -> Result<HintFile, FileError> {
        let file = open_private(disk, path)?;
        let begun = file
            .set_len(0)
            .and_then(|()| file.write_all_at(&header(key), 0));
        begun.map_err(FileError::at("write", path))?;
        Ok(HintFile {
            path: path.to_path_buf(),
            file,
            end: HEADER as u64,
        })
    }

    /// Reads every record up to the first that is none, cuts the file there,
    /// and goes on behind it.
    pub(super) fn load(
        disk: &dyn Disk,
        path: &Path,
        each: &mut dyn FnMut(u64, &[Prefix]),
    ) -> Result<HintFile, FileError> {
        let file = open_private(disk, path)?;
        let from = FromStart { file: &file, at: 0 };
        let mut reader = BufReader::with_capacity(1 << 20, from);
        let skipped = io::copy(&mut (&mut reader).take(HEADER as u64), &mut io::sink());
        let mut end = skipped.map_err(FileError::at("read", path))?;
        let mut prefixes = Vec::with_capacity(GROUP);
        while let Some((seq, length)) = take(&mut reader, &mut prefixes) {
            each(seq, &prefixes);
            end += length;
        }
        drop(reader);
        file.set_len(end).map_err(FileError::at("cut", path))?;
        Ok(HintFile {
            path: path.to_path_buf(),
            file,
            end,
        })
    }

    /// Appends records that [`put`] laid out.
    pub(super) fn append(&mut self, records: &[u8]) -> Result<(), FileError> {
        let written = self.file.write_all_at(records, self.end);
        written.map_err(FileError::at("write", &self.path))?;
        self.end += records.len() as u64;
        Ok(())
    }

    /// Bytes in it.
    pub(super) fn bytes(&self) -> u64 {
        self.end
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may fail")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::disk::SystemDisk;

    type Records = Vec<(u64, Vec<Prefix>)>;

    fn read(path: &Path) -> Records {
        let mut found = Records::new();
        HintFile::load(&SystemDisk, path, &mut |seq, prefixes| {
            found.push((seq, prefixes.to_vec()))
        })
        .unwrap();
        found
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn a_torn_or_flipped_file_gives_what_stood_before(
            records in prop::collection::vec(
                (any::<u64>(), prop::collection::vec(any::<Prefix>(), 0..=GROUP)), 1..20),
            at: prop::sample::Index,
            flip in 1u8..,
            cut: bool,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("hints");
            let mut file = HintFile::begin(&SystemDisk, &path, &[7; 32]).unwrap();
            let (mut bytes, mut ends) = (Vec::new(), Vec::new());
            for (seq, prefixes) in &records {
                put(&mut bytes, *seq, prefixes);
                ends.push(HEADER + bytes.len());
            }
            file.append(&bytes).unwrap();
            prop_assert_eq!(&read(&path), &records);
            prop_assert_eq!(HintFile::key(&SystemDisk, &path), Some([7; 32]));

            let mut whole = std::fs::read(&path).unwrap();
            let at = HEADER + at.index(whole.len() - HEADER);
            match cut {
                true => whole.truncate(at),
                false => whole[at] ^= flip,
            }
            std::fs::write(&path, &whole).unwrap();
            let sound = ends.iter().filter(|end| **end <= at).count();
            prop_assert_eq!(&read(&path), &records[..sound]);
            // It goes on behind the last sound one.
            let mut file = HintFile::load(&SystemDisk, &path, &mut |_, _| {}).unwrap();
            let mut more = Vec::new();
            put(&mut more, 5, &[[9; 6]]);
            file.append(&more).unwrap();
            prop_assert_eq!(read(&path).len(), sound + 1);
        }
    }

    #[test]
    fn a_damaged_header_has_no_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hints");
        assert_eq!(HintFile::key(&SystemDisk, &path), None);
        HintFile::begin(&SystemDisk, &path, &[3; 32]).unwrap();
        for at in 0..HEADER as u64 {
            let file = open_private(&SystemDisk, &path).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
            assert_eq!(HintFile::key(&SystemDisk, &path), None, "byte {at}");
            file.write_all_at(&byte, at).unwrap();
        }
        assert_eq!(HintFile::key(&SystemDisk, &path), Some([3; 32]));
    }
}
