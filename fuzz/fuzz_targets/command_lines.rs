#![no_main]

farhaven_fuzz::target!("command_lines");
