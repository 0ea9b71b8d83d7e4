//! Events go where the configuration says: one HTTP POST each, in their order,
//! tried again until they are taken.
//!
//! Nothing ever waits for it: it reads the log of events as any client does, and
//! remembers in a small file what was taken, so that a restart neither forgets
//! nor repeats. What has become too old while nobody took it is left out, and
//! the next delivery says how many that were.

use std::path::Path;
use std::sync::Weak;
use std::time::Duration;

use bytes::Bytes;
use farhaven_policies::decide::back_off;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, Uri};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;

use super::Site;
use super::events::Event;

/// Events that wait for a webhook that takes none; older ones are left out.
const WAITING: u64 = 1000;
/// How long one delivery may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// A webhook that answers, and refuses an event so often, does not get it.
const REFUSALS: u32 = 12;
/// From one look for events to the next.
const LOOK: Duration = Duration::from_millis(500);
/// Bytes of an answer that are read; they say nothing that is needed.
const ANSWER: usize = 64 * 1024;

/// What is posted.
#[derive(Debug, Serialize, Deserialize)]
pub struct Delivery {
    /// Of this form: 1. Fields may be added under the same number.
    pub version: u32,
    /// The site that tells.
    pub site: String,
    /// Events that were left out just before this one.
    pub missed: u64,
    /// What happened.
    pub event: Event,
}

/// Why a delivery failed.
#[derive(Debug, thiserror::Error)]
enum DeliveryError {
    /// It answered, and did not take it.
    #[error("it answered {0}")]
    Refused(hyper::StatusCode),
    /// It could not be reached, or did not answer.
    #[error("{0}")]
    Unreachable(String),
}

/// Delivers until the site is gone.
pub(super) async fn deliver(site: Weak<Site>) {
    let Some(strong) = site.upgrade() else { return };
    let notify = strong.config.notify.clone();
    let kept = strong.config.site.state_dir.join("webhook");
    let newest = strong.alerts.events.newest();
    drop(strong);
    let uri: Uri = match notify.webhook.parse() {
        Ok(uri) if !notify.webhook.is_empty() => uri,
        _ => return,
    };
    // One that is new is told of what happens from now on.
    let mut taken = read(&kept)
        .filter(|taken| *taken <= newest)
        .unwrap_or(newest);
    let (mut failures, mut missed) = (0, 0);
    loop {
        let Some(strong) = site.upgrade() else { return };
        let oldest = strong.alerts.events.newest().saturating_sub(WAITING);
        if taken < oldest {
            missed += oldest - taken;
            taken = oldest;
        }
        let event = strong.events(taken, 1, LOOK).await.pop();
        let Some(event) = event else { continue };
        let name = strong.config.site.name.clone();
        // A webhook that hangs must not keep the site.
        drop(strong);
        let number = event.number;
        if event.severity >= notify.severity {
            let delivery = Delivery {
                version: 1,
                site: name,
                missed,
                event,
            };
            match post(&uri, &delivery).await {
                Ok(()) => (failures, missed) = (0, 0),
                Err(DeliveryError::Refused(status)) if failures >= REFUSALS => {
                    tracing::error!(event = number, %status, "the webhook refuses an event; it is left out");
                    failures = 0;
                    missed += 1;
                }
                Err(error) => {
                    failures += 1;
                    // A whole address may hold a secret.
                    let to = uri.host().unwrap_or_default();
                    tracing::warn!(to, event = number, failures, %error, "the webhook took no event; it is tried again");
                    tokio::time::sleep(back_off(failures)).await;
                    continue;
                }
            }
        }
        taken = number;
        let Some(strong) = site.upgrade() else { return };
        let bytes = format!("{taken}\n").into_bytes();
        strong.alerts.events.replace(kept.clone(), bytes);
    }
}

fn read(kept: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(kept).ok()?;
    text.strip_suffix('\n')?.parse().ok()
}

async fn post(uri: &Uri, delivery: &Delivery) -> Result<(), DeliveryError> {
    let unreachable = |why: &dyn std::fmt::Display| DeliveryError::Unreachable(why.to_string());
    let body = serde_json::to_vec(delivery).map_err(|e| unreachable(&e))?;
    match tokio::time::timeout(PATIENCE, send(uri, body)).await {
        Ok(Ok(status)) if status.is_success() => Ok(()),
        Ok(Ok(status)) => Err(DeliveryError::Refused(status)),
        Ok(Err(why)) => Err(DeliveryError::Unreachable(why)),
        Err(_) => Err(unreachable(&format!("no answer within {PATIENCE:?}"))),
    }
}

/// Posts to where the configuration says, and nowhere else: an answer that
/// names another place is no success, and is not followed.
async fn send(uri: &Uri, body: Vec<u8>) -> Result<hyper::StatusCode, String> {
    let told = |error: &dyn std::fmt::Display| error.to_string();
    let authority = uri.authority().ok_or("it has no host")?;
    let host = authority.host().trim_matches(['[', ']']);
    let stream = TcpStream::connect((host, authority.port_u16().unwrap_or(80)));
    let stream = TokioIo::new(stream.await.map_err(|e| told(&e))?);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream)
        .await
        .map_err(|e| told(&e))?;
    let connection = tokio::spawn(connection);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::post(path)
        .header(
            "host",
            authority.as_str().rsplit('@').next().unwrap_or_default(),
        )
        .header("content-type", "application/json")
        .header(
            "user-agent",
            concat!("farhaven/", env!("CARGO_PKG_VERSION")),
        )
        .body(Full::new(Bytes::from(body)))
        .map_err(|e| told(&e))?;
    let answered = sender.send_request(request).await;
    let status = match answered {
        Ok(answer) => {
            let status = answer.status();
            let _ = Limited::new(answer.into_body(), ANSWER).collect().await;
            Ok(status)
        }
        Err(error) => Err(told(&error)),
    };
    connection.abort();
    status
}
