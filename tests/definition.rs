//! Definitions made of command lines, what is found wrong with them, and the
//! command lines made of them at the peer.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod support;

use std::path::Path;

use farhaven::guest::qemu::check::{Finding, Severity, check};
use farhaven::guest::qemu::definition::{Definition, HostFile, RamBlock};
use farhaven::guest::qemu::facts::{BlockFact, Facts};
use farhaven::guest::qemu::instantiate::InstantiateError;
use farhaven::guest::qemu::options;
use farhaven::guest::qemu::peer::{PeerFacts, check_peer};
use support::place::place;

/// Facts as a QEMU with this command line would give them.
fn facts(line: &str) -> Facts {
    let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    let ram = RamBlock {
        id: "m0".to_owned(),
        bytes: 1 << 30,
        backend: "memory-backend-file".to_owned(),
        path: Some("/dev/shm/vm.ram".into()),
        shared: true,
    };
    Facts {
        program: "qemu-system-x86_64".to_owned(),
        arguments: options::parse(&words),
        directory: "/srv/vm".into(),
        qmp: "/srv/vm/qmp.sock".into(),
        version: (7, 2, 22),
        machine: "pc-q35-7.2".to_owned(),
        vcpus: 2,
        ram_bytes: 1 << 30,
        ram: vec![ram],
        ..Facts::default()
    }
}

fn define(line: &str) -> Definition {
    Definition::new(&facts(line)).0
}

fn codes(definition: &Definition, severity: Severity) -> Vec<String> {
    let findings = check(definition);
    assert!(
        findings
            .iter()
            .all(|finding| !finding.mend.is_empty() && !finding.what.is_empty())
    );
    findings
        .into_iter()
        .filter(|finding| finding.severity == severity)
        .map(|finding| finding.code)
        .collect()
}

const SOUND: &str = "-machine pc-q35-7.2,memory-backend=m0 -object memory-backend-file,id=m0,size=1G,mem-path=/dev/shm/vm.ram,share=on -qmp unix:qmp.sock,server=on,wait=off";

fn launched_as(line: &str) -> String {
    let definition = define(line);
    definition
        .instantiate(&place(&definition, Path::new("/peer")))
        .unwrap()
        .join(" ")
}

#[test]
fn a_sound_command_line_blocks_nothing() {
    assert_eq!(codes(&define(SOUND), Severity::Blocks), [""; 0]);
    let line = launched_as(SOUND);
    assert_eq!(
        line,
        "-machine pc-q35-7.2,memory-backend=m0 -object memory-backend-file,id=m0,size=1G,mem-path=/peer/ram,share=on \
         -qmp unix:/peer/run/q,server=on,wait=off -S -incoming defer"
    );
}

#[test]
fn what_blocks_is_found() {
    for (option, code) in [
        ("-cpu host", "cpu-host"),
        ("-cpu host,+x2apic", "cpu-host"),
        ("-device vfio-pci,host=01:00.0", "passthrough"),
        ("-device usb-host,vendorid=1", "passthrough"),
        ("-device scsi-generic,drive=x", "passthrough"),
        ("-device vhost-user-fs-pci,chardev=c,tag=t", "shared-folder"),
        ("-virtfs local,path=/srv,mount_tag=t", "shared-folder"),
        (
            r#"-device {"driver":"virtio-9p-pci","fsdev":"f"}"#,
            "shared-folder",
        ),
        ("-device ivshmem-plain,memdev=s", "shared-memory"),
        ("-device nvdimm,memdev=n", "pmem"),
        (
            "-object memory-backend-file,id=n,size=1G,mem-path=/x,pmem=on",
            "pmem",
        ),
        ("-tpmdev emulator,id=t,chardev=c", "tpm"),
        ("-snapshot", "snapshot"),
        ("-drive file=/x.qcow2,snapshot=on", "snapshot"),
        ("-object sev-guest,id=s", "confidential"),
        ("-add-fd fd=3,set=1", "inherited-fd"),
        ("-chardev socket,id=c,fd=5,server=on", "inherited-fd"),
        (
            "-blockdev driver=file,node-name=f,filename=/dev/fdset/1",
            "inherited-fd",
        ),
    ] {
        let definition = define(&format!("{SOUND} {option}"));
        assert_eq!(codes(&definition, Severity::Blocks), [code], "{option}");
    }
    let change = |change: &dyn Fn(&mut Facts)| {
        let mut facts = facts(SOUND);
        change(&mut facts);
        codes(&Definition::new(&facts).0, Severity::Blocks)
    };
    assert_eq!(change(&|facts| facts.ram.clear()), ["ram-anonymous"]);
    assert_eq!(
        change(&|facts| facts.ram[0].shared = false),
        ["ram-not-shared"]
    );
    assert_eq!(
        change(&|facts| facts.ram[0].backend = "memory-backend-memfd".into()),
        ["ram-memfd"]
    );
    assert_eq!(
        change(&|facts| facts.ram[0].backend.clear()),
        ["ram-anonymous"]
    );
    assert_eq!(
        change(&|facts| facts.machine = "microvm".into()),
        ["machine-unversioned"]
    );
    assert_eq!(change(&|facts| facts.version = (6, 0, 0)), ["qemu-too-old"]);
    let plugged = BlockFact {
        device: String::new(),
        node: "late".into(),
        bytes: 4096,
        format: "raw".into(),
        ..BlockFact::default()
    };
    assert_eq!(
        change(&|facts| facts.blocks.push(plugged.clone())),
        ["disk-plugged"]
    );
}

