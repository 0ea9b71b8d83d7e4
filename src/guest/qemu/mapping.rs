//! A RAM file in our own address space, to be copied from.
//!
//! A copy from a mapping costs half the CPU of a `read` of the same bytes
//! (docs/performance.md), and in a pause QEMU needs one of the cores. What is
//! handed over is always the private copy, never the mapping itself, since a
//! running guest writes into it.
//!
//! Two things that a mapping does and a read does not are kept out: touching a
//! hole would allocate it, so only what the file holds as data is copied from
//! here; and touching what lies past a file's end would kill the process, so
//! the file's size is looked at before every piece. Who shrinks a guest's RAM
//! file in the microseconds between ends that guest's QEMU by the same signal.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// A RAM file, readable, and mapped where the system allows that.
pub(super) struct Mapping {
    file: File,
    /// None: every piece is read.
    region: Option<MmapRegion>,
}

impl Mapping {
    /// Maps the whole of a file, or falls back to reading it.
    pub(super) fn new(file: File, bytes: u64) -> Self {
        let region = usize::try_from(bytes).ok().and_then(|bytes| {
            let shared = MapFlags::SHARED | MapFlags::NORESERVE;
            MmapRegionBuilder::new(bytes)
                .with_file_offset(FileOffset::new(file.try_clone().ok()?, 0))
                .with_mmap_prot(i32::try_from(ProtFlags::READ.bits()).ok()?)
                .with_mmap_flags(i32::try_from(shared.bits()).ok()?)
                .build()
                .inspect_err(|error| tracing::info!(%error, "guest RAM is read, not mapped"))
                .ok()
        });
        Self { file, region }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Copies a piece; `data` are bytes of the file known to be data.
    pub(super) fn copy(&self, offset: u64, into: &mut [u8], data: &Range<u64>) -> io::Result<()> {
        let end = offset.saturating_add(into.len() as u64);
        let held = data.start <= offset && end <= data.end;
        let (Some(region), true) = (&self.region, held) else {
            return self.file.read_exact_at(into, offset);
        };
        if self.file.metadata()?.len() < end {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the file was shortened",
            ));
        }
        let slice = usize::try_from(offset)
            .ok()
            .and_then(|offset| region.get_slice(offset, into.len()).ok());
        match slice {
            Some(slice) => {
                slice.copy_to(into);
                Ok(())
            }
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}
