//! What verbs print. Unlike with `println!`, a reader that reads no further
//! (`farhaven status | head -3`) is no fault of the program's.

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

/// What was asked for is done by the time anything is printed: where nobody
/// reads it, the program ends.
pub(super) fn put(text: Arguments<'_>) {
    let written = std::io::stdout().write_fmt(text);
    match written {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(NOBODY_READS),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "farhaven: cannot print: {error}");
            std::process::exit(1);
        }
    }
}
