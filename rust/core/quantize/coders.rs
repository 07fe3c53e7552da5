//! Elements to codes: one coder a kind of rounding, 64 elements at a time.

use super::draws::{BlockDraws, Draws, STRATUM};
use super::groups::flush;
use super::{BATCH, load_tile};
use super::scales::{self, Groups, MIN_NORMAL};
use crate::scheme::{Mode, Rounding, Scheme};
use crate::simd::{Isa, Kernel, LANES, TILE, array, four};

/// Elements of a systematic block.
pub(super) const BLOCK: usize = TILE;

/// Scales at or above this leave exponents enough for everything: an input that counts as 0 cannot reach
/// another code, and the correction of a quotient cannot underflow.
const SAFE_SCALE: f32 = 1.0 / (1u64 << 60) as f32;

/// What the coders need of the scales and zero points of sixteen groups.
#[derive(Default)]
pub(super) struct Coefficients {
    s: Groups,
    inverse: Groups,
    z: [i32; LANES],
    small: [bool; LANES],
}

impl Coefficients {
    #[inline(always)]
    pub(super) fn new(s: &Groups, z: &Groups) -> Self {
        Self {
            s: *s,
            inverse: scales::inverses(s),
            // The integer in the low bits of z + 2^23. One bit, whose codes do not add z = ½, gets 0.
            z: array(|i| ((z[i] + 8_388_608.0).to_bits() & 0xffff) as i32),
            small: array(|i| s[i].abs() < SAFE_SCALE && s[i] != 0.0),
        }
    }

    /// Group `i` of the sixteen.
    #[inline(always)]
    pub(super) fn group<I: Isa>(&self, isa: I, i: usize, number: u64, first: u64) -> Group<I> {
        Group {
            s: isa.splat(self.s[i]),
            inverse: isa.splat(self.inverse[i]),
            z: self.z[i],
            small: self.small[i],
            zero: self.s[i] == 0.0,
            number,
            first,
        }
    }
}

/// A group ready to be encoded.
#[derive(Clone, Copy)]
pub(super) struct Group<I: Isa> {
    s: I::F32,
    inverse: I::F32,
    z: i32,
    /// The scale is small: divide, and look for subnormal inputs.
    small: bool,
    /// There is no scale to divide by: every element counts as ±0.
    zero: bool,
    /// Number of the group in the tensor.
    number: u64,
    /// Logical index of its first element.
    first: u64,
}

impl<I: Isa> Group<I> {
    /// Subnormal inputs to 0, where they could matter.
    #[inline(always)]
    fn flushed(&self, isa: I, x: [I::F32; 4]) -> [I::F32; 4] {
        if self.small { four!(j => flush(isa, x[j])) } else { x }
    }

    /// x / s, correctly rounded.
    ///
    /// One multiplication by the rounded inverse and two corrections: the first makes the quotient faithful,
    /// the second makes it correctly rounded (Markstein 1990, theorem 8.2: y = RN(1/s), q faithful).
    #[inline(always)]
    fn quotients(&self, isa: I, x: [I::F32; 4]) -> [I::F32; 4] {
        if self.small {
            return four!(j => isa.div(flush(isa, x[j]), self.s));
        }
        four!(j => {
            let q = isa.mul(x[j], self.inverse);
            let q = isa.mul_add(isa.neg_mul_add(q, self.s, x[j]), self.inverse, q);
            isa.mul_add(isa.neg_mul_add(q, self.s, x[j]), self.inverse, q)
        })
    }
}

/// Rounds a tile of 64 elements.
pub(super) trait Coder {
    /// Codes of `x`, the elements of `group` from `at` on.
    fn encode<I: Isa>(&mut self, isa: I, group: &Group<I>, at: usize, x: [I::F32; 4]) -> I::U8;
}

/// The groups of a batch, or a part of one group, to be encoded.
pub(super) struct Encode<'a, C> {
    pub(super) coder: &'a mut C,
    /// At most [`BATCH`] elements.
    pub(super) x: &'a [f32],
    pub(super) group_len: usize,
    /// Position in its group of the first element.
    pub(super) begin: usize,
    pub(super) coefficients: &'a Coefficients,
    /// Number of the first group.
    pub(super) number: u64,
    /// Logical index of the first element of the first group.
    pub(super) first: u64,
    /// Elements of the next batch, to be fetched meanwhile.
    pub(super) next: &'a [f32],
    /// One byte an element and a tile to spare: tiles are stored whole, wherever they begin.
    pub(super) codes: &'a mut [u8; BATCH + TILE],
}

