//! Numbers as Redis reads and writes them.

/// An integer in the one form in which it is written: no `+`, no leading zero, no spaces.
pub(super) fn parse_i64(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let is_plain = match digits {
        [] => false,
        [b'0', rest @ ..] => rest.is_empty() && digits.len() == text.len(),
        _ => digits.iter().all(u8::is_ascii_digit),
    };
    if !is_plain {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

pub(super) fn parse_u64(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))?.parse().ok()
}

/// A double as C reads it, without its hexadecimal form. Not a number is none, and nor is one too large or too small.
pub(super) fn parse_f64(text: &[u8]) -> Option<f64> {
    let number = parse_wide_f64(text)?;
    let text = std::str::from_utf8(text).ok()?;
    let is_infinity = text.trim_start_matches(['+', '-']).starts_with(['i', 'I']);
    let mantissa = text.split(['e', 'E']).next().unwrap_or_default();
    let is_underflow = number == 0.0 && mantissa.bytes().any(|byte| matches!(byte, b'1'..=b'9'));
    let is_overflow = number.is_infinite() && !is_infinity;
    (!is_underflow && !is_overflow).then_some(number)
}

/// The same for what Redis reads as a longer double or without a look at its size: too large is infinite, too small is 0.
pub(super) fn parse_wide_f64(text: &[u8]) -> Option<f64> {
    std::str::from_utf8(text).ok()?.parse().ok().filter(|number: &f64| !number.is_nan())
}

/// How many decimal places a sum of floats keeps.
const PLACES: usize = 17;
/// The longest number before the decimal point that is added exactly: every 64-bit integer.
const WHOLE_DIGITS_MAX: usize = 20;
/// 10 to the power of [`PLACES`].
const UNIT: i128 = 100_000_000_000_000_000;

/// The sum of two floats as the `INCRBYFLOAT` commands write it: exact in decimals to 17 places while both have no more
/// than 20 digits before the point and no exponent, else as doubles add up. `None` when it is no finite number.
pub(super) fn add_floats(left: &[u8], right: &[u8]) -> Option<String> {
    if let (Some(left), Some(right)) = (parse_decimal(left), parse_decimal(right)) {
        return Some(format_decimal(left + right));
    }
    let sum = parse_f64(left)? + parse_f64(right)?;
    sum.is_finite().then(|| trimmed(format!("{sum:.PLACES$}")))
}

/// The number in units of 1e-17.
fn parse_decimal(text: &[u8]) -> Option<i128> {
    let text = std::str::from_utf8(text).ok()?;
    let (is_negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
    let are_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let fits = whole.len() <= WHOLE_DIGITS_MAX && part.len() <= PLACES && !(whole.is_empty() && part.is_empty());
    if !fits || !are_digits(whole) || !are_digits(part) {
        return None;
    }
    let whole: i128 = if whole.is_empty() { 0 } else { whole.parse().ok()? };
    let part: i128 = format!("{part:0<PLACES$}").parse().ok()?;
    let units = whole * UNIT + part;
    Some(if is_negative { -units } else { units })
}

fn format_decimal(units: i128) -> String {
    let sign = if units < 0 { "-" } else { "" };
    let units = units.abs();
    trimmed(format!("{sign}{}.{:0PLACES$}", units / UNIT, units % UNIT))
}

/// Without zeros behind the decimal point.
fn trimmed(text: String) -> String {
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    if text == "-0" { "0".into() } else { text.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_integer_has_one_form() {
        for (text, number) in [("0", Some(0)), ("-1", Some(-1)), ("9223372036854775807", Some(i64::MAX))] {
            assert_eq!(parse_i64(text.as_bytes()), number);
        }
        for text in ["", "-", "-0", "+1", "01", " 1", "1 ", "1.0", "9223372036854775808"] {
            assert_eq!(parse_i64(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn a_sum_of_decimals_is_exact() {
        for (left, right, sum) in [
            ("0.1", "0.2", "0.3"),
            ("10.5", "0.1", "10.6"),
            ("1000.1", "-1000.1", "0"),
            ("5.0e3", "200", "5200"),
            ("-1", ".5", "-0.5"),
        ] {
            assert_eq!(add_floats(left.as_bytes(), right.as_bytes()).as_deref(), Some(sum), "{left} + {right}");
        }
        assert_eq!(add_floats(b"inf", b"1"), None);
        assert_eq!(add_floats(b"x", b"1"), None);
    }
}
