//! The tables of the page, and the pictures.

use std::fmt::Write as _;

use farhaven_policies::runbook::Mode;
use farhaven_policies::runbook::run::{Back, Forward};

use super::super::{GuestReport, Report};
use super::{at, escaped, span};

fn table(page: &mut String, class: &str, head: &[&str]) {
    let _ = write!(
        page,
        "<div class=\"wide\"><table class=\"{class}\"><thead><tr>"
    );
    for name in head {
        let _ = write!(page, "<th>{}</th>", escaped(name));
    }
    page.push_str("</tr></thead><tbody>");
}

fn row(page: &mut String, cells: &[String]) {
    page.push_str("<tr>");
    for cell in cells {
        let _ = write!(page, "<td>{cell}</td>");
    }
    page.push_str("</tr>");
}

fn text(value: &str) -> String {
    escaped(value).replace('\n', "<br>")
}

fn or_dash(value: Option<String>) -> String {
    value.map_or("–".to_owned(), |value| escaped(&value))
}

/// Which guests, from which points, and how soon they ran.
pub(super) fn guests(report: &Report, page: &mut String) {
    page.push_str("<section><h2>Guests</h2>");
    table(
        page,
        "",
        &[
            "guest",
            "group",
            "point used",
            "cut at",
            "lost",
            "of",
            "term",
            "ran after",
            "healthy after",
            "by",
        ],
    );
    for guest in &report.guests {
        let after = |at: Option<u64>| at.map(|at| span(at.saturating_sub(report.started)));
        row(
            page,
            &[
                format!("<b>{}</b>", escaped(&guest.guest)),
                escaped(&guest.group),
                or_dash(guest.point.map(|point| point.to_string())),
                or_dash(guest.cut_at.map(at)),
                or_dash(guest.rpo_ms.map(span)),
                or_dash(guest.rpo_target_ms.map(span)),
                or_dash(guest.term.map(|term| term.to_string())),
                or_dash(after(guest.started_at)),
                or_dash(after(guest.healthy_at)),
                text(&guest.healthy_by),
            ],
        );
    }
    page.push_str("</tbody></table></div>");
    for guest in &report.guests {
        page.push_str(&remarks(guest));
    }
    page.push_str("</section>");
}

/// What became of the guest beside what the table tells, in sentences.
fn remarks(guest: &GuestReport) -> String {
    let name = escaped(&guest.guest);
    let mut words = Vec::new();
    match (guest.blackout_ms, guest.final_bytes, guest.term) {
        (Some(stood), Some(bytes), _) => words.push(format!(
            "<b>{name}</b> stood still for {} between both sites, with {} sent meanwhile.",
            escaped(&span(stood)),
            escaped(&crate::site::view::bytes(bytes))
        )),
        (_, _, Some(_)) if guest.source_stopped => {
            words.push(format!("The source said that its copy of <b>{name}</b> is stopped."));
        }
        (_, _, Some(_)) => words.push(format!(
            "The source did not answer; it learns of the term of <b>{name}</b>, and stops its copy, before anything else when it is back."
        )),
        _ => {}
    }
    if guest.disks_only {
        words.push(format!(
            "<b>{name}</b> booted: the point holds its disks alone."
        ));
    }
    match guest.quiesced {
        Some(true) => words.push(format!(
            "The agent of <b>{name}</b> had frozen its filesystems at its last cut."
        )),
        Some(false) => words.push(format!(
            "The agent of <b>{name}</b> did not freeze its filesystems in time: its last point is crash-consistent."
        )),
        None => {}
    }
    if let Some(lost) = guest.lost_ms {
        words.push(format!(
            "<b>{name}</b> was handed back to its source after it had run here for {}; what it wrote meanwhile is lost.",
            escaped(&span(lost))
        ));
    }
    if let Some(committed) = guest.committed_at {
        words.push(format!(
            "<b>{name}</b> was committed at {}: it stays.",
            at(committed)
        ));
    }
    if let Some(bytes) = guest.reprotected_bytes {
        words.push(format!(
            "<b>{name}</b> is protected the other way round; {} were sent for that.",
            escaped(&crate::site::view::bytes(bytes))
        ));
    }
    match words.is_empty() {
        true => String::new(),
        false => format!("<p class=\"remark\">{}</p>", words.join(" ")),
    }
}

/// Who agreed to what, and who did not.
pub(super) fn approvals(report: &Report, page: &mut String) {
    let mut decided = report
        .events
        .iter()
        .filter(|e| e.approval.is_some())
        .peekable();
    if decided.peek().is_none() {
        return;
    }
    page.push_str("<section><h2>Approvals</h2>");
    table(page, "", &["", "who", "at", "step", "in their words"]);
    for event in decided {
        let (mark, class) = match event.approval {
            Some(true) => ("approved", "good"),
            _ => ("refused", "bad"),
        };
        let words = event.what.split_once(": ").map_or("", |(_, words)| words);
        row(
            page,
            &[
                format!("<span class=\"mark {class}\">{mark}</span>"),
                format!("<b>{}</b>", escaped(event.by.as_deref().unwrap_or("?"))),
                at(event.at),
                escaped(event.step.as_deref().unwrap_or("")),
                text(words),
            ],
        );
    }
    page.push_str("</tbody></table></div></section>");
}

