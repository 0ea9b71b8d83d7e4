//! Whose turn it is.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::bucket::TokenBucket;
use super::{BACKLOG_LIMIT, FLOW_LIMIT, REQUEST_LIMIT, WEIGHT_LIMIT};

/// Virtual time that a byte costs a flow of weight 1.
const BYTE: u128 = 1 << 20;
/// What a flow that makes its next request a little late may be behind, in bytes: two
/// batches. More is not made up for.
const BEHIND: u128 = 512 << 10;
/// What a flow's own cap saves up while others have their turns: 2 % of ten seconds.
const OWN_BURST: Duration = Duration::from_millis(200);

/// Why a request or a weight is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PaceError {
    /// One request is larger than [`REQUEST_LIMIT`].
    #[error("a request of {0} bytes is more than {REQUEST_LIMIT}: send it in parts")]
    RequestTooLarge(u64),
    /// The flow has [`BACKLOG_LIMIT`] requests waiting.
    #[error("the flow has {BACKLOG_LIMIT} requests waiting: take turns before asking for more")]
    BacklogFull,
    /// There are [`FLOW_LIMIT`] flows.
    #[error("there are {FLOW_LIMIT} flows already: remove one that has ended")]
    TooManyFlows,
    /// A weight is more than [`WEIGHT_LIMIT`].
    #[error("a weight of {0} is more than {WEIGHT_LIMIT}")]
    Weight(u32),
    /// The flow was removed, or never joined.
    #[error("no such flow: let it join first")]
    NoFlow,
}

/// What a request is to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// A guest stands still for it: before all others, and no cap of its flow's own holds it
    /// back. The cap of all flows together does.
    Held,
    /// In its turn.
    Usual,
}

/// A request that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// What may happen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// This request may be sent now.
    Turn(Ticket),
    /// A cap is used up; after this time it is this request's turn.
    Wait(Duration, Ticket),
    /// Whoever wants to send waits for room in its lane.
    NoRoom,
    /// No flow has anything to send.
    Idle,
}

#[derive(Debug, Clone)]
struct Request {
    ticket: Ticket,
    bytes: u64,
    rank: Rank,
}

#[derive(Debug, Clone)]
struct FlowState<L> {
    lane: L,
    weight: u32,
    bucket: TokenBucket,
    /// Virtual time up to which it has had its share.
    tag: u128,
    waiting: VecDeque<Request>,
}

impl<L> FlowState<L> {
    fn share(&self) -> u128 {
        u128::from(self.weight.max(1))
    }

    /// The virtual time of its next turn. What is far behind has been idle, or held back by
    /// its own cap: that is not saved up.
    fn begins(&self, time: u128) -> u128 {
        self.tag
            .max(time.saturating_sub(BEHIND * BYTE / self.share()))
    }
}

/// The way to a peer, when a try found it full.
#[derive(Debug, Clone)]
struct Lane {
    /// Since when nothing was taken.
    since: Instant,
    /// It is not worth a try.
    full: bool,
}

/// A capped link shared by flows, over lanes that may be full.
#[derive(Debug, Clone)]
pub struct Pace<F, L> {
    bucket: TokenBucket,
    flows: BTreeMap<F, FlowState<L>>,
    /// Where each request waits.
    tickets: BTreeMap<Ticket, F>,
    /// Lanes that had no room when they were tried last.
    lanes: BTreeMap<L, Lane>,
    /// Virtual time of the turn taken last.
    time: u128,
    next_ticket: u64,
}

impl<F: Ord + Clone, L: Ord + Clone> Pace<F, L> {
    /// A link of `cap` bits a second (0 is no cap) without flows.
    pub fn new(cap: u64, now: Instant) -> Self {
        Self {
            bucket: TokenBucket::new(cap, now),
            flows: BTreeMap::new(),
            tickets: BTreeMap::new(),
            lanes: BTreeMap::new(),
            time: 0,
            next_ticket: 0,
        }
    }

    /// Changes the cap of all flows together at once; 0 is none.
    pub fn set_cap(&mut self, now: Instant, cap: u64) {
        self.bucket.set_cap(now, cap);
    }

    /// The cap of all flows together, in bits a second; 0 is none.
    pub fn cap(&self) -> u64 {
        self.bucket.cap()
    }

    /// A flow begins, on a lane, with a weight of 1 and no cap. One that is there already
    /// stays as it is.
    ///
    /// # Errors
    /// When there are too many.
    pub fn join(&mut self, now: Instant, flow: F, lane: L) -> Result<(), PaceError> {
        if !self.flows.contains_key(&flow) && self.flows.len() >= FLOW_LIMIT {
            return Err(PaceError::TooManyFlows);
        }
        self.flows.entry(flow).or_insert_with(|| FlowState {
            lane,
            weight: 1,
            bucket: TokenBucket::new(0, now).saving(OWN_BURST),
            tag: self.time,
            waiting: VecDeque::new(),
        });
        Ok(())
    }

