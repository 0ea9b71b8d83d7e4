//! A KVM guest's state and configuration from a peer, as fuzz targets.

use super::board;
use super::machine::Config;
use super::state::State;
use crate::guest::embedded;

/// What is not memory or disks; one that is taken has one form.
pub(crate) fn state(bytes: &[u8]) {
    if let Ok(state) = State::decode(bytes) {
        let written = state.encode().expect("what was read can be written");
        let again = State::decode(&written).expect("what was written can be read");
        assert!(again.encode().is_ok_and(|again| again == written));
        board::fuzzing(&state.devices);
    }
    board::fuzzing(bytes);
}

/// What its builder needs.
pub(crate) fn config(definition: &embedded::Definition) {
    let _ = Config::of(definition);
}

/// States of a machine with chips in the kernel, and without.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    [true, false].map(super::state::a_state).to_vec()
}
