//! What people see: tables and reports, made from the API's own types.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{Cell, Color, ContentArrangement, Table, TableComponent};

use super::{Outcome, guest_path, out, print_json, told};
use crate::client::Client;
use crate::guest::qemu::check::{Finding, Severity};
use crate::site::records::GuestRecord;
pub(crate) use crate::site::view::bytes;
use crate::site::view::{
    FailoverReport, MoveReport, PeerView, Phase, PointView, SiteView, SourceView, TargetView,
};

#[derive(Debug, Args)]
pub(super) struct Status {
    /// Again every second, until Ctrl-C. With --json: one object a line.
    #[arg(long)]
    watch: bool,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

pub(super) async fn status(client: &Client, status: Status) -> Outcome {
    loop {
        let view: Result<SiteView, _> = client.get("/v1/status").await;
        match view {
            Ok(view) if status.json && status.watch => {
                say!("{}", serde_json::to_string(&view).map_err(told)?);
            }
            Ok(view) if status.json => return print_json(&view),
            Ok(view) => {
                if status.watch && std::io::stdout().is_terminal() {
                    // Home and clear to the end: no flicker.
                    out::exact("\x1b[H\x1b[J");
                }
                whole(&view);
                let _ = std::io::stdout().flush();
            }
            Err(error) if !status.watch => return Err(error.to_string()),
            Err(error) => eprintln!("{error}"),
        }
        if !status.watch {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

fn whole(view: &SiteView) {
    say!("Site {}", view.site);
    peers(&view.peers);
    if !view.alerts.is_empty() {
        say!("\nAlerts (farhaven alert ack NUMBER)");
        super::alerts::tell(&view.alerts);
    }
    if view.guests.is_empty() && view.standbys.is_empty() {
        say!(
            "\nNo guests. Next: farhaven guest add NAME --qmp PATH, or to try it out: farhaven guest start NAME --kind sim"
        );
    }
    if !view.guests.is_empty() {
        say!("\nGuests here");
        guests(&view.guests);
    }
    if !view.standbys.is_empty() {
        say!("\nGuests of peers, kept here");
        standbys(&view.standbys);
    }
    if !view.groups.is_empty() {
        say!("\nProtection groups");
        super::group::list(&view.groups);
    }
    for guest in &view.guests {
        if let Some(left) = guest.policy_of.as_ref().filter(|_| guest.group.is_none()) {
            say!(
                "! {0}: it is in no group any more, and stays protected as group '{left}' was owed. To end that: farhaven unprotect {0}",
                guest.name
            );
        }
    }
    if let Some(files) = &view.policy_files {
        super::group::policy_files(files);
    }
}

pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(UTF8_HORIZONTAL_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(header.to_vec());
    // No lines between rows: neither theirs nor where columns would cross them.
    table
        .remove_style(TableComponent::HorizontalLines)
        .remove_style(TableComponent::MiddleIntersections);
    table
}

pub(super) fn peers(peers: &[PeerView]) {
    if peers.is_empty() {
        say!("No site is paired. Next: farhaven pair");
        return;
    }
    let mut rows = table(&["Peer", "Link", "RTT", "Sent", "Received", "Lost", "Address"]);
    for peer in peers {
        let link = if peer.connected {
            Cell::new("up").fg(Color::Green)
        } else {
            Cell::new("DOWN").fg(Color::Red)
        };
        let lost = if peer.sent_packets == 0 {
            "-".to_owned()
        } else {
            format!(
                "{:.2} %",
                peer.lost_packets as f64 * 100.0 / peer.sent_packets as f64
            )
        };
        rows.add_row(vec![
            Cell::new(&peer.site),
            link,
            Cell::new(
                peer.rtt_ms
                    .map_or("-".to_owned(), |ms| format!("{ms:.1} ms")),
            ),
            Cell::new(bytes(peer.sent_bytes)),
            Cell::new(bytes(peer.received_bytes)),
            Cell::new(lost),
            Cell::new(peer.addresses.join(", ")),
        ]);
    }
    say!("{rows}");
    for peer in peers {
        if !peer.connected && !peer.last_disconnect.is_empty() {
            say!("! {}: {}", peer.site, peer.last_disconnect);
        }
        if !peer.trouble.is_empty() {
            say!("! {}: {}", peer.site, peer.trouble);
        }
    }
}

pub(super) fn guests(guests: &[SourceView]) {
    if guests.is_empty() {
        say!("No guests run here. Those of peers that are kept here: farhaven status");
        return;
    }
    let mut rows = table(&[
        "Guest",
        "Phase",
        "To",
        "RPO",
        "Target",
        "Pause",
        "Point",
        "Guest data",
        "WAN",
        "Ratio",
        "Now",
    ]);
    for guest in guests {
        let mut phase = guest.phase.words().to_owned();
        if let Some((done, total)) = guest.progress {
            phase = format!("{phase} {:.0} %", done as f64 * 100.0 / total as f64);
        }
        if guest.disks_only {
            phase.push_str(", disks only");
        }
        if guest.shut_down {
            phase.push_str(", SHUT DOWN");
        }
        let phase = Cell::new(phase).fg(match guest.phase {
            Phase::Protected | Phase::Shipping | Phase::Moved => Color::Green,
            Phase::Held | Phase::Fenced | Phase::Lost => Color::Red,
            _ => Color::Yellow,
        });
        let rpo = Cell::new(guest.rpo_ms.map_or("-".to_owned(), millis));
        let rpo = match guest.rpo_health.as_deref() {
            Some("warning") => rpo.fg(Color::Yellow),
            Some("critical") => rpo.fg(Color::Red),
            _ => rpo,
        };
        rows.add_row(vec![
            Cell::new(&guest.name),
            phase,
            Cell::new(guest.peer.as_deref().unwrap_or("-")),
            rpo,
            Cell::new(guest.rpo_target_ms.map_or("-".to_owned(), millis)),
            Cell::new(
                guest
                    .last_pause_ms
                    .map_or("-".to_owned(), |ms| format!("{ms:.1} ms")),
            ),
            Cell::new(if guest.newest_point == 0 {
                "-".to_owned()
            } else {
                guest.newest_point.to_string()
            }),
            Cell::new(bytes(guest.guest_bytes)),
            Cell::new(bytes(guest.wan_bytes)),
            Cell::new(guest.ratio.map_or("-".to_owned(), |r| format!("{r:.1}"))),
            Cell::new(format!("{}/s", bytes(guest.throughput_bytes_per_s))),
        ]);
    }
    say!("{rows}");
    for guest in guests.iter().filter(|g| g.phase == Phase::Moving) {
        if let Some(outlook) = &guest.outlook {
            say!("  {}: round {}, {outlook}", guest.name, outlook.rounds);
        }
    }
    for guest in guests.iter().filter(|g| !g.trouble.is_empty()) {
        say!("! {}: {}", guest.name, guest.trouble);
    }
}

/// Whole days since then, as drills are counted.
fn days_since(millis: u64) -> String {
    let since = crate::site::age(millis.saturating_mul(1_000_000)).as_secs();
    match since / 86_400 {
        0 => "today".to_owned(),
        1 => "1 day ago".to_owned(),
        days => format!("{days} days ago"),
    }
}

fn standbys(standbys: &[TargetView]) {
    let mut rows = table(&[
        "Guest",
        "From",
        "State",
        "Points",
        "Newest",
        "RPO",
        "Warm",
        "Term",
        "Last good test",
    ]);
    for standby in standbys {
        let (state, color) = match &standby.active {
            None => ("standby".to_owned(), Color::Green),
            Some(active) if active.hydrated => ("RUNS HERE".to_owned(), Color::Cyan),
            Some(active) => (
                match active.hydration {
                    Some((done, total)) if total > 0 => {
                        format!(
                            "RUNS HERE, hydrating {:.0} %",
                            done as f64 * 100.0 / total as f64
                        )
                    }
                    _ => "RUNS HERE, hydrating".to_owned(),
                },
                Color::Cyan,
            ),
        };
        let active = standby.active.as_ref();
        let state = match active.map(|active| (active.going_back, active.commit)) {
            Some((true, _)) => "STOPPED, going back".to_owned(),
            Some((false, Some(commit))) if !commit.committed => format!("{state}, uncommitted"),
            _ => state,
        };
        let (state, color) = match &standby.test {
            Some(test) if test.running => (
                format!("{state}, TEST of point {}", test.point),
                Color::Yellow,
            ),
            Some(test) => (
                format!("{state}, test of point {} starts", test.point),
                Color::Yellow,
            ),
            None => (state, color),
        };
        let state = match standby.disks_only {
            true => format!("{state}, disks only"),
            false => state,
        };
        let number = |n: u64| match n {
            0 => "-".to_owned(),
            n => n.to_string(),
        };
        rows.add_row(vec![
            Cell::new(&standby.name),
            Cell::new(&standby.from),
            Cell::new(state).fg(color),
            Cell::new(standby.points),
            Cell::new(number(standby.newest_point)),
            Cell::new(
                standby
                    .rpo_ms
                    .filter(|_| standby.active.is_none())
                    .map_or("-".to_owned(), millis),
            ),
            Cell::new(standby.warm_point.map_or("-".to_owned(), |p| p.to_string())),
            Cell::new(standby.term.map_or("-".to_owned(), |t| t.to_string())),
            Cell::new(standby.tested_at.map_or("never".to_owned(), days_since)),
        ]);
    }
    say!("{rows}");
    for standby in standbys.iter().filter(|s| !s.trouble.is_empty()) {
        say!("! {}: {}", standby.name, standby.trouble);
    }
}

pub(super) async fn points(client: &Client, name: &str, json: bool) -> Outcome {
    let points: Vec<PointView> = client
        .get(&guest_path(name, "/points"))
        .await
        .map_err(told)?;
    if json {
        return print_json(&points);
    }
    if points.is_empty() {
        say!("No recovery point of '{name}' is sealed yet.");
        return Ok(());
    }
    let mut rows = table(&[
        "Point",
        "Cut at",
        "Age",
        "Pause",
        "RAM scan",
        "Changed",
        "Sent",
        "Consistent",
        "Name",
    ]);
    for point in &points {
        rows.add_row(vec![
            point.point.to_string(),
            point.cut_at.chars().take(23).collect::<String>() + "Z",
            millis(point.age_ms),
            format!("{:.1} ms", point.pause_ms),
            format!("{:.1} ms", point.ram_scan_ms),
            bytes(point.changed_bytes),
            bytes(point.sent_bytes),
            match point.disks_only {
                true => format!("disks only, {}", consistency(point.quiesced)),
                false => consistency(point.quiesced).to_owned(),
            },
            point.name.clone().unwrap_or_default(),
        ]);
    }
    say!("{rows}");
    for point in &points {
        if let Some(why) = &point.damaged {
            say!("! point {} is damaged and is not run: {why}", point.point);
        }
    }
    Ok(())
}

/// What a point's disks are, by whether filesystems were frozen for it.
pub(super) fn consistency(quiesced: Option<bool>) -> &'static str {
    match quiesced {
        None => "crash",
        Some(true) => "application",
        Some(false) => "crash (not frozen)",
    }
}

pub(super) fn findings(name: &str, findings: &[Finding]) {
    if findings.is_empty() {
        say!("Nothing stops the protection of '{name}', here or at the peer.");
        return;
    }
    let mut rows = table(&["", "What", "How to mend it"]);
    for finding in findings {
        let severity = if finding.severity == Severity::Blocks {
            Cell::new("BLOCKS").fg(Color::Red)
        } else {
            Cell::new("warns").fg(Color::Yellow)
        };
        rows.add_row(vec![
            severity,
            Cell::new(&finding.what),
            Cell::new(&finding.mend),
        ]);
    }
    say!("{rows}");
}

pub(super) fn definition(record: &GuestRecord) {
    let at = match &record.qmp {
        Some(qmp) => format!("QMP at {}", qmp.display()),
        None => "inside of the daemon".to_owned(),
    };
    say!("Guest '{}' ({}), {at}", record.name, record.id);
    for line in record.definition.summary() {
        say!("  {line}");
    }
    if let Some(console) = &record.console {
        say!("  console: {}", console.socket.display());
    }
}

pub(super) fn failover(report: &FailoverReport) {
    let ms = |d: Duration| format!("{:.0} ms", d.as_secs_f64() * 1e3);
    say!(
        "'{}' runs here, from point {}, under term {}.",
        report.guest,
        report.point,
        report.term
    );
    say!("  lost (RPO)            {}", millis(report.rpo_ms));
    say!("  until it ran (RTO)    {:.0} ms", report.rto_ms);
    if report.times.boots {
        say!("  it boots              from its disks, which is all that the point holds");
    }
    say!("    term made durable   {}", ms(report.times.term));
    say!("    machine built       {}", ms(report.times.launch));
    say!(
        "    RAM filled          {} ({})",
        ms(report.times.ram),
        bytes(report.times.ram_bytes)
    );
    say!("    state restored      {}", ms(report.times.restore));
    if let Some(qmp) = &report.qmp {
        say!("  QMP                   {qmp}");
    }
    if let Some(console) = &report.console {
        say!("  console               {}", console.socket.display());
    }
    if !report.note.is_empty() {
        say!("! {}", report.note);
    }
    say!("Its disks come from the store and are copied out of it now: farhaven status");
}

pub(super) fn moved(report: &MoveReport) {
    say!(
        "'{}' runs at '{}' now, under term {}; nothing was lost.",
        report.guest,
        report.to,
        report.term
    );
    say!(
        "  it stood still        {:.0} ms (with the way of the news; {:.0} ms expected)",
        report.blackout_ms,
        report.expected_blackout_ms
    );
    say!("  from the command      {:.0} ms", report.total_ms);
    say!("  sent while it stood   {}", bytes(report.final_bytes));
    if !report.note.is_empty() {
        say!("! {}", report.note);
    }
}

/// Milliseconds for people: `850 ms`, `4.2 s`, `3m10s`.
pub(crate) fn millis(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..100_000 => format!("{:.1} s", ms as f64 / 1e3),
        100_000..7_200_000 => format!("{}m{:02}s", ms / 60_000, ms / 1000 % 60),
        _ => format!("{}h{:02}m", ms / 3_600_000, ms / 60_000 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_for_people() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1000), "1.0 kB");
        assert_eq!(bytes(999_960), "1.0 MB");
        assert_eq!(bytes(u64::MAX), "18446.7 PB");
        assert_eq!(millis(999), "999 ms");
        assert_eq!(millis(99_999), "100.0 s");
        assert_eq!(millis(190_000), "3m10s");
        assert_eq!(millis(7_200_000), "2h00m");
    }
}
