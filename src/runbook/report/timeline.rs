//! The picture of a run's steps in time: an inline SVG, no script, no file beside it.

use std::fmt::Write as _;

use farhaven_policies::runbook::Kind;
use farhaven_policies::runbook::run::{Back, Forward, StepView};

use super::{Report, html::escaped, html::span};

/// Width of the picture, of the names at its left and the figures at its right.
const WIDTH: f64 = 960.0;
const NAMES: f64 = 190.0;
const FIGURES: f64 = 110.0;
/// Height of a step's row, and of its bar.
const ROW: f64 = 26.0;
const BAR: f64 = 14.0;
/// The least that a step is drawn with.
const THIN: f64 = 2.0;
/// At the top, for the scale.
const SCALE: f64 = 24.0;

/// A distance on the scale that people count in, so that there are 3 to 8 of them.
fn tick(total: u64) -> u64 {
    const NICE: [u64; 21] = [
        10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 30_000, 60_000, 120_000,
        300_000, 600_000, 1_800_000, 3_600_000, 7_200_000, 21_600_000, 86_400_000,
    ];
    let few = |tick: &&u64| total / **tick <= 8;
    let largest = 86_400_000u64;
    NICE.iter()
        .find(few)
        .copied()
        .unwrap_or_else(|| total.div_ceil(8 * largest) * largest)
}

/// What a bar is coloured by.
fn class(step: &StepView) -> &'static str {
    match (step.back, step.forward) {
        (Back::Undone | Back::Running | Back::SourceAwaited, _) => "undone",
        (Back::Failed, _) | (_, Forward::Failed { .. }) => "bad",
        _ if matches!(step.kind, Kind::Approve | Kind::Delay) => "people",
        _ => "good",
    }
}

/// The steps that were begun, as bars from the start of the run.
pub(super) fn svg(report: &Report) -> String {
    let begun: Vec<&StepView> = report
        .steps
        .iter()
        .filter(|step| step.begun.is_some())
        .collect();
    let now = report.ended.unwrap_or_else(|| {
        let known = begun.iter().filter_map(|step| step.ended.or(step.begun));
        known.map(|at| at.0).max().unwrap_or(report.started)
    });
    let total = now.saturating_sub(report.started).max(1);
    let wide = WIDTH - NAMES - FIGURES;
    let x = |at: u64| {
        let since = at.saturating_sub(report.started).min(total);
        NAMES + wide * since as f64 / total as f64
    };
    let height = SCALE + ROW * begun.len() as f64 + 8.0;
    let mut svg = String::new();
    let _ = write!(
        svg,
        "<svg class=\"timeline\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"Steps in time, {} in all\">",
        escaped(&span(total))
    );
    let tick = tick(total);
    for at in (0..=total / tick).map(|n| n * tick) {
        let here = x(report.started + at);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{here:.1}\" x2=\"{here:.1}\" y1=\"{SCALE}\" y2=\"{:.1}\"/><text class=\"scale\" x=\"{here:.1}\" y=\"14\" text-anchor=\"middle\">{}</text>",
            height - 6.0,
            escaped(&span(at))
        );
    }
    for (row, step) in begun.iter().enumerate() {
        let from = step.begun.map_or(report.started, |at| at.0);
        let until = step.ended.map_or(now, |at| at.0);
        let (left, right) = (x(from), x(until));
        let top = SCALE + ROW * row as f64 + (ROW - BAR) / 2.0;
        let middle = top + BAR - 3.0;
        let took = span(until.saturating_sub(from));
        let _ = write!(
            svg,
            "<text class=\"name\" x=\"{:.1}\" y=\"{middle:.1}\" text-anchor=\"end\">{}</text><rect class=\"{}\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{BAR}\" rx=\"3\"><title>{}: {}</title></rect><text class=\"took\" x=\"{:.1}\" y=\"{middle:.1}\">{}</text>",
            NAMES - 12.0,
            escaped(&short(&step.name)),
            class(step),
            (right - left).max(THIN),
            escaped(&step.name),
            escaped(&took),
            right.max(left + THIN) + 8.0,
            escaped(&took)
        );
    }
    if let Some(rto) = report.rto_ms.filter(|rto| *rto <= total) {
        let here = x(report.started + rto);
        let _ = write!(
            svg,
            "<line class=\"rto\" x1=\"{here:.1}\" x2=\"{here:.1}\" y1=\"{SCALE}\" y2=\"{:.1}\"><title>RTO {}</title></line>",
            height - 6.0,
            escaped(&span(rto))
        );
    }
    svg.push_str("</svg>");
    svg
}

/// A name that fits at the left.
fn short(name: &str) -> String {
    const MOST: usize = 24;
    match name.char_indices().nth(MOST) {
        None => name.to_owned(),
        Some((end, _)) => format!("{}…", &name[..end]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_has_a_handful_of_ticks() {
        for total in [1, 9, 83, 1_000, 4_321, 59_999, 3_600_001, u64::MAX / 4] {
            let ticks = total / tick(total);
            assert!(ticks <= 8, "{total}: {ticks}");
        }
    }
}
