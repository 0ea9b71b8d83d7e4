//! What is printed of evacuations.

use std::time::Duration;

use comfy_table::{Cell, Color};
use farhaven_policies::evacuate::Verdict;

use super::rate;
use crate::cli::show::{bytes, table};
use crate::site::evacuate::{
    Change, Evacuation, EvacuationState, Evacuee, GuestBasis, GuestState, Preview, Summary,
    left_because,
};

/// Columns of the chart.
const CHART: usize = 48;
/// Guests that are listed one by one.
const MOST_ROWS: usize = 200;

/// A span for people: `4m 12s`.
fn span(span: Duration) -> String {
    let seconds = span.as_secs();
    match seconds {
        0..10 => format!("{:.1}s", span.as_secs_f64()),
        10..120 => format!("{seconds}s"),
        120..7200 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h {:02}m", seconds / 3600, seconds / 60 % 60),
    }
}

fn ms(ms: u64) -> String {
    span(Duration::from_millis(ms))
}

fn verdict(verdict: Verdict, deadline: Option<Duration>, finish: Duration) -> String {
    let Some(deadline) = deadline else {
        return format!("Everything is expected to be moved after {}.", span(finish));
    };
    let deadline = span(deadline);
    match verdict {
        Verdict::Fits => format!(
            "The deadline of {deadline} can be met: everything is expected to be moved after {}.",
            span(finish)
        ),
        Verdict::Tight => format!(
            "TIGHT: everything is expected to be moved after {}, too near the deadline of {deadline} to be sure.",
            span(finish)
        ),
        Verdict::DoesNotFit => format!("The deadline of {deadline} CANNOT BE MET."),
    }
}

/// A plan: verdict, guests, chart, what would have to give.
pub(super) fn preview(preview: &Preview) {
    let plan = &preview.plan;
    say!("Evacuation to '{}'. Nothing is done.", preview.order.to);
    say!("{}", verdict(plan.verdict, plan.deadline, plan.finish));
    let link = &preview.basis.link;
    say!(
        "The link carries {}, by {}; {} of it are for protection of what waits. No plan could end before {}.",
        rate(link.bytes_per_s),
        match link.by.as_str() {
            "the operator" => "your word",
            by => by,
        },
        rate(link.protection_bytes_per_s),
        span(plan.bound.least)
    );
    let mut rows = table(&[
        "Wave",
        "Guest",
        "State",
        "To copy",
        "Changes",
        "Stops after",
        "Runs after",
        "Blackout",
    ]);
    let passages = plan.waves.iter().flat_map(|wave| {
        let passages = wave.groups.iter();
        passages.map(move |passage| (wave.number, passage))
    });
    let count = passages.clone().count();
    for (wave, passage) in passages.take(MOST_ROWS) {
        let known = preview.basis.guests.iter();
        let known: Vec<&GuestBasis> = known
            .filter(|basis| passage.guests.contains(&basis.guest))
            .collect();
        let measured = !known.is_empty() && known.iter().all(|basis| basis.measured);
        let (estimate, changes) = match measured {
            true => ("", rate(known.iter().map(|of| of.dirty_bytes_per_s).sum())),
            false => (" (estimate)", "-".to_owned()),
        };
        let each = |told: &dyn Fn(&GuestBasis) -> String| {
            let told: Vec<String> = known.iter().map(|basis| told(basis)).collect();
            told.join("\n")
        };
        rows.add_row(vec![
            Cell::new(wave),
            Cell::new(each(&|basis| basis.guest.clone())),
            Cell::new(each(&|basis| basis.phase.words().to_owned())),
            Cell::new(format!("{}{estimate}", bytes(passage.bytes))),
            Cell::new(changes),
            Cell::new(span(passage.cut_at)),
            Cell::new(span(passage.healthy_at)),
            Cell::new(format!("{:.0} ms", passage.blackout.as_secs_f64() * 1e3)),
        ]);
    }
    if count > 0 {
        say!("\n{rows}");
    }
    if count > MOST_ROWS {
        say!("... and {} more; all of them: --json", count - MOST_ROWS);
    }
    for line in chart(preview) {
        say!("{line}");
    }
    for left in &plan.left {
        say!(
            "! '{}' would be left: {}",
            left.group,
            left_because(&left.reason)
        );
    }
    for excluded in &preview.excluded {
        say!("! '{}' cannot go: {}", excluded.guest, excluded.why);
    }
    for remark in preview
        .remarks
        .iter()
        .filter(|r| !r.contains("would be left"))
    {
        say!("! {remark}");
    }
}

