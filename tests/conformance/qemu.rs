//! QEMU: a boot-sector program that keeps changing RAM and two disks.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use farhaven::activate::launch::{LaunchPlan, Launched};
use farhaven::guest::Guest;
use farhaven::guest::qemu::QemuGuest;
use farhaven::guest::qemu::definition::Definition;
use farhaven::guest::qemu::instantiate::{Backing, DiskPlacement, Placement};
use farhaven::guest::qemu::qmp::Qmp;
use farhaven_storage_sync::unit::UNIT;
use serde_json::json;
use vm_memory::{FileOffset, MmapRegion};

use crate::busy_guest::{DISK_B, RAM, Vm, assert_one_instant, has_qemu, word};
use crate::proxy::Proxy;
use crate::subject::{PATIENCE, Subject, Work};

struct Busy {
    vm: Vm,
    proxy: Proxy,
    planted: u64,
    definition: Definition,
    /// An attach looks for the RAM file among what is mapped by the process that
    /// serves the control socket: that is this one, as long as the proxy does.
    _ram: MmapRegion,
}

fn start() -> Option<Busy> {
    if !has_qemu() {
        return None;
    }
    let vm = Vm::start();
    let proxy = Proxy::serve(&vm.path("proxy.sock"), &vm.path("qmp.sock"));
    let mut qmp = Qmp::connect(&vm.path("qmp.sock"), PATIENCE).expect("connects");
    let definition = Definition::read(&mut qmp).expect("is read");
    let ram = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&vm.ram);
    let ram = FileOffset::new(ram.expect("opens"), 0);
    let mapped = MmapRegion::from_file(ram, RAM as usize).expect("maps");
    Some(Busy {
        vm,
        proxy,
        planted: 0,
        definition,
        _ram: mapped,
    })
}

conforms!(start);

impl Busy {
    fn ask(&self, query: &str) -> serde_json::Value {
        let mut qmp = Qmp::connect(&self.vm.path("qmp2.sock"), PATIENCE).expect("connects");
        qmp.execute(query, json!({})).expect("answers")
    }
}

fn work(ram: &[u8]) -> Work {
    assert_eq!(word(ram, 0x608), 0, "the guest's disk writes fail");
    Work {
        memory: u64::from(word(ram, 0x600)),
        disk: u64::from(word(ram, 0x604)),
    }
}

impl Subject for Busy {
    fn attach(&mut self) -> Box<dyn Guest> {
        let guest = QemuGuest::attach(self.vm.options("proxy.sock")).expect("attaches");
        Box::new(guest)
    }

    fn work(&self) -> Work {
        work(&std::fs::read(&self.vm.ram).expect("reads"))
    }

    fn some(&self) -> Work {
        Work {
            memory: 128,
            disk: 64 * 4,
        }
    }

    fn content(&self) -> Vec<Vec<u8>> {
        self.vm.content()
    }

    fn assert_one_instant(&self, volumes: &[Vec<u8>]) {
        assert_one_instant(volumes);
        let end = &volumes[2][DISK_B as usize..];
        assert!(end.iter().all(|b| *b == 0), "disk b is padded with zeros");
    }

    fn goes_on_elsewhere(&self, volumes: &[Vec<u8>], device_state: &[u8]) {
        let there = tempfile::tempdir().expect("a directory");
        let at = |name: &str| there.path().join(name);
        let ram = PathBuf::from(format!("{}.peer", self.vm.ram.display()));
        std::fs::write(&ram, &volumes[0]).expect("written");
        let _clear = Clear(ram.clone());
        let disks = [
            ("disk-a", &volumes[1][..]),
            ("disk-b", &volumes[2][..DISK_B as usize]),
        ];
        let mut placed = std::collections::BTreeMap::new();
        for (disk, (node, bytes)) in self.definition.disks.iter().zip(disks) {
            assert_eq!(disk.name, node);
            std::fs::write(at(node), bytes).expect("written");
            let placement = DiskPlacement {
                overlay: at(&format!("{node}.qcow2")),
                backing: Backing::File {
                    path: at(node),
                    format: "raw".to_owned(),
                },
            };
            placed.insert(disk.name.clone(), placement);
        }
        let placement = Placement {
            run: at("run"),
            qmp: at("run/qmp.sock"),
            ram: [("ram0".to_owned(), ram.clone())].into(),
            disks: placed,
            ..Placement::default()
        };
        let mut launched = Launched::start(&LaunchPlan {
            definition: &self.definition,
            placement: &placement,
            program: None,
        })
        .expect("launches");
        launched.restore(device_state).expect("restores");
        let before = work(&volumes[0]);
        assert_eq!(work(&std::fs::read(&ram).expect("reads")), before);
        launched.run().expect("runs");
        let deadline = Instant::now() + PATIENCE;
        while work(&std::fs::read(&ram).expect("reads")).disk < before.disk + 64 * 300 {
            assert!(Instant::now() < deadline, "it does not go on elsewhere");
            std::thread::sleep(Duration::from_millis(10));
        }
        launched.stop().expect("stops");
        let mut volumes = vec![std::fs::read(&ram).expect("reads")];
        for node in ["disk-a", "disk-b"] {
            let raw = crate::busy_guest::raw(&at(&format!("{node}.qcow2")), "qcow2", &at("copy"));
            volumes.push(raw);
        }
        launched.kill();
        let padded = volumes[2].len().next_multiple_of(UNIT);
        volumes[2].resize(padded, 0);
        assert_one_instant(&volumes);
    }

    fn runs(&self) -> bool {
        self.ask("query-status")["status"] == "running" || self.vm.path("work/throttled").exists()
    }

    fn end(&mut self) {
        let _ = self.vm.child.kill();
        let _ = self.vm.child.wait();
    }

    fn traces(&self) -> Vec<String> {
        let queries = [
            "query-block-exports",
            "query-jobs",
            "query-named-block-nodes",
        ];
        let answers = queries.map(|query| self.ask(query).to_string());
        let words = answers.iter().flat_map(|text| text.split('"'));
        words
            .filter(|word| word.starts_with("farhaven-"))
            .map(str::to_owned)
            .collect()
    }

    fn fail_request(&mut self, after: u64) {
        self.planted += 1;
        self.proxy.fail(after, self.planted.is_multiple_of(2));
    }

    fn mend(&mut self) -> bool {
        self.proxy.mend()
    }

    fn every(&self) -> usize {
        3
    }
}

struct Clear(PathBuf);

impl Drop for Clear {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
