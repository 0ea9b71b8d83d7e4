//! Operators who order things of sites, at bad moments.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use farhaven::site::Site;
use farhaven::site::turn::RollBack;
use rand::Rng;

use super::world::{SECOND, World};

/// After an operator decided against what the other site may do, that site may
/// run the guest until it hears of it: so long after both can speak again.
const HEARS_WITHIN: u64 = 30 * SECOND;
/// A link that carried for so long has a connection, and both know so.
const SETTLED: u64 = 15 * SECOND;

/// What is ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Protect,
    Move,
    FailOver { force: bool, back: u64 },
    Test,
    EndTest,
    RollBack,
    RollBackTo { back: u64 },
    Commit { discard: bool },
    Reprotect,
    Pause,
    Resume,
    TakeBack,
    FailOverGroup { force: bool },
}

impl Order {
    /// Whether it is a person's decision that a guest runs here.
    fn decides(self) -> bool {
        matches!(
            self,
            Order::FailOver { .. } | Order::FailOverGroup { .. } | Order::TakeBack
        )
    }
}

/// An order under way, or done.
#[derive(Debug)]
struct Given {
    order: Order,
    guest: u32,
    process: u64,
    /// It is a person's decision against what the other site may know.
    overrides: bool,
    done: Option<u64>,
}

/// The point that so many newer ones follow.
async fn earlier(site: &Arc<Site>, name: &str, back: u64) -> Option<u64> {
    let points = site.points(name).await.ok()?;
    let at = points.len().checked_sub(1 + back as usize)?;
    points.get(at).map(|point| point.point)
}

/// All orders of a run.
pub struct Operators {
    given: Vec<Given>,
    answers: Receiver<(usize, Result<String, String>)>,
    answer: Sender<(usize, Result<String, String>)>,
    pub ordered: u64,
    pub succeeded: u64,
}

impl Operators {
    pub fn new() -> Operators {
        let (answer, answers) = channel();
        Operators {
            given: Vec::new(),
            answers,
            answer,
            ordered: 0,
            succeeded: 0,
        }
    }

    /// Orders something of a site.
    pub fn order(&mut self, world: &World, side: usize, guest: u32, order: Order) {
        let Some(process) = &world.hosts[side].process else {
            return;
        };
        // By force with the link up: the other site is made to stop it first.
        let by_force = matches!(
            order,
            Order::FailOver { force: true, .. } | Order::FailOverGroup { force: true }
        );
        let overrides = order.decides() && !(by_force && world.whole_for(SETTLED));
        let (at, answer) = (self.given.len(), self.answer.clone());
        self.given.push(Given {
            order,
            guest,
            process: process.number,
            overrides,
            done: None,
        });
        self.ordered += 1;
        let (site, name) = (process.site.clone(), format!("g{guest}"));
        let peer = world.hosts[1 - side].name.clone();
        process.runtime.spawn(async move {
            let second = "1s".parse().ok();
            let done = match order {
                Order::Protect => site
                    .protect(&name, &peer, second)
                    .await
                    .map(|_| String::new()),
                Order::Move => {
                    let moved = site.move_guest(&name, true).await;
                    moved.map(|report| format!("term {}", report.term))
                }
                Order::FailOver { force, back } => {
                    let point = if back == 0 {
                        None
                    } else {
                        earlier(&site, &name, back).await
                    };
                    let over = site.fail_over(&name, point, force).await;
                    over.map(|report| format!("point {} term {}", report.point, report.term))
                }
                Order::Test => site.test(&name, None).await.map(|_| String::new()),
                Order::EndTest => site.end_test(&name).await.map(|_| String::new()),
                Order::RollBack => {
                    let to = RollBack {
                        point: None,
                        accept_loss: true,
                    };
                    let back = site.rollback(&name, to).await;
                    back.map(|report| format!("term {}", report.term))
                }
                Order::RollBackTo { back } => {
                    let to = RollBack {
                        point: earlier(&site, &name, back).await,
                        accept_loss: true,
                    };
                    let back = site.rollback(&name, to).await;
                    back.map(|report| format!("term {}", report.term))
                }
                Order::Commit { discard } => {
                    site.commit(&name, discard).await.map(|_| String::new())
                }
                Order::Reprotect => site.reprotect(&name, second).await.map(|_| String::new()),
                Order::Pause => site.pause(&name).await.map(|()| String::new()),
                Order::Resume => site.resume(&name).await.map(|()| String::new()),
                Order::FailOverGroup { force } => {
                    let over = site.fail_over_group("pair", None, force).await;
                    over.map(|_| String::new())
                }
                Order::TakeBack => site.take_back(&name, true).await.map(|()| String::new()),
            };
            let _ = answer.send((at, done.map_err(|why| why.to_string())));
        });
    }

