//! Written and read again.

use super::*;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever is in a runbook, its file says the same, and so does its JSON.
    #[test]
    fn a_runbook_is_what_its_file_says(runbook in made::any_runbook()) {
        let text = write(&runbook);
        // The order may be wrong, so the values alone are compared.
        let as_json = toml::from_str::<serde_json::Value>(&text).unwrap();
        prop_assert_eq!(&serde_json::from_value::<Runbook>(as_json).unwrap(), &runbook);
        let json = serde_json::to_string(&runbook).unwrap();
        prop_assert_eq!(serde_json::from_str::<Runbook>(&json).unwrap(), runbook);
    }

    /// Nothing that is read as a runbook panics or hangs the reader.
    #[test]
    fn any_text_is_read_or_refused(text in "(\\PC|\n|\\[\\[steps\\]\\]\n|do = '[a-z-]{0,12}'\n|name = '[a-z]{0,3}'\n){0,60}") {
        let _ = read::text(Path::new("r"), &text, None);
    }

    /// A runbook without a mistake is written, read, and still has none.
    #[test]
    fn a_sound_runbook_is_read_as_itself(runbook in made::sound_runbook()) {
        prop_assert_eq!(check(&runbook, None), []);
        let text = write(&runbook);
        prop_assert_eq!(read::text(Path::new("r"), &text, None).map_err(|e| e.to_string()), Ok(runbook));
    }
}
