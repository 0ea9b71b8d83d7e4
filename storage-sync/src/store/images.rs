//! Images: content that is stored here without having crossed the link, so
//! that guests made from it need not send it.
//!
//! An image is a recovery point like any other, of an identity that no guest
//! has ([`GuestId::is_image`]), and its batches have numbers that no source
//! gives ([`IMAGE_SEQ`]). So verification, crash rules, look-ups and prune are
//! those of every batch: as long as the image is kept its batches are, and when
//! it is removed those stay that points refer to. Until its seal an image is none.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{LocalError, LocalSeal, Store, held};
use crate::digest::DigestKey;
use crate::limits::{VOLUME_NAME, VOLUME_UNITS};
use crate::manifest::PointHeader;
use crate::unit::{GROUP, GuestId, UNIT, Volume, VolumeKind};

/// An image has one point.
const POINT: u64 = 1;

/// Files that are no raw images, by how they begin.
const FORMATS: [(&[u8], &str); 4] = [
    (b"QFI\xfb", "qcow2"),
    (b"KDMV", "vmdk"),
    (b"vhdxfile", "vhdx"),
    (b"conectix", "vpc"),
];

/// A stored image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Stands where a guest's identity would.
    pub id: GuestId,
    /// Its name, unique in its store.
    pub name: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// Bytes of its batches: what it takes here.
    pub stored_bytes: u64,
    /// When it was stored, nanoseconds since 1970.
    pub added_at_unix_ns: u64,
}

/// How far storing an image has come; read while it goes on.
#[derive(Debug, Default)]
pub struct ImageProgress {
    /// Bytes read.
    pub done: AtomicU64,
    /// Bytes to read.
    pub total: AtomicU64,
}

/// Why an image was not stored.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be read.
    #[error("{} cannot be read ({source}); name a raw image that this user may read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Its bytes are not those that a guest sees.
    #[error(
        "{} is a {format} file: what a guest sees of it must be stored, not the file. Convert it: qemu-img convert -O raw {} IMAGE.raw, then add that",
        path.display(), path.display()
    )]
    NotRaw {
        /// The file.
        path: PathBuf,
        /// As `qemu-img` calls it.
        format: &'static str,
    },
    /// Nothing in it, or too much.
    #[error("{} has {bytes} bytes; an image has at least one, and at most 4 PiB", path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// How long it is.
        bytes: u64,
    },
    /// The name cannot be used.
    #[error("an image cannot be named '{0}'; give it another name of up to 256 bytes")]
    Name(String),
    /// The name is in use.
    #[error("an image named '{0}' is stored already; remove that first, or give another name")]
    Taken(String),
    /// The store does not take it.
    #[error(transparent)]
    Local(#[from] LocalError),
}

impl Store {
    /// The images that are stored here, by name.
    pub fn images(&self) -> Vec<Image> {
        let state = held(&self.0.state);
        let images = state.guests.iter().filter(|(id, _)| id.is_image());
        let points = images.flat_map(|(_, image)| image.points.values());
        let mut images: Vec<Image> = points.map(|entry| Image::of(&entry.header)).collect();
        images.sort_by(|a, b| a.name.cmp(&b.name));
        images
    }

    /// Stores the content of a raw image. Takes long; one at a time is wise.
    /// When this returns, it is durable. If it fails, or the process ends, there
    /// is no such image, and what was stored of it goes with the next prune.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn add_image(
        &self,
        path: &Path,
        name: &str,
        progress: &ImageProgress,
    ) -> Result<Image, ImageError> {
        if name.is_empty() || name.len() > VOLUME_NAME || name.contains(char::is_control) {
            return Err(ImageError::Name(name.to_owned()));
        }
        if self.images().iter().any(|image| image.name == name) {
            return Err(ImageError::Taken(name.to_owned()));
        }
        let (file, bytes) = raw(path)?;
        progress.total.store(bytes, Ordering::Relaxed);
        let volume = Volume {
            name: name.to_owned(),
            kind: VolumeKind::Disk,
            bytes,
        };
        self.store_image(GuestId::random_image(), volume, file, path, progress)
    }

    fn store_image(
        &self,
        id: GuestId,
        volume: Volume,
        mut file: File,
        path: &Path,
        progress: &ImageProgress,
    ) -> Result<Image, ImageError> {
        let key = DigestKey::random();
        let mut local = self.local_point(id, POINT);
        let mut buffer = vec![0; GROUP * UNIT];
        let (mut digests, mut unit) = (Vec::new(), 0);
        let mut left = volume.bytes;
        while left > 0 {
            let most = buffer
                .len()
                .min(usize::try_from(left).unwrap_or(usize::MAX));
            let whole = most.next_multiple_of(UNIT).min(buffer.len());
            buffer[most..].fill(0);
            file.read_exact(&mut buffer[..most])
                .map_err(|source| ImageError::Read {
                    path: path.to_path_buf(),
                    source,
                })?;
            digests.clear();
            key.digests(&buffer[..whole], &mut digests);
            for (bytes, digest) in buffer.chunks_exact(UNIT).zip(&digests) {
                local.unit(0, unit, bytes, *digest)?;
                unit += 1;
            }
            left -= most as u64;
            let done = volume.bytes - left;
            progress.done.store(done, Ordering::Relaxed);
        }
        let header = local.seal(LocalSeal {
            parent: 0,
            cut_at_unix_ns: now(),
            volumes: vec![volume],
            context: Vec::new(),
        })?;
        Ok(Image::of(&header))
    }
}

impl Image {
    fn of(header: &PointHeader) -> Image {
        let volume = header.volumes.first();
        Image {
            id: header.guest,
            name: volume.map_or_else(String::new, |volume| volume.name.clone()),
            bytes: volume.map_or(0, |volume| volume.bytes),
            stored_bytes: header.stored_bytes,
            added_at_unix_ns: header.cut_at_unix_ns,
        }
    }
}

/// Opens a raw image, or a disk; its length.
fn raw(path: &Path) -> Result<(File, u64), ImageError> {
    let unread = |source| ImageError::Read {
        path: path.to_path_buf(),
        source,
    };
    let mut file = File::open(path).map_err(unread)?;
    let mut front = Vec::new();
    let read = (&mut file).take(8).read_to_end(&mut front);
    read.map_err(unread)?;
    if let Some((_, format)) = FORMATS.iter().find(|(magic, _)| front.starts_with(magic)) {
        return Err(ImageError::NotRaw {
            path: path.to_path_buf(),
            format,
        });
    }
    // A disk's metadata tell no length; its end does.
    let bytes = file.seek(SeekFrom::End(0)).map_err(unread)?;
    file.rewind().map_err(unread)?;
    if bytes == 0 || bytes.div_ceil(UNIT as u64) > VOLUME_UNITS {
        return Err(ImageError::Size {
            path: path.to_path_buf(),
            bytes,
        });
    }
    Ok((file, bytes))
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}
