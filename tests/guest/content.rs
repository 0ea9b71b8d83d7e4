//! What the test guest's memory and disks are filled with: text, table rows,
//! noise and duplicates in about the shares of a small database server. Every
//! page is a function of a seed and numbers, so that it can be checked.

/// Bytes of a page, and of a block on disk.
pub const PAGE: usize = 4096;
const ROW: usize = 64;
/// Table rows that one visit to a page rewrites.
const ROWS_PER_VISIT: u64 = 4;

/// One step of splitmix64: a well mixed function of its argument.
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A fast checksum: four lanes, so that software emulation is not waited for.
pub fn sum(bytes: &[u8]) -> u64 {
    let mut lanes = [1u64, 2, 3, 4];
    let mut step = |chunk: &[u8]| {
        for (lane, word) in lanes.iter_mut().zip(chunk.chunks_exact(8)) {
            let word = word
                .iter()
                .rev()
                .fold(0, |sum, &byte| sum << 8 | u64::from(byte));
            *lane = (*lane ^ word)
                .wrapping_mul(0x9fb2_1c65_1e98_df25)
                .rotate_left(29);
        }
    };
    let whole = bytes.chunks_exact(32);
    let mut rest = [0; 32];
    rest[..whole.remainder().len()].copy_from_slice(whole.remainder());
    whole.for_each(&mut step);
    step(&rest);
    let length = bytes.len() as u64;
    lanes.iter().fold(mix(length), |sum, &lane| mix(sum ^ lane))
}

/// Words of no language, a thousand, each padded to eight bytes.
pub struct Words(Vec<([u8; 8], u8)>);

impl Words {
    /// The same words at every call.
    pub fn new() -> Self {
        let syllables = *b"baneritolusamedokivaroshupelinta";
        let word = |number: u64| {
            let mut text = [b' '; 8];
            let letters = 2 + (mix(number) % 3) as usize * 2;
            for at in (0..letters).step_by(2) {
                let syllable = (mix(number * 8 + at as u64) % 16) as usize * 2;
                text[at..at + 2].copy_from_slice(&syllables[syllable..syllable + 2]);
            }
            (text, letters as u8 + 1)
        };
        Words((0..1024).map(word).collect())
    }

    /// Text in which some words are frequent and most are rare.
    fn text(&self, mut state: u64, out: &mut [u8]) {
        let mut at = 0;
        while at + 8 <= out.len() {
            state = state
                .wrapping_mul(0x5851_f42d_4c95_7f2d)
                .wrapping_add(0x1405_7b7e_f767_814f);
            let (a, b) = ((state >> 54) as usize, (state >> 44) as usize & 1023);
            let (word, length) = &self.0[(a * b) >> 10];
            out[at..at + 8].copy_from_slice(word);
            at += usize::from(*length);
        }
        out[at..].fill(b'\n');
    }

    /// Page `index` of the fill: 40 % text, 25 % table, 20 % noise, 15 % duplicates.
    pub fn fill_page(&self, seed: u64, index: u64, out: &mut [u8]) {
        let number = mix(seed ^ index);
        match number % 100 {
            0..40 => self.text(number, out),
            40..65 => table_page(seed, index, 0, 0, 1, out),
            65..85 => noise_page(number, out),
            _ => self.text(mix(number % 64), out),
        }
    }
}

/// Incompressible bytes.
pub fn noise_page(mut state: u64, out: &mut [u8]) {
    state |= 1;
    for word in out.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
}

fn hex(mut value: u64, out: &mut [u8]) {
    for digit in out.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(value & 15) as usize];
        value >>= 4;
    }
}

/// A page of a table: a header with its index, the sequence number of its last
/// write and a stamp; then rows, of which each write changes a few. `count` is
/// the number of pages written in turn.
pub fn table_page(seed: u64, index: u64, seq: u64, stamp: u64, count: u64, out: &mut [u8]) {
    let mut rows = out.chunks_exact_mut(ROW);
    if let Some(header) = rows.next() {
        header
            .copy_from_slice(b"table 00000000 seq 0000000000000000 stamp 0000000000000000     \n");
        hex(index, &mut header[6..14]);
        hex(seq, &mut header[19..35]);
        hex(stamp, &mut header[42..58]);
    }
    let total = (PAGE / ROW - 1) as u64;
    let touched = seq.div_ceil(count) * ROWS_PER_VISIT;
    for (row, text) in (0..total).zip(rows) {
        let writes = (touched + total - 1 - row) / total;
        let value = mix(seed ^ mix(index * total + row) ^ writes);
        text.copy_from_slice(b"row 00000000 account DE00000000 state open balance 000.00 EUR  \n");
        hex(index * total + row, &mut text[4..12]);
        hex(value >> 40, &mut text[23..28]);
        hex(value & 0xf, &mut text[51..52]);
        hex(writes, &mut text[28..31]);
    }
}
