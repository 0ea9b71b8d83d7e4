//! QEMU's command line, taken apart and put together again.
//!
//! QEMU's options are a name and at most one value; a value is plain text, a
//! list `first,key=value,…` in which a comma is doubled, or JSON. What is not
//! understood is kept as it was.

use serde::{Deserialize, Serialize};

/// Longest command line taken; Linux itself ends at 2 MiB by default.
pub const MAX_COMMAND_LINE: usize = 4 << 20;

/// Most keys of one option that are taken apart. QEMU's own have some dozen.
const MOST_KEYS: usize = 4096;

/// Most bytes that the keys of one option take, flattened: in JSON each carries the names
/// of all that it is in.
pub(super) const MOST_FLAT: usize = 1 << 20;

/// Options without a value. Every other option takes one.
const FLAGS: &[&str] = &[
    "S",
    "alt-grab",
    "ctrl-grab",
    "curses",
    "daemonize",
    "enable-fips",
    "enable-kvm",
    "enable-sync-profile",
    "full-screen",
    "gtk",
    "h",
    "help",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-hpet",
    "no-kvm",
    "no-quit",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nographic",
    "old-param",
    "only-migratable",
    "preconfig",
    "s",
    "sdl",
    "semihosting",
    "singlestep",
    "snapshot",
    "usb",
    "version",
    "win2k-hack",
    "xen-attach",
    "portrait",
    "no-frame",
    "nodefconfig",
    "one-insn-per-tb",
    "xen-domid-restrict",
];

/// One option of a QEMU command line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Argument {
    /// Its name without dashes; empty for a disk image named without an option.
    pub option: String,
    /// Its value, if it takes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
}

impl Argument {
    /// An option with a value.
    pub fn new(option: &str, value: impl Into<String>) -> Self {
        Argument {
            option: option.to_owned(),
            value: Some(value.into()),
        }
    }

    /// The value, empty if there is none.
    pub fn text(&self) -> &str {
        self.value.as_deref().unwrap_or_default()
    }

    /// The value as keys, with `implied` as the name of a first key that has none.
    pub fn keys(&self, implied: &str) -> Keys {
        Keys::parse(self.text(), implied)
    }
}

/// Can this value of an option be taken apart, or has it more keys than any honest one?
pub(super) fn is_workable(text: &str) -> bool {
    text.is_empty() || text == "{}" || !Keys::parse(text, "").pairs.is_empty()
}

/// Splits the bytes of `/proc/PID/cmdline` (arguments ended by NUL).
pub fn split_command_line(bytes: &[u8]) -> Vec<String> {
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    bytes
        .split(|&byte| byte == 0)
        .map(|argument| String::from_utf8_lossy(argument).into_owned())
        .collect()
}

/// Groups arguments (without the program's name) into options.
pub fn parse(arguments: &[String]) -> Vec<Argument> {
    let mut options = Vec::new();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let name = argument
            .strip_prefix("--")
            .or_else(|| argument.strip_prefix('-'));
        options.push(match name {
            None | Some("") => Argument::new("", argument.clone()),
            // QEMU takes two dashes off, at most; no option of its is called so.
            Some(name) if name.starts_with('-') => Argument::new("", argument.clone()),
            Some(name) if FLAGS.contains(&name) => Argument {
                option: name.to_owned(),
                value: None,
            },
            Some(name) => Argument {
                option: name.to_owned(),
                value: rest.next().cloned(),
            },
        });
    }
    options
}

/// The arguments that [`parse`] would make these options of.
pub fn unparse(options: &[Argument]) -> Vec<String> {
    let mut arguments = Vec::new();
    for Argument { option, value } in options {
        if !option.is_empty() {
            arguments.push(format!("-{option}"));
        }
        arguments.extend(value.clone());
    }
    arguments
}

/// The keys of one option's value. JSON is flattened to QEMU's dotted names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Keys {
    pairs: Vec<(String, String)>,
    json: Option<serde_json::Value>,
}

