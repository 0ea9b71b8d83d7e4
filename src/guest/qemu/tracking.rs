//! What is known to be at the peer, and how that is taken back.
//!
//! RAM: the units handed over in each round and cut, kept until a point that
//! holds them is sealed. Disks: a chain of QEMU's dirty bitmaps, one a cut.
//! `farhaven-REPLICA-P` has what changed since cut P until the cut after it; all
//! but the last are disabled. The union of the bitmaps from P on is what
//! changed since P, so a point that is not sealed costs nothing but that union,
//! and after a daemon's restart the bitmaps still tell.

use serde_json::{Value, json};

use super::super::GuestError;
use super::qmp::Qmp;

/// Everything of ours in a QEMU is named so.
pub(super) const PREFIX: &str = "farhaven-";

/// A set of units.
#[derive(Clone, Default)]
pub(super) struct Bits(Vec<u64>);

impl Bits {
    pub(super) fn new(units: usize) -> Self {
        Self(vec![0; units.div_ceil(64)])
    }

    pub(super) fn set(&mut self, unit: usize) {
        if let Some(word) = self.0.get_mut(unit / 64) {
            *word |= 1 << (unit % 64);
        }
    }

    pub(super) fn clear(&mut self) {
        self.0.fill(0);
    }

    pub(super) fn add(&mut self, other: &Bits) {
        for (word, more) in self.0.iter_mut().zip(&other.0) {
            *word |= more;
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = usize> {
        self.0.iter().enumerate().flat_map(|(i, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                let bit = left.trailing_zeros() as usize;
                left &= left.wrapping_sub(1);
                (bit < 64).then_some(i * 64 + bit)
            })
        })
    }
}

/// A dirty bitmap as QEMU lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bitmap {
    pub(super) name: String,
    pub(super) usable: bool,
    pub(super) recording: bool,
}

/// A block node as QEMU lists it.
pub(super) struct Node {
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) bitmaps: Vec<Bitmap>,
}

/// All named nodes.
pub(super) fn nodes(qmp: &mut Qmp) -> Result<Vec<Node>, GuestError> {
    let listed = qmp.execute("query-named-block-nodes", json!({"flat": true}))?;
    Ok(listed
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default()
        .iter()
        .filter_map(node)
        .collect())
}

