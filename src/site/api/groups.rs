//! Requests about protection groups: all guests of one at a time.

use std::sync::Arc;

use axum::extract::Path as InPath;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};

use super::turn::{Commit, Reprotect};
use super::{Answer, Here, Site, State, whole};
use crate::site::groups::{
    FailOverGroup, GroupDone, GroupFailover, GroupMove, GroupOutlook, GroupPointView,
    GroupRollBack, GroupTest, GroupView,
};
use crate::site::turn::view::{CommitReport, ReprotectReport, RollbackReport};
use crate::site::view::TestEnded;

/// Body of `POST /v1/groups/{name}/test`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TestGroup {
    /// The number of a cut; the newest whole point when absent.
    pub cut: Option<u64>,
}

/// Body of `POST /v1/groups/{name}/move`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MoveGroup {
    /// Even if guests stand longer than their policy allows.
    pub accept_pause: bool,
}

pub(super) fn routes() -> Router<Arc<Site>> {
    Router::new()
        .route(
            "/v1/groups",
            get(async |State(site): Here| Json(site.view().groups)),
        )
        .route("/v1/groups/{name}", get(show))
        .route("/v1/groups/{name}/points", get(points))
        .route("/v1/groups/{name}/failover", post(fail_over))
        .route("/v1/groups/{name}/test", post(test).delete(end_test))
        .route("/v1/groups/{name}/move", get(outlook).post(move_group))
        .route("/v1/groups/{name}/commit", post(commit))
        .route("/v1/groups/{name}/rollback", post(rollback))
        .route("/v1/groups/{name}/reprotect", post(reprotect))
}

async fn show(State(site): Here, InPath(name): InPath<String>) -> Answer<GroupView> {
    let group = site.group(&name)?;
    Ok(Json(site.group_view(&group)))
}

async fn points(State(site): Here, InPath(name): InPath<String>) -> Answer<Vec<GroupPointView>> {
    site.group_points(&name).await.map(Json)
}

async fn fail_over(
    State(site): Here,
    InPath(name): InPath<String>,
    Json(body): Json<FailOverGroup>,
) -> Answer<GroupFailover> {
    whole(async move { site.fail_over_group(&name, body).await }).await
}

async fn test(
    State(site): Here,
    InPath(name): InPath<String>,
    Json(body): Json<TestGroup>,
) -> Answer<GroupTest> {
    whole(async move {
        site.not_in_a_run(&name)?;
        site.test_group(&name, body.cut).await
    })
    .await
}

async fn end_test(State(site): Here, InPath(name): InPath<String>) -> Answer<GroupDone<TestEnded>> {
    whole(async move {
        site.not_in_a_run(&name)?;
        site.end_group_test(&name).await
    })
    .await
}

async fn outlook(State(site): Here, InPath(name): InPath<String>) -> Answer<GroupOutlook> {
    site.group_outlook(&name).map(Json)
}

async fn move_group(
    State(site): Here,
    InPath(name): InPath<String>,
    Json(body): Json<MoveGroup>,
) -> Answer<GroupMove> {
    whole(async move { site.move_group(&name, body.accept_pause).await }).await
}

async fn commit(
    State(site): Here,
    InPath(name): InPath<String>,
    Json(body): Json<Commit>,
) -> Answer<GroupDone<CommitReport>> {
    whole(async move {
        site.not_in_a_run(&name)?;
        site.commit_group(&name, body.discard).await
    })
    .await
}

async fn rollback(
    State(site): Here,
    InPath(name): InPath<String>,
    Json(body): Json<GroupRollBack>,
) -> Answer<GroupDone<RollbackReport>> {
    whole(async move {
        site.not_in_a_run(&name)?;
        site.rollback_group(&name, body).await
    })
    .await
}

async fn reprotect(
    State(site): Here,
    InPath(name): InPath<String>,
    Json(body): Json<Reprotect>,
) -> Answer<GroupDone<ReprotectReport>> {
    whole(async move {
        site.not_in_a_run(&name)?;
        site.reprotect_group(&name, body.rpo).await
    })
    .await
}
