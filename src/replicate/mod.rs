//! The two joins of the pipe: [`send`] takes a guest's changes to the peer,
//! [`receive`] takes a peer's batches to the store. They are mirror images and
//! keep one order: open, baseline, data, seal, hand over, end. What they say
//! to each other beside the data is in [`message`]. A first copy may go by another
//! way: [`seed`].

mod ahead;
pub mod asking;
pub mod message;
pub mod outgoing;
pub mod outlet;
pub mod receive;
pub mod seed;
pub mod send;
pub mod totals;
