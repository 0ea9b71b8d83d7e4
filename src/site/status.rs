//! What `status` and `points` show, gathered.

use std::sync::PoisonError;
use std::time::SystemTime;

use super::Site;
use super::pairing::peer_view;
use super::records::GuestRecord;
use super::view::{Phase, SiteView, SourceView, TargetView};

impl Site {
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
            groups: self.group_views(),
            policy_files: self.policy_files_view(),
            alerts: self.alerts(),
        }
    }

    pub(super) fn standby_views(&self) -> Vec<TargetView> {
        let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
        let own = standbys.values().filter(|s| !s.is_turned());
        let mut views: Vec<_> = own.map(|s| s.view()).collect();
        views.sort_by(|a, b| a.name.cmp(&b.name));
        views
    }

    pub(super) fn source_view(&self, record: &GuestRecord) -> SourceView {
        let view = self.guest_view(record);
        SourceView {
            group: self.group_of(record.id).map(|group| group.name),
            ..view
        }
    }

    pub(super) fn guest_view(&self, record: &GuestRecord) -> SourceView {
        let seed = self.exporting(record.id);
        let drivers = self.drivers.read().unwrap_or_else(PoisonError::into_inner);
        let Some(driver) = drivers.get(&record.id) else {
            let trouble = match record.definition.is_embedded() {
                true => self.hosted_lost(record),
                false => String::new(),
            };
            return SourceView {
                name: record.name.clone(),
                id: record.id.to_string(),
                phase: match (&seed, trouble.is_empty()) {
                    (_, false) => Phase::Lost,
                    (Some(_), _) => Phase::Exporting,
                    (None, _) => Phase::Unprotected,
                },
                progress: seed.flatten(),
                trouble,
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
        let cut_at = self.sealed.of(record.id);
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
}
