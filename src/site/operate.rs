//! What operators ask of a site, and what it does by itself in the background.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use farhaven_policies::units::Period;
use farhaven_storage_sync::catalogue::Table;
use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::{Introduction, Invitation, PeerRecord};

use super::driver::Command;
use super::records::PointRecord;
use super::records::{GuestRecord, Protection, StandbyRecord};
use super::remote::Remote;
use super::standby::Standby;
use super::view::{
    FailoverReport, MoveReport, PeerView, Phase, PointView, SiteView, SourceView, TargetView,
};
use super::{Site, age};
use crate::activate::fence::Term;
use crate::guest::qemu::check::{Finding, Severity};
use crate::replicate::message::{Message, Opening};

/// How often points are looked through for those past their time.
const PRUNE_EVERY: Duration = Duration::from_secs(30);

/// How long a failover by force waits for a living source to stop its guest.
const FENCE_WAIT: Duration = Duration::from_secs(3);

/// Why an operator's request was not done.
#[derive(Debug, thiserror::Error)]
pub enum OperateError {
    /// No such thing.
    #[error("{0}")]
    Unknown(String),
    /// It contradicts what is.
    #[error("{0}")]
    Conflict(String),
    /// It went wrong.
    #[error("{0}")]
    Failed(String),
}

fn failed(error: impl ToString) -> OperateError {
    OperateError::Failed(error.to_string())
}

impl Site {
    // ---- sites

    /// An invitation for another site, valid for `valid`.
    ///
    /// # Errors
    /// When no address of this site can be told to peers, or too many
    /// invitations are open.
    pub fn invite(&self, valid: Duration) -> Result<Invitation, OperateError> {
        let valid = valid.clamp(Duration::from_secs(10), Duration::from_secs(7 * 24 * 3600));
        let expires = super::unix_ns(SystemTime::now() + valid) / 1_000_000_000;
        let invitation = Invitation::new(
            &self.config.site.name,
            self.key(),
            self.addresses()?,
            expires,
        )
        .map_err(failed)?;
        self.node.invite(&invitation).map_err(failed)?;
        Ok(invitation)
    }

    /// Where peers reach this site.
    fn addresses(&self) -> Result<Vec<String>, OperateError> {
        let configured = &self.config.listen.advertise;
        if !configured.is_empty() {
            return Ok(configured.clone());
        }
        let listens = self.local_addr();
        if listens.ip().is_unspecified() {
            return Err(OperateError::Conflict(
                "this site listens on every address and does not know which one peers reach; set listen.advertise = [\"HOST:PORT\"] in its configuration, and start it again".to_owned(),
            ));
        }
        Ok(vec![listens.to_string()])
    }

    fn introduction(&self) -> Result<Introduction, OperateError> {
        // The side that accepts an invitation dials; it need not be reachable itself.
        let addresses = self.addresses().unwrap_or_default();
        Introduction::new(self.config.site.name.clone(), addresses).map_err(failed)
    }

    /// Accepts another site's invitation: both pin each other's key.
    ///
    /// # Errors
    /// When the invitation is not valid, or its site cannot be reached.
    pub async fn pair(self: &Arc<Self>, invitation: &Invitation) -> Result<PeerView, OperateError> {
        if invitation.key() == self.key() {
            return Err(OperateError::Conflict(
                "this invitation is this site's own; accept it at the other site".to_owned(),
            ));
        }
        if self.remote(invitation.site()).is_some() {
            return Err(OperateError::Conflict(format!(
                "a site named '{0}' is paired already; run: farhaven peer remove {0}",
                invitation.site()
            )));
        }
        let record = self
            .node
            .accept_invitation(invitation, &self.introduction()?)
            .await
            .map_err(failed)?;
        let remote = self.add_peer(record)?;
        Ok(peer_view(&remote))
    }

