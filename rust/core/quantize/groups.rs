//! Numbers of groups: extremes, sums, errors and moments of their elements, all in the contract's order.
//!
//! Each is a kernel of its own, compiled once an instruction set however many coders use it.

use super::coders::{Coefficients, Grid, fraction};
use super::scales::{
    Groups, MAX_BITS, MIN_NORMAL, Rule, Statistics, Sum, choose, inverses, round_scales, thresholds,
    zero_points,
};
use super::{Source, load_tile, load_vector};
use crate::quantize::MSE_MULTIPLES;
use crate::scheme::Scheme;
use crate::simd::{Isa, Kernel, LANES, TILE, array, fold, four};

/// Elements as f32: the ones given, or converted to `scratch` first.
///
/// Everything behind this sees slices of f32, so that its loops do not ask for the type.
#[inline(always)]
pub(super) fn as_f32<'a, I: Isa>(
    isa: I,
    x: Source<'a>,
    nan_zero: bool,
    scratch: &'a mut Vec<f32>,
) -> &'a [f32] {
    match x {
        Source::F32(x) if !nan_zero => x,
        _ => {
            scratch.resize(x.len(), 0.0);
            isa.vectorize(Convert { x, nan_zero, to: scratch });
            scratch
        }
    }
}

/// Elements to f32, NaN to 0 if wanted.
struct Convert<'a> {
    x: Source<'a>,
    nan_zero: bool,
    to: &'a mut [f32],
}

impl Kernel for Convert<'_> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (i, to) in self.to.chunks_mut(TILE).enumerate() {
            let x = self.x.tile(isa, i * TILE);
            let x = if self.nan_zero { four!(j => zero_nan(isa, x[j])) } else { x };
            let mut tile = [0.0; TILE];
            let (vectors, _) = tile.as_chunks_mut::<LANES>();
            for j in 0..4 {
                isa.store::<false>(&mut vectors[j], x[j]);
            }
            to.copy_from_slice(&tile[..to.len()]);
        }
    }
}

/// 16 elements from `at` on, subnormals as 0, zeros behind the end.
#[inline(always)]
pub(super) fn vector<I: Isa>(isa: I, x: &[f32], at: usize) -> I::F32 {
    flush(isa, load_vector(isa, &x[at..]))
}

/// NaN to 0; everything else unchanged.
#[inline(always)]
fn zero_nan<I: Isa>(isa: I, x: I::F32) -> I::F32 {
    let below_one = isa.select(isa.gt(isa.splat(1.0), x), x, isa.splat(0.0));
    isa.select(isa.gt(x, isa.splat(0.0)), x, below_one)
}

/// Subnormal lanes to 0.
#[inline(always)]
pub(crate) fn flush<I: Isa>(isa: I, x: I::F32) -> I::F32 {
    isa.select(isa.gt(isa.splat(MIN_NORMAL), magnitude(isa, x)), isa.splat(0.0), x)
}

/// |x|
#[inline(always)]
fn magnitude<I: Isa>(isa: I, x: I::F32) -> I::F32 {
    isa.from_bits(isa.and(isa.to_bits(x), isa.splat_i32(i32::MAX)))
}

/// `x` in the first `n` lanes, 0 in the others.
#[inline(always)]
pub(crate) fn first_lanes<I: Isa>(isa: I, x: I::F32, n: usize) -> I::F32 {
    let lanes = isa.load(&array(|i| i as f32));
    isa.select(isa.gt(isa.splat(n.min(LANES) as f32), lanes), x, isa.splat(0.0))
}

/// Lanes as an array.
#[inline(always)]
pub(super) fn lanes<I: Isa>(isa: I, v: I::F32) -> Groups {
    let mut lanes = [0.0; LANES];
    isa.store::<false>(&mut lanes, v);
    lanes
}

/// The lanes of up to sixteen vectors added up.
#[inline(always)]
fn totals<I: Isa>(isa: I, rows: &[I::F32; LANES]) -> Groups {
    lanes(isa, fold(isa, rows, |a, b| isa.add(a, b)))
}

/// Numbers of up to sixteen groups, kept in one place: each kernel leaves its results where the next one, or the
/// next batch, finds them.
#[derive(Default)]
#[repr(C, align(64))]
pub(super) struct Batch {
    /// Largest and smallest elements before they are folded, lane by lane.
    tops: [[u32; LANES]; LANES],
    bottoms: [[u32; LANES]; LANES],
    statistics: Statistics,
    /// Scales as they are stored.
    pub(super) s: Groups,
    /// Zero points.
    pub(super) z: Groups,
    pub(super) coefficients: Coefficients,
}

