//! The demo's last words: what was measured, what was verified.

use comfy_table::{Cell, Color};

use super::report::Report;
use crate::cli::show::{bytes, millis, table};

/// Bytes on the wire over the floor: first copy, points after it.
const FLOORS: (f64, f64) = (1.15, 1.5);

/// Milliseconds that a cut may stop a guest: inside of the daemon; a QEMU, without its RAM scan.
const PAUSES: (f64, f64) = (5.0, 40.0);

/// Milliseconds: failover, command of a move until it ran, silence of a moved guest.
const TIMES: (f64, f64, f64) = (1500.0, 2000.0, 500.0);

/// A floor is compared with only where it is not lost in headers.
const WORTH_COMPARING: u64 = 1 << 20;

/// A row: what, measured, wanted, and whether it is so.
type Row = (String, String, Option<(String, bool)>);

fn at_most(value: f64, most: f64, shown: String) -> Option<(String, bool)> {
    Some((format!("≤ {shown}"), value <= most))
}

fn ms(value: f64) -> String {
    if value < 10.0 {
        format!("{value:.1} ms")
    } else {
        millis(value.round() as u64)
    }
}

fn rows(report: &Report) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let mut row = |what: &str, measured: String, wanted| {
        rows.push((what.to_owned(), measured, wanted));
    };
    let rate = report.first_copy_wan_bytes as f64 / report.first_copy_s.max(1e-3);
    row(
        "First copy",
        format!(
            "{} in {:.1} s, {}/s",
            bytes(report.first_copy_wan_bytes),
            report.first_copy_s,
            bytes(rate as u64)
        ),
        None,
    );
    let floor = |value: f64, floor: u64, most: f64| {
        let wanted = at_most(value, most, format!("{most} ×"));
        wanted.filter(|_| floor >= WORTH_COMPARING)
    };
    row(
        "  over the least of zstd",
        format!(
            "{:.2} × {}",
            report.first_copy_to_floor,
            bytes(report.first_copy_floor_bytes)
        ),
        floor(
            report.first_copy_to_floor,
            report.first_copy_floor_bytes,
            FLOORS.0,
        ),
    );
    row("Recovery points", report.points_sealed.to_string(), None);
    row(
        "  oldest while protected (RPO)",
        millis(report.rpo_ms_max),
        at_most(
            report.rpo_ms_max as f64,
            report.rpo_target_ms as f64,
            millis(report.rpo_target_ms),
        ),
    );
    row(
        "  on the wire",
        format!("{}/s", bytes(report.steady_wan_bytes_per_s as u64)),
        None,
    );
    row(
        "  over the least of zstd",
        format!(
            "{:.2} × {}",
            report.steady_to_floor,
            bytes(report.steady_floor_bytes)
        ),
        floor(report.steady_to_floor, report.steady_floor_bytes, FLOORS.1),
    );
    match (report.pause_without_scan_ms_max, report.ram_scan_gb_per_s) {
        (Some(rest), Some(speed)) => {
            row(
                "  pause",
                format!(
                    "{} median, {} at most",
                    ms(report.pause_ms_median),
                    ms(report.pause_ms_max)
                ),
                None,
            );
            row(
                "    without the RAM scan",
                ms(rest),
                at_most(rest, PAUSES.1, ms(PAUSES.1)),
            );
            row("    RAM scanned at", format!("{speed:.1} GB/s"), None);
        }
        _ => row(
            "  pause, median and most",
            format!(
                "{}, {}",
                ms(report.pause_ms_median),
                ms(report.pause_ms_max)
            ),
            at_most(report.pause_ms_median, PAUSES.0, ms(PAUSES.0)),
        ),
    }
    let moved = report.scenario == "planned";
    match report.rpo_ms {
        Some(_) if moved => row("Lost", "nothing".to_owned(), None),
        Some(lost) => row(
            "Lost (RPO)",
            ms(lost),
            at_most(
                lost,
                report.rpo_target_ms as f64,
                millis(report.rpo_target_ms),
            ),
        ),
        None => {}
    }
    if let Some(noticed) = report.declared_after_ms {
        row("Disaster until declared", ms(noticed), None);
    }
    if let Some(rto) = report.rto_ms {
        let (what, most) = match moved {
            true => ("Command until it ran", TIMES.1),
            false => ("Declaration until it ran (RTO)", TIMES.0),
        };
        row(what, ms(rto), at_most(rto, most, ms(most)));
    }
    if let Some(silence) = report.blackout_ms {
        let wanted = at_most(silence, TIMES.2, ms(TIMES.2)).filter(|_| moved);
        row("Heartbeat silent for", ms(silence), wanted);
    }
    if let Some(test) = &report.test {
        row(
            "Test: command until it ran",
            ms(test.rto_ms),
            at_most(test.rto_ms, TIMES.0, ms(TIMES.0)),
        );
        row(
            "  points sealed meanwhile",
            test.points_sealed.to_string(),
            None,
        );
        row("  source silent at most", ms(test.source_silence_ms), None);
        row(
            "  thrown away",
            format!(
                "{} of memory, {} of disk",
                bytes(test.ram_bytes),
                bytes(test.overlay_bytes)
            ),
            None,
        );
    }
    row(
        "Memory of the daemons",
        format!(
            "{} at east, {} at west",
            bytes(report.source_memory_bytes),
            bytes(report.target_memory_bytes)
        ),
        None,
    );
    rows
}

fn mark(passed: bool, yes: &str, no: &str) -> Cell {
    match passed {
        true => Cell::new(yes).fg(Color::Green),
        false => Cell::new(no).fg(Color::Red),
    }
}

/// Both tables, and the verdict.
pub(super) fn text(report: &Report) -> String {
    let head = format!(
        "A {} guest with {} MiB of memory, workload {}, over {}; all of it in {:.0} s",
        report.guest,
        report.ram_bytes >> 20,
        report.workload,
        report.link,
        report.took_s
    );
    let mut measured = table(&["What was measured", "", "Target", ""]);
    for (what, value, wanted) in rows(report) {
        let (target, met) = match wanted {
            Some((target, met)) => (target, mark(met, "met", "MISSED")),
            None => (String::new(), Cell::new("")),
        };
        measured.add_row(vec![
            Cell::new(what),
            Cell::new(value),
            Cell::new(target),
            met,
        ]);
    }
    let mut verified = table(&["What was verified", "", ""]);
    for check in &report.checks {
        verified.add_row(vec![
            Cell::new(&check.what),
            Cell::new(&check.seen),
            mark(check.passed, "yes", "NO"),
        ]);
    }
    let word = if report.verified {
        "VERIFIED"
    } else {
        "NOT VERIFIED"
    };
    format!(
        "\n{head}\n{measured}\n\n{verified}\n\n{word}: {}",
        report.verdict
    )
}
