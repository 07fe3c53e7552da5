//! How a row of k columns is cut.
//!
//! ```text
//! columns   ····|····|····|····|····|····|····|····      k
//! words     four columns of one segment                  what a dot product of bytes takes at a time
//! segments  a group, or a part of a longer one           one scale, one sum of products
//! units     8 words                                      what memory is laid out in
//! blocks    some units                                   what stays in the caches while x passes by
//! pieces    a segment within a block                     whole, or with its sum carried over
//! ```

use std::ops::Range;

/// Longest run of columns whose products always fit an i32.
pub(super) const MAX_SEGMENT: usize = 32768;
/// Words of a unit: in a plane of single bits they share one vector of bytes.
pub(super) const UNIT: usize = 8;
/// Units of which a word each makes a step of a unit for blocks, where codes are read as they lie in memory.
pub(super) const RUN: usize = 16;
/// Words of a block that stays in the second-level cache: with 64 rows, 256 KiB of codes.
pub(super) const BLOCK: usize = 1024;

/// Columns that share a scale and one sum of products: a group, or a part of a long one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    /// First column.
    pub(super) begin: usize,
    /// Number of columns.
    pub(super) len: usize,
    /// First word of four columns; the last word of a segment is padded.
    pub(super) word: usize,
    /// Number of the group within the row.
    pub(super) group: usize,
}

impl Segment {
    /// Words of four columns.
    pub(super) fn words(&self) -> usize {
        self.len.div_ceil(4)
    }
}

/// The part of a segment that lies in one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Number of the segment.
    pub(super) segment: usize,
    /// Number of the group within the row.
    pub(super) group: usize,
    /// First word, counted from the block's.
    pub(super) begin: usize,
    /// The word behind the last.
    pub(super) end: usize,
    /// Whether the segment begins here.
    pub(super) first: bool,
    /// Whether the segment ends here.
    pub(super) last: bool,
}

/// Units whose codes are expanded together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) units: Range<usize>,
    pub(super) pieces: Range<usize>,
}

impl Block {
    /// Its words within a row.
    pub(super) fn words(&self) -> Range<usize> {
        self.units.start * UNIT..self.units.end * UNIT
    }
}

/// The cuts of a row.
#[derive(Debug)]
pub(super) struct Cuts {
    pub(super) segments: Vec<Segment>,
    pub(super) pieces: Vec<Piece>,
    pub(super) blocks: Vec<Block>,
    pub(super) units: usize,
    /// Whether word `w` of a row simply holds columns 4·w to 4·w + 3.
    pub(super) contiguous: bool,
    /// Whether every segment begins at a unit, and so may be padded up to the next.
    pub(super) by_units: bool,
    /// Whether every segment even begins at a pair of units.
    pub(super) by_pairs: bool,
    /// Whether every segment even begins at a run of [`RUN`] units, and the row is made of those.
    pub(super) by_runs: bool,
    /// Whether every piece is a whole segment.
    pub(super) whole: bool,
}

impl Cuts {
    /// Cuts a row of `k` columns in groups of `group` (at least 1) and segments of at most `longest`, which keeps
    /// to whole units: how memory is laid out does not depend on it. In blocks of [`BLOCK`] words.
    pub(super) fn new(k: usize, group: usize, longest: usize) -> Self {
        Self::without_blocks(k, group, longest).in_blocks(BLOCK)
    }

    /// The same, its blocks still to be cut.
    pub(super) fn without_blocks(k: usize, group: usize, longest: usize) -> Self {
        debug_assert!(longest <= MAX_SEGMENT && longest.is_multiple_of(4 * UNIT));
        let mut segments = Vec::new();
        let mut words = 0;
        for (number, first) in (0..k).step_by(group).enumerate() {
            let end = k.min(first + group);
            for begin in (first..end).step_by(longest) {
                let segment = Segment { begin, len: longest.min(end - begin), word: words, group: number };
                words += segment.words();
                segments.push(segment);
            }
        }
        let units = words.div_ceil(UNIT);
        Self {
            contiguous: segments.iter().all(|segment| segment.begin == 4 * segment.word),
            by_units: segments.iter().all(|segment| segment.word.is_multiple_of(UNIT)),
            by_pairs: segments.iter().all(|segment| segment.word.is_multiple_of(2 * UNIT)),
            by_runs: units.is_multiple_of(RUN)
                && segments.iter().all(|segment| segment.word.is_multiple_of(RUN * UNIT)),
            whole: true,
            pieces: Vec::new(),
            blocks: Vec::new(),
            segments,
            units,
        }
    }

