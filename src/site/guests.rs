//! What a site does with guests outside of their drivers, all blocking:
//! define, check, attach, stop, resume.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

mod findings;

use farhaven_policies::files::Mode;
use farhaven_storage_sync::catalogue::Table;
use farhaven_storage_sync::digest::DigestKey;
use farhaven_storage_sync::unit::GuestId;

use super::Site;
use super::records::{GuestRecord, Protection};
use super::remote::Remote;
use crate::activate::place;
use crate::guest::qemu::check::{self, Finding};
use crate::guest::qemu::options::Argument;
use crate::guest::qemu::peer::{self, PeerFacts};
use crate::guest::qemu::qmp::{Qmp, QmpError};
use crate::guest::qemu::{self, AttachOptions, QemuGuest, agent, keep_held};
use crate::guest::{Definition, Guest, GuestError, embedded};
use crate::replicate::message::Message;

/// QEMU answers in this time, or counts as stuck.
const QMP_PATIENCE: Duration = Duration::from_secs(10);

/// Sockets should hold at least this much, and twice what the link holds.
const SMALLEST_BUFFER: u64 = 1 << 20;

/// Most findings that a builder's answer carries to the guest's site.
const MOST_FINDINGS: usize = 200;

/// Reads a running QEMU's definition.
pub(super) fn define(qmp: &Path) -> Result<Definition, String> {
    let mut qmp = Qmp::connect(qmp, QMP_PATIENCE).map_err(|e| e.to_string())?;
    let definition = qemu::definition::Definition::read(&mut qmp).map_err(|e| e.to_string())?;
    Ok(definition.into())
}

/// Findings about memory and device state, which a guest that boots at the peer does
/// not take there.
const OF_MEMORY: [&str; 6] = [
    "ram-not-shared",
    "ram-memfd",
    "ram-anonymous",
    "machine-unversioned",
    "cpu-host",
    "migration-blocked",
];

/// Leaves out what does not matter to a guest whose disks alone are copied.
fn that_matter(mut findings: Vec<Finding>, mode: Mode) -> Vec<Finding> {
    if mode == Mode::DiskOnly {
        findings.retain(|finding| !OF_MEMORY.contains(&finding.code.as_str()));
    }
    findings
}

/// Was QEMU told what to do at an event, by a flag of its own or by `-action`?
fn told(arguments: &[Argument], flag: &str, (event, action): (&str, &str)) -> bool {
    arguments.iter().any(|argument| {
        argument.option == flag
            || argument.option == "action" && argument.keys("").value(event) == Some(action)
    })
}

/// The control socket of a QEMU guest.
fn qmp_of(record: &GuestRecord) -> Result<&Path, GuestError> {
    record.qmp.as_deref().ok_or_else(|| {
        GuestError::State(format!(
            "the record of '{0}' names no QMP socket; add it again: farhaven guest remove {0}, then farhaven guest add {0} --qmp PATH",
            record.name
        ))
    })
}

/// What people are told of a guest that has ended with the daemon it was in.
pub(super) fn ended_with_daemon(name: &str) -> String {
    format!(
        "'{name}' ran inside this daemon and ended with it; run it at the peer from its newest point (there: farhaven failover {name} --force), or drop it and its points: farhaven unprotect {name} --discard, farhaven guest remove {name}"
    )
}

/// The local part of a guest's check. While the guest is protected our own
/// driver holds its QMP socket, and the definition has to do.
fn check(site: &Site, record: &GuestRecord, attached: bool) -> Result<Vec<Finding>, GuestError> {
    let Definition::Qemu(definition) = &record.definition else {
        return Ok(site.check_hosted(record));
    };
    let mut findings = check::check(definition);
    if !attached {
        let mut qmp = Qmp::connect(qmp_of(record)?, QMP_PATIENCE)?;
        findings.extend(check::check_live(&mut qmp)?);
        findings.extend(agent::finding(&mut qmp, &definition.arguments)?);
    }
    Ok(findings)
}

