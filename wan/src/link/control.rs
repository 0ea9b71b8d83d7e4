//! Our congestion controller as quinn wants it: [`RateController`] behind quinn's traits.
//!
//! quinn sends while fewer bytes than the window are in flight, and paces at 1.25 windows
//! a smoothed round trip; the window alone therefore governs the rate.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory};

use crate::rate::{RateController, RateOptions, RateStatus};

/// Makes a controller for every connection that a transport configuration serves.
pub(crate) fn factory(options: &RateOptions) -> Arc<dyn ControllerFactory + Send + Sync> {
    Arc::new(Factory {
        options: options.clone(),
    })
}

/// What the controller of a connection knows of its path; `None` for another controller.
/// quinn hands out a copy of a connection's controller by `Connection::congestion_state`.
pub(crate) fn status(state: Box<dyn Controller>) -> Option<RateStatus> {
    let adapter = state.into_any().downcast::<Adapter>().ok()?;
    Some(adapter.rate.status())
}

struct Factory {
    options: RateOptions,
}

impl ControllerFactory for Factory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Adapter {
            rate: RateController::new(self.options.clone(), now, current_mtu),
        })
    }
}

#[derive(Clone)]
struct Adapter {
    rate: RateController,
}

impl Controller for Adapter {
    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        _rtt: &RttEstimator,
    ) {
        self.rate.on_ack(now, sent, bytes, app_limited);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        _in_flight: u64,
        _app_limited: bool,
        _largest_packet_num_acked: Option<u64>,
    ) {
        self.rate.on_end_acks(now);
    }

    fn on_congestion_event(
        &mut self,
        _now: Instant,
        _sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.rate.on_lost(lost_bytes, is_persistent_congestion);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.rate.on_mtu(new_mtu);
    }

    fn window(&self) -> u64 {
        self.rate.window()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.rate.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
