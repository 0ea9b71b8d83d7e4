//! Requests about protection groups: all guests of one at a time.

use std::sync::Arc;

use axum::extract::Path as InPath;
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use farhaven_policies::files::show::Shown;
use serde::{Deserialize, Serialize};

use super::rights::Caller;
use super::turn::{Commit, Reprotect};
use super::{Answer, Here, KeepPoint, ReleasePoint, Site, State, who, whole};
use crate::site::groups::{
    FailOverGroup, GroupDone, GroupFailover, GroupMove, GroupOutlook, GroupPointView,
    GroupRollBack, GroupTest, GroupView, KeptGroupPoint,
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
        .route("/v1/groups/{name}/policy", get(policy))
        .route("/v1/groups/{name}/points", get(points))
        .route("/v1/groups/{name}/points/keep", post(keep))
        .route("/v1/groups/{name}/points/release", post(release))
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

async fn policy(State(site): Here, InPath(name): InPath<String>) -> Answer<Vec<Shown>> {
    site.group_policy(&name).map(Json)
}

async fn keep(
    State(site): Here,
    InPath(name): InPath<String>,
    Json(body): Json<KeepPoint>,
) -> Answer<KeptGroupPoint> {
    whole(async move { site.keep_group_point(&name, body.point, &body.name).await }).await
}

async fn release(
    State(site): Here,
    InPath(name): InPath<String>,
    Json(body): Json<ReleasePoint>,
) -> Answer<KeptGroupPoint> {
    whole(async move { site.release_group_point(&name, body.point).await }).await
}

async fn points(State(site): Here, InPath(name): InPath<String>) -> Answer<Vec<GroupPointView>> {
    site.group_points(&name).await.map(Json)
}

async fn fail_over(
    State(site): Here,
    Extension(caller): Extension<Caller>,
    InPath(name): InPath<String>,
    Json(body): Json<FailOverGroup>,
) -> Answer<GroupFailover> {
    let by = who(&caller, None);
    whole(async move { site.fail_over_group_recorded(&name, body, by).await }).await
}

async fn test(
    State(site): Here,
    Extension(caller): Extension<Caller>,
    InPath(name): InPath<String>,
    Json(body): Json<TestGroup>,
) -> Answer<GroupTest> {
    let by = who(&caller, None);
    whole(async move { site.test_group_recorded(&name, body.cut, by).await }).await
}

async fn end_test(
    State(site): Here,
    Extension(caller): Extension<Caller>,
    InPath(name): InPath<String>,
) -> Answer<GroupDone<TestEnded>> {
    let by = who(&caller, None);
    whole(async move { site.end_group_test_recorded(&name, by).await }).await
}

async fn outlook(State(site): Here, InPath(name): InPath<String>) -> Answer<GroupOutlook> {
    site.group_outlook(&name).map(Json)
}

async fn move_group(
    State(site): Here,
    Extension(caller): Extension<Caller>,
    InPath(name): InPath<String>,
    Json(body): Json<MoveGroup>,
) -> Answer<GroupMove> {
    let by = who(&caller, None);
    let accepted = body.accept_pause;
    whole(async move { site.move_group_recorded(&name, accepted, by).await }).await
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
