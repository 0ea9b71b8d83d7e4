//! Units to batches and back.
//!
//! [`Encoder`] turns changed units into zeros, references to content that the
//! peer holds already ([`DedupIndex`]), and literals, which are compressed in
//! groups of 64. [`BatchView`] is the way back, and trusts nothing. A
//! difference from an older version of the unit will be a fourth kind: its
//! place in the format is kept, and this version refuses it by name.

mod batch;
mod chain;
mod compress;
mod dedup;
mod encode;
mod entry;
pub(crate) mod varint;

pub use batch::{Batch, BatchError, BatchHeader, BatchView, EntriesView, MAGIC, VERSION};
pub use chain::Chain;
pub use compress::{Codec, Expander};
pub use dedup::DedupIndex;
pub use encode::{EncodeError, Encoder, Sequence};
pub use entry::{Content, Entry, EntryError, EntryReader};
