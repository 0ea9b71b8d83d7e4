//! Farhaven: cross-datacenter disaster recovery for running KVM virtual machines.
//!
//! Memory, device state and disks of a protected guest are copied all the time
//! to a paired site; every few seconds a recovery point is sealed there: one
//! instant of everything. The guest can run there from its very last
//! instruction (a planned move) or from the last sealed point (a failover).
//!
//! Data goes one way: [`guest`] → [`capture`] → [`replicate::send`] ⇒ the link
//! ⇒ [`replicate::receive`] → the store → [`activate`]. The daemon around it is
//! [`site`]; the command line is [`cli`], which speaks to it through [`client`].

pub mod activate;
pub mod capture;
pub mod cli;
pub mod client;
pub mod demo;
pub mod guest;
pub mod replicate;
pub mod site;
