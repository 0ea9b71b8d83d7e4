#![no_main]

farhaven_fuzz::target!("policy_files");
