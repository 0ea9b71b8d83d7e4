//! What a site measures, for Prometheus: `GET /v1/metrics`, in the OpenMetrics
//! text format. The values are those of `status`; a figure that is not known is
//! left out.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use super::Site;
use super::view::{PeerView, SourceView, TargetView};

/// Names and values of labels.
type Labels = Vec<(&'static str, String)>;
type Gauges = Family<Labels, Gauge<f64, std::sync::atomic::AtomicU64>>;
type Counters = Family<Labels, Counter>;

/// What a line is about.
struct Board<'a> {
    registry: &'a mut Registry,
}

impl Board<'_> {
    fn gauge(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        values: impl IntoIterator<Item = (Labels, Option<f64>)>,
    ) {
        let family = Gauges::default();
        for (labels, value) in values {
            if let Some(value) = value {
                family.get_or_create(&labels).set(value);
            }
        }
        match unit {
            Some(unit) => self.registry.register_with_unit(name, help, unit, family),
            None => self.registry.register(name, help, family),
        }
    }

    fn counter(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        values: impl IntoIterator<Item = (Labels, u64)>,
    ) {
        let family = Counters::default();
        for (labels, value) in values {
            family.get_or_create(&labels).inc_by(value);
        }
        match unit {
            Some(unit) => self.registry.register_with_unit(name, help, unit, family),
            None => self.registry.register(name, help, family),
        }
    }

    fn guests(&mut self, guests: &[SourceView]) {
        let labels = |guest: &SourceView| {
            let peer = guest.peer.clone().unwrap_or_default();
            vec![("guest", guest.name.clone()), ("peer", peer)]
        };
        let seconds = |ms: Option<u64>| ms.map(|ms| ms as f64 / 1e3);
        let each = |value: &dyn Fn(&SourceView) -> Option<f64>| -> Vec<_> {
            guests.iter().map(|g| (labels(g), value(g))).collect()
        };
        let total = |value: &dyn Fn(&SourceView) -> u64| -> Vec<_> {
            guests.iter().map(|g| (labels(g), value(g))).collect()
        };
        let unit = || Some(Unit::Seconds);
        self.gauge(
            "guest_rpo",
            "Age of the newest sealed point",
            unit(),
            each(&|g| seconds(g.rpo_ms)),
        );
        self.gauge(
            "guest_rpo_target",
            "What it should be at most",
            unit(),
            each(&|g| seconds(g.rpo_target_ms)),
        );
        self.gauge(
            "guest_pause",
            "How long the last cut stopped the guest",
            unit(),
            each(&|g| g.last_pause_ms.map(|ms| ms / 1e3)),
        );
        self.gauge(
            "guest_seal",
            "From the last cut until it was sealed",
            unit(),
            each(&|g| seconds(g.last_seal_ms)),
        );
        self.gauge(
            "guest_newest_point",
            "Number of the newest sealed point",
            None,
            each(&|g| Some(g.newest_point as f64)),
        );
        self.gauge(
            "guest_waiting",
            "Bytes that the last round left to the cut",
            Some(Unit::Bytes),
            each(&|g| Some(g.waiting_bytes as f64)),
        );
        self.counter(
            "guest_points_sealed",
            "Points sealed since the daemon started",
            None,
            total(&|g| g.points_sealed),
        );
        self.counter(
            "guest_changed",
            "Guest bytes handed over",
            Some(Unit::Bytes),
            total(&|g| g.guest_bytes),
        );
        self.counter(
            "guest_sent",
            "Bytes of batches that carried them",
            Some(Unit::Bytes),
            total(&|g| g.wan_bytes),
        );
        let phases = guests.iter().map(|guest| {
            let mut labels = labels(guest);
            let phase = serde_json::to_value(guest.phase).unwrap_or_default();
            labels.push(("phase", phase.as_str().unwrap_or_default().to_owned()));
            (labels, Some(1.0))
        });
        self.gauge(
            "guest_phase",
            "Where its protection stands",
            None,
            phases.collect::<Vec<_>>(),
        );
    }

    fn standbys(&mut self, standbys: &[TargetView]) {
        let each = |value: &dyn Fn(&TargetView) -> Option<f64>| -> Vec<_> {
            let labels = |s: &TargetView| vec![("guest", s.name.clone()), ("from", s.from.clone())];
            standbys.iter().map(|s| (labels(s), value(s))).collect()
        };
        let is = |so: bool| Some(f64::from(u8::from(so)));
        self.gauge(
            "standby_rpo",
            "What a failover now would lose",
            Some(Unit::Seconds),
            each(&|s| s.rpo_ms.map(|ms| ms as f64 / 1e3)),
        );
        self.gauge(
            "standby_points",
            "Points that can be run",
            None,
            each(&|s| Some(s.points as f64)),
        );
        self.gauge(
            "standby_active",
            "1 where it was taken over and runs here",
            None,
            each(&|s| is(s.active.is_some())),
        );
        self.gauge(
            "standby_test",
            "1 while a test of it runs here",
            None,
            each(&|s| is(s.test.is_some())),
        );
    }

    fn peers(&mut self, peers: &[PeerView]) {
        let labels = |peer: &PeerView| vec![("peer", peer.site.clone())];
        let each = |value: &dyn Fn(&PeerView) -> Option<f64>| -> Vec<_> {
            peers.iter().map(|p| (labels(p), value(p))).collect()
        };
        let total = |value: &dyn Fn(&PeerView) -> u64| -> Vec<_> {
            peers.iter().map(|p| (labels(p), value(p))).collect()
        };
        let bytes = || Some(Unit::Bytes);
        self.gauge(
            "peer_connected",
            "1 where there is a connection",
            None,
            each(&|p| Some(f64::from(u8::from(p.connected)))),
        );
        self.gauge(
            "peer_rtt",
            "Measured round trip",
            Some(Unit::Seconds),
            each(&|p| p.rtt_ms.map(|ms| ms / 1e3)),
        );
        self.gauge(
            "peer_queued",
            "Bytes of batches that wait to leave, or are on the wire",
            bytes(),
            each(&|p| Some(p.queued_bytes as f64)),
        );
        self.counter(
            "peer_sent",
            "UDP bytes sent to it",
            bytes(),
            total(&|p| p.sent_bytes),
        );
        self.counter(
            "peer_received",
            "UDP bytes received from it",
            bytes(),
            total(&|p| p.received_bytes),
        );
        self.counter(
            "peer_sent_packets",
            "Packets sent",
            None,
            total(&|p| p.sent_packets),
        );
        self.counter(
            "peer_lost_packets",
            "Packets found lost",
            None,
            total(&|p| p.lost_packets),
        );
        self.counter(
            "peer_resent",
            "Bytes of batches that left again although they had arrived",
            bytes(),
            total(&|p| p.resent_bytes),
        );
        self.counter(
            "peer_repeated",
            "Bytes of batches that came although they were here",
            bytes(),
            total(&|p| p.repeated_bytes),
        );
        self.counter(
            "peer_asked_units",
            "Units that it was asked for by digest",
            None,
            total(&|p| p.asked_units),
        );
        self.counter(
            "peer_found_units",
            "Of those, how many it held",
            None,
            total(&|p| p.found_units),
        );
    }
}

