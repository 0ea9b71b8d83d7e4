//! Mistakes in a configuration: where they were made, and words that help.

use std::fmt;
use std::path::PathBuf;

use crate::shape::{ANY_KEY, Shape};

/// Largest configuration file that is read.
pub const LARGEST_FILE: u64 = 1 << 20;

/// Most files of one directory that are read.
pub const MOST_FILES: usize = 256;

/// A value that has the right type and still cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The dotted key.
    pub key: String,
    /// What is wrong and what to do, to be read after the key: "is 0s; try 10s".
    pub what: String,
}

impl Problem {
    /// A problem with the value of `key`.
    pub fn new(key: impl Into<String>, what: impl Into<String>) -> Problem {
        Problem {
            key: key.into(),
            what: what.into(),
        }
    }

    /// The same problem, of a part that lies under `prefix`.
    pub fn under(self, prefix: &str) -> Problem {
        Problem {
            key: format!("{prefix}.{}", self.key),
            ..self
        }
    }
}

/// Why no configuration could be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}; {help}", path.display())]
    Read {
        /// What to do.
        help: &'static str,
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The file is far larger than a configuration.
    #[error("{} has {bytes} bytes; such a file has at most {LARGEST_FILE}: is this the right file?", path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// A directory without files to load, or with far too many.
    #[error("{} has {files} files that end in .toml; expected 1 to {MOST_FILES}", path.display())]
    Files {
        /// Which directory.
        path: PathBuf,
        /// How many there are.
        files: usize,
    },
    /// Mistakes in what was given, all of them.
    #[error("{}", list(.0))]
    Mistakes(Vec<Mistake>),
    /// The sources could not be laid over each other.
    #[error("the configuration cannot be put together: {0}")]
    Merge(String),
}

/// One mistake and where it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Where.
    pub origin: Origin,
    /// The dotted key; empty where none can be named.
    pub key: String,
    /// What, and what to do.
    pub what: String,
    /// The valid key that was probably meant.
    pub meant: Option<String>,
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A line of a file, counted from 1.
    Line(PathBuf, usize),
    /// A file, where no line can be named.
    Path(PathBuf),
    /// An environment variable.
    Variable(String),
    /// A flag (`--set KEY=VALUE`, or one that stands for it) that sets this key.
    Flag(String),
    /// Nothing was given.
    Defaults,
}

impl Origin {
    pub(crate) fn rank(&self) -> (u8, PathBuf, usize) {
        let nowhere = PathBuf::new;
        match self {
            Origin::Defaults => (0, nowhere(), 0),
            Origin::Path(_) => (1, nowhere(), 0),
            Origin::Line(path, line) => (2, path.clone(), *line),
            Origin::Variable(_) => (3, nowhere(), 0),
            Origin::Flag(_) => (4, nowhere(), 0),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Line(path, line) => write!(f, "{}:{line}", path.display()),
            Origin::Path(path) => write!(f, "{}", path.display()),
            Origin::Variable(name) => write!(f, "environment variable {name}"),
            Origin::Flag(key) => write!(f, "--set {key}"),
            Origin::Defaults => f.write_str("no configuration given"),
        }
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.origin, self.what)
    }
}

fn list(mistakes: &[Mistake]) -> String {
    mistakes
        .iter()
        .map(Mistake::to_string)
        .collect::<Vec<_>>()
        .join("\n")
}

/// What is wanted at a place, or else in the type's words, where serde and
/// `config` differ.
pub(crate) fn expectation(shape: Option<&Shape>, shown: &str, complaint: &str) -> String {
    match shape {
        Some(Shape::Table(_) | Shape::Map(_)) => return "expected a table".to_owned(),
        Some(Shape::List) if !shown.starts_with('[') => {
            return "expected a list, like [\"one\", \"two\"]".to_owned();
        }
        Some(Shape::Choice(words)) => {
            let one_of = format!("expected one of {}", words.join(", "));
            let shown = shown.trim_matches(['"', '\'']);
            return match nearest_of(words.iter().copied(), shown) {
                Some(word) => format!("{one_of}; did you mean '{word}'?"),
                None => one_of,
            };
        }
        Some(Shape::List | Shape::Value) | None => {}
    }
    let wanted = complaint
        .rfind("expected ")
        .map_or(complaint, |at| &complaint[at..]);
    match wanted {
        "expected u8" | "expected an unsigned 8 bit integer" => {
            "expected a whole number from 0 to 255".to_owned()
        }
        number
            if number.contains("unsigned")
                || matches!(
                    number,
                    "expected u32" | "expected u64" | "expected an integer"
                ) =>
        {
            "expected a whole number, not negative".to_owned()
        }
        "expected a boolean" => "expected true or false".to_owned(),
        "expected socket address" | "invalid socket address syntax" => {
            "expected address:port, like 0.0.0.0:4747".to_owned()
        }
        other => other.replace('`', "'"),
    }
}

