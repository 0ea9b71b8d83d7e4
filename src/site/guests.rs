//! What a site does with QEMU guests outside of their drivers, all blocking:
//! define, check, attach, stop, resume; and pruning of a peer's store.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use farhaven_policies::retain::{self, Point};
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::unit::GuestId;

use super::Site;
use super::records::GuestRecord;
use super::remote::Remote;
use super::standby::Standby;
use crate::guest::qemu::attach::{AttachOptions, QemuGuest};
use crate::guest::qemu::check::{self, Finding, PeerFacts};
use crate::guest::qemu::definition::{Definition, DefinitionError};
use crate::guest::qemu::qmp::{Qmp, QmpError};
use crate::guest::{Guest, GuestError};
use crate::replicate::message::Message;

/// QEMU answers in this time, or counts as stuck.
const QMP_PATIENCE: Duration = Duration::from_secs(10);

/// A peer's store is pruned only when this many of its points are past their time.
const WORTH_PRUNING: usize = 4;

/// Reads a running QEMU's definition.
pub(super) fn define(qmp: &Path) -> Result<Definition, DefinitionError> {
    let mut qmp = Qmp::connect(qmp, QMP_PATIENCE)?;
    Definition::read(&mut qmp)
}

/// The local part of a guest's check. While the guest is protected our own
/// driver holds its QMP socket, and the definition has to do.
pub(super) fn check(record: &GuestRecord, attached: bool) -> Result<Vec<Finding>, DefinitionError> {
    if attached {
        return Ok(check::check_definition(&record.definition));
    }
    let mut qmp = Qmp::connect(&record.qmp, QMP_PATIENCE)?;
    Ok(check::check(&record.definition, &mut qmp))
}

/// The peer's part of a guest's check.
pub(super) async fn check_at_peer(record: &GuestRecord, remote: &Remote) -> Vec<Finding> {
    let question = Message::Facts { definition: record.definition.clone() };
    match remote.ask(question).await {
        Ok(Message::FactsKnown { facts }) => check::check_peer(&record.definition, &facts),
        Ok(_) => vec![Finding::warning(
            "peer-answer",
            format!("site '{}' gave no proper answer", remote.record.site),
            "Run the same version of Farhaven at both sites.".to_owned(),
        )],
        Err(error) => vec![Finding::warning(
            "peer-unreachable",
            format!("site '{}' could not be asked: {error}", remote.record.site),
            "Bring the link up and check again; protection begins when it is up.".to_owned(),
        )],
    }
}

impl Site {
    /// Attaches to a guest's QEMU.
    pub(super) fn attach(
        &self,
        record: &GuestRecord,
        key: DigestKey,
        threads: usize,
    ) -> Result<Box<dyn Guest>, GuestError> {
        let ram = record
            .definition
            .ram
            .iter()
            .filter_map(|block| Some((block.id.clone(), block.path.clone()?)))
            .collect();
        let disks =
            record.definition.disks.iter().map(|d| (d.name.clone(), d.node.clone())).collect();
        let options = AttachOptions {
            name: record.name.clone(),
            qmp: record.qmp.clone(),
            ram,
            disks,
            work_dir: self.run_directory(record.id),
            key,
            scan_threads: threads.min(8),
        };
        Ok(Box::new(QemuGuest::attach(options)?))
    }

    /// Stops a guest that nobody is attached to; one that is gone is stopped.
    pub(super) fn stop_guest(&self, record: &GuestRecord) -> Result<(), QmpError> {
        match Qmp::connect(&record.qmp, QMP_PATIENCE) {
            Ok(mut qmp) => qmp.execute("stop", serde_json::json!({})).map(|_| ()),
            Err(QmpError::Connect { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Lets a held guest that nobody is attached to run on.
    pub(super) fn resume_guest(&self, record: &GuestRecord) -> Result<(), GuestError> {
        let mut guest = self.attach(record, self.tracking_key, 1)?;
        guest.resume()
    }

    /// Ends a held guest that nobody is attached to; one that is gone has ended.
    pub(super) fn let_guest_go(&self, record: &GuestRecord) -> Result<(), GuestError> {
        match self.attach(record, self.tracking_key, 1) {
            Ok(mut guest) => guest.let_go(),
            Err(GuestError::Qmp(QmpError::Connect { .. })) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// What is here for a guest of a peer.
    pub(super) async fn peer_facts(self: &Arc<Self>, definition: &Definition) -> PeerFacts {
        let (site, definition) = (self.clone(), definition.clone());
        tokio::task::spawn_blocking(move || {
            check::peer_facts(
                &definition,
                &site.config.activate.qemu,
                &site.config.ram_dir(),
                &site.config.store_dir(),
                site.node.socket_buffers(),
            )
        })
        .await
        .unwrap_or_default()
    }
}

/// Drops the points past their time that a peer sent, in two steps: the peer
/// forgets what is about to go, then it goes.
pub(super) async fn prune_store(remote: &Remote, standbys: &[Arc<Standby>]) -> Result<(), String> {
    let mut keep: Vec<(GuestId, Vec<u64>)> = Vec::new();
    let mut past = 0;
    for standby in standbys {
        let opening = standby.opening();
        let in_use = standby.active().filter(|a| !a.hydrated).map(|a| a.point);
        let headers = standby.points();
        let newest = headers.last().map(|p| p.point);
        let points: Vec<Point> = headers
            .iter()
            .map(|p| Point {
                number: p.point,
                cut_at: SystemTime::UNIX_EPOCH + Duration::from_nanos(p.cut_at_unix_ns),
                in_use: in_use == Some(p.point) || newest == Some(p.point),
            })
            .collect();
        let verdicts = retain::retain(&opening.retention, &points, SystemTime::now());
        past += verdicts.iter().filter(|v| !v.keep).count();
        keep.push((
            opening.guest,
            verdicts.iter().filter(|v| v.keep).map(|v| v.number).collect(),
        ));
    }
    if past < WORTH_PRUNING {
        return Ok(());
    }
    let store = remote.incoming.store.clone();
    let planned = {
        let store = store.clone();
        tokio::task::spawn_blocking(move || store.plan_prune(&keep)).await
    };
    let plan = planned.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    if remote.connected() {
        // A source that cannot be reached now learns what is here when it comes back.
        let retire = Message::Retire { seqs: plan.retired_ranges() };
        remote.ask_within(retire, Duration::from_secs(120)).await.map_err(|e| e.to_string())?;
    } else {
        return Ok(());
    }
    let done = tokio::task::spawn_blocking(move || store.perform_prune(plan)).await;
    let report = done.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    tracing::info!(
        peer = %remote.record.site,
        points = report.points,
        freed_bytes = report.freed_bytes,
        "old points were pruned"
    );
    Ok(())
}
