//! What verbs print. Unlike with `println!`, a reader that reads no further
//! (`farhaven status | head -3`) is no fault of the program's.

use std::borrow::Cow;
use std::fmt::Arguments;
use std::io::{ErrorKind, Write};

/// What a shell sees of a program that ended because nobody read on.
const NOBODY_READS: i32 = 128 + 13;

/// Prints a line on stdout.
macro_rules! say {
    () => { $crate::cli::out::put(format_args!("\n")) };
    ($($text:tt)*) => { $crate::cli::out::put(format_args!("{}\n", format_args!($($text)*))) };
}

/// Prints on stdout.
macro_rules! put {
    ($($text:tt)*) => { $crate::cli::out::put(format_args!($($text)*)) };
}

/// As [`exact`], fit for a terminal.
pub(super) fn put(text: Arguments<'_>) {
    exact(&fit(&text.to_string()));
}

/// A text for people: of what steers a terminal only colours are left. Names and
/// sentences may be a peer's, or a guest's.
pub(super) fn fit(text: &str) -> Cow<'_, str> {
    let steers = |c: char| {
        c.is_control() && !matches!(c, '\n' | '\t')
            // What turns the direction of text hides what it says.
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(steers) {
        return text.into();
    }
    let mut shown = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(steers) {
        shown.push_str(&rest[..at]);
        rest = &rest[at..];
        let colour = colour(rest);
        match colour {
            0 => {
                shown.push(char::REPLACEMENT_CHARACTER);
                rest = rest
                    .get(rest.chars().next().map_or(0, char::len_utf8)..)
                    .unwrap_or_default();
            }
            length => {
                shown.push_str(&rest[..length]);
                rest = &rest[length..];
            }
        }
    }
    shown.push_str(rest);
    shown.into()
}

/// Bytes of the colour that this text begins with, `ESC [ 31 m`; 0 for none.
fn colour(text: &str) -> usize {
    let Some(rest) = text.strip_prefix("\x1b[") else {
        return 0;
    };
    let figures = rest.find(|c: char| !c.is_ascii_digit() && c != ';');
    match figures {
        Some(end) if rest[end..].starts_with('m') => 2 + end + 1,
        _ => 0,
    }
}

/// What was asked for is done by the time anything is printed: where nobody
/// reads it, the program ends.
pub(super) fn exact(text: &str) {
    let written = std::io::stdout().write_all(text.as_bytes());
    match written {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(NOBODY_READS),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "farhaven: cannot print: {error}");
            std::process::exit(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fit;

    #[test]
    fn what_steers_a_terminal_is_not_printed() {
        let table = "\x1b[31mDOWN\x1b[39m\tdb1\n\x1b[1;4mwest\x1b[0m";
        assert_eq!(fit(table), table);
        assert_eq!(fit("plain\n"), "plain\n");
        assert_eq!(
            fit("a\x1b]52;c;aGk=\x07b\x1b[2Jc\u{202e}d\x1b[31"),
            "a\u{fffd}]52;c;aGk=\u{fffd}b\u{fffd}[2Jc\u{fffd}d\u{fffd}[31"
        );
    }
}
