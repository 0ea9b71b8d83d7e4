//! A message's place in the conversation, and its bytes.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{LEVELS, MAX_MESSAGE, Message};

/// A message with its place in the conversation.
#[derive(Debug, Serialize, Deserialize)]
pub struct Envelope {
    /// Set on a request: the answer names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// Set on an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answers: Option<u64>,
    /// What is said.
    pub body: Message,
}

/// A message that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Over the limit.
    #[error("a control message of {0} bytes is over the limit of {MAX_MESSAGE}")]
    TooLong(usize),
    /// Not one of ours.
    #[error("a control message cannot be read ({0}); do both sites run the same version?")]
    Unreadable(String),
}

impl Envelope {
    /// As bytes for the control stream.
    ///
    /// # Errors
    /// When it is over [`MAX_MESSAGE`].
    pub fn encode(&self) -> Result<Bytes, MessageError> {
        let mut bytes = Vec::new();
        ciborium::into_writer(self, &mut bytes)
            .map_err(|e| MessageError::Unreadable(e.to_string()))?;
        if bytes.len() > MAX_MESSAGE {
            return Err(MessageError::TooLong(bytes.len()));
        }
        Ok(bytes.into())
    }

    /// From bytes of the control stream.
    ///
    /// # Errors
    /// When they are no message.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        if bytes.len() > MAX_MESSAGE {
            return Err(MessageError::TooLong(bytes.len()));
        }
        let unreadable = |why: &str| MessageError::Unreadable(why.to_owned());
        // What reads a list of a fixed length does not look whether it goes on: the bytes
        // may end within it, and what follows may be taken for something else.
        let place = Unknown::of(bytes).ok_or_else(|| unreadable("it is not whole"))?;
        let envelope: Self = ciborium::de::from_reader_with_recursion_limit(bytes, LEVELS)
            .map_err(|e| unreadable(&e.to_string()))?;
        match (place.id, place.answers) == (envelope.id, envelope.answers) {
            true => Ok(envelope),
            false => Err(unreadable("a list in it is too long")),
        }
    }
}

/// The place in the conversation of a message that is not known here, so that
/// whoever waits for what it asks or answers need not wait to the end.
#[derive(Debug, PartialEq, Eq)]
pub struct Unknown {
    /// It is a request, of this number.
    pub id: Option<u64>,
    /// It answers the request of this number.
    pub answers: Option<u64>,
}

/// What every version of an [`Envelope`] has.
#[derive(Deserialize)]
struct Place {
    #[serde(default)]
    id: Option<u64>,
    #[serde(default)]
    answers: Option<u64>,
    #[serde(rename = "body")]
    _body: serde::de::IgnoredAny,
}

impl Unknown {
    /// `None` when it is no message of any version: not one CBOR map that says
    /// something, nested no deeper than a message may be.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        let known = bytes.get(..MAX_MESSAGE.min(bytes.len()))?;
        let place: Place = ciborium::de::from_reader_with_recursion_limit(known, LEVELS).ok()?;
        Some(Self {
            id: place.id,
            answers: place.answers,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_ends_within_a_list_is_none() {
        // {"id": 14, "body": {"baseline": {…, "key": [5; 32]}}}.
        let mut bytes = b"\xa2bid\x0edbody\xa1hbaseline\xa5eguestx$".to_vec();
        bytes.extend(b"07070707-0707-0707-0707-070707070707");
        bytes.extend(b"epoint\x05fvolume\x01dunit\x18@ckey\x98\x20");
        let length = bytes.len() - 1;
        bytes.extend([5; 32]);
        assert!(Envelope::decode(&bytes).is_ok());
        // The list is to have 96 numbers, and the bytes end after 32.
        bytes[length] = 96;
        assert!(Envelope::decode(&bytes).is_err());
        // They are there, and one of them would be the message's number.
        let mut body = bytes.split_off(b"\xa2bid\x0e".len());
        let mut bytes = vec![0xa2];
        body.extend(b"bid\x07");
        body.extend([5; 62]);
        bytes.extend(body);
        bytes.extend(b"bid\x0e");
        assert!(Envelope::decode(&bytes).is_err());
    }

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
        assert_eq!(Unknown::of(&bytes), Some(place));
        assert_eq!(Unknown::of(&bytes[..3]), None);
        assert_eq!(Unknown::of(&[0x9f; 4096]), None);
        // {"body": [[[[…]]]]}, deeper than any message.
        let mut deep = vec![0xa1, 0x64];
        deep.extend(b"body");
        deep.extend([0x81; 4096]);
        assert_eq!(Unknown::of(&deep), None);
        assert!(Envelope::decode(&deep).is_err());
    }
}
