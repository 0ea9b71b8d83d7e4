//! What a step can do: the kinds, their own keys, and what is true of each
//! whatever the runbook says: where it may run, how long it may take, whether
//! it may be repeated, how it is undone.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Mode;
use crate::units::Period;

/// What a step does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(
    tag = "do",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case"
)]
pub enum Action {
    /// Looks whether what follows can succeed; changes nothing.
    Check {
        /// What is looked at; all that can be in the mode if not given.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        checks: Vec<Readiness>,
    },
    /// Waits for named people's decision.
    Approve {
        /// Who may decide; "*" is whoever may operate the site.
        by: Vec<String>,
        /// How many of them must agree; one refusal is enough to refuse.
        #[serde(default = "one")]
        approvals: u8,
        /// What they are asked.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        message: String,
    },
    /// The guest agents freeze the filesystems for the next cut.
    Quiesce,
    /// The guests are shut down at the source, in reverse start order.
    ShutdownSource,
    /// The last changes are sealed at the target; the source holds its guests from then on.
    FinalSync,
    /// The next term is taken: the source never runs these guests again.
    Fence,
    /// The point's memory and disks are made ready to run here.
    Promote {
        /// From which point.
        #[serde(default)]
        #[schemars(with = "PointText")]
        point: PointChoice,
    },
    /// The guests get this site's networks.
    Remap {
        /// Other bridges than the policy says, by the network's name.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        networks: BTreeMap<String, String>,
    },
    /// The guests run, in start order.
    StartGroup,
    /// Waits until the guests are healthy: by one of these, or else by their own checks.
    WaitHealthy {
        /// `host:port` that accepts a connection.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tcp: Option<String>,
        /// A URL that answers with a status from 200 to 399.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        http: Option<String>,
        /// The guest agent answers.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        agent: Option<bool>,
        /// A program of the site, with its arguments, that ends with status 0.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        script: Option<Vec<String>>,
        /// Time from one try to the next.
        #[serde(default = "every")]
        every: Period,
    },
    /// Runs a program of the site.
    Exec {
        /// Its absolute path and its arguments.
        run: Vec<String>,
        /// What undoes it, the same way.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        undo: Vec<String>,
        /// It may run twice: it knows the key it is given, or does no harm.
        #[serde(default)]
        repeatable: bool,
    },
    /// Calls a URL.
    Webhook {
        /// Where.
        url: String,
        /// How.
        #[serde(default)]
        method: Method,
        /// What is sent.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        body: String,
        /// What is called, with the same method and body, to undo it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        undo: Option<String>,
        /// It may be called twice: the receiver knows the key, or it does no harm.
        #[serde(default)]
        repeatable: bool,
    },
    /// Waits.
    Delay {
        /// How long.
        #[serde(rename = "for")]
        period: Period,
    },
    /// The groups stay where they are: there is no way back from here.
    Commit,
    /// The groups return to their source.
    Rollback,
    /// Protection turns round; only what differs is sent.
    Reprotect,
    /// The test and all it wrote are removed.
    Cleanup,
}

const fn one() -> u8 {
    1
}

/// Time from one health check to the next, unless said otherwise.
pub(super) const fn every() -> Period {
    Period::from_secs(2)
}

/// Something that is looked at before a run goes on.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Readiness {
    /// There is a sealed point to run from.
    Point,
    /// The newest is no older than the policy's RPO.
    Rpo,
    /// The target has the memory and disk for the guests.
    Room,
    /// Every network of the guests is mapped at the target.
    Networks,
    /// The other site answers.
    Link,
    /// The target can build each guest: programs, files, CPU model.
    Definition,
}

impl Readiness {
    /// All of them.
    pub const ALL: [Readiness; 6] = [
        Readiness::Point,
        Readiness::Rpo,
        Readiness::Room,
        Readiness::Networks,
        Readiness::Link,
        Readiness::Definition,
    ];

    /// As in a file.
    pub const fn word(self) -> &'static str {
        match self {
            Readiness::Point => "point",
            Readiness::Rpo => "rpo",
            Readiness::Room => "room",
            Readiness::Networks => "networks",
            Readiness::Link => "link",
            Readiness::Definition => "definition",
        }
    }
}

/// A recovery point to run from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "PointText", into = "PointText")]
pub enum PointChoice {
    /// The newest sealed one.
    #[default]
    Newest,
    /// The one of this number.
    Number(u64),
}

