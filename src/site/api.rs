//! The HTTP API of a site, on its unix socket, and over TLS where that is
//! configured. The command line speaks it, and scripts may: every answer is JSON; an error is `{"error": "…"}` with 404
//! (no such thing), 401 and 403 (not known, or no right to it: [`rights`]), 409 (it contradicts what is), 412 (a move that would take
//! longer than the policy allows) or 500 (it went wrong).

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Path as InPath, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Extension, Json, Router};
use farhaven_wan::Invitation;
use serde::{Deserialize, Serialize};

use super::Site;
use super::operate::OperateError;
use super::runs::api::who;
pub use super::start::StartGuest;
pub use alerts::{Acknowledge, AfterEvents, Events};
pub use body::{
    AddGuest, AddImage, Check, ExportSeed, Failover, ImportSeed, Invite, Invited, Move, OfPeer,
    Pair, Protect, TakeBack, TestFailover, Unprotect,
};
pub use groups::{MoveGroup, TestGroup};
pub use points::{KeepPoint, ReleasePoint};
use rights::{Caller, Right};
pub use scrub::StartScrub;
use serve::Served;
pub use turn::{Commit, DiscardEvidence, ExportEvidence, Reprotect};

mod alerts;
mod body;
mod evacuation;
mod groups;
pub mod rights;
mod serve;
mod tls;
mod tokens;

pub use serve::serve;
pub use tokens::{AddToken, TokenAdded, TokenView};
mod points;
mod scrub;
mod turn;

/// How long requests under way may take to their end when the daemon stops.
const GRACE: Duration = Duration::from_secs(5);

/// The file of tokens, as a fuzz target.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn fuzzing(bytes: &[u8]) {
    tokens::fuzzing(bytes);
}

/// Longest request body.
const LONGEST_BODY: usize = 64 * 1024;

/// An error's body.
#[derive(Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What happened, and what to do next.
    pub error: String,
    /// Set where programs tell one refusal from another: [`TOO_LONG`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
}

/// The code of a move that was not made because the guest would stand longer
/// than its policy allows, and of an evacuation that does not fit its deadline.
pub const TOO_LONG: &str = "too_long";

impl IntoResponse for OperateError {
    fn into_response(self) -> Response {
        let status = match self {
            OperateError::Unknown(_) => StatusCode::NOT_FOUND,
            OperateError::Conflict(_) => StatusCode::CONFLICT,
            OperateError::Forbidden(_) => StatusCode::FORBIDDEN,
            OperateError::TooLong(_) => StatusCode::PRECONDITION_FAILED,
            OperateError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (
            status,
            Json(ErrorBody {
                error: self.to_string(),
                code: matches!(self, OperateError::TooLong(_)).then(|| TOO_LONG.to_owned()),
            }),
        )
            .into_response()
    }
}

/// An empty answer.
#[derive(Debug, Serialize, Deserialize)]
pub struct Done {}

type Answer<T> = Result<Json<T>, OperateError>;
type Here = State<Arc<Site>>;

/// Every route. Its right is in [`rights`].
fn router(site: Arc<Site>, served: Arc<Served>) -> Router {
    Router::new()
        .route(
            "/v1/status",
            get(async |State(site): Here| Json(site.view())),
        )
        .route("/v1/invitations", post(invite))
        .route(
            "/v1/peers",
            get(async |State(site): Here| Json(site.view().peers)).post(pair),
        )
        .route("/v1/peers/{name}", delete(remove_peer))
        .route("/v1/peers/{name}/forget", post(forget_peer))
        .route(
            "/v1/guests",
            get(async |State(site): Here| Json(site.view().guests)).post(add_guest),
        )
        .route("/v1/link", get(async |State(site): Here| Json(site.link())))
        .route("/v1/link/limit", post(set_limit))
        .route("/v1/guests/{name}", get(show_guest).delete(remove_guest))
        .route("/v1/guests/{name}/check", get(check_guest))
        .route("/v1/guests/{name}/end", post(end_guest))
        .route("/v1/guests/{name}/protect", post(protect))
        .route("/v1/guests/{name}/seed", post(export_seed))
        .route(
            "/v1/seeds",
            get(async |State(site): Here| Json(site.seeds())).post(import_seed),
        )
        .route("/v1/guests/{name}/unprotect", post(unprotect))
        .route("/v1/guests/{name}/pause", post(pause))
        .route("/v1/guests/{name}/resume", post(resume))
        .route("/v1/guests/{name}/points", get(points))
        .route("/v1/guests/{name}/failover", post(failover))
        .route("/v1/guests/{name}/test", post(test).delete(end_test))
        .route("/v1/guests/{name}/move", get(move_outlook).post(move_guest))
        .route("/v1/guests/{name}/take-back", post(take_back))
        .route(
            "/v1/images",
            get(async |State(site): Here| Json(site.images())).post(add_image),
        )
        .route("/v1/images/{name}", delete(remove_image))
        .merge(groups::routes())
        .merge(turn::routes())
        .merge(evacuation::routes())
        .route("/v1/tokens", get(tokens::list).post(tokens::add))
        .route("/v1/tokens/{name}", delete(tokens::revoke))
        .merge(alerts::routes())
        .merge(points::routes())
        .merge(scrub::routes())
        .fallback(async || {
            OperateError::Unknown("no such path in this version of the API".to_owned())
        })
        .layer(DefaultBodyLimit::max(LONGEST_BODY))
        .merge(super::runs::api::routes())
        .layer(axum::middleware::map_response(errors_in_json))
        .layer(Extension(served))
        .with_state(site)
}

/// What the framework refuses by itself (no JSON, a wrong field, a wrong
/// method) has the form of every other error.
async fn errors_in_json(response: Response) -> Response {
    let status = response.status();
    let kind = response.headers().get(axum::http::header::CONTENT_TYPE);
    let json = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    if json || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let said = axum::body::to_bytes(response.into_body(), LONGEST_BODY)
        .await
        .unwrap_or_default();
    let error = match String::from_utf8_lossy(&said).trim() {
        "" => format!("{status}: not a request of this version of the API"),
        said => said.to_owned(),
    };
    (status, Json(ErrorBody { error, code: None })).into_response()
}

/// Runs an operation to its end, even when the client goes away midway: half
/// a failover is worse than one whose report nobody reads.
async fn whole<T: Send + 'static>(
    operation: impl Future<Output = Result<T, OperateError>> + Send + 'static,
) -> Answer<T> {
    let ended = tokio::spawn(operation).await;
    let ended = ended.unwrap_or_else(|e| {
        Err(OperateError::Failed(format!(
            "the operation ended early: {e}; see the log"
        )))
    });
    ended.map(Json)
}

