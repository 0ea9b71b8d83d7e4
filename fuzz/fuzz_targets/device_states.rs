#![no_main]

farhaven_fuzz::target!("device_states");
