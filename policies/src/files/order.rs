//! In which order the guests of a group start.

use std::collections::BTreeMap;

use super::Member;

/// Waves of guests: each waits for some of an earlier wave only, and those of
/// one wave start together. Waits for guests that are not of the group count
/// for nothing; those that wait for each other in a circle, which no policy
/// file may say, come last.
pub fn start_order(members: &BTreeMap<String, Member>) -> Vec<Vec<&str>> {
    let mut left: BTreeMap<&str, &Member> = members
        .iter()
        .map(|(name, member)| (name.as_str(), member))
        .collect();
    let mut waves = Vec::new();
    while !left.is_empty() {
        let waits = |name: &str, member: &Member| {
            let mut after = member.after.iter();
            after.any(|other| other != name && left.contains_key(other.as_str()))
        };
        let mut wave: Vec<&str> = left
            .iter()
            .filter(|(name, member)| !waits(name, member))
            .map(|(name, _)| *name)
            .collect();
        if wave.is_empty() {
            wave = left.keys().copied().collect();
        }
        for name in &wave {
            left.remove(name);
        }
        waves.push(wave);
    }
    waves
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(of: &[(&str, &[&str])]) -> BTreeMap<String, Member> {
        let member = |after: &[&str]| Member {
            after: after.iter().map(|name| (*name).to_owned()).collect(),
            ..Member::default()
        };
        of.iter()
            .map(|(name, after)| ((*name).to_owned(), member(after)))
            .collect()
    }

    #[test]
    fn each_starts_after_what_it_waits_for() {
        let bank = members(&[
            ("web", &["app", "cache"]),
            ("app", &["db1", "db2"]),
            ("db1", &[]),
            ("db2", &["db1"]),
            ("cache", &["elsewhere"]),
        ]);
        assert_eq!(
            start_order(&bank),
            [vec!["cache", "db1"], vec!["db2"], vec!["app"], vec!["web"]]
        );
        assert!(start_order(&BTreeMap::new()).is_empty());
    }

    #[test]
    fn a_circle_comes_last_and_nobody_is_left_out() {
        let odd = members(&[("a", &["b"]), ("b", &["a"]), ("c", &["c"]), ("d", &["a"])]);
        assert_eq!(start_order(&odd), [vec!["c"], vec!["a", "b", "d"]]);
    }
}
