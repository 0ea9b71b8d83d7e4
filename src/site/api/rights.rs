//! Who asks, and what they may: the one table that gives every route its
//! right. A route that is not in it is refused to everybody, so a new one is
//! either thought about or does not work (`tests/house.rs` says so sooner).

use axum::Json;
use axum::extract::{MatchedPath, Request};
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use super::ErrorBody;

/// What a route needs. None contains another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// Look at everything but secrets.
    View,
    /// Protect, pause, limit: what leaves every guest running where it runs,
    /// and every recovery point in its place.
    Operate,
    /// Run a test failover, and end it.
    Test,
    /// Decide where a guest runs: failover, move, take back, end.
    FailOver,
    /// Pair, give out rights, drop recovery points, name files of this host.
    Administer,
}

/// What each route needs.
const RIGHTS: &[(&str, &str, Right)] = &[
    ("GET", "/v1/status", Right::View),
    ("POST", "/v1/invitations", Right::Administer),
    ("GET", "/v1/peers", Right::View),
    ("POST", "/v1/peers", Right::Administer),
    ("DELETE", "/v1/peers/{name}", Right::Administer),
    ("POST", "/v1/peers/{name}/forget", Right::Administer),
    ("GET", "/v1/guests", Right::View),
    // The daemon opens the path of a QMP socket that the request names.
    ("POST", "/v1/guests", Right::Administer),
    ("GET", "/v1/guests/{name}", Right::View),
    ("DELETE", "/v1/guests/{name}", Right::Operate),
    ("GET", "/v1/guests/{name}/check", Right::View),
    ("POST", "/v1/guests/{name}/end", Right::FailOver),
    ("POST", "/v1/guests/{name}/protect", Right::Operate),
    // With `discard`, its handler asks for `Administer`, too.
    ("POST", "/v1/guests/{name}/unprotect", Right::Operate),
    ("POST", "/v1/guests/{name}/pause", Right::Operate),
    ("POST", "/v1/guests/{name}/resume", Right::Operate),
    ("GET", "/v1/guests/{name}/points", Right::View),
    ("POST", "/v1/guests/{name}/failover", Right::FailOver),
    ("POST", "/v1/guests/{name}/test", Right::Test),
    ("DELETE", "/v1/guests/{name}/test", Right::Test),
    ("GET", "/v1/guests/{name}/move", Right::View),
    ("POST", "/v1/guests/{name}/move", Right::FailOver),
    ("POST", "/v1/guests/{name}/take-back", Right::FailOver),
    ("POST", "/v1/guests/{name}/commit", Right::FailOver),
    ("POST", "/v1/guests/{name}/rollback", Right::FailOver),
    ("POST", "/v1/guests/{name}/reprotect", Right::Operate),
    ("GET", "/v1/evidence", Right::View),
    // The daemon writes memory and disks below the path that is named.
    ("POST", "/v1/evidence/{name}/export", Right::Administer),
    ("POST", "/v1/evidence/{name}/discard", Right::Administer),
    ("GET", "/v1/link", Right::View),
    ("POST", "/v1/link/limit", Right::Operate),
    // Seeds and images: the daemon reads or writes the path that is named.
    ("POST", "/v1/guests/{name}/seed", Right::Administer),
    ("GET", "/v1/seeds", Right::View),
    ("POST", "/v1/seeds", Right::Administer),
    ("GET", "/v1/images", Right::View),
    ("POST", "/v1/images", Right::Administer),
    ("DELETE", "/v1/images/{name}", Right::Administer),
    ("GET", "/v1/groups", Right::View),
    ("GET", "/v1/groups/{name}", Right::View),
    ("GET", "/v1/groups/{name}/policy", Right::View),
    ("GET", "/v1/groups/{name}/points", Right::View),
    ("POST", "/v1/groups/{name}/failover", Right::FailOver),
    ("POST", "/v1/groups/{name}/test", Right::Test),
    ("DELETE", "/v1/groups/{name}/test", Right::Test),
    ("GET", "/v1/groups/{name}/move", Right::View),
    ("POST", "/v1/groups/{name}/move", Right::FailOver),
    ("POST", "/v1/groups/{name}/commit", Right::FailOver),
    ("POST", "/v1/groups/{name}/rollback", Right::FailOver),
    ("POST", "/v1/groups/{name}/reprotect", Right::Operate),
    ("GET", "/v1/alerts", Right::View),
    ("POST", "/v1/alerts/{id}/acknowledge", Right::Operate),
    ("GET", "/v1/events", Right::View),
    ("GET", "/v1/metrics", Right::View),
    ("GET", "/v1/scrub", Right::View),
    ("POST", "/v1/scrub", Right::Operate),
    ("POST", "/v1/guests/{name}/points/keep", Right::Operate),
    ("POST", "/v1/groups/{name}/points/keep", Right::Operate),
    // What was kept may go then, with its time.
    (
        "POST",
        "/v1/groups/{name}/points/release",
        Right::Administer,
    ),
    (
        "POST",
        "/v1/guests/{name}/points/release",
        Right::Administer,
    ),
    ("GET", "/v1/guests/{name}/prune", Right::View),
    ("POST", "/v1/guests/{name}/prune", Right::Administer),
    // A runbook names programs of this host.
    ("POST", "/v1/runs", Right::Administer),
    ("GET", "/v1/runs", Right::View),
    ("POST", "/v1/runbooks/plan", Right::Operate),
    ("GET", "/v1/runs/{id}", Right::View),
    ("GET", "/v1/runs/{id}/report", Right::View),
    ("POST", "/v1/runs/{id}/approve", Right::FailOver),
    ("POST", "/v1/runs/{id}/pause", Right::FailOver),
    ("POST", "/v1/runs/{id}/go-on", Right::FailOver),
    ("POST", "/v1/runs/{id}/abort", Right::FailOver),
    ("POST", "/v1/runs/{id}/decide", Right::FailOver),
    ("GET", "/v1/evacuations", Right::View),
    ("POST", "/v1/evacuations", Right::FailOver),
    // A plan does nothing, but asks the peer.
    ("POST", "/v1/evacuations/plan", Right::Operate),
    ("GET", "/v1/evacuations/{number}", Right::View),
    ("POST", "/v1/evacuation/pause", Right::FailOver),
    ("POST", "/v1/evacuation/resume", Right::FailOver),
    ("POST", "/v1/evacuation/abort", Right::FailOver),
    ("GET", "/v1/tokens", Right::Administer),
    ("POST", "/v1/tokens", Right::Administer),
    ("DELETE", "/v1/tokens/{name}", Right::Administer),
];

