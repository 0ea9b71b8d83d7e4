//! Where each value of a configuration comes from.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::mistake::Origin;

/// What was loaded, and where each value comes from.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    /// What is in force.
    pub value: T,
    /// Where from.
    pub origins: Origins,
}

/// Where each value that was given comes from.
#[derive(Debug, Clone, Default)]
pub struct Origins {
    keys: BTreeMap<String, Origin>,
    tables: HashMap<String, Origin>,
    fallback: Option<Origin>,
    mistaken: BTreeSet<String>,
}

impl Origins {
    /// From each key given, in order, the later one in force; from tables that files name; and
    /// from where to look if nothing else is known.
    pub(super) fn new(
        keys: impl IntoIterator<Item = (String, Origin)>,
        tables: HashMap<String, Origin>,
        fallback: Option<Origin>,
        mistaken: BTreeSet<String>,
    ) -> Origins {
        Origins {
            keys: keys.into_iter().collect(),
            tables,
            fallback,
            mistaken,
        }
    }

    /// Where this key's value was given; `None` if it has its default.
    pub fn of_key(&self, key: &str) -> Option<&Origin> {
        self.keys.get(key)
    }

    /// Whether a file names something by this key, or in it.
    pub fn in_file(&self, key: &str) -> bool {
        self.tables.contains_key(key)
    }

    /// Whether something in this table was left out as mistaken: what the rest of it
    /// seems to say is not what was meant.
    pub fn mistaken_in(&self, table: &str) -> bool {
        let beneath = format!("{table}.");
        let next = self.mistaken.range(beneath.clone()..).next();
        next.is_some_and(|key| key.starts_with(&beneath))
    }

    /// Whether any file was loaded.
    pub fn any_file(&self) -> bool {
        self.fallback.is_some()
    }

    /// Where to look for a key: where it was given, or else the table around it.
    pub(super) fn nearest(&self, key: &str) -> Origin {
        let mut around = key;
        loop {
            let found = self.keys.get(around).or_else(|| self.tables.get(around));
            if let Some(origin) = found {
                return origin.clone();
            }
            // No file names it, so what does is a variable or a flag beneath it.
            let beneath = format!("{around}.");
            let next = self.keys.range(beneath.clone()..).next();
            if let Some((_, origin)) = next.filter(|(key, _)| key.starts_with(&beneath)) {
                return origin.clone();
            }
            match around.rsplit_once('.') {
                Some((table, _)) => around = table,
                None => return self.fallback.clone().unwrap_or(Origin::Defaults),
            }
        }
    }
}
