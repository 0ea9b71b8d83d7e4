//! What an all-seeing observer keeps of the guests: which of them run where
//! since when, and what each was at each instant that was ever saved.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::system::System;
use super::{Broken, Fault};

/// One machine with a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub guest: u32,
    /// The site that it is at.
    pub side: usize,
    /// The process of that site that it lives in.
    pub process: u64,
    /// It is a test: it may run beside the guest.
    pub test: bool,
    pub machine: u64,
}

/// From one start of a machine to its stop.
#[derive(Debug, Clone)]
pub struct Span {
    pub place: Place,
    pub from: u64,
    pub until: Option<u64>,
}

/// A machine began to run for the first time.
#[derive(Debug, Clone)]
pub struct Start {
    pub place: Place,
    pub at: u64,
}

/// A guest as it stood still once.
#[derive(Debug, Clone)]
struct Instant {
    content: [blake3::Hash; 2],
    from: u64,
    until: Option<u64>,
}

struct State {
    /// Of each guest, the spans that may still overlap with one to come.
    spans: BTreeMap<u32, Vec<Span>>,
    instants: BTreeMap<u64, Instant>,
    /// Of each machine that stands still: its newest instant.
    saved: BTreeMap<u64, u64>,
    dead: BTreeSet<u64>,
    machines: u64,
    random: StdRng,
    broken: Option<Broken>,
    /// A digest of every start, stop and instant.
    digest: blake3::Hasher,
    /// When a machine was stopped and has not gone on since.
    stopped: BTreeMap<u64, (Place, u64)>,
    restored: u64,
    starts: u64,
    /// Machines that ran once, and the first starts that were not looked at yet.
    ran: BTreeSet<u64>,
    begun: Vec<Start>,
    /// Until when a guest does not stop, whoever asks it to.
    stubborn: BTreeMap<u32, u64>,
}

/// The observer.
pub struct Room {
    system: Arc<System>,
    fault: Option<Fault>,
    busy: u64,
    state: Mutex<State>,
}

impl Room {
    pub fn new(system: &Arc<System>, seed: u64, fault: Option<Fault>, busy: u64) -> Arc<Room> {
        Arc::new(Room {
            system: system.clone(),
            fault,
            busy,
            state: Mutex::new(State {
                spans: BTreeMap::new(),
                instants: BTreeMap::new(),
                saved: BTreeMap::new(),
                dead: BTreeSet::new(),
                machines: 0,
                random: StdRng::seed_from_u64(seed),
                broken: None,
                digest: blake3::Hasher::new(),
                stopped: BTreeMap::new(),
                restored: 0,
                starts: 0,
                ran: BTreeSet::new(),
                begun: Vec::new(),
                stubborn: BTreeMap::new(),
            }),
        })
    }

    /// A guest writes about so often: the most milliseconds between two times.
    pub fn busy(&self) -> u64 {
        self.busy
    }

    pub fn draw(&self) -> u64 {
        self.state.lock().unwrap().random.random()
    }

    pub fn machine(&self) -> u64 {
        let mut state = self.state.lock().unwrap();
        state.machines += 1;
        state.machines
    }

    /// A deliberate fault: the monitor says that it stopped its guest, and did not.
    pub fn ignores_stop(&self) -> bool {
        self.fault == Some(Fault::Stop) && self.state.lock().unwrap().random.random_ratio(1, 8)
    }

    /// From now on a guest does not stop, and says so, until then.
    pub fn refuse(&self, guest: u32, until: u64) {
        self.state.lock().unwrap().stubborn.insert(guest, until);
    }

    /// Until when a guest did not stop, or does not; 0 if it always did.
    pub fn refuses_until(&self, guest: u32) -> u64 {
        let state = self.state.lock().unwrap();
        state.stubborn.get(&guest).copied().unwrap_or(0)
    }

    /// Does this machine not stop now?
    pub fn refuses(&self, place: &Place) -> bool {
        !place.test && self.refuses_until(place.guest) > self.system.now()
    }

    /// A deliberate fault: the dirty log forgets a page.
    pub fn forgets_page(&self) -> bool {
        self.fault == Some(Fault::Dirty) && self.state.lock().unwrap().random.random_ratio(1, 20)
    }

    /// Does the process of a machine live?
    pub fn lives(&self, place: &Place) -> bool {
        self.is_alive(place.process)
    }

    /// Does this process live?
    pub fn is_alive(&self, process: u64) -> bool {
        !self.state.lock().unwrap().dead.contains(&process)
    }

    /// Keeps what memory and disk of a machine are now; the instant's number.
    pub fn keep_instant(&self, place: &Place, content: [blake3::Hash; 2]) -> u64 {
        let mut state = self.state.lock().unwrap();
        let state = &mut *state;
        let number = state.instants.len() as u64 + 1;
        for hash in &content {
            state.digest.update(hash.as_bytes());
        }
        let stopped = state.stopped.get(&place.machine);
        let instant = Instant {
            content,
            from: stopped.map_or(0, |(_, since)| *since),
            until: None,
        };
        state.instants.insert(number, instant);
        state.saved.insert(place.machine, number);
        number
    }

    /// What a guest was at that instant.
    pub fn instant(&self, number: u64) -> Option<[blake3::Hash; 2]> {
        let state = self.state.lock().unwrap();
        state.instants.get(&number).map(|instant| instant.content)
    }

