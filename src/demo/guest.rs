//! The demo's guest, where it begins: hosted by the daemon of the east site,
//! or in a QEMU beside it.

use std::path::Path;
use std::time::Duration;

use super::GuestKind;
use super::console::Console;
use super::qemu::{Machine, RamFile};
use super::screen::Screen;
use super::settle::{DISK, Settled};
use super::stage::Stage;
use super::story::NAME;
use crate::site::api::{AddGuest, StartGuest};
use crate::site::records::GuestRecord;

/// Boot, fill memory, first heartbeats: software emulation is slow.
const BOOT: Duration = Duration::from_secs(180);

/// What a hosted guest's content is made from: the same in every demo.
const SEED: u64 = 1;

/// It has come to its workload after so many heartbeats.
const SETTLED: u64 = 10;

/// The guest at east.
pub(super) struct Guest {
    /// Its console there.
    pub(super) console: Console,
    /// Its QEMU, where it has one.
    machine: Option<Machine>,
}

impl Guest {
    /// Starts it, makes it known to the east site, and waits until it is busy.
    pub(super) async fn start(
        settled: &Settled,
        stage: &Stage,
        directory: &Path,
        image: Option<&Path>,
        screen: &Screen,
    ) -> Result<Self, String> {
        let mut guest = match (settled.kind, image) {
            (GuestKind::Qemu, Some(image)) => {
                qemu(settled, stage, directory, image, screen).await?
            }
            _ => hosted(settled, stage, screen).await?,
        };
        let beats = if guest.machine.is_some() {
            2 * SETTLED
        } else {
            SETTLED
        };
        let waited = guest
            .console
            .wait("heartbeat", BOOT, |c| (c.number() >= beats).then_some(()))
            .await;
        waited.map_err(|why| format!("{why}\n{}", stage.east.last_words()))?;
        if let Some(machine) = &guest.machine {
            let body = AddGuest {
                name: NAME.to_owned(),
                qmp: Some(machine.qmp.clone()),
                start: None,
            };
            let added = stage.east.client.post::<GuestRecord>("/v1/guests", &body);
            added.await.map_err(|e| e.to_string())?;
        }
        Ok(guest)
    }

    /// Did its QEMU end?
    pub(super) fn ended(&mut self) -> bool {
        self.machine.as_mut().is_some_and(Machine::ended)
    }

    /// Ends its QEMU as a power cut would; a hosted guest dies with its daemon.
    pub(super) fn kill(&mut self) {
        if let Some(machine) = &mut self.machine {
            machine.kill();
        }
    }
}

async fn qemu(
    settled: &Settled,
    _stage: &Stage,
    directory: &Path,
    image: &Path,
    screen: &Screen,
) -> Result<Guest, String> {
    screen.say(&format!(
        "A Debian guest boots at east ({} MiB of memory, software emulation) …",
        settled.ram.bytes() >> 20
    ));
    let directory = directory.join("guest");
    std::fs::create_dir_all(&directory).map_err(|e| format!("{}: {e}", directory.display()))?;
    let mib = settled.ram.bytes() >> 20;
    let machine = Machine::start(image, &directory, RamFile::new(), mib, &settled.workload)?;
    Ok(Guest {
        console: Console::within(&directory),
        machine: Some(machine),
    })
}

async fn hosted(settled: &Settled, stage: &Stage, screen: &Screen) -> Result<Guest, String> {
    screen.say(&format!(
        "A guest starts at east ({}: {} MiB of memory, {} MiB of disk, workload {}) …",
        settled.kind.word(),
        settled.ram.bytes() >> 20,
        DISK.bytes() >> 20,
        settled.workload
    ));
    let body = AddGuest {
        name: NAME.to_owned(),
        qmp: None,
        start: Some(StartGuest {
            kind: settled.kind.word().to_owned(),
            ram: settled.ram,
            disk: DISK,
            vcpus: 1,
            workload: settled.workload.clone(),
            seed: SEED,
        }),
    };
    let record = stage.east.client.post::<GuestRecord>("/v1/guests", &body);
    let record = record
        .await
        .map_err(|e| format!("{e}\n{}", stage.east.last_words()))?;
    Ok(Guest {
        console: Console::of(record.console.as_ref())?,
        machine: None,
    })
}
