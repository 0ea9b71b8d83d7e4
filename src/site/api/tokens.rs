//! Tokens for the API over TLS: 256 random bits each, of which only the hash
//! is kept. One small private file holds all of them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use axum::extract::Path as InPath;
use axum::{Extension, Json};
use serde::{Deserialize, Serialize};

use super::rights::{Caller, May, Role};
use super::serve::Served;
use super::{Answer, Done};
use crate::site::operate::{OperateError, failed};
use crate::site::{checked, hex};

/// Most tokens of one site: each is compared with what a request shows.
const MOST: usize = 1000;

/// How a token begins, so that one that was lost is recognised as such.
const BEGINS: &str = "farhaven-token-";

/// Hashes of tokens are of no use for anything else.
const PURPOSE: &str = "farhaven 2026 api token";

/// No file of tokens is longer.
const LONGEST: u64 = 1 << 20;

/// What is kept of one token.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    name: String,
    role: Role,
    #[serde(default)]
    may: Vec<May>,
    /// Hexadecimal, of [`hash`].
    hash: String,
    /// Seconds since 1970.
    made: u64,
    /// As well; for ever when absent.
    #[serde(default)]
    expires: Option<u64>,
}

/// Every token of a site.
pub(super) struct Tokens {
    path: PathBuf,
    records: RwLock<Vec<Record>>,
}

/// Body of `POST /v1/tokens`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddToken {
    /// Whose it is, as logs and approvals call them.
    pub name: String,
    /// What they do here.
    pub role: Role,
    /// What an operator may do beyond that.
    #[serde(default)]
    pub may: Vec<May>,
    /// In how many seconds it is worth nothing any more; never when absent.
    #[serde(default)]
    pub expires_s: Option<u64>,
}

/// Answer to it. The token is told this once.
#[derive(Serialize, Deserialize)]
pub struct TokenAdded {
    /// The secret.
    pub token: String,
    /// What is kept of it.
    pub kept: TokenView,
    /// Where the API is served over TLS, if it is.
    pub listen: Option<String>,
    /// What clients pin of its key.
    pub fingerprint: Option<String>,
}

/// A token, as listings show it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TokenView {
    /// Whose it is.
    pub name: String,
    /// What they do here.
    pub role: Role,
    /// What an operator may do beyond that.
    pub may: Vec<May>,
    /// When it was made.
    pub made: String,
    /// Until when it counts; for ever when absent.
    pub expires: Option<String>,
    /// It counts no more.
    pub expired: bool,
}

/// The file of tokens, as a fuzz target.
#[cfg(any(test, feature = "fuzzing"))]
pub(super) fn fuzzing(bytes: &[u8]) {
    let records = serde_json::from_slice::<Vec<Record>>(bytes);
    for record in records.unwrap_or_default() {
        let _ = record.view();
        let _ = blake3::Hash::from_hex(record.hash.as_bytes());
    }
}

fn hash(token: &str) -> blake3::Hash {
    blake3::Hash::from_bytes(blake3::derive_key(PURPOSE, token.as_bytes()))
}

fn now() -> u64 {
    crate::site::unix_ns(SystemTime::now()) / 1_000_000_000
}

fn told(seconds: u64) -> String {
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    jiff::Timestamp::from_second(seconds).map_or_else(|_| "?".to_owned(), |t| t.to_string())
}

impl Record {
    fn expired(&self, now: u64) -> bool {
        self.expires.is_some_and(|at| at <= now)
    }

    fn view(&self) -> TokenView {
        TokenView {
            name: self.name.clone(),
            role: self.role,
            may: self.may.clone(),
            made: told(self.made),
            expires: self.expires.map(told),
            expired: self.expired(now()),
        }
    }
}

