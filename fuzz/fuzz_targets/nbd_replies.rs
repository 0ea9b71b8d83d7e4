#![no_main]

farhaven_fuzz::target!("nbd_replies");
