//! Prints how fast one core digests units: `cargo run --release --example digest_rate`.

use std::hint::black_box;
use std::time::Instant;

use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::unit::UNIT;

fn main() {
    let units: Vec<u8> = (0..16_384 * UNIT as u64)
        .map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect();
    let key = DigestKey::random();
    let mut digests = Vec::new();
    let mut best = 0f64;
    for _ in 0..10 {
        digests.clear();
        let start = Instant::now();
        key.digests(black_box(&units), &mut digests);
        best = best.max(units.len() as f64 / start.elapsed().as_secs_f64());
        black_box(&digests);
    }
    let start = Instant::now();
    for unit in units.chunks_exact(UNIT) {
        black_box(key.of(unit));
    }
    let alone = units.len() as f64 / start.elapsed().as_secs_f64();
    println!(
        "{:.2} GB/s in groups of 16 units, {:.2} GB/s unit by unit",
        best / 1e9,
        alone / 1e9
    );
}
