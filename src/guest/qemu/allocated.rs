//! An image file -> how much of it is there: what a first copy has to read, where
//! the virtual size of a thin disk would tell of many times as much.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Images in a chain that are followed.
const DEEPEST: usize = 16;
/// The longest name of a backing file that QEMU reads.
const LONGEST_NAME: usize = 1023;
/// Of qcow2's header: where the backing file's name begins (8 bytes), and its length (4).
const NAME_AT: u64 = 8;

/// Bytes that an image takes in its filesystem, and of a `chain` those behind it, too.
/// `None` where one cannot be read, or is no file: nothing is known then.
pub(crate) fn allocated(image: &Path, chain: bool) -> Option<u64> {
    let mut sum = 0u64;
    let mut next = Some(image.to_owned());
    for _ in 0..DEEPEST {
        let Some(path) = next else { break };
        // To open what is no file may wait for somebody.
        let metadata = std::fs::metadata(&path).ok()?;
        if !metadata.is_file() {
            return None;
        }
        sum = sum.saturating_add(metadata.blocks().saturating_mul(512));
        next = match chain {
            true => behind(&File::open(&path).ok()?, &path)?,
            false => None,
        };
    }
    Some(sum)
}

/// The image behind a qcow2 one; `Some(None)` where there is none.
fn behind(file: &File, path: &Path) -> Option<Option<PathBuf>> {
    let mut header = [0; 20];
    if file.read_exact_at(&mut header, 0).is_err() || !header.starts_with(b"QFI\xfb") {
        return Some(None);
    }
    let at = u64::from_be_bytes(header[NAME_AT as usize..16].try_into().ok()?);
    let bytes = u32::from_be_bytes(header[16..].try_into().ok()?) as usize;
    if at == 0 || bytes == 0 {
        return Some(None);
    }
    let mut name = vec![0; bytes.min(LONGEST_NAME)];
    file.read_exact_at(&mut name, at).ok()?;
    // `json:` and protocols are no files: nothing is known of those.
    let name = Path::new(std::ffi::OsStr::from_bytes(&name));
    Some(Some(path.parent()?.join(name)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    /// The header of a qcow2 image over this one.
    fn over(name: &str) -> Vec<u8> {
        let mut header = b"QFI\xfb\0\0\0\x03".to_vec();
        header.extend(104u64.to_be_bytes());
        header.extend((name.len() as u32).to_be_bytes());
        header.resize(104, 0);
        header.extend(name.as_bytes());
        header
    }

    #[test]
    fn a_chain_counts_with_what_is_there_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let thin = File::create(at("base.raw")).unwrap();
        thin.set_len(1 << 40).unwrap();
        thin.write_all_at(&[1; 1 << 20], 1 << 30).unwrap();
        let base = allocated(&at("base.raw"), true).unwrap();
        assert!(((1 << 20)..(4 << 20)).contains(&base), "{base}");

        std::fs::write(at("top.qcow2"), over("base.raw")).unwrap();
        let both = allocated(&at("top.qcow2"), true).unwrap();
        assert!((base..base + (1 << 20)).contains(&both), "{both}");

        // The same bytes in a raw disk name nothing.
        let top = allocated(&at("top.qcow2"), false).unwrap();
        assert!(top < 1 << 20, "{top}");

        // One that lies behind itself ends; what is gone or no file is not known.
        std::fs::write(at("circle"), over("circle")).unwrap();
        assert!(allocated(&at("circle"), true).is_some());
        std::fs::write(at("lost"), over("nowhere.raw")).unwrap();
        assert_eq!(allocated(&at("lost"), true), None);
        std::fs::write(at("short"), b"QFI\xfb").unwrap();
        assert!(allocated(&at("short"), true).is_some());
        assert_eq!(allocated(dir.path(), true), None);
    }
}
