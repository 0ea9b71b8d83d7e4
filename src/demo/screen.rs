//! What a person sees while a demo runs: a bar, one running line, sentences.
//! Where stderr is no terminal: plain lines, few of them.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Plain lines come at least so far apart.
const SPARSE: Duration = Duration::from_secs(2);

/// The bar of a first copy.
const COPY: &str = "  First copy{prefix}  {bar:30} {percent:>3} %  {wide_msg}";

/// The running line of a protected guest.
const LIVE: &str = "  {spinner} {wide_msg}";

/// A line on stderr. If nobody reads it any more, the demo goes on and ends in order.
fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Stderr.
pub(super) struct Screen {
    terminal: bool,
    colours: bool,
    bar: Option<ProgressBar>,
    told: Option<Instant>,
    pass: Pass,
}

/// The first copy goes over the guest again and again, each time over what
/// changed meanwhile, and over its disks: a bar that falls back is a new pass.
#[derive(Debug, Default)]
struct Pass {
    number: u32,
    done: u64,
}

impl Pass {
    /// What follows the words `First copy`, so far into it.
    fn suffix(&mut self, done: u64) -> String {
        if done < self.done || self.number == 0 {
            self.number += 1;
        }
        self.done = done;
        match self.number {
            1 => String::new(),
            number => format!(", pass {number}"),
        }
    }
}

impl Screen {
    pub(super) fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self {
            terminal,
            colours: terminal && std::env::var_os("NO_COLOR").is_none(),
            bar: None,
            told: None,
            pass: Pass::default(),
        }
    }

    /// A sentence.
    pub(super) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| tell(line)),
            None => tell(line),
        }
    }

    /// A sentence whose first word is shouted.
    pub(super) fn shout(&self, word: &str, rest: &str) {
        let word = match self.colours {
            true => format!("\x1b[1;31m{word}\x1b[0m"),
            false => word.to_owned(),
        };
        self.say(&format!("{word}: {rest}"));
    }

    /// A bar comes.
    pub(super) fn begin_copy(&mut self) {
        self.begin(COPY);
    }

    /// A running line comes.
    pub(super) fn begin_live(&mut self) {
        self.begin(LIVE);
    }

    fn begin(&mut self, template: &str) {
        self.end();
        if !self.terminal {
            return;
        }
        let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr());
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        self.bar = Some(bar);
    }

    /// How far the copy is.
    pub(super) fn copy(&mut self, progress: Option<(u64, u64)>, words: String) {
        let suffix = match progress {
            Some((done, _)) => self.pass.suffix(done),
            None => String::new(),
        };
        match &self.bar {
            Some(bar) => {
                if let Some((done, total)) = progress {
                    bar.set_prefix(suffix);
                    bar.set_length(total.max(1));
                    bar.set_position(done.min(total));
                }
                bar.set_message(words);
            }
            None => {
                if self.told.is_none_or(|told| told.elapsed() >= SPARSE) {
                    self.told = Some(Instant::now());
                    let share = progress.map_or(0, |(done, total)| done * 100 / total.max(1));
                    tell(&format!("  First copy{suffix} {share:>3} %, {words}"));
                }
            }
        }
    }

    /// How the guest stands; a plain line only with news.
    pub(super) fn live(&mut self, words: String, news: bool) {
        match &self.bar {
            Some(bar) => bar.set_message(words),
            None if news => tell(&format!("  {words}")),
            None => {}
        }
    }

    /// The bar goes.
    pub(super) fn end(&mut self) {
        self.told = None;
        self.pass = Pass::default();
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_that_falls_back_is_a_new_pass() {
        let mut pass = Pass::default();
        let seen: Vec<_> = [0, 5, 5, 9, 2, 3, 1].map(|done| pass.suffix(done)).into();
        assert_eq!(seen[..4], ["", "", "", ""]);
        assert_eq!(seen[4..], [", pass 2", ", pass 2", ", pass 3"]);
    }
}
