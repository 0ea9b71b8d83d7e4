//! The report as one page that needs no other: styles and pictures are in it,
//! it runs no script and fetches nothing. Everything that comes from guests,
//! peers and people is escaped.

use std::fmt::Write as _;

use farhaven_policies::runbook::Mode;
use farhaven_policies::runbook::run::Outcome;

use super::{Report, timeline};

mod tables;

const STYLE: &str = include_str!("report.css");

/// Text as text, in an element or between double quotes.
pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' | '\t' => escaped.push(c),
            // What turns text round or hides it has no place in evidence.
            c if c.is_control()
                || ('\u{202a}'..='\u{202e}').contains(&c)
                || ('\u{2066}'..='\u{2069}').contains(&c) =>
            {
                escaped.push('\u{fffd}');
            }
            c => escaped.push(c),
        }
    }
    escaped
}

/// A span of milliseconds: `830 ms`, `2.4 s`, `3 min 20 s`, `5 h 2 min`, `4 d 3 h`.
pub(super) fn span(millis: u64) -> String {
    let (secs, mins, hours) = (millis / 1000, millis / 60_000, millis / 3_600_000);
    match () {
        () if millis < 1000 => format!("{millis} ms"),
        () if secs < 60 => format!("{:.1} s", millis as f64 / 1e3),
        () if mins < 60 => format!("{mins} min {} s", secs % 60),
        () if hours < 48 => format!("{hours} h {} min", mins % 60),
        () => format!("{} d {} h", hours / 24, hours % 24),
    }
}

/// A time, in UTC.
pub(super) fn at(millis: u64) -> String {
    let at = i64::try_from(millis).ok();
    let at = at.and_then(|millis| jiff::Timestamp::from_millisecond(millis).ok());
    at.map_or("?".to_owned(), |at| {
        at.strftime("%Y-%m-%d %H:%M:%S%.3f UTC").to_string()
    })
}

/// The word for an outcome, and the class that colours it.
fn outcome(report: &Report) -> (String, &'static str) {
    match report.outcome {
        Some(outcome @ Outcome::Succeeded) => (outcome.to_string(), "good"),
        Some(outcome @ Outcome::SucceededInPart) => (outcome.to_string(), "warn"),
        Some(outcome) => (outcome.to_string(), "bad"),
        None => ("goes on".to_owned(), "warn"),
    }
}

/// The page.
pub fn page(report: &Report) -> String {
    let mode = match report.plan.mode {
        Mode::Test => "Test failover",
        Mode::Planned => "Planned move",
        Mode::Unplanned => "Failover",
    };
    let title = format!("{mode}: {}", report.plan.runbook);
    let (words, class) = outcome(report);
    let mut page = String::new();
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"><meta name=\"color-scheme\" content=\"light dark\"><title>{} – {}</title><style>{STYLE}</style></head><body><main>",
        escaped(&title),
        escaped(&report.run)
    );
    let _ = write!(
        page,
        "<header><p class=\"kicker\">Farhaven run report</p><h1>{}</h1><p class=\"badge {class}\">{}</p><p class=\"sub\">Run <code>{}</code> at site <b>{}</b>, started by <b>{}</b> at {}{}.</p></header>",
        escaped(&title),
        escaped(&words),
        escaped(&report.run),
        escaped(&report.site),
        escaped(&report.by),
        at(report.started),
        report
            .ended
            .map_or(String::new(), |ended| format!(", ended at {}", at(ended)))
    );
    figures(report, &mut page);
    tables::guests(report, &mut page);
    tables::approvals(report, &mut page);
    let _ = write!(
        page,
        "<section><h2>Steps in time</h2>{}",
        timeline::svg(report)
    );
    page.push_str("<p class=\"legend\"><span class=\"key good\"></span>done <span class=\"key people\"></span>people and delays <span class=\"key undone\"></span>undone <span class=\"key bad\"></span>failed <span class=\"key rto\"></span>recovered</p>");
    tables::steps(report, &mut page);
    page.push_str("</section>");
    tables::checks(report, &mut page);
    tables::cleanup(report, &mut page);
    tables::pictures(report, &mut page);
    tables::record(report, &mut page);
    let _ = writeln!(
        page,
        "<footer><p>Made by Farhaven {} from the audit record of the run, whose lines are chained by BLAKE3. Its last checksum:</p><p><code class=\"hash\">{}</code></p></footer></main></body></html>",
        escaped(&report.version),
        escaped(&report.record)
    );
    page
}

fn figure(page: &mut String, name: &str, value: &str, note: &str, class: &str) {
    let _ = write!(
        page,
        "<div class=\"figure {class}\"><p class=\"name\">{}</p><p class=\"value\">{}</p><p class=\"note\">{}</p></div>",
        escaped(name),
        escaped(value),
        escaped(note)
    );
}

fn figures(report: &Report, page: &mut String) {
    page.push_str("<section class=\"figures\">");
    let target = report.guests.iter().filter_map(|g| g.rpo_target_ms).min();
    let within = report.guests.iter().all(|guest| {
        let both = guest.rpo_ms.zip(guest.rpo_target_ms);
        both.is_none_or(|(rpo, target)| rpo <= target)
    });
    let (class, note) = match (target, report.rpo_ms) {
        (None, _) => ("", "no target is known".to_owned()),
        (Some(target), None) => ("", format!("target {}", span(target))),
        (Some(target), Some(_)) if within => {
            ("good", format!("within the target of {}", span(target)))
        }
        (Some(target), Some(_)) => ("bad", format!("over the target of {}", span(target))),
    };
    let would = if report.plan.mode == Mode::Test {
        "RPO (would be lost)"
    } else {
        "RPO (lost)"
    };
    let unknown = || "unknown".to_owned();
    figure(
        page,
        would,
        &report.rpo_ms.map_or_else(unknown, span),
        &note,
        class,
    );
    let (known, missing) = report.plan.known_time();
    let planned = match (known, missing) {
        (0, _) => "never measured before".to_owned(),
        (known, 0) => format!("{} were expected", span(known)),
        (known, _) => format!("{} were expected, and steps of unknown time", span(known)),
    };
    figure(
        page,
        "RTO",
        &report.rto_ms.map_or_else(unknown, span),
        &planned,
        "",
    );
    let of_itself = report
        .rto_ms
        .map(|rto| rto.saturating_sub(report.people_ms));
    figure(
        page,
        "RTO without waiting for people",
        &of_itself.map_or_else(unknown, span),
        &format!("{} of decisions", span(report.people_ms)),
        "",
    );
    let good = report.checks.iter().filter(|check| check.good).count();
    let class = if good == report.checks.len() {
        "good"
    } else {
        "warn"
    };
    figure(
        page,
        "Checks",
        &format!("{good} of {}", report.checks.len()),
        "as they should be",
        class,
    );
    page.push_str("</section>");
    if report.forced {
        page.push_str("<p class=\"remark\">The source answered when this run was started, and was taken to be lost all the same (by force): its guests were stopped first.</p>");
    }
}
