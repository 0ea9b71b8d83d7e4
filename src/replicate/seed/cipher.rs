//! The stream of a seed: chunks of [`CHUNK`] bytes, each encrypted and
//! authenticated with its position, the seed's header, and whether it is the
//! last. The only file that names the cipher.

use std::io::{self, Read, Write};

use aead_stream::{DecryptorBE32, EncryptorBE32, Nonce, StreamBE32};
use chacha20poly1305::XChaCha20Poly1305;

use super::{CHUNK, HEADER, SeedError, SeedHeader, SeedKey};

/// Bytes that a chunk grows by.
const TAG: usize = 16;

type Cipher = XChaCha20Poly1305;

fn nonce(header: &SeedHeader) -> Nonce<Cipher, StreamBE32<Cipher>> {
    header.nonce.into()
}

/// Encrypts what is written. What was not [finished](Encrypting::finish) is cut short.
pub(super) struct Encrypting<W: Write> {
    inner: W,
    cipher: Option<EncryptorBE32<Cipher>>,
    header: [u8; HEADER],
    chunk: Vec<u8>,
    written: u64,
}

impl<W: Write> Encrypting<W> {
    /// Writes the header, in the clear.
    pub(super) fn begin(mut inner: W, header: &SeedHeader, key: &SeedKey) -> io::Result<Self> {
        let bytes = header.bytes();
        inner.write_all(&bytes)?;
        Ok(Self {
            inner,
            cipher: Some(EncryptorBE32::new(&key.0.into(), &nonce(header))),
            header: bytes,
            chunk: Vec::with_capacity(CHUNK + TAG),
            written: HEADER as u64,
        })
    }

    /// Bytes of the file so far.
    pub(super) fn written(&self) -> u64 {
        self.written
    }

    pub(super) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            // A full chunk waits: it may turn out to be the last.
            if self.chunk.len() == CHUNK {
                let cipher = self.cipher.as_mut().ok_or_else(spent)?;
                let done = cipher.encrypt_next_in_place(&self.header, &mut self.chunk);
                done.map_err(|_| spent())?;
                self.put()?;
            }
            let room = CHUNK - self.chunk.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.chunk.extend_from_slice(now);
            bytes = later;
        }
        Ok(())
    }

    fn put(&mut self) -> io::Result<()> {
        self.inner.write_all(&self.chunk)?;
        self.written += self.chunk.len() as u64;
        self.chunk.clear();
        Ok(())
    }

    /// Writes the last chunk; what is below, and the bytes of the file.
    pub(super) fn finish(mut self) -> io::Result<(W, u64)> {
        let cipher = self.cipher.take().ok_or_else(spent)?;
        let done = cipher.encrypt_last_in_place(&self.header, &mut self.chunk);
        done.map_err(|_| spent())?;
        self.put()?;
        self.inner.flush()?;
        Ok((self.inner, self.written))
    }
}

/// After 4 PiB.
fn spent() -> io::Error {
    io::Error::other("a seed holds 4 PiB at most")
}

/// Decrypts what is read, chunk by chunk: nothing is handed on unverified.
pub(super) struct Decrypting<R: Read> {
    inner: R,
    /// `None` once the last chunk was read.
    cipher: Option<DecryptorBE32<Cipher>>,
    header: [u8; HEADER],
    chunk: Vec<u8>,
    taken: usize,
    /// Read to see whether a chunk is the last.
    ahead: Option<u8>,
    /// Bytes of the file read so far.
    read: u64,
}

impl<R: Read> Decrypting<R> {
    /// `inner` stands behind the header.
    pub(super) fn begin(inner: R, header: &SeedHeader, key: &SeedKey) -> Self {
        Self {
            inner,
            cipher: Some(DecryptorBE32::new(&key.0.into(), &nonce(header))),
            header: header.bytes(),
            chunk: Vec::with_capacity(CHUNK + TAG + 1),
            taken: 0,
            ahead: None,
            read: HEADER as u64,
        }
    }

    /// Bytes of the file read so far.
    pub(super) fn read(&self) -> u64 {
        self.read
    }

    /// Fills `out`; false at the end of the stream.
    pub(super) fn fill(&mut self, out: &mut [u8]) -> Result<bool, SeedError> {
        let mut filled = 0;
        while filled < out.len() {
            if self.taken == self.chunk.len() && !self.next_chunk()? {
                return match filled {
                    0 => Ok(false),
                    _ => Err(SeedError::Unsound("it ends within a record")),
                };
            }
            let have = self.chunk.get(self.taken..).unwrap_or_default();
            let now = have.len().min(out.len() - filled);
            out[filled..filled + now].copy_from_slice(&have[..now]);
            filled += now;
            self.taken += now;
        }
        Ok(true)
    }

    /// Verifies that nothing follows.
    pub(super) fn end(&mut self) -> Result<(), SeedError> {
        match self.fill(&mut [0])? {
            false => Ok(()),
            true => Err(SeedError::Unsound("something follows its end")),
        }
    }

    fn next_chunk(&mut self) -> Result<bool, SeedError> {
        let Some(mut cipher) = self.cipher.take() else {
            return Ok(false);
        };
        let at = self.read - u64::from(self.ahead.is_some());
        self.taken = 0;
        self.chunk.clear();
        self.chunk.extend(self.ahead.take());
        let wanted = (CHUNK + TAG + 1 - self.chunk.len()) as u64;
        let read = (&mut self.inner)
            .take(wanted)
            .read_to_end(&mut self.chunk)?;
        self.read += read as u64;
        let damaged = |_| SeedError::Damaged { at };
        if self.chunk.len() > CHUNK + TAG {
            self.ahead = self.chunk.pop();
            let done = cipher.decrypt_next_in_place(&self.header, &mut self.chunk);
            done.map_err(damaged)?;
            self.cipher = Some(cipher);
        } else {
            let done = cipher.decrypt_last_in_place(&self.header, &mut self.chunk);
            done.map_err(damaged)?;
        }
        Ok(!self.chunk.is_empty())
    }
}
