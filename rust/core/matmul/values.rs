//! The kernel for weights that are no affine function of integer codes (dither, rescaled variance): dequantized a
//! few columns at a time, f32 products, one order of additions.
//!
//! Columns are taken in runs of 64. Within a run products are added by fused multiply-add in index order from
//! 0; the runs are added in order. So neither threads nor instruction sets show in the result.

use std::ops::Range;

use crate::quantize::Rows;
use crate::scheme::Mode;
use crate::simd::{Isa, Kernel, LANES, VECTORS};

use super::Layout;
use super::cuts::{Block, Cuts, Segment, UNIT};
use super::output::Columns;
use super::panel::{Ahead, AlignedWords, Codes, Laid, Lanes, Panel, Word, transpose_rows};
use super::sums::{Sums, by_height, tiles};

/// Columns of a run.
pub(super) const RUN: usize = 64;
/// Columns dequantized at a time: with 64 rows, 64 KiB.
const CHUNK: usize = 4 * RUN;

/// The work of one thread at a time: some panels of the weight, some rows of x.
pub(super) struct Panels<'a> {
    pub(super) weight: &'a Rows<'a>,
    pub(super) layout: Layout,
    pub(super) cuts: &'a Cuts,
    /// All of x, k elements a row.
    pub(super) x: &'a [f32],
    /// Whether the rows of x hold neither NaN nor ±Inf.
    pub(super) finite: &'a [bool],
    pub(super) bias: Option<&'a [f32]>,
    pub(super) rows: Range<usize>,
    pub(super) outputs: Range<usize>,
    pub(super) out: Columns<'a>,
    /// Whether the result bypasses the caches.
    pub(super) bypass: bool,
}

impl Kernel for Panels<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let k = self.weight.shape.k;
        // Dither goes by the index of an element, padding of words by its segment: whole rows at a time then.
        let whole = !self.cuts.contiguous || self.weight.rounding.mode() == Mode::Subtractive;
        let chunk = if whole { k.next_multiple_of(RUN) } else { CHUNK };
        let mut floats = vec![[0; LANES]; chunk * VECTORS];
        let units = if whole { self.cuts.units } else { CHUNK / (4 * UNIT) };
        let mut words = AlignedWords::new(units * VECTORS * UNIT);
        let mut sums = Sums::new(self.rows.len());
        for panel in Panel::all(self.outputs.clone()) {
            sums.begin(panel.vectors(), I::TILE_VECTORS);
            if self.weight.rounding.mode() == Mode::Subtractive {
                self.unpack(isa, panel, &mut floats);
                self.multiply(isa, panel, 0..k, &floats, &mut sums);
            } else {
                let Rows { packed, ref prefix, shape, ref scheme, .. } = *self.weight;
                let table = scheme.table();
                let mut codes = Codes::open(isa, packed, prefix, shape, table, self.layout, self.cuts, panel);
                for begin in (0..k).step_by(chunk) {
                    let columns = begin..k.min(begin + chunk);
                    let units = if whole {
                        0..self.cuts.units
                    } else {
                        begin / (4 * UNIT)..columns.end.div_ceil(4 * UNIT)
                    };
                    let block = Block { units, pieces: 0..0 };
                    let words = &mut words.lines_mut()[..block.units.len() * panel.vectors() * UNIT];
                    codes.expand(isa, self.cuts, k, &block, words, Laid::Units, &mut Ahead::default());
                    self.dequantize(isa, panel, &columns, &block, words, &mut floats);
                    self.multiply(isa, panel, columns, &floats, &mut sums);
                }
            }
            let (finite, first) = (&self.finite[self.rows.clone()], panel.first - self.outputs.start);
            sums.write(isa, panel, self.bias, finite, self.bypass, &mut self.out, first);
        }
    }
}

