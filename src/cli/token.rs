//! `farhaven token`: who may use the API over TLS, and for what.

use clap::Subcommand;
use farhaven_policies::units::Period;

use super::{Json, Outcome, print_json, told};
use crate::client::Client;
use crate::site::api::rights::{May, Role};
use crate::site::api::{AddToken, Done, TokenAdded, TokenView};

#[derive(Debug, Subcommand)]
pub(super) enum TokenVerb {
    /// Make a token for somebody. It is shown once: the site keeps only its hash.
    Add {
        /// Whose it is: logs and approvals say this name.
        name: String,
        /// A viewer looks; an operator protects, pauses, limits; an admin does everything.
        #[arg(long, value_enum)]
        role: Role,
        /// What an operator may do beyond that; give it twice for both.
        #[arg(long, value_enum, value_name = "RIGHT")]
        may: Vec<May>,
        /// Like 30d; never, if not given.
        #[arg(long, value_name = "TIME")]
        expires: Option<Period>,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// List tokens: names, roles, ends. The tokens themselves are known to their holders only.
    List(Json),
    /// Make a token worthless, at once.
    Revoke {
        /// Whose.
        name: String,
    },
}

pub(super) async fn run(client: &Client, verb: TokenVerb) -> Outcome {
    match verb {
        TokenVerb::Add {
            name,
            role,
            may,
            expires,
            json,
        } => {
            let body = AddToken {
                name,
                role,
                may,
                expires_s: expires.map(|time| time.duration().as_secs()),
            };
            let added: TokenAdded = client.post("/v1/tokens", &body).await.map_err(told)?;
            if json {
                return print_json(&added);
            }
            show(&added);
        }
        TokenVerb::List(json) => {
            let tokens: Vec<TokenView> = client.get("/v1/tokens").await.map_err(told)?;
            if json.json {
                return print_json(&tokens);
            }
            if tokens.is_empty() {
                say!("No tokens; make one with: farhaven token add NAME --role viewer");
            }
            for token in &tokens {
                let end = match (&token.expires, token.expired) {
                    (None, _) => "never expires".to_owned(),
                    (Some(at), true) => format!("expired {at}"),
                    (Some(at), false) => format!("expires {at}"),
                };
                say!(
                    "{}  {}  made {}, {end}",
                    token.name,
                    rights(token),
                    token.made
                );
            }
        }
        TokenVerb::Revoke { name } => {
            let path = format!("/v1/tokens/{}", super::escaped(&name));
            let _: Done = client.delete(&path).await.map_err(told)?;
            say!("The token of '{name}' counts no more.");
        }
    }
    Ok(())
}

fn show(added: &TokenAdded) {
    let kept = &added.kept;
    say!("{}", added.token);
    say!(
        "\nThis is the token of '{}' ({}), shown this once. Put it into a file of mode 600.",
        kept.name,
        rights(kept)
    );
    match (&added.listen, &added.fingerprint) {
        (Some(listen), Some(fingerprint)) => say!(
            "\n  farhaven --api https://{listen} --api-fingerprint {fingerprint} --token-file FILE status"
        ),
        _ => say!(
            "The API is not served over TLS yet: set api.listen = \"HOST:PORT\" in the site's configuration, and start it again."
        ),
    }
}

fn rights(token: &TokenView) -> String {
    let role = match token.role {
        Role::Viewer => "viewer",
        Role::Operator => "operator",
        Role::Admin => "admin",
    };
    let mut text = role.to_owned();
    for may in &token.may {
        text.push_str(match may {
            May::Test => ", may test",
            May::Failover => ", may failover",
        });
    }
    text
}
