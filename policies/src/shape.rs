//! The keys of a configuration, taken from the types that hold it.
//!
//! A derived `Deserialize` tells its deserializer the names of its fields. The
//! probe here listens to that and learns every key of a type without a second
//! list to keep in step: one descent for each key, which ends as soon as the
//! type has said what it wants there.

use std::cell::RefCell;
use std::fmt;

use serde::de::{
    self, DeserializeOwned, DeserializeSeed, IntoDeserializer, Visitor, value::StrDeserializer,
};

/// What a type expects at one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shape {
    /// Named keys.
    Table(Vec<(&'static str, Shape)>),
    /// Keys of the operator's choice, each with the same shape.
    Map(Box<Shape>),
    /// A list of values.
    List,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// One value.
    Value,
}

/// Deepest nesting of tables: ends a type that holds itself.
const DEEPEST: usize = 10;
/// Stands for a key of the operator's choice in [`Shape::keys`].
pub const ANY_KEY: &str = "*";

impl Shape {
    /// The shape of `T`, whose fields must all have defaults.
    pub fn of<T: DeserializeOwned>() -> Shape {
        shape_at::<T>(&mut Vec::new())
    }

    /// Every key, dotted, tables before what is in them.
    pub fn keys(&self) -> Vec<String> {
        let mut keys = Vec::new();
        self.collect("", &mut keys);
        keys
    }

    /// What is expected under `key`, if this has such a key.
    pub fn child(&self, key: &str) -> Option<&Shape> {
        match self {
            Shape::Table(fields) => fields
                .iter()
                .find(|(name, _)| *name == key)
                .map(|(_, shape)| shape),
            Shape::Map(inner) => Some(inner),
            Shape::List | Shape::Choice(_) | Shape::Value => None,
        }
    }

    fn collect(&self, prefix: &str, keys: &mut Vec<String>) {
        let mut add = |name: &str, shape: &Shape| {
            let key = if prefix.is_empty() {
                name.to_owned()
            } else {
                format!("{prefix}.{name}")
            };
            keys.push(key.clone());
            shape.collect(&key, keys);
        };
        match self {
            Shape::Table(fields) => fields.iter().for_each(|(name, shape)| add(name, shape)),
            Shape::Map(inner) => add(ANY_KEY, inner),
            Shape::List | Shape::Choice(_) | Shape::Value => {}
        }
    }
}

fn shape_at<T: DeserializeOwned>(path: &mut Vec<&'static str>) -> Shape {
    let found = RefCell::new(None);
    // Always an error: the probe stops where the path ends.
    let _ = T::deserialize(Probe {
        path,
        found: &found,
    });
    let below = |path: &mut Vec<&'static str>, key| {
        path.push(key);
        let shape = if path.len() < DEEPEST {
            shape_at::<T>(path)
        } else {
            Shape::Value
        };
        path.pop();
        shape
    };
    match found.into_inner() {
        Some(Found::Fields(names)) => Shape::Table(
            names
                .iter()
                .map(|name| (*name, below(path, *name)))
                .collect(),
        ),
        Some(Found::Map) => Shape::Map(Box::new(below(path, ANY_KEY))),
        Some(Found::List) => Shape::List,
        Some(Found::Choice(words)) => Shape::Choice(words),
        Some(Found::Value) | None => Shape::Value,
    }
}

enum Found {
    Fields(&'static [&'static str]),
    Map,
    List,
    Choice(&'static [&'static str]),
    Value,
}

struct Probe<'a> {
    path: &'a [&'static str],
    found: &'a RefCell<Option<Found>>,
}

/// Ends a descent; carries nothing, as what was learnt is in the cell.
#[derive(Debug)]
struct Stop;

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the probe has seen enough")
    }
}

impl std::error::Error for Stop {}

impl de::Error for Stop {
    fn custom<T: fmt::Display>(_: T) -> Stop {
        Stop
    }
}

impl<'a> Probe<'a> {
    fn descend<'de, V: Visitor<'de>>(self, found: Found, visitor: V) -> Result<V::Value, Stop> {
        match self.path.split_first() {
            Some((key, path)) => visitor.visit_map(OneKey {
                key: Some(key),
                value: Probe {
                    path,
                    found: self.found,
                },
            }),
            None => self.stop(found),
        }
    }

    fn stop<T>(self, found: Found) -> Result<T, Stop> {
        if self.path.is_empty() {
            self.found.replace(Some(found));
        }
        Err(Stop)
    }
}

impl<'de> de::Deserializer<'de> for Probe<'_> {
    type Error = Stop;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Stop> {
        self.stop(Found::Value)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Stop> {
        self.descend(Found::Fields(fields), visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        self.descend(Found::Map, visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Stop> {
        self.stop(Found::Choice(variants))
    }

    fn deserialize_seq<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Stop> {
        self.stop(Found::List)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Stop> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Stop> {
        visitor.visit_newtype_struct(self)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
        unit unit_struct tuple tuple_struct identifier ignored_any
    }
}

struct OneKey<'a> {
    key: Option<&'static str>,
    value: Probe<'a>,
}

impl<'de> de::MapAccess<'de> for OneKey<'_> {
    type Error = Stop;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Stop> {
        let Some(key) = self.key.take() else {
            return Ok(None);
        };
        let key: StrDeserializer<'_, Stop> = key.into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Stop> {
        seed.deserialize(Probe {
            path: self.value.path,
            found: self.value.found,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::collections::BTreeMap;

    #[derive(Deserialize, Default)]
    #[serde(default, deny_unknown_fields)]
    struct Outer {
        _plain: u32,
        #[serde(rename = "renamed")]
        _other: Option<Inner>,
        _open: BTreeMap<String, Inner>,
        _many: Vec<String>,
        _word: crate::site::LogFormat,
    }

    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Inner {
        _text: crate::units::Period,
    }

    #[test]
    fn keys_are_those_of_the_type() {
        let keys = Shape::of::<Outer>().keys();
        assert_eq!(
            keys,
            [
                "_plain",
                "renamed",
                "renamed._text",
                "_open",
                "_open.*",
                "_open.*._text",
                "_many",
                "_word"
            ]
        );
        assert_eq!(Shape::of::<Outer>().child("_many"), Some(&Shape::List));
        assert_eq!(
            Shape::of::<Outer>().child("_word"),
            Some(&Shape::Choice(&["text", "json"]))
        );
    }

    #[test]
    fn a_type_that_holds_itself_ends() {
        #[derive(Deserialize, Default)]
        #[serde(default)]
        struct Endless {
            _again: Option<Box<Endless>>,
        }
        assert_eq!(Shape::of::<Endless>().keys().len(), DEEPEST);
    }
}