    fn add_peer(self: &Arc<Self>, record: PeerRecord) -> Result<Arc<Remote>, OperateError> {
        self.catalogue
            .put(Table::Peers, &record.site, &record)
            .map_err(failed)?;
        self.catalogue.flush().map_err(failed)?;
        tracing::info!(peer = %record.site, key = %record.key, "paired");
        self.trust(record).map_err(failed)
    }

    /// Ends a pairing. Its guests must not be protected to it any more.
    ///
    /// # Errors
    /// When there is no such peer, or guests are still protected to it.
    pub fn remove_peer(&self, name: &str) -> Result<(), OperateError> {
        let remote = self.remote(name).ok_or_else(|| self.no_peer(name))?;
        let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(driver) = drivers
            .values()
            .find(|d| d.view.borrow().peer.as_deref() == Some(name))
        {
            let guest = driver.view.borrow().name.clone();
            return Err(OperateError::Conflict(format!(
                "'{guest}' is protected to '{name}'; run first: farhaven unprotect {guest}"
            )));
        }
        drop(drivers);
        self.catalogue.remove(Table::Peers, name).map_err(failed)?;
        self.catalogue.flush().map_err(failed)?;
        self.node.revoke(remote.record.key);
        self.remotes
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
        Ok(())
    }

    fn no_peer(&self, name: &str) -> OperateError {
        let remotes = self.remotes.read().unwrap_or_else(PoisonError::into_inner);
        let known: Vec<_> = remotes.keys().map(String::as_str).collect();
        OperateError::Unknown(match known.as_slice() {
            [] => format!("no site is paired; pair '{name}' first: farhaven pair"),
            known => format!("no site '{name}' is paired; known: {}", known.join(", ")),
        })
    }

    /// Everything `status` shows.
    pub fn view(&self) -> SiteView {
        let remotes = self.remotes.read().unwrap_or_else(PoisonError::into_inner);
        let peers = remotes.values().map(|r| peer_view(r)).collect();
        drop(remotes);
        let mut guests: Vec<_> = self
            .guest_records()
            .iter()
            .map(|record| self.source_view(record))
            .collect();
        guests.sort_by(|a, b| a.name.cmp(&b.name));
        SiteView {
            site: self.config.site.name.clone(),
            key: self.key().to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            peers,
            guests,
            standbys: self.standby_views(),
        }
    }

    fn standby_views(&self) -> Vec<TargetView> {
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        let mut views: Vec<_> = standbys.values().map(|s| s.view()).collect();
        views.sort_by(|a, b| a.name.cmp(&b.name));
        views
    }

    fn source_view(&self, record: &GuestRecord) -> SourceView {
        let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
        let Some(driver) = drivers.get(&record.id) else {
            return SourceView {
                name: record.name.clone(),
                id: record.id.to_string(),
                ..SourceView::default()
            };
        };
        use std::sync::atomic::Ordering::Relaxed;
        let mut view = driver.view.borrow().clone();
        let totals = &driver.totals;
        view.guest_bytes = totals.changed_bytes.load(Relaxed);
        view.wan_bytes = totals.sent_bytes.load(Relaxed);
        view.ratio = (view.wan_bytes > 0).then(|| view.guest_bytes as f64 / view.wan_bytes as f64);
        view.throughput_bytes_per_s = totals.throughput();
        let (done, total) = (totals.done.load(Relaxed), totals.total.load(Relaxed));
        let copying = matches!(view.phase, Phase::FirstCopy | Phase::Resuming);
        view.progress = (copying && total > 0).then_some((done.min(total), total));
        let sealed = self.sealed.read().unwrap_or_else(PoisonError::into_inner);
        let cut_at = sealed.get(&record.id).copied();
        let runs_elsewhere = matches!(view.phase, Phase::Moved | Phase::Fenced);
        view.rpo_ms = cut_at.filter(|_| !runs_elsewhere).map(|at| {
            SystemTime::now()
                .duration_since(at)
                .unwrap_or_default()
                .as_millis() as u64
        });
        if let (Some(rpo), Some(target)) = (view.rpo_ms, view.rpo_target_ms) {
            let health = match rpo {
                _ if rpo > 3 * target => "critical",
                _ if rpo > 2 * target => "warning",
                _ => "ok",
            };
            view.rpo_health = Some(health.to_owned());
        }
        view
    }

