//! The house's own rules: crate edges, which file may name which library, file
//! sizes, `unsafe`, unfinished work, links between pages. What rustc and clippy
//! check is not repeated here.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

#[path = "house/reading.rs"]
mod reading;
#[path = "house/service.rs"]
mod service;

use reading::{anchors, code_of, lines_with, links, without_tests};

/// Crates that stand beside each other: none imports another.
const VALVES: [&str; 3] = ["wan", "storage-sync", "policies"];

/// A library, the only crate that may depend on it, and where its name may appear there.
const CONFINED: [(&str, &str, &[&str]); 6] = [
    ("sled", "storage-sync", &["storage-sync/src/catalogue.rs"]),
    ("quinn", "wan", &["wan/src/link/", "wan/src/link.rs"]),
    ("quinn_proto", "wan", &["wan/src/link/", "wan/src/link.rs"]),
    ("config", "policies", &["policies/src/load.rs"]),
    ("chacha20poly1305", "", &["src/replicate/seed/cipher.rs"]),
    ("aead_stream", "", &["src/replicate/seed/cipher.rs"]),
];

/// Files that may hold `unsafe`: KVM's calls and guest RAM, as the design allows.
const UNSAFE: [&str; 7] = [
    // Gets a vCPU out of KVM_RUN: a flag in KVM's mapping, a signal to a thread.
    "src/guest/kvm/place.rs",
    // Gives a mapping of guest memory to KVM.
    "src/guest/kvm/dirty.rs",
    // XSAVE areas, whose size KVM's calls trust.
    "src/guest/kvm/vcpu.rs",
    // The bytes between two labels of the test guest, which is assembly.
    "src/guest/kvm/proof/mod.rs",
    // The benchmark's emulated link: TUN devices in two network namespaces.
    "benches/wan/wanlink/src/main.rs",
    // The simulation's clock and randomness, which libc is asked for.
    "tests/simulate/run/system.rs",
    // And what it is told to sync.
    "tests/simulate/run/files.rs",
];

/// Longest source file, in lines.
const LONGEST_FILE: usize = 500;

fn root() -> PathBuf {
    PathBuf::from(
        std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").into()),
    )
}

/// Every file of the project with one of these endings, by its path from the
/// root, with its text. What is built, fetched or hidden is left out.
fn files(endings: &[&str]) -> Vec<(String, String)> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let name = entry.file_name().to_string_lossy().into_owned();
            let kind = entry.file_type().unwrap();
            if kind.is_dir() && name != "target" && !name.starts_with('.') {
                walk(&entry.path(), found);
            } else if kind.is_file() {
                found.push(entry.path());
            }
        }
    }
    let (root, mut found) = (root(), Vec::new());
    walk(&root, &mut found);
    found.sort();
    let wanted = found.into_iter().filter(|path| {
        let name = path.file_name().unwrap().to_string_lossy();
        endings.iter().any(|ending| name.ends_with(ending))
    });
    let texts = wanted.map(|path| {
        let text = String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned();
        (
            path.strip_prefix(&root)
                .unwrap()
                .to_string_lossy()
                .into_owned(),
            text,
        )
    });
    texts.collect()
}

/// Source files that end up in the product.
fn sources() -> Vec<(String, String)> {
    let in_src = |path: &str| {
        path.starts_with("src/")
            || VALVES
                .iter()
                .any(|of| path.starts_with(&format!("{of}/src/")))
    };
    let all: Vec<_> = files(&[".rs"])
        .into_iter()
        .filter(|(path, _)| in_src(path))
        .collect();
    assert!(all.len() >= 10, "the sources were not found: {}", all.len());
    all
}

/// Fails with all complaints, each on its line.
fn none(rule: &str, complaints: Vec<String>) {
    assert!(complaints.is_empty(), "{rule}:\n{}", complaints.join("\n"));
}

