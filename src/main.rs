//! The `farhaven` program.

fn main() -> std::process::ExitCode {
    farhaven::cli::main()
}
