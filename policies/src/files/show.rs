//! What is in force for a group, and where each value came from.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::load::{Loaded, Origin};
use crate::mistake::nearest_of;

use super::PolicyFiles;

/// A value in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shown {
    /// Its dotted key.
    pub key: String,
    /// The value, as it would be written in a file.
    pub value: String,
    /// `file:line`, an environment variable, or `default`.
    pub from: String,
}

/// No group has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no group is called '{name}'; {hint}")]
pub struct UnknownGroup {
    name: String,
    hint: String,
}

/// All that is in force for a group: its own keys, its policy, its site, the alerts.
///
/// # Errors
/// There is no such group.
pub fn show(loaded: &Loaded<PolicyFiles>, name: &str) -> Result<Vec<Shown>, UnknownGroup> {
    let files = &loaded.value;
    let Some(group) = files.groups.get(name) else {
        let known = || files.groups.keys().map(String::as_str);
        let hint = match nearest_of(known(), name) {
            Some(near) => format!("did you mean '{near}'?"),
            None => format!(
                "there are {}",
                known().take(10).collect::<Vec<_>>().join(", ")
            ),
        };
        return Err(UnknownGroup {
            name: name.to_owned(),
            hint,
        });
    };
    let mut shown = Vec::new();
    let mut add = |path: [&str; 2], value: Result<toml::Value, toml::ser::Error>| {
        let prefix = path.join(".");
        if let Ok(value) = value {
            leaves(loaded, prefix.trim_end_matches('.'), &value, &mut shown);
        }
    };
    add(["groups", name], toml::Value::try_from(group));
    if let Some(policy) = files.policies.get(&group.policy) {
        add(["policies", &group.policy], toml::Value::try_from(policy));
    }
    if let Some(site) = files.sites.get(&group.peer) {
        add(["sites", &group.peer], toml::Value::try_from(site));
    }
    add(["alerts", ""], toml::Value::try_from(&files.alerts));
    Ok(shown)
}

fn leaves(loaded: &Loaded<PolicyFiles>, key: &str, value: &toml::Value, shown: &mut Vec<Shown>) {
    if let toml::Value::Table(table) = value
        && !table.is_empty()
    {
        for (name, value) in table {
            leaves(loaded, &format!("{key}.{name}"), value, shown);
        }
        return;
    }
    let from = match loaded.origins.of_key(key) {
        Some(Origin::Variable(name)) => name.clone(),
        Some(origin) => origin.to_string(),
        None => "default".to_owned(),
    };
    shown.push(Shown {
        key: key.to_owned(),
        value: value.to_string(),
        from,
    });
}

/// As text in columns.
pub fn text(shown: &[Shown]) -> String {
    let width = |of: fn(&Shown) -> &str| {
        let widths = shown.iter().map(|shown| of(shown).chars().count());
        widths.max().unwrap_or(0).min(48)
    };
    let (keys, values) = (width(|shown| &shown.key), width(|shown| &shown.value));
    let mut text = String::new();
    for Shown { key, value, from } in shown {
        let _ = writeln!(text, "{key:keys$} = {value:values$}  # {from}");
    }
    text
}
