//! A read piece by piece: source -> holes and data, each small enough to hold.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::{BlockSource, wire};

/// Bytes that are read and sent in one go.
pub const PIECE: usize = 256 << 10;
/// Extents are asked of the source for so many bytes at a time, which bounds their number.
const EXTENT_WINDOW: u64 = 64 << 20;

/// Where data begins in a piece: a chunk's head and the offset go before it.
pub(super) const DATA_AT: usize = wire::CHUNK_HEADER + 8;

/// Part of a read's answer.
pub(super) enum Piece {
    Zeros(Range<u64>),
    /// Data from [`DATA_AT`] on.
    Data {
        at: u64,
        bytes: Vec<u8>,
    },
}

/// A read that goes piece by piece, each on a blocking thread.
pub(super) struct Reading {
    source: Arc<dyn BlockSource>,
    pub(super) left: Range<u64>,
    /// Extents from `left.start` on, last first; not yet asked for while `None`.
    extents: Option<Vec<(u64, bool)>>,
}

impl Reading {
    pub(super) fn new(source: Arc<dyn BlockSource>, all: Range<u64>, holes: bool) -> Reading {
        let extents = if holes {
            None
        } else {
            Some(vec![(all.end - all.start, false)])
        };
        Reading {
            source,
            left: all,
            extents,
        }
    }

    /// The next piece; `left` is then what comes after it.
    pub(super) async fn next(self) -> (Reading, io::Result<Piece>) {
        let gone = || Reading {
            source: Arc::new(Gone),
            left: 0..0,
            extents: None,
        };
        match crate::work::spawn_blocking(move || self.next_blocking()).await {
            Ok(next) => next,
            // The source panicked: this read fails, the daemon goes on.
            Err(error) => (gone(), Err(io::Error::other(error))),
        }
    }

    fn next_blocking(mut self) -> (Reading, io::Result<Piece>) {
        let (source, left) = (&self.source, self.left.clone());
        let extents = self.extents.get_or_insert_with(|| {
            let mut extents = extents(&**source, left.clone(), usize::MAX);
            extents.reverse();
            extents
        });
        let (length, zero) = extents.pop().unwrap_or((left.end - left.start, false));
        let at = left.start;
        if zero {
            self.left.start = at + length;
            return (self, Ok(Piece::Zeros(at..at + length)));
        }
        let now = length.min(PIECE as u64);
        if length > now {
            extents.push((length - now, false));
        }
        let mut bytes = vec![0; DATA_AT + now as usize];
        let read = self.source.read(at, &mut bytes[DATA_AT..]);
        self.left.start = at + now;
        (self, read.map(|()| Piece::Data { at, bytes }))
    }
}

/// Stands for a source whose read never came back.
struct Gone;

impl BlockSource for Gone {
    fn size(&self) -> u64 {
        0
    }

    fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        Err(io::Error::other("the source is gone"))
    }

    fn extents(&self, _: u64, _: u64) -> Vec<(u64, bool)> {
        Vec::new()
    }
}

/// Up to `most` extents of a range, neighbours of one kind joined. What a source
/// says nothing about counts as data.
pub(super) fn extents(
    source: &dyn BlockSource,
    range: Range<u64>,
    most: usize,
) -> Vec<(u64, bool)> {
    let mut found: Vec<(u64, bool)> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let window = (range.end - at).min(EXTENT_WINDOW);
        let mut told: u64 = 0;
        let in_window = source
            .extents(at, window)
            .into_iter()
            .chain([(u64::MAX, false)]);
        for (length, zero) in in_window {
            let length = length.min(window - told);
            told += length;
            if length == 0 {
                continue;
            }
            match found.last_mut() {
                Some((last, kind)) if *kind == zero => *last += length,
                _ => {
                    if found.len() == most {
                        return found;
                    }
                    found.push((length, zero));
                }
            }
        }
        at += window;
    }
    found
}
