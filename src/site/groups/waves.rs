//! The guests of a group are started in waves: one that starts after others
//! waits until those are healthy, by their checks in the group's policy file.
//! Whether it starts all the same when they are not is for that file to say.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;

use farhaven_policies::files::OnError;

use super::{GroupRecord, NamedMember};
use crate::site::health::{self, About, CheckView};
use crate::site::{Site, networks};

/// What starts a guest.
pub(super) type Start<T> = Pin<Box<dyn Future<Output = Result<T, String>> + Send>>;

/// What became of the start of a guest.
pub(super) struct Started<T> {
    pub(super) member: NamedMember,
    /// Why it does not run, or that it was not started because of another.
    pub(super) ran: Result<T, String>,
    pub(super) checks: Vec<CheckView>,
}

/// How the guests of a group are started.
pub(super) struct Waves<'a> {
    pub(super) group: &'a GroupRecord,
    /// `failover`, `test`, `move` or `rollback`.
    pub(super) mode: &'static str,
    /// They are on no network.
    pub(super) isolated: bool,
    /// Nobody is waited for.
    pub(super) unchecked: bool,
    /// How the rest is started later, for people.
    pub(super) go_on: String,
}

impl Waves<'_> {
    /// Starts them, and answers in the same order.
    pub(super) async fn start<T: Send + 'static>(
        &self,
        site: &Arc<Site>,
        starting: Vec<(NamedMember, Start<T>)>,
    ) -> Vec<Started<T>> {
        let mut waves: BTreeMap<usize, Vec<(NamedMember, Start<T>)>> = BTreeMap::new();
        for (member, start) in starting {
            waves.entry(member.wave).or_default().push((member, start));
        }
        let stops = self.group.owed.on_error == OnError::Stop && !self.unchecked;
        // By the names of the policy file, which `after` has, too.
        let mut unhealthy: BTreeSet<String> = BTreeSet::new();
        let mut done = Vec::new();
        for wave in waves.into_values() {
            let mut works = Vec::new();
            for (member, start) in wave {
                let named = self.name_in_file(&member);
                let lacks = member.terms.after.iter().find(|a| unhealthy.contains(*a));
                if let Some(after) = lacks.filter(|_| stops) {
                    let why = format!(
                        "not started: it starts after '{after}', which is not healthy. {}",
                        self.go_on
                    );
                    unhealthy.insert(named);
                    works.push((member, None, why));
                    continue;
                }
                let about = About {
                    guest: member.name.clone(),
                    group: self.group.name.clone(),
                    mode: self.mode,
                    addresses: networks::addresses(&member.terms, &site.config.site.name),
                    isolated: self.isolated,
                    own_programs: site.own_programs(self.group, &named),
                    standby: site.standby_named(&member.name),
                };
                let checks = match self.unchecked {
                    true => BTreeMap::new(),
                    false => member.terms.health.clone(),
                };
                let work = tokio::spawn(async move {
                    let ran = start.await?;
                    Ok((ran, health::healthy(&about, &checks, || true).await))
                });
                works.push((member, Some(work), String::new()));
            }
            for (member, work, why) in works {
                let ended = match work {
                    Some(work) => work.await.unwrap_or_else(|e| {
                        Err(format!("its start ended early: {e}; see the log"))
                    }),
                    None => Err(why),
                };
                let (ran, checks) = match ended {
                    Ok((ran, checks)) => (Ok(ran), checks),
                    Err(why) => (Err(why), Vec::new()),
                };
                if let Some(fault) = health::fault(&checks) {
                    tracing::warn!(guest = member.name, fault, "it is not healthy");
                }
                if ran.is_err() || health::fault(&checks).is_some() {
                    unhealthy.insert(self.name_in_file(&member));
                }
                done.push(Started {
                    member,
                    ran,
                    checks,
                });
            }
        }
        done
    }

    fn name_in_file(&self, member: &NamedMember) -> String {
        let members = self.group.members.iter();
        let mut named = members.filter(|(_, m)| m.guest == member.guest);
        named
            .next()
            .map_or_else(|| member.name.clone(), |(name, _)| name.clone())
    }
}

impl Site {
    /// A guest's checks whose program this site's own policy files name.
    pub(in crate::site) fn own_programs(&self, group: &GroupRecord, guest: &str) -> Vec<String> {
        let told = group.members.get(guest).map(|member| &member.terms.health);
        let files = self.policies.files();
        let own = files
            .as_ref()
            .and_then(|files| files.value.groups.get(&group.name))
            .and_then(|group| group.guests.get(guest));
        let Some((told, own)) = told.zip(own) else {
            return Vec::new();
        };
        let same = told
            .iter()
            .filter(|(name, health)| own.health.get(*name) == Some(health));
        same.map(|(name, _)| name.clone()).collect()
    }
}
