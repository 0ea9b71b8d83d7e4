//! All guests of a group come to stand still for a run at one instant, or none
//! of them does.
//!
//! Each driver brings its guest near to its last cut and waits for the others, as
//! for a move of the group; each seals its last point and waits until all have.
//! Whatever goes wrong until then, for whomever, all run on. From there on each is
//! held by itself: the run's site has the word about every one of them, and takes
//! over all or none.

use std::collections::BTreeSet;
use std::sync::Arc;

use farhaven_storage_sync::unit::GuestId;
use tokio::sync::oneshot;

use super::{HeldPoint, HoldOrder, NotHeld, can_be_held, driver_of, not_protected};
use crate::activate::fence::Term;
use crate::replicate::message::{Message, Refusal, RunMessage, ToHold};
use crate::site::Site;
use crate::site::answer::refused;
use crate::site::commands::Command;
use crate::site::groups::{Party, Place};
use crate::site::remote::Remote;

/// Answers a target that wants all guests of a group held.
pub(super) async fn hold(
    site: &Arc<Site>,
    remote: &Arc<Remote>,
    group: GuestId,
    guests: Vec<ToHold>,
) -> Message {
    let here = site.groups().into_iter().filter(|g| g.from.is_none());
    let Some(known) = here.into_iter().find(|known| known.id == group) else {
        return refused(
            Refusal::Unable,
            "that group is not known there any more; see farhaven group list at both sites",
        );
    };
    let asked: BTreeSet<GuestId> = guests.iter().map(|order| order.guest).collect();
    let members: BTreeSet<GuestId> = known.members.values().map(|m| m.guest).collect();
    if asked != members || asked.len() < guests.len() {
        let why = format!(
            "the guests of group '{}' are others there by now, which is told within seconds; repeat the step then",
            known.name
        );
        return refused(Refusal::Unable, why);
    }
    for member in site.members_here(&known) {
        let phase = match site.guest(&member.name) {
            Ok(record) => site.source_view(&record).phase,
            Err(error) => return refused(Refusal::Unable, error),
        };
        // The others would wait for it, and have no points meanwhile.
        let soon = match can_be_held(phase) {
            Some(true) => continue,
            soon => soon.is_some(),
        };
        let why = format!(
            "no guest of group '{}' is held: '{}' is {} there at this moment, and they are held as a whole; see farhaven status there",
            known.name,
            member.name,
            phase.words()
        );
        return NotHeld { why, soon }.refused();
    }
    let mut drivers = Vec::new();
    for order in guests {
        match driver_of(site, remote, order.guest) {
            Some(commands) => drivers.push((order, commands)),
            None => return not_protected(),
        }
    }
    let party = Party::new(&known, None);
    let mut answers = Vec::new();
    for (order, commands) in drivers {
        let (reply, answer) = oneshot::channel();
        let ToHold { guest, quiesce } = order;
        let place = Some(Place::of(&party, guest));
        // One that is not delivered is dropped, and gives up for all.
        let order = HoldOrder {
            quiesce,
            place,
            reply,
        };
        let _ = commands.send(Command::Hold(order)).await;
        answers.push((guest, answer));
    }
    let mut held = Vec::new();
    let mut unheld = None;
    for (guest, answer) in answers {
        let stopping = |_| Err("that site's daemon is stopping".to_owned().into());
        match answer.await.unwrap_or_else(stopping) {
            Ok((point, term)) => held.push((guest, point, term)),
            Err(not) => {
                let soon = not.soon || unheld.is_some_and(|before: NotHeld| before.soon);
                unheld = Some(NotHeld { soon, ..not });
            }
        }
    }
    // Why the first of them gave up tells more than what that meant for another.
    if let (Some(not), Err(why)) = (&mut unheld, party.all_sealed().await) {
        not.why = why;
    }
    answer(&known.name, held, unheld)
}

/// All are held, at one instant; or why not.
fn answer(group: &str, held: Vec<(GuestId, HeldPoint, Term)>, unheld: Option<NotHeld>) -> Message {
    let mut instants = held.iter().map(|(_, point, _)| point.together);
    let first = instants.next().flatten();
    match (first, unheld) {
        (Some(instant), None) if instants.all(|other| other == first) => {
            Message::Run(RunMessage::GroupHeld {
                skew_ns: instant.skew_ns,
                guests: held
                    .into_iter()
                    .map(|(guest, point, term)| (guest, point.told(term)))
                    .collect(),
            })
        }
        (_, not) if !held.is_empty() => {
            let why = not.map_or("not all of them at one instant".to_owned(), |not| not.why);
            refused(
                Refusal::OutOfStep,
                format!("some guests of group '{group}' are held there already: {why}"),
            )
        }
        (_, not) => {
            let not = not.unwrap_or_else(|| "it has no guests".to_owned().into());
            // What it says of a move of one guest alone is none of a group's.
            let told = match not.why.split_once(". To move it all the same") {
                Some((why, _)) => format!(
                    "{why}. To move all of them all the same, there: farhaven move {group} --accept-pause"
                ),
                None => not.why,
            };
            NotHeld {
                why: format!("no guest of group '{group}' is held: {told}"),
                soon: not.soon,
            }
            .refused()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Together;
    use super::*;

    fn held(cut: Option<u64>) -> (GuestId, HeldPoint, Term) {
        let guest = GuestId::random();
        let point = HeldPoint {
            point: 7,
            bytes: 1,
            stopped_at: 2,
            quiesced: None,
            together: cut.map(|cut| Together { cut, skew_ns: 3 }),
        };
        let term = Term {
            group: guest,
            number: 2,
            owner: farhaven_wan::SiteKey::from_bytes([1; 32]),
        };
        (guest, point, term)
    }

    #[test]
    fn a_group_is_held_when_all_of_it_are_at_one_instant() {
        let whole = answer("bank", vec![held(Some(5)), held(Some(5))], None);
        assert!(
            matches!(&whole, Message::Run(RunMessage::GroupHeld { skew_ns: 3, guests }) if guests.len() == 2),
            "{whole:?}"
        );
        let mixed = [
            (vec![held(Some(5)), held(Some(6))], None),
            (vec![held(Some(5)), held(None)], None),
            (vec![held(None), held(None)], None),
            (vec![held(Some(5))], Some("it runs on".to_owned().into())),
        ];
        for (held, why) in mixed {
            let told = answer("bank", held, why);
            assert!(
                matches!(
                    &told,
                    Message::Refused {
                        code: Refusal::OutOfStep,
                        ..
                    }
                ),
                "{told:?}"
            );
        }
        let none = answer(
            "bank",
            Vec::new(),
            Some(
                "too long. To move it all the same: farhaven move db --accept-pause"
                    .to_owned()
                    .into(),
            ),
        );
        assert!(
            matches!(&none, Message::Refused { code: Refusal::Unable, why } if why.ends_with("farhaven move bank --accept-pause")),
            "{none:?}"
        );
    }
}