/// Waves over time, and the deadline.
fn chart(preview: &Preview) -> Vec<String> {
    let plan = &preview.plan;
    if plan.waves.is_empty() {
        return Vec::new();
    }
    let ends = plan.waves.iter().map(|wave| wave.until);
    let last = ends.chain([plan.finish]).max().unwrap_or_default();
    let whole = plan.deadline.map_or(last, |deadline| deadline.max(last));
    let scale = whole.as_secs_f64().max(1e-3);
    let column = |at: Duration| ((at.as_secs_f64() / scale * CHART as f64) as usize).min(CHART);
    let mut lines = vec![String::new()];
    for wave in &plan.waves {
        let from = column(wave.from).min(CHART - 1);
        let until = column(wave.until).clamp(from + 1, CHART);
        let mut bar = vec![' '; CHART + 1];
        bar[from..until].fill('█');
        if let Some(deadline) = plan.deadline {
            bar[column(deadline)] = '│';
        }
        let bar: String = bar.into_iter().collect();
        let guests: usize = wave.groups.iter().map(|of| of.guests.len()).sum();
        lines.push(format!(
            "wave {:>2} {bar} {guests} guest{}, until {}",
            wave.number,
            if guests == 1 { "" } else { "s" },
            span(wave.until)
        ));
    }
    let mark = plan.deadline.map_or(String::new(), |deadline| {
        format!("  │ the deadline, {}", span(deadline))
    });
    lines.push(format!("        0 to {}{mark}", span(whole)));
    lines
}

/// One line of how all of it stands.
pub(super) fn headline(record: &Evacuation) -> String {
    let finish = Duration::from_millis(record.finish_ms());
    let left = match record.left() {
        Some(left) if left.is_zero() => "the deadline has PASSED".to_owned(),
        Some(left) => format!("{} until the deadline", span(left)),
        None => "no deadline".to_owned(),
    };
    let trouble = match record.trouble.as_str() {
        "" => String::new(),
        trouble => format!("; {trouble}"),
    };
    format!(
        "{}, {} since it began, its end expected at {}, {left}{trouble}",
        record.state.words(),
        span(record.elapsed()),
        span(finish)
    )
}

/// One line of what is done with a guest.
pub(super) fn doing(guest: &Evacuee) -> String {
    let mut line = format!("{}: {}", guest.guest, guest.state.words());
    match guest.state {
        GuestState::Moved => {
            if let Some(report) = &guest.report {
                line.push_str(&format!(
                    ", it ran nowhere for {:.0} ms, {} sent",
                    report.blackout_ms,
                    bytes(guest.bytes)
                ));
            }
        }
        _ => {
            if let Some((done, total)) = guest.progress.filter(|(_, total)| *total > 0) {
                line.push_str(&format!(" {:.0} %", done as f64 * 100.0 / total as f64));
            }
            if guest.tries > 1 {
                line.push_str(&format!(", try {}", guest.tries));
            }
            if let Some(outlook) = guest.outlook.as_ref().filter(|o| o.rounds > 0) {
                line.push_str(&format!(", round {}, {outlook}", outlook.rounds));
            }
        }
    }
    if !guest.why.is_empty() {
        line.push_str(&format!(" ({})", guest.why));
    }
    line
}

pub(super) fn change(change: &Change) -> String {
    let moved = match (change.finish_before_ms, change.finish_ms) {
        (Some(before), Some(now)) => {
            format!(
                " — planned anew: its end at {}, before {}",
                ms(now),
                ms(before)
            )
        }
        _ => String::new(),
    };
    format!("at {:>7}  {}{moved}", ms(change.at_ms), change.what)
}

