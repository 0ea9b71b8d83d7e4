//! Farhaven
pub mod activate;
pub mod guest;
pub mod replicate;
pub mod site;
