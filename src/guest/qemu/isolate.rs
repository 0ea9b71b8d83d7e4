//! A definition for a test: the same machine, with every way out of it cut.
//!
//! Device state comes from the guest as it runs, so that devices stay; what is
//! behind them goes. Network back ends become ones with nobody behind them
//! (of a kind that takes the same state: a virtio device that talked to a tap
//! wants one again, and gets one on no bridge). Character devices on ports of
//! the host, or connected to its programs, become empty ones, so that the test
//! takes no port that a real failover needs.

use super::definition::{Definition, Net};
use super::options::{Argument, Keys};
use super::template::implied;

/// Longest name of a network interface.
const LONGEST_INTERFACE: usize = 15;

impl Definition {
    /// The same guest, isolated. `tag` tells its interfaces from other guests'.
    ///
    /// # Errors
    /// The options that cannot be cut off, each with its reason.
    pub fn isolated(&self, tag: &str) -> Result<Definition, Vec<String>> {
        let mut isolated = self.clone();
        let mut refused = Vec::new();
        for (number, net) in isolated.nets.iter_mut().enumerate() {
            match back_end(net, tag, number) {
                Ok(value) => net.value = value,
                Err(why) => refused.push(why),
            }
        }
        let mut arguments = Vec::with_capacity(isolated.arguments.len() + 1);
        for argument in &isolated.arguments {
            match option(argument, tag) {
                Ok(kept) => arguments.extend(kept),
                Err(why) => refused.push(why),
            }
        }
        // Without any word on networks QEMU gives the guest one that reaches out.
        let networks = ["nodefaults", "nic", "net", "netdev"];
        if !arguments
            .iter()
            .any(|argument| networks.contains(&argument.option.as_str()))
        {
            arguments.push(Argument::new("nic", "user,restrict=on"));
        }
        isolated.arguments = arguments;
        if refused.is_empty() {
            Ok(isolated)
        } else {
            Err(refused)
        }
    }
}

/// A back end with nobody behind it, that takes the device state of this one.
fn back_end(net: &Net, tag: &str, number: usize) -> Result<String, String> {
    let id = net.id.replace(',', ",,");
    match net.kind.as_str() {
        "tap" | "bridge" => {
            let keys = Keys::parse(&net.value, "type");
            // The state of a virtio device depends on these.
            let kept: String = ["queues", "vnet_hdr", "sndbuf"]
                .iter()
                .filter_map(|key| Some(format!(",{key}={}", keys.value(key)?)))
                .collect();
            Ok(format!(
                "tap,id={id},ifname={},script=no,downscript=no{kept}",
                interface(tag, number)
            ))
        }
        "user" => Ok(format!("user,id={id},restrict=on")),
        "vhost-user" | "vhost-vdpa" => Err(format!(
            "-netdev {}: a device of the host or of another process cannot be cut off",
            net.value
        )),
        // None of the others keeps headers that the device state depends on.
        _ => Ok(format!("hubport,id={id},hubid={number}")),
    }
}

fn interface(tag: &str, number: usize) -> String {
    let plain: String = tag.chars().filter(char::is_ascii_alphanumeric).collect();
    let number = number.to_string();
    let room = LONGEST_INTERFACE.saturating_sub("fht".len() + 1 + number.len());
    let plain: String = plain.chars().take(room).collect();
    format!("fht{plain}.{number}")
}

/// One option without its way out: `None` if nothing is left of it.
fn option(argument: &Argument, tag: &str) -> Result<Option<Argument>, String> {
    let name = argument.option.as_str();
    let keys = argument.keys(implied(name));
    let text = argument.text();
    let refuse = |why: &str| Err(format!("-{name} {text}: {why}"));
    let kept = match name {
        "nic" | "net" => return nic(argument, keys, tag),
        "chardev" => chardev(argument, keys),
        "serial" | "parallel" | "debugcon" if reaches_out(text) => Argument::new(name, "null"),
        "monitor" | "qmp" | "qmp-pretty" if reaches_out(text) => return Ok(None),
        // A port of the host, or one for each test and run.
        "vnc" if !text.starts_with("unix:") && text != "none" => Argument::new(name, "none"),
        "spice" => return refuse("it listens on a port that the guest itself needs"),
        "gdb" | "s" | "redir" => return Ok(None),
        "device" | "usbdevice" if keys.value("driver").is_some_and(is_vsock) => {
            return refuse("vsock reaches programs of the host");
        }
        _ => argument.clone(),
    };
    Ok(Some(kept))
}

fn is_vsock(driver: &str) -> bool {
    driver.starts_with("vhost-vsock")
}

/// `-nic` and the old `-net`, where both ends are in one option.
fn nic(argument: &Argument, mut keys: Keys, tag: &str) -> Result<Option<Argument>, String> {
    let kind = keys.value("type").unwrap_or_default().to_owned();
    // `-net nic` is a device only; `-net` has the same first word.
    let kind = match kind.is_empty() {
        true => argument
            .text()
            .split(',')
            .next()
            .unwrap_or_default()
            .to_owned(),
        false => kind,
    };
    match kind.as_str() {
        "none" | "nic" | "hubport" => Ok(Some(argument.clone())),
        "user" => {
            for key in ["hostfwd", "guestfwd", "smb", "tftp", "bootfile"] {
                keys.remove(key);
            }
            keys.set("restrict", "on");
            let text = keys.text("type");
            Ok(Some(Argument::new(&argument.option, text)))
        }
        "tap" | "bridge" => {
            for key in ["br", "helper", "script", "downscript", "ifname", "vhost"] {
                keys.remove(key);
            }
            keys.set("type", "tap");
            keys.set("ifname", &interface(tag, 99));
            keys.set("script", "no");
            keys.set("downscript", "no");
            let text = keys.text("type");
            Ok(Some(Argument::new(&argument.option, text)))
        }
        _ => Err(format!(
            "-{} {}: this network cannot be cut off; name it: -netdev …,id=net0 -device …,netdev=net0",
            argument.option,
            argument.text()
        )),
    }
}

