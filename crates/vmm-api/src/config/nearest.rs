//! The nearest known name to one that is not known.

/// The candidate with the smallest edit distance to `name`, if any is near enough to be meant.
pub(crate) fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // A longer name cannot be meant, and its distance would cost time.
    if name.len() > 64 {
        return None;
    }
    let name: Vec<char> = name.to_lowercase().chars().collect();
    let limit = (name.len() / 3).max(2).min(name.len().saturating_sub(1));
    candidates
        .into_iter()
        .map(|candidate| (distance(&name, candidate), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance in characters.
fn distance(a: &[char], b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.iter().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        let mut next = vec![left];
        for (to, above) in b.iter().zip(row.iter().skip(1)) {
            let substituted = diagonal + usize::from(from != to);
            left = substituted.min(left + 1).min(above + 1);
            diagonal = *above;
            next.push(left);
        }
        row = next;
    }
    row.last().copied().unwrap_or(a.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        let of = |a: &str, b| distance(&a.chars().collect::<Vec<_>>(), b);
        assert_eq!(of("", "abc"), 3);
        assert_eq!(of("abc", ""), 3);
        assert_eq!(of("kitten", "sitting"), 3);
        assert_eq!(of("path", "path"), 0);
    }

    #[test]
    fn suggests_only_near_names() {
        let names = ["path", "readonly", "num_queues", "queue_size"];
        assert_eq!(nearest("read_only", names), Some("readonly"));
        assert_eq!(nearest("numqueues", names), Some("num_queues"));
        assert_eq!(nearest("PATH", names), Some("path"));
        assert_eq!(nearest("zzzzzz", names), None);
        assert_eq!(nearest("", names), None);
        assert_eq!(nearest("a", names), None);
        assert_eq!(nearest(&"x".repeat(100_000), names), None);
    }
}
