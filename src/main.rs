//! The `leasehold` binary: parses the command line, does what it says, ends with its exit code.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use leasehold::cli::{EXIT_FAILED, Invocation, commands};

fn main() -> ExitCode {
    let invocation = match Invocation::parse(std::env::args_os()) {
        Ok(invocation) => invocation,
        Err(error) => error.exit(),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("leasehold: no async runtime: {error}");
            return EXIT_FAILED.into();
        }
    };
    // On a thread of the runtime: from outside of it, each thing that the driver waits for would wake another thread.
    let execute = runtime.spawn(async move { commands::execute(&invocation).await });
    match runtime.block_on(execute).unwrap_or_else(|panic| Err(panic.into())) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("leasehold: {error:#}");
            EXIT_FAILED.into()
        }
    }
}
