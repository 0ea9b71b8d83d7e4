//! Configuration: file, then environment, then flags; later ones win.
//!
//! Every value given is first compared with the keys and types of `T`, one by
//! one, so that all mistakes are told at once, each with the file and line, the
//! variable or the flag it comes from. Only then does the `config` crate (which
//! no other file names) lay the sources over each other and build `T`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use config::{Config, ConfigError, Source, Value, ValueKind};
use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

mod files;
mod origins;

pub use self::files::files_of;
pub(crate) use self::files::read;
pub use self::origins::{Loaded, Origins};
pub use crate::mistake::{LoadError, Mistake, Origin, Problem};
use crate::mistake::{expectation, nearest, shortened};
use crate::shape::Shape;

pub use crate::mistake::{LARGEST_FILE, MOST_FILES};

/// What can be loaded: every key has a default (`#[serde(default)]` on every
/// struct), so that each value can be judged by itself.
pub trait Checked: DeserializeOwned {
    /// What to do where nothing better can be said of an unknown key or a missing file.
    const HELP: &'static str;

    /// What is wrong with values that are each of the right type.
    fn problems(&self) -> Vec<Problem>;

    /// The same, where it matters what was given and where.
    fn problems_with(&self, _: &Origins) -> Vec<Problem> {
        self.problems()
    }

    /// Variables whose first key is this are meant for another configuration.
    fn neighbour(_: &str) -> bool {
        false
    }
}

/// Loads `T` from a file (if one is named), from environment variables
/// `PREFIX__TABLE__KEY`, and from `overrides`, pairs of a dotted key and a value
/// that flags have set. Lists in variables and overrides are separated by commas.
///
/// # Errors
/// See [`LoadError`]; mistakes are all reported at once.
pub fn load<T: Checked>(
    file: Option<&Path>,
    env_prefix: &str,
    overrides: &[(String, String)],
) -> Result<T, LoadError> {
    let files: Vec<PathBuf> = file.map(Path::to_owned).into_iter().collect();
    load_files(&files, env_prefix, overrides).map(|loaded| loaded.value)
}

/// [`load`] from files that lie over each other in this order, the last on top.
///
/// # Errors
/// See [`LoadError`].
pub fn load_files<T: Checked>(
    files: &[PathBuf],
    env_prefix: &str,
    overrides: &[(String, String)],
) -> Result<Loaded<T>, LoadError> {
    let texts = files.iter().map(|path| read(path, T::HELP));
    let texts = texts.collect::<Result<Vec<_>, _>>()?;
    let variables = std::env::vars_os().map(|(name, value)| {
        (
            name.to_string_lossy().into_owned(),
            value.to_string_lossy().into_owned(),
        )
    });
    let texts: Vec<_> = files
        .iter()
        .zip(&texts)
        .map(|(path, text)| (path.as_path(), text.as_str()))
        .collect();
    load_layers(&texts, env_prefix, variables, overrides)
}

/// [`load`], with the file's text and the environment as arguments.
///
/// # Errors
/// See [`LoadError`].
pub fn load_from<T: Checked>(
    file: Option<(&Path, &str)>,
    env_prefix: &str,
    variables: impl IntoIterator<Item = (String, String)>,
    overrides: &[(String, String)],
) -> Result<T, LoadError> {
    let files: Vec<_> = file.into_iter().collect();
    load_layers(&files, env_prefix, variables, overrides).map(|loaded| loaded.value)
}

