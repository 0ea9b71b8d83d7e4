//! A recovery point as a block device: a read-only NBD server on a unix socket.
//!
//! QEMU opens each disk of an activated guest as a qcow2 overlay on an export
//! here, so the guest runs at once and its disks are hydrated from here in the
//! background. Data passes source -> piece -> reply ([`serve`]); `wire` is the
//! only file that knows the bytes. A planned move launches QEMU ahead on an
//! older point and swaps the source with [`NbdServer::replace`].
//!
//! Holes travel as holes, and `base:allocation` tells them ahead, so that
//! neither unwritten space nor zeros are copied.

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod handshake;
pub mod pieces;
pub mod serve;
pub mod wire;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};

/// Most clients at a time that have chosen no export yet.
pub const MOST_CHOOSING: usize = 64;
/// Most connections at a time to one export. Each export has its own: no guest, and no
/// test, keeps another from its disks. A connection may always hold one piece of
/// [`pieces::PIECE`] bytes.
pub const OF_EXPORT: usize = 16;
/// So many pieces more are held at a time, by all connections together.
pub const MORE_PIECES: usize = 448;
/// A client must choose its export within this time.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// What is exported: bytes that do not change. Called from blocking threads,
/// from several at once.
pub trait BlockSource: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset` on; both lie within the size.
    ///
    /// # Errors
    /// When the bytes cannot be had: the client gets an I/O error, the log this one.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Lengths of consecutive parts of `offset..offset + length`, and whether
    /// each reads as zeros. What is not told counts as data.
    fn extents(&self, offset: u64, length: u64) -> Vec<(u64, bool)>;
}

/// Why an export or the server is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The socket could not be made.
    #[error("cannot listen on {}: {source}; check that its directory exists and may be written", path.display())]
    Bind {
        /// The socket's path.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Another process serves there.
    #[error("{} is in use by another server; end that or choose another run directory", .0.display())]
    InUse(PathBuf),
    /// There is an export of this name.
    #[error("there is an export named {0:?} already; remove or replace it")]
    Exists(String),
    /// No export has this name.
    #[error("there is no export named {0:?}; export it first")]
    Unknown(String),
    /// A name that NBD does not allow.
    #[error("an export's name has 1 to {longest} bytes, this one has {0}", longest = wire::LONGEST_NAME)]
    Name(usize),
    /// A replacement of another size, which clients would not notice.
    #[error(
        "export {name:?} has {size} bytes, its replacement {other}; remove the export and make a new one"
    )]
    Size {
        /// The export.
        name: String,
        /// Its size.
        size: u64,
        /// The size of what was to replace it.
        other: u64,
    },
}

/// One export. Open connections hold it, so a replaced source is seen by all.
pub(crate) struct Export {
    size: u64,
    source: RwLock<Arc<dyn BlockSource>>,
    /// Dropped receivers and a changed value both end a connection.
    removed: watch::Sender<bool>,
    /// Places of its connections.
    open: Arc<Semaphore>,
}

pub(crate) struct Exports {
    named: RwLock<BTreeMap<String, Arc<Export>>>,
    /// What connections hold beside one piece each.
    more: Arc<Semaphore>,
}

impl Default for Exports {
    fn default() -> Self {
        Self {
            named: RwLock::default(),
            more: Arc::new(Semaphore::new(MORE_PIECES)),
        }
    }
}

impl Exports {
    fn add(&self, name: &str, source: Arc<dyn BlockSource>) -> Result<(), NbdError> {
        if name.is_empty() || name.len() > wire::LONGEST_NAME {
            return Err(NbdError::Name(name.len()));
        }
        let mut exports = self.named.write().unwrap_or_else(PoisonError::into_inner);
        if exports.contains_key(name) {
            return Err(NbdError::Exists(name.to_owned()));
        }
        let export = Export {
            size: source.size(),
            source: RwLock::new(source),
            removed: watch::Sender::new(false),
            open: Arc::new(Semaphore::new(OF_EXPORT)),
        };
        exports.insert(name.to_owned(), Arc::new(export));
        Ok(())
    }

    fn find(&self, name: &str) -> Option<Arc<Export>> {
        self.named
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }

    fn names(&self) -> Vec<String> {
        self.named
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .keys()
            .cloned()
            .collect()
    }
}

/// A server on one unix socket. Ends, and removes its socket, when dropped.
pub struct NbdServer {
    path: PathBuf,
    exports: Arc<Exports>,
    stop: watch::Sender<bool>,
    accepting: Option<JoinHandle<()>>,
}

impl NbdServer {
    /// Listens on `path`, for this user only. A socket left by a server that is
    /// gone is replaced. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`NbdError::InUse`] and [`NbdError::Bind`].
    pub fn bind(path: impl Into<PathBuf>) -> Result<NbdServer, NbdError> {
        let path = path.into();
        remove_stale(&path)?;
        let failed = |source| NbdError::Bind {
            path: path.clone(),
            source,
        };
        let listener = UnixListener::bind(&path).map_err(failed)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let exports = Arc::new(Exports::default());
        let (stop, stopped) = watch::channel(false);
        let accepting = Some(tokio::spawn(accept(listener, exports.clone(), stopped)));
        Ok(NbdServer {
            path,
            exports,
            stop,
            accepting,
        })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Offers `source` under `name`.
    ///
    /// # Errors
    /// [`NbdError::Exists`] and [`NbdError::Name`].
    pub fn export(&self, name: &str, source: Arc<dyn BlockSource>) -> Result<(), NbdError> {
        self.exports.add(name, source)
    }

    /// Puts another source of the same size in place of an export's. Requests
    /// that come after this see it, on open connections too; requests under way
    /// are answered from the old one.
    ///
    /// # Errors
    /// [`NbdError::Unknown`] and [`NbdError::Size`].
    pub fn replace(&self, name: &str, source: Arc<dyn BlockSource>) -> Result<(), NbdError> {
        let export = self
            .exports
            .find(name)
            .ok_or_else(|| NbdError::Unknown(name.to_owned()))?;
        if source.size() != export.size {
            return Err(NbdError::Size {
                name: name.to_owned(),
                size: export.size,
                other: source.size(),
            });
        }
        *export
            .source
            .write()
            .unwrap_or_else(PoisonError::into_inner) = source;
        Ok(())
    }

    /// Withdraws an export and ends its connections.
    ///
    /// # Errors
    /// [`NbdError::Unknown`].
    pub fn remove(&self, name: &str) -> Result<(), NbdError> {
        let removed = self
            .exports
            .named
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
        let export = removed.ok_or_else(|| NbdError::Unknown(name.to_owned()))?;
        export.removed.send_replace(true);
        Ok(())
    }

    /// Ends all connections, waits until they have ended, and removes the socket.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(true);
        if let Some(accepting) = self.accepting.take() {
            // A task that panicked has ended too.
            let _ = accepting.await;
        }
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        // Gone already only if somebody else removed it.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn remove_stale(path: &Path) -> Result<(), NbdError> {
    let is_socket =
        std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    if !is_socket {
        // Absent: good. Another kind of file: never removed, and bind says so.
        return Ok(());
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|source| NbdError::Bind {
                path: path.to_owned(),
                source,
            })
        }
        _ => Err(NbdError::InUse(path.to_owned())),
    }
}

async fn accept(listener: UnixListener, exports: Arc<Exports>, mut stopped: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(MOST_CHOOSING));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            _ = stopped.changed() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, most likely: others may end and free some.
                tracing::warn!(%error, "an NBD connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            tracing::warn!(
                "{MOST_CHOOSING} NBD clients have chosen no export yet; one more was refused"
            );
            continue;
        };
        let exports = exports.clone();
        connections.spawn(async move {
            if let Err(error) = converse(stream, &exports, Some(place)).await {
                tracing::warn!(%error, "an NBD connection ended early");
            }
        });
    }
    // Ends every connection's task, and waits for them.
    connections.shutdown().await;
}

/// `choosing` is the client's place until it has chosen an export.
async fn converse(
    mut stream: UnixStream,
    exports: &Exports,
    choosing: Option<OwnedSemaphorePermit>,
) -> io::Result<()> {
    let shaken =
        tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake::shake(&mut stream, exports)).await;
    let shaken = shaken.map_err(|_| {
        io::Error::new(
            io::ErrorKind::TimedOut,
            "the client chose no export in time",
        )
    })?;
    let agreed = match shaken {
        Ok(Some(agreed)) => agreed,
        Ok(None) => return Ok(()),
        // `nbdinfo --list`, and whoever only looks whether somebody listens.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
        Err(error) => return Err(error),
    };
    drop(choosing);
    let mut removed = agreed.export.removed.subscribe();
    let export = agreed.name.clone();
    let Ok(_open) = agreed.export.open.clone().try_acquire_owned() else {
        tracing::warn!(
            export,
            "{OF_EXPORT} NBD connections to this export are open; one more was refused"
        );
        return Ok(());
    };
    tracing::debug!(
        export,
        structured = agreed.structured,
        "an NBD client has opened an export"
    );
    tokio::select! {
        served = serve::serve(stream, agreed, &exports.more) => served,
        // An export removed between the look-up and the subscription counts too.
        _ = removed.wait_for(|removed| *removed) => Ok(()),
    }
}
