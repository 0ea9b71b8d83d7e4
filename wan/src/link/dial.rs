//! Dialling a peer, and dialling it again, as long as it is trusted.

use std::sync::Arc;
use std::time::Duration;

use quinn::{ClientConfig, Connection};
use rand::Rng;
use tokio::time::timeout;

use super::close::describe;
use super::connection;
use super::node::Site;
use super::remote::Remote;
use super::tls::Purpose;
use crate::peer::SiteKey;

/// Most addresses of one name that are tried.
const MAX_RESOLVED: usize = 8;

/// A connection that was the link for this long was a good one: the next is
/// dialled at once.
const GOOD: Duration = Duration::from_secs(2);

/// Keeps the link of a peer up from this side, until the trust ends.
pub(crate) async fn keep_up(site: Arc<Site>, remote: Arc<Remote>) {
    let mut closed = remote.closed.subscribe();
    tokio::select! {
        _ = closed.wait_for(|closed| *closed) => {}
        never = redial(&site, &remote) => match never {},
    }
}

async fn redial(site: &Arc<Site>, remote: &Arc<Remote>) -> std::convert::Infallible {
    let (shortest, longest) = remote.options.redial;
    let mut wait = shortest;
    let mut connected = remote.connected.subscribe();
    loop {
        // The peer may have dialled this side, or an older connection lives on.
        let _ = connected.wait_for(|connected| !*connected).await;
        let record = remote.record();
        let dialled = if record.dial {
            dial(site, &record.addresses, remote.key, Purpose::Session).await
        } else {
            Err("this side does not dial".to_owned())
        };
        match dialled {
            Ok(connection) => {
                let (lived, why) = connection::run(remote.clone(), connection, true).await;
                tracing::info!(peer = %record.site, "link ended: {why}");
                if lived.is_some_and(|lived| lived >= GOOD) {
                    wait = shortest;
                }
            }
            Err(why) => {
                if record.dial {
                    tracing::debug!(peer = %record.site, "dialling failed: {why}");
                    remote.state().why_last_disconnect = Some(why);
                }
            }
        }
        // Jitter, so that two sites that lost each other do not stay in step.
        let spread = rand::rng().random_range(0.75..1.25);
        tokio::time::sleep(wait.mul_f64(spread)).await;
        wait = (wait * 2).min(longest);
    }
}

/// Dials the site of a key at each of its addresses until one answers.
/// The error is a sentence for the operator.
pub(crate) async fn dial(
    site: &Site,
    addresses: &[String],
    key: SiteKey,
    purpose: Purpose,
) -> Result<Connection, String> {
    let crypto = site
        .tls
        .client(key, purpose)
        .map_err(|error| error.to_string())?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(site.transport.clone());
    let mut failures = Vec::new();
    for address in addresses {
        match dial_address(site, address, config.clone()).await {
            Ok(connection) => return Ok(connection),
            Err(why) => failures.push(format!("{address}: {why}")),
        }
    }
    if failures.is_empty() {
        failures.push("it has no address; pair again, or correct its record".to_owned());
    }
    Err(failures.join("; "))
}

async fn dial_address(
    site: &Site,
    address: &str,
    config: ClientConfig,
) -> Result<Connection, String> {
    let limit = site.options.link.handshake_timeout;
    let resolved = timeout(limit, tokio::net::lookup_host(address))
        .await
        .map_err(|_| "its name was not resolved in time".to_owned())?
        .map_err(|error| format!("its name cannot be resolved ({error})"))?;
    let mut why = "its name has no IPv4 address, and this site listens on IPv4 only".to_owned();
    let ours = site.local_address;
    for target in resolved
        .filter(|target| ours.is_ipv6() || target.is_ipv4())
        .take(MAX_RESOLVED)
    {
        let connecting =
            match site
                .endpoint
                .connect_with(config.clone(), target, crate::SERVER_NAME)
            {
                Ok(connecting) => connecting,
                Err(error) => {
                    why = error.to_string();
                    continue;
                }
            };
        match timeout(limit, connecting).await {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(error)) => why = describe(&error),
            Err(_) => why = describe(&quinn::ConnectionError::TimedOut),
        }
    }
    Err(why)
}
