//! Full batches become bytes: on the encoder's own thread, or beside it.
//!
//! Finding out what a unit is (known, changed a little, new) must go on one after
//! another; compressing need not. A [`Crew`] compresses several batches at a time
//! while the encoder fills the next. They come back in the order of their numbers.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use zstd::bulk::Compressor;

use crate::codec::batch::{self, Batch, BatchHeader};
use crate::codec::compress::Probe;
use crate::codec::encode::EncodeError;
use crate::codec::group::Group;
use crate::unit::GuestId;

/// Most threads of a crew: beyond these the thread that fills batches holds things up.
const MOST: usize = 4;

/// A batch that takes no more units, not compressed yet.
pub(crate) struct Full {
    pub(crate) seq: u64,
    pub(crate) guest: GuestId,
    pub(crate) point: u64,
    pub(crate) level: i32,
    pub(crate) entries: (usize, Vec<u8>),
    pub(crate) group: Group,
    pub(crate) images: bool,
    pub(crate) units: u64,
}

/// The same, ready to leave.
pub(crate) struct Done {
    pub(crate) batch: Batch,
    /// Its units are still there.
    pub(crate) group: Group,
    /// CPU time that it took: on a busy machine much less than passed.
    pub(crate) took: Duration,
}

/// What packing needs.
pub(crate) struct Tools {
    compressor: Compressor<'static>,
    level: i32,
    probe: Probe,
}

impl Tools {
    pub(crate) fn new(level: i32) -> Result<Tools, EncodeError> {
        Ok(Tools {
            compressor: Compressor::new(level).map_err(EncodeError::Compressor)?,
            level,
            probe: Probe::new(),
        })
    }

    pub(crate) fn pack(&mut self, full: Full) -> Done {
        let begun = cpu_time();
        if self.level != full.level && self.compressor.set_compression_level(full.level).is_ok() {
            self.level = full.level;
        }
        let Full {
            seq,
            guest,
            point,
            entries,
            mut group,
            images,
            units,
            ..
        } = full;
        let packed = group.pack(seq, entries, &mut self.compressor, &mut self.probe);
        let literals = group.slots();
        let header = BatchHeader {
            seq,
            guest,
            point,
            entries_bytes: packed.entries.len(),
            entries: packed.count,
            literals,
            deltas: packed.deltas > 0,
            images,
            body_raw: packed.raw,
            codec: packed.codec,
            body_stored: group.packed().len(),
            body_hash: [0; 32],
            hash: [0; 32],
        };
        let (bytes, hash) = batch::lay_out(header, &packed.entries, group.packed());
        Done {
            batch: Batch {
                seq,
                bytes,
                hash,
                point,
                literals,
                deltas: packed.deltas,
                units,
            },
            group,
            took: cpu_time().saturating_sub(begun),
        }
    }
}

/// CPU time of this thread.
fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(now).unwrap_or_default()
}

/// Threads that compress batches for all encoders of a pair of sites.
pub struct Crew {
    threads: rayon::ThreadPool,
    tools: Arc<Mutex<Vec<Tools>>>,
}

impl Crew {
    /// As many threads as there are cores, at most four.
    ///
    /// # Errors
    /// When there are no threads or no memory for them.
    pub fn new() -> Result<Crew, EncodeError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Crew::of(cores.min(MOST))
    }

    /// A crew of `size` threads, at least one.
    ///
    /// # Errors
    /// As [`Crew::new`].
    pub fn of(size: usize) -> Result<Crew, EncodeError> {
        let size = size.max(1);
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(size)
            .thread_name(|number| format!("pack-{number}"))
            .build()
            .map_err(|error| EncodeError::Compressor(std::io::Error::other(error)))?;
        let tools: Result<Vec<Tools>, EncodeError> = (0..size)
            .map(|_| Tools::new(crate::codec::level::LEVEL))
            .collect();
        Ok(Crew {
            threads,
            tools: Arc::new(Mutex::new(tools?)),
        })
    }

    /// Threads.
    pub fn size(&self) -> usize {
        self.threads.current_num_threads()
    }

    pub(crate) fn pack(&self, full: Full) -> Packing {
        let (send, receive) = sync_channel(1);
        let tools = self.tools.clone();
        self.threads.spawn(move || {
            let packed = catch_unwind(AssertUnwindSafe(|| {
                let held = || tools.lock().unwrap_or_else(PoisonError::into_inner);
                let taken = held().pop();
                // One of each thread's own lies there, unless a panic took it.
                let mut own = match taken {
                    Some(own) => own,
                    None => match Tools::new(full.level) {
                        Ok(made) => made,
                        Err(error) => resume_unwind(Box::new(error.to_string())),
                    },
                };
                let done = own.pack(full);
                held().push(own);
                done
            }));
            // An encoder that went away wants nothing of it.
            let _ = send.send(packed);
        });
        Packing::Beside(receive)
    }
}

impl std::fmt::Debug for Crew {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Crew({})", self.size())
    }
}

/// A batch that is being packed, or is.
pub(crate) enum Packing {
    Here(Box<Done>),
    Beside(Receiver<Result<Done, Box<dyn Any + Send>>>),
}

impl Packing {
    /// Waits for it. A panic of the thread that packed goes on here.
    pub(crate) fn wait(self) -> Done {
        match self {
            Packing::Here(done) => *done,
            Packing::Beside(receive) => match receive.recv() {
                Ok(Ok(done)) => done,
                Ok(Err(panic)) => resume_unwind(panic),
                Err(_) => resume_unwind(Box::new("the threads that pack batches are gone")),
            },
        }
    }
}
