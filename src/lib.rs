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
//!
//! # A guest of your own program
//!
//! A Rust monitor protects its guest by being a [`guest::embedded::Vmm`]; for
//! one over KVM that is [`guest::kvm::KvmVmm`], and `examples/embed_kvm.rs` is a
//! whole one. Here the guest is the simulated one, which runs anywhere, and two
//! sites are in one process:
//!
//! ```
//! use std::{net::UdpSocket, path::Path, sync::Arc, time::Duration};
//!
//! use farhaven::guest::sim::{SimGuest, SimOptions, Workload};
//! use farhaven::site::Site;
//! use farhaven_policies::site::SiteConfig;
//!
//! type Failure = Box<dyn std::error::Error + Send + Sync>;
//!
//! async fn site(home: &Path, name: &str) -> Result<Arc<Site>, Failure> {
//!     let mut config = SiteConfig::default();
//!     config.site.name = name.to_owned();
//!     config.site.state_dir = home.join(name);
//!     config.activate.ram_dir = home.join(name).join("ram");
//!     config.store.min_free = farhaven_policies::units::ByteSize::from_mib(1);
//!     config.listen.address = UdpSocket::bind("127.0.0.1:0")?.local_addr()?;
//!     config.listen.advertise = vec![config.listen.address.to_string()];
//!     Ok(Site::start(config).await?)
//! }
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Failure> {
//!     let home = tempfile::tempdir()?;
//!     let (east, west) = (site(home.path(), "east").await?, site(home.path(), "west").await?);
//!     east.pair(&west.invite(Duration::from_secs(60))?).await?;
//!
//!     // Any monitor in this process, with how a peer builds the same machine.
//!     let (guest, definition) = SimGuest::start(SimOptions {
//!         seed: 1,
//!         ram_bytes: 8 << 20,
//!         disks: vec![("disk".to_owned(), 8 << 20)],
//!         workload: Workload::Idle,
//!         run: home.path().join("guest"),
//!         ram: home.path().join("guest.ram"),
//!     })?;
//!     east.embed("web", guest, definition)?;
//!     east.protect("web", "west", Some("1s".parse()?)).await?;
//!     while west.view().standbys.iter().all(|guest| guest.newest_point == 0) {
//!         tokio::time::sleep(Duration::from_millis(20)).await;
//!     }
//!     // From here on nothing older than a second is lost with east. A planned
//!     // move loses nothing at all:
//!     let report = east.move_guest("web", false).await?;
//!     println!("it runs at {}; stopped for {} ms", report.to, report.blackout_ms);
//!     # west.end_guest("web").await?;
//!     east.shutdown().await;
//!     west.shutdown().await;
//!     Ok(())
//! }
//! ```

#![deny(missing_docs)]

pub mod activate;
pub mod call;
pub mod capture;
pub mod cli;
pub mod client;
pub mod demo;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod guest;
mod program;
pub mod replicate;
pub mod runbook;
pub mod site;
pub mod work;
