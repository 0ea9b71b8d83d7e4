//! What would stop a guest's protection, here or at its peer.

use std::sync::{Arc, PoisonError};

use farhaven_policies::files::Mode;

use super::{check, check_at_peer, that_matter};
use crate::guest::qemu::check::{Finding, Severity};
use crate::site::Site;
use crate::site::operate::{OperateError, failed};

impl Site {
    /// What would stop protection here, or activation at `to` (or at the peer it is protected to).
    ///
    /// # Errors
    /// When QEMU or the peer cannot be asked.
    pub async fn check_guest(
        self: &Arc<Self>,
        name: &str,
        to: Option<&str>,
    ) -> Result<Vec<Finding>, OperateError> {
        let mode = self.mode_of(self.guest(name)?.id);
        let findings = self.findings_of(name, to).await?;
        Ok(that_matter(findings, mode))
    }

    async fn findings_of(
        self: &Arc<Self>,
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
            let (site, record, attached) = (self.clone(), record.clone(), protected_to.is_some());
            crate::work::spawn_blocking(move || check(&site, &record, attached))
                .await
                .map_err(failed)?
                .map_err(failed)?
        };
        let mut findings = local;
        if let Some(peer) = to.map(str::to_owned).or(protected_to).or(only) {
            let remote = self.remote(&peer).ok_or_else(|| self.no_peer(&peer))?;
            let site = self.clone();
            let record = crate::work::spawn_blocking(move || site.as_it_is(record))
                .await
                .map_err(failed)?;
            findings.extend(check_at_peer(&record, &remote).await);
        }
        Ok(findings)
    }

    /// Nothing stops the guest's protection to `to`, here or there.
    pub(in crate::site) async fn unblocked(
        self: &Arc<Self>,
        name: &str,
        to: &str,
        mode: Mode,
    ) -> Result<(), OperateError> {
        let findings = self.findings_of(name, Some(to)).await?;
        let findings = that_matter(findings, mode);
        let blocks: Vec<_> = findings
            .iter()
            .filter(|f| f.severity == Severity::Blocks)
            .map(|f| format!("{}: {}", f.what, f.mend))
            .collect();
        if blocks.is_empty() {
            return Ok(());
        }
        Err(OperateError::Conflict(format!(
            "'{name}' cannot be protected to '{to}' as it is:\n  {}",
            blocks.join("\n  ")
        )))
    }
}
