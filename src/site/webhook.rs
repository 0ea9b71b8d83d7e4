//! Events go where the configuration says: one HTTP POST each, in their order,
//! tried again until they are taken.
//!
//! Nothing ever waits for it: it reads the log of events as any client does, and
//! remembers in a small file what was taken, so that a restart neither forgets
//! nor repeats. What has become too old while nobody took it is left out, and
//! the next delivery says how many that were.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use farhaven_policies::decide::back_off;
use farhaven_policies::site::Notify;
use hyper::Uri;
use serde::{Deserialize, Serialize};

use super::Site;
use super::events::Event;
use crate::call::{Call, CallError, call};

/// Events that wait for a webhook that takes none; older ones are left out.
const WAITING: u64 = 1000;
/// How long one delivery may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// A webhook that answers, and refuses an event so often, does not get it.
const REFUSALS: u32 = 12;
/// From one look for events to the next.
const LOOK: Duration = Duration::from_millis(500);

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
    Refused(u16),
    /// It could not be reached, or did not answer.
    #[error("{0}")]
    Unreachable(String),
}

/// Delivers what happens from now on, and what was not taken before, until the
/// site is gone.
pub(super) fn deliver(site: &Arc<Site>) -> impl Future<Output = ()> + Send + 'static {
    let notify = site.config.notify.clone();
    let kept = site.config.site.state_dir.join("webhook");
    let newest = site.alerts.events.newest();
    deliver_after(Arc::downgrade(site), notify, kept, newest)
}

async fn deliver_after(site: Weak<Site>, notify: Notify, kept: PathBuf, newest: u64) {
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
            match post(&notify.webhook, &delivery).await {
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

/// Posts to where the configuration says, and nowhere else: an answer that
/// names another place is no success, and is not followed.
async fn post(url: &str, delivery: &Delivery) -> Result<(), DeliveryError> {
    let unreachable = |why: &dyn std::fmt::Display| DeliveryError::Unreachable(why.to_string());
    let body = serde_json::to_string(delivery).map_err(|e| unreachable(&e))?;
    let asked = Call {
        method: "POST",
        url,
        headers: &[("content-type", "application/json")],
        body: &body,
        timeout: PATIENCE,
    };
    match call(&asked).await {
        Ok(200..300) => Ok(()),
        Ok(status) => Err(DeliveryError::Refused(status)),
        // A whole address may hold a secret: what went wrong says it without.
        Err(CallError::TimedOut(..)) => Err(unreachable(&format!("no answer within {PATIENCE:?}"))),
        Err(CallError::Url(_, why)) => Err(unreachable(&why)),
        Err(error) => Err(unreachable(&error)),
    }
}
