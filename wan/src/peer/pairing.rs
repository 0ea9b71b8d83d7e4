//! Pairing without sockets: the proofs, and the invitations that are open.
//!
//! The invited side dials, having pinned the inviter's key from the token, and
//! proves that it holds the secret; the inviter answers with its own proof. A
//! proof is a hash keyed with the secret over the speaker's role, the TLS
//! session's exported keying material, both keys and the speaker's
//! introduction: it is good for nothing in another session, by another key, or
//! read back to its sender.

use bytes::BytesMut;

use super::{Introduction, Invitation, SiteKey};
use crate::frame::{PairProof, put_introduction};
use crate::limits;

/// The session a proof is bound to.
#[derive(Debug, Clone, Copy)]
pub struct Session {
    /// TLS exported keying material, the same on both sides, of this session only.
    pub exported: [u8; 32],
    /// Key of the side that invited.
    pub inviter: SiteKey,
    /// Key of the side that was invited.
    pub invitee: SiteKey,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The side that made the invitation.
    Inviter,
    /// The side that accepts it.
    Invitee,
}

/// Proof of the secret, bound to the session, the role and the introduction.
pub fn prove(
    secret: &[u8; 32],
    session: &Session,
    role: Role,
    introduction: &Introduction,
) -> PairProof {
    PairProof {
        proof: *digest(secret, session, role, introduction).as_bytes(),
        introduction: introduction.clone(),
    }
}

/// Whether a proof is right. Takes the same time wherever it is wrong.
pub fn verify(secret: &[u8; 32], session: &Session, role: Role, proof: &PairProof) -> bool {
    // blake3::Hash compares in constant time.
    digest(secret, session, role, &proof.introduction) == blake3::Hash::from_bytes(proof.proof)
}

fn digest(
    secret: &[u8; 32],
    session: &Session,
    role: Role,
    introduction: &Introduction,
) -> blake3::Hash {
    let key = blake3::derive_key("farhaven 2026-11 pairing proof", secret);
    let mut said = BytesMut::new();
    put_introduction(&mut said, introduction);
    blake3::Hasher::new_keyed(&key)
        .update(match role {
            Role::Inviter => b"inviter",
            Role::Invitee => b"invitee",
        })
        .update(&session.exported)
        .update(session.inviter.as_bytes())
        .update(session.invitee.as_bytes())
        .update(&said)
        .finalize()
}

/// Why an invitation cannot be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InviteError {
    /// It is over already.
    #[error("this invitation has expired; make a new one")]
    Expired,
    /// Too many are open.
    #[error(
        "{} invitations are open; use one, or wait until one expires",
        limits::MAX_OPEN_INVITATIONS
    )]
    TooMany,
    /// It was made by another site.
    #[error("this invitation was made by another site; it is accepted here, not opened")]
    NotOurs,
}

/// Why the inviting side refuses. The text goes to the other operator, and
/// says nothing a stranger could use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No open invitation has this secret: it was used, has expired, or never was.
    #[error(
        "the invitation is not open: it was used, has expired, or was cancelled; ask for a new one"
    )]
    NotOpen,
}

#[derive(Debug)]
struct Open {
    secret: [u8; 32],
    expires_unix: u64,
    used_by: Option<SiteKey>,
}

/// An invitation that was accepted.
#[derive(Debug)]
pub struct Accepted {
    /// The answer to send.
    pub answer: PairProof,
    /// False when the same site asks again because the answer was lost.
    pub first: bool,
}

/// The invitations of this site that can be accepted.
#[derive(Debug, Default)]
pub struct OpenInvitations {
    open: Vec<Open>,
    failures: u32,
}

impl OpenInvitations {
    /// Opens an invitation.
    ///
    /// # Errors
    /// When it is over already, or too many are open.
    pub fn open(&mut self, now_unix: u64, invitation: &Invitation) -> Result<(), InviteError> {
        self.expire(now_unix);
        if invitation.expires_unix <= now_unix {
            return Err(InviteError::Expired);
        }
        if self
            .open
            .iter()
            .any(|open| open.secret == invitation.secret)
        {
            return Ok(());
        }
        if self.open.len() >= limits::MAX_OPEN_INVITATIONS {
            return Err(InviteError::TooMany);
        }
        if self.open.iter().all(|open| open.used_by.is_some()) {
            self.failures = 0;
        }
        self.open.push(Open {
            secret: invitation.secret,
            expires_unix: invitation.expires_unix,
            used_by: None,
        });
        Ok(())
    }

    /// Whether a stranger's key may come in to pair at all.
    pub fn admits_strangers(&mut self, now_unix: u64) -> bool {
        self.expire(now_unix);
        !self.open.is_empty()
    }