/// As in a file: the word newest, or a number.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
enum PointText {
    Word(PointWord),
    Number(u64),
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum PointWord {
    Newest,
}

impl From<PointText> for PointChoice {
    fn from(text: PointText) -> PointChoice {
        match text {
            PointText::Word(PointWord::Newest) => PointChoice::Newest,
            PointText::Number(number) => PointChoice::Number(number),
        }
    }
}

impl From<PointChoice> for PointText {
    fn from(point: PointChoice) -> PointText {
        match point {
            PointChoice::Newest => PointText::Word(PointWord::Newest),
            PointChoice::Number(number) => PointText::Number(number),
        }
    }
}

/// How a URL is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Method {
    /// GET
    Get,
    /// POST
    #[default]
    Post,
    /// PUT
    Put,
}

impl Method {
    /// All of them.
    pub const ALL: [Method; 3] = [Method::Get, Method::Post, Method::Put];

    /// As in a file.
    pub const fn word(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Post => "POST",
            Method::Put => "PUT",
        }
    }
}

/// An action without its own keys.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "each is the action of the same name")]
pub enum Kind {
    Check,
    Approve,
    Quiesce,
    ShutdownSource,
    FinalSync,
    Fence,
    Promote,
    Remap,
    StartGroup,
    WaitHealthy,
    Exec,
    Webhook,
    Delay,
    Commit,
    Rollback,
    Reprotect,
    Cleanup,
}

impl Action {
    /// Which kind it is.
    pub const fn kind(&self) -> Kind {
        match self {
            Action::Check { .. } => Kind::Check,
            Action::Approve { .. } => Kind::Approve,
            Action::Quiesce => Kind::Quiesce,
            Action::ShutdownSource => Kind::ShutdownSource,
            Action::FinalSync => Kind::FinalSync,
            Action::Fence => Kind::Fence,
            Action::Promote { .. } => Kind::Promote,
            Action::Remap { .. } => Kind::Remap,
            Action::StartGroup => Kind::StartGroup,
            Action::WaitHealthy { .. } => Kind::WaitHealthy,
            Action::Exec { .. } => Kind::Exec,
            Action::Webhook { .. } => Kind::Webhook,
            Action::Delay { .. } => Kind::Delay,
            Action::Commit => Kind::Commit,
            Action::Rollback => Kind::Rollback,
            Action::Reprotect => Kind::Reprotect,
            Action::Cleanup => Kind::Cleanup,
        }
    }

    /// Whether it may be performed again when nobody knows whether it was
    /// performed: after a restart, or when the other site was lost meanwhile.
    pub const fn is_repeatable(&self) -> bool {
        match self {
            Action::Exec { repeatable, .. } | Action::Webhook { repeatable, .. } => *repeatable,
            _ => true,
        }
    }

    /// What a rollback does about it; None where there is nothing to undo.
    pub fn undo(&self, mode: Mode) -> Option<&'static str> {
        Some(match (self, mode) {
            (Action::Quiesce, _) => "freeze nothing for the last cut",
            (Action::ShutdownSource, _) => "start the guests at the source again",
            // A test never touched the source.
            (_, Mode::Test) if self.kind().refused_in(mode).is_some() => return None,
            (Action::FinalSync, _) => "let the source's guests go on",
            (Action::Fence, _) => "give the groups back to their source, under a newer term",
            (Action::Promote { .. }, _) => "discard what was made ready here",
            (Action::Remap { .. }, _) => "drop the networks",
            (Action::StartGroup, _) => "stop the guests here and discard what they wrote",
            (Action::Exec { undo, .. }, _) if !undo.is_empty() => "run its undo program",
            (Action::Webhook { undo: Some(_), .. }, _) => "call its undo URL",
            _ => return None,
        })
    }
}

impl Kind {
    /// All of them, in the order in which they usually come.
    pub const ALL: [Kind; 17] = [
        Kind::Check,
        Kind::Approve,
        Kind::Quiesce,
        Kind::ShutdownSource,
        Kind::FinalSync,
        Kind::Fence,
        Kind::Promote,
        Kind::Remap,
        Kind::StartGroup,
        Kind::WaitHealthy,
        Kind::Exec,
        Kind::Webhook,
        Kind::Delay,
        Kind::Commit,
        Kind::Rollback,
        Kind::Reprotect,
        Kind::Cleanup,
    ];

