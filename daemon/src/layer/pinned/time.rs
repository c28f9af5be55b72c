//! Times as RFC 3339 writes them.

use crate::erofs::Timestamp;

/// Reads a time such as `2006-01-02T15:04:05.999999999Z` or `…+07:00`.
pub fn parse(text: &str) -> Option<Timestamp> {
    let (date, time) = text.split_once(['T', 't'])?;
    let mut date = date.splitn(3, '-').map(digits);
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let zone = time.find(['Z', 'z', '+', '-'])?;
    let (clock, zone) = time.split_at(zone);
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, ""));
    let mut clock = clock.splitn(3, ':').map(digits);
    let (hour, minute, second) = (clock.next()??, clock.next()??, clock.next()??);
    let valid = (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && (hour < 24 && minute < 60 && second <= 60 && year <= 9999);
    if !valid || fraction.len() > 9 {
        return None;
    }
    let nanos = match fraction {
        "" => 0,
        _ => digits(fraction)? * 10i64.pow(9 - fraction.len() as u32),
    };
    let offset = match zone.split_at(1) {
        ("Z" | "z", "") => 0,
        (sign, zone) => {
            let (hours, minutes) = zone.split_once(':')?;
            let seconds = digits(hours)? * 3600 + digits(minutes)? * 60;
            if sign == "+" { seconds } else { -seconds }
        }
    };
    let secs = days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second - offset;
    Some(Timestamp { secs, nanos: u32::try_from(nanos).ok()? })
}

/// A number of at most nine digits.
fn digits(text: &str) -> Option<i64> {
    let right = (1..=9).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    if right { text.parse().ok() } else { None }
}

/// Days since 1970-01-01. Years are counted from March, so that the day that is sometimes there is the last.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    // 306 days from March to January; 719,468 from 0000-03-01 to the epoch
    year * 365 + leap_days + (month * 153 + 2) / 5 + day - 1 - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (text, secs, nanos) in [
            ("1970-01-01T00:00:00Z", 0, 0),
            ("2023-11-14T22:13:20Z", 1_700_000_000, 0),
            ("2000-02-29T12:00:00.5Z", 951_825_600, 500_000_000),
            ("2024-03-01T00:00:00.000000001+01:30", 1_709_245_800, 1),
            ("1969-12-31T23:59:59-00:00", -1, 0),
            ("9999-12-31T23:59:59Z", 253_402_300_799, 0),
            ("0000-03-01T00:00:00Z", -62_162_035_200, 0),
        ] {
            assert_eq!(parse(text), Some(Timestamp { secs, nanos }), "{text}");
        }
        for wrong in [
            "",
            "now",
            "2023-11-14",
            "2023-11-14T22:13:20",
            "2023-13-14T22:13:20Z",
            "2023-11-14T24:13:20Z",
            "-2023-11-14T22:13:20Z",
            "2023-11-14T22:13:20.Z0",
            "2023-11-14T22:13:20+0100",
            "2023-11-14T22:13:20.1234567890Z",
            "2023-11-14T22:13:é0Z",
            "+2023-1-1T1:1:1Z",
        ] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }
}
