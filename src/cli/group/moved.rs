//! `farhaven move GROUP`: all guests of a group as one.

use comfy_table::{Cell, Color};

use super::super::guests::waiting;
use super::super::show::{bytes, table};
use super::super::{EXIT_TOO_LONG, Failure, escaped, print_json, told};
use crate::client::{Client, ClientError};
use crate::site::api::MoveGroup;
use crate::site::groups::{GroupMove, GroupOutlook};

pub(in crate::cli) async fn run(
    client: &Client,
    name: &str,
    accept_pause: bool,
    dry_run: bool,
    json: bool,
) -> Result<(), Failure> {
    let path = format!("/v1/groups/{}/move", escaped(name));
    if dry_run {
        let outlook: GroupOutlook = client.get(&path).await.map_err(told)?;
        return Ok(foreseen(&outlook, json)?);
    }
    let body = MoveGroup { accept_pause };
    let moving = client.post(&path, &body);
    let moved: Result<GroupMove, _> = waiting(format!("moving group '{name}'"), moving).await;
    let moved = moved.map_err(|error| Failure {
        status: match error {
            ClientError::TooLong(_) => EXIT_TOO_LONG,
            _ => 1,
        },
        why: told(error),
    })?;
    if json {
        print_json(&moved)?;
    } else {
        show(&moved);
    }
    match moved.remains.as_str() {
        "" => Ok(()),
        remains => Err(remains.to_owned().into()),
    }
}

fn show(moved: &GroupMove) {
    let all_run = moved.members.iter().all(|m| m.error.is_empty());
    let (name, to) = (&moved.group, &moved.to);
    let came = match all_run {
        true => format!("Group '{name}' runs at '{to}' now"),
        false => format!("Group '{name}' was moved to '{to}', and NOT ALL OF IT RUNS THERE"),
    };
    say!(
        "{came}; nothing was lost. All were stopped within {:.2} ms; the longest stood still for {:.0} ms.",
        moved.skew_ms,
        moved.blackout_ms
    );
    let mut rows = table(&[
        "Wave",
        "Guest",
        "Term",
        "Stood still",
        "Expected",
        "Sent then",
    ]);
    for member in &moved.members {
        let mut row = vec![Cell::new(member.wave + 1), Cell::new(&member.guest)];
        match &member.report {
            Some(report) if !report.runs => row.extend([
                Cell::new(report.term),
                Cell::new("does not run").fg(Color::Red),
            ]),
            Some(report) => row.extend([
                Cell::new(report.term),
                Cell::new(format!("{:.0} ms", report.blackout_ms)),
                Cell::new(format!("{:.0} ms", report.expected_blackout_ms)),
                Cell::new(bytes(report.final_bytes)),
            ]),
            None => row.push(Cell::new("not moved").fg(Color::Red)),
        }
        rows.add_row(row);
    }
    say!("{rows}");
    for member in &moved.members {
        if !member.error.is_empty() {
            say!("! {}: {}", member.guest, member.error);
        }
        let notes = member.report.iter().map(|report| report.note.as_str());
        for note in notes.filter(|note| !note.is_empty()) {
            say!("! {}: {note}", member.guest);
        }
    }
    if moved.remains.is_empty() {
        say!(
            "There, they stay with: farhaven commit {0}; or go back with: farhaven rollback {0}",
            moved.group
        );
    }
}

fn foreseen(outlook: &GroupOutlook, json: bool) -> Result<(), String> {
    if json {
        return print_json(outlook);
    }
    say!(
        "A move of group '{}' to '{}' now, by the newest points: all would be stopped at one instant, the longest for about {:.0} ms (estimated; {}).",
        outlook.group,
        outlook.to,
        outlook.expected_blackout_ms,
        match outlook.within {
            true => "within their policy",
            false => "MORE than their policy allows: --accept-pause",
        }
    );
    let mut rows = table(&[
        "Wave", "Guest", "Alone", "With all", "Allowed", "Left", "Changes",
    ]);
    for member in &outlook.members {
        let alone = &member.alone;
        rows.add_row(vec![
            (member.wave + 1).to_string(),
            member.guest.clone(),
            format!("{:.0} ms", alone.expected_blackout_ms),
            format!("{:.0} ms", member.expected_blackout_ms),
            format!("{:.0} ms", alone.max_blackout_ms),
            bytes(alone.remaining_bytes),
            format!("{}/s", bytes(alone.dirty_bytes_per_s)),
        ]);
    }
    say!("{rows}");
    Ok(())
}
