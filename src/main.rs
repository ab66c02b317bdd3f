//! The `leasehold` binary: parses the command line, does what it says, ends with its exit code.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Duration;

use leasehold::cli::commands::{self, complain};
use leasehold::cli::{EXIT_FAILED, Invocation};

/// How long the end waits for what is still under way. Sockets are closed well within it; the resolver of a dead name
/// server, which nothing can interrupt, may take much longer and is not waited for.
const END_WITHIN: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let invocation = match Invocation::parse(std::env::args_os()) {
        Ok(invocation) => invocation,
        Err(error) => error.exit(),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(format_args!("leasehold: no async runtime: {error}"));
            return EXIT_FAILED.into();
        }
    };
    // On a thread of the runtime: from outside of it, each thing that the driver waits for would wake another thread.
    let execute = runtime.spawn(async move { commands::execute(&invocation).await });
    let done = runtime.block_on(execute).unwrap_or_else(|panic| Err(panic.into()));
    runtime.shutdown_timeout(END_WITHIN);
    match done {
        Ok(code) => code,
        Err(error) => {
            complain(format_args!("leasehold: {error:#}"));
            EXIT_FAILED.into()
        }
    }
}
