//! What came of something that was done with all guests of a group, one by one.

use serde::{Deserialize, Serialize};

use super::NamedMember;

/// What was done with a group's guests, and what remains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupDone<T> {
    /// The group.
    pub group: String,
    /// Its guests, in the order in which they start.
    pub members: Vec<MemberDone<T>>,
    /// What remains to be done, and how; empty when nothing does.
    pub remains: String,
}

/// What was done with one of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemberDone<T> {
    /// Its name.
    pub guest: String,
    /// Guests of a wave start together, those of wave 0 first.
    pub wave: usize,
    /// What was done; none when there was nothing to do, or it failed.
    pub report: Option<T>,
    /// Why it failed, and what to do; empty when it did not.
    pub error: String,
    /// What else there is to say; empty for nothing.
    pub note: String,
}

impl<T> MemberDone<T> {
    pub(super) fn of(member: &NamedMember, done: Result<T, impl ToString>) -> Self {
        let (report, error) = match done {
            Ok(report) => (Some(report), String::new()),
            Err(error) => (None, error.to_string()),
        };
        Self {
            guest: member.name.clone(),
            wave: member.wave,
            report,
            error,
            note: String::new(),
        }
    }

    /// There was nothing to do.
    pub(super) fn left(member: &NamedMember, note: impl Into<String>) -> Self {
        Self {
            guest: member.name.clone(),
            wave: member.wave,
            report: None,
            error: String::new(),
            note: note.into(),
        }
    }
}

impl<T> GroupDone<T> {
    /// `again` is how to go on, where something failed.
    pub(super) fn of(group: &str, members: Vec<MemberDone<T>>, again: &str) -> Self {
        let failed: Vec<&str> = members
            .iter()
            .filter(|member| !member.error.is_empty())
            .map(|member| member.guest.as_str())
            .collect();
        let remains = match failed.as_slice() {
            [] => String::new(),
            failed => format!(
                "{} of {} guests remain ({}), for the reasons told of each; the others are done, and stay so. {again}",
                failed.len(),
                members.len(),
                failed.join(", ")
            ),
        };
        Self {
            group: group.to_owned(),
            members,
            remains,
        }
    }
}
