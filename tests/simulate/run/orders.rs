//! What operators order, and how a site is told.

use std::sync::Arc;

use farhaven::site::Site;
use farhaven::site::groups::{FailOverGroup, GroupRollBack};
use farhaven::site::turn::RollBack;
use rand::Rng;
use rand::rngs::StdRng;

use super::books::{self, Book, Word};
use super::world::GROUP;

/// What is ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Protect,
    Unprotect,
    Move,
    FailOver {
        force: bool,
        back: u64,
    },
    Test,
    EndTest,
    RollBack,
    RollBackTo {
        back: u64,
    },
    Commit {
        discard: bool,
    },
    Reprotect,
    Pause,
    Resume,
    TakeBack,
    Scrub,
    MoveGroup,
    FailOverGroup {
        force: bool,
    },
    TestGroup,
    EndTestGroup,
    RollBackGroup {
        back: Option<u64>,
    },
    CommitGroup {
        discard: bool,
    },
    ReprotectGroup,
    /// Of the guest, or of its group.
    Run {
        book: Book,
        group: bool,
    },
    Say(Word),
    Evacuate,
    PauseEvacuation,
    ResumeEvacuation,
    AbortEvacuation,
}

impl Order {
    /// Whether it is a person's decision that a guest runs here.
    pub fn decides(self) -> bool {
        matches!(
            self,
            Order::FailOver { .. }
                | Order::FailOverGroup { .. }
                | Order::TakeBack
                | Order::Run {
                    book: Book::Unplanned { .. },
                    ..
                }
        )
    }

    /// Whether it goes on when its daemon comes back.
    pub fn outlives_its_daemon(self) -> bool {
        matches!(self, Order::Run { .. })
    }

    /// Whether it is meant also for where the other site is alive.
    pub fn by_force(self) -> bool {
        matches!(
            self,
            Order::FailOver { force: true, .. }
                | Order::FailOverGroup { force: true }
                | Order::Run {
                    book: Book::Unplanned { force: true, .. },
                    ..
                }
        )
    }

    /// Whether it is about all guests of the group.
    pub fn of_group(self) -> bool {
        matches!(
            self,
            Order::MoveGroup
                | Order::FailOverGroup { .. }
                | Order::TestGroup
                | Order::EndTestGroup
                | Order::RollBackGroup { .. }
                | Order::CommitGroup { .. }
                | Order::ReprotectGroup
                | Order::Run { group: true, .. }
        )
    }

    /// Whether it makes sense at the site where the guest does not run.
    pub fn is_for_the_other_site(self) -> bool {
        matches!(
            self,
            Order::FailOver { .. }
                | Order::FailOverGroup { .. }
                | Order::Test
                | Order::EndTest
                | Order::TestGroup
                | Order::EndTestGroup
                | Order::Run { .. }
        )
    }

    /// Some order about what goes on by itself.
    pub fn of_operations_by_chance(random: &mut StdRng, grouped: bool) -> Order {
        match random.random_range(0..20) {
            0..9 => Order::Run {
                book: Book::by_chance(random),
                group: grouped && random.random_bool(0.5),
            },
            9..16 => Order::Say(Word::by_chance(random)),
            16..18 => Order::Evacuate,
            18 => match random.random_bool(0.5) {
                true => Order::PauseEvacuation,
                false => Order::ResumeEvacuation,
            },
            _ => Order::AbortEvacuation,
        }
    }

    /// Some order about one guest.
    pub fn by_chance(random: &mut StdRng) -> Order {
        let back = match random.random_range(0..4) {
            0 => random.random_range(1..4),
            _ => 0,
        };
        match random.random_range(0..100) {
            0..24 => Order::Move,
            24..43 => Order::FailOver {
                force: random.random_bool(0.5),
                back,
            },
            43..50 => Order::Test,
            50..54 => Order::EndTest,
            54..65 => Order::RollBack,
            65..68 => Order::RollBackTo { back: back.max(1) },
            68..78 => Order::Commit {
                discard: random.random_bool(0.2),
            },
            78..90 => Order::Reprotect,
            90..92 => Order::Pause,
            92..95 => Order::Resume,
            95..96 => Order::TakeBack,
            96..97 => Order::Unprotect,
            97..98 => Order::Scrub,
            _ => Order::Protect,
        }
    }

