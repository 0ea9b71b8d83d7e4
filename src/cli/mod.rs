//! The command line: what is typed, and what is shown. It speaks to a daemon
//! through [`crate::client`]; only `site init`, `site run`,
//! `policy`, `store`, most of `runbook` and `demo` do not.

#[macro_use]
mod out;

mod alerts;
mod drill;
mod evacuate;
mod group;
mod guests;
mod image;
mod link;
mod points;
mod policy;
mod run;
mod runbook;
mod scrub;
mod seed;
pub(crate) mod show;
mod site;
mod store;
mod token;
mod turn;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use farhaven_policies::units::Period;
use farhaven_wan::SiteKey;

use crate::client::{Client, Trust};
use crate::site::groups::FailOverGroup;
use crate::site::kept::PointChoice;

/// Cross-datacenter disaster recovery for running KVM virtual machines.
///
/// Memory, device state and disks of a protected guest are copied all the time
/// to a paired site, where it can run about a second after you say so.
#[derive(Debug, Parser)]
#[command(name = "farhaven", version, max_term_width = 100)]
struct Cli {
    /// The daemon's unix socket, or https://HOST:PORT.
    #[arg(
        long,
        global = true,
        env = "FARHAVEN_API",
        default_value = "/var/lib/farhaven/api.sock",
        value_name = "SOCKET"
    )]
    api: PathBuf,
    /// The file with the token to show over TLS.
    #[arg(long, global = true, env = "FARHAVEN_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The fingerprint of the key that the API's server must have.
    #[arg(
        long,
        global = true,
        env = "FARHAVEN_API_FINGERPRINT",
        value_name = "FINGERPRINT"
    )]
    api_fingerprint: Option<SiteKey>,
    /// Instead of a fingerprint: the authorities that its certificate may be signed by.
    #[arg(long, global = true, env = "FARHAVEN_API_CA", value_name = "FILE")]
    api_ca: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Set up and run this site's daemon.
    #[command(subcommand)]
    Site(site::SiteVerb),
    /// Pair with another site: make an invitation here, accept it there.
    Pair(site::Pair),
    /// Paired sites.
    #[command(subcommand)]
    Peer(site::PeerVerb),
    /// Guests that run here.
    #[command(subcommand)]
    Guest(guests::GuestVerb),
    /// Protection groups: guests that are protected and run together.
    #[command(subcommand)]
    Group(group::GroupVerb),
    /// Protect a guest: copy it to a paired site, all the time.
    Protect {
        /// The guest.
        name: String,
        /// The paired site.
        #[arg(long, value_name = "SITE")]
        to: String,
        /// The most that a disaster may cost, like 10s; by the site's policy if not given.
        #[arg(long, value_name = "TIME")]
        rpo: Option<Period>,
        /// Its first copy comes by a seed: send nothing before that is imported there.
        #[arg(long)]
        seeded: bool,
    },
    /// A first copy by parcel: write it to a medium here, import it at the peer.
    #[command(subcommand)]
    Seed(seed::SeedVerb),
    /// Stop cutting for a while; the guest runs on, its RPO grows.
    Pause {
        /// The guest, or the group.
        name: String,
    },
    /// Go on after a pause.
    Resume {
        /// The guest, or the group.
        name: String,
    },
    /// End protection; the guest runs on.
    Unprotect {
        /// The guest, or the group.
        name: String,
        /// Drop its recovery points at the peer, too.
        #[arg(long)]
        discard: bool,
    },
    /// How every guest stands.
    Status(show::Status),
    /// What is the matter, and who cares for it.
    #[command(subcommand)]
    Alert(alerts::AlertVerb),
    /// What happened, the oldest first.
    Events(alerts::EventsOf),
    /// Recovery points of a guest; of a group, those with all of its guests.
    Points {
        /// The guest or the group.
        name: String,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Points with a name stay until they are released.
    #[command(subcommand)]
    Point(points::PointVerb),
    /// Which points would be dropped, and why.
    #[command(subcommand)]
    Prune(points::PruneVerb),
    /// Run a guest here whose site is lost, or all guests of a group; run it
    /// where its points are kept.
    Failover {
        /// The guest or the group.
        name: String,
        /// From this point; the newest if not given.
        #[arg(long, value_name = "NUMBER|NAME")]
        point: Option<PointChoice>,
        /// Even if its site is alive: the guest is stopped there first.
        #[arg(long)]
        force: bool,
        /// Of a group: start guests without waiting for those before to be healthy.
        #[arg(long)]
        no_checks: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Run a guest here as a test, or all guests of a group, on no network, while
    /// they are protected on.
    Test(drill::Test),
    /// Move a guest to its peer with nothing lost, or all guests of a group as one;
    /// run it where they run. They stay, and exit status 3 says so, if one would
    /// stand too long.
    Move {
        /// The guest or the group.
        name: String,
        /// Even if it will stand longer than its policy allows (protect.max_blackout).
        #[arg(long)]
        accept_pause: bool,
        /// Only tell what a move now would take, by the newest point.
        #[arg(long, conflicts_with = "accept_pause")]
        dry_run: bool,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Run a guest here again that is held for a move whose end is not known.
    TakeBack {
        /// The guest.
        name: String,
        /// You made sure that it does not run at the peer.
        #[arg(long)]
        force: bool,
    },
    /// Move everything off this site, or what is named, before a deadline. Exit status 3:
    /// not everything fits, and nothing was begun.
    Evacuate(evacuate::Evacuate),
    /// Watch, pause, resume, abort an evacuation; how past ones went.
    #[command(subcommand)]
    Evacuation(evacuate::EvacuationVerb),
    /// Who may use the API over TLS, and for what.
    #[command(subcommand)]
    Token(token::TokenVerb),
    /// A move or a failover stays: no rollback any more; run it where the guest runs.
    Commit(turn::CommitArgs),
    /// Go back after a move or a failover: to the site that the guest came from, or
    /// here to another point. Until it was committed.
    Rollback(turn::RollbackArgs),
    /// Protect a guest that was moved or taken over to the site that it came from:
    /// only what differs is sent.
    Reprotect(turn::ReprotectArgs),
    /// Copies of guests that were stopped for good, and are kept.
    #[command(subcommand)]
    Evidence(turn::EvidenceVerb),
    /// What guests may take of the link, and who goes first.
    #[command(subcommand)]
    Link(link::LinkVerb),
    /// Base images stored here, for the guests of paired sites.
    #[command(subcommand)]
    Image(image::ImageVerb),
    /// Check and show policy files: what groups are owed.
    #[command(subcommand)]
    Policy(policy::PolicyVerb),
    /// Check, plan, print and run runbooks: the steps of moves, failovers and tests.
    #[command(subcommand)]
    Runbook(runbook::RunbookVerb),
    /// Runs of runbooks, those of move, failover and test included.
    #[command(subcommand)]
    Run(run::RunVerb),
    /// Agree to a step of a run, or refuse it.
    Approve(run::Approve),
    /// What a run did, for people, programs or auditors.
    Report(run::ReportOf),
    /// Read and verify everything that is stored here, while the daemon works on.
    ///
    /// Damage is an alert, and the exit status is 1. The points that need what is
    /// damaged are named, and refused until a scrub finds them whole.
    Scrub(scrub::Scrub),
    /// Verify what is stored here, while the daemon is stopped.
    #[command(subcommand)]
    Store(store::StoreVerb),
    /// Both sites, a link and a guest on this machine: watch it survive.
    Demo(crate::demo::Demo),
}

/// `--json`, for listings.
#[derive(Debug, Args)]
struct Json {
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// A command's failure, told in one paragraph.
type Outcome = Result<(), String>;

/// Exit status of a move that was not made because the guest would stand
/// longer than its policy allows, and of an evacuation that does not fit its
/// deadline: everything runs where it ran.
const EXIT_TOO_LONG: u8 = 3;

/// A failure with the exit status that programs tell it by: 1 for most.
struct Failure {
    why: String,
    status: u8,
}

impl From<String> for Failure {
    fn from(why: String) -> Self {
        Self { why, status: 1 }
    }
}

/// Runs what was typed.
pub fn main() -> ExitCode {
    quiet_when_unread();
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("farhaven: cannot start threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(run(cli));
    // What blocks in the background must not keep a finished command alive.
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { why, status }) => {
            eprintln!("farhaven: {}", out::fit(&why));
            ExitCode::from(status)
        }
    }
}

/// When whoever reads the output has gone (`| head`), the command ends; that is
/// no fault to tell of. Everything that it holds is dropped as ever.
fn quiet_when_unread() {
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let words = panic.payload().downcast_ref::<String>();
        if !words.is_some_and(|words| words.starts_with("failed printing to std")) {
            told(panic);
        }
    }));
}

