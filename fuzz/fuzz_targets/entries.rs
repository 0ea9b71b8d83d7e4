#![no_main]

farhaven_fuzz::target!("entries");
