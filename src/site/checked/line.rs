//! Lines of files that are only appended to: a JSON object each, with a checksum of all
//! that is before it as its last member.

use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The member of a line that stands for itself.
const SUM: &str = "sum";
/// Of a checksum in hexadecimal digits.
const DIGITS: usize = 2 * blake3::OUT_LEN;

/// An object up to its last member, without its end: what its checksum is of.
///
/// # Errors
/// When it has no JSON form.
pub fn begun<T: Serialize>(object: &T) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(object)?;
    line.pop();
    Ok(line)
}

/// What was [`begun`], whole: with a checksum as a member of this name, and a line's end.
pub fn ended(mut line: Vec<u8>, member: &str, sum: &blake3::Hash) -> Vec<u8> {
    line.extend_from_slice(format!(",\"{member}\":\"{}\"}}\n", sum.to_hex()).as_bytes());
    line
}

/// A line without its end, as what was [`begun`] and the digits of its checksum; `None`
/// when it does not end with a member of this name.
pub fn taken_apart<'a>(line: &'a [u8], member: &str) -> Option<(&'a [u8], &'a [u8])> {
    let line = line.strip_suffix(b"\"}")?;
    let (line, digits) = line.split_at(line.len().checked_sub(DIGITS)?);
    let body = line.strip_suffix(format!(",\"{member}\":\"").as_bytes())?;
    Some((body, digits))
}

/// The object that was [`begun`].
///
/// # Errors
/// When it cannot be understood.
pub fn object<T: DeserializeOwned>(body: &[u8]) -> serde_json::Result<T> {
    serde_json::from_slice(&[body, b"}"].concat())
}

/// A line that stands for itself.
///
/// # Errors
/// When the object has no JSON form.
pub fn text<T: Serialize>(object: &T) -> io::Result<Vec<u8>> {
    let line = begun(object)?;
    let sum = blake3::hash(&line);
    Ok(ended(line, SUM, &sum))
}

/// What such a line says, without its end; `None` when it is damaged.
pub fn parse<T: DeserializeOwned>(line: &[u8]) -> Option<T> {
    let (body, digits) = taken_apart(line, SUM)?;
    let whole = blake3::hash(body).to_hex().as_bytes() == digits;
    whole.then(|| object(body).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn every_flipped_bit_of_a_line_is_found() {
        let object = BTreeMap::from([("sum".to_owned(), 7_u64), ("what".to_owned(), 8)]);
        let line = text(&object).expect("a line");
        let (end, line) = line.split_last().expect("a line");
        assert_eq!(*end, b'\n');
        assert_eq!(parse(line), Some(object));
        assert!(serde_json::from_slice::<serde_json::Value>(line).is_ok());
        for bit in 0..line.len() * 8 {
            let mut flipped = line.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(parse::<BTreeMap<String, u64>>(&flipped), None, "bit {bit}");
        }
        for end in 0..line.len() {
            assert_eq!(parse::<BTreeMap<String, u64>>(&line[..end]), None);
        }
    }
}