/// The peer's part of a guest's check.
pub(super) async fn check_at_peer(record: &GuestRecord, remote: &Remote) -> Vec<Finding> {
    let question = Message::Facts {
        definition: record.definition.clone(),
    };
    match remote.ask(question).await {
        Ok(Message::FactsKnown { facts }) => {
            let mut findings = match &record.definition {
                Definition::Qemu(definition) => peer::check_peer(definition, &facts, 0),
                Definition::Embedded(definition) => {
                    let disks = definition.disks.iter();
                    let disks = disks.fold(0, |sum: u64, (_, b)| sum.saturating_add(*b));
                    let mut findings = facts.findings.clone();
                    findings.extend(peer::check_room(
                        record.definition.ram_bytes(),
                        disks,
                        &facts,
                        0,
                    ));
                    findings
                }
            };
            let wanted = wanted_buffer(remote);
            let site = &remote.record.site;
            findings.extend(peer::check_socket_buffers(
                site,
                facts.socket_buffers,
                wanted,
            ));
            findings.extend(peer::check_socket_buffers(
                "here",
                peer::socket_buffers(),
                wanted,
            ));
            findings
        }
        Ok(_) => vec![Finding::warns(
            "peer-answer",
            format!("site '{}' gave no proper answer", remote.record.site),
            "run the same version of Farhaven at both sites",
        )],
        Err(error) => vec![Finding::warns(
            "peer-unreachable",
            format!("site '{}' could not be asked: {error}", remote.record.site),
            "bring the link up and check again; protection begins when it is up",
        )],
    }
}

/// What would keep its builder at the peer from running such a guest; asked
/// before it is stopped for a move. Nothing is known without an answer.
pub(super) async fn refused_by_builder(record: &GuestRecord, remote: &Remote) -> Vec<Finding> {
    let definition = record.definition.clone();
    match remote.ask(Message::Facts { definition }).await {
        Ok(Message::FactsKnown { facts }) => {
            let mut findings = facts.findings;
            findings.retain(|finding| finding.severity == check::Severity::Blocks);
            findings
        }
        _ => Vec::new(),
    }
}

/// Twice what is on the way at the rate seen, as far as that is known.
fn wanted_buffer(remote: &Remote) -> u64 {
    let link = remote.peer.status();
    link.congestion_window_bytes
        .map_or(SMALLEST_BUFFER, |window| {
            (2 * window).clamp(SMALLEST_BUFFER, 32 << 20)
        })
}

impl Site {
    /// Attaches to a guest.
    pub(super) fn attach(
        &self,
        record: &GuestRecord,
        key: DigestKey,
        threads: usize,
    ) -> Result<Box<dyn Guest>, GuestError> {
        let definition = match &record.definition {
            Definition::Qemu(definition) => definition,
            Definition::Embedded(_) => return self.attach_hosted(record, key),
        };
        let disk_only = self.mode_of(record.id) == Mode::DiskOnly;
        let ram = definition.ram.iter().filter(|_| !disk_only);
        let ram = ram
            .filter_map(|block| Some((block.id.clone(), block.path.clone()?)))
            .collect();
        let disks = definition
            .disks
            .iter()
            .map(|d| (d.name.clone(), d.node.clone()))
            .collect();
        let mut options = AttachOptions::new(
            &record.name,
            qmp_of(record)?.to_owned(),
            self.run_directory(record.id),
            &record.id.to_string(),
            *key.bytes(),
        );
        options.ram = ram;
        options.disk_only = disk_only;
        options.stays = told(&definition.arguments, "no-shutdown", ("shutdown", "pause"));
        options.disks = disks;
        options.agent = agent::port(&definition.arguments);
        options.scan_threads = threads.min(8);
        options.capture_buffer = self.config.protect.capture_buffer.bytes();
        Ok(Box::new(QemuGuest::attach(options)?))
    }

    /// What is copied of a guest of this site, or would be.
    pub(super) fn mode_of(&self, guest: GuestId) -> Mode {
        let protection = self
            .catalogue
            .find::<Protection>(Table::Protections, &guest.to_string());
        if let Ok(Some(protection)) = protection {
            return protection.policy.mode;
        }
        match self.group_of(guest).filter(|group| group.from.is_none()) {
            Some(group) => group.owed.mode,
            None => self.config.protect.mode,
        }
    }