impl Keys {
    /// Takes a value apart. A first word without `=` is the value of `implied`;
    /// later ones are switches: `on`, or `off` after a leading `no`. One of
    /// absurdly many keys has none: see [`is_workable`].
    pub fn parse(text: &str, implied: &str) -> Self {
        if text.starts_with('{')
            && let Ok(json) = serde_json::from_str::<serde_json::Value>(text)
        {
            let mut flat = Flat::default();
            flat.add("", &json);
            return match flat.within_limits() {
                true => Keys {
                    pairs: flat.pairs,
                    json: Some(json),
                },
                false => Keys::default(),
            };
        }
        if text.bytes().filter(|byte| *byte == b',').count() >= MOST_KEYS {
            return Keys::default();
        }
        let words = split_commas(text);
        let pair = |(at, word): (usize, String)| match word.split_once('=') {
            Some((key, value)) => (key.to_owned(), value.to_owned()),
            None if at == 0 => (implied.to_owned(), word),
            None => match word.strip_prefix("no") {
                Some(key) if key == "wait" || key == "delay" => (key.to_owned(), "off".to_owned()),
                _ => (word, "on".to_owned()),
            },
        };
        Keys {
            pairs: words.into_iter().enumerate().map(pair).collect(),
            json: None,
        }
    }

    /// The last value of a key: QEMU lets later ones win.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.pairs
            .iter()
            .rev()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    }

    /// Is this switch on?
    pub fn on(&self, key: &str) -> bool {
        matches!(self.value(key), Some("on" | "yes" | "true"))
    }

    /// All keys and values in order.
    pub fn pairs(&self) -> &[(String, String)] {
        &self.pairs
    }

    /// Gives every occurrence of a key a new value; adds it when there is none.
    pub fn set(&mut self, key: &str, value: &str) {
        let mut found = false;
        for pair in self.pairs.iter_mut().filter(|(name, _)| name == key) {
            value.clone_into(&mut pair.1);
            found = true;
        }
        if !found {
            self.pairs.push((key.to_owned(), value.to_owned()));
        }
        if let Some(json) = &mut self.json {
            set_in(json, key, value);
        }
    }

    /// Removes a key.
    pub fn remove(&mut self, key: &str) {
        self.pairs.retain(|(name, _)| name != key);
        if let Some(serde_json::Value::Object(map)) = &mut self.json {
            map.remove(key);
        }
    }

    /// The value as text again: JSON if it was, and `first` written without its name.
    pub fn text(&self, implied: &str) -> String {
        if let Some(json) = &self.json {
            return json.to_string();
        }
        let mut text = String::new();
        for (at, (key, value)) in self.pairs.iter().enumerate() {
            let value = value.replace(',', ",,");
            if at > 0 {
                text.push(',');
            }
            // Without its name a value that has a `=` would be read as a key.
            if at == 0 && key == implied && (implied.is_empty() || !value.contains('=')) {
                text += &value;
            } else {
                text += &format!("{key}={value}");
            }
        }
        text
    }
}

