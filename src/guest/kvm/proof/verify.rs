//! The same checks from outside: memory and disk of one instant, as a recovery
//! point holds them, are what the guest's program says they must be.
//!
//! Bytes of a point are not trusted: whatever they say, this ends with an error
//! or a [`Verified`], in time and memory that the limits here bound.

use std::io;

/// Bytes of a page and of a block.
const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

// The layout of `program.s`; its names.
const GLOBALS: u64 = 0x1f_0000;
const CONTROL: u64 = 0x20_0000;
const NOISE_WORDS: usize = 2048;
const MOST_VCPUS: u64 = 64;
const CACHE_SLOTS: u64 = 16;
const MAGIC: u64 = 0x4e45_5641_4852_4146;
const MARK: u64 = 0x3146_4f4f_5250_4846;
/// Most items of a ledger: a quarter of 3 GiB in pages, twice, and cache pages.
const MOST_ITEMS: u64 = 1 << 20;
const MOST_FILL: u64 = 1 << 16;
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Reads at an offset.
pub type Read<'a> = dyn FnMut(u64, &mut [u8]) -> io::Result<()> + 'a;

/// What was found right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Verified {
    /// The guest's heartbeats until then.
    pub beats: u64,
    /// Pages looked at: working set, fill, page cache.
    pub pages: u64,
    /// Disk blocks looked at.
    pub blocks: u64,
    /// Page writes the guest had done.
    pub page_writes: u64,
    /// Block writes the guest had done.
    pub block_writes: u64,
}

/// Why an instant is not right.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// It could not be read.
    #[error("reading the guest's {what}: {source}")]
    Read {
        /// Memory or disk.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program is not there, or had not begun its work.
    #[error(
        "the guest's memory does not hold a proving program at work: {0}; \
         take a point after its first heartbeat"
    )]
    NotAtWork(String),
    /// The guest had found a fault by itself.
    #[error("the guest itself had found a fault before: {0:#x} (subject, reason, number)")]
    Noted(u64),
    /// A fault, in the words of the guest's heartbeat.
    #[error("this is not one instant of a guest: {0}")]
    Fault(String),
}

/// What every vCPU shares.
struct Shared {
    vcpus: u64,
    pages: u64,
    blocks: u64,
    ledger: Vec<u64>,
    stride: u64,
    page_base: u64,
    fill_base: u64,
    cache_base: u64,
    noise: Vec<u64>,
}

/// Checks memory and disk of one instant. `disk` is not asked where the guest
/// works on no blocks.
///
/// # Errors
/// The first thing that is not right.
pub fn verify(memory: &mut Read<'_>, disk: &mut Read<'_>) -> Result<Verified, ProofError> {
    let mut look = Look {
        memory,
        disk,
        page: vec![0; PAGE],
    };
    let globals = look.words(GLOBALS, 14)?;
    let [
        ready,
        vcpus,
        pages,
        blocks,
        ledger_at,
        stride,
        page_base,
        fill_base,
        fill,
        _,
        beats,
        _,
        _,
        cache_base,
    ] = <[u64; 14]>::try_from(globals).unwrap_or_default();
    if ready != 1 {
        return Err(ProofError::NotAtWork("it has not begun".to_owned()));
    }
    let items = pages
        .saturating_add(blocks)
        .saturating_add(vcpus.saturating_mul(CACHE_SLOTS));
    if vcpus == 0 || vcpus > MOST_VCPUS || items > MOST_ITEMS || fill > MOST_FILL {
        return Err(ProofError::NotAtWork(format!(
            "{vcpus} vCPUs, {pages} pages, {blocks} blocks, {fill} filled pages cannot be"
        )));
    }
    let noise = std::iter::successors(Some(xorshift(0x2545_f491_4f6c_dd1d)), |word| {
        Some(xorshift(*word))
    });
    let shared = Shared {
        vcpus,
        pages,
        blocks,
        // At most 8 MiB.
        ledger: look.words(ledger_at, items as usize)?,
        stride,
        page_base,
        fill_base,
        cache_base,
        noise: noise.take(NOISE_WORDS).collect(),
    };
    let mut verified = Verified {
        beats,
        ..Verified::default()
    };
    for vcpu in 0..vcpus {
        look.vcpu(&shared, vcpu, &mut verified)?;
    }
    for index in 0..fill {
        look.memory_page(shared.fill_base.saturating_add(index << 12))?;
        if look.page_words().ne(fill_words(index)) {
            return Err(ProofError::Fault(format!("fill-{index}-differs")));
        }
        verified.pages += 1;
    }
    Ok(verified)
}

