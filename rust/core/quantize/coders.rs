//! Elements to codes: one coder a kind of rounding, 64 elements at a time.

use super::draws::{BlockDraws, Draws, STRATUM};
use super::groups::flush;
use super::scales::{self, Groups, MIN_NORMAL};
use super::{BATCH, load_tile};
use crate::scheme::{Mode, Rounding, ScaleDtype, Scheme};
use crate::simd::{Isa, Kernel, LANES, TILE, array, four};

/// Elements of a systematic block.
pub(super) const BLOCK: usize = TILE;

/// Scales between the inverse of this and this leave exponents enough for everything: an input that counts as 0
/// cannot reach another code, and neither the second word of an inverse nor a remainder can underflow.
const FAR: f32 = (1u64 << 60) as f32;

/// What the coders need of the scales and zero points of sixteen groups.
#[derive(Default)]
pub(super) struct Coefficients {
    s: Groups,
    inverse: Groups,
    inverse_low: Groups,
    z: [i32; LANES],
    far: [bool; LANES],
}

impl Coefficients {
    #[inline(always)]
    pub(super) fn new(s: &Groups, z: &Groups) -> Self {
        let inverse = scales::inverses(s);
        Self {
            s: *s,
            inverse,
            inverse_low: array(|i| (-inverse[i]).mul_add(s[i], 1.0) * inverse[i]),
            // The integer in the low bits of z + 2^23. One bit, whose codes do not add z = ½, gets 0.
            z: array(|i| ((z[i] + 8_388_608.0).to_bits() & 0xffff) as i32),
            far: array(|i| s[i] != 0.0 && !(1.0 / FAR..=FAR).contains(&s[i].abs())),
        }
    }

    /// Group `i` of the sixteen.
    #[inline(always)]
    pub(super) fn group<I: Isa>(&self, isa: I, i: usize, number: u64, first: u64) -> Group<I> {
        Group {
            s: isa.splat(self.s[i]),
            inverse: isa.splat(self.inverse[i]),
            inverse_low: isa.splat(self.inverse_low[i]),
            z: self.z[i],
            far: self.far[i],
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
    /// 1 / s = inverse + inverse_low, almost.
    inverse_low: I::F32,
    z: i32,
    /// The scale is far from 1: divide, and look for subnormal inputs.
    far: bool,
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
        if self.far { four!(j => flush(isa, x[j])) } else { x }
    }

    /// x / s · 2^BITS, correctly rounded.
    ///
    /// The inverse in two words is off by less than 2^−46 of itself, so x · low rounded, plus x · high, rounded once,
    /// is off by no more before that last rounding. The quotient of an x of 24 bits and a scale of at most 11 is
    /// either a number of 24 bits or farther than 2^−37 of itself from every point where rounding changes.
    /// For scales of 24 bits the result is faithful, and a correction by the exact remainder makes it the quotient
    /// (Markstein 1990).
    #[inline(always)]
    fn quotients<const BITS: u32>(&self, isa: I, grid: Grid, x: [I::F32; 4]) -> [I::F32; 4] {
        let unit = isa.splat((1u32 << BITS) as f32);
        if self.far {
            return four!(j => isa.mul(isa.div(flush(isa, x[j]), self.s), unit));
        }
        let (high, low) = (isa.mul(self.inverse, unit), isa.mul(self.inverse_low, unit));
        let q = four!(j => isa.mul_add(x[j], high, isa.mul(x[j], low)));
        if !grid.long_scale {
            return q;
        }
        let s = isa.mul(self.s, isa.splat(1.0 / (1u32 << BITS) as f32));
        four!(j => isa.mul_add(isa.neg_mul_add(q[j], s, x[j]), high, q[j]))
    }

    /// x / s in fixed point, modulo 2^32: floor(t) · 2^BITS + RNE(f · 2^BITS) of the contract's t and f, for BITS of
    /// 16 or 24.
    ///
    /// In 0 ≤ t that is RNE(t · 2^BITS). Below 0 the contract's fraction is t − floor(t) as f32, which in −1…0 rounds
    /// to multiples of 2^−24 and below is exact; with 24 bits that is the very rounding to come.
    /// One bit has no whole steps: its fraction is the distance from the lower of its two levels.
    #[inline(always)]
    fn fixed<const BITS: u32>(&self, isa: I, grid: Grid, x: [I::F32; 4]) -> [I::I32; 4] {
        let mut t = self.quotients::<BITS>(isa, grid, x);
        if grid.one_bit {
            let half = isa.splat((1u32 << BITS) as f32 / 2.0);
            t = four!(j => isa.add(t[j], half));
        } else if BITS == 16 {
            t = four!(j => isa.select(isa.negative(t[j]), isa.negative_to_256ths(t[j]), t[j]));
        } else if grid.wide {
            t = four!(j => wrapped(isa, t[j]));
        }
        four!(j => isa.round(t[j]))
    }

    /// [`Group::fixed`] of a plain grid with 16 bits, plus 0 to 4, unless the scale is far from 1.
    ///
    /// t · 2^16 stays below 2^23: it is off by at most ½ before it is rounded in [`Group::fixed`], and here by 1, half
    /// from the inverse and half from the sum. Either rounding adds ½: less than 3 together, and both are integers.
    #[inline(always)]
    fn nearly_fixed(&self, isa: I, x: [I::F32; 4]) -> [I::I32; 4] {
        let inverse = isa.mul(self.inverse, isa.splat(65536.0));
        four!(j => isa.round(isa.mul_add(x[j], inverse, isa.splat(2.0))))
    }
}

/// `a` modulo 2^32, between ±2^31, for |a| < 2^32.
#[inline(always)]
fn wrapped<I: Isa>(isa: I, a: I::F32) -> I::F32 {
    const TURN: f32 = 4_294_967_296.0;
    // The largest f32 below 2^31.
    let below = isa.splat(2_147_483_520.0);
    let a = isa.select(isa.gt(a, below), isa.sub(a, isa.splat(TURN)), a);
    isa.select(isa.gt(isa.splat(-TURN / 2.0), a), isa.add(a, isa.splat(TURN)), a)
}

/// What the arithmetic of stochastic rounding must know of a scheme.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Grid {
    /// One bit: two levels, ½ a step on either side of zero.
    one_bit: bool,
    /// More than 127 steps on either side of zero.
    wide: bool,
    /// Scales of 24 significant bits.
    long_scale: bool,
}

