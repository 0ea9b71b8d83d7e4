//! Looks whether what follows can succeed; changes nothing.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use farhaven_policies::runbook::{Mode, Readiness};

use super::facts::{Seen, now_ms};
use super::perform::AtSite;
use super::points::{by_group, whole_point};
use super::targets::Target;
use crate::activate::point::boots;
use crate::activate::warm::ram_file;
use crate::guest::Definition;
use crate::guest::qemu::check::{Finding, Severity};
use crate::guest::qemu::peer::check_peer;
use crate::runbook::perform::{Checked, Ended, Failure, Scope};
use crate::site::drill::free_memory;
use crate::site::groups::GroupPointView;
use crate::site::remote::Remote;
use crate::site::{Site, age};

/// Memory that is left to the host beside a guest's RAM.
const BESIDE: u64 = 128 << 20;

/// A link that is down is waited for that long.
const LINK: Duration = Duration::from_secs(20);

/// What is looked at in a mode when the step does not say. Not the RPO: a planned
/// move sends the rest, and after a disaster it grows while people decide.
fn all_in(mode: Mode) -> Vec<Readiness> {
    use Readiness::{Definition, Link, Networks, Point, Room};
    match mode {
        Mode::Test => vec![Point, Room, Definition],
        Mode::Planned => vec![Point, Room, Networks, Link, Definition],
        Mode::Unplanned => vec![Point, Room, Networks, Definition],
    }
}

/// All that is asked for, of every guest; fails when anything is not as it should be.
pub(super) async fn check(run: &AtSite, scope: &Scope, checks: &[Readiness]) -> Ended<Checked> {
    let site = run.site()?;
    let asked = match checks {
        [] => all_in(scope.mode),
        checks => checks.to_vec(),
    };
    let (mut seen, mut wrong) = (Vec::new(), Vec::new());
    let targets = run.targets(scope)?;
    // What a group is run from is one instant of all of its guests.
    let mut whole = BTreeMap::new();
    if scope.mode != Mode::Planned {
        for (group, guests) in by_group(&targets) {
            if guests.len() > 1 {
                let point = whole_point(&site, group, &guests, None).await;
                whole.insert(group.to_owned(), point.map(|point| whole_words(&point)));
            }
        }
    }
    for target in targets {
        let group = target.group.clone();
        run.note(&target.name, move |guest| guest.group = group)
            .await?;
        for check in &asked {
            let named = !checks.is_empty();
            let looked = match (check, whole.get(&target.group)) {
                (Readiness::Point, Some(whole)) => whole.clone(),
                _ => look(run, &site, &target, *check, scope.mode, named).await,
            };
            let (good, words) = match looked {
                Ok(words) => (true, words),
                Err(words) => (false, words),
            };
            let told = format!("'{}' {words}", target.name);
            if !good {
                wrong.push(format!("{}: {told}", check.word()));
            }
            seen.push((*check, told));
            run.saw(Seen {
                at: now_ms(),
                step: scope.step.clone(),
                guest: target.name.clone(),
                what: check.word().to_owned(),
                good,
                seen: words,
            })
            .await?;
        }
    }
    match wrong.as_slice() {
        [] => Ok(Checked { seen }),
        wrong => Err(Failure::clean(wrong.join("; "))),
    }
}

fn whole_words(point: &GroupPointView) -> String {
    format!(
        "is in whole point {} of its group, {} old",
        point.cut,
        words(Duration::from_millis(point.age_ms))
    )
}