impl Tokens {
    /// Reads what is there.
    ///
    /// # Errors
    /// When it cannot be read: nobody may be let in by half of it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let damaged = |why: String| {
            io::Error::other(format!(
                "{}: {why}; restore it from a backup, or remove it and give out new tokens",
                path.display()
            ))
        };
        let records = checked::read_if_there(path, LONGEST).map_err(|e| damaged(e.to_string()))?;
        Ok(Self {
            path: path.to_owned(),
            records: RwLock::new(records.unwrap_or_default()),
        })
    }

    /// Whose token that is, if it is one that counts. Takes as long whichever
    /// it is, and however much of one it resembles.
    pub(super) fn caller(&self, token: &str) -> Option<Caller> {
        let (shown, now) = (hash(token), now());
        let records = self.records.read().unwrap_or_else(PoisonError::into_inner);
        let mut found = None;
        for record in records.iter() {
            let kept = blake3::Hash::from_hex(record.hash.as_bytes());
            // The comparison of hashes takes constant time.
            if kept.is_ok_and(|kept| kept == shown) && !record.expired(now) {
                found = Some(record);
            }
        }
        found.map(|r| Caller::of_token(r.name.clone(), r.role, r.may.clone()))
    }

    fn add(&self, wanted: AddToken) -> Result<(String, TokenView), OperateError> {
        let conflict = |why: &str| Err(OperateError::Conflict(why.to_owned()));
        if !crate::site::protect::is_guest_name(&wanted.name) {
            return conflict(
                "a token's name has 1 to 63 letters, digits, '-', '_' and '.', neither '-' nor '.' first",
            );
        }
        if wanted.role != Role::Operator && !wanted.may.is_empty() {
            return conflict(
                "only an operator's token has rights by name: a viewer only looks, and an admin may do everything",
            );
        }
        let mut records = self.records.write().unwrap_or_else(PoisonError::into_inner);
        if records.iter().any(|known| known.name == wanted.name) {
            return conflict(
                "there is a token of that name; revoke it first, or give this one another",
            );
        }
        if records.len() >= MOST {
            return conflict("there are 1000 tokens; revoke those that nobody uses");
        }
        let token = format!("{BEGINS}{}", hex(&rand::random::<[u8; 32]>()));
        let mut may = wanted.may;
        may.dedup();
        let record = Record {
            name: wanted.name,
            role: wanted.role,
            may,
            hash: hash(&token).to_hex().to_string(),
            made: now(),
            expires: wanted.expires_s.map(|s| now().saturating_add(s)),
        };
        let view = record.view();
        let mut changed = records.clone();
        changed.push(record);
        self.keep(&changed)?;
        *records = changed;
        Ok((token, view))
    }

    fn revoke(&self, name: &str) -> Result<(), OperateError> {
        let mut records = self.records.write().unwrap_or_else(PoisonError::into_inner);
        let mut changed = records.clone();
        changed.retain(|known| known.name != name);
        if changed.len() == records.len() {
            return Err(OperateError::Unknown(format!(
                "there is no token '{name}'; see: farhaven token list"
            )));
        }
        self.keep(&changed)?;
        *records = changed;
        Ok(())
    }

    fn keep(&self, records: &[Record]) -> Result<(), OperateError> {
        checked::write(&self.path, &records).map_err(failed)
    }

    fn views(&self) -> Vec<TokenView> {
        let records = self.records.read().unwrap_or_else(PoisonError::into_inner);
        records.iter().map(Record::view).collect()
    }
}

pub(super) async fn list(Extension(served): Extension<Arc<Served>>) -> Json<Vec<TokenView>> {
    Json(served.tokens.views())
}

pub(super) async fn add(
    Extension(served): Extension<Arc<Served>>,
    Json(body): Json<AddToken>,
) -> Answer<TokenAdded> {
    let (token, kept) = served.tokens.add(body)?;
    Ok(Json(TokenAdded {
        token,
        kept,
        listen: served.listen.map(|at| at.to_string()),
        fingerprint: served.fingerprint.map(|key| key.to_string()),
    }))
}

pub(super) async fn revoke(
    Extension(served): Extension<Arc<Served>>,
    InPath(name): InPath<String>,
) -> Answer<Done> {
    served.tokens.revoke(&name)?;
    Ok(Json(Done {}))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn wanted(name: &str, role: Role, may: &[May], expires_s: Option<u64>) -> AddToken {
        AddToken {
            name: name.to_owned(),
            role,
            may: may.to_vec(),
            expires_s,
        }
    }

    #[test]
    fn only_the_hash_is_kept_and_only_the_token_is_let_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.json");
        let tokens = Tokens::open(&path).unwrap();
        let (token, _) = tokens
            .add(wanted("anna", Role::Operator, &[May::Test], None))
            .unwrap();
        let (old, view) = tokens
            .add(wanted("old", Role::Admin, &[], Some(0)))
            .unwrap();
        assert!(view.expired);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains(&token) && !text.contains(&token[BEGINS.len()..]));
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        let again = Tokens::open(&path).unwrap();
        for tokens in [&tokens, &again] {
            let anna = tokens.caller(&token).unwrap();
            assert_eq!((anna.name(), anna.token()), ("anna", Some("anna")));
            assert_eq!(tokens.caller(&old), None, "expired");
            let hash = hash(&token).to_hex().to_string();
            for wrong in ["", "anna", &token[..token.len() - 1], &hash, BEGINS] {
                assert_eq!(tokens.caller(wrong), None, "{wrong}");
            }
        }
        again.revoke("anna").unwrap();
        assert_eq!(again.caller(&token), None);
        assert!(again.revoke("anna").is_err());
        assert_eq!(Tokens::open(&path).unwrap().caller(&token), None);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.json");
        let tokens = Tokens::open(&path).unwrap();
        for bad in [
            wanted("", Role::Viewer, &[], None),
            wanted("a b", Role::Viewer, &[], None),
            wanted("uid:0", Role::Viewer, &[], None),
            wanted("v", Role::Viewer, &[May::Test], None),
            wanted("a", Role::Admin, &[May::Failover], None),
        ] {
            assert!(tokens.add(bad).is_err());
        }
        tokens.add(wanted("v", Role::Viewer, &[], None)).unwrap();
        assert!(tokens.add(wanted("v", Role::Admin, &[], None)).is_err());
        std::fs::write(&path, "[{").unwrap();
        assert!(
            Tokens::open(&path).is_err(),
            "nobody is let in by half of it"
        );
    }
}
