//! Whether the bridge that a netdev names is on this host: looked at before a
//! guest is stopped for it, not when its new QEMU ends for the lack of it.

use std::path::Path;

use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType, socket};

/// What is missing on this host for a netdev (a `-netdev` value without its id),
/// with how to make it. `None` when it is there, or only QEMU can tell.
pub fn missing(netdev: &str) -> Option<String> {
    let bridge = bridge_of(netdev)?;
    match index(bridge) {
        Some(Looked::Nothing) => Some(format!(
            "there is no bridge {bridge} here: make it (ip link add {bridge} type bridge)"
        )),
        Some(Looked::At(index)) if is_another(bridge, index) => Some(format!(
            "{bridge} is an interface here, and no Linux bridge: make a bridge, and put {bridge} into it (ip link add NAME type bridge; ip link set {bridge} master NAME)"
        )),
        _ => None,
    }
}

/// The bridge that a netdev is put into.
fn bridge_of(netdev: &str) -> Option<&str> {
    let mut options = netdev.split(',');
    let kind = options.next()?.trim_start_matches("type=");
    let mut named = None;
    let mut helped = kind == "bridge";
    for option in options {
        match option.split_once('=') {
            Some(("br", bridge)) => named = Some(bridge),
            Some(("helper", _)) => helped |= kind == "tap",
            _ => {}
        }
    }
    // QEMU's own default, when none is named.
    helped.then(|| named.unwrap_or("br0"))
}

enum Looked {
    At(u32),
    Nothing,
}

/// An interface's index in the network namespace of this process, in which its
/// QEMUs run, too; `None` when that cannot be found out.
fn index(name: &str) -> Option<Looked> {
    let any = socket(AddressFamily::UNIX, SocketType::DGRAM, None).ok()?;
    match name_to_index(&any, name) {
        Ok(index) => Some(Looked::At(index)),
        Err(rustix::io::Errno::NODEV) => Some(Looked::Nothing),
        Err(_) => None,
    }
}

/// Is it surely not a bridge? /sys may show another network namespace than that
/// of this process: it counts when it tells of the same interface.
fn is_another(name: &str, index: u32) -> bool {
    let shown = Path::new("/sys/class/net").join(name);
    let told = std::fs::read_to_string(shown.join("ifindex")).unwrap_or_default();
    told.trim() == index.to_string() && !shown.join("bridge").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bridge_of_a_netdev_is_found() {
        assert_eq!(bridge_of("bridge,br=lan0"), Some("lan0"));
        assert_eq!(bridge_of("bridge"), Some("br0"));
        assert_eq!(bridge_of("tap,helper=/h,br=lan1"), Some("lan1"));
        for other in ["user,restrict=on", "tap,ifname=tap0,script=no", "", "tap"] {
            assert_eq!(bridge_of(other), None, "{other}");
        }
    }

    #[test]
    fn what_is_no_bridge_is_told_with_what_to_do() {
        let told = missing("bridge,br=fh-none-here").unwrap_or_default();
        assert!(
            told.contains("ip link add fh-none-here type bridge"),
            "{told}"
        );
        assert_eq!(missing("user"), None);
        // There is one everywhere, and it is no bridge.
        let told = missing("bridge,br=lo");
        assert!(told.is_none_or(|told| told.contains("no Linux bridge")));
    }
}