/// Vectors from memory.
#[inline(always)]
fn load_rows<I: Isa>(isa: I, rows: &[[u32; LANES]; LANES]) -> [I::F32; LANES] {
    let mut v = [isa.splat(0.0); LANES];
    for i in 0..LANES {
        v[i] = isa.from_bits(isa.load_i32(&rows[i]));
    }
    v
}

/// What the scales of up to sixteen groups depend on; false if an element is outside the domain.
pub(super) struct Survey<'a> {
    pub(super) batch: &'a mut Batch,
    pub(super) x: &'a [f32],
    pub(super) group_len: usize,
    pub(super) sum: Sum,
}

impl Kernel for Survey<'_> {
    type Output = bool;

    /// The bits of floats order like integers: signed, the maximum is the largest positive number; unsigned,
    /// it is the negative number farthest from zero, if there is one. NaN is beyond infinity in both, so the
    /// extremes alone show whether every element is in the domain.
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> bool {
        let Batch { tops, bottoms, statistics, .. } = self.batch;
        if self.x.len() <= (LANES - 1) * self.group_len {
            (*tops, *bottoms) = Default::default();
        }
        for (i, group) in self.x.chunks(self.group_len).enumerate() {
            let none = isa.splat_i32(0);
            let (mut top, mut bottom) = ([none; 4], [none; 4]);
            for at in (0..group.len()).step_by(TILE) {
                let x = load_tile(isa, &group[at..]);
                for j in 0..4 {
                    top[j] = isa.max_i32(top[j], isa.to_bits(x[j]));
                    bottom[j] = isa.max_u32(bottom[j], isa.to_bits(x[j]));
                }
            }
            let top = isa.max_i32(isa.max_i32(top[0], top[1]), isa.max_i32(top[2], top[3]));
            let bottom = isa.max_u32(isa.max_u32(bottom[0], bottom[1]), isa.max_u32(bottom[2], bottom[3]));
            isa.store_i32(&mut tops[i], top);
            isa.store_i32(&mut bottoms[i], bottom);
        }
        let signed = |a, b| isa.from_bits(isa.max_i32(isa.to_bits(a), isa.to_bits(b)));
        let unsigned = |a, b| isa.from_bits(isa.max_u32(isa.to_bits(a), isa.to_bits(b)));
        let mut max = lanes(isa, fold(isa, &load_rows(isa, tops), signed));
        let mut min = lanes(isa, fold(isa, &load_rows(isa, bottoms), unsigned));
        let mut worst = 0;
        for i in 0..LANES {
            // Without a negative number the unsigned maximum is the positive one.
            min[i] = if min[i].to_bits() >> 31 == 1 { min[i] } else { 0.0 };
            worst = worst.max(max[i].to_bits()).max(min[i].to_bits() & i32::MAX as u32);
            max[i] = if max[i] < MIN_NORMAL { 0.0 } else { max[i] };
            min[i] = if min[i] > -MIN_NORMAL { 0.0 } else { min[i] };
        }
        (statistics.max, statistics.min) = (max, min);
        if self.sum != Sum::None && worst <= MAX_BITS {
            statistics.len =
                array(|i| self.x.len().saturating_sub(i * self.group_len).min(self.group_len).max(1) as f32);
            statistics.sum = isa.vectorize(Sums { x: self.x, group_len: self.group_len, sum: self.sum });
        }
        worst <= MAX_BITS
    }
}

/// Scales and zero points of a surveyed batch; false if one of them exceeds its type.
pub(super) struct Choose<'a> {
    pub(super) batch: &'a mut Batch,
    pub(super) rule: Rule,
    pub(super) scheme: &'a Scheme,
}

impl Kernel for Choose<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<I: Isa>(self, _isa: I) -> bool {
        let Batch { statistics, s, z, coefficients, .. } = self.batch;
        *s = choose(self.rule, self.scheme.scale_dtype(), statistics);
        *z = zero_points(self.rule, self.scheme, statistics, s);
        *coefficients = Coefficients::new(s, z);
        s.iter().fold(true, |all, s| all & s.is_finite())
    }
}

/// Σ|x| or Σx² of up to sixteen groups.
struct Sums<'a> {
    x: &'a [f32],
    group_len: usize,
    sum: Sum,
}

impl Kernel for Sums<'_> {
    type Output = Groups;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Groups {
        let mut rows = [isa.splat(0.0); LANES];
        for (row, group) in rows.iter_mut().zip(self.x.chunks(self.group_len)) {
            for at in (0..group.len()).step_by(LANES) {
                let x = vector(isa, group, at);
                let term = if self.sum == Sum::Square { isa.mul(x, x) } else { magnitude(isa, x) };
                *row = isa.add(*row, term);
            }
        }
        totals(isa, &rows)
    }
}