    /// Some order about the group.
    pub fn of_group_by_chance(random: &mut StdRng) -> Order {
        match random.random_range(0..100) {
            0..30 => Order::MoveGroup,
            30..50 => Order::FailOverGroup {
                force: random.random_bool(0.5),
            },
            50..57 => Order::TestGroup,
            57..61 => Order::EndTestGroup,
            61..72 => Order::RollBackGroup { back: None },
            72..76 => Order::RollBackGroup {
                back: Some(random.random_range(0..3)),
            },
            76..86 => Order::CommitGroup {
                discard: random.random_bool(0.2),
            },
            _ => Order::ReprotectGroup,
        }
    }
}

/// The point that so many newer ones follow.
async fn earlier(site: &Arc<Site>, name: &str, back: u64) -> Option<u64> {
    let points = site.points(name).await.ok()?;
    let at = points.len().checked_sub(1 + back as usize)?;
    points.get(at).map(|point| point.point)
}

/// The cut of the group that so many newer ones follow.
async fn earlier_cut(site: &Arc<Site>, back: u64) -> Option<u64> {
    let points = site.group_points(GROUP).await.ok()?;
    let at = points.len().checked_sub(1 + back as usize)?;
    points.get(at).map(|point| point.cut)
}

/// What came of it, in words.
fn said<T, E: ToString>(
    outcome: Result<T, E>,
    words: impl FnOnce(T) -> String,
) -> Result<String, String> {
    outcome.map(words).map_err(|why| why.to_string())
}

/// Orders it; what came of it, in words.
pub async fn perform(
    site: &Arc<Site>,
    name: &str,
    peer: &str,
    order: Order,
) -> Result<String, String> {
    let second = "1s".parse().ok();
    match order {
        Order::Protect => said(site.protect(name, peer, second).await, |_| String::new()),
        Order::Unprotect => said(site.unprotect(name, false).await, |()| String::new()),
        Order::Move => said(site.move_guest(name, true).await, |report| {
            format!("term {}", report.term)
        }),
        Order::FailOver { force, back } => {
            let point = match back {
                0 => None,
                _ => earlier(site, name, back).await,
            };
            said(site.fail_over(name, point, force).await, |report| {
                format!("point {} term {}", report.point, report.term)
            })
        }
        Order::Test => said(site.test(name, None).await, |_| String::new()),
        Order::EndTest => said(site.end_test(name).await, |_| String::new()),
        Order::RollBack => {
            let to = RollBack {
                point: None,
                accept_loss: true,
            };
            said(site.rollback(name, to).await, |report| {
                format!("term {}", report.term)
            })
        }
        Order::RollBackTo { back } => {
            let to = RollBack {
                point: earlier(site, name, back).await,
                accept_loss: true,
            };
            said(site.rollback(name, to).await, |report| {
                format!("term {}", report.term)
            })
        }
        Order::Commit { discard } => said(site.commit(name, discard).await, |_| String::new()),
        Order::Reprotect => said(site.reprotect(name, second).await, |_| String::new()),
        Order::Pause => said(site.pause(name).await, |()| String::new()),
        Order::Resume => said(site.resume(name).await, |()| String::new()),
        Order::TakeBack => said(site.take_back(name, true).await, |()| String::new()),
        Order::Scrub => said(site.scrub(None, None), |_| String::new()),
        Order::MoveGroup => said(site.move_group(GROUP, true).await, |done| done.remains),
        Order::FailOverGroup { force } => {
            let how = FailOverGroup {
                force,
                ..FailOverGroup::default()
            };
            said(site.fail_over_group(GROUP, how).await, |report| {
                format!("cut {}", report.cut)
            })
        }
        Order::TestGroup => said(site.test_group(GROUP, None).await, |done| done.remains),
        Order::EndTestGroup => said(site.end_group_test(GROUP).await, |done| done.remains),
        Order::RollBackGroup { back } => {
            let to = GroupRollBack {
                cut: match back {
                    None => None,
                    Some(back) => earlier_cut(site, back).await,
                },
                accept_loss: true,
                ..GroupRollBack::default()
            };
            said(site.rollback_group(GROUP, to).await, |done| done.remains)
        }
        Order::CommitGroup { discard } => {
            said(site.commit_group(GROUP, discard).await, |done| done.remains)
        }
        Order::ReprotectGroup => said(site.reprotect_group(GROUP, second).await, |done| {
            done.remains
        }),
        Order::Run { book, group } => {
            let target = if group { GROUP } else { name };
            books::conduct(site, target, book).await
        }
        Order::Say(word) => books::say(site, word).await,
        Order::Evacuate => books::evacuate(site, peer).await,
        Order::PauseEvacuation => said(site.pause_evacuation().await, |()| String::new()),
        Order::ResumeEvacuation => said(site.resume_paused_evacuation().await, |()| String::new()),
        Order::AbortEvacuation => said(site.abort_evacuation().await, |()| String::new()),
    }
}
