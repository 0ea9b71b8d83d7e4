//! Named points and pruning, as requests for them.

use std::sync::Arc;

use axum::extract::{Path as InPath, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

use super::{Answer, Here, whole};
use crate::site::Site;
use crate::site::kept::{KeptPoint, PointChoice};
use crate::site::retention::PruneView;

/// Body of `POST /v1/guests/{name}/points/keep`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeepPoint {
    /// Which one; the newest when absent.
    #[serde(default)]
    pub point: Option<PointChoice>,
    /// How it shall be called.
    pub name: String,
}

/// Body of `POST /v1/guests/{name}/points/release`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleasePoint {
    /// Which one.
    pub point: PointChoice,
}

pub(super) fn routes() -> Router<Arc<Site>> {
    Router::new()
        .route("/v1/guests/{name}/points/keep", post(keep))
        .route("/v1/guests/{name}/points/release", post(release))
        .route("/v1/guests/{name}/prune", get(plan).post(prune))
}

async fn keep(
    State(site): Here,
    InPath(guest): InPath<String>,
    Json(body): Json<KeepPoint>,
) -> Answer<KeptPoint> {
    whole(async move { site.keep_point(&guest, body.point, &body.name).await }).await
}

async fn release(
    State(site): Here,
    InPath(guest): InPath<String>,
    Json(body): Json<ReleasePoint>,
) -> Answer<KeptPoint> {
    whole(async move { site.release_point(&guest, body.point).await }).await
}

async fn plan(State(site): Here, InPath(guest): InPath<String>) -> Answer<PruneView> {
    whole(async move { site.plan_prune(&guest).await }).await
}

async fn prune(State(site): Here, InPath(guest): InPath<String>) -> Answer<PruneView> {
    whole(async move { site.run_prune(&guest).await }).await
}
