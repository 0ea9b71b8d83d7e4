//! The API over TLS: who is let in, for what, and what becomes of those who
//! waste its time.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use farhaven::client::{Client, Trust};
use farhaven::site::api::rights::{self, Caller, May, Right, Role};
use farhaven::site::api::{AddToken, Done, TokenAdded, TokenView};
use farhaven::site::view::SiteView;
use farhaven_wan::SiteKey;
use tokio::sync::oneshot;

use super::*;

struct Served {
    site: Arc<Site>,
    host: Client,
    socket: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    serving: tokio::task::JoinHandle<std::io::Result<()>>,
    dir: tempfile::TempDir,
}

impl Served {
    async fn start() -> Self {
        Self::start_with(tempfile::tempdir().unwrap(), |_| {}).await
    }

    async fn start_with(dir: tempfile::TempDir, change: impl FnOnce(&mut SiteConfig)) -> Self {
        let mut config = config(dir.path(), "east");
        config.api.listen = "127.0.0.1:0".to_owned();
        change(&mut config);
        let socket = config.api_socket();
        let site = Site::start(config).await.unwrap();
        let (stop, stopped) = oneshot::channel();
        let serving = {
            let (site, socket) = (site.clone(), socket.clone());
            tokio::spawn(async move {
                let stop = async {
                    let _ = stopped.await;
                };
                farhaven::site::api::serve(site, &socket, stop).await
            })
        };
        until("the socket", || UnixStream::connect(&socket).ok()).await;
        let host = Client::new(&socket);
        Self {
            site,
            host,
            socket,
            stop: Some(stop),
            serving,
            dir,
        }
    }

    async fn token(&self, name: &str, role: Role, may: &[May]) -> TokenAdded {
        let body = AddToken {
            name: name.to_owned(),
            role,
            may: may.to_vec(),
            expires_s: None,
        };
        self.host.post("/v1/tokens", &body).await.unwrap()
    }

