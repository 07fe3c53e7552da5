//! The kernel for codes: panels of the weight against activations in bytes.
//!
//! ```text
//! for each panel of 64 rows of W:
//!   for each block of columns:                      its codes fit a cache
//!     expand the block's codes
//!     for each tile of rows of x:                   tile.rs, or strips.rs where a unit multiplies blocks
//!   write the 64 columns of the result
//! ```

use std::cell::Cell;
use std::ops::{Range, RangeInclusive};

use crate::quantize::Rows;
use crate::simd::multiply::{Multiply, MultiplyKernel};
use crate::simd::{Isa, VECTORS};

use super::Work;
use super::cuts::{BLOCK, Block, Cuts};
use super::factors::Factors;
use super::panel::{
    Ahead, AlignedWords, BYTES, Codes, LEVELS, Laid, Panel, PanelPlanes, Word, bits_of, by_stack,
};
use super::strips::Strips;
use super::sums::{Sums, by_height, tiles};
use super::tile::{Operands, Stream, Tile};

impl MultiplyKernel for Work<'_> {
    type Output = ();

    #[inline(always)]
    fn run<M: Multiply>(mut self, by: M) {
        let isa = by.isa();
        let mut scratch = Scratch::new(self.cuts, self.rows.len());
        for panel in Panel::all(self.outputs.clone()) {
            scratch.factors.load(isa, self.weight, self.layout, self.affine, panel);
            let Rows { packed, ref prefix, shape, ref scheme, .. } = *self.weight;
            let table = scheme.table();
            let mut codes = Codes::open(isa, packed, prefix, shape, table, self.layout, self.cuts, panel);
            let stream = panel.vectors() == VECTORS && self.streams::<M>(&codes);
            // Strips are as wide as a whole panel, whatever is in it.
            match self.x.tiles() {
                Some(_) => scratch.sums.begin_strips(),
                None => scratch.sums.begin(panel.vectors(), if stream { VECTORS } else { M::TILE_VECTORS }),
            }
            for block in &self.cuts.blocks {
                self.multiply(by, panel, block, &mut codes, stream, &mut scratch);
            }
            let (finite, first) = (self.x.finite(&self.rows), panel.first - self.outputs.start);
            scratch.sums.write(isa, panel, self.bias, finite, self.bypass, &mut self.out, first);
        }
    }
}

impl Work<'_> {
    /// Whether rows are so few that the codes of whole panels are expanded in registers.
    #[inline(always)]
    fn streams<M: Multiply>(&self, codes: &Codes<'_>) -> bool {
        let most = codes.planes().map_or(0, |planes| stream_rows::<M>(planes.stack()));
        self.cuts.by_units && self.rows.len() <= most
    }

    /// Adds a block's products to the sums of all rows.
    #[inline(always)]
    fn multiply<M: Multiply>(
        &self,
        by: M,
        panel: Panel,
        block: &Block,
        codes: &mut Codes<'_>,
        stream: bool,
        scratch: &mut Scratch,
    ) {
        let Scratch { expanded, factors, sums, carried } = scratch;
        let (scales, zeros) = factors.of(self.weight, self.layout, panel);
        let (cuts, affine, vectors) = (self.cuts, self.affine, panel.vectors());
        let carried = carried.as_mut();
        let on = Operands { x: self.x, cuts, block, affine, vectors, scales, zeros };
        let in_place = codes.planes().and_then(|planes| planes.as_words(block));
        if let (Some(amx), Some(order)) = (by.blocks(), self.x.tiles()) {
            let words = match in_place.filter(|_| order == Laid::Runs && vectors == VECTORS) {
                Some(words) => {
                    // Nobody has asked for the first ones yet.
                    if panel.first == self.outputs.start && block.units.start == 0 {
                        words.iter().for_each(|word| by.isa().prefetch(word, 0));
                    }
                    words
                }
                None => {
                    let to = &mut expanded.lines_mut()[..order.words(block.units.len(), VECTORS)];
                    let (k, ahead) = (self.weight.shape.k, &mut Ahead::default());
                    codes.expand(by.isa(), cuts, k, block, to, order, ahead);
                    to
                }
            };
            // What follows the last panel is another task's.
            let more = panel.first + panel.rows < self.outputs.end || block.units.end < cuts.units;
            let (rows, planes) = (self.rows.clone(), codes.planes().filter(|_| more));
            by.vectorize(Strips { on, amx, order, codes: words, rows, planes, sums, carried });
            return;
        }
        if let Codes::Panels(planes) = codes
            && stream
        {
            Streams { on, codes: planes, rows: self.rows.clone(), sums, carried }.run(by);
            return;
        }
        // The memory behind the block is asked for in even steps, while its codes are expanded and multiplied.
        let units = block.units.len();
        let passes = if sums.wide(M::TILE_VECTORS) { 1 } else { vectors };
        let tiles = self.rows.len().div_ceil(M::TILE_ROWS) * passes;
        let steps = units * (tiles + usize::from(in_place.is_none()));
        let mut ahead = codes.planes().map_or(Ahead::default(), |planes| planes.ahead(block, steps));
        let words = match in_place {
            Some(words) => words,
            None => {
                let to = &mut expanded.lines_mut()[..Laid::Units.words(units, vectors)];
                codes.expand(by.isa(), cuts, self.weight.shape.k, block, to, Laid::Units, &mut ahead);
                to
            }
        };
        Tiles { on, words, rows: self.rows.clone(), sums, carried, ahead }.run(by);
    }
}

