//! What an emulated link looks like, as an operator writes it: `100mbit,80ms,0.1%`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// The smallest queue a link gets unless the shape names one, in bytes.
const DEFAULT_QUEUE: u64 = 256 * 1024;
/// Bounds of what a shape may say; they also bound the emulator's memory.
const RATE_RANGE: (u64, u64) = (8_000, 100_000_000_000);
const RTT_MAX: Duration = Duration::from_secs(10);
const JITTER_MAX: Duration = Duration::from_secs(1);
const QUEUE_RANGE: (u64, u64) = (1_500, 1 << 30);
const PPM: u32 = 1_000_000;

/// The form that [`LinkShape`] is parsed from, for messages and `--help`.
pub const LINK_FORM: &str = "RATE,RTT[,LOSS%][,queue=BYTES][,jitter=TIME], for example \
     100mbit,80ms,0.1% or 1gbit,40ms,1%,queue=1mib,jitter=2ms";

/// Rate, round-trip time, loss, queue and jitter of a link, the same both ways.
///
/// Parses from and prints as `100mbit,80ms,0.1%`; `queue=1mib` and `jitter=2ms` are optional.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkShape {
    /// Bits a second, IP and UDP headers included.
    pub rate: u64,
    /// Propagation there and back; half of it each way.
    pub rtt: Duration,
    /// Packets lost at random, in millionths, each way.
    pub loss_ppm: u32,
    /// Bytes the drop-tail queue before the link holds; `None`: the larger of 256 KiB and
    /// one bandwidth-delay product.
    pub queue: Option<u64>,
    /// Each packet is held up by a random time up to this. The order is kept, as on most
    /// real paths: a packet may be late, it never overtakes.
    pub jitter: Duration,
}

impl LinkShape {
    /// A link of `rate` bits a second and the round-trip time `rtt`, without loss.
    pub fn new(rate: u64, rtt: Duration) -> Self {
        Self {
            rate,
            rtt,
            loss_ppm: 0,
            queue: None,
            jitter: Duration::ZERO,
        }
    }

    /// Bytes in flight that fill the link without a queue.
    pub fn bandwidth_delay_bytes(&self) -> u64 {
        (u128::from(self.rate) * self.rtt.as_nanos() / 8_000_000_000) as u64
    }

    /// Bytes the queue holds: what was asked for, or the default.
    pub fn queue_bytes(&self) -> u64 {
        self.queue
            .unwrap_or_else(|| self.bandwidth_delay_bytes().max(DEFAULT_QUEUE))
    }
}

/// Why a text is no [`LinkShape`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{part}' is no {expected}: write the link as {LINK_FORM}")]
pub struct LinkShapeError {
    part: String,
    expected: &'static str,
}

fn wrong(part: &str, expected: &'static str) -> LinkShapeError {
    LinkShapeError {
        part: part.chars().take(64).collect(),
        expected,
    }
}

/// `text` as a decimal number with one of `units`, in whole smallest units.
fn quantity(text: &str, units: &[(&str, f64)]) -> Option<u64> {
    let text = text.trim().to_ascii_lowercase();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale = units.iter().find(|(name, _)| *name == unit.trim())?.1;
    let number: f64 = number.parse().ok()?;
    let value = (number * scale).round();
    (value.is_finite() && value <= u64::MAX as f64 / 2.0).then_some(value as u64)
}

fn rate(text: &str) -> Result<u64, LinkShapeError> {
    let units = [("bit", 1.0), ("kbit", 1e3), ("mbit", 1e6), ("gbit", 1e9)];
    quantity(text, &units)
        .filter(|rate| (RATE_RANGE.0..=RATE_RANGE.1).contains(rate))
        .ok_or_else(|| wrong(text, "rate (8kbit to 100gbit)"))
}

fn time(text: &str, max: Duration, expected: &'static str) -> Result<Duration, LinkShapeError> {
    quantity(text, &[("us", 1.0), ("ms", 1e3), ("s", 1e6)])
        .map(Duration::from_micros)
        .filter(|time| *time <= max)
        .ok_or_else(|| wrong(text, expected))
}

fn loss(text: &str) -> Result<u32, LinkShapeError> {
    quantity(text, &[("%", f64::from(PPM) / 100.0)])
        .and_then(|ppm| u32::try_from(ppm).ok())
        .filter(|ppm| *ppm <= PPM)
        .ok_or_else(|| wrong(text, "loss (0% to 100%)"))
}

fn queue(text: &str) -> Result<u64, LinkShapeError> {
    let (kib, mib) = (1024.0, 1024.0 * 1024.0);
    let units = [
        ("", 1.0),
        ("b", 1.0),
        ("kib", kib),
        ("mib", mib),
        ("kb", 1e3),
        ("mb", 1e6),
    ];
    quantity(text, &units)
        .filter(|bytes| (QUEUE_RANGE.0..=QUEUE_RANGE.1).contains(bytes))
        .ok_or_else(|| wrong(text, "queue size (1500b to 1024mib)"))
}