    fn file(&self, token: &str) -> PathBuf {
        let path = self.dir.path().join("token");
        std::fs::write(&path, format!("{token}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
        path
    }

    fn client(&self, added: &TokenAdded, token: &str) -> Client {
        let trust = Trust {
            fingerprint: Some(added.fingerprint.as_ref().unwrap().parse().unwrap()),
            authority: None,
        };
        let url = format!("https://{}", added.listen.as_ref().unwrap());
        Client::over_tls(&url, Some(&self.file(token)), &trust).unwrap()
    }

    async fn end(mut self) {
        let _ = self.stop.take().unwrap().send(());
        let served = tokio::time::timeout(PATIENCE, self.serving).await;
        served.expect("it stops").unwrap().unwrap();
        assert!(!self.socket.exists());
        self.site.shutdown().await;
    }
}

async fn refused(client: &Client, words: &str) {
    let told = client.get::<SiteView>("/v1/status").await.unwrap_err();
    assert!(told.to_string().contains(words), "no {words:?} in: {told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_token_that_counts_is_let_in_by_a_server_that_is_known() {
    let served = Served::start().await;
    let added = served.token("anna", Role::Viewer, &[]).await;
    let anna = served.client(&added, &added.token);
    let view: SiteView = anna.get("/v1/status").await.unwrap();
    assert_eq!(view.site, "east");

    let none = served.client(&added, "farhaven-token-0000");
    refused(&none, "does not count here").await;
    // Another key than the one that is pinned.
    let mut other = added_with(&added, &served.site.key());
    other.token.clone_from(&added.token);
    let misled = served.client(&other, &added.token);
    refused(&misled, "no Farhaven daemon answers").await;

    // A viewer changes nothing.
    let told = anna.post::<Done>("/v1/guests/web/pause", &()).await;
    assert!(told.unwrap_err().to_string().contains("role operator"));
    let told = anna.get::<Vec<TokenView>>("/v1/tokens").await;
    assert!(told.unwrap_err().to_string().contains("role admin"));
    let tokens: Vec<TokenView> = served.host.get("/v1/tokens").await.unwrap();
    assert_eq!(tokens.len(), 1);

    // A right token is let in however many wrong ones came from there.
    for _ in 0..10 {
        let _ = none.get::<SiteView>("/v1/status").await;
    }
    refused(&none, "too many wrong tokens").await;
    anna.get::<SiteView>("/v1/status").await.unwrap();
    let _: Done = served.host.delete("/v1/tokens/anna").await.unwrap();
    assert!(anna.get::<SiteView>("/v1/status").await.is_err(), "revoked");
    served.end().await;
}

fn added_with(added: &TokenAdded, fingerprint: &SiteKey) -> TokenAdded {
    TokenAdded {
        token: String::new(),
        kept: added.kept.clone(),
        listen: added.listen.clone(),
        fingerprint: Some(fingerprint.to_string()),
    }
}

/// One request over the unix socket or TLS: status and body.
async fn status(client: &Client, method: &str, path: &str) -> Result<(), String> {
    let path = path.replace("{name}", "ghost").replace("{id}", "ghost");
    let told = match method {
        "GET" => client.get::<serde_json::Value>(&path).await,
        "DELETE" => client.delete::<serde_json::Value>(&path).await,
        _ => {
            client
                .post::<serde_json::Value>(&path, &serde_json::json!({"absurd": 1}))
                .await
        }
    };
    told.map(drop).map_err(|e| e.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_is_for_those_who_have_its_right() {
    let served = Served::start().await;
    let kinds: [(&str, Role, &[May]); 5] = [
        ("viewer", Role::Viewer, &[]),
        ("operator", Role::Operator, &[]),
        ("tester", Role::Operator, &[May::Test]),
        ("mover", Role::Operator, &[May::Failover]),
        ("admin", Role::Admin, &[]),
    ];
    let mut walked = 0;
    for (name, role, may) in kinds {
        let added = served.token(name, role, may).await;
        let client = served.client(&added, &added.token);
        let caller = Caller::of_token(name.to_owned(), role, may.to_vec());
        for (method, path, right) in rights::routes() {
            let told = status(&client, method, path).await;
            let forbidden = told
                .as_ref()
                .is_err_and(|why| why.contains("may not do that"));
            assert_eq!(
                forbidden,
                !caller.may(right),
                "{name}: {method} {path}: {told:?}"
            );
            // It exists: neither its path nor its method is unknown.
            for unknown in ["no such path", "is no method of", "nobody has a right"] {
                let is = told.as_ref().is_err_and(|why| why.contains(unknown));
                assert!(!is, "{name}: {method} {path}: {told:?}");
            }
            walked += 1;
        }
    }
    assert!(walked >= 5 * 30, "{walked}");
    // What nobody has a right to, nobody gets, on the unix socket neither.
    let raw = ask(
        &mut UnixStream::connect(&served.socket).unwrap(),
        "PUT /v1/status HTTP/1.1\r\nhost: x\r\n\r\n",
    );
    assert!(raw.starts_with("HTTP/1.1 405"), "{raw}");
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_points_is_for_administrators() {
    let served = Served::start().await;
    let added = served.token("op", Role::Operator, &[]).await;
    let client = served.client(&added, &added.token);
    let ask = |discard: bool| serde_json::json!({ "discard": discard });
    let path = "/v1/guests/ghost/unprotect";
    let told = client.post::<Done>(path, &ask(true)).await.unwrap_err();
    assert!(told.to_string().contains("role admin"), "{told}");
    let told = client.post::<Done>(path, &ask(false)).await.unwrap_err();
    assert!(told.to_string().contains("guest add ghost"), "{told}");
    for of in ["guests", "groups"] {
        let path = format!("/v1/{of}/ghost/points/release");
        let point = serde_json::json!({ "point": 1 });
        let told = client.post::<Done>(&path, &point).await.unwrap_err();
        assert!(told.to_string().contains("role admin"), "{of}: {told}");
    }
    assert!(!Caller::of_token("op".to_owned(), Role::Operator, vec![]).may(Right::Administer));
    served.end().await;
}

/// Sends bytes; what comes back until the other side closes.
fn ask(stream: &mut (impl Read + Write), bytes: &str) -> String {
    let _ = stream.write_all(bytes.as_bytes());
    let mut told = vec![0; 4096];
    let count = stream.read(&mut told).unwrap_or(0);
    String::from_utf8_lossy(&told[..count]).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn those_who_waste_its_time_are_sent_away() {
    let served = Served::start().await;
    let added = served.token("anna", Role::Viewer, &[]).await;
    let anna = served.client(&added, &added.token);
    let address: SocketAddr = added.listen.as_ref().unwrap().parse().unwrap();
    // Connections that say nothing: those of one address do not take all places.
    let mut idle: Vec<TcpStream> = (0..60)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    for stream in &mut idle {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
    }
    // Not TLS, not HTTP.
    let mut plain = TcpStream::connect(address).unwrap();
    plain.set_read_timeout(Some(PATIENCE)).unwrap();
    let told = ask(&mut plain, "GET /v1/status HTTP/1.1\r\n\r\n");
    assert!(!told.contains("HTTP"), "{told}");
    // All of them are closed by the server, and who is known is served again.
    tokio::task::spawn_blocking(move || {
        for mut stream in idle {
            let mut rest = Vec::new();
            let _ = stream.read_to_end(&mut rest);
        }
    })
    .await
    .unwrap();
    anna.get::<SiteView>("/v1/status").await.unwrap();

    // On the unix socket: heads that never end, are too long, too many; bodies
    // that never come, or are too large.
    let socket = served.socket.clone();
    let many: String = (0..200).map(|n| format!("x{n}: 1\r\n")).collect();
    let long = format!("x: {}\r\n", "y".repeat(100_000));
    let tried = [
        ("GET /v1/sta".to_owned(), ""),
        (
            format!("GET /v1/status HTTP/1.1\r\n{many}\r\n"),
            "HTTP/1.1 431",
        ),
        (
            format!("GET /v1/status HTTP/1.1\r\n{long}\r\n"),
            "HTTP/1.1 431",
        ),
        (
            "POST /v1/peers HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{".to_owned(),
            "HTTP/1.1 408",
        ),
        (
            "POST /v1/peers HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".to_owned()
                + &format!("10000\r\n{}\r\n", "z".repeat(65_536)).repeat(2),
            "HTTP/1.1 413",
        ),
    ];
    tokio::task::spawn_blocking(move || {
        let ways: Vec<_> = tried
            .into_iter()
            .map(|(request, answer)| {
                let socket = socket.clone();
                std::thread::spawn(move || {
                    let mut stream = UnixStream::connect(socket).unwrap();
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    let told = ask(&mut stream, &request);
                    let head = request.get(..40).unwrap_or(&request);
                    assert!(told.starts_with(answer), "{head}: {told}");
                    // A head that never ends gets nothing, or 408; never a wait without end.
                    let mut rest = Vec::new();
                    let closed = stream.read_to_end(&mut rest);
                    let reset = |e: &std::io::Error| e.kind() == ErrorKind::ConnectionReset;
                    assert!(closed.as_ref().is_ok() || closed.is_err_and(|e| reset(&e)));
                })
            })
            .collect();
        ways.into_iter().for_each(|way| way.join().unwrap());
    })
    .await
    .unwrap();
    served.host.get::<SiteView>("/v1/status").await.unwrap();
    served.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_others_may_read_is_not_served_with() {
    let dir = tempfile::tempdir().unwrap();
    let (key, certificate) = (dir.path().join("key.pem"), dir.path().join("cert.pem"));
    std::fs::write(&key, "rubbish").unwrap();
    std::fs::write(&certificate, "rubbish").unwrap();
    let mut config = config(dir.path(), "east");
    config.api.listen = "127.0.0.1:0".to_owned();
    (config.api.key, config.api.certificate) = (key.clone(), certificate);
    let socket = config.api_socket();
    let site = Site::start(config).await.unwrap();
    for (mode, words) in [(0o644, "others may read it"), (0o600, "no items found")] {
        std::fs::set_permissions(&key, PermissionsExt::from_mode(mode)).unwrap();
        let never = std::future::pending();
        let told = farhaven::site::api::serve(site.clone(), &socket, never).await;
        let why = told.unwrap_err().to_string();
        assert!(why.contains(words), "{why}");
    }
    assert!(!socket.exists(), "nothing is served by half");
    site.shutdown().await;
}
