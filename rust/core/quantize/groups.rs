//! Numbers of groups: extremes, sums, errors and moments of their elements, all in the contract's order.
//!
//! Each is a kernel of its own, compiled once an instruction set however many coders use it.

use super::Source;
use super::coders::{Group, fraction};
use super::scales::{Groups, MAX_BITS, MIN_NORMAL, Statistics, Sum, inverses, round_scales, thresholds};
use crate::quantize::MSE_MULTIPLES;
use crate::scheme::Scheme;
use crate::simd::{Isa, Kernel, LANES, TILE, array, fold, four};

/// Elements of one or more groups.
#[derive(Clone, Copy)]
pub(super) struct Elements<'a> {
    pub(super) x: Source<'a>,
    /// NaN counts as 0.
    pub(super) nan_zero: bool,
}

impl<'a> Elements<'a> {
    pub(super) fn len(&self) -> usize {
        self.x.len()
    }

    /// `len` of the elements, from `at` on.
    #[inline(always)]
    pub(super) fn part(&self, at: usize, len: usize) -> Self {
        Self { x: self.x.part(at, len), ..*self }
    }

    /// 64 elements from `at` on, zeros behind the end.
    #[inline(always)]
    pub(super) fn tile<I: Isa>(&self, isa: I, at: usize) -> [I::F32; 4] {
        let x = self.x.tile(isa, at);
        if self.nan_zero { four!(j => zero_nan(isa, x[j])) } else { x }
    }

    /// 16 elements from `at` on, subnormals as 0, zeros behind the end.
    #[inline(always)]
    fn vector<I: Isa>(&self, isa: I, at: usize) -> I::F32 {
        let x = self.x.vector(isa, at);
        flush(isa, if self.nan_zero { zero_nan(isa, x) } else { x })
    }
}

/// NaN to 0; everything else unchanged.
#[inline(always)]
fn zero_nan<I: Isa>(isa: I, x: I::F32) -> I::F32 {
    let below_one = isa.select(isa.gt(isa.splat(1.0), x), x, isa.splat(0.0));
    isa.select(isa.gt(x, isa.splat(0.0)), x, below_one)
}

/// Subnormal lanes to 0.
#[inline(always)]
pub(super) fn flush<I: Isa>(isa: I, x: I::F32) -> I::F32 {
    isa.select(isa.gt(isa.splat(MIN_NORMAL), magnitude(isa, x)), isa.splat(0.0), x)
}

/// |x|
#[inline(always)]
fn magnitude<I: Isa>(isa: I, x: I::F32) -> I::F32 {
    isa.from_bits(isa.and(isa.to_bits(x), isa.splat_i32(i32::MAX)))
}

/// `x` in the first `n` lanes, 0 in the others.
#[inline(always)]
fn first_lanes<I: Isa>(isa: I, x: I::F32, n: usize) -> I::F32 {
    let lanes = isa.load(&array(|i| i as f32));
    isa.select(isa.gt(isa.splat(n.min(LANES) as f32), lanes), x, isa.splat(0.0))
}

/// Lanes as an array.
#[inline(always)]
fn lanes<I: Isa>(isa: I, v: I::F32) -> Groups {
    let mut lanes = [0.0; LANES];
    isa.store::<false>(&mut lanes, v);
    lanes
}

/// The lanes of up to sixteen vectors added up.
#[inline(always)]
fn totals<I: Isa>(isa: I, rows: &[I::F32; LANES]) -> Groups {
    lanes(isa, fold(isa, rows, |a, b| isa.add(a, b)))
}

/// What the scales of up to sixteen groups depend on; `None` if an element is outside the domain.
pub(super) struct Survey<'a> {
    pub(super) x: Elements<'a>,
    pub(super) group_len: usize,
    pub(super) sum: Sum,
}

