//! What a demo will be, made sure of before anything is started.

use std::path::Path;
use std::process::{Command, Stdio};

use farhaven_policies::units::{ByteSize, Period};
use farhaven_wan::emulate::LinkShape;

use super::{Demo, GuestKind, Scenario, qemu};
use crate::cli::show::bytes;
use crate::guest::qemu::peer::bytes_free;
use crate::guest::sim::Workload;

/// Beside the guest's RAM: daemons, stores' caches, the guest's own monitor.
const BESIDE: u64 = 300 << 20;

/// The guest's disk, where the demo makes it.
pub(super) const DISK: ByteSize = ByteSize::from_mib(64);

/// Most megabytes a second of noise: more than a guest here can write.
const LOUDEST: u64 = 1000;

/// Slowest link over which a first copy ends while somebody watches.
const SLOWEST_LINK: u64 = 1_000_000;

/// Everything that was chosen.
#[derive(Debug, Clone)]
pub(super) struct Settled {
    pub(super) kind: GuestKind,
    pub(super) scenario: Scenario,
    pub(super) link: LinkShape,
    pub(super) ram: ByteSize,
    pub(super) workload: String,
    pub(super) rpo: Period,
    pub(super) steady: Period,
    /// Said at the start: why it is not kvm.
    pub(super) note: Option<String>,
}

impl Settled {
    /// Chooses what was left open, and refuses what cannot be.
    pub(super) fn of(demo: &Demo) -> Result<Self, String> {
        let (kind, note) = choose(demo.guest)?;
        let scenario = match (demo.planned, demo.test_failover) {
            (true, _) => Scenario::Planned,
            (_, true) => Scenario::Test,
            _ => Scenario::Disaster,
        };
        let is_qemu = kind == GuestKind::Qemu;
        let (ram, rpo, steady) = if is_qemu { (512, 10, 30) } else { (256, 3, 15) };
        let settled = Self {
            kind,
            scenario,
            link: demo.link,
            ram: demo.ram.unwrap_or(ByteSize::from_mib(ram)),
            workload: demo.workload.clone(),
            rpo: demo.rpo.unwrap_or(Period::from_secs(rpo)),
            steady: demo.steady.unwrap_or(Period::from_secs(steady)),
            note,
        };
        if demo.image.is_some() && !is_qemu {
            return Err(format!(
                "--image: a {} guest has no kernel, initrd or disk of Debian's; add --guest qemu, or leave it out",
                kind.word()
            ));
        }
        workload(kind, &settled.workload)?;
        settled.fits_link()?;
        settled.fits_ram(memory_available(), bytes_free(Path::new("/dev/shm")))?;
        Ok(settled)
    }

    /// A shape on which nothing would ever arrive is no link.
    fn fits_link(&self) -> Result<(), String> {
        let link = &self.link;
        if link.loss_ppm > 200_000 {
            return Err(format!(
                "--link {link}: with more than 20 % loss two sites do not stay connected; try 100mbit,80ms,1%"
            ));
        }
        if link.rate < SLOWEST_LINK {
            return Err(format!(
                "--link {link}: a first copy over less than 1mbit takes longer than a demo; try 10mbit,80ms,0.1%"
            ));
        }
        if link.rtt.as_secs() >= 3 {
            return Err(format!(
                "--link {link}: with a round trip of 3 s or more two sites hold each other for lost; try 100mbit,600ms,0.1%"
            ));
        }
        Ok(())
    }

    /// The guest's RAM is here twice: at both sites; a test's a third time.
    fn fits_ram(&self, memory: u64, shared: u64) -> Result<(), String> {
        let ram = self.ram.bytes();
        let smallest = if self.kind == GuestKind::Qemu {
            192
        } else {
            64
        };
        if ram < smallest << 20 {
            return Err(format!(
                "--ram {}: a {} guest needs at least {smallest}MiB",
                self.ram,
                self.kind.word()
            ));
        }
        if !ram.is_multiple_of(2 << 20) {
            return Err(format!(
                "--ram {}: memory comes in pages of 2 MiB; try --ram {}MiB",
                self.ram,
                (ram >> 21) << 1
            ));
        }
        let copies = if self.scenario == Scenario::Test {
            3
        } else {
            2
        };
        let needed = ram.saturating_mul(copies);
        let free = memory.min(shared);
        if needed.saturating_add(BESIDE) > memory || needed > shared {
            let place = if needed > shared {
                "in /dev/shm"
            } else {
                "of memory"
            };
            let most = (free.saturating_sub(BESIDE) / copies) >> 21 << 1;
            return Err(format!(
                "--ram {}: its memory is here {} (once at each site{}): {} {place}, and {} are free; try --ram {most}MiB",
                self.ram,
                if copies == 3 { "three times" } else { "twice" },
                if copies == 3 {
                    ", once in the test"
                } else {
                    ""
                },
                bytes(needed),
                bytes(free),
            ));
        }
        Ok(())
    }
}

/// Bytes that programs may still take.
fn memory_available() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib: Option<u64> = line.and_then(|l| l.split_whitespace().next()?.parse().ok());
    // Where the kernel does not tell, starting the guest will.
    kib.map_or(u64::MAX, |kib| kib.saturating_mul(1024))
}

