//! A plan for figures that have changed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use farhaven_policies::evacuate::{self, Plan, Verdict};

use super::super::super::Site;
use super::super::super::remote::Remote;
use super::super::facts::{self, Basis, Candidate};
use super::super::record::millis;
use super::{Conductor, LOOK, passages};

/// An end expected so many milliseconds later or earlier is no news...
const SLIP_MS: u64 = 10_000;
/// ...nor one by this part (in percent) of the whole.
const SLIP_PERCENT: u64 = 20;

impl Conductor {
    /// Plans for what is still here, and keeps that plan where there is a reason.
    pub(super) async fn plan_anew(&mut self, site: &Arc<Site>, remote: &Remote) {
        if self.unplanned.is_none() && self.looked.elapsed() < LOOK {
            return;
        }
        self.looked = Instant::now();
        let here: Vec<Candidate> = self
            .record
            .guests
            .iter()
            .filter(|guest| !guest.state.is_over())
            .filter_map(|guest| {
                let record = self.known.get(&guest.id)?;
                Some(Candidate {
                    record: record.clone(),
                    after: guest.after.clone(),
                })
            })
            .collect();
        if here.is_empty() || !remote.alive() {
            return;
        }
        // What stays is not waited for by the planner: whoever waits is left by `may_start`.
        let gone: BTreeSet<String> = self
            .record
            .guests
            .iter()
            .filter(|guest| guest.state.is_over())
            .map(|guest| guest.guest.clone())
            .collect();
        let deadline = self.record.left().filter(|left| !left.is_zero());
        let order = &self.record.order;
        let (facts, basis) = facts::facts(site, remote, order, &here, gone, deadline).await;
        let planned = crate::work::spawn_blocking(move || evacuate::plan(&facts)).await;
        match planned {
            Ok(Ok(plan)) => self.take_over(plan, basis),
            Ok(Err(error)) => self.keep_old(&error.to_string()),
            Err(error) => self.keep_old(&error.to_string()),
        }
    }

    fn keep_old(&mut self, why: &str) {
        self.unplanned = None;
        self.note(format!(
            "no new plan can be made, the old one is kept: {why}"
        ));
    }

    fn take_over(&mut self, plan: Plan, basis: Basis) {
        let now = millis(self.record.elapsed());
        let (before, finish) = (
            self.record.finish_ms(),
            now.saturating_add(millis(plan.finish)),
        );
        let changed = self
            .basis
            .as_ref()
            .and_then(|old| facts::changed(old, &basis));
        let reason = self
            .unplanned
            .take()
            .or(changed)
            .or_else(|| slipped(before, finish));
        let Some(mut reason) = reason else { return };
        if self.record.plan.verdict != Verdict::DoesNotFit && plan.verdict == Verdict::DoesNotFit {
            reason.push_str(&format!(
                "; the deadline cannot be met any more: {} would be left",
                plan.left.len()
            ));
        }
        let passages = passages(&plan, &basis);
        for guest in &mut self.record.guests {
            if !guest.state.is_over() {
                let passage = passages.get(&guest.guest);
                guest.expected_ms = passage.map(|of| now.saturating_add(of.runs_at_ms));
            }
        }
        let cut_at = |index: &usize| {
            let passage = passages.get(&self.record.guests[*index].guest);
            passage.map_or(u64::MAX, |of| of.cut_at_ms)
        };
        self.order.sort_by_key(cut_at);
        (self.record.plan, self.record.planned_ms) = (plan, now);
        self.basis = Some(basis);
        tracing::warn!(evacuation = self.record.id, reason, "planned anew");
        self.record.note(reason, Some(before));
        self.news = true;
    }
}

/// Is the end expected at another time than it was?
fn slipped(before: u64, finish: u64) -> Option<String> {
    let by = finish.abs_diff(before);
    let matters = by > SLIP_MS && by.saturating_mul(100) > before.saturating_mul(SLIP_PERCENT);
    matters.then(|| {
        let seconds = by / 1000;
        match finish > before {
            true => format!("it goes slower than planned: {seconds} s behind"),
            false => format!("it goes faster than planned: {seconds} s ahead"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::slipped;

    #[test]
    fn small_slips_are_no_news() {
        assert_eq!(slipped(100_000, 109_000), None);
        assert_eq!(slipped(100_000, 115_000), None);
        assert!(slipped(100_000, 131_000).is_some_and(|why| why.contains("31 s behind")));
        assert!(slipped(100_000, 60_000).is_some_and(|why| why.contains("40 s ahead")));
        assert_eq!(slipped(1000, 9000), None);
    }
}
