//! The parts of a frame's body, taken off its front one by one. Each is
//! checked before anything is allocated for it.

use bytes::Bytes;

use crate::frame::{FrameError, Kind, Ranges};
use crate::limits;
use crate::peer::{Introduction, check_site_name};

/// Takes fields off the front of a body, never past its end.
pub(crate) struct Fields {
    kind: Kind,
    rest: Bytes,
}

impl Fields {
    /// Of the body of a frame, or of a text that has the same parts.
    pub(crate) fn new(kind: Kind, rest: Bytes) -> Fields {
        Fields { kind, rest }
    }

    /// Nothing may be left over.
    pub(crate) fn end(&self) -> Result<(), FrameError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(self.malformed("bytes are left over"))
        }
    }

    pub(crate) fn malformed(&self, what: &'static str) -> FrameError {
        FrameError::Malformed {
            kind: self.kind,
            what,
        }
    }

    fn take(&mut self, count: usize) -> Result<Bytes, FrameError> {
        if count > self.rest.len() {
            return Err(self.malformed("it ends early"));
        }
        Ok(self.rest.split_to(count))
    }

    pub(crate) fn take_rest(&mut self) -> Bytes {
        std::mem::take(&mut self.rest)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let bytes = self.take(N)?;
        bytes
            .first_chunk::<N>()
            .copied()
            .ok_or_else(|| self.malformed("it ends early"))
    }

    pub(crate) fn byte(&mut self) -> Result<u8, FrameError> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn text(&mut self, limit: usize) -> Result<String, FrameError> {
        let length = usize::from(self.byte()?);
        if length > limit {
            return Err(self.malformed("a text is too long"));
        }
        let bytes = self.take(length)?;
        std::str::from_utf8(&bytes)
            .map(str::to_owned)
            .map_err(|_| self.malformed("a text is not UTF-8"))
    }

    pub(crate) fn site_name(&mut self) -> Result<String, FrameError> {
        let name = self.text(limits::MAX_SITE_NAME_BYTES)?;
        match check_site_name(&name) {
            Ok(()) => Ok(name),
            Err(_) => Err(self.malformed("the site's name is not one")),
        }
    }

    pub(crate) fn ranges(&mut self) -> Result<Ranges, FrameError> {
        let count = usize::from(u16::from_le_bytes(self.array()?));
        if count > limits::MAX_RANGES {
            return Err(self.malformed("too many ranges"));
        }
        let mut ranges = Ranges::with_capacity(count);
        let mut after: Option<u64> = None;
        for _ in 0..count {
            let first = u64::from_le_bytes(self.array()?);
            let last = u64::from_le_bytes(self.array()?);
            if first > last || after.is_some_and(|after| first <= after) {
                return Err(self.malformed("ranges are not ascending"));
            }
            after = Some(last);
            ranges.push((first, last));
        }
        Ok(ranges)
    }

    pub(crate) fn introduction(&mut self) -> Result<Introduction, FrameError> {
        let site = self.text(limits::MAX_SITE_NAME_BYTES)?;
        let count = usize::from(self.byte()?);
        if count > limits::MAX_ADDRESSES {
            return Err(self.malformed("too many addresses"));
        }
        let addresses = (0..count)
            .map(|_| self.text(limits::MAX_ADDRESS_BYTES))
            .collect::<Result<Vec<_>, _>>()?;
        Introduction::new(site, addresses)
            .map_err(|_| self.malformed("the site's name or an address is not one"))
    }
}