/// [`load_files`], with texts and the environment as arguments.
///
/// # Errors
/// See [`LoadError`].
pub fn load_layers<T: Checked>(
    files: &[(&Path, &str)],
    env_prefix: &str,
    variables: impl IntoIterator<Item = (String, String)>,
    overrides: &[(String, String)],
) -> Result<Loaded<T>, LoadError> {
    let shape = Shape::of::<T>();
    let mut inputs = Inputs::new(T::HELP);
    for (path, text) in files {
        inputs.add_file(&shape, path, text);
    }
    let prefix = format!("{env_prefix}__");
    let mut variables: Vec<_> = variables
        .into_iter()
        .filter(|(name, _)| name.starts_with(&prefix))
        .collect();
    variables.sort();
    for (name, value) in variables {
        let key = name[prefix.len()..].to_lowercase().replace("__", ".");
        if !T::neighbour(key.split('.').next().unwrap_or_default()) {
            inputs.add_text(&shape, Origin::Variable(name), &key, &value);
        }
    }
    for (key, value) in overrides {
        inputs.add_text(&shape, Origin::Flag(key.clone()), key, value);
    }
    inputs.judge_values::<T>(&shape);
    // People read from the top, and what comes first in force.
    inputs.mistakes.sort_by_key(|mistake| mistake.origin.rank());
    // What cannot be parsed says too little about what else is in it.
    if inputs.unreadable {
        return Err(LoadError::Mistakes(inputs.mistakes));
    }

    // What is wrong by itself is left out, so that the rest is judged all the same.
    let mut builder = Config::builder();
    for given in inputs.given.iter().filter(|given| given.sound) {
        builder = builder.add_source(given.layer());
    }
    let merged = builder.build().and_then(Config::try_deserialize::<T>);
    let value = match merged {
        Ok(value) => value,
        Err(error) if inputs.mistakes.is_empty() => {
            return Err(LoadError::Merge(error.to_string()));
        }
        Err(_) => return Err(LoadError::Mistakes(inputs.mistakes)),
    };
    let origins = Origins::new(
        inputs
            .given
            .iter()
            .map(|given| (given.key(), given.origin.clone())),
        std::mem::take(&mut inputs.tables),
        files
            .first()
            .map(|(path, _)| Origin::Path((*path).to_owned())),
        inputs
            .mistakes
            .iter()
            .map(|mistake| mistake.key.clone())
            .collect(),
    );
    let told = std::mem::take(&mut inputs.mistakes);
    let follows = |problem: &Problem| {
        told.iter().any(|mistake| {
            let under = |key: &str| {
                problem
                    .key
                    .strip_prefix(key)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
            };
            under(&mistake.key) || mistake.meant.as_deref().is_some_and(under)
        })
    };
    let problems = value.problems_with(&origins).into_iter();
    let problems: Vec<_> = problems.filter(|problem| !follows(problem)).collect();
    let mut mistakes = told;
    mistakes.extend(problems.into_iter().map(|Problem { key, what }| Mistake {
        origin: origins.nearest(&key),
        what: format!("'{key}' {what}"),
        key,
        meant: None,
    }));
    if mistakes.is_empty() {
        Ok(Loaded { value, origins })
    } else {
        Err(LoadError::Mistakes(mistakes))
    }
}

/// One value as it was given.
struct Given {
    origin: Origin,
    path: Vec<String>,
    value: Value,
    /// As the operator wrote it.
    shown: String,
    /// It is of the right type.
    sound: bool,
}

impl Given {
    fn key(&self) -> String {
        self.path.join(".")
    }

    /// This value alone as a source of configuration.
    fn layer(&self) -> Layer {
        let mut value = self.value.clone();
        for key in self.path.iter().skip(1).rev() {
            value = Value::new(None, HashMap::from([(key.clone(), value)]));
        }
        Layer(
            self.path
                .first()
                .map(|key| (key.clone(), value))
                .into_iter()
                .collect(),
        )
    }
}

#[derive(Debug, Clone)]
struct Layer(config::Map<String, Value>);

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<config::Map<String, Value>, ConfigError> {
        Ok(self.0.clone())
    }
}

struct Inputs {
    given: Vec<Given>,
    mistakes: Vec<Mistake>,
    /// Where tables were first named.
    tables: HashMap<String, Origin>,
    unreadable: bool,
    help: &'static str,
}

impl Inputs {
    fn new(help: &'static str) -> Inputs {
        Inputs {
            given: Vec::new(),
            mistakes: Vec::new(),
            tables: HashMap::new(),
            unreadable: false,
            help,
        }
    }

    fn add_file(&mut self, shape: &Shape, path: &Path, text: &str) {
        let ends: Vec<usize> = text.match_indices('\n').map(|(at, _)| at).collect();
        let line_of = |at: usize| 1 + ends.partition_point(|end| *end < at);
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in &errors {
            let line = line_of(error.span().map_or(0, |span| span.start));
            let origin = Origin::Line(path.to_owned(), line);
            self.unreadable = true;
            self.mistakes.push(Mistake {
                origin,
                key: String::new(),
                what: format!("not TOML: {}", error.message()),
                meant: None,
            });
        }
        if errors.is_empty() {
            let source = FileText {
                path,
                text,
                line_of: &line_of,
            };
            self.add_table(shape, shape, &source, &mut Vec::new(), table.get_ref());
        }
    }