/// Step by step, with what came of each.
pub(super) fn steps(report: &Report, page: &mut String) {
    table(page, "", &["", "step", "does", "took", "tries", "result"]);
    for step in &report.steps {
        let (mark, class) = match (step.back, step.forward) {
            (Back::Undone, _) => ("undone", "undone"),
            (Back::Running | Back::SourceAwaited, _) => ("being undone", "undone"),
            (Back::Failed, _) => ("not undone", "bad"),
            (_, Forward::Ahead) => ("not begun", "none"),
            (_, Forward::Skipped) => ("left out", "none"),
            (_, Forward::Running | Forward::SourceAwaited) => ("under way", "warn"),
            (_, Forward::Done) => ("done", "good"),
            (_, Forward::Failed { .. }) => ("failed", "bad"),
        };
        let took = step.begun.zip(step.ended);
        row(
            page,
            &[
                format!("<span class=\"mark {class}\">{mark}</span>"),
                escaped(&step.name),
                escaped(step.kind.word()),
                or_dash(took.map(|(begun, ended)| span(ended.0.saturating_sub(begun.0)))),
                step.attempts.to_string(),
                text(&step.words()),
            ],
        );
    }
    page.push_str("</tbody></table></div>");
}

/// What was looked at, and what was seen.
pub(super) fn checks(report: &Report, page: &mut String) {
    page.push_str("<section><h2>Checks</h2>");
    if report.checks.is_empty() {
        page.push_str("<p class=\"remark\">Nothing was checked.</p></section>");
        return;
    }
    table(page, "", &["", "at", "step", "guest", "looked at", "seen"]);
    for check in &report.checks {
        let (mark, class) = if check.good {
            ("good", "good")
        } else {
            ("not so", "bad")
        };
        row(
            page,
            &[
                format!("<span class=\"mark {class}\">{mark}</span>"),
                at(check.at),
                escaped(&check.step),
                escaped(&check.guest),
                escaped(&check.what),
                text(&check.seen),
            ],
        );
    }
    page.push_str("</tbody></table></div></section>");
}

/// Of a test: what was removed, and what was looked for afterwards.
pub(super) fn cleanup(report: &Report, page: &mut String) {
    if report.plan.mode != Mode::Test {
        return;
    }
    page.push_str("<section><h2>Proof of cleanup</h2>");
    table(page, "", &["guest", "removed", "looked for afterwards"]);
    for guest in &report.guests {
        let list = |lines: &[String]| match lines {
            [] => "–".to_owned(),
            lines => lines
                .iter()
                .map(|line| text(line))
                .collect::<Vec<_>>()
                .join("<br>"),
        };
        row(
            page,
            &[
                format!("<b>{}</b>", escaped(&guest.guest)),
                list(&guest.removed),
                list(&guest.gone),
            ],
        );
    }
    page.push_str("</tbody></table></div></section>");
}

/// Screens, or the last lines of consoles.
pub(super) fn pictures(report: &Report, page: &mut String) {
    page.push_str("<section><h2>What the guests showed</h2><div class=\"pictures\">");
    for guest in &report.guests {
        let when = guest
            .pictured_at
            .map_or(String::new(), |at| format!(", {}", super::at(at)));
        let shown = match (&guest.screen, &guest.console) {
            (Some(png), _) if is_base64(png) => format!(
                "<img alt=\"Screen of {}\" src=\"data:image/png;base64,{png}\">",
                escaped(&guest.guest)
            ),
            (_, Some(console)) if !console.trim().is_empty() => {
                format!("<pre>{}</pre>", escaped(console))
            }
            _ => "<p class=\"remark\">Nothing: it has no screen, and its console was silent or not looked at.</p>".to_owned(),
        };
        let _ = write!(
            page,
            "<figure>{shown}<figcaption>{}{}</figcaption></figure>",
            escaped(&guest.guest),
            escaped(&when)
        );
    }
    page.push_str("</div></section>");
}

/// It comes over the API: nothing else may get into the attribute.
fn is_base64(text: &str) -> bool {
    text.bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"+/=".contains(&b))
}

/// The audit record, line by line.
pub(super) fn record(report: &Report, page: &mut String) {
    page.push_str("<section><h2>Who did what</h2>");
    table(page, "record", &["", "at", "who", "step", "what"]);
    for event in &report.events {
        row(
            page,
            &[
                event.number.to_string(),
                at(event.at),
                match &event.by {
                    Some(by) => format!("<b>{}</b>", escaped(by)),
                    None => "–".to_owned(),
                },
                escaped(event.step.as_deref().unwrap_or("")),
                text(&event.what),
            ],
        );
    }
    page.push_str("</tbody></table></div></section>");
}
