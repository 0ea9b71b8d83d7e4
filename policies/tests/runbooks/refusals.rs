//! What is wrong with a runbook is told, all at once and in words.

use super::*;

#[test]
fn every_mistake_is_told_at_once_with_line_key_and_what_was_meant() {
    let text = "\
nmae = 'x'
modes = ['planed']
groups.bank = ['db', 'db']
timeout = '1m'
[[steps]]
name = 'ask'
do = 'aprove'
by = ['anna']
[[steps]]
name = 'Sync Now'
do = 'final-sync'
tiemout = '5m'
on_error = 'retry'
[[steps]]
name = 'hook'
do = 'exec'
url = 'https://a.example'
[[steps]]
name = 'wait'
do = 'delay'
for = 5
[[steps]]
name = 'wait'
do = 'webhook'
url = 'a.example'
timeout = '0s'
";
    let lines = told(text, None);
    let expected = [
        "r.toml:1: unknown key 'nmae'; did you mean 'name'?",
        "r.toml:2: 'modes' is ['planed']; expected one of test, planned, unplanned; did you mean 'planned'?",
        "r.toml:3: 'groups.bank' names \"db\" twice",
        "r.toml:4: unknown key 'timeout'; 'timeout' belongs to a step: put it under [[steps]]",
        "r.toml:7: 'steps.ask.do' is 'aprove'; expected one of check, approve, quiesce, shutdown-source, final-sync, fence, promote, remap, start-group, wait-healthy, exec, webhook, delay, commit, rollback, reprotect, cleanup; did you mean 'approve'?",
        "r.toml:10: 'steps[2].name' is \"Sync Now\"; up to 63 small letters, digits, - and _ can be used, no - first",
        "r.toml:12: unknown key 'steps[2].tiemout'; did you mean 'timeout'?",
        "r.toml:13: 'steps[2].on-error' is 'retry'; expected one of stop, continue, rollback",
        "r.toml:14: 'steps.hook.run' is missing; give a program and its arguments, like run = [\"/usr/local/bin/switch-dns\", \"munich\"]",
        "r.toml:17: unknown key 'steps.hook.url'; webhook has it, exec does not",
        "r.toml:21: 'steps.wait.for' is 5; expected a duration like 10s or 2m",
        "r.toml:25: 'steps.wait.url' is \"a.example\"; expected a URL like https://10.8.0.5:8080/health",
        "r.toml:26: 'steps.wait.timeout' is 0s; nothing ends in no time, try 1m",
    ];
    assert_eq!(lines, expected, "{lines:#?}");
}

#[test]
fn orders_that_cannot_be_right_are_told_with_their_reason() {
    let start = "promote start-group";
    for (mode, kinds, line, wanted) in [
        (
            "unplanned",
            "promote start-group fence",
            4,
            "the source could come back and run its guests, too",
        ),
        (
            "unplanned",
            "promote start-group",
            4,
            "put a fence before it",
        ),
        (
            "planned",
            "promote start-group",
            4,
            "what was written since the last point would be lost",
        ),
        (
            "planned",
            "fence final-sync promote start-group",
            4,
            "the source would stop with its last changes unsent",
        ),
        (
            "planned",
            "final-sync shutdown-source promote start-group",
            7,
            "what the guests write while they shut down would be lost",
        ),
        (
            "planned",
            "final-sync quiesce promote start-group",
            7,
            "the guests stand still already",
        ),
        (
            "planned",
            "final-sync commit promote start-group",
            7,
            "there would be no way back, and nothing runs",
        ),
        (
            "planned",
            "final-sync promote start-group commit wait-healthy",
            13,
            "before 'wait-healthy'",
        ),
        (
            "planned",
            "final-sync promote start-group reprotect",
            13,
            "it overwrites what a rollback would return to",
        ),
        (
            "planned",
            "final-sync promote start-group commit rollback",
            16,
            "no way back",
        ),
        (
            "planned",
            "final-sync promote start-group rollback commit",
            16,
            "at its source again",
        ),
        (
            "planned",
            "final-sync promote a=start-group again=promote",
            13,
            "a second time, after 'promote'",
        ),
        (
            "planned",
            "final-sync promote start-group remap",
            13,
            "the guests run on their networks already",
        ),
        ("planned", "final-sync promote", 7, "nothing would run"),
        (
            "planned",
            "final-sync",
            4,
            "the source would stand still, and nothing run here",
        ),
        ("test", start, 4, "it would stay for ever"),
        (
            "test",
            "cleanup promote start-group",
            4,
            "nothing to take back",
        ),
        (
            "test",
            "wait-healthy promote start-group cleanup",
            4,
            "nobody can be healthy",
        ),
        (
            "test",
            "remap promote start-group cleanup",
            4,
            "nothing to act on",
        ),
        (
            "test",
            "commit promote start-group cleanup",
            4,
            "never lets it run",
        ),
    ] {
        let text = with(mode, &of_kinds(kinds));
        let lines = told(&text, None);
        let at = lines.iter().find(|told| told.contains(wanted));
        let at = at.unwrap_or_else(|| panic!("{mode}: {kinds}: {wanted}: {lines:#?}"));
        // On the step's own line, or on that of one of its keys.
        let its: usize = at.split(':').nth(1).unwrap().parse().unwrap();
        assert!(
            (line..line + 3).contains(&its),
            "{kinds}: line {its}, not {line}: {at}"
        );
    }
}

