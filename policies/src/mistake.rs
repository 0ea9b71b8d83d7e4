//! Mistakes in a configuration: where they were made, and words that help.

use std::fmt;
use std::path::PathBuf;

use crate::shape::{ANY_KEY, Shape};

/// Largest configuration file that is read.
pub const LARGEST_FILE: u64 = 1 << 20;

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
    #[error("cannot read the configuration {}: {source}; `farhaven site init` writes a new one", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The file is far larger than a configuration.
    #[error("{} has {bytes} bytes; a configuration has at most {LARGEST_FILE}: is this the right file?", path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
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
    /// What, and what to do.
    pub what: String,
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
    pub(crate) fn rank(&self) -> (u8, usize) {
        match self {
            Origin::Defaults => (0, 0),
            Origin::Path(_) => (1, 0),
            Origin::Line(_, line) => (2, *line),
            Origin::Variable(_) => (3, 0),
            Origin::Flag(_) => (4, 0),
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
pub(crate) fn expectation(shape: Option<&Shape>, complaint: &str) -> String {
    match shape {
        Some(Shape::Table(_) | Shape::Map(_)) => return "expected a table".to_owned(),
        Some(Shape::List) => return "expected a list, like [\"one\", \"two\"]".to_owned(),
        Some(Shape::Choice(words)) => return format!("expected one of {}", words.join(", ")),
        Some(Shape::Value) | None => {}
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

/// The valid key most like `key`: in its whole, or in its last part (a key put
/// into the wrong table).
pub(crate) fn nearest(root: &Shape, key: &str) -> Option<String> {
    const ENOUGH: f64 = 0.6;
    // Comparing costs the product of the lengths.
    if key.len() > 200 {
        return None;
    }
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let likeness = |valid: &String| {
        let whole = strsim::normalized_damerau_levenshtein(key, valid);
        whole.max(0.9 * strsim::normalized_damerau_levenshtein(&last(key), &last(valid)))
    };
    let keys = root
        .keys()
        .into_iter()
        .filter(|valid| !valid.contains(ANY_KEY));
    let best = keys
        .map(|valid| (likeness(&valid), valid))
        .max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 >= ENOUGH).then_some(best.1)
}
