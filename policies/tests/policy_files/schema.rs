//! The schema for editors.

use super::*;

/// What the schema says of a value, checked as far as schemas of ours go. A word
/// that is not known here fails, so that nothing passes unchecked.
fn conforms(root: &Value, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
    let Some(schema) = schema.as_object() else {
        return if schema == &Value::Bool(false) {
            Err(format!("{at} is not allowed"))
        } else {
            Ok(())
        };
    };
    let each = |schemas: &Value| {
        let schemas = schemas.as_array().unwrap().clone();
        schemas
            .into_iter()
            .map(|schema| conforms(root, &schema, value, at))
            .collect::<Vec<_>>()
    };
    for (word, says) in schema {
        let holds = match word.as_str() {
            "$ref" => {
                let pointer = says.as_str().unwrap().strip_prefix('#').unwrap();
                conforms(root, root.pointer(pointer).unwrap(), value, at)?;
                true
            }
            "type" => {
                let of = |kind: &Value| match kind.as_str().unwrap() {
                    "object" => value.is_object(),
                    "array" => value.is_array(),
                    "string" => value.is_string(),
                    "integer" => value.is_i64() || value.is_u64(),
                    "boolean" => value.is_boolean(),
                    "null" => value.is_null(),
                    other => panic!("type {other}"),
                };
                says.as_array()
                    .map_or_else(|| of(says), |kinds| kinds.iter().any(of))
            }
            "properties" => {
                for (key, inner) in says.as_object().unwrap() {
                    if let Some(value) = value.get(key) {
                        conforms(root, inner, value, &format!("{at}.{key}"))?;
                    }
                }
                true
            }
            "additionalProperties" => {
                let known = schema.get("properties").and_then(Value::as_object);
                for (key, value) in value.as_object().into_iter().flatten() {
                    if !known.is_some_and(|known| known.contains_key(key)) {
                        conforms(root, says, value, &format!("{at}.{key}"))?;
                    }
                }
                true
            }
            "items" => {
                for value in value.as_array().into_iter().flatten() {
                    conforms(root, says, value, at)?;
                }
                true
            }
            "enum" => says.as_array().unwrap().contains(value),
            "const" => says == value,
            "minimum" => value
                .as_f64()
                .is_none_or(|value| value >= says.as_f64().unwrap()),
            "maximum" => value
                .as_f64()
                .is_none_or(|value| value <= says.as_f64().unwrap()),
            "anyOf" | "oneOf" => each(says).iter().any(Result::is_ok),
            "allOf" => each(says).iter().all(Result::is_ok),
            // Words for people, and patterns, which are judged beside the types themselves below.
            "title" | "description" | "default" | "format" | "$schema" | "$defs" | "pattern" => {
                true
            }
            other => panic!("the schema says '{other}', which is not checked"),
        };
        if !holds {
            return Err(format!("{at}: {value} against {word} {says}"));
        }
    }
    Ok(())
}

#[test]
fn the_examples_are_sound_and_conform_to_the_schema() {
    let schema = serde_json::to_value(PolicyFiles::schema()).unwrap();
    for path in examples() {
        let loaded = PolicyFiles::read(&path).unwrap_or_else(|error| panic!("{error}"));
        assert!(!loaded.value.groups.is_empty() && !loaded.value.policies.is_empty());
        for group in loaded.value.groups.keys() {
            assert!(show(&loaded, group).unwrap().len() > 20);
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(
            text.starts_with("# "),
            "{} says nothing of itself",
            path.display()
        );
        let value = serde_json::to_value(text.parse::<toml::Table>().unwrap()).unwrap();
        conforms(&schema, &schema, &value, "").unwrap();
        // As written back, all defaults spelled out, it conforms and says the same.
        let spelled = toml::to_string(&loaded.value).unwrap();
        let again = read(&[("x.toml", &spelled)], &[]).unwrap();
        assert_eq!(again.value, loaded.value);
    }
    for wrong in [
        r#"{"polices": {}}"#,
        r#"{"policies": {"a": {"share": 300}}}"#,
        r#"{"policies": {"a": {"mode": "disk"}}}"#,
        r#"{"groups": {"a": {"guests": ["b"]}}}"#,
        r#"{"alerts": {"rpo_warning": -1}}"#,
    ] {
        let value = serde_json::from_str(wrong).unwrap();
        assert!(conforms(&schema, &schema, &value, "").is_err(), "{wrong}");
    }
}

#[test]
fn the_schema_describes_every_key() {
    let schema = serde_json::to_value(PolicyFiles::schema()).unwrap();
    fn at<'a>(root: &'a Value, mut schema: &'a Value) -> &'a Value {
        while let Some(pointer) = schema.get("$ref").and_then(Value::as_str) {
            schema = root.pointer(pointer.strip_prefix('#').unwrap()).unwrap();
        }
        schema
    }
    for key in Shape::of::<PolicyFiles>().keys() {
        let mut place = &schema;
        for part in key.split('.') {
            place = at(&schema, place);
            let inner = if part == "*" {
                place.get("additionalProperties")
            } else {
                place.pointer(&format!("/properties/{part}"))
            };
            place = inner.unwrap_or_else(|| panic!("the schema lacks {key}"));
            assert!(
                part == "*" || place.get("description").is_some(),
                "{key} is not described"
            );
        }
    }
}