#[test]
fn values_that_cannot_be_kept_are_told_with_their_reason() {
    let sound = "[[steps]]\nname='s'\ndo='final-sync'\n[[steps]]\nname='p'\ndo='promote'\n[[steps]]\nname='g'\ndo='start-group'\n";
    assert!(read::text(Path::new("r"), &with("planned", sound), None).is_ok());
    for (step, wanted) in [
        (
            "do='approve'\nby=['anna']",
            "a decision that nobody takes would hold the run for ever",
        ),
        (
            "do='approve'\nby=[]\ntimeout='1m'",
            "is empty; name who may decide",
        ),
        ("do='approve'\ntimeout='1m'", "'steps.x.by' is missing"),
        (
            "do='approve'\nby=['anna']\napprovals=2\ntimeout='1m'",
            "names only 1",
        ),
        (
            "do='approve'\nby=['anna','anna']\ntimeout='1m'",
            "names \"anna\" twice",
        ),
        (
            "do='approve'\nby=['anna']\ntimeout='1m'\non-error='continue'",
            "a refusal would be passed over",
        ),
        (
            "do='wait-healthy'\nguests=['dbb']",
            "names \"dbb\", which is not in bank; did you mean 'db'?",
        ),
        (
            "do='wait-healthy'\ntcp='a:1'\nhttp='http://a'",
            "is one check too many",
        ),
        ("do='wait-healthy'\ntcp='a'", "expected host:port"),
        (
            "do='wait-healthy'\nevery='10m'",
            "longer than the 5m that the step has",
        ),
        ("do='wait-healthy'\nagent=false", "checks nothing"),
        (
            "do='wait-healthy'\ngroup='bnak'",
            "which is not in [groups]; did you mean 'bank'?",
        ),
        ("do='commit'\nguests=['db']", "a group goes as a whole"),
        ("do='exec'\nrun=['true']", "absolute path"),
        (
            "do='exec'\nrun=['/bin/true']\ngroup='bank'",
            "has no meaning for exec",
        ),
        ("do='delay'\nfor='1s'\ntimeout='1m'", "it ends by itself"),
        ("do='delay'\nfor='1s'\nmodes=['test']", "never lets it run"),
        ("do='delay'\nfor='1s'\nmodes=[]", "would never run"),
        ("do='cleanup'", "never lets it run"),
        (
            "do='commit'\nmodes=['test','planned']",
            "a test never stays; use cleanup",
        ),
        ("do='check'\nchecks=['lnik']", "did you mean 'link'?"),
        (
            "do='exec'\nrun='/bin/true'",
            "expected a list, like [\"one\", \"two\"]",
        ),
        (
            "do='webhook'\nurl='https://a'\nmethod='get'",
            "expected one of GET, POST, PUT",
        ),
    ] {
        let lines = told(
            &with("planned", &format!("{sound}[[steps]]\nname='x'\n{step}\n")),
            None,
        );
        assert_eq!(lines.len(), 1, "{step}: {lines:#?}");
        assert!(lines[0].contains(wanted), "{step}: {}", lines[0]);
    }
    for (line, wanted) in [
        (
            "do='fence'\non-error='continue'",
            "a guest could run at both sites",
        ),
        (
            "do='final-sync'\nmodes=['unplanned']",
            "where the source is most often lost",
        ),
        (
            "do='promote'\npoint=3\nmodes=['planned']",
            "goes on from the last instruction",
        ),
    ] {
        let text = format!("name='r'\ngroups.bank=[]\n[[steps]]\nname='x'\n{line}\n");
        let lines = told(&text, None);
        assert!(lines.iter().any(|told| told.contains(wanted)), "{lines:#?}");
    }
    // A guest that is waited for before it is started, and one that nobody starts.
    let tiers = "[[steps]]\nname='s'\ndo='final-sync'\n[[steps]]\nname='p'\ndo='promote'\n[[steps]]\nname='g'\ndo='start-group'\nguests=['db']\n[[steps]]\nname='w'\ndo='wait-healthy'\n";
    let lines = told(&with("planned", &format!("{tiers}guests=['app']\n")), None);
    assert!(
        lines.iter().any(|told| told.starts_with(
            "r.toml:17: 'steps.w.guests' names \"app\", which no start-group has started"
        )),
        "{lines:#?}"
    );
    assert!(
        lines
            .iter()
            .any(|told| told.starts_with("r.toml:13: 'steps.g.guests' leaves out \"app\"")),
        "{lines:#?}"
    );
}