    /// Lets a held guest that nobody is attached to run on.
    pub(super) fn resume_guest(&self, record: &GuestRecord) -> Result<(), GuestError> {
        if record.definition.is_embedded() {
            return self.resume_hosted(record);
        }
        let mut guest = self.attach(record, self.tracking_key.clone(), 1)?;
        // Attaching may have taken a while.
        self.still_ours(record.id)?;
        guest.resume()
    }

    /// May this guest run here by what is known now?
    ///
    /// # Errors
    /// When another site owns it.
    pub(super) fn still_ours(&self, guest: GuestId) -> Result<(), GuestError> {
        let ours = self.fence.may_run(guest, self.key());
        ours.map_err(|error| GuestError::State(error.to_string()))
    }

    /// Ends a held guest that nobody is attached to; one that is gone has ended.
    pub(super) fn let_guest_go(&self, record: &GuestRecord) -> Result<(), GuestError> {
        if record.definition.is_embedded() {
            self.end_hosted(record.id);
            return Ok(());
        }
        // Attaching would let one go on that a dead daemon had left stopped in a cut.
        keep_held(&self.run_directory(record.id))?;
        match self.attach(record, self.tracking_key.clone(), 1) {
            Ok(mut guest) => guest.let_go(),
            Err(GuestError::Qmp(QmpError::Connect { .. })) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// What is here for a guest of a peer.
    pub(super) async fn peer_facts(self: &Arc<Self>, definition: &Definition) -> PeerFacts {
        let (site, definition) = (self.clone(), definition.clone());
        crate::work::spawn_blocking(move || {
            let (ram, store) = (site.config.ram_dir(), site.config.store_dir());
            match &definition {
                Definition::Qemu(definition) => {
                    peer::peer_facts(&site.config.activate.qemu, definition, &ram, &store)
                }
                Definition::Embedded(embedded) => {
                    let mut facts = peer::host_facts(&ram, &store);
                    facts.findings = match definition.unsound() {
                        Some(why) => vec![Finding::blocks(
                            "peer-definition",
                            format!("the peer cannot work with the guest's definition: {why}"),
                            "mend what the guest's monitor tells of it",
                        )],
                        None => site.builder_findings(embedded),
                    };
                    facts
                }
            }
        })
        .await
        .unwrap_or_default()
    }

    /// What the builder of such guests here finds.
    fn builder_findings(&self, definition: &embedded::Definition) -> Vec<Finding> {
        match place::builder(&self.builders, &definition.kind) {
            Ok(builder) => {
                let mut findings = builder.check(definition);
                findings.truncate(MOST_FINDINGS);
                findings
            }
            Err(error) => vec![Finding::blocks("peer-kind", error.what, error.mend)],
        }
    }
}

/// Stops a guest that nobody is attached to; one that is gone is stopped.
pub(super) fn stop_guest(site: &Site, record: &GuestRecord) -> Result<(), GuestError> {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    if record.definition.is_embedded() {
        return site.stop_hosted(record);
    }
    match Qmp::connect(qmp_of(record)?, QMP_PATIENCE) {
        Ok(mut qmp) => {
            qmp.execute("stop", serde_json::json!({}))?;
            Ok(())
        }
        // Any other reason leaves open whether it runs.
        Err(QmpError::Connect { source, .. })
            if matches!(source.kind(), ConnectionRefused | NotFound) =>
        {
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// Does a guest's copy run that nobody is attached to? `None`: it has ended.
pub(super) fn copy_runs(site: &Site, record: &GuestRecord) -> Result<Option<bool>, GuestError> {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    if record.definition.is_embedded() {
        let vmm = site.hosted(record.id);
        return Ok(vmm.and_then(|vmm| super::hosted::lock(&vmm).running()));
    }
    match Qmp::connect(qmp_of(record)?, QMP_PATIENCE) {
        Ok(mut qmp) => {
            let status = qmp.execute("query-status", serde_json::json!({}))?;
            Ok(Some(status["running"] == true))
        }
        Err(QmpError::Connect { source, .. })
            if matches!(source.kind(), ConnectionRefused | NotFound) =>
        {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}