/// Names of a crate's dependencies of all kinds, with `_` for `-`.
fn dependencies(of: &str) -> BTreeSet<String> {
    let manifest = fs::read_to_string(root().join(of).join("Cargo.toml")).unwrap();
    let (mut within, mut found) = (false, BTreeSet::new());
    for line in manifest.lines().map(str::trim) {
        if let Some(table) = line.strip_prefix('[') {
            let table = table.trim_end_matches(']');
            within = table.ends_with("dependencies") && !table.starts_with("workspace");
            let one = table
                .split_once("dependencies.")
                .filter(|_| !table.starts_with("workspace"));
            found.extend(one.map(|(_, name)| name.replace('-', "_")));
        } else if within && !line.starts_with('#') && line.contains('=') {
            let name = line.split(['=', '.', ' ']).next().unwrap();
            found.insert(name.trim_matches('"').replace('-', "_"));
        }
    }
    assert!(!found.is_empty(), "{of} has no dependencies at all?");
    found
}

#[test]
fn crates_are_one_way_valves() {
    let mut wrong = Vec::new();
    for of in VALVES {
        let ours = dependencies(of)
            .into_iter()
            .filter(|name| name.starts_with("farhaven"));
        wrong.extend(ours.map(|name| format!("{of}/Cargo.toml depends on {name}")));
    }
    none(
        "wan, storage-sync and policies import nothing of each other",
        wrong,
    );
    let joined = dependencies("");
    assert!(
        VALVES
            .iter()
            .all(|of| joined.contains(&format!("farhaven_{}", of.replace('-', "_")))),
        "{joined:?}"
    );
}

#[test]
fn libraries_are_named_in_one_place() {
    let mut wrong = Vec::new();
    for of in VALVES.into_iter().chain([""]) {
        let dependencies = dependencies(of);
        for (library, home, _) in CONFINED {
            if of != home && dependencies.contains(library) {
                wrong.push(format!(
                    "{}/Cargo.toml depends on {library}, which is for {home} alone",
                    if of.is_empty() { "." } else { of }
                ));
            }
        }
    }
    for (path, text) in sources() {
        let code = code_of(&text);
        for (library, home, places) in CONFINED {
            if !path.starts_with(home) || places.iter().any(|place| path.starts_with(place)) {
                continue;
            }
            for line in lines_with(&code, library) {
                let text = code.lines().nth(line - 1).unwrap_or_default();
                if text.contains(&format!("{library}::")) || text.trim_start().starts_with("use ") {
                    wrong.push(format!(
                        "{path}:{line} names {library}; only {} may",
                        places.join(" or ")
                    ));
                }
            }
        }
    }
    none(
        "a library that may be exchanged one day is named in one place",
        wrong,
    );
}

#[test]
fn files_are_short_enough_to_read() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let lines = text.lines().count();
        if lines > LONGEST_FILE {
            wrong.push(format!(
                "{path} has {lines} lines; split it where it has a second reason to change"
            ));
        }
    }
    none(
        &format!("source files have at most {LONGEST_FILE} lines"),
        wrong,
    );
}

#[test]
fn nothing_is_unwrapped_outside_tests() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        if path.ends_with("/tests.rs") || path.contains("/tests/") {
            continue;
        }
        let code = without_tests(&code_of(&text));
        for (index, line) in code.lines().enumerate() {
            if line.contains(concat!(".unw", "rap()")) {
                wrong.push(format!(
                    "{path}:{}: return an error, or say with expect() why it cannot be",
                    index + 1
                ));
            }
        }
    }
    none("no input panics", wrong);
}

#[test]
fn unsafe_code_stands_where_it_may() {
    let mut wrong = Vec::new();
    for (path, text) in files(&[".rs"]) {
        let code = code_of(&text);
        if !UNSAFE.iter().any(|place| **place == *path) {
            wrong.extend(
                lines_with(&code, concat!("un", "safe")).map(|line| format!("{path}:{line}")),
            );
        }
    }
    none(
        "only the files that tests/house.rs lists hold unsafe code",
        wrong,
    );
}

/// What a daemon does goes through the seams that a simulation replaces.
#[test]
fn work_that_blocks_goes_through_its_seam() {
    // The demo and the seam itself are no part of what is simulated.
    let others = ["src/demo/", "src/work.rs"];
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        if path.starts_with("src/") && !others.iter().any(|place| path.starts_with(place)) {
            let code = without_tests(&code_of(&text));
            let found = lines_with(&code, "task::spawn_blocking");
            wrong.extend(found.map(|line| format!("{path}:{line}: use crate::work")));
        }
    }
    none("work that blocks is begun by src/work.rs", wrong);
}