    fn add_table(
        &mut self,
        root: &Shape,
        shape: &Shape,
        source: &FileText<'_>,
        path: &mut Vec<String>,
        table: &DeTable<'_>,
    ) {
        for (key, value) in table {
            path.push(key.get_ref().clone().into_owned());
            let origin = Origin::Line(source.path.to_owned(), (source.line_of)(key.span().start));
            match (shape.child(key.get_ref()), value.get_ref()) {
                (None, _) => self.unknown(root, origin, &path.join(".")),
                (Some(inner @ (Shape::Table(_) | Shape::Map(_))), DeValue::Table(below))
                    if !below.is_empty() =>
                {
                    self.tables.entry(path.join(".")).or_insert(origin.clone());
                    // It is there even if all that is in it is wrong.
                    self.given.push(Given {
                        origin,
                        path: path.clone(),
                        value: Value::new(None, ValueKind::Table(config::Map::new())),
                        shown: String::new(),
                        sound: true,
                    });
                    self.add_table(root, inner, source, path, below);
                }
                (Some(_), given) => {
                    if matches!(given, DeValue::Table(_)) {
                        self.tables.entry(path.join(".")).or_insert(origin.clone());
                    }
                    self.given.push(Given {
                        origin,
                        path: path.clone(),
                        value: as_value(given),
                        shown: source.text.get(value.span()).unwrap_or_default().to_owned(),
                        sound: true,
                    });
                }
            }
            path.pop();
        }
    }

    fn add_text(&mut self, root: &Shape, origin: Origin, key: &str, text: &str) {
        let path: Vec<String> = key.split('.').map(str::to_owned).collect();
        // The `config` crate reads a key as a path; other characters would mean something else there.
        let plain = |part: &String| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
        };
        let shape = path.iter().try_fold(root, |shape, part| shape.child(part));
        let Some(shape) = shape.filter(|_| path.iter().all(plain)) else {
            return self.unknown(root, origin, key);
        };
        let value = match shape {
            Shape::List => {
                let items = text
                    .split(',')
                    .map(str::trim)
                    .filter(|item| !item.is_empty());
                Value::new(
                    None,
                    items.map(|item| Value::new(None, item)).collect::<Vec<_>>(),
                )
            }
            _ => Value::new(None, text),
        };
        self.given.push(Given {
            origin,
            path,
            value,
            shown: format!("{text:?}"),
            sound: true,
        });
    }

    fn unknown(&mut self, root: &Shape, origin: Origin, key: &str) {
        let meant = nearest(root, key);
        let hint = match &meant {
            Some(nearest) => format!("did you mean '{nearest}'?"),
            None => self.help.to_owned(),
        };
        self.mistakes.push(Mistake {
            origin,
            key: key.to_owned(),
            what: format!("unknown key '{key}'; {hint}"),
            meant,
        });
    }

    /// Builds a `T` from each value alone: what fails is that value's fault.
    fn judge_values<T: Checked>(&mut self, root: &Shape) {
        for given in &mut self.given {
            let alone = Config::builder().add_source(given.layer()).build();
            if let Err(error) = alone.and_then(Config::try_deserialize::<T>) {
                let shape = given
                    .path
                    .iter()
                    .try_fold(root, |shape, part| shape.child(part));
                let (shown, wanted) = (
                    shortened(&given.shown),
                    expectation(shape, &given.shown, &complaint(&error)),
                );
                let what = format!("'{}' is {shown}; {wanted}", given.key());
                given.sound = false;
                self.mistakes.push(Mistake {
                    origin: given.origin.clone(),
                    key: given.key(),
                    what,
                    meant: None,
                });
            }
        }
    }
}

struct FileText<'a> {
    path: &'a Path,
    text: &'a str,
    line_of: &'a dyn Fn(usize) -> usize,
}

fn as_value(value: &DeValue<'_>) -> Value {
    let kind = match value {
        DeValue::String(text) => ValueKind::String(text.clone().into_owned()),
        DeValue::Boolean(truth) => ValueKind::Boolean(*truth),
        DeValue::Integer(digits) => i64::from_str_radix(digits.as_str(), digits.radix())
            .map_or_else(|_| ValueKind::String(digits.to_string()), ValueKind::I64),
        DeValue::Float(digits) => digits
            .as_str()
            .parse()
            .map_or_else(|_| ValueKind::String(digits.to_string()), ValueKind::Float),
        DeValue::Datetime(time) => ValueKind::String(time.to_string()),
        DeValue::Array(items) => {
            ValueKind::Array(items.iter().map(|item| as_value(item.get_ref())).collect())
        }
        DeValue::Table(table) => ValueKind::Table(
            table
                .iter()
                .map(|(key, item)| (key.get_ref().clone().into_owned(), as_value(item.get_ref())))
                .collect(),
        ),
    };
    Value::new(None, kind)
}

/// The complaint of a type, without what `config` wraps around it.
fn complaint(error: &ConfigError) -> String {
    match error {
        ConfigError::At { error, .. } => complaint(error),
        ConfigError::Type { expected, .. } => format!("expected {expected}"),
        ConfigError::Message(message) => message.clone(),
        other => other.to_string(),
    }
}
