//! The tables of the catalogue.

/// What rows are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Table {
    /// This site itself.
    Site = 1,
    /// Sites this one is paired with.
    Peers = 2,
    /// Guests that run or ran here.
    Guests = 3,
    /// Protection groups.
    Groups = 4,
    /// What is protected to where, and how.
    Protections = 5,
    /// Headers of recovery points.
    Points = 6,
    /// Points that were brought to life here.
    Activations = 7,
    /// What peers tell of their guests.
    Remote = 8,
    /// Copies of guests that were stopped for good, and are kept.
    Evidence = 9,
}

impl Table {
    /// All of them.
    pub const ALL: [Table; 9] = [
        Table::Site,
        Table::Peers,
        Table::Guests,
        Table::Groups,
        Table::Protections,
        Table::Points,
        Table::Activations,
        Table::Remote,
        Table::Evidence,
    ];

    pub(super) fn from_number(number: u8) -> Option<Table> {
        Table::ALL.into_iter().find(|&table| table as u8 == number)
    }

    pub(super) fn row(self, key: &str) -> Vec<u8> {
        let mut row = vec![self as u8];
        row.extend_from_slice(key.as_bytes());
        row
    }
}
