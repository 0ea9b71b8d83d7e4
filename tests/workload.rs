//! The test guest's checker must find every lost, torn, stale or too new page
//! and block: a checker that misses one would make every end-to-end test vain.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

#[path = "guest/content.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    clippy::new_without_default,
    reason = "made for the guest's program"
)]
mod content;
#[path = "guest/ledger.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    clippy::new_without_default,
    reason = "made for the guest's program"
)]
mod ledger;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use content::{PAGE, Words, sum};
use ledger::{Blocks, Journal, Memory, Order};
use proptest::prelude::*;

#[test]
fn an_order_knows_the_last_write_of_every_item() {
    let order = Order::new(64);
    let mut last = vec![0; 64];
    for seq in 1..500 {
        last[order.place(seq) as usize] = seq;
        for item in 0..64 {
            assert_eq!(
                order.last(item, seq),
                last[item as usize],
                "item {item} after {seq}"
            );
        }
    }
}

fn memory(writes: u64) -> Memory {
    let mut memory = Memory::new(7, 16, false);
    for stamp in 0..writes {
        memory.write(stamp).unwrap();
    }
    memory
}

fn bad_pages(memory: &Memory) -> Vec<u64> {
    (0..memory.count())
        .filter(|&item| memory.check(item).is_err())
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn memory_that_lost_a_page_is_found(writes in 0u64..100, item in 0u64..16) {
        let mut memory = memory(writes);
        prop_assert!(bad_pages(&memory).is_empty());
        memory.page(item).fill(0);
        prop_assert_eq!(bad_pages(&memory), vec![item]);
    }

    #[test]
    fn any_flipped_bit_is_found(writes in 0u64..100, item in 0u64..16, at in 0usize..PAGE, bit in 0u8..8) {
        let mut memory = memory(writes);
        memory.page(item)[at] ^= 1 << bit;
        prop_assert_eq!(bad_pages(&memory), vec![item]);
    }

    #[test]
    fn a_page_of_another_instant_is_found(now in 0u64..100, other in 0u64..100) {
        let (mut here, mut there) = (memory(now), memory(other));
        let differing: Vec<u64> = (0..16).filter(|&item| here.page(item) != there.page(item)).collect();
        prop_assert_eq!(differing.is_empty(), now == other);
        for item in 0..16 {
            let page = there.page(item).to_vec();
            here.page(item).copy_from_slice(&page);
        }
        prop_assert_eq!(bad_pages(&here), differing);
    }

    #[test]
    fn a_torn_page_is_found(writes in 1u64..100, half in 1usize..63) {
        let (mut before, mut after) = (memory(writes - 1), memory(writes));
        let item = Order::new(16).place(writes);
        // Rows that the write left alone may come from either.
        let old = before.page(item)[..half * 64].to_vec();
        let new = after.page(item)[..half * 64].to_vec();
        after.page(item)[..half * 64].copy_from_slice(&old);
        prop_assert_eq!(bad_pages(&after).is_empty(), old == new);
    }
}

fn file(path: &std::path::Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

#[test]
fn a_disk_of_another_instant_than_memory_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    file(&path).set_len(16 * PAGE as u64).unwrap();
    let image = |seq: u64| {
        let mut blocks = Blocks::new(7, 16, file(&path), file(&path));
        file(&path).write_all_at(&[0; 16 * PAGE], 0).unwrap();
        (0..seq).for_each(|stamp| blocks.write(stamp).unwrap());
        let bytes = std::fs::read(&path).unwrap();
        (blocks, bytes)
    };
    for (memory, disk) in [(20, 20), (20, 21), (20, 19), (0, 1), (1, 0), (40, 24)] {
        let (_, bytes) = image(disk);
        let (mut blocks, _) = image(memory);
        file(&path).write_all_at(&bytes, 0).unwrap();
        let bad = (0..16).filter(|&item| blocks.check(item).is_err()).count();
        assert_eq!(
            bad as u64,
            memory.abs_diff(disk).min(16),
            "memory of {memory}, disk of {disk}"
        );
        // A guest that writes on before it checks must not cover it up.
        let found = (0..16)
            .map(|stamp| blocks.write(stamp))
            .filter(Result::is_err)
            .count();
        assert_eq!(
            found == 0,
            memory == disk,
            "memory of {memory}, disk of {disk}, written on"
        );
    }
}

#[test]
fn a_journal_that_lost_its_end_or_kept_too_much_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let writer = OpenOptions::new()
        .append(true)
        .create(true)
        .open(&path)
        .unwrap();
    let mut journal = Journal::new(7, file(&path), writer);
    for number in 0..Journal::RECORDS + 10 {
        journal.append().unwrap();
        if number % 100 == 0 {
            journal.check().unwrap();
        }
    }
    journal.check().unwrap();
    file(&path).set_len(9 * 512).unwrap();
    assert!(journal.check().is_err());
    file(&path).set_len(10 * 512).unwrap();
    assert!(journal.check().is_err());
    file(&path).set_len(11 * 512).unwrap();
    assert!(journal.check().is_err());
}

#[test]
fn sums_see_every_byte_and_the_length() {
    let words = Words::new();
    let mut page = [0; PAGE];
    for index in 0..200 {
        words.fill_page(1, index, &mut page);
        let before = sum(&page);
        page[index as usize * 20] ^= 1;
        assert_ne!(sum(&page), before);
    }
    assert_ne!(sum(&[0; 31]), sum(&[0; 32]));
    assert_ne!(sum(b""), sum(&[0]));
}
