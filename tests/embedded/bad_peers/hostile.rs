//! The hostile site: a key, a node, and messages of its own making.

use farhaven::activate::fence::Term;
use farhaven::guest::Definition;
use farhaven::guest::embedded::Definition as EmbeddedDefinition;
use farhaven::replicate::message::{
    CommitTerms, Envelope, Message, Opening, PointContext, Refusal, SealRequest,
};
use farhaven_policies::policy::Policy;
use farhaven_storage_sync::unit::GuestId;
use farhaven_wan::{
    Identity, Introduction, LinkOptions, Node, NodeOptions, Peer, PeerEvent, PeerRecord, SiteKey,
};

use super::*;

pub struct Hostile {
    pub node: Node,
    pub peer: Peer,
    name: String,
    identity: Identity,
    definition: Definition,
    asked: u64,
    /// Answers that came while another was waited for.
    answers: Vec<(u64, Message)>,
}

fn node(identity: &Identity) -> Node {
    let link = LinkOptions {
        redial: (Duration::from_millis(50), Duration::from_millis(300)),
        ..LinkOptions::default()
    };
    let listen = "127.0.0.1:0".parse().unwrap();
    Node::start(identity, NodeOptions { listen, link }).unwrap()
}

fn not_now() -> Message {
    Message::Refused {
        code: Refusal::Unable,
        why: "not now".to_owned(),
    }
}

impl Hostile {
    /// Paired with west, by an invitation as any site.
    pub async fn pair(stage: &Stage, name: &str) -> Self {
        let identity = Identity::load_or_create(&stage.dir.path().join(name), name).unwrap();
        let node = node(&identity);
        let invitation = stage.west.invite(Duration::from_secs(60)).unwrap();
        let own = Introduction::new(name, Vec::new()).unwrap();
        let record = node.accept_invitation(&invitation, &own).await.unwrap();
        Self::connect(&stage.definition, identity, node, record, name).await
    }

    /// In the place of east, which has ended.
    pub async fn instead_of_east(stage: &Stage, west: Vec<String>) -> Self {
        let directory = stage.dir.path().join("east").join("identity");
        let record = PeerRecord {
            site: "west".to_owned(),
            key: stage.west.key(),
            addresses: west,
            dial: true,
        };
        Self::trusted(&directory, "east", &stage.definition, record).await
    }

    /// By a key that west trusts already.
    pub async fn trusted(
        directory: &Path,
        name: &str,
        definition: &EmbeddedDefinition,
        west: PeerRecord,
    ) -> Self {
        let identity = Identity::load_or_create(directory, name).unwrap();
        let node = node(&identity);
        Self::connect(definition, identity, node, west, name).await
    }

    async fn connect(
        definition: &EmbeddedDefinition,
        identity: Identity,
        node: Node,
        record: PeerRecord,
        name: &str,
    ) -> Self {
        let peer = node.trust(record);
        let mut hostile = Self {
            node,
            peer,
            name: name.to_owned(),
            identity,
            definition: Definition::Embedded(definition.clone()),
            asked: 0,
            answers: Vec::new(),
        };
        hostile.connected().await;
        hostile
    }

    /// Accepts one more invitation of west, by this name; west hears of it.
    pub async fn accept(&mut self, stage: &Stage, name: &str) {
        let invitation = stage.west.invite(Duration::from_secs(60)).unwrap();
        let own = Introduction::new(name, Vec::new()).unwrap();
        let record = self
            .node
            .accept_invitation(&invitation, &own)
            .await
            .unwrap();
        self.peer = self.node.trust(record);
        // West takes pairings in by a task of its own.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }

    pub fn key(&self) -> SiteKey {
        self.identity.key()
    }

    async fn event(&mut self) -> PeerEvent {
        let event = tokio::time::timeout(2 * PATIENCE, self.peer.event()).await;
        event.expect("something happens").expect("it is trusted")
    }

    /// Waits for the next connection.
    pub async fn connected(&mut self) {
        while !matches!(self.event().await, PeerEvent::Connected { .. }) {}
    }

    /// Waits until the session ends; why.
    pub async fn disconnected(&mut self) -> String {
        loop {
            if let PeerEvent::Disconnected { why } = self.event().await {
                return why;
            }
        }
    }

    /// Did this question get an answer?
    pub fn has_answer(&self, id: u64) -> bool {
        self.answers.iter().any(|(to, _)| *to == id)
    }

    pub async fn say(&self, bytes: Vec<u8>) {
        let _ = self.peer.send_message(bytes.into()).await;
    }

    pub async fn answer(&self, to: u64, body: Message) {
        let answer = Envelope {
            id: None,
            answers: Some(to),
            body,
        };
        self.say(answer.encode().unwrap().to_vec()).await;
    }

    /// Refuses what west asks, until it asks this; that is not answered.
    pub async fn asked(&mut self, wanted: impl Fn(&Message) -> bool) -> Message {
        loop {
            let PeerEvent::Message(bytes) = self.event().await else {
                continue;
            };
            let asked = Envelope::decode(&bytes).unwrap();
            if wanted(&asked.body) {
                return asked.body;
            }
            if let Some(id) = asked.id {
                self.answer(id, not_now()).await;
            }
        }
    }

    /// Answers west's questions so for some time, keeping no data and saying that it is
    /// durable; how many it answered. What it has no answer for is refused.
    pub async fn serve(
        &mut self,
        answer: impl Fn(&Message) -> Option<Message>,
        time: Duration,
    ) -> u64 {
        let until = Instant::now() + time;
        let mut answered = 0;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            let Ok(event) = tokio::time::timeout(left, self.peer.event()).await else {
                break;
            };
            match event.expect("it is trusted") {
                PeerEvent::Data { seq, .. } => self.peer.durable(&[seq]),
                PeerEvent::Message(bytes) => {
                    let asked = Envelope::decode(&bytes).unwrap();
                    let Some(id) = asked.id else { continue };
                    let told = answer(&asked.body);
                    answered += u64::from(told.is_some());
                    self.answer(id, told.unwrap_or_else(not_now)).await;
                }
                _ => {}
            }
        }
        answered
    }

