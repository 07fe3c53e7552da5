//! Strips of rows of x against a panel of the weight, on a unit that multiplies whole blocks of bytes.
//!
//! ```text
//! for each strip of 32 rows of x:
//!   for each piece of a segment, each pair of vectors:
//!     products = codes · q, or added to what the block before left      32 rows × 32 outputs, i32, exact
//!     at the segment's end, row by row: what tile.rs does with dots
//! ```

use std::ops::Range;

pub(super) use crate::simd::amx::ROWS;
use crate::simd::amx::{Amx, Order, Tiles};
use crate::simd::multiply::{Multiply, MultiplyKernel};
use crate::simd::{Aligned, LANES, VECTORS};

use super::cuts::{Cuts, UNIT};
use super::panel::{Ahead, Laid, PanelPlanes, Word};
use super::sums::Sums;
use super::tile::Operands;

/// Rows of x from which a strip beats tiles of a few rows.
pub(super) const MIN_ROWS: usize = 16;
/// Bytes of x that stay in the second-level cache while panels pass by.
const X_BYTES: usize = 1 << 20;

/// Parts a thread: few, since each begins with codes that nobody has fetched ahead. Measured.
pub(super) const PARTS_A_THREAD: usize = 1;

/// Rows of x for one task: whole strips.
pub(super) fn max_rows(k: usize) -> usize {
    (X_BYTES / k.max(1) / ROWS * ROWS).clamp(ROWS, 16 * ROWS)
}

/// The order of codes that suits the cuts of a row: a step takes 64 columns where segments allow, else 32. Where the
/// codes are `bytes` in panels, longer segments let them be read where they lie.
pub(super) fn laid(cuts: &Cuts, bytes: bool) -> Laid {
    match bytes && cuts.by_runs {
        true => Laid::Runs,
        false if cuts.by_pairs => Laid::Pairs,
        false => Laid::Units,
    }
}

/// All rows of x against the expanded codes of a block, a whole panel wide.
pub(super) struct Strips<'a> {
    pub(super) on: Operands<'a>,
    pub(super) amx: Amx,
    pub(super) order: Laid,
    pub(super) codes: &'a [Word],
    pub(super) rows: Range<usize>,
    /// Where the codes come from, if memory can be asked for ahead.
    pub(super) planes: Option<&'a PanelPlanes<'a>>,
    /// Running results, the bits of f32.
    pub(super) sums: &'a mut Sums,
    /// Integer sums of segments that began in an earlier block, if any do.
    pub(super) carried: Option<&'a mut Sums>,
}

impl MultiplyKernel for Strips<'_> {
    type Output = ();

    #[inline(always)]
    fn run<M: Multiply>(mut self, by: M) {
        let rows = self.rows.len();
        // A strip multiplies half a panel at a time.
        let steps = rows.div_ceil(ROWS) * self.on.block.units.len().div_ceil(self.order.together()) * 2;
        let mut ahead = self.planes.map_or(Ahead::default(), |planes| planes.ahead(self.on.block, steps));
        let mut products = Aligned([[[0; LANES]; VECTORS]; ROWS]);
        let whole = rows / ROWS * ROWS;
        for (rows, height) in [(0..whole, ROWS), (whole..rows, rows - whole)] {
            if !rows.is_empty() {
                let tiles = self.amx.tiles(height, order(self.order));
                for row in rows.step_by(ROWS) {
                    self.strip(by, &tiles, row, height, &mut products.0, &mut ahead);
                }
            }
        }
    }
}

/// The order as the unit has it.
fn order(laid: Laid) -> Order {
    match laid {
        Laid::Units => Order::Together { words: UNIT },
        Laid::Pairs => Order::Together { words: 2 * UNIT },
        Laid::Runs => Order::Apart,
    }
}

impl Strips<'_> {
    /// `height` rows from `row` on.
    #[inline(always)]
    fn strip<M: Multiply>(
        &mut self,
        by: M,
        tiles: &Tiles,
        row: usize,
        height: usize,
        products: &mut [[[u32; LANES]; VECTORS]],
        ahead: &mut Ahead<'_>,
    ) {
        let on = self.on;
        let sums = self.sums.panel(row, height);
        let products = match &mut self.carried {
            Some(carried) => carried.panel(row, height),
            None => &mut products[..height],
        };
        let row = self.rows.start + row;
        for piece in on.pieces() {
            let unit = piece.begin / UNIT;
            // Whole steps: what pads one meets zeros of x.
            let steps = (piece.end.div_ceil(UNIT) - unit).div_ceil(self.order.together());
            let (x, strip) = on.x.tiles_from(row, on.block.words().start + piece.begin);
            let codes = &self.codes[unit * VECTORS * UNIT..];
            for pair in 0..VECTORS / 2 {
                tiles.multiply(x, strip, codes, pair, steps, !piece.first, products, ahead.take(steps));
                if piece.last {
                    on.add_strip(by.isa(), sums, products, row, piece, pair);
                }
            }
        }
    }
}
