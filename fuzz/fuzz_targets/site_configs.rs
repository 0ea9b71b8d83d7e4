#![no_main]

farhaven_fuzz::target!("site_configs");
