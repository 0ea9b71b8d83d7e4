//! QEMUs started in many ways: defined from the running process, checked, and
//! launched again.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod support;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use farhaven::activate::launch::{LaunchPlan, Launched};
use farhaven::guest::qemu::check::{Finding, Severity, check};
use farhaven::guest::qemu::definition::Definition;
use farhaven::guest::qemu::options::Argument;
use farhaven::guest::qemu::qmp::Qmp;
use support::place::place;

/// A QEMU that ends with the value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run_qemu(directory: &Path, arguments: &[String]) -> (Running, Qmp) {
    let socket = directory.join("qmp.sock");
    let _ = std::fs::remove_file(&socket);
    let child = Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-display", "none", "-S", "-m", "64"])
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let running = Running(child);
    let start = Instant::now();
    loop {
        match Qmp::connect(&socket, Duration::from_secs(10)) {
            Ok(qmp) => return (running, qmp),
            Err(error) => assert!(
                start.elapsed() < Duration::from_secs(10),
                "{arguments:?}: {error}"
            ),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn every_way_to_name_a_disk_is_launched_again() {
    if !Command::new("qemu-system-x86_64")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
    {
        return support::skip(
            "qemu-system-x86_64 is not installed (apt-get install -y qemu-system-x86 qemu-utils)",
        );
    }
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    for name in ["a,b.raw", "c.raw", "ro.iso"] {
        File::create(at(name)).unwrap().set_len(8 << 20).unwrap();
    }
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(at("d.qcow2"))
        .arg("16M")
        .status()
        .unwrap();
    assert!(made.success());
    let (c, d) = (
        at("c.raw").display().to_string(),
        at("d.qcow2").display().to_string(),
    );
    let json = format!(
        r#"{{"driver":"qcow2","node-name":"dn","cache":{{"direct":false}},"discard":"unmap","file":{{"driver":"file","filename":"{d}"}}}}"#
    );
    let chain = r#"{"driver":"raw","node-name":"top","file":"bottom"}"#;
    let bottom = format!(r#"{{"driver":"file","node-name":"bottom","filename":"{c}"}}"#);
    let aio = "-object iothread,id=io";
    let samples: Vec<(Vec<&str>, Vec<&str>)> = vec![
        (
            vec![
                "-drive",
                "id=x,if=none,file=a,,b.raw,format=raw,cache=none,discard=unmap",
                "-device",
                "virtio-blk-pci,drive=x",
            ],
            vec!["x"],
        ),
        (
            vec![
                "-drive",
                "file=c.raw,format=raw,if=virtio",
                "-drive",
                "file=d.qcow2,if=virtio,node-name=named",
            ],
            vec!["virtio0", "virtio1"],
        ),
        (vec!["-drive", "file=c.raw,format=raw"], vec!["ide0-hd0"]),
        (
            vec!["-hda", "d.qcow2", "-cdrom", "ro.iso"],
            vec!["ide0-hd0"],
        ),
        (vec!["d.qcow2"], vec!["ide0-hd0"]),
        (
            vec!["-blockdev", &json, "-device", "virtio-blk-pci,drive=dn"],
            vec!["dn"],
        ),
        (
            vec![
                "-blockdev",
                &bottom,
                "-blockdev",
                chain,
                "-device",
                r#"{"driver":"virtio-blk-pci","drive":"top"}"#,
            ],
            vec!["top"],
        ),
        (
            vec![
                "-blockdev",
                "driver=file,node-name=p,filename=d.qcow2",
                "-blockdev",
                "driver=qcow2,node-name=q,file=p",
                "-blockdev",
                "driver=throttle,node-name=t,throttle-group=g,file=q",
                "-object",
                "throttle-group,id=g",
                "-device",
                "virtio-scsi-pci,id=s",
                "-device",
                "scsi-hd,bus=s.0,drive=t",
            ],
            vec!["t"],
        ),
        (
            aio.split(' ')
                .chain([
                    "-drive",
                    "if=none,id=y,file.driver=file,file.filename=c.raw,driver=raw",
                    "-device",
                    "virtio-blk-pci,drive=y,iothread=io",
                ])
                .collect(),
            vec!["y"],
        ),
        (
            vec![
                "-blockdev",
                "driver=file,node-name=iso,filename=ro.iso,read-only=on",
                "-device",
                "ide-cd,drive=iso",
                "-device",
                "ide-cd",
            ],
            vec![],
        ),
    ];
    for (number, (sample, names)) in samples.into_iter().enumerate() {
        let ram = at("ram");
        let mut line = vec![
            "-machine".to_owned(),
            if number % 2 == 0 {
                "q35,memory-backend=m0"
            } else {
                "pc,memory-backend=m0"
            }
            .to_owned(),
        ];
        line.extend([
            "-object".to_owned(),
            format!(
                "memory-backend-file,id=m0,size=64M,mem-path={},share=on",
                ram.display()
            ),
        ]);
        let qmp_form: &[&str] = match number % 3 {
            0 => &["-qmp", "unix:qmp.sock,server=on,wait=off"],
            1 => &[
                "-chardev",
                "socket,id=mon,path=qmp.sock,server=on,wait=off",
                "-mon",
                "chardev=mon,mode=control",
            ],
            _ => &[
                "-monitor",
                "unix:hmp.sock,server,nowait",
                "-qmp",
                "unix:./qmp.sock,server,nowait",
            ],
        };
        line.extend(qmp_form.iter().map(|word| (*word).to_owned()));
        line.extend(sample.iter().map(|word| (*word).to_owned()));
        let definition = {
            let (_running, mut qmp) = run_qemu(directory.path(), &line);
            Definition::read(&mut qmp).unwrap()
        };
        let found: Vec<&str> = definition
            .disks
            .iter()
            .map(|disk| disk.name.as_str())
            .collect();
        println!("{sample:?}: {found:?}");
        let options: Vec<&Argument> = definition
            .arguments
            .iter()
            .filter(|argument| argument.text().starts_with("{disk:"))
            .collect();
        assert_eq!(
            options.len(),
            names.len(),
            "{sample:?}: {:?}",
            definition.disks
        );
        assert_eq!(found, names, "{sample:?}");
        let blocking: Vec<Finding> = check(&definition)
            .into_iter()
            .filter(|finding| finding.severity == Severity::Blocks)
            .collect();
        assert!(blocking.is_empty(), "{sample:?}: {blocking:?}");
        assert!(
            definition.machine.starts_with("pc-") && definition.machine.contains('.'),
            "{}",
            definition.machine
        );

        let peer: PathBuf = at(&format!("peer{number}"));
        std::fs::create_dir(&peer).unwrap();
        let placement = place(&definition, &peer);
        let mut launched = Launched::start(&LaunchPlan {
            definition: &definition,
            placement: &placement,
            program: None,
        })
        .unwrap_or_else(|error| panic!("{sample:?}: {error}"));
        let again = Definition::read(launched.qmp());
        launched.kill();
        let again = again.unwrap();
        let shape = |definition: &Definition| {
            definition
                .disks
                .iter()
                .map(|disk| (disk.name.clone(), disk.bytes))
                .collect::<Vec<_>>()
        };
        let named = |name: &str| !name.starts_with('#');
        assert_eq!(again.disks.len(), definition.disks.len());
        for (before, after) in shape(&definition)
            .iter()
            .zip(shape(&again))
            .filter(|(before, _)| named(&before.0))
        {
            assert_eq!(*before, after, "{sample:?}");
        }
    }
}
