//! One recovery point, from the stop of the guest to the peer's word that it is sealed.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use farhaven_policies::alert::Severity;
use farhaven_storage_sync::unit::{Volume, VolumeKind};

use super::alerts::{Alert, Kind};
use super::driver::{Attached, DriveError, Driver};
use super::groups::{GroupCut, PointGroup};
use super::remote::AskError;
use super::steps::{blocking, take};
use crate::activate::fence::Term;
use crate::capture::CaptureBuffer;
use crate::guest::embedded::VmmError;
use crate::guest::gate::{Alone, CutGate};
use crate::guest::{After, Cut, CutTimes, Guest, GuestError, Quiesced, SinkError};
use crate::replicate::message::{ActivationTimes, Message, PointContext, SealRequest};
use crate::replicate::outlet::Outlet;
use crate::replicate::send::Shipped;

/// A guest that changes more than the capture buffer holds between a round
/// and the cut after it gets this many rounds to calm down in.
const ROUNDS: usize = 4;

/// No cut was given up for so long: it is over.
const SETTLED: Duration = Duration::from_secs(60);

/// A cut whose every byte is on its way.
pub(super) struct Made {
    pub(super) point: u64,
    pub(super) cut_at: SystemTime,
    pub(super) stopped: Instant,
    pub(super) times: CutTimes,
    pub(super) volumes: Vec<Volume>,
    pub(super) shipped: Shipped,
    pub(super) chain: [u8; 32],
    /// Bytes of batches sent after the stop.
    pub(super) final_bytes: u64,
    /// The group cut that it is part of.
    pub(super) group: Option<PointGroup>,
    /// Whether its filesystems were frozen for it.
    pub(super) quiesced: Quiesced,
    /// Of those, the device state's and the disks', by their share of what changed.
    pub(super) shares: [u64; 2],
}

/// How much a point tells of how fast its guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    /// All: there was one before.
    Since,
    /// The first of an attachment: since the round before it, in the rough.
    Roughly,
    /// As above, and rounds read no disks: of those, nothing.
    MemoryRoughly,
}

/// A point that is durable at the peer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sealed {
    pub(super) cut_at: SystemTime,
    /// The same, on the clock that nobody sets.
    pub(super) stopped: Instant,
    /// How long the guest was stopped for it.
    pub(super) pause: Duration,
    /// From the cut until it was sealed.
    pub(super) took: Duration,
    /// From the cut before until this one; of a first one, from when the round before
    /// it began.
    pub(super) since_before: Duration,
    pub(super) seen: Seen,
    /// Bytes of its batches.
    pub(super) sent_bytes: u64,
    /// Of those, what was sent after the guest was stopped.
    pub(super) final_bytes: u64,
    /// Of those, the device state's, by its share of what changed.
    pub(super) state_bytes: u64,
    /// And the disks'.
    pub(super) disk_bytes: u64,
    /// How long memory was looked through for it.
    pub(super) scan: Duration,
}

/// Stops the guest for an instant, with the others of a group cut if there is
/// one, and ships what changed.
pub(super) async fn make(
    driver: &mut Driver,
    attached: &mut Attached,
    after: After,
    group: Option<Arc<GroupCut>>,
) -> Result<Made, DriveError> {
    let began = Instant::now();
    if after == After::Hold {
        driver.stood_before = driver.stands(attached).await?;
    }
    if let Err(error) = driver.ready_for_a_cut(attached, after).await {
        if let Some(group) = &group {
            group.gate.give_up(&error.to_string());
        }
        return Err(error);
    }
    let mut guest = take(&mut attached.guest)?;
    let mut shipment = driver.shipment(attached);
    if after == After::Hold {
        // The guest stands still: nothing else is worth more.
        shipment = shipment.held();
    }
    let mut known = std::mem::take(&mut attached.state_known);
    let limit =
        usize::try_from(driver.protection.policy.capture_buffer.bytes()).unwrap_or(usize::MAX);
    let point = attached.next;
    driver.last_point = driver.last_point.max(point);
    let quiesce = driver.quiesces(after);
    let _leaves = group.as_ref().map(|g| g.left_at(driver.stop.subscribe()));
    let work = blocking(move || {
        let with = group.as_deref();
        guest.quiesce_cuts(quiesce);
        let made = ship(
            &mut *guest,
            &mut shipment,
            &mut known,
            point,
            after,
            limit,
            with,
        );
        if let (Some(group), Err(error)) = (with, &made) {
            group.gate.give_up(&error.to_string());
        }
        (guest, shipment, known, made)
    });
    let (guest, shipment, known, made) = driver.finishing(work).await?;
    attached.guest = Some(guest);
    attached.shipment = Some(shipment);
    attached.state_known = known;
    if matches!(made, Err(GuestError::LeftStopped { .. })) {
        driver.left_stopped = true;
    }
    if let Err(error) = &made {
        driver.tell_given_up(error);
    }
    let waiting_bytes = attached.guest.as_ref().map_or(0, |guest| guest.waiting());
    let waiting_bytes = waiting_bytes * farhaven_storage_sync::unit::UNIT as u64;
    driver.view.send_modify(|v| v.waiting_bytes = waiting_bytes);
    let mut made = driver.interrupted_or(made)?;
    driver.was_quiesced(&mut made, quiesce);
    if after == After::Hold && driver.boots_there() {
        // Nobody was served any more from when it began to shut down.
        made.stopped = began;
    }
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    driver.view.send_modify(|v| {
        v.last_pause_ms = Some(ms(made.times.pause));
        v.last_ram_scan_ms = Some(ms(made.times.ram_scan));
        v.last_ram_scanned_bytes = Some(made.times.ram_scanned_bytes);
    });
    Ok(made)
}

