//! Results on their way: the sums of all rows of x with one panel, and how tiles share them out.

use std::ops::Range;

use crate::simd::{Isa, LANES, VECTORS};

use super::output::Columns;
use super::panel::{Lanes, Lines, Panel};

/// Sums by tiles, as bits of f32 or i32: `[row][vector]` where tiles are as wide as the panel, else
/// `[vector][row]`.
pub(super) struct Sums {
    lanes: Lines<u32, LANES>,
    rows: usize,
    wide: bool,
}

impl Sums {
    pub(super) fn new(rows: usize) -> Self {
        Self { lanes: Lines::new(rows * VECTORS), rows, wide: false }
    }

    /// Zeros for a panel of `vectors`, whose tiles may be `tile_vectors` wide.
    pub(super) fn begin(&mut self, vectors: usize, tile_vectors: usize) {
        self.wide = vectors == VECTORS && tile_vectors == VECTORS;
        self.lanes.lines_mut().fill([0; LANES]);
    }

    /// What strips begin with: anything, as wide as a whole panel.
    pub(super) fn begin_strips(&mut self) {
        self.wide = true;
    }

    /// Whether tiles are [`VECTORS`] wide, else a single vector. `tile_vectors`, as in [`Sums::begin`], lets the
    /// compiler leave out what an instruction set never does.
    #[inline(always)]
    pub(super) fn wide(&self, tile_vectors: usize) -> bool {
        tile_vectors == VECTORS && self.wide
    }

    /// Those of `R` rows from `row` on and the vectors `first` to `first + C`.
    #[inline(always)]
    pub(super) fn tile<const R: usize, const C: usize>(
        &mut self,
        row: usize,
        first: usize,
    ) -> &mut [[Lanes; C]; R] {
        let from = if C == VECTORS { row * C } else { first * self.rows + row };
        self.lanes.lines_mut()[from..]
            .as_chunks_mut()
            .0
            .first_chunk_mut()
            .expect("a sum for each row and vector")
    }

    /// Those of `rows` rows from `row` on, where tiles are wide.
    #[inline(always)]
    pub(super) fn panel(&mut self, row: usize, rows: usize) -> &mut [[Lanes; VECTORS]] {
        &mut self.lanes.lines_mut().as_chunks_mut().0[row..row + rows]
    }

    /// Writes the columns of a panel, from column `first` of `out` on: sums plus bias, NaN for the rows that
    /// `finite` says are not. Rows of the result lie far apart: each is visited once. `bypass`: past the caches.
    #[inline(always)]
    pub(super) fn write<I: Isa>(
        &self,
        isa: I,
        panel: Panel,
        bias: Option<&[f32]>,
        finite: &[bool],
        bypass: bool,
        out: &mut Columns<'_>,
        first: usize,
    ) {
        if bypass {
            self.write_by::<I, true>(isa, panel, bias, finite, out, first);
            isa.fence();
        } else {
            self.write_by::<I, false>(isa, panel, bias, finite, out, first);
        }
    }

    /// [`Sums::write`], `STREAM` as in [`Isa::store`].
    #[inline(always)]
    fn write_by<I: Isa, const STREAM: bool>(
        &self,
        isa: I,
        panel: Panel,
        bias: Option<&[f32]>,
        finite: &[bool],
        out: &mut Columns<'_>,
        first: usize,
    ) {
        let mut biases = [0.0; VECTORS * LANES];
        if let Some(all) = bias {
            biases[..panel.rows].copy_from_slice(&all[panel.first..][..panel.rows]);
        }
        let (biases, _) = biases.as_chunks();
        for row in 0..self.rows {
            let mut lanes = [isa.splat(f32::NAN); VECTORS];
            if finite[row] {
                for c in 0..panel.vectors() {
                    let at = if self.wide { row * VECTORS + c } else { c * self.rows + row };
                    lanes[c] = isa.from_bits(isa.load_i32(&self.lanes.lines()[at]));
                    if bias.is_some() {
                        lanes[c] = isa.add(lanes[c], isa.load(&biases[c]));
                    }
                }
            }
            out.write::<I, STREAM>(isa, row, first, panel.rows, &lanes);
        }
    }
}

/// First row and height of tiles of at most `limit` rows: of equal height, or one row less.
#[inline(always)]
pub(super) fn tiles(rows: usize, limit: usize) -> impl Iterator<Item = (usize, usize)> {
    let runs = runs_of_tiles(rows, limit).into_iter();
    runs.flat_map(|(rows, height)| rows.step_by(height.max(1)).map(move |row| (row, height)))
}

/// The same tiles as two runs of equal height, the higher ones first: rows and height.
#[inline(always)]
pub(super) fn runs_of_tiles(rows: usize, limit: usize) -> [(Range<usize>, usize); 2] {
    let count = rows.div_ceil(limit).max(1);
    let (low, tall) = (rows / count, rows % count);
    let end = tall * (low + 1);
    [(0..end, low + 1), (end..rows, low)]
}

/// `$run` with the constant `$rows` for a tile of `$height` rows, at most `$limit`: higher ones are not compiled.
macro_rules! by_height {
    ($height:expr, $limit:expr, $rows:ident => $run:expr) => {
        by_height!(@ $height, $limit, $rows => $run, 1 2 3 4 5 6)
    };
    (@ $height:expr, $limit:expr, $rows:ident => $run:expr, $($n:literal)*) => {
        match $height {
            $($n if $limit >= $n => {
                const $rows: usize = $n;
                $run
            })*
            _ => unreachable!("tiles are at most as high as their limit"),
        }
    };
}
pub(super) use by_height;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_every_row_once_and_differ_by_one_row_at_most() {
        for limit in 1..=6 {
            for rows in 1..40 {
                let mut next = 0;
                for (row, height) in tiles(rows, limit) {
                    assert_eq!(row, next);
                    assert!(
                        height <= limit
                            && (height == rows / rows.div_ceil(limit)
                                || height * rows.div_ceil(limit) > rows)
                    );
                    next += height;
                }
                assert_eq!(next, rows);
            }
        }
    }
}