async fn invite(State(site): Here, Json(body): Json<Invite>) -> Answer<Invited> {
    let invitation = site.invite(Duration::from_secs(body.valid_s))?.to_string();
    Ok(Json(Invited {
        invitation,
        valid_s: body.valid_s,
    }))
}

async fn pair(State(site): Here, Json(body): Json<Pair>) -> Answer<super::view::PeerView> {
    let invitation: Invitation = body
        .invitation
        .trim()
        .parse()
        .map_err(|e| OperateError::Conflict(format!("{e}")))?;
    whole(async move { site.pair(&invitation).await }).await
}

async fn remove_peer(State(site): Here, InPath(name): InPath<String>) -> Answer<Done> {
    site.remove_peer(&name)?;
    Ok(Json(Done {}))
}

async fn forget_peer(
    State(site): Here,
    InPath(name): InPath<String>,
) -> Answer<super::peers::Forgotten> {
    whole(async move { site.forget_peer(&name).await }).await
}

async fn set_limit(
    State(site): Here,
    Json(body): Json<super::limits::SetLimit>,
) -> Answer<super::limits::LinkView> {
    whole(async move { site.set_limit(&body) }).await
}

async fn add_guest(
    State(site): Here,
    Json(body): Json<AddGuest>,
) -> Answer<super::records::GuestRecord> {
    whole(async move {
        match (body.qmp, body.start) {
            (Some(qmp), None) => site.add_guest(&body.name, &qmp).await,
            (None, Some(start)) => site.start_guest(&body.name, &start).await,
            _ => Err(OperateError::Conflict(
                "give either `qmp`, the control socket of a running QEMU, or `start`, what guest to host".to_owned(),
            )),
        }
    })
    .await
}

async fn show_guest(
    State(site): Here,
    InPath(name): InPath<String>,
) -> Answer<super::records::GuestRecord> {
    site.guest(&name).map(Json)
}

async fn remove_guest(State(site): Here, InPath(name): InPath<String>) -> Answer<Done> {
    site.remove_guest(&name)?;
    Ok(Json(Done {}))
}

async fn end_guest(State(site): Here, InPath(name): InPath<String>) -> Answer<Done> {
    whole(async move {
        site.end_guest(&name).await?;
        Ok(Done {})
    })
    .await
}

async fn check_guest(
    State(site): Here,
    InPath(name): InPath<String>,
    Query(query): Query<Check>,
) -> Answer<Vec<crate::guest::qemu::check::Finding>> {
    site.check_guest(&name, query.to.as_deref()).await.map(Json)
}

