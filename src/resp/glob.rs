//! Redis's glob patterns, as `KEYS`, `SCAN`, `PSUBSCRIBE` and `CONFIG GET` take them: `*`, `?`, `[a-z]`, `[^a]`, `\x`.
//!
//! Patterns come from clients, so the time is bounded by pattern times text: one star is remembered, and nothing recurses.

/// Whether the whole text matches the pattern.
pub fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut read) = (0, 0);
    // The last star: the pattern behind it, and how much of the text it has swallowed.
    let mut star: Option<(usize, usize)> = None;
    loop {
        if pattern.get(at) == Some(&b'*') {
            at += 1;
            star = Some((at, read));
            continue;
        }
        let Some(byte) = text.get(read) else { return at == pattern.len() };
        let width = if at < pattern.len() { one(&pattern[at..], *byte) } else { None };
        match (width, star) {
            (Some(width), _) => {
                at += width;
                read += 1;
            }
            (None, Some((behind, swallowed))) => {
                star = Some((behind, swallowed + 1));
                at = behind;
                read = swallowed + 1;
            }
            (None, None) => return false,
        }
    }
}

/// Whether the byte is what the pattern begins with, and then how long that part of the pattern is.
fn one(pattern: &[u8], byte: u8) -> Option<usize> {
    match pattern {
        [b'?', ..] => Some(1),
        [b'[', rest @ ..] => {
            let (found, width) = class(rest, byte);
            found.then_some(width + 1)
        }
        [b'\\', escaped, ..] => (*escaped == byte).then_some(2),
        [plain, ..] => (*plain == byte).then_some(1),
        [] => None,
    }
}

/// Whether the byte is in the class that begins behind a `[`, and how long the class is. One that is not closed reaches
/// to the end of the pattern.
fn class(pattern: &[u8], byte: u8) -> (bool, usize) {
    let negated = pattern.first() == Some(&b'^');
    let mut at = usize::from(negated);
    let mut found = false;
    loop {
        match &pattern[at..] {
            [b'\\', escaped, ..] => {
                found |= *escaped == byte;
                at += 2;
            }
            [b']', ..] => return (found != negated, at + 1),
            [] => return (found != negated, at),
            [from, b'-', to, ..] => {
                found |= (*from.min(to)..=*from.max(to)).contains(&byte);
                at += 3;
            }
            [plain, ..] => {
                found |= *plain == byte;
                at += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns_match_as_redis_matches_them() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("a*c", "abc", true),
            ("a*c", "abcd", false),
            ("a*b*c", "a1b2b3c", true),
            ("h?llo", "hello", true),
            ("h?llo", "hllo", false),
            ("h[ae]llo", "hallo", true),
            ("h[^e]llo", "hello", false),
            ("h[a-c]llo", "hbllo", true),
            ("h[c-a]llo", "hbllo", true),
            ("h\\*llo", "h*llo", true),
            ("h\\*llo", "hello", false),
            ("[\\]]", "]", true),
            ("[ab", "b", true),
            ("a\\", "a\\", true),
        ] {
            assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), expected, "{pattern} on {text}");
        }
    }

    #[test]
    fn many_stars_take_no_exponential_time() {
        assert!(!matches("*a".repeat(200).as_bytes(), "a".repeat(199).as_bytes()));
        assert!(!matches(b"a*a*a*a*a*a*a*a*a*a*a*a*a*b", "a".repeat(10_000).as_bytes()));
    }
}
