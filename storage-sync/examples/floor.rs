//! Computes the floor of raw files (RAM images, raw disks) together:
//! `cargo run --release --example floor -- [--json] [--known FILE]... FILE...`
//!
//! Content of `--known` files does not count: what changed since.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::ExitCode;

use farhaven_storage_sync::floor::Floor;
use farhaven_storage_sync::unit::UNIT;

fn main() -> ExitCode {
    let (mut json, mut known, mut files) = (false, Vec::new(), Vec::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--json" => json = true,
            "--known" => known.extend(arguments.next()),
            _ => files.push(argument),
        }
    }
    if files.is_empty() {
        eprintln!("usage: floor [--json] [--known FILE]... FILE...");
        return ExitCode::from(2);
    }
    match measure(&known, &files) {
        Ok((units, distinct, bytes)) if json => {
            let raw = distinct * UNIT as u64;
            println!(
                "{{\"units\":{units},\"distinct\":{distinct},\"distinct_bytes\":{raw},\
                 \"floor_bytes\":{bytes}}}"
            );
            ExitCode::SUCCESS
        }
        Ok((units, distinct, bytes)) => {
            let raw = distinct * UNIT as u64;
            println!("{units} units, {distinct} distinct and not zero ({raw} bytes)");
            println!("floor: {bytes} bytes");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("floor: {message}");
            ExitCode::FAILURE
        }
    }
}

fn measure(known: &[String], files: &[String]) -> Result<(u64, u64, u64), String> {
    let mut floor = Floor::new().map_err(|error| error.to_string())?;
    for file in known {
        each_unit(Path::new(file), &mut |unit| {
            floor.known(unit);
            Ok(())
        })?;
    }
    let mut units = 0;
    for file in files {
        each_unit(Path::new(file), &mut |unit| {
            units += 1;
            floor.unit(unit)
        })?;
    }
    let bytes = floor.bytes().map_err(|error| error.to_string())?;
    Ok((units, floor.distinct(), bytes))
}

fn each_unit(
    path: &Path,
    each: &mut dyn FnMut(&[u8]) -> std::io::Result<()>,
) -> Result<(), String> {
    let at = |error: std::io::Error| format!("{}: {error}", path.display());
    let mut file = File::open(path).map_err(at)?;
    let mut chunk = vec![0; 256 * UNIT];
    loop {
        let mut filled = 0;
        while filled < chunk.len() {
            match file.read(&mut chunk[filled..]).map_err(at)? {
                0 => break,
                more => filled += more,
            }
        }
        let end = filled.next_multiple_of(UNIT);
        chunk[filled..end].fill(0);
        for unit in chunk[..end].chunks_exact(UNIT) {
            each(unit).map_err(at)?;
        }
        if filled < chunk.len() {
            return Ok(());
        }
    }
}