async fn protect(
    State(site): Here,
    InPath(name): InPath<String>,
    Json(body): Json<Protect>,
) -> Answer<Done> {
    whole(async move {
        match body.seeded {
            true => site.protect_seeded(&name, &body.to, body.rpo).await?,
            false => site.protect(&name, &body.to, body.rpo).await?,
        }
        Ok(Done {})
    })
    .await
}

/// Not to its end when the client goes away: it begins anew then, and a medium
/// may be wanted back.
async fn export_seed(
    State(site): Here,
    InPath(name): InPath<String>,
    Json(body): Json<ExportSeed>,
) -> Answer<super::seed::SeedExported> {
    let exported = site.export_seed(&name, &body.to, &body.path).await;
    exported.map(Json)
}

/// As [`export_seed`].
async fn import_seed(
    State(site): Here,
    Json(body): Json<ImportSeed>,
) -> Answer<super::seed::SeedImported> {
    site.import_seed(&body.path).await.map(Json)
}

async fn unprotect(
    State(site): Here,
    InPath(name): InPath<String>,
    Extension(caller): Extension<Caller>,
    Json(body): Json<Unprotect>,
) -> Answer<Done> {
    // What a thief wants gone first is what a guest could be restored from.
    if body.discard && !caller.may(Right::Administer) {
        return Err(OperateError::Forbidden(caller.lacks(Right::Administer)));
    }
    whole(async move {
        site.unprotect_named(&name, body.discard).await?;
        Ok(Done {})
    })
    .await
}

async fn pause(State(site): Here, InPath(name): InPath<String>) -> Answer<Done> {
    for member in site.members_of(&name)? {
        site.pause(&member.name).await?;
    }
    Ok(Json(Done {}))
}

async fn resume(State(site): Here, InPath(name): InPath<String>) -> Answer<Done> {
    for member in site.members_of(&name)? {
        site.resume(&member.name).await?;
    }
    Ok(Json(Done {}))
}

async fn points(
    State(site): Here,
    InPath(name): InPath<String>,
) -> Answer<Vec<super::view::PointView>> {
    site.points(&name).await.map(Json)
}

async fn failover(
    State(site): Here,
    Extension(caller): Extension<Caller>,
    InPath(name): InPath<String>,
    Json(body): Json<Failover>,
) -> Answer<super::view::FailoverReport> {
    whole(async move {
        let Failover { point, force, by } = body;
        let by = who(&caller, by);
        let point = site.point_number(&name, point.as_ref())?;
        site.fail_over_recorded(&name, point, force, by).await
    })
    .await
}

async fn test(
    State(site): Here,
    Extension(caller): Extension<Caller>,
    InPath(name): InPath<String>,
    Json(body): Json<TestFailover>,
) -> Answer<super::view::TestReport> {
    whole(async move {
        let point = site.point_number(&name, body.point.as_ref())?;
        let by = who(&caller, body.by);
        site.test_recorded(&name, point, by).await
    })
    .await
}

async fn end_test(
    State(site): Here,
    Extension(caller): Extension<Caller>,
    InPath(name): InPath<String>,
) -> Answer<super::view::TestEnded> {
    whole(async move {
        let by = who(&caller, None);
        site.end_test_recorded(&name, by).await
    })
    .await
}

async fn move_guest(
    State(site): Here,
    Extension(caller): Extension<Caller>,
    InPath(name): InPath<String>,
    Json(body): Json<Move>,
) -> Answer<super::view::MoveReport> {
    whole(async move {
        let by = who(&caller, body.by);
        site.move_recorded(&name, body.accept_pause, by).await
    })
    .await
}

async fn move_outlook(
    State(site): Here,
    InPath(name): InPath<String>,
) -> Answer<super::view::MoveOutlook> {
    site.move_outlook(&name).map(Json)
}

async fn add_image(
    State(site): Here,
    Json(body): Json<AddImage>,
) -> Answer<Vec<super::images::ImageView>> {
    let AddImage { path, name, peer } = body;
    whole(async move { site.add_image(&path, &name, peer.as_deref()).await }).await
}

async fn remove_image(
    State(site): Here,
    InPath(name): InPath<String>,
    Query(query): Query<OfPeer>,
) -> Answer<Vec<super::images::ImageView>> {
    whole(async move { site.remove_image(&name, query.peer.as_deref()).await }).await
}

async fn take_back(
    State(site): Here,
    InPath(name): InPath<String>,
    Json(body): Json<TakeBack>,
) -> Answer<Done> {
    whole(async move {
        site.take_back(&name, body.force).await?;
        Ok(Done {})
    })
    .await
}