    /// From when until when the guest stood still for it.
    pub fn stood(&self, number: u64) -> Option<(u64, u64)> {
        let state = self.state.lock().unwrap();
        let instant = state.instants.get(&number)?;
        Some((instant.from, instant.until.unwrap_or(u64::MAX)))
    }

    /// A machine takes up an instant's device state over this memory and disk.
    pub fn restored(&self, place: &Place, number: u64, content: &[blake3::Hash; 2]) {
        let wanted = self.instant(number);
        let mut state = self.state.lock().unwrap();
        state.restored += 1;
        if wanted.as_ref() != Some(content) {
            let what = differs(wanted.as_ref(), content);
            let why = format!(
                "guest g{} was brought to life at site {} as of instant {number}, and its {what}",
                place.guest, place.side
            );
            state.broken.get_or_insert(Broken { promise: 1, why });
        }
    }

    /// A machine was started (`Some(true)`), stopped, or ended (`None`).
    pub fn turned(&self, place: &Place, to: Option<bool>) {
        let now = self.system.now();
        let mut state = self.state.lock().unwrap();
        let state = &mut *state;
        if state.dead.contains(&place.process) {
            return;
        }
        let what = [place.guest as u8, place.side as u8, to.map_or(2, u8::from)];
        state.digest.update(&now.to_le_bytes());
        state.digest.update(&what);
        match to {
            Some(false) => {
                state.stopped.insert(place.machine, (place.clone(), now));
            }
            _ => {
                state.stopped.remove(&place.machine);
                let newest = state.saved.remove(&place.machine);
                if let Some(instant) = newest.and_then(|n| state.instants.get_mut(&n)) {
                    instant.until = Some(now);
                }
            }
        }
        if place.test {
            return;
        }
        let spans = state.spans.entry(place.guest).or_default();
        match to {
            Some(true) => {
                spans.push(Span {
                    place: place.clone(),
                    from: now,
                    until: None,
                });
                state.starts += 1;
                if state.ran.insert(place.machine) {
                    state.begun.push(Start {
                        place: place.clone(),
                        at: now,
                    });
                }
            }
            _ => end(spans, now, |span| span.place.machine == place.machine),
        }
    }

    /// A process was killed: what lived in it has ended.
    pub fn kill(&self, process: u64) {
        let now = self.system.now();
        let mut state = self.state.lock().unwrap();
        state.dead.insert(process);
        state
            .stopped
            .retain(|_, (place, _)| place.process != process);
        for spans in state.spans.values_mut() {
            end(spans, now, |span| span.place.process == process);
        }
    }

    /// Every two spans of one guest at two sites that overlap, with the guest,
    /// up to now, to which all sites have come; what ended by then is forgotten.
    pub fn overlaps(&self, now: u64) -> Vec<(u32, Span, Span)> {
        let mut state = self.state.lock().unwrap();
        let mut found = Vec::new();
        for (guest, spans) in &mut state.spans {
            for (at, one) in spans.iter().enumerate() {
                for other in spans.iter().skip(at + 1) {
                    let apart = one.until.is_some_and(|until| until <= other.from)
                        || other.until.is_some_and(|until| until <= one.from);
                    if one.place.side != other.place.side && !apart {
                        found.push((*guest, one.clone(), other.clone()));
                    }
                }
            }
            spans.retain(|span| span.until.is_none_or(|until| until > now));
        }
        found
    }

    /// Machines that ran for the first time since this was asked last.
    pub fn begun(&self) -> Vec<Start> {
        std::mem::take(&mut self.state.lock().unwrap().begun)
    }

    /// Where a guest runs now.
    pub fn runs_at(&self, guest: u32) -> Vec<usize> {
        let state = self.state.lock().unwrap();
        let spans = state.spans.get(&guest).into_iter().flatten();
        let open = spans.filter(|span| span.until.is_none());
        open.map(|span| span.place.side).collect()
    }

    /// Machines that stand still, and since when.
    pub fn standing(&self) -> Vec<(Place, u64)> {
        let state = self.state.lock().unwrap();
        state.stopped.values().cloned().collect()
    }

    pub fn broken(&self) -> Option<Broken> {
        self.state.lock().unwrap().broken.clone()
    }

    /// Instants, restores and starts so far.
    pub fn counts(&self) -> [u64; 3] {
        let state = self.state.lock().unwrap();
        [state.instants.len() as u64, state.restored, state.starts]
    }

    pub fn digest(&self) -> blake3::Hash {
        self.state.lock().unwrap().digest.finalize()
    }
}

fn end(spans: &mut [Span], now: u64, of: impl Fn(&Span) -> bool) {
    let open = spans.iter_mut().filter(|span| span.until.is_none());
    for span in open.filter(|span| of(span)) {
        span.until = Some(now);
    }
}

/// What of a guest is not as it was.
pub fn differs(wanted: Option<&[blake3::Hash; 2]>, found: &[blake3::Hash; 2]) -> &'static str {
    match wanted {
        None => "state is of no instant that ever was",
        Some(wanted) => match (wanted[0] == found[0], wanted[1] == found[1]) {
            (false, false) => "memory and disk are not what they were then",
            (false, true) => "memory is not what it was then",
            (true, false) => "disk is not what it was then",
            (true, true) => "content is what it was",
        },
    }
}