    // ---- guests

    pub(super) fn guest_records(&self) -> Vec<GuestRecord> {
        match self.catalogue.list::<GuestRecord>(Table::Guests) {
            Ok(records) => records.into_iter().map(|(_, record)| record).collect(),
            Err(error) => {
                tracing::error!(%error, "the catalogue cannot be read");
                Vec::new()
            }
        }
    }

    /// A guest that runs here, by its name.
    ///
    /// # Errors
    /// When there is none.
    pub fn guest(&self, name: &str) -> Result<GuestRecord, OperateError> {
        let records = self.guest_records();
        if let Some(record) = records.iter().find(|r| r.name == name) {
            return Ok(record.clone());
        }
        let known: Vec<_> = records.iter().map(|r| r.name.as_str()).collect();
        let from = self.standby_named(name).map(|s| s.from());
        Err(OperateError::Unknown(match (from, known.as_slice()) {
            (Some(from), _) => format!(
                "'{name}' is a guest of site '{from}', protected to here; ask there, or take it over: farhaven failover {name}"
            ),
            (None, []) => {
                format!("no guest '{name}'; add it: farhaven guest add {name} --qmp PATH")
            }
            (None, known) => format!("no guest '{name}' here; known: {}", known.join(", ")),
        }))
    }

    /// Makes a running QEMU known as a guest.
    ///
    /// # Errors
    /// When the name is taken, or QEMU cannot be asked.
    pub async fn add_guest(
        self: &Arc<Self>,
        name: &str,
        qmp: &Path,
    ) -> Result<GuestRecord, OperateError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty()
            || name.len() > 63
            || !name.chars().all(plain)
            || name.starts_with(['-', '.'])
        {
            return Err(OperateError::Conflict(format!(
                "'{name}' is no name for a guest: use up to 63 letters, digits, '-', '_' and '.'"
            )));
        }
        let records = self.guest_records();
        if let Some(other) = records.iter().find(|r| r.name == name || r.qmp == qmp) {
            return Err(OperateError::Conflict(format!(
                "guest '{}' is known already, at {}",
                other.name,
                other.qmp.display()
            )));
        }
        if self.standby_named(name).is_some() {
            return Err(OperateError::Conflict(format!(
                "a peer protects a guest named '{name}' to here; choose another name"
            )));
        }
        let path = qmp.to_owned();
        let definition = tokio::task::spawn_blocking(move || super::guests::define(&path))
            .await
            .map_err(failed)?
            .map_err(failed)?;
        let record = GuestRecord {
            id: GuestId::random(),
            name: name.to_owned(),
            qmp: qmp.to_owned(),
            definition,
        };
        self.catalogue
            .put(Table::Guests, &record.id.to_string(), &record)
            .map_err(failed)?;
        self.catalogue.flush().map_err(failed)?;
        Ok(record)
    }

    /// Forgets a guest that is not protected; it runs on.
    ///
    /// # Errors
    /// When there is none, or it is protected.
    pub fn remove_guest(&self, name: &str) -> Result<(), OperateError> {
        let record = self.guest(name)?;
        let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
        if drivers.contains_key(&record.id) {
            return Err(OperateError::Conflict(format!(
                "'{name}' is protected; run first: farhaven unprotect {name}"
            )));
        }
        drop(drivers);
        self.catalogue
            .remove(Table::Guests, &record.id.to_string())
            .map_err(failed)?;
        self.catalogue.flush().map_err(failed)
    }

    /// What would stop protection here, or activation at `to` (or at the peer it is protected to).
    ///
    /// # Errors
    /// When QEMU or the peer cannot be asked.
    pub async fn check_guest(
        &self,
        name: &str,
        to: Option<&str>,
    ) -> Result<Vec<Finding>, OperateError> {
        let record = self.guest(name)?;
        let protected_to = {
            let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
            drivers
                .get(&record.id)
                .and_then(|d| d.view.borrow().peer.clone())
        };
        let only = {
            let remotes = self.remotes.read().unwrap_or_else(PoisonError::into_inner);
            let mut names = remotes.keys();
            names.next().filter(|_| remotes.len() == 1).cloned()
        };
        let local = {
            let (record, attached) = (record.clone(), protected_to.is_some());
            tokio::task::spawn_blocking(move || super::guests::check(&record, attached))
                .await
                .map_err(failed)?
                .map_err(failed)?
        };
        let mut findings = local;
        if let Some(peer) = to.map(str::to_owned).or(protected_to).or(only) {
            let remote = self.remote(&peer).ok_or_else(|| self.no_peer(&peer))?;
            findings.extend(super::guests::check_at_peer(&record, &remote).await);
        }
        Ok(findings)
    }

    // ---- protection

    /// Protects a guest to a peer.
    ///
    /// # Errors
    /// When it is protected already, or its check finds what blocks it.
    pub async fn protect(
        self: &Arc<Self>,
        name: &str,
        to: &str,
        rpo: Option<Period>,
    ) -> Result<(), OperateError> {
        let record = self.guest(name)?;
        self.remote(to).ok_or_else(|| self.no_peer(to))?;
        let elsewhere = self.fence.may_run(record.id, self.key());
        if let Err(error) = elsewhere {
            return Err(OperateError::Conflict(error.to_string()));
        }
        let current = {
            let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
            drivers
                .get(&record.id)
                .and_then(|d| d.view.borrow().peer.clone())
        };
        if let Some(peer) = current {
            return Err(OperateError::Conflict(format!(
                "'{name}' is protected to '{peer}' already; to change that: farhaven unprotect {name}"
            )));
        }
        let findings = self.check_guest(name, Some(to)).await?;
        let blocks: Vec<_> = findings
            .iter()
            .filter(|f| f.severity == Severity::Blocks)
            .collect();
        if !blocks.is_empty() {
            let list: Vec<_> = blocks
                .iter()
                .map(|f| format!("{}: {}", f.what, f.mend))
                .collect();
            return Err(OperateError::Conflict(format!(
                "'{name}' cannot be protected to '{to}' as it is:\n  {}",
                list.join("\n  ")
            )));
        }
        let mut policy = self.config.protect.clone();
        if let Some(rpo) = rpo {
            policy.rpo = rpo;
        }
        if let Some(problem) = policy.problems().first() {
            return Err(OperateError::Conflict(format!(
                "the policy cannot be kept: {} {}",
                problem.key, problem.what
            )));
        }
        self.start_protection(Protection {
            guest: record.id,
            to: to.to_owned(),
            policy,
            paused: false,
            moving: None,
        })
    }

    fn start_protection(self: &Arc<Self>, protection: Protection) -> Result<(), OperateError> {
        self.keep_protection(&protection).map_err(failed)?;
        self.drive(protection).map_err(OperateError::Failed)
    }

    async fn command(&self, name: &str, command: Command) -> Result<(), OperateError> {
        let record = self.guest(name)?;
        let driver = {
            let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
            drivers.get(&record.id).cloned()
        };
        let driver = driver.ok_or_else(|| {
            OperateError::Conflict(format!(
                "'{name}' is not protected; run: farhaven protect {name} --to SITE"
            ))
        })?;
        driver.commands.try_send(command).map_err(|_| {
            OperateError::Conflict(format!("'{name}' has too many commands waiting; try again"))
        })
    }

    /// Stops cutting until resumed.
    ///
    /// # Errors
    /// When the guest is not protected.
    pub async fn pause(&self, name: &str) -> Result<(), OperateError> {
        self.command(name, Command::Pause).await
    }

    /// Goes on after a pause.
    ///
    /// # Errors
    /// When the guest is not protected.
    pub async fn resume(&self, name: &str) -> Result<(), OperateError> {
        self.command(name, Command::Resume).await
    }

    /// Ends protection. With `discard` the peer drops its points, too.
    ///
    /// # Errors
    /// When the guest is not protected, or the peer refuses to discard.
    pub async fn unprotect(&self, name: &str, discard: bool) -> Result<(), OperateError> {
        let record = self.guest(name)?;
        let view = self.source_view(&record);
        if view.phase == Phase::Held {
            return Err(OperateError::Conflict(format!(
                "'{name}' is held for a move whose end is not known; see farhaven status"
            )));
        }
        self.command(name, Command::End).await?;
        self.catalogue
            .remove(Table::Protections, &record.id.to_string())
            .map_err(failed)?;
        self.catalogue.flush().map_err(failed)?;
        let driver = {
            let mut drivers = self.drivers.write().unwrap_or_else(PoisonError::into_inner);
            drivers.remove(&record.id)
        };
        if let Some(driver) = driver {
            // Its end drops the receiver: nothing is attached to the guest any more.
            let _ = tokio::time::timeout(Duration::from_secs(30), driver.commands.closed()).await;
        }
        if let Some(remote) = view.peer.as_deref().and_then(|p| self.remote(p)) {
            let closed = remote
                .ask(Message::Close {
                    guest: record.id,
                    discard,
                })
                .await;
            if let (Err(error), true) = (closed, discard) {
                return Err(OperateError::Failed(format!(
                    "protection of '{name}' has ended, but its points at the peer are still there: {error}"
                )));
            }
        }
        Ok(())
    }

    /// Moves a guest to its peer.
    ///
    /// # Errors
    /// When it is not protected at this moment, or the move failed; the
    /// message says where the guest runs.
    pub async fn move_guest(&self, name: &str) -> Result<MoveReport, OperateError> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        self.command(name, Command::Move(reply)).await?;
        answer
            .await
            .map_err(|_| OperateError::Failed("the daemon is shutting down".to_owned()))?
            .map_err(OperateError::Failed)
    }

    /// Runs a held guest here again, by an operator's decision.
    ///
    /// # Errors
    /// Without `force`; when it is not held; when it cannot be resumed.
    pub async fn take_back(&self, name: &str, force: bool) -> Result<(), OperateError> {
        if !force {
            return Err(OperateError::Conflict(format!(
                "taking '{name}' back without the peer's word may leave it running twice. Make sure that it does not run at the peer, then add --force"
            )));
        }
        let (reply, answer) = tokio::sync::oneshot::channel();
        self.command(name, Command::TakeBack(reply)).await?;
        answer
            .await
            .map_err(|_| OperateError::Failed("the daemon is shutting down".to_owned()))?
            .map_err(OperateError::Failed)
    }

    // ---- guests of peers

    pub(super) fn standby_named(&self, name: &str) -> Option<Arc<Standby>> {
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        standbys.values().find(|s| s.name() == name).cloned()
    }

    pub(super) fn standby_of(&self, remote: &Remote, guest: GuestId) -> Option<Arc<Standby>> {
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        standbys
            .get(&guest)
            .filter(|s| s.from() == remote.record.site)
            .cloned()
    }

    /// A peer opens a guest: it is remembered.
    pub(super) fn standby(
        self: &Arc<Self>,
        remote: &Arc<Remote>,
        opening: Opening,
    ) -> Result<Arc<Standby>, String> {
        let guest = opening.guest;
        let mut standbys = self
            .standbys
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(other) = standbys.values().find(|s| s.name() == opening.name)
            && other.record().opening.guest != guest
        {
            return Err(format!(
                "another guest named '{}' is known at that site; unprotect or rename one",
                opening.name
            ));
        }
        let standby = match standbys.get(&guest) {
            Some(standby) if standby.from() == remote.record.site => {
                standby.update(opening);
                standby.clone()
            }
            Some(standby) => {
                return Err(format!(
                    "this guest is protected to here from '{}'",
                    standby.from()
                ));
            }
            None => Arc::new(Standby::new(self, remote.clone(), opening)),
        };
        self.catalogue
            .put(Table::Remote, &guest.to_string(), &standby.record())
            .and_then(|()| self.catalogue.flush())
            .map_err(|e| e.to_string())?;
        standbys.insert(guest, standby.clone());
        Ok(standby)
    }

    /// At start: a peer's guest from the catalogue, and its QEMU if it runs here.
    pub(super) async fn restore_standby(self: &Arc<Self>, record: StandbyRecord) {
        let Some(remote) = self.remote(&record.from) else {
            return;
        };
        let guest = record.opening.guest;
        let standby = Arc::new(Standby::new(self, remote, record.opening));
        self.standbys
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(guest, standby.clone());
        match self.activation(guest) {
            Ok(Some(activation)) => {
                if let Err(error) = standby.adopt(activation).await {
                    tracing::error!(guest = %standby.name(), %error, "what runs here cannot be watched");
                }
            }
            Ok(None) => {
                if let Some(newest) = standby.points().last() {
                    standby.warm_up(newest.point);
                }
            }
            Err(error) => tracing::error!(%error, "the catalogue cannot be read"),
        }
    }

    pub(super) fn forget_standby(
        &self,
        guest: GuestId,
    ) -> Result<(), farhaven_storage_sync::catalogue::CatalogueError> {
        self.standbys
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&guest);
        self.catalogue.remove(Table::Remote, &guest.to_string())?;
        self.catalogue.flush()
    }

    /// The recovery points of a guest, oldest first.
    ///
    /// # Errors
    /// When no peer sends such a guest here.
    pub fn points(&self, name: &str) -> Result<Vec<PointView>, OperateError> {
        let standby = self.standby_here(name)?;
        Ok(standby
            .points()
            .iter()
            .map(|p| {
                let key = super::point_key(p.guest, p.point);
                let record: Option<PointRecord> =
                    self.catalogue.find(Table::Points, &key).unwrap_or_default();
                let ms = |d: Duration| d.as_secs_f64() * 1e3;
                PointView {
                    point: p.point,
                    cut_at: jiff::Timestamp::from_nanosecond(i128::from(p.cut_at_unix_ns))
                        .map_or_else(|_| "?".to_owned(), |t| t.to_string()),
                    age_ms: age(p.cut_at_unix_ns).as_millis() as u64,
                    pause_ms: ms(Duration::from_nanos(p.stats.pause_ns)),
                    ram_scan_ms: record.map_or(0.0, |r| ms(r.ram_scan)),
                    ram_scanned_bytes: record.map_or(0, |r| r.ram_scanned_bytes),
                    changed_bytes: p.stats.guest_bytes,
                    sent_bytes: p.stats.wan_bytes,
                }
            })
            .collect())
    }

    /// The peer that holds the points of a guest that runs here.
    pub fn points_are_at(&self, name: &str) -> Option<String> {
        let record = self.guest(name).ok()?;
        self.source_view(&record).peer
    }

    fn standby_here(&self, name: &str) -> Result<Arc<Standby>, OperateError> {
        self.standby_named(name)
            .ok_or_else(|| match self.points_are_at(name) {
                Some(peer) => OperateError::Conflict(format!(
                    "'{name}' runs here; its recovery points are at '{peer}': run this there"
                )),
                None => {
                    let known: Vec<_> = self.standby_views().into_iter().map(|v| v.name).collect();
                    OperateError::Unknown(match known.as_slice() {
                        [] => format!("no guest '{name}'; no peer protects any guest to this site"),
                        known => format!(
                            "no guest '{name}' is protected to this site; known: {}",
                            known.join(", ")
                        ),
                    })
                }
            })
    }

    /// Runs a peer's guest here, from its newest or a named point.
    ///
    /// # Errors
    /// When its source is alive and `force` is not set, or it cannot be run.
    pub async fn fail_over(
        self: &Arc<Self>,
        name: &str,
        point: Option<u64>,
        force: bool,
    ) -> Result<FailoverReport, OperateError> {
        let declared = Instant::now();
        let declared_at = SystemTime::now();
        let standby = self.standby_here(name)?;
        if let Some(active) = standby.active() {
            return Err(OperateError::Conflict(format!(
                "'{name}' runs here already (term {}, from point {})",
                active.term.number, active.point
            )));
        }
        if standby.remote().alive() && !force {
            return Err(OperateError::Conflict(format!(
                "site '{0}' is alive, and so may be '{name}' there. To move it with nothing lost, run there: farhaven move {name}. To take it over all the same (it is stopped there first): --force",
                standby.from()
            )));
        }
        let cut_at = |number: u64| {
            standby
                .points()
                .iter()
                .find(|p| p.point == number)
                .map(|p| p.cut_at_unix_ns)
        };
        let (point, active) = standby.fail_over(point, declared).await.map_err(failed)?;
        let lost = cut_at(point).map_or(0, |at| super::unix_ns(declared_at).saturating_sub(at));
        Ok(FailoverReport {
            guest: name.to_owned(),
            point,
            rpo_ms: lost / 1_000_000,
            rto_ms: active.times.total.as_secs_f64() * 1e3,
            term: active.term.number,
            qmp: active.qmp.display().to_string(),
            pid: active.pid,
            times: active.times,
        })
    }

    /// Tells a connected source of its guest's new term, and waits a moment
    /// for it to stop the guest. The fence holds whether it answers or not.
    pub(super) async fn announce_term(&self, remote: &Remote, term: Term) {
        if remote.alive() {
            let told = remote
                .ask_within(Message::Terms { terms: vec![term] }, FENCE_WAIT)
                .await;
            if let Err(error) = told {
                tracing::warn!(%error, "the source did not confirm that it stopped its guest");
            }
        }
    }
}

