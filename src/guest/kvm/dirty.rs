//! Guest memory whose writes are known, all of them: those of vCPUs from KVM's
//! dirty log, those of the monitor (a block read, a loaded program) from the
//! bitmap of its mapping. Nothing is ever scanned or compared.
//!
//! Both are taken and forgotten in one step each, and memory is read after
//! that, so a write that comes between is told by the next call.

use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion, VolatileMemory,
};

use super::kvm_error;
use crate::guest::embedded::{Bitmap, RamBlock, VmmError};

/// Guest memory of a monitor: mapped shared or private, from files or not, and
/// telling what the monitor itself wrote.
pub type TrackedMemory = GuestMemoryMmap<AtomicBitmap>;

const PAGE: u64 = 4096;

/// Memory of a guest and its KVM slots, with the log of what was written.
pub struct TrackedRam {
    vm: Arc<VmFd>,
    memory: TrackedMemory,
    blocks: Vec<RamBlock>,
    /// Of each block: its regions, in the order in which they lie in it.
    regions: Vec<Vec<Region>>,
    /// Whether the slots are ours to take away.
    ours: bool,
}

struct Region {
    slot: u32,
    /// Where it begins in its block.
    offset: u64,
    /// Where the guest sees it.
    at: u64,
    bytes: u64,
    mapping: Arc<MmapRegion<AtomicBitmap>>,
}

impl TrackedRam {
    /// Gives all regions of `memory` to the guest, logging what it writes, in
    /// slots from 0 on in the order of their addresses. They are one block,
    /// `ram`. When this is dropped the guest has no memory any more.
    ///
    /// # Errors
    /// When KVM refuses, or a region is not a whole number of 4 KiB pages.
    pub fn register(vm: Arc<VmFd>, memory: TrackedMemory) -> Result<Self, VmmError> {
        let mut ram = Self::adopt(vm, memory)?;
        ram.ours = true;
        for region in ram.regions.iter().flatten() {
            ram.set_slot(region, region.bytes)?;
        }
        Ok(ram)
    }

    /// Takes memory whose slots, numbered from 0 in the order of the regions'
    /// addresses, exist already and were made with `KVM_MEM_LOG_DIRTY_PAGES`.
    /// They are one block, `ram`.
    ///
    /// Who else writes guest memory is in neither log, and such writes would be
    /// missing from points: a vhost device in the kernel or in another process,
    /// a VFIO device, or a monitor's own code that writes past `memory`. Such
    /// devices must be stopped in [`DeviceState::pause`], and their writes told
    /// through the bitmap of `memory` before it returns.
    ///
    /// A page that its file's filesystem has no room for kills the process that
    /// touches it: [`reserve`](crate::guest::embedded::reserve) memory in files.
    ///
    /// [`DeviceState::pause`]: super::protected::DeviceState::pause
    ///
    /// # Errors
    /// When a region is not a whole number of 4 KiB pages.
    pub fn adopt(vm: Arc<VmFd>, memory: TrackedMemory) -> Result<Self, VmmError> {
        let (mut regions, mut offset) = (Vec::new(), 0);
        for (slot, region) in (0..).zip(memory.iter()) {
            let bytes = region.len();
            if bytes == 0 || !bytes.is_multiple_of(PAGE) {
                return Err(VmmError::State(format!(
                    "a memory region has {bytes} bytes; it must be a whole number of 4 KiB pages"
                )));
            }
            regions.push(Region {
                slot,
                offset,
                at: region.start_addr().raw_value(),
                bytes,
                mapping: region.get_mmap(),
            });
            offset += bytes;
        }
        let blocks = vec![RamBlock {
            name: "ram".to_owned(),
            bytes: offset,
        }];
        Ok(Self {
            vm,
            memory,
            blocks,
            regions: vec![regions],
            ours: false,
        })
    }

    /// Its blocks.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// The memory, for device models.
    pub fn memory(&self) -> &TrackedMemory {
        &self.memory
    }

