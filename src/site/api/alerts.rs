//! Alerts and events, as requests for them.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path as InPath, Query, State};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use serde::{Deserialize, Serialize};

use super::rights::Caller;
use super::{Answer, Here};
use crate::site::Site;
use crate::site::alerts::AlertView;
use crate::site::events::Event;

/// Most events of one answer.
const MOST: usize = 1000;
/// Longest that a request waits for an event.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Body of `POST /v1/alerts/{id}/acknowledge`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Acknowledge {
    /// Who cares for it; over TLS it is whoever the token names.
    pub by: String,
}

/// Query of `GET /v1/events`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AfterEvents {
    /// Only what came after the event of this number.
    pub after: u64,
    /// At most so many, the oldest first; 1000 at most.
    pub limit: Option<usize>,
    /// Where there is none yet, wait so many seconds for one; 60 at most.
    pub wait_s: u64,
}

/// Answer to it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Events {
    /// The events, the oldest first.
    pub events: Vec<Event>,
    /// What to ask for next, as `after`.
    pub next: u64,
}

pub(super) fn routes() -> Router<Arc<Site>> {
    Router::new()
        .route(
            "/v1/alerts",
            get(async |State(site): Here| Json(site.alerts())),
        )
        .route("/v1/alerts/{id}/acknowledge", post(acknowledge))
        .route("/v1/events", get(events))
}

async fn acknowledge(
    State(site): Here,
    InPath(id): InPath<u64>,
    Extension(caller): Extension<Caller>,
    Json(body): Json<Acknowledge>,
) -> Answer<AlertView> {
    let by = caller.token().unwrap_or(&body.by);
    site.acknowledge(id, by).map(Json)
}

async fn events(State(site): Here, Query(query): Query<AfterEvents>) -> Answer<Events> {
    let most = query.limit.unwrap_or(MOST).clamp(1, MOST);
    let wait = Duration::from_secs(query.wait_s).min(LONGEST_WAIT);
    let events = site.events(query.after, most, wait).await;
    let next = events.last().map_or(query.after, |event| event.number);
    Ok(Json(Events { events, next }))
}