impl Grid {
    /// None of it.
    const PLAIN: Self = Self { one_bit: false, wide: false, long_scale: false };

    pub(super) fn is_plain(self) -> bool {
        self == Self::PLAIN
    }

    pub(super) fn new(scheme: &Scheme) -> Self {
        Self {
            one_bit: scheme.bits() == 1,
            wide: scheme.bits() == 8 && !scheme.symmetric(),
            long_scale: scheme.scale_dtype() == ScaleDtype::F32,
        }
    }
}

/// Rounds tiles of 64 elements.
pub(super) trait Coder {
    /// Prepares for the elements of a batch: `len` of them in `groups` groups, the first one at `at` of `group`.
    #[inline(always)]
    fn begin<I: Isa>(&mut self, _isa: I, _group: &Group<I>, _at: usize, _groups: usize, _len: usize) {}

    /// Codes of `x`, the elements of `group` from `at` on.
    fn encode<I: Isa>(&self, isa: I, group: &Group<I>, at: usize, x: [I::F32; 4]) -> I::U8;
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
    /// One byte an element and a tile to spare: tiles are stored whole, wherever they begin.
    pub(super) codes: &'a mut [u8; BATCH + TILE],
}

impl<C: Coder> Kernel for Encode<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { coder, x, group_len, begin, coefficients, number, first, codes } = self;
        let group = |i: usize| coefficients.group(isa, i, number + i as u64, first + (i * group_len) as u64);
        coder.begin(isa, &group(0), begin, x.len().div_ceil(group_len), x.len());

        // Groups of one tile, the usual ones, two at a time: each fills the other's waiting times.
        let pairs = if group_len == TILE { x.len() / (2 * TILE) } else { 0 };
        let (tiles, _) = x.as_chunks::<TILE>();
        let (to, _) = codes.as_chunks_mut::<TILE>();
        for (p, (x, to)) in tiles.chunks_exact(2).zip(to.chunks_exact_mut(2)).take(pairs).enumerate() {
            let even = coder.encode(isa, &group(2 * p), 0, load_tile(isa, &x[0]));
            let odd = coder.encode(isa, &group(2 * p + 1), 0, load_tile(isa, &x[1]));
            isa.store_u8(&mut to[0], even);
            isa.store_u8(&mut to[1], odd);
        }

        let done = pairs * 2 * TILE;
        for (i, x) in x[done..].chunks(group_len).enumerate() {
            let (group, done) = (group(2 * pairs + i), done + i * group_len);
            for at in (0..x.len()).step_by(TILE) {
                let tile = coder.encode(isa, &group, begin + at, load_tile(isa, &x[at..]));
                if let Some(to) = codes[done + at..].first_chunk_mut() {
                    isa.store_u8(to, tile);
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
        Self { last: scheme.last_code() }
    }
}

impl Coder for Nearest {
    #[inline(always)]
    fn encode<I: Isa>(&self, isa: I, group: &Group<I>, _at: usize, x: [I::F32; 4]) -> I::U8 {
        let x = group.flushed(isa, x);
        isa.narrow(four!(j => isa.round(isa.mul(x[j], group.inverse))), group.z, self.last)
    }
}

/// [`Nearest`] on scales that may be too small for the elements by any factor: x / s is cut off far outside the
/// codes, before it could leave the integers.
pub(super) struct Clamped(pub(super) Nearest);

impl Coder for Clamped {
    #[inline(always)]
    fn encode<I: Isa>(&self, isa: I, group: &Group<I>, _at: usize, x: [I::F32; 4]) -> I::U8 {
        let x = group.flushed(isa, x);
        let t = four!(j => within_limit(isa, isa.mul(x[j], group.inverse)));
        isa.narrow(four!(j => isa.round(t[j])), group.z, self.0.last)
    }
}

/// `t` within ±2^20, far outside every range of codes.
#[inline(always)]
pub(crate) fn within_limit<I: Isa>(isa: I, t: I::F32) -> I::F32 {
    let limit = (1u32 << 20) as f32;
    isa.max(isa.splat(-limit), isa.min(isa.splat(limit), t))
}

/// One bit: the sign. Zero of either sign, and what counts as zero, is positive.
pub(super) struct Sign;

impl Coder for Sign {
    #[inline(always)]
    fn encode<I: Isa>(&self, isa: I, _group: &Group<I>, _at: usize, x: [I::F32; 4]) -> I::U8 {
        let (limit, one, zero) = (isa.splat(-MIN_NORMAL), isa.splat_i32(1), isa.splat_i32(0));
        isa.narrow(four!(j => isa.select_i32(isa.gt(x[j], limit), one, zero)), 0, 1)
    }
}

/// The nearest level of a table: the number of thresholds below.
pub(super) struct Levels {
    thresholds: [f32; LANES],
    len: usize,
    /// A threshold lies at zero, where the least of numbers is told from it.
    at_zero: bool,
}

impl Levels {
    pub(super) fn new(levels: &[u8]) -> Self {
        let (thresholds, len) = scales::thresholds(levels);
        Self { thresholds, len, at_zero: thresholds[..len].contains(&0.0) }
    }
}

impl Coder for Levels {
    #[inline(always)]
    fn encode<I: Isa>(&self, isa: I, group: &Group<I>, _at: usize, x: [I::F32; 4]) -> I::U8 {
        let x = if self.at_zero { four!(j => flush(isa, x[j])) } else { group.flushed(isa, x) };
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

/// The fraction of a step that `x` lies above the grid, for uniform levels of two bits or more.
#[inline(always)]
pub(super) fn fraction<I: Isa>(isa: I, group: &Group<I>, grid: Grid, x: I::F32) -> I::F32 {
    let [t, ..] = group.quotients::<0>(isa, grid, [x; 4]);
    isa.sub(t, isa.floor(t))
}

/// Rounds t up where draw + RNE(f · 2^32) reaches 2^32, f being its fraction.
///
/// The fraction, in 0…1, is converted as a signed distance from the nearer end, which fits i32 and is the same
/// modulo 2^32; a fraction of 1 is a whole step.
#[inline(always)]
fn round_by_32<I: Isa>(isa: I, grid: Grid, t: I::F32, draw: I::I32) -> I::I32 {
    let (whole, fraction) = if grid.one_bit {
        (isa.splat(0.0), isa.add(t, isa.splat(0.5)))
    } else {
        let whole = isa.floor(t);
        (whole, isa.sub(t, whole))
    };
    let upper = isa.min(isa.splat(1.0), isa.floor(isa.add(fraction, fraction)));
    let f = isa.round(isa.mul(isa.sub(fraction, upper), isa.splat((1u64 << 32) as f32)));
    let sum = isa.add_i32(f, draw);
    let not_sum = isa.xor(sum, isa.splat_i32(-1));
    let carry = isa.or(isa.and(f, draw), isa.and(isa.or(f, draw), not_sum));
    let whole = isa.round(isa.add(whole, isa.floor(fraction)));
    isa.add_i32(whole, isa.shr::<31>(carry))
}

/// Draws of its own for every element: modes iid, antithetic, stratified, subtractive.
///
/// PLAIN is the usual case compiled on its own: a plain grid, paired draws, no blocks.
pub(super) struct Drawn<const PLAIN: bool> {
    draws: Draws,
    /// Only stratified rounding has them.
    blocks: Option<BlockDraws>,
    blocks_a_group: u64,
    draws_of_32: bool,
    grid: Grid,
    last: u8,
}

impl<const PLAIN: bool> Drawn<PLAIN> {
    pub(super) fn new(scheme: &Scheme, rounding: &Rounding, group_len: usize, draws: Draws) -> Self {
        Self {
            draws,
            blocks: (rounding.mode() == Mode::Stratified).then(|| BlockDraws::new(rounding)),
            blocks_a_group: group_len.div_ceil(STRATUM) as u64,
            draws_of_32: rounding.draw_bits() == 32,
            grid: Grid::new(scheme),
            last: scheme.last_code(),
        }
    }

    /// Whether that is the usual case.
    pub(super) fn is_plain(scheme: &Scheme, rounding: &Rounding, draws: &Draws) -> bool {
        Grid::new(scheme).is_plain() && rounding.mode() != Mode::Stratified && draws.is_paired()
    }
}

impl<const PLAIN: bool> Coder for Drawn<PLAIN> {
    #[inline(always)]
    fn begin<I: Isa>(&mut self, isa: I, group: &Group<I>, at: usize, groups: usize, len: usize) {
        self.draws.cover(isa, group.first + at as u64, len);
        if let Some(blocks) = &mut self.blocks {
            let first = group.number * self.blocks_a_group + (at / STRATUM) as u64;
            blocks.cover(isa, first, blocks_of(groups, self.blocks_a_group, len, STRATUM));
        }
    }

    /// Rounds up where draw + RNE(f · 2^r) reaches 2^r. With 16 bits that is an addition in fixed point.
    #[inline(always)]
    fn encode<I: Isa>(&self, isa: I, group: &Group<I>, at: usize, x: [I::F32; 4]) -> I::U8 {
        let index = group.first + at as u64;
        if PLAIN {
            let draws = self.draws.paired_tile(isa, index);
            let t = group.nearly_fixed(isa, x);
            let mut sums = four!(j => isa.add_i32(t[j], draws[j]));
            // Above the last multiple of 2^16 by 4 or more, the exact sum is above the same one.
            if group.far || isa.any_low_half_below_4(sums) {
                let t = group.fixed::<16>(isa, Grid::PLAIN, x);
                sums = four!(j => isa.add_i32(t[j], draws[j]));
            }
            // No code needs clamping: the scale of stochastic rounding does not clip.
            return isa.narrow_high(sums, group.z);
        }
        if self.grid.one_bit && group.zero {
            return Sign.encode(isa, group, at, x);
        }
        let draws = match &self.blocks {
            None => self.draws.tile(isa, index),
            Some(blocks) => {
                let block = group.number * self.blocks_a_group + (at / STRATUM) as u64;
                self.draws.stratified(isa, index, blocks, block)
            }
        };
        let codes = if self.draws_of_32 {
            let t = group.quotients::<0>(isa, self.grid, x);
            four!(j => round_by_32(isa, self.grid, t[j], draws[j]))
        } else {
            let t = group.fixed::<16>(isa, self.grid, x);
            four!(j => isa.sar::<16>(isa.add_i32(t[j], draws[j])))
        };
        isa.narrow(codes, group.z, self.last)
    }
}

/// Blocks of a batch: of all its groups, or of a part of one.
#[inline(always)]
fn blocks_of(groups: usize, blocks_a_group: u64, len: usize, block: usize) -> usize {
    if groups > 1 { groups * blocks_a_group as usize } else { len.div_ceil(block) }
}

/// One random phase a block of 64: every partial sum of a block is off by less than one step.
///
/// PLAIN is the usual case compiled on its own: a plain grid.
pub(super) struct Systematic<const PLAIN: bool> {
    blocks: BlockDraws,
    blocks_a_group: u64,
    grid: Grid,
}

impl<const PLAIN: bool> Systematic<PLAIN> {
    pub(super) fn new(scheme: &Scheme, rounding: &Rounding, group_len: usize) -> Self {
        let blocks_a_group = group_len.div_ceil(BLOCK) as u64;
        Self { blocks: BlockDraws::new(rounding), blocks_a_group, grid: Grid::new(scheme) }
    }
}

impl<const PLAIN: bool> Coder for Systematic<PLAIN> {
    #[inline(always)]
    fn begin<I: Isa>(&mut self, isa: I, group: &Group<I>, at: usize, groups: usize, len: usize) {
        let first = group.number * self.blocks_a_group + (at / BLOCK) as u64;
        self.blocks.cover(isa, first, blocks_of(groups, self.blocks_a_group, len, BLOCK));
    }

    /// With whole steps kept above bit 24, the running sum carries them along: by how much it raises its high byte
    /// is floor(t) + up, modulo 256, and the codes never leave a byte (the scale of stochastic rounding does not
    /// clip).
    #[inline(always)]
    fn encode<I: Isa>(&self, isa: I, group: &Group<I>, at: usize, x: [I::F32; 4]) -> I::U8 {
        let grid = if PLAIN { Grid::PLAIN } else { self.grid };
        if grid.one_bit && group.zero {
            return Sign.encode(isa, group, at, x);
        }
        let block = group.number * self.blocks_a_group + (at / BLOCK) as u64;
        let phase = self.blocks.phase(block) as i32;
        let steps = isa.high_byte_steps(group.fixed::<24>(isa, grid, x), phase);
        isa.add_u8(steps, isa.splat_u8(group.z as u8))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheme::ScaleRule;
    use crate::simd::Token;

    /// Counts the x, one in 2^9 of a binade, whose quotient differs from that of the division.
    struct WrongQuotients {
        s: f32,
        grid: Grid,
    }

    impl Kernel for WrongQuotients {
        type Output = usize;

        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> usize {
            let Self { s, grid } = self;
            let group = Coefficients::new(&[s; LANES], &[0.0; LANES]).group(isa, 0, 0, 0);
            let mut wrong = 0;
            for first in (0..1 << 14).step_by(TILE) {
                let x: [f32; TILE] =
                    array(|i| f32::from_bits(1.0f32.to_bits() + ((first + i as u32) << 9 | 0x155)));
                let q = group.quotients::<16>(isa, grid, load_tile(isa, &x));
                for j in 0..4 {
                    let mut lanes = [0.0; LANES];
                    isa.store::<false>(&mut lanes, q[j]);
                    wrong += (0..LANES).filter(|i| lanes[*i] != x[j * LANES + i] / s * 65536.0).count();
                }
            }
            wrong
        }
    }

    #[test]
    fn quotients_by_multiplication_equal_those_of_the_division() {
        let significands = [(ScaleDtype::Bf16, 16), (ScaleDtype::F16, 13), (ScaleDtype::F32, 0)];
        for isa in Token::available() {
            for (dtype, shift) in significands {
                let scheme = Scheme::new(4, 64, true, false, &[], ScaleRule::Extreme, dtype).unwrap();
                for i in 0..128u32 {
                    // All significands of bf16, an eighth of f16, the ends and the middle of f32.
                    let significand = match dtype {
                        ScaleDtype::Bf16 => i,
                        ScaleDtype::F16 => 8 * i + i % 8,
                        ScaleDtype::F32 => (i << 16).wrapping_sub(i) & 0x7f_ffff,
                    };
                    let s = -f32::from_bits(0.01f32.to_bits() & 0xff80_0000 | significand << shift);
                    let wrong = isa.run(WrongQuotients { s, grid: Grid::new(&scheme) });
                    assert_eq!(wrong, 0, "{} {dtype} {s:e}", isa.name());
                }
            }
        }
    }

    /// Counts the x, one in 2^9 of a binade and either sign, whose near quotient is not 0 to 4 above the exact one.
    struct FarFromExact {
        s: f32,
    }

    impl Kernel for FarFromExact {
        type Output = usize;

        #[inline(always)]
        fn run<I: Isa>(self, isa: I) -> usize {
            let group = Coefficients::new(&[self.s; LANES], &[0.0; LANES]).group(isa, 0, 0, 0);
            let mut far = 0;
            for first in (0..1 << 14).step_by(TILE) {
                let x: [f32; TILE] = array(|i| {
                    f32::from_bits(
                        (1.0f32.to_bits() + ((first + i as u32) << 9 | 0x155)) | ((i as u32 & 1) << 31),
                    )
                });
                let x = load_tile(isa, &x);
                let (near, exact) = (group.nearly_fixed(isa, x), group.fixed::<16>(isa, Grid::PLAIN, x));
                for j in 0..4 {
                    let mut lanes = [0; LANES];
                    isa.store_i32(&mut lanes, isa.sub_i32(near[j], exact[j]));
                    far += lanes.iter().filter(|d| **d > 4).count();
                }
            }
            far
        }
    }

    #[test]
    fn near_quotients_are_near() {
        for isa in Token::available() {
            for significand in (0..1 << 10).step_by(3) {
                for exponent in [1.0f32, 0.25, 0.03125, 0.015625] {
                    let s = f32::from_bits(exponent.to_bits() | significand << 13);
                    assert_eq!(isa.run(FarFromExact { s }), 0, "{} {s:e}", isa.name());
                }
            }
        }
    }
}
