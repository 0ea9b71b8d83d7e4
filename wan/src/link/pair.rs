//! Pairing over QUIC: `peer::pairing` judges, this carries.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use quinn::{Connection, RecvStream, SendStream};
use tokio::time::timeout;

use super::close::{CloseCode, describe, refused_key};
use super::dial::dial;
use super::node::{Pairing, Site};
use super::streams::{self, Fault};
use super::tls::Purpose;
use crate::frame::{Frame, PairProof};
use crate::peer::pairing::{Refusal, Role, Session, prove, verify};
use crate::peer::{Introduction, Invitation, PeerRecord, SiteKey};

/// What the exported keying material is for.
const EXPORT_LABEL: &[u8] = b"EXPORTER-farhaven-pair";

/// How long the inviting side waits for the other to have read its answer.
const FAREWELL: Duration = Duration::from_secs(5);

/// Why an invitation could not be accepted.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// It is over already.
    #[error("this invitation has expired; make a new one at {site}")]
    Expired {
        /// The site that invited.
        site: String,
    },
    /// It is this site's own.
    #[error("this invitation was made by this site; accept it at the other one")]
    Own,
    /// The inviting site was not reached.
    #[error("cannot reach {site}: {why}")]
    Unreachable {
        /// The site that invited.
        site: String,
        /// Why, for each address.
        why: String,
    },
    /// The inviting site refused, or the connection failed.
    #[error("{site} did not pair: {why}")]
    Refused {
        /// The site that invited.
        site: String,
        /// What it said.
        why: String,
    },
    /// The inviting site answered, but does not know the secret.
    #[error(
        "{site} does not know the invitation's secret; make a new invitation, and if this happens again, someone is in between"
    )]
    WrongProof {
        /// The site that invited.
        site: String,
    },
}

/// Seconds since 1970.
pub(crate) fn now_unix() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn exported(connection: &Connection) -> Result<[u8; 32], Fault> {
    let mut material = [0; 32];
    connection
        .export_keying_material(&mut material, EXPORT_LABEL, &[])
        .map_err(|_| Fault::Gone)?;
    Ok(material)
}

/// The invited side: dials the inviter, proves the secret, checks its proof.
pub(crate) async fn accept_invitation(
    site: &Site,
    invitation: &Invitation,
    own: &Introduction,
) -> Result<PeerRecord, PairError> {
    let inviter = invitation.site().to_owned();
    if invitation.key() == site.key {
        return Err(PairError::Own);
    }
    if invitation.expires_unix() <= now_unix() {
        return Err(PairError::Expired { site: inviter });
    }
    let connection = dial(
        site,
        invitation.addresses(),
        invitation.key(),
        Purpose::Pairing,
    )
    .await
    .map_err(|why| PairError::Unreachable {
        site: inviter.clone(),
        why,
    })?;
    let session = Session {
        exported: [0; 32],
        inviter: invitation.key(),
        invitee: site.key,
    };
    let asked = timeout(
        site.options.link.handshake_timeout,
        ask(&connection, invitation, session, own),
    )
    .await
    .unwrap_or(Err(Fault::Slow));
    let refused = |why: String| PairError::Refused {
        site: inviter.clone(),
        why,
    };
    match asked {
        Ok(Some(introduction)) => {
            connection.close(CloseCode::Paired.number(), b"paired");
            Ok(PeerRecord {
                site: introduction.site().to_owned(),
                key: invitation.key(),
                addresses: invitation.addresses().to_vec(),
                dial: true,
            })
        }
        Ok(None) => {
            connection.close(CloseCode::PairingRefused.number(), b"wrong proof");
            Err(PairError::WrongProof { site: inviter })
        }
        Err(fault) => {
            let why = match connection.close_reason() {
                // No invitation is open there at all, so it lets no strangers in.
                Some(reason) if refused_key(&reason) => Refusal::NotOpen.to_string(),
                Some(reason) => describe(&reason),
                None => fault.to_string(),
            };
            connection.close(fault.code().number(), fault.to_string().as_bytes());
            Err(refused(why))
        }
    }
}

/// `None` when the answer's proof is wrong.
async fn ask(
    connection: &Connection,
    invitation: &Invitation,
    mut session: Session,
    own: &Introduction,
) -> Result<Option<Introduction>, Fault> {
    session.exported = exported(connection)?;
    let (mut send, mut receive) = connection.open_bi().await.map_err(|_| Fault::Gone)?;
    let request = prove(&invitation.secret, &session, Role::Invitee, own);
    streams::write(&mut send, &Frame::PairRequest(request)).await?;
    let answer = match streams::read_frame(&mut receive).await? {
        Frame::PairAccept(answer) => answer,
        other => return Err(other.unexpected("the answer to a pairing").into()),
    };
    let right = verify(&invitation.secret, &session, Role::Inviter, &answer);
    Ok(right.then_some(answer.introduction))
}

/// The inviting side of a pairing connection.
pub(crate) async fn answer(site: Arc<Site>, connection: Connection, invitee: SiteKey) {
    let limit = site.options.link.handshake_timeout;
    let address = connection.remote_address();
    // Held until the connection is closed: a stream that is dropped before
    // ends at the other side, which might never hear the reason.
    let mut streams = None;
    match timeout(limit, judge(&site, &connection, invitee, &mut streams)).await {
        Ok(Ok(Ok(introduction))) => {
            tracing::info!(site = introduction.site(), key = %invitee, %address, "paired");
            let _ = timeout(FAREWELL, connection.closed()).await;
        }
        Ok(Ok(Err(refusal))) => {
            tracing::warn!(key = %invitee, %address, "pairing refused: {refusal}");
            let reason = refusal.to_string();
            connection.close(CloseCode::PairingRefused.number(), reason.as_bytes());
        }
        Ok(Err(fault)) => {
            connection.close(fault.code().number(), fault.to_string().as_bytes());
        }
        Err(_) => connection.close(CloseCode::Slow.number(), Fault::Slow.to_string().as_bytes()),
    }
}

async fn judge(
    site: &Site,
    connection: &Connection,
    invitee: SiteKey,
    streams: &mut Option<(SendStream, RecvStream)>,
) -> Result<Result<Introduction, Refusal>, Fault> {
    let session = Session {
        exported: exported(connection)?,
        inviter: site.key,
        invitee,
    };
    let accepted = connection.accept_bi().await.map_err(|_| Fault::Gone)?;
    let (send, receive) = streams.insert(accepted);
    let request: PairProof = match streams::read_frame(receive).await? {
        Frame::PairRequest(request) => request,
        other => return Err(other.unexpected("a pairing request").into()),
    };
    let accepted = {
        let mut open = site.invitations();
        let own = match open.introduction() {
            Some(own) => own.clone(),
            None => return Ok(Err(Refusal::NotOpen)),
        };
        let accepted = open.open.accept(now_unix(), &session, &request, &own);
        site.admission
            .admit_strangers(open.open.admits_strangers(now_unix()));
        accepted
    };
    let accepted = match accepted {
        Ok(accepted) => accepted,
        Err(refusal) => return Ok(Err(refusal)),
    };
    streams::write(send, &Frame::PairAccept(accepted.answer)).await?;
    let introduction = request.introduction;
    if accepted.first {
        site.paired(Pairing {
            record: PeerRecord {
                site: introduction.site().to_owned(),
                key: invitee,
                addresses: introduction.addresses().to_vec(),
                // Of the two, the side that accepted dials: its way here is proven.
                dial: false,
            },
        });
    }
    Ok(Ok(introduction))
}
