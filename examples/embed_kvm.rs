//! Protects a guest of your own KVM monitor: `cargo run --release --example embed_kvm`
//!
//! The monitor is [`monitor`]: it owns the `VmFd`, the guest's memory and a
//! thread per vCPU. Three things make a guest of Farhaven of it: its memory is a
//! `TrackedRam`, its vCPU threads call `VcpuGate::run` in place of `VcpuFd::run`,
//! and a `DeviceState` saves its devices. Two sites run here in one process; the
//! first is lost, the guest counts on at the second.

use std::error::Error;
use std::fs::File;
use std::net::UdpSocket;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use farhaven::activate::machine::{BuildPlan, Builder, Builders, Machine, MachineError};
use farhaven::guest::embedded::{Definition, Vmm, VmmError};
use farhaven::guest::kvm::{DeviceState, Gates, KvmParts, KvmVmm, TrackedMemory, TrackedRam, Turn};
use farhaven::guest::qemu::check::Finding;
use farhaven::site::Site;
use farhaven_policies::site::SiteConfig;
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{FileOffset, GuestAddress};

type Failure = Box<dyn Error + Send + Sync>;

const RAM: u64 = 16 << 20;
/// Counts in memory and says the count at port 0x80, for ever.
#[rustfmt::skip]
const PROGRAM: [u8; 16] = [
    0x66, 0xff, 0x06, 0x00, 0x20, // inc dword [0x2000]
    0x66, 0xa1, 0x00, 0x20,       // mov eax, [0x2000]
    0xba, 0x80, 0x00,             // mov dx, 0x80
    0x66, 0xef,                   // out dx, eax
    0xeb, 0xf0,                   // jmp to the start
];

/// This monitor's devices hold no state.
struct NoDevices;

impl DeviceState for NoDevices {
    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        Ok(Vec::new())
    }

    fn restore(&mut self, _: &[u8]) -> Result<(), VmmError> {
        Ok(())
    }
}

/// Your monitor: a guest over a RAM file, held at its first instruction.
fn monitor(ram: File, count: Arc<AtomicU32>) -> Result<KvmVmm, Failure> {
    let kvm = Kvm::new()?;
    let vm = Arc::new(kvm.create_vm()?);
    let file = Some(FileOffset::new(ram, 0));
    let memory = TrackedMemory::from_ranges_with_files([(GuestAddress(0), RAM as usize, file)])?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?)?;
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rflags) = (0x1000, 2);
    vcpu.set_regs(&regs)?;
    let (gates, each) = Gates::new(1);
    let mut gate = each.into_iter().next().ok_or("no gate")?;
    // The monitor's own vCPU thread. The gate holds it while the guest is cut.
    std::thread::spawn(move || {
        loop {
            match gate.run(&mut vcpu) {
                Ok(Turn::Exit(VcpuExit::IoOut(0x80, &[a, b, c, d]))) => {
                    count.store(u32::from_le_bytes([a, b, c, d]), Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(Turn::Again) => {}
                Ok(Turn::Exit(other)) => break gate.end(&format!("unexpected: {other:?}")),
                Ok(Turn::End) => break,
                Err(error) => break gate.end(&error.to_string()),
            }
        }
    });
    let ram = TrackedRam::register(vm.clone(), memory)?;
    let (disks, devices) = (Vec::new(), Box::new(NoDevices));
    Ok(KvmVmm::new(KvmParts {
        vm,
        ram,
        gates,
        disks,
        devices,
    })?)
}

/// How a peer makes the same guest from a recovery point.
struct CounterBuilder(Arc<AtomicU32>);

impl Builder for CounterBuilder {
    fn build(&self, plan: BuildPlan<'_>) -> Result<Box<dyn Machine>, MachineError> {
        let failed = |error: Failure| MachineError::Other(error.to_string());
        let ram = plan
            .ram
            .first()
            .ok_or("no RAM file")
            .map_err(|e| failed(e.into()))?;
        let ram = File::options().read(true).write(true).open(ram);
        let guest = monitor(ram.map_err(|e| failed(e.into()))?, self.0.clone());
        Ok(guest.map_err(failed)?.into_machine())
    }

    fn check(&self, _: &Definition) -> Vec<Finding> {
        Vec::new()
    }
}

async fn site(home: &Path, name: &str, builders: Builders) -> Result<Arc<Site>, Failure> {
    let mut config = SiteConfig::default();
    config.site.name = name.to_owned();
    config.site.state_dir = home.join(name);
    config.activate.ram_dir = home.join(name).join("ram");
    config.listen.address = UdpSocket::bind("127.0.0.1:0")?.local_addr()?;
    config.listen.advertise = vec![config.listen.address.to_string()];
    Ok(Site::start_with(config, builders).await?)
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let home = tempfile::tempdir()?;
    let (here, there) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let builder: Arc<dyn Builder> = Arc::new(CounterBuilder(there.clone()));
    let east = site(home.path(), "east", Builders::new()).await?;
    let west = site(
        home.path(),
        "west",
        [("counter".to_owned(), builder)].into(),
    )
    .await?;
    east.pair(&west.invite(Duration::from_secs(60))?).await?;

    let ram = tempfile::tempfile()?;
    ram.set_len(RAM)?;
    let mut guest = monitor(ram.try_clone()?, here.clone())?;
    std::os::unix::fs::FileExt::write_all_at(&ram, &PROGRAM, 0x1000)?;
    guest.resume()?;
    let definition = Definition {
        kind: "counter".to_owned(),
        vcpus: 1,
        ram: vec![("ram".to_owned(), RAM)],
        disks: Vec::new(),
        config: Vec::new(),
    };
    let guest = Arc::new(Mutex::new(guest));
    east.embed("counter", guest.clone(), definition)?;
    east.protect("counter", "west", Some("1s".parse()?)).await?;
    while west
        .view()
        .standbys
        .iter()
        .all(|standby| standby.newest_point < 3)
    {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    guest.lock().map_err(|_| "the guest's lock")?.end(); // the disaster
    east.shutdown().await;
    let lost_at = here.load(Ordering::Relaxed);
    let report = west.fail_over("counter", None, true).await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    println!("it had counted to {lost_at} at east when east was lost");
    println!(
        "it runs at west from point {} and is at {}",
        report.point,
        there.load(Ordering::Relaxed)
    );
    west.end_guest("counter").await?;
    west.shutdown().await;
    Ok(())
}