/// Words of a block of expanded codes, 16 KiB, that stays in the first-level cache, and of one that is multiplied
/// where it lies. Measured.
const EXPANDED_BLOCK: usize = 64;
const BLOCK_IN_PLACE: usize = 128;
/// Rows of x that such blocks are for. More of them repay what a block costs in the second-level cache, and reload
/// the sums of their tiles the more often. Fewer are not expanded to memory, or have but one tile.
const ROWS_OF_EXPANDED: RangeInclusive<usize> = 5..=48;
const ROWS_IN_PLACE: RangeInclusive<usize> = 2..=48;

/// Words of the blocks that suit `rows` of x in bytes; whether codes are multiplied `in_place`.
pub(super) fn block_for_rows(rows: usize, in_place: bool) -> usize {
    match in_place {
        true if ROWS_IN_PLACE.contains(&rows) => BLOCK_IN_PLACE,
        false if ROWS_OF_EXPANDED.contains(&rows) => EXPANDED_BLOCK,
        _ => BLOCK,
    }
}

/// Stacks that have a kernel for few rows whatever multiplies, see [`Multiply::EVERY_STACK`].
pub(super) const fn common(stack: u32) -> bool {
    matches!(stack, BYTES | 0x4 | 0x2 | 0x12 | 0x44) || stack == LEVELS | 0x4
}

/// Rows of x up to which the codes of a stack are expanded in registers, a few rows after the other; 0 where there
/// is no kernel for it.
const fn stream_rows<M: Multiply>(stack: u32) -> usize {
    let bits = bits_of(stack);
    let chosen = *M::BITS.start() <= bits && bits <= *M::BITS.end();
    match stack {
        _ if M::STREAM_ROWS == 0 || !chosen || !(M::EVERY_STACK || common(stack)) => 0,
        BYTES => M::STREAM_ROWS_OF_BYTES,
        _ => M::STREAM_ROWS,
    }
}

/// A few rows of x against the codes of a block as they lie in memory.
struct Streams<'a> {
    on: Operands<'a>,
    codes: &'a PanelPlanes<'a>,
    rows: Range<usize>,
    sums: &'a mut Sums,
    carried: Option<&'a mut Sums>,
}

