//! Of which states a point is taken.

use std::sync::{Arc, Mutex};

use farhaven_storage_sync::unit::{Digest, VolumeIndex};

use super::*;
use crate::guest::gate::Alone;
use crate::guest::qemu::AttachOptions;
use crate::guest::qemu::qmp::tests::Fake;
use crate::guest::{Guest, SinkError};

/// It has no memory and no disks that anything could come from.
struct Nothing;

impl Sink for Nothing {
    fn units(&mut self, _: VolumeIndex, _: u64, _: &[u8], _: &[Digest]) -> Result<(), SinkError> {
        panic!("there is nothing to take");
    }

    fn zeros(&mut self, _: VolumeIndex, _: u64, _: u64) -> Result<(), SinkError> {
        panic!("there is nothing to take");
    }
}

/// A cut of a guest in this state; the commands that its QEMU was given for it.
fn cut_of(state: &'static str) -> (Result<(), GuestError>, Vec<String>) {
    let dir = tempfile::tempdir().unwrap();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hears = heard.clone();
    let qemu = Fake::answering(move |command| {
        hears.lock().unwrap().push(command.to_owned());
        match command {
            "query-status" => json!({"status": state}),
            query if query.starts_with("query-") => json!([]),
            _ => json!({}),
        }
    });
    let work_dir = dir.path().join("work");
    let options = AttachOptions {
        disk_only: true,
        ..AttachOptions::new("web", qemu.socket(), work_dir, "west", [7; 32])
    };
    let mut guest = QemuGuest::attach(options).unwrap();
    heard.lock().unwrap().clear();
    let cut = guest.cut_at(1, After::Continue, &Alone, &mut Nothing);
    let heard: Vec<String> = std::mem::take(&mut *heard.lock().unwrap());
    let cut = cut.and_then(|cut| guest.finish_cut(cut, false));
    (cut, heard)
}

fn told_any(heard: &[String]) -> Vec<&String> {
    heard.iter().filter(|c| !c.starts_with("query-")).collect()
}

#[test]
fn a_guest_that_is_suspended_is_not_cut_and_not_touched() {
    let (cut, heard) = cut_of("suspended");
    let why = cut.unwrap_err().to_string();
    assert!(why.contains("'suspended'"), "{why}");
    assert!(told_any(&heard).is_empty(), "{heard:?}");
    // One that somebody paused is cut, and left as it is.
    let (cut, heard) = cut_of("paused");
    cut.unwrap();
    let told = told_any(&heard);
    let is = |command: &str| told.iter().any(|told| *told == command);
    assert!(is("stop") && !is("cont"), "{heard:?}");
}
