//! Noise in place of rounding: uniform, of a width that each group has of its own.
//!
//! The error of rounding behaves like uniform noise of one step (Widrow 1956), and noise has what rounding has
//! not: derivatives, in the elements and in the width.

use super::draws::Draws;
use super::groups::lanes;
use super::{BATCH, Source, Target, first_lanes, joined};
use crate::Shape;
use crate::error::Error;
use crate::parallel::{self, Span, spans, take};
use crate::scheme::Rounding;
use crate::simd::{Isa, Kernel, LANES, TILE, Token, four, total};

/// 2^23 − ½: the middle of the integers of 24 bits.
const MIDDLE: f32 = 8_388_607.5;

/// One span to add noise to.
struct NoiseSpan<'a> {
    x: Source<'a>,
    widths: &'a [f32],
    row_len: usize,
    group_len: usize,
    preserve_variance: bool,
    rounding: &'a Rounding,
    /// Logical index of the first element.
    first: u64,
    out: Target<'a>,
}

impl Kernel for NoiseSpan<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let mut draws = Draws::of_noise(self.rounding);
        let mut widths = self.widths.iter();
        for row in (0..self.x.len()).step_by(self.row_len) {
            for begin in (row..row + self.row_len).step_by(self.group_len) {
                let len = self.group_len.min(row + self.row_len - begin);
                let width = isa.splat(widths.next().copied().unwrap_or(0.0));
                let shrink = self.preserve_variance.then(|| self.shrink(isa, &mut draws, begin, len, width));
                for at in (0..len).step_by(TILE) {
                    let count = (len - at).min(TILE);
                    let x = self.x.tile(isa, begin + at);
                    let noise = self.noise(isa, &mut draws, begin, at, len, width);
                    let mut y = four!(j => isa.add(x[j], noise[j]));
                    if let Some((mean, factor)) = shrink {
                        let (mean, factor) = (isa.splat(mean), isa.splat(factor));
                        y = four!(j => isa.add(mean, isa.mul(isa.sub(y[j], mean), factor)));
                    }
                    self.out.push(isa, false, count, y);
                }
            }
        }
    }
}

impl NoiseSpan<'_> {
    /// Noise of the elements of a group from `at` on: width · (R + ½ − 2^23) / 2^24, R the top 24 bits of the draw.
    #[inline(always)]
    fn noise<I: Isa>(
        &self,
        isa: I,
        draws: &mut Draws,
        begin: usize,
        at: usize,
        len: usize,
        width: I::F32,
    ) -> [I::F32; 4] {
        let index = self.first + (begin + at) as u64;
        if !draws.covers(index, (len - at).min(TILE)) {
            draws.cover(isa, index, BATCH.min(self.x.len() - begin - at));
        }
        let draw = draws.tile(isa, index);
        let unit = isa.splat(1.0 / (1u32 << 24) as f32);
        four!(j => {
            let centred = isa.sub(isa.to_f32(isa.shr::<8>(draw[j])), isa.splat(MIDDLE));
            isa.mul(width, isa.mul(centred, unit))
        })
    }

    /// Mean of a group, and the factor that gives its deviations with noise the variance they had without.
    #[inline(always)]
    fn shrink<I: Isa>(
        &self,
        isa: I,
        draws: &mut Draws,
        begin: usize,
        len: usize,
        width: I::F32,
    ) -> (f32, f32) {
        let zero = isa.splat(0.0);
        let n = len as f32;
        let average = |sum: I::F32| total(lanes(isa, sum)) / n;
        let mut sum = zero;
        for at in (0..len).step_by(TILE) {
            let x = self.x.tile(isa, begin + at);
            for j in 0..4 {
                sum = isa.add(sum, first_lanes(isa, x[j], (len - at).saturating_sub(j * LANES)));
            }
        }
        let mean = average(sum);
        let (mut squares, mut powers) = (zero, zero);
        for at in (0..len).step_by(TILE) {
            let noise = self.noise(isa, draws, begin, at, len, width);
            let x = self.x.tile(isa, begin + at);
            for j in 0..4 {
                let count = (len - at).saturating_sub(j * LANES);
                let d = isa.sub(x[j], isa.splat(mean));
                squares = isa.add(squares, first_lanes(isa, isa.mul(d, d), count));
                powers = isa.add(powers, first_lanes(isa, isa.mul(noise[j], noise[j]), count));
            }
        }
        let (variance, noise) = (average(squares), average(powers));
        let both = variance + noise;
        if both == 0.0 || !both.is_finite() { (mean, 1.0) } else { (mean, (variance / both).sqrt()) }
    }
}

/// Adds uniform noise to x.
///
/// * `x`, `out`: rows · k elements; `widths`: one a group, the noise of which is uniform in ±width / 2.
/// * `group_size`: elements a group, 0 for the whole row.
/// * `preserve_variance`: the deviations of each group from its mean are then shrunk to the variance they had.
/// * `rounding`: seed, step, stream and offset of the draws; the rest of it does not matter.
///
/// The result does not depend on `threads`. Errors: lengths of the buffers; a width that is not finite or is
/// negative.
pub fn inject_noise(
    x: Source<'_>,
    widths: &[f32],
    shape: Shape,
    group_size: usize,
    preserve_variance: bool,
    rounding: &Rounding,
    out: Target<'_>,
    threads: usize,
) -> Result<(), Error> {
    let groups = |k: usize, len: usize| if len == 0 { 0 } else { k.div_ceil(len) };
    let group_len = |k: usize| if group_size == 0 { k } else { group_size.min(k) };
    shape.check("x", x.len(), shape.len())?;
    shape.check("out", out.len(), shape.len())?;
    shape.check("widths", widths.len(), shape.rows * groups(shape.k, group_len(shape.k)))?;
    if let Some(group) = widths.iter().position(|width| !(width.is_finite() && *width >= 0.0)) {
        return Err(Error::NoiseWidth { group, width: widths[group] });
    }
    let shape = joined(shape, group_size);
    let group_len = group_len(shape.k);
    let spans = spans(shape, group_len.max(1), threads);
    let (mut widths, mut out, mut done) = (widths, out, 0);
    let task = |span: &Span| {
        let first = rounding.offset() + done as u64;
        let x = x.part(done, span.len());
        done += span.len();
        let widths = take(&mut widths, span.total_groups());
        let (row_len, out) = (span.end - span.begin, out.take(span.len()));
        NoiseSpan { x, widths, row_len, group_len, preserve_variance, rounding, first, out }
    };
    let tasks = spans.iter().map(task).collect();
    parallel::for_each(threads, tasks, |task| Token::active().run(task));
    Ok(())
}
