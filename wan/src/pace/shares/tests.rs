//! Turns in stopped time: what is due is due to the millisecond.

use super::*;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::watch;

const SECOND: Duration = Duration::from_secs(1);

fn peer(number: u8) -> SiteKey {
    SiteKey::from_bytes([number; 32])
}

/// A window of some bytes that a link empties at some rate.
struct Window {
    used: watch::Sender<u64>,
    limit: u64,
}

impl Window {
    /// A link that carries this many bytes a millisecond.
    fn start(limit: u64, bytes_a_millisecond: Arc<AtomicU64>) -> Arc<Window> {
        let window = Arc::new(Window {
            used: watch::Sender::new(0),
            limit,
        });
        let emptied = window.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(1)).await;
                let bytes = bytes_a_millisecond.load(Ordering::Relaxed);
                if bytes > 0 && *emptied.used.borrow() > 0 {
                    emptied
                        .used
                        .send_modify(|used| *used = used.saturating_sub(bytes));
                }
            }
        });
        window
    }
}

struct AtWindow {
    window: Arc<Window>,
    changed: watch::Receiver<u64>,
    bytes: u64,
}

impl Door for AtWindow {
    type Error = PaceError;

    fn attempt(&mut self) -> Result<bool, PaceError> {
        self.changed.mark_unchanged();
        let full = *self.window.used.borrow() + self.bytes > self.window.limit;
        if !full {
            self.window.used.send_modify(|used| *used += self.bytes);
        }
        Ok(!full)
    }

    async fn room(&mut self) {
        let _ = self.changed.changed().await;
    }
}

/// One guest's shipments: batches of these sizes, one after the other, for ever.
struct Shipping {
    flow: Arc<Flow>,
    sent: Arc<AtomicU64>,
}