#[test]
fn nothing_is_left_for_later() {
    let marks = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
        concat!("HA", "CK"),
    ];
    let mut wrong = Vec::new();
    for (path, text) in files(&[".rs", ".toml", ".md", ".sh", ".yml", ".py"]) {
        for mark in marks {
            wrong.extend(lines_with(&text, mark).map(|line| format!("{path}:{line}: {mark}")));
        }
        let code = if path.ends_with(".rs") {
            code_of(&text)
        } else {
            String::new()
        };
        for macro_name in ["todo", "unimplemented", "dbg"] {
            let called = |line: &usize| {
                code.lines()
                    .nth(line - 1)
                    .unwrap_or_default()
                    .contains(&format!("{macro_name}!"))
            };
            wrong.extend(
                lines_with(&code, macro_name)
                    .filter(called)
                    .map(|line| format!("{path}:{line}: {macro_name}!")),
            );
        }
    }
    none(
        "work that is not done is an issue, not a mark in a file",
        wrong,
    );
}

/// The argument lists of every `.route(…)` in a text.
fn routes_in(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices(".route(") {
        let rest = &text[at + ".route(".len()..];
        let mut depth = 1;
        let end = rest.find(|c| {
            depth += i32::from(c == '(') - i32::from(c == ')');
            depth == 0
        });
        found.push(&rest[..end.unwrap_or(rest.len())]);
    }
    found
}

#[test]
fn every_route_of_the_api_needs_a_right() {
    let table = fs::read_to_string(root().join("src/site/api/rights.rs")).unwrap();
    // The formatter breaks a long entry over several lines.
    let words: Vec<_> = table.split_whitespace().collect();
    let table = words.join(" ").replace("( ", "(");
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (file, text) in sources() {
        for route in routes_in(&text) {
            let path = route.split('"').nth(1).unwrap_or_default();
            for method in ["get", "post", "put", "patch", "delete", "head", "any"] {
                let call = format!("{method}(");
                let called = route.match_indices(&call).any(|(at, _)| {
                    let before = route[..at].chars().next_back();
                    before.is_none_or(|c| !c.is_alphanumeric() && c != '_')
                });
                if !called {
                    continue;
                }
                seen += 1;
                let entry = format!("(\"{}\", \"{path}\", Right::", method.to_uppercase());
                if !table.contains(&entry) {
                    wrong.push(format!(
                        "{file}: {} {path} has no right, so everybody is refused; add it to RIGHTS in src/site/api/rights.rs",
                        method.to_uppercase()
                    ));
                }
            }
        }
    }
    none("every route has a right in one table", wrong);
    assert!(seen > 20, "the routes were not found: {seen}");
}

#[test]
fn every_crate_keeps_the_workspaces_lints() {
    for of in VALVES.into_iter().chain([""]) {
        let manifest = fs::read_to_string(root().join(of).join("Cargo.toml")).unwrap();
        assert!(
            manifest.contains("[lints]\nworkspace = true"),
            "{of}/Cargo.toml lacks [lints] workspace = true"
        );
    }
}

#[test]
fn every_link_between_pages_resolves() {
    let mut wrong = Vec::new();
    for (path, page) in files(&[".md"]) {
        for (line, target) in links(&page) {
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let (file, anchor) = target.split_once('#').unwrap_or((&target, ""));
            let here = root().join(&path);
            let there = match file.strip_prefix('/') {
                _ if file.is_empty() => here.clone(),
                Some(from_root) => root().join(from_root),
                None => here.parent().unwrap().join(file),
            };
            let page_there = there.extension().is_some_and(|kind| kind == "md");
            if !there.exists() {
                wrong.push(format!(
                    "{path}:{line} links to {target}, which does not exist"
                ));
            } else if !anchor.is_empty()
                && page_there
                && !anchors(&fs::read_to_string(&there).unwrap()).contains(anchor)
            {
                wrong.push(format!(
                    "{path}:{line} links to {target}, which has no such heading"
                ));
            }
        }
    }
    none("every link between pages resolves", wrong);
}
