//! Two whole sites in virtual time, from one seed.
//!
//! What runs is the daemon's own code, [`farhaven::site::Site`], with all below
//! it: drivers, hand-overs, fences, replication, QUIC, stores. What is simulated
//! is what it stands on: [`system`] (time and chance), [`fibers`] (threads),
//! [`network`], the disk of the stores, and [`guest`]s. [`world`] holds the
//! sites and lets them take turns; [`operators`] order things at bad moments;
//! [`room`] and [`checks`] see all of it and say when a promise broke.
//!
//! A run has a process of its own: see [`children`].

mod awaits;
mod books;
mod checks;
pub mod children;
mod deaths;
mod fibers;
mod files;
mod guest;
mod memory;
mod network;
mod operators;
mod orders;
mod place;
mod room;
mod story;
mod system;
mod terms;
mod world;

use serde::{Deserialize, Serialize};

/// What is broken on purpose, to see that it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// A disk says that all is synced, and loses the last seconds with the power.
    Sync,
    /// Small files and directories are said to be synced, and are not.
    Files,
    /// A site's terms are lost when its daemon ends.
    Terms,
    /// A guest's dirty log forgets a page.
    Dirty,
    /// A monitor says that its guest is stopped while it runs on.
    Stop,
    /// A daemon never frees what comes over the network, and keeps it a hundred times.
    Memory,
}

/// What to run.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Options {
    /// All of it follows from this.
    pub seed: u64,
    /// Only cuts of the link, restarts and promotions, closer together.
    pub partitions: bool,
    /// Runs of runbooks, evacuations, and guests that do not stop, too.
    #[serde(default)]
    pub operations: bool,
    /// The catalogue of a site that dies is gone now and then.
    #[serde(default)]
    pub catalogues: bool,
    /// Sites die in the midst of their work, too: at syncs of small files, at changes of
    /// their stores' disk, and where their tasks wait for something.
    #[serde(default)]
    pub within: bool,
    /// Time goes faster at one site than at the other.
    #[serde(default)]
    pub clocks: bool,
    /// What is broken on purpose.
    pub fault: Option<Fault>,
    /// Tell what happens, as it does.
    pub trace: bool,
}

impl Options {
    /// The command that runs this again, and tells what happens.
    pub fn replay(&self) -> String {
        let mut command = format!(
            "cargo run --release --example simulate -- --seeds 1 --from {} --trace",
            self.seed
        );
        if self.partitions {
            command.push_str(" --partitions");
        }
        if self.operations {
            command.push_str(" --operations");
        }
        if self.catalogues {
            command.push_str(" --catalogues");
        }
        if self.within {
            command.push_str(" --within");
        }
        if self.clocks {
            command.push_str(" --clocks");
        }
        if let Some(fault) = self.fault {
            let name = serde_json::to_value(fault).unwrap();
            command.push_str(&format!(" --break {}", name.as_str().unwrap()));
        }
        command
    }
}

/// A promise that did not hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Broken {
    /// Its number in docs/reliability.md.
    pub promise: u8,
    pub why: String,
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ran {
    pub seed: u64,
    pub broken: Option<Broken>,
    /// A digest of all that was seen, datagram by datagram: the same for the same seed.
    pub digest: String,
    pub counts: Counts,
}

macro_rules! counts {
    ($($(#[$about:meta])* $name:ident),* ; most $($(#[$about_most:meta])* $most:ident),*) => {
        /// What was counted in a run, or in many.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct Counts { $($(#[$about])* pub $name: u64,)* $($(#[$about_most])* pub $most: u64),* }

        impl Counts {
            /// Adds those of another run; of the most, the greater one.
            pub fn add(&mut self, other: &Counts) {
                $(self.$name += other.$name;)*
                $(self.$most = self.$most.max(other.$most);)*
            }
        }
    };
}

counts! {
    /// Virtual time, in seconds.
    virtual_s,
    kills,
    power_cuts,
    /// Of those two, after how many a site's catalogue was gone.
    catalogues_lost,
    /// Of those two, how many in the midst of a piece of work, and how many at a place of
    /// its own between two, where tasks wait.
    kills_within,
    kills_between,
    link_cuts,
    orders,
    orders_done,
    /// Points that sources were told to be sealed.
    points,
    /// Points read back and compared with their instants.
    points_read,
    /// Guests brought to life and compared with their instants.
    restored,
    /// Times a guest was started or let go on.
    starts,
    /// Times that a guest ran at both sites because a person failed it over, or
    /// took it back, against a site that was not heard: until both spoke again.
    excused_overlaps,
    datagrams,
    datagrams_dropped,
    batch_bytes,
    repeated_bytes;
    most
    /// Bytes of memory that a site's daemon held.
    memory
}
