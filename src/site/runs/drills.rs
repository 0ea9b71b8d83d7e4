//! When each group and guest was last tested well: a small file, so that it
//! outlives the records of the runs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use super::facts::{RunFacts, now_ms};

/// Largest such file: 100,000 names.
const LARGEST: u64 = 16 << 20;

/// The times of the last good tests, by group and guest.
pub(super) struct GoodTests {
    path: PathBuf,
    at: Mutex<BTreeMap<String, u64>>,
}

impl GoodTests {
    /// Those that are kept; a file that cannot be read counts as none, and says so.
    pub(super) fn open(path: &Path) -> Self {
        let small = std::fs::metadata(path).is_ok_and(|file| file.len() <= LARGEST);
        let read = small.then(|| std::fs::read(path).map_err(|e| e.to_string()));
        let read = read.map(|text| {
            text.and_then(|text| serde_json::from_slice(&text).map_err(|e| e.to_string()))
        });
        let at = match read {
            Some(Ok(at)) => at,
            Some(Err(error)) => {
                tracing::error!(path = %path.display(), error, "the times of the last good tests cannot be read; they count as never");
                BTreeMap::new()
            }
            None => BTreeMap::new(),
        };
        Self {
            path: path.to_owned(),
            at: Mutex::new(at),
        }
    }

    /// A test ended well just now.
    pub(super) fn note(&self, facts: &RunFacts) {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        for (guest, known) in &facts.guests {
            at.insert(guest.clone(), now_ms());
            if !known.group.is_empty() {
                at.insert(known.group.clone(), now_ms());
            }
        }
        let kept = serde_json::to_vec(&*at).map_err(std::io::Error::other);
        let kept = kept.and_then(|text| crate::site::files::replace(&self.path, &text));
        if let Err(error) = kept {
            tracing::error!(path = %self.path.display(), %error, "the time of a good test cannot be kept");
        }
    }

    /// When that was.
    pub(super) fn of(&self, name: &str) -> Option<SystemTime> {
        let at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        let at = at.get(name)?;
        Some(SystemTime::UNIX_EPOCH + Duration::from_millis(*at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_good_test_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("good");
        let mut facts = RunFacts::default();
        facts.guests.entry("db1".to_owned()).or_default().group = "bank".to_owned();
        let tests = GoodTests::open(&path);
        assert_eq!(tests.of("bank"), None);
        tests.note(&facts);
        let again = GoodTests::open(&path);
        assert!(again.of("bank").is_some() && again.of("db1") == again.of("bank"));
        std::fs::write(&path, "no").unwrap();
        assert_eq!(GoodTests::open(&path).of("bank"), None);
    }
}