    /// Gives a flow its weight and its own cap in bits a second (0 is none), at once. A flow
    /// of weight 0 goes when no other can.
    ///
    /// # Errors
    /// When the weight is too large, or there is no such flow.
    pub fn set_flow(
        &mut self,
        now: Instant,
        flow: &F,
        weight: u32,
        cap: u64,
    ) -> Result<(), PaceError> {
        if weight > WEIGHT_LIMIT {
            return Err(PaceError::Weight(weight));
        }
        let known = self.flows.get_mut(flow).ok_or(PaceError::NoFlow)?;
        if known.weight == 0 {
            // What it had while nobody else wanted it is not held against it.
            known.tag = known.tag.min(self.time);
        }
        known.weight = weight;
        known.bucket.set_cap(now, cap);
        Ok(())
    }

    /// Forgets a flow and what it has waiting.
    pub fn remove(&mut self, flow: &F) {
        let Some(removed) = self.flows.remove(flow) else {
            return;
        };
        for request in removed.waiting {
            self.tickets.remove(&request.ticket);
        }
        let lanes: BTreeSet<_> = self.flows.values().map(|flow| flow.lane.clone()).collect();
        self.lanes.retain(|lane, _| lanes.contains(lane));
    }

    /// The flow wants to send `bytes`; its requests of one rank go in the order they came.
    ///
    /// # Errors
    /// When there is no such flow, or a limit is reached.
    pub fn request(&mut self, flow: &F, bytes: u64, rank: Rank) -> Result<Ticket, PaceError> {
        if bytes > REQUEST_LIMIT {
            return Err(PaceError::RequestTooLarge(bytes));
        }
        let known = self.flows.get_mut(flow).ok_or(PaceError::NoFlow)?;
        if known.waiting.len() >= BACKLOG_LIMIT {
            return Err(PaceError::BacklogFull);
        }
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        let request = Request {
            ticket,
            bytes,
            rank,
        };
        match rank {
            Rank::Usual => known.waiting.push_back(request),
            Rank::Held => {
                let held = known.waiting.iter().take_while(|r| r.rank == Rank::Held);
                let at = held.count();
                known.waiting.insert(at, request);
            }
        }
        self.tickets.insert(ticket, flow.clone());
        Ok(ticket)
    }

    /// The request is not wanted any more. Nothing if it was sent.
    pub fn cancel(&mut self, ticket: Ticket) {
        let Some(flow) = self.tickets.remove(&ticket) else {
            return;
        };
        if let Some(known) = self.flows.get_mut(&flow) {
            known.waiting.retain(|request| request.ticket != ticket);
        }
    }

    /// Whose turn it is. Nothing changes until [`Self::sent`] or [`Self::no_room`] says what
    /// came of it.
    pub fn next(&mut self, now: Instant) -> Next {
        let shared = self.bucket.wait(now);
        let mut best: Option<(_, Ticket)> = None;
        let mut waits = false;
        for flow in self.flows.values_mut() {
            let Some(request) = flow.waiting.front() else {
                continue;
            };
            waits = true;
            if self.lanes.get(&flow.lane).is_some_and(|lane| lane.full) {
                continue;
            }
            let own = match request.rank {
                Rank::Held => Duration::ZERO,
                Rank::Usual => flow.bucket.wait(now),
            };
            let key = (
                shared.max(own),
                request.rank,
                Reverse(flow.weight.min(1)),
                flow.begins(self.time),
                request.ticket,
            );
            if best.as_ref().is_none_or(|(least, _)| key < *least) {
                best = Some((key, request.ticket));
            }
        }
        match best {
            Some((key, ticket)) if key.0.is_zero() => Next::Turn(ticket),
            Some((key, ticket)) => Next::Wait(key.0, ticket),
            None if waits => Next::NoRoom,
            None => Next::Idle,
        }
    }

    /// The request was sent.
    pub fn sent(&mut self, now: Instant, ticket: Ticket) {
        let Some(known) = self
            .tickets
            .remove(&ticket)
            .and_then(|flow| self.flows.get_mut(&flow))
        else {
            return;
        };
        let at = known.waiting.iter().position(|r| r.ticket == ticket);
        let Some(request) = at.and_then(|at| known.waiting.remove(at)) else {
            return;
        };
        self.bucket.wait(now);
        self.bucket.charge(request.bytes);
        self.lanes.remove(&known.lane);
        if request.rank == Rank::Held {
            return;
        }
        known.bucket.wait(now);
        known.bucket.charge(request.bytes);
        let begun = known.begins(self.time);
        known.tag = begun + u128::from(request.bytes) * BYTE / known.share();
        // What goes only where nobody else can moves nobody else's time.
        if known.weight > 0 {
            self.time = self.time.max(begun);
        }
    }

    /// The lane of this request has no room now.
    pub fn no_room(&mut self, now: Instant, ticket: Ticket) {
        let flow = self.tickets.get(&ticket);
        if let Some(known) = flow.and_then(|flow| self.flows.get(flow)) {
            let lane = self.lanes.entry(known.lane.clone());
            let since = now;
            lane.or_insert(Lane { since, full: true }).full = true;
        }
    }

    /// There may be room again in the lane of this flow: the next turn tries.
    pub fn room(&mut self, flow: &F) {
        let lane = self.flows.get(flow).map(|known| &known.lane);
        if let Some(lane) = lane.and_then(|lane| self.lanes.get_mut(lane)) {
            lane.full = false;
        }
    }

    /// Since when the lane of this flow has taken nothing, though it was tried.
    pub fn stuck_since(&self, flow: &F) -> Option<Instant> {
        let known = self.flows.get(flow)?;
        self.lanes.get(&known.lane).map(|lane| lane.since)
    }
}
