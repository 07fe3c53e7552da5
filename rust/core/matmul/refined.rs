//! y = x · Wᵀ (+ bias) where each row of x decides at how many bits it reads W.
//!
//! ```text
//! for each row of x:  size = √ Σ s_x²  over its groups            s_x as int8 activations have it
//! rows with size ≤ threshold, side by side ──► matmul at read_bits    ──┐
//! rows with size > threshold, side by side ──► matmul at refined_bits ──┴──► their rows of y
//! ```
//!
//! So a row of the result is, bit for bit, what a matmul at its bits gives for it.

use crate::Shape;
use crate::error::Error;
use crate::parallel;
use crate::quantize::{Rows, Scales, Source, Target, ZeroPoints};
use crate::scheme::{Planes, Rounding, Scheme};
use crate::simd::{Isa, Kernel, Token};

use super::activations::{TASK, int8_scale, largest_magnitude};
use super::output::Columns;
use super::{Activations, Layout, check_integer_form, check_operands, checked, multiply, widen};

/// y = x · Wᵀ (+ bias) with int8 activations, W read at `refined_bits` by the rows of x whose size is above
/// `threshold`, at `read_bits` by the others. Returns how many were refined.
///
/// The size of a row is √ Σ s_x², the scales of its groups, in f64 and in the order of the groups.
///
/// * `refined`: m elements, says which rows were; a row with NaN or ±Inf has no size and is not.
/// * All else as for [`super::matmul`].
///
/// Errors: those of [`super::matmul`], for either number of bits.
pub fn matmul_refined(
    x: Source<'_>,
    m: usize,
    packed: &[u8],
    scales: Scales<'_>,
    zero_points: ZeroPoints<'_>,
    bias: Option<&[f32]>,
    shape: Shape,
    scheme: &Scheme,
    rounding: &Rounding,
    planes: &Planes,
    read_bits: u32,
    refined_bits: u32,
    threshold: f64,
    layout: Layout,
    out: Target<'_>,
    refined: &mut [bool],
    threads: usize,
) -> Result<usize, Error> {
    let at = |bits| checked(packed, scales, zero_points, shape, scheme, rounding, planes, bits, layout);
    let weights = [at(read_bits)?, at(refined_bits)?];
    matmul_refined_on(Token::active(), x, m, &weights, layout, bias, threshold, out, refined, threads)
}

/// [`matmul_refined`] on a given instruction set; `weights`: one matrix, read at either number of bits.
pub(super) fn matmul_refined_on(
    isa: Token,
    x: Source<'_>,
    m: usize,
    weights: &[Rows<'_>; 2],
    layout: Layout,
    bias: Option<&[f32]>,
    threshold: f64,
    out: Target<'_>,
    refined: &mut [bool],
    threads: usize,
) -> Result<usize, Error> {
    let Rows { shape, ref scheme, ref rounding, .. } = weights[0];
    check_operands(x, m, shape, bias, &out)?;
    check_integer_form(rounding)?;
    Shape { rows: m, k: 1 }.check("refined", refined.len(), m)?;
    let (k, group_len) = (shape.k, scheme.group_len(shape.k));
    let values = widen(isa, x, threads);
    let step = TASK.div_ceil(k.max(1));
    let tasks = refined.chunks_mut(step).enumerate().map(|(i, refined)| Decide {
        x: &values[i * step * k..][..refined.len() * k],
        k,
        group_len,
        threshold,
        refined,
    });
    parallel::for_each(threads, tasks.collect(), |task| isa.run(task));
    let count = refined.iter().filter(|&&refined| refined).count();
    if out.len() == 0 {
        return Ok(count);
    }
    let run = |x: Source<'_>, m: usize, weight: &Rows<'_>, out: Columns<'_>| {
        multiply(isa, x, m, weight, layout, bias, Activations::Int8, out, threads);
    };
    let out = Columns::of(out, shape.rows);
    if count == 0 || count == m {
        run(x, m, &weights[usize::from(count > 0)], out);
        return Ok(count);
    }
    for ((weight, out), kind) in weights.iter().zip(out.split(refined)).zip([false, true]) {
        let rows = (0..m).filter(|&row| refined[row] == kind);
        let gathered: Vec<f32> = rows.flat_map(|row| &values[row * k..][..k]).copied().collect();
        run(Source::F32(&gathered), if kind { count } else { m - count }, weight, out);
    }
    Ok(count)
}

/// Which rows have a size above the threshold.
struct Decide<'a> {
    x: &'a [f32],
    k: usize,
    group_len: usize,
    threshold: f64,
    refined: &'a mut [bool],
}

impl Kernel for Decide<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (row, refined) in self.refined.iter_mut().enumerate() {
            let mut sum = 0.0;
            for group in self.x[row * self.k..][..self.k].chunks(self.group_len) {
                let largest = largest_magnitude(isa, group);
                // Squares of f32 are exact in f64.
                let scale = f64::from(if largest.is_finite() { int8_scale(largest) } else { f32::NAN });
                sum += scale * scale;
            }
            *refined = sum.sqrt() > self.threshold;
        }
    }
}
