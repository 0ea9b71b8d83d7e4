//! `farhaven test`: a failover that nobody notices.

use clap::{Args, Subcommand};

use super::show::{bytes, millis};
use super::{Outcome, group, guest_path, print_json, told};
use crate::client::Client;
use crate::site::api::TestFailover;
use crate::site::kept::PointChoice;
use crate::site::view::{TestEnded, TestReport};

/// Without a verb: start one.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(super) struct Test {
    /// The guest or the group.
    #[arg(required = true)]
    name: Option<String>,
    /// From this point, of a group that of this cut; the newest if not given.
    #[arg(long, value_name = "NUMBER|NAME")]
    point: Option<PointChoice>,
    /// As JSON.
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    verb: Option<TestVerb>,
}

#[derive(Debug, Subcommand)]
enum TestVerb {
    /// End the test of a guest or a group, and remove all of it.
    Cleanup {
        /// The guest or the group.
        name: String,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
}

pub(super) async fn run(client: &Client, test: Test) -> Outcome {
    match (test.verb, test.name) {
        (Some(TestVerb::Cleanup { name, json }), _) if group::is_group(client, &name).await => {
            group::all::cleanup(client, &name, json).await
        }
        (Some(TestVerb::Cleanup { name, json }), _) => cleanup(client, &name, json).await,
        (None, Some(name)) if group::is_group(client, &name).await => {
            group::all::test(client, &name, test.point, test.json).await
        }
        (None, Some(name)) => start(client, &name, test.point, test.json).await,
        (None, None) => Err("name the guest or the group: farhaven test NAME".to_owned()),
    }
}

async fn start(client: &Client, name: &str, point: Option<PointChoice>, json: bool) -> Outcome {
    let path = guest_path(name, "/test");
    let body = TestFailover {
        point,
        by: super::run::account(),
    };
    let asked = client.post::<TestReport>(&path, &body);
    let report = super::guests::waiting(format!("starting a test of '{name}'"), asked)
        .await
        .map_err(told)?;
    if json {
        return print_json(&report);
    }
    say!(
        "A test of '{}' runs here, from point {}, on no network. Protection goes on.",
        report.guest,
        report.point
    );
    say!("  age of that point     {}", millis(report.age_ms));
    say!("  until it ran          {:.0} ms", report.rto_ms);
    if report.times.boots {
        say!("  it boots              from its disks, which is all that the point holds");
    }
    if let Some(qmp) = &report.qmp {
        say!("  QMP                   {qmp}");
    }
    if let Some(console) = &report.console {
        say!("  console               {}", console.log.display());
        say!("    type into it        {}", console.socket.display());
    }
    say!("End it, and throw it away: farhaven test cleanup {name}");
    Ok(())
}

async fn cleanup(client: &Client, name: &str, json: bool) -> Outcome {
    let path = guest_path(name, "/test");
    let ended: TestEnded = client.delete(&path).await.map_err(told)?;
    if json {
        return print_json(&ended);
    }
    say!(
        "The test of '{}' from point {} has ended after {}. Removed:",
        ended.guest,
        ended.point,
        millis(ended.ran_ms)
    );
    for what in &ended.removed {
        say!("  {what}");
    }
    say!(
        "That freed {} of memory and {} of disk.",
        bytes(ended.ram_bytes),
        bytes(ended.overlay_bytes)
    );
    Ok(())
}
