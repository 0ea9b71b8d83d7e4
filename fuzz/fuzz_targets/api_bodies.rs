#![no_main]

farhaven_fuzz::target!("api_bodies");
