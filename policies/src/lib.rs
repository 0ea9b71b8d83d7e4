//! Farhaven's policies: what a protection group is owed, what to do next, which
//! points to keep, and a site's configuration.
//!
//! Data passes through it as values: [`load`] reads a [`site::SiteConfig`] from
//! file, environment and flags; its [`policy::Policy`] and measured facts go
//! into [`decide`] and [`retain`], which answer with an action and its reason.
//! Except for [`load::load`], nothing here knows a clock, a file or a guest.

pub mod alert;
pub mod bandwidth;
pub mod decide;
pub mod evacuate;
pub mod files;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod keep;
pub mod load;
mod mistake;
pub mod policy;
pub mod retain;
pub mod runbook;
pub mod shape;
pub mod site;
pub mod units;
pub mod week;