impl Driver {
    /// A cut that came to nothing is an alert until one is sealed; who asked for
    /// its end, and a link that went away, are told of elsewhere.
    fn tell_given_up(&self, error: &GuestError) {
        let name = &self.record.name;
        let alert = match error {
            GuestError::Sink(SinkError::Closed) => return,
            GuestError::Gate(_) if *self.stop.borrow() => return,
            GuestError::LeftStopped { .. } => Alert::new(
                Kind::GuestStopped,
                name,
                Severity::Critical,
                format!("'{name}': {error}"),
                "let it go on by hand; protection goes on by itself then",
            ),
            _ => Alert::new(
                Kind::CutGivenUp,
                name,
                Severity::Warning,
                format!("a cut of '{name}' was given up, it runs on: {error}"),
                "nothing at once: it is tried again. If it stays: raise protect.capture_buffer, give it more of the link (farhaven link show), or a longer RPO",
            )
            .clears_after(SETTLED),
        };
        self.site.raise(alert);
    }
}

/// Stops a guest that is being copied, lets it go on unless it is held, and
/// ships what that instant is made of.
pub(super) fn ship(
    guest: &mut dyn Guest,
    shipment: &mut dyn Outlet,
    known: &mut Vec<farhaven_storage_sync::unit::Digest>,
    point: u64,
    after: After,
    limit: usize,
    group: Option<&GroupCut>,
) -> Result<Made, GuestError> {
    let gate: &dyn CutGate = group.map_or(&Alone, |group| &group.gate);
    let mut rounds = 0;
    let (mut cut, buffer) = loop {
        let mut buffer = CaptureBuffer::new(limit);
        match guest.cut_at(point, after, gate, &mut buffer) {
            Ok(cut) => break (cut, buffer),
            // Or a vCPU waits for its disk: the guest went on, and comes to an
            // end of that.
            Err(
                GuestError::Sink(SinkError::Full) | GuestError::Vmm(VmmError::DoesNotStop { .. }),
            ) if rounds < ROUNDS && group.is_none() => {
                rounds += 1;
                guest.round(shipment)?;
            }
            // The others of the group are not kept: the guest is cut by itself then.
            Err(error) if group.is_some() => return Err(error),
            Err(GuestError::Sink(SinkError::Full)) => {
                return Err(GuestError::State(format!(
                    "the guest changes more than {} MiB of memory between a copy and the cut after it, {ROUNDS} times over; its RPO stretches. Raise protect.capture_buffer, or give the link more",
                    limit >> 20
                )));
            }
            Err(error) => return Err(error),
        }
    };
    let before = shipment.sum().0.sent_bytes;
    let mut changed = [0; 3];
    let volumes = guest.volumes().len();
    let shipped = everything(volumes, &mut cut, buffer, shipment, known, &mut changed);
    let (cut_at, stopped) = (cut.at, cut.stopped);
    let (times, quiesced) = (cut.times, cut.quiesced.clone());
    let state_bytes = cut.device_state.len() as u64;
    let finished = guest.finish_cut(cut, shipped.is_ok());
    shipped?;
    finished?;
    let mut volumes = guest.volumes().to_vec();
    if let Some(state) = volumes
        .iter_mut()
        .find(|v| v.kind == VolumeKind::DeviceState)
    {
        state.bytes = state_bytes;
    }
    let (shipped, chain) = shipment.sum();
    let final_bytes = shipped.sent_bytes - before;
    Ok(Made {
        point,
        cut_at,
        stopped,
        times,
        volumes,
        shipped,
        chain,
        final_bytes,
        group: group.and_then(GroupCut::mark),
        quiesced,
        shares: shares(final_bytes, changed),
    })
}

