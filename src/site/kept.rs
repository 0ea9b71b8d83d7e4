//! Points with a name: "before upgrade" stays until somebody releases it.

use std::sync::Arc;

use farhaven_storage_sync::unit::GuestId;
use serde::{Deserialize, Serialize};

use super::Site;
use super::events::EventKind;
use super::operate::{OperateError, failed};
use super::remote::Remote;
use super::standby::Standby;
use crate::replicate::message::{Message, Refusal};

/// A point, by its number or by its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PointChoice {
    /// Its number.
    Number(u64),
    /// Its name.
    Name(String),
}

impl std::str::FromStr for PointChoice {
    type Err = std::convert::Infallible;

    /// What is no number is a name.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text.parse() {
            Ok(number) => Self::Number(number),
            Err(_) => Self::Name(text.to_owned()),
        })
    }
}

impl std::fmt::Display for PointChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Name(name) => write!(f, "\"{name}\""),
        }
    }
}

/// A point that was given a name, or lost it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptPoint {
    /// The guest.
    pub guest: String,
    /// The point.
    pub point: u64,
    /// Its name, while it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl Standby {
    /// The number of a point here.
    pub(super) fn number_of(&self, choice: &PointChoice) -> Result<u64, OperateError> {
        let number = match choice {
            PointChoice::Number(number) => Some(*number),
            PointChoice::Name(name) => {
                let kept = self.remote().incoming.store.kept(self.guest);
                let found = kept.into_iter().find(|(_, of)| of == name);
                found.map(|(number, _)| number)
            }
        };
        let points = self.points();
        let there = number.filter(|number| points.iter().any(|p| p.point == *number));
        there.ok_or_else(|| {
            OperateError::Unknown(format!(
                "there is no point {choice} of '{0}' here; see farhaven points {0}",
                self.name()
            ))
        })
    }

    async fn keep(&self, choice: Option<&PointChoice>, name: &str) -> Result<u64, OperateError> {
        let point = match (choice, self.newest()) {
            (Some(choice), _) => self.number_of(choice)?,
            (None, 0) => {
                return Err(OperateError::Unknown(format!(
                    "'{}' has no recovery point yet",
                    self.name()
                )));
            }
            (None, newest) => newest,
        };
        let (store, guest, name) = (
            self.remote().incoming.store.clone(),
            self.guest,
            name.to_owned(),
        );
        let kept = crate::work::spawn_blocking(move || store.keep_point(guest, point, &name));
        kept.await
            .map_err(failed)?
            .map_err(|error| OperateError::Conflict(error.to_string()))?;
        Ok(point)
    }

    async fn release(&self, choice: &PointChoice) -> Result<u64, OperateError> {
        let point = self.number_of(choice)?;
        let (store, guest) = (self.remote().incoming.store.clone(), self.guest);
        if !store.kept(guest).contains_key(&point) {
            return Err(OperateError::Conflict(format!(
                "point {point} of '{}' has no name: it is kept by its age only",
                self.name()
            )));
        }
        let released = crate::work::spawn_blocking(move || store.release_point(guest, point));
        released.await.map_err(failed)?.map_err(failed)?;
        Ok(point)
    }
}

impl Site {
    /// Gives a point of a guest a name, the newest unless another is chosen: no
    /// prune drops it until it is released. Of a guest that runs here, its peer
    /// is asked to.
    ///
    /// # Errors
    /// When there is no such guest or point, the name cannot be used, or the
    /// peer cannot be asked.
    pub async fn keep_point(
        &self,
        guest: &str,
        point: Option<PointChoice>,
        name: &str,
    ) -> Result<KeptPoint, OperateError> {
        let point = match self.standby_named(guest) {
            Some(standby) => {
                let point = standby.keep(point.as_ref(), name).await?;
                self.note_kept(guest, point, name);
                point
            }
            None => {
                let (remote, id) = self.holder_of(guest)?;
                let name = name.to_owned();
                ask(
                    &remote,
                    Message::KeepPoint {
                        guest: id,
                        point,
                        name,
                    },
                )
                .await?
            }
        };
        Ok(KeptPoint {
            guest: guest.to_owned(),
            point,
            name: Some(name.to_owned()),
        })
    }

    /// Takes a point's name from it: it stays as long as any other.
    ///
    /// # Errors
    /// As for [`Site::keep_point`].
    pub async fn release_point(
        &self,
        guest: &str,
        point: PointChoice,
    ) -> Result<KeptPoint, OperateError> {
        let point = match self.standby_named(guest) {
            Some(standby) => {
                let point = standby.release(&point).await?;
                self.note_released(guest, point);
                point
            }
            None => {
                let (remote, id) = self.holder_of(guest)?;
                ask(&remote, Message::ReleasePoint { guest: id, point }).await?
            }
        };
        Ok(KeptPoint {
            guest: guest.to_owned(),
            point,
            name: None,
        })
    }

    /// The number of a point of a guest that is kept here.
    ///
    /// # Errors
    /// When there is no such guest or point here.
    pub fn point_number(
        &self,
        guest: &str,
        point: Option<&PointChoice>,
    ) -> Result<Option<u64>, OperateError> {
        let of = |choice| self.standby_here(guest)?.number_of(choice);
        point.map(of).transpose()
    }

    /// The peer that holds the points of a guest that runs here.
    fn holder_of(&self, name: &str) -> Result<(Arc<Remote>, GuestId), OperateError> {
        let record = self.guest(name)?;
        let peer = self.source_view(&record).peer.ok_or_else(|| {
            OperateError::Conflict(format!(
                "'{name}' is not protected, so it has no recovery points; run: farhaven protect {name} --to SITE"
            ))
        })?;
        let remote = self.remote(&peer).ok_or_else(|| self.no_peer(&peer))?;
        Ok((remote, record.id))
    }

    fn note_kept(&self, guest: &str, point: u64, name: &str) {
        let what = format!("point {point} of '{guest}' is kept as \"{name}\"");
        self.note(EventKind::PointKept, guest, &what);
    }

    fn note_released(&self, guest: &str, point: u64) {
        let what = format!("point {point} of '{guest}' has no name any more");
        self.note(EventKind::PointReleased, guest, &what);
    }
}

async fn ask(remote: &Remote, question: Message) -> Result<u64, OperateError> {
    match remote.ask(question).await.map_err(failed)? {
        Message::KeptPoint { point } => Ok(point),
        _ => Err(failed(format!(
            "site '{}' did not understand; do both sites run the same version?",
            remote.record.site
        ))),
    }
}

/// A source asks for a point of its guest to be kept or released.
pub(super) async fn answer(
    site: &Site,
    remote: &Arc<Remote>,
    guest: GuestId,
    point: Option<PointChoice>,
    name: Option<String>,
) -> Message {
    let Some(standby) = site.standby_of(remote, guest) else {
        return super::answer::refused(Refusal::OutOfStep, "this guest has not been opened here");
    };
    let of = standby.name();
    let done = match (name, point) {
        (Some(name), point) => {
            let kept = standby.keep(point.as_ref(), &name).await;
            kept.inspect(|point| site.note_kept(&of, *point, &name))
        }
        (None, Some(point)) => {
            let released = standby.release(&point).await;
            released.inspect(|point| site.note_released(&of, *point))
        }
        (None, None) => Err(OperateError::Conflict("name a point".to_owned())),
    };
    match done {
        Ok(point) => Message::KeptPoint { point },
        Err(error) => super::answer::refused(Refusal::Unable, error),
    }
}
