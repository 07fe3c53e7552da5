//! Choice of scales and zero points, sixteen groups at a time.
//!
//! Everything here is arithmetic on numbers of a group, written over arrays of 16 so that the compiler runs it
//! in vector registers. f64 appears where the contract names it.

use half::f16;

use crate::scheme::{ScaleDtype, ScaleRule, Scheme, TABLE_ZERO};
use crate::simd::{LANES, array};

/// A number for each of sixteen groups.
pub(crate) type Groups = [f32; LANES];

/// Least magnitude of a scale other than 0, and of an input that does not count as 0.
pub(super) const MIN_NORMAL: f32 = f32::MIN_POSITIVE;

/// Bits of the largest magnitude in the domain, 2^120.
pub(super) const MAX_BITS: u32 = (127 + 120) << 23;

/// What the scale depends on.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Statistics {
    /// max(x, 0)
    pub(super) max: Groups,
    /// min(x, 0)
    pub(super) min: Groups,
    /// Σ|x| or Σx², where the rule asks for it.
    pub(super) sum: Groups,
    /// Elements.
    pub(super) len: Groups,
}

/// The rule of `format.md` §2 that applies, with its constant.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Rule {
    /// The extreme at the end with one more level; holds −2^−(B−1).
    SignedExtreme(f32),
    /// Both extremes at the ends; holds 2^B − 1.
    Range(f32),
    /// One bit: twice the mean magnitude.
    MeanMagnitude,
    /// Never clips; holds the largest code distance from zero.
    Covering(f64),
    /// Never clips either end; holds 2^B − 2.
    CoveringRange(f64),
    /// Eight bits whose prefixes are good codes too.
    Nested,
    /// Level tables: the largest magnitude at the end of the grid.
    TableExtreme,
    /// Level tables: the root mean square times this.
    TableRms(f32),
}

/// Largest distance from zero on the grid of level tables.
const TABLE_END: f32 = 127.0;

/// Outermost level of the Lloyd-Max quantizer of N(0, 1), by bits.
const LLOYD_MAX: [f64; 5] = [0.0, 0.797_884_560_8, 1.51042, 2.15195, 2.73259];

/// Sums a rule needs besides the extremes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sum {
    None,
    Magnitude,
    Square,
}

impl Rule {
    pub(super) fn new(scheme: &Scheme, stochastic: bool) -> Self {
        let bits = scheme.bits();
        let levels = f64::from(1u32 << bits);
        match (scheme.table(), stochastic) {
            (Some(_), _) if scheme.scale() == ScaleRule::Rms => {
                Self::TableRms((LLOYD_MAX[bits as usize] / f64::from(TABLE_END)) as f32)
            }
            (Some(_), _) => Self::TableExtreme,
            _ if scheme.nested() => Self::Nested,
            (_, true) if !scheme.symmetric() => Self::CoveringRange(levels - 2.0),
            (_, true) if bits == 1 => Self::Covering(0.5),
            (_, true) => Self::Covering(levels / 2.0 - 1.0),
            (_, false) if !scheme.symmetric() => Self::Range(levels as f32 - 1.0),
            (_, false) if bits == 1 => Self::MeanMagnitude,
            (_, false) => Self::SignedExtreme(-2.0 / levels as f32),
        }
    }

    pub(super) fn sum(self) -> Sum {
        match self {
            Self::MeanMagnitude => Sum::Magnitude,
            Self::TableRms(_) => Sum::Square,
            _ => Sum::None,
        }
    }
}

/// `f` of each group.
#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> Groups {
    array(f)
}

/// Rounds to half precision and back; not inlined sixteen times over.
#[inline(never)]
fn through_f16(s: f32) -> f32 {
    f16::from_f32_const(s).to_f32_const()
}

/// The half-precision number before or after `s`.
#[inline(never)]
fn step_f16(s: f32, ulps: i32) -> f32 {
    let bits = i32::from(f16::from_f32_const(s).to_bits()) + ulps;
    f16::from_bits(bits.max(0) as u16).to_f32_const()
}