fn node(listed: &Value) -> Option<Node> {
    let bitmaps = listed["dirty-bitmaps"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    Some(Node {
        name: listed["node-name"].as_str()?.to_owned(),
        bytes: listed["image"]["virtual-size"].as_u64()?,
        bitmaps: bitmaps
            .iter()
            .filter_map(|b| {
                let flag = |name: &str| b[name].as_bool().unwrap_or(false);
                Some(Bitmap {
                    name: b["name"].as_str()?.to_owned(),
                    usable: !flag("inconsistent") && !flag("busy"),
                    recording: flag("recording"),
                })
            })
            .collect(),
    })
}

/// The nodes that the guest's devices write to.
pub(super) fn written(qmp: &mut Qmp) -> Result<Vec<String>, GuestError> {
    let listed = qmp.execute("query-block", json!({}))?;
    let devices = listed.as_array().map(Vec::as_slice).unwrap_or_default();
    let node = |device: &Value| Some(device["inserted"]["node-name"].as_str()?.to_owned());
    Ok(devices.iter().filter_map(node).collect())
}

/// The bitmaps of one disk, oldest first; the last is recording.
pub(super) struct Chain {
    node: String,
    replica: String,
    /// Granularity in bytes.
    grain: u64,
    links: Vec<Link>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Link {
    name: String,
    /// `None`: since tracking began, before any point.
    point: Option<u64>,
}

/// More unsealed cuts than this are folded into one.
const LONGEST: usize = 32;

impl Chain {
    pub(super) fn new(node: &str, replica: &str, disk_bytes: u64) -> Self {
        let grain = if disk_bytes <= 256 << 30 { 4096 } else { 65536 };
        Self {
            node: node.to_owned(),
            replica: replica.to_owned(),
            grain,
            links: Vec::new(),
        }
    }

    /// Name of the bitmap that records now.
    pub(super) fn recording(&self) -> Option<&str> {
        self.links.last().map(|l| l.name.as_str())
    }

    fn name(&self, point: Option<u64>) -> String {
        match point {
            Some(point) => format!("{PREFIX}{}-{point}", self.replica),
            None => format!("{PREFIX}{}-begin", self.replica),
        }
    }

    fn point_of(&self, name: &str) -> Option<u64> {
        let rest = name
            .strip_prefix(PREFIX)?
            .strip_prefix(&self.replica)?
            .strip_prefix('-')?;
        rest.parse().ok()
    }

    fn action(&self, kind: &str, name: &str) -> Value {
        json!({"type": kind, "data": {"node": self.node, "name": name}})
    }

    fn add_action(&self, name: &str) -> Value {
        json!({"type": "block-dirty-bitmap-add", "data": {
            "node": self.node, "name": name, "persistent": false, "granularity": self.grain}})
    }

    /// Starts recording, before anything is read. Bitmaps of earlier sessions go.
    pub(super) fn begin(&mut self, qmp: &mut Qmp, present: &[Bitmap]) -> Result<(), GuestError> {
        if self.links.is_empty() {
            self.adopt(qmp, present, u64::MAX)?;
            let link = Link {
                name: self.name(None),
                point: None,
            };
            transaction(qmp, vec![self.add_action(&link.name)])?;
            self.links = vec![link];
        }
        Ok(())
    }

    /// Takes up the bitmaps that an earlier session left, if they tell what
    /// changed since `point`; all others are removed.
    pub(super) fn adopt(
        &mut self,
        qmp: &mut Qmp,
        present: &[Bitmap],
        point: u64,
    ) -> Result<bool, GuestError> {
        let mut links: Vec<Link> = present
            .iter()
            .filter(|b| b.usable)
            .filter_map(|b| {
                Some(Link {
                    name: b.name.clone(),
                    point: Some(self.point_of(&b.name)?),
                })
            })
            .filter(|l| l.point >= Some(point))
            .collect();
        links.sort_by_key(|l| l.point);
        // One that cannot be used breaks the chain of what came after it.
        let broken = present
            .iter()
            .any(|b| !b.usable && self.point_of(&b.name).is_some_and(|p| p >= point));
        if broken || links.first().and_then(|l| l.point) != Some(point) {
            links.clear();
        }
        let stale: Vec<Value> = present
            .iter()
            .filter(|b| b.name.starts_with(PREFIX) && !links.iter().any(|l| l.name == b.name))
            .map(|b| self.action("block-dirty-bitmap-remove", &b.name))
            .collect();
        transaction(qmp, stale)?;
        self.links = links;
        self.collapse(qmp)?;
        Ok(!self.links.is_empty())
    }

    /// The transaction's part that ends one interval and begins the next.
    pub(super) fn cut_actions(&self, point: u64) -> Vec<Value> {
        let mut actions = vec![self.add_action(&self.name(Some(point)))];
        if let Some(recording) = self.recording() {
            actions.push(self.action("block-dirty-bitmap-disable", recording));
        }
        actions
    }

    /// The transaction went through.
    pub(super) fn cut(&mut self, point: u64) {
        let link = Link {
            name: self.name(Some(point)),
            point: Some(point),
        };
        self.links.push(link);
    }

    /// Has this cut's interval begun?
    pub(super) fn ends_with(&self, point: u64) -> bool {
        self.links.len() > 1 && self.links.last().and_then(|l| l.point) == Some(point)
    }

    /// Name of the bitmap with what changed up to the newest cut.
    pub(super) fn changed(&self) -> Option<&str> {
        let before = self.links.len().checked_sub(2)?;
        self.links.get(before).map(|l| l.name.as_str())
    }

    /// Undoes the newest cut: what changed since it counts with what changed before it.
    pub(super) fn undo(&mut self, qmp: &mut Qmp) -> Result<(), GuestError> {
        self.fold(qmp, self.links.len().saturating_sub(2))
    }

    /// Everything since the oldest point counts as one change.
    pub(super) fn collapse(&mut self, qmp: &mut Qmp) -> Result<(), GuestError> {
        self.fold(qmp, 0)
    }

    /// Merges all links after `keep` into it, which then records. One
    /// transaction: there is no moment at which a write could be lost.
    fn fold(&mut self, qmp: &mut Qmp, keep: usize) -> Result<(), GuestError> {
        let Some(kept) = self.links.get(keep) else {
            return Ok(());
        };
        let rest = &self.links[keep + 1..];
        if rest.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = rest.iter().map(|l| l.name.as_str()).collect();
        let mut actions = vec![
            self.action("block-dirty-bitmap-enable", &kept.name),
            json!({"type": "block-dirty-bitmap-merge", "data": {
                "node": self.node, "target": kept.name, "bitmaps": names}}),
        ];
        actions.extend(
            names
                .iter()
                .map(|n| self.action("block-dirty-bitmap-remove", n)),
        );
        transaction(qmp, actions)?;
        self.links.truncate(keep + 1);
        Ok(())
    }

    /// `point` is sealed: what changed before it needs no memory any more.
    /// Returns whether it was known.
    pub(super) fn sealed(&mut self, qmp: &mut Qmp, point: u64) -> Result<bool, GuestError> {
        let Some(at) = self.links.iter().position(|l| l.point == Some(point)) else {
            return Ok(false);
        };
        let old: Vec<Value> = self.links[..at]
            .iter()
            .map(|l| self.action("block-dirty-bitmap-remove", &l.name))
            .collect();
        transaction(qmp, old)?;
        self.links.drain(..at);
        Ok(true)
    }

    /// Keeps the chain short when points are cut but never sealed: the oldest
    /// intervals become one, which over-reports and loses nothing.
    pub(super) fn shorten(&mut self, qmp: &mut Qmp) -> Result<(), GuestError> {
        if self.links.len() <= LONGEST {
            return Ok(());
        }
        let (oldest, second) = (&self.links[0].name, &self.links[1].name);
        let merge = json!({"type": "block-dirty-bitmap-merge", "data": {
            "node": self.node, "target": oldest, "bitmaps": [second]}});
        transaction(
            qmp,
            vec![merge, self.action("block-dirty-bitmap-remove", second)],
        )?;
        self.links.remove(1);
        Ok(())
    }

    /// Removes every bitmap of ours.
    pub(super) fn remove(&mut self, qmp: &mut Qmp) -> Result<(), GuestError> {
        let all = self
            .links
            .iter()
            .map(|l| self.action("block-dirty-bitmap-remove", &l.name))
            .collect();
        transaction(qmp, all)?;
        self.links.clear();
        Ok(())
    }
}

/// All of `actions`, or none.
pub(super) fn transaction(qmp: &mut Qmp, actions: Vec<Value>) -> Result<(), GuestError> {
    if !actions.is_empty() {
        qmp.execute("transaction", json!({"actions": actions}))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_iterate_in_order() {
        let mut bits = Bits::new(200);
        for unit in [0, 63, 64, 130, 199] {
            bits.set(unit);
        }
        bits.set(100_000);
        assert_eq!(bits.iter().collect::<Vec<_>>(), [0, 63, 64, 130, 199]);
        let mut more = Bits::new(200);
        more.set(7);
        more.add(&bits);
        assert_eq!(more.iter().count(), 6);
        more.clear();
        assert_eq!(more.iter().next(), None);
    }

    #[test]
    fn only_bitmaps_of_this_replica_are_read_as_points() {
        let chain = Chain::new("disk0", "ab12", 1 << 30);
        assert_eq!(chain.point_of("farhaven-ab12-7"), Some(7));
        assert_eq!(chain.point_of("farhaven-ab12-begin"), None);
        assert_eq!(chain.point_of("farhaven-cd34-7"), None);
        assert_eq!(chain.grain, 4096);
        assert_eq!(Chain::new("d", "r", 1 << 40).grain, 65536);
    }
}
