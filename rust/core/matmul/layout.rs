//! How the columns of a row are cut for the integer kernel.

use std::ops::Range;

use crate::simd::TILE;

/// Longest run of columns whose products always fit an i32.
pub(super) const MAX_SEGMENT: usize = 32768;
/// Columns a block aims at: 16 rows of it take a quarter of an L2 cache, or half of an L1 cache.
const BLOCK: usize = 1024;

/// Columns that share a scale and one integer sum: a group, or a part of a very long one.
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

/// Segments whose weights are unpacked together; begins at a whole tile of columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) segments: Range<usize>,
    pub(super) columns: Range<usize>,
    pub(super) words: Range<usize>,
}

/// The cuts of a row.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) segments: Vec<Segment>,
    pub(super) blocks: Vec<Block>,
    /// Words of a row.
    pub(super) words: usize,
    /// Whether word `w` of a row simply holds columns 4·w to 4·w + 3.
    pub(super) contiguous: bool,
}

impl Layout {
    /// Cuts a row of `k` columns in groups of `group` (at least 1).
    pub(super) fn new(k: usize, group: usize) -> Self {
        let mut segments = Vec::new();
        let mut words = 0;
        for (number, first) in (0..k).step_by(group).enumerate() {
            let end = k.min(first + group);
            for begin in (first..end).step_by(MAX_SEGMENT) {
                let segment =
                    Segment { begin, len: MAX_SEGMENT.min(end - begin), word: words, group: number };
                words += segment.words();
                segments.push(segment);
            }
        }
        let contiguous = segments.iter().all(|segment| segment.begin == 4 * segment.word);
        let blocks = Self::blocks(&segments, k, words);
        Self { segments, blocks, words, contiguous }
    }

    fn blocks(segments: &[Segment], k: usize, words: usize) -> Vec<Block> {
        let mut cuts: Vec<usize> = Vec::new();
        for (i, segment) in segments.iter().enumerate() {
            let far = cuts.last().is_none_or(|last| segment.begin - segments[*last].begin >= BLOCK);
            if far && segment.begin.is_multiple_of(TILE) {
                cuts.push(i);
            }
        }
        let starts = cuts.iter().map(|i| (*i, segments[*i].begin, segments[*i].word));
        let ends = starts.clone().skip(1).chain([(segments.len(), k, words)]);
        starts
            .zip(ends)
            .map(|(from, to)| Block { segments: from.0..to.0, columns: from.1..to.1, words: from.2..to.2 })
            .collect()
    }

    /// Words of the longest block.
    pub(super) fn block_words(&self) -> usize {
        self.blocks.iter().map(|block| block.words.len()).max().unwrap_or(0)
    }

    /// Columns of the longest block.
    pub(super) fn block_columns(&self) -> usize {
        self.blocks.iter().map(|block| block.columns.len()).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_and_blocks_cover_every_column_once() {
        for (k, group) in [(0, 1), (1, 8), (4096, 64), (4100, 64), (1000, 9), (70_000, 70_000), (2048, 24)] {
            let layout = Layout::new(k, group);
            assert_eq!(layout.segments.iter().map(|s| s.len).sum::<usize>(), k, "k={k} group={group}");
            assert_eq!(layout.blocks.iter().map(|b| b.columns.len()).sum::<usize>(), k);
            assert_eq!(layout.blocks.iter().map(|b| b.words.len()).sum::<usize>(), layout.words);
            for block in &layout.blocks {
                assert_eq!(block.columns.start % TILE, 0);
                let first = layout.segments[block.segments.start];
                assert_eq!((first.begin, first.word), (block.columns.start, block.words.start));
            }
            for segment in &layout.segments {
                assert!(segment.len <= MAX_SEGMENT && segment.begin / group == segment.group);
            }
        }
    }

    #[test]
    fn groups_of_whole_words_stay_contiguous() {
        assert!(Layout::new(4100, 64).contiguous && Layout::new(1001, 1001).contiguous);
        assert!(!Layout::new(100, 9).contiguous);
    }
}
