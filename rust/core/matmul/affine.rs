//! How codes stand to the integers they mean, in the form that costs a kernel least.

use crate::scheme::{Scheme, Table};
use crate::simd::Isa;

use super::cuts::Cuts;
use super::panel::Lanes;

/// Integers up to here are exact in f32.
const EXACT: u64 = 1 << 24;

/// How a segment's zero point enters `bracket = Σ k_r·q − z_r·Σq`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Form {
    /// z_r is one integer: the sum of products begins at −z_r·Σq.
    Start,
    /// Sums of products are f32, or exact in it because they stay below 2^24: one fused multiply-add.
    Float,
    /// In integers, 2^shift times as large.
    Integer,
}

/// The rule of a weight's zero points: `2^shift · z_r = zero`, or of a stored zero point z
/// `2^shift · z_r = z_factor · z − z_offset`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Affine {
    pub(super) form: Form,
    shift: u32,
    zero: i32,
    z_factor: i32,
    z_offset: i32,
    /// What reading a prefix multiplies the scale with: 2^(bits − read_bits).
    pub(super) scale: f32,
    /// Whether zero points are stored.
    pub(super) stored: bool,
}

impl Affine {
    /// The form for sums of integer products, or of floats, of codes less `offset`.
    pub(super) fn new(scheme: &Scheme, read_bits: u32, cuts: &Cuts, floats: bool, offset: i32) -> Self {
        let dropped = scheme.bits() - read_bits;
        // Twice the value of the dropped bits' middle, and of what is taken off the codes.
        let middle = (1 << dropped) - 1 + (offset << (dropped + 1));
        let fixed = scheme.zero_point().map(|z| (2.0 * z) as i32 - middle);
        let (mut shift, mut zero) = (dropped + 1, fixed.unwrap_or(0));
        while fixed.is_some() && shift > 0 && zero % 2 == 0 {
            (shift, zero) = (shift - 1, zero / 2);
        }
        let (z_factor, z_offset) = match dropped {
            0 => (1, offset),
            _ => (2, middle),
        };
        if fixed.is_none() && dropped == 0 {
            shift = 0;
        }
        let codes = scheme.table().map_or(1 << read_bits, |_| 256);
        let largest = cuts.longest_segment() as u64 * 127 * codes;
        let form = match fixed {
            _ if floats => Form::Float,
            Some(_) if shift == 0 => Form::Start,
            _ if largest <= EXACT => Form::Float,
            _ => Form::Integer,
        };
        let scale = (1u32 << dropped) as f32;
        Self { form, shift, zero, z_factor, z_offset, scale, stored: fixed.is_none() }
    }

    /// What a segment's sum of activation codes contributes: the start of its sum of products, or Σq in f32 or
    /// in integers.
    pub(super) fn term(&self, sum: i32) -> u32 {
        match self.form {
            Form::Start => self.zero.wrapping_mul(sum).wrapping_neg().cast_unsigned(),
            Form::Float => (sum as f32).to_bits(),
            Form::Integer => sum.cast_unsigned(),
        }
    }

    /// A zero point as brackets take it.
    pub(super) fn zero(&self, stored: Option<u8>) -> u32 {
        let zero = stored.map_or(self.zero, |z| self.z_factor * i32::from(z) - self.z_offset);
        match self.form {
            Form::Float => (zero as f32 / (1u32 << self.shift) as f32).to_bits(),
            _ => zero.cast_unsigned(),
        }
    }

    /// The bracket of a segment from its sum of products, in the form `START` or [`Form::Float`]; exact but for
    /// one rounding to f32.
    #[inline(always)]
    pub(super) fn bracket<I: Isa, const START: bool>(isa: I, sum: I::F32, zero: &Lanes, term: u32) -> I::F32 {
        if START {
            return sum;
        }
        let zero = isa.from_bits(isa.load_i32(zero));
        isa.neg_mul_add(zero, isa.splat(f32::from_bits(term)), sum)
    }

    /// The same in the form [`Form::Integer`].
    #[inline(always)]
    pub(super) fn integer_bracket<I: Isa>(&self, isa: I, dots: I::I32, zero: &Lanes, term: u32) -> I::F32 {
        let zero = isa.mul_i32(isa.load_i32(zero), isa.splat_i32(term.cast_signed()));
        let dots = isa.mul_i32(dots, isa.splat_i32(1 << self.shift));
        // Exact: a division by a power of two far from the ends of the range.
        let unit = isa.splat(1.0 / (1u32 << self.shift) as f32);
        isa.mul(isa.to_f32(isa.sub_i32(dots, zero)), unit)
    }
}

/// Largest code, or level, that a dot product meets.
pub(super) fn max_code(table: Option<&Table>, bits: u32) -> u8 {
    match table {
        Some(table) => table.padded()[table.padded().len() - 1],
        None => (u32::MAX >> (32 - bits)) as u8,
    }
}
