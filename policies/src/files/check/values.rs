//! Single values that cannot be kept, whatever the rest says.

use crate::load::Origins;
use crate::policy::{SHORTEST_RPO, SMALLEST_CAPTURE_BUFFER, STRONGEST_THROTTLE, freeze_problem};
use crate::units::Period;
use crate::week::{minute_of_week, overlap, spans};

use super::super::{
    Alerts, Health, Mode, NamedPolicy, Network, Quiesce, Standby, is_bridge_name, is_card_address,
    is_network_address, mac_bytes,
};
use super::Found;

impl Found {
    pub(super) fn policy(&mut self, key: &str, policy: &NamedPolicy, origins: &Origins) {
        let field = |name: &str| format!("{key}.{name}");
        self.require(
            policy.rpo >= SHORTEST_RPO,
            &field("rpo"),
            format!(
                "is {}; the shortest that can be kept is {SHORTEST_RPO}",
                policy.rpo
            ),
        );
        if let Some(problem) = policy.retention.problem() {
            self.add(&field("retention"), problem);
        }
        self.require(
            (1..=100).contains(&policy.share),
            &field("share"),
            format!("is {}; expected 1 to 100 percent of the link", policy.share),
        );
        self.require(
            policy.max_pause > Period::ZERO,
            &field("max_pause"),
            "is 0s; no cut is free, try 100ms",
        );
        self.require(
            policy.max_pause < policy.rpo || policy.rpo < SHORTEST_RPO,
            &field("max_pause"),
            format!(
                "is {}, no shorter than the rpo of {}",
                policy.max_pause, policy.rpo
            ),
        );
        self.require(
            policy.max_blackout > Period::ZERO,
            &field("max_blackout"),
            "is 0s; no move is free, try 500ms",
        );
        self.require(
            policy.max_throttle <= STRONGEST_THROTTLE,
            &field("max_throttle"),
            format!(
                "is {}; at most {STRONGEST_THROTTLE} percent can be taken, 0 means never throttle",
                policy.max_throttle
            ),
        );
        self.require(
            policy.capture_buffer >= SMALLEST_CAPTURE_BUFFER,
            &field("capture_buffer"),
            format!(
                "is {}; at least {SMALLEST_CAPTURE_BUFFER} is needed",
                policy.capture_buffer
            ),
        );
        self.require(
            policy.mode == Mode::Memory || policy.standby != Standby::Warm,
            &field("standby"),
            "is warm, but the mode disk-only copies no memory to keep ready; use cold or auto",
        );
        if policy.quiesce == Quiesce::Agent
            && let Some(problem) = freeze_problem(policy.quiesce_timeout, policy.rpo)
        {
            self.require(false, &field("quiesce_timeout"), problem);
        }
        self.windows(key, policy, origins);
    }

    fn windows(&mut self, key: &str, policy: &NamedPolicy, origins: &Origins) {
        let windows: Vec<_> = policy
            .windows
            .iter()
            .filter(|(name, _)| !origins.mistaken_in(&format!("{key}.windows.{name}")))
            .map(|(name, window)| (name, spans(window.days, window.from, window.until)))
            .collect();
        for (index, (name, covered)) in windows.iter().enumerate() {
            self.name(&format!("{key}.windows"), name);
            let given = |field: &str| {
                origins
                    .of_key(&format!("{key}.windows.{name}.{field}"))
                    .is_some()
            };
            let asked = ["days", "from", "until"].into_iter().any(given);
            self.require(
                asked || !origins.any_file(),
                &format!("{key}.windows.{name}"),
                "says neither days nor times; give days, from or until",
            );
            // Windows are few; a file of thousands is told of the first ones it compares.
            for (other, before) in windows[..index].iter().take(100) {
                if let Some(minute) = overlap(before, covered) {
                    self.add(
                        &format!("{key}.windows.{name}"),
                        format!("overlaps window '{other}', both hold at {}; change one's days or times", minute_of_week(minute)),
                    );
                }
            }
        }
    }