/// Every route there is, with its method, and what it needs.
pub fn routes() -> impl Iterator<Item = (&'static str, &'static str, Right)> {
    RIGHTS.iter().copied()
}

/// What somebody with a token does here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Looks.
    Viewer,
    /// Operates; tests and real failovers only with a right of their own.
    Operator,
    /// Everything.
    Admin,
}

/// Rights that an operator has only by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum May {
    /// Test failovers.
    Test,
    /// Real failovers, moves, and what else decides where a guest runs.
    Failover,
}

/// Who asks. A request brings one along as an extension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    name: String,
    role: Role,
    may: Vec<May>,
    token: bool,
}

impl Caller {
    /// Somebody of this host, let in by the mode of the socket's file: may do
    /// everything, and is known by the user's number.
    pub fn of_host(user: Option<u32>) -> Self {
        Self {
            name: user.map_or_else(|| "uid:?".to_owned(), |user| format!("uid:{user}")),
            role: Role::Admin,
            may: Vec::new(),
            token: false,
        }
    }

    /// Whoever holds the token of this name.
    pub fn of_token(name: String, role: Role, may: Vec<May>) -> Self {
        Self {
            name,
            role,
            may,
            token: true,
        }
    }

    /// For logs and records: a token's name, or `uid:0`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The token's name. What is done over TLS in a person's name (an approval)
    /// is done in this one, whatever the request says.
    pub fn token(&self) -> Option<&str> {
        self.token.then_some(self.name.as_str())
    }

    /// May it?
    pub fn may(&self, right: Right) -> bool {
        match (self.role, right) {
            (Role::Admin, _) | (_, Right::View) => true,
            (Role::Operator, Right::Operate) => true,
            (Role::Operator, Right::Test) => self.may.contains(&May::Test),
            (Role::Operator, Right::FailOver) => self.may.contains(&May::Failover),
            (Role::Operator, Right::Administer) | (Role::Viewer, _) => false,
        }
    }

    /// Why it may not, for whoever asked.
    pub fn lacks(&self, right: Right) -> String {
        let needs = match right {
            Right::View => "a token",
            Right::Operate => "a token of the role operator",
            Right::Test => "a token of the role operator with `--may test`",
            Right::FailOver => "a token of the role operator with `--may failover`",
            Right::Administer => "a token of the role admin",
        };
        format!(
            "'{}' may not do that: it needs {needs}; an administrator of the site makes one with: farhaven token add",
            self.name
        )
    }
}

