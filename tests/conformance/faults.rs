//! What holds of every guest when something fails: the guest runs on, or the
//! error says that it does not, and the next point is exact.

use std::time::{Duration, Instant};

use farhaven::guest::{After, GuestError, Sink, SinkError};
use farhaven_storage_sync::unit::{Digest, VolumeIndex};

use crate::subject::{Subject, baseline, held_point, point, ship, works_on};
use crate::support::model::Model;

#[track_caller]
fn refused<T>(with: SinkError, result: Result<T, GuestError>) {
    match result {
        Ok(_) => panic!("a sink that refuses was not heard"),
        Err(GuestError::Sink(error)) => assert_eq!(error, with),
        Err(other) => panic!("{other}"),
    }
}

pub fn a_sink_may_fail_at_every_step(subject: &mut dyn Subject) {
    let mut guest = subject.attach();
    let mut model = Model::new(guest.volumes());
    let mut number = 1;
    for with in [SinkError::Full, SinkError::Stalled, SinkError::Closed] {
        // A cut before there was a copy: pages that never change again must
        // come with a later point all the same.
        works_on(subject);
        let mut thrown = model.refusing(3, with);
        refused(with, guest.cut(number, After::Continue, &mut thrown));
        assert_eq!(guest.running(), Some(true));
        // What a round handed over before the refusal stays handed over.
        for more in [0, 3, 400] {
            works_on(subject);
            let mut refusing = model.refusing(more, with);
            let done = guest.round(&mut refusing);
            // A round that leaves all of it to the cut asks the sink for nothing.
            if done.is_err() || (more == 0 && guest.waiting() == 0) {
                refused(with, done);
            }
            refusing.refuse_after = u64::MAX;
            model = refusing;
        }
        guest.round(&mut model).expect("a round");
        for (after, more) in [
            (After::Continue, 0),
            (After::Hold, 0),
            (After::Continue, 3),
            (After::Hold, 3),
        ] {
            works_on(subject);
            // The sink's content of a failed cut is thrown away, as a capture buffer is.
            let mut thrown = model.refusing(more, with);
            refused(with, guest.cut(number, after, &mut thrown));
            assert_eq!(guest.running(), Some(true));
            assert!(subject.runs());
            number += 1;
        }
        // While the disks are read; once with all of it lost, once with the
        // part kept that had arrived.
        for keep in [false, true] {
            works_on(subject);
            let mut sink = model.clone();
            let mut cut = guest.cut(number, After::Continue, &mut sink).expect("cuts");
            let mut sink = sink.refusing(1, with);
            let read: Vec<_> = cut.disks.iter_mut().map(|d| d.changed(&mut sink)).collect();
            assert!(read.iter().any(Result::is_err));
            guest.finish_cut(cut, false).expect("finishes");
            assert_eq!(guest.running(), Some(true));
            if keep {
                sink.refuse_after = u64::MAX;
                model = sink;
            } else {
                guest.give_back();
            }
            number += 1;
        }
        held_point(subject, &mut *guest, number, &mut model);
        number += 1;
    }
    works_on(subject);
    held_point(subject, &mut *guest, number, &mut model);
    guest.detach();
}

pub fn what_was_lost_unsealed_comes_again(subject: &mut dyn Subject) {
    let mut guest = subject.attach();
    let mut model = Model::new(guest.volumes());
    // A whole first copy that never arrived.
    guest.round(&mut model.clone()).expect("a round");
    guest.give_back();
    guest.round(&mut model).expect("first copy");
    point(&mut *guest, 1, &mut model);
    works_on(subject);
    // A cut that nobody finishes.
    drop(
        guest
            .cut(2, After::Continue, &mut model.clone())
            .expect("cuts"),
    );
    guest.give_back();
    works_on(subject);
    // Two that arrived as a whole, and were then lost unsealed with their RAM.
    let mut thrown = model.clone();
    for number in 3..=4 {
        guest.round(&mut thrown).expect("a round");
        let cut = guest
            .cut(number, After::Continue, &mut thrown)
            .expect("cuts");
        works_on(subject);
        ship(&mut *guest, cut, &mut thrown);
    }
    guest.give_back();
    guest.give_back();
    held_point(subject, &mut *guest, 5, &mut model);
    // A held cut that comes to nothing.
    works_on(subject);
    let cut = guest.cut(6, After::Hold, &mut model.clone()).expect("cuts");
    guest.finish_cut(cut, false).expect("finishes");
    assert_eq!(guest.running(), Some(false));
    guest.resume().expect("resumes");
    guest.give_back();
    works_on(subject);
    // Sealed out of turn: the newest tells for all before it.
    for number in 7..=9 {
        let cut = guest
            .cut(number, After::Continue, &mut model)
            .expect("cuts");
        works_on(subject);
        ship(&mut *guest, cut, &mut model);
    }
    guest.sealed(9);
    guest.sealed(8);
    guest.give_back();
    let before = model.units;
    held_point(subject, &mut *guest, 10, &mut model);
    let again = model.units - before;
    assert!(again < model.whole() / 2, "{again} of {}", model.whole());
    guest.detach();
}

