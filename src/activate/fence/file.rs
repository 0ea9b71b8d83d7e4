//! A term's file: JSON, and under it the checksum.

use std::fs;
use std::path::Path;

use super::FenceError;
#[cfg(any(test, feature = "fuzzing"))]
use super::Term;
#[cfg(any(test, feature = "fuzzing"))]
use super::together::LONGEST;

/// A text with its checksum, as it is kept.
pub(crate) fn written(body: &str) -> String {
    format!("{body}\n{}\n", blake3::hash(body.as_bytes()).to_hex())
}

/// Term files, as a fuzz target: as they are, and with a right checksum.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzzing(bytes: &[u8]) {
    let path = Path::new("x.term");
    let body = String::from_utf8_lossy(bytes.split(|byte| *byte == b'\n').next().unwrap_or(bytes));
    for text in [bytes.to_vec(), written(&body).into_bytes()] {
        let _ = parse::<Vec<Term>>(path, text.clone(), LONGEST);
        if let Ok(term) = parse::<Term>(path, text, LONGEST) {
            let body = serde_json::to_string(&term).expect("plain data");
            let again = parse::<Term>(path, written(&body).into_bytes(), LONGEST);
            assert!(again.is_ok_and(|again| again == term));
        }
    }
}

/// A checksummed file of at most so many bytes.
pub(super) fn read_file<T: serde::de::DeserializeOwned>(
    path: &Path,
    longest: u64,
) -> Result<T, FenceError> {
    let text = fs::read(path).map_err(|source| FenceError::Io {
        path: path.to_owned(),
        doing: "read",
        source,
    })?;
    parse(path, text, longest)
}

fn parse<T: serde::de::DeserializeOwned>(
    path: &Path,
    text: Vec<u8>,
    longest: u64,
) -> Result<T, FenceError> {
    let damaged = |why: &str| FenceError::Damaged {
        path: path.to_owned(),
        why: why.to_owned(),
    };
    if text.len() as u64 > longest {
        return Err(damaged("too long"));
    }
    let text = String::from_utf8(text).map_err(|_| damaged("not text"))?;
    let (body, sum) = text
        .trim_end()
        .split_once('\n')
        .ok_or_else(|| damaged("no checksum"))?;
    if blake3::hash(body.as_bytes()).to_hex().as_str() != sum {
        return Err(damaged("its checksum differs"));
    }
    serde_json::from_str(body).map_err(|e| damaged(&e.to_string()))
}
