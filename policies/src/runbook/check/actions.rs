//! What is wrong with the keys that steps of one kind have.

use std::collections::BTreeSet;

use super::super::{ANYONE, Action, Mode, OnError, PointChoice, Readiness, Runbook, Step};
use super::{Finding, runs};
use crate::units::Period;

impl Finding {
    pub(super) fn action(&mut self, runbook: &Runbook, index: usize, step: &Step) {
        match &step.action {
            Action::Check { checks } => {
                let idle =
                    runs(runbook, step, Mode::Unplanned) && checks.contains(&Readiness::Link);
                self.require(!idle || step.on_error == OnError::Continue, index, "checks", || {
                    "has link, which fails in unplanned mode when the source is lost; use on-error = \"continue\" or a step of its own".to_owned()
                });
            }
            Action::Approve { by, approvals, .. } => {
                self.require(!by.is_empty(), index, "by", || {
                    "is empty; name who may decide, or [\"*\"] for whoever operates the site"
                        .to_owned()
                });
                let mut seen = BTreeSet::new();
                for name in by {
                    self.require(!name.trim().is_empty(), index, "by", || {
                        "has an empty name".to_owned()
                    });
                    self.require(seen.insert(name), index, "by", || {
                        format!("names {name:?} twice")
                    });
                }
                self.require(*approvals > 0, index, "approvals", || {
                    "is 0; at least one must agree".to_owned()
                });
                let open = by.iter().any(|name| name == ANYONE);
                self.require(
                    open || usize::from(*approvals) <= by.len() || by.is_empty(),
                    index,
                    "approvals",
                    || format!("is {approvals}, but 'by' names only {}", by.len()),
                );
            }
            Action::Promote { point } => {
                let pinned = matches!(point, PointChoice::Number(_));
                self.require(!pinned || !runs(runbook, step, Mode::Planned), index, "point", || {
                    "is a fixed point, but a planned move goes on from the last instruction; leave planned out of its modes".to_owned()
                });
            }
            Action::Remap { networks } => {
                for (network, bridge) in networks {
                    let plain = bridge
                        .bytes()
                        .all(|byte| byte.is_ascii_graphic() && byte != b'/');
                    self.require((1..=15).contains(&bridge.len()) && plain, index, &format!("networks.{network}"), || {
                        format!("is {bridge:?}; expected a bridge, up to 15 letters without blanks and slashes")
                    });
                }
            }
            Action::WaitHealthy {
                tcp,
                http,
                agent,
                script,
                every,
            } => {
                let given = [
                    tcp.is_some(),
                    http.is_some(),
                    agent.is_some(),
                    script.is_some(),
                ];
                let count = given.into_iter().filter(|given| *given).count();
                let key = ["script", "agent", "http"]
                    .into_iter()
                    .zip([given[3], given[2], given[1]]);
                let key = key
                    .filter(|(_, given)| *given)
                    .map(|(key, _)| key)
                    .next()
                    .unwrap_or("tcp");
                self.require(count <= 1, index, key, || {
                    "is one check too many; one step looks at one of tcp, http, agent and script"
                        .to_owned()
                });
                if let Some(address) = tcp {
                    let sound = address.rsplit_once(':').is_some_and(|(host, port)| {
                        !host.is_empty()
                            && !host.contains(char::is_whitespace)
                            && port.parse::<u16>().is_ok_and(|port| port != 0)
                    });
                    self.require(sound, index, "tcp", || {
                        format!("is {address:?}; expected host:port")
                    });
                }
                if let Some(url) = http {
                    self.url(index, "http", url);
                }
                self.require(*agent != Some(false), index, "agent", || {
                    "is false, which checks nothing; take it out".to_owned()
                });
                if let Some(script) = script {
                    self.command(index, "script", script);
                }
                let limit = step.limit().unwrap_or(Period::ZERO);
                self.require(*every > Period::ZERO, index, "every", || {
                    "is 0s; try 2s".to_owned()
                });
                self.require(
                    *every <= limit || limit == Period::ZERO,
                    index,
                    "every",
                    || format!("is {every}, longer than the {limit} that the step has"),
                );
            }
            Action::Exec { run, undo, .. } => {
                self.command(index, "run", run);
                if !undo.is_empty() {
                    self.command(index, "undo", undo);
                }
            }
            Action::Webhook { url, undo, .. } => {
                self.url(index, "url", url);
                if let Some(undo) = undo {
                    self.url(index, "undo", undo);
                }
            }
            Action::Delay { period } => {
                self.require(*period > Period::ZERO, index, "for", || {
                    "is 0s; take the step out".to_owned()
                });
            }
            _ => {}
        }
    }

    fn url(&mut self, index: usize, key: &str, url: &str) {
        let rest = url
            .strip_prefix("http://")
            .or_else(|| url.strip_prefix("https://"));
        let host = rest.map(|rest| rest.split('/').next().unwrap_or_default());
        let plain = !url.contains(|c: char| c.is_whitespace() || c.is_control());
        let sound = host.is_some_and(|host| !host.is_empty()) && plain;
        self.require(sound, index, key, || {
            format!("is {url:?}; expected a URL like https://10.8.0.5:8080/health")
        });
    }

    fn command(&mut self, index: usize, key: &str, command: &[String]) {
        let sound = command
            .first()
            .is_some_and(|program| program.starts_with('/'));
        self.require(sound, index, key, || {
            "must begin with the absolute path of a program".to_owned()
        });
        let whole = !command.iter().any(|word| word.contains('\0'));
        self.require(whole, index, key, || "has a zero byte in it".to_owned());
    }
}
