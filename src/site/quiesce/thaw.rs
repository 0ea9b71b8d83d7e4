//! A guest that runs here from a point whose filesystems were frozen at its cut:
//! its agent, frozen with it, is told to thaw them. Until then it cannot write.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::activate::place::Ready;
use crate::guest::qemu::agent::thaw_until_done;
use crate::site::standby::Standby;

/// Frozen for longer than this is told.
const REMARKABLE: Duration = Duration::from_secs(2);

/// An agent that had not frozen them in time may have done so after that, at the
/// very cut: it is asked for so long.
const PERHAPS: Duration = Duration::from_secs(60);

impl Standby {
    /// Thaws what was frozen at the cut, in the background, until that is done or
    /// the machine has ended. `quiesced` as the point tells it.
    pub(in crate::site) fn thaw(self: &Arc<Self>, ready: Arc<Ready>, quiesced: Option<bool>) {
        let Some(frozen) = quiesced else { return };
        let Some(channel) = ready.agent() else {
            if frozen {
                self.frozen_still("there is no channel to its guest agent here");
            }
            return;
        };
        let (standby, runtime) = (self.clone(), tokio::runtime::Handle::current());
        // Its own: it may wait for long, and blocks.
        let thawing = std::thread::Builder::new().name("thaw".to_owned());
        let began = Instant::now();
        let thawing = thawing.spawn(move || {
            let goes_on = || !ready.is_ended() && (frozen || began.elapsed() < PERHAPS);
            let mut told = false;
            let done = thaw_until_done(&channel, None, goes_on, |error| {
                if frozen && !told && began.elapsed() >= REMARKABLE {
                    told = true;
                    standby.frozen_still(&error.to_string());
                }
            });
            if done && frozen {
                tracing::info!(guest = %standby.name(), after_ms = began.elapsed().as_millis() as u64, "its filesystems, frozen at the cut, are thawed");
                runtime.spawn(async move { standby.thawed(&ready, told).await });
            }
        });
        if let Err(error) = thawing {
            self.frozen_still(&error.to_string());
        }
    }

    fn frozen_still(&self, why: &str) {
        tracing::error!(guest = %self.name(), why, "it runs, and its filesystems are FROZEN still");
        self.see(|s| {
            s.trouble = format!(
                "it runs, and its filesystems are FROZEN still, as at the cut: {why}. By hand, inside of the guest: fsfreeze --unfreeze MOUNTPOINT"
            );
        });
    }

    /// A daemon that comes back need not thaw it any more.
    async fn thawed(self: Arc<Self>, ready: &Arc<Ready>, told: bool) {
        let mut state = self.state.lock().await;
        if !state.is_active(ready) {
            return;
        }
        let Some((active, _)) = &mut state.active else {
            return;
        };
        active.frozen = false;
        let active = active.clone();
        if let Ok(site) = self.site()
            && let Err(error) = site.keep_activation(&active)
        {
            tracing::error!(%error, "the catalogue cannot be written");
        }
        self.see(|s| {
            s.active = Some(active);
            if told {
                s.trouble.clear();
            }
        });
    }
}
