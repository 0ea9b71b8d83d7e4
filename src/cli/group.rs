//! `farhaven group`: protection groups, this site's own and those of its peers.

use clap::Subcommand;
use comfy_table::{Cell, Color};

use super::show::{self, consistency, millis, table};
use super::{Json, Outcome, escaped, print_json, told};
use crate::client::Client;
use crate::site::api::{KeepPoint, ReleasePoint};
use crate::site::groups::{
    FailOverGroup, GroupFailover, GroupPointView, GroupView, KeptGroupPoint, PolicyFilesView,
};
use crate::site::kept::PointChoice;

pub(super) mod all;
pub(super) mod moved;

#[derive(Debug, Subcommand)]
pub(super) enum GroupVerb {
    /// All groups that are known here.
    List(Json),
    /// One group: its guests in the order in which they start, and what it is owed.
    Show {
        /// The group.
        name: String,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

pub(super) async fn run(client: &Client, verb: GroupVerb) -> Outcome {
    match verb {
        GroupVerb::List(Json { json }) => {
            let groups: Vec<GroupView> = client.get("/v1/groups").await.map_err(told)?;
            if json {
                return print_json(&groups);
            }
            if groups.is_empty() {
                say!(
                    "No group is known here. Groups are defined in policy files, which site.policy_files of the site's configuration names."
                );
            }
            list(&groups);
            Ok(())
        }
        GroupVerb::Show { name, json } => {
            let path = format!("/v1/groups/{}", escaped(&name));
            let group: GroupView = client.get(&path).await.map_err(told)?;
            if json {
                return print_json(&group);
            }
            show(&group);
            Ok(())
        }
    }
}

/// Does this name stand for a group? A daemon that cannot be asked is told of
/// by what is asked next.
pub(super) async fn is_group(client: &Client, name: &str) -> bool {
    members(client, name).await.is_some()
}

/// The guests of the group of this name, if there is one.
pub(super) async fn members(client: &Client, name: &str) -> Option<Vec<String>> {
    let path = format!("/v1/groups/{}", escaped(name));
    let group = client.get::<GroupView>(&path).await.ok()?;
    Some(
        group
            .members
            .into_iter()
            .map(|member| member.name)
            .collect(),
    )
}

pub(super) async fn keep(client: &Client, name: &str, body: &KeepPoint, json: bool) -> Outcome {
    let path = format!("/v1/groups/{}/points/keep", escaped(name));
    let kept: KeptGroupPoint = client.post(&path, body).await.map_err(told)?;
    if json {
        return print_json(&kept);
    }
    let called = kept.name.unwrap_or_default();
    say!(
        "Point {} of group '{name}' is kept as \"{called}\".",
        kept.cut
    );
    say!(
        "Run it one day: farhaven failover {name} --point \"{called}\"; let it go: farhaven point release {name} --point \"{called}\""
    );
    Ok(())
}

pub(super) async fn release(
    client: &Client,
    name: &str,
    body: &ReleasePoint,
    json: bool,
) -> Outcome {
    let path = format!("/v1/groups/{}/points/release", escaped(name));
    let kept: KeptGroupPoint = client.post(&path, body).await.map_err(told)?;
    if json {
        return print_json(&kept);
    }
    say!(
        "Point {} of group '{name}' stays as long as any other.",
        kept.cut
    );
    Ok(())
}

pub(super) async fn points(client: &Client, name: &str, json: bool) -> Outcome {
    let path = format!("/v1/groups/{}/points", escaped(name));
    let points: Vec<GroupPointView> = client.get(&path).await.map_err(told)?;
    if json {
        return print_json(&points);
    }
    if points.is_empty() {
        say!(
            "No point of all guests of group '{name}' is sealed yet; each guest's own: farhaven points GUEST"
        );
        return Ok(());
    }
    let mut rows = table(&[
        "Cut",
        "Cut at",
        "Age",
        "Skew",
        "Pause",
        "Consistent",
        "Points",
        "Name",
    ]);
    for point in &points {
        let of: Vec<_> = point
            .points
            .iter()
            .map(|(guest, number)| format!("{guest} {number}"))
            .collect();
        rows.add_row(vec![
            point.cut.to_string(),
            point.cut_at.chars().take(23).collect::<String>() + "Z",
            millis(point.age_ms),
            format!("{:.2} ms", point.skew_ms),
            format!("{:.1} ms", point.pause_ms),
            consistency(point.quiesced).to_owned(),
            of.join(", "),
            point.name.clone().unwrap_or_default(),
        ]);
    }
    say!("{rows}");
    Ok(())
}

/// The number of a group's cut, which may be given by the name of its point.
pub(super) async fn cut_of(
    client: &Client,
    name: &str,
    point: Option<PointChoice>,
) -> Result<Option<u64>, String> {
    let choice = match point {
        None => return Ok(None),
        Some(PointChoice::Number(cut)) => return Ok(Some(cut)),
        Some(choice) => choice,
    };
    let path = format!("/v1/groups/{}/points", escaped(name));
    let points: Vec<GroupPointView> = client.get(&path).await.map_err(|e| e.to_string())?;
    match points.iter().find(|point| point.is(&choice)) {
        Some(point) => Ok(Some(point.cut)),
        None => Err(format!(
            "there is no whole point {choice} of group '{name}'; see farhaven points {name}"
        )),
    }
}

pub(super) async fn failover(
    client: &Client,
    name: &str,
    how: FailOverGroup,
    json: bool,
) -> Outcome {
    let path = format!("/v1/groups/{}/failover", escaped(name));
    let asked = client.post(&path, &how);
    let what = format!("taking group '{name}' over");
    let done: GroupFailover = super::guests::waiting(what, asked).await.map_err(told)?;
    let failed = done.members.iter().filter(|m| m.report.is_none()).count();
    let unhealthy = done
        .members
        .iter()
        .filter(|m| m.report.as_ref().is_some_and(|r| !r.note.is_empty()))
        .count();
    if json {
        print_json(&done)?;
    } else {
        say!(
            "Group '{name}' from cut {}: lost (RPO) {}, until it ran (RTO) {:.0} ms, until it was looked at {:.0} ms",
            done.cut,
            millis(done.rpo_ms),
            done.rto_ms,
            done.checked_ms
        );
        for member in &done.members {
            match &member.report {
                Some(report) => show::failover(report),
                None => say!("! '{}' does not run here: {}", member.guest, member.error),
            }
            all::not_passed(&member.guest, &member.checks);
        }
    }
    match (failed, unhealthy) {
        (0, 0) => Ok(()),
        (0, bad) => Err(format!(
            "all of its guests run here, and {bad} are not healthy"
        )),
        (failed, _) => Err(format!("{failed} of its guests do not run here")),
    }
}

/// For `status`, too.
pub(super) fn list(groups: &[GroupView]) {
    if groups.is_empty() {
        return;
    }
    let mut rows = table(&["Group", "From", "To", "Policy", "RPO", "Target", "Guests"]);
    for group in groups {
        let guests: Vec<_> = group.members.iter().map(|m| m.name.as_str()).collect();
        rows.add_row(vec![
            Cell::new(&group.name),
            Cell::new(group.from.as_deref().unwrap_or("here")),
            Cell::new(&group.peer),
            Cell::new(&group.policy),
            Cell::new(group.rpo_ms.map_or("-".to_owned(), millis)),
            Cell::new(group.owed.rpo.to_string()),
            Cell::new(guests.join(", ")),
        ]);
    }
    say!("{rows}");
    for group in groups.iter().filter(|group| !group.trouble.is_empty()) {
        say!("! {}: {}", group.name, group.trouble);
    }
}

/// What hinders policy files, for `status`.
pub(super) fn policy_files(files: &PolicyFilesView) {
    if !files.trouble.is_empty() {
        say!("! {}", files.trouble);
    }
    for (group, why) in &files.waiting {
        say!("! group '{group}' is not in force as a whole: {why}");
    }
}

fn show(group: &GroupView) {
    let from = group.from.as_deref().map_or_else(
        || format!("protected to '{}'", group.peer),
        |from| format!("of site '{from}', protected to here"),
    );
    say!("Group '{}' ({}), {from}", group.name, group.id);
    let owed = &group.owed;
    say!("  policy                {}", group.policy);
    say!("  RPO                   {}", owed.rpo);
    say!("  kept                  {}", owed.retention);
    say!("  bandwidth             {}", owed.bandwidth);
    say!("  priority              {}", owed.priority);
    let mut rows = table(&["Wave", "Guest", "State", "Point", "RPO", "After", "Checks"]);
    for member in &group.members {
        let state = Cell::new(&member.state);
        let point = match member.newest_point {
            0 => "-".to_owned(),
            point => point.to_string(),
        };
        rows.add_row(vec![
            Cell::new(member.wave + 1),
            Cell::new(&member.name),
            match member.state.as_str() {
                "unknown" => state.fg(Color::Red),
                _ => state,
            },
            Cell::new(point),
            Cell::new(member.rpo_ms.map_or("-".to_owned(), millis)),
            Cell::new(member.after.join(", ")),
            Cell::new(member.checks),
        ]);
    }
    say!("{rows}");
    if !group.trouble.is_empty() {
        say!("! {}", group.trouble);
    }
}
