//! When asking pays, and what an answer may bring.

use proptest::prelude::*;

use super::*;

/// Sends units of which one in `every` is held there; how many were asked for.
fn asked(worth: &mut Worth, units: u64, every: u64) -> u64 {
    let (mut asked, mut open, mut hits) = (0, 0, 0);
    for unit in 0..units {
        if worth.asks() {
            asked += 1;
            open += 1;
            hits += u64::from(unit % every == 0);
        }
        if open == QUESTION as u64 {
            worth.answered(open, hits);
            (open, hits) = (0, 0);
        }
    }
    asked
}

#[test]
fn it_stops_where_nothing_is_found_and_begins_again_where_something_is() {
    let mut worth = Worth::default();
    let units = 1 << 20;
    let vain = asked(&mut worth, units, u64::MAX);
    assert!(vain < units / 20, "{vain} asked in vain");
    // A probe finds that it has begun to pay, within 64 MiB of guest data.
    let paid = asked(&mut worth, units, 4);
    assert!(paid > units - REST_MOST - PROBE, "{paid}");
}

#[test]
fn a_link_that_waits_for_answers_longer_than_they_save_is_left_alone() {
    let mut worth = Worth::default();
    for _ in 0..TRIAL / QUESTION as u64 {
        worth.waited(1e6);
        worth.answered(QUESTION as u64, 64);
    }
    assert!(!worth.asks());
    // And waiting at the end of a point is worth what it is expected to save.
    assert!(worth.is_worth(512, 100_000.0) && !worth.is_worth(512, 200_000.0));
}

#[test]
fn a_peer_that_did_not_hold_its_word_is_not_asked_for_long() {
    let asking = Asking::default();
    asking.distrust();
    assert!((0..DISTRUST / 64).all(|_| asking.distrusts(64)));
    assert!(!asking.distrusts(64));
}

proptest! {
    /// Whatever crosses what: nothing retired after a question is named by its answer.
    #[test]
    fn an_answer_that_crossed_a_retirement_does_not_bring_it_back(
        steps in prop::collection::vec((0u8..3, 0u64..6, 0usize..8), 1..80),
    ) {
        let mut answers = Answers::default();
        // Question, what was retired since it was asked.
        let mut open: Vec<(u64, BTreeSet<u64>)> = Vec::new();
        for (step, seq, at) in steps {
            match step {
                0 => open.push((answers.begin(), BTreeSet::new())),
                1 => {
                    answers.retire(&BTreeSet::from([seq]));
                    open.iter_mut().for_each(|(_, since)| { since.insert(seq); });
                }
                _ if open.is_empty() => {}
                _ => {
                    let at = at % open.len();
                    let (question, since) = open.swap_remove(at);
                    for seq in 0..6 {
                        prop_assert_eq!(answers.may_name(question, seq), !since.contains(&seq));
                    }
                    answers.end(question);
                }
            }
            prop_assert!(answers.retired.len() <= 80);
        }
        open.into_iter().for_each(|(question, _)| answers.end(question));
        prop_assert!(answers.retired.is_empty() && answers.open.is_empty());
    }

    /// A peer may answer anything: only places that there can be come of it.
    #[test]
    fn any_answer_gives_possible_places(
        batches in prop::collection::vec(
            (any::<u64>(), any::<u64>(), prop::collection::vec(any::<u8>(), 0..2000)), 0..20),
        next in 1u64..1000,
    ) {
        let batches: Vec<_> = batches.into_iter()
            .map(|(seq, slots, digests)| (seq % 2000, slots, Bytes::from(digests)))
            .collect();
        for (_, place) in places(&batches, next) {
            prop_assert!(place.seq() > 0 && place.seq() < next);
        }
    }
}
