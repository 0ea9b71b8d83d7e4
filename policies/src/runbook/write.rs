//! A [`Runbook`] -> a TOML file with comments, which reads as the same runbook.

use std::fmt::Write as _;

use super::{Action, Kind, PointChoice, Runbook, Step};

/// The runbook as a file.
pub fn write(runbook: &Runbook) -> String {
    let mut text = String::from(
        "# A Farhaven runbook. `farhaven runbook check FILE` finds its mistakes;\n\
         # `farhaven runbook plan FILE --mode MODE` says what would happen.\n\n",
    );
    let mut page = Page(&mut text);
    page.text("name", &runbook.name);
    if !runbook.description.is_empty() {
        page.text("description", &runbook.description);
    }
    page.words("modes", runbook.modes.iter().map(|mode| mode.word()));
    if !runbook.groups.is_empty() {
        page.line("\n# What it acts on; [] means all guests that the group has.\n[groups]");
        for (group, guests) in &runbook.groups {
            page.words(&key(group), guests.iter().map(String::as_str));
        }
    }
    for step in &runbook.steps {
        page.step(step);
    }
    text
}

struct Page<'t>(&'t mut String);

impl Page<'_> {
    fn line(&mut self, line: &str) {
        self.0.push_str(line);
        self.0.push('\n');
    }

    fn text(&mut self, key: &str, value: &str) {
        let _ = writeln!(self.0, "{key} = {}", quoted(value));
    }

    fn plain(&mut self, key: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.0, "{key} = {value}");
    }

    fn words<'a>(&mut self, key: &str, words: impl Iterator<Item = &'a str>) {
        let words: Vec<_> = words.map(quoted).collect();
        let _ = writeln!(self.0, "{key} = [{}]", words.join(", "));
    }

    fn step(&mut self, step: &Step) {
        let kind = step.action.kind();
        let _ = writeln!(self.0, "\n# {}: {}", kind.word(), kind.about());
        self.line("[[steps]]");
        self.text("name", &step.name);
        self.text("do", kind.word());
        if !step.description.is_empty() {
            self.text("description", &step.description);
        }
        if let Some(group) = &step.group {
            self.text("group", group);
        }
        if !step.guests.is_empty() {
            self.words("guests", step.guests.iter().map(String::as_str));
        }
        self.action(&step.action);
        if let Some(modes) = &step.modes {
            self.words("modes", modes.iter().map(|mode| mode.word()));
        } else {
            let modes: Vec<_> = kind
                .default_modes()
                .iter()
                .map(|mode| mode.word())
                .collect();
            let _ = writeln!(self.0, "# modes: {}, as it does not say", modes.join(", "));
        }
        match (step.timeout, kind.timeout()) {
            (Some(timeout), _) => self.text("timeout", &timeout.to_string()),
            (None, Some(timeout)) => {
                let _ = writeln!(self.0, "# timeout: {timeout}, as it does not say");
            }
            (None, None) => {}
        }
        self.text("on-error", step.on_error.word());
    }

    fn action(&mut self, action: &Action) {
        match action {
            Action::Check { checks } if !checks.is_empty() => {
                self.words("checks", checks.iter().map(|check| check.word()));
            }
            Action::Approve {
                by,
                approvals,
                message,
            } => {
                self.words("by", by.iter().map(String::as_str));
                self.plain("approvals", approvals);
                if !message.is_empty() {
                    self.text("message", message);
                }
            }
            Action::Promote { point } => match point {
                PointChoice::Newest => self.text("point", "newest"),
                PointChoice::Number(number) => self.plain("point", number),
            },
            Action::Remap { networks } if !networks.is_empty() => {
                let pairs = networks
                    .iter()
                    .map(|(name, bridge)| format!("{} = {}", key(name), quoted(bridge)));
                let pairs = pairs.collect::<Vec<_>>().join(", ");
                let _ = writeln!(self.0, "networks = {{ {pairs} }}");
            }
            Action::WaitHealthy {
                tcp,
                http,
                agent,
                script,
                every,
            } => {
                for (key, value) in [("tcp", tcp), ("http", http)] {
                    if let Some(value) = value {
                        self.text(key, value);
                    }
                }
                if let Some(agent) = agent {
                    self.plain("agent", agent);
                }
                if let Some(script) = script {
                    self.words("script", script.iter().map(String::as_str));
                }
                self.text("every", &every.to_string());
            }
            Action::Exec {
                run,
                undo,
                repeatable,
            } => {
                self.words("run", run.iter().map(String::as_str));
                if !undo.is_empty() {
                    self.words("undo", undo.iter().map(String::as_str));
                }
                self.plain("repeatable", repeatable);
            }
            Action::Webhook {
                url,
                method,
                body,
                undo,
                repeatable,
            } => {
                self.text("url", url);
                self.text("method", method.word());
                if !body.is_empty() {
                    self.text("body", body);
                }
                if let Some(undo) = undo {
                    self.text("undo", undo);
                }
                self.plain("repeatable", repeatable);
            }
            Action::Delay { period } => self.text("for", &period.to_string()),
            _ => {}
        }
    }
}

/// A text on one line, as TOML takes it.
fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for letter in text.chars() {
        match letter {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            control if control.is_control() => {
                let _ = write!(quoted, "\\u{:04X}", u32::from(control));
            }
            letter => quoted.push(letter),
        }
    }
    quoted.push('"');
    quoted
}

/// A key, in quotes where it must be.
fn key(name: &str) -> String {
    let bare = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    if !name.is_empty() && name.bytes().all(bare) {
        name.to_owned()
    } else {
        quoted(name)
    }
}

/// What editors and pages say of the words that a file may have.
impl Kind {
    /// What steps of this kind do, in a sentence.
    pub const fn about(self) -> &'static str {
        match self {
            Kind::Check => "looks whether what follows can succeed; changes nothing.",
            Kind::Approve => "waits for the decision of named people.",
            Kind::Quiesce => "the guest agents freeze the filesystems for the next cut.",
            Kind::ShutdownSource => "shuts the guests down at the source, in reverse start order.",
            Kind::FinalSync => {
                "stops the guests at the source, seals their last changes here, and hands the term over."
            }
            Kind::Fence => "takes the next term: the source never runs these guests again.",
            Kind::Promote => "makes the point's memory and disks ready to run here.",
            Kind::Remap => "gives the guests this site's networks; in a test, isolated ones.",
            Kind::StartGroup => "runs the guests, in start order.",
            Kind::WaitHealthy => {
                "waits until the guests are healthy, by one check here or else by their own."
            }
            Kind::Exec => "runs a program of the site, with FARHAVEN_KEY in its environment.",
            Kind::Webhook => "calls a URL, with the header Idempotency-Key.",
            Kind::Delay => "waits.",
            Kind::Commit => "the groups stay here; there is no way back.",
            Kind::Rollback => "the groups return to their source.",
            Kind::Reprotect => "protection turns round; only what differs is sent.",
            Kind::Cleanup => "removes the test and all that it wrote.",
        }
    }
}
