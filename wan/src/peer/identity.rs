//! A site's own key and certificate.
//!
//! Only the private key is kept, in one file that nobody else may read. The
//! certificate is made of it anew at every start: peers pin the key.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rcgen::{CertificateParams, DnType, KeyPair, PKCS_ED25519, PublicKeyData};

use super::{NameError, SiteKey, check_site_name};

/// File of the private key, in the directory given to [`Identity::load_or_create`].
const KEY_FILE: &str = "site-key.pem";

/// More than any PKCS#8 PEM of an Ed25519 key.
const MAX_KEY_FILE_BYTES: u64 = 16 << 10;

/// Why a site has no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The name cannot be used.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The key file cannot be read or made.
    #[error("cannot {what} {}: check that the directory exists and belongs to the user farhaven runs as", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Others may read the key.
    #[error("{} may be read by others (mode {mode:03o}); if it was never exposed run `chmod 600` on it, else remove it and pair again", path.display())]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file holds no usable key.
    #[error("{} holds no Ed25519 key; restore it from a backup, or remove it and pair again", path.display())]
    Key {
        /// The key file.
        path: PathBuf,
        /// What the parser said.
        #[source]
        source: rcgen::Error,
    },
    /// Key or certificate could not be made.
    #[error("cannot make the site's key or certificate")]
    Make(#[source] rcgen::Error),
}

/// A site's own key, with the certificate made of it.
pub struct Identity {
    site: String,
    key: SiteKey,
    certificate: Vec<u8>,
    private_key: Vec<u8>,
}

impl Identity {
    /// Loads the key in `directory`, or makes one (an Ed25519 key, readable by
    /// its owner only, on disk before this returns).
    ///
    /// # Errors
    /// For a bad name, an unreadable, exposed or damaged key file.
    pub fn load_or_create(directory: &Path, site: &str) -> Result<Identity, IdentityError> {
        check_site_name(site)?;
        let path = directory.join(KEY_FILE);
        let fail = |what: &'static str| {
            let path = path.clone();
            move |source| IdentityError::File { what, path, source }
        };
        match File::open(&path) {
            Ok(file) => Identity::load(file, &path, site),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let pair = KeyPair::generate_for(&PKCS_ED25519).map_err(IdentityError::Make)?;
                store(directory, &path, &pair.serialize_pem()).map_err(fail("write"))?;
                // Another process may have been first: what lies there counts.
                let file = File::open(&path).map_err(fail("open"))?;
                Identity::load(file, &path, site)
            }
            Err(error) => Err(fail("open")(error)),
        }
    }

    fn load(file: File, path: &Path, site: &str) -> Result<Identity, IdentityError> {
        let fail = |source| IdentityError::File {
            what: "read",
            path: path.to_owned(),
            source,
        };
        let mode = file.metadata().map_err(fail)?.mode() & 0o777;
        if mode & 0o077 != 0 {
            let path = path.to_owned();
            return Err(IdentityError::Exposed { path, mode });
        }
        let mut pem = String::new();
        file.take(MAX_KEY_FILE_BYTES)
            .read_to_string(&mut pem)
            .map_err(fail)?;
        let pair =
            KeyPair::from_pkcs8_pem_and_sign_algo(&pem, &PKCS_ED25519).map_err(|source| {
                IdentityError::Key {
                    path: path.to_owned(),
                    source,
                }
            })?;
        Identity::of(&pair, site).map_err(IdentityError::Make)
    }

    fn of(pair: &KeyPair, site: &str) -> Result<Identity, rcgen::Error> {
        let mut parameters = CertificateParams::new(vec![crate::SERVER_NAME.to_owned()])?;
        parameters.distinguished_name.push(DnType::CommonName, site);
        let certificate = parameters.self_signed(pair)?;
        Ok(Identity {
            site: site.to_owned(),
            key: SiteKey::of_public_key(&pair.subject_public_key_info()),
            certificate: certificate.der().to_vec(),
            private_key: pair.serialize_der(),
        })
    }

    /// The digest of the public key: what peers pin.
    pub fn key(&self) -> SiteKey {
        self.key
    }

    /// The site's name.
    pub fn site(&self) -> &str {
        &self.site
    }

    /// The certificate, DER.
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// The private key, PKCS#8 DER: for TLS, and for nothing that is written or shown.
    pub fn private_key(&self) -> &[u8] {
        &self.private_key
    }
}

impl std::fmt::Debug for Identity {
    /// Without the private key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("site", &self.site)
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

/// Puts the key where it belongs, whole or not at all, and never over one that is there.
fn store(directory: &Path, path: &Path, pem: &str) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    let temporary = directory.join(format!("{KEY_FILE}.{}.new", std::process::id()));
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(pem.as_bytes())?;
        file.sync_all()?;
        match fs::hard_link(&temporary, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    })();
    let removed = fs::remove_file(&temporary);
    written?;
    removed?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_kept_private() {
        let directory = tempfile::tempdir().expect("a directory");
        let inside = directory.path().join("state");
        let first = Identity::load_or_create(&inside, "east").expect("made");
        let again = Identity::load_or_create(&inside, "east").expect("loaded");
        assert_eq!(first.key(), again.key());
        let mode = fs::metadata(inside.join(KEY_FILE)).expect("there").mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(&inside).expect("listed").count(), 1);
        assert!(!format!("{first:?}").contains("private"));
        let other = directory.path().join("other");
        let other = Identity::load_or_create(&other, "east").expect("made");
        assert_ne!(first.key(), other.key());
    }

    #[test]
    fn an_exposed_or_damaged_key_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let load = || Identity::load_or_create(directory.path(), "east");
        load().expect("made");
        let file = directory.path().join(KEY_FILE);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).expect("changed");
        assert!(matches!(
            load(),
            Err(IdentityError::Exposed { mode: 0o640, .. })
        ));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("changed");
        fs::write(&file, "not a key").expect("written");
        assert!(matches!(load(), Err(IdentityError::Key { .. })));
        assert!(matches!(
            Identity::load_or_create(directory.path(), "a b"),
            Err(IdentityError::Name(_))
        ));
    }
}
