//! The paths of evacuations.

use std::sync::Arc;

use axum::extract::{Path as InPath, State};
use axum::routing::{get, post};
use axum::{Json, Router};

use super::super::Site;
use super::super::evacuate::{Evacuation, Order, Preview, Summary};
use super::super::operate::OperateError;
use super::{Answer, Here, whole};

/// Stands for the newest one in a path.
const NEWEST: &str = "newest";

pub(super) fn routes() -> Router<Arc<Site>> {
    Router::new()
        .route("/v1/evacuations", get(list).post(begin))
        .route("/v1/evacuations/plan", post(plan))
        .route("/v1/evacuations/{number}", get(show))
        .route("/v1/evacuation/pause", post(pause))
        .route("/v1/evacuation/resume", post(resume))
        .route("/v1/evacuation/abort", post(abort))
}

/// Files are read: away from what must not wait.
async fn reading<T: Send + 'static>(
    read: impl FnOnce() -> Result<T, OperateError> + Send + 'static,
) -> Answer<T> {
    let read = crate::work::spawn_blocking(read).await;
    read.unwrap_or_else(|error| Err(OperateError::Failed(error.to_string())))
        .map(Json)
}

async fn list(State(site): Here) -> Answer<Vec<Summary>> {
    reading(move || Ok(site.evacuations())).await
}

async fn plan(State(site): Here, Json(order): Json<Order>) -> Answer<Preview> {
    site.plan_evacuation(&order).await.map(Json)
}

async fn begin(State(site): Here, Json(order): Json<Order>) -> Answer<Evacuation> {
    whole(async move { site.begin_evacuation(&order).await }).await
}

async fn show(State(site): Here, InPath(number): InPath<String>) -> Answer<Evacuation> {
    let number = match number.as_str() {
        NEWEST => None,
        number => Some(number.parse().map_err(|_| {
            OperateError::Unknown(format!(
                "'{number}' is no number of an evacuation; see farhaven evacuation list"
            ))
        })?),
    };
    reading(move || site.evacuation(number)).await
}

async fn pause(State(site): Here) -> Answer<Evacuation> {
    site.pause_evacuation().await?;
    reading(move || site.evacuation(None)).await
}

async fn resume(State(site): Here) -> Answer<Evacuation> {
    site.resume_paused_evacuation().await?;
    reading(move || site.evacuation(None)).await
}

async fn abort(State(site): Here) -> Answer<Evacuation> {
    site.abort_evacuation().await?;
    reading(move || site.evacuation(None)).await
}
