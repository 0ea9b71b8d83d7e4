//! Requests about guests that changed sides, and about what is left of them.

use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::Path as InPath;
use axum::routing::{get, post};
use axum::{Json, Router};
use farhaven_policies::units::Period;
use serde::{Deserialize, Serialize};

use super::{Answer, Here, Site, State, whole};
use crate::site::turn::view::{
    CommitReport, Discarded, EvidenceManifest, ReprotectReport, RollBack, RollbackReport,
};

/// Body of `POST /v1/guests/{name}/commit`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Commit {
    /// Its source ends the stopped copy at once.
    pub discard: bool,
}

/// Body of `POST /v1/guests/{name}/reprotect`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Reprotect {
    /// By the site's policy when absent.
    pub rpo: Option<Period>,
}

/// Body of `POST /v1/evidence/{name}/export`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportEvidence {
    /// A directory on this host, named from its root.
    pub directory: PathBuf,
    /// This copy; all when absent.
    #[serde(default)]
    pub copy: Option<String>,
}

/// Body of `POST /v1/evidence/{name}/discard`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DiscardEvidence {
    /// This copy; all when absent.
    pub copy: Option<String>,
    /// Even if a rollback needs it.
    pub force: bool,
}

pub(super) fn routes() -> Router<Arc<Site>> {
    Router::new()
        .route("/v1/guests/{name}/commit", post(commit))
        .route("/v1/guests/{name}/rollback", post(rollback))
        .route("/v1/guests/{name}/reprotect", post(reprotect))
        .route("/v1/evidence", get(list))
        .route("/v1/evidence/{name}/export", post(export))
        .route("/v1/evidence/{name}/discard", post(discard))
}

async fn commit(
    State(site): Here,
    InPath(name): InPath<String>,
    Json(body): Json<Commit>,
) -> Answer<CommitReport> {
    whole(async move {
        site.not_in_a_run(&name)?;
        site.commit(&name, body.discard).await
    })
    .await
}

async fn rollback(
    State(site): Here,
    InPath(name): InPath<String>,
    Json(body): Json<RollBack>,
) -> Answer<RollbackReport> {
    whole(async move {
        site.not_in_a_run(&name)?;
        site.rollback(&name, body).await
    })
    .await
}

async fn reprotect(
    State(site): Here,
    InPath(name): InPath<String>,
    Json(body): Json<Reprotect>,
) -> Answer<ReprotectReport> {
    whole(async move {
        site.not_in_a_run(&name)?;
        site.reprotect(&name, body.rpo).await
    })
    .await
}

async fn list(State(site): Here) -> Answer<Vec<crate::site::turn::view::EvidenceView>> {
    whole(async move {
        let listed = crate::work::spawn_blocking(move || site.evidence()).await;
        listed.map_err(crate::site::operate::failed)
    })
    .await
}

async fn export(
    State(site): Here,
    InPath(name): InPath<String>,
    Json(body): Json<ExportEvidence>,
) -> Answer<Vec<EvidenceManifest>> {
    whole(async move {
        let copy = body.copy.as_deref();
        site.export_evidence(&name, copy, &body.directory).await
    })
    .await
}

async fn discard(
    State(site): Here,
    InPath(name): InPath<String>,
    Json(body): Json<DiscardEvidence>,
) -> Answer<Discarded> {
    whole(async move {
        let copy = body.copy.as_deref();
        site.discard_evidence(&name, copy, body.force).await
    })
    .await
}