/// What a route needs; `None` when nobody has said.
fn right_of(method: &Method, path: &str) -> Option<Right> {
    // A HEAD is a GET without its body.
    let method = match *method {
        Method::HEAD => "GET",
        ref method => method.as_str(),
    };
    let mut rights = RIGHTS.iter();
    let found = rights.find(|(of, at, _)| *of == method && *at == path);
    found.map(|(_, _, right)| *right)
}

/// Of every route that exists: lets through who may, and says in the log who
/// did what.
pub(super) async fn enforce(request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let matched = request.extensions().get::<MatchedPath>();
    let right = matched.and_then(|matched| right_of(&method, matched.as_str()));
    let Some(caller) = request.extensions().get::<Caller>().cloned() else {
        return refusal(
            StatusCode::UNAUTHORIZED,
            "nobody is known to ask".to_owned(),
        );
    };
    if matched.is_none() {
        // No such path: that is what the answer says, and all that it may say.
        let answer = next.run(request).await;
        return match answer.status() {
            StatusCode::NOT_FOUND => answer,
            _ => refusal(
                StatusCode::FORBIDDEN,
                format!("nobody has a right to {path}"),
            ),
        };
    }
    let Some(right) = right else {
        let known = matched.is_some_and(|matched| {
            let mut rights = RIGHTS.iter();
            rights.any(|(_, at, _)| *at == matched.as_str())
        });
        return match known {
            true => refusal(
                StatusCode::METHOD_NOT_ALLOWED,
                format!("{method} is no method of {path} in this version of the API"),
            ),
            false => refusal(
                StatusCode::FORBIDDEN,
                format!("nobody has a right to {path}: src/site/api/rights.rs does not name it"),
            ),
        };
    };
    if !caller.may(right) {
        tracing::warn!(by = caller.name(), %method, path, "refused: no right to it");
        return refusal(StatusCode::FORBIDDEN, caller.lacks(right));
    }
    let answer = next.run(request).await;
    let status = answer.status().as_u16();
    match right {
        Right::View => tracing::debug!(by = caller.name(), %method, path, status, "asked"),
        _ => tracing::info!(by = caller.name(), %method, path, status, "done"),
    }
    answer
}

/// Why a request goes no further: its status and its sentence.
pub(super) type Refused = (StatusCode, String);

pub(super) fn refusal(status: StatusCode, error: String) -> Response {
    (status, Json(ErrorBody { error, code: None })).into_response()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn roles_have_what_their_names_say() {
        let all = [
            Right::View,
            Right::Operate,
            Right::Test,
            Right::FailOver,
            Right::Administer,
        ];
        let has = |caller: Caller| all.map(|right| caller.may(right));
        let of = |role, may: &[May]| has(Caller::of_token("t".to_owned(), role, may.to_vec()));
        assert_eq!(of(Role::Viewer, &[]), [true, false, false, false, false]);
        assert_eq!(of(Role::Operator, &[]), [true, true, false, false, false]);
        assert_eq!(
            of(Role::Operator, &[May::Test]),
            [true, true, true, false, false]
        );
        assert_eq!(
            of(Role::Operator, &[May::Failover]),
            [true, true, false, true, false]
        );
        assert_eq!(of(Role::Admin, &[]), [true; 5]);
        assert_eq!(has(Caller::of_host(Some(0))), [true; 5]);
        // A right by name does not make a viewer an operator.
        let both = [May::Test, May::Failover];
        assert_eq!(of(Role::Viewer, &both), [true, false, false, false, false]);
        assert_eq!(Caller::of_host(Some(7)).token(), None);
    }

    #[test]
    fn every_route_has_one_right() {
        for (at, (method, path, right)) in RIGHTS.iter().enumerate() {
            let again = RIGHTS[at + 1..]
                .iter()
                .any(|(m, p, _)| m == method && p == path);
            assert!(!again, "{method} {path} twice");
            // Nothing that changes something is for viewers.
            assert!(*method == "GET" || *right != Right::View, "{method} {path}");
        }
        assert_eq!(right_of(&Method::HEAD, "/v1/status"), Some(Right::View));
        assert_eq!(right_of(&Method::POST, "/v1/status"), None);
    }

    #[test]
    fn what_lets_points_go_is_for_administrators() {
        for path in [
            "/v1/guests/{name}/points/release",
            "/v1/groups/{name}/points/release",
            "/v1/guests/{name}/prune",
        ] {
            let right = right_of(&Method::POST, path);
            assert_eq!(right, Some(Right::Administer), "{path}");
        }
    }
}