struct Look<'a, 'b> {
    memory: &'a mut Read<'b>,
    disk: &'a mut Read<'b>,
    page: Vec<u8>,
}

impl Look<'_, '_> {
    fn vcpu(
        &mut self,
        shared: &Shared,
        vcpu: u64,
        verified: &mut Verified,
    ) -> Result<(), ProofError> {
        let control = self.words(CONTROL + (vcpu << 12), 15)?;
        let [
            magic,
            last,
            digest,
            intent,
            intended,
            page_writes,
            block_writes,
            _,
            _,
            _,
            _,
            _,
            _,
            memory_fault,
            disk_fault,
        ] = <[u64; 15]>::try_from(control).unwrap_or_default();
        if magic != MAGIC {
            return Err(ProofError::NotAtWork(format!("vCPU {vcpu} has not begun")));
        }
        if let Some(noted) = [memory_fault, disk_fault]
            .into_iter()
            .find(|fault| *fault != 0)
        {
            return Err(ProofError::Noted(noted));
        }
        let under_way = intent.checked_sub(1);
        let mut sum = 0u64;
        let mut entry = |item: u64| {
            let value = shared.ledger.get(item as usize).copied().unwrap_or(0);
            sum = sum.wrapping_add(mix_entry(item, value));
            value
        };
        for item in slice(shared.pages, shared.vcpus, vcpu) {
            let value = entry(item);
            if under_way != Some(item) {
                let cluster = (item >> 4).saturating_mul(shared.stride);
                let at = shared.page_base.saturating_add(cluster);
                self.memory_page(at.saturating_add((item & 15) << 12))?;
                self.is(shared, "page", item, item, value)?;
            }
            verified.pages += 1;
        }
        for block in slice(shared.blocks, shared.vcpus, vcpu) {
            let item = shared.pages + block;
            let value = entry(item);
            self.disk_block(block)?;
            let as_before = self.is(shared, "block", block, item, value);
            if under_way != Some(item) || self.is(shared, "block", block, item, intended).is_err() {
                as_before?;
            }
            verified.blocks += 1;
        }
        for slot in vcpu * CACHE_SLOTS..(vcpu + 1) * CACHE_SLOTS {
            let item = shared.pages + shared.blocks + slot;
            let value = entry(item);
            if under_way != Some(item) {
                self.memory_page(shared.cache_base.saturating_add(slot << 12))?;
                let block = (value >> 40).wrapping_sub(1);
                let of = shared.pages.wrapping_add(block);
                self.is(shared, "cache", slot, of, value & ((1 << 40) - 1))?;
            }
            verified.pages += 1;
        }
        let before = under_way.map_or(0, |item| {
            let value = shared.ledger.get(item as usize).copied().unwrap_or(0);
            mix_entry(item, intended).wrapping_sub(mix_entry(item, value))
        });
        if digest != sum && digest != sum.wrapping_add(before) {
            return Err(ProofError::Fault(format!("ledger-{vcpu}-differs")));
        }
        if page_writes.saturating_add(block_writes) > last {
            return Err(ProofError::Fault(format!("control-{vcpu}-older")));
        }
        verified.page_writes = verified.page_writes.saturating_add(page_writes);
        verified.block_writes = verified.block_writes.saturating_add(block_writes);
        Ok(())
    }

