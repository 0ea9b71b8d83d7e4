//! A table of a TOML file -> typed values, each with its line; what is not of
//! the right type becomes a mistake, and so does every key that nobody asked for.

use std::collections::BTreeMap;
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{LONGEST_TEXT, MOST_NAMES};
use crate::mistake::{Mistake, Origin, nearest_of, shortened};
use crate::units::Period;

/// A file that is being read, and what is wrong in it so far.
pub(super) struct Reading<'a> {
    path: &'a Path,
    text: &'a str,
    ends: Vec<usize>,
    pub(super) mistakes: Vec<Mistake>,
}

impl<'a> Reading<'a> {
    pub(super) fn new(path: &'a Path, text: &'a str) -> Reading<'a> {
        Reading {
            path,
            text,
            ends: text.match_indices('\n').map(|(at, _)| at).collect(),
            mistakes: Vec::new(),
        }
    }

    pub(super) fn line_of(&self, at: usize) -> usize {
        1 + self.ends.partition_point(|end| *end < at)
    }

    pub(super) fn mistake(&mut self, line: usize, key: &str, what: String, meant: Option<String>) {
        self.mistakes.push(Mistake {
            origin: Origin::Line(self.path.to_owned(), line),
            key: key.to_owned(),
            what,
            meant,
        });
    }

    fn shown(&self, value: &Spanned<DeValue<'_>>) -> String {
        shortened(self.text.get(value.span()).unwrap_or_default())
    }
}

/// Converts a value, or says what is expected in its place.
type Convert<'c, T> = &'c dyn Fn(&DeValue<'_>) -> Result<T, String>;

/// A table whose keys are taken out one by one.
pub(super) struct Fields<'t> {
    /// How the table is called in mistakes; empty for the file itself.
    pub(super) prefix: String,
    left: BTreeMap<String, (usize, &'t Spanned<DeValue<'t>>)>,
    /// The lines of its keys.
    pub(super) lines: BTreeMap<String, usize>,
}

