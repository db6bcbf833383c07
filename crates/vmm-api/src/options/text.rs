//! The grammar of option strings: commas, brackets, quotes.

/// The largest number of elements that ranges may spell out.
const MAX_ELEMENTS: u64 = 8192;

/// Splits `text` at each `separator` outside brackets and quotes; quotes stay.
///
/// Errs with what is wrong: a bracket or quote without its partner.
pub(super) fn split(text: &str, separator: char) -> Result<Vec<&str>, &'static str> {
    let (mut depth, mut quoted, mut start) = (0usize, false, 0);
    let mut pieces = Vec::new();
    for (at, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            _ if quoted => {}
            '[' => depth += 1,
            ']' => depth = depth.checked_sub(1).ok_or("a ']' without its '['")?,
            c if c == separator && depth == 0 => {
                pieces.push(text.get(start..at).unwrap_or_default());
                start = at + c.len_utf8();
            }
            _ => {}
        }
    }
    match (quoted, depth) {
        (true, _) => Err("a '\"' without its partner"),
        (false, 1..) => Err("a '[' without its ']'"),
        (false, 0) => {
            pieces.push(text.get(start..).unwrap_or_default());
            Ok(pieces)
        }
    }
}

/// `text` without its quotes; a doubled quote inside quotes stands for one.
pub(super) fn unquote(text: &str) -> String {
    let (mut plain, mut quoted) = (String::new(), false);
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                plain.push('"');
            }
            '"' => quoted = !quoted,
            c => plain.push(c),
        }
    }
    plain
}

/// The inside of `[..]`, if `text` is that.
pub(super) fn bracketed(text: &str) -> Option<&str> {
    text.strip_prefix('[')?.strip_suffix(']')
}

/// A number: decimal, or hexadecimal after `0x`.
pub(super) fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) if !digits.starts_with('+') => u64::from_str_radix(digits, 16).ok(),
        Some(_) => None,
        None if text.starts_with('+') => None,
        None => text.parse().ok(),
    }
}

/// A number of bytes: `512M`, `1G`, `4096`.
pub(super) fn bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.char_indices().next_back()? {
        (at, 'K' | 'k') => (text.get(..at)?, 10),
        (at, 'M' | 'm') => (text.get(..at)?, 20),
        (at, 'G' | 'g') => (text.get(..at)?, 30),
        (at, 'T' | 't') => (text.get(..at)?, 40),
        _ => (text, 0),
    };
    number(digits)?.checked_mul(1 << shift)
}

/// The numbers of one element of a list: `3`, or a range `2-4`.
pub(super) fn range(text: &str) -> Option<impl Iterator<Item = u64> + use<>> {
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (number(first)?, number(last)?),
        None => (number(text)?, number(text)?),
    };
    (first <= last && last - first < MAX_ELEMENTS).then_some(first..=last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_outside_brackets_and_quotes() {
        assert_eq!(split("a=1,b=[2,3],c=\"x,y\"", ',').unwrap(), ["a=1", "b=[2,3]", "c=\"x,y\""]);
        assert_eq!(split("0@[1,2],1@[3]", ',').unwrap(), ["0@[1,2]", "1@[3]"]);
        assert_eq!(split("", ',').unwrap(), [""]);
        assert_eq!(split("é,ü", ',').unwrap(), ["é", "ü"]);
        for broken in ["a=[1", "a=1]", "a=\"x", "]["] {
            assert!(split(broken, ',').is_err(), "{broken}");
        }
        assert_eq!(split("\"[\"", ',').unwrap(), ["\"[\""]);
    }

    #[test]
    fn unquotes() {
        assert_eq!(unquote("\"a,b\""), "a,b");
        assert_eq!(unquote("a\"b\"c"), "abc");
        assert_eq!(unquote("\"say \"\"hi\"\"\""), "say \"hi\"");
        assert_eq!(unquote("plain"), "plain");
    }

    #[test]
    fn numbers() {
        assert_eq!(number("0x3f8"), Some(0x3f8));
        assert_eq!(number("18446744073709551615"), Some(u64::MAX));
        for bad in ["", "-1", "+1", "0x", "0x+1", "1.5", "18446744073709551616", "1 ", "٣"] {
            assert_eq!(number(bad), None, "{bad}");
        }
        assert_eq!(bytes("512M"), Some(512 << 20));
        assert_eq!(bytes("1g"), Some(1 << 30));
        assert_eq!(bytes("2T"), Some(2 << 40));
        assert_eq!(bytes("4K"), Some(4096));
        assert_eq!(bytes("4096"), Some(4096));
        for bad in ["", "M", "1MB", "-1M", "1.5G", "16777216T", "1é"] {
            assert_eq!(bytes(bad), None, "{bad}");
        }
        assert_eq!(range("2-4").unwrap().collect::<Vec<_>>(), [2, 3, 4]);
        assert_eq!(range("7").unwrap().collect::<Vec<_>>(), [7]);
        for bad in ["4-2", "0-8192", "0-18446744073709551615", "a-b", "-", "1-"] {
            assert!(range(bad).is_none(), "{bad}");
        }
    }
}