    /// Is the page at hand what `item` is at `value`?
    fn is(
        &self,
        shared: &Shared,
        what: &str,
        number: u64,
        item: u64,
        value: u64,
    ) -> Result<(), ProofError> {
        if self.page_words().eq(content(shared, item, value)) {
            return Ok(());
        }
        let header: Vec<u64> = self.page_words().take(3).collect();
        let why = match *header.as_slice() {
            [0, 0, 0] if value != 0 => "lost",
            [MARK, found, _] if found != item => "swapped",
            [MARK, _, found] if found > value => "newer",
            [MARK, _, found] if found < value => "older",
            _ => "torn",
        };
        Err(ProofError::Fault(format!("{what}-{number}-{why}")))
    }

    fn page_words(&self) -> impl Iterator<Item = u64> + '_ {
        let words = self.page.as_chunks::<8>().0;
        words.iter().map(|word| u64::from_le_bytes(*word))
    }

    fn memory_page(&mut self, at: u64) -> Result<(), ProofError> {
        let read = (self.memory)(at, &mut self.page);
        read.map_err(|source| ProofError::Read {
            what: "memory",
            source,
        })
    }

    fn disk_block(&mut self, block: u64) -> Result<(), ProofError> {
        let read = (self.disk)(block * PAGE as u64, &mut self.page);
        read.map_err(|source| ProofError::Read {
            what: "disk",
            source,
        })
    }

    fn words(&mut self, at: u64, count: usize) -> Result<Vec<u64>, ProofError> {
        let mut bytes = vec![0; count * 8];
        (self.memory)(at, &mut bytes).map_err(|source| ProofError::Read {
            what: "memory",
            source,
        })?;
        let words = bytes.as_chunks::<8>().0;
        Ok(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }
}

/// Of so many things among so many vCPUs: this one's.
fn slice(things: u64, vcpus: u64, vcpu: u64) -> std::ops::Range<u64> {
    things * vcpu / vcpus..things * (vcpu + 1) / vcpus
}

fn xorshift(mut word: u64) -> u64 {
    word ^= word << 13;
    word ^= word >> 7;
    word ^ word << 17
}

fn mix(item: u64, value: u64) -> u64 {
    let mixed = item.wrapping_add(1).wrapping_mul(0xd6e8_feb8_6659_fd93) ^ value;
    let mixed = mixed.wrapping_mul(GOLDEN);
    mixed ^ mixed >> 29
}

/// An entry's part of the digest; what was never written has none.
fn mix_entry(item: u64, value: u64) -> u64 {
    if value == 0 { 0 } else { mix(item, value) }
}

/// What a page or block holds, in words.
fn content(shared: &Shared, item: u64, value: u64) -> Box<dyn Iterator<Item = u64> + '_> {
    if value == 0 {
        return Box::new(std::iter::repeat_n(0, WORDS));
    }
    let word = mix(item, value);
    let own = std::iter::successors(Some(xorshift(word)), |word| Some(xorshift(*word)));
    let filler: Box<dyn Iterator<Item = u64> + '_> = match word >> 61 {
        0..=3 => Box::new(std::iter::repeat(word)),
        4 => Box::new(std::iter::repeat_n(word, 252).chain(std::iter::repeat(0))),
        5 => Box::new(shared.noise.iter().copied().skip((word & 1023) as usize)),
        _ => Box::new(own),
    };
    Box::new(
        [MARK, item, value, word]
            .into_iter()
            .chain(filler)
            .take(WORDS),
    )
}

/// What a filled page holds, in words.
fn fill_words(index: u64) -> Box<dyn Iterator<Item = u64>> {
    if index % 2 == 1 {
        let seed = GOLDEN.wrapping_mul(index + 1);
        let noise = std::iter::successors(Some(xorshift(seed)), |word| Some(xorshift(*word)));
        return Box::new(noise.take(WORDS));
    }
    let word = match index % 8 {
        0 => 0,
        4 => GOLDEN.wrapping_mul(index + 1),
        _ => GOLDEN.wrapping_mul((index >> 4) + 1),
    };
    Box::new(std::iter::repeat_n(word, WORDS))
}