impl Streams<'_> {
    #[inline(always)]
    fn run<M: Multiply>(mut self, by: M) {
        by_stack!(self.codes.stack(), STACK => {
            if const { stream_rows::<M>(STACK) > 0 } {
                self.stack::<M, STACK>(by);
            }
        });
    }

    #[inline(always)]
    fn stack<M: Multiply, const STACK: u32>(&mut self, by: M) {
        let mut done = 0;
        while done < self.rows.len() {
            done += match self.rows.len() - done {
                // More are compiled only where there may be more.
                rows if rows == 1 || STACK == BYTES && M::STREAM_ROWS_OF_BYTES == 1 => {
                    self.rows_of::<M, STACK, 1>(by, done)
                }
                2 | 3 => self.rows_of::<M, STACK, 2>(by, done),
                _ => self.rows_of::<M, STACK, 4>(by, done),
            };
        }
    }

    /// `R` rows from `sum` on; returns their number.
    #[inline(always)]
    fn rows_of<M: Multiply, const STACK: u32, const R: usize>(&mut self, by: M, sum: usize) -> usize {
        let (on, codes, row) = (self.on, self.codes, self.rows.start + sum);
        let (sums, carried) = (&mut *self.sums, self.carried.as_deref_mut());
        by.vectorize(Stream::<R, STACK> { on, row, codes, sum, sums, carried });
        R
    }
}

/// All rows of x against the expanded codes of a block.
struct Tiles<'a, 'b> {
    on: Operands<'a>,
    words: &'a [Word],
    rows: Range<usize>,
    sums: &'a mut Sums,
    carried: Option<&'a mut Sums>,
    /// A unit of a tile is a step.
    ahead: Ahead<'b>,
}

impl Tiles<'_, '_> {
    #[inline(always)]
    fn run<M: Multiply>(mut self, by: M) {
        let (rows, wide) = (self.rows.len(), self.sums.wide(M::TILE_VECTORS));
        for first in 0..if wide { 1 } else { self.on.vectors } {
            for (row, height) in tiles(rows, M::TILE_ROWS) {
                if wide {
                    self.tile::<M, VECTORS>(by, row, height, 0);
                } else {
                    self.tile::<M, 1>(by, row, height, first);
                }
            }
        }
    }

    /// One tile of `height` rows and the vectors `first` to `first + C`.
    #[inline(always)]
    fn tile<M: Multiply, const C: usize>(&mut self, by: M, sum: usize, height: usize, first: usize) {
        let (on, codes, row, ahead) = (self.on, self.words, self.rows.start + sum, &mut self.ahead);
        let (sums, carried) = (&mut *self.sums, self.carried.as_deref_mut());
        by_height!(height, M::TILE_ROWS, R => {
            by.vectorize(Tile::<R, C> { on, row, first, codes, sum, sums, carried, ahead });
        });
    }
}

/// Memory of one task.
struct Scratch {
    /// Codes of a block.
    expanded: AlignedWords,
    factors: Factors,
    /// Running results, as bits of f32.
    sums: Sums,
    /// Sums of products carried from block to block, if any ever are.
    carried: Option<Sums>,
}

thread_local! {
    /// [`Scratch::expanded`] of a thread between two tasks: fresh memory, page by page, would cost many a task more
    /// than its products.
    static EXPANDED: Cell<Option<AlignedWords>> = const { Cell::new(None) };
}

impl Drop for Scratch {
    fn drop(&mut self) {
        EXPANDED.set(Some(std::mem::replace(&mut self.expanded, AlignedWords::new(0))));
    }
}

impl Scratch {
    fn new(cuts: &Cuts, rows: usize) -> Self {
        let words = Laid::Pairs.words(cuts.block_units(), VECTORS);
        let kept = EXPANDED.take().filter(|kept| kept.lines().len() >= words);
        Self {
            expanded: kept.unwrap_or_else(|| AlignedWords::new(words)),
            factors: Factors::default(),
            sums: Sums::new(rows),
            carried: (!cuts.whole).then(|| Sums::new(rows)),
        }
    }
}
