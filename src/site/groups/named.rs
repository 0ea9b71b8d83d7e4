//! A group's point with a name: the points of all of its guests are kept under it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::GroupPointView;
use crate::site::Site;
use crate::site::kept::PointChoice;
use crate::site::operate::OperateError;

/// A group's point that was given a name, or lost it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptGroupPoint {
    /// The group.
    pub group: String,
    /// The number of the cut.
    pub cut: u64,
    /// Each guest's own point.
    pub points: BTreeMap<String, u64>,
    /// Its name, while it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl Site {
    /// Gives a whole point of a group a name, the newest unless another is chosen:
    /// no prune drops any guest's part of it until it is released. All of them
    /// get it, or none.
    ///
    /// # Errors
    /// When there is no such group or whole point, the name cannot be used or
    /// names another point of one of its guests, or the peer cannot be asked.
    pub async fn keep_group_point(
        &self,
        group: &str,
        point: Option<PointChoice>,
        name: &str,
    ) -> Result<KeptGroupPoint, OperateError> {
        let chosen = self.group_point(group, point.as_ref()).await?;
        let mut named = Vec::new();
        for (guest, number) in &chosen.points {
            let number = PointChoice::Number(*number);
            match self.keep_point(guest, Some(number.clone()), name).await {
                Ok(_) => named.push((guest, number)),
                Err(error) => {
                    // What had that very name before keeps it.
                    let undone = if chosen.name.is_none() {
                        named
                    } else {
                        Vec::new()
                    };
                    for (guest, number) in undone {
                        if let Err(error) = self.release_point(guest, number).await {
                            tracing::warn!(guest, %error, "a point of it keeps the name");
                        }
                    }
                    return Err(error);
                }
            }
        }
        Ok(KeptGroupPoint {
            group: group.to_owned(),
            cut: chosen.cut,
            points: chosen.points,
            name: Some(name.to_owned()),
        })
    }

    /// Takes the name from a group's point: it stays as long as any other.
    ///
    /// # Errors
    /// As for [`Site::keep_group_point`], and when it has none.
    pub async fn release_group_point(
        &self,
        group: &str,
        point: PointChoice,
    ) -> Result<KeptGroupPoint, OperateError> {
        let chosen = self.group_point(group, Some(&point)).await?;
        if chosen.name.is_none() {
            return Err(OperateError::Conflict(format!(
                "point {} of group '{group}' has no name: it is kept by its age only",
                chosen.cut
            )));
        }
        for (guest, number) in &chosen.points {
            self.release_point(guest, PointChoice::Number(*number))
                .await?;
        }
        Ok(KeptGroupPoint {
            group: group.to_owned(),
            cut: chosen.cut,
            points: chosen.points,
            name: None,
        })
    }

    /// A whole point of a group, by its cut's number or its name; else the newest.
    async fn group_point(
        &self,
        group: &str,
        choice: Option<&PointChoice>,
    ) -> Result<GroupPointView, OperateError> {
        let points = self.group_points(group).await?;
        let found = match choice {
            None => points.into_iter().next_back(),
            Some(choice) => points.into_iter().find(|point| point.is(choice)),
        };
        found.ok_or_else(|| {
            let which = choice.map_or_else(String::new, |choice| format!(" {choice}"));
            OperateError::Unknown(format!(
                "there is no whole point{which} of group '{group}'; see farhaven points {group}"
            ))
        })
    }
}

impl GroupPointView {
    /// Is it the one that is chosen by its cut's number, or by its name?
    pub fn is(&self, choice: &PointChoice) -> bool {
        match choice {
            PointChoice::Number(cut) => self.cut == *cut,
            PointChoice::Name(name) => self.name.as_ref() == Some(name),
        }
    }
}
