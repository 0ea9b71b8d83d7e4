//! The HTTP API of runs.

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Path as InPath, State};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use farhaven_policies::runbook::Mode;
use farhaven_policies::runbook::plan::Plan;
use farhaven_policies::runbook::run::{Answer, Event};
use serde::{Deserialize, Serialize};

use super::start::StartRun;
use super::view::RunView;
use crate::runbook::report::Report;
use crate::site::Site;
use crate::site::api::rights::Caller;
use crate::site::operate::OperateError;

/// Longest body with a runbook: 1 MiB of it, as JSON.
const LONGEST_RUNBOOK: usize = 3 << 20;
/// Longest name of a person, in bytes.
const LONGEST_NAME: usize = 200;

/// Body of `POST /v1/runs` and `POST /v1/runbooks/plan`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Start {
    /// The runbook, as TOML.
    pub runbook: String,
    /// What it is run for.
    pub mode: Mode,
    /// From this point, where the runbook says newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point: Option<u64>,
    /// Who starts it.
    #[serde(default)]
    pub by: String,
    /// Unplanned although the source answers: its guests are stopped.
    #[serde(default)]
    pub force: bool,
}

/// Body of what people say to a run, at `POST /v1/runs/{id}/…`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Say {
    /// Who.
    pub by: String,
    /// Of approvals: which step.
    pub step: String,
    /// Of approvals: refuse it.
    pub refuse: bool,
    /// In their words.
    pub why: String,
    /// Of aborts: undo what was done.
    pub rollback: bool,
    /// Of decisions: which.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer: Option<Answer>,
}

type Here = State<Arc<Site>>;
type Answered<T> = Result<Json<T>, OperateError>;

/// Every route of runs.
pub fn routes() -> Router<Arc<Site>> {
    Router::new()
        .route("/v1/runs", get(list).post(start))
        .route("/v1/runbooks/plan", post(plan))
        .route("/v1/runs/{id}", get(show))
        .route("/v1/runs/{id}/report", get(report))
        .route("/v1/runs/{id}/approve", post(approve))
        .route("/v1/runs/{id}/pause", post(pause))
        .route("/v1/runs/{id}/go-on", post(go_on))
        .route("/v1/runs/{id}/abort", post(abort))
        .route("/v1/runs/{id}/decide", post(decide))
        .layer(DefaultBodyLimit::max(LONGEST_RUNBOOK))
}

/// Who asks for something, as far as that is known. Whoever holds a token is
/// known by its name, and by no other.
pub(in crate::site) fn who(caller: &Caller, by: Option<String>) -> Option<String> {
    let by = caller.token().map(str::to_owned).or(by)?;
    let by = by.trim();
    let sound = (1..=LONGEST_NAME).contains(&by.len()) && !by.chars().any(char::is_control);
    sound.then(|| by.to_owned())
}

/// Who says something: that must be known.
fn person(caller: &Caller, by: &str) -> Result<String, OperateError> {
    who(caller, Some(by.to_owned())).ok_or_else(|| {
        OperateError::Conflict(format!(
            "say who you are, in up to {LONGEST_NAME} bytes: it is kept in the audit record (`by`, or --as NAME)"
        ))
    })
}

/// To its end, even when the client goes away: half a start is no run.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T, OperateError>> + Send + 'static,
) -> Answered<T> {
    let ended = tokio::spawn(work).await;
    let ended = ended.unwrap_or_else(|e| Err(OperateError::Failed(e.to_string())));
    ended.map(Json)
}

/// Reads files, away from what must not wait.
async fn reading<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, OperateError> + Send + 'static,
) -> Answered<T> {
    let read = crate::work::spawn_blocking(work).await;
    let read = read.unwrap_or_else(|e| Err(OperateError::Failed(e.to_string())));
    read.map(Json)
}

async fn list(State(site): Here) -> Answered<Vec<RunView>> {
    reading(move || Ok(site.runs())).await
}

async fn show(State(site): Here, InPath(id): InPath<String>) -> Answered<RunView> {
    reading(move || site.run(&id)).await
}

async fn report(State(site): Here, InPath(id): InPath<String>) -> Answered<Report> {
    reading(move || site.report(&id)).await
}

async fn plan(State(site): Here, Json(body): Json<Start>) -> Answered<Plan> {
    reading(move || site.plan_run(&body.runbook, body.mode)).await
}

async fn start(
    State(site): Here,
    Extension(caller): Extension<Caller>,
    Json(body): Json<Start>,
) -> Answered<RunView> {
    let start = StartRun {
        by: person(&caller, &body.by)?,
        text: body.runbook,
        mode: body.mode,
        point: body.point,
        force: body.force,
    };
    whole(async move { site.start_run(start).await }).await
}

async fn tell(
    site: Arc<Site>,
    caller: &Caller,
    id: String,
    by: &str,
    step: Option<String>,
    event: Event,
) -> Answered<RunView> {
    let by = person(caller, by)?;
    whole(async move { site.tell_run(&id, &by, step.as_deref(), event).await }).await
}

async fn approve(
    State(site): Here,
    Extension(caller): Extension<Caller>,
    InPath(id): InPath<String>,
    Json(body): Json<Say>,
) -> Answered<RunView> {
    let event = match body.refuse {
        true => Event::Refused { why: body.why },
        false => Event::Approved { comment: body.why },
    };
    tell(site, &caller, id, &body.by, Some(body.step), event).await
}

async fn pause(
    State(site): Here,
    Extension(caller): Extension<Caller>,
    InPath(id): InPath<String>,
    Json(body): Json<Say>,
) -> Answered<RunView> {
    tell(site, &caller, id, &body.by, None, Event::Paused).await
}

async fn go_on(
    State(site): Here,
    Extension(caller): Extension<Caller>,
    InPath(id): InPath<String>,
    Json(body): Json<Say>,
) -> Answered<RunView> {
    tell(site, &caller, id, &body.by, None, Event::Continued).await
}

async fn abort(
    State(site): Here,
    Extension(caller): Extension<Caller>,
    InPath(id): InPath<String>,
    Json(body): Json<Say>,
) -> Answered<RunView> {
    let rollback = body.rollback;
    tell(
        site,
        &caller,
        id,
        &body.by,
        None,
        Event::Aborted { rollback },
    )
    .await
}

async fn decide(
    State(site): Here,
    Extension(caller): Extension<Caller>,
    InPath(id): InPath<String>,
    Json(body): Json<Say>,
) -> Answered<RunView> {
    let Some(answer) = body.answer else {
        return Err(OperateError::Conflict(
            "say what is to follow: repeat, take-as-done, rollback or end".to_owned(),
        ));
    };
    tell(
        site,
        &caller,
        id,
        &body.by,
        None,
        Event::Answered { answer },
    )
    .await
}
