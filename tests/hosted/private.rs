//! After a whole life of a site nobody but its user can read what it left, and
//! its log, as talkative as it gets, told no secret.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::*;

/// Everything below a directory, itself included, with its mode.
fn below(path: &Path, found: &mut Vec<(PathBuf, fs::Metadata)>) {
    let facts = fs::symlink_metadata(path).unwrap();
    let is_directory = facts.is_dir();
    found.push((path.to_owned(), facts));
    if is_directory {
        for entry in fs::read_dir(path).unwrap() {
            below(&entry.unwrap().path(), found);
        }
    }
}

/// What must not be in a log: whole, and as pieces that would do.
fn secrets(site: &TestSite) -> Vec<String> {
    let identity = site.dir.join("identity");
    let mut secrets = Vec::new();
    for file in ["site-key.pem", "api/site-key.pem"] {
        let pem = fs::read_to_string(identity.join(file)).unwrap();
        secrets.extend(
            pem.lines()
                .filter(|l| !l.starts_with('-'))
                .map(str::to_owned),
        );
    }
    let key = fs::read(identity.join("digest-key")).unwrap();
    assert_eq!(key.len(), 32);
    secrets.push(key.iter().map(|byte| format!("{byte:02x}")).collect());
    secrets.push(format!("{key:?}").trim_matches(['[', ']']).to_owned());
    assert!(
        secrets.iter().all(|secret| secret.len() > 30),
        "{secrets:?}"
    );
    secrets
}

#[test]
fn what_a_site_leaves_is_private_and_its_log_tells_no_secret() {
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let api = tcp.local_addr().unwrap();
    drop(tcp);
    let trace = "[log]\nlevel = \"trace\"";
    let west = format!("{trace}\n[api]\nlisten = \"{api}\"");
    let mut pair = Pair::start(LINK, trace, &west);
    let invited = pair.west.cli(&["pair", "--json"]).good();
    let invited: serde_json::Value = serde_json::from_str(&invited.out).unwrap();
    let mut told = vec![invited["invitation"].as_str().unwrap().to_owned()];
    let added = pair
        .west
        .cli(&["token", "add", "anna", "--role", "admin", "--json"])
        .good();
    let added: serde_json::Value = serde_json::from_str(&added.out).unwrap();
    told.push(added["token"].as_str().unwrap().to_owned());
    let token = pair.dir.path().join("token");
    fs::write(&token, &told[1]).unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
    let over_tls = [
        "--api".to_owned(),
        format!("https://{api}"),
        "--api-fingerprint".to_owned(),
        added["fingerprint"].as_str().unwrap().to_owned(),
        "--token-file".to_owned(),
        token.display().to_string(),
    ];
    let with_token = |more: &[&str]| {
        let mut args: Vec<&str> = over_tls.iter().map(String::as_str).collect();
        args.extend(more);
        pair.west.cli_alone(&args)
    };
    with_token(&["status"]).good();

    let console = start(&pair.east, "trial", "sim");
    console.await_beat(3, LONG);
    let protect = ["protect", "trial", "--to", "west", "--rpo", "1s"];
    pair.east.cli(&protect).good();
    pair.east.until_sealed("trial", 3, LONG);
    with_token(&["test", "trial"]).good();
    with_token(&["test", "cleanup", "trial"]).good();
    with_token(&["failover", "trial", "--force"]).good();
    let log = pair.west.log();
    assert!(log.contains("by=\"anna\""), "who did it is in the log");

    let mut found = Vec::new();
    for site in [&pair.east, &pair.west] {
        below(&site.dir, &mut found);
        let text = fs::read_to_string(site.dir.join("site.toml")).unwrap();
        let ram = text.split("ram_dir = \"").nth(1).unwrap();
        below(Path::new(ram.split('"').next().unwrap()), &mut found);
    }
    let sockets = found
        .iter()
        .filter(|(_, f)| f.file_type().is_socket())
        .count();
    assert!(
        found.len() > 30 && sockets >= 4,
        "{} {sockets}",
        found.len()
    );
    let mut open = Vec::new();
    for (path, facts) in &found {
        // The test's own, not the site's.
        let ours = path.ends_with("daemon.log") || facts.is_symlink();
        if !ours && facts.mode() & 0o077 != 0 {
            open.push(format!("{:o} {}", facts.mode() & 0o777, path.display()));
        }
    }
    assert!(open.is_empty(), "others may use:\n{}", open.join("\n"));

    for site in [&pair.east, &pair.west] {
        told.extend(match site.name.as_str() {
            "west" => secrets(site),
            _ => Vec::new(),
        });
    }
    for site in [&mut pair.east, &mut pair.west] {
        let log = site.log();
        assert!(log.contains("TRACE"), "it is as talkative as it gets");
        for secret in &told {
            assert!(!log.contains(secret.as_str()), "{}: {secret}", site.name);
        }
    }
}