/// Splits at commas; a doubled comma is one comma of the word.
fn split_commas(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            ',' if letters.peek() == Some(&',') => {
                letters.next();
                word.push(',');
            }
            ',' => words.push(std::mem::take(&mut word)),
            _ => word.push(letter),
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// JSON as QEMU's dotted names.
#[derive(Default)]
struct Flat {
    pairs: Vec<(String, String)>,
    /// Of all names that were made, and of all values.
    bytes: usize,
}

impl Flat {
    fn within_limits(&self) -> bool {
        self.pairs.len() <= MOST_KEYS && self.bytes <= MOST_FLAT
    }

    fn add(&mut self, prefix: &str, json: &serde_json::Value) {
        use serde_json::Value;
        let name = |key: &str| match prefix.is_empty() {
            true => key.to_owned(),
            false => format!("{prefix}.{key}"),
        };
        let value = match json {
            // Long names of many parts, also empty ones: the product may be any size, so none
            // is made beyond the limits.
            Value::Object(map) => {
                for (key, value) in map {
                    self.bytes += prefix.len() + key.len();
                    if self.within_limits() {
                        self.add(&name(key), value);
                    }
                }
                return;
            }
            Value::Array(list) => {
                for (at, value) in list.iter().enumerate() {
                    self.bytes += prefix.len() + 1;
                    if self.within_limits() {
                        self.add(&name(&at.to_string()), value);
                    }
                }
                return;
            }
            Value::Bool(on) => if *on { "on" } else { "off" }.to_owned(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        self.bytes += value.len();
        self.pairs.push((prefix.to_owned(), value));
    }
}

fn set_in(json: &mut serde_json::Value, key: &str, value: &str) {
    let pointer = format!("/{}", key.replace('.', "/"));
    if let Some(place) = json.pointer_mut(&pointer) {
        *place = value.into();
    } else if let serde_json::Value::Object(map) = json {
        map.insert(key.to_owned(), value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(line: &[&str]) -> Vec<String> {
        line.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn more_than_two_dashes_are_no_option() {
        let line = words(&["---S", "-m", "1", "------"]);
        let options = parse(&line);
        assert_eq!(options[0], Argument::new("", "---S"));
        assert_eq!(unparse(&options), line);
    }

    #[test]
    fn options_are_grouped() {
        let line = words(&[
            "-S",
            "--machine",
            "q35",
            "-nodefaults",
            "disk.img",
            "-m",
            "512",
        ]);
        let options = parse(&line);
        assert_eq!(
            options
                .iter()
                .map(|o| o.option.as_str())
                .collect::<Vec<_>>(),
            ["S", "machine", "nodefaults", "", "m"]
        );
        assert_eq!(
            unparse(&options),
            words(&[
                "-S",
                "-machine",
                "q35",
                "-nodefaults",
                "disk.img",
                "-m",
                "512"
            ])
        );
    }

    #[test]
    fn keys_are_understood() {
        let keys = Keys::parse("unix:/tmp/a,,b,server,nowait,x=1,x=2", "addr");
        assert_eq!(keys.value("addr"), Some("unix:/tmp/a,b"));
        assert!(keys.on("server"));
        assert_eq!(keys.value("wait"), Some("off"));
        assert_eq!(keys.value("x"), Some("2"));
        let json = Keys::parse(
            r#"{"driver":"qcow2","file":{"filename":"/a,b"},"read-only":true}"#,
            "driver",
        );
        assert_eq!(json.value("file.filename"), Some("/a,b"));
        assert!(json.on("read-only"));
    }

    #[test]
    fn json_stays_json_when_a_value_is_set() {
        let mut keys = Keys::parse(
            r#"{"qom-type":"memory-backend-file","mem-path":"/x"}"#,
            "qom-type",
        );
        keys.set("mem-path", "/y\"z");
        let text = keys.text("qom-type");
        assert_eq!(
            Keys::parse(&text, "qom-type").value("mem-path"),
            Some("/y\"z")
        );
        assert!(text.starts_with('{'));
    }

    /// A megabyte of JSON from a peer, which would flatten to gigabytes.
    #[test]
    fn absurdly_many_keys_are_none() {
        let long = "k".repeat(500_000);
        let wide = format!("{{\"{long}\":[{}]}}", vec!["0"; 200_000].join(","));
        let empty = format!("{{\"{long}\":[{}]}}", vec!["[]"; 200_000].join(","));
        let many = "a={qmp},".repeat(100_000);
        for text in [wide, empty, many] {
            assert!(!is_workable(&text));
            assert_eq!(Keys::parse(&text, ""), Keys::default());
        }
        for text in ["", "a", "{\"a\":{\"b\":[1,true]}}", "a=b,c,noc=d"] {
            assert!(is_workable(text), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_value_survives_being_put_together(pairs in prop::collection::vec(("[a-z][a-z.-]{0,8}", "[^\0]{0,12}"), 1..6)) {
            let mut keys = Keys::default();
            for (key, value) in &pairs {
                keys.pairs.push((key.clone(), value.clone()));
            }
            let again = Keys::parse(&keys.text("driver"), "driver");
            prop_assert_eq!(again.pairs, keys.pairs);
        }

        #[test]
        fn nothing_makes_it_fail(text in ".{0,200}", bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut keys = Keys::parse(&text, "driver");
            keys.set("a.b", "c");
            keys.remove("d");
            let _ = keys.text("driver");
            let line = split_command_line(&bytes);
            let _ = unparse(&parse(&line));
        }

        #[test]
        fn deep_json_is_refused_not_followed(depth in 1usize..5000) {
            let text = format!("{}1{}", "{\"a\":".repeat(depth), "}".repeat(depth));
            let _ = Keys::parse(&text, "driver").text("driver");
        }
    }
}