#[test]
fn what_only_warns_does_not_block() {
    for (option, code) in [
        ("-M q35", "machine-alias"),
        ("-cpu max", "cpu-max"),
        ("-device vhost-vsock-pci,guest-cid=3", "vsock"),
        ("-chardev socket,id=c,path=/run/x", "client-socket"),
        ("-chardev serial,id=c,path=/dev/ttyS0", "host-port"),
        ("-nic user", "net-unnamed"),
        ("-object secret,id=s,file=/etc/key", "host-path"),
    ] {
        let definition = define(&format!("{SOUND} {option}"));
        assert_eq!(codes(&definition, Severity::Blocks), [""; 0], "{option}");
        let warned: Vec<_> = codes(&definition, Severity::Warns)
            .into_iter()
            .filter(|c| c != "no-guest-agent")
            .collect();
        assert_eq!(warned, [code], "{option}");
    }
    let random = format!("{SOUND} -object rng-random,id=r,filename=/dev/urandom");
    assert_eq!(codes(&define(&random), Severity::Warns), ["no-guest-agent"]);
}

#[test]
fn host_paths_become_the_peers() {
    let line = launched_as(&format!(
        "{SOUND} -name a,,b -daemonize -pidfile /run/vm.pid -S -incoming tcp:0:1 -D log/qemu.log \
         -serial unix:/tmp/a/con.sock,server -serial file:/var/log/con.log -monitor unix:/tmp/b/con.sock,server,nowait \
         -chardev socket,id=ga,path=/run/ga.sock,server=on -chardev file,id=f,path=/var/f.log,logfile=/var/g.log \
         -vnc unix:/tmp/vnc.sock -netdev tap,id=n0,ifname=tap3,script=no --future some,thing={{x}} -unknown"
    ));
    for wanted in [
        "-name a,,b",
        "-pidfile /peer/run/vm.pid",
        "-D /peer/run/qemu.log",
        "-serial unix:/peer/run/con.sock,server=on,wait=off",
        "-serial file:/peer/run/con.log",
        "-monitor unix:/peer/run/2-con.sock,server=on,wait=off",
        "-chardev socket,id=ga,path=/peer/run/ga.sock,server=on,wait=off",
        "-chardev file,id=f,path=/peer/run/f.log,logfile=/peer/run/g.log",
        "-vnc unix:/peer/run/vnc.sock",
        "-netdev tap,id=n0,ifname=tap3,script=no",
        "-future some,thing={x}",
    ] {
        assert!(line.contains(wanted), "{wanted} in {line}");
    }
    for gone in ["-daemonize", "tcp:0:1"] {
        assert!(!line.contains(gone), "{gone} in {line}");
    }
    let definition = define(&format!("{SOUND} -netdev tap,id=n0,ifname=tap3"));
    let mut placement = place(&definition, Path::new("/peer"));
    placement
        .nets
        .insert("n0".into(), "user,restrict=on".into());
    let line = definition.instantiate(&placement).unwrap().join(" ");
    assert!(line.contains("-netdev user,restrict=on,id=n0"), "{line}");
    placement.ram.clear();
    assert!(matches!(
        definition.instantiate(&placement),
        Err(InstantiateError::Unplaced { .. })
    ));
}

