//! Configuration: file, then environment, then flags; later ones win.
//!
//! Every value given is first compared with the keys and types of `T`, one by
//! one, so that all mistakes are told at once, each with the file and line, the
//! variable or the flag it comes from. Only then does the `config` crate (which
//! no other file names) lay the sources over each other and build `T`.

use std::collections::HashMap;
use std::path::Path;

use config::{Config, ConfigError, File, FileFormat, Source, Value, ValueKind};
use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

pub use crate::mistake::{LoadError, Mistake, Origin, Problem};
use crate::mistake::{expectation, nearest, shortened};
use crate::shape::Shape;

pub use crate::mistake::LARGEST_FILE;

/// What can be loaded: every key has a default (`#[serde(default)]` on every
/// struct), so that each value can be judged by itself.
pub trait Checked: DeserializeOwned {
    /// What is wrong with values that are each of the right type.
    fn problems(&self) -> Vec<Problem>;
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
    let text = file.map(read).transpose()?;
    let variables = std::env::vars_os().map(|(name, value)| {
        (
            name.to_string_lossy().into_owned(),
            value.to_string_lossy().into_owned(),
        )
    });
    load_from(file.zip(text.as_deref()), env_prefix, variables, overrides)
}

fn read(path: &Path) -> Result<String, LoadError> {
    let failed = |source| LoadError::Read {
        path: path.to_owned(),
        source,
    };
    let bytes = std::fs::metadata(path).map_err(failed)?.len();
    if bytes > LARGEST_FILE {
        return Err(LoadError::TooLarge {
            path: path.to_owned(),
            bytes,
        });
    }
    std::fs::read_to_string(path).map_err(failed)
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
    let shape = Shape::of::<T>();
    let mut inputs = Inputs::default();
    if let Some((path, text)) = file {
        inputs.add_file(&shape, path, text);
    }
    let before_environment = inputs.given.len();
    let prefix = format!("{env_prefix}__");
    let mut variables: Vec<_> = variables
        .into_iter()
        .filter(|(name, _)| name.starts_with(&prefix))
        .collect();
    variables.sort();
    for (name, value) in variables {
        let key = name[prefix.len()..].to_lowercase().replace("__", ".");
        inputs.add_text(&shape, Origin::Variable(name), &key, &value);
    }
    for (key, value) in overrides {
        inputs.add_text(&shape, Origin::Flag(key.clone()), key, value);
    }
    inputs.judge_values::<T>(&shape);
    // People read from the top, and what comes first in force.
    inputs.mistakes.sort_by_key(|mistake| mistake.origin.rank());
    if !inputs.mistakes.is_empty() {
        return Err(LoadError::Mistakes(inputs.mistakes));
    }

    let mut builder = Config::builder();
    if let Some((_, text)) = file {
        builder = builder.add_source(File::from_str(text, FileFormat::Toml));
    }
    for given in &inputs.given[before_environment..] {
        builder = builder.add_source(given.layer());
    }
    let merged = builder.build().and_then(Config::try_deserialize::<T>);
    let value = merged.map_err(|error| LoadError::Merge(error.to_string()))?;

    let mistakes: Vec<_> = value
        .problems()
        .into_iter()
        .map(|Problem { key, what }| Mistake {
            what: format!("'{key}' {what}"),
            origin: inputs.origin_of(&key).unwrap_or_else(|| {
                file.map_or(Origin::Defaults, |(path, _)| Origin::Path(path.to_owned()))
            }),
        })
        .collect();
    if mistakes.is_empty() {
        Ok(value)
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

#[derive(Default)]
struct Inputs {
    given: Vec<Given>,
    mistakes: Vec<Mistake>,
}

impl Inputs {
    fn add_file(&mut self, shape: &Shape, path: &Path, text: &str) {
        let line_of = |at: usize| 1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count();
        let (table, errors) = DeTable::parse_recoverable(text);
        for error in &errors {
            let line = line_of(error.span().map_or(0, |span| span.start));
            let origin = Origin::Line(path.to_owned(), line);
            self.mistakes.push(Mistake {
                origin,
                what: format!("not TOML: {}", error.message()),
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
                (Some(inner @ (Shape::Table(_) | Shape::Map(_))), DeValue::Table(below)) => {
                    self.add_table(root, inner, source, path, below);
                }
                (Some(_), given) => self.given.push(Given {
                    origin,
                    path: path.clone(),
                    value: as_value(given),
                    shown: source.text.get(value.span()).unwrap_or_default().to_owned(),
                }),
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
        });
    }

    fn unknown(&mut self, root: &Shape, origin: Origin, key: &str) {
        let hint = match nearest(root, key) {
            Some(nearest) => format!("did you mean '{nearest}'?"),
            None => "`farhaven site init` writes a file with every key".to_owned(),
        };
        self.mistakes.push(Mistake {
            origin,
            what: format!("unknown key '{key}'; {hint}"),
        });
    }

    /// Builds a `T` from each value alone: what fails is that value's fault.
    fn judge_values<T: Checked>(&mut self, root: &Shape) {
        for given in &self.given {
            let alone = Config::builder().add_source(given.layer()).build();
            if let Err(error) = alone.and_then(Config::try_deserialize::<T>) {
                let shape = given
                    .path
                    .iter()
                    .try_fold(root, |shape, part| shape.child(part));
                let (shown, wanted) = (
                    shortened(&given.shown),
                    expectation(shape, &complaint(&error)),
                );
                let what = format!("'{}' is {shown}; {wanted}", given.key());
                self.mistakes.push(Mistake {
                    origin: given.origin.clone(),
                    what,
                });
            }
        }
    }

    fn origin_of(&self, key: &str) -> Option<Origin> {
        self.given
            .iter()
            .rev()
            .find(|given| given.key() == key)
            .map(|given| given.origin.clone())
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
