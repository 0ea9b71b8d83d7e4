//! Bytes as text that survives being read aloud and typed: Crockford's base 32
//! in lower case. Reading ignores case, hyphens and white space, and takes the
//! letters o, i and l for the digits they look like.

const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

/// Bytes as text, five bits a character, the last padded with zero bits.
pub(super) fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(5) * 8);
    let mut held = 0u32;
    let mut bits = 0;
    for &byte in bytes {
        held = held << 8 | u32::from(byte);
        bits += 8;
        while bits >= 5 {
            bits -= 5;
            push(&mut text, held >> bits);
        }
    }
    if bits > 0 {
        push(&mut text, held << (5 - bits));
    }
    text
}

fn push(text: &mut String, five_bits: u32) {
    let at = (five_bits & 31) as usize;
    if let Some(&character) = ALPHABET.get(at) {
        text.push(char::from(character));
    }
}

/// Text as bytes; `None` for other characters, or bits that no encoder leaves.
pub(super) fn decode(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() * 5 / 8);
    let mut held = 0u32;
    let mut bits = 0;
    for character in text.chars() {
        if character == '-' || character.is_whitespace() {
            continue;
        }
        let character = match character.to_ascii_lowercase() {
            'o' => '0',
            'i' | 'l' => '1',
            other => other,
        };
        let value = ALPHABET
            .iter()
            .position(|&known| char::from(known) == character)?;
        held = (held << 5 | value as u32) & 0xfff;
        bits += 5;
        if bits >= 8 {
            bits -= 8;
            bytes.push((held >> bits) as u8);
        }
    }
    let clean = bits < 5 && held & ((1 << bits) - 1) == 0;
    clean.then_some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn text_comes_back(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let text = encode(&bytes);
            prop_assert_eq!(decode(&text), Some(bytes.clone()));
            let typed = text.to_uppercase().replace('0', "O").replace('1', "l");
            prop_assert_eq!(decode(&format!(" {typed}\n")), Some(bytes));
        }

        #[test]
        fn arbitrary_text_never_panics(text in "\\PC{0,80}") {
            let _ = decode(&text);
        }
    }

    #[test]
    fn known_text() {
        assert_eq!(encode(b"\xff\x00"), "zw00");
        assert_eq!(decode("u"), None);
        assert_eq!(decode("zz"), None, "bits that no encoder leaves");
    }
}
