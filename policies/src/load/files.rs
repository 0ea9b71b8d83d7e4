//! Paths -> texts, within bounds.

use std::path::{Path, PathBuf};

use crate::mistake::{LARGEST_FILE, LoadError, MOST_FILES};

/// The files that `path` stands for: itself, or what ends in `.toml` in it, in
/// order of names.
///
/// # Errors
/// The directory cannot be read, or holds no such file, or more than [`MOST_FILES`].
pub fn files_of(path: &Path, help: &'static str) -> Result<Vec<PathBuf>, LoadError> {
    let failed = |source| LoadError::Read {
        help,
        path: path.to_owned(),
        source,
    };
    if !std::fs::metadata(path).map_err(failed)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".toml") && !name.starts_with('.') && file.is_file() {
            files.push(file);
        }
    }
    if !(1..=MOST_FILES).contains(&files.len()) {
        return Err(LoadError::Files {
            path: path.to_owned(),
            files: files.len(),
        });
    }
    files.sort();
    Ok(files)
}

pub(crate) fn read(path: &Path, help: &'static str) -> Result<String, LoadError> {
    let failed = |source| LoadError::Read {
        help,
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