/// Rounds to the type of the scales, RNE.
#[inline(always)]
fn round_to(dtype: ScaleDtype, s: Groups) -> Groups {
    match dtype {
        ScaleDtype::Bf16 => each(|i| {
            let bits = s[i].to_bits();
            f32::from_bits(bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
        }),
        ScaleDtype::F16 => each(|i| through_f16(s[i])),
        ScaleDtype::F32 => s,
    }
}

/// Magnitudes below the least normal one become 0. (No f16 but 0 is that small.)
#[inline(always)]
fn without_subnormals(s: Groups) -> Groups {
    each(|i| if s[i].abs() < MIN_NORMAL { 0.0 } else { s[i] })
}

/// Scales as they are stored: rounded to their type, none subnormal as f32.
#[inline(always)]
pub(super) fn round_scales(dtype: ScaleDtype, s: Groups) -> Groups {
    without_subnormals(round_to(dtype, s))
}

/// The neighbours of scales ≥ 0 in their type, `ulps` = ±1 away; 0 is its own lower one.
#[inline(always)]
fn neighbours(dtype: ScaleDtype, s: Groups, ulps: i32) -> Groups {
    let step = |s: f32, ulp: i32| f32::from_bits((s.to_bits() as i32 + ulps * ulp).max(0) as u32);
    match dtype {
        ScaleDtype::Bf16 => each(|i| step(s[i], 1 << 16)),
        ScaleDtype::F16 => each(|i| step_f16(s[i], ulps)),
        ScaleDtype::F32 => each(|i| step(s[i], 1)),
    }
}

/// The smallest scales ≥ 0 that are `enough` for their group, given their f64 neighbourhood.
#[inline(always)]
fn smallest(dtype: ScaleDtype, near: Groups, enough: impl Fn(usize, f64) -> bool) -> Groups {
    // The addition turns −0, as which the larger of two zeros may come, into 0: −0 has no neighbours.
    let start = round_to(dtype, each(|i| near[i] + 0.0));
    let (above, below) = (neighbours(dtype, start, 1), neighbours(dtype, start, -1));
    without_subnormals(each(|i| {
        if !enough(i, start[i].into()) {
            above[i]
        } else if enough(i, below[i].into()) {
            below[i]
        } else {
            start[i]
        }
    }))
}

/// Scales of sixteen groups, rounded to their type; infinite where that type cannot hold them.
#[inline(always)]
pub(super) fn choose(rule: Rule, dtype: ScaleDtype, x: &Statistics) -> Groups {
    let positive = |i: usize| x.max[i] >= -x.min[i];
    let extreme = |i: usize| {
        let (max, min) = (x.max[i], x.min[i]);
        if max >= -min { max } else { min }
    };
    let magnitude = |i: usize| x.max[i].max(-x.min[i]);
    let range = |i: usize| f64::from(x.max[i]) - f64::from(x.min[i]);
    let rounded = |raw: Groups| round_scales(dtype, raw);
    match rule {
        Rule::SignedExtreme(factor) => rounded(each(|i| extreme(i) * factor)),
        Rule::Range(steps) => rounded(each(|i| (x.max[i] - x.min[i]) / steps)),
        Rule::MeanMagnitude => rounded(each(|i| 2.0 * x.sum[i] / x.len[i])),
        Rule::TableExtreme => rounded(each(|i| magnitude(i) / TABLE_END)),
        Rule::TableRms(factor) => rounded(each(|i| (x.sum[i] / x.len[i]).sqrt() * factor)),
        Rule::Covering(steps) => {
            let target = |i: usize| f64::from(magnitude(i));
            smallest(dtype, each(|i| (target(i) / steps) as f32), |i, s| s * steps >= target(i))
        }
        Rule::CoveringRange(steps) => {
            smallest(dtype, each(|i| (range(i) / steps) as f32), |i, s| s * steps >= range(i))
        }
        Rule::Nested => {
            let far = |i: usize| f64::from(magnitude(i));
            let opposite = |i: usize| f64::from(x.max[i].min(-x.min[i]));
            let near = each(|i| (far(i) / 128.0).max(opposite(i) / 119.0) as f32);
            let s = smallest(dtype, near, |i, s| s * 128.0 >= far(i) && s * 119.0 >= opposite(i));
            each(|i| if positive(i) && s[i] != 0.0 { -s[i] } else { s[i] })
        }
    }
}

/// Zero points of sixteen groups for their scales.
#[inline(always)]
pub(super) fn zero_points(rule: Rule, scheme: &Scheme, x: &Statistics, s: &Groups) -> Groups {
    if let Some(z) = scheme.zero_point() {
        return [z; LANES];
    }
    let last = (1u32 << scheme.bits()) as f32 - 1.0;
    // The addition turns −0 into 0: zero points are integers.
    let clamped = |i: usize, z: f32| if s[i] == 0.0 { 0.0 } else { z.clamp(0.0, last) + 0.0 };
    match rule {
        Rule::CoveringRange(_) => {
            each(|i| clamped(i, (-f64::from(x.min[i]) / f64::from(s[i])).ceil() as f32))
        }
        _ => each(|i| clamped(i, (-x.min[i] / s[i]).round_ties_even())),
    }
}

/// 1 / s, and 0 for 0: every element of a group without a scale then counts as 0.
#[inline(always)]
pub(crate) fn inverses(s: &Groups) -> Groups {
    each(|i| if s[i] == 0.0 { 0.0 } else { 1.0 / s[i] })
}

/// Thresholds between the levels of a table, around the grid's zero: a value above `i` of them is level `i`.
pub(super) fn thresholds(levels: &[u8]) -> ([f32; LANES], usize) {
    let mut between = [f32::INFINITY; LANES];
    for (i, pair) in levels.windows(2).enumerate() {
        between[i] = (f32::from(pair[0]) + f32::from(pair[1])) / 2.0 - TABLE_ZERO;
    }
    (between, levels.len() - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_scale_of_zeros_is_zero_whatever_their_sign() {
        for dtype in [ScaleDtype::F32, ScaleDtype::Bf16, ScaleDtype::F16] {
            for zero in [0.0, -0.0] {
                let scales = smallest(dtype, [zero; LANES], |_, s| s >= 0.0);
                assert_eq!(scales.map(f32::to_bits), [0; LANES], "{dtype:?} {zero}");
            }
        }
    }
}