impl Kernel for Survey<'_> {
    type Output = Option<Statistics>;

    /// The bits of floats order like integers: signed, the maximum is the largest positive number; unsigned,
    /// it is the negative number farthest from zero, if there is one. NaN is beyond infinity in both, so the
    /// extremes alone show whether every element is in the domain.
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Self::Output {
        let none = isa.splat(0.0);
        let (mut tops, mut bottoms) = ([none; LANES], [none; LANES]);
        let mut len = [1.0; LANES];
        for (i, first) in (0..self.x.len()).step_by(self.group_len).enumerate() {
            let group = self.x.part(first, self.group_len.min(self.x.len() - first));
            let none = isa.splat_i32(0);
            let (mut top, mut bottom) = ([none; 4], [none; 4]);
            for at in (0..group.len()).step_by(TILE) {
                let x = group.tile(isa, at);
                for j in 0..4 {
                    top[j] = isa.max_i32(top[j], isa.to_bits(x[j]));
                    bottom[j] = isa.max_u32(bottom[j], isa.to_bits(x[j]));
                }
            }
            let top = isa.max_i32(isa.max_i32(top[0], top[1]), isa.max_i32(top[2], top[3]));
            let bottom = isa.max_u32(isa.max_u32(bottom[0], bottom[1]), isa.max_u32(bottom[2], bottom[3]));
            (tops[i], bottoms[i]) = (isa.from_bits(top), isa.from_bits(bottom));
            len[i] = group.len() as f32;
        }
        let signed = |a, b| isa.from_bits(isa.max_i32(isa.to_bits(a), isa.to_bits(b)));
        let unsigned = |a, b| isa.from_bits(isa.max_u32(isa.to_bits(a), isa.to_bits(b)));
        let mut max = lanes(isa, fold(isa, &tops, signed));
        let mut min = lanes(isa, fold(isa, &bottoms, unsigned));
        let mut worst = 0;
        for i in 0..LANES {
            // Without a negative number the unsigned maximum is the positive one.
            min[i] = if min[i].to_bits() >> 31 == 1 { min[i] } else { 0.0 };
            worst = worst.max(max[i].to_bits()).max(min[i].to_bits() & i32::MAX as u32);
            max[i] = if max[i] < MIN_NORMAL { 0.0 } else { max[i] };
            min[i] = if min[i] > -MIN_NORMAL { 0.0 } else { min[i] };
        }
        if worst > MAX_BITS {
            return None;
        }
        let sum = match self.sum {
            Sum::None => [0.0; LANES],
            sum => isa.vectorize(Sums { x: self.x, group_len: self.group_len, sum }),
        };
        Some(Statistics { max, min, sum, len })
    }
}

/// Σ|x| or Σx² of up to sixteen groups.
struct Sums<'a> {
    x: Elements<'a>,
    group_len: usize,
    sum: Sum,
}

impl Kernel for Sums<'_> {
    type Output = Groups;

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) -> Groups {
        let mut rows = [isa.splat(0.0); LANES];
        for (row, first) in rows.iter_mut().zip((0..self.x.len()).step_by(self.group_len)) {
            let group = self.x.part(first, self.group_len.min(self.x.len() - first));
            for at in (0..group.len()).step_by(LANES) {
                let x = group.vector(isa, at);
                let term = if self.sum == Sum::Square { isa.mul(x, x) } else { magnitude(isa, x) };
                *row = isa.add(*row, term);
            }
        }
        totals(isa, &rows)
    }
}

/// The multiple of a group's extreme scale with the smallest squared error.
pub(super) struct Search<'a> {
    pub(super) x: Elements<'a>,
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
        let last = (u32::MAX >> (32 - self.scheme.bits())) as f32;
        let (lowest, highest) = (isa.splat(-self.z), isa.splat(last - self.z));
        let table = self.scheme.table().map(|table| (table.levels(), thresholds(table.levels()).0));
        let mut sum = isa.splat(0.0);
        for at in (0..self.x.len()).step_by(LANES) {
            let x = self.x.vector(isa, at);
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
/// `preserve="mean+var"`.
pub(super) struct PreserveVariance<'a> {
    pub(super) x: Elements<'a>,
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
            rows[0] = isa.add(rows[0], x.vector(isa, at));
        }
        let mean = totals(isa, &rows)[0] / n;

        let group = Group::new(isa, s, inverses(&[s; LANES])[0], z, 0, 0);
        let (mut squares, mut noise) = (zero, zero);
        for at in (0..x.len()).step_by(LANES) {
            let v = x.vector(isa, at);
            let d = isa.sub(v, isa.splat(mean));
            squares = isa.add(squares, first_lanes(isa, isa.mul(d, d), x.len() - at));
            let f = fraction(isa, &group, v);
            noise = isa.add(noise, isa.mul(f, isa.sub(isa.splat(1.0), f)));
        }
        (rows[0], rows[1]) = (squares, noise);
        let sums = totals(isa, &rows);
        let variance = sums[0] / n;
        let noise = sums[1] / n * s * s;
        let both = variance + noise;
        let shrink = if both == 0.0 { 1.0 } else { (variance / both).sqrt() };
        let scale = round_scales(scheme.scale_dtype(), [s * shrink; LANES])[0];
        if scale == 0.0 { (scale, z) } else { (scale, z - mean * (1.0 - shrink) / scale) }
    }
}