    /// Takes in what came of orders; each in words.
    pub fn listen(&mut self, world: &World) -> Vec<String> {
        let mut words = Vec::new();
        while let Ok((at, outcome)) = self.answers.try_recv() {
            let given = &mut self.given[at];
            given.done = Some(world.now);
            self.succeeded += u64::from(outcome.is_ok());
            let (guest, order) = (given.guest, given.order);
            words.push(match outcome {
                Ok(done) => format!("g{guest}: {order:?}: done {done}"),
                Err(why) => format!("g{guest}: {order:?}: refused: {why}"),
            });
        }
        words
    }

    /// The link was cut, or a site killed: a decision under way finds the other
    /// site silent, and what a killed site was told is done as far as it is.
    pub fn disturbed(&mut self, world: &World) {
        let lives = |process: u64| {
            let mut live = world.hosts.iter().filter_map(|host| host.process.as_ref());
            live.any(|live| live.number == process)
        };
        for given in self.given.iter_mut().filter(|given| given.done.is_none()) {
            given.overrides |= given.order.decides();
            if !lives(given.process) {
                given.done = Some(world.now);
            }
        }
    }

    /// Whether a person's decision explains that this guest runs twice now.
    pub fn overrode(&self, world: &World, guest: u32) -> bool {
        let decided = self
            .given
            .iter()
            .filter(|g| g.guest == guest && g.overrides);
        decided.into_iter().any(|given| match given.done {
            None => true,
            Some(done) => {
                let together = world.whole_since.max(done);
                world.whole_since == u64::MAX
                    || !world.whole_for(0)
                    || together.saturating_add(HEARS_WITHIN) > world.now
            }
        })
    }

    /// Forgets decisions that both sites have heard of.
    pub fn settle(&mut self, world: &World) {
        if !world.whole_for(HEARS_WITHIN) {
            return;
        }
        for given in &mut self.given {
            let heard = |done: u64| done + HEARS_WITHIN <= world.now;
            if given.done.is_some_and(heard) {
                given.overrides = false;
            }
        }
    }

    /// Some order by chance.
    pub fn by_chance(&mut self, world: &mut World, guests: u32) -> String {
        let side = world.random.random_range(0..world.hosts.len());
        let guest = world.random.random_range(0..guests);
        let back = match world.random.random_range(0..4) {
            0 => world.random.random_range(1..4),
            _ => 0,
        };
        let order = match world.random.random_range(0..100) {
            0..25 => Order::Move,
            25..30 if world.grouped => Order::FailOverGroup {
                force: world.random.random_bool(0.5),
            },
            25..45 => Order::FailOver {
                force: world.random.random_bool(0.5),
                back,
            },
            45..51 => Order::Test,
            51..55 => Order::EndTest,
            55..66 => Order::RollBack,
            66..69 => Order::RollBackTo { back: back.max(1) },
            69..79 => Order::Commit {
                discard: world.random.random_bool(0.2),
            },
            79..91 => Order::Reprotect,
            91..93 => Order::Pause,
            93..97 => Order::Resume,
            97..98 => Order::TakeBack,
            _ => Order::Protect,
        };
        self.order(world, side, guest, order);
        format!("{}: g{guest}: {order:?}", world.hosts[side].name)
    }
}
