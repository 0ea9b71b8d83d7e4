#![no_main]

farhaven_fuzz::target!("qmp_replies");