/// Which guest, and why not the one over KVM.
fn choose(wanted: Option<GuestKind>) -> Result<(GuestKind, Option<String>), String> {
    match wanted {
        None => Ok(match kvm() {
            Ok(()) => (GuestKind::Kvm, None),
            Err(why) => (
                GuestKind::Sim,
                Some(format!(
                    "The guest is a simulated one, since KVM does not work here: {why}"
                )),
            ),
        }),
        Some(GuestKind::Kvm) => kvm()
            .map(|()| (GuestKind::Kvm, None))
            .map_err(|why| format!("--guest kvm: {why}. Without KVM: --guest sim")),
        Some(GuestKind::Qemu) => {
            for program in ["qemu-system-x86_64", "qemu-img"] {
                let found = Command::new(program)
                    .arg("--version")
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .status();
                if !found.is_ok_and(|status| status.success()) {
                    return Err(format!(
                        "--guest qemu: there is no {program} here; install it: {}. Without QEMU: --guest sim",
                        qemu::INSTALL
                    ));
                }
            }
            Ok((GuestKind::Qemu, None))
        }
        Some(GuestKind::Sim) => Ok((GuestKind::Sim, None)),
    }
}

/// Does KVM work here?
#[cfg(target_arch = "x86_64")]
fn kvm() -> Result<(), String> {
    let facts = crate::guest::kvm::facts::facts();
    facts.map(|_| ()).map_err(|why| why.to_string())
}

/// Does KVM work here?
#[cfg(not(target_arch = "x86_64"))]
fn kvm() -> Result<(), String> {
    Err("Farhaven's own guest over KVM is one for x86_64".to_owned())
}

/// Is it one that this guest knows?
fn workload(kind: GuestKind, name: &str) -> Result<(), String> {
    let wrong = |why: String| Err(format!("--workload {name}: {why}"));
    if kind != GuestKind::Qemu {
        let known: Result<Workload, _> = name.parse();
        return known.map(|_| ()).or_else(|e| wrong(e.to_string()));
    }
    let noise = |rate: &str| {
        let rate: Result<u64, _> = rate.parse();
        rate.is_ok_and(|rate| (1..=LOUDEST).contains(&rate))
    };
    if ["idle", "database"].contains(&name) || name.strip_prefix("noise:").is_some_and(noise) {
        return Ok(());
    }
    wrong(format!(
        "a qemu guest knows idle, database and noise:<MB/s>, 1 to {LOUDEST}"
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn settled(ram_mib: u64, scenario: Scenario) -> Settled {
        Settled {
            kind: GuestKind::Sim,
            scenario,
            link: "100mbit,80ms,0.1%".parse().unwrap(),
            ram: ByteSize::from_mib(ram_mib),
            workload: "database".to_owned(),
            rpo: Period::from_secs(3),
            steady: Period::from_secs(15),
            note: None,
        }
    }

    #[test]
    fn ram_that_does_not_fit_is_refused_with_what_would() {
        let plenty = 64 << 30;
        assert!(
            settled(256, Scenario::Disaster)
                .fits_ram(plenty, plenty)
                .is_ok()
        );
        let tight = (512 << 20) + BESIDE;
        assert!(
            settled(256, Scenario::Disaster)
                .fits_ram(tight, tight)
                .is_ok()
        );
        let why = settled(256, Scenario::Test)
            .fits_ram(tight, tight)
            .unwrap_err();
        assert!(
            why.contains("three times") && why.contains("--ram 170MiB"),
            "{why}"
        );
        let why = settled(256, Scenario::Planned)
            .fits_ram(plenty, 400 << 20)
            .unwrap_err();
        assert!(why.contains("in /dev/shm"), "{why}");
        let why = settled((u64::MAX >> 21) - 1, Scenario::Test)
            .fits_ram(plenty, plenty)
            .unwrap_err();
        assert!(why.contains("are free"), "{why}");
        let why = settled(2, Scenario::Test)
            .fits_ram(plenty, plenty)
            .unwrap_err();
        assert!(why.contains("at least 64MiB"), "{why}");
        let why = settled(65, Scenario::Test)
            .fits_ram(plenty, plenty)
            .unwrap_err();
        assert!(why.contains("--ram 64MiB"), "{why}");
    }

    #[test]
    fn workloads_are_known_before_anything_starts() {
        for name in ["idle", "database", "files", "noise:8"] {
            workload(GuestKind::Sim, name).unwrap();
        }
        workload(GuestKind::Qemu, "files").unwrap_err();
        for name in ["noise:", "noise:0", "noise:99999999999999999999", "x", ""] {
            for kind in [GuestKind::Kvm, GuestKind::Qemu] {
                let why = workload(kind, name).unwrap_err();
                assert!(why.contains("noise"), "{why}");
            }
        }
    }

    #[test]
    fn links_that_carry_nothing_are_refused() {
        for link in ["100mbit,80ms,50%", "8kbit,80ms", "100mbit,9s"] {
            let mut settled = settled(256, Scenario::Disaster);
            settled.link = link.parse().unwrap();
            assert!(settled.fits_link().unwrap_err().contains("try "));
        }
    }
}
