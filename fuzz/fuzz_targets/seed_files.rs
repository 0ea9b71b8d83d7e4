#![no_main]

farhaven_fuzz::target!("seed_files");