pub(crate) fn shortened(shown: &str) -> String {
    const LONGEST: usize = 60;
    let line = shown.lines().next().unwrap_or_default();
    match line.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}

/// How alike two words are for one to be meant by the other: of 1, which is the same.
const ALIKE: f64 = 0.6;

/// How alike two words are, where that may be more than `floor`; else 0. Those that cannot
/// be are not compared, which would cost the product of their lengths.
fn likeness(one: &str, other: &str, floor: f64) -> f64 {
    // An edit puts at most one letter right that one has, and one that the other has.
    let mut letters = [0_i32; 64];
    let mut lengths = [0_usize; 2];
    for (word, sign, length) in [(one, 1, 0), (other, -1, 1)] {
        for letter in word.chars() {
            letters[letter as usize % 64] += sign;
            lengths[length] += 1;
        }
    }
    let of_one: i32 = letters.iter().filter(|count| **count > 0).sum();
    let of_other: i32 = letters.iter().filter(|count| **count < 0).sum();
    let edits = of_one.max(-of_other);
    let longest = lengths[0].max(lengths[1]) as f64;
    match f64::from(edits) > (1.0 - floor) * longest + 1e-9 {
        true => 0.0,
        false => strsim::normalized_damerau_levenshtein(one, other),
    }
}

/// The most alike of some words, if one is [`ALIKE`] at all. `like` tells how much one is,
/// where that may be more than what it is given.
fn most_alike<T>(words: impl Iterator<Item = T>, like: impl Fn(&T, f64) -> f64) -> Option<T> {
    let (mut best, mut floor) = (None, ALIKE);
    for word in words {
        let alike = like(&word, floor);
        if alike >= floor {
            (best, floor) = (Some(word), alike);
        }
    }
    best
}

/// Longest words that are compared with others, in bytes.
const COMPARED: usize = 200;

/// The valid key most like `key`: in its whole, or in its last part (a key put
/// into the wrong table).
pub(crate) fn nearest(root: &Shape, key: &str) -> Option<String> {
    /// A last part that is the same counts so much.
    const LAST: f64 = 0.9;
    if key.len() > COMPARED {
        return None;
    }
    // Where the operator chooses keys, theirs is the valid one.
    let parts: Vec<&str> = key.split('.').collect();
    let keys = root.keys().into_iter().map(|valid| {
        let filled = valid
            .split('.')
            .enumerate()
            .map(|(place, part)| match part {
                ANY_KEY => parts.get(place).copied().unwrap_or(ANY_KEY),
                part => part,
            });
        filled.collect::<Vec<_>>().join(".")
    });
    let valid = keys.filter(|valid| !valid.contains(ANY_KEY) && valid != key);
    most_alike(valid, |valid, floor| {
        let whole = likeness(key, valid, floor);
        let floor = floor.max(whole) / LAST;
        whole.max(LAST * likeness(last_part(key), last_part(valid), floor))
    })
}

fn last_part(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or_default()
}

/// The word most like `word`, if one is like it at all.
pub(crate) fn nearest_of<'a>(
    words: impl IntoIterator<Item = &'a str>,
    word: &str,
) -> Option<&'a str> {
    if word.len() > COMPARED {
        return None;
    }
    let word = word.to_lowercase();
    most_alike(words.into_iter(), |known, floor| {
        likeness(&word, known, floor)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_not_compared_is_not_alike(
            one in "[a-cäß.]{0,12}",
            other in "[a-cäß.]{0,12}",
            floor in ALIKE..1.2,
        ) {
            let whole = strsim::normalized_damerau_levenshtein(&one, &other);
            let found = likeness(&one, &other, floor);
            prop_assert!(found == whole || (found == 0.0 && whole < floor), "{found} {whole}");
        }

        /// As if all were compared: the last of the most alike.
        #[test]
        fn the_most_alike_is_found(
            word in "[a-c]{0,8}",
            words in proptest::collection::vec("[a-c]{0,8}", 0..12),
        ) {
            let alike = |known: &str| strsim::normalized_damerau_levenshtein(&word, known);
            let known: Vec<&str> = words.iter().map(String::as_str).collect();
            let best = known.iter().copied().max_by(|a, b| alike(a).total_cmp(&alike(b)));
            let best = best.filter(|best| alike(best) >= ALIKE);
            prop_assert_eq!(nearest_of(known, &word), best);
        }
    }
}