#[test]
fn groups_and_guests_are_those_of_the_policy_files() {
    let files: PolicyFiles = {
        let mut files = PolicyFiles::default();
        let group = files.groups.entry("bank".to_owned()).or_default();
        for guest in ["db", "app", "web"] {
            group.guests.insert(guest.to_owned(), Default::default());
        }
        files
    };
    let known = Known::of(&files);
    let steps = of_kinds("final-sync promote start-group");
    let lines = told(&with("planned", &steps), Some(&known));
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(
        lines[0].starts_with("r.toml:3: 'groups.bank' lacks \"web\", which is in that group now"),
        "{lines:#?}"
    );
    let all = with("planned", &steps).replace("'db', 'app'", "");
    assert!(read::text(Path::new("r"), &all, Some(&known)).is_ok());
    let lines = told(&all.replace(".bank", ".bnak"), Some(&known));
    assert_eq!(
        lines,
        ["r.toml:3: 'groups.bnak' is no group of the policy files; did you mean 'bank'?"]
    );
}

#[test]
fn files_that_are_no_runbook_are_refused_with_words() {
    assert!(told("[[steps]\n", None)[0].contains("not TOML"));
    assert!(
        told("steps = 3\n", None)
            .iter()
            .any(|told| told.contains("is no list of tables"))
    );
    assert!(
        told("steps = [3]\n", None)
            .iter()
            .any(|told| told.contains("is no table"))
    );
    let many = of_kinds("check").repeat(300);
    assert!(
        told(&with("test", &many), None)
            .iter()
            .any(|told| told.contains("has 300 steps"))
    );
    let absent = read::file(Path::new("/nowhere/r.toml"), None)
        .unwrap_err()
        .to_string();
    assert!(
        absent.contains("/nowhere/r.toml") && absent.contains("runbook export"),
        "{absent}"
    );
    let large = " ".repeat(2 << 20);
    let large = read::text(Path::new("r"), &large, None);
    assert!(matches!(large, Err(LoadError::TooLarge { .. })));
}

/// What a file of the largest size can make the checks do is bounded.
#[test]
fn a_runbook_without_measure_is_refused_with_a_bounded_answer() {
    let groups = |count: usize| -> String {
        (0..count)
            .map(|n| format!("groups.g{n} = ['a{n}', 'b{n}']\n"))
            .collect()
    };
    let steps: String = (0..256)
        .map(|n| format!("[[steps]]\nname='s{n}'\ndo='promote'\n"))
        .collect();
    let many = told(&format!("name='r'\n{}{steps}", groups(100)), None);
    assert!((256..=500).contains(&many.len()), "{}", many.len());
    let more = told(&format!("name='r'\n{}{steps}", groups(101)), None);
    assert_eq!(
        more,
        ["r.toml:2: 'groups' has 101 groups; at most 100 can go in one run"]
    );
    let long = told(
        &format!(
            "name='r'\ngroups.{} = []\n{}",
            "g".repeat(64),
            of_kinds("check")
        ),
        None,
    );
    assert!(
        long.len() == 1 && long[0].contains("has the name"),
        "{long:?}"
    );
}