impl Shipping {
    fn begin(shares: &Arc<Shares>, window: &Arc<Window>, sizes: &'static [u64]) -> Shipping {
        let flow = Arc::new(shares.join(peer(1)).unwrap());
        let sent = Arc::new(AtomicU64::new(0));
        let (window, counted, sending) = (window.clone(), sent.clone(), flow.clone());
        tokio::spawn(async move {
            for bytes in sizes.iter().copied().cycle() {
                let mut door = AtWindow {
                    changed: window.used.subscribe(),
                    window: window.clone(),
                    bytes,
                };
                sending
                    .pass(bytes, Rank::Usual, None, &mut door)
                    .await
                    .unwrap();
                counted.fetch_add(bytes, Ordering::Relaxed);
                // The next batch is made. Without a cap that takes time, or none would pass.
                match sending.shares.cap() {
                    0 => tokio::time::sleep(Duration::from_micros(300)).await,
                    _ => tokio::task::yield_now().await,
                }
            }
        });
        Shipping { flow, sent }
    }

    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

fn wide() -> (Arc<Window>, Arc<AtomicU64>) {
    let rate = Arc::new(AtomicU64::new(u64::MAX));
    (Window::start(u64::MAX / 2, rate.clone()), rate)
}

#[track_caller]
fn close_to(what: f64, due: f64, within: f64) {
    assert!(
        (what / due - 1.0).abs() <= within,
        "{what} where {due} is due"
    );
}

#[tokio::test(start_paused = true)]
async fn a_cap_is_exact_over_ten_seconds_and_shared_by_weights() {
    let shares = Shares::new(20_000_000);
    let (window, _) = wide();
    let large = Shipping::begin(&shares, &window, &[262_144]);
    let small = Shipping::begin(&shares, &window, &[30_000, 9_000, 60_000]);
    let middling = Shipping::begin(&shares, &window, &[100_000]);
    large.flow.set(200, 0).unwrap();
    small.flow.set(100, 0).unwrap();
    middling.flow.set(50, 0).unwrap();
    tokio::time::sleep(3 * SECOND).await;
    let flows = [&large, &small, &middling];
    let before = flows.map(Shipping::sent);
    tokio::time::sleep(10 * SECOND).await;
    let sent: Vec<f64> = (0..3)
        .map(|i| (flows[i].sent() - before[i]) as f64)
        .collect();
    close_to(sent.iter().sum(), 25e6, 0.015);
    for (sent, weight) in sent.iter().zip([200.0, 100.0, 50.0]) {
        close_to(*sent, 25e6 * weight / 350.0, 0.03);
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_window_is_shared_by_weights_too() {
    // No cap: the link itself is the bottleneck, 2 MB a second.
    let shares = Shares::new(0);
    let window = Window::start(1 << 20, Arc::new(AtomicU64::new(2_000)));
    let more = Shipping::begin(&shares, &window, &[262_144]);
    let less = Shipping::begin(&shares, &window, &[50_000]);
    let none = Shipping::begin(&shares, &window, &[100_000]);
    more.flow.set(150, 0).unwrap();
    less.flow.set(50, 0).unwrap();
    none.flow.set(0, 0).unwrap();
    tokio::time::sleep(5 * SECOND).await;
    let before = [more.sent(), less.sent(), none.sent()];
    tokio::time::sleep(60 * SECOND).await;
    close_to((more.sent() - before[0]) as f64, 90e6, 0.03);
    close_to((less.sent() - before[1]) as f64, 30e6, 0.03);
    assert_eq!(none.sent(), before[2]);
}

#[tokio::test(start_paused = true)]
async fn an_own_cap_leaves_the_rest_to_others() {
    let shares = Shares::new(40_000_000);
    let (window, _) = wide();
    let capped = Shipping::begin(&shares, &window, &[100_000]);
    let other = Shipping::begin(&shares, &window, &[262_144]);
    capped.flow.set(255, 8_000_000).unwrap();
    tokio::time::sleep(2 * SECOND).await;
    let before = [capped.sent(), other.sent()];
    tokio::time::sleep(10 * SECOND).await;
    close_to((capped.sent() - before[0]) as f64, 10e6, 0.02);
    close_to((other.sent() - before[1]) as f64, 40e6, 0.02);
}

#[tokio::test(start_paused = true)]
async fn a_new_cap_holds_at_once_for_one_who_waits() {
    // At 80 kbit/s a batch takes 26 s.
    let shares = Shares::new(80_000);
    let (window, _) = wide();
    let shipping = Shipping::begin(&shares, &window, &[262_144]);
    tokio::time::sleep(SECOND).await;
    assert_eq!(shipping.sent(), 262_144);
    shares.set_cap(80_000_000);
    tokio::time::sleep(10 * SECOND).await;
    close_to((shipping.sent() - 262_144) as f64, 100e6, 0.01);
    // Down again, by the flow's own cap, and to none at all.
    shipping.flow.set(1, 8_000_000).unwrap();
    let before = shipping.sent();
    tokio::time::sleep(10 * SECOND).await;
    close_to((shipping.sent() - before) as f64, 10e6, 0.03);
    shipping.flow.set(1, 0).unwrap();
    shares.set_cap(0);
    let before = shipping.sent();
    tokio::time::sleep(SECOND).await;
    assert!(shipping.sent() - before > 100_000_000);
}

async fn one(
    flow: &Flow,
    window: &Arc<Window>,
    rank: Rank,
    patience: Option<Duration>,
) -> (Passed, Duration) {
    let begun = Instant::now();
    let mut door = AtWindow {
        changed: window.used.subscribe(),
        window: window.clone(),
        bytes: 100_000,
    };
    let passed = flow.pass(100_000, rank, patience, &mut door).await.unwrap();
    (passed, begun.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_cap_is_no_stall_and_a_link_that_takes_nothing_is() {
    let patience = Some(20 * SECOND);
    let shares = Shares::new(0);
    let rate = Arc::new(AtomicU64::new(0));
    let window = Window::start(100_000, rate.clone());
    let flow = shares.join(peer(1)).unwrap();
    let capped = shares.join(peer(2)).unwrap();
    capped.set(1, 8_000).unwrap();
    let (open, _) = wide();
    assert_eq!(
        one(&capped, &open, Rank::Usual, patience).await.0,
        Passed::Sent
    );
    let late = one(&capped, &open, Rank::Usual, patience).await;
    assert_eq!(late, (Passed::Sent, 100 * SECOND));

    assert_eq!(
        one(&flow, &window, Rank::Usual, patience).await.0,
        Passed::Sent
    );
    // Several wait for the same link: none waits for the others' patience as well.
    let second = shares.join(peer(1)).unwrap();
    let (a, b) = tokio::join!(
        one(&flow, &window, Rank::Usual, patience),
        one(&second, &window, Rank::Held, patience),
    );
    assert_eq!((a.0, b.0), (Passed::Stalled, Passed::Stalled));
    assert!(a.1 < 21 * SECOND && b.1 < 21 * SECOND, "{a:?} {b:?}");
    // Without patience it is waited for, and goes on when the link does.
    rate.store(10, Ordering::Relaxed);
    let (passed, after) = one(&flow, &window, Rank::Usual, None).await;
    assert_eq!(passed, Passed::Sent);
    assert!(after <= 11 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn a_held_guest_waits_for_the_common_cap_only() {
    let shares = Shares::new(8_000_000);
    let (window, _) = wide();
    let flow = shares.join(peer(1)).unwrap();
    flow.set(1, 8_000).unwrap();
    for rank in [Rank::Usual, Rank::Held] {
        assert_eq!(one(&flow, &window, rank, None).await.0, Passed::Sent);
    }
    let (_, after) = one(&flow, &window, Rank::Held, None).await;
    assert_eq!(after, Duration::from_millis(100));
}

#[tokio::test(start_paused = true)]
async fn one_who_gives_up_waiting_holds_up_nobody() {
    let shares = Shares::new(800_000);
    let (window, _) = wide();
    let (first, second) = (shares.join(peer(1)).unwrap(), shares.join(peer(1)).unwrap());
    one(&first, &window, Rank::Usual, None).await;
    // It is the next in turn, and goes away.
    let given_up = one(&first, &window, Rank::Held, None);
    assert!(tokio::time::timeout(SECOND / 2, given_up).await.is_err());
    let (passed, after) = one(&second, &window, Rank::Usual, None).await;
    assert_eq!((passed, after), (Passed::Sent, SECOND / 2));
    // Nor does a flow that ends while it waits.
    let ended = tokio::spawn(async move {
        let (open, _) = wide();
        one(&first, &open, Rank::Usual, None).await
    });
    tokio::time::sleep(SECOND / 4).await;
    ended.abort();
    let (_, after) = one(&second, &window, Rank::Usual, None).await;
    assert_eq!(after, SECOND * 3 / 4);
}
