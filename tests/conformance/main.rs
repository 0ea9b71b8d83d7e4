//! One suite of the promises of `trait Guest`, run over every guest there is:
//! the properties are written once, against a [`subject::Subject`].

#![allow(missing_docs, unreachable_pub, clippy::unwrap_used)]

#[path = "../busy_guest/mod.rs"]
mod busy_guest;
#[path = "../support/mod.rs"]
mod support;

mod embedded;
mod faults;
mod properties;
mod proxy;
mod subject;

/// Every property, as a test of the guests that `$start` starts; `None` where
/// this machine has none, which was told.
macro_rules! conforms {
    ($start:path) => {
        conforms! { $start:
            properties::points_under_load_are_exact,
            properties::a_point_without_a_round_holds_the_whole_guest,
            properties::a_point_goes_on_elsewhere_and_is_let_go_here,
            properties::a_guest_that_is_stopped_again_with_others_has_one_instant,
            properties::a_stopped_guest_stays_as_it_is,
            properties::a_restart_hands_over_what_differs,
            properties::what_the_peer_lost_comes_with_the_next_point,
            properties::a_throttled_guest_runs_slowly_and_its_points_are_exact,
            faults::a_sink_may_fail_at_every_step,
            faults::what_was_lost_unsealed_comes_again,
            faults::a_hypervisor_may_fail_any_request,
            faults::a_guest_that_does_not_go_on_is_told_as_that,
            faults::a_guest_that_ends_is_told_as_that,
            faults::a_guest_that_ends_in_a_cut_is_told_as_that,
        }
    };
    ($start:path: $($file:ident::$property:ident,)*) => {
        $(
            #[test]
            fn $property() {
                if let Some(mut subject) = $start() {
                    crate::$file::$property(&mut subject);
                }
            }
        )*
    };
}

mod kvm;
mod qemu;
mod sim;
