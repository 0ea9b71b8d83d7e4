//! Which values of a site's configuration cannot be used, and what to do instead.

use crate::bandwidth;
use crate::files::PolicyFiles;
use crate::load::{Checked, Problem};
use crate::shape::Shape;
use crate::units::{ByteSize, Period};

use super::{Link, SiteConfig, Store};

/// Longest name of a site: it becomes part of file names.
const LONGEST_NAME: usize = 63;
/// Longest path of a unix socket that Linux takes.
const LONGEST_SOCKET: usize = 107;

impl Checked for SiteConfig {
    const HELP: &'static str = "`farhaven site init` writes a file with every key";

    fn neighbour(key: &str) -> bool {
        Shape::of::<PolicyFiles>().child(key).is_some()
    }

    fn problems(&self) -> Vec<Problem> {
        let mut found = Vec::new();
        let mut require = |holds: bool, key: &str, what: &str| {
            if !holds {
                found.push(Problem::new(key, what));
            }
        };
        let name = &self.site.name;
        let plain = name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        require(
            !name.is_empty(),
            "site.name",
            "is missing; name this data centre, like name = \"berlin\"",
        );
        require(
            plain && name.len() <= LONGEST_NAME && !name.starts_with('-'),
            "site.name",
            "may have up to 63 small letters, digits and hyphens, no hyphen first, like berlin-2",
        );
        require(
            self.site.state_dir.is_absolute(),
            "site.state_dir",
            "must be an absolute path",
        );
        require(
            self.listen.address.port() != 0,
            "listen.address",
            "has port 0; peers need a fixed one, like 0.0.0.0:4747",
        );
        for address in &self.listen.advertise {
            let sound = address.rsplit_once(':').is_some_and(|(host, port)| {
                !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0)
            });
            require(
                sound,
                "listen.advertise",
                &format!("has {address:?}; expected host:port"),
            );
        }
        let policies = self.policy_files();
        require(
            policies.is_none_or(|path| path.is_absolute()),
            "site.policy_files",
            "must be an absolute path, of a file or a directory",
        );
        for (key, path) in [
            ("api.socket", self.api_socket()),
            ("store.dir", self.store_dir()),
            ("activate.ram_dir", self.ram_dir()),
            ("activate.run_dir", self.run_dir()),
        ] {
            require(path.is_absolute(), key, "must be an absolute path");
            let braces = path.to_string_lossy().contains(['{', '}']);
            require(
                !braces,
                key,
                "has an unknown placeholder; {state_dir} and {name} are known",
            );
        }
        require(
            self.api_socket().as_os_str().len() <= LONGEST_SOCKET,
            "api.socket",
            "is longer than the 107 bytes that Linux allows a socket's path; choose a shorter one",
        );
        let api = &self.api;
        require(
            api.listen.is_empty() || api.listen_address().is_some(),
            "api.listen",
            "is no address and port, like 10.0.0.5:4748",
        );
        require(
            api.listen_address().is_none_or(|at| at.port() != 0),
            "api.listen",
            "has port 0; clients need a fixed one, like 10.0.0.5:4748",
        );
        let empty = |path: &std::path::Path| path.as_os_str().is_empty();
        require(
            empty(&api.certificate) == empty(&api.key),
            "api.certificate",
            "and api.key go together; name both, or neither",
        );
        for (key, path) in [("api.certificate", &api.certificate), ("api.key", &api.key)] {
            require(
                empty(path) || path.is_absolute(),
                key,
                "must be an absolute path",
            );
        }
        let Link {
            window,
            socket_buffer,
            idle_timeout,
            keep_alive,
            ref windows,
            ..
        } = self.link;
        let overlapping = bandwidth::problems(windows);
        require(
            window >= ByteSize::from_mib(1),
            "link.window",
            "is under 1MiB, which no long link can be filled with",
        );
        require(
            window <= ByteSize::from_mib(4096),
            "link.window",
            "is over 4GiB, all of which may be held in memory",
        );
        require(
            socket_buffer >= ByteSize::from_bytes(65_536),
            "link.socket_buffer",
            "is under 64KiB; packets would be lost",
        );
        require(
            keep_alive > Period::ZERO,
            "link.keep_alive",
            "is 0s; try 5s",
        );
        require(
            idle_timeout.duration() >= keep_alive.duration() * 2,
            "link.idle_timeout",
            "must be at least twice 'link.keep_alive', or one lost packet ends the connection",
        );
        let Store {
            segment_bytes,
            index_bytes,
            ..
        } = self.store;
        require(
            (ByteSize::from_mib(1)..=ByteSize::from_mib(4096)).contains(&segment_bytes),
            "store.segment_bytes",
            "must be from 1MiB to 4GiB; 64MiB is a good choice",
        );
        require(
            index_bytes >= ByteSize::from_mib(1),
            "store.index_bytes",
            "is under 1MiB; nothing would be found in it",
        );
        for (id, netdev) in &self.networks {
            let key = format!("networks.{id}");
            require(
                !netdev.trim().is_empty(),
                &key,
                "is empty; expected a QEMU -netdev argument, like bridge,br=br0",
            );
            require(
                !netdev.contains("id="),
                &key,
                "sets an id; leave that out, the guest's definition does it",
            );
        }
        let webhook = &self.notify.webhook;
        let host = webhook
            .strip_prefix("http://")
            .or(webhook.strip_prefix("https://"))
            .and_then(|rest| {
                let host = rest.split(['/', '?']).next()?;
                (!host.is_empty() && !host.starts_with(':')).then_some(host)
            });
        require(
            webhook.is_empty() || host.is_some() && webhook.is_ascii() && !webhook.contains(' '),
            "notify.webhook",
            "must be like https://alerts.example.org/farhaven, or http:// on this host or a network that is trusted",
        );
        require(
            !self.log.level.trim().is_empty(),
            "log.level",
            "is empty; try info",
        );
        found.extend(overlapping.into_iter().map(|problem| problem.under("link")));
        found.extend(
            self.protect
                .problems()
                .into_iter()
                .map(|problem| problem.under("protect")),
        );
        found
    }
}
