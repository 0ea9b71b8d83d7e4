//! Where a demo keeps its files: a directory that goes with it, or one of the
//! user's own to look around in after.

use std::path::{Path, PathBuf};

/// A unix socket's path has 108 bytes with its final NUL; the longest below a
/// demo's directory is that of a QEMU: `/west/run/<guest>/test/incoming.sock`.
const LONGEST_DIRECTORY: usize = 107 - "/west/run//test/incoming.sock".len() - 36;

/// A directory.
pub(super) struct Place {
    directory: PathBuf,
    _temporary: Option<tempfile::TempDir>,
}

impl Place {
    /// Makes it.
    pub(super) fn make(keep: Option<&Path>) -> Result<Self, String> {
        let Some(keep) = keep else {
            let temporary = tempfile::Builder::new()
                .prefix("farhaven-demo-")
                .tempdir()
                .map_err(|e| format!("no temporary directory: {e}; set TMPDIR"))?;
            let directory = temporary.path().to_owned();
            fits(
                &directory,
                "the temporary directory",
                "set a shorter TMPDIR",
            )?;
            return Ok(Self {
                directory,
                _temporary: Some(temporary),
            });
        };
        let directory = std::path::absolute(keep).map_err(|e| e.to_string())?;
        fits(&directory, "--keep", "choose a shorter path")?;
        let failed = |e: std::io::Error| format!("--keep {}: {e}", keep.display());
        std::fs::create_dir_all(&directory).map_err(failed)?;
        if std::fs::read_dir(&directory)
            .map_err(failed)?
            .next()
            .is_some()
        {
            return Err(format!(
                "--keep {}: there is something in it; name a new or empty directory",
                keep.display()
            ));
        }
        Ok(Self {
            directory,
            _temporary: None,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.directory
    }
}

fn fits(directory: &Path, what: &str, mend: &str) -> Result<(), String> {
    let length = directory.as_os_str().len();
    if length > LONGEST_DIRECTORY {
        return Err(format!(
            "{what} {}: sockets below it would have too long a path ({length} bytes here, at most {LONGEST_DIRECTORY}); {mend}",
            directory.display()
        ));
    }
    Ok(())
}

/// A site that is started again must not fill /dev/shm behind the user's back.
fn bring_home(site: &Path) -> std::io::Result<()> {
    let file = site.join("site.toml");
    let text = std::fs::read_to_string(&file)?;
    let home = format!("ram_dir = {:?}", site.join("ram").display().to_string());
    let lines = text
        .lines()
        .map(|line| match line.starts_with("ram_dir = ") {
            true => home.as_str(),
            false => line,
        });
    std::fs::write(&file, lines.collect::<Vec<_>>().join("\n") + "\n")
}

/// Says what lies where, and how to look at it.
pub(super) fn tour(directory: &Path) {
    let directory = std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned());
    for site in ["east", "west"] {
        if let Err(error) = bring_home(&directory.join(site)) {
            eprintln!("{}: {error}", directory.join(site).display());
        }
    }
    let at = directory.display();
    eprintln!();
    eprintln!("Kept in {at}:");
    for (name, what) in [
        ("east/daemon.log", "what the source's daemon told"),
        ("west/daemon.log", "what the target's daemon told"),
        (
            "west/store",
            "the recovery points, as they came over the link",
        ),
        (
            "west/run",
            "what ran at west: consoles, overlays of its disks",
        ),
    ] {
        eprintln!("  {:<18}{what}", name);
    }
    let program =
        std::env::current_exe().map_or_else(|_| "farhaven".into(), |p| p.display().to_string());
    eprintln!("Look at it, with west running again:");
    eprintln!("  {program} site run --config {at}/west/site.toml &");
    eprintln!("  {program} --api {at}/west/api.sock status");
    eprintln!(
        "  {program} --api {at}/west/api.sock points {}",
        super::story::NAME
    );
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn a_kept_site_has_its_memory_files_with_it() {
        let site = tempfile::tempdir().unwrap();
        let file = site.path().join("site.toml");
        std::fs::write(&file, "a = 1\nram_dir = \"/dev/shm/x\"\nb = 2\n").unwrap();
        bring_home(site.path()).unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        let home = format!("ram_dir = \"{}/ram\"", site.path().display());
        assert_eq!(text, format!("a = 1\n{home}\nb = 2\n"));
    }

    #[test]
    fn a_kept_directory_is_a_new_or_empty_one_with_a_short_path() {
        let temporary = tempfile::Builder::new()
            .prefix("fh")
            .tempdir_in("/tmp")
            .unwrap();
        let new = temporary.path().join("new");
        assert_eq!(Place::make(Some(&new)).unwrap().path(), new);
        std::fs::write(new.join("file"), "").unwrap();
        let why = Place::make(Some(&new)).err().unwrap();
        assert!(why.contains("something in it"), "{why}");
        let long = temporary.path().join("l".repeat(60));
        let why = Place::make(Some(&long)).err().unwrap();
        assert!(why.contains("shorter"), "{why}");
        let file = new.join("file");
        assert!(Place::make(Some(&file)).is_err());
        assert!(Place::make(None).unwrap().path().is_dir());
    }
}