fn peer_view(remote: &Remote) -> PeerView {
    let link = remote.peer.status();
    PeerView {
        site: remote.record.site.clone(),
        key: remote.record.key.to_string(),
        addresses: remote.record.addresses.clone(),
        connected: remote.alive(),
        rtt_ms: link.rtt.map(|rtt| rtt.as_secs_f64() * 1e3),
        sent_bytes: link.udp_tx_bytes,
        received_bytes: link.udp_rx_bytes,
        lost_packets: link.lost_packets,
        sent_packets: link.sent_packets,
        resent_bytes: link.data_resent_bytes,
        last_disconnect: link.why_last_disconnect.unwrap_or_default(),
        trouble: remote.trouble(),
    }
}

/// Takes in the sites that accepted an invitation of ours.
pub(super) async fn pairings(site: Weak<Site>) {
    loop {
        let Some(strong) = site.upgrade() else { return };
        let node = strong.node.clone();
        drop(strong);
        let Some(pairing) = node.pairing().await else {
            return;
        };
        let Some(site) = site.upgrade() else { return };
        if let Err(error) = site.add_peer(pairing.record) {
            tracing::error!(%error, "a pairing cannot be kept");
        }
    }
}

/// Drops points past their time, and frees what nothing refers to any more.
pub(super) async fn prune(site: Weak<Site>) {
    loop {
        tokio::time::sleep(PRUNE_EVERY).await;
        let Some(site) = site.upgrade() else { return };
        let mut by_peer: BTreeMap<String, Vec<Arc<Standby>>> = BTreeMap::new();
        for standby in site
            .standbys
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
        {
            by_peer.entry(standby.from()).or_default().push(standby);
        }
        for (peer, standbys) in by_peer {
            if let Some(remote) = site.remote(&peer)
                && let Err(error) = super::guests::prune_store(&remote, &standbys).await
            {
                tracing::warn!(peer, error, "old points were not pruned");
            }
        }
    }
}
