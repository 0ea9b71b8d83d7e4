//! `farhaven group`: protection groups, this site's own and those of its peers.

use clap::Subcommand;
use comfy_table::{Cell, Color};

use super::show::{millis, table};
use super::{Json, Outcome, escaped, print_json, told};
use crate::client::Client;
use crate::site::groups::{GroupView, PolicyFilesView};

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

/// For `status`, too.
pub(super) fn list(groups: &[GroupView]) {
    if groups.is_empty() {
        return;
    }
    let mut rows = table(&["Group", "From", "To", "Policy", "RPO target", "Guests"]);
    for group in groups {
        let guests: Vec<_> = group.members.iter().map(|m| m.name.as_str()).collect();
        rows.add_row(vec![
            Cell::new(&group.name),
            Cell::new(group.from.as_deref().unwrap_or("here")),
            Cell::new(&group.peer),
            Cell::new(&group.policy),
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
