//! A guest that another site owns by now: its copy here is stopped and kept.

use super::driver::Driver;
use super::view::Phase;
use crate::activate::fence::Term;
use crate::guest::Guest;

impl Driver {
    /// Stops the guest for good, by the one attached or through a new
    /// connection. Else it says why it may run on.
    pub(super) async fn fence(
        &mut self,
        term: Term,
        guest: Option<Box<dyn Guest>>,
    ) -> Result<(), String> {
        let owner = self.site.name_of(&term.owner);
        let record = self.record.clone();
        let stopped = tokio::task::spawn_blocking(move || match guest {
            Some(mut guest) => guest.stop().map_err(|e| e.to_string()),
            None => super::guests::stop_guest(&record).map_err(|e| e.to_string()),
        })
        .await;
        let stopped = stopped.unwrap_or_else(|e| Err(e.to_string()));
        let done = match &stopped {
            Ok(()) => "its copy here was stopped and is kept as evidence".to_owned(),
            Err(error) => format!(
                "ITS COPY HERE COULD NOT BE STOPPED and is tried again; end its QEMU by hand: {error}"
            ),
        };
        let why = format!(
            "fenced: site '{owner}' runs this guest under term {}; {done}",
            term.number
        );
        tracing::warn!(guest = %self.record.name, "{why}");
        self.view.send_modify(|v| {
            v.phase = Phase::Fenced;
            v.term = Some(term.number);
            v.trouble.clone_from(&why);
        });
        stopped.map_err(|_| why)
    }
}
