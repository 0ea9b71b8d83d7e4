//! Times, sizes and rates are read exactly and written so that they read the same.

#![allow(clippy::unwrap_used)]

use farhaven_policies::units::{ByteSize, LONGEST_PERIOD, Period, Rate, RateLimit};
use proptest::prelude::*;

#[test]
fn periods_are_read_as_written() {
    for (text, millis) in [
        ("10s", 10_000),
        ("1h30m", 5_400_000),
        ("1.5s", 1500),
        ("250ms", 250),
        (" 2 m ", 120_000),
        ("0s", 0),
    ] {
        assert_eq!(
            text.parse::<Period>().unwrap(),
            Period::from_millis(millis),
            "{text}"
        );
    }
    for text in [
        "",
        "10",
        "10 parsecs",
        "-1s",
        "1s1m",
        "1s1s",
        "1..5s",
        ".5s",
        "5.s",
        "0.0001s",
        "99999999999d",
    ] {
        let error = text.parse::<Period>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "expected a duration like 10s or 2m",
            "{text}"
        );
    }
}

#[test]
fn sizes_and_rates_are_read_as_written() {
    for (text, bytes) in [
        ("64MiB", 64 << 20),
        ("64m", 64 << 20),
        ("1.5GB", 1_500_000_000),
        ("4096", 4096),
        ("7B", 7),
    ] {
        assert_eq!(
            text.parse::<ByteSize>().unwrap(),
            ByteSize::from_bytes(bytes),
            "{text}"
        );
    }
    for (text, bits) in [
        ("100mbit", 100_000_000),
        ("2.5gbit/s", 2_500_000_000),
        ("8 kbitps", 8000),
        ("9", 9),
    ] {
        assert_eq!(
            text.parse::<Rate>().unwrap(),
            Rate::from_bits(bits),
            "{text}"
        );
    }
    for text in [
        "",
        "MiB",
        "1.0001KiB",
        "1 MiBs",
        "18446744073709551616",
        "1e3",
    ] {
        assert!(text.parse::<ByteSize>().is_err(), "{text}");
    }
    for text in ["0bit", "100MB", "fast", "none"] {
        assert!(text.parse::<Rate>().is_err(), "{text}");
    }
    assert_eq!("none".parse::<RateLimit>().unwrap(), RateLimit::NONE);
    let error = "lots".parse::<RateLimit>().unwrap_err();
    assert_eq!(
        error.to_string(),
        "expected a rate like 100mbit or 2.5gbit, or none"
    );
}

proptest! {
    #[test]
    fn what_is_written_reads_as_the_same(value: u64) {
        let period = Period::from_millis(value % (LONGEST_PERIOD + 1));
        prop_assert_eq!(period.to_string().parse::<Period>().unwrap(), period);
        prop_assert_eq!(ByteSize::from_bytes(value).to_string().parse::<ByteSize>().unwrap(), ByteSize::from_bytes(value));
        let rate = Rate::from_bits(value.max(1));
        prop_assert_eq!(rate.to_string().parse::<Rate>().unwrap(), rate);
        prop_assert_eq!(RateLimit::at(rate).to_string().parse::<RateLimit>().unwrap(), RateLimit::at(rate));
    }

    #[test]
    fn no_text_panics(text in "\\PC{0,80}", number in "[0-9.]{0,40}(d|h|m|s|MiB|gbit)?") {
        for text in [text, number] {
            let _ = (text.parse::<Period>(), text.parse::<ByteSize>(), text.parse::<RateLimit>());
        }
    }
}
