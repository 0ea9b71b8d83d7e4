//! Guests that peers send here: remembered, listed, taken over.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use farhaven_storage_sync::PointHeader;
use farhaven_storage_sync::catalogue::Table;
use farhaven_storage_sync::unit::GuestId;

use super::breach::MOST_GUESTS;
use super::groups::PointGroup;
use super::operate::{FENCE_WAIT, OperateError, failed};
use super::records::PointRecord;
use super::records::StandbyRecord;
use super::remote::Remote;
use super::standby::Standby;
use super::view::{ConsolePaths, FailoverReport, PointView};
use super::{Site, age};
use crate::activate::fence::Term;
use crate::activate::point::boots;
use crate::replicate::message::{Message, Opening};

impl Site {
    pub(super) fn standby_named(&self, name: &str) -> Option<Arc<Standby>> {
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        let mut all = standbys.values();
        all.find(|s| s.name() == name && !s.is_turned()).cloned()
    }

    pub(super) fn standby_of(&self, remote: &Remote, guest: GuestId) -> Option<Arc<Standby>> {
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        standbys
            .get(&guest)
            .filter(|s| s.is_from(&remote.record.key))
            .cloned()
    }

    /// May this peer say what is done here with a guest that it sends? Only while the
    /// guest's term is its own.
    pub(super) fn is_theirs(&self, remote: &Remote, standby: &Standby) -> bool {
        let owner = self.fence.current(standby.guest).map(|term| term.owner);
        owner == Some(remote.record.key) && !standby.is_turned()
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
                "another guest named '{}' has points at that site, until their time is over; give this one another name",
                opening.name
            ));
        }
        let standby = match standbys.get(&guest) {
            Some(standby) if standby.is_from(&remote.record.key) => {
                standby.update(opening);
                standby.turn(false, standby.base());
                standby.clone()
            }
            Some(standby) => {
                return Err(format!(
                    "this guest is protected to here from '{}'",
                    standby.from()
                ));
            }
            None => {
                let key = &remote.record.key;
                let of_peer = standbys.values().filter(|s| s.is_from(key)).count();
                if of_peer >= MOST_GUESTS {
                    return Err(format!(
                        "that site keeps {MOST_GUESTS} guests of this one already; end some: farhaven unprotect NAME --discard"
                    ));
                }
                Arc::new(Standby::new(self, remote.clone(), opening))
            }
        };
        self.catalogue
            .put(Table::Remote, &guest.to_string(), &standby.record())
            .and_then(|()| self.catalogue.flush())
            .map_err(|e| e.to_string())?;
        standbys.insert(guest, standby.clone());
        Ok(standby)
    }

    /// At start: a peer's guest from the catalogue, and its machine if it runs here.
    pub(super) async fn restore_standby(self: &Arc<Self>, record: StandbyRecord) {
        let Some(remote) = self.remote_of_key(&record.source()) else {
            tracing::warn!(guest = record.opening.name, from = record.from, key = %record.source(), "this guest's site is paired no more: it is left as it is");
            return;
        };
        let guest = record.opening.guest;
        let as_kept = record.key.is_some() && record.from == remote.record.site;
        let standby = Arc::new(Standby::new(self, remote, record.opening));
        let turned = record.turned || self.has_turned(guest);
        standby.turn(turned, record.base);
        self.standbys
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(guest, standby.clone());
        if !as_kept && let Err(error) = self.keep_standby(&standby) {
            tracing::error!(guest = %standby.name(), %error, "the catalogue cannot be written");
        }
        standby.clear_left_test().await;
        if turned {
            self.finish_turning(&standby);
            return;
        }
        match self.activation(guest) {
            Ok(Some(activation)) => {
                standby.find_again(activation).await;
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

    /// The recovery points of a guest, oldest first; of a guest that runs here,
    /// as its peer tells.
    ///
    /// # Errors
    /// When there is no such guest, or its peer cannot be asked.
    pub async fn points(&self, name: &str) -> Result<Vec<PointView>, OperateError> {
        if let Some(standby) = self.standby_named(name) {
            return Ok(self.points_of(&standby));
        }
        let record = self.guest(name)?;
        let peer = self.source_view(&record).peer.ok_or_else(|| {
            OperateError::Conflict(format!(
                "'{name}' is not protected, so it has no recovery points; run: farhaven protect {name} --to SITE"
            ))
        })?;
        let remote = self.remote(&peer).ok_or_else(|| self.no_peer(&peer))?;
        match remote
            .ask(Message::Points { guest: record.id })
            .await
            .map_err(failed)?
        {
            Message::PointList { points } => Ok(points),
            _ => Err(failed(format!(
                "site '{peer}' gave no list of points; run this there"
            ))),
        }
    }

    /// The points of a guest that is kept here, oldest first.
    pub(super) fn points_of(&self, standby: &Standby) -> Vec<PointView> {
        let mut kept = standby.remote().incoming.store.kept(standby.guest);
        standby
            .points()
            .iter()
            .map(|p| {
                let record = self.point_record(standby, p);
                let record = record.as_ref();
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
                    group: record.and_then(|r| r.group.clone()),
                    quiesced: record.and_then(|r| r.quiesced),
                    disks_only: boots(&p.volumes),
                    damaged: self.scrubs.damaged(&standby.from(), p.guest, p.point),
                    name: kept.remove(&p.point),
                }
            })
            .collect()
    }

    /// The newest points of a guest that are of a cut of its group, oldest first.
    pub(super) fn newest_marks(
        &self,
        standby: &Standby,
        most: usize,
    ) -> Vec<(PointHeader, PointGroup)> {
        let mut headers = standby.points();
        headers.drain(..headers.len().saturating_sub(most));
        let marked = headers.into_iter().filter_map(|header| {
            let mark = self.point_record(standby, &header)?.group?;
            Some((header, mark))
        });
        marked.collect()
    }

    /// What was measured of a point. What a rebuilt catalogue lacks is read
    /// from the point itself.
    fn point_record(&self, standby: &Standby, header: &PointHeader) -> Option<PointRecord> {
        let key = super::point_key(header.guest, header.point);
        let known = self.catalogue.find(Table::Points, &key);
        if let Ok(Some(record)) = known {
            return Some(record);
        }
        let (_, context) = standby.open_in_part(header.point).ok()?;
        let record = PointRecord {
            cut_at: header.cut_at_unix_ns,
            pause: context.pause,
            ram_scan: context.ram_scan,
            ram_scanned_bytes: context.ram_scanned_bytes,
            group: context.group,
            quiesced: context.quiesced,
        };
        if let Err(error) = self.catalogue.put(Table::Points, &key, &record) {
            tracing::error!(%error, "the catalogue cannot be written");
        }
        Some(record)
    }

    /// The peer that holds the points of a guest that runs here.
    fn points_are_at(&self, name: &str) -> Option<String> {
        let record = self.guest(name).ok()?;
        self.source_view(&record).peer
    }

    pub(super) fn standby_here(&self, name: &str) -> Result<Arc<Standby>, OperateError> {
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
        let note = standby.make_room().await;
        let (point, active) = standby.fail_over(point, declared).await.map_err(failed)?;
        let what = format!(
            "'{name}' was taken over from point {point}, under term {}",
            active.term.number
        );
        self.note(super::events::EventKind::FailedOver, name, &what);
        let lost = cut_at(point).map_or(0, |at| super::unix_ns(declared_at).saturating_sub(at));
        Ok(FailoverReport {
            guest: name.to_owned(),
            point,
            rpo_ms: lost / 1_000_000,
            rto_ms: active.times.total.as_secs_f64() * 1e3,
            term: active.term.number,
            console: ConsolePaths::beside(active.directory()),
            qmp: active.qmp.map(|qmp| qmp.display().to_string()),
            pid: active.pid,
            times: active.times,
            note,
        })
    }

    /// Tells a living source of its guest's new term, and waits for its word
    /// that the guest is stopped. A source that falls silent meanwhile is not
    /// waited for: the term stops its guest when it comes back. Answers whether
    /// it said so.
    ///
    /// # Errors
    /// When it lives and does not say so.
    pub(super) async fn announce_term(
        self: &Arc<Self>,
        remote: &Remote,
        term: Term,
    ) -> Result<bool, String> {
        self.announce_terms(remote, vec![term]).await
    }

    /// As [`Site::announce_term`], of several guests of that source at once.
    ///
    /// # Errors
    /// When it lives and does not say so of all of them.
    pub(super) async fn announce_terms(
        self: &Arc<Self>,
        remote: &Remote,
        terms: Vec<Term>,
    ) -> Result<bool, String> {
        let answered = self.ask_to_stop(remote, terms).await;
        if !matches!(answered, Ok(true)) {
            // Should it be heard again on the same connection, nothing else tells it.
            self.tell_terms();
        }
        answered
    }

    async fn ask_to_stop(&self, remote: &Remote, terms: Vec<Term>) -> Result<bool, String> {
        let deadline = Instant::now() + FENCE_WAIT;
        let told = remote.ask_within(Message::Terms { terms }, FENCE_WAIT);
        tokio::pin!(told);
        loop {
            if !remote.alive() {
                return Ok(false);
            }
            match tokio::time::timeout(Duration::from_millis(100), &mut told).await {
                Ok(Ok(Message::Done)) => return Ok(true),
                Ok(Ok(_)) => return Err("its answer does not fit the question".to_owned()),
                Ok(Err(error)) if !remote.alive() => {
                    tracing::warn!(%error, "the source fell silent before it stopped its guest");
                    return Ok(false);
                }
                Ok(Err(error)) => return Err(error.to_string()),
                Err(_) if Instant::now() > deadline => return Err("it did not answer".to_owned()),
                Err(_) => {}
            }
        }
    }
}