/// How it stands.
pub(super) fn status(record: &Evacuation) {
    say!("Evacuation {} to '{}'", record.id, record.order.to);
    say!("{}", headline(record));
    guests(record);
    if !record.state.is_over() {
        say!(
            "\nWatch it: farhaven evacuation status --watch; pause, resume, abort: farhaven evacuation ..."
        );
    }
}

/// How it went, against its plan.
pub(super) fn report(record: &Evacuation) {
    let moved = record.count(GuestState::Moved);
    say!(
        "Evacuation {} to '{}': {}, {moved} of {} guests moved in {}; the plan had said {}.",
        record.id,
        record.order.to,
        record.state.words(),
        record.guests.len(),
        span(record.elapsed()),
        ms(record.promised_finish_ms)
    );
    if let Some(deadline) = record.order.deadline.map(|deadline| deadline.duration()) {
        let over = record.elapsed() > deadline;
        match (over, record.state) {
            (false, EvacuationState::Done) => {
                say!("The deadline of {} was kept.", span(deadline));
            }
            (true, _) => say!("The deadline of {} was MISSED.", span(deadline)),
            _ => {}
        }
    }
    guests(record);
    if !record.changes.is_empty() {
        say!("\nWhat changed");
        for of in &record.changes {
            say!("  {}", change(of));
        }
    }
}

fn guests(record: &Evacuation) {
    let mut rows = table(&[
        "Wave",
        "Guest",
        "State",
        "Ran after",
        "Planned",
        "Blackout",
        "Planned",
        "Sent",
        "Planned",
        "Tries",
    ]);
    for guest in record.guests.iter().take(MOST_ROWS) {
        let planned = guest.planned;
        let by_plan = |told: &dyn Fn(crate::site::evacuate::Planned) -> String| {
            planned.map_or("-".to_owned(), told)
        };
        let state = Cell::new(guest.state.words()).fg(match guest.state {
            GuestState::Moved => Color::Green,
            GuestState::Failed | GuestState::Left => Color::Red,
            _ => Color::Yellow,
        });
        rows.add_row(vec![
            Cell::new(by_plan(&|planned| planned.wave.to_string())),
            Cell::new(&guest.guest),
            state,
            Cell::new(guest.moved_ms.map_or("-".to_owned(), ms)),
            Cell::new(by_plan(&|planned| ms(planned.runs_at_ms))),
            Cell::new(guest.report.as_ref().map_or("-".to_owned(), |report| {
                format!("{:.0} ms", report.blackout_ms)
            })),
            Cell::new(by_plan(&|planned| format!("{:.0} ms", planned.blackout_ms))),
            Cell::new(bytes(guest.bytes)),
            Cell::new(by_plan(&|planned| bytes(planned.bytes))),
            Cell::new(guest.tries),
        ]);
    }
    say!("\n{rows}");
    if record.guests.len() > MOST_ROWS {
        say!(
            "... and {} more; all of them: --json",
            record.guests.len() - MOST_ROWS
        );
    }
    for guest in record.guests.iter().filter(|guest| !guest.why.is_empty()) {
        say!("! {}: {}", guest.guest, guest.why);
    }
}

pub(super) fn list(list: &[Summary]) {
    if list.is_empty() {
        say!(
            "No evacuation was begun here. To plan one: farhaven evacuate --to SITE --deadline TIME --dry-run"
        );
        return;
    }
    let mut rows = table(&["Number", "To", "State", "Began", "Took", "Moved"]);
    for one in list {
        let ago = crate::site::age(one.begun_at);
        rows.add_row(vec![
            Cell::new(one.id),
            Cell::new(&one.to),
            Cell::new(one.state.words()),
            Cell::new(format!("{} ago", span(ago))),
            Cell::new(ms(one.elapsed_ms)),
            Cell::new(format!("{} of {}", one.moved, one.guests)),
        ]);
    }
    say!("{rows}");
}