async fn look(
    run: &AtSite,
    site: &Arc<Site>,
    target: &Target,
    check: Readiness,
    mode: Mode,
    named: bool,
) -> Result<String, String> {
    let standby = &target.standby;
    match check {
        Readiness::Point => match standby.points().last() {
            Some(point) => {
                let age = age(point.cut_at_unix_ns);
                Ok(format!("has point {}, {} old", point.point, words(age)))
            }
            None => Err("has no recovery point here".to_owned()),
        },
        Readiness::Rpo => {
            let point = standby.points().last().map(|p| age(p.cut_at_unix_ns));
            let age = point.ok_or("has no recovery point here")?;
            let target = rpo_of(target).ok_or(
                "has no RPO that is known here; its source tells it with the next opening, or take rpo out of the checks",
            )?;
            match age <= target {
                true => Ok(format!(
                    "is {} old, of {} allowed",
                    words(age),
                    words(target)
                )),
                false => Err(format!(
                    "is {} old, and {} is allowed",
                    words(age),
                    words(target)
                )),
            }
        }
        Readiness::Room => room(site, target, mode).await,
        Readiness::Networks => networks(run, site, target, named),
        Readiness::Link => match answers(standby.remote()).await {
            true => Ok(format!("its site '{}' answers", standby.from())),
            false => Err(format!("its site '{}' does not answer", standby.from())),
        },
        Readiness::Definition => {
            let found = findings(site, &standby.opening().definition).await;
            let about_room = |f: &Finding| f.code.contains("room") || f.code.contains("memory");
            let blocking = |f: &&Finding| f.severity == Severity::Blocks && !about_room(f);
            match found.iter().find(blocking) {
                Some(finding) => Err(format!("{}; {}", finding.what, finding.mend)),
                None => Ok("can be built here".to_owned()),
            }
        }
    }
}

/// Does the other site answer? Right after a restart here the link takes a moment.
async fn answers(remote: &Remote) -> bool {
    let _ = tokio::time::timeout(LINK, remote.reachable()).await;
    remote.alive()
}

/// What a guest's points may be old, by its source's word.
pub(super) fn rpo_of(target: &Target) -> Option<Duration> {
    let rpo = target.standby.opening().rpo_ms;
    rpo.map(Duration::from_millis)
}

fn words(span: Duration) -> String {
    farhaven_policies::units::Period::from_millis(span.as_millis() as u64).to_string()
}

async fn findings(site: &Arc<Site>, definition: &Definition) -> Vec<Finding> {
    let facts = site.peer_facts(definition).await;
    match definition {
        Definition::Qemu(qemu) => check_peer(qemu, &facts, 0),
        Definition::Embedded(_) => facts.findings,
    }
}

async fn room(site: &Arc<Site>, target: &Target, mode: Mode) -> Result<String, String> {
    let (site, guest) = (site.clone(), target.standby.guest);
    let definition = target.standby.opening().definition;
    let looked = crate::work::spawn_blocking(move || {
        let directory = site.config.ram_dir().join(guest.to_string());
        let has = |(name, bytes): (&str, u64)| {
            let file = std::fs::metadata(ram_file(&directory, name));
            // A test has memory of its own; what is warm has its room already.
            let held = file.map_or(0, |f| (f.blocks() * 512).min(bytes));
            if mode == Mode::Test { 0 } else { held }
        };
        let missing = definition.ram().into_iter().map(|file| file.1 - has(file));
        let needed = missing.fold(0, u64::saturating_add);
        (needed, free_memory(&site.config.ram_dir()))
    });
    let (needed, free) = looked.await.map_err(|e| e.to_string())?;
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    match needed == 0 || needed.saturating_add(BESIDE) <= free {
        true => Ok(format!(
            "needs {} MiB more, {} MiB are free",
            mib(needed),
            mib(free)
        )),
        false => Err(format!(
            "needs {} MiB of memory more, and {} MiB are free; end a test, or free memory",
            mib(needed),
            mib(free)
        )),
    }
}

fn networks(run: &AtSite, site: &Site, target: &Target, named: bool) -> Result<String, String> {
    let opening = target.standby.opening();
    let definition = opening.definition;
    let networks = site.networks_of(target.standby.guest, run.facts.of(&target.name).networks);
    if let Some(lack) = networks.lack(&target.name, &definition, boots(&opening.volumes)) {
        return Err(format!("cannot be run here: {lack}"));
    }
    let Definition::Qemu(definition) = definition else {
        return Ok("has no networks of its host".to_owned());
    };
    let unmapped = definition.nets.iter().filter(|net| {
        let of_its_own = net.value.starts_with("user");
        !of_its_own && !networks.all.contains_key(&net.id)
    });
    let unmapped: Vec<&str> = unmapped.map(|net| net.id.as_str()).collect();
    match (unmapped.as_slice(), named) {
        ([], _) => Ok("has all of its networks mapped".to_owned()),
        (names, false) => Ok(format!(
            "has the same here as at its source: {}",
            names.join(", ")
        )),
        (names, true) => Err(format!(
            "has networks that are not mapped here: {}; name them under [networks] in this site's configuration, or in its policy file",
            names.join(", ")
        )),
    }
}
