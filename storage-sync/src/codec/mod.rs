//! Units to batches and back.
//!
//! [`Encoder`] turns changed units into zeros, references to content that the
//! peer holds already ([`DedupIndex`]), and literals, which are compressed in
//! groups of 64; a unit that changed little is told as a difference from a
//! version that the peer holds ([`Bases`]). [`BatchView`] is the way back, and
//! trusts nothing. [`LevelControl`] fits the compression to the link.

mod bases;
mod batch;
mod body;
mod chain;
mod compress;
mod dedup;
pub mod delta;
mod encode;
mod entry;
mod group;
mod level;
mod pack;
mod sequence;
pub(crate) mod varint;
mod view;

pub use bases::Bases;
pub(crate) use batch::hash_of;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use batch::lay_out;
pub use batch::{Batch, BatchError, BatchHeader, MAGIC, VERSION};
pub use body::{Body, Slot};
pub use chain::Chain;
pub use compress::{Codec, Expander};
pub use dedup::DedupIndex;
pub use encode::{EncodeError, Encoder};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use entry::EntryWriter;
pub use entry::{Content, Delta, Entry, EntryError, EntryReader};
pub use level::{LEVEL, LEVELS, LevelControl, Measured};
pub use pack::Crew;
pub use sequence::Sequence;
pub(crate) use view::newer;
pub use view::{BatchView, EntriesView};
