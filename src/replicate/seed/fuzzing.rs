//! A seed off a medium, as a fuzz target: as it is, and with anything inside of it rightly
//! encrypted.

use super::cipher::Encrypting;
use super::{ABOUT, BATCH, SEAL, SeedHeader, SeedKey, SeedReader, SeedRecord};

fn header() -> SeedHeader {
    SeedHeader {
        seed: [9; 16],
        nonce: [5; 19],
        target: [3; 16],
    }
}

fn encrypted(plain: &[u8]) -> Vec<u8> {
    let mut stream = Encrypting::begin(Vec::new(), &header(), &SeedKey([1; 32]))
        .expect("memory takes everything");
    stream.write(plain).expect("memory takes everything");
    stream.finish().expect("memory takes everything").0
}

fn read(mut file: &[u8]) {
    let Ok(header) = SeedHeader::read(&mut file) else {
        return;
    };
    let Ok(mut reader) = SeedReader::begin(file, &header, &SeedKey([1; 32])) else {
        return;
    };
    let (first, last) = (reader.about().first, reader.about().last);
    let mut batches = 0;
    loop {
        match reader.next_record() {
            Ok(SeedRecord::Batch(_)) => batches += 1,
            Ok(SeedRecord::Seal(seal)) => {
                assert_eq!(seal.point, reader.about().point);
                break;
            }
            Err(_) => break,
        }
        assert!(batches <= last - first + 1, "a number twice");
    }
}

/// Both ways.
pub(crate) fn seeds_of_guests(bytes: &[u8]) {
    read(bytes);
    read(&encrypted(bytes));
}

/// The records of `items` (about and seal, as CBOR) around a batch; and a whole file.
pub(crate) fn seeds(about: &[u8], batch: &[u8], seal: &[u8]) -> Vec<Vec<u8>> {
    let record = |kind: u8, bytes: &[u8]| {
        let length = (bytes.len() as u32).to_le_bytes();
        [&[kind][..], &length, bytes].concat()
    };
    let plain = [
        record(ABOUT, about),
        record(BATCH, batch),
        record(SEAL, seal),
    ]
    .concat();
    vec![encrypted(&plain), plain]
}