/// What the second and third part of `changed` have of these bytes.
fn shares(bytes: u64, changed: [u64; 3]) -> [u64; 2] {
    let all: u64 = changed.iter().sum();
    let [_, state, disks] = changed;
    [state, disks].map(|part| (bytes as f64 * part as f64 / all.max(1) as f64) as u64)
}

/// `changed` gets the bytes of guest data of memory, device state and disks.
fn everything(
    volumes: usize,
    cut: &mut Cut,
    buffer: CaptureBuffer,
    shipment: &mut dyn Outlet,
    known: &mut Vec<farhaven_storage_sync::unit::Digest>,
    changed: &mut [u64; 3],
) -> Result<(), GuestError> {
    shipment.hurry(true);
    let mut counted = shipment.sum().0.changed_bytes;
    let mut count = |shipment: &dyn Outlet, part: usize| {
        let now = shipment.sum().0.changed_bytes;
        if let Some(changed) = changed.get_mut(part) {
            *changed = now - std::mem::replace(&mut counted, now);
        }
    };
    let shipped = (|| {
        buffer.drain_into(shipment)?;
        count(shipment, 0);
        let state = u16::try_from(volumes.saturating_sub(1)).unwrap_or(u16::MAX);
        shipment.device_state(state, &cut.device_state, known)?;
        count(shipment, 1);
        for disk in &mut cut.disks {
            disk.changed(shipment)?;
        }
        count(shipment, 2);
        Ok(shipment.flush()?)
    })();
    shipment.hurry(false);
    shipped
}

