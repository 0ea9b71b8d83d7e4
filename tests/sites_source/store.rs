//! `farhaven store check`, on a store whose daemon is stopped: all that is damaged is
//! named, and nothing else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A store as an earlier version left it: three guests, six points, one of them kept.
fn golden(to: &Path) -> PathBuf {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("storage-sync/tests/golden/store-1");
    let to = to.join("store");
    copy(&golden.join("store"), &to);
    to
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy(&entry.path(), &to),
            false => drop(fs::copy(entry.path(), to).unwrap()),
        }
    }
}

fn files(at: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(at).unwrap();
    let mut all = Vec::new();
    for path in entries.map(|entry| entry.unwrap().path()) {
        match path.is_dir() {
            true => all.extend(files(&path)),
            false => all.push(path),
        }
    }
    all.sort();
    all
}

/// Exit status, output, errors.
fn check(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_farhaven"))
        .args(["store", "check"])
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code(),
        text(&output.stdout),
        text(&output.stderr),
    )
}

#[test]
fn what_is_damaged_in_a_store_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let store = golden(dir.path());
    let at = store.to_str().unwrap();
    // Alone, and as a site's directory of stores.
    for place in [at, dir.path().to_str().unwrap()] {
        let (status, out, err) = check(&[place]);
        assert_eq!(status, Some(0), "{out}{err}");
        assert!(out.contains(&format!("{at}: 6 points")), "{out}");
    }
    let (status, out, _) = check(&[at, "--json"]);
    assert_eq!(status, Some(0));
    let told: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&told[0]["sound"], &told[0]["points"]),
        (&true.into(), &6.into())
    );

    // One bit, in the middle of each file that it has.
    let data = |path: &&PathBuf| {
        let ends = path.extension().and_then(|end| end.to_str());
        matches!(ends, Some("seg" | "man" | "kept"))
    };
    let all: Vec<PathBuf> = files(&store);
    let all: Vec<&PathBuf> = all.iter().filter(data).collect();
    assert_eq!(all.len(), 8, "{all:?}");
    for path in all {
        let whole = fs::read(path).unwrap();
        let mut bytes = whole.clone();
        bytes[whole.len() / 2] ^= 4;
        fs::write(path, bytes).unwrap();
        let (status, out, err) = check(&[at]);
        assert_eq!(status, Some(1), "{}: {out}{err}", path.display());
        assert!(out.contains(&path.display().to_string()), "{out}");
        assert!(err.contains("1 of 1 stores are damaged"), "{err}");
        let (status, out, _) = check(&[at, "--json"]);
        assert_eq!(status, Some(1));
        let told: serde_json::Value = serde_json::from_str(&out).unwrap();
        assert_eq!(told[0]["sound"], false, "{out}");
        fs::write(path, whole).unwrap();
    }
    let (status, out, err) = check(&[at]);
    assert_eq!(status, Some(0), "it changes nothing: {out}{err}");
}

#[test]
fn what_is_no_store_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (status, _, err) = check(&[dir.path().to_str().unwrap()]);
    assert_eq!(status, Some(1));
    assert!(err.contains("there is no store in"), "{err}");
    let (status, _, err) = check(&["/nowhere/at/all"]);
    assert_eq!(status, Some(1));
    assert!(err.contains("cannot list /nowhere/at/all"), "{err}");
}