async fn run(cli: Cli) -> Result<(), Failure> {
    let client = client(&cli)?;
    let outcome = match cli.verb {
        Verb::Site(verb) => site::run(&client, verb).await,
        Verb::Pair(pair) => site::pair(&client, pair).await,
        Verb::Peer(verb) => site::peer(&client, verb).await,
        Verb::Group(verb) => group::run(&client, verb).await,
        Verb::Guest(verb) => guests::guest(&client, verb).await,
        Verb::Protect {
            name,
            to,
            rpo,
            seeded,
        } => guests::protect(&client, &name, to, rpo, seeded).await,
        Verb::Seed(verb) => seed::run(&client, verb).await,
        Verb::Pause { name } => guests::pause(&client, &name).await,
        Verb::Resume { name } => guests::resume(&client, &name).await,
        Verb::Unprotect { name, discard } => guests::unprotect(&client, &name, discard).await,
        Verb::Status(status) => show::status(&client, status).await,
        Verb::Alert(verb) => alerts::alert(&client, verb).await,
        Verb::Events(asked) => alerts::events(&client, asked).await,
        Verb::Points { name, json } if group::is_group(&client, &name).await => {
            group::points(&client, &name, json).await
        }
        Verb::Points { name, json } => show::points(&client, &name, json).await,
        Verb::Point(verb) => points::point(&client, verb).await,
        Verb::Prune(verb) => points::prune(&client, verb).await,
        Verb::Failover {
            name,
            point,
            force,
            no_checks,
            json,
        } if group::is_group(&client, &name).await => {
            let how = FailOverGroup {
                cut: group::cut_of(&client, &name, point).await?,
                force,
                no_checks,
            };
            group::failover(&client, &name, how, json).await
        }
        Verb::Failover {
            name,
            point,
            force,
            json,
            ..
        } => guests::failover(&client, &name, point, force, json).await,
        Verb::Test(test) => drill::run(&client, test).await,
        Verb::Move {
            name,
            accept_pause,
            dry_run,
            json,
        } if group::is_group(&client, &name).await => {
            return group::moved::run(&client, &name, accept_pause, dry_run, json).await;
        }
        Verb::Move {
            name,
            dry_run: true,
            json,
            ..
        } => guests::move_outlook(&client, &name, json).await,
        Verb::Move {
            name,
            accept_pause,
            json,
            ..
        } => return guests::move_guest(&client, &name, accept_pause, json).await,
        Verb::TakeBack { name, force } => guests::take_back(&client, &name, force).await,
        Verb::Evacuate(order) => return evacuate::evacuate(&client, order).await,
        Verb::Evacuation(verb) => return evacuate::run(&client, verb).await,
        Verb::Token(verb) => token::run(&client, verb).await,
        Verb::Commit(args) => turn::commit(&client, args).await,
        Verb::Rollback(args) => turn::rollback(&client, args).await,
        Verb::Reprotect(args) => turn::reprotect(&client, args).await,
        Verb::Evidence(verb) => turn::evidence(&client, verb).await,
        Verb::Link(verb) => link::run(&client, verb).await,
        Verb::Image(verb) => image::run(&client, verb).await,
        Verb::Policy(verb) => policy::run(&client, verb).await,
        Verb::Runbook(verb) => return runbook::run(&client, verb).await,
        Verb::Run(verb) => return run::run(&client, verb).await,
        Verb::Approve(approve) => run::approve(&client, approve).await,
        Verb::Report(wanted) => run::report(&client, wanted).await,
        Verb::Scrub(scrub) => scrub::run(&client, scrub).await,
        Verb::Store(verb) => store::run(verb),
        Verb::Demo(demo) => crate::demo::run(demo).await,
    };
    Ok(outcome?)
}

/// The daemon that was named, by its socket or its address.
fn client(cli: &Cli) -> Result<Client, String> {
    let named = cli.api.to_str().filter(|named| named.contains("://"));
    let Some(url) = named else {
        return Ok(Client::new(&cli.api));
    };
    let trust = Trust {
        fingerprint: cli.api_fingerprint,
        authority: cli.api_ca.as_deref(),
    };
    Client::over_tls(url, cli.token_file.as_deref(), &trust).map_err(told)
}

/// A guest's path in the API, whatever its name.
fn guest_path(name: &str, rest: &str) -> String {
    format!("/v1/guests/{}{rest}", escaped(name))
}

/// A name as part of a path or query, whatever is in it.
fn escaped(name: &str) -> String {
    let mut escaped = String::new();
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

/// Prints a value for programs.
fn print_json(value: &impl serde::Serialize) -> Outcome {
    let text = serde_json::to_string_pretty(value).map_err(|e| e.to_string())?;
    // For programs: as it is, control characters escaped.
    out::exact(&format!("{text}\n"));
    Ok(())
}

fn told<E: std::fmt::Display>(error: E) -> String {
    error.to_string()
}