    /// Cuts the segments at every `words` words, whole pairs of units: the canonical layout is read in those.
    pub(super) fn in_blocks(mut self, words: usize) -> Self {
        debug_assert!(words > 0 && words.is_multiple_of(2 * UNIT) && self.blocks.is_empty());
        let mut next = 0;
        for begin in (0..self.units * UNIT).step_by(words) {
            let end = (begin + words).min(self.units * UNIT);
            let first_piece = self.pieces.len();
            while let Some(segment) = self.segments.get(next).filter(|segment| segment.word < end) {
                let segment_end = segment.word + segment.words();
                let last = segment_end <= end;
                self.pieces.push(Piece {
                    segment: next,
                    group: segment.group,
                    begin: segment.word.max(begin) - begin,
                    end: segment_end.min(end) - begin,
                    first: segment.word >= begin,
                    last,
                });
                if !last {
                    self.whole = false;
                    break;
                }
                next += 1;
            }
            let pieces = first_piece..self.pieces.len();
            self.blocks.push(Block { units: begin / UNIT..end / UNIT, pieces });
        }
        self
    }

    /// Words of a row, the last unit's padding included.
    pub(super) fn words(&self) -> usize {
        self.units * UNIT
    }

    /// Units of the longest block.
    pub(super) fn block_units(&self) -> usize {
        self.blocks.first().map_or(0, |block| block.units.len())
    }

    /// Columns of the longest segment.
    pub(super) fn longest_segment(&self) -> usize {
        self.segments.iter().map(|segment| segment.len).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_and_pieces_cover_every_column_once_and_in_order() {
        let sizes = [(0, 1), (1, 8), (4096, 64), (4100, 64), (1000, 9), (70_000, 70_000), (2048, 24)];
        for ((k, group), longest) in sizes.into_iter().flat_map(|size| [(size, MAX_SEGMENT), (size, 256)]) {
            for words in [BLOCK, 6 * UNIT] {
                let cuts = Cuts::without_blocks(k, group, longest).in_blocks(words);
                assert!(cuts.block_units() * UNIT <= words);
                check_cuts(k, group, longest, &cuts);
            }
        }
    }

    fn check_cuts(k: usize, group: usize, longest: usize, cuts: &Cuts) {
        assert_eq!(cuts.segments.iter().map(|s| s.len).sum::<usize>(), k, "k={k} group={group}");
        for segment in &cuts.segments {
            assert!(segment.len <= longest && segment.begin / group == segment.group);
        }
        let mut seen = vec![0; cuts.segments.len()];
        for block in &cuts.blocks {
            assert!(block.units.len() <= cuts.block_units());
            for piece in &cuts.pieces[block.pieces.clone()] {
                let segment = cuts.segments[piece.segment];
                assert_eq!(piece.first, seen[piece.segment] == 0);
                assert_eq!(segment.word + seen[piece.segment], block.words().start + piece.begin);
                seen[piece.segment] += piece.end - piece.begin;
                assert_eq!(piece.last, seen[piece.segment] == segment.words());
                assert!(piece.end <= block.units.len() * UNIT && piece.group == segment.group);
            }
        }
        assert!(cuts.segments.iter().zip(seen).all(|(segment, seen)| segment.words() == seen));
        assert_eq!(cuts.whole, cuts.pieces.len() == cuts.segments.len());
    }

    #[test]
    fn groups_of_whole_words_stay_contiguous() {
        assert!(Cuts::new(4100, 64, MAX_SEGMENT).contiguous && Cuts::new(1001, 1001, MAX_SEGMENT).contiguous);
        assert!(!Cuts::new(100, 9, MAX_SEGMENT).contiguous);
        assert!(Cuts::new(4100, 96, MAX_SEGMENT).by_units && !Cuts::new(4100, 24, MAX_SEGMENT).by_units);
    }
}
