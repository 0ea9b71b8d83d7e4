//! Times, sizes and rates as people write them: `10s`, `64MiB`, `100mbit`.
//!
//! Each is a newtype over an integer, is read from text, written back as text
//! that reads as the same value, and is a string in every file and message.
//! Reading is exact: `1.5s` is 1500 ms, and what has no exact value is refused.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A text that is no time, size or rate; the message says what one looks like.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}")]
pub struct UnitError {
    pub(crate) expected: &'static str,
}

impl UnitError {
    pub(crate) const fn new(expected: &'static str) -> UnitError {
        UnitError { expected }
    }
}

/// A span of time, to the millisecond: `10s`, `250ms`, `1h30m`, `1.5s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Period(u64);

/// A number of bytes: `64MiB`, `4096`, `1.5GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(u64);

/// Bits in a second: `100mbit`, `2.5gbit`, `12500000` (bits).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Rate(u64);

/// A rate that must not be exceeded, or `none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct RateLimit(Option<Rate>);

const PERIOD: UnitError = UnitError::new("a duration like 10s or 2m");
const SIZE: UnitError = UnitError::new("a size like 64MiB or 2GB");
const RATE: UnitError = UnitError::new("a rate like 100mbit or 2.5gbit");
const RATE_LIMIT: UnitError = UnitError::new("a rate like 100mbit or 2.5gbit, or none");

/// Longest text worth reading: everything valid is far shorter.
const LONGEST_TEXT: usize = 64;
/// Longest period: ten years, in milliseconds. Sums of periods stay far from overflow.
pub const LONGEST_PERIOD: u64 = 10 * 366 * 86_400_000;

/// Milliseconds of each unit, longest first.
const PERIOD_UNITS: [(&str, u64); 5] = [
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1000),
    ("ms", 1),
];
/// Names of sizes; the first of each factor is the one that is written.
const SIZE_UNITS: [(&str, u64); 14] = [
    ("TiB", 1 << 40),
    ("T", 1 << 40),
    ("TB", 1_000_000_000_000),
    ("GiB", 1 << 30),
    ("G", 1 << 30),
    ("GB", 1_000_000_000),
    ("MiB", 1 << 20),
    ("M", 1 << 20),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("K", 1 << 10),
    ("kB", 1000),
    ("B", 1),
    ("", 1),
];
/// Names of rates, those of `tc`.
const RATE_UNITS: [(&str, u64); 6] = [
    ("tbit", 1_000_000_000_000),
    ("gbit", 1_000_000_000),
    ("mbit", 1_000_000),
    ("kbit", 1000),
    ("bit", 1),
    ("", 1),
];

impl Period {
    /// No time at all.
    pub const ZERO: Period = Period(0);

    /// So many milliseconds (at most ten years).
    pub const fn from_millis(millis: u64) -> Period {
        Period(if millis > LONGEST_PERIOD {
            LONGEST_PERIOD
        } else {
            millis
        })
    }

    /// So many seconds (at most ten years).
    pub const fn from_secs(secs: u64) -> Period {
        Period::from_millis(secs.saturating_mul(1000))
    }

    /// As the standard library's type.
    pub const fn duration(self) -> Duration {
        Duration::from_millis(self.0)
    }
}

impl From<Period> for Duration {
    fn from(period: Period) -> Duration {
        period.duration()
    }
}

impl ByteSize {
    /// So many bytes.
    pub const fn from_bytes(bytes: u64) -> ByteSize {
        ByteSize(bytes)
    }

    /// So many times 2^20 bytes.
    pub const fn from_mib(mib: u64) -> ByteSize {
        ByteSize(mib.saturating_mul(1 << 20))
    }

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl Rate {
    /// So many bits in a second.
    pub const fn from_bits(bits_per_second: u64) -> Rate {
        Rate(bits_per_second)
    }

    /// Bits in a second.
    pub const fn bits_per_second(self) -> u64 {
        self.0
    }

    /// Whole bytes in a second.
    pub const fn bytes_per_second(self) -> u64 {
        self.0 / 8
    }
}

impl RateLimit {
    /// Nothing is limited.
    pub const NONE: RateLimit = RateLimit(None);

    /// At most `rate`.
    pub const fn at(rate: Rate) -> RateLimit {
        RateLimit(Some(rate))
    }

    /// The limit, if there is one.
    pub const fn rate(self) -> Option<Rate> {
        self.0
    }

    /// So many percent of it, never less than a bit a second.
    pub fn percent(self, percent: u8) -> RateLimit {
        let part = |bits: u64| u128::from(bits) * u128::from(percent) / 100;
        let part = |bits| u64::try_from(part(bits)).unwrap_or(u64::MAX).max(1);
        RateLimit(self.0.map(|Rate(bits)| Rate(part(bits))))
    }

    /// The lower one; no limit is the highest.
    pub fn least(self, other: RateLimit) -> RateLimit {
        match (self.0, other.0) {
            (Some(Rate(one)), Some(Rate(other))) => RateLimit(Some(Rate(one.min(other)))),
            (one, other) => RateLimit(one.or(other)),
        }
    }

