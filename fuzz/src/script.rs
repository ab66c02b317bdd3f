//! Scripts: `p250 a1 r0,500` is the steps `p`, `a` and `r` with their numbers. Whatever else stands between them is
//! skipped, so that there is no script that doesn't parse; a line that begins with `#` is a comment.

/// One step: a letter and up to four numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) letter: u8,
    pub(crate) numbers: [i64; 4],
}

/// Reads the steps of a script, at most `most`.
pub(crate) fn steps(script: &[u8], most: usize) -> Vec<Step> {
    let lines = script.split(|byte| *byte == b'\n').filter(|line| !line.starts_with(b"#"));
    lines.flat_map(line).take(most).collect()
}

fn line(text: &[u8]) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let (mut at, mut negative) = (0, false);
    for byte in text {
        match (byte, steps.last_mut()) {
            (b'a'..=b'z' | b'A'..=b'Z', _) => {
                steps.push(Step { letter: *byte, numbers: [0; 4] });
                (at, negative) = (0, false);
            }
            (b'0'..=b'9', Some(step)) if at < 4 => {
                let digit = i64::from(byte - b'0');
                let digit = if negative { -digit } else { digit };
                step.numbers[at] = step.numbers[at].saturating_mul(10).saturating_add(digit);
            }
            (b',', _) => (at, negative) = (at + 1, false),
            (b'-', _) => negative = true,
            _ => {}
        }
    }
    steps
}

impl Step {
    /// A number below `below`, which must not be 0.
    pub(crate) fn below(&self, at: usize, below: usize) -> usize {
        (self.numbers[at].unsigned_abs() % below as u64) as usize
    }

    /// A number within both.
    pub(crate) fn within(&self, at: usize, least: u64, most: u64) -> u64 {
        self.numbers[at].unsigned_abs().clamp(least, most)
    }

    /// A number of either sign, at most `most` from 0.
    pub(crate) fn signed(&self, at: usize, most: i64) -> i64 {
        self.numbers[at].clamp(-most, most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_letters_and_numbers_and_skips_the_rest() {
        let read = steps(b"# p1\np250 a-1,,7!\nr1,2,3,4,5", 9);
        let step = |letter, numbers| Step { letter, numbers };
        assert_eq!(read, [step(b'p', [250, 0, 0, 0]), step(b'a', [-1, 0, 7, 0]), step(b'r', [1, 2, 3, 4])]);
        assert_eq!(steps(b"9,9 x99999999999999999999", 9), [step(b'x', [i64::MAX, 0, 0, 0])]);
        assert_eq!(steps(b"abc", 2).len(), 2);
    }
}