/// A character device on a port, a device or a program of the host becomes an
/// empty one; files and sockets of its own directory stay.
fn chardev(argument: &Argument, keys: Keys) -> Argument {
    let place = |key: &str| keys.value(key).is_some_and(|path| path.contains("{run}/"));
    let stays = match keys.value("backend").unwrap_or_default() {
        "socket" => place("path") && keys.on("server"),
        "file" | "pipe" => place("path"),
        "null" | "ringbuf" | "memory" | "vc" | "stdio" | "pty" | "spicevmc" | "spiceport"
        | "qemu-vdagent" | "dbus" => true,
        _ => false,
    };
    if stays {
        return argument.clone();
    }
    let mut empty = Keys::default();
    empty.set("backend", "null");
    for key in ["id", "mux", "logfile", "logappend"] {
        if let Some(value) = keys.value(key) {
            empty.set(key, value);
        }
    }
    Argument::new("chardev", empty.text("backend"))
}

/// Is this stream a port, a device or a program of the host?
fn reaches_out(text: &str) -> bool {
    let text = text.strip_prefix("mon:").unwrap_or(text);
    ["tcp:", "telnet:", "websocket:", "udp:", "/dev/", "COM"]
        .iter()
        .any(|kind| text.starts_with(kind))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::guest::qemu::facts::Facts;
    use crate::guest::qemu::options::{parse, unparse};

    fn define(line: &str) -> Definition {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let facts = Facts {
            program: "qemu-system-x86_64".to_owned(),
            arguments: parse(&words),
            directory: "/srv/vm".into(),
            qmp: "/srv/vm/qmp.sock".into(),
            machine: "pc-q35-7.2".to_owned(),
            ..Facts::default()
        };
        Definition::new(&facts).0
    }

    fn isolated(line: &str) -> (Vec<String>, String) {
        let isolated = define(line).isolated("5a1f-22").unwrap();
        let nets = isolated.nets.into_iter().map(|n| n.value).collect();
        (nets, unparse(&isolated.arguments).join(" "))
    }

    #[test]
    fn networks_have_nobody_behind_them() {
        let (nets, line) = isolated(
            "-netdev tap,id=a,ifname=tap3,script=/etc/up,vhost=on,queues=4 \
             -netdev bridge,id=b,br=br0 -netdev user,id=c,hostfwd=tcp::22-:22 \
             -netdev socket,id=d,connect=10.0.0.1:99 -device virtio-net-pci,netdev=a",
        );
        assert_eq!(
            nets[0],
            "tap,id=a,ifname=fht5a1f22.0,script=no,downscript=no,queues=4"
        );
        assert_eq!(
            nets[1],
            "tap,id=b,ifname=fht5a1f22.1,script=no,downscript=no"
        );
        assert_eq!(nets[2], "user,id=c,restrict=on");
        assert_eq!(nets[3], "hubport,id=d,hubid=3");
        assert!(line.contains("-device virtio-net-pci,netdev=a"), "{line}");
        assert!(!line.contains("-nic"), "{line}");
        assert!(interface("0123456789abcdef", 12).len() <= LONGEST_INTERFACE);
    }

    #[test]
    fn a_network_by_default_is_one_without_a_way_out() {
        let (_, line) = isolated("-m 128");
        assert!(line.contains("-nic user,restrict=on"), "{line}");
        let (_, line) = isolated("-m 128 -nodefaults");
        assert!(!line.contains("-nic"), "{line}");
        let (_, line) = isolated("-nic user,model=e1000,hostfwd=tcp::22-:22");
        assert!(
            line.contains("restrict=on") && line.contains("model=e1000"),
            "{line}"
        );
        assert!(!line.contains("hostfwd"), "{line}");
        let (_, line) = isolated("-nic tap,br=br0,mac=52:54:00:00:00:01");
        assert!(
            line.contains("script=no") && !line.contains("br0"),
            "{line}"
        );
        assert!(line.contains("mac=52:54"), "{line}");
    }

    #[test]
    fn ports_and_programs_of_the_host_are_left_alone() {
        let (_, line) = isolated(
            "-nodefaults -vnc :1 -s -monitor tcp:127.0.0.1:55,server=on -serial telnet::99 \
             -qmp unix:qmp.sock,server=on,wait=off -gdb tcp::1234 -serial mon:stdio \
             -chardev socket,id=x,host=1.2.3.4,port=9 -chardev socket,id=y,path=/run/agent \
             -chardev socket,id=z,path=con,server=on,wait=off,logfile=con.log -chardev udp,id=u,port=1",
        );
        for gone in [
            ":1 ", "-s ", "55", "telnet", "1234", "1.2.3.4", "agent", "udp",
        ] {
            assert!(!line.contains(gone), "{gone} in {line}");
        }
        for kept in [
            "-vnc none",
            "null,id=x",
            "null,id=y",
            "null,id=u",
            "id=z,path={run}/con",
            "{qmp}",
            "-serial null",
            "mon:stdio",
        ] {
            assert!(line.contains(kept), "no {kept} in {line}");
        }
    }

    #[test]
    fn what_cannot_be_cut_off_is_refused() {
        for line in [
            "-netdev vhost-user,id=a,chardev=c",
            "-device vhost-vsock-pci,guest-cid=3",
            "-spice port=5900",
            "-nic vde,sock=/run/vde",
        ] {
            let refused = define(line).isolated("x").unwrap_err();
            assert_eq!(refused.len(), 1, "{line}: {refused:?}");
        }
    }
}
