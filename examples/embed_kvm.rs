//! Protects a guest of your own KVM monitor: `cargo run --release --example embed_kvm`
//!
//! The monitor is [`monitor`]: it owns the `VmFd`, the guest's memory and a
//! thread per vCPU. Three things make a guest of Farhaven of it: its memory is a
//! `TrackedRam`, its vCPU threads call `VcpuGate::run` in place of `VcpuFd::run`,
//! and a `DeviceState` saves its devices (here `()`: it has none). Two sites run here in one process; the
//! first is lost, the guest counts on at the second.

use std::error::Error;
use std::fs::File;
use std::net::UdpSocket;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use farhaven::activate::machine::{BuildPlan, Builder, Builders, Machine, MachineError};
use farhaven::guest::embedded::{Definition, Vmm};
use farhaven::guest::kvm::{Gates, KvmParts, KvmVmm, TrackedMemory, TrackedRam, Turn};
use farhaven::guest::qemu::check::Finding;
use farhaven::site::Site;
use farhaven_policies::site::SiteConfig;
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{FileOffset, GuestAddress};

type Failure = Box<dyn Error + Send + Sync>;

const RAM: u64 = 16 << 20;
/// start: inc dword [0x2000]; mov eax, [0x2000]; mov dx, 0x80; out dx, eax; jmp start
const PROGRAM: &[u8; 16] = b"\x66\xff\x06\x00\x20\x66\xa1\x00\x20\xba\x80\x00\x66\xef\xeb\xf0";

/// Your monitor: a guest over a RAM file, held at its first instruction.
fn monitor(ram: &Path, count: Arc<AtomicU32>) -> Result<KvmVmm, Failure> {
    let ram = File::options().read(true).write(true).open(ram)?;
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
    let vcpu_thread = move || loop {
        match gate.run(&mut vcpu) {
            Ok(Turn::Exit(VcpuExit::IoOut(0x80, &[a, b, c, d]))) => {
                count.store(u32::from_le_bytes([a, b, c, d]), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(Turn::Again) => {}
            Ok(Turn::Exit(other)) => return gate.end(&format!("unexpected: {other:?}")),
            Ok(Turn::End) => return,
            Err(error) => return gate.end(&error.to_string()),
        }
    };
    std::thread::spawn(vcpu_thread);
    let ram = TrackedRam::register(vm.clone(), memory)?;
    Ok(KvmVmm::new(KvmParts {
        vm,
        ram,
        gates,
        disks: Vec::new(),
        devices: Box::new(()),
    })?)
}

/// How a peer makes the same guest from a recovery point.
struct CounterBuilder(Arc<AtomicU32>);

impl Builder for CounterBuilder {
    fn build(&self, plan: BuildPlan<'_>) -> Result<Box<dyn Machine>, MachineError> {
        let [ram] = plan.ram.as_slice() else {
            return Err(MachineError::Other("it has one block of RAM".to_owned()));
        };
        let guest = monitor(ram, self.0.clone());
        let guest = guest.map_err(|error| MachineError::Other(error.to_string()))?;
        Ok(guest.into_machine())
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

    let (ram, mut memory) = (home.path().join("guest.ram"), vec![0; RAM as usize]);
    memory[0x1000..][..PROGRAM.len()].copy_from_slice(PROGRAM);
    std::fs::write(&ram, memory)?;
    let mut guest = monitor(&ram, here.clone())?;
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
    let (point, now) = (report.point, there.load(Ordering::Relaxed));
    println!("east was lost at {lost_at}; it runs at west from point {point} on, and is at {now}");
    west.end_guest("counter").await?;
    west.shutdown().await;
    Ok(())
}