    /// Judges a request. One invitation pairs one site; the same site may ask
    /// again, in case the answer was lost. Failures count against every open
    /// invitation; [`limits::MAX_PAIRING_FAILURES`] of them cancel all.
    ///
    /// # Errors
    /// When no open invitation has the secret that was proved.
    pub fn accept(
        &mut self,
        now_unix: u64,
        session: &Session,
        request: &PairProof,
        own: &Introduction,
    ) -> Result<Accepted, Refusal> {
        self.expire(now_unix);
        let proved = self
            .open
            .iter_mut()
            .find(|open| verify(&open.secret, session, Role::Invitee, request));
        match proved {
            Some(open) if open.used_by.is_none_or(|key| key == session.invitee) => {
                let first = open.used_by.is_none();
                open.used_by = Some(session.invitee);
                Ok(Accepted {
                    answer: prove(&open.secret, session, Role::Inviter, own),
                    first,
                })
            }
            // The secret is right, so this is no guess and does not count.
            Some(_) => Err(Refusal::NotOpen),
            None => {
                self.failures += 1;
                if self.failures >= limits::MAX_PAIRING_FAILURES {
                    self.open.clear();
                    self.failures = 0;
                }
                Err(Refusal::NotOpen)
            }
        }
    }

    /// The trust in a site ended: an invitation it used is of no more use to it.
    pub fn revoke(&mut self, key: SiteKey) {
        self.open.retain(|open| open.used_by != Some(key));
    }

    fn expire(&mut self, now_unix: u64) {
        self.open.retain(|open| open.expires_unix > now_unix);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INVITER: SiteKey = SiteKey([1; 32]);

    fn session(invitee: u8, exported: u8) -> Session {
        Session {
            exported: [exported; 32],
            inviter: INVITER,
            invitee: SiteKey([invitee; 32]),
        }
    }

    fn introduction(site: &str) -> Introduction {
        Introduction::new(site, vec!["127.0.0.1:7443".to_owned()]).expect("valid")
    }

    fn invitation(expires_unix: u64) -> Invitation {
        let addresses = vec!["127.0.0.1:7443".to_owned()];
        Invitation::new("east", INVITER, addresses, expires_unix).expect("valid")
    }

    #[test]
    fn a_proof_is_good_once_here_and_in_this_role_only() {
        let secret = [3; 32];
        let here = session(2, 9);
        let proof = prove(&secret, &here, Role::Invitee, &introduction("west"));
        assert!(verify(&secret, &here, Role::Invitee, &proof));
        assert!(!verify(&secret, &here, Role::Inviter, &proof), "read back");
        assert!(
            !verify(&secret, &session(2, 8), Role::Invitee, &proof),
            "replayed"
        );
        assert!(
            !verify(&secret, &session(4, 9), Role::Invitee, &proof),
            "another key"
        );
        assert!(
            !verify(&[4; 32], &here, Role::Invitee, &proof),
            "another secret"
        );
        let renamed = PairProof {
            introduction: introduction("wext"),
            ..proof
        };
        assert!(!verify(&secret, &here, Role::Invitee, &renamed), "changed");
    }

    #[test]
    fn an_invitation_pairs_one_site_before_it_expires() {
        let mut open = OpenInvitations::default();
        let invitation = invitation(100);
        open.open(10, &invitation).expect("room");
        let ask = |open: &mut OpenInvitations, now, invitee| {
            let session = session(invitee, 5);
            let request = prove(
                &invitation.secret,
                &session,
                Role::Invitee,
                &introduction("west"),
            );
            open.accept(now, &session, &request, &introduction("east"))
        };
        let accepted = ask(&mut open, 20, 2).expect("open");
        assert!(accepted.first);
        assert!(verify(
            &invitation.secret,
            &session(2, 5),
            Role::Inviter,
            &accepted.answer
        ));
        assert!(!ask(&mut open, 21, 2).expect("the same site").first);
        assert_eq!(ask(&mut open, 22, 3).err(), Some(Refusal::NotOpen));
        open.revoke(SiteKey([2; 32]));
        assert_eq!(ask(&mut open, 23, 2).err(), Some(Refusal::NotOpen));
        assert!(open.open(100, &invitation).is_err(), "over");
    }

    #[test]
    fn expiry_and_failures_close_invitations() {
        let mut open = OpenInvitations::default();
        open.open(0, &invitation(50)).expect("room");
        assert!(open.admits_strangers(49));
        assert!(!open.admits_strangers(50));
        open.open(0, &invitation(50)).expect("room");
        for tried in 0..limits::MAX_PAIRING_FAILURES {
            assert!(open.admits_strangers(1), "after {tried} failures");
            let session = session(2, 5);
            let request = prove(&[0; 32], &session, Role::Invitee, &introduction("west"));
            assert!(
                open.accept(1, &session, &request, &introduction("east"))
                    .is_err()
            );
        }
        assert!(!open.admits_strangers(1));
        for _ in 0..limits::MAX_OPEN_INVITATIONS {
            open.open(0, &invitation(50)).expect("room");
        }
        assert_eq!(open.open(0, &invitation(50)), Err(InviteError::TooMany));
    }
}