/// The multiple of a group's extreme scale with the smallest squared error.
pub(super) struct Search<'a> {
    pub(super) x: &'a [f32],
    pub(super) scheme: &'a Scheme,
    pub(super) s: f32,
    pub(super) z: f32,
}

impl Kernel for Search<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> f32 {
        let mut candidates = [0.0; LANES];
        for (candidate, multiple) in candidates.iter_mut().zip(MSE_MULTIPLES) {
            *candidate = multiple * self.s;
        }
        let candidates = round_scales(self.scheme.scale_dtype(), candidates);
        let inverses = inverses(&candidates);
        let mut rows = [isa.splat(0.0); LANES];
        for i in 0..MSE_MULTIPLES.len() {
            rows[i] = self.squared_error(isa, candidates[i], inverses[i]);
        }
        let errors = totals(isa, &rows);
        let mut best = 0;
        for i in 1..MSE_MULTIPLES.len() {
            if errors[i] < errors[best] {
                best = i;
            }
        }
        candidates[best]
    }
}

impl Search<'_> {
    /// Lanes of Σ(x − s·(u − z))².
    #[inline(always)]
    fn squared_error<I: Isa>(&self, isa: I, s: f32, inverse: f32) -> I::F32 {
        let (s, inverse) = (isa.splat(s), isa.splat(inverse));
        let last = f32::from(self.scheme.last_code());
        let (lowest, highest) = (isa.splat(-self.z), isa.splat(last - self.z));
        let table = self.scheme.table().map(|table| (table.levels(), thresholds(table.levels()).0));
        let mut sum = isa.splat(0.0);
        for at in (0..self.x.len()).step_by(LANES) {
            let x = vector(isa, self.x, at);
            let t = isa.mul(x, inverse);
            let v = match &table {
                None => isa.max(lowest, isa.min(highest, isa.to_f32(isa.round(t)))),
                Some((levels, thresholds)) => {
                    let mut v = isa.splat(f32::from(levels[0]) - self.z);
                    for (level, threshold) in levels[1..].iter().zip(thresholds) {
                        let above = isa.gt(t, isa.splat(*threshold));
                        v = isa.select(above, isa.splat(f32::from(*level) - self.z), v);
                    }
                    v
                }
            };
            let d = isa.sub(x, isa.mul(s, v));
            sum = isa.add(sum, first_lanes(isa, isa.mul(d, d), self.x.len() - at));
        }
        sum
    }
}

/// Scale and zero point that give the decoded group the variance of the input about its mean:
/// `preserve="mean+var"`. Where that variance is 0 or overflows, they are left as they are.
pub(super) struct PreserveVariance<'a> {
    pub(super) x: &'a [f32],
    pub(super) scheme: &'a Scheme,
    pub(super) s: f32,
    pub(super) z: f32,
}

impl Kernel for PreserveVariance<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> (f32, f32) {
        let Self { x, scheme, s, z } = self;
        let zero = isa.splat(0.0);
        let n = x.len() as f32;
        let mut rows = [zero; LANES];
        for at in (0..x.len()).step_by(LANES) {
            rows[0] = isa.add(rows[0], vector(isa, x, at));
        }
        let mean = totals(isa, &rows)[0] / n;

        let group = Coefficients::new(&[s; LANES], &[z; LANES]).group(isa, 0, 0, 0);
        let (mut squares, mut noise) = (zero, zero);
        for at in (0..x.len()).step_by(LANES) {
            let v = vector(isa, x, at);
            let d = isa.sub(v, isa.splat(mean));
            squares = isa.add(squares, first_lanes(isa, isa.mul(d, d), x.len() - at));
            let f = fraction(isa, &group, Grid::new(scheme), v);
            noise = isa.add(noise, isa.mul(f, isa.sub(isa.splat(1.0), f)));
        }
        (rows[0], rows[1]) = (squares, noise);
        let sums = totals(isa, &rows);
        let variance = sums[0] / n;
        let noise = sums[1] / n * s * s;
        let both = variance + noise;
        if both == 0.0 || !both.is_finite() {
            return (s, z);
        }
        let shrink = (variance / both).sqrt();
        let scale = round_scales(scheme.scale_dtype(), [s * shrink; LANES])[0];
        if scale == 0.0 { (scale, z) } else { (scale, z - mean * (1.0 - shrink) / scale) }
    }
}
