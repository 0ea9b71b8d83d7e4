//! The evacuation planner on thousands of small made-up sites, performed by the
//! simulator of `examples/evacuation`, and beside the best of all orders.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use farhaven_policies::evacuate::{
    Facts, GroupFacts, GuestFacts, LeftReason, LinkFacts, Plan, PlanError, Verdict, plan,
};

use proptest::prelude::*;

#[path = "../examples/evacuation/simulate.rs"]
mod simulate;
#[path = "../examples/evacuation/sites.rs"]
mod sites;

use simulate::{Happened, Rule, simulate as perform};
use sites::{Made, make};

fn seconds(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

fn guest(name: &str, remaining: u64) -> GuestFacts {
    GuestFacts {
        name: name.into(),
        remaining,
        dirty_rate: 0,
        working_set: 0,
        max_throttle: 80,
        max_blackout: seconds(0.5),
        start: seconds(0.1),
        healthy: seconds(1.0),
        after: Vec::new(),
    }
}

/// A group of one guest that has its name.
fn group(name: &str, priority: u8, remaining: u64) -> GroupFacts {
    GroupFacts {
        name: name.into(),
        peer: "munich".into(),
        priority,
        rate_cap: None,
        share: 100,
        guests: vec![guest(name, remaining)],
    }
}

fn facts(groups: Vec<GroupFacts>, deadline: Option<f64>) -> Facts {
    Facts {
        groups,
        links: vec![LinkFacts {
            peer: "munich".into(),
            rate: 1_000_000,
        }],
        deadline: deadline.map(seconds),
        ..Facts::default()
    }
}

fn left(plan: &Plan) -> Vec<(&str, &LeftReason)> {
    let left = plan.left.iter();
    left.map(|left| (left.group.as_str(), &left.reason))
        .collect()
}

/// No group shares a wave with, or comes before, one that it waits for.
fn keeps_order(facts: &Facts, plan: &Plan) {
    let mut waves = std::collections::HashMap::new();
    for wave in &plan.waves {
        for passage in &wave.groups {
            let group = facts
                .groups
                .iter()
                .find(|group| group.name == passage.group);
            for guest in &group.unwrap().guests {
                waves.insert(guest.name.as_str(), (wave.number, passage.group.as_str()));
            }
        }
    }
    for guest in facts.groups.iter().flat_map(|group| &group.guests) {
        for after in guest
            .after
            .iter()
            .filter_map(|name| waves.get(name.as_str()))
        {
            let (own, group) = waves[guest.name.as_str()];
            assert!(
                after.0 < own || after.1 == group,
                "{} in wave {own}",
                guest.name
            );
        }
    }
}

fn performed(made: &Made) -> (Plan, Happened) {
    let planned = plan(&made.facts).unwrap();
    let happened = perform(&made.facts, &made.truth, &Rule::of(&made.facts, &planned));
    (planned, happened)
}

#[test]
fn nothing_is_late_or_out_of_order_where_a_schedule_is_known_to_exist() {
    for seed in 0..1000 {
        let made = make(1 + (seed % 40) as usize, seed);
        let (planned, happened) = performed(&made);
        assert_eq!(left(&planned), [], "seed {seed}");
        assert!(planned.would_do.is_none() && planned.verdict != Verdict::DoesNotFit);
        let deadline = made.facts.deadline.unwrap().as_secs_f64();
        let finish = happened.finish;
        assert!(made.hidden <= deadline, "seed {seed}");
        assert!(
            finish <= deadline,
            "seed {seed}: {finish} s, deadline {deadline} s"
        );
        assert_eq!(happened.out_of_order, 0, "seed {seed}");
        let expected = planned.finish.as_secs_f64();
        assert!(
            (finish - expected).abs() < 0.05 * finish + 0.2,
            "seed {seed}: {finish} s, told {expected} s"
        );
        assert!(finish > 0.99 * planned.bound.bytes.max(planned.bound.chain).as_secs_f64());
        keeps_order(&made.facts, &planned);
        let passages: usize = planned.waves.iter().map(|wave| wave.groups.len()).sum();
        assert_eq!(passages, made.facts.groups.len());
    }
}

#[test]
fn large_sites_end_within_a_twentieth_of_the_lower_bound() {
    for seed in 0..40 {
        let made = make(400, seed);
        let (planned, happened) = performed(&made);
        let bound = planned.bound.writes.max(planned.bound.chain).as_secs_f64();
        assert!(
            happened.finish <= 1.05 * bound,
            "seed {seed}: {} s, bound {bound} s",
            happened.finish
        );
        let initial: u64 = made
            .facts
            .groups
            .iter()
            .flat_map(|group| &group.guests)
            .map(|guest| guest.remaining)
            .sum();
        assert!(
            happened.bytes >= initial as f64 * 0.999,
            "seed {seed}: bytes were lost"
        );
        assert!(
            happened.finish >= 0.999 * planned.bound.bytes.as_secs_f64(),
            "seed {seed}"
        );
        assert!(planned.waves.len() <= 40, "{} waves", planned.waves.len());
    }
}

/// Every order of the groups.
fn orders(count: usize) -> Vec<Vec<usize>> {
    if count == 0 {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for order in orders(count - 1) {
        for at in 0..=order.len() {
            let mut order = order.clone();
            order.insert(at, count - 1);
            all.push(order);
        }
    }
    all
}

#[test]
fn tiny_sites_end_about_when_the_best_of_all_orders_does() {
    let (mut ratios, mut seed) = (Vec::new(), 0);
    while ratios.len() < 400 {
        seed += 1;
        let mut made = make(2 + (seed % 6) as usize, 1_000_000 + seed);
        if !(2..=5).contains(&made.facts.groups.len()) {
            continue;
        }
        made.facts.deadline = None;
        let (planned, happened) = performed(&made);
        let all = orders(made.facts.groups.len()).into_iter();
        let best = all
            .map(|order| perform(&made.facts, &made.truth, &Rule::in_order(&order)).finish)
            .fold(f64::INFINITY, f64::min);
        assert!(
            happened.finish <= 1.05 * best + 0.1,
            "seed {seed}: {} s, best {best} s",
            happened.finish
        );
        let gives: usize = planned.gives.len();
        assert!(
            gives > 0 || happened.blackouts_over == 0,
            "seed {seed}: blackouts that were not told"
        );
        ratios.push(happened.finish / best);
    }
    let mean = ratios.iter().sum::<f64>() / ratios.len() as f64;
    assert!(mean < 1.005, "on average {mean} times the best");
}

#[test]
fn the_higher_priority_goes_first_and_is_what_fits() {
    let groups = || {
        vec![
            group("low", 1, 50_000_000),
            group("high", 200, 50_000_000),
            group("middle", 100, 50_000_000),
            group("small", 1, 20_000_000),
        ]
    };
    let all = plan(&facts(groups(), Some(200.0))).unwrap();
    assert_eq!(all.verdict, Verdict::Fits);
    let order: Vec<_> = all.waves.iter().flat_map(|wave| &wave.groups).collect();
    let names: Vec<_> = order.iter().map(|passage| passage.group.as_str()).collect();
    assert_eq!(names, ["high", "middle", "small", "low"]);

    let some = plan(&facts(groups(), Some(125.0))).unwrap();
    assert_eq!(some.verdict, Verdict::DoesNotFit);
    assert_eq!(left(&some), [("low", &LeftReason::NoRoom)]);
    let would_do = some.would_do.unwrap();
    // 170 MB at 1 MB/s and the last one's start; what is told does indeed do.
    let longer = would_do.deadline.unwrap();
    assert!((171.0..176.0).contains(&longer.as_secs_f64()), "{longer:?}");
    assert_eq!(
        plan(&facts(groups(), Some(longer.as_secs_f64())))
            .unwrap()
            .left,
        []
    );
    let percent = would_do.rate_percent.unwrap();
    assert!((133..=140).contains(&percent), "{percent}");
    let mut faster = facts(groups(), Some(125.0));
    faster.links[0].rate = 10_000 * percent;
    assert_eq!(plan(&faster).unwrap().left, []);
}

#[test]
fn what_cannot_be_done_is_named_with_its_reason() {
    let mut chained = group("app", 100, 1_000);
    chained.guests[0].after = vec!["db".into()];
    let mut abroad = group("abroad", 100, 1_000);
    abroad.peer = "nowhere".into();
    let mut slow = group("slow", 255, 10_000_000);
    slow.rate_cap = Some(100_000);
    let mut behind = group("behind", 100, 1_000);
    behind.guests[0].after = vec!["abroad".into()];
    let mut database = group("db", 1, 1_000);
    database.guests[0].healthy = seconds(100.0);
    let plan = plan(&facts(
        vec![chained, abroad, slow, behind, database],
        Some(60.0),
    ))
    .unwrap();
    let too_long = |reason: &LeftReason| matches!(reason, LeftReason::TooLong { .. });
    let told = left(&plan);
    let of = |name: &str| told.iter().find(|(group, _)| *group == name).unwrap().1;
    assert_eq!(told.len(), 5, "{told:?}");
    assert_eq!(of("abroad"), &LeftReason::NoLink);
    assert_eq!(
        of("behind"),
        &LeftReason::WaitsFor {
            group: "abroad".into()
        }
    );
    assert_eq!(of("app"), &LeftReason::WaitsFor { group: "db".into() });
    assert!(too_long(of("slow")) && too_long(of("db")));
    // No rate makes up for a link that is missing.
    let would_do = plan.would_do.unwrap();
    assert_eq!((would_do.deadline, would_do.rate_percent), (None, None));
}

#[test]
fn a_guest_that_outruns_the_link_is_throttled_and_its_blackout_told() {
    let mut wild = group("wild", 100, 100_000_000);
    wild.guests[0].dirty_rate = 30_000_000;
    wild.guests[0].working_set = 80_000_000;
    wild.guests[0].max_throttle = 50;
    let plan = plan(&facts(vec![wild], None)).unwrap();
    assert_eq!(plan.left, []);
    let [give] = &plan.gives[..] else {
        panic!("{:?}", plan.gives)
    };
    assert_eq!((give.group.as_str(), give.throttle), ("wild", 50));
    assert!(
        give.blackout > seconds(60.0) && give.max_blackout == seconds(0.5),
        "{give:?}"
    );
}

#[test]
fn facts_that_make_no_sense_are_refused_in_words() {
    let mut one = group("one", 1, 1);
    one.guests[0].after = vec!["two".into()];
    let mut two = group("two", 1, 1);
    two.guests[0].after = vec!["one".into()];
    let error = plan(&facts(vec![one.clone(), two], None)).unwrap_err();
    assert!(
        matches!(&error, PlanError::Cycle { names } if names.len() == 2),
        "{error}"
    );
    let error = plan(&facts(vec![one.clone()], None)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "guest 'one' starts after 'two', which is neither here nor moved; correct its start order"
    );
    let mut moved = facts(vec![one.clone()], None);
    moved.moved.insert("two".into());
    assert_eq!(plan(&moved).unwrap().left, []);
    one.guests[0].after = vec!["one".into()];
    assert!(matches!(
        plan(&facts(vec![one], None)),
        Err(PlanError::Cycle { .. })
    ));
    let twice = plan(&facts(vec![group("a", 1, 1), group("a", 2, 1)], None)).unwrap_err();
    assert!(matches!(twice, PlanError::Twice { what: "group", .. }));
    assert_eq!(plan(&Facts::default()).unwrap().waves, []);
}

proptest! {
    /// Whatever the facts, a plan or an error comes back, and every group is in it once.
    #[test]
    fn no_facts_panic(groups in proptest::collection::vec(
        (any::<u8>(), prop_oneof![Just(0u64), any::<u64>(), 0u64..1_000_000_000], prop_oneof![Just(0u64), 0u64..1_000_000_000],
         prop_oneof![Just(0u64), 0u64..1_000_000_000], any::<u8>(), 0u64..100, proptest::option::of(any::<u64>())), 0..60),
        rate in prop_oneof![Just(0u64), 1u64..1_000_000_000, any::<u64>()], deadline in proptest::option::of(0.0f64..100_000.0)) {
        let count = groups.len();
        let groups = groups.into_iter().enumerate().map(|(index, (priority, remaining, dirty, set, share, after, cap))| {
            let mut group = group(&format!("g{index}"), priority, remaining);
            group.share = share;
            group.rate_cap = cap;
            group.guests[0].dirty_rate = dirty;
            group.guests[0].working_set = set;
            group.guests[0].max_throttle = share;
            if after < index as u64 {
                group.guests[0].after.push(format!("g{after}"));
            }
            group
        });
        let mut facts = facts(groups.collect(), deadline);
        facts.links[0].rate = rate;
        let plan = plan(&facts).unwrap();
        let moved: usize = plan.waves.iter().map(|wave| wave.groups.len()).sum();
        prop_assert_eq!(moved + plan.left.len(), count);
    }
}

/// Numbers at their ends neither panic nor hang.
#[test]
fn extremes_are_planned() {
    for remaining in [0, 1, u64::MAX] {
        for dirty in [0, 1, u64::MAX] {
            for rate in [0, 1, u64::MAX] {
                let mut wild = group("wild", 255, remaining);
                wild.share = 0;
                wild.rate_cap = Some(rate);
                wild.guests[0].dirty_rate = dirty;
                wild.guests[0].working_set = dirty;
                wild.guests[0].max_throttle = 255;
                wild.guests[0].healthy = Duration::MAX;
                wild.guests[0].max_blackout = Duration::ZERO;
                let mut other = group("other", 0, remaining);
                other.guests[0].after = vec!["wild".into()];
                let mut facts = facts(vec![wild, other], Some(60.0));
                facts.links[0].rate = rate;
                let plan = plan(&facts).unwrap();
                assert!(!plan.left.is_empty());
            }
        }
    }
}

/// Half of the time for 10,000 guests: what goes is in time, the higher priorities
/// among it, and what is told to do does.
#[test]
fn a_large_site_with_too_little_time_moves_what_matters_most() {
    let mut made = make(10_000, 3);
    let half = made.facts.deadline.unwrap() / 2;
    made.facts.deadline = Some(half);
    let began = std::time::Instant::now();
    let (planned, happened) = performed(&made);
    println!("planned and performed in {:?}", began.elapsed());
    assert_eq!(planned.verdict, Verdict::DoesNotFit);
    assert!(
        happened.finish <= half.as_secs_f64() * 1.03,
        "{} s of {half:?}",
        happened.finish
    );
    assert_eq!(happened.out_of_order, 0);
    let priority = |name: &str| {
        let groups = &made.facts.groups;
        groups.iter().find(|of| of.name == name).unwrap().priority
    };
    let gone: Vec<u8> = planned
        .left
        .iter()
        .map(|left| priority(&left.group))
        .collect();
    let share = |of: u8| {
        let all = made
            .facts
            .groups
            .iter()
            .filter(|group| group.priority == of);
        gone.iter().filter(|left| **left == of).count() as f64 / all.count() as f64
    };
    assert!(
        share(200) < 0.05 && share(0) > 0.3,
        "{} {}",
        share(200),
        share(0)
    );

    let would_do = planned.would_do.unwrap();
    let mut longer = made.facts.clone();
    longer.deadline = would_do.deadline;
    assert_eq!(left(&plan(&longer).unwrap()), []);
    let mut faster = made.facts.clone();
    for link in &mut faster.links {
        link.rate = link.rate * would_do.rate_percent.unwrap() / 100;
    }
    assert_eq!(left(&plan(&faster).unwrap()), []);
}

/// New facts from the middle of an evacuation are planned like any others: what has
/// moved is gone from the groups, and nothing waits for it.
#[test]
fn a_plan_made_anew_from_progress_still_ends_in_time() {
    for seed in 0..100 {
        let made = make(60, 5000 + seed);
        let first = plan(&made.facts).unwrap();
        let deadline = made.facts.deadline.unwrap();
        let now = first.finish / 2;
        let mut later = made.facts.clone();
        later.deadline = Some(deadline.saturating_sub(now));
        for passage in first.waves.iter().flat_map(|wave| &wave.groups) {
            let place = later
                .groups
                .iter()
                .position(|of| of.name == passage.group)
                .unwrap();
            if passage.healthy_at <= now {
                let gone = later.groups.remove(place);
                later
                    .moved
                    .extend(gone.guests.into_iter().map(|guest| guest.name));
            } else if passage.cut_at + passage.blackout <= now {
                // It runs there: only the rest of its health checks is to come.
                for guest in &mut later.groups[place].guests {
                    guest.remaining = 0;
                    guest.dirty_rate = 0;
                    guest.start = Duration::ZERO;
                    guest.healthy = guest.healthy.min(passage.healthy_at.saturating_sub(now));
                }
            } else if passage.copy_from < now {
                // Copied in even steps from its begin to its cut.
                let whole = passage.cut_at.saturating_sub(passage.copy_from);
                let done = now.saturating_sub(passage.copy_from).as_secs_f64()
                    / whole.as_secs_f64().max(1e-9);
                for guest in &mut later.groups[place].guests {
                    let left = guest.remaining as f64 * (1.0 - done.min(1.0));
                    guest.remaining = left as u64;
                }
            }
        }
        let second = plan(&later).unwrap();
        assert_eq!(left(&second), [], "seed {seed}");
        let whole = now + second.finish;
        assert!(
            whole <= deadline.mul_f64(1.02) + seconds(0.5),
            "seed {seed}: {whole:?} of {deadline:?}"
        );
    }
}