impl<C: Coder> Kernel for Encode<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (i, x) in self.x.chunks(self.group_len).enumerate() {
            let done = i * self.group_len;
            let group = self.coefficients.group(isa, i, self.number + i as u64, self.first + done as u64);
            for at in (0..x.len()).step_by(TILE) {
                if let Some(next) = self.next.get(done + at..done + at + TILE) {
                    four!(j => isa.prefetch(&next[j * LANES]));
                }
                let codes = self.coder.encode(isa, &group, self.begin + at, load_tile(isa, &x[at..]));
                if let Some(to) = self.codes[done + at..].first_chunk_mut() {
                    isa.store_u8(to, codes);
                }
            }
        }
    }
}

/// RNE(x / s) + z, clamped.
pub(super) struct Nearest {
    last: u8,
}

impl Nearest {
    pub(super) fn new(scheme: &Scheme) -> Self {
        Self { last: last_code(scheme) }
    }
}

/// 2^bits − 1
fn last_code(scheme: &Scheme) -> u8 {
    (u32::MAX >> (32 - scheme.bits())) as u8
}

impl Coder for Nearest {
    #[inline(always)]
    fn encode<I: Isa>(&mut self, isa: I, group: &Group<I>, _at: usize, x: [I::F32; 4]) -> I::U8 {
        let x = group.flushed(isa, x);
        let t = four!(j => isa.round(isa.mul(x[j], group.inverse)));
        isa.narrow(t, group.z, self.last)
    }
}

/// One bit: the sign. Zero of either sign, and what counts as zero, is positive.
pub(super) struct Sign;

impl Coder for Sign {
    #[inline(always)]
    fn encode<I: Isa>(&mut self, isa: I, _group: &Group<I>, _at: usize, x: [I::F32; 4]) -> I::U8 {
        let (limit, one, zero) = (isa.splat(-MIN_NORMAL), isa.splat_i32(1), isa.splat_i32(0));
        let bits = four!(j => isa.select_i32(isa.gt(x[j], limit), one, zero));
        isa.narrow(bits, 0, 1)
    }
}

/// The nearest level of a table: the number of thresholds below.
pub(super) struct Levels {
    thresholds: [f32; LANES],
    len: usize,
}

impl Levels {
    pub(super) fn new(levels: &[u8]) -> Self {
        let (thresholds, len) = scales::thresholds(levels);
        Self { thresholds, len }
    }
}

impl Coder for Levels {
    #[inline(always)]
    fn encode<I: Isa>(&mut self, isa: I, group: &Group<I>, _at: usize, x: [I::F32; 4]) -> I::U8 {
        let x = group.flushed(isa, x);
        let t = four!(j => isa.mul(x[j], group.inverse));
        let (zero, one) = (isa.splat_i32(0), isa.splat_i32(1));
        let mut level = [zero; 4];
        for threshold in &self.thresholds[..self.len] {
            let threshold = isa.splat(*threshold);
            for j in 0..4 {
                let above = isa.select_i32(isa.gt(t[j], threshold), one, zero);
                level[j] = isa.add_i32(level[j], above);
            }
        }
        isa.narrow(level, 0, 15)
    }
}

/// An element split at the grid below it: whole steps and the fraction of the next one.
///
/// One bit has no whole steps: its fraction is the distance from the lower of its two levels.
#[inline(always)]
fn split<I: Isa>(isa: I, one_bit: bool, t: I::F32) -> (I::F32, I::F32) {
    if one_bit {
        return (isa.splat(0.0), isa.add(t, isa.splat(0.5)));
    }
    let whole = isa.floor(t);
    (whole, isa.sub(t, whole))
}

/// The fraction of a step that `x` lies above the grid, for uniform levels of two bits or more.
#[inline(always)]
pub(super) fn fraction<I: Isa>(isa: I, group: &Group<I>, x: I::F32) -> I::F32 {
    let [t, ..] = group.quotients(isa, [x; 4]);
    split(isa, false, t).1
}

/// Rounds up where draw + RNE(fraction · 2^16) reaches 2^16.
#[inline(always)]
fn round_by_16<I: Isa>(isa: I, (whole, fraction): (I::F32, I::F32), draw: I::I32) -> I::I32 {
    let fraction = isa.round(isa.mul(fraction, isa.splat((1u32 << 16) as f32)));
    isa.add_i32(isa.round(whole), isa.shr::<16>(isa.add_i32(draw, fraction)))
}