impl FromStr for LinkShape {
    type Err = LinkShapeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut plain = 0;
        let mut shape = LinkShape::new(0, Duration::ZERO);
        for part in text.split(',').map(str::trim) {
            if let Some(value) = part.strip_prefix("queue=") {
                shape.queue = Some(queue(value)?);
            } else if let Some(value) = part.strip_prefix("jitter=") {
                shape.jitter = time(value, JITTER_MAX, "jitter (0ms to 1s)")?;
            } else {
                match plain {
                    0 => shape.rate = rate(part)?,
                    1 => shape.rtt = time(part, RTT_MAX, "round-trip time (0ms to 10s)")?,
                    2 => shape.loss_ppm = loss(part)?,
                    _ => return Err(wrong(part, "part of a link after rate, RTT and loss")),
                }
                plain += 1;
            }
        }
        if plain < 2 {
            return Err(wrong(text, "link with at least a rate and an RTT"));
        }
        Ok(shape)
    }
}

fn write_time(out: &mut fmt::Formatter<'_>, time: Duration) -> fmt::Result {
    let micros = time.as_micros();
    if micros.is_multiple_of(1000) {
        write!(out, "{}ms", micros / 1000)
    } else {
        write!(out, "{micros}us")
    }
}

impl fmt::Display for LinkShape {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rate {
            rate if rate % 1_000_000_000 == 0 => write!(out, "{}gbit,", rate / 1_000_000_000)?,
            rate if rate % 1_000_000 == 0 => write!(out, "{}mbit,", rate / 1_000_000)?,
            rate if rate % 1_000 == 0 => write!(out, "{}kbit,", rate / 1_000)?,
            rate => write!(out, "{rate}bit,")?,
        }
        write_time(out, self.rtt)?;
        let fraction = format!("{:04}", self.loss_ppm % 10_000);
        let fraction = fraction.trim_end_matches('0');
        let point = if fraction.is_empty() { "" } else { "." };
        write!(out, ",{}{point}{fraction}%", self.loss_ppm / 10_000)?;
        if let Some(queue) = self.queue {
            match queue {
                bytes if bytes % (1 << 20) == 0 => write!(out, ",queue={}mib", bytes >> 20)?,
                bytes if bytes % (1 << 10) == 0 => write!(out, ",queue={}kib", bytes >> 10)?,
                bytes => write!(out, ",queue={bytes}b")?,
            }
        }
        if !self.jitter.is_zero() {
            write!(out, ",jitter=")?;
            write_time(out, self.jitter)?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_an_operator_writes() {
        let shape: LinkShape = "100mbit, 80ms, 0.1%, queue=1mib, jitter=2ms"
            .parse()
            .unwrap();
        assert_eq!(shape.rate, 100_000_000);
        assert_eq!(shape.rtt, Duration::from_millis(80));
        assert_eq!(shape.loss_ppm, 1_000);
        assert_eq!(shape.queue, Some(1 << 20));
        assert_eq!(shape.jitter, Duration::from_millis(2));
        assert_eq!(shape.to_string(), "100mbit,80ms,0.1%,queue=1mib,jitter=2ms");
        assert_eq!(
            "1gbit,40ms".parse::<LinkShape>().unwrap().to_string(),
            "1gbit,40ms,0%"
        );
    }

    #[test]
    fn default_queue_is_the_larger_of_256_kib_and_one_bandwidth_delay_product() {
        let long: LinkShape = "100mbit,80ms".parse().unwrap();
        assert_eq!(long.queue_bytes(), 1_000_000);
        let short: LinkShape = "20mbit,20ms".parse().unwrap();
        assert_eq!(short.queue_bytes(), 256 * 1024);
    }

    #[test]
    fn errors_name_the_part_and_show_the_form() {
        for (text, part) in [
            ("", "''"),
            ("100", "'100'"),
            ("100mbit", "'100mbit'"),
            ("100mbit,80", "'80'"),
            ("100mbit,80ms,2", "'2'"),
            ("100mbit,80ms,101%", "'101%'"),
            ("100mbit,80ms,1%,9", "'9'"),
            ("100mbit,80ms,queue=huge", "'huge'"),
            ("nanmbit,80ms", "'nanmbit'"),
            ("1e9mbit,80ms", "'1e9mbit'"),
            ("100mbit,-5ms", "'-5ms'"),
            ("100mbit,80ms,jitter=1h", "'1h'"),
        ] {
            let message = text.parse::<LinkShape>().unwrap_err().to_string();
            assert!(message.starts_with(part), "{text}: {message}");
            assert!(message.contains("100mbit,80ms,0.1%"), "{message}");
        }
    }

    proptest! {
        #[test]
        fn prints_what_it_parses(
            rate in 8_000u64..=100_000_000_000,
            rtt in 0u64..=10_000_000,
            loss_ppm in 0u32..=1_000_000,
            queue in proptest::option::of(1_500u64..=1 << 30),
            jitter in 0u64..=1_000_000,
        ) {
            let shape = LinkShape {
                rate,
                rtt: Duration::from_micros(rtt),
                loss_ppm,
                queue,
                jitter: Duration::from_micros(jitter),
            };
            prop_assert_eq!(shape.to_string().parse::<LinkShape>().unwrap(), shape);
        }

        #[test]
        fn no_text_panics(text in ".{0,80}") {
            let _ = text.parse::<LinkShape>();
        }
    }
}
