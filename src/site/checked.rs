//! Small files that a site remembers things by: JSON on one line, and under it the
//! checksum. A bit that flips in one is found when it is read; what follows from that
//! is each reader's. Of files that are appended to, each line has its own, in [`line`].

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::files;

pub mod line;

/// A text with its checksum, as it is kept.
pub fn written(body: &str) -> String {
    format!("{body}\n{}\n", blake3::hash(body.as_bytes()).to_hex())
}

/// A value as it is kept.
///
/// # Errors
/// When it has no JSON form.
pub fn text<T: Serialize>(value: &T) -> io::Result<String> {
    Ok(written(&serde_json::to_string(value)?))
}

/// What is kept in these bytes.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] when they are damaged.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    let damaged = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let text = std::str::from_utf8(bytes).map_err(|_| damaged("it is no text".to_owned()))?;
    let (body, sum) = text
        .trim_end()
        .rsplit_once('\n')
        .ok_or_else(|| damaged("it has no checksum".to_owned()))?;
    if blake3::hash(body.as_bytes()).to_hex().as_str() != sum {
        return Err(damaged("its checksum differs".to_owned()));
    }
    serde_json::from_str(body).map_err(|error| damaged(error.to_string()))
}

/// Reads a file of at most so many bytes.
///
/// # Errors
/// When it is not there, cannot be read, or is damaged: see [`parse`].
pub fn read<T: DeserializeOwned>(path: &Path, longest: u64) -> io::Result<T> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(longest + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > longest {
        let why = format!("it has more than {longest} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    parse(&bytes)
}

/// As [`read`]; `None` when it is not there.
///
/// # Errors
/// As [`read`], but for that.
pub fn read_if_there<T: DeserializeOwned>(path: &Path, longest: u64) -> io::Result<Option<T>> {
    match read(path, longest) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some),
    }
}

/// Replaces a file, durably: see [`files::replace`].
///
/// # Errors
/// As [`files::replace`].
pub fn write<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    files::replace(path, text(value)?.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_is_found() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("kept.json");
        assert_eq!(read_if_there::<u64>(&path, 100).ok(), Some(None));
        let value = vec![("web".to_owned(), 7_u64)];
        write(&path, &value).expect("written");
        let whole = std::fs::read(&path).expect("read");
        assert_eq!(
            read::<Vec<(String, u64)>>(&path, 1000).ok(),
            Some(value.clone())
        );
        for byte in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[byte] ^= 1 << bit;
                // The end of the last line says nothing.
                let same = byte + 1 == whole.len();
                match parse::<Vec<(String, u64)>>(&bytes) {
                    Ok(read) => assert!(same && read == value, "bit {bit} of byte {byte}"),
                    Err(error) => assert_eq!(error.kind(), io::ErrorKind::InvalidData),
                }
            }
        }
        let short = read::<Vec<(String, u64)>>(&path, whole.len() as u64 - 1);
        assert!(short.is_err_and(|error| error.to_string().contains("more than")));
        for end in 0..whole.len() - 1 {
            assert!(parse::<Vec<(String, u64)>>(&whole[..end]).is_err());
        }
    }
}
