//! The float kernel: weights dequantized panel by panel, f32 products, one order of additions.
//!
//! Columns are taken in runs of 64. Within a run products are added by fused multiply-add in index order from
//! 0; the runs are added in order. So neither threads nor instruction sets show in the result.

use std::ops::Range;

use crate::quantize::Rows;
use crate::simd::{Isa, Kernel, LANES};

use super::output::Columns;
use super::panel::{Lanes, transpose_rows};

/// Columns of a run.
pub(super) const RUN: usize = 64;

/// The work of one thread at a time: some panels of the weight, some rows of x.
pub(super) struct Panels<'a> {
    pub(super) weight: &'a Rows<'a>,
    /// All of x, k elements a row.
    pub(super) x: &'a [f32],
    pub(super) bias: Option<&'a [f32]>,
    pub(super) rows: Range<usize>,
    pub(super) outputs: Range<usize>,
    pub(super) out: Columns<'a>,
}

impl Kernel for Panels<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let k = self.weight.shape.k;
        let mut by_row = vec![0.0; LANES * k];
        let mut panel: Vec<Lanes> = vec![[0; LANES]; k.next_multiple_of(LANES)];
        let (begin, end) = (self.outputs.start, self.outputs.end);
        for first in (begin..end).step_by(LANES) {
            let count = LANES.min(end - first);
            self.weight.unpack(isa, first..first + count, &mut by_row[..count * k]);
            transpose_rows(isa, &by_row[..count * k], k, &mut panel);
            self.multiply(isa, &panel[..k], first, count);
        }
    }
}

impl Panels<'_> {
    /// All rows of x with one panel.
    #[inline(always)]
    fn multiply<I: Isa>(&mut self, isa: I, panel: &[Lanes], first: usize, count: usize) {
        let mut bias = [0.0; LANES];
        if let Some(all) = self.bias {
            bias[..count].copy_from_slice(&all[first..first + count]);
        }
        let bias = isa.load(&bias);
        let mut row = 0;
        while row + 4 <= self.rows.len() {
            let sums = self.dot_rows::<I, 4>(isa, panel, row);
            for r in 0..4 {
                self.write(isa, sums[r], bias, row + r, first, count);
            }
            row += 4;
        }
        while row < self.rows.len() {
            let [sum] = self.dot_rows::<I, 1>(isa, panel, row);
            self.write(isa, sum, bias, row, first, count);
            row += 1;
        }
    }

    /// The sums of `R` rows of x with the 16 weight rows of `panel`.
    #[inline(always)]
    fn dot_rows<I: Isa, const R: usize>(&self, isa: I, panel: &[Lanes], row: usize) -> [I::F32; R] {
        let k = panel.len();
        let mut x: [&[f32]; R] = [&[]; R];
        for r in 0..R {
            x[r] = &self.x[(self.rows.start + row + r) * k..][..k];
        }
        let mut sums = [isa.splat(0.0); R];
        for (run, weights) in panel.chunks(RUN).enumerate() {
            let mut part: [&[f32]; R] = [&[]; R];
            for r in 0..R {
                part[r] = &x[r][run * RUN..][..weights.len()];
            }
            let mut acc = [isa.splat(0.0); R];
            for (i, lanes) in weights.iter().enumerate() {
                let w = isa.from_bits(isa.load_i32(lanes));
                for r in 0..R {
                    acc[r] = isa.mul_add(isa.splat(part[r][i]), w, acc[r]);
                }
            }
            for r in 0..R {
                sums[r] = isa.add(sums[r], acc[r]);
            }
        }
        sums
    }

    #[inline(always)]
    fn write<I: Isa>(&mut self, isa: I, sum: I::F32, bias: I::F32, row: usize, first: usize, count: usize) {
        let sum = if self.bias.is_some() { isa.add(sum, bias) } else { sum };
        self.out.write(isa, row, first - self.outputs.start, count, sum);
    }
}