    /// One of so many equal parts of it, never less than a bit a second.
    pub fn divided(self, among: u64) -> RateLimit {
        RateLimit(self.0.map(|Rate(bits)| Rate((bits / among.max(1)).max(1))))
    }
}

impl FromStr for Period {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Period, UnitError> {
        let text = trimmed(text).ok_or(PERIOD)?;
        let (mut rest, mut total, mut below) = (text, 0u64, u64::MAX);
        while !rest.is_empty() {
            let (number, after) = split_number(rest);
            let unit_end = after
                .find(|c: char| c.is_ascii_digit() || c == '.')
                .unwrap_or(after.len());
            let (unit, next) = after.split_at(unit_end);
            let unit = unit.trim();
            let factor = factor_of(&PERIOD_UNITS, unit).ok_or(PERIOD)?;
            // "30m1h" and "1h1h" are slips of the pen, not periods.
            if factor >= below {
                return Err(PERIOD);
            }
            below = factor;
            total = exactly(number, factor)
                .and_then(|part| total.checked_add(part))
                .ok_or(PERIOD)?;
            rest = next;
        }
        if total > LONGEST_PERIOD {
            Err(PERIOD)
        } else {
            Ok(Period(total))
        }
    }
}

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<ByteSize, UnitError> {
        one_quantity(text, &SIZE_UNITS).map(ByteSize).ok_or(SIZE)
    }
}

impl FromStr for Rate {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Rate, UnitError> {
        let text = text.trim();
        let text = text
            .strip_suffix("/s")
            .or_else(|| text.strip_suffix("ps"))
            .unwrap_or(text);
        one_quantity(text, &RATE_UNITS)
            .filter(|bits| *bits > 0)
            .map(Rate)
            .ok_or(RATE)
    }
}

impl FromStr for RateLimit {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<RateLimit, UnitError> {
        match text.trim() {
            "none" => Ok(RateLimit::NONE),
            rate => rate.parse().map(RateLimit::at).map_err(|_| RATE_LIMIT),
        }
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 {
            return f.write_str("0s");
        }
        let mut left = self.0;
        for (unit, factor) in PERIOD_UNITS {
            if left >= factor {
                write!(f, "{}{unit}", left / factor)?;
                left %= factor;
            }
        }
        Ok(())
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        largest_exact(f, self.0, &SIZE_UNITS)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        largest_exact(f, self.0, &RATE_UNITS)
    }
}

impl fmt::Display for RateLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(rate) => rate.fmt(f),
            None => f.write_str("none"),
        }
    }
}

fn trimmed(text: &str) -> Option<&str> {
    let text = text.trim();
    (!text.is_empty() && text.len() <= LONGEST_TEXT).then_some(text)
}

/// The number and unit that are the whole text, multiplied.
fn one_quantity(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let (number, unit) = split_number(trimmed(text)?);
    exactly(number, factor_of(units, unit.trim())?)
}

fn split_number(text: &str) -> (&str, &str) {
    text.split_at(
        text.find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len()),
    )
}

/// Units are told apart without regard to case, as no two differ by case alone.
fn factor_of(units: &[(&str, u64)], unit: &str) -> Option<u64> {
    units
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(unit))
        .map(|(_, factor)| *factor)
}

/// `number` (digits, perhaps one point) times `factor`, if that is whole and fits.
fn exactly(number: &str, factor: u64) -> Option<u64> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if whole.is_empty() || fraction.is_empty() || fraction.len() > 18 {
        return None;
    }
    let whole: u64 = whole.parse().ok()?;
    let scale = 10u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let parts = u128::from(fraction.parse::<u64>().ok()?) * u128::from(factor);
    if parts % scale != 0 {
        return None;
    }
    whole
        .checked_mul(factor)?
        .checked_add(u64::try_from(parts / scale).ok()?)
}

fn largest_exact(f: &mut fmt::Formatter<'_>, value: u64, units: &[(&str, u64)]) -> fmt::Result {
    // Sizes name both powers of two and of ten: the shortest number reads best.
    let best = units
        .iter()
        .filter(|(_, factor)| value != 0 && value.is_multiple_of(*factor))
        // Of one factor's names the first: the last of the greatest is taken.
        .rev()
        .max_by_key(|(_, factor)| *factor);
    match best {
        Some((unit, factor)) => write!(f, "{}{unit}", value / factor),
        None => f.write_str(if units.len() == RATE_UNITS.len() {
            "0bit"
        } else {
            "0B"
        }),
    }
}

/// Strings in files and messages; numbers are accepted where a unit may be left out.
macro_rules! as_text {
    ($name:ident, $error:expr, $pattern:expr) => {
        impl schemars::JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({
                    "type": "string",
                    "pattern": $pattern,
                    "description": $error.expected,
                })
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<$name, D::Error> {
                struct Text;
                impl serde::de::Visitor<'_> for Text {
                    type Value = $name;

                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str($error.expected)
                    }

                    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(|error: $crate::units::UnitError| E::custom(error))
                    }
                }
                deserializer.deserialize_str(Text)
            }
        }
    };
}

pub(crate) use as_text;

as_text!(Period, PERIOD, r"^ *([0-9]+(\.[0-9]+)? *(d|h|m|s|ms) *)+$");
as_text!(
    ByteSize,
    SIZE,
    r"^ *[0-9]+(\.[0-9]+)? *([KMGT]?B?|kB|[KMGT]iB) *$"
);
as_text!(
    Rate,
    RATE,
    r"^ *[0-9]+(\.[0-9]+)? *[kmgt]?(bit)?(/s|ps)? *$"
);
as_text!(
    RateLimit,
    RATE_LIMIT,
    r"^ *(none|[0-9]+(\.[0-9]+)? *([kmgt]?bit)?(/s|ps)?) *$"
);