    /// As in a file.
    pub const fn word(self) -> &'static str {
        match self {
            Kind::Check => "check",
            Kind::Approve => "approve",
            Kind::Quiesce => "quiesce",
            Kind::ShutdownSource => "shutdown-source",
            Kind::FinalSync => "final-sync",
            Kind::Fence => "fence",
            Kind::Promote => "promote",
            Kind::Remap => "remap",
            Kind::StartGroup => "start-group",
            Kind::WaitHealthy => "wait-healthy",
            Kind::Exec => "exec",
            Kind::Webhook => "webhook",
            Kind::Delay => "delay",
            Kind::Commit => "commit",
            Kind::Rollback => "rollback",
            Kind::Reprotect => "reprotect",
            Kind::Cleanup => "cleanup",
        }
    }

    /// Keys that steps of this kind have beside those of every step.
    pub const fn keys(self) -> &'static [&'static str] {
        match self {
            Kind::Check => &["checks"],
            Kind::Approve => &["by", "approvals", "message"],
            Kind::Promote => &["point"],
            Kind::Remap => &["networks"],
            Kind::WaitHealthy => &["tcp", "http", "agent", "script", "every"],
            Kind::Exec => &["run", "undo", "repeatable"],
            Kind::Webhook => &["url", "method", "body", "undo", "repeatable"],
            Kind::Delay => &["for"],
            _ => &[],
        }
    }

    /// Why it has no place in this mode; None where it has.
    pub const fn refused_in(self, mode: Mode) -> Option<&'static str> {
        Some(match (self, mode) {
            (Kind::Quiesce, Mode::Unplanned) => "the source is lost, nobody is there to freeze",
            (Kind::ShutdownSource, Mode::Test) => "a test leaves the source alone",
            (Kind::FinalSync, Mode::Test) => "a test leaves the source alone; it runs from a point",
            (Kind::Fence, Mode::Test) => "a test takes no term: the source goes on",
            (Kind::Commit, Mode::Test) => "a test never stays; use cleanup",
            (Kind::Rollback, Mode::Test) => "the source never stopped; use cleanup",
            (Kind::Reprotect, Mode::Test) => "protection never stopped",
            (Kind::Cleanup, Mode::Planned | Mode::Unplanned) => {
                "it discards what runs here; that is for tests alone"
            }
            _ => return None,
        })
    }

    /// In which modes it runs when a step does not say. What reaches outside
    /// of the sites does not run in tests unless it says so.
    pub const fn default_modes(self) -> &'static [Mode] {
        match self {
            Kind::Exec | Kind::Webhook => &[Mode::Planned, Mode::Unplanned],
            Kind::Quiesce | Kind::FinalSync => &[Mode::Planned],
            Kind::ShutdownSource => &[Mode::Planned],
            Kind::Fence => &[Mode::Unplanned],
            Kind::Commit | Kind::Rollback | Kind::Reprotect => &[Mode::Planned, Mode::Unplanned],
            Kind::Cleanup => &[Mode::Test],
            _ => &Mode::ALL,
        }
    }

    /// How long it may take when a step does not say; None where it must say,
    /// or ends by itself.
    pub const fn timeout(self) -> Option<Period> {
        let secs = match self {
            Kind::Approve | Kind::Delay => return None,
            Kind::Quiesce | Kind::Webhook => 30,
            Kind::Check | Kind::Fence | Kind::Remap | Kind::Exec => 60,
            Kind::ShutdownSource | Kind::Promote | Kind::StartGroup | Kind::WaitHealthy => 300,
            Kind::Commit | Kind::Cleanup => 300,
            Kind::Rollback | Kind::Reprotect => 600,
            Kind::FinalSync => 1800,
        };
        Some(Period::from_secs(secs))
    }

    /// Whether steps of this kind act on groups.
    pub const fn takes_group(self) -> bool {
        !matches!(
            self,
            Kind::Approve | Kind::Exec | Kind::Webhook | Kind::Delay
        )
    }

    /// Whether they may act on some guests of a group alone. All else takes a
    /// group as a whole, as it was cut.
    pub const fn takes_guests(self) -> bool {
        matches!(self, Kind::StartGroup | Kind::WaitHealthy)
    }

    /// Whether it is waited for when the other site does not answer, as long as
    /// its time lasts. (A run is conducted at the target; the other site is the
    /// source.) Where the source is taken to be lost, nobody waits for what is
    /// tried on the chance that it lives.
    pub const fn waits_for_source(self, mode: Mode) -> bool {
        match self {
            Kind::Rollback | Kind::Reprotect => true,
            Kind::Quiesce | Kind::ShutdownSource | Kind::FinalSync | Kind::Fence => {
                !matches!(mode, Mode::Unplanned)
            }
            _ => false,
        }
    }
}