    /// Pages of a block that were written since the last call, and forgets them.
    ///
    /// # Errors
    /// When there is no such block, or KVM does not give its log: then pages
    /// may be forgotten that were not told.
    pub fn dirty(&self, block: usize) -> Result<Bitmap, VmmError> {
        let (shape, regions) = self.block(block)?;
        let pages = shape.bytes / PAGE;
        let mut all = vec![0; usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX)];
        for region in regions {
            let bytes = usize::try_from(region.bytes).unwrap_or(usize::MAX);
            let guests = self.vm.get_dirty_log(region.slot, bytes).map_err(|error| {
                kvm_error(
                    format!("KVM_GET_DIRTY_LOG of memory slot {}", region.slot),
                    error,
                    "was the slot made with KVM_MEM_LOG_DIRTY_PAGES?",
                )
            })?;
            let ours = region.mapping.bitmap().get_and_reset();
            let words = guests.iter().zip(ours).map(|(guests, ours)| guests | ours);
            put_words(&mut all, region.offset / PAGE, words);
        }
        Ok(Bitmap::from_words(pages, all))
    }

    /// Reads a block's memory.
    ///
    /// # Errors
    /// When that is not inside of the block.
    pub fn read(&self, block: usize, offset: u64, into: &mut [u8]) -> Result<(), VmmError> {
        let (shape, regions) = self.block(block)?;
        let length = into.len();
        let outside = || VmmError::Io {
            what: format!(
                "reading {length} bytes at {offset:#x} of memory block {:?} of {:#x} bytes",
                shape.name, shape.bytes
            ),
            source: std::io::ErrorKind::UnexpectedEof.into(),
        };
        let end = offset.checked_add(length as u64);
        if end.is_none_or(|end| end > shape.bytes) {
            return Err(outside());
        }
        let (mut at, mut rest) = (offset, into);
        for region in regions {
            let within = at.saturating_sub(region.offset);
            if rest.is_empty() || within >= region.bytes {
                continue;
            }
            let here = usize::try_from(region.bytes - within).unwrap_or(usize::MAX);
            let (part, more) = rest.split_at_mut(here.min(rest.len()));
            let start = usize::try_from(within).unwrap_or(usize::MAX);
            let memory = region.mapping.get_slice(start, part.len());
            memory.map_err(|_| outside())?.copy_to(part);
            (at, rest) = (at + part.len() as u64, more);
        }
        Ok(())
    }

    fn block(&self, block: usize) -> Result<(&RamBlock, &[Region]), VmmError> {
        match (self.blocks.get(block), self.regions.get(block)) {
            (Some(shape), Some(regions)) => Ok((shape, regions)),
            _ => Err(VmmError::State(format!("no memory block {block}"))),
        }
    }

    /// Makes a region's slot of so many bytes; none takes it away.
    #[allow(unsafe_code)]
    fn set_slot(&self, region: &Region, bytes: u64) -> Result<(), VmmError> {
        let at = region.at;
        let slot = kvm_userspace_memory_region {
            slot: region.slot,
            flags: KVM_MEM_LOG_DIRTY_PAGES,
            guest_phys_addr: at,
            memory_size: bytes,
            userspace_addr: region.mapping.as_ptr() as u64,
        };
        // SAFETY: the region is mapped for as long as we hold it, and when we
        // are dropped the slot is taken away before it. The guest may write it
        // at any time; nobody makes a reference into it, for vm-memory gives
        // none.
        unsafe { self.vm.set_user_memory_region(slot) }.map_err(|error| {
            kvm_error(
                format!("giving {bytes:#x} bytes of memory at {at:#x} to the guest"),
                error,
                "regions must not overlap, and slots must be free",
            )
        })
    }
}

impl Drop for TrackedRam {
    fn drop(&mut self) {
        if !self.ours {
            return;
        }
        for region in self.regions.iter().flatten() {
            // A slot that could not be made is not there either.
            let _ = self.set_slot(region, 0);
        }
    }
}

/// Adds the bits of `more` to `all`, from bit `from` on.
fn put_words(all: &mut [u64], from: u64, more: impl Iterator<Item = u64>) {
    let (first, shift) = ((from / 64) as usize, from % 64);
    for (index, word) in (first..).zip(more) {
        if let Some(low) = all.get_mut(index) {
            *low |= word << shift;
        }
        if shift != 0
            && let Some(high) = all.get_mut(index + 1)
        {
            *high |= word >> (64 - shift);
        }
    }
}
