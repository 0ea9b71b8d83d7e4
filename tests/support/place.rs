//! Where a guest's parts go, for launching it without a point.

use std::path::Path;

use farhaven::guest::qemu::definition::Definition;
use farhaven::guest::qemu::instantiate::{Backing, DiskPlacement, Placement};

/// Everything in one directory, on empty disks.
pub fn place(definition: &Definition, directory: &Path) -> Placement {
    let disk = |name: &String| {
        let overlay = directory.join(format!("{}.overlay", name.replace(['#', '/'], "_")));
        (
            name.clone(),
            DiskPlacement {
                overlay,
                backing: Backing::Nothing,
            },
        )
    };
    Placement {
        run: directory.join("run"),
        qmp: directory.join("run/q"),
        ram: definition
            .ram
            .iter()
            .map(|block| (block.id.clone(), directory.join("ram")))
            .collect(),
        disks: definition.disks.iter().map(|d| disk(&d.name)).collect(),
        ..Placement::default()
    }
}
