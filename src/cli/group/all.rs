//! What is done with all guests of a group: tested, committed, rolled back,
//! protected the other way round. A table of them, and what remains.

use comfy_table::{Cell, Color};
use farhaven_policies::units::Period;
use serde::Serialize;

use super::super::guests::waiting;
use super::super::show::{bytes, millis, table};
use super::super::{Outcome, escaped, print_json, told};
use super::cut_of;
use crate::client::Client;
use crate::site::api::{Commit, Reprotect, TestGroup};
use crate::site::groups::{GroupDone, GroupRollBack, GroupTest};
use crate::site::health::{CheckOutcome, CheckView};
use crate::site::kept::PointChoice;
use crate::site::turn::view::{CommitReport, ReprotectReport, RollbackReport};
use crate::site::view::TestEnded;

fn path(name: &str, rest: &str) -> String {
    format!("/v1/groups/{}/{rest}", escaped(name))
}

pub(in crate::cli) async fn commit(
    client: &Client,
    name: &str,
    discard: bool,
    json: bool,
) -> Outcome {
    let body = Commit { discard };
    let done: GroupDone<CommitReport> = client
        .post(&path(name, "commit"), &body)
        .await
        .map_err(told)?;
    show(&done, json, |report| match report.told {
        true => "stays here".to_owned(),
        false => format!("stays here; {}", report.note),
    })?;
    if !json {
        say!("Next, to protect it again: farhaven reprotect {name}");
    }
    Ok(())
}

pub(in crate::cli) async fn rollback(
    client: &Client,
    name: &str,
    to: GroupRollBack,
    json: bool,
) -> Outcome {
    let path = path(name, "rollback");
    let rolling = client.post(&path, &to);
    let done: GroupDone<RollbackReport> = waiting(format!("rolling '{name}' back"), rolling)
        .await
        .map_err(told)?;
    show(&done, json, |report| {
        if !report.note.is_empty() {
            return format!(
                "at '{}', under term {}: {}",
                report.at, report.term, report.note
            );
        }
        let from = match report.point {
            Some(point) => format!("from its point {point}"),
            None => "as it was there".to_owned(),
        };
        format!(
            "runs at '{}' {from}, under term {}; nowhere for {:.0} ms, lost {}",
            report.at,
            report.term,
            report.blackout_ms,
            millis(report.lost_ms)
        )
    })
}

pub(in crate::cli) async fn reprotect(
    client: &Client,
    name: &str,
    rpo: Option<Period>,
    json: bool,
) -> Outcome {
    let path = path(name, "reprotect");
    let body = Reprotect { rpo };
    let turning = client.post(&path, &body);
    let what = format!("protecting '{name}' the other way");
    let done: GroupDone<ReprotectReport> = waiting(what, turning).await.map_err(told)?;
    show(&done, json, |report| {
        let note = match report.note.as_str() {
            "" => String::new(),
            note => format!("; {note}"),
        };
        format!(
            "protected to '{}': {} differed, {} were sent, in {:.1} s{note}",
            report.to,
            bytes(report.changed_bytes),
            bytes(report.sent_bytes),
            report.took_ms as f64 / 1e3
        )
    })?;
    if !json {
        say!("To bring it home with nothing lost: farhaven move {name}");
    }
    Ok(())
}

pub(in crate::cli) async fn test(
    client: &Client,
    name: &str,
    point: Option<PointChoice>,
    json: bool,
) -> Outcome {
    let path = path(name, "test");
    let body = TestGroup {
        cut: cut_of(client, name, point).await?,
    };
    let asked = client.post(&path, &body);
    let tested: GroupTest = waiting(format!("starting a test of '{name}'"), asked)
        .await
        .map_err(told)?;
    if json {
        print_json(&tested)?;
    } else {
        say!(
            "A test of group '{name}' runs here from cut {}, {} old, on no network; until it ran {:.0} ms, until it was looked at {:.0} ms. Protection goes on.",
            tested.cut,
            millis(tested.age_ms),
            tested.rto_ms,
            tested.checked_ms
        );
        let mut rows = table(&["Wave", "Guest", "Point", "Ran after", "Checks", "Console"]);
        for member in &tested.members {
            let report = member.report.as_ref();
            let console = report.and_then(|report| report.console.as_ref());
            rows.add_row(vec![
                Cell::new(member.wave + 1),
                Cell::new(&member.guest),
                Cell::new(report.map_or("-".to_owned(), |r| r.point.to_string())),
                Cell::new(
                    report.map_or("does not run".to_owned(), |r| format!("{:.0} ms", r.rto_ms)),
                ),
                checks(&member.checks),
                Cell::new(console.map_or(String::new(), |c| c.socket.display().to_string())),
            ]);
        }
        say!("{rows}");
        for member in tested.members.iter().filter(|m| !m.error.is_empty()) {
            say!("! {}: {}", member.guest, member.error);
        }
        for member in &tested.members {
            not_passed(&member.guest, &member.checks);
        }
        if tested.remains.is_empty() {
            say!("End it, and throw it away: farhaven test cleanup {name}");
        }
    }
    whole(&tested.remains)
}

pub(in crate::cli) async fn cleanup(client: &Client, name: &str, json: bool) -> Outcome {
    let done: GroupDone<TestEnded> = client.delete(&path(name, "test")).await.map_err(told)?;
    show(&done, json, |ended| {
        format!(
            "its test from point {} has ended after {}: freed {} of memory, {} of disk",
            ended.point,
            millis(ended.ran_ms),
            bytes(ended.ram_bytes),
            bytes(ended.overlay_bytes)
        )
    })
}

/// Health checks in a cell: how many passed of how many.
pub(in crate::cli) fn checks(checks: &[CheckView]) -> Cell {
    let passed = checks
        .iter()
        .filter(|check| check.outcome == CheckOutcome::Passed)
        .count();
    let cell = Cell::new(match checks.len() {
        0 => "-".to_owned(),
        all => format!("{passed} of {all} passed"),
    });
    let failed = |check: &CheckView| check.outcome == CheckOutcome::Failed;
    match checks.iter().any(failed) {
        true => cell.fg(Color::Red),
        false => cell,
    }
}

/// Tells of the checks that did not pass.
pub(in crate::cli) fn not_passed(guest: &str, checks: &[CheckView]) {
    for check in checks {
        match check.outcome {
            CheckOutcome::Passed => {}
            CheckOutcome::Failed => say!("! {guest}: {}: {}", check.check, check.seen),
            CheckOutcome::NotLookedAt => {
                say!("  {guest}: {}: not looked at, {}", check.check, check.seen);
            }
        }
    }
}

/// The guests, and what remains; a failure where something does.
fn show<T: Serialize>(done: &GroupDone<T>, json: bool, words: impl Fn(&T) -> String) -> Outcome {
    if json {
        print_json(done)?;
        return whole(&done.remains);
    }
    let mut rows = table(&["Wave", "Guest", "What was done"]);
    for member in &done.members {
        let mut said: Vec<String> = member.report.iter().map(&words).collect();
        said.extend((!member.note.is_empty()).then(|| member.note.clone()));
        let cell = match member.error.as_str() {
            "" => Cell::new(said.join("; ")),
            error => Cell::new(format!("NOT DONE: {error}")).fg(Color::Red),
        };
        rows.add_row(vec![
            Cell::new(member.wave + 1),
            Cell::new(&member.guest),
            cell,
        ]);
    }
    say!("{rows}");
    whole(&done.remains)
}

fn whole(remains: &str) -> Outcome {
    match remains {
        "" => Ok(()),
        remains => Err(remains.to_owned()),
    }
}
