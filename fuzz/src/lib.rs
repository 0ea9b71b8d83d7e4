//! What all targets share: a bound on memory, and the first inputs.
//!
//! Each target is a function of one of Farhaven's crates, behind their feature
//! `fuzzing`. libFuzzer's own limits look at the process once a second; here an
//! allocation that goes beyond the bound fails at once, and with it the target.

use std::alloc::System;
use std::path::Path;

use cap::Cap;

/// Most bytes that a target may hold at once: what the largest thing that is
/// taken needs (a batch, a message, a chunk of a seed, a few buffers beside it).
pub const MOST_BYTES: usize = 64 << 20;

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, MOST_BYTES);

/// Where the first inputs are to be written: `FARHAVEN_SEEDS`.
const SEEDS: &str = "FARHAVEN_SEEDS";

/// What takes an input, its name, and valid inputs.
pub type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

/// The target of this name.
///
/// # Panics
/// When there is none.
pub fn named(name: &str) -> Target {
    let of_crates: &[&[Target]] = &[
        #[cfg(feature = "wan")]
        &farhaven_wan::fuzzing::TARGETS,
        #[cfg(feature = "storage-sync")]
        &farhaven_storage_sync::fuzzing::TARGETS,
        #[cfg(feature = "policies")]
        &farhaven_policies::fuzzing::TARGETS,
        #[cfg(feature = "site")]
        &farhaven::fuzzing::TARGETS,
    ];
    let mut targets = of_crates.iter().copied().flatten();
    let found = targets.find(|(of, ..)| *of == name);
    *found.expect("a target of one of the crates")
}

/// Before the first input: a panic may take what memory it needs to say where it was, and
/// the first inputs of a target are written, where it is asked to.
///
/// # Panics
/// When they cannot be written.
pub fn begin((_, _, seeds): Target) {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        // libFuzzer's own limit, of the process, stands.
        let _ = MEMORY.set_limit(usize::MAX);
        tell(panic);
    }));
    let Some(directory) = std::env::var_os(SEEDS) else {
        return;
    };
    std::fs::create_dir_all(&directory).expect("a directory for the first inputs");
    for (at, seed) in seeds().iter().enumerate() {
        let path = Path::new(&directory).join(format!("seed-{at:02}"));
        std::fs::write(path, seed).expect("a first input");
    }
}

/// The target of this name as libFuzzer wants it.
#[macro_export]
macro_rules! target {
    ($name:literal) => {
        static TARGET: std::sync::LazyLock<$crate::Target> =
            std::sync::LazyLock::new(|| $crate::named($name));
        libfuzzer_sys::fuzz_target!(
            init: $crate::begin(*TARGET),
            |bytes: &[u8]| TARGET.1(bytes)
        );
    };
}
