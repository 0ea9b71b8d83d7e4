//! Base images that operators store here for the guests of paired sites: their
//! sources then send only what differs. An image is kept in the store of each
//! paired site by itself, since nothing is shared between those.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use farhaven_storage_sync::store::{Image, ImageError, ImageProgress};
use serde::{Deserialize, Serialize};

use super::operate::{OperateError, failed};
use super::remote::Remote;
use super::{Site, retention};
use crate::guest::qemu::peer::bytes_free;

/// An image, stored for the guests of a paired site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageView {
    /// Its name.
    pub name: String,
    /// The site whose guests it serves.
    pub peer: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// Bytes that it takes here.
    pub stored_bytes: u64,
    /// When it was stored, nanoseconds since 1970.
    pub added_at: u64,
    /// While it is being stored: bytes of the file that are done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub done_bytes: Option<u64>,
}

/// An image that is being stored.
pub(super) struct Adding {
    name: String,
    peer: String,
    progress: Arc<ImageProgress>,
}

/// Takes the note that an image is being stored away, however that ends.
struct Added(Arc<Site>, Arc<ImageProgress>);

impl Drop for Added {
    fn drop(&mut self) {
        let mut adding = self.0.adding.lock().unwrap_or_else(PoisonError::into_inner);
        adding.retain(|one| !Arc::ptr_eq(&one.progress, &self.1));
    }
}

fn view(peer: &str, image: Image) -> ImageView {
    ImageView {
        name: image.name,
        peer: peer.to_owned(),
        bytes: image.bytes,
        stored_bytes: image.stored_bytes,
        added_at: image.added_at_unix_ns,
        done_bytes: None,
    }
}

impl Site {
    /// Paired sites by name: the one, or all of them.
    fn remotes_of(&self, peer: Option<&str>) -> Result<Vec<Arc<Remote>>, OperateError> {
        if let Some(name) = peer {
            let remote = self.remote(name).ok_or_else(|| self.no_peer(name))?;
            return Ok(vec![remote]);
        }
        let remotes = self.remotes.read().unwrap_or_else(PoisonError::into_inner);
        let all: Vec<_> = remotes.values().cloned().collect();
        match all.is_empty() {
            true => Err(OperateError::Conflict(
                "no site is paired, whose guests an image could serve; pair one first: farhaven pair".to_owned(),
            )),
            false => Ok(all),
        }
    }

    /// Images stored here, and those that are being stored.
    pub fn images(&self) -> Vec<ImageView> {
        let mut images = Vec::new();
        for remote in self.remotes_of(None).unwrap_or_default() {
            let stored = remote.incoming.store.images().into_iter();
            images.extend(stored.map(|image| view(&remote.record.site, image)));
        }
        let adding = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        images.extend(adding.iter().map(|adding| ImageView {
            name: adding.name.clone(),
            peer: adding.peer.clone(),
            bytes: adding.progress.total.load(Ordering::Relaxed),
            stored_bytes: 0,
            added_at: 0,
            done_bytes: Some(adding.progress.done.load(Ordering::Relaxed)),
        }));
        images.sort_by(|a, b| (&a.name, &a.peer).cmp(&(&b.name, &b.peer)));
        images
    }

    /// Stores a raw image for the guests of one paired site, or of all.
    ///
    /// # Errors
    /// When the file is none, there is no room, or an image of that name is there.
    pub async fn add_image(
        self: &Arc<Self>,
        path: &Path,
        name: &str,
        peer: Option<&str>,
    ) -> Result<Vec<ImageView>, OperateError> {
        let mut stored = Vec::new();
        for remote in self.remotes_of(peer)? {
            let noted = self.note_adding(name, &remote.record.site)?;
            self.has_room_for(path)?;
            let store = remote.incoming.store.clone();
            let (path, name) = (path.to_owned(), name.to_owned());
            let progress = noted.1.clone();
            let work = move || store.add_image(&path, &name, &progress);
            let added = crate::work::spawn_blocking(work).await.map_err(failed)?;
            drop(noted);
            let image = added.map_err(|error| match error {
                ImageError::Local(_) => failed(error),
                other => OperateError::Conflict(other.to_string()),
            })?;
            tracing::info!(
                image = image.name,
                peer = %remote.record.site,
                bytes = image.bytes,
                stored_bytes = image.stored_bytes,
                "an image is stored"
            );
            remote.tell_images().await;
            stored.push(view(&remote.record.site, image));
        }
        Ok(stored)
    }

    fn note_adding(self: &Arc<Self>, name: &str, peer: &str) -> Result<Added, OperateError> {
        let mut adding = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(other) = adding.first() {
            return Err(OperateError::Conflict(format!(
                "image '{}' is being stored; wait for its end: farhaven image list",
                other.name
            )));
        }
        let progress = Arc::new(ImageProgress::default());
        adding.push(Adding {
            name: name.to_owned(),
            peer: peer.to_owned(),
            progress: progress.clone(),
        });
        Ok(Added(self.clone(), progress))
    }

    /// What a file takes on its disk is the most that it takes in the store.
    fn has_room_for(&self, path: &Path) -> Result<(), OperateError> {
        let on_disk = std::fs::metadata(path).map_or(0, |file| file.blocks() * 512);
        let directory = self.config.store_dir();
        let free = bytes_free(&directory);
        let spare = free.saturating_sub(self.config.store.min_free.bytes());
        if on_disk > spare {
            return Err(OperateError::Conflict(format!(
                "{} may take {on_disk} bytes, and {} has {spare} to spare beyond store.min_free; make room there",
                path.display(),
                directory.display()
            )));
        }
        Ok(())
    }

    /// Removes an image; what recovery points refer to of it stays as long as
    /// they do. Their site must be connected: it is told to refer to it no more.
    ///
    /// # Errors
    /// When there is none, or its site cannot be told.
    pub async fn remove_image(
        &self,
        name: &str,
        peer: Option<&str>,
    ) -> Result<Vec<ImageView>, OperateError> {
        let mut removed = Vec::new();
        for remote in self.remotes_of(peer)? {
            let images = remote.incoming.store.images();
            let Some(image) = images.into_iter().find(|image| image.name == name) else {
                continue;
            };
            retention::discard_points(&remote, image.id)
                .await
                .map_err(|why| {
                    OperateError::Failed(format!("image '{name}' is not removed: {why}"))
                })?;
            remote.tell_images().await;
            removed.push(view(&remote.record.site, image));
        }
        match removed.is_empty() {
            true => Err(OperateError::Unknown(format!(
                "no image '{name}' is stored here; see: farhaven image list"
            ))),
            false => Ok(removed),
        }
    }
}