/// Has the peer seal a point, over as many connections as it takes.
pub(super) async fn seal(
    driver: &mut Driver,
    attached: &mut Attached,
    made: Made,
) -> Result<Sealed, DriveError> {
    let request = request(driver, attached, &made, None);
    loop {
        let remote = driver.remote.clone();
        let question = Message::Seal(Box::new(request.clone()));
        let patience = Duration::from_secs(300);
        match driver
            .interruptible(remote.ask_within(question, patience))
            .await?
        {
            Ok(Message::Sealed { point }) if point == made.point => break,
            Ok(Message::Dangling { missing }) => {
                // Where one is gone others may be: bandwidth is cheaper than a round trip each.
                attached.outgoing.forget_all();
                attached.outgoing.asking.distrust();
                return Err(DriveError::Other(format!(
                    "batch {missing} is gone at the peer; point {} begins anew",
                    made.point
                )));
            }
            Ok(_) => return Err(AskError::Unfitting(driver.protection.to.clone()).into()),
            // Whoever asked for a move is told at once; the point comes with the next attempt.
            Err(error @ AskError::Unreachable(_)) if driver.moves() => return Err(error.into()),
            Err(AskError::Unreachable(_) | AskError::TimedOut(..)) => {
                driver.view.send_modify(|v| {
                    v.trouble = format!(
                        "site '{}' cannot be reached; point {} waits for it",
                        driver.protection.to, made.point
                    )
                });
                driver.interruptible(remote.reachable()).await?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let took = made.stopped.elapsed();
    attached.shipment = None;
    let mut running = None;
    if let Some(mut guest) = attached.guest.take() {
        // Its clearing up talks to QEMU.
        let point = made.point;
        let (guest, stood) = blocking(move || {
            guest.sealed(point);
            let stood = guest.running();
            (guest, stood)
        })
        .await?;
        attached.guest = Some(guest);
        running = stood;
    }
    let stands = driver.why_it_stands(running).await;
    attached.newest = made.point;
    attached.next = made.point + 1;
    let before = driver.last_cut.replace(made.stopped);
    let looked = before.or(driver.looked);
    let guest = attached.guest.as_ref();
    let rounds_read_disks = guest.is_none_or(|guest| guest.rounds_read_disks());
    let allowed = driver.protection.policy.max_pause;
    driver.view.send_modify(|v| {
        v.trouble.clear();
        if made.times.pause > allowed.duration() {
            v.trouble = format!(
                "the last cut stopped the guest for {:.0} ms; protect.max_pause is {allowed}",
                made.times.pause.as_secs_f64() * 1e3
            );
        }
        if let Quiesced::Failed(why) = &made.quiesced {
            v.trouble =
                format!("its last point is crash-consistent, not application-consistent: {why}");
        }
        if let Some(why) = stands {
            v.trouble = why;
        }
        v.points_sealed += 1;
        v.newest_point = made.point;
        v.last_seal_ms = Some(took.as_millis() as u64);
    });
    driver.site.note_sealed(driver.record.id, made.cut_at);
    driver.site.clear(Kind::CutGivenUp, &driver.record.name);
    driver.site.clear(Kind::GuestStopped, &driver.record.name);
    tracing::info!(
        guest = %driver.record.name,
        point = made.point,
        pause_ms = made.times.pause.as_secs_f64() * 1e3,
        sealed_ms = took.as_millis() as u64,
        changed_bytes = made.shipped.changed_bytes,
        sent_bytes = made.shipped.sent_bytes,
        "sealed"
    );
    let [state_bytes, disk_bytes] = made.shares;
    let sealed = Sealed {
        cut_at: made.cut_at,
        stopped: made.stopped,
        pause: made.times.pause,
        took,
        since_before: looked.map_or(took, |looked| made.stopped.duration_since(looked)),
        seen: match (before, rounds_read_disks) {
            (Some(_), _) => Seen::Since,
            (None, true) => Seen::Roughly,
            (None, false) => Seen::MemoryRoughly,
        },
        sent_bytes: made.shipped.sent_bytes,
        final_bytes: made.final_bytes,
        state_bytes,
        disk_bytes,
        scan: made.times.ram_scan,
    };
    attached.sealed = Some(sealed);
    Ok(sealed)
}

/// Hands a held guest over: seals its last point and has the peer run it. The
/// peer is asked once only; what to do when its word does not come is for the
/// move to decide.
pub(super) async fn seal_and_run(
    driver: &mut Driver,
    attached: &mut Attached,
    made: &Made,
    term: Term,
) -> Result<ActivationTimes, DriveError> {
    let request = request(driver, attached, made, Some(term));
    let question = Message::Seal(Box::new(request));
    let remote = driver.remote.clone();
    let asked = remote.ask_within(question, Duration::from_secs(30));
    match driver.interruptible(asked).await?? {
        Message::Running { times, .. } => Ok(times),
        _ => Err(AskError::Unfitting(driver.protection.to.clone()).into()),
    }
}

/// Seals the last point of a guest that is held, without handing it over. The
/// peer is asked once only.
pub(super) async fn seal_held(
    driver: &mut Driver,
    attached: &mut Attached,
    made: &Made,
    patience: Duration,
) -> Result<(), DriveError> {
    let request = request(driver, attached, made, None);
    let question = Message::Seal(Box::new(request));
    let remote = driver.remote.clone();
    let asked = remote.ask_within(question, patience);
    match driver.interruptible(asked).await?? {
        Message::Sealed { point } if point == made.point => Ok(()),
        Message::Dangling { missing } => {
            attached.outgoing.forget_all();
            attached.outgoing.asking.distrust();
            Err(DriveError::Other(format!(
                "batch {missing} is gone at the peer; point {} begins anew",
                made.point
            )))
        }
        _ => Err(AskError::Unfitting(driver.protection.to.clone()).into()),
    }
}

fn request(
    driver: &Driver,
    attached: &Attached,
    made: &Made,
    activate: Option<Term>,
) -> SealRequest {
    let term = driver
        .site
        .fence
        .current(driver.record.id)
        .map_or(0, |t| t.number);
    SealRequest {
        guest: driver.record.id,
        point: made.point,
        parent: attached.newest,
        cut_at: super::unix_ns(made.cut_at),
        volumes: made.volumes.clone(),
        batches: made.shipped.batches,
        chain: made.chain,
        context: PointContext {
            name: driver.record.name.clone(),
            source: driver.site.config.site.name.clone(),
            term,
            definition: driver.record.definition.clone(),
            pause: made.times.pause,
            ram_scan: made.times.ram_scan,
            ram_scanned_bytes: made.times.ram_scanned_bytes,
            changed_bytes: made.shipped.changed_bytes,
            sent_bytes: made.shipped.sent_bytes,
            base: false,
            group: made.group.clone(),
            quiesced: made.quiesced.told(),
        },
        activate,
    }
}
