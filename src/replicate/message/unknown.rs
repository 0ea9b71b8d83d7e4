//! What can be read of a message that is not known here.

use serde::Deserialize;

use super::{LEVELS, MAX_MESSAGE};

/// The place in the conversation of a message that is not known here, so that
/// whoever waits for what it asks or answers need not wait to the end.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Unknown {
    /// It is a request, of this number.
    #[serde(default)]
    pub id: Option<u64>,
    /// It answers the request of this number.
    #[serde(default)]
    pub answers: Option<u64>,
}

impl Unknown {
    /// As far as it can be read.
    pub fn of(bytes: &[u8]) -> Self {
        let known = bytes
            .get(..MAX_MESSAGE.min(bytes.len()))
            .unwrap_or_default();
        ciborium::de::from_reader_with_recursion_limit(known, LEVELS).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use serde::Serialize;

    use super::super::Envelope;
    use super::*;

    #[test]
    fn of_a_message_that_is_not_known_its_place_is() {
        #[derive(Serialize)]
        struct Newer {
            id: u64,
            body: Body,
        }
        #[derive(Serialize)]
        #[serde(rename_all = "snake_case")]
        enum Body {
            FromTheFuture { of: Vec<u8> },
        }
        let newer = Newer {
            id: 7,
            body: Body::FromTheFuture { of: vec![1, 2] },
        };
        let mut bytes = Vec::new();
        assert!(ciborium::into_writer(&newer, &mut bytes).is_ok());
        assert!(Envelope::decode(&bytes).is_err());
        let place = Unknown {
            id: Some(7),
            answers: None,
        };
        assert_eq!(Unknown::of(&bytes), place);
        assert_eq!(Unknown::of(&bytes[..3]), Unknown::default());
        assert_eq!(Unknown::of(&[0x9f; 4096]), Unknown::default());
    }
}
