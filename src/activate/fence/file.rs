//! A term's file: JSON, and under it the checksum.

use std::io;
use std::path::Path;

use super::FenceError;
#[cfg(any(test, feature = "fuzzing"))]
use super::Term;
use crate::site::checked;

/// Term files, as a fuzz target: as they are, and with a right checksum.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzzing(bytes: &[u8]) {
    let body = String::from_utf8_lossy(bytes.split(|byte| *byte == b'\n').next().unwrap_or(bytes));
    for text in [bytes.to_vec(), checked::written(&body).into_bytes()] {
        let _ = checked::parse::<Vec<Term>>(&text);
        if let Ok(term) = checked::parse::<Term>(&text) {
            let text = checked::text(&term).expect("plain data");
            let again = checked::parse::<Term>(text.as_bytes());
            assert!(again.is_ok_and(|again| again == term));
        }
    }
}

/// A checksummed file of at most so many bytes.
pub(super) fn read_file<T: serde::de::DeserializeOwned>(
    path: &Path,
    longest: u64,
) -> Result<T, FenceError> {
    checked::read(path, longest).map_err(|source| match source.kind() {
        io::ErrorKind::InvalidData => FenceError::Damaged {
            path: path.to_owned(),
            why: source.to_string(),
        },
        _ => FenceError::Io {
            path: path.to_owned(),
            doing: "read",
            source,
        },
    })
}