    pub(super) fn health(&mut self, key: &str, health: &Health, origins: &Origins) {
        let kinds = [
            health.tcp.is_some(),
            health.http.is_some(),
            health.agent.is_some(),
            health.script.is_some(),
        ];
        let count = kinds.iter().filter(|given| **given).count();
        self.require(
            count == 1 || origins.mistaken_in(key),
            key,
            format!("has {count} of tcp, http, agent and script; give exactly one"),
        );
        if let Some(address) = &health.tcp {
            self.address(&format!("{key}.tcp"), address);
        }
        if let Some(url) = &health.http {
            let rest = url
                .strip_prefix("http://")
                .or_else(|| url.strip_prefix("https://"));
            let host = rest.map(|rest| rest.split('/').next().unwrap_or_default());
            let sound =
                host.is_some_and(|host| !host.is_empty()) && !url.contains(char::is_whitespace);
            self.require(
                sound,
                &format!("{key}.http"),
                format!("is {url:?}; expected a URL like http://10.8.0.5:8080/health"),
            );
        }
        self.require(
            health.agent != Some(false),
            &format!("{key}.agent"),
            "is false, which checks nothing; take it out",
        );
        if let Some(script) = &health.script {
            let absolute = script
                .first()
                .is_some_and(|program| program.starts_with('/'));
            self.require(
                absolute,
                &format!("{key}.script"),
                "must begin with the absolute path of a program",
            );
        }
        self.require(
            health.every > Period::ZERO,
            &format!("{key}.every"),
            "is 0s; try 2s",
        );
        self.require(
            health.timeout >= health.every,
            &format!("{key}.timeout"),
            format!(
                "is {}, shorter than the {} from one try to the next",
                health.timeout, health.every
            ),
        );
    }

    pub(super) fn network(&mut self, key: &str, network: &Network) {
        let bridge = &network.bridge;
        self.require(
            !bridge.is_empty(),
            &format!("{key}.bridge"),
            "is missing; name a bridge of the peer, like br0",
        );
        self.require(
            bridge.is_empty() || is_bridge_name(bridge),
            &format!("{key}.bridge"),
            format!("is {bridge:?}; the name of a bridge is up to 15 letters, digits, -, _ and . of them; a whole QEMU netdev goes under [networks] in the peer's configuration"),
        );
        if !network.mac.is_empty() {
            let mac = mac_bytes(&network.mac);
            self.require(
                mac.is_some(),
                &format!("{key}.mac"),
                format!(
                    "is {:?}; expected an address like 52:54:00:12:34:56",
                    network.mac
                ),
            );
            self.require(
                mac.is_none_or(is_card_address),
                &format!("{key}.mac"),
                "is a multicast address; make the second digit even",
            );
        }
        for address in &network.addresses {
            let sound = is_network_address(address);
            self.require(
                sound,
                &format!("{key}.addresses"),
                format!("has {address:?}; expected an address like 10.8.0.5/24"),
            );
        }
    }

    pub(super) fn address(&mut self, key: &str, address: &str) {
        let sound = address.rsplit_once(':').is_some_and(|(host, port)| {
            !host.is_empty()
                && !host.contains(char::is_whitespace)
                && port.parse::<u16>().is_ok_and(|port| port != 0)
        });
        self.require(sound, key, format!("has {address:?}; expected host:port"));
    }

    pub(super) fn alerts(&mut self, alerts: &Alerts) {
        self.require(
            alerts.rpo_warning >= 1,
            "alerts.rpo_warning",
            "is 0, which always warns; try 2",
        );
        self.require(
            alerts.rpo_critical > alerts.rpo_warning,
            "alerts.rpo_critical",
            format!(
                "is {}, not above 'alerts.rpo_warning' of {}",
                alerts.rpo_critical, alerts.rpo_warning
            ),
        );
        self.require(
            alerts.test_overdue > Period::ZERO,
            "alerts.test_overdue",
            "is 0s, which is always over; try 30d",
        );
        self.require(
            alerts.clock_skew > Period::ZERO,
            "alerts.clock_skew",
            "is 0s; no two clocks are the same, try 1s",
        );
        self.require(
            (1..=100).contains(&alerts.store_critical),
            "alerts.store_critical",
            format!("is {}; expected 1 to 100 percent", alerts.store_critical),
        );
        self.require(
            alerts.store_warning < alerts.store_critical,
            "alerts.store_warning",
            format!(
                "is {}, not below 'alerts.store_critical' of {}",
                alerts.store_warning, alerts.store_critical
            ),
        );
    }
}