pub fn a_hypervisor_may_fail_any_request(subject: &mut dyn Subject) {
    let mut guest = subject.attach();
    let mut model = Model::new(guest.volumes());
    guest.round(&mut model).expect("first copy");
    let mut newest = 1;
    let mut number = 2;
    point(&mut *guest, newest, &mut model);
    for after in [After::Continue, After::Hold] {
        for requests in (0..).step_by(subject.every()) {
            works_on(subject);
            let mut thrown = model.clone();
            subject.fail_request(requests);
            let mut held = false;
            let made = guest.round(&mut thrown).and_then(|()| {
                let mut cut = guest.cut(number, after, &mut thrown)?;
                held = after == After::Hold;
                let read = cut
                    .disks
                    .iter_mut()
                    .try_for_each(|d| d.changed(&mut thrown));
                guest.finish_cut(cut, read.is_ok())?;
                read
            });
            number += 1;
            let met = subject.mend();
            if held || matches!(made, Err(GuestError::LeftStopped { .. })) {
                assert!(!subject.runs());
                guest.resume().expect("resumes");
            }
            assert!(
                subject.runs(),
                "after request {requests} failed: {:?}",
                made.err().map(|e| e.to_string())
            );
            // As a driver does: what was not sealed is given back, and after an
            // error the next attempt attaches anew.
            guest.give_back();
            if made.is_err() {
                drop(guest);
                guest = subject.attach();
                assert_eq!(guest.running(), Some(true));
                baseline(&mut *guest, newest, &model);
            }
            if requests % 3 == 0 || !met {
                works_on(subject);
                held_point(subject, &mut *guest, number, &mut model);
                newest = number;
                number += 1;
            }
            if !met {
                eprintln!(
                    "{after:?}: failed at each {} of {requests} requests",
                    subject.every()
                );
                break;
            }
        }
    }
    guest.detach();
    drop(guest);
    assert_eq!(subject.traces(), [""; 0]);
}

pub fn a_guest_that_does_not_go_on_is_told_as_that(subject: &mut dyn Subject) {
    let mut guest = subject.attach();
    let mut model = Model::new(guest.volumes());
    guest.round(&mut model).expect("first copy");
    point(&mut *guest, 1, &mut model);
    works_on(subject);
    if !subject.fail_to_go_on(u64::MAX) {
        guest.detach();
        return;
    }
    let stopped = |result: Result<(), GuestError>| match result {
        Err(GuestError::LeftStopped { why, .. }) => assert!(why.contains("planted"), "{why}"),
        other => panic!("{other:?}"),
    };
    let cut = guest.cut(2, After::Continue, &mut model.clone());
    stopped(cut.map(drop));
    assert_eq!(guest.running(), Some(false));
    assert!(!subject.runs());
    let content = subject.content();
    stopped(guest.resume());
    assert!(content == subject.content(), "a stopped guest changes");

    // A sink that refuses the copies of a held cut is no reason to leave it so.
    subject.fail_to_go_on(2);
    guest.resume().expect("goes on at the third time");
    works_on(subject);
    subject.fail_to_go_on(u64::MAX);
    let mut refusing = model.refusing(0, SinkError::Stalled);
    let cut = guest.cut(3, After::Hold, &mut refusing);
    stopped(cut.map(drop));
    subject.fail_to_go_on(0);
    guest.resume().expect("goes on");
    guest.give_back();
    works_on(subject);
    held_point(subject, &mut *guest, 4, &mut model);
    guest.detach();
}

pub fn a_guest_that_ends_is_told_as_that(subject: &mut dyn Subject) {
    let mut guest = subject.attach();
    let mut model = Model::new(guest.volumes());
    guest.round(&mut model).expect("first copy");
    guest.throttle(30).expect("throttles");
    let mut cut = guest.cut(1, After::Continue, &mut model).expect("cuts");
    subject.end();
    let begun = Instant::now();
    // What was fixed may still be read, or not; nobody may wait for it.
    let read = cut.disks.iter_mut().try_for_each(|d| d.changed(&mut model));
    let finished = guest.finish_cut(cut, read.is_ok());
    assert!(read.is_ok() || finished.is_err());
    assert_eq!(guest.running(), None);
    for after in [After::Continue, After::Hold] {
        assert!(
            guest.cut(2, after, &mut model).is_err(),
            "a point of a dead guest"
        );
    }
    assert!(guest.resume().is_err());
    // What is left of it may be read; nobody may wait for it.
    let _ = guest.round(&mut model);
    let _ = guest.throttle(50);
    guest.give_back();
    guest.sealed(1);
    let _ = guest.throttle(0);
    guest.detach();
    drop(guest);
    assert!(
        begun.elapsed() < Duration::from_secs(40),
        "{:?}",
        begun.elapsed()
    );
}

/// Ends the guest at the first page it is given.
struct Killer<'a>(&'a mut dyn Subject, bool);

impl Sink for Killer<'_> {
    fn units(&mut self, _: VolumeIndex, _: u64, _: &[u8], _: &[Digest]) -> Result<(), SinkError> {
        if !std::mem::replace(&mut self.1, true) {
            self.0.end();
        }
        Ok(())
    }

    fn zeros(&mut self, _: VolumeIndex, _: u64, _: u64) -> Result<(), SinkError> {
        Ok(())
    }
}

pub fn a_guest_that_ends_in_a_cut_is_told_as_that(subject: &mut dyn Subject) {
    let mut guest = subject.attach();
    let begun = Instant::now();
    let cut = guest.cut(1, After::Continue, &mut Killer(subject, false));
    // Where pages are handed over after the pause, the instant is whole.
    if let Ok(cut) = cut {
        let _ = guest.finish_cut(cut, false);
    }
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(guest.running(), None);
    let mut model = Model::new(guest.volumes());
    assert!(guest.cut(2, After::Continue, &mut model).is_err());
}
