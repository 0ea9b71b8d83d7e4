//! Reads code without its comments, texts and tests, and pages with their links.

use std::collections::BTreeSet;

/// Rust without comments and without what is in quotes; lines stay where they were.
pub(crate) fn code_of(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let (mut code, mut at) = (String::with_capacity(text.len()), 0);
    let blank = |code: &mut String, from: usize, to: usize| {
        chars[from..to]
            .iter()
            .for_each(|char| code.push(if *char == '\n' { '\n' } else { ' ' }));
    };
    let is = |at: usize, char: char| chars.get(at) == Some(&char);
    let in_word = |at: usize| at > 0 && (chars[at - 1].is_alphanumeric() || chars[at - 1] == '_');
    while at < chars.len() {
        let start = at;
        if is(at, '/') && is(at + 1, '/') {
            while at < chars.len() && !is(at, '\n') {
                at += 1;
            }
        } else if is(at, '/') && is(at + 1, '*') {
            let mut depth = 0;
            loop {
                if is(at, '/') && is(at + 1, '*') {
                    (depth, at) = (depth + 1, at + 2);
                } else if is(at, '*') && is(at + 1, '/') {
                    (depth, at) = (depth - 1, at + 2);
                } else {
                    at += 1;
                }
                if depth == 0 || at >= chars.len() {
                    break;
                }
            }
        } else if is(at, '"') {
            at += 1;
            while at < chars.len() && !is(at, '"') {
                at += if is(at, '\\') { 2 } else { 1 };
            }
            at += 1;
        } else if is(at, 'r')
            && (is(at + 1, '"') || is(at + 1, '#'))
            && (!in_word(at) || is(at.wrapping_sub(1), 'b'))
        {
            let hashes = chars[at + 1..]
                .iter()
                .take_while(|char| **char == '#')
                .count();
            if !is(at + 1 + hashes, '"') {
                // A raw identifier.
                code.push('r');
                at += 1;
                continue;
            }
            at += hashes + 2;
            let ends = |at: usize| is(at, '"') && (1..=hashes).all(|more| is(at + more, '#'));
            while at < chars.len() && !ends(at) {
                at += 1;
            }
            at += hashes + 1;
        } else if is(at, '\'') && (is(at + 1, '\\') || is(at + 2, '\'')) {
            // A character; a lifetime has no closing quote.
            at += if is(at + 1, '\\') { 3 } else { 2 };
            while at < chars.len() && !is(at, '\'') {
                at += 1;
            }
            at += 1;
        } else {
            code.push(chars[at]);
            at += 1;
            continue;
        }
        at = at.min(chars.len());
        blank(&mut code, start, at);
    }
    code
}

/// Code without items under `#[cfg(test)]`; lines stay where they were.
pub(crate) fn without_tests(code: &str) -> String {
    let (mut kept, mut rest) = (String::new(), code);
    while let Some(start) = rest.find("#[cfg(test)]") {
        kept.push_str(&rest[..start]);
        let (mut depth, mut end) = (0, rest.len());
        for (at, char) in rest[start..].char_indices() {
            match char {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if matches!(char, '}' | ';') && depth == 0 {
                end = start + at + 1;
                break;
            }
        }
        kept.extend(rest[start..end].chars().filter(|char| *char == '\n'));
        rest = &rest[end..];
    }
    kept + rest
}

/// Lines, counted from 1, on which `word` stands as a whole word.
pub(crate) fn lines_with<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let part_of_word = |char: char| char.is_alphanumeric() || char == '_';
    code.lines().enumerate().filter_map(move |(index, line)| {
        let whole = line.match_indices(word).any(|(at, _)| {
            !line[..at].ends_with(part_of_word)
                && !line[at + word.len()..].starts_with(part_of_word)
        });
        whole.then_some(index + 1)
    })
}

/// Links of a page: line and target. Code is left out.
pub(crate) fn links(page: &str) -> Vec<(usize, String)> {
    let (mut found, mut fenced) = (Vec::new(), false);
    for (index, line) in page.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced || line.starts_with("    ") {
            continue;
        }
        let prose: String = line.split('`').step_by(2).collect::<Vec<_>>().join("c");
        for (at, _) in prose.match_indices("](") {
            let target: String = prose[at + 2..]
                .chars()
                .take_while(|char| !matches!(char, ')' | ' '))
                .collect();
            found.push((index + 1, target));
        }
        // [name]: target
        if let Some((name, target)) = prose.trim_start().split_once("]: ")
            && name.starts_with('[')
            && !name.starts_with("[^")
        {
            found.push((
                index + 1,
                target
                    .split_whitespace()
                    .next()
                    .unwrap_or_default()
                    .to_owned(),
            ));
        }
    }
    found
}

/// Anchors of a page's headings, as GitHub makes them.
pub(crate) fn anchors(page: &str) -> BTreeSet<String> {
    let headings = page.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| -> String {
        let text = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = text
            .chars()
            .filter(|char| char.is_alphanumeric() || matches!(char, ' ' | '-' | '_'));
        kept.map(|char| if char == ' ' { '-' } else { char })
            .collect()
    };
    headings.map(anchor).collect()
}

/// The rules of the house are only as good as these.
#[test]
fn the_readers_of_code_and_pages_read_right() {
    let text = "a /* b /* c */ d */ e // f\n\"g \\\" h\" 'i' '\\'' b'j' &'k l r\"m\" br#\"n \" o\"# r#type\n";
    let words: Vec<_> = code_of(text)
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    assert_eq!(words, ["a", "e", "b", "&'k", "l", "b", "r#type"]);
    assert_eq!(code_of(text).lines().count(), 2);

    let code =
        "keep\n#[cfg(test)]\nmod tests {\n fn a() { {} }\n}\nkept\n#[cfg(test)]\nmod more;\nend";
    let stripped = without_tests(code);
    assert_eq!(
        stripped.split_whitespace().collect::<Vec<_>>(),
        ["keep", "kept", "end"]
    );
    assert_eq!(stripped.lines().count(), code.lines().count());

    assert_eq!(
        lines_with("unsafely\nan unsafe_fn\n(unsafe)", "unsafe").collect::<Vec<_>>(),
        [3]
    );
    let page = "[a](x.md#y) `[b](z)` [c](w \"t\")\n```\n[d](v)\n```\n[e]: u t\n";
    let found: Vec<_> = links(page)
        .into_iter()
        .map(|(line, target)| format!("{line} {target}"))
        .collect();
    assert_eq!(found, ["1 x.md#y", "1 w", "5 u"]);
    assert!(
        anchors("# A b\n## What's `c-d`?")
            .is_superset(&["a-b", "whats-c-d"].map(str::to_owned).into())
    );
}
