//! What a guest shows: its screen, or the last lines of its serial console.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Duration;

use super::facts::{Picture, now_ms};
use super::perform::AtSite;
use super::targets::Target;
use crate::site::view::ConsolePaths;

/// Largest screen that is kept, in bytes of its PNG.
const LARGEST_SCREEN: u64 = 4 << 20;
/// So much of the end of a console is read.
const CONSOLE: u64 = 8 << 10;
/// So many of its lines are kept.
const LINES: usize = 40;
/// A guest that has just been started shows nothing for a moment: it is looked at so often,
/// and so long after one another.
const TRIES: u32 = 10;
const AGAIN: Duration = Duration::from_millis(100);
/// Consoles, logs and screens are files beside the guest's others.
const SCREEN: &str = "screen.png";

/// Keeps what a guest shows now; `anew`, or only if there is none yet. A guest
/// that shows nothing is no failure.
pub(super) async fn take(run: &AtSite, target: &Target, anew: bool) {
    let has_one = |run: &AtSite| {
        let kept = run.facts.of(&target.name).picture;
        kept.is_some_and(|picture| picture.shows())
    };
    if !anew && has_one(run) {
        return;
    }
    for _ in 0..TRIES {
        look(run, target).await;
        if has_one(run) {
            return;
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Keeps what it shows, if that is anything.
async fn look(run: &AtSite, target: &Target) {
    let standby = &target.standby;
    let tested = standby.tested_by(&run.run).await;
    let (directory, drawn) = match (&tested, standby.active()) {
        (Some(ready), _) => {
            let directory = ready.run_directory().to_owned();
            let (ready, file) = (ready.clone(), directory.join(SCREEN));
            let drawn = crate::work::spawn_blocking(move || ready.draw(&file)).await;
            (directory, drawn.is_ok_and(|drawn| drawn.is_ok()))
        }
        (None, Some(active)) => {
            let directory = active.directory().to_owned();
            let drawn = standby.draw(&directory.join(SCREEN)).await;
            (directory, drawn.is_ok())
        }
        (None, None) => return,
    };
    let (facts, id, guest) = (run.facts.clone(), run.run.clone(), target.name.clone());
    let Ok(site) = run.site() else { return };
    let kept = crate::work::spawn_blocking(move || {
        let screen = drawn.then(|| keep_screen(&directory.join(SCREEN), &site, &id, &guest));
        let picture = screen
            .flatten()
            .or_else(|| console(&ConsolePaths::beside(&directory)?.log));
        match picture {
            Some(picture) if picture.shows() => {
                facts.note(&guest, |guest| guest.picture = Some(picture))
            }
            _ => Ok(()),
        }
    });
    if let Ok(Err(error)) = kept.await {
        tracing::warn!(run = run.run, %error, "what a guest showed is not kept");
    }
}

impl crate::site::Site {
    /// The last lines of a guest's console, of its test or of itself.
    pub(super) fn picture_of(&self, guest: &str) -> Option<Picture> {
        let view = self.standby_named(guest)?.view();
        let of_test = view.test.and_then(|test| test.console);
        let paths = of_test.or(view.active.and_then(|active| active.console));
        console(&paths?.log)
    }

    /// Does its test run?
    pub(super) async fn test_runs(&self, guest: &str) -> bool {
        match self.standby_named(guest) {
            Some(standby) => standby.test_runs().await,
            None => false,
        }
    }
}

fn keep_screen(drawn: &Path, site: &crate::site::Site, id: &str, guest: &str) -> Option<Picture> {
    let bytes = std::fs::metadata(drawn).ok()?.len();
    let content = (bytes <= LARGEST_SCREEN).then(|| std::fs::read(drawn).ok())?;
    let _ = std::fs::remove_file(drawn);
    let content = content.filter(|png| png.starts_with(b"\x89PNG"))?;
    let file = format!("{id}.{guest}.png");
    let path = site.runs.directory().join(&file);
    crate::site::files::replace(&path, &content).ok()?;
    Some(Picture::Screen { at: now_ms(), file })
}

/// The end of a console's log, as text that shows on paper.
fn console(log: &Path) -> Option<Picture> {
    let mut file = File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(CONSOLE)))
        .ok()?;
    let mut bytes = Vec::new();
    file.take(CONSOLE).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let plain = |c: char| c == '\t' || !c.is_control();
    let lines: Vec<String> = text
        .lines()
        .map(|line| line.chars().filter(|c| plain(*c)).collect())
        .collect();
    let text = lines[lines.len().saturating_sub(LINES)..].join("\n");
    Some(Picture::Console { at: now_ms(), text })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_console_without_what_would_not_print() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("console.log");
        let mut text = "\u{1b}[31mbooting\r\n".repeat(3000);
        text.push_str("login: \u{0}");
        std::fs::write(&log, text).unwrap();
        let Some(Picture::Console { text, .. }) = console(&log) else {
            panic!("no console");
        };
        assert!(text.ends_with("login: "), "{text:?}");
        assert_eq!(text.lines().count(), LINES);
        assert!(text.lines().take(5).all(|line| line == "[31mbooting"));
    }
}