impl Site {
    /// All figures of the site, as OpenMetrics text.
    ///
    /// # Errors
    /// When they cannot be written as text, which does not happen.
    pub fn metrics(&self) -> Result<String, std::fmt::Error> {
        let view = self.view();
        let mut registry = Registry::with_prefix("farhaven");
        let build = Info::new(vec![
            ("version", view.version.clone()),
            ("site", view.site.clone()),
        ]);
        registry.register("build", "Which version this site runs", build);
        let mut board = Board {
            registry: &mut registry,
        };
        board.guests(&view.guests);
        board.standbys(&view.standbys);
        board.peers(&view.peers);
        let mut alerts: BTreeMap<Labels, f64> = BTreeMap::new();
        for alert in &view.alerts {
            let labels = vec![
                ("kind", alert.kind.to_string()),
                ("severity", alert.severity.to_string()),
                ("acknowledged", alert.acknowledged_by.is_some().to_string()),
            ];
            *alerts.entry(labels).or_default() += 1.0;
        }
        let alerts = alerts
            .into_iter()
            .map(|(labels, count)| (labels, Some(count)));
        board.gauge("alerts", "Alerts that stand", None, alerts);
        let skews = self.alerts.skews().clone();
        let skews = skews.into_iter().map(|(peer, skew)| {
            let sign = if skew.ahead { 1.0 } else { -1.0 };
            (vec![("peer", peer)], Some(sign * skew.by.as_secs_f64()))
        });
        board.gauge(
            "peer_clock_skew",
            "By how much its clock is ahead of this one's",
            Some(Unit::Seconds),
            skews,
        );
        let remotes = self.remotes.read().unwrap_or_else(PoisonError::into_inner);
        let stores: Vec<_> = remotes
            .values()
            .map(|remote| {
                let bytes = remote.incoming.store.bytes();
                (
                    vec![("peer", remote.record.site.clone())],
                    Some(bytes as f64),
                )
            })
            .collect();
        drop(remotes);
        board.gauge(
            "store",
            "Bytes of the segments of what a peer sent",
            Some(Unit::Bytes),
            stores,
        );
        let scrubs = self.scrubs();
        let of = |view: &super::scrub::ScrubView, value: f64| {
            (vec![("peer", view.peer.clone())], Some(value))
        };
        let damaged = scrubs.iter().map(|view| of(view, view.damaged as f64));
        board.gauge(
            "store_damaged",
            "Pieces of what a peer sent that are damaged on disk",
            None,
            damaged.collect::<Vec<_>>(),
        );
        let healing = scrubs
            .iter()
            .map(|view| of(view, view.healing.len() as f64));
        board.gauge(
            "store_healing",
            "Guests whose newest point needs some of that",
            None,
            healing.collect::<Vec<_>>(),
        );
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }
}