    /// Answers west's questions so until this is done; what it has no answer for is
    /// refused.
    pub async fn lie_until<T>(
        &mut self,
        lie: impl Fn(&Message) -> Option<Message>,
        done: impl Future<Output = T>,
    ) -> T {
        let mut done = std::pin::pin!(done);
        loop {
            let event = tokio::select! {
                done = &mut done => return done,
                event = self.event() => event,
            };
            self.heard(event, &lie).await;
        }
    }

    /// Asks, and answers what west asks so before it answers itself.
    pub async fn ask_and_lie(
        &mut self,
        body: Message,
        lie: impl Fn(&Message) -> Option<Message>,
    ) -> Result<Message, String> {
        let id = self.question(body).await?;
        while !self.has_answer(id) {
            match self.event().await {
                PeerEvent::Disconnected { why } => return Err(why),
                event => self.heard(event, &lie).await,
            }
        }
        self.answer_to(id).await
    }

    /// An answer is kept, a question is answered so.
    async fn heard(&mut self, event: PeerEvent, lie: impl Fn(&Message) -> Option<Message>) {
        let PeerEvent::Message(bytes) = event else {
            return;
        };
        let Envelope { id, answers, body } = Envelope::decode(&bytes).unwrap();
        if let Some(to) = answers {
            self.answers.push((to, body));
        } else if let Some(id) = id {
            self.answer(id, lie(&body).unwrap_or_else(not_now)).await;
        }
    }

    /// Asks, and does not wait; the question's number.
    pub async fn question(&mut self, body: Message) -> Result<u64, String> {
        self.asked += 1;
        let question = Envelope {
            id: Some(self.asked),
            answers: None,
            body,
        };
        let sent = self.peer.send_message(question.encode().unwrap()).await;
        sent.map(|()| self.asked).map_err(|e| e.to_string())
    }

    /// The answer; an error when the session ends before it comes.
    pub async fn answer_to(&mut self, id: u64) -> Result<Message, String> {
        if let Some(at) = self.answers.iter().position(|(to, _)| *to == id) {
            return Ok(self.answers.swap_remove(at).1);
        }
        loop {
            match self.event().await {
                PeerEvent::Disconnected { why } => return Err(why),
                PeerEvent::Message(bytes) => match Envelope::decode(&bytes).unwrap() {
                    Envelope {
                        answers: Some(to),
                        body,
                        ..
                    } if to == id => return Ok(body),
                    Envelope {
                        answers: Some(to),
                        body,
                        ..
                    } => self.answers.push((to, body)),
                    _ => {}
                },
                _ => {}
            }
        }
    }

    pub async fn ask(&mut self, body: Message) -> Result<Message, String> {
        let id = self.question(body).await?;
        // A refusal and the end of the session may come in either order.
        match self.answer_to(id).await {
            Ok(Message::Refused { code, why }) => {
                let soon = Duration::from_millis(500);
                match tokio::time::timeout(soon, self.disconnected_now()).await {
                    Ok(why) => Err(why),
                    Err(_) => Ok(Message::Refused { code, why }),
                }
            }
            other => other,
        }
    }

    async fn disconnected_now(&mut self) -> String {
        loop {
            match self.peer.event().await {
                Some(PeerEvent::Disconnected { why }) => return why,
                Some(PeerEvent::Message(bytes)) => {
                    if let Ok(Envelope {
                        answers: Some(to),
                        body,
                        ..
                    }) = Envelope::decode(&bytes)
                    {
                        self.answers.push((to, body));
                    }
                }
                _ => {}
            }
        }
    }

    pub fn opening(&self, guest: GuestId, name: &str, number: u64) -> Opening {
        Opening {
            guest,
            name: name.to_owned(),
            source: self.name.clone(),
            definition: self.definition.clone(),
            volumes: Vec::new(),
            term: Term {
                group: guest,
                number,
                owner: self.key(),
            },
            warm: false,
            retention: Policy::default().retention,
            schedule: None,
            rpo_ms: None,
            commit: CommitTerms::default(),
        }
    }

    /// A guest of its own, as an honest site opens one.
    pub async fn open(&mut self, guest: GuestId, name: &str, number: u64) {
        let opening = self.opening(guest, name, number);
        let told = self.ask(Message::Open(Box::new(opening))).await;
        assert!(matches!(told, Ok(Message::Opened(_))), "{told:?}");
    }

    pub fn seal(&self, guest: GuestId, name: &str, point: u64, term: u64, batches: u64) -> Message {
        Message::Seal(Box::new(SealRequest {
            guest,
            point,
            parent: 0,
            cut_at: 1,
            volumes: Vec::new(),
            batches,
            chain: [0; 32],
            context: PointContext {
                name: name.to_owned(),
                source: self.name.clone(),
                term,
                definition: self.definition.clone(),
                pause: Duration::ZERO,
                ram_scan: Duration::ZERO,
                ram_scanned_bytes: 0,
                changed_bytes: 0,
                sent_bytes: 0,
                base: false,
                group: None,
                quiesced: None,
            },
            activate: None,
        }))
    }
}