#[test]
fn a_path_with_commas_and_quotes_survives() {
    let definition = define(SOUND);
    let mut placement = place(&definition, Path::new("/peer"));
    placement
        .ram
        .insert("m0".into(), "/odd,dir/\"x\".ram".into());
    let line = definition.instantiate(&placement).unwrap();
    assert!(
        line.iter()
            .any(|word| word.contains("mem-path=/odd,,dir/\"x\".ram,")),
        "{line:?}"
    );
    let json = r#"-machine pc-q35-7.2 -object {"qom-type":"memory-backend-file","id":"m0","size":1073741824,"mem-path":"/x","share":true}"#;
    let definition = define(json);
    let line = definition.instantiate(&placement).unwrap();
    let object: serde_json::Value = serde_json::from_str(&line[3]).unwrap();
    assert_eq!(
        (&object["mem-path"], &object["size"]),
        (&"/odd,dir/\"x\".ram".into(), &(1 << 30).into())
    );
}

#[test]
fn a_peer_is_compared() {
    let file = |digest: &str| HostFile {
        path: "/boot/vmlinuz".into(),
        bytes: 1,
        blake3: digest.into(),
    };
    let mut definition = define(&format!("{SOUND} -cpu EPYC,+x2apic"));
    definition.files = vec![file("aa")];
    let good = PeerFacts {
        qemu: Some((7, 2, 22)),
        machines: vec!["pc-q35-7.2".into()],
        cpus: vec!["EPYC".into()],
        kvm: false,
        qemu_img: true,
        ram_directory: ("/dev/shm".into(), 2 << 30),
        store_directory: ("/store".into(), 4 << 30),
        memory_available: 2 << 30,
        files: vec![file("aa")],
        socket_buffers: (1 << 22, 1 << 22),
        findings: Vec::new(),
    };
    assert_eq!(check_peer(&definition, &good, 0), []);
    let codes = |change: &dyn Fn(&mut PeerFacts, &mut Definition)| {
        let (mut peer, mut definition) = (good.clone(), definition.clone());
        change(&mut peer, &mut definition);
        let found = check_peer(&definition, &peer, 0);
        found
            .into_iter()
            .map(|Finding { code, .. }| code)
            .collect::<Vec<_>>()
    };
    assert_eq!(codes(&|peer, _| peer.qemu = None), ["peer-qemu-missing"]);
    assert_eq!(
        codes(&|peer, _| peer.qemu = Some((5, 0, 0))),
        ["peer-qemu-too-old"]
    );
    assert_eq!(
        codes(&|_, guest| guest.qemu = (9, 0, 0)),
        ["peer-qemu-older"]
    );
    assert_eq!(
        codes(&|peer, _| peer.qemu_img = false),
        ["peer-qemu-img-missing"]
    );
    assert_eq!(codes(&|peer, _| peer.machines.clear()), ["peer-machine"]);
    assert_eq!(codes(&|peer, _| peer.cpus.clear()), ["peer-cpu"]);
    assert_eq!(codes(&|_, guest| guest.kvm = true), ["peer-kvm"]);
    assert_eq!(
        codes(&|peer, _| peer.ram_directory.1 = 1),
        ["peer-ram-room"]
    );
    assert_eq!(codes(&|peer, _| peer.memory_available = 1), ["peer-memory"]);
    assert_eq!(
        codes(&|peer, _| peer.store_directory.1 = 1 << 20),
        ["peer-store-room"]
    );
    assert_eq!(
        codes(&|peer, _| peer.store_directory.1 = 1 << 29),
        ["peer-store-tight"]
    );
    assert_eq!(codes(&|peer, _| peer.files.clear()), ["peer-file-missing"]);
    assert_eq!(
        codes(&|peer, _| peer.files = vec![file("bb")]),
        ["peer-file-differs"]
    );
}
