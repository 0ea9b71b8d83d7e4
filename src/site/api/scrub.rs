//! Scrubs and figures, as requests for them.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use farhaven_policies::units::RateLimit;
use serde::{Deserialize, Serialize};

use super::{Answer, Here};
use crate::site::Site;
use crate::site::operate::failed;
use crate::site::scrub::ScrubView;

/// What Prometheus asks for.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Body of `POST /v1/scrub`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StartScrub {
    /// What this peer sent; what all of them sent when absent.
    pub peer: Option<String>,
    /// Most that is read a second; by the configuration when absent.
    pub rate: Option<RateLimit>,
}

pub(super) fn routes() -> Router<Arc<Site>> {
    Router::new()
        .route(
            "/v1/scrub",
            get(async |State(site): Here| Json(site.scrubs())).post(start),
        )
        .route("/v1/metrics", get(metrics))
}

async fn start(State(site): Here, Json(body): Json<StartScrub>) -> Answer<Vec<ScrubView>> {
    site.scrub(body.peer.as_deref(), body.rate).map(Json)
}

async fn metrics(State(site): Here) -> Response {
    match site.metrics() {
        Ok(text) => ([(CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(error) => failed(error).into_response(),
    }
}