impl Panels<'_> {
    /// Dequantizes whole rows of a panel: `[column][vector]`.
    #[inline(always)]
    fn unpack<I: Isa>(&self, isa: I, panel: Panel, floats: &mut [Lanes]) {
        let k = self.weight.shape.k;
        let mut by_row = vec![0.0; LANES * k];
        let mut by_column = vec![[0; LANES]; k.next_multiple_of(LANES)];
        for c in 0..panel.vectors() {
            let (first, count) = (panel.first + c * LANES, panel.rows_of(c));
            self.weight.unpack(isa, first..first + count, &mut by_row[..count * k]);
            transpose_rows(isa, &by_row[..count * k], k, &mut by_column);
            for (to, from) in floats.chunks_exact_mut(panel.vectors()).zip(&by_column) {
                to[c] = *from;
            }
        }
    }

    /// Dequantizes the words of `columns`, those of `block`: `[column][vector]`, the bits of f32.
    #[inline(always)]
    fn dequantize<I: Isa>(
        &self,
        isa: I,
        panel: Panel,
        columns: &Range<usize>,
        block: &Block,
        words: &[Word],
        floats: &mut [Lanes],
    ) {
        let vectors = panel.vectors();
        let dropped = self.weight.scheme.bits() - self.weight.read_bits;
        let (unit, centre) = ((1u32 << dropped) as f32, ((1u32 << dropped) as f32 - 1.0) / 2.0);
        let from = self.cuts.segments.partition_point(|s| s.begin + s.len <= columns.start);
        for segment in self.cuts.segments[from..].iter().take_while(|s| s.begin < columns.end) {
            let Segment { begin, len, word, group } = *segment;
            // A long segment may begin before the columns and end behind them.
            let (low, high) = (begin.max(columns.start), (begin + len).min(columns.end));
            for c in 0..vectors {
                let (scale, zero) = self.scale_and_zero(isa, panel, group, c);
                for column in (low..high).step_by(4) {
                    let word = word + (column - begin) / 4 - block.words().start;
                    let codes = isa.load_u8(&words[(word / UNIT * vectors + c) * UNIT + word % UNIT]);
                    let mut codes = isa.words(codes);
                    for column in column..high.min(column + 4) {
                        let code = isa.and(codes, isa.splat_i32(255));
                        let mut v = isa.to_f32(code);
                        if dropped > 0 {
                            v = isa.add(isa.mul(v, isa.splat(unit)), isa.splat(centre));
                        }
                        let value = isa.mul(scale, isa.sub(v, zero));
                        let to = &mut floats[(column - columns.start) * vectors + c];
                        isa.store_i32(to, isa.to_bits(value));
                        codes = isa.shr::<8>(codes);
                    }
                }
            }
        }
    }

    /// The scales and zero points of a group for the rows of vector `c`.
    #[inline(always)]
    fn scale_and_zero<I: Isa>(&self, isa: I, panel: Panel, group: usize, c: usize) -> (I::F32, I::F32) {
        let groups = self.weight.scheme.groups(self.weight.shape.k);
        let constant = self.weight.scheme.zero_point().unwrap_or(0.0);
        let (mut scales, mut zeros) = ([0.0; LANES], [0.0; LANES]);
        for row in 0..panel.rows_of(c) {
            let at = match self.layout {
                Layout::Panels => panel.first * groups + (group * panel.vectors() + c) * LANES + row,
                Layout::Canonical => (panel.first + c * LANES + row) * groups + group,
            };
            scales[row] = self.weight.scales.get(at);
            zeros[row] = self.weight.zero_points.get(at, constant);
        }
        (isa.load(&scales), isa.load(&zeros))
    }

    /// Adds the products of `columns` to the sums of all rows, `[row][vector]`.
    #[inline(always)]
    fn multiply<I: Isa>(
        &self,
        isa: I,
        panel: Panel,
        columns: Range<usize>,
        floats: &[Lanes],
        sums: &mut Sums,
    ) {
        let (k, vectors) = (self.weight.shape.k, panel.vectors());
        let passes = if sums.wide(I::TILE_VECTORS) { 1 } else { vectors };
        for first in 0..passes {
            for (row, height) in tiles(self.rows.len(), I::TILE_ROWS) {
                let x = &self.x[(self.rows.start + row) * k..];
                let on = Operands { x, k, columns: columns.clone(), floats, vectors, first, row };
                if sums.wide(I::TILE_VECTORS) {
                    by_height!(height, I::TILE_ROWS, R => isa.vectorize(Tile::<R, VECTORS> { on, sums }));
                } else {
                    by_height!(height, I::TILE_ROWS, R => isa.vectorize(Tile::<R, 1> { on, sums }));
                }
            }
        }
    }
}

/// What the tiles share.
struct Operands<'a> {
    /// From the first row of the tile.
    x: &'a [f32],
    k: usize,
    columns: Range<usize>,
    /// Weights: `[column][vector]`, as bits of f32.
    floats: &'a [Lanes],
    vectors: usize,
    /// The tile's first vector, and its first row within the sums.
    first: usize,
    row: usize,
}

/// `R` rows of x against the vectors `first` to `first + C`.
struct Tile<'a, const R: usize, const C: usize> {
    on: Operands<'a>,
    /// Running results.
    sums: &'a mut Sums,
}

impl<const R: usize, const C: usize> Kernel for Tile<'_, R, C> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Operands { x, k, columns, floats, vectors, first, row } = self.on;
        let sums = self.sums.tile::<R, C>(row, first);
        let mut rows: [&[f32]; R] = [&[]; R];
        for r in 0..R {
            rows[r] = &x[r * k..][columns.clone()];
        }
        for (run, weights) in floats[..columns.len() * vectors].chunks(RUN * vectors).enumerate() {
            let mut part: [&[f32]; R] = [&[]; R];
            for r in 0..R {
                part[r] = &rows[r][run * RUN..][..weights.len() / vectors];
            }
            let mut acc = [[isa.splat(0.0); C]; R];
            for (i, lanes) in weights.chunks_exact(vectors).enumerate() {
                let mut w = [isa.splat(0.0); C];
                for c in 0..C {
                    w[c] = isa.from_bits(isa.load_i32(&lanes[first + c]));
                }
                for r in 0..R {
                    let x = isa.splat(part[r][i]);
                    for c in 0..C {
                        acc[r][c] = isa.mul_add(x, w[c], acc[r][c]);
                    }
                }
            }
            for r in 0..R {
                for c in 0..C {
                    let to = &mut sums[r][c];
                    let sum = isa.add(isa.from_bits(isa.load_i32(to)), acc[r][c]);
                    isa.store_i32(to, isa.to_bits(sum));
                }
            }
        }
    }
}