impl<'t> Fields<'t> {
    /// The keys of `table`; `_` counts as `-` in them.
    pub(super) fn new(
        reading: &mut Reading<'_>,
        prefix: String,
        table: &'t DeTable<'t>,
    ) -> Fields<'t> {
        let mut fields = Fields {
            prefix,
            left: BTreeMap::new(),
            lines: BTreeMap::new(),
        };
        for (key, value) in table {
            let line = reading.line_of(key.span().start);
            let name = key.get_ref().replace('_', "-");
            if fields.left.insert(name.clone(), (line, value)).is_some() {
                let full = fields.full(&name);
                let what = format!("'{full}' is given twice, with - and with _; take one out");
                reading.mistake(line, &full, what, None);
            }
            fields.lines.insert(name, line);
        }
        fields
    }

    /// A key's full name.
    pub(super) fn full(&self, key: &str) -> String {
        match self.prefix.as_str() {
            "" => key.to_owned(),
            prefix => format!("{prefix}.{key}"),
        }
    }

    /// A value, not taken out.
    pub(super) fn peek_text(&self, key: &str) -> Option<&str> {
        self.left.get(key)?.1.get_ref().as_str()
    }

    /// Takes a value out as it is.
    pub(super) fn raw(&mut self, key: &str) -> Option<(usize, &'t Spanned<DeValue<'t>>)> {
        self.left.remove(key)
    }

    fn take<T>(
        &mut self,
        reading: &mut Reading<'_>,
        key: &str,
        convert: Convert<'_, T>,
    ) -> Option<T> {
        let (line, value) = self.left.remove(key)?;
        match convert(value.get_ref()) {
            Ok(value) => Some(value),
            Err(expected) => {
                let full = self.full(key);
                let what = format!("'{full}' is {}; {expected}", reading.shown(value));
                reading.mistake(line, &full, what, None);
                None
            }
        }
    }

    pub(super) fn text(&mut self, reading: &mut Reading<'_>, key: &str) -> Option<String> {
        self.take(reading, key, &text_of)
    }

    pub(super) fn period(&mut self, reading: &mut Reading<'_>, key: &str) -> Option<Period> {
        self.take(reading, key, &|value| {
            let expected = "expected a duration like 10s or 2m".to_owned();
            let text = value.as_str().ok_or_else(|| expected.clone())?;
            text.parse().map_err(|_| expected)
        })
    }

    pub(super) fn truth(&mut self, reading: &mut Reading<'_>, key: &str) -> Option<bool> {
        self.take(reading, key, &|value| match value {
            DeValue::Boolean(truth) => Ok(*truth),
            _ => Err("expected true or false".to_owned()),
        })
    }

    pub(super) fn number(&mut self, reading: &mut Reading<'_>, key: &str) -> Option<u8> {
        self.take(reading, key, &|value| {
            whole(value)
                .and_then(|number| u8::try_from(number).ok())
                .ok_or_else(|| "expected a whole number from 0 to 255".to_owned())
        })
    }

    /// A point: newest, or a number.
    pub(super) fn point(
        &mut self,
        reading: &mut Reading<'_>,
        key: &str,
    ) -> Option<super::PointChoice> {
        self.take(reading, key, &|value| match value.as_str() {
            Some("newest") => Ok(super::PointChoice::Newest),
            Some(_) => Err("expected newest, or a point's number without quotes".to_owned()),
            None => whole(value)
                .filter(|number| *number > 0)
                .map(super::PointChoice::Number)
                .ok_or_else(|| "expected newest, or a point's number".to_owned()),
        })
    }

    pub(super) fn texts(&mut self, reading: &mut Reading<'_>, key: &str) -> Option<Vec<String>> {
        self.take(reading, key, &texts_of)
    }

    pub(super) fn choice<T: Copy>(
        &mut self,
        reading: &mut Reading<'_>,
        key: &str,
        words: &[(&'static str, T)],
    ) -> Option<T> {
        self.take(reading, key, &|value| chosen(value, words))
    }

    /// A list of words.
    pub(super) fn choices<T: Copy>(
        &mut self,
        reading: &mut Reading<'_>,
        key: &str,
        words: &[(&'static str, T)],
    ) -> Option<Vec<T>> {
        self.take(reading, key, &|value| match value {
            DeValue::Array(items) if items.len() <= MOST_NAMES => items
                .iter()
                .map(|item| chosen(item.get_ref(), words))
                .collect(),
            _ => Err(format!(
                "expected a list, like [\"{}\"]",
                words.first().map_or("", |w| w.0)
            )),
        })
    }

    /// A table of texts.
    pub(super) fn text_table(
        &mut self,
        reading: &mut Reading<'_>,
        key: &str,
    ) -> Option<BTreeMap<String, String>> {
        self.table(reading, key, &text_of)
    }

    /// A table of lists.
    pub(super) fn list_table(
        &mut self,
        reading: &mut Reading<'_>,
        key: &str,
    ) -> Option<BTreeMap<String, Vec<String>>> {
        self.table(reading, key, &texts_of)
    }

    fn table<T>(
        &mut self,
        reading: &mut Reading<'_>,
        key: &str,
        convert: Convert<'_, T>,
    ) -> Option<BTreeMap<String, T>> {
        let (line, value) = self.left.remove(key)?;
        let full = self.full(key);
        let table = match value.get_ref() {
            DeValue::Table(table) if table.len() <= MOST_NAMES => table,
            _ => {
                let what = format!("'{full}' is {}; expected a table", reading.shown(value));
                reading.mistake(line, &full, what, None);
                return None;
            }
        };
        let mut found = BTreeMap::new();
        for (name, value) in table {
            let line = reading.line_of(name.span().start);
            let (name, full) = (
                name.get_ref().to_string(),
                format!("{full}.{}", name.get_ref()),
            );
            self.lines.insert(format!("{key}.{name}"), line);
            match convert(value.get_ref()) {
                Ok(value) => {
                    found.insert(name, value);
                }
                Err(expected) => {
                    let what = format!("'{full}' is {}; {expected}", reading.shown(value));
                    reading.mistake(line, &full, what, None);
                }
            }
        }
        Some(found)
    }

    /// Whatever is left is a mistake. `known` are the keys that may be here;
    /// `elsewhere` says of a key where it would be right.
    pub(super) fn finish(
        self,
        reading: &mut Reading<'_>,
        known: &[&str],
        elsewhere: &dyn Fn(&str) -> Option<String>,
    ) -> BTreeMap<String, usize> {
        for (key, (line, _)) in &self.left {
            let full = self.full(key);
            let near = nearest_of(known.iter().copied(), key);
            let hint = match (elsewhere(key), near) {
                (Some(elsewhere), _) => elsewhere,
                (None, Some(near)) => format!("did you mean '{near}'?"),
                (None, None) => format!("known are {}", known.join(", ")),
            };
            let meant = near.map(|near| self.full(near));
            reading.mistake(*line, &full, format!("unknown key '{full}'; {hint}"), meant);
        }
        self.lines
    }
}

/// A word of a list, or which there are.
pub(super) fn chosen<T: Copy>(
    value: &DeValue<'_>,
    words: &[(&'static str, T)],
) -> Result<T, String> {
    let given = value.as_str().unwrap_or_default();
    if let Some((_, choice)) = words.iter().find(|(word, _)| *word == given) {
        return Ok(*choice);
    }
    let names = || words.iter().map(|(word, _)| *word);
    let one_of = format!("expected one of {}", names().collect::<Vec<_>>().join(", "));
    Err(match nearest_of(names(), &given.replace('_', "-")) {
        Some(near) => format!("{one_of}; did you mean '{near}'?"),
        None => one_of,
    })
}

fn text_of(value: &DeValue<'_>) -> Result<String, String> {
    match value.as_str() {
        Some(text) if text.len() <= LONGEST_TEXT => Ok(text.to_owned()),
        Some(_) => Err(format!("expected at most {LONGEST_TEXT} bytes of text")),
        None => Err("expected a text in quotes".to_owned()),
    }
}

fn texts_of(value: &DeValue<'_>) -> Result<Vec<String>, String> {
    match value {
        DeValue::Array(items) if items.len() <= MOST_NAMES => {
            items.iter().map(|item| text_of(item.get_ref())).collect()
        }
        DeValue::Array(_) => Err(format!("expected a list of at most {MOST_NAMES}")),
        _ => Err("expected a list, like [\"one\", \"two\"]".to_owned()),
    }
}

fn whole(value: &DeValue<'_>) -> Option<u64> {
    match value {
        DeValue::Integer(digits) => u64::from_str_radix(digits.as_str(), digits.radix()).ok(),
        _ => None,
    }
}
