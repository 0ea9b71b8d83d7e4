//! Waiting for a peer's word while guests run here that nobody else can stop: whoever
//! hears a newer term of one waits for what is held of it
//! ([`crate::site::standby::State`]),
//! so the wait ends with such a term.

use std::sync::PoisonError;

use farhaven_storage_sync::unit::GuestId;
use tokio::sync::watch;

use crate::site::Site;
use crate::site::operate::OperateError;

impl Site {
    /// Waits for `asked`, as long as all of these guests are this site's.
    ///
    /// # Errors
    /// When one of them is another site's: it is to be let go of at once.
    pub(in crate::site) async fn unless_overruled<T>(
        &self,
        guests: &[GuestId],
        asked: impl Future<Output = T>,
    ) -> Result<T, OperateError> {
        let ours = || {
            let theirs = |guest: &&GuestId| self.fence.may_run(**guest, self.key()).is_err();
            match guests.iter().find(theirs) {
                Some(guest) => Err(*guest),
                None => Ok(()),
            }
        };
        let waited = while_it_holds(self.terms_heard(), ours, asked).await;
        waited.map_err(|guest| {
            let standbys = self.standbys.read().unwrap_or_else(PoisonError::into_inner);
            let name = standbys.get(&guest).map(|standby| standby.name());
            OperateError::Conflict(format!(
                "'{}' is another site's by a newer term that came meanwhile, and nothing was done; see farhaven status there",
                name.unwrap_or_else(|| guest.to_string())
            ))
        })
    }
}

/// Waits for `asked` as long as `holds` does, which is looked at whenever `heard` changes.
async fn while_it_holds<T, E>(
    mut heard: watch::Receiver<()>,
    holds: impl Fn() -> Result<(), E>,
    asked: impl Future<Output = T>,
) -> Result<T, E> {
    let mut asked = std::pin::pin!(asked);
    loop {
        // What is heard after this look is a change.
        holds()?;
        tokio::select! {
            answer = &mut asked => return Ok(answer),
            Ok(()) = heard.changed() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use super::*;
    use crate::activate::fence::Term;
    use crate::site::surroundings::tests::Stage;

    #[tokio::test(flavor = "multi_thread")]
    async fn who_is_overruled_is_told_of_which_guest() {
        let stage = Stage::protected().await;
        let waits = std::future::ready(7);
        let guests = [GuestId::random(), stage.web];
        // Nothing is known of one, and the other runs at east.
        let told = stage.west.unless_overruled(&guests, waits).await;
        let Err(OperateError::Conflict(why)) = told else {
            panic!("{told:?}");
        };
        assert!(
            why.starts_with("'web' is another site's by a newer term"),
            "{why}"
        );
        // Of one that is not protected to here, there is no name.
        let gone = Term {
            group: guests[0],
            ..stage.newer()
        };
        stage.west.fence.adopt(gone).expect("adopted");
        let waits = std::future::ready(7);
        let told = stage.west.unless_overruled(&guests[..1], waits).await;
        let Err(OperateError::Conflict(why)) = told else {
            panic!("{told:?}");
        };
        assert!(why.starts_with(&format!("'{}'", guests[0])), "{why}");
        stage.end().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_with_the_term_that_overrules_it() {
        let (told, ours) = (watch::Sender::new(()), AtomicBool::new(true));
        let holds = || ours.load(Ordering::SeqCst).then_some(()).ok_or("not ours");
        let begun = tokio::time::Instant::now();
        let answer = tokio::time::sleep(Duration::from_secs(30));
        let waits = while_it_holds(told.subscribe(), holds, answer);
        let overrules = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            // Of another guest: the wait goes on.
            told.send_replace(());
            tokio::time::sleep(Duration::from_secs(1)).await;
            ours.store(false, Ordering::SeqCst);
            told.send_replace(());
        };
        let (ended, ()) = tokio::join!(waits, overrules);
        assert_eq!(ended, Err("not ours"));
        assert_eq!(begun.elapsed().as_secs(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_waited_for_though_nobody_tells_terms() {
        let told = watch::Sender::new(());
        let answer = async {
            tokio::time::sleep(Duration::from_secs(3)).await;
            7
        };
        let heard = told.subscribe();
        drop(told);
        assert_eq!(
            while_it_holds(heard, || Ok::<_, ()>(()), answer).await,
            Ok(7)
        );
    }
}