/// Rounds up where draw + RNE(fraction · 2^32) reaches 2^32.
///
/// The fraction, in 0…1, is converted as a signed distance from the nearer end, which fits i32 and is the same
/// modulo 2^32; a fraction of 1 is a whole step.
#[inline(always)]
fn round_by_32<I: Isa>(isa: I, (whole, fraction): (I::F32, I::F32), draw: I::I32) -> I::I32 {
    let one = isa.splat(1.0);
    let upper = isa.min(one, isa.floor(isa.add(fraction, fraction)));
    let f = isa.round(isa.mul(isa.sub(fraction, upper), isa.splat((1u64 << 32) as f32)));
    let sum = isa.add_i32(f, draw);
    let not_sum = isa.xor(sum, isa.splat_i32(-1));
    let carry = isa.or(isa.and(f, draw), isa.and(isa.or(f, draw), not_sum));
    let whole = isa.round(isa.add(whole, isa.floor(fraction)));
    isa.add_i32(whole, isa.shr::<31>(carry))
}

/// Draws of its own for every element: modes iid, antithetic, stratified, subtractive.
pub(super) struct Drawn {
    draws: Draws,
    /// Only stratified rounding has them.
    blocks: Option<BlockDraws>,
    blocks_a_group: u64,
    wide: bool,
    one_bit: bool,
    last: u8,
}

impl Drawn {
    pub(super) fn new(scheme: &Scheme, rounding: &Rounding, group_len: usize, limit: u64) -> Self {
        Self {
            draws: Draws::new(rounding, limit),
            blocks: (rounding.mode() == Mode::Stratified).then(|| BlockDraws::new(rounding)),
            blocks_a_group: group_len.div_ceil(STRATUM) as u64,
            wide: rounding.draw_bits() == 32,
            one_bit: scheme.bits() == 1,
            last: last_code(scheme),
        }
    }
}

impl Coder for Drawn {
    #[inline(always)]
    fn encode<I: Isa>(&mut self, isa: I, group: &Group<I>, at: usize, x: [I::F32; 4]) -> I::U8 {
        if self.one_bit && group.zero {
            return Sign.encode(isa, group, at, x);
        }
        let index = group.first + at as u64;
        let draws = match &mut self.blocks {
            None => self.draws.tile(isa, index),
            Some(blocks) => {
                let block = group.number * self.blocks_a_group + (at / STRATUM) as u64;
                self.draws.stratified(isa, index, blocks, block)
            }
        };
        let t = group.quotients(isa, x);
        let parts = four!(j => split(isa, self.one_bit, t[j]));
        let codes = if self.wide {
            four!(j => round_by_32(isa, parts[j], draws[j]))
        } else {
            four!(j => round_by_16(isa, parts[j], draws[j]))
        };
        let z = if self.one_bit { 0 } else { group.z };
        isa.narrow(codes, z, self.last)
    }
}

/// One random phase a block of 64: every partial sum of a block is off by less than one step.
pub(super) struct Systematic {
    blocks: BlockDraws,
    blocks_a_group: u64,
    one_bit: bool,
}

impl Systematic {
    pub(super) fn new(scheme: &Scheme, rounding: &Rounding, group_len: usize) -> Self {
        let blocks_a_group = group_len.div_ceil(BLOCK) as u64;
        Self { blocks: BlockDraws::new(rounding), blocks_a_group, one_bit: scheme.bits() == 1 }
    }
}

impl Coder for Systematic {
    /// With whole steps kept above bit 24, the running sum carries them along: the high byte of its difference
    /// to the element before is floor(t) + up, modulo 256, and the codes never leave a byte (the scale of
    /// stochastic rounding does not clip).
    #[inline(always)]
    fn encode<I: Isa>(&mut self, isa: I, group: &Group<I>, at: usize, x: [I::F32; 4]) -> I::U8 {
        if self.one_bit && group.zero {
            return Sign.encode(isa, group, at, x);
        }
        let block = group.number * self.blocks_a_group + (at / BLOCK) as u64;
        let mut sum = isa.splat_i32(self.blocks.phase(isa, block) as i32);
        let t = group.quotients(isa, x);
        let mut high = [sum; 4];
        for j in 0..4 {
            let (whole, fraction) = split(isa, self.one_bit, t[j]);
            let fraction = isa.round(isa.mul(fraction, isa.splat((1u32 << 24) as f32)));
            let fixed = isa.add_i32(isa.shl::<24>(isa.round(whole)), fraction);
            let sums = isa.add_i32(isa.prefix_sum(fixed), sum);
            sum = isa.splat_last(sums);
            high[j] = isa.shr::<24>(sums);
        }
        let high = isa.narrow(high, 0, u8::MAX);
        let steps = isa.sub_u8(high, isa.previous_u8(high));
        let z = if self.one_bit { 0 } else { group.z as u8 };
        isa.add_u8(steps, isa.splat_u8(z))
    }
}

