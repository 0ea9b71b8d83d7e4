//! The map against a flat model.

use proptest::prelude::*;

use super::*;

fn any_run() -> impl Strategy<Value = Run> {
    (
        0u16..3,
        0u64..700_000,
        1u64..1500,
        0u64..5000,
        any::<bool>(),
    )
        .prop_map(|(volume, unit, count, place, zero)| {
            let place = if zero { Place::ZERO } else { Place(64 + place) };
            Run {
                volume,
                unit: unit / 97 * 97,
                count,
                place,
            }
        })
}

fn apply(model: &mut BTreeMap<(u16, u64), Place>, run: &Run) {
    for at in 0..run.count {
        match run.place {
            Place::ZERO => model.remove(&(run.volume, run.unit + at)),
            place => model.insert((run.volume, run.unit + at), Place(place.0 + at)),
        };
    }
}

fn flat(map: &PointMap) -> BTreeMap<(u16, u64), Place> {
    let mut flat = BTreeMap::new();
    map.all_runs().for_each(|run| apply(&mut flat, &run));
    flat
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_map_is_what_was_set_and_its_versions_stay(
        before in prop::collection::vec(any_run(), 0..12),
        after in prop::collection::vec(any_run(), 0..12),
        cut in 0u64..700_000,
    ) {
        let mut map = PointMap::default();
        let mut model = BTreeMap::new();
        for run in &before {
            map.set(run);
            apply(&mut model, run);
        }
        prop_assert_eq!(&flat(&map), &model);
        let old = map.clone();
        for run in &after {
            map.set(run);
            apply(&mut model, run);
        }
        map.truncate(1, cut);
        model.retain(|&(volume, unit), _| volume != 1 || unit < cut);
        prop_assert_eq!(&flat(&map), &model);
        let mut again = old.clone();
        for run in map.since(&old) {
            again.set(&run);
        }
        prop_assert_eq!(&flat(&again), &model);
        prop_assert_eq!(again.leaves(), map.leaves());
        for run in old.since(&map) {
            again.set(&run);
        }
        prop_assert_eq!(flat(&again), flat(&old));
        if let Some((&(volume, unit), &place)) = model.iter().next() {
            prop_assert_eq!(map.place(volume, unit), place);
        }
    }
}

#[test]
fn an_ordinary_guest_costs_a_few_megabytes() {
    let mut map = PointMap::default();
    let units = (512u64 << 20) / 4096;
    map.set(&Run {
        volume: 0,
        unit: 0,
        count: units,
        place: Place(64),
    });
    map.set(&Run {
        volume: 1,
        unit: 0,
        count: 4 * units,
        place: Place(1 << 30),
    });
    let bytes = map.leaves() * size_of::<Leaf>();
    assert!(bytes <= 6 << 20, "{bytes} bytes");
    map.truncate(0, 0);
    map.truncate(1, 0);
    assert_eq!(map.leaves(), 0);
    map.truncate(900, 5);
}
